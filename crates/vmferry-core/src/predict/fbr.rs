//! Counts that leave out what was written just before.

use std::collections::BTreeSet;

use super::page_map::PageMap;
use super::{Predictor, RankedPage, btree_bytes, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// The part of the stack in which a write is not counted.
const NEW_PART: f64 = 0.25;
/// The part of the stack from which pages are dropped.
const OLD_PART: f64 = 0.6;
/// When pages have more writes than so many on average, all counts are halved.
const MOST_MEAN_COUNT: u64 = 100;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Section {
    #[default]
    New,
    Middle,
    Old,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    count: u32,
    /// The place on the stack: greater is nearer to the top.
    stamp: u64,
    section: Section,
}

/// Frequency-based replacement: an LRU stack in three sections. Writes to pages in the new section, at the top, are not
/// counted, so that a burst counts as one write. A full table drops the page of the old section, at the bottom, with the
/// fewest counted writes, of those the lowest one. When the mean count passes 100, all counts are halved, rounded up.
///
/// The sections are parts of the pages known, a quarter, 15 % and 60 %, and not of the capacity: what is to be ranked here
/// is often much less than could be held, and would else stay in the new section for good.
///
/// Heat is c / (1 + c) for the count c: an order and no rate, since uncounted writes are not known.
///
/// Source: J. T. Robinson and M. V. Devarakonda, "Data cache management using frequency-based replacement", SIGMETRICS
/// 1990. Its bound on the chains of equal counts is a means of speed, and left out.
#[derive(Debug, Clone)]
pub struct FbrPredictor {
    capacity: usize,
    next_stamp: u64,
    pages: PageMap<Entry>,
    total_count: u64,
    /// Stamp and page.
    new: BTreeSet<(u64, u32)>,
    middle: BTreeSet<(u64, u32)>,
    /// The old section: count, stamp and page, so that the first is the next to be dropped.
    old: BTreeSet<(u32, u64, u32)>,
}

impl FbrPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        Self {
            capacity,
            next_stamp: 0,
            pages: PageMap::new(),
            total_count: 0,
            new: BTreeSet::new(),
            middle: BTreeSet::new(),
            old: BTreeSet::new(),
        }
    }

    fn touch(&mut self, page: u32) {
        let count = match self.pages.get(page) {
            Some(entry) => {
                self.unlink(page, entry);
                entry.count.saturating_add(u32::from(entry.section != Section::New))
            }
            None => {
                if self.pages.len() == self.capacity {
                    self.drop_one();
                }
                1
            }
        };
        self.total_count += u64::from(count);
        self.pages.insert(page, Entry { count, stamp: self.next_stamp, section: Section::New });
        self.new.insert((self.next_stamp, page));
        self.next_stamp += 1;
        self.age();
        self.balance();
    }

    /// Takes a page off the stack. It stays in the table.
    fn unlink(&mut self, page: u32, entry: Entry) {
        match entry.section {
            Section::New => self.new.remove(&(entry.stamp, page)),
            Section::Middle => self.middle.remove(&(entry.stamp, page)),
            Section::Old => self.old.remove(&(entry.count, entry.stamp, page)),
        };
        self.total_count -= u64::from(entry.count);
    }

    /// Where there is no old section yet, because the table is tiny, the bottom of the stack goes.
    fn drop_one(&mut self) {
        let old = self.old.first().map(|&(_, _, page)| page);
        let bottom = || self.middle.first().or(self.new.first()).map(|&(_, page)| page);
        if let Some(page) = old.or_else(bottom)
            && let Some(entry) = self.pages.remove(page)
        {
            self.unlink(page, entry);
        }
    }

    fn age(&mut self) {
        if self.total_count <= MOST_MEAN_COUNT * self.pages.len() as u64 {
            return;
        }
        let pages: Vec<u32> = self.pages.iter().map(|(page, _)| page).collect();
        self.total_count = 0;
        self.old.clear();
        for page in pages {
            let entry = self.pages.get_mut(page).expect("a page of the table");
            entry.count = entry.count.div_ceil(2);
            self.total_count += u64::from(entry.count);
            if entry.section == Section::Old {
                self.old.insert((entry.count, entry.stamp, page));
            }
        }
    }

    /// Moves pages down until no section above the old one has more than its part.
    fn balance(&mut self) {
        let pages = self.pages.len() as f64;
        let most_new = (pages * NEW_PART).ceil() as usize;
        let most_middle = (pages * (1.0 - OLD_PART)).ceil() as usize - most_new;
        while self.new.len() > most_new
            && let Some((stamp, page)) = self.new.pop_first()
        {
            self.middle.insert((stamp, page));
            self.set_section(page, Section::Middle);
        }
        while self.middle.len() > most_middle
            && let Some((stamp, page)) = self.middle.pop_first()
        {
            let count = self.set_section(page, Section::Old);
            self.old.insert((count, stamp, page));
        }
    }

    fn set_section(&mut self, page: u32, section: Section) -> u32 {
        let entry = self.pages.get_mut(page).expect("a page of the stack is in the table");
        entry.section = section;
        entry.count
    }

    fn heat_of(entry: Entry) -> f64 {
        f64::from(entry.count) / (1.0 + f64::from(entry.count))
    }
}

