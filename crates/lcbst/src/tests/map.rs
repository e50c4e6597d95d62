//! The operations of an ordered map, by hand.

use std::borrow::ToOwned;
use std::format;
use std::ops::Bound;
use std::rc::Rc;
use std::string::String;
use std::vec::Vec;

use super::{SplitMix, all_or_few};
use crate::{CountingTree, Entry, MAX_TOTAL_WEIGHT};

#[test]
fn an_empty_tree_answers_everything() {
    let mut tree: CountingTree<u32, u32> = CountingTree::new();
    assert!(tree.is_empty());
    assert_eq!((tree.len(), tree.total_weight(), tree.rotations()), (0, 0, 0));
    assert_eq!((tree.get(&1), tree.weight(&1), tree.depth(&1)), (None, None, None));
    assert_eq!(tree.get_mut(&1), None);
    assert_eq!(tree.access(&1, 1), None);
    assert_eq!(tree.remove(&1), None);
    assert_eq!((tree.first_key_value(), tree.last_key_value()), (None, None));
    assert_eq!((tree.iter().next(), tree.iter().next_back(), tree.range::<u32>(..).next()), (None, None, None));
    assert_eq!(tree.weight_of::<u32>(..), 0);
    assert!(tree.top_k(3).is_empty());
    assert_eq!(tree.depth_statistics(), crate::DepthStatistics::default());
    tree.advance(u64::MAX);
    tree.check_invariants();
}

