//! The pages written most often are the hottest.

use std::collections::BTreeSet;

use super::page_map::PageMap;
use super::{FIRST_EPOCH, Predictor, RankedPage, btree_bytes, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    count: u32,
    last: u32,
}

/// Least frequently used: writes are counted and never age. A full table drops the page with the fewest writes, of those
/// the one written least recently, of those the one with the lowest number.
///
/// Heat is the writes per epoch since the predictor began.
#[derive(Debug, Clone)]
pub struct LfuPredictor {
    capacity: usize,
    now: u32,
    pages: PageMap<Uses>,
    /// Count, last epoch, page: the first is the next to be dropped.
    order: BTreeSet<(u32, u32, u32)>,
}

impl LfuPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        Self { capacity, now: FIRST_EPOCH, pages: PageMap::new(), order: BTreeSet::new() }
    }

    fn heat_of(&self, uses: Uses) -> f64 {
        f64::from(uses.count) / f64::from((self.now - FIRST_EPOCH).max(1))
    }
}

impl Predictor for LfuPredictor {
    fn name(&self) -> &'static str {
        "lfu"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            let count = match self.pages.get(page) {
                Some(Uses { count, last }) => {
                    self.order.remove(&(count, last, page));
                    count.saturating_add(1)
                }
                None => {
                    if self.pages.len() == self.capacity
                        && let Some((_, _, dropped)) = self.order.pop_first()
                    {
                        self.pages.remove(dropped);
                    }
                    1
                }
            };
            self.pages.insert(page, Uses { count, last: self.now });
            self.order.insert((count, self.now, page));
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
    }

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, |uses| self.heat_of(uses))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.iter().for_each(|(page, uses)| each(ranked(page, self.heat_of(uses))));
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
        fn drops_the_page_with_the_fewest_writes(trace in trace(60), capacity in 1..50_usize) {
            let mut predictor = LfuPredictor::new(capacity);
            // Count, last epoch, page.
            let mut model: Vec<(u32, usize, u64)> = Vec::new();
            for (epoch, written) in trace.iter().enumerate() {
                for page in Trace::feed(&mut predictor, written) {
                    match model.iter_mut().find(|entry| entry.2 == page) {
                        Some(entry) => *entry = (entry.0 + 1, epoch, page),
                        None => {
                            model.sort_unstable();
                            if model.len() == capacity {
                                model.remove(0);
                            }
                            model.push((1, epoch, page));
                        }
                    }
                }
                let epochs = epoch as f64 + 1.0;
                assert_same(&predictor, model.iter().map(|&(count, _, page)| (page, f64::from(count) / epochs)));
            }
        }
    }
}
