//! Which pages will be written again soon: the working set.
//!
//! A [`Predictor`] is fed the pages written in each epoch and says of each page how hot it is: how many writes to expect
//! of it. It does not decide how many pages to hold back or what to send next; the plan does, from the heats and the
//! downtime budget.
//!
//! | name | predictor | what it goes by |
//! |---|---|---|
//! | `lcbst` | [`WorkingSetPredictor`], the default | aged write counts in a counting tree for each address space, and the gaps between writes |
//! | `lcbst-unaged` | [`WorkingSetPredictor`] | counts that never age, as printed in the paper |
//! | `gap` | [`GapPredictor`] | the gaps between writes alone |
//! | `flat` | [`FlatPredictor`] | aged write counts in an array of the guest's size |
//! | `lru` | [`LruPredictor`] | the last write |
//! | `lru-k` | [`LruKPredictor`] | the K-th last write |
//! | `lfu` | [`LfuPredictor`] | counts that never age |
//! | `fbr` | [`FbrPredictor`] | counts that leave out repetitions |
//! | `lrfu` | [`LrfuPredictor`] | counts that age, from hardly to fast |
//! | `lru-sp` | [`LruSpPredictor`] | counts over age |
//! | `lru-splay` | [`LruSplayPredictor`] | the depth in a splay tree of the pages written last |
//! | `time-series` | [`TimeSeriesPredictor`] | written in K of the last N epochs |
//! | `none` | [`NoPrediction`] | nothing: plain pre-copy |
//!
//! [`PredictorSpec`] makes any of them from its name. All of them bound the pages that they know, and forget by a rule of
//! their own what does not fit; only `flat` takes memory by the guest's size.

mod fbr;
mod flat;
mod gap;
mod lfu;
mod lrfu;
mod lru;
mod lru_k;
mod lru_sp;
mod lru_splay;
mod page_list;
mod page_map;
#[cfg(test)]
mod quality;
mod recency;
mod spec;
#[cfg(test)]
mod testing;
mod time_series;
mod working_set;
mod write_gaps;

pub use fbr::FbrPredictor;
pub use flat::FlatPredictor;
pub use gap::GapPredictor;
pub use lfu::LfuPredictor;
pub use lrfu::LrfuPredictor;
pub use lru::LruPredictor;
pub use lru_k::LruKPredictor;
pub use lru_sp::LruSpPredictor;
pub use lru_splay::LruSplayPredictor;
pub use page_map::UNTRACKED_FROM;
pub use recency::{AgeGroup, RecencyStack, StackEntry, live_bound};
pub use spec::{PredictorSpec, PredictorSpecError};
pub use time_series::TimeSeriesPredictor;
pub use working_set::{OTHER_ADDRESS_SPACES, WorkingSetConfig, WorkingSetPredictor};
pub use write_gaps::LastWrite;

use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// A page and how hot it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankedPage {
    /// The page.
    pub page: PageNumber,
    /// The writes to expect per epoch, the next epochs counting most: 1 for a page that is written in each epoch, 0
    /// for one that is not written any more. A predictor that only orders pages says how it maps the order to (0, 1].
    pub heat: f64,
}

/// Learns from written pages which are hot.
pub trait Predictor: std::fmt::Debug + Send {
    /// The predictor's name in reports.
    fn name(&self) -> &'static str;

    /// Learns one epoch's written pages, all of the address space `owner`. Epochs end with [`Self::end_epoch`].
    ///
    /// The runs of one call are ascending and disjoint. A page that is reported by more than one call of an epoch may
    /// be counted more than once. Pages from [`UNTRACKED_FROM`] on are ignored.
    ///
    /// # Panics
    /// Where runs are not ascending or not disjoint, a predictor may panic.
    fn observe(&mut self, owner: AddressSpaceId, written: &[PageRun]);

    /// Ends the epoch: what was observed so far grows one epoch older.
    fn end_epoch(&mut self);

    /// How many pages the predictor knows at the moment.
    fn tracked_pages(&self) -> u64;

    /// How hot a page is; 0 for one that is not known.
    fn heat(&self, page: PageNumber) -> f64;

