//! The source's state machine: observe, push, stop and copy, hand over.
//!
//! Contract of the driver: carry out each [`Action`] in order, report its end with the `handle_*` named there, and call
//! [`Source::handle_failure`] if it cannot. Written pages that a scan reported are the machine's debt from then on: it
//! keeps them pending until their content was sent after the scan.

mod cold;
mod control;

use std::collections::VecDeque;
use std::time::Duration;

use cold::ColdPages;
pub use control::{AtTimeLimit, ChangeError, Estimate, TimeLimit, Unfinished};

use super::report::{
    BoundReport, CompressionReport, DowntimeReport, OutcomeKind, PageReport, PauseCause, PhaseTimes, Report,
    ShadowReport, ThrottleReport, TrackingReport, VerifyReport, WaivedLimit, WireReport, WorkingSetReport,
};
use crate::pages::{Owners, PAGE_BYTES, PageNumber, PageRun, PageSet, RamLayout, group_by_owner};
use crate::plan::{
    AtRead, Facts, FixedCosts, Hold, IfStuck, Moment, PAGE_WIRE_BYTES, Pacer, PageClass, PageWork, Policy, PushRules,
    RateEstimate, SendOrder, Shadow, Step, Stuck, Trend, WireSizes, fitting_share,
};
use crate::predict::{Predictor, RankedPage};
use crate::wire::{
    Abort, Encodings, Fault, Hello, MAX_PAGES_PER_FRAME, Message, MigrationId, Prepared, VERSION_MAX, VERSION_MIN,
    Welcome,
};

/// The most runs in one [`Action::SendPages`].
const MAX_RUNS_PER_ACTION: usize = 512;
/// Bytes under way before the bandwidth is known.
const WINDOW_FIRST_BYTES: u64 = 256 * 1024;
/// The fewest bytes under way later on. They count against the downtime budget, so on a slow path they must be few.
const WINDOW_MIN_BYTES: u64 = 48 * 1024;
/// The most bytes under way.
const WINDOW_MAX_BYTES: u64 = 32 * 1024 * 1024;
/// A new round trip counts as one part in so many. Not the shortest of all counts: where hosts are busy, answers are late again
/// and again, and a window for quiet hosts would carry next to nothing.
const ROUND_TRIP_PARTS: u32 = 4;
/// Beside the round trip, the path is kept filled for this part of the downtime limit, at least and at most for so long. What is
/// under way at the pause takes from the limit; what is not there while a host is busy elsewhere is time for which the path
/// carries nothing.
const WINDOW_LIMIT_PARTS: u32 = 12;
const WINDOW_TIME_MIN: Duration = Duration::from_millis(8);
const WINDOW_TIME_MAX: Duration = Duration::from_millis(24);
/// As long as all but one part in so many of that is under way, the path is filled well.
const FILLED_PARTS: u64 = 4;
/// A chunk of pages should take this part of the time for which the path is kept filled, so that it is not emptied meanwhile,
/// and that scans and cancellations are not late. Not less on a slow path: pages are compressed by the chunk, and the more at
/// once the better.
const CHUNK_WINDOW_PARTS: u32 = 2;
/// Where pages turn out to be more bytes than on average, a chunk takes at most so many times as long.
const CHUNK_TIMES_MAX: f64 = 4.0;
/// The most pages of a chunk: of several frames and batches, so that several processors have a part in it.
const CHUNK_MAX_PAGES: u64 = 4 * MAX_PAGES_PER_FRAME;
/// A chunk has at most so many times the pages of the largest one before: at the beginning nothing is known of what they take,
/// and the sender is slower than later on.
const CHUNK_GROWTH: u64 = 4;
/// The fewest pages of a chunk; more, where they are fewer bytes than so many as they are.
const CHUNK_MIN_PAGES: u64 = 8;
/// After a scan at least so many times as long goes by as scans take, so that they leave the guest and the push most of the
/// time,
const SCAN_PAUSE_FACTOR: u32 = 8;
/// but no more than this, beside an epoch that is longer anyway,
const SCAN_PAUSE_MAX: Duration = Duration::from_secs(1);
/// and than this part of the stall timeout: after each scan at least the other side hears of us, and we of it.
const SCAN_PAUSE_STALL_PARTS: u32 = 8;
/// A scan's time counts as one part in so many among those before.
const SCAN_TIME_PARTS: u32 = 4;
/// Where nothing is left to send, a scan comes at once if at least so many pages were sent since the last one; else the
/// epoch is waited for.
const SCAN_MIN_PAGES: u64 = 64;
/// And where more was under way at the scan before, one comes as soon as what the path carries in so long is left of that: the pause
/// may be what is waited for.
const ARRIVED_TIME: Duration = Duration::from_millis(4);
/// Where all is sent before the pause, a scan comes when that is done, but after so many epochs in any case.
const SEND_ALL_EPOCHS: u32 = 2;
/// The pages chosen at a scan should last until the next one, also if the path is so much faster than measured.
const PLAN_MARGIN: f64 = 1.5;
/// At most so many pages, and this part of the guest's, are sent in the first pass to learn what a page costs that was sent
/// before: pages that were seen written, and again when they were written.
const PROBE_PAGES_MAX: u64 = 1024;
const PROBE_PARTS: u64 = 64;
/// So many of them in an epoch, and none in the first epochs, when it is not known which pages are written often.
const PROBE_PAGES_PER_EPOCH: usize = 128;
const PROBE_AFTER_SCANS: u64 = 3;
/// Where a page that was sent before costs at most this share of what it cost the first time, the hot ones are sent once
/// before they are held back.
const BASE_SHARE: f64 = 0.5;
/// Recall is the share of the pages written within so long before the pause that were held back.
const RECALL_WINDOW: Duration = Duration::from_millis(300);
/// After the hand-over the answer is waited for this many times longer than the stall timeout.
const RUNNING_PATIENCE: u32 = 3;
/// How often resuming the guest is tried before the migration ends without it.
const RESUME_ATTEMPTS: u32 = 3;
/// How often giving the guest its processor time back is tried before the migration ends without it.
const LIFT_ATTEMPTS: u32 = 3;

/// What the user wants and what is known beforehand.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// The migration's name.
    pub migration: MigrationId,
    /// The guest's RAM.
    pub layout: RamLayout,
    /// The VMM's machine type.
    pub machine: String,
    /// The guest's processors.
    pub vcpus: u32,
    /// The longest pause allowed.
    pub downtime_limit: Duration,
    /// The most bytes to send per second; `None`: as the path allows.
    pub bandwidth_cap_bytes_per_s: Option<u64>,
    /// Time between scans for written pages; longer where they take long, up to a second.
    pub epoch: Duration,
    /// How long to watch before the first page is sent.
    pub observe: Duration,
    /// Compare digests of all pages before the hand-over.
    pub verify: bool,
    /// How long the target may be silent while something is expected of it.
    pub stall_timeout: Duration,
    /// The stop phase's fixed part, as far as it is known at the beginning.
    pub fixed: FixedCosts,
    /// What to do where the policy gives up.
    pub if_stuck: IfStuck,
    /// The encodings of pages that the driver would use.
    pub encodings: Encodings,
    /// The connections that the driver would use, the first one included; 1 to
    /// [`MAX_STREAMS`](crate::wire::MAX_STREAMS).
    pub streams: u16,
}

/// Why a migration ended without a hand-over, or in doubt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The user asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The target ended the migration.
    #[error("the target ended the migration: {text}")]
    Aborted {
        /// Its words.
        text: String,
    },
    /// The connection ended.
    #[error("the connection to the target was lost while {doing}")]
    ConnectionLost {
        /// What was going on.
        doing: &'static str,
    },
    /// The target said nothing for too long.
    #[error("the target was silent for {ms} ms while {doing}")]
    Stalled {
        /// How long.
        ms: u64,
        /// What was going on.
        doing: &'static str,
    },
    /// The target sent something that has no place here.
    #[error("the target sent `{message}` while {doing}, which the protocol does not allow")]
    Unexpected {
        /// The message's name.
        message: &'static str,
        /// What was going on.
        doing: &'static str,
    },
    /// The target chose a protocol version, encodings or connections that were not offered, or answered for another
    /// migration.
    #[error("the target's welcome does not answer our hello")]
    BadWelcome,
    /// The target's memory is not the source's.
    #[error("{pages} pages differ on the target, the first is page {first}; nothing was handed over")]
    Mismatch {
        /// How many.
        pages: u64,
        /// The first of them.
        first: u64,
    },
    /// What remains never fits.
    #[error(
        "no convergence{}: after {passes} passes {pending_pages} pages remain, which would take a pause of \
         {expected_ms} ms; the limit is {limit_ms} ms. The guest writes {dirty_pages_per_s} pages/s, the path carries \
         {bandwidth_bytes_per_s} bytes/s. Allow a longer pause (--downtime-limit, or --if-stuck switch), more bandwidth, \
         or a slower guest (--if-stuck throttle)",
        throttled_words(*throttled_percent)
    )]
    NotConverged {
        /// Passes made.
        passes: u32,
        /// Pages that remain.
        pending_pages: u64,
        /// The pause that they would need.
        expected_ms: u64,
        /// The pause that is allowed.
        limit_ms: u64,
        /// Pages written per second.
        dirty_pages_per_s: u64,
        /// Bytes carried per second.
        bandwidth_bytes_per_s: u64,
        /// Processor time that was taken from the guest in the end, in percent.
        throttled_percent: u32,
    },
    /// The time limit was over before the guest could be paused.
    #[error(
        "the time limit of {limit_ms} ms was over while {doing}: {why}. Allow more time (--time-limit), a longer pause \
         (--downtime-limit) or more bandwidth, or let the guest be paused then (--at-time-limit switch)"
    )]
    TimeLimit {
        /// The limit.
        limit_ms: u64,
        /// What was going on.
        doing: &'static str,
        /// Why it had not ended.
        why: String,
    },
    /// The driver could not carry out an action.
    #[error("{text}")]
    Driver {
        /// What failed and why.
        text: String,
    },
}

fn throttled_words(percent: u32) -> String {
    if percent == 0 { String::new() } else { format!(", although the guest was slowed by {percent} %") }
}

/// Pages that were sent in one encoding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Encoded {
    /// How many.
    pub pages: u64,
    /// Their bytes on the wire, headers included.
    pub bytes: u64,
}