#[test]
fn insert_get_and_replace() {
    let mut tree: CountingTree<String, u32> = CountingTree::new();
    assert_eq!(tree.insert("b".to_owned(), 1), None);
    assert_eq!(tree.insert("a".to_owned(), 2), None);
    assert_eq!(tree.insert("b".to_owned(), 3), Some(1));
    assert_eq!((tree.get("a"), tree.get("b"), tree.get("c")), (Some(&2), Some(&3), None));
    assert_eq!((tree.weight("a"), tree.weight("b")), (Some(1), Some(2)));
    *tree.get_mut("a").expect("a is there") += 10;
    assert_eq!(tree.get("a"), Some(&12));
    assert!(tree.contains_key("a") && !tree.contains_key("c"));
    assert_eq!(format!("{tree:?}"), r#"{"a": 12, "b": 3}"#);
}

#[test]
fn reading_neither_counts_nor_rotates() {
    let mut tree: CountingTree<u32, u32> = (0..100).map(|key| (key, key)).collect();
    let (shape, total) = (tree.shape(), tree.total_weight());
    for key in 0..100 {
        assert_eq!(tree.get(&key), Some(&key));
        assert!(tree.contains_key(&key));
        assert_eq!(tree.get_mut(&key), Some(&mut { key }));
    }
    assert_eq!((tree.shape(), tree.total_weight()), (shape, total));
}

#[test]
fn access_counts_only_what_is_there() {
    let mut tree: CountingTree<u32, u32> = (0..10).map(|key| (key, 0)).collect();
    *tree.access(&3, 5).expect("3 is there") = 33;
    assert_eq!((tree.get(&3), tree.weight(&3), tree.total_weight()), (Some(&33), Some(6), 15));
    assert_eq!(tree.access(&10, 5), None);
    assert_eq!((tree.len(), tree.total_weight()), (10, 15));
    tree.check_invariants();
}

#[test]
fn remove_every_key_in_every_kind_of_place() {
    let keys = all_or_few(60, 12);
    for seed in 0..all_or_few(20, 2) {
        let mut random = SplitMix(seed);
        let mut tree: CountingTree<u64, u64> = CountingTree::new();
        for _ in 0..5 * keys {
            tree.touch(random.next() % keys, random.next() % 9);
        }
        while !tree.is_empty() {
            let key = random.next() % keys;
            let (weight, total, length) = (tree.weight(&key), tree.total_weight(), tree.len());
            assert_eq!(tree.remove(&key).is_some(), weight.is_some());
            assert_eq!(tree.total_weight(), total - weight.unwrap_or(0));
            assert_eq!(tree.len(), length - usize::from(weight.is_some()));
            assert!(!tree.contains_key(&key));
            tree.check_invariants();
        }
        assert_eq!(tree.total_weight(), 0);
        assert!(tree.touch(1, 1));
        tree.check_invariants();
    }
}

#[test]
fn a_removed_key_and_value_are_dropped_at_once() {
    let (key, value) = (Rc::new(5), Rc::new(()));
    let mut tree: CountingTree<Rc<i32>, Rc<()>> = CountingTree::new();
    for other in [3, 7, 1, 4, 6, 9] {
        tree.insert(Rc::new(other), Rc::new(()));
    }
    tree.insert(Rc::clone(&key), Rc::clone(&value));
    assert_eq!((Rc::strong_count(&key), Rc::strong_count(&value)), (2, 2));
    drop(tree.remove(&5));
    assert_eq!((Rc::strong_count(&key), Rc::strong_count(&value)), (1, 1));
    tree.check_invariants();
}

#[test]
fn iteration_meets_in_the_middle() {
    let tree: CountingTree<u32, u32> = (0..50).map(|key| (key * 2, key)).collect();
    let mut both = tree.iter();
    let (mut front, mut back) = (Vec::new(), Vec::new());
    while let Some((key, _)) = both.next() {
        front.push(*key);
        assert_eq!(both.len(), 50 - front.len() - back.len());
        back.extend(both.next_back().map(|(key, _)| *key));
    }
    assert_eq!((both.next(), both.next_back()), (None, None));
    front.extend(back.into_iter().rev());
    assert!(front.into_iter().eq((0..50).map(|key| key * 2)));
    assert!(tree.keys().rev().copied().eq((0..50).rev().map(|key| key * 2)));
    assert!(tree.weights().all(|(_, weight)| weight == 1));
    assert!(tree.clone().into_iter().eq((0..50).map(|key| (key * 2, key))));
    assert!(tree.into_iter().rev().eq((0..50).rev().map(|key| (key * 2, key))));
}

#[test]
fn ranges_and_their_weights() {
    const KEYS: i32 = all_or_few(40, 4);
    let mut tree: CountingTree<i32> = CountingTree::new();
    for key in 0..KEYS {
        tree.touch(key * 10, key as u64);
    }
    let bounds = |at: i32| [Bound::Included(at), Bound::Excluded(at), Bound::Unbounded];
    for start in (-5..KEYS * 10 + 5).step_by(5) {
        for end in (-5..KEYS * 10 + 5).step_by(35) {
            for range in bounds(start).into_iter().flat_map(|low| bounds(end).map(|high| (low, high))) {
                use std::ops::RangeBounds;
                let expected: Vec<i32> = (0..KEYS).map(|key| key * 10).filter(|key| range.contains(key)).collect();
                let weight: u64 = expected.iter().map(|&key| key as u64 / 10).sum();
                assert!(tree.range(range).map(|(key, ())| *key).eq(expected.iter().copied()), "{range:?}");
                assert!(tree.range(range).rev().map(|(key, ())| *key).eq(expected.into_iter().rev()), "{range:?}");
                assert_eq!(tree.weight_of(range), weight, "{range:?}");
            }
        }
    }
    assert_eq!((tree.first_key_value(), tree.last_key_value()), (Some((&0, &())), Some((&(KEYS * 10 - 10), &()))));
}

#[test]
fn clear_keeps_memory_and_nothing_else() {
    const KEYS: usize = all_or_few(1000, 60);
    let mut tree: CountingTree<u64> = (0..KEYS as u64).map(|key| (key, ())).collect();
    let bytes = tree.memory_bytes();
    assert!((40 * KEYS..200 * KEYS).contains(&bytes), "{bytes} bytes for {KEYS} keys");
    tree.clear();
    assert_eq!((tree.len(), tree.total_weight(), tree.memory_bytes()), (0, 0, bytes));
    tree.check_invariants();
    tree.touch(5, 1);
    tree.shrink_to_fit();
    assert!(tree.memory_bytes() < 400);
    tree.reserve(100);
    assert!(tree.memory_bytes() > 4000);
    tree.check_invariants();
}

#[test]
fn the_total_weight_stops_at_its_limit() {
    let mut tree: CountingTree<u32> = CountingTree::new();
    tree.touch(1, MAX_TOTAL_WEIGHT - 10);
    tree.touch(2, 7);
    tree.touch(3, 7);
    tree.touch(4, u64::MAX);
    assert_eq!([1, 2, 3, 4].map(|key| tree.weight(&key)), [Some(MAX_TOTAL_WEIGHT - 10), Some(7), Some(3), Some(0)]);
    assert_eq!(tree.total_weight(), MAX_TOTAL_WEIGHT);
    tree.check_invariants();
    tree.remove(&1);
    tree.touch(4, 5);
    assert_eq!(tree.weight(&4), Some(5));
    tree.check_invariants();
}

#[test]
fn an_entry_counts_when_it_gives_the_value_away() {
    let mut tree: CountingTree<u32, u32> = (0..10).map(|key| (key, key)).collect();
    assert_eq!(tree.entry(3).key(), &3);
    assert_eq!(tree.entry(30).key(), &30);
    assert_eq!((tree.total_weight(), tree.len()), (10, 10));

    *tree.entry(3).or_insert(77) += 100;
    *tree.entry(30).or_insert_with_key(|key| key + 1) += 1;
    assert_eq!((tree.get(&3), tree.get(&30)), (Some(&103), Some(&32)));
    assert_eq!((tree.weight(&3), tree.weight(&30)), (Some(2), Some(1)));

    match tree.entry(3) {
        Entry::Occupied(mut entry) => {
            assert_eq!((entry.get(), entry.weight()), (&103, 2));
            assert_eq!(entry.insert(5), 103);
            assert_eq!(entry.remove_entry(), (3, 5));
        }
        Entry::Vacant(_) => panic!("3 is there"),
    }
    match tree.entry(3) {
        Entry::Vacant(entry) => assert_eq!(entry.into_key(), 3),
        Entry::Occupied(_) => panic!("3 is not there"),
    }
    assert_eq!((tree.total_weight(), tree.len()), (10, 10));
    assert_eq!(format!("{:?}", tree.entry(1)), "OccupiedEntry { key: 1, value: 1 }");
    assert_eq!(format!("{:?}", tree.entry(3)), "VacantEntry(3)");
    tree.check_invariants();
}

#[test]
fn a_panic_for_the_value_of_an_entry_leaves_the_tree_as_it_was() {
    let mut tree: CountingTree<u32, u32> = (0..10).map(|key| (key, key)).collect();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        tree.entry(11).or_insert_with(|| panic!("no value"));
    }));
    assert!(outcome.is_err());
    assert_eq!((tree.total_weight(), tree.len()), (10, 10));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        tree.retain(|key, _| if *key == 5 { panic!("no answer") } else { false });
    }));
    assert!(outcome.is_err());
    assert_eq!((tree.total_weight(), tree.len()), (10, 10));
    tree.check_invariants();
}

