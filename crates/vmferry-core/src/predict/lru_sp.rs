//! Counts over age.

use super::page_list::PageList;
use super::page_map::PageMap;
use super::{FIRST_EPOCH, Predictor, RankedPage, age_epochs, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    count: u32,
    last: u32,
}

/// One list for each power of two of counts.
const LISTS: usize = u32::BITS as usize;

/// LRU-SP, size-adjusted and popularity-aware LRU: the page with the least `count / (size · age)` is to go first. All pages
/// have one size here, so it is popularity alone that LRU is made aware of.
///
/// As in the source, pages are on LRU lists by the power of two of their count, and only the ends of the lists are
/// compared when one must be dropped; of equal ones that with fewer writes goes. Ages are in epochs.
///
/// Heat is x / (1 + x) for x = count / age: an order and no rate.
///
/// Source: K. Cheng and Y. Kambayashi, "LRU-SP: a size-adjusted and popularity-aware LRU replacement algorithm for web
/// caching", COMPSAC 2000.
#[derive(Debug, Clone)]
pub struct LruSpPredictor {
    capacity: usize,
    now: u32,
    lists: Vec<PageList<Uses>>,
    /// Which list a page is on.
    list_of: PageMap<u8>,
}

impl LruSpPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        let lists = (0..LISTS).map(|_| PageList::new()).collect();
        Self { capacity, now: FIRST_EPOCH, lists, list_of: PageMap::new() }
    }

    fn drop_one(&mut self) {
        let ends = self.lists.iter().enumerate().filter_map(|(list, pages)| {
            let (page, uses) = pages.bottom()?;
            Some((uses, list, page))
        });
        // A fraction is less if its numerator times the other denominator is.
        let worst = ends.min_by(|(a, ..), (b, ..)| {
            let value = |x: &Uses, y: &Uses| u64::from(x.count) * u64::from(age_epochs(self.now, y.last));
            value(a, b).cmp(&value(b, a)).then(a.count.cmp(&b.count))
        });
        if let Some((_, list, page)) = worst {
            self.lists[list].pop_bottom();
            self.list_of.remove(page);
        }
    }

    fn uses(&self, page: u32) -> Option<&Uses> {
        self.list_of.get(page).and_then(|list| self.lists[usize::from(list)].get(page))
    }

    fn heat_of(&self, uses: &Uses) -> f64 {
        let value = f64::from(uses.count) / f64::from(age_epochs(self.now, uses.last));
        value / (1.0 + value)
    }
}

impl Predictor for LruSpPredictor {
    fn name(&self) -> &'static str {
        "lru-sp"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            let known = self.list_of.get(page).and_then(|list| self.lists[usize::from(list)].remove(page));
            if known.is_none() && self.list_of.len() == self.capacity {
                self.drop_one();
            }
            let count = known.map_or(1, |uses| uses.count.saturating_add(1));
            let list = count.ilog2() as u8;
            self.lists[usize::from(list)].push(page, Uses { count, last: self.now });
            self.list_of.insert(page, list);
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
    }

    fn tracked_pages(&self) -> u64 {
        self.list_of.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.uses(page)).map_or(0.0, |uses| self.heat_of(uses))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        for (page, uses) in self.lists.iter().flat_map(PageList::unordered) {
            each(ranked(page, self.heat_of(uses)));
        }
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.lists.iter().map(|list| size_of_val(list) + list.memory_bytes()).sum::<usize>()
            + self.list_of.memory_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_same, trace};
    use super::*;

    proptest! {
        /// Against one list in order of writes, the newest last.
        #[test]
        fn drops_the_worst_of_the_oldest_of_each_power_of_two(trace in trace(60), capacity in 1..50_usize) {
            let mut predictor = LruSpPredictor::new(capacity);
            let mut model: Vec<(u64, u32, usize)> = Vec::new();
            for (epoch, written) in trace.iter().enumerate() {
                for page in Trace::feed(&mut predictor, written) {
                    let known = model.iter().position(|entry| entry.0 == page).map(|at| model.remove(at));
                    if known.is_none() && model.len() == capacity {
                        let is_first_of_power = |at: usize| {
                            model[..at].iter().all(|&(_, count, _)| count.ilog2() != model[at].1.ilog2())
                        };
                        let value = |at: usize| f64::from(model[at].1) / (epoch - model[at].2).max(1) as f64;
                        let worst = (0..capacity).filter(|&at| is_first_of_power(at)).min_by(|&a, &b| {
                            value(a).total_cmp(&value(b)).then(model[a].1.cmp(&model[b].1))
                        });
                        model.remove(worst.expect("a full table is not empty"));
                    }
                    model.push((page, known.map_or(0, |(_, count, _)| count) + 1, epoch));
                }
                assert_same(&predictor, model.iter().map(|&(page, count, last)| {
                    let value = f64::from(count) / (epoch + 1 - last) as f64;
                    (page, value / (1.0 + value))
                }));
            }
        }
    }
}
