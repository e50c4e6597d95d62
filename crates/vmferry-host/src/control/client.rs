//! The asking end of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::directory::{pid_of, run_directory};
use super::protocol::{ANSWER_BYTES_MAX, Answer, Refusal, Request, Status};

/// How long an answer is waited for. The source does not take commands while it pauses the guest, or while the target takes
/// nothing from it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the status is waited for, which needs nobody but the server.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a process could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The directory of the sockets cannot be read.
    #[error("cannot look for running migrations")]
    Directory(#[source] io::Error),
    /// It cannot be connected to.
    #[error("cannot connect to process {pid}")]
    Connect {
        /// Which process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// It ended, or the connection did.
    #[error("process {pid} has ended, or closed the connection")]
    Closed {
        /// Which process.
        pid: u32,
    },
    /// It said nothing for too long.
    #[error("process {pid} did not answer for {seconds} s; what was asked for may still be done")]
    Silent {
        /// Which process.
        pid: u32,
        /// How long.
        seconds: u64,
    },
    /// It said something that is no answer.
    #[error("process {pid} did not answer as a vmferry would")]
    BadAnswer {
        /// Which process.
        pid: u32,
        /// What is wrong.
        source: io::Error,
    },
    /// It refused.
    #[error("{}", refusal.text)]
    Refused {
        /// Why.
        refusal: Refusal,
    },
}

/// A process that serves a control socket.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Where.
    pub path: PathBuf,
    /// What it said.
    pub status: Status,
}

/// All processes of this user that serve a control socket, by number. Sockets of processes that ended are removed.
///
/// # Errors
/// [`ClientError::Directory`]. A process that does not answer is left out.
pub fn running() -> Result<Vec<Found>, ClientError> {
    let directory = run_directory().map_err(ClientError::Directory)?;
    remove_stale(&directory).map_err(ClientError::Directory)?;
    let mut found = Vec::new();
    for path in sockets(&directory).map_err(ClientError::Directory)? {
        match Client::connect(&path).and_then(|mut client| client.ask(&Request::Show)) {
            Ok(status) => found.push(Found { path, status }),
            Err(error) => tracing::warn!(path = %path.display(), %error, "a control socket does not answer"),
        }
    }
    Ok(found)
}

/// A connection to a process that migrates.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    pid: u32,
}

impl Client {
    /// Connects to this socket.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let pid = pid_of(path).unwrap_or(0);
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect { pid, source })?;
        Ok(Self { stream: BufReader::new(stream), pid })
    }

    /// Asks, and waits for the answer; the status after the request was carried out.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask(&mut self, request: &Request) -> Result<Status, ClientError> {
        let timeout = match request {
            Request::Show | Request::Watch { .. } => STATUS_TIMEOUT,
            Request::Set(_) | Request::Cancel | Request::Pause | Request::Continue => ANSWER_TIMEOUT,
        };
        let mut line = serde_json::to_vec(request).expect("a request is JSON");
        line.push(b'\n');
        let stream = self.stream.get_ref();
        let sent = stream.set_write_timeout(Some(timeout)).and_then(|()| self.stream.get_mut().write_all(&line));
        sent.map_err(|error| self.describe(error, timeout))?;
        let answer = self.hear(timeout)?;
        match (answer.status, answer.error) {
            (Some(status), _) if answer.ok => Ok(status),
            (_, Some(refusal)) => Err(ClientError::Refused { refusal }),
            _ => Err(self.bad_answer("neither a status nor an error")),
        }
    }

    /// The next line of a watch.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn next_event(&mut self, interval: Duration) -> Result<Answer, ClientError> {
        self.hear(interval + STATUS_TIMEOUT)
    }

    fn hear(&mut self, timeout: Duration) -> Result<Answer, ClientError> {
        let mut line = Vec::new();
        self.stream.get_ref().set_read_timeout(Some(timeout)).map_err(|error| self.describe(error, timeout))?;
        let most = ANSWER_BYTES_MAX as u64 + 1;
        let read = Read::take(&mut self.stream, most).read_until(b'\n', &mut line);
        match read {
            Ok(0) => Err(ClientError::Closed { pid: self.pid }),
            Ok(_) if line.last() != Some(&b'\n') => Err(self.bad_answer("a line without an end")),
            Ok(_) => serde_json::from_slice(&line).map_err(|error| self.bad_answer(&error.to_string())),
            Err(error) => Err(self.describe(error, timeout)),
        }
    }

    fn bad_answer(&self, text: &str) -> ClientError {
        ClientError::BadAnswer { pid: self.pid, source: io::Error::new(io::ErrorKind::InvalidData, text) }
    }

    fn describe(&self, source: io::Error, timeout: Duration) -> ClientError {
        let pid = self.pid;
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                ClientError::Silent { pid, seconds: timeout.as_secs() }
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed { pid },
            _ => ClientError::BadAnswer { pid, source },
        }
    }
}

/// The control sockets in a directory, by process; none if there is no such directory.
fn sockets(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if pid_of(&path).is_some() {
            paths.push(path);
        }
    }
    paths.sort_by_key(|path| pid_of(path));
    Ok(paths)
}

/// Removes the sockets on which nobody listens any more. A socket gets its name when it is listened on, so it is none of
/// a process that just starts.
pub(super) fn remove_stale(directory: &Path) -> io::Result<()> {
    for path in sockets(directory)? {
        if let Err(error) = UnixStream::connect(&path)
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            tracing::debug!(path = %path.display(), "nobody serves this control socket any more");
            drop(std::fs::remove_file(&path));
        }
    }
    Ok(())
}
