//! STUDY.md.

use std::fmt::Write as _;

use vmferry_core::pages::PAGE_BYTES;
use vmferry_sim::sweep::Estimate;

use crate::costs::{Costs, PredictCost};
use crate::grid::{Cell, Grid, OURS, QEMU, XEN};
use crate::guests::Guest;
use crate::quality::{Quality, predictors};
use crate::verdict::{
    EXCESS_MAX, EXCESS_MEDIAN_MAX, HOPELESS_KNOWN_MS, OverCells, Pair, Verdict, WITHIN_LIMIT_MIN, XEN_DATA_SAVED_MIN,
    XEN_TIME_SAVED_MIN, excess_ratios, mean, median, over_cells, pairs, spread,
};

/// Rows of a table of exceptions; the CSV has them all.
const EXCEPTIONS_MAX: usize = 40;
/// The bars of the costs.
const NS_PER_PAGE_MAX: f64 = 150.0;
const BYTES_PER_PAGE_MAX: f64 = 64.0;
const PLAN_MS_MAX: f64 = 150.0;

/// Why bars are missed, and what was tried, on smaller grids: this part is not measured anew by each study.
const TRIED: &str = "\
### Where a bar is not reached

- **Never above 1.0×.** The cells above are of two kinds. Where a large limit meets a fast link, what is left in the first pass fits \
the limit at once, and both send next to nothing twice; a handful of pages decides the ratio. The others are at the edge of what \
is possible: QEMU's rule ends there by a pause that is longer than allowed, vmferry waits for a lull and sends meanwhile. Not sending \
hot pages while no pause is near (those expected to be written in every fifth epoch or oftener, but for a try now and then) took \
the excess at 30 ms from 0.74 to 0.45 of QEMU's rule's in the median; with every tenth epoch as the bound it was 0.34, but fewer \
migrations ended on the target (76 % instead of 79 % of those that QEMU's rule ends).
- **Less than Xen's rule.** The table below has what a sender could save that knows the future and sends each page once: where that is \
less than the bar, no policy reaches it. What is left between vmferry and that bound are pages that had not been seen written when they were \
sent. Scans twice as often took the excess from 0.31 to 0.27 of QEMU's rule's; leaving out pages found written when their turn \
comes, from 0.31 to 0.30; half-lives of 2 to 80 epochs made no difference.

";

/// All that the study is about.
pub(crate) struct Study<'a> {
    pub(crate) guests: &'a [Guest],
    pub(crate) grid: &'a Grid,
    pub(crate) cells: &'a [Cell],
    pub(crate) predictors: &'a [Cell],
    pub(crate) observation: &'a [(u64, Vec<Cell>)],
    pub(crate) without_owners: &'a [Cell],
    pub(crate) quality: &'a [Quality],
    pub(crate) costs: Option<&'a Costs>,
}

/// The whole text.
pub(crate) fn page(study: &Study<'_>) -> String {
    let verdict = Verdict::of(study.cells);
    let mut text = String::new();
    introduction(&mut text, study);
    bars(&mut text, study, &verdict);
    text.push_str(TRIED);
    guests(&mut text, study);
    against_qemu(&mut text, study, &verdict);
    against_xen(&mut text, &verdict);
    every_arm(&mut text, study);
    losing(&mut text, study, &verdict);
    limit(&mut text, study, &verdict);
    hopeless(&mut text, &verdict);
    predictor_sweep(&mut text, study);
    prediction(&mut text, study);
    owners(&mut text, study);
    observation(&mut text, study);
    costs(&mut text, study);
    limits_of_the_study(&mut text);
    text
}

