//! One move of a guest, by vmferry or by QEMU's own migration.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmferry_host::qmp::Event;

use crate::interrupt::Interrupt;
use crate::mode::Mode;
use crate::network::{Network, Side, TARGET_ADDRESS};
use crate::processor::Stat;
use crate::vm::{Vm, quote};

const VMFERRY_PORT: u16 = 7700;
const QEMU_PORT: u16 = 7701;

/// How long vmferry may take to be ready at the target, and to end at either side.
const FERRY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long QEMU may take to cancel a migration.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is looked how far a move is. Moments of what happened are QEMU's, and do not depend on it.
const POLL: Duration = Duration::from_millis(5);
/// How long to listen at the second of two monitors; the first one has the rest of the time.
const GLANCE: Duration = Duration::from_millis(1);

/// The pass of pre-copy at whose beginning post-copy is started: all pages were sent once before.
const POSTCOPY_PASS: u64 = 2;

/// How a move ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest runs on the target, which has all of its memory.
    Completed,
    /// It was given up, or cancelled when its time was over. The guest runs on the source.
    NotConverged,
    /// Anything else.
    Failed,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Completed, Self::NotConverged, Self::Failed];

    /// Its name in tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::NotConverged => "not-converged",
            Self::Failed => "failed",
        }
    }

    /// The one with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.name() == name)
    }
}

/// What a move came to.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) outcome: Outcome,
    /// When the target ran the guest and had all of its memory, or when the move was over otherwise.
    pub(crate) end: Instant,
    /// The pause as the side that moved says.
    pub(crate) downtime_ms: Option<f64>,
    /// Processor time of other processes than the two QEMUs.
    pub(crate) processor_ms: f64,
    /// vmferry's own report.
    pub(crate) report: Option<Value>,
}

/// Both QEMUs, while a guest moves from one to the other.
#[derive(Debug)]
pub(crate) struct Pair<'a> {
    pub(crate) source: &'a mut Vm,
    pub(crate) target: &'a mut Vm,
}

/// How a guest is to be moved.
#[derive(Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) network: &'a Network,
    pub(crate) vmferry: &'a Path,
    pub(crate) mode: Mode,
    pub(crate) downtime_limit_ms: u64,
    pub(crate) time_limit: Duration,
    pub(crate) interrupt: &'a Interrupt,
}

/// A move for which both sides are ready: all that is left is the command at the source.
#[derive(Debug)]
pub(crate) enum Ready {
    Vmferry(Ferry),
    Qemu,
}

impl Ready {
    /// Makes both sides ready.
    pub(crate) fn make(terms: &Terms<'_>, pair: &mut Pair<'_>) -> Result<Self> {
        let ready = if terms.mode == Mode::Vmferry {
            // Settings of QEMU's migration are vmferry's to make.
            Self::Vmferry(Ferry::receive(terms, pair.target)?)
        } else {
            for vm in [&mut *pair.target, &mut *pair.source] {
                vm.set_migration(terms.mode.capabilities(), terms.mode.parameters(terms.downtime_limit_ms))?;
            }
            let incoming = json!({"uri": uri()});
            pair.target.monitor.execute_with("migrate-incoming", incoming).context("the target does not listen")?;
            Self::Qemu
        };
        pair.source.monitor.discard_events();
        pair.target.monitor.discard_events();
        Ok(ready)
    }

    /// Gives the command, and waits until the move is over.
    pub(crate) fn go(self, terms: &Terms<'_>, pair: &mut Pair<'_>) -> Result<Moved> {
        match self {
            Self::Vmferry(receiver) => go_vmferry(receiver, terms, pair),
            Self::Qemu => go_qemu(terms, pair),
        }
    }
}

fn uri() -> String {
    format!("tcp:{TARGET_ADDRESS}:{QEMU_PORT}")
}

/// What was seen of QEMU's migration so far.
#[derive(Debug, Default)]
struct Seen {
    /// The moment and the state of the source's migration when it was over.
    source_end: Option<(Instant, String)>,
    /// When the target had all it waited for.
    target_completed: Option<Instant>,
    target_resumed: Option<Instant>,
    target_failed: bool,
    pass: u64,
}

impl Seen {
    fn at_source(&mut self, event: &Event) {
        match event.name.as_str() {
            "MIGRATION" => {
                if let Some(state @ ("completed" | "failed" | "cancelled")) = event.data["status"].as_str() {
                    self.source_end = Some((event.happened_at, state.to_owned()));
                }
            }
            "MIGRATION_PASS" => self.pass = event.data["pass"].as_u64().unwrap_or(self.pass),
            _ => {}
        }
    }

    fn at_target(&mut self, event: &Event) {
        match (event.name.as_str(), event.data["status"].as_str()) {
            ("RESUME", _) => self.target_resumed = Some(event.happened_at),
            ("MIGRATION", Some("completed")) => self.target_completed = Some(event.happened_at),
            ("MIGRATION", Some("failed")) => self.target_failed = true,
            _ => {}
        }
    }

