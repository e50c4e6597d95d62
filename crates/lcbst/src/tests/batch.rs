//! A sorted batch against the same keys one by one.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::string::{String, ToString};
use std::vec::Vec;

use super::{SplitMix, all_or_few};
use crate::{
    CbTree, Climb, CountingTree, DepthLimited, Lazy, LazyAsPrinted, MAX_TOTAL_WEIGHT, NoRotation, RotationRule,
    SemiSplay, Splay,
};

fn random_batch(random: &mut SplitMix, keys: u64, length: u64, heaviest: u64) -> BTreeMap<u64, u64> {
    (0..length).map(|_| (random.next() % keys, random.next() % (heaviest + 1))).collect()
}

#[test]
fn a_batch_counts_as_its_keys_one_by_one_do() {
    fn check<R: RotationRule + Default>(half_life: Option<NonZeroU32>, heaviest: u64) {
        let mut random = SplitMix(21);
        let mut together: CountingTree<u64, u64, R> = CountingTree::with_rule(R::default(), half_life);
        let mut one_by_one: CountingTree<u64, u64, R> = CountingTree::with_rule(R::default(), half_life);
        let keys = all_or_few(500, 20);
        for round in 0..all_or_few(60, 5) {
            let length = all_or_few([0, 1, 3, 40, 400], [0, 1, 3, 8, 20])[round % 5];
            let batch = random_batch(&mut random, keys, length, heaviest);
            together.touch_sorted(batch.clone());
            together.check_invariants();
            for (key, weight) in batch {
                one_by_one.touch(key, weight);
            }
            let gone = random.next() % keys;
            assert_eq!(together.remove(&gone), one_by_one.remove(&gone));
            together.advance(1);
            one_by_one.advance(1);
            assert!(together.weights().eq(one_by_one.weights()), "round {round}");
            assert_eq!((together.scale(), together.len()), (one_by_one.scale(), one_by_one.len()));
        }
    }
    fn check_all<R: RotationRule + Default>() {
        check::<R>(None, 9);
        check::<R>(NonZeroU32::new(3), 9);
        // So heavy that batches are counted in part, or the tree renormalises in the middle of one.
        check::<R>(None, u64::MAX >> 9);
        check::<R>(NonZeroU32::new(1), u64::MAX >> 30);
    }
    check_all::<Lazy>();
    if cfg!(miri) {
        // The other rules differ in what they decide, not in what they touch.
        return;
    }
    check_all::<LazyAsPrinted>();
    check_all::<DepthLimited<Lazy>>();
    check_all::<CbTree>();
    check_all::<SemiSplay>();
    check_all::<Splay>();
    check_all::<NoRotation>();
}

