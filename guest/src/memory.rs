//! Pages that number themselves.
//!
//! A page is 512 words of 64 bits in 64 chunks of 64 bytes:
//!
//! | chunk | content |
//! |---|---|
//! | 0 | magic, page number, sequence number, five words derived from page and sequence |
//! | 1–62 | the body: content derived from page, chunk and the write that last changed the chunk |
//! | 63 | eight words derived from page and sequence |
//!
//! The sequence number counts the writes to the page. The first write fills the page; each later one renews the first
//! and the last chunk and the next few of the body, round and round. Which write last changed a chunk follows from the
//! page's sequence number alone, so the whole page has exactly one right content, and `check` compares every byte of it.
//! A page with sequence 0 was never written and is all zeros.
//!
//! What each page's sequence number *should* be stands in a table outside the pages. A migration that loses a write to
//! a page but not the one to the table is caught; one that loses both, hence sets the guest back to an earlier moment,
//! is not visible from inside a guest.
//!
//! A table entry that was itself corrupted shows as a wrong page; arithmetic on sequence numbers therefore wraps.
//!
//! All access is by relaxed atomics: threads may write, and a process outside may read or write-protect the memory, at
//! any moment without undefined behaviour. Order between threads comes from the [`Gate`](crate::Gate).

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::parameters::{BODY_CHUNKS, PAGES_MAX, ParameterError, Parameters};
use crate::random::{GOLDEN, mix};

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;

/// 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;

const CHUNK_WORDS: usize = 8;
const LAST_CHUNK: usize = 63;
const MAGIC: u64 = u64::from_le_bytes(*b"vmferry1");

/// Pages that the table of sequence numbers takes for this many checked pages.
pub fn table_pages(pages: u64) -> u64 {
    pages.div_ceil(PAGE_WORDS as u64)
}

/// Words of a region that holds this many checked pages after their table.
pub fn region_words(pages: u64) -> usize {
    (table_pages(pages) + pages) as usize * PAGE_WORDS
}

/// The most checked pages that fit, with their table, in a region of `total_pages`.
pub fn pages_in_region(total_pages: u64) -> u64 {
    // One table page for every 512 pages, hence one of every 513, rounded up.
    total_pages - total_pages.div_ceil(PAGE_WORDS as u64 + 1)
}

/// Why memory cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryError {
    /// The memory is smaller than the pages and their table.
    TooSmall {
        /// Words needed.
        needed_words: usize,
        /// Words there are.
        words: usize,
    },
    /// The memory does not start at a page boundary, so its pages would not be the machine's pages.
    Unaligned,
    /// The parameters are outside their limits.
    Parameters(ParameterError),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooSmall { needed_words, words } => {
                write!(formatter, "the memory has {words} words of 8 bytes and {needed_words} are needed")
            }
            Self::Unaligned => write!(formatter, "the memory does not start at a page boundary"),
            Self::Parameters(_) => write!(formatter, "the parameters cannot be used"),
        }
    }
}

impl std::error::Error for MemoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Parameters(error) => Some(error),
            Self::TooSmall { .. } | Self::Unaligned => None,
        }
    }
}

/// The pages of a guest and the table of their sequence numbers, over memory the caller owns.
#[derive(Debug, Clone, Copy)]
pub struct Memory<'a> {
    pages: &'a [AtomicU64],
    sequences: &'a [AtomicU64],
    seed: u64,
    incompressible_chunks: u64,
    chunks_per_write: u64,
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Pages checked.
    pub pages: u64,
    /// Pages whose content is not what it should be.
    pub wrong: u64,
    /// The first of them.
    pub first_wrong: Option<WrongPage>,
}

impl CheckReport {
    /// Adds a later check's findings to these.
    pub fn add(&mut self, later: &Self) {
        self.pages += later.pages;
        self.wrong += later.wrong;
        self.first_wrong = self.first_wrong.or(later.first_wrong);
    }
}

/// A page that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongPage {
    /// The page's place.
    pub page: u64,
    /// How often it was written, by the table.
    pub expected_sequence: u64,
    /// What is there instead.
    pub found: Found,
}

