//! The bandwidth cap: a token bucket in virtual time.

use std::time::Duration;

/// How far sending may run ahead of the cap: short enough that the rate is right over 100 ms, long enough for a
/// driver that wakes up late.
const BURST: Duration = Duration::from_millis(4);

/// Says when the next bytes may leave, so that no more than the cap leave per second. Without a cap, at once.
#[derive(Debug, Clone)]
pub struct Pacer {
    bytes_per_s: Option<u64>,
    /// When everything sent so far would have left at exactly the cap.
    paid_until: Duration,
}

impl Pacer {
    /// A pacer for this cap.
    ///
    /// # Panics
    /// If the cap is 0.
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        assert!(bytes_per_s != Some(0), "a bandwidth cap of 0 sends nothing, ever");
        Self { bytes_per_s, paid_until: Duration::ZERO }
    }

    /// When the next bytes may leave: a time that has come, or one to wait for.
    pub fn next_at(&self) -> Duration {
        self.paid_until.saturating_sub(BURST)
    }

    /// Counts bytes that left at `now`.
    pub fn sent(&mut self, now: Duration, bytes: u64) {
        if let Some(rate) = self.bytes_per_s {
            let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
            self.paid_until = self.paid_until.max(now) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_any_hundred_milliseconds() {
        let mut pacer = Pacer::new(Some(10_000_000));
        let mut sends = Vec::new();
        let mut now = Duration::from_secs(1);
        while now < Duration::from_secs(2) {
            now = now.max(pacer.next_at());
            // A driver that oversleeps a little now and then.
            now += Duration::from_micros(if sends.len() % 7 == 0 { 900 } else { 10 });
            pacer.sent(now, 16_384);
            sends.push(now);
        }
        let total = sends.len() as f64 * 16_384.0;
        assert!((total / 10e6 - 1.0).abs() < 0.05, "{total} bytes in a second");
        for (index, &start) in sends.iter().enumerate() {
            let window = sends[index..].iter().filter(|&&at| at - start <= Duration::from_millis(100)).count();
            assert!(window as f64 * 16_384.0 <= 1.0e6 * 1.1, "{window} sends in 100 ms");
        }
    }

    #[test]
    fn without_a_cap_there_is_no_waiting() {
        let mut pacer = Pacer::new(None);
        pacer.sent(Duration::from_secs(1), u64::MAX);
        assert_eq!(pacer.next_at(), Duration::ZERO);
    }
}
