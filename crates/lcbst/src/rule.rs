//! Rotation rules: when and where the tree changes its shape.
//!
//! A rule is handed a [`Climb`], a focus on the accessed node together with the path that led to it, after the access
//! has been counted. It may look at weights, move the focus and rotate it upwards. Rotations update the sums and the
//! links, so no rule, however wrong its decisions, can break the order of keys or the exactness of the sums. That is why
//! [`RotationRule`] is open to implementations outside this crate.
//!
//! What a rule is not: it sees no keys and no values, and it cannot change a weight.

mod cb_tree;
mod splay;

use alloc::vec::Vec;

use crate::node::{NIL, Node, Side};

pub use cb_tree::CbTree;
use splay::semi_splay;
pub use splay::{NoRotation, SemiSplay, Splay};

/// Decides the rotations after an access.
///
/// The tree calls exactly one of the first two methods after each counted access, with the focus on the accessed node,
/// and the third at each inner node that a batch reached.
///
/// # Examples
///
/// The classic splay tree's "move to root", in its simplest form:
///
/// ```
/// use lcbst::{Climb, CountingTree, RotationRule};
///
/// #[derive(Default)]
/// struct MoveToRoot;
///
/// impl RotationRule for MoveToRoot {
///     fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
///         while climb.rotate_up() {}
///     }
///
///     fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
///         while climb.rotate_up() {}
///     }
/// }
///
/// let mut tree: CountingTree<u32, (), MoveToRoot> = CountingTree::default();
/// tree.extend((0..100).map(|key| (key, ())));
/// tree.touch(42, 1);
/// assert_eq!(tree.depth(&42), Some(0));
/// ```
pub trait RotationRule {
    /// Whether [`Self::after_batch`] does anything. If not, batches are spared the way back up the tree.
    const ADJUSTS_AFTER_BATCH: bool = true;

    /// An existing key was found and counted; the focus is on it.
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>);

    /// A new leaf was linked and counted; the focus is on it.
    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>);

    /// A batch was counted, and `reached` keys on the sides of the focus that are true in it, the left one first. It is
    /// called for the deepest nodes first, and once a node.
    ///
    /// The climb is confined to the subtree of the focus: it begins at the top of it, with depth 0, and what it rotates
    /// to that place comes to hang where the focus hung. Rotates nothing unless a rule says otherwise.
    #[inline]
    fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
        let (_, _) = (climb, reached);
    }
}

/// The lazy rule with a strict test of gain: the default.
///
/// A step at a node `y` with parent `p` compares what a rotation would bring nearer to the root with what it would push
/// away. Let *near* be `y`'s side of `p`, `c` the child of `y` on the far side, and `W` the weight of a subtree:
///
/// - a zig (rotate `y` up) lowers the weighted path length by `own(y) + W(y.near) − own(p) − W(p.far)`;
/// - a zig-zag (rotate `c` up twice) lowers it by `W(c) + own(c) − own(p) − W(p.far)`.
///
/// The step makes whichever gains more, the zig-zag if equal, and neither unless the gain is positive. So each step
/// strictly lowers the weighted path length, and steps at fixed weights must come to an end.
///
/// A hit makes one step at the accessed node: O(1) beyond the descent. A new leaf makes a step at each level up to the
/// root: O(depth). A batch makes a step at a child of each node that it passed, if that child outweighs the rest without a
/// look at its own children: with `W(c)` in place of `W(c) + own(c)`. No bound on the depth is known.
///
/// Source: Afek, Korenfeld, Morrison, "Concurrent search tree by lazy splaying", with the gain test in place of the
/// printed comparison; see [`LazyAsPrinted`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lazy;

impl RotationRule for Lazy {
    #[inline]
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        lazy_step(climb);
    }

    #[inline]
    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        climb_to_root(climb, lazy_step);
    }

    #[inline]
    fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
        if climb.outweighs_from_below(reached) {
            step_at_child(climb, reached, lazy_step);
        }
    }
}

/// The lazy rule with the conditions as the literature prints them, for comparison.
///
/// With the names of [`Lazy`]: a zig-zag if `c` exists and `W(c) ≥ own(p) + W(p.far)`; otherwise a zig if
/// `own(y) + W(y.near) > own(p) + W(p.far)`. It differs from [`Lazy`] in two ways. At equality it may rotate where
/// nothing is gained (`own(c) = 0`), and it prefers the zig-zag even where the zig gains more. With ascending batches
/// ([`CountingTree::touch_sorted`](crate::CountingTree::touch_sorted)) the latter leads to a chain.
///
/// Source and cost are those of [`Lazy`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LazyAsPrinted;

impl RotationRule for LazyAsPrinted {
    #[inline]
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        lazy_step_as_printed(climb);
    }

    #[inline]
    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        climb_to_root(climb, lazy_step_as_printed);
    }

    #[inline]
    fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
        step_at_child(climb, reached, lazy_step_as_printed);
    }
}

