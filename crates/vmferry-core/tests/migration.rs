//! Whole migrations between both state machines, on a virtual clock and network, from a seed.
//!
//! After every step: at most one side runs the guest, and the guest's memory at the hand-over is the same on both. At
//! the end the guest runs exactly where the outcome says. A failure prints its seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmferry_core::engine::{
    Action, Apply, AtTimeLimit, ChangeError, OutcomeKind, PauseCause, Report, SentPages, SideStream, Source,
    SourceConfig, Target, TargetAction, TargetConfig, TargetOutcome, TimeLimit, Unfinished,
};
use vmferry_core::pages::{
    AddressSpaceId, Owners, PAGE_BYTES, PageNumber, PageRun, PageSet, RamBlock, RamLayout, WholeGuest,
};
use vmferry_core::plan::{
    AtRead, Decision, Facts, FixedCosts, Hold, IfStuck, MIN_SHARE, Moment, Patience, Policy, PolicySpec, PushRules,
};
use vmferry_core::predict::{NoPrediction, Predictor, RankedPage, WorkingSetConfig, WorkingSetPredictor};
use vmferry_core::wire::{
    DeltaCodec, Digests, Encoding, Encodings, FrameReader, FrameWriter, HEADER_BYTES, Header, Join, Message,
    MigrationId, PageRuns, Pages, VERSION_MAX, Welcome, page_digest, stream_of,
};

const PAGES: u64 = 600;
const PATIENCE: Patience = Patience { passes: 5, time: Duration::from_millis(500) };
const STEP: Duration = Duration::from_micros(500);
const LATENCY: Duration = Duration::from_micros(300);
const DEVICE_STATE: &[u8] = b"registers and timers";

/// SplitMix64 (Steele, Lea, Flood 2014): enough randomness for a test, and the same everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Four address spaces with a quarter of the pages each.
#[derive(Debug)]
struct Quarters;

impl Owners for Quarters {
    fn owner_of(&self, run: PageRun) -> (AddressSpaceId, u64) {
        let quarter = run.first.0 / (PAGES / 4);
        (AddressSpaceId(quarter as u32), run.count.min((quarter + 1) * (PAGES / 4) - run.first.0))
    }
}

/// Who predicts and who decides.
#[derive(Debug, Clone, Copy)]
struct Arm {
    predict: bool,
    policy: PolicySpec,
}

impl Arm {
    const DEFAULT: Self = Self { predict: true, policy: PolicySpec::Vmferry };
    const PLAIN: Self = Self { predict: false, policy: PolicySpec::Vmferry };

    /// Each policy in turn, every other time without a predictor.
    fn of(seed: u64) -> Self {
        let policy = PolicySpec::ALL[(seed / 2 % PolicySpec::ALL.len() as u64) as usize];
        Self { predict: seed.is_multiple_of(2), policy }
    }
}

/// What goes wrong, and at which frame or action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// This frame to the target, counted from 0, and everything after it is lost; nobody is told.
    SilenceToTarget(u64),
    /// The same on the way back.
    SilenceToSource(u64),
    /// The connection breaks at this frame to the target, and both sides notice.
    Cut(u64),
    /// One bit of this frame to the target is flipped.
    Flip(u64),
    /// This frame to the target is lost alone.
    Drop(u64),
    /// This frame to the target comes twice.
    Repeat(u64),
    /// The user cancels on the source before its action with this number.
    Cancel(u64),
    /// The source's driver fails at its action with this number.
    SourceFails(u64),
    /// The target's VMM refuses the device state.
    LoadFails,
    /// The target's VMM does not run the guest although it was handed over.
    RunFails,
}

struct Guest {
    hot_pages: u64,
    writes_per_ms: u64,
    /// Saving the device state writes guest memory.
    save_writes: bool,
    /// A balloon gives pages back now and then, which the tracking does not see.
    discards: bool,
    /// Pages that are armed and reported together: more than one on huge pages.
    granule: u64,
}

struct World {
    seed: u64,
    random: Random,
    fault: Fault,
    now: Duration,
    guest: Guest,
    rate_bytes_per_s: f64,
    verify: bool,

    source: Source,
    source_memory: Vec<u8>,
    source_runs: bool,
    /// What the guest keeps of its processor time, and the writes that it is behind by.
    share: f64,
    writes_due: f64,
    /// Throttling fails, and so often does giving all back.
    failing_throttles: Option<u32>,
    written: PageSet,
    discarded: PageSet,
    /// What the target was sent, where pages that were sent before go as what differs.
    sent_memory: Option<Vec<Option<Vec<u8>>>>,
    /// Also of pages that are not known to be written again.
    keeps_any: bool,
    actions: u64,
    memory_at_hand_over: Option<Vec<u8>>,

    target: Target,
    target_memory: Vec<u8>,
    target_runs: bool,
    device_state: Vec<u8>,

    to_target: Wire,
    to_source: Wire,
    /// A second connection to the target, on which everything is late.
    to_side: Wire,
    side: Option<SideStream>,
    side_bytes: u64,
}

/// How late.
const SIDE_DELAY: Duration = Duration::from_millis(15);

/// One direction of the connection.
struct Wire {
    writer: FrameWriter,
    reader: FrameReader,
    frames: VecDeque<(Duration, Vec<u8>)>,
    free_at: Duration,
    sent: u64,
    silent: bool,
    cut: bool,
}

impl Wire {
    fn new() -> Self {
        Self {
            writer: FrameWriter::new(),
            reader: FrameReader::new(),
            frames: VecDeque::new(),
            free_at: Duration::ZERO,
            sent: 0,
            silent: false,
            cut: false,
        }
    }

    /// Puts a message on its way; the bytes that it takes.
    fn send(&mut self, now: Duration, rate: f64, message: &Message<'_>) -> u64 {
        let mut frame = Vec::new();
        self.writer.seal(message, &mut frame);
        let bytes = frame.len() as u64;
        self.free_at = self.free_at.max(now) + Duration::from_secs_f64(bytes as f64 / rate);
        if !self.silent && !self.cut {
            self.frames.push_back((self.free_at + LATENCY, frame));
        }
        self.sent += 1;
        bytes
    }

    fn arrived(&mut self, now: Duration) -> Option<Vec<u8>> {
        let (at, _) = self.frames.front()?;
        if *at > now {
            return None;
        }
        self.frames.pop_front().map(|(_, frame)| frame)
    }
}

fn open<'a>(reader: &mut FrameReader, frame: &'a [u8]) -> Result<Message<'a>, String> {
    let header = Header::parse(frame.first_chunk().unwrap()).map_err(|error| error.to_string())?;
    reader.open(header, &frame[HEADER_BYTES..]).map_err(|error| error.to_string())
}

fn layout() -> RamLayout {
    RamLayout::new(vec![
        RamBlock { id: "low".into(), bytes: 100 * PAGE_BYTES },
        RamBlock { id: "high".into(), bytes: (PAGES - 100) * PAGE_BYTES },
    ])
    .unwrap()
}

fn source_config(seed: u64, predict: bool, verify: bool) -> SourceConfig {
    SourceConfig {
        migration: MigrationId([seed as u8; 16]),
        layout: layout(),
        machine: "test".into(),
        vcpus: 1,
        downtime_limit: Duration::from_millis(60),
        bandwidth_cap_bytes_per_s: None,
        epoch: Duration::from_millis(10),
        observe: if predict { Duration::from_millis(50) } else { Duration::ZERO },
        verify,
        stall_timeout: Duration::from_millis(400),
        fixed: FixedCosts { time: Duration::from_millis(3), device_state_bytes: 100 },
        encodings: if seed.is_multiple_of(3) { Encodings::ALL } else { Encodings::ALL.without_deltas() },
        if_stuck: IfStuck::Abort,
        streams: if seed.is_multiple_of(2) { 1 } else { 2 },
    }
}

fn predictor(predict: bool) -> Box<dyn Predictor> {
    if predict {
        Box::new(WorkingSetPredictor::new(WorkingSetConfig::for_guest(PAGES)))
    } else {
        Box::new(NoPrediction)
    }
}

