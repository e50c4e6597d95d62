//! Random operations against a `BTreeMap` of counts.

use std::borrow::ToOwned;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::string::String;
use std::vec;
use std::vec::Vec;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::{all_or_few, all_or_few_cases};
use crate::decay::Decay;
use crate::{
    CbTree, CountingTree, DepthLimited, Lazy, LazyAsPrinted, MAX_TOTAL_WEIGHT, NoRotation, RotationRule, SemiSplay,
    Splay,
};

#[derive(Clone, Debug)]
enum Operation {
    Touch(u8, u64),
    Access(u8, u64),
    Insert(u8, u32),
    Remove(u8),
    Advance(u64),
    Top(usize),
    Range(u8, u8),
    Batch(BTreeMap<u8, u64>),
    /// Each so-manieth key from the first on.
    EvenBatch(u8, usize, u64),
    Entry(u8, u32),
    PopFirst,
    PopLast,
    Retain(u8),
    Arrange,
    ChangeRange(u8, u8),
    Rank(u64),
    Clear,
}

fn operation() -> impl Strategy<Value = Operation> {
    // Mostly small weights; at times so large that the total must be renormalised or capped.
    let weight = prop_oneof![8 => 0..5_u64, 2 => 0..1_u64 << 44, 1 => any::<u64>()];
    prop_oneof![
        20 => (any::<u8>(), weight.clone()).prop_map(|(key, weight)| Operation::Touch(key, weight)),
        6 => (any::<u8>(), weight.clone()).prop_map(|(key, weight)| Operation::Access(key, weight)),
        10 => (any::<u8>(), any::<u32>()).prop_map(|(key, value)| Operation::Insert(key, value)),
        10 => any::<u8>().prop_map(Operation::Remove),
        4 => prop_oneof![0..10_u64, 0..400_u64].prop_map(Operation::Advance),
        2 => (0..300_usize).prop_map(Operation::Top),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(start, end)| Operation::Range(start, end)),
        4 => btree_map(any::<u8>(), weight.clone(), 0..all_or_few(40, 6)).prop_map(Operation::Batch),
        4 => (any::<u8>(), 1..all_or_few(40, 120_usize), weight).prop_map(|(first, step, weight)| Operation::EvenBatch(first, step, weight)),
        6 => (any::<u8>(), any::<u32>()).prop_map(|(key, value)| Operation::Entry(key, value)),
        1 => Just(Operation::PopFirst),
        1 => Just(Operation::PopLast),
        2 => (2..9_u8).prop_map(Operation::Retain),
        1 => Just(Operation::Arrange),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(start, end)| Operation::ChangeRange(start, end)),
        2 => any::<u64>().prop_map(Operation::Rank),
        1 => Just(Operation::Clear),
    ]
}

/// Plain counts. Shares with the tree only the decay, which has tests of its own.
struct Model {
    entries: BTreeMap<u8, (u32, u64)>,
    decay: Decay,
}

impl Model {
    fn total(&self) -> u64 {
        self.entries.values().map(|(_, weight)| weight).sum()
    }

    fn shift(&mut self, bits: u32) {
        for (_, weight) in self.entries.values_mut() {
            *weight = weight.checked_shr(bits).unwrap_or(0);
        }
    }

    fn added(&mut self, weight: u64) -> u64 {
        let fits = |added: u128, total: u64| added + u128::from(total) <= u128::from(MAX_TOTAL_WEIGHT);
        let mut added = u128::from(weight) * u128::from(self.decay.scale());
        if !fits(added, self.total()) {
            let bits = self.decay.renormalise();
            self.shift(bits);
            added = u128::from(weight) * u128::from(self.decay.scale());
        }
        added.min(u128::from(MAX_TOTAL_WEIGHT - self.total())) as u64
    }
}

