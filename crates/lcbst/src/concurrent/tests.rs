//! Tests that look at links and sums. What takes several threads and the public operations only is in `tests/`.

use std::collections::BTreeMap;
use std::format;
use std::sync::Barrier;
use std::thread;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::ConcurrentLcbst;
use super::hints::RING_HINTS;
use super::primitive::{self, lock};
use crate::node::NIL;
use crate::tests::{SplitMix, all_or_few, all_or_few_cases};

impl<K: Ord, V> ConcurrentLcbst<K, V> {
    /// The invariants of the module's documentation. The caller sees to it that no other thread is at work.
    fn check_invariants(&self) {
        let adjuster = lock(&self.adjuster);
        let arena = &self.shape.arena;
        let mut in_order = Vec::new();
        let mut seen = vec![false; arena.len()];
        let (mut pending, mut at) = (Vec::new(), self.shape.root.load().child());
        while at != NIL || !pending.is_empty() {
            if at == NIL {
                at = pending.pop().expect("one of the two is left");
                in_order.push(at);
                at = arena.route(at).links[1].load().child();
            } else {
                assert!(!seen[at as usize], "two links lead to node {at}");
                seen[at as usize] = true;
                pending.push(at);
                at = arena.route(at).links[0].load().child();
            }
        }
        for pair in in_order.windows(2) {
            assert!(arena.route(pair[0]).key() < arena.route(pair[1]).key(), "keys out of order");
        }
        let present = |at: &&u32| arena.cell(**at).tally().is_present();
        assert_eq!(self.len(), in_order.iter().filter(present).count());
        for at in 0..arena.len() as u32 {
            let tally = arena.cell(at).tally();
            assert!(seen[at as usize] || !tally.is_present(), "node {at} is present, but cannot be reached");
            assert_eq!(arena.cell(at).with_value(|_| ()).is_some(), tally.is_present());
        }

        let mut prefix = vec![0_u64];
        let mut rank = vec![0; arena.len()];
        for (position, &at) in in_order.iter().enumerate() {
            rank[at as usize] = position;
            prefix.push(prefix[position] + adjuster.account(at).applied);
        }
        let mut pending = vec![(self.shape.root.load().child(), 0, in_order.len())];
        while let Some((at, low, high)) = pending.pop() {
            if at == NIL {
                assert_eq!(low, high);
                continue;
            }
            let (account, middle) = (adjuster.account(at), rank[at as usize]);
            assert_eq!(account.below, [prefix[middle] - prefix[low], prefix[high] - prefix[middle + 1]], "node {at}");
            let [left, right] = arena.route(at).links.each_ref().map(|link| link.load().child());
            pending.push((left, low, middle));
            pending.push((right, middle + 1, high));
        }
        assert_eq!(adjuster.total(), prefix[in_order.len()]);
    }

    /// After settling: what the sums include of each node is its weight.
    fn check_settled(&self) {
        self.check_invariants();
        let adjuster = lock(&self.adjuster);
        for at in 0..self.shape.arena.len() as u32 {
            assert_eq!(adjuster.account(at).applied, self.shape.arena.cell(at).tally().weight(), "node {at}");
        }
    }

