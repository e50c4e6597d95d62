//! Random operations on trees under every rule against one `BTreeMap`, through the public interface alone.
//!
//! `cargo +nightly fuzz run model` in `crates/lcbst`, or with a stable compiler `RUSTC_BOOTSTRAP=1 cargo fuzz run model`.
//!
//! The tree tells the model what an access adds: its scale. A run ends before the total would reach its limit, so that the
//! scale changes only as epochs pass. (The limit has its tests in the crate.)

#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::ops::Bound;

use arbitrary::Arbitrary;
use lcbst::{
    CbTree, CountingTree, DepthLimited, FRACTION_BITS, Lazy, LazyAsPrinted, MAX_DOUBLINGS, MAX_TOTAL_WEIGHT,
    NoRotation, RotationRule, SemiSplay, Splay,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Operation {
    Touch(u8, u8),
    Access(u8, u8),
    Insert(u8, u16),
    Entry(u8, u16),
    Remove(u8),
    PopFirst,
    PopLast,
    Batch(BTreeSet<u8>, u8),
    /// Each so-manieth key from the first on: large batches, with many new keys or with few.
    EvenBatch(u8, u8, u8),
    Arrange,
    Advance(u8),
    RetainBelow(u8),
    RangeMut(Bound<u8>, Bound<u8>),
    Range(Bound<u8>, Bound<u8>),
    Top(u8),
    Select(u16),
}

#[derive(Arbitrary, Debug)]
struct Run {
    half_life_epochs: u8,
    operations: Vec<Operation>,
}

fuzz_target!(|run: Run| {
    check::<Lazy>(&run);
    check::<LazyAsPrinted>(&run);
    check::<DepthLimited<Lazy>>(&run);
    check::<CbTree>(&run);
    check::<SemiSplay>(&run);
    check::<Splay>(&run);
    check::<NoRotation>(&run);
});

fn check<R: RotationRule + Default>(run: &Run) {
    let half_life = NonZeroU32::new(run.half_life_epochs.into());
    let mut tree: CountingTree<u8, u16, R> = CountingTree::with_rule(R::default(), half_life);
    // Values and stored weights.
    let mut model: BTreeMap<u8, (u16, u64)> = BTreeMap::new();
    for operation in &run.operations {
        let scale = tree.scale();
        let most_added = (u128::from(u8::MAX) * 256) * u128::from(scale);
        if u128::from(tree.total_weight()) + most_added > u128::from(MAX_TOTAL_WEIGHT) {
            return;
        }
        match *operation {
            Operation::Touch(key, weight) => {
                let is_new = !model.contains_key(&key);
                model.entry(key).or_default().1 += u64::from(weight) * scale;
                assert_eq!(tree.touch(key, weight.into()), is_new);
            }
            Operation::Access(key, weight) => {
                let expected = model.get_mut(&key).map(|(value, own)| {
                    *own += u64::from(weight) * scale;
                    *value
                });
                assert_eq!(tree.access(&key, weight.into()).copied(), expected);
            }
            Operation::Insert(key, value) => {
                let before = model.get(&key).copied();
                model.insert(key, (value, before.map_or(0, |(_, own)| own) + scale));
                assert_eq!(tree.insert(key, value), before.map(|(value, _)| value));
            }
            Operation::Entry(key, value) => {
                let expected = model.entry(key).and_modify(|(value, _)| *value ^= 1).or_insert((value, 0));
                expected.1 += scale;
                assert_eq!(tree.entry(key).and_modify(|value| *value ^= 1).or_insert(value), &expected.0);
            }
            Operation::Remove(key) => {
                assert_eq!(tree.remove(&key), model.remove(&key).map(|(value, _)| value));
            }
            Operation::PopFirst => {
                assert_eq!(tree.pop_first(), model.pop_first().map(|(key, (value, _))| (key, value)));
            }
            Operation::PopLast => {
                assert_eq!(tree.pop_last(), model.pop_last().map(|(key, (value, _))| (key, value)));
            }
            Operation::Batch(ref keys, weight) => {
                let batch = || keys.iter().map(|&key| (key, u64::from(weight ^ key)));
                for (key, weight) in batch() {
                    model.entry(key).or_default().1 += weight * scale;
                }
                tree.touch_sorted(batch());
            }
            Operation::EvenBatch(first, step, weight) => {
                let keys = (first..=u8::MAX).step_by(usize::from(step).max(1));
                let batch = || keys.clone().map(|key| (key, u64::from(weight ^ key)));
                for (key, weight) in batch() {
                    let entry = model.entry(key).or_default();
                    *entry = (entry.0.wrapping_add(1), entry.1 + weight * scale);
                }
                let mut calls = 0;
                tree.touch_sorted_with(batch(), |_, value| {
                    *value = value.wrapping_add(1);
                    calls += 1;
                });
                assert_eq!(calls, keys.clone().count());
            }
            Operation::Arrange => {
                tree.arrange();
                assert!(tree.iter_unordered().map(|(key, ..)| key).is_sorted());
            }
            Operation::Advance(epochs) => {
                let epochs = u64::from(epochs);
                tree.advance(epochs);
                if let Some(half_life) = half_life {
                    // More doublings than a tree keeps become a shift: those its scale has had, and those of these epochs.
                    let whole = |epoch: u64| epoch / u64::from(half_life.get());
                    let gained = u64::from(scale.ilog2() - FRACTION_BITS);
                    let doublings = gained + whole(tree.epoch()) - whole(tree.epoch() - epochs);
                    if doublings > u64::from(MAX_DOUBLINGS) {
                        for (_, own) in model.values_mut() {
                            *own = own.checked_shr(doublings as u32).unwrap_or(0);
                        }
                    }
                }
            }
            Operation::RetainBelow(limit) => {
                let keep = |key: &u8, value: &mut u16| {
                    *value = value.wrapping_add(1);
                    *key < limit || *value % 2 == 0
                };
                model.retain(|key, (value, _)| keep(key, value));
                tree.retain(keep);
            }
            Operation::RangeMut(start, end) => {
                let mut expected: Vec<u8> = Vec::new();
                if is_range(start, end) {
                    for (key, (value, _)) in model.range_mut((start, end)) {
                        *value = value.wrapping_add(7);
                        expected.push(*key);
                    }
                }
                let keys = tree.range_mut((start, end)).map(|(key, value)| {
                    *value = value.wrapping_add(7);
                    *key
                });
                assert_eq!(keys.collect::<Vec<u8>>(), expected);
            }
            Operation::Range(start, end) => {
                if is_range(start, end) {
                    assert!(
                        tree.range((start, end)).eq(model.range((start, end)).map(|(key, (value, _))| (key, value)))
                    );
                    let weight: u64 = model.range((start, end)).map(|(_, (_, own))| own).sum();
                    assert_eq!(tree.weight_of((start, end)), weight);
                } else {
                    assert_eq!((tree.range((start, end)).next_back(), tree.weight_of((start, end))), (None, 0));
                }
            }
            Operation::Top(k) => {
                let mut sorted: Vec<(&u8, u64)> = model.iter().map(|(key, (_, own))| (key, *own)).collect();
                sorted.sort_by_key(|&(key, own)| (std::cmp::Reverse(own), *key));
                sorted.truncate(k.into());
                assert_eq!(tree.top_k(k.into()), sorted);
                assert!(tree.hottest().take(k.into()).eq(sorted.iter().copied()));
                let in_runs: u64 = tree.hottest_runs(k.into()).iter().map(|(_, weight)| weight).sum();
                assert_eq!(in_runs, sorted.iter().map(|(_, own)| own).sum::<u64>());
            }
            Operation::Select(part) => {
                let total = tree.total_weight();
                let position = (u128::from(total) * u128::from(part) / u128::from(u16::MAX)) as u64;
                let mut rank = 0;
                let expected = model.iter().find(|(_, (_, own))| {
                    rank += own;
                    rank > position
                });
                assert_eq!(tree.select_by_weight(position), expected.map(|(key, _)| key));
                if let Some((key, (_, own))) = expected {
                    assert_eq!(tree.rank_by_weight(key), rank - own);
                }
            }
        }
        assert_eq!(tree.len(), model.len());
        assert_eq!(tree.total_weight(), model.values().map(|(_, own)| own).sum::<u64>());
        assert!(tree.weights().eq(model.iter().map(|(key, (_, own))| (key, *own))));
    }
    assert!(tree.iter().rev().eq(model.iter().rev().map(|(key, (value, _))| (key, value))));
    assert!(tree.into_iter().eq(model.into_iter().map(|(key, (value, _))| (key, value))));
}

/// Whether `BTreeMap::range` takes these bounds; it panics otherwise, where the tree has an empty range.
fn is_range(start: Bound<u8>, end: Bound<u8>) -> bool {
    match (start, end) {
        (Bound::Excluded(start), Bound::Excluded(end)) => start < end,
        (Bound::Included(start) | Bound::Excluded(start), Bound::Included(end) | Bound::Excluded(end)) => start <= end,
        (Bound::Unbounded, _) | (_, Bound::Unbounded) => true,
    }
}
