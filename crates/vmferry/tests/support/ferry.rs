//! `vmferry` as a process.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use rustix::process::{Pid, Signal};
use serde_json::Value;

use super::{Machine, NOBODY, PATIENCE, POLL, Remove, is_root, temporary_directory};

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_vmferry");

/// A `vmferry` that runs; killed when dropped.
pub(crate) struct Ferry {
    name: String,
    child: Child,
    out: Output,
    err: Output,
}

/// How a `vmferry` ended.
#[derive(Debug)]
pub(crate) struct Finished {
    name: String,
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ferry {
    /// Starts it with these arguments.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_with(Path::new(PROGRAM), arguments, |_| {})
    }

    /// As [`Ferry::start`]: another copy of the program, and anything else that is special about it.
    pub(crate) fn start_with(program: &Path, arguments: &[&str], special: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(program);
        // The demo looks for its tools there.
        command.args(arguments).env_remove("RUST_LOG").env("VMFERRY_TOOLS", tools_directory());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        special(&mut command);
        let mut child = command.spawn().unwrap();
        let out = child.stdout.take().map_or_else(Output::nothing, Output::collect);
        let err = Output::collect(child.stderr.take().unwrap());
        Self { name: format!("vmferry {}", arguments.join(" ")), child, out, err }
    }

    /// `vmferry migrate` of this machine's guest.
    pub(crate) fn migrate(source: &Machine, to: &str, options: &[&str]) -> Self {
        Self::start(&[&["migrate", "--qmp", &source.qmp(), "--to", to], options].concat())
    }

    pub(crate) fn inspect(machine: &Machine, options: &[&str]) -> Self {
        Self::start(&[&["inspect", "--qmp", &machine.qmp()], options].concat())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // The child was not waited for yet, so its number is still its own.
        let pid = Pid::from_raw(self.child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills it and waits for its end.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for a line on standard error.
    pub(crate) fn wait_line(&self, what: impl Fn(&str) -> bool) -> String {
        self.err.wait_line(what).unwrap_or_else(|seen| panic!("{} did not say what was waited for:\n{seen}", self.name))
    }

    /// How many lines on standard error have these words so far.
    pub(crate) fn said(&self, words: &str) -> usize {
        self.err.text().lines().filter(|line| line.contains(words)).count()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Finished {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > 2 * PATIENCE {
                panic!("{} does not end:\n{}", self.name, self.err.text());
            }
            std::thread::sleep(POLL);
        };
        Finished {
            name: std::mem::take(&mut self.name),
            code: status.code(),
            signal: status.signal(),
            out: self.out.all(),
            err: self.err.all(),
        }
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Finished {
    /// The one JSON document on standard output.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// It failed with this code, and says all of these words. Nothing it says is a panic.
    pub(crate) fn fails_with(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{self}");
        for word in words {
            assert!(self.err.contains(word) || self.out.contains(word), "nothing of `{word}`: {self}");
        }
        self.does_not_panic()
    }

    pub(crate) fn does_not_panic(&self) -> &Self {
        assert!(!self.err.contains("panicked"), "{self}");
        self
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, code, signal, out, err } = self;
        write!(f, "{name} ended with {code:?} (signal {signal:?})\n--- stdout\n{out}\n--- stderr\n{err}\n---")
    }
}

/// `vmferry receive` that waits for a source.
pub(crate) struct Receiver {
    pub(crate) ferry: Ferry,
    /// Where it waits.
    pub(crate) address: String,
}

impl Receiver {
    pub(crate) fn start(target: &Machine, options: &[&str]) -> Self {
        let ferry = Ferry::start(&[&["receive", "--listen", "127.0.0.1:0", "--qmp", &target.qmp()], options].concat());
        let line = ferry.wait_line(|line| line.starts_with("listening on "));
        let address = line["listening on ".len()..].to_owned();
        Self { ferry, address }
    }
}

/// The program where everybody can run it, and a way to run it as nobody.
pub(crate) struct Nobody {
    program: PathBuf,
    directory: PathBuf,
    _remove: Remove,
}

impl Nobody {
    pub(crate) fn new() -> Self {
        let (directory, remove) = temporary_directory();
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o755)).unwrap();
        let program = directory.join("vmferry");
        std::fs::copy(PROGRAM, &program).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self { program, directory, _remove: remove }
    }

    /// Without root it is run as whoever runs the test.
    pub(crate) fn run(&self, arguments: &[&str]) -> Finished {
        let ferry = Ferry::start_with(&self.program, arguments, |command| {
            command.current_dir(&self.directory);
            if is_root() {
                command.uid(NOBODY).gid(NOBODY);
            }
        });
        ferry.finish()
    }
}

/// Where the tools are, or will be: not every test needs them.
fn tools_directory() -> PathBuf {
    match std::env::var_os("VMFERRY_TOOLS") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools"),
    }
}

/// What a process writes, collected as it comes.
#[derive(Clone)]
struct Output(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    lines: Vec<String>,
    ended: bool,
}

impl Output {
    fn collect(stream: impl Read + Send + 'static) -> Self {
        let output = Self(Arc::default());
        let collector = output.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            loop {
                let mut line = Vec::new();
                let more = stream.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0);
                let mut collected = collector.0.0.lock().unwrap();
                if more {
                    collected.lines.push(String::from_utf8_lossy(&line).into_owned());
                }
                collected.ended = !more;
                collector.0.1.notify_all();
                if !more {
                    return;
                }
            }
        });
        output
    }

    /// Where the output goes elsewhere.
    fn nothing() -> Self {
        Self(Arc::new((Mutex::new(Collected { lines: vec![], ended: true }), Condvar::new())))
    }

    fn text(&self) -> String {
        self.0.0.lock().unwrap().lines.concat()
    }

    /// Everything, once all who write have ended.
    fn all(&self) -> String {
        let collected = self.0.0.lock().unwrap();
        let (collected, _) = self.0.1.wait_timeout_while(collected, PATIENCE, |collected| !collected.ended).unwrap();
        assert!(collected.ended, "a process that vmferry started stays and holds its output open");
        collected.lines.concat()
    }

    /// The first line that is as wanted, or else all lines.
    fn wait_line(&self, wanted: impl Fn(&str) -> bool) -> Result<String, String> {
        let find = |collected: &Collected| {
            let line = collected.lines.iter().find(|line| line.ends_with('\n') && wanted(line.trim_end()));
            line.map(|line| line.trim_end().to_owned())
        };
        let collected = self.0.0.lock().unwrap();
        let waits = |collected: &mut Collected| !collected.ended && find(collected).is_none();
        let (collected, _) = self.0.1.wait_timeout_while(collected, PATIENCE, waits).unwrap();
        find(&collected).ok_or_else(|| collected.lines.concat())
    }
}
