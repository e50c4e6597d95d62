//! What can go wrong between us and a QMP server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::message::CommandError;

/// Why a QMP connection or command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// There is no socket at the path.
    #[error(
        "there is no QMP socket at {}: QEMU is not running, or has no `-qmp unix:{},server=on,wait=off`; check the path",
        path.display(),
        path.display()
    )]
    SocketMissing {
        /// The path given.
        path: PathBuf,
    },
    /// The socket file exists, but nobody listens.
    #[error(
        "nobody listens on {}: the QEMU that made the socket has ended, or it is not a stream socket; start the guest again",
        path.display()
    )]
    Refused {
        /// The path given.
        path: PathBuf,
    },
    /// We may not use the socket.
    #[error(
        "no permission to use the QMP socket {}: run as root or as the user that runs QEMU",
        path.display()
    )]
    PermissionDenied {
        /// The path given.
        path: PathBuf,
    },
    /// The connection failed in another way.
    #[error("cannot connect to the QMP socket {}", path.display())]
    Connect {
        /// The path given.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The server took the connection but does not greet: it serves another client.
    #[error(
        "QMP is busy: no greeting from {} within {waited_ms} ms. A QMP socket serves one client at a time and another \
         one is connected; add a second -qmp socket to QEMU, or disconnect libvirt or whichever tool holds this one",
        path.display()
    )]
    Busy {
        /// The path given.
        path: PathBuf,
        /// How long we waited.
        waited_ms: u128,
    },
    /// What the server says first is not a QMP greeting.
    #[error(
        "the other end does not speak QMP, it begins with `{start}`: name the -qmp socket, not -monitor or -serial"
    )]
    NotQmp {
        /// The first bytes, cut and escaped.
        start: String,
    },
    /// A message is not JSON, or not a QMP message.
    #[error("QEMU sent a malformed QMP message, `{start}`: {why}")]
    Malformed {
        /// The first bytes of the line, cut and escaped.
        start: String,
        /// What is wrong with it.
        why: String,
    },
    /// A message is longer than allowed.
    #[error("QEMU sent a QMP message longer than {limit_bytes} bytes; the connection cannot be used any more")]
    MessageTooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// QEMU could not parse what we sent.
    #[error("QEMU could not parse the command `{command}`: {desc}")]
    Unparsed {
        /// The command we waited for.
        command: String,
        /// QEMU's words.
        desc: String,
    },
    /// QEMU refused or failed the command.
    #[error("QEMU refuses `{command}`: {error}")]
    Command {
        /// The command.
        command: String,
        /// QEMU's error; part of this message, not a source.
        error: CommandError,
    },
    /// The connection ended.
    #[error("QEMU closed the QMP connection during {during}: the process has ended or was killed; see its log")]
    Closed {
        /// What we were doing.
        during: String,
    },
    /// No answer came in time.
    #[error("no answer to {waiting_for} within {waited_ms} ms: QEMU's main loop is stuck, or the host is overloaded")]
    Timeout {
        /// What we waited for.
        waiting_for: String,
        /// How long.
        waited_ms: u128,
    },
    /// The socket failed.
    #[error("the QMP socket failed during {during}")]
    Io {
        /// What we were doing.
        during: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An earlier error lost the boundaries between messages.
    #[error("this QMP connection broke earlier ({why}); connect again")]
    Broken {
        /// The earlier error.
        why: String,
    },
}

impl QmpError {
    /// Whether QEMU does not know the command, as opposed to refusing it.
    pub fn is_command_not_found(&self) -> bool {
        matches!(self, Self::Command { error, .. } if error.class == "CommandNotFound")
    }

    /// Whether the connection is of no further use.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::MessageTooLong { .. } | Self::Broken { .. } | Self::Io { .. })
    }

    pub(super) fn timeout(waiting_for: &str, waited: Duration) -> Self {
        Self::Timeout { waiting_for: waiting_for.to_owned(), waited_ms: waited.as_millis() }
    }
}
