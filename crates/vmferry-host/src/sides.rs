//! The target's further connections: each has a thread that reads frames and puts them in place, beside the driver.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use vmferry_core::engine::{Apply, SideStream};
use vmferry_core::pages::{PAGE_BYTES, PageNumber, PageRun};
use vmferry_core::wire::{Encoding, Message};

use crate::cancel::{Cancel, wait};
use crate::compress::PageDecoder;
use crate::link::{Link, LinkError};
use crate::memory::{GuestMemory, MemoryError};
use crate::vmm::{VmmError, describe};

/// How long somebody who connects may take to say that he belongs to the migration.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// The most connections that have not said it yet; more have to wait.
const STRANGERS_MAX: usize = 16;

/// The further connections of a migration. When it is dropped, all of them have ended and nothing is written any more.
pub(crate) struct Sides {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// How far they are.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Bytes of frames that are in place, in all.
    pub(crate) bytes: u64,
    /// What went wrong on one of them.
    pub(crate) failure: Option<SideFailure>,
}

/// Why a connection that had joined is of no use any more.
#[derive(Debug)]
pub(crate) enum SideFailure {
    /// It ended.
    Lost,
    /// It brought something wrong, or that could not be put in place.
    Failed(String),
}

struct Shared {
    memory: Arc<GuestMemory>,
    /// What a new connection may say.
    side: SideStream,
    stall_timeout: Duration,
    /// Ends all waits of the threads.
    stop: Cancel,
    /// Wakes the driver.
    news: Cancel,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    heard: Heard,
    joined: Vec<u16>,
    threads: Vec<JoinHandle<()>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, failure: SideFailure) {
        if !self.stop.is_cancelled() {
            self.lock().heard.failure.get_or_insert(failure);
            self.news.cancel();
        }
    }
}

impl Sides {
    /// Takes in connections from `listener` that belong to the migration of `side`.
    pub(crate) fn new(
        listener: &TcpListener,
        memory: Arc<GuestMemory>,
        side: SideStream,
        stall_timeout: Duration,
    ) -> Result<Self, VmmError> {
        let cannot = |source| VmmError::Host { what: "take in further connections", source };
        let listener = listener.try_clone().map_err(cannot)?;
        let (stop, news) = (Cancel::new().map_err(cannot)?, Cancel::new().map_err(cannot)?);
        let shared = Arc::new(Shared { memory, side, stall_timeout, stop, news, state: Mutex::default() });
        let acceptor = std::thread::Builder::new().name("vmferry-accept".to_owned());
        let for_thread = Arc::clone(&shared);
        let acceptor = acceptor.spawn(move || accept(&for_thread, &listener)).map_err(cannot)?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// Becomes readable when there is something to [hear](Self::hear).
    pub(crate) fn news(&self) -> BorrowedFd<'_> {
        self.shared.news.as_fd()
    }

    /// How far they are now.
    pub(crate) fn hear(&self) -> Heard {
        self.shared.news.reset();
        let mut state = self.shared.lock();
        Heard { bytes: state.heard.bytes, failure: state.heard.failure.take() }
    }
}

