//! The spectrum between the last write and the count of all writes.

use std::collections::BTreeSet;

use super::page_map::PageMap;
use super::{FIRST_EPOCH, Predictor, RankedPage, btree_bytes, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// Combined recency and frequency, as of the last write.
    crf: f64,
    last: u32,
}

/// LRFU: each write of age `a` counts `2^(−λ·a)`, in epochs, and the sum is a page's "combined recency and frequency". A
/// full table drops the page with the least sum, of equal ones the one with the lowest number. λ = 0 counts all
/// writes alike, as LFU does; λ = 1 lets the last write outweigh all before it, as LRU does.
///
/// Heat is the sum in writes per epoch: a page written in each epoch tends to 1.
///
/// Source: D. Lee, J. Choi, J. Kim, S. H. Noh, S. L. Min, Y. Cho and C. S. Kim, "LRFU: a spectrum of policies that
/// subsumes the least recently used and least frequently used policies", IEEE Transactions on Computers 50(12), 2001.
#[derive(Debug, Clone)]
pub struct LrfuPredictor {
    capacity: usize,
    lambda: f64,
    now: u32,
    pages: PageMap<Entry>,
    /// The rank of each page and its number: the first is the next to be dropped.
    order: BTreeSet<(i64, u32)>,
}

impl LrfuPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0, or λ is not within 0 to 1.
    pub fn new(capacity: usize, lambda: f64) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        assert!((0.0..=1.0).contains(&lambda), "λ = {lambda} is not within 0 to 1");
        Self { capacity, lambda, now: FIRST_EPOCH, pages: PageMap::new(), order: BTreeSet::new() }
    }

    /// What is left of a sum after so many epochs.
    fn kept(&self, epochs: u32) -> f64 {
        (-self.lambda * f64::from(epochs)).exp2()
    }

    /// All sums shrink alike, so their order stays that of `log2(sum) + λ · epoch` at the last write; as an integer that
    /// orders as the number does.
    fn rank_of(&self, entry: Entry) -> i64 {
        let bits = (entry.crf.log2() + self.lambda * f64::from(entry.last)).to_bits() as i64;
        bits ^ ((bits >> 63) & i64::MAX)
    }

    fn heat_of(&self, entry: Entry) -> f64 {
        let kept = self.kept(1);
        // The sum tends to k + k² + …, k being what an epoch leaves; without ageing it is the number of writes.
        let writes_per_epoch =
            if self.lambda > 0.0 { (1.0 - kept) / kept } else { 1.0 / f64::from((self.now - FIRST_EPOCH).max(1)) };
        entry.crf * self.kept(self.now - entry.last) * writes_per_epoch
    }
}

impl Predictor for LrfuPredictor {
    fn name(&self) -> &'static str {
        "lrfu"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            let crf = match self.pages.get(page) {
                Some(entry) => {
                    self.order.remove(&(self.rank_of(entry), page));
                    1.0 + entry.crf * self.kept(self.now - entry.last)
                }
                None => {
                    if self.pages.len() == self.capacity
                        && let Some((_, dropped)) = self.order.pop_first()
                    {
                        self.pages.remove(dropped);
                    }
                    1.0
                }
            };
            let entry = Entry { crf, last: self.now };
            self.order.insert((self.rank_of(entry), page));
            self.pages.insert(page, entry);
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
    }

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, |entry| self.heat_of(entry))
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.iter().for_each(|(page, entry)| each(ranked(page, self.heat_of(entry))));
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.pages.memory_bytes() + btree_bytes::<(i64, u32)>(self.order.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_close, trace};
    use super::*;

    proptest! {
        #[test]
        fn drops_the_page_with_the_least_sum(
            trace in trace(60),
            capacity in 1..50_usize,
            // A whole number of eighths, so that equal sums are equal by either way of computing them.
            eighths in prop_oneof![Just(0_u32), Just(8)],
        ) {
            let lambda = f64::from(eighths) / 8.0;
            let mut predictor = LrfuPredictor::new(capacity, lambda);
            // Each page's writes.
            let mut model: Vec<(u64, Vec<usize>)> = Vec::new();
            let sum = |writes: &[usize], now: usize| -> f64 {
                writes.iter().map(|&epoch| (-lambda * (now - epoch) as f64).exp2()).sum()
            };
            for (epoch, written) in trace.iter().enumerate() {
                for page in Trace::feed(&mut predictor, written) {
                    if let Some((_, writes)) = model.iter_mut().find(|entry| entry.0 == page) {
                        writes.push(epoch);
                        continue;
                    }
                    if model.len() == capacity {
                        model.sort_by(|a, b| sum(&a.1, epoch).total_cmp(&sum(&b.1, epoch)).then(a.0.cmp(&b.0)));
                        model.remove(0);
                    }
                    model.push((page, vec![epoch]));
                }
                let factor = if eighths == 0 { 1.0 / (epoch + 1) as f64 } else { 1.0 };
                assert_close(&predictor, model.iter().map(|(page, writes)| (*page, sum(writes, epoch + 1) * factor)), 1e-9);
            }
        }

        /// Any λ, with room for all pages: heat is the plain sum.
        #[test]
        fn heat_is_the_aged_sum(trace in trace(40), lambda in 0.001..1.0_f64) {
            let mut predictor = LrfuPredictor::new(100, lambda);
            let mut writes: Vec<(u64, usize)> = Vec::new();
            for (epoch, written) in trace.iter().enumerate() {
                writes.extend(Trace::feed(&mut predictor, written).into_iter().map(|page| (page, epoch)));
                let mut sums = std::collections::BTreeMap::new();
                for &(page, written) in &writes {
                    *sums.entry(page).or_insert(0.0) += (-lambda * (epoch + 1 - written) as f64).exp2();
                }
                let kept = (-lambda).exp2();
                assert_close(&predictor, sums.into_iter().map(|(page, sum)| (page, sum * (1.0 - kept) / kept)), 1e-9);
            }
        }
    }

    #[test]
    fn a_page_written_in_each_epoch_tends_to_one() {
        let mut predictor = LrfuPredictor::new(10, 0.25);
        for _ in 0..100 {
            predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(3, 1)]);
            predictor.end_epoch();
        }
        assert!((predictor.heat(PageNumber(3)) - 1.0).abs() < 1e-6);
    }
}
