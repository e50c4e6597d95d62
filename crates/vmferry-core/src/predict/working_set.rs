//! The paper's predictor: a recency stack, and a lazy counting-based splay tree for each address space.
//!
//! Each written page is a request "page j of process p": it goes to the top of the recency stack and is counted in the
//! tree of its address space. A full stack drops its bottom page, from the tree too, so that memory follows the hot
//! set. Counters age by forward decay. The working set are the pages with the highest counters; "the top of the tree",
//! as the paper has it, is not that set, so the selection is by counter.
//!
//! Invariant: each page on the stack is in exactly one tree, that of its owner on the stack, and nothing else is.

use std::collections::{BTreeMap, BinaryHeap};
use std::num::NonZeroU32;

use lcbst::CountingTree;

use super::{Predictor, RankedPage, RecencyStack};
use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// How the predictor remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkingSetConfig {
    /// The most pages on the recency stack.
    pub stack_pages: usize,
    /// Epochs after which a write counts half; `None`: writes never age, as printed in the paper.
    pub half_life_epochs: Option<NonZeroU32>,
}

impl WorkingSetConfig {
    /// The default for a guest of so many pages: everything can be on the stack up to 4 GiB, a million pages beyond;
    /// half-life 4 epochs.
    pub fn for_guest(total_pages: u64) -> Self {
        const MOST_PAGES: u64 = 1 << 20;
        Self { stack_pages: total_pages.clamp(1, MOST_PAGES) as usize, half_life_epochs: NonZeroU32::new(4) }
    }
}

/// The lazy counting-based splay tree predictor.
#[derive(Debug)]
pub struct WorkingSetPredictor {
    config: WorkingSetConfig,
    stack: RecencyStack,
    trees: BTreeMap<AddressSpaceId, CountingTree<u64>>,
    epochs: u64,
}

impl WorkingSetPredictor {
    /// A predictor that has seen nothing.
    pub fn new(config: WorkingSetConfig) -> Self {
        Self { config, stack: RecencyStack::new(config.stack_pages), trees: BTreeMap::new(), epochs: 0 }
    }

    /// The trees and the address spaces they belong to.
    pub fn trees(&self) -> impl Iterator<Item = (AddressSpaceId, &CountingTree<u64>)> {
        self.trees.iter().map(|(&owner, tree)| (owner, tree))
    }

    /// Takes `page` out of its tree, and the tree away once it is empty.
    fn forget(&mut self, owner: AddressSpaceId, page: PageNumber) {
        if let Some(tree) = self.trees.get_mut(&owner) {
            tree.remove(&page.0);
            if tree.is_empty() {
                self.trees.remove(&owner);
            }
        }
    }

    /// What turns a weight in units of today into the expected writes per epoch: a page written in every epoch has 1.
    fn writes_per_epoch(&self) -> f64 {
        match self.config.half_life_epochs {
            // The weight tends to the geometric sum d + d² + …, d being what one epoch leaves of a write.
            Some(half_life) => {
                let kept = (-1.0 / f64::from(half_life.get())).exp2();
                (1.0 - kept) / kept
            }
            None => 1.0 / self.epochs.max(1) as f64,
        }
    }
}

