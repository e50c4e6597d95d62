//! The system calls of write tracking that have no safe wrapper elsewhere: userfaultfd's and pagemap's ioctls, ptrace,
//! and a wait that only looks. `memory/` uses a userfaultfd as well. Nothing here decides anything.

#![expect(unsafe_code, reason = "raw system calls on descriptors and on another process; each block argues its case")]

use std::ffi::{c_long, c_ulong, c_void};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};

/// `UFFD_USER_MODE_ONLY`: an unprivileged process may create the descriptor, whatever `vm.unprivileged_userfaultfd`
/// says.
pub(super) const UFFD_USER_MODE_ONLY: u32 = 1;
/// The flags every userfaultfd of ours is created with.
pub(super) const UFFD_FLAGS: u32 =
    libc::O_CLOEXEC.cast_unsigned() | libc::O_NONBLOCK.cast_unsigned() | UFFD_USER_MODE_ONLY;

pub(super) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(super) const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(super) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(super) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Bit of `UFFDIO_REGISTER`'s answer: the range can be given zero pages, which is so for all memory but hugetlbfs.
pub(super) const RANGE_HAS_ZEROPAGE: u64 = 1 << 4;

pub(super) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
pub(super) const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
pub(super) const PAGE_IS_WPALLOWED: u64 = 1 << 0;
pub(super) const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;

const UFFD_API: u64 = 0xAA;
pub(crate) const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub(super) const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(0xAA, 0x3F);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(0xAA, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<UffdioRange>(0xAA, 0x01);
const UFFDIO_COPY: Opcode = opcode::read_write::<UffdioCopy>(0xAA, 0x03);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteprotect>(0xAA, 0x06);
const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(b'f', 16);

const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420F;
const PTRACE_O_SUSPEND_SECCOMP: u32 = 1 << 21;
const NT_PRSTATUS: usize = 1;
/// `sizeof(sigset_t)` of the kernel.
const KERNEL_SIGSET_BYTES: usize = 8;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: addresses `start .. end` share these categories. All zero where the kernel wrote nothing.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

/// What to look for with `PAGEMAP_SCAN`, and what to do with what is found.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScanQuery {
    pub(super) flags: u64,
    pub(super) category_inverted: u64,
    pub(super) category_mask: u64,
    pub(super) return_mask: u64,
}

/// What one `PAGEMAP_SCAN` said.
#[derive(Debug)]
pub(super) struct ScanAnswer {
    /// How many entries of the buffer were filled. After an error some may be filled all the same.
    pub(super) result: Result<usize, Errno>,
    /// The address up to which the pages were walked.
    pub(super) walk_end: u64,
}

/// Where a system call reported by the last `-1` went wrong.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Runs an ioctl that reads and writes `argument`.
///
/// # Safety
/// `opcode` must name an ioctl whose argument is a `T`, and every address in `argument` that the kernel writes to must
/// be valid for that.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, opcode: Opcode, argument: &mut T) -> Result<usize, Errno> {
    // SAFETY: the caller vouches for the pair of opcode and type; the argument is ours for the length of the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), c_ulong::from(opcode), ptr::from_mut(argument)) };
    usize::try_from(result).map_err(|_| last_errno())
}

/// A userfaultfd for the memory of this process.
pub(crate) fn own_userfaultfd() -> Result<OwnedFd, Errno> {
    // SAFETY: creating the descriptor registers no memory, so no memory of this process changes its behaviour.
    unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::from_bits_retain(UFFD_FLAGS)) }
}

/// Opens the API with the given features; what the kernel says it has.
pub(crate) fn uffdio_api(uffd: BorrowedFd<'_>, features: u64) -> Result<u64, Errno> {
    let mut argument = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API takes a `struct uffdio_api`, which holds no address.
    unsafe { ioctl(uffd, UFFDIO_API, &mut argument) }?;
    Ok(argument.features)
}

