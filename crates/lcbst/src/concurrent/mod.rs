//! The tree for many threads: all of them read and count, one at a time adjusts.
//!
//! # What it is
//!
//! [`ConcurrentLcbst`] has the nodes, the counters and the lazy rule of [`CountingTree`], and is shared by reference.
//! Searches take no lock and write nothing. An access adds to one counter, that of its key. Which nodes were counted is
//! noted in small rings, one for each of a few groups of threads. The thread that fills its ring becomes the *adjuster*
//! if no other thread is: it brings the sums above those nodes up to date and makes the rotations of the lazy rule. If
//! another thread is at it, the ring is dropped and the access just counts.
//!
//! ```
//! use lcbst::concurrent::ConcurrentLcbst;
//!
//! let pages = ConcurrentLcbst::<u64>::with_capacity(100);
//! std::thread::scope(|scope| {
//!     for _ in 0..2 {
//!         scope.spawn(|| {
//!             for access in 0..1000 {
//!                 pages.touch(access % 100, 1);
//!             }
//!         });
//!     }
//! });
//! assert_eq!(pages.weight(&7), Some(20)); // Own weights are exact at any time,
//! pages.settle();
//! assert_eq!(pages.weight_of(..50), 1000); // sums once they have settled.
//! ```
//!
//! # What it is not
//!
//! - **Not non-blocking.** A search that meets a rotation half done tries again, and after some tries waits for the
//!   adjuster. The values of one key are behind a lock of their own, which [`ConcurrentLcbst::get`] takes for reading.
//! - **Not smaller or faster than [`CountingTree`] on one thread.** It validates each step, spreads a node over more
//!   cache lines and descends twice where it adjusts. `cargo bench -p lcbst --features concurrent --bench concurrent`
//!   shows about half the speed where every access counts, and two thirds to four fifths where few do.
//! - **Not shrinking while shared.** A removed key leaves a node that still routes searches, and is found again if the
//!   key comes back. [`ConcurrentLcbst::compact`] gives them up; it needs the tree for itself.
//! - **Not ageing**, and open to no rule but [`Lazy`](crate::Lazy).
//!
//! # A search
//!
//! A link and its version are one word. Each link stands for an open interval of keys, those that a search could take
//! it for, and this is the invariant that everything rests on:
//!
//! > While the word of a link stays the same, so does its interval. If a link with interval *I* leads to a node with
//! > key *k*, the node's left link has at least the part of *I* below *k* in its interval, and its right link that
//! > above.
//!
//! So a search goes hand over hand. It reads the link it follows (1), then the link below (2), then the first one again
//! (3). If (3) gives the same word as (1), the first link had this child and this interval when (2) was read, so the
//! key is in the interval of the second link too. Otherwise the search begins anew. An empty link is reached with the
//! same proof: the key was absent when the link was read. A key that is found needs no proof, because nodes never leave
//! the tree and never change their key. An insertion replaces the very word that it read as empty; if the interval
//! changed meanwhile, the word did, and the insertion begins anew.
//!
//! Bronson and others have a version in each node, which a rotation changes if the node's interval shrinks. With one in
//! each link, searches in the part of the interval that the node keeps are not disturbed either.
//!
//! # A rotation
//!
//! `x` above its parent `p`. Three words change, in this order, each with a new version:
//!
//! ```text
//!        g                g                g                g
//!        |                |                |                |
//!        p      (1)       p      (2)   ,-> x      (3)       x
//!       / \     ==>      / \     ==>   |  / \     ==>      / \
//!      x   C            x   C          | A   p            A   p
//!     / \              / \             |    / \              / \
//!    A   B            A   (p)          `---x   C            B   C
//!
//!    (1) x's far link: from B to p.      Its interval grows from (x,p) to (x,hi).
//!    (2) the link above: from p to x.    Its interval stays.
//!    (3) p's near link: from x to B.     Its interval shrinks from (lo,p) to (x,p).
//! ```
//!
//! - The invariant holds after each of the three. `B` is out of reach between (1) and (3), and the only searches that
//!   look for it go from `x` to `p` to `x`. They notice, because that is a child that is its own grandparent, and
//!   begin anew.
//! - Only (3) shrinks an interval. A search that came to `p` before (2) and reads the link of (3) after it must not
//!   trust it, and does not: when it reads again the link above, it finds (2).
//! - (1) is a compare-and-exchange, because a thread may hang a new node in the place of an empty `B` just then. After
//!   that nobody but the adjuster changes the word.
//! - A double rotation is two of these. A panic of the user's order cannot come in between: a rotation compares no
//!   keys.
//!
//! # Who may write what
//!
//! | what | who | how |
//! |---|---|---|
//! | an empty link | any thread that inserts | compare-and-exchange, the version stays |
//! | any other link | the adjuster | compare-and-exchange, the version counts up |
//! | a key | the thread that allocated the node | once, before a link leads to the node |
//! | presence and weight, one word | any thread; the presence only under the lock of the value | compare-and-exchange |
//! | a value | any thread that holds its lock for writing | |
//! | sums and applied weights | the adjuster | plain memory, in its lock |
//! | rings | any thread | plain loads and stores: a lost or repeated hint does no harm |
//!
//! # Memory orderings
//!
//! - Links are read with acquire, which keeps (1), (2), (3) of a search in order, and written with release, so that who
//!   sees a change of a rotation sees those before it, and who sees a new node sees its key.
//! - Presence is read with acquire and written with acquire and release: who sees a key as present, and then asks for
//!   its value, finds the lock as the insertion took it. It is never written by a plain store, so that no count made
//!   between can come after a removal.
//! - The number of keys likewise, for no more than that a thread finds its own changes in it and those it knows of.
//! - Hints are released and acquired, so that the adjuster sees the node hinted at. The positions in a ring are
//!   relaxed.
//!
//! Operations on one key are linearizable, so all operations on keys are, on machines on which all processors agree on
//! the order of writes (x86, ARMv8, RISC-V). In the language's model, two threads that read two keys which two others
//! insert may disagree on which came first.
//!
//! # What is exact
//!
//! - **Presence, value and weight of a key** are exact at any time, and no count is ever lost, up to
//!   [`MAX_TOTAL_WEIGHT`] for a key. Removal forgets the weight; a count that comes at the same time is before it, or
//!   finds the key absent.
//! - **Sums** ([`total_weight`](ConcurrentLcbst::total_weight), [`weight_of`](ConcurrentLcbst::weight_of), and what
//!   rotations are decided by) are exact for the *applied* weights: each is what its key weighed when the adjuster last
//!   looked. So a sum is off by what its keys gained and lost since then, and by nothing else; rotations add no error.
//!   The adjuster looks at each insertion and removal and at every fourth other access of a thread, as soon as the
//!   thread has filled a ring with 512 hints and finds the adjuster free; and at all nodes in turn, 128 with each ring. So the adjuster looks at each
//!   node at least once in n/128 rings worked off, which is 16·n accesses of one thread. After
//!   [`ConcurrentLcbst::settle`] sums are exact, but for what is counted meanwhile.
//!   All weights applied together stop at [`MAX_TOTAL_WEIGHT`].
//! - **The number of keys** is off by at most the insertions and removals that are under way.
//! - **[`top_k`](ConcurrentLcbst::top_k) and [`snapshot`](ConcurrentLcbst::snapshot)** take each key as it was at some
//!   moment of the call. They are no cut through time.
//!
//! # Why an arena, and no epochs
//!
//! Nodes that are never freed while shared need no reclamation, so there is no unsafe code here and no dependency. What
//! it costs is the memory of removed keys until the next compaction. Their number is bounded by that of the keys
//! ever used, which for pages of a guest is small, and it does not grow as keys come and go.
//!
//! # Sources
//!
//! N. Bronson, J. Casper, H. Chafi, K. Olukotun, "A practical concurrent binary search tree", PPoPP 2010:
//! hand-over-hand validation, routing nodes. Y. Afek, B. Korenfeld, A. Morrison, "Concurrent search tree by lazy
//! splaying": the rule. Y. Afek, H. Kaplan, B. Korenfeld, A. Morrison, R. Tarjan, "The CB tree", Distributed Computing
//! 27(6), 2014: one adjuster is enough.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::borrow::Borrow;
use core::cmp::Reverse;
use core::fmt;
use core::ops::{Bound, RangeBounds};