#[test]
fn a_batch_of_many_pieces_counts_as_its_keys_one_by_one_do() {
    const KEYS: u64 = all_or_few(20_000, 600);

    /// The kinds of stretches that a batch can run through, in turn: each key is in it, each second one, few, or none.
    fn batch(random: &mut SplitMix, keys: core::ops::Range<u64>) -> BTreeMap<u64, u64> {
        let mut batch = BTreeMap::new();
        let mut next = keys.start;
        while next < keys.end {
            let end = keys.end.min(next + random.next() % all_or_few(600, 60));
            match [1, 2, 40, u64::MAX][random.next() as usize % 4] {
                u64::MAX => (),
                step => batch.extend((next..end).step_by(step as usize).map(|key| (key, random.next() % 10))),
            }
            next = end + 1;
        }
        batch.extend([(keys.start, 3), (keys.end - 1, 0)]);
        batch
    }

    fn check<R: RotationRule + Default>(seed: u64) {
        let mut random = SplitMix(seed);
        // Only the middle, and there only each third key, is known before.
        let known = (KEYS / 4..KEYS * 3 / 4).step_by(3);
        let (first, last) = (KEYS / 4, known.clone().last().expect("some keys are known"));
        let mut together: CountingTree<u64, u64, R> = CountingTree::default();
        together.touch_sorted(known.map(|key| (key, random.skewed(1000))));
        let mut one_by_one: CountingTree<u64, u64, R> = CountingTree::with_rule(R::default(), None);
        one_by_one.touch_sorted(together.weights().map(|(key, weight)| (*key, weight)));

        // From the first known key to the last, then far beyond both; then all of these keys are there.
        for keys in [first..last + 1, 0..KEYS, 0..KEYS].into_iter().skip(all_or_few(0, 2)) {
            let batch = batch(&mut random, keys.clone());
            assert!(batch.len() > 256 && [keys.start, keys.end - 1].iter().all(|key| batch.contains_key(key)));
            together.touch_sorted(batch.clone());
            together.check_invariants();
            for (key, weight) in batch {
                one_by_one.touch(key, weight);
            }
            assert!(together.weights().eq(one_by_one.weights()));
            assert_eq!(together.total_weight(), one_by_one.total_weight());
            for _ in 0..all_or_few(20, 2) {
                let (start, end) = (random.next() % KEYS, random.next() % KEYS);
                assert_eq!(together.weight_of(start..end), one_by_one.weight_of(start..end));
            }
        }
    }
    check::<Lazy>(1);
    if cfg!(miri) {
        return;
    }
    check::<Lazy>(2);
    check::<Lazy>(3);
    check::<LazyAsPrinted>(4);
    check::<CbTree>(5);
    check::<SemiSplay>(6);
    check::<NoRotation>(7);
}

/// A batch, and the depths in key order and the rotations that there are after it.
type Step<'a> = (&'a [(i32, u64)], &'a [usize], u64);

