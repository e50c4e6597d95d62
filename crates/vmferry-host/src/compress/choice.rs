//! Which encoding sends pages soonest.
//!
//! Encoding and sending go on at the same time, so a page takes whichever of the two takes longer:
//!
//! ```text
//!   time per byte of pages  =  max(encoding / processors, share that is left / bandwidth)
//! ```
//!
//! The codec with the least is used. What each costs and leaves is measured all the time on this guest's pages, and now and
//! then a codec is tried that is not in use, for at most a hundredth of the time. The bandwidth is that of pages as they
//! are: where the encoders or the target are slower than the path, confirmations of encoded bytes would show the path
//! narrower than it is, and encoding would justify itself. So now and then some pages go as they are.

use std::time::Duration;

use vmferry_core::plan::RateEstimate;
use vmferry_core::wire::Encodings;

use super::batch::Costs;
use super::codec::Codec;

/// A codec that is not in use is tried so often,
const TRIAL_INTERVAL: Duration = Duration::from_millis(500);
/// as long as all trials took at most this share of the time since the beginning,
const TRIAL_SHARE: f64 = 0.01;
/// and this time, so that one can begin.
const TRIAL_TIME_FIRST: Duration = Duration::from_millis(3);
/// Another codec must be so much better to be used instead.
const BETTER_FACTOR: f64 = 0.97;
/// Bytes of pages after which earlier measurements of a codec count less than half.
const MEMORY_BYTES: f64 = (2 << 20) as f64;
/// The least weight of a new measurement.
const NEW_SHARE_MIN: f64 = 0.2;
/// Pages go as they are so often to see what the path carries,
const BURST_INTERVAL: Duration = Duration::from_secs(2);
/// for so long,
const BURST_TIME: Duration = Duration::from_millis(20);
/// or so many bytes.
const BURST_BYTES: u64 = 8 << 20;
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
            Compress::Auto => &[Codec::Raw, Codec::Lz4, Codec::Zstd1, Codec::Zstd3],
            Compress::Off => &[Codec::Raw],
            Compress::Lz4 => &[Codec::Lz4],
            Compress::Zstd => &[Codec::Zstd1, Codec::Zstd3],
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
    /// The guest is paused: nothing is tried.
    pub(crate) is_paused: bool,
}

/// How some pages shall go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    /// By what.
    pub(crate) codec: Codec,
    /// The share of the bytes that it is expected to leave.
    pub(crate) expected_share: f64,
    /// Pages that are written again go as deltas and are kept for the next one.
    pub(crate) deltas: bool,
    /// Let this codec have the first of them.
    pub(crate) trial: Option<Codec>,
}

/// What was measured of a codec, or is assumed before that.
#[derive(Debug, Clone, Copy)]
struct Estimate {
    ns_per_byte: f64,
    share: f64,
    is_measured: bool,
    looked_at: Option<Duration>,
}

impl Estimate {
    const fn assumed(ns_per_byte: f64, share: f64) -> Self {
        Self { ns_per_byte, share, is_measured: false, looked_at: None }
    }

    fn add(&mut self, content_bytes: u64, encoded_bytes: u64, time: Duration) {
        if content_bytes == 0 {
            return;
        }
        let bytes = content_bytes as f64;
        let weight = if self.is_measured { (1.0 - (-bytes / MEMORY_BYTES).exp()).max(NEW_SHARE_MIN) } else { 1.0 };
        self.ns_per_byte += weight * (time.as_nanos() as f64 / bytes - self.ns_per_byte);
        self.share += weight * (encoded_bytes as f64 / bytes - self.share);
        self.is_measured = true;
    }
}

/// Chooses.
#[derive(Debug)]
pub(crate) struct Chooser {
    compress: Compress,
    /// Whether there is a cache of what the target has.
    deltas: bool,
    parallel: f64,
    lz4: Estimate,
    zstd1: Estimate,
    zstd3: Estimate,
    delta: Estimate,
    current: Codec,
    trial_time: Duration,
    raw: RawPath,
    burst: Option<(Duration, u64)>,
}

impl Chooser {
    /// A chooser for encoders that work on so many processors at a time.
    pub(crate) fn new(compress: Compress, deltas: bool, parallel: f64) -> Self {
        Self {
            compress,
            deltas: deltas && compress != Compress::Off,
            parallel,
            lz4: Estimate::assumed(1.8, 0.5),
            zstd1: Estimate::assumed(3.5, 0.4),
            zstd3: Estimate::assumed(6.0, 0.38),
            delta: Estimate::assumed(0.8, 0.2),
            current: compress.codecs()[0],
            trial_time: Duration::ZERO,
            raw: RawPath::default(),
            burst: None,
        }
    }

