//! Which slot owns each page, and whether it was accessed: one byte a page, in chunks that exist only where something
//! is mapped.
//!
//! One byte a page is 0.025 % of guest RAM at most, on the host and beside the tracker's own tables. A list of runs would
//! be smaller for big regular mappings and much larger for the memory of a guest that has run for a while, whose
//! neighbouring pages belong to different processes.

use vmferry_core::pages::{PageNumber, PageRun};

/// Pages of a chunk: 16 MiB of guest RAM.
const CHUNK_PAGES: u64 = 4096;
const ACCESSED: u8 = 0x80;
const SLOT: u8 = 0x7f;

/// No mapping is known.
pub(super) const UNMAPPED: u8 = 0;
/// The kernel's alone.
pub(super) const KERNEL: u8 = 1;
/// User mappings of more than one space.
pub(super) const SHARED: u8 = 2;
/// The slots from here on stand for one space each.
pub(super) const FIRST_SPACE: u8 = 3;
/// One past the last slot that a byte can hold beside the accessed bit.
pub(super) const SLOTS: usize = 128;

type Chunk = Box<[u8; CHUNK_PAGES as usize]>;

/// Owners of all pages of a guest.
#[derive(Debug)]
pub(super) struct OwnerMap {
    pages: u64,
    chunks: Vec<Option<Chunk>>,
    /// Pages of each slot but [`UNMAPPED`].
    counts: [u64; SLOTS],
}

impl OwnerMap {
    /// Nothing is mapped.
    pub(super) fn new(pages: u64) -> Self {
        let chunks = usize::try_from(pages.div_ceil(CHUNK_PAGES)).expect("a byte for each guest page fits in memory");
        Self { pages, chunks: vec![None; chunks], counts: [0; SLOTS] }
    }

    /// Forgets everything, and gives the memory back.
    pub(super) fn clear(&mut self) {
        self.chunks.fill(None);
        self.counts = [0; SLOTS];
    }

    /// How many pages a slot has.
    pub(super) fn count(&self, slot: u8) -> u64 {
        self.counts[usize::from(slot)]
    }

    /// The slot of a page; [`UNMAPPED`] beyond the guest's pages.
    pub(super) fn slot(&self, page: PageNumber) -> u8 {
        let chunk = usize::try_from(page.0 / CHUNK_PAGES).ok().and_then(|index| self.chunks.get(index)?.as_ref());
        chunk.map_or(UNMAPPED, |chunk| chunk[(page.0 % CHUNK_PAGES) as usize] & SLOT)
    }

    /// A user mapping of the space in `slot`: the space owns what nobody or the kernel owned, and shares the rest.
    pub(super) fn mark_user(&mut self, run: PageRun, slot: u8, accessed: bool) {
        debug_assert!((FIRST_SPACE..=SLOT).contains(&slot), "slot {slot}");
        self.mark(run, |old| {
            let owner = match old & SLOT {
                UNMAPPED | KERNEL => slot,
                owner if owner == slot => slot,
                _ => SHARED,
            };
            owner | (old & ACCESSED) | if accessed { ACCESSED } else { 0 }
        });
    }

    /// The kernel's, unless a space maps it for its programs.
    pub(super) fn mark_kernel(&mut self, run: PageRun) {
        self.mark(run, |old| if old & SLOT == UNMAPPED { old | KERNEL } else { old });
    }

    fn mark(&mut self, run: PageRun, change: impl Fn(u8) -> u8) {
        assert!(run.end() <= self.pages, "{run:?} reaches beyond the guest's {} pages", self.pages);
        let mut rest = Some(run);
        while let Some(run) = rest {
            let at = run.first.0 % CHUNK_PAGES;
            let (piece, after) = run.split_front(CHUNK_PAGES - at);
            rest = after;
            let chunk = &mut self.chunks[(run.first.0 / CHUNK_PAGES) as usize];
            let chunk = chunk.get_or_insert_with(|| Box::new([UNMAPPED; CHUNK_PAGES as usize]));
            for byte in &mut chunk[at as usize..(at + piece.count) as usize] {
                let new = change(*byte);
                let (was, is) = (usize::from(*byte & SLOT), usize::from(new & SLOT));
                if was != is {
                    // Unmapped pages are not counted: they are never marked as such.
                    self.counts[was] = self.counts[was].saturating_sub(1);
                    self.counts[is] += 1;
                }
                *byte = new;
            }
        }
    }

    /// Cuts `run` where the slot changes. What lies beyond the guest's pages is unmapped.
    pub(super) fn pieces(&self, run: PageRun) -> impl Iterator<Item = (u8, PageRun)> {
        self.cut(run, SLOT)
    }

