//! Published pseudo-code of the lazy rule (two tables, for an insertion and for the re-balancing step) cannot run as it
//! stands. Each test here tells one of its errors, shows it on the tables as printed (`printed_tables`), and shows that the
//! tree does not have it, so that nobody restores the printed version.

use std::vec::Vec;

use super::printed_tables::{Failure, Flaw, PrintedNode, PrintedTree};
use super::{SplitMix, all_or_few, weighted_path_length};
use crate::node::Node;
use crate::{CountingTree, DepthLimited, Lazy, LazyAsPrinted, NoRotation, RotationRule, SemiSplay};

const ALL_REPAIRABLE: [Flaw; 6] = [
    Flaw::EndlessLoop,
    Flaw::UnlinkedRoot,
    Flaw::UncountedParent,
    Flaw::OneSide,
    Flaw::UnguardedRoot,
    Flaw::UnguardedChild,
];

/// The printed loop, `while (true)`, returns for a key that it inserts, but not for one it finds below the root. It counts
/// that one again and again, until a rotation has moved it up; then it does not find it below, and inserts it once more.
#[test]
fn both_outcomes_of_an_access_return() {
    let mut printed = PrintedTree::with_repaired(&[Flaw::UnlinkedRoot, Flaw::UnguardedRoot]);
    assert_eq!((printed.inject(5), printed.inject(3)), (Ok(false), Ok(false)));
    assert_eq!((printed.inject(3), printed.nodes.len()), (Ok(false), 3), "two nodes for the key 3");

    let mut tree: CountingTree<u32> = CountingTree::new();
    for key in [5, 3, 8] {
        assert!(tree.touch(key, 1));
    }
    for key in [5, 3, 8] {
        assert!(!tree.touch(key, 1));
    }
}

/// The printed branch for the empty tree makes a node and links it nowhere.
#[test]
fn the_first_node_becomes_the_root() {
    let mut printed = PrintedTree::with_repaired(&[]);
    assert_eq!((printed.inject(5), printed.inject(5)), (Ok(false), Ok(false)), "never found again");
    assert_eq!((printed.root, printed.nodes.len()), (None, 2));

    let mut tree: CountingTree<u32> = CountingTree::new();
    tree.touch(5, 1);
    assert_eq!((tree.len(), tree.depth(&5), tree.weight(&5)), (1, Some(0), Some(1)));
    tree.check_invariants();
}

/// Printed, a hit rotates first and counts afterwards, on a path that is no longer there. Most counters end up wrong.
#[test]
fn a_hit_is_counted_before_it_rotates() {
    let mut printed = PrintedTree::with_repaired(&ALL_REPAIRABLE);
    let mut random = SplitMix(41);
    for key in [50, 25, 75, 10, 30, 60, 90] {
        assert_eq!(printed.inject(key), Ok(false));
    }
    assert_eq!(printed.wrong_sums(), 0, "nothing has rotated yet");
    let keys = all_or_few(200, 40);
    for _ in 0..all_or_few(2000, 200) {
        printed.inject(random.skewed(keys) as u32 * 37 % keys as u32).expect("all that stops a run is repaired");
    }
    let (wrong, nodes) = (printed.wrong_sums(), printed.nodes.len());
    assert!(wrong > nodes / 4, "{wrong} of {nodes} nodes with wrong sums");

    fn check<R: RotationRule + Default>() {
        let mut tree: CountingTree<u32, (), R> = CountingTree::default();
        for key in [50, 25, 75, 10, 30, 60, 90] {
            tree.touch(key, 1);
        }
        let before = tree.rotations();
        for _ in 0..10 {
            for key in [30, 60] {
                tree.touch(key, 1);
                tree.check_invariants();
            }
        }
        assert!(tree.rotations() > before, "the test must see rotations");
        assert_eq!(tree.total_weight(), 27);
    }
    check::<Lazy>();
    check::<LazyAsPrinted>();
    check::<DepthLimited<Lazy>>();
}

