//! Generated traces: sound, the same everywhere, and behaving as their names say.

use std::time::Duration;

use proptest::prelude::*;
use vmferry_core::pages::PageNumber;
use vmferry_sim::trace::generate::{GeneratorSpec, workloads};
use vmferry_sim::trace::{Trace, TraceEpoch};

fn generate(spec: &str, seed: u64) -> Trace {
    let trace = spec.parse::<GeneratorSpec>().unwrap().generate(seed).unwrap();
    trace.check().unwrap();
    trace
}

fn pages(epoch: &TraceEpoch) -> impl Iterator<Item = u64> {
    epoch.runs().flat_map(|run| run.first.0..run.end())
}

/// How often each page was written, over the epochs, the most written first.
fn epochs_per_page(trace: &Trace) -> Vec<(usize, u64)> {
    let mut counts = std::collections::BTreeMap::new();
    for page in trace.epochs.iter().flat_map(pages) {
        *counts.entry(page).or_insert(0) += 1;
    }
    let mut counts: Vec<(usize, u64)> = counts.into_iter().map(|(page, count)| (count, page)).collect();
    counts.sort_unstable_by(|left, right| right.cmp(left));
    counts
}

/// A short digest of a trace, for comparing with one from another machine.
fn digest(trace: &Trace) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |number: u64| digest = (digest ^ number).wrapping_mul(0x100_0000_01b3);
    for epoch in &trace.epochs {
        for written in &epoch.written {
            add(written.run.first.0);
            add(written.run.count);
            add(u64::from(written.owner.0));
        }
        for run in epoch.accessed.iter().flatten() {
            add(run.first.0);
            add(run.count);
        }
        add(u64::MAX);
    }
    digest
}

#[test]
fn each_workload_is_sound_and_depends_on_its_seed() {
    for help in workloads() {
        let spec = format!("{}:pages=4096,zero=96,duration=3s,rate=3333", help.name);
        let trace = generate(&spec, 1);
        assert_eq!(trace.pages, 4096);
        assert_eq!(trace.epochs.len(), 60);
        assert_eq!(trace.duration(), Duration::from_secs(3));
        assert!(trace.name.starts_with(help.name) && trace.name.ends_with(" seed=1"), "{}", trace.name);
        assert_eq!(trace.zero.iter().map(|run| run.count).sum::<u64>(), 96);
        assert_eq!(generate(&spec, 1), trace, "{}", help.name);
        // A sweep is the same for all seeds.
        assert_eq!(generate(&spec, 2).epochs == trace.epochs, help.name == "sweep", "{}", help.name);
    }
}

/// The digests were computed once, on x86-64 Linux; any other machine must come to the same.
#[test]
fn the_same_seed_gives_the_same_trace_everywhere() {
    let digests = [
        ("zipf:writers=3,cluster=4,exponent=1.1", 9_962_133_779_852_842_163),
        ("hotcold:hot_share=0.8", 9_939_892_774_496_356_177),
        ("phases:phase=1s", 17_605_711_777_338_586_677),
        ("sweep:stride=3", 13_464_187_202_412_940_505),
        ("chase:writers=2", 13_797_417_694_563_025_302),
        ("churn", 445_497_086_405_823_478),
        ("idle:period=1s", 3_772_428_185_407_696_006),
    ];
    let found = digests.map(|(spec, _)| {
        let separator = if spec.contains(':') { "," } else { ":" };
        (spec, digest(&generate(&format!("{spec}{separator}pages=8192,duration=4s,rate=5000"), 42)))
    });
    assert_eq!(found, digests);
}

#[test]
fn the_rate_is_that_of_single_writes() {
    // A sweep over more pages than it writes in an epoch writes each page once.
    let trace = generate("sweep:pages=65536,region=65536,rate=12345,epoch=7ms,duration=10s", 0);
    let writes = trace.page_writes() as f64;
    assert!((writes - 12_345.0 * trace.duration().as_secs_f64()).abs() < 1.0, "{writes}");
    let counts: Vec<u64> = trace.epochs.iter().map(TraceEpoch::written_pages).collect();
    assert!(counts.iter().all(|count| (86..=87).contains(count)), "{counts:?}");
}

#[test]
fn a_rate_below_one_write_in_an_epoch_leaves_epochs_empty() {
    let trace = generate("zipf:rate=7,epoch=10ms,duration=10s", 3);
    assert_eq!(trace.epochs.len(), 1000);
    assert_eq!(trace.page_writes(), 70);
}

