//! The plain way to count: one aged counter for each page of the guest.

use std::num::NonZeroU32;

use super::{FIRST_EPOCH, Predictor, RankedPage, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

#[derive(Debug, Clone, Copy, Default)]
struct Counter {
    /// The aged count, as of the last write.
    count: f32,
    /// The epoch of the last write; 0 if there was none.
    last: u32,
}

/// An array of aged counters, one for each page of the guest. The rival of every cleverer structure: a write costs one
/// access of memory. What it cannot do is what it costs, 8 bytes for each page of the guest whether hot or not, and a visit
/// of all of them to find the hot ones.
///
/// Heat is that of `lcbst` without gaps: a page written in each epoch tends to 1, and halves each half-life without writes.
/// No page is forgotten.
///
/// Source: none needed.
#[derive(Debug, Clone)]
pub struct FlatPredictor {
    /// What is left of a write after an epoch.
    kept: f64,
    now: u32,
    counters: Vec<Counter>,
    known: u64,
    /// The sum of all counts, aged to the current epoch.
    total: f64,
}

impl FlatPredictor {
    /// A predictor for a guest of so many pages. Pages beyond are not tracked.
    pub fn new(total_pages: u64, half_life_epochs: NonZeroU32) -> Self {
        let pages = usize::try_from(total_pages.min(super::UNTRACKED_FROM)).expect("page numbers fit in memory");
        Self {
            kept: (-1.0 / f64::from(half_life_epochs.get())).exp2(),
            now: FIRST_EPOCH,
            counters: vec![Counter::default(); pages],
            known: 0,
            total: 0.0,
        }
    }

    fn aged(&self, counter: Counter) -> f64 {
        let epochs = i32::try_from(self.now - counter.last).unwrap_or(i32::MAX);
        f64::from(counter.count) * self.kept.powi(epochs)
    }

    /// What turns an aged count into writes per epoch: the count tends to k + k² + …, k being what one epoch leaves.
    fn writes_per_epoch(&self) -> f64 {
        (1.0 - self.kept) / self.kept
    }

    fn heat_of(&self, counter: Counter) -> f64 {
        if counter.last == 0 { 0.0 } else { self.aged(counter) * self.writes_per_epoch() }
    }
}

impl Predictor for FlatPredictor {
    fn name(&self) -> &'static str {
        "flat"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        for page in trackable_pages(written) {
            let Some(&counter) = self.counters.get(page as usize) else { break };
            let before = if counter.last == 0 { 0.0 } else { self.aged(counter) };
            self.known += u64::from(counter.last == 0);
            self.total += 1.0;
            self.counters[page as usize] = Counter { count: (before + 1.0) as f32, last: self.now };
        }
    }

    fn end_epoch(&mut self) {
        self.now = self.now.saturating_add(1);
        self.total *= self.kept;
    }

    fn tracked_pages(&self) -> u64 {
        self.known
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.counters.get(page as usize)).map_or(0.0, |&counter| self.heat_of(counter))
    }

    /// Takes time in proportion to the pages of the guest.
    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        for (page, &counter) in (0..).zip(&self.counters) {
            if counter.last != 0 {
                each(ranked(page, self.heat_of(counter)));
            }
        }
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.counters.capacity() * size_of::<Counter>()
    }

    /// Kept as a sum; O(1).
    fn total_heat(&self) -> f64 {
        self.total * self.writes_per_epoch()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_close, trace};
    use super::*;

    proptest! {
        #[test]
        fn counts_as_a_plain_sum_does(trace in trace(60), half_life in 1..9_u32, total_pages in 30..80_u64) {
            let half_life = NonZeroU32::new(half_life).expect("not zero");
            let mut predictor = FlatPredictor::new(total_pages, half_life);
            let kept = 0.5_f64.powf(1.0 / f64::from(half_life.get()));
            let mut model: BTreeMap<u64, f64> = BTreeMap::new();
            for written in trace.iter() {
                for page in Trace::feed(&mut predictor, written).into_iter().filter(|&page| page < total_pages) {
                    *model.entry(page).or_default() += 1.0;
                }
                model.values_mut().for_each(|sum| *sum *= kept);
                let factor = (1.0 - kept) / kept;
                assert_close(&predictor, model.iter().map(|(&page, sum)| (page, sum * factor)), 1e-5);
                let total: f64 = model.values().sum::<f64>() * factor;
                prop_assert!((predictor.total_heat() - total).abs() < 1e-6);
            }
        }
    }
}
