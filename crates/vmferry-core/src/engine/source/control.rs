//! What the user changes while a migration runs, and what they are told of it.
//!
//! A change takes effect at the next [`Source::poll_action`]; nothing here asks for an action by itself. After the pause
//! has been decided on only the bandwidth can be changed: the limits are about when to pause.

use std::fmt;
use std::time::Duration;

use super::{Push, Source, SourceError, State, StopStep};
use crate::plan::{PageClass, Shadow};

/// What happens when the time limit is over and the guest was not paused yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtTimeLimit {
    /// The migration ends; the guest goes on where it is.
    Abort,
    /// The guest is paused and what remains is sent, however long that takes.
    Switch,
}

impl AtTimeLimit {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Switch => "switch",
        }
    }
}

/// The most time until the pause, counted from the beginning of the migration, and what happens then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimit {
    /// How long.
    pub after: Duration,
    /// And then.
    pub answer: AtTimeLimit,
}

/// Why a change was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// The migration is past the point up to which this can be changed.
    #[error("too late for that: the migration is {doing}")]
    TooLate {
        /// What is going on.
        doing: &'static str,
    },
    /// A cap of 0 bytes per second.
    #[error("a bandwidth cap of 0 sends nothing, ever; hold the push instead")]
    ZeroBandwidth,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The time until the guest runs on the target; `None` where that cannot be said, above all where what remains does not
    /// become less.
    pub remaining: Option<Duration>,
    /// Why it has not ended.
    pub unfinished: Unfinished,
}

/// Why a migration has not ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unfinished {
    /// The target has not answered yet.
    Greeting,
    /// The guest is watched before the first page is sent.
    Observing,
    /// The user holds the push.
    Held {
        /// Pages that remain.
        pending_pages: u64,
    },
    /// Memory is sent for the first time.
    FirstPass {
        /// Pages that were never sent.
        new_pages: u64,
        /// The guest's pages.
        total_pages: u64,
    },
    /// No pause at all would be within the limit.
    FixedTooLong {
        /// What every pause takes.
        fixed: Duration,
        /// What is allowed.
        limit: Duration,
    },
    /// What remains does not fit the limit, or another pass would shorten the pause by much.
    Rest {
        /// Pages that remain.
        pending_pages: u64,
        /// The pause that they would take; `None` where the bandwidth is not known.
        expected: Option<Duration>,
        /// What is allowed.
        limit: Duration,
        /// Pages that the guest writes per second, where known.
        written_pages_per_s: Option<f64>,
        /// Pages that the path carries per second, by what such pages cost, where known.
        carried_pages_per_s: Option<f64>,
    },
    /// The guest is being paused, or is paused, and what remains is sent.
    Copying {
        /// Pages that remain.
        pending_pages: u64,
    },
    /// The target loads the guest, or is about to run it.
    Loading,
    /// It failed, and the guest is about to run on the source.
    Resuming,
    /// It has ended.
    Ended,
}

impl Unfinished {
    /// A word for it, for programs.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Greeting => "greeting",
            Self::Observing => "observing",
            Self::Held { .. } => "held",
            Self::FirstPass { .. } => "first_pass",
            Self::FixedTooLong { .. } => "fixed_too_long",
            Self::Rest { .. } => "rest",
            Self::Copying { .. } => "copying",
            Self::Loading => "loading",
            Self::Resuming => "resuming",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Greeting => f.write_str("the target has not answered yet"),
            Self::Observing => f.write_str("the guest is watched before the first page is sent"),
            Self::Held { pending_pages } => write!(f, "held by the user; {pending_pages} pages remain"),
            Self::FirstPass { new_pages, total_pages } => {
                write!(f, "first pass: {new_pages} of {total_pages} pages were not sent yet")
            }
            Self::FixedTooLong { fixed, limit } => {
                let (fixed, limit) = (fixed.as_millis(), limit.as_millis());
                write!(f, "the fixed part of the pause, {fixed} ms, exceeds the limit of {limit} ms")
            }
            Self::Rest { pending_pages, expected, limit, written_pages_per_s, carried_pages_per_s } => {
                write!(f, "{pending_pages} pages remain")?;
                if let Some(expected) = expected {
                    write!(f, " = {} ms of pause", expected.as_millis())?;
                }
                write!(f, ", limit {} ms", limit.as_millis())?;
                if let (Some(written), Some(carried)) = (written_pages_per_s, carried_pages_per_s) {
                    write!(f, "; the guest writes {written:.0} pages/s, the path carries {carried:.0}")?;
                }
                Ok(())
            }
            Self::Copying { pending_pages } => write!(f, "the guest is paused; {pending_pages} pages remain"),
            Self::Loading => f.write_str("the target loads the guest"),
            Self::Resuming => f.write_str("the guest is about to go on at the source"),
            Self::Ended => f.write_str("it has ended"),
        }
    }
}

