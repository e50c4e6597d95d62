//! The one thread at a time that rotates, and the sums that only it knows.
//!
//! The adjuster's sums include an *applied* weight of each node, which is the weight that the node had when the
//! adjuster last looked. Sums, applied weights and the decisions made from them are those of a sequential tree in which
//! every access was counted at that moment, so all invariants of the sequential tree hold for them, exactly.

use alloc::vec::Vec;
use core::borrow::Borrow;
use core::cmp::Ordering;

use super::hints::{RING_HINTS, Ring};
use super::link::Link;
use super::shape::Shape;
use crate::node::{NIL, Side};
use crate::tree::MAX_TOTAL_WEIGHT;

/// Nodes that each drained ring pays for to be looked at in turn, hint or no hint. So a dropped hint delays a weight by
/// no more than (nodes / this) drains.
const SWEPT_PER_DRAIN: usize = RING_HINTS / 4;

#[derive(Clone, Copy, Default)]
pub(super) struct Account {
    /// The part of the node's weight that is in the sums.
    pub(super) applied: u64,
    /// The exact sums of `applied` in the left and the right subtree.
    pub(super) below: [u64; 2],
    /// Whether the node has had the steps due to a new leaf.
    is_known: bool,
}

impl Account {
    /// Of a node that was linked by [`crate::build`], and is where it belongs.
    pub(super) const fn settled(applied: u64, below: [u64; 2]) -> Self {
        Self { applied, below, is_known: true }
    }
}

#[derive(Default)]
pub(super) struct Adjuster {
    /// By node. The last ones may be missing; they have applied nothing.
    accounts: Vec<Account>,
    /// The sum of all applied weights.
    total: u64,
    rotations: u64,
    /// The next node to be swept.
    hand: usize,
    /// The ancestors of a node and the sides to it, the root first; kept to reuse its memory.
    path: Vec<(u32, Side)>,
}

