//! Iteration in key order, from both ends, over all keys or a range.
//!
//! Without parent links an iterator keeps the nodes still to be visited above its position: O(depth) memory, amortised
//! O(1) time a key.

use alloc::vec::{self, Vec};
use core::borrow::Borrow;
use core::iter::{self, FusedIterator};
use core::ops::{Bound, RangeBounds};

use crate::node::{NIL, Node, Side};

/// The nodes of a range in key order.
struct Nodes<'a, K, V> {
    nodes: &'a [Node<K, V>],
    /// The next node from the front is on top.
    front: Vec<u32>,
    /// The next node from the back is on top.
    back: Vec<u32>,
    finished: bool,
}

impl<'a, K, V> Nodes<'a, K, V> {
    fn all(nodes: &'a [Node<K, V>], root: u32) -> Self {
        let mut all = Self { nodes, front: Vec::new(), back: Vec::new(), finished: root == NIL };
        push_spine(nodes, &mut all.front, root, Side::Left);
        push_spine(nodes, &mut all.back, root, Side::Right);
        all
    }

    fn range<Q: Ord + ?Sized>(nodes: &'a [Node<K, V>], root: u32, range: &impl RangeBounds<Q>) -> Self
    where
        K: Ord + Borrow<Q>,
    {
        let (mut front, mut back) = (Vec::new(), Vec::new());
        let mut at = root;
        while at != NIL {
            let node = &nodes[at as usize];
            at = if reaches_start(node.key.borrow(), range.start_bound()) {
                front.push(at);
                node.links[Side::Left as usize]
            } else {
                node.links[Side::Right as usize]
            };
        }
        at = root;
        while at != NIL {
            let node = &nodes[at as usize];
            at = if reaches_end(node.key.borrow(), range.end_bound()) {
                back.push(at);
                node.links[Side::Right as usize]
            } else {
                node.links[Side::Left as usize]
            };
        }
        let finished = match (front.last(), back.last()) {
            (Some(&first), Some(&last)) => nodes[first as usize].key > nodes[last as usize].key,
            (None, _) | (_, None) => true,
        };
        Self { nodes, front, back, finished }
    }

    fn step(&mut self, from: Side) -> Option<&'a Node<K, V>> {
        self.step_position(from).map(|at| &self.nodes[at as usize])
    }

    fn step_position(&mut self, from: Side) -> Option<u32> {
        if self.finished {
            return None;
        }
        // Both ends point into the range, the front never beyond the back: they end by meeting at the last node.
        self.finished = self.front.last() == self.back.last();
        let (stack, onward) = match from {
            Side::Left => (&mut self.front, Side::Right),
            Side::Right => (&mut self.back, Side::Left),
        };
        let at = stack.pop()?;
        push_spine(self.nodes, stack, self.nodes[at as usize].links[onward as usize], from);
        Some(at)
    }
}

// Derived, it would ask for `K: Clone` and `V: Clone`.
impl<K, V> Clone for Nodes<'_, K, V> {
    fn clone(&self) -> Self {
        Self { nodes: self.nodes, front: self.front.clone(), back: self.back.clone(), finished: self.finished }
    }
}

fn push_spine<K, V>(nodes: &[Node<K, V>], stack: &mut Vec<u32>, mut at: u32, side: Side) {
    while at != NIL {
        stack.push(at);
        at = nodes[at as usize].links[side as usize];
    }
}

fn reaches_start<Q: Ord + ?Sized>(key: &Q, start: Bound<&Q>) -> bool {
    match start {
        Bound::Included(start) => key >= start,
        Bound::Excluded(start) => key > start,
        Bound::Unbounded => true,
    }
}

fn reaches_end<Q: Ord + ?Sized>(key: &Q, end: Bound<&Q>) -> bool {
    match end {
        Bound::Included(end) => key <= end,
        Bound::Excluded(end) => key < end,
        Bound::Unbounded => true,
    }
}

/// All keys and values in key order. Created by [`CountingTree::iter`](crate::CountingTree::iter).
pub struct Iter<'a, K, V> {
    nodes: Nodes<'a, K, V>,
    remaining: usize,
}

