//! A running stock QEMU, seen from outside: who it is, where its RAM lies, whether it can be moved, and its own
//! migration, by which the device state travels.
//!
//! - [`QemuGuest`] is the connection to one QEMU: process, RAM, inspection.
//! - [`Facts`] is everything that was asked; [`check`] is a pure function from facts to [`Finding`]s.
//! - [`Source`] and [`Target`] are the two sides of QEMU's migration as typed steps. They only need a
//!   [`QmpClient`](crate::qmp::QmpClient), so that a guard process that inherited the connection can cancel.
//!
//! Nothing here moves guest memory, decides when to switch over, or knows the network: callers pass connected sockets.
//!
//! Who runs the guest, by the status of QEMU's migration on the source:
//!
//! ```text
//!                   start_migration          continue_switchover
//!  none / cancelled ───────────────▶ setup, active ─▶ pre-switchover ─────────▶ device ─▶ completed
//!  / failed / completed              source runs      vCPUs stopped             stopped   stopped (postmigrate)
//!        ▲                                │                 │                     │          │
//!        └──────── cancel_and_resume ─────┴─────────────────┴─────────────────────┴──────────┘
//! ```
//!
//! The target stays paused until [`Target::cont`]: the hand-over is the caller's, not QEMU's.

mod control;
mod disks;
mod facts;
mod findings;
mod guest;
mod processor;
mod ram;

pub use control::{
    ControlError, MigrationStatus, Paused, Settings, Source, Target, UNLIMITED_BANDWIDTH_BYTES_PER_S,
    UNLIMITED_DOWNTIME_MS,
};
pub use facts::{Backend, Device, Facts, MAX_QOM_NODES, OtherRam, RamFacts};
pub use findings::{Finding, Inspection, Severity, check};
pub use guest::{QemuError, QemuGuest};
pub use processor::{
    MAX_PROCESSORS_AT_ONCE, PhysicalRange, ProcessorState, physical_memory, processor_state, processor_states,
    processors,
};
pub use ram::{FileSystem, GuestRam, GuestRamBlock, HugePages, Mapping, RamAccess, RamError};
