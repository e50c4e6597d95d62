//! A sweep as one HTML page: tables, plots and the figures themselves. It loads nothing and runs nothing.
//!
//! The plots are SVG of our own (`chart`). The page's figures stand in it once more as JSON, in the `script` element with
//! the id `data`, for whoever wants to work with them.

mod chart;
mod markup;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use vmferry_core::pages::PAGE_BYTES;

use self::chart::{Bar, Bars, Line, Lines, Point, legend, series_class};
use self::markup::{bytes, escape, json_in_script, number, percent, thousands, time};
use crate::Sample;
use crate::sweep::{ArmReport, CellReport, Estimate, SweepReport};

/// The most cells whose course over time is drawn; tables and bars are there for all.
pub const MAX_DRAWN_CELLS: usize = 100;
/// So many cells are unfolded when the page opens.
const OPEN_CELLS: usize = 4;

const STYLE: &str = include_str!("style.css");

/// The page. `json` is the report, or more, as JSON: what the page embeds for others.
pub fn page(report: &SweepReport, json: &str) -> String {
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>Simulated migrations</title><style>{STYLE}</style></head>\n\
         <body>\n"
    );
    introduction(&mut html, report);
    traces(&mut html, report);
    let mut number = 0;
    for (index, trace) in report.traces.iter().enumerate() {
        let _ = writeln!(html, "<h2>{}</h2>", escape(&trace.name));
        html.push_str(&legend(report.arms.iter().map(String::as_str)));
        let cells: Vec<&CellReport> = report.cells.iter().filter(|cell| cell.trace == index).collect();
        over_load(&mut html, report, &cells);
        for cell in cells {
            let _ = writeln!(html, "<details{}>", if number < OPEN_CELLS { " open" } else { "" });
            cell_section(&mut html, cell, number < MAX_DRAWN_CELLS);
            html.push_str("</details>\n");
            number += 1;
        }
    }
    explanation(&mut html);
    let _ = writeln!(
        html,
        "<script type=\"application/json\" id=\"data\">{}</script>\n</body></html>",
        json_in_script(json)
    );
    html
}

fn introduction(html: &mut String, report: &SweepReport) {
    let facts = &report.scenario;
    let _ = writeln!(
        html,
        "<h1>Simulated migrations</h1>\n<p class=\"muted\">{} runs: {}, {} cells, {} seeds each; compared with {}. \
         Link latency {} each way, a scan every {}, {} of watching before a predicted migration; given up after {} at \
         the latest.</p>",
        report.done_runs,
        escape(&report.arms.join(", ")),
        report.cells.len(),
        report.seeds,
        escape(&report.baseline),
        time(facts.latency_ms),
        time(facts.epoch_ms),
        time(facts.observe_ms),
        time(facts.time_limit_ms),
    );
    if report.done_runs < report.planned_runs {
        let _ = writeln!(
            html,
            "<p class=\"note\">The sweep was ended after {} of {} runs. Intervals are wider than they were meant to be, and \
             some cells may be empty.</p>",
            report.done_runs, report.planned_runs
        );
    }
    if report.cells.len() > MAX_DRAWN_CELLS {
        let _ = writeln!(
            html,
            "<p class=\"note\">The course over time is drawn for the first {MAX_DRAWN_CELLS} cells.</p>"
        );
    }
}

fn traces(html: &mut String, report: &SweepReport) {
    html.push_str(
        "<div class=\"wide\"><table><thead><tr><th>Trace</th><th>Guest</th><th>Zero</th><th>Recorded</th><th>Epoch</th>\
         <th>Mean dirty rate</th></tr></thead><tbody>",
    );
    for trace in &report.traces {
        let size = |pages: u64| bytes(pages as f64 * PAGE_BYTES as f64);
        let _ = write!(
            html,
            "<tr><td class=\"name\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}/s</td></tr>",
            escape(&trace.name),
            size(trace.pages),
            size(trace.zero_pages),
            time(trace.duration_ms),
            time(trace.epoch_ms),
            bytes(trace.dirty_bytes_per_s)
        );
    }
    html.push_str("</tbody></table></div>\n");
}

