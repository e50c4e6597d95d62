//! The text of COMPARE.md. No measurement in it is written by hand.

use std::fmt::Write as _;

use lcbst_figures::spread::Spread;

use crate::guests::Guest;
use crate::mode::Mode;
use crate::network::Link;
use crate::pictures;
use crate::results::{Cell, Measure, Summary};
use crate::run::Run;

/// The page about these cells.
pub(crate) fn page(cells: &[Cell<'_>], runs: &[Run]) -> String {
    let mut text = String::new();
    introduction(&mut text, runs);
    ratios(&mut text, cells);
    behind(&mut text, cells);
    for qemu in distinct(cells.iter().map(|cell| cell.qemu)) {
        for link in Link::ALL {
            let here: Vec<&Cell<'_>> = cells.iter().filter(|cell| cell.qemu == qemu && cell.link == link).collect();
            if !here.is_empty() {
                let _ = writeln!(text, "\n## QEMU {qemu}, {link}");
                if here.iter().any(|cell| cell.modes.iter().any(|summary| summary.completed() > 0)) {
                    let picture = pictures::file_name(qemu, link);
                    let _ = writeln!(text, "\n![Time, bytes, gap and processor time by mode](compare/{picture}.png)");
                }
                for cell in here {
                    details(&mut text, cell);
                }
            }
        }
    }
    problems(&mut text, runs);
    text
}

fn introduction(text: &mut String, runs: &[Run]) {
    let memory = listed(runs.iter().map(|run| format!("{} MiB", run.memory_bytes >> 20)));
    let limits = listed(runs.iter().map(|run| format!("{} ms", run.downtime_limit_ms)));
    let _ = write!(
        text,
        "\
# vmferry beside QEMU's own migration

Written by `cargo xtask compare`; every figure is in `compare/runs.csv`, a row for each run, and medians and ranges in
`compare/cells.csv`. The same guest ({memory} of RAM, downtime limit {limits}) is moved between two hosts by vmferry and
by each mode of the same stock QEMU, mode after mode, and that again and again. Both hosts are on one machine, in two
network namespaces; the link between them is shaped at both ends (tbf, frames of 9000 bytes). The guest is emulated
(TCG, one processor) and shares the machine's processors with everything else, on both hosts at once: times of
processors are comparable with each other, and not with those of hosts with hardware virtualisation.

- **total time**: from the command until the target runs the guest and has all of its memory. The processes at the
  target wait already. For vmferry this includes the start of the program and its attaching to QEMU.
- **on the wire**: bytes in both directions, counted by the interface below all protocols.
- **gap**: the longest time without a sign of life of the guest during the move, seen from outside. The test guest
  shows one every 5 ms, redis every 20 ms. **reported** is the pause as the mode reports it.
- **processor**: of all processes on both hosts for each GiB of the guest's RAM, without the guest's own processor.
- **slow-down**: how much less the guest did during the move, pause included, than in the two seconds before.
- **completed**: runs in which the guest got to the target within the time limit: 30 s, or four times as long as
  sending each page once takes. **kept**: runs of these whose gap kept the downtime limit, up to one tick.

Figures are medians of the completed runs, with the range in parentheses. After each run the guest checks all of its
memory where it runs (redis cannot); a wrong page is an error of that run, listed at the end.

QEMU's modes: `precopy`; `xbzrle` (cache of 256 MiB); `auto-converge`; `multifd` (4 connections); `multifd-zstd` (the
same, compressed); `postcopy` (started when each page was sent once). QEMU's own bandwidth limit is lifted. All others
of its settings are its defaults. vmferry runs with its defaults.

Guests:

"
    );
    for guest in distinct_guests(runs) {
        let _ = writeln!(text, "- **{}**: {}", guest.name, guest.about);
    }
    let _ = writeln!(
        text,
        "\nHalf of each page that the test guest writes is content that no compressor makes smaller, unless said otherwise."
    );
}

