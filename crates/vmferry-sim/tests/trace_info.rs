//! The figures of a trace, against counting page by page.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use vmferry_core::pages::{AddressSpaceId, PageRun};
use vmferry_sim::trace::{Trace, TraceEpoch, WrittenRun};

mod trace_support;
use trace_support::any_trace;

/// The pages that an epoch wrote.
fn pages(epoch: &TraceEpoch) -> BTreeSet<u64> {
    epoch.runs().flat_map(|run| run.first.0..run.end()).collect()
}

fn close(left: f64, right: f64) -> bool {
    (left - right).abs() <= 1e-9 * right.abs().max(1.0)
}

/// `part / whole`, and 0 of nothing.
fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

proptest! {
    #[test]
    fn figures_agree_with_counting(parts in prop::collection::vec(any_trace(), 1..5)) {
        let mut trace = parts[0].clone();
        trace.epochs = parts.iter().flat_map(|part| part.epochs.clone()).collect();
        trace.zero.clear();
        let info = trace.info();
        let epochs: Vec<BTreeSet<u64>> = trace.epochs.iter().map(pages).collect();
        let all: usize = epochs.iter().map(BTreeSet::len).sum();
        prop_assert_eq!(info.epochs, epochs.len() as u64);
        prop_assert_eq!(info.page_writes, all as u64);
        prop_assert_eq!(info.runs, trace.epochs.iter().map(|epoch| epoch.written.len() as u64).sum::<u64>());

        let mut times = BTreeMap::new();
        for page in epochs.iter().flatten() {
            *times.entry(*page).or_insert(0_u64) += 1;
        }
        prop_assert_eq!(info.distinct_pages, times.len() as u64);
        prop_assert_eq!(info.distinct_pages, trace.distinct_pages());
        prop_assert_eq!(info.pages_written_once, times.values().filter(|&&count| count == 1).count() as u64);
        prop_assert!(close(info.rewritten_share, ratio(all - times.len(), all)));
        let next: usize = epochs.windows(2).map(|pair| pair[0].intersection(&pair[1]).count()).sum();
        let followed = all - epochs.last().unwrap().len();
        prop_assert!(close(info.rewritten_next_share, ratio(next, followed)));

        for size in &info.working_set {
            let window = size.window_epochs as usize;
            let sizes: Vec<usize> = epochs
                .windows(window)
                .map(|window| window.iter().flatten().collect::<BTreeSet<_>>().len())
                .collect();
            prop_assert_eq!(size.max_pages, *sizes.iter().max().unwrap() as u64);
            prop_assert!(close(size.mean_pages, ratio(sizes.iter().sum(), sizes.len())), "{:?} {:?}", size, sizes);
        }
        let windows: Vec<u64> = info.working_set.iter().map(|size| size.window_epochs).collect();
        let expected: Vec<u64> = [1, 10, 100, 1000].into_iter().filter(|&window| window <= info.epochs).collect();
        prop_assert_eq!(windows, expected);

        for owner in &info.owners {
            let of_owner = |epoch: &TraceEpoch| -> BTreeSet<u64> {
                let runs = epoch.written.iter().filter(|written| written.owner.0 == owner.owner);
                runs.flat_map(|written| written.run.first.0..written.run.end()).collect()
            };
            let per_epoch: Vec<BTreeSet<u64>> = trace.epochs.iter().map(of_owner).collect();
            prop_assert_eq!(owner.page_writes, per_epoch.iter().map(BTreeSet::len).sum::<usize>() as u64);
            prop_assert_eq!(owner.epochs, per_epoch.iter().filter(|pages| !pages.is_empty()).count() as u64);
            prop_assert_eq!(owner.distinct_pages, per_epoch.iter().flatten().collect::<BTreeSet<_>>().len() as u64);
        }
        prop_assert_eq!(info.owners.iter().map(|owner| owner.page_writes).sum::<u64>(), all as u64);
        prop_assert!(info.owners.windows(2).all(|pair| pair[0].page_writes >= pair[1].page_writes));
    }
}

#[test]
fn rates_are_per_second_and_percentiles_of_the_nearest_rank() {
    // 1 to 100 pages in epochs of 10 ms.
    let epoch = |count: u64| TraceEpoch {
        written: vec![WrittenRun { run: PageRun::new(0, count), owner: AddressSpaceId::WHOLE_GUEST }],
        accessed: Some(vec![PageRun::new(0, 2 * count)]),
    };
    let trace = Trace {
        name: "ramp".to_owned(),
        pages: 1000,
        epoch: Duration::from_millis(10),
        zero: vec![PageRun::new(900, 50)],
        epochs: (1..=100).map(epoch).collect(),
    };
    let info = trace.info();
    let rate = info.dirty_rate;
    assert_eq!(rate.min_pages_per_s, 100.0);
    assert_eq!(rate.p50_pages_per_s, 5000.0);
    assert_eq!(rate.p95_pages_per_s, 9500.0);
    assert_eq!(rate.p99_pages_per_s, 9900.0);
    assert_eq!(rate.max_pages_per_s, 10_000.0);
    assert!(close(rate.mean_pages_per_s, 5050.0));
    assert_eq!(info.accessed_pages_per_epoch, Some(101.0));
    assert_eq!(info.zero_pages, 50);
    assert_eq!((info.epoch_ms, info.duration_ms), (10.0, 1000.0));
    assert_eq!(info.pages_per_run, 50.5);
}

/// One run of all pages costs as much as a run of one page: nothing here counts pages one by one.
#[test]
fn the_largest_guest_written_whole_is_no_work() {
    let epoch = TraceEpoch {
        written: vec![WrittenRun { run: PageRun::new(0, 1 << 34), owner: AddressSpaceId(7) }],
        accessed: None,
    };
    let trace = Trace {
        name: "all".to_owned(),
        pages: 1 << 34,
        epoch: Duration::from_secs(1),
        zero: vec![],
        epochs: vec![epoch; 1000],
    };
    trace.check().unwrap();
    let info = trace.info();
    assert_eq!(info.page_writes, 1000 << 34);
    assert_eq!(info.distinct_pages, 1 << 34);
    assert_eq!(info.rewritten_next_share, 1.0);
    assert_eq!(info.working_set[3].max_pages, 1 << 34);
}
