//! A process to slow.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Does nothing but run, on one thread; killed when dropped.
pub(super) struct Busy(Child);

impl Busy {
    pub(super) fn start() -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether its thread is being traced.
    pub(super) fn is_traced(&self) -> bool {
        let status = self.file("status");
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).unwrap();
        tracer.trim() != "0"
    }

    /// Processor time that it has had, in ns.
    pub(super) fn ticks(&self) -> u64 {
        self.file("schedstat").split(' ').next().unwrap().parse().unwrap()
    }

    /// A file of its thread.
    pub(super) fn file(&self, name: &str) -> String {
        let pid = self.pid();
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/{name}")).unwrap()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Asks until the answer is yes.
pub(super) fn until(what: &str, mut question: impl FnMut() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let start = Instant::now();
    while !question() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}