impl World {
    fn new(seed: u64, guest: Guest, rate_bytes_per_s: f64, fault: Fault, arm: Arm) -> Self {
        let Arm { predict, policy } = arm;
        let mut random = Random(seed);
        let bytes = (PAGES * PAGE_BYTES) as usize;
        let mut source_memory = vec![0; bytes];
        for page in source_memory.chunks_mut(PAGE_BYTES as usize).step_by(2) {
            page[..8].copy_from_slice(&random.next().to_le_bytes());
        }
        // The target's memory is not fresh: whatever is there must be overwritten.
        let target_memory = (0..bytes).map(|i| (i % 251) as u8).collect();
        let verify = random.below(2) == 0;
        let config = source_config(seed, predict, verify);
        let target = TargetConfig {
            layout: layout(),
            machine: "test".into(),
            vcpus: 1,
            stall_timeout: Duration::from_millis(400),
            encodings: Encodings::ALL,
            streams: 2,
        };
        Self {
            seed,
            random,
            fault,
            now: Duration::ZERO,
            guest,
            rate_bytes_per_s,
            verify,
            source: Source::new(config, predictor(predict), policy.build(PATIENCE)),
            source_memory,
            source_runs: true,
            share: 1.0,
            writes_due: 0.0,
            failing_throttles: None,
            written: PageSet::full(PAGES),
            discarded: PageSet::empty(PAGES),
            sent_memory: seed.is_multiple_of(3).then(|| vec![None; PAGES as usize]),
            keeps_any: !seed.is_multiple_of(2),
            actions: 0,
            memory_at_hand_over: None,
            target: Target::new(target),
            target_memory,
            target_runs: false,
            device_state: Vec::new(),
            to_target: Wire::new(),
            to_source: Wire::new(),
            to_side: Wire::new(),
            side: None,
            side_bytes: 0,
        }
    }

    fn write_page(&mut self, page: u64) {
        let value = self.random.next();
        let at = (page * PAGE_BYTES + 8 * self.random.below(PAGE_BYTES / 8)) as usize;
        self.source_memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        if self.random.below(8) == 0 {
            // Sometimes a page becomes zero again.
            self.source_memory[(page * PAGE_BYTES) as usize..][..PAGE_BYTES as usize].fill(0);
        }
        self.written.insert(PageNumber(page));
        self.discarded.remove(PageNumber(page));
    }

    fn discard_page(&mut self, page: u64) {
        self.source_memory[(page * PAGE_BYTES) as usize..][..PAGE_BYTES as usize].fill(0);
        self.discarded.insert(PageNumber(page));
    }

    fn run_guest(&mut self) {
        if self.source_runs {
            self.writes_due += (self.guest.writes_per_ms * STEP.as_micros() as u64 / 1000) as f64 * self.share;
            while self.writes_due >= 1.0 {
                self.writes_due -= 1.0;
                let hot = self.random.below(20) != 0;
                let page = self.random.below(if hot { self.guest.hot_pages } else { PAGES });
                self.write_page((page * 7) % PAGES);
            }
            if self.guest.discards && self.random.below(10) == 0 {
                let page = self.random.below(PAGES);
                self.discard_page(page);
            }
        }
    }

    fn send_to_target(&mut self, message: &Message<'_>) -> u64 {
        let frame = self.to_target.sent;
        match self.fault {
            Fault::SilenceToTarget(at) if frame >= at => {
                self.to_target.silent = true;
                self.to_side.silent = true;
            }
            Fault::Cut(at) if frame >= at => {
                self.to_target.cut = true;
                self.to_side.cut = true;
                self.to_source.cut = true;
            }
            _ => {}
        }
        let bytes = self.to_target.send(self.now, self.rate_bytes_per_s, message);
        match self.fault {
            Fault::Flip(at) if frame == at => {
                if let Some((_, bytes)) = self.to_target.frames.back_mut() {
                    let index = self.random.below(bytes.len() as u64) as usize;
                    bytes[index] ^= 1;
                }
            }
            Fault::Drop(at) if frame == at => drop(self.to_target.frames.pop_back()),
            Fault::Repeat(at) if frame == at => {
                let again = self.to_target.frames.back().cloned();
                self.to_target.frames.extend(again);
            }
            _ => {}
        }
        bytes
    }

    /// Sends pages or notes of them by their own connection; the bytes that they take.
    fn send_pages_of(&mut self, stream: u16, message: &Message<'_>, sent: &mut SentPages) -> u64 {
        if stream == 0 {
            return self.send_to_target(message);
        }
        let bytes = self.to_side.send(self.now + SIDE_DELAY, self.rate_bytes_per_s, message);
        sent.side_bytes += bytes;
        bytes
    }

    fn scan(&mut self) -> Vec<PageRun> {
        self.scan_run(PageRun::new(0, PAGES))
    }

    /// Reports and re-arms whole granules, those that `run` touches.
    fn scan_run(&mut self, run: PageRun) -> Vec<PageRun> {
        let size = self.guest.granule;
        let mut found = PageSet::empty(PAGES);
        for granule in run.first.0 / size..run.end().div_ceil(size) {
            let granule = PageRun::new(granule * size, size);
            let written = granule.pages().filter(|&page| self.written.remove(page)).count();
            if written > 0 {
                found.insert_run(granule);
            }
        }
        found.runs().collect()
    }

    fn send_pages(&mut self, runs: &[PageRun], at_read: AtRead) -> SentPages {
        let mut sent = SentPages::default();
        let streams = self.source.streams();
        let mut zero = vec![Vec::new(); usize::from(streams)];
        for page in runs.iter().flat_map(|run| run.pages()) {
            let run = PageRun::new(page.0, 1);
            let stream = stream_of(page, streams);
            if at_read != AtRead::Ignore {
                let mut was_written = false;
                for found in self.scan_run(run).iter().flat_map(|run| run.pages()) {
                    was_written |= found == page;
                    let to = match at_read {
                        _ if found != page => &mut sent.bystanders,
                        AtRead::Skip => &mut sent.skipped,
                        AtRead::Rearm | AtRead::Ignore => &mut sent.written,
                    };
                    to.push(PageRun::new(found.0, 1));
                }
                if was_written && at_read == AtRead::Skip {
                    continue;
                }
            }
            let at = (page.0 * PAGE_BYTES) as usize;
            let content = self.source_memory[at..at + PAGE_BYTES as usize].to_vec();
            let is_zero = content.iter().all(|&byte| byte == 0);
            let is_kept = !is_zero && (self.keeps_any || self.source.is_written_again(page));
            let base = self.sent_memory.as_mut().and_then(|sent| {
                let kept = is_kept.then(|| content.clone());
                std::mem::replace(&mut sent[page.0 as usize], kept)
            });
            if self.sent_memory.is_some() && is_kept {
                sent.kept.push(run);
            }
            let delta = base.map(|base| difference(&base, &content));
            let encoding = Encoding::Delta { codec: DeltaCodec::Plain, digest: page_digest(&content) };
            match delta {
                _ if is_zero => zero[usize::from(stream)].push(run),
                Some(data) if Pages::is_shorter(&PageRuns::One(run), encoding, data.len()) => {
                    let message = Message::Pages(Pages { runs: PageRuns::One(run), encoding, data: &data });
                    sent.delta.bytes += self.send_pages_of(stream, &message, &mut sent);
                    sent.delta.pages += 1;
                }
                Some(_) | None => {
                    let message = Message::Pages(Pages::raw(run, &content));
                    sent.raw_bytes += self.send_pages_of(stream, &message, &mut sent);
                    sent.raw_pages += 1;
                }
            }
        }
        for (stream, zero) in zero.into_iter().enumerate() {
            if !zero.is_empty() {
                sent.zero.extend_from_slice(&zero);
                sent.zero_bytes += self.send_pages_of(stream as u16, &Message::Zero(zero), &mut sent);
            }
        }
        sent
    }

