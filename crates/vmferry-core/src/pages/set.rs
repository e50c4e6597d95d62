//! A set of pages as a hierarchical bitmap.
//!
//! One bit per page, and above it one bit per 64-bit word that is not zero, level by level. Finding the next page of a
//! sparse set costs a few word reads whatever the guest's size, and clearing an almost empty set touches what it holds.

use super::{PageNumber, PageRun};

const WORD_BITS: u64 = 64;

/// A set of page numbers below a fixed capacity. Invariant: bit `i` of level `k + 1` is set exactly when word `i` of
/// level `k` is not zero; `len` is the number of bits set in level 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    capacity: u64,
    len: u64,
    levels: Vec<Vec<u64>>,
}

impl PageSet {
    /// An empty set for page numbers below `capacity`.
    pub fn empty(capacity: u64) -> Self {
        let mut levels = Vec::new();
        let mut bits = capacity;
        loop {
            let words = bits.div_ceil(WORD_BITS);
            levels.push(vec![0; usize::try_from(words).expect("a bitmap of guest pages fits in memory")]);
            if words <= 1 {
                break;
            }
            bits = words;
        }
        Self { capacity, len: 0, levels }
    }

    /// The set of all page numbers below `capacity`.
    pub fn full(capacity: u64) -> Self {
        let mut set = Self::empty(capacity);
        set.insert_run(PageRun::new(0, capacity));
        set
    }

    /// Page numbers are below this.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// How many pages the set holds.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the set holds no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the set holds `page`; false for numbers beyond the capacity.
    pub fn contains(&self, page: PageNumber) -> bool {
        page.0 < self.capacity && self.levels[0][word_of(page.0)] & bit_of(page.0) != 0
    }

    /// Adds `page`; whether it was new.
    ///
    /// # Panics
    /// If the page number is not below the capacity.
    pub fn insert(&mut self, page: PageNumber) -> bool {
        assert!(page.0 < self.capacity, "page {} is beyond the set's {}", page.0, self.capacity);
        let before = self.levels[0][word_of(page.0)];
        if before & bit_of(page.0) != 0 {
            return false;
        }
        self.len += 1;
        let mut index = page.0;
        for level in &mut self.levels {
            let word = &mut level[word_of(index)];
            let was = *word;
            *word |= bit_of(index);
            if was != 0 {
                break;
            }
            index /= WORD_BITS;
        }
        true
    }

    /// Takes `page` out; whether it was in the set.
    pub fn remove(&mut self, page: PageNumber) -> bool {
        if !self.contains(page) {
            return false;
        }
        self.len -= 1;
        let mut index = page.0;
        for level in &mut self.levels {
            let word = &mut level[word_of(index)];
            *word &= !bit_of(index);
            if *word != 0 {
                break;
            }
            index /= WORD_BITS;
        }
        true
    }

    /// Adds all pages of `run`; how many were new.
    ///
    /// # Panics
    /// If the run reaches beyond the capacity.
    pub fn insert_run(&mut self, run: PageRun) -> u64 {
        assert!(
            run.first.0.checked_add(run.count).is_some_and(|end| end <= self.capacity),
            "{run:?} reaches beyond the set's {}",
            self.capacity
        );
        let mut added = 0;
        for (word, mask) in word_masks(run) {
            let was = self.levels[0][word];
            self.levels[0][word] |= mask;
            added += u64::from((mask & !was).count_ones());
            if was == 0 {
                let mut index = word as u64;
                for level in &mut self.levels[1..] {
                    let parent = &mut level[word_of(index)];
                    let parent_was = *parent;
                    *parent |= bit_of(index);
                    if parent_was != 0 {
                        break;
                    }
                    index /= WORD_BITS;
                }
            }
        }
        self.len += added;
        added
    }

