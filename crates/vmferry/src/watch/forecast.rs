//! Whether the guest could be moved now: the migration is simulated with what the guest wrote last, by the same code
//! that would migrate it. That takes a while for a large guest, so it happens on a thread of its own.

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use vmferry_core::engine::OutcomeKind;
use vmferry_core::pages::PAGE_BYTES;
use vmferry_sim::trace::Trace;
use vmferry_sim::{Outcome, Scenario, SimError, simulate};

/// The least time between two predictions for the same link and limit.
const INTERVAL: Duration = Duration::from_secs(2);
/// Of the time, at most one part in so many goes into predictions: there are guests to run on this host.
const SHARE: u32 = 4;
/// From less than this nothing is predicted.
const ENOUGH: Duration = Duration::from_secs(1);

/// Under which conditions the guest would be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Conditions {
    /// What the link carries, in bytes per second.
    pub(super) bandwidth: u64,
    /// The longest pause.
    pub(super) limit: Duration,
}

impl Conditions {
    /// The next bandwidth of 1, 2, 3, 5, 10, … Mbit/s up to 1 Tbit/s.
    pub(super) fn step_bandwidth(&mut self, up: bool) {
        const MBIT_BYTES: u64 = 125_000;
        self.bandwidth = step(self.bandwidth, up, MBIT_BYTES, 1_000_000);
    }

    /// The next limit of 10, 20, 30, 50, 100, … ms up to 100 s.
    pub(super) fn step_limit(&mut self, up: bool) {
        const MS_NANOS: u64 = 1_000_000;
        let nanos = u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX);
        self.limit = Duration::from_nanos(step(nanos, up, 10 * MS_NANOS, 10_000));
    }

    /// `vmferry migrate` with these two and no other flags.
    fn scenario(self, trace: &Trace) -> Scenario {
        // A guest that is sent three times over and has not come through is not on its way.
        let thrice = 3.0 * (trace.pages * PAGE_BYTES) as f64 / self.bandwidth as f64;
        Scenario {
            bandwidth_bytes_per_s: self.bandwidth,
            downtime_limit: self.limit,
            time_limit: Duration::from_secs(120) + Duration::from_secs_f64(thrice),
            ..Scenario::default()
        }
    }
}

/// The neighbour of `value` in 1, 2, 3, 5, 10, … `unit`s up to `most` of them.
fn step(value: u64, up: bool, unit: u64, most: u64) -> u64 {
    let mut ladder = Vec::new();
    let mut decade = 1;
    while decade <= most {
        ladder.extend([1, 2, 3, 5].map(|digit| digit * decade).into_iter().filter(|&steps| steps <= most));
        decade *= 10;
    }
    let mut rungs = ladder.into_iter().map(|steps| steps * unit);
    if up {
        rungs.find(|&rung| rung > value).unwrap_or(unit * most)
    } else {
        rungs.rfind(|&rung| rung < value).unwrap_or(unit)
    }
}

/// How a migration that began now would go.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub(super) enum Verdict {
    /// The guest would run on the target.
    Converges { total_ms: f64, downtime_ms: f64, within_limit: bool, wire_bytes: u64, held_pages: u64 },
    /// It would be given up after this time, having sent so much. `possible`: whether a schedule that knows the future
    /// could have met the limit.
    DoesNotConverge { given_up_ms: f64, wire_bytes: u64, possible: bool },
    /// It would still not have ended.
    DoesNotEnd { within_ms: f64 },
    /// It could not be simulated.
    Unknown { why: String },
}