/// Registers a range for write protection, or for faults at pages that do not exist; the ioctls that the range supports.
///
/// A range for asynchronous write protection behaves as before for the process that owns it: no fault is delivered.
pub(crate) fn uffdio_register(uffd: BorrowedFd<'_>, start: u64, len: u64, mode: u64) -> Result<u64, Errno> {
    let range = UffdioRange { start, len };
    let mut argument = UffdioRegister { range, mode, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes a `struct uffdio_register`; the range is an address of the descriptor's process,
    // which the kernel checks and does not write to.
    unsafe { ioctl(uffd, UFFDIO_REGISTER, &mut argument) }?;
    Ok(argument.ioctls)
}

/// Makes pages with this content from `start` on, in a range that is registered for missing pages; how many bytes of them, from the
/// first one. A page that exists is left as it is, and ends it, with an error if it is the first.
///
/// # Safety
/// `start` must be in a mapping of shared memory to which this process has no reference.
pub(crate) unsafe fn uffdio_copy(uffd: BorrowedFd<'_>, start: u64, content: &[u8]) -> Result<usize, Errno> {
    let src = content.as_ptr().expose_provenance() as u64;
    let len = content.len() as u64;
    let mut argument = UffdioCopy { dst: start, src, len, mode: UFFDIO_COPY_MODE_DONTWAKE, copied: 0 };
    // SAFETY: UFFDIO_COPY takes a `struct uffdio_copy`; it reads `len` bytes at `src`, which are `content`, and writes to pages that
    // the caller vouches for.
    let result = unsafe { ioctl(uffd, UFFDIO_COPY, &mut argument) };
    match usize::try_from(argument.copied) {
        // Less than all comes with an error, which is the next page's.
        Ok(copied) if copied > 0 => Ok(copied),
        _ => result.map(|_| 0),
    }
}

/// Protects every page of a registered range. What is not mapped gets a marker. Ten times slower for pages that are
/// mapped than a `PAGEMAP_SCAN` that does the same.
pub(super) fn uffdio_writeprotect(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let range = UffdioRange { start, len };
    let mut argument = UffdioWriteprotect { range, mode: UFFDIO_WRITEPROTECT_MODE_WP };
    // SAFETY: UFFDIO_WRITEPROTECT takes a `struct uffdio_writeprotect`; see `uffdio_register` for the address.
    unsafe { ioctl(uffd, UFFDIO_WRITEPROTECT, &mut argument) }?;
    Ok(())
}

/// Ends the registration of a range and lifts what is write-protected in it.
pub(super) fn uffdio_unregister(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut argument = UffdioRange { start, len };
    // SAFETY: UFFDIO_UNREGISTER takes a `struct uffdio_range`; see `uffdio_register` for the address.
    unsafe { ioctl(uffd, UFFDIO_UNREGISTER, &mut argument) }?;
    Ok(())
}

/// One `PAGEMAP_SCAN` over the addresses `start .. end`. With an empty buffer the kernel reports nothing.
pub(super) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    query: ScanQuery,
    start: u64,
    end: u64,
    buffer: &mut [PageRegion],
) -> ScanAnswer {
    let vec = if buffer.is_empty() { 0 } else { buffer.as_mut_ptr().expose_provenance() as u64 };
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: query.flags,
        start,
        end,
        walk_end: 0,
        vec,
        vec_len: buffer.len() as u64,
        max_pages: 0,
        category_inverted: query.category_inverted,
        category_mask: query.category_mask,
        category_anyof_mask: 0,
        return_mask: query.return_mask,
    };
    // SAFETY: PAGEMAP_SCAN takes a `struct pm_scan_arg`; the kernel writes at most `vec_len` regions to `vec`, which is
    // `buffer`, borrowed for the call. Any bit pattern is a valid `PageRegion`.
    let result = unsafe { ioctl(pagemap, PAGEMAP_SCAN, &mut argument) };
    ScanAnswer { result, walk_end: argument.walk_end }
}

/// Shared anonymous memory of this process that nobody ever touches: something to try ioctls on.
#[derive(Debug)]
pub(super) struct UntouchedMemory {
    base: *mut c_void,
    bytes: usize,
}

