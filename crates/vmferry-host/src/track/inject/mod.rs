//! Gets a userfaultfd for another process's memory: makes one of its threads create it, takes a copy, and makes the
//! thread close it again before it is let go.
//!
//! ```text
//!   thread of the VMM      we
//!   ───────────────────    ───────────────────────────────────────────────────────────────
//!   running, or waiting    PTRACE_SEIZE, PTRACE_INTERRUPT                          Seized
//!   stopped (signal-type)  keep registers and signal mask, block all signals      Stopped
//!   in userfaultfd(2)      instruction pointer → a `syscall` instruction it has   Entered
//!   out of it              pidfd_getfd                                   Created, TakenOut
//!   in and out of close(2) the same                                                Closed
//!   stopped (signal-type)  registers and mask put back, PTRACE_DETACH            Released
//!   running, or waiting
//! ```
//!
//! - No byte of the VMM's memory is written: an existing `syscall` instruction is borrowed, as a rule the vdso's. Other
//!   threads run on, in the same text, undisturbed.
//! - The thread never runs an instruction that is not its own but that one: it goes from stop to stop.
//! - The first and the last stop are of the kind in which the kernel handles signals. So the thread leaves through the
//!   kernel's own logic for interrupted system calls, with the registers it came with, and the call it waited in goes
//!   on with what is left of its time.
//! - A stop is looked at and not taken: if we are killed, a signal in delivery still reaches the thread. What a death
//!   of ours does break is a thread that is between Entered and Released, for about 0.1 ms.
//! - Every wait has a limit. A VMM that dies meanwhile is [`TrackError::VmmExited`].
//!
//! Ptrace belongs to a thread, so all of it happens on one of its own; when that ends, whatever state it left, the
//! kernel ends the tracing of every thread that it seized.

#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

use super::TrackError;
use super::procfs::{self, Status, Target};
use super::sys::{self, Registers, Stop};

/// How long a thread has to stop before another is tried.
const FIRST_STOP_LIMIT: Duration = Duration::from_secs(1);
/// How long a step of a stopped thread may take. None blocks; memory may be short.
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// How long the death of the VMM may take, once a thread of it is gone.
const EXIT_LIMIT: Duration = Duration::from_secs(2);
/// How many stops that we did not ask for are passed over.
const MAX_OTHER_STOPS: usize = 64;
/// How many times a thread is let run on out of a restartable sequence.
const MAX_SEQUENCE_RETRIES: usize = 16;
/// How many looks at a thread follow each other at once, before sleeping between them. Most steps take less. Yielding
/// instead would hand a busy processor to others for milliseconds, in which the thread stands still.
const EAGER_LOOKS: u32 = 64;
/// How long to sleep between looks after that.
const LOOK_INTERVAL: Duration = Duration::from_micros(20);
/// The most executable memory that is searched for an instruction.
const MAX_SEARCHED_BYTES: u64 = 64 << 20;
const SEARCH_CHUNK_BYTES: usize = 64 << 10;
const ALL_SIGNALS: u64 = u64::MAX;

/// A userfaultfd taken out of a process.
#[derive(Debug)]
pub(super) struct Injected {
    pub(super) uffd: OwnedFd,
    /// The thread that made it.
    pub(super) tid: i32,
    /// From the request to stop the thread until it was let go.
    pub(super) stop: Duration,
}

/// How far the work has come. Tests look at it, to strike at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Seized,
    Stopped,
    Entered,
    Created,
    TakenOut,
    Closed,
    Released,
}

