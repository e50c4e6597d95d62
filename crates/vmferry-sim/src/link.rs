//! The connection: frames with their true sizes, at a rate, after a delay, in order.

use std::collections::VecDeque;

use vmferry_core::pages::{PAGE_BYTES, PageRun};
use vmferry_core::wire::{FrameWriter, MAX_DEVICE_CHUNK_BYTES, Message, Pages};

use crate::replay::nanoseconds;
use crate::scenario::Scenario;

/// How pages are sent, each kind in frames of its own. Where pages come to be compressed or sent as deltas, their kinds
/// belong here, and their sizes into [`FrameSizes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageClass {
    /// As a note that the page is zero.
    Zero,
    /// As it is.
    Raw,
}

/// What frames take on the wire, as the wire module makes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrameSizes {
    /// A frame of pages without their content.
    pages: u64,
    /// A frame of zero runs without the runs.
    zero: u64,
    /// A zero run.
    zero_run: u64,
    /// A frame of device state without its piece.
    device_state: u64,
}

impl FrameSizes {
    /// Seals a frame of each kind and looks at its length.
    pub(crate) fn measure() -> Self {
        let page = [0; PAGE_BYTES as usize];
        let run = PageRun::new(0, 1);
        let zero = sealed_bytes(&Message::Zero(vec![]));
        Self {
            pages: sealed_bytes(&Message::Pages(Pages::raw(run, &page))) - PAGE_BYTES,
            zero,
            zero_run: sealed_bytes(&Message::Zero(vec![run])) - zero,
            device_state: sealed_bytes(&Message::DeviceState(&[])),
        }
    }

    /// A frame of so many pages as they are.
    pub(crate) fn pages(&self, pages: u64) -> u64 {
        self.pages + pages * PAGE_BYTES
    }

    /// A frame of so many zero runs.
    pub(crate) fn zero(&self, runs: u64) -> u64 {
        self.zero + runs * self.zero_run
    }

    /// A frame with so many bytes of device state.
    pub(crate) fn device_state(&self, bytes: u64) -> u64 {
        self.device_state + bytes
    }

    /// All frames of a device state of so many bytes.
    pub(crate) fn whole_device_state(&self, bytes: u64) -> u64 {
        let most = MAX_DEVICE_CHUNK_BYTES as u64;
        let rest = bytes % most;
        bytes / most * self.device_state(most) + if rest > 0 { self.device_state(rest) } else { 0 }
    }
}

/// The length of this message's frame.
pub(crate) fn sealed_bytes(message: &Message<'_>) -> u64 {
    let mut frame = Vec::new();
    FrameWriter::new().seal(message, &mut frame);
    frame.len() as u64
}

/// A frame on its way.
#[derive(Debug)]
pub(crate) struct Frame {
    /// Its length on the wire.
    pub(crate) bytes: u64,
    /// What it says.
    pub(crate) body: Body,
}

/// What a frame says. Content of pages and device state is not kept: neither side's logic looks at it.
#[derive(Debug)]
pub(crate) enum Body {
    /// A message without bulk data.
    Message(Message<'static>),
    /// These pages.
    Pages(PageRun),
    /// So many bytes of device state.
    DeviceState(usize),
}

impl From<Message<'static>> for Frame {
    fn from(message: Message<'static>) -> Self {
        Self { bytes: sealed_bytes(&message), body: Body::Message(message) }
    }
}

/// A link of a fixed rate on which bytes leave one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    rate_bytes_per_s: u64,
    /// When all that was given to it has left, and the part of a nanosecond beyond that, in units of 1/rate.
    free_at_ns: u64,
    rest: u64,
    /// Bytes carried.
    pub(crate) bytes: u64,
}

impl Line {
    pub(crate) fn new(rate_bytes_per_s: u64) -> Self {
        Self { rate_bytes_per_s, free_at_ns: 0, rest: 0, bytes: 0 }
    }

    /// When all that was given to it so far has left.
    pub(crate) fn free_at_ns(&self) -> u64 {
        self.free_at_ns
    }

    /// Takes so many bytes at `now_ns`; when the last of them has left.
    pub(crate) fn carry(&mut self, now_ns: u64, bytes: u64) -> u64 {
        if now_ns > self.free_at_ns {
            (self.free_at_ns, self.rest) = (now_ns, 0);
        }
        let work = u128::from(bytes) * 1_000_000_000 + u128::from(self.rest);
        let rate = u128::from(self.rate_bytes_per_s);
        self.free_at_ns += (work / rate) as u64;
        self.rest = (work % rate) as u64;
        self.bytes += bytes;
        self.free_at_ns
    }

    /// How long so many bytes take.
    pub(crate) fn time_ns(&self, bytes: u64) -> u64 {
        (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(self.rate_bytes_per_s)) as u64
    }
}

