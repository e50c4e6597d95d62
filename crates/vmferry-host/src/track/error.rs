//! Why write tracking was refused or failed.

use rustix::io::Errno;
use vmferry_core::pages::PageRun;

/// Why write tracking could not begin, or cannot go on. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// The host's kernel lacks something that tracking from outside needs.
    #[error(
        "this host's kernel cannot track the writes of another process: {missing} is missing; boot Linux 6.7 or newer, \
         built with CONFIG_USERFAULTFD"
    )]
    KernelTooOld {
        /// What is missing.
        missing: String,
    },
    /// There is no such process.
    #[error("there is no process {pid}; give the process id of a running VMM (not of one of its threads)")]
    NoSuchProcess {
        /// The process id that was asked for.
        pid: u32,
    },
    /// The VMM ended, or replaced itself by another program.
    #[error("the VMM has exited or executed another program; there is no guest left to move")]
    VmmExited,
    /// The kernel does not let us near the VMM.
    #[error(
        "not allowed to trace process {pid}; run vmferry as root or with CAP_SYS_PTRACE, or as the VMM's own user \
         where kernel.yama.ptrace_scope is 0 and the VMM is dumpable"
    )]
    NotPermitted {
        /// The VMM's process id.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Another program traces the VMM already; a thread has one tracer at most.
    #[error(
        "process {pid} is already traced by process {tracer} ({name}); end that debugger or tracer, then try again"
    )]
    AlreadyTraced {
        /// The VMM's process id.
        pid: u32,
        /// The tracer's process id.
        tracer: u32,
        /// The tracer's name, empty if unknown.
        name: String,
    },
    /// The VMM's program is not of the kind that can be entered.
    #[error("process {pid} is not a 64-bit program of this machine; vmferry can move only guests of 64-bit VMMs")]
    Not64Bit {
        /// The VMM's process id.
        pid: u32,
    },
    /// No thread of the VMM stopped in time.
    #[error(
        "none of {threads} threads of process {pid} stopped within {waited_ms} ms; the VMM hangs in the kernel \
         (state D in ps, often a dead disk or network file system): cure that, then try again"
    )]
    DoesNotStop {
        /// The VMM's process id.
        pid: u32,
        /// How many threads were tried.
        threads: usize,
        /// How long each was waited for.
        waited_ms: u64,
    },
    /// The VMM runs under a seccomp filter that cannot be set aside. Trying the call all the same could kill the VMM.
    #[error(
        "process {pid} runs under a seccomp filter, and setting it aside for two system calls needs CAP_SYS_ADMIN, no \
         seccomp filter on vmferry itself and a kernel with CONFIG_CHECKPOINT_RESTORE; run vmferry as root outside a \
         container, or start the VMM without its sandbox"
    )]
    SeccompFilter {
        /// The VMM's process id.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// No executable memory of the VMM holds a system call instruction.
    #[error(
        "no system call instruction was found in the executable memory of process {pid}; this is no VMM that vmferry \
         knows how to enter"
    )]
    NoSystemCallInstruction {
        /// The VMM's process id.
        pid: u32,
    },
    /// The VMM made the system call, and the kernel refused it.
    #[error(
        "the kernel refused {call} inside process {pid}; the VMM goes on undisturbed. EMFILE: raise its RLIMIT_NOFILE; \
         EPERM, EACCES or ENOSYS: its sandbox, a security module or the kernel's configuration forbids the call"
    )]
    CallRefused {
        /// The VMM's process id.
        pid: u32,
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Entering the VMM went wrong at a step where it should not. The VMM was put back as it was.
    #[error("entering process {pid} failed: {step}; the VMM goes on. This is a defect of vmferry: please report it")]
    InjectionFailed {
        /// The VMM's process id.
        pid: u32,
        /// What was being done.
        step: String,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The regions make no sense together.
    #[error("the list of RAM regions is wrong: {why}; this is a defect of the caller")]
    BadRegions {
        /// What is wrong with it.
        why: String,
    },
    /// Part of a region is no memory of the VMM.
    #[error(
        "the VMM maps nothing at {gap:#x}, inside the {bytes} bytes of guest RAM that should be at {address:#x}; the \
         guest's RAM layout changed or was read wrongly: look it up again"
    )]
    RegionNotMapped {
        /// Where the region should begin.
        address: u64,
        /// The region's size.
        bytes: u64,
        /// The first address in it that is not mapped.
        gap: u64,
    },
    /// The kernel cannot write-protect this kind of memory.
    #[error(
        "the kernel cannot write-protect the {bytes} bytes of guest RAM at {address:#x}; give the guest RAM on \
         /dev/shm, another tmpfs or hugetlbfs (memory-backend-file,share=on), in whole pages of the backing file"
    )]
    NotProtectable {
        /// Where the region begins.
        address: u64,
        /// The region's size.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// Another userfaultfd has the region: another vmferry, or the VMM itself (post-copy, background snapshot).
    #[error(
        "the guest RAM at {address:#x} already belongs to another userfaultfd; end the other vmferry, or the VMM's own \
         post-copy migration or background snapshot"
    )]
    RegionTaken {
        /// Where the region begins.
        address: u64,
    },
    /// A tracked region was unmapped or mapped anew. What was written since the last scan is not known.
    #[error(
        "the VMM unmapped or remapped guest RAM at {address:#x} while it was tracked ({pages:?}); attach again and \
         take all pages as written"
    )]
    RegionGone {
        /// Where the region began.
        address: u64,
        /// Its pages.
        pages: PageRun,
    },
    /// A system call of ours failed.
    #[error("{what} failed")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}
