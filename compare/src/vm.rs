//! A QEMU on one of the two hosts, with one of the guests.

use std::fs::{self, File};
use std::io::{BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use vmferry_host::qmp::{QmpClient, QmpError};

use crate::guests::{Guest, Program};
use crate::interrupt::Interrupt;
use crate::network::{Network, Side};
use crate::processor;
use crate::serial::Serial;

/// How long a QEMU may take until it answers, and until it has ended.
const QEMU_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a check of all memory may take, emulated on a busy machine.
const CHECK_TIMEOUT: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(10);

/// The tmpfs for the guests' RAM.
const RAM_DIRECTORY: &str = "/dev/shm";

/// How names of scratch files begin; the number of the process that made them follows.
const PREFIX: &str = "vmferry-compare-";

/// Lines of a program's messages that an error repeats.
const QUOTED_LINES_MAX: usize = 8;

/// What every guest is started with.
#[derive(Debug, Clone)]
pub(crate) struct Machinery {
    pub(crate) qemu: PathBuf,
    pub(crate) kernel: PathBuf,
    /// The test guest.
    pub(crate) initramfs: PathBuf,
    /// The guest with real programs; it is needed for some guests only.
    pub(crate) study_initramfs: PathBuf,
    pub(crate) memory_bytes: u64,
}

/// The scratch places of one QEMU; removed when dropped.
#[derive(Debug)]
struct Files {
    directory: PathBuf,
    ram: PathBuf,
}

impl Files {
    fn create(side: Side) -> Result<Self> {
        let name = format!("{PREFIX}{}-{}", std::process::id(), side.name());
        let files = Self { directory: std::env::temp_dir().join(&name), ram: Path::new(RAM_DIRECTORY).join(&name) };
        // Left over by a program with the same number that was killed.
        let _ = fs::remove_dir_all(&files.directory);
        fs::create_dir_all(&files.directory).with_context(|| format!("cannot make {}", files.directory.display()))?;
        Ok(files)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What is not there needs no removal.
        let _ = fs::remove_file(&self.ram);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Removes scratch files of programs that have ended.
pub(crate) fn remove_left_over() {
    for place in [std::env::temp_dir(), PathBuf::from(RAM_DIRECTORY)] {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let path = entry.path();
            let owner = path.file_name().and_then(|name| name.to_str()).and_then(scratch_owner);
            if owner.is_some_and(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
                // What cannot be removed is not in the way.
                let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
    }
}

/// The process that made a scratch file of this name.
fn scratch_owner(name: &str) -> Option<u32> {
    let (owner, side) = name.strip_prefix(PREFIX)?.split_once('-')?;
    Side::BOTH.iter().any(|known| known.name() == side).then(|| owner.parse().ok())?
}

/// A QEMU; ended when dropped.
#[derive(Debug)]
pub(crate) struct Vm {
    child: Child,
    input: ChildStdin,
    pub(crate) serial: Arc<Serial>,
    /// The monitor through which QEMU's own migration is driven, and events are watched. vmferry has another one.
    pub(crate) monitor: QmpClient,
    vcpu_threads: Vec<u64>,
    files: Files,
}

/// What a guest said of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) pages: u64,
    pub(crate) wrong: u64,
}

impl Vm {
    /// Starts a guest on the source's host, or on the target's a QEMU that waits for it.
    pub(crate) fn start(
        machinery: &Machinery,
        network: &Network,
        side: Side,
        guest: &Guest,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let files = Files::create(side)?;
        let memory_bytes = machinery.memory_bytes;
        let socket = |name: &str| format!("unix:{},server=on,wait=off", files.directory.join(name).display());
        let ram = format!("memory-backend-file,id=ram,size={memory_bytes},mem-path={},share=on", files.ram.display());
        let initramfs = match guest.program {
            Program::Pages(_) => &machinery.initramfs,
            Program::Study(_) => &machinery.study_initramfs,
        };
        let messages = files.directory.join("messages");
        let mut command = network.command(side, &machinery.qemu);
        command
            .args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-m", &format!("{}M", memory_bytes >> 20), "-object", &ram, "-machine", "q35,memory-backend=ram"])
            .args(["-qmp", &socket("ours"), "-qmp", &socket("vmferry")])
            .arg("-kernel")
            .arg(&machinery.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &guest.command_line(memory_bytes)]);
        if side == Side::Target {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&messages).context("cannot create a file for QEMU's messages")?)
            // Not of the terminal's group: it is ended by us, after what has to be done before.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", machinery.qemu.display()))?;
        let input = child.stdin.take().context("standard input was piped")?;
        let output = child.stdout.take().context("standard output was piped")?;
        let serial = Serial::follow(BufReader::new(output));
        let connected =
            connect(&mut child, &files.directory.join("ours"), &messages, interrupt).and_then(|mut monitor| {
                let processors = monitor.execute("query-cpus-fast").context("cannot ask QEMU for its processors")?;
                let threads = processors.as_array().into_iter().flatten();
                Ok((threads.filter_map(|processor| processor["thread-id"].as_u64()).collect(), monitor))
            });
        match connected {
            Ok((vcpu_threads, monitor)) => Ok(Self { child, input, serial, monitor, vcpu_threads, files }),
            Err(error) => {
                // Fails only where it has ended already.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The monitor that is vmferry's alone.
    pub(crate) fn vmferry_socket(&self) -> PathBuf {
        self.files.directory.join("vmferry")
    }

    /// A file of this QEMU's scratch directory.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.files.directory.join(name)
    }

    /// Processor time that QEMU used for anything but its guest.
    pub(crate) fn processor_ms(&self) -> Result<f64> {
        processor::without_guest_ms(self.pid(), &self.vcpu_threads)
    }

    /// Sets QEMU's migration up.
    pub(crate) fn set_migration(
        &mut self,
        capabilities: serde_json::Value,
        parameters: serde_json::Value,
    ) -> Result<()> {
        self.monitor
            .execute_with("migrate-set-capabilities", capabilities)
            .context("QEMU does not have this mode of migration")?;
        self.monitor
            .execute_with("migrate-set-parameters", parameters)
            .context("QEMU does not take these settings of migration")?;
        Ok(())
    }

    /// Where QEMU's migration stands.
    pub(crate) fn query_migrate(&mut self) -> Result<serde_json::Value> {
        self.monitor.execute_with("query-migrate", json!({})).context("cannot ask QEMU about its migration")
    }

    /// Has the guest check all of its memory.
    pub(crate) fn check(&mut self, interrupt: &Interrupt) -> Result<Check> {
        writeln!(self.input, "check").and_then(|()| self.input.flush()).context("cannot write to the serial port")?;
        let line = self.serial.wait_for("full-check", CHECK_TIMEOUT, interrupt)?;
        parse_check(&line).with_context(|| format!("the guest's check cannot be read: {line:?}"))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only where QEMU has ended already. The files go after this.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a program's messages, for an error.
pub(crate) fn quote(messages: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(messages).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(QUOTED_LINES_MAX)..].join("; ")
}

fn connect(child: &mut Child, socket: &Path, messages: &Path, interrupt: &Interrupt) -> Result<QmpClient> {
    let deadline = Instant::now() + QEMU_TIMEOUT;
    loop {
        match QmpClient::connect(socket) {
            Ok(client) => return Ok(client),
            Err(QmpError::SocketMissing { .. } | QmpError::Refused { .. }) if Instant::now() < deadline => {}
            Err(error) => return Err(error).context("QEMU does not answer"),
        }
        if let Some(status) = child.try_wait().context("cannot ask for QEMU's end")? {
            bail!("QEMU has ended at once ({status}): {}", quote(messages));
        }
        interrupt.check()?;
        thread::sleep(POLL);
    }
}

fn parse_check(line: &str) -> Option<Check> {
    let number = |name: &str| {
        let rest = line.split_once(name)?.1;
        rest.split(' ').next()?.parse().ok()
    };
    Some(Check { pages: number(" pages=")?, wrong: number(" wrong=")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_read() {
        let check = parse_check("vmferry-guest: full-check pages=98304 wrong=2");
        assert_eq!(check, Some(Check { pages: 98304, wrong: 2 }));
        assert_eq!(parse_check("vmferry-guest: full-check pages=98304"), None);
    }

    #[test]
    fn only_our_own_scratch_files_have_an_owner() {
        assert_eq!(scratch_owner("vmferry-compare-17-source"), Some(17));
        assert_eq!(scratch_owner("vmferry-compare-17-other"), None);
        assert_eq!(scratch_owner("vmferry-study-17"), None);
    }
}
