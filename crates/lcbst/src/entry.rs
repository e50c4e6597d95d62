//! One key's place in the tree, found once: present or missing.

use core::fmt;

use crate::node::{Node, Side};
use crate::rule::RotationRule;
use crate::tree::{CountingTree, Descent};

/// The place of a key, made by [`CountingTree::entry`].
///
/// To find it counts nothing. Every method that ends in the value (`or_insert` and its like,
/// [`OccupiedEntry::into_mut`], [`VacantEntry::insert`]) counts one access of weight 1, whether the key was there or not;
/// what only looks, changes or removes counts nothing.
///
/// ```
/// let mut words: lcbst::CountingTree<&str, u32> = lcbst::CountingTree::new();
/// for word in ["to", "be", "or", "not", "to", "be"] {
///     *words.entry(word).or_default() += 1;
/// }
/// assert_eq!((words.get("to"), words.weight("to")), (Some(&2), Some(2)));
/// ```
pub enum Entry<'a, K, V, R> {
    /// The key is there.
    Occupied(OccupiedEntry<'a, K, V, R>),
    /// The key is missing.
    Vacant(VacantEntry<'a, K, V, R>),
}

/// A key that is there. Its ancestors are in the tree's path.
pub struct OccupiedEntry<'a, K, V, R> {
    tree: &'a mut CountingTree<K, V, R>,
    at: u32,
}

/// A key that is missing, and its place: on this side of the last node in the tree's path.
pub struct VacantEntry<'a, K, V, R> {
    tree: &'a mut CountingTree<K, V, R>,
    key: K,
    side: Side,
}

impl<K: Ord, V, R: RotationRule> CountingTree<K, V, R> {
    /// The place of a key, for an insertion or a change in one descent. Counts when the entry is used; see [`Entry`].
    /// O(depth).
    pub fn entry(&mut self, key: K) -> Entry<'_, K, V, R> {
        match self.descend(&key) {
            Descent::Found(at) => Entry::Occupied(OccupiedEntry { tree: self, at }),
            Descent::Missing(side) => Entry::Vacant(VacantEntry { tree: self, key, side }),
        }
    }
}

impl<'a, K: Ord, V, R: RotationRule> Entry<'a, K, V, R> {
    /// The value, after inserting this one if the key is missing. Counts an access of weight 1.
    ///
    /// # Panics
    ///
    /// As [`VacantEntry::insert`].
    pub fn or_insert(self, value: V) -> &'a mut V {
        self.or_insert_with(|| value)
    }

    /// As [`Self::or_insert`], with a value that is made only where it is needed.
    ///
    /// # Panics
    ///
    /// As [`VacantEntry::insert`].
    pub fn or_insert_with(self, value: impl FnOnce() -> V) -> &'a mut V {
        self.or_insert_with_key(|_| value())
    }

    /// As [`Self::or_insert_with`], with a value that depends on the key.
    ///
    /// # Panics
    ///
    /// As [`VacantEntry::insert`].
    pub fn or_insert_with_key(self, value: impl FnOnce(&K) -> V) -> &'a mut V {
        match self {
            Self::Occupied(entry) => entry.into_mut(),
            Self::Vacant(entry) => {
                let value = value(entry.key());
                entry.insert(value)
            }
        }
    }

    /// As [`Self::or_insert`], with the default value.
    ///
    /// # Panics
    ///
    /// As [`VacantEntry::insert`].
    pub fn or_default(self) -> &'a mut V
    where
        V: Default,
    {
        self.or_insert_with(V::default)
    }

    /// Changes the value if the key is there. Counts nothing.
    #[must_use]
    pub fn and_modify(mut self, change: impl FnOnce(&mut V)) -> Self {
        if let Self::Occupied(entry) = &mut self {
            change(entry.get_mut());
        }
        self
    }

    /// The key that was asked for.
    #[must_use]
    pub fn key(&self) -> &K {
        match self {
            Self::Occupied(entry) => entry.key(),
            Self::Vacant(entry) => entry.key(),
        }
    }
}

impl<'a, K, V, R> OccupiedEntry<'a, K, V, R> {
    /// The key in the tree.
    #[must_use]
    pub fn key(&self) -> &K {
        &self.node().key
    }

    /// The value. Counts nothing.
    #[must_use]
    pub fn get(&self) -> &V {
        &self.node().value
    }

    /// The value, to change. Counts nothing.
    #[must_use]
    pub fn get_mut(&mut self) -> &mut V {
        &mut self.tree.nodes[self.at as usize].value
    }

    /// The stored weight of the key.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.node().own
    }

    /// Replaces the value and returns the one before. Counts nothing.
    pub fn insert(&mut self, value: V) -> V {
        core::mem::replace(self.get_mut(), value)
    }

    fn node(&self) -> &Node<K, V> {
        &self.tree.nodes[self.at as usize]
    }
}

impl<'a, K: Ord, V, R: RotationRule> OccupiedEntry<'a, K, V, R> {
    /// The value for as long as the tree is borrowed. Counts an access of weight 1, and lets the rule adjust the tree.
    pub fn into_mut(self) -> &'a mut V {
        self.tree.count_hit(self.at, 1);
        &mut self.tree.nodes[self.at as usize].value
    }

    /// Removes the key with its weight; returns its value. O(depth), as [`CountingTree::remove`].
    pub fn remove(self) -> V {
        self.remove_entry().1
    }

    /// Removes the key with its weight; returns both key and value.
    pub fn remove_entry(self) -> (K, V) {
        self.tree.remove_found(self.at)
    }
}

impl<'a, K, V, R> VacantEntry<'a, K, V, R> {
    /// The key that was asked for.
    #[must_use]
    pub const fn key(&self) -> &K {
        &self.key
    }

    /// Gives the key back and leaves the tree as it is.
    #[must_use]
    pub fn into_key(self) -> K {
        self.key
    }
}

impl<'a, K: Ord, V, R: RotationRule> VacantEntry<'a, K, V, R> {
    /// Inserts the key with a value. Counts an access of weight 1, and lets the rule adjust the tree.
    ///
    /// # Panics
    ///
    /// If the tree holds [`MAX_KEYS`](crate::MAX_KEYS) keys.
    pub fn insert(self, value: V) -> &'a mut V {
        let Self { tree, key, side } = self;
        let at = tree.insert_missing(key, value, side);
        &mut tree.nodes[at as usize].value
    }
}

impl<K: fmt::Debug, V: fmt::Debug, R> fmt::Debug for Entry<'_, K, V, R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Occupied(entry) => entry.fmt(formatter),
            Self::Vacant(entry) => entry.fmt(formatter),
        }
    }
}

impl<K: fmt::Debug, V: fmt::Debug, R> fmt::Debug for OccupiedEntry<'_, K, V, R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OccupiedEntry").field("key", self.key()).field("value", self.get()).finish()
    }
}

impl<K: fmt::Debug, V, R> fmt::Debug for VacantEntry<'_, K, V, R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("VacantEntry").field(&self.key).finish()
    }
}
