//! The two published tables, kept with their errors, so that the tests beside it can show what each error does.
//!
//! `attempt_injection` and `rebalance` follow the tables line by line, in their order and with their conditions. What the
//! tables leave out (allocation, the rotations that are only drawn) is filled in plainly. A test names the errors that it
//! wants repaired, because nothing can be seen of one error while another stops the run. It recurses, as printed.

use std::collections::BTreeSet;
use std::vec::Vec;

/// An error of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// `while (true)` around the descent, without a return after it.
    EndlessLoop,
    /// The node made for an empty tree is linked nowhere.
    UnlinkedRoot,
    /// A new leaf is not counted in its parent.
    UncountedParent,
    /// The step is given for a left child, and made for any.
    OneSide,
    /// A node without a parent is rotated about it.
    UnguardedRoot,
    /// The zig-zag does not ask whether there is an inner child.
    UnguardedChild,
}

/// How a run stops where the tables read what does not exist, or never stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    NeverEnds,
    NoParent,
    NoChild,
}

#[derive(Clone, Debug, Default)]
pub(super) struct PrintedNode {
    pub(super) key: u32,
    pub(super) own: u64,
    pub(super) below: [u64; 2],
    pub(super) links: [Option<usize>; 2],
}

pub(super) struct PrintedTree {
    pub(super) nodes: Vec<PrintedNode>,
    pub(super) root: Option<usize>,
    /// The tables read it and nowhere set it.
    pub(super) log_size: usize,
    pub(super) splays: u64,
    repaired: Vec<Flaw>,
    rounds_left: u32,
}

impl PrintedTree {
    pub(super) fn with_repaired(repaired: &[Flaw]) -> Self {
        let repaired = repaired.to_vec();
        // The depth rule stays out of the way unless a test is about it.
        Self { nodes: Vec::new(), root: None, log_size: usize::MAX / 2, splays: 0, repaired, rounds_left: 0 }
    }

    /// Whether the key was there.
    pub(super) fn inject(&mut self, key: u32) -> Result<bool, Failure> {
        self.rounds_left = 100_000;
        self.attempt_injection(key, None, self.root, 0)
    }

    fn attempt_injection(
        &mut self,
        key: u32,
        parent: Option<usize>,
        node: Option<usize>,
        height: usize,
    ) -> Result<bool, Failure> {
        let Some(node) = node else {
            let made = self.new_node(key);
            if self.is_repaired(Flaw::UnlinkedRoot) {
                self.root = Some(made);
            }
            return Ok(false);
        };
        if key == self.nodes[node].key {
            if height >= 2 * self.log_size {
                self.splay(node);
            } else {
                self.rebalance(parent, Some(node))?;
            }
            self.nodes[node].own += 1;
            return Ok(true);
        }
        loop {
            self.rounds_left = self.rounds_left.checked_sub(1).ok_or(Failure::NeverEnds)?;
            let side = usize::from(key > self.nodes[node].key);
            let Some(child) = self.nodes[node].links[side] else {
                let child = self.new_node(key);
                self.nodes[node].links[side] = Some(child);
                if self.is_repaired(Flaw::UncountedParent) {
                    self.nodes[node].below[side] += 1;
                }
                if height >= 2 * self.log_size {
                    self.splay(child);
                }
                return Ok(false);
            };
            let found = self.attempt_injection(key, Some(node), Some(child), height + 1)?;
            self.nodes[node].below[side] += 1;
            if !found {
                let current = match parent {
                    None => Some(node),
                    Some(parent) => self.nodes[parent].links[usize::from(key > self.nodes[parent].key)],
                };
                self.rebalance(parent, current)?;
            }
            if self.is_repaired(Flaw::EndlessLoop) {
                return Ok(found);
            }
        }
    }

