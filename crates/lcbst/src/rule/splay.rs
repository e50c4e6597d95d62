//! The self-adjusting rules of Sleator and Tarjan, and the rule that never rotates.
//!
//! None of them looks at a weight. They are here as comparators, and for callers who need their amortised bounds.

use super::{Climb, RotationRule};
use crate::node::Side;

/// Splaying: every access rotates its key to the root.
///
/// O(depth) rotations an access. Over `m` accesses in a tree of `n` keys, an access to `v` takes amortised
/// O(1 + log(m / accesses of v)) time (static optimality), and O(log n) in any case. Single accesses can cost O(n).
/// A batch ([`CountingTree::touch_sorted`](crate::CountingTree::touch_sorted)) rotates nothing under this rule.
///
/// Source: D. Sleator and R. Tarjan, "Self-adjusting binary search trees", Journal of the ACM 32(3), 1985.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Splay;

impl RotationRule for Splay {
    const ADJUSTS_AFTER_BATCH: bool = false;

    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        while let Some(side) = climb.side(0) {
            match climb.side(1) {
                Some(above) if above == side => {
                    // The parent first, about the grandparent; then the focus about the parent.
                    climb.ascend();
                    climb.rotate_up();
                    climb.descend(side);
                    climb.rotate_up();
                }
                Some(_) => {
                    climb.rotate_up();
                    climb.rotate_up();
                }
                None => {
                    climb.rotate_up();
                }
            }
        }
    }

    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        self.after_hit(climb);
    }
}

/// Semi-splaying: every access about halves the depth of its path.
///
/// About depth/2 rotations an access. The amortised bounds are those of [`Splay`], with a smaller constant, and the key
/// accessed need not reach the root. A batch ([`CountingTree::touch_sorted`](crate::CountingTree::touch_sorted)) rotates
/// nothing under this rule.
///
/// Source: as for [`Splay`], section 6 there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SemiSplay;

impl RotationRule for SemiSplay {
    const ADJUSTS_AFTER_BATCH: bool = false;

    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        semi_splay(climb);
    }

    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        semi_splay(climb);
    }
}

/// No rotation ever: a plain binary search tree with counters.
///
/// The depth depends on the order of insertion: about 2·ln(n) on average if that is random, n − 1 if it is sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoRotation;

impl RotationRule for NoRotation {
    const ADJUSTS_AFTER_BATCH: bool = false;

    #[inline]
    fn after_hit<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}

    #[inline]
    fn after_insert<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}
}

/// Halves the depth of the path, roughly: the bottom-up semi-splaying of Sleator and Tarjan.
pub(super) fn semi_splay<K, V>(climb: &mut Climb<'_, K, V>) {
    while let Some(side) = climb.side(0) {
        match climb.side(1) {
            None => {
                climb.rotate_up();
            }
            Some(above) => double_step(climb, side, above),
        }
    }
}

/// The semi-splay step of two levels, over a parent on one side of whose parent the focus's parent hangs. The focus is
/// then on the node that took the place of the grandparent.
#[inline]
pub(super) fn double_step<K, V>(climb: &mut Climb<'_, K, V>, side: Side, above: Side) {
    if side == above {
        climb.ascend();
        climb.rotate_up();
    } else {
        climb.rotate_up();
        climb.rotate_up();
    }
}
