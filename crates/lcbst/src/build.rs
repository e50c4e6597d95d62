//! A tree from sorted nodes, by weight.
//!
//! Source: the bisection rule of K. Mehlhorn, "Nearly optimal binary search trees", Acta Informatica 5, 1975. The root
//! of each part is the key in which the middle of the part's weight lies, so that neither side is heavier than half of
//! the part, and a key of weight `c` in a part of weight `M` comes to a depth of at most log₂(M/c) + 1.

use alloc::vec::Vec;

use crate::node::{NIL, Node};

/// Links nodes that lie in key order from position `first` to the end of the arena, and computes their sums from their
/// own weights. Returns the root, or [`NIL`] if there are no such nodes. Parts without any weight are cut at the
/// middle key. O(n log n) time and 8 bytes of memory a node.
pub(crate) fn link_sorted<K, V>(nodes: &mut [Node<K, V>], first: usize) -> u32 {
    if let [leaf] = &mut nodes[first..] {
        (leaf.links, leaf.below) = ([NIL; 2], [0; 2]);
        return first as u32;
    }
    let mut sums = Vec::with_capacity(nodes.len() - first + 1);
    let mut sum = 0;
    sums.push(sum);
    sums.extend(nodes[first..].iter().map(|node| {
        sum += node.own;
        sum
    }));

    let root_of = |low: usize, high: usize| {
        let (below, total) = (sums[low], sums[high] - sums[low]);
        if total == 0 {
            return low + (high - low) / 2;
        }
        // The first key behind which at least half of the weight lies; it has weight itself.
        low + sums[low + 1..high].partition_point(|&sum| sum - below < total.div_ceil(2))
    };
    // Parts that are not empty, with their roots.
    let mut pending: Vec<(usize, usize, usize)> = Vec::new();
    let link_of = |low: usize, high: usize, pending: &mut Vec<_>| {
        if low == high {
            return NIL;
        }
        let middle = root_of(low, high);
        pending.push((low, high, middle));
        (first + middle) as u32
    };

    let root = link_of(0, nodes.len() - first, &mut pending);
    while let Some((low, high, middle)) = pending.pop() {
        let node = &mut nodes[first + middle];
        node.links = [link_of(low, middle, &mut pending), link_of(middle + 1, high, &mut pending)];
        node.below = [sums[middle] - sums[low], sums[high] - sums[middle + 1]];
    }
    root
}
