//! The node of the arena, and what a link is.
//!
//! Links are 32-bit positions in the arena. There is no link to the parent: every operation that must go back up
//! descended first and kept its path. A node of `u64` keys without values takes 40 bytes.
//!
//! The mirror image of every algorithm comes from indexing by [`Side`]; no code is written twice for left and right.

/// The link to no node.
pub(crate) const NIL: u32 = u32::MAX;

/// The left (lesser) or the right (greater) side of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Lesser keys.
    Left = 0,
    /// Greater keys.
    Right = 1,
}

impl Side {
    /// The other side.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }
}

#[derive(Clone)]
pub(crate) struct Node<K, V> {
    pub(crate) key: K,
    pub(crate) value: V,
    /// The weight of the accesses to this key.
    pub(crate) own: u64,
    /// The exact sums of `own` in the left and the right subtree.
    pub(crate) below: [u64; 2],
    pub(crate) links: [u32; 2],
}

const _: () = assert!(size_of::<Node<u64, ()>>() == 40);

impl<K, V> Node<K, V> {
    pub(crate) const fn leaf(key: K, value: V, own: u64) -> Self {
        Self { key, value, own, below: [0; 2], links: [NIL; 2] }
    }

    /// The weight of the subtree that this node is the root of.
    pub(crate) const fn total(&self) -> u64 {
        self.own + self.below[0] + self.below[1]
    }

    pub(crate) fn side_of(&self, child: u32) -> Side {
        if self.links[0] == child {
            Side::Left
        } else {
            assert_eq!(self.links[1], child, "node {child} is on the path but is no child of the node before it");
            Side::Right
        }
    }
}
