//! What is simulated: every arm under every condition, with several seeds; and two smaller sweeps beside that.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use lcbst_figures::table::{Table, cell};
use vmferry_core::pages::PAGE_BYTES;
use vmferry_core::plan::PolicySpec;
use vmferry_core::predict::PredictorSpec;
use vmferry_sim::Scenario;
use vmferry_sim::optimum::each_page_once_bytes;
use vmferry_sim::sweep::{Arm, ArmKind, ArmReport, CellReport, Estimate, Link, RunReport, Sweep, SweepReport, arms};
use vmferry_sim::trace::Trace;

use crate::guests::Guest;

/// The names of arms, as [`Arm`] writes them.
pub(crate) const OURS: &str = "vmferry";
pub(crate) const QEMU: &str = "qemu";
pub(crate) const XEN: &str = "xen";

/// A migration that has not ended by then does not converge. The slowest links of the grid need minutes for each page
/// once.
const TIME_LIMIT: Duration = Duration::from_secs(900);
/// The optimum looks for a moment at which the limit could be met this far at least, and for so many times what the
/// slowest link of a grid takes for each page once.
const HORIZON_LEAST: Duration = Duration::from_secs(30);
const HORIZON_PASSES: f64 = 3.0;
/// The conditions.
#[derive(Debug, Clone)]
pub(crate) struct Grid {
    /// Dirty rate over link rate.
    pub(crate) loads: Vec<f64>,
    pub(crate) limits_ms: Vec<u64>,
    pub(crate) seeds: usize,
    /// The smaller grid on which predictors, and the time of observation, are compared.
    pub(crate) few_loads: Vec<f64>,
    pub(crate) few_limits_ms: Vec<u64>,
    pub(crate) few_seeds: usize,
}

impl Grid {
    pub(crate) fn full() -> Self {
        Self {
            loads: vec![0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5],
            limits_ms: vec![30, 100, 300, 1000],
            seeds: 10,
            few_loads: vec![0.4, 0.8, 1.2],
            few_limits_ms: vec![100, 300],
            few_seeds: 3,
        }
    }

    pub(crate) fn quick() -> Self {
        Self { loads: vec![0.5, 1.2], limits_ms: vec![100, 300], seeds: 2, few_seeds: 1, ..Self::full() }
    }
}

/// How one arm did in one cell.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    pub(crate) guest: usize,
    pub(crate) name: String,
    pub(crate) recorded: bool,
    pub(crate) guest_pages: u64,
    pub(crate) load: f64,
    pub(crate) bandwidth_bytes_per_s: u64,
    pub(crate) limit_ms: f64,
    /// Share of the starts from which some schedule could have met the limit.
    pub(crate) feasible_share: f64,
    pub(crate) arms: Vec<ArmReport>,
}

impl Cell {
    /// The arm of this name.
    ///
    /// # Panics
    /// If the sweep had none.
    pub(crate) fn arm(&self, name: &str) -> &ArmReport {
        let found = self.arms.iter().find(|arm| arm.arm == name);
        found.unwrap_or_else(|| panic!("there is no arm {name}"))
    }

    /// The mean of `value` over the runs of an arm that ended on the target with a seed with which the other arm's did too,
    /// and the same of the other; `None` without such a seed.
    pub(crate) fn paired(&self, one: &str, other: &str, value: fn(&RunFigures) -> f64) -> Option<(f64, f64)> {
        let figures = |name: &str| -> Vec<(usize, RunFigures)> {
            let converged = self.arm(name).runs.iter().filter(|run| run.converged);
            converged.map(|run| (run.seed, RunFigures::of(run))).collect()
        };
        let others = figures(other);
        let pairs: Vec<(f64, f64)> = figures(one)
            .iter()
            .filter_map(|(seed, run)| {
                let (_, pair) = others.iter().find(|(other_seed, _)| other_seed == seed)?;
                Some((value(run), value(pair)))
            })
            .collect();
        let count = pairs.len() as f64;
        let mean = |sum: f64| sum / count;
        (!pairs.is_empty())
            .then(|| (mean(pairs.iter().map(|pair| pair.0).sum()), mean(pairs.iter().map(|pair| pair.1).sum())))
    }
}

/// The figures of a run that are compared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunFigures {
    pub(crate) excess_pages: f64,
    pub(crate) page_bytes: f64,
    pub(crate) total_ms: f64,
    pub(crate) downtime_ms: f64,
}

