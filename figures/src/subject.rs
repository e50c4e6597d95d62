//! What is measured: structures that count accesses per key, behind one interface each for one and for many threads.
//!
//! The loop over the keys is inside the interface, so that calling through it costs once per run and not once per access.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use lcbst::concurrent::ConcurrentLcbst;
use lcbst::{CbTree, CountingTree, Lazy, LazyAsPrinted, RotationRule, SemiSplay, Splay};
use lcbst_figures::picture::{Colour, Look, Marker};
use splay_tree::SplayMap;

/// Names in tables and legends.
pub(crate) const LAZY: &str = "lazy counting-based";
pub(crate) const CB_TREE: &str = "CBTree 3/5";
pub(crate) const SPLAY: &str = "splay";
pub(crate) const LAZY_AS_PRINTED: &str = "lazy as printed";
pub(crate) const SEMI_SPLAY: &str = "semi-splay";
pub(crate) const SPLAY_CRATE: &str = "crate splay_tree";
pub(crate) const B_TREE_MAP: &str = "BTreeMap";
pub(crate) const HASH_MAP: &str = "HashMap";
pub(crate) const FLAT_ARRAY: &str = "flat array";
pub(crate) const MUTEX_SPLAY: &str = "splay in a Mutex";
pub(crate) const MUTEX_LAZY: &str = "lazy in a Mutex";
pub(crate) const MUTEX_CB_TREE: &str = "CBTree 3/5 in a Mutex";
pub(crate) const RW_LOCK_B_TREE_MAP: &str = "BTreeMap in an RwLock";
pub(crate) const CONCURRENT: &str = "ConcurrentLcbst";
pub(crate) const ATOMIC_ARRAY: &str = "flat array of atomics";

/// How each of them is drawn; everything else is a reference.
pub(crate) fn look(name: &str) -> Look {
    let (colour, marker) = match name {
        SPLAY | MUTEX_SPLAY => (Colour::Vermilion, Marker::Circle),
        LAZY | MUTEX_LAZY => (Colour::Blue, Marker::Square),
        LAZY_AS_PRINTED => (Colour::SkyBlue, Marker::Diamond),
        CB_TREE | MUTEX_CB_TREE => (Colour::Green, Marker::Triangle),
        SEMI_SPLAY => (Colour::Orange, Marker::Diamond),
        SPLAY_CRATE => (Colour::Brown, Marker::PointDown),
        B_TREE_MAP | RW_LOCK_B_TREE_MAP => (Colour::Black, Marker::PointDown),
        HASH_MAP | CONCURRENT => (Colour::Purple, Marker::Circle),
        FLAT_ARRAY | ATOMIC_ARRAY => (Colour::Grey, Marker::Square),
        _ => return Look::REFERENCE,
    };
    Look::line(colour, marker)
}

/// What an access found on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Found {
    /// Ancestors of the key, just before the access.
    pub(crate) mean_depth: f64,
    /// log2 of the total weight over the key's weight.
    pub(crate) mean_log2_share: f64,
    pub(crate) rotations_per_access: f64,
}

/// A counter of accesses for one thread.
pub(crate) trait Subject {
    fn name(&self) -> &'static str;

    /// Counts one access of each key, in this order.
    fn count_all(&mut self, keys: &[u64]);

    /// Counts like [`Subject::count_all`] and looks at each path; `None` from a structure that has none to show.
    fn trace(&mut self, keys: &[u64]) -> Option<Found>;
}

/// Everything figure 6 compares, empty, for the keys `0..keys`.
pub(crate) fn all(keys: u64) -> Vec<Box<dyn Subject>> {
    vec![
        tree(SPLAY, Splay, keys),
        tree(LAZY, Lazy, keys),
        tree(LAZY_AS_PRINTED, LazyAsPrinted, keys),
        tree(CB_TREE, CbTree::default(), keys),
        tree(SEMI_SPLAY, SemiSplay, keys),
        Box::new(Plain(SPLAY_CRATE, SplayMap::new(), |map: &mut SplayMap<u64, u64>, key| {
            *map.entry(key).or_insert(0) += 1;
        })),
        Box::new(Plain(B_TREE_MAP, BTreeMap::new(), |map: &mut BTreeMap<u64, u64>, key| {
            *map.entry(key).or_default() += 1;
        })),
        Box::new(Plain(HASH_MAP, HashMap::new(), |map: &mut HashMap<u64, u64>, key| {
            *map.entry(key).or_default() += 1;
        })),
        Box::new(Plain(FLAT_ARRAY, vec![0_u64; keys as usize], |counts: &mut Vec<u64>, key| {
            counts[key as usize] += 1;
        })),
    ]
}

/// The two trees whose growth is shown, empty.
pub(crate) fn growing(keys: u64) -> Vec<Box<dyn Subject>> {
    vec![tree(LAZY, Lazy, keys), tree(CB_TREE, CbTree::default(), keys)]
}

fn tree<R: RotationRule + 'static>(name: &'static str, rule: R, keys: u64) -> Box<dyn Subject> {
    let mut tree = CountingTree::with_rule(rule, None);
    tree.reserve(keys as usize);
    Box::new(Tree(name, tree))
}