impl UntouchedMemory {
    pub(super) fn map(bytes: usize) -> Result<Self, Errno> {
        // SAFETY: no fixed address, so the kernel picks one that nothing of ours uses.
        let base = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
        }?;
        Ok(Self { base, bytes })
    }

    pub(super) fn address(&self) -> u64 {
        self.base.addr() as u64
    }
}

impl Drop for UntouchedMemory {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are the mapping made in `map`, and no reference into it was ever handed out.
        let _ = unsafe { rustix::mm::munmap(self.base, self.bytes) };
    }
}

/// The general registers of a thread, as `PTRACE_GETREGSET` gives them.
pub(super) type Registers = libc::user_regs_struct;

/// Why a traced thread does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// About to take this signal.
    Signal(i32),
    /// On the way into or out of a system call.
    SystemCall,
    /// `PTRACE_EVENT_STOP`: we interrupted it, or its process is stopped.
    Interrupted,
    /// Some other ptrace event.
    OtherEvent,
    /// Not stopped: it ended, and only its zombie is left.
    Ended,
}

/// Runs a ptrace request.
///
/// # Safety
/// `address` and `data` must be what the request takes, valid for what the kernel reads and writes there.
unsafe fn ptrace(request: u32, tid: i32, address: usize, data: *mut c_void) -> Result<c_long, Errno> {
    // SAFETY: the caller vouches for the request's arguments. No request used here is one of the PEEK requests, so -1
    // is always an error.
    let result = unsafe { libc::ptrace(request, tid, ptr::without_provenance_mut::<c_void>(address), data) };
    if result == -1 { Err(last_errno()) } else { Ok(result) }
}

/// A ptrace request whose two arguments are plain numbers.
fn ptrace_plain(request: u32, tid: i32, data: usize) -> Result<(), Errno> {
    // SAFETY: only the functions below call this, with requests that take a number and no address of ours.
    unsafe { ptrace(request, tid, 0, ptr::without_provenance_mut(data)) }?;
    Ok(())
}

/// Becomes the tracer of a thread without stopping it. Stops at system calls will be told from `SIGTRAP`.
pub(super) fn seize(tid: i32) -> Result<(), Errno> {
    ptrace_plain(libc::PTRACE_SEIZE, tid, libc::PTRACE_O_TRACESYSGOOD as usize)
}

/// Sets aside the stopped thread's seccomp filters for as long as it is traced.
pub(super) fn suspend_seccomp(tid: i32) -> Result<(), Errno> {
    let options = libc::PTRACE_O_TRACESYSGOOD.cast_unsigned() | PTRACE_O_SUSPEND_SECCOMP;
    ptrace_plain(libc::PTRACE_SETOPTIONS, tid, options as usize)
}

/// Asks a seized thread to stop.
pub(super) fn interrupt(tid: i32) -> Result<(), Errno> {
    ptrace_plain(libc::PTRACE_INTERRUPT, tid, 0)
}

/// Lets a stopped thread run, delivering `signal` if it is not 0.
pub(super) fn resume(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace_plain(libc::PTRACE_CONT, tid, usize::try_from(signal).unwrap_or(0))
}

/// As [`resume`], up to the next entry into or exit from a system call.
pub(super) fn resume_to_system_call(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace_plain(libc::PTRACE_SYSCALL, tid, usize::try_from(signal).unwrap_or(0))
}

/// Ends the tracing of a stopped thread and lets it run.
pub(super) fn detach(tid: i32) -> Result<(), Errno> {
    ptrace_plain(libc::PTRACE_DETACH, tid, 0)
}

/// The registers of a stopped thread; `None` if the kernel's set has another size, so the thread is not 64-bit.
pub(super) fn registers(tid: i32) -> Result<Option<Registers>, Errno> {
    let mut registers = MaybeUninit::<Registers>::zeroed();
    let mut vector = libc::iovec { iov_base: registers.as_mut_ptr().cast::<c_void>(), iov_len: size_of::<Registers>() };
    // SAFETY: PTRACE_GETREGSET writes at most `iov_len` bytes to `iov_base`, which is `registers`, and the new length
    // to `vector`; both live through the call.
    unsafe { ptrace(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, ptr::from_mut(&mut vector).cast()) }?;
    // SAFETY: the registers were zeroed before the kernel wrote to them, and all bit patterns are valid.
    let registers = unsafe { registers.assume_init() };
    Ok((vector.iov_len == size_of::<Registers>()).then_some(registers))
}