impl Verdict {
    fn of(outcome: Result<Outcome, SimError>, scenario: &Scenario) -> Self {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return Self::Unknown { why: vmferry_host::describe(&error) },
        };
        let report = &outcome.report;
        match report.outcome {
            OutcomeKind::Completed => Self::Converges {
                total_ms: report.total_ms,
                downtime_ms: report.downtime_ms,
                within_limit: outcome.within_limit == Some(true),
                wire_bytes: report.wire_bytes,
                held_pages: report.working_set.pages,
            },
            OutcomeKind::NotConverged => Self::DoesNotConverge {
                given_up_ms: report.total_ms,
                wire_bytes: report.wire_bytes,
                possible: outcome.optimum.pause_ms.is_some(),
            },
            OutcomeKind::Cancelled => Self::DoesNotEnd { within_ms: scenario.time_limit.as_secs_f64() * 1e3 },
            OutcomeKind::Failed | OutcomeKind::InDoubt => Self::Unknown {
                why: report.reason.clone().unwrap_or_else(|| "the simulated migration failed".to_owned()),
            },
        }
    }
}

/// A prediction.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Forecast {
    pub(super) conditions: Conditions,
    pub(super) verdict: Verdict,
    /// When the guest's writes that it was made from ended, since the watch began.
    pub(super) at: Duration,
}

/// Predicts from a trace. Its errors are verdicts.
pub(super) fn forecast(trace: &Trace, conditions: Conditions, at: Duration) -> Forecast {
    let scenario = conditions.scenario(trace);
    Forecast { conditions, verdict: Verdict::of(simulate(trace, &scenario), &scenario), at }
}

struct Question {
    trace: Trace,
    conditions: Conditions,
    at: Duration,
}

/// Predicts on a thread of its own, a question at a time. The thread ends when this is dropped, or with the process if
/// it is busy then.
#[derive(Debug)]
pub(super) struct Forecaster {
    ask: SyncSender<Question>,
    answers: Receiver<Forecast>,
    /// Of the question that is being worked on.
    asked: Option<(Conditions, Instant)>,
    /// When the next prediction may be made for conditions that have one.
    next: Instant,
    latest: Option<Forecast>,
}

impl Forecaster {
    pub(super) fn start() -> anyhow::Result<Self> {
        let (ask, questions) = sync_channel::<Question>(1);
        let (answer, answers) = sync_channel(1);
        thread::Builder::new()
            .name("forecast".to_owned())
            .spawn(move || {
                while let Ok(Question { trace, conditions, at }) = questions.recv() {
                    if answer.send(forecast(&trace, conditions, at)).is_err() {
                        return;
                    }
                }
            })
            .context("cannot start the thread that predicts")?;
        Ok(Self { ask, answers, asked: None, next: Instant::now(), latest: None })
    }

    /// The last prediction for these conditions.
    pub(super) fn latest(&self, conditions: Conditions) -> Option<&Forecast> {
        self.latest.as_ref().filter(|forecast| forecast.conditions == conditions)
    }

