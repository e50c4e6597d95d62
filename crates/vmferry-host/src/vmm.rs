//! What a driver needs of a virtual machine monitor, on either side.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_core::engine::{AddressSpacesReport, TargetError};
use vmferry_core::pages::{Owners, PageRun, WholeGuest};
use vmferry_core::plan::FixedCosts;

use crate::compress::PagesError;
use crate::embedded::EmbeddedError;
use crate::link::LinkError;
use crate::memory::{GuestMemory, MemoryError};
use crate::qemu::{ControlError, QemuError};
use crate::throttle::ThrottleError;
use crate::track::{ScanStats, TrackError};

/// What identifies a guest to the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The VMM's machine type.
    pub kind: String,
    /// The guest's processors.
    pub vcpus: u32,
}

/// Why a VMM did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// The peer sent on a further connection what has no place there.
    #[error("a further connection brought something wrong")]
    Refused {
        /// What.
        #[source]
        source: TargetError,
    },
    /// QEMU's process or RAM.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// QEMU's migration.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The embedded guest.
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    /// Tracking of writes.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Pages that the other side sent.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The connection to the other side.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The guest cannot be moved as it is.
    #[error("this guest cannot be moved: {reasons}")]
    Unfit {
        /// All reasons, each with what to change.
        reasons: String,
    },
    /// The device state is larger than any is.
    #[error("the device state exceeds {limit} bytes")]
    DeviceStateTooLarge {
        /// The limit.
        limit: u64,
    },
    /// The VMM did not end its device state in time.
    #[error("the VMM did not save its device state within {ms} ms")]
    DeviceStateLate {
        /// The limit.
        ms: u128,
    },
    /// The guest does not run after it was told to.
    #[error("the guest is `{run_state}` after it was told to run")]
    NotRunning {
        /// Its state.
        run_state: String,
    },
    /// The guest could not be slowed, or not be given its processor time back.
    #[error(transparent)]
    Throttle(#[from] ThrottleError),
    /// The system refused.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// The guest on the source.
///
/// Dropping it without [`Self::resume`] or [`Self::released`] must leave a guest that runs.
pub trait SourceVmm: Debug {
    /// What the target must be, too.
    fn machine(&self) -> Machine;

    /// The guest's RAM.
    fn memory(&self) -> &GuestMemory;

    /// What the stop phase will cost besides copying, as far as can be told without asking the VMM anything.
    fn assumed_costs(&self) -> FixedCosts;

    /// The same, as far as can be told now. May ask the VMM something.
    fn fixed_costs(&mut self) -> FixedCosts {
        self.assumed_costs()
    }

    /// Appends the pages written since the last scan, and re-arms them. Where that is `relaxed`, pages that are written all
    /// the time may be appended unseen and stay unarmed.
    ///
    /// # Errors
    /// The VMM may have ended.
    fn scan(&mut self, relaxed: bool, written: &mut Vec<PageRun>) -> Result<ScanStats, VmmError>;

    /// As [`Self::scan`], for some pages.
    ///
    /// # Errors
    /// The VMM may have ended.
    fn scan_run(&mut self, run: PageRun, written: &mut Vec<PageRun>) -> Result<ScanStats, VmmError>;

    /// Begins to tell the guest's address spaces apart, where the VMM can. It may find out at any time that it cannot: the
    /// guest then has one.
    fn tell_owners_apart(&mut self) {}

    /// Looks anew who owns which page, for about `allowance` at each call, taken over all calls. Returns whether all of the
    /// guest's mappings have been walked anew with this call.
    fn refresh_owners(&mut self, _allowance: Duration) -> bool {
        false
    }

    /// Who owns which page, as it was found last.
    fn owners(&self) -> &dyn Owners {
        &WholeGuest
    }

    /// The pages that programs read or wrote, as it was found last; ascending.
    fn accessed(&self) -> Vec<PageRun> {
        Vec::new()
    }

    /// What telling owners apart came to; `None` if it was never begun.
    fn owners_report(&self) -> Option<AddressSpacesReport> {
        None
    }

    /// Stops the guest, ready to save its device state. Paused on success; on an error it may be either. Returns when it
    /// stopped.
    ///
    /// # Errors
    /// The guest must then be resumed.
    fn pause(&mut self) -> Result<Instant, VmmError>;

    /// Saves the device state of the paused guest, in pieces of any size.
    ///
    /// # Errors
    /// The guest must then be resumed; also those of `sink`.
    fn save_device_state(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<(), LinkError>) -> Result<(), VmmError>;

    /// Runs the guest here, whatever happened so far; a running guest stays so.
    ///
    /// # Errors
    /// The guest may stand still.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// Leaves the guest this share of the processor time that it would have, from 0 to 1; 1 gives it all back. A paused
    /// guest stays so. What is taken is given back at the latest when this is dropped or our process ends.
    ///
    /// # Errors
    /// [`VmmError`]; it is not known what the guest has. To give all back can be tried again.
    fn throttle(&mut self, share: f64) -> Result<(), VmmError>;

    /// The hand-over is about to be sent: from now on nothing may run the guest here.
    fn released(&mut self);
}

/// The guest on the target, which must not run before [`Self::run`].
pub trait TargetVmm {
    /// What the source must be, too.
    fn machine(&self) -> Machine;

    /// The guest's RAM.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Loads the device state; the guest is paused afterwards.
    ///
    /// # Errors
    /// The VMM is then of no further use.
    fn load(&mut self, device_state: &[u8]) -> Result<(), VmmError>;

    /// Runs the guest.
    ///
    /// # Errors
    /// The guest does not run here.
    fn run(&mut self) -> Result<(), VmmError>;

    /// Does what was left for after the guest runs and the source knows: it does not count as downtime.
    fn settle(&mut self) {}
}

/// An error with all its causes, on one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // `transparent` errors say the same as their cause.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// How long a VMM may take for one step of the stop phase.
pub(crate) const STEP_TIMEOUT: Duration = Duration::from_secs(10);
