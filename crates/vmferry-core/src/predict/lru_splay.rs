//! The depth in a splay tree of the pages written last.

use super::page_list::PageList;
use super::{Predictor, RankedPage, ranked, trackable, trackable_pages};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

const NIL: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Node {
    page: u32,
    links: [u32; 2],
}

/// LRU with a splay tree: each write splays its page to the root, and a full LRU list drops the page at its end, from the
/// tree too. The nearer to the root, the hotter.
///
/// A splay tree over pages that are written in the order of their numbers, as an epoch's are, tends to a chain; so depth
/// here is little more than the order of the last writes, at a price.
///
/// Heat is 1 / (1 + depth), the root being at depth 0: an order and no rate.
///
/// Sources: E. P. Zaw and N. L. Thein, "Improved live VM migration using LRU and splay tree algorithm", International
/// Journal of Computer Science and Telecommunications 3(3), 2012; D. Sleator and R. Tarjan, "Self-adjusting binary search
/// trees", Journal of the ACM 32(3), 1985.
#[derive(Debug, Clone)]
pub struct LruSplayPredictor {
    capacity: usize,
    recency: PageList<()>,
    nodes: Vec<Node>,
    /// Slots of `nodes` that are not in use.
    free: Vec<u32>,
    root: u32,
    /// The ancestors met by the latest descent, the root first.
    path: Vec<u32>,
}

impl LruSplayPredictor {
    /// A predictor that knows at most `capacity` pages.
    ///
    /// # Panics
    /// If the capacity is 0.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a predictor for no page");
        let recency = PageList::new();
        Self { capacity, recency, nodes: Vec::new(), free: Vec::new(), root: NIL, path: Vec::new() }
    }

    fn touch(&mut self, page: u32) {
        if self.recency.touch(page).is_none() {
            if self.recency.len() == self.capacity
                && let Some((dropped, ())) = self.recency.pop_bottom()
            {
                self.remove(dropped);
            }
            self.recency.push(page, ());
        }
        let mut at = self.descend(page);
        if at == NIL {
            at = self.link_leaf(page);
        }
        self.splay(at);
    }

    /// The node of a page, or [`NIL`]; its ancestors are in `path` then.
    fn descend(&mut self, page: u32) -> u32 {
        self.path.clear();
        let mut at = self.root;
        while let Some(node) = self.nodes.get(at as usize)
            && node.page != page
        {
            self.path.push(at);
            at = node.links[usize::from(page > node.page)];
        }
        at
    }

    /// Links a new leaf under the last node of the path.
    fn link_leaf(&mut self, page: u32) -> u32 {
        let leaf = Node { page, links: [NIL; 2] };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = leaf;
                at
            }
            None => {
                self.nodes.push(leaf);
                self.nodes.len() as u32 - 1
            }
        };
        match self.path.last() {
            Some(&parent) => {
                let side = usize::from(page > self.nodes[parent as usize].page);
                self.nodes[parent as usize].links[side] = at;
            }
            None => self.root = at,
        }
        at
    }

    /// Rotates the node whose ancestors are in `path` to the root.
    fn splay(&mut self, at: u32) {
        while let Some(parent) = self.path.pop() {
            let Some(&grandparent) = self.path.last() else {
                self.rotate(parent, at);
                break;
            };
            if self.side_of(parent, at) == self.side_of(grandparent, parent) {
                self.rotate(grandparent, parent);
                self.rotate(parent, at);
            } else {
                self.rotate(parent, at);
                self.rotate(grandparent, at);
            }
            self.path.pop();
            if let Some(&above) = self.path.last() {
                let side = self.side_of(above, grandparent);
                self.nodes[above as usize].links[side] = at;
            }
        }
        self.root = at;
    }

    fn side_of(&self, parent: u32, child: u32) -> usize {
        usize::from(self.nodes[child as usize].page > self.nodes[parent as usize].page)
    }

    /// Puts the child above the parent. The link to the parent from above is the caller's to mend, except where it leads
    /// on to the child by another rotation.
    fn rotate(&mut self, parent: u32, child: u32) {
        let side = self.side_of(parent, child);
        self.nodes[parent as usize].links[side] = self.nodes[child as usize].links[1 - side];
        self.nodes[child as usize].links[1 - side] = parent;
    }

    /// Takes a page out of the tree, without splaying: to drop a page is no use of it. With two children its predecessor
    /// takes its place.
    fn remove(&mut self, page: u32) {
        let mut at = self.descend(page);
        let [left, right] = self.nodes[at as usize].links;
        if left != NIL && right != NIL {
            let replaced = at;
            self.path.push(at);
            at = left;
            while self.nodes[at as usize].links[1] != NIL {
                self.path.push(at);
                at = self.nodes[at as usize].links[1];
            }
            self.nodes[replaced as usize].page = self.nodes[at as usize].page;
        }
        let [left, right] = self.nodes[at as usize].links;
        let child = if left == NIL { right } else { left };
        match self.path.last() {
            Some(&parent) => {
                let links = &mut self.nodes[parent as usize].links;
                let side = usize::from(links[1] == at);
                links[side] = child;
            }
            None => self.root = child,
        }
        self.free.push(at);
    }

    fn heat_at(depth: u32) -> f64 {
        1.0 / (1.0 + f64::from(depth))
    }
}