/// What a driver did for [`Action::SendPages`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SentPages {
    /// Pages sent as they are.
    pub raw_pages: u64,
    /// Pages sent as notes that they are zero.
    pub zero: Vec<PageRun>,
    /// Bytes on the wire for the former, headers included.
    pub raw_bytes: u64,
    /// Bytes on the wire for the latter, headers included.
    pub zero_bytes: u64,
    /// Pages sent as LZ4 blocks.
    pub lz4: Encoded,
    /// Pages sent as Zstandard frames.
    pub zstd: Encoded,
    /// Pages sent as what differs from what the target had.
    pub delta: Encoded,
    /// Pages sent as copies of others that the target has.
    pub copy: Encoded,
    /// Processor time spent on encoding, all threads together.
    pub encoding: Duration,
    /// The sender's processor time, without scans: that of the driver, and its part of what encoders did.
    pub working: Duration,
    /// The driver's processor time for arming the action's runs again before they were read; none of it is in `working`.
    pub arming: Duration,
    /// How long the driver did not listen, from the beginning to the end, without what it waited for the path.
    pub busy: Duration,
    /// Of all these bytes, those that went by further connections.
    pub side_bytes: u64,
    /// When the first of the bytes left; `None`: just now. Encoding takes its time, and what left before its end may have
    /// arrived before its end.
    pub began: Option<Duration>,
    /// Pages that the re-arming before the reading found written. Their content went along.
    pub written: Vec<PageRun>,
    /// Pages that it found written, and that were left out therefore ([`AtRead::Skip`]), in the order of the action's runs.
    pub skipped: Vec<PageRun>,
    /// Pages outside the run that was about to be read that its re-arming found written and armed again, as happens
    /// where tracking works in larger units. Their content did not go along.
    pub bystanders: Vec<PageRun>,
    /// Of the action's pages, those of which the driver keeps what the target has, so that they can go as deltas next time.
    pub kept: Vec<PageRun>,
}

impl SentPages {
    /// Pages whose content was sent, in whatever encoding.
    pub fn content_pages(&self) -> u64 {
        self.raw_pages + self.lz4.pages + self.zstd.pages + self.delta.pages + self.copy.pages
    }

    /// Bytes on the wire for all pages, zero ones included.
    pub fn bytes(&self) -> u64 {
        self.raw_bytes + self.zero_bytes + self.lz4.bytes + self.zstd.bytes + self.delta.bytes + self.copy.bytes
    }
}

/// What the driver shall do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send this message, then call [`Source::handle_message_sent`].
    Send(Message<'static>),
    /// Open further connections, so that there are so many, and send [`Message::Join`] on each; then call
    /// [`Source::handle_streams_opened`].
    OpenStreams {
        /// How many, the first one included.
        streams: u16,
    },
    /// Get and re-arm all written pages, then call [`Source::handle_scan`].
    Scan {
        /// Whether pages that are written all the time may be reported unseen and left unarmed. Not in the stop phase:
        /// what is reported there is sent.
        relaxed: bool,
    },
    /// Read these pages and send them, then call [`Source::handle_pages_sent`].
    SendPages {
        /// Which.
        runs: Vec<PageRun>,
        /// What becomes of those that were written since the last scan.
        at_read: AtRead,
    },
    /// Find the pages whose memory was given back to the host, then call [`Source::handle_holes`].
    ScanHoles,
    /// Stop the guest and keep its VMM ready to save the device state, then call [`Source::handle_paused`].
    Pause,
    /// Save the device state and send it, then call [`Source::handle_device_state_sent`].
    SendDeviceState,
    /// Send digests of all pages, then call [`Source::handle_digests_sent`].
    SendDigests,
    /// Make sure that the guest runs here, then call [`Source::handle_resumed`].
    Resume,
    /// Leave the guest this share of the processor time that it would have, all of it for 1, then call
    /// [`Source::handle_throttled`]. Not given between the pause and the hand-over or the guest's resuming, nor after the
    /// hand-over.
    Throttle {
        /// From [`MIN_SHARE`](crate::plan::MIN_SHARE) to 1.
        share: f64,
    },
    /// The migration has ended: see [`Source::report`].
    End,
}

#[derive(Debug)]
enum State {
    Start,
    Greeting,
    Opening,
    Observing { until: Duration },
    Pushing(Push),
    Pausing,
    StopAndCopy(StopStep),
    HandedOver { since: Duration },
    Resuming { error: SourceError, failures: u32 },
    Ended { error: Option<SourceError> },
}

/// Where the stop phase is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopStep {
    /// Get what was written last.
    Scan,
    /// Send what remains.
    Copy,
    /// Have the device state saved and sent.
    DeviceState,
    /// Saving it can write guest memory: get that too.
    ScanAgain,
    /// Get what a balloon gave back: the tracking does not see it. Only where digests are to be compared, since the
    /// guest itself expects nothing of such pages.
    ScanHoles,
    /// Send that.
    CopyAgain,
    /// Send digests.
    Verify,
    /// Wait for the target to load everything.
    Load,
}

/// What is being sent, and how far it is.
#[derive(Debug)]
struct Push {
    /// Where the search for the next page goes on, among all in address order.
    cursor: u64,
    /// The pages never seen written.
    cold: ColdPages,
    /// The pages seen written to send until the next scan, in ascending order; `None` until they are chosen.
    warm: Option<VecDeque<PageRun>>,
    /// Pages sent since the last scan.
    pages_since_scan: u64,
    /// Pages sent in this pass, and how many make it complete.
    pass_pages: u64,
    pass_length: u64,
    /// Nothing is left to send before the next scan.
    drained: bool,
    /// At the last scan there was more under way than can be waited for in no time.
    awaits_arrival: bool,
    /// Whether all that is pending is sent, held back or not.
    all: SendAll,
    /// Pages to learn from, to be sent next; `None` until they are chosen, after each scan.
    probes: Option<VecDeque<Vec<PageRun>>>,
}

/// Where the sending of all that is pending is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendAll {
    /// It is not asked for.
    No,
    /// First all is armed.
    Arming,
    /// All that was pending then is sent.
    Sending,
}

impl Push {
    /// Sends these, for a start, of so many pages.
    fn new(pending_pages: u64, total_pages: u64) -> Self {
        Self {
            cursor: 0,
            cold: ColdPages::new(total_pages),
            warm: None,
            pages_since_scan: 0,
            pass_pages: 0,
            pass_length: pending_pages,
            drained: false,
            awaits_arrival: false,
            all: SendAll::No,
            probes: None,
        }
    }
}

/// How much is sent at once.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    bytes: f64,
    /// No page is taken to be less.
    page_bytes_min: f64,
    pages_max: u64,
}

impl Chunk {
    /// As pages, if each is so many bytes on the wire.
    fn pages(&self, page_bytes: f64) -> u64 {
        ((self.bytes / page_bytes.max(self.page_bytes_min)) as u64).clamp(CHUNK_MIN_PAGES, self.pages_max)
    }
}

/// A ping that was not answered yet.
#[derive(Debug, Clone, Copy)]
struct Ping {
    sent: Duration,
    /// No page was under way then, so that its answer waits for none.
    was_idle: bool,
    /// How long the driver was too busy since to hear the answer.
    busy: Duration,
}

/// The source side of one migration.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    predictor: Box<dyn Predictor>,
    policy: Box<dyn Policy>,
    rules: PushRules,
    shadows: Vec<Shadow>,
    stuck: Stuck,
    throttle: Throttle,
    state: State,
    outbox: VecDeque<Message<'static>>,
    /// An action was given out and its end was not reported yet.
    acting: bool,
    /// The hand-over was given out for sending. Never reset.
    handed_over: bool,

    /// Pages whose newest content the target may not have.
    pending: PageSet,
    /// Pages held back as the working set; a subset of `pending`.
    held: PageSet,
    /// How many of them were never sent.
    held_new_pages: u64,
    /// Pages chosen to learn from so far.
    probed_pages: u64,
    /// The pages of the action under way.
    sending: Vec<PageRun>,
    /// What they are, by most of them.
    sending_class: PageClass,
    /// The most pages of a chunk so far.
    largest_chunk: u64,
    /// Pages whose content was sent at least once.
    ever_sent: PageSet,
    /// Of these, pages that can go as deltas; all of them, where there are no deltas.
    bases: PageSet,
    /// How many pending pages are not among those.
    baseless_pages: u64,
    /// Pages that are not zero on the target.
    not_zero: PageSet,
    /// Pages written in the current epoch as far as known.
    epoch_written: PageSet,
    /// Pages that were written since the observation began, as far as the predictor may know them.
    seen: PageSet,
    /// Pages written since the push began.
    written_in_push: PageSet,
    /// Pages that the predictor knows, while a plan is made; empty otherwise. It and `ranking` are kept for the memory
    /// that they occupy.
    known: PageSet,
    /// The pages among which a plan chooses, likewise.
    ranking: Vec<RankedPage>,
    /// The writes of the last epochs, for [`RECALL_WINDOW`].
    window: VecDeque<Vec<PageRun>>,
    next_scan: Duration,
    /// What a scan takes of late.
    scan_time: Option<Duration>,
    last_epoch_pages: u64,

    /// The user holds the push, since then; and held it before for so long.
    push_held_since: Option<Duration>,
    push_held_for: Duration,
    time_limit: Option<TimeLimit>,
    /// Where what remains is heading, for the estimate.
    trend: Trend,
    pause_cause: Option<PauseCause>,

    pacer: Pacer,
    rate: RateEstimate,
    sizes: WireSizes,
    work: PageWork,
    round_trip: Option<Duration>,
    ping: Option<Ping>,
    wire_bytes: u64,
    /// `wire_bytes` when the last page had left.
    page_bytes_end: u64,
    confirmed_bytes: u64,
    heard: Duration,
    /// Pages expected to be written per epoch beside the held ones.
    fresh_pages_per_epoch: f64,
    /// And among those.
    held_pages_per_epoch: f64,

    /// What the target agreed to read, and by how many connections.
    encodings: Encodings,
    streams: u16,
    /// Bytes sent by all but the first.
    side_bytes: u64,
    times: Times,
    wire: WireReport,
    pages: PageReport,
    encoding_time: Duration,
    tracking: TrackingReport,
    written_while_pushing: u64,
    passes: u32,
    downtime: DowntimeReport,
    verify: Option<VerifyReport>,
}