/// Printed, the parent of a new leaf is left out when the ancestors are counted.
#[test]
fn every_ancestor_of_a_new_leaf_is_counted() {
    let mut printed = PrintedTree::with_repaired(&[Flaw::EndlessLoop, Flaw::UnlinkedRoot, Flaw::UnguardedRoot]);
    assert_eq!((printed.inject(10), printed.inject(5)), (Ok(false), Ok(false)));
    assert_eq!((printed.nodes[0].below, printed.wrong_sums()), ([0, 0], 1));

    let mut tree: CountingTree<u32> = CountingTree::new();
    tree.touch(10, 100);
    tree.touch(5, 10);
    tree.touch(7, 1);
    // Too light to move anything: 7 hangs below 5 hangs below 10.
    assert_eq!(tree.shape(), [1, 2, 0]);
    assert_eq!(tree.nodes[0].below, [11, 0]);
    assert_eq!(tree.nodes[1].below, [0, 1]);
}

/// Only the left-leaning case is printed. Taken for both sides it never moves a right child, and ascending keys make a
/// chain. The other case is its mirror image, for every shape.
#[test]
fn mirrored_accesses_make_a_mirrored_tree() {
    let one_sided: Vec<Flaw> = ALL_REPAIRABLE.into_iter().filter(|&flaw| flaw != Flaw::OneSide).collect();
    let depth = |keys: &mut dyn Iterator<Item = u32>| {
        let mut printed = PrintedTree::with_repaired(&one_sided);
        keys.for_each(|key| assert_eq!(printed.inject(key), Ok(false)));
        printed.depth()
    };
    let keys = all_or_few(100, 30);
    let (descending, ascending) = (depth(&mut (0..keys).rev()), depth(&mut (0..keys)));
    assert!(descending <= 12, "depth {descending}");
    assert_eq!(ascending, keys as usize - 1, "a chain");

    fn check<R: RotationRule + Default>() {
        let accesses = (0..all_or_few(2000_i64, 60)).map(|step| (step * step * 31 + step * 7) % all_or_few(211, 31));
        let mut straight: CountingTree<i64, (), R> = CountingTree::default();
        let mut mirrored: CountingTree<i64, (), R> = CountingTree::default();
        for key in accesses {
            straight.touch(key, 1);
            mirrored.touch(-key, 1);
            assert_eq!(straight.rotations(), mirrored.rotations());
        }
        assert!(straight.rotations() > 0);
        assert!(straight.shape().into_iter().eq(mirrored.shape().into_iter().rev()));
    }
    check::<Lazy>();
    check::<LazyAsPrinted>();
    check::<DepthLimited<Lazy>>();
}

/// Printed, the root is rotated about a parent that it does not have.
#[test]
fn a_hit_at_the_root_rotates_nothing() {
    let mut printed = PrintedTree::with_repaired(&[Flaw::UnlinkedRoot]);
    assert_eq!((printed.inject(5), printed.inject(5)), (Ok(false), Err(Failure::NoParent)));

    let mut tree: CountingTree<u32> = CountingTree::new();
    for key in [5, 3, 8] {
        tree.touch(key, 1);
    }
    let before = tree.rotations();
    assert_eq!(tree.depth(&5), Some(0));
    tree.touch(5, 100);
    assert_eq!(tree.rotations(), before);
}

/// Printed, the zig-zag is made if the inner child weighs at least as much as the other side. With nothing counted yet,
/// 0 ≥ 0 holds for a child that does not exist, and its counters are read.
#[test]
fn a_missing_inner_child_is_never_rotated() {
    let mut printed = PrintedTree::with_repaired(&[Flaw::OneSide]);
    printed.nodes = Vec::from([
        PrintedNode { key: 2, links: [Some(1), None], ..PrintedNode::default() },
        PrintedNode { key: 1, ..PrintedNode::default() },
    ]);
    printed.root = Some(0);
    assert_eq!(printed.rebalance(Some(0), Some(1)), Err(Failure::NoChild));

    fn check<R: RotationRule + Default>() {
        let mut tree: CountingTree<u32, (), R> = CountingTree::default();
        for key in [3, 2, 1, 4, 5, 2, 4] {
            tree.touch(key, 0);
            tree.check_invariants();
        }
        assert_eq!((tree.len(), tree.rotations()), (5, 0));
    }
    check::<Lazy>();
    check::<LazyAsPrinted>();
}

