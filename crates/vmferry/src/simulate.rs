//! `vmferry simulate`.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmferry_core::predict::PredictorSpec;
use vmferry_sim::sweep::{
    Arm, ArmKind, ArmReport, CellReport, Estimate, Link, Sweep, SweepProgress, SweepReport, arms, predictors,
};
use vmferry_sim::trace::Trace;
use vmferry_sim::trace::generate::GeneratorSpec;
use vmferry_sim::{Scenario, html};

use crate::cli::SimulateArgs;
use crate::output::{print_bytes, print_json};
use crate::units::{show_ms, show_rate};

/// How a trace is named that is generated rather than read.
const GENERATE: &str = "generate:";
/// The seed of generated traces: the seeds of the sweep move where in them a migration begins.
const TRACE_SEED: u64 = 1;
/// How often a line is written where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &SimulateArgs) -> anyhow::Result<ExitCode> {
    let arms = chosen_arms(args)?;
    let baseline = baseline(args, &arms)?;
    for output in args.json.iter().chain(&args.html) {
        if args.traces.iter().any(|trace| Path::new(trace) == output) {
            return Err(crate::usage_error(format!("{} is a trace, and would be overwritten", output.display())));
        }
    }
    let traces = args.traces.iter().map(|text| trace(text)).collect::<anyhow::Result<Vec<_>>>()?;
    let links = if args.load.is_empty() {
        args.bandwidth.iter().map(|&bandwidth| Link::Bandwidth(bandwidth)).collect()
    } else {
        args.load.iter().map(|&load| Link::Load(load)).collect()
    };
    let sweep = Sweep {
        traces: &traces,
        base: Scenario {
            latency: args.latency,
            epoch: args.epoch,
            observe: args.observe,
            time_limit: args.time_limit,
            ..Scenario::default()
        },
        links,
        downtime_limits: args.downtime_limit.clone(),
        arms,
        baseline,
        seeds: args.seeds as usize,
        jobs: args.jobs.map_or_else(processors, |jobs| jobs as usize),
    };

    let cancel = cancel_on_signals()?;
    let mut display = Display::new(sweep.runs());
    let report = sweep.run(&cancel, &mut |progress| display.update(progress));
    display.finish();
    let report = report?;

    if let Some(path) = &args.html {
        let page = html::page(&report, &serde_json::to_string(&report).context("cannot write the report as JSON")?);
        std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match &args.json {
        Some(path) if path.as_os_str() == "-" => print_json(&report)?,
        Some(path) => {
            let mut text = serde_json::to_vec_pretty(&report).context("cannot write the report as JSON")?;
            text.push(b'\n');
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
            print_bytes(describe(&report).as_bytes())?;
        }
        None => print_bytes(describe(&report).as_bytes())?,
    }
    if report.done_runs < report.planned_runs {
        eprintln!("vmferry: ended after {} of {} runs", report.done_runs, report.planned_runs);
        return Ok(ExitCode::from(130));
    }
    Ok(ExitCode::SUCCESS)
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Set by the first signal; the second ends the program at once, should a run take long.
fn cancel_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // The order counts: the first of them sees the flag as the signal before has left it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&cancel))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&cancel)))
            .context("cannot prepare for signals")?;
    }
    Ok(cancel)
}

fn trace(text: &str) -> anyhow::Result<Trace> {
    match text.strip_prefix(GENERATE) {
        Some(spec) => {
            let spec: GeneratorSpec = spec.parse().map_err(crate::usage_error)?;
            spec.generate(TRACE_SEED).map_err(crate::usage_error)
        }
        None => crate::trace::read(Path::new(text)),
    }
}

fn chosen_arms(args: &SimulateArgs) -> anyhow::Result<Vec<Arm>> {
    let mut chosen: Vec<PredictorSpec> = Vec::new();
    for list in &args.predictor {
        chosen.extend(predictors(list).map_err(crate::usage_error)?);
    }
    Ok(arms(&args.policy, &chosen))
}

fn baseline(args: &SimulateArgs, arms: &[Arm]) -> anyhow::Result<usize> {
    let find = |name: &str| arms.iter().position(|arm| arm.to_string() == name);
    match &args.baseline {
        None => Ok(find("qemu").unwrap_or(0)),
        Some(name) => find(name).ok_or_else(|| {
            let names: Vec<String> = arms.iter().map(Arm::to_string).collect();
            crate::usage_error(format!("`{name}` is none of what is compared: {}", names.join(", ")))
        }),
    }
}

