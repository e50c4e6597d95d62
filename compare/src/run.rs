//! One run: a guest is started, moved, and asked whether its memory is right.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lcbst_figures::table::{Column, Row, Table, cell};

use crate::guests::{Guest, Program};
use crate::interrupt::Interrupt;
use crate::mode::Mode;
use crate::moving::{Outcome, Pair, Ready, Terms};
use crate::network::{Link, Network, Side, wire_bytes};
use crate::serial::{self, Tick};
use crate::vm::{Machinery, Vm};

/// How long a guest may take from its start until it works, emulated on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a guest may be silent after it moved.
const TICK_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a guest works before anything is measured. Programs begin with empty caches.
const SETTLE_PAGES: Duration = Duration::from_secs(1);
const SETTLE_STUDY: Duration = Duration::from_secs(10);
/// How long it is measured how fast a guest is when nobody moves it.
const BEFORE: Duration = Duration::from_secs(2);
/// How long a guest is watched after it moved, before it is asked for its memory.
const AFTER: Duration = Duration::from_millis(500);

/// A tick at the source so long after the guest came to the target can no longer be one that was under way.
const LATE: Duration = Duration::from_millis(100);

/// The least work in the time before a move from which a slow-down can be told.
const WORK_MIN: f64 = 50.0;

/// Where a run belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// QEMU's version.
    pub(crate) qemu: String,
    pub(crate) guest: &'static Guest,
    pub(crate) link: Link,
    pub(crate) mode: Mode,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Run {
    pub(crate) place: Place,
    /// From 1.
    pub(crate) number: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) downtime_limit_ms: u64,
    pub(crate) outcome: Outcome,
    /// What went wrong, in words; empty if nothing did.
    pub(crate) problem: String,
    /// The rest is not known of every run.
    pub(crate) figures: Figures,
}

/// What was measured in a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Figures {
    /// From the command to the guest that runs with all of its memory on the target, or to the end of the attempt.
    pub(crate) total_ms: Option<f64>,
    /// On the link, in both directions.
    pub(crate) wire_bytes: Option<f64>,
    /// The longest time without a tick, during the move.
    pub(crate) gap_ms: Option<f64>,
    /// The same in the time before.
    pub(crate) gap_before_ms: Option<f64>,
    /// The pause as the side that moved says.
    pub(crate) reported_ms: Option<f64>,
    /// Of all processes, without the guest's own, for each GiB of the guest's RAM.
    pub(crate) processor_ms_per_gib: Option<f64>,
    /// How much less the guest did during the move than before it.
    pub(crate) slow_down_percent: Option<f64>,
    pub(crate) checked_pages: Option<f64>,
    pub(crate) wrong_pages: Option<f64>,
}

const COLUMNS: &[Column] = &[
    ("qemu", "version of QEMU on both sides"),
    ("guest", "what the guest does"),
    ("link", "what connects the hosts"),
    ("mode", "who moved the guest and how"),
    ("run", "number of the run"),
    ("memory_mib", "RAM of the guest"),
    ("downtime_limit_ms", "the longest pause that was asked for"),
    ("outcome", "completed or not-converged (given up; or cancelled when its time was over) or failed"),
    (
        "total_ms",
        "from the command to the guest that runs with all of its memory on the target; else to the end of the attempt",
    ),
    ("wire_bytes", "bytes on the link in both directions counted by the interface"),
    ("gap_ms", "longest time without a tick of the guest during the move seen from outside"),
    ("gap_before_ms", "the same in the two seconds before"),
    ("reported_ms", "the pause that the mode itself reports"),
    (
        "processor_ms_per_gib",
        "processor time of all processes without that of the guest's processor for each GiB of its RAM",
    ),
    ("slow_down_percent", "how much less the guest did during the move than before it"),
    ("checked_pages", "pages that the guest checked after the move"),
    ("wrong_pages", "pages of them that were not what they should be"),
    ("problem", "what went wrong"),
];

impl Run {
    /// A table for runs.
    pub(crate) fn table() -> Table {
        Table::new("Moves of guests by vmferry and by QEMU's own migration. A row is a run.", COLUMNS)
    }

