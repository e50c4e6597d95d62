//! Which encoding sends pages soonest.
//!
//! Encoding and sending go on at the same time, so a page takes whichever of the two takes longer, and somewhat more where they
//! are close: both fluctuate, from page to page and with what else the machine does, and then one waits for the other.
//!
//! ```text
//!   time per byte of pages  =  ∛(sender³ + path³),   sender = time of one processor for encoding / processors + all else
//!                                                    path   = share that is left / bandwidth
//! ```
//!
//! "All else" is how much longer the sender really takes: reading and writing, and waiting for processors that it shares with
//! guests and, at times, with the target.
//!
//! The codec with the least is used, with a little in favour of fewer bytes. What it costs and leaves is measured all the time
//! on this guest's pages, and is taken to be for the content and the machine: a guest's memory is one thing here and another
//! there. How codecs compare is another matter. It is assumed, until another one that might keep up was tried on some of the
//! same pages, which is done now and then, for at most a hundredth of the time.
//!
//! Where content has nothing but repetitions to be made use of, LZ4 leaves as little as the others in less time, so it has all
//! of that, as far as a look at some of it shows. The choice is for the rest; figures of codecs are of the rest, and how much
//! that is counts in what all takes.
//!
//! The bandwidth is that of pages as they are: where the encoders or the target are slower than the path, confirmations of
//! encoded bytes would show the path narrower than it is, and encoding would justify itself. So now and then some pages go as
//! they are: few, unless it shows that this might be soonest, rarely where the encoders could do a multiple of what is asked of
//! them, and never while the network is what limits, which the kernel says.

use std::time::Duration;

use vmferry_core::pages::PAGE_BYTES;
use vmferry_core::plan::RateEstimate;
use vmferry_core::wire::Encodings;

use super::batch::{BATCH_PAGES, Cost, Costs, LARGE_BATCH_PAGES};
use super::codec::Codec;

/// What codecs are assumed to take for a byte, in ns, and to leave of it, before any is measured; in the order of
/// [`Codec::ENCODING`]. Once one is measured, only how they compare counts.
const ASSUMED: [(f64, f64); Codec::ENCODING.len()] = [(1.8, 0.5), (3.5, 0.4), (6.0, 0.385), (16.0, 0.375)];
/// A codec that is not in use is tried so often,
const TRIAL_INTERVAL: Duration = Duration::from_millis(500);
/// and so often where pages go as they are, and nothing else shows that others are made smaller,
const TRIAL_INTERVAL_RAW: Duration = Duration::from_millis(100);
/// as long as all trials took at most this share of the time since the beginning,
const TRIAL_SHARE: f64 = 0.01;
/// and this time, so that one can begin.
const TRIAL_TIME_FIRST: Duration = Duration::from_millis(3);
/// Encoding must be so much better to be used instead of none.
const BETTER_FACTOR: f64 = 0.99;
/// And so much, to let pages go as they are: what is known of that is less certain.
const BETTER_FACTOR_RAW: f64 = 0.9;
/// Where the sender is busy all the time, a codec may be so much worse than the best if it takes the sender less time: what it
/// takes is taken from guests as well, which no measurement shows.
const WORSE_SHARE: f64 = 0.02;
/// And so much, to stay.
const WORSE_SHARE_CURRENT: f64 = 0.04;
/// Bytes of pages after which earlier measurements of a codec count less than half.
const MEMORY_BYTES: f64 = (2 << 20) as f64;
/// The least weight of a new measurement,
const NEW_SHARE_MIN: f64 = 0.2;
/// if it is of at least so many bytes. Of fewer, what comes once for each piece or for each processor is too much of it, and
/// trials of so few say nothing.
const MEASURED_BYTES_MIN: u64 = 32 * PAGE_BYTES;
/// Bytes of pages after which what came before counts less than half in how much of the content is for the codec chosen, and in
/// what is left of all.
const MIX_BYTES: f64 = (16 << 20) as f64;
/// The least that is taken to be.
const CHOSEN_SHARE_MIN: f64 = 0.05;
/// Pages go as they are after so long to see what the path carries, where pages leave so fast that it may be the sender or the
/// target what limits,
const LOOK_FIRST: Duration = Duration::from_millis(100);
const FAST_BYTES_PER_S: f64 = 400e6;
/// and after so long where they do not: all that is done for the first time makes the sender slow at the beginning;
const LOOK_FIRST_UNSURE: Duration = Duration::from_millis(400);
/// so often from then on,
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// so often where pages leave that fast: a look costs little there, and finds the path narrower than it is now and then,
const LOOK_INTERVAL_FAST: Duration = Duration::from_millis(200);
/// and so often where the sender could fill a path [`IDLE_FACTOR`] times as wide.
const LOOK_INTERVAL_EASY: Duration = Duration::from_secs(10);
/// And never where the network was what limited in this share of the plans of late,
const FULL_SHARE_MIN: f64 = 0.5;
/// in which a new one has this weight: fewer bytes are all that helps then.
const FULL_WEIGHT: f64 = 0.2;
/// The path was filled often if it was in this share of the plans of late,
const FILLED_SHARE_MIN: f64 = 0.5;
/// in which a new one has this weight.
const FILLED_WEIGHT: f64 = 0.1;
/// At first so many bytes,
const GLIMPSE_BYTES: u64 = 2 << 20;
/// and no more, unless they took less than so many times as long as pages do now; the former where these leave fast, since wide
/// paths look narrow in so little.
const GLIMPSE_FACTOR_FAST: f64 = 2.0;
const GLIMPSE_FACTOR: f64 = 1.5;
/// Then it takes so long, in which buffers fill and what was under way before arrives,
const LOOK_TIME: Duration = Duration::from_millis(80);
/// or ends after so long,
const SHORT_LOOK_TIME: Duration = Duration::from_millis(20);
/// unless it still takes less than so many times as long.
const LOOK_FACTOR: f64 = 1.25;
/// What a path is thought to carry before anything is known of it.
const BANDWIDTH_FIRST_BYTES_PER_S: f64 = 300e6;
/// A sender that could fill a path so many times as wide does not make it look narrow.
const IDLE_FACTOR: f64 = 1.4;
/// Bytes of pages that show how long the sender takes.
const SENDER_BYTES: u64 = 4 << 20;
/// Where pages go as they are, some are encoded after so long to see what the sender takes for that by now,
const PEEK_FIRST: Duration = Duration::from_millis(100);
/// and again, each time after twice as long, up to this.
const PEEK_INTERVAL_MAX: Duration = Duration::from_secs(2);
/// The weight of such a measurement.
const SENDER_WEIGHT: f64 = 0.3;
/// With one processor's encoding at most this share of the time that the path takes, it need not be shared out.
const ONE_PROCESSOR_SHARE: f64 = 0.5;
/// That long such a batch may take: the path is not kept filled for long.
const BATCH_TIME: Duration = Duration::from_millis(6);
/// Time after which what the stream carried is that of pages as they are, if they go so.
const SETTLING_TIME: Duration = Duration::from_millis(200);
/// Bytes have a worth of their own: one percent fewer makes up for this many percent more time, whether pages are encoded,
const BYTES_WEIGHT: f64 = 0.35;
/// and how. Where pages had better go as they are, the path is wide and its bytes are worth less.
const BYTES_WEIGHT_ENCODED: f64 = 1.0;
/// Weight of a trial against what was assumed,
const FIRST_TRIAL_WEIGHT: f64 = 0.8;
/// and against trials before.
const TRIAL_WEIGHT: f64 = 0.5;
/// No codec differs more than so many times from another.
const RELATION_MAX: f64 = 64.0;
/// A path that carries this share of the cap is not what limits.
const CAP_SHARE: f64 = 0.95;

/// What the user wants to be done to pages before they are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compress {
    /// What sends them soonest, chosen all the time.
    #[default]
    Auto,
    /// Nothing, no deltas either.
    Off,
    /// LZ4, where it makes them smaller.
    Lz4,
    /// Zstandard, where it makes them smaller, at the level that sends them soonest.
    Zstd,
}

