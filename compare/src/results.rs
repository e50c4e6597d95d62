//! What runs say together: medians and ranges, and vmferry beside the best that QEMU did.

use lcbst_figures::spread::Spread;
use lcbst_figures::table::{Column, Table, cell};

use crate::guests::{GUESTS, Guest};
use crate::mode::Mode;
use crate::moving::Outcome;
use crate::network::Link;
use crate::run::Run;

/// What is compared. Less is better in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    Time,
    Wire,
    Gap,
    Processor,
}

impl Measure {
    pub(crate) const ALL: [Self; 4] = [Self::Time, Self::Wire, Self::Gap, Self::Processor];

    /// Its name in tables, with the unit of its values.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Time => "total time, s",
            Self::Wire => "on the wire, MB",
            Self::Gap => "gap, ms",
            Self::Processor => "processor, s/GiB",
        }
    }

    /// Digits behind the point that a table shows.
    pub(crate) const fn decimals(self) -> usize {
        match self {
            Self::Time | Self::Processor => 2,
            Self::Wire | Self::Gap => 0,
        }
    }

    fn of(self, run: &Run) -> Option<f64> {
        let figures = &run.figures;
        match self {
            Self::Time => figures.total_ms.map(|time_ms| time_ms / 1e3),
            Self::Wire => figures.wire_bytes.map(|bytes| bytes / 1e6),
            Self::Gap => figures.gap_ms,
            Self::Processor => figures.processor_ms_per_gib.map(|time_ms| time_ms / 1e3),
        }
    }
}

/// All runs of one guest on one link, with one QEMU.
#[derive(Debug)]
pub(crate) struct Cell<'a> {
    pub(crate) qemu: &'a str,
    pub(crate) guest: &'static Guest,
    pub(crate) link: Link,
    pub(crate) modes: Vec<Summary<'a>>,
}

/// The runs of one mode.
#[derive(Debug)]
pub(crate) struct Summary<'a> {
    pub(crate) mode: Mode,
    pub(crate) runs: Vec<&'a Run>,
}

/// vmferry's median beside QEMU's best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rivalry {
    pub(crate) ours: f64,
    pub(crate) best: f64,
    pub(crate) mode: Mode,
}

impl Rivalry {
    /// Below 1 vmferry is ahead.
    pub(crate) fn ratio(&self) -> f64 {
        self.ours / self.best
    }
}

impl Summary<'_> {
    /// How many runs came to the end that was wanted.
    pub(crate) fn completed(&self) -> usize {
        self.completed_runs().count()
    }

    /// How many of these kept the downtime limit.
    pub(crate) fn kept(&self) -> usize {
        self.completed_runs().filter(|run| run.keeps_limit()).count()
    }

    /// Whether the mode does what was asked: every run completed, and most of them kept the downtime limit.
    pub(crate) fn qualifies(&self) -> bool {
        !self.runs.is_empty() && self.completed() == self.runs.len() && 2 * self.kept() > self.runs.len()
    }

    /// The runs that completed, measured so; `None` if there are none.
    pub(crate) fn spread(&self, measure: Measure) -> Option<Spread> {
        spread(self.completed_runs().filter_map(|run| measure.of(run)))
    }

    /// The pause that the mode reports of itself.
    pub(crate) fn reported_ms(&self) -> Option<Spread> {
        spread(self.completed_runs().filter_map(|run| run.figures.reported_ms))
    }

    /// The guest's slow-down, also where the guest did not get to the target.
    pub(crate) fn slow_down_percent(&self) -> Option<Spread> {
        spread(self.runs.iter().filter_map(|run| run.figures.slow_down_percent))
    }

    /// What was sent in vain by runs that were given up.
    pub(crate) fn wire_in_vain_mb(&self) -> Option<Spread> {
        let in_vain = self.runs.iter().filter(|run| run.outcome == Outcome::NotConverged);
        spread(in_vain.filter_map(|run| Measure::Wire.of(run)))
    }

    fn completed_runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().copied().filter(|run| run.outcome == Outcome::Completed)
    }
}

impl Cell<'_> {
    /// The runs of a mode, if it was compared.
    pub(crate) fn mode(&self, mode: Mode) -> Option<&Summary<'_>> {
        self.modes.iter().find(|summary| summary.mode == mode)
    }

    /// QEMU's best mode by a measure, of those that do what was asked.
    pub(crate) fn best(&self, measure: Measure) -> Option<(Mode, f64)> {
        self.modes
            .iter()
            .filter(|summary| summary.mode != Mode::Vmferry && summary.qualifies())
            .filter_map(|summary| Some((summary.mode, summary.spread(measure)?.median)))
            .min_by(|one, other| one.1.total_cmp(&other.1))
    }

    /// vmferry beside that; `None` if either does not do what was asked.
    pub(crate) fn rivalry(&self, measure: Measure) -> Option<Rivalry> {
        let ours = self.mode(Mode::Vmferry).filter(|summary| summary.qualifies())?.spread(measure)?.median;
        let (mode, best) = self.best(measure)?;
        Some(Rivalry { ours, best, mode })
    }
}