    fn drive_source(&mut self) -> bool {
        for _ in 0..100 {
            if self.fault == Fault::Cancel(self.actions) {
                self.source.handle_cancel(self.now);
            }
            let Some(action) = self.source.poll_action(self.now) else { return false };
            self.actions += 1;
            if self.fault == Fault::SourceFails(self.actions) && action != Action::End {
                self.source.handle_failure(self.now, "the driver failed".into());
                continue;
            }
            match action {
                Action::Send(message) => {
                    if matches!(message, Message::HandOver(_)) {
                        assert!(!self.source_runs, "handed over while running");
                        self.memory_at_hand_over = Some(self.source_memory.clone());
                    }
                    let bytes = self.send_to_target(&message);
                    self.source.handle_message_sent(self.now, bytes);
                }
                Action::OpenStreams { streams } => {
                    assert_eq!(streams, 2);
                    let migration = MigrationId([self.seed as u8; 16]);
                    let join = Message::Join(Join { migration, stream: 1 });
                    let bytes = self.to_side.send(self.now + SIDE_DELAY, self.rate_bytes_per_s, &join);
                    self.source.handle_streams_opened(self.now, bytes);
                }
                Action::Scan { .. } => {
                    let runs = self.scan();
                    self.source.handle_scan(self.now, Duration::from_micros(50), &runs, &Quarters);
                }
                Action::ScanHoles => {
                    let holes: Vec<PageRun> = self.discarded.runs().collect();
                    self.source.handle_holes(self.now, &holes);
                }
                Action::SendPages { runs, at_read } => {
                    let sent = self.send_pages(&runs, at_read);
                    self.source.handle_pages_sent(self.now, &sent);
                }
                Action::Pause => {
                    self.run_guest();
                    self.source_runs = false;
                    self.source.handle_paused(self.now, self.now);
                }
                Action::SendDeviceState => {
                    if self.guest.save_writes {
                        let page = self.random.below(PAGES);
                        self.write_page(page);
                    }
                    let bytes = self.send_to_target(&Message::DeviceState(DEVICE_STATE));
                    self.source.handle_device_state_sent(self.now, DEVICE_STATE.len() as u64, bytes);
                }
                Action::SendDigests => {
                    let digests = self.source_memory.chunks(PAGE_BYTES as usize).map(page_digest).collect();
                    let bytes = self.send_to_target(&Message::Digests(Digests { first: 0, digests }));
                    self.source.handle_digests_sent(self.now, bytes);
                }
                Action::Resume => {
                    assert!(!self.source.handed_over(), "resumed after the hand-over");
                    self.source_runs = true;
                    self.source.handle_resumed(self.now);
                }
                Action::Throttle { share } => {
                    assert!(self.source_runs && !self.source.handed_over(), "throttled where nobody runs");
                    assert!((MIN_SHARE..=1.0).contains(&share), "{share}");
                    if let Some(left) = self.failing_throttles {
                        // The first one, which slows the guest, fails in any case.
                        if share < 1.0 || left > 0 {
                            self.failing_throttles = Some(left - u32::from(share == 1.0));
                            self.source.handle_failure(self.now, "no control group".into());
                            continue;
                        }
                    }
                    self.share = share;
                    self.source.handle_throttled(self.now);
                }
                Action::End => return true,
            }
            self.check_one_runs();
        }
        panic!("the source never rests");
    }

    /// The source with nobody at the other end, and a guest that writes the same pages in each epoch.
    fn drive_until_pages_are_sent(&mut self, owners: &dyn Owners, written: &[PageRun]) {
        let mut scans = 0;
        loop {
            match self.source.poll_action(self.now) {
                Some(Action::Send(message)) => {
                    self.source.handle_message_sent(self.now, 100);
                    if let Message::Hello(hello) = message {
                        let (version, migration) = (VERSION_MAX, hello.migration);
                        let welcome = Welcome { version, migration, encodings: Encodings::RAW, streams: 1 };
                        let welcome = Message::Welcome(welcome);
                        self.source.handle_message(self.now, &welcome);
                    }
                }
                Some(Action::Scan { .. }) => {
                    scans += 1;
                    self.source.handle_scan(self.now, Duration::ZERO, written, owners);
                }
                Some(Action::SendPages { .. }) => break,
                Some(action) => panic!("{action:?}"),
                None => self.now += Duration::from_millis(1),
            }
            assert!(scans < 100, "no page is sent");
        }
    }

    fn apply(&mut self, apply: Apply, message: &Message<'_>) -> Vec<u64> {
        let range = |run: PageRun| (run.first.0 * PAGE_BYTES) as usize..(run.end() * PAGE_BYTES) as usize;
        match (apply, message) {
            (Apply::WritePages, Message::Pages(pages)) => {
                let PageRuns::One(run) = pages.runs else { panic!("{:?}", pages.runs) };
                let memory = &mut self.target_memory[range(run)];
                if let Encoding::Delta { digest, .. } = pages.encoding {
                    for change in pages.data.chunks_exact(3) {
                        memory[usize::from(u16::from_le_bytes([change[0], change[1]]))] = change[2];
                    }
                    assert_eq!(page_digest(memory), digest, "a delta that fits");
                } else {
                    memory.copy_from_slice(pages.data);
                }
            }
            (Apply::ZeroPages, Message::Zero(runs)) => {
                runs.iter().for_each(|&run| self.target_memory[range(run)].fill(0));
            }
            (Apply::KeepDeviceState, Message::DeviceState(piece)) => self.device_state.extend_from_slice(piece),
            (Apply::Compare(run), Message::Digests(digests)) => {
                let found = self.target_memory[range(run)].chunks(PAGE_BYTES as usize).map(page_digest);
                let differs = found.zip(&digests.digests).enumerate().filter(|(_, (found, sent))| found != *sent);
                return differs.map(|(index, _)| run.first.0 + index as u64).collect();
            }
            (Apply::Nothing, _) => {}
            (apply, message) => panic!("{apply:?} for {}", message.name()),
        }
        Vec::new()
    }

    fn drive_target(&mut self) -> bool {
        self.drive_side();
        while self.target.wants_message()
            && let Some(frame) = self.to_target.arrived(self.now)
        {
            let mut reader = std::mem::take(&mut self.to_target.reader);
            match open(&mut reader, &frame) {
                Ok(message) => {
                    let apply = self.target.handle_message(self.now, &message, frame.len() as u64);
                    let mismatched = self.apply(apply, &message);
                    self.target.handle_applied(apply, &mismatched);
                }
                Err(error) => self.target.handle_failure(error),
            }
            self.to_target.reader = reader;
        }
        if self.to_target.cut && self.to_target.frames.is_empty() {
            self.target.handle_connection_lost();
        }
        for _ in 0..100 {
            match self.target.poll_action(self.now) {
                None => return false,
                Some(TargetAction::Send(message)) => {
                    if let Fault::SilenceToSource(at) = self.fault
                        && self.to_source.sent >= at
                    {
                        self.to_source.silent = true;
                    }
                    self.to_source.send(self.now, self.rate_bytes_per_s, &message);
                }
                Some(TargetAction::Load) => {
                    if self.fault == Fault::LoadFails {
                        self.target.handle_failure("the VMM refused the device state".into());
                    } else {
                        assert_eq!(self.device_state, DEVICE_STATE);
                        self.target.handle_loaded(self.now);
                    }
                }
                Some(TargetAction::Run) => {
                    let memory = self.memory_at_hand_over.as_ref().expect("run without a hand-over");
                    assert!(*memory == self.target_memory, "the memories differ at the hand-over");
                    if self.fault == Fault::RunFails {
                        self.target.handle_failure("the VMM does not run".into());
                    } else {
                        self.target_runs = true;
                        self.target.handle_running(self.now);
                    }
                }
                Some(TargetAction::End) => return true,
            }
            self.check_one_runs();
        }
        panic!("the target never rests");
    }

    fn drive_side(&mut self) {
        while let Some(frame) = self.to_side.arrived(self.now) {
            let mut reader = std::mem::take(&mut self.to_side.reader);
            let message = open(&mut reader, &frame).expect("the further connection is clean");
            let side = self.side.get_or_insert_with(|| self.target.side_stream().expect("a source was accepted"));
            match side.handle_message(&message) {
                Ok(apply) => {
                    assert!(!self.target_runs, "memory of a running guest is written");
                    self.apply(apply, &message);
                    self.side_bytes += frame.len() as u64;
                    self.target.handle_side_bytes(self.now, self.side_bytes);
                }
                Err(error) => self.target.handle_failure(error.to_string()),
            }
            self.to_side.reader = reader;
        }
    }

    fn hear_target(&mut self) {
        while let Some(frame) = self.to_source.arrived(self.now) {
            let message = open(&mut self.to_source.reader, &frame).expect("the way back is clean");
            self.source.handle_message(self.now, &message);
        }
        if self.to_source.cut && self.to_source.frames.is_empty() {
            self.source.handle_connection_lost(self.now);
        }
    }

    fn check_one_runs(&self) {
        assert!(!(self.source_runs && self.target_runs), "the guest runs on both sides");
        assert!(!self.target_runs || self.source.handed_over(), "the target runs without a hand-over");
    }

    /// One step of everything; whether both sides have ended.
    fn step(&mut self) -> bool {
        self.run_guest();
        self.hear_target();
        let source_ended = self.drive_source();
        let target_ended = self.drive_target();
        self.now += STEP;
        source_ended && (target_ended || self.target.poll_timeout().is_none())
    }

    /// Runs until both sides have ended, and checks that the guest is where it should be.
    fn migrate(mut self) -> (Report, Option<TargetOutcome>) {
        let fault = self.fault;
        let steps = (0..200_000).take_while(|_| !self.step()).count();
        assert!(self.source.ended(), "not ended after {steps} steps: {}", self.source.doing());
        let report = self.source.report(self.now);
        match report.outcome {
            OutcomeKind::Completed => {
                assert!(self.target_runs && !self.source_runs);
                assert_eq!(self.target.outcome(), Some(&TargetOutcome::Running));
                assert_eq!(report.pages.sent + report.pages.zero - report.pages.resent, PAGES);
                if let Some(verify) = report.verify {
                    assert_eq!((verify.pages, verify.mismatched), (PAGES, 0));
                }
            }
            OutcomeKind::InDoubt => assert!(!self.source_runs, "in doubt, the source must stay quiet"),
            OutcomeKind::Cancelled | OutcomeKind::NotConverged | OutcomeKind::Failed => {
                assert!(self.source_runs, "{fault:?}: not handed over, so the source must run: {report:?}");
                assert_eq!(self.share, 1.0, "{fault:?}: the guest is still slowed: {report:?}");
                assert!(!self.target_runs);
            }
        }
        (report, self.target.outcome().cloned())
    }
}

