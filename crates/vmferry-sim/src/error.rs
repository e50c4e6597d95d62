//! What can be wrong with a simulation.

use vmferry_core::pages::{LayoutError, PageRun};

/// Why something could not be simulated, or must not be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// There is nothing to replay.
    #[error("trace `{trace}` has no epochs or no pages; record or generate one that has")]
    NoEpochs {
        /// The trace's name.
        trace: String,
    },
    /// Epochs take no time.
    #[error("trace `{trace}` has epochs of length 0, so its writes have no moments; its recording is damaged")]
    EpochLength {
        /// The trace's name.
        trace: String,
    },
    /// The guest is larger than the simulator's page numbers.
    #[error("trace `{trace}` has {pages} pages; at most 2^32 can be simulated")]
    TooManyPages {
        /// The trace's name.
        trace: String,
        /// Its pages.
        pages: u64,
    },
    /// A page of the trace is no page of its guest.
    #[error(
        "trace `{trace}` names pages {}..{} of a guest of {pages} pages; its recording is damaged",
        run.first.0,
        run.first.0.saturating_add(run.count)
    )]
    OutsideGuest {
        /// The trace's name.
        trace: String,
        /// The pages that it names.
        run: PageRun,
        /// The guest's pages.
        pages: u64,
    },
    /// The guest's RAM is not one that can be migrated.
    #[error("the trace's guest has no valid RAM layout")]
    Layout(#[from] LayoutError),
    /// Nothing can be sent.
    #[error("a link of 0 bytes per second sends nothing; give it a rate (--bandwidth)")]
    NoBandwidth,
    /// The time between scans is zero.
    #[error("an epoch of length 0 would scan for ever; allow at least a millisecond between scans (--epoch)")]
    NoEpoch,
    /// The state machine asked for something that this simulation never leads to.
    #[error("the source asked to {what}, which a simulated migration without verification never needs: a defect")]
    Unexpected {
        /// What it asked for.
        what: &'static str,
    },
    /// The guest was handed over while it ran on the source.
    #[error("the guest was handed over while it still ran on the source: a defect of the engine")]
    RunsTwice,
    /// The guest was handed over although the target lacked a write.
    #[error(
        "page {page} was written after its content was sent last, and was handed over all the same ({pages} such pages): \
         a defect of the engine or the policy"
    )]
    LostWrite {
        /// The first such page.
        page: u64,
        /// How many there are.
        pages: u64,
    },
}