impl fmt::Display for WrongPage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, expected_sequence, found } = self;
        write!(formatter, "page={page} expected={expected_sequence} found={found}")
    }
}

/// What is in a wrong page's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing that looks like a page of ours: the magic is missing, or a page that was never written is not zero.
    NoPage,
    /// A page that belongs elsewhere.
    OtherPage {
        /// Where it belongs.
        page: u64,
    },
    /// The right page of another moment: stale when lower than expected.
    OtherSequence {
        /// The sequence number in its header.
        sequence: u64,
    },
    /// The right header with something else behind it.
    Torn {
        /// Offset in the page of the first word that differs.
        offset_bytes: usize,
    },
}

impl fmt::Display for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPage => write!(formatter, "no-page"),
            Self::OtherPage { page } => write!(formatter, "page-{page}"),
            Self::OtherSequence { sequence } => write!(formatter, "sequence-{sequence}"),
            Self::Torn { offset_bytes } => write!(formatter, "torn-at-{offset_bytes}"),
        }
    }
}

impl<'a> Memory<'a> {
    /// Pages and table in one region: the table first, on pages of its own, then the pages. All of it has to be zero, or
    /// to be a region used with the same parameters before (it then goes on from there).
    ///
    /// # Errors
    /// When the region is smaller than [`region_words`] of the parameters' pages or the parameters are not valid.
    pub fn in_region(region: &'a [AtomicU64], parameters: &Parameters) -> Result<Self, MemoryError> {
        parameters.validate().map_err(MemoryError::Parameters)?;
        let needed_words = region_words(parameters.pages);
        if region.len() < needed_words {
            return Err(MemoryError::TooSmall { needed_words, words: region.len() });
        }
        let (table, pages) = region.split_at(table_pages(parameters.pages) as usize * PAGE_WORDS);
        Self::new(pages, table, parameters)
    }

    /// Pages and table apart. What either has beyond the parameters' pages is not used.
    ///
    /// # Errors
    /// When one of them is too small or the parameters are not valid.
    pub fn new(
        pages: &'a [AtomicU64],
        sequences: &'a [AtomicU64],
        parameters: &Parameters,
    ) -> Result<Self, MemoryError> {
        parameters.validate().map_err(MemoryError::Parameters)?;
        assert!(parameters.pages <= PAGES_MAX, "validated above");
        let count = parameters.pages as usize;
        let too_small = |needed_words, words| MemoryError::TooSmall { needed_words, words };
        Ok(Self {
            pages: pages.get(..count * PAGE_WORDS).ok_or_else(|| too_small(count * PAGE_WORDS, pages.len()))?,
            sequences: sequences.get(..count).ok_or_else(|| too_small(count, sequences.len()))?,
            seed: mix(parameters.seed.wrapping_add(GOLDEN)),
            incompressible_chunks: (u64::from(parameters.incompressible_percent) * BODY_CHUNKS).div_ceil(100),
            chunks_per_write: u64::from(parameters.chunks_per_write),
        })
    }

    /// Requires that the pages are the machine's pages, as a guest does whose writes are tracked by page.
    ///
    /// # Errors
    /// When the first page does not start at a page boundary.
    pub fn require_aligned(self) -> Result<Self, MemoryError> {
        if self.pages.as_ptr().align_offset(PAGE_BYTES) == 0 { Ok(self) } else { Err(MemoryError::Unaligned) }
    }

    /// How many pages there are.
    pub fn page_count(&self) -> u64 {
        self.sequences.len() as u64
    }

    /// How often a page was written, by the table.
    ///
    /// # Panics
    /// When there is no such page, here and in the functions below.
    pub fn sequence(&self, page: u64) -> u64 {
        self.sequences[page as usize].load(Ordering::Relaxed)
    }

    /// Writes every page once that was never written, so that none is zero.
    pub fn fill(&self) {
        for page in 0..self.page_count() {
            if self.sequence(page) == 0 {
                self.write(page);
            }
        }
    }

