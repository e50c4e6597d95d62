//! How a thread of an x86-64 process is made to run a system call. All that an architecture has to say is here.

use rustix::io::Errno;

use crate::track::sys::Registers;

/// The instruction that enters the kernel. Its bytes are this instruction wherever they stand, also inside another.
pub(super) const SYSTEM_CALL_INSTRUCTION: &[u8] = &[0x0f, 0x05];

pub(super) const USERFAULTFD: u64 = libc::SYS_userfaultfd.cast_unsigned();
pub(super) const CLOSE: u64 = libc::SYS_close.cast_unsigned();

/// The code segment of 64-bit user code. Others are 32-bit code, also in a 64-bit process.
const USER_CODE_SEGMENT: u64 = 0x33;
/// A value of `orig_rax` that is no system call: the kernel's restart of interrupted calls leaves the registers alone.
const NO_SYSTEM_CALL: u64 = u64::MAX;
/// The kernel's own error number for "restart unless a handler runs, else EINTR".
const ERESTARTNOHAND: i64 = 514;

/// Whether the thread runs 64-bit code.
pub(super) fn is_64_bit(registers: &Registers) -> bool {
    registers.cs == USER_CODE_SEGMENT
}

/// Where the thread is.
pub(super) fn instruction_pointer(registers: &Registers) -> u64 {
    registers.rip
}

/// Registers with which the thread runs the system call `number` at the system call instruction at `instruction`.
pub(super) fn system_call(original: &Registers, instruction: u64, number: u64, argument: u64) -> Registers {
    Registers { rip: instruction, rax: number, orig_rax: NO_SYSTEM_CALL, rdi: argument, rsi: 0, rdx: 0, ..*original }
}

/// Whether the thread, stopped at a system call, is in the one that [`system_call`] prepared.
pub(super) fn is_in_system_call(registers: &Registers, instruction: u64, number: u64) -> bool {
    registers.rip == instruction + SYSTEM_CALL_INSTRUCTION.len() as u64 && registers.orig_rax == number
}

/// What the system call returned.
pub(super) fn result(registers: &Registers) -> Result<u64, Errno> {
    let value = registers.rax.cast_signed();
    if (-4095..0).contains(&value) {
        let errno = i32::try_from(-value).unwrap_or(libc::EIO);
        return Err(Errno::from_raw_os_error(errno));
    }
    Ok(registers.rax)
}

/// The registers with which an interrupted thread is let go.
///
/// Those it had, with one exception. The kernel restarts nearly every interrupted call by itself, from the error number
/// in `rax` and the call's number in `orig_rax`. `epoll_wait` alone, among those a VMM's main loop waits in, gives
/// `EINTR` even if no handler ran. Where it waits without limit, restarting it is exactly right; where it has a time
/// limit, a restart would begin the wait anew, and `EINTR` is left as any stop of the process would have it.
pub(super) fn resumed(original: &Registers) -> Registers {
    let interrupted = original.rax.cast_signed() == -i64::from(libc::EINTR);
    let unlimited = match original.orig_rax.cast_signed() {
        // The limit is an int; the kernel does not look at the register's upper half.
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (original.r10 as u32).cast_signed() < 0,
        libc::SYS_epoll_pwait2 => original.r10 == 0,
        _ => false,
    };
    if interrupted && unlimited {
        return Registers { rax: (-ERESTARTNOHAND).cast_unsigned(), ..*original };
    }
    *original
}
