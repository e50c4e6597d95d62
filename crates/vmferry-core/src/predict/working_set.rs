//! The default predictor: a recency stack, a counting tree for each address space, and the gaps between writes.
//!
//! Each written page is a request "page j of process p": it goes to the top of the recency stack and is counted in the
//! tree of its address space. A full stack drops its bottom page, from the tree too, so that memory follows the hot set.
//! Counters age by forward decay. The working set are the hottest pages; "the top of the tree", as the paper has it, is not
//! that set, so pages are selected by heat.
//!
//! **Heat.** With [`WorkingSetConfig::gaps`], a page's heat is what the gaps between writes of all pages say of a page
//! with its last gap and age (see the module `write_gaps`), and its own aged count as far as there is little evidence of
//! those. Without, it is its aged count.
//!
//! **The stack is not a list.** A node's value is the epoch of its page's last write, and that is the stack: pages of an
//! earlier epoch lie below those of a later one. A scan reports one bit a page and epoch, so writes of one epoch have no
//! order among them; here their order is that of their numbers, the greatest on top. A touch changes the value and
//! nothing else. Only when the stack overflows are the lowest pages looked for, an eighth of the stack at a time, in one
//! visit of all nodes. Where many pages are new, an epoch's pages are learned at once: it is worked out what batch for
//! batch would have been forgotten, and each tree lets go of that in one pass, before it takes in the new pages in another.
//!
//! **Cost.** An epoch's pages of one address space are counted as sorted batches, which read the tree level by level. A
//! page takes a node of 40 bytes, an eighth of that in reserve, and one byte where the stack is full. With more than one
//! address space an index says which tree a page is in, at 6 to 10 bytes a page. While pages are learned at once, up to
//! 44 bytes more are taken for each page that the stack can hold, and given back before the call returns.
//!
//! Invariant: each page known is in exactly one tree, that of the address space which wrote it last, and nothing else is.

use std::num::NonZeroU32;

use lcbst::{CbTree, CountingTree};

use super::page_map::PageMap;
use super::write_gaps::{LastWrite, WriteGaps};
use super::{Predictor, RankedPage, keep_hottest, live_bound, ranked, trackable, trackable_pages, trackable_part};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// The most trees. An address space that comes when there are as many, and writes markedly more than the coldest of
/// them, takes that one's place; the pages of the latter go over to [`OTHER_ADDRESS_SPACES`]. One that does not write
/// so much is itself counted there.
const MAX_TREES: usize = 64;

/// Stands for all address spaces that have no tree of their own.
pub const OTHER_ADDRESS_SPACES: AddressSpaceId = AddressSpaceId(u32::MAX);

/// A new address space takes the place of another one if it writes so many times as many pages in an epoch as that one
/// is expected to. So address spaces that are about equally busy do not take turns, not even in their first epochs, when
/// a page's heat is a sixth of what it will be.
const REPLACES_IF_BUSIER_BY: f64 = 16.0;

/// Pages are counted, and the stack is trimmed, in batches of so many: enough for the pages of a batch to share the way
/// down the tree, few enough for the batch to stay in the cache of one processor and for the stack not to grow far above
/// its limit in between.
const BATCH_PAGES: usize = if cfg!(test) { 8 } else { 4096 };

/// The lowest pages of the stack are looked for in numbers of at least this part of it.
const COLD_PART: usize = 8;

/// Pages are learned at once if there are so many of them.
const AT_ONCE_LEAST_PAGES: usize = 4 * BATCH_PAGES;

/// Pages are learned at once if at least this part of all pages known is new then, by a sample of so many. Measured with a
/// million pages known: to forget 15,000 one by one takes as long as to forget as many as there may be at once.
const AT_ONCE_NEW_PART: usize = 64;
const AT_ONCE_SAMPLES: usize = if cfg!(test) { 4 } else { 256 };

/// What a write adds to an aged counter. More than one, so that a counter that moves to another tree keeps its fractions.
const AGED_WRITE_WEIGHT: u64 = 64;

/// The rules differ in speed alone. Where pages are about equally hot the lazy rule keeps rotating back and forth after
/// batches, which the rule of the CB tree does not.
type Tree = CountingTree<u32, LastWrite, CbTree>;

/// How the predictor remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkingSetConfig {
    /// The most pages on the recency stack.
    pub stack_pages: usize,
    /// Epochs after which a write counts half; `None`: writes never age, as printed in the paper.
    pub half_life_epochs: Option<NonZeroU32>,
    /// Whether the gaps between writes go into the heat. Only with a half-life.
    pub gaps: bool,
}

