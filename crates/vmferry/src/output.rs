//! What people see: progress and the final report.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmferry_core::engine::{AddressSpacesReport, DowntimeReport, OutcomeKind, Report, Unfinished};
use vmferry_core::pages::PAGE_BYTES;
use vmferry_host::{Cancel, Progress};

use crate::units::{show_bytes, show_ms, show_rate};

/// How often a line is written where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// A cancellation that Ctrl-C, SIGTERM and SIGHUP set off.
pub(crate) fn cancel_on_signals() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new().context("cannot prepare for signals")?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let end = cancel.signal_end().context("cannot prepare for signals")?;
        signal_hook::low_level::pipe::register(signal, end).context("cannot prepare for signals")?;
    }
    Ok(cancel)
}

/// A progress bar on a terminal, lines elsewhere; always on standard error.
pub(crate) struct Display {
    bar: Option<ProgressBar>,
    line_at: Instant,
}

impl Display {
    pub(crate) fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            // What is wide is cut off at the terminal's edge.
            let style = ProgressStyle::with_template("{prefix:24!} [{bar:30}] {wide_msg}").expect("a valid template");
            ProgressBar::new(1).with_style(style.progress_chars("=> "))
        });
        Self { bar, line_at: Instant::now() }
    }

    pub(crate) fn update(&mut self, progress: &Progress) {
        let rate = progress.bandwidth_bytes_per_s.map_or(String::new(), |rate| format!(", {}", show_rate(rate)));
        let figures = format!(
            "pass {}, {} left, {} sent{rate}{}",
            progress.pass,
            show_bytes(progress.pending_pages * PAGE_BYTES),
            show_bytes(progress.wire_bytes),
            prospects(progress),
        );
        match &self.bar {
            Some(bar) => {
                bar.set_length(progress.total_pages);
                bar.set_position(progress.total_pages - progress.pending_pages);
                bar.set_prefix(progress.doing);
                bar.set_message(figures);
            }
            None if self.line_at.elapsed() >= LINE_INTERVAL => {
                self.line_at = Instant::now();
                eprintln!("{:.1} s: {}: {figures}", progress.elapsed.as_secs_f64(), progress.doing);
            }
            None => {}
        }
    }

    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long it will still take, and why it has not ended where the other figures do not tell.
fn prospects(progress: &Progress) -> String {
    let mut text =
        progress.remaining.map_or(String::new(), |time| format!(", ETA {}", show_ms(time.as_secs_f64() * 1e3)));
    match progress.unfinished {
        why @ (Unfinished::Held { .. } | Unfinished::FixedTooLong { .. } | Unfinished::Rest { .. }) => {
            text.push_str(&format!("; {why}"));
        }
        Unfinished::Greeting
        | Unfinished::Observing
        | Unfinished::FirstPass { .. }
        | Unfinished::Copying { .. }
        | Unfinished::Loading
        | Unfinished::Resuming
        | Unfinished::Ended => {}
    }
    text
}

/// One line that is renewed on a terminal, and a line now and then elsewhere; always on standard error.
pub(crate) struct Lines {
    bar: Option<ProgressBar>,
    at: Instant,
}

impl Lines {
    pub(crate) fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{msg}").expect("a valid template"))
        });
        Self { bar, at: Instant::now() }
    }

    pub(crate) fn update(&mut self, text: impl FnOnce() -> String) {
        const TERMINAL_INTERVAL: Duration = Duration::from_millis(100);
        let interval = if self.bar.is_some() { TERMINAL_INTERVAL } else { LINE_INTERVAL };
        if self.at.elapsed() < interval {
            return;
        }
        self.at = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.set_message(text());
                bar.tick();
            }
            None => eprintln!("{}", text()),
        }
    }

    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Prints a document on standard output.
pub(crate) fn print_json(document: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec_pretty(document).context("cannot write the report as JSON")?;
    text.push(b'\n');
    print_bytes(&text)
}

/// Prints bytes on standard output. A full disk or a reader that has gone is an error, not a panic.
pub(crate) fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// The parts of the downtime that do not depend on the pages left.
fn fixed_ms(downtime: &DowntimeReport) -> f64 {
    downtime.pause_ms + downtime.scan_ms + downtime.device_state_ms + downtime.load_ms + downtime.resume_ms
}

/// How the guest's address spaces were told apart, in words.
pub(crate) fn describe_spaces(spaces: &AddressSpacesReport) -> String {
    let mut text = format!("{} processes known; ", spaces.processes);
    match spaces.refreshes {
        0 => text.push_str("never refreshed"),
        refreshes => text.push_str(&format!(
            "{refreshes} refreshes, {} on average, {} at most",
            show_ms(spaces.refresh_ms / refreshes as f64),
            show_ms(spaces.refresh_max_ms)
        )),
    }
    if let Some(failure) = &spaces.failure {
        text.push_str(&format!("; given up: {failure}"));
    }
    text
}

