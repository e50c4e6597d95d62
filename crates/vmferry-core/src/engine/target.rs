//! The target's state machine: check everything that arrives, load, and run the guest only after the hand-over.
//!
//! Contract of the driver: for each message call [`Target::handle_message`], carry out the [`Apply`] it returns, then
//! call [`Target::handle_applied`]; carry out actions and report their end with the `handle_*` named there.

use std::collections::VecDeque;
use std::time::Duration;

use crate::pages::{PageRun, RamLayout};
use crate::wire::{
    Abort, Encodings, Fault, Hello, MAX_DEVICE_STATE_BYTES, MAX_STREAMS, Message, MigrationId, Pages, Prepared,
    VERSION_MAX, VERSION_MIN, Welcome,
};

use super::side::{SideStream, check_inside, check_runs};

/// What the target has to offer.
#[derive(Debug, Clone)]
pub struct TargetConfig {
    /// The guest's RAM as the target's VMM has it.
    pub layout: RamLayout,
    /// The VMM's machine type.
    pub machine: String,
    /// The guest's processors.
    pub vcpus: u32,
    /// How long the source may be silent.
    pub stall_timeout: Duration,
    /// The encodings of pages that the driver can read.
    pub encodings: Encodings,
    /// The most connections that the driver can take in; 1 to [`MAX_STREAMS`].
    pub streams: u16,
}

/// Why the target does not run the guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// No common protocol version.
    #[error(
        "the source speaks protocol versions {min} to {max}, this build {VERSION_MIN} to {VERSION_MAX}: \
         use the same vmferry on both sides"
    )]
    Version {
        /// The source's oldest.
        min: u16,
        /// The source's newest.
        max: u16,
    },
    /// The target's VMM was started differently.
    #[error(
        "the guests differ: {what} is {source_has} on the source and {target_has} on the target; start the target's VMM with the source's configuration"
    )]
    Differs {
        /// What differs.
        what: &'static str,
        /// The source's.
        source_has: String,
        /// The target's.
        target_has: String,
    },
    /// A message that has no place here.
    #[error("the source sent `{message}` while {doing}, which the protocol does not allow")]
    Unexpected {
        /// The message's name.
        message: &'static str,
        /// What was going on.
        doing: &'static str,
    },
    /// Pages outside guest RAM.
    #[error("the source sent {run:?}, which reaches outside the guest's {pages} pages")]
    OutsideRam {
        /// The pages.
        run: PageRun,
        /// The guest's.
        pages: u64,
    },
    /// Pages in an encoding that was not agreed on.
    #[error("the source sent pages in encoding {code}, which was not agreed on")]
    Encoding {
        /// Its number.
        code: u32,
    },
    /// Pages on another connection than theirs.
    #[error("the source sent {run:?} on connection {stream}, which is not theirs")]
    WrongStream {
        /// The pages.
        run: PageRun,
        /// The connection's number.
        stream: u16,
    },
    /// More device state than allowed, or not as much as announced.
    #[error("{received} bytes of device state arrived, {expected} were expected")]
    DeviceState {
        /// What arrived.
        received: u64,
        /// What was announced, or the limit.
        expected: u64,
    },
    /// A hand-over of another migration.
    #[error("the hand-over names another migration")]
    WrongMigration,
    /// The source ended the migration.
    #[error("the source ended the migration: {text}")]
    Aborted {
        /// Its words.
        text: String,
    },
    /// The connection ended.
    #[error("the connection to the source was lost while {doing}")]
    ConnectionLost {
        /// What was going on.
        doing: &'static str,
    },
    /// The source said nothing for too long.
    #[error("the source was silent for {ms} ms while {doing}")]
    Stalled {
        /// How long.
        ms: u64,
        /// What was going on.
        doing: &'static str,
    },
    /// The user asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The driver could not carry out what was asked.
    #[error("{text}")]
    Driver {
        /// What failed and why.
        text: String,
    },
}

