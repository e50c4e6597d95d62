//! Reading a trace file, epoch by epoch.

use std::io::{self, Read, Seek, SeekFrom};
use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PageRun};

use super::parquet::{Column, Fault, Footer, Physical, RowGroup, SchemaColumn, read_footer};
use super::{
    ACCESSED, COLUMNS, EPOCH, FIRST_PAGE, FORMAT_VERSION, Header, KEY_EPOCH_US, KEY_EPOCHS, KEY_GUEST_PAGES, KEY_NAME,
    KEY_PAGE_BYTES, KEY_VERSION, KIND, KINDS, OWNER, PAGE_BYTES, PAGES, ZERO,
};
use crate::trace::check::{RunsOf, check_runs};
use crate::trace::{MAX_EPOCHS, TraceEpoch, TraceError, WrittenRun};

/// The most runs of one epoch, and of the zero pages; also the most rows of a row group.
pub const MAX_EPOCH_RUNS: u64 = 1 << 26;
/// The largest footer: that of a file of some ten thousand row groups.
const MAX_FOOTER_BYTES: u64 = 8 << 20;
/// The largest column of a row group, as stored.
const MAX_CHUNK_BYTES: u64 = 256 << 20;
/// Rows that are decoded at a time.
const BATCH_ROWS: u64 = 1 << 13;

const MAGIC: [u8; 4] = *b"PAR1";
/// The magic of a file whose footer is encrypted.
const MAGIC_ENCRYPTED: [u8; 4] = *b"PARE";

/// Why a trace file was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Reading failed.
    #[error("reading the trace file failed")]
    Io(#[from] io::Error),
    /// The file is something else.
    #[error("not a Parquet file")]
    NotParquet,
    /// The file begins as one and has no end.
    #[error(
        "the trace file has no end: its recording was cut off, or it was not copied whole. Parquet's table of contents \
         comes last, so what is there cannot be read; record or copy it again"
    )]
    Cut,
    /// The file contradicts itself.
    #[error("the trace file is damaged: {what}{}", Place(*.place))]
    Damaged {
        /// In which way.
        what: &'static str,
        /// Where: column and row group; `None` for the footer.
        place: Option<(&'static str, usize)>,
    },
    /// The file is sound but uses something that is not supported.
    #[error("the trace file uses what is not supported here: {what}{}", Place(*.place))]
    Unsupported {
        /// What.
        what: String,
        /// Where: column and row group; `None` for the footer.
        place: Option<(&'static str, usize)>,
    },
    /// A column is missing, or there twice.
    #[error("the Parquet file needs one column `{column}` to be a trace; it has the columns {found}")]
    Column {
        /// The column's name.
        column: &'static str,
        /// The columns that are there.
        found: String,
    },
    /// A column is of another type.
    #[error("the column `{column}` must hold {expected}")]
    ColumnType {
        /// The column's name.
        column: &'static str,
        /// What it has to hold.
        expected: &'static str,
    },
    /// A key of the metadata is missing or has no sensible value.
    #[error(
        "the file's key-value metadata needs `{key}` as a number, and has {}. Tools that rewrite a file tend to drop it; \
         set it again when writing",
        .found.as_deref().map_or_else(|| "no such key".to_owned(), |found| format!("{found:?}"))
    )]
    Key {
        /// The key.
        key: &'static str,
        /// Its value, if it is there.
        found: Option<String>,
    },
    /// The file is of another version.
    #[error("the trace file is of format version {found}, and this program reads version {FORMAT_VERSION}")]
    Version {
        /// Its version.
        found: u64,
    },
    /// The pages are of another size.
    #[error("the trace is of pages of {found} bytes; only pages of {PAGE_BYTES} bytes are supported")]
    PageBytes {
        /// The size.
        found: u64,
    },
    /// Rows are not in the order of their epochs.
    #[error("the rows are not in order: epoch {epoch} comes after epoch {before}. Write the file with ORDER BY epoch")]
    EpochOrder {
        /// The epoch that comes late.
        epoch: u64,
        /// An epoch before it.
        before: u64,
    },
    /// There are rows of epochs behind the last one.
    #[error(
        "the file says in `{KEY_EPOCHS}` that it has {epochs} epochs, and has rows of later ones; leave that key out where \
         it is not known"
    )]
    BeyondEnd {
        /// How many epochs the file says it has.
        epochs: u64,
    },
    /// A value is out of range.
    #[error("the column `{column}` has the value {value}; it must be {expected}")]
    Value {
        /// The column.
        column: &'static str,
        /// The value.
        value: i64,
        /// What it may be.
        expected: &'static str,
    },
    /// The trace is larger than asked for.
    #[error("the trace has more than {max} runs and epochs; take a part of it, for instance WHERE epoch < 1000")]
    TooManyRuns {
        /// The limit.
        max: u64,
    },
    /// The trace breaks a rule.
    #[error("not a valid trace")]
    Trace(#[from] TraceError),
}