/// The bytes that differ and where they are; the first byte in any case.
fn difference(base: &[u8], content: &[u8]) -> Vec<u8> {
    let differing = (0..content.len()).filter(|&at| at == 0 || base[at] != content[at]);
    differing.flat_map(|at| [at as u8, (at >> 8) as u8, content[at]]).collect()
}

fn calm() -> Guest {
    Guest { hot_pages: 30, writes_per_ms: 10, save_writes: true, discards: false, granule: 1 }
}

/// A guest picked by the seed; all converge on the link of 20 MB/s.
fn guest(random: &mut Random) -> Guest {
    Guest {
        hot_pages: 1 + random.below(120),
        writes_per_ms: random.below(12),
        save_writes: random.below(2) == 0,
        discards: false,
        granule: 1,
    }
}

#[test]
fn undisturbed_migrations_complete_with_equal_memory() {
    for seed in 0..60 {
        let guest = guest(&mut Random(seed + 1000));
        let (report, _) = World::new(seed, guest, 20e6, Fault::None, Arm::of(seed)).migrate();
        assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}: {report:#?}");
    }
}

#[test]
fn every_fault_at_every_moment_leaves_one_guest() {
    let mut outcomes = [0_u32; 5];
    for seed in 0..1000 {
        let mut random = Random(seed + 5000);
        let guest = guest(&mut random);
        // The first frames matter as much as the many in the middle.
        let at = random.below(if seed % 2 == 0 { 60 } else { 1500 });
        let fault = match random.below(10) {
            0 => Fault::SilenceToTarget(at),
            1 => Fault::SilenceToSource(at / 2),
            2 => Fault::Cut(at),
            3 => Fault::Flip(at),
            4 => Fault::Drop(at),
            5 => Fault::Repeat(at),
            6 => Fault::Cancel(at / 4),
            7 => Fault::SourceFails(at / 4),
            8 => Fault::LoadFails,
            _ => Fault::RunFails,
        };
        let result = std::panic::catch_unwind(|| World::new(seed, guest, 20e6, fault, Arm::of(seed / 7)).migrate());
        let (report, _) = result.unwrap_or_else(|_| panic!("seed {seed}, fault {fault:?}"));
        outcomes[report.outcome as usize] += 1;
    }
    // The test is worth something only if the faults reach all kinds of ends.
    for (kind, least) in [
        (OutcomeKind::Completed, 50),
        (OutcomeKind::Cancelled, 20),
        (OutcomeKind::Failed, 200),
        (OutcomeKind::InDoubt, 20),
    ] {
        assert!(outcomes[kind as usize] >= least, "{outcomes:?}");
    }
}

/// Each frame from the target matters near the hand-over: lose everything from each of the last ones on.
#[test]
fn a_lost_answer_is_in_doubt_and_never_two_guests() {
    let mut world = World::new(77, calm(), 20e6, Fault::None, Arm::DEFAULT);
    while !world.step() {}
    let frames = world.to_source.sent;
    let mut in_doubt = 0;
    for lost in frames.saturating_sub(6)..=frames {
        let (report, target) = World::new(77, calm(), 20e6, Fault::SilenceToSource(lost), Arm::DEFAULT).migrate();
        if report.outcome == OutcomeKind::InDoubt {
            in_doubt += 1;
            assert_eq!(target, Some(TargetOutcome::Running), "the hand-over arrived, only the answer was lost");
        }
    }
    assert_eq!(in_doubt, 1, "exactly the loss of the last frame leaves doubt");
}

#[test]
fn a_storm_that_never_fits_leaves_the_guest_running_and_says_why() {
    let storm = Guest { hot_pages: PAGES, writes_per_ms: 200, save_writes: false, discards: false, granule: 1 };
    let (report, target) = World::new(8, storm, 5e6, Fault::None, Arm::DEFAULT).migrate();
    assert_eq!(report.outcome, OutcomeKind::NotConverged);
    assert!(report.reason.unwrap().contains("--downtime-limit"));
    assert!(matches!(target, Some(TargetOutcome::Failed { handed_over: false, loaded: false, .. })));
}

/// The point of it all: holding the working set back sends fewer bytes than plain pre-copy on the same guest.
#[test]
fn holding_the_working_set_back_saves_resends() {
    let guest = || Guest { hot_pages: 30, writes_per_ms: 4, save_writes: false, discards: false, granule: 1 };
    let (with, _) = World::new(9, guest(), 5e6, Fault::None, Arm::DEFAULT).migrate();
    let (without, _) = World::new(9, guest(), 5e6, Fault::None, Arm::PLAIN).migrate();
    assert_eq!((with.outcome, without.outcome), (OutcomeKind::Completed, OutcomeKind::Completed));
    assert!(with.pages.resent < without.pages.resent, "{} resent, {} without", with.pages.resent, without.pages.resent);
    assert!(with.working_set.precision.unwrap() > 0.8, "{:?}", with.working_set);
    assert!(with.downtime_ms <= with.downtime_limit_ms, "{with:#?}");
}

/// A page that the target has goes as a small delta: so hot pages are sent once before they are held back, and the guest is
/// paused for what differs only.
#[test]
fn where_deltas_are_small_hot_pages_are_sent_once_before_they_are_held() {
    // All of it is written again and again, and content fits no pause.
    let run = |deltas: bool, keeps_any: bool| {
        let guest = Guest { hot_pages: PAGES, writes_per_ms: 40, ..calm() };
        let mut world = World::new(6, guest, 12e6, Fault::None, Arm::DEFAULT);
        world.sent_memory = deltas.then(|| vec![None; PAGES as usize]);
        world.keeps_any = keeps_any;
        world.migrate().0
    };
    // Or twice: what was sent before it was seen written is not kept, and goes as a whole page again.
    for keeps_any in [true, false] {
        let with = run(true, keeps_any);
        assert_eq!(with.outcome, OutcomeKind::Completed, "{with:#?}");
        assert!(with.pages.delta > 0 && with.pages.held == 0, "{:?}", with.pages);
        assert!(with.downtime_ms <= with.downtime_limit_ms, "{with:#?}");
    }
    let without = run(false, true);
    assert_eq!(without.outcome, OutcomeKind::NotConverged, "{without:#?}");
}

/// RAM on huge pages is armed in larger units than it is sent. A page that was re-armed because its neighbour was about to
/// be read was taken as sent, and a write to it from before was lost.
#[test]
fn neighbours_that_are_re_armed_with_a_page_are_not_lost() {
    for seed in 0..20 {
        let huge = Guest { hot_pages: 40, writes_per_ms: 4, granule: 8, ..calm() };
        let (report, _) = World::new(seed, huge, 40e6, Fault::None, Arm::of(seed)).migrate();
        assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}: {report:#?}");
    }
}

/// A balloon gives memory back behind the tracking's back. With digests compared, that must not look like corruption.
#[test]
fn discarded_pages_are_zero_on_the_target_where_that_is_verified() {
    let mut verified = 0;
    for seed in 0..30 {
        let ballooned = Guest { discards: true, ..calm() };
        let mut world = World::new(seed, ballooned, 20e6, Fault::None, Arm::DEFAULT);
        // Without verification the memories may differ in discarded pages, and the final comparison would fail.
        if !world.verify {
            continue;
        }
        world.source_memory.fill(3);
        let (report, _) = world.migrate();
        assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}: {report:#?}");
        verified += 1;
    }
    assert!(verified > 5, "{verified} of 30 seeds verify");
}

#[test]
fn a_target_that_differs_refuses_at_once() {
    let mut world = World::new(1, calm(), 20e6, Fault::None, Arm::DEFAULT);
    world.target = Target::new(TargetConfig {
        layout: RamLayout::new(vec![RamBlock { id: "low".into(), bytes: PAGE_BYTES }]).unwrap(),
        machine: "test".into(),
        vcpus: 1,
        stall_timeout: Duration::from_millis(400),
        encodings: Encodings::ALL,
        streams: 1,
    });
    let (report, _) = world.migrate();
    assert_eq!(report.outcome, OutcomeKind::Failed);
    assert!(report.reason.unwrap().contains("the RAM is"), "says what differs");
    assert_eq!(report.pages.sent, 0);
}