impl WorkingSetConfig {
    /// The half-life if nothing else is asked for.
    pub const HALF_LIFE_EPOCHS: NonZeroU32 = NonZeroU32::new(4).expect("4 is not zero");

    /// The most pages on the stack if nothing else is asked for.
    pub const MOST_STACK_PAGES: u64 = 1 << 20;

    /// The default for a guest of so many pages: everything can be on the stack up to 4 GiB, a million pages beyond;
    /// half-life 4 epochs; with gaps.
    pub fn for_guest(total_pages: u64) -> Self {
        Self {
            stack_pages: total_pages.clamp(1, Self::MOST_STACK_PAGES) as usize,
            half_life_epochs: Some(Self::HALF_LIFE_EPOCHS),
            gaps: true,
        }
    }

    /// As printed in the paper: counts that never age, and nothing else.
    pub fn as_printed(self) -> Self {
        Self { half_life_epochs: None, gaps: false, ..self }
    }
}

#[derive(Debug)]
struct AddressSpace {
    owner: AddressSpaceId,
    tree: Tree,
}

/// The lazy counting-based splay tree predictor.
#[derive(Debug)]
pub struct WorkingSetPredictor {
    config: WorkingSetConfig,
    /// At most [`MAX_TREES`]. One whose tree is empty is free for another owner.
    spaces: Vec<AddressSpace>,
    /// Which of `spaces` a page is in. Kept from the second address space on.
    homes: Option<PageMap<u8>>,
    gaps: WriteGaps,
    epochs: u64,
    /// The lowest pages of the stack with the epochs of their last writes, the lowest last. Pages written since are still
    /// in here. All other pages on the stack are above all of these.
    cold: Vec<(u32, u32)>,
    /// Pages that came into a tree with the batch at hand; empty between calls.
    arrived: Vec<u32>,
}

impl WorkingSetPredictor {
    /// A predictor that has seen nothing.
    ///
    /// # Panics
    /// If the stack has no room for a page, or for 2^32 or more.
    pub fn new(config: WorkingSetConfig) -> Self {
        let WorkingSetConfig { stack_pages, half_life_epochs, .. } = config;
        assert!((1..u32::MAX as usize).contains(&stack_pages), "a recency stack of {stack_pages} pages");
        Self {
            config,
            spaces: Vec::new(),
            homes: None,
            gaps: WriteGaps::new(half_life_epochs.unwrap_or(WorkingSetConfig::HALF_LIFE_EPOCHS)),
            epochs: 0,
            cold: Vec::new(),
            arrived: Vec::new(),
        }
    }

    /// The trees and the address spaces they belong to.
    pub fn trees(&self) -> impl Iterator<Item = (AddressSpaceId, &CountingTree<u32, LastWrite, CbTree>)> {
        self.spaces.iter().filter(|space| !space.tree.is_empty()).map(|space| (space.owner, &space.tree))
    }

    fn pages(&self) -> usize {
        self.spaces.iter().map(|space| space.tree.len()).sum()
    }

    fn write_weight(&self) -> u64 {
        if self.config.half_life_epochs.is_some() { AGED_WRITE_WEIGHT } else { 1 }
    }

    /// What turns a weight in units of today into the expected writes per epoch: a page written in every epoch has 1.
    fn writes_per_epoch(&self) -> f64 {
        let per_write = match self.config.half_life_epochs {
            // The weight tends to the geometric sum d + d² + …, d being what one epoch leaves of a write.
            Some(half_life) => {
                let kept = (-1.0 / f64::from(half_life.get())).exp2();
                (1.0 - kept) / kept
            }
            None => 1.0 / self.epochs.max(1) as f64,
        };
        per_write / self.write_weight() as f64
    }

    fn heat_by_count(&self, space: &AddressSpace) -> f64 {
        space.tree.in_units_of_today(space.tree.total_weight()) * self.writes_per_epoch()
    }