impl RunFigures {
    fn of(run: &RunReport) -> Self {
        Self {
            // Zero pages that were never read would make it negative.
            excess_pages: run.excess_pages.max(0) as f64,
            page_bytes: run.page_bytes as f64,
            total_ms: run.total_ms,
            downtime_ms: run.downtime_ms,
        }
    }
}

/// All arms on the whole grid.
///
/// # Errors
/// When a trace cannot be replayed.
pub(crate) fn run(guests: &[Guest], grid: &Grid, jobs: usize) -> Result<Vec<Cell>> {
    let kinds: Vec<ArmKind> = PolicySpec::ALL.map(ArmKind::PreCopy).into_iter().chain([ArmKind::PostCopy]).collect();
    let arms = arms(&kinds, &[PredictorSpec::default()]);
    let conditions = (&grid.loads[..], &grid.limits_ms[..], grid.seeds);
    sweep("policies", guests, Scenario::default(), arms, conditions, jobs)
}

/// vmferry's policy with each predictor, and QEMU's rule, on the smaller grid.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_predictors(guests: &[Guest], grid: &Grid, jobs: usize) -> Result<Vec<Cell>> {
    let kinds = [ArmKind::PreCopy(PolicySpec::Vmferry), ArmKind::PreCopy(PolicySpec::Qemu)];
    let conditions = (&grid.few_loads[..], &grid.few_limits_ms[..], grid.few_seeds);
    sweep("predictors", guests, Scenario::default(), arms(&kinds, &PredictorSpec::ALL), conditions, jobs)
}

/// How long the guest is watched before the first page is sent, in ms.
pub(crate) const OBSERVATIONS_MS: [u64; 4] = [0, 50, 100, 300];

/// vmferry's default and QEMU's rule on the smaller grid, for each of [`OBSERVATIONS_MS`].
///
/// # Errors
/// As [`run`].
pub(crate) fn run_observation(guests: &[Guest], grid: &Grid, jobs: usize) -> Result<Vec<(u64, Vec<Cell>)>> {
    let kinds = [ArmKind::PreCopy(PolicySpec::Vmferry), ArmKind::PreCopy(PolicySpec::Qemu)];
    let conditions = (&grid.few_loads[..], &grid.few_limits_ms[..], grid.few_seeds);
    let mut all = Vec::new();
    for observe_ms in OBSERVATIONS_MS {
        let base = Scenario { observe: Duration::from_millis(observe_ms), ..Scenario::default() };
        let name = format!("watching for {observe_ms} ms");
        let arms = arms(&kinds, &[PredictorSpec::default()]);
        all.push((observe_ms, sweep(&name, guests, base, arms, conditions, jobs)?));
    }
    Ok(all)
}

/// vmferry's default and QEMU's rule on the smaller grid, for recorded guests whose pages are all the whole guest's.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_without_owners(guests: &[Guest], grid: &Grid, jobs: usize) -> Result<Vec<Cell>> {
    let without: Vec<Guest> = guests.iter().filter(|guest| guest.recorded).map(Guest::without_owners).collect();
    let kinds = [ArmKind::PreCopy(PolicySpec::Vmferry), ArmKind::PreCopy(PolicySpec::Qemu)];
    let conditions = (&grid.few_loads[..], &grid.few_limits_ms[..], grid.few_seeds);
    let arms = arms(&kinds, &[PredictorSpec::default()]);
    sweep("without owners", &without, Scenario::default(), arms, conditions, jobs)
}

fn sweep(
    name: &str,
    guests: &[Guest],
    mut base: Scenario,
    arms: Vec<Arm>,
    (loads, limits_ms, seeds): (&[f64], &[u64], usize),
    jobs: usize,
) -> Result<Vec<Cell>> {
    base.time_limit = TIME_LIMIT;
    let baseline = arms.iter().position(|arm| arm.to_string() == QEMU).context("QEMU's rule is not among the arms")?;
    let runs = guests.len() * loads.len() * limits_ms.len() * arms.len() * seeds;
    let style =
        ProgressStyle::with_template("{msg:<22} {bar:30} {pos}/{len} runs, {eta} left").context("a bad template")?;
    let bar = ProgressBar::new(runs as u64).with_style(style).with_message(name.to_owned());
    let mut all = Vec::new();
    for (index, guest) in guests.iter().enumerate() {
        let sweep = Sweep {
            traces: std::slice::from_ref(&guest.trace),
            base: Scenario { horizon: horizon(&guest.trace, loads), ..base.clone() },
            links: loads.iter().map(|&load| Link::Load(load)).collect(),
            downtime_limits: limits_ms.iter().map(|&limit| Duration::from_millis(limit)).collect(),
            arms: arms.clone(),
            baseline,
            seeds,
            jobs,
        };
        let report = sweep.run(&AtomicBool::new(false), &mut |_| bar.inc(1))?;
        all.extend(cells(index, guest, report));
    }
    bar.finish_and_clear();
    println!("{name}: {runs} runs");
    Ok(all)
}

