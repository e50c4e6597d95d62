//! One migration on a virtual clock.
//!
//! The source's driver is the clock: it carries out one action after another, each taking the time that it costs, as
//! the live driver does with one thread. Guest, link and target are moved up to its time whenever it looks at them.
//! Nothing is random but the moments of the writes, which the seed fixes: the same scenario gives the same outcome.

use std::time::Duration;

use vmferry_core::engine::{Action, OutcomeKind, Report, SentPages, Source};
use vmferry_core::pages::{PAGE_BYTES, PageRun};
use vmferry_core::plan::AtRead;
use vmferry_core::wire::{MAX_DEVICE_CHUNK_BYTES, MAX_PAGES_PER_FRAME, MAX_ZERO_RUNS_PER_FRAME, Message};

use crate::SimError;
use crate::guest::Guest;
use crate::link::{Body, Direction, Frame, FrameSizes, PageClass};
use crate::optimum::{PageBytes, StopBound, each_page_once_bytes};
use crate::outcome::{GuestCost, Outcome, Ratios, Sample};
use crate::replay::nanoseconds;
use crate::scenario::{Scenario, layout};
use crate::target::TargetHost;
use crate::trace::Trace;

/// What a driver takes that is woken and finds nothing to do.
const IDLE_TURN_NS: u64 = 1_000;

/// What pages cost the optimum: their content alone, and nothing where there is none. No real sender is that cheap.
pub(crate) const LEAST_PAGE_BYTES: PageBytes = PageBytes { raw: PAGE_BYTES as u32, zero: 0 };

/// Migrates the trace's guest once.
///
/// # Errors
/// [`SimError`]: a trace or scenario that cannot be simulated, or an engine that breaks a promise. A migration that does
/// not converge is not an error.
pub fn simulate(trace: &Trace, scenario: &Scenario) -> Result<Outcome, SimError> {
    scenario.check()?;
    let layout = layout(trace.pages)?;
    let guest = Guest::new(trace, scenario.start_offset, scenario.seed)?;
    let mut driver = Driver {
        scenario,
        source: scenario.source(&layout),
        guest,
        target: TargetHost::new(scenario, &layout),
        to_target: Direction::new(scenario),
        to_source: Direction::new(scenario),
        sizes: FrameSizes::measure(),
        now_ns: 0,
        stopped_ns: None,
        resumed_ns: None,
        cancelled: false,
        moments: Vec::new(),
    };
    driver.run()?;
    driver.outcome(trace)
}

struct Driver<'a> {
    scenario: &'a Scenario,
    source: Source,
    guest: Guest<'a>,
    target: TargetHost,
    to_target: Direction,
    to_source: Direction,
    sizes: FrameSizes,
    now_ns: u64,
    /// When the guest stood still on the source, and when it ran there again.
    stopped_ns: Option<u64>,
    resumed_ns: Option<u64>,
    cancelled: bool,
    moments: Vec<Moment>,
}

