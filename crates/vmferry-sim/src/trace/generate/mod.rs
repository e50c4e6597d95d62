//! Traces from a formula and a seed: workloads whose behaviour is known, for tests and studies.
//!
//! A [`GeneratorSpec`] is written `NAME:PARAMETER=VALUE,…`, for instance `zipf:pages=65536,exponent=0.99,rate=20000`;
//! what is left out has a default. [`workloads`] lists names and parameters, for a program's help. The same
//! specification and seed give the same trace on every machine.
//!
//! `rate` counts single writes. A page that is written several times in an epoch is in the trace once, so the dirty rate
//! of the trace is lower, the more so the more the writes are concentrated.

mod spec;
mod workload;

use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PageNumber, PageRun};

pub use spec::{Parameter, SpecError, WorkloadHelp, workloads};
pub use workload::{Chase, Churn, HotCold, Idle, Phases, Sweep, Workload, Zipf};

use super::{Trace, TraceEpoch, union, written_runs};
use crate::random::SplitMix64;

/// The most single writes of a generated trace: a few minutes of computing.
pub const MAX_WRITES: u64 = 1 << 32;
/// The most single writes of one epoch, which are kept in memory.
pub const MAX_EPOCH_WRITES: u64 = 1 << 26;
/// The longest generated trace: 30 days.
pub const MAX_DURATION: Duration = Duration::from_secs(30 * 24 * 3600);

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorSpec {
    /// The guest's size in pages.
    pub pages: u64,
    /// How many of them, the last ones, are zero and stay so.
    pub zero: u64,
    /// Single writes per second.
    pub rate: u64,
    /// The length of an epoch.
    pub epoch: Duration,
    /// The length of the trace; cut to whole epochs.
    pub duration: Duration,
    /// How the guest writes.
    pub workload: Workload,
}

impl GeneratorSpec {
    /// A workload with the defaults of everything else: 65,536 pages (256 MiB), 20,000 writes per second, 60 s in epochs
    /// of 50 ms.
    pub fn new(workload: Workload) -> Self {
        let rate = workload.default_rate();
        Self {
            pages: 65_536,
            zero: 0,
            rate,
            epoch: Duration::from_millis(50),
            duration: Duration::from_secs(60),
            workload,
        }
    }

    /// Checks that the parameters fit together.
    ///
    /// # Errors
    /// [`SpecError::Value`] names the parameter and what it may be.
    pub fn check(&self) -> Result<(), SpecError> {
        spec::check(self)
    }

    /// Generates the trace. Its name is the specification and the seed.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn generate(&self, seed: u64) -> Result<Trace, SpecError> {
        self.check()?;
        let mut random = SplitMix64::new(seed);
        let usable = self.pages - self.zero;
        let mut model = self.workload.model(usable, &mut random);
        // Durations are below 2^52 ns, and writes below 2^32: see `check`.
        let epoch_ns = self.epoch.as_nanos() as u64;
        let mut epochs = Vec::new();
        let mut touches = Touches { written: Vec::new(), read: self.workload.reads().then(Vec::new) };
        let mut done = 0;
        for number in 0..self.epochs() {
            let now = Moment { start_ns: epoch_ns * number, end_ns: epoch_ns * (number + 1) };
            // Counted from the beginning, so that rates that are no whole number per epoch come out right.
            let due = writes_until(self.rate, now.end_ns);
            model.advance(now, due - done, &mut touches, &mut random);
            done = due;
            epochs.push(touches.epoch());
        }
        let zero = if self.zero > 0 { vec![PageRun::new(usable, self.zero)] } else { Vec::new() };
        Ok(Trace { name: format!("{self} seed={seed}"), pages: self.pages, epoch: self.epoch, zero, epochs })
    }

    /// How many whole epochs the trace has.
    fn epochs(&self) -> u64 {
        let epochs = self.duration.as_nanos() / self.epoch.as_nanos().max(1);
        u64::try_from(epochs).unwrap_or(u64::MAX)
    }
}

/// How many writes have been made after so long.
fn writes_until(rate: u64, ns: u64) -> u64 {
    u64::try_from(u128::from(rate) * u128::from(ns) / 1_000_000_000).unwrap_or(u64::MAX)
}

/// The stretch of time that an epoch covers.
#[derive(Debug, Clone, Copy)]
struct Moment {
    start_ns: u64,
    end_ns: u64,
}

/// What happens within one epoch.
#[derive(Debug)]
struct Touches {
    written: Vec<(PageNumber, AddressSpaceId)>,
    /// Pages that are read only; `None` for workloads that do not model reads.
    read: Option<Vec<PageRun>>,
}

impl Touches {
    fn write(&mut self, page: u64, owner: AddressSpaceId) {
        self.written.push((PageNumber(page), owner));
    }

    fn read(&mut self, page: u64) {
        if let Some(read) = &mut self.read {
            read.push(PageRun::new(page, 1));
        }
    }

    /// Takes what was gathered as an epoch.
    fn epoch(&mut self) -> TraceEpoch {
        let written = written_runs(&mut self.written);
        self.written.clear();
        let accessed = self.read.as_mut().map(|read| {
            let accessed = union(read.iter().copied(), written.iter().map(|written| written.run));
            read.clear();
            accessed
        });
        TraceEpoch { written, accessed }
    }
}

/// A part of the guest for each writer: equal shares of a region, the owners numbered from 1; one writer alone is not
/// told apart from the guest.
fn shares(region: u64, writers: u64) -> impl Iterator<Item = (AddressSpaceId, PageRun)> {
    let share = region / writers;
    (0..writers).map(move |writer| {
        let owner = if writers == 1 { AddressSpaceId::WHOLE_GUEST } else { AddressSpaceId(writer as u32 + 1) };
        (owner, PageRun::new(writer * share, share))
    })
}
