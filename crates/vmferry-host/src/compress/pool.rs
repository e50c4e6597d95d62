//! The threads that encode batches beside the one that reads and sends.
//!
//! Batches come back in the order in which they were given. Whoever waits for the next one helps: with one processor, or
//! where all threads are busy, the driver encodes itself. So a batch that was given always comes back.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::batch::Batch;
use super::codec::PageEncoder;

/// The most threads beside the driver's.
const THREADS_MAX: usize = 4;
/// Batches under way for each thread, the driver's included: one that is encoded and one that is ready.
const BATCHES_PER_THREAD: usize = 2;
/// How often it is looked whether the threads live.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Batches that are being encoded.
pub(crate) struct EncoderPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    threads_max: usize,
    processors: usize,
    /// The driver's own.
    encoder: PageEncoder,
    /// Batches to be used again.
    spare: Vec<Batch>,
    given: u64,
    taken: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(u64, Batch)>,
    /// Encoded, in any order.
    done: Vec<(u64, Batch)>,
    ends: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EncoderPool {
    /// A pool with a thread for each processor, none of which runs before it is needed. The driver waits often enough.
    pub(crate) fn new() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with_threads(processors.min(THREADS_MAX), processors)
    }

    fn with_threads(threads_max: usize, processors: usize) -> Self {
        Self {
            shared: Arc::default(),
            threads: Vec::new(),
            threads_max,
            processors,
            encoder: PageEncoder::new(),
            spare: Vec::new(),
            given: 0,
            taken: 0,
        }
    }

    /// How many processors encode at the same time, as one counts on it: the guest and the driver have other work for them,
    /// about one of them.
    pub(crate) fn parallel(&self) -> f64 {
        let threads = self.threads_max.min(self.processors.saturating_sub(1));
        1.0 + (threads as f64 - 1.0).max(0.0) * 0.75
    }

    /// How many processors they take: the threads, and the driver while it waits for them.
    pub(crate) fn workers(&self) -> u32 {
        (self.threads_max + 1).min(self.processors.max(1)) as u32
    }

    /// An empty batch.
    pub(crate) fn batch(&mut self) -> Batch {
        self.spare.pop().unwrap_or_else(Batch::new)
    }

    /// Takes back a batch for other pages.
    pub(crate) fn recycle(&mut self, mut batch: Batch) {
        batch.clear();
        self.spare.push(batch);
    }

    /// Whether no batch is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.taken == self.given
    }

    /// Encodes a batch here and now.
    pub(crate) fn encode(&mut self, batch: &mut Batch) {
        batch.encode(&mut self.encoder);
    }

    /// Whether as many batches are under way as may be: the next one is to be taken first.
    pub(crate) fn is_full(&self) -> bool {
        self.given - self.taken >= ((self.threads_max + 1) * BATCHES_PER_THREAD) as u64
    }

    /// Gives a batch to be encoded.
    ///
    /// # Panics
    /// If the pool is full.
    pub(crate) fn give(&mut self, batch: Batch) {
        assert!(!self.is_full(), "{} batches are under way", self.given - self.taken);
        self.start_threads();
        self.shared.lock().queue.push_back((self.given, batch));
        self.given += 1;
        self.shared.work.notify_one();
    }

    /// The next batch in the order in which they were given, if it is encoded.
    pub(crate) fn take_ready(&mut self) -> Option<Batch> {
        let batch = self.shared.lock().take_done(self.taken)?;
        self.taken += 1;
        Some(batch)
    }

    /// The next batch in the order in which they were given; `None` if none is under way. Encodes itself where no thread
    /// has begun to.
    pub(crate) fn take(&mut self) -> Option<Batch> {
        if self.is_idle() {
            return None;
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        loop {
            if let Some(batch) = state.take_done(self.taken) {
                self.taken += 1;
                return Some(batch);
            }
            state = match state.queue.pop_front() {
                Some((number, mut batch)) => {
                    drop(state);
                    batch.encode(&mut self.encoder);
                    let mut state = shared.lock();
                    state.done.push((number, batch));
                    state
                }
                None => {
                    // A thread has it. One that panicked will not give it back.
                    assert!(!self.threads.iter().any(JoinHandle::is_finished), "an encoder's thread has ended");
                    shared.done.wait_timeout(state, LOOK_INTERVAL).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn start_threads(&mut self) {
        while self.threads.len() < self.threads_max {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("vmferry-encode".to_owned());
            match thread.spawn(move || run(&shared)) {
                Ok(thread) => self.threads.push(thread),
                Err(error) => {
                    // The driver encodes, then.
                    tracing::warn!(%error, "cannot start a thread to compress pages");
                    self.threads_max = self.threads.len();
                }
            }
        }
    }
}

impl State {
    fn take_done(&mut self, number: u64) -> Option<Batch> {
        let index = self.done.iter().position(|(done, _)| *done == number)?;
        Some(self.done.swap_remove(index).1)
    }
}

/// A thread's life.
fn run(shared: &Shared) {
    let mut encoder = PageEncoder::new();
    let mut state = shared.lock();
    while !state.ends {
        state = match state.queue.pop_front() {
            Some((number, mut batch)) => {
                drop(state);
                batch.encode(&mut encoder);
                let mut state = shared.lock();
                state.done.push((number, batch));
                shared.done.notify_one();
                state
            }
            None => shared.work.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

impl Drop for EncoderPool {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was reported where it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::{PAGE_BYTES, PageRun};

    use super::super::batch::Content;
    use super::super::codec::Codec;
    use super::*;

    fn filled(pool: &mut EncoderPool, number: u64) -> Batch {
        let mut batch = pool.batch();
        assert_eq!(batch.contents().count(), 0, "a batch is given back empty");
        batch.codec = if number.is_multiple_of(2) { Codec::Lz4 } else { Codec::Zstd1 };
        // Of all sizes, so that later ones are ready before earlier ones.
        let run = PageRun::new(number * 100, 1 + number * 37 % 64);
        batch
            .read(run, |to| {
                to.fill(number as u8 | 1);
                Ok::<_, ()>(())
            })
            .unwrap();
        batch
    }

    fn is_number(batch: &Batch, number: u64) {
        let runs = batch.contents().map(|content| match content {
            Content::Zero(run) => panic!("{run:?} is not zero"),
            Content::Pages(pages, content) => {
                assert!(content.new_pages().all(|(_, page)| page.iter().all(|&byte| byte == number as u8 | 1)));
                assert!((pages.data.len() as u64) < PAGE_BYTES / 2);
                pages.runs[0]
            }
        });
        assert_eq!(runs.collect::<Vec<_>>(), [PageRun::new(number * 100, 1 + number * 37 % 64)]);
    }

    #[test]
    fn batches_come_back_in_order_however_many_threads_there_are() {
        for threads in [0, 1, 3] {
            let mut pool = EncoderPool::with_threads(threads, threads);
            let mut next = 0;
            for number in 0..300 {
                while pool.is_full() {
                    let batch = pool.take().unwrap();
                    is_number(&batch, next);
                    next += 1;
                    pool.recycle(batch);
                }
                let batch = filled(&mut pool, number);
                pool.give(batch);
                while number % 3 == 0
                    && let Some(batch) = pool.take_ready()
                {
                    is_number(&batch, next);
                    next += 1;
                    pool.recycle(batch);
                }
            }
            while let Some(batch) = pool.take() {
                is_number(&batch, next);
                next += 1;
            }
            assert_eq!(next, 300);
            assert!(pool.spare.len() <= (threads + 1) * BATCHES_PER_THREAD + 1, "they are used again");
        }
    }

    #[test]
    fn a_pool_that_is_dropped_with_batches_under_way_ends() {
        let mut pool = EncoderPool::with_threads(2, 2);
        for number in 0..5 {
            let batch = filled(&mut pool, number);
            pool.give(batch);
        }
    }
}