    /// How pages shall go that are about to be sent.
    pub(crate) fn plan(&mut self, now: Duration, path: &Path) -> Plan {
        let straight = Plan { codec: Codec::Raw, expected_share: 1.0, deltas: false, trial: None };
        let cap = path.cap_bytes_per_s.map(|cap| cap as f64);
        let measured = self.raw.rate.bytes_per_s();
        let bandwidth = match (measured.or(path.bandwidth_bytes_per_s), cap) {
            (Some(measured), Some(cap)) => Some(measured.min(cap)),
            (measured, cap) => measured.or(cap),
        };
        let agreed = |codec: &Codec| path.encodings.contains(codec.encoding());
        let codecs = self.compress.codecs().iter().copied().filter(agreed);
        let best = codecs.clone().min_by(|&a, &b| self.time(a, bandwidth).total_cmp(&self.time(b, bandwidth)));
        let Some(best) = best else { return straight };
        let current_stays = codecs.clone().any(|codec| codec == self.current)
            && self.time(best, bandwidth) > self.time(self.current, bandwidth) * BETTER_FACTOR;
        if !current_stays {
            tracing::debug!(from = ?self.current, to = ?best, bandwidth, "compression");
            self.current = best;
        }
        if self.current != Codec::Raw && self.wants_burst(now, path) {
            return straight;
        }
        let deltas = self.deltas
            && path.encodings.has_deltas()
            && (self.compress != Compress::Auto || self.delta_pays(bandwidth));
        let trial = if path.is_paused { None } else { self.trial(now, codecs) };
        Plan { codec: self.current, expected_share: self.share(self.current), deltas, trial }
    }

    /// What a batch cost that was encoded.
    pub(crate) fn encoded(&mut self, now: Duration, codec: Codec, costs: &Costs, is_trial: bool) {
        if let Some(estimate) = self.estimate(codec) {
            estimate.add(costs.codec.content_bytes, costs.codec.encoded_bytes, costs.codec.time);
            estimate.looked_at = Some(now);
        }
        self.delta.add(costs.delta.content_bytes, costs.delta.encoded_bytes, costs.delta.time);
        if is_trial {
            self.trial_time += costs.time;
        }
    }

    /// Pages were sent: all of them as they are, or not. The stream was so long before and is so long after them.
    pub(crate) fn sent(&mut self, began: Duration, now: Duration, all_raw: bool, from_bytes: u64, to_bytes: u64) {
        if all_raw {
            self.raw.sent(began, now, from_bytes, to_bytes);
        } else {
            self.raw.ends(now);
        }
    }

    /// So many bytes of the stream have arrived.
    pub(crate) fn confirmed(&mut self, now: Duration, bytes: u64, round_trip: Duration) {
        self.raw.confirmed(now, bytes, round_trip);
    }

    fn time(&self, codec: Codec, bandwidth: Option<f64>) -> f64 {
        // Nothing known of the path: then the fewer bytes, the better it is for what is asked for, and pages as they are
        // where anything may be used.
        let sending = |share: f64| share * 1e9 / bandwidth.unwrap_or(if codec == Codec::Raw { f64::MAX } else { 1e9 });
        match self.estimate_of(codec) {
            None => sending(1.0),
            Some(estimate) => (estimate.ns_per_byte / self.parallel).max(sending(estimate.share)),
        }
    }

    fn delta_pays(&self, bandwidth: Option<f64>) -> bool {
        // Whatever it leaves: that depends on the page, and is seen when it is tried.
        self.delta.ns_per_byte / self.parallel <= self.time(self.current, bandwidth) * BETTER_FACTOR
    }

    fn share(&self, codec: Codec) -> f64 {
        self.estimate_of(codec).map_or(1.0, |estimate| estimate.share)
    }

    fn estimate_of(&self, codec: Codec) -> Option<&Estimate> {
        match codec {
            Codec::Raw => None,
            Codec::Lz4 => Some(&self.lz4),
            Codec::Zstd1 => Some(&self.zstd1),
            Codec::Zstd3 => Some(&self.zstd3),
        }
    }

    fn estimate(&mut self, codec: Codec) -> Option<&mut Estimate> {
        match codec {
            Codec::Raw => None,
            Codec::Lz4 => Some(&mut self.lz4),
            Codec::Zstd1 => Some(&mut self.zstd1),
            Codec::Zstd3 => Some(&mut self.zstd3),
        }
    }

    fn trial(&self, now: Duration, mut codecs: impl Iterator<Item = Codec>) -> Option<Codec> {
        if self.trial_time > now.mul_f64(TRIAL_SHARE) + TRIAL_TIME_FIRST {
            return None;
        }
        codecs.find(|&codec| {
            let looked_at = self.estimate_of(codec).map(|estimate| estimate.looked_at);
            let is_old = |at: Option<Duration>| at.is_none_or(|at| now.saturating_sub(at) >= TRIAL_INTERVAL);
            codec != self.current && looked_at.is_some_and(is_old)
        })
    }

