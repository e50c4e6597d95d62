//! Tables of measurements as CSV files.
//!
//! A file begins with lines that start with `#` and say what its columns are. The figures are drawn from what was read
//! back from the file, so a picture shows neither more nor less than the file.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

/// Lines that a file may have; far more than any run writes.
const MAX_ROWS: usize = 100_000;

/// A column's name and what it holds.
pub type Column = (&'static str, &'static str);

/// Rows of text under named columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    notes: Vec<String>,
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows. `about` is the first note, and each column's meaning another.
    pub fn new(about: &str, columns: &[Column]) -> Self {
        let mut notes: Vec<String> = about.lines().map(str::to_owned).collect();
        notes.extend(columns.iter().map(|(name, meaning)| format!("{name}: {meaning}")));
        Self { notes, columns: columns.iter().map(|&(name, _)| name.to_owned()).collect(), rows: Vec::new() }
    }

    /// # Panics
    /// If the row has another number of cells than there are columns, or if a cell would need quoting.
    pub fn push(&mut self, row: Vec<String>) {
        assert_eq!(row.len(), self.columns.len(), "{row:?} does not fit {:?}", self.columns);
        let is_plain = |cell: &String| !cell.contains(['"', ',', '\n', '\r', '#']);
        assert!(row.iter().all(is_plain), "a cell of {row:?} needs quoting");
        self.rows.push(row);
    }

    /// The rows in the order of the file.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|cells| Row { columns: &self.columns, cells })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.to_csv()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads what [`Self::write`] wrote.
    ///
    /// # Errors
    /// Where the file cannot be read, or is another kind of file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_csv(&text).with_context(|| format!("{} is no table of measurements", path.display()))
    }

    fn to_csv(&self) -> String {
        let mut text = String::new();
        for note in &self.notes {
            let _ = writeln!(text, "# {note}");
        }
        for row in std::iter::once(&self.columns).chain(&self.rows) {
            let _ = writeln!(text, "{}", row.join(","));
        }
        text
    }

    fn from_csv(text: &str) -> Result<Self> {
        let note = |line: &str| line.strip_prefix('#').map(|note| note.trim_start().to_owned());
        let notes: Vec<String> = text.lines().map_while(note).collect();
        let cells = |line: &str| line.split(',').map(str::to_owned).collect::<Vec<String>>();
        let mut lines = text.lines().skip(notes.len());
        let columns = cells(lines.next().context("the line of column names is missing")?);
        let mut rows = Vec::new();
        for line in lines {
            ensure!(rows.len() < MAX_ROWS, "there are more than {MAX_ROWS} rows");
            let row = cells(line);
            ensure!(row.len() == columns.len(), "the row {line:?} has {} cells, not {}", row.len(), columns.len());
            rows.push(row);
        }
        Ok(Self { notes, columns, rows })
    }
}

/// One row of a table.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    columns: &'a [String],
    cells: &'a [String],
}

impl<'a> Row<'a> {
    /// The cell of this column.
    ///
    /// # Errors
    /// Where there is no such column.
    pub fn text(&self, column: &str) -> Result<&'a str> {
        match self.columns.iter().position(|name| name == column) {
            Some(at) => Ok(&self.cells[at]),
            None => bail!("there is no column {column}"),
        }
    }

    /// The cell of this column as a number.
    ///
    /// # Errors
    /// Where there is no such column, or no number in it.
    pub fn number(&self, column: &str) -> Result<f64> {
        let text = self.text(column)?;
        text.parse().with_context(|| format!("{text:?} in column {column} is not a number"))
    }
}

/// A number for a cell: four significant digits are more than any timing here carries.
pub fn cell(value: f64) -> String {
    let digits_before = if value.abs() < 1.0 { 0 } else { value.abs().log10().floor() as i32 + 1 };
    let decimals = usize::try_from(4 - digits_before).unwrap_or(0);
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Table {
        let mut table = Table::new("An example.\nOf two lines.", &[("keys", "a number"), ("name", "a text")]);
        table.push(vec!["100".to_owned(), "lazy 3/5".to_owned()]);
        table.push(vec![cell(0.12345), String::new()]);
        table
    }

    #[test]
    fn the_file_says_what_its_columns_are() {
        let expected =
            "# An example.\n# Of two lines.\n# keys: a number\n# name: a text\nkeys,name\n100,lazy 3/5\n0.1235,\n";
        assert_eq!(example().to_csv(), expected.replace("0.1235", &cell(0.12345)));
    }

    #[test]
    fn what_was_written_is_read_back() {
        assert_eq!(Table::from_csv(&example().to_csv()).unwrap(), example());
    }

    #[test]
    fn cells_are_found_by_their_column() {
        let table = example();
        let row = table.rows().next().unwrap();
        assert_eq!(row.number("keys").unwrap(), 100.0);
        assert_eq!(row.text("name").unwrap(), "lazy 3/5");
        assert!(row.number("name").is_err());
        assert!(row.text("other").is_err());
    }

    #[test]
    fn damaged_files_are_refused() {
        assert!(Table::from_csv("").is_err());
        assert!(Table::from_csv("# only a note\n").is_err());
        assert!(Table::from_csv("one,two\n1\n").is_err());
    }

    #[test]
    #[should_panic(expected = "needs quoting")]
    fn a_cell_with_a_comma_is_refused() {
        Table::new("", &[("one", "")]).push(vec!["1,5".to_owned()]);
    }

    #[test]
    fn cells_have_four_significant_digits() {
        assert_eq!(cell(1234.56), "1235");
        assert_eq!(cell(12.3456), "12.35");
        assert_eq!(cell(1.5), "1.500");
        assert_eq!(cell(0.01234), "0.0123");
        assert_eq!(cell(0.0), "0.0000");
        assert_eq!(cell(123_456.7), "123457");
    }
}
