//! The tree: an arena of nodes, the operations of an ordered map, and the counting of accesses.
//!
//! The arena is dense. A removal moves the last node into the gap, which costs one more descent to redirect the one
//! link to it. The usual alternative, a list of free slots, would keep removed keys alive or pay for an `Option` in
//! each node, and would leave a tree that shrank with the memory of its largest size to walk over.
//!
//! Counting happens on the way down, before the outcome of the search is known, where every outcome is counted; and
//! always before any rotation, so that a rule only ever sees exact sums.

use alloc::vec;
use alloc::vec::Vec;
use core::borrow::Borrow;
use core::cmp::Ordering;
use core::fmt;
use core::num::NonZeroU32;
use core::ops::{Bound, RangeBounds};

use crate::build::link_sorted;
use crate::decay::Decay;
use crate::iter::{IntoIter, Iter, IterMut, Keys, Range, Values, ValuesMut, Weights};
use crate::node::{NIL, Node, Side};
use crate::rule::{Climb, Lazy, RotationRule};
use crate::statistics::DepthStatistics;
use crate::top::{self, Hottest};

/// The most keys a tree can hold: what a 32-bit link can tell apart, one value being the link to nowhere.
pub const MAX_KEYS: usize = u32::MAX as usize;

/// The most that all stored weights can sum up to. Half of what `u64` can hold, so that the sum of any two subtree
/// weights fits as well.
pub const MAX_TOTAL_WEIGHT: u64 = u64::MAX / 2;

/// An ordered map that counts accesses and rotates keys accessed often towards its root; see the
/// [crate documentation](crate).
///
/// `V = ()` makes it a set. The rule `R` decides the rotations.
///
/// The operations come in two kinds. Those named as in `BTreeMap` that only read (`get`, `contains_key`, `range`, …)
/// neither count nor rotate. [`touch`](Self::touch), [`access`](Self::access) and [`insert`](Self::insert) count and
/// may rotate.
///
/// # Complexity
///
/// *depth* stands for the depth of the key in question, or of the place where it would be. No bound better than the
/// number of keys is known for the lazy rules; measured, it is close to log₂(total weight / weight of the key).
///
/// # Weights
///
/// A *stored* weight is an exact integer: the sum of the weights of all accesses, each times the
/// [scale](Self::scale) of its epoch. Without a half-life the scale is always 1, and stored weights are plain counts.
/// If all stored weights together would pass [`MAX_TOTAL_WEIGHT`], the tree renormalises if it ages; where that is not
/// enough, the access is counted only as far as there is room. Sums stay exact in either case.
#[derive(Clone)]
pub struct CountingTree<K, V = (), R = Lazy> {
    pub(crate) nodes: Vec<Node<K, V>>,
    pub(crate) root: u32,
    /// The ancestors met by the latest descent; kept to reuse its memory.
    pub(crate) path: Vec<u32>,
    pub(crate) decay: Decay,
    pub(crate) rotations: u64,
    pub(crate) rule: R,
}

/// Where a descent ended.
pub(crate) enum Descent {
    Found(u32),
    /// At the missing child on this side of the last node on the path.
    Missing(Side),
}

impl<K, V> CountingTree<K, V> {
    /// An empty tree under the [`Lazy`] rule, without ageing. Allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self::with_rule(Lazy, None)
    }

    /// An empty tree under the [`Lazy`] rule in which an access counts half after so many epochs.
    ///
    /// ```
    /// use core::num::NonZeroU32;
    /// use lcbst::CountingTree;
    ///
    /// let mut tree: CountingTree<&str> = CountingTree::with_half_life(NonZeroU32::new(4));
    /// tree.touch("old", 3);
    /// tree.advance(8); // Two half-lives: a quarter is left.
    /// tree.touch("new", 1);
    ///
    /// assert_eq!(tree.weight_today("old"), Some(0.75));
    /// assert_eq!(tree.hottest().next().map(|(key, _)| *key), Some("new"));
    /// ```
    #[must_use]
    pub const fn with_half_life(half_life_epochs: Option<NonZeroU32>) -> Self {
        Self::with_rule(Lazy, half_life_epochs)
    }
}

impl<K, V, R> CountingTree<K, V, R> {
    /// An empty tree under a given rule. Without a half-life, accesses do not age. Allocates nothing.
    #[must_use]
    pub const fn with_rule(rule: R, half_life_epochs: Option<NonZeroU32>) -> Self {
        Self { nodes: Vec::new(), root: NIL, path: Vec::new(), decay: Decay::new(half_life_epochs), rotations: 0, rule }
    }

