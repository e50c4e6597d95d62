//! A client of QEMU's monitor protocol (QMP) over a unix socket.
//!
//! It is blocking, single-threaded and bounded: every wait has a deadline, a message has at most
//! [`MAX_MESSAGE_BYTES`], at most [`MAX_QUEUED_EVENTS`] events are kept. It knows the protocol (greeting, capability
//! negotiation, commands, events, passing a descriptor) and nothing of what commands mean; that is [`crate::qemu`].
//!
//! Invariants:
//! - A reply is matched by its `id`. A reply that comes after its command has timed out is dropped, never taken for
//!   another command's.
//! - No byte from the peer panics. After an error that loses the message boundaries the client refuses further use.
//! - Command ids are unique among all clients of one process, so that a clone of the connection that another process
//!   goes on with ([`QmpClient::adopt`]) cannot mistake an old reply for its own.

mod client;
mod error;
mod message;

pub use client::{
    ADOPT_TIMEOUT, COMMAND_TIMEOUT, Event, GREETING_TIMEOUT, MAX_MESSAGE_BYTES, MAX_QUEUED_EVENTS, QmpClient,
};
pub use error::QmpError;
pub use message::{CommandError, GreetingVersion, VersionTriple};