    /// Writes a page once more. At most one thread may write a page at a time, or the page comes out torn.
    pub fn write(&self, page: u64) {
        let sequence = self.sequence(page).wrapping_add(1);
        let words = self.words(page);
        if sequence == 1 {
            for chunk in 1..LAST_CHUNK {
                self.write_chunk(words, page, sequence, chunk);
            }
        } else {
            let first = self.chunk_writes_before(sequence);
            for number in 0..self.chunks_per_write {
                let place = first.wrapping_add(number).wrapping_add(page) % BODY_CHUNKS;
                self.write_chunk(words, page, sequence, place as usize + 1);
            }
        }
        self.write_chunk(words, page, sequence, 0);
        self.write_chunk(words, page, sequence, LAST_CHUNK);
        self.sequences[page as usize].store(sequence, Ordering::Relaxed);
    }

    /// Checks all pages. As every check, it means something only while no writer is inside a write.
    pub fn check_all(&self) -> CheckReport {
        self.check(0..self.page_count())
    }

    /// Checks some pages.
    pub fn check(&self, pages: Range<u64>) -> CheckReport {
        let mut report = CheckReport::default();
        for page in pages {
            let expected_sequence = self.sequence(page);
            report.pages += 1;
            if let Some(found) = self.check_page(page, expected_sequence) {
                report.wrong += 1;
                report.first_wrong.get_or_insert(WrongPage { page, expected_sequence, found });
            }
        }
        report
    }

    fn check_page(&self, page: u64, expected_sequence: u64) -> Option<Found> {
        let words = self.words(page);
        let word = |at: usize| words[at].load(Ordering::Relaxed);
        if expected_sequence == 0 {
            return (0..PAGE_WORDS).any(|at| word(at) != 0).then_some(Found::NoPage);
        }
        if word(0) != MAGIC {
            return Some(Found::NoPage);
        }
        if word(1) != page {
            return Some(Found::OtherPage { page: word(1) });
        }
        if word(2) != expected_sequence {
            return Some(Found::OtherSequence { sequence: word(2) });
        }
        for chunk in 0..=LAST_CHUNK {
            let expected = self.chunk(page, self.last_write(page, expected_sequence, chunk), chunk);
            let start = chunk * CHUNK_WORDS;
            if let Some(differs) = (0..CHUNK_WORDS).find(|&at| word(start + at) != expected[at]) {
                return Some(Found::Torn { offset_bytes: (start + differs) * 8 });
            }
        }
        None
    }

    /// Body chunks written by the second and later writes, up to but without write number `sequence`.
    fn chunk_writes_before(&self, sequence: u64) -> u64 {
        sequence.wrapping_sub(2).wrapping_mul(self.chunks_per_write)
    }

    /// Which write last changed a chunk of a page that was written `sequence` times.
    ///
    /// Chunk writes are numbered through from the second write on; number `n` goes to body chunk `n + page` modulo the
    /// number of body chunks. The last one that went to this chunk lies at most one round back.
    fn last_write(&self, page: u64, sequence: u64, chunk: usize) -> u64 {
        if chunk == 0 || chunk == LAST_CHUNK || sequence == 1 {
            return sequence;
        }
        let latest = self.chunk_writes_before(sequence).wrapping_add(self.chunks_per_write - 1);
        let place = chunk as u64 - 1;
        let distance = latest.wrapping_add(page + BODY_CHUNKS - place) % BODY_CHUNKS;
        match latest.checked_sub(distance) {
            Some(number) => number / self.chunks_per_write + 2,
            None => 1,
        }
    }

    fn write_chunk(&self, words: &[AtomicU64], page: u64, sequence: u64, chunk: usize) {
        let start = chunk * CHUNK_WORDS;
        for (place, word) in words[start..start + CHUNK_WORDS].iter().zip(self.chunk(page, sequence, chunk)) {
            place.store(word, Ordering::Relaxed);
        }
    }

