//! Small guests for the tests of the simulator.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PageRun, PageSet};
use vmferry_sim::trace::{Trace, TraceEpoch, WrittenRun};

/// Length of the guests' epochs.
pub(crate) const EPOCH: Duration = Duration::from_millis(50);

/// A guest with these written runs in each epoch; overlaps are merged.
pub(crate) fn trace(name: &str, pages: u64, zero: Vec<PageRun>, epochs: Vec<Vec<PageRun>>) -> Trace {
    let epochs = epochs.into_iter().map(|runs| {
        let mut written = PageSet::empty(pages);
        for run in runs {
            written.insert_run(run);
        }
        let written = written.runs().map(|run| WrittenRun { run, owner: AddressSpaceId::WHOLE_GUEST }).collect();
        TraceEpoch { written, accessed: None }
    });
    Trace { name: name.into(), pages, epoch: EPOCH, zero, epochs: epochs.collect() }
}

/// A guest that writes nothing, a quarter of it zero.
pub(crate) fn idle(pages: u64) -> Trace {
    trace("idle", pages, vec![PageRun::new(pages / 4, pages / 4)], vec![vec![]; 20])
}

/// A guest that writes so many pages an epoch, spread over `hot` pages, differently in each of 40 epochs; the upper
/// eighth is zero.
pub(crate) fn hot(pages: u64, hot: u64, per_epoch: u64) -> Trace {
    let mut state = 9_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let epochs = (0..40).map(|_| (0..per_epoch).map(|_| PageRun::new(pages / 4 + random(hot), 1)).collect());
    trace("hot", pages, vec![PageRun::new(pages - pages / 8, pages / 8)], epochs.collect())
}

/// A guest that rewrites all its memory in each epoch.
pub(crate) fn storm(pages: u64) -> Trace {
    trace("storm", pages, vec![], vec![vec![PageRun::new(0, pages)]; 4])
}

/// A guest that writes its upper half from end to end, again and again, so many pages an epoch.
pub(crate) fn sweep(pages: u64, per_epoch: u64) -> Trace {
    let steps = pages / 2 / per_epoch;
    let epochs = (0..steps).map(|step| vec![PageRun::new(pages / 2 + step * per_epoch, per_epoch)]);
    trace("sweep", pages, vec![], epochs.collect())
}
