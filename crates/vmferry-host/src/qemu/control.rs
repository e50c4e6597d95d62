//! The steps of QEMU's own migration, which carries the device state while guest RAM travels beside it.
//!
//! Descriptors that are passed to QEMU are sockets: QEMU ends a cancelled migration with a shutdown of the channel,
//! which a pipe does not have. QEMU gets a copy; the caller closes its own, or it never sees the end of the stream.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::facts::{self, Facts};
use super::guest::QemuError;
use crate::qmp::{Event, QmpClient, QmpError, VersionTriple};

/// The bandwidth limit given to QEMU: none. The link is governed elsewhere, and QEMU's limit does not hold for its
/// stop phase.
pub const UNLIMITED_BANDWIDTH_BYTES_PER_S: u64 = 1 << 50;
/// The downtime limit given to QEMU, its maximum: QEMU has next to nothing to send and shall go to the switch-over at
/// once; the real limit is ours.
pub const UNLIMITED_DOWNTIME_MS: u64 = 2_000_000;

/// How often QEMU is asked while no event comes.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How often a step that QEMU refuses for the moment is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(2);
/// How long it is before the first of those attempts for which the guest stands still; then twice as long each time.
const FIRST_RETRY_INTERVAL: Duration = Duration::from_micros(125);
/// The name under which QEMU gets our descriptor.
const FD_NAME: &str = "vmferry";
/// Since this version a failed incoming migration need not end QEMU.
const KEEPS_FAILED_TARGET_SINCE: (u32, u32) = (9, 1);

/// Capabilities that are turned off: they send RAM in ways that make no sense here, need a channel in both directions,
/// or change when and where the guest stops.
const CAPABILITIES_OFF: [&str; 17] = [
    "auto-converge",
    "background-snapshot",
    "block",
    "compress",
    "dirty-limit",
    "mapped-ram",
    "multifd",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "return-path",
    "switchover-ack",
    "x-colo",
    "xbzrle",
    "zero-copy-send",
];
const SOURCE_CAPABILITIES_ON: [&str; 3] = ["events", "pause-before-switchover", "x-ignore-shared"];
/// `pause-before-switchover` concerns the source alone. `late-block-activate` leaves the locks of disk images to the
/// source until `cont`.
const TARGET_CAPABILITIES_ON: [&str; 3] = ["events", "late-block-activate", "x-ignore-shared"];
/// Parameters that are changed, and so saved.
const PARAMETERS: [&str; 4] = ["downtime-limit", "max-bandwidth", "mode", "tls-creds"];

/// Why a step of QEMU's migration failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The monitor failed, or QEMU refused the command.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// An answer of QEMU has not the form it should have.
    #[error(transparent)]
    Qemu(QemuError),
    /// QEMU's migration ended without success.
    #[error("QEMU's migration is `{status}` while it should become `{wanted}`: {reason}")]
    Ended {
        /// What it became.
        status: MigrationStatus,
        /// What was waited for.
        wanted: MigrationStatus,
        /// QEMU's reason.
        reason: String,
    },
    /// A step took too long.
    #[error("QEMU did not reach {wanted} within {waited_ms} ms; it is still at {at}")]
    Timeout {
        /// What was waited for.
        wanted: String,
        /// Where it is.
        at: String,
        /// How long we waited.
        waited_ms: u128,
    },
    /// The guest is in no state for this step.
    #[error("the guest is `{run_state}`, not `{wanted}`: {change}")]
    RunState {
        /// What it is.
        run_state: String,
        /// What it should be.
        wanted: &'static str,
        /// What to do.
        change: &'static str,
    },
    /// QEMU lacks a capability.
    #[error("this QEMU has no migration capability `{capability}`: use QEMU 5.0 or later")]
    CapabilityMissing {
        /// Which.
        capability: &'static str,
    },
    /// The descriptor for QEMU is no stream socket.
    #[error(
        "the channel for QEMU's migration must be a stream socket, or QEMU could not end a migration that is stuck"
    )]
    NotASocket,
    /// The target's QEMU ended while it loaded the device state.
    #[error(
        "the target's QEMU ended while it loaded the device state: source and target differ (machine type, devices, \
         QEMU version), or the stream was cut; see its log"
    )]
    TargetDied {
        /// What the monitor saw.
        #[source]
        source: QmpError,
    },
    /// The target's QEMU started the guest by itself, before the hand-over.
    #[error("the target's QEMU has started the guest by itself; the source must not run any more")]
    StartedByItself,
    /// A post-copy migration cannot be taken back.
    #[error("QEMU's migration is at `{status}`: it cannot be taken back any more")]
    PointOfNoReturn {
        /// Where it is.
        status: MigrationStatus,
    },
}

