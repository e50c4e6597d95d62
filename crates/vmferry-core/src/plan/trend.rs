//! Where what remains is heading: a line through the last scans.

use std::collections::VecDeque;
use std::time::Duration;

/// How far back is looked. Passes are longer than epochs, and what remains goes up and down with them.
const TIME: Duration = Duration::from_secs(3);
/// The most scans kept.
const SAMPLES_MAX: usize = 256;
/// From fewer scans, or over less time, nothing is concluded.
const SAMPLES_MIN: usize = 5;
const TIME_MIN: Duration = Duration::from_millis(500);
/// What remains is falling if it fell by this share of its mean over the time looked at; less is noise.
const FALL_MIN: f64 = 0.05;
/// Nothing is foretold beyond this.
const FORESIGHT_MAX: Duration = Duration::from_secs(3600);

/// The trend of the bytes that remain, and of the guest's writes, over the last scans of the push.
#[derive(Debug, Clone, Default)]
pub struct Trend {
    samples: VecDeque<Sample>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Duration,
    written_pages: u64,
    pending_bytes: f64,
}

impl Trend {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A scan at `now` found so many pages written since the one before; so many bytes remain.
    pub fn scanned(&mut self, now: Duration, written_pages: u64, pending_bytes: f64) {
        self.samples.push_back(Sample { at: now, written_pages, pending_bytes });
        while self.samples.len() > SAMPLES_MAX || self.samples.front().is_some_and(|sample| sample.at + TIME < now) {
            self.samples.pop_front();
        }
    }

    /// What was seen so far says nothing about what comes: a limit changed, or another phase began.
    pub fn restart(&mut self) {
        self.samples.clear();
    }

    /// Pages written per second, each counted once per scan; `None` before the second scan.
    pub fn written_pages_per_s(&self) -> Option<f64> {
        let seconds = self.span().as_secs_f64();
        let pages: u64 = self.samples.iter().skip(1).map(|sample| sample.written_pages).sum();
        (seconds > 0.0).then(|| pages as f64 / seconds)
    }

    /// How long after the last scan what remains will have fallen to `bytes`; `None` where it does not fall, or where too
    /// little was seen.
    pub fn falls_to(&self, bytes: f64) -> Option<Duration> {
        let last = self.samples.back()?.at;
        if self.samples.len() < SAMPLES_MIN || self.span() < TIME_MIN {
            return None;
        }
        // The line of least squares, its times counted from the last scan.
        let points = self.samples.iter().map(|sample| (-(last - sample.at).as_secs_f64(), sample.pending_bytes));
        let count = self.samples.len() as f64;
        let (times, remaining) = points.clone().fold((0.0, 0.0), |(times, bytes), (t, b)| (times + t, bytes + b));
        let (mean_time, mean_bytes) = (times / count, remaining / count);
        let (above, below) = points.fold((0.0, 0.0), |(above, below), (t, b)| {
            (above + (t - mean_time) * (b - mean_bytes), below + (t - mean_time).powi(2))
        });
        let bytes_per_s = above / below;
        if !bytes_per_s.is_finite() || -bytes_per_s * self.span().as_secs_f64() < mean_bytes * FALL_MIN {
            return None;
        }
        let now_bytes = mean_bytes - bytes_per_s * mean_time;
        let time = Duration::try_from_secs_f64(((now_bytes - bytes) / -bytes_per_s).max(0.0)).ok()?;
        (time <= FORESIGHT_MAX).then_some(time)
    }

    fn span(&self) -> Duration {
        match (self.samples.front(), self.samples.back()) {
            (Some(first), Some(last)) => last.at - first.at,
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trend(samples: impl IntoIterator<Item = f64>) -> Trend {
        let mut trend = Trend::new();
        for (number, bytes) in samples.into_iter().enumerate() {
            trend.scanned(Duration::from_millis(50 * number as u64), 100, bytes);
        }
        trend
    }

    #[test]
    fn a_steady_fall_is_followed_to_its_end() {
        let falling = trend((0..=40).map(|number| 100e6 - f64::from(number) * 1e6));
        // 60 MB are left, at 20 MB/s.
        let left = falling.falls_to(10e6).unwrap();
        assert!(left.abs_diff(Duration::from_millis(2500)) < Duration::from_millis(1), "{left:?}");
        assert_eq!(falling.falls_to(70e6), Some(Duration::ZERO), "it is there");
        assert_eq!(falling.written_pages_per_s().map(f64::round), Some(2000.0));
    }

    #[test]
    fn ups_and_downs_are_no_fall() {
        for still in [
            trend((0..100).map(|_| 50e6)),
            trend((0..100).map(|number| if number % 4 == 0 { 30e6 } else { 60e6 })),
            trend((0..100).map(f64::from)),
            trend((0..100).map(|number| 50e6 - f64::from(number))),
        ] {
            assert_eq!(still.falls_to(1e6), None, "{still:?}");
        }
        let sawtooth = trend((0..100).map(|number| 100e6 - f64::from(number) * 0.5e6 + f64::from(number % 4) * 5e6));
        let left = sawtooth.falls_to(10e6).unwrap().as_secs_f64();
        assert!((3.0..6.0).contains(&left), "{left}");
    }

    #[test]
    fn little_says_nothing_and_old_scans_are_forgotten() {
        assert_eq!(Trend::new().falls_to(0.0), None);
        assert_eq!(Trend::new().written_pages_per_s(), None);
        assert_eq!(trend([3e6, 2e6, 1e6]).falls_to(0.0), None);
        let mut turned = trend((0..100).map(|number| 100e6 - f64::from(number) * 1e6));
        assert!(turned.falls_to(0.0).is_some());
        for number in 100..200 {
            turned.scanned(Duration::from_millis(50 * number), 0, 1e6);
        }
        assert_eq!((turned.falls_to(0.0), turned.written_pages_per_s()), (None, Some(0.0)));
        for _ in 0..10_000 {
            turned.scanned(Duration::from_secs(10), 0, 1e6);
        }
        assert!(turned.samples.len() <= SAMPLES_MAX);
        turned.restart();
        assert_eq!(turned.written_pages_per_s(), None);
    }
}
