//! Which pages a scan may leave alone: those that the guest writes all the time anyway.
//!
//! Each page that is armed and then written costs the guest one fault. A page that was written in two epochs in a row
//! will most likely be written in the next ones too, so for the rest of a cycle it is neither armed nor looked at, and
//! simply reported as written, which the contract allows. The guest pays for such a page twice a cycle instead of in
//! every epoch.
//!
//! ```text
//!   epoch of the cycle   0 full   1 full   2 … 7 the others only
//!   hot page             armed    armed    not armed, reported each time
//! ```
//!
//! Pure bookkeeping; the scans are the tracker's.

use vmferry_core::pages::{PageRun, PageSet};

/// Epochs of a cycle. Longer saves the guest more faults and notices later that a page has cooled.
const CYCLE_EPOCHS: u32 = 8;
/// The most runs that are left out: each splits a scan in two, which costs a call.
const MAX_SKIPPED_RUNS: usize = 4096;

/// Where the cycle is, and what it has learnt.
#[derive(Debug)]
pub(super) struct Cycle {
    epoch: u32,
    /// What the first epoch of the cycle found.
    previous: PageSet,
    /// Pages that are not armed and count as written.
    hot: PageSet,
}

impl Cycle {
    /// The beginning of a cycle, for page numbers below `capacity`.
    pub(super) fn new(capacity: u64) -> Self {
        Self { epoch: 0, previous: PageSet::empty(capacity), hot: PageSet::empty(capacity) }
    }

    /// The runs to leave out of the next scan; `None` where it must be a full one.
    pub(super) fn skipped(&self) -> Option<Vec<PageRun>> {
        (self.epoch >= 2).then(|| self.hot.runs().collect())
    }

    /// A full scan of an epoch found these pages; `skippable` says which runs may be left out later.
    pub(super) fn learn(&mut self, found: &[PageRun], skippable: impl Fn(PageRun) -> bool) {
        if self.epoch == 0 {
            self.hot.clear();
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
            for run in hot.runs().filter(|&run| skippable(run)).take(MAX_SKIPPED_RUNS) {
                self.hot.insert_run(run);
            }
        }
        self.next_epoch();
    }

    /// An epoch has ended.
    pub(super) fn next_epoch(&mut self) {
        self.epoch = (self.epoch + 1) % CYCLE_EPOCHS;
    }

    /// These pages were looked at and armed outside the cycle: they are as any other page now.
    pub(super) fn armed(&mut self, run: PageRun) {
        while let Some(page) = self.hot.next(run.first).filter(|page| page.0 < run.end()) {
            self.hot.remove(page);
        }
    }

    /// Everything was looked at and armed.
    pub(super) fn reset(&mut self) {
        self.epoch = 0;
        self.hot.clear();
    }
}

/// What is left of `run` without `skipped`, which is ascending.
pub(super) fn without(run: PageRun, skipped: &[PageRun]) -> Vec<PageRun> {
    let mut left = Vec::new();
    let mut first = run.first.0;
    let from = skipped.partition_point(|skip| skip.end() <= run.first.0);
    for skip in skipped[from..].iter().take_while(|skip| skip.first.0 < run.end()) {
        if first < skip.first.0 {
            left.push(PageRun::new(first, skip.first.0 - first));
        }
        first = skip.end();
    }
    if first < run.end() {
        left.push(PageRun::new(first, run.end() - first));
    }
    left
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::PageNumber;

    use super::*;

    #[test]
    fn only_what_was_written_twice_in_a_row_is_left_out_and_only_for_a_cycle() {
        let mut cycle = Cycle::new(100);
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
    fn a_page_armed_in_between_is_looked_at_again() {
        let mut cycle = Cycle::new(100);
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
        let mut cycle = Cycle::new(100);
        cycle.learn(&[PageRun::new(10, 10)], |_| true);
        cycle.learn(&[PageRun::new(10, 10)], |run| run.first.0 > 50);
        assert_eq!(cycle.skipped(), Some(vec![]));
    }

    #[test]
    fn gaps() {
        let skipped = [PageRun::new(0, 2), PageRun::new(5, 5), PageRun::new(20, 1)];
        assert_eq!(
            without(PageRun::new(0, 30), &skipped),
            [PageRun::new(2, 3), PageRun::new(10, 10), PageRun::new(21, 9)]
        );
        assert_eq!(without(PageRun::new(6, 3), &skipped), []);
        assert_eq!(without(PageRun::new(8, 4), &skipped), [PageRun::new(10, 2)]);
        assert_eq!(without(PageRun::new(30, 4), &skipped), [PageRun::new(30, 4)]);
        assert_eq!(without(PageRun::new(3, 1), &[]), [PageRun::new(3, 1)]);
    }
}
