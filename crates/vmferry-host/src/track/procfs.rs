//! The VMM as `/proc` shows it. Everything is opened through one directory descriptor, which belongs to the process and
//! not to its number: a new process with the same number is never mistaken for it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use super::TrackError;

/// The most bytes read of one file of `/proc`: the map list of a process with all mappings that are allowed.
const MAX_FILE_BYTES: usize = 16 << 20;
/// The most threads looked at when the first does not stop.
const MAX_THREADS: usize = 16;

/// A process that is to be tracked.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) pid: u32,
    pidfd: OwnedFd,
    directory: OwnedFd,
}

/// What a thread's status file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Status {
    /// One letter: `R`unning, `S`leeping, `Z`ombie and so on.
    pub(super) state: char,
    /// Who traces the thread; 0 for nobody.
    pub(super) tracer: u32,
    /// Whether seccomp judges the thread's system calls.
    pub(super) seccomp: bool,
}

impl Target {
    /// Opens the process.
    pub(super) fn open(pid: u32) -> Result<Self, TrackError> {
        let absent = || TrackError::NoSuchProcess { pid };
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(absent)?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty()).map_err(|source| match source {
            // A thread that is no leader gives EINVAL, or ENOENT on newer kernels.
            Errno::SRCH | Errno::INVAL | Errno::NOENT => absent(),
            source => TrackError::Host { what: "pidfd_open", source },
        })?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty()) {
            Ok(directory) => directory,
            // A process that does exist: /proc is mounted with hidepid.
            Err(Errno::NOENT | Errno::ACCESS) => {
                return Err(TrackError::NotPermitted { pid, source: Errno::ACCESS });
            }
            Err(source) => return Err(TrackError::Host { what: "opening the VMM's directory in /proc", source }),
        };
        let target = Self { pid, pidfd, directory };
        // Had the number passed to another process between the two calls, the first one would have ended.
        if target.exited_within(Duration::ZERO) { Err(TrackError::VmmExited) } else { Ok(target) }
    }

    /// Waits for the process's end, at most this long; whether it came.
    pub(super) fn exited_within(&self, limit: Duration) -> bool {
        let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(limit).unwrap_or_default();
        matches!(rustix::event::poll(&mut watched, Some(&limit)), Ok(1..))
    }

    /// Opens one of the process's files for reading.
    fn file(&self, name: &str) -> Result<OwnedFd, TrackError> {
        rustix::fs::openat(&self.directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|source| {
            match source {
                Errno::SRCH | Errno::NOENT => TrackError::VmmExited,
                Errno::ACCESS | Errno::PERM => TrackError::NotPermitted { pid: self.pid, source },
                source => TrackError::Host { what: "opening a file of the VMM in /proc", source },
            }
        })
    }

    /// Opens one of a thread's files for reading. A process whose leader has exited shows its memory only here.
    pub(super) fn thread_file(&self, tid: i32, name: &str) -> Result<OwnedFd, TrackError> {
        self.file(&format!("task/{tid}/{name}"))
    }

    /// A whole file of a thread, as text.
    fn text(&self, tid: i32, name: &str) -> Result<String, TrackError> {
        let file = self.thread_file(tid, name)?;
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        while bytes.len() < MAX_FILE_BYTES {
            match rustix::io::read(&file, chunk.as_mut_slice()) {
                Ok(0) => break,
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(Errno::INTR) => {}
                Err(Errno::SRCH) => return Err(TrackError::VmmExited),
                Err(source) => return Err(TrackError::Host { what: "reading a file of the VMM in /proc", source }),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The status of one thread.
    pub(super) fn status(&self, tid: i32) -> Result<Status, TrackError> {
        let text = self.text(tid, "status")?;
        status_of(&text).ok_or(TrackError::Host { what: "reading a thread's status", source: Errno::INVAL })
    }

    /// Whether the process may be traced by us, without tracing it: opening its memory needs the same right.
    pub(super) fn check_traceable(&self) -> Result<(), TrackError> {
        let leader = i32::try_from(self.pid).map_err(|_| TrackError::NoSuchProcess { pid: self.pid })?;
        let tracer = self.status(leader)?.tracer;
        if tracer != 0 {
            let (tracer, name) = process_of(tracer);
            return Err(TrackError::AlreadyTraced { pid: self.pid, tracer, name });
        }
        self.file("mem").map(drop)
    }

    /// The process's threads, the leader first, some of them if there are many.
    pub(super) fn threads(&self) -> Result<Vec<i32>, TrackError> {
        let leader = i32::try_from(self.pid).map_err(|_| TrackError::NoSuchProcess { pid: self.pid })?;
        let mut threads = vec![leader];
        let directory = self.file("task")?;
        let entries = rustix::fs::Dir::new(directory)
            .map_err(|source| TrackError::Host { what: "listing the VMM's threads", source })?;
        for entry in entries {
            // A directory that cannot be read on, because the process has ended, leaves the threads read so far.
            let Ok(entry) = entry else { break };
            let tid = entry.file_name().to_str().ok().and_then(|name| name.parse::<i32>().ok());
            threads.extend(tid.filter(|tid| *tid != leader));
            if threads.len() == MAX_THREADS {
                break;
            }
        }
        Ok(threads)
    }

    /// The executable mappings, as addresses `start .. end`, the kernel's own (`[vdso]`) first.
    pub(super) fn executable_mappings(&self, tid: i32) -> Result<Vec<(u64, u64)>, TrackError> {
        Ok(executable_mappings_of(&self.text(tid, "maps")?))
    }

    /// Takes a copy of a descriptor of the process, through one of its threads.
    pub(super) fn take_descriptor(&self, tid: i32, number: i32) -> Result<OwnedFd, Errno> {
        /// `PIDFD_THREAD`, since Linux 6.9.
        const THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());

        let flags = PidfdGetfdFlags::empty();
        // A leader that has exited has no descriptors any more; its threads have.
        let thread = Pid::from_raw(tid).filter(|_| u32::try_from(tid) != Ok(self.pid));
        match thread.and_then(|tid| rustix::process::pidfd_open(tid, THREAD).ok()) {
            Some(pidfd) => rustix::process::pidfd_getfd(&pidfd, number, flags),
            None => rustix::process::pidfd_getfd(&self.pidfd, number, flags),
        }
    }
}

/// The process that a thread belongs to, and its name, for a message. `/proc` names a tracer by its thread.
pub(super) fn process_of(thread: u32) -> (u32, String) {
    let read = |pid: u32, name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let pid = field_of(&read(thread, "status"), "Tgid").and_then(|pid| pid.parse().ok()).unwrap_or(thread);
    (pid, read(pid, "comm").trim_end().to_owned())
}

fn field_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn status_of(text: &str) -> Option<Status> {
    let field = |name| field_of(text, name);
    Some(Status {
        state: field("State")?.chars().next()?,
        tracer: field("TracerPid")?.parse().ok()?,
        // A kernel without seccomp has no such line.
        seccomp: field("Seccomp").is_some_and(|mode| mode != "0"),
    })
}

fn executable_mappings_of(text: &str) -> Vec<(u64, u64)> {
    let mut mappings = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) else { continue };
        // The vsyscall page can be executed and not entered at will.
        if !rights.starts_with("r-x") || line.ends_with("[vsyscall]") {
            continue;
        }
        if line.ends_with("[vdso]") {
            mappings.insert(0, (start, end));
        } else {
            mappings.push((start, end));
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read() {
        let text =
            "Name:\tState: x\nState:\tS (sleeping)\nTgid:\t7\nTracerPid:\t12\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        assert_eq!(status_of(text), Some(Status { state: 'S', tracer: 12, seccomp: true }));
        assert_eq!(status_of("State:\tR\nTracerPid:\t0\nSeccomp:\t0\n").map(|s| s.seccomp), Some(false));
        assert_eq!(status_of("TracerPid:\t0\n"), None);
    }

    #[test]
    fn the_kernels_own_code_comes_first() {
        let text = "\
            400000-401000 r-xp 00000000 fe:00 12 /usr/bin/a b\n\
            7f00-8000 rw-p 00000000 00:00 0\n\
            7ffd000-7fff000 r-xp 00000000 00:00 0                          [vdso]\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0        [vsyscall]\n\
            nonsense\n";
        assert_eq!(executable_mappings_of(text), [(0x7ff_d000, 0x7ff_f000), (0x40_0000, 0x40_1000)]);
    }

    #[test]
    fn processes_that_are_not_there_are_named() {
        for pid in [0, u32::MAX, i32::MAX as u32] {
            assert!(matches!(Target::open(pid), Err(TrackError::NoSuchProcess { pid: named }) if named == pid));
        }
    }
}