fn introduction(text: &mut String, study: &Study<'_>) {
    let Grid { loads, limits_ms, seeds, .. } = study.grid;
    let _ = writeln!(
        text,
        "# Study: does holding the working set back pay?\n\n\
         Written by `cargo xtask study`, in simulated time: the same code that migrates live guests (`vmferry-core`) on a \
         virtual clock, with writes replayed from traces. What a run costs, a policy decides and a target applies is \
         simulated; what the guests write is real where they are called recorded.\n\n\
         - **Cells.** {} guests, {} loads (mean dirty rate over link rate: {}), {} downtime limits ({} ms). Each cell is run \
         with {seeds} seeds by every arm; a seed chooses where in its trace a guest is when the migration begins, and when \
         within its epoch each page is written. All arms of a cell see the same writes.\n\
         - **Arms.** `vmferry` with its defaults; `qemu`: pre-copy in address order with QEMU's rule when to stop \
         (`migration/ram.c`); `xen`: pre-copy with the rule of Xen's toolstack, five passes or fewer than 50 pages; \
         `skip-written`: QEMU's rule without the pages written again before their turn (Clark and others, 2005); \
         `stop-and-copy`; `post-copy` with pre-paging. Zero pages are notes of a few bytes for all of them.\n\
         - **Excess.** Pages sent beyond each page once: what the optimum, which knows the future, does not send. Ratios of \
         excess are between means over the seeds with which both arms ended on the target.\n\
         - **Intervals** are 95 %: of means over seeds by Student's t distribution, of medians and means over cells by a \
         bootstrap that draws whole guests.\n\
         - Every cell's figures are in [study/cells.csv](study/cells.csv), the predictions' in \
         [study/quality.csv](study/quality.csv).\n",
        study.guests.len(),
        loads.len(),
        list(loads.iter().map(|load| format!("{load:.1}"))),
        limits_ms.len(),
        list(limits_ms.iter().map(u64::to_string)),
    );
}

fn bars(text: &mut String, study: &Study<'_>, verdict: &Verdict<'_>) {
    text.push_str(
        "## What was to be shown, and what came out\n\n| to be shown | came out | reached |\n|---|---|---|\n",
    );
    let mut row = |bar: &str, outcome: String, reached: bool| {
        let _ = writeln!(text, "| {bar} | {outcome} | {} |", if reached { "yes" } else { "**no**" });
    };
    let [all, recorded, generated] = &verdict.excess;
    row(
        &format!("excess at most {EXCESS_MEDIAN_MAX}× that of QEMU's rule, in the median over cells that converge"),
        format!("{}; recorded guests {}, generated {}", interval(all), interval(recorded), interval(generated)),
        all.is_some_and(|all| all.value <= EXCESS_MEDIAN_MAX),
    );
    let worse: Vec<&Pair<'_>> = verdict.worse_than_qemu().into_iter().filter(|pair| pair.cell.recorded).collect();
    let recorded_cells = verdict.against_qemu.iter().filter(|pair| pair.cell.recorded).count();
    let breaks_limit = |pair: &&&Pair<'_>| pair.cell.arm(QEMU).within_limit_share == Some(0.0);
    let broken = worse.iter().filter(|pair| !pair.has_little_to_save()).filter(breaks_limit).count();
    let little = worse.iter().filter(|pair| pair.has_little_to_save()).count();
    row(
        &format!("never above {EXCESS_MAX:.1}× in a cell of a recorded guest"),
        format!(
            "above in {} of {recorded_cells} cells; in {little} of these QEMU's rule sends less than 0.2 % of the guest twice, and \
             in {broken} of the others it does not keep the limit with any seed",
            worse.len()
        ),
        worse.is_empty(),
    );
    let saved = |over: &Option<OverCells>, possible: &Option<OverCells>| {
        format!("{}; a sender that knows the future would save {}", percent_interval(over), percent_interval(possible))
    };
    row(
        "30 % less data than Xen's rule, on average",
        saved(&verdict.xen_data_saved, &verdict.xen_data_possible),
        verdict.xen_data_saved.is_some_and(|saved| saved.value >= XEN_DATA_SAVED_MIN),
    );
    row(
        "20 % less total time than Xen's rule, on average",
        saved(&verdict.xen_time_saved, &verdict.xen_time_possible),
        verdict.xen_time_saved.is_some_and(|saved| saved.value >= XEN_TIME_SAVED_MIN),
    );
    let (kept, ended) = verdict.within_limit;
    row(
        "downtime within the limit in 95 % of what converges",
        format!("{kept} of {ended} runs, {}", percent(kept as f64 / ended.max(1) as f64)),
        kept as f64 >= WITHIN_LIMIT_MIN * ended as f64,
    );
    let known = verdict.hopeless_known();
    row(
        "cells that no schedule can meet are recognised within 10 s",
        format!("{known} of {} cells, with every seed", verdict.hopeless.len()),
        known == verdict.hopeless.len(),
    );
    if let Some(costs) = study.costs {
        let time = costs.predict.iter().filter(|row| is_default_at(row, 1e6)).map(|row| row.ns_per_page);
        let (time, memory) = (
            most(time),
            most(costs.predict.iter().filter(|row| is_default_at(row, 1e6)).map(|row| row.bytes_per_page)),
        );
        let plan = most(costs.plan.iter().filter(|row| near(row.written_pages, 1e6)).map(|row| row.scan_ms));
        row(
            "150 ns for each page written in an epoch, 1,000,000 hot pages",
            format!("at most {time:.0} ns"),
            time <= NS_PER_PAGE_MAX,
        );
        row("64 bytes for each page known", format!("at most {memory:.0} bytes"), memory <= BYTES_PER_PAGE_MAX);
        row(
            "a plan in under 150 ms, for 1 TiB and 1,000,000 pages written in an epoch",
            format!("at most {plan:.0} ms"),
            plan < PLAN_MS_MAX,
        );
    }
    text.push('\n');
}