/// Another rule, with the depth rule added: a hit deeper than 2·log₂(keys) is semi-splayed up to the root instead.
///
/// Off by default, because on most workloads it never fires, and on the others it makes no measured difference for the
/// better. The test is strict and exact: `2^depth > keys²`, with a depth of 0 at the root.
///
/// A hit costs O(depth) rotations where the depth rule fires, and what `R` costs otherwise.
///
/// Sources: the depth rule of Afek, Korenfeld and Morrison; semi-splaying from D. Sleator and R. Tarjan,
/// "Self-adjusting binary search trees", Journal of the ACM 32(3), 1985.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DepthLimited<R>(
    /// The rule for everything that is not too deep.
    pub R,
);

impl<R: RotationRule> RotationRule for DepthLimited<R> {
    const ADJUSTS_AFTER_BATCH: bool = R::ADJUSTS_AFTER_BATCH;

    #[inline]
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        if exceeds_depth_rule(climb.depth(), climb.key_count()) {
            semi_splay(climb);
        } else {
            self.0.after_hit(climb);
        }
    }

    #[inline]
    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        self.0.after_insert(climb);
    }

    #[inline]
    fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
        self.0.after_batch(climb, reached);
    }
}

/// The weights around one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalWeights {
    /// The weight of the accesses to the node's own key.
    pub own: u64,
    /// The weight of the left subtree.
    pub left: u64,
    /// The weight of the right subtree.
    pub right: u64,
}

impl LocalWeights {
    /// The weight of the whole subtree. At most [`MAX_TOTAL_WEIGHT`](crate::MAX_TOTAL_WEIGHT), so that twice this fits
    /// a `u64` too.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.own + self.left + self.right
    }

    /// The weight of the subtree on one side.
    #[must_use]
    pub const fn toward(self, side: Side) -> u64 {
        match side {
            Side::Left => self.left,
            Side::Right => self.right,
        }
    }
}

/// A focus on one node of the tree and the path to it: what a [`RotationRule`] works with.
///
/// Nodes on the path are named by their level above the focus: 0 is the focus, 1 its parent, and so on. Every method
/// takes constant time.
pub struct Climb<'a, K, V> {
    pub(crate) nodes: &'a mut [Node<K, V>],
    pub(crate) root: &'a mut u32,
    /// The ancestors of the focus, the root first.
    pub(crate) path: &'a mut Vec<u32>,
    pub(crate) focus: u32,
    pub(crate) rotations: &'a mut u64,
}

impl<K, V> Climb<'_, K, V> {
    /// The number of ancestors of the focus; 0 at the root.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.path.len()
    }

    /// The number of keys in the tree.
    #[must_use]
    pub fn key_count(&self) -> usize {
        self.nodes.len()
    }

    /// The weights of the node `level` levels above the focus, or `None` above the root.
    #[must_use]
    #[inline]
    pub fn weights(&self, level: usize) -> Option<LocalWeights> {
        self.position(level).map(|at| self.weights_at(at))
    }

    /// The side on which the node `level` levels above the focus hangs, or `None` for the root and above.
    #[must_use]
    #[inline]
    pub fn side(&self, level: usize) -> Option<Side> {
        let child = self.position(level)?;
        let parent = self.position(level + 1)?;
        Some(self.nodes[parent as usize].side_of(child))
    }

    /// The weights of the focus's child on one side, if there is one.
    #[must_use]
    #[inline]
    pub fn child(&self, side: Side) -> Option<LocalWeights> {
        match self.nodes[self.focus as usize].links[side as usize] {
            NIL => None,
            child => Some(self.weights_at(child)),
        }
    }

    /// Moves the focus to the parent. Returns false, and moves nothing, at the root.
    #[inline]
    pub fn ascend(&mut self) -> bool {
        match self.path.pop() {
            Some(parent) => {
                self.focus = parent;
                true
            }
            None => false,
        }
    }

    /// Moves the focus to the child on one side. Returns false, and moves nothing, if there is none.
    #[inline]
    pub fn descend(&mut self, side: Side) -> bool {
        match self.nodes[self.focus as usize].links[side as usize] {
            NIL => false,
            child => {
                self.path.push(self.focus);
                self.focus = child;
                true
            }
        }
    }

    /// Rotates the focus above its parent; the focus stays on the same key, one level nearer to the root. Returns
    /// false, and changes nothing, at the root.
    pub fn rotate_up(&mut self) -> bool {
        let Some(parent_at) = self.path.pop() else { return false };
        let side = self.nodes[parent_at as usize].side_of(self.focus);
        let (near, far) = (side as usize, side.opposite() as usize);

        let focus = &self.nodes[self.focus as usize];
        let (inner, inner_weight) = (focus.links[far], focus.below[far]);
        let parent = &mut self.nodes[parent_at as usize];
        parent.links[near] = inner;
        parent.below[near] = inner_weight;
        let parent_total = parent.total();
        let focus = &mut self.nodes[self.focus as usize];
        focus.links[far] = parent_at;
        focus.below[far] = parent_total;

        // The subtree holds the same keys as before, so no sum above it changes.
        match self.path.last() {
            None => *self.root = self.focus,
            Some(&above) => {
                let above = &mut self.nodes[above as usize];
                let side = above.side_of(parent_at);
                above.links[side as usize] = self.focus;
            }
        }
        *self.rotations += 1;
        true
    }

    /// Whether one of these children of the focus is heavy enough that a step there rotates, as far as can be told without
    /// reading a grandchild. Nearly always the answer is no, and how the weights lie around a node is nothing that a
    /// processor could predict: so there is one branch on the answer, and none on the way to it.
    #[inline]
    fn outweighs_from_below(&self, reached: [bool; 2]) -> bool {
        let top = &self.nodes[self.focus as usize];
        let outweighs = |side: Side| {
            let (near, far) = (side as usize, side.opposite() as usize);
            let Some(child) = self.nodes.get(top.links[near] as usize) else { return false };
            (child.own + child.below[near]).max(child.below[far]) > top.own + top.below[far]
        };
        match reached {
            [true, true] => outweighs(Side::Left) | outweighs(Side::Right),
            [_, right] => outweighs(if right { Side::Right } else { Side::Left }),
        }
    }

    #[inline]
    fn position(&self, level: usize) -> Option<u32> {
        match level {
            0 => Some(self.focus),
            _ => self.path.len().checked_sub(level).map(|index| self.path[index]),
        }
    }

    #[inline]
    fn weights_at(&self, at: u32) -> LocalWeights {
        let node = &self.nodes[at as usize];
        LocalWeights { own: node.own, left: node.below[0], right: node.below[1] }
    }
}