/// The runs by guest and link, in the order in which these are named.
pub(crate) fn cells(runs: &[Run]) -> Vec<Cell<'_>> {
    let mut versions: Vec<&str> = runs.iter().map(|run| run.place.qemu.as_str()).collect();
    versions.sort_unstable();
    versions.dedup();
    let mut cells = Vec::new();
    for qemu in versions {
        for link in Link::ALL {
            for guest in GUESTS {
                let in_mode = |mode| {
                    let is_here = |run: &&Run| {
                        let place = &run.place;
                        place.qemu == qemu && place.link == link && place.guest == guest && place.mode == mode
                    };
                    Summary { mode, runs: runs.iter().filter(is_here).collect() }
                };
                let modes: Vec<Summary<'_>> =
                    Mode::ALL.into_iter().map(in_mode).filter(|summary| !summary.runs.is_empty()).collect();
                if !modes.is_empty() {
                    cells.push(Cell { qemu, guest, link, modes });
                }
            }
        }
    }
    cells
}

/// Medians and ranges as a table for a file.
pub(crate) fn table(cells: &[Cell<'_>]) -> Table {
    const COLUMNS: &[Column] = &[
        ("qemu", "version of QEMU on both sides"),
        ("guest", "what the guest does"),
        ("link", "what connects the hosts"),
        ("mode", "who moved the guest and how"),
        ("measure", "what was measured"),
        ("runs", "how often the guest was moved"),
        ("completed", "runs that completed; the figures are of these"),
        ("kept", "runs of these that kept the downtime limit"),
        ("minimum", "the least"),
        ("median", "half is below"),
        ("maximum", "the greatest"),
    ];
    let mut table = Table::new("Moves of guests by vmferry and by QEMU's own migration: medians and ranges.", COLUMNS);
    for at in cells {
        for summary in &at.modes {
            for measure in Measure::ALL {
                let spread = summary.spread(measure);
                let of = |part: fn(&Spread) -> f64| spread.as_ref().map_or(String::new(), |spread| cell(part(spread)));
                table.push(vec![
                    at.qemu.to_owned(),
                    at.guest.name.to_owned(),
                    at.link.name().to_owned(),
                    summary.mode.name().to_owned(),
                    measure.name().replace(',', " in"),
                    summary.runs.len().to_string(),
                    summary.completed().to_string(),
                    summary.kept().to_string(),
                    of(|spread| spread.minimum),
                    of(|spread| spread.median),
                    of(|spread| spread.maximum),
                ]);
            }
        }
    }
    table
}

fn spread(samples: impl Iterator<Item = f64>) -> Option<Spread> {
    let samples: Vec<f64> = samples.collect();
    (!samples.is_empty()).then(|| Spread::of(samples))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::run;

    #[test]
    fn the_best_mode_is_one_that_does_what_was_asked() {
        let mut runs = vec![
            run(Mode::Vmferry, 1, 4000.0, 200.0),
            run(Mode::Vmferry, 2, 4400.0, 220.0),
            run(Mode::Vmferry, 3, 4200.0, 210.0),
            run(Mode::Precopy, 1, 5000.0, 100.0),
            // The fastest, with a pause that was not allowed.
            run(Mode::MultifdZstd, 1, 2000.0, 900.0),
            // Fast as well, but not always.
            run(Mode::Multifd, 1, 3000.0, 100.0),
            run(Mode::Multifd, 2, 3000.0, 100.0),
            run(Mode::Postcopy, 1, 6000.0, 40.0),
        ];
        runs[6].outcome = Outcome::NotConverged;
        let cells = cells(&runs);
        assert_eq!(cells.len(), 1);
        assert_eq!(cells[0].best(Measure::Time), Some((Mode::Precopy, 5.0)));
        assert_eq!(cells[0].best(Measure::Gap), Some((Mode::Postcopy, 40.0)));
        let rivalry = cells[0].rivalry(Measure::Time).unwrap();
        assert_eq!((rivalry.ours, rivalry.mode), (4.2, Mode::Precopy));
        assert!((rivalry.ratio() - 0.84).abs() < 1e-9);
        let multifd = cells[0].mode(Mode::Multifd).unwrap();
        assert_eq!((multifd.runs.len(), multifd.completed(), multifd.kept()), (2, 1, 1));
        assert_eq!(multifd.wire_in_vain_mb().unwrap().median, 300.0);
    }

    #[test]
    fn without_a_rival_there_is_no_ratio() {
        let mut runs = vec![run(Mode::Vmferry, 1, 4000.0, 200.0), run(Mode::Precopy, 1, 30_000.0, 100.0)];
        runs[1].outcome = Outcome::NotConverged;
        assert_eq!(cells(&runs)[0].rivalry(Measure::Time), None);
        assert_eq!(cells(&runs)[0].best(Measure::Time), None);
        assert!(cells(&[]).is_empty());
    }

    #[test]
    fn the_table_has_medians_and_ranges() {
        let runs: Vec<Run> = [4000.0, 5000.0, 9000.0]
            .iter()
            .zip(1..)
            .map(|(&total_ms, number)| run(Mode::Xbzrle, number, total_ms, 50.0))
            .collect();
        let table = table(&cells(&runs));
        let row = table.rows().next().unwrap();
        assert_eq!(row.text("measure").unwrap(), "total time in s");
        let numbers = ["runs", "kept", "minimum", "median", "maximum"].map(|column| row.number(column).unwrap());
        assert_eq!(numbers, [3.0, 3.0, 4.0, 5.0, 9.0]);
    }
}
