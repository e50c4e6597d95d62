//! A QEMU with two monitors: one for `vmferry`, one for the test.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmferry_host::qmp::{QmpClient, QmpError};

use super::vm::{PATIENCE, Recipe, Remove, Vm, temporary_directory};
use super::{LINUX_MEBIBYTES, until};

/// How often a guest may fail to boot.
const BOOT_ATTEMPTS: u32 = 3;

/// How far a guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) tick: u64,
    pub(crate) writes: u64,
}

impl Life {
    pub(crate) fn is_after(self, before: Self) -> bool {
        self.tick > before.tick && self.writes >= before.writes
    }

    fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("vmferry-guest: tick ")?;
        let (tick, rest) = rest.split_once(" writes=")?;
        let (writes, wrong) = rest.split_once(" wrong=")?;
        assert_eq!(wrong.parse(), Ok(0), "the guest found wrong pages: {line}");
        Some(Self { tick: tick.parse().ok()?, writes: writes.parse().ok()? })
    }
}

pub(crate) struct Machine {
    pub(crate) vm: Vm,
    monitor: QmpClient,
    /// Migration capabilities and parameters as QEMU has them at its start.
    settings: BTreeMap<String, Value>,
    /// Has a Linux guest that can be asked, or will have.
    linux: bool,
    _watch: Remove,
}

impl Machine {
    /// A QEMU as described, with a second monitor. Returns when it answers.
    pub(crate) fn start(recipe: Recipe) -> Self {
        let (directory, remove) = temporary_directory();
        let watch = directory.join("watch");
        let linux = recipe.linux.is_some();
        let recipe = recipe.extra(&["-qmp", &format!("unix:{},server=on,wait=off", watch.display())]);
        let mut vm = recipe.start();
        let mut monitor = connect(&mut vm, &watch);
        let settings = settings(&mut monitor);
        Self { vm, monitor, settings, linux, _watch: remove }
    }

    /// A firmware-only guest that runs.
    pub(crate) fn firmware(recipe: Recipe) -> Self {
        let mut machine = Self::start(recipe);
        machine.vm.wait_firmware();
        machine
    }

    /// A Linux guest that runs and writes.
    pub(crate) fn linux(version: &'static str, parameters: &str) -> Self {
        Self::boot(Recipe::new(version).linux(LINUX_MEBIBYTES, parameters))
    }

    /// As [`Machine::linux`], with more of QEMU's arguments.
    ///
    /// On a host with far too much to do, an emulated processor now and then loses a timer while Linux boots, and Linux
    /// waits for it for ever ("rcu_preempt kthread timer wakeup didn't happen"). No migration has begun then: it is
    /// booted anew.
    pub(crate) fn boot(recipe: Recipe) -> Self {
        for attempt in 1.. {
            let mut machine = Self::start(recipe.clone());
            let mut boots = || machine.vm.wait_line(|line| line.starts_with("vmferry-guest: ready"));
            match catch_unwind(AssertUnwindSafe(&mut boots)) {
                Ok(_) => return machine,
                Err(panic) if attempt == BOOT_ATTEMPTS => resume_unwind(panic),
                Err(_) => {}
            }
        }
        unreachable!("attempts are bounded")
    }

    /// A QEMU that waits for a Linux guest.
    pub(crate) fn waiting(version: &'static str) -> Self {
        Self::start(Recipe::new(version).linux(LINUX_MEBIBYTES, "").incoming())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.vm.pid()
    }

    /// The monitor that `vmferry` is to use.
    pub(crate) fn qmp(&self) -> String {
        self.vm.qmp.display().to_string()
    }

    pub(crate) fn run_state(&mut self) -> String {
        let status = self.monitor.execute("query-status").unwrap();
        status["status"].as_str().unwrap().to_owned()
    }

    pub(crate) fn runs(&mut self) -> bool {
        self.run_state() == "running"
    }

    /// Waits until the guest runs.
    pub(crate) fn wait_running(&mut self) {
        until("the guest runs", || self.runs());
    }

    /// Forgets what QEMU has reported so far.
    pub(crate) fn forget_events(&mut self) {
        // Taking an answer reads everything that came before it.
        self.run_state();
        self.monitor.discard_events();
    }