impl<'a, K, V> Iter<'a, K, V> {
    pub(crate) fn new(nodes: &'a [Node<K, V>], root: u32) -> Self {
        Self { nodes: Nodes::all(nodes, root), remaining: nodes.len() }
    }
}

/// All keys in key order. Created by [`CountingTree::keys`](crate::CountingTree::keys).
pub struct Keys<'a, K, V>(Iter<'a, K, V>);

impl<'a, K, V> Keys<'a, K, V> {
    pub(crate) fn new(nodes: &'a [Node<K, V>], root: u32) -> Self {
        Self(Iter::new(nodes, root))
    }
}

/// All keys and their stored weights in key order. Created by [`CountingTree::weights`](crate::CountingTree::weights).
pub struct Weights<'a, K, V> {
    nodes: Nodes<'a, K, V>,
    remaining: usize,
}

impl<'a, K, V> Weights<'a, K, V> {
    pub(crate) fn new(nodes: &'a [Node<K, V>], root: u32) -> Self {
        Self { nodes: Nodes::all(nodes, root), remaining: nodes.len() }
    }
}

/// All values in key order. Created by [`CountingTree::values`](crate::CountingTree::values).
pub struct Values<'a, K, V>(Iter<'a, K, V>);

impl<'a, K, V> Values<'a, K, V> {
    pub(crate) fn new(nodes: &'a [Node<K, V>], root: u32) -> Self {
        Self(Iter::new(nodes, root))
    }
}

/// Keys and values in key order, the values to change. Created by
/// [`CountingTree::iter_mut`](crate::CountingTree::iter_mut) and
/// [`CountingTree::range_mut`](crate::CountingTree::range_mut).
///
/// All references are taken out of the arena beforehand, because without `unsafe` no iterator can follow links and hand
/// out what it has passed.
pub struct IterMut<'a, K, V>(iter::Flatten<vec::IntoIter<Option<(&'a K, &'a mut V)>>>, usize);

impl<'a, K: Ord, V> IterMut<'a, K, V> {
    pub(crate) fn range<Q: Ord + ?Sized>(nodes: &'a mut [Node<K, V>], root: u32, range: &impl RangeBounds<Q>) -> Self
    where
        K: Borrow<Q>,
    {
        let mut visited = Nodes::range(nodes, root, range);
        // The node's position in the arena above its rank in key order, so that a sort tells the ranks by position.
        let mut places: Vec<u64> = Vec::new();
        while let Some(at) = visited.step_position(Side::Left) {
            places.push(u64::from(at) << 32 | places.len() as u64);
        }
        places.sort_unstable();
        let mut in_order: Vec<Option<(&K, &mut V)>> = places.iter().map(|_| None).collect();
        let mut rest = nodes.iter_mut();
        let mut next = 0;
        for place in places {
            let (at, rank) = ((place >> 32) as usize, place as u32 as usize);
            in_order[rank] = rest.nth(at - next).map(|node| (&node.key, &mut node.value));
            next = at + 1;
        }
        let length = in_order.len();
        Self(in_order.into_iter().flatten(), length)
    }
}

/// All values in key order, to change. Created by [`CountingTree::values_mut`](crate::CountingTree::values_mut).
pub struct ValuesMut<'a, K, V>(pub(crate) IterMut<'a, K, V>);

/// The keys and values of a range in key order. Created by [`CountingTree::range`](crate::CountingTree::range).
pub struct Range<'a, K, V>(Nodes<'a, K, V>);

impl<'a, K, V> Range<'a, K, V> {
    pub(crate) fn new<Q: Ord + ?Sized>(nodes: &'a [Node<K, V>], root: u32, range: &impl RangeBounds<Q>) -> Self
    where
        K: Ord + Borrow<Q>,
    {
        Self(Nodes::range(nodes, root, range))
    }
}

/// All keys and values by value, in key order.
pub struct IntoIter<K, V>(vec::IntoIter<Node<K, V>>);

impl<K: Ord, V> IntoIter<K, V> {
    /// Sorts the arena in place: O(n log n), but no second copy of the nodes.
    pub(crate) fn new(mut nodes: Vec<Node<K, V>>) -> Self {
        nodes.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Self(nodes.into_iter())
    }
}

impl<K, V> Clone for Iter<'_, K, V> {
    fn clone(&self) -> Self {
        Self { nodes: self.nodes.clone(), remaining: self.remaining }
    }
}