/// Moments of the migration that the report needs.
#[derive(Debug, Default)]
struct Times {
    observing: Option<Duration>,
    pushing: Option<Duration>,
    pausing: Option<Duration>,
    stopped: Option<Duration>,
    step: Duration,
    running: Option<Duration>,
    ended: Option<Duration>,
    /// Precision and recall of the held set, fixed at the pause.
    quality: (Option<f64>, Option<f64>),
    held_at_pause: u64,
    least_stop_pages: Option<u64>,
    limit_waived: Option<WaivedLimit>,
}

/// What is taken from the guest.
#[derive(Debug)]
struct Throttle {
    /// What it shall keep while the push goes on.
    wanted: f64,
    /// What the driver was told last that it keeps.
    told: f64,
    /// The driver has done so.
    is_done: bool,
    /// Since when it has not all, if so.
    since: Option<Duration>,
    /// For how long it had not all before that.
    total: Duration,
    least: f64,
    steps: u32,
    /// How often giving all back failed.
    failures: u32,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            wanted: 1.0,
            told: 1.0,
            is_done: true,
            since: None,
            total: Duration::ZERO,
            least: 1.0,
            steps: 0,
            failures: 0,
        }
    }
}

impl Throttle {
    /// What is taken at this share, in percent.
    fn percent(share: f64) -> f64 {
        (1.0 - share) * 100.0
    }

    /// The guest stands still, or has all, from now on.
    fn stop_clock(&mut self, now: Duration) {
        if let Some(since) = self.since.take() {
            self.total += now.saturating_sub(since);
        }
    }

    fn report(&self, now: Duration) -> Option<ThrottleReport> {
        let running = self.since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        (self.steps > 0).then(|| ThrottleReport {
            max_percent: Self::percent(self.least),
            steps: self.steps,
            throttled_ms: (self.total + running).as_secs_f64() * 1e3,
        })
    }
}

impl Source {
    /// A migration that has not begun. Time 0 is the moment of the first call with a time.
    pub fn new(config: SourceConfig, predictor: Box<dyn Predictor>, policy: Box<dyn Policy>) -> Self {
        let total = config.layout.total_pages();
        Self {
            predictor,
            rules: policy.rules(),
            policy,
            shadows: Vec::new(),
            stuck: Stuck::new(config.if_stuck),
            throttle: Throttle::default(),
            state: State::Start,
            outbox: VecDeque::new(),
            acting: false,
            handed_over: false,
            pending: PageSet::full(total),
            held: PageSet::empty(total),
            held_new_pages: 0,
            probed_pages: 0,
            sending: Vec::new(),
            sending_class: PageClass::New,
            largest_chunk: 0,
            ever_sent: PageSet::empty(total),
            bases: PageSet::empty(total),
            baseless_pages: total,
            not_zero: PageSet::empty(total),
            epoch_written: PageSet::empty(total),
            seen: PageSet::empty(total),
            written_in_push: PageSet::empty(total),
            known: PageSet::empty(total),
            ranking: Vec::new(),
            window: VecDeque::new(),
            next_scan: Duration::ZERO,
            scan_time: None,
            last_epoch_pages: 0,
            push_held_since: None,
            push_held_for: Duration::ZERO,
            time_limit: None,
            trend: Trend::new(),
            pause_cause: None,
            pacer: Pacer::new(config.bandwidth_cap_bytes_per_s),
            rate: RateEstimate::new(),
            sizes: WireSizes::new(),
            work: PageWork::new(),
            round_trip: None,
            ping: None,
            wire_bytes: 0,
            page_bytes_end: 0,
            confirmed_bytes: 0,
            heard: Duration::ZERO,
            fresh_pages_per_epoch: 0.0,
            held_pages_per_epoch: 0.0,
            encodings: Encodings::RAW,
            streams: 1,
            side_bytes: 0,
            times: Times::default(),
            wire: WireReport::default(),
            pages: PageReport { total, ..PageReport::default() },
            encoding_time: Duration::ZERO,
            tracking: TrackingReport::default(),
            written_while_pushing: 0,
            passes: 0,
            downtime: DowntimeReport::default(),
            verify: None,
            config,
        }
    }

    /// Has another policy asked along at every decision; the report says what it would have done.
    pub fn add_shadow(&mut self, policy: Box<dyn Policy>) {
        self.shadows.push(Shadow::new(policy));
    }

    /// What to do next; `None`: wait for a message, or until [`Self::poll_timeout`].
    pub fn poll_action(&mut self, now: Duration) -> Option<Action> {
        if self.acting {
            return None;
        }
        self.check_silence(now);
        self.check_time_limit(now);
        if let State::Resuming { .. } = self.state {
            // The guest comes first; the target can learn of the failure afterwards.
            return Some(self.act(Action::Resume));
        }
        if let Some(share) = self.share_to_set() {
            (self.throttle.told, self.throttle.is_done) = (share, false);
            return Some(self.act(Action::Throttle { share }));
        }
        if let Some(message) = self.outbox.pop_front() {
            return Some(self.act(Action::Send(message)));
        }
        match &self.state {
            State::Start => {
                self.state = State::Greeting;
                self.heard = now;
                let hello = Message::Hello(Hello {
                    version_min: VERSION_MIN,
                    version_max: VERSION_MAX,
                    migration: self.config.migration,
                    layout: self.config.layout.clone(),
                    machine: self.config.machine.clone(),
                    vcpus: self.config.vcpus,
                    verify: self.config.verify,
                    encodings: self.config.encodings,
                    streams: self.config.streams,
                });
                Some(self.act(Action::Send(hello)))
            }
            State::Greeting | State::HandedOver { .. } | State::Resuming { .. } => None,
            State::Opening => Some(self.act(Action::OpenStreams { streams: self.streams })),
            State::Observing { .. } => (now >= self.next_scan).then(|| self.act(Action::Scan { relaxed: true })),
            State::Pushing(_) => self.push(now),
            State::Pausing => Some(self.act(Action::Pause)),
            State::StopAndCopy(step) => self.stop_and_copy(now, *step),
            State::Ended { .. } => Some(Action::End),
        }
    }

