//! Writing a trace file, epoch by epoch.

use std::io::Write;
use std::sync::Arc;

use ::parquet::basic::{Compression, Encoding};
use ::parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties};
use ::parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use ::parquet::schema::parser::parse_message_type;
use ::parquet::schema::types::ColumnPath;
use vmferry_core::pages::PageRun;

use super::{
    ACCESSED, COLUMNS, FIRST_PAGE, FORMAT_VERSION, Header, KEY_EPOCH_US, KEY_EPOCHS, KEY_GUEST_PAGES, KEY_NAME,
    KEY_PAGE_BYTES, KEY_VERSION, KINDS, PAGE_BYTES, WRITTEN, ZERO,
};
use crate::trace::check::{RunsOf, check_runs};
use crate::trace::{MAX_EPOCHS, RunMap, TraceEpoch, TraceError};

/// Rows that are kept in memory until they make a row group: 16 MiB of them.
const ROW_GROUP_ROWS: usize = 1 << 18;

const SCHEMA: &str = "message trace {
    required int32 epoch;
    required binary kind (STRING);
    required int64 first_page;
    required int64 pages;
    required int32 owner (INTEGER(32, false));
}";

/// Why a trace was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The trace breaks a rule. Nothing of the epoch at fault was written.
    #[error("not a valid trace")]
    Trace(#[from] TraceError),
    /// Writing failed. The file is of no use any more.
    #[error("writing the trace file failed")]
    Write(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An earlier call failed, and the file is of no use any more.
    #[error("the trace file cannot be continued after an earlier error; begin a new one")]
    Broken,
}

impl From<ParquetError> for WriteError {
    fn from(error: ParquetError) -> Self {
        match error {
            // An error of the system says more by itself.
            ParquetError::External(source) => Self::Write(source),
            other => Self::Write(Box::new(other)),
        }
    }
}

/// Writes a trace file epoch by epoch.
///
/// Memory: up to 2^18 rows, and the distinct runs written so far, some 30 bytes each. What it is given reaches the
/// underlying writer a row group at a time, so that no buffer is needed below.
///
/// A file that is not finished with [`Self::finish`] cannot be read: Parquet's table of contents comes last.
#[derive(Debug)]
pub struct Writer<W: Write + Send> {
    file: SerializedFileWriter<W>,
    header: Header,
    epochs: u64,
    rows: Rows,
    written: RunMap<()>,
    broken: bool,
}

/// Rows not yet written, by column.
#[derive(Debug, Default)]
struct Rows {
    epoch: Vec<i32>,
    kind: Vec<ByteArray>,
    first_page: Vec<i64>,
    pages: Vec<i64>,
    owner: Vec<i32>,
}

impl<W: Write + Send> Writer<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// [`WriteError::Trace`] for a header out of limits; [`WriteError::Write`].
    pub fn new(to: W, header: Header) -> Result<Self, WriteError> {
        header.check()?;
        let schema = Arc::new(parse_message_type(SCHEMA)?);
        // First pages ascend within an epoch, so that differences are small. The other columns have few distinct
        // values. Both leave little to compress; what is left is worth Snappy's little time and no more.
        let first_page = ColumnPath::from(COLUMNS[FIRST_PAGE]);
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .set_offset_index_disabled(true)
            .set_column_dictionary_enabled(first_page.clone(), false)
            .set_column_encoding(first_page, Encoding::DELTA_BINARY_PACKED)
            .build();
        let file = SerializedFileWriter::new(to, schema, Arc::new(properties))?;
        Ok(Self { file, header, epochs: 0, rows: Rows::default(), written: RunMap::default(), broken: false })
    }

    /// What was said of the trace.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many epochs were written.
    pub fn epochs(&self) -> u64 {
        self.epochs
    }

    /// Bytes handed to the underlying writer so far; up to a row group more is in memory.
    pub fn bytes_written(&self) -> u64 {
        self.file.bytes_written() as u64
    }

    /// Writes the next epoch.
    ///
    /// # Errors
    /// [`WriteError::Trace`] if the epoch breaks a rule of [`crate::trace::Trace::check`]; it is left out then and the file
    /// can go on. [`WriteError::Write`] if writing fails; [`WriteError::Broken`] after that.
    pub fn push(&mut self, epoch: &TraceEpoch) -> Result<(), WriteError> {
        self.usable()?;
        if self.epochs == MAX_EPOCHS {
            return Err(TraceError::EpochCount { epochs: MAX_EPOCHS + 1 }.into());
        }
        epoch.check(self.epochs, self.header.pages)?;
        // MAX_EPOCHS is far below 2^31.
        let number = self.epochs as i32;
        for written in &epoch.written {
            self.row(number, WRITTEN, written.run, written.owner.0)?;
            self.written.add(written.run);
        }
        if epoch.written.is_empty() {
            self.row(number, WRITTEN, PageRun::new(0, 0), 0)?;
        }
        if let Some(accessed) = &epoch.accessed {
            for &run in accessed {
                self.row(number, ACCESSED, run, 0)?;
            }
            if accessed.is_empty() {
                self.row(number, ACCESSED, PageRun::new(0, 0), 0)?;
            }
        }
        self.epochs += 1;
        Ok(())
    }

    /// Ends the file and gives back what it was written to.
    ///
    /// `zero` are the pages that were zero when the recording began, ascending; those written since are left out.
    ///
    /// # Errors
    /// [`WriteError::Trace`] if no epoch was written, or the zero pages break a rule; [`WriteError::Write`],
    /// [`WriteError::Broken`].
    pub fn finish(mut self, zero: &[PageRun]) -> Result<W, WriteError> {
        self.usable()?;
        if self.epochs == 0 {
            return Err(TraceError::EpochCount { epochs: 0 }.into());
        }
        check_runs(RunsOf::Zero, zero.iter().copied(), self.header.pages)?;
        for &run in zero {
            for run in self.written.gaps_within(run) {
                self.row(0, ZERO, run, 0)?;
            }
        }
        self.write_row_group()?;
        let values = [
            (KEY_VERSION, FORMAT_VERSION.to_string()),
            (KEY_NAME, self.header.name.clone()),
            (KEY_GUEST_PAGES, self.header.pages.to_string()),
            (KEY_PAGE_BYTES, PAGE_BYTES.to_string()),
            (KEY_EPOCH_US, self.header.epoch.as_micros().to_string()),
            (KEY_EPOCHS, self.epochs.to_string()),
        ];
        for (key, value) in values {
            self.file.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
        }
        Ok(self.file.into_inner()?)
    }

    fn usable(&self) -> Result<(), WriteError> {
        if self.broken { Err(WriteError::Broken) } else { Ok(()) }
    }

    fn row(&mut self, epoch: i32, kind: usize, run: PageRun, owner: u32) -> Result<(), WriteError> {
        let rows = &mut self.rows;
        rows.epoch.push(epoch);
        rows.kind.push(ByteArray::from(KINDS[kind]));
        // Page numbers are below 2^34: see `check_header`.
        rows.first_page.push(run.first.0 as i64);
        rows.pages.push(run.count as i64);
        rows.owner.push(owner.cast_signed());
        if rows.epoch.len() == ROW_GROUP_ROWS {
            self.write_row_group()?;
        }
        Ok(())
    }

    fn write_row_group(&mut self) -> Result<(), WriteError> {
        if self.rows.epoch.is_empty() {
            return Ok(());
        }
        // Until it is known to have succeeded.
        self.broken = true;
        let rows = std::mem::take(&mut self.rows);
        let mut group = self.file.next_row_group()?;
        write_column::<Int32Type, W>(&mut group, &rows.epoch)?;
        write_column::<ByteArrayType, W>(&mut group, &rows.kind)?;
        write_column::<Int64Type, W>(&mut group, &rows.first_page)?;
        write_column::<Int64Type, W>(&mut group, &rows.pages)?;
        write_column::<Int32Type, W>(&mut group, &rows.owner)?;
        group.close()?;
        self.broken = false;
        Ok(())
    }
}

