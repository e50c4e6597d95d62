//! Simulated migrations: what must hold whatever the policy, and what is known in closed form.

mod sim_support;

use std::time::Duration;

use proptest::prelude::*;
use sim_support::{hot, idle, storm, sweep, trace};
use vmferry_core::engine::OutcomeKind;
use vmferry_core::pages::{PAGE_BYTES, PageRun};
use vmferry_core::plan::PolicySpec;
use vmferry_core::predict::PredictorSpec;
use vmferry_sim::trace::Trace;
use vmferry_sim::{Outcome, Scenario, SimError, StopCosts, simulate};

/// 40 MB/s, so that small guests take a while.
fn scenario() -> Scenario {
    Scenario { bandwidth_bytes_per_s: 40_000_000, ..Scenario::default() }
}

fn plain() -> Scenario {
    Scenario { policy: PolicySpec::Qemu, predictor: PredictorSpec::None, ..scenario() }
}

fn run(trace: &Trace, scenario: &Scenario) -> Outcome {
    simulate(trace, scenario).unwrap_or_else(|error| panic!("{}, {scenario:?}: {error}", trace.name))
}

/// What holds for every outcome.
fn check(trace: &Trace, scenario: &Scenario, outcome: &Outcome) {
    let report = &outcome.report;
    let wire = &report.wire;
    assert_eq!(report.wire_bytes, wire.push_bytes + wire.stop_bytes);
    let kinds = wire.raw_bytes + wire.zero_bytes + wire.device_state_bytes + wire.control_bytes;
    assert_eq!(report.wire_bytes, kinds);
    assert_eq!(outcome.page_bytes, wire.raw_bytes + wire.zero_bytes);
    let last = outcome.series.last().expect("a sample at the end");
    assert_eq!(last.sent_bytes, report.wire_bytes, "every byte went over the link");
    assert!(outcome.series.is_sorted_by(|a, b| a.at_ms <= b.at_ms && a.sent_bytes <= b.sent_bytes));
    for sample in &outcome.series {
        assert!(sample.held_pages <= sample.pending_pages, "{sample:?}: what is held back was not sent");
        assert!(sample.held_pages == 0 || scenario.policy == PolicySpec::Vmferry, "{sample:?}");
    }
    let on_link_ms = report.wire_bytes as f64 / scenario.bandwidth_bytes_per_s as f64 * 1e3;
    // What was given to the socket before a migration ended without a hand-over need not have left it.
    let buffered_ms = scenario.socket_buffer_bytes as f64 / scenario.bandwidth_bytes_per_s as f64 * 1e3;
    assert!(on_link_ms <= report.total_ms + if outcome.converged { 0.0 } else { buffered_ms });
    assert!(outcome.guest.write_faults <= outcome.guest.writes);
    if !outcome.converged {
        return;
    }
    assert_eq!(report.outcome, OutcomeKind::Completed);
    assert_eq!(report.pages.sent + report.pages.zero - report.pages.resent, trace.pages, "each page once, and resends");
    assert_eq!((last.pending_pages, last.held_pages), (0, 0));
    assert!(
        outcome.series.iter().any(|sample| sample.held_pages == report.working_set.pages),
        "there is a sample at the scan of the pause"
    );
    assert!(report.wire.raw_bytes >= report.pages.sent * PAGE_BYTES);
    let least = &outcome.optimum;
    assert!(least.bytes_ratio >= 1.0 && least.excess_bytes >= 0, "{least:?}");
    assert_eq!(least.excess_pages, report.pages.resent as i64);
    assert!(least.downtime_ratio.is_some_and(|ratio| ratio >= 1.0), "{least:?}, downtime {}", report.downtime_ms);
    assert!(outcome.guest.stopped_ms < report.downtime_ms, "the source learns of it later");
    if outcome.within_limit == Some(true) {
        // Who keeps within the limit cannot be earlier than the earliest.
        assert!(least.total_ratio.is_some_and(|ratio| ratio >= 1.0), "{least:?}, total {}", report.total_ms);
    }
}

#[test]
fn an_idle_guest_takes_what_its_bytes_take() {
    let guest = idle(20_000);
    for scenario in [scenario(), plain()] {
        let outcome = run(&guest, &scenario);
        check(&guest, &scenario, &outcome);
        assert!(outcome.converged);
        let report = &outcome.report;
        assert_eq!((report.pages.sent, report.pages.zero, report.pages.resent), (15_001, 5_000, 1), "{report:?}");
        assert_eq!(outcome.guest.writes, 0);
        // Frames are cut at chunks and not only at 256 pages.
        assert!(outcome.optimum.bytes_ratio < 1.001, "{:?}", outcome.optimum);
        let push_ms = outcome.page_bytes as f64 / 40e6 * 1e3;
        let observed_ms = report.phases.observe_ms;
        let rest_ms = report.total_ms - observed_ms - push_ms;
        // Reading 5000 zero pages leaves the link idle for 5 ms, and fixed costs are about 16 ms here.
        assert!((0.0..150.0).contains(&rest_ms), "{rest_ms} ms beside observation and bytes: {report:?}");
        assert!(outcome.optimum.pause_ms.is_some_and(|pause_ms| pause_ms < report.total_ms));
    }
}

