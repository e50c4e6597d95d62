//! A link and its version, in one word.
//!
//! ```text
//!   63            32 31             0
//!  +----------------+----------------+
//!  |    version     |  child or NIL  |
//!  +----------------+----------------+
//! ```
//!
//! A child is put under an empty link by compare-and-exchange and keeps the version. A rotation counts the version up
//! in each of the three links that it changes. So a search that reads the same word twice knows that the link led to
//! this child, and stood for the same interval of keys, all the time between.
//!
//! The version has 32 bits. A search would have to stand still between two of its reads while exactly 2^32 rotations
//! change that one link back to the same child for it to be deceived.

use super::primitive::{AtomicU64, Ordering};
use crate::node::NIL;

/// What a link held at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Word(u64);

impl Word {
    const EMPTY: Self = Self(NIL as u64);

    #[inline]
    pub(super) const fn child(self) -> u32 {
        self.0 as u32
    }

    #[inline]
    const fn version(self) -> u32 {
        (self.0 >> 32) as u32
    }

    const fn with_child(self, child: u32) -> Self {
        Self((self.version() as u64) << 32 | child as u64)
    }

    const fn next(self, child: u32) -> Self {
        Self((self.version().wrapping_add(1) as u64) << 32 | child as u64)
    }
}

pub(super) struct Link(AtomicU64);

impl Link {
    pub(super) fn empty() -> Self {
        Self(AtomicU64::new(Word::EMPTY.0))
    }

    /// Acquire: it keeps the reads of a search in their order, and makes what was written before the word visible.
    #[inline]
    pub(super) fn load(&self) -> Word {
        Word(self.0.load(Ordering::Acquire))
    }

    /// Hangs a new node under a link that is empty and still holds `seen`. Open to every thread.
    pub(super) fn try_hang(&self, seen: Word, node: u32) -> bool {
        assert_eq!(seen.child(), NIL, "only an empty link takes a new node");
        // Release: whoever finds the node finds its key. Nothing is read through the old word on failure.
        self.0.compare_exchange(seen.0, seen.with_child(node).0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Redirects a link as a part of a rotation, and returns where it led. For the adjuster only, so that the word can
    /// change underneath only if it is empty and a new node is hung there: once, then it is the adjuster's.
    pub(super) fn redirect(&self, child: u32) -> u32 {
        let mut seen = self.load();
        loop {
            // Release: a search that sees this link as redirected sees the earlier ones of the rotation so too.
            match self.0.compare_exchange(seen.0, seen.next(child).0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return seen.child(),
                Err(now) => seen = Word(now),
            }
        }
    }
}
