//! What the runs say: ratios cell by cell, medians over cells with intervals, and which bars were reached.

use lcbst_figures::spread::{Spread, quantile};
use vmferry_sim::random::SplitMix64;

use crate::grid::{Cell, OURS, QEMU, XEN};

/// The bars.
pub(crate) const EXCESS_MEDIAN_MAX: f64 = 0.4;
pub(crate) const EXCESS_MAX: f64 = 1.0;
pub(crate) const XEN_DATA_SAVED_MIN: f64 = 0.30;
pub(crate) const XEN_TIME_SAVED_MIN: f64 = 0.20;
pub(crate) const WITHIN_LIMIT_MIN: f64 = 0.95;
pub(crate) const HOPELESS_KNOWN_MS: f64 = 10_000.0;

/// Where QEMU's rule sends less than this share of the guest twice, there is next to nothing to save.
const LITTLE_EXCESS: f64 = 0.002;
/// Guests are drawn so often for the interval of a median.
const RESAMPLES: usize = 2000;
const RESAMPLE_SEED: u64 = 7;

/// One cell in which two arms ended on the target: ours and another's, over the seeds that they have in common.
#[derive(Debug, Clone)]
pub(crate) struct Pair<'a> {
    pub(crate) cell: &'a Cell,
    pub(crate) excess_pages: (f64, f64),
    pub(crate) page_bytes: (f64, f64),
    pub(crate) total_ms: (f64, f64),
    pub(crate) downtime_ms: (f64, f64),
}

impl Pair<'_> {
    /// Our excess over theirs; `None` where neither has any.
    pub(crate) fn excess_ratio(&self) -> Option<f64> {
        let (ours, theirs) = self.excess_pages;
        (ours > 0.0 || theirs > 0.0).then(|| ours / theirs)
    }

    /// Whether the other sends next to nothing twice.
    pub(crate) fn has_little_to_save(&self) -> bool {
        self.excess_pages.1 < LITTLE_EXCESS * self.cell.guest_pages as f64
    }

    pub(crate) fn time_ratio(&self) -> f64 {
        self.total_ms.0 / self.total_ms.1
    }

    pub(crate) fn data_ratio(&self) -> f64 {
        self.page_bytes.0 / self.page_bytes.1
    }
}

/// The cells in which `ours` and `other` both ended on the target at least once.
pub(crate) fn pairs<'a>(cells: &'a [Cell], ours: &str, other: &str) -> Vec<Pair<'a>> {
    let pair = |cell: &'a Cell| {
        Some(Pair {
            cell,
            excess_pages: cell.paired(ours, other, |run| run.excess_pages)?,
            page_bytes: cell.paired(ours, other, |run| run.page_bytes)?,
            total_ms: cell.paired(ours, other, |run| run.total_ms)?,
            downtime_ms: cell.paired(ours, other, |run| run.downtime_ms)?,
        })
    };
    cells.iter().filter_map(pair).collect()
}

/// A median or mean over cells, with its 95 % interval, and how many cells it is of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct OverCells {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) cells: usize,
}

/// `statistic` of the values, each with its guest. The interval is a percentile bootstrap that draws whole guests (Efron and
/// Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): cells of one guest are not independent.
pub(crate) fn over_cells(values: &[(usize, f64)], statistic: fn(&mut [f64]) -> f64) -> Option<OverCells> {
    if values.is_empty() {
        return None;
    }
    let mut guests: Vec<usize> = values.iter().map(|&(guest, _)| guest).collect();
    guests.sort_unstable();
    guests.dedup();
    let of_guest: Vec<Vec<f64>> = guests
        .iter()
        .map(|&guest| values.iter().filter(|(of, _)| *of == guest).map(|&(_, value)| value).collect())
        .collect();
    let mut random = SplitMix64::new(RESAMPLE_SEED);
    let mut resampled: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let mut drawn: Vec<f64> = Vec::with_capacity(values.len());
            for _ in 0..guests.len() {
                drawn.extend(&of_guest[random.below(guests.len() as u64) as usize]);
            }
            statistic(&mut drawn)
        })
        .collect();
    resampled.sort_by(f64::total_cmp);
    let mut all: Vec<f64> = values.iter().map(|&(_, value)| value).collect();
    Some(OverCells {
        value: statistic(&mut all),
        low: quantile(&resampled, 0.025),
        high: quantile(&resampled, 0.975),
        cells: values.len(),
    })
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(values, 0.5)
}

