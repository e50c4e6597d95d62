//! What the tests of the predictors share: traces, and the comparison with a model.

use std::collections::BTreeMap;
use std::ops::Deref;

use proptest::prelude::*;

use super::Predictor;
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// The pages written in each epoch, in calls with ascending runs.
#[derive(Debug, Clone)]
pub(super) struct Trace(Vec<Vec<Vec<PageRun>>>);

impl Deref for Trace {
    type Target = [Vec<Vec<PageRun>>];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Trace {
    /// Lets the predictor see one epoch. The pages in the order that it saw them.
    pub(super) fn feed(predictor: &mut dyn Predictor, epoch: &[Vec<PageRun>]) -> Vec<u64> {
        for runs in epoch {
            predictor.observe(AddressSpaceId::WHOLE_GUEST, runs);
        }
        predictor.end_epoch();
        epoch.iter().flatten().flat_map(|run| run.pages()).map(|page| page.0).collect()
    }
}

/// Up to 30 epochs of writes to so many pages: mostly one call an epoch, at times none or two. Small page numbers are
/// more often written than great ones.
pub(super) fn trace(pages: u64) -> impl Strategy<Value = Trace> {
    let page = prop_oneof![0..pages / 8, 0..pages];
    let call = prop::collection::btree_set(page, 0..25).prop_map(|pages| {
        let mut runs: Vec<PageRun> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                // Some neighbours stay apart: runs need not be as long as they can be.
                Some(run) if run.end() == page && page % 7 != 0 => run.count += 1,
                _ => runs.push(PageRun::new(page, 1)),
            }
        }
        runs
    });
    let epoch = prop_oneof![
        1 => Just(Vec::new()),
        8 => prop::collection::vec(call.clone(), 1),
        1 => prop::collection::vec(call, 2),
    ];
    prop::collection::vec(epoch, 1..30).prop_map(Trace)
}

/// Checks that a predictor knows exactly these pages with these heats, and that its answers agree with each other.
#[track_caller]
pub(super) fn assert_same(predictor: &dyn Predictor, expected: impl IntoIterator<Item = (u64, f64)>) {
    assert_close(predictor, expected, 1e-9);
}

/// As [`assert_same`], with heats that may differ so much.
#[track_caller]
pub(super) fn assert_close(predictor: &dyn Predictor, expected: impl IntoIterator<Item = (u64, f64)>, tolerance: f64) {
    let expected: BTreeMap<u64, f64> = expected.into_iter().collect();
    let visited = assert_consistent(predictor);
    assert!(visited.keys().eq(expected.keys()), "{visited:?} known, {expected:?} expected");
    for (page, heat) in &visited {
        assert!((heat - expected[page]).abs() <= tolerance, "page {page}: {heat}, {} expected", expected[page]);
    }
}

/// Checks that a predictor's answers agree with each other. All pages and their heats.
#[track_caller]
pub(super) fn assert_consistent(predictor: &dyn Predictor) -> BTreeMap<u64, f64> {
    let mut visited = BTreeMap::new();
    predictor.visit(&mut |ranked| {
        assert_eq!(visited.insert(ranked.page.0, ranked.heat), None, "{:?} comes twice", ranked.page);
        assert_eq!(predictor.heat(ranked.page), ranked.heat, "{:?}", ranked.page);
        assert!(ranked.heat.is_finite() && ranked.heat >= 0.0, "{ranked:?}");
    });
    assert_eq!(predictor.tracked_pages(), visited.len() as u64);
    assert_eq!(predictor.heat(PageNumber(1 << 20)), 0.0);
    assert_eq!(predictor.heat(PageNumber(super::UNTRACKED_FROM)), 0.0);

    let mut ranking = Vec::new();
    predictor.rank(usize::MAX, &mut ranking);
    assert_eq!(ranking.len(), visited.len());
    assert!(ranking.is_sorted_by(|a, b| (b.heat, a.page) < (a.heat, b.page)), "{ranking:?}");
    assert!(ranking.iter().all(|ranked| visited[&ranked.page.0] == ranked.heat));
    for most in [0, 1, 5] {
        let mut few = ranking[..1.min(ranking.len())].to_vec();
        let before = few.len();
        predictor.rank(most, &mut few);
        assert_eq!(few[before..], ranking[..most.min(ranking.len())], "what was there stays, and {most} come");
    }
    visited
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014): a seed in, the same sequence on every machine.
pub(super) struct SplitMix(pub(super) u64);

impl SplitMix {
    /// A number below the limit.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit
    }
}
