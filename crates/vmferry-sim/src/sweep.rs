//! Many simulated migrations: each arm in each cell of a grid, with several seeds, on all processors.
//!
//! A cell is a trace, a link and a downtime limit. An arm is what is compared: a policy with a predictor, or post-copy.
//! All arms of a cell replay the same writes from the same point of the trace, seed by seed, so that their
//! differences can be taken in pairs. What comes out does not depend on how many processors worked on it.
//!
//! Figures of bytes, times and pauses are means over the runs that converged, with the 95 % interval of Student's t
//! distribution; the share that converged stands beside them.

mod statistics;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;
use vmferry_core::pages::PAGE_BYTES;
use vmferry_core::plan::{PolicySpec, UnknownPolicy};
use vmferry_core::predict::{PredictorSpec, PredictorSpecError};

pub use statistics::Estimate;

use crate::random::SplitMix64;
use crate::trace::Trace;
use crate::{Outcome, PostCopyConfig, PostCopyOutcome, Sample, Scenario, SimError, post_copy, simulate};

/// The most runs of a sweep: a million already take days.
pub const MAX_RUNS: usize = 1_000_000;
/// The most samples kept of a run; longer series are thinned evenly.
pub const MAX_SAMPLES: usize = 240;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arm {
    /// Pre-copy, the guest's memory first.
    PreCopy {
        /// Who decides.
        policy: PolicySpec,
        /// Who predicts.
        predictor: PredictorSpec,
    },
    /// Post-copy with pre-paging: the guest first, its memory afterwards.
    PostCopy(PostCopyConfig),
}

impl fmt::Display for Arm {
    /// `vmferry`, `vmferry/lru`, `qemu`, `post-copy`: the predictor where it is not the usual one.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PreCopy { policy, predictor } if *predictor == usual_predictor(*policy) => {
                write!(formatter, "{policy}")
            }
            Self::PreCopy { policy, predictor } => write!(formatter, "{policy}/{predictor}"),
            Self::PostCopy(_) => formatter.write_str(POST_COPY),
        }
    }
}

/// How [`ArmKind`] and tables call post-copy.
const POST_COPY: &str = "post-copy";

/// The predictor that goes without saying: only vmferry's own policy asks for one.
fn usual_predictor(policy: PolicySpec) -> PredictorSpec {
    match policy {
        PolicySpec::Vmferry => PredictorSpec::default(),
        PolicySpec::Qemu | PolicySpec::Xen | PolicySpec::SkipWritten | PolicySpec::StopAndCopy => PredictorSpec::None,
    }
}

/// An arm as a user names it, before predictors are chosen: a policy, or `post-copy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArmKind {
    /// Pre-copy with this policy.
    PreCopy(PolicySpec),
    /// Post-copy.
    PostCopy,
}

impl FromStr for ArmKind {
    type Err = UnknownArm;

    fn from_str(name: &str) -> Result<Self, UnknownArm> {
        match name {
            POST_COPY => Ok(Self::PostCopy),
            _ => Ok(Self::PreCopy(name.parse()?)),
        }
    }
}

/// Neither a policy nor post-copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{policy}, or post-copy")]
pub struct UnknownArm {
    /// Which policies there are.
    #[from]
    pub policy: UnknownPolicy,
}

/// The arms of these kinds: vmferry's policy once with each predictor, the others, which ask none, once.
pub fn arms(kinds: &[ArmKind], predictors: &[PredictorSpec]) -> Vec<Arm> {
    let mut arms: Vec<Arm> = Vec::new();
    for &kind in kinds {
        let new: Vec<Arm> = match kind {
            ArmKind::PreCopy(policy @ PolicySpec::Vmferry) => {
                predictors.iter().map(|&predictor| Arm::PreCopy { policy, predictor }).collect()
            }
            ArmKind::PreCopy(policy) => vec![Arm::PreCopy { policy, predictor: usual_predictor(policy) }],
            ArmKind::PostCopy => vec![Arm::PostCopy(PostCopyConfig::default())],
        };
        for arm in new {
            if !arms.contains(&arm) {
                arms.push(arm);
            }
        }
    }
    arms
}

