//! `cargo xtask study --record`: starts each guest of the study, and records what it writes into `recordings/`.
//!
//! A recording is made once and then kept with the sources, so that the study itself needs no QEMU and finds the same
//! guests everywhere. It is installed only when it is complete and small enough; until then the one from before stays.
//!
//! QEMU, its socket and the guest's RAM live in scratch places that are named after this process. They go when the
//! recording ends, however it ends. A Ctrl-C also ends QEMU, which is of the terminal's group, but leaves nobody to remove
//! the files: the next recording does that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{cargo, passes};
use crate::workloads::{self, StudyGuest, WORKLOADS, Workload};
use crate::workspace::{Workspace, install_file, remove_directory};

/// The most that one recording may take among the sources.
const FILE_BYTES_MAX: u64 = 2_000_000;

/// The least that a recording may last: of less, a guest whose load comes in rounds of some seconds shows too few.
const RECORDED_SECONDS_MIN: u32 = 20;

/// Length of an epoch. The same for all: rates of traces with different epochs cannot be compared.
const EPOCH: &str = "50ms";

/// The longest that a guest may take from its start until all its loads run. Most take less than 20 s, emulated.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// Seconds, as the guest counts them, that its loads run before the recording. They begin with empty caches and logs, and
/// are not meant to be recorded like that.
const SETTLE_BEATS: u64 = 10;
const SETTLE_TIMEOUT: Duration = Duration::from_secs(120);

/// How often the guest's console is read.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The tmpfs for the guest's RAM.
const RAM_DIRECTORY: &str = "/dev/shm";

/// How names of scratch files begin; the number of the process that made them follows.
const SCRATCH_PREFIX: &str = "vmferry-study-";

/// Lines of the console, and of QEMU's messages, that an error repeats.
const QUOTED_LINES_MAX: usize = 8;