    /// Adds all pages of `other`.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of one guest have one capacity");
        for run in other.runs() {
            self.insert_run(run);
        }
    }

    /// The lowest page not below `from`.
    pub fn next(&self, from: PageNumber) -> Option<PageNumber> {
        self.next_bit(0, from.0).map(PageNumber)
    }

    /// The lowest run that starts at or after `from`, cut to at most `max_pages`.
    pub fn next_run(&self, from: PageNumber, max_pages: u64) -> Option<PageRun> {
        let first = self.next(from)?.0;
        let limit = self.capacity.min(first.saturating_add(max_pages.max(1)));
        let mut end = first;
        while end < limit {
            // The bits of this word from `end` on: how many ones follow each other.
            let ones = (self.levels[0][word_of(end)] >> (end % WORD_BITS)).trailing_ones();
            let to_word_end = WORD_BITS - end % WORD_BITS;
            let step = u64::from(ones).min(to_word_end);
            end += step;
            if step < to_word_end {
                break;
            }
        }
        Some(PageRun::new(first, end.min(limit) - first))
    }

    /// All runs, ascending, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(PageNumber(from), u64::MAX)?;
            from = run.end();
            Some(run)
        })
    }

    /// All pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = PageNumber> {
        self.runs().flat_map(PageRun::pages)
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        while let Some(page) = self.next(PageNumber(0)) {
            // Clear a whole word of level 0 at a time.
            let word = word_of(page.0);
            self.len -= u64::from(self.levels[0][word].count_ones());
            self.levels[0][word] = 0;
            let mut index = word as u64;
            for level in &mut self.levels[1..] {
                let parent = &mut level[word_of(index)];
                *parent &= !bit_of(index);
                if *parent != 0 {
                    break;
                }
                index /= WORD_BITS;
            }
        }
    }

    /// The lowest bit set in `level` that is not below `from`.
    fn next_bit(&self, level: usize, from: u64) -> Option<u64> {
        let words = self.levels.get(level)?;
        let word = words.get(word_of(from))?;
        let here = word >> (from % WORD_BITS);
        if here != 0 {
            return Some(from + u64::from(here.trailing_zeros()));
        }
        let next_word = self.next_bit(level + 1, from / WORD_BITS + 1)?;
        Some(next_word * WORD_BITS + u64::from(words[next_word as usize].trailing_zeros()))
    }
}

const fn word_of(index: u64) -> usize {
    (index / WORD_BITS) as usize
}

const fn bit_of(index: u64) -> u64 {
    1 << (index % WORD_BITS)
}

/// The level-0 words that `run` touches, each with the mask of its pages in it.
fn word_masks(run: PageRun) -> impl Iterator<Item = (usize, u64)> {
    let mut at = run.first.0;
    let end = run.end();
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let low = at % WORD_BITS;
        let count = (WORD_BITS - low).min(end - at);
        let ones = if count == WORD_BITS { u64::MAX } else { (1 << count) - 1 };
        let item = (word_of(at), ones << low);
        at += count;
        Some(item)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u64),
        Remove(u64),
        InsertRun(u64, u64),
        Clear,
    }

    fn op(capacity: u64) -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (0..capacity).prop_map(Op::Insert),
            8 => (0..capacity).prop_map(Op::Remove),
            4 => (0..capacity, 0..300_u64).prop_map(move |(at, n)| Op::InsertRun(at, n.min(capacity - at))),
            1 => Just(Op::Clear),
        ]
    }

    fn check(set: &PageSet, model: &BTreeSet<u64>) {
        assert_eq!(set.len(), model.len() as u64);
        assert!(set.pages().map(|page| page.0).eq(model.iter().copied()));
        for (level, pair) in set.levels.windows(2).enumerate() {
            for (index, word) in pair[0].iter().enumerate() {
                let summary = pair[1][index / 64] & (1 << (index % 64)) != 0;
                assert_eq!(summary, *word != 0, "level {level} word {index}");
            }
        }
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            (capacity, ops) in (1..10_000_u64).prop_flat_map(|c| (Just(c), prop::collection::vec(op(c), 0..120))),
            from in 0..10_000_u64,
        ) {
            let mut set = PageSet::empty(capacity);
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(page) => assert_eq!(set.insert(PageNumber(page)), model.insert(page)),
                    Op::Remove(page) => assert_eq!(set.remove(PageNumber(page)), model.remove(&page)),
                    Op::InsertRun(first, count) => {
                        let new = (first..first + count).filter(|&page| model.insert(page)).count();
                        assert_eq!(set.insert_run(PageRun::new(first, count)), new as u64);
                    }
                    Op::Clear => {
                        set.clear();
                        model.clear();
                    }
                }
                check(&set, &model);
            }
            assert_eq!(set.next(PageNumber(from)).map(|page| page.0), model.range(from..).next().copied());
        }
    }

    #[test]
    fn runs_are_whole_and_can_be_cut() {
        let mut set = PageSet::empty(1000);
        set.insert_run(PageRun::new(60, 200));
        set.insert_run(PageRun::new(999, 1));
        assert_eq!(set.runs().collect::<Vec<_>>(), [PageRun::new(60, 200), PageRun::new(999, 1)]);
        assert_eq!(set.next_run(PageNumber(70), 100), Some(PageRun::new(70, 100)));
        assert_eq!(set.next_run(PageNumber(260), 9), Some(PageRun::new(999, 1)));
        assert_eq!(PageSet::full(129).runs().collect::<Vec<_>>(), [PageRun::new(0, 129)]);
        assert_eq!(PageSet::empty(0).next(PageNumber(0)), None);
    }
}
