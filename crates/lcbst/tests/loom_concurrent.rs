//! The concurrent tree under loom, which runs each model in every order of its atomic steps, with at most so many
//! preemptions, and with every value that the memory orderings let a load see. The whole tree is under test, not an
//! extract; only its rings and chunks are made small.
//!
//! Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p lcbst --features concurrent --test loom_concurrent --release`.
//! `LOOM_MAX_PREEMPTIONS` overrides the bound. `cargo xtask test` runs the models as they are, `cargo xtask verify` with
//! more preemptions.

#![cfg(all(loom, feature = "concurrent"))]

use lcbst::concurrent::ConcurrentLcbst;
use loom::sync::Arc;
use loom::thread;

type Tree = ConcurrentLcbst<u8, u8>;

const MAX_PREEMPTIONS: usize = 4;

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 10_000;
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.check(model);
}

/// `2` above `1` and `3`, all settled with weight 1. A hit on `1` or `3` with a greater weight rotates it to the root.
fn three_keys() -> Arc<Tree> {
    let tree = Tree::with_capacity(4);
    for key in [2, 1, 3] {
        tree.insert(key, 10 * key);
    }
    tree.settle();
    assert_eq!(tree.depth(&2), Some(0));
    Arc::new(tree)
}

/// `6` above `1` above `3`, settled. The next hit on `1` will lift `3`, which weighs almost as much as `1`, to the
/// root by a double rotation.
fn bent() -> Arc<Tree> {
    let tree = Tree::with_capacity(4);
    for (key, weight) in [(6, 12), (1, 10), (3, 8)] {
        tree.insert(key, 10 * key);
        tree.settle();
        tree.access(&key, weight - 1);
        tree.settle();
    }
    assert_eq!([6, 1, 3].map(|key| tree.depth(&key)), [Some(0), Some(1), Some(2)]);
    Arc::new(tree)
}

/// Counts an access and adjusts. Not by `adjust`: all threads share one ring in these models, so hints get lost.
fn rotate_by_access(tree: &Tree, key: u8, weight: u64) {
    let before = tree.rotations();
    tree.access(&key, weight);
    tree.settle();
    assert!(tree.rotations() > before, "the model is to rotate");
}

#[test]
fn a_lookup_finds_what_a_rotation_moves() {
    check(MAX_PREEMPTIONS, || {
        let tree = three_keys();
        let rotating = thread::spawn({
            let tree = Arc::clone(&tree);
            move || rotate_by_access(&tree, 1, 100)
        });
        assert!(tree.contains_key(&2), "the node that is rotated down");
        assert_eq!(tree.get(&3), Some(30), "a node below it");
        assert!(!tree.contains_key(&0));
        rotating.join().unwrap();
    });
}

#[test]
fn a_lookup_does_not_miss_the_subtree_between_in_a_double_rotation() {
    check(MAX_PREEMPTIONS, || {
        let tree = bent();
        let rotating = thread::spawn({
            let tree = Arc::clone(&tree);
            move || rotate_by_access(&tree, 1, 1)
        });
        assert!(tree.contains_key(&1));
        assert!(tree.contains_key(&3));
        assert!(!tree.contains_key(&4), "its place moves from below 3 to below 6");
        rotating.join().unwrap();
        assert_eq!([6, 1, 3].map(|key| tree.depth(&key)), [Some(1), Some(1), Some(0)]);
    });
}

/// The key's place is the empty link that the rotation fills, and moves to the node that is rotated down.
#[test]
fn an_insertion_lands_where_the_key_belongs_during_a_rotation() {
    check(MAX_PREEMPTIONS, || {
        let tree = Tree::with_capacity(4);
        for key in [3, 1] {
            tree.insert(key, 10 * key);
            tree.settle();
        }
        let tree = Arc::new(tree);
        let rotating = thread::spawn({
            let tree = Arc::clone(&tree);
            move || rotate_by_access(&tree, 1, 100)
        });
        assert_eq!(tree.insert(2, 20), None);
        assert_eq!(tree.get(&2), Some(20));
        rotating.join().unwrap();
        assert_eq!(tree.snapshot(), [(1, 10, 101), (2, 20, 1), (3, 30, 1)]);
        assert_eq!([1, 2, 3].map(|key| tree.contains_key(&key)), [true; 3]);
        tree.settle();
        assert_eq!(tree.weight_of(2..), 2);
    });
}