    /// Waits until QEMU reports this.
    pub(crate) fn wait_event(&mut self, name: &str) {
        let start = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let event = self.monitor.wait_event(left).unwrap();
            let event = event.unwrap_or_else(|| panic!("QEMU reports no {name} within {PATIENCE:?}"));
            if event.name == name {
                return;
            }
        }
    }

    /// Whether QEMU has reported this since it was last asked about events.
    pub(crate) fn has_reported(&mut self, name: &str) -> bool {
        self.run_state();
        while let Some(event) = self.monitor.wait_event(Duration::ZERO).unwrap() {
            if event.name == name {
                return true;
            }
        }
        false
    }

    pub(crate) fn execute(&mut self, command: &str) {
        self.monitor.execute(command).unwrap();
    }

    pub(crate) fn execute_with(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments).unwrap()
    }

    pub(crate) fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.monitor.execute_with(command, arguments)
    }

    /// QEMU refuses the command, with these words.
    pub(crate) fn refuses(&mut self, command: &str, words: &str) {
        match self.monitor.execute(command) {
            Err(error @ QmpError::Command { .. }) => assert!(error.to_string().contains(words), "{error}"),
            other => panic!("{command} was not refused: {other:?}"),
        }
    }

    /// The guest runs, answers, finds nothing wrong in all of its memory, and its counters go on.
    pub(crate) fn lives(&mut self) -> Life {
        self.vm.type_line("check");
        let check = self.vm.wait_line(|line| line.starts_with("vmferry-guest: full-check "));
        assert!(check.ends_with(" wrong=0"), "{check}");
        // All that was said before the answer has been read: what comes now is new.
        let tick = self.vm.wait_line(|line| Life::parse(line).is_some());
        Life::parse(&tick).unwrap()
    }

    /// No migration has left anything behind: it runs, with its settings, and nobody follows its writes.
    pub(crate) fn is_untouched(&mut self) {
        assert_eq!(self.run_state(), "running");
        self.has_its_settings();
        self.has_no_userfaultfd();
    }

    pub(crate) fn has_its_settings(&mut self) {
        let changed: Vec<String> = settings(&mut self.monitor)
            .into_iter()
            .filter(|(name, value)| self.settings.get(name) != Some(value))
            .map(|(name, value)| format!("{name} was {:?} and is {value}", self.settings.get(&name)))
            .collect();
        assert!(changed.is_empty(), "capabilities and parameters were not put back: {changed:#?}");
    }

    /// Nobody follows the guest's writes.
    pub(crate) fn has_no_userfaultfd(&self) {
        assert!(!self.has_userfaultfd_open(), "a userfaultfd stayed open in QEMU");
        assert!(!self.is_write_protected(), "guest RAM stayed registered for write protection");
    }

    /// Whether QEMU itself holds a userfaultfd.
    pub(crate) fn has_userfaultfd_open(&self) -> bool {
        let directory = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let links = directory.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        links.into_iter().any(|link| link.to_string_lossy().contains("userfaultfd"))
    }

    /// Whether some of QEMU's memory is registered with a userfaultfd, ours being the only one.
    pub(crate) fn is_write_protected(&self) -> bool {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .any(|flags| flags.split(' ').any(|flag| flag == "uw"))
    }

    /// Ends QEMU at once, as a crash would.
    pub(crate) fn kill(mut self) {
        let pid = rustix::process::Pid::from_raw(self.pid().cast_signed()).unwrap();
        // The child was not waited for yet, so its number is still its own.
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        self.vm.wait_end();
    }
}

/// The guest runs on the one, and not on the other if that still exists. The one's guest is well.
pub(crate) fn exactly_one_runs(one: &mut Machine, other: Option<&mut Machine>) {
    assert_eq!(one.run_state(), "running", "nobody runs the guest");
    if let Some(other) = other {
        assert!(!other.runs(), "both run the guest");
    }
    if one.linux {
        one.lives();
    }
}

fn settings(monitor: &mut QmpClient) -> BTreeMap<String, Value> {
    let capabilities = monitor.execute("query-migrate-capabilities").unwrap();
    let parameters = monitor.execute("query-migrate-parameters").unwrap();
    let capability = |entry: &Value| (entry["capability"].as_str().unwrap().to_owned(), entry["state"].clone());
    let capabilities = capabilities.as_array().unwrap().iter().map(capability);
    let parameters = parameters.as_object().unwrap().iter().map(|(name, value)| (name.clone(), value.clone()));
    capabilities.chain(parameters).collect()
}

fn connect(vm: &mut Vm, path: &Path) -> QmpClient {
    let start = Instant::now();
    loop {
        match QmpClient::connect(path) {
            Ok(client) => return client,
            Err(QmpError::SocketMissing { .. } | QmpError::Refused { .. }) if start.elapsed() < PATIENCE => {
                std::thread::sleep(super::POLL);
            }
            // Connecting to the other monitor says why QEMU has ended, where it has.
            Err(error) => {
                drop(vm.connect());
                panic!("{error}");
            }
        }
    }
}
