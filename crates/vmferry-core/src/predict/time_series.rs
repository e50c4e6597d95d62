//! Written in at least K of the last N epochs.

use super::page_list::PageList;
use super::{FIRST_EPOCH, Predictor, RankedPage, age_epochs, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

#[derive(Debug, Clone, Copy)]
struct History {
    /// Bit `i` is set if the page was written `i` epochs before `last`.
    bits: u64,
    last: u32,
}

/// Time series: a page that was written in at least K of the last N epochs is taken to be written in the next, every other
/// page is not. A page that was not written in any of the N is forgotten; a full table drops the page written least
/// recently.
///
/// Heat is the share of the last N epochs in which the page was written, if they are K or more; otherwise 0.
///
/// Source: B. Hu, Z. Lei, Y. Lei, D. Xu and J. Li, "A time-series based precopy approach for live migration of virtual
/// machines", ICPADS 2011; with epochs in place of the rounds of pre-copy.
#[derive(Debug, Clone)]
pub struct TimeSeriesPredictor {
    capacity: usize,
    k: u32,
    n: u32,
    now: u32,
    pages: PageList<History>,
}

impl TimeSeriesPredictor {
    /// The greatest N.
    pub const MAX_N: u32 = u64::BITS;

    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0, or not `1 ≤ k ≤ n ≤` [`Self::MAX_N`].
    pub fn new(capacity: usize, k: u32, n: u32) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        assert!((1..=n).contains(&k) && n <= Self::MAX_N, "K = {k} of N = {n} epochs, N being at most {}", Self::MAX_N);
        Self { capacity, k, n, now: FIRST_EPOCH, pages: PageList::new() }
    }

    fn heat_of(&self, history: &History) -> f64 {
        // The latest epoch of the N is the one before `now`, or `now` itself once the page is written in it.
        let idle = age_epochs(self.now, history.last) - 1;
        let window = history.bits.checked_shl(idle).unwrap_or(0) & (u64::MAX >> (Self::MAX_N - self.n));
        let written = window.count_ones();
        if written >= self.k { f64::from(written) / f64::from(self.n) } else { 0.0 }
    }
}

impl Predictor for TimeSeriesPredictor {
    fn name(&self) -> &'static str {
        "time-series"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            if let Some(history) = self.pages.touch(page) {
                let bits = history.bits.checked_shl(self.now - history.last).unwrap_or(0);
                *history = History { bits: bits | 1, last: self.now };
                continue;
            }
            if self.pages.len() == self.capacity {
                self.pages.pop_bottom();
            }
            self.pages.push(page, History { bits: 1, last: self.now });
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
        while self.pages.bottom().is_some_and(|(_, history)| self.now - history.last > self.n) {
            self.pages.pop_bottom();
        }
    }

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, |history| self.heat_of(history))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.unordered().for_each(|(page, history)| each(ranked(page, self.heat_of(history))));
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.pages.memory_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_same, trace};
    use super::*;

    proptest! {
        #[test]
        fn counts_epochs_in_a_window(
            trace in trace(60),
            capacity in 1..50_usize,
            (k, n) in prop_oneof![1..8_u32, Just(64_u32)].prop_flat_map(|n| (1..=n.min(5), Just(n))),
        ) {
            let mut predictor = TimeSeriesPredictor::new(capacity, k, n);
            // Each page's writes, in the order of the last ones.
            let mut model: Vec<(u64, Vec<usize>)> = Vec::new();
            for (epoch, written) in trace.iter().enumerate() {
                for page in Trace::feed(&mut predictor, written) {
                    let known = model.iter().position(|entry| entry.0 == page).map(|at| model.remove(at));
                    let mut writes = known.map_or(Vec::new(), |(_, writes)| writes);
                    writes.retain(|&other| other != epoch);
                    writes.push(epoch);
                    model.push((page, writes));
                    model.drain(..model.len().saturating_sub(capacity));
                }
                let is_recent = |written: &&usize| (epoch + 1 - **written) as u32 <= n;
                model.retain(|(_, writes)| writes.last().iter().any(is_recent));
                assert_same(&predictor, model.iter().map(|(page, writes)| {
                    let recent = writes.iter().filter(is_recent).count() as u32;
                    (*page, if recent >= k { f64::from(recent) / f64::from(n) } else { 0.0 })
                }));
            }
        }
    }
}
