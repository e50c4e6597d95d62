//! What a guest wrote, epoch by epoch.
//!
//! A [`Trace`] is held in memory whole. It comes from a file ([`mod@file`]), from a generator ([`generate`]) or from another
//! tool's record ([`import`]); [`Info`] sums it up. What a trace cannot say: how often a page was written in an epoch,
//! when in it, and in which order. Write tracking shows one bit per page and epoch.

mod check;
pub mod file;
pub mod generate;
pub mod import;
mod info;
mod runs;

use std::ops::Range;
use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PageRun};

use runs::RunMap;

pub use check::{MAX_EPOCH_LENGTH, MAX_EPOCHS, MAX_NAME_BYTES, MIN_EPOCH_LENGTH, RunsOf, TraceError};
pub use info::{DirtyRate, Info, OwnerInfo, WorkingSetSize};
pub use runs::{union, written_runs};

/// Neighbouring pages that one address space wrote in an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenRun {
    /// The pages.
    pub run: PageRun,
    /// Who wrote them; [`AddressSpaceId::WHOLE_GUEST`] where that is not known.
    pub owner: AddressSpaceId,
}

/// One epoch of a trace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TraceEpoch {
    /// The pages written at least once, in ascending order without overlap.
    pub written: Vec<WrittenRun>,
    /// The pages read or written, in ascending order without overlap; `None` where that was not recorded.
    pub accessed: Option<Vec<PageRun>>,
}

impl TraceEpoch {
    /// How many pages were written.
    pub fn written_pages(&self) -> u64 {
        self.runs().map(|run| run.count).sum()
    }

    /// The written runs without their owners, ascending.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> {
        self.written.iter().map(|written| written.run)
    }
}

/// What a guest wrote, epoch by epoch.
///
/// The fields are public and their rules are those of [`Trace::check`]; what this crate makes or reads keeps them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// What it is a trace of, for reports: a workload's name, or how it was generated.
    pub name: String,
    /// The guest's size in pages; every run lies below.
    pub pages: u64,
    /// The length of an epoch.
    pub epoch: Duration,
    /// Pages that were zero when the recording began and were never written since, in ascending order: what a migration
    /// can leave out. Empty where that is not known.
    pub zero: Vec<PageRun>,
    /// The epochs, the first one recorded first.
    pub epochs: Vec<TraceEpoch>,
}

