//! What predictors cost: time for each page written, memory for each page known, time to visit all of them.
//!
//! `cargo bench -p vmferry-core --bench predict` takes some minutes and prints tables for 10^4 to 10^6 hot pages scattered
//! over a guest of 1 TiB; with `-- 10000000` only for so many, and with words like `lcbst` or `zipf` only what contains one.
//! Reported are the median and the least of the epochs measured, after as many epochs to settle. Under `cargo test` each
//! runs once, on few pages.

use std::hint::black_box;

use rustix::time::{ClockId, clock_gettime};
use vmferry_core::pages::{AddressSpaceId, PageRun};
use vmferry_core::predict::{Predictor, PredictorSpec};

/// A guest of 1 TiB.
const GUEST_PAGES: u64 = 1 << 28;
/// The epochs of a workload differ, and come again after so many. Pages of more than ten epochs of new ones are forgotten
/// by then.
const DIFFERENT_EPOCHS: usize = 8;
const DIFFERENT_EPOCHS_OF_NEW_PAGES: usize = 24;

struct Effort {
    sizes: Vec<usize>,
    settling_epochs: usize,
    measured_epochs: usize,
    guest_pages: u64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let sizes: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let words: Vec<&String> = words.into_iter().filter(|word| word.parse::<usize>().is_err()).collect();
    let mut effort = Effort {
        sizes: vec![10_000, 100_000, 1_000_000],
        settling_epochs: 32,
        measured_epochs: 16,
        guest_pages: GUEST_PAGES,
    };
    if !is_bench {
        effort = Effort { sizes: vec![500], settling_epochs: 1, measured_epochs: 1, guest_pages: 1 << 12 };
    }
    if !sizes.is_empty() {
        effort.sizes = sizes;
    }
    let wanted = |group: &[String], name: &str| {
        let of_group: Vec<_> =
            words.iter().filter(|word| group.iter().any(|other| other.contains(word.as_str()))).collect();
        of_group.is_empty() || of_group.iter().any(|word| name.contains(word.as_str()))
    };

    let predictors: Vec<String> = PredictorSpec::ALL
        .iter()
        .map(ToString::to_string)
        .chain(["lcbst:gaps=off".to_owned()])
        .filter(|name| name != "none")
        .collect();
    let workloads: Vec<String> = Workload::ALL.iter().map(|workload| workload.name().to_owned()).collect();
    for &pages in &effort.sizes {
        for workload in Workload::ALL.into_iter().filter(|workload| wanted(&workloads, workload.name())) {
            let epochs = workload.epochs(pages, effort.guest_pages);
            println!("\n{pages} hot pages, {}", workload.name());
            println!(
                "{:<16} {:>10} {:>8} {:>12} {:>10} {:>10} {:>10}",
                "", "ns/page", "least", "bytes/page", "pages", "visit ms", "heat ns"
            );
            for name in predictors.iter().filter(|name| wanted(&predictors, name)) {
                measure(name, &epochs, pages, workload, &effort);
            }
        }
    }
}

/// What is written in an epoch.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Workload {
    All,
    Tenth,
    TenthOf16,
    Zipf,
    Churn,
}

/// An epoch's pages by owner.
type Epoch = Vec<(AddressSpaceId, Vec<PageRun>)>;

impl Workload {
    const ALL: [Self; 5] = [Self::All, Self::Tenth, Self::TenthOf16, Self::Zipf, Self::Churn];