    /// The content of a chunk as write number `sequence` leaves it.
    fn chunk(&self, page: u64, sequence: u64, chunk: usize) -> [u64; CHUNK_WORDS] {
        let is_body = chunk != 0 && chunk != LAST_CHUNK;
        // Neighbouring pages have their incompressible part in different places.
        if is_body && (chunk as u64 + page) % BODY_CHUNKS >= self.incompressible_chunks {
            return [(page << 32) ^ sequence; CHUNK_WORDS];
        }
        let key = mix(self.seed ^ mix((page << 8) ^ chunk as u64) ^ sequence.wrapping_mul(GOLDEN));
        let mut words = std::array::from_fn(|at| {
            // A cheaper function than `mix`: the check of a guest without hardware virtualisation is bound by it.
            let word = key.wrapping_add((at as u64).wrapping_mul(GOLDEN));
            (word ^ (word >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
        });
        if chunk == 0 {
            words[..3].copy_from_slice(&[MAGIC, page, sequence]);
        }
        words
    }

    fn words(&self, page: u64) -> &'a [AtomicU64] {
        let start = page as usize * PAGE_WORDS;
        &self.pages[start..start + PAGE_WORDS]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::parameters::any_parameters;

    fn zeros(words: usize) -> Vec<AtomicU64> {
        (0..words).map(|_| AtomicU64::new(0)).collect()
    }

    fn snapshot(memory: &Memory<'_>, page: u64) -> Vec<u64> {
        memory.words(page).iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    fn overwrite(memory: &Memory<'_>, page: u64, content: &[u64]) {
        for (place, &word) in memory.words(page).iter().zip(content) {
            place.store(word, Ordering::Relaxed);
        }
    }

    fn parameters(pages: u64) -> Parameters {
        Parameters { pages, hot_pages: 1, ..Parameters::default() }
    }

    #[test]
    fn regions_hold_the_pages_they_promise() {
        for total in 0..3000 {
            let pages = pages_in_region(total);
            assert!(table_pages(pages) + pages <= total, "{total}");
            assert!(table_pages(pages + 1) + pages + 1 > total, "{total}");
        }
    }

    #[test]
    fn small_or_unaligned_memory_is_refused() {
        let words = zeros(region_words(4) + PAGE_WORDS);
        let short = Memory::in_region(&words[..region_words(4) - 1], &parameters(4)).unwrap_err();
        assert_eq!(short, MemoryError::TooSmall { needed_words: 5 * 512, words: 5 * 512 - 1 });
        let aligned = words.as_ptr().align_offset(PAGE_BYTES);
        let memory = |start: usize| Memory::in_region(&words[start..start + region_words(4)], &parameters(4)).unwrap();
        assert!(memory(aligned).require_aligned().is_ok());
        assert_eq!(memory((aligned + 1) % PAGE_WORDS).require_aligned().unwrap_err(), MemoryError::Unaligned);
    }

    #[test]
    fn pages_never_written_have_to_be_zero() {
        let region = zeros(region_words(3));
        let memory = Memory::in_region(&region, &parameters(3)).unwrap();
        assert_eq!(memory.check_all(), CheckReport { pages: 3, wrong: 0, first_wrong: None });
        memory.words(1)[500].store(1, Ordering::Relaxed);
        let wrong = WrongPage { page: 1, expected_sequence: 0, found: Found::NoPage };
        assert_eq!(memory.check_all(), CheckReport { pages: 3, wrong: 1, first_wrong: Some(wrong) });
    }

    #[test]
    fn the_incompressible_share_is_kept() {
        for (percent, expected) in [(0, 0), (50, 31), (100, 62)] {
            let parameters = Parameters { incompressible_percent: percent, ..parameters(2) };
            let region = zeros(region_words(2));
            let memory = Memory::in_region(&region, &parameters).unwrap();
            memory.fill();
            for page in 0..2 {
                let words = snapshot(&memory, page);
                let varied = words.chunks(CHUNK_WORDS).filter(|chunk| chunk[0] != chunk[1]).count();
                assert_eq!(varied, expected + 2, "the body's share, the header and the trailer, {percent} %");
            }
        }
    }

    proptest! {
        /// The chunk arithmetic against the plain model: replay the writes and remember who wrote each chunk.
        #[test]
        fn the_last_write_of_a_chunk_is_known(page in 0..200_u64, writes in 1..300_u64, chunks in 1..=62_u8) {
            let parameters = Parameters { chunks_per_write: chunks, ..parameters(200) };
            let region = zeros(region_words(200));
            let memory = Memory::in_region(&region, &parameters).unwrap();
            let mut model = [1_u64; LAST_CHUNK + 1];
            let mut next = page % BODY_CHUNKS;
            for sequence in 2..=writes {
                for _ in 0..chunks {
                    model[next as usize + 1] = sequence;
                    next = (next + 1) % BODY_CHUNKS;
                }
            }
            for (chunk, &expected) in model.iter().enumerate().take(LAST_CHUNK).skip(1) {
                prop_assert_eq!(memory.last_write(page, writes, chunk), expected, "chunk {}", chunk);
            }
        }

        #[test]
        fn written_pages_check_and_any_flipped_bit_is_found(
            parameters in any_parameters(),
            writes in prop::collection::vec(any::<prop::sample::Index>(), 0..300),
            place in any::<prop::sample::Index>(),
            bit in 0..64_u32,
        ) {
            let region = zeros(region_words(parameters.pages));
            let memory = Memory::in_region(&region, &parameters).unwrap();
            memory.fill();
            for index in writes {
                memory.write(index.index(parameters.pages as usize) as u64);
            }
            prop_assert_eq!(memory.check_all().wrong, 0);
            let at = place.index(parameters.pages as usize * PAGE_WORDS);
            memory.pages[at].fetch_xor(1 << bit, Ordering::Relaxed);
            let report = memory.check_all();
            prop_assert_eq!(report.wrong, 1);
            prop_assert_eq!(report.first_wrong.unwrap().page, (at / PAGE_WORDS) as u64);
            memory.pages[at].fetch_xor(1 << bit, Ordering::Relaxed);
            prop_assert_eq!(memory.check_all().wrong, 0);
        }

        #[test]
        fn a_stale_page_is_found(before in 1..150_u64, later in 1..150_u64, chunks in 1..=62_u8) {
            let parameters = Parameters { chunks_per_write: chunks, ..parameters(2) };
            let region = zeros(region_words(2));
            let memory = Memory::in_region(&region, &parameters).unwrap();
            (0..before).for_each(|_| memory.write(1));
            let stale = snapshot(&memory, 1);
            (0..later).for_each(|_| memory.write(1));
            prop_assert_eq!(memory.check_all().wrong, 0);
            overwrite(&memory, 1, &stale);
            let found = Found::OtherSequence { sequence: before };
            let wrong = WrongPage { page: 1, expected_sequence: before + later, found };
            prop_assert_eq!(memory.check_all().first_wrong, Some(wrong));
            // The next write to the page renews its header but not all it missed.
            memory.write(1);
            if (u64::from(chunks) * (later + 1)) <= BODY_CHUNKS {
                prop_assert_eq!(memory.check_all().wrong, 1);
            }
        }

        #[test]
        fn a_torn_page_is_found(writes in 1..150_u64, cut in 0..PAGE_WORDS) {
            let region = zeros(region_words(1));
            let memory = Memory::in_region(&region, &parameters(1)).unwrap();
            (0..writes).for_each(|_| memory.write(0));
            let stale = snapshot(&memory, 0);
            memory.write(0);
            let mut torn = snapshot(&memory, 0);
            torn[cut..].copy_from_slice(&stale[cut..]);
            overwrite(&memory, 0, &torn);
            prop_assert_eq!(memory.check_all().wrong, 1);
        }

        #[test]
        fn swapped_pages_are_found(one in 0..20_u64, distance in 1..19_u64) {
            let other = (one + distance) % 20;
            let region = zeros(region_words(20));
            let memory = Memory::in_region(&region, &parameters(20)).unwrap();
            memory.fill();
            let (first, second) = (snapshot(&memory, one), snapshot(&memory, other));
            overwrite(&memory, one, &second);
            overwrite(&memory, other, &first);
            let report = memory.check_all();
            prop_assert_eq!(report.wrong, 2);
            let page = one.min(other);
            let found = Found::OtherPage { page: one.max(other) };
            prop_assert_eq!(report.first_wrong, Some(WrongPage { page, expected_sequence: 1, found }));
        }
    }
}