/// Counts batches in a tree and in its mirror image, and in both of them below a heavy key as well. The keys hang as in a
/// tree without rotations, and without weight, before the first batch.
fn check_shapes(keys: &[i32], steps: &[Step<'_>]) {
    for (sign, above) in [1, -1].into_iter().flat_map(|sign| [None, Some(1000), Some(-1000)].map(|above| (sign, above)))
    {
        let mut tree: CountingTree<i32> = CountingTree::new();
        for key in above.into_iter().chain(keys.iter().map(|key| key * sign)) {
            // Nothing that has no weight is rotated.
            tree.touch(key, 0);
        }
        tree.touch_sorted(above.map(|above| (above, 1000)));
        assert_eq!(tree.rotations(), 0);
        for &(batch, depths, rotations) in steps {
            let mut batch: Vec<(i32, u64)> = batch.iter().map(|&(key, weight)| (key * sign, weight)).collect();
            let mut depths: Vec<usize> = depths.iter().map(|depth| depth + above.iter().len()).collect();
            if sign < 0 {
                batch.reverse();
                depths.reverse();
            }
            tree.touch_sorted(batch);
            tree.check_invariants();
            let found = tree.keys().filter(|key| Some(**key) != above).map(|key| tree.depth(key).expect("it is there"));
            assert!(found.clone().eq(depths), "sign {sign}, above {above:?}: {:?}", found.collect::<Vec<_>>());
            assert_eq!(tree.rotations(), rotations, "sign {sign}, above {above:?}");
        }
    }
}

#[test]
fn a_child_that_outweighs_after_a_batch_rotates_once() {
    // 50 above 30 above 20 and 40, and above 70.
    const KEYS: [i32; 5] = [50, 30, 70, 20, 40];
    check_shapes(
        &KEYS,
        &[
            // 1 + 1 from below against 1 + 1: nothing to gain.
            (&[(20, 1), (30, 1), (40, 1), (50, 1), (70, 1)], &[2, 1, 2, 0, 1], 0),
            // A batch of one key makes it 2 + 1.
            (&[(30, 1)], &[1, 0, 2, 1, 2], 1),
        ],
    );
    // All at once: 5 + 1 against 1 + 1.
    check_shapes(&KEYS, &[(&[(20, 1), (30, 5), (40, 1), (50, 1), (70, 1)], &[1, 0, 2, 1, 2], 1)]);
}

#[test]
fn an_inner_subtree_that_outweighs_after_a_batch_rotates_twice() {
    // 50 above 30 above 20 and 40, 40 above 35 and 45; and 50 above 70.
    const KEYS: [i32; 7] = [50, 30, 70, 20, 40, 35, 45];
    const AFTER: &[usize] = &[2, 1, 2, 0, 2, 1, 2];
    check_shapes(
        &KEYS,
        &[
            // From below 7 + 2 on the outside, and 3 + 5 + 2 on the inside, against 9 + 1.
            (&[(20, 2), (30, 7), (35, 3), (40, 5), (45, 2), (50, 9), (70, 1)], &[2, 1, 3, 2, 3, 0, 1], 0),
            // A batch of one key makes the inside 11. From 30 it lifts nothing: 5 + 3 against 7 + 2.
            (&[(45, 1)], AFTER, 2),
        ],
    );
    check_shapes(&KEYS, &[(&[(20, 2), (30, 7), (35, 3), (40, 5), (45, 3), (50, 9), (70, 1)], AFTER, 2)]);
}

#[test]
fn a_rule_that_does_not_adjust_after_batches_is_not_called() {
    #[derive(Default)]
    struct Counted<const ADJUSTS: bool>(u64);
    impl<const ADJUSTS: bool> RotationRule for Counted<ADJUSTS> {
        const ADJUSTS_AFTER_BATCH: bool = ADJUSTS;
        fn after_hit<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}
        fn after_insert<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}
        fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, _: [bool; 2]) {
            self.0 += 1;
            while climb.descend(crate::Side::Left) {}
            climb.rotate_up();
        }
    }
    fn check<R: RotationRule + Default>() -> CountingTree<u64, (), R> {
        let mut tree: CountingTree<u64, (), R> = CountingTree::default();
        for first in 0..3 {
            tree.touch_sorted((first..all_or_few(3000, 30)).step_by(3).map(|key| (key, key)));
        }
        // Those may have rebuilt the tree; known keys do not.
        tree.touch_sorted((0..all_or_few(3000, 30)).step_by(2).map(|key| (key, key)));
        tree.check_invariants();
        tree
    }
    let (called, spared) = (check::<Counted<true>>(), check::<Counted<false>>());
    let limited = check::<DepthLimited<Counted<false>>>();
    assert!(called.rule().0 > 0 && called.rotations() > 0);
    assert_eq!((spared.rule().0, limited.rule().0.0, spared.rotations()), (0, 0, 0));
    assert!(called.weights().eq(spared.weights()));
}

#[test]
fn a_batch_into_an_empty_tree_is_balanced_by_weight() {
    const FULL: u64 = all_or_few(1023, 63);
    let deepest = FULL.ilog2() as usize;
    let mut even: CountingTree<u64> = CountingTree::new();
    even.touch_sorted((0..FULL).map(|key| (key, 5)));
    even.check_invariants();
    assert_eq!(even.depth_statistics().maximum, deepest);

    let mut weightless: CountingTree<u64> = CountingTree::new();
    weightless.touch_sorted((0..FULL).map(|key| (key, 0)));
    weightless.check_invariants();
    assert_eq!(weightless.depth_statistics().maximum, deepest);

    const HOT: u64 = all_or_few(997, 47);
    let mut skewed: CountingTree<u64> = CountingTree::new();
    skewed.touch_sorted((0..HOT + 3).map(|key| (key, if key == HOT { 100_000 } else { key % 3 })));
    skewed.check_invariants();
    assert_eq!(skewed.depth(&HOT), Some(0));
    let total = skewed.total_weight();
    for (key, weight) in skewed.weights().filter(|&(_, weight)| weight > 0) {
        assert!(skewed.depth(key) <= Some((total / weight).ilog2() as usize));
    }
}