impl Trace {
    /// How long the recording is.
    pub fn duration(&self) -> Duration {
        // Multiplied as a wide integer: `Duration` multiplies by 32-bit numbers only.
        let nanos = self.epoch.as_nanos().saturating_mul(self.epochs.len() as u128);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The pages written, summed over all epochs: a page counts once for each epoch that wrote it.
    pub fn page_writes(&self) -> u64 {
        self.epochs.iter().map(TraceEpoch::written_pages).sum()
    }

    /// How many pages an epoch writes on average; 0 without epochs.
    pub fn mean_pages_per_epoch(&self) -> f64 {
        ratio(self.page_writes() as f64, self.epochs.len() as f64)
    }

    /// The mean dirty rate in pages per second: pages written per epoch over its length; 0 without epochs.
    ///
    /// Longer epochs give a lower rate for the same guest, since a page counts once in each.
    pub fn dirty_pages_per_s(&self) -> f64 {
        ratio(self.page_writes() as f64, self.duration().as_secs_f64())
    }

    /// How many pages were written in any epoch.
    pub fn distinct_pages(&self) -> u64 {
        let mut written = RunMap::default();
        for run in self.epochs.iter().flat_map(TraceEpoch::runs) {
            written.add(run);
        }
        written.pages()
    }

    /// The epoch with this number, where the trace begins again after its end.
    ///
    /// # Panics
    /// If the trace has no epochs.
    pub fn epoch_at(&self, number: u64) -> &TraceEpoch {
        assert!(!self.epochs.is_empty(), "trace `{}` has no epochs", self.name);
        &self.epochs[(number % self.epochs.len() as u64) as usize]
    }

    /// The epochs from number `start` on, again and again without end; none at all if the trace has none.
    pub fn repeated_from(&self, start: u64) -> impl Iterator<Item = &TraceEpoch> {
        let skipped = start % (self.epochs.len() as u64).max(1);
        self.epochs.iter().cycle().skip(skipped as usize)
    }

    /// The same trace begun at epoch `start`, modulo its length: the epochs before it come last.
    #[must_use]
    pub fn rotated(&self, start: u64) -> Self {
        let mut rotated = self.clone();
        let by = start % (self.epochs.len() as u64).max(1);
        rotated.epochs.rotate_left(by as usize);
        rotated
    }

    /// The part of the trace in these epochs; what lies behind the end is left out.
    ///
    /// Zero pages stay what they are: never written in the whole trace.
    #[must_use]
    pub fn slice(&self, epochs: Range<usize>) -> Self {
        let end = epochs.end.min(self.epochs.len());
        let start = epochs.start.min(end);
        Self {
            name: self.name.clone(),
            pages: self.pages,
            epoch: self.epoch,
            zero: self.zero.clone(),
            epochs: self.epochs[start..end].to_vec(),
        }
    }

    /// The trace in figures. See [`Info`] for what it costs.
    pub fn info(&self) -> Info {
        Info::of(self)
    }
}

/// `part / whole`, and 0 of nothing.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(epochs: &[&[(u64, u64)]]) -> Trace {
        let epoch = |runs: &&[(u64, u64)]| TraceEpoch {
            written: runs
                .iter()
                .map(|&(first, count)| WrittenRun {
                    run: PageRun::new(first, count),
                    owner: AddressSpaceId::WHOLE_GUEST,
                })
                .collect(),
            accessed: None,
        };
        Trace {
            name: "test".to_owned(),
            pages: 100,
            epoch: Duration::from_millis(50),
            zero: vec![],
            epochs: epochs.iter().map(epoch).collect(),
        }
    }

    #[test]
    fn rates_and_sizes() {
        let trace = trace(&[&[(0, 10)], &[], &[(5, 10), (20, 1)], &[]]);
        assert_eq!(trace.duration(), Duration::from_millis(200));
        assert_eq!(trace.page_writes(), 21);
        assert_eq!(trace.mean_pages_per_epoch(), 5.25);
        assert_eq!(trace.dirty_pages_per_s(), 105.0);
        assert_eq!(trace.distinct_pages(), 16);
    }

    #[test]
    fn a_trace_without_epochs_has_rate_zero() {
        let empty = trace(&[]);
        assert_eq!(empty.mean_pages_per_epoch(), 0.0);
        assert_eq!(empty.dirty_pages_per_s(), 0.0);
        assert_eq!(empty.repeated_from(3).count(), 0);
        assert_eq!(empty.rotated(3), empty);
    }

    #[test]
    fn it_begins_again_after_its_end() {
        let trace = trace(&[&[(0, 1)], &[(1, 1)], &[(2, 1)]]);
        let first = |epoch: &TraceEpoch| epoch.written[0].run.first.0;
        assert_eq!(trace.repeated_from(4).take(5).map(first).collect::<Vec<_>>(), [1, 2, 0, 1, 2]);
        assert_eq!((0..5).map(|number| first(trace.epoch_at(number))).collect::<Vec<_>>(), [0, 1, 2, 0, 1]);
        assert_eq!(trace.rotated(5).epochs.iter().map(first).collect::<Vec<_>>(), [2, 0, 1]);
        assert_eq!(trace.rotated(2).rotated(1), trace);
        assert_eq!(trace.slice(1..9).epochs.iter().map(first).collect::<Vec<_>>(), [1, 2]);
        assert!(trace.slice(7..9).epochs.is_empty());
    }
}