    /// When the guest ran with all of its memory on the target.
    fn end(&self, has_postcopy: bool) -> Option<Instant> {
        let (source_end, state) = self.source_end.as_ref()?;
        let (resumed, completed) = (self.target_resumed?, self.target_completed?);
        let end = if has_postcopy { resumed.max(completed).max(*source_end) } else { resumed };
        (state == "completed").then_some(end)
    }

    fn listen(&mut self, pair: &mut Pair<'_>) -> Result<()> {
        let mut patience = POLL;
        while let Some(event) = pair.source.monitor.wait_event(patience).context("the source's QEMU is silent")? {
            self.at_source(&event);
            patience = GLANCE;
        }
        while let Some(event) = pair.target.monitor.wait_event(GLANCE).context("the target's QEMU is silent")? {
            self.at_target(&event);
        }
        Ok(())
    }
}

fn go_qemu(terms: &Terms<'_>, pair: &mut Pair<'_>) -> Result<Moved> {
    let start = Instant::now();
    pair.source.monitor.execute_with("migrate", json!({"uri": uri()})).context("QEMU refuses to migrate")?;
    let mut seen = Seen::default();
    let mut has_postcopy = false;
    loop {
        seen.listen(pair)?;
        terms.interrupt.check()?;
        if let Some(end) = seen.end(has_postcopy) {
            let downtime_ms = pair.source.query_migrate()?["downtime"].as_f64();
            return Ok(Moved { outcome: Outcome::Completed, end, downtime_ms, processor_ms: 0.0, report: None });
        }
        if let Some((_, state)) = &seen.source_end
            && state != "completed"
        {
            let why = pair.source.query_migrate()?;
            let why = why["error-desc"].as_str().unwrap_or("no reason given");
            bail!("QEMU's migration is {state}: {why}");
        }
        ensure!(!seen.target_failed, "QEMU's migration failed at the target");
        if terms.mode == Mode::Postcopy && !has_postcopy && seen.pass >= POSTCOPY_PASS {
            has_postcopy = true;
            // Refused where the migration is over by now, or about to be: then it was one of pre-copy alone.
            if pair.source.monitor.execute("migrate-start-postcopy").is_err() {
                has_postcopy = false;
                seen.pass = 0;
            }
        }
        if start.elapsed() >= terms.time_limit {
            ensure!(!has_postcopy, "post-copy was not over in time, and cannot be cancelled");
            return cancel(pair, seen, start);
        }
    }
}

/// Cancels a migration that takes too long. One that is completed at this very moment stays so.
fn cancel(pair: &mut Pair<'_>, mut seen: Seen, start: Instant) -> Result<Moved> {
    let end = Instant::now();
    pair.source.monitor.execute("migrate_cancel").context("QEMU does not cancel its migration")?;
    while seen.source_end.is_none() {
        seen.listen(pair)?;
        ensure!(end.elapsed() < CANCEL_TIMEOUT, "QEMU did not cancel its migration");
    }
    let is_completed = seen.source_end.is_some_and(|(_, state)| state == "completed");
    ensure!(!is_completed, "QEMU's migration was over just when it was cancelled, after {:?}", start.elapsed());
    Ok(Moved { outcome: Outcome::NotConverged, end, downtime_ms: None, processor_ms: 0.0, report: None })
}

/// A vmferry that runs; killed when dropped.
#[derive(Debug)]
pub(crate) struct Ferry {
    child: Child,
    out: PathBuf,
    messages: PathBuf,
}

impl Ferry {
    fn start(terms: &Terms<'_>, side: Side, vm: &Vm, arguments: &[&str]) -> Result<Self> {
        let (out, messages) = (vm.scratch("report"), vm.scratch("vmferry-messages"));
        let child = terms
            .network
            .command(side, terms.vmferry)
            .args(arguments)
            .arg("--qmp")
            .arg(vm.vmferry_socket())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(File::create(&out)?)
            .stderr(File::create(&messages)?)
            .spawn()
            .context("cannot start vmferry")?;
        Ok(Self { child, out, messages })
    }

    fn receive(terms: &Terms<'_>, target: &Vm) -> Result<Self> {
        let listen = format!("{TARGET_ADDRESS}:{VMFERRY_PORT}");
        let ferry = Self::start(terms, Side::Target, target, &["receive", "--json", "--listen", &listen])?;
        let deadline = Instant::now() + FERRY_TIMEOUT;
        while !fs::read_to_string(&ferry.messages).is_ok_and(|said| said.contains("listening on ")) {
            terms.interrupt.check()?;
            if Stat::of_process(ferry.child.id())?.has_ended || Instant::now() >= deadline {
                bail!("vmferry does not wait at the target: {}", quote(&ferry.messages));
            }
            thread::sleep(POLL);
        }
        Ok(ferry)
    }

