//! What the order of the last writes tells: the recency stack, and the fewest pages that a pause now could leave.
//!
//! The stack is the "LRU cache" of the paper, with its two slips mended: a hit or a new page goes to the top, and a full
//! stack drops its bottom. Memory follows the stack's bound and not the guest's size.

use super::page_list::PageList;
use super::trackable;
use crate::pages::{AddressSpaceId, PageNumber};

/// A page on the stack and the address space it was written by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackEntry {
    /// The page.
    pub page: PageNumber,
    /// Who wrote it last.
    pub owner: AddressSpaceId,
}

/// The most recently written pages, at most `capacity` of them.
#[derive(Debug, Clone)]
pub struct RecencyStack {
    capacity: usize,
    pages: PageList<AddressSpaceId>,
}

impl RecencyStack {
    /// The largest capacity: slots are numbered with 32 bits.
    pub const MAX_CAPACITY: usize = u32::MAX as usize - 1;

    /// An empty stack for at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0 or above [`Self::MAX_CAPACITY`].
    pub fn new(capacity: usize) -> Self {
        assert!((1..=Self::MAX_CAPACITY).contains(&capacity), "a recency stack of {capacity} pages");
        Self { capacity, pages: PageList::new() }
    }

    /// How many pages are on the stack.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether the stack is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `page` is on the stack.
    pub fn contains(&self, page: PageNumber) -> bool {
        self.owner(page).is_some()
    }

    /// Who wrote `page` last, if it is on the stack.
    pub fn owner(&self, page: PageNumber) -> Option<AddressSpaceId> {
        self.pages.get(trackable(page)?).copied()
    }

    /// Puts `page` on top. What fell out on that account: the bottom page of a full stack, or the page itself under
    /// its former owner if that was another one. Pages from [`UNTRACKED_FROM`](super::UNTRACKED_FROM) on are left alone.
    /// O(1).
    pub fn touch(&mut self, page: PageNumber, owner: AddressSpaceId) -> Option<StackEntry> {
        let number = trackable(page)?;
        if let Some(current) = self.pages.touch(number) {
            let before = std::mem::replace(current, owner);
            return (before != owner).then_some(StackEntry { page, owner: before });
        }
        let dropped = if self.len() == self.capacity { self.pages.pop_bottom() } else { None };
        self.pages.push(number, owner);
        dropped.map(|(page, owner)| StackEntry { page: PageNumber(page.into()), owner })
    }

    /// The pages from the top down: the one written last comes first.
    pub fn iter(&self) -> impl Iterator<Item = StackEntry> {
        self.pages.iter().map(|(page, &owner)| StackEntry { page: PageNumber(page.into()), owner })
    }
}

/// Pages that were written last in the same epoch, or in neighbouring ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgeGroup {
    /// How many pages.
    pub pages: u64,
    /// The most epochs that can have passed since the last write of any of them.
    pub oldest_epochs: u64,
}

/// The fewest pages that any schedule can leave for the stop phase if the guest is paused now, in pages; the groups
/// come in the order of age, the newest first, and `pages_per_epoch` is what the link carries.
///
/// With age(i) the age of the i-th most recently written page, that number is `max(0, max over i of i - pages_per_epoch
/// · age(i))`: page i and the i − 1 that were written after it all had to be sent after that write. Within a group only
/// the last page counts, since its number is the greatest and no age is known better than the group's. An age that is
/// stated too high, or a page that is missing at the end, only makes the result less. So it is a lower bound: where it
/// does not fit the downtime limit, no plan would have had the guest ready by now.
///
/// Nothing better exists and nothing better is possible: what is sent of a page before its last write is sent in vain, so
/// each page is a job of one unit that is released at its last write, with the pause as the common end; a link that is
/// never idle while such a job waits finishes as many of them as any.
pub fn live_bound(groups: impl IntoIterator<Item = AgeGroup>, pages_per_epoch: f64) -> f64 {
    let mut newer = 0_u64;
    let mut bound = 0.0_f64;
    for AgeGroup { pages, oldest_epochs } in groups {
        newer += pages;
        bound = bound.max(newer as f64 - pages_per_epoch * oldest_epochs as f64);
    }
    bound
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain list: newest first, the last one dropped.
        #[test]
        fn behaves_as_a_bounded_list(
            capacity in 1..40_usize,
            touches in prop::collection::vec((0..60_u64, 0..3_u32), 0..400),
        ) {
            let mut stack = RecencyStack::new(capacity);
            let mut model: Vec<StackEntry> = Vec::new();
            for (page, owner) in touches {
                let entry = StackEntry { page: PageNumber(page), owner: AddressSpaceId(owner) };
                let expected = match model.iter().position(|other| other.page == entry.page) {
                    Some(at) => Some(model.remove(at)).filter(|before| before.owner != entry.owner),
                    None if model.len() == capacity => model.pop(),
                    None => None,
                };
                model.insert(0, entry);
                prop_assert_eq!(stack.touch(entry.page, entry.owner), expected);
                prop_assert_eq!(stack.iter().collect::<Vec<_>>(), model.clone());
                prop_assert_eq!(stack.len(), model.len());
                prop_assert!(model.iter().all(|entry| stack.contains(entry.page)));
                prop_assert!(model.iter().all(|entry| stack.owner(entry.page) == Some(entry.owner)));
            }
        }

        /// Against the best of all schedules, found by trying: an epoch's link time goes to the pages whose last write
        /// is past, and no schedule can send a page before that.
        #[test]
        fn the_bound_is_what_the_best_schedule_leaves(
            last_writes in prop::collection::vec(0..12_u64, 0..60),
            pages_per_epoch in 0..9_u32,
        ) {
            // Pages written at the beginning of epoch `e` of 12; the pause is at the end of the last one.
            let mut left = 0;
            let mut unsent = 0_u64;
            for epoch in 0..12 {
                unsent += last_writes.iter().filter(|&&written| written == epoch).count() as u64;
                unsent = unsent.saturating_sub(u64::from(pages_per_epoch));
                left = unsent;
            }
            let groups = (0..12).rev().map(|epoch| AgeGroup {
                pages: last_writes.iter().filter(|&&written| written == epoch).count() as u64,
                oldest_epochs: 12 - epoch,
            });
            prop_assert_eq!(live_bound(groups, f64::from(pages_per_epoch)), left as f64);
        }
    }

    #[test]
    fn pages_beyond_the_limit_are_left_alone() {
        let mut stack = RecencyStack::new(4);
        let far = PageNumber(super::super::UNTRACKED_FROM);
        assert_eq!(stack.touch(far, AddressSpaceId::WHOLE_GUEST), None);
        assert!(stack.is_empty() && !stack.contains(far));
    }

    #[test]
    fn nothing_written_leaves_nothing() {
        assert_eq!(live_bound([], 10.0), 0.0);
        assert_eq!(live_bound([AgeGroup { pages: 5, oldest_epochs: 1 }], 10.0), 0.0);
    }
}