impl From<QemuError> for ControlError {
    fn from(error: QemuError) -> Self {
        match error {
            QemuError::Qmp(error) => Self::Qmp(error),
            other => Self::Qemu(other),
        }
    }
}

/// The status of a QEMU's migration, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationStatus {
    /// There was none yet.
    None,
    /// It connects, or allocates.
    Setup,
    /// It sends while the guest runs.
    Active,
    /// The guest's CPUs are stopped, and QEMU waits for our word.
    PreSwitchover,
    /// The device state is being sent.
    Device,
    /// All was sent or loaded.
    Completed,
    /// It failed.
    Failed,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled.
    Cancelled,
    /// Any of QEMU's post-copy states.
    Postcopy(String),
    /// A status that we do not use.
    Other(String),
}

impl MigrationStatus {
    fn new(word: &str) -> Self {
        match word {
            "none" => Self::None,
            "setup" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            postcopy if postcopy.starts_with("postcopy") => Self::Postcopy(postcopy.to_owned()),
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether no migration is under way.
    fn is_settled(&self) -> bool {
        match self {
            Self::None | Self::Completed | Self::Failed | Self::Cancelled => true,
            Self::Setup
            | Self::Active
            | Self::PreSwitchover
            | Self::Device
            | Self::Cancelling
            | Self::Postcopy(_)
            | Self::Other(_) => false,
        }
    }
}

impl std::fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Postcopy(word) | Self::Other(word) => word,
        })
    }
}

/// What a QEMU was set to before we changed it. It can be written down, so that another process can put it back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// All migration capabilities.
    pub capabilities: BTreeMap<String, bool>,
    /// The migration parameters that we change.
    pub parameters: BTreeMap<String, Value>,
    /// Whether the guest ran.
    pub was_running: bool,
}

/// A guest whose CPUs are stopped at the switch-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paused {
    /// When the CPUs stopped; `None` if the guest was paused all along.
    pub stopped_at: Option<Instant>,
    /// When we knew.
    pub seen_at: Instant,
}

/// The source's side of QEMU's migration.
#[derive(Debug)]
pub struct Source<'a> {
    qmp: &'a mut QmpClient,
}

impl<'a> Source<'a> {
    /// Over this monitor.
    pub fn new(qmp: &'a mut QmpClient) -> Self {
        Self { qmp }
    }