impl Compress {
    /// The encodings to offer to the target.
    pub(crate) fn encodings(self, deltas: bool) -> Encodings {
        match self {
            Compress::Off => Encodings::RAW,
            Compress::Auto | Compress::Lz4 | Compress::Zstd if deltas => Encodings::ALL,
            Compress::Auto | Compress::Lz4 | Compress::Zstd => Encodings::ALL.without_deltas(),
        }
    }

    fn codecs(self) -> &'static [Codec] {
        match self {
            Compress::Auto => &[Codec::Raw, Codec::Lz4, Codec::Zstd1, Codec::Zstd3, Codec::Zstd6],
            Compress::Off => &[Codec::Raw],
            Compress::Lz4 => &[Codec::Lz4],
            Compress::Zstd => &[Codec::Zstd1, Codec::Zstd3, Codec::Zstd6],
        }
    }
}

/// What is known when pages are about to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    /// The bandwidth as the state machine knows it.
    pub(crate) bandwidth_bytes_per_s: Option<f64>,
    /// The most to send.
    pub(crate) cap_bytes_per_s: Option<u64>,
    /// What the target reads.
    pub(crate) encodings: Encodings,
    /// So much is under way that the path is not empty while these are encoded.
    pub(crate) is_filled: bool,
    /// Most of that the network has not taken: neither the sender is what limits, nor the target.
    pub(crate) is_full: bool,
    /// What the network carries of anything, as far as the kernel knows.
    pub(crate) network_bytes_per_s: Option<f64>,
    /// The guest is paused: nothing is tried.
    pub(crate) is_paused: bool,
    /// Of some of the pages it is known what the target has. They show nothing of the path, and as they are they would be many
    /// more bytes, also the next time.
    pub(crate) may_be_deltas: bool,
}

/// Pages that were handed over to the path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Handed {
    /// When the first byte left.
    pub(crate) began: Duration,
    /// How long the sender took, without waiting for the path and without scans.
    pub(crate) busy: Duration,
    /// All of them went as they are, and there were no more zero pages among them.
    pub(crate) all_raw: bool,
    /// Neither went any of them as deltas, nor were there as many zero pages: then they show what the sender takes.
    pub(crate) is_plain: bool,
    /// Bytes of those that are not zero.
    pub(crate) content_bytes: u64,
    /// Bytes of the stream before,
    pub(crate) from_bytes: u64,
    /// and after them.
    pub(crate) to_bytes: u64,
}

/// How some pages shall go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    /// By what.
    pub(crate) codec: Codec,
    /// And those of which that leaves no less, by what.
    pub(crate) light: Option<Codec>,
    /// The share of the bytes that it is expected to leave.
    pub(crate) expected_share: f64,
    /// Pages that are written again go as deltas and are kept for the next one.
    pub(crate) deltas: bool,
    /// The most pages in a batch.
    pub(crate) batch_pages: u64,
    /// Let this codec have some of them, too.
    pub(crate) trial: Option<Codec>,
}

impl Plan {
    /// Whether pages go as they are and are not kept: from one buffer to the socket.
    pub(crate) fn is_straight(&self) -> bool {
        self.codec == Codec::Raw && !self.deltas
    }
}

/// What a codec takes for a byte and leaves of it: measured, or assumed before that.
#[derive(Debug, Clone, Copy)]
struct Estimate {
    ns_per_byte: f64,
    share: f64,
    is_measured: bool,
}

impl Estimate {
    const fn assumed((ns_per_byte, share): (f64, f64)) -> Self {
        Self { ns_per_byte, share, is_measured: false }
    }

    fn add(&mut self, content_bytes: u64, ns_per_byte: f64, share: f64) {
        if content_bytes == 0 {
            return;
        }
        let weight = match 1.0 - (-(content_bytes as f64) / MEMORY_BYTES).exp() {
            _ if !self.is_measured => 1.0,
            weight if content_bytes < MEASURED_BYTES_MIN => weight,
            weight => weight.max(NEW_SHARE_MIN),
        };
        self.ns_per_byte += weight * (ns_per_byte - self.ns_per_byte);
        self.share += weight * (share - self.share);
        self.is_measured = true;
    }
}

/// How a codec compares with LZ4 on the same pages.
#[derive(Debug, Clone, Copy)]
struct Relation {
    /// How many times longer it takes.
    time: f64,
    /// What it leaves, as a share of what LZ4 leaves.
    share: f64,
    is_measured: bool,
    looked_at: Option<Duration>,
}

impl Relation {
    const fn assumed((ns_per_byte, share): (f64, f64)) -> Self {
        let (lz4_ns_per_byte, lz4_share) = ASSUMED[0];
        Self { time: ns_per_byte / lz4_ns_per_byte, share: share / lz4_share, is_measured: false, looked_at: None }
    }

    fn found(&mut self, time: f64, share: f64) {
        let weight = if self.is_measured { TRIAL_WEIGHT } else { FIRST_TRIAL_WEIGHT };
        self.time += weight * (time - self.time);
        self.share += weight * (share - self.share);
        self.is_measured = true;
    }
}

impl Cost {
    fn ns_per_byte(&self) -> f64 {
        self.time.as_nanos() as f64 / self.content_bytes.max(1) as f64
    }

    fn share(&self) -> f64 {
        self.encoded_bytes as f64 / self.content_bytes.max(1) as f64
    }
}

/// How far a look is at what the path carries of pages as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Look {
    /// A few go so; these bytes so far.
    Glimpse(u64),
    /// They are under way, and others go as before.
    Waiting,
    /// All go so since then.
    Long(Duration),
}

/// Chooses.
#[derive(Debug)]
pub(crate) struct Chooser {
    compress: Compress,
    /// Whether there is a cache of what the target has.
    deltas: bool,
    parallel: f64,
    /// What LZ4 takes and leaves, or would, of what the codec in use encodes.
    lz4: Estimate,
    /// In the order of [`Codec::ENCODING`].
    relations: [Relation; Codec::ENCODING.len()],
    /// Of LZ4, for content of which others leave no less.
    light: Estimate,
    /// The share of the content that is not such.
    chosen_share: f64,
    delta: Estimate,
    current: Codec,
    /// Since when.
    since: Duration,
    trial_time: Duration,
    /// The bandwidth that was chosen by.
    bandwidth: Option<f64>,
    /// What the stream carried while pages were encoded and enough was under way: less than the path where the target decodes more
    /// slowly.
    encoded_bandwidth: Option<f64>,
    /// How often the path was filled of late,
    filled_share: f64,
    /// and how often the network was what limited.
    full_share: f64,
    /// Bytes of pages so far.
    content_bytes: u64,
    /// What was left of them of late, also of those that go as they are for their content.
    sent_share: f64,
    raw: RawPath,
    look: Option<Look>,
    /// When that was over the last time.
    looked: Option<Duration>,
    /// What the sender takes beside encoding: where pages are encoded, and where not.
    beside: Sender,
    straight: Sender,
    /// Where pages go as they are, how long until the former is measured anew.
    peek_interval: Duration,
}

impl Chooser {
    /// A chooser for encoders that work on so many processors at a time.
    pub(crate) fn new(compress: Compress, deltas: bool, parallel: f64) -> Self {
        Self {
            compress,
            deltas: deltas && compress != Compress::Off,
            parallel,
            lz4: Estimate::assumed(ASSUMED[0]),
            relations: ASSUMED.map(Relation::assumed),
            light: Estimate::assumed(ASSUMED[0]),
            chosen_share: 1.0,
            // The first few pages find nothing ready that it takes. If only what they show counted, no page might go so again.
            delta: Estimate { is_measured: true, ..Estimate::assumed((0.8, 0.2)) },
            current: compress.codecs()[0],
            since: Duration::ZERO,
            trial_time: Duration::ZERO,
            bandwidth: None,
            encoded_bandwidth: None,
            filled_share: 0.0,
            full_share: 0.0,
            content_bytes: 0,
            sent_share: 0.0,
            raw: RawPath::default(),
            look: None,
            looked: None,
            beside: Sender::default(),
            straight: Sender::default(),
            peek_interval: PEEK_FIRST,
        }
    }