/// Says where something is.
struct Place(Option<(&'static str, usize)>);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some((column, group)) => write!(f, " (column `{column}`, row group {group})"),
            None => Ok(()),
        }
    }
}

impl ReadError {
    fn new(fault: Fault, place: Option<(&'static str, usize)>) -> Self {
        match fault {
            Fault::Damaged(what) => Self::Damaged { what, place },
            Fault::Unsupported(what) => Self::Unsupported { what, place },
        }
    }
}

/// Reads a trace file epoch by epoch.
///
/// Files may come from other tools: columns are found by name and may be in any order, with others between them; integers
/// may be of 32 or 64 bits; epochs without rows count as epochs in which nothing was written; rows of one epoch may be in
/// any order. Only the order of epochs must be right. Files written by [`super::Writer`] keep all of this.
///
/// Memory: one row group as stored, one page of each column, and one epoch. No content of a file makes it panic or use
/// more than these limits allow.
#[derive(Debug)]
pub struct Reader<R> {
    rows: Rows<R>,
    header: Header,
    /// How many epochs the trace has, if the file says so.
    epochs: Option<u64>,
    /// The epoch to give next.
    next: u64,
    /// A row of a later epoch.
    pending: Option<Row>,
    zero: Vec<PageRun>,
}

impl<R: Read + Seek> Reader<R> {
    /// Reads a file's footer.
    ///
    /// # Errors
    /// [`ReadError`] says what is wrong with the file.
    pub fn new(mut from: R) -> Result<Self, ReadError> {
        let (footer, data_end) = footer_of(&mut from)?;
        let version = number(&footer, KEY_VERSION)?;
        if version != u64::from(FORMAT_VERSION) {
            return Err(ReadError::Version { found: version });
        }
        let page_bytes = number(&footer, KEY_PAGE_BYTES)?;
        if page_bytes != PAGE_BYTES {
            return Err(ReadError::PageBytes { found: page_bytes });
        }
        let header = Header {
            name: footer.value(KEY_NAME).unwrap_or_default().to_owned(),
            pages: number(&footer, KEY_GUEST_PAGES)?,
            epoch: Duration::from_micros(number(&footer, KEY_EPOCH_US)?),
        };
        header.check()?;
        let epochs = footer.value(KEY_EPOCHS).map(|_| number(&footer, KEY_EPOCHS)).transpose()?;
        if let Some(epochs) = epochs
            && !(1..=MAX_EPOCHS).contains(&epochs)
        {
            return Err(TraceError::EpochCount { epochs }.into());
        }
        Ok(Self { rows: Rows::new(from, footer, data_end)?, header, epochs, next: 0, pending: None, zero: Vec::new() })
    }

    /// What is said of the trace as a whole.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many epochs the trace has, if the file says so. Files of other tools may not.
    pub fn epochs(&self) -> Option<u64> {
        self.epochs
    }