/// Batches of which most keys are new, into trees whose nodes lie in order and in disorder; what the rule could not have
/// built by itself is balanced afterwards, and stays within the bound of the CB tree.
#[test]
fn a_batch_of_new_keys_rebuilds_the_tree_under_every_rule() {
    fn check<R: RotationRule + Default>(half_life: Option<NonZeroU32>) {
        const KEYS: u64 = all_or_few(2000, 60);
        let mut random = SplitMix(25);
        let mut tree: CountingTree<u64, u64, R> = CountingTree::with_rule(R::default(), half_life);
        let mut model: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for round in 0..all_or_few(20, 4) {
            let scale = tree.scale();
            let batch: BTreeMap<u64, u64> =
                (0..KEYS).map(|_| (random.next() % (8 * KEYS), 1 + random.skewed(1000))).collect();
            for (&key, weight) in &batch {
                let entry = model.entry(key).or_default();
                *entry = (entry.0 + 1, entry.1 + weight * scale);
            }
            let rotations = tree.rotations();
            tree.touch_sorted_with(batch, |_, calls| *calls += 1);
            tree.check_invariants();
            assert!(
                tree.weights().map(|(key, weight)| (*key, weight)).eq(model.iter().map(|(key, entry)| (*key, entry.1)))
            );
            assert!(tree.values().eq(model.values().map(|(calls, _)| calls)));
            assert!(tree.nodes.is_sorted_by(|a, b| a.key < b.key), "round {round}");
            assert_eq!(tree.rotations(), rotations);
            assert!(tree.nodes.capacity() <= tree.len() + tree.len() / 8 + KEYS as usize);
            let total = tree.total_weight();
            for (key, weight) in tree.weights() {
                assert!(tree.depth(key) <= Some((total / weight).ilog2() as usize + 1), "round {round}, key {key}");
            }
            // Forgets most of them again: one by one, from both ends, or at once.
            match round % 3 {
                0 => model.keys().copied().filter(|key| key % 4 > 0).for_each(|key| {
                    tree.remove(&key);
                }),
                1 => (0..model.len() / 4).for_each(|_| {
                    tree.pop_first();
                    tree.pop_last();
                }),
                _ => tree.retain(|key, _| key % 5 == 0),
            }
            tree.check_invariants();
            model.retain(|key, _| tree.contains_key(key));
            tree.advance(1);
        }
    }
    check::<Lazy>(None);
    check::<CbTree>(NonZeroU32::new(3));
    if cfg!(miri) {
        return;
    }
    check::<LazyAsPrinted>(NonZeroU32::new(1));
    check::<DepthLimited<Lazy>>(None);
    check::<SemiSplay>(None);
    check::<Splay>(NonZeroU32::new(3));
    check::<NoRotation>(None);
}

#[test]
fn ascending_batches_keep_the_counting_rules_shallow() {
    fn check<R: RotationRule + Default>() -> usize {
        const LENGTH: u64 = all_or_few(50, 6);
        let mut tree: CountingTree<u64, (), R> = CountingTree::default();
        for first in (0..400 * LENGTH).step_by(LENGTH as usize).take(all_or_few(400, 8)) {
            tree.touch_sorted((first..first + LENGTH).map(|key| (key, 1)));
        }
        tree.check_invariants();
        tree.depth_statistics().maximum
    }
    let depths = [check::<Lazy>(), check::<DepthLimited<Lazy>>(), check::<CbTree>()];
    assert!(depths.iter().all(|&depth| depth <= all_or_few(28, 9)), "lazy, depth-limited, CB tree: {depths:?}");
    // Preferring a zig-zag that gains less than a zig leaves two more levels for each batch. Not for use with batches.
    assert!(check::<LazyAsPrinted>() > all_or_few(400, 9));
}