impl Predictor for LruSplayPredictor {
    fn name(&self) -> &'static str {
        "lru-splay"
    }

    fn observe(&mut self, _owner: AddressSpaceId, written: &[PageRun]) {
        trackable_pages(written).for_each(|page| self.touch(page));
    }

    fn end_epoch(&mut self) {}

    fn tracked_pages(&self) -> u64 {
        self.recency.len() as u64
    }

    /// Takes time in proportion to the depth, for which no bound is known.
    fn heat(&self, page: PageNumber) -> f64 {
        let Some(page) = trackable(page) else { return 0.0 };
        let (mut at, mut depth) = (self.root, 0);
        while let Some(node) = self.nodes.get(at as usize) {
            if node.page == page {
                return Self::heat_at(depth);
            }
            at = node.links[usize::from(page > node.page)];
            depth += 1;
        }
        0.0
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        let mut pending = vec![(self.root, 0)];
        while let Some((at, depth)) = pending.pop() {
            if let Some(node) = self.nodes.get(at as usize) {
                each(ranked(node.page, Self::heat_at(depth)));
                pending.extend(node.links.map(|link| (link, depth + 1)));
            }
        }
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.recency.memory_bytes()
            + self.nodes.capacity() * size_of::<Node>()
            + (self.free.capacity() + self.path.capacity()) * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use lcbst::{CountingTree, Splay};
    use proptest::prelude::*;

    use super::super::LruPredictor;
    use super::super::testing::{Trace, assert_consistent, assert_same, trace};
    use super::*;

    /// The plain tree: a page and its two subtrees.
    #[derive(Debug, Clone)]
    struct Plain {
        page: u64,
        below: [Option<Box<Plain>>; 2],
    }

    impl Plain {
        fn depths(tree: Option<&Self>, depth: u32, into: &mut Vec<(u64, f64)>) {
            let Some(tree) = tree else { return };
            into.push((tree.page, 1.0 / (1.0 + f64::from(depth))));
            tree.below.iter().for_each(|below| Self::depths(below.as_deref(), depth + 1, into));
        }

        /// Takes a page out by the definition: of two subtrees the greatest page of the left one comes up.
        fn without(tree: Option<Box<Self>>, page: u64) -> Option<Box<Self>> {
            let mut tree = tree?;
            if tree.page != page {
                let side = usize::from(page > tree.page);
                tree.below[side] = Self::without(tree.below[side].take(), page);
                return Some(tree);
            }
            match tree.below.each_mut().map(Option::take) {
                [None, only] | [only, None] => only,
                [Some(left), right] => {
                    let mut greatest = &left;
                    while let Some(greater) = &greatest.below[1] {
                        greatest = greater;
                    }
                    let page = greatest.page;
                    Some(Box::new(Self { page, below: [Self::without(Some(left), page), right] }))
                }
            }
        }

        /// Brings a page, which is put in if it is missing, up by the steps of the paper. How many levels it still lies
        /// below the root of the tree, 0 or 1.
        fn splayed(tree: Option<Box<Self>>, page: u64) -> (Box<Self>, u32) {
            let Some(mut tree) = tree else { return (Box::new(Self { page, below: [None, None] }), 0) };
            if tree.page == page {
                return (tree, 0);
            }
            let side = usize::from(page > tree.page);
            let (child, depth) = Self::splayed(tree.below[side].take(), page);
            if depth == 0 {
                // The page is the child. Whether this is the last step or half of one is known further up.
                tree.below[side] = Some(child);
                return (tree, 1);
            }
            let inner = usize::from(page > child.page);
            if side == inner {
                // Zig-zig: first the child over the tree, then the page over the child.
                let mut middle = child;
                tree.below[side] = middle.below[1 - side].take();
                middle.below[1 - side] = Some(tree);
                (Self::lifted(middle, side), 0)
            } else {
                tree.below[side] = Some(Self::lifted(child, inner));
                (Self::lifted(tree, side), 0)
            }
        }

        /// One rotation: the subtree on this side comes up.
        fn lifted(mut tree: Box<Self>, side: usize) -> Box<Self> {
            let mut child = tree.below[side].take().expect("there is something to lift");
            tree.below[side] = child.below[1 - side].take();
            child.below[1 - side] = Some(tree);
            child
        }
    }

    proptest! {
        #[test]
        fn splays_as_the_paper_has_it(trace in trace(60), capacity in 1..50_usize) {
            let mut predictor = LruSplayPredictor::new(capacity);
            let mut tree: Option<Box<Plain>> = None;
            let mut recent: Vec<u64> = Vec::new();
            for written in trace.iter() {
                for page in Trace::feed(&mut predictor, written) {
                    if recent.contains(&page) {
                        recent.retain(|&other| other != page);
                    } else if recent.len() == capacity {
                        tree = Plain::without(tree, recent.remove(0));
                    }
                    recent.push(page);
                    let (top, depth) = Plain::splayed(tree, page);
                    let side = usize::from(page > top.page);
                    tree = Some(if depth == 1 { Plain::lifted(top, side) } else { top });
                }
                let mut expected = Vec::new();
                Plain::depths(tree.as_deref(), 0, &mut expected);
                assert_same(&predictor, expected);
            }
        }

        /// Knows the pages that LRU knows, and while none is dropped has the shape of the splay tree of `lcbst`.
        #[test]
        fn agrees_with_another_splay_tree(trace in trace(60)) {
            let mut predictor = LruSplayPredictor::new(60);
            let mut lru = LruPredictor::new(60);
            let mut tree: CountingTree<u64, (), Splay> = CountingTree::default();
            for written in trace.iter() {
                Trace::feed(&mut lru, written);
                for page in Trace::feed(&mut predictor, written) {
                    tree.touch(page, 1);
                }
                prop_assert!(assert_consistent(&predictor).keys().eq(assert_consistent(&lru).keys()));
                let depth = |page| tree.depth(&page).expect("no page is dropped") as f64;
                assert_same(&predictor, tree.keys().map(|&page| (page, 1.0 / (1.0 + depth(page)))));
            }
        }
    }
}
