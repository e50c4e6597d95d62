//! What holds under every rotation rule, and the bounds that belong to one of them.

use std::vec::Vec;

use super::{SplitMix, all_or_few};
use crate::node::Node;
use crate::{
    CbTree, Climb, CountingTree, DepthLimited, Lazy, LazyAsPrinted, NoRotation, RotationRule, SemiSplay, Splay,
};

/// Calls a function with one type parameter for every rule of the crate.
macro_rules! for_every_rule {
    ($check:ident) => {
        $check::<Lazy>();
        $check::<CbTree>();
        $check::<Splay>();
        if !cfg!(miri) {
            // They differ from the above in what they decide, not in what they touch.
            $check::<LazyAsPrinted>();
            $check::<DepthLimited<Lazy>>();
            $check::<SemiSplay>();
            $check::<NoRotation>();
        }
    };
}

fn skewed_accesses(seed: u64, keys: u64, count: usize, heaviest: u64) -> Vec<(u64, u64)> {
    let mut random = SplitMix(seed);
    (0..count).map(|_| (random.skewed(keys) * 7919 % keys, random.next() % (heaviest + 1))).collect()
}

#[test]
fn order_and_sums_hold_after_every_operation() {
    fn check<R: RotationRule + Default>() {
        let mut tree: CountingTree<u64, (), R> = CountingTree::default();
        for (step, (key, weight)) in
            skewed_accesses(11, all_or_few(120, 20), all_or_few(1500, 50), 3).into_iter().enumerate()
        {
            match step % 7 {
                6 => drop(tree.remove(&key)),
                5 => drop(tree.access(&key, weight)),
                _ => drop(tree.touch(key, weight)),
            }
            tree.check_invariants();
        }
    }
    for_every_rule!(check);
}

#[test]
fn counts_do_not_depend_on_the_order_of_accesses() {
    fn count<R: RotationRule + Default>(accesses: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut tree: CountingTree<u64, (), R> = CountingTree::default();
        for &(key, weight) in accesses {
            tree.touch(key, weight);
        }
        tree.check_invariants();
        tree.weights().map(|(key, weight)| (*key, weight)).collect()
    }
    fn check<R: RotationRule + Default>() {
        let mut accesses = skewed_accesses(6, all_or_few(200, 20), all_or_few(2000, 25), 4);
        let expected = count::<Lazy>(&accesses);
        let mut random = SplitMix(7);
        for _ in 0..3 {
            for last in (1..accesses.len()).rev() {
                accesses.swap(last, (random.next() % (last as u64 + 1)) as usize);
            }
            assert_eq!(count::<R>(&accesses), expected);
        }
    }
    for_every_rule!(check);
}

#[test]
fn top_k_equals_a_sort() {
    fn check<R: RotationRule + Default>() {
        let mut tree: CountingTree<u64, (), R> = CountingTree::default();
        for (key, weight) in skewed_accesses(8, all_or_few(3000, 60), all_or_few(20_000, 80), 2) {
            tree.touch(key, weight);
        }
        let mut sorted: Vec<_> = tree.weights().collect();
        sorted.sort_by_key(|&(key, weight)| (core::cmp::Reverse(weight), *key));
        assert!(tree.hottest().eq(sorted.iter().copied()));
        for k in [1, 5, 11, 100, 5000] {
            assert_eq!(tree.top_k(k), sorted[..k.min(sorted.len())], "k = {k}");
        }
    }
    for_every_rule!(check);
}

#[test]
fn weights_scaled_by_a_power_of_two_make_the_same_shape() {
    fn check<R: RotationRule + Default>() {
        for &shift in all_or_few(&[1, 7, 40][..], &[7]) {
            let (mut plain, mut scaled): (CountingTree<u64, (), R>, CountingTree<u64, (), R>) = Default::default();
            for (key, weight) in skewed_accesses(3, all_or_few(500, 30), all_or_few(5000, 50), 4) {
                plain.touch(key, weight);
                scaled.touch(key, weight << shift);
            }
            let batch = || (0..all_or_few(700, 50)).step_by(3).map(|key| (key, key % 50));
            plain.touch_sorted(batch());
            scaled.touch_sorted(batch().map(|(key, weight)| (key, weight << shift)));
            assert_eq!(plain.shape(), scaled.shape());
            assert_eq!(plain.rotations(), scaled.rotations());
            assert_eq!(plain.total_weight() << shift, scaled.total_weight());
        }
    }
    for_every_rule!(check);
}

const ORDERED_KEYS: u32 = all_or_few(20_000, 24);

