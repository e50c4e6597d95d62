//! The address spaces that are told apart, at most [`MAX_SPACES`] at a time.

use std::time::{Duration, Instant};

use vmferry_core::pages::AddressSpaceId;

use super::owners::{FIRST_SPACE, SLOTS};
use super::paging::Root;
use super::{FIRST_PROCESS, MAX_SPACES};

const _: () = assert!(MAX_SPACES + FIRST_SPACE as usize <= SLOTS, "a byte of the owner map holds every slot");

/// A space gives its place to a new one only when it was not seen for so long. Where more processes run than there are
/// places, some stay unknown; if they took turns, every id would be of short life and of no use to a predictor.
const KEPT: Duration = Duration::from_secs(30);

/// One address space.
#[derive(Debug, Clone)]
pub(super) struct Space {
    pub(super) id: AddressSpaceId,
    pub(super) root: Root,
    pub(super) seen: Instant,
    /// Pages of RAM that its programs map, by the last whole walk.
    pub(super) mapped_pages: u64,
    /// Of them, those in large pages.
    pub(super) large_pages: u64,
}

#[derive(Debug, Clone)]
enum Slot {
    Free,
    Used(Space),
    /// Its number still stands in an owner map.
    Left,
}

/// What became of a root that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    Known,
    New(u8),
    /// There is no place.
    Refused,
}

#[derive(Debug)]
pub(super) struct KnownSpaces {
    slots: Vec<Slot>,
    next_id: u32,
}

impl KnownSpaces {
    pub(super) fn new() -> Self {
        Self { slots: vec![Slot::Free; MAX_SPACES], next_id: FIRST_PROCESS.0 }
    }

    /// A root runs on a processor now.
    pub(super) fn see(&mut self, root: Root, now: Instant) -> Admission {
        for slot in &mut self.slots {
            if let Slot::Used(space) = slot
                && space.root == root
            {
                space.seen = now;
                return Admission::Known;
            }
        }
        let Some(free) = self.slots.iter().position(|slot| matches!(slot, Slot::Free)) else {
            self.give_up_oldest(now);
            return Admission::Refused;
        };
        let id = self.take_id();
        self.slots[free] = Slot::Used(Space { id, root, seen: now, mapped_pages: 0, large_pages: 0 });
        Admission::New(number_of(free))
    }

    /// Makes the place of the space that was not seen for longest free soon, if that is long enough.
    fn give_up_oldest(&mut self, now: Instant) {
        if self.slots.iter().any(|slot| matches!(slot, Slot::Left)) {
            return;
        }
        let oldest = self.spaces().min_by_key(|(_, space)| space.seen);
        let oldest = oldest.filter(|(_, space)| now.saturating_duration_since(space.seen) >= KEPT);
        if let Some((number, _)) = oldest {
            self.leave(number);
        }
    }

    /// The same root stands for another process now: it gets a new id.
    pub(super) fn renew(&mut self, number: u8) {
        let id = self.take_id();
        if let Some(space) = self.space_mut(number) {
            space.id = id;
        }
    }

    /// 2^32 processes are more than any guest starts during a migration; the last id would stand for all further ones.
    fn take_id(&mut self) -> AddressSpaceId {
        let id = AddressSpaceId(self.next_id);
        self.next_id = self.next_id.saturating_add(1);
        id
    }

    /// The space is no more. Its place is free after [`KnownSpaces::release`].
    pub(super) fn leave(&mut self, number: u8) {
        self.slots[place_of(number)] = Slot::Left;
    }

    /// The places whose spaces have left.
    pub(super) fn left(&self) -> Vec<u8> {
        let left = self.slots.iter().enumerate().filter(|(_, slot)| matches!(slot, Slot::Left));
        left.map(|(place, _)| number_of(place)).collect()
    }

    /// No owner map holds this number any more.
    pub(super) fn release(&mut self, number: u8) {
        self.slots[place_of(number)] = Slot::Free;
    }

    pub(super) fn space(&self, number: u8) -> Option<&Space> {
        match self.slots.get(place_of(number))? {
            Slot::Used(space) => Some(space),
            Slot::Free | Slot::Left => None,
        }
    }

    pub(super) fn space_mut(&mut self, number: u8) -> Option<&mut Space> {
        match self.slots.get_mut(place_of(number))? {
            Slot::Used(space) => Some(space),
            Slot::Free | Slot::Left => None,
        }
    }

    /// All spaces with their numbers.
    pub(super) fn spaces(&self) -> impl Iterator<Item = (u8, &Space)> {
        self.slots.iter().enumerate().filter_map(|(place, slot)| match slot {
            Slot::Used(space) => Some((number_of(place), space)),
            Slot::Free | Slot::Left => None,
        })
    }
}

/// The number by which an owner map knows the space at this place.
fn number_of(place: usize) -> u8 {
    FIRST_SPACE + u8::try_from(place).expect("there are fewer places than a byte has values")
}

fn place_of(number: u8) -> usize {
    usize::from(number) - usize::from(FIRST_SPACE)
}

#[cfg(test)]
mod tests {
    use super::super::paging::Levels;
    use super::*;

    fn root(number: u64) -> Root {
        Root { address: number << 12, levels: Levels::Four }
    }

    fn full(start: Instant) -> KnownSpaces {
        let mut known = KnownSpaces::new();
        for number in 0..MAX_SPACES as u64 {
            assert_eq!(known.see(root(number), start), Admission::New(number_of(number as usize)));
        }
        known
    }

    #[test]
    fn a_root_keeps_its_id() {
        let start = Instant::now();
        let mut known = full(start);
        let ids: Vec<_> = known.spaces().map(|(_, space)| space.id).collect();
        assert_eq!((ids[0], ids[1].0), (FIRST_PROCESS, FIRST_PROCESS.0 + 1));
        assert_eq!(known.see(root(1), start + KEPT), Admission::Known);
        assert!(known.spaces().map(|(_, space)| space.id).eq(ids.iter().copied()));
        let five = Root { levels: Levels::Five, ..root(1) };
        assert_eq!(known.see(five, start), Admission::Refused, "other tables, another space");
    }

    #[test]
    fn only_one_that_was_not_seen_for_long_gives_its_place_away() {
        let start = Instant::now();
        let mut known = full(start);
        let stranger = root(1000);
        assert_eq!(known.see(stranger, start + KEPT / 2), Admission::Refused);
        assert!(known.left().is_empty());
        for number in (0..MAX_SPACES as u64).filter(|&number| number != 7) {
            known.see(root(number), start + KEPT / 2);
        }
        assert_eq!(known.see(stranger, start + KEPT), Admission::Refused, "not before the maps forgot the old one");
        assert_eq!(known.left(), [number_of(7)]);
        assert_eq!(known.see(stranger, start + 2 * KEPT), Admission::Refused);
        assert_eq!(known.left(), [number_of(7)], "one at a time");
        known.release(number_of(7));
        assert_eq!(known.see(stranger, start + KEPT), Admission::New(number_of(7)));
        let space = known.space(number_of(7)).unwrap();
        assert_eq!(space.id.0, FIRST_PROCESS.0 + MAX_SPACES as u32, "ids are not used again");
        known.renew(number_of(7));
        assert_eq!(known.space(number_of(7)).unwrap().id.0, FIRST_PROCESS.0 + MAX_SPACES as u32 + 1);
    }
}