#[test]
fn zipf_is_uneven_by_its_exponent() {
    for exponent in [0.0, 0.99, 1.3] {
        // One write in an epoch, so that none hides another.
        let trace = generate(&format!("zipf:pages=4096,rate=20000,epoch=50us,duration=5s,exponent={exponent}"), 5);
        let counts = epochs_per_page(&trace);
        let hottest: usize = counts.iter().take(41).map(|(count, _)| count).sum();
        let weights = |ranks: u32| (1..=ranks).map(|rank| f64::from(rank).powf(-exponent)).sum::<f64>();
        let (share, expected) = (hottest as f64 / 100_000.0, weights(41) / weights(4096));
        // The 41 pages written most are not quite the 41 likeliest ones where all are equally likely.
        let slack = if exponent == 0.0 { 0.007 } else { 0.005 };
        assert!((share - expected).abs() < slack, "exponent {exponent}: {share}, expected {expected}");
    }
}

#[test]
fn clusters_make_longer_runs() {
    let pages_per_run = |cluster: u64| {
        let spec = format!("hotcold:pages=65536,hot=4096,hot_share=1,rate=100000,duration=1s,cluster={cluster}");
        generate(&spec, 1).info().pages_per_run
    };
    assert!(pages_per_run(1) < 1.5, "{}", pages_per_run(1));
    assert!(pages_per_run(64) > 2.0 * pages_per_run(1), "{}", pages_per_run(64));
}

#[test]
fn hot_pages_get_their_share() {
    let trace = generate("hotcold:pages=8192,hot=100,hot_share=0.75,epoch=1ms,duration=10s,rate=10000", 8);
    let counts = epochs_per_page(&trace);
    let total: usize = counts.iter().map(|(count, _)| count).sum();
    let hot: usize = counts.iter().take(100).map(|(count, _)| count).sum();
    let share = hot as f64 / total as f64;
    assert!((0.72..0.78).contains(&share), "{share}");
    let all_hot = generate("hotcold:pages=8192,hot=100,hot_share=1,writers=3", 8);
    assert_eq!(all_hot.distinct_pages(), 99, "33 of each writer");
    assert_eq!(generate("hotcold:pages=800,hot=0,hot_share=1,rate=100000", 8).distinct_pages(), 800);
    assert_eq!(generate("hotcold:pages=800,hot=800,hot_share=0,rate=100000", 8).distinct_pages(), 800);
}

#[test]
fn phases_use_other_pages_and_come_back() {
    let trace = generate("phases:pages=8192,hot=500,phases=3,phase=2s,duration=8s,hot_share=1,rate=20000", 2);
    let written = |phase: usize| trace.slice(phase * 40..phase * 40 + 40).distinct_pages();
    assert_eq!([0, 1, 2, 3].map(written), [500; 4]);
    assert_eq!(trace.slice(0..80).distinct_pages(), 1000);
    assert_eq!(trace.slice(0..120).distinct_pages(), 1500);
    assert_eq!(trace.distinct_pages(), 1500);
    let both = |left: usize, right: usize| {
        let mut both = trace.slice(left * 40..left * 40 + 40);
        both.epochs.extend(trace.slice(right * 40..right * 40 + 40).epochs);
        both.distinct_pages()
    };
    assert_eq!(both(0, 3), 500, "the fourth phase is the first one again");
    assert_eq!(both(0, 1), 1000);
}

#[test]
fn a_sweep_writes_all_pages_in_order() {
    let trace = generate("sweep:pages=1000,region=250,rate=1000,epoch=10ms,duration=1s", 0);
    let order: Vec<u64> = trace.epochs.iter().flat_map(pages).collect();
    let expected: Vec<u64> = (0..250).cycle().take(1000).collect();
    assert_eq!(order, expected);
    let stride = generate("sweep:pages=1000,region=250,rate=1000,epoch=10ms,duration=1s,stride=7", 0);
    assert_eq!(pages(&stride.epochs[0]).take(3).collect::<Vec<_>>(), [0, 7, 14]);
    assert_eq!(stride.slice(0..25).distinct_pages(), 250, "one round of seven sweeps takes all pages in");
}