impl Adjuster {
    pub(super) fn with_accounts(accounts: Vec<Account>, rotations: u64) -> Self {
        let total = accounts.iter().map(|account| account.applied).sum();
        Self { accounts, total, rotations, hand: 0, path: Vec::new() }
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    pub(super) fn rotations(&self) -> u64 {
        self.rotations
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.accounts.capacity() * size_of::<Account>() + self.path.capacity() * size_of::<(u32, Side)>()
    }

    #[inline]
    pub(super) fn account(&self, node: u32) -> Account {
        self.accounts.get(node as usize).copied().unwrap_or_default()
    }

    pub(super) fn drain<K: Ord, V>(&mut self, shape: &Shape<K, V>, ring: &Ring) {
        ring.drain(|node| self.apply(shape, node));
        self.sweep(shape, SWEPT_PER_DRAIN);
    }

    /// Looks at so many nodes in turn, but at none twice.
    pub(super) fn sweep<K: Ord, V>(&mut self, shape: &Shape<K, V>, nodes: usize) {
        let end = shape.arena.len();
        for _ in 0..nodes.min(end) {
            self.hand = if self.hand < end { self.hand } else { 0 };
            let at = self.hand as u32;
            if let Some((_, cell)) = shape.arena.entry(at)
                && cell.tally().weight() != self.account(at).applied
            {
                self.apply(shape, at);
            }
            self.hand += 1;
        }
    }

    /// Brings the sums up to a node's weight of now, then makes the steps that the lazy rule has for an access.
    pub(super) fn apply<K: Ord, V>(&mut self, shape: &Shape<K, V>, node: u32) {
        let Account { applied: before, is_known, .. } = self.account(node);
        let room = MAX_TOTAL_WEIGHT - self.total;
        let after = shape.arena.cell(node).tally().weight().min(before + room);
        if (after == before && is_known) || !self.descend(shape, node) {
            return;
        }
        for &(ancestor, side) in &self.path {
            let below = &mut self.accounts[ancestor as usize].below[side as usize];
            *below = *below - before + after;
        }
        let account = &mut self.accounts[node as usize];
        (account.applied, account.is_known) = (after, true);
        self.total = self.total - before + after;

        if !is_known {
            self.climb_to_root(shape, node);
        } else if after > before {
            self.step(shape, node);
        }
    }

    /// The weight applied to the keys for which a predicate holds that holds for all keys up to some point, and for
    /// none after.
    pub(super) fn weight_before<K, V, Q: ?Sized>(&self, shape: &Shape<K, V>, is_before: impl Fn(&Q) -> bool) -> u64
    where
        K: Borrow<Q>,
    {
        let (mut at, mut weight) = (shape.root.load().child(), 0);
        while at != NIL {
            let route = shape.arena.route(at);
            let side = if is_before(route.key().borrow()) {
                let account = self.account(at);
                weight += account.applied + account.below[Side::Left as usize];
                Side::Right
            } else {
                Side::Left
            };
            at = route.link(side).load().child();
        }
        weight
    }

    /// Leaves the ancestors of a node in `path`, all of them with accounts, and returns true; or false if the node is
    /// not in the tree, because another one with its key is.
    fn descend<K: Ord, V>(&mut self, shape: &Shape<K, V>, node: u32) -> bool {
        self.path.clear();
        let key = shape.arena.route(node).key();
        let mut at = shape.root.load().child();
        while at != node {
            if at == NIL {
                return false;
            }
            let route = shape.arena.route(at);
            let side = match key.cmp(route.key()) {
                Ordering::Less => Side::Left,
                Ordering::Equal => return false,
                Ordering::Greater => Side::Right,
            };
            self.open_account(shape, at);
            self.path.push((at, side));
            at = route.link(side).load().child();
        }
        self.open_account(shape, node);
        true
    }

    fn open_account<K, V>(&mut self, shape: &Shape<K, V>, node: u32) {
        if node as usize >= self.accounts.len() {
            self.accounts.resize(shape.arena.len().max(node as usize + 1), Account::default());
        }
    }

    /// A step at each level from the node to the root. Ends, because a step that rotates shortens the path as well.
    fn climb_to_root<K, V>(&mut self, shape: &Shape<K, V>, node: u32) {
        let mut focus = node;
        while let Some(&(parent, _)) = self.path.last() {
            focus = self.step(shape, focus).unwrap_or_else(|| {
                self.path.pop();
                parent
            });
        }
    }

    /// One step of [`crate::Lazy`] at a node whose ancestors are in `path`. Returns the node that came out on top, if
    /// it rotated; its ancestors are then in `path`.
    fn step<K, V>(&mut self, shape: &Shape<K, V>, focus: u32) -> Option<u32> {
        let &(parent, near) = self.path.last()?;
        let far = near.opposite();
        let (above, here) = (self.account(parent), self.account(focus));
        let opposite = above.applied + above.below[far as usize];
        let outer = here.applied + here.below[near as usize];
        let inner = here.below[far as usize];

        // own(c) ≤ W(c), so the first test leaves c alone wherever a zig-zag cannot gain.
        let child = if 2 * inner > opposite { shape.arena.route(focus).link(far).load().child() } else { NIL };
        if child != NIL {
            let lifted = inner + self.account(child).applied;
            if lifted > opposite && lifted >= outer {
                self.path.push((focus, far));
                self.rotate_up(shape, child);
                self.rotate_up(shape, child);
                return Some(child);
            }
        }
        (outer > opposite).then(|| {
            self.rotate_up(shape, focus);
            focus
        })
    }

    /// Rotates a node, whose ancestors are in `path`, above its parent. The order of the three changes is what searches
    /// rely on; see "A rotation" in the module's documentation.
    fn rotate_up<K, V>(&mut self, shape: &Shape<K, V>, focus: u32) {
        let Some((parent, near)) = self.path.pop() else {
            unreachable!("node {focus} has no parent to be rotated above");
        };
        let far = near.opposite();
        let above: &Link = match self.path.last() {
            None => &shape.root,
            Some(&(above, side)) => shape.arena.route(above).link(side),
        };
        let inner = shape.arena.route(focus).link(far).redirect(parent);
        let was_parent = above.redirect(focus);
        let was_focus = shape.arena.route(parent).link(near).redirect(inner);
        assert_eq!((was_parent, was_focus), (parent, focus), "someone else rotated");

        // A node that was hung under `focus` just now has applied nothing, so the sums are right without it.
        let inner_weight = self.account(focus).below[far as usize];
        let lower = &mut self.accounts[parent as usize];
        lower.below[near as usize] = inner_weight;
        let lower_total = lower.applied + lower.below[0] + lower.below[1];
        self.accounts[focus as usize].below[far as usize] = lower_total;
        self.rotations += 1;
    }
}
