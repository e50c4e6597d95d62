//! What a simulated migration says about itself, beside the least that was possible.

use serde::Serialize;
use vmferry_core::engine::Report;

/// How a simulated migration went. Times in ms of simulated time, sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The trace's name.
    pub trace: String,
    /// Who decided.
    pub policy: &'static str,
    /// Whether the guest runs on the target.
    pub converged: bool,
    /// When it was recognised that it would not converge; `None` if it converged or was cancelled at the time limit.
    pub given_up_ms: Option<f64>,
    /// Whether the pause was within the limit; `None` without a pause.
    pub within_limit: Option<bool>,
    /// The source's own report: times, bytes, pages, passes, the working set and how good it was.
    pub report: Report,
    /// Page frames sent, headers included: all that depends on the policy.
    pub page_bytes: u64,
    /// What the guest paid.
    pub guest: GuestCost,
    /// The least that any schedule can do on this link with this trace, and this migration in relation to it.
    pub optimum: Ratios,
    /// The migration over time: a sample at each scan, and one at its end.
    pub series: Vec<Sample>,
}

/// What a migration cost the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct GuestCost {
    /// Writes replayed on the source, each page counted once per epoch of the trace.
    pub writes: u64,
    /// Of those: the ones that paid a fault, being the first after the page was armed.
    pub write_faults: u64,
    /// What the faults took.
    pub fault_ms: f64,
    /// The same as a share of the time for which the guest ran on the source. The replay does not slow down by it: each
    /// policy sees the same writes.
    pub slowdown: f64,
    /// For how long the guest ran nowhere. The report's downtime is longer by the message that says that it runs.
    pub stopped_ms: f64,
}

/// The optimum, and ratios to it. A ratio is missing where there is nothing to compare.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Ratios {
    /// The fewest bytes of page frames: each page once.
    pub page_bytes: u64,
    /// The earliest moment at which the guest could have been stopped within the limit, counted from the migration's
    /// beginning, by a sender that knows all writes to come. `None`: within the scenario's horizon no
    /// schedule meets the limit.
    pub pause_ms: Option<f64>,
    /// From the migration's beginning to the guest running on the target, with that pause.
    pub total_ms: Option<f64>,
    /// The shortest copying that any schedule could have had with the pause when it was made: S(T) / B.
    pub copy_ms: Option<f64>,
    /// The shortest downtime with that pause, fixed parts included.
    pub downtime_ms: Option<f64>,
    /// Page bytes sent, in relation to each page once.
    pub bytes_ratio: f64,
    /// Page bytes sent beyond each page once; of a migration that did not converge, as far as it got.
    pub excess_bytes: i64,
    /// Pages sent beyond each page once, zero pages included.
    pub excess_pages: i64,
    /// The downtime in relation to the shortest.
    pub downtime_ratio: Option<f64>,
    /// The total time in relation to the shortest. A pause longer than the limit can make it less than 1.
    pub total_ratio: Option<f64>,
}

/// One moment of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Since the migration's beginning.
    pub at_ms: f64,
    /// Pages whose newest content the target does not have.
    pub pending_pages: u64,
    /// Those of them that are held back as the working set. 0 for policies that hold nothing back, and for post-copy.
    pub held_pages: u64,
    /// Bytes sent, of all kinds.
    pub sent_bytes: u64,
    /// What no schedule could have sent by then, in bytes of page content: S. `None` for post-copy, to which it does not
    /// apply.
    pub least_left_bytes: Option<f64>,
}