#[test]
fn values_can_be_changed_in_order_from_both_ends() {
    let mut tree: CountingTree<u64, u64> = (0..100).map(|key| (key * 37 % 100, 0)).collect();
    let shape = tree.shape();
    for (position, (key, value)) in (0..).zip(tree.iter_mut()) {
        assert_eq!(*key, position);
        *value = key + 1;
    }
    let mut values = tree.values_mut();
    *values.next_back().expect("100 values") = 0;
    assert_eq!((values.len(), values.next()), (99, Some(&mut 1)));
    for (_, value) in &mut tree {
        *value *= 2;
    }
    for (key, value) in tree.range_mut(10..20).rev().step_by(3) {
        *value += key;
    }
    let expected = |key: u64| match key {
        99 => 0,
        19 | 16 | 13 | 10 => 2 * (key + 1) + key,
        _ => 2 * (key + 1),
    };
    assert!(tree.values().copied().eq((0..100).map(expected)));
    assert_eq!(tree.range_mut((Bound::Excluded(20), Bound::Excluded(10))).len(), 0);
    assert_eq!((tree.shape(), tree.total_weight()), (shape, 100));
}

#[test]
fn both_ends_can_be_popped_until_nothing_is_left() {
    let mut tree: CountingTree<u64, u64> = (0..50).map(|key| (key * 37 % 50, key)).collect();
    for step in 0..25 {
        assert_eq!(tree.pop_first().map(|(key, _)| key), Some(step));
        assert_eq!(tree.pop_last().map(|(key, _)| key), Some(49 - step));
        tree.check_invariants();
    }
    assert_eq!((tree.pop_first(), tree.pop_last()), (None, None));
}