/// Why an attempt on one thread ended.
pub(super) enum Failure {
    /// The thread is no more, or no longer ours.
    Gone,
    /// The thread did not stop in time.
    TimedOut,
    /// Another thread would not do better.
    Final(TrackError),
    /// The kernel refused a step.
    Step(&'static str, Errno),
}

/// Names a ptrace step, for the error; a thread that is not there is [`Failure::Gone`].
fn step(what: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| match errno {
        Errno::SRCH | Errno::CHILD => Failure::Gone,
        errno => Failure::Step(what, errno),
    }
}

/// Makes a userfaultfd for the memory of the target. `observe` hears of each stage when it is reached.
pub(super) fn userfaultfd_of(target: &Target, observe: &mut (dyn FnMut(Stage) + Send)) -> Result<Injected, TrackError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("vmferry-ptrace".to_owned())
            .spawn_scoped(scope, || on_any_thread(target, observe))
            .map_err(|error| TrackError::Host {
                what: "starting a thread",
                source: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
            })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Tries the VMM's threads one after the other: the leader, in a VMM its main loop, then others.
fn on_any_thread(target: &Target, observe: &mut (dyn FnMut(Stage) + Send)) -> Result<Injected, TrackError> {
    let pid = target.pid;
    let threads = target.threads()?;
    let mut late = 0;
    let mut instruction = None;
    for tid in threads {
        let Some(status) = traceable(target, tid)? else { continue };
        match sys::seize(tid) {
            Ok(()) => observe(Stage::Seized),
            Err(Errno::SRCH) => continue,
            Err(source) => {
                // The kernel has one answer for no right, for a thread that just ended and for one just traced.
                let Some(_) = traceable(target, tid)? else { continue };
                return Err(TrackError::NotPermitted { pid, source });
            }
        }
        // Once the right to trace is certain, and before the thread is stopped: it takes about as long as all the rest.
        instruction = match instruction {
            Some(address) => Some(address),
            None => find_system_call(target, tid)?,
        };
        match on_thread(target, tid, status.seccomp, instruction, observe) {
            Ok(injected) => return Ok(injected),
            Err(Failure::Gone) => {
                if target.exited_within(EXIT_LIMIT) {
                    return Err(TrackError::VmmExited);
                }
            }
            // It stays seized until this thread ends. It may stop yet, and then waits for that.
            Err(Failure::TimedOut) => late += 1,
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Step(step, source)) => {
                return Err(TrackError::InjectionFailed { pid, step: step.to_owned(), source });
            }
        }
    }
    if target.exited_within(if late == 0 { EXIT_LIMIT } else { Duration::ZERO }) {
        return Err(TrackError::VmmExited);
    }
    let waited_ms = u64::try_from(FIRST_STOP_LIMIT.as_millis()).unwrap_or(u64::MAX);
    Err(TrackError::DoesNotStop { pid, threads: late, waited_ms })
}

