//! What is done where a migration does not converge, as the user chose.
//!
//! A policy decides when what remains fits; here it is decided what follows where it does not. As with a policy, facts
//! come in and one step comes out.
//!
//! **Throttling** begins before the policy gives up: a guest that is slowed a little early is slowed less in all. It begins
//! once the first pass has ended (before that nothing is gained, since the pages of the first pass have to be sent in any
//! case) and since then for a second either there was no progress, or no schedule could have met the limit. It goes on in
//! steps, each at the earliest a second after the one before, so that what a step brings can be seen. How far a step goes
//! is reckoned from what is needed, within bounds that make it smooth. Each step begins the policy's patience anew. If that
//! ends at the strongest throttle, the migration does.
//!
//! **Switching** waits for the policy to give up. Then the guest is paused at a minimum of what remains, whatever the limit
//! says.

use std::collections::VecDeque;
use std::time::Duration;

use super::progress::Progress;
use super::{Decision, Facts, Moment};

/// The least share of its processor time that a guest keeps. Below it, what a guest does in answer to interrupts alone
/// falls behind, and its own watchdogs may bark.
pub const MIN_SHARE: f64 = 0.05;

/// So long without progress, or without any schedule that could have met the limit, is the guest left as it is.
const STEP_INTERVAL: Duration = Duration::from_secs(1);
/// And for so many passes, if it is progress that is missing.
const FIRST_PASSES: u32 = 2;
/// The same after a step.
const NEXT_PASSES: u32 = 1;
/// A step takes at least this part of the share...
const STEP_LEAST: f64 = 0.8;
/// ...and leaves at least this part.
const STEP_MOST: f64 = 0.5;
/// What is needed is aimed at with this to spare: it is what a schedule that knows the future would need.
const SHARE_MARGIN: f64 = 0.8;
/// Of what a path carries, so much may be taken by pages that are written again, where nothing better is known.
const REWRITTEN_SHARE: f64 = 0.5;
/// How often the share that fits is narrowed down: to a hundredth of it.
const SHARE_STEPS: u32 = 8;
/// A switch waits for so long without progress, then for a moment no worse than those of the last stretch of this length,
/// and for that no longer than this.
const SWITCH_WINDOW: Duration = Duration::from_secs(1);
/// The most moments that are remembered for that.
const SWITCH_MOMENTS: usize = 1024;

/// What to do where the policy gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IfStuck {
    /// End the migration; the guest stays where it is, undisturbed.
    #[default]
    Abort,
    /// Pause the guest all the same, for longer than the limit.
    Switch,
    /// Take processor time from the guest until what remains fits; end the migration if even the strongest throttle is
    /// not enough.
    Throttle,
}

impl IfStuck {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Switch => "switch",
            Self::Throttle => "throttle",
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Go on pushing.
    Push,
    /// Send all that is pending, and look again at once.
    SendAll,
    /// Stop the guest and send what remains.
    Pause {
        /// It does not fit the limit, and the user wants it all the same.
        limit_waived: bool,
    },
    /// Go on pushing, and leave the guest this share of the processor time that it would have.
    Throttle {
        /// From [`MIN_SHARE`] to 1.
        share: f64,
    },
    /// End the migration, with the guest where it is.
    GiveUp,
}

/// Turns a policy's decisions into steps, by what the user wants where nothing converges.
#[derive(Debug, Clone)]
pub struct Stuck {
    answer: IfStuck,
    progress: Progress,
    passes_since_best: u32,
    hopeless_since: Option<Duration>,
    /// What the guest keeps.
    share: f64,
    stepped_at: Option<Duration>,
    /// Pauses that were to be expected lately, in seconds, and when.
    expected: VecDeque<(Duration, f64)>,
    /// Since when a moment to switch is looked for.
    switching_since: Option<Duration>,
}

impl Stuck {
    /// Nothing seen yet.
    pub fn new(answer: IfStuck) -> Self {
        Self {
            answer,
            progress: Progress::default(),
            passes_since_best: 0,
            hopeless_since: None,
            share: 1.0,
            stepped_at: None,
            expected: VecDeque::new(),
            switching_since: None,
        }
    }

