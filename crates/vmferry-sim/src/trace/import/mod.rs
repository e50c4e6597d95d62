//! Traces from what other tools recorded: tables as CSV, and memory accesses of a process from valgrind.
//!
//! Input is read line by line; what is kept is the trace.

mod csv;
mod lackey;

use std::collections::HashMap;
use std::io::{self, BufRead, Read};
use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, MAX_RAM_PAGES, PageNumber, PageRun};

pub use csv::{CsvOptions, csv};
pub use lackey::{LackeyOptions, lackey};

use super::file::DEFAULT_MAX_RUNS;
use super::{MAX_EPOCHS, RunMap, Trace, TraceEpoch, TraceError, WrittenRun, union};

/// The longest line that is looked at.
pub const MAX_LINE_BYTES: usize = 4096;
/// The most different pages where pages are renumbered: a touched 64 GiB.
pub const MAX_RENUMBERED_PAGES: usize = 1 << 24;

/// How pages of the input become pages of the trace's guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numbering {
    /// They keep their numbers.
    #[default]
    AsGiven,
    /// They are numbered in the order in which they are first touched, without gaps. For addresses of a process, which
    /// lie far apart. Pages that are neighbours in the trace were touched one after another; they need not be neighbours
    /// in the process.
    FirstTouch,
}

/// What an import made of its input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The trace; it passes [`Trace::check`].
    pub trace: Trace,
    /// The lines read.
    pub lines: u64,
    /// Of those, the lines that say nothing about memory.
    pub skipped_lines: u64,
}

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// Reading failed.
    #[error("reading the input failed")]
    Io(#[from] io::Error),
    /// A line cannot be understood.
    #[error("line {line}")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// What is wrong with it.
        #[source]
        source: LineError,
    },
    /// There is nothing in the input.
    #[error("the input has no {expected}")]
    Empty {
        /// What it should have.
        expected: &'static str,
    },
    /// An option cannot be used.
    #[error("{option} must be {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// The trace breaks a rule.
    #[error("not a valid trace")]
    Trace(#[from] TraceError),
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// The line is longer than [`MAX_LINE_BYTES`].
    #[error("it is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// The line is not text.
    #[error("it is not UTF-8")]
    NotText,
    /// The header lacks a column, or has two that say the same.
    #[error("the header must have {expected}; it has {}", .found.join(", "))]
    Header {
        /// What it must have.
        expected: &'static str,
        /// The columns that it has.
        found: Vec<String>,
    },
    /// The line has more or fewer fields than the header.
    #[error("it has {found} fields, and the header has {expected}")]
    Fields {
        /// How many it has.
        found: usize,
        /// How many it should have.
        expected: usize,
    },
    /// A field has an impossible value.
    #[error("{value:?} in column `{column}`: expected {expected}")]
    Value {
        /// The column.
        column: &'static str,
        /// The value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The line belongs to an earlier epoch than the one before it.
    #[error("epoch {epoch} comes after epoch {before}; sort the input by time")]
    Order {
        /// The line's epoch.
        epoch: u64,
        /// The epoch before.
        before: u64,
    },
    /// The line lies too far from the beginning.
    #[error(
        "it belongs to epoch {epoch}, and at most {MAX_EPOCHS} are possible; take longer epochs, or count time from the \
         beginning of the recording"
    )]
    TooLate {
        /// The line's epoch.
        epoch: u64,
    },
    /// Its pages have numbers that no guest has.
    #[error(
        "its pages lie above the largest guest's; renumber pages by first touch if these are a process's addresses"
    )]
    TooHigh,
    /// There are too many different pages to renumber.
    #[error("there are more than {MAX_RENUMBERED_PAGES} different pages, too many to renumber")]
    TooManyPages,
    /// There are too many runs.
    #[error("there are more than {DEFAULT_MAX_RUNS} runs; take longer epochs, or a part of the input")]
    TooManyRuns,
}

/// Gathers a trace.
#[derive(Debug)]
struct Builder {
    numbering: Option<HashMap<u64, u64>>,
    epochs: Vec<TraceEpoch>,
    /// The epoch at hand.
    written: RunMap<AddressSpaceId>,
    accessed: Option<RunMap<()>>,
    zero: Vec<PageRun>,
    runs: u64,
    /// One past the highest page.
    end: u64,
}

impl Builder {
    fn new(numbering: Numbering) -> Self {
        Self {
            numbering: (numbering == Numbering::FirstTouch).then(HashMap::new),
            epochs: Vec::new(),
            written: RunMap::default(),
            accessed: None,
            zero: Vec::new(),
            runs: 0,
            end: 0,
        }
    }

