//! The target's driver: reads frames, puts what they hold in place, and runs the guest after the hand-over.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmferry_core::engine::{Apply, Target, TargetAction, TargetConfig, TargetOutcome};
use vmferry_core::pages::PAGE_BYTES;
use vmferry_core::wire::{Encodings, MAX_PAGES_PER_FRAME, MAX_STREAMS, Message};

use crate::buffer::Buffer;
use crate::cancel::Cancel;
use crate::compress::PageDecoder;
use crate::control::{Command, Controls, Refusal, RefusalKind};
use crate::link::{Link, LinkError};
use crate::memory::GuestMemory;
use crate::sides::{SideFailure, Sides, put_pages_in_place};
use crate::source::digests;
use crate::vmm::{TargetVmm, VmmError, describe};

/// The most that a waiting driver sleeps before it looks at the clock again.
const WAIT_MAX: Duration = Duration::from_millis(200);
/// How often the control socket is told.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// The most frames taken in before the source hears of them: its window waits for that.
const FRAMES_PER_CONFIRMATION: u32 = 16;

/// How a migration ended, as the target saw it.
#[derive(Debug, Clone, Serialize)]
pub struct TargetReport {
    /// `completed`, `failed`, or `in_doubt` where the guest was handed over and does not run.
    pub outcome: &'static str,
    /// Why, where it did not complete.
    pub reason: Option<String>,
    /// The migration's name, once a source was accepted.
    pub migration_id: Option<String>,
    /// From the first byte to the end.
    pub total_ms: f64,
    /// Bytes of frames received.
    pub wire_bytes: u64,
    /// Pages compared with the source's digests, if it sent any.
    pub verified_pages: Option<u64>,
    /// How many of them differ.
    pub mismatched_pages: Option<u64>,
    /// Whether the VMM is untouched by device state and can take another attempt.
    pub can_retry: bool,
}

/// Receives one migration over `stream`, and over further connections that its source makes to `listener`; without a
/// listener, over the one. Returns how it ended; the guest runs here exactly if it completed.
///
/// # Errors
/// [`VmmError`] before anything was received.
pub fn receive(
    vmm: &mut dyn TargetVmm,
    stream: TcpStream,
    listener: Option<&TcpListener>,
    stall_timeout: Duration,
    cancel: &Cancel,
) -> Result<TargetReport, VmmError> {
    receive_with(vmm, stream, listener, stall_timeout, cancel, None)
}

/// As [`receive`]; shown, and cancelled, by `controls`, if there are any.
///
/// # Errors
/// [`VmmError`] before anything was received.
pub fn receive_with(
    vmm: &mut dyn TargetVmm,
    stream: TcpStream,
    listener: Option<&TcpListener>,
    stall_timeout: Duration,
    cancel: &Cancel,
    controls: Option<&Controls>,
) -> Result<TargetReport, VmmError> {
    let link = Link::new(stream, stall_timeout, cancel.clone())?;
    let machine = vmm.machine();
    let config = TargetConfig {
        layout: vmm.memory().layout().clone(),
        machine: machine.kind,
        vcpus: machine.vcpus,
        stall_timeout,
        encodings: Encodings::ALL,
        streams: if listener.is_some() { MAX_STREAMS } else { 1 },
    };
    let driver = Driver {
        vmm,
        controls,
        told: Duration::ZERO,
        cancelled: false,
        link,
        listener,
        sides: None,
        target: Target::new(config),
        start: Instant::now(),
        device_state: Vec::new(),
        buffer: Buffer::zeroed((MAX_PAGES_PER_FRAME * PAGE_BYTES) as usize),
        decoder: PageDecoder::new(),
        stall_timeout,
        side_bytes: 0,
        link_lost: false,
    };
    Ok(driver.run(cancel))
}

struct Driver<'a> {
    vmm: &'a mut dyn TargetVmm,
    controls: Option<&'a Controls>,
    told: Duration,
    cancelled: bool,
    link: Link,
    listener: Option<&'a TcpListener>,
    /// The further connections, from the moment they were agreed on until all memory is in place.
    sides: Option<Sides>,
    target: Target,
    start: Instant,
    device_state: Vec<u8>,
    buffer: Buffer,
    decoder: PageDecoder,
    stall_timeout: Duration,
    /// Bytes of the further connections that the state machine has heard of.
    side_bytes: u64,
    link_lost: bool,
}