fn guests(text: &mut String, study: &Study<'_>) {
    text.push_str(
        "## The guests\n\nThe recorded ones are real programs under an emulated processor; recordings/README.md says what they \
         do and how they were recorded. Their dirty rates are what that processor reaches; the loads of the grid make \
         links in proportion.\n\n| guest | kind | RAM | zero | recorded | mean dirty rate | pages ever written |\n\
         |---|---|---:|---:|---:|---:|---:|\n",
    );
    for guest in study.guests {
        let trace = &guest.trace;
        let zero: u64 = trace.zero.iter().map(|run| run.count).sum();
        let _ = writeln!(
            text,
            "| {} | {} | {} MiB | {} | {:.0} s | {:.1} MB/s | {} |",
            guest.name(),
            guest.kind(),
            (trace.pages * PAGE_BYTES) >> 20,
            percent(zero as f64 / trace.pages as f64),
            trace.duration().as_secs_f64(),
            trace.dirty_pages_per_s() * PAGE_BYTES as f64 / 1e6,
            trace.distinct_pages(),
        );
    }
    text.push('\n');
}

fn against_qemu(text: &mut String, study: &Study<'_>, verdict: &Verdict<'_>) {
    text.push_str(
        "## Against pre-copy with QEMU's rule\n\n![excess over QEMU's](study/excess.svg)\n\n\
         Excess over that of QEMU's rule: median [quartiles] over the guests.\n\n",
    );
    over_load(text, study, &verdict.against_qemu, |pair| pair.excess_ratio());
    text.push_str("\n![total time](study/time.svg)\n\nTotal time over that of QEMU's rule: median [quartiles] over the guests.\n\n");
    over_load(text, study, &verdict.against_qemu, |pair| Some(pair.time_ratio()));
    text.push_str("\nBy guest, over all its cells: median [quartiles].\n\n| guest | excess | total time | page bytes | downtime |\n|---|---|---|---|---|\n");
    for (index, guest) in study.guests.iter().enumerate() {
        let here: Vec<&Pair<'_>> = verdict.against_qemu.iter().filter(|pair| pair.cell.guest == index).collect();
        let column =
            |ratio: fn(&Pair<'_>) -> Option<f64>| quartiles(here.iter().filter_map(|pair| ratio(pair)).collect());
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            guest.name(),
            column(|pair| pair.excess_ratio()),
            column(|pair| Some(pair.time_ratio())),
            column(|pair| Some(pair.data_ratio())),
            column(|pair| Some(pair.downtime_ms.0 / pair.downtime_ms.1)),
        );
    }
    text.push_str(
        "\nQEMU's rule takes no account of what a pause costs besides pages (the device state, saving, loading, resuming), so \
         that its pauses are longer than the limit more often than not; vmferry has less room in the same limit, and keeps it.\n\n",
    );
}