use self::adjuster::{Account, Adjuster};
use self::hints::{Hints, Ring};
use self::primitive::{AtomicUsize, Mutex, Ordering};
use self::shape::{Place, Shape};
use crate::CountingTree;
use crate::build;
use crate::node::{NIL, Node};
use crate::tree::MAX_TOTAL_WEIGHT;

mod adjuster;
mod arena;
mod hints;
mod link;
mod primitive;
mod shape;
#[cfg(test)]
mod tests;

/// Searches that may be thwarted by rotations before a thread keeps the adjuster out to finish.
const MAX_OPTIMISTIC_SEARCHES: usize = if primitive::IS_MODEL { 1 } else { 64 };

/// A new leaf at this depth or below has the tree adjusted at once, if the adjuster is free: keys that come in order
/// would otherwise form a chain as long as a ring has hints.
const URGENT_DEPTH: usize = 48;

/// The nodes that [`ConcurrentLcbst::new`] makes room for in one piece.
const DEFAULT_CAPACITY: usize = if primitive::IS_MODEL { 4 } else { 1024 };

/// An ordered map that many threads read and count in while it keeps hot keys near its root; see the
/// [module documentation](self).
pub struct ConcurrentLcbst<K, V = ()> {
    shape: Shape<K, V>,
    hints: Hints,
    adjuster: Mutex<Adjuster>,
    /// Keys present. Changed under the lock of the value that comes or goes.
    len: AtomicUsize,
}