    /// As a row of that table.
    pub(crate) fn row(&self) -> Vec<String> {
        let Self {
            place: Place { qemu, guest, link, mode },
            number,
            memory_bytes,
            downtime_limit_ms,
            outcome,
            problem,
            figures,
        } = self;
        let optional = |value: Option<f64>| value.map_or(String::new(), cell);
        let whole = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.0}"));
        vec![
            qemu.clone(),
            guest.name.to_owned(),
            link.name().to_owned(),
            mode.name().to_owned(),
            number.to_string(),
            (memory_bytes >> 20).to_string(),
            downtime_limit_ms.to_string(),
            outcome.name().to_owned(),
            optional(figures.total_ms),
            whole(figures.wire_bytes),
            optional(figures.gap_ms),
            optional(figures.gap_before_ms),
            optional(figures.reported_ms),
            optional(figures.processor_ms_per_gib),
            optional(figures.slow_down_percent),
            whole(figures.checked_pages),
            whole(figures.wrong_pages),
            plain(problem),
        ]
    }

    /// Reads a row.
    ///
    /// # Errors
    /// When it is one of another table, or of guests or modes that there no longer are.
    pub(crate) fn from_row(row: Row<'_>) -> Result<Self> {
        let optional = |column| match row.text(column)? {
            "" => Ok(None),
            _ => row.number(column).map(Some),
        };
        let unknown = |what: &str| format!("there is no {what} of this name");
        Ok(Self {
            place: Place {
                qemu: row.text("qemu")?.to_owned(),
                guest: Guest::named(row.text("guest")?).with_context(|| unknown("guest"))?,
                link: Link::named(row.text("link")?).with_context(|| unknown("link"))?,
                mode: Mode::named(row.text("mode")?).with_context(|| unknown("mode"))?,
            },
            number: row.text("run")?.parse().context("the number of a run")?,
            memory_bytes: row.text("memory_mib")?.parse::<u64>().context("the RAM of a guest")? << 20,
            downtime_limit_ms: row.text("downtime_limit_ms")?.parse().context("a downtime limit")?,
            outcome: Outcome::named(row.text("outcome")?).with_context(|| unknown("outcome"))?,
            problem: row.text("problem")?.to_owned(),
            figures: Figures {
                total_ms: optional("total_ms")?,
                wire_bytes: optional("wire_bytes")?,
                gap_ms: optional("gap_ms")?,
                gap_before_ms: optional("gap_before_ms")?,
                reported_ms: optional("reported_ms")?,
                processor_ms_per_gib: optional("processor_ms_per_gib")?,
                slow_down_percent: optional("slow_down_percent")?,
                checked_pages: optional("checked_pages")?,
                wrong_pages: optional("wrong_pages")?,
            },
        })
    }

    /// For people, while it is measured.
    pub(crate) fn line(&self) -> String {
        let Figures { total_ms, wire_bytes, gap_ms, reported_ms, processor_ms_per_gib, slow_down_percent, .. } =
            self.figures;
        let show = |value: Option<f64>, factor: f64, decimals: usize| {
            value.map_or("–".to_owned(), |value| format!("{:.decimals$}", value * factor))
        };
        let mut line = format!(
            "{:<14} {} {:<13} {:>6} s, {:>6} MB, gap {:>4} ms (reported {:>4} ms), processor {:>5} s/GiB, slow-down {:>3} %",
            self.place.mode.name(),
            self.number,
            self.outcome.name(),
            show(total_ms, 1e-3, 2),
            show(wire_bytes, 1e-6, 1),
            show(gap_ms, 1.0, 0),
            show(reported_ms, 1.0, 0),
            show(processor_ms_per_gib, 1e-3, 2),
            show(slow_down_percent, 1.0, 0),
        );
        if !self.problem.is_empty() {
            line.push_str("; ");
            line.push_str(&self.problem);
        }
        line
    }

    /// Whether the pause that was seen from outside kept the limit. It is seen from tick to tick, so it may be longer by
    /// what passes between two of them.
    pub(crate) fn keeps_limit(&self) -> bool {
        let seen_longer_ms = match self.place.guest.program {
            Program::Pages(_) => 5.0,
            Program::Study(_) => 20.0,
        };
        self.figures.gap_ms.is_some_and(|gap_ms| gap_ms <= self.downtime_limit_ms as f64 + seen_longer_ms)
    }
}

/// Text that a cell of the table can hold.
fn plain(text: &str) -> String {
    text.replace([',', '#'], ";").replace('"', "'").replace(['\n', '\r'], " ")
}