    /// When to call [`Self::poll_action`] again if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let silence = self.silence_deadline();
        let work = match &self.state {
            State::Observing { .. } => Some(self.next_scan),
            State::Pushing(push) => Some(if push.drained || self.push_is_held() || !self.window_open() {
                self.next_scan
            } else {
                self.next_scan.min(self.pacer.next_at())
            }),
            State::StopAndCopy(_) if self.window_open() => Some(self.pacer.next_at()),
            State::StopAndCopy(_) | State::Greeting | State::HandedOver { .. } => None,
            State::Start | State::Opening | State::Pausing | State::Resuming { .. } | State::Ended { .. } => {
                Some(Duration::ZERO)
            }
        };
        let time_limit = self.time_limit_due().map(|(at, _)| at);
        [silence, work, time_limit].into_iter().flatten().min()
    }

    /// A message from the target.
    pub fn handle_message(&mut self, now: Duration, message: &Message<'_>) {
        if matches!(self.state, State::Ended { .. } | State::Resuming { .. }) {
            return;
        }
        self.heard = now;
        match message {
            Message::Welcome(welcome) => self.welcomed(now, welcome),
            Message::Progress { bytes } if *bytes <= self.wire_bytes && *bytes >= self.confirmed_bytes => {
                self.confirmed_bytes = *bytes;
                let round_trip = self.round_trip.unwrap_or_default();
                self.rate.delivered(now, *bytes, *bytes >= self.page_bytes_end, round_trip);
            }
            // A driver whose sending failed half-way hears what the target has said before it reports that: the target
            // can have confirmed bytes that are not counted yet.
            Message::Progress { bytes } if self.acting && *bytes > self.wire_bytes => {}
            Message::Pong(_) => {
                if let Some(ping) = self.ping.take()
                    && (ping.was_idle || self.round_trip.is_none())
                {
                    let trip = now.saturating_sub(ping.sent).saturating_sub(ping.busy);
                    self.round_trip = Some(match self.round_trip {
                        Some(before) => (before * (ROUND_TRIP_PARTS - 1) + trip) / ROUND_TRIP_PARTS,
                        None => trip,
                    });
                }
            }
            Message::Prepared(prepared) if matches!(self.state, State::StopAndCopy(StopStep::Load)) => {
                self.prepared(now, prepared);
            }
            Message::Running { .. } if matches!(self.state, State::HandedOver { .. }) => {
                self.close_step(now, |downtime| &mut downtime.resume_ms);
                self.times.running = Some(now);
                self.end(now, None);
            }
            Message::Abort(abort) => self.fail(now, SourceError::Aborted { text: abort.text.clone() }),
            Message::Hello(_)
            | Message::Pages(_)
            | Message::Zero(_)
            | Message::Paused
            | Message::DeviceState(_)
            | Message::Digests(_)
            | Message::Load { .. }
            | Message::HandOver(_)
            | Message::Ping(_)
            | Message::Progress { .. }
            | Message::Prepared(_)
            | Message::Running { .. }
            | Message::Join(_)
            | Message::Fence { .. } => {
                let doing = self.doing();
                self.fail(now, SourceError::Unexpected { message: message.name(), doing });
            }
        }
    }

    /// The message of [`Action::Send`] has left as so many bytes.
    pub fn handle_message_sent(&mut self, now: Duration, wire_bytes: u64) {
        self.acted();
        self.wire.control_bytes += wire_bytes;
        self.count_sent(now, wire_bytes);
    }

    /// The further connections are open; what was sent on them took so many bytes.
    pub fn handle_streams_opened(&mut self, now: Duration, wire_bytes: u64) {
        self.acted();
        self.wire.control_bytes += wire_bytes;
        self.side_bytes += wire_bytes;
        self.count_sent(now, wire_bytes);
        if matches!(self.state, State::Opening) {
            self.begin_observing(now);
        }
    }

    /// A scan found these pages written, and they are armed again. It took so long. `owners` says whose they are; those of
    /// an epoch are asked for at the scan that ends it.
    pub fn handle_scan(&mut self, now: Duration, took: Duration, written: &[PageRun], owners: &dyn Owners) {
        self.acted();
        let took_ms = took.as_secs_f64() * 1e3;
        self.tracking.scans += 1;
        self.tracking.scan_ms += took_ms;
        self.tracking.scan_max_ms = self.tracking.scan_max_ms.max(took_ms);
        self.scan_time = Some(match self.scan_time {
            Some(before) => (before * (SCAN_TIME_PARTS - 1) + took) / SCAN_TIME_PARTS,
            None => took,
        });
        for &run in written {
            self.pending.insert_run(run);
            self.epoch_written.insert_run(run);
        }
        self.baseless_pages = self.pending.len_without(&self.bases);
        match &mut self.state {
            State::Observing { until } => {
                // What was written before the observation began says nothing about how often.
                if self.tracking.scans == 1 {
                    self.epoch_written.clear();
                    *until = if self.rules.observe { now + self.config.observe } else { now };
                } else {
                    self.end_epoch(owners);
                }
                self.observed(now);
            }
            State::Pushing(_) => self.pushed_and_scanned(now, owners),
            State::StopAndCopy(step @ StopStep::Scan) => {
                *step = StopStep::Copy;
                self.written_in_push.union_with(&self.epoch_written);
                self.end_epoch(owners);
                self.judge_prediction(now);
                // The stop phase is the last pass.
                self.passes += 1;
                self.outbox.push_back(Message::Paused);
                self.close_step(now, |downtime| &mut downtime.scan_ms);
            }
            State::StopAndCopy(step @ StopStep::ScanAgain) => {
                *step = if self.config.verify { StopStep::ScanHoles } else { StopStep::CopyAgain };
                self.close_step(now, |downtime| &mut downtime.scan_ms);
            }
            State::Start
            | State::Greeting
            | State::Opening
            | State::Pausing
            | State::StopAndCopy(_)
            | State::HandedOver { .. }
            | State::Resuming { .. }
            | State::Ended { .. } => {}
        }
    }

    /// What the stop phase will cost besides copying was found out anew.
    pub fn handle_fixed_costs(&mut self, fixed: FixedCosts) {
        self.config.fixed = fixed;
    }

    /// These pages have no memory and read as zero.
    pub fn handle_holes(&mut self, now: Duration, holes: &[PageRun]) {
        self.acted();
        if let State::StopAndCopy(step @ StopStep::ScanHoles) = &mut self.state {
            *step = StopStep::CopyAgain;
            for page in holes.iter().flat_map(|run| run.pages()).filter(|&page| self.not_zero.contains(page)) {
                self.pending.insert(page);
            }
            self.baseless_pages = self.pending.len_without(&self.bases);
            self.close_step(now, |downtime| &mut downtime.verify_ms);
        }
    }

    /// The pages of [`Action::SendPages`] have left.
    pub fn handle_pages_sent(&mut self, now: Duration, sent: &SentPages) {
        self.acted();
        self.count_encodings(sent);
        self.work.armed(self.sending.len() as u64, sent.arming);
        let mut skipped = sent.skipped.iter().flat_map(|run| run.pages()).peekable();
        let has_deltas = self.encodings.has_deltas();
        for page in self.sending.drain(..).flat_map(PageRun::pages) {
            if skipped.next_if_eq(&page).is_some() {
                continue;
            }
            self.pages.resent += u64::from(!self.ever_sent.insert(page));
            if has_deltas {
                self.bases.remove(page);
            } else {
                self.bases.insert(page);
            }
        }
        if has_deltas {
            sent.kept.iter().for_each(|&run| _ = self.bases.insert_run(run));
        }
        for &run in &sent.zero {
            self.pages.zero += run.count;
            run.pages().for_each(|page| {
                self.not_zero.remove(page);
            });
        }
        let zero_pages: u64 = sent.zero.iter().map(|run| run.count).sum();
        let sent_pages = sent.content_pages() + zero_pages;
        self.sizes.sent(self.sending_class, sent_pages, sent.bytes());
        if let State::Pushing(push) = &mut self.state {
            push.cold.sent(sent_pages, sent.bytes());
        }
        self.work.worked(self.sending_class, sent_pages, sent.working);
        if let Some(ping) = &mut self.ping {
            ping.busy += sent.busy;
        }
        for &run in &sent.written {
            self.epoch_written.insert_run(run);
        }
        for &run in sent.bystanders.iter().chain(&sent.skipped) {
            self.epoch_written.insert_run(run);
            for page in run.pages() {
                let is_new = self.pending.insert(page);
                self.baseless_pages += u64::from(is_new && !self.bases.contains(page));
            }
        }
        // Only pages measure the path: control messages are too small, and no confirmation follows them.
        self.rate.busy(sent.began.map_or(now, |began| began.min(now)), self.confirmed_bytes);
        self.side_bytes += sent.side_bytes;
        self.count_sent(now, sent.bytes());
        self.page_bytes_end = self.wire_bytes;
        if !self.window_open() {
            self.rate.full();
        }
    }

    /// The guest stands still since `stopped_at`.
    pub fn handle_paused(&mut self, now: Duration, stopped_at: Duration) {
        self.acted();
        if let State::Pausing = self.state {
            self.times.stopped = Some(stopped_at.min(now));
            self.throttle.stop_clock(stopped_at.min(now));
            self.times.step = stopped_at.min(now);
            self.close_step(now, |downtime| &mut downtime.pause_ms);
            self.state = State::StopAndCopy(StopStep::Scan);
        }
    }

    /// The device state was saved and sent.
    pub fn handle_device_state_sent(&mut self, now: Duration, state_bytes: u64, wire_bytes: u64) {
        self.acted();
        self.wire.device_state_bytes += wire_bytes;
        self.count_sent(now, wire_bytes);
        if let State::StopAndCopy(step @ StopStep::DeviceState) = &mut self.state {
            *step = StopStep::ScanAgain;
            self.config.fixed.device_state_bytes = state_bytes;
            self.close_step(now, |downtime| &mut downtime.device_state_ms);
        }
    }

    /// The digests were sent.
    pub fn handle_digests_sent(&mut self, now: Duration, wire_bytes: u64) {
        self.acted();
        self.wire.control_bytes += wire_bytes;
        self.count_sent(now, wire_bytes);
        if let State::StopAndCopy(StopStep::Verify) = self.state {
            self.close_step(now, |downtime| &mut downtime.verify_ms);
            self.ask_to_load(now);
        }
    }

    /// After a failure the guest runs on the source again, since `now`.
    pub fn handle_resumed(&mut self, now: Duration) {
        self.acted();
        if let State::Resuming { error, .. } = &self.state {
            let error = error.clone();
            if self.times.stopped.is_some() {
                self.times.running = Some(now);
                self.close_step(now, |downtime| &mut downtime.resume_ms);
            }
            self.end(now, Some(error));
        }
    }

    /// The guest has the share of [`Action::Throttle`] now.
    pub fn handle_throttled(&mut self, now: Duration) {
        self.acted();
        let throttle = &mut self.throttle;
        throttle.is_done = true;
        if throttle.told >= 1.0 {
            return throttle.stop_clock(now);
        }
        throttle.steps += u32::from(throttle.told < throttle.least);
        throttle.least = throttle.least.min(throttle.told);
        throttle.since.get_or_insert(now);
        // What was seen of a faster guest says little of this one.
        self.policy.restart();
        self.trend.restart();
    }

    /// The user wants no migration any more; an action under way was not completed. After the hand-over that is too
    /// late, and has no effect.
    pub fn handle_cancel(&mut self, now: Duration) {
        self.acted();
        if !matches!(self.state, State::HandedOver { .. }) {
            self.fail(now, SourceError::Cancelled);
        }
    }

    /// The connection ended; an action under way was not completed.
    pub fn handle_connection_lost(&mut self, now: Duration) {
        self.acted();
        let doing = self.doing();
        self.fail(now, SourceError::ConnectionLost { doing });
    }

    /// The driver could not carry out the action last given.
    pub fn handle_failure(&mut self, now: Duration, text: String) {
        self.acted();
        if let State::Ended { error } = &mut self.state {
            if self.throttle.is_done || self.throttle.failures >= LIFT_ATTEMPTS {
                // The last word to the target, which may be gone.
                return;
            }
            self.throttle.failures += 1;
            if self.throttle.failures >= LIFT_ATTEMPTS {
                let before = error.take().map_or_else(String::new, |error| format!("{error}; and then "));
                let text = format!("{before}the guest could not be given all of its processor time back: {text}");
                *error = Some(SourceError::Driver { text });
            }
            return;
        }
        let State::Resuming { error, failures } = &mut self.state else {
            return self.fail(now, SourceError::Driver { text });
        };
        *failures += 1;
        if *failures >= RESUME_ATTEMPTS {
            let text = format!("{error}; and then the guest could not be resumed here: {text}");
            self.end(now, Some(SourceError::Driver { text }));
        }
    }

    /// Whether the guest has been handed over: from then on nothing may run it on the source.
    pub fn handed_over(&self) -> bool {
        self.handed_over
    }

    /// Whether the migration has ended.
    pub fn ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }

    /// Why it ended, if not well.
    pub fn error(&self) -> Option<&SourceError> {
        match &self.state {
            State::Ended { error } => error.as_ref(),
            State::Resuming { error, .. } => Some(error),
            State::Start
            | State::Greeting
            | State::Opening
            | State::Observing { .. }
            | State::Pushing(_)
            | State::Pausing
            | State::StopAndCopy(_)
            | State::HandedOver { .. } => None,
        }
    }

    /// What is going on, for people.
    pub fn doing(&self) -> &'static str {
        match &self.state {
            State::Start | State::Greeting => "greeting the target",
            State::Opening => "opening further connections",
            State::Observing { .. } => "observing the guest",
            State::Pushing(_) if self.push_is_held() => "holding the push",
            State::Pushing(_) => "pushing memory",
            State::Pausing => "pausing the guest",
            State::StopAndCopy(StopStep::Load) => "waiting for the target to load",
            State::StopAndCopy(_) => "copying the rest",
            State::HandedOver { .. } => "handing over",
            State::Resuming { .. } => "resuming the guest here",
            State::Ended { .. } => "done",
        }
    }

    /// Pages that the target does not have yet, for a progress display.
    pub fn pending_pages(&self) -> u64 {
        self.pending.len()
    }

    /// Pages held back as the working set, as chosen last.
    pub fn held_pages(&self) -> u64 {
        self.held.len()
    }

    /// Passes completed and begun, for a progress display.
    pub fn passes(&self) -> u32 {
        self.passes
    }

    /// Bytes sent so far.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// The bandwidth measured, or the cap where that is less.
    pub fn bandwidth_bytes_per_s(&self) -> Option<f64> {
        self.bandwidth()
    }

    /// Whether so much is under way that the path is not empty while some pages are prepared.
    pub fn path_is_filled(&self) -> bool {
        // Before anything is known of the path, nothing says so.
        let least = self.window_bytes() / FILLED_PARTS * (FILLED_PARTS - 1);
        self.bandwidth().is_some() && self.in_flight_bytes() >= least
    }

    /// The round trip of late, without the time that bytes under way take.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// The encodings of pages that the target agreed to; pages as they are until it has answered.
    pub fn encodings(&self) -> Encodings {
        self.encodings
    }

    /// The connections that the target agreed to, the first one included.
    pub fn streams(&self) -> u16 {
        self.streams
    }

    /// How many pages were not sent yet.
    pub(crate) fn unsent_pages(&self) -> u64 {
        self.pages.total - self.ever_sent.len()
    }

    /// Whether the page is one of those that are written again, as far as known: it was seen written or sent before.
    /// During [`Action::SendPages`] that means before this time.
    pub fn is_written_again(&self, page: PageNumber) -> bool {
        self.seen.contains(page) || self.ever_sent.contains(page)
    }

    /// The report of the migration; complete once it has ended.
    pub fn report(&self, now: Duration) -> Report {
        let error = self.error();
        let outcome = match error {
            None if self.times.running.is_some() => OutcomeKind::Completed,
            _ if self.handed_over => OutcomeKind::InDoubt,
            Some(SourceError::Cancelled) => OutcomeKind::Cancelled,
            Some(SourceError::NotConverged { .. } | SourceError::TimeLimit { .. }) => OutcomeKind::NotConverged,
            Some(_) | None => OutcomeKind::Failed,
        };
        let ended = self.times.ended.unwrap_or(now);
        let between = |from: Option<Duration>, to: Option<Duration>| {
            from.map_or(0.0, |from| to.unwrap_or(ended).saturating_sub(from).as_secs_f64() * 1e3)
        };
        let pushed_s = between(self.times.pushing, self.times.pausing) / 1e3;
        let (precision, recall) = self.times.quality;
        Report {
            outcome,
            reason: error.map(ToString::to_string),
            mode: "pre-copy",
            policy: self.policy.name(),
            bound: self.bound(),
            shadows: self.shadows.iter().map(|shadow| ShadowReport::new(shadow.verdict())).collect(),
            migration_id: self.config.migration.to_string(),
            total_ms: ended.as_secs_f64() * 1e3,
            downtime_ms: between(self.times.stopped, self.times.running),
            downtime_limit_ms: self.config.downtime_limit.as_secs_f64() * 1e3,
            downtime: self.downtime,
            phases: PhaseTimes {
                connect_ms: between(Some(Duration::ZERO), self.times.observing),
                observe_ms: between(self.times.observing, self.times.pushing),
                push_ms: between(self.times.pushing, self.times.pausing),
            },
            wire_bytes: self.wire_bytes,
            wire: self.wire,
            pages: self.pages,
            compression: self.compression(),
            passes: self.passes,
            pause_cause: self.pause_cause,
            working_set: WorkingSetReport {
                predictor: self.predictor.name(),
                pages: self.times.held_at_pause,
                precision,
                recall,
            },
            bandwidth_bytes_per_s: self.rate.bytes_per_s(),
            dirty_pages_per_s: (pushed_s > 0.0).then(|| self.written_while_pushing as f64 / pushed_s),
            tracking: self.tracking,
            address_spaces: None,
            verify: self.verify,
            if_stuck: self.stuck.answer().name(),
            throttle: self.throttle.report(ended),
            limit_waived: self.times.limit_waived,
        }
    }

    fn bound(&self) -> BoundReport {
        let PageReport { total, sent, zero, stop, .. } = self.pages;
        let least_stop_pages = self.times.least_stop_pages;
        BoundReport {
            sent_ratio: self.times.stopped.map(|_| (sent + zero) as f64 / total.max(1) as f64),
            least_stop_pages,
            stop_ratio: least_stop_pages.filter(|&least| least > 0).map(|least| stop as f64 / least as f64),
        }
    }

    fn compression(&self) -> CompressionReport {
        let WireReport { raw_bytes, lz4_bytes, zstd_bytes, delta_bytes, copy_bytes, .. } = self.wire;
        let sent = raw_bytes + lz4_bytes + zstd_bytes + delta_bytes + copy_bytes;
        CompressionReport {
            encode_ms: self.encoding_time.as_secs_f64() * 1e3,
            ratio: (sent > 0).then(|| (self.pages.sent * PAGE_BYTES) as f64 / sent as f64),
        }
    }

    /// Adds up what was sent by its encodings.
    fn count_encodings(&mut self, sent: &SentPages) {
        let (wire, pages) = (&mut self.wire, &mut self.pages);
        pages.sent += sent.content_pages();
        pages.raw += sent.raw_pages;
        pages.lz4 += sent.lz4.pages;
        pages.zstd += sent.zstd.pages;
        pages.delta += sent.delta.pages;
        pages.copy += sent.copy.pages;
        wire.raw_bytes += sent.raw_bytes;
        wire.zero_bytes += sent.zero_bytes;
        wire.lz4_bytes += sent.lz4.bytes;
        wire.zstd_bytes += sent.zstd.bytes;
        wire.delta_bytes += sent.delta.bytes;
        wire.copy_bytes += sent.copy.bytes;
        self.encoding_time += sent.encoding;
    }

    fn act(&mut self, action: Action) -> Action {
        self.acting = true;
        action
    }

    fn acted(&mut self) {
        self.acting = false;
    }

    /// The cap, the measurement, or the lesser of both.
    fn bandwidth(&self) -> Option<f64> {
        self.capped(self.rate.bytes_per_s())
    }

    fn capped(&self, measured: Option<f64>) -> Option<f64> {
        let cap = self.config.bandwidth_cap_bytes_per_s.map(|cap| cap as f64);
        match (cap, measured) {
            (Some(cap), Some(measured)) => Some(cap.min(measured)),
            (cap, measured) => cap.or(measured),
        }
    }

    /// Bytes sent that the target has not confirmed.
    pub fn in_flight_bytes(&self) -> u64 {
        self.wire_bytes - self.confirmed_bytes
    }

    /// For how long the path is kept filled.
    fn filled_time(&self) -> Duration {
        (self.config.downtime_limit / WINDOW_LIMIT_PARTS).clamp(WINDOW_TIME_MIN, WINDOW_TIME_MAX)
    }

    /// The most bytes that are to be under way.
    fn window_bytes(&self) -> u64 {
        let time = self.filled_time() + 2 * self.round_trip.unwrap_or_default();
        match self.capped(self.rate.peak_bytes_per_s()) {
            Some(rate) => ((rate * time.as_secs_f64()) as u64).clamp(WINDOW_MIN_BYTES, WINDOW_MAX_BYTES),
            None => WINDOW_FIRST_BYTES,
        }
    }

    /// Whether next to nothing is under way.
    fn has_arrived(&self) -> bool {
        let carried = self.bandwidth().map_or(0.0, |rate| rate * ARRIVED_TIME.as_secs_f64());
        self.in_flight_bytes() as f64 <= carried
    }

    fn window_open(&self) -> bool {
        self.in_flight_bytes() < self.window_bytes()
    }

    /// How much of the pages of this class makes a chunk.
    fn chunk(&self, class: PageClass) -> Chunk {
        let time = self.filled_time() / CHUNK_WINDOW_PARTS;
        let bytes = self.bandwidth().map_or(0.0, |rate| rate * time.as_secs_f64());
        Chunk {
            // As bytes, the least is that of pages as they are: each chunk costs some time beside its bytes.
            bytes: bytes.max((CHUNK_MIN_PAGES * PAGE_WIRE_BYTES) as f64),
            // Zero pages come in whole regions, and others behind them.
            page_bytes_min: self.sizes.planned_bytes(class) / CHUNK_TIMES_MAX,
            pages_max: (self.largest_chunk * CHUNK_GROWTH).clamp(CHUNK_MIN_PAGES, CHUNK_MAX_PAGES),
        }
    }

    /// The same as pages.
    fn chunk_pages(&self, class: PageClass) -> u64 {
        self.chunk(class).pages(self.sizes.mean_bytes(class))
    }

    /// The same for pages of either class.
    fn any_chunk_pages(&self) -> u64 {
        self.chunk_pages(PageClass::New).min(self.chunk_pages(PageClass::Written))
    }

    fn count_sent(&mut self, now: Duration, bytes: u64) {
        self.pacer.sent(now, bytes);
        self.wire_bytes += bytes;
        if self.times.stopped.is_some() {
            self.wire.stop_bytes += bytes;
        } else {
            self.wire.push_bytes += bytes;
        }
    }

    fn welcomed(&mut self, now: Duration, welcome: &Welcome) {
        if !matches!(self.state, State::Greeting) {
            let doing = self.doing();
            return self.fail(now, SourceError::Unexpected { message: "welcome", doing });
        }
        if welcome.migration != self.config.migration || !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
            return self.fail(now, SourceError::BadWelcome);
        }
        if !self.config.encodings.allows(welcome.encodings) {
            return self.fail(now, SourceError::BadWelcome);
        }
        if !(1..=self.config.streams).contains(&welcome.streams) {
            return self.fail(now, SourceError::BadWelcome);
        }
        (self.encodings, self.streams) = (welcome.encodings, welcome.streams);
        if self.streams > 1 {
            self.state = State::Opening;
        } else {
            self.begin_observing(now);
        }
    }

    fn begin_observing(&mut self, now: Duration) {
        self.heard = now;
        self.times.observing = Some(now);
        self.next_scan = now;
        // The first scan arms the tracking; the observation begins when it is done.
        self.state = State::Observing { until: Duration::MAX };
        self.ping(now);
    }

    fn ping(&mut self, now: Duration) {
        if self.ping.is_none() {
            let was_idle = self.confirmed_bytes >= self.page_bytes_end;
            self.ping = Some(Ping { sent: now, was_idle, busy: Duration::ZERO });
            self.outbox.push_back(Message::Ping(self.tracking.scans));
        }
    }

    /// The epoch's writes are complete: the predictor and the window learn them.
    fn end_epoch(&mut self, owners: &dyn Owners) {
        self.last_epoch_pages = self.epoch_written.len();
        let written = self.epoch_written.take_runs();
        match owners.sole_owner() {
            Some(owner) => self.predictor.observe(owner, &written),
            None => {
                let owned = group_by_owner(owners, &written);
                owned.iter().for_each(|(&owner, runs)| self.predictor.observe(owner, runs));
            }
        }
        self.predictor.end_epoch();
        // Without a predictor all pages are alike.
        if self.predictor.tracked_pages() > 0 {
            for &run in &written {
                self.seen.insert_run(run);
            }
        }
        let epochs = (RECALL_WINDOW.as_nanos() / self.epoch().as_nanos().max(1)).clamp(1, 64) as usize;
        while self.window.len() >= epochs {
            self.window.pop_front();
        }
        self.window.push_back(written);
    }

    /// From the end of a scan to the beginning of the next one, if nothing calls for it before.
    fn scan_pause(&self) -> Duration {
        let long = self.scan_time.unwrap_or_default().saturating_mul(SCAN_PAUSE_FACTOR);
        let most = SCAN_PAUSE_MAX.min(self.config.stall_timeout / SCAN_PAUSE_STALL_PARTS);
        self.config.epoch.max(long.min(most))
    }

    /// Length of an epoch: what is written in it is found by the scan at its end.
    fn epoch(&self) -> Duration {
        self.scan_pause() + self.scan_time.unwrap_or_default()
    }

    fn observed(&mut self, now: Duration) {
        self.next_scan = now + self.scan_pause();
        self.ping(now);
        if let State::Observing { until } = self.state
            && now >= until
        {
            self.times.pushing = Some(now);
            self.begin_push();
            if !self.push_is_held() {
                self.decide(now, Moment::Scan);
            }
        }
    }

    fn begin_push(&mut self) {
        self.state = State::Pushing(Push::new(self.pending.len(), self.pages.total));
    }

    /// Chooses among the pending pages that were seen written: the hottest are held back, as many as the policy wants, and
    /// of the others as many are to be sent as can be until the next scan, the coldest.
    fn plan_warm(&mut self, now: Duration) -> VecDeque<PageRun> {
        let facts = self.facts(now);
        let budget_pages = facts.budget_pages() as usize;
        let epoch_bytes = self.bandwidth().unwrap_or(f64::MAX) * facts.epoch.as_secs_f64() * PLAN_MARGIN;
        let wanted = (epoch_bytes / facts.sizes.planned_bytes(PageClass::Written)) as usize;
        // After so many there is a scan at once: a path that is wider than measured does not lie idle until the next one.
        let wanted = wanted.max(self.chunk_pages(PageClass::Written).max(SCAN_MIN_PAGES) as usize);
        let mut ranking = std::mem::take(&mut self.ranking);
        let other_heat = self.rank_pending(&mut ranking, budget_pages, wanted);

        // Pages that are not to be held back, whatever their heat, come last: where it pays, those that were never sent;
        // while it is to be learned whether it does, those that were.
        let candidates = match () {
            () if self.is_probing() => partition(&mut ranking, |page| !self.bases.contains(page)),
            () if facts.rewrite_share <= BASE_SHARE => partition(&mut ranking, |page| self.bases.contains(page)),
            () => ranking.len(),
        };
        // Only those that can be held need to be in order.
        let most = budget_pages.min(candidates);
        if (1..candidates).contains(&most) {
            ranking[..candidates].select_nth_unstable_by_key(most, hottest_first);
        }
        ranking[..most].sort_unstable_by_key(hottest_first);
        let heats: Vec<f64> = ranking[..most].iter().map(|ranked| ranked.heat).collect();
        let other_heat = other_heat + ranking[most..].iter().map(|ranked| ranked.heat).sum::<f64>();
        let Hold { pages, fresh_pages_per_epoch, send_below } = self.policy.hold(&facts, &heats, other_heat);
        for shadow in &mut self.shadows {
            shadow.hold(&facts, &heats, other_heat);
        }
        self.fresh_pages_per_epoch = fresh_pages_per_epoch;
        let held = pages.min(most);
        self.held_pages_per_epoch = heats[..held].iter().sum();
        self.held.clear();
        let mut held_pages: Vec<PageNumber> = ranking[..held].iter().map(|ranked| ranked.page).collect();
        // In their order the pages lie side by side in the set's memory.
        held_pages.sort_unstable();
        self.held_new_pages = 0;
        for page in held_pages {
            self.held.insert(page);
            self.held_new_pages += u64::from(!self.bases.contains(page));
        }

        let mut free = &mut ranking[held..];
        let free_pages = free.len();
        if free.len() > wanted {
            // The coldest, which come last. Those in order are hotter than all other candidates: where there are no others
            // than these, they need not be looked at again.
            let hotter = free.len() - wanted;
            let in_order = if candidates == held + free_pages { hotter.min(most - held) } else { 0 };
            free = &mut free[in_order..];
            if hotter > in_order {
                free.select_nth_unstable_by_key(hotter - in_order, hottest_first);
                free = &mut free[hotter - in_order..];
            }
        }
        let is_base = |page| candidates < held + free_pages && !self.bases.contains(page);
        // Nothing is sent in vain that is learned from.
        let send_below = if self.is_learning() { f64::INFINITY } else { send_below };
        let wanted = free.iter().filter(|ranked| ranked.heat < send_below || is_base(ranked.page));
        let mut pages: Vec<PageNumber> = wanted.map(|ranked| ranked.page).collect();
        ranking.clear();
        self.ranking = ranking;
        pages.sort_unstable();
        runs_of(pages).into()
    }

    /// Gathers the pending pages that were seen written, in no order, with their heat, at most one write per epoch, and
    /// returns the heat of all other pages. Of the pages that the predictor gave up, which can be many more than it knows
    /// and are all equally cold, only so many of the first and so many of the last are gathered.
    fn rank_pending(&mut self, ranking: &mut Vec<RankedPage>, first: usize, last: usize) -> f64 {
        let Self { predictor, pending, seen, known, .. } = self;
        let has_forgotten = predictor.tracked_pages() < seen.len();
        let mut other_heat = 0.0;
        ranking.reserve(predictor.tracked_pages() as usize);
        predictor.visit(&mut |ranked| {
            let heat = ranked.heat.min(1.0);
            debug_assert!(seen.contains(ranked.page), "{ranked:?} is known and was not seen");
            if pending.contains(ranked.page) {
                ranking.push(RankedPage { heat, ..ranked });
                if has_forgotten {
                    known.insert(ranked.page);
                }
            } else {
                other_heat += heat;
            }
        });
        if has_forgotten {
            let forgotten = pending.ends_of_difference(seen, known, first, last);
            ranking.extend(forgotten.into_iter().map(|page| RankedPage { page, heat: 0.0 }));
            known.clear();
        }
        other_heat
    }

    fn facts(&self, now: Duration) -> Facts {
        let facts = self.facts_without_bound(now);
        let carried = facts.carried_pages_per_epoch();
        Facts { least_stop_pages: carried.and_then(|pages| self.predictor.least_stop_pages(pages)), ..facts }
    }

    /// The facts that cost no time to gather.
    fn facts_without_bound(&self, now: Duration) -> Facts {
        let mut fixed = self.config.fixed;
        fixed.time += self.round_trip.unwrap_or_default() * 2;
        // There are two scans in the pause.
        let scans = self.tracking.scans.max(1) as f64;
        fixed.time += Duration::from_secs_f64(2.0 * self.tracking.scan_ms / scans / 1e3);
        Facts {
            pushing_for: self.pushing_for(now),
            passes: self.passes,
            pending_pages: self.pending.len(),
            unheld_pages: self.pending.len() - self.held.len(),
            new_pages: self.baseless_pages,
            held_new_pages: self.held_new_pages,
            rewrite_share: self.rewrite_share(),
            sizes: self.sizes,
            work: self.work,
            fresh_pages_per_epoch: self.fresh_pages_per_epoch as u64,
            held_pages_per_epoch: self.held_pages_per_epoch,
            epoch: self.epoch(),
            in_flight_bytes: self.in_flight_bytes(),
            bandwidth_bytes_per_s: self.bandwidth(),
            fixed,
            downtime_limit: self.config.downtime_limit,
            least_stop_pages: None,
            is_learning: self.is_learning(),
        }
    }

    fn push(&mut self, now: Duration) -> Option<Action> {
        let State::Pushing(push) = &self.state else { unreachable!("only called while pushing") };
        let pages_since_scan = push.pages_since_scan;
        // What is not armed would be reported as written again, however often it is sent.
        let scan = Action::Scan { relaxed: push.all == SendAll::No };
        if now >= self.next_scan {
            if self.rules.scan_every_epoch || push.drained || push.all == SendAll::Arming || self.push_is_held() {
                return Some(self.act(scan));
            }
            // The target is heard once in each epoch all the same.
            self.next_scan = now + self.scan_pause();
            self.ping(now);
            return self.poll_action(now);
        }
        if self.push_is_held() || !self.window_open() || now < self.pacer.next_at() {
            return None;
        }
        if !self.rules.scan_every_epoch && pages_since_scan > 0 && self.policy.wants_scan(&self.facts(now)) {
            return Some(self.act(scan));
        }
        let runs = self.next_chunk(now);
        if runs.is_empty() {
            let has_arrived = self.has_arrived();
            let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
            let scan_now = !push.drained && pages_since_scan >= SCAN_MIN_PAGES || push.awaits_arrival && has_arrived;
            push.drained = true;
            return scan_now.then(|| self.act(scan));
        }
        let at_read = if self.rules.at_read == AtRead::Rearm && !self.arming_pays(&runs) {
            AtRead::Ignore
        } else {
            self.rules.at_read
        };
        Some(self.send_pages(runs, at_read))
    }

    /// Whether to arm these pages again before they are read: some are written once more only after that, and then they are
    /// not sent again for what was written before.
    fn arming_pays(&self, runs: &[PageRun]) -> bool {
        let bytes = self.sizes.mean_bytes(PageClass::Written);
        let on_the_way = self.bandwidth().map_or(f64::MAX, |bandwidth| bytes / bandwidth);
        let page_s = on_the_way.max(self.work.seconds_per_page(PageClass::Written));
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        self.work.arming_pays(runs.len() as u64, pages, page_s)
    }

    /// The next pages to send, taken out of `pending` by [`Self::send_pages`].
    fn next_chunk(&mut self, now: Duration) -> Vec<PageRun> {
        if matches!(&self.state, State::Pushing(push) if push.all == SendAll::Sending) {
            // Chosen already, whatever they are: none of them may be taken by another way.
            return self.next_warm(now, self.any_chunk_pages());
        }
        let predicts = !self.seen.is_empty();
        if self.rules.order == SendOrder::ColdestFirst {
            if predicts && let Some(runs) = self.next_probe() {
                return runs;
            }
            if predicts || self.passes == 0 {
                let runs = self.next_cold();
                if !runs.is_empty() {
                    return runs;
                }
            }
            if predicts {
                return self.next_warm(now, self.chunk_pages(PageClass::Written));
            }
        }
        // Without any prediction, all pages are alike.
        self.next_by_address(self.any_chunk_pages())
    }

    /// Whether pages are sent to learn what one costs that was sent before. Without deltas it costs what others do.
    fn is_probing(&self) -> bool {
        self.is_learning() && self.probed_pages < self.probe_pages_max()
    }

    fn is_learning(&self) -> bool {
        self.encodings.has_deltas() && !self.sizes.is_learned(PageClass::Written)
    }

    fn probe_pages_max(&self) -> u64 {
        PROBE_PAGES_MAX.min(self.pages.total / PROBE_PARTS)
    }

    /// What a page costs that was sent before, as a share of what one costs that is sent for the first time.
    fn rewrite_share(&self) -> f64 {
        if !(self.encodings.has_deltas() && self.sizes.is_learned(PageClass::Written)) {
            return 1.0;
        }
        let WireReport { raw_bytes, lz4_bytes, zstd_bytes, .. } = self.wire;
        let pages = self.pages.sent - self.pages.delta - self.pages.copy;
        let first_bytes = (raw_bytes + lz4_bytes + zstd_bytes) as f64 / pages.max(1) as f64;
        (self.sizes.mean_bytes(PageClass::Written) / first_bytes.max(1.0)).min(1.0)
    }

    /// The next pages that are sent to learn from: first those that were sent before.
    fn next_probe(&mut self) -> Option<Vec<PageRun>> {
        let State::Pushing(push) = &self.state else { unreachable!("only called while pushing") };
        let is_due = push.probes.is_some() || (self.is_probing() && self.tracking.scans > PROBE_AFTER_SCANS);
        if !is_due || push.warm.is_some() {
            // Pages that are chosen already would be sent twice.
            return None;
        }
        if push.probes.is_none() {
            let probes = self.choose_probes();
            let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
            push.probes = Some(probes);
        }
        let State::Pushing(Push { probes: Some(probes), .. }) = &mut self.state else {
            unreachable!("the probes were just chosen")
        };
        let runs = probes.front_mut()?;
        // An action takes so many runs at most.
        let rest = runs.split_off(runs.len().min(MAX_RUNS_PER_ACTION));
        let first = std::mem::replace(runs, rest);
        if runs.is_empty() {
            probes.pop_front();
        }
        Some(first)
    }

    /// Pages that were sent before and were written again, and the hottest of the others, which soon will be.
    fn choose_probes(&mut self) -> VecDeque<Vec<PageRun>> {
        let mut left = self.probe_pages_max().saturating_sub(self.probed_pages) as usize;
        // Nothing is known outside a plan.
        let again = self.pending.ends_of_difference(&self.bases, &self.known, PROBE_PAGES_PER_EPOCH.min(left), 0);
        left -= again.len();
        let mut ranking = std::mem::take(&mut self.ranking);
        self.rank_pending(&mut ranking, 0, 0);
        let most = PROBE_PAGES_PER_EPOCH.min(left);
        let others = partition(&mut ranking, |page| !self.bases.contains(page));
        if (1..others).contains(&most) {
            ranking[..others].select_nth_unstable_by_key(most, hottest_first);
        }
        let mut new: Vec<PageNumber> = ranking[..others.min(most)].iter().map(|ranked| ranked.page).collect();
        new.sort_unstable();
        ranking.clear();
        self.ranking = ranking;
        self.probed_pages += (again.len() + new.len()) as u64;
        [again, new].into_iter().filter(|pages| !pages.is_empty()).map(runs_of).collect()
    }

    fn next_by_address(&mut self, most: u64) -> Vec<PageRun> {
        let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
        let mut runs = Vec::new();
        let (mut pages, mut wrapped) = (0, false);
        let start = push.cursor;
        while pages < most && runs.len() < MAX_RUNS_PER_ACTION {
            let left = if wrapped { (most - pages).min(start.saturating_sub(push.cursor)) } else { most - pages };
            match self.pending.next_run(PageNumber(push.cursor), left.max(1)) {
                Some(run) if !wrapped || run.end() <= start => {
                    push.cursor = run.end();
                    pages += run.count;
                    runs.push(run);
                }
                _ if wrapped => break,
                _ => (push.cursor, wrapped) = (0, true),
            }
        }
        runs
    }

    /// Pages never seen written. A written page is seen, so they only become fewer.
    fn next_cold(&mut self) -> Vec<PageRun> {
        let is_filled = self.path_is_filled();
        let (chunk, mean_bytes) = (self.chunk(PageClass::New), self.sizes.mean_bytes(PageClass::New));
        let Self { pending, seen, state, .. } = self;
        let State::Pushing(push) = state else { unreachable!("only called while pushing") };
        let pages_max = |page_bytes: Option<f64>| chunk.pages(page_bytes.unwrap_or(mean_bytes));
        push.cold.next(pending, seen, is_filled, pages_max, MAX_RUNS_PER_ACTION)
    }

    fn next_warm(&mut self, now: Duration, most: u64) -> Vec<PageRun> {
        let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
        if push.warm.is_none() {
            let warm = self.plan_warm(now);
            let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
            push.warm = Some(warm);
        }
        let State::Pushing(Push { warm: Some(warm), .. }) = &mut self.state else {
            unreachable!("the warm pages were just chosen")
        };
        let mut runs = Vec::new();
        let mut pages = 0;
        while pages < most && runs.len() < MAX_RUNS_PER_ACTION {
            let Some(run) = warm.pop_front() else { break };
            let (now, rest) = run.split_front(most - pages);
            if let Some(rest) = rest {
                warm.push_front(rest);
            }
            pages += now.count;
            runs.push(now);
        }
        runs
    }

    fn send_pages(&mut self, runs: Vec<PageRun>, at_read: AtRead) -> Action {
        let (mut pages, mut with_base) = (0, 0);
        for page in runs.iter().flat_map(|run| run.pages()) {
            let has_base = self.bases.contains(page);
            with_base += u64::from(has_base);
            let was_pending = self.pending.remove(page);
            debug_assert!(was_pending, "{page:?} is sent without need");
            let was_held = self.held.remove(page);
            if !has_base {
                self.baseless_pages -= 1;
                self.held_new_pages -= u64::from(was_held);
            }
            pages += 1;
            // Until the driver says otherwise.
            self.not_zero.insert(page);
        }
        self.largest_chunk = self.largest_chunk.max(pages);
        if let State::Pushing(push) = &mut self.state {
            push.pages_since_scan += pages;
            push.pass_pages += pages;
        } else {
            self.pages.stop += pages;
        }
        self.sending.clone_from(&runs);
        self.sending_class = if 2 * with_base > pages { PageClass::Written } else { PageClass::New };
        self.act(Action::SendPages { runs, at_read })
    }

    fn pushed_and_scanned(&mut self, now: Duration, owners: &dyn Owners) {
        self.written_while_pushing += self.epoch_written.len();
        self.written_in_push.union_with(&self.epoch_written);
        self.end_epoch(owners);
        self.next_scan = now + self.scan_pause();
        self.ping(now);
        self.trend.scanned(now, self.last_epoch_pages, self.facts_without_bound(now).pending_bytes());
        if self.push_is_held() {
            // No work is done that a pass could measure, and nothing is to be decided.
            if let State::Pushing(push) = &mut self.state {
                (push.warm, push.pages_since_scan, push.drained) = (None, 0, false);
            }
            return;
        }
        let has_arrived = self.has_arrived();
        let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
        let predicting = self.rules.order == SendOrder::ColdestFirst && !self.seen.is_empty();
        let cold_is_sent = predicting && self.pending.is_subset_of(&self.seen);
        let pass_ends = push.drained
            || push.pass_pages >= push.pass_length
            || (self.passes == 0 && cold_is_sent)
            || !self.rules.scan_every_epoch;
        if pass_ends {
            self.passes += 1;
            (push.pass_pages, push.pass_length) = (0, self.pending.len());
            if self.passes == 1 {
                self.trend.restart();
            }
        }
        (push.warm, push.probes, push.pages_since_scan, push.drained) = (None, None, 0, false);
        push.awaits_arrival = !has_arrived;
        if push.all == SendAll::Arming {
            return self.send_all(now);
        }
        if cold_is_sent {
            // What is held, and what is expected beside it, is a fact for the decision.
            let warm = self.plan_warm(now);
            if let State::Pushing(push) = &mut self.state {
                push.warm = Some(warm);
            }
        } else if !predicting {
            self.fresh_pages_per_epoch = self.last_epoch_pages as f64;
        }
        self.decide(now, if pass_ends { Moment::PassEnd } else { Moment::Scan });
    }

    /// Has everything sent that is pending: at once if all is armed, else when it is.
    fn send_all(&mut self, now: Duration) {
        let State::Pushing(push) = &mut self.state else { unreachable!("only called while pushing") };
        if push.all == SendAll::No {
            push.all = SendAll::Arming;
            self.next_scan = now;
            return;
        }
        push.all = SendAll::Sending;
        push.warm = Some(self.pending.runs().collect());
        self.held.clear();
        (self.held_new_pages, self.held_pages_per_epoch) = (0, 0.0);
        self.next_scan = now + SEND_ALL_EPOCHS * self.scan_pause();
    }

    fn send_all_no_more(&mut self) {
        if let State::Pushing(push) = &mut self.state {
            push.all = SendAll::No;
        }
    }

    fn decide(&mut self, now: Duration, moment: Moment) {
        let facts = self.facts(now);
        for shadow in &mut self.shadows {
            shadow.decide(moment, &facts);
        }
        let decision = self.policy.decide(moment, &facts);
        let Self { stuck, predictor, last_epoch_pages, .. } = self;
        let share = || {
            let carried = facts.carried_pages_per_epoch()?;
            let least = |pages_per_epoch| predictor.least_stop_pages(pages_per_epoch);
            Some(fitting_share(facts.budget_pages(), carried, *last_epoch_pages as f64, &least))
        };
        match stuck.step(decision, moment, &facts, &share) {
            Step::Push => self.send_all_no_more(),
            Step::SendAll => self.send_all(now),
            Step::Pause { limit_waived: false } => self.pause_now(now, PauseCause::Plan),
            Step::Pause { limit_waived: true } => self.pause_now(now, PauseCause::Stuck),
            Step::Throttle { share } => {
                self.throttle.wanted = share;
                self.send_all_no_more();
            }
            Step::GiveUp => {
                let error = self.not_converged(now);
                self.fail(now, error);
            }
        }
    }

    /// What share of the processor time the driver shall give the guest now, if it was not told so yet. Before the hand-over
    /// every end gives back all of it, also where it is not known what was done; a push that is held needs no slow guest.
    fn share_to_set(&self) -> Option<f64> {
        let throttle = &self.throttle;
        let share = match &self.state {
            State::Pushing(_) if self.push_is_held() => 1.0,
            State::Pushing(_) => throttle.wanted,
            State::Ended { .. } if self.handed_over || throttle.failures >= LIFT_ATTEMPTS => return None,
            State::Ended { .. } => 1.0,
            State::Start
            | State::Greeting
            | State::Opening
            | State::Observing { .. }
            | State::Pausing
            | State::StopAndCopy(_)
            | State::HandedOver { .. }
            | State::Resuming { .. } => return None,
        };
        (!throttle.is_done || throttle.told != share).then_some(share)
    }

    /// Has the guest paused, whatever remains.
    fn pause_now(&mut self, now: Duration, cause: PauseCause) {
        self.times.pushing.get_or_insert(now);
        self.times.pausing = Some(now);
        self.pause_cause = Some(cause);
        let facts = self.facts_without_bound(now);
        self.downtime.fixed_planned_ms = facts.fixed_downtime().as_secs_f64() * 1e3;
        self.times.limit_waived = (cause != PauseCause::Plan && !facts.fits()).then(|| WaivedLimit {
            at_ms: facts.pushing_for.as_secs_f64() * 1e3,
            expected_downtime_ms: facts.expected_downtime().map(|downtime| downtime.as_secs_f64() * 1e3),
        });
        self.state = State::Pausing;
    }

    fn not_converged(&self, now: Duration) -> SourceError {
        let facts = self.facts_without_bound(now);
        let pushed = now.saturating_sub(self.times.pushing.unwrap_or(now));
        SourceError::NotConverged {
            passes: self.passes,
            pending_pages: facts.pending_pages,
            expected_ms: facts.expected_downtime().map_or(u64::MAX, |downtime| downtime.as_millis() as u64),
            limit_ms: facts.downtime_limit.as_millis() as u64,
            dirty_pages_per_s: (self.written_while_pushing as f64 / pushed.as_secs_f64().max(1e-3)) as u64,
            bandwidth_bytes_per_s: facts.bandwidth_bytes_per_s.unwrap_or(0.0) as u64,
            throttled_percent: Throttle::percent(self.throttle.least).round() as u32,
        }
    }

    /// How many of the held pages were written since the push began, so that sending them would have been in vain; and
    /// how many of the pages written within the last window were held.
    fn judge_prediction(&mut self, now: Duration) {
        let mut recent = PageSet::empty(self.pending.capacity());
        for &run in self.window.iter().flatten() {
            recent.insert_run(run);
        }
        let held_and = |set: &PageSet| self.held.pages().filter(|&page| set.contains(page)).count() as f64;
        let share = |part: f64, of: &PageSet| (!of.is_empty()).then(|| part / of.len() as f64);
        let precision = share(held_and(&self.written_in_push), &self.held);
        let recall = share(held_and(&recent), &recent);
        self.times.quality = (precision, recall);
        self.times.held_at_pause = self.held.len();
        self.times.least_stop_pages = self.facts(now).least_stop_pages;
        self.pages.held = self.held.pages().filter(|&page| !self.ever_sent.contains(page)).count() as u64;
    }

    fn stop_and_copy(&mut self, now: Duration, step: StopStep) -> Option<Action> {
        match step {
            StopStep::Scan | StopStep::ScanAgain => Some(self.act(Action::Scan { relaxed: false })),
            StopStep::ScanHoles => Some(self.act(Action::ScanHoles)),
            StopStep::Copy | StopStep::CopyAgain => self.copy(now, step),
            StopStep::DeviceState => Some(self.act(Action::SendDeviceState)),
            StopStep::Verify => Some(self.act(Action::SendDigests)),
            StopStep::Load => None,
        }
    }

    fn copy(&mut self, now: Duration, step: StopStep) -> Option<Action> {
        if self.pending.is_empty() {
            self.close_step(now, |downtime| &mut downtime.copy_ms);
            let next = match step {
                StopStep::Copy => StopStep::DeviceState,
                _ => {
                    if self.streams > 1 {
                        self.outbox.push_back(Message::Fence { side_bytes: self.side_bytes });
                    }
                    if !self.config.verify {
                        self.ask_to_load(now);
                        return self.poll_action(now);
                    }
                    StopStep::Verify
                }
            };
            self.state = State::StopAndCopy(next);
            return self.poll_action(now);
        }
        if !self.window_open() || now < self.pacer.next_at() {
            return None;
        }
        let most = self.any_chunk_pages();
        let mut runs = Vec::new();
        let (mut from, mut pages) = (0, 0);
        while pages < most && runs.len() < MAX_RUNS_PER_ACTION {
            let Some(run) = self.pending.next_run(PageNumber(from), most - pages) else { break };
            from = run.end();
            pages += run.count;
            runs.push(run);
        }
        Some(self.send_pages(runs, AtRead::Ignore))
    }

    fn ask_to_load(&mut self, now: Duration) {
        self.heard = now;
        self.outbox.push_back(Message::Load { device_state_bytes: self.config.fixed.device_state_bytes });
        self.state = State::StopAndCopy(StopStep::Load);
    }

    fn prepared(&mut self, now: Duration, prepared: &Prepared) {
        self.close_step(now, |downtime| &mut downtime.load_ms);
        if self.config.verify {
            self.verify = Some(VerifyReport { pages: prepared.verified_pages, mismatched: prepared.mismatched_pages });
            if prepared.mismatched_pages > 0 || prepared.verified_pages != self.pages.total {
                let pages =
                    prepared.mismatched_pages.max(self.pages.total - prepared.verified_pages.min(self.pages.total));
                return self.fail(now, SourceError::Mismatch { pages, first: prepared.first_mismatch });
            }
        }
        assert!(self.pending.is_empty(), "{} pages left behind at the hand-over", self.pending.len());
        self.outbox.push_back(Message::HandOver(self.config.migration));
        self.handed_over = true;
        self.state = State::HandedOver { since: now };
        self.times.step = now;
    }

    /// Adds the time since the last step to its part of the downtime.
    fn close_step(&mut self, now: Duration, part: impl FnOnce(&mut DowntimeReport) -> &mut f64) {
        *part(&mut self.downtime) += now.saturating_sub(self.times.step).as_secs_f64() * 1e3;
        self.times.step = now;
    }

    /// The latest moment at which the target must have been heard.
    fn silence_deadline(&self) -> Option<Duration> {
        let expected = match &self.state {
            State::Greeting | State::StopAndCopy(StopStep::Load) => true,
            State::Observing { .. } => self.ping.is_some(),
            State::Pushing(_) | State::StopAndCopy(_) => self.ping.is_some() || !self.window_open(),
            State::HandedOver { since } => return Some(*since + self.config.stall_timeout * RUNNING_PATIENCE),
            State::Start | State::Opening | State::Pausing | State::Resuming { .. } | State::Ended { .. } => false,
        };
        expected.then(|| self.heard + self.config.stall_timeout)
    }

    fn check_silence(&mut self, now: Duration) {
        if self.silence_deadline().is_some_and(|deadline| now >= deadline) {
            let doing = self.doing();
            let ms = now.saturating_sub(self.heard).as_millis() as u64;
            self.fail(now, SourceError::Stalled { ms, doing });
        }
    }

    /// Ends the migration for this reason. Before the hand-over the guest goes on here; after it, never.
    fn fail(&mut self, now: Duration, error: SourceError) {
        match self.state {
            State::Ended { .. } | State::Resuming { .. } => {}
            State::HandedOver { .. } => self.end(now, Some(error)),
            State::Pausing | State::StopAndCopy(_) => {
                self.tell_target(&error);
                self.state = State::Resuming { error, failures: 0 };
            }
            State::Start | State::Greeting | State::Opening | State::Observing { .. } | State::Pushing(_) => {
                self.tell_target(&error);
                self.end(now, Some(error));
            }
        }
    }

    /// Puts the one message that is still worth sending into the outbox.
    fn tell_target(&mut self, error: &SourceError) {
        self.outbox.clear();
        let fault = match error {
            SourceError::Cancelled => Fault::User,
            SourceError::Driver { .. } | SourceError::NotConverged { .. } | SourceError::TimeLimit { .. } => {
                Fault::Sender
            }
            SourceError::Unexpected { .. } | SourceError::BadWelcome | SourceError::Mismatch { .. } => Fault::Receiver,
            SourceError::Aborted { .. } | SourceError::ConnectionLost { .. } | SourceError::Stalled { .. } => return,
        };
        self.outbox.push_back(Message::Abort(Abort { fault, text: error.to_string() }));
    }

    fn end(&mut self, now: Duration, error: Option<SourceError>) {
        self.times.ended = Some(now);
        self.state = State::Ended { error };
    }
}

