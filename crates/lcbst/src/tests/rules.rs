//! What the rotation rules promise.

use std::vec::Vec;

use super::{SplitMix, all_or_few, weighted_path_length};
use crate::rule::{lazy_step, lazy_step_as_printed};
use crate::{Climb, CountingTree, DepthLimited, Lazy, LocalWeights, RotationRule, Side};

/// Makes the steps of a lazy rule one by one and checks each against its promise.
#[derive(Default)]
struct Watched<const AS_PRINTED: bool> {
    steps_that_rotated: u64,
}

impl<const AS_PRINTED: bool> Watched<AS_PRINTED> {
    fn step<K, V>(&mut self, climb: &mut Climb<'_, K, V>) -> bool {
        let expected = if AS_PRINTED { gain_as_printed(climb) } else { best_gain(climb) };
        let (before, rotations) = (weighted_path_length(climb.nodes), *climb.rotations);
        let rotated = if AS_PRINTED { lazy_step_as_printed(climb) } else { lazy_step(climb) };
        let gain = before as i128 - weighted_path_length(climb.nodes) as i128;
        assert_eq!(gain, expected.unwrap_or(0), "the gain is not what the weights said");
        assert_eq!(rotated, expected.is_some());
        assert!(*climb.rotations - rotations <= 2, "more than one double rotation");
        if !AS_PRINTED && rotated {
            assert!(gain > 0, "a step that gains nothing");
        }
        self.steps_that_rotated += u64::from(rotated);
        rotated
    }
}

impl<const AS_PRINTED: bool> RotationRule for Watched<AS_PRINTED> {
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        self.step(climb);
    }

    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        while climb.depth() > 0 {
            if !self.step(climb) {
                climb.ascend();
            }
        }
    }
}

struct Gains {
    zig: i128,
    /// With the weight of the inner child and of what it is compared with.
    zig_zag: Option<(i128, u64, u64)>,
}

fn gains<K, V>(climb: &Climb<'_, K, V>) -> Option<Gains> {
    let near = climb.side(0)?;
    let far = near.opposite();
    let (node, parent): (LocalWeights, LocalWeights) = (climb.weights(0)?, climb.weights(1)?);
    let opposite = parent.own + parent.toward(far);
    let zig_zag = climb.child(far).map(|child| {
        (i128::from(child.total()) + i128::from(child.own) - i128::from(opposite), child.total(), opposite)
    });
    Some(Gains { zig: i128::from(node.own + node.toward(near)) - i128::from(opposite), zig_zag })
}

fn best_gain<K, V>(climb: &Climb<'_, K, V>) -> Option<i128> {
    let Gains { zig, zig_zag } = gains(climb)?;
    Some(zig.max(zig_zag.map_or(i128::MIN, |(gain, ..)| gain))).filter(|&gain| gain > 0)
}

fn gain_as_printed<K, V>(climb: &Climb<'_, K, V>) -> Option<i128> {
    let Gains { zig, zig_zag } = gains(climb)?;
    match zig_zag {
        Some((gain, inner, opposite)) if inner >= opposite => Some(gain),
        _ => Some(zig).filter(|&gain| gain > 0),
    }
}

#[test]
fn every_lazy_step_lowers_the_weighted_path_length() {
    fn check<const AS_PRINTED: bool>(seed: u64) {
        let mut tree: CountingTree<u64, (), Watched<AS_PRINTED>> = CountingTree::default();
        let mut random = SplitMix(seed);
        let keys = all_or_few(300, 30);
        for _ in 0..all_or_few(4000, 100) {
            let key = random.skewed(keys) * 7919 % keys;
            tree.touch(key, random.next() % 4);
        }
        tree.check_invariants();
        assert!(
            tree.rule().steps_that_rotated > all_or_few(100, 10),
            "seed {seed} rotated too little to show anything"
        );
    }
    for seed in 0..all_or_few(5, 1) {
        check::<false>(seed);
        check::<true>(seed);
    }
}

#[test]
fn a_hit_makes_at_most_one_single_or_double_rotation() {
    let keys = all_or_few(1000, 30);
    let mut tree: CountingTree<u64> = (0..keys).map(|key| (key, ())).collect();
    let mut random = SplitMix(1);
    for _ in 0..all_or_few(20_000, 100) {
        let before = tree.rotations();
        tree.touch(random.skewed(keys) * 7919 % keys, 1);
        assert!(tree.rotations() - before <= 2);
    }
}

#[test]
fn a_replayed_pass_rotates_on_few_accesses() {
    const ACCESSES: u64 = all_or_few(50_000, 40);
    let (mut random, keys) = (SplitMix(2), all_or_few(4096, 16));
    let pass: Vec<u64> = (0..ACCESSES).map(|_| random.skewed(keys) * 2_654_435_761 % keys).collect();
    let mut tree: CountingTree<u64> = CountingTree::new();
    let mut in_the_last_pass = 0;
    for _ in 0..10 {
        let before = tree.rotations();
        for &key in &pass {
            tree.touch(key, 1);
        }
        in_the_last_pass = tree.rotations() - before;
    }
    assert!(in_the_last_pass < ACCESSES / all_or_few(200, 20), "{in_the_last_pass} rotations in {ACCESSES} accesses");
}

