//! The counting-based tree of Afek, Kaplan, Korenfeld, Morrison and Tarjan: semi-splaying where it pays.

use super::splay::double_step;
use super::{Climb, RotationRule};
use crate::node::Side;

/// Conditional semi-splaying along the whole path of an access.
///
/// Bottom-up, two levels at a time: let `x` be a node, `y` its parent, `z` its grandparent, and `W` the weight of a
/// subtree. If `W(x) > θ·W(z)`, then a zig-zig rotates `y` above `z` and goes on from `y`, or a zig-zag rotates `x` up
/// twice and goes on from `x`. Otherwise nothing moves, and it goes on from `y`, so that every two neighbouring levels of
/// the path are looked at. (Going on from `z` looks at every other pair. The same bounds hold, but ordered insertions
/// come out a little deeper: 29 instead of 28 levels for 20,000 keys.)
///
/// Every step lowers the potential `Σ log₂ W` over all nodes by at least `min(log₂(θ/(1−θ)), log₂(4θ²))`, which is 0.526
/// for θ = 3/5. Hence the bounds:
///
/// - after an access that rotates nothing, a key of weight `c` in a tree of weight `M` is at a depth of at most
///   `2·⌊log_{1/θ}(M/c)⌋ + 1`, aged or not;
/// - without ageing, an access to `v` takes O(1 + log(m / accesses of v)) time, amortised over `m` accesses, and all
///   accesses together make O(n + n·log(m/n)) rotations for `n` keys. At fixed ratios of weights the tree comes to rest.
///
/// Both count accesses of weight 1 or more. Unlike [`Lazy`](super::Lazy), every access looks at its whole path again:
/// O(depth), in memory that the descent has just read.
///
/// Source: "The CB tree: a practical concurrent self-adjusting search tree", Distributed Computing 27(6), 2014.
///
/// ```
/// use lcbst::{CbTree, CountingTree};
///
/// let mut tree: CountingTree<u32, (), CbTree> = CountingTree::default();
/// tree.extend((0..1000).map(|key| (key, ())));
/// for _ in 0..1000 {
///     tree.touch(7, 1);
/// }
/// assert!(tree.depth(&7) <= Some(3)); // 2·⌊log_{5/3}(2000/1001)⌋ + 1
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CbTree {
    numerator: u32,
    denominator: u32,
}

impl CbTree {
    /// The rule with θ = `numerator / denominator`. The default is 3/5.
    ///
    /// Greater values rotate less and allow a deeper tree.
    ///
    /// # Panics
    ///
    /// Unless 1/2 < θ < 1: at 1/2 and below, a step may raise the potential, and the tree may never come to rest.
    #[must_use]
    pub const fn with_threshold(numerator: u32, denominator: u32) -> Self {
        assert!(2 * numerator as u64 > denominator as u64, "the threshold of a CB tree must be above 1/2");
        assert!(numerator < denominator, "the threshold of a CB tree must be below 1");
        Self { numerator, denominator }
    }

    /// θ, as numerator and denominator.
    #[must_use]
    pub const fn threshold(&self) -> (u32, u32) {
        (self.numerator, self.denominator)
    }

    /// Whether `part > θ·whole`, exactly.
    #[inline]
    fn exceeds(&self, part: u64, whole: u64) -> bool {
        u128::from(part) * u128::from(self.denominator) > u128::from(whole) * u128::from(self.numerator)
    }

    /// One step at the focus: a double step, or one level up. Returns whether it rotated.
    #[inline]
    pub(crate) fn step<K, V>(&self, climb: &mut Climb<'_, K, V>) -> bool {
        // The grandparent's sums tell the weight of the parent, and the parent's that of the focus: no new node is read.
        let (Some(side), Some(above)) = (climb.side(0), climb.side(1)) else {
            climb.ascend();
            return false;
        };
        let (Some(parent), Some(grandparent)) = (climb.weights(1), climb.weights(2)) else { return false };
        if self.exceeds(parent.toward(side), grandparent.total()) {
            double_step(climb, side, above);
            true
        } else {
            climb.ascend();
            false
        }
    }
}

impl Default for CbTree {
    fn default() -> Self {
        Self::with_threshold(3, 5)
    }
}

impl RotationRule for CbTree {
    #[inline]
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        while climb.depth() > 0 {
            self.step(climb);
        }
    }

    #[inline]
    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        self.after_hit(climb);
    }

    fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
        let Some(top) = climb.weights(0) else { return };
        for above in [Side::Left, Side::Right] {
            // More than half of the whole hangs on at most one grandchild.
            if reached[above as usize] && self.exceeds(top.toward(above), top.total()) {
                climb.descend(above);
                let heavier = climb.weights(0).and_then(|middle| {
                    [Side::Left, Side::Right].into_iter().find(|&side| self.exceeds(middle.toward(side), top.total()))
                });
                if let Some(side) = heavier {
                    climb.descend(side);
                    double_step(climb, side, above);
                }
                return;
            }
        }
    }
}