fn ratios(text: &mut String, cells: &[Cell<'_>]) {
    let _ = writeln!(
        text,
        "\n## vmferry against QEMU's best mode\n\nvmferry's median divided by that of the best mode by that measure, among \
         those that completed every time\nand mostly kept the downtime limit. Below 1 vmferry is ahead; where one side did not do that, it says which, \
         among the modes that were run.\n"
    );
    let mut head = String::from("| QEMU | link | guest |");
    for measure in Measure::ALL {
        let _ = write!(head, " {} |", measure.name().split(',').next().unwrap_or_default());
    }
    let _ = writeln!(text, "{head}\n|---|---|---|{}", "---|".repeat(Measure::ALL.len()));
    for cell in cells {
        let _ = write!(text, "| {} | {} | {} |", cell.qemu, cell.link, cell.guest.name);
        for measure in Measure::ALL {
            let _ = write!(text, " {} |", ratio(cell, measure));
        }
        text.push('\n');
    }
}

fn ratio(cell: &Cell<'_>, measure: Measure) -> String {
    if let Some(rivalry) = cell.rivalry(measure) {
        return format!("{:.2} ({})", rivalry.ratio(), rivalry.mode.name());
    }
    match (cell.mode(Mode::Vmferry).map(Summary::qualifies), cell.best(measure)) {
        (None, _) => "vmferry was not run".to_owned(),
        (Some(false), Some((mode, _))) => format!("{}, not vmferry", mode.name()),
        (Some(true), None) => format!("vmferry, not {}", others(cell)),
        (Some(_), None | Some(_)) => format!("neither vmferry nor {}", others(cell)),
    }
}

/// QEMU's modes that were run.
fn others(cell: &Cell<'_>) -> String {
    let others = cell.modes.iter().map(|summary| summary.mode).filter(|&mode| mode != Mode::Vmferry);
    let names: Vec<&str> = others.map(Mode::name).collect();
    if names.is_empty() { "any other".to_owned() } else { names.join(", ") }
}

fn behind(text: &mut String, cells: &[Cell<'_>]) {
    let _ = writeln!(text, "\n### Where vmferry is behind\n");
    let mut rows = String::new();
    for cell in cells {
        let place = format!("| {} | {} | {} |", cell.qemu, cell.link, cell.guest.name);
        for measure in Measure::ALL {
            let decimals = measure.decimals();
            if let Some(rivalry) = cell.rivalry(measure).filter(|rivalry| rivalry.ratio() > 1.0) {
                let (ours, best, mode) = (rivalry.ours, rivalry.best, rivalry.mode.name());
                let _ = writeln!(
                    rows,
                    "{place} {} | {ours:.decimals$} | {best:.decimals$} ({mode}) | {:.2} |",
                    measure.name(),
                    rivalry.ratio()
                );
            } else if let Some((mode, best)) = cell.best(measure)
                && cell.mode(Mode::Vmferry).is_some_and(|ours| !ours.qualifies())
            {
                let name = measure.name();
                let _ = writeln!(
                    rows,
                    "{place} {name} | not within the limits | {best:.decimals$} ({}) | – |",
                    mode.name()
                );
            }
        }
    }
    if rows.is_empty() {
        text.push_str("Nowhere, in what was compared.\n");
    } else {
        let _ = write!(
            text,
            "| QEMU | link | guest | measure | vmferry | QEMU | ratio |\n|---|---|---|---|---|---|---|\n{rows}"
        );
    }
}

fn details(text: &mut String, cell: &Cell<'_>) {
    let _ = writeln!(text, "\n### {}: {}\n", cell.guest.name, cell.guest.about);
    let mut head = String::from("| mode | completed | kept |");
    for measure in Measure::ALL {
        let _ = write!(head, " {} |", measure.name());
    }
    let _ = writeln!(
        text,
        "{head} reported, ms | slow-down, % |\n|---|---|---|{}---|---|",
        "---|".repeat(Measure::ALL.len())
    );
    for summary in &cell.modes {
        let runs = summary.runs.len();
        let _ = write!(text, "| {} | {} of {runs} | {} |", summary.mode.name(), summary.completed(), summary.kept());
        for measure in Measure::ALL {
            let mut shown = show(summary.spread(measure), measure.decimals());
            if measure == Measure::Wire
                && summary.completed() == 0
                && let Some(in_vain) = summary.wire_in_vain_mb()
            {
                shown = format!("{:.0} in vain", in_vain.median);
            }
            let _ = write!(text, " {shown} |");
        }
        let (reported, slow_down) = (summary.reported_ms(), summary.slow_down_percent());
        let _ = writeln!(text, " {} | {} |", show(reported, 0), show(slow_down, 0));
    }
}

/// The median, and the range where there is more than one run.
fn show(spread: Option<Spread>, decimals: usize) -> String {
    let Some(Spread { minimum, median, maximum, .. }) = spread else { return "–".to_owned() };
    if minimum == maximum {
        return format!("{median:.decimals$}");
    }
    format!("{median:.decimals$} ({minimum:.decimals$} to {maximum:.decimals$})")
}

fn problems(text: &mut String, runs: &[Run]) {
    let _ = writeln!(text, "\n## Errors of runs\n");
    let checked = runs.iter().filter(|run| run.figures.checked_pages.is_some()).count();
    let wrong: f64 = runs.iter().filter_map(|run| run.figures.wrong_pages).sum();
    let _ = writeln!(
        text,
        "{checked} of {} runs ended with a check of all pages; {wrong:.0} pages were wrong.",
        runs.len()
    );
    for run in runs.iter().filter(|run| !run.problem.is_empty()) {
        let place = &run.place;
        let (qemu, link, guest, mode) = (&place.qemu, place.link, place.guest.name, place.mode.name());
        let _ = writeln!(text, "- QEMU {qemu}, {link}, {guest}, {mode}, run {}: {}", run.number, run.problem);
    }
}

fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

fn listed(values: impl Iterator<Item = String>) -> String {
    distinct(values).join(" or ")
}

fn distinct_guests(runs: &[Run]) -> Vec<&'static Guest> {
    distinct(runs.iter().map(|run| run.place.guest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moving::Outcome;
    use crate::results::cells;
    use crate::run::tests::run;

    #[test]
    fn the_page_says_who_is_ahead_and_who_is_behind() {
        let runs = vec![
            run(Mode::Vmferry, 1, 4000.0, 200.0),
            run(Mode::Vmferry, 2, 4200.0, 220.0),
            run(Mode::Precopy, 1, 8200.0, 100.0),
        ];
        let text = page(&cells(&runs), &runs);
        assert!(
            text.contains("| 10.0 | 1 Gbit/s | hot-20k | 0.50 (precopy) | 0.50 (precopy) | 2.10 (precopy) |"),
            "{text}"
        );
        assert!(text.contains("| gap, ms | 210 | 100 (precopy) | 2.10 |"), "{text}");
        assert!(text.contains("| vmferry | 2 of 2 | 2 | 4.10 (4.00 to 4.20) |"), "{text}");
        assert!(text.contains("0 of 3 runs ended with a check"), "{text}");
    }

    #[test]
    fn who_does_not_get_there_is_behind() {
        let mut runs = vec![run(Mode::Vmferry, 1, 30_000.0, 200.0), run(Mode::Precopy, 1, 8000.0, 100.0)];
        runs[0].outcome = Outcome::NotConverged;
        let text = page(&cells(&runs), &runs);
        assert!(text.contains("| total time, s | not within the limits | 8.00 (precopy) | – |"), "{text}");
        assert!(text.contains("| vmferry | 0 of 1 | 0 | – | 3000 in vain |"), "{text}");

        runs[1].outcome = Outcome::Failed;
        runs[1].problem = "3 of 9 pages are wrong".to_owned();
        let text = page(&cells(&runs), &runs);
        assert!(text.contains("| neither vmferry nor precopy |"), "{text}");
        assert!(text.contains("- QEMU 10.0, 1 Gbit/s, hot-20k, precopy, run 1: 3 of 9 pages are wrong"), "{text}");
    }
}