    /// Goes on to an epoch; those between are ones in which nothing was written.
    fn advance(&mut self, epoch: u64) -> Result<(), LineError> {
        let now = self.epochs.len() as u64;
        if epoch < now {
            return Err(LineError::Order { epoch, before: now });
        }
        if epoch >= MAX_EPOCHS {
            return Err(LineError::TooLate { epoch });
        }
        for _ in now..epoch {
            self.end_epoch()?;
        }
        Ok(())
    }

    fn end_epoch(&mut self) -> Result<(), LineError> {
        let written: Vec<WrittenRun> =
            std::mem::take(&mut self.written).iter().map(|(run, owner)| WrittenRun { run, owner }).collect();
        let accessed = self.accessed.take().map(|accessed| {
            // A write is an access, also where the input does not say so.
            union(accessed.iter().map(|(run, ())| run), written.iter().map(|written| written.run))
        });
        self.runs += (written.len() + accessed.as_ref().map_or(0, Vec::len)) as u64;
        if self.runs > DEFAULT_MAX_RUNS {
            return Err(LineError::TooManyRuns);
        }
        self.epochs.push(TraceEpoch { written, accessed });
        Ok(())
    }

    /// Pages are written in the epoch at hand. Of several writers of a page the first one owns it.
    fn write(&mut self, run: PageRun, owner: AddressSpaceId) -> Result<(), LineError> {
        self.renumbered(run, |builder, run| {
            for gap in builder.written.gaps_within(run) {
                builder.written.update(gap, |_, _| owner);
            }
        })
    }

    /// Pages are read or written in the epoch at hand. Also to be called with no pages, if none were.
    fn access(&mut self, run: PageRun) -> Result<(), LineError> {
        self.accessed.get_or_insert_default();
        self.renumbered(run, |builder, run| {
            builder.accessed.get_or_insert_default().add(run);
        })
    }

    /// Pages were zero and stayed so.
    fn zero(&mut self, run: PageRun) -> Result<(), LineError> {
        self.renumbered(run, |builder, run| builder.zero.push(run))
    }

    /// Calls `each` for the runs of the trace that stand for a run of the input.
    fn renumbered(&mut self, run: PageRun, mut each: impl FnMut(&mut Self, PageRun)) -> Result<(), LineError> {
        if run.count == 0 {
            return Ok(());
        }
        let Some(mut numbers) = self.numbering.take() else {
            if run.first.0.checked_add(run.count).is_none_or(|end| end > MAX_RAM_PAGES) {
                return Err(LineError::TooHigh);
            }
            self.end = self.end.max(run.end());
            each(self, run);
            return Ok(());
        };
        for page in run.first.0..run.first.0.checked_add(run.count).ok_or(LineError::TooHigh)? {
            let next = numbers.len() as u64;
            let number = *numbers.entry(page).or_insert(next);
            if numbers.len() > MAX_RENUMBERED_PAGES {
                return Err(LineError::TooManyPages);
            }
            self.end = self.end.max(number + 1);
            each(self, PageRun { first: PageNumber(number), count: 1 });
        }
        self.numbering = Some(numbers);
        Ok(())
    }

    /// Ends the epoch at hand, and with it the trace. The guest is as large as it is said to be, else as its pages make it.
    fn finish(mut self, name: &str, epoch: Duration, pages: Option<u64>, line: u64) -> Result<Trace, ImportError> {
        self.end_epoch().map_err(|source| ImportError::Line { line, source })?;
        let trace = Trace {
            name: name.to_owned(),
            pages: pages.unwrap_or(self.end).max(1),
            epoch,
            zero: union(self.zero, []),
            epochs: self.epochs,
        };
        trace.check()?;
        Ok(trace)
    }
}

/// Reads lines of bounded length.
#[derive(Debug)]
struct Lines<R> {
    input: R,
    line: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    fn new(input: R) -> Self {
        Self { input, line: Vec::new(), number: 0 }
    }

    /// The next line without its end, or that it is too long; `None` after the last one.
    fn next(&mut self) -> io::Result<Option<Result<&[u8], LineError>>> {
        self.line.clear();
        self.input.by_ref().take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut self.line)?;
        if self.line.is_empty() {
            return Ok(None);
        }
        self.number += 1;
        let ended = self.line.ends_with(b"\n");
        if !ended && self.line.len() > MAX_LINE_BYTES {
            self.skip_rest()?;
            return Ok(Some(Err(LineError::TooLong)));
        }
        let line = &self.line[..self.line.len() - usize::from(ended)];
        Ok(Some(Ok(line.strip_suffix(b"\r").unwrap_or(line))))
    }

    fn skip_rest(&mut self) -> io::Result<()> {
        loop {
            let buffered = self.input.fill_buf()?;
            let end = buffered.iter().position(|&byte| byte == b'\n');
            let used = end.map_or(buffered.len(), |end| end + 1);
            self.input.consume(used);
            if end.is_some() || used == 0 {
                return Ok(());
            }
        }
    }
}
