//! The pages written last are the hottest.

use super::page_list::PageList;
use super::{AgeGroup, FIRST_EPOCH, Predictor, RankedPage, age_epochs, live_bound, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// Least recently used: a page is as hot as its last write is near, and a full list drops the page at its end.
///
/// Heat is 1/age, the age in epochs: a page of age 3 was not written for two epochs.
///
/// Source: the LRU stack of R. L. Mattson, J. Gecsei, D. R. Slutz and I. L. Traiger, "Evaluation techniques for storage
/// hierarchies", IBM Systems Journal 9(2), 1970.
#[derive(Debug, Clone)]
pub struct LruPredictor {
    capacity: usize,
    now: u32,
    /// The epoch of each page's last write.
    pages: PageList<u32>,
}

impl LruPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        Self { capacity, now: FIRST_EPOCH, pages: PageList::new() }
    }

    fn heat_of(&self, last: u32) -> f64 {
        1.0 / f64::from(age_epochs(self.now, last))
    }
}

impl Predictor for LruPredictor {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            if let Some(last) = self.pages.touch(page) {
                *last = self.now;
                continue;
            }
            if self.pages.len() == self.capacity {
                self.pages.pop_bottom();
            }
            self.pages.push(page, self.now);
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
    }

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, |&last| self.heat_of(last))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.unordered().for_each(|(page, &last)| each(ranked(page, self.heat_of(last))));
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.pages.memory_bytes()
    }

    /// Visits all pages.
    fn least_stop_pages(&self, pages_per_epoch: f64) -> Option<u64> {
        let written_now = self.pages.iter().next().is_some_and(|(_, &last)| last == self.now);
        let end = self.now + u32::from(written_now);
        let groups = self.pages.iter().map(|(_, &last)| AgeGroup { pages: 1, oldest_epochs: u64::from(end - last) });
        Some(live_bound(groups, pages_per_epoch) as u64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_same, trace};
    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_list(trace in trace(60), capacity in 1..50_usize) {
            let mut predictor = LruPredictor::new(capacity);
            // The newest last.
            let mut model: Vec<(u64, usize)> = Vec::new();
            for (epoch, written) in trace.iter().enumerate() {
                for page in Trace::feed(&mut predictor, written) {
                    model.retain(|&(other, _)| other != page);
                    model.push((page, epoch));
                    model.drain(..model.len().saturating_sub(capacity));
                }
                let expected = model.iter().map(|&(page, last)| (page, 1.0 / (epoch + 1 - last) as f64));
                assert_same(&predictor, expected);
                for rate in [0.0, 0.5, 3.0, 100.0] {
                    let terms = model.iter().rev().enumerate();
                    let terms = terms.map(|(newer, &(_, last))| newer as f64 + 1.0 - rate * (epoch + 1 - last) as f64);
                    prop_assert_eq!(predictor.least_stop_pages(rate), Some(terms.fold(0.0, f64::max) as u64));
                }
            }
        }
    }
}
