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
        word_masks(run).map(|(word, mask)| self.insert_bits(word, mask)).sum()
    }

    /// Adds all pages of `other`.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of one guest have one capacity");
        for (word, bits) in other.filled_words() {
            self.insert_bits(word, bits);
        }
    }

    /// Whether `other` holds all pages of this set.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn is_subset_of(&self, other: &Self) -> bool {
        assert_eq!(self.capacity, other.capacity, "sets of one guest have one capacity");
        self.filled_words().all(|(word, bits)| bits & !other.levels[0][word] == 0)
    }

    /// How many of its pages the other set does not have.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn len_without(&self, other: &Self) -> u64 {
        assert_eq!(self.capacity, other.capacity, "sets of one guest have one capacity");
        self.filled_words().map(|(word, bits)| u64::from((bits & !other.levels[0][word]).count_ones())).sum()
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
        let mut words = self.filled_words();
        let (mut base, mut bits) = (0, 0);
        let mut open: Option<PageRun> = None;
        std::iter::from_fn(move || {
            loop {
                if bits == 0 {
                    match words.next() {
                        Some((word, filled)) => (base, bits) = (word as u64 * WORD_BITS, filled),
                        None => return open.take(),
                    }
                }
                let run = lowest_run(&mut bits, base);
                match &mut open {
                    Some(before) if before.end() == run.first.0 => before.count += run.count,
                    Some(_) | None => {
                        if let Some(whole) = open.replace(run) {
                            return Some(whole);
                        }
                    }
                }
            }
        })
    }

    /// Removes all pages, and returns them as [`Self::runs`] does.
    pub fn take_runs(&mut self) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        let mut take = |word: &mut u64, index: usize| {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                let run = lowest_run(&mut bits, index as u64 * WORD_BITS);
                match runs.last_mut() {
                    Some(before) if before.end() == run.first.0 => before.count += run.count,
                    Some(_) | None => runs.push(run),
                }
            }
        };
        let mut from = 0;
        while let Some(parent) = self.next_filled(1, from) {
            from = parent + 1;
            for bit in bits_of(self.levels[1][parent]) {
                let index = parent * WORD_BITS as usize + bit as usize;
                take(&mut self.levels[0][index], index);
            }
        }
        if let [only] = &mut self.levels[..] {
            only.iter_mut().for_each(|word| take(word, 0));
        }
        self.clear_from(1);
        runs
    }

    /// All pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = PageNumber> {
        self.runs().flat_map(PageRun::pages)
    }

    /// The pages of this set that are in `with` too and not in `without`, ascending: the `first` lowest and the `last`
    /// highest of them, or all if these are all. What lies between costs nothing.
    ///
    /// # Panics
    /// If the capacities differ.
    pub fn ends_of_difference(&self, with: &Self, without: &Self, first: usize, last: usize) -> Vec<PageNumber> {
        assert!(
            self.capacity == with.capacity && self.capacity == without.capacity,
            "sets of one guest have one capacity"
        );
        let difference = |word: usize| self.levels[0][word] & with.levels[0][word] & !without.levels[0][word];
        let mut pages: Vec<PageNumber> = Vec::new();
        let mut words = self.filled_words().map(|(word, _)| word);
        while pages.len() < first
            && let Some(word) = words.next()
        {
            let lowest = bits_of(difference(word)).take(first - pages.len());
            pages.extend(lowest.map(|bit| PageNumber(word as u64 * WORD_BITS + bit)));
        }
        if pages.len() < first {
            return pages;
        }
        // From the other end, down to these.
        let least = pages.last().map_or(0, |page| page.0 + 1);
        let (lowest, mut end) = (pages.len(), self.levels[0].len());
        while pages.len() - lowest < last
            && let Some(word) = self.last_filled(end)
            && (word as u64 + 1) * WORD_BITS > least
        {
            let mut bits = difference(word);
            while bits != 0 && pages.len() - lowest < last {
                let highest = u64::from(bits.ilog2());
                let page = word as u64 * WORD_BITS + highest;
                if page < least {
                    break;
                }
                bits &= !bit_of(highest);
                pages.push(PageNumber(page));
            }
            end = word;
        }
        pages[lowest..].reverse();
        pages
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.clear_from(0);
    }

    /// Clears the levels from this one on; those below are clear already.
    fn clear_from(&mut self, level: usize) {
        // From below: each level says which words of the one below are not zero.
        for level in level..self.levels.len() {
            let mut from = 0;
            while let Some(parent) = self.next_filled(level + 1, from) {
                from = parent + 1;
                for bit in bits_of(self.levels[level + 1][parent]) {
                    self.levels[level][parent * WORD_BITS as usize + bit as usize] = 0;
                }
            }
        }
        // The highest level is one word, if any.
        self.levels.iter_mut().rev().take(1).for_each(|level| level.fill(0));
        self.len = 0;
    }

    /// The words of level 0 that are not zero, ascending, each with its index.
    fn filled_words(&self) -> impl Iterator<Item = (usize, u64)> {
        let words = &self.levels[0];
        // The words under one word of level 1. A set of one word has no such level.
        let mut filled = u64::from(self.levels.len() == 1 && words.first().is_some_and(|&word| word != 0));
        let (mut base, mut from) = (0, 0);
        std::iter::from_fn(move || {
            while filled == 0 {
                let parent = self.next_filled(1, from)?;
                (base, from) = (parent * WORD_BITS as usize, parent + 1);
                filled = self.levels[1][parent];
            }
            let index = base + filled.trailing_zeros() as usize;
            filled &= filled - 1;
            Some((index, words[index]))
        })
    }

    /// The first word of a level, from this one on, that is not zero.
    fn next_filled(&self, level: usize, from: usize) -> Option<usize> {
        if level + 1 < self.levels.len() {
            return self.next_bit(level + 1, from as u64).map(|word| word as usize);
        }
        let word = self.levels.get(level)?.get(from)?;
        (*word != 0).then_some(from)
    }

    /// The last word of level 0 before this one that is not zero.
    fn last_filled(&self, before: usize) -> Option<usize> {
        if self.levels.len() > 1 {
            return self.last_bit(1, before as u64).map(|word| word as usize);
        }
        let word = self.levels[0][..before].last()?;
        (*word != 0).then(|| before - 1)
    }

    /// Adds the pages of these bits of a word of level 0; how many were new.
    fn insert_bits(&mut self, word: usize, bits: u64) -> u64 {
        debug_assert!(bits != 0, "levels above would say that word {word} is not zero");
        let was = self.levels[0][word];
        self.levels[0][word] |= bits;
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
        let added = u64::from((bits & !was).count_ones());
        self.len += added;
        added
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

    /// The highest bit set in `level` that is below `before`.
    fn last_bit(&self, level: usize, before: u64) -> Option<u64> {
        let words = self.levels.get(level)?;
        let from = before.checked_sub(1)?;
        let here = words[word_of(from)] << (WORD_BITS - 1 - from % WORD_BITS);
        if here != 0 {
            return Some(from - u64::from(here.leading_zeros()));
        }
        let word = self.last_bit(level + 1, from / WORD_BITS)?;
        Some(word * WORD_BITS + u64::from(words[word as usize].ilog2()))
    }
}