    /// The number of keys. O(1).
    #[must_use]
    pub const fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no key. O(1).
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Removes all keys with their weights. Keeps the memory, the epoch and the count of rotations. O(n).
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.root = NIL;
    }

    /// Makes room for at least so many keys more. O(n).
    pub fn reserve(&mut self, additional: usize) {
        self.nodes.reserve(additional);
    }

    /// Gives back memory that no key uses. O(n).
    pub fn shrink_to_fit(&mut self) {
        self.nodes.shrink_to_fit();
        self.path = Vec::new();
    }

    /// The bytes this tree occupies, including reserved ones; not what keys or values own on the heap themselves. O(1).
    #[must_use]
    pub const fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.nodes.capacity() * size_of::<Node<K, V>>() + self.path.capacity() * size_of::<u32>()
    }

    /// The sum of all stored weights. O(1).
    #[must_use]
    pub fn total_weight(&self) -> u64 {
        self.root_node().map_or(0, Node::total)
    }

    /// The single rotations made since the tree was created; a double rotation counts as two. O(1).
    #[must_use]
    pub const fn rotations(&self) -> u64 {
        self.rotations
    }

    /// The rule that decides the rotations.
    #[must_use]
    pub const fn rule(&self) -> &R {
        &self.rule
    }

    /// Epochs after which an access counts half; `None` if accesses do not age.
    #[must_use]
    pub const fn half_life_epochs(&self) -> Option<NonZeroU32> {
        self.decay.half_life_epochs()
    }

    /// The epochs advanced so far.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.decay.epoch()
    }

    /// What an access of weight 1 adds to the stored weight of its key in the current epoch. 1 without ageing; else it
    /// doubles with each half-life, up to [`MAX_DOUBLINGS`](crate::MAX_DOUBLINGS) times, and then starts again at
    /// `1 << FRACTION_BITS`, stored weights being divided by the same power of two.
    #[must_use]
    pub const fn scale(&self) -> u64 {
        self.decay.scale()
    }

    /// A stored weight, of a key or of a range, in units of today: an access of weight 1 in the current epoch is 1.0.
    ///
    /// With ageing, this is within `w · 2^-15 + 2^-15` of the aged weight `w` in real numbers, for each key that went
    /// into it, as long as [`MAX_TOTAL_WEIGHT`] was not reached.
    #[must_use]
    pub fn in_units_of_today(&self, stored_weight: u64) -> f64 {
        stored_weight as f64 / self.scale() as f64
    }

    /// Lets epochs pass, so that accesses so far count less against later ones. Without a half-life only the epoch
    /// changes.
    ///
    /// O(1), but O(n) where the tree renormalises: after more than [`MAX_DOUBLINGS`](crate::MAX_DOUBLINGS) half-lives.
    /// The shape of the tree does not change.
    pub fn advance(&mut self, epochs: u64) {
        let bits = self.decay.advance(epochs);
        self.shift_weights(bits);
    }

    /// Depths of the keys, for measurements. O(n).
    #[must_use]
    pub fn depth_statistics(&self) -> DepthStatistics {
        DepthStatistics::of(&self.nodes, self.root)
    }

    /// All keys and values in key order. O(n) for all of them; O(depth) memory.
    #[must_use]
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter::new(&self.nodes, self.root)
    }

    /// All keys in key order. Costs what [`Self::iter`] costs.
    #[must_use]
    pub fn keys(&self) -> Keys<'_, K, V> {
        Keys::new(&self.nodes, self.root)
    }

    /// All values in key order. Costs what [`Self::iter`] costs.
    #[must_use]
    pub fn values(&self) -> Values<'_, K, V> {
        Values::new(&self.nodes, self.root)
    }

    /// All keys and their stored weights in key order. Costs what [`Self::iter`] costs.
    #[must_use]
    pub fn weights(&self) -> Weights<'_, K, V> {
        Weights::new(&self.nodes, self.root)
    }

    /// All keys with their stored weights and values, in the order in which they lie in memory: deterministic, and of no
    /// meaning. Once the tree is larger than the caches, this takes a fraction of what going through it in key order takes.
    pub fn iter_unordered(&self) -> impl ExactSizeIterator<Item = (&K, u64, &V)> {
        self.nodes.iter().map(|node| (&node.key, node.own, &node.value))
    }

    /// The least key and its value. O(depth).
    #[must_use]
    pub fn first_key_value(&self) -> Option<(&K, &V)> {
        self.outermost(Side::Left)
    }

    /// The greatest key and its value. O(depth).
    #[must_use]
    pub fn last_key_value(&self) -> Option<(&K, &V)> {
        self.outermost(Side::Right)
    }

    fn root_node(&self) -> Option<&Node<K, V>> {
        (self.root != NIL).then(|| &self.nodes[self.root as usize])
    }

    fn outermost(&self, side: Side) -> Option<(&K, &V)> {
        let mut node = self.root_node()?;
        while node.links[side as usize] != NIL {
            node = &self.nodes[node.links[side as usize] as usize];
        }
        Some((&node.key, &node.value))
    }

    /// The stored weight that an access of this weight adds now, so that the total stays within its limit.
    #[inline]
    fn admit(&mut self, weight: u64) -> u64 {
        let added = weight.saturating_mul(self.decay.scale());
        if added <= MAX_TOTAL_WEIGHT - self.total_weight() { added } else { self.admit_near_limit(weight) }
    }

    #[cold]
    fn admit_near_limit(&mut self, weight: u64) -> u64 {
        self.renormalise();
        weight.saturating_mul(self.decay.scale()).min(MAX_TOTAL_WEIGHT - self.total_weight())
    }

    /// Brings the scale back to its least value, and the weights with it.
    pub(crate) fn renormalise(&mut self) {
        let bits = self.decay.renormalise();
        self.shift_weights(bits);
    }

    /// Shifts every own weight right and computes all sums anew. O(n) time, O(depth) memory.
    fn shift_weights(&mut self, bits: u32) {
        if bits == 0 || self.root == NIL {
            return;
        }
        // A node is finished after its children. The child that was finished last tells how far its parent is.
        let mut pending = vec![self.root];
        let mut finished = NIL;
        while let Some(&at) = pending.last() {
            let [left, right] = self.nodes[at as usize].links;
            let next = if finished == NIL && left != NIL {
                left
            } else if finished == NIL || finished == left {
                right
            } else {
                NIL
            };
            if next == NIL {
                let below = [left, right].map(|child| self.nodes.get(child as usize).map_or(0, Node::total));
                let node = &mut self.nodes[at as usize];
                node.own = node.own.checked_shr(bits).unwrap_or(0);
                node.below = below;
                finished = at;
                pending.pop();
            } else {
                finished = NIL;
                pending.push(next);
            }
        }
    }
}

