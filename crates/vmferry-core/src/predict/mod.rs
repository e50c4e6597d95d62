//! Which pages will be written again soon: the working set.
//!
//! A [`Predictor`] is fed the pages written in each epoch and ranks them by heat, the expected writes to come. It does
//! not decide how many pages to hold back; the plan does, from the ranking and the downtime budget.

mod recency;
mod working_set;

pub use recency::{RecencyStack, StackEntry};
pub use working_set::{WorkingSetConfig, WorkingSetPredictor};

use crate::pages::{AddressSpaceId, PageNumber, PageRun};

/// A page and how hot it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankedPage {
    /// The page.
    pub page: PageNumber,
    /// The writes to expect per epoch, from its aged write count: a page written in each epoch tends to 1, and one that
    /// is not written any more halves every half-life.
    pub heat: f64,
}

/// Learns from written pages which are hot.
pub trait Predictor: std::fmt::Debug + Send {
    /// The predictor's name in reports.
    fn name(&self) -> &'static str;

    /// Learns one epoch's written pages, all of the address space `owner`. Epochs end with [`Self::end_epoch`].
    fn observe(&mut self, owner: AddressSpaceId, written: &[PageRun]);

    /// Ends the epoch: what was observed so far grows one epoch older.
    fn end_epoch(&mut self);

    /// How many pages the predictor knows at the moment.
    fn tracked_pages(&self) -> u64;

    /// How hot a page is; 0 for one that is not known.
    fn heat(&self, page: PageNumber) -> f64;

    /// The heat of all pages together: the writes to expect in an epoch.
    fn total_heat(&self) -> f64;

    /// Appends up to `most` of the pages known, hottest first; pages of equal heat in an order that depends on nothing
    /// but what was observed.
    fn rank(&self, most: usize, ranking: &mut Vec<RankedPage>);
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

    fn total_heat(&self) -> f64 {
        0.0
    }

    fn rank(&self, _most: usize, _ranking: &mut Vec<RankedPage>) {}
}