/// What is the same for all runs of a comparison.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) network: &'a Network,
    pub(crate) machinery: &'a Machinery,
    pub(crate) vmferry: &'a Path,
    pub(crate) downtime_limit_ms: u64,
    pub(crate) time_limit: Duration,
    /// Where vmferry's own reports go.
    pub(crate) reports: Option<&'a Path>,
    pub(crate) interrupt: &'a Interrupt,
}

impl Bench<'_> {
    /// Starts a guest, moves it, and asks it for its memory. The link has to be shaped before.
    ///
    /// # Errors
    /// On an interrupt. Whatever else goes wrong is said in the run.
    pub(crate) fn run(&self, place: &Place, number: u32) -> Result<Run> {
        let mut run = Run {
            place: place.clone(),
            number,
            memory_bytes: self.machinery.memory_bytes,
            downtime_limit_ms: self.downtime_limit_ms,
            outcome: Outcome::Failed,
            problem: String::new(),
            figures: Figures::default(),
        };
        if let Err(error) = self.fill(&mut run) {
            self.interrupt.check()?;
            run.outcome = Outcome::Failed;
            run.problem = format!("{error:#}");
        }
        Ok(run)
    }

    fn fill(&self, run: &mut Run) -> Result<()> {
        let guest = run.place.guest;
        let mut source = Vm::start(self.machinery, self.network, Side::Source, guest, self.interrupt)?;
        source.serial.wait_for(ready_words(guest), READY_TIMEOUT, self.interrupt)?;
        let mut target = Vm::start(self.machinery, self.network, Side::Target, guest, self.interrupt)?;
        self.pass(match guest.program {
            Program::Pages(_) => SETTLE_PAGES,
            Program::Study(_) => SETTLE_STUDY,
        })?;
        let terms = Terms {
            network: self.network,
            vmferry: self.vmferry,
            mode: run.place.mode,
            downtime_limit_ms: self.downtime_limit_ms,
            time_limit: self.time_limit,
            interrupt: self.interrupt,
        };
        let mut pair = Pair { source: &mut source, target: &mut target };
        let ready = Ready::make(&terms, &mut pair)?;
        let before = Instant::now();
        self.pass(BEFORE)?;

        let counters = |pair: &Pair<'_>| -> Result<(u64, f64)> {
            let processor_ms = pair.source.processor_ms()? + pair.target.processor_ms()?;
            Ok((wire_bytes(pair.source.pid())?, processor_ms))
        };
        let (wire_before, processor_before_ms) = counters(&pair)?;
        let start = Instant::now();
        let moved = ready.go(&terms, &mut pair)?;
        if let (Some(directory), Some(report)) = (self.reports, &moved.report) {
            let name = format!("{}-{}-{}.json", guest.name, run.place.link.name(), run.number);
            let path = directory.join(name);
            fs::write(&path, format!("{report:#}")).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let (wire_after, processor_after_ms) = counters(&pair)?;
        run.outcome = moved.outcome;
        run.figures.total_ms = Some(milliseconds(moved.end.saturating_duration_since(start)));
        run.figures.wire_bytes = Some(wire_after.saturating_sub(wire_before) as f64);
        run.figures.reported_ms = moved.downtime_ms;
        let processor_ms = (processor_after_ms - processor_before_ms).max(0.0) + moved.processor_ms;
        run.figures.processor_ms_per_gib = Some(processor_ms / (run.memory_bytes as f64 / f64::from(1 << 30)));

        let (owner, other) = match moved.outcome {
            Outcome::Completed => (&mut target, &source),
            Outcome::NotConverged | Outcome::Failed => (&mut source, &target),
        };
        self.wait_for_tick(owner, moved.end)?;
        self.pass(AFTER)?;
        let mut ticks = [other.serial.ticks(), owner.serial.ticks()].concat();
        ticks.sort_by_key(|tick| tick.at);
        let gap_ms = |start, end| serial::longest_gap(&ticks, start, end).map(milliseconds);
        run.figures.gap_ms = gap_ms(start, moved.end);
        run.figures.gap_before_ms = gap_ms(before, start);
        run.figures.slow_down_percent = slow_down_percent(&ticks, before, start, moved.end);
        if guest.checks_itself() {
            let check = owner.check(self.interrupt)?;
            run.figures.checked_pages = Some(check.pages as f64);
            run.figures.wrong_pages = Some(check.wrong as f64);
            ensure!(
                check.wrong == 0,
                "{} of {} pages are wrong: {}",
                check.wrong,
                check.pages,
                owner.serial.last_with("wrong page=").unwrap_or_default()
            );
        }
        let runs_twice = other.serial.ticks().last().is_some_and(|tick| tick.at > moved.end + LATE);
        ensure!(!runs_twice, "the guest runs on both sides");
        Ok(())
    }

    /// Waits for the first tick after the move.
    fn wait_for_tick(&self, vm: &Vm, end: Instant) -> Result<()> {
        let deadline = Instant::now() + TICK_TIMEOUT;
        while vm.serial.ticks().last().is_none_or(|tick| tick.at < end) {
            ensure!(Instant::now() < deadline, "the guest does not tick after the move");
            self.pass(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Lets time pass.
    fn pass(&self, time: Duration) -> Result<()> {
        const STEP: Duration = Duration::from_millis(50);
        let end = Instant::now() + time;
        loop {
            self.interrupt.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(STEP));
        }
    }
}

const fn ready_words(guest: &Guest) -> &'static str {
    match guest.program {
        Program::Pages(_) => "vmferry-guest: ready",
        Program::Study(_) => "vmferry-study: ready",
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// How much less work was done from `start` to `end` than from `before` to `start`; `None` where that was too little to
/// tell.
fn slow_down_percent(ticks: &[Tick], before: Instant, start: Instant, end: Instant) -> Option<f64> {
    let usual = serial::work_per_s(ticks, before, start)?;
    if usual * (start - before).as_secs_f64() < WORK_MIN {
        return None;
    }
    let during = serial::work_per_s(ticks, start, end)?;
    Some((1.0 - during / usual) * 100.0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn run(mode: Mode, number: u32, total_ms: f64, gap_ms: f64) -> Run {
        Run {
            place: Place { qemu: "10.0".to_owned(), guest: Guest::named("hot-20k").unwrap(), link: Link::Gbit1, mode },
            number,
            memory_bytes: 512 << 20,
            downtime_limit_ms: 300,
            outcome: Outcome::Completed,
            problem: String::new(),
            figures: Figures {
                total_ms: Some(total_ms),
                wire_bytes: Some(total_ms * 1e5),
                gap_ms: Some(gap_ms),
                gap_before_ms: Some(7.0),
                processor_ms_per_gib: Some(1000.0),
                wrong_pages: Some(0.0),
                ..Figures::default()
            },
        }
    }

    #[test]
    fn a_run_is_read_back_from_its_row() {
        let mut runs = [run(Mode::Vmferry, 1, 4000.0, 100.0), run(Mode::Postcopy, 2, 5000.0, 40.0)];
        runs[1].outcome = Outcome::Failed;
        runs[1].problem = "QEMU said \"no\", twice".to_owned();
        let mut table = Run::table();
        for run in &runs {
            table.push(run.row());
        }
        let read: Vec<Run> = table.rows().map(|row| Run::from_row(row).unwrap()).collect();
        assert_eq!(read[0], runs[0]);
        assert_eq!(read[1].problem, "QEMU said 'no'; twice");
    }

    #[test]
    fn a_limit_is_kept_up_to_a_tick() {
        assert!(run(Mode::Vmferry, 1, 4000.0, 304.0).keeps_limit());
        assert!(!run(Mode::Vmferry, 1, 4000.0, 306.0).keeps_limit());
    }

    #[test]
    fn a_guest_that_does_half_as_much_is_slowed_down_by_half() {
        let start = Instant::now();
        let at = |time_ms| start + Duration::from_millis(time_ms);
        let tick = |time_ms, work| Tick { at: at(time_ms), number: time_ms, work };
        let ticks = [tick(0, 0), tick(1000, 1000), tick(2000, 1500), tick(2100, 1500)];
        let slow_down = slow_down_percent(&ticks, at(0), at(1000), at(2000)).unwrap();
        assert!((slow_down - 50.0).abs() < 1e-6, "{slow_down}");
        let idle = [tick(0, 0), tick(1000, 3), tick(2000, 3)];
        assert_eq!(slow_down_percent(&idle, at(0), at(1000), at(2000)), None);
    }
}