impl<K: Ord, V, R> CountingTree<K, V, R> {
    /// The value of a key. Neither counts nor rotates. O(depth).
    #[must_use]
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.find(key).map(|node| &node.value)
    }

    /// The key in the tree that equals a key, and its value. Neither counts nor rotates. O(depth).
    #[must_use]
    pub fn get_key_value<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        self.find(key).map(|node| (&node.key, &node.value))
    }

    /// The value of a key, to change. Neither counts nor rotates. O(depth).
    #[must_use]
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let (at, _) = self.locate(key)?;
        Some(&mut self.nodes[at as usize].value)
    }

    /// Whether there is such a key. Neither counts nor rotates. O(depth).
    #[must_use]
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.find(key).is_some()
    }

    /// The stored weight of a key. O(depth).
    #[must_use]
    pub fn weight<Q: Ord + ?Sized>(&self, key: &Q) -> Option<u64>
    where
        K: Borrow<Q>,
    {
        self.find(key).map(|node| node.own)
    }

    /// The weight of a key in units of today; see [`Self::in_units_of_today`]. O(depth).
    #[must_use]
    pub fn weight_today<Q: Ord + ?Sized>(&self, key: &Q) -> Option<f64>
    where
        K: Borrow<Q>,
    {
        self.weight(key).map(|stored| self.in_units_of_today(stored))
    }

    /// The sum of the stored weights of all keys in a range: one descent per bound, O(depth). 0 for a range whose start
    /// is after its end.
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u64> = lcbst::CountingTree::new();
    /// tree.touch(10, 5);
    /// tree.touch(20, 7);
    /// tree.touch(30, 9);
    /// assert_eq!(tree.weight_of(10..30), 12);
    /// assert_eq!(tree.weight_of(15..), 16);
    /// ```
    #[must_use]
    pub fn weight_of<Q: Ord + ?Sized>(&self, range: impl RangeBounds<Q>) -> u64
    where
        K: Borrow<Q>,
    {
        let up_to_end = match range.end_bound() {
            Bound::Included(end) => self.weight_before(|key| key <= end),
            Bound::Excluded(end) => self.weight_before(|key| key < end),
            Bound::Unbounded => self.total_weight(),
        };
        let before_start = match range.start_bound() {
            Bound::Included(start) => self.weight_before(|key| key < start),
            Bound::Excluded(start) => self.weight_before(|key| key <= start),
            Bound::Unbounded => 0,
        };
        up_to_end.saturating_sub(before_start)
    }

    /// The number of ancestors of a key; 0 for the root. O(depth).
    #[must_use]
    pub fn depth<Q: Ord + ?Sized>(&self, key: &Q) -> Option<usize>
    where
        K: Borrow<Q>,
    {
        self.locate(key).map(|(_, depth)| depth)
    }

    /// The keys and values of a range in key order. O(depth) to create, then O(1) a key, amortised.
    ///
    /// Unlike `BTreeMap::range`, a range whose start is after its end is empty, and no panic.
    #[must_use]
    pub fn range<Q: Ord + ?Sized>(&self, range: impl RangeBounds<Q>) -> Range<'_, K, V>
    where
        K: Borrow<Q>,
    {
        Range::new(&self.nodes, self.root, &range)
    }

    /// Keys and stored weights, the hottest first and those of equal weight in key order, found as they are asked for.
    ///
    /// The first `k` cost O(v·log v) time and O(v) memory if `v` nodes are visited. Under a skewed distribution `v` is a
    /// multiple of `k`; about 5 to 20 were measured under Zipf's law. It can be all nodes: no search by sums can tell
    /// keys of about equal weight apart.
    ///
    /// To leave out keys, filter before taking:
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u64> = lcbst::CountingTree::new();
    /// for page in 0..100 {
    ///     tree.touch(page, page);
    /// }
    /// let odd: Vec<u64> = tree.hottest().map(|(page, _)| *page).filter(|page| page % 2 == 1).take(3).collect();
    /// assert_eq!(odd, [99, 97, 95]);
    /// ```
    #[must_use]
    pub fn hottest(&self) -> Hottest<'_, K, V> {
        Hottest::new(&self.nodes, self.root)
    }

    /// The `k` hottest keys with their stored weights, in descending order of weight, those of equal weight in key
    /// order. Exact. Costs what the first `k` of [`Self::hottest`] cost, but never more than O(n log k) time and O(k) memory
    /// beyond n/32 visited nodes, because a search that prunes too little is given up for a scan of all nodes.
    #[must_use]
    pub fn top_k(&self, k: usize) -> Vec<(&K, u64)> {
        top::top_k(&self.nodes, self.root, k)
    }

    /// Removes a key and its weight; returns its value. O(depth). Makes no rotation, but where the key has two children
    /// one of its neighbours in key order takes its place.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.remove_entry(key).map(|(_, value)| value)
    }

    /// As [`Self::remove`]; returns both key and value. O(depth).
    pub fn remove_entry<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<(K, V)>
    where
        K: Borrow<Q>,
    {
        match self.descend(key) {
            Descent::Found(at) => Some(self.remove_found(at)),
            Descent::Missing(_) => None,
        }
    }

    /// Removes the least key and its weight; returns it with its value. O(depth).
    pub fn pop_first(&mut self) -> Option<(K, V)> {
        self.pop_outermost(Side::Left)
    }

    /// Removes the greatest key and its weight; returns it with its value. O(depth).
    pub fn pop_last(&mut self) -> Option<(K, V)> {
        self.pop_outermost(Side::Right)
    }

    fn pop_outermost(&mut self, side: Side) -> Option<(K, V)> {
        self.path.clear();
        let mut at = self.root;
        while at != NIL {
            self.path.push(at);
            at = self.nodes[at as usize].links[side as usize];
        }
        let outermost = self.path.pop()?;
        Some(self.remove_found(outermost))
    }

    /// Keeps the keys for which the function returns true, asked in key order, and removes the others with their weights.
    /// The function may change the values. If it panics, no key is removed.
    ///
    /// If a key is removed, the tree is built anew from those that stay, balanced by weight: a key of weight `c` in a tree
    /// of weight `M` comes to a depth of at most log₂(M/c) + 1, which no rule would better by much, and keys without weight
    /// halve their part by number. Weights, values and epochs stay as they are.
    ///
    /// What [`Self::arrange`] takes, and O(n) time and 9 bytes of memory a key in between. To remove few keys,
    /// [`Self::remove`] is faster: of a million, up to about 15,000.
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u32, u32> = (0..10).map(|key| (key, key)).collect();
    /// tree.retain(|key, _| key % 3 == 0);
    /// assert!(tree.keys().eq(&[0, 3, 6, 9]));
    /// ```
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.arrange();
        let kept: Vec<bool> = self.nodes.iter_mut().map(|node| keep(&node.key, &mut node.value)).collect();
        if kept.iter().all(|&kept| kept) {
            return;
        }
        let mut kept = kept.into_iter();
        self.nodes.retain(|_| kept.next().unwrap_or(true));
        self.root = link_sorted(&mut self.nodes, 0);
    }

    /// Lets the keys lie in memory in key order, so that [`Self::iter_unordered`] comes in key order as well, until a key is
    /// inserted or removed. If they did not lie so, the tree is built anew as by [`Self::retain`].
    ///
    /// O(n) time if the keys lie in order already, as after [`Self::retain`] and after a batch that rebuilt the tree
    /// ([`Self::touch_sorted`]). O(n + d log d) if they would but for `d` of them, as insertions and removals one by one leave
    /// them; then with memory for half of the keys at most and 8 bytes a key in between.
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u32> = [5, 1, 3].map(|key| (key, ())).into_iter().collect();
    /// tree.arrange();
    /// assert!(tree.iter_unordered().map(|(key, ..)| *key).eq([1, 3, 5]));
    /// ```
    pub fn arrange(&mut self) {
        if self.sort_nodes() {
            self.root = link_sorted(&mut self.nodes, 0);
        }
    }

    /// Brings the nodes into key order in memory. Returns whether they were not, and are to be linked anew.
    pub(crate) fn sort_nodes(&mut self) -> bool {
        if self.nodes.is_sorted_by(|a, b| a.key < b.key) {
            return false;
        }
        // Those in front of `ordered` are in order. Where one is less than the last of these, either of the two may be out
        // of place, so both are left behind: two for each that really is, at the most.
        let mut ordered = 0;
        for next in 0..self.nodes.len() {
            if ordered > 0 && self.nodes[next].key < self.nodes[ordered - 1].key {
                ordered -= 1;
            } else {
                self.nodes.swap(ordered, next);
                ordered += 1;
            }
        }
        self.nodes[ordered..].sort_unstable_by(|a, b| a.key.cmp(&b.key));
        self.merge_nodes();
        true
    }

    /// Merges two stretches of nodes that are in key order each. The stable sort finds them.
    pub(crate) fn merge_nodes(&mut self) {
        self.nodes.sort_by(|a, b| a.key.cmp(&b.key));
    }

    /// All keys and values in key order, the values to change. Neither counts nor rotates. O(n log n) time and O(n) memory
    /// before the first: the price of `forbid(unsafe_code)`.
    #[must_use]
    pub fn iter_mut(&mut self) -> IterMut<'_, K, V> {
        IterMut::range::<K>(&mut self.nodes, self.root, &(..))
    }

    /// All values in key order, to change. Costs what [`Self::iter_mut`] costs.
    #[must_use]
    pub fn values_mut(&mut self) -> ValuesMut<'_, K, V> {
        ValuesMut(self.iter_mut())
    }

    /// The keys and values of a range in key order, the values to change. Neither counts nor rotates. For `r` keys in the
    /// range O(depth + r log r) time and O(depth + r) memory before the first.
    ///
    /// As with [`Self::range`], a range whose start is after its end is empty.
    #[must_use]
    pub fn range_mut<Q: Ord + ?Sized>(&mut self, range: impl RangeBounds<Q>) -> IterMut<'_, K, V>
    where
        K: Borrow<Q>,
    {
        IterMut::range(&mut self.nodes, self.root, &range)
    }

    /// The weight of all lesser keys, whether the key itself is there or not. O(depth).
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u32> = lcbst::CountingTree::new();
    /// tree.touch_sorted([(10, 5), (20, 3), (30, 2)]);
    /// assert_eq!((tree.rank_by_weight(&20), tree.rank_by_weight(&25)), (5, 8));
    /// ```
    #[must_use]
    pub fn rank_by_weight<Q: Ord + ?Sized>(&self, key: &Q) -> u64
    where
        K: Borrow<Q>,
    {
        self.weight_before(|at| at < key)
    }

    /// The key at a position on the axis of weight, on which each key takes up as much as it weighs, in key order: the
    /// one whose [rank](Self::rank_by_weight) is at most `position` while rank plus weight is more. `None` from the total
    /// weight on. Never a key of weight 0. O(depth).
    ///
    /// With uniformly random positions this draws keys by their weight; with `total_weight() / 2` it is the weighted
    /// median.
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u32> = lcbst::CountingTree::new();
    /// tree.touch_sorted([(10, 5), (20, 3), (30, 2)]);
    /// assert_eq!([0, 4, 5, 7, 9, 10].map(|position| tree.select_by_weight(position).copied()),
    ///            [Some(10), Some(10), Some(20), Some(20), Some(30), None]);
    /// ```
    #[must_use]
    pub fn select_by_weight(&self, mut position: u64) -> Option<&K> {
        let mut at = self.root;
        while at != NIL {
            let node = &self.nodes[at as usize];
            let [left, right] = node.links;
            if position < node.below[0] {
                at = left;
                continue;
            }
            position -= node.below[0];
            if position < node.own {
                return Some(&node.key);
            }
            position -= node.own;
            at = right;
        }
        None
    }

    /// Removes a node whose ancestors are in `path`.
    pub(crate) fn remove_found(&mut self, mut at: u32) -> (K, V) {
        self.subtract_along_path(at, 0);
        if let [Some(_), Some(_)] = self.children(at) {
            at = self.swap_with_neighbour(at);
        }
        self.splice(at);
        self.take_out(at)
    }

    fn find<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&Node<K, V>>
    where
        K: Borrow<Q>,
    {
        self.locate(key).map(|(at, _)| &self.nodes[at as usize])
    }

    /// The position and the depth of a key.
    #[inline]
    fn locate<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(u32, usize)>
    where
        K: Borrow<Q>,
    {
        let (mut at, mut depth) = (self.root, 0);
        while at != NIL {
            let node = &self.nodes[at as usize];
            let ordering = key.cmp(node.key.borrow());
            if ordering.is_eq() {
                return Some((at, depth));
            }
            at = node.links[usize::from(ordering.is_gt())];
            depth += 1;
        }
        None
    }

    /// The weight of the keys for which a predicate holds that holds for all keys up to some point, and for none after.
    fn weight_before<Q: ?Sized>(&self, mut is_before: impl FnMut(&Q) -> bool) -> u64
    where
        K: Borrow<Q>,
    {
        let (mut at, mut weight) = (self.root, 0);
        while at != NIL {
            let node = &self.nodes[at as usize];
            if is_before(node.key.borrow()) {
                weight += node.below[Side::Left as usize] + node.own;
                at = node.links[Side::Right as usize];
            } else {
                at = node.links[Side::Left as usize];
            }
        }
        weight
    }

    /// Looks for a key and leaves its ancestors in `path`.
    pub(crate) fn descend<Q: Ord + ?Sized>(&mut self, key: &Q) -> Descent
    where
        K: Borrow<Q>,
    {
        self.path.clear();
        let (mut at, mut side) = (self.root, Side::Left);
        while at != NIL {
            let node = &self.nodes[at as usize];
            side = match key.cmp(node.key.borrow()) {
                Ordering::Less => Side::Left,
                Ordering::Equal => return Descent::Found(at),
                Ordering::Greater => Side::Right,
            };
            self.path.push(at);
            at = node.links[side as usize];
        }
        Descent::Missing(side)
    }

    /// As [`Self::descend`], adding to the key's weight and to the sums of its ancestors on the way. If the key is
    /// missing, the sums are those with the leaf that the caller must link.
    #[inline]
    fn descend_counting(&mut self, key: &K, added: u64) -> Descent {
        self.path.clear();
        let (mut at, mut side) = (self.root, Side::Left);
        while at != NIL {
            let node = &mut self.nodes[at as usize];
            let ordering = key.cmp(&node.key);
            if ordering.is_eq() {
                node.own += added;
                return Descent::Found(at);
            }
            // A side as an index, and no branch on it: which way a descent goes is not to be predicted.
            side = if ordering.is_gt() { Side::Right } else { Side::Left };
            node.below[side as usize] += added;
            self.path.push(at);
            at = node.links[side as usize];
        }
        Descent::Missing(side)
    }

    fn children(&self, at: u32) -> [Option<u32>; 2] {
        self.nodes[at as usize].links.map(|link| (link != NIL).then_some(link))
    }

    /// Takes the own weight of the node at `at`, whose ancestors are in `path`, out of the sums of those ancestors that
    /// are at index `from` of the path or below.
    fn subtract_along_path(&mut self, at: u32, from: usize) {
        let own = self.nodes[at as usize].own;
        let mut child = at;
        for &ancestor in self.path[from..].iter().rev() {
            let node = &mut self.nodes[ancestor as usize];
            let side = node.side_of(child);
            node.below[side as usize] -= own;
            child = ancestor;
        }
    }

    /// Exchanges the contents of a node that is about to be removed, and has two children, with its neighbour on the
    /// heavier side. Returns where the contents are now; its ancestors are in `path`, and its weight is in no sum.
    fn swap_with_neighbour(&mut self, at: u32) -> u32 {
        let node = &self.nodes[at as usize];
        let side = if node.below[0] > node.below[1] { Side::Left } else { Side::Right };
        let from = self.path.len();
        self.path.push(at);
        let mut neighbour = node.links[side as usize];
        loop {
            let inward = self.nodes[neighbour as usize].links[side.opposite() as usize];
            if inward == NIL {
                break;
            }
            self.path.push(neighbour);
            neighbour = inward;
        }
        self.subtract_along_path(neighbour, from);
        let Ok([node, replacement]) = self.nodes.get_disjoint_mut([at as usize, neighbour as usize]) else {
            unreachable!("node {at} and its neighbour {neighbour} are two nodes of the arena");
        };
        core::mem::swap(&mut node.key, &mut replacement.key);
        core::mem::swap(&mut node.value, &mut replacement.value);
        core::mem::swap(&mut node.own, &mut replacement.own);
        neighbour
    }

    /// Links the only child, if any, of a node whose ancestors are in `path` in the node's place.
    fn splice(&mut self, at: u32) {
        let [left, right] = self.nodes[at as usize].links;
        let child = if left == NIL { right } else { left };
        let parent = self.path.last().copied();
        self.relink(parent, at, child);
    }

    /// Makes the link that leads to `from` lead to `to`.
    fn relink(&mut self, parent: Option<u32>, from: u32, to: u32) {
        match parent {
            None => self.root = to,
            Some(parent) => {
                let parent = &mut self.nodes[parent as usize];
                let side = parent.side_of(from);
                parent.links[side as usize] = to;
            }
        }
    }

    /// Takes a node that nothing links to out of the arena, and moves the last node into its slot.
    fn take_out(&mut self, at: u32) -> (K, V) {
        let last = self.nodes.len() as u32 - 1;
        if at != last {
            let parent = self.parent_of(last);
            self.relink(parent, last, at);
        }
        let node = self.nodes.swap_remove(at as usize);
        (node.key, node.value)
    }

    fn parent_of(&self, sought: u32) -> Option<u32> {
        let key = &self.nodes[sought as usize].key;
        let (mut at, mut parent) = (self.root, None);
        while at != sought {
            assert_ne!(at, NIL, "node {sought} is not where its key belongs; is the order of the keys total?");
            let node = &self.nodes[at as usize];
            let side = if *key < node.key { Side::Left } else { Side::Right };
            parent = Some(at);
            at = node.links[side as usize];
        }
        parent
    }
}