/// What the two sides agreed on is all that is sent and accepted.
#[test]
fn encodings_that_were_not_agreed_on_are_refused() {
    let target = |encodings| {
        let (layout, machine) = (layout(), "test".to_owned());
        let stall_timeout = Duration::from_secs(1);
        Target::new(TargetConfig { layout, machine, vcpus: 1, stall_timeout, encodings, streams: 1 })
    };
    let offer = |encodings| {
        let mut source =
            Source::new(SourceConfig { encodings, ..source_config(1, false, false) }, Box::new(NoPrediction), {
                PolicySpec::Vmferry.build(PATIENCE)
            });
        match source.poll_action(Duration::ZERO) {
            Some(Action::Send(message)) => (source, message),
            other => panic!("{other:?}"),
        }
    };
    let now = Duration::ZERO;
    for (offered, known, agreed) in
        [(Encodings::ALL, Encodings(0b11), Encodings(0b11)), (Encodings::RAW, Encodings::ALL, Encodings::RAW)]
    {
        let (mut source, hello) = offer(offered);
        let mut target = target(known);
        target.handle_message(now, &hello, 100);
        let Some(TargetAction::Send(welcome)) = target.poll_action(now) else { panic!("no welcome") };
        source.handle_message_sent(now, 100);
        source.handle_message(now, &welcome);
        assert_eq!((source.error(), source.encodings()), (None, agreed));
        let delta = Encoding::Delta { codec: DeltaCodec::Plain, digest: 0 };
        let pages = Message::Pages(Pages { runs: PageRuns::One(PageRun::new(0, 1)), encoding: delta, data: &[1] });
        assert_eq!(target.handle_message(now, &pages, 100), Apply::Nothing);
        let Some(TargetOutcome::Failed { error, handed_over: false, .. }) = target.outcome() else {
            panic!("accepted")
        };
        assert!(error.to_string().contains("encoding 3"), "{error}");
    }
    // A target that answers with more than was offered.
    let (mut source, _) = offer(Encodings(0b11));
    source.handle_message_sent(now, 100);
    let (version, migration) = (VERSION_MAX, MigrationId([1; 16]));
    let welcome = Welcome { version, migration, encodings: Encodings::ALL, streams: 1 };
    source.handle_message(now, &Message::Welcome(welcome));
    assert_eq!(
        source.error().map(ToString::to_string).as_deref(),
        Some("the target's welcome does not answer our hello")
    );
}

/// Where a scan takes long, as of a large guest, the push and the guest have most of the time all the same.
#[test]
fn long_scans_are_made_less_often() {
    for (took_ms, stall_s, pause_ms) in
        [(0, 60, 10), (1, 60, 10), (20, 60, 160), (80, 60, 640), (400, 60, 1000), (400, 4, 500)]
    {
        let mut world = World::new(1, calm(), 20e6, Fault::None, Arm::DEFAULT);
        let config = SourceConfig {
            stall_timeout: Duration::from_secs(stall_s),
            downtime_limit: Duration::from_secs(10),
            ..source_config(1, true, false)
        };
        world.source = Source::new(config, Box::new(NoPrediction), PolicySpec::Vmferry.build(PATIENCE));
        world.drive_until_pages_are_sent(&WholeGuest, &[]);
        let sent = SentPages { raw_pages: 300, raw_bytes: 1 << 20, ..SentPages::default() };
        // Nothing is confirmed, and the window is full.
        world.source.handle_pages_sent(world.now, &sent);
        world.source.handle_message(world.now, &Message::Pong(1));
        let (mut scanned, mut pauses) = (world.now, Vec::new());
        while pauses.len() < 20 {
            match world.source.poll_action(world.now) {
                Some(Action::Scan { .. }) => {
                    pauses.push((world.now - scanned).as_millis());
                    world.now += ms(took_ms);
                    scanned = world.now;
                    world.source.handle_scan(world.now, ms(took_ms), &[PageRun::new(7, 1)], &WholeGuest);
                }
                Some(Action::Send(message)) => {
                    world.source.handle_message_sent(world.now, 24);
                    if let Message::Ping(number) = message {
                        world.source.handle_message(world.now, &Message::Pong(number));
                    }
                }
                Some(action) => panic!("{action:?}, {:?}", world.source.error()),
                None => world.now += ms(1),
            }
        }
        let last = *pauses.last().unwrap();
        assert!(last.abs_diff(pause_ms) <= pause_ms / 10, "scans of {took_ms} ms: {pauses:?}");
    }
}

/// Where the path or the target became slower than it was, much is under way at the end: the guest was paused for all of it.
#[test]
fn what_is_under_way_arrives_before_the_guest_is_paused() {
    for seed in 0..6 {
        let idle = Guest { writes_per_ms: 0, ..calm() };
        let mut world = World::new(seed, idle, 16e6, Fault::None, Arm::DEFAULT);
        let config = SourceConfig {
            downtime_limit: Duration::from_secs(1),
            epoch: Duration::from_millis(50),
            ..source_config(seed, true, false)
        };
        world.source = Source::new(config, Box::new(NoPrediction), PolicySpec::Vmferry.build(PATIENCE));
        let (mut under_way, mut most) = (0, 0);
        while world.source_runs {
            under_way = world.source.in_flight_bytes();
            most = under_way.max(most);
            if world.source.report(world.now).pages.sent > 200 {
                world.rate_bytes_per_s = 4e6;
            }
            world.step();
        }
        // 150 ms of the slow path, and 25.
        assert!(most > 600_000 && under_way < 100_000, "seed {seed}: {under_way} bytes, at most {most}");
        assert_eq!(world.migrate().0.outcome, OutcomeKind::Completed);
    }
}

/// What is held back fits the limit, and is seldom written: most of it is sent while the guest still runs.
#[test]
fn what_is_held_back_is_sent_before_the_pause_where_that_makes_it_shorter() {
    let stop_pages = |writes_per_ms: u64, share: f64| {
        let pages = (0..6).map(|seed| {
            let guest = Guest { hot_pages: 12, writes_per_ms, save_writes: false, ..calm() };
            let mut world = World::new(seed, guest, 1e6, Fault::None, Arm::DEFAULT);
            world.sent_memory = None;
            let config = SourceConfig {
                downtime_limit: ms(300),
                observe: ms(3000),
                encodings: Encodings::ALL.without_deltas(),
                ..source_config(seed, true, false)
            };
            world.source = Source::new(config, predictor(true), PolicySpec::Vmferry.build(PATIENCE));
            // Nothing is throttled: this makes the guest write less than once in a step.
            world.share = share;
            let report = world.migrate().0;
            assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}: {report:#?}");
            report.pages.stop
        });
        pages.collect::<Vec<_>>()
    };
    // All of it takes some 80 ms, in which a few are written, or all of them; before, 15 to 31 were left of the former.
    let (seldom, often) = (stop_pages(2, 0.02), stop_pages(2, 1.0));
    assert!(seldom.iter().sum::<u64>() <= 60, "{seldom:?}");
    assert!(often.iter().all(|&pages| pages >= 15), "{often:?}");
}

/// Another policy, that now and then has everything sent at once, whatever is left.
#[derive(Debug)]
struct Erratic {
    random: Random,
    other: Box<dyn Policy>,
}

impl Policy for Erratic {
    fn name(&self) -> &'static str {
        "erratic"
    }

    fn rules(&self) -> PushRules {
        self.other.rules()
    }

    fn hold(&self, facts: &Facts, heats: &[f64], other_heat: f64) -> Hold {
        self.other.hold(facts, heats, other_heat)
    }

    fn decide(&mut self, moment: Moment, facts: &Facts) -> Decision {
        if self.random.below(3) == 0 { Decision::SendAll } else { self.other.decide(moment, facts) }
    }
}

#[test]
fn all_can_be_sent_at_any_moment() {
    for seed in 0..60 {
        let arm = Arm::of(seed);
        let guest = Guest { granule: if seed.is_multiple_of(5) { 8 } else { 1 }, ..guest(&mut Random(seed + 1000)) };
        let mut world = World::new(seed, guest, 20e6, Fault::None, arm);
        let policy = Erratic { random: Random(seed + 7), other: arm.policy.build(PATIENCE) };
        // In the longer one all is sent before the next scan.
        let epoch = if seed % 3 == 1 { ms(60) } else { ms(10) };
        let config = SourceConfig { epoch, ..source_config(seed, arm.predict, world.verify) };
        world.source = Source::new(config, predictor(arm.predict), Box::new(policy));
        world.step_for(ms(40));
        if world.source_runs && seed.is_multiple_of(4) {
            // It is held and goes on meanwhile.
            let now = world.now;
            if world.source.hold_push(now).is_ok() {
                world.step_for(ms(30));
                let now = world.now;
                world.source.continue_push(now).unwrap();
            }
        }
        let report = world.migrate().0;
        assert!(
            matches!(report.outcome, OutcomeKind::Completed | OutcomeKind::NotConverged),
            "seed {seed}: {report:#?}"
        );
    }
}