    /// What is done where the policy gives up.
    pub fn answer(&self) -> IfStuck {
        self.answer
    }

    /// The step that follows from the policy's decision. `fitting_share` answers which part of its present speed would let
    /// the guest's writes fit; it is asked only where that is needed.
    pub fn step(
        &mut self,
        decision: Decision,
        moment: Moment,
        facts: &Facts,
        fitting_share: &dyn Fn() -> Option<f64>,
    ) -> Step {
        self.note(moment, facts);
        match (decision, self.answer) {
            (Decision::Pause, _) => Step::Pause { limit_waived: false },
            (Decision::SendAll, _) => Step::SendAll,
            (Decision::Push, IfStuck::Abort | IfStuck::Switch) => {
                self.switching_since = None;
                Step::Push
            }
            (Decision::Push, IfStuck::Throttle) if self.is_due(facts) => self.throttle(facts, fitting_share),
            (Decision::Push, IfStuck::Throttle) => Step::Push,
            (Decision::GiveUp, IfStuck::Abort) => Step::GiveUp,
            (Decision::GiveUp, IfStuck::Switch) => self.switch(facts),
            // A slower guest does not shorten what every pause takes.
            (Decision::GiveUp, IfStuck::Throttle) if self.share <= MIN_SHARE || facts.fixed_exceeds_limit() => {
                Step::GiveUp
            }
            (Decision::GiveUp, IfStuck::Throttle) if facts.passes == 0 => Step::Push,
            (Decision::GiveUp, IfStuck::Throttle) => self.throttle(facts, fitting_share),
        }
    }

    fn note(&mut self, moment: Moment, facts: &Facts) {
        let now = facts.pushing_for;
        if facts.passes > 0 {
            if self.progress.note(now, facts.pending_pages as f64) {
                self.passes_since_best = 0;
            } else {
                self.passes_since_best += u32::from(moment == Moment::PassEnd);
            }
            let hopeless = facts.least_stop_pages.is_some_and(|least| least > facts.budget_pages());
            self.hopeless_since = hopeless.then(|| self.hopeless_since.unwrap_or(now));
        }
        if let (IfStuck::Switch, Some(expected)) = (self.answer, facts.expected_downtime()) {
            let is_old = |&(at, _): &(Duration, f64)| now.saturating_sub(at) > SWITCH_WINDOW;
            while self.expected.front().is_some_and(is_old) || self.expected.len() >= SWITCH_MOMENTS {
                self.expected.pop_front();
            }
            self.expected.push_back((now, expected.as_secs_f64()));
        }
    }

    /// Whether the guest is to be slowed, or slowed more, before the policy gives up.
    fn is_due(&self, facts: &Facts) -> bool {
        let now = facts.pushing_for;
        let lasts = |since: Option<Duration>| since.is_some_and(|since| now.saturating_sub(since) >= STEP_INTERVAL);
        let passes = if self.stepped_at.is_some() { NEXT_PASSES } else { FIRST_PASSES };
        let stands = self.passes_since_best >= passes && self.progress.stands_for(now) >= STEP_INTERVAL;
        let rested = self.stepped_at.is_none() || lasts(self.stepped_at);
        facts.bandwidth_bytes_per_s.is_some()
            && self.share > MIN_SHARE
            && rested
            && !facts.fixed_exceeds_limit()
            && !facts.fits()
            && (stands || lasts(self.hopeless_since))
    }

    fn throttle(&mut self, facts: &Facts, fitting_share: &dyn Fn() -> Option<f64>) -> Step {
        let needed = fitting_share().unwrap_or(1.0) * SHARE_MARGIN;
        self.share = (self.share * needed.clamp(STEP_MOST, STEP_LEAST)).max(MIN_SHARE);
        self.stepped_at = Some(facts.pushing_for);
        self.progress = Progress::default();
        self.passes_since_best = 0;
        self.hopeless_since = None;
        Step::Throttle { share: self.share }
    }