/// Orders pages by descending heat, which is not negative, those of equal heat by their numbers. As one number, because a
/// processor cannot foresee whether two heats are equal, and a comparison in two steps would branch on that.
fn hottest_first(ranked: &RankedPage) -> u128 {
    debug_assert!(ranked.heat.is_sign_positive(), "{ranked:?}");
    u128::from(!ranked.heat.to_bits()) << 64 | u128::from(ranked.page.0)
}

/// Moves the pages that are `wanted` to the front; how many they are.
fn partition(ranking: &mut [RankedPage], wanted: impl Fn(PageNumber) -> bool) -> usize {
    let mut front = 0;
    for at in 0..ranking.len() {
        if wanted(ranking[at].page) {
            ranking.swap(front, at);
            front += 1;
        }
    }
    front
}

/// These pages, which ascend, as runs.
fn runs_of(pages: Vec<PageNumber>) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for page in pages {
        append_page(&mut runs, page);
    }
    runs
}

/// Adds `page`, lengthening the last run where it fits.
fn append_page(runs: &mut Vec<PageRun>, page: PageNumber) {
    match runs.last_mut() {
        Some(run) if run.end() == page.0 => run.count += 1,
        Some(run) if run.first.0 == page.0 + 1 => *run = PageRun::new(page.0, run.count + 1),
        Some(_) | None => runs.push(PageRun::new(page.0, 1)),
    }
}
