//! Counting a sorted batch in one pass over tree and batch together.
//!
//! A descent for each key alone reads the upper levels once a key. The pass works on pieces of neighbouring keys, and reads
//! every node above a piece once, level by level; the nodes of one level do not depend on each other. Then it comes back
//! up through nodes that are still in the caches.
//!
//! 1. Down: a queue of nodes, each with the part of the batch that belongs into its subtree. The node's key cuts the part
//!    in two. All sums are final when a node has been taken from the queue.
//! 2. Parts that arrive at a missing child become subtrees, built from their weights.
//! 3. Up: the queue from its end, each node's children before the node. The rule may rotate inside the node's subtree.
//!    The nodes above have not moved yet, so the link to the subtree is still where it was.

use alloc::vec;
use alloc::vec::Vec;

use crate::build::link_sorted;
use crate::node::{NIL, Node, Side};
use crate::rule::{Climb, RotationRule};
use crate::tree::{CountingTree, MAX_KEYS, MAX_TOTAL_WEIGHT};

/// The batch is counted in pieces of so many keys. Enough for a level of the tree to have many nodes in it, few enough
/// for the nodes that were read on the way down to be still in the caches of memory and of addresses on the way up.
const PIECE_KEYS: usize = 128;

/// A node that the batch reached.
#[derive(Clone, Copy)]
struct Visit {
    at: u32,
    parent: u32,
    side: Side,
    /// The sides on which there is more of the batch.
    reached: [bool; 2],
    /// The part of the batch in the subtree.
    low: u32,
    high: u32,
}

/// A part of the batch that belongs where no node is. `parent` is [`NIL`] in an empty tree.
struct MissingRun {
    parent: u32,
    side: Side,
    low: u32,
    high: u32,
}

impl<K: Ord, V: Default, R: RotationRule> CountingTree<K, V, R> {
    /// Counts accesses of many keys at once: each key with the weight beside it, as by [`Self::touch`]. Missing keys are
    /// inserted. Weights and sums come out exactly as from touching the keys one by one in this order; the shape may
    /// differ.
    ///
    /// Afterwards the rule may adjust the tree along the paths that were read, from the leaves up
    /// ([`RotationRule::after_batch`]): under the lazy rules at most one step a node, under
    /// [`CbTree`](crate::CbTree) at most one step of two levels a node, under [`Splay`](crate::Splay) and
    /// [`SemiSplay`](crate::SemiSplay) nothing. Neighbouring missing keys come in as subtrees balanced by weight.
    ///
    /// `k` keys in a tree of `n` whose depth is near its logarithm take O(k·log(n/k + 2)) time, counted in nodes read. The
    /// batch is copied, with 8 bytes more a key; a chain of nodes costs memory in proportion to its length as well.
    ///
    /// # Panics
    ///
    /// If the keys do not strictly increase, before anything is counted. If the tree would hold more than [`MAX_KEYS`] keys.
    ///
    /// # Source
    ///
    /// Joint descent of a search tree and a sorted set as in G. Blelloch, D. Ferizovic and Y. Sun, "Just join for
    /// parallel ordered sets", SPAA 2016; there with recursion and joins, here level by level and with local rotations.
    ///
    /// ```
    /// let mut tree: lcbst::CountingTree<u64> = (0..1000).map(|page| (page, ())).collect();
    /// // The pages of one bitmap word.
    /// tree.touch_sorted((992..1024).map(|page| (page, 2)));
    /// assert_eq!((tree.weight(&999), tree.weight(&1000)), (Some(3), Some(2)));
    /// assert_eq!(tree.len(), 1024);
    /// ```
    pub fn touch_sorted<I: IntoIterator<Item = (K, u64)>>(&mut self, batch: I) {
        let batch: Vec<(K, u64)> = batch.into_iter().collect();
        if let Some(index) = batch.windows(2).position(|pair| pair[0].0 >= pair[1].0) {
            panic!("the keys of a batch must strictly increase; those at {index} and {} do not", index + 1);
        }
        let scale = self.decay.scale();
        let mut sum = 0_u64;
        let sums: Vec<u64> = core::iter::once(0)
            .chain(batch.iter().map(|(_, weight)| {
                sum = sum.saturating_add(weight.saturating_mul(scale));
                sum
            }))
            .collect();
        if sum > MAX_TOTAL_WEIGHT - self.total_weight() || batch.len() > MAX_KEYS - self.len() {
            // Some key may renormalise the tree, be counted in part or find no place. Which one depends on those before.
            for (key, weight) in batch {
                self.touch(key, weight);
            }
        } else {
            let mut rest = batch.into_iter();
            let (mut visits, mut missing) = (Vec::new(), Vec::new());
            // Into an empty tree the whole batch goes as one subtree.
            let piece_keys = if self.is_empty() { sums.len() } else { PIECE_KEYS };
            for sums in pieces(&sums, piece_keys) {
                self.count_piece(rest.as_slice(), sums, &mut visits, &mut missing);
                self.link_missing(&mut rest, sums, &mut missing);
                self.adjust_after_piece(&visits);
            }
        }
    }

