//! Stops single threads of another process, and lets them go.

use rustix::io::Errno;

use super::TrackError;
use super::inject::{Failure, wait_until_interrupted};
use super::sys;
use std::time::Duration;

/// How long a thread may take to stop. One that runs takes microseconds, one in a system call that cannot be interrupted as
/// long as that lasts.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Threads that stand still until this is dropped, which is to happen on the thread that made it. If that thread ends, they
/// run, whatever it ended by.
#[derive(Debug)]
pub(crate) struct HeldThreads {
    tids: Vec<i32>,
}

impl HeldThreads {
    /// Stops these threads of the process. Those that have ended are passed over.
    pub(crate) fn hold(pid: u32, tids: &[u32]) -> Result<Self, TrackError> {
        let mut held = Self { tids: Vec::with_capacity(tids.len()) };
        // First all are asked, then all are waited for: they stop side by side.
        for tid in tids.iter().filter_map(|&tid| i32::try_from(tid).ok()) {
            match sys::seize(tid) {
                Ok(()) => {
                    held.tids.push(tid);
                    // A thread that is gone cannot be interrupted, and is found out below.
                    let _ = sys::interrupt(tid);
                }
                Err(Errno::SRCH) => {}
                Err(source) => return Err(TrackError::NotPermitted { pid, source }),
            }
        }
        let mut ended = Vec::new();
        for &tid in &held.tids {
            match wait_until_interrupted(tid, STOP_LIMIT) {
                Ok(()) => {}
                Err(Failure::Gone) => ended.push(tid),
                Err(Failure::TimedOut) => {
                    return Err(TrackError::DoesNotStop { pid, threads: 1, waited_ms: STOP_LIMIT.as_millis() as u64 });
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Step(step, source)) => {
                    return Err(TrackError::InjectionFailed { pid, step: step.to_owned(), source });
                }
            }
        }
        held.tids.retain(|tid| !ended.contains(tid));
        Ok(held)
    }
}

impl Drop for HeldThreads {
    fn drop(&mut self) {
        for &tid in &self.tids {
            // It fails for one that is no more, or did not stop: that one runs when our thread ends.
            let _ = sys::detach(tid);
        }
    }
}
