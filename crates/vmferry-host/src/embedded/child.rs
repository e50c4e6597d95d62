//! The child's side: memory, writers, and obedience.
#![expect(unsafe_code, reason = "the guest's memory is a mapping shared with the parent")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags};
use vmferry_guest::{CheckReport, Drive, Gate, Memory, Parameters, Worker, words_from_raw};

use super::{Answer, Order, Start};
use crate::channel::Channel;
use crate::throttle::PERIOD;
use crate::track::{create_own_userfaultfd, own_pagemap};
use crate::vmm::describe;

/// The most bytes of state that are taken in.
const MAX_STATE_BYTES: usize = 1 << 20;

/// The guest's whole life, over its standard input. Returns when the parent has ended.
///
/// # Errors
/// If standard input is not what the parent gives; failures of the guest itself are told to the parent.
pub fn run_guest(stdin: OwnedFd) -> io::Result<()> {
    let mut channel = Channel::new(UnixStream::from(stdin));
    let Some((start, mut fds)) = channel.receive::<Start>()? else { return Ok(()) };
    let memory = fds.pop().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no memory was passed"))?;
    let result = live(&mut channel, &start, &memory);
    if let Err(reason) = &result {
        // The parent may be gone, which is a reason of its own.
        let _ = channel.send(&Answer::Failed { reason: reason.clone() }, &[]);
    }
    Ok(())
}

fn live(channel: &mut Channel, start: &Start, file: &OwnedFd) -> Result<(), String> {
    let parameters = Parameters::from_command_line(&start.parameters).map_err(|error| error.to_string())?;
    let region = map(file, start.memory_bytes).map_err(|error| format!("cannot map guest memory: {error}"))?;
    let memory = Memory::in_region(region, &parameters).and_then(Memory::require_aligned);
    let memory = memory.map_err(|error| error.to_string())?;
    if !start.incoming {
        memory.fill();
    }
    let uffd = create_own_userfaultfd().map_err(|error| describe(&error))?;
    let pagemap = own_pagemap().map_err(|error| describe(&error))?;
    let address = region.as_ptr().addr() as u64;
    let ready = Answer::Ready { address };
    channel.send(&ready, &[uffd.as_fd(), pagemap.as_fd()]).map_err(|error| error.to_string())?;
    // The parent has them now; ours would keep the tracking alive beyond it.
    drop((uffd, pagemap));

    let workers =
        if start.incoming { Vec::new() } else { Worker::all(&parameters).map_err(|error| error.to_string())? };
    let mut writers = Writers::new(memory, workers);
    if !start.incoming {
        writers.resume();
    }
    obey(channel, &mut writers)
}

