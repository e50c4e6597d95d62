//! One running QEMU: its monitor, its process, its RAM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags};
use vmferry_core::pages::{LayoutError, RamBlock, RamLayout};

use super::control::{ControlError, Source, Target};
use super::facts::{self, Facts, Identity, RamFacts};
use super::findings::Inspection;
use super::ram::{GuestRam, GuestRamBlock, RamAccess, RamError};
use crate::qmp::{QmpClient, QmpError, VersionTriple};

/// Why a QEMU cannot be connected to or looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// An answer of QEMU has not the form it should have.
    #[error("QEMU's answer to `{command}` is not as expected: {why}; this version of QEMU may be too new or too old")]
    UnexpectedAnswer {
        /// The command.
        command: String,
        /// What is wrong.
        why: String,
    },
    /// It is not known which process runs the guest.
    #[error(
        "cannot tell which process runs the guest: the QMP socket's listener is in a process namespace that cannot be \
         seen from here; name QEMU's process with --pid"
    )]
    PidUnknown,
    /// The process named is not the one behind the monitor.
    #[error(
        "process {pid} ({name}) is not the QEMU behind this QMP socket: it has none of the guest's vCPU threads and \
         maps none of its RAM; name QEMU's process with --pid"
    )]
    WrongProcess {
        /// The process.
        pid: u32,
        /// What it calls itself.
        name: String,
    },
    /// The process has ended.
    #[error("process {pid} is not running: QEMU has ended; see its log")]
    ProcessGone {
        /// The process.
        pid: u32,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// RAM cannot be reached.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A block of RAM is not a shared file.
    #[error(
        "RAM block `{block}` is not shared (type {kind}): start the guest with -object \
         memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/NAME,share=on -machine memory-backend=ram"
    )]
    RamNotShared {
        /// The block.
        block: String,
        /// The backend's type.
        kind: String,
    },
    /// The blocks do not make a guest.
    #[error("QEMU's RAM blocks are not a guest that can be moved")]
    Layout(#[from] LayoutError),
}

impl QemuError {
    pub(super) fn unexpected(command: &str, why: &str) -> Self {
        Self::UnexpectedAnswer { command: command.to_owned(), why: why.to_owned() }
    }
}

/// A QEMU that runs on this host, with its monitor.
#[derive(Debug)]
pub struct QemuGuest {
    qmp: QmpClient,
    pidfd: OwnedFd,
    identity: Identity,
}

impl QemuGuest {
    /// Connects to the QMP socket at `path` and finds QEMU's process: `pid` if given, else the socket's listener, else
    /// (where another process, as libvirt, made the socket) the one that has the vCPU threads.
    ///
    /// # Errors
    /// [`QemuError`]. Whether the guest can be moved is not checked here, see [`QemuGuest::inspect`].
    pub fn connect(path: &Path, pid: Option<u32>) -> Result<Self, QemuError> {
        Self::from_client(QmpClient::connect(path)?, pid)
    }

    /// As [`QemuGuest::connect`], over a connection that exists.
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn from_client(mut qmp: QmpClient, pid: Option<u32>) -> Result<Self, QemuError> {
        let (version, package) = facts::version(&mut qmp)?;
        let machine = facts::machine(&mut qmp)?;
        let threads = facts::vcpu_threads(&mut qmp)?;
        let pid = match pid.or_else(|| qmp.peer_pid()) {
            Some(pid) => pid,
            None => process_of_thread(&threads).ok_or(QemuError::PidUnknown)?,
        };
        let (pid, pidfd) = match Self::prove(&mut qmp, pid, &threads) {
            Err(QemuError::WrongProcess { .. }) if qmp.peer_pid() == Some(pid) => {
                let other = process_of_thread(&threads).filter(|&other| other != pid);
                let other = other.ok_or_else(|| QemuError::WrongProcess { pid, name: process_name(pid) })?;
                tracing::info!(listener = pid, qemu = other, "the QMP socket was made by another process");
                (other, Self::prove(&mut qmp, other, &threads)?)
            }
            result => (pid, result?),
        };
        let vcpus = u32::try_from(threads.len()).unwrap_or(u32::MAX);
        Ok(Self { qmp, pidfd, identity: Identity { version, package, machine, pid, vcpus } })
    }