    /// Takes an answer, and asks again if it is time to; `trace` is called then only.
    ///
    /// # Errors
    /// If the thread that predicts has panicked, which is a defect.
    pub(super) fn turn(
        &mut self,
        conditions: Conditions,
        watched: Duration,
        trace: impl FnOnce() -> Trace,
    ) -> anyhow::Result<()> {
        let now = Instant::now();
        match self.answers.try_recv() {
            Ok(forecast) => {
                let took = self.asked.take().map_or(Duration::ZERO, |(_, since)| since.elapsed());
                self.next = now + (took * (SHARE - 1)).max(INTERVAL);
                self.latest = Some(forecast);
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => bail!("the prediction failed: a defect; its message is above"),
        }
        let due = now >= self.next || self.latest(conditions).is_none();
        if self.asked.is_some() || !due || watched < ENOUGH {
            return Ok(());
        }
        if self.ask.try_send(Question { trace: trace(), conditions, at: watched }).is_ok() {
            self.asked = Some((conditions, now));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::PageRun;

    use super::super::model::WatchModel;
    use super::*;

    const MIB_PAGES: u64 = 256;

    /// A guest of 64 MiB that writes the first pages in each epoch of 50 ms.
    fn guest(hot_pages: u64) -> WatchModel {
        let mut model = WatchModel::new(64 * MIB_PAGES, &[PageRun::new(32 * MIB_PAGES, 16 * MIB_PAGES)]);
        for _ in 0..60 {
            model.observe(&[PageRun::new(0, hot_pages)], Duration::from_millis(50), Duration::ZERO);
        }
        model
    }

    fn conditions(bandwidth: u64, limit: u64) -> Conditions {
        Conditions { bandwidth, limit: Duration::from_millis(limit) }
    }

    #[test]
    fn a_calm_guest_converges_in_the_time_that_its_memory_takes() {
        let trace = guest(100).trace();
        let forecast = forecast(&trace, conditions(100_000_000, 300), Duration::from_secs(3));
        let Verdict::Converges { total_ms, downtime_ms, within_limit, wire_bytes, .. } = forecast.verdict else {
            panic!("{forecast:?}");
        };
        // 48 of 64 MiB are not zero: half a second.
        assert!((450.0..1000.0).contains(&total_ms), "{total_ms}");
        assert!(within_limit && downtime_ms < 300.0, "{downtime_ms}");
        assert!((50_000_000..60_000_000).contains(&wire_bytes), "{wire_bytes}");
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_carries_does_not() {
        let trace = guest(24 * MIB_PAGES).trace();
        let forecast = forecast(&trace, conditions(20_000_000, 100), Duration::from_secs(3));
        let Verdict::DoesNotConverge { possible, wire_bytes, .. } = forecast.verdict else { panic!("{forecast:?}") };
        assert!(!possible);
        assert!(wire_bytes > 0);
    }

    #[test]
    fn what_cannot_be_simulated_is_said() {
        let trace = WatchModel::new(100, &[]).trace();
        let Verdict::Unknown { why } = forecast(&trace, conditions(1_000_000, 100), Duration::ZERO).verdict else {
            panic!("nothing was watched");
        };
        assert!(why.contains("no epochs"), "{why}");
    }

    #[test]
    fn keys_step_through_round_numbers() {
        let mut at = conditions(125_000_000, 300);
        at.step_bandwidth(true);
        at.step_limit(true);
        assert_eq!(at, conditions(250_000_000, 500));
        at.step_bandwidth(false);
        at.step_bandwidth(false);
        at.step_limit(false);
        at.step_limit(false);
        assert_eq!(at, conditions(62_500_000, 200));
        for _ in 0..100 {
            at.step_bandwidth(true);
            at.step_limit(true);
        }
        assert_eq!(at, conditions(125_000_000_000, 100_000));
        for _ in 0..100 {
            at.step_bandwidth(false);
            at.step_limit(false);
        }
        assert_eq!(at, conditions(125_000, 10));
        // From between two, to the neighbour.
        let mut odd = conditions(130_000_000, 310);
        odd.step_bandwidth(false);
        odd.step_limit(true);
        assert_eq!(odd, conditions(125_000_000, 500));
    }

    #[test]
    fn the_thread_answers_for_the_conditions_asked_for() {
        let model = guest(100);
        let mut forecaster = Forecaster::start().unwrap();
        let first = conditions(100_000_000, 300);
        forecaster.turn(first, Duration::from_millis(500), || panic!("too early to predict")).unwrap();
        let answered = |forecaster: &mut Forecaster, conditions| {
            let since = Instant::now();
            while forecaster.latest(conditions).is_none() {
                assert!(since.elapsed() < Duration::from_secs(60), "no answer");
                forecaster.turn(conditions, model.watched(), || model.trace()).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        };
        answered(&mut forecaster, first);
        assert_eq!(forecaster.latest(first), Some(&forecast(&model.trace(), first, model.watched())));
        // At once for other conditions, and not before the interval is over for the same.
        forecaster.turn(first, model.watched(), || panic!("asked again too soon")).unwrap();
        let second = conditions(50_000_000, 300);
        assert_eq!(forecaster.latest(second), None);
        answered(&mut forecaster, second);
        assert_eq!(forecaster.latest(first), None);
    }
}