/// Does what the parent says until it ends.
fn obey(channel: &mut Channel, writers: &mut Writers) -> Result<(), String> {
    while let Some((order, _)) = channel.receive().map_err(|error| error.to_string())? {
        let mut state = Vec::new();
        let answer = match order {
            Order::Pause => {
                writers.pause();
                Answer::Done
            }
            Order::Resume => {
                writers.resume();
                Answer::Done
            }
            Order::Save => {
                state = writers.save();
                Answer::State { bytes: state.len() }
            }
            Order::Load { bytes } => {
                if bytes > MAX_STATE_BYTES {
                    return Err(format!("{bytes} bytes of state are too many"));
                }
                let state = channel.receive_bytes(bytes).map_err(|error| error.to_string())?;
                writers.load(&state)?;
                Answer::Done
            }
            Order::Check => writers.check(),
            Order::Writes => Answer::Writes { writes: writers.writes() },
            Order::Throttle { share } => {
                writers.throttle(share);
                Answer::Done
            }
        };
        channel.send(&answer, &[]).and_then(|()| channel.send_bytes(&state)).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The guest's processors, as it were: stopped they are values that can be saved, running they are threads.
struct Writers {
    memory: Memory<'static>,
    shared: &'static Shared,
    /// How long the guest has run so far, without the pauses and what throttling took.
    active: Duration,
    state: WriterState,
    turns: Option<Turns>,
}

enum WriterState {
    Stopped(Vec<Worker>),
    Running { threads: Vec<JoinHandle<Worker>>, since: Instant },
}

/// A thread that keeps the writers at the gate for a part of the time. The guest's clock stands still then: its rate is one
/// of processor time, as if its writes took all that it has.
struct Turns {
    thread: JoinHandle<()>,
    /// Dropped to end it.
    _end: Sender<()>,
}

impl Turns {
    fn begin(shared: &'static Shared, share: f64) -> Self {
        let (sender, end) = channel();
        let thread = std::thread::spawn(move || {
            let wait = |part: f64| end.recv_timeout(PERIOD.mul_f64(part)) == Err(RecvTimeoutError::Timeout);
            loop {
                let paused = shared.gate.pause();
                let began = Instant::now();
                let goes_on = wait(1.0 - share);
                shared.taken_ns.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
                drop(paused);
                if !goes_on || !wait(share) {
                    return;
                }
            }
        });
        Self { thread, _end: sender }
    }

    fn end(self) {
        let Self { thread, _end: end } = self;
        drop(end);
        thread.join().expect("taking turns does not panic");
    }
}

/// What the threads share; it lives as long as the process, as the guest's memory does.
#[derive(Default)]
struct Shared {
    gate: Gate,
    stop: AtomicBool,
    writes: AtomicU64,
    /// What throttling took since the writers were started, in ns.
    taken_ns: AtomicU64,
}

impl Shared {
    /// How long the writers have had their time since they were started.
    fn ran(&self, since: Instant) -> Duration {
        since.elapsed().saturating_sub(Duration::from_nanos(self.taken_ns.load(Ordering::Relaxed)))
    }
}

impl Writers {
    fn new(memory: Memory<'static>, workers: Vec<Worker>) -> Self {
        let shared = Box::leak(Box::default());
        Self { memory, shared, active: Duration::ZERO, state: WriterState::Stopped(workers), turns: None }
    }

    fn resume(&mut self) {
        let WriterState::Stopped(workers) = &mut self.state else { return };
        let (memory, shared, before) = (self.memory, self.shared, self.active);
        shared.stop.store(false, Ordering::Relaxed);
        shared.taken_ns.store(0, Ordering::Relaxed);
        let since = Instant::now();
        let threads = std::mem::take(workers).into_iter().map(|mut worker| {
            std::thread::spawn(move || {
                let member = shared.gate.join();
                let elapsed = move || before + shared.ran(since);
                let drive = Drive { memory, member, writes: &shared.writes, stop: &shared.stop, elapsed };
                drive.run(&mut worker);
                worker
            })
        });
        self.state = WriterState::Running { threads: threads.collect(), since };
    }

    fn pause(&mut self) {
        let WriterState::Running { threads, since } = &mut self.state else { return };
        self.shared.stop.store(true, Ordering::Relaxed);
        // A writer that waits for its turn is not to be waited for: it stops at its next boundary.
        if let Some(turns) = self.turns.take() {
            turns.end();
        }
        let workers = std::mem::take(threads).into_iter().map(|thread| thread.join().expect("a writer does not panic"));
        let workers = workers.collect();
        self.active += self.shared.ran(*since);
        self.state = WriterState::Stopped(workers);
    }

    /// Lets the writers run for this share of the time, from 0 to 1, until they are paused.
    fn throttle(&mut self, share: f64) {
        if let Some(turns) = self.turns.take() {
            turns.end();
        }
        let is_running = matches!(self.state, WriterState::Running { .. });
        self.turns = (is_running && share < 1.0).then(|| Turns::begin(self.shared, share));
    }

    /// The state of a paused guest: for each writer its length in 4 bytes, little-endian, and its bytes.
    fn save(&mut self) -> Vec<u8> {
        self.pause();
        let WriterState::Stopped(workers) = &self.state else { unreachable!("just paused") };
        let mut state = Vec::new();
        for worker in workers {
            let bytes = worker.to_bytes();
            state.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            state.extend_from_slice(&bytes);
        }
        state
    }

    fn load(&mut self, state: &[u8]) -> Result<(), String> {
        let mut workers = Vec::new();
        let mut rest = state;
        while let Some((length, tail)) = rest.split_first_chunk() {
            let (bytes, tail) = tail
                .split_at_checked(u32::from_le_bytes(*length) as usize)
                .ok_or_else(|| "the state ends inside a writer".to_owned())?;
            workers.push(Worker::from_bytes(bytes).map_err(|error| error.to_string())?);
            rest = tail;
        }
        if !rest.is_empty() {
            return Err("the state ends inside a length".to_owned());
        }
        self.pause();
        self.shared.writes.store(workers.iter().map(Worker::writes).sum(), Ordering::Relaxed);
        self.active = Duration::ZERO;
        self.state = WriterState::Stopped(workers);
        Ok(())
    }

    fn check(&mut self) -> Answer {
        let _paused = self.shared.gate.pause();
        let CheckReport { pages, wrong, first_wrong } = self.memory.check_all();
        Answer::Checked { pages, wrong, first_wrong: first_wrong.map(|page| page.to_string()) }
    }

    fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }
}

fn map(file: &OwnedFd, bytes: u64) -> io::Result<&'static [AtomicU64]> {
    let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
    let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, file, 0) }?;
    // SAFETY: the mapping stays until the process ends, and this process reaches it through these atomics only.
    Ok(unsafe { words_from_raw(start.cast(), bytes) })
}
