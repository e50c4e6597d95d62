//! A guest without a VMM: a child process with shared memory and writer threads that checks its own pages.
//!
//! It stands where QEMU would stand: it can be paused at a page boundary, its "device state" are the writers' states, it
//! passes its userfaultfd by itself and so needs no right, and it starts in milliseconds. It is for demonstrations,
//! benches and tests of the engine; it proves nothing about QEMU.
//!
//! ```text
//!   parent: EmbeddedGuest ── lines of JSON, descriptors ── child: run_guest (the writers)
//!           EmbeddedSource                                  Filling ─▶ Running ⇄ Paused
//!           EmbeddedTarget                                  Waiting ─▶ Loaded (paused) ─▶ Running
//! ```
//!
//! The child ends with its parent: its end of the channel closes.

mod child;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use vmferry_core::pages::{PAGE_BYTES, PageRun, RamBlock, RamLayout};
use vmferry_core::plan::FixedCosts;
use vmferry_core::wire::MAX_DEVICE_STATE_BYTES;
use vmferry_guest::Parameters;

use crate::channel::Channel;
use crate::link::LinkError;
use crate::memory::GuestMemory;
use crate::track::{Region, ScanStats, TrackError, Tracker};
use crate::vmm::{Machine, SourceVmm, TargetVmm, VmmError};

pub use child::run_guest;

/// What pausing, loading and resuming the embedded guest costs.
const FIXED_TIME: Duration = Duration::from_millis(2);
const DEVICE_STATE_BYTES: u64 = 1000;

/// Why the embedded guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddedError {
    /// Its memory could not be made.
    #[error("cannot make {bytes} bytes of memory for the embedded guest")]
    Memory {
        /// How many.
        bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its process could not be started.
    #[error("cannot start the embedded guest's process")]
    Start(#[source] io::Error),
    /// Its process cannot be talked to.
    #[error("cannot talk to the embedded guest")]
    Channel(#[source] io::Error),
    /// Its process has ended.
    #[error("the embedded guest's process has ended")]
    Ended,
    /// It says that it failed.
    #[error("the embedded guest failed: {reason}")]
    Failed {
        /// Its words.
        reason: String,
    },
    /// It answered something else than it was asked.
    #[error("the embedded guest answered out of turn")]
    OutOfTurn,
}

/// How to start the child: a program that calls [`run_guest`] with its standard input.
#[derive(Debug, Clone)]
pub struct GuestProgram {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// The first line to the child; its memory comes with it.
#[derive(Debug, Serialize, Deserialize)]
struct Start {
    /// As words of a kernel command line.
    parameters: String,
    memory_bytes: u64,
    /// Wait for another guest's state instead of beginning.
    incoming: bool,
}

/// Lines to the child.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    Pause,
    Resume,
    Save,
    Load {
        bytes: usize,
    },
    Check,
    Writes,
    /// From 0 to 1.
    Throttle {
        share: f64,
    },
}

/// Lines from the child.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Started; the userfaultfd and the page map come with it.
    Ready {
        address: u64,
    },
    Done,
    State {
        bytes: usize,
    },
    Checked {
        pages: u64,
        wrong: u64,
        first_wrong: Option<String>,
    },
    Writes {
        writes: u64,
    },
    Failed {
        reason: String,
    },
}

/// What the guest's check of its own memory found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SelfCheck {
    /// Pages checked.
    pub pages: u64,
    /// Pages that are not what the guest wrote.
    pub wrong: u64,
    /// The first of them, in words.
    pub first_wrong: Option<String>,
}

/// The child process and its memory.
#[derive(Debug)]
pub struct EmbeddedGuest {
    child: Child,
    channel: Channel,
    memory: Arc<GuestMemory>,
    tracking: Option<(OwnedFd, OwnedFd)>,
    address: u64,
}

impl EmbeddedGuest {
    /// Starts a guest that writes by these parameters.
    ///
    /// # Errors
    /// [`EmbeddedError`].
    pub fn start(program: &GuestProgram, memory_bytes: u64, parameters: &Parameters) -> Result<Self, EmbeddedError> {
        Self::spawn(program, memory_bytes, parameters, false)
    }

    /// Starts a guest that waits for the state of another one of the same size.
    ///
    /// # Errors
    /// [`EmbeddedError`].
    pub fn start_incoming(
        program: &GuestProgram,
        memory_bytes: u64,
        parameters: &Parameters,
    ) -> Result<Self, EmbeddedError> {
        Self::spawn(program, memory_bytes, parameters, true)
    }