const fn word_of(index: u64) -> usize {
    (index / WORD_BITS) as usize
}

const fn bit_of(index: u64) -> u64 {
    1 << (index % WORD_BITS)
}

/// Takes the lowest run of ones out of a word that is not zero. Its lowest bit stands for page `base`.
fn lowest_run(bits: &mut u64, base: u64) -> PageRun {
    let first = bits.trailing_zeros();
    let count = (*bits >> first).trailing_ones();
    // Shifted in two steps, since the run may reach the word's end.
    *bits &= (u64::MAX << first) << (count - 1) << 1;
    PageRun::new(base + u64::from(first), count.into())
}

/// The numbers of the bits that are set, ascending.
fn bits_of(mut bits: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let lowest = (bits != 0).then(|| u64::from(bits.trailing_zeros()))?;
        bits &= bits - 1;
        Some(lowest)
    })
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
        TakeRuns,
    }

    fn op(capacity: u64) -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (0..capacity).prop_map(Op::Insert),
            8 => (0..capacity).prop_map(Op::Remove),
            4 => (0..capacity, 0..300_u64).prop_map(move |(at, n)| Op::InsertRun(at, n.min(capacity - at))),
            1 => Just(Op::Clear),
            1 => Just(Op::TakeRuns),
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
                    Op::TakeRuns => {
                        let runs: Vec<PageRun> = set.runs().collect();
                        assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first.0), "{runs:?}");
                        assert_eq!(set.take_runs(), runs);
                        assert!(runs.into_iter().flat_map(PageRun::pages).map(|page| page.0).eq(model.iter().copied()));
                        model.clear();
                    }
                }
                check(&set, &model);
            }
            assert_eq!(set.next(PageNumber(from)).map(|page| page.0), model.range(from..).next().copied());
        }
    }

    proptest! {
        #[test]
        fn unions_and_subsets_are_those_of_sets(
            (capacity, some, more, fewer) in (1..10_000_u64).prop_flat_map(|capacity| {
                let pages = || prop::collection::btree_set(0..capacity, 0..60);
                (Just(capacity), pages(), pages(), pages())
            }),
            (first, last) in (0..20_usize, 0..20_usize),
        ) {
            let set_of = |pages: &BTreeSet<u64>| {
                let mut set = PageSet::empty(capacity);
                pages.iter().for_each(|&page| assert!(set.insert(PageNumber(page))));
                set
            };
            let (mut set, other) = (set_of(&some), set_of(&more));
            prop_assert_eq!(set.is_subset_of(&other), some.is_subset(&more));
            set.union_with(&set_of(&fewer));
            let mut ends: Vec<u64> = some.union(&fewer).filter(|page| !more.contains(page)).copied().collect();
            if first + last < ends.len() {
                ends.drain(first..ends.len() - last);
            }
            let all = PageSet::full(capacity);
            let found = set.ends_of_difference(&all, &other, first, last).into_iter().map(|page| page.0);
            prop_assert!(found.eq(ends.iter().copied()));
            let found = all.ends_of_difference(&set, &other, first, last).into_iter().map(|page| page.0);
            prop_assert!(found.eq(ends));
            let some: BTreeSet<u64> = some.union(&fewer).copied().collect();
            set.union_with(&other);
            check(&set, &some.union(&more).copied().collect());
            prop_assert!(other.is_subset_of(&set));
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

    /// Where a level's bits end with a word, the search from above begins at the first word that is not there.
    #[test]
    fn the_highest_pages_are_found_whatever_the_levels_are_filled_with() {
        for capacity in [1, 64, 65, 4095, 4096, 4097, 64 * 4096, 64 * 4096 + 1] {
            let (all, none) = (PageSet::full(capacity), PageSet::empty(capacity));
            let last = PageNumber(capacity - 1);
            assert_eq!(all.ends_of_difference(&all, &none, 0, 1), [last], "capacity {capacity}");
            let mut lowest = none.clone();
            lowest.insert(PageNumber(0));
            assert_eq!(lowest.ends_of_difference(&all, &none, 0, 3), [PageNumber(0)], "capacity {capacity}");
            assert_eq!(none.ends_of_difference(&all, &none, 0, 3), [], "capacity {capacity}");
        }
    }
}
