//! Pages of equal content: the first one is sent, the others go as copies of it.
//!
//! A page that was sent becomes the *holder* of its content, and stops being one as soon as it is about to be sent again in any
//! way. So what is found here is what the target has once it has read what was sent before on the same connection; pages that
//! are copied go by the connection of their holder (`vmferry_core::wire::stream_of`), since others overtake it. A page is a
//! holder once in a migration at most: then what is left of it in the table needs not be found and removed.
//!
//! Contents are told apart by a digest with a seed that only this process knows. Whether they are really equal the target
//! finds by a cryptographic one ([`copy_digest`]) of what it has: it ends the migration before a wrong page could run.

use std::thread::{self, JoinHandle};

use vmferry_core::pages::{PageNumber, PageRun, PageSet};
use vmferry_core::wire::{COPY_DIGEST_BYTES, seeded_digest, stream_of};

use crate::buffer::large_vector;

/// The most contents that are known: 4 MiB of them.
const SLOTS_MAX: u64 = 1 << 18;
/// So many that contents seldom take each other's place, where the guest is small enough.
const SLOTS_PER_PAGE: u64 = 2;

/// What goes into the message of copied pages: BLAKE3 of all of them.
pub(crate) fn copy_digest(content: &[u8]) -> [u8; COPY_DIGEST_BYTES] {
    *blake3::hash(content).as_bytes()
}

/// Where a page can be copied from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Twin {
    /// The target has this page before it has any of the batch, and it may have another content afterwards.
    Before(PageNumber),
    /// The target has it when it has all pages of the batch that are no copies.
    Within(PageNumber),
}

/// Twins are many if they are this share of the pages,
const MANY_SHARE: f64 = 1.0 / 32.0;
/// of which each has this weight against those before.
const SHARE_WEIGHT: f64 = 1.0 / 1024.0;
/// Where there is no time for all of them, one content in so many is looked for.
const SAMPLED_PARTS: u64 = 8;

/// Which pages hold which content at the target.
#[derive(Debug)]
pub(crate) struct Twins {
    seed: u64,
    streams: u16,
    /// By digest; none before the first page is looked for. A new content takes the place of another one, unless that was found
    /// before.
    slots: Vec<Slot>,
    slot_count: usize,
    /// A thread that makes the slots.
    maker: Option<JoinHandle<Vec<Slot>>>,
    /// Pages whose content is what it was when they got into their slot.
    holders: PageSet,
    /// Pages that are or were.
    were_holders: PageSet,
    /// Counts batches, so that it is known what came in with the present one.
    batch: u32,
    /// The share of pages that had a twin, of late.
    found_share: f64,
    /// Whether there is time to look for all of them.
    has_time: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    digest: u64,
    page: u32,
    /// The batch that it came in with; 0: nothing is in it.
    batch: u32,
}

/// The bit of a slot's batch that says that its content was found again.
const FOUND: u32 = 1 << 31;

impl Twins {
    /// Nothing is known yet. `seed` is drawn at random and told nobody.
    pub(crate) fn new(total_pages: u64, seed: u64) -> Self {
        Self {
            seed,
            streams: 1,
            slots: Vec::new(),
            slot_count: (SLOTS_PER_PAGE * total_pages).next_power_of_two().min(SLOTS_MAX) as usize,
            maker: None,
            holders: PageSet::empty(total_pages),
            were_holders: PageSet::empty(total_pages),
            batch: 1,
            found_share: 1.0,
            has_time: true,
        }
    }

    /// Has the table made beside everything else: memory that the kernel has to fetch for it first can take milliseconds. No page
    /// has a twin until it is there. Without this, the first page that is looked for waits for it.
    pub(crate) fn prepare(&mut self) {
        let count = self.slot_count;
        let maker = thread::Builder::new().name("vmferry-twins".to_owned()).spawn(move || empty_slots(count));
        self.maker = maker.inspect_err(|error| tracing::debug!(%error, "no thread for the table of contents")).ok();
    }

    /// So many connections carry the pages.
    pub(crate) fn set_streams(&mut self, streams: u16) {
        self.streams = streams;
    }

