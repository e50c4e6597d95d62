//! The source's driver: carries out what the state machine asks for, and decides nothing.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use vmferry_core::engine::{
    Action, AtTimeLimit, ChangeError, Encoded, OutcomeKind, Report, SentPages, Source, SourceConfig, TimeLimit,
    Unfinished,
};
use vmferry_core::pages::{PAGE_BYTES, PageRun};
use vmferry_core::plan::{AtRead, IfStuck, Patience, PolicySpec};
use vmferry_core::predict::PredictorSpec;
use vmferry_core::wire::{
    Digests, Encoding, Join, MAX_DEVICE_CHUNK_BYTES, MAX_DIGESTS_PER_FRAME, MAX_PAGES_PER_FRAME, MAX_STREAMS,
    MAX_ZERO_RUNS_PER_FRAME, Message, MigrationId, Pages, STREAM_BLOCK_PAGES, page_digest, stream_of,
};

use crate::buffer::Buffer;
use crate::cancel::Cancel;
use crate::clock::processor_time;
use crate::compress::{
    BATCH_PAGES, Batch, Chooser, Codec, Compress, Content, DeltaCache, EncoderPool, Handed, Path, Plan, Twins, is_zero,
};
use crate::control::{Change, Command, Controls, Limits, Pages as PageCounts, Reason, Refusal, RefusalKind};
use crate::link::{Link, LinkError};
use crate::memory::GuestMemory;
use crate::socket::NetworkWatch;
use crate::vmm::{SourceVmm, VmmError, describe};

/// The most that a waiting driver sleeps before it looks at the clock again.
const WAIT_MAX: Duration = Duration::from_millis(200);
/// The part of an epoch for looking who owns which page: no page is sent meanwhile.
const OWNERS_SHARE: f64 = 0.05;
/// The most pages that a codec is tried on where pages go as they are.
const TRIAL_PAGES: u64 = 16;
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What the user wants.
#[derive(Debug, Clone)]
pub struct MigrateOptions {
    /// The longest pause.
    pub downtime_limit: Duration,
    /// The most bytes per second; `None`: as the path allows.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The most time until the pause, counted from the beginning; `None`: without end.
    pub time_limit: Option<Duration>,
    /// What happens when it is over.
    pub at_time_limit: AtTimeLimit,
    /// Who predicts the working set.
    pub predictor: PredictorSpec,
    /// Tell the guest's address spaces apart where the VMM can, so that each has a tree of its own.
    pub address_spaces: bool,
    /// Who decides what is held back, when to pause and when to give up.
    pub policy: PolicySpec,
    /// Policies that are asked along and not obeyed; the report says what they would have done.
    pub shadows: Vec<PolicySpec>,
    /// Compare digests of all pages before the hand-over.
    pub verify: bool,
    /// Time between scans; longer where they take long.
    pub epoch: Duration,
    /// How long to watch before pushing.
    pub observe: Duration,
    /// How long the target may be silent.
    pub stall_timeout: Duration,
    /// When to give up.
    pub patience: Patience,
    /// What to do then.
    pub if_stuck: IfStuck,
    /// What is done to pages to make them smaller.
    pub compress: Compress,
    /// The most connections that carry pages, the first one included.
    pub streams: u16,
    /// The most bytes of sent pages that are kept, so that a page written again goes as what differs; 0: none.
    pub delta_cache_bytes: u64,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            bandwidth_bytes_per_s: None,
            time_limit: None,
            at_time_limit: AtTimeLimit::Abort,
            predictor: PredictorSpec::default(),
            address_spaces: true,
            policy: PolicySpec::Vmferry,
            shadows: Vec::new(),
            verify: false,
            epoch: Duration::from_millis(50),
            observe: Duration::ZERO,
            stall_timeout: Duration::from_secs(10),
            patience: Patience { passes: 8, time: Duration::from_secs(5) },
            if_stuck: IfStuck::default(),
            compress: Compress::Auto,
            streams: default_streams(),
            delta_cache_bytes: 80 << 20,
        }
    }
}

/// The most connections by default.
const STREAMS_DEFAULT_MAX: usize = 4;

/// A connection for each processor, up to four.
pub fn default_streams() -> u16 {
    std::thread::available_parallelism().map_or(1, usize::from).min(STREAMS_DEFAULT_MAX) as u16
}

/// How far a migration is, for a display.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// What is going on.
    pub doing: &'static str,
    /// Since the beginning.
    pub elapsed: Duration,
    /// The guest's pages.
    pub total_pages: u64,
    /// Pages that the target does not have yet.
    pub pending_pages: u64,
    /// The pass under way, from 1.
    pub pass: u32,
    /// Bytes sent.
    pub wire_bytes: u64,
    /// Measured.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// The time until the guest runs on the target; `None` where that cannot be said.
    pub remaining: Option<Duration>,
    /// Why it has not ended.
    pub unfinished: Unfinished,
}

