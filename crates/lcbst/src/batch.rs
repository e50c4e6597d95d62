//! Counting a sorted batch in one pass over tree and batch together.
//!
//! A descent for each key alone reads the upper levels once a key. The pass works on pieces of neighbouring keys, and reads
//! every node above a piece once, level by level; the nodes of one level do not depend on each other. Then it comes back
//! up through nodes that are still in the caches.
//!
//! 1. Down: a queue of nodes, each with the part of the batch that belongs into its subtree. The node's key cuts the part
//!    in two. A part of one key goes into a queue of its own, where a visit takes no branch that depends on the data, so
//!    that the processor has many of them under way at once. All sums are final when a node has been visited.
//! 2. Parts that arrive at a missing child become subtrees, built from their weights.
//! 3. Up: both queues from their ends, that of the single keys first, so each node's children before the node. The rule
//!    may rotate inside the node's subtree. The nodes above have not moved yet, so the link to the subtree is still where
//!    it was. This is also when the caller sees the values of the keys that were found, for the same reason: the nodes are
//!    in the caches, and whether a key was found is asked here anyway.
//!
//! A batch in which so many keys are new that hardly any node would stay where it was is not worth descending for. It is
//! merged with the nodes in key order, and the tree is built anew.

use alloc::vec;
use alloc::vec::Vec;

use crate::build::link_sorted;
use crate::node::{NIL, Node, Side};
use crate::rule::{Climb, RotationRule};
use crate::tree::{CountingTree, Descent, MAX_KEYS, MAX_TOTAL_WEIGHT};

/// The batch is counted in pieces of so many keys. Enough for a level of the tree to have many nodes in it, few enough
/// for the nodes that were read on the way down to be still in the caches of memory and of addresses on the way up.
const PIECE_KEYS: usize = 256;

/// A batch of so many keys or more may rebuild the tree.
const REBUILD_LEAST_KEYS: usize = if cfg!(test) { 8 } else { 64 };

/// The tree is rebuilt if at least this part of all nodes is new then. Measured with 10^4 to 10^6 nodes that lie in order:
/// from a fifth on a rebuild takes less time than descents, and leaves the nodes in order.
const REBUILD_NEW_PART: usize = 5;

/// So many keys of the batch are looked for to estimate how many are new.
const REBUILD_SAMPLES: usize = if cfg!(test) { 4 } else { 32 };

/// A node that more than one key of the batch reached.
#[derive(Clone, Copy)]
struct Visit {
    at: u32,
    parent: u32,
    side: Side,
    /// The sides on which there is more of the batch.
    reached: [bool; 2],
    /// Whether the node's own key is in the batch.
    is_here: bool,
    /// The part of the batch in the subtree.
    low: u32,
    high: u32,
}

/// A node that one key of the batch reached: the node of that key, unless the batch goes on to one of its sides.
#[derive(Clone, Copy)]
struct SingleVisit {
    at: u32,
    parent: u32,
    side: Side,
    reached: [bool; 2],
    /// Which key.
    index: u32,
}

impl SingleVisit {
    const NONE: Self = Self { at: NIL, parent: NIL, side: Side::Left, reached: [false; 2], index: 0 };
}