impl Driver<'_> {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn run(mut self, cancel: &Cancel) -> TargetReport {
        if let Some(controls) = self.controls {
            controls.begin();
        }
        loop {
            self.hear();
            if cancel.is_cancelled() {
                self.cancel();
            }
            self.obey();
            match self.target.poll_action(self.now()) {
                Some(TargetAction::End) => break,
                Some(action) => self.perform(action),
                None => self.wait(),
            }
        }
        if self.target.outcome() == Some(&TargetOutcome::Running) {
            self.vmm.settle();
        }
        self.publish();
        let report = self.report();
        if let Some(controls) = self.controls {
            // One that was turned away is not what is waited for.
            controls.end((report.migration_id.is_some() || self.cancelled).then_some(report.outcome));
        }
        report
    }

    /// Answers the commands that came, and has the control socket show how far it is.
    fn obey(&mut self) {
        let Some(controls) = self.controls else { return };
        for (ticket, command) in controls.take_commands() {
            let refusal = match command {
                Command::Cancel if self.target.handed_over() => {
                    Some((RefusalKind::TooLate, "too late for that: the guest was handed over"))
                }
                Command::Cancel => {
                    self.cancel();
                    None
                }
                Command::Set(_) | Command::Hold | Command::Continue => {
                    Some((RefusalKind::Unsupported, "that is up to the source"))
                }
            };
            self.publish();
            controls.answer(ticket, refusal.map_or(Ok(()), |(kind, text)| Err(Refusal::new(kind, text))));
        }
        let elapsed = self.now();
        if elapsed.saturating_sub(self.told) >= STATUS_INTERVAL {
            self.told = elapsed;
            self.publish();
        }
    }

    fn cancel(&mut self) {
        if !self.cancelled {
            self.cancelled = true;
            self.link.ignore_cancel();
            self.target.handle_cancel();
        }
    }

    fn publish(&self) {
        let Some(controls) = self.controls else { return };
        controls.publish(|status| {
            status.migration_id = self.target.migration().map(|id| id.to_string());
            status.doing = self.target.doing().to_owned();
            status.elapsed_ms = self.now().as_secs_f64() * 1e3;
            status.wire_bytes = self.target.received_bytes();
        });
    }

    fn wait(&mut self) {
        let until = self.target.poll_timeout().unwrap_or(Duration::MAX);
        let wait = until.saturating_sub(self.now()).min(WAIT_MAX);
        if wait.is_zero() {
            return;
        }
        let others = [self.sides.as_ref().map(Sides::news), self.controls.map(Controls::waker)];
        if let Err(error) = self.link.wait_for(self.target.wants_message(), others, wait) {
            self.target.handle_failure(describe(&error));
        }
    }

    /// Takes in what has arrived. One confirmation serves all frames that arrived together.
    fn hear(&mut self) {
        self.hear_sides();
        self.hear_one();
        for _ in 1..FRAMES_PER_CONFIRMATION {
            if !self.link.has_frame() {
                break;
            }
            self.hear_one();
        }
        if self.sides.is_none()
            && self.target.streams() > 1
            && let (Some(listener), Some(side)) = (self.listener, self.target.side_stream())
        {
            match Sides::new(listener, Arc::clone(self.vmm.memory()), side, self.stall_timeout) {
                Ok(sides) => self.sides = Some(sides),
                Err(error) => self.target.handle_failure(describe(&error)),
            }
        }
    }

    fn hear_sides(&mut self) {
        let Some(sides) = &self.sides else { return };
        let heard = sides.hear();
        if heard.bytes > self.side_bytes {
            self.side_bytes = heard.bytes;
            self.target.handle_side_bytes(self.start.elapsed(), heard.bytes);
        }
        match heard.failure {
            None => {}
            // Where the source ends a migration, it says why on the first connection.
            Some(SideFailure::Lost) => {
                self.link.wait_for_reason();
                self.hear_one();
                self.target.handle_connection_lost();
            }
            Some(SideFailure::Failed(text)) => self.target.handle_failure(text),
        }
    }

    fn hear_one(&mut self) {
        if self.link_lost || self.target.outcome().is_some() || !self.target.wants_message() {
            return;
        }
        let now = self.start.elapsed();
        let result = match self.link.receive() {
            Ok(None) => return,
            Ok(Some((message, frame_bytes))) => {
                let apply = self.target.handle_message(now, &message, frame_bytes);
                let Self { vmm, device_state, buffer, decoder, .. } = self;
                put_in_place(vmm.memory(), apply, message, device_state, buffer, decoder)
                    .map(|mismatched| self.target.handle_applied(apply, &mismatched))
            }
            Err(error) => Err(VmmError::Link(error)),
        };
        match result {
            Ok(()) => {}
            Err(VmmError::Link(LinkError::Closed)) => {
                self.link_lost = true;
                self.target.handle_connection_lost();
            }
            // Reading stopped inside a frame; the reason can still be sent.
            Err(VmmError::Link(LinkError::Cancelled)) => self.target.handle_cancel(),
            Err(error) => self.target.handle_failure(describe(&error)),
        }
    }

    fn perform(&mut self, action: TargetAction) {
        tracing::trace!(?action);
        match action {
            TargetAction::Send(message) => self.send(&message),
            TargetAction::Load => {
                // Nobody writes memory any more from here on, whatever still comes.
                self.sides = None;
                match self.vmm.load(&self.device_state) {
                    Ok(()) => self.target.handle_loaded(self.start.elapsed()),
                    Err(error) => self.target.handle_failure(describe(&error)),
                }
            }
            TargetAction::Run => match self.vmm.run() {
                Ok(()) => self.target.handle_running(self.start.elapsed()),
                Err(error) => self.target.handle_failure(describe(&error)),
            },
            TargetAction::End => {}
        }
    }

    fn send(&mut self, message: &Message<'_>) {
        if self.link_lost {
            return;
        }
        match self.link.send(message) {
            Ok(_) => {}
            Err(LinkError::Cancelled) => {
                self.link_lost = true;
                self.target.handle_cancel();
            }
            Err(_) => {
                self.link_lost = true;
                self.target.handle_connection_lost();
            }
        }
    }

    fn report(&self) -> TargetReport {
        let (outcome, reason, can_retry) = match self.target.outcome() {
            Some(TargetOutcome::Running) => ("completed", None, false),
            Some(TargetOutcome::Failed { error, handed_over, loaded }) => {
                (if *handed_over { "in_doubt" } else { "failed" }, Some(error.to_string()), !loaded)
            }
            None => ("failed", None, true),
        };
        let verified = self.target.verified();
        TargetReport {
            outcome,
            reason,
            migration_id: self.target.migration().map(|id| id.to_string()),
            total_ms: self.now().as_secs_f64() * 1e3,
            wire_bytes: self.target.received_bytes(),
            verified_pages: verified.map(|(pages, _)| pages),
            mismatched_pages: verified.map(|(_, mismatched)| mismatched),
            can_retry,
        }
    }
}

/// Does what the state machine found right to do with a message; the pages that differ, for a comparison.
fn put_in_place(
    memory: &GuestMemory,
    apply: Apply,
    message: Message<'_>,
    device_state: &mut Vec<u8>,
    buffer: &mut [u8],
    decoder: &mut PageDecoder,
) -> Result<Vec<u64>, VmmError> {
    match (apply, message) {
        (Apply::KeepDeviceState, Message::DeviceState(piece)) => device_state.extend_from_slice(piece),
        (Apply::Compare(run), Message::Digests(sent)) => {
            let found = digests(memory, run, buffer)?;
            let pairs = found.iter().zip(&sent.digests).enumerate();
            let differ = pairs.filter(|(_, (found, sent))| found != sent);
            return Ok(differ.map(|(index, _)| run.first.0 + index as u64).collect());
        }
        (apply, message) => put_pages_in_place(memory, apply, message, decoder)?,
    }
    Ok(Vec::new())
}
