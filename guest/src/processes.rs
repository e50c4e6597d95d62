//! A guest of several processes, for tests that tell them apart from outside: who owns which page can be read from the
//! pages' content.
//!
//! Each process has private memory, whose first half it writes again and again and whose second half it leaves alone
//! after it was filled. All have some memory in common, and there is a file that nobody maps.

use std::fmt;
use std::str::FromStr;

use crate::memory::{PAGE_BYTES, PAGE_WORDS};
use crate::parameters::{ParameterError, parse_bytes};
use crate::random::{GOLDEN, mix};

/// The most processes of one guest.
pub const PROCESSES_MAX: u32 = 64;
/// Pages that all processes share.
pub const SHARED_PAGES: u64 = 256;
/// Pages of the file that nobody maps.
pub const FILE_PAGES: u64 = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"vmferryp");
/// The word that counts the writes to a page, and so is no part of what names it.
const COUNTER_WORD: usize = 4;
/// Kinds of owners other than processes, above all process numbers.
const SHARED_NUMBER: u64 = 1 << 32;
const FILE_NUMBER: u64 = 2 << 32;

/// Words of a kernel command line that belong to [`Processes`] and not to [`Parameters`](crate::Parameters).
pub(crate) const KEYS: [&str; 3] = ["processes", "process_memory", "process_huge"];

/// Whom a page belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageOwner {
    /// A process, by its number from 0.
    Process(u32),
    /// All processes.
    Shared,
    /// The file.
    File,
}

impl PageOwner {
    fn number(self) -> u64 {
        match self {
            Self::Process(number) => u64::from(number),
            Self::Shared => SHARED_NUMBER,
            Self::File => FILE_NUMBER,
        }
    }

    fn from_number(number: u64) -> Option<Self> {
        match number {
            SHARED_NUMBER => Some(Self::Shared),
            FILE_NUMBER => Some(Self::File),
            number => u32::try_from(number).ok().map(Self::Process),
        }
    }
}

/// A page that says whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedPage {
    /// Whose.
    pub owner: PageOwner,
    /// Which of the owner's pages, from 0.
    pub index: u64,
}

impl NamedPage {
    /// The page's content when it was filled.
    pub fn content(self) -> [u64; PAGE_WORDS] {
        let key = mix(self.owner.number().wrapping_mul(GOLDEN) ^ self.index);
        let mut words = [key; PAGE_WORDS];
        words[..3].copy_from_slice(&[MAGIC, self.owner.number(), self.index]);
        words[COUNTER_WORD] = 0;
        words
    }

    /// Which word of a page a process counts up when it writes the page.
    pub const fn counter_word() -> usize {
        COUNTER_WORD
    }

    /// Reads a page; `None` if it is not whole, or another one.
    pub fn parse(page: &[u8; PAGE_BYTES]) -> Option<Self> {
        let (words, _) = page.as_chunks::<8>();
        let word = |at: usize| u64::from_le_bytes(words[at]);
        if word(0) != MAGIC {
            return None;
        }
        let named = Self { owner: PageOwner::from_number(word(1))?, index: word(2) };
        let content = named.content();
        (0..PAGE_WORDS).all(|at| at == COUNTER_WORD || word(at) == content[at]).then_some(named)
    }
}

/// How many processes, and what they have.
///
/// As words of a kernel command line (the `Display` form, read back by [`Processes::from_command_line`]):
///
/// | word | field | default |
/// |---|---|---|
/// | `vmferry.processes=4` | `count` | none: the guest has only its first process |
/// | `vmferry.process_memory=8MiB` | `pages`, in bytes | 8 MiB |
/// | `vmferry.process_huge=yes` | `huge` | no |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processes {
    /// How many, 1 to [`PROCESSES_MAX`].
    pub count: u32,
    /// Private pages of each, at least 2.
    pub pages: u64,
    /// Whether to ask for pages of 2 MiB; else they are refused.
    pub huge: bool,
}