    /// What is asked for from here on goes in another batch.
    pub(crate) fn begin_batch(&mut self) {
        self.batch = (self.batch + 1) % FOUND;
    }

    /// Whether there is time to look for all pages. Where there is not, it is done only while so many have a twin that it saves
    /// time: to copy a page takes a fraction of what encoding takes, to look for a twin a tenth.
    pub(crate) fn look_at_all(&mut self, has_time: bool) {
        self.has_time = has_time;
    }

    /// The page is about to be sent with other content than the target has of it, or than is known.
    pub(crate) fn forget(&mut self, page: PageNumber) {
        self.holders.remove(page);
    }

    /// The same of a run's pages.
    pub(crate) fn forget_run(&mut self, run: PageRun) {
        if !self.holders.is_empty() {
            run.pages().for_each(|page| self.forget(page));
        }
    }

    /// The page is about to be sent with this content: as a copy of which other, or of itself. If of none, others can be copied
    /// from it.
    pub(crate) fn find(&mut self, page: PageNumber, content: &[u8]) -> Option<Twin> {
        let looks_at_all = self.has_time || self.found_share >= MANY_SHARE;
        if !looks_at_all && !is_sampled(content) {
            self.holders.remove(page);
            return None;
        }
        let twin = self.look_up(page, content);
        self.found_share += SHARE_WEIGHT * (f64::from(u8::from(twin.is_some())) - self.found_share);
        twin
    }

    fn look_up(&mut self, page: PageNumber, content: &[u8]) -> Option<Twin> {
        if self.slots.is_empty() {
            // No page is a holder before there is a table.
            if self.maker.as_ref().is_some_and(|maker| !maker.is_finished()) {
                return None;
            }
            let made = self.maker.take().and_then(|maker| maker.join().ok());
            self.slots = made.unwrap_or_else(|| empty_slots(self.slot_count));
        }
        let digest = seeded_digest(self.seed, content);
        let stream = stream_of(page, self.streams);
        let at = digest.wrapping_add(u64::from(stream)) as usize % self.slots.len();
        let slot = &mut self.slots[at];
        let holder = PageNumber(u64::from(slot.page));
        let is_held = slot.batch != 0 && self.holders.contains(holder);
        if is_held && slot.digest == digest && stream_of(holder, self.streams) == stream {
            let is_within = slot.batch & !FOUND == self.batch;
            slot.batch |= FOUND;
            if holder != page {
                self.holders.remove(page);
            }
            return Some(if is_within { Twin::Within(holder) } else { Twin::Before(holder) });
        }
        self.holders.remove(page);
        if !(is_held && slot.batch & FOUND != 0)
            && let Ok(number) = u32::try_from(page.0)
            && self.were_holders.insert(page)
        {
            *slot = Slot { digest, page: number, batch: self.batch };
            self.holders.insert(page);
        }
        None
    }
}

fn empty_slots(count: usize) -> Vec<Slot> {
    let mut slots = large_vector(count);
    slots.resize(count, Slot::default());
    slots
}

