//! The gaps between writes, and nothing else.

use std::num::NonZeroU32;

use super::page_list::PageList;
use super::write_gaps::{LastWrite, WriteGaps};
use super::{Predictor, RankedPage, live_bound, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// Ranks pages by when they will be written next, from the gap between their last two writes and what pages with such a
/// gap did; see the module `write_gaps` for how. A full list drops the page written least recently.
///
/// Heat is in writes per epoch, those to come discounted by the half-life.
#[derive(Debug, Clone)]
pub struct GapPredictor {
    capacity: usize,
    gaps: WriteGaps,
    pages: PageList<LastWrite>,
}

impl GapPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(capacity: usize, half_life_epochs: NonZeroU32) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        Self { capacity, gaps: WriteGaps::new(half_life_epochs), pages: PageList::new() }
    }
}

impl Predictor for GapPredictor {
    fn name(&self) -> &'static str {
        "gap"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            if let Some(last) = self.pages.touch(page) {
                self.gaps.write(last);
                continue;
            }
            if self.pages.len() == self.capacity
                && let Some((_, dropped)) = self.pages.pop_bottom()
            {
                self.gaps.forget(dropped);
            }
            let mut last = LastWrite::default();
            self.gaps.write(&mut last);
            self.pages.push(page, last);
        }
    }

    fn end_epoch(&mut self) {
        let by = self.gaps.end_epoch();
        if by > 0 {
            self.pages.values_mut().for_each(|last| last.rebase(by));
        }
    }

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, |&last| self.gaps.heat(last))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.unordered().for_each(|(page, &last)| each(ranked(page, self.gaps.heat(last))));
    }

    fn memory_bytes(&self) -> usize {
        // What the gaps count is in the predictor too.
        size_of::<Self>() - size_of::<WriteGaps>() + self.gaps.memory_bytes() + self.pages.memory_bytes()
    }

    fn least_stop_pages(&self, pages_per_epoch: f64) -> Option<u64> {
        Some(live_bound(self.gaps.age_groups(), pages_per_epoch) as u64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_consistent, trace};
    use super::super::{LruPredictor, WorkingSetConfig};
    use super::*;

    proptest! {
        /// Knows the pages that LRU knows, and bounds what is left as it does.
        #[test]
        fn forgets_as_lru_does(trace in trace(60), capacity in 1..50_usize) {
            let mut predictor = GapPredictor::new(capacity, WorkingSetConfig::HALF_LIFE_EPOCHS);
            let mut lru = LruPredictor::new(capacity);
            for written in trace.iter() {
                Trace::feed(&mut predictor, written);
                Trace::feed(&mut lru, written);
                let (pages, expected) = (assert_consistent(&predictor), assert_consistent(&lru));
                prop_assert!(pages.keys().eq(expected.keys()));
                prop_assert!(pages.values().all(|&heat| heat <= 1.0 + 1e-6), "{pages:?}");
                prop_assert_eq!(predictor.least_stop_pages(3.0), lru.least_stop_pages(3.0));
            }
        }
    }

    /// A loop over 120 pages, six in an epoch, beside a page that is always written: LRU has the loop the wrong way round.
    #[test]
    fn knows_where_a_loop_goes_next() {
        let mut predictor = GapPredictor::new(1000, WorkingSetConfig::HALF_LIFE_EPOCHS);
        let mut lru = LruPredictor::new(1000);
        for epoch in 0..100_u64 {
            for predictor in [&mut predictor as &mut dyn Predictor, &mut lru] {
                predictor
                    .observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(epoch % 20 * 6, 6), PageRun::new(500, 1)]);
                predictor.end_epoch();
            }
        }
        let top = |predictor: &dyn Predictor| {
            let mut ranking = Vec::new();
            predictor.rank(7, &mut ranking);
            ranking.iter().map(|ranked| ranked.page.0).collect::<Vec<_>>()
        };
        assert_eq!(top(&predictor), [500, 0, 1, 2, 3, 4, 5]);
        assert_eq!(top(&lru), [114, 115, 116, 117, 118, 119, 500]);
        assert!(predictor.heat(PageNumber(119)) < predictor.heat(PageNumber(0)) / 8.0);
    }
}
