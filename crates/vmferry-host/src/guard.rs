//! A process that lets the guest go on if ours dies while the guest is paused.
//!
//! Between QEMU's stop and the hand-over the guest stands still and only we know why. If we are killed then, nobody
//! would ever continue it. So before anything is changed in QEMU a small process is started that holds the same
//! monitor connection and waits for the end of ours: then it cancels QEMU's migration, lets the guest go on and puts
//! the settings back. A guest that is slowed by control groups is given its time back. Right before the hand-over is sent it is told to leave: from then on nothing runs the guest here.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::channel::Channel;
use crate::qemu::{Settings, Source};
use crate::qmp::QmpClient;
use crate::throttle::Groups;
use crate::vmm::describe;

/// How long the guard tries to bring the guest back.
const RESUME_TIMEOUT: Duration = Duration::from_secs(30);

/// How to start the guard: a program that calls [`run_guard`] with its standard input.
#[derive(Debug, Clone)]
pub struct GuardProgram {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Charge {
    settings: Settings,
}

#[derive(Debug, Serialize, Deserialize)]
enum Word {
    Leave,
    /// The guest's threads are, or will be, in these control groups; or are not any more.
    Throttled(Option<Groups>),
}

/// A guard on duty.
#[derive(Debug)]
pub(crate) struct Guard {
    child: Child,
    channel: Channel,
}

impl Guard {
    /// Puts a guard on duty over a copy of the monitor connection.
    pub(crate) fn start(program: &GuardProgram, monitor: &OwnedFd, settings: &Settings) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(&program.program)
            .args(&program.arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // Not of the terminal's group: what ends us by a key must not end the guard.
            .process_group(0)
            .spawn()?;
        let mut channel = Channel::new(ours);
        channel.send(&Charge { settings: settings.clone() }, &[monitor.as_fd()])?;
        Ok(Self { child, channel })
    }

    /// Has the guard put the guest's threads back, too.
    pub(crate) fn throttled(&mut self, groups: &Groups) {
        self.say(&Word::Throttled(Some(groups.clone())));
    }

    /// The guest's threads are where they were.
    pub(crate) fn unthrottled(&mut self) {
        self.say(&Word::Throttled(None));
    }

    fn say(&mut self, word: &Word) {
        if let Err(error) = self.channel.send(word, &[]) {
            tracing::warn!(%error, "the guard has ended: nobody brings the guest back if we do, too");
        }
    }

    /// Tells the guard that the guest needs it no longer, and waits until it has gone. A guard that has died before is
    /// as good.
    pub(crate) fn leave(mut self) {
        if self.channel.send(&Word::Leave, &[]).is_err() {
            tracing::debug!("the guard had ended by itself");
        }
        // It ends at once: it was told, or it has ended before.
        let _ = self.child.wait();
    }
}

/// The guard's whole life, over its standard input. What it has to say goes to the log.
///
/// # Errors
/// If standard input is not what the migration gives its guard, or the guest could not be continued.
pub fn run_guard(stdin: OwnedFd) -> io::Result<()> {
    let mut channel = Channel::new(UnixStream::from(stdin));
    let Some((Charge { settings }, mut fds)) = channel.receive::<Charge>()? else { return Ok(()) };
    let monitor = fds.pop().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no monitor was passed"))?;
    let mut groups = None;
    loop {
        match channel.receive::<Word>() {
            Ok(Some((Word::Leave, _))) => return Ok(()),
            Ok(Some((Word::Throttled(now), _))) => groups = now,
            Ok(None) | Err(_) => break,
        }
    }
    tracing::warn!("vmferry has ended in the middle of a migration; letting the guest go on");
    let mut qmp = QmpClient::adopt(monitor).map_err(|error| io::Error::other(describe(&error)))?;
    let mut source = Source::new(&mut qmp);
    let resumed = source
        .cancel_and_resume(settings.was_running, RESUME_TIMEOUT)
        .and_then(|()| source.restore_settings(&settings))
        .map_err(|error| io::Error::other(describe(&error)));
    // Whatever became of the one, the other is tried.
    let lifted = groups.map_or(Ok(()), |groups| groups.undo()).map_err(|error| io::Error::other(describe(&error)));
    resumed.and(lifted)
}