    /// Where the pages of this owner go, who writes so many now.
    fn place_for(&mut self, owner: AddressSpaceId, written: u64) -> usize {
        if let Some(place) = self.spaces.iter().position(|space| space.owner == owner) {
            return place;
        }
        let is_free = |space: &AddressSpace| space.tree.is_empty() && space.owner != OTHER_ADDRESS_SPACES;
        if let Some(free) = self.spaces.iter().position(is_free) {
            self.spaces[free].owner = owner;
            return free;
        }
        // The last place is for those that find none.
        if self.spaces.len() < MAX_TREES - 1 || owner == OTHER_ADDRESS_SPACES {
            return self.add_space(owner);
        }
        let others = self.place_for(OTHER_ADDRESS_SPACES, 0);
        let named = self.spaces.iter().enumerate().filter(|&(place, _)| place != others);
        let heats = named.map(|(place, space)| (self.heat_by_count(space), place));
        match heats.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))) {
            Some((heat, place)) if heat * REPLACES_IF_BUSIER_BY < written as f64 => {
                self.merge(place, others);
                self.spaces[place].owner = owner;
                place
            }
            _ => others,
        }
    }

    fn add_space(&mut self, owner: AddressSpaceId) -> usize {
        let tree = Tree::with_rule(CbTree::default(), self.config.half_life_epochs);
        self.spaces.push(AddressSpace { owner, tree });
        if let ([first, _], None) = (&self.spaces[..], &self.homes) {
            let mut homes = PageMap::new();
            first.tree.keys().for_each(|&page| {
                homes.insert(page, 0);
            });
            self.homes = Some(homes);
        }
        self.spaces.len() - 1
    }

    /// Moves all pages of one tree to another.
    fn merge(&mut self, from: usize, to: usize) {
        let empty = Tree::with_rule(CbTree::default(), self.config.half_life_epochs);
        let tree = std::mem::replace(&mut self.spaces[from].tree, empty);
        let batch = tree.weights().map(|(&page, weight)| (page, tree.in_units_of_today(weight).round() as u64));
        self.spaces[to].tree.touch_sorted_with(batch, |page, last| {
            *last = *tree.get(page).expect("the batch consists of the pages of this tree");
        });
        if let Some(homes) = &mut self.homes {
            for &page in tree.keys() {
                homes.insert(page, to as u8);
            }
        }
    }

    /// Counts one batch, and takes pages that had another owner out of that one's tree.
    fn count(&mut self, place: usize, batch: impl Iterator<Item = u32>) {
        let weight = self.write_weight();
        let Self { spaces, homes, gaps, arrived, .. } = self;
        let is_indexed = homes.is_some();
        spaces[place].tree.touch_sorted_with(batch.map(|page| (page, weight)), |&page, last| {
            if gaps.write(last) & is_indexed {
                arrived.push(page);
            }
        });
        if let Some(homes) = homes {
            for page in arrived.drain(..) {
                if let Some(before) = homes.insert(page, place as u8) {
                    let last = spaces[before as usize].tree.remove(&page);
                    gaps.forget(last.expect("a page is in the tree that the index says"));
                }
            }
            arrived.shrink_to(BATCH_PAGES);
        }
    }

    /// Learns pages at once where that is better: those of the runs, which are `count`, without the first `surplus`.
    /// Returns how many were learned.
    fn observe_at_once(&mut self, owner: AddressSpaceId, written: &[PageRun], count: u64, surplus: usize) -> usize {
        if count < AT_ONCE_LEAST_PAGES as u64 {
            return 0;
        }
        let place = self.place_for(owner, count);
        // With those that have no place of their own, an owner may come to have one between two batches.
        if self.spaces[place].owner != owner {
            return 0;
        }
        if !self.is_worth_learning_at_once(written, count as usize - surplus) {
            return 0;
        }
        let pages: Vec<u32> = trackable_pages(written).skip(surplus).collect();
        self.learn_at_once(place, &pages)
    }

    /// Whether so many of these pages seem to be new that it is better to learn them at once, by a look for the first pages
    /// of evenly spaced runs. A wrong guess costs time and nothing else.
    fn is_worth_learning_at_once(&self, written: &[PageRun], count: usize) -> bool {
        let known = self.pages();
        if count < known / AT_ONCE_NEW_PART {
            return false;
        }
        let is_new = |page: u32| self.place_of(page).is_none_or(|place| !self.spaces[place].tree.contains_key(&page));
        let sample = (0..AT_ONCE_SAMPLES).map(|sample| written[sample * written.len() / AT_ONCE_SAMPLES].first);
        let new = sample.filter_map(trackable).filter(|&page| is_new(page)).count() * count / AT_ONCE_SAMPLES;
        new * AT_ONCE_NEW_PART >= known + new
    }

    /// Learns pages of an owner that has this place for its own, all at once, with the same outcome as batch for batch.
    /// Returns how many: not the batches from that on which would push out pages of the current epoch.
    fn learn_at_once(&mut self, place: usize, pages: &[u32]) -> usize {
        let now = self.gaps.now();
        // The last writes of the pages before, and those of all pages that may be forgotten.
        let mut before = vec![0_u32; pages.len()];
        let mut lowest: Vec<Height> = Vec::with_capacity(self.pages());
        let mut are_pages_in = vec![false; self.spaces.len()];
        for (space, are_pages_in) in self.spaces.iter_mut().zip(&mut are_pages_in) {
            space.tree.arrange();
            let mut written = Cursor::new(pages);
            for (&page, _, last) in space.tree.iter_unordered() {
                let index = written.find(page);
                if let Some(index) = index {
                    before[index] = last.epoch();
                    *are_pages_in = true;
                }
                if last.epoch() < now {
                    lowest.push(Height::new(last.epoch(), page, index.is_some()));
                }
            }
        }
        lowest.sort_unstable();

        // Below the cut all pages are forgotten that were not written before it came to be above them. It stands as it is
        // when the batch begins.
        let mut batches: Vec<(usize, Height)> = Vec::new();
        let (mut learned, mut known, mut gone, mut cut) = (0, self.pages(), 0, Height::default());
        while learned < pages.len() {
            let is_first = learned == 0 && self.spaces[place].tree.is_empty();
            let end = pages.len().min(learned + most_in_batch(is_first));
            let is_new = |index: &usize| before[*index] == 0 || Height::new(before[*index], pages[*index], true) < cut;
            known += (learned..end).filter(is_new).count();
            let mut next = gone;
            while known > self.config.stack_pages
                && let Some(height) = lowest.get(next)
            {
                known -= usize::from(!height.is_written() || height.page() > pages[end - 1]);
                next += 1;
            }
            if known > self.config.stack_pages {
                break;
            }
            batches.push((end, cut));
            cut = lowest[..next].last().map_or(cut, |height| height.above());
            (gone, learned) = (next, end);
        }
        let (pages, has_gone) = (&pages[..learned], gone > 0);
        drop((before, lowest));

        let Self { spaces, homes, gaps, .. } = self;
        for (index, space) in spaces.iter_mut().enumerate() {
            let is_home = index == place;
            if !has_gone && (is_home || !are_pages_in[index]) {
                continue;
            }
            let (mut written, mut batch) = (Cursor::new(pages), 0);
            space.tree.retain(|&page, last| {
                let height = Height::new(last.epoch(), page, true);
                let is_kept = match written.find(page) {
                    Some(index) => {
                        while batches[batch].0 <= index {
                            batch += 1;
                        }
                        is_home && height >= batches[batch].1
                    }
                    None => height >= cut,
                };
                if !is_kept {
                    gaps.forget(*last);
                    if let Some(homes) = homes {
                        homes.remove(page);
                    }
                }
                is_kept
            });
        }
        self.cold = Vec::new();
        self.count(place, pages.iter().copied());
        learned
    }

    /// Drops the lowest pages until the stack is no higher than allowed.
    fn trim(&mut self) {
        let mut surplus = self.pages().saturating_sub(self.config.stack_pages);
        while surplus > 0 {
            let Some((epoch, page)) = self.cold.pop() else {
                self.find_cold(surplus);
                continue;
            };
            let Some(place) = self.place_of(page) else { continue };
            if let lcbst::Entry::Occupied(entry) = self.spaces[place].tree.entry(page)
                && entry.get().epoch() == epoch
            {
                self.gaps.forget(entry.remove());
                if let Some(homes) = &mut self.homes {
                    homes.remove(page);
                }
                surplus -= 1;
            }
        }
    }

    /// Fills the empty list of the lowest pages.
    fn find_cold(&mut self, surplus: usize) {
        // Pages of the current epoch only if they must go now: more of it may come, with lesser numbers.
        let wanted = surplus.max(self.config.stack_pages / COLD_PART);
        self.cold = self.lowest(wanted, (self.gaps.now(), 0));
        if self.cold.len() < surplus {
            self.cold = self.lowest(surplus, (u32::MAX, 0));
        }
    }

    /// So many of the lowest pages of the stack with the epochs of their last writes, of those below `limit`, the lowest
    /// last.
    fn lowest(&self, wanted: usize, mut limit: (u32, u32)) -> Vec<(u32, u32)> {
        let mut lowest = Vec::new();
        for (&page, _, last) in self.spaces.iter().flat_map(|space| space.tree.iter_unordered()) {
            let at = (last.epoch(), page);
            if at < limit {
                lowest.push(at);
                // The lowest ones gather until there are twice as many as wanted. Then the lower half stays.
                if lowest.len() == 2 * wanted {
                    limit = *lowest.select_nth_unstable(wanted).1;
                    lowest.truncate(wanted);
                }
            }
        }
        if lowest.len() > wanted {
            lowest.select_nth_unstable(wanted);
            lowest.truncate(wanted);
        }
        lowest.sort_unstable_by(|a, b| b.cmp(a));
        lowest.shrink_to_fit();
        lowest
    }

    fn place_of(&self, page: u32) -> Option<usize> {
        match &self.homes {
            Some(homes) => homes.get(page).map(usize::from),
            None => (!self.spaces.is_empty()).then_some(0),
        }
    }

    fn heat_of(&self, last: LastWrite, by_count: impl FnOnce() -> f64) -> f64 {
        if self.config.gaps { self.gaps.heat_or(last, by_count) } else { by_count() }
    }
}