/// A table of a ratio, load by limit.
fn over_load(text: &mut String, study: &Study<'_>, pairs: &[Pair<'_>], ratio: fn(&Pair<'_>) -> Option<f64>) {
    let Grid { loads, limits_ms, .. } = study.grid;
    let _ = writeln!(
        text,
        "| load | {} |",
        limits_ms.iter().map(|limit| format!("limit {limit} ms")).collect::<Vec<_>>().join(" | ")
    );
    let _ = writeln!(text, "|---|{}", "---|".repeat(limits_ms.len()));
    for &load in loads {
        let _ = write!(text, "| {load:.1} |");
        for &limit in limits_ms {
            let here = pairs.iter().filter(|pair| near(pair.cell.load, load) && pair.cell.limit_ms == limit as f64);
            let _ = write!(text, " {} |", quartiles(here.filter_map(ratio).collect()));
        }
        text.push('\n');
    }
}

fn against_xen(text: &mut String, verdict: &Verdict<'_>) {
    text.push_str("## Against pre-copy with Xen's rule\n\n");
    let _ = writeln!(
        text,
        "Over the {} cells in which both end on the target: {} less data and {} less total time on average. Each page once and no \
         more would be {} less data; the shortest total time with a pause within the limit {} less. Xen's rule stops after \
         five passes whatever is left, so it sends little more than each page once where a link is fast, and pauses for as long \
         as it takes where it is slow. Where the bar of 30 % is out of reach, it is so for every schedule: at a load below 1 \
         five passes resend less than a third of the guest.\n",
        verdict.against_xen.len(),
        percent_interval(&verdict.xen_data_saved),
        percent_interval(&verdict.xen_time_saved),
        percent_interval(&verdict.xen_data_possible),
        percent_interval(&verdict.xen_time_possible),
    );
    text.push_str("By load:\n\n| load | less data | possible | less time | Xen's pause within the limit |\n|---|---|---|---|---|\n");
    let mut loads: Vec<f64> = verdict.against_xen.iter().map(|pair| pair.cell.load).collect();
    loads.sort_by(f64::total_cmp);
    loads.dedup_by(|a, b| near(*a, *b));
    for load in loads {
        let here: Vec<&Pair<'_>> = verdict.against_xen.iter().filter(|pair| near(pair.cell.load, load)).collect();
        let mut data: Vec<f64> = here.iter().map(|pair| 1.0 - pair.data_ratio()).collect();
        let mut times: Vec<f64> = here.iter().map(|pair| 1.0 - pair.time_ratio()).collect();
        let mut possible: Vec<f64> =
            here.iter().filter_map(|pair| Some(1.0 - 1.0 / pair.cell.arm(XEN).bytes_ratio.as_ref()?.mean)).collect();
        let mut within: Vec<f64> = here.iter().filter_map(|pair| pair.cell.arm(XEN).within_limit_share).collect();
        let _ = writeln!(
            text,
            "| {load:.1} | {} | {} | {} | {} |",
            percent(mean(&mut data)),
            percent(mean(&mut possible)),
            percent(mean(&mut times)),
            percent(mean(&mut within))
        );
    }
    text.push('\n');
}

/// Means of an arm's estimates over cells.
fn over_arm(cells: &[&Cell], arm: &str, value: fn(&vmferry_sim::sweep::ArmReport) -> Option<f64>) -> String {
    let mut values: Vec<f64> = cells.iter().filter_map(|cell| value(cell.arm(arm))).collect();
    if values.is_empty() { "–".to_owned() } else { format!("{:.3}", mean(&mut values)) }
}

fn mean_of(estimate: &Option<Estimate>) -> Option<f64> {
    estimate.as_ref().map(|estimate| estimate.mean)
}

