//! The demo on two stock QEMU processes, with a Linux guest that writes and checks its memory.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vmferry_core::engine::OutcomeKind;
use vmferry_core::pages::PAGE_BYTES;
use vmferry_guest::Parameters;
use vmferry_host::control::Controls;
use vmferry_host::{Cancel, MigrateOptions, QemuSource, QemuTarget, SelfCheck};

use super::{DemoReport, GuestReport, move_guest, parameters, used_bytes};
use crate::cli::DemoArgs;
use crate::migrate::guard_program;

/// How long a guest may take to boot. Emulated on a busy machine it takes some seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long anything else may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The most of RAM that the guest's writer uses; Linux needs the rest.
const USED_PERCENT: u8 = 50;
/// The least RAM that Linux and the writer start with.
const MEMORY_MIN_BYTES: u64 = 160 << 20;
/// Serial lines kept.
const LINES_MAX: usize = 4096;

pub(super) fn run(
    args: &DemoArgs,
    options: &MigrateOptions,
    cancel: &Cancel,
    controls: Option<&Controls>,
) -> anyhow::Result<DemoReport> {
    if args.memory < MEMORY_MIN_BYTES {
        return Err(crate::usage_error("--memory must be at least 160MiB for a Linux guest"));
    }
    if args.used.is_some_and(|percent| percent > USED_PERCENT) {
        return Err(crate::usage_error(format!("--used can be at most {USED_PERCENT} with a Linux guest")));
    }
    let tools = Tools::find(args)?;
    let parameters = parameters(args, used_bytes(args, USED_PERCENT) / PAGE_BYTES)?;
    let mut source_vm = Vm::start(&tools, args.memory, &parameters, "source")?;
    source_vm.wait_for("ready", BOOT_TIMEOUT, cancel)?;
    source_vm.wait_for("tick", ANSWER_TIMEOUT, cancel)?;
    let mut target_vm = Vm::start(&tools, args.memory, &parameters, "target")?;
    target_vm.wait_for_qmp(cancel)?;

    let mut target = QemuTarget::attach(&target_vm.qmp, None)?;
    let mut source = QemuSource::attach(&source_vm.qmp, None, Some(&guard_program()?))?;
    let (report, _) = move_guest(&mut source, &mut target, options, cancel, controls)?;

    let guest = match report.outcome {
        OutcomeKind::Completed => {
            let before = source_vm.last_tick().context("the guest never ticked on the source")?;
            let after = target_vm.wait_for("tick", ANSWER_TIMEOUT, cancel)?;
            let after = Tick::parse(&after).context("the guest's tick cannot be read")?;
            if after.number <= before.number || after.writes < before.writes {
                bail!("the guest's counters went back: {before:?} on the source, {after:?} on the target");
            }
            let check = target_vm.check(cancel)?;
            let after = target_vm.last_tick().context("the guest does not tick on the target")?;
            let silent = source_vm.last_tick() == Some(before);
            if !silent {
                bail!("the guest goes on ticking on the source: it runs twice");
            }
            let gap_ms = longest_gap_ms(&[&source_vm.serial, &target_vm.serial]);
            Some(GuestReport { writes_before: before.writes, writes_after: after.writes, gap_ms, check })
        }
        OutcomeKind::Cancelled | OutcomeKind::NotConverged | OutcomeKind::Failed => {
            let before = source_vm.last_tick().context("the guest never ticked")?;
            let go_on = Cancel::new().context("cannot prepare for signals")?;
            let check = source_vm.check(&go_on)?;
            let after = source_vm.last_tick().context("the guest does not tick any more")?;
            let gap_ms = longest_gap_ms(&[&source_vm.serial]);
            Some(GuestReport { writes_before: before.writes, writes_after: after.writes, gap_ms, check })
        }
        OutcomeKind::InDoubt => None,
    };
    Ok(DemoReport { vmm: "qemu", migration: report, guest })
}