    /// The next epoch; `None` after the last one.
    ///
    /// # Errors
    /// [`ReadError`] says what is wrong with the file. Do not go on after an error.
    pub fn next_epoch(&mut self) -> Result<Option<TraceEpoch>, ReadError> {
        let mut epoch = TraceEpoch::default();
        let mut runs = 0;
        let mut any = false;
        while let Some(row) = self.next_row()? {
            if row.epoch < self.next {
                return Err(ReadError::EpochOrder { epoch: row.epoch, before: self.next });
            }
            if row.epoch > self.next {
                // Whatever lies between has no rows.
                self.pending = Some(row);
                any = true;
                break;
            }
            any = true;
            runs += 1;
            if runs > MAX_EPOCH_RUNS {
                return Err(ReadError::TooManyRuns { max: MAX_EPOCH_RUNS });
            }
            let run = row.run;
            if row.accessed {
                let accessed = epoch.accessed.get_or_insert_default();
                if run.count > 0 {
                    accessed.push(run);
                }
            } else if run.count > 0 {
                epoch.written.push(WrittenRun { run, owner: row.owner });
            }
        }
        match self.epochs {
            None if !any => return self.end(),
            Some(epochs) if self.next == epochs => {
                // A row is left over if the trace goes on after the end it gives for itself.
                if any {
                    return Err(ReadError::BeyondEnd { epochs });
                }
                return self.end();
            }
            None | Some(_) => {}
        }
        epoch.written.sort_unstable_by_key(|written| written.run);
        if let Some(accessed) = &mut epoch.accessed {
            accessed.sort_unstable();
        }
        epoch.check(self.next, self.header.pages)?;
        self.next += 1;
        Ok(Some(epoch))
    }

    /// The pages that were zero all along, once [`Self::next_epoch`] has returned `None`; ascending.
    pub fn into_zero(self) -> Vec<PageRun> {
        self.zero
    }

    /// The end of the trace.
    fn end(&mut self) -> Result<Option<TraceEpoch>, ReadError> {
        if self.next == 0 {
            return Err(TraceError::EpochCount { epochs: 0 }.into());
        }
        self.zero.sort_unstable();
        check_runs(RunsOf::Zero, self.zero.iter().copied(), self.header.pages)?;
        Ok(None)
    }

