//! The Linux side of vmferry: everything that touches a process, a file, a socket or the clock.

pub mod qmp;
pub mod track;
