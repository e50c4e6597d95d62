//! The target's host: the real state machine of the target, with times for what its driver would do.

use std::time::Duration;

use vmferry_core::engine::{Apply, Target, TargetAction, TargetConfig};
use vmferry_core::pages::{PAGE_BYTES, RamLayout};
use vmferry_core::wire::{Encodings, MAX_DEVICE_CHUNK_BYTES, MAX_PAGES_PER_FRAME, Message, Pages};

use crate::link::{Body, Direction, Frame};
use crate::replay::nanoseconds;
use crate::scenario::{MACHINE, STALL_TIMEOUT, Scenario, VCPUS};

/// The most frames taken in before the source hears of them, as in the live driver.
const FRAMES_PER_CONFIRMATION: u32 = 16;

/// The target and its clock, which runs on its own and never behind what arrives.
#[derive(Debug)]
pub(crate) struct TargetHost {
    target: Target,
    /// When it is done with what it does.
    free_at_ns: u64,
    apply_page_ns: f64,
    load_ns: u64,
    resume_ns: u64,
    /// Stands for the content of any frame: the state machine does not look at it.
    content: Vec<u8>,
    /// When the guest began to run here.
    pub(crate) running_since_ns: Option<u64>,
}

impl TargetHost {
    pub(crate) fn new(scenario: &Scenario, layout: &RamLayout) -> Self {
        let config = TargetConfig {
            layout: layout.clone(),
            machine: MACHINE.into(),
            vcpus: VCPUS,
            stall_timeout: STALL_TIMEOUT,
            encodings: Encodings::RAW,
            streams: 1,
        };
        let content_bytes = ((MAX_PAGES_PER_FRAME * PAGE_BYTES) as usize).max(MAX_DEVICE_CHUNK_BYTES);
        Self {
            target: Target::new(config),
            free_at_ns: 0,
            apply_page_ns: scenario.host.apply_page_ns,
            load_ns: nanoseconds(scenario.stop.load),
            resume_ns: nanoseconds(scenario.stop.resume),
            content: vec![0; content_bytes],
            running_since_ns: None,
        }
    }

    /// When it will next have something to do, with what is under way to it.
    pub(crate) fn next_wake_ns(&self, from_source: &Direction) -> Option<u64> {
        from_source.next_arrival_ns().map(|at_ns| at_ns.max(self.free_at_ns))
    }

    /// Does what there is to do by `until_ns`.
    pub(crate) fn run_until(&mut self, until_ns: u64, from_source: &mut Direction, to_source: &mut Direction) {
        while let Some(wake_ns) = self.next_wake_ns(from_source).filter(|&wake_ns| wake_ns <= until_ns) {
            self.wake(wake_ns, from_source, to_source);
        }
    }

    /// Takes in what has arrived, then answers.
    pub(crate) fn wake(&mut self, now_ns: u64, from_source: &mut Direction, to_source: &mut Direction) {
        let mut now_ns = now_ns;
        for _ in 0..FRAMES_PER_CONFIRMATION {
            let Some(frame) = from_source.receive(now_ns) else { break };
            now_ns += self.take_in(now_ns, frame);
        }
        while let Some(action) = self.target.poll_action(Duration::from_nanos(now_ns)) {
            match action {
                TargetAction::Send(message) => now_ns = to_source.send(now_ns, message.into()),
                TargetAction::Load => {
                    now_ns += self.load_ns;
                    self.target.handle_loaded(Duration::from_nanos(now_ns));
                }
                TargetAction::Run => {
                    now_ns += self.resume_ns;
                    self.running_since_ns = Some(now_ns);
                    self.target.handle_running(Duration::from_nanos(now_ns));
                }
                TargetAction::End => break,
            }
        }
        self.free_at_ns = now_ns;
    }

    /// Handles a frame; how long that took, in ns.
    fn take_in(&mut self, now_ns: u64, frame: Frame) -> u64 {
        let data = |bytes: usize| &self.content[..bytes];
        let message = match frame.body {
            Body::Message(message) => message,
            Body::Pages(run) => Message::Pages(Pages::raw(run, data((run.count * PAGE_BYTES) as usize))),
            Body::DeviceState(bytes) => Message::DeviceState(data(bytes)),
        };
        let apply = self.target.handle_message(Duration::from_nanos(now_ns), &message, frame.bytes);
        self.target.handle_applied(apply, &[]);
        match apply {
            Apply::WritePages => {
                let Message::Pages(pages) = &message else { unreachable!("only a message of pages has them written") };
                (pages.runs.pages() as f64 * self.apply_page_ns) as u64
            }
            Apply::Nothing | Apply::ZeroPages | Apply::KeepDeviceState | Apply::Compare(_) => 0,
        }
    }
}
