//! The gate between writers and checks.
//!
//! ```text
//!   running ── pause() asks ──▶ stopping ── last writer arrives at a boundary ──▶ paused
//!      ▲                                                                             │
//!      └────────────────────────── the last `Paused` is dropped ─────────────────────┘
//! ```
//!
//! Writers call [`Member::boundary`] between page writes; it costs one load while nobody asks for a pause. Writers that
//! rest count as stopped, so a pause never waits for a sleeping writer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Stops writers at page boundaries.
#[derive(Debug, Default)]
pub struct Gate {
    /// Whether somebody wants a pause. A hint that is checked without the lock; `state.pausers` decides.
    requested: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    members: u32,
    stopped: u32,
    pausers: u32,
}

impl Gate {
    /// A gate without writers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the caller one of the writers that a pause waits for, until the returned value is dropped. Waits while the
    /// gate is paused.
    pub fn join(&self) -> Member<'_> {
        let mut state = self.lock();
        while state.pausers > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.members += 1;
        Member { gate: self }
    }

    /// Waits until every writer is at a boundary and keeps them there until the returned value is dropped. Pauses nest,
    /// also from several threads. A writer must not call it.
    pub fn pause(&self) -> Paused<'_> {
        let mut state = self.lock();
        state.pausers += 1;
        self.requested.store(true, Ordering::Relaxed);
        while state.stopped < state.members {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Paused { gate: self }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A writer's place at the gate.
#[derive(Debug)]
pub struct Member<'a> {
    gate: &'a Gate,
}

impl Member<'_> {
    /// Says that the writer is between two writes; returns once no pause is asked for.
    pub fn boundary(&self) {
        if self.gate.requested.load(Ordering::Relaxed) {
            self.rest(Duration::ZERO);
        }
    }

    /// Sleeps for a time, between two writes, and longer while the gate is paused.
    pub fn rest(&self, time: Duration) {
        let gate = self.gate;
        let mut state = gate.lock();
        state.stopped += 1;
        gate.changed.notify_all();
        if !time.is_zero() {
            let waited = gate.changed.wait_timeout_while(state, time, |_| true);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        while state.pausers > 0 {
            state = gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.stopped -= 1;
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.gate.lock().members -= 1;
        self.gate.changed.notify_all();
    }
}

/// A time in which no writer writes.
#[derive(Debug)]
#[must_use = "the pause ends when this is dropped"]
pub struct Paused<'a> {
    gate: &'a Gate,
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.pausers -= 1;
        if state.pausers == 0 {
            self.gate.requested.store(false, Ordering::Relaxed);
            self.gate.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    #[test]
    fn no_writer_is_inside_a_write_during_a_pause() {
        const PAUSES: u64 = 200;
        let gate = Gate::new();
        let stop = AtomicBool::new(false);
        // Two halves that are equal at boundaries only.
        let halves: [[AtomicU64; 2]; 3] = Default::default();
        thread::scope(|scope| {
            for (index, [left, right]) in halves.iter().enumerate() {
                let (gate, stop) = (&gate, &stop);
                scope.spawn(move || {
                    let member = gate.join();
                    while !stop.load(Ordering::Relaxed) {
                        left.fetch_add(1, Ordering::Relaxed);
                        thread::yield_now();
                        right.fetch_add(1, Ordering::Relaxed);
                        if index == 0 {
                            member.rest(Duration::from_micros(50));
                        } else {
                            member.boundary();
                        }
                    }
                });
            }
            for _ in 0..PAUSES {
                let paused = gate.pause();
                let nested = gate.pause();
                for [left, right] in &halves {
                    assert_eq!(left.load(Ordering::Relaxed), right.load(Ordering::Relaxed));
                }
                drop(paused);
                for [left, right] in &halves {
                    assert_eq!(left.load(Ordering::Relaxed), right.load(Ordering::Relaxed));
                }
                drop(nested);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_gate_without_writers_pauses_at_once() {
        let gate = Gate::new();
        drop(gate.join());
        drop(gate.pause());
        drop(gate.join());
    }
}