fn run<R: RotationRule + Default>(half_life: Option<NonZeroU32>, operations: Vec<Operation>) {
    let mut tree: CountingTree<u8, u32, R> = CountingTree::with_rule(R::default(), half_life);
    let mut model = Model { entries: BTreeMap::new(), decay: Decay::new(half_life) };
    for operation in operations {
        match operation {
            Operation::Touch(key, weight) => {
                let added = model.added(weight);
                let is_new = !model.entries.contains_key(&key);
                model.entries.entry(key).or_default().1 += added;
                assert_eq!(tree.touch(key, weight), is_new);
            }
            Operation::Access(key, weight) => {
                if model.entries.contains_key(&key) {
                    let added = model.added(weight);
                    let entry = model.entries.entry(key).or_default();
                    *entry = (entry.0.wrapping_add(1), entry.1 + added);
                }
                if let Some(value) = tree.access(&key, weight) {
                    *value = value.wrapping_add(1);
                }
            }
            Operation::Insert(key, value) => {
                let added = model.added(1);
                let before = model.entries.get(&key).copied();
                model.entries.insert(key, (value, before.map_or(0, |(_, weight)| weight) + added));
                assert_eq!(tree.insert(key, value), before.map(|(value, _)| value));
            }
            Operation::Remove(key) => {
                assert_eq!(tree.remove(&key), model.entries.remove(&key).map(|(value, _)| value));
            }
            Operation::Advance(epochs) => {
                let bits = model.decay.advance(epochs);
                model.shift(bits);
                let shape = tree.shape();
                tree.advance(epochs);
                assert_eq!(tree.shape(), shape);
            }
            Operation::Top(k) => {
                let mut sorted: Vec<_> = model.entries.iter().map(|(key, (_, weight))| (key, *weight)).collect();
                sorted.sort_by_key(|&(key, weight)| (core::cmp::Reverse(weight), *key));
                sorted.truncate(k);
                assert_eq!(tree.top_k(k), sorted);
                assert!(tree.hottest().take(k).eq(sorted));
            }
            Operation::Range(start, end) => {
                let (low, high) = (start.min(end), start.max(end));
                let expected: Vec<_> = model.entries.range(low..high).collect();
                assert!(tree.range(low..high).eq(expected.iter().map(|(key, (value, _))| (*key, value))));
                assert!(tree.range(low..high).rev().eq(expected.iter().rev().map(|(key, (value, _))| (*key, value))));
                assert_eq!(tree.weight_of(low..high), expected.iter().map(|(_, (_, weight))| weight).sum::<u64>());
            }
            Operation::Batch(batch) => {
                for (&key, &weight) in &batch {
                    let added = model.added(weight);
                    model.entries.entry(key).or_default().1 += added;
                }
                tree.touch_sorted(batch);
            }
            Operation::EvenBatch(first, step, weight) => {
                let batch = || (first..=u8::MAX).step_by(step).map(|key| (key, weight >> (key % 8)));
                for (key, weight) in batch() {
                    let added = model.added(weight);
                    let entry = model.entries.entry(key).or_default();
                    *entry = (entry.0 ^ weight as u32, entry.1 + added);
                }
                let mut weights: BTreeMap<u8, u64> = batch().collect();
                tree.touch_sorted_with(batch(), |key, value| *value ^= weights.remove(key).expect("asked once") as u32);
                assert!(weights.is_empty());
            }
            Operation::Entry(key, value) => {
                let added = model.added(1);
                let entry = model.entries.entry(key).and_modify(|(value, _)| *value ^= 1).or_insert((value, 0));
                entry.1 += added;
                assert_eq!(tree.entry(key).and_modify(|value| *value ^= 1).or_insert(value), &mut entry.0);
            }
            Operation::PopFirst => {
                assert_eq!(tree.pop_first(), model.entries.pop_first().map(|(key, (value, _))| (key, value)));
            }
            Operation::PopLast => {
                assert_eq!(tree.pop_last(), model.entries.pop_last().map(|(key, (value, _))| (key, value)));
            }
            Operation::Retain(divisor) => {
                let keep = |key: &u8, value: &mut u32| {
                    *value = value.wrapping_add(3);
                    !key.is_multiple_of(divisor)
                };
                model.entries.retain(|key, (value, _)| keep(key, value));
                tree.retain(keep);
            }
            Operation::Arrange => {
                tree.arrange();
                assert!(tree.iter_unordered().map(|(key, ..)| key).is_sorted());
            }
            Operation::ChangeRange(start, end) => {
                let (low, high) = (start.min(end), start.max(end));
                model.entries.range_mut(low..=high).for_each(|(_, (value, _))| *value = value.wrapping_add(7));
                tree.range_mut(low..=high).for_each(|(_, value)| *value = value.wrapping_add(7));
            }
            Operation::Rank(position) => {
                let position = position.checked_rem(model.total()).unwrap_or(position);
                let mut rank = 0;
                let expected = model.entries.iter().find(|(key, (_, weight))| {
                    assert_eq!(tree.rank_by_weight(*key), rank);
                    rank += weight;
                    rank > position
                });
                assert_eq!(tree.select_by_weight(position), expected.map(|(key, _)| key));
            }
            Operation::Clear => {
                model.entries.clear();
                tree.clear();
            }
        }
        tree.check_invariants();
        assert_eq!(tree.scale(), model.decay.scale());
        assert!(tree.weights().eq(model.entries.iter().map(|(key, (_, weight))| (key, *weight))));
        let mut entries: Vec<_> = tree.iter_unordered().collect();
        entries.sort_unstable();
        assert!(entries.into_iter().eq(model.entries.iter().map(|(key, (value, weight))| (key, *weight, value))));
        assert!(tree.iter().eq(model.entries.iter().map(|(key, (value, _))| (key, value))));
    }
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    vec(operation(), 0..all_or_few(400, 16))
}