#[test]
fn hot_keys_are_near_the_root() {
    const HOT: [u64; 3] = all_or_few([17, 1234, 4000], [17, 44, 58]);
    let mut tree: CountingTree<u64> = (0..all_or_few(4096, 64)).map(|key| (key, ())).collect();
    for _ in 0..all_or_few(1000, 40) {
        for key in HOT {
            tree.touch(key, 1);
        }
    }
    for key in HOT {
        assert!(tree.depth(&key).is_some_and(|depth| depth <= 4), "key {key} is at {:?}", tree.depth(&key));
    }
}

/// A chain made by insertions of weight zero, which give the rule nothing to decide by.
fn chain<R: RotationRule + Default>(keys: u32) -> CountingTree<u32, (), R> {
    let mut tree: CountingTree<u32, (), R> = CountingTree::default();
    for key in 0..keys {
        tree.touch(key, 0);
    }
    assert_eq!(tree.depth_statistics().maximum, keys as usize - 1);
    tree
}

#[test]
fn the_depth_rule_lifts_what_is_deeper_than_twice_the_logarithm() {
    const KEYS: u32 = all_or_few(1024, 32);
    let mut limited = chain::<DepthLimited<Lazy>>(KEYS);
    // Not deeper than that, and nothing to gain without weight.
    limited.touch(2 * KEYS.ilog2(), 0);
    assert_eq!(limited.rotations(), 0);
    limited.touch(2 * KEYS.ilog2() + 1, 0);
    assert!(limited.rotations() > 0);
    limited.check_invariants();

    limited.touch(KEYS - 1, 1);
    limited.check_invariants();
    assert!(limited.depth_statistics().maximum < all_or_few(600, 24), "a semi-splay halves the depth of its path");

    let mut unlimited = chain::<Lazy>(KEYS);
    unlimited.touch(KEYS - 1, 0);
    assert_eq!(unlimited.rotations(), 0, "off by default");
}

#[test]
fn a_chain_costs_time_but_no_stack() {
    const KEYS: u32 = all_or_few(20_000, 50);
    let mut tree = chain::<Lazy>(KEYS);
    tree.check_invariants();
    assert_eq!(tree.clone().into_iter().count(), KEYS as usize);
    assert_eq!(tree.iter().rev().count(), KEYS as usize);
    assert_eq!(tree.hottest().count(), KEYS as usize);
    tree.touch(KEYS - 1, 1);
    assert_eq!(tree.remove(&0), Some(()));
    tree.check_invariants();
}

/// Rules of other crates move the focus as they like; whatever they do, the tree stays one.
struct Random(SplitMix);

impl RotationRule for Random {
    fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        for _ in 0..self.0.next() % 20 {
            match self.0.next() % 4 {
                0 => climb.descend(Side::Left),
                1 => climb.descend(Side::Right),
                2 => climb.ascend(),
                _ => climb.rotate_up(),
            };
        }
    }

    fn after_insert<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
        self.after_hit(climb);
    }
}

#[test]
fn no_rule_can_break_the_tree() {
    let mut tree: CountingTree<u64, u64, Random> = CountingTree::with_rule(Random(SplitMix(4)), None);
    let mut random = SplitMix(5);
    for step in 0..all_or_few(3000, 60) {
        let key = random.next() % all_or_few(100, 12);
        match random.next() % 3 {
            0 => drop(tree.insert(key, step)),
            1 => drop(tree.touch(key, random.next() % 9)),
            _ => drop(tree.remove(&key)),
        }
        tree.check_invariants();
    }
    assert!(tree.rotations() > all_or_few(1000, 20));
}

#[test]
fn a_climb_reports_what_surrounds_it() {
    struct Probe;
    impl RotationRule for Probe {
        fn after_hit<K, V>(&mut self, climb: &mut Climb<'_, K, V>) {
            assert_eq!((climb.depth(), climb.key_count()), (2, 5));
            assert_eq!(climb.weights(0), Some(LocalWeights { own: 8, left: 0, right: 16 }));
            assert_eq!(climb.weights(1), Some(LocalWeights { own: 2, left: 0, right: 24 }));
            assert_eq!(climb.weights(2), Some(LocalWeights { own: 1, left: 26, right: 4 }));
            assert_eq!((climb.weights(3), climb.weights(usize::MAX)), (None, None));
            assert_eq!((climb.side(0), climb.side(1)), (Some(Side::Right), Some(Side::Left)));
            assert_eq!((climb.side(2), climb.side(3)), (None, None));
            assert_eq!(climb.child(Side::Left), None);
            assert_eq!(climb.child(Side::Right).map(LocalWeights::total), Some(16));
            assert!(!climb.descend(Side::Left));
            assert!(climb.ascend() && climb.ascend() && !climb.ascend() && !climb.rotate_up());
        }

        fn after_insert<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}
    }
    let mut tree: CountingTree<u32, (), Probe> = CountingTree::with_rule(Probe, None);
    for (key, weight) in [(40, 1), (10, 2), (50, 4), (20, 8), (30, 16)] {
        tree.touch(key, weight);
    }
    tree.touch(20, 0);
}
