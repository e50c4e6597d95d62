//! A VMM of our own for the tests of write tracking: a process with shared RAM that does what it is told.
//!
//! The test's own binary is run again with [`ROLE`] set. It then becomes the child before `main` would start the test
//! harness, for two reasons: the child must act on the process's main thread, the one that is entered, which the
//! harness keeps for itself; and a program of its own would have to be a target that the package does not ship. Both
//! sides talk in lines over a socket, which is the child's standard input.

#![expect(unsafe_code, reason = "maps RAM, blocks in raw system calls and installs filters, as a VMM does")]
#![allow(dead_code, reason = "each test file and the bench use a part of it")]

pub(crate) mod vmm;

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use vmferry_core::pages::PageRun;
use vmferry_host::track::{Region, TrackError, Tracker};

/// What the process is to be; unset for the test itself.
const ROLE: &str = "VMFERRY_TRACK_ROLE";
pub(crate) const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// What a child's RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Memfd,
    /// hugetlbfs, 2 MiB pages.
    Huge,
    /// A tmpfs file with transparent huge pages asked for.
    Thp,
    /// A file on the disk that holds the temporary directory.
    Disk,
    /// Memory that the kernel may drop, which cannot be write-protected.
    Droppable,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Memfd, Self::Huge, Self::Thp, Self::Disk, Self::Droppable];
}

#[used]
// SAFETY: the C library calls what stands in this section before `main`, on the main thread, when its own start-up is
// complete and the environment can be read. std needs no more than that.
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    if let Ok(role) = env::var(ROLE) {
        act(&role);
        // Not into the test harness.
        std::process::exit(0);
    }
}

fn act(role: &str) {
    // SAFETY: the parent made standard input a socket, for this process alone; nothing else here reads from it.
    let socket = unsafe { <UnixStream as std::os::fd::FromRawFd>::from_raw_fd(0) };
    let mut channel = Channel::new(socket);
    let words: Vec<_> = role.split(' ').collect();
    match words[..] {
        ["vmm", kind, pages] => {
            let kind = Kind::ALL.into_iter().find(|known| format!("{known:?}") == kind).unwrap();
            vmm::run(channel, kind, pages.parse().unwrap());
        }
        // Attaches, says how that went, and stays until it is killed or told to end.
        ["attach", pid, address, pages] => {
            let region = Region { pages: PageRun::new(0, pages.parse().unwrap()), address: address.parse().unwrap() };
            let outcome = Tracker::attach(pid.parse().unwrap(), vec![region]);
            match &outcome {
                Ok(_) => channel.say("attached"),
                Err(error @ TrackError::NotPermitted { .. }) => channel.say(&format!("not permitted: {error}")),
                Err(error) => channel.say(&format!("error: {error:?}")),
            }
            channel.hear();
        }
        _ => panic!("unknown role {role}"),
    }
}

/// Lines to and from a child.
pub(crate) struct Channel {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Channel {
    fn new(socket: UnixStream) -> Self {
        Self { reader: BufReader::new(socket.try_clone().unwrap()), writer: socket }
    }

    pub(crate) fn say(&mut self, line: &str) {
        // A child that was killed on purpose does not listen any more.
        let _ = writeln!(self.writer, "{line}");
    }

    /// The next line; empty when the other side is gone.
    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        let _ = self.reader.read_line(&mut line);
        line.trim_end().to_owned()
    }
}

/// A child process and the line to it. Killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) channel: Channel,
}

impl Process {
    pub(crate) fn start(role: &str) -> Self {
        Self::spawn(Command::new(env::current_exe().unwrap()), role)
    }

    /// Starts the given program, a copy of this test, in a role.
    pub(crate) fn spawn(mut command: Command, role: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child =
            command.env(ROLE, role).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).spawn().unwrap();
        Self { child, channel: Channel::new(ours) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.channel.say(line);
        self.channel.hear()
    }

    /// Gives an order that is answered with `ok`.
    pub(crate) fn order(&mut self, line: &str) {
        assert_eq!(self.ask(line), "ok", "{line}");
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: kill takes no pointers, and the process is our child, not reaped yet.
        assert_eq!(unsafe { libc::kill(self.child.id().cast_signed(), signal) }, 0);
    }