/// Writes the next column of a row group.
fn write_column<T: DataType, W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[T::T],
) -> Result<(), WriteError> {
    let mut column = group.next_column()?.expect("a row group has as many columns as the schema");
    column.typed::<T>().write_batch(values, None, None)?;
    column.close()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use vmferry_core::pages::AddressSpaceId;

    use super::*;
    use crate::trace::WrittenRun;
    use crate::trace::file::read;

    fn header() -> Header {
        Header { name: "a trace".to_owned(), pages: 1 << 20, epoch: Duration::from_millis(50) }
    }

    fn epoch(runs: &[(u64, u64)]) -> TraceEpoch {
        let written =
            |&(first, count)| WrittenRun { run: PageRun::new(first, count), owner: AddressSpaceId::WHOLE_GUEST };
        TraceEpoch { written: runs.iter().map(written).collect(), accessed: None }
    }

    #[test]
    fn an_epoch_at_fault_is_left_out() {
        let mut writer = Writer::new(Vec::new(), header()).unwrap();
        writer.push(&epoch(&[(1, 2)])).unwrap();
        let error = writer.push(&epoch(&[(5, 2), (3, 1)])).unwrap_err();
        assert!(matches!(error, WriteError::Trace(TraceError::Order { .. })), "{error:?}");
        writer.push(&epoch(&[(7, 1)])).unwrap();
        let trace = read(io::Cursor::new(writer.finish(&[]).unwrap())).unwrap();
        assert_eq!(trace.epochs, [epoch(&[(1, 2)]), epoch(&[(7, 1)])]);
    }

    #[test]
    fn zero_pages_that_were_written_are_left_out() {
        let mut writer = Writer::new(Vec::new(), header()).unwrap();
        writer.push(&epoch(&[(10, 5), (30, 1)])).unwrap();
        writer.push(&epoch(&[(12, 6)])).unwrap();
        let file = writer.finish(&[PageRun::new(0, 20), PageRun::new(30, 1), PageRun::new(40, 2)]).unwrap();
        let zero = read(io::Cursor::new(file)).unwrap().zero;
        assert_eq!(zero, [PageRun::new(0, 10), PageRun::new(18, 2), PageRun::new(40, 2)]);
    }

    #[test]
    fn a_file_needs_an_epoch() {
        let error = Writer::new(Vec::new(), header()).unwrap().finish(&[]).unwrap_err();
        assert!(matches!(error, WriteError::Trace(TraceError::EpochCount { epochs: 0 })), "{error:?}");
    }

    /// Takes some bytes, then fails.
    #[derive(Debug)]
    struct FullDisk(usize);

    impl Write for FullDisk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if bytes.len() > self.0 {
                return Err(io::Error::other("disk full"));
            }
            self.0 -= bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The innermost error.
    fn root(error: &dyn std::error::Error) -> String {
        error.source().map_or_else(|| error.to_string(), root)
    }

    #[test]
    fn memory_is_bounded_and_a_full_disk_is_told() {
        let mut writer = Writer::new(FullDisk(5_000), header()).unwrap();
        let runs: Vec<(u64, u64)> = (0..100_000).map(|run| (run * 7 % 1_000_003, 1)).collect();
        let epochs: Vec<TraceEpoch> = runs
            .chunks(1000)
            .map(|runs| {
                let mut runs = runs.to_vec();
                runs.sort_unstable();
                epoch(&runs)
            })
            .collect();
        let error = epochs.iter().cycle().take(1000).find_map(|epoch| writer.push(epoch).err()).expect("a full disk");
        assert!(matches!(error, WriteError::Write(_)), "{error:?}");
        assert!(root(&error).contains("disk full"), "{}", root(&error));
        assert!(writer.rows.epoch.len() < ROW_GROUP_ROWS);
        assert!(matches!(writer.push(&epochs[0]), Err(WriteError::Broken)));
        assert!(matches!(writer.finish(&[]), Err(WriteError::Broken)));
    }

    #[test]
    fn a_disk_that_is_full_at_the_end_is_told() {
        let mut writer = Writer::new(FullDisk(100), header()).unwrap();
        writer.push(&epoch(&[(1, 2)])).unwrap();
        assert!(root(&writer.finish(&[]).unwrap_err()).contains("disk full"));
    }
}