    /// How pages shall go that are about to be sent.
    pub(crate) fn plan(&mut self, now: Duration, path: &Path) -> Plan {
        let straight = Plan {
            codec: Codec::Raw,
            light: None,
            expected_share: 1.0,
            deltas: false,
            batch_pages: BATCH_PAGES,
            trial: None,
        };
        let cap = path.cap_bytes_per_s.map_or(f64::MAX, |cap| cap as f64);
        let capped = |rate: Option<f64>| rate.or(path.cap_bytes_per_s.map(|cap| cap as f64)).map(|rate| rate.min(cap));
        let stream = capped(path.bandwidth_bytes_per_s);
        note(&mut self.filled_share, path.is_filled, FILLED_WEIGHT);
        note(&mut self.full_share, path.is_full, FULL_WEIGHT);
        let before = self.look;
        self.look = before.and_then(|look| self.next_look(now, look, path.is_paused));
        if before.is_some() && self.look.is_none() {
            self.looked = Some(now);
        }
        if matches!(self.look, Some(Look::Glimpse(_) | Look::Long(_))) && !path.may_be_deltas {
            return straight;
        }
        let looked_long =
            matches!(before, Some(Look::Long(since)) if now.saturating_sub(since) >= LOOK_TIME && self.look.is_none());
        // How many times as long as the sender the path takes, as far as it is known.
        let mix = self.mix();
        let ease = stream.filter(|_| self.current != Codec::Raw).map(|stream| {
            let sender = mix.sender_time(self.current).max(f64::MIN_POSITIVE);
            mix.path_time(self.current, Some(stream)) / sender
        });
        // Then what is measured of the stream is the path's, and newer than what pages showed that went as they are.
        let limited_by_path = self.network_limits() || ease.is_some_and(|ease| ease >= IDLE_FACTOR);
        // The stream's also takes in what went before.
        let settled = now.saturating_sub(self.since) >= SETTLING_TIME;
        let is_stream = if self.current == Codec::Raw { settled } else { limited_by_path && !looked_long };
        let raw = capped(self.raw.rate.bytes_per_s());
        let bandwidth = if is_stream { stream } else { raw.map(|raw| raw.max(stream.unwrap_or(0.0))).or(stream) };
        self.bandwidth = bandwidth;
        let is_of_encoded = self.current != Codec::Raw && self.look.is_none() && (settled || self.raw.last.is_none());
        if is_of_encoded {
            // Where the path is not filled, it is the sender that limits, and its time is a figure of its own.
            self.encoded_bandwidth = stream.filter(|_| self.filled_share >= FILLED_SHARE_MIN);
        }
        let agreed = |codec: &Codec| path.encodings.contains(codec.encoding());
        let codecs = self.compress.codecs().iter().copied().filter(agreed);
        let Some(chosen) = self.choose(now, codecs.clone(), bandwidth, path.is_filled) else { return straight };
        if chosen != self.current {
            if self.current == Codec::Raw {
                if self.is_peek_due(now) {
                    self.peek_interval = (2 * self.peek_interval).min(PEEK_INTERVAL_MAX);
                }
                // It may have been from a slow beginning.
                self.encoded_bandwidth = None;
            }
            tracing::debug!(from = ?self.current, to = ?chosen, bandwidth, "compression");
            (self.current, self.since) = (chosen, now);
        }
        let may_look = self.current != Codec::Raw && self.look.is_none() && !path.may_be_deltas;
        if may_look && self.wants_look(now, path, ease.unwrap_or(0.0)) {
            self.look = Some(Look::Glimpse(0));
            return straight;
        }
        let deltas = self.deltas
            && path.encodings.has_deltas()
            && (self.compress != Compress::Auto || self.delta_pays(bandwidth));
        let trial = if path.is_paused { None } else { self.trial(now, codecs, bandwidth, path.is_filled) };
        let mix = self.mix();
        // Where the last ones are waited for, each processor has its part.
        let is_easy = bandwidth.is_some()
            && mix.one_processor_time(self.current) <= ONE_PROCESSOR_SHARE * mix.path_time(self.current, bandwidth);
        let is_shared_out = path.is_paused || !path.is_filled || !is_easy;
        let batch_pages = if is_shared_out { BATCH_PAGES } else { self.one_processor_pages() };
        let light = self.has_light(&path.encodings).then_some(Codec::Lz4).filter(|_| self.current != Codec::Raw);
        Plan { codec: self.current, light, expected_share: mix.share(self.current), deltas, batch_pages, trial }
    }

    /// The codec to use from now on: the best, or one that is hardly worse and takes the sender less time.
    fn choose(
        &self,
        now: Duration,
        codecs: impl Iterator<Item = Codec> + Clone,
        bandwidth: Option<f64>,
        is_filled: bool,
    ) -> Option<Codec> {
        let time = |codec| self.time_beside_raw(codec, bandwidth);
        let encoding = codecs.clone().filter(|&codec| codec != Codec::Raw);
        let best_time = encoding.clone().map(time).min_by(f64::total_cmp);
        let may_be_raw = codecs.clone().any(|codec| codec == Codec::Raw);
        let Some(best_time) = best_time else { return may_be_raw.then_some(Codec::Raw) };
        if may_be_raw {
            // What the sender takes for encoding may be known from a slow beginning only. While pages go as they are it is not
            // measured, so they would go so for good.
            let is_better = match self.current {
                Codec::Raw if self.is_peek_due(now) && self.beside.is_measured => false,
                Codec::Raw => best_time > time(Codec::Raw) * BETTER_FACTOR,
                _ if self.beside.is_measured && !self.beside.is_fresh => false,
                _ if bandwidth.is_some_and(|bandwidth| bandwidth < self.content_rate(now)) => false,
                current => time(Codec::Raw) <= best_time.min(time(current) * BETTER_FACTOR_RAW),
            };
            if is_better {
                return Some(Codec::Raw);
            }
        }
        // What makes the path run empty is not what is for LZ4 anyway.
        let mix = if is_filled { self.mix() } else { Mix { chosen_share: 1.0, ..self.mix() } };
        let time = |codec| mix.time(codec, bandwidth, BYTES_WEIGHT_ENCODED);
        let best = encoding.clone().min_by(|&a, &b| time(a).total_cmp(&time(b)))?;
        let best_time = time(best);
        // The less the sender has to do anyhow, the less its time is worth: one with half of its time to spare takes little
        // from anybody.
        let busy_share = (mix.sender_time(best) / mix.path_time(best, bandwidth)).min(1.0);
        let is_near = |&codec: &Codec| {
            let worse = if codec == self.current { WORSE_SHARE_CURRENT } else { WORSE_SHARE };
            time(codec) <= best_time * (1.0 + worse * busy_share * busy_share * mix.chosen_share)
        };
        encoding.filter(is_near).min_by(|&a, &b| mix.sender_time(a).total_cmp(&mix.sender_time(b)))
    }

    /// What counts against a codec where it is compared with pages as they are: the target may be slower to decode than the path.
    fn time_beside_raw(&self, codec: Codec, bandwidth: Option<f64>) -> f64 {
        let carried = match (bandwidth, self.encoded_bandwidth) {
            (Some(raw), Some(encoded)) if codec != Codec::Raw => Some(raw.min(encoded)),
            (None, encoded) => encoded,
            (raw, _) => raw,
        };
        self.mix().time(codec, carried, BYTES_WEIGHT)
    }

