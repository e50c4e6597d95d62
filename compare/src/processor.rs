//! Processor time of processes, from `/proc`.
//!
//! What a QEMU spends on running its guest is left out: the time of its vCPU threads. What following the guest's writes
//! costs these threads shows as the guest's slow-down instead.

use std::{fs, io};

use anyhow::{Context as _, Result};
use rustix::io::Errno;

/// What the kernel says of a process or thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    /// It has ended, and nobody has asked for its end yet.
    pub(crate) has_ended: bool,
    /// Clock ticks of the kernel that it used: its own, and of those that it started and waited for.
    own_ticks: u64,
    children_ticks: u64,
}

impl Stat {
    /// Of a process with all its threads, those that have ended included.
    pub(crate) fn of_process(process: u32) -> Result<Self> {
        read(&format!("/proc/{process}/stat"))
    }

    fn of_thread(process: u32, thread: u64) -> Result<Self> {
        read(&format!("/proc/{process}/task/{thread}/stat"))
    }

    /// Its processor time, with that of processes which it started.
    pub(crate) fn with_children_ms(self) -> f64 {
        milliseconds(self.own_ticks + self.children_ticks)
    }
}

/// Processor time of a QEMU without its vCPU threads.
pub(crate) fn without_guest_ms(process: u32, vcpu_threads: &[u64]) -> Result<f64> {
    let mut ticks = Stat::of_process(process)?.own_ticks;
    for &thread in vcpu_threads {
        match Stat::of_thread(process, thread) {
            Ok(stat) => ticks = ticks.saturating_sub(stat.own_ticks),
            // The target's QEMU ends by itself when a migration is cancelled. Its guest has not run.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(milliseconds(ticks))
}

fn read(path: &str) -> Result<Stat> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    parse(&text).with_context(|| format!("{path} cannot be read: {text:?}"))
}

fn is_gone(error: &anyhow::Error) -> bool {
    // Between its opening and its reading it is another error.
    let is_gone = |error: &io::Error| matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::SRCH));
    error.downcast_ref().is_some_and(is_gone)
}

fn milliseconds(ticks: u64) -> f64 {
    ticks as f64 * 1e3 / rustix::param::clock_ticks_per_second() as f64
}

/// Reads a line of proc_pid_stat(5). The name, in parentheses, may hold spaces and parentheses; the state comes after it,
/// and 11 fields later user and system time, then those of children.
fn parse(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Stat {
        has_ended: matches!(*fields.first()?, "Z" | "X"),
        own_ticks: ticks(11)? + ticks(12)?,
        children_ticks: ticks(13)? + ticks(14)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_with_anything_in_it() {
        let line = "17 (CPU 0) (TCG) S 1 17 17 0 -1 4194560 1 2 3 4 250 50 7 8 20 0 4 0 100 200 300\n";
        assert_eq!(parse(line), Some(Stat { has_ended: false, own_ticks: 300, children_ticks: 15 }));
        assert!(parse(&line.replace(") S", ") Z")).unwrap().has_ended);
        assert_eq!(parse("17 (x) S 1"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let stat = Stat::of_process(std::process::id()).unwrap();
        assert!(!stat.has_ended);
        for threads in [&[][..], &[u64::from(u32::MAX)]] {
            let milliseconds = without_guest_ms(std::process::id(), threads).unwrap();
            assert!(milliseconds <= stat.with_children_ms() + 100.0, "a thread that is gone takes nothing off");
        }
        assert!(Stat::of_process(u32::MAX).is_err());
    }
}