/// Moves the guest to whoever is at the other end of `stream`, by further connections to the same address if the other end
/// agrees. Until the hand-over is sent, the guest runs here again
/// whatever happens; the report says what did.
pub fn migrate(
    vmm: &mut dyn SourceVmm,
    stream: TcpStream,
    options: &MigrateOptions,
    cancel: &Cancel,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, VmmError> {
    migrate_with(vmm, stream, options, cancel, None, progress)
}

/// As [`migrate`]; shown and changed by `controls`, if there are any.
pub fn migrate_with(
    vmm: &mut dyn SourceVmm,
    stream: TcpStream,
    options: &MigrateOptions,
    cancel: &Cancel,
    controls: Option<&Controls>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, VmmError> {
    let peer = stream.peer_addr().map_err(LinkError::Io)?;
    let link = Link::new(stream, options.stall_timeout, cancel.clone())?;
    let total_pages = vmm.memory().layout().total_pages();
    let predictor = options.predictor.build(total_pages);
    let predicts = options.predictor != PredictorSpec::None;
    let observe = if predicts { options.observe } else { Duration::ZERO };
    let machine = vmm.machine();
    let cache = DeltaCache::new(options.delta_cache_bytes);
    let migration = migration_id()?;
    let config = SourceConfig {
        migration,
        layout: vmm.memory().layout().clone(),
        machine: machine.kind,
        vcpus: machine.vcpus,
        downtime_limit: options.downtime_limit,
        bandwidth_cap_bytes_per_s: options.bandwidth_bytes_per_s,
        epoch: options.epoch,
        observe,
        verify: options.verify,
        stall_timeout: options.stall_timeout,
        fixed: vmm.assumed_costs(),
        encodings: options.compress.encodings(!cache.is_off()),
        if_stuck: options.if_stuck,
        streams: options.streams.clamp(1, MAX_STREAMS),
    };
    let encoders = EncoderPool::new();
    let mut twins = Twins::new(total_pages, u64::from_le_bytes(random()?));
    if config.encodings.has_copies() {
        twins.prepare();
    }
    tracing::info!(migration = %config.migration, pages = total_pages, "migration begins");
    let mut source = Source::new(config, predictor, options.policy.build(options.patience));
    for shadow in &options.shadows {
        source.add_shadow(shadow.build(options.patience));
    }
    let time_limit = options.time_limit.map(|after| TimeLimit { after, answer: options.at_time_limit });
    source.set_time_limit(time_limit).expect("it has not begun");
    let driver = Driver {
        vmm,
        controls,
        at_time_limit: options.at_time_limit,
        migration,
        peer,
        stall_timeout: options.stall_timeout,
        cancel: cancel.clone(),
        links: vec![link],
        source,
        chooser: Chooser::new(options.compress, !cache.is_off(), encoders.parallel()),
        encoders,
        cache,
        twins,
        network: NetworkWatch::default(),
        batch: None,
        is_paused: false,
        start: Instant::now(),
        buffer: Buffer::default(),
        written: Vec::new(),
        epoch_scans: 0,
        tells_owners_apart: options.address_spaces && predicts,
        owners_allowance: options.epoch.mul_f64(OWNERS_SHARE),
        total_pages,
        told: Duration::ZERO,
        cancelled: false,
    };
    Ok(driver.run(cancel, progress))
}

struct Driver<'a> {
    vmm: &'a mut dyn SourceVmm,
    controls: Option<&'a Controls>,
    /// What is answered to a time limit that is set without an answer.
    at_time_limit: AtTimeLimit,
    migration: MigrationId,
    peer: SocketAddr,
    stall_timeout: Duration,
    cancel: Cancel,
    /// The first connection, and those that carry only pages.
    links: Vec<Link>,
    source: Source,
    chooser: Chooser,
    encoders: EncoderPool,
    /// What the target has of pages that are written again.
    cache: DeltaCache,
    /// Which pages of the target others can be copied from.
    twins: Twins,
    network: NetworkWatch,
    /// Being filled.
    batch: Option<Batch>,
    is_paused: bool,
    start: Instant,
    buffer: Buffer,
    written: Vec<PageRun>,
    /// Scans so far before which the guest ran.
    epoch_scans: u64,
    tells_owners_apart: bool,
    owners_allowance: Duration,
    total_pages: u64,
    told: Duration,
    cancelled: bool,
}

impl Driver<'_> {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn run(mut self, cancel: &Cancel, progress: &mut dyn FnMut(&Progress)) -> Report {
        if let Some(controls) = self.controls {
            controls.begin();
            self.publish();
        }
        loop {
            self.hear();
            if cancel.is_cancelled() {
                self.cancel();
            }
            self.obey();
            self.tell(progress);
            match self.source.poll_action(self.now()) {
                Some(Action::End) => break,
                Some(action) => {
                    if let Err(error) = self.perform(action) {
                        self.fail(&error);
                    }
                }
                None => {
                    let until = self.source.poll_timeout().unwrap_or(Duration::MAX);
                    let wait = until.saturating_sub(self.now()).min(WAIT_MAX);
                    if !wait.is_zero()
                        && let Err(error) = self.wait(wait)
                    {
                        self.fail(&VmmError::Link(error));
                    }
                }
            }
        }
        self.publish();
        let mut report = self.source.report(self.now());
        if let Some(controls) = self.controls {
            controls.end(Some(&report.outcome.to_string()));
        }
        report.address_spaces = self.vmm.owners_report();
        if report.outcome == OutcomeKind::Completed {
            tracing::info!(downtime_ms = report.downtime_ms, "the guest runs on the target");
        } else {
            let reason = report.reason.as_deref().unwrap_or("unknown");
            tracing::warn!(outcome = ?report.outcome, reason, "the migration did not complete");
        }
        report
    }

    /// Takes in everything that the target has said.
    fn hear(&mut self) {
        while !self.source.ended() {
            let now = self.start.elapsed();
            match self.links[0].receive() {
                Ok(None) => return,
                Ok(Some((message, _))) => {
                    if let Message::Progress { bytes } = message {
                        self.chooser.confirmed(now, bytes);
                    }
                    self.source.handle_message(now, &message);
                }
                Err(LinkError::Closed) => return self.source.handle_connection_lost(now),
                Err(error) => return self.fail(&VmmError::Link(error)),
            }
        }
    }

    fn fail(&mut self, error: &VmmError) {
        let now = self.now();
        match error {
            VmmError::Link(LinkError::Closed) => {
                // The target may have said why before it closed: on the first connection, whichever of them it was.
                if self.links.len() > 1 {
                    self.links[0].wait_for_reason();
                }
                self.hear();
                self.source.handle_connection_lost(now);
            }
            VmmError::Link(LinkError::Cancelled) => self.source.handle_cancel(now),
            VmmError::Link(_)
            | VmmError::Qemu(_)
            | VmmError::Control(_)
            | VmmError::Embedded(_)
            | VmmError::Track(_)
            | VmmError::Memory(_)
            | VmmError::Pages(_)
            | VmmError::Unfit { .. }
            | VmmError::Refused { .. }
            | VmmError::DeviceStateTooLarge { .. }
            | VmmError::DeviceStateLate { .. }
            | VmmError::NotRunning { .. }
            | VmmError::Throttle(_)
            | VmmError::Host { .. } => self.source.handle_failure(now, describe(error)),
        }
    }

    fn tell(&mut self, progress: &mut dyn FnMut(&Progress)) {
        let elapsed = self.now();
        if elapsed.saturating_sub(self.told) >= PROGRESS_INTERVAL {
            self.told = elapsed;
            self.publish();
            let estimate = self.source.estimate(elapsed);
            progress(&Progress {
                doing: self.source.doing(),
                elapsed,
                total_pages: self.total_pages,
                pending_pages: self.source.pending_pages(),
                pass: self.source.passes() + 1,
                wire_bytes: self.source.wire_bytes(),
                bandwidth_bytes_per_s: self.source.bandwidth_bytes_per_s(),
                remaining: estimate.remaining,
                unfinished: estimate.unfinished,
            });
        }
    }

    fn cancel(&mut self) {
        if !self.cancelled {
            self.cancelled = true;
            self.links.iter_mut().for_each(Link::ignore_cancel);
            self.source.handle_cancel(self.now());
        }
    }

    /// Waits until the target has said something, a command came, or the time is over.
    fn wait(&self, time: Duration) -> Result<(), LinkError> {
        self.links[0].wait_for(true, [self.controls.map(Controls::waker), None], time)
    }

    /// Carries out the commands that came.
    fn obey(&mut self) {
        let Some(controls) = self.controls else { return };
        for (ticket, command) in controls.take_commands() {
            tracing::info!(?command, "a command from the control socket");
            let result = self.carry_out(command);
            self.publish();
            controls.answer(ticket, result.map_err(refusal));
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<(), ChangeError> {
        let now = self.now();
        match command {
            Command::Set(change) => self.set(now, &change),
            Command::Hold => self.source.hold_push(now),
            Command::Continue => self.source.continue_push(now),
            Command::Cancel if self.source.handed_over() => Err(ChangeError::TooLate { doing: self.source.doing() }),
            Command::Cancel => {
                // At once, before the next action can be the hand-over.
                self.cancel();
                Ok(())
            }
        }
    }

    /// All of the change or nothing: what can be refused last is refused first.
    fn set(&mut self, now: Duration, change: &Change) -> Result<(), ChangeError> {
        if let Some(limit) = change.downtime_limit {
            self.source.set_downtime_limit(limit)?;
        }
        if change.time_limit.is_some() || change.at_time_limit.is_some() {
            let answer = change.at_time_limit.unwrap_or(self.at_time_limit);
            let after = change.time_limit.unwrap_or(self.source.time_limit().map(|limit| limit.after));
            self.source.set_time_limit(after.map(|after| TimeLimit { after, answer }))?;
            self.at_time_limit = answer;
        }
        match change.bandwidth_bytes_per_s {
            Some(cap) => self.source.set_bandwidth_cap(now, cap),
            None => Ok(()),
        }
    }

    /// Has the control socket show how far it is.
    fn publish(&self) {
        let Some(controls) = self.controls else { return };
        let (now, source) = (self.now(), &self.source);
        let estimate = source.estimate(now);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        controls.publish(|status| {
            status.migration_id = Some(self.migration.to_string());
            status.doing = source.doing().to_owned();
            status.elapsed_ms = ms(now);
            let (pending, held) = (source.pending_pages(), source.held_pages());
            status.pages = Some(PageCounts { total: self.total_pages, pending, held });
            status.pass = Some(source.passes() + 1);
            status.wire_bytes = source.wire_bytes();
            status.bandwidth_bytes_per_s = source.bandwidth_bytes_per_s();
            status.limits = Some(Limits {
                bandwidth_bytes_per_s: source.bandwidth_cap_bytes_per_s(),
                downtime_limit_ms: ms(source.downtime_limit()),
                time_limit_ms: source.time_limit().map(|limit| ms(limit.after)),
                at_time_limit: self.at_time_limit.name().to_owned(),
            });
            status.is_held = source.push_is_held();
            status.eta_ms = estimate.remaining.map(ms);
            let (kind, text) = (estimate.unfinished.kind().to_owned(), estimate.unfinished.to_string());
            status.reason = Some(Reason { kind, text });
        });
    }

    /// What is found out beside what was written, at the end of each epoch: who owns which page, and what the pause will take. The
    /// first scan only begins one; both take a while the first time, which comes at the second, when pages are under way.
    fn end_epoch(&mut self) {
        if self.epoch_scans > 0 {
            if self.tells_owners_apart && self.epoch_scans == 1 {
                self.vmm.tell_owners_apart();
            } else if self.tells_owners_apart {
                self.vmm.refresh_owners(self.owners_allowance);
            }
            self.source.handle_fixed_costs(self.vmm.fixed_costs());
        }
        self.epoch_scans += 1;
    }

    fn perform(&mut self, action: Action) -> Result<(), VmmError> {
        tracing::trace!(?action);
        match action {
            Action::Send(message) => {
                if matches!(message, Message::HandOver(_)) {
                    self.vmm.released();
                }
                let bytes = self.links[0].send(&message)?;
                self.source.handle_message_sent(self.now(), bytes);
            }
            Action::OpenStreams { streams } => {
                let bytes = self.open_streams(streams)?;
                self.twins.set_streams(streams);
                self.source.handle_streams_opened(self.now(), bytes);
            }
            Action::Scan { relaxed } => {
                self.written.clear();
                let stats = self.vmm.scan(relaxed, &mut self.written)?;
                // Not in the stop phase: there is nothing to learn for any more.
                if relaxed {
                    self.end_epoch();
                }
                self.source.handle_scan(self.start.elapsed(), stats.duration, &self.written, self.vmm.owners());
            }
            Action::SendPages { runs, at_read } => {
                let sent = self.send_pages(&runs, at_read)?;
                tracing::trace!(bytes = sent.bytes(), working = ?sent.working, encoding = ?sent.encoding, delta = sent.delta.pages);
                self.source.handle_pages_sent(self.now(), &sent);
            }
            Action::ScanHoles => {
                let holes = self.vmm.memory().holes()?;
                self.source.handle_holes(self.now(), &holes);
            }
            Action::Pause => {
                tracing::debug!(pending = self.source.pending_pages(), "pausing the guest");
                let stopped_at = self.vmm.pause()?.saturating_duration_since(self.start);
                self.is_paused = true;
                self.source.handle_paused(self.now(), stopped_at);
            }
            Action::SendDeviceState => {
                let (state_bytes, wire_bytes) = self.send_device_state()?;
                self.source.handle_device_state_sent(self.now(), state_bytes, wire_bytes);
            }
            Action::SendDigests => {
                let bytes = self.send_digests()?;
                self.source.handle_digests_sent(self.now(), bytes);
            }
            Action::Resume => {
                self.vmm.resume()?;
                self.source.handle_resumed(self.now());
            }
            Action::Throttle { share } => {
                tracing::debug!(share, "the guest's share of its processor time");
                self.vmm.throttle(share)?;
                self.source.handle_throttled(self.now());
            }
            Action::End => {}
        }
        Ok(())
    }

    /// Reads and sends pages. Where they are encoded, that goes on beside reading and sending, and has ended when this
    /// returns.
    fn send_pages(&mut self, runs: &[PageRun], at_read: AtRead) -> Result<SentPages, VmmError> {
        // Left over from an action that failed: what is in them may have been written since.
        self.batch = None;
        while self.encoders.take().is_some() {}
        let (starts, waited, began_working) = (self.now(), self.waited(), processor_time());
        let stream_bytes = self.source.wire_bytes();
        let (is_filled, under_way) = (self.source.path_is_filled(), self.source.in_flight_bytes());
        // Where it is not filled, what is under way says nothing: on a long path an answer takes its time, too.
        let network_has_most = self.network.has_most(self.links.iter().map(Link::kernel_sent), stream_bytes, under_way);
        let path = Path {
            bandwidth_bytes_per_s: self.source.bandwidth_bytes_per_s(),
            cap_bytes_per_s: self.source.bandwidth_cap_bytes_per_s(),
            encodings: self.source.encodings(),
            is_filled,
            is_full: is_filled && network_has_most,
            network_bytes_per_s: self.network.bytes_per_s(),
            is_paused: self.is_paused,
            may_be_deltas: runs.iter().flat_map(|run| run.pages()).any(|page| self.cache.contains(page)),
        };
        let plan = self.chooser.plan(self.now(), &path);
        let (is_straight, mut trial) = (plan.is_straight(), plan.trial);
        let mut sent = SentPages::default();
        let mut zero = ZeroRuns::new(self.source.streams());
        let armed;
        let to_send = match at_read {
            AtRead::Ignore => runs,
            AtRead::Rearm | AtRead::Skip => {
                let began = processor_time();
                armed = self.arm(runs, at_read == AtRead::Skip, &mut sent)?;
                sent.arming = processor_time().saturating_sub(began);
                &armed
            }
        };
        for &run in to_send {
            if !is_straight || trial.is_some() {
                let tried = if is_straight { TRIAL_PAGES } else { u64::MAX };
                let (first, rest) = run.split_front(tried);
                self.encode_run(first, &plan, &mut trial, &mut zero, &mut sent)?;
                if is_straight {
                    self.give_batch(&mut trial, &mut zero, &mut sent)?;
                }
                if let Some(rest) = rest {
                    self.send_run(rest, &mut zero, &mut sent)?;
                }
            } else {
                self.send_run(run, &mut zero, &mut sent)?;
            }
        }
        if self.encoders.is_idle() {
            // For so few pages another thread would not be awake in time.
            if let Some(mut batch) = self.batch.take() {
                batch.trial = trial.take();
                self.encoders.encode(&mut batch);
                self.send_batch(batch, &mut zero, &mut sent)?;
            }
        } else {
            self.give_batch(&mut trial, &mut zero, &mut sent)?;
        }
        while let Some(batch) = self.encoders.take() {
            self.send_batch(batch, &mut zero, &mut sent)?;
        }
        while let Some(stream) = zero.waiting() {
            self.send_zero(stream, &mut zero, &mut sent)?;
        }
        for link in &mut self.links {
            link.flush()?;
        }
        if !self.cache.is_empty() {
            for &run in to_send {
                let is_kept = run.pages().map(|page| self.cache.contains(page));
                sent.kept.extend(run.stretches(is_kept).filter(|&(_, is_kept)| is_kept).map(|(run, _)| run));
            }
        }
        let now = self.now();
        // What others do on the machine meanwhile does not count: the guest is one of them, and stands still in the pause.
        let driver = processor_time().saturating_sub(began_working + sent.arming);
        sent.busy = (now - starts).saturating_sub(self.waited() - waited);
        sent.working = driver + sent.encoding / self.encoders.workers();
        // Zero pages and copies are few bytes and some work on either side: where there are many, the bytes say little.
        let zero_pages: u64 = sent.zero.iter().map(|run| run.count).sum();
        let content_pages = sent.content_pages() - sent.copy.pages;
        let is_mostly_content = content_pages > zero_pages + sent.copy.pages;
        let handed = Handed {
            began: sent.began.unwrap_or(now),
            busy: sent.busy.saturating_sub(sent.arming),
            all_raw: is_mostly_content && sent.raw_pages == content_pages,
            is_plain: is_mostly_content && sent.delta.pages == 0,
            content_bytes: content_pages * PAGE_BYTES,
            from_bytes: stream_bytes,
            to_bytes: stream_bytes + sent.bytes(),
        };
        self.chooser.handed(now, &handed);
        Ok(sent)
    }

    /// Arms pages again before they are read: whatever is written from here on is reported by a later scan. Returns those to be
    /// sent: all of them, or those that were not written.
    fn arm(&mut self, runs: &[PageRun], skip: bool, sent: &mut SentPages) -> Result<Vec<PageRun>, VmmError> {
        let mut to_send = Vec::with_capacity(runs.len());
        for &run in runs {
            self.written.clear();
            self.vmm.scan_run(run, &mut self.written)?;
            let inside = if skip { &mut sent.skipped } else { &mut sent.written };
            let before = inside.len();
            for &found in &self.written {
                split_by(found, run, inside, &mut sent.bystanders);
            }
            if skip {
                to_send.extend(run.without(&inside[before..]));
            } else {
                to_send.push(run);
            }
        }
        Ok(to_send)
    }

    /// Reads pages into batches, and gives those that are full to the encoders.
    fn encode_run(
        &mut self,
        run: PageRun,
        plan: &Plan,
        trial: &mut Option<Codec>,
        zero: &mut ZeroRuns,
        sent: &mut SentPages,
    ) -> Result<(), VmmError> {
        // Where some of the action's pages go another way, they leave in another order than they are read in.
        let finds_twins = self.source.encodings().has_copies() && !plan.is_straight();
        self.twins.look_at_all(self.source.path_is_filled());
        let mut left = Some(run);
        while let Some(run) = left {
            // Not before more pages come: the last ones the driver encodes itself.
            if self.batch.as_ref().is_some_and(|batch| batch.room_pages() == 0) {
                self.give_batch(trial, zero, sent)?;
            }
            let batch = self.batch.get_or_insert_with(|| self.encoders.batch());
            (batch.codec, batch.light) = (plan.codec, plan.light);
            (batch.expected_share, batch.keeps) = (plan.expected_share, plan.deltas);
            batch.streams = self.links.len() as u16;
            // A trial is for little.
            batch.pages_max = if trial.is_some() { BATCH_PAGES } else { plan.batch_pages };
            let (piece, rest) = run.split_front(block_pages(self.links.len(), run).min(batch.room_pages()));
            left = rest;
            let memory = self.vmm.memory();
            batch.read(piece, |buffer| memory.read(piece, buffer))?;
            if plan.deltas {
                batch.compare(&mut self.cache);
            }
            if finds_twins {
                batch.find_twins(&mut self.twins);
            } else {
                self.twins.forget_run(piece);
            }
        }
        Ok(())
    }

    /// Gives the batch under way to the encoders, if there is one, and sends what they have done meanwhile.
    fn give_batch(
        &mut self,
        trial: &mut Option<Codec>,
        zero: &mut ZeroRuns,
        sent: &mut SentPages,
    ) -> Result<(), VmmError> {
        let Some(mut batch) = self.batch.take() else { return Ok(()) };
        batch.trial = trial.take();
        if self.encoders.is_full()
            && let Some(first) = self.encoders.take()
        {
            self.send_batch(first, zero, sent)?;
        }
        self.encoders.give(batch);
        while let Some(ready) = self.encoders.take_ready() {
            self.send_batch(ready, zero, sent)?;
        }
        Ok(())
    }

    /// Sends what became of a batch.
    fn send_batch(&mut self, batch: Batch, zero: &mut ZeroRuns, sent: &mut SentPages) -> Result<(), VmmError> {
        let costs = batch.costs();
        sent.encoding += costs.time;
        self.chooser.encoded(self.now(), batch.codec, batch.trial, &costs);
        for content in batch.contents() {
            match content {
                Content::Zero(run) => {
                    self.push_zero(run, zero, sent)?;
                }
                Content::Pages(pages, held) => {
                    self.begin(sent);
                    let (count_pages, encoding) = (pages.runs.pages(), pages.encoding);
                    let bytes = self.queue_pages(pages, sent)?;
                    count(encoding, Encoded { pages: count_pages, bytes }, sent);
                    // To keep pages of which nothing is known costs time, the first time much of it, and saves some perhaps.
                    let has_time = self.chooser.network_limits();
                    for (page, content) in held.new_pages() {
                        let takes_any = has_time && self.cache.takes_any();
                        if batch.keeps && (takes_any || self.source.is_written_again(page)) {
                            self.cache.put(page, content);
                        } else {
                            self.cache.remove(page);
                        }
                    }
                }
            }
        }
        self.encoders.recycle(batch);
        Ok(())
    }

    /// Bytes of an action are about to leave: the first ones say when it began.
    fn begin(&self, sent: &mut SentPages) {
        sent.began.get_or_insert(self.start.elapsed());
    }

    /// Opens further connections until there are so many; the bytes sent on them.
    fn open_streams(&mut self, streams: u16) -> Result<u64, VmmError> {
        let mut bytes = 0;
        for stream in self.links.len() as u16..streams {
            let connection = TcpStream::connect_timeout(&self.peer, self.stall_timeout)
                .map_err(|source| VmmError::Host { what: "open a further connection to the target", source })?;
            let mut link = Link::new(connection, self.stall_timeout, self.cancel.clone())?;
            bytes += link.send(&Message::Join(Join { migration: self.migration, stream }))?;
            self.links.push(link);
        }
        Ok(bytes)
    }

    /// How long it was waited for the path so far.
    fn waited(&self) -> Duration {
        self.links.iter().map(Link::waited).sum()
    }

    /// Sends pages, all of one connection, by it, perhaps with what follows.
    fn queue_pages(&mut self, pages: Pages<'_>, sent: &mut SentPages) -> Result<u64, VmmError> {
        let stream = stream_of(pages.runs[0].first, self.links.len() as u16);
        let bytes = self.links[usize::from(stream)].queue(&Message::Pages(pages))?;
        sent.side_bytes += if stream == 0 { 0 } else { bytes };
        Ok(bytes)
    }

    /// Notes pages as zero.
    fn push_zero(&mut self, run: PageRun, zero: &mut ZeroRuns, sent: &mut SentPages) -> Result<(), VmmError> {
        self.forget(run);
        let mut left = Some(run);
        while let Some(run) = left {
            let (piece, rest) = run.split_front(block_pages(self.links.len(), run));
            left = rest;
            let stream = stream_of(piece.first, self.links.len() as u16);
            if zero.push(stream, piece) {
                self.send_zero(stream, zero, sent)?;
            }
        }
        Ok(())
    }

    fn send_zero(&mut self, stream: u16, zero: &mut ZeroRuns, sent: &mut SentPages) -> Result<(), VmmError> {
        self.begin(sent);
        let runs = zero.take(stream);
        sent.zero.extend_from_slice(&runs);
        let bytes = self.links[usize::from(stream)].send(&Message::Zero(runs))?;
        sent.zero_bytes += bytes;
        sent.side_bytes += if stream == 0 { 0 } else { bytes };
        Ok(())
    }

    /// The target gets other content for these pages than what is kept of them.
    fn forget(&mut self, run: PageRun) {
        self.twins.forget_run(run);
        if !self.cache.is_empty() {
            run.pages().for_each(|page| self.cache.remove(page));
        }
    }

    /// Reads pages and sends them as they are.
    fn send_run(&mut self, run: PageRun, zero: &mut ZeroRuns, sent: &mut SentPages) -> Result<(), VmmError> {
        let mut left = Some(run);
        while let Some(run) = left {
            let (piece, rest) = run.split_front(block_pages(self.links.len(), run).min(MAX_PAGES_PER_FRAME));
            left = rest;
            let buffer = self.buffer.room((piece.count * PAGE_BYTES) as usize);
            self.vmm.memory().read(piece, buffer)?;
            let are_zero = buffer.chunks_exact(PAGE_BYTES as usize).map(is_zero);
            let stretches: Vec<_> = piece.stretches(are_zero).collect();
            for (stretch, is_zero) in stretches {
                if is_zero {
                    self.push_zero(stretch, zero, sent)?;
                } else {
                    self.forget(stretch);
                    self.begin(sent);
                    let data = page_bytes(piece, &self.buffer, stretch);
                    let stream = stream_of(stretch.first, self.links.len() as u16);
                    let bytes = self.links[usize::from(stream)].send(&Message::Pages(Pages::raw(stretch, data)))?;
                    sent.raw_pages += stretch.count;
                    sent.raw_bytes += bytes;
                    sent.side_bytes += if stream == 0 { 0 } else { bytes };
                }
            }
        }
        Ok(())
    }

    fn send_device_state(&mut self) -> Result<(u64, u64), VmmError> {
        let (mut state_bytes, mut wire_bytes) = (0, 0);
        let link = &mut self.links[0];
        self.vmm.save_device_state(&mut |piece| {
            for chunk in piece.chunks(MAX_DEVICE_CHUNK_BYTES) {
                state_bytes += chunk.len() as u64;
                wire_bytes += link.send(&Message::DeviceState(chunk))?;
            }
            Ok(())
        })?;
        Ok((state_bytes, wire_bytes))
    }

    fn send_digests(&mut self) -> Result<u64, VmmError> {
        let mut bytes = 0;
        let mut left = Some(PageRun::new(0, self.total_pages));
        while let Some(run) = left {
            // Small enough that the target compares while the next ones are computed.
            let (piece, rest) = run.split_front(MAX_DIGESTS_PER_FRAME.min(4096));
            left = rest;
            let buffer = self.buffer.room((MAX_PAGES_PER_FRAME * PAGE_BYTES) as usize);
            let digests = digests(self.vmm.memory(), piece, buffer)?;
            bytes += self.links[0].send(&Message::Digests(Digests { first: piece.first.0, digests }))?;
        }
        Ok(bytes)
    }
}

fn refusal(error: ChangeError) -> Refusal {
    let kind = match error {
        ChangeError::TooLate { .. } => RefusalKind::TooLate,
        _ => RefusalKind::BadValue,
    };
    Refusal::new(kind, error.to_string())
}

/// Counts pages by how they went.
fn count(encoding: Encoding, pages: Encoded, sent: &mut SentPages) {
    let to = match encoding {
        Encoding::Raw => {
            sent.raw_pages += pages.pages;
            sent.raw_bytes += pages.bytes;
            return;
        }
        Encoding::Lz4 => &mut sent.lz4,
        Encoding::Zstd => &mut sent.zstd,
        Encoding::Delta { .. } => &mut sent.delta,
        Encoding::Copy { .. } => &mut sent.copy,
    };
    to.pages += pages.pages;
    to.bytes += pages.bytes;
}

/// Digests of the pages of `run`, read through `buffer`, which holds at least one page.
pub(crate) fn digests(memory: &GuestMemory, run: PageRun, buffer: &mut [u8]) -> Result<Vec<u64>, VmmError> {
    let mut digests = Vec::with_capacity(run.count as usize);
    let mut left = Some(run);
    while let Some(run) = left {
        let (piece, rest) = run.split_front(buffer.len() as u64 / PAGE_BYTES);
        left = rest;
        let content = &mut buffer[..(piece.count * PAGE_BYTES) as usize];
        memory.read(piece, content)?;
        digests.extend(content.chunks_exact(PAGE_BYTES as usize).map(page_digest));
    }
    Ok(digests)
}

/// So many pages of the run are in the block of its first one; all of them, where there is one connection.
fn block_pages(streams: usize, run: PageRun) -> u64 {
    if streams == 1 { run.count } else { STREAM_BLOCK_PAGES - run.first.0 % STREAM_BLOCK_PAGES }
}

/// The runs of zero pages that go in one message, for each connection.
#[derive(Debug)]
struct ZeroRuns(Vec<Vec<PageRun>>);

impl ZeroRuns {
    fn new(streams: u16) -> Self {
        Self(vec![Vec::new(); usize::from(streams)])
    }

    /// Adds a run, of one block; whether the message is full.
    fn push(&mut self, stream: u16, run: PageRun) -> bool {
        let is_only = self.0.len() == 1;
        let runs = &mut self.0[usize::from(stream)];
        match runs.last_mut() {
            Some(last) if last.end() == run.first.0 && (is_only || !run.first.0.is_multiple_of(STREAM_BLOCK_PAGES)) => {
                last.count += run.count;
            }
            Some(_) | None => runs.push(run),
        }
        runs.len() as u64 >= MAX_ZERO_RUNS_PER_FRAME
    }

    /// The first connection for which there is a message.
    fn waiting(&self) -> Option<u16> {
        self.0.iter().position(|runs| !runs.is_empty()).map(|stream| stream as u16)
    }

    fn take(&mut self, stream: u16) -> Vec<PageRun> {
        std::mem::take(&mut self.0[usize::from(stream)])
    }
}

/// Adds the pages of `found` that are in `run` to `inside`, the others to `outside`.
fn split_by(found: PageRun, run: PageRun, inside: &mut Vec<PageRun>, outside: &mut Vec<PageRun>) {
    let add = |first: u64, end: u64, to: &mut Vec<PageRun>| {
        if first < end {
            to.push(PageRun::new(first, end - first));
        }
    };
    let (first, end) = (found.first.0, found.end());
    add(first, end.min(run.first.0), outside);
    add(first.max(run.first.0), end.min(run.end()), inside);
    add(first.max(run.end()), end, outside);
}

/// The bytes of `stretch` in the content of `run`.
fn page_bytes(run: PageRun, content: &[u8], stretch: PageRun) -> &[u8] {
    let start = (stretch.first.0 - run.first.0) * PAGE_BYTES;
    &content[start as usize..(start + stretch.count * PAGE_BYTES) as usize]
}

fn migration_id() -> Result<MigrationId, VmmError> {
    random().map(MigrationId)
}

/// Bytes that nobody knows.
fn random<const N: usize>() -> Result<[u8; N], VmmError> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)
            .map_err(|source| VmmError::Host { what: "draw random numbers", source: source.into() })?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_the_run_and_tell_zero_pages() {
        let page = PAGE_BYTES as usize;
        let mut content = vec![0; 6 * page];
        content[page] = 1;
        content[3 * page - 1] = 1;
        content[5 * page + 4095] = 1;
        let run = PageRun::new(10, 6);
        let found: Vec<_> = run.stretches(content.chunks_exact(page).map(is_zero)).collect();
        let expected = [
            (PageRun::new(10, 1), true),
            (PageRun::new(11, 2), false),
            (PageRun::new(13, 2), true),
            (PageRun::new(15, 1), false),
        ];
        assert_eq!(found, expected);
        assert_eq!(page_bytes(run, &content, PageRun::new(11, 2)), &content[page..3 * page]);
    }

    #[test]
    fn what_a_widened_scan_found_is_told_apart() {
        for (found, inside, outside) in [
            (PageRun::new(0, 100), vec![PageRun::new(10, 5)], vec![PageRun::new(0, 10), PageRun::new(15, 85)]),
            (PageRun::new(11, 2), vec![PageRun::new(11, 2)], vec![]),
            (PageRun::new(8, 4), vec![PageRun::new(10, 2)], vec![PageRun::new(8, 2)]),
            (PageRun::new(0, 10), vec![], vec![PageRun::new(0, 10)]),
            (PageRun::new(15, 3), vec![], vec![PageRun::new(15, 3)]),
        ] {
            let (mut within, mut beyond) = (Vec::new(), Vec::new());
            split_by(found, PageRun::new(10, 5), &mut within, &mut beyond);
            assert_eq!((within, beyond), (inside, outside), "{found:?}");
        }
    }

    #[test]
    fn migration_ids_differ() {
        assert_ne!(migration_id().unwrap(), migration_id().unwrap());
    }
}