impl<K, V> ConcurrentLcbst<K, V> {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(DEFAULT_CAPACITY)
    }

    /// An empty tree with room for so many keys, rounded up to a power of two, in one piece of memory. It grows beyond
    /// that, but a search is then a little slower at each node.
    #[must_use]
    pub fn with_capacity(keys: usize) -> Self {
        Self {
            shape: Shape::with_capacity(keys),
            hints: Hints::new(),
            adjuster: Mutex::new(Adjuster::default()),
            len: AtomicUsize::new(0),
        }
    }

    /// The number of keys. Exact if no insertion or removal is under way; otherwise each of those may or may not be
    /// included. O(1).
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Whether there is no key, to the degree that [`Self::len`] is exact. O(1).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The nodes allocated: one for each key that was ever inserted since the tree was created or
    /// [compacted](Self::compact), removed ones included. Where threads race to insert the same new key, each loser may
    /// leave one more. O(1).
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.shape.arena.len()
    }

    /// The single rotations made since the tree was created; a double rotation counts as two. Waits for the adjuster.
    #[must_use]
    pub fn rotations(&self) -> u64 {
        primitive::lock(&self.adjuster).rotations()
    }

    /// Hints that were dropped since the tree was created, because the adjuster was busy when a ring was full. Each
    /// stands for an access whose weight reaches the sums later than it could. O(1).
    #[must_use]
    pub fn dropped_hints(&self) -> u64 {
        self.hints.dropped()
    }

    /// The sum of all weights, as the adjuster knows it; see "What is exact" in the [module documentation](self). O(1).
    /// Waits for the adjuster.
    #[must_use]
    pub fn total_weight(&self) -> u64 {
        primitive::lock(&self.adjuster).total()
    }

    /// The bytes this tree occupies, including reserved ones; not what keys or values own on the heap themselves. Waits
    /// for the adjuster.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let adjuster = primitive::lock(&self.adjuster).memory_bytes();
        size_of::<Self>() + self.shape.arena.memory_bytes() + self.hints.memory_bytes() + adjuster
    }
}

