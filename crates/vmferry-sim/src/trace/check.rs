//! The rules of a trace.

use std::time::Duration;

use vmferry_core::pages::{MAX_RAM_PAGES, PageNumber, PageRun};

use super::{RunMap, Trace, TraceEpoch};

/// The longest name of a trace.
pub const MAX_NAME_BYTES: usize = 1024;
/// The most epochs of a trace: at 50 ms each, nine days.
pub const MAX_EPOCHS: u64 = 1 << 24;
/// The shortest epoch. Lengths are whole multiples of it.
pub const MIN_EPOCH_LENGTH: Duration = Duration::from_micros(1);
/// The longest epoch.
pub const MAX_EPOCH_LENGTH: Duration = Duration::from_secs(3600);

/// Which list of runs an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunsOf {
    /// The written runs of an epoch.
    Written {
        /// The epoch's number, from 0.
        epoch: u64,
    },
    /// The accessed runs of an epoch.
    Accessed {
        /// The epoch's number, from 0.
        epoch: u64,
    },
    /// The zero pages of the trace.
    Zero,
}

impl std::fmt::Display for RunsOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Written { epoch } => write!(f, "the written runs of epoch {epoch}"),
            Self::Accessed { epoch } => write!(f, "the accessed runs of epoch {epoch}"),
            Self::Zero => write!(f, "the zero pages"),
        }
    }
}

/// Which rule a trace breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The name is longer than [`MAX_NAME_BYTES`].
    #[error("the trace's name has {bytes} bytes; at most {MAX_NAME_BYTES} are allowed")]
    Name {
        /// The name's length.
        bytes: usize,
    },
    /// The guest has no pages, or more than [`MAX_RAM_PAGES`].
    #[error("a guest has 1 to {MAX_RAM_PAGES} pages, not {pages}")]
    GuestSize {
        /// The pages it was said to have.
        pages: u64,
    },
    /// An epoch is too short, too long, or no whole number of microseconds.
    #[error("an epoch takes 1 µs to 1 h in whole microseconds, not {length:?}")]
    EpochLength {
        /// The length given.
        length: Duration,
    },
    /// There are no epochs, or more than [`MAX_EPOCHS`].
    #[error("a trace has 1 to {MAX_EPOCHS} epochs, not {epochs}")]
    EpochCount {
        /// How many there were.
        epochs: u64,
    },
    /// A run without pages.
    #[error("{of} hold an empty run at page {}", first.0)]
    EmptyRun {
        /// Where.
        of: RunsOf,
        /// The page at which it stands.
        first: PageNumber,
    },
    /// A run that reaches outside the guest.
    #[error("{of} hold {} pages from page {}, and the guest has {pages}", run.count, run.first.0)]
    OutsideGuest {
        /// Where.
        of: RunsOf,
        /// The run.
        run: PageRun,
        /// The guest's size.
        pages: u64,
    },
    /// A run that begins before the end of the run before it.
    #[error("{of} are not ascending, or overlap, at page {}", first.0)]
    Order {
        /// Where.
        of: RunsOf,
        /// The first page of the later run.
        first: PageNumber,
    },
    /// A page was written and not accessed, though a write is an access.
    #[error("page {} was written in epoch {epoch} but is not among the accessed pages, which include the written ones", page.0)]
    WrittenNotAccessed {
        /// The page.
        page: PageNumber,
        /// The epoch's number, from 0.
        epoch: u64,
    },
    /// A page counts as zero for the whole trace and was written.
    #[error("page {} was written in epoch {epoch} and cannot be a zero page", page.0)]
    WrittenZero {
        /// The page.
        page: PageNumber,
        /// The epoch's number, from 0.
        epoch: u64,
    },
}

impl Trace {
    /// Checks all rules: lengths and sizes are within limits, runs are not empty, ascend without overlap and lie in the
    /// guest, accessed pages include the written ones, and no zero page is written.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self) -> Result<(), TraceError> {
        check_header(&self.name, self.pages, self.epoch)?;
        let epochs = self.epochs.len() as u64;
        if !(1..=MAX_EPOCHS).contains(&epochs) {
            return Err(TraceError::EpochCount { epochs });
        }
        check_runs(RunsOf::Zero, self.zero.iter().copied(), self.pages)?;
        let mut zero = RunMap::default();
        for &run in &self.zero {
            zero.add(run);
        }
        for (number, epoch) in (0..).zip(&self.epochs) {
            epoch.check(number, self.pages)?;
            if let Some(page) = epoch.runs().find_map(|run| zero.first_within(run)) {
                return Err(TraceError::WrittenZero { page, epoch: number });
            }
        }
        Ok(())
    }
}

impl TraceEpoch {
    /// Checks the rules of one epoch, the one numbered `epoch` of a guest of `pages` pages.
    ///
    /// # Errors
    /// As [`Trace::check`].
    pub fn check(&self, epoch: u64, pages: u64) -> Result<(), TraceError> {
        check_runs(RunsOf::Written { epoch }, self.runs(), pages)?;
        let Some(accessed) = &self.accessed else { return Ok(()) };
        check_runs(RunsOf::Accessed { epoch }, accessed.iter().copied(), pages)?;
        let mut accessed = accessed.iter().copied().peekable();
        for run in self.runs() {
            let mut next = run.first.0;
            while next < run.end() {
                while accessed.next_if(|accessed| accessed.end() <= next).is_some() {}
                match accessed.peek() {
                    Some(accessed) if accessed.first.0 <= next => next = accessed.end(),
                    _ => return Err(TraceError::WrittenNotAccessed { page: PageNumber(next), epoch }),
                }
            }
        }
        Ok(())
    }
}

