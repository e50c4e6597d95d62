//! The control socket: what runs is shown to other processes, and they may change it.
//!
//! A process that migrates serves one Unix stream socket (`server.rs`), which speaks JSON lines (`protocol.rs`); `client.rs`
//! is the other end. [`Controls`] lies between the server's thread and a migration's driver: the driver publishes how far
//! it is and takes commands whenever its turn comes; the server never waits for it, nor it for the server.
//!
//! The socket decides nothing and is not needed: where it cannot be made, a migration runs without.

mod client;
mod directory;
mod protocol;
mod server;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::EventfdFlags;
use vmferry_core::engine::AtTimeLimit;

pub use client::{Client, ClientError, Found, running};
pub use directory::{RUN_DIRECTORY_VARIABLE, run_directory};
pub use protocol::{
    Answer, Event, Limits, PROTOCOL_VERSION, Pages, Reason, Refusal, RefusalKind, Request, Role, SetRequest, Status,
};
pub use server::{ControlError, ControlServer};

/// The most commands that wait for the driver.
const COMMANDS_MAX: usize = 64;

/// What the user wants of the migration under way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Command {
    /// Other limits.
    Set(Change),
    /// An end. The [`Cancel`](crate::Cancel) is set too, so that no wait delays it.
    Cancel,
    /// No page sent for now.
    Hold,
    /// Pages sent again.
    Continue,
}

/// Limits to change; `None`: as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Change {
    pub(crate) bandwidth_bytes_per_s: Option<Option<u64>>,
    pub(crate) downtime_limit: Option<Duration>,
    pub(crate) time_limit: Option<Option<Duration>>,
    pub(crate) at_time_limit: Option<AtTimeLimit>,
}

/// Which command an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// What a driver and the server of its control socket share.
#[derive(Clone)]
pub struct Controls(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    to_driver: Wake,
    to_server: Wake,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// A driver takes commands.
    is_driven: bool,
    /// The server shall end.
    stop: bool,
    next_ticket: u64,
    commands: VecDeque<(Ticket, Command)>,
    answers: VecDeque<(Ticket, Result<(), Refusal>)>,
}

impl fmt::Debug for Controls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controls").finish_non_exhaustive()
    }
}

impl Controls {
    /// Nothing runs yet: this is what will be shown.
    fn new(status: Status) -> io::Result<Self> {
        let (commands, answers) = (VecDeque::new(), VecDeque::new());
        let state = State { status, is_driven: false, stop: false, next_ticket: 0, commands, answers };
        let (to_driver, to_server) = (Wake::new()?, Wake::new()?);
        Ok(Self(Arc::new(Shared { state: Mutex::new(state), to_driver, to_server })))
    }

    /// Shows this of a migration from now on.
    pub(crate) fn publish(&self, update: impl FnOnce(&mut Status)) {
        update(&mut self.state().status);
    }

    /// Says what goes on while there is no migration.
    pub fn show_doing(&self, doing: &str) {
        self.publish(|status| status.doing = doing.to_owned());
    }

    /// A driver takes commands from now on; of an earlier migration nothing is shown any more.
    pub(crate) fn begin(&self) {
        let mut state = self.state();
        state.is_driven = true;
        let Status { pid, role, guest, doing, .. } = state.status.clone();
        state.status = Status::new(pid, role, guest, doing);
    }

    /// The migration has ended, with this outcome if it counts: commands that still wait are refused.
    pub(crate) fn end(&self, outcome: Option<&str>) {
        let mut state = self.state();
        state.is_driven = false;
        state.status.outcome = outcome.map(ToOwned::to_owned);
        while let Some((ticket, _)) = state.commands.pop_front() {
            let refusal = Refusal::new(RefusalKind::TooLate, "too late for that: the migration has ended");
            state.answers.push_back((ticket, Err(refusal)));
        }
        drop(state);
        self.0.to_server.wake();
    }

