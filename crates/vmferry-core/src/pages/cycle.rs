//! Which pages a scan may leave alone: those that the guest writes all the time anyway.
//!
//! Each page that is armed and then written costs the guest one fault. A page that was written in two epochs in a row
//! will most likely be written in the next ones too, so for the rest of a cycle it is neither armed nor looked at, and
//! simply reported as written, which the contract allows. The second epoch does not arm it again. So the guest pays for
//! such a page once a cycle instead of in every epoch.
//!
//! ```text
//!   epoch of the cycle   0 full   1 full                     2 … 7 the others only
//!   hot page             armed    looked at, and not armed   neither, reported each time
//! ```
//!
//! A cycle that finds nearly all of them hot again is twice as long as the shortest.
//!
//! Pure bookkeeping; the scans are the tracker's.

use super::{PageRun, PageSet};

/// Epochs of a cycle. Longer saves the guest more faults and notices later that a page has cooled.
const CYCLE_EPOCHS: u32 = 8;
/// Epochs of a cycle whose hot pages are those of the cycle before.
const STEADY_CYCLE_EPOCHS: u32 = 16;
/// One in so many of its pages may have cooled for that.
const COOLED_SHARE: u64 = 8;
/// The most runs that are left out: each splits a scan in two, which costs a call.
const MAX_SKIPPED_RUNS: usize = 4096;

/// Where the cycle of scans is, and what it has learnt.
#[derive(Debug)]
pub struct ScanCycle {
    epoch: u32,
    /// How many epochs this cycle has.
    epochs: u32,
    /// What the first epoch of the cycle found.
    previous: PageSet,
    /// Pages that are not armed and count as written, from the third epoch of the cycle on; before, those of the last
    /// cycle.
    hot: PageSet,
}

impl ScanCycle {
    /// The beginning of a cycle, for page numbers below `capacity`.
    pub fn new(capacity: u64) -> Self {
        Self { epoch: 0, epochs: CYCLE_EPOCHS, previous: PageSet::empty(capacity), hot: PageSet::empty(capacity) }
    }

    /// The runs to leave out of the next scan; `None` where it must be a full one.
    pub fn skipped(&self) -> Option<Vec<PageRun>> {
        (self.epoch >= 2).then(|| self.hot.runs().collect())
    }

    /// The runs that the next scan, a full one, need not arm where it finds them written: they are left out from then on.
    pub fn not_armed(&self) -> Vec<PageRun> {
        let runs = self.previous.runs().take(MAX_SKIPPED_RUNS);
        if self.epoch == 1 { runs.collect() } else { Vec::new() }
    }

    /// A full scan of an epoch found these pages; `skippable` says which runs may be left out later.
    pub fn learn(&mut self, found: &[PageRun], skippable: impl Fn(PageRun) -> bool) {
        if self.epoch == 0 {
            self.previous.clear();
            for &run in found {
                self.previous.insert_run(run);
            }
        } else {
            let again = found.iter().flat_map(|run| run.pages()).filter(|&page| self.previous.contains(page));
            let mut hot = PageSet::empty(self.hot.capacity());
            again.for_each(|page| {
                hot.insert(page);
            });
            let steady = !self.hot.is_empty() && self.hot.len_without(&hot) * COOLED_SHARE <= self.hot.len();
            self.epochs = if steady { STEADY_CYCLE_EPOCHS } else { CYCLE_EPOCHS };
            self.hot.clear();
            for run in hot.runs().filter(|&run| skippable(run)).take(MAX_SKIPPED_RUNS) {
                self.hot.insert_run(run);
            }
        }
        self.next_epoch();
    }

    /// An epoch has ended.
    pub fn next_epoch(&mut self) {
        self.epoch = (self.epoch + 1) % self.epochs;
    }

    /// These pages were looked at and armed outside the cycle: they are as any other page now.
    pub fn armed(&mut self, run: PageRun) {
        while let Some(page) = self.hot.next(run.first).filter(|page| page.0 < run.end()) {
            self.hot.remove(page);
        }
    }

    /// Everything was looked at and armed.
    pub fn reset(&mut self) {
        self.epoch = 0;
        self.epochs = CYCLE_EPOCHS;
        self.hot.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::PageNumber;
    use super::*;

    #[test]
    fn only_what_was_written_twice_in_a_row_is_left_out_and_only_for_a_cycle() {
        let mut cycle = ScanCycle::new(100);
        assert_eq!(cycle.skipped(), None);
        cycle.learn(&[PageRun::new(10, 10)], |_| true);
        assert_eq!(cycle.skipped(), None);
        cycle.learn(&[PageRun::new(15, 10), PageRun::new(50, 1)], |_| true);
        for _ in 2..CYCLE_EPOCHS {
            assert_eq!(cycle.skipped(), Some(vec![PageRun::new(15, 5)]));
            cycle.next_epoch();
        }
        assert_eq!(cycle.skipped(), None);
        cycle.learn(&[], |_| true);
        cycle.learn(&[PageRun::new(15, 5)], |_| true);
        assert_eq!(cycle.skipped(), Some(vec![]), "it has cooled");
    }

    #[test]
    fn a_steady_cycle_is_longer() {
        let mut cycle = ScanCycle::new(100);
        let mut epochs_of_a_cycle = |hot: PageRun| {
            cycle.learn(&[hot], |_| true);
            cycle.learn(&[hot], |_| true);
            let left_out = std::iter::from_fn(|| cycle.skipped().map(|_| cycle.next_epoch())).count();
            2 + left_out as u32
        };
        assert_eq!(epochs_of_a_cycle(PageRun::new(10, 16)), CYCLE_EPOCHS);
        assert_eq!(epochs_of_a_cycle(PageRun::new(10, 14)), STEADY_CYCLE_EPOCHS);
        assert_eq!(epochs_of_a_cycle(PageRun::new(10, 12)), CYCLE_EPOCHS, "two of fourteen have cooled");
        assert_eq!(epochs_of_a_cycle(PageRun::new(5, 40)), STEADY_CYCLE_EPOCHS);
    }

    #[test]
    fn what_was_found_first_is_not_armed_a_second_time() {
        let mut cycle = ScanCycle::new(100);
        assert_eq!(cycle.not_armed(), []);
        cycle.learn(&[PageRun::new(10, 10)], |_| true);
        assert_eq!(cycle.not_armed(), [PageRun::new(10, 10)]);
        cycle.learn(&[PageRun::new(15, 10)], |_| true);
        for _ in 2..=CYCLE_EPOCHS {
            assert_eq!(cycle.not_armed(), []);
            cycle.next_epoch();
        }
    }

    #[test]
    fn a_page_armed_in_between_is_looked_at_again() {
        let mut cycle = ScanCycle::new(100);
        cycle.learn(&[PageRun::new(10, 10)], |_| true);
        cycle.learn(&[PageRun::new(10, 10)], |_| true);
        cycle.armed(PageRun::new(5, 7));
        cycle.armed(PageRun::new(15, 1));
        assert_eq!(cycle.skipped(), Some(vec![PageRun::new(12, 3), PageRun::new(16, 4)]));
        cycle.reset();
        assert_eq!(cycle.skipped(), None);
        assert!(!cycle.hot.contains(PageNumber(12)));
    }

    #[test]
    fn what_must_not_be_left_out_is_not() {
        let mut cycle = ScanCycle::new(100);
        cycle.learn(&[PageRun::new(10, 10)], |_| true);
        cycle.learn(&[PageRun::new(10, 10)], |run| run.first.0 > 50);
        assert_eq!(cycle.skipped(), Some(vec![]));
    }
}