    /// What a batch cost that was encoded by a codec, and some of it by another one to try it.
    pub(crate) fn encoded(&mut self, now: Duration, codec: Codec, trial: Option<Codec>, costs: &Costs) {
        let (used, tried) = (index(codec), trial.and_then(index));
        for (at, cost) in [(used, &costs.codec), (tried.filter(|_| used.is_none()), &costs.trial)] {
            if let Some(Relation { time, share, .. }) = at.map(|at| self.relations[at]) {
                self.lz4.add(cost.content_bytes, cost.ns_per_byte() / time, cost.share() / share);
            }
        }
        self.trial_time += costs.trial.time;
        if let Some(at) = tried
            && costs.trial.content_bytes >= MEASURED_BYTES_MIN
        {
            self.relations[at].looked_at = Some(now);
            if let Some(used) = used.filter(|_| costs.codec.content_bytes > 0) {
                self.compare(used, at, costs);
            }
            let Relation { time, share, .. } = self.relations[at];
            tracing::debug!(?trial, time, share, beside = ?codec, "compression, beside what LZ4 does");
        }
        self.light.add(costs.light.content_bytes, costs.light.ns_per_byte(), costs.light.share());
        self.delta.add(costs.delta.content_bytes, costs.delta.ns_per_byte(), costs.delta.share());
        let bytes = costs.codec.content_bytes + costs.light.content_bytes;
        if bytes > 0 {
            let share = costs.codec.content_bytes as f64 / bytes as f64;
            let weight = mix_weight(bytes);
            self.chosen_share = (self.chosen_share + weight * (share - self.chosen_share)).max(CHOSEN_SHARE_MIN);
        }
    }

    /// A codec was tried on pages that another one encoded as well.
    fn compare(&mut self, used: usize, tried: usize, costs: &Costs) {
        let ratio =
            |tried: f64, used: f64| (tried / used.max(f64::MIN_POSITIVE)).clamp(1.0 / RELATION_MAX, RELATION_MAX);
        let time = ratio(costs.trial.ns_per_byte(), costs.codec.ns_per_byte());
        let share = ratio(costs.trial.share(), costs.codec.share());
        if Codec::ENCODING[tried] == Codec::Lz4 {
            self.relations[used].found(1.0 / time, 1.0 / share);
        } else {
            let beside = self.relations[used];
            self.relations[tried].found(beside.time * time, beside.share * share);
        }
    }

    /// Pages were handed over to the path.
    pub(crate) fn handed(&mut self, now: Duration, handed: &Handed) {
        self.content_bytes += handed.content_bytes;
        if handed.is_plain && handed.content_bytes > 0 {
            let share = (handed.to_bytes - handed.from_bytes) as f64 / handed.content_bytes as f64;
            let weight = mix_weight(handed.content_bytes);
            self.sent_share += weight * (share.min(1.0) - self.sent_share);
        }
        let is_encoded = self.current != Codec::Raw && self.look.is_none_or(|look| look == Look::Waiting);
        // A few that are encoded by name only are confirmed with others, and seem to take no time at all.
        if handed.all_raw && !is_encoded {
            self.raw.sent(handed.began, now, handed.from_bytes, handed.to_bytes);
        } else {
            self.raw.ends();
        }
        if let Some(Look::Glimpse(bytes)) = self.look {
            let bytes = bytes + handed.to_bytes - handed.from_bytes;
            self.look = Some(if bytes < GLIMPSE_BYTES { Look::Glimpse(bytes) } else { Look::Waiting });
            if bytes >= GLIMPSE_BYTES {
                self.raw.ends();
            }
        }
        let encoding = if is_encoded { self.mix().encoding_time(self.current) } else { 0.0 };
        let sender = if is_encoded {
            &mut self.beside
        } else {
            self.beside.interrupt();
            &mut self.straight
        };
        if handed.is_plain && sender.measure(handed, encoding) {
            let (beside, straight) = (self.beside.ns_per_byte, self.straight.ns_per_byte);
            tracing::trace!(beside, straight, encoding, raw = self.raw.rate.bytes_per_s(), "compression");
        }
    }

    /// So many bytes of the stream have arrived.
    pub(crate) fn confirmed(&mut self, now: Duration, bytes: u64) {
        self.raw.confirmed(now, bytes);
    }

    /// The content of late.
    fn mix(&self) -> Mix<'_> {
        Mix { chooser: self, chosen_share: self.chosen_share }
    }

    fn delta_pays(&self, bandwidth: Option<f64>) -> bool {
        // Whatever it leaves: that depends on the page, and is seen when it is tried. What the codec takes and leaves is known of
        // pages that it makes smaller only. Others take the path's time.
        let path_time = self.sent_share * 1e9 / bandwidth.unwrap_or(f64::MAX);
        let time = self.mix().time(self.current, bandwidth, BYTES_WEIGHT).max(path_time);
        self.delta.ns_per_byte / self.parallel <= time * BETTER_FACTOR
    }

    /// Whether LZ4 has all content of which others leave no less.
    fn has_light(&self, encodings: &Encodings) -> bool {
        self.compress == Compress::Auto && encodings.contains(Codec::Lz4.encoding())
    }

    /// So many pages are a batch for one processor while nothing else is sent.
    fn one_processor_pages(&self) -> u64 {
        let page_ns = self.mix().one_processor_time(self.current) * PAGE_BYTES as f64;
        let pages_in_time = BATCH_TIME.as_nanos() as f64 / page_ns;
        (pages_in_time as u64).clamp(BATCH_PAGES, LARGE_BATCH_PAGES)
    }

    /// The codec whose turn it is to be tried, of those that might keep up with the path. One that is much slower is tried
    /// where the path has enough to carry meanwhile.
    fn trial(
        &self,
        now: Duration,
        codecs: impl Iterator<Item = Codec>,
        bandwidth: Option<f64>,
        is_filled: bool,
    ) -> Option<Codec> {
        if self.trial_time > now.mul_f64(TRIAL_SHARE) + TRIAL_TIME_FIRST {
            return None;
        }
        let rank = |codec: Codec| index(codec).map_or(0, |at| at + 1);
        let is_near = |codec: Codec| rank(codec).abs_diff(rank(self.current)) <= 1;
        let mix = self.mix();
        let sending = mix.share(self.current) * 1e9 / bandwidth.unwrap_or(f64::MAX);
        let due = codecs.filter_map(|codec| {
            let looked_at = self.relations[index(codec)?].looked_at;
            let keeps_up = is_filled && mix.encoding_time(codec) <= sending;
            let interval = if self.current == Codec::Raw { TRIAL_INTERVAL_RAW } else { TRIAL_INTERVAL };
            let is_due = looked_at.is_none_or(|at| now.saturating_sub(at) >= interval);
            (codec != self.current && is_due && (keeps_up || is_near(codec))).then_some((looked_at, codec))
        });
        due.min_by_key(|&(looked_at, _)| looked_at).map(|(_, codec)| codec)
    }

    /// Whether pages have gone as they are for so long that it is time to see what encoding them takes by now.
    fn is_peek_due(&self, now: Duration) -> bool {
        now.saturating_sub(self.since) >= self.peek_interval
    }

    /// Whether the network is what limits of late, neither the sender nor the target.
    pub(crate) fn network_limits(&self) -> bool {
        self.full_share >= FULL_SHARE_MIN
    }

    /// Whether pages leave so fast that it may be the sender or the target what limits.
    fn is_fast(&self, now: Duration) -> bool {
        self.content_rate(now) >= FAST_BYTES_PER_S
    }

    /// Bytes of pages a second so far, with all that delayed them. A path that carries less can be no reason to let them go as they
    /// are, whatever the sender seems to take.
    fn content_rate(&self, now: Duration) -> f64 {
        self.content_bytes as f64 / now.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Whether pages shall go as they are from now on to see what the path carries.
    fn wants_look(&self, now: Duration, path: &Path, ease: f64) -> bool {
        let limited_by_cap = path
            .cap_bytes_per_s
            .is_some_and(|cap| path.bandwidth_bytes_per_s.is_some_and(|bandwidth| bandwidth >= cap as f64 * CAP_SHARE));
        let (first, interval) = match ease {
            IDLE_FACTOR.. => (LOOK_INTERVAL_EASY, LOOK_INTERVAL_EASY),
            _ if self.is_fast(now) => (LOOK_FIRST, LOOK_INTERVAL_FAST),
            _ => (LOOK_FIRST_UNSURE, LOOK_INTERVAL),
        };
        let due = self.looked.max(self.raw.last).map_or(first, |last| last + interval);
        // Pages as they are would come no sooner than the network carries them.
        let is_too_narrow =
            path.network_bytes_per_s.is_some_and(|rate| !self.may_be_soonest(now, rate, GLIMPSE_FACTOR));
        let is_limited = limited_by_cap || self.network_limits() || is_too_narrow;
        self.compress == Compress::Auto && !path.is_paused && !is_limited && now >= due
    }

    /// Whether pages as they are, of which the path carries so much, take less than so many times as long as pages do now.
    fn may_be_soonest(&self, now: Duration, bytes_per_s: f64, factor: f64) -> bool {
        let encoded_ns = self.time_beside_raw(self.current, self.bandwidth).min(1e9 / self.content_rate(now));
        1e9 / bytes_per_s < encoded_ns * factor
    }

    /// How a look goes on.
    fn next_look(&self, now: Duration, look: Look, is_paused: bool) -> Option<Look> {
        // Nothing may be known: they had many zero pages among them, or were too fast.
        let may_be_soonest_within = |factor: f64| {
            let rate = self.raw.rate.bytes_per_s();
            rate.is_none_or(|rate| self.may_be_soonest(now, rate, factor))
        };
        let goes_on = match look {
            _ if is_paused => None,
            Look::Glimpse(_) => Some(look),
            Look::Waiting if self.raw.stretch.is_some() => Some(Look::Waiting),
            Look::Waiting => {
                let factor = if self.is_fast(now) { GLIMPSE_FACTOR_FAST } else { GLIMPSE_FACTOR };
                may_be_soonest_within(factor).then_some(Look::Long(now))
            }
            Look::Long(since) => {
                let time = now.saturating_sub(since);
                let is_over = time >= LOOK_TIME || time >= SHORT_LOOK_TIME && !may_be_soonest_within(LOOK_FACTOR);
                (!is_over).then_some(look)
            }
        };
        if goes_on != Some(look) {
            tracing::debug!(?look, ?goes_on, raw = self.raw.rate.bytes_per_s(), "compression");
        }
        goes_on
    }
}