/// Checks what is said about a trace as a whole.
pub(super) fn check_header(name: &str, pages: u64, epoch: Duration) -> Result<(), TraceError> {
    if name.len() > MAX_NAME_BYTES {
        return Err(TraceError::Name { bytes: name.len() });
    }
    if !(1..=MAX_RAM_PAGES).contains(&pages) {
        return Err(TraceError::GuestSize { pages });
    }
    if !(MIN_EPOCH_LENGTH..=MAX_EPOCH_LENGTH).contains(&epoch) || !epoch.subsec_nanos().is_multiple_of(1000) {
        return Err(TraceError::EpochLength { length: epoch });
    }
    Ok(())
}

/// Checks one list of runs.
pub(super) fn check_runs(of: RunsOf, runs: impl Iterator<Item = PageRun>, pages: u64) -> Result<(), TraceError> {
    let mut end = 0;
    for run in runs {
        let first = run.first;
        if run.count == 0 {
            return Err(TraceError::EmptyRun { of, first });
        }
        if first.0.checked_add(run.count).is_none_or(|end| end > pages) {
            return Err(TraceError::OutsideGuest { of, run, pages });
        }
        if first.0 < end {
            return Err(TraceError::Order { of, first });
        }
        end = run.end();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::AddressSpaceId;

    use super::*;
    use crate::trace::WrittenRun;

    fn sound() -> Trace {
        let written =
            |first, count, owner| WrittenRun { run: PageRun::new(first, count), owner: AddressSpaceId(owner) };
        Trace {
            name: "sound".to_owned(),
            pages: 100,
            epoch: Duration::from_millis(50),
            zero: vec![PageRun::new(50, 10), PageRun::new(90, 10)],
            epochs: vec![
                TraceEpoch { written: vec![written(0, 5, 1), written(5, 5, 2)], accessed: None },
                TraceEpoch::default(),
                TraceEpoch {
                    written: vec![written(4, 2, 1), written(20, 1, 0)],
                    accessed: Some(vec![PageRun::new(0, 5), PageRun::new(5, 3), PageRun::new(20, 1)]),
                },
            ],
        }
    }

    #[test]
    fn a_sound_trace_passes() {
        assert_eq!(sound().check(), Ok(()));
    }

    /// Breaks one thing and compares the error.
    fn broken(break_it: impl FnOnce(&mut Trace), expected: TraceError) {
        let mut trace = sound();
        break_it(&mut trace);
        let error = trace.check().unwrap_err();
        assert_eq!(error, expected);
        assert!(!error.to_string().is_empty());
    }

    #[test]
    fn each_rule_is_checked() {
        let second = |epoch| RunsOf::Written { epoch };
        broken(|trace| trace.name = "x".repeat(1025), TraceError::Name { bytes: 1025 });
        broken(|trace| trace.pages = 0, TraceError::GuestSize { pages: 0 });
        broken(|trace| trace.pages = (1 << 34) + 1, TraceError::GuestSize { pages: (1 << 34) + 1 });
        for length in [0, 999, 1500, 3_600_000_001_000] {
            let length = Duration::from_nanos(length);
            broken(|trace| trace.epoch = length, TraceError::EpochLength { length });
        }
        broken(|trace| trace.epochs.clear(), TraceError::EpochCount { epochs: 0 });
        broken(
            |trace| trace.epochs[0].written[1].run.count = 0,
            TraceError::EmptyRun { of: second(0), first: PageNumber(5) },
        );
        broken(
            |trace| trace.epochs[0].written[1].run.count = u64::MAX,
            TraceError::OutsideGuest { of: second(0), run: PageRun::new(5, u64::MAX), pages: 100 },
        );
        broken(
            |trace| trace.pages = 95,
            TraceError::OutsideGuest { of: RunsOf::Zero, run: PageRun::new(90, 10), pages: 95 },
        );
        broken(|trace| trace.epochs[2].written.swap(0, 1), TraceError::Order { of: second(2), first: PageNumber(4) });
        broken(
            |trace| trace.epochs[0].written[0].run.count = 6,
            TraceError::Order { of: second(0), first: PageNumber(5) },
        );
        broken(
            |trace| trace.epochs[2].accessed.as_mut().unwrap()[1].first = PageNumber(4),
            TraceError::Order { of: RunsOf::Accessed { epoch: 2 }, first: PageNumber(4) },
        );
        broken(
            |trace| trace.epochs[2].accessed.as_mut().unwrap().truncate(2),
            TraceError::WrittenNotAccessed { page: PageNumber(20), epoch: 2 },
        );
        broken(
            |trace| trace.epochs[2].accessed.as_mut().unwrap()[1].first = PageNumber(6),
            TraceError::WrittenNotAccessed { page: PageNumber(5), epoch: 2 },
        );
        broken(
            |trace| trace.zero[0] = PageRun::new(18, 12),
            TraceError::WrittenZero { page: PageNumber(20), epoch: 2 },
        );
    }
}
