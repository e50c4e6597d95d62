//! A trace in figures.

use serde::Serialize;
use vmferry_core::pages::AddressSpaceId;

use super::{RunMap, Trace, ratio};

/// The windows, in epochs, over which the working set is measured.
const WINDOWS: [u64; 4] = [1, 10, 100, 1000];

/// A trace in figures.
///
/// Computing it costs O(n log n) in the number of runs, whatever their lengths, and memory for the distinct runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Info {
    /// The trace's name.
    pub name: String,
    /// The guest's size in pages.
    pub guest_pages: u64,
    /// How many epochs.
    pub epochs: u64,
    /// The length of an epoch in milliseconds.
    pub epoch_ms: f64,
    /// The length of the recording in milliseconds.
    pub duration_ms: f64,
    /// Runs written, over all epochs.
    pub runs: u64,
    /// Pages written, over all epochs: a page counts once for each epoch that wrote it.
    pub page_writes: u64,
    /// Pages written in any epoch.
    pub distinct_pages: u64,
    /// Of those, the pages written in one epoch only.
    pub pages_written_once: u64,
    /// Pages that were zero and stayed so; 0 also where that is not known.
    pub zero_pages: u64,
    /// The mean length of a written run in pages.
    pub pages_per_run: f64,
    /// Pages written per second, over the epochs.
    pub dirty_rate: DirtyRate,
    /// The share of the pages written in an epoch that the next epoch wrote again; 0 for a single epoch.
    pub rewritten_next_share: f64,
    /// The share of the pages written in an epoch that had been written in any epoch before.
    pub rewritten_share: f64,
    /// The working set over windows of 1, 10, 100 and 1000 epochs, as far as the trace is that long.
    pub working_set: Vec<WorkingSetSize>,
    /// Who wrote, the most writes first.
    pub owners: Vec<OwnerInfo>,
    /// The mean number of pages read or written in an epoch, over those epochs for which that was recorded; `None`
    /// where it was not.
    pub accessed_pages_per_epoch: Option<f64>,
}

/// The dirty rates of a trace's epochs, in pages per second. Percentiles are those of the nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DirtyRate {
    /// The mean.
    pub mean_pages_per_s: f64,
    /// The epoch with the fewest pages written.
    pub min_pages_per_s: f64,
    /// The median.
    pub p50_pages_per_s: f64,
    /// The 95th percentile.
    pub p95_pages_per_s: f64,
    /// The 99th percentile.
    pub p99_pages_per_s: f64,
    /// The epoch with the most pages written.
    pub max_pages_per_s: f64,
}

/// How many distinct pages were written within a sliding window: Denning's working set, of writes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct WorkingSetSize {
    /// The window's length in epochs.
    pub window_epochs: u64,
    /// The mean over all whole windows of the trace.
    pub mean_pages: f64,
    /// The largest one.
    pub max_pages: u64,
}

/// What one address space wrote.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct OwnerInfo {
    /// The address space; 0 where it is not known.
    pub owner: u32,
    /// Pages written, over all epochs.
    pub page_writes: u64,
    /// Pages that it wrote in any epoch.
    pub distinct_pages: u64,
    /// In how many epochs it wrote.
    pub epochs: u64,
}

/// What is kept of a page's writes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct History {
    /// The last epoch that wrote it.
    last: u64,
    /// Whether an epoch before that one did, too.
    again: bool,
}

impl Info {
    pub(super) fn of(trace: &Trace) -> Self {
        let epochs = trace.epochs.len() as u64;
        let mut windows: Vec<Window> =
            WINDOWS.iter().filter(|&&length| length <= epochs).map(|&length| Window::new(length, epochs)).collect();
        let mut history = RunMap::default();
        let mut owners = Owners::default();
        let mut per_epoch = Vec::with_capacity(trace.epochs.len());
        let (mut runs, mut rewritten, mut rewritten_next) = (0, 0, 0);
        for (number, epoch) in (0..).zip(&trace.epochs) {
            per_epoch.push(epoch.written_pages());
            runs += epoch.written.len() as u64;
            for written in &epoch.written {
                owners.wrote(number, written);
                history.update(written.run, |piece, old: Option<History>| {
                    if let Some(old) = old {
                        rewritten += piece.count;
                        if old.last + 1 == number {
                            rewritten_next += piece.count;
                        }
                        for window in &mut windows {
                            window.holds(old.last, number, piece.count);
                        }
                    }
                    History { last: number, again: old.is_some() }
                });
            }
        }
        let mut pages_written_once = 0;
        for (run, page) in history.iter() {
            if !page.again {
                pages_written_once += run.count;
            }
            for window in &mut windows {
                window.holds(page.last, epochs, run.count);
            }
        }
        let page_writes = per_epoch.iter().sum();
        let followed = page_writes - per_epoch.last().copied().unwrap_or(0);
        let accessed: Vec<u64> = trace
            .epochs
            .iter()
            .filter_map(|epoch| Some(epoch.accessed.as_ref()?.iter().map(|run| run.count).sum()))
            .collect();
        Self {
            name: trace.name.clone(),
            guest_pages: trace.pages,
            epochs,
            epoch_ms: trace.epoch.as_secs_f64() * 1e3,
            duration_ms: trace.duration().as_secs_f64() * 1e3,
            runs,
            page_writes,
            distinct_pages: history.pages(),
            pages_written_once,
            zero_pages: trace.zero.iter().map(|run| run.count).sum(),
            pages_per_run: ratio(page_writes as f64, runs as f64),
            dirty_rate: DirtyRate::of(per_epoch, trace.epoch.as_secs_f64()),
            rewritten_next_share: ratio(rewritten_next as f64, followed as f64),
            rewritten_share: ratio(rewritten as f64, page_writes as f64),
            working_set: windows.iter().map(Window::size).collect(),
            owners: owners.finish(),
            accessed_pages_per_epoch: (!accessed.is_empty())
                .then(|| accessed.iter().map(|&pages| pages as f64).sum::<f64>() / accessed.len() as f64),
        }
    }
}