    /// Waits until the child has been stopped by a signal.
    pub(crate) fn wait_until_stopped(&self) {
        let mut status = 0;
        // SAFETY: waitpid writes the status to a local.
        let pid = unsafe { libc::waitpid(self.child.id().cast_signed(), &raw mut status, libc::WUNTRACED) };
        assert!(pid > 0 && libc::WIFSTOPPED(status), "status {status:#x}");
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn proc_file(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    /// What the process has open, as numbers and targets.
    pub(crate) fn descriptors(&self) -> Vec<(String, String)> {
        let mut all: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.display().to_string(), std::fs::read_link(&path).unwrap().display().to_string()))
            .collect();
        all.sort();
        all
    }

    /// How many mappings are registered for write protection.
    pub(crate) fn protected_mappings(&self) -> usize {
        let smaps = self.proc_file("smaps");
        let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
        flags.filter(|flags| flags.split_ascii_whitespace().any(|flag| flag == "uw")).count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a program that was just written. While another test forks, a copy of the descriptor it was written through
/// may live on in a process that has not yet come to its exec, and the kernel runs no program that is open for writing.
pub(crate) fn spawn_when_written(command: &mut Command) -> std::io::Result<Child> {
    loop {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
            result => return result,
        }
    }
}

/// A VMM child, its RAM mapped here too.
pub(crate) struct Vmm {
    pub(crate) process: Process,
    pub(crate) ram: Ram,
    pub(crate) address: u64,
}

impl Vmm {
    pub(crate) fn start(kind: Kind, pages: usize) -> Self {
        let mut process = Process::start(&format!("vmm {kind:?} {pages}"));
        let ready = process.channel.hear();
        let words: Vec<_> = ready.split(' ').collect();
        let ["ready", address, fd] = words[..] else { panic!("the child said {ready:?}") };
        let ram = if fd == "-1" {
            Ram::anonymous(pages)
        } else {
            let path = format!("/proc/{}/fd/{fd}", process.pid());
            Ram::of_file(&File::options().read(true).write(true).open(path).unwrap(), pages)
        };
        Self { ram, address: address.parse().unwrap(), process }
    }

    pub(crate) fn region(&self) -> Region {
        Region { pages: PageRun::new(0, self.ram.pages() as u64), address: self.address }
    }

    pub(crate) fn attach(&self) -> Result<Tracker, TrackError> {
        Tracker::attach(self.process.pid(), vec![self.region()])
    }

    /// What the next scan reports.
    pub(crate) fn scan(tracker: &mut Tracker) -> Vec<PageRun> {
        let mut written = Vec::new();
        let stats = tracker.scan(&mut written).unwrap();
        assert_eq!(stats.pages, written.iter().map(|run| run.count).sum::<u64>());
        written
    }
}

/// Shared memory, in words.
pub(crate) struct Ram {
    base: *const AtomicU64,
    pages: usize,
}

// SAFETY: the memory is only reached through atomics, and stays mapped as long as the value lives.
unsafe impl Send for Ram {}
// SAFETY: as for Send.
unsafe impl Sync for Ram {}

impl Ram {
    pub(crate) fn of_file(file: &File, pages: usize) -> Self {
        Self::map(file.as_raw_fd(), libc::MAP_SHARED, pages)
    }

    pub(crate) fn anonymous(pages: usize) -> Self {
        Self::map(-1, libc::MAP_SHARED | libc::MAP_ANONYMOUS, pages)
    }

    /// Maps RAM at an address that is a multiple of 2 MiB.
    pub(crate) fn map(fd: i32, flags: i32, pages: usize) -> Self {
        const HUGE: usize = 2 << 20;
        let bytes = pages * PAGE;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: reserves address space that nobody else uses; it is never given back, in a process that ends soon.
        let reserved = unsafe { libc::mmap(std::ptr::null_mut(), bytes + HUGE, libc::PROT_NONE, none, -1, 0) };
        assert_ne!(reserved, libc::MAP_FAILED);
        let aligned = reserved.map_addr(|address| address.next_multiple_of(HUGE));
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces a part of the reservation made above.
        let base = unsafe { libc::mmap(aligned, bytes, rights, flags | libc::MAP_FIXED, fd, 0) };
        assert_ne!(base, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { base: base.cast(), pages }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn address(&self) -> usize {
        self.base.addr()
    }

    pub(crate) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < WORDS);
        // SAFETY: the index is inside the mapping, which lives as long as `self`.
        let word = unsafe { self.base.add(page * WORDS + word) };
        // SAFETY: aligned, mapped, and shared as atomics only.
        unsafe { &*word }
    }

    pub(crate) fn page(&self, page: usize) -> Vec<u64> {
        (0..WORDS).map(|word| self.word(page, word).load(Ordering::Relaxed)).collect()
    }
}

/// Whether the tests may do all that root may; says so where not.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}