/// What codecs take and leave of content of which so much is for the codec, and the rest for LZ4 anyway.
#[derive(Debug, Clone, Copy)]
struct Mix<'a> {
    chooser: &'a Chooser,
    chosen_share: f64,
}

impl Mix<'_> {
    /// What counts against a codec: ns for a byte of pages, and so much for the bytes that it leaves.
    fn time(&self, codec: Codec, bandwidth: Option<f64>, bytes_weight: f64) -> f64 {
        let (sender, path) = (self.sender_time(codec), self.path_time(codec, bandwidth));
        (sender.powi(3) + path.powi(3)).cbrt() * self.share(codec).powf(bytes_weight)
    }

    /// What one processor takes for a byte of pages.
    fn one_processor_time(&self, codec: Codec) -> f64 {
        self.figure(codec, |estimate| estimate.ns_per_byte, |relation| relation.time).unwrap_or(0.0)
    }

    fn encoding_time(&self, codec: Codec) -> f64 {
        self.one_processor_time(codec) / self.chooser.parallel
    }

    fn sender_time(&self, codec: Codec) -> f64 {
        let beside = if codec == Codec::Raw { &self.chooser.straight } else { &self.chooser.beside };
        self.encoding_time(codec) + beside.ns_per_byte
    }

    fn path_time(&self, codec: Codec, bandwidth: Option<f64>) -> f64 {
        self.share(codec) * 1e9 / bandwidth.unwrap_or(BANDWIDTH_FIRST_BYTES_PER_S)
    }

    fn share(&self, codec: Codec) -> f64 {
        self.figure(codec, |estimate| estimate.share, |relation| relation.share).unwrap_or(1.0)
    }

    /// A figure of what is for the codec, which is LZ4's and how the codec compares, and the same figure of what is not: each
    /// counts by its share of the content.
    fn figure(
        &self,
        codec: Codec,
        figure: impl Fn(&Estimate) -> f64,
        related: impl Fn(&Relation) -> f64,
    ) -> Option<f64> {
        let own = figure(&self.chooser.lz4) * related(&self.chooser.relations[index(codec)?]);
        Some(self.chosen_share * own + (1.0 - self.chosen_share) * figure(&self.chooser.light))
    }
}

/// Takes one more case into the share of those of late in which something is so.
fn note(share: &mut f64, is_so: bool, weight: f64) {
    *share += weight * (f64::from(u8::from(is_so)) - *share);
}

/// The weight of so many bytes of pages against those before.
fn mix_weight(content_bytes: u64) -> f64 {
    1.0 - (-(content_bytes as f64) / MIX_BYTES).exp()
}

/// Where it stands in [`Codec::ENCODING`].
fn index(codec: Codec) -> Option<usize> {
    Codec::ENCODING.iter().position(|&other| other == codec)
}

/// What the sender takes for a byte of pages beside encoding.
#[derive(Debug, Default)]
struct Sender {
    ns_per_byte: f64,
    is_measured: bool,
    /// Whether that was since pages last went the other way.
    is_fresh: bool,
    /// What has been handed over since that was measured.
    busy: Duration,
    bytes: u64,
}

impl Sender {
    /// Takes in pages of which each byte takes so long to be encoded. Whether it was measured anew.
    fn measure(&mut self, handed: &Handed, encoding_ns: f64) -> bool {
        self.busy += handed.busy;
        self.bytes += handed.content_bytes;
        if self.bytes < SENDER_BYTES {
            return false;
        }
        let beside = (self.busy.as_nanos() as f64 / self.bytes as f64 - encoding_ns).max(0.0);
        let weight = if self.is_fresh { SENDER_WEIGHT } else { 1.0 };
        self.ns_per_byte += weight * (beside - self.ns_per_byte);
        (self.is_measured, self.is_fresh, self.busy, self.bytes) = (true, true, Duration::ZERO, 0);
        true
    }

    /// Pages go the other way: what follows is measured anew.
    fn interrupt(&mut self) {
        (self.is_fresh, self.busy, self.bytes) = (false, Duration::ZERO, 0);
    }
}

/// What the path carries of pages as they are.
#[derive(Debug, Default)]
struct RawPath {
    rate: RateEstimate,
    stretch: Option<Stretch>,
    /// What had arrived of the stream, and when.
    confirmed: (Duration, u64),
    /// When the last pages went so.
    last: Option<Duration>,
}

/// Where in the stream there are only pages as they are.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    began: Duration,
    first: u64,
    end: u64,
    /// Others come after them.
    is_closed: bool,
}

impl RawPath {
    fn sent(&mut self, began: Duration, now: Duration, from: u64, to: u64) {
        if let Some(before) = self.stretch
            && before.is_closed
        {
            // Only what is confirmed counts of it.
            self.rate.delivered(now, self.confirmed.1.min(before.end), true, Duration::ZERO);
            self.stretch = None;
        }
        let stretch = self.stretch.get_or_insert(Stretch { began, first: from, end: to, is_closed: false });
        stretch.end = to;
        self.last = Some(now);
        if self.confirmed.1 >= stretch.first {
            self.rate.busy(began, self.confirmed.1);
        }
    }

    fn ends(&mut self) {
        if let Some(stretch) = &mut self.stretch {
            stretch.is_closed = true;
        }
    }