    /// Whether pages shall go as they are now to see what the path carries.
    fn wants_burst(&mut self, now: Duration, path: &Path) -> bool {
        let limited_by_cap = path
            .cap_bytes_per_s
            .is_some_and(|cap| path.bandwidth_bytes_per_s.is_some_and(|bandwidth| bandwidth >= cap as f64 * CAP_SHARE));
        if path.is_paused || limited_by_cap || self.compress != Compress::Auto {
            self.burst = None;
            return false;
        }
        if let Some((since, bytes)) = self.burst {
            let goes_on = now.saturating_sub(since) < BURST_TIME && self.raw.bytes < bytes + BURST_BYTES;
            if !goes_on {
                self.burst = None;
            }
            return goes_on;
        }
        let is_due = now.saturating_sub(self.raw.last) >= BURST_INTERVAL;
        if is_due {
            self.burst = Some((now, self.raw.bytes));
        }
        is_due
    }
}

/// What the path carries of pages as they are.
#[derive(Debug, Default)]
struct RawPath {
    rate: RateEstimate,
    /// Where in the stream the stretch began that has only pages as they are, and where it ends so far.
    stretch: Option<(u64, u64)>,
    confirmed: u64,
    /// Bytes that went so, in all, and when the last did.
    bytes: u64,
    last: Duration,
}

impl RawPath {
    fn sent(&mut self, began: Duration, now: Duration, from: u64, to: u64) {
        let (first, _) = *self.stretch.get_or_insert((from, to));
        self.stretch = Some((first, to));
        self.bytes += to - from;
        self.last = now;
        if self.confirmed >= first {
            self.rate.busy(began, self.confirmed);
        }
    }

    fn ends(&mut self, now: Duration) {
        if let Some((_, end)) = self.stretch.take() {
            // Only what is confirmed counts: the rest has company from now on.
            self.rate.delivered(now, self.confirmed.min(end), true, Duration::ZERO);
        }
    }

    fn confirmed(&mut self, now: Duration, bytes: u64, round_trip: Duration) {
        self.confirmed = self.confirmed.max(bytes);
        if let Some((first, end)) = self.stretch
            && bytes >= first
        {
            self.rate.busy(now, bytes);
            // Reading pages and writing them to a socket is faster than the path, or the path is not what limits.
            self.rate.full();
            self.rate.delivered(now, bytes, bytes >= end, round_trip);
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
            is_paused: false,
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

    #[test]
    fn the_slower_the_path_the_harder_it_is_tried() {
        for (bandwidth, codec, deltas) in [
            (5e9, Codec::Raw, false),
            (1e9, Codec::Raw, true),
            (300e6, Codec::Lz4, true),
            (117e6, Codec::Zstd1, true),
            (11.7e6, Codec::Zstd3, true),
        ] {
            let mut chooser = Chooser::new(Compress::Auto, true, 1.5);
            let plan = chooser.plan(Duration::ZERO, &path(bandwidth));
            assert_eq!((plan.codec, plan.deltas), (codec, deltas), "{bandwidth} bytes/s");
        }
    }

    #[test]
    fn what_is_asked_for_and_agreed_on_is_all_that_is_used() {
        for (compress, encodings, codec, deltas) in [
            (Compress::Off, Encodings::ALL, Codec::Raw, false),
            (Compress::Lz4, Encodings::ALL, Codec::Lz4, true),
            (Compress::Zstd, Encodings::ALL, Codec::Zstd3, true),
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
        for codec in [Codec::Lz4, Codec::Zstd1, Codec::Zstd3] {
            (0..10).for_each(|_| chooser.encoded(ms(1), codec, &costs(1 << 20, 1.05, 1.0), false));
        }
        assert_eq!(chooser.plan(ms(1), &path(100e6)).codec, Codec::Raw);
        // And then of which LZ4 leaves a tenth.
        (0..40).for_each(|_| chooser.encoded(ms(2), Codec::Lz4, &costs(1 << 20, 0.1, 1.0), false));
        assert_eq!(chooser.plan(ms(2), &path(100e6)).codec, Codec::Lz4);
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
                let costs = costs(256 << 10, 0.5, 6.0);
                tried += costs.time;
                trials += 1;
                chooser.encoded(ms(at), codec, &costs, true);
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
        while now < Duration::from_secs(10) {
            let plan = chooser.plan(now, &path(100e6));
            let is_raw = plan.codec == Codec::Raw;
            codecs.push(plan.codec);
            // As they are 4 GB/s, encoded 100 MB/s of the stream.
            let (bytes, time) = if is_raw { (1 << 20, us(262)) } else { (100_000, us(1000)) };
            raw_sent += if is_raw { bytes } else { 0 };
            let began = now;
            now += time / 2;
            chooser.sent(began, now, is_raw, stream, stream + bytes);
            stream += bytes;
            now += time / 2;
            chooser.confirmed(now, stream, Duration::ZERO);
        }
        assert!(raw_sent > 0);
        assert_eq!(codecs.last(), Some(&Codec::Raw));
        let late = &codecs[codecs.len() / 2..];
        assert!(late.iter().all(|&codec| codec == Codec::Raw));
    }
}