#[test]
fn a_chase_visits_each_node_once_a_round() {
    let trace = generate("chase:pages=1000,region=1000,write_share=0.5,rate=500,epoch=100ms,duration=1s", 4);
    let accessed: u64 =
        trace.epochs.iter().flat_map(|epoch| epoch.accessed.as_ref().unwrap()).map(|run| run.count).sum();
    let written = trace.page_writes();
    assert_eq!(written, 500);
    // 500 writes take 1000 visits on average, with a standard deviation of 32: about one round.
    assert!((840..=1160).contains(&accessed), "{accessed}");
    let first = trace.slice(0..8);
    let mut seen: Vec<PageNumber> =
        first.epochs.iter().flat_map(|epoch| epoch.accessed.as_ref().unwrap()).flat_map(|run| run.pages()).collect();
    let visits = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), visits, "no node is visited twice within a round");
}

#[test]
fn a_heap_is_reused() {
    let trace = generate("churn:pages=65536,region=16384,object=16,rate=20000,duration=20s", 6);
    let info = trace.info();
    // 400,000 pages written, on a heap of 16,384 of which half is free: what was freed last is taken first.
    assert!(info.distinct_pages > 4_000, "{info:?}");
    assert!(info.rewritten_share > 0.9, "{info:?}");
    assert!(info.pages_per_run > 1.5, "{info:?}");
    assert!(trace.epochs.iter().flat_map(pages).all(|page| page < 16_384));
}

#[test]
fn an_idle_guest_writes_little_and_now_and_then_more() {
    let trace = generate("idle:hot=50,burst=200,period=1s,log=600,duration=10s,rate=500", 1);
    let counts: Vec<u64> = trace.epochs.iter().map(TraceEpoch::written_pages).collect();
    let bursts: Vec<usize> =
        counts.iter().enumerate().filter(|&(_, &count)| count > 50).map(|(epoch, _)| epoch).collect();
    assert_eq!(bursts, (1..=10).map(|second| second * 20 - 1).collect::<Vec<_>>());
    assert_eq!(trace.distinct_pages(), 650);
}

#[test]
fn writers_have_parts_of_their_own() {
    for workload in ["zipf", "hotcold", "sweep", "chase", "churn"] {
        let trace = generate(&format!("{workload}:pages=65536,region=8192,writers=4,rate=40000,duration=5s"), 1);
        let info = trace.info();
        let mut owners: Vec<u32> = info.owners.iter().map(|owner| owner.owner).collect();
        owners.sort_unstable();
        assert_eq!(owners, [1, 2, 3, 4], "{workload}");
        for written in trace.epochs.iter().flat_map(|epoch| &epoch.written) {
            let (first, last) = (written.run.first.0, written.run.end() - 1);
            let part = u64::from(written.owner.0 - 1);
            assert!(first / 2048 == part && last / 2048 == part, "{workload}: {written:?}");
        }
    }
}

proptest! {
    #[test]
    fn any_specification_is_refused_or_generates_a_sound_trace(
        workload in prop::sample::select(workloads().iter().map(|help| help.name).collect::<Vec<_>>()),
        values in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![0..10_u64, 0..3000_u64]), 0..5),
        shares in prop::collection::vec(0.0..1.1_f64, 5),
        seed in any::<u64>(),
    ) {
        let help = workloads().into_iter().find(|help| help.name == workload).unwrap();
        // Few writes, so that many specifications can be tried.
        let mut parts = vec!["duration=1s".to_owned(), "rate=500".to_owned()];
        let mut given = vec!["duration", "rate"];
        for ((index, value), share) in values.into_iter().zip(shares) {
            let parameter = &help.parameters[index.index(help.parameters.len())];
            if given.contains(&parameter.name) {
                continue;
            }
            given.push(parameter.name);
            let value = if parameter.default.ends_with('s') {
                format!("{value}ms")
            } else if parameter.default.contains('.') {
                share.to_string()
            } else {
                value.to_string()
            };
            parts.push(format!("{}={value}", parameter.name));
        }
        let text = format!("{workload}:{}", parts.join(","));
        if let Ok(spec) = text.parse::<GeneratorSpec>() {
            prop_assert_eq!(spec.to_string().parse::<GeneratorSpec>(), Ok(spec.clone()));
            let trace = spec.generate(seed).unwrap();
            trace.check().unwrap();
            prop_assert!(workload == "idle" || trace.page_writes() <= 500);
        }
    }
}