/// Sets the registers of a stopped thread.
pub(super) fn set_registers(tid: i32, registers: &Registers) -> Result<(), Errno> {
    let mut copy = *registers;
    let mut vector =
        libc::iovec { iov_base: ptr::from_mut(&mut copy).cast::<c_void>(), iov_len: size_of::<Registers>() };
    // SAFETY: PTRACE_SETREGSET reads `iov_len` bytes from `iov_base`, which is `copy`; both live through the call.
    unsafe { ptrace(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, ptr::from_mut(&mut vector).cast()) }?;
    Ok(())
}

/// The signals that a stopped thread has blocked, one bit each.
pub(super) fn signal_mask(tid: i32) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    // SAFETY: PTRACE_GETSIGMASK writes as many bytes as its address argument says, 8, to `mask`.
    unsafe { ptrace(libc::PTRACE_GETSIGMASK, tid, KERNEL_SIGSET_BYTES, ptr::from_mut(&mut mask).cast()) }?;
    Ok(mask)
}

/// Sets the signals that a stopped thread has blocked. The kernel leaves out SIGKILL and SIGSTOP.
pub(super) fn set_signal_mask(tid: i32, mask: u64) -> Result<(), Errno> {
    let mut mask = mask;
    // SAFETY: PTRACE_SETSIGMASK reads as many bytes as its address argument says, 8, from `mask`.
    unsafe { ptrace(libc::PTRACE_SETSIGMASK, tid, KERNEL_SIGSET_BYTES, ptr::from_mut(&mut mask).cast()) }?;
    Ok(())
}

/// The address of the `struct rseq` that a stopped thread registered, if any.
pub(super) fn rseq_address(tid: i32) -> Result<Option<u64>, Errno> {
    /// `struct ptrace_rseq_configuration`.
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        abi_pointer: u64,
        abi_size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut configuration = Configuration::default();
    let size = size_of::<Configuration>();
    // SAFETY: PTRACE_GET_RSEQ_CONFIGURATION writes as many bytes as its address argument says, to `configuration`.
    let answer = unsafe { ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, ptr::from_mut(&mut configuration).cast()) };
    match answer {
        Ok(_) => Ok((configuration.abi_pointer != 0).then_some(configuration.abi_pointer)),
        // A kernel without restartable sequences.
        Err(Errno::IO | Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Whether the traced thread is stopped, without waiting and without taking the news away: a signal that is in the
/// middle of its delivery stays with the thread if we die, where a stop that has been taken would lose it.
pub(super) fn peek_stop(tid: i32) -> Result<Option<Stop>, Errno> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    let id = libc::id_t::try_from(tid).map_err(|_| Errno::SRCH)?;
    // SAFETY: waitid writes one siginfo_t to `info`, which lives through the call.
    let result = unsafe { libc::waitid(libc::P_PID, id, info.as_mut_ptr(), options) };
    if result == -1 {
        return Err(last_errno());
    }
    // SAFETY: `info` was zeroed before the kernel wrote to it, and all bit patterns are valid.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid fills the process fields, or leaves them zero where there is no news.
    if unsafe { info.si_pid() } == 0 {
        return Ok(None);
    }
    if info.si_code != libc::CLD_TRAPPED {
        let ended = matches!(info.si_code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED);
        return Ok(ended.then_some(Stop::Ended));
    }
    // SAFETY: as above: these are the fields of a process's change of state.
    let status = unsafe { info.si_status() };
    Ok(Some(match (status >> 8, status & 0xFF) {
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Stop::SystemCall,
        (0, signal) => Stop::Signal(signal),
        (PTRACE_EVENT_STOP, _) => Stop::Interrupted,
        (_, _) => Stop::OtherEvent,
    }))
}