#[test]
fn hot_keys_rise_with_batches_alone() {
    fn check<R: RotationRule + Default>() {
        const HOT: [u64; 3] = all_or_few([17, 1234, 4000], [17, 44, 58]);
        let mut tree: CountingTree<u64, (), R> = (0..all_or_few(4096, 64)).map(|key| (key, ())).collect();
        for _ in 0..all_or_few(100, 10) {
            tree.touch_sorted(HOT.map(|key| (key, 100)));
        }
        tree.check_invariants();
        for key in HOT {
            assert!(tree.depth(&key) <= Some(4), "key {key} is at {:?}", tree.depth(&key));
        }
    }
    check::<Lazy>();
    check::<CbTree>();
}

#[test]
fn every_step_of_a_batch_lowers_the_weighted_path_length() {
    #[derive(Default)]
    struct Watched {
        rotating_steps: u64,
    }
    impl RotationRule for Watched {
        fn after_hit<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}
        fn after_insert<K, V>(&mut self, _: &mut Climb<'_, K, V>) {}
        fn after_batch<K, V>(&mut self, climb: &mut Climb<'_, K, V>, reached: [bool; 2]) {
            assert_eq!(climb.depth(), 0);
            let (before, rotations) = (super::weighted_path_length(climb.nodes), *climb.rotations);
            Lazy.after_batch(climb, reached);
            let made = *climb.rotations - rotations;
            assert!(made <= 2);
            if made > 0 {
                assert!(super::weighted_path_length(climb.nodes) < before);
                self.rotating_steps += 1;
            }
        }
    }
    let mut random = SplitMix(22);
    let mut tree: CountingTree<u64, (), Watched> = CountingTree::default();
    for _ in 0..all_or_few(200, 15) {
        tree.touch_sorted(random_batch(&mut random, all_or_few(300, 40), all_or_few(20, 8), 50));
    }
    tree.check_invariants();
    assert!(tree.rule().rotating_steps > all_or_few(100, 10));
}

#[test]
fn a_chain_costs_a_batch_time_but_no_stack() {
    const KEYS: u64 = all_or_few(20_000, 50);
    let mut tree: CountingTree<u64, (), NoRotation> = (0..KEYS).map(|key| (key, ())).collect();
    tree.touch_sorted([(0, 1), (KEYS - 1, 1), (KEYS, 1)]);
    tree.check_invariants();
    assert_eq!((tree.weight(&(KEYS - 1)), tree.depth(&KEYS)), (Some(2), Some(KEYS as usize)));
}

#[test]
fn keys_of_a_batch_are_moved_in_and_dropped_where_known() {
    let mut tree: CountingTree<String, u32> = CountingTree::new();
    tree.insert("b".to_string(), 7);
    tree.touch_sorted(["a", "b", "c", "d"].map(|key| (key.to_string(), 2)));
    let all: Vec<_> = tree.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    assert_eq!(all, [("a", 0), ("b", 7), ("c", 0), ("d", 0)]);
    tree.check_invariants();
}

#[test]
fn a_batch_at_the_limit_is_counted_as_far_as_there_is_room() {
    let mut tree: CountingTree<u64> = CountingTree::new();
    tree.touch(5, MAX_TOTAL_WEIGHT - 10);
    tree.touch_sorted([(1, 7), (5, 2), (9, u64::MAX), (10, 1)]);
    assert_eq!([1, 5, 9, 10].map(|key| tree.weight(&key)), [Some(7), Some(MAX_TOTAL_WEIGHT - 8), Some(1), Some(0)]);
    tree.check_invariants();
}

#[test]
#[should_panic(expected = "must strictly increase; those at 1 and 2 do not")]
fn a_batch_with_a_key_twice_is_refused() {
    let mut tree: CountingTree<u64> = CountingTree::new();
    tree.touch_sorted([(1, 1), (2, 1), (2, 1)]);
}