    fn switch(&mut self, facts: &Facts) -> Step {
        let now = facts.pushing_for;
        // Before the first pass ends, and while progress is made, a later pause is a shorter one.
        if facts.passes == 0 || self.progress.stands_for(now) < SWITCH_WINDOW {
            return Step::Push;
        }
        let Some(&(_, expected)) = self.expected.back() else { return Step::Push };
        let since = *self.switching_since.get_or_insert(now);
        let least = self.expected.iter().map(|&(_, expected)| expected).fold(f64::INFINITY, f64::min);
        if expected <= least || now.saturating_sub(since) >= SWITCH_WINDOW {
            return Step::Pause { limit_waived: true };
        }
        Step::Push
    }
}

/// The part of its present speed at which a guest's writes fit a budget of so many pages, on a path that carries so many
/// in an epoch. `least_stop_pages` answers with how many pages at least would remain if the path carried so many; `None`
/// where that is not known, and then it is the rate at which pages are written, `written_per_epoch`, that has to fit.
///
/// Of a guest that is slowed to a part `s` every write is `1/s` times as old. Per write the path then carries `1/s` times
/// as much, so the least for the slowed guest on this path is that of the guest as it is on a path `1/s` times as fast. What
/// was written within the last epoch has no age, and becomes less in proportion.
pub fn fitting_share(
    budget_pages: u64,
    carried_per_epoch: f64,
    written_per_epoch: f64,
    least_stop_pages: &dyn Fn(f64) -> Option<u64>,
) -> f64 {
    /// A path so fast that only what has no age remains.
    const ENDLESS: f64 = 1e15;
    let Some(youngest) = least_stop_pages(ENDLESS) else {
        return (REWRITTEN_SHARE * carried_per_epoch / written_per_epoch.max(1.0)).min(1.0);
    };
    let budget = budget_pages.max(1);
    let mut fits_not = (budget as f64 / youngest.max(1) as f64).min(1.0);
    let fits = |share: f64| {
        let least = least_stop_pages(carried_per_epoch / share).unwrap_or(0);
        least <= budget.max(youngest)
    };
    if fits(fits_not) {
        return fits_not;
    }
    let mut fitting = MIN_SHARE * MIN_SHARE;
    for _ in 0..SHARE_STEPS {
        // Shares are narrowed down as ratios.
        let middle = (fitting * fits_not).sqrt();
        if fits(middle) { fitting = middle } else { fits_not = middle }
    }
    fitting
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    /// Scans every 50 ms, each of them a pass, from the end of the first one on.
    struct Clock(Duration);

    impl Clock {
        fn next(&mut self, pending_pages: u64, least: u64) -> Facts {
            self.0 += Duration::from_millis(50);
            let passes = 1 + self.0.as_millis() as u32 / 50;
            Facts { pushing_for: self.0, passes, pending_pages, least_stop_pages: Some(least), ..facts() }
        }
    }

    fn clock() -> Clock {
        Clock(Duration::from_secs(10))
    }

    /// The steps of so many scans of a guest that stands where it is, with the policy going on.
    fn steps(stuck: &mut Stuck, clock: &mut Clock, scans: usize, facts: (u64, u64), share: Option<f64>) -> Vec<Step> {
        let (pending, least) = facts;
        let one = |_| stuck.step(Decision::Push, Moment::PassEnd, &clock.next(pending, least), &|| share);
        (0..scans).map(one).collect()
    }

    fn shares(steps: &[Step]) -> Vec<f64> {
        let share = |step: &Step| match *step {
            Step::Throttle { share } => Some(share),
            Step::Push | Step::SendAll | Step::Pause { .. } | Step::GiveUp => None,
        };
        steps.iter().filter_map(share).collect()
    }

    #[test]
    fn what_a_policy_decides_is_done_where_the_user_wants_nothing_else() {
        let mut stuck = Stuck::new(IfStuck::Abort);
        let mut clock = clock();
        let none = || None;
        for (decision, step) in [
            (Decision::Push, Step::Push),
            (Decision::SendAll, Step::SendAll),
            (Decision::Pause, Step::Pause { limit_waived: false }),
            (Decision::GiveUp, Step::GiveUp),
        ] {
            assert_eq!(stuck.step(decision, Moment::Scan, &clock.next(50_000, 9000), &none), step);
        }
        let steps = steps(&mut stuck, &mut clock, 400, (50_000, 9000), Some(0.1));
        assert!(steps.iter().all(|step| *step == Step::Push));
    }

    #[test]
    fn the_guest_is_slowed_in_steps_and_soon() {
        let mut stuck = Stuck::new(IfStuck::Throttle);
        let mut clock = clock();
        let (hopeless, first) = ((50_000, 9000), 20);
        let all = steps(&mut stuck, &mut clock, 400, hopeless, Some(0.01));
        let at: Vec<usize> = (0..all.len()).filter(|&scan| all[scan] != Step::Push).collect();
        assert_eq!(at[0], first, "after a second");
        assert!(at.windows(2).all(|pair| pair[1] - pair[0] > 20), "{at:?}");
        let shares = shares(&all);
        assert_eq!(shares, [0.5, 0.25, 0.125, 0.0625, MIN_SHARE], "halved at the most, down to the least");
    }

    #[test]
    fn no_more_is_taken_than_is_needed() {
        let mut stuck = Stuck::new(IfStuck::Throttle);
        let mut clock = clock();
        let found = shares(&steps(&mut stuck, &mut clock, 30, (50_000, 9000), Some(0.8)));
        assert_eq!(found, [0.8 * SHARE_MARGIN]);
        // A schedule could have met the limit; this one does not come nearer to it.
        let found = shares(&steps(&mut stuck, &mut clock, 30, (50_000, 100), Some(1.0)));
        assert_eq!(found, [0.8 * SHARE_MARGIN * STEP_LEAST]);
    }

    #[test]
    fn a_guest_that_comes_nearer_to_the_limit_is_left_as_it_is() {
        let mut stuck = Stuck::new(IfStuck::Throttle);
        let mut clock = clock();
        let mut pending = 1_000_000;
        for _ in 0..100 {
            pending -= pending / 50;
            let facts = clock.next(pending, 100);
            assert_eq!(stuck.step(Decision::Push, Moment::PassEnd, &facts, &|| Some(0.1)), Step::Push);
        }
        let fits = steps(&mut stuck, &mut clock, 100, (100, 100), Some(0.1));
        assert!(fits.iter().all(|step| *step == Step::Push), "what fits is the policy's to pause");
    }

    #[test]
    fn nothing_is_taken_before_the_first_pass_has_ended() {
        let mut stuck = Stuck::new(IfStuck::Throttle);
        let mut clock = clock();
        for decision in [Decision::Push, Decision::GiveUp] {
            for _ in 0..100 {
                let facts = Facts { passes: 0, ..clock.next(1_000_000, 9000) };
                assert_eq!(stuck.step(decision, Moment::Scan, &facts, &|| Some(0.1)), Step::Push);
            }
        }
        let facts = clock.next(50_000, 9000);
        let step = stuck.step(Decision::GiveUp, Moment::PassEnd, &facts, &|| Some(0.1));
        assert_eq!(step, Step::Throttle { share: 0.5 }, "the policy's patience is over already");
    }

    #[test]
    fn it_is_given_up_at_the_least_share_and_where_no_pause_is_short_enough() {
        let mut stuck = Stuck::new(IfStuck::Throttle);
        let mut clock = clock();
        let mut give_up = || stuck.step(Decision::GiveUp, Moment::PassEnd, &clock.next(50_000, 9000), &|| Some(0.01));
        let mut taken = Vec::new();
        while let Step::Throttle { share } = give_up() {
            taken.push(share);
        }
        assert_eq!((taken.len(), taken.last()), (5, Some(&MIN_SHARE)));
        assert_eq!(give_up(), Step::GiveUp);

        let mut stuck = Stuck::new(IfStuck::Throttle);
        let mut clock = self::clock();
        for decision in [Decision::Push; 100] {
            let facts = Facts { downtime_limit: Duration::from_millis(20), ..clock.next(50_000, 9000) };
            assert_eq!(stuck.step(decision, Moment::PassEnd, &facts, &|| Some(0.1)), Step::Push);
        }
        let facts = Facts { downtime_limit: Duration::from_millis(20), ..clock.next(50_000, 9000) };
        assert_eq!(stuck.step(Decision::GiveUp, Moment::PassEnd, &facts, &|| Some(0.1)), Step::GiveUp);
    }

    #[test]
    fn a_switch_waits_for_a_minimum_but_not_for_ever() {
        let none = || None;
        // Up and down, every 10 scans; the policy gave up at the top.
        let mut stuck = Stuck::new(IfStuck::Switch);
        let mut clock = clock();
        let pending = |scan: u64| 50_000 + 1000 * (scan % 10).abs_diff(5);
        let mut paused = None;
        for scan in 0..200 {
            let decision = if scan < 100 { Decision::Push } else { Decision::GiveUp };
            let step = stuck.step(decision, Moment::PassEnd, &clock.next(pending(scan), 9000), &none);
            if step != Step::Push {
                paused = Some((scan, step));
                break;
            }
        }
        assert_eq!(paused, Some((105, Step::Pause { limit_waived: true })), "at the bottom");

        // It only rises: no moment is as good as those before.
        let mut stuck = Stuck::new(IfStuck::Switch);
        let mut clock = self::clock();
        let mut rises = |scan: u64| clock.next(50_000 + 500 * scan, 9000);
        let give_up = |scan| stuck.step(Decision::GiveUp, Moment::PassEnd, &rises(scan), &none);
        let waited = (0..200).map(give_up).take_while(|step| *step == Step::Push).count();
        assert_eq!(waited, 40, "a second without progress, and a second for a minimum");

        // It falls: each later pause is a shorter one.
        let mut stuck = Stuck::new(IfStuck::Switch);
        let mut clock = self::clock();
        for scan in 0..100 {
            let facts = clock.next(500_000 - 4000 * scan, 9000);
            assert_eq!(stuck.step(Decision::GiveUp, Moment::PassEnd, &facts, &none), Step::Push);
        }
        for scan in 0..100 {
            let facts = Facts { passes: 0, ..clock.next(500_000 + scan, 9000) };
            assert_eq!(stuck.step(Decision::GiveUp, Moment::Scan, &facts, &none), Step::Push, "the first pass");
        }
    }

    #[test]
    fn the_share_that_fits_is_where_the_bound_meets_the_budget() {
        // A guest that writes 1000 other pages in each epoch, all of 20,000 in turn.
        let least = |carried: f64| {
            let ages = (0..20).map(|age| (f64::from(age + 1) * 1000.0, f64::from(age)));
            Some(ages.map(|(pages, age)| pages - carried * age).fold(0.0, f64::max) as u64)
        };
        // On a path of 100 pages an epoch it leaves 18,100 at least. At a twentieth it writes 50.
        let share = |budget, carried| fitting_share(budget, carried, 1000.0, &least);
        for (budget, carried) in [(18_000, 100.0), (5000, 100.0), (2000, 300.0), (1000, 900.0)] {
            let found = share(budget, carried);
            let slowed = least(carried / found).unwrap();
            assert!(slowed <= budget, "{slowed} pages at {found}, {budget} fit");
            let faster = least(carried / (found * 1.1)).unwrap();
            assert!(faster > budget, "{faster} pages at a tenth more than {found}, {budget} fit");
        }
        assert_eq!(share(1000, 1000.0), 1.0, "it fits as it is");
        let found = share(100, 1000.0);
        assert_eq!(found, 0.1, "what is written within an epoch, in proportion");
        assert!(share(0, 1.0) > 0.0);

        let unknown = |written| fitting_share(500, 100.0, written, &|_| None);
        assert_eq!((unknown(200.0), unknown(10.0), unknown(0.0)), (REWRITTEN_SHARE / 2.0, 1.0, 1.0));
    }
}
