//! The bandwidth that the path really carries, from what the target confirms.
//!
//! Only stretches count in which bytes were under way all along, each without the round trip that it begins with: a pause of
//! the sender says nothing about the path, and a sender that waits for each confirmation would measure distance instead of
//! width. Whether the path was full is another question. A sender that is busy reading and encoding leaves gaps; what arrived
//! meanwhile shows that the path carries at least so much, and not that it carries no more. So a stretch in which it never was
//! full can only raise the estimate, as samples do that BBR calls application-limited (Cardwell et al., BBR: Congestion-Based
//! Congestion Control, 2016); and it counts no more once the path was full, since a short burst that a shaper lets through
//! is faster than all that follow it. It counts again if more arrived than a shaper lets through at once: that the path became
//! wider, or was measured while a host was busy, a sender that plans by the estimate would otherwise never learn.

use std::collections::VecDeque;
use std::time::Duration;

/// Busy time that makes a sample.
const SAMPLE_TIME: Duration = Duration::from_millis(20);
/// Bytes that make a sample on a path too fast for that.
const SAMPLE_BYTES: u64 = 8 * 1024 * 1024;
/// The weight of a new sample.
const NEW_SHARE: f64 = 0.3;
/// The peak is that of so many samples.
const PEAK_SAMPLES: usize = 16;
/// A stretch is never taken for shorter than this share of what it took, however long the round trip.
const STRETCH_SHARE_MIN: u32 = 4;

/// A shaper lets fewer bytes through at once than these and what the path carries in the time.
const BURST_BYTES: f64 = 2.0 * 1024.0 * 1024.0;
/// What arrived in less was possibly only heard of late, all at once.
const BURST_TIME: Duration = Duration::from_millis(100);

/// A smoothed estimate of delivered bytes per second.
#[derive(Debug, Clone, Default)]
pub struct RateEstimate {
    /// The stretch under way.
    busy: Option<Stretch>,
    /// Earlier ones that wait to become a sample: those in which the path was full, and the others.
    full: Waiting,
    open: Waiting,
    bytes_per_s: Option<f64>,
    /// That is from a path that was full.
    is_certain: bool,
    /// The latest samples of a full path.
    latest: VecDeque<f64>,
    /// The time in which more arrived than the path carries by the estimate, pauses and all.
    above: Above,
}

#[derive(Debug, Clone, Copy, Default)]
struct Above {
    /// Since when, and what had been delivered then.
    since: (Duration, u64),
    /// The same of the last that was heard.
    heard: (Duration, u64),
}

impl Above {
    /// `delivered` bytes have arrived by `now`, over a path that carries so much by the estimate: what it carries at least, if
    /// that is more.
    fn delivered(&mut self, now: Duration, delivered: u64, bytes_per_s: f64) -> Option<f64> {
        let beyond = |(since, before): (Duration, u64)| {
            let time = now.saturating_sub(since).as_secs_f64();
            (delivered.saturating_sub(before) as f64 - bytes_per_s * time, time)
        };
        let (mut more, mut time) = beyond(self.since);
        if more <= 0.0 {
            self.since = self.heard;
            (more, time) = beyond(self.since);
        }
        self.heard = (now, delivered);
        let burst_s = BURST_TIME.as_secs_f64();
        if more <= BURST_BYTES + bytes_per_s * burst_s || time < burst_s {
            return None;
        }
        self.since = self.heard;
        Some(bytes_per_s + more / time)
    }
}

#[derive(Debug, Clone, Copy)]
struct Stretch {
    since: Duration,
    /// What had been delivered then.
    delivered: u64,
    /// As much was under way as may be, at some time.
    is_full: bool,
    /// Nothing was under way before: the first confirmation took a round trip.
    from_idle: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Waiting {
    time: Duration,
    bytes: u64,
}

impl Waiting {
    fn is_ripe(self, time: Duration, bytes: u64) -> bool {
        self.time + time >= SAMPLE_TIME || self.bytes + bytes >= SAMPLE_BYTES
    }

    fn bytes_per_s(self) -> Option<f64> {
        (!self.time.is_zero()).then(|| self.bytes as f64 / self.time.as_secs_f64())
    }
}

impl RateEstimate {
    /// Nothing measured yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The estimate in bytes per second; a rough one while little was delivered, `None` before anything was.
    pub fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s.or_else(|| self.full.bytes_per_s()).or_else(|| self.open.bytes_per_s())
    }