/// On either side of the key that is lifted, so that the place moves in the first rotation or in the second.
#[test]
fn an_insertion_lands_where_the_key_belongs_during_a_double_rotation() {
    for key in [2, 4] {
        check(MAX_PREEMPTIONS, move || {
            let tree = bent();
            let rotating = thread::spawn({
                let tree = Arc::clone(&tree);
                move || rotate_by_access(&tree, 1, 1)
            });
            assert_eq!(tree.insert(key, 70), None);
            rotating.join().unwrap();
            assert_eq!([1, 3, 6, key].map(|key| tree.get(&key)), [Some(10), Some(30), Some(60), Some(70)]);
            assert_eq!(tree.get(&(6 - key)), None);
        });
    }
}

/// A node is hung below and lifted while a slow search still holds the empty link as it was: the version tells.
#[test]
fn an_empty_link_that_was_filled_and_emptied_again_is_not_the_same() {
    check(MAX_PREEMPTIONS, || {
        let tree = Tree::with_capacity(4);
        tree.insert(5, 50);
        tree.settle();
        let tree = Arc::new(tree);
        let rotating = thread::spawn({
            let tree = Arc::clone(&tree);
            move || {
                tree.insert(3, 30);
                tree.access(&3, 100);
                tree.settle();
                assert!(tree.rotations() > 0, "the model is to rotate");
            }
        });
        tree.insert(1, 10);
        rotating.join().unwrap();
        assert_eq!([1, 3, 5].map(|key| tree.get(&key)), [Some(10), Some(30), Some(50)]);
    });
}

#[test]
fn a_removal_and_a_lookup_agree_on_an_order() {
    check(MAX_PREEMPTIONS, || {
        let tree = three_keys();
        let removing = thread::spawn({
            let tree = Arc::clone(&tree);
            move || assert_eq!(tree.remove(&1), Some(10))
        });
        let seen = tree.get(&1);
        assert!(seen.is_none() || seen == Some(10));
        let (later, weight) = (tree.contains_key(&1), tree.weight(&1));
        assert!(seen.is_some() || !later, "a key that was gone came back");
        assert!(weight.is_none() || (later && weight == Some(1)));
        removing.join().unwrap();
        assert_eq!((tree.get(&1), tree.len()), (None, 2));
    });
}

#[test]
fn a_key_can_come_back_while_it_is_counted() {
    check(MAX_PREEMPTIONS, || {
        let tree = Tree::with_capacity(4);
        tree.insert(1, 10);
        let tree = Arc::new(tree);
        let changing = thread::spawn({
            let tree = Arc::clone(&tree);
            move || {
                assert_eq!(tree.remove(&1), Some(10));
                assert_eq!(tree.insert(1, 11), None);
            }
        });
        let counted = tree.access(&1, 5);
        let value = tree.get(&1);
        changing.join().unwrap();
        assert!([None, Some(10), Some(11)].contains(&value));
        assert_eq!(tree.get(&1), Some(11));
        let weight = tree.weight(&1);
        assert!(weight == Some(1) || (counted && weight == Some(6)), "{weight:?}");
    });
}

#[test]
fn one_of_two_threads_inserts_a_key() {
    check(MAX_PREEMPTIONS, || {
        let tree = Arc::new(Tree::with_capacity(4));
        let other = thread::spawn({
            let tree = Arc::clone(&tree);
            move || tree.touch(1, 2)
        });
        let here = tree.touch(1, 3);
        assert!(here != other.join().unwrap());
        assert_eq!((tree.weight(&1), tree.len()), (Some(5), 1));
        tree.settle();
        assert_eq!(tree.total_weight(), 5);
    });
}

#[test]
fn counts_made_during_adjustment_are_in_the_weight_at_once_and_in_the_sums_after_settling() {
    check(MAX_PREEMPTIONS, || {
        let tree = three_keys();
        let adjusting = thread::spawn({
            let tree = Arc::clone(&tree);
            move || {
                tree.access(&3, 4);
                tree.adjust();
            }
        });
        tree.access(&3, 8);
        adjusting.join().unwrap();
        assert_eq!(tree.weight(&3), Some(13));
        assert!(tree.total_weight() <= 15);
        tree.settle();
        assert_eq!((tree.total_weight(), tree.weight_of(3..)), (15, 13));
    });
}