impl<K, V> Clone for Keys<'_, K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, V> Clone for Values<'_, K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, V> Clone for Weights<'_, K, V> {
    fn clone(&self) -> Self {
        Self { nodes: self.nodes.clone(), remaining: self.remaining }
    }
}

impl<K, V> Clone for Range<'_, K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        let node = self.nodes.step(Side::Left)?;
        self.remaining -= 1;
        Some((&node.key, &node.value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}

impl<K, V> DoubleEndedIterator for Iter<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let node = self.nodes.step(Side::Right)?;
        self.remaining -= 1;
        Some((&node.key, &node.value))
    }
}

impl<K, V> ExactSizeIterator for Iter<'_, K, V> {}
impl<K, V> FusedIterator for Iter<'_, K, V> {}

impl<'a, K, V> Iterator for Keys<'a, K, V> {
    type Item = &'a K;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(key, _)| key)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl<K, V> DoubleEndedIterator for Keys<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.0.next_back().map(|(key, _)| key)
    }
}

impl<K, V> ExactSizeIterator for Keys<'_, K, V> {}
impl<K, V> FusedIterator for Keys<'_, K, V> {}

impl<'a, K, V> Iterator for Values<'a, K, V> {
    type Item = &'a V;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(_, value)| value)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl<K, V> DoubleEndedIterator for Values<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.0.next_back().map(|(_, value)| value)
    }
}

impl<K, V> ExactSizeIterator for Values<'_, K, V> {}
impl<K, V> FusedIterator for Values<'_, K, V> {}

impl<'a, K, V> Iterator for IterMut<'a, K, V> {
    type Item = (&'a K, &'a mut V);

    fn next(&mut self) -> Option<Self::Item> {
        let pair = self.0.next()?;
        self.1 -= 1;
        Some(pair)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.1, Some(self.1))
    }
}

impl<K, V> DoubleEndedIterator for IterMut<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let pair = self.0.next_back()?;
        self.1 -= 1;
        Some(pair)
    }
}

impl<K, V> ExactSizeIterator for IterMut<'_, K, V> {}
impl<K, V> FusedIterator for IterMut<'_, K, V> {}

impl<'a, K, V> Iterator for ValuesMut<'a, K, V> {
    type Item = &'a mut V;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(_, value)| value)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl<K, V> DoubleEndedIterator for ValuesMut<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.0.next_back().map(|(_, value)| value)
    }
}

impl<K, V> ExactSizeIterator for ValuesMut<'_, K, V> {}
impl<K, V> FusedIterator for ValuesMut<'_, K, V> {}

impl<'a, K, V> Iterator for Weights<'a, K, V> {
    type Item = (&'a K, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let node = self.nodes.step(Side::Left)?;
        self.remaining -= 1;
        Some((&node.key, node.own))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}

impl<K, V> DoubleEndedIterator for Weights<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let node = self.nodes.step(Side::Right)?;
        self.remaining -= 1;
        Some((&node.key, node.own))
    }
}

impl<K, V> ExactSizeIterator for Weights<'_, K, V> {}
impl<K, V> FusedIterator for Weights<'_, K, V> {}

impl<'a, K, V> Iterator for Range<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.step(Side::Left).map(|node| (&node.key, &node.value))
    }
}

impl<K, V> DoubleEndedIterator for Range<'_, K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.0.step(Side::Right).map(|node| (&node.key, &node.value))
    }
}

impl<K, V> FusedIterator for Range<'_, K, V> {}

impl<K, V> Iterator for IntoIter<K, V> {
    type Item = (K, V);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|node| (node.key, node.value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl<K, V> DoubleEndedIterator for IntoIter<K, V> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.0.next_back().map(|node| (node.key, node.value))
    }
}

impl<K, V> ExactSizeIterator for IntoIter<K, V> {}
impl<K, V> FusedIterator for IntoIter<K, V> {}