/// How many pages to count next. Into an empty tree pages go as one balanced subtree, so this batch is larger.
fn most_in_batch(is_tree_empty: bool) -> usize {
    if is_tree_empty { 16 * BATCH_PAGES } else { BATCH_PAGES }
}

/// How high a page is on the stack, and whether it is among the pages that are being learned: the epoch of its last write,
/// its number, and one bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Height(u64);

impl Height {
    fn new(epoch: u32, page: u32, is_written: bool) -> Self {
        Self((u64::from(epoch) << 32 | u64::from(page)) << 1 | u64::from(is_written))
    }

    fn page(self) -> u32 {
        (self.0 >> 1) as u32
    }

    fn is_written(self) -> bool {
        self.0 & 1 == 1
    }

    /// Above this page and below the next.
    fn above(self) -> Self {
        Self((self.0 | 1) + 1)
    }
}

const _: () = assert!((LastWrite::MAX_EPOCH as u64) < 1 << 31);

/// Looks for pages, asked in ascending order, among ascending ones.
struct Cursor<'a> {
    pages: &'a [u32],
    next: usize,
}

impl<'a> Cursor<'a> {
    fn new(pages: &'a [u32]) -> Self {
        Self { pages, next: 0 }
    }

    /// Where this page is.
    #[inline]
    fn find(&mut self, page: u32) -> Option<usize> {
        while self.pages.get(self.next).is_some_and(|&at| at < page) {
            self.next += 1;
        }
        (self.pages.get(self.next) == Some(&page)).then_some(self.next)
    }
}

