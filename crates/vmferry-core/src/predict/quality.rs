//! How well the predictors predict, on a few traces of known kinds.
//!
//! The measure is R-precision: of the pages written in the next epochs, R in number, the share that is among the R pages
//! ranked hottest. A guess without knowledge has R over all pages.

use super::testing::SplitMix;
use super::{Predictor, PredictorSpec};
use crate::pages::{AddressSpaceId, PageRun, PageSet};

const PAGES: u64 = 8192;
/// Predictions are asked for from this epoch on, in all of the next.
const LEARNING_EPOCHS: u64 = 60;
const EPOCHS: u64 = 120;
/// The epochs in which a page must be written for its prediction to be right.
const AHEAD: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Random writes to an eighth of the pages.
    Hot,
    /// Pages scattered over memory, written by Zipf's law.
    Zipf,
    /// A loop over a quarter of the pages, in 20 epochs.
    Sweep,
    /// Such a loop beside random writes by Zipf's law.
    SweepAndZipf,
    /// New pages all the time, never written again, beside random writes to an eighth.
    StreamAndHot,
    /// An eighth is hot for 20 epochs, then the next eighth.
    Shifting,
}

const KINDS: [Kind; 6] = [Kind::Hot, Kind::Zipf, Kind::Sweep, Kind::SweepAndZipf, Kind::StreamAndHot, Kind::Shifting];

impl Kind {
    /// The runs written in each epoch.
    fn trace(self) -> Vec<Vec<PageRun>> {
        let mut random = SplitMix(42);
        let mut sum = 0.0;
        let cumulative: Vec<f64> = (1..=PAGES)
            .map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            })
            .collect();
        (0..EPOCHS)
            .map(|epoch| {
                let mut written = PageSet::empty(PAGES);
                let mut write = |page: u64| written.insert_run(PageRun::new(page % PAGES, 1));
                let zipf = |random: &mut SplitMix| {
                    let target = random.below(1 << 32) as f64 / (1_u64 << 32) as f64 * sum;
                    let rank = cumulative.partition_point(|&below| below < target) as u64;
                    rank * 2_654_435_761 % PAGES
                };
                let sweep = PAGES / 4 / 20;
                match self {
                    Self::Hot => (0..200).for_each(|_| {
                        write(random.below(PAGES / 8));
                    }),
                    Self::Zipf => (0..300).for_each(|_| {
                        write(zipf(&mut random));
                    }),
                    Self::Sweep => (0..sweep).for_each(|page| {
                        write(epoch % 20 * sweep + page);
                    }),
                    Self::SweepAndZipf => (0..sweep).for_each(|page| {
                        write(epoch % 20 * sweep + page);
                        write(zipf(&mut random));
                        write(zipf(&mut random));
                    }),
                    Self::StreamAndHot => (0..50).for_each(|page| {
                        write(PAGES / 8 + epoch * 50 + page);
                        (0..4).for_each(|_| {
                            write(random.below(PAGES / 8));
                        });
                    }),
                    Self::Shifting => (0..200).for_each(|_| {
                        write(epoch / 20 * (PAGES / 8) + random.below(PAGES / 8));
                    }),
                }
                written.runs().collect()
            })
            .collect()
    }
}

/// The mean R-precision over all epochs asked about.
fn precision(predictor: &mut dyn Predictor, trace: &[Vec<PageRun>]) -> f64 {
    let (mut hits, mut asked) = (0, 0);
    for (epoch, written) in trace.iter().enumerate() {
        predictor.observe(AddressSpaceId::WHOLE_GUEST, written);
        predictor.end_epoch();
        if epoch < LEARNING_EPOCHS as usize || epoch + AHEAD >= trace.len() {
            continue;
        }
        let mut next = PageSet::empty(PAGES);
        trace[epoch + 1..][..AHEAD].iter().flatten().for_each(|&run| {
            next.insert_run(run);
        });
        let mut ranking = Vec::new();
        predictor.rank(next.len() as usize, &mut ranking);
        hits += ranking.iter().filter(|ranked| next.contains(ranked.page)).count();
        asked += next.len();
    }
    hits as f64 / asked as f64
}

fn precision_of(spec: &str, kind: Kind) -> f64 {
    let spec: PredictorSpec = spec.parse().expect("a predictor of ours");
    precision(&mut *spec.build(PAGES), &kind.trace())
}

/// The default combines gaps and counts because of this: nowhere worse than either, far better where writes come in loops.
#[test]
fn the_default_is_nowhere_worse_than_counts_or_recency() {
    for kind in KINDS {
        let of = |spec| precision_of(spec, kind);
        let default = of("lcbst");
        let others = ["lcbst:gaps=off", "flat", "lru", "gap"].map(|spec| (spec, of(spec)));
        for (spec, precision) in others {
            assert!(default > precision - 0.02, "{kind:?}: {default} by default, {precision} with {spec}");
        }
    }
}

#[test]
fn only_gaps_see_where_a_loop_goes_next() {
    assert!(precision_of("lcbst", Kind::Sweep) > 0.95);
    assert!(precision_of("gap", Kind::Sweep) > 0.95);
    for spec in ["lcbst:gaps=off", "flat", "lru"] {
        assert_eq!(precision_of(spec, Kind::Sweep), 0.0, "{spec} has it the wrong way round");
    }
}

/// A table for people: `cargo test -p vmferry-core quality -- --nocapture`.
#[test]
fn every_predictor_beats_a_guess_where_pages_are_hot() {
    print!("{:<16}", "R-precision");
    KINDS.iter().for_each(|kind| print!("{:>14}", format!("{kind:?}")));
    println!();
    for spec in PredictorSpec::ALL.iter().map(ToString::to_string).chain(["lcbst:gaps=off".to_owned()]) {
        print!("{spec:<16}");
        for kind in KINDS {
            let precision = precision_of(&spec, kind);
            print!("{precision:>14.3}");
            let guess = 0.1;
            assert!(spec == "none" || kind != Kind::Hot || precision > 2.0 * guess, "{spec}: {precision}");
        }
        println!();
    }
}