/// Reads a comma list of predictors. Their parameters have commas too: a part `NAME=VALUE` without a colon belongs to the
/// predictor before it, as in `lcbst:half-life=8,gaps=off,lru`.
///
/// # Errors
/// [`PredictorSpecError`] for the first part that is none.
pub fn predictors(list: &str) -> Result<Vec<PredictorSpec>, PredictorSpecError> {
    let mut texts: Vec<String> = Vec::new();
    for part in list.split(',') {
        match texts.last_mut() {
            Some(last) if part.contains('=') && !part.contains(':') => {
                last.push(',');
                last.push_str(part);
            }
            Some(_) | None => texts.push(part.to_owned()),
        }
    }
    texts.iter().map(|text| text.parse()).collect()
}

/// How fast a cell's link is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Link {
    /// So many bytes per second.
    Bandwidth(u64),
    /// As fast that the guest's mean dirty rate, in bytes of whole pages, is this share of it.
    Load(f64),
}

impl Link {
    /// The bandwidth for a trace, in bytes per second.
    fn bandwidth_bytes_per_s(self, trace: &Trace) -> Result<u64, SweepError> {
        match self {
            Self::Bandwidth(bandwidth) => Ok(bandwidth),
            Self::Load(load) => {
                let dirty_bytes_per_s = trace.dirty_pages_per_s() * PAGE_BYTES as f64;
                let bandwidth = dirty_bytes_per_s / load;
                if load > 0.0 && (1.0..1e18).contains(&bandwidth) {
                    Ok(bandwidth.round() as u64)
                } else {
                    Err(SweepError::Load { trace: trace.name.clone(), load, dirty_bytes_per_s })
                }
            }
        }
    }
}

/// What to simulate. Where lists are empty, nothing is.
#[derive(Debug, Clone)]
pub struct Sweep<'a> {
    /// The guests.
    pub traces: &'a [Trace],
    /// All that is the same in each run. Its bandwidth, limit, policy, predictor, start and seed do not count.
    pub base: Scenario,
    /// The links.
    pub links: Vec<Link>,
    /// The downtime limits.
    pub downtime_limits: Vec<Duration>,
    /// What is compared.
    pub arms: Vec<Arm>,
    /// With which of the arms the others are compared.
    pub baseline: usize,
    /// How many seeds. Each draws the moments of writes and where in the trace the migration begins.
    pub seeds: usize,
    /// How many runs at a time.
    pub jobs: usize,
}

/// Why a sweep did not come to its end.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SweepError {
    /// A load that no bandwidth makes.
    #[error(
        "no link has load {load} from trace `{trace}`, which writes {dirty_bytes_per_s:.0} bytes a second on average; give \
         a bandwidth, or a load above 0"
    )]
    Load {
        /// The trace's name.
        trace: String,
        /// The load.
        load: f64,
        /// Its mean dirty rate.
        dirty_bytes_per_s: f64,
    },
    /// Too much.
    #[error("{runs} runs are more than {MAX_RUNS}; take fewer traces, links, limits, arms or seeds")]
    TooManyRuns {
        /// How many it would be.
        runs: usize,
    },
    /// The baseline is none of the arms.
    #[error("arm {baseline} is to be the baseline, and there are {arms} arms")]
    Baseline {
        /// Its index.
        baseline: usize,
        /// How many there are.
        arms: usize,
    },
    /// A run failed.
    #[error("arm `{arm}` on trace `{trace}` with seed {seed} cannot be simulated")]
    Run {
        /// The arm.
        arm: String,
        /// The trace's name.
        trace: String,
        /// The seed.
        seed: usize,
        /// Why.
        #[source]
        error: SimError,
    },
}

/// How far a sweep is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SweepProgress {
    /// Runs that have ended.
    pub done: usize,
    /// Runs in all.
    pub total: usize,
}

/// A sweep's outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepReport {
    /// The traces.
    pub traces: Vec<TraceFacts>,
    /// What is the same in each run.
    pub scenario: ScenarioFacts,
    /// The arms' names.
    pub arms: Vec<String>,
    /// The name of the arm with which the others are compared.
    pub baseline: String,
    /// How many seeds were asked for.
    pub seeds: usize,
    /// Runs in all.
    pub planned_runs: usize,
    /// Runs done; fewer if it was cancelled.
    pub done_runs: usize,
    /// The cells, by trace, link and limit.
    pub cells: Vec<CellReport>,
}

/// A trace, for a report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceFacts {
    /// Its name.
    pub name: String,
    /// The guest's pages.
    pub pages: u64,
    /// Pages that are zero all the time.
    pub zero_pages: u64,
    /// Its length.
    pub duration_ms: f64,
    /// Its epochs' length.
    pub epoch_ms: f64,
    /// Mean dirty rate, in bytes of whole pages per second.
    pub dirty_bytes_per_s: f64,
}