/// A driver that lost the connection while it sent pages heard a confirmation of bytes that it had not reported yet, and
/// the report blamed the target for it.
#[test]
fn confirmations_of_bytes_that_are_not_counted_yet_do_not_hide_why_it_failed() {
    let mut world = World::new(1, calm(), 20e6, Fault::None, Arm::PLAIN);
    world.drive_until_pages_are_sent(&WholeGuest, &[]);
    world.source.handle_message(world.now, &Message::Progress { bytes: world.source.wire_bytes() + 1 });
    assert_eq!(world.source.error(), None);
    world.source.handle_connection_lost(world.now);
    let error = world.source.error().unwrap().to_string();
    assert!(error.contains("the connection to the target was lost"), "{error}");
}

/// What each address space wrote, as a predictor heard of it.
type Heard = Arc<Mutex<BTreeMap<AddressSpaceId, BTreeSet<PageRun>>>>;

#[derive(Debug)]
struct Listening(Heard);

impl Predictor for Listening {
    fn name(&self) -> &'static str {
        "listening"
    }

    fn observe(&mut self, owner: AddressSpaceId, written: &[PageRun]) {
        self.0.lock().unwrap().entry(owner).or_default().extend(written);
    }

    fn end_epoch(&mut self) {}

    fn tracked_pages(&self) -> u64 {
        0
    }

    fn heat(&self, _: PageNumber) -> f64 {
        0.0
    }

    fn visit(&self, _: &mut dyn FnMut(RankedPage)) {}

    fn memory_bytes(&self) -> usize {
        0
    }
}

#[test]
fn written_pages_are_counted_by_owner() {
    let quarter = |number: u64, first: u64, count| {
        (AddressSpaceId(number as u32), BTreeSet::from([PageRun::new(number * (PAGES / 4) + first, count)]))
    };
    let written = [PageRun::new(PAGES / 4 - 2, PAGES / 4 + 3), PageRun::new(PAGES - 1, 1)];
    for (owners, expected) in [
        (
            &Quarters as &dyn Owners,
            BTreeMap::from([quarter(0, 148, 2), quarter(1, 0, 150), quarter(2, 0, 1), quarter(3, 149, 1)]),
        ),
        (&WholeGuest, BTreeMap::from([(AddressSpaceId::WHOLE_GUEST, BTreeSet::from(written))])),
    ] {
        let heard = Heard::default();
        let mut world = World::new(1, calm(), 20e6, Fault::None, Arm::DEFAULT);
        let predictor = Box::new(Listening(Arc::clone(&heard)));
        world.source = Source::new(source_config(1, true, false), predictor, PolicySpec::Vmferry.build(PATIENCE));
        world.drive_until_pages_are_sent(owners, &written);
        assert_eq!(*heard.lock().unwrap(), expected);
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A guest that fits no limit on the link of 5 MB/s.
fn storm() -> Guest {
    Guest { hot_pages: PAGES, writes_per_ms: 200, save_writes: false, discards: false, granule: 1 }
}

impl World {
    /// Goes on until so many pages were sent.
    fn step_until_sent(&mut self, pages: u64) {
        let sent = |world: &Self| {
            let pages = world.source.report(world.now).pages;
            pages.sent + pages.zero
        };
        while sent(self) < pages {
            assert!(!self.step() && self.now < ms(60_000), "{pages} pages were never sent");
        }
    }

    fn step_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            assert!(!self.step(), "ended: {:?}", self.source.error());
        }
    }
}

#[test]
fn a_push_that_is_held_sends_nothing_and_goes_on() {
    for seed in 0..20 {
        let mut world = World::new(seed, calm(), 20e6, Fault::None, Arm::of(seed));
        if world.source.report(ms(0)).policy == "stop-and-copy" {
            continue;
        }
        world.step_until_sent(if seed % 3 == 0 { 0 } else { 100 });
        let now = world.now;
        world.source.hold_push(now).unwrap();
        // What is under way arrives.
        world.step_for(ms(20));
        let before = world.source.report(world.now);
        // Longer than either side would be silent for.
        world.step_for(ms(1500));
        let after = world.source.report(world.now);
        assert_eq!(before.pages, after.pages, "seed {seed}");
        assert!(world.source_runs && world.source.push_is_held());
        assert!(after.tracking.scans > before.tracking.scans + 100, "seed {seed}: the predictor goes on learning");
        assert!(after.wire.control_bytes > before.wire.control_bytes, "the target hears of us");
        let estimate = world.source.estimate(world.now);
        assert!(estimate.remaining.is_none() && matches!(estimate.unfinished, Unfinished::Held { .. }), "{estimate:?}");
        assert!(estimate.unfinished.to_string().contains("held by the user"));
        let now = world.now;
        world.source.continue_push(now).unwrap();
        let (report, _) = world.migrate();
        assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}: {report:#?}");
        assert!(report.total_ms > 1500.0, "{report:#?}");
    }
}

#[test]
fn a_held_push_is_cancelled_and_a_target_that_went_silent_is_noticed() {
    let held = |fault| {
        let mut world = World::new(3, calm(), 20e6, fault, Arm::DEFAULT);
        world.step_until_sent(50);
        let now = world.now;
        world.source.hold_push(now).unwrap();
        world
    };
    let mut world = held(Fault::None);
    world.step_for(ms(100));
    let now = world.now;
    world.source.handle_cancel(now);
    assert_eq!(world.migrate().0.outcome, OutcomeKind::Cancelled);
    let (report, _) = held(Fault::SilenceToSource(60)).migrate();
    assert_eq!(report.outcome, OutcomeKind::Failed);
    let reason = report.reason.unwrap();
    assert!(reason.contains("silent") && reason.contains("holding the push"), "{reason}");
}

#[test]
fn the_time_limit_is_answered_as_chosen() {
    let with = |answer, after| {
        let mut world = World::new(8, storm(), 5e6, Fault::None, Arm::DEFAULT);
        world.source.set_time_limit(Some(TimeLimit { after, answer })).unwrap();
        world.migrate().0
    };
    let aborted = with(AtTimeLimit::Abort, ms(400));
    assert_eq!(aborted.outcome, OutcomeKind::NotConverged);
    assert_eq!((aborted.downtime_ms, aborted.pause_cause), (0.0, None));
    assert!((400.0..405.0).contains(&aborted.total_ms), "{aborted:#?}");
    let reason = aborted.reason.unwrap();
    for words in ["the time limit of 400 ms was over while pushing memory", "pages remain", "--at-time-limit switch"] {
        assert!(reason.contains(words), "{reason}");
    }
    // In the observation, in the first pass and later.
    for after in [ms(20), ms(100), ms(450)] {
        let switched = with(AtTimeLimit::Switch, after);
        assert_eq!((switched.outcome, switched.pause_cause), (OutcomeKind::Completed, Some(PauseCause::TimeLimit)));
        let began = switched.phases.connect_ms + switched.phases.observe_ms + switched.phases.push_ms;
        assert!((began - after.as_secs_f64() * 1e3).abs() < 5.0, "{switched:#?}");
        assert!(switched.downtime_ms > switched.downtime_limit_ms, "{switched:#?}");
    }
    let mut calm = World::new(5, calm(), 20e6, Fault::None, Arm::DEFAULT);
    calm.source.set_time_limit(Some(TimeLimit { after: ms(10_000), answer: AtTimeLimit::Abort })).unwrap();
    let (report, _) = calm.migrate();
    assert_eq!((report.outcome, report.pause_cause), (OutcomeKind::Completed, Some(PauseCause::Plan)));
}

/// The user who holds the push does not want the guest paused; an end is an end.
#[test]
fn a_time_limit_that_ends_while_the_push_is_held_aborts_or_waits() {
    let held = |answer| {
        let mut world = World::new(8, storm(), 5e6, Fault::None, Arm::DEFAULT);
        world.step_until_sent(10);
        let now = world.now;
        world.source.set_time_limit(Some(TimeLimit { after: now + ms(100), answer })).unwrap();
        world.source.hold_push(now).unwrap();
        world
    };
    assert_eq!(held(AtTimeLimit::Abort).migrate().0.outcome, OutcomeKind::NotConverged);
    let mut world = held(AtTimeLimit::Switch);
    world.step_for(ms(500));
    assert!(world.source_runs && world.source.push_is_held());
    let now = world.now;
    assert!(world.source.poll_timeout().is_some_and(|at| at > now), "a driver that waits does not spin");
    world.source.continue_push(now).unwrap();
    let (report, _) = world.migrate();
    assert_eq!((report.outcome, report.pause_cause), (OutcomeKind::Completed, Some(PauseCause::TimeLimit)));
}

