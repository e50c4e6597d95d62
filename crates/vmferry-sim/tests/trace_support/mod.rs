//! Random traces.

use std::time::Duration;

use proptest::prelude::*;
use vmferry_core::pages::{AddressSpaceId, PageRun};
use vmferry_sim::trace::{Trace, TraceEpoch, WrittenRun, union};

/// Ascending runs below `pages`, with gaps or without.
fn any_runs(pages: u64, most: usize) -> impl Strategy<Value = Vec<PageRun>> {
    prop::collection::vec((0..8_u64, 1..6_u64), 0..most).prop_map(move |steps| {
        let mut at = 0;
        let mut runs = Vec::new();
        for (gap, count) in steps {
            let run = PageRun::new(at + gap, count);
            at = run.end();
            if at <= pages {
                runs.push(run);
            }
        }
        runs
    })
}

fn any_epoch(pages: u64) -> impl Strategy<Value = TraceEpoch> {
    let owners = prop::collection::vec(prop_oneof![Just(0), 1..4_u32, Just(u32::MAX)], 12);
    (any_runs(pages, 12), owners, prop::option::of(any_runs(pages, 6))).prop_map(|(runs, owners, read)| {
        let accessed = read.map(|read| union(read, runs.iter().copied()));
        let written = runs.into_iter().zip(owners).map(|(run, owner)| WrittenRun { run, owner: AddressSpaceId(owner) });
        TraceEpoch { written: written.collect(), accessed }
    })
}

/// A trace that keeps all rules: a few epochs over a small guest.
pub(crate) fn any_trace() -> impl Strategy<Value = Trace> {
    let epochs = prop::collection::vec(any_epoch(100), 1..8);
    (".{0,20}", epochs, 1..10_000_000_u64, any_runs(100, 8)).prop_map(|(name, epochs, epoch_us, zero)| {
        let written = |page: u64| {
            let mut runs = epochs.iter().flat_map(TraceEpoch::runs);
            runs.any(|run| run.first.0 <= page && page < run.end())
        };
        let zero = zero.into_iter().filter(|run| !run.pages().any(|page| written(page.0))).collect();
        Trace { name, pages: 100, epoch: Duration::from_micros(epoch_us), zero, epochs }
    })
}
