//! Guest pages: their numbers, runs of them, sets of them, and how RAM blocks map to them.
//!
//! A guest's RAM is a list of blocks (a NUMA guest has one per node). All pages of all blocks share one dense
//! numbering: the pages of the first block come first, then those of the second, and so on. Everything above this
//! module speaks in these numbers; only the host's memory and tracking code knows addresses.

mod cycle;
mod layout;
mod owners;
mod set;

pub use cycle::ScanCycle;
pub use layout::{LayoutError, MAX_BLOCK_ID_BYTES, MAX_BLOCKS, MAX_RAM_PAGES, PAGE_BYTES, RamBlock, RamLayout};
pub use owners::{Owners, WholeGuest, group_by_owner, split_by_owner};
pub use set::PageSet;

/// The number of a guest page, counted over all RAM blocks of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

/// Neighbouring pages `first .. first + count`; never empty where a function returns one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// The first page of the run.
    pub first: PageNumber,
    /// How many pages the run holds.
    pub count: u64,
}

impl PageRun {
    /// The run of `count` pages from page number `first`.
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first: PageNumber(first), count }
    }

    /// One past the last page number.
    pub const fn end(self) -> u64 {
        self.first.0 + self.count
    }

    /// The page numbers of the run, ascending.
    pub fn pages(self) -> impl Iterator<Item = PageNumber> {
        (self.first.0..self.end()).map(PageNumber)
    }

    /// Splits off at most `count` pages from the front: those pages, and the rest if any are left.
    pub fn split_front(self, count: u64) -> (Self, Option<Self>) {
        if count >= self.count {
            return (self, None);
        }
        (Self::new(self.first.0, count), Some(Self::new(self.first.0 + count, self.count - count)))
    }

    /// Cuts the run where the kind of its pages changes. `kinds` says that of each page, in order; of more kinds than the run
    /// has pages, the others are not asked for.
    pub fn stretches<K: PartialEq>(self, kinds: impl Iterator<Item = K>) -> impl Iterator<Item = (Self, K)> {
        let mut kinds = kinds.take(self.count as usize).peekable();
        let mut first = self.first.0;
        std::iter::from_fn(move || {
            let kind = kinds.next()?;
            let mut count = 1;
            while kinds.next_if_eq(&kind).is_some() {
                count += 1;
            }
            first += count;
            Some((Self::new(first - count, count), kind))
        })
    }

    /// What is left of the run without these, which are ascending and apart.
    pub fn without(self, holes: &[Self]) -> Vec<Self> {
        let within = &holes[holes.partition_point(|hole| hole.end() <= self.first.0)..];
        let ends = within.iter().take_while(|hole| hole.first.0 < self.end()).map(|hole| (hole.first.0, hole.end()));
        let mut from = self.first.0;
        let mut left = Vec::new();
        for (first, end) in ends.chain([(self.end(), self.end())]) {
            if from < first {
                left.push(Self::new(from, first - from));
            }
            from = end;
        }
        left
    }
}

/// The number of an address space of the guest. Its pages have a tree of their own.
///
/// Where the owner of a page is not known, all pages belong to [`AddressSpaceId::WHOLE_GUEST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSpaceId(pub u32);

impl AddressSpaceId {
    /// The one address space of a guest whose processes are not told apart.
    pub const WHOLE_GUEST: Self = Self(0);
}

/// The number of an observation epoch: the time between two scans for written pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_of_one_kind_each_and_cover_the_run() {
        let stretches = |count| PageRun::new(10, count).stretches("aabccc".chars()).collect::<Vec<_>>();
        let expected = [(PageRun::new(10, 2), 'a'), (PageRun::new(12, 1), 'b'), (PageRun::new(13, 3), 'c')];
        assert_eq!(stretches(6), expected);
        assert_eq!(stretches(2), expected[..1]);
        assert_eq!(stretches(0), []);
    }

    #[test]
    fn a_run_without_holes_in_it() {
        let run = PageRun::new(10, 10);
        let holes =
            |holes: &[(u64, u64)]| holes.iter().map(|&(first, count)| PageRun::new(first, count)).collect::<Vec<_>>();
        assert_eq!(run.without(&[]), [run]);
        assert_eq!(run.without(&holes(&[(10, 10)])), []);
        assert_eq!(run.without(&holes(&[(10, 2), (15, 1), (19, 1)])), holes(&[(12, 3), (16, 3)]));
        assert_eq!(run.without(&holes(&[(12, 3)])), holes(&[(10, 2), (15, 5)]));
        assert_eq!(run.without(&holes(&[(0, 5), (8, 4), (14, 1), (18, 7), (30, 1)])), holes(&[(12, 2), (15, 3)]));
        assert_eq!(run.without(&holes(&[(5, 20)])), []);
    }
}
