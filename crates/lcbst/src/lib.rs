//! An ordered map that counts every access and keeps the keys accessed most near its root.
//!
//! # What it is
//!
//! [`CountingTree`] is a binary search tree in which every node knows three numbers: the weight of the accesses to its
//! own key, and the exact sums of those weights in its left and in its right subtree. After an access a
//! [`RotationRule`] may rotate a little where the sums say that a rotation makes the average access shorter. The default
//! rule, [`Lazy`], makes at most one single or double rotation when it finds a key.
//!
//! The sums answer what a plain map cannot: the weight of any range in one descent per bound
//! ([`CountingTree::weight_of`]), and the hottest keys in exact order without looking at the cold ones
//! ([`CountingTree::hottest`], [`CountingTree::top_k`]). With a half-life, old accesses count for less
//! ([`CountingTree::with_half_life`]), and the sums stay exact.
//!
//! ```
//! use lcbst::CountingTree;
//!
//! let mut pages: CountingTree<u64> = CountingTree::new();
//! for page in [7, 3, 9, 7, 7, 3, 1] {
//!     pages.touch(page, 1);
//! }
//!
//! assert_eq!(pages.weight(&7), Some(3));
//! assert_eq!(pages.weight_of(0..=3), 3);
//! assert_eq!(pages.top_k(2), [(&7, 3), (&3, 2)]);
//! assert!(pages.iter().map(|(page, ())| *page).eq([1, 3, 7, 9]));
//! ```
//!
//! # Rules and the bounds that belong to them
//!
//! | rule | an access rotates | depth or time of an access | source |
//! |---|---|---|---|
//! | [`Lazy`] | at most once or twice; a new key up to the root | no bound known | Afek, Korenfeld, Morrison |
//! | [`LazyAsPrinted`] | as `Lazy`, with the printed comparisons | no bound known | the same |
//! | [`DepthLimited`] | the whole path, where it is deeper than 2·log₂ n | no bound known | the same |
//! | [`CbTree`] | along the path, where it pays | O(1 + log(m / accesses of the key)) amortised, and in depth at rest | Afek, Kaplan, Korenfeld, Morrison, Tarjan |
//! | [`SemiSplay`] | half of the path | the same, amortised | Sleator, Tarjan |
//! | [`Splay`] | the whole path | the same, amortised | Sleator, Tarjan |
//! | [`NoRotation`] | never | depends on the order of insertion | |
//!
//! `m` is the number of accesses. Bounds are for accesses one by one and without ageing unless the rule says more.
//! Many keys at once are counted by [`CountingTree::touch_sorted`].
//!
//! # What it is not
//!
//! - **Not a worst-case structure.** No logarithmic bound is known for the lazy rule. Its measured depth on sorted,
//!   reversed, alternating and random insertion is close to the logarithm, but an adversary who sees the counters, or a
//!   caller who inserts with weight zero only, can build a chain. Every operation is free of recursion, so such a chain
//!   costs time and never the call stack.
//! - **Not the fastest counter.** Where keys are small and dense, an array of counters is far faster per access. What
//!   the tree's price buys is memory that follows the number of keys, range sums, key order, and the hottest keys without
//!   a look at the others.
//! - **Not for many threads by itself.** One writer at a time, as with `BTreeMap`; the feature `concurrent` brings
//!   `concurrent::ConcurrentLcbst`, which is slower on one thread.
//! - **Not a set of "nodes near the root".** Depth follows weight only roughly; hot keys are to be selected by weight.
//!
//! # Invariants
//!
//! 1. Keys strictly increase in key order.
//! 2. The two sums of a node are the exact totals of the weights below it, after every public call.
//! 3. The total weight never exceeds [`MAX_TOTAL_WEIGHT`], so no sum can overflow.
//! 4. A step of [`Lazy`] strictly lowers the weighted path length, the sum over all keys of weight times depth.
//! 5. Rotations never move a key in memory, and the arena never holds a removed key.
//!
//! The invariants hold if `Ord` is a total order, and neither it nor `V::default` panics. Otherwise results are unspecified and later calls
//! may panic, but they terminate and touch no memory that is not theirs.
//!
//! # Sources
//!
//! The counters and the one local step are from Y. Afek, B. Korenfeld and A. Morrison, "Concurrent search tree by lazy
//! splaying" (technical report), which builds on N. Bronson, J. Casper, H. Chafi and K. Olukotun, "A practical
//! concurrent binary search tree", PPoPP 2010. The bound O(log(total/weight)) that is often quoted with it belongs to
//! another tree: Afek, Kaplan, Korenfeld, Morrison and Tarjan, "The CB tree: a practical concurrent self-adjusting
//! search tree", Distributed Computing 27(6), 2014. Ageing follows Cormode, Shkapenyuk, Srivastava and Xu, "Forward
//! decay: a practical time decay model for streaming systems", ICDE 2009.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod batch;
mod build;
#[cfg(feature = "concurrent")]
pub mod concurrent;
mod decay;
mod entry;
mod iter;
mod node;
mod rule;
mod runs;
mod statistics;
mod top;
mod tree;

pub use decay::{FRACTION_BITS, MAX_DOUBLINGS};
pub use entry::{Entry, OccupiedEntry, VacantEntry};
pub use iter::{IntoIter, Iter, IterMut, Keys, Range, Values, ValuesMut, Weights};
pub use node::Side;
pub use rule::{
    CbTree, Climb, DepthLimited, Lazy, LazyAsPrinted, LocalWeights, NoRotation, RotationRule, SemiSplay, Splay,
};
pub use runs::Successor;
pub use statistics::DepthStatistics;
pub use top::Hottest;
pub use tree::{CountingTree, MAX_KEYS, MAX_TOTAL_WEIGHT};

#[cfg(test)]
mod tests;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