/// But for the time until the next scan, which can be an epoch away.
#[test]
fn more_bandwidth_never_makes_an_idle_guest_slower() {
    let guest = idle(10_000);
    let rates = [5, 10, 20, 40, 80, 160, 320, 640, 1280];
    for base in [scenario(), plain()] {
        let totals: Vec<f64> = rates
            .iter()
            .map(|rate| {
                run(&guest, &Scenario { bandwidth_bytes_per_s: rate * 1_000_000, ..base.clone() }).report.total_ms
            })
            .collect();
        assert!(totals.is_sorted_by(|slower, faster| *faster <= slower + 50.0), "{totals:?}");
        assert!(totals[0] > 4.0 * totals[4], "{totals:?}");
    }
}

#[test]
fn the_same_scenario_gives_the_same_outcome_and_another_seed_another() {
    let guest = hot(12_000, 2_000, 300);
    let first = run(&guest, &scenario());
    assert_eq!(first, run(&guest, &scenario()));
    let other = run(&guest, &Scenario { seed: 1, ..scenario() });
    assert_ne!(first.report, other.report);
    let later = run(&guest, &Scenario { start_offset: Duration::from_millis(777), ..scenario() });
    assert_ne!(first.report, later.report);
    let lap = guest.epoch * guest.epochs.len() as u32;
    assert_eq!(first.report, run(&guest, &Scenario { start_offset: lap, ..scenario() }).report);
}

#[test]
fn a_storm_does_not_converge_and_no_schedule_could() {
    let guest = storm(20_000);
    let outcome = run(&guest, &scenario());
    check(&guest, &scenario(), &outcome);
    assert!(!outcome.converged);
    assert_eq!(outcome.report.outcome, OutcomeKind::NotConverged);
    assert_eq!(outcome.given_up_ms, Some(outcome.report.total_ms));
    assert_eq!((outcome.optimum.pause_ms, outcome.optimum.total_ms), (None, None));
    assert_eq!(outcome.optimum.downtime_ratio, None);
    assert_eq!(outcome.within_limit, None);
}

#[test]
fn a_limit_below_the_fixed_costs_is_met_by_nobody() {
    let guest = idle(5_000);
    let tight = Scenario { downtime_limit: Duration::from_millis(5), ..scenario() };
    assert_eq!(run(&guest, &tight).optimum.pause_ms, None);
    let enough = Scenario { downtime_limit: Duration::from_millis(40), ..scenario() };
    assert!(run(&guest, &enough).optimum.pause_ms.is_some());
}

#[test]
fn a_migration_that_takes_too_long_is_cancelled() {
    let guest = idle(20_000);
    let short = Scenario { time_limit: Duration::from_millis(500), ..scenario() };
    let outcome = run(&guest, &short);
    check(&guest, &short, &outcome);
    assert_eq!(outcome.report.outcome, OutcomeKind::Cancelled);
    assert!((500.0..520.0).contains(&outcome.report.total_ms));
    assert_eq!(outcome.given_up_ms, None);
}

#[test]
fn holding_the_hot_set_back_sends_less_than_plain_pre_copy() {
    // 16 MB of 100 are rewritten at about half of the link's rate.
    let guest = hot(24_000, 4_000, 250);
    let ours = run(&guest, &scenario());
    let theirs = run(&guest, &plain());
    check(&guest, &scenario(), &ours);
    check(&guest, &plain(), &theirs);
    assert!(ours.converged && theirs.converged);
    assert!(ours.optimum.excess_bytes < theirs.optimum.excess_bytes, "{:?}, plain {:?}", ours.optimum, theirs.optimum);
    let set = &ours.report.working_set;
    assert!(set.precision.is_some_and(|precision| precision > 0.5), "{set:?}");
}

/// The first fault of a page after each arming is paid for, and pages left out of scans pay less.
#[test]
fn tracking_costs_the_guest_its_faults() {
    let guest = hot(12_000, 500, 4_000);
    let outcome = run(&guest, &scenario());
    let cost = outcome.guest;
    assert!(cost.writes > 0 && cost.write_faults > 0);
    // All 500 hot pages are written in nearly every epoch. Once the tracking knows them, they pay in two of eight.
    assert!(cost.write_faults * 3 < cost.writes * 2, "{cost:?}");
    assert!((cost.fault_ms - cost.write_faults as f64 / 1e3).abs() < 1e-9);
    let free = Scenario { tracking: vmferry_sim::TrackingCosts { fault_ns: 0.0, ..scenario().tracking }, ..scenario() };
    assert_eq!(run(&guest, &free).guest.slowdown, 0.0);
    assert_eq!(run(&guest, &free).report, outcome.report, "the replay does not slow down");
}