/// What a lazy step at the focus weighs against each other.
struct Balance {
    far: Side,
    /// `own(p) + W(p.far)`: what either rotation pushes down.
    opposite: u64,
    /// `own(y) + W(y.near)`: what a zig lifts.
    outer: u64,
    /// `W(c)`: the subtree between, which only a zig-zag lifts.
    inner: u64,
}

impl Balance {
    /// `None` at the root, where there is nothing to rotate.
    #[inline]
    fn at_focus<K, V>(climb: &Climb<'_, K, V>) -> Option<Self> {
        let near = climb.side(0)?;
        let far = near.opposite();
        let (focus, parent) = (climb.weights(0)?, climb.weights(1)?);
        Some(Self {
            far,
            opposite: parent.own + parent.toward(far),
            outer: focus.own + focus.toward(near),
            inner: focus.toward(far),
        })
    }
}

/// One step of [`Lazy`]. Returns whether it rotated; the focus is then on the node that came out on top.
#[inline]
pub(crate) fn lazy_step<K, V>(climb: &mut Climb<'_, K, V>) -> bool {
    let Some(Balance { far, opposite, outer, inner }) = Balance::at_focus(climb) else { return false };
    // own(c) ≤ W(c), so the first test leaves c, and its cache line, alone wherever a zig-zag cannot gain.
    if 2 * inner > opposite
        && let Some(child) = climb.child(far)
        && inner + child.own > opposite
        && inner + child.own >= outer
    {
        zig_zag(climb, far);
        true
    } else {
        outer > opposite && climb.rotate_up()
    }
}

/// One step of [`LazyAsPrinted`]; returns as [`lazy_step`].
#[inline]
pub(crate) fn lazy_step_as_printed<K, V>(climb: &mut Climb<'_, K, V>) -> bool {
    let Some(Balance { far, opposite, outer, inner }) = Balance::at_focus(climb) else { return false };
    if inner >= opposite && climb.child(far).is_some() {
        zig_zag(climb, far);
        true
    } else {
        outer > opposite && climb.rotate_up()
    }
}

fn zig_zag<K, V>(climb: &mut Climb<'_, K, V>, far: Side) {
    climb.descend(far);
    climb.rotate_up();
    climb.rotate_up();
}

/// Steps at every level from the focus to the root. Ends, because a step that rotates lifts the focus as well.
fn climb_to_root<K, V>(climb: &mut Climb<'_, K, V>, step: impl Fn(&mut Climb<'_, K, V>) -> bool) {
    while climb.depth() > 0 {
        if !step(climb) {
            climb.ascend();
        }
    }
}

/// The step of a batch at a node: at most one, at its heavier child if that gains, else at the other. Looks at a child
/// only where the batch went, and where the node's own sums leave a gain possible.
#[inline]
fn step_at_child<K, V>(climb: &mut Climb<'_, K, V>, reached: [bool; 2], step: impl Fn(&mut Climb<'_, K, V>) -> bool) {
    let Some(top) = climb.weights(0) else { return };
    let heavier = if top.left >= top.right { Side::Left } else { Side::Right };
    for side in [heavier, heavier.opposite()] {
        // A zig gains less than the child's weight without what is pushed down, a zig-zag less than twice that weight.
        let (lifted, lowered) = (top.toward(side), top.own + top.toward(side.opposite()));
        if reached[side as usize] && 2 * lifted > lowered && climb.descend(side) {
            if step(climb) {
                return;
            }
            climb.ascend();
        }
    }
}

/// Whether `depth > 2·log₂(keys)`, in integers.
fn exceeds_depth_rule(depth: usize, keys: usize) -> bool {
    let keys_squared = (keys as u128) * (keys as u128);
    depth >= 128 || 1_u128 << depth > keys_squared
}
