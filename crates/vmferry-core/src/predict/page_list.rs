//! Pages in the order of their last use, each with a value: a doubly linked list in an arena with an index.

use super::page_map::PageMap;

const NIL: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Slot<T> {
    page: u32,
    above: u32,
    below: u32,
    value: T,
}

/// A list of pages from the top (used last) to the bottom. Every operation takes constant time.
#[derive(Debug, Clone)]
pub(super) struct PageList<T> {
    slots: Vec<Slot<T>>,
    index: PageMap<u32>,
    top: u32,
    bottom: u32,
}

impl<T> PageList<T> {
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), index: PageMap::new(), top: NIL, bottom: NIL }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot<T>>() + self.index.memory_bytes()
    }

    pub(super) fn get(&self, page: u32) -> Option<&T> {
        self.index.get(page).map(|slot| &self.slots[slot as usize].value)
    }

    /// Moves a page to the top if it is there; its value, to change.
    pub(super) fn touch(&mut self, page: u32) -> Option<&mut T> {
        let slot = self.index.get(page)?;
        if self.top != slot {
            self.unlink(slot);
            self.link_on_top(slot);
        }
        Some(&mut self.slots[slot as usize].value)
    }

    /// Puts a page that is not there on top.
    pub(super) fn push(&mut self, page: u32, value: T) {
        let slot = self.slots.len() as u32;
        let before = self.index.insert(page, slot);
        assert_eq!(before, None, "page {page} is on the list already");
        self.slots.push(Slot { page, above: NIL, below: NIL, value });
        self.link_on_top(slot);
    }

    /// The page at the bottom.
    pub(super) fn bottom(&self) -> Option<(u32, &T)> {
        self.slots.get(self.bottom as usize).map(|slot| (slot.page, &slot.value))
    }

    /// Takes the page at the bottom off the list.
    pub(super) fn pop_bottom(&mut self) -> Option<(u32, T)> {
        let (page, _) = self.bottom()?;
        self.remove(page).map(|value| (page, value))
    }

    /// Takes a page off the list.
    pub(super) fn remove(&mut self, page: u32) -> Option<T> {
        let slot = self.index.remove(page)?;
        self.unlink(slot);
        let removed = self.slots.swap_remove(slot as usize);
        // The slot that was the last one fills the gap.
        if let Some(&Slot { page, above, below, .. }) = self.slots.get(slot as usize) {
            self.index.insert(page, slot);
            match self.slots.get_mut(above as usize) {
                Some(neighbour) => neighbour.below = slot,
                None => self.top = slot,
            }
            match self.slots.get_mut(below as usize) {
                Some(neighbour) => neighbour.above = slot,
                None => self.bottom = slot,
            }
        }
        Some(removed.value)
    }

    /// The pages from the top down.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let mut at = self.top;
        std::iter::from_fn(move || {
            let slot = self.slots.get(at as usize)?;
            at = slot.below;
            Some((slot.page, &slot.value))
        })
    }

    /// The pages in the order of the arena, which is faster.
    pub(super) fn unordered(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().map(|slot| (slot.page, &slot.value))
    }

    /// All values, in no particular order.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().map(|slot| &mut slot.value)
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
        let (above, below) = (self.slots[slot as usize].above, self.slots[slot as usize].below);
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

    #[derive(Debug, Clone)]
    enum Step {
        Use(u32),
        Remove(u32),
        PopBottom,
    }

    proptest! {
        /// Against a plain list, newest first.
        #[test]
        fn behaves_as_a_list(
            steps in prop::collection::vec(
                prop_oneof![
                    6 => (0..30_u32).prop_map(Step::Use),
                    2 => (0..30_u32).prop_map(Step::Remove),
                    1 => Just(Step::PopBottom),
                ],
                0..300,
            ),
        ) {
            let mut list: PageList<u32> = PageList::new();
            let mut model: Vec<(u32, u32)> = Vec::new();
            for step in steps {
                match step {
                    Step::Use(page) => {
                        let known = model.iter().position(|&(other, _)| other == page);
                        let uses = known.map(|at| model.remove(at).1);
                        match list.touch(page) {
                            Some(value) => {
                                prop_assert_eq!(Some(*value), uses);
                                *value += 1;
                            }
                            None => list.push(page, 1),
                        }
                        model.insert(0, (page, uses.unwrap_or(0) + 1));
                    }
                    Step::Remove(page) => {
                        let known = model.iter().position(|&(other, _)| other == page);
                        prop_assert_eq!(list.remove(page), known.map(|at| model.remove(at).1));
                    }
                    Step::PopBottom => prop_assert_eq!(list.pop_bottom(), model.pop()),
                }
                prop_assert!(list.iter().map(|(page, &value)| (page, value)).eq(model.iter().copied()));
                prop_assert_eq!(list.bottom().map(|(page, &value)| (page, value)), model.last().copied());
                let mut unordered: Vec<_> = list.unordered().map(|(page, &value)| (page, value)).collect();
                unordered.sort_unstable();
                let mut sorted = model.clone();
                sorted.sort_unstable();
                prop_assert_eq!(unordered, sorted);
                prop_assert_eq!(list.len(), model.len());
            }
        }
    }
}