#[test]
fn a_refused_batch_counts_nothing() {
    let mut tree: CountingTree<u64> = (0..10).map(|key| (key, ())).collect();
    let outcome =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| tree.touch_sorted([(1, 5), (3, 5), (2, 5)])));
    assert!(outcome.is_err());
    assert_eq!(tree.total_weight(), 10);
    tree.check_invariants();
}

#[test]
fn a_batch_hands_out_each_value_once() {
    fn check<R: RotationRule + Default>(half_life: Option<NonZeroU32>, heaviest: u64) {
        let mut random = SplitMix(23);
        let mut with_values: CountingTree<u64, u64, R> = CountingTree::with_rule(R::default(), half_life);
        let mut without: CountingTree<u64, u64, R> = CountingTree::with_rule(R::default(), half_life);
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        let keys = all_or_few(500, 20);
        for round in 1..all_or_few(60, 6) {
            let length = all_or_few([0, 1, 3, 40, 400], [0, 1, 3, 8, 20])[round as usize % 5];
            let batch = random_batch(&mut random, keys, length, heaviest);
            for &key in batch.keys() {
                let value = model.entry(key).or_default();
                *value = *value * 3 + round;
            }
            let mut seen = Vec::new();
            with_values.touch_sorted_with(batch.clone(), |key, value| {
                seen.push(*key);
                *value = *value * 3 + round;
            });
            seen.sort_unstable();
            assert!(seen.iter().eq(batch.keys()), "round {round}: {seen:?}");
            without.touch_sorted(batch);

            with_values.check_invariants();
            assert!(with_values.iter().eq(&model), "round {round}");
            // To hand out values changes nothing else.
            assert!(with_values.weights().eq(without.weights()), "round {round}");
            assert_eq!(with_values.shape(), without.shape(), "round {round}");
            let gone = random.next() % keys;
            assert_eq!(with_values.remove(&gone), model.remove(&gone));
            without.remove(&gone);
            with_values.advance(1);
            without.advance(1);
        }
    }
    fn check_all<R: RotationRule + Default>() {
        check::<R>(None, 9);
        check::<R>(NonZeroU32::new(3), 9);
        // So heavy that keys of a batch are counted one by one.
        check::<R>(None, u64::MAX >> 9);
    }
    check_all::<Splay>();
    if cfg!(miri) {
        return;
    }
    check_all::<Lazy>();
    check_all::<CbTree>();
    check_all::<NoRotation>();
}

#[test]
fn a_tree_filled_by_batches_keeps_little_room_in_reserve() {
    let mut tree: CountingTree<u64> = CountingTree::new();
    for batch in 0..all_or_few(2000_u64, 8) {
        tree.touch_sorted((0..all_or_few(50, 10)).map(|key| (key * 2000 + batch, 1)));
        assert!(tree.nodes.capacity() <= tree.len() + tree.len() / 8 + 50, "{} keys", tree.len());
    }
}

#[test]
fn a_call_that_panics_leaves_a_valid_tree() {
    let mut random = SplitMix(24);
    const KEYS: u64 = all_or_few(200, 20);
    for calls in (0..KEYS as usize * 3 / 2).step_by(all_or_few(1, 10)) {
        let mut tree: CountingTree<u64, u64> = CountingTree::new();
        tree.touch_sorted((0..KEYS).map(|key| (key * 2, key)));
        let batch: BTreeMap<u64, u64> = (0..2 * KEYS).map(|key| (key, random.next() % 9)).collect();
        let mut left = calls;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tree.touch_sorted_with(batch, |_, value| {
                left = usize::checked_sub(left, 1).expect("the last call that was asked for");
                *value += 1;
            });
        }));
        assert!(outcome.is_err());
        tree.check_invariants();
        assert_eq!(tree.values().sum::<u64>(), calls as u64);
    }
}