/// Records the workloads with these names, all of them if none is named. If one fails, the others are recorded all the
/// same.
///
/// # Errors
/// When nothing can be recorded at all: vmferry or the guest cannot be built, or there is no QEMU.
pub(crate) fn record(workspace: &Workspace, names: &[String]) -> Result<ExitCode> {
    let vmferry = build_vmferry(workspace)?;
    let guest = workloads::build(workspace)?;
    let qemu = newest_qemu(&workspace.tools)?;
    let directory = workspace.root.join("recordings");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for place in [std::env::temp_dir(), PathBuf::from(RAM_DIRECTORY)] {
        remove_left_over(&place)?;
    }

    let is_chosen = |workload: &&Workload| names.is_empty() || names.iter().any(|name| name == workload.name);
    let mut has_failed = false;
    for workload in WORKLOADS.iter().filter(is_chosen) {
        println!("\n== {}: {}", workload.name, workload.about);
        if let Err(error) = record_one(&vmferry, &qemu, &guest, workload, &directory) {
            eprintln!("xtask: {} was not recorded: {error:#}", workload.name);
            has_failed = true;
        }
    }
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Builds vmferry in release mode and answers where it is. It is started from there rather than with `cargo run`, which may
/// have to wait for another cargo, or build anew what changed meanwhile, while the guest runs on.
pub(crate) fn build_vmferry(workspace: &Workspace) -> Result<PathBuf> {
    let mut build = cargo(&workspace.root);
    build.args(["build", "--release", "--package", "vmferry", "--message-format", "json-render-diagnostics"]);
    let output = build.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(output.status.success(), "vmferry does not build");
    executable(&String::from_utf8_lossy(&output.stdout)).context("cargo did not say where it built vmferry")
}

/// The program that cargo's messages name, one JSON document on each line.
fn executable(messages: &str) -> Option<PathBuf> {
    messages.lines().find_map(|message| {
        let (path, _) = message.split_once(r#""executable":""#)?.1.split_once('"')?;
        // A quotation mark or backslash in a path would need more of JSON than this.
        (!path.contains('\\')).then(|| PathBuf::from(path))
    })
}

fn record_one(vmferry: &Path, qemu: &Path, guest: &StudyGuest, workload: &Workload, directory: &Path) -> Result<()> {
    let start = Instant::now();
    let mut vm = Vm::start(qemu, guest, workload)?;
    vm.wait_until(READY_TIMEOUT, "`ready`", |console| console.is_ready)?;
    println!("ready after {:.1} s", start.elapsed().as_secs_f64());
    vm.wait_until(SETTLE_TIMEOUT, "a beat", |console| {
        console.last_beat.as_ref().is_some_and(|beat| beat.number >= SETTLE_BEATS)
    })?;

    let mut seconds = workload.recorded_seconds;
    let recording = loop {
        let recording = record_running(vmferry, &vm, workload.name, seconds)?;
        let bytes = recording.len() as u64;
        if bytes <= FILE_BYTES_MAX {
            break recording;
        }
        let shorter = fitting_seconds(seconds, bytes);
        ensure!(
            shorter >= RECORDED_SECONDS_MIN,
            "{seconds} s of it take {bytes} bytes of {FILE_BYTES_MAX} allowed, and less than {RECORDED_SECONDS_MIN} s say \
             too little"
        );
        println!("{seconds} s of it take {bytes} bytes of {FILE_BYTES_MAX} allowed; once more, with {shorter} s");
        seconds = shorter;
    };
    let path = directory.join(workload.name).with_extension("parquet");
    install_file(&path, &recording)?;
    println!("{}: {seconds} s, {} bytes of {FILE_BYTES_MAX} allowed", path.display(), recording.len());
    Ok(())
}

/// Records a guest as it runs, and answers what is to be in the file.
fn record_running(vmferry: &Path, vm: &Vm, name: &str, seconds: u32) -> Result<Vec<u8>> {
    let before = vm.last_beat()?;
    let file = vm.files.directory.join("recording");
    let mut command = Command::new(vmferry);
    command.args(["record", "--qmp"]).arg(vm.files.socket()).arg("--output").arg(&file);
    command.args(["--name", name, "--epoch", EPOCH, "--duration", &format!("{seconds}s")]);
    ensure!(passes(&mut command)?, "`vmferry record` failed");
    let after = vm.last_beat()?;
    ensure!(after.number > before.number, "the guest stood still: beat {} was its last", after.number);
    println!("rounds while recorded: {}", after.rounds_since(&before));
    fs::read(&file).context("`vmferry record` wrote no file")
}

/// How long a recording may be if one of `seconds` takes so many bytes, too many. Somewhat less than in proportion, since
/// a guest does not write alike all the time.
fn fitting_seconds(seconds: u32, bytes: u64) -> u32 {
    let fitting = u64::from(seconds) * FILE_BYTES_MAX * 9 / (bytes.max(FILE_BYTES_MAX) * 10);
    u32::try_from(fitting).unwrap_or(seconds)
}

/// The newest of the QEMUs that set-up made.
fn newest_qemu(tools: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(tools).with_context(|| format!("cannot list {}", tools.display()))? {
        let path = entry?.path();
        let version = path.file_name().and_then(|name| name.to_str()).and_then(qemu_version);
        found.extend(version.filter(|_| path.join("run").is_file()).map(|version| (version, path.join("run"))));
    }
    let (version, program) = found.into_iter().max().context("there is no QEMU; run `cargo xtask setup` first")?;
    println!("recording under QEMU {}.{}", version.0, version.1);
    Ok(program)
}

/// The version in the name of a tool's directory, if that is a QEMU's.
fn qemu_version(name: &str) -> Option<(u32, u32)> {
    let (major, minor) = name.strip_prefix("qemu-")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Removes scratch files of processes that have ended.
fn remove_left_over(place: &Path) -> Result<()> {
    for entry in fs::read_dir(place).with_context(|| format!("cannot list {}", place.display()))? {
        let path = entry?.path();
        let owner = path.file_name().and_then(|name| name.to_str()).and_then(scratch_owner);
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
            // What cannot be removed may be somebody else's, and is not in the way.
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
    Ok(())
}

/// The process that made a scratch file of this name.
fn scratch_owner(name: &str) -> Option<u32> {
    name.strip_prefix(SCRATCH_PREFIX)?.parse().ok()
}

/// The scratch places of one QEMU; removed when dropped.
#[derive(Debug)]
struct Files {
    directory: PathBuf,
    ram: PathBuf,
}

impl Files {
    fn create() -> Result<Self> {
        let name = format!("{SCRATCH_PREFIX}{}", std::process::id());
        let files = Self { directory: std::env::temp_dir().join(&name), ram: Path::new(RAM_DIRECTORY).join(&name) };
        remove_directory(&files.directory)?;
        fs::create_dir_all(&files.directory).with_context(|| format!("cannot create {}", files.directory.display()))?;
        Ok(files)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("qmp")
    }

    fn console(&self) -> PathBuf {
        self.directory.join("console")
    }

    fn messages(&self) -> PathBuf {
        self.directory.join("messages")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What is not there needs no removal.
        let _ = fs::remove_file(&self.ram);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A QEMU with one of the guests; ended when dropped.
#[derive(Debug)]
struct Vm {
    child: Child,
    files: Files,
}

impl Vm {
    fn start(qemu: &Path, guest: &StudyGuest, workload: &Workload) -> Result<Self> {
        let files = Files::create()?;
        let memory_bytes = workload.memory_bytes;
        let ram = format!("memory-backend-file,id=ram,size={memory_bytes},mem-path={},share=on", files.ram.display());
        let messages = File::create(files.messages()).context("cannot create a file for QEMU's messages")?;
        let child = Command::new(qemu)
            .args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-m", &format!("{}M", memory_bytes >> 20), "-object", &ram, "-machine", "q35,memory-backend=ram"])
            .args(["-serial", &format!("file:{}", files.console().display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", files.socket().display())])
            .arg("-kernel")
            .arg(&guest.kernel)
            .arg("-initrd")
            .arg(&guest.initramfs)
            .args(["-append", workload.command_line])
            .stdin(Stdio::null())
            .stdout(messages.try_clone()?)
            .stderr(messages)
            .spawn()
            .with_context(|| format!("cannot start {}", qemu.display()))?;
        Ok(Self { child, files })
    }

    /// Waits until the guest's console shows something.
    ///
    /// # Errors
    /// When it does not in time, when a load of the guest ends, and when QEMU ends.
    fn wait_until(&mut self, timeout: Duration, what: &str, is_met: impl Fn(&Console) -> bool) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.child.try_wait().context("cannot ask for QEMU's end")?;
            let text = self.console_text();
            let console = Console::read(&text)?;
            if is_met(&console) {
                return Ok(());
            }
            if let Some(status) = ended {
                let messages = fs::read_to_string(self.files.messages()).unwrap_or_default();
                bail!("QEMU has ended ({status}):\n  {}\n  {}", last_lines(&messages), last_lines(&text));
            }
            if Instant::now() >= deadline {
                let seconds = timeout.as_secs();
                bail!("the guest's console did not show {what} within {seconds} s:\n  {}", last_lines(&text));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    fn last_beat(&self) -> Result<Beat> {
        Console::read(&self.console_text())?.last_beat.context("the guest has shown no beat")
    }

    /// What the guest printed so far. Nothing if QEMU has not begun; firmware and kernel may print what is not text.
    fn console_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.files.console()).unwrap_or_default()).into_owned()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only where QEMU has ended already. The files go after this.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the guest has said about itself; see `workloads/init.sh`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Console {
    is_ready: bool,
    last_beat: Option<Beat>,
}

impl Console {
    /// Reads the console's lines. A last line without its end is still being written.
    ///
    /// # Errors
    /// When a load has ended, with the guest's words about it.
    fn read(text: &str) -> Result<Self> {
        let mut console = Self::default();
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            // The kernel may have printed something before it on the same line.
            let Some((_, words)) = line.trim_end().split_once("vmferry-study: ") else { continue };
            match words.split_once(' ') {
                Some(("ready", _)) => console.is_ready = true,
                Some(("beat", beat)) => console.last_beat = Beat::parse(beat).or(console.last_beat),
                Some(("failed", why)) => bail!("a load of the guest has ended: {why}"),
                _ => {}
            }
        }
        Ok(console)
    }
}

/// A sign of life of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Beat {
    number: u64,
    /// How often each load has come to the end of a round.
    rounds: Vec<(String, u64)>,
}

impl Beat {
    /// Reads `NUMBER LOAD=ROUNDS ...`.
    fn parse(words: &str) -> Option<Self> {
        let mut words = words.split(' ');
        let number = words.next()?.parse().ok()?;
        let round = |word: &str| {
            let (load, count) = word.split_once('=')?;
            Some((load.to_owned(), count.parse().ok()?))
        };
        Some(Self { number, rounds: words.map(round).collect::<Option<_>>()? })
    }

    /// For people: how many rounds each load ended after `before`.
    fn rounds_since(&self, before: &Self) -> String {
        if self.rounds.is_empty() {
            return "no load".to_owned();
        }
        let since = |(load, count): &(String, u64)| {
            let start = before.rounds.iter().find(|(name, _)| name == load).map_or(0, |(_, count)| *count);
            format!("{load} {}", count.saturating_sub(start))
        };
        self.rounds.iter().map(since).collect::<Vec<_>>().join(", ")
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(QUOTED_LINES_MAX)..].join("\n  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(number: u64, rounds: &[(&str, u64)]) -> Beat {
        Beat { number, rounds: rounds.iter().map(|(load, count)| ((*load).to_owned(), *count)).collect() }
    }

    #[test]
    fn a_guest_is_ready_and_then_beats() {
        assert_eq!(Console::read("").unwrap(), Console::default());
        let text = "[    0.1] a word of the kernel\r\nvmferry-study: ready mixed\r\n";
        assert_eq!(Console::read(text).unwrap(), Console { is_ready: true, last_beat: None });

        let text = format!(
            "{text}vmferry-study: beat 1 redis=0 compress=0\r\n[    9.5] vmferry-study: beat 2 redis=3 compress=1\r\n"
        );
        let last_beat = Some(beat(2, &[("redis", 3), ("compress", 1)]));
        assert_eq!(Console::read(&text).unwrap(), Console { is_ready: true, last_beat });
    }

    #[test]
    fn an_idle_guest_has_no_loads() {
        let console = Console::read("vmferry-study: ready idle\nvmferry-study: beat 7\n").unwrap();
        assert_eq!(console.last_beat, Some(beat(7, &[])));
    }

    #[test]
    fn a_line_that_is_not_whole_does_not_count() {
        let console = Console::read("vmferry-study: beat 1 redis=0\nvmferry-study: beat 2 redis=1").unwrap();
        assert_eq!(console.last_beat, Some(beat(1, &[("redis", 0)])));
        assert!(!Console::read("vmferry-study: ready red").unwrap().is_ready);
        // Cut by what the kernel printed in its midst.
        let console = Console::read("vmferry-study: beat 1 redis=0\nvmferry-study: beat 2 red[ 1.0]\n").unwrap();
        assert_eq!(console.last_beat, Some(beat(1, &[("redis", 0)])));
    }

    #[test]
    fn a_load_that_ends_is_an_error_with_its_last_words() {
        let text =
            "vmferry-study: ready redis\nvmferry-study: failed redis: out of memory \nvmferry-study: beat 3 redis=1\n";
        let error = Console::read(text).unwrap_err().to_string();
        assert_eq!(error, "a load of the guest has ended: redis: out of memory");
    }

    #[test]
    fn rounds_are_counted_from_a_beat_to_another() {
        let (before, after) = (beat(10, &[("redis", 3), ("sqlite", 40)]), beat(70, &[("redis", 25), ("sqlite", 40)]));
        assert_eq!(after.rounds_since(&before), "redis 22, sqlite 0");
        assert_eq!(beat(9, &[]).rounds_since(&beat(1, &[])), "no load");
    }

    #[test]
    fn what_is_too_large_is_recorded_for_a_shorter_time() {
        assert_eq!(fitting_seconds(60, 2 * FILE_BYTES_MAX), 27);
        // Never as long as before, so that trying ends.
        assert_eq!(fitting_seconds(60, FILE_BYTES_MAX + 1), 53);
        assert_eq!(fitting_seconds(20, u64::MAX / 10), 0);
    }

    #[test]
    fn the_program_is_the_one_that_cargo_names() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"anyhow"},"executable":null,"fresh":true}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"vmferry"},"executable":"/there/release/vmferry","fresh":true}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages), Some(PathBuf::from("/there/release/vmferry")));
        assert_eq!(executable(r#"{"executable":"/the\\re/vmferry"}"#), None);
        assert_eq!(executable(""), None);
    }

    #[test]
    fn versions_of_qemu_are_compared_as_numbers() {
        assert!(qemu_version("qemu-10.0") > qemu_version("qemu-7.2"));
        assert_eq!(qemu_version("kernel"), None);
        assert_eq!(qemu_version("qemu-10"), None);
    }

    #[test]
    fn only_our_own_scratch_files_have_an_owner() {
        assert_eq!(scratch_owner("vmferry-study-17"), Some(17));
        assert_eq!(scratch_owner("vmferry-study-17.parquet"), None);
        assert_eq!(scratch_owner("vmferry-demo-17-source"), None);
    }
}