fn every_arm(text: &mut String, study: &Study<'_>) {
    text.push_str(
        "## All arms\n\nMeans over all cells in which some schedule can meet the limit from every start. Bytes: page bytes over each \
         page once. Time and downtime: over the shortest possible. Slow-down: the share of its time that the guest lost \
         while it ran, to tracking or waiting for pages.\n\n\
         | arm | ended on the target | within the limit | bytes | time | downtime | slow-down |\n|---|---|---|---|---|---|---|\n",
    );
    let feasible: Vec<&Cell> = study.cells.iter().filter(|cell| cell.feasible_share == 1.0).collect();
    let Some(first) = feasible.first() else { return };
    for arm in first.arms.iter().map(|arm| arm.arm.as_str()) {
        let column = |value| over_arm(&feasible, arm, value);
        let _ = writeln!(
            text,
            "| `{arm}` | {} | {} | {} | {} | {} | {} |",
            column(|arm| arm.converged_share),
            column(|arm| arm.within_limit_share),
            column(|arm| mean_of(&arm.bytes_ratio)),
            column(|arm| mean_of(&arm.total_ratio)),
            column(|arm| mean_of(&arm.downtime_ratio)),
            column(|arm| mean_of(&arm.slowdown)),
        );
    }
    text.push_str(
        "\nPost-copy's time and downtime are compared with an optimum of its own, which may move the guest before its memory; it \
         never misses a limit, and its guest waits for the network instead: its slow-down is that of the time until all pages \
         are there.\n\n",
    );
}

fn losing(text: &mut String, study: &Study<'_>, verdict: &Verdict<'_>) {
    text.push_str("## Where vmferry loses\n\n");
    let worse = verdict.worse_than_qemu();
    let _ = writeln!(
        text,
        "**More sent twice than by QEMU's rule**: {} of {} cells, {} of them with a recorded guest. In {} QEMU's rule sends less \
         than 0.2 % of the guest twice, because what is left of it in the first pass fits the limit: there both are as good \
         as done.\n",
        worse.len(),
        verdict.against_qemu.len(),
        worse.iter().filter(|pair| pair.cell.recorded).count(),
        worse.iter().filter(|pair| pair.has_little_to_save()).count(),
    );
    let many: Vec<&Pair<'_>> = worse.iter().copied().filter(|pair| !pair.has_little_to_save()).collect();
    exceptions(text, "pages twice | QEMU's | downtime | QEMU's", &many, |pair| {
        let (excess, downtime) = (pair.excess_pages, pair.downtime_ms);
        (pair.cell, format!("{:.0} | {:.0} | {:.0} ms | {:.0} ms", excess.0, excess.1, downtime.0, downtime.1))
    });

    let behind = |cell: &&Cell| {
        let share = |arm: &str| cell.arm(arm).converged_share.unwrap_or(0.0);
        share(OURS) < share(QEMU)
    };
    let mut behind: Vec<&Cell> = study.cells.iter().filter(behind).collect();
    let kept = |cell: &&&Cell| cell.arm(QEMU).within_limit_share.unwrap_or(0.0) > 0.0;
    let _ = writeln!(
        text,
        "\n**Fewer migrations ended on the target than with QEMU's rule**: {} of {} cells. In {} of these a run of QEMU's rule was \
         within the limit; in the others it ended by a longer pause than allowed.\n",
        behind.len(),
        study.cells.len(),
        behind.iter().filter(kept).count(),
    );
    behind.sort_by_key(|cell| !kept(&cell));
    let columns = "ended here | with QEMU's rule | of those within the limit | QEMU's downtime | possible from";
    exceptions(text, columns, &behind, |&cell| {
        let qemu = cell.arm(QEMU);
        let values = format!(
            "{} | {} | {} | {} | {} of the starts",
            percent(cell.arm(OURS).converged_share.unwrap_or(0.0)),
            percent(qemu.converged_share.unwrap_or(0.0)),
            percent(qemu.within_limit_share.unwrap_or(0.0)),
            mean_of(&qemu.downtime_ms).map_or_else(|| "–".to_owned(), |ms| format!("{ms:.0} ms")),
            percent(cell.feasible_share),
        );
        (cell, values)
    });

    let mut slower: Vec<&Pair<'_>> = verdict.against_qemu.iter().filter(|pair| pair.time_ratio() > 1.02).collect();
    let _ = writeln!(
        text,
        "\n**More than 2 % slower than with QEMU's rule**: {} of {} cells.\n",
        slower.len(),
        verdict.against_qemu.len()
    );
    slower.sort_by(|a, b| b.time_ratio().total_cmp(&a.time_ratio()));
    exceptions(text, "total time | QEMU's | downtime | QEMU's", &slower, |pair| {
        let (total_s, downtime) = ((pair.total_ms.0 / 1e3, pair.total_ms.1 / 1e3), pair.downtime_ms);
        (pair.cell, format!("{:.1} s | {:.1} s | {:.0} ms | {:.0} ms", total_s.0, total_s.1, downtime.0, downtime.1))
    });
    text.push('\n');
}

