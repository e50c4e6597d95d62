//! What a migration says about itself when it has ended.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::plan::{Decision, ShadowVerdict};

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeKind {
    /// The guest runs on the target.
    Completed,
    /// The user cancelled; the guest runs on the source.
    Cancelled,
    /// What remained never fitted the downtime limit; the guest runs on the source.
    NotConverged,
    /// Something failed before the hand-over; the guest runs on the source.
    Failed,
    /// The hand-over was sent and no answer came. The source does not run the guest again by itself.
    InDoubt,
}

impl fmt::Display for OutcomeKind {
    /// Its name in the report.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

/// Why the guest was paused when it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseCause {
    /// What remained fitted the limit, or the policy's rule said so.
    Plan,
    /// The time limit was over: the downtime limit did not count any more.
    TimeLimit,
    /// What remained never came to fit the limit, and the user wanted the guest to be paused then.
    Stuck,
}

/// The report of one migration, as the source saw it. Times in ms, sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Why it ended so, where that needs saying.
    pub reason: Option<String>,
    /// The method: `pre-copy`.
    pub mode: &'static str,
    /// Which policy decided.
    pub policy: &'static str,
    /// What other policies would have done.
    pub shadows: Vec<ShadowReport>,
    /// How near it came to what a schedule that knows the future could do.
    pub bound: BoundReport,
    /// The migration's name.
    pub migration_id: String,
    /// From the beginning to the end.
    pub total_ms: f64,
    /// From the moment the guest stood still on the source until it was known to run again.
    pub downtime_ms: f64,
    /// The limit that the user gave.
    pub downtime_limit_ms: f64,
    /// The downtime in its parts.
    pub downtime: DowntimeReport,
    /// The time before the pause in its parts.
    pub phases: PhaseTimes,
    /// All bytes sent to the target, frame headers included.
    pub wire_bytes: u64,
    /// The same in its parts.
    pub wire: WireReport,
    /// Pages and what became of them.
    pub pages: PageReport,
    /// What encoding pages cost and gained.
    pub compression: CompressionReport,
    /// Passes over memory, the stop phase included.
    pub passes: u32,
    /// Why the guest was paused when it was; `None` if it never was.
    pub pause_cause: Option<PauseCause>,
    /// The prediction and how good it was.
    pub working_set: WorkingSetReport,
    /// What the path carried, in bytes per second.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// Pages written per second while pushing, each counted once per epoch.
    pub dirty_pages_per_s: Option<f64>,
    /// The cost of tracking.
    pub tracking: TrackingReport,
    /// Telling the guest's address spaces apart, and what that cost; `None` where it was not asked for or the VMM cannot.
    pub address_spaces: Option<AddressSpacesReport>,
    /// The comparison of all pages, if it was asked for.
    pub verify: Option<VerifyReport>,
    /// What was to be done if it did not converge: `abort`, `switch` or `throttle`.
    pub if_stuck: &'static str,
    /// What was taken from the guest so that it converged; `None` if nothing.
    pub throttle: Option<ThrottleReport>,
    /// The pause was made although it was not expected to be within the limit; `None` if it was, or was not made.
    pub limit_waived: Option<WaivedLimit>,
}

/// Where the downtime went, in the order in which it passes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct DowntimeReport {
    /// From the guest's stop until the source could go on.
    pub pause_ms: f64,
    /// The scans for pages written last.
    pub scan_ms: f64,
    /// Sending pages.
    pub copy_ms: f64,
    /// Saving and sending the device state.
    pub device_state_ms: f64,
    /// Reading, sending and comparing digests.
    pub verify_ms: f64,
    /// Loading the device state on the target, waiting for data under way included.
    pub load_ms: f64,
    /// From the hand-over until the guest was known to run.
    pub resume_ms: f64,
    /// What was planned, when the pause was decided on, for all parts but copying and verifying; their sum is what they took.
    pub fixed_planned_ms: f64,
}

/// The time before the pause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PhaseTimes {
    /// Greeting the target.
    pub connect_ms: f64,
    /// Watching the guest's writes before the first page is sent (the paper's pre-processing).
    pub observe_ms: f64,
    /// Sending pages while the guest runs.
    pub push_ms: f64,
}

/// Bytes on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct WireReport {
    /// Sent while the guest ran.
    pub push_bytes: u64,
    /// Sent while it was paused.
    pub stop_bytes: u64,
    /// Of all: pages as they are.
    pub raw_bytes: u64,
    /// Of all: pages as LZ4 blocks.
    pub lz4_bytes: u64,
    /// Of all: pages as Zstandard frames.
    pub zstd_bytes: u64,
    /// Of all: what differs from pages that the target had.
    pub delta_bytes: u64,
    /// Of all: which pages of the target others are copies of.
    pub copy_bytes: u64,
    /// Of all: the notes that say which pages are zero.
    pub zero_bytes: u64,
    /// Of all: device state.
    pub device_state_bytes: u64,
    /// Of all: everything else.
    pub control_bytes: u64,
}

/// Pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PageReport {
    /// The guest's pages.
    pub total: u64,
    /// Pages whose content was sent, each time counted.
    pub sent: u64,
    /// Of `sent`: as they are.
    pub raw: u64,
    /// Of `sent`: in LZ4 blocks.
    pub lz4: u64,
    /// Of `sent`: in Zstandard frames.
    pub zstd: u64,
    /// Of `sent`: as what differs from what the target had.
    pub delta: u64,
    /// Of `sent`: as copies of pages that the target had.
    pub copy: u64,
    /// Pages that went as a note that they are zero, each time counted.
    pub zero: u64,
    /// Of `sent` and `zero`: those that had been sent before.
    pub resent: u64,
    /// Pages held back as the working set that went in the stop phase for the first time.
    pub held: u64,
    /// Pages that went in the stop phase.
    pub stop: u64,
}

/// What encoding pages cost and gained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct CompressionReport {
    /// Processor time spent on encoding, all threads together.
    pub encode_ms: f64,
    /// Bytes of the pages sent, zero ones not among them, for each byte that they took on the wire.
    pub ratio: Option<f64>,
}

/// The predicted working set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkingSetReport {
    /// Who predicted.
    pub predictor: &'static str,
    /// Pages that were held back when the guest was paused.
    pub pages: u64,
    /// Share of these that were written between the beginning of the push and the pause: sending them at once would
    /// have been in vain.
    pub precision: Option<f64>,
    /// Share of the pages written within the last window before the pause, as long as the observation, that were held
    /// back.
    pub recall: Option<f64>,
}

/// The cost of tracking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct TrackingReport {
    /// Scans of all memory.
    pub scans: u64,
    /// Their time in all.
    pub scan_ms: f64,
    /// The longest of them.
    pub scan_max_ms: f64,
}

/// How the guest's address spaces were told apart, and what that cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct AddressSpacesReport {
    /// Processes known in the end.
    pub processes: u64,
    /// How often it was looked who owns which page.
    pub refreshes: u64,
    /// The time of these in all.
    pub refresh_ms: f64,
    /// The longest of them.
    pub refresh_max_ms: f64,
    /// Of the time, asking the VMM which address spaces run.
    pub asking_ms: f64,
    /// Why it was given up, if it was: from then on all pages had one owner.
    pub failure: Option<String>,
}

/// The comparison of source and target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Pages compared.
    pub pages: u64,
    /// Pages that differ.
    pub mismatched: u64,
}

/// What was taken from the guest so that it wrote less.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ThrottleReport {
    /// The most processor time that was taken from it, in percent of what it would have had.
    pub max_percent: f64,
    /// In how many steps.
    pub steps: u32,
    /// How long it had not all of its time, up to its pause.
    pub throttled_ms: f64,
}

/// A pause that was made although it did not fit the limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct WaivedLimit {
    /// When that was decided, since the beginning of the push.
    pub at_ms: f64,
    /// How long a pause was expected then, without comparing pages; what it took is the report's `downtime_ms`.
    pub expected_downtime_ms: Option<f64>,
}

/// What a policy that was asked and not obeyed would have done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShadowReport {
    /// Which policy.
    pub policy: &'static str,
    /// Its first decision other than to go on: `pause` or `give-up`; `None` if it always wanted to go on.
    pub decision: Option<&'static str>,
    /// When that was, since the beginning of the push.
    pub at_ms: Option<f64>,
    /// The pause that was to be expected at that moment.
    pub expected_downtime_ms: Option<f64>,
    /// The most pages that it wanted to hold back.
    pub held_pages_max: u64,
}

impl ShadowReport {
    pub(super) fn new(verdict: ShadowVerdict) -> Self {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Self {
            policy: verdict.policy,
            decision: verdict.first.map(|(_, decision)| match decision {
                Decision::Push => "push",
                Decision::SendAll => "send-all",
                Decision::Pause => "pause",
                Decision::GiveUp => "give-up",
            }),
            at_ms: verdict.first.map(|(at, _)| ms(at)),
            expected_downtime_ms: verdict.expected_downtime.map(ms),
            held_pages_max: verdict.held_pages_max,
        }
    }
}

/// How near a migration came to the least that any schedule could do. That least is each page once, and in the pause no
/// more than what was written too late to be sent before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct BoundReport {
    /// Pages sent, zero ones included, for each page of the guest; 1 is the least.
    pub sent_ratio: Option<f64>,
    /// The fewest pages that any schedule could have left for the pause where it was made, by the ages of the latest
    /// writes, which are known to an epoch: the true bound can be higher. `None` without a predictor that knows them.
    pub least_stop_pages: Option<u64>,
    /// Pages sent while the guest was paused for each of those.
    pub stop_ratio: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_shown_by_its_name_in_the_report() {
        assert_eq!(OutcomeKind::NotConverged.to_string(), "not_converged");
    }
}