    /// The next row that belongs to an epoch; zero pages are put aside.
    fn next_row(&mut self) -> Result<Option<Row>, ReadError> {
        if self.pending.is_some() {
            return Ok(self.pending.take());
        }
        while let Some(values) = self.rows.next()? {
            match Meaning::new(values)? {
                Meaning::Epoch(row) => return Ok(Some(row)),
                Meaning::Zero(run) if run.count == 0 => {}
                Meaning::Zero(_) if self.zero.len() as u64 == MAX_EPOCH_RUNS => {
                    return Err(ReadError::TooManyRuns { max: MAX_EPOCH_RUNS });
                }
                Meaning::Zero(run) => self.zero.push(run),
            }
        }
        Ok(None)
    }
}

/// A row of an epoch.
#[derive(Debug, Clone, Copy)]
struct Row {
    epoch: u64,
    accessed: bool,
    run: PageRun,
    owner: AddressSpaceId,
}

/// What a row says.
#[derive(Debug, Clone, Copy)]
enum Meaning {
    /// Pages were written or accessed.
    Epoch(Row),
    /// Pages were zero; this belongs to no epoch.
    Zero(PageRun),
}

impl Meaning {
    /// What a row with these values says, in the order of [`COLUMNS`].
    fn new(values: [i64; COLUMNS.len()]) -> Result<Self, ReadError> {
        let unsigned = |column: usize, expected| {
            u64::try_from(values[column]).or(Err(ReadError::Value {
                column: COLUMNS[column],
                value: values[column],
                expected,
            }))
        };
        let first_page = unsigned(FIRST_PAGE, "a page number, from 0")?;
        let pages = unsigned(PAGES, "a number of pages, or 0")?;
        // What lies outside the guest is found by the check of the epoch; this is for the sums until then.
        if first_page.checked_add(pages).is_none_or(|end| end > i64::MAX as u64) {
            let expected = "a number of pages that exist";
            return Err(ReadError::Value { column: COLUMNS[PAGES], value: values[PAGES], expected });
        }
        let run = PageRun::new(first_page, pages);
        let kind = values[KIND] as usize;
        if kind == ZERO {
            return Ok(Self::Zero(run));
        }
        const EPOCHS: &str = "an epoch's number, from 0 and below 2^24";
        let epoch = unsigned(EPOCH, EPOCHS)?;
        if epoch >= MAX_EPOCHS {
            return Err(ReadError::Value { column: COLUMNS[EPOCH], value: values[EPOCH], expected: EPOCHS });
        }
        let owner = u32::try_from(values[OWNER]).or(Err(ReadError::Value {
            column: COLUMNS[OWNER],
            value: values[OWNER],
            expected: "an address space's number, from 0 and below 2^32",
        }))?;
        Ok(Self::Epoch(Row { epoch, accessed: kind == ACCESSED, run, owner: AddressSpaceId(owner) }))
    }
}

/// The rows of a file, whatever they mean.
#[derive(Debug)]
struct Rows<R> {
    from: R,
    /// Where the footer begins; all data lies before.
    data_end: u64,
    /// For each of our columns its position in the file and what the schema says of it.
    columns: Vec<(usize, SchemaColumn)>,
    groups: Vec<RowGroup>,
    /// The row group to read next.
    next_group: usize,
    /// The row group at hand.
    group: Vec<Column>,
    group_rows_left: u64,
    batch: [Vec<i64>; COLUMNS.len()],
    batch_at: usize,
}

impl<R: Read + Seek> Rows<R> {
    fn new(from: R, footer: Footer, data_end: u64) -> Result<Self, ReadError> {
        let mut columns = Vec::with_capacity(COLUMNS.len());
        for (index, name) in COLUMNS.into_iter().enumerate() {
            let mut found = footer.columns.iter().enumerate().filter(|(_, column)| column.name == name);
            let (Some((position, column)), None) = (found.next(), found.next()) else {
                let names: Vec<&str> = footer.columns.iter().map(|column| column.name.as_str()).collect();
                return Err(ReadError::Column { column: name, found: names.join(", ") });
            };
            match (column.physical, index == KIND) {
                (Physical::Bytes, true) | (Physical::Int32 | Physical::Int64, false) => {}
                (_, true) => return Err(ReadError::ColumnType { column: name, expected: "text" }),
                (_, false) => {
                    return Err(ReadError::ColumnType { column: name, expected: "integers of 32 or 64 bits" });
                }
            }
            columns.push((position, column.clone()));
        }
        Ok(Self {
            from,
            data_end,
            columns,
            groups: footer.groups,
            next_group: 0,
            group: Vec::new(),
            group_rows_left: 0,
            batch: Default::default(),
            batch_at: 0,
        })
    }

    /// The next row's values, in the order of [`COLUMNS`].
    fn next(&mut self) -> Result<Option<[i64; COLUMNS.len()]>, ReadError> {
        while self.batch_at == self.batch[0].len() {
            if self.group_rows_left == 0 && !self.load_group()? {
                return Ok(None);
            }
            self.load_batch()?;
        }
        let at = self.batch_at;
        self.batch_at += 1;
        Ok(Some(std::array::from_fn(|column| self.batch[column][at])))
    }

    fn load_batch(&mut self) -> Result<(), ReadError> {
        let rows = self.group_rows_left.min(BATCH_ROWS);
        self.batch_at = 0;
        self.group_rows_left -= rows;
        for ((column, values), name) in self.group.iter_mut().zip(&mut self.batch).zip(COLUMNS) {
            values.clear();
            let place = Some((name, self.next_group - 1));
            column.read(rows, values).map_err(|fault| ReadError::new(fault, place))?;
        }
        Ok(())
    }

