//! The hottest keys first, by best-first search.
//!
//! The weight of a subtree bounds the weight of every key in it. The search keeps the subtrees not yet opened in a heap
//! by that bound, and the keys found in another by their weight. It opens subtrees while one of them could still hold a
//! key that comes before the best key found; then that key is next. Cold subtrees are never opened.
//!
//! Where all keys are about as hot, sums prune nothing, and the search would open every subtree through a heap. The
//! top-k, which knows how many keys it must find, then gives up the search and scans the arena from end to end. It does
//! so at once where `k` is a large part of all keys.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::{Ordering, Reverse};
use core::iter::FusedIterator;

use crate::node::{NIL, Node};

/// To open a subtree costs a cache miss and some heap operations, about as much as to scan this many nodes in a row. So
/// a search that opens more than this part of the tree is given up for a scan, at about twice the cheaper cost at most.
const NODES_SCANNED_PER_OPENING: usize = 32;

/// The openings to expect for each key found, at the least. Where even these are too many, no search is begun.
const OPENINGS_PER_KEY: usize = 8;

/// This part of the openings is on trial. If fewer keys come of it than its share, divided by the lenience, the search is
/// given up then: later keys are less hot, and take no fewer openings each.
const TRIAL_PART: usize = 64;
const TRIAL_LENIENCE: usize = 4;

/// The keys in descending order of weight, those of equal weight in ascending order of key.
///
/// Created by [`CountingTree::hottest`](crate::CountingTree::hottest).
pub struct Hottest<'a, K, V> {
    nodes: &'a [Node<K, V>],
    subtrees: BinaryHeap<Subtree>,
    found: BinaryHeap<Found<'a, K>>,
    remaining: usize,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Subtree {
    bound: u64,
    at: u32,
}

struct Found<'a, K> {
    weight: u64,
    key: &'a K,
}

impl<'a, K: Ord, V> Hottest<'a, K, V> {
    pub(crate) fn new(nodes: &'a [Node<K, V>], root: u32) -> Self {
        let mut subtrees = BinaryHeap::new();
        if root != NIL {
            subtrees.push(Subtree { bound: nodes[root as usize].total(), at: root });
        }
        Self { nodes, subtrees, found: BinaryHeap::new(), remaining: nodes.len() }
    }

    /// Opens subtrees until the best key found comes before all others, and returns true; or returns false after so
    /// many openings.
    fn settle(&mut self, openings: &mut usize) -> bool {
        // A subtree that ties with the best key is opened too: it may hold a lesser key of the same weight.
        while let Some(subtree) = self.subtrees.peek()
            && self.found.peek().is_none_or(|best| subtree.bound >= best.weight)
        {
            if *openings == 0 {
                return false;
            }
            *openings -= 1;
            let at = subtree.at;
            self.subtrees.pop();
            self.open(at);
        }
        true
    }

    fn open(&mut self, at: u32) {
        let node = &self.nodes[at as usize];
        self.found.push(Found::at(node));
        for (&link, &bound) in node.links.iter().zip(&node.below) {
            if link != NIL {
                self.subtrees.push(Subtree { bound, at: link });
            }
        }
    }

    /// The number of nodes opened so far.
    #[cfg(test)]
    pub(crate) fn opened(&self) -> usize {
        self.found.len() + self.nodes.len() - self.remaining
    }

    fn pop(&mut self) -> Option<(&'a K, u64)> {
        let best = self.found.pop()?;
        self.remaining -= 1;
        Some((best.key, best.weight))
    }
}

impl<'a, K: Ord, V> Iterator for Hottest<'a, K, V> {
    type Item = (&'a K, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let mut unlimited = usize::MAX;
        self.settle(&mut unlimited);
        self.pop()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}

impl<K: Ord, V> ExactSizeIterator for Hottest<'_, K, V> {}
impl<K: Ord, V> FusedIterator for Hottest<'_, K, V> {}

/// The first `k` that [`Hottest`] yields.
pub(crate) fn top_k<K: Ord, V>(nodes: &[Node<K, V>], root: u32, k: usize) -> Vec<(&K, u64)> {
    let k = k.min(nodes.len());
    let budget = nodes.len() / NODES_SCANNED_PER_OPENING;
    if k > budget / OPENINGS_PER_KEY {
        return scan(nodes, k);
    }
    let mut search = Hottest::new(nodes, root);
    let mut top = Vec::with_capacity(k);
    // The first openings on trial, and the others if enough keys came of them.
    let trial = budget / TRIAL_PART;
    let mut openings = trial;
    let mut on_trial = true;
    while top.len() < k {
        if search.settle(&mut openings) {
            top.extend(search.pop());
        } else if on_trial && top.len() * TRIAL_PART * TRIAL_LENIENCE >= k {
            (openings, on_trial) = (budget - trial, false);
        } else {
            return scan(nodes, k);
        }
    }
    top
}

/// As [`top_k`], by looking at every node: O(n + k log k) time where weights come in no particular order, O(k) memory. `k`
/// is at most the number of nodes.
fn scan<K: Ord, V>(nodes: &[Node<K, V>], k: usize) -> Vec<(&K, u64)> {
    if k == 0 {
        return Vec::new();
    }
    // Keys that may be among the best gather until there are twice as many as wanted. Then the better half stays, and
    // what is no better than the worst of these is not gathered any more.
    let mut best: Vec<Reverse<Found<'_, K>>> = Vec::with_capacity((2 * k).min(nodes.len()));
    let (mut least, mut worst) = (0, None);
    for node in nodes {
        if node.own < least || worst.as_ref().is_some_and(|worst| Found::at(node) < *worst) {
            continue;
        }
        best.push(Reverse(Found::at(node)));
        if best.len() == 2 * k {
            let (_, Reverse(middle), _) = best.select_nth_unstable(k - 1);
            (least, worst) = (middle.weight, Some(Found { weight: middle.weight, key: middle.key }));
            best.truncate(k);
        }
    }
    if best.len() > k {
        best.select_nth_unstable(k - 1);
        best.truncate(k);
    }
    best.sort_unstable();
    best.into_iter().map(|Reverse(found)| (found.key, found.weight)).collect()
}

impl<'a, K> Found<'a, K> {
    fn at<V>(node: &'a Node<K, V>) -> Self {
        Self { weight: node.own, key: &node.key }
    }
}

impl<K: Ord> Ord for Found<'_, K> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.weight.cmp(&other.weight).then_with(|| other.key.cmp(self.key))
    }
}

impl<K: Ord> PartialOrd for Found<'_, K> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K: Ord> PartialEq for Found<'_, K> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<K: Ord> Eq for Found<'_, K> {}
