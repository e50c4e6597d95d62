//! Tests that look at the nodes themselves. Each file takes one subject; `model` holds the random ones.

mod ageing;
mod batch;
mod every_rule;
mod map;
mod model;
mod printed;
mod printed_tables;
mod rules;
mod top;

use std::vec;
use std::vec::Vec;

use proptest::test_runner::Config as ProptestConfig;

use crate::node::{NIL, Node};
use crate::{CountingTree, MAX_TOTAL_WEIGHT};

impl<K: Ord, V, R> CountingTree<K, V, R> {
    /// Every invariant of the crate's documentation that one state can show.
    pub(crate) fn check_invariants(&self) {
        let mut seen = vec![false; self.nodes.len()];
        let mut in_order = Vec::new();
        let (mut pending, mut at) = (Vec::new(), self.root);
        while at != NIL || !pending.is_empty() {
            if at == NIL {
                at = pending.pop().expect("one of the two is left");
                in_order.push(at);
                at = self.nodes[at as usize].links[1];
            } else {
                assert!(!seen[at as usize], "two links lead to node {at}");
                seen[at as usize] = true;
                pending.push(at);
                at = self.nodes[at as usize].links[0];
            }
        }
        assert_eq!(in_order.len(), self.nodes.len(), "some node cannot be reached");
        assert_eq!(self.len(), self.nodes.len());
        for pair in in_order.windows(2) {
            assert!(self.nodes[pair[0] as usize].key < self.nodes[pair[1] as usize].key, "keys out of order");
        }

        // Sums by another way than the tree's own: an interval of the prefix sums in key order.
        let mut prefix = vec![0_u64];
        for &at in &in_order {
            prefix.push(prefix.last().expect("never empty") + self.nodes[at as usize].own);
        }
        let mut rank = vec![0; self.nodes.len()];
        for (position, &at) in in_order.iter().enumerate() {
            rank[at as usize] = position;
        }
        let mut pending = vec![(self.root, 0, self.nodes.len())];
        while let Some((at, low, high)) = pending.pop() {
            if at == NIL {
                assert_eq!(low, high);
                continue;
            }
            let (node, middle) = (&self.nodes[at as usize], rank[at as usize]);
            assert_eq!(node.below[0], prefix[middle] - prefix[low], "the left sum of node {at}");
            assert_eq!(node.below[1], prefix[high] - prefix[middle + 1], "the right sum of node {at}");
            pending.push((node.links[0], low, middle));
            pending.push((node.links[1], middle + 1, high));
        }
        assert_eq!(self.total_weight(), prefix[self.nodes.len()]);
        assert!(self.total_weight() <= MAX_TOTAL_WEIGHT);
    }

    /// The depths of all keys in key order, which determine the shape.
    pub(crate) fn shape(&self) -> Vec<usize> {
        self.keys().map(|key| self.depth(key).expect("the key is there")).collect()
    }
}

/// How much of a test to run: all of it, or few steps on few keys under Miri, which takes some hundred times as long. What
/// comes of many is looked at in the ordinary runs.
pub(crate) const fn all_or_few<T: Copy>(all: T, few: T) -> T {
    if cfg!(miri) { few } else { all }
}

/// The same for random operations. Miri keeps tests away from the file system, in which failures would be remembered; they
/// come again with the same seed of Miri.
pub(crate) fn all_or_few_cases(all: ProptestConfig) -> ProptestConfig {
    if cfg!(miri) { ProptestConfig { cases: 2, failure_persistence: None, ..all } } else { all }
}

/// The sum of weight times depth, by another way than `DepthStatistics`: each weight is in one sum per ancestor.
pub(crate) fn weighted_path_length<K, V>(nodes: &[Node<K, V>]) -> u128 {
    nodes.iter().map(|node| u128::from(node.below[0]) + u128::from(node.below[1])).sum()
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014): a seed in, the same sequence on every machine.
pub(crate) struct SplitMix(pub(crate) u64);

impl SplitMix {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Skewed towards 0: each next power of two is about as likely as the one before.
    pub(crate) fn skewed(&mut self, below: u64) -> u64 {
        let bits = self.next() % u64::from(u64::BITS - below.leading_zeros());
        (self.next() % (2 << bits)).min(below - 1)
    }
}