/// What the driver shall do with the message just handled. All ranges are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apply {
    /// Nothing.
    Nothing,
    /// Write the message's pages there, whose data are in an encoding that was agreed on and still to be decoded.
    WritePages,
    /// Make the message's runs read as zero.
    ZeroPages,
    /// Keep the message's piece of device state.
    KeepDeviceState,
    /// Compare the message's digests with the pages in memory.
    Compare(PageRun),
}

/// What the driver shall do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetAction {
    /// Send this message.
    Send(Message<'static>),
    /// Have the VMM load the device state kept, the guest staying paused; then call [`Target::handle_loaded`].
    Load,
    /// Run the guest; then call [`Target::handle_running`].
    Run,
    /// The migration has ended: see [`Target::outcome`].
    End,
}

/// How the migration ended on the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetOutcome {
    /// The guest runs here.
    Running,
    /// The guest does not run here.
    Failed {
        /// Why.
        error: TargetError,
        /// The guest was handed over all the same: nobody runs it now.
        handed_over: bool,
        /// The VMM took in device state and is of no use for another attempt.
        loaded: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    AwaitHello,
    Receiving,
    Loading,
    Prepared,
    Resuming { since: Duration },
    Ended(TargetOutcome),
}

/// The target side of one migration.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    state: State,
    outbox: VecDeque<Message<'static>>,
    acting: bool,
    migration: Option<MigrationId>,
    verify: bool,
    encodings: Encodings,
    paused: bool,
    streams: u16,
    /// How many bytes must be in place that were sent on further connections, once that was said.
    fence: Option<u64>,
    side_bytes: u64,
    heard: Duration,
    received_bytes: u64,
    device_state_bytes: u64,
    verified_pages: u64,
    mismatched_pages: u64,
    first_mismatch: Option<u64>,
    load_began: Duration,
}

impl Target {
    /// A target that waits for a source.
    pub fn new(config: TargetConfig) -> Self {
        Self {
            config,
            state: State::AwaitHello,
            outbox: VecDeque::new(),
            acting: false,
            migration: None,
            verify: false,
            encodings: Encodings::RAW,
            paused: false,
            streams: 1,
            fence: None,
            side_bytes: 0,
            heard: Duration::ZERO,
            received_bytes: 0,
            device_state_bytes: 0,
            verified_pages: 0,
            mismatched_pages: 0,
            first_mismatch: None,
            load_began: Duration::ZERO,
        }
    }

    /// What to do next; `None`: wait for a message, or until [`Self::poll_timeout`].
    pub fn poll_action(&mut self, now: Duration) -> Option<TargetAction> {
        if self.acting {
            return None;
        }
        if self.poll_timeout().is_some_and(|deadline| now >= deadline) {
            let ms = now.saturating_sub(self.heard).as_millis() as u64;
            let doing = self.doing();
            self.fail(TargetError::Stalled { ms, doing });
        }
        if let Some(message) = self.outbox.pop_front() {
            return Some(TargetAction::Send(message));
        }
        match &self.state {
            State::AwaitHello | State::Receiving | State::Prepared => None,
            State::Loading => {
                self.acting = true;
                Some(TargetAction::Load)
            }
            State::Resuming { .. } => {
                self.acting = true;
                Some(TargetAction::Run)
            }
            State::Ended(_) => Some(TargetAction::End),
        }
    }