/// Each limit's figures over the load, where there are several links.
fn over_load(html: &mut String, report: &SweepReport, cells: &[&CellReport]) {
    let mut limits: Vec<f64> = cells.iter().map(|cell| cell.downtime_limit_ms).collect();
    limits.dedup();
    limits.sort_by(f64::total_cmp);
    limits.dedup();
    for limit in limits {
        let mut cells: Vec<&CellReport> =
            cells.iter().copied().filter(|cell| cell.downtime_limit_ms == limit).collect();
        if cells.len() < 2 {
            continue;
        }
        cells.sort_by(|a, b| a.load.total_cmp(&b.load));
        let _ = writeln!(html, "<h3>Over the load, downtime limit {}</h3>\n<div class=\"charts four\">", time(limit));
        let plot = |title, unit, factor: f64, reference, value: fn(&ArmReport) -> Option<Estimate>| {
            let line = |(index, name)| {
                let points = cells.iter().filter_map(|cell| {
                    let estimate = value(&cell.arms[index])?;
                    let half_width = estimate.half_width.unwrap_or(0.0) * factor;
                    Some(Point { x: cell.load, y: estimate.mean * factor, half_width })
                });
                Line { name, class: series_class(index), points: points.collect() }
            };
            let lines = report.arms.iter().map(String::as_str).enumerate().map(line).collect();
            let x_label = "dirty rate / link rate";
            Lines { title, unit, x_label, reach_x: 0.0, lines, reference, marked: true }.svg()
        };
        html.push_str(&plot("Page bytes", "each page once = 1", 1.0, Some((1.0, "optimum")), |arm| arm.bytes_ratio));
        html.push_str(&plot("Total time", "s", 1e-3, None, |arm| arm.total_ms));
        html.push_str(&plot("Downtime", "ms", 1.0, Some((limit, "limit")), |arm| arm.downtime_ms));
        html.push_str(&plot("Converged", "share of runs", 1.0, None, |arm| {
            arm.converged_share.map(|mean| Estimate { count: arm.runs.len(), mean, half_width: None })
        }));
        html.push_str("</div>\n");
    }
}

fn cell_section(html: &mut String, cell: &CellReport, drawn: bool) {
    let _ = writeln!(
        html,
        "<summary>Link {}/s, load {}, downtime limit {}</summary>",
        bytes(cell.bandwidth_bytes_per_s as f64),
        number(cell.load),
        time(cell.downtime_limit_ms)
    );
    match cell.feasible_share {
        Some(share) if share < 1.0 => {
            let _ = writeln!(
                html,
                "<p class=\"note\">From {} of the starts, no schedule meets the limit within the time looked at, even one \
                 that knows all writes to come.</p>",
                percent(1.0 - share)
            );
        }
        Some(_) | None => {}
    }
    table(html, cell);
    html.push_str("<div class=\"charts\">");
    html.push_str(&bars(cell, "Page bytes", "each page once = 1", 1.0, Some((1.0, "optimum")), |arm| arm.bytes_ratio));
    let optimum = cell.optimum_total_ms.map(|estimate| (estimate.mean / 1e3, "optimum"));
    html.push_str(&bars(cell, "Total time", "s", 1e-3, optimum, |arm| arm.total_ms));
    html.push_str(&bars(cell, "Downtime", "ms", 1.0, Some((cell.downtime_limit_ms, "limit")), |arm| arm.downtime_ms));
    html.push_str("</div>\n");
    if drawn && cell.arms.iter().any(|arm| !arm.series.is_empty()) {
        html.push_str("<div class=\"charts\">");
        html.push_str(&remaining(cell));
        html.push_str(&held(cell));
        html.push_str("</div>\n");
    }
}

fn bars(
    cell: &CellReport,
    title: &str,
    unit: &str,
    factor: f64,
    reference: Option<(f64, &str)>,
    value: fn(&ArmReport) -> Option<Estimate>,
) -> String {
    let row = |arm: &'_ ArmReport| -> (Option<Estimate>, String) {
        let scaled = value(arm).map(|estimate| Estimate {
            mean: estimate.mean * factor,
            half_width: estimate.half_width.map(|half| half * factor),
            ..estimate
        });
        let converged = arm.runs.iter().filter(|run| run.converged).count();
        let remark = match scaled {
            None if arm.runs.is_empty() => "not run".to_owned(),
            None => "no convergence".to_owned(),
            Some(_) if converged < arm.runs.len() => format!("{converged} of {}", arm.runs.len()),
            Some(_) => String::new(),
        };
        (scaled, remark)
    };
    let rows = cell.arms.iter().map(|arm| {
        let (value, remark) = row(arm);
        Bar { name: &arm.arm, value, remark }
    });
    Bars { title, unit, rows: rows.collect(), reference }.svg()
}

/// The arms' courses: so many pages at each sample, in MB.
fn courses(cell: &CellReport, pages: fn(&Sample) -> u64) -> Vec<Line<'_>> {
    let point = |sample: &Sample| Point {
        x: sample.at_ms / 1e3,
        y: pages(sample) as f64 * PAGE_BYTES as f64 / 1e6,
        half_width: 0.0,
    };
    let mut lines = Vec::new();
    for (index, arm) in cell.arms.iter().enumerate() {
        let points = arm.series.iter().map(point).collect();
        lines.push(Line { name: &arm.arm, class: series_class(index), points });
    }
    lines
}

