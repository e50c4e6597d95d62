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

    /// Another cap from now on, or none. What was sent ahead of the old one is paid for with the new one, so that in no
    /// stretch of time more leaves than the caps allowed meanwhile, and what may be sent ahead.
    ///
    /// # Panics
    /// If the cap is 0.
    pub fn set_rate(&mut self, now: Duration, bytes_per_s: Option<u64>) {
        assert!(bytes_per_s != Some(0), "a bandwidth cap of 0 sends nothing, ever");
        let ahead = self.paid_until.saturating_sub(now).as_secs_f64() * self.bytes_per_s.unwrap_or(0) as f64;
        self.paid_until = match bytes_per_s {
            Some(rate) => now + Duration::from_secs_f64(ahead / rate as f64),
            None => Duration::ZERO,
        };
        self.bytes_per_s = bytes_per_s;
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

    /// When a cap began to hold, and what it is.
    type Caps = Vec<(Duration, u64)>;

    /// Sends chunks as soon as they may leave, by the clock of a driver that oversleeps by so much, and changes the cap at
    /// the given times. When something left, and when the driver came to the changes.
    fn drive(changes: &[(Duration, u64)], chunk_bytes: u64, late: Duration, end: Duration) -> (Vec<Duration>, Caps) {
        let mut pacer = Pacer::new(Some(changes[0].1));
        let (mut sends, mut caps, mut now) = (Vec::new(), vec![changes[0]], changes[0].0);
        loop {
            let due = now.max(pacer.next_at());
            match changes.get(caps.len()) {
                Some(&(at, rate)) if at <= due => {
                    now = now.max(at);
                    pacer.set_rate(now, Some(rate));
                    caps.push((now, rate));
                }
                _ => {
                    now = due + if due > now { late } else { Duration::from_micros(1) };
                    if now >= end {
                        return (sends, caps);
                    }
                    pacer.sent(now, chunk_bytes);
                    sends.push(now);
                }
            }
        }
    }

    /// What the caps allow until then.
    fn allowed(caps: &Caps, to: Duration) -> f64 {
        let ends = caps.iter().skip(1).map(|cap| cap.0).chain([Duration::MAX]);
        let bytes = |(&(start, rate), end): (&(Duration, u64), Duration)| {
            end.min(to).saturating_sub(start).as_secs_f64() * rate as f64
        };
        caps.iter().zip(ends).map(bytes).sum()
    }

    proptest::proptest! {
        #[test]
        fn the_caps_hold_over_any_stretch_across_changes(
            steps in proptest::collection::vec((1_u64..80, 50_000_u64..10_000_000), 1..10),
            chunk_bytes in 5_000_u64..20_000,
            late_us in 0_u64..2_000,
        ) {
            let mut at = Duration::from_secs(1);
            let mut changes = Caps::new();
            for (ms, rate) in steps {
                changes.push((at, rate));
                at += Duration::from_millis(ms);
            }
            let (sends, caps) = drive(&changes, chunk_bytes, Duration::from_micros(late_us), at);
            let allowed_at: Vec<f64> = sends.iter().map(|&now| allowed(&caps, now)).collect();
            // A driver that oversleeps sends before it comes to a change, at the same time.
            let cap_at = |now: Duration| caps.iter().rfind(|cap| cap.0 < now).map_or(0, |cap| cap.1) as f64;
            for (first, &start) in sends.iter().enumerate() {
                let (mut bytes, mut fastest) = (0.0, 0.0_f64);
                for (index, &now) in sends.iter().enumerate().skip(first) {
                    bytes += chunk_bytes as f64;
                    fastest = fastest.max(cap_at(now));
                    let most = allowed_at[index] - allowed_at[first] + fastest * BURST.as_secs_f64() + chunk_bytes as f64;
                    proptest::prop_assert!(bytes <= most + 1.0, "{bytes} of {most} bytes from {start:?} to {now:?}");
                    if now - start > Duration::from_millis(100) {
                        break;
                    }
                }
            }
            // Nor is anything given away: who is never late by more than may be sent ahead sends all of it.
            let (bytes, most) = (sends.len() as f64 * chunk_bytes as f64, allowed(&caps, at));
            let slack = cap_at(at) * (BURST.as_secs_f64() + late_us as f64 / 1e6) + chunk_bytes as f64;
            proptest::prop_assert!(bytes >= most - slack, "{bytes} bytes, {most} were allowed");
        }
    }

    #[test]
    fn a_change_takes_effect_at_once_and_what_was_ahead_is_paid_for() {
        let second = Duration::from_secs(1);
        let mut pacer = Pacer::new(Some(10_000_000));
        pacer.sent(second, 100_000);
        assert_eq!(pacer.next_at(), second + Duration::from_millis(10) - BURST);
        pacer.set_rate(second, Some(1_000_000));
        assert_eq!(pacer.next_at(), second + Duration::from_millis(100) - BURST);
        pacer.set_rate(second, None);
        assert_eq!(pacer.next_at(), Duration::ZERO);
        pacer.sent(second, 1 << 40);
        pacer.set_rate(second, Some(1_000_000));
        assert_eq!(pacer.next_at(), second - BURST, "what left without a cap is not charged");
    }

    #[test]
    fn without_a_cap_there_is_no_waiting() {
        let mut pacer = Pacer::new(None);
        pacer.sent(Duration::from_secs(1), u64::MAX);
        assert_eq!(pacer.next_at(), Duration::ZERO);
    }
}