/// Whether pages of this content are among those that stand for all.
fn is_sampled(content: &[u8]) -> bool {
    let (words, _) = content.as_chunks();
    let parts = [0, words.len() / 3, words.len() / 2, words.len() - 1].map(|at| u64::from_le_bytes(words[at]));
    let mixed = parts.into_iter().fold(0, |all: u64, part| (all ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mixed >> 32).is_multiple_of(SAMPLED_PARTS)
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::PAGE_BYTES;

    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_BYTES as usize]
    }

    fn twins(pages: u64) -> Twins {
        let mut twins = Twins::new(pages, 77);
        twins.begin_batch();
        twins
    }

    #[test]
    fn the_first_page_with_a_content_is_the_one_to_copy() {
        let mut twins = twins(100);
        assert_eq!(twins.find(PageNumber(3), &page(1)), None);
        assert_eq!(twins.find(PageNumber(4), &page(2)), None);
        assert_eq!(twins.find(PageNumber(5), &page(1)), Some(Twin::Within(PageNumber(3))));
        twins.begin_batch();
        assert_eq!(twins.find(PageNumber(6), &page(1)), Some(Twin::Before(PageNumber(3))));
        // Sent again as it was: what the target has of it already.
        assert_eq!(twins.find(PageNumber(3), &page(1)), Some(Twin::Before(PageNumber(3))));
        assert_eq!(twins.find(PageNumber(7), &page(1)), Some(Twin::Before(PageNumber(3))));
    }

    #[test]
    fn while_the_table_is_made_no_page_has_a_twin() {
        let mut twins = twins(100);
        let (finish, wait) = std::sync::mpsc::channel::<()>();
        twins.maker = Some(thread::spawn(move || {
            wait.recv().unwrap();
            empty_slots(256)
        }));
        assert_eq!([3, 4].map(|number| twins.find(PageNumber(number), &page(1))), [None; 2]);
        finish.send(()).unwrap();
        while !twins.maker.as_ref().unwrap().is_finished() {
            thread::yield_now();
        }
        // Neither of the two can be copied: nothing is known of them.
        assert_eq!(twins.find(PageNumber(5), &page(1)), None);
        assert_eq!(twins.find(PageNumber(6), &page(1)), Some(Twin::Within(PageNumber(5))));
    }

    #[test]
    fn a_page_that_is_sent_again_is_no_longer_copied() {
        for forgets in [true, false] {
            let mut twins = twins(100);
            assert_eq!(twins.find(PageNumber(3), &page(1)), None);
            if forgets {
                twins.forget(PageNumber(3));
            } else {
                assert_eq!(twins.find(PageNumber(3), &page(2)), None);
            }
            assert_eq!(twins.find(PageNumber(4), &page(1)), None);
            assert_eq!(twins.find(PageNumber(5), &page(2)), None, "a page is a holder once");
            assert_eq!(twins.find(PageNumber(6), &page(1)), Some(Twin::Within(PageNumber(4))));
        }
    }

    #[test]
    fn pages_of_other_connections_are_not_copied() {
        let mut twins = twins(2000);
        twins.set_streams(2);
        assert_eq!(twins.find(PageNumber(0), &page(1)), None);
        assert_eq!(twins.find(PageNumber(256), &page(1)), None);
        assert_eq!(twins.find(PageNumber(257), &page(1)), Some(Twin::Within(PageNumber(256))));
        assert_eq!(twins.find(PageNumber(512), &page(1)), Some(Twin::Within(PageNumber(0))));
    }

    #[test]
    fn where_there_is_no_time_it_is_still_found_out_whether_twins_are_many() {
        let mut twins = twins(1 << 17);
        twins.look_at_all(false);
        let mut numbers = (0_u64..).map(PageNumber);
        let mut look = |twins: &mut Twins, count: usize, different: u64| {
            let contents =
                numbers.by_ref().take(count).map(|page| (page, (page.0 % different).to_le_bytes().repeat(512)));
            contents.filter(|(page, content)| twins.find(*page, content).is_some()).count()
        };
        assert_eq!(look(&mut twins, 8000, u64::MAX), 0);
        let known = twins.were_holders.len();
        assert_eq!(look(&mut twins, 8000, u64::MAX), 0);
        let sampled = twins.were_holders.len() - known;
        assert!((800..1200).contains(&sampled), "{sampled} of 8000");
        // A few of the first ones are not known.
        let found = look(&mut twins, 8000, 100);
        assert!(found > 7000, "{found}");
    }

    #[test]
    fn a_content_that_was_found_stays_while_others_come() {
        let mut twins = twins(1);
        twins.were_holders = PageSet::empty(1000);
        twins.holders = PageSet::empty(1000);
        assert_eq!(twins.find(PageNumber(0), &page(1)), None);
        assert_eq!(twins.find(PageNumber(1), &page(2)), None);
        assert_eq!(twins.find(PageNumber(2), &page(2)), Some(Twin::Within(PageNumber(1))));
        for number in 3..100 {
            assert_eq!(twins.find(PageNumber(number), &page(number as u8)), None);
        }
        assert_eq!(twins.find(PageNumber(100), &page(2)), Some(Twin::Within(PageNumber(1))));
    }
}
