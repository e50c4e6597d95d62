//! Traces of what a guest writes, and a simulator that replays them.
//!
//! The simulator drives the same state machine, planner and predictors as a live migration does
//! ([`vmferry_core::engine::Source`] and [`vmferry_core::engine::Target`]); only the guest, the network and the clock are
//! models. So what it says about a policy is what that policy does.
//!
//! - [`simulate`] runs one migration of a trace's guest in a [`Scenario`] and says how it went, beside the optimum;
//! - [`post_copy`] does the same for the rival that moves the guest first and its memory afterwards, as a model alone;
//! - [`optimum`] is the least that any schedule can do;
//! - [`sweep`] does it for a grid of conditions on all processors, and [`html`] shows what came of it;
//! - [`replay`] turns the epochs of a trace into writes at moments.

mod error;
mod guest;
pub mod html;
mod link;
pub mod optimum;
mod outcome;
mod postcopy;
pub mod random;
pub mod replay;
mod scenario;
mod simulate;
pub mod sweep;
mod target;
pub mod trace;

pub use error::SimError;
pub use outcome::{GuestCost, Outcome, Ratios, Sample};
pub use postcopy::{PostCopyConfig, PostCopyOutcome, PostCopyRatios, post_copy};
pub use scenario::{HostCosts, Scenario, StopCosts, TrackingCosts};
pub use simulate::simulate;