    /// When the source's silence becomes a failure.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match &self.state {
            State::AwaitHello | State::Receiving | State::Prepared => Some(self.heard + self.config.stall_timeout),
            State::Loading | State::Resuming { .. } | State::Ended(_) => None,
        }
    }

    /// A message from the source, whose frame took `frame_bytes` on the wire.
    pub fn handle_message(&mut self, now: Duration, message: &Message<'_>, frame_bytes: u64) -> Apply {
        self.heard = now;
        self.received_bytes += frame_bytes;
        match self.check(now, message) {
            Ok(apply) => apply,
            Err(error) => {
                self.fail(error);
                Apply::Nothing
            }
        }
    }

    /// So many bytes of frames have been received on further connections in all, and what they hold is in place.
    pub fn handle_side_bytes(&mut self, now: Duration, bytes: u64) {
        self.heard = now;
        self.side_bytes = bytes;
        if let Err(error) = self.check_side_bytes() {
            return self.fail(error);
        }
        if self.state == State::Receiving {
            self.confirm();
        }
    }

    /// Whether the next message may be handled: not before all that was sent on further connections is in place, where the
    /// source said so.
    pub fn wants_message(&self) -> bool {
        self.fence.is_none_or(|fence| self.side_bytes >= fence) || self.state != State::Receiving
    }

    /// The connections that were agreed on, the first one included.
    pub fn streams(&self) -> u16 {
        self.streams
    }

    /// The other end of a further connection; `None` before a source was accepted.
    pub fn side_stream(&self) -> Option<SideStream> {
        Some(SideStream {
            layout: self.config.layout.clone(),
            migration: self.migration?,
            encodings: self.encodings,
            streams: self.streams,
            stream: None,
        })
    }

    /// What [`Self::handle_message`] asked for is in place. For a comparison: these pages differed.
    pub fn handle_applied(&mut self, apply: Apply, mismatched: &[u64]) {
        match apply {
            Apply::Nothing => {}
            Apply::Compare(run) => {
                self.verified_pages += run.count;
                self.mismatched_pages += mismatched.len() as u64;
                self.first_mismatch = self.first_mismatch.or(mismatched.first().copied());
            }
            Apply::WritePages | Apply::ZeroPages | Apply::KeepDeviceState => {}
        }
        if apply != Apply::Nothing && !matches!(self.state, State::Ended(_)) {
            self.confirm();
        }
    }

    fn confirm(&mut self) {
        // One confirmation is enough for all that came before it.
        self.outbox.retain(|message| !matches!(message, Message::Progress { .. }));
        self.outbox.push_back(Message::Progress { bytes: self.received_bytes + self.side_bytes });
    }

    fn check_side_bytes(&self) -> Result<(), TargetError> {
        match self.fence {
            Some(fence) if self.side_bytes > fence => {
                Err(TargetError::Unexpected { message: "pages", doing: "waiting for the device state" })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The VMM has loaded the device state; the guest is paused.
    pub fn handle_loaded(&mut self, now: Duration) {
        self.acting = false;
        self.heard = now;
        if self.state == State::Loading {
            self.outbox.push_back(Message::Prepared(Prepared {
                verified_pages: self.verified_pages,
                mismatched_pages: self.mismatched_pages,
                first_mismatch: self.first_mismatch.unwrap_or(0),
                load_us: now.saturating_sub(self.load_began).as_micros() as u64,
            }));
            self.state = State::Prepared;
        }
    }

    /// The guest runs.
    pub fn handle_running(&mut self, now: Duration) {
        self.acting = false;
        if let State::Resuming { since } = self.state {
            let resume_us = now.saturating_sub(since).as_micros() as u64;
            self.outbox.push_back(Message::Running { resume_us });
            self.state = State::Ended(TargetOutcome::Running);
        }
    }

    /// The connection ended.
    pub fn handle_connection_lost(&mut self) {
        // A guest that was handed over is run, whether anybody listens or not.
        if !matches!(self.state, State::Resuming { .. }) {
            let doing = self.doing();
            self.fail(TargetError::ConnectionLost { doing });
        }
    }

    /// The user wants no migration any more. After the hand-over that is too late, and has no effect.
    pub fn handle_cancel(&mut self) {
        if !matches!(self.state, State::Resuming { .. }) {
            self.fail(TargetError::Cancelled);
        }
    }

    /// The driver could not carry out what was asked, or the peer's bytes were no message.
    pub fn handle_failure(&mut self, text: String) {
        self.acting = false;
        self.fail(TargetError::Driver { text });
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&TargetOutcome> {
        match &self.state {
            State::Ended(outcome) => Some(outcome),
            State::AwaitHello | State::Receiving | State::Loading | State::Prepared | State::Resuming { .. } => None,
        }
    }

    /// Whether the guest is ours, whatever became of it then.
    pub fn handed_over(&self) -> bool {
        match &self.state {
            State::Resuming { .. } | State::Ended(TargetOutcome::Running) => true,
            State::Ended(TargetOutcome::Failed { handed_over, .. }) => *handed_over,
            State::AwaitHello | State::Receiving | State::Loading | State::Prepared => false,
        }
    }

    /// Whether a source was accepted.
    pub fn greeted(&self) -> bool {
        self.migration.is_some()
    }

    /// The migration's name, once a source was accepted.
    pub fn migration(&self) -> Option<MigrationId> {
        self.migration
    }

    /// Bytes received so far, on all connections.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes + self.side_bytes
    }

    /// Pages compared and pages that differ, if digests were announced.
    pub fn verified(&self) -> Option<(u64, u64)> {
        self.verify.then_some((self.verified_pages, self.mismatched_pages))
    }

    /// What is going on, for people.
    pub fn doing(&self) -> &'static str {
        match &self.state {
            State::AwaitHello => "waiting for a source",
            State::Receiving if self.paused => "receiving the rest",
            State::Receiving => "receiving memory",
            State::Loading => "loading the device state",
            State::Prepared => "waiting for the hand-over",
            State::Resuming { .. } => "running the guest",
            State::Ended(_) => "done",
        }
    }

    fn check(&mut self, now: Duration, message: &Message<'_>) -> Result<Apply, TargetError> {
        match (&self.state, message) {
            (State::Ended(_), _) => Ok(Apply::Nothing),
            (_, Message::Abort(abort)) => Err(TargetError::Aborted { text: abort.text.clone() }),
            (State::AwaitHello, Message::Hello(hello)) => {
                let version = self.agree(hello)?;
                self.migration = Some(hello.migration);
                self.verify = hello.verify;
                self.encodings = hello.encodings.and(self.config.encodings);
                self.streams = hello.streams.min(self.config.streams).clamp(1, MAX_STREAMS);
                let (migration, encodings, streams) = (hello.migration, self.encodings, self.streams);
                self.outbox.push_back(Message::Welcome(Welcome { version, migration, encodings, streams }));
                self.state = State::Receiving;
                Ok(Apply::Nothing)
            }
            (State::Receiving, Message::Ping(number)) => {
                self.outbox.push_back(Message::Pong(*number));
                Ok(Apply::Nothing)
            }
            (State::Receiving, Message::Pages(pages)) if self.fence.is_none() => {
                check_pages(&self.config.layout, self.encodings, pages, 0, self.streams)?;
                Ok(Apply::WritePages)
            }
            (State::Receiving, Message::Zero(runs)) if self.fence.is_none() => {
                check_runs(&self.config.layout, runs, 0, self.streams)?;
                Ok(Apply::ZeroPages)
            }
            (State::Receiving, Message::Fence { side_bytes }) if self.paused && self.fence.is_none() => {
                self.fence = Some(*side_bytes);
                self.check_side_bytes()?;
                Ok(Apply::Nothing)
            }
            (State::Receiving, Message::Paused) if !self.paused => {
                self.paused = true;
                Ok(Apply::Nothing)
            }
            (State::Receiving, Message::DeviceState(piece)) if self.paused => {
                self.device_state_bytes += piece.len() as u64;
                if self.device_state_bytes > MAX_DEVICE_STATE_BYTES {
                    let (received, expected) = (self.device_state_bytes, MAX_DEVICE_STATE_BYTES);
                    return Err(TargetError::DeviceState { received, expected });
                }
                Ok(Apply::KeepDeviceState)
            }
            (State::Receiving, Message::Digests(digests)) if self.paused && self.verify => {
                self.check_fence(message)?;
                check_inside(&self.config.layout, digests.run())?;
                Ok(Apply::Compare(digests.run()))
            }
            (State::Receiving, Message::Load { device_state_bytes }) if self.paused => {
                self.check_fence(message)?;
                if *device_state_bytes != self.device_state_bytes {
                    let (received, expected) = (self.device_state_bytes, *device_state_bytes);
                    return Err(TargetError::DeviceState { received, expected });
                }
                self.load_began = now;
                self.state = State::Loading;
                Ok(Apply::Nothing)
            }
            (State::Prepared, Message::HandOver(migration)) => {
                if Some(*migration) != self.migration {
                    return Err(TargetError::WrongMigration);
                }
                self.state = State::Resuming { since: now };
                Ok(Apply::Nothing)
            }
            (State::AwaitHello | State::Receiving | State::Loading | State::Prepared | State::Resuming { .. }, _) => {
                Err(TargetError::Unexpected { message: message.name(), doing: self.doing() })
            }
        }
    }

    /// The version to speak, if the source's guest is the one that waits here.
    fn agree(&self, hello: &Hello) -> Result<u16, TargetError> {
        let version = hello.version_max.min(VERSION_MAX);
        if version < hello.version_min.max(VERSION_MIN) {
            return Err(TargetError::Version { min: hello.version_min, max: hello.version_max });
        }
        let differs = |what, source: String, target: String| {
            if source == target {
                Ok(())
            } else {
                Err(TargetError::Differs { what, source_has: source, target_has: target })
            }
        };
        differs("the machine type", hello.machine.clone(), self.config.machine.clone())?;
        differs("the number of processors", hello.vcpus.to_string(), self.config.vcpus.to_string())?;
        differs("the RAM", describe(&hello.layout), describe(&self.config.layout))?;
        Ok(version)
    }

    /// Whether all memory is in place that came by further connections. Before it is known how much that was, nothing may
    /// come that needs it.
    fn check_fence(&self, message: &Message<'_>) -> Result<(), TargetError> {
        let is_complete = match self.fence {
            None => self.streams == 1,
            Some(fence) => self.side_bytes == fence,
        };
        if is_complete { Ok(()) } else { Err(TargetError::Unexpected { message: message.name(), doing: self.doing() }) }
    }

    fn fail(&mut self, error: TargetError) {
        let handed_over = match &self.state {
            State::Ended(_) => return,
            State::Resuming { .. } => true,
            State::AwaitHello | State::Receiving | State::Loading | State::Prepared => false,
        };
        let loaded = matches!(self.state, State::Loading | State::Prepared | State::Resuming { .. });
        self.outbox.clear();
        let fault = match &error {
            TargetError::Aborted { .. } | TargetError::ConnectionLost { .. } => None,
            TargetError::Cancelled => Some(Fault::User),
            TargetError::Driver { .. } => Some(Fault::Sender),
            TargetError::Version { .. }
            | TargetError::Differs { .. }
            | TargetError::Unexpected { .. }
            | TargetError::OutsideRam { .. }
            | TargetError::Encoding { .. }
            | TargetError::WrongStream { .. }
            | TargetError::DeviceState { .. }
            | TargetError::WrongMigration
            | TargetError::Stalled { .. } => Some(Fault::Receiver),
        };
        if let Some(fault) = fault {
            self.outbox.push_back(Message::Abort(Abort { fault, text: error.to_string() }));
        }
        self.state = State::Ended(TargetOutcome::Failed { error, handed_over, loaded });
    }
}

/// Whether these pages, and those that they are copied from, are the guest's, may come by this connection, and are in an
/// encoding that was agreed on.
pub(super) fn check_pages(
    layout: &RamLayout,
    encodings: Encodings,
    pages: &Pages<'_>,
    stream: u16,
    streams: u16,
) -> Result<(), TargetError> {
    check_runs(layout, &pages.runs, stream, streams)?;
    for source in pages.sources() {
        // What another connection brings may come before or after this.
        check_runs(layout, &[PageRun::new(source.0, 1)], stream, streams)?;
    }
    if encodings.contains(pages.encoding) { Ok(()) } else { Err(TargetError::Encoding { code: pages.encoding.code() }) }
}

/// A layout in words: what people compare.
fn describe(layout: &RamLayout) -> String {
    let blocks: Vec<String> =
        layout.blocks().iter().map(|block| format!("`{}` of {} bytes", block.id, block.bytes)).collect();
    blocks.join(", ")
}