    fn spawn(
        program: &GuestProgram,
        memory_bytes: u64,
        parameters: &Parameters,
        incoming: bool,
    ) -> Result<Self, EmbeddedError> {
        let memory_error =
            |source: rustix::io::Errno| EmbeddedError::Memory { bytes: memory_bytes, source: source.into() };
        let file = rustix::fs::memfd_create("vmferry-guest", MemfdFlags::CLOEXEC).map_err(memory_error)?;
        rustix::fs::ftruncate(&file, memory_bytes).map_err(memory_error)?;
        let layout = RamLayout::new(vec![RamBlock { id: "ram".to_owned(), bytes: memory_bytes }])
            .map_err(|error| EmbeddedError::Memory { bytes: memory_bytes, source: io::Error::other(error) })?;

        let (ours, theirs) = UnixStream::pair().map_err(EmbeddedError::Start)?;
        let child = Command::new(&program.program)
            .args(&program.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // Not of the terminal's group: a key that cancels the migration must not end the guest.
            .process_group(0)
            .spawn()
            .map_err(EmbeddedError::Start)?;
        let mut channel = Channel::new(ours);
        let start = Start { parameters: parameters.to_string(), memory_bytes, incoming };
        let sent = channel.send(&start, &[file.as_fd()]);
        let memory = Arc::new(GuestMemory::from_files(layout, vec![file]));
        let mut guest = Self { child, channel, memory, tracking: None, address: 0 };
        sent.map_err(EmbeddedError::Channel)?;
        match guest.answer()? {
            (Answer::Ready { address }, mut fds) if fds.len() == 2 => {
                guest.address = address;
                let pagemap = fds.pop().ok_or(EmbeddedError::OutOfTurn)?;
                guest.tracking = fds.pop().map(|uffd| (uffd, pagemap));
                Ok(guest)
            }
            (Answer::Failed { reason }, _) => Err(EmbeddedError::Failed { reason }),
            _ => Err(EmbeddedError::OutOfTurn),
        }
    }

    /// The child's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has the guest check all of its memory. It stands still for that.
    ///
    /// # Errors
    /// [`EmbeddedError`].
    pub fn check(&mut self) -> Result<SelfCheck, EmbeddedError> {
        match self.ask(&Order::Check)? {
            Answer::Checked { pages, wrong, first_wrong } => Ok(SelfCheck { pages, wrong, first_wrong }),
            _ => Err(EmbeddedError::OutOfTurn),
        }
    }

    /// How many pages the guest has written since it began, on whatever host.
    ///
    /// # Errors
    /// [`EmbeddedError`].
    pub fn writes(&mut self) -> Result<u64, EmbeddedError> {
        match self.ask(&Order::Writes)? {
            Answer::Writes { writes } => Ok(writes),
            _ => Err(EmbeddedError::OutOfTurn),
        }
    }

    fn do_it(&mut self, command: &Order) -> Result<(), EmbeddedError> {
        match self.ask(command)? {
            Answer::Done => Ok(()),
            _ => Err(EmbeddedError::OutOfTurn),
        }
    }

    fn ask(&mut self, command: &Order) -> Result<Answer, EmbeddedError> {
        self.channel.send(command, &[]).map_err(EmbeddedError::Channel)?;
        match self.answer()? {
            (Answer::Failed { reason }, _) => Err(EmbeddedError::Failed { reason }),
            (answer, _) => Ok(answer),
        }
    }

    fn answer(&mut self) -> Result<(Answer, Vec<OwnedFd>), EmbeddedError> {
        self.channel.receive().map_err(EmbeddedError::Channel)?.ok_or(EmbeddedError::Ended)
    }

    /// Begins to track the guest's writes.
    ///
    /// # Errors
    /// [`TrackError`].
    ///
    /// # Panics
    /// The second time: the guest gives its descriptor once.
    pub fn track(&mut self) -> Result<Tracker, TrackError> {
        let (uffd, pagemap) = self.tracking.take().expect("a guest is tracked once");
        let pages = PageRun::new(0, self.memory.layout().total_pages());
        Tracker::from_parts(uffd, pagemap, vec![Region { pages, address: self.address }])
    }
}

impl Drop for EmbeddedGuest {
    fn drop(&mut self) {
        // The closed channel ends the child; the kill is for one that hangs. Both may fail where it has ended already.
        let _ = self.channel.stream().shutdown(std::net::Shutdown::Both);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn machine(memory: &GuestMemory) -> Machine {
    Machine { kind: format!("embedded-{}", memory.layout().total_pages()), vcpus: 1 }
}

/// The embedded guest as the source.
#[derive(Debug)]
pub struct EmbeddedSource {
    guest: EmbeddedGuest,
    tracker: Tracker,
}

impl EmbeddedSource {
    /// Begins to track the guest.
    ///
    /// # Errors
    /// [`TrackError`].
    pub fn attach(mut guest: EmbeddedGuest) -> Result<Self, TrackError> {
        let tracker = guest.track()?;
        Ok(Self { guest, tracker })
    }

    /// The guest.
    pub fn guest(&mut self) -> &mut EmbeddedGuest {
        &mut self.guest
    }
}

impl SourceVmm for EmbeddedSource {
    fn machine(&self) -> Machine {
        machine(&self.guest.memory)
    }

    fn memory(&self) -> &GuestMemory {
        &self.guest.memory
    }

    fn assumed_costs(&self) -> FixedCosts {
        FixedCosts { time: FIXED_TIME, device_state_bytes: DEVICE_STATE_BYTES }
    }

    fn scan(&mut self, relaxed: bool, written: &mut Vec<PageRun>) -> Result<ScanStats, VmmError> {
        Ok(if relaxed { self.tracker.scan_epoch(written) } else { self.tracker.scan(written) }?)
    }

    fn scan_run(&mut self, run: PageRun, written: &mut Vec<PageRun>) -> Result<ScanStats, VmmError> {
        Ok(self.tracker.scan_run(run, written)?)
    }

    fn pause(&mut self) -> Result<Instant, VmmError> {
        self.guest.do_it(&Order::Pause)?;
        Ok(Instant::now())
    }

    fn save_device_state(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<(), LinkError>) -> Result<(), VmmError> {
        let Answer::State { bytes } = self.guest.ask(&Order::Save)? else {
            return Err(EmbeddedError::OutOfTurn.into());
        };
        if bytes as u64 > MAX_DEVICE_STATE_BYTES {
            return Err(VmmError::DeviceStateTooLarge { limit: MAX_DEVICE_STATE_BYTES });
        }
        let state = self.guest.channel.receive_bytes(bytes).map_err(EmbeddedError::Channel)?;
        Ok(sink(&state)?)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        Ok(self.guest.do_it(&Order::Resume)?)
    }

    fn throttle(&mut self, share: f64) -> Result<(), VmmError> {
        Ok(self.guest.do_it(&Order::Throttle { share })?)
    }

    fn released(&mut self) {}
}

/// The embedded guest as the target.
#[derive(Debug)]
pub struct EmbeddedTarget {
    guest: EmbeddedGuest,
}

impl EmbeddedTarget {
    /// A guest from [`EmbeddedGuest::start_incoming`].
    pub fn new(guest: EmbeddedGuest) -> Self {
        Self { guest }
    }

    /// The guest.
    pub fn guest(&mut self) -> &mut EmbeddedGuest {
        &mut self.guest
    }

    /// The guest, for its next move.
    pub fn into_guest(self) -> EmbeddedGuest {
        self.guest
    }
}

impl TargetVmm for EmbeddedTarget {
    fn machine(&self) -> Machine {
        machine(&self.guest.memory)
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.guest.memory
    }

    fn load(&mut self, device_state: &[u8]) -> Result<(), VmmError> {
        let channel = &mut self.guest.channel;
        channel.send(&Order::Load { bytes: device_state.len() }, &[]).map_err(EmbeddedError::Channel)?;
        channel.send_bytes(device_state).map_err(EmbeddedError::Channel)?;
        match self.guest.answer()? {
            (Answer::Done, _) => Ok(()),
            (Answer::Failed { reason }, _) => Err(EmbeddedError::Failed { reason }.into()),
            _ => Err(EmbeddedError::OutOfTurn.into()),
        }
    }

    fn run(&mut self) -> Result<(), VmmError> {
        Ok(self.guest.do_it(&Order::Resume)?)
    }
}

/// The largest number of checked pages that fit in a guest of so many bytes, for [`Parameters::pages`].
pub fn pages_in(memory_bytes: u64) -> u64 {
    vmferry_guest::pages_in_region(memory_bytes / PAGE_BYTES)
}