/// A table of exceptions, if there are any. `row` says which cell one is about, and what is in the further columns.
fn exceptions<'a, T>(text: &mut String, columns: &str, all: &[T], row: impl Fn(&T) -> (&'a Cell, String)) {
    if all.is_empty() {
        return;
    }
    let _ = writeln!(text, "| guest | load | limit | {columns} |");
    let _ = writeln!(text, "|---|---|---|{}", "---|".repeat(columns.split(" | ").count()));
    for (cell, values) in all.iter().take(EXCEPTIONS_MAX).map(row) {
        let _ = writeln!(text, "| {} | {:.1} | {:.0} ms | {values} |", cell.name, cell.load, cell.limit_ms);
    }
    if all.len() > EXCEPTIONS_MAX {
        let _ = writeln!(text, "\n{} more are in the table of all cells.", all.len() - EXCEPTIONS_MAX);
    }
}

fn limit(text: &mut String, study: &Study<'_>, verdict: &Verdict<'_>) {
    let (kept, ended) = verdict.within_limit;
    let (qemu_kept, qemu_ended) = verdict.qemu_within_limit;
    let _ = writeln!(
        text,
        "## Downtime within the limit\n\n![downtime](study/downtime.svg)\n\n{kept} of {ended} runs of vmferry kept the limit ({}), \
         {qemu_kept} of {qemu_ended} of QEMU's rule ({}).",
        percent(kept as f64 / ended.max(1) as f64),
        percent(qemu_kept as f64 / qemu_ended.max(1) as f64),
    );
    let beyond: Vec<&Cell> =
        study.cells.iter().filter(|cell| cell.arm(OURS).within_limit_share.is_some_and(|share| share < 1.0)).collect();
    if !beyond.is_empty() {
        text.push_str("The exceptions:\n\n");
    }
    exceptions(text, "within it | mean downtime | longest", &beyond, |&cell| {
        let ours = cell.arm(OURS);
        let values = format!(
            "{} | {} | {:.0} ms",
            percent(ours.within_limit_share.unwrap_or(0.0)),
            mean_of(&ours.downtime_ms).map_or_else(|| "–".to_owned(), |ms| format!("{ms:.0} ms")),
            most(ours.runs.iter().filter(|run| run.converged).map(|run| run.downtime_ms)),
        );
        (cell, values)
    });
    text.push('\n');
}

fn hopeless(text: &mut String, verdict: &Verdict<'_>) {
    let _ = writeln!(
        text,
        "## Cells that no schedule can meet\n\nIn {} cells the optimum finds no moment, from any start, at which even a sender that \
         knows the future could pause within the limit; it looks as far ahead as three passes over the guest take on the \
         slowest link of the grid, and 30 s at least. vmferry gave up within {:.0} s in {} of them with every \
         seed.\n",
        verdict.hopeless.len(),
        HOPELESS_KNOWN_MS / 1e3,
        verdict.hopeless_known(),
    );
    if verdict.hopeless.is_empty() {
        return;
    }
    exceptions(text, "gave up | after | latest", &verdict.hopeless, |&cell| {
        let ours = cell.arm(OURS);
        let given_up: Vec<f64> = ours.runs.iter().filter_map(|run| run.given_up_ms).collect();
        let values = format!(
            "{} of {} | {} | {:.1} s",
            given_up.len(),
            ours.runs.len(),
            mean_of(&ours.given_up_ms).map_or_else(|| "–".to_owned(), |ms| format!("{:.1} s", ms / 1e3)),
            most(given_up.iter().copied()) / 1e3,
        );
        (cell, values)
    });
    text.push('\n');
}

