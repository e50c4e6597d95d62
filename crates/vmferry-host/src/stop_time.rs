//! How long the stop phase of a QEMU guest will take besides copying pages, judged by how fast its QEMU answers now.
//!
//! In that phase QEMU's threads, our two processes and the target's QEMU wait for each other a dozen times. How long each
//! wait takes depends on how busy the host is, and an answer on the monitor is such a wait, which can be timed before the
//! guest is paused. Beside the waits there is work, a figure measured once. On a busy host it is interrupted, as is the
//! work of our own thread, whose interruptions the kernel counts. The figures, and where they fail: decision 0011.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What the stop phase takes beside the waits, undisturbed: stopping processors, saving and loading the state of devices.
const WORK: Duration = Duration::from_millis(6);
/// The most times longer that work is taken to last where it is interrupted.
const MOST_STRETCH: f64 = 8.0;
/// Waits in a stop phase.
const WAITS: f64 = 12.0;
/// So many standard deviations are planned with beside the mean. Long waits come in groups, so this does not stand for a
/// probability; it was chosen by what it covers.
const DEVIATIONS: f64 = 3.0;
/// The most that is planned with. On a host so busy that it would be more, nothing can be foreseen, and limits that can be
/// met with some luck shall be tried.
const MOST: Duration = Duration::from_millis(60);
/// Answers that are remembered: at the usual epoch those of two seconds.
const KEPT_ANSWERS: usize = 40;
/// Answers that are asked for before anything is planned.
const FIRST_ANSWERS: usize = 8;
/// Between two later questions.
const INTERVAL: Duration = Duration::from_millis(20);

/// The times of the last answers.
#[derive(Debug, Default)]
pub(crate) struct StopTime {
    answers: VecDeque<Duration>,
    /// Of our own thread, with each answer.
    turns: VecDeque<Turns>,
    asked_at: Option<Instant>,
}

impl StopTime {
    /// How often to ask now.
    pub(crate) fn questions(&self, now: Instant) -> usize {
        match self.asked_at {
            None => FIRST_ANSWERS,
            Some(at) => usize::from(now.saturating_duration_since(at) >= INTERVAL),
        }
    }

    /// A question of this moment took so long to be answered, and our thread has had these turns.
    pub(crate) fn note(&mut self, asked_at: Instant, took: Duration, turns: Option<Turns>) {
        self.asked_at = Some(asked_at);
        if self.answers.len() >= KEPT_ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back(took);
        if let Some(turns) = turns {
            if self.turns.len() >= KEPT_ANSWERS {
                self.turns.pop_front();
            }
            self.turns.push_back(turns);
        }
    }

    /// What to plan with.
    pub(crate) fn estimate(&self) -> Duration {
        if self.answers.is_empty() {
            return MOST;
        }
        let (mean, deviation) = self.answer_s();
        let waits = Duration::from_secs_f64(WAITS * mean + DEVIATIONS * WAITS.sqrt() * deviation);
        (WORK.mul_f64(self.stretch()) + waits).min(MOST)
    }

    /// How many times longer work takes than it would alone on the host: 1 where nobody waits for a processor.
    pub(crate) fn stretch(&self) -> f64 {
        let (Some(first), Some(last)) = (self.turns.front(), self.turns.back()) else { return 1.0 };
        let worked = last.worked.saturating_sub(first.worked);
        let waited = last.waited.saturating_sub(first.waited);
        if worked.is_zero() { 1.0 } else { (1.0 + waited.div_duration_f64(worked)).min(MOST_STRETCH) }
    }

    /// Mean and standard deviation of the answers, in seconds.
    pub(crate) fn answer_s(&self) -> (f64, f64) {
        let count = self.answers.len().max(1) as f64;
        let seconds = || self.answers.iter().map(Duration::as_secs_f64);
        let mean = seconds().sum::<f64>() / count;
        let variance = seconds().map(|answer| (answer - mean).powi(2)).sum::<f64>() / count;
        (mean, variance.sqrt())
    }
}

/// How long a thread was on a processor, and how long it could have been and had to wait for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Turns {
    worked: Duration,
    waited: Duration,
}

impl Turns {
    /// Of the thread that asks; `None` where the kernel does not count them.
    pub(crate) fn of_this_thread() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/thread-self/schedstat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut nanoseconds = text.split_whitespace().map(|word| word.parse().ok().map(Duration::from_nanos));
        Some(Self { worked: nanoseconds.next()??, waited: nanoseconds.next()?? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// After these answers, again and again.
    fn estimate(answers: &[Duration]) -> Duration {
        let (mut time, start) = (StopTime::default(), Instant::now());
        for &answer in answers.iter().cycle().take(KEPT_ANSWERS) {
            time.note(start, answer, None);
        }
        time.estimate()
    }

    #[test]
    fn a_quiet_host_is_planned_with_little_and_a_busy_one_with_much() {
        assert_eq!(StopTime::default().estimate(), MOST);
        let quiet = estimate(&[MS / 5]);
        assert!(quiet.abs_diff(WORK + MS.mul_f64(WAITS / 5.0)) < MS / 1000, "{quiet:?}");
        assert!(quiet < 12 * MS, "{quiet:?}");
        let busy = estimate(&[2 * MS]);
        let uneven = estimate(&[MS / 5, MS / 5, MS / 5, 7 * MS + 2 * MS / 5]);
        assert!(uneven > busy && busy > 2 * quiet, "{quiet:?} {busy:?} {uneven:?}");
        assert_eq!(estimate(&[20 * MS]), MOST);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let (mut time, start) = (StopTime::default(), Instant::now());
        time.note(start, 20 * MS, Some(Turns { worked: MS, waited: MS }));
        for _ in 0..KEPT_ANSWERS {
            time.note(start, MS / 5, Some(Turns { worked: MS, waited: 2 * MS }));
        }
        assert_eq!(time.estimate(), estimate(&[MS / 5]));
    }

    #[test]
    fn work_that_is_interrupted_takes_longer() {
        let (mut time, start) = (StopTime::default(), Instant::now());
        assert_eq!(time.stretch(), 1.0);
        for turn in 0..4 {
            let turns = Turns { worked: turn * MS, waited: turn * 2 * MS };
            time.note(start, Duration::ZERO, Some(turns));
        }
        assert_eq!((time.stretch(), time.estimate()), (3.0, 3 * WORK));
        time.note(start, Duration::ZERO, Some(Turns { worked: 3 * MS, waited: Duration::from_secs(1) }));
        assert_eq!(time.stretch(), MOST_STRETCH);
    }

    #[test]
    fn turns_are_read_as_the_kernel_writes_them() {
        let turns = Turns { worked: Duration::from_nanos(1_525_000), waited: Duration::from_nanos(72_000) };
        assert_eq!(Turns::parse("1525000 72000 4\n"), Some(turns));
        assert_eq!(Turns::parse("1525000 x 4\n"), None);
        assert_eq!(Turns::parse(""), None);
    }

    #[test]
    fn it_asks_often_at_first_and_then_now_and_then() {
        let (mut time, start) = (StopTime::default(), Instant::now());
        assert_eq!(time.questions(start), FIRST_ANSWERS);
        time.note(start, MS, None);
        assert_eq!(time.questions(start + INTERVAL / 2), 0);
        assert_eq!(time.questions(start + INTERVAL), 1);
    }
}
