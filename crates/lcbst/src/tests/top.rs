//! The hottest keys against a sort.

use std::num::NonZeroU32;
use std::vec::Vec;

use super::{SplitMix, all_or_few};
use crate::CountingTree;

fn sorted(tree: &CountingTree<u64>) -> Vec<(&u64, u64)> {
    let mut all: Vec<_> = tree.weights().collect();
    all.sort_by_key(|&(key, weight)| (core::cmp::Reverse(weight), *key));
    all
}

fn check(tree: &CountingTree<u64>) {
    let expected = sorted(tree);
    assert_eq!(tree.hottest().collect::<Vec<_>>(), expected);
    for k in [0, 1, 2, 3, 10, 31, 32, 33, 100, expected.len().saturating_sub(1), expected.len(), usize::MAX] {
        assert_eq!(tree.top_k(k), expected[..k.min(expected.len())], "k = {k}");
    }
}

const KEYS: u64 = all_or_few(5000, 100);
const ACCESSES: u64 = all_or_few(20_000, 150);

#[test]
fn top_k_equals_a_sort_where_few_keys_are_hot() {
    let mut random = SplitMix(7);
    let mut tree: CountingTree<u64> = CountingTree::new();
    for _ in 0..ACCESSES {
        tree.touch(random.skewed(KEYS) * 7919 % KEYS, 1);
    }
    check(&tree);
    // Few enough for a search, of which some end and some are given up for a scan.
    let expected = sorted(&tree);
    for k in 0..all_or_few(40, 4) {
        assert_eq!(tree.top_k(k), expected[..k], "k = {k}");
    }
}

/// One node in 2,048 is opened on trial. If no key is found, or too few of those that are wanted, a scan finds them all.
#[test]
#[cfg_attr(miri, ignore = "the trial is of one opening and more in trees of thousands of keys only")]
fn a_search_given_up_ends_in_the_same_order() {
    const KEYS: u64 = 100_000;
    const TRIAL: usize = KEYS as usize / 2048;
    let mut random = SplitMix(10);
    let mut tree: CountingTree<u64> = CountingTree::new();
    tree.touch_sorted((0..KEYS).map(|key| (key, 10 + random.next() % 10)));
    let opened_for = |tree: &CountingTree<u64>, keys: usize| {
        let mut hottest = tree.hottest();
        assert_eq!(hottest.by_ref().take(keys).count(), keys);
        hottest.opened()
    };
    let check = |tree: &CountingTree<u64>, ks: &[usize]| {
        let expected = sorted(tree);
        for &k in ks {
            assert_eq!(tree.top_k(k), expected[..k], "k = {k}");
        }
    };

    // All about as hot: on trial without one key found.
    assert!(opened_for(&tree, 1) > TRIAL);
    check(&tree, &[1, 2, 100, 390]);

    // One found on trial: enough to go on for 256 keys, and not for 257. Either way the search for the others is given up.
    tree.touch(777, 1 << 40);
    assert!(opened_for(&tree, 1) <= TRIAL && opened_for(&tree, 2) > KEYS as usize / 32);
    check(&tree, &[1, 2, 255, 256, 257, 300]);

    // One found on trial, and 199 others after it. These are not given up, but more keys are.
    tree.touch_sorted((0..200).map(|key| (key * 499, 100_000 + key * 1000)));
    assert!(opened_for(&tree, 1) <= TRIAL && (TRIAL..KEYS as usize / 32).contains(&opened_for(&tree, 200)));
    check(&tree, &[1, 150, 200, 201, 300]);
}

/// A scan that gathers keys cuts off the worse half whenever there are too many. Of equal weights the lesser key is the
/// better one: in descending order each key is better than all before it, and in ascending order none.
#[test]
fn keys_of_equal_weight_come_in_key_order_however_they_lie_in_memory() {
    const KEYS: u64 = all_or_few(30_000, 60);
    let orders: [fn(u64) -> u64; 3] = [|at| at, |at| KEYS - 1 - at, |at| at * 7919 % KEYS];
    let check = |tree: &CountingTree<u64>, weight: u64| {
        let keys = KEYS as usize;
        for k in [1, 2, keys / 250, keys / 30, keys / 3, keys / 2 - 1, keys / 2, keys / 2 + 1, keys - 1, keys] {
            let top = tree.top_k(k);
            assert!(top.iter().map(|(key, _)| **key).eq(0..k as u64), "weight {weight}, k = {k}");
            assert!(top.iter().all(|&(_, found)| found == weight));
        }
    };
    for order in orders {
        let mut tree: CountingTree<u64> = CountingTree::with_half_life(NonZeroU32::new(1));
        for at in 0..KEYS {
            tree.touch(order(at), 7);
        }
        check(&tree, 7 * tree.scale());
        // Faded to nothing, which no chain of keys without weight is needed for.
        tree.advance(u64::MAX);
        check(&tree, 0);
    }
}

#[test]
fn top_k_equals_a_sort_where_all_keys_are_about_as_hot() {
    let mut random = SplitMix(8);
    let mut tree: CountingTree<u64> = CountingTree::new();
    for _ in 0..ACCESSES {
        tree.touch(random.next() % KEYS, 1);
    }
    check(&tree);
}

#[test]
fn keys_of_equal_weight_come_in_key_order() {
    for weight in [0, 1] {
        let mut tree: CountingTree<u64> = CountingTree::new();
        const KEYS: u64 = all_or_few(1000, 40);
        for step in 0..KEYS {
            tree.touch(step * 7919 % KEYS, weight);
        }
        tree.touch(KEYS / 2, 1);
        check(&tree);
        let first: Vec<u64> = tree.hottest().map(|(key, _)| *key).take(4).collect();
        assert_eq!(first, [KEYS / 2, 0, 1, 2]);
    }
}

#[test]
fn the_hottest_are_found_without_opening_the_cold_part() {
    const KEYS: usize = all_or_few(100_000, 300);
    const HOT: [u64; 3] = all_or_few([7, 70_000, 99_999], [7, 210, 299]);
    let mut tree: CountingTree<u64> = (0..KEYS as u64).map(|key| (key, ())).collect();
    for key in HOT {
        tree.touch(key, 1_000_000);
    }
    let [low, middle, high] = HOT.each_ref().map(|key| (key, 1_000_001));
    assert_eq!(tree.top_k(4), [low, middle, high, (&0, 1)]);
    let mut hottest = tree.hottest();
    assert_eq!(hottest.len(), KEYS);
    let first: Vec<u64> = hottest.by_ref().map(|(key, _)| *key).take(3).collect();
    assert_eq!(first, HOT);
    assert_eq!(hottest.len(), KEYS - 3);
    assert!(hottest.opened() < 100, "{} nodes opened", hottest.opened());
}
