//! The links of the tree, and the optimistic search through them.

use core::borrow::Borrow;
use core::cmp::Ordering;

use super::arena::Arena;
use super::link::{Link, Word};
use crate::node::{NIL, Side};

pub(super) struct Shape<K, V> {
    pub(super) root: Link,
    pub(super) arena: Arena<K, V>,
}

/// Where a search ended.
pub(super) enum Place<'a> {
    /// At the node with the key. Good for as long as the tree is shared: nodes stay, and keep their keys.
    Found(u32),
    /// At an empty link, which is where the key belongs for as long as the link holds this word.
    Vacant { link: &'a Link, seen: Word, depth: usize },
}

/// A rotation came between. The search says nothing, and is to be repeated.
#[derive(Debug)]
pub(super) struct Interference;

impl<K, V> Shape<K, V> {
    pub(super) fn with_capacity(nodes: usize) -> Self {
        Self { root: Link::empty(), arena: Arena::with_capacity(nodes) }
    }
}

impl<K: Ord, V> Shape<K, V> {
    /// Hand-over-hand: each link is read again after the next one was read. See "A search" in the module's
    /// documentation for why this is enough.
    ///
    /// The key found needs no validation, wherever the search went astray: nodes never leave the tree.
    #[inline]
    pub(super) fn search<Q: Ord + ?Sized>(&self, key: &Q) -> Result<Place<'_>, Interference>
    where
        K: Borrow<Q>,
    {
        let (mut link, mut above, mut depth) = (&self.root, NIL, 0);
        let mut seen = link.load();
        loop {
            let at = seen.child();
            if at == NIL {
                return Ok(Place::Vacant { link, seen, depth });
            }
            let route = self.arena.route(at);
            let side = match key.cmp(route.key().borrow()) {
                Ordering::Less => Side::Left,
                Ordering::Equal => return Ok(Place::Found(at)),
                Ordering::Greater => Side::Right,
            };
            let next_link = route.link(side);
            let next_seen = next_link.load();
            if link.load() != seen {
                return Err(Interference);
            }
            // Two nodes that are each other's child: a rotation is half done, and what was between them out of reach.
            if next_seen.child() == above && above != NIL {
                return Err(Interference);
            }
            (link, seen, above) = (next_link, next_seen, at);
            depth += 1;
        }
    }
}