impl DirtyRate {
    fn of(mut per_epoch: Vec<u64>, epoch_s: f64) -> Self {
        per_epoch.sort_unstable();
        let rate = |pages: u64| ratio(pages as f64, epoch_s);
        let percentile = |percent: usize| {
            let rank = (per_epoch.len() * percent).div_ceil(100).max(1);
            rate(per_epoch.get(rank - 1).copied().unwrap_or(0))
        };
        let sum: f64 = per_epoch.iter().map(|&pages| pages as f64).sum();
        Self {
            mean_pages_per_s: ratio(sum, per_epoch.len() as f64 * epoch_s),
            min_pages_per_s: percentile(0),
            p50_pages_per_s: percentile(50),
            p95_pages_per_s: percentile(95),
            p99_pages_per_s: percentile(99),
            max_pages_per_s: percentile(100),
        }
    }
}

/// A working set over a sliding window, by what enters and leaves it at each epoch.
#[derive(Debug)]
struct Window {
    length: u64,
    /// At each window's last epoch: pages that enter it, less those that leave it.
    changes: Vec<i64>,
}

impl Window {
    fn new(length: u64, epochs: u64) -> Self {
        Self { length, changes: vec![0; epochs as usize + 1] }
    }

    /// Pages written in epoch `last` and not again before epoch `next`: the windows that end in between hold them by
    /// that write, as long as they reach back to it.
    fn holds(&mut self, last: u64, next: u64, pages: u64) {
        // The sum of the guest's pages is below 2^34.
        let pages = pages as i64;
        self.changes[last as usize] += pages;
        self.changes[next.min(last + self.length) as usize] -= pages;
    }

    fn size(&self) -> WorkingSetSize {
        let (mut pages, mut sum, mut max_pages, mut count) = (0_i64, 0.0, 0, 0_u64);
        let epochs = self.changes.len() - 1;
        for (last, change) in (1..).zip(&self.changes[..epochs]) {
            pages += change;
            if last >= self.length {
                sum += pages as f64;
                max_pages = max_pages.max(pages as u64);
                count += 1;
            }
        }
        WorkingSetSize { window_epochs: self.length, mean_pages: ratio(sum, count as f64), max_pages }
    }
}

/// Sums over address spaces.
#[derive(Debug, Default)]
struct Owners {
    by_id: std::collections::BTreeMap<AddressSpaceId, Owner>,
}

#[derive(Debug, Default)]
struct Owner {
    page_writes: u64,
    epochs: u64,
    last_epoch: Option<u64>,
    distinct: RunMap<()>,
}

impl Owners {
    fn wrote(&mut self, epoch: u64, written: &super::WrittenRun) {
        let owner = self.by_id.entry(written.owner).or_default();
        owner.page_writes += written.run.count;
        if owner.last_epoch.replace(epoch) != Some(epoch) {
            owner.epochs += 1;
        }
        owner.distinct.add(written.run);
    }

    fn finish(self) -> Vec<OwnerInfo> {
        let mut owners: Vec<OwnerInfo> = self
            .by_id
            .into_iter()
            .map(|(id, owner)| OwnerInfo {
                owner: id.0,
                page_writes: owner.page_writes,
                distinct_pages: owner.distinct.pages(),
                epochs: owner.epochs,
            })
            .collect();
        owners.sort_by_key(|owner| (std::cmp::Reverse(owner.page_writes), owner.owner));
        owners
    }
}