impl Driver<'_> {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.now_ns)
    }

    fn take(&mut self, cost_ns: f64) {
        self.now_ns += cost_ns as u64;
    }

    fn run(&mut self) -> Result<(), SimError> {
        let limit_ns = nanoseconds(self.scenario.time_limit);
        loop {
            self.hear();
            if self.now_ns >= limit_ns && !self.cancelled {
                self.cancelled = true;
                self.source.handle_cancel(self.now());
            }
            match self.source.poll_action(self.now()) {
                Some(Action::End) => return Ok(()),
                Some(action) => self.perform(action)?,
                None => self.wait(limit_ns),
            }
        }
    }

    /// Tells the source what has arrived by now.
    fn hear(&mut self) {
        self.target.run_until(self.now_ns, &mut self.to_target, &mut self.to_source);
        while let Some(frame) = self.to_source.receive(self.now_ns) {
            if let Body::Message(message) = frame.body {
                self.source.handle_message(self.now(), &message);
            }
        }
    }

    /// Lets the time pass until the source has something to do or to hear.
    fn wait(&mut self, limit_ns: u64) {
        let timeout_ns = self.source.poll_timeout().map_or(u64::MAX, nanoseconds);
        let mut until_ns = timeout_ns.max(self.now_ns + IDLE_TURN_NS);
        if !self.cancelled {
            until_ns = until_ns.min(limit_ns.max(self.now_ns + IDLE_TURN_NS));
        }
        // The target may answer before that, and answers only what is under way to it already.
        loop {
            let arrival_ns = self.to_source.next_arrival_ns().unwrap_or(u64::MAX);
            until_ns = until_ns.min(arrival_ns.max(self.now_ns));
            match self.target.next_wake_ns(&self.to_target) {
                Some(wake_ns) if wake_ns < until_ns => {
                    self.target.wake(wake_ns, &mut self.to_target, &mut self.to_source);
                }
                Some(_) | None => break,
            }
        }
        self.now_ns = until_ns;
    }

    fn perform(&mut self, action: Action) -> Result<(), SimError> {
        match action {
            Action::Send(message) => {
                if matches!(message, Message::HandOver(_)) {
                    self.guest.advance_to(self.now_ns);
                    self.guest.check_handed_over()?;
                }
                let bytes = self.send(message.into());
                self.source.handle_message_sent(self.now(), bytes);
            }
            Action::OpenStreams { .. } => unreachable!("one connection is offered"),
            Action::Scan { relaxed } => self.scan(relaxed),
            Action::SendPages { runs, at_read } => {
                let sent = self.send_pages(&runs, at_read);
                self.source.handle_pages_sent(self.now(), &sent);
            }
            Action::Pause => {
                self.now_ns += nanoseconds(self.scenario.stop.stop_delay);
                self.guest.advance_to(self.now_ns);
                self.guest.pause();
                let stopped_at = self.now();
                self.stopped_ns = Some(self.now_ns);
                self.now_ns += nanoseconds(self.scenario.stop.pause);
                self.source.handle_paused(self.now(), stopped_at);
            }
            Action::SendDeviceState => self.send_device_state(),
            Action::Resume => {
                self.now_ns += nanoseconds(self.scenario.stop.resume);
                self.guest.resume();
                self.resumed_ns = Some(self.now_ns);
                self.source.handle_resumed(self.now());
            }
            Action::ScanHoles => return Err(SimError::Unexpected { what: "look for holes" }),
            Action::SendDigests => return Err(SimError::Unexpected { what: "send digests" }),
            Action::Throttle { .. } => return Err(SimError::Unexpected { what: "slow the guest" }),
            Action::End => {}
        }
        Ok(())
    }

    /// Sends a frame, waiting while the socket is full; its bytes.
    fn send(&mut self, frame: Frame) -> u64 {
        let bytes = frame.bytes;
        self.now_ns = self.to_target.send(self.now_ns, frame);
        bytes
    }

    fn scan(&mut self, relaxed: bool) {
        let costs = self.scenario.tracking;
        // What is written while the walk lasts is left for the next scan, as the contract of the tracking allows.
        self.guest.advance_to(self.now_ns);
        let found = self.guest.scan(relaxed);
        let begun_ns = self.now_ns;
        self.take(
            costs.call_ns * (1 + found.left_out_runs) as f64
                + costs.page_ns * found.looked_at as f64
                + costs.written_ns * found.armed as f64,
        );
        let took = Duration::from_nanos(self.now_ns - begun_ns);
        self.source.handle_scan(self.now(), took, &found.runs, self.guest.owners());
        self.note_moment();
    }

    fn note_moment(&mut self) {
        self.moments.push(Moment {
            at_ns: self.now_ns,
            pending_pages: self.source.pending_pages(),
            held_pages: self.source.held_pages(),
            sent_bytes: self.to_target.bytes(),
        });
    }

    fn send_pages(&mut self, runs: &[PageRun], at_read: AtRead) -> SentPages {
        let costs = self.scenario.tracking;
        let mut sent = SentPages::default();
        let mut zero = Vec::new();
        for &run in runs {
            let mut to_send = vec![run];
            if at_read != AtRead::Ignore {
                self.guest.advance_to(self.now_ns);
                let mut written = Vec::new();
                let armed = self.guest.scan_run(run, &mut written);
                let took_ns = costs.call_ns + costs.page_ns * run.count as f64 + costs.written_ns * armed as f64;
                self.take(took_ns);
                sent.arming += Duration::from_nanos(took_ns as u64);
                if at_read == AtRead::Skip {
                    to_send = run.without(&written);
                    sent.skipped.append(&mut written);
                } else {
                    sent.written.append(&mut written);
                }
            }
            for run in to_send {
                self.send_run(run, &mut zero, &mut sent);
            }
        }
        if !zero.is_empty() {
            self.send_zero(zero, &mut sent);
        }
        sent
    }

    fn send_run(&mut self, run: PageRun, zero: &mut Vec<PageRun>, sent: &mut SentPages) {
        let mut left = Some(run);
        while let Some(run) = left {
            let (piece, rest) = run.split_front(MAX_PAGES_PER_FRAME);
            left = rest;
            // What is written while the piece is read counts as not read: the tracking reports it later.
            self.guest.advance_to(self.now_ns);
            self.guest.mark_sent(piece);
            self.take(self.scenario.host.read_page_ns * piece.count as f64);
            for (stretch, class) in self.guest.stretches(piece) {
                match class {
                    PageClass::Raw => {
                        self.take(self.scenario.host.send_page_ns * stretch.count as f64);
                        let frame = Frame { bytes: self.sizes.pages(stretch.count), body: Body::Pages(stretch) };
                        sent.raw_pages += stretch.count;
                        sent.raw_bytes += self.send(frame);
                    }
                    PageClass::Zero => {
                        append(zero, stretch);
                        if zero.len() as u64 >= MAX_ZERO_RUNS_PER_FRAME {
                            self.send_zero(std::mem::take(zero), sent);
                        }
                    }
                }
            }
        }
    }

    fn send_zero(&mut self, runs: Vec<PageRun>, sent: &mut SentPages) {
        sent.zero.extend_from_slice(&runs);
        sent.zero_bytes += self.send(Message::Zero(runs).into());
    }

    fn send_device_state(&mut self) {
        let stop = self.scenario.stop;
        self.now_ns += nanoseconds(stop.save);
        self.guest.write_by_vmm(stop.saved_pages);
        let mut wire_bytes = 0;
        let mut left = stop.device_state_bytes;
        while left > 0 {
            let piece = left.min(MAX_DEVICE_CHUNK_BYTES as u64);
            left -= piece;
            let frame = Frame { bytes: self.sizes.device_state(piece), body: Body::DeviceState(piece as usize) };
            wire_bytes += self.send(frame);
        }
        self.source.handle_device_state_sent(self.now(), stop.device_state_bytes, wire_bytes);
    }

    fn outcome(mut self, trace: &Trace) -> Result<Outcome, SimError> {
        self.note_moment();
        let report = self.source.report(self.now());
        let converged = report.outcome == OutcomeKind::Completed;
        let page_bytes = report.wire.raw_bytes + report.wire.zero_bytes;
        let least = self.least(trace)?;
        let sample = |(moment, &least_left_bytes): (&Moment, &f64)| Sample {
            at_ms: moment.at_ns as f64 / 1e6,
            pending_pages: moment.pending_pages,
            held_pages: moment.held_pages,
            sent_bytes: moment.sent_bytes,
            least_left_bytes: Some(least_left_bytes),
        };
        Ok(Outcome {
            trace: trace.name.clone(),
            policy: self.scenario.policy.name(),
            converged,
            given_up_ms: (report.outcome == OutcomeKind::NotConverged).then_some(report.total_ms),
            within_limit: converged.then_some(report.downtime_ms <= report.downtime_limit_ms),
            page_bytes,
            guest: self.guest_cost(),
            optimum: self.ratios(trace, &report, page_bytes, &least),
            series: self.moments.iter().zip(&least.left_bytes).map(sample).collect(),
            report,
        })
    }

    fn guest_cost(&self) -> GuestCost {
        let fault_ms = self.guest.faults as f64 * self.scenario.tracking.fault_ns / 1e6;
        let ran_ms = self.stopped_ns.unwrap_or(self.now_ns) as f64 / 1e6;
        let goes_on_ns = self.target.running_since_ns.or(self.resumed_ns);
        let stopped_ns = self.stopped_ns.zip(goes_on_ns).map_or(0, |(stopped, goes_on)| goes_on - stopped);
        GuestCost {
            writes: self.guest.writes,
            write_faults: self.guest.faults,
            fault_ms,
            slowdown: if ran_ms > 0.0 { fault_ms / ran_ms } else { 0.0 },
            stopped_ms: stopped_ns as f64 / 1e6,
        }
    }

    /// What no schedule can do better than, at each moment of this migration and at the pause; and the earliest pause.
    /// The optimum's link is free from the migration's beginning on, and it observes nothing.
    fn least(&self, trace: &Trace) -> Result<Least, SimError> {
        let scenario = self.scenario;
        let rate = scenario.bandwidth_bytes_per_s;
        let budget_bytes = StopFloor::of(scenario, &self.sizes).budget_bytes(scenario);
        let mut bound = StopBound::new(trace, scenario.start_offset, scenario.seed, rate, LEAST_PAGE_BYTES)?;
        let mut earliest = None;
        let mut left_at = |at_ns: u64| {
            let at = Duration::from_nanos(at_ns);
            if let Some(budget) = budget_bytes.filter(|_| earliest.is_none() && bound.now() < scenario.horizon) {
                earliest = bound.find(budget, at.min(scenario.horizon)).map(|at| (at, bound.left_bytes()));
            }
            bound.advance_to(at);
            bound.left_bytes()
        };
        let mut at_pause = None;
        let mut left_bytes = Vec::with_capacity(self.moments.len());
        for moment in &self.moments {
            let stopped_ns = self.stopped_ns.filter(|&stopped_ns| stopped_ns <= moment.at_ns);
            left_bytes.push(match stopped_ns {
                None => left_at(moment.at_ns),
                // The guest writes no more, and what is left falls with the link's rate.
                Some(stopped_ns) => {
                    let left = *at_pause.get_or_insert_with(|| left_at(stopped_ns));
                    (left - rate as f64 * (moment.at_ns - stopped_ns) as f64 / 1e9).max(0.0)
                }
            });
        }
        left_at(nanoseconds(scenario.horizon));
        Ok(Least { left_bytes, at_pause, earliest })
    }

    fn ratios(&self, trace: &Trace, report: &Report, page_bytes: u64, least: &Least) -> Ratios {
        let floor = StopFloor::of(self.scenario, &self.sizes);
        let ms = |bytes: f64| bytes / self.scenario.bandwidth_bytes_per_s as f64 * 1e3;
        let downtime_ms = least.at_pause.map(|left| floor.downtime_ms(ms(left)));
        let total_ms = least.earliest.map(|(at, left)| at.as_secs_f64() * 1e3 + floor.downtime_ms(ms(left)));
        let once_bytes = each_page_once_bytes(trace);
        let completed = report.outcome == OutcomeKind::Completed;
        Ratios {
            page_bytes: once_bytes,
            pause_ms: least.earliest.map(|(at, _)| at.as_secs_f64() * 1e3),
            total_ms,
            copy_ms: least.at_pause.map(ms),
            downtime_ms,
            bytes_ratio: page_bytes as f64 / once_bytes as f64,
            excess_bytes: page_bytes as i64 - once_bytes as i64,
            excess_pages: (report.pages.sent + report.pages.zero) as i64 - trace.pages as i64,
            downtime_ratio: downtime_ms.filter(|_| completed).map(|least| report.downtime_ms / least),
            total_ratio: total_ms.filter(|_| completed).map(|least| report.total_ms / least),
        }
    }
}

