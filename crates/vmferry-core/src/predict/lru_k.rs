//! The K-th last write instead of the last one.

use std::collections::BTreeSet;

use super::page_map::PageMap;
use super::{FIRST_EPOCH, Predictor, RankedPage, age_epochs, btree_bytes, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// The epochs of the latest writes, the last one first; 0 where there were fewer.
type History = [u32; LruKPredictor::MAX_K];

/// Below the heat of any page with K writes within a million epochs.
const HEAT_WITHOUT_K_WRITES: f64 = 1.0 / (1 << 20) as f64;

/// LRU-K: a page is as hot as its K-th last write is near. Pages with fewer writes than K come last, among themselves by
/// their last write. A full table drops the coldest page, of equal ones the one with the lowest number.
///
/// Two writes in one epoch are one ("correlated references" of the source). A page that was dropped starts anew: no
/// history is kept of pages that are not in the table.
///
/// Heat is K over the epochs since the K-th last write, that is the writes per epoch since then; 2^-20 over the age of
/// the last write for pages with fewer writes.
///
/// Source: E. J. O'Neil, P. E. O'Neil and G. Weikum, "The LRU-K page replacement algorithm for database disk buffering",
/// SIGMOD 1993.
#[derive(Debug, Clone)]
pub struct LruKPredictor {
    capacity: usize,
    k: usize,
    now: u32,
    pages: PageMap<History>,
    /// K-th last epoch, last epoch, page: the first is the next to be dropped.
    order: BTreeSet<(u32, u32, u32)>,
}

impl LruKPredictor {
    /// The greatest K.
    pub const MAX_K: usize = 8;

    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0, or `k` is not within 1 to [`Self::MAX_K`].
    pub fn new(capacity: usize, k: usize) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        assert!((1..=Self::MAX_K).contains(&k), "LRU-{k} is not between LRU-1 and LRU-{}", Self::MAX_K);
        Self { capacity, k, now: FIRST_EPOCH, pages: PageMap::new(), order: BTreeSet::new() }
    }

    fn place(&self, page: u32, history: &History) -> (u32, u32, u32) {
        (history[self.k - 1], history[0], page)
    }

    fn heat_of(&self, history: &History) -> f64 {
        match history[self.k - 1] {
            0 => HEAT_WITHOUT_K_WRITES / f64::from(age_epochs(self.now, history[0])),
            // In the middle of an epoch K writes can lie within K − 1 epochs.
            kth => self.k as f64 / f64::from((self.now - kth).max(self.k as u32)),
        }
    }
}

impl Predictor for LruKPredictor {
    fn name(&self) -> &'static str {
        "lru-k"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            let mut history = self.pages.get(page).unwrap_or_default();
            if history[0] == self.now {
                continue;
            }
            if history[0] != 0 {
                self.order.remove(&self.place(page, &history));
            } else if self.pages.len() == self.capacity
                && let Some((_, _, dropped)) = self.order.pop_first()
            {
                self.pages.remove(dropped);
            }
            history.rotate_right(1);
            history[0] = self.now;
            self.order.insert(self.place(page, &history));
            self.pages.insert(page, history);
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
    }

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, |history| self.heat_of(&history))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.iter().for_each(|(page, history)| each(ranked(page, self.heat_of(&history))));
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.pages.memory_bytes() + btree_bytes::<(u32, u32, u32)>(self.order.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_same, trace};
    use super::*;

    proptest! {
        #[test]
        fn drops_the_page_whose_kth_last_write_is_oldest(
            trace in trace(60),
            capacity in 1..50_usize,
            k in 1..=LruKPredictor::MAX_K,
        ) {
            let mut predictor = LruKPredictor::new(capacity, k);
            // All epochs of each page's writes.
            let mut model: Vec<(u64, Vec<usize>)> = Vec::new();
            let kth = |writes: &[usize]| writes.len().checked_sub(k).map(|at| writes[at]);
            for (epoch, written) in trace.iter().enumerate() {
                for page in Trace::feed(&mut predictor, written) {
                    if let Some((_, writes)) = model.iter_mut().find(|entry| entry.0 == page) {
                        if writes.last() != Some(&epoch) {
                            writes.push(epoch);
                        }
                        continue;
                    }
                    if model.len() == capacity {
                        model.sort_by_key(|(page, writes)| (kth(writes), writes.last().copied(), *page));
                        model.remove(0);
                    }
                    model.push((page, vec![epoch]));
                }
                assert_same(&predictor, model.iter().map(|(page, writes)| {
                    let last = writes.last().expect("no page without a write");
                    let heat = match kth(writes) {
                        Some(kth) => k as f64 / (epoch + 1 - kth) as f64,
                        None => HEAT_WITHOUT_K_WRITES / (epoch + 1 - last) as f64,
                    };
                    (*page, heat)
                }));
            }
        }
    }

    #[test]
    fn a_single_write_does_not_outweigh_a_steady_page() {
        let mut predictor = LruKPredictor::new(10, 2);
        for epoch in 0..6 {
            if epoch % 2 == 0 {
                predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(1, 1)]);
            }
            predictor.end_epoch();
        }
        predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(2, 1)]);
        predictor.end_epoch();
        assert!(predictor.heat(PageNumber(1)) > 100.0 * predictor.heat(PageNumber(2)));
    }
}