struct Tree<R>(&'static str, CountingTree<u64, (), R>);

impl<R: RotationRule> Subject for Tree<R> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn count_all(&mut self, keys: &[u64]) {
        for &key in keys {
            self.1.touch(black_box(key), 1);
        }
    }

    fn trace(&mut self, keys: &[u64]) -> Option<Found> {
        let mut found = Found::default();
        let rotations_before = self.1.rotations();
        for &key in keys {
            if let (Some(depth), Some(weight)) = (self.1.depth(&key), self.1.weight(&key)) {
                found.mean_depth += depth as f64;
                found.mean_log2_share += (self.1.total_weight() as f64 / weight as f64).log2();
            }
            self.1.touch(key, 1);
        }
        let accesses = keys.len() as f64;
        Some(Found {
            mean_depth: found.mean_depth / accesses,
            mean_log2_share: found.mean_log2_share / accesses,
            rotations_per_access: (self.1.rotations() - rotations_before) as f64 / accesses,
        })
    }
}

/// A structure without a path to show, and how it counts.
struct Plain<M, F>(&'static str, M, F);

impl<M, F: Fn(&mut M, u64)> Subject for Plain<M, F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn count_all(&mut self, keys: &[u64]) {
        for &key in keys {
            (self.2)(&mut self.1, black_box(key));
        }
    }

    fn trace(&mut self, keys: &[u64]) -> Option<Found> {
        self.count_all(keys);
        None
    }
}

/// A counter of accesses for many threads.
pub(crate) trait Shared: Sync {
    fn name(&self) -> &'static str;

    /// Counts one access.
    fn count(&self, key: u64);
}

/// Everything figure 7 compares, empty, for the keys `0..keys`.
pub(crate) fn all_shared(keys: u64) -> Vec<Box<dyn Shared>> {
    vec![
        locked(MUTEX_SPLAY, Splay, keys),
        locked(MUTEX_LAZY, Lazy, keys),
        locked(MUTEX_CB_TREE, CbTree::default(), keys),
        Box::new(RwLocked(RwLock::default())),
        Box::new(Concurrent(ConcurrentLcbst::with_capacity(keys as usize))),
        Box::new(AtomicArray((0..keys).map(|_| AtomicU64::new(0)).collect())),
    ]
}

fn locked<R: RotationRule + Send + 'static>(name: &'static str, rule: R, keys: u64) -> Box<dyn Shared> {
    let mut tree = CountingTree::with_rule(rule, None);
    tree.reserve(keys as usize);
    Box::new(Locked(name, Mutex::new(tree)))
}

struct Locked<R>(&'static str, Mutex<CountingTree<u64, (), R>>);

impl<R: RotationRule + Send> Shared for Locked<R> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn count(&self, key: u64) {
        self.1.lock().unwrap_or_else(PoisonError::into_inner).touch(key, 1);
    }
}

/// Counts present keys under the read lock: the best that a lock around a map can do.
struct RwLocked(RwLock<BTreeMap<u64, AtomicU64>>);

impl Shared for RwLocked {
    fn name(&self) -> &'static str {
        RW_LOCK_B_TREE_MAP
    }

    fn count(&self, key: u64) {
        if let Some(count) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            count.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut map = self.0.write().unwrap_or_else(PoisonError::into_inner);
        map.entry(key).or_default().fetch_add(1, Ordering::Relaxed);
    }
}

struct Concurrent(ConcurrentLcbst<u64>);

impl Shared for Concurrent {
    fn name(&self) -> &'static str {
        CONCURRENT
    }

    fn count(&self, key: u64) {
        self.0.touch(key, 1);
    }
}

struct AtomicArray(Vec<AtomicU64>);

impl Shared for AtomicArray {
    fn name(&self) -> &'static str {
        ATOMIC_ARRAY
    }

    fn count(&self, key: u64) {
        self.0[key as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trees_show_their_paths() {
        let keys: Vec<u64> = (0..100).collect();
        for mut subject in all(100) {
            subject.count_all(&keys);
            let has_paths = [SPLAY, LAZY, LAZY_AS_PRINTED, CB_TREE, SEMI_SPLAY].contains(&subject.name());
            assert_eq!(subject.trace(&keys).is_some(), has_paths, "{}", subject.name());
        }
    }

    #[test]
    fn a_trace_sees_depth_share_and_rotations() {
        let mut subject = tree(SPLAY, Splay, 2);
        subject.count_all(&[0, 1]);
        // Key 1 is the root, and so 0 is one below it; each has half of the weight at first.
        let found = subject.trace(&[0]).unwrap();
        assert_eq!(found, Found { mean_depth: 1.0, mean_log2_share: 1.0, rotations_per_access: 1.0 });
    }

    #[test]
    fn shared_subjects_count_from_many_threads() {
        for subject in all_shared(10) {
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| (0..10).for_each(|key| subject.count(key)));
                }
            });
        }
    }

    #[test]
    fn every_subject_has_a_look_of_its_own_in_its_figure() {
        for names in [
            all(1).iter().map(|subject| subject.name()).collect::<Vec<_>>(),
            all_shared(1).iter().map(|subject| subject.name()).collect(),
        ] {
            let looks: Vec<Look> = names.iter().map(|name| look(name)).collect();
            for (at, look) in looks.iter().enumerate() {
                assert_ne!(*look, Look::REFERENCE, "{}", names[at]);
                assert!(!looks[..at].contains(look), "{}", names[at]);
            }
        }
    }
}