    fn weighted_path_length(&self) -> u128 {
        let adjuster = lock(&self.adjuster);
        let nodes = 0..self.shape.arena.len() as u32;
        nodes.flat_map(|at| adjuster.account(at).below).map(u128::from).sum()
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Touch(u8, u64),
    Access(u8, u64),
    Insert(u8, u16),
    Remove(u8),
    Look(u8),
    Adjust,
    Settle,
    Compact,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![
        6 => (any::<u8>(), 0..20_u64).prop_map(|(key, weight)| Operation::Touch(key, weight)),
        3 => (any::<u8>(), 0..1000_u64).prop_map(|(key, weight)| Operation::Access(key, weight)),
        3 => any::<(u8, u16)>().prop_map(|(key, value)| Operation::Insert(key, value)),
        3 => any::<u8>().prop_map(Operation::Remove),
        3 => any::<u8>().prop_map(Operation::Look),
        1 => Just(Operation::Adjust),
        1 => Just(Operation::Settle),
        1 => Just(Operation::Compact),
    ];
    proptest::collection::vec(one, 0..all_or_few(400, 25))
}

const SAME_SHAPE_KEYS: u8 = all_or_few(64, 8);

proptest! {
    #![proptest_config(all_or_few_cases(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) }))]

    #[test]
    fn one_thread_sees_a_map_with_weights(operations in operations()) {
        let mut tree = ConcurrentLcbst::<u8, u16>::with_capacity(64);
        let mut model = BTreeMap::<u8, (u16, u64)>::new();
        for operation in operations {
            match operation {
                Operation::Touch(key, weight) => {
                    prop_assert_eq!(tree.touch(key, weight), !model.contains_key(&key));
                    model.entry(key).or_default().1 += weight;
                }
                Operation::Access(key, weight) => {
                    let entry = model.get_mut(&key);
                    prop_assert_eq!(tree.access(&key, weight), entry.is_some());
                    if let Some(entry) = entry {
                        entry.1 += weight;
                    }
                }
                Operation::Insert(key, value) => {
                    let previous = model.get(&key).copied();
                    prop_assert_eq!(tree.insert(key, value), previous.map(|(value, _)| value));
                    model.insert(key, (value, previous.map_or(0, |(_, weight)| weight) + 1));
                }
                Operation::Remove(key) => {
                    prop_assert_eq!(tree.remove(&key), model.remove(&key).map(|(value, _)| value));
                }
                Operation::Look(key) => {
                    let entry = model.get(&key).copied();
                    prop_assert_eq!(tree.get(&key), entry.map(|(value, _)| value));
                    prop_assert_eq!(tree.weight(&key), entry.map(|(_, weight)| weight));
                    prop_assert_eq!(tree.contains_key(&key), entry.is_some());
                    prop_assert_eq!(tree.depth(&key).is_some(), entry.is_some());
                }
                Operation::Adjust => {
                    tree.adjust();
                    tree.check_invariants();
                }
                Operation::Settle => {
                    tree.settle();
                    tree.check_settled();
                    let sum = |range: &mut dyn Iterator<Item = (&u8, &(u16, u64))>| range.map(|(_, entry)| entry.1).sum::<u64>();
                    prop_assert_eq!(tree.total_weight(), sum(&mut model.iter()));
                    prop_assert_eq!(tree.weight_of(50..=180), sum(&mut model.range(50..=180)));
                    prop_assert_eq!(tree.weight_of(..100), sum(&mut model.range(..100)));
                }
                Operation::Compact => {
                    tree.compact();
                    tree.check_settled();
                    prop_assert_eq!(tree.nodes(), model.len());
                }
            }
            prop_assert_eq!(tree.len(), model.len());
        }
        tree.check_invariants();
        let expected: Vec<_> = model.iter().map(|(&key, &(value, weight))| (key, value, weight)).collect();
        prop_assert_eq!(tree.snapshot(), &expected[..]);
        let mut hottest: Vec<_> = expected.iter().map(|&(key, _, weight)| (key, weight)).collect();
        hottest.sort_by_key(|&(key, weight)| (core::cmp::Reverse(weight), key));
        hottest.truncate(7);
        prop_assert_eq!(tree.top_k(7), hottest);

        let sequential = tree.into_counting_tree();
        sequential.check_invariants();
        let entries: Vec<_> = sequential.iter().zip(sequential.weights()).map(|((key, value), (_, weight))| (*key, *value, weight)).collect();
        prop_assert_eq!(entries, expected);
    }

    /// With the weights settled after each access, every decision is made from what a sequential tree would know.
    #[test]
    fn settled_after_each_access_it_takes_the_shape_of_the_sequential_tree(keys in proptest::collection::vec(0..SAME_SHAPE_KEYS, 0..all_or_few(300, 25))) {
        let tree = ConcurrentLcbst::<u8>::new();
        let mut sequential = crate::CountingTree::<u8>::new();
        for key in keys {
            tree.touch(key, 1);
            tree.settle();
            sequential.touch(key, 1);
            for key in 0..SAME_SHAPE_KEYS {
                prop_assert_eq!(tree.depth(&key), sequential.depth(&key));
            }
        }
        prop_assert_eq!(tree.rotations(), sequential.rotations());
    }
}

#[test]
fn steps_at_fixed_weights_lower_the_weighted_path_length() {
    let tree = ConcurrentLcbst::<u64>::new();
    let mut random = SplitMix(1);
    let keys = all_or_few(512, 32);
    for _ in 0..all_or_few(3000, 60) {
        tree.touch(random.skewed(keys), 1);
    }
    tree.settle();
    for _ in 0..all_or_few(300, 30) {
        let key = random.next() % keys;
        let Some(node) = tree.find(&key) else { continue };
        let before = tree.weighted_path_length();
        tree.access(&key, 1);
        let depth_before = tree.depth(&key).expect("it is there") as u128;
        let rotated = tree.settle();
        // The access itself lengthens the path by the key's depth.
        let unrotated = before + depth_before;
        let after = tree.weighted_path_length();
        assert!(rotated <= 2, "a hit made {rotated} rotations");
        assert!(
            if rotated == 0 { after == unrotated } else { after < unrotated },
            "node {node}: {unrotated} to {after}"
        );
    }
    tree.check_settled();
}

#[test]
fn keys_in_any_order_stay_at_small_depth() {
    const KEYS: u32 = all_or_few(20_000, 30);
    type Order = fn(u32) -> u32;
    let orders: [(&str, Order); 3] = [
        ("ascending", |at| at),
        ("descending", |at| KEYS - at),
        ("zig-zag", |at| if at % 2 == 0 { at } else { 2 * KEYS - at }),
    ];
    for (name, order) in orders {
        let tree = ConcurrentLcbst::<u32>::with_capacity(KEYS as usize);
        for at in 0..KEYS {
            tree.touch(order(at), 1);
        }
        tree.settle();
        tree.check_settled();
        let deepest = (0..KEYS).filter_map(|at| tree.depth(&order(at))).max();
        assert!(deepest <= Some(all_or_few(24, 7)), "{name}: {deepest:?}");
    }
}

#[test]
fn weights_stop_at_their_limit() {
    let tree = ConcurrentLcbst::<u8>::new();
    tree.touch(1, u64::MAX);
    tree.touch(1, 7);
    tree.touch(2, u64::MAX);
    tree.touch(3, 5);
    tree.settle();
    tree.check_invariants();
    assert_eq!(tree.weight(&1), Some(crate::MAX_TOTAL_WEIGHT));
    assert_eq!(tree.total_weight(), crate::MAX_TOTAL_WEIGHT);
    tree.remove(&1);
    tree.remove(&2);
    tree.settle();
    tree.check_settled();
    assert_eq!(tree.total_weight(), 5);
}

#[test]
fn a_dropped_hint_is_made_up_for_by_sweeping() {
    let tree = ConcurrentLcbst::<u32>::new();
    let busy = lock(&tree.adjuster);
    for at in 0..4 * RING_HINTS as u32 {
        tree.touch(at, 1);
    }
    drop(busy);
    assert_eq!(tree.dropped_hints(), 4 * RING_HINTS as u64);
    assert_eq!(tree.total_weight(), 0);
    // Each drain sweeps a fixed part of the nodes, so a fixed number of drains finds them all.
    for _ in 0..16 {
        tree.adjust();
    }
    if primitive::IS_MODEL {
        // That part of so small a ring rounds to nothing.
        tree.settle();
    }
    tree.check_settled();
    assert_eq!(tree.total_weight(), 4 * RING_HINTS as u64);
}

#[test]
fn threads_at_once_leave_exact_weights_and_a_sound_tree() {
    const THREADS: u64 = 4;
    const KEYS: u64 = all_or_few(2_000, 20);
    const ACCESSES: u64 = all_or_few(40_000, 50);
    let tree = ConcurrentLcbst::<u64, u64>::with_capacity(64);
    let start = Barrier::new(THREADS as usize + 1);
    let models: Vec<BTreeMap<u64, u64>> = thread::scope(|scope| {
        let counters: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (tree, start) = (&tree, &start);
                scope.spawn(move || {
                    let (mut random, mut model) = (SplitMix(thread), BTreeMap::new());
                    start.wait();
                    for _ in 0..ACCESSES {
                        let key = random.skewed(KEYS);
                        tree.touch(key, 3);
                        *model.entry(key).or_default() += 3;
                        let absent = KEYS + random.next() % KEYS;
                        assert!(!tree.contains_key(&absent), "{absent} was never inserted");
                        assert!(tree.contains_key(&key), "{key} was inserted and never removed");
                    }
                    model
                })
            })
            .collect();
        scope.spawn(|| {
            start.wait();
            for _ in 0..all_or_few(200, 20) {
                tree.adjust();
                thread::yield_now();
            }
        });
        counters.into_iter().map(|counter| counter.join().expect("no thread panics")).collect()
    });

    let mut expected = BTreeMap::<u64, u64>::new();
    for (key, weight) in models.into_iter().flatten() {
        *expected.entry(key).or_default() += weight;
    }
    tree.check_invariants();
    assert!(tree.total_weight() <= THREADS * ACCESSES * 3, "sums hold no more than was counted");
    tree.settle();
    tree.check_settled();
    assert_eq!(tree.total_weight(), THREADS * ACCESSES * 3);
    let weights: Vec<_> = tree.snapshot().into_iter().map(|(key, _, weight)| (key, weight)).collect();
    assert!(weights.into_iter().eq(expected));
    assert!(tree.rotations() > 0);
    assert!(tree.nodes() <= tree.len() * THREADS as usize);
}

