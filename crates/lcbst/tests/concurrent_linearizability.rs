//! Random histories of the concurrent tree, each checked for an order of its operations that a sequential map allows.
//!
//! The search is that of J. Wing and C. Gong, "Testing and verifying concurrent objects", Journal of Parallel and
//! Distributed Computing 17, 1993, with the memory of G. Lowe, "Testing for linearizability", 2017: a set of operations
//! done and the state they led to is tried once. Linearizability is local (Herlihy and Wing 1990), so each key is an
//! object of its own: a value and a weight, or nothing.

#![cfg(feature = "concurrent")]

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use lcbst::concurrent::ConcurrentLcbst;

/// Few under Miri, which takes some hundred times as long. But it changes threads in the middle of operations, and lets
/// loads see what their memory orderings allow.
const HISTORIES: u64 = if cfg!(miri) { 20 } else { 1_500 };
const THREADS: u64 = 3;
const OPERATIONS: usize = 10;
const KEYS: u64 = 6;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operation {
    Get,
    Weight,
    Contains,
    Touch(u64),
    Access(u64),
    Insert(u64),
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Number(Option<u64>),
    Truth(bool),
}

#[derive(Clone, Copy, Debug)]
struct Event {
    key: u64,
    operation: Operation,
    answer: Answer,
    called: u64,
    returned: u64,
}

/// A key that gives way to other threads now and then when it is compared, so that operations are interrupted in the
/// middle of a search, and histories overlap even where there are fewer processors than threads.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key(u64);

thread_local! {
    static YIELDS: RefCell<SplitMix> = const { RefCell::new(SplitMix(0)) };
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        if YIELDS.with_borrow_mut(SplitMix::next).is_multiple_of(4) {
            thread::yield_now();
        }
        self.0.cmp(&other.0)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// The value and the weight of a key, if present.
type State = Option<(u64, u64)>;

impl Operation {
    fn random(random: &mut SplitMix, value: u64) -> Self {
        match random.next() % 9 {
            0 => Self::Get,
            1 => Self::Weight,
            2 => Self::Contains,
            3 => Self::Touch(random.next() % 50),
            4 => Self::Access(random.next() % 50),
            5 | 6 => Self::Insert(value),
            _ => Self::Remove,
        }
    }

    fn run(self, tree: &ConcurrentLcbst<Key, u64>, key: u64) -> Answer {
        let key = Key(key);
        match self {
            Self::Get => Answer::Number(tree.get(&key)),
            Self::Weight => Answer::Number(tree.weight(&key)),
            Self::Contains => Answer::Truth(tree.contains_key(&key)),
            Self::Touch(weight) => Answer::Truth(tree.touch(key, weight)),
            Self::Access(weight) => Answer::Truth(tree.access(&key, weight)),
            Self::Insert(value) => Answer::Number(tree.insert(key, value)),
            Self::Remove => Answer::Number(tree.remove(&key)),
        }
    }

    fn apply(self, state: State) -> (State, Answer) {
        let value = state.map(|(value, _)| value);
        let weight = state.map_or(0, |(_, weight)| weight);
        match self {
            Self::Get => (state, Answer::Number(value)),
            Self::Weight => (state, Answer::Number(state.map(|(_, weight)| weight))),
            Self::Contains => (state, Answer::Truth(state.is_some())),
            Self::Touch(added) => (Some((value.unwrap_or_default(), weight + added)), Answer::Truth(state.is_none())),
            Self::Access(added) => (value.map(|value| (value, weight + added)), Answer::Truth(state.is_some())),
            Self::Insert(new) => (Some((new, weight + 1)), Answer::Number(value)),
            Self::Remove => (None, Answer::Number(value)),
        }
    }
}

/// Whether the events of one key have an order that keeps each after those that returned before it was called, and in
/// which each gets its answer.
fn is_linearizable(events: &[Event]) -> bool {
    assert!(events.len() <= 64, "the set of operations done is a word");
    let all = if events.len() == 64 { u64::MAX } else { (1 << events.len()) - 1 };
    let mut tried = HashSet::new();
    let mut pending: Vec<(u64, State)> = vec![(0, None)];
    while let Some((done, state)) = pending.pop() {
        if done == all {
            return true;
        }
        if !tried.insert((done, state)) {
            continue;
        }
        let open = || events.iter().enumerate().filter(|(at, _)| done & (1 << at) == 0);
        let first_return = open().map(|(_, event)| event.returned).min().unwrap_or(u64::MAX);
        for (at, event) in open().filter(|(_, event)| event.called < first_return) {
            let (next, answer) = event.operation.apply(state);
            if answer == event.answer {
                pending.push((done | 1 << at, next));
            }
        }
    }
    false
}

#[test]
fn random_histories_are_linearizable() {
    let (mut overlaps, mut rotations) = (0, 0);
    for seed in 0..HISTORIES {
        let (tree, clock, start) =
            (ConcurrentLcbst::<Key, u64>::with_capacity(64), AtomicU64::new(0), Barrier::new(THREADS as usize));
        let run = |thread: u64| {
            let mut random = SplitMix(seed << 8 | thread);
            let mut events = Vec::with_capacity(OPERATIONS);
            YIELDS.set(SplitMix(random.next()));
            start.wait();
            for step in 0..OPERATIONS as u64 {
                if random.next().is_multiple_of(4) {
                    tree.settle();
                }
                let key = random.next() % KEYS;
                let operation = Operation::random(&mut random, thread << 32 | step);
                let called = clock.fetch_add(1, Ordering::SeqCst);
                let answer = operation.run(&tree, key);
                let returned = clock.fetch_add(1, Ordering::SeqCst);
                events.push(Event { key, operation, answer, called, returned });
            }
            events
        };
        let events: Vec<Event> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn({
                        let run = &run;
                        move || run(thread)
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no thread panics")).collect()
        });
        for key in 0..KEYS {
            let mut of_key: Vec<Event> = events.iter().filter(|event| event.key == key).copied().collect();
            of_key.sort_by_key(|event| event.called);
            overlaps += of_key.windows(2).filter(|pair| pair[1].called < pair[0].returned).count();
            assert!(is_linearizable(&of_key), "seed {seed}, key {key}: no order explains {of_key:#?}");
        }
        rotations += tree.rotations();
    }
    // A histories' test that never overlaps or rotates tests nothing. How often it does is up to the machine.
    println!("{overlaps} overlaps and {rotations} rotations in {HISTORIES} histories");
    assert!(rotations > 0);
}

#[test]
fn the_checker_refuses_what_no_order_explains() {
    let event = |operation, answer, called, returned| Event { key: 0, operation, answer, called, returned };
    let insert = event(Operation::Insert(7), Answer::Number(None), 0, 3);
    let early = event(Operation::Get, Answer::Number(Some(7)), 1, 2);
    let late = event(Operation::Get, Answer::Number(None), 4, 5);
    assert!(is_linearizable(&[insert, early]));
    assert!(!is_linearizable(&[insert, late]), "it returned before");
    let second = event(Operation::Contains, Answer::Truth(false), 2, 6);
    assert!(!is_linearizable(&[insert, Event { returned: 1, called: 1, ..early }, second]), "once seen, it stays seen");
    let lost = event(Operation::Weight, Answer::Number(Some(1)), 8, 9);
    let counted = event(Operation::Access(4), Answer::Truth(true), 6, 7);
    assert!(!is_linearizable(&[insert, counted, lost]), "a count was lost");
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014): a seed in, the same sequence on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