impl<K: Ord, V> ConcurrentLcbst<K, V> {
    /// Whether there is such a key. Does not count. O(depth).
    #[must_use]
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.weight(key).is_some()
    }

    /// The weight of a key: exactly what was counted since it was last inserted, up to
    /// [`MAX_TOTAL_WEIGHT`]. Does not count. O(depth).
    #[must_use]
    pub fn weight<Q: Ord + ?Sized>(&self, key: &Q) -> Option<u64>
    where
        K: Borrow<Q>,
    {
        let tally = self.shape.arena.cell(self.find(key)?).tally();
        tally.is_present().then(|| tally.weight())
    }

    /// A copy of the value of a key. Does not count. O(depth).
    #[must_use]
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        V: Clone,
    {
        self.with_value(key, V::clone)
    }

    /// Looks at the value of a key where it is. Does not count. O(depth).
    ///
    /// Insertions and removals of this key wait until the look is over. So the look must not call the tree.
    pub fn with_value<Q: Ord + ?Sized, T>(&self, key: &Q, look: impl FnOnce(&V) -> T) -> Option<T>
    where
        K: Borrow<Q>,
    {
        self.shape.arena.cell(self.find(key)?).with_value(look)
    }

    /// Counts an access of a key if it is present, and returns whether it is. O(depth), and now and then what the
    /// adjuster has to do.
    pub fn access<Q: Ord + ?Sized>(&self, key: &Q, weight: u64) -> bool
    where
        K: Borrow<Q>,
    {
        self.find(key).is_some_and(|node| self.count(node, weight))
    }

    /// Counts an access of a key, inserting it if it is missing. Returns whether the key is new. O(depth), and now and
    /// then what the adjuster has to do.
    ///
    /// # Panics
    ///
    /// If a node is needed and there are [`MAX_KEYS`](crate::MAX_KEYS) of them.
    pub fn touch(&self, key: K, weight: u64) -> bool
    where
        V: Default,
    {
        let (node, depth) = match self.find(&key) {
            Some(node) => {
                if self.count(node, weight) {
                    return false;
                }
                (node, 0)
            }
            None => self.find_or_link(key),
        };
        let is_new = self.shape.arena.cell(node).set_if_absent(V::default(), weight, || self.arrived());
        self.hint(node, depth);
        is_new
    }

    /// Sets the value of a key, inserting it if it is missing; returns the value it replaces. Counts as an access of
    /// weight 1 in either case. An equal key that is present stays as it is. O(depth), and now and then what the
    /// adjuster has to do.
    ///
    /// # Panics
    ///
    /// If a node is needed and there are [`MAX_KEYS`](crate::MAX_KEYS) of them.
    pub fn insert(&self, key: K, value: V) -> Option<V> {
        let (node, depth) = match self.find(&key) {
            Some(node) => (node, 0),
            None => self.find_or_link(key),
        };
        let previous = self.shape.arena.cell(node).set(value, 1, || self.arrived());
        self.hint(node, depth);
        previous
    }

    /// Removes a key and its weight; returns its value. O(depth). The key's node stays and leads searches for others
    /// on their way; it loses its weight, and so sinks. If the key comes back, it gets the same node.
    pub fn remove<Q: Ord + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let node = self.find(key)?;
        let value = self.shape.arena.cell(node).clear(|| self.left())?;
        self.hint(node, 0);
        Some(value)
    }

    /// The number of ancestors of a key; 0 for the root. A rotation may change it while the answer is returned.
    /// O(depth).
    #[must_use]
    pub fn depth<Q: Ord + ?Sized>(&self, key: &Q) -> Option<usize>
    where
        K: Borrow<Q>,
    {
        let _no_rotations = primitive::lock(&self.adjuster);
        let (mut at, mut depth) = (self.shape.root.load().child(), 0);
        while at != NIL {
            let route = self.shape.arena.route(at);
            let side = match key.cmp(route.key().borrow()) {
                core::cmp::Ordering::Less => crate::Side::Left,
                core::cmp::Ordering::Equal => return self.shape.arena.cell(at).tally().is_present().then_some(depth),
                core::cmp::Ordering::Greater => crate::Side::Right,
            };
            at = route.link(side).load().child();
            depth += 1;
        }
        None
    }

    /// The sum of the weights of all keys in a range, as the adjuster knows it; see "What is exact" in the
    /// [module documentation](self). 0 for a range whose start is after its end. O(depth). Waits for the adjuster.
    #[must_use]
    pub fn weight_of<Q: Ord + ?Sized>(&self, range: impl RangeBounds<Q>) -> u64
    where
        K: Borrow<Q>,
    {
        let (adjuster, shape) = (primitive::lock(&self.adjuster), &self.shape);
        let up_to_end = match range.end_bound() {
            Bound::Included(end) => adjuster.weight_before(shape, |key: &Q| key <= end),
            Bound::Excluded(end) => adjuster.weight_before(shape, |key: &Q| key < end),
            Bound::Unbounded => adjuster.total(),
        };
        let before_start = match range.start_bound() {
            Bound::Included(start) => adjuster.weight_before(shape, |key: &Q| key < start),
            Bound::Excluded(start) => adjuster.weight_before(shape, |key: &Q| key <= start),
            Bound::Unbounded => 0,
        };
        up_to_end.saturating_sub(before_start)
    }

    /// Works off all hints, from whichever thread. Returns the single rotations that were made. Waits for the adjuster.
    ///
    /// The tree adjusts itself as threads count. This is for a thread that has nothing else to do, or for a moment
    /// after which the tree is only read.
    pub fn adjust(&self) -> u64 {
        let mut adjuster = primitive::lock(&self.adjuster);
        let before = adjuster.rotations();
        for ring in self.hints.rings() {
            adjuster.drain(&self.shape, ring);
        }
        adjuster.rotations() - before
    }

    /// Works off all hints and then looks at every node for weights whose hints were dropped. If no other thread counts
    /// meanwhile, the sums are exact afterwards. Returns the single rotations that were made. O(nodes), and O(depth)
    /// for each weight found. Waits for the adjuster.
    pub fn settle(&self) -> u64 {
        let mut adjuster = primitive::lock(&self.adjuster);
        let before = adjuster.rotations();
        for ring in self.hints.rings() {
            adjuster.drain(&self.shape, ring);
        }
        adjuster.sweep(&self.shape, usize::MAX);
        adjuster.rotations() - before
    }

    /// The `k` hottest keys with their weights, in descending order of weight, those of equal weight in key order.
    /// Looks at all nodes: O(nodes · log k), O(k) memory.
    ///
    /// Each weight is what the key had at some moment during the call, but not all at the same moment. If no other
    /// thread counts meanwhile, the result is exact.
    #[must_use]
    pub fn top_k(&self, k: usize) -> Vec<(K, u64)>
    where
        K: Clone,
    {
        let mut kept = BinaryHeap::new();
        for (key, _, weight) in self.present() {
            // The root of the heap is what is to go first: the least weight, the greatest key.
            let candidate = (Reverse(weight), key);
            if kept.len() < k {
                kept.push(candidate);
            } else if let Some(mut worst) = kept.peek_mut()
                && candidate < *worst
            {
                *worst = candidate;
            }
        }
        kept.into_sorted_vec().into_iter().map(|(Reverse(weight), key)| (key.clone(), weight)).collect()
    }

    /// A copy of all keys, values and weights in key order. O(n log n).
    ///
    /// Each key is as it was at some moment during the call, but not all at the same moment: a key that was present all
    /// the time is there, one that was absent all the time is not, and the weight may be of an earlier moment than the
    /// value. If no other thread changes the tree meanwhile, the result is exact.
    #[must_use]
    pub fn snapshot(&self) -> Vec<(K, V, u64)>
    where
        K: Clone,
        V: Clone,
    {
        let mut entries: Vec<_> = self
            .present()
            .filter_map(|(key, cell, weight)| Some((key.clone(), cell.with_value(V::clone)?, weight)))
            .collect();
        entries.sort_unstable_by(|left, right| left.0.cmp(&right.0));
        entries
    }

    /// Gives up the nodes of removed keys and lays the rest out anew, in one piece of memory, and in a shape in which a
    /// key of weight `c` of a total of `M` is about log₂(M/c) deep. All sums are exact afterwards. O(n log n).
    ///
    /// If the order of the keys panics, the tree is left empty.
    pub fn compact(&mut self) {
        let rotations = self.rotations();
        let Self { shape, .. } = core::mem::replace(self, Self::with_capacity(0));
        let entries = sorted_entries(shape.arena);
        *self = Self::from_sorted(entries, rotations);
    }

    /// The sequential tree with the same keys, values and weights. O(n log n).
    ///
    /// The sum of all weights is cut to [`MAX_TOTAL_WEIGHT`], as if they had been counted in
    /// key order.
    #[must_use]
    pub fn into_counting_tree(self) -> CountingTree<K, V> {
        let mut tree = CountingTree::new();
        let mut room = MAX_TOTAL_WEIGHT;
        tree.nodes = sorted_entries(self.shape.arena)
            .into_iter()
            .map(|(key, value, weight)| {
                let own = weight.min(room);
                room -= own;
                Node::leaf(key, value, own)
            })
            .collect();
        tree.root = build::link_sorted(&mut tree.nodes, 0);
        tree
    }

    fn from_sorted(entries: Vec<(K, V, u64)>, rotations: u64) -> Self {
        let mut room = MAX_TOTAL_WEIGHT;
        let mut nodes: Vec<Node<(), ()>> = entries
            .iter()
            .map(|&(_, _, weight)| {
                let applied = weight.min(room);
                room -= applied;
                Node::leaf((), (), applied)
            })
            .collect();
        let root = build::link_sorted(&mut nodes, 0);

        let mut tree = Self::with_capacity(entries.len());
        for (key, value, weight) in entries {
            let node = tree.shape.arena.allocate(key);
            tree.shape.arena.cell(node).set(value, weight, || tree.arrived());
        }
        if root != NIL {
            tree.shape.root.redirect(root);
        }
        for (at, node) in nodes.iter().enumerate() {
            for (link, &child) in tree.shape.arena.route(at as u32).links.iter().zip(&node.links) {
                if child != NIL {
                    link.redirect(child);
                }
            }
        }
        let accounts = nodes.iter().map(|node| Account::settled(node.own, node.below)).collect();
        tree.adjuster = Mutex::new(Adjuster::with_accounts(accounts, rotations));
        tree
    }

    /// Keys present, their cells and weights, in no order.
    fn present(&self) -> impl Iterator<Item = (&K, &arena::Cell<V>, u64)> {
        (0..self.shape.arena.len() as u32).filter_map(|at| {
            let (key, cell) = self.shape.arena.entry(at)?;
            let tally = cell.tally();
            tally.is_present().then(|| (key, cell, tally.weight()))
        })
    }

    /// The node of a key, which may be that of a removed one.
    #[inline]
    fn find<Q: Ord + ?Sized>(&self, key: &Q) -> Option<u32>
    where
        K: Borrow<Q>,
    {
        self.retrying(|| match self.shape.search(key).ok()? {
            Place::Found(node) => Some(Some(node)),
            Place::Vacant { .. } => Some(None),
        })
    }

    /// The node of a key, linked now if there was none, and the depth at which it was linked; 0 if another thread did
    /// it.
    fn find_or_link(&self, key: K) -> (u32, usize) {
        let node = self.shape.arena.allocate(key);
        let key = self.shape.arena.route(node).key();
        self.retrying(|| match self.shape.search(key).ok()? {
            // Another thread was faster. The node allocated here stays without a link and without a value.
            Place::Found(other) => Some((other, 0)),
            Place::Vacant { link, seen, depth } => link.try_hang(seen, node).then_some((node, depth)),
        })
    }

    /// Repeats an attempt that rotations may thwart: a few times against them, and then with the adjuster kept out.
    /// What can thwart it then is another thread's insertion, which is progress.
    #[inline]
    fn retrying<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        for _ in 0..MAX_OPTIMISTIC_SEARCHES {
            if let Some(outcome) = attempt() {
                return outcome;
            }
            core::hint::spin_loop();
        }
        self.retrying_undisturbed(attempt)
    }

    #[cold]
    fn retrying_undisturbed<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        let _no_rotations = primitive::lock(&self.adjuster);
        loop {
            if let Some(outcome) = attempt() {
                return outcome;
            }
        }
    }

    #[inline]
    fn count(&self, node: u32, weight: u64) -> bool {
        let is_present = self.shape.arena.cell(node).count(weight);
        if is_present && self.hints.ring().is_turn() {
            self.hint(node, 0);
        }
        is_present
    }

    /// Tells the adjuster of a node, and is the adjuster if there is enough to do and no other thread is at it.
    #[inline]
    fn hint(&self, node: u32, linked_at_depth: usize) {
        let ring = self.hints.ring();
        let is_full = ring.push(node);
        if is_full || linked_at_depth >= URGENT_DEPTH {
            self.try_adjust(ring, is_full);
        }
    }

    #[cold]
    fn try_adjust(&self, ring: &Ring, is_full: bool) {
        match primitive::try_lock(&self.adjuster) {
            Some(mut adjuster) => adjuster.drain(&self.shape, ring),
            None if is_full => ring.drop_all(),
            None => (),
        }
    }

    fn arrived(&self) {
        self.len.fetch_add(1, Ordering::AcqRel);
    }

    fn left(&self) {
        self.len.fetch_sub(1, Ordering::AcqRel);
    }
}

fn sorted_entries<K: Ord, V>(arena: arena::Arena<K, V>) -> Vec<(K, V, u64)> {
    let mut entries = arena.into_entries();
    entries.sort_unstable_by(|left, right| left.0.cmp(&right.0));
    entries
}

impl<K, V> Default for ConcurrentLcbst<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, V> fmt::Debug for ConcurrentLcbst<K, V> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ConcurrentLcbst").field("len", &self.len()).field("nodes", &self.nodes()).finish()
    }
}