/// What is to be done with a piece of the batch; kept from piece to piece to reuse the memory.
#[derive(Default)]
struct Work {
    visits: Vec<Visit>,
    /// The first `single_visits` count; those behind are there to be overwritten.
    singles: Vec<SingleVisit>,
    single_visits: usize,
    missing: Vec<MissingRun>,
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
    /// [`SemiSplay`](crate::SemiSplay) nothing. Neighbouring missing keys come in as subtrees balanced by weight. But where
    /// a large batch looks, by a sample, as if a fifth of all keys would be new, the tree is instead built anew under any
    /// rule, balanced by weight as by [`Self::retain`].
    ///
    /// `k` keys in a tree of `n` whose depth is near its logarithm take O(k·log(n/k + 2)) time, counted in nodes read. The
    /// batch is copied, with 8 bytes more a key; a chain of nodes costs memory in proportion to its length as well. A
    /// rebuild takes O(n + k) time if the keys lie in memory in order, as one rebuild leaves them for the next, and what
    /// [`Self::arrange`] takes if not; and in between memory for half of the keys at most.
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
        self.touch_sorted_with(batch, |_, _| ());
    }

    /// As [`Self::touch_sorted`], and calls a function once with each key of the batch and its value, to change the
    /// value. A key that was missing comes with the default value. The keys come in no particular order.
    ///
    /// Costs as much as [`Self::touch_sorted`] and the calls. If the function panics, the tree keeps its invariants; keys
    /// of the batch may be counted without a call, or not be counted.
    ///
    /// # Panics
    ///
    /// As [`Self::touch_sorted`].
    ///
    /// ```
    /// let mut last_seen: lcbst::CountingTree<u64, u32> = lcbst::CountingTree::new();
    /// last_seen.touch_sorted_with((0..10).map(|page| (page, 1)), |_, epoch| *epoch = 1);
    /// last_seen.touch_sorted_with([(3, 1), (12, 1)], |_, epoch| *epoch = 2);
    /// assert_eq!([2, 3, 12].map(|page| last_seen.get(&page).copied()), [Some(1), Some(2), Some(2)]);
    /// ```
    pub fn touch_sorted_with<I, F>(&mut self, batch: I, mut change: F)
    where
        I: IntoIterator<Item = (K, u64)>,
        F: FnMut(&K, &mut V),
    {
        let batch: Vec<(K, u64)> = batch.into_iter().collect();
        if let Some(index) = batch.windows(2).position(|pair| pair[0].0 >= pair[1].0) {
            panic!("the keys of a batch must strictly increase; those at {index} and {} do not", index + 1);
        }
        if batch.len() <= MAX_KEYS - self.len() && !self.admits(&batch) {
            // Some key would renormalise the tree. That this comes before all of the batch changes no weight: what is added
            // to one is a multiple of what the weights are divided by.
            self.renormalise();
        }
        if batch.len() > MAX_KEYS - self.len() || !self.admits(&batch) {
            // Some key may be counted in part or find no place. Which one depends on those before.
            for (key, weight) in batch {
                self.touch_with(key, weight, &mut change);
            }
        } else if self.is_worth_rebuilding(&batch) {
            self.rebuild_with(batch, &mut change);
        } else {
            let scale = self.decay.scale();
            let mut sum = 0;
            let sums: Vec<u64> = core::iter::once(0)
                .chain(batch.iter().map(|(_, weight)| {
                    sum += weight * scale;
                    sum
                }))
                .collect();
            let mut rest = batch.into_iter();
            let mut work = Work::default();
            // Into an empty tree the whole batch goes as one subtree.
            let piece_keys = if self.is_empty() { sums.len() } else { PIECE_KEYS };
            for sums in pieces(&sums, piece_keys) {
                self.count_piece(rest.as_slice(), sums, &mut work);
                self.link_missing(&mut rest, sums, &mut work.missing, &mut change);
                self.adjust_after_piece(&work, &mut change);
            }
        }
    }

    /// Whether the tree has room for all of these weights as they are.
    fn admits(&self, batch: &[(K, u64)]) -> bool {
        let scale = self.decay.scale();
        let sum = batch.iter().fold(0_u64, |sum, (_, weight)| sum.saturating_add(weight.saturating_mul(scale)));
        sum <= MAX_TOTAL_WEIGHT - self.total_weight()
    }

    /// Whether enough of the keys seem to be new. Evenly spaced ones are looked for, O(depth) each; a wrong guess costs
    /// time and nothing else.
    fn is_worth_rebuilding(&self, batch: &[(K, u64)]) -> bool {
        if self.is_empty() || batch.len() < REBUILD_LEAST_KEYS.max(self.len() / REBUILD_NEW_PART) {
            return false;
        }
        let sample = (0..REBUILD_SAMPLES).map(|sample| &batch[sample * batch.len() / REBUILD_SAMPLES].0);
        let new = sample.filter(|&key| !self.contains_key(key)).count() * batch.len() / REBUILD_SAMPLES;
        new * REBUILD_NEW_PART >= self.len() + new
    }

    /// Counts a batch that the tree has room for, by merging it with all nodes.
    fn rebuild_with(&mut self, mut batch: Vec<(K, u64)>, change: &mut impl FnMut(&K, &mut V)) {
        self.sort_nodes();
        let scale = self.decay.scale();
        // Where the keys of the batch will be.
        let mut places: Vec<u32> = Vec::with_capacity(batch.len());
        let (mut next, mut missing) = (0, 0);
        batch.retain(|(key, weight)| {
            while self.nodes.get(next).is_some_and(|node| node.key < *key) {
                next += 1;
            }
            places.push((next + missing) as u32);
            match self.nodes.get_mut(next) {
                Some(node) if node.key == *key => {
                    node.own += weight * scale;
                    false
                }
                _ => {
                    missing += 1;
                    true
                }
            }
        });
        self.make_room(batch.len());
        self.nodes.extend(batch.into_iter().map(|(key, weight)| Node::leaf(key, V::default(), weight * scale)));
        self.merge_nodes();
        self.root = link_sorted(&mut self.nodes, 0);
        // Not before all are linked, in case a call panics.
        for at in places {
            let node = &mut self.nodes[at as usize];
            change(&node.key, &mut node.value);
        }
    }

    /// As [`Self::touch`], with a call for the value.
    fn touch_with(&mut self, key: K, weight: u64, change: &mut impl FnMut(&K, &mut V)) {
        let at = match self.descend(&key) {
            Descent::Found(at) => {
                self.count_hit(at, weight);
                at as usize
            }
            Descent::Missing(_) => {
                self.touch(key, weight);
                // Rotations move no node, so the new one is where it was put: at the end.
                self.nodes.len() - 1
            }
        };
        let node = &mut self.nodes[at];
        change(&node.key, &mut node.value);
    }

    /// Adds the first keys of `batch`, as many as there are differences of `sums`, to the sums and own weights of all nodes
    /// that have a part in them.
    fn count_piece(&mut self, batch: &[(K, u64)], sums: &[u64], work: &mut Work) {
        work.visits.clear();
        work.single_visits = 0;
        work.reach(self.root, NIL, Side::Left, 0, sums.len() as u32 - 1);
        let (mut next, mut fetched) = (0, 0);
        while next < work.visits.len() {
            if next == fetched {
                // A level of the tree lies in the queue. Its nodes do not depend on each other.
                fetched = work.visits.len();
                self.fetch(work.visits[next..].iter().map(|visit| visit.at));
            }
            let Visit { at, low, high, .. } = work.visits[next];
            let node = &mut self.nodes[at as usize];
            let part = &batch[low as usize..high as usize];
            let (middle, after) = match part.binary_search_by(|(key, _)| key.cmp(&node.key)) {
                Ok(index) => (low + index as u32, low + index as u32 + 1),
                Err(index) => (low + index as u32, low + index as u32),
            };
            node.own += sums[after as usize] - sums[middle as usize];
            work.visits[next].is_here = middle < after;
            for (side, low, high) in [(Side::Left, low, middle), (Side::Right, after, high)] {
                if low < high {
                    node.below[side as usize] += sums[high as usize] - sums[low as usize];
                    work.visits[next].reached[side as usize] = true;
                    work.reach(node.links[side as usize], at, side, low, high);
                }
            }
            next += 1;
        }
        self.count_singles(batch, sums, work);
    }

    /// Takes all keys that are alone in their part of the batch down to their nodes, a level at a time.
    fn count_singles(&mut self, batch: &[(K, u64)], sums: &[u64], work: &mut Work) {
        let (mut level, mut end) = (0, work.single_visits);
        while level < end {
            let reached = 2 * end - level;
            if work.singles.len() < reached {
                work.singles.resize(reached, SingleVisit::NONE);
            }
            self.fetch(work.singles[level..end].iter().map(|visit| visit.at));
            let mut onward = end;
            for next in level..end {
                let visit = &mut work.singles[next];
                let SingleVisit { at, index, .. } = *visit;
                let node = &mut self.nodes[at as usize];
                let added = sums[index as usize + 1] - sums[index as usize];
                let ordering = batch[index as usize].0.cmp(&node.key);
                let (is_here, side) = (ordering.is_eq(), if ordering.is_gt() { Side::Right } else { Side::Left });
                let child = node.links[side as usize];
                // A product, because the choice between two values would be compiled to a branch.
                let here = added * u64::from(is_here);
                node.own += here;
                node.below[side as usize] += added - here;
                visit.reached[side as usize] = !is_here;
                if child == NIL && !is_here {
                    work.missing.push(MissingRun { parent: at, side, low: index, high: index + 1 });
                }
                work.singles[onward] = SingleVisit { at: child, parent: at, side, reached: [false; 2], index };
                onward += usize::from(!is_here & (child != NIL));
            }
            (level, end) = (end, onward);
        }
        work.single_visits = end;
    }

    /// Reads nodes for no other end than that they are in the caches afterwards. Nothing is decided by what is read, so the
    /// processor waits for many of them at once.
    #[inline]
    fn fetch(&self, positions: impl Iterator<Item = u32>) {
        // Two fields: a node may lie on two cache lines.
        core::hint::black_box(positions.fold(0, |read, at| {
            let node = &self.nodes[at as usize];
            read ^ node.below[0] ^ u64::from(node.links[1])
        }));
    }

    /// Takes a piece out of the batch, and makes subtrees of those parts of it that no node was found for.
    fn link_missing(
        &mut self,
        rest: &mut vec::IntoIter<(K, u64)>,
        sums: &[u64],
        missing: &mut Vec<MissingRun>,
        change: &mut impl FnMut(&K, &mut V),
    ) {
        let known = self.nodes.len();
        self.make_room(missing.iter().map(|run| (run.high - run.low) as usize).sum());
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
        // Not before all are linked, in case a call panics.
        for node in &mut self.nodes[known..] {
            change(&node.key, &mut node.value);
        }
    }

    /// Makes room for so many nodes more. Room for an eighth of the nodes at the least, so that growth is paid for by
    /// the nodes that come; and not for as many again, as `Vec` has it, because a tree filled by batches is large, and
    /// its nodes are nearly all of its memory.
    fn make_room(&mut self, additional: usize) {
        if self.nodes.capacity() - self.nodes.len() < additional {
            self.nodes.reserve_exact(additional.max(self.nodes.len() / 8));
        }
    }

    /// Hands out the values of the visited nodes whose keys are in the batch, and lets the rule adjust the subtrees of the
    /// others, the deepest ones first.
    fn adjust_after_piece(&mut self, work: &Work, change: &mut impl FnMut(&K, &mut V)) {
        for &SingleVisit { at, parent, side, reached, .. } in work.singles[..work.single_visits].iter().rev() {
            if reached == [false; 2] {
                let node = &mut self.nodes[at as usize];
                change(&node.key, &mut node.value);
            } else {
                self.adjust_after_visit(at, parent, side, reached);
            }
        }
        for &Visit { at, parent, side, reached, is_here, .. } in work.visits.iter().rev() {
            if is_here {
                let node = &mut self.nodes[at as usize];
                change(&node.key, &mut node.value);
            }
            self.adjust_after_visit(at, parent, side, reached);
        }
    }

    #[inline]
    fn adjust_after_visit(&mut self, at: u32, parent: u32, side: Side, reached: [bool; 2]) {
        if !R::ADJUSTS_AFTER_BATCH {
            return;
        }
        let Self { nodes, root, path, rotations, rule, .. } = self;
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

impl Work {
    /// A part of the batch, which is not empty, belongs under this link.
    fn reach(&mut self, at: u32, parent: u32, side: Side, low: u32, high: u32) {
        if at == NIL {
            self.missing.push(MissingRun { parent, side, low, high });
        } else if high - low > 1 {
            self.visits.push(Visit { at, parent, side, reached: [false; 2], is_here: false, low, high });
        } else {
            let visit = SingleVisit { at, parent, side, reached: [false; 2], index: low };
            match self.singles.get_mut(self.single_visits) {
                Some(slot) => *slot = visit,
                None => self.singles.push(visit),
            }
            self.single_visits += 1;
        }
    }
}

/// The prefix sums of each piece: those of neighbouring pieces share the one between them.
fn pieces(sums: &[u64], piece_keys: usize) -> impl Iterator<Item = &[u64]> {
    let keys = sums.len() - 1;
    (0..keys).step_by(piece_keys).map(move |first| &sums[first..=keys.min(first + piece_keys)])
}
