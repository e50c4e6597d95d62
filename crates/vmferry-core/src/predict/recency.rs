//! The recency stack: the pages written last, the newest on top, bounded in size.
//!
//! It is the "LRU cache" of the paper, with its two slips mended: a hit or a new page goes to the top, and a full stack
//! drops its bottom. A doubly linked list in an arena, with a hash index from page to slot; memory follows the stack's
//! bound and not the guest's size.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::pages::{AddressSpaceId, PageNumber};

const NIL: u32 = u32::MAX;

/// A page on the stack and the address space it was written by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackEntry {
    /// The page.
    pub page: PageNumber,
    /// Who wrote it last.
    pub owner: AddressSpaceId,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    entry: StackEntry,
    above: u32,
    below: u32,
}

/// Page numbers are small dense integers: one multiplication spreads them well enough, and no peer chooses them.
#[derive(Debug, Default, Clone, Copy)]
struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // 2^64 divided by the golden ratio (Knuth's multiplicative hashing); the rotation feeds both halves.
        self.0 = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(20);
    }
}

/// The most recently written pages, at most `capacity` of them.
#[derive(Debug, Clone)]
pub struct RecencyStack {
    capacity: usize,
    slots: Vec<Slot>,
    index: HashMap<u64, u32, BuildHasherDefault<PageHasher>>,
    top: u32,
    bottom: u32,
}

impl RecencyStack {
    /// The largest capacity: slots are numbered with 32 bits.
    pub const MAX_CAPACITY: usize = (NIL - 1) as usize;

    /// An empty stack for at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0 or above [`Self::MAX_CAPACITY`].
    pub fn new(capacity: usize) -> Self {
        assert!((1..=Self::MAX_CAPACITY).contains(&capacity), "a recency stack of {capacity} pages");
        Self { capacity, slots: Vec::new(), index: HashMap::default(), top: NIL, bottom: NIL }
    }

    /// How many pages are on the stack.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether the stack is empty.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether `page` is on the stack.
    pub fn contains(&self, page: PageNumber) -> bool {
        self.index.contains_key(&page.0)
    }

    /// Who wrote `page` last, if it is on the stack.
    pub fn owner(&self, page: PageNumber) -> Option<AddressSpaceId> {
        self.index.get(&page.0).map(|&slot| self.slots[slot as usize].entry.owner)
    }

    /// Puts `page` on top. What fell out on that account: the bottom page of a full stack, or the page itself under
    /// its former owner if that was another one. O(1).
    pub fn touch(&mut self, page: PageNumber, owner: AddressSpaceId) -> Option<StackEntry> {
        let entry = StackEntry { page, owner };
        if let Some(&slot) = self.index.get(&page.0) {
            self.unlink(slot);
            self.link_on_top(slot);
            let before = std::mem::replace(&mut self.slots[slot as usize].entry, entry);
            return (before.owner != owner).then_some(before);
        }
        if self.slots.len() < self.capacity {
            let slot = self.slots.len() as u32;
            self.slots.push(Slot { entry, above: NIL, below: NIL });
            self.index.insert(page.0, slot);
            self.link_on_top(slot);
            return None;
        }
        let slot = self.bottom;
        self.unlink(slot);
        let dropped = std::mem::replace(&mut self.slots[slot as usize].entry, entry);
        self.index.remove(&dropped.page.0);
        self.index.insert(page.0, slot);
        self.link_on_top(slot);
        Some(dropped)
    }

    /// The pages from the top down: the one written last comes first.
    pub fn iter(&self) -> impl Iterator<Item = StackEntry> {
        let mut at = self.top;
        std::iter::from_fn(move || {
            let slot = self.slots.get(at as usize)?;
            at = slot.below;
            Some(slot.entry)
        })
    }

    fn link_on_top(&mut self, slot: u32) {
        let below = self.top;
        self.slots[slot as usize].above = NIL;
        self.slots[slot as usize].below = below;
        match self.slots.get_mut(below as usize) {
            Some(old_top) => old_top.above = slot,
            None => self.bottom = slot,
        }
        self.top = slot;
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { above, below, .. } = self.slots[slot as usize];
        match self.slots.get_mut(above as usize) {
            Some(neighbour) => neighbour.below = below,
            None => self.top = below,
        }
        match self.slots.get_mut(below as usize) {
            Some(neighbour) => neighbour.above = above,
            None => self.bottom = above,
        }
    }
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
    }
}