/// One direction of the connection.
#[derive(Debug)]
pub(crate) struct Direction {
    line: Line,
    latency_ns: u64,
    /// How long the bytes in a full socket buffer take to leave.
    buffer_ns: u64,
    /// Frames with the moments at which they are there, ascending.
    frames: VecDeque<(u64, Frame)>,
}

impl Direction {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        let line = Line::new(scenario.bandwidth_bytes_per_s);
        let buffer_ns = line.time_ns(scenario.socket_buffer_bytes);
        Self { line, latency_ns: nanoseconds(scenario.latency), buffer_ns, frames: VecDeque::new() }
    }

    /// Sends a frame; when the sender can go on: at once, or when no more than a full buffer is left to leave.
    pub(crate) fn send(&mut self, now_ns: u64, frame: Frame) -> u64 {
        let left_ns = self.line.carry(now_ns, frame.bytes);
        self.frames.push_back((left_ns + self.latency_ns, frame));
        now_ns.max(left_ns.saturating_sub(self.buffer_ns))
    }

    /// When the next frame is there; `None` if none is under way.
    pub(crate) fn next_arrival_ns(&self) -> Option<u64> {
        self.frames.front().map(|(at_ns, _)| *at_ns)
    }

    /// The next frame that is there by `now_ns`.
    pub(crate) fn receive(&mut self, now_ns: u64) -> Option<Frame> {
        if self.next_arrival_ns()? > now_ns {
            return None;
        }
        self.frames.pop_front().map(|(_, frame)| frame)
    }

    /// Bytes sent so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.line.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmferry_core::wire::{HEADER_BYTES, MigrationId};

    use super::*;

    fn frame(bytes: u64) -> Frame {
        Frame { bytes, body: Body::DeviceState(bytes as usize) }
    }

    #[test]
    fn sizes_are_those_of_sealed_frames() {
        let sizes = FrameSizes::measure();
        let content = vec![7; 3 * PAGE_BYTES as usize];
        let pages = Message::Pages(Pages::raw(PageRun::new(9, 3), &content));
        assert_eq!(sizes.pages(3), sealed_bytes(&pages));
        let runs: Vec<_> = (0..5).map(|i| PageRun::new(i * 10, 3)).collect();
        assert_eq!(sizes.zero(5), sealed_bytes(&Message::Zero(runs)));
        assert_eq!(sizes.device_state(77), sealed_bytes(&Message::DeviceState(&content[..77])));
        let two = MAX_DEVICE_CHUNK_BYTES as u64 + 1;
        assert_eq!(sizes.whole_device_state(two), two + 2 * HEADER_BYTES as u64);
        assert_eq!(sizes.whole_device_state(0), 0);
        assert_eq!(Frame::from(Message::HandOver(MigrationId([1; 16]))).bytes, 16 + HEADER_BYTES as u64);
    }

    #[test]
    fn frames_follow_each_other_at_the_rate_after_the_delay() {
        let scenario = Scenario {
            bandwidth_bytes_per_s: 1_000_000,
            latency: Duration::from_micros(30),
            socket_buffer_bytes: 1000,
            ..Scenario::default()
        };
        let mut direction = Direction::new(&scenario);
        assert_eq!(direction.send(5_000, frame(400)), 5_000, "the buffer takes it");
        assert_eq!(direction.send(5_000, frame(600)), 5_000);
        assert_eq!(direction.send(5_000, frame(500)), 505_000, "half a buffer too much");
        assert_eq!(direction.next_arrival_ns(), Some(435_000));
        assert!(direction.receive(434_999).is_none());
        assert_eq!(direction.receive(435_000).map(|frame| frame.bytes), Some(400));
        assert_eq!(direction.receive(2_000_000).map(|frame| frame.bytes), Some(600));
        assert_eq!(direction.next_arrival_ns(), Some(1_535_000));
        assert_eq!(direction.bytes(), 1500);
        // After a silence the link is free at once.
        direction.send(9_000_000, frame(100));
        assert_eq!(direction.receive(u64::MAX).map(|frame| frame.bytes), Some(500));
        assert_eq!(direction.next_arrival_ns(), Some(9_130_000));
    }

    /// Rounding each frame's time would let a link carry more than its rate, or less.
    #[test]
    fn many_small_frames_take_as_long_as_their_bytes() {
        let mut line = Line::new(3_000_000_007);
        let mut left = 0;
        for _ in 0..1_000_000 {
            left = line.carry(0, 1);
        }
        assert_eq!(left, 1_000_000 * 1_000_000_000 / 3_000_000_007);
        assert_eq!(line.bytes, 1_000_000);
    }
}
