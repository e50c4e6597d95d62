//! What the shape of a tree costs.

use alloc::vec;

use crate::node::{NIL, Node};

/// Depths over all keys; the root has depth 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DepthStatistics {
    /// The depth of the deepest key.
    pub maximum: usize,
    /// The average over the keys. 0 for an empty tree.
    pub mean: f64,
    /// The average over the accesses: each key as often as its weight says. 0 if the total weight is 0.
    pub weighted_mean: f64,
    /// The sum over all keys of weight times depth: what each step of the lazy rule lowers.
    pub weighted_path_length: u128,
}

impl DepthStatistics {
    pub(crate) fn of<K, V>(nodes: &[Node<K, V>], root: u32) -> Self {
        let mut maximum = 0;
        let mut depth_sum = 0_u64;
        let mut weighted_path_length = 0_u128;
        let mut total_weight = 0_u64;
        let mut pending = vec![(root, 0_usize)];
        while let Some((at, depth)) = pending.pop() {
            if at == NIL {
                continue;
            }
            let node = &nodes[at as usize];
            maximum = maximum.max(depth);
            depth_sum += depth as u64;
            weighted_path_length += u128::from(node.own) * depth as u128;
            total_weight += node.own;
            pending.extend(node.links.map(|link| (link, depth + 1)));
        }
        Self {
            maximum,
            mean: depth_sum as f64 / nodes.len().max(1) as f64,
            weighted_mean: weighted_path_length as f64 / total_weight.max(1) as f64,
            weighted_path_length,
        }
    }
}