    /// What QEMU is set to now.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn save_settings(&mut self) -> Result<Settings, ControlError> {
        save_settings(self.qmp)
    }

    /// The same, right after all else was asked for.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn save_settings_beside(&mut self, facts: &Facts) -> Result<Settings, ControlError> {
        settings_beside(self.qmp, facts.capabilities.clone(), &facts.run_state)
    }

    /// Puts the settings back. Not possible while a migration is active. What is as it was is not touched.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn restore_settings(&mut self, settings: &Settings) -> Result<(), ControlError> {
        restore_settings(self.qmp, settings)
    }

    /// Sets QEMU so that it leaves out shared RAM, stops before the switch-over, and sends the rest at once.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn configure(&mut self) -> Result<(), ControlError> {
        let parameters = json!({
            "max-bandwidth": UNLIMITED_BANDWIDTH_BYTES_PER_S,
            "downtime-limit": UNLIMITED_DOWNTIME_MS,
            "mode": "normal",
            "tls-creds": "",
        });
        configure(self.qmp, &SOURCE_CAPABILITIES_ON, parameters)
    }

    /// Waits until all requests to the guest's disks have ended that had begun before. QEMU does nothing else meanwhile, and
    /// limits on the guest's input and output are lifted for that moment.
    ///
    /// # Errors
    /// [`ControlError`], also where a disk does not answer in time.
    pub fn wait_for_requests(&mut self) -> Result<(), ControlError> {
        // There is nothing to do in it; QEMU lets requests end before it looks.
        self.qmp.execute_with("transaction", json!({ "actions": [] }))?;
        Ok(())
    }

    /// Starts QEMU's migration into a copy of the socket `fd`. Paused afterwards within some milliseconds: call
    /// [`Source::wait_pre_switchover`], and read the socket's other end meanwhile. Forgets queued events.
    ///
    /// # Errors
    /// [`ControlError`]; then no migration has begun.
    pub fn start_migration(&mut self, fd: BorrowedFd<'_>) -> Result<(), ControlError> {
        pass_socket(self.qmp, fd)?;
        self.qmp.discard_events();
        let started = self.qmp.execute_with("migrate", json!({ "uri": format!("fd:{FD_NAME}") }));
        take_back_fd_on_error(self.qmp, started)?;
        Ok(())
    }

    /// Waits until the guest's CPUs are stopped and QEMU waits for [`Source::continue_switchover`].
    ///
    /// # Errors
    /// [`ControlError`]. The guest may be stopped: [`Source::cancel_and_resume`].
    pub fn wait_pre_switchover(&mut self, timeout: Duration) -> Result<Paused, ControlError> {
        let mut stopped_at = None;
        wait_status(self.qmp, &MigrationStatus::PreSwitchover, timeout, |event| match event.name.as_str() {
            "STOP" => stopped_at = Some(event.happened_at),
            "RESUME" => stopped_at = None,
            _ => {}
        })?;
        Ok(Paused { stopped_at, seen_at: Instant::now() })
    }

    /// Lets QEMU save and send the device state. Saving it can write guest memory.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn continue_switchover(&mut self) -> Result<(), ControlError> {
        self.qmp.execute_with("migrate-continue", json!({ "state": "pre-switchover" }))?;
        Ok(())
    }

    /// Waits until QEMU has sent the device state. The guest stays stopped.
    ///
    /// # Errors
    /// [`ControlError`]. Where QEMU's migration failed, the guest **runs again by itself**.
    pub fn wait_completed(&mut self, timeout: Duration) -> Result<(), ControlError> {
        wait_status(self.qmp, &MigrationStatus::Completed, timeout, |_| {})
    }

    /// Takes the migration back, in whatever state it is, and lets the guest go on if it ran before; a second call
    /// changes nothing. At least one attempt is made; `timeout` ends further ones. Must not be called once the hand-over is committed: it would make the guest run twice.
    ///
    /// A guest that was paused before stays stopped; its run state is then `postmigrate` where QEMU sets that (always
    /// after a completed migration; QEMU 7.2 after a cancelled one, too, 10.0 not), and only `cont` leads out of it. We
    /// do not give `cont` and `stop`, for the guest would run in between.
    ///
    /// # Errors
    /// [`ControlError`]; the guest may still be stopped. Try again, or give `cont` by hand.
    pub fn cancel_and_resume(&mut self, was_running: bool, timeout: Duration) -> Result<(), ControlError> {
        let deadline = Deadline::new(timeout);
        self.cancel(&deadline)?;
        if !was_running {
            return Ok(());
        }
        loop {
            let run_state = facts::run_state(self.qmp)?;
            if run_state == "running" {
                return Ok(());
            }
            // Refused with "Migration is not finalized yet" until the migration thread has ended; after a cancel QEMU
            // resumes the guest itself, and then `cont` changes nothing.
            let refused = match self.qmp.execute("cont") {
                Ok(_) => None,
                Err(error @ QmpError::Command { .. }) => Some(error),
                Err(error) => return Err(error.into()),
            };
            deadline.check("a running guest", || refused.map_or(run_state, |error| format!("{error}")))?;
            std::thread::sleep(RETRY_INTERVAL);
        }
    }

    /// Cancels until no migration is under way.
    fn cancel(&mut self, deadline: &Deadline) -> Result<(), ControlError> {
        loop {
            let (status, _) = migration(self.qmp)?;
            if status.is_settled() {
                return Ok(());
            }
            if let MigrationStatus::Postcopy(_) = status {
                return Err(ControlError::PointOfNoReturn { status });
            }
            if status != MigrationStatus::Cancelling {
                match self.qmp.execute("migrate_cancel") {
                    // It may have ended in this very moment.
                    Ok(_) | Err(QmpError::Command { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            deadline.check("the end of its migration", || status.to_string())?;
            self.qmp.wait_event(RETRY_INTERVAL)?;
        }
    }

    /// Ends QEMU. Without the process at hand this waits for the end of the monitor connection, which comes shortly
    /// before the end of the process; [`super::QemuGuest::quit`] waits for that.
    ///
    /// # Errors
    /// [`ControlError`]; a QEMU that has ended already is none.
    pub fn quit(&mut self, timeout: Duration) -> Result<(), ControlError> {
        quit(self.qmp, None, timeout)
    }
}

/// The target's side of QEMU's migration.
#[derive(Debug)]
pub struct Target<'a> {
    qmp: &'a mut QmpClient,
}

impl<'a> Target<'a> {
    /// Over this monitor.
    pub fn new(qmp: &'a mut QmpClient) -> Self {
        Self { qmp }
    }

    /// What QEMU is set to now.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn save_settings(&mut self) -> Result<Settings, ControlError> {
        save_settings(self.qmp)
    }

    /// Puts the settings back, once the guest runs.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn restore_settings(&mut self, settings: &Settings) -> Result<(), ControlError> {
        restore_settings(self.qmp, settings)
    }

    /// Makes a QEMU that was started with `-incoming defer` ready, and sees to it that it never starts the guest by
    /// itself: that is ours to do, at the hand-over. Nor does it announce the guest on the network before: what QEMU
    /// has to say when it has loaded the device state it holds back while the guest is paused.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn prepare(&mut self) -> Result<(), ControlError> {
        self.check_waiting()?;
        // While it waits for a guest, `stop` only takes back the automatic start.
        self.qmp.execute("stop")?;
        self.check_waiting()?;
        let parameters = json!({ "mode": "normal", "tls-creds": "" });
        configure(self.qmp, &TARGET_CAPABILITIES_ON, parameters)
    }

    fn check_waiting(&mut self) -> Result<(), ControlError> {
        let run_state = facts::run_state(self.qmp)?;
        if run_state == "inmigrate" {
            return Ok(());
        }
        Err(ControlError::RunState {
            run_state,
            wanted: "inmigrate",
            change: "start the target's QEMU as the source's, with -incoming defer",
        })
    }

    /// Lets QEMU read its migration stream from a copy of the socket `fd`. To be called before the source is paused:
    /// QEMU waits for the stream and loads it as it comes.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn accept_migration(&mut self, fd: BorrowedFd<'_>) -> Result<(), ControlError> {
        let (VersionTriple { major, minor, .. }, _) = facts::version(self.qmp)?;
        pass_socket(self.qmp, fd)?;
        self.qmp.discard_events();
        let mut arguments = json!({ "uri": format!("fd:{FD_NAME}") });
        if (major, minor) >= KEEPS_FAILED_TARGET_SINCE {
            // Then a failure leaves a QEMU that can say why.
            arguments["exit-on-error"] = false.into();
        }
        let accepted = self.qmp.execute_with("migrate-incoming", arguments);
        take_back_fd_on_error(self.qmp, accepted)?;
        Ok(())
    }

    /// Waits until the device state is loaded. The guest is paused then.
    ///
    /// # Errors
    /// [`ControlError`]; this QEMU is of no further use.
    pub fn wait_loaded(&mut self, timeout: Duration) -> Result<(), ControlError> {
        let deadline = Deadline::new(timeout);
        let loaded = wait_status(self.qmp, &MigrationStatus::Completed, timeout, |_| {});
        loaded.map_err(|error| match error {
            ControlError::Qmp(source) if source.is_fatal() => ControlError::TargetDied { source },
            other => other,
        })?;
        let mut interval = FIRST_RETRY_INTERVAL;
        loop {
            let run_state = facts::run_state(self.qmp)?;
            match run_state.as_str() {
                "paused" => return Ok(()),
                "running" => return Err(ControlError::StartedByItself),
                "inmigrate" => {}
                _ => {
                    let change = "the source's guest was in a state that cannot go on; see the source's QEMU";
                    return Err(ControlError::RunState { run_state, wanted: "paused", change });
                }
            }
            deadline.check("a paused guest", || run_state)?;
            // The guest stands still meanwhile, and the state follows within a millisecond or two on an idle host.
            std::thread::sleep(interval);
            interval = (interval * 2).min(RETRY_INTERVAL);
        }
    }

    /// Starts the guest: the hand-over. Takes the locks of disk images. Returns when the guest went on, which is some
    /// milliseconds before QEMU's answer on a busy host.
    ///
    /// # Errors
    /// [`ControlError`]; the guest may run or not, ask for its run state.
    pub fn cont(&mut self) -> Result<Instant, ControlError> {
        self.qmp.discard_events();
        self.qmp.execute("cont")?;
        let answered_at = Instant::now();
        // QEMU reports it before it answers; nothing to wait for.
        while let Some(event) = self.qmp.wait_event(Duration::ZERO)? {
            if event.name == "RESUME" {
                return Ok(event.happened_at);
            }
        }
        Ok(answered_at)
    }

    /// Tells the network once more where the guest is now, five times, 50 to 550 ms apart; the first announcement went
    /// out with `cont`. Returns at once.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn announce_self(&mut self) -> Result<(), ControlError> {
        self.qmp.execute_with("announce-self", json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 }))?;
        Ok(())
    }

    /// Ends QEMU; see [`Source::quit`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn quit(&mut self, timeout: Duration) -> Result<(), ControlError> {
        quit(self.qmp, None, timeout)
    }
}