    /// Adds the first keys of `batch`, as many as there are differences of `sums`, to the sums and own weights of all nodes
    /// that have a part in them.
    fn count_piece(
        &mut self,
        batch: &[(K, u64)],
        sums: &[u64],
        visits: &mut Vec<Visit>,
        missing: &mut Vec<MissingRun>,
    ) {
        visits.clear();
        let (low, high) = (0, sums.len() as u32 - 1);
        if self.root == NIL {
            missing.push(MissingRun { parent: NIL, side: Side::Left, low, high });
        } else {
            visits.push(Visit { at: self.root, parent: NIL, side: Side::Left, reached: [false; 2], low, high });
        }
        let mut next = 0;
        while next < visits.len() {
            let Visit { at, low, high, .. } = visits[next];
            let node = &mut self.nodes[at as usize];
            let (middle, after) = if high - low == 1 {
                // Most visits are of this kind. No branch depends on the key, so that the next visit can begin.
                let ordering = batch[low as usize].0.cmp(&node.key);
                (low + u32::from(ordering.is_lt()), low + u32::from(ordering.is_le()))
            } else {
                let part = &batch[low as usize..high as usize];
                match part.binary_search_by(|(key, _)| key.cmp(&node.key)) {
                    Ok(index) => (low + index as u32, low + index as u32 + 1),
                    Err(index) => (low + index as u32, low + index as u32),
                }
            };
            node.own += sums[after as usize] - sums[middle as usize];
            for (side, low, high) in [(Side::Left, low, middle), (Side::Right, after, high)] {
                if low == high {
                    continue;
                }
                node.below[side as usize] += sums[high as usize] - sums[low as usize];
                visits[next].reached[side as usize] = true;
                match node.links[side as usize] {
                    NIL => missing.push(MissingRun { parent: at, side, low, high }),
                    child => visits.push(Visit { at: child, parent: at, side, reached: [false; 2], low, high }),
                }
            }
            next += 1;
        }
    }

    /// Takes a piece out of the batch, and makes subtrees of those parts of it that no node was found for.
    fn link_missing(&mut self, rest: &mut vec::IntoIter<(K, u64)>, sums: &[u64], missing: &mut Vec<MissingRun>) {
        self.nodes.reserve(missing.iter().map(|run| (run.high - run.low) as usize).sum());
        missing.sort_unstable_by_key(|run| run.low);
        let mut taken = 0;
        for MissingRun { parent, side, low, high } in missing.drain(..) {
            let (low, high) = (low as usize, high as usize);
            rest.by_ref().take(low - taken).for_each(drop);
            let first = self.nodes.len();
            let own = sums[low..=high].windows(2).map(|pair| pair[1] - pair[0]);
            let keys = rest.by_ref().take(high - low).map(|(key, _)| key);
            self.nodes.extend(keys.zip(own).map(|(key, own)| Node::leaf(key, V::default(), own)));
            taken = high;
            let subtree = link_sorted(&mut self.nodes, first);
            match parent {
                NIL => self.root = subtree,
                parent => self.nodes[parent as usize].links[side as usize] = subtree,
            }
        }
        rest.take(sums.len() - 1 - taken).for_each(drop);
    }

    /// Lets the rule adjust the subtrees of the visited nodes, the deepest ones first.
    fn adjust_after_piece(&mut self, visits: &[Visit]) {
        let Self { nodes, root, path, rotations, rule, .. } = self;
        for &Visit { at, parent, side, reached, .. } in visits.iter().rev() {
            if reached == [false; 2] {
                continue;
            }
            path.clear();
            let mut top = at;
            rule.after_batch(&mut Climb { nodes, root: &mut top, path, focus: at, rotations }, reached);
            if top != at {
                match parent {
                    NIL => *root = top,
                    parent => nodes[parent as usize].links[side as usize] = top,
                }
            }
        }
    }
}

/// The prefix sums of each piece: those of neighbouring pieces share the one between them.
fn pieces(sums: &[u64], piece_keys: usize) -> impl Iterator<Item = &[u64]> {
    let keys = sums.len() - 1;
    (0..keys).step_by(piece_keys).map(move |first| &sums[first..=keys.min(first + piece_keys)])
}