    /// Whether the process has the guest's vCPU threads, or (in a process namespace of its own) maps its RAM. The
    /// descriptor is taken first: what is proved is then proved of the process it stands for.
    fn prove(qmp: &mut QmpClient, pid: u32, threads: &[u32]) -> Result<OwnedFd, QemuError> {
        let pidfd = open_pidfd(pid)?;
        let task = PathBuf::from(format!("/proc/{pid}/task"));
        if !threads.is_empty() && threads.iter().all(|thread| task.join(thread.to_string()).exists()) {
            return Ok(pidfd);
        }
        let RamFacts { blocks, mappings } = RamFacts::of(qmp, pid)?;
        let mapped = blocks.backends.iter().any(|block| block.locate(pid, &mappings, RamAccess::Read).is_ok());
        if mapped { Ok(pidfd) } else { Err(QemuError::WrongProcess { pid, name: process_name(pid) }) }
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// A descriptor of QEMU's process; readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// QEMU's version.
    pub fn version(&self) -> VersionTriple {
        self.identity.version
    }

    /// The machine type with its version, as `pc-q35-7.2-machine`. Source and target must have the same.
    pub fn machine(&self) -> &str {
        &self.identity.machine
    }

    /// How many virtual CPUs the guest has.
    pub fn vcpus(&self) -> u32 {
        self.identity.vcpus
    }

    /// The threads of the virtual CPUs, as they are numbered here; fewer than CPUs where several share one.
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn vcpu_threads(&mut self) -> Result<Vec<u32>, QemuError> {
        let named = facts::vcpu_threads(&mut self.qmp)?;
        let mut threads = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten() {
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            // QEMU may be in a process namespace of its own: the last number is that by which it knows the thread.
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            let mut numbers = numbers.split_ascii_whitespace().map(str::parse::<u32>);
            if let (Some(Ok(here)), last) = (numbers.next(), numbers.next_back())
                && named.contains(&last.and_then(Result::ok).unwrap_or(here))
            {
                threads.push(here);
            }
        }
        Ok(threads)
    }

    /// The monitor.
    pub fn qmp(&mut self) -> &mut QmpClient {
        &mut self.qmp
    }

    /// The monitor alone.
    pub fn into_client(self) -> QmpClient {
        self.qmp
    }

    /// QEMU's run state: `running`, `paused`, `inmigrate` …
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn run_state(&mut self) -> Result<String, QemuError> {
        facts::run_state(&mut self.qmp)
    }

    /// Asks for everything that [`super::check`] judges. Takes some milliseconds, mostly for the device tree.
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn facts(&mut self, ram: &RamFacts) -> Result<Facts, QemuError> {
        facts::collect(&mut self.qmp, &self.identity, ram)
    }

    /// Collects the facts and judges them.
    ///
    /// # Errors
    /// [`QemuError`], where the guest cannot even be looked at.
    pub fn inspect(&mut self) -> Result<Inspection, QemuError> {
        let ram = self.ram_facts()?;
        Ok(Inspection::new(self.facts(&ram)?))
    }

    /// Asks for guest RAM.
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn ram_facts(&mut self) -> Result<RamFacts, QemuError> {
        RamFacts::of(&mut self.qmp, self.identity.pid)
    }

    /// Finds all guest RAM and opens the files behind it.
    ///
    /// # Errors
    /// [`QemuError`], also where a block is not a shared file.
    pub fn ram(&mut self, access: RamAccess) -> Result<GuestRam, QemuError> {
        let facts = self.ram_facts()?;
        self.open_ram(&facts, access)
    }

    /// Opens the files behind guest RAM, as it was found a moment ago.
    ///
    /// # Errors
    /// [`QemuError`], also where a block is not a shared file.
    pub fn open_ram(&self, facts: &RamFacts, access: RamAccess) -> Result<GuestRam, QemuError> {
        let backends = &facts.blocks.backends;
        let mut blocks = Vec::with_capacity(backends.len());
        for backend in backends {
            if !backend.share {
                return Err(QemuError::RamNotShared { block: backend.id.clone(), kind: backend.kind.clone() });
            }
            let (mapping, file) = backend.locate(self.identity.pid, &facts.mappings, access)?;
            blocks.push(GuestRamBlock { id: backend.id.clone(), mapping, file });
        }
        let list = blocks.iter().map(|block| RamBlock { id: block.id.clone(), bytes: block.mapping.bytes });
        let layout = RamLayout::new(list.collect())?;
        Ok(GuestRam { layout, blocks })
    }

    /// This guest as the source of a migration.
    pub fn source(&mut self) -> Source<'_> {
        Source::new(&mut self.qmp)
    }

    /// This guest as the target of a migration.
    pub fn target(&mut self) -> Target<'_> {
        Target::new(&mut self.qmp)
    }

    /// Ends QEMU and waits until its process is gone.
    ///
    /// # Errors
    /// [`ControlError`]; a QEMU that has ended already is none.
    pub fn quit(&mut self, timeout: Duration) -> Result<(), ControlError> {
        super::control::quit(&mut self.qmp, Some(self.pidfd.as_fd()), timeout)
    }
}

fn open_pidfd(pid: u32) -> Result<OwnedFd, QemuError> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let opened =
        raw.ok_or(rustix::io::Errno::SRCH).and_then(|raw| rustix::process::pidfd_open(raw, PidfdFlags::empty()));
    opened.map_err(|errno| QemuError::ProcessGone { pid, source: errno.into() })
}

fn process_name(pid: u32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    comm.map_or_else(|_| "unknown".to_owned(), |comm| comm.trim().to_owned())
}

/// The process that the first vCPU thread belongs to.
fn process_of_thread(threads: &[u32]) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", threads.first()?)).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
}