#[test]
fn limits_changed_while_running_are_obeyed() {
    // A limit that nothing fits, then one that everything fits.
    let mut world = World::new(8, storm(), 5e6, Fault::None, Arm::DEFAULT);
    world.step_for(ms(300));
    world.source.set_downtime_limit(ms(5000)).unwrap();
    let (report, _) = world.migrate();
    assert_eq!((report.outcome, report.downtime_limit_ms), (OutcomeKind::Completed, 5000.0), "{report:#?}");
    assert!(report.total_ms < 3500.0, "{report:#?}");

    let mut world = World::new(8, calm(), 50e6, Fault::None, Arm::DEFAULT);
    let (now, zero) = (world.now, Some(0));
    assert_eq!(world.source.set_bandwidth_cap(now, zero), Err(ChangeError::ZeroBandwidth));
    world.source.set_bandwidth_cap(now, Some(500_000)).unwrap();
    let mut bytes_before = 0;
    for cap in [500_000, 4_000_000, 1_000_000] {
        let now = world.now;
        world.source.set_bandwidth_cap(now, Some(cap)).unwrap();
        world.step_for(ms(300));
        let sent = world.source.wire_bytes() - bytes_before;
        bytes_before = world.source.wire_bytes();
        let share = sent as f64 / (0.3 * cap as f64);
        assert!((0.8..1.25).contains(&share), "{sent} bytes in 300 ms at {cap} bytes/s");
    }
    let now = world.now;
    world.source.set_bandwidth_cap(now, None).unwrap();
    let (report, _) = world.migrate();
    assert_eq!(report.outcome, OutcomeKind::Completed, "{report:#?}");
    assert!(report.total_ms < 1500.0, "{report:#?}");
}

/// While a path is narrow, or a host too busy to confirm in time, few pages are sent; few pages do not fill it when it is wide.
#[test]
fn a_path_that_becomes_wide_is_noticed() {
    for seed in 0..20 {
        for arm in [Arm::DEFAULT, Arm::PLAIN] {
            let guest = Guest { hot_pages: PAGES, writes_per_ms: 5, save_writes: true, discards: false, granule: 1 };
            let mut world = World::new(seed, guest, 20e6, Fault::None, arm);
            let config = source_config(seed, arm.predict, world.verify);
            let patience = Patience { passes: 5, time: ms(5000) };
            world.source = Source::new(config, predictor(arm.predict), arm.policy.build(patience));
            world.rate_bytes_per_s = 300e3;
            world.step_for(ms(2000));
            world.rate_bytes_per_s = 100e6;
            let (report, _) = world.migrate();
            assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}, {arm:?}: {report:#?}");
            assert!(report.total_ms < 4500.0, "seed {seed}, {arm:?}: {report:#?}");
        }
    }
}

#[test]
fn what_comes_too_late_is_refused() {
    let mut world = World::new(1, calm(), 20e6, Fault::None, Arm::DEFAULT);
    while world.source_runs {
        assert!(!world.step());
    }
    let now = world.now;
    let source = &mut world.source;
    let refused = [
        source.hold_push(now),
        source.continue_push(now),
        source.set_downtime_limit(ms(1)),
        source.set_time_limit(Some(TimeLimit { after: ms(1), answer: AtTimeLimit::Abort })),
    ];
    assert!(refused.iter().all(|result| matches!(result, Err(ChangeError::TooLate { .. }))), "{refused:?}");
    source.set_bandwidth_cap(now, Some(10_000_000)).unwrap();
    while !world.step() {}
    let now = world.now;
    assert_eq!(world.source.set_bandwidth_cap(now, None), Err(ChangeError::TooLate { doing: "done" }));
    assert_eq!(world.source.estimate(now).remaining, Some(Duration::ZERO));
    assert_eq!(world.migrate().0.outcome, OutcomeKind::Completed);
}

/// The guest is moved right, or stays, whatever the user changes and whatever fails meanwhile.
#[test]
fn changes_at_every_moment_leave_one_guest() {
    let (mut completed, mut changes) = (0, 0);
    for seed in 0..400 {
        let mut random = Random(seed + 9000);
        let guest = guest(&mut random);
        let fault = match random.below(6) {
            0 => Fault::Cancel(random.below(200)),
            1 => Fault::Cut(random.below(1000)),
            2 => Fault::SourceFails(random.below(200)),
            _ => Fault::None,
        };
        let result = std::panic::catch_unwind(move || {
            let mut world = World::new(seed, guest, 20e6, fault, Arm::of(seed));
            let mut done = 0;
            for _ in 0..2000 {
                if world.step() {
                    break;
                }
                let (now, value) = (world.now, random.below(1000));
                let source = &mut world.source;
                let change = match random.below(40) {
                    0 => source.set_bandwidth_cap(now, (value > 100).then_some(value * 50_000)),
                    1 => source.set_downtime_limit(ms(value)),
                    2 => source.hold_push(now),
                    3 | 4 => source.continue_push(now),
                    5 => {
                        let answer = if value % 2 == 0 { AtTimeLimit::Abort } else { AtTimeLimit::Switch };
                        source.set_time_limit((value > 300).then_some(TimeLimit { after: ms(value), answer }))
                    }
                    _ => continue,
                };
                done += u64::from(change.is_ok());
                let estimate = source.estimate(now);
                assert!(!estimate.unfinished.to_string().is_empty());
            }
            let now = world.now;
            let _ = world.source.continue_push(now);
            (world.migrate().0.outcome, done)
        });
        let (outcome, done) = result.unwrap_or_else(|_| panic!("seed {seed}, fault {fault:?}"));
        completed += u64::from(outcome == OutcomeKind::Completed);
        changes += done;
    }
    assert!(completed > 100 && changes > 1000, "{completed} completed, {changes} changes");
}

#[test]
fn the_estimate_says_how_long_it_takes_and_why() {
    let idle = Guest { hot_pages: 1, writes_per_ms: 0, save_writes: false, discards: false, granule: 1 };
    let mut world = World::new(4, idle, 2e6, Fault::None, Arm::PLAIN);
    assert_eq!(world.source.estimate(world.now).unfinished, Unfinished::Greeting);
    world.source_memory.chunks_mut(8).for_each(|word| word[0] = 1);
    world.step_until_sent(200);
    let (now, estimate) = (world.now, world.source.estimate(world.now));
    assert!(matches!(estimate.unfinished, Unfinished::FirstPass { new_pages: 300..=400, .. }), "{estimate:?}");
    let (report, _) = world.migrate();
    let left = report.total_ms / 1e3 - now.as_secs_f64();
    let foretold = estimate.remaining.unwrap().as_secs_f64();
    assert!((foretold / left - 1.0).abs() < 0.2, "{foretold} s foretold, it took {left} s");

    let mut world = World::new(8, storm(), 5e6, Fault::None, Arm::DEFAULT);
    while world.source.passes() == 0 {
        assert!(!world.step());
    }
    world.step_for(ms(200));
    let estimate = world.source.estimate(world.now);
    assert_eq!(estimate.remaining, None, "{estimate:?}");
    let why = estimate.unfinished.to_string();
    for words in ["pages remain = ", " ms of pause, limit 60 ms", "the guest writes ", " pages/s, the path carries "] {
        assert!(why.contains(words), "{why}");
    }
    let Unfinished::Rest { written_pages_per_s: Some(written), carried_pages_per_s: Some(carried), .. } =
        estimate.unfinished
    else {
        panic!("{estimate:?}")
    };
    assert!(written > 10.0 * carried, "{estimate:?}");
    let after = world.now + ms(1000);
    world.source.set_time_limit(Some(TimeLimit { after, answer: AtTimeLimit::Switch })).unwrap();
    let foretold = world.source.estimate(world.now).remaining.unwrap();
    assert!(foretold > ms(1000) && foretold < ms(2000), "{foretold:?}");
    world.source.set_downtime_limit(ms(1)).unwrap();
    let why = world.source.estimate(world.now).unfinished.to_string();
    assert!(why.contains("the fixed part of the pause") && why.contains("exceeds the limit of 1 ms"), "{why}");
}

impl World {
    /// A guest that does not converge by itself, moved in this way.
    fn stuck(seed: u64, guest: Guest, if_stuck: IfStuck, fault: Fault, arm: Arm) -> Self {
        let mut world = Self::new(seed, guest, 5e6, fault, arm);
        let config = SourceConfig { if_stuck, ..source_config(seed, arm.predict, world.verify) };
        // Time enough for a step and what comes of it.
        let patience = Patience { passes: 5, time: ms(2000) };
        world.source = Source::new(config, predictor(arm.predict), arm.policy.build(patience));
        // As deltas, the pages would fit.
        world.sent_memory = None;
        world
    }
}

