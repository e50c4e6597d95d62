//! Forward decay in the tree: exact sums at all times, and weights near those of real-valued ageing.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::vec::Vec;

use super::{SplitMix, all_or_few};
use crate::{CountingTree, FRACTION_BITS, MAX_DOUBLINGS, MAX_TOTAL_WEIGHT};

fn aged(half_life_epochs: u32) -> CountingTree<u64> {
    CountingTree::with_half_life(NonZeroU32::new(half_life_epochs))
}

#[test]
fn a_weight_halves_with_each_half_life() {
    let mut tree = aged(4);
    tree.touch(1, 1024);
    for half_lives in 0..10 {
        assert_eq!(tree.weight_today(&1), Some(1024.0 / f64::from(1 << half_lives)));
        tree.advance(4);
    }
    assert_eq!((tree.epoch(), tree.half_life_epochs()), (40, NonZeroU32::new(4)));
}

#[test]
fn no_old_node_changes_when_epochs_pass() {
    let mut tree = aged(4);
    for key in 0..100 {
        tree.touch(key, key);
    }
    let before: Vec<_> = tree.weights().map(|(key, weight)| (*key, weight)).collect();
    tree.advance(u64::from(MAX_DOUBLINGS) * 4);
    assert!(tree.weights().map(|(key, weight)| (*key, weight)).eq(before));
    assert_eq!(tree.scale(), 1 << (FRACTION_BITS + MAX_DOUBLINGS));
}

#[test]
fn renormalising_divides_all_weights_and_keeps_shape_and_sums() {
    let mut tree = aged(1);
    let mut random = SplitMix(9);
    let keys = all_or_few(500, 30);
    for _ in 0..all_or_few(5000, 100) {
        tree.touch(random.skewed(keys) * 7919 % keys, 1 << (random.next() % 40));
    }
    let (shape, before) = (tree.shape(), tree.weights().map(|(_, weight)| weight).collect::<Vec<_>>());
    tree.advance(u64::from(MAX_DOUBLINGS) + 1);
    tree.check_invariants();
    assert_eq!(tree.shape(), shape);
    assert_eq!(tree.scale(), 1 << FRACTION_BITS);
    assert!(tree.weights().map(|(_, weight)| weight).eq(before.into_iter().map(|was| was >> (MAX_DOUBLINGS + 1))));
}

#[test]
fn renormalising_makes_room_before_the_limit() {
    let mut tree = aged(1);
    tree.advance(20);
    tree.touch(1, 1 << 26);
    assert_eq!(tree.weight(&1), Some(1 << (FRACTION_BITS + 20 + 26)));
    tree.touch(2, 1 << 26);
    tree.check_invariants();
    assert_eq!(tree.scale(), 1 << FRACTION_BITS);
    assert_eq!((tree.weight(&1), tree.weight(&2)), (Some(1 << 42), Some(1 << 42)));

    // No doubling is left to give back: now the count stops, and the sums stay exact.
    tree.touch(3, u64::MAX);
    tree.check_invariants();
    assert_eq!(tree.total_weight(), MAX_TOTAL_WEIGHT);
    tree.touch(2, 1);
    assert_eq!(tree.weight(&2), Some(1 << 42));
    // It ages, and there is room again.
    tree.advance(1);
    tree.touch(2, 1);
    tree.check_invariants();
    assert_eq!(tree.weight(&2), Some((1 << 41) + (1 << FRACTION_BITS)));
}

#[test]
fn everything_fades_in_the_end() {
    let mut tree = aged(3);
    tree.touch(1, 1_000_000);
    tree.touch(2, 1);
    tree.advance(u64::MAX);
    tree.check_invariants();
    assert_eq!((tree.total_weight(), tree.len()), (0, 2));
    assert_eq!(tree.epoch(), u64::MAX);
    tree.touch(2, 1);
    assert_eq!(tree.top_k(1), [(&2, tree.scale())]);
}

#[test]
fn without_a_half_life_a_weight_is_a_count() {
    let mut tree: CountingTree<u64> = CountingTree::new();
    tree.touch(1, 5);
    tree.advance(1_000_000);
    tree.touch(1, 5);
    assert_eq!((tree.weight(&1), tree.weight_today(&1), tree.scale()), (Some(10), Some(10.0), 1));
    assert_eq!((tree.epoch(), tree.half_life_epochs()), (1_000_000, None));
}

/// The bound of the documentation, against ageing in floating point, over several renormalisations.
#[test]
fn the_error_stays_within_its_bound() {
    for &half_life in all_or_few(&[1, 3, 4, 7, 60][..], &[1]) {
        let mut tree = aged(half_life);
        let mut exact: BTreeMap<u64, f64> = BTreeMap::new();
        let factor = (-1.0 / f64::from(half_life)).exp2();
        let mut random = SplitMix(u64::from(half_life));
        let epochs = u64::from(half_life) * all_or_few(200, 100);
        for _ in 0..epochs {
            for _ in 0..5 {
                let (key, weight) = (random.skewed(all_or_few(40, 3)), random.next() % 3);
                tree.touch(key, weight);
                *exact.entry(key).or_default() += weight as f64;
            }
            tree.advance(1);
            exact.values_mut().for_each(|weight| *weight *= factor);
            for (key, &weight) in &exact {
                let reported = tree.weight_today(key).expect("both hold the same keys");
                let bound = (weight + 1.0) / f64::from(1 << 15);
                assert!((reported - weight).abs() <= bound, "half-life {half_life}, {reported} for {weight}");
            }
        }
        tree.check_invariants();
    }
}

#[test]
fn the_new_phase_overtakes_the_old_one() {
    let mut tree = aged(4);
    for _ in 0..100 {
        tree.touch(1, 12);
        tree.advance(1);
    }
    let mut epochs = 0;
    while tree.top_k(1)[0].0 != &2 {
        tree.touch(2, 10);
        tree.advance(1);
        epochs += 1;
    }
    // The old heat times 2^(-n/4) against 10/12 of it times 1 - 2^(-n/4): even at n = 4.55.
    assert_eq!(epochs, 5);
}