    /// Calls `each` once for each page that is known, in no particular order. Takes time in proportion to the pages
    /// known, unless the predictor says otherwise.
    fn visit(&self, each: &mut dyn FnMut(RankedPage));

    /// The bytes that the predictor occupies, reserved ones included.
    fn memory_bytes(&self) -> usize;

    /// The heat of all pages together: the writes to expect in an epoch. Visits all pages, where the predictor does not
    /// say otherwise.
    fn total_heat(&self) -> f64 {
        let mut total = 0.0;
        self.visit(&mut |ranked| total += ranked.heat);
        total
    }

    /// Appends up to `most` of the pages known, hottest first; pages of equal heat in an order that depends on nothing
    /// but what was observed. Visits all pages, where the predictor does not say otherwise.
    fn rank(&self, most: usize, ranking: &mut Vec<RankedPage>) {
        let mut pages = Vec::with_capacity(self.tracked_pages() as usize);
        self.visit(&mut |ranked| pages.push(ranked));
        keep_hottest(&mut pages, most);
        ranking.append(&mut pages);
    }

    /// The fewest pages that any schedule could leave for the stop phase if the guest were paused at the end of the last
    /// epoch with writes, over a link that carries so many pages in an epoch; see [`live_bound`]. `None` if the predictor
    /// does not know when pages were written last. Pages that it forgot make the number less, never more.
    fn least_stop_pages(&self, pages_per_epoch: f64) -> Option<u64> {
        let _ = pages_per_epoch;
        None
    }
}

/// Predicts nothing: no page is ever held back, and the migration is plain pre-copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPrediction;

impl Predictor for NoPrediction {
    fn name(&self) -> &'static str {
        "none"
    }

    fn observe(&mut self, _owner: AddressSpaceId, _written: &[PageRun]) {}

    fn end_epoch(&mut self) {}

    fn tracked_pages(&self) -> u64 {
        0
    }

    fn heat(&self, _page: PageNumber) -> f64 {
        0.0
    }

    fn visit(&self, _each: &mut dyn FnMut(RankedPage)) {}

    fn memory_bytes(&self) -> usize {
        size_of::<Self>()
    }
}

/// The page as the predictors number it, if they track it.
fn trackable(page: PageNumber) -> Option<u32> {
    u32::try_from(page.0).ok().filter(|&page| u64::from(page) < UNTRACKED_FROM)
}

/// The part of the run that is tracked, if any of it is.
fn trackable_part(run: PageRun) -> Option<PageRun> {
    let count = UNTRACKED_FROM.checked_sub(run.first.0)?.min(run.count);
    (count > 0).then_some(PageRun { count, ..run })
}

/// The pages of the runs that are tracked.
fn trackable_pages(runs: &[PageRun]) -> impl Iterator<Item = u32> {
    runs.iter().filter_map(|&run| trackable_part(run)).flat_map(|run| run.first.0 as u32..run.end() as u32)
}

fn ranked(page: u32, heat: f64) -> RankedPage {
    RankedPage { page: PageNumber(page.into()), heat }
}

/// Leaves up to `most` of the pages, the hottest first, those of equal heat by their numbers.
fn keep_hottest(pages: &mut Vec<RankedPage>, most: usize) {
    let hottest_first = |a: &RankedPage, b: &RankedPage| b.heat.total_cmp(&a.heat).then(a.page.cmp(&b.page));
    if most < pages.len() {
        pages.select_nth_unstable_by(most, hottest_first);
        pages.truncate(most);
    }
    pages.sort_unstable_by(hottest_first);
}

/// The bytes of a B-tree of so many entries, which does not say it itself: its nodes have room for eleven and are about
/// two thirds full where entries come and go in no order.
fn btree_bytes<T>(entries: usize) -> usize {
    entries * size_of::<T>() * 3 / 2
}

/// The epoch of the first write is 1, so that 0 can stand for never.
const FIRST_EPOCH: u32 = 1;

/// The age of a write for the epochs to come: 1 for one in the epoch that has just ended, or is about to.
fn age_epochs(now: u32, last: u32) -> u32 {
    (now - last).max(1)
}
