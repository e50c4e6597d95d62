//! The Linux side of vmferry: everything that touches a process, a file, a socket or the clock.
//!
//! - [`migrate`] and [`receive`] drive the state machines of `vmferry-core` over a TCP connection.
//! - [`QemuSource`] and [`QemuTarget`] are a stock QEMU as either side; [`EmbeddedSource`] and [`EmbeddedTarget`] a
//!   child process of our own, for demonstrations and tests.
//! - [`control`] shows what runs to other processes, and lets them change it.
//! - [`spaces`] tells the processes of a QEMU guest apart by their page tables.
//! - [`watch`] shows what a guest writes without moving it.
//! - [`track`] finds the pages that another process wrote; [`qmp`] and [`qemu`] speak with QEMU.

mod attached;
mod buffer;
mod cancel;
mod channel;
mod clock;
mod compress;
pub mod control;
mod direct_reads;
mod embedded;
mod guard;
mod link;
mod memory;
pub mod qemu;
pub mod qmp;
mod record;
mod sides;
mod socket;
mod source;
pub mod spaces;
mod stop_time;
mod target;
mod throttle;
pub mod track;
mod vmm;

pub use attached::{QemuSource, QemuTarget, inspect};
pub use cancel::Cancel;
pub use compress::{Compress, PagesError};
pub use embedded::{
    EmbeddedError, EmbeddedGuest, EmbeddedSource, EmbeddedTarget, GuestProgram, SelfCheck, pages_in, run_guest,
};
pub use guard::{GuardProgram, run_guard};
pub use link::LinkError;
pub use memory::{GuestMemory, MemoryError};
pub use record::{WatchSummary, WatchedEpoch, watch, zero_pages};
pub use source::{MigrateOptions, Progress, default_streams, migrate, migrate_with};
pub use target::{TargetReport, receive, receive_with};
pub use throttle::{ThrottleError, ThrottleWay};
pub use vmm::{Machine, SourceVmm, TargetVmm, VmmError, describe};