/// The status of a thread that can be traced; `None` if it has ended.
fn traceable(target: &Target, tid: i32) -> Result<Option<Status>, TrackError> {
    match target.status(tid) {
        Ok(status) if matches!(status.state, 'Z' | 'X') => Ok(None),
        Ok(status) if status.tracer != 0 => {
            let (tracer, name) = procfs::process_of(status.tracer);
            Err(TrackError::AlreadyTraced { pid: target.pid, tracer, name })
        }
        Ok(status) => Ok(Some(status)),
        Err(TrackError::VmmExited) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Does the work on a thread that has been seized. On success and on any error but [`Failure::TimedOut`] the thread
/// has been let go as it was, or is gone.
fn on_thread(
    target: &Target,
    tid: i32,
    seccomp: bool,
    instruction: Option<u64>,
    observe: &mut (dyn FnMut(Stage) + Send),
) -> Result<Injected, Failure> {
    let begun = Instant::now();
    let original = stop_outside_sequence(target, tid)?;
    observe(Stage::Stopped);
    let entered = enter(target, tid, seccomp, instruction);
    let outcome = match entered {
        Ok(Entered { instruction, mask }) => {
            let outcome = make_userfaultfd(target, tid, &original, instruction, observe);
            // The first error tells; what follows from it does not.
            let left = leave(tid, &original, mask);
            outcome.and_then(|uffd| left.map(|()| uffd)).map_err(|failure| match failure {
                // Not a thread that never stopped, but one that did not get through a step: no cause to try another.
                Failure::TimedOut => Failure::Step("a step of the thread took too long", Errno::TIMEDOUT),
                failure => failure,
            })
        }
        Err(failure) => {
            let _ = sys::detach(tid);
            Err(failure)
        }
    }?;
    observe(Stage::Released);
    Ok(Injected { uffd: outcome, tid, stop: begun.elapsed() })
}

/// Stops the thread where the kernel handles signals, and outside of a restartable sequence: to go into the kernel
/// from elsewhere would make the kernel forget that the sequence was interrupted. A thread that is let run leaves the
/// sequence at once, since being stopped in it aborts it.
fn stop_outside_sequence(target: &Target, tid: i32) -> Result<Registers, Failure> {
    for _ in 0..MAX_SEQUENCE_RETRIES {
        sys::interrupt(tid).map_err(step("interrupting the thread"))?;
        wait_until_interrupted(tid, FIRST_STOP_LIMIT)?;
        let registers = sys::registers(tid).map_err(step("reading the registers"))?;
        let Some(registers) = registers.filter(arch::is_64_bit) else {
            let _ = sys::detach(tid);
            return Err(Failure::Final(TrackError::Not64Bit { pid: target.pid }));
        };
        if !is_in_sequence(target, tid, arch::instruction_pointer(&registers))? {
            return Ok(registers);
        }
        sys::resume(tid, 0).map_err(step("letting the thread run on"))?;
    }
    Err(Failure::TimedOut)
}

/// Whether the thread is inside a restartable sequence (rseq(2)).
fn is_in_sequence(target: &Target, tid: i32, instruction_pointer: u64) -> Result<bool, Failure> {
    /// Offset of `rseq_cs` in `struct rseq`.
    const DESCRIPTOR_OFFSET: u64 = 8;
    /// Offset of `start_ip` in `struct rseq_cs`; the sequence's length follows it.
    const START_OFFSET: u64 = 8;

    let Some(rseq) = sys::rseq_address(tid).map_err(step("asking for the thread's restartable sequence"))? else {
        return Ok(false);
    };
    let memory = target.thread_file(tid, "mem").map_err(Failure::Final)?;
    let word = |address: u64| {
        let mut bytes = [0; 8];
        let complete = matches!(rustix::io::pread(&memory, &mut bytes, address), Ok(8));
        complete.then(|| u64::from_le_bytes(bytes))
    };
    // What cannot be read is no sequence: the kernel would have ended the thread for it.
    let Some(descriptor) = word(rseq + DESCRIPTOR_OFFSET).filter(|address| *address != 0) else { return Ok(false) };
    let bounds = word(descriptor + START_OFFSET).zip(word(descriptor + START_OFFSET + 8));
    Ok(bounds.is_some_and(|(start, length)| instruction_pointer.wrapping_sub(start) < length))
}

/// What is known of a thread that can be made to run a system call.
struct Entered {
    /// Where it finds the instruction for that.
    instruction: u64,
    /// The signals that it had blocked.
    mask: u64,
}

/// Prepares a stopped thread: no filter, no signal.
fn enter(target: &Target, tid: i32, seccomp: bool, instruction: Option<u64>) -> Result<Entered, Failure> {
    let pid = target.pid;
    let instruction = match instruction {
        Some(address) => address,
        // A process in the middle of exec(2) has no text yet; one that has come to a stop is through with it.
        None => match find_system_call(target, tid) {
            Ok(Some(address)) => address,
            // A process that was killed has lost its memory some time before it counts as dead.
            Ok(None) if target.exited_within(EXIT_LIMIT) => return Err(Failure::Gone),
            Ok(None) => return Err(Failure::Final(TrackError::NoSystemCallInstruction { pid })),
            Err(error) => return Err(Failure::Final(error)),
        },
    };
    if seccomp {
        // A filter may answer a call it does not know with death. Not even an operator who sees that coming wants it.
        sys::suspend_seccomp(tid).map_err(|source| Failure::Final(TrackError::SeccompFilter { pid, source }))?;
    }
    // Where the thread waits under a mask of the call's own (ppoll), this is the one it will have again after it, and
    // the call sets its own again when it is restarted.
    let mask = sys::signal_mask(tid).map_err(step("reading the signal mask"))?;
    sys::set_signal_mask(tid, ALL_SIGNALS).map_err(step("blocking the thread's signals"))?;
    Ok(Entered { instruction, mask })
}

/// Creates the descriptor in the VMM, takes it out, and closes it there.
fn make_userfaultfd(
    target: &Target,
    tid: i32,
    original: &Registers,
    instruction: u64,
    observe: &mut (dyn FnMut(Stage) + Send),
) -> Result<OwnedFd, Failure> {
    let pid = target.pid;
    let refused = |call| move |source| Failure::Final(TrackError::CallRefused { pid, call, source });
    let number = run(tid, original, instruction, arch::USERFAULTFD, u64::from(sys::UFFD_FLAGS), &mut || {
        observe(Stage::Entered);
    })?
    .map_err(refused("userfaultfd(2)"))?;
    observe(Stage::Created);
    let taken = i32::try_from(number).map_err(|_| Errno::BADF).and_then(|number| target.take_descriptor(tid, number));
    observe(Stage::TakenOut);
    // Whether or not it could be taken: nothing of ours stays behind.
    run(tid, original, instruction, arch::CLOSE, number, &mut || ())?.map_err(refused("close(2)"))?;
    observe(Stage::Closed);
    taken.map_err(|source| match source {
        Errno::PERM => Failure::Final(TrackError::NotPermitted { pid, source }),
        Errno::SRCH => Failure::Gone,
        source => Failure::Step("taking the descriptor out of the VMM", source),
    })
}

/// Makes the stopped thread run a system call; the outer result is ours, the inner one the call's.
fn run(
    tid: i32,
    original: &Registers,
    instruction: u64,
    number: u64,
    argument: u64,
    entered: &mut dyn FnMut(),
) -> Result<Result<u64, Errno>, Failure> {
    let prepared = arch::system_call(original, instruction, number, argument);
    sys::set_registers(tid, &prepared).map_err(step("setting the registers"))?;
    run_to_system_call(tid)?;
    let registers = registers_of(tid)?;
    if !arch::is_in_system_call(&registers, instruction, number) {
        return Err(Failure::Step("entering the system call", Errno::IO));
    }
    entered();
    run_to_system_call(tid)?;
    Ok(arch::result(&registers_of(tid)?))
}

fn registers_of(tid: i32) -> Result<Registers, Failure> {
    let registers = sys::registers(tid).map_err(step("reading the registers"))?;
    registers.ok_or(Failure::Step("reading the registers", Errno::IO))
}

/// Lets the thread run to its next stop at a system call.
fn run_to_system_call(tid: i32) -> Result<(), Failure> {
    let mut signal = 0;
    for _ in 0..MAX_OTHER_STOPS {
        sys::resume_to_system_call(tid, signal).map_err(step("letting the thread run to a system call"))?;
        signal = match wait(tid, STEP_LIMIT)? {
            Stop::SystemCall => return Ok(()),
            // Whatever else gets through with all signals blocked is an answer to what we made the thread do.
            Stop::Signal(libc::SIGSTOP) => libc::SIGSTOP,
            Stop::Signal(_) => return Err(Failure::Step("running the system call (a signal came)", Errno::FAULT)),
            Stop::Interrupted | Stop::OtherEvent => 0,
            Stop::Ended => return Err(Failure::Gone),
        };
    }
    Err(Failure::Step("running the system call (it does not get there)", Errno::IO))
}

/// Brings the thread, from whatever stop it is in, back to one where the kernel handles signals, gives it back what it
/// had, and lets it go.
fn leave(tid: i32, original: &Registers, mask: u64) -> Result<(), Failure> {
    sys::interrupt(tid).map_err(step("stopping the thread again"))?;
    sys::resume(tid, 0).map_err(step("letting the thread run to its last stop"))?;
    wait_until_interrupted(tid, STEP_LIMIT)?;
    sys::set_registers(tid, &arch::resumed(original)).map_err(step("putting the registers back"))?;
    sys::set_signal_mask(tid, mask).map_err(step("putting the signal mask back"))?;
    sys::detach(tid).map_err(step("letting the thread go"))
}

/// Waits for the stop that was asked for. Signals on the way are delivered: the request is still there after them.
pub(super) fn wait_until_interrupted(tid: i32, limit: Duration) -> Result<(), Failure> {
    for _ in 0..MAX_OTHER_STOPS {
        let signal = match wait(tid, limit)? {
            Stop::Interrupted => return Ok(()),
            Stop::Signal(signal) => signal,
            Stop::SystemCall | Stop::OtherEvent => 0,
            Stop::Ended => return Err(Failure::Gone),
        };
        sys::resume(tid, signal).map_err(step("passing a signal on"))?;
    }
    Err(Failure::TimedOut)
}

/// Waits for the next stop.
fn wait(tid: i32, limit: Duration) -> Result<Stop, Failure> {
    let begun = Instant::now();
    let mut looks = 0_u32;
    loop {
        match sys::peek_stop(tid) {
            Ok(Some(stop)) => return Ok(stop),
            Ok(None) | Err(Errno::INTR) => {}
            Err(errno) => return Err(step("waiting for the thread")(errno)),
        }
        looks = looks.saturating_add(1);
        if looks < EAGER_LOOKS {
            std::hint::spin_loop();
        } else if begun.elapsed() < limit {
            thread::sleep(LOOK_INTERVAL);
        } else {
            return Err(Failure::TimedOut);
        }
    }
}

/// An address at which the process has a system call instruction. `None` also if its text is gone, or not there yet.
fn find_system_call(target: &Target, tid: i32) -> Result<Option<u64>, TrackError> {
    let wanted = arch::SYSTEM_CALL_INSTRUCTION;
    let (memory, mappings) = match (target.thread_file(tid, "mem"), target.executable_mappings(tid)) {
        (Ok(memory), Ok(mappings)) => (memory, mappings),
        // This thread at least is no more. Stopping it will tell about the others.
        (Err(TrackError::VmmExited), _) | (_, Err(TrackError::VmmExited)) => return Ok(None),
        (Err(error), _) | (_, Err(error)) => return Err(error),
    };
    let mut chunk = vec![0; SEARCH_CHUNK_BYTES];
    let mut left = MAX_SEARCHED_BYTES;
    for (start, end) in mappings {
        let mut at = start;
        while at < end && left > 0 {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(chunk.len());
            let Ok(read) = rustix::io::pread(&memory, &mut chunk[..length], at) else { break };
            if let Some(offset) = chunk[..read].windows(wanted.len()).position(|window| window == wanted) {
                return Ok(Some(at + offset as u64));
            }
            if read < wanted.len() {
                break;
            }
            // Chunks overlap, so that no instruction is cut in two.
            let step = if at + read as u64 == end { read } else { read - (wanted.len() - 1) };
            at += step as u64;
            left = left.saturating_sub(step as u64);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