/// The report of a migration in words.
pub(crate) fn describe_report(report: &Report) -> String {
    let mut text = match report.outcome {
        OutcomeKind::Completed => "The guest runs on the target.\n".to_owned(),
        OutcomeKind::Cancelled => "Cancelled. The guest runs on the source.\n".to_owned(),
        OutcomeKind::NotConverged => "The guest runs on the source: the migration did not converge.\n".to_owned(),
        OutcomeKind::Failed => "The guest runs on the source: the migration failed.\n".to_owned(),
        OutcomeKind::InDoubt => "IN DOUBT: the guest was handed over, and the target did not answer.\n\
             The source stays paused. Ask the target's QEMU with query-status: if the guest is `running` there, end the\n\
             source's QEMU; if the target is gone or not running, end the target first, then give `cont` to the source.\n"
            .to_owned(),
    };
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<14}{value}\n"));
    if let Some(reason) = &report.reason {
        line("reason", reason.clone());
    }
    let phases = report.phases;
    line(
        "total time",
        format!(
            "{}  (connect {}, observe {}, push {})",
            show_ms(report.total_ms),
            show_ms(phases.connect_ms),
            show_ms(phases.observe_ms),
            show_ms(phases.push_ms)
        ),
    );
    if report.downtime_ms > 0.0 {
        line("downtime", format!("{} of {} allowed", show_ms(report.downtime_ms), show_ms(report.downtime_limit_ms)));
        let parts = report.downtime;
        let parts = [
            ("pause", parts.pause_ms),
            ("scan", parts.scan_ms),
            ("copy", parts.copy_ms),
            ("device state", parts.device_state_ms),
            ("verify", parts.verify_ms),
            ("load", parts.load_ms),
            ("resume", parts.resume_ms),
        ];
        let parts: Vec<String> =
            parts.iter().filter(|(_, ms)| *ms > 0.0).map(|(name, ms)| format!("{name} {}", show_ms(*ms))).collect();
        line("", parts.join(", "));
        let took = fixed_ms(&report.downtime);
        line(
            "",
            format!("without copy and verify {}, planned {}", show_ms(took), show_ms(report.downtime.fixed_planned_ms)),
        );
    }
    if let Some(waived) = report.limit_waived {
        let expected =
            waived.expected_downtime_ms.map_or("of unknown length".to_owned(), |ms| format!("of {}", show_ms(ms)));
        let at = show_ms(waived.at_ms);
        line("limit waived", format!("after {at} of pushing, expecting a pause {expected} beside any comparison"));
    }
    if let Some(throttle) = report.throttle {
        let time = show_ms(throttle.throttled_ms);
        let (percent, steps) = (throttle.max_percent, throttle.steps);
        line(
            "throttled",
            format!("for {time}, in the end by {percent:.0} % of the guest's processor time; {steps} steps"),
        );
    }
    let wire = report.wire;
    line(
        "sent",
        format!(
            "{}  ({} while running, {} while paused)",
            show_bytes(report.wire_bytes),
            show_bytes(wire.push_bytes),
            show_bytes(wire.stop_bytes)
        ),
    );
    let pages = report.pages;
    line(
        "pages",
        format!(
            "{} in all; {} sent, {} zero, {} of these again; {} passes",
            pages.total, pages.sent, pages.zero, pages.resent, report.passes
        ),
    );
    let kinds = [
        ("raw", pages.raw, wire.raw_bytes),
        ("lz4", pages.lz4, wire.lz4_bytes),
        ("zstd", pages.zstd, wire.zstd_bytes),
        ("delta", pages.delta, wire.delta_bytes),
        ("copy", pages.copy, wire.copy_bytes),
        ("zero", pages.zero, wire.zero_bytes),
    ];
    let kinds = kinds.iter().filter(|(_, pages, _)| *pages > 0);
    let kinds: Vec<String> =
        kinds.map(|(name, pages, bytes)| format!("{name} {pages} in {}", show_bytes(*bytes))).collect();
    if let Some(ratio) = report.compression.ratio {
        let encode = show_ms(report.compression.encode_ms);
        line("pages as", format!("{}; ratio {ratio:.2}, {encode} of encoding", kinds.join(", ")));
    }
    let set = &report.working_set;
    let share = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
    line(
        "working set",
        format!(
            "{} pages held back by {}; precision {}, recall {}",
            set.pages,
            set.predictor,
            share(set.precision),
            share(set.recall)
        ),
    );
    if let Some(sent) = report.bound.sent_ratio {
        let stop = match (report.bound.least_stop_pages, report.bound.stop_ratio) {
            (Some(least), Some(ratio)) => {
                format!("; in the pause {} pages, {ratio:.2} times the least possible {least}", pages.stop)
            }
            (Some(0), None) => format!("; in the pause {} pages, where 0 were possible", pages.stop),
            _ => String::new(),
        };
        line("bound", format!("sent {sent:.3} times each page once{stop}"));
    }
    for shadow in &report.shadows {
        let verdict = match (shadow.decision, shadow.at_ms) {
            (Some(decision), Some(at)) => {
                let pause = shadow.expected_downtime_ms.map_or("-".to_owned(), show_ms);
                format!("{decision} after {} of pushing, expecting a pause of {pause}", show_ms(at))
            }
            _ => "would still push".to_owned(),
        };
        line("shadow", format!("{}: {verdict}", shadow.policy));
    }
    if let Some(rate) = report.bandwidth_bytes_per_s {
        let dirty = report.dirty_pages_per_s.unwrap_or(0.0);
        line("rates", format!("path {}, guest writes {}", show_rate(rate), show_rate(dirty * PAGE_BYTES as f64)));
    }
    let tracking = report.tracking;
    if tracking.scans > 0 {
        line(
            "tracking",
            format!(
                "{} scans, {} on average, {} at most",
                tracking.scans,
                show_ms(tracking.scan_ms / tracking.scans as f64),
                show_ms(tracking.scan_max_ms)
            ),
        );
    }
    if let Some(spaces) = &report.address_spaces {
        line("owners", describe_spaces(spaces));
    }
    if let Some(verify) = report.verify {
        line("verification", format!("{} pages compared, {} differ", verify.pages, verify.mismatched));
    }
    text
}