fn predictor_sweep(text: &mut String, study: &Study<'_>) {
    let Grid { few_loads, few_limits_ms, few_seeds, .. } = study.grid;
    let _ = writeln!(
        text,
        "## Predictors under vmferry's policy\n\nLoads {}, limits {} ms, {few_seeds} seeds; all guests. Excess and total time over \
         those of QEMU's rule, medians [quartiles] over the cells in which both end on the target.\n\n\
         | predictor | ended on the target | excess, recorded | excess, generated | total time | downtime over the limit |\n\
         |---|---|---|---|---|---|",
        list(few_loads.iter().map(|load| format!("{load:.1}"))),
        list(few_limits_ms.iter().map(u64::to_string)),
    );
    let Some(first) = study.predictors.first() else { return };
    for arm in first.arms.iter().map(|arm| arm.arm.as_str()).filter(|arm| *arm != QEMU) {
        let of_arm = pairs(study.predictors, arm, QEMU);
        let excess = |recorded: bool| {
            let here = of_arm.iter().filter(|pair| pair.cell.recorded == recorded);
            quartiles(here.filter_map(Pair::excess_ratio).collect())
        };
        let cells: Vec<&Cell> = study.predictors.iter().collect();
        let name = if arm == OURS { "lcbst (default)" } else { arm.trim_start_matches("vmferry/") };
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {} |",
            over_arm(&cells, arm, |arm| arm.converged_share),
            excess(true),
            excess(false),
            quartiles(of_arm.iter().map(Pair::time_ratio).collect()),
            quartiles(of_arm.iter().map(|pair| pair.downtime_ms.0 / pair.cell.limit_ms).collect()),
        );
    }
    text.push('\n');
}

fn prediction(text: &mut String, study: &Study<'_>) {
    text.push_str(
        "## How well pages are predicted\n\nR-precision: of as many hottest pages as were written in the next 300 ms, the share \
         that was. In brackets precision and recall of the pages for a pause of 100 ms at load 1.\n\n| predictor |",
    );
    for guest in study.guests {
        let _ = write!(text, " {} |", guest.name());
    }
    text.push_str(" mean |\n|---|");
    text.push_str(&"---|".repeat(study.guests.len() + 1));
    text.push('\n');
    for spec in predictors() {
        let name = spec.to_string();
        let _ = write!(text, "| {name} |");
        let of_predictor: Vec<&Quality> = study.quality.iter().filter(|quality| quality.predictor == name).collect();
        for quality in &of_predictor {
            let Quality { r_precision, precision, recall, .. } = quality;
            let _ = write!(text, " {r_precision:.2} ({precision:.2}, {recall:.2}) |");
        }
        let mut all: Vec<f64> = of_predictor.iter().map(|quality| quality.r_precision).collect();
        let _ = writeln!(text, " {:.3} |", mean(&mut all));
    }
    text.push('\n');
}

fn owners(text: &mut String, study: &Study<'_>) {
    text.push_str(
        "## One tree for each process\n\nThe paper keeps a tree for each process. Recorded guests on the smaller grid, with their \
         pages counted owner by owner and all together: excess and total time over those of QEMU's rule, medians with their \
         intervals.\n\n| trees | excess | total time |\n|---|---|---|\n",
    );
    let recorded: Vec<Cell> = study.predictors.iter().filter(|cell| cell.recorded).cloned().collect();
    for (name, cells) in [("one for each process", &recorded[..]), ("one", study.without_owners)] {
        let of_arm = pairs(cells, OURS, QEMU);
        let times: Vec<(usize, f64)> = of_arm.iter().map(|pair| (pair.cell.guest, pair.time_ratio())).collect();
        let _ = writeln!(
            text,
            "| {name} | {} | {} |",
            interval(&over_cells(&excess_ratios(&of_arm), median)),
            interval(&over_cells(&times, median)),
        );
    }
    text.push('\n');
}

fn observation(text: &mut String, study: &Study<'_>) {
    text.push_str(
        "## Watching before sending\n\nThe paper's framework has a phase of pre-processing, in which the guest is only watched. \
         What it gains and costs, over the same smaller grid, in relation to QEMU's rule:\n\n\
         | watched | excess: median | total time: median | total time: mean |\n|---|---|---|---|\n",
    );
    for (observe_ms, cells) in study.observation {
        let of_arm = pairs(cells, OURS, QEMU);
        let times: Vec<(usize, f64)> = of_arm.iter().map(|pair| (pair.cell.guest, pair.time_ratio())).collect();
        let _ = writeln!(
            text,
            "| {observe_ms} ms | {} | {} | {} |",
            interval(&over_cells(&excess_ratios(&of_arm), median)),
            interval(&over_cells(&times, median)),
            interval(&over_cells(&times, mean)),
        );
    }
    text.push_str(
        "\nThe push watches too: what is learned in its first epochs comes in time for nearly all pages. So the default is not to \
         watch first.\n\n",
    );
}

