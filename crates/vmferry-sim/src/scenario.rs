//! Under which conditions a migration is simulated, and who decides in it.

use std::time::Duration;

use vmferry_core::engine::{Source, SourceConfig};
use vmferry_core::pages::{PAGE_BYTES, RamBlock, RamLayout};
use vmferry_core::plan::{FixedCosts, IfStuck, Patience, PolicySpec};
use vmferry_core::predict::PredictorSpec;
use vmferry_core::wire::{Encodings, MigrationId};

use crate::SimError;

/// The machine type and number of processors that both sides of a simulated migration agree on.
pub(crate) const MACHINE: &str = "simulated";
pub(crate) const VCPUS: u32 = 1;
/// How long either side may be silent. Nothing is lost on a simulated link, so this is never waited for.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(600);

/// What write tracking costs. The defaults were measured on two virtual x86-64 processors, Linux 6.18, guest of 512 MiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrackingCosts {
    /// One call of `PAGEMAP_SCAN`, whatever it finds, in ns.
    pub call_ns: f64,
    /// Looking at a page, in ns.
    pub page_ns: f64,
    /// Reporting a written page and arming it again, in ns: 11 where all neighbours are written too, 25 where none is.
    pub written_ns: f64,
    /// What the guest loses by the first write to an armed page, in ns.
    pub fault_ns: f64,
}

impl Default for TrackingCosts {
    fn default() -> Self {
        Self { call_ns: 1300.0, page_ns: 0.7, written_ns: 20.0, fault_ns: 1000.0 }
    }
}

/// What handling pages costs at either end. The defaults are those of a stream of 0.9 GB/s on loopback.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostCosts {
    /// Reading a page at the source and seeing whether it is zero, in ns.
    pub read_page_ns: f64,
    /// Summing it and writing it to the socket, in ns.
    pub send_page_ns: f64,
    /// Reading from the socket, checking and putting in place at the target, in ns a page.
    pub apply_page_ns: f64,
}

impl Default for HostCosts {
    fn default() -> Self {
        Self { read_page_ns: 1000.0, send_page_ns: 3500.0, apply_page_ns: 4500.0 }
    }
}

/// What the stop phase really costs beside scans and pages. The defaults make 8.5 ms, as a small QEMU guest takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopCosts {
    /// From the decision until the guest stands still; it still runs meanwhile.
    pub stop_delay: Duration,
    /// From then until the source can go on.
    pub pause: Duration,
    /// Saving the device state.
    pub save: Duration,
    /// Its length.
    pub device_state_bytes: u64,
    /// Pages that saving it writes.
    pub saved_pages: u64,
    /// Loading it on the target.
    pub load: Duration,
    /// From the hand-over's arrival until the guest runs; also what resuming takes on the source.
    pub resume: Duration,
}

impl Default for StopCosts {
    fn default() -> Self {
        Self {
            stop_delay: Duration::from_millis(2),
            pause: Duration::from_micros(500),
            save: Duration::from_millis(2),
            device_state_bytes: 300_000,
            saved_pages: 1,
            load: Duration::from_millis(5),
            resume: Duration::from_millis(1),
        }
    }
}

/// A migration to simulate.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// What the link carries, in bytes of frames per second.
    pub bandwidth_bytes_per_s: u64,
    /// From the moment the last byte of a frame leaves until it is there, each way.
    pub latency: Duration,
    /// What the sockets hold of one direction: whoever sends more waits.
    pub socket_buffer_bytes: u64,
    /// The most that the source shall send per second; `None`: as the link allows.
    pub bandwidth_cap_bytes_per_s: Option<u64>,
    /// The longest pause allowed.
    pub downtime_limit: Duration,
    /// Time between scans.
    pub epoch: Duration,
    /// How long the guest is watched before the first page is sent; nothing is watched without a predictor.
    pub observe: Duration,
    /// When to give up.
    pub patience: Patience,
    /// What the plan assumes of the stop phase's fixed part: the default is what a live migration finds out on a quiet host
    /// (docs/decisions/0011).
    pub planned: FixedCosts,
    /// What the stop phase really costs.
    pub stop: StopCosts,
    /// What tracking costs.
    pub tracking: TrackingCosts,
    /// What handling pages costs.
    pub host: HostCosts,
    /// Who decides.
    pub policy: PolicySpec,
    /// Who predicts.
    pub predictor: PredictorSpec,
    /// Where in the trace the migration begins, modulo the trace's length. The predictor does not know what was before.
    pub start_offset: Duration,
    /// Draws the moments of writes within their epochs.
    pub seed: u64,
    /// When the migration is cancelled if it has not ended.
    pub time_limit: Duration,
    /// How far from the migration's beginning the optimum looks for a pause within the limit.
    pub horizon: Duration,
}

impl Default for Scenario {
    /// 1 Gbit/s, 0.1 ms, and what `vmferry migrate` does without flags on a QEMU guest.
    fn default() -> Self {
        Self {
            bandwidth_bytes_per_s: 125_000_000,
            latency: Duration::from_micros(100),
            socket_buffer_bytes: 4 * 1024 * 1024,
            bandwidth_cap_bytes_per_s: None,
            downtime_limit: Duration::from_millis(300),
            epoch: Duration::from_millis(50),
            observe: Duration::ZERO,
            patience: Patience { passes: 8, time: Duration::from_secs(5) },
            planned: FixedCosts { time: Duration::from_millis(12), device_state_bytes: 400_000 },
            stop: StopCosts::default(),
            tracking: TrackingCosts::default(),
            host: HostCosts::default(),
            policy: PolicySpec::Vmferry,
            predictor: PredictorSpec::default(),
            start_offset: Duration::ZERO,
            seed: 0,
            time_limit: Duration::from_secs(120),
            horizon: Duration::from_secs(30),
        }
    }
}

impl Scenario {
    /// Whether a migration can be simulated with these numbers.
    pub(crate) fn check(&self) -> Result<(), SimError> {
        if self.bandwidth_bytes_per_s == 0 || self.bandwidth_cap_bytes_per_s == Some(0) {
            return Err(SimError::NoBandwidth);
        }
        if self.epoch.is_zero() {
            return Err(SimError::NoEpoch);
        }
        Ok(())
    }

    /// The source of this scenario for a guest with this layout: the one place where policy and predictor become code.
    pub(crate) fn source(&self, layout: &RamLayout) -> Source {
        let config = SourceConfig {
            migration: MigrationId([0; 16]),
            layout: layout.clone(),
            machine: MACHINE.into(),
            vcpus: VCPUS,
            downtime_limit: self.downtime_limit,
            bandwidth_cap_bytes_per_s: self.bandwidth_cap_bytes_per_s,
            epoch: self.epoch,
            observe: if self.predictor == PredictorSpec::None { Duration::ZERO } else { self.observe },
            verify: false,
            stall_timeout: STALL_TIMEOUT,
            fixed: self.planned,
            encodings: Encodings::RAW,
            // A trace knows the moments of writes at full speed only.
            if_stuck: IfStuck::Abort,
            streams: 1,
        };
        Source::new(config, self.predictor.build(layout.total_pages()), self.policy.build(self.patience))
    }
}

/// The RAM of a guest of so many pages: one block.
pub(crate) fn layout(pages: u64) -> Result<RamLayout, SimError> {
    Ok(RamLayout::new(vec![RamBlock { id: "ram".into(), bytes: pages * PAGE_BYTES }])?)
}
