//! What the target has of the pages that are written again and again: the base of their next delta.
//!
//! Invariant: what is in here for a page is exactly what the target has of it once it has read everything sent so far, and
//! what is about to be sent. So content comes in only with its page's sending, in whatever form; a page that goes without its
//! content being kept leaves; and if a sending fails, so does the migration. Bounded; the pages not used for longest leave
//! first, roughly (a clock with one bit a page).

use std::collections::HashMap;

use vmferry_core::pages::{PAGE_BYTES, PageNumber};

use crate::buffer::large_vector;

const PAGE: usize = PAGE_BYTES as usize;
/// This part of the cache is for pages of any kind.
const ANY_PARTS: usize = 4;

/// The last content sent of some pages.
#[derive(Debug)]
pub(crate) struct DeltaCache {
    slots: HashMap<PageNumber, usize>,
    content: Vec<u8>,
    /// Whose content each slot holds; `None` for a free one.
    owners: Vec<Option<PageNumber>>,
    used: Vec<bool>,
    free: Vec<usize>,
    hand: usize,
    slots_max: usize,
}

impl DeltaCache {
    /// An empty cache of at most so many bytes of pages.
    pub(crate) fn new(bytes: u64) -> Self {
        Self {
            slots: HashMap::new(),
            content: large_vector((bytes / PAGE_BYTES * PAGE_BYTES) as usize),
            owners: Vec::new(),
            used: Vec::new(),
            free: Vec::new(),
            hand: 0,
            slots_max: (bytes / PAGE_BYTES) as usize,
        }
    }

    /// Whether there is room for any page at all.
    pub(crate) fn is_off(&self) -> bool {
        self.slots_max == 0
    }

    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether so little is in it that pages may be kept of which it is not known whether they are written again, if there is
    /// time for it. The first ones are sent before any was seen written.
    pub(crate) fn takes_any(&self) -> bool {
        self.slots.len() < self.slots_max / ANY_PARTS
    }

    /// Whether it is known what the target has of the page.
    pub(crate) fn contains(&self, page: PageNumber) -> bool {
        self.slots.contains_key(&page)
    }

    /// What the target has of the page. It can be brought up to date, if the page is about to be sent.
    pub(crate) fn get(&mut self, page: PageNumber) -> Option<&mut [u8]> {
        let &slot = self.slots.get(&page)?;
        self.used[slot] = true;
        Some(&mut self.content[slot * PAGE..][..PAGE])
    }

    /// The page was sent with this content.
    pub(crate) fn put(&mut self, page: PageNumber, content: &[u8]) {
        if self.is_off() {
            return;
        }
        let slot = match self.slots.get(&page) {
            Some(&slot) => {
                self.used[slot] = true;
                slot
            }
            // A page that never comes again leaves before one that did.
            None => self.take_slot(page),
        };
        match self.content.get_mut(slot * PAGE..(slot + 1) * PAGE) {
            Some(kept) => kept.copy_from_slice(content),
            None => self.content.extend_from_slice(content),
        }
    }

    /// The page was sent, and its content is not kept.
    pub(crate) fn remove(&mut self, page: PageNumber) {
        if let Some(slot) = self.slots.remove(&page) {
            self.owners[slot] = None;
            self.free.push(slot);
        }
    }

    /// A slot for the page: a free one, or a new one behind all content, or one that was another page's.
    fn take_slot(&mut self, page: PageNumber) -> usize {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.owners.len() < self.slots_max => {
                self.owners.push(None);
                self.used.push(false);
                self.owners.len() - 1
            }
            None => self.evict(),
        };
        self.owners[slot] = Some(page);
        self.used[slot] = false;
        self.slots.insert(page, slot);
        slot
    }

    /// Frees the next slot that was not used since the hand came by last. Ends, since each step clears a bit.
    fn evict(&mut self) -> usize {
        loop {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            if !std::mem::take(&mut self.used[slot]) {
                if let Some(owner) = self.owners[slot].take() {
                    self.slots.remove(&owner);
                }
                return slot;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        /// Sent, and kept.
        Keep(u64, u8),
        /// Sent, and not kept.
        Forget(u64, u8),
        Look(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let page = 0..40_u64;
        prop_oneof![
            (page.clone(), any::<u8>()).prop_map(|(page, byte)| Step::Keep(page, byte)),
            (page.clone(), any::<u8>()).prop_map(|(page, byte)| Step::Forget(page, byte)),
            page.prop_map(Step::Look),
        ]
    }

    proptest! {
        /// Against a model of the target's memory: what is in the cache is what the target has, whatever was evicted.
        #[test]
        fn what_is_in_it_is_what_the_target_has(pages in 0..12_u64, steps in prop::collection::vec(step(), 0..400)) {
            let mut cache = DeltaCache::new(pages * PAGE_BYTES + 17);
            let mut target = HashMap::new();
            for step in steps {
                match step {
                    Step::Keep(page, byte) => {
                        target.insert(page, byte);
                        cache.put(PageNumber(page), &[byte; PAGE]);
                        let kept = cache.get(PageNumber(page)).map(|content| content[PAGE - 1]);
                        prop_assert_eq!(kept, (pages > 0).then_some(byte));
                    }
                    Step::Forget(page, byte) => {
                        target.insert(page, byte);
                        cache.remove(PageNumber(page));
                        prop_assert_eq!(cache.get(PageNumber(page)), None);
                    }
                    Step::Look(page) => {
                        if let Some(content) = cache.get(PageNumber(page)) {
                            prop_assert!(content.iter().all(|byte| Some(byte) == target.get(&page)), "page {}", page);
                        }
                    }
                }
                prop_assert!(cache.slots.len() as u64 <= pages && cache.content.len() as u64 <= pages * PAGE_BYTES);
                prop_assert_eq!(cache.owners.len() - cache.free.len(), cache.slots.len());
                prop_assert_eq!(cache.is_empty(), cache.slots.is_empty());
            }
        }
    }

    #[test]
    fn pages_in_use_stay_while_others_come_and_go() {
        let mut cache = DeltaCache::new(4 * PAGE_BYTES);
        cache.put(PageNumber(0), &[9; PAGE]);
        for page in 1..100 {
            assert!(cache.get(PageNumber(0)).is_some(), "before page {page}");
            cache.put(PageNumber(page), &[1; PAGE]);
        }
    }
}