/// The text says "greater", the table "greater or equal". With the latter a zig-zag can be made that gains nothing.
#[test]
fn equality_is_no_reason_to_rotate() {
    // 10 (1) over 5 (0) over 7 (0) over 8 (1): the inner subtree weighs 1 like the root alone, but its own root 0. A leaf
    // of weight 1 would rotate when touched, so it is linked by hand, with exact sums.
    fn build<R: RotationRule + Default>() -> CountingTree<u32, (), R> {
        let mut tree: CountingTree<u32, (), R> = CountingTree::default();
        for (key, weight) in [(10, 1), (5, 0), (7, 0)] {
            tree.touch(key, weight);
        }
        tree.nodes.push(Node::leaf(8, (), 1));
        tree.nodes[2].links[1] = 3;
        tree.nodes[2].below[1] = 1;
        tree.nodes[1].below[1] = 1;
        tree.nodes[0].below[0] = 1;
        tree.check_invariants();
        assert_eq!((tree.rotations(), weighted_path_length(&tree.nodes)), (0, 3));
        tree
    }
    let mut strict = build::<Lazy>();
    strict.touch(5, 0);
    assert_eq!(strict.rotations(), 0);

    let mut printed = build::<LazyAsPrinted>();
    printed.touch(5, 0);
    assert_eq!(printed.rotations(), 2);
    assert_eq!(weighted_path_length(&printed.nodes), 3, "two rotations for nothing");
    printed.check_invariants();
}

/// The printed `splay` is a drawing of links. Counters that stay with their nodes are wrong after it.
#[test]
fn semi_splaying_keeps_the_sums() {
    fn chain(log_size: usize) -> PrintedTree {
        let mut printed = PrintedTree::with_repaired(&ALL_REPAIRABLE);
        printed.log_size = log_size;
        printed.nodes = (0..8_u32)
            .map(|key| PrintedNode {
                key,
                own: 1,
                below: [0, 7 - u64::from(key)],
                links: [None, (key < 7).then_some(key as usize + 1)],
            })
            .collect();
        printed.root = Some(0);
        assert_eq!(printed.wrong_sums(), 0);
        printed
    }
    let mut printed = chain(3);
    assert_eq!((printed.inject(7), printed.splays), (Ok(true), 1));
    assert_eq!(printed.in_order().map(|order| order.len()), Some(8), "the links are right");
    assert!(printed.wrong_sums() >= 4, "{} nodes with wrong sums", printed.wrong_sums());

    let mut tree: CountingTree<u32, (), SemiSplay> = (0..64).map(|key| (key, ())).collect();
    for key in [63, 0, 31, 63] {
        tree.touch(key, 1);
        tree.check_invariants();
    }
    let mut limited: CountingTree<u32, (), DepthLimited<Lazy>> = CountingTree::default();
    for key in 0..64 {
        limited.touch(key, 0);
    }
    limited.touch(63, 5);
    assert!(limited.rotations() > 0);
    limited.check_invariants();
}

/// The printed depth rule compares by `>=` with a logarithm that nothing keeps up to date. At its first value, 0, every hit
/// is splayed, even at the root.
#[test]
fn the_depth_rule_is_strict_and_knows_the_size() {
    let mut printed = PrintedTree::with_repaired(&ALL_REPAIRABLE);
    printed.log_size = 0;
    for key in [4, 2, 6, 4, 2, 6] {
        printed.inject(key).expect("all that stops a run is repaired");
    }
    assert_eq!(printed.splays, 5, "two leaves and three hits, in a tree of three keys");

    let mut tree: CountingTree<u32, (), DepthLimited<NoRotation>> = CountingTree::default();
    for key in [4, 2, 6, 4, 2, 6] {
        tree.touch(key, 1);
    }
    assert_eq!(tree.rotations(), 0);
}
