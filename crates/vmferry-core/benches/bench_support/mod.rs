//! What the benches of this crate share: their arguments, a clock, random numbers, and tables that are CSV as well.

use std::path::PathBuf;

use rustix::time::{ClockId, clock_gettime};

/// What the command line says.
#[derive(Debug)]
pub(crate) struct Arguments {
    /// Whether this is a bench, and not a run under `cargo test`.
    pub(crate) is_bench: bool,
    /// Numbers.
    pub(crate) sizes: Vec<usize>,
    /// All other words.
    pub(crate) words: Vec<String>,
    /// The file of `--csv FILE`.
    pub(crate) csv: Option<PathBuf>,
}

impl Arguments {
    /// Those of this process. Flags that cargo passes to each bench are left alone.
    ///
    /// # Panics
    /// If `--csv` stands last.
    pub(crate) fn read() -> Self {
        let mut this = Self { is_bench: false, sizes: Vec::new(), words: Vec::new(), csv: None };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--bench" => this.is_bench = true,
                "--csv" => this.csv = Some(arguments.next().expect("--csv needs a file").into()),
                flag if flag.starts_with('-') => {}
                word => match word.parse() {
                    Ok(size) => this.sizes.push(size),
                    Err(_) => this.words.push(word.to_owned()),
                },
            }
        }
        this
    }
}

/// A table that is printed row by row, and kept to be written as CSV.
#[derive(Debug)]
pub(crate) struct Table {
    columns: &'static [Column],
    csv: String,
}

/// A column of a [`Table`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    /// Its name in CSV.
    pub(crate) name: &'static str,
    /// Its heading when printed; `None` for one that is only in CSV.
    pub(crate) heading: Option<&'static str>,
}

/// A value in a [`Table`].
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// A name. Names contain no quotes.
    Text(String),
    /// A count.
    Count(u64),
    /// A measurement, with so many decimals.
    Measured(f64, usize),
}

impl Table {
    /// An empty table.
    pub(crate) fn new(columns: &'static [Column]) -> Self {
        let names: Vec<&str> = columns.iter().map(|column| column.name).collect();
        Self { columns, csv: names.join(",") + "\n" }
    }

    /// Prints the headings.
    pub(crate) fn print_headings(&self) {
        let headings = self.columns.iter().filter_map(|column| column.heading);
        let cells: Vec<String> = headings.enumerate().map(|(index, heading)| aligned(index, heading)).collect();
        println!("{}", cells.join(" "));
    }

    /// Prints a row and keeps it.
    ///
    /// # Panics
    /// If it has not a value for each column.
    pub(crate) fn row(&mut self, values: &[Value]) {
        assert_eq!(values.len(), self.columns.len(), "a value for each column");
        let shown = |value: &Value| match value {
            Value::Text(text) => text.clone(),
            Value::Count(count) => count.to_string(),
            Value::Measured(value, decimals) => format!("{value:.decimals$}"),
        };
        let printed = self.columns.iter().zip(values).filter(|(column, _)| column.heading.is_some());
        let cells: Vec<String> = printed.enumerate().map(|(index, (_, value))| aligned(index, &shown(value))).collect();
        println!("{}", cells.join(" "));
        let in_csv = |value: &Value| match value {
            // A comma would need quotes, which not every reader of such files takes off again.
            Value::Text(text) => text.replace(',', ";"),
            Value::Count(_) => shown(value),
            Value::Measured(value, _) => format!("{value:.3}"),
        };
        self.csv += &values.iter().map(in_csv).collect::<Vec<_>>().join(",");
        self.csv.push('\n');
    }

    /// Writes all rows to the file, if there is to be one.
    ///
    /// # Panics
    /// If that cannot be done.
    pub(crate) fn write_csv(&self, file: Option<&std::path::Path>) {
        if let Some(file) = file {
            std::fs::write(file, &self.csv).unwrap_or_else(|error| panic!("cannot write {}: {error}", file.display()));
        }
    }
}

/// The first column holds names, to the left; the others numbers, to the right.
fn aligned(index: usize, text: &str) -> String {
    if index == 0 { format!("{text:<18}") } else { format!("{text:>10}") }
}

/// The time that this thread has been on a processor: what else the machine does counts little.
pub(crate) fn now_ns() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// The middle one of the values, the upper one of two; and the least.
pub(crate) fn median_and_least(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0])
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014): a seed in, the same sequence on every machine.
#[derive(Debug)]
pub(crate) struct SplitMix(pub(crate) u64);

impl SplitMix {
    /// A number, any of them.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// So many different numbers below the limit, in ascending order.
    pub(crate) fn distinct(&mut self, count: usize, limit: u64) -> Vec<u64> {
        let mut numbers: Vec<u64> = Vec::with_capacity(count);
        while numbers.len() < count {
            numbers.extend((numbers.len()..count).map(|_| self.next() % limit).collect::<Vec<_>>());
            numbers.sort_unstable();
            numbers.dedup();
        }
        numbers
    }
}
