//! Whether what remains becomes less.

use std::time::Duration;

/// What remains counts as less than before if it shrank below the best so far by this factor.
const PROGRESS_FACTOR: f64 = 0.95;
/// What remains goes up and down with the guest's epochs; it is smoothed over about this time before it is judged.
const SMOOTHING: Duration = Duration::from_millis(300);

/// What remains, smoothed, and the least that it was.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    smoothed: Option<(f64, Duration)>,
    best: Option<(f64, Duration)>,
}

impl Progress {
    /// Notes what remains; returns whether that is progress, or the first look.
    pub(super) fn note(&mut self, now: Duration, remaining: f64) -> bool {
        let smoothed = match self.smoothed {
            Some((before, at)) => {
                let share = now.saturating_sub(at).as_secs_f64() / SMOOTHING.as_secs_f64();
                before + (remaining - before) * share.min(1.0)
            }
            None => remaining,
        };
        self.smoothed = Some((smoothed, now));
        let better = self.best.is_none_or(|(best, _)| smoothed < best * PROGRESS_FACTOR);
        if better {
            self.best = Some((smoothed, now));
        }
        better
    }

    /// Since when there was none; nothing noted yet is no time.
    pub(super) fn stands_for(&self, now: Duration) -> Duration {
        self.best.map_or(Duration::ZERO, |(_, at)| now.saturating_sub(at))
    }
}