    fn name(self) -> &'static str {
        match self {
            Self::All => "all written in each epoch",
            Self::Tenth => "a random tenth in each epoch",
            Self::TenthOf16 => "a random tenth in each epoch, of 16 address spaces",
            Self::Zipf => "as many random writes as pages in each epoch, zipf 1.0",
            Self::Churn => "a tenth as many in each epoch, all of them new",
        }
    }

    /// The first epoch writes all pages.
    fn epochs(self, pages: usize, guest_pages: u64) -> Vec<Epoch> {
        let mut random = SplitMix(1);
        let hot = random.distinct(pages, guest_pages);
        let mut cumulative = Vec::new();
        if self == Self::Zipf {
            let mut sum = 0.0;
            cumulative.extend((1..=pages).map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            }));
        }
        let mut epochs = vec![hot.clone()];
        let different = if self == Self::Churn { DIFFERENT_EPOCHS_OF_NEW_PAGES } else { DIFFERENT_EPOCHS };
        for _ in 0..different {
            epochs.push(match self {
                Self::All => hot.clone(),
                Self::Tenth | Self::TenthOf16 => {
                    hot.iter().copied().filter(|_| random.next().is_multiple_of(10)).collect()
                }
                Self::Zipf => {
                    let sum = cumulative[pages - 1];
                    let mut written = vec![false; pages];
                    for _ in 0..pages {
                        let target = random.next() as f64 / u64::MAX as f64 * sum;
                        let rank = cumulative.partition_point(|&below| below < target).min(pages - 1);
                        // A permutation for any number of pages that is no multiple of this prime.
                        written[(rank as u64 * 2_654_435_761 % pages as u64) as usize] = true;
                    }
                    hot.iter().copied().zip(written).filter(|&(_, written)| written).map(|(page, _)| page).collect()
                }
                Self::Churn => random.distinct((pages / 10).max(1), guest_pages),
            });
        }
        let owners = if self == Self::TenthOf16 { 16 } else { 1 };
        let split = |pages: Vec<u64>| -> Epoch {
            (0..owners)
                .map(|owner| {
                    let own = pages
                        .iter()
                        .filter(|&&page| page.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60 == owner || owners == 1);
                    (AddressSpaceId(owner as u32), own.map(|&page| PageRun::new(page, 1)).collect())
                })
                .collect()
        };
        epochs.into_iter().map(split).collect()
    }
}

fn measure(name: &str, epochs: &[Epoch], pages: usize, workload: Workload, effort: &Effort) {
    let spec: PredictorSpec = name.parse().expect("a name of our own");
    let mut predictor = spec.build_with_capacity(effort.guest_pages, pages);
    let feed = |predictor: &mut dyn Predictor, epoch: &Epoch| {
        epoch.iter().for_each(|(owner, runs)| predictor.observe(*owner, runs));
        predictor.end_epoch();
    };
    feed(&mut *predictor, &epochs[0]);
    let mut rest = epochs[1..].iter().cycle();
    let mut times = Vec::new();
    for index in 0..effort.settling_epochs + effort.measured_epochs {
        let epoch = rest.next().expect("a cycle has no end");
        let written: usize = epoch.iter().map(|(_, runs)| runs.len()).sum();
        let start = now_ns();
        feed(&mut *predictor, epoch);
        if index >= effort.settling_epochs {
            times.push((now_ns() - start) / written.max(1) as f64);
        }
    }
    times.sort_by(f64::total_cmp);

    let mut visits = Vec::new();
    let mut known = Vec::new();
    for _ in 0..5 {
        known.clear();
        let start = now_ns();
        predictor.visit(&mut |ranked| known.push(ranked.page));
        visits.push((now_ns() - start) / 1e6);
    }
    visits.sort_by(f64::total_cmp);
    known.sort_unstable();
    known.truncate(20_000);
    let start = now_ns();
    black_box(known.iter().map(|&page| predictor.heat(page)).sum::<f64>());
    let heat_ns = (now_ns() - start) / known.len().max(1) as f64;

    let tracked = predictor.tracked_pages();
    assert!(tracked >= pages as u64 || name == "time-series" || workload == Workload::Churn, "{tracked} of {pages}");
    println!(
        "{name:<16} {:>10.1} {:>8.1} {:>12.1} {tracked:>10} {:>10.2} {heat_ns:>10.1}",
        times[times.len() / 2],
        times[0],
        predictor.memory_bytes() as f64 / tracked.max(1) as f64,
        visits[visits.len() / 2],
    );
}

/// The time that this thread has been on a processor: what else the machine does counts little.
fn now_ns() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014): a seed in, the same sequence on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// So many different numbers below the limit, in ascending order.
    fn distinct(&mut self, count: usize, limit: u64) -> Vec<u64> {
        let mut numbers: Vec<u64> = Vec::with_capacity(count);
        while numbers.len() < count {
            numbers.extend((numbers.len()..count).map(|_| self.next() % limit).collect::<Vec<_>>());
            numbers.sort_unstable();
            numbers.dedup();
        }
        numbers
    }
}