/// What all runs share.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ScenarioFacts {
    /// The link's latency, each way.
    pub latency_ms: f64,
    /// Between scans.
    pub epoch_ms: f64,
    /// How long the guest is watched first, by policies that predict.
    pub observe_ms: f64,
    /// When a migration without end is cancelled.
    pub time_limit_ms: f64,
}

/// A cell: a trace, a link and a limit, and how each arm did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CellReport {
    /// The trace's place in the report's list.
    pub trace: usize,
    /// The link's rate.
    pub bandwidth_bytes_per_s: u64,
    /// The guest's mean dirty rate, as a share of that.
    pub load: f64,
    /// The downtime limit.
    pub downtime_limit_ms: f64,
    /// In which share of the starts some schedule could have met the limit within the scenario's horizon; `None` if no
    /// arm was pre-copy.
    pub feasible_share: Option<f64>,
    /// The shortest total time with a pause within the limit, of those that move memory first.
    pub optimum_total_ms: Option<Estimate>,
    /// The arms, as in the report's list; those without a finished run too.
    pub arms: Vec<ArmReport>,
}

/// An arm in a cell. Estimates are over the runs that converged; `None` if none did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ArmReport {
    /// Its name.
    pub arm: String,
    /// Share of the runs that converged; `None` without a run.
    pub converged_share: Option<f64>,
    /// Share of those that kept the downtime limit.
    pub within_limit_share: Option<f64>,
    /// Page bytes, in relation to each page once.
    pub bytes_ratio: Option<Estimate>,
    /// Pages sent beyond each page once.
    pub excess_pages: Option<Estimate>,
    /// Total time.
    pub total_ms: Option<Estimate>,
    /// Total time, in relation to the shortest with a pause within the limit; for post-copy, to the shortest of those
    /// that may move the guest before its memory.
    pub total_ratio: Option<Estimate>,
    /// Downtime.
    pub downtime_ms: Option<Estimate>,
    /// Downtime, in relation to the shortest with a pause at the same moment; for post-copy, to one in which no page is
    /// copied.
    pub downtime_ratio: Option<Estimate>,
    /// Share of its time that the guest lost to the migration while it ran: to tracking, or waiting for pages.
    pub slowdown: Option<Estimate>,
    /// When those that gave up did.
    pub given_up_ms: Option<Estimate>,
    /// Compared with the baseline, seed by seed; `None` for the baseline itself.
    pub versus_baseline: Option<Difference>,
    /// Each run.
    pub runs: Vec<RunReport>,
    /// The first seed's migration over time, thinned to [`MAX_SAMPLES`].
    pub series: Vec<Sample>,
}

/// An arm less the baseline, over the seeds with which both converged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    /// Page bytes, in units of each page once.
    pub bytes_ratio: Estimate,
    /// Mean excess pages, in relation to the baseline's; `None` if that has no excess.
    pub excess_share: Option<f64>,
    /// Total time.
    pub total_ms: Estimate,
    /// Downtime.
    pub downtime_ms: Estimate,
}

/// One run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RunReport {
    /// Its seed.
    pub seed: usize,
    /// Where in the trace it began.
    pub start_ms: f64,
    /// Whether the guest runs on the target.
    pub converged: bool,
    /// When it gave up.
    pub given_up_ms: Option<f64>,
    /// Whether the downtime limit was kept.
    pub within_limit: Option<bool>,
    /// Page frames sent.
    pub page_bytes: u64,
    /// The same, in relation to each page once.
    pub bytes_ratio: f64,
    /// Pages sent beyond each page once.
    pub excess_pages: i64,
    /// Until the guest ran on the target, or for post-copy until all its pages were there.
    pub total_ms: f64,
    /// The shortest total time with a pause within the limit; for post-copy, that of
    /// [`PostCopyRatios`](crate::PostCopyRatios).
    pub optimum_total_ms: Option<f64>,
    /// The first in relation to the second.
    pub total_ratio: Option<f64>,
    /// Downtime; 0 without a pause.
    pub downtime_ms: f64,
    /// The same, in relation to the shortest with a pause at the same moment, or for post-copy without a page to copy.
    pub downtime_ratio: Option<f64>,
    /// Share of its time that the guest lost while it ran.
    pub slowdown: f64,
    /// Pages held back when the guest was paused.
    pub held_pages: u64,
    /// Share of these that were written since the push began.
    pub precision: Option<f64>,
    /// Share of the pages written last that were held back.
    pub recall: Option<f64>,
}