impl<K: Ord, V, R: RotationRule> CountingTree<K, V, R> {
    /// Counts an access of a key, inserting it if it is missing, and lets the rule adjust the tree. Returns whether the
    /// key is new. O(depth), and what the rule costs.
    ///
    /// A weight of 0 inserts or adjusts without counting. Keys inserted so tell the rule nothing, and may form a chain.
    ///
    /// # Panics
    ///
    /// If the key is missing and the tree holds [`MAX_KEYS`] keys.
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u64> = lcbst::CountingTree::new();
    /// assert!(tree.touch(7, 1));
    /// assert!(!tree.touch(7, 2));
    /// assert_eq!(tree.weight(&7), Some(3));
    /// ```
    #[inline]
    pub fn touch(&mut self, key: K, weight: u64) -> bool
    where
        V: Default,
    {
        let added = self.admit_key(&key, weight);
        match self.descend_counting(&key, added) {
            Descent::Found(at) => {
                self.adjust_after_hit(at);
                false
            }
            Descent::Missing(side) => {
                self.link_leaf(side, Node::leaf(key, V::default(), added));
                true
            }
        }
    }

    /// Counts an access of a key that is present and lets the rule adjust the tree; gives its value to change. Does
    /// nothing if the key is missing. O(depth), and what the rule costs.
    pub fn access<Q: Ord + ?Sized>(&mut self, key: &Q, weight: u64) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let Descent::Found(at) = self.descend(key) else { return None };
        self.count_hit(at, weight);
        Some(&mut self.nodes[at as usize].value)
    }

    /// Counts an access of a node whose ancestors are in `path`, and lets the rule adjust the tree.
    pub(crate) fn count_hit(&mut self, at: u32, weight: u64) {
        let added = self.admit(weight);
        self.nodes[at as usize].own += added;
        self.add_along_path(at, self.path.len(), added);
        self.adjust_after_hit(at);
    }

    /// Inserts a key at the missing child on this side of the last node in `path`, as an access of weight 1. Returns where.
    pub(crate) fn insert_missing(&mut self, key: K, value: V, side: Side) -> u32 {
        assert!(self.len() < MAX_KEYS, "a tree holds at most {MAX_KEYS} keys");
        let added = self.admit(1);
        if let Some(&parent) = self.path.last() {
            self.nodes[parent as usize].below[side as usize] += added;
            self.add_along_path(parent, self.path.len() - 1, added);
        }
        let at = self.nodes.len() as u32;
        self.link_leaf(side, Node::leaf(key, value, added));
        at
    }

    /// Adds to the sums of the first `length` nodes of the path, the last of which has `child` as its child.
    fn add_along_path(&mut self, mut child: u32, length: usize, added: u64) {
        for &ancestor in self.path[..length].iter().rev() {
            let node = &mut self.nodes[ancestor as usize];
            let side = node.side_of(child);
            node.below[side as usize] += added;
            child = ancestor;
        }
    }

    /// Sets the value of a key, inserting it if it is missing; returns the value it replaces. Counts as an access of
    /// weight 1 in either case. An equal key that is present stays as it is. O(depth), and what the rule costs.
    ///
    /// # Panics
    ///
    /// If the key is missing and the tree holds [`MAX_KEYS`] keys.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let added = self.admit_key(&key, 1);
        match self.descend_counting(&key, added) {
            Descent::Found(at) => {
                self.adjust_after_hit(at);
                Some(core::mem::replace(&mut self.nodes[at as usize].value, value))
            }
            Descent::Missing(side) => {
                self.link_leaf(side, Node::leaf(key, value, added));
                None
            }
        }
    }

    /// As [`Self::admit`], where the key may become a new one. Checked before any counting, which cannot be undone.
    #[inline]
    fn admit_key(&mut self, key: &K, weight: u64) -> u64 {
        assert!(self.len() < MAX_KEYS || self.contains_key(key), "a tree holds at most {MAX_KEYS} keys");
        self.admit(weight)
    }

    fn link_leaf(&mut self, side: Side, leaf: Node<K, V>) {
        let at = self.nodes.len() as u32;
        self.nodes.push(leaf);
        match self.path.last() {
            None => self.root = at,
            Some(&parent) => self.nodes[parent as usize].links[side as usize] = at,
        }
        let Self { nodes, root, path, rotations, rule, .. } = self;
        rule.after_insert(&mut Climb { nodes, root, path, focus: at, rotations });
    }

    #[inline]
    fn adjust_after_hit(&mut self, at: u32) {
        let Self { nodes, root, path, rotations, rule, .. } = self;
        rule.after_hit(&mut Climb { nodes, root, path, focus: at, rotations });
    }
}

