//! The bandwidth that the path really carries, from what the target confirms.
//!
//! Only times count in which bytes were under way all along; a pause of the sender says nothing about the path.

use std::time::Duration;

/// The shortest stretch that gives a sample.
const SAMPLE_TIME: Duration = Duration::from_millis(20);
/// A stretch is also long enough with this many bytes: on a fast path confirmations come in lumps.
const SAMPLE_BYTES: u64 = 256 * 1024;
/// The weight of a new sample.
const NEW_SHARE: f64 = 0.3;

/// A smoothed estimate of delivered bytes per second.
#[derive(Debug, Clone, Default)]
pub struct RateEstimate {
    busy_since: Option<(Duration, u64)>,
    bytes_per_s: Option<f64>,
}

impl RateEstimate {
    /// Nothing measured yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The estimate in bytes per second.
    pub fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s
    }

    /// Bytes begin to be under way, `delivered` having arrived so far.
    pub fn busy(&mut self, now: Duration, delivered: u64) {
        self.busy_since.get_or_insert((now, delivered));
    }

    /// `delivered` bytes have arrived by `now`; `idle` says that nothing is under way any more.
    pub fn delivered(&mut self, now: Duration, delivered: u64, idle: bool) {
        let Some((since, before)) = self.busy_since else { return };
        let (time, bytes) = (now.saturating_sub(since), delivered.saturating_sub(before));
        if time >= SAMPLE_TIME && bytes >= SAMPLE_BYTES.min(1 + delivered / 4) {
            let sample = bytes as f64 / time.as_secs_f64();
            self.bytes_per_s = Some(match self.bytes_per_s {
                Some(old) => old + (sample - old) * NEW_SHARE,
                None => sample,
            });
            self.busy_since = Some((now, delivered));
        } else if idle && self.bytes_per_s.is_none() && bytes > 0 && !time.is_zero() {
            // A guest so small that all of it went in one burst: better a rough figure than none.
            self.bytes_per_s = Some(bytes as f64 / time.as_secs_f64());
        }
        if idle {
            self.busy_since = None;
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
                rate.delivered(ms(start + step), delivered, step == 100);
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
            rate.delivered(ms(step), delivered, false);
        }
        assert!((rate.bytes_per_s().unwrap() / 20e6 - 1.0).abs() < 0.05);
    }

    #[test]
    fn one_burst_gives_a_rough_figure() {
        let mut rate = RateEstimate::new();
        rate.busy(ms(10), 0);
        rate.delivered(ms(11), 50_000, true);
        assert!((rate.bytes_per_s().unwrap() / 50e6 - 1.0).abs() < 0.01);
        assert_eq!(RateEstimate::new().bytes_per_s(), None);
    }
}