/// Where a run stands in the grid.
#[derive(Debug, Clone, Copy)]
struct Place {
    cell: usize,
    arm: usize,
    seed: usize,
}

/// The conditions of a cell.
#[derive(Debug, Clone, Copy)]
struct Cell {
    trace: usize,
    bandwidth_bytes_per_s: u64,
    downtime_limit: Duration,
}

/// What is kept of a run.
type Done = (RunReport, Vec<Sample>);

impl Sweep<'_> {
    /// How many runs it takes.
    pub fn runs(&self) -> usize {
        let lists = [self.traces.len(), self.links.len(), self.downtime_limits.len(), self.arms.len(), self.seeds];
        lists.into_iter().fold(1, usize::saturating_mul)
    }

    /// Runs it. `progress` is told after each run, from whichever thread. If `cancel` becomes true, no more runs begin, those
    /// begun are ended, and the report has what is done: seed after seed, so that arms can still be compared.
    ///
    /// # Errors
    /// [`SweepError`]; of several runs that fail, that of the first.
    pub fn run(
        &self,
        cancel: &AtomicBool,
        progress: &mut (dyn FnMut(SweepProgress) + Send),
    ) -> Result<SweepReport, SweepError> {
        let total = self.runs();
        if total > MAX_RUNS {
            return Err(SweepError::TooManyRuns { runs: total });
        }
        if self.baseline >= self.arms.len() {
            return Err(SweepError::Baseline { baseline: self.baseline, arms: self.arms.len() });
        }
        let cells = self.cells()?;
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let collected = Mutex::new((0_usize, progress, (0..total).map(|_| None).collect::<Vec<_>>()));
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.clamp(1, total.max(1)) {
                scope.spawn(|| {
                    // Places are handed out in order and those taken are always ended. So the first run that fails is
                    // the same whatever the number of threads.
                    while !cancel.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= total {
                            break;
                        }
                        let result = self.run_at(self.place(index, cells.len()), &cells);
                        failed.fetch_or(result.is_err(), Ordering::Relaxed);
                        let mut collected = collected.lock().expect("no thread panics while it collects");
                        let (done, progress, results) = &mut *collected;
                        results[index] = Some(result);
                        *done += 1;
                        progress(SweepProgress { done: *done, total });
                    }
                });
            }
        });
        let (done_runs, _, results) = collected.into_inner().expect("no thread panics while it collects");
        let mut by_place: Vec<Vec<Vec<Done>>> = vec![vec![Vec::new(); self.arms.len()]; cells.len()];
        for (index, result) in results.into_iter().enumerate() {
            let place = self.place(index, cells.len());
            if let Some(done) = result.transpose()? {
                by_place[place.cell][place.arm].push(done);
            }
        }
        let reports = cells.iter().zip(by_place).map(|(cell, arms)| self.cell_report(cell, arms)).collect();
        Ok(self.report(total, done_runs, reports))
    }

    /// By trace, link and limit.
    fn cells(&self) -> Result<Vec<Cell>, SweepError> {
        let mut cells = Vec::new();
        for (trace, guest) in self.traces.iter().enumerate() {
            for &link in &self.links {
                let bandwidth_bytes_per_s = link.bandwidth_bytes_per_s(guest)?;
                for &downtime_limit in &self.downtime_limits {
                    cells.push(Cell { trace, bandwidth_bytes_per_s, downtime_limit });
                }
            }
        }
        Ok(cells)
    }

    /// Seeds change slowest, arms fastest.
    fn place(&self, index: usize, cells: usize) -> Place {
        let arms = self.arms.len();
        Place { seed: index / (arms * cells), cell: index / arms % cells, arm: index % arms }
    }

    fn run_at(&self, place: Place, cells: &[Cell]) -> Result<Done, SweepError> {
        let Place { cell, arm, seed } = place;
        let Cell { trace, bandwidth_bytes_per_s, downtime_limit } = cells[cell];
        let (trace, arm) = (&self.traces[trace], self.arms[arm]);
        let mut scenario = Scenario {
            bandwidth_bytes_per_s,
            downtime_limit,
            start_offset: start_offset(trace, seed as u64),
            seed: seed as u64,
            ..self.base.clone()
        };
        let start_ms = milliseconds(scenario.start_offset);
        let ran = match arm {
            Arm::PreCopy { policy, predictor } => {
                scenario.policy = policy;
                scenario.predictor = predictor;
                simulate(trace, &scenario).map(|outcome| pre_copy_run(seed, start_ms, outcome))
            }
            Arm::PostCopy(config) => {
                post_copy(trace, &scenario, &config).map(|outcome| post_copy_run(seed, start_ms, &scenario, outcome))
            }
        };
        let (run, series) =
            ran.map_err(|error| SweepError::Run { arm: arm.to_string(), trace: trace.name.clone(), seed, error })?;
        // One series an arm is drawn. All of a large sweep would not fit into memory.
        Ok((run, if seed == 0 { thinned(series) } else { Vec::new() }))
    }

    fn cell_report(&self, cell: &Cell, arms: Vec<Vec<Done>>) -> CellReport {
        let trace = &self.traces[cell.trace];
        // The optimum of a start is that of the cell, whichever arm ran.
        let bounded = self.arms.iter().position(|arm| matches!(arm, Arm::PreCopy { .. }));
        let optimum: Vec<Option<f64>> =
            bounded.map(|arm| arms[arm].iter().map(|(run, _)| run.optimum_total_ms).collect()).unwrap_or_default();
        let feasible: Vec<f64> = optimum.iter().flatten().copied().collect();
        let baseline: Vec<RunReport> = arms[self.baseline].iter().map(|(run, _)| *run).collect();
        let arms = self.arms.iter().zip(arms).enumerate().map(|(index, (arm, done))| {
            let series = done.iter().find(|(run, _)| run.seed == 0).map(|(_, series)| series.clone());
            let runs: Vec<RunReport> = done.into_iter().map(|(run, _)| run).collect();
            let baseline = (index != self.baseline).then_some(&baseline[..]);
            arm_report(arm, runs, series.unwrap_or_default(), baseline)
        });
        CellReport {
            trace: cell.trace,
            bandwidth_bytes_per_s: cell.bandwidth_bytes_per_s,
            load: trace.dirty_pages_per_s() * PAGE_BYTES as f64 / cell.bandwidth_bytes_per_s as f64,
            downtime_limit_ms: milliseconds(cell.downtime_limit),
            feasible_share: (!optimum.is_empty()).then(|| feasible.len() as f64 / optimum.len() as f64),
            optimum_total_ms: Estimate::of(&feasible),
            arms: arms.collect(),
        }
    }

    fn report(&self, planned_runs: usize, done_runs: usize, cells: Vec<CellReport>) -> SweepReport {
        let facts = |trace: &Trace| TraceFacts {
            name: trace.name.clone(),
            pages: trace.pages,
            zero_pages: trace.zero.iter().map(|run| run.count).sum(),
            duration_ms: milliseconds(trace.duration()),
            epoch_ms: milliseconds(trace.epoch),
            dirty_bytes_per_s: trace.dirty_pages_per_s() * PAGE_BYTES as f64,
        };
        SweepReport {
            traces: self.traces.iter().map(facts).collect(),
            scenario: ScenarioFacts {
                latency_ms: milliseconds(self.base.latency),
                epoch_ms: milliseconds(self.base.epoch),
                observe_ms: milliseconds(self.base.observe),
                time_limit_ms: milliseconds(self.base.time_limit),
            },
            arms: self.arms.iter().map(Arm::to_string).collect(),
            baseline: self.arms[self.baseline].to_string(),
            seeds: self.seeds,
            planned_runs,
            done_runs,
            cells,
        }
    }
}

