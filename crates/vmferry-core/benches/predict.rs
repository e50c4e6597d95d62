//! What predictors cost: time for each page written, memory for each page known, time to visit all of them.
//!
//! `cargo xtask bench predict` takes some minutes and prints a table for 10^4 to 10^6 hot pages scattered over a guest of
//! 1 TiB, and for 10^7 of the default predictor alone; with `-- 1000000` only for so many, and with words like `lru` or
//! `zipf` only what contains one. Reported are the median and the least of the epochs measured, after twice as many epochs
//! to settle. Under `cargo test` each runs once, on few pages.
//!
//! `--csv FILE` writes these columns, times in processor time:
//!
//! | column | meaning |
//! |---|---|
//! | `predictor` | its name |
//! | `workload` | what is written in each epoch: `all`, `tenth`, `tenth-of-16` address spaces, `zipf`, `churn` |
//! | `hot_pages` | how many pages the workload is about |
//! | `written_pages` | mean pages written in an epoch |
//! | `ns_per_page`, `ns_per_page_least` | median and least time of an epoch for each page written in it |
//! | `bytes_per_page` | what the predictor says it occupies, for each page known |
//! | `tracked_pages` | pages known |
//! | `visit_ms` | median time to visit all of them |
//! | `heat_ns` | time to ask for the heat of one, of 20,000 in ascending order |

use std::hint::black_box;

use vmferry_core::pages::{AddressSpaceId, PageRun};
use vmferry_core::predict::{Predictor, PredictorSpec};

use self::bench_support::{Arguments, Column, SplitMix, Table, Value, median_and_least, now_ns};

mod bench_support;

/// A guest of 1 TiB.
const GUEST_PAGES: u64 = 1 << 28;
/// With so many hot pages only the default predictor is measured, if no other is named.
const MOST_PAGES: usize = 10_000_000;
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
    let arguments = Arguments::read();
    let words = &arguments.words;
    let mut effort = Effort {
        sizes: vec![10_000, 100_000, 1_000_000, MOST_PAGES],
        settling_epochs: 32,
        measured_epochs: 16,
        guest_pages: GUEST_PAGES,
    };
    if !arguments.is_bench {
        effort = Effort { sizes: vec![500], settling_epochs: 1, measured_epochs: 1, guest_pages: 1 << 12 };
    }
    if !arguments.sizes.is_empty() {
        effort.sizes.clone_from(&arguments.sizes);
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
    let usual = PredictorSpec::default().to_string();
    let mut table = Table::new(COLUMNS);
    for &pages in &effort.sizes {
        for workload in Workload::ALL.into_iter().filter(|workload| wanted(&workloads, workload.name())) {
            let epochs = workload.epochs(pages, effort.guest_pages);
            println!("\n{pages} hot pages, {}", workload.about());
            table.print_headings();
            for name in predictors.iter().filter(|name| wanted(&predictors, name)) {
                // The others would take minutes each.
                if pages < MOST_PAGES || *name == usual || words.iter().any(|word| name.contains(word.as_str())) {
                    measure(name, &epochs, pages, workload, &effort, &mut table);
                }
            }
        }
    }
    table.write_csv(arguments.csv.as_deref());
}

const COLUMNS: &[Column] = &[
    Column { name: "predictor", heading: Some("") },
    Column { name: "workload", heading: None },
    Column { name: "hot_pages", heading: None },
    Column { name: "written_pages", heading: Some("written") },
    Column { name: "ns_per_page", heading: Some("ns/page") },
    Column { name: "ns_per_page_least", heading: Some("least") },
    Column { name: "bytes_per_page", heading: Some("bytes/page") },
    Column { name: "tracked_pages", heading: Some("pages") },
    Column { name: "visit_ms", heading: Some("visit ms") },
    Column { name: "heat_ns", heading: Some("heat ns") },
];

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

    /// Its name in CSV and on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Tenth => "tenth",
            Self::TenthOf16 => "tenth-of-16",
            Self::Zipf => "zipf",
            Self::Churn => "churn",
        }
    }

    fn about(self) -> &'static str {
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
        let different = match self {
            Self::All => 1,
            Self::Tenth | Self::TenthOf16 | Self::Zipf => DIFFERENT_EPOCHS,
            Self::Churn => DIFFERENT_EPOCHS_OF_NEW_PAGES,
        };
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

fn measure(name: &str, epochs: &[Epoch], pages: usize, workload: Workload, effort: &Effort, table: &mut Table) {
    let spec: PredictorSpec = name.parse().expect("a name of our own");
    let mut predictor = spec.build_with_capacity(effort.guest_pages, pages);
    let feed = |predictor: &mut dyn Predictor, epoch: &Epoch| {
        epoch.iter().for_each(|(owner, runs)| predictor.observe(*owner, runs));
        predictor.end_epoch();
    };
    feed(&mut *predictor, &epochs[0]);
    let mut rest = epochs[1..].iter().cycle();
    let written_in = |epoch: &Epoch| epoch.iter().map(|(_, runs)| runs.len()).sum::<usize>();
    let mut times = Vec::new();
    for index in 0..effort.settling_epochs + effort.measured_epochs {
        let epoch = rest.next().expect("a cycle has no end");
        let written = written_in(epoch);
        let start = now_ns();
        feed(&mut *predictor, epoch);
        if index >= effort.settling_epochs {
            times.push((now_ns() - start) / written.max(1) as f64);
        }
    }

    let mut visits = Vec::new();
    let mut known = Vec::new();
    for _ in 0..5 {
        known.clear();
        let start = now_ns();
        predictor.visit(&mut |ranked| known.push(ranked.page));
        visits.push((now_ns() - start) / 1e6);
    }
    known.sort_unstable();
    known.truncate(20_000);
    let start = now_ns();
    black_box(known.iter().map(|&page| predictor.heat(page)).sum::<f64>());
    let heat_ns = (now_ns() - start) / known.len().max(1) as f64;

    let tracked = predictor.tracked_pages();
    assert!(tracked >= pages as u64 || name == "time-series" || workload == Workload::Churn, "{tracked} of {pages}");
    let (ns_per_page, least) = median_and_least(times);
    let different = &epochs[1..];
    table.row(&[
        Value::Text(name.to_owned()),
        Value::Text(workload.name().to_owned()),
        Value::Count(pages as u64),
        Value::Count((different.iter().map(written_in).sum::<usize>() / different.len()) as u64),
        Value::Measured(ns_per_page, 1),
        Value::Measured(least, 1),
        Value::Measured(predictor.memory_bytes() as f64 / tracked.max(1) as f64, 1),
        Value::Count(tracked),
        Value::Measured(median_and_least(visits).0, 2),
        Value::Measured(heat_ns, 1),
    ]);
}