#[test]
fn a_long_way_and_slow_hosts_take_longer() {
    let guest = hot(6_000, 300, 50);
    let near = run(&guest, &scenario());
    let far = Scenario { latency: Duration::from_millis(40), ..scenario() };
    let outcome = run(&guest, &far);
    check(&guest, &far, &outcome);
    assert!(outcome.report.downtime_ms > near.report.downtime_ms.min(160.0), "four messages of 40 ms each");
    assert!(outcome.report.total_ms > near.report.total_ms);
    let slow = Scenario {
        host: vmferry_sim::HostCosts { read_page_ns: 100_000.0, ..scenario().host },
        stop: StopCosts { load: Duration::from_millis(100), ..scenario().stop },
        ..scenario()
    };
    let outcome = run(&guest, &slow);
    check(&guest, &slow, &outcome);
    assert!(outcome.report.total_ms > near.report.total_ms);
    assert!(outcome.report.downtime.load_ms >= 100.0);
}

#[test]
fn a_full_socket_makes_the_source_wait() {
    let guest = idle(5_000);
    let scenario = Scenario { bandwidth_bytes_per_s: 10_000_000, socket_buffer_bytes: 4096, ..scenario() };
    let outcome = run(&guest, &scenario);
    check(&guest, &scenario, &outcome);
    let mut sent = outcome.series.iter().map(|sample| (sample.at_ms, sample.sent_bytes as f64));
    assert!(sent.all(|(at_ms, bytes)| bytes <= at_ms * 10e3 + 4096.0), "{:?}", outcome.series);
}

#[test]
fn what_cannot_be_simulated_is_said() {
    let guest = idle(100);
    let simulated = |scenario: &Scenario| simulate(&guest, scenario).map(|_| ());
    assert_eq!(simulated(&Scenario { bandwidth_bytes_per_s: 0, ..scenario() }), Err(SimError::NoBandwidth));
    assert_eq!(simulated(&Scenario { epoch: Duration::ZERO, ..scenario() }), Err(SimError::NoEpoch));
    let empty = trace("empty", 100, vec![], vec![]);
    assert!(simulate(&empty, &scenario()).is_err());
}

#[test]
fn the_optimum_gets_better_with_bandwidth_and_budget() {
    let guest = sweep(12_000, 200);
    let pause = |rate: u64, limit_ms: u64| {
        let scenario = Scenario {
            bandwidth_bytes_per_s: rate * 1_000_000,
            downtime_limit: Duration::from_millis(limit_ms),
            ..plain()
        };
        run(&guest, &scenario).optimum.pause_ms.unwrap_or(f64::INFINITY)
    };
    let by_rate: Vec<f64> = [10, 20, 40, 80].iter().map(|&rate| pause(rate, 300)).collect();
    assert!(by_rate.is_sorted_by(|slow, fast| fast <= slow) && by_rate[3].is_finite(), "{by_rate:?}");
    let by_limit: Vec<f64> = [30, 100, 300, 1000].iter().map(|&limit| pause(40, limit)).collect();
    assert!(by_limit.is_sorted_by(|short, long| long <= short) && by_limit[3].is_finite(), "{by_limit:?}");
}

fn any_guest() -> impl Strategy<Value = Trace> {
    let run = (0..2_000_u64, 1..300_u64);
    let epochs = prop::collection::vec(prop::collection::vec(run, 0..4), 1..12);
    (epochs, 0..1_500_u64).prop_map(|(epochs, zero_from)| {
        let cut = |(first, count): (u64, u64)| PageRun::new(first, count.min(2_000 - first));
        let epochs: Vec<Vec<PageRun>> = epochs.into_iter().map(|runs| runs.into_iter().map(cut).collect()).collect();
        trace("any", 2_000, vec![PageRun::new(zero_from, 200)], epochs)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever the guest does and whoever decides: no write is lost, no bound is beaten, and the books balance. Pages
    /// that are zero at first are written here too.
    #[test]
    fn every_policy_keeps_the_promises(
        guest in any_guest(),
        policy in prop::sample::select(&PolicySpec::ALL[..]),
        predictor in prop::sample::select(&PredictorSpec::ALL[..]),
        rate in 2_000_000..200_000_000_u64,
        limit_ms in 10..400_u64,
        latency_us in 0..5_000_u64,
        seed in any::<u64>(),
        offset_ms in 0..1_000_u64,
    ) {
        let scenario = Scenario {
            bandwidth_bytes_per_s: rate,
            downtime_limit: Duration::from_millis(limit_ms),
            latency: Duration::from_micros(latency_us),
            policy,
            predictor,
            seed,
            start_offset: Duration::from_millis(offset_ms),
            time_limit: Duration::from_secs(10),
            ..Scenario::default()
        };
        let outcome = run(&guest, &scenario);
        check(&guest, &scenario, &outcome);
        prop_assert_eq!(outcome.report.policy, policy.name());
    }
}