    /// Its processor time once it has ended; it was not waited for yet, so the kernel still has it.
    fn ended(&self) -> Result<Option<f64>> {
        let stat = Stat::of_process(self.child.id())?;
        Ok(stat.has_ended.then(|| stat.with_children_ms()))
    }

    fn wait_end(&self, what: &str) -> Result<f64> {
        let deadline = Instant::now() + FERRY_TIMEOUT;
        loop {
            if let Some(processor_ms) = self.ended()? {
                return Ok(processor_ms);
            }
            ensure!(Instant::now() < deadline, "{what} does not end: {}", quote(&self.messages));
            thread::sleep(POLL);
        }
    }

    fn terminate(&self) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("a process has a number")?;
        // The child was not waited for yet, so its number is still its own.
        kill_process(pid, Signal::TERM).context("cannot cancel vmferry")
    }

    fn report(&self) -> Result<Value> {
        let text = fs::read_to_string(&self.out).context("vmferry left no report")?;
        serde_json::from_str(&text).with_context(|| format!("vmferry failed: {}", quote(&self.messages)))
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn go_vmferry(receiver: Ferry, terms: &Terms<'_>, pair: &mut Pair<'_>) -> Result<Moved> {
    let start = Instant::now();
    let (to, limit) = (format!("{TARGET_ADDRESS}:{VMFERRY_PORT}"), format!("{}ms", terms.downtime_limit_ms));
    let arguments = ["migrate", "--json", "--to", &to, "--downtime-limit", &limit];
    let sender = Ferry::start(terms, Side::Source, pair.source, &arguments)?;
    let mut seen = Seen::default();
    let mut processor_ms = loop {
        seen.listen(pair)?;
        terms.interrupt.check()?;
        if let Some(processor_ms) = sender.ended()? {
            break processor_ms;
        }
        if start.elapsed() >= terms.time_limit {
            sender.terminate()?;
            break sender.wait_end("vmferry")?;
        }
    };
    let over = Instant::now();
    processor_ms += receiver.wait_end("vmferry at the target")?;
    seen.listen(pair)?;
    let report = sender.report()?;
    let outcome = ferry_outcome(&report)?;
    let end = match outcome {
        Outcome::Completed => seen.target_resumed.context("vmferry says that the guest runs, and QEMU does not")?,
        Outcome::NotConverged | Outcome::Failed => over,
    };
    let downtime_ms = report["downtime_ms"].as_f64();
    Ok(Moved { outcome, end, downtime_ms, processor_ms, report: Some(report) })
}

/// What a report of vmferry says of the outcome.
fn ferry_outcome(report: &Value) -> Result<Outcome> {
    match report["outcome"].as_str() {
        Some("completed") => Ok(Outcome::Completed),
        Some("not_converged" | "cancelled") => Ok(Outcome::NotConverged),
        other => bail!("vmferry ended with {}: {}", other.unwrap_or("no outcome"), report["reason"]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value, happened_at: Instant) -> Event {
        Event { name: name.to_owned(), data, happened_at, received_at: happened_at }
    }

    #[test]
    fn pre_copy_ends_with_the_guest_and_post_copy_with_the_last_page() {
        let start = Instant::now();
        let at = |time_ms| start + Duration::from_millis(time_ms);
        let mut seen = Seen::default();
        seen.at_source(&event("MIGRATION_PASS", json!({"pass": 2}), at(5)));
        seen.at_target(&event("RESUME", json!(null), at(10)));
        seen.at_source(&event("MIGRATION", json!({"status": "active"}), at(11)));
        assert_eq!((seen.pass, seen.end(false)), (2, None));
        seen.at_source(&event("MIGRATION", json!({"status": "completed"}), at(30)));
        assert_eq!(seen.end(true), None);
        seen.at_target(&event("MIGRATION", json!({"status": "completed"}), at(20)));
        assert_eq!(seen.end(false), Some(at(10)));
        assert_eq!(seen.end(true), Some(at(30)));
    }

    #[test]
    fn a_migration_that_failed_has_no_end_at_the_target() {
        let now = Instant::now();
        let mut seen = Seen::default();
        seen.at_source(&event("MIGRATION", json!({"status": "failed"}), now));
        seen.at_target(&event("RESUME", json!(null), now));
        seen.at_target(&event("MIGRATION", json!({"status": "completed"}), now));
        assert_eq!(seen.end(false), None);
    }

    #[test]
    fn outcomes_have_names() {
        for outcome in Outcome::ALL {
            assert_eq!(Outcome::named(outcome.name()), Some(outcome));
        }
        assert_eq!(ferry_outcome(&json!({"outcome": "cancelled"})).unwrap(), Outcome::NotConverged);
        let error = ferry_outcome(&json!({"outcome": "failed", "reason": "no route"})).unwrap_err();
        assert!(error.to_string().contains("no route"), "{error}");
    }
}