/// Where in the trace the migration with this seed begins.
fn start_offset(trace: &Trace, seed: u64) -> Duration {
    // Mixed, so that it is not the number that also draws the moments of writes.
    let length_ns = u64::try_from(trace.duration().as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(SplitMix64::new(!seed).below(length_ns.max(1)))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn pre_copy_run(seed: usize, start_ms: f64, outcome: Outcome) -> Done {
    let Outcome { report, optimum, .. } = &outcome;
    let run = RunReport {
        seed,
        start_ms,
        converged: outcome.converged,
        given_up_ms: outcome.given_up_ms,
        within_limit: outcome.within_limit,
        page_bytes: outcome.page_bytes,
        bytes_ratio: optimum.bytes_ratio,
        excess_pages: optimum.excess_pages,
        total_ms: report.total_ms,
        optimum_total_ms: optimum.total_ms,
        total_ratio: optimum.total_ratio,
        downtime_ms: report.downtime_ms,
        downtime_ratio: optimum.downtime_ratio,
        slowdown: outcome.guest.slowdown,
        held_pages: report.working_set.pages,
        precision: report.working_set.precision,
        recall: report.working_set.recall,
    };
    (run, outcome.series)
}

/// Post-copy always ends, and sends each page once. It is compared with an optimum of its own: that of migrations that move
/// memory first waits for a pause in which little is left to copy.
fn post_copy_run(seed: usize, start_ms: f64, scenario: &Scenario, outcome: PostCopyOutcome) -> Done {
    let optimum = outcome.optimum;
    let run = RunReport {
        seed,
        start_ms,
        converged: true,
        given_up_ms: None,
        within_limit: Some(outcome.downtime_ms <= milliseconds(scenario.downtime_limit)),
        page_bytes: outcome.page_bytes,
        bytes_ratio: outcome.bytes_ratio,
        excess_pages: 0,
        total_ms: outcome.total_ms,
        optimum_total_ms: optimum.total_ms,
        total_ratio: optimum.total_ratio,
        downtime_ms: outcome.downtime_ms,
        downtime_ratio: Some(optimum.downtime_ratio),
        slowdown: outcome.slowdown,
        held_pages: 0,
        precision: None,
        recall: None,
    };
    (run, outcome.series)
}

/// At most [`MAX_SAMPLES`], evenly, the first and the last among them.
fn thinned(series: Vec<Sample>) -> Vec<Sample> {
    let last = series.len().saturating_sub(1);
    if series.len() <= MAX_SAMPLES {
        return series;
    }
    (0..MAX_SAMPLES).map(|index| series[index * last / (MAX_SAMPLES - 1)]).collect()
}

fn arm_report(arm: &Arm, runs: Vec<RunReport>, series: Vec<Sample>, baseline: Option<&[RunReport]>) -> ArmReport {
    let converged: Vec<&RunReport> = runs.iter().filter(|run| run.converged).collect();
    let estimate = |value: fn(&RunReport) -> Option<f64>| {
        let values: Vec<f64> = converged.iter().filter_map(|run| value(run)).collect();
        Estimate::of(&values)
    };
    let share = |count: usize, of: usize| (of > 0).then(|| count as f64 / of as f64);
    let paused = converged.iter().filter_map(|run| run.within_limit);
    let given_up: Vec<f64> = runs.iter().filter_map(|run| run.given_up_ms).collect();
    ArmReport {
        arm: arm.to_string(),
        converged_share: share(converged.len(), runs.len()),
        within_limit_share: share(paused.clone().filter(|kept| *kept).count(), paused.count()),
        bytes_ratio: estimate(|run| Some(run.bytes_ratio)),
        excess_pages: estimate(|run| Some(run.excess_pages as f64)),
        total_ms: estimate(|run| Some(run.total_ms)),
        total_ratio: estimate(|run| run.total_ratio),
        downtime_ms: estimate(|run| Some(run.downtime_ms)),
        downtime_ratio: estimate(|run| run.downtime_ratio),
        slowdown: estimate(|run| Some(run.slowdown)),
        given_up_ms: Estimate::of(&given_up),
        versus_baseline: baseline.and_then(|baseline| difference(&runs, baseline)),
        runs,
        series,
    }
}

/// `None` if there is no seed with which both converged.
fn difference(runs: &[RunReport], baseline: &[RunReport]) -> Option<Difference> {
    let pairs: Vec<(&RunReport, &RunReport)> = runs
        .iter()
        .filter_map(|run| Some((run, baseline.iter().find(|other| other.seed == run.seed)?)))
        .filter(|(run, other)| run.converged && other.converged)
        .collect();
    let estimate = |value: fn(&RunReport) -> f64| {
        let values: Vec<f64> = pairs.iter().map(|(run, other)| value(run) - value(other)).collect();
        Estimate::of(&values)
    };
    let excess = pairs.iter().map(|(run, _)| run.excess_pages as f64).sum::<f64>();
    let of = pairs.iter().map(|(_, other)| other.excess_pages as f64).sum::<f64>();
    Some(Difference {
        bytes_ratio: estimate(|run| run.bytes_ratio)?,
        excess_share: (of > 0.0).then_some(excess / of),
        total_ms: estimate(|run| run.total_ms)?,
        downtime_ms: estimate(|run| run.downtime_ms)?,
    })
}