/// Ends QEMU and waits for the end of its process, or of the connection where the process is not at hand.
pub(super) fn quit(
    qmp: &mut QmpClient,
    process: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<(), ControlError> {
    let deadline = Deadline::new(timeout);
    match qmp.execute_within("quit", Value::Null, timeout) {
        Ok(_) => {}
        Err(error) if error.is_fatal() => {}
        Err(error) => return Err(error.into()),
    }
    let Some(process) = process else {
        loop {
            match qmp.wait_event(deadline.left()) {
                Ok(Some(_)) => {}
                Ok(None) => deadline.check("its end", || "running its last steps".to_owned())?,
                Err(_) => return Ok(()),
            }
        }
    };
    loop {
        let left = deadline.left();
        let timespec = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timespec)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {
                deadline.check("its end", || "running its last steps".to_owned())?;
            }
            Ok(_) => return Ok(()),
            Err(errno) => {
                let during = "waiting for the end of QEMU".to_owned();
                return Err(QmpError::Io { during, source: errno.into() }.into());
            }
        }
    }
}

/// A moment by which a step must be done.
struct Deadline {
    start: Instant,
    timeout: Duration,
}

impl Deadline {
    fn new(timeout: Duration) -> Self {
        Self { start: Instant::now(), timeout }
    }

    fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.start.elapsed())
    }

    fn check(&self, wanted: &str, at: impl FnOnce() -> String) -> Result<(), ControlError> {
        if !self.left().is_zero() {
            return Ok(());
        }
        Err(ControlError::Timeout { wanted: wanted.to_owned(), at: at(), waited_ms: self.timeout.as_millis() })
    }
}

/// The status and QEMU's reason for a failure.
fn migration(qmp: &mut QmpClient) -> Result<(MigrationStatus, Option<String>), ControlError> {
    let answer = qmp.execute("query-migrate")?;
    let status = answer.get("status").and_then(Value::as_str).map_or(MigrationStatus::None, MigrationStatus::new);
    let reason = answer.get("error-desc").and_then(Value::as_str).map(str::to_owned);
    Ok((status, reason))
}

/// Waits for a status: by events, and by asking where they do not come. `on_event` sees all events until then.
fn wait_status(
    qmp: &mut QmpClient,
    wanted: &MigrationStatus,
    timeout: Duration,
    mut on_event: impl FnMut(&Event),
) -> Result<(), ControlError> {
    let deadline = Deadline::new(timeout);
    loop {
        let status = match qmp.wait_event(POLL_INTERVAL.min(deadline.left()))? {
            Some(event) => {
                on_event(&event);
                event_status(&event)
            }
            None => {
                let status = migration(qmp)?.0;
                // QEMU reports the stop before the status that follows from it.
                while let Some(event) = qmp.wait_event(Duration::ZERO)? {
                    on_event(&event);
                }
                Some(status)
            }
        };
        let Some(status) = status else { continue };
        if status == *wanted {
            return Ok(());
        }
        let in_the_end = match status {
            MigrationStatus::Failed | MigrationStatus::Cancelled | MigrationStatus::Completed => true,
            MigrationStatus::None
            | MigrationStatus::Setup
            | MigrationStatus::Active
            | MigrationStatus::PreSwitchover
            | MigrationStatus::Device
            | MigrationStatus::Cancelling
            | MigrationStatus::Postcopy(_)
            | MigrationStatus::Other(_) => false,
        };
        if in_the_end {
            let reason = migration(qmp)?.1.unwrap_or_else(|| "QEMU gives no reason; see its log".to_owned());
            return Err(ControlError::Ended { status, wanted: wanted.clone(), reason });
        }
        deadline.check(&format!("the migration status `{wanted}`"), || format!("`{status}`"))?;
    }
}

fn event_status(event: &Event) -> Option<MigrationStatus> {
    (event.name == "MIGRATION").then(|| event.data.get("status")?.as_str().map(MigrationStatus::new))?
}

/// Only a socket can be shut down, and only a stream is one.
fn pass_socket(qmp: &mut QmpClient, fd: BorrowedFd<'_>) -> Result<(), ControlError> {
    if rustix::net::sockopt::socket_type(fd) != Ok(rustix::net::SocketType::STREAM) {
        return Err(ControlError::NotASocket);
    }
    Ok(qmp.pass_fd(FD_NAME, fd)?)
}