/// Rewrites half of its pages so fast that it has to be slowed to a tenth or so.
fn hot_storm() -> Guest {
    Guest { hot_pages: PAGES / 2, writes_per_ms: 20, save_writes: true, discards: false, granule: 1 }
}

#[test]
fn a_storm_converges_when_it_is_slowed() {
    for seed in 0..6 {
        for arm in [Arm::DEFAULT, Arm::PLAIN, Arm { predict: false, policy: PolicySpec::Qemu }] {
            let (alone, _) = World::stuck(seed, hot_storm(), IfStuck::Abort, Fault::None, arm).migrate();
            assert_eq!(alone.outcome, OutcomeKind::NotConverged, "seed {seed}, {arm:?}: {alone:#?}");
            assert_eq!((alone.if_stuck, alone.throttle), ("abort", None));
            let (report, _) = World::stuck(seed, hot_storm(), IfStuck::Throttle, Fault::None, arm).migrate();
            assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}, {arm:?}: {report:#?}");
            assert_eq!((report.if_stuck, report.pause_cause), ("throttle", Some(PauseCause::Plan)));
            let throttle = report.throttle.unwrap();
            assert!(throttle.steps > 0 && (20.0..=95.0).contains(&throttle.max_percent), "{throttle:?}");
            assert!(throttle.throttled_ms > 0.0 && throttle.throttled_ms < report.total_ms, "{report:#?}");
            assert_eq!(report.limit_waived, None);
        }
    }
}

#[test]
fn a_guest_that_converges_is_not_slowed() {
    for seed in 0..40 {
        let guest = guest(&mut Random(seed + 1000));
        let mut world = World::new(seed, guest, 20e6, Fault::None, Arm::of(seed));
        let arm = Arm::of(seed);
        let World { source, .. } = World::stuck(seed, calm(), IfStuck::Throttle, Fault::None, arm);
        world.source = source;
        let (report, _) = world.migrate();
        assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}: {report:#?}");
        assert_eq!(report.throttle, None, "seed {seed}");
    }
}

#[test]
fn what_does_not_converge_slowed_as_much_as_possible_is_given_up() {
    let (report, _) = World::stuck(5, storm(), IfStuck::Throttle, Fault::None, Arm::DEFAULT).migrate();
    assert_eq!(report.outcome, OutcomeKind::NotConverged, "{report:#?}");
    assert!(report.reason.unwrap().contains("although the guest was slowed by 95 %"));
    assert_eq!(report.throttle.map(|throttle| throttle.max_percent.round()), Some(95.0));
}

#[test]
fn a_storm_is_paused_beyond_the_limit_where_the_user_wants_that() {
    for seed in 0..6 {
        for arm in [Arm::DEFAULT, Arm::PLAIN, Arm { predict: false, policy: PolicySpec::Qemu }] {
            let (report, _) = World::stuck(seed, hot_storm(), IfStuck::Switch, Fault::None, arm).migrate();
            assert_eq!(report.outcome, OutcomeKind::Completed, "seed {seed}, {arm:?}: {report:#?}");
            assert_eq!((report.if_stuck, report.pause_cause), ("switch", Some(PauseCause::Stuck)));
            let waived = report.limit_waived.unwrap();
            let expected = waived.expected_downtime_ms.unwrap();
            assert!(expected > report.downtime_limit_ms, "{report:#?}");
            assert!(report.downtime_ms > report.downtime_limit_ms, "{report:#?}");
            assert_eq!(report.throttle, None);
            assert!(report.pages.stop < PAGES, "no better than pausing at once: {report:#?}");
        }
    }
}

#[test]
fn a_guest_is_not_slowed_while_the_push_is_held() {
    let mut world = World::stuck(3, hot_storm(), IfStuck::Throttle, Fault::None, Arm::DEFAULT);
    while world.share == 1.0 {
        assert!(!world.step(), "ended without being slowed");
    }
    let share = world.share;
    let now = world.now;
    world.source.hold_push(now).unwrap();
    world.step_for(ms(300));
    assert_eq!(world.share, 1.0);
    let now = world.now;
    world.source.continue_push(now).unwrap();
    world.step_for(ms(5));
    assert_eq!(world.share, share);
    let (report, _) = world.migrate();
    assert_eq!(report.outcome, OutcomeKind::Completed, "{report:#?}");
    let throttle = report.throttle.unwrap();
    assert!(throttle.throttled_ms < report.total_ms - 300.0, "{report:#?}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 60, ..Default::default() })]

    /// Whatever fails once the guest is slowed, and when: it has all of its processor time where it runs, which
    /// `World::migrate` checks.
    #[test]
    fn a_slowed_guest_is_given_its_time_back_at_every_end(
        seed in 0_u64..1000,
        kind in 0..8,
        after in 0_u64..600,
        predict in proptest::bool::ANY,
    ) {
        let arm = Arm { predict, policy: PolicySpec::Vmferry };
        let mut world = World::stuck(seed, hot_storm(), IfStuck::Throttle, Fault::None, arm);
        while world.share == 1.0 {
            assert!(!world.step(), "ended without being slowed");
        }
        let (frame, action) = (world.to_target.sent + after, world.actions + after);
        world.fault = match kind {
            0 => Fault::SilenceToTarget(frame),
            1 => Fault::SilenceToSource(world.to_source.sent + after / 2),
            2 => Fault::Cut(frame),
            3 => Fault::Flip(frame),
            4 => Fault::Cancel(action),
            5 => Fault::SourceFails(action),
            6 => Fault::LoadFails,
            _ => Fault::RunFails,
        };
        world.migrate();
    }
}

/// A driver that cannot slow the guest, or cannot give it its time back: that ends the migration, and is tried some times.
#[test]
fn a_guest_that_cannot_be_slowed_is_left_alone() {
    for lifts_fail in [0, 2, 3, 99] {
        let mut world = World::stuck(1, hot_storm(), IfStuck::Throttle, Fault::None, Arm::DEFAULT);
        world.failing_throttles = Some(lifts_fail);
        while !world.step() {}
        let report = world.source.report(world.now);
        assert_eq!(report.outcome, OutcomeKind::Failed, "{report:#?}");
        let reason = report.reason.unwrap();
        assert!(reason.contains("no control group"), "{reason}");
        assert_eq!(reason.contains("could not be given all of its processor time back"), lifts_fail >= 3, "{reason}");
        assert!(world.source_runs && report.downtime_ms == 0.0);
        assert_eq!(report.throttle, None);
    }
}

/// A policy that pauses at the first moment is not asked while the push is held, also where it was held before it began.
#[test]
fn a_push_that_is_held_before_it_begins_does_not_pause_the_guest() {
    for policy in PolicySpec::ALL {
        let mut world = World::new(2, calm(), 20e6, Fault::None, Arm { predict: true, policy });
        let now = world.now;
        world.source.hold_push(now).unwrap();
        world.step_for(ms(500));
        assert!(world.source_runs && world.source.report(world.now).pages.sent == 0, "{policy}");
        let now = world.now;
        world.source.continue_push(now).unwrap();
        assert_eq!(world.migrate().0.outcome, OutcomeKind::Completed, "{policy}");
    }
}

/// What did not become less before the push was held, or a limit changed, is given time again.
#[test]
fn patience_begins_anew_after_a_change() {
    let end = |change: fn(&mut Source, Duration)| {
        let mut world = World::new(8, storm(), 5e6, Fault::None, Arm::DEFAULT);
        while world.source.passes() < 2 {
            assert!(!world.step());
        }
        let now = world.now;
        change(&mut world.source, now);
        world.migrate().0.total_ms
    };
    let undisturbed = end(|_, _| {});
    let changed = end(|source, _| source.set_downtime_limit(ms(61)).unwrap());
    assert!(changed > undisturbed + 50.0, "given up after {changed} ms, without a change after {undisturbed} ms");
}

#[test]
fn a_driver_that_waits_wakes_up_for_the_time_limit() {
    let policy = PolicySpec::Vmferry.build(PATIENCE);
    let mut source = Source::new(source_config(1, false, false), Box::new(NoPrediction), policy);
    source.set_time_limit(Some(TimeLimit { after: ms(300), answer: AtTimeLimit::Abort })).unwrap();
    assert!(matches!(source.poll_action(ms(0)), Some(Action::Send(Message::Hello(_)))));
    source.handle_message_sent(ms(0), 100);
    assert_eq!((source.poll_action(ms(299)), source.poll_timeout()), (None, Some(ms(300))));
    assert!(matches!(source.poll_action(ms(300)), Some(Action::Send(Message::Abort(_)))));
}