/// What the target lacks, over time, beside what it must lack.
fn remaining(cell: &CellReport) -> String {
    let mut lines = courses(cell, |sample| sample.pending_pages);
    // The bound holds for all arms as long as the guest runs: that of the arm which left it running the longest.
    let bound = cell
        .arms
        .iter()
        .filter(|arm| arm.series.iter().any(|sample| sample.least_left_bytes.is_some()))
        .max_by(|a, b| end_ms(a).total_cmp(&end_ms(b)));
    if let Some(arm) = bound {
        let points = arm.series.iter().filter_map(|sample| {
            Some(Point { x: sample.at_ms / 1e3, y: sample.least_left_bytes? / 1e6, half_width: 0.0 })
        });
        lines.push(Line {
            name: "least that any schedule can have left",
            class: "s7 d2".to_owned(),
            points: points.collect(),
        });
    }
    let unit = "MB the target lacks; first seed; dotted: the least that any schedule leaves";
    let reach_x = cell_end_s(cell);
    Lines { title: "Remaining over time", unit, x_label: "s", reach_x, lines, reference: None, marked: false }.svg()
}

/// What is held back, over time; nothing if no arm held anything back.
fn held(cell: &CellReport) -> String {
    let mut lines = courses(cell, |sample| sample.held_pages);
    // A line along the axis would say no more than that it is missing does.
    lines.retain(|line| line.points.iter().any(|point| point.y > 0.0));
    if lines.is_empty() {
        return String::new();
    }
    let unit = "MB of working set; first seed; an arm without a line holds nothing back";
    let reach_x = cell_end_s(cell);
    Lines { title: "Held back over time", unit, x_label: "s", reach_x, lines, reference: None, marked: false }.svg()
}

/// How far the axis of a cell's courses reaches: as far in each, so that they can be compared.
fn cell_end_s(cell: &CellReport) -> f64 {
    cell.arms.iter().map(end_ms).fold(0.0, f64::max) / 1e3
}

fn end_ms(arm: &ArmReport) -> f64 {
    arm.series.last().map_or(0.0, |sample| sample.at_ms)
}

fn table(html: &mut String, cell: &CellReport) {
    html.push_str(
        "<div class=\"wide\"><table><thead><tr><th>Arm</th><th>Converged</th><th>Page bytes<br><small>/ optimum</small></th>\
         <th>Excess pages</th><th>Excess<br><small>/ baseline's</small></th><th>Total time</th>\
         <th>Total<br><small>/ optimum</small></th><th>Total<br><small>less baseline</small></th><th>Downtime</th>\
         <th>Downtime<br><small>/ optimum</small></th><th>Limit kept</th><th>Guest lost</th></tr></thead><tbody>",
    );
    for arm in &cell.arms {
        let share = |share: Option<f64>| share.map_or("–".to_owned(), percent);
        let versus = arm.versus_baseline.as_ref();
        let cells = [
            share(arm.converged_share),
            estimate(arm.bytes_ratio, |ratio| format!("{ratio:.3}")),
            estimate(arm.excess_pages, thousands),
            versus.and_then(|versus| versus.excess_share).map_or("–".to_owned(), number),
            match (arm.total_ms, arm.given_up_ms) {
                (None, Some(given_up)) => format!("gave up at {}", time(given_up.mean)),
                (total, _) => estimate(total, time),
            },
            estimate(arm.total_ratio, number),
            estimate(versus.map(|versus| versus.total_ms), time),
            estimate(arm.downtime_ms, time),
            estimate(arm.downtime_ratio, number),
            share(arm.within_limit_share),
            arm.slowdown.map_or("–".to_owned(), |slowdown| format!("{:.1} %", slowdown.mean * 100.0)),
        ];
        let _ = write!(html, "<tr><td>{}</td>", escape(&arm.arm));
        for cell in cells {
            let _ = write!(html, "<td>{cell}</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div>\n");
}

/// A mean with its interval, as a table's cell has it.
fn estimate(estimate: Option<Estimate>, show: fn(f64) -> String) -> String {
    let Some(estimate) = estimate else { return "–".to_owned() };
    match estimate.half_width {
        Some(half) => format!("{} <small>± {}</small>", show(estimate.mean), show(half)),
        None => show(estimate.mean),
    }
}

fn explanation(html: &mut String) {
    html.push_str(
        "<h2>How to read this</h2>\n<p>Figures are means over the runs that converged, ± half the 95 % interval. Each seed \
         draws the moments of writes and where in the trace the migration begins; all arms of a cell see the same. \
         Differences from the baseline are taken seed by seed, where both converged.</p>\n<p>The optimum is what a sender that \
         knows all writes to come can do: each page once, the earliest pause that keeps the limit, and in the pause only what \
         no schedule could have sent before. That of post-copy sends each page once too, after a pause in which nothing \
         is copied. A total time below the optimum's is possible for a pause longer than the limit \
         allows. “Guest lost” is the share of its time that the guest lost while it ran: to write tracking, or with \
         post-copy waiting for pages, which its downtime does not show.</p>\n",
    );
}