/// A command that failed has not used the descriptor; QEMU shall not keep it open.
fn take_back_fd_on_error(qmp: &mut QmpClient, result: Result<Value, QmpError>) -> Result<Value, QmpError> {
    if matches!(result, Err(QmpError::Command { .. }))
        && let Err(error) = qmp.execute_with("closefd", json!({ "fdname": FD_NAME }))
    {
        tracing::debug!(%error, "could not take back the descriptor");
    }
    result
}

fn save_settings(qmp: &mut QmpClient) -> Result<Settings, ControlError> {
    let capabilities = facts::capabilities(qmp)?;
    let run_state = facts::run_state(qmp)?;
    settings_beside(qmp, capabilities, &run_state)
}

fn settings_beside(
    qmp: &mut QmpClient,
    capabilities: BTreeMap<String, bool>,
    run_state: &str,
) -> Result<Settings, ControlError> {
    Ok(Settings { capabilities, parameters: parameters(qmp)?, was_running: run_state == "running" })
}

fn parameters(qmp: &mut QmpClient) -> Result<BTreeMap<String, Value>, ControlError> {
    let Value::Object(mut all) = qmp.execute("query-migrate-parameters")? else {
        return Err(QemuError::unexpected("query-migrate-parameters", "it is no object").into());
    };
    Ok(PARAMETERS.into_iter().filter_map(|name| Some((name.to_owned(), all.remove(name)?))).collect())
}

fn restore_settings(qmp: &mut QmpClient, settings: &Settings) -> Result<(), ControlError> {
    let saved = settings.capabilities.iter().map(|(name, &state)| (name.as_str(), state));
    set_capabilities(qmp, saved.collect())?;
    set_parameters(qmp, settings.parameters.clone().into_iter().collect())
}

fn configure(qmp: &mut QmpClient, on: &[&'static str], parameters: Value) -> Result<(), ControlError> {
    let known = facts::capabilities(qmp)?;
    if let Some(capability) = on.iter().copied().find(|&name| !known.contains_key(name)) {
        return Err(ControlError::CapabilityMissing { capability });
    }
    let on = on.iter().map(|&name| (name, true));
    set_capabilities(qmp, CAPABILITIES_OFF.into_iter().map(|name| (name, false)).chain(on).collect())?;
    let Value::Object(parameters) = parameters else { unreachable!("the parameters are a literal object") };
    set_parameters(qmp, parameters)
}

/// Sets what differs, in one command: QEMU checks the whole set. Capabilities this QEMU does not know are left out.
fn set_capabilities(qmp: &mut QmpClient, wanted: BTreeMap<&str, bool>) -> Result<(), ControlError> {
    let present = facts::capabilities(qmp)?;
    let differs = |&(name, state): &(&str, bool)| present.get(name).is_some_and(|&present| present != state);
    let changes: Vec<Value> =
        wanted.into_iter().filter(differs).map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    if !changes.is_empty() {
        qmp.execute_with("migrate-set-capabilities", json!({ "capabilities": changes }))?;
    }
    Ok(())
}

/// Sets what differs; parameters this QEMU does not know are left out.
fn set_parameters(qmp: &mut QmpClient, wanted: Map<String, Value>) -> Result<(), ControlError> {
    let present = parameters(qmp)?;
    let differs = |(name, value): &(String, Value)| present.get(name).is_some_and(|present| present != value);
    let changes: Map<String, Value> = wanted.into_iter().filter(differs).collect();
    if !changes.is_empty() {
        qmp.execute_with("migrate-set-parameters", Value::Object(changes))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_keep_qemus_words() {
        for word in [
            "none",
            "setup",
            "active",
            "pre-switchover",
            "device",
            "completed",
            "failed",
            "cancelling",
            "cancelled",
            "postcopy-active",
            "wait-unplug",
        ] {
            assert_eq!(MigrationStatus::new(word).to_string(), word);
        }
        assert!(MigrationStatus::new("none").is_settled());
        assert!(!MigrationStatus::new("wait-unplug").is_settled());
    }

    #[test]
    fn no_capability_is_both_on_and_off() {
        for name in SOURCE_CAPABILITIES_ON.iter().chain(&TARGET_CAPABILITIES_ON) {
            assert!(!CAPABILITIES_OFF.contains(name), "{name}");
        }
    }
}