impl Predictor for WorkingSetPredictor {
    fn name(&self) -> &'static str {
        if self.config.half_life_epochs.is_some() { "lcbst" } else { "lcbst-unaged" }
    }

    fn observe(&mut self, owner: AddressSpaceId, written: &[PageRun]) {
        let count: u64 = written.iter().filter_map(|&run| trackable_part(run)).map(|run| run.count).sum();
        // A batch with more pages than the stack holds would push its own first pages out again, and all that is on the
        // stack: those are not put on it in the first place.
        let surplus = usize::try_from(count).unwrap_or(usize::MAX).saturating_sub(self.config.stack_pages);
        let learned = self.observe_at_once(owner, written, count, surplus);
        let mut pages = trackable_pages(written).skip(surplus + learned).peekable();
        while pages.peek().is_some() {
            let place = self.place_for(owner, count);
            let most = most_in_batch(self.spaces[place].tree.is_empty());
            self.count(place, pages.by_ref().take(most));
            self.trim();
        }
    }

    fn end_epoch(&mut self) {
        self.epochs += 1;
        let by = self.gaps.end_epoch();
        if by > 0 {
            self.cold.clear();
            self.spaces.iter_mut().for_each(|space| space.tree.values_mut().for_each(|last| last.rebase(by)));
        }
        for space in &mut self.spaces {
            space.tree.advance(1);
        }
    }

    fn tracked_pages(&self) -> u64 {
        self.pages() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        let known = trackable(page).and_then(|page| {
            let tree = &self.spaces[self.place_of(page)?].tree;
            Some((tree, page, *tree.get(&page)?))
        });
        let Some((tree, page, last)) = known else { return 0.0 };
        self.heat_of(last, || tree.weight_today(&page).unwrap_or(0.0) * self.writes_per_epoch())
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        let factor = self.writes_per_epoch();
        for AddressSpace { tree, .. } in &self.spaces {
            for (&page, weight, last) in tree.iter_unordered() {
                each(ranked(page, self.heat_of(*last, || tree.in_units_of_today(weight) * factor)));
            }
        }
    }

    fn memory_bytes(&self) -> usize {
        // What a tree counts itself is in its space too.
        size_of::<Self>()
            + self.spaces.capacity() * size_of::<AddressSpace>()
            + self.spaces.iter().map(|space| space.tree.memory_bytes() - size_of::<Tree>()).sum::<usize>()
            + self.homes.as_ref().map_or(0, PageMap::memory_bytes)
            + self.gaps.memory_bytes()
            + self.cold.capacity() * size_of::<(u32, u32)>()
            + self.arrived.capacity() * size_of::<u32>()
    }

    /// By the counts, which takes no time; the sum of all heats where gaps do not go into them. Where they do, both
    /// estimate the same.
    fn total_heat(&self) -> f64 {
        self.spaces.iter().map(|space| self.heat_by_count(space)).sum()
    }

    /// Without gaps, by the sums of the trees, without a look at most of the cold pages.
    fn rank(&self, most: usize, ranking: &mut Vec<RankedPage>) {
        let mut pages = Vec::new();
        if self.config.gaps {
            self.visit(&mut |ranked| pages.push(ranked));
        } else {
            let factor = self.writes_per_epoch();
            for AddressSpace { tree, .. } in &self.spaces {
                let top = tree.top_k(most).into_iter();
                pages.extend(top.map(|(&page, weight)| ranked(page, tree.in_units_of_today(weight) * factor)));
            }
        }
        keep_hottest(&mut pages, most);
        ranking.append(&mut pages);
    }

    fn least_stop_pages(&self, pages_per_epoch: f64) -> Option<u64> {
        Some(live_bound(self.gaps.age_groups(), pages_per_epoch) as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::super::testing::{SplitMix, assert_close, assert_consistent};
    use super::*;

    const WHOLE_GUEST: AddressSpaceId = AddressSpaceId::WHOLE_GUEST;

    fn config(stack_pages: usize, half_life: u32, gaps: bool) -> WorkingSetConfig {
        WorkingSetConfig { stack_pages, half_life_epochs: NonZeroU32::new(half_life), gaps }
    }

    fn predictor(stack_pages: usize, half_life: u32, gaps: bool) -> WorkingSetPredictor {
        WorkingSetPredictor::new(config(stack_pages, half_life, gaps))
    }

    fn runs(pages: impl IntoIterator<Item = u64>) -> Vec<PageRun> {
        pages.into_iter().map(|page| PageRun::new(page, 1)).collect()
    }

    #[derive(Debug, Clone)]
    struct Known {
        page: u32,
        owner: u32,
        last: LastWrite,
        count: f64,
    }

    /// A list of pages, aged sums in floating point, and gaps fed page by page.
    struct Model {
        config: WorkingSetConfig,
        known: Vec<Known>,
        gaps: WriteGaps,
        epochs: u32,
    }

    impl Model {
        fn observe(&mut self, owner: u32, pages: &BTreeSet<u64>) {
            let surplus = pages.len().saturating_sub(self.config.stack_pages);
            let mut pages = pages.iter().skip(surplus).map(|&page| page as u32).peekable();
            while pages.peek().is_some() {
                let is_new_tree = self.known.iter().all(|known| known.owner != owner);
                for page in pages.by_ref().take(if is_new_tree { 16 * BATCH_PAGES } else { BATCH_PAGES }) {
                    let at = self.known.iter().position(|known| known.page == page);
                    let before = at.map(|at| self.known.remove(at)).and_then(|known| {
                        if known.owner == owner {
                            return Some(known);
                        }
                        // With a new owner the page starts afresh.
                        self.gaps.forget(known.last);
                        None
                    });
                    let mut known = before.unwrap_or(Known { page, owner, last: LastWrite::default(), count: 0.0 });
                    self.gaps.write(&mut known.last);
                    known.count += 1.0;
                    self.known.push(known);
                }
                self.known.sort_by_key(|known| (known.last.epoch(), known.page));
                for dropped in self.known.drain(..self.known.len().saturating_sub(self.config.stack_pages)) {
                    self.gaps.forget(dropped.last);
                }
            }
        }

        fn end_epoch(&mut self) {
            self.epochs += 1;
            let by = self.gaps.end_epoch();
            let kept = self.config.half_life_epochs.map_or(1.0, |epochs| 0.5_f64.powf(1.0 / f64::from(epochs.get())));
            for known in &mut self.known {
                known.last.rebase(by);
                known.count *= kept;
            }
        }

        fn heats(&self) -> Vec<(u64, f64)> {
            let kept = self.config.half_life_epochs.map(|epochs| 0.5_f64.powf(1.0 / f64::from(epochs.get())));
            let factor = kept.map_or(1.0 / f64::from(self.epochs), |kept| (1.0 - kept) / kept);
            let heat = |known: &Known| {
                let by_count = known.count * factor;
                if self.config.gaps { self.gaps.heat_or(known.last, || by_count) } else { by_count }
            };
            self.known.iter().map(|known| (known.page.into(), heat(known))).collect()
        }
    }

    type Calls = Vec<(u32, BTreeSet<u64>)>;

    fn epochs() -> impl Strategy<Value = Vec<Calls>> {
        let page = prop_oneof![0..20_u64, 0..200_u64];
        let call = (0..3_u32, prop::collection::btree_set(page, 0..60));
        prop::collection::vec(prop::collection::vec(call, 0..4), 1..25)
    }

    proptest! {
        #[test]
        fn behaves_as_a_plain_model_does(
            stack_pages in prop_oneof![1..60_usize, 1..250_usize],
            half_life in 0..6_u32,
            gaps in any::<bool>(),
            start in prop_oneof![Just(1), Just(LastWrite::MAX_EPOCH - 10)],
            epochs in epochs(),
        ) {
            let config = config(stack_pages, half_life, gaps && half_life > 0);
            let mut predictor = WorkingSetPredictor::new(config);
            predictor.gaps = WriteGaps::starting_at(config.half_life_epochs.unwrap_or(NonZeroU32::MIN), start);
            let mut model = Model { config, known: Vec::new(), gaps: predictor.gaps.clone(), epochs: 0 };
            for calls in epochs {
                for (owner, pages) in calls {
                    predictor.observe(AddressSpaceId(owner), &runs(pages.iter().copied()));
                    model.observe(owner, &pages);
                }
                predictor.end_epoch();
                model.end_epoch();
                assert_close(&predictor, model.heats(), 1e-3);

                let mut in_trees: Vec<(u32, u32)> = predictor
                    .trees()
                    .flat_map(|(owner, tree)| tree.keys().map(move |&page| (page, owner.0)))
                    .collect();
                in_trees.sort_unstable();
                let mut expected: Vec<(u32, u32)> = model.known.iter().map(|known| (known.page, known.owner)).collect();
                expected.sort_unstable();
                prop_assert_eq!(in_trees, expected);
                if !config.gaps {
                    let total: f64 = model.heats().iter().map(|(_, heat)| heat).sum();
                    prop_assert!((predictor.total_heat() - total).abs() < 1e-3 * (1.0 + total));
                }
            }
        }

        /// The pages left by the best schedule, from the exact times of all writes, are never fewer than said; and they are
        /// as many where pages are written right when their epochs begin.
        #[test]
        fn no_fewer_pages_can_be_left_than_it_says(
            stack_pages in prop_oneof![1..60_usize, Just(1000)],
            epochs in prop::collection::vec(prop::collection::btree_map(0..300_u64, 0.0..1.0_f64, 0..80), 1..60),
            idle_epochs in prop_oneof![Just(0_usize), 0..400_usize],
            at_the_beginning in any::<bool>(),
            pages_per_epoch in 0.0..40.0_f64,
        ) {
            let mut predictor = predictor(stack_pages, 4, true);
            let mut written: BTreeMap<u64, f64> = BTreeMap::new();
            let idle = BTreeMap::new();
            let half = epochs.len() / 2;
            let all = epochs[..half].iter().chain(std::iter::repeat_n(&idle, idle_epochs)).chain(&epochs[half..]);
            for (epoch, pages) in all.enumerate() {
                predictor.observe(WHOLE_GUEST, &runs(pages.keys().copied()));
                predictor.end_epoch();
                let start = epoch as f64;
                written.extend(pages.iter().map(|(&page, at)| (page, if at_the_beginning { start } else { start + at })));
                let mut ages: Vec<f64> = written.values().map(|at| start + 1.0 - at).collect();
                ages.sort_by(f64::total_cmp);
                let terms = ages.iter().zip(1..).map(|(age, number)| f64::from(number) - pages_per_epoch * age);
                let least = terms.fold(0.0, f64::max);
                let said = predictor.least_stop_pages(pages_per_epoch).expect("it knows");
                prop_assert!(said as f64 <= least + 1e-9, "{said}, {least} possible");
                if at_the_beginning && stack_pages >= 300 && idle_epochs < 50 {
                    prop_assert_eq!(said, least as u64);
                }
            }
            // In the middle of an epoch it is as of that epoch's end.
            let first = PageRun::new(1000, 5);
            predictor.observe(WHOLE_GUEST, &[first]);
            let before_the_end = predictor.least_stop_pages(pages_per_epoch);
            predictor.end_epoch();
            prop_assert_eq!(predictor.least_stop_pages(pages_per_epoch), before_the_end);
        }
    }

    #[test]
    fn a_page_written_each_epoch_has_heat_one_and_an_idle_one_cools() {
        for gaps in [false, true] {
            let mut predictor = predictor(100, 4, gaps);
            predictor.observe(WHOLE_GUEST, &[PageRun::new(9, 1)]);
            for _ in 0..100 {
                predictor.observe(WHOLE_GUEST, &[PageRun::new(7, 1)]);
                predictor.end_epoch();
            }
            let mut ranking = Vec::new();
            predictor.rank(10, &mut ranking);
            assert_eq!(ranking[0].page, PageNumber(7));
            assert!((ranking[0].heat - 1.0).abs() < 0.1, "{ranking:?}");
            assert!(ranking[1].heat < 0.02, "{ranking:?}");
        }
    }

    #[test]
    fn unaged_heat_is_the_share_of_epochs_with_a_write() {
        let mut predictor = WorkingSetPredictor::new(WorkingSetConfig::for_guest(10).as_printed());
        for epoch in 0..8 {
            predictor.observe(WHOLE_GUEST, &[PageRun::new(1, 1)]);
            if epoch % 4 == 0 {
                predictor.observe(WHOLE_GUEST, &[PageRun::new(2, 1)]);
            }
            predictor.end_epoch();
        }
        let heats: Vec<f64> = assert_consistent(&predictor).into_values().collect();
        assert_eq!(heats, [1.0, 0.25]);
    }

    /// A hundred owners write in turn. Those that find no tree free are counted together, and no heat is lost by that.
    #[test]
    fn many_address_spaces_share_a_bounded_number_of_trees() {
        for gaps in [false, true] {
            let mut many = predictor(10_000, 4, gaps);
            let mut one = predictor(10_000, 4, gaps);
            for epoch in 0..20 {
                for owner in 0..100_u32 {
                    let pages = (0..20).map(|page| u64::from(owner) * 20 + page).filter(|page| (page + epoch) % 3 > 0);
                    let pages = runs(pages);
                    many.observe(AddressSpaceId(owner), &pages);
                    one.observe(WHOLE_GUEST, &pages);
                }
                many.end_epoch();
                one.end_epoch();
                assert_close(&many, assert_consistent(&one), 1e-4);
            }
            let owners: Vec<u32> = many.trees().map(|(owner, _)| owner.0).collect();
            assert_eq!(owners.len(), MAX_TREES);
            assert!(owners.contains(&OTHER_ADDRESS_SPACES.0), "{owners:?}");
            assert_eq!(many.tracked_pages(), 2000);
        }
    }

    /// Address spaces that fell silent make room for busier ones. Their pages stay known, as hot as they were.
    #[test]
    fn a_busy_address_space_takes_the_tree_of_a_silent_one() {
        let mut predictor = predictor(100_000, 4, false);
        for epoch in 0..40_u32 {
            let owners = if epoch < 5 { 0..63_u32 } else { 0..3 };
            for owner in owners {
                predictor.observe(AddressSpaceId(owner), &[PageRun::new(u64::from(owner) * 1000, 30)]);
            }
            predictor.end_epoch();
        }
        let before = assert_consistent(&predictor);
        for owner in 1000..1010_u32 {
            predictor.observe(AddressSpaceId(owner), &[PageRun::new(u64::from(owner) * 1000, 50)]);
        }
        let after = assert_consistent(&predictor);
        assert_eq!(after.len(), before.len() + 10 * 50);
        for (page, heat) in &before {
            assert!(
                (after[page] - heat).abs() < 0.5 / AGED_WRITE_WEIGHT as f64,
                "page {page}: {heat}, {}",
                after[page]
            );
        }
        let owners: BTreeSet<u32> = predictor.trees().map(|(owner, _)| owner.0).collect();
        assert_eq!(owners.len(), MAX_TREES);
        assert!((0..3).chain(1000..1010).all(|owner| owners.contains(&owner)), "{owners:?}");
        assert_eq!(predictor.heat(PageNumber(10_000)), after[&10_000], "the index knows where pages went");
        // What was taken over is counted on where it is now.
        predictor.observe(OTHER_ADDRESS_SPACES, &[PageRun::new(5000, 1)]);
        assert!(predictor.heat(PageNumber(5000)) > after[&5000]);
    }

    #[test]
    fn memory_is_bounded_by_the_hot_pages() {
        let mut random = SplitMix(7);
        let mut predictor = predictor(30_000, 4, true);
        for epoch in 0..30 {
            for owner in 0..3 {
                let pages: BTreeSet<u64> = (0..2000).map(|_| random.below(1 << 28)).collect();
                predictor.observe(AddressSpaceId(owner), &runs(pages));
            }
            predictor.end_epoch();
            let tables = 80_000;
            let pages = predictor.tracked_pages() as usize;
            assert!(predictor.memory_bytes() <= tables + 64 * pages, "epoch {epoch}: {}", predictor.memory_bytes());
        }
        assert_eq!(predictor.tracked_pages(), 30_000);
    }

    #[test]
    fn pages_beyond_the_limit_are_cold() {
        let mut predictor = predictor(10, 4, true);
        let last = super::super::UNTRACKED_FROM - 1;
        predictor.observe(WHOLE_GUEST, &[PageRun::new(last - 1, 5), PageRun::new(last + 100, 1000)]);
        predictor.end_epoch();
        assert!(assert_consistent(&predictor).into_keys().eq([last - 1, last]));
    }
}
