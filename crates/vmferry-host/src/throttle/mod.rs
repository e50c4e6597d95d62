//! Takes processor time from a running guest, from outside its VMM.
//!
//! Two ways, tried in this order:
//!
//! - [`Groups`]: each processor's thread goes into a control group of its own, below the one that it is in, whose quota is
//!   the share. The kernel does the rest. If we die, the guard puts the threads back.
//! - [`Holder`]: a thread of ours stops and lets go the processors' threads in turn, with ptrace. It needs no right that
//!   following the guest's writes does not need, and if we die, the kernel lets them go.
//!
//! The VMM learns of neither. QMP's `stop` and `cont` would be a third way: each drains and flushes all disks, runs the state
//! handlers of all devices, moves the guest's clocks, and tells whoever manages the guest that it is paused.
//!
//! A thread that does not run may be inside the VMM with a lock that others wait for. Both ways make such waits longer, by
//! what is left of a [`PERIOD`] at most.

mod groups;
mod holder;
#[cfg(test)]
mod testing;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use groups::Groups;
use holder::Holder;

use crate::guard::Guard;
use crate::track::TrackError;
use crate::vmm::describe;

/// In each of these a thread gets its share. The shortest turn has to be some times longer than it takes to begin and end
/// one, and the kernel's least quota is 1 ms: a twentieth. Nobody who waits for the guest should see it stand still for
/// long.
pub(crate) const PERIOD: Duration = Duration::from_millis(20);

/// Why the guest was not slowed, or not given its time back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThrottleError {
    /// Neither way is open.
    #[error(
        "the guest cannot be slowed: by a control group not, because {groups}; nor by stopping its processors' threads, because {holding}"
    )]
    Impossible {
        /// Why not by control groups.
        groups: String,
        /// Why not by stopping threads.
        holding: String,
    },
    /// The threads of the VMM's processors are not known.
    #[error("the threads of the guest's processors cannot be found in process {pid}")]
    NoThreads {
        /// The VMM.
        pid: u32,
    },
    /// No control group can limit the thread.
    #[error("{why}")]
    NoGroup {
        /// Why.
        why: &'static str,
    },
    /// A control group could not be changed.
    #[error("cannot {what} at {}", path.display())]
    Group {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Threads other than ours come into our control group faster than they are put back.
    #[error("threads are still in the control group {}", path.display())]
    Occupied {
        /// The group.
        path: PathBuf,
    },
    /// A processor's thread does not stop.
    #[error("a thread of the guest's processors cannot be stopped")]
    Hold(#[source] TrackError),
    /// The thread that does it could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// How a guest may be slowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ThrottleWay {
    /// By control groups, else by stopping its processors' threads in turn.
    #[default]
    Any,
    /// By stopping its processors' threads only.
    Holding,
}

/// A guest that is slowed. Dropping it gives the guest its time back, where [`Self::lift`] did not.
#[derive(Debug)]
pub(crate) enum Throttle {
    Groups(Groups),
    Holder(Holder),
}

impl Throttle {
    /// Begins to slow the threads of the process, into `slot`. The guard hears first of what there will be to undo.
    ///
    /// # Errors
    /// [`ThrottleError`]. If the slot is not empty then, not all could be undone: [`Self::lift`].
    pub(crate) fn begin(
        slot: &mut Option<Self>,
        (pid, tids): (u32, &[u32]),
        share: f64,
        way: ThrottleWay,
        guard: Option<&mut Guard>,
    ) -> Result<(), ThrottleError> {
        let found = match way {
            ThrottleWay::Any => Groups::find(pid, tids),
            ThrottleWay::Holding => Err(ThrottleError::NoGroup { why: "that was not wanted" }),
        };
        let refused = match found {
            Ok(groups) => {
                if let Some(guard) = guard {
                    guard.throttled(&groups);
                }
                let applied = groups.apply(share);
                let throttle = slot.insert(Self::Groups(groups));
                let Err(error) = applied else { return Ok(()) };
                throttle.lift()?;
                *slot = None;
                error
            }
            Err(error) => error,
        };
        tracing::info!(why = describe(&refused), "the guest is not slowed by control groups");
        let holder = Holder::begin(pid, tids, share)
            .map_err(|error| ThrottleError::Impossible { groups: describe(&refused), holding: describe(&error) })?;
        *slot = Some(Self::Holder(holder));
        Ok(())
    }

    /// Changes the share.
    ///
    /// # Errors
    /// [`ThrottleError`]; the share may be the one before.
    pub(crate) fn set(&mut self, share: f64) -> Result<(), ThrottleError> {
        match self {
            Self::Groups(groups) => groups.apply(share),
            Self::Holder(holder) => holder.set(share),
        }
    }

    /// The VMM has stopped the guest: turns make no sense any more. Takes no time.
    pub(crate) fn guest_stands_still(&mut self) {
        match self {
            // Threads that do nothing do not notice a quota, and moving them takes time that the guest has not.
            Self::Groups(_) => {}
            Self::Holder(holder) => holder.end(),
        }
    }

    /// Gives the guest its time back.
    ///
    /// # Errors
    /// [`ThrottleError`]; it can be tried again.
    pub(crate) fn lift(&mut self) -> Result<(), ThrottleError> {
        match self {
            Self::Groups(groups) => groups.undo(),
            Self::Holder(holder) => {
                holder.join();
                Ok(())
            }
        }
    }
}