/// Reads a load.
pub(crate) fn load(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(load) if load > 0.0 && load.is_finite() => Ok(load),
        Ok(_) | Err(_) => {
            Err("a load is a number above 0: 0.5 where the guest writes half of what the link carries".to_owned())
        }
    }
}

/// Reads what is to be compared.
pub(crate) fn arm_kind(text: &str) -> Result<ArmKind, String> {
    text.parse().map_err(|error: vmferry_sim::sweep::UnknownArm| error.to_string())
}

/// A progress bar on a terminal, lines elsewhere; always on standard error.
struct Display {
    bar: Option<ProgressBar>,
    line_at: Instant,
}

impl Display {
    fn new(runs: usize) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("simulating [{bar:40}] {pos} of {len}, {eta} left")
                .expect("a valid template");
            ProgressBar::new(runs as u64).with_style(style.progress_chars("=> "))
        });
        Self { bar, line_at: Instant::now() }
    }

    fn update(&mut self, progress: SweepProgress) {
        match &self.bar {
            Some(bar) => bar.set_position(progress.done as u64),
            None if self.line_at.elapsed() >= LINE_INTERVAL => {
                self.line_at = Instant::now();
                eprintln!("{} of {} runs", progress.done, progress.total);
            }
            None => {}
        }
    }

    fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn describe(report: &SweepReport) -> String {
    let mut text = String::new();
    for (index, trace) in report.traces.iter().enumerate() {
        text.push_str(&format!("{}\n", trace.name));
        for cell in report.cells.iter().filter(|cell| cell.trace == index) {
            text.push_str(&describe_cell(cell));
        }
    }
    text.push_str(&format!(
        "Means over the runs that converged, ± half the 95 % interval; x: in relation to the optimum, for post-copy that of moving the guest first; excess/base: in relation to {}'s.\n",
        report.baseline
    ));
    text
}

fn describe_cell(cell: &CellReport) -> String {
    let header = [
        "policy",
        "converged",
        "page bytes",
        "excess pages",
        "excess/base",
        "total time",
        "x",
        "downtime",
        "x",
        "limit kept",
        "guest lost",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(cell.arms.iter().map(row));
    let mut text = format!(
        "\n  link {}, load {:.2}, downtime limit {}\n",
        show_rate(cell.bandwidth_bytes_per_s as f64),
        cell.load,
        show_ms(cell.downtime_limit_ms)
    );
    if let Some(share) = cell.feasible_share.filter(|share| *share < 1.0) {
        text.push_str(&format!(
            "  no schedule can keep this limit from {:.0} % of the starts\n",
            (1.0 - share) * 100.0
        ));
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(&format!("  {}\n", cells.collect::<Vec<_>>().join("  ").trim_end()));
    }
    text
}

fn row(arm: &ArmReport) -> [String; 11] {
    let share = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
    let ratio = |value: f64| format!("{value:.2}");
    let total = match (arm.total_ms, arm.given_up_ms) {
        (None, Some(given_up)) => format!("gave up at {}", show_ms(given_up.mean)),
        (total, _) => estimate(total, show_ms),
    };
    [
        arm.arm.clone(),
        share(arm.converged_share),
        estimate(arm.bytes_ratio, |value| format!("{value:.3}x")),
        estimate(arm.excess_pages, |value| format!("{value:.0}")),
        arm.versus_baseline.and_then(|versus| versus.excess_share).map_or("-".to_owned(), ratio),
        total,
        arm.total_ratio.map_or("-".to_owned(), |value| ratio(value.mean)),
        estimate(arm.downtime_ms, show_ms),
        arm.downtime_ratio.map_or("-".to_owned(), |value| ratio(value.mean)),
        share(arm.within_limit_share),
        arm.slowdown.map_or("-".to_owned(), |value| format!("{:.1} %", value.mean * 100.0)),
    ]
}

fn estimate(estimate: Option<Estimate>, show: impl Fn(f64) -> String) -> String {
    let Some(estimate) = estimate else { return "-".to_owned() };
    match estimate.half_width {
        Some(half) => format!("{} ± {}", show(estimate.mean), show(half)),
        None => show(estimate.mean),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_above_zero() {
        assert_eq!(load("0.5"), Ok(0.5));
        for text in ["0", "-1", "NaN", "inf", "half"] {
            assert!(load(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_interval_is_shown_where_there_is_one() {
        let show = |value: f64| format!("{value:.1}");
        assert_eq!(estimate(None, show), "-");
        assert_eq!(estimate(Estimate::of(&[2.0]), show), "2.0");
        assert_eq!(estimate(Estimate::of(&[2.0, 2.0]), show), "2.0 ± 0.0");
    }
}
