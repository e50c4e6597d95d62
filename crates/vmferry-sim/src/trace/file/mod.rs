//! Trace files: one Parquet table of runs, which DuckDB, Polars and pandas read, too.
//!
//! The schema is in `docs/TRACES.md`. In short: a row is a run of neighbouring pages that were written in an epoch, or
//! accessed in it, or zero all along. Each epoch has a row at least: one of no pages stands for an epoch in which nothing
//! was written, so that sums by epoch come out right in any tool. What is said of the trace as a whole is in the file's
//! key-value metadata.
//!
//! [`Writer`] takes epochs as they come, in bounded memory; [`Reader`] gives them back one by one. [`write()`] and
//! [`read`] are for whole traces.

mod parquet;
mod reader;
mod writer;

use std::io::{Read, Seek, Write};
use std::time::Duration;

use vmferry_core::pages::PAGE_BYTES;

pub use reader::{MAX_EPOCH_RUNS, ReadError, Reader};
pub use writer::{WriteError, Writer};

use super::Trace;
use super::check::check_header;

/// The version of the format that is written, and the only one read.
pub const FORMAT_VERSION: u32 = 1;
/// How many runs [`read`] takes into memory, where an epoch counts as two: 1.5 GiB of them.
pub const DEFAULT_MAX_RUNS: u64 = 1 << 26;

/// The columns, in the order in which they are written. They are found by name.
const COLUMNS: [&str; 5] = ["epoch", "kind", "first_page", "pages", "owner"];
const EPOCH: usize = 0;
const KIND: usize = 1;
const FIRST_PAGE: usize = 2;
const PAGES: usize = 3;
const OWNER: usize = 4;

/// The values of the column `kind`.
const KINDS: [&str; 3] = ["written", "accessed", "zero"];
const WRITTEN: usize = 0;
const ACCESSED: usize = 1;
const ZERO: usize = 2;

/// The keys of the file's metadata.
const KEY_VERSION: &str = "vmferry.version";
const KEY_NAME: &str = "vmferry.name";
const KEY_GUEST_PAGES: &str = "vmferry.guest_pages";
const KEY_PAGE_BYTES: &str = "vmferry.page_bytes";
const KEY_EPOCH_US: &str = "vmferry.epoch_us";
const KEY_EPOCHS: &str = "vmferry.epochs";

/// What is said of a trace as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What it is a trace of.
    pub name: String,
    /// The guest's size in pages.
    pub pages: u64,
    /// The length of an epoch.
    pub epoch: Duration,
}

impl Header {
    /// Checks the limits of [`Trace::check`] that concern the header.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self) -> Result<(), super::TraceError> {
        check_header(&self.name, self.pages, self.epoch)
    }
}

impl From<&Trace> for Header {
    fn from(trace: &Trace) -> Self {
        Self { name: trace.name.clone(), pages: trace.pages, epoch: trace.epoch }
    }
}

/// Writes a whole trace, and returns what it was written to.
///
/// # Errors
/// As [`Writer`], and [`WriteError::Trace`] before anything is written if the trace breaks a rule.
pub fn write<W: Write + Send>(trace: &Trace, to: W) -> Result<W, WriteError> {
    trace.check()?;
    let mut writer = Writer::new(to, Header::from(trace))?;
    for epoch in &trace.epochs {
        writer.push(epoch)?;
    }
    writer.finish(&trace.zero)
}

/// Reads a whole trace of at most [`DEFAULT_MAX_RUNS`] runs. Bytes in memory are read through [`std::io::Cursor`].
///
/// # Errors
/// As [`Reader`].
pub fn read<R: Read + Seek>(from: R) -> Result<Trace, ReadError> {
    read_at_most(from, DEFAULT_MAX_RUNS)
}

/// Reads a whole trace of at most `max_runs` runs, which take 24 bytes each; an epoch takes as much as two.
///
/// # Errors
/// As [`Reader`], and [`ReadError::TooManyRuns`].
pub fn read_at_most<R: Read + Seek>(from: R, max_runs: u64) -> Result<Trace, ReadError> {
    let mut reader = Reader::new(from)?;
    let mut epochs = Vec::new();
    let mut size = 0_u64;
    while let Some(epoch) = reader.next_epoch()? {
        size += (2 + epoch.written.len() + epoch.accessed.as_ref().map_or(0, Vec::len)) as u64;
        if size > max_runs {
            return Err(ReadError::TooManyRuns { max: max_runs });
        }
        epochs.push(epoch);
    }
    let Header { name, pages, epoch } = reader.header().clone();
    let trace = Trace { name, pages, epoch, zero: reader.into_zero(), epochs };
    trace.check()?;
    Ok(trace)
}
