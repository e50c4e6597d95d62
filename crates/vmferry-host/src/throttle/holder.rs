//! Stops threads of another process and lets them go, in turn, so that they run for a share of the time.
//!
//! ```text
//!   │◀──── share · PERIOD ────▶│◀─ (1 − share) · PERIOD ─▶│
//!   let go: as if nobody       stopped, by ptrace          let go …
//!   knew of them
//! ```
//!
//! The threads are traced only while they are stopped: signals, with which a VMM kicks its processors, reach them otherwise
//! as ever, and wait while they are stopped. Ptrace belongs to a thread, so all of it happens on one of ours; when that ends,
//! and be it with our process, the kernel lets the threads go.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{PERIOD, ThrottleError};
use crate::track::{HeldThreads, TrackError};

/// Stops threads in turn until it is dropped.
#[derive(Debug)]
pub(crate) struct Holder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wish: Mutex<Wish>,
    changed: Condvar,
}

#[derive(Debug)]
struct Wish {
    share: f64,
    end: bool,
    /// Turns that the threads have had.
    turns: u64,
    /// Why it ended by itself.
    failure: Option<TrackError>,
}

impl Holder {
    /// Begins with these threads. They have been stopped once when this returns.
    ///
    /// # Errors
    /// [`ThrottleError`]; the threads run.
    pub(crate) fn begin(pid: u32, tids: &[u32], share: f64) -> Result<Self, ThrottleError> {
        let wish = Wish { share, end: false, turns: 0, failure: None };
        let shared = Arc::new(Shared { wish: Mutex::new(wish), changed: Condvar::new() });
        let (theirs, tids) = (Arc::clone(&shared), tids.to_vec());
        let thread = std::thread::Builder::new()
            .name("vmferry-throttle".to_owned())
            .spawn(move || theirs.take_turns(pid, &tids))
            .map_err(ThrottleError::Thread)?;
        let mut holder = Self { shared, thread: Some(thread) };
        let shared = Arc::clone(&holder.shared);
        let mut wish = shared.lock();
        while wish.turns == 0 && wish.failure.is_none() {
            wish = shared.changed.wait(wish).unwrap_or_else(PoisonError::into_inner);
        }
        let failure = wish.failure.take();
        drop(wish);
        match failure {
            Some(error) => {
                holder.join();
                Err(ThrottleError::Hold(error))
            }
            None => Ok(holder),
        }
    }

    /// Changes the share.
    ///
    /// # Errors
    /// [`ThrottleError`] if it has ended since; the threads run.
    pub(crate) fn set(&mut self, share: f64) -> Result<(), ThrottleError> {
        let mut wish = self.shared.lock();
        wish.share = share;
        wish.failure.take().map_or(Ok(()), |error| Err(ThrottleError::Hold(error)))
    }

    /// Lets the threads go soon, for good.
    pub(crate) fn end(&mut self) {
        self.shared.lock().end = true;
        self.shared.changed.notify_all();
    }

    /// Lets the threads go, for good.
    pub(crate) fn join(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            // Whatever it ended with, the kernel has let the threads go.
            drop(thread.join());
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wish> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_turns(&self, pid: u32, tids: &[u32]) {
        loop {
            let held = match HeldThreads::hold(pid, tids) {
                Ok(held) => held,
                Err(error) => {
                    self.lock().failure = Some(error);
                    return self.changed.notify_all();
                }
            };
            self.lock().turns += 1;
            self.changed.notify_all();
            let is_over = self.rest(|share| 1.0 - share);
            drop(held);
            if is_over || self.rest(|share| share) {
                return;
            }
        }
    }

    /// Waits for a part of a period, by the share; whether the end has come.
    fn rest(&self, part: impl Fn(f64) -> f64) -> bool {
        let began = Instant::now();
        let mut wish = self.lock();
        loop {
            let left = PERIOD.mul_f64(part(wish.share)).saturating_sub(began.elapsed());
            if wish.end || left < Duration::from_micros(1) {
                return wish.end;
            }
            wish = self.changed.wait_timeout(wish, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Busy, until};
    use super::*;

    #[test]
    fn a_held_thread_stands_still_and_goes_on_in_turn() {
        let busy = Busy::start();
        let mut holder = Holder::begin(busy.pid(), &[busy.pid()], 0.2).unwrap();
        until("it is held", || busy.is_traced());
        until("it is let go", || !busy.is_traced());
        until("it is held again", || busy.is_traced());
        let before = busy.ticks();
        until("it goes on all the same", || busy.ticks() > before);
        holder.set(0.9).unwrap();
        until("it is held", || busy.is_traced());
        holder.join();
        assert!(!busy.is_traced());
        let before = busy.ticks();
        until("it goes on", || busy.ticks() > before);
    }

    #[test]
    fn a_thread_that_ends_is_no_failure_and_one_that_is_traced_is() {
        let busy = Busy::start();
        let mut holder = Holder::begin(busy.pid(), &[busy.pid()], 0.5).unwrap();
        let pid = busy.pid();
        drop(busy);
        holder.set(0.1).unwrap();
        holder.join();
        drop(Holder::begin(pid, &[pid], 0.5));

        let busy = Busy::start();
        let _holder = Holder::begin(busy.pid(), &[busy.pid()], 0.05).unwrap();
        until("it is held", || busy.is_traced());
        // In a short gap between two turns of the first it may work.
        until("another is refused", || match Holder::begin(busy.pid(), &[busy.pid()], 0.05) {
            Ok(_) => false,
            Err(ThrottleError::Hold(TrackError::NotPermitted { .. })) => true,
            Err(error) => panic!("{error}"),
        });
    }

    /// Whatever ends the thread that holds others, and with it our process, they go on.
    #[test]
    fn the_kernel_lets_go_what_a_thread_held_that_ends() {
        let busy = Busy::start();
        let pid = busy.pid();
        let end = std::thread::spawn(move || std::mem::forget(HeldThreads::hold(pid, &[pid]).unwrap()));
        end.join().unwrap();
        until("it is let go", || !busy.is_traced());
        let before = busy.ticks();
        until("it goes on", || busy.ticks() > before);
    }
}