/// The greatest depth after inserting keys in each of four bad orders.
fn depths_after_ordered_insertions<R: RotationRule + Default>() -> [usize; 4] {
    const KEYS: u32 = ORDERED_KEYS;
    fn depth<R: RotationRule + Default>(keys: impl Iterator<Item = u32>) -> usize {
        let mut tree: CountingTree<u32, (), R> = CountingTree::default();
        for key in keys {
            tree.touch(key, 1);
        }
        tree.check_invariants();
        assert_eq!(tree.len(), KEYS as usize);
        tree.depth_statistics().maximum
    }
    let outside_in = |step| if step % 2 == 0 { step / 2 } else { KEYS - 1 - step / 2 };
    let middle_out = |step| if step % 2 == 0 { KEYS / 2 + step / 2 } else { KEYS / 2 - 1 - step / 2 };
    [
        depth::<R>(0..KEYS),
        depth::<R>((0..KEYS).rev()),
        depth::<R>((0..KEYS).map(outside_in)),
        depth::<R>((0..KEYS).map(middle_out)),
    ]
}

#[test]
fn ordered_insertions_keep_the_counting_rules_shallow() {
    for depths in [
        depths_after_ordered_insertions::<Lazy>(),
        depths_after_ordered_insertions::<LazyAsPrinted>(),
        depths_after_ordered_insertions::<DepthLimited<Lazy>>(),
    ] {
        assert!(
            depths.iter().all(|&depth| depth <= all_or_few(20, 9)),
            "ascending, descending, zig-zag, middle-out: {depths:?}"
        );
    }
    let depths = depths_after_ordered_insertions::<CbTree>();
    assert!(
        depths.iter().all(|&depth| depth <= all_or_few(28, 12)),
        "ascending, descending, zig-zag, middle-out: {depths:?}"
    );
    // What the others are compared with: a splay tree of ascending keys is a chain.
    assert_eq!(depths_after_ordered_insertions::<Splay>()[0], ORDERED_KEYS as usize - 1);
}

/// `Σ log₂ W` over all nodes.
fn potential<K, V>(nodes: &[Node<K, V>]) -> f64 {
    nodes.iter().map(|node| (node.total() as f64).log2()).sum()
}

/// Makes the steps of the CB tree's rule one by one and checks each against its promise.
struct WatchedPotential {
    rule: CbTree,
    least_fall: f64,
    steps_that_rotated: u64,
}

impl WatchedPotential {
    fn new(rule: CbTree) -> Self {
        let (numerator, denominator) = rule.threshold();
        let theta = f64::from(numerator) / f64::from(denominator);
        let least_fall = (theta / (1.0 - theta)).log2().min((4.0 * theta * theta).log2());
        Self { rule, least_fall, steps_that_rotated: 0 }
    }

    fn check(&mut self, before: f64, after: f64, rotations: u64) {
        if rotations == 0 {
            // The same weights. Under Miri the same logarithm differs from call to call.
            assert!((before - after).abs() <= all_or_few(0.0, 1e-9), "the potential changed by {}", after - before);
        } else {
            assert!(rotations <= 2, "more than one double rotation");
            assert!(before - after >= self.least_fall - 1e-9, "the potential fell by {}", before - after);
            self.steps_that_rotated += 1;
        }
    }
}

impl RotationRule for WatchedPotential {
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        while climb.depth() > 0 {
            let (before, rotations) = (potential(climb.nodes), *climb.rotations);
            let rotated = self.rule.step(climb);
            let made = *climb.rotations - rotations;
            assert_eq!(rotated, made > 0);
            self.check(before, potential(climb.nodes), made);
        }
    }

    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        self.after_hit(climb);
    }

    fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
        let (before, rotations) = (potential(climb.nodes), *climb.rotations);
        self.rule.after_batch(climb, reached);
        // In the middle of a batch the nodes above are counted and not yet climbed: their weights are final.
        let made = *climb.rotations - rotations;
        self.check(before, potential(climb.nodes), made);
    }
}

#[test]
fn every_step_of_the_cb_tree_lowers_the_potential() {
    assert!((WatchedPotential::new(CbTree::default()).least_fall - 0.526).abs() < 0.001);
    for &(numerator, denominator) in all_or_few(&[(3, 5), (501, 1000), (2, 3), (9, 10)][..], &[(3, 5), (501, 1000)]) {
        let rule = WatchedPotential::new(CbTree::with_threshold(numerator, denominator));
        let mut tree: CountingTree<u64, (), WatchedPotential> = CountingTree::with_rule(rule, None);
        let keys = all_or_few(250, 25);
        for key in 0..keys * 2 / 5 {
            tree.touch(key, 1);
        }
        for (key, weight) in skewed_accesses(4, keys, all_or_few(3000, 40), 4) {
            // A weight of 0 has no logarithm.
            tree.touch(key, weight + 1);
        }
        let mut random = SplitMix(5);
        for _ in 0..all_or_few(50, 3) {
            let first = random.next() % keys;
            tree.touch_sorted((first..keys + 50).step_by(13).map(|key| (key, 1 + random.next() % 300)));
        }
        tree.check_invariants();
        assert!(
            tree.rule().steps_that_rotated > all_or_few(50, 3),
            "{numerator}/{denominator} rotated too little to show anything"
        );
    }
}