impl Processes {
    /// Reads the words of a kernel command line that are about processes; `None` if there is no `vmferry.processes`.
    ///
    /// # Errors
    /// When a value is not of its key's form or outside its limits.
    pub fn from_command_line(line: &str) -> Result<Option<Self>, ParameterError> {
        let (mut count, mut pages, mut huge) = (None, 2048, false);
        for word in line.split_ascii_whitespace() {
            let Some((key, value)) = word.strip_prefix("vmferry.").and_then(|word| word.split_once('=')) else {
                continue;
            };
            let wrong = |key| ParameterError::Value { key, value: value.to_owned() };
            match key {
                "processes" => count = Some(u32::from_str(value).map_err(|_| wrong("processes"))?),
                "process_memory" => {
                    let bytes = parse_bytes(value).filter(|bytes| bytes % PAGE_BYTES as u64 == 0);
                    pages = bytes.ok_or_else(|| wrong("process_memory"))? / PAGE_BYTES as u64;
                }
                "process_huge" => {
                    huge = match value {
                        "yes" => true,
                        "no" => false,
                        _ => return Err(wrong("process_huge")),
                    }
                }
                _ => {}
            }
        }
        let Some(count) = count else { return Ok(None) };
        let most_pages = u64::from(u32::MAX);
        for (key, least, most, value) in
            [("processes", 1, u64::from(PROCESSES_MAX), u64::from(count)), ("process_memory", 2, most_pages, pages)]
        {
            if !(least..=most).contains(&value) {
                return Err(ParameterError::Range { key, least, most, value });
            }
        }
        Ok(Some(Self { count, pages, huge }))
    }

    /// The pages that a process writes all the time are those below this; the others it leaves alone.
    pub fn active_pages(&self) -> u64 {
        self.pages / 2
    }
}

impl fmt::Display for Processes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "vmferry.processes={} vmferry.process_memory={} vmferry.process_huge={}",
            self.count,
            crate::parameters::format_bytes(self.pages.saturating_mul(PAGE_BYTES as u64)),
            if self.huge { "yes" } else { "no" },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u64; PAGE_WORDS]) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        for (place, word) in page.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        page
    }

    #[test]
    fn pages_name_their_owners() {
        for owner in [PageOwner::Process(0), PageOwner::Process(63), PageOwner::Shared, PageOwner::File] {
            let named = NamedPage { owner, index: 77 };
            let mut words = named.content();
            assert_eq!(NamedPage::parse(&bytes(&words)), Some(named));
            words[NamedPage::counter_word()] = 12345;
            assert_eq!(NamedPage::parse(&bytes(&words)), Some(named), "writes to the counter do not matter");
            words[511] ^= 1;
            assert_eq!(NamedPage::parse(&bytes(&words)), None);
        }
        assert_eq!(NamedPage::parse(&[0; PAGE_BYTES]), None);
        let mut unknown = NamedPage { owner: PageOwner::File, index: 0 }.content();
        unknown[1] = u64::MAX;
        assert_eq!(NamedPage::parse(&bytes(&unknown)), None);
    }

    #[test]
    fn the_words_of_a_command_line_are_read() {
        let read = Processes::from_command_line;
        assert_eq!(read("quiet vmferry.memory=1MiB vmferry.process_memory=4MiB"), Ok(None));
        let expected = Processes { count: 3, pages: 1024, huge: true };
        assert_eq!(
            read("vmferry.processes=3 vmferry.process_huge=yes vmferry.process_memory=4MiB"),
            Ok(Some(expected))
        );
        assert_eq!(read(&expected.to_string()), Ok(Some(expected)));
        for wrong in [
            "vmferry.processes=0",
            "vmferry.processes=65",
            "vmferry.processes=x",
            "vmferry.processes=1 vmferry.process_memory=4095",
            "vmferry.processes=1 vmferry.process_memory=4KiB",
            "vmferry.processes=1 vmferry.process_huge=maybe",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
