//! The pure logic of vmferry: which guest pages are hot, what to send when, every byte on the wire, and the state
//! machines of both sides.
//!
//! Nothing in this crate opens a socket or a file, starts a thread, reads a clock or draws a random number. The live
//! engine and the simulator drive the same code.

pub mod engine;
pub mod pages;
pub mod plan;
pub mod predict;
pub mod wire;