/// A moment of the migration, as the source saw it.
struct Moment {
    at_ns: u64,
    pending_pages: u64,
    held_pages: u64,
    sent_bytes: u64,
}

/// What no schedule can do better than.
struct Least {
    /// S at each moment noted.
    left_bytes: Vec<f64>,
    /// S when the guest was stopped.
    at_pause: Option<f64>,
    /// The first moment at which S fits the limit, and S then.
    earliest: Option<(Duration, f64)>,
}

/// What no schedule can avoid in the stop phase beside copying pages.
pub(crate) struct StopFloor {
    /// What has to be done before the device state can be sent. Pages can cross meanwhile.
    before_ms: f64,
    /// What comes after: device state and messages on the link, loading, resuming, and the word that the guest runs.
    after_ms: f64,
}

impl StopFloor {
    pub(crate) fn of(scenario: &Scenario, sizes: &FrameSizes) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let stop = &scenario.stop;
        let device_bytes = sizes.whole_device_state(stop.device_state_bytes);
        let device_ms = device_bytes as f64 / scenario.bandwidth_bytes_per_s as f64 * 1e3;
        // Load, prepared, hand-over, running: each waits for the one before.
        let messages_ms = 4.0 * ms(scenario.latency);
        Self {
            before_ms: ms(stop.pause) + ms(stop.save),
            after_ms: device_ms + ms(stop.load) + ms(stop.resume) + messages_ms,
        }
    }

    /// The page bytes that can be copied within the downtime limit; `None` if not even the rest fits.
    fn budget_bytes(&self, scenario: &Scenario) -> Option<f64> {
        let limit_ms = scenario.downtime_limit.as_secs_f64() * 1e3;
        let copy_ms = limit_ms - self.after_ms;
        (copy_ms >= self.before_ms).then(|| copy_ms / 1e3 * scenario.bandwidth_bytes_per_s as f64)
    }

    /// The shortest downtime with pages to copy that take so long.
    pub(crate) fn downtime_ms(&self, copy_ms: f64) -> f64 {
        self.before_ms.max(copy_ms) + self.after_ms
    }
}

/// Adds `run`, lengthening the last one where it fits.
fn append(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first.0 => last.count += run.count,
        Some(_) | None => runs.push(run),
    }
}