impl<K, V, R: Default> Default for CountingTree<K, V, R> {
    fn default() -> Self {
        Self::with_rule(R::default(), None)
    }
}

impl<K: fmt::Debug, V: fmt::Debug, R> fmt::Debug for CountingTree<K, V, R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord, V, R: RotationRule> Extend<(K, V)> for CountingTree<K, V, R> {
    /// Inserts each pair, counting each as an access of weight 1.
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, pairs: I) {
        for (key, value) in pairs {
            self.insert(key, value);
        }
    }
}

impl<K: Ord, V, R: RotationRule + Default> FromIterator<(K, V)> for CountingTree<K, V, R> {
    /// A tree without ageing, each pair inserted as by [`CountingTree::insert`].
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let mut tree = Self::default();
        tree.extend(pairs);
        tree
    }
}

impl<'a, K, V, R> IntoIterator for &'a CountingTree<K, V, R> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a, K: Ord, V, R> IntoIterator for &'a mut CountingTree<K, V, R> {
    type Item = (&'a K, &'a mut V);
    type IntoIter = IterMut<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

impl<K: Ord, V, R> IntoIterator for CountingTree<K, V, R> {
    type Item = (K, V);
    type IntoIter = IntoIter<K, V>;

    /// The keys and values by value, in key order. O(n log n), without further memory.
    fn into_iter(self) -> Self::IntoIter {
        IntoIter::new(self.nodes)
    }
}