fn half_life() -> impl Strategy<Value = Option<NonZeroU32>> {
    (0..9_u32).prop_map(NonZeroU32::new)
}

proptest! {
    #![proptest_config(all_or_few_cases(ProptestConfig::default()))]

    #[test]
    fn the_lazy_rule_against_the_model(half_life in half_life(), operations in operations()) {
        run::<Lazy>(half_life, operations);
    }

    #[test]
    fn the_rule_as_printed_against_the_model(half_life in half_life(), operations in operations()) {
        run::<LazyAsPrinted>(half_life, operations);
    }

    #[test]
    fn the_depth_rule_against_the_model(half_life in half_life(), operations in operations()) {
        run::<DepthLimited<Lazy>>(half_life, operations);
    }

    #[test]
    fn the_cb_tree_against_the_model(half_life in half_life(), operations in operations()) {
        run::<CbTree>(half_life, operations);
    }

    #[test]
    fn splaying_against_the_model(half_life in half_life(), operations in operations()) {
        run::<Splay>(half_life, operations);
    }

    #[test]
    fn semi_splaying_against_the_model(half_life in half_life(), operations in operations()) {
        run::<SemiSplay>(half_life, operations);
    }

    #[test]
    fn no_rotation_against_the_model(half_life in half_life(), operations in operations()) {
        run::<NoRotation>(half_life, operations);
    }

    /// Keys and values that own memory, so that Miri or a leak checker has something to find.
    #[test]
    fn owned_keys_against_the_model(steps in vec((any::<bool>(), "[a-c]{0,3}"), 0..all_or_few(200, 16))) {
        let mut tree: CountingTree<String, String> = CountingTree::new();
        let mut model: BTreeMap<String, String> = BTreeMap::new();
        for (insert, key) in steps {
            if insert {
                prop_assert_eq!(tree.insert(key.clone(), key.repeat(2)), model.insert(key.clone(), key.repeat(2)));
            } else {
                prop_assert_eq!(tree.remove(key.as_str()), model.remove(&key));
            }
            prop_assert_eq!(tree.get(key.as_str()).map(ToOwned::to_owned), model.get(&key).cloned());
            tree.check_invariants();
        }
        prop_assert!(tree.into_iter().eq(model));
    }
}
