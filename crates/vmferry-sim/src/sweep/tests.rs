use super::*;
use crate::trace::generate::GeneratorSpec;

fn guest(spec: &str) -> Trace {
    let spec: GeneratorSpec = spec.parse().unwrap();
    spec.generate(3).unwrap()
}

fn kinds(names: &[&str]) -> Vec<ArmKind> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn sweep(traces: &[Trace]) -> Sweep<'_> {
    Sweep {
        traces,
        base: Scenario { time_limit: Duration::from_secs(10), horizon: Duration::from_secs(5), ..Scenario::default() },
        links: vec![Link::Load(0.3), Link::Bandwidth(50_000_000)],
        downtime_limits: vec![Duration::from_millis(50), Duration::from_millis(300)],
        arms: arms(&kinds(&["vmferry", "qemu", "post-copy"]), &[PredictorSpec::default()]),
        baseline: 1,
        seeds: 3,
        jobs: 1,
    }
}

fn run(sweep: &Sweep<'_>) -> SweepReport {
    sweep.run(&AtomicBool::new(false), &mut |_| {}).unwrap()
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let traces = [guest("hotcold:pages=2048,rate=3000,duration=2s,hot=300"), guest("sweep:pages=1024,duration=1s")];
    let one = run(&sweep(&traces));
    let four = run(&Sweep { jobs: 4, ..sweep(&traces) });
    assert_eq!(one, four);
    assert_eq!((one.planned_runs, one.done_runs, one.cells.len()), (72, 72, 8));
    let order: Vec<(usize, f64)> = one.cells.iter().map(|cell| (cell.trace, cell.downtime_limit_ms)).collect();
    assert_eq!(order[..4], [(0, 50.0), (0, 300.0), (0, 50.0), (0, 300.0)]);
    assert!(order[4..].iter().all(|cell| cell.0 == 1));
    for cell in &one.cells {
        assert_eq!(cell.arms.iter().map(|arm| &arm.arm).collect::<Vec<_>>(), ["vmferry", "qemu", "post-copy"]);
        for arm in &cell.arms {
            assert_eq!(arm.runs.iter().map(|run| run.seed).collect::<Vec<_>>(), [0, 1, 2]);
            assert!(!arm.series.is_empty() && arm.series.len() <= MAX_SAMPLES);
        }
        for run in cell.arms.iter().flat_map(|arm| &arm.runs).filter(|run| run.converged) {
            assert!(run.downtime_ratio.is_some_and(|ratio| ratio >= 1.0), "{run:?}");
            let is_short = run.within_limit == Some(true);
            assert!(!is_short || run.total_ratio.is_some_and(|ratio| ratio >= 1.0), "{run:?}");
        }
        // Fair: each seed begins at the same place in all arms, and not each at the same one.
        let starts = |arm: &ArmReport| arm.runs.iter().map(|run| run.start_ms).collect::<Vec<_>>();
        assert!(cell.arms.iter().all(|arm| starts(arm) == starts(&cell.arms[0])));
        assert_ne!(cell.arms[0].runs[0].start_ms, cell.arms[0].runs[1].start_ms);
    }
}

#[test]
fn a_run_of_a_sweep_is_the_same_migration_alone() {
    let traces = [guest("hotcold:pages=2048,rate=3000,duration=2s,hot=300")];
    let sweep = sweep(&traces);
    let report = run(&sweep);
    let cell = &report.cells[3];
    let expected = simulate(
        &traces[0],
        &Scenario {
            bandwidth_bytes_per_s: 50_000_000,
            downtime_limit: Duration::from_millis(300),
            start_offset: start_offset(&traces[0], 2),
            seed: 2,
            ..sweep.base.clone()
        },
    )
    .unwrap();
    let run = cell.arms[0].runs[2];
    assert_eq!((run.page_bytes, run.total_ms, run.downtime_ms), {
        (expected.page_bytes, expected.report.total_ms, expected.report.downtime_ms)
    });
}

#[test]
fn a_load_sets_the_bandwidth() {
    let traces = [guest("hotcold:pages=2048,rate=3000,duration=2s,hot=300")];
    let report = run(&Sweep { seeds: 1, ..sweep(&traces) });
    assert!((report.cells[0].load - 0.3).abs() < 1e-6);
    let expected = report.traces[0].dirty_bytes_per_s / 0.3;
    assert!((report.cells[0].bandwidth_bytes_per_s as f64 - expected).abs() <= 1.0);
    for load in [0.0, -1.0, f64::NAN] {
        let sweep = Sweep { links: vec![Link::Load(load)], ..sweep(&traces) };
        assert!(matches!(sweep.run(&AtomicBool::new(false), &mut |_| {}), Err(SweepError::Load { .. })), "{load}");
    }
}