impl Predictor for WorkingSetPredictor {
    fn name(&self) -> &'static str {
        "lcbst"
    }

    fn observe(&mut self, owner: AddressSpaceId, written: &[PageRun]) {
        for page in written.iter().flat_map(|run| run.pages()) {
            if let Some(dropped) = self.stack.touch(page, owner) {
                self.forget(dropped.owner, dropped.page);
            }
            let half_life = self.config.half_life_epochs;
            self.trees.entry(owner).or_insert_with(|| CountingTree::with_half_life(half_life)).touch(page.0, 1);
        }
    }

    fn end_epoch(&mut self) {
        self.epochs += 1;
        for tree in self.trees.values_mut() {
            tree.advance(1);
        }
    }

    fn tracked_pages(&self) -> u64 {
        self.stack.len() as u64
    }

    fn heat(&self, page: PageNumber) -> f64 {
        let tree = self.stack.owner(page).and_then(|owner| self.trees.get(&owner));
        tree.and_then(|tree| tree.weight_today(&page.0)).unwrap_or(0.0) * self.writes_per_epoch()
    }

    fn total_heat(&self) -> f64 {
        let weight: f64 = self.trees.values().map(|tree| tree.in_units_of_today(tree.total_weight())).sum();
        weight * self.writes_per_epoch()
    }

    fn rank(&self, most: usize, ranking: &mut Vec<RankedPage>) {
        let factor = self.writes_per_epoch();
        let mut sources: Vec<_> = self
            .trees
            .values()
            .map(|tree| tree.hottest().map(|(&page, weight)| (tree.in_units_of_today(weight), page)))
            .collect();
        // Each tree yields its pages hottest first; the merge takes the hottest head each time. Weights are finite and
        // not negative, so their bit patterns order as they do.
        let mut heads: BinaryHeap<_> = BinaryHeap::with_capacity(sources.len());
        let head = |(weight, page): (f64, u64), source| (weight.to_bits(), std::cmp::Reverse(page), source);
        for (source, pages) in sources.iter_mut().enumerate() {
            heads.extend(pages.next().map(|next| head(next, source)));
        }
        for _ in 0..most {
            let Some((bits, std::cmp::Reverse(page), source)) = heads.pop() else { break };
            ranking.push(RankedPage { page: PageNumber(page), heat: f64::from_bits(bits) * factor });
            heads.extend(sources[source].next().map(|next| head(next, source)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn predictor(stack_pages: usize, half_life: u32) -> WorkingSetPredictor {
        WorkingSetPredictor::new(WorkingSetConfig { stack_pages, half_life_epochs: NonZeroU32::new(half_life) })
    }

    fn ranked(predictor: &WorkingSetPredictor, most: usize) -> Vec<RankedPage> {
        let mut ranking = Vec::new();
        predictor.rank(most, &mut ranking);
        ranking
    }

    proptest! {
        /// Against a plain model: a list in recency order and aged sums in floating point.
        #[test]
        fn ranks_as_a_plain_model_does(
            capacity in 1..50_usize,
            epochs in prop::collection::vec(prop::collection::vec((0..80_u64, 0..3_u32), 0..40), 1..40),
        ) {
            let mut predictor = predictor(capacity, 4);
            let mut recent: Vec<(u64, u32)> = Vec::new();
            let mut heat: HashMap<u64, f64> = HashMap::new();
            for epoch in &epochs {
                for &(page, owner) in epoch {
                    predictor.observe(AddressSpaceId(owner), &[PageRun::new(page, 1)]);
                    let known = recent.iter().position(|&(other, _)| other == page);
                    if let Some(at) = known {
                        // With a new owner the page starts afresh in that owner's tree.
                        if recent.remove(at).1 != owner {
                            heat.remove(&page);
                        }
                    }
                    recent.insert(0, (page, owner));
                    for (dropped, _) in recent.drain(recent.len().min(capacity)..) {
                        heat.remove(&dropped);
                    }
                    *heat.entry(page).or_default() += 1.0;
                }
                predictor.end_epoch();
                for heat in heat.values_mut() {
                    *heat *= 0.5_f64.powf(0.25);
                }
            }
            prop_assert_eq!(predictor.tracked_pages() as usize, recent.len());
            let in_trees: usize = predictor.trees().map(|(_, tree)| tree.len()).sum();
            prop_assert_eq!(in_trees, recent.len());

            let ranking = ranked(&predictor, usize::MAX);
            prop_assert_eq!(ranking.len(), recent.len());
            for pair in ranking.windows(2) {
                prop_assert!(pair[0].heat >= pair[1].heat);
            }
            let factor = predictor.writes_per_epoch();
            for ranked in &ranking {
                let expected = heat[&ranked.page.0] * factor;
                prop_assert!((ranked.heat - expected).abs() < 1e-3, "{ranked:?}, {expected} expected");
            }
            prop_assert_eq!(&ranked(&predictor, 5)[..], &ranking[..ranking.len().min(5)]);
            for ranked in &ranking {
                prop_assert_eq!(predictor.heat(ranked.page), ranked.heat);
            }
            prop_assert_eq!(predictor.heat(PageNumber(1000)), 0.0);
            let total: f64 = ranking.iter().map(|ranked| ranked.heat).sum();
            prop_assert!((predictor.total_heat() - total).abs() < 1e-6 * (1.0 + total));
        }
    }

    #[test]
    fn a_page_written_each_epoch_has_heat_one_and_an_idle_one_cools() {
        let mut predictor = predictor(100, 4);
        predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(9, 1)]);
        for _ in 0..100 {
            predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(7, 1)]);
            predictor.end_epoch();
        }
        let ranking = ranked(&predictor, 10);
        assert_eq!(ranking[0].page, PageNumber(7));
        assert!((ranking[0].heat - 1.0).abs() < 1e-3, "{ranking:?}");
        assert!(ranking[1].heat < 1e-3, "{ranking:?}");
    }

    #[test]
    fn unaged_heat_is_the_share_of_epochs_with_a_write() {
        let config = WorkingSetConfig { stack_pages: 10, half_life_epochs: None };
        let mut predictor = WorkingSetPredictor::new(config);
        for epoch in 0..8 {
            predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(1, 1)]);
            if epoch % 4 == 0 {
                predictor.observe(AddressSpaceId::WHOLE_GUEST, &[PageRun::new(2, 1)]);
            }
            predictor.end_epoch();
        }
        let heats: Vec<f64> = ranked(&predictor, 10).iter().map(|ranked| ranked.heat).collect();
        assert_eq!(heats, [1.0, 0.25]);
    }
}