#[test]
fn a_replayed_pass_brings_the_cb_tree_to_rest() {
    let accesses = skewed_accesses(2, all_or_few(4096, 16), all_or_few(50_000, 40), 0);
    let mut tree: CountingTree<u64, (), CbTree> = CountingTree::default();
    const PASSES: usize = all_or_few(40, 8);
    let rotations: Vec<u64> = (0..PASSES)
        .map(|_| {
            let before = tree.rotations();
            for &(key, _) in &accesses {
                tree.touch(key, 1);
            }
            tree.rotations() - before
        })
        .collect();
    assert!(rotations[0] > all_or_few(100, 0), "{rotations:?}");
    assert_eq!(rotations[PASSES * 3 / 4..], [0; PASSES / 4], "{rotations:?}");
}

#[test]
fn without_a_rotation_the_depth_in_a_cb_tree_is_within_its_bound() {
    /// `⌊log_{5/3}(total / own)⌋`, exactly: the most times that `own·5^k ≤ total·3^k`.
    fn steps_of_two_levels(total: u64, own: u64) -> usize {
        let (mut inner, mut outer, mut steps) = (u128::from(own), u128::from(total), 0);
        while inner * 5 <= outer * 3 {
            (inner, outer, steps) = (inner * 5, outer * 3, steps + 1);
        }
        steps
    }
    let mut tree: CountingTree<u64, (), CbTree> = CountingTree::default();
    let (mut checked, mut tight) = (0, 0);
    for (key, _) in skewed_accesses(9, all_or_few(2000, 30), all_or_few(60_000, 150), 0) {
        let before = tree.rotations();
        tree.touch(key, 1);
        if tree.rotations() == before {
            let depth = tree.depth(&key).expect("it was touched");
            let own = tree.weight(&key).expect("it was touched");
            let bound = 2 * steps_of_two_levels(tree.total_weight(), own) + 1;
            assert!(depth <= bound, "key {key} of weight {own} at depth {depth}, bound {bound}");
            checked += 1;
            tight += u64::from(depth + 6 >= bound);
        }
    }
    assert!(
        checked > all_or_few(50_000, 100) && tight > all_or_few(100, 10),
        "{checked} accesses without a rotation, {tight} near the bound"
    );
}

#[test]
#[should_panic(expected = "above 1/2")]
fn a_threshold_of_one_half_is_refused() {
    let _ = CbTree::with_threshold(1, 2);
}

#[test]
#[should_panic(expected = "below 1")]
fn a_threshold_of_one_is_refused() {
    let _ = CbTree::with_threshold(5, 5);
}

#[test]
fn splaying_brings_every_key_to_the_root() {
    let mut tree: CountingTree<u64, (), Splay> = CountingTree::default();
    for (key, weight) in skewed_accesses(12, all_or_few(300, 30), all_or_few(2000, 50), 3) {
        tree.touch(key, weight);
        assert_eq!(tree.depth(&key), Some(0));
    }
    // A full splay halves the depth of what it passed: a chain is gone after a few.
    const CHAIN: usize = all_or_few(1024, 32);
    let mut chain: CountingTree<u64, (), Splay> = (0..CHAIN as u64).map(|key| (key, ())).collect();
    assert_eq!(chain.depth_statistics().maximum, CHAIN - 1);
    chain.touch(0, 1);
    assert!(chain.depth_statistics().maximum <= CHAIN / 2 + 1);
}

#[test]
fn semi_splaying_halves_a_chain_and_no_rotation_leaves_it() {
    const LAST: u64 = all_or_few(999, 49);
    let mut plain: CountingTree<u64, (), NoRotation> = (0..=LAST).map(|key| (key, ())).collect();
    plain.touch(LAST, 1_000_000);
    assert_eq!((plain.rotations(), plain.depth(&LAST)), (0, Some(LAST as usize)));

    let mut semi: CountingTree<u64, (), SemiSplay> = CountingTree::default();
    for (key, weight) in skewed_accesses(13, all_or_few(300, 30), all_or_few(2000, 50), 3) {
        let before = tree_depth(&semi, key);
        semi.touch(key, weight);
        assert!(before.is_none_or(|before| tree_depth(&semi, key) <= Some(before.div_ceil(2))));
    }
    fn tree_depth(tree: &CountingTree<u64, (), SemiSplay>, key: u64) -> Option<usize> {
        tree.depth(&key)
    }
}
