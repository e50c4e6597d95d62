//! The bandwidth that the path really carries, from what the target confirms.
//!
//! Only stretches count in which bytes were under way all along, each without its round trip: a pause of the sender says
//! nothing about the path, and a sender that waits for each confirmation would measure distance instead of width.

use std::time::Duration;

/// Busy time that makes a sample.
const SAMPLE_TIME: Duration = Duration::from_millis(20);
/// Bytes that make a sample on a path too fast for that.
const SAMPLE_BYTES: u64 = 8 * 1024 * 1024;
/// The weight of a new sample.
const NEW_SHARE: f64 = 0.3;
/// A stretch is never taken for shorter than this share of what it took, however long the round trip.
const STRETCH_SHARE_MIN: u32 = 4;

/// A smoothed estimate of delivered bytes per second.
#[derive(Debug, Clone, Default)]
pub struct RateEstimate {
    /// When the stretch under way began, and what had been delivered then.
    busy_since: Option<(Duration, u64)>,
    /// Earlier stretches that wait to become a sample.
    time: Duration,
    bytes: u64,
    bytes_per_s: Option<f64>,
}

impl RateEstimate {
    /// Nothing measured yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The estimate in bytes per second; a rough one while little was delivered, `None` before anything was.
    pub fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s.or_else(|| (!self.time.is_zero()).then(|| self.bytes as f64 / self.time.as_secs_f64()))
    }

    /// Bytes begin to be under way, `delivered` having arrived so far.
    pub fn busy(&mut self, now: Duration, delivered: u64) {
        self.busy_since.get_or_insert((now, delivered));
    }

    /// `delivered` bytes have arrived by `now`; `idle` says that nothing is under way any more.
    pub fn delivered(&mut self, now: Duration, delivered: u64, idle: bool, round_trip: Duration) {
        let Some((since, before)) = self.busy_since else { return };
        let (time, bytes) = (now.saturating_sub(since), delivered.saturating_sub(before));
        let ripe = self.time + time >= SAMPLE_TIME || self.bytes + bytes >= SAMPLE_BYTES;
        if !(idle || ripe) {
            return;
        }
        self.time += time.saturating_sub(round_trip).max(time / STRETCH_SHARE_MIN);
        self.bytes += bytes;
        self.busy_since = (!idle).then_some((now, delivered));
        if !self.time.is_zero() && (self.time >= SAMPLE_TIME || self.bytes >= SAMPLE_BYTES) {
            let sample = self.bytes as f64 / self.time.as_secs_f64();
            self.bytes_per_s = Some(match self.bytes_per_s {
                Some(old) => old + (sample - old) * NEW_SHARE,
                None => sample,
            });
            (self.time, self.bytes) = (Duration::ZERO, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
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

    #[test]
    fn it_follows_a_change() {
        let mut rate = RateEstimate::new();
        rate.busy(ms(0), 0);
        let mut delivered = 0;
        for step in 1..2000 {
            delivered += if step < 1000 { 100_000 } else { 20_000 };
            rate.delivered(ms(step), delivered, false, Duration::ZERO);
        }
        assert!((rate.bytes_per_s().unwrap() / 20e6 - 1.0).abs() < 0.05);
    }

    #[test]
    fn one_burst_gives_a_rough_figure() {
        let mut rate = RateEstimate::new();
        rate.busy(ms(10), 0);
        rate.delivered(ms(11), 50_000, true, Duration::ZERO);
        assert!((rate.bytes_per_s().unwrap() / 50e6 - 1.0).abs() < 0.01);
        assert_eq!(RateEstimate::new().bytes_per_s(), None);
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
}