/// What has to be there.
struct Tools {
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Tools {
    fn find(args: &DemoArgs) -> anyhow::Result<Self> {
        const HELP: &str = "run `cargo xtask setup` in the source tree, or give --qemu, --kernel and --initrd";
        let directories = tool_directories();
        let in_tools = |name: &str| directories.iter().map(|directory| directory.join(name)).find(|path| path.exists());
        let given = |flag: &Option<PathBuf>, name: &str| {
            let path =
                flag.clone().or_else(|| in_tools(name)).with_context(|| format!("there is no {name}: {HELP}"))?;
            if path.exists() { Ok(path) } else { Err(anyhow::anyhow!("{} does not exist: {HELP}", path.display())) }
        };
        let qemu = match &args.qemu {
            Some(path) => path.clone(),
            None => in_tools("qemu-10.0/run")
                .or_else(|| in_tools("qemu-7.2/run"))
                .or_else(|| in_path("qemu-system-x86_64"))
                .with_context(|| format!("there is no QEMU: {HELP}"))?,
        };
        Ok(Self {
            qemu,
            kernel: given(&args.kernel, "kernel/vmlinuz")?,
            initrd: given(&args.initrd, "initramfs.cpio")?,
        })
    }
}

/// Where `cargo xtask setup` may have put things: as told, beside this program, or below the current folder.
fn tool_directories() -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> = std::env::var_os("VMFERRY_TOOLS").map(PathBuf::from).into_iter().collect();
    if let Ok(program) = std::env::current_exe() {
        directories.extend(program.ancestors().filter(|path| path.ends_with("target")).map(|path| path.join("tools")));
    }
    directories.push(Path::new("target").join("tools"));
    directories
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// One QEMU of the demo; ended, and its files removed, when dropped.
struct Vm {
    child: Child,
    input: ChildStdin,
    serial: Arc<Serial>,
    qmp: PathBuf,
    _files: Files,
}

/// The files of one QEMU.
struct Files {
    directory: PathBuf,
    ram: PathBuf,
}

impl Drop for Files {
    fn drop(&mut self) {
        // What is not there any more needs no removal.
        let _ = std::fs::remove_file(&self.ram);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Vm {
    fn start(tools: &Tools, memory_bytes: u64, parameters: &Parameters, role: &str) -> anyhow::Result<Self> {
        let name = format!("vmferry-demo-{}-{role}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        let files = Files { ram: Path::new("/dev/shm").join(&name), directory: directory.clone() };
        // Left over by a run with the same process id that was killed.
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let qmp = directory.join("qmp");
        let ram = format!("memory-backend-file,id=ram,size={memory_bytes},mem-path={},share=on", files.ram.display());
        let append = format!("console=ttyS0 quiet panic=-1 {parameters}");
        let mut command = Command::new(&tools.qemu);
        command
            .args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-m", &format!("{}M", memory_bytes >> 20), "-object", &ram, "-machine", "q35,memory-backend=ram"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .args([OsString::from("-kernel"), tools.kernel.clone().into()])
            .args([OsString::from("-initrd"), tools.initrd.clone().into()])
            .args(["-append", &append]);
        if role == "target" {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Not of the terminal's group: a key that cancels the migration must not end the guest.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", tools.qemu.display()))?;
        let input = child.stdin.take().expect("standard input was piped");
        let output = child.stdout.take().expect("standard output was piped");
        let serial = Arc::new(Serial::default());
        let reader = Arc::clone(&serial);
        std::thread::spawn(move || reader.fill(BufReader::new(output)));
        Ok(Self { child, input, serial, qmp, _files: files })
    }

    fn wait_for(&mut self, word: &str, timeout: Duration, cancel: &Cancel) -> anyhow::Result<String> {
        self.serial.wait_for(word, timeout, cancel)
    }

    fn wait_for_qmp(&mut self, cancel: &Cancel) -> anyhow::Result<()> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        while !self.qmp.exists() {
            if let Some(status) = self.child.try_wait().context("cannot ask for QEMU's end")? {
                bail!("QEMU has ended at once: {status}");
            }
            if Instant::now() > deadline || cancel.is_cancelled() {
                bail!("QEMU does not open its QMP socket");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Has the guest check all of its memory.
    fn check(&mut self, cancel: &Cancel) -> anyhow::Result<SelfCheck> {
        writeln!(self.input, "check").and_then(|()| self.input.flush()).context("cannot write to the serial port")?;
        let line = self.wait_for("full-check", ANSWER_TIMEOUT, cancel)?;
        let pages = field(&line, "pages=").context("the guest's check cannot be read")?;
        let wrong = field(&line, "wrong=").context("the guest's check cannot be read")?;
        let first_wrong = self.serial.last_with("wrong page=").filter(|_| wrong > 0);
        Ok(SelfCheck { pages, wrong, first_wrong })
    }

    fn last_tick(&self) -> Option<Tick> {
        Tick::parse(&self.serial.last_with("tick")?)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only where QEMU has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tick {
    number: u64,
    writes: u64,
}

impl Tick {
    fn parse(line: &str) -> Option<Self> {
        Some(Self { number: field(line, "tick ")?, writes: field(line, "writes=")? })
    }
}

/// The number behind `name` in a line of the guest.
fn field(line: &str, name: &str) -> Option<u64> {
    let rest = &line[line.find(name)? + name.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// The guest's serial port: its last lines, each with the moment it came.
#[derive(Default)]
struct Serial {
    lines: Mutex<Lines>,
    arrived: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: VecDeque<(Instant, String)>,
    /// How many of the lines were asked about already.
    waited: usize,
    ended: bool,
}

impl Serial {
    fn fill(&self, mut output: impl BufRead) {
        loop {
            let mut bytes = Vec::new();
            let more = output.read_until(b'\n', &mut bytes).unwrap_or(0) > 0;
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if more {
                let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                tracing::debug!(line, "serial");
                lines.lines.push_back((Instant::now(), line));
                if lines.lines.len() > LINES_MAX {
                    lines.lines.pop_front();
                    lines.waited = lines.waited.saturating_sub(1);
                }
            } else {
                lines.ended = true;
            }
            self.arrived.notify_all();
            if !more {
                return;
            }
        }
    }

    /// The next line of the guest with this word, of those that nobody waited for before.
    fn wait_for(&self, word: &str, timeout: Duration, cancel: &Cancel) -> anyhow::Result<String> {
        let deadline = Instant::now() + timeout;
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            while let Some((_, line)) = lines.lines.get(lines.waited) {
                let line = line.clone();
                lines.waited += 1;
                if let Some(words) = line.strip_prefix("vmferry-guest: ") {
                    if words.starts_with("failed") {
                        bail!("the guest says: {words}");
                    }
                    if words.starts_with(word) {
                        return Ok(line);
                    }
                }
            }
            if lines.ended {
                bail!("QEMU has ended while the guest's `{word}` was waited for");
            }
            if cancel.is_cancelled() {
                bail!("cancelled");
            }
            if Instant::now() >= deadline {
                bail!("the guest said no `{word}` within {} s", timeout.as_secs());
            }
            let (next, _) =
                self.arrived.wait_timeout(lines, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner);
            lines = next;
        }
    }

    fn last_with(&self, word: &str) -> Option<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.lines.iter().rev().map(|(_, line)| line).find(|line| line.contains(word)).cloned()
    }

    fn ticks(&self) -> Vec<Instant> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.lines.iter().filter(|(_, line)| Tick::parse(line).is_some()).map(|(at, _)| *at).collect()
    }
}

/// The longest time between two ticks, on whichever side each was seen.
fn longest_gap_ms(serials: &[&Arc<Serial>]) -> Option<f64> {
    let mut ticks: Vec<Instant> = serials.iter().flat_map(|serial| serial.ticks()).collect();
    ticks.sort_unstable();
    ticks.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).max_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_and_other_lines_are_not() {
        let tick = Tick::parse("vmferry-guest: tick 17 writes=34012 wrong=0");
        assert_eq!(tick, Some(Tick { number: 17, writes: 34012 }));
        assert_eq!(Tick::parse("vmferry-guest: check pages=3 wrong=0"), None);
        assert_eq!(field("full-check pages=16384 wrong=2", "wrong="), Some(2));
    }

    #[test]
    fn a_serial_port_is_waited_for_line_by_line() {
        let serial = Serial::default();
        serial.fill(&b"noise\nvmferry-guest: ready pages=4\nvmferry-guest: tick 1 writes=2 wrong=0\n"[..]);
        let cancel = Cancel::new().unwrap();
        let wait = |word| serial.wait_for(word, Duration::ZERO, &cancel);
        assert!(wait("ready").unwrap().ends_with("pages=4"));
        assert!(wait("tick").is_ok());
        assert!(wait("tick").unwrap_err().to_string().contains("QEMU has ended"));
        assert!(serial.last_with("ready").is_some());
    }
}