    /// Goes to the next row group; false after the last one.
    fn load_group(&mut self) -> Result<bool, ReadError> {
        let number = self.next_group;
        let Some(group) = self.groups.get(number) else { return Ok(false) };
        self.next_group += 1;
        self.group.clear();
        for ((position, schema), name) in self.columns.iter().zip(COLUMNS) {
            let place = Some((name, number));
            let chunk = &group.chunks[*position];
            if chunk.bytes > MAX_CHUNK_BYTES || group.rows > MAX_EPOCH_RUNS {
                let what = "such a large row group; write smaller ones, for instance of 100,000 rows".to_owned();
                return Err(ReadError::Unsupported { what, place });
            }
            if chunk.offset.checked_add(chunk.bytes).is_none_or(|end| end > self.data_end) {
                return Err(ReadError::Damaged { what: "a column lies outside the file", place });
            }
            let mut bytes = vec![0; chunk.bytes as usize];
            self.from.seek(SeekFrom::Start(chunk.offset))?;
            self.from.read_exact(&mut bytes)?;
            let words: &'static [&'static str] = if name == COLUMNS[KIND] { &KINDS } else { &[] };
            let column = Column::new(schema, chunk, words, bytes).map_err(|fault| ReadError::new(fault, place))?;
            self.group.push(column);
        }
        self.group_rows_left = group.rows;
        Ok(true)
    }
}

/// Reads the footer, and says where it begins.
fn footer_of<R: Read + Seek>(from: &mut R) -> Result<(Footer, u64), ReadError> {
    /// The footer's length and the magic behind it.
    const TAIL_BYTES: u64 = 8;
    let mut magic = [0; MAGIC.len()];
    let length = from.seek(SeekFrom::End(0))?;
    if length < MAGIC.len() as u64 {
        return Err(ReadError::NotParquet);
    }
    from.seek(SeekFrom::Start(0))?;
    from.read_exact(&mut magic)?;
    if magic != MAGIC && magic != MAGIC_ENCRYPTED {
        return Err(ReadError::NotParquet);
    }
    if length < MAGIC.len() as u64 + TAIL_BYTES {
        return Err(ReadError::Cut);
    }
    let mut tail = [0; TAIL_BYTES as usize];
    from.seek(SeekFrom::Start(length - TAIL_BYTES))?;
    from.read_exact(&mut tail)?;
    let [l0, l1, l2, l3, end @ ..] = tail;
    if end == MAGIC_ENCRYPTED {
        return Err(ReadError::Unsupported { what: "encryption".to_owned(), place: None });
    }
    if end != MAGIC {
        return Err(ReadError::Cut);
    }
    let footer_bytes = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
    let data_end = (length - TAIL_BYTES).checked_sub(footer_bytes).filter(|&end| end >= MAGIC.len() as u64);
    let Some(data_end) = data_end else {
        return Err(ReadError::Damaged { what: "its footer is longer than the file", place: None });
    };
    if footer_bytes > MAX_FOOTER_BYTES {
        let what = format!("a footer of more than {} MiB", MAX_FOOTER_BYTES >> 20);
        return Err(ReadError::Unsupported { what, place: None });
    }
    let mut bytes = vec![0; footer_bytes as usize];
    from.seek(SeekFrom::Start(data_end))?;
    from.read_exact(&mut bytes)?;
    let footer = read_footer(&bytes).map_err(|fault| ReadError::new(fault, None))?;
    Ok((footer, data_end))
}

/// A number of the file's metadata.
fn number(footer: &Footer, key: &'static str) -> Result<u64, ReadError> {
    let found = footer.value(key);
    found.and_then(|value| value.parse().ok()).ok_or_else(|| ReadError::Key { key, found: found.map(str::to_owned) })
}