#[test]
fn what_is_cancelled_keeps_whole_seeds_first() {
    let traces = [guest("hotcold:pages=1024,rate=1000,duration=1s,hot=100")];
    let cancel = AtomicBool::new(false);
    let sweep = sweep(&traces);
    let mut seen = Vec::new();
    let report = sweep
        .run(&cancel, &mut |progress| {
            seen.push(progress);
            cancel.store(progress.done == 15, Ordering::Relaxed);
        })
        .unwrap();
    assert_eq!(seen, (1..=15).map(|done| SweepProgress { done, total: 36 }).collect::<Vec<_>>());
    assert_eq!((report.done_runs, report.planned_runs), (15, 36));
    for (index, cell) in report.cells.iter().enumerate() {
        assert!(cell.arms.iter().all(|arm| arm.runs.len() == if index == 0 { 2 } else { 1 }), "{index}");
    }
}

#[test]
fn the_first_failure_is_told_whatever_the_number_of_threads() {
    let good = guest("hotcold:pages=1024,rate=1000,duration=1s,hot=100");
    let empty = Trace { epochs: vec![], name: "empty".to_owned(), ..good.clone() };
    let traces = [good, empty];
    for jobs in [1, 4] {
        let sweep = Sweep { links: vec![Link::Bandwidth(50_000_000)], jobs, ..sweep(&traces) };
        match sweep.run(&AtomicBool::new(false), &mut |_| {}) {
            Err(SweepError::Run { arm, trace, seed: 0, error: SimError::NoEpochs { .. } }) => {
                assert_eq!((arm.as_str(), trace.as_str()), ("vmferry", "empty"));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn differences_are_taken_in_pairs() {
    let run = |seed: usize, converged: bool, excess_pages: i64, total_ms: f64| RunReport {
        seed,
        start_ms: 0.0,
        converged,
        given_up_ms: None,
        within_limit: converged.then_some(true),
        page_bytes: 0,
        bytes_ratio: 1.0 + excess_pages as f64 / 100.0,
        excess_pages,
        total_ms,
        optimum_total_ms: None,
        total_ratio: None,
        downtime_ms: 10.0,
        downtime_ratio: None,
        slowdown: 0.0,
        held_pages: 0,
        precision: None,
        recall: None,
    };
    let ours = [run(0, true, 10, 100.0), run(1, true, 20, 205.0), run(2, true, 999, 9.0), run(3, false, 7, 7.0)];
    let theirs = [run(0, true, 40, 110.0), run(1, true, 80, 215.0), run(2, false, 1, 1.0), run(3, true, 7, 7.0)];
    let difference = difference(&ours, &theirs).unwrap();
    // Seeds 0 and 1: both 10 ms less, so that nothing is left to doubt, and a quarter of the excess.
    assert_eq!(difference.total_ms, Estimate { count: 2, mean: -10.0, half_width: Some(0.0) });
    assert_eq!(difference.excess_share, Some(0.25));
    assert!((difference.bytes_ratio.mean + 0.45).abs() < 1e-12);
    assert_eq!(super::difference(&ours[2..], &theirs[2..]), None);
}

#[test]
fn long_series_are_thinned_and_keep_their_ends() {
    let sample = |index: usize| Sample {
        at_ms: index as f64,
        pending_pages: 0,
        held_pages: 0,
        sent_bytes: 0,
        least_left_bytes: None,
    };
    for length in [0, 1, MAX_SAMPLES, MAX_SAMPLES + 1, 10 * MAX_SAMPLES] {
        let series: Vec<Sample> = (0..length).map(sample).collect();
        let thin = thinned(series.clone());
        assert_eq!(thin.len(), length.min(MAX_SAMPLES));
        assert_eq!((thin.first(), thin.last()), (series.first(), series.last()));
        assert!(thin.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms));
    }
}

#[test]
fn arms_are_named_by_what_is_not_usual() {
    let predictors = predictors("lcbst,lru,none,lcbst:half-life=8,gaps=off,lru").unwrap();
    let names: Vec<String> =
        arms(&kinds(&["vmferry", "qemu", "post-copy", "qemu"]), &predictors).iter().map(Arm::to_string).collect();
    let expected =
        ["vmferry", "vmferry/lru", "vmferry/none", "vmferry/lcbst:half-life=8,gaps=off", "qemu", "post-copy"];
    assert_eq!(names, expected);
    let unknown = "kvm".parse::<ArmKind>().unwrap_err().to_string();
    assert!(unknown.contains("`kvm`") && unknown.contains("post-copy") && unknown.contains("xen"), "{unknown}");
    assert!(super::predictors("lru,oracle").is_err());
}