impl Source {
    /// The most bytes to send per second from now on; `None`: as the path allows.
    ///
    /// # Errors
    /// [`ChangeError`] for a cap of 0, or where nothing is sent any more.
    pub fn set_bandwidth_cap(&mut self, now: Duration, bytes_per_s: Option<u64>) -> Result<(), ChangeError> {
        if bytes_per_s == Some(0) {
            return Err(ChangeError::ZeroBandwidth);
        }
        if matches!(self.state, State::HandedOver { .. } | State::Resuming { .. } | State::Ended { .. }) {
            return Err(ChangeError::TooLate { doing: self.doing() });
        }
        if self.config.bandwidth_cap_bytes_per_s != bytes_per_s {
            self.config.bandwidth_cap_bytes_per_s = bytes_per_s;
            self.pacer.set_rate(now, bytes_per_s);
            self.conditions_changed();
        }
        Ok(())
    }

    /// The longest pause allowed from now on.
    ///
    /// # Errors
    /// [`ChangeError`] once the pause has been decided on.
    pub fn set_downtime_limit(&mut self, limit: Duration) -> Result<(), ChangeError> {
        self.check_before_pause()?;
        if self.config.downtime_limit != limit {
            self.config.downtime_limit = limit;
            self.conditions_changed();
        }
        Ok(())
    }

    /// The most time until the pause, counted from the beginning of the migration; `None`: without end. One that is over
    /// already is answered at once.
    ///
    /// # Errors
    /// [`ChangeError`] once the pause has been decided on.
    pub fn set_time_limit(&mut self, limit: Option<TimeLimit>) -> Result<(), ChangeError> {
        self.check_before_pause()?;
        self.time_limit = limit;
        Ok(())
    }

    /// Holds the push: no page is sent, and the guest is not paused, until [`Self::continue_push`]. Scans go on, so that
    /// the predictor learns, and the target hears of us. A time limit runs on; its end aborts a migration that is held, but
    /// the guest is not paused before the push goes on.
    ///
    /// # Errors
    /// [`ChangeError`] once the pause has been decided on.
    pub fn hold_push(&mut self, now: Duration) -> Result<(), ChangeError> {
        self.check_before_pause()?;
        if self.push_held_since.is_none() {
            self.push_held_since = Some(now);
            self.conditions_changed();
        }
        Ok(())
    }

    /// Goes on with a push that is held; no change for another.
    ///
    /// # Errors
    /// [`ChangeError`] once the migration is ending.
    pub fn continue_push(&mut self, now: Duration) -> Result<(), ChangeError> {
        self.check_before_pause()?;
        if let Some(since) = self.push_held_since.take() {
            // Policies reckon with the time in which something could be sent.
            let since = self.times.pushing.map_or(now, |pushing| pushing.max(since));
            self.push_held_for += now.saturating_sub(since);
            self.conditions_changed();
        }
        Ok(())
    }

    /// Whether the user holds the push.
    pub fn push_is_held(&self) -> bool {
        self.push_held_since.is_some()
    }

    /// The most bytes to send per second, as set last.
    pub fn bandwidth_cap_bytes_per_s(&self) -> Option<u64> {
        self.config.bandwidth_cap_bytes_per_s
    }

    /// The longest pause allowed, as set last.
    pub fn downtime_limit(&self) -> Duration {
        self.config.downtime_limit
    }

    /// The time limit, as set last.
    pub fn time_limit(&self) -> Option<TimeLimit> {
        self.time_limit
    }

    /// How far it is, and why it has not ended.
    pub fn estimate(&self, now: Duration) -> Estimate {
        Estimate { remaining: self.remaining(now), unfinished: self.unfinished(now) }
    }

    /// Ends a push whose time is over, as the user chose.
    pub(super) fn check_time_limit(&mut self, now: Duration) {
        let Some((at, TimeLimit { after, answer })) = self.time_limit_due() else { return };
        if now < at {
            return;
        }
        match answer {
            AtTimeLimit::Abort => {
                let (limit_ms, doing, why) = (after.as_millis() as u64, self.doing(), self.unfinished(now).to_string());
                self.fail(now, SourceError::TimeLimit { limit_ms, doing, why });
            }
            AtTimeLimit::Switch => self.pause_now(now, super::PauseCause::TimeLimit),
        }
    }

    /// When the time limit will be answered if nothing changes, and how.
    pub(super) fn time_limit_due(&self) -> Option<(Duration, TimeLimit)> {
        let limit = self.time_limit?;
        let is_answered = match (&self.state, limit.answer) {
            (State::Greeting | State::Opening | State::Observing { .. } | State::Pushing(_), AtTimeLimit::Abort) => {
                true
            }
            (State::Observing { .. } | State::Pushing(_), AtTimeLimit::Switch) => !self.push_is_held(),
            (
                State::Start
                | State::Greeting
                | State::Opening
                | State::Pausing
                | State::StopAndCopy(_)
                | State::HandedOver { .. }
                | State::Resuming { .. }
                | State::Ended { .. },
                AtTimeLimit::Abort | AtTimeLimit::Switch,
            ) => false,
        };
        is_answered.then_some((limit.after, limit))
    }