    /// The commands given since the last call.
    pub(crate) fn take_commands(&self) -> VecDeque<(Ticket, Command)> {
        // Cleared first: a command that comes meanwhile wakes again.
        self.0.to_driver.clear();
        std::mem::take(&mut self.state().commands)
    }

    /// What became of a command.
    pub(crate) fn answer(&self, ticket: Ticket, result: Result<(), Refusal>) {
        self.state().answers.push_back((ticket, result));
        self.0.to_server.wake();
    }

    /// Readable while commands wait.
    pub(crate) fn waker(&self) -> BorrowedFd<'_> {
        self.0.to_driver.0.as_fd()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No holder of the lock panics half-way through a change.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Status {
        self.state().status.clone()
    }

    /// Gives the driver a command; an error if there is no driver, or it does not come to taking them.
    fn give(&self, command: Command) -> Result<Ticket, Refusal> {
        let mut state = self.state();
        if !state.is_driven {
            return Err(Refusal::new(RefusalKind::NothingRuns, "no migration is under way in that process just now"));
        }
        if state.commands.len() >= COMMANDS_MAX {
            return Err(Refusal::new(RefusalKind::Busy, "too many commands wait for the migration"));
        }
        let ticket = Ticket(state.next_ticket);
        state.next_ticket += 1;
        state.commands.push_back((ticket, command));
        drop(state);
        self.0.to_driver.wake();
        Ok(ticket)
    }

    fn take_answers(&self) -> VecDeque<(Ticket, Result<(), Refusal>)> {
        self.0.to_server.clear();
        std::mem::take(&mut self.state().answers)
    }

    fn stop(&self) {
        self.state().stop = true;
        self.0.to_server.wake();
    }

    fn is_stopped(&self) -> bool {
        self.state().stop
    }
}

/// Wakes a thread that polls it.
#[derive(Debug)]
struct Wake(OwnedFd);

impl Wake {
    fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    fn wake(&self) {
        // Full means that it is readable already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controls() -> Controls {
        Controls::new(Status::new(1, Role::Source, "test".into(), "starting".into())).unwrap()
    }

    fn is_awake(controls: &Controls) -> bool {
        crate::cancel::wait(&[(controls.waker(), rustix::event::PollFlags::IN)], Some(Duration::ZERO)).unwrap()[0]
    }

    #[test]
    fn commands_reach_a_driver_that_is_there() {
        let controls = controls();
        assert_eq!(controls.give(Command::Hold).unwrap_err().kind, RefusalKind::NothingRuns);
        controls.begin();
        assert!(!is_awake(&controls));
        let first = controls.give(Command::Hold).unwrap();
        let second = controls.give(Command::Continue).unwrap();
        assert!(is_awake(&controls));
        assert_eq!(controls.take_commands(), [(first, Command::Hold), (second, Command::Continue)]);
        assert!(!is_awake(&controls) && controls.take_commands().is_empty());
        controls.answer(first, Ok(()));
        assert_eq!(controls.take_answers(), [(first, Ok(()))]);
    }

    #[test]
    fn commands_that_nobody_takes_are_bounded_and_refused_at_the_end() {
        let controls = controls();
        controls.begin();
        for _ in 0..COMMANDS_MAX {
            controls.give(Command::Hold).unwrap();
        }
        assert_eq!(controls.give(Command::Hold).unwrap_err().kind, RefusalKind::Busy);
        controls.end(Some("cancelled"));
        let answers = controls.take_answers();
        assert_eq!(answers.len(), COMMANDS_MAX);
        let too_late = |answer: &Result<(), Refusal>| answer.as_ref().is_err_and(|it| it.kind == RefusalKind::TooLate);
        assert!(answers.iter().all(|(_, answer)| too_late(answer)));
        assert_eq!(controls.status().outcome.as_deref(), Some("cancelled"));
        controls.begin();
        assert_eq!(controls.status().outcome, None);
    }
}
