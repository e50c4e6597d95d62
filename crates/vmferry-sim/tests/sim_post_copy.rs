//! Post-copy as a model: each page once, and faults that the guest pays for.

mod sim_support;

use std::time::Duration;

use sim_support::{hot, idle, sweep, trace};
use vmferry_core::pages::{PAGE_BYTES, PageRun};
use vmferry_sim::trace::Trace;
use vmferry_sim::{PostCopyConfig, PostCopyOutcome, Scenario, post_copy, simulate};

fn scenario() -> Scenario {
    Scenario { bandwidth_bytes_per_s: 40_000_000, ..Scenario::default() }
}

fn run(trace: &Trace, config: &PostCopyConfig) -> PostCopyOutcome {
    post_copy(trace, &scenario(), config).expect("a valid trace")
}

#[test]
fn an_idle_guest_is_moved_at_once_and_never_waits() {
    let guest = idle(20_000);
    let outcome = run(&guest, &PostCopyConfig::default());
    assert_eq!((outcome.demand_faults, outcome.waits, outcome.stalled_ms), (0, 0, 0.0));
    // 8.5 ms fixed, 7.5 ms for the device state, four messages of 0.1 ms, a few bytes.
    assert!((16.4..16.5).contains(&outcome.downtime_ms), "{outcome:?}");
    assert!(outcome.stopped_ms < outcome.downtime_ms);
    let once_ms = outcome.page_bytes as f64 / 40e6 * 1e3;
    let rest_ms = outcome.total_ms - once_ms;
    // Reading 5000 zero pages takes 5 ms; the greeting, the stop and the device state come before.
    assert!((10.0..25.0).contains(&rest_ms), "{rest_ms} ms beside the bytes of {once_ms} ms");
    assert_eq!(
        outcome.series.last().map(|sample| (sample.pending_pages, sample.sent_bytes)),
        Some((0, outcome.wire_bytes))
    );
}

#[test]
fn each_page_crosses_once_whatever_the_guest_does() {
    let raw = (12_000 - 12_000 / 8) * PAGE_BYTES;
    let quiet = run(&hot(12_000, 2_000, 0), &PostCopyConfig::default());
    let busy = run(&hot(12_000, 2_000, 500), &PostCopyConfig::default());
    for outcome in [&quiet, &busy] {
        assert!(outcome.page_bytes > raw && (outcome.page_bytes as f64) < raw as f64 * 1.01, "{outcome:?}");
    }
    assert!(busy.demand_faults > 50 && busy.stalled_ms > 0.0, "{busy:?}");
    assert!(busy.stall_max_ms <= busy.stalled_ms && busy.slowdown > 0.0 && busy.slowdown < 1.0);
    assert_eq!(quiet.demand_faults, 0);
}

/// No migration that is allowed to move the guest first does better than the optimum, and the optimum of those that move
/// memory first is no better either.
#[test]
fn nothing_beats_the_optimum_and_an_idle_guest_comes_close() {
    for (guest, close) in [(idle(20_000), true), (hot(12_000, 2_000, 500), false), (sweep(12_000, 100), false)] {
        let optimum = run(&guest, &PostCopyConfig::default()).optimum;
        let total_ratio = optimum.total_ratio.expect("within the limit");
        assert!(total_ratio >= 1.0 && optimum.downtime_ratio >= 1.0, "{optimum:?}");
        assert!(optimum.downtime_ratio < 1.01, "only three messages are no fixed part: {optimum:?}");
        assert!(!close || total_ratio < 1.03, "{optimum:?}");
        let pre_copy = simulate(&guest, &scenario()).unwrap().optimum;
        assert!(
            pre_copy.total_ms.is_none_or(|total_ms| Some(total_ms) >= optimum.total_ms),
            "{pre_copy:?} {optimum:?}"
        );
        assert!(pre_copy.downtime_ms.is_some_and(|downtime_ms| downtime_ms >= optimum.downtime_ms));
    }
    // 8.5 ms fixed, 7.5 ms for the device state.
    let tight = Scenario { downtime_limit: Duration::from_millis(15), ..scenario() };
    let optimum = post_copy(&idle(20_000), &tight, &PostCopyConfig::default()).unwrap().optimum;
    assert_eq!((optimum.total_ms, optimum.total_ratio), (None, None));
    assert!(optimum.downtime_ratio < 1.01);
}

#[test]
fn pushing_around_the_faults_spares_a_sweep_most_of_them() {
    let guest = sweep(12_000, 100);
    let bubbling = run(&guest, &PostCopyConfig::default());
    let in_order = run(&guest, &PostCopyConfig { pivots: 0, ..PostCopyConfig::default() });
    assert!(bubbling.demand_faults * 2 < in_order.demand_faults, "{bubbling:?}, in order {in_order:?}");
}

#[test]
fn a_longer_queue_and_a_longer_way_make_faults_dearer() {
    let guest = hot(12_000, 2_000, 500);
    let per_fault = |outcome: &PostCopyOutcome| outcome.stalled_ms / (outcome.demand_faults + outcome.waits) as f64;
    let near = run(&guest, &PostCopyConfig::default());
    // A page alone takes 0.1 ms, and 64 KiB in front of it 1.6 ms.
    assert!((0.3..2.0).contains(&per_fault(&near)), "{near:?}");
    let queued = run(&guest, &PostCopyConfig { queue_bytes: 1 << 20, ..PostCopyConfig::default() });
    assert!(per_fault(&queued) > 2.0 * per_fault(&near), "{queued:?}");
    let far = Scenario { latency: Duration::from_millis(5), ..scenario() };
    let far = post_copy(&guest, &far, &PostCopyConfig::default()).unwrap();
    assert!(per_fault(&far) > per_fault(&near), "{far:?}");
}

#[test]
fn recorded_reads_are_faults_too() {
    let mut guest = trace("reader", 10_000, vec![], vec![vec![]; 10]);
    let quiet = run(&guest, &PostCopyConfig::default());
    for epoch in &mut guest.epochs {
        epoch.accessed = Some(vec![PageRun::new(9_000, 500)]);
    }
    let reading = run(&guest, &PostCopyConfig::default());
    assert_eq!(quiet.demand_faults, 0);
    assert!(reading.demand_faults > 0, "{reading:?}");
}

#[test]
fn the_same_scenario_gives_the_same_outcome() {
    let guest = hot(8_000, 1_000, 200);
    assert_eq!(run(&guest, &PostCopyConfig::default()), run(&guest, &PostCopyConfig::default()));
}