#[test]
fn threads_that_insert_and_remove_their_own_keys_see_their_own_changes_only() {
    const THREADS: u64 = 4;
    let mut tree = ConcurrentLcbst::<u64, u64>::with_capacity(64);
    let models: Vec<BTreeMap<u64, u64>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let tree = &tree;
                scope.spawn(move || {
                    let (mut random, mut model) = (SplitMix(100 + thread), BTreeMap::new());
                    for step in 0..all_or_few(30_000, 80) {
                        // Neighbours in key order belong to different threads, so rotations mix them all.
                        let key = random.skewed(all_or_few(512, 8)) * THREADS + thread;
                        match random.next() % 5 {
                            0 => assert_eq!(tree.insert(key, step), model.insert(key, step), "insert {key}"),
                            1 => assert_eq!(tree.remove(&key), model.remove(&key), "remove {key}"),
                            2 => assert_eq!(tree.access(&key, step), model.contains_key(&key), "access {key}"),
                            3 => assert_eq!(tree.get(&key), model.get(&key).copied(), "get {key}"),
                            _ => {
                                assert_eq!(tree.touch(key, step), !model.contains_key(&key), "touch {key}");
                                model.entry(key).or_default();
                            }
                        }
                    }
                    model
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });

    tree.check_invariants();
    let expected: BTreeMap<u64, u64> = models.into_iter().flatten().collect();
    assert_eq!(tree.len(), expected.len());
    assert!(tree.snapshot().into_iter().map(|(key, value, _)| (key, value)).eq(expected));
    tree.settle();
    tree.check_settled();
    let before = tree.snapshot();
    tree.compact();
    tree.check_settled();
    assert_eq!(tree.snapshot(), before);
    assert_eq!(tree.nodes(), tree.len());
}

