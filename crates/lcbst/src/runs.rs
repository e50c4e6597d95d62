//! Hot keys that are neighbours, joined.

use alloc::vec::Vec;
use core::ops::RangeInclusive;

use crate::tree::CountingTree;

/// Keys that have a next one: integers, and what wraps them.
///
/// ```
/// #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
/// struct Page(u64);
///
/// impl lcbst::Successor for Page {
///     fn successor(self) -> Option<Self> {
///         self.0.checked_add(1).map(Page)
///     }
/// }
/// ```
pub trait Successor: Copy + Ord {
    /// The least key that is greater, or `None` after the greatest.
    #[must_use]
    fn successor(self) -> Option<Self>;
}

macro_rules! successor_of_integers {
    ($($integer:ty)*) => {
        $(impl Successor for $integer {
            #[inline]
            fn successor(self) -> Option<Self> {
                self.checked_add(1)
            }
        })*
    };
}

successor_of_integers!(u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize);

impl<K: Successor, V, R> CountingTree<K, V, R> {
    /// The `k` hottest keys as runs of adjacent keys, each with its stored weight, in key order. They hold exactly the
    /// keys of [`Self::top_k`]. Costs what `top_k` costs, plus O(k log k).
    ///
    /// ```
    /// let mut pages: lcbst::CountingTree<u64> = lcbst::CountingTree::new();
    /// for (page, weight) in [(3, 5), (7, 8), (8, 9), (9, 7), (40, 1)] {
    ///     pages.touch(page, weight);
    /// }
    /// assert_eq!(pages.hottest_runs(4), [(3..=3, 5), (7..=9, 24)]);
    /// ```
    #[must_use]
    pub fn hottest_runs(&self, k: usize) -> Vec<(RangeInclusive<K>, u64)> {
        let mut hottest = self.top_k(k);
        hottest.sort_unstable_by_key(|&(key, _)| *key);
        let mut runs: Vec<(RangeInclusive<K>, u64)> = Vec::new();
        for (&key, weight) in hottest {
            match runs.last_mut() {
                Some((run, sum)) if run.end().successor() == Some(key) => {
                    *run = *run.start()..=key;
                    *sum += weight;
                }
                _ => runs.push((key..=key, weight)),
            }
        }
        runs
    }
}