/// How far the optimum looks ahead.
fn horizon(trace: &Trace, loads: &[f64]) -> Duration {
    let slowest_bytes_per_s = trace.dirty_pages_per_s() * PAGE_BYTES as f64 / loads.iter().copied().fold(0.0, f64::max);
    let pass_s = each_page_once_bytes(trace) as f64 / slowest_bytes_per_s;
    Duration::try_from_secs_f64(HORIZON_PASSES * pass_s).unwrap_or(TIME_LIMIT).clamp(HORIZON_LEAST, TIME_LIMIT)
}

fn cells(index: usize, guest: &Guest, report: SweepReport) -> Vec<Cell> {
    let cell = |cell: CellReport| Cell {
        guest: index,
        name: guest.name().to_owned(),
        recorded: guest.recorded,
        guest_pages: guest.trace.pages,
        // The bandwidth is a whole number, so that a load comes back with an error in its last digits.
        load: (cell.load * 1e4).round() / 1e4,
        bandwidth_bytes_per_s: cell.bandwidth_bytes_per_s,
        limit_ms: cell.downtime_limit_ms,
        feasible_share: cell.feasible_share.unwrap_or(0.0),
        arms: cell.arms,
    };
    report.cells.into_iter().map(cell).collect()
}

/// Every cell's figures, for whoever wants to look closer.
pub(crate) fn table(cells: &[Cell]) -> Table {
    let mut table = Table::new(
        "Simulated migrations: means over the runs that ended on the target, and half the width of their 95 % interval.",
        &[
            ("guest", "whose writes were replayed"),
            ("kind", "recorded or generated"),
            ("load", "mean dirty rate over the link's rate"),
            ("bandwidth", "the link's rate in bytes per second"),
            ("limit_ms", "the downtime limit"),
            ("feasible", "share of the starts from which some schedule could have met the limit"),
            ("arm", "what was compared"),
            ("converged", "share of the runs that ended on the target"),
            ("within_limit", "share of those that kept the downtime limit"),
            ("bytes_ratio", "page bytes over those of each page once"),
            ("bytes_ratio_ci", "half width"),
            ("excess_pages", "pages sent beyond each once"),
            ("excess_pages_ci", "half width"),
            ("total_ms", "total time"),
            ("total_ms_ci", "half width"),
            ("total_ratio", "total time over the shortest possible"),
            ("downtime_ms", "downtime"),
            ("downtime_ms_ci", "half width"),
            ("given_up_ms", "when those that gave up did"),
            ("slowdown", "share of its time that the guest lost while it ran"),
        ],
    );
    for one in cells {
        for arm in &one.arms {
            let share = |share: Option<f64>| share.map_or_else(String::new, cell);
            let mean = |estimate: &Option<Estimate>| share(estimate.as_ref().map(|estimate| estimate.mean));
            let half = |estimate: &Option<Estimate>| share(estimate.as_ref().and_then(|estimate| estimate.half_width));
            table.push(vec![
                one.name.replace(',', ""),
                if one.recorded { "recorded" } else { "generated" }.to_owned(),
                cell(one.load),
                one.bandwidth_bytes_per_s.to_string(),
                cell(one.limit_ms),
                cell(one.feasible_share),
                arm.arm.clone(),
                share(arm.converged_share),
                share(arm.within_limit_share),
                mean(&arm.bytes_ratio),
                half(&arm.bytes_ratio),
                mean(&arm.excess_pages),
                half(&arm.excess_pages),
                mean(&arm.total_ms),
                half(&arm.total_ms),
                mean(&arm.total_ratio),
                mean(&arm.downtime_ms),
                half(&arm.downtime_ms),
                mean(&arm.given_up_ms),
                mean(&arm.slowdown),
            ]);
        }
    }
    table
}