/// Threads race to insert the same keys: one of each is told that the key is new.
#[test]
fn a_key_is_new_to_one_thread_only() {
    const KEYS: u64 = all_or_few(20_000, 60);
    let tree = ConcurrentLcbst::<u64>::with_capacity(64);
    let start = Barrier::new(3);
    let new: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    (0..KEYS).filter(|key| tree.touch(key * 7 % KEYS, 1)).count()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).sum()
    });
    assert_eq!(new as u64, KEYS);
    tree.settle();
    tree.check_settled();
    assert_eq!(tree.total_weight(), 3 * KEYS);
}

#[test]
fn a_panic_in_the_users_code_leaves_the_tree_usable() {
    let tree = ConcurrentLcbst::<u8, u8>::new();
    tree.insert(1, 2);
    let panicked = thread::scope(|scope| scope.spawn(|| tree.with_value(&1, |_| panic!("as planned"))).join().is_err());
    assert!(panicked);
    let panicked = thread::scope(|scope| {
        scope
            .spawn(|| {
                let _guard = lock(&tree.adjuster);
                panic!("as planned")
            })
            .join()
            .is_err()
    });
    assert!(panicked);
    assert_eq!(tree.insert(1, 3), Some(2));
    assert!(primitive::try_lock(&tree.adjuster).is_some());
    tree.settle();
    tree.check_settled();
    assert!(format!("{tree:?}").contains("len: 1"));
}