impl Predictor for FbrPredictor {
    fn name(&self) -> &'static str {
        "fbr"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        trackable_pages(written).for_each(|page| self.touch(page));
    }

    fn end_epoch(&mut self) {}

    fn tracked_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        trackable(page).and_then(|page| self.pages.get(page)).map_or(0.0, Self::heat_of)
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        self.pages.iter().for_each(|(page, entry)| each(ranked(page, Self::heat_of(entry))));
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.pages.memory_bytes()
            + btree_bytes::<(u64, u32)>(self.new.len() + self.middle.len())
            + btree_bytes::<(u32, u64, u32)>(self.old.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Trace, assert_same, trace};
    use super::*;

    proptest! {
        /// Against one list, the top first, in which the sections are ranges of positions.
        #[test]
        fn behaves_as_a_stack_in_three_sections(trace in trace(60), capacity in 1..50_usize) {
            let mut predictor = FbrPredictor::new(capacity);
            // Page and count.
            let mut model: Vec<(u64, u32)> = Vec::new();
            let ends = |pages: usize| [(pages as f64 * 0.25).ceil() as usize, (pages as f64 * 0.4).ceil() as usize];
            for written in trace.iter() {
                for page in Trace::feed(&mut predictor, written) {
                    let [new_end, old_start] = ends(model.len());
                    let count = match model.iter().position(|&(other, _)| other == page) {
                        Some(at) => {
                            let (_, count) = model.remove(at);
                            if at < new_end { count } else { count + 1 }
                        }
                        None => {
                            if model.len() == capacity {
                                // The last of those with the least count, and the last of all if none is old.
                                let old = model.iter().enumerate().skip(old_start);
                                let least = old.min_by_key(|&(at, &(_, count))| (count, capacity - at));
                                model.remove(least.map_or(capacity - 1, |(at, _)| at));
                            }
                            1
                        }
                    };
                    model.insert(0, (page, count));
                }
                assert_same(&predictor, model.iter().map(|&(page, count)| {
                    (page, f64::from(count) / (1.0 + f64::from(count)))
                }));
            }
        }
    }

    #[test]
    fn counts_are_halved_when_their_mean_is_too_high() {
        let mut predictor = FbrPredictor::new(4);
        // Three pages in turn: none is in the new section when its turn comes.
        for round in 1..=1000_u32 {
            for page in [1, 2, 3] {
                predictor.touch(page);
            }
            let counts: Vec<u32> = predictor.pages.iter().map(|(_, entry)| entry.count).collect();
            assert_eq!(counts.iter().map(|&count| u64::from(count)).sum::<u64>(), predictor.total_count);
            assert!(predictor.total_count <= 3 * MOST_MEAN_COUNT);
            if round == 100 {
                assert_eq!(counts, [100; 3], "each write counts so far");
            }
            if round == 102 {
                assert!(counts.iter().all(|&count| (50..=53).contains(&count)), "{counts:?}");
            }
        }
    }

    #[test]
    fn a_burst_counts_as_one_write() {
        let mut predictor = FbrPredictor::new(10);
        for page in 1..=8 {
            predictor.touch(page);
        }
        for _ in 0..50 {
            predictor.touch(8);
        }
        predictor.touch(1);
        assert!(predictor.heat(PageNumber(1)) > predictor.heat(PageNumber(8)));
    }
}