    /// Time since the push began in which it was not held.
    pub(super) fn pushing_for(&self, now: Duration) -> Duration {
        let began = self.times.pushing.unwrap_or(now);
        let held = self.push_held_since.map_or(Duration::ZERO, |since| now.saturating_sub(since.max(began)));
        now.saturating_sub(began).saturating_sub(self.push_held_for + held)
    }

    fn check_before_pause(&self) -> Result<(), ChangeError> {
        match self.state {
            State::Start | State::Greeting | State::Opening | State::Observing { .. } | State::Pushing(_) => Ok(()),
            State::Pausing
            | State::StopAndCopy(_)
            | State::HandedOver { .. }
            | State::Resuming { .. }
            | State::Ended { .. } => Err(ChangeError::TooLate { doing: self.doing() }),
        }
    }

    fn conditions_changed(&mut self) {
        self.trend.restart();
        self.policy.restart();
        self.shadows.iter_mut().for_each(Shadow::restart);
        if let State::Pushing(Push { warm, drained, .. }) = &mut self.state {
            // How many are held back and sent until the next scan is chosen anew.
            (*warm, *drained) = (None, false);
        }
    }

    fn unfinished(&self, now: Duration) -> Unfinished {
        let pending_pages = self.pending.len();
        match &self.state {
            State::Start | State::Greeting | State::Opening => Unfinished::Greeting,
            State::Observing { .. } | State::Pushing(_) if self.push_is_held() => Unfinished::Held { pending_pages },
            State::Observing { .. } => Unfinished::Observing,
            State::Pushing(_) => self.unfinished_push(now),
            State::Pausing => Unfinished::Copying { pending_pages },
            State::StopAndCopy(StopStep::Load) | State::HandedOver { .. } => Unfinished::Loading,
            State::StopAndCopy(_) => Unfinished::Copying { pending_pages },
            State::Resuming { .. } => Unfinished::Resuming,
            State::Ended { .. } => Unfinished::Ended,
        }
    }

    fn unfinished_push(&self, now: Duration) -> Unfinished {
        let facts = self.facts_without_bound(now);
        if facts.fixed_exceeds_limit() {
            return Unfinished::FixedTooLong { fixed: facts.fixed_downtime(), limit: facts.downtime_limit };
        }
        if facts.passes == 0 {
            return Unfinished::FirstPass { new_pages: self.unsent_pages(), total_pages: self.pages.total };
        }
        let page_bytes = facts.sizes.mean_bytes(PageClass::Written);
        Unfinished::Rest {
            pending_pages: facts.pending_pages,
            expected: facts.expected_downtime(),
            limit: facts.downtime_limit,
            written_pages_per_s: self.trend.written_pages_per_s(),
            carried_pages_per_s: facts.bandwidth_bytes_per_s.map(|rate| rate / page_bytes),
        }
    }

    fn remaining(&self, now: Duration) -> Option<Duration> {
        let facts = self.facts_without_bound(now);
        let sent = |bytes: f64| Duration::try_from_secs_f64(bytes / facts.bandwidth_bytes_per_s?).ok();
        let converges = match &self.state {
            State::Ended { .. } => return Some(Duration::ZERO),
            State::Pausing | State::StopAndCopy(StopStep::Scan | StopStep::Copy) => return facts.expected_downtime(),
            State::Start
            | State::Greeting
            | State::Opening
            | State::StopAndCopy(_)
            | State::HandedOver { .. }
            | State::Resuming { .. } => return None,
            State::Observing { .. } | State::Pushing(_) if self.push_is_held() => return None,
            State::Observing { until } => {
                let left = self.times.observing.map(|since| since + self.config.observe).unwrap_or(*until);
                sent(facts.mean_pending_bytes()).map(|sending| left.saturating_sub(now) + sending + facts.fixed.time)
            }
            State::Pushing(_) if facts.fixed_exceeds_limit() => None,
            State::Pushing(_) if facts.passes == 0 => {
                sent(facts.mean_pending_bytes()).map(|sending| sending + facts.fixed.time)
            }
            State::Pushing(_) if facts.fits() => facts.expected_downtime(),
            State::Pushing(_) => {
                let falls = self.trend.falls_to(facts.budget_bytes() as f64);
                falls.map(|falls| falls + facts.downtime_limit)
            }
        };
        // A time limit that switches ends it in any case.
        let switches = match self.time_limit_due() {
            Some((at, TimeLimit { answer: AtTimeLimit::Switch, .. })) => {
                facts.expected_downtime().map(|downtime| at.saturating_sub(now).saturating_add(downtime))
            }
            Some(_) | None => None,
        };
        [converges, switches].into_iter().flatten().min()
    }
}