    /// All pages that were accessed, as runs.
    pub(super) fn accessed(&self) -> Vec<PageRun> {
        let all = PageRun::new(0, self.pages);
        self.cut(all, ACCESSED).filter(|&(bit, _)| bit != 0).map(|(_, run)| run).collect()
    }

    /// Cuts `run` where the bits in `mask` change.
    fn cut(&self, run: PageRun, mask: u8) -> impl Iterator<Item = (u8, PageRun)> {
        let mut first = run.first.0;
        std::iter::from_fn(move || {
            if first >= run.end() {
                return None;
            }
            let (value, mut end) = self.equal_in_chunk(first, run.end(), mask);
            while end < run.end() {
                let (next, next_end) = self.equal_in_chunk(end, run.end(), mask);
                if next != value {
                    break;
                }
                end = next_end;
            }
            let piece = PageRun::new(first, end - first);
            first = end;
            Some((value, piece))
        })
    }

    /// The bits at page `first`, and where they change, at most up to the end of its chunk or `limit`.
    fn equal_in_chunk(&self, first: u64, limit: u64, mask: u8) -> (u8, u64) {
        let chunk_end = (first / CHUNK_PAGES + 1) * CHUNK_PAGES;
        let end = chunk_end.min(limit);
        let Some(Some(chunk)) = self.chunks.get((first / CHUNK_PAGES) as usize) else { return (0, end) };
        let at = (first % CHUNK_PAGES) as usize;
        let bytes = &chunk[at..at + (end - first) as usize];
        let value = bytes[0] & mask;
        let equal = bytes.iter().position(|byte| byte & mask != value).unwrap_or(bytes.len());
        (value, first + equal as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 3 * CHUNK_PAGES + 100;

    #[derive(Debug, Clone)]
    enum Mark {
        User(u8, bool),
        Kernel,
    }

    fn mark() -> impl Strategy<Value = (PageRun, Mark)> {
        let run = (0..PAGES, 1..6000_u64).prop_map(|(first, count)| PageRun::new(first, count.min(PAGES - first)));
        let user = (FIRST_SPACE..FIRST_SPACE + 3, any::<bool>());
        (run, prop_oneof![3 => user.prop_map(|(slot, accessed)| Mark::User(slot, accessed)), 1 => Just(Mark::Kernel)])
    }

    proptest! {
        /// Against the sets of who maps each page.
        #[test]
        fn owners_do_not_depend_on_the_order(marks in prop::collection::vec(mark(), 0..12), query in mark()) {
            let mut map = OwnerMap::new(PAGES);
            let mut users: BTreeMap<u64, BTreeSet<u8>> = BTreeMap::new();
            let (mut kernel, mut accessed) = (BTreeSet::new(), BTreeSet::new());
            for (run, mark) in &marks {
                match *mark {
                    Mark::User(slot, used) => {
                        map.mark_user(*run, slot, used);
                        for page in run.pages() {
                            users.entry(page.0).or_default().insert(slot);
                            if used {
                                accessed.insert(page.0);
                            }
                        }
                    }
                    Mark::Kernel => {
                        map.mark_kernel(*run);
                        kernel.extend(run.pages().map(|page| page.0));
                    }
                }
            }
            let expected = |page: u64| match users.get(&page) {
                Some(slots) if slots.len() > 1 => SHARED,
                Some(slots) => *slots.first().unwrap(),
                None if kernel.contains(&page) => KERNEL,
                None => UNMAPPED,
            };
            for page in 0..PAGES + 10 {
                prop_assert_eq!(map.slot(PageNumber(page)), expected(page), "page {}", page);
            }
            for slot in [KERNEL, SHARED, FIRST_SPACE, FIRST_SPACE + 1, FIRST_SPACE + 2] {
                let pages = (0..PAGES).filter(|&page| expected(page) == slot).count();
                prop_assert_eq!(map.count(slot), pages as u64, "slot {}", slot);
            }
            let runs = map.accessed();
            prop_assert!(runs.iter().flat_map(|run| run.pages()).map(|page| page.0).eq(accessed.iter().copied()));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first.0), "runs are whole");
            let pieces: Vec<_> = map.pieces(query.0).collect();
            prop_assert!(pieces.windows(2).all(|pair| pair[0].0 != pair[1].0), "pieces are whole");
            let mut next = query.0.first.0;
            for (slot, piece) in pieces {
                prop_assert_eq!(piece.first.0, next);
                prop_assert!(piece.pages().all(|page| expected(page.0) == slot));
                next = piece.end();
            }
            prop_assert_eq!(next, query.0.end());
            map.clear();
            prop_assert!(map.pieces(PageRun::new(0, PAGES)).eq([(UNMAPPED, PageRun::new(0, PAGES))]));
            prop_assert_eq!(map.count(FIRST_SPACE), 0);
        }
    }
}