fn costs(text: &mut String, study: &Study<'_>) {
    text.push_str("## What prediction and planning cost\n\n");
    let Some(costs) = study.costs else {
        text.push_str(
            "Not measured: there are no results of `cargo xtask bench predict -- --csv` and `cargo xtask bench plan -- --csv`.\n\n",
        );
        return;
    };
    text.push_str(
        "![costs](study/cost.svg)\n\nProcessor time on the machine of the benches: medians, in brackets the least. \
         `cargo xtask bench predict` and `cargo xtask bench plan` say what the workloads and phases are; \
         [study/cost_predict.csv](study/cost_predict.csv) and [study/cost_plan.csv](study/cost_plan.csv) have all rows.\n\n\
         | default predictor, workload | hot pages | time for each page written | memory for each page known |\n|---|---:|---:|---:|\n",
    );
    for row in costs.predict.iter().filter(|row| row.predictor == "lcbst") {
        let _ = writeln!(
            text,
            "| {} | {:.0} | {:.0} ns [{:.0}] | {:.0} bytes |",
            row.workload, row.hot_pages, row.ns_per_page, row.ns_per_page_least, row.bytes_per_page
        );
    }
    text.push_str("\n| plan, workload | phase | pages written per epoch | time of a scan | predictor |\n|---|---|---:|---:|---:|\n");
    for row in &costs.plan {
        let _ = writeln!(
            text,
            "| {} | {} | {:.0} | {:.1} ms [{:.1}] | {:.0} MB |",
            row.workload,
            row.phase,
            row.written_pages,
            row.scan_ms,
            row.scan_least_ms,
            row.predictor_bytes / 1e6
        );
    }
    text.push('\n');
}

fn limits_of_the_study(text: &mut String) {
    text.push_str(
        "## What the study cannot say\n\n\
         - The recorded guests ran under an emulated processor, up to some tens of times slower than a real one: their patterns \
         are real, their rates are not, which is why links are given in proportion.\n\
         - A trace has one bit for each page and epoch. How often a page is written in 50 ms, and in which order, is drawn.\n\
         - The guest does not slow down in a replay: no arm gains by a slower guest, as a real one does a little by tracking.\n\
         - Pages are sent whole. Compression and deltas change what a page costs, not which page is sent when.\n\
         - A trace that is shorter than the migration begins again at its end.\n",
    );
}

/// Whether it is a row of the default predictor with so many hot pages. With new pages in each epoch there are none.
fn is_default_at(row: &PredictCost, pages: f64) -> bool {
    row.predictor == "lcbst" && row.workload != "churn" && near(row.hot_pages, pages)
}

fn near(value: f64, other: f64) -> bool {
    (value - other).abs() <= 0.01 * other.abs()
}

/// The greatest; 0 of nothing.
fn most(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, f64::max)
}

fn list(words: impl Iterator<Item = String>) -> String {
    words.collect::<Vec<_>>().join(", ")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A value with its interval.
fn interval(over: &Option<OverCells>) -> String {
    let of =
        |OverCells { value, low, high, cells }: &OverCells| format!("{value:.2} [{low:.2}, {high:.2}] ({cells} cells)");
    over.as_ref().map_or_else(|| "no cell".to_owned(), of)
}

fn percent_interval(over: &Option<OverCells>) -> String {
    let of = |over: &OverCells| format!("{} [{}, {}]", percent(over.value), percent(over.low), percent(over.high));
    over.as_ref().map_or_else(|| "no cell".to_owned(), of)
}

/// Median and quartiles.
fn quartiles(values: Vec<f64>) -> String {
    let show = |value: f64| if value.is_finite() { format!("{value:.2}") } else { "∞".to_owned() };
    spread(values).map_or_else(
        || "–".to_owned(),
        |of| format!("{} [{}, {}]", show(of.median), show(of.quartile_1), show(of.quartile_3)),
    )
}