    fn confirmed(&mut self, now: Duration, bytes: u64) {
        let (at, before) = self.confirmed;
        self.confirmed = (now, bytes.max(before));
        if let Some(stretch) = self.stretch
            && bytes > stretch.first
        {
            if before < stretch.first {
                self.rate.busy(at.max(stretch.began), stretch.first);
            }
            // Reading pages and writing them to a socket is faster than the path, or the path is not what limits.
            self.rate.full();
            let is_all = bytes >= stretch.end;
            // The bytes before them were under way all along, and no round trip was waited for.
            self.rate.delivered(now, bytes.min(stretch.end), is_all, Duration::ZERO);
            if is_all && stretch.is_closed {
                self.stretch = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::batch::Cost;
    use super::*;

    fn path(bandwidth: f64) -> Path {
        Path {
            bandwidth_bytes_per_s: Some(bandwidth),
            cap_bytes_per_s: None,
            encodings: Encodings::ALL,
            is_filled: true,
            is_full: false,
            network_bytes_per_s: None,
            is_paused: false,
            may_be_deltas: false,
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn costs(content_bytes: u64, share: f64, ns_per_byte: f64) -> Costs {
        let encoded_bytes = (content_bytes as f64 * share) as u64;
        let time = Duration::from_nanos((content_bytes as f64 * ns_per_byte) as u64);
        Costs { codec: Cost { content_bytes, encoded_bytes, time }, time, ..Costs::default() }
    }

    /// Pages of which half is left when they are encoded.
    fn handed(began: Duration, busy: Duration, all_raw: bool, from_bytes: u64, to_bytes: u64) -> Handed {
        let content_bytes = (to_bytes - from_bytes) * if all_raw { 1 } else { 2 };
        Handed { began, busy, all_raw, is_plain: true, content_bytes, from_bytes, to_bytes }
    }

    #[test]
    fn the_slower_the_path_the_harder_it_is_tried() {
        for (bandwidth, codec, deltas) in [
            (5e9, Codec::Raw, false),
            (2e9, Codec::Raw, true),
            (1e9, Codec::Lz4, true),
            (300e6, Codec::Zstd1, true),
            (117e6, Codec::Zstd1, true),
            (50e6, Codec::Zstd3, true),
            (11.7e6, Codec::Zstd6, true),
        ] {
            let mut chooser = Chooser::new(Compress::Auto, true, 2.0);
            let plan = chooser.plan(Duration::ZERO, &path(bandwidth));
            assert_eq!((plan.codec, plan.deltas), (codec, deltas), "{bandwidth} bytes/s");
        }
    }

    #[test]
    fn what_is_asked_for_and_agreed_on_is_all_that_is_used() {
        for (compress, encodings, codec, deltas) in [
            (Compress::Off, Encodings::ALL, Codec::Raw, false),
            (Compress::Lz4, Encodings::ALL, Codec::Lz4, true),
            (Compress::Zstd, Encodings::ALL, Codec::Zstd6, true),
            (Compress::Zstd, Encodings(0b11), Codec::Raw, false),
            (Compress::Auto, Encodings::RAW, Codec::Raw, false),
            (Compress::Auto, Encodings(0b11), Codec::Lz4, false),
        ] {
            let mut chooser = Chooser::new(compress, true, 1.0);
            for at in 0..100 {
                let plan = chooser.plan(ms(at * 100), &Path { encodings, is_paused: true, ..path(10e6) });
                assert_eq!((plan.codec, plan.deltas), (codec, deltas), "{compress:?}, {encodings:?}");
                assert_eq!(plan.trial, None, "the guest is paused");
            }
        }
        let mut chooser = Chooser::new(Compress::Auto, false, 1.0);
        assert!(!chooser.plan(Duration::ZERO, &path(10e6)).deltas, "there is no cache");
    }

    #[test]
    fn what_was_measured_counts() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.0);
        assert_ne!(chooser.plan(ms(0), &path(100e6)).codec, Codec::Raw);
        // Content of which nothing is saved.
        for codec in Codec::ENCODING {
            (0..10).for_each(|_| chooser.encoded(ms(1), codec, None, &costs(1 << 20, 1.05, 6.0)));
        }
        assert_eq!(chooser.plan(ms(1), &path(100e6)).codec, Codec::Raw);
        // And then of which LZ4 leaves a tenth.
        (0..40).for_each(|_| chooser.encoded(ms(2), Codec::Lz4, None, &costs(1 << 20, 0.1, 1.0)));
        assert_eq!(chooser.plan(ms(2), &path(100e6)).codec, Codec::Lz4);
    }

    /// Memory that is made smaller as well by one codec as by another, here to a tenth and there hardly.
    #[test]
    fn other_content_is_no_reason_for_another_codec() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let path = path(11.7e6);
        let mut codecs = Vec::new();
        for at in 0..4000_u64 {
            let plan = chooser.plan(ms(at * 5), &path);
            codecs.push(plan.codec);
            let share = if at / 100 % 2 == 0 { 0.1 } else { 0.9 };
            let of = |codec: Codec| {
                let (time, better) = ASSUMED[index(codec).unwrap()];
                costs(256 << 10, share * better / ASSUMED[0].1, time * share).codec
            };
            let costs = Costs {
                codec: if plan.codec == Codec::Raw { Cost::default() } else { of(plan.codec) },
                trial: plan.trial.map(of).unwrap_or_default(),
                ..Costs::default()
            };
            chooser.encoded(ms(at * 5), plan.codec, plan.trial, &costs);
            let (from, to) = (at * 58_500, (at + 1) * 58_500);
            chooser.handed(ms(at * 5), &handed(ms(at * 5), Duration::ZERO, plan.codec == Codec::Raw, from, to));
            chooser.confirmed(ms(at * 5 + 4), to);
        }
        let others = codecs.iter().filter(|&&codec| codec != codecs[10]).count();
        assert!(others < 50, "{others} of {} with another codec than {:?}", codecs.len(), codecs[10]);
    }

    /// What others make no smaller goes by LZ4, however much it is: it says nothing of how codecs compare.
    #[test]
    fn content_that_only_repeats_is_no_reason_for_another_codec() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        // What the path carries is known.
        let path = Path { cap_bytes_per_s: Some(50_000_000), ..path(50e6) };
        for at in 0..1000_u64 {
            let plan = chooser.plan(ms(at * 5), &path);
            assert_eq!(plan.light, Some(Codec::Lz4));
            // There is the more time for the rest.
            let expected = if at < 100 { &[Codec::Zstd3][..] } else { &[Codec::Zstd3, Codec::Zstd6] };
            assert!(at < 10 || expected.contains(&plan.codec), "{at}: {:?}", plan.codec);
            let of = |codec: Codec| {
                let (time, share) = ASSUMED[index(codec).unwrap()];
                costs(256 << 10, share, time).codec
            };
            let is_light = at > 100 && at % 20 != 0;
            let costs = Costs {
                codec: if is_light { Cost::default() } else { of(plan.codec) },
                light: if is_light { costs(256 << 10, 0.52, 0.9).codec } else { Cost::default() },
                trial: plan.trial.filter(|_| !is_light).map(of).unwrap_or_default(),
                ..Costs::default()
            };
            chooser.encoded(ms(at * 5), plan.codec, plan.trial, &costs);
        }
        let share = chooser.mix().share(Codec::Zstd3);
        assert!((0.5..0.52).contains(&share), "{share}: most is light");
        let zstd = Chooser::new(Compress::Zstd, true, 1.5).plan(ms(0), &path);
        assert_eq!(zstd.light, None, "nothing else than what was asked for");
    }

    #[test]
    fn a_level_that_leaves_more_is_left_again() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        // The test guest's half random pages: the third level does worse than the first.
        let share = |codec| match codec {
            Codec::Lz4 => 0.506,
            Codec::Zstd1 => 0.494,
            Codec::Zstd3 => 0.506,
            Codec::Zstd6 | Codec::Raw => 0.478,
        };
        // What the path carries is known.
        let path = Path { cap_bytes_per_s: Some(50_000_000), ..path(50e6) };
        let mut used = [0; 4];
        for at in 0..2000_u64 {
            let plan = chooser.plan(ms(at * 5), &path);
            let of = |codec| costs(256 << 10, share(codec), if codec == Codec::Zstd6 { 16.0 } else { 3.0 }).codec;
            let costs =
                Costs { codec: of(plan.codec), trial: plan.trial.map(of).unwrap_or_default(), ..Costs::default() };
            chooser.encoded(ms(at * 5), plan.codec, plan.trial, &costs);
            index(plan.codec).into_iter().for_each(|at| used[at] += 1);
        }
        assert!(used[1] > 1750, "{used:?}");
    }

    #[test]
    fn one_processor_has_larger_batches_where_it_is_enough() {
        for (bandwidth, is_paused, pages) in [(11.7e6, false, 91), (11.7e6, true, 64), (117e6, false, 64)] {
            let plan = Chooser::new(Compress::Zstd, true, 1.5).plan(ms(0), &Path { is_paused, ..path(bandwidth) });
            assert_eq!(plan.batch_pages, pages, "{bandwidth}, {is_paused}");
        }
    }