pub(crate) fn mean(values: &mut [f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The excess ratios of these pairs, each with its guest.
pub(crate) fn excess_ratios(pairs: &[Pair<'_>]) -> Vec<(usize, f64)> {
    pairs.iter().filter_map(|pair| Some((pair.cell.guest, pair.excess_ratio()?))).collect()
}

/// Medians and quartiles; `None` of nothing.
pub(crate) fn spread(values: Vec<f64>) -> Option<Spread> {
    (!values.is_empty()).then(|| Spread::of(values))
}

/// The whole verdict.
#[derive(Debug)]
pub(crate) struct Verdict<'a> {
    pub(crate) against_qemu: Vec<Pair<'a>>,
    pub(crate) against_xen: Vec<Pair<'a>>,
    /// Our excess over QEMU's rule's, the median over all cells, over recorded and over generated guests.
    pub(crate) excess: [Option<OverCells>; 3],
    /// Shares of data and of time less than with Xen's rule, on average, and what a sender that knows the future would save.
    pub(crate) xen_data_saved: Option<OverCells>,
    pub(crate) xen_data_possible: Option<OverCells>,
    pub(crate) xen_time_saved: Option<OverCells>,
    pub(crate) xen_time_possible: Option<OverCells>,
    /// Of all our runs that ended on the target, those within the limit.
    pub(crate) within_limit: (usize, usize),
    /// The same of QEMU's rule.
    pub(crate) qemu_within_limit: (usize, usize),
    /// Cells that no schedule can meet.
    pub(crate) hopeless: Vec<&'a Cell>,
}

impl<'a> Verdict<'a> {
    pub(crate) fn of(cells: &'a [Cell]) -> Self {
        let against_qemu = pairs(cells, OURS, QEMU);
        let against_xen = pairs(cells, OURS, XEN);
        let all = excess_ratios(&against_qemu);
        let kind = |recorded: bool| -> Vec<(usize, f64)> {
            let of_kind: Vec<Pair<'_>> =
                against_qemu.iter().filter(|pair| pair.cell.recorded == recorded).cloned().collect();
            excess_ratios(&of_kind)
        };
        let excess = [&all, &kind(true), &kind(false)].map(|values| over_cells(values, median));
        let saved = |ratio: fn(&Pair<'_>) -> Option<f64>| {
            let values: Vec<(usize, f64)> =
                against_xen.iter().filter_map(|pair| Some((pair.cell.guest, 1.0 - ratio(pair)?))).collect();
            over_cells(&values, mean)
        };
        let within = |arm: &str| {
            let runs = cells.iter().flat_map(|cell| &cell.arm(arm).runs).filter(|run| run.converged);
            let (mut kept, mut all) = (0, 0);
            for run in runs {
                all += 1;
                kept += usize::from(run.within_limit == Some(true));
            }
            (kept, all)
        };
        Self {
            excess,
            xen_data_saved: saved(|pair| Some(pair.data_ratio())),
            xen_data_possible: saved(|pair| Some(1.0 / pair.cell.arm(XEN).bytes_ratio.as_ref()?.mean)),
            xen_time_saved: saved(|pair| Some(pair.time_ratio())),
            xen_time_possible: saved(|pair| {
                // The shortest possible is that of a pause within the limit, which Xen's rule does not always keep.
                Some((1.0 / pair.cell.arm(XEN).total_ratio.as_ref()?.mean).min(1.0))
            }),
            within_limit: within(OURS),
            qemu_within_limit: within(QEMU),
            hopeless: cells.iter().filter(|cell| cell.feasible_share == 0.0).collect(),
            against_qemu,
            against_xen,
        }
    }

    /// Recorded cells in which we send more pages twice than QEMU's rule does; first those in which that is worth a word.
    pub(crate) fn worse_than_qemu(&self) -> Vec<&Pair<'a>> {
        let is_worse = |pair: &&Pair<'_>| pair.excess_ratio().is_some_and(|ratio| ratio > EXCESS_MAX);
        let mut worse: Vec<&Pair<'a>> = self.against_qemu.iter().filter(is_worse).collect();
        worse.sort_by_key(|pair| (pair.has_little_to_save(), !pair.cell.recorded));
        worse
    }

    /// Of the cells that no schedule can meet: those in which each of our runs gave up in time.
    pub(crate) fn hopeless_known(&self) -> usize {
        let known = |cell: &&&Cell| {
            let runs = &cell.arm(OURS).runs;
            runs.iter().all(|run| run.given_up_ms.is_some_and(|ms| ms <= HOPELESS_KNOWN_MS))
        };
        self.hopeless.iter().filter(known).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_equal_guests_is_a_point() {
        let values: Vec<(usize, f64)> = (0..5).flat_map(|guest| [(guest, 0.3), (guest, 0.5), (guest, 0.4)]).collect();
        let over = over_cells(&values, median).unwrap();
        assert_eq!((over.value, over.low, over.high, over.cells), (0.4, 0.4, 0.4, 15));
        assert_eq!(over_cells(&[], median), None);
    }

    #[test]
    fn the_interval_is_as_wide_as_guests_differ() {
        let values: Vec<(usize, f64)> = (0..8).map(|guest| (guest, guest as f64)).collect();
        let over = over_cells(&values, mean).unwrap();
        assert_eq!(over.value, 3.5);
        // The standard error of the mean of eight such numbers is 0.81.
        assert!((1.5..2.5).contains(&over.low) && (4.5..5.5).contains(&over.high), "{over:?}");
    }
}