#[test]
fn what_is_retained_keeps_its_weight_and_is_balanced() {
    let mut tree: CountingTree<u64, u64> = CountingTree::new();
    const KEYS: u64 = all_or_few(1000, 60);
    tree.touch_sorted((0..KEYS).map(|key| (key, key % 7)));
    tree.retain(|_, _| true);
    assert_eq!(tree.len(), KEYS as usize);
    tree.retain(|key, value| {
        *value = *key;
        key % 4 == 1
    });
    tree.check_invariants();
    assert!(tree.weights().all(|(key, weight)| weight == key % 7));
    assert!(tree.iter().map(|(key, value)| (*key, *value)).eq((1..KEYS).step_by(4).map(|key| (key, key))));
    assert!(tree.depth_statistics().maximum <= all_or_few(12, 8));
    tree.retain(|_, _| false);
    assert!(tree.is_empty());
    assert!(tree.touch(1, 1));
    tree.check_invariants();
}

#[test]
fn hot_runs_end_at_gaps_and_at_the_greatest_key() {
    let mut tree: CountingTree<u8> = CountingTree::new();
    tree.touch_sorted([(0, 9), (1, 9), (2, 1), (3, 9), (254, 8), (255, 8)]);
    assert_eq!(tree.hottest_runs(5), [(0..=1, 18), (3..=3, 9), (254..=255, 16)]);
    assert_eq!(tree.hottest_runs(6), [(0..=3, 28), (254..=255, 16)]);
    assert_eq!(tree.hottest_runs(0), []);
}

#[test]
fn every_unit_of_weight_selects_its_key() {
    let mut tree: CountingTree<u64> = CountingTree::new();
    let mut random = SplitMix(31);
    for _ in 0..all_or_few(500, 100) {
        tree.touch(random.skewed(80), random.next() % 3);
    }
    let mut position = 0;
    for (key, weight) in tree.weights() {
        assert_eq!(tree.rank_by_weight(key), position);
        for _ in 0..weight {
            assert_eq!(tree.select_by_weight(position), Some(key));
            position += 1;
        }
    }
    assert_eq!(tree.select_by_weight(position), None);
    assert_eq!(tree.select_by_weight(u64::MAX), None);
}

#[test]
fn depth_statistics_by_hand() {
    let mut tree: CountingTree<u32> = CountingTree::new();
    for (key, weight) in [(20, 50), (10, 20), (30, 20), (5, 10)] {
        tree.touch(key, weight);
    }
    assert_eq!(tree.shape(), [2, 1, 0, 1]);
    let statistics = tree.depth_statistics();
    assert_eq!((statistics.maximum, statistics.weighted_path_length), (2, 60));
    assert_eq!((statistics.mean, statistics.weighted_mean), (1.0, 0.6));
}

#[test]
fn a_tree_can_be_sent_and_shared() {
    fn check<T: Send + Sync + Unpin>() {}
    check::<CountingTree<u64, String>>();
}