impl Drop for Sides {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        // A panic was reported where it happened.
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let threads = std::mem::take(&mut self.shared.lock().threads);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// The acceptor's life.
fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        match wait(&[(listener.as_fd(), PollFlags::IN), (shared.stop.as_fd(), PollFlags::IN)], None) {
            Ok([_, true]) => return,
            Ok([true, false]) => {}
            Ok([false, false]) => continue,
            Err(error) => return shared.fail(SideFailure::Failed(format!("cannot wait for connections: {error}"))),
        }
        match listener.accept() {
            Ok((stream, peer)) => {
                tracing::debug!(%peer, "further connection");
                if let Err(error) = take_in(shared, stream) {
                    tracing::warn!(%peer, %error, "cannot take in a further connection");
                }
            }
            Err(error) => {
                // Out of descriptors, or a peer that was too quick: no reason to spin.
                tracing::warn!(%error, "cannot accept a further connection");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        if shared.lock().joined.len() + 1 >= usize::from(shared.side.streams()) {
            return;
        }
    }
}

fn take_in(shared: &Arc<Shared>, stream: TcpStream) -> io::Result<()> {
    let mut state = shared.lock();
    state.threads.retain(|thread| !thread.is_finished());
    if state.threads.len() >= STRANGERS_MAX + usize::from(shared.side.streams()) {
        return Err(io::Error::other("too many connections that do not say what they are for"));
    }
    let for_thread = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("vmferry-receive".to_owned());
    state.threads.push(thread.spawn(move || run(&for_thread, stream))?);
    Ok(())
}

/// The life of a connection's thread.
fn run(shared: &Shared, stream: TcpStream) {
    let Ok(mut link) = Link::new(stream, shared.stall_timeout, shared.stop.clone()) else { return };
    let mut side = shared.side.clone();
    let mut decoder = PageDecoder::new();
    let connected = Instant::now();
    // However much still comes: nothing is written once the connections have been ended.
    while !shared.stop.is_cancelled() {
        match next(&mut link, &mut side, &mut decoder, shared) {
            Ok(true) => {}
            Ok(false) => {
                if side.stream().is_none() && connected.elapsed() >= JOIN_TIMEOUT {
                    return;
                }
                if link.wait_readable(JOIN_TIMEOUT).is_err() {
                    return;
                }
            }
            Err(_) if side.stream().is_none() => return,
            Err(VmmError::Link(LinkError::Cancelled)) => return,
            Err(VmmError::Link(LinkError::Closed)) => return shared.fail(SideFailure::Lost),
            Err(error) => return shared.fail(SideFailure::Failed(describe(&error))),
        }
    }
}

/// Takes in the next frame, if one has arrived.
fn next(link: &mut Link, side: &mut SideStream, decoder: &mut PageDecoder, shared: &Shared) -> Result<bool, VmmError> {
    let Some((message, frame_bytes)) = link.receive()? else { return Ok(false) };
    let had_joined = side.stream().is_some();
    let apply = side.handle_message(&message).map_err(|source| VmmError::Refused { source })?;
    put_pages_in_place(&shared.memory, apply, message, decoder)?;
    let mut state = shared.lock();
    if !had_joined && let Some(stream) = side.stream() {
        if state.joined.contains(&stream) {
            // Somebody has that place.
            drop(state);
            *side = shared.side.clone();
            return Err(VmmError::Link(LinkError::Closed));
        }
        state.joined.push(stream);
    }
    state.heard.bytes += frame_bytes;
    drop(state);
    shared.news.cancel();
    Ok(true)
}

/// Does what was found right to do with a message of memory.
pub(crate) fn put_pages_in_place(
    memory: &GuestMemory,
    apply: Apply,
    message: Message<'_>,
    decoder: &mut PageDecoder,
) -> Result<(), VmmError> {
    match (apply, message) {
        (Apply::WritePages, Message::Pages(pages)) => {
            let runs = &pages.runs;
            let read_base = |base: &mut [u8]| match pages.encoding {
                Encoding::Copy { .. } => read_runs(memory, joined(pages.sources()), base),
                _ => read_runs(memory, runs.iter().copied(), base),
            };
            let mut content = decoder.decode(runs.pages(), pages.encoding, pages.data, read_base)?;
            for &run in runs.iter() {
                let (of_run, rest) = content.split_at((run.count * PAGE_BYTES) as usize);
                memory.write(run, of_run)?;
                content = rest;
            }
        }
        (Apply::ZeroPages, Message::Zero(runs)) => {
            for run in runs {
                memory.zero(run)?;
            }
        }
        (Apply::Nothing, _) => {}
        (apply, message) => unreachable!("{apply:?} was asked for `{}`", message.name()),
    }
    Ok(())
}

/// Reads these runs, one after another.
fn read_runs(
    memory: &GuestMemory,
    runs: impl Iterator<Item = PageRun>,
    mut content: &mut [u8],
) -> Result<(), MemoryError> {
    for run in runs {
        let (of_run, rest) = content.split_at_mut((run.count * PAGE_BYTES) as usize);
        memory.read(run, of_run)?;
        content = rest;
    }
    Ok(())
}

/// Pages as runs, in their order.
fn joined(pages: impl Iterator<Item = PageNumber>) -> impl Iterator<Item = PageRun> {
    let mut pages = pages.peekable();
    std::iter::from_fn(move || {
        let mut run = PageRun::new(pages.next()?.0, 1);
        while pages.next_if(|page| page.0 == run.end()).is_some() {
            run.count += 1;
        }
        Some(run)
    })
}