    /// The best of the latest samples of a full path, in bytes per second; before there are any, the estimate. For how much may
    /// be under way: where hosts are busy, confirmations are late again and again, and what is under way is carried in longer
    /// time than the path needs. Less under way, as the estimate has it, would carry less still.
    pub fn peak_bytes_per_s(&self) -> Option<f64> {
        self.latest.iter().copied().reduce(f64::max).or_else(|| self.bytes_per_s())
    }

    /// Bytes begin to be under way, `delivered` having arrived so far.
    pub fn busy(&mut self, now: Duration, delivered: u64) {
        self.busy.get_or_insert(Stretch { since: now, delivered, is_full: false, from_idle: true });
    }

    /// As much is under way as may be: it is the path that is waited for.
    pub fn full(&mut self) {
        if let Some(stretch) = &mut self.busy {
            stretch.is_full = true;
        }
    }

    /// `delivered` bytes have arrived by `now`; `idle` says that nothing is under way any more.
    pub fn delivered(&mut self, now: Duration, delivered: u64, idle: bool, round_trip: Duration) {
        if let Some(wider) = self.bytes_per_s.and_then(|rate| self.above.delivered(now, delivered, rate)) {
            self.bytes_per_s = Some(wider);
            self.latest = VecDeque::from([wider]);
        }
        let Some(Stretch { since, delivered: before, is_full, from_idle }) = self.busy else { return };
        let waiting = if is_full { &mut self.full } else { &mut self.open };
        let (time, bytes) = (now.saturating_sub(since), delivered.saturating_sub(before));
        if !(idle || waiting.is_ripe(time, bytes)) {
            return;
        }
        let first = if from_idle { round_trip } else { Duration::ZERO };
        waiting.time += time.saturating_sub(first).max(time / STRETCH_SHARE_MIN);
        waiting.bytes += bytes;
        self.busy = (!idle).then_some(Stretch { since: now, delivered, is_full: false, from_idle: false });
        if !waiting.is_ripe(Duration::ZERO, 0) {
            return;
        }
        let Some(sample) = std::mem::take(waiting).bytes_per_s() else { return };
        self.bytes_per_s = Some(match self.bytes_per_s {
            None => sample,
            Some(_) if is_full && !self.is_certain => sample,
            Some(old) if is_full || (sample > old && !self.is_certain) => old + (sample - old) * NEW_SHARE,
            Some(old) => old,
        });
        self.is_certain |= is_full;
        if is_full {
            self.latest.truncate(PEAK_SAMPLES - 1);
            self.latest.push_front(sample);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A sender whose bursts are each confirmed before the next one.
    #[derive(Default)]
    struct Bursts {
        rate: RateEstimate,
        now: Duration,
        delivered: u64,
    }

    impl Bursts {
        /// So many bytes in this time, over a path that they fill or not, and a pause.
        fn send(&mut self, bytes: u64, took: Duration, is_full: bool, pause: Duration) {
            self.rate.busy(self.now, self.delivered);
            if is_full {
                self.rate.full();
            }
            (self.now, self.delivered) = (self.now + took, self.delivered + bytes);
            self.rate.delivered(self.now, self.delivered, true, Duration::ZERO);
            self.now += pause;
        }
    }

    #[test]
    fn a_steady_path_is_measured_and_pauses_do_not_count() {
        let mut rate = RateEstimate::new();
        let mut delivered = 0;
        for burst in 0..10 {
            let start = burst * 1000;
            rate.busy(ms(start), delivered);
            for step in 1..=100 {
                delivered += 100_000;
                rate.delivered(ms(start + step), delivered, step == 100, Duration::ZERO);
            }
        }
        let measured = rate.bytes_per_s().unwrap();
        assert!((measured / 100e6 - 1.0).abs() < 0.02, "{measured}");
    }

    /// Bytes are under way all along: the round trip passes once.
    #[test]
    fn a_round_trip_counts_where_a_stretch_begins() {
        let mut rate = RateEstimate::new();
        rate.busy(ms(0), 0);
        for step in 1..=500 {
            rate.full();
            rate.delivered(ms(5 + step), step * 100_000, step == 500, ms(5));
        }
        let measured = rate.bytes_per_s().unwrap();
        assert!((measured / 100e6 - 1.0).abs() < 0.02, "{measured}");
    }

    #[test]
    fn it_follows_a_change_of_a_path_that_is_full() {
        let mut rate = RateEstimate::new();
        rate.busy(ms(0), 0);
        let mut delivered = 0;
        for step in 1..2000 {
            delivered += if step < 1000 { 100_000 } else { 20_000 };
            rate.full();
            rate.delivered(ms(step), delivered, false, Duration::ZERO);
        }
        assert!((rate.bytes_per_s().unwrap() / 20e6 - 1.0).abs() < 0.05);
        assert!((rate.peak_bytes_per_s().unwrap() / 20e6 - 1.0).abs() < 0.05, "the peak as well, after a while");
    }

    /// A busy host confirms late half of the time: as much as before is to be under way all the same.
    #[test]
    fn late_confirmations_do_not_narrow_the_window() {
        let mut sender = Bursts::default();
        for round in 0..100 {
            let window = sender.rate.peak_bytes_per_s().unwrap_or(50e6) * 0.02;
            sender.send(window as u64, ms(if round % 2 == 0 { 20 } else { 60 }), true, ms(0));
        }
        let (peak, mean) = (sender.rate.peak_bytes_per_s().unwrap(), sender.rate.bytes_per_s().unwrap());
        assert!((peak / 50e6 - 1.0).abs() < 0.05, "{peak}");
        assert!((15e6..45e6).contains(&mean), "{mean}");
    }

    #[test]
    fn one_burst_gives_a_rough_figure() {
        let mut rate = RateEstimate::new();
        rate.busy(ms(10), 0);
        rate.delivered(ms(11), 50_000, true, Duration::ZERO);
        assert!((rate.bytes_per_s().unwrap() / 50e6 - 1.0).abs() < 0.01);
        assert_eq!(RateEstimate::new().bytes_per_s(), None);
    }

    /// Few bytes at a time are those of a sender that thinks the path is narrow.
    #[test]
    fn a_path_that_became_wide_is_noticed_although_it_is_never_full() {
        let mut sender = Bursts::default();
        (0..10).for_each(|_| sender.send(200_000, ms(100), true, ms(0)));
        assert_eq!(sender.rate.bytes_per_s(), Some(2e6));
        (0..1000).for_each(|_| sender.send(50_000, ms(1), false, ms(1)));
        for rate in [sender.rate.bytes_per_s().unwrap(), sender.rate.peak_bytes_per_s().unwrap()] {
            assert!((rate / 25e6 - 1.0).abs() < 0.1, "pauses and all: {rate}");
        }
    }

    /// A shaper of 2 MB/s lets a megabyte through at once after each pause, forever.
    #[test]
    fn bursts_that_a_shaper_lets_through_do_not_make_it_wide() {
        let mut sender = Bursts::default();
        (0..10).for_each(|_| sender.send(1_000_000, ms(500), true, ms(0)));
        (0..990).for_each(|_| sender.send(1_000_000, ms(1), false, ms(499)));
        assert_eq!(sender.rate.bytes_per_s(), Some(2e6));
    }

    /// A paced sender waits between its chunks: each is confirmed before the next one leaves.
    #[test]
    fn a_sender_that_waits_for_each_confirmation_measures_the_path_all_the_same() {
        let mut rate = RateEstimate::new();
        let us = Duration::from_micros;
        for chunk in 0..2000 {
            let start = us(chunk * 5000);
            rate.busy(start, chunk * 40_000);
            // 400 µs on a path of 100 MB/s, and 600 µs for the round trip.
            rate.delivered(start + us(1000), (chunk + 1) * 40_000, true, us(600));
        }
        assert!((rate.bytes_per_s().unwrap() / 100e6 - 1.0).abs() < 0.05, "{rate:?}");
    }

    /// Deltas are so few bytes that the sender, not the path, says how many arrive; before, plans followed them down.
    #[test]
    fn a_sender_that_is_slower_than_the_path_does_not_make_it_narrow() {
        let mut sender = Bursts::default();
        let burst = |sender: &mut Bursts, bytes, took, is_full| sender.send(bytes, took, is_full, ms(10));
        burst(&mut sender, 2_000_000, ms(20), false);
        (0..1000).for_each(|_| burst(&mut sender, 5000, ms(5), false));
        assert_eq!(sender.rate.bytes_per_s(), Some(100e6));
        (0..20).for_each(|_| burst(&mut sender, 4_000_000, ms(20), false));
        let raised = sender.rate.bytes_per_s().unwrap();
        assert!((raised / 200e6 - 1.0).abs() < 0.01, "it can show that the path is wider: {raised}");
        burst(&mut sender, 1_000_000, ms(20), true);
        assert_eq!(sender.rate.bytes_per_s(), Some(50e6), "a shaper let the bursts through");
        (0..1000).for_each(|_| burst(&mut sender, 400_000, ms(1), false));
        assert_eq!(sender.rate.bytes_per_s(), Some(50e6));
        (0..20).for_each(|_| burst(&mut sender, 1_600_000, ms(20), true));
        assert!((sender.rate.bytes_per_s().unwrap() / 80e6 - 1.0).abs() < 0.01, "{:?}", sender.rate);
    }
}