    /// The first pages find the buffers of the path empty.
    #[test]
    fn a_path_that_looked_wide_is_found_out_without_another_look() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let wide = path(500e6);
        for at in 0..4 {
            let bytes = 1 << 20;
            chooser.plan(ms(2 * at), &wide);
            chooser.handed(ms(2 * at + 1), &handed(ms(2 * at), ms(1), true, at * bytes, (at + 1) * bytes));
            chooser.confirmed(ms(2 * at + 2), (at + 1) * bytes);
        }
        let begins_with = chooser.plan(ms(10), &path(500e6)).codec;
        assert!(begins_with == Codec::Raw || begins_with == Codec::Lz4, "{begins_with:?}");
        let mut codec = begins_with;
        for at in 10..2000 {
            let plan = chooser.plan(ms(at), &path(11.7e6));
            codec = plan.codec;
            let of = |codec| {
                let (time, share) = index(codec).map_or((0.0, 1.0), |at| ASSUMED[at]);
                costs(64 << 10, share, time).codec
            };
            let costs = Costs { codec: of(codec), trial: plan.trial.map(of).unwrap_or_default(), ..Costs::default() };
            chooser.encoded(ms(at), codec, plan.trial, &costs);
        }
        assert!(codec == Codec::Zstd3 || codec == Codec::Zstd6, "{codec:?}");
    }

    /// Pages that go as they are only to see what the path carries are many bytes on one that carries few.
    #[test]
    fn a_path_that_is_far_slower_than_the_encoders_is_hardly_asked() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let (mut stream, mut raw) = (0, 0);
        for at in 0..30_000 {
            let is_raw = chooser.plan(ms(at), &path(11.7e6)).codec == Codec::Raw;
            assert!(!is_raw || at >= 10_000, "{at} ms");
            raw += u64::from(is_raw);
            chooser.handed(ms(at), &handed(ms(at), Duration::ZERO, is_raw, stream, stream + 11_700));
            stream += 11_700;
            chooser.confirmed(ms(at), stream.saturating_sub(100 * 11_700));
        }
        assert!((20..400).contains(&raw), "{raw} ms");
    }

    #[test]
    fn trials_are_rare_and_take_a_hundredth_of_the_time() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.0);
        let mut tried = Duration::ZERO;
        let mut trials = 0;
        for at in (0..20_000).step_by(4) {
            let plan = chooser.plan(ms(at), &path(10e9));
            assert_eq!(plan.codec, Codec::Raw);
            if let Some(codec) = plan.trial {
                assert_eq!(codec, Codec::Lz4, "only the neighbour");
                let costs = Costs { trial: costs(256 << 10, 0.5, 6.0).codec, ..Costs::default() };
                tried += costs.trial.time;
                trials += 1;
                chooser.encoded(ms(at), Codec::Raw, Some(codec), &costs);
            }
        }
        assert!(trials >= 30, "{trials}");
        assert!(tried <= ms(200) + 2 * TRIAL_TIME_FIRST, "{tried:?}");
    }

    /// A target that decodes more slowly than the path carries: its confirmations of encoded bytes say little, those of the
    /// pages that go as they are show the path.
    #[test]
    fn a_path_that_only_looks_narrow_is_found_out() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let (mut stream, mut raw_sent) = (0, 0);
        let us = Duration::from_micros;
        let mut now = Duration::ZERO;
        let mut codecs = Vec::new();
        let mut carried = 100e6;
        while now < Duration::from_secs(10) {
            let plan = chooser.plan(now, &path(carried));
            let is_raw = plan.codec == Codec::Raw;
            codecs.push(plan.codec);
            // As they are 4 GB/s, encoded 100 MB/s of the stream.
            let (bytes, time) = if is_raw { (1 << 20, us(262)) } else { (100_000, us(1000)) };
            raw_sent += if is_raw { bytes } else { 0 };
            carried += 0.1 * (bytes as f64 / time.as_secs_f64() - carried);
            let began = now;
            now += time / 2;
            chooser.handed(now, &handed(began, now - began, is_raw, stream, stream + bytes));
            // The encoders are as slow as the target.
            if let Some(at) = index(plan.codec) {
                let cost = costs((bytes as f64 / ASSUMED[at].1) as u64, ASSUMED[at].1, 4.0 * ASSUMED[at].0);
                chooser.encoded(now, plan.codec, None, &cost);
            }
            stream += bytes;
            now += time / 2;
            chooser.confirmed(now, stream);
        }
        assert!(raw_sent > 0);
        let late = &codecs[codecs.len() / 2..];
        let encoded = late.iter().filter(|&&codec| codec != Codec::Raw).count();
        // Now and then it is looked at what the sender takes: 4 MiB of pages, which here takes as long as 64 MiB as they are.
        assert!(encoded * 100 < late.len(), "{encoded} of {}", late.len());
    }

    /// Bytes of pages that went as they are, of all, where the sender takes so many ns for a byte beside encoding at a time and
    /// the path carries so much; until the source has sent 350 MB of pages, of which a sixth is left.
    fn raw_share(beside_ns: impl Fn(Duration) -> f64, raw_ns: f64, path_bytes_per_s: f64) -> f64 {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.0);
        let (mut now, mut stream, mut arrived, mut raw_bytes, mut content_bytes) = (Duration::ZERO, 0, 0.0, 0, 0);
        let piece = 256 * PAGE_BYTES;
        while content_bytes < 350 << 20 {
            let plan = chooser.plan(now, &path(path_bytes_per_s));
            let is_raw = plan.codec == Codec::Raw;
            let share = if is_raw { 1.0 } else { 0.17 };
            let ns = if is_raw { raw_ns } else { beside_ns(now) + index(plan.codec).map_or(0.0, |at| ASSUMED[at].0) };
            let busy = Duration::from_secs_f64(piece as f64 * ns / 1e9);
            let (began, bytes) = (now, (piece as f64 * share) as u64);
            if let Some(at) = index(plan.codec) {
                chooser.encoded(now, plan.codec, None, &costs(piece, 0.17, ASSUMED[at].0));
            }
            let end = Duration::from_secs_f64((began.as_secs_f64()).max(arrived) + bytes as f64 / path_bytes_per_s);
            arrived = end.as_secs_f64();
            // A window of 10 ms is under way.
            now = (began + busy).max(end.saturating_sub(ms(10)));
            let all_raw = Handed { content_bytes: piece, ..handed(began, busy, is_raw, stream, stream + bytes) };
            chooser.handed(now, &all_raw);
            stream += bytes;
            let under_way = ((arrived - now.as_secs_f64()).max(0.0) * path_bytes_per_s) as u64;
            chooser.confirmed(now, stream.saturating_sub(under_way));
            content_bytes += piece;
            raw_bytes += if is_raw { piece } else { 0 };
        }
        raw_bytes as f64 / content_bytes as f64
    }

    /// A sender that was slow at the beginning, as all are that do everything for the first time beside a guest that is busy, made
    /// pages go as they are for good: 353 of 355 MB.
    #[test]
    fn a_slow_beginning_does_not_last() {
        let share = raw_share(|now| if now < ms(300) { 14.0 } else { 3.0 }, 1.0, 117e6);
        assert!(share < 0.15, "{share}");
    }

    /// Where encoding does take that long and the path is wide, they keep going as they are.
    #[test]
    fn a_sender_that_stays_slow_is_not_asked_to_encode() {
        let share = raw_share(|_| 3.0, 0.7, 4e9);
        assert!(share > 0.8, "{share}");
    }

    /// It is known of a codec how it compares only once it was tried, not once it was used.
    #[test]
    fn the_codec_used_first_is_tried_beside_the_next_one_soon() {
        let mut chooser = Chooser::new(Compress::Auto, true, 2.0);
        let fast = chooser.plan(Duration::ZERO, &path(1e9)).codec;
        assert_eq!(fast, Codec::Lz4);
        chooser.encoded(ms(1), fast, None, &costs(1 << 20, 0.5, 1.8));
        let plan = chooser.plan(ms(2), &path(300e6));
        assert_eq!((plan.codec, plan.trial), (Codec::Zstd1, Some(Codec::Lz4)));
        // Three fifths of what LZ4 leaves, in two fifths more time.
        let trial = costs(1 << 20, 0.5, 1.8).codec;
        chooser.encoded(ms(3), plan.codec, plan.trial, &Costs { trial, ..costs(1 << 20, 0.3, 2.5) });
        assert_ne!(chooser.plan(ms(4), &path(300e6)).trial, Some(Codec::Lz4));
        assert!(chooser.mix().share(Codec::Lz4) > 1.5 * chooser.mix().share(Codec::Zstd1));
    }

    /// Stretches that cannot be made smaller go as they are whatever the codec. One of 256 KiB was confirmed within 0.2 µs, with
    /// what followed: a path of a terabyte a second, over which all went as they are for a while.
    #[test]
    fn a_few_pages_that_go_as_they_are_say_nothing_of_the_path() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let mut stream = 0;
        for at in 0..300 {
            let plan = chooser.plan(ms(at), &path(117e6));
            assert_ne!(plan.codec, Codec::Raw, "{at} ms");
            let (is_raw, bytes) = (at % 10 == 5, 117_000);
            chooser.encoded(ms(at), plan.codec, None, &costs(234_000, 0.5, 1.0));
            chooser.handed(ms(at), &handed(ms(at), Duration::from_micros(900), is_raw, stream, stream + bytes));
            stream += bytes;
            let arrived = ms(at) + Duration::from_nanos(200);
            chooser.confirmed(arrived, stream);
        }
    }

    /// Two pages were the first to go as changes, and it took 0.2 ms to make ready what encodes them. No page went so any more, and
    /// a guest that would have fitted the pause by its changes did not converge.
    #[test]
    fn a_slow_first_delta_does_not_turn_deltas_off() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.0);
        let delta = costs(2 * PAGE_BYTES, 0.11, 25.0).codec;
        chooser.encoded(ms(1), Codec::Zstd3, None, &Costs { delta, ..Costs::default() });
        let at_20_mb = Path { cap_bytes_per_s: Some(20_000_000), ..path(20e6) };
        assert!(chooser.plan(ms(2), &at_20_mb).deltas);
        // Where they do take that long, they are not worth it.
        let delta = costs(2 << 20, 0.11, 25.0).codec;
        chooser.encoded(ms(3), Codec::Zstd3, None, &Costs { delta, ..Costs::default() });
        assert!(!chooser.plan(ms(4), &at_20_mb).deltas);
    }

    /// Where the path is about to run empty, what is for LZ4 anyway does not count, and nothing slow is tried.
    #[test]
    fn what_lets_the_path_run_empty_is_encoded_sooner() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.0);
        let path = |is_filled| Path { is_filled, ..path(120e6) };
        for at in 0..40 {
            let Plan { codec, trial, .. } = chooser.plan(ms(at), &path(true));
            // A tenth of it is for the codec chosen; Zstandard takes much longer than is assumed.
            let zstd = if codec == Codec::Lz4 { 3.0 } else { 12.0 };
            let light = costs(9 << 18, 0.5, 1.0).codec;
            let trial_ns = trial.map_or(0.0, |trial| if trial == Codec::Lz4 { 3.0 } else { 12.0 });
            let tried = trial.map_or(Cost::default(), |_| costs(1 << 18, 0.4, trial_ns).codec);
            chooser.encoded(ms(at), codec, trial, &Costs { light, trial: tried, ..costs(1 << 18, 0.4, zstd) });
        }
        let mix = chooser.mix();
        assert!(mix.sender_time(Codec::Zstd1) < mix.path_time(Codec::Zstd1, Some(120e6)), "it keeps up, all in all");
        let filled = chooser.plan(ms(50), &path(true)).codec;
        assert_ne!(filled, Codec::Lz4);
        assert_eq!(chooser.plan(ms(51), &path(false)).codec, Codec::Lz4);
    }

    #[test]
    fn pages_that_can_go_as_deltas_do_while_the_path_is_looked_at() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let deltas = |chooser: &mut Chooser, may_be_deltas| {
            let plan = chooser.plan(ms(50), &Path { may_be_deltas, ..path(10e6) });
            (plan.codec != Codec::Raw, plan.deltas)
        };
        assert_eq!(deltas(&mut chooser, false), (true, true));
        for look in [Look::Glimpse(0), Look::Long(ms(49))] {
            chooser.look = Some(look);
            assert_eq!(deltas(&mut chooser, false), (false, false), "{look:?}");
            assert_eq!(deltas(&mut chooser, true), (true, true), "{look:?}");
            assert!(chooser.look.is_some(), "it waits for other pages");
        }
        // None begins with them.
        chooser.look = None;
        for at in (50..20_000).step_by(10) {
            chooser.plan(ms(at), &Path { may_be_deltas: true, ..path(10e6) });
            assert!(chooser.look.is_none());
        }
    }

    /// Of a guest whose pages no codec makes smaller, but for a few of next to nothing, no page went as a delta.
    #[test]
    fn pages_that_no_codec_makes_smaller_go_as_deltas() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.0);
        let path = Path { is_full: true, ..path(20e6) };
        for at in 0..100 {
            let plan = chooser.plan(ms(at * 50), &path);
            assert!(plan.deltas || at < 10, "{at}");
            // All that the codec has is eight pages that are nearly zero.
            if at < 2 {
                chooser.encoded(ms(at * 50), plan.codec, None, &costs(8 * PAGE_BYTES, 0.004, 0.3));
            }
            let (from, to) = (at << 20, (at + 1) << 20);
            let as_they_are = Handed { content_bytes: 1 << 20, ..handed(ms(at * 50), ms(1), false, from, to) };
            chooser.handed(ms(at * 50 + 1), &as_they_are);
        }
    }

    #[test]
    fn where_the_network_limits_or_is_too_narrow_no_pages_go_as_they_are_to_look_at_it() {
        // 4 MiB take 10 ms: as they are they would come sooner over the widest of these.
        let networks =
            [(true, None, false), (false, None, true), (false, Some(117e6), false), (false, Some(2e9), true)];
        for (is_full, network_bytes_per_s, may_look) in networks {
            let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
            let looks = (0..400_u64).filter(|at| {
                chooser.plan(ms(at * 10), &Path { is_full, network_bytes_per_s, ..path(117e6) });
                // By its own account the sender takes about as long as the path.
                chooser.encoded(ms(at * 10), chooser.current, None, &costs(4 << 20, 0.5, 6.0));
                let (from, to) = (at << 22, (at + 1) << 22);
                chooser.handed(ms(at * 10 + 10), &handed(ms(at * 10), ms(10), false, from, to));
                chooser.look.take().is_some()
            });
            let looks = looks.count();
            assert_eq!(looks > 0, may_look, "{looks} looks: {is_full}, {network_bytes_per_s:?}");
        }
    }

    /// Encoders, sender and target share the processors: by their own figures the encoders keep up with a path that carries
    /// 1 GB/s, and pages take twice as long as without them.
    #[test]
    fn encoding_that_delays_all_else_is_found_out() {
        let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
        let (mut stream, mut now, mut raw) = (0, Duration::ZERO, 0);
        let mut carried = 100e6;
        while now < Duration::from_secs(2) {
            let plan = chooser.plan(now, &Path { is_filled: false, ..path(carried) });
            let is_raw = plan.codec == Codec::Raw;
            let content = 2 << 20;
            let (bytes, time) = if is_raw { (content, ms(2)) } else { (content / 2, ms(4)) };
            carried += 0.3 * (bytes as f64 / time.as_secs_f64() - carried);
            let starts = now;
            now += time;
            raw += if is_raw && now > ms(300) { time.as_millis() } else { 0 };
            if !is_raw {
                chooser.encoded(now, plan.codec, None, &costs(content, 0.5, 1.0));
            }
            chooser.handed(now, &handed(starts, time, is_raw, stream, stream + bytes));
            stream += bytes;
            chooser.confirmed(now, stream);
        }
        assert!(raw > 1500, "{raw} ms of 1700");
    }
}