    pub(super) fn rebalance(&mut self, parent: Option<usize>, node: Option<usize>) -> Result<(), Failure> {
        let Some(parent) = parent else {
            return if self.is_repaired(Flaw::UnguardedRoot) { Ok(()) } else { Err(Failure::NoParent) };
        };
        let node = node.ok_or(Failure::NoChild)?;
        let is_right = self.nodes[parent].links[1] == Some(node);
        let near = usize::from(self.is_repaired(Flaw::OneSide) && is_right);
        let far = 1 - near;
        let node_plus_left = self.nodes[node].own + self.nodes[node].below[near];
        let parent_plus_right = self.nodes[parent].own + self.nodes[parent].below[far];
        let inner = self.nodes[node].links[far];
        let guarded = self.is_repaired(Flaw::UnguardedChild) && inner.is_none();
        if self.nodes[node].below[far] >= parent_plus_right && !guarded {
            let right_child = inner.ok_or(Failure::NoChild)?;
            self.replace(parent, right_child);
            let [inner_left, inner_right] = [near, far].map(|side| self.nodes[right_child].links[side]);
            self.nodes[parent].links[near] = inner_right;
            self.nodes[node].links[far] = inner_left;
            self.nodes[right_child].links[near] = Some(node);
            self.nodes[right_child].links[far] = Some(parent);
            self.nodes[parent].below[near] = self.nodes[right_child].below[far];
            self.nodes[node].below[far] = self.nodes[right_child].below[near];
            self.nodes[right_child].below[far] += parent_plus_right;
            self.nodes[right_child].below[near] += node_plus_left;
        } else if node_plus_left > parent_plus_right {
            self.replace(parent, node);
            self.nodes[parent].links[near] = self.nodes[node].links[far];
            self.nodes[node].links[far] = Some(parent);
            self.nodes[parent].below[near] = self.nodes[node].below[far];
            self.nodes[node].below[far] += parent_plus_right;
        }
        Ok(())
    }

    /// A semi-splay, as drawn: it says nothing of counters.
    fn splay(&mut self, mut node: usize) {
        self.splays += 1;
        while let Some((parent, side)) = self.parent(node) {
            match self.parent(parent) {
                Some((_, above)) if above == side => {
                    self.rotate_links(parent);
                    node = parent;
                }
                Some(_) => {
                    self.rotate_links(node);
                    self.rotate_links(node);
                }
                None => self.rotate_links(node),
            }
        }
    }

    fn rotate_links(&mut self, node: usize) {
        let Some((parent, side)) = self.parent(node) else { return };
        self.replace(parent, node);
        self.nodes[parent].links[side] = self.nodes[node].links[1 - side];
        self.nodes[node].links[1 - side] = Some(parent);
    }

    fn new_node(&mut self, key: u32) -> usize {
        self.nodes.push(PrintedNode { key, own: 1, ..PrintedNode::default() });
        self.nodes.len() - 1
    }

    fn parent(&self, node: usize) -> Option<(usize, usize)> {
        let sides = |at: usize| [(at, 0), (at, 1)];
        (0..self.nodes.len()).flat_map(sides).find(|&(at, side)| self.nodes[at].links[side] == Some(node))
    }

    /// The depth of the deepest node.
    pub(super) fn depth(&self) -> usize {
        let ancestors = |at| core::iter::successors(self.parent(at), |&(parent, _)| self.parent(parent)).count();
        (0..self.nodes.len()).map(ancestors).max().unwrap_or(0)
    }

    /// Makes the link to `old` lead to `new`.
    fn replace(&mut self, old: usize, new: usize) {
        match self.parent(old) {
            Some((grandparent, side)) => self.nodes[grandparent].links[side] = Some(new),
            None => self.root = Some(new),
        }
    }

    fn is_repaired(&self, flaw: Flaw) -> bool {
        self.repaired.contains(&flaw)
    }

    /// The nodes in key order as the links have it, or `None` if some node is reached twice.
    pub(super) fn in_order(&self) -> Option<Vec<usize>> {
        let (mut order, mut pending, mut at) = (Vec::new(), Vec::new(), self.root);
        let mut seen = BTreeSet::new();
        while at.is_some() || !pending.is_empty() {
            if let Some(node) = at {
                if !seen.insert(node) {
                    return None;
                }
                pending.push(node);
                at = self.nodes[node].links[0];
            } else if let Some(node) = pending.pop() {
                order.push(node);
                at = self.nodes[node].links[1];
            }
        }
        Some(order)
    }

    /// The number of nodes whose sums are not those of what is below them.
    pub(super) fn wrong_sums(&self) -> usize {
        let below = |link: Option<usize>| {
            let (mut sum, mut pending) = (0, Vec::from_iter(link));
            while let Some(at) = pending.pop() {
                sum += self.nodes[at].own;
                pending.extend(self.nodes[at].links.into_iter().flatten());
            }
            sum
        };
        self.nodes.iter().filter(|node| node.below != node.links.map(below)).count()
    }
}
