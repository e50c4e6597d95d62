//! The hottest keys against a sort.

use std::vec::Vec;

use super::SplitMix;
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

#[test]
fn top_k_equals_a_sort_where_few_keys_are_hot() {
    let mut random = SplitMix(7);
    let mut tree: CountingTree<u64> = CountingTree::new();
    for _ in 0..20_000 {
        tree.touch(random.skewed(5000) * 7919 % 5000, 1);
    }
    check(&tree);
    // Few enough for a search, of which some end and some are given up for a scan.
    let expected = sorted(&tree);
    for k in 0..40 {
        assert_eq!(tree.top_k(k), expected[..k], "k = {k}");
    }
}

#[test]
fn top_k_equals_a_sort_where_all_keys_are_about_as_hot() {
    let mut random = SplitMix(8);
    let mut tree: CountingTree<u64> = CountingTree::new();
    for _ in 0..20_000 {
        tree.touch(random.next() % 5000, 1);
    }
    check(&tree);
}

#[test]
fn keys_of_equal_weight_come_in_key_order() {
    for weight in [0, 1] {
        let mut tree: CountingTree<u64> = CountingTree::new();
        for step in 0..1000 {
            tree.touch(step * 7919 % 1000, weight);
        }
        tree.touch(500, 1);
        check(&tree);
        let first: Vec<u64> = tree.hottest().map(|(key, _)| *key).take(4).collect();
        assert_eq!(first, [500, 0, 1, 2]);
    }
}

#[test]
fn the_hottest_are_found_without_opening_the_cold_part() {
    let mut tree: CountingTree<u64> = (0..100_000).map(|key| (key, ())).collect();
    for key in [7, 70_000, 99_999] {
        tree.touch(key, 1_000_000);
    }
    assert_eq!(tree.top_k(4), [(&7, 1_000_001), (&70_000, 1_000_001), (&99_999, 1_000_001), (&0, 1)]);
    let mut hottest = tree.hottest();
    assert_eq!(hottest.len(), 100_000);
    let first: Vec<u64> = hottest.by_ref().map(|(key, _)| *key).take(3).collect();
    assert_eq!(first, [7, 70_000, 99_999]);
    assert_eq!(hottest.len(), 99_997);
    assert!(hottest.opened() < 100, "{} nodes opened", hottest.opened());
}
