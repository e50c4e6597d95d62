//! vmferry's own policy: the predicted working set is held back, and everything else goes, coldest first.
//!
//! Nothing is done in rounds. After each scan the pages to send until the next one are chosen anew, so a page that cooled
//! is released and one that became hot is held. A *pass* is only a measure of work: as many pages sent as were pending
//! when it began.

use std::time::Duration;

use super::policy::{AtRead, Decision, Hold, Moment, Policy, PushRules, SendOrder};
use super::progress::Progress;
use super::{Facts, PageClass, Patience};

/// How much of the downtime budget the held pages may take. The rest is for pages written after the last scan.
const HELD_SHARE_MAX: f64 = 0.85;
/// The held pages get at least this share of that, however fast other pages become dirty.
const HELD_SHARE_MIN: f64 = 0.3;
/// What is left of the held pages' share after each pass without progress. Holding back is a bet on pages being written
/// again; where it does not bring the pause nearer, as with a sweep, it ends up as plain pre-copy.
const HELD_SHARE_DECAY: f64 = 0.5;
/// The most passes made only to shorten a pause that fits already: the expectation behind them can be wrong.
const EXTRA_PASSES_MAX: u32 = 4;
/// A pass more is worth its time if it is expected to leave at most this share of what remains now.
const GAIN_FACTOR: f64 = 0.7;
/// And the pause becomes shorter by at least this share of the pass's time.
const GAIN_TIME_SHARE: f64 = 0.1;
/// And what is written during it and has to be sent again takes at most this share of the time spent so far. All else has to be
/// sent anyway, whether the guest runs or not.
const EXTRA_TIME_SHARE: f64 = 0.2;
/// All that was held back is sent before the pause as well if that makes it shorter by so much,
const SHRINK_MIN: Duration = Duration::from_millis(5);
/// by at least this share of what the copying takes,
const SHRINK_SHARE: f64 = 0.15;
/// and what has to be sent once more for that takes, all times together, at most this share of the push. All else has to be sent
/// anyway, whether the guest runs or not.
const SHRINK_EXTRA_SHARE: f64 = 0.05;
/// For so long the path is only being measured: a burst that a shaper lets through would make any rest fit.
const FIRST_LOOK: Duration = Duration::from_millis(200);
/// If the fixed part of a pause alone has been longer than the limit for so long, it is no passing delay of the host.
const FIXED_PATIENCE: Duration = Duration::from_secs(1);
/// No schedule could have met the limit at any moment of so long, times the patience: then it is not waited for longer.
const HOPELESS_FACTOR: f64 = 1.5;

/// Pages of this heat and more are not sent while no pause is near: most would have to be sent again.
const VAIN_HEAT: f64 = 0.2;
/// The most scans without sending them all the same.
const SCANS_UNTIL_TRY_MAX: u32 = 16;

/// Holds back what will be written again soon, as far as the downtime rule allows.
#[derive(Debug, Clone)]
pub struct Predictive {
    patience: Patience,
    held_share: f64,
    /// Pages that remain.
    progress: Progress,
    passes_since_best: u32,
    extra_passes: u32,
    /// How what was held back is sent, if it is.
    shrinking: Option<Shrinking>,
    hopeless_since: Option<Duration>,
    fixed_too_long_since: Option<Duration>,
    /// Scans since hot pages were sent although no pause was near, and after how many that is done again.
    scans_since_try: u32,
    scans_until_try: u32,
}

/// All that was held back is sent while the guest still runs, once or several times.
#[derive(Debug, Clone, Copy)]
struct Shrinking {
    /// When it began.
    since: Duration,
    /// What copying would have taken before the last time, in seconds.
    copying_s: f64,
    /// What was to be expected of sending pages once more, in seconds.
    extra_s: f64,
}

impl Predictive {
    /// Nothing seen yet.
    pub fn new(patience: Patience) -> Self {
        Self {
            patience,
            held_share: HELD_SHARE_MAX,
            progress: Progress::default(),
            passes_since_best: 0,
            extra_passes: 0,
            shrinking: None,
            hopeless_since: None,
            fixed_too_long_since: None,
            scans_since_try: 0,
            scans_until_try: 1,
        }
    }

    /// Whether one more pass would shorten the pause by more than its own worth: it adds little to the time spent so far, leaves
    /// markedly less, and that matters beside what it takes. What is under way arrives meanwhile, so that a pass of no page at all
    /// can pay, too.
    fn another_pass_pays(facts: &Facts) -> bool {
        let Some(bandwidth) = facts.bandwidth_bytes_per_s else { return false };
        if facts.unheld_pages == 0 && facts.in_flight_bytes == 0 {
            return false;
        }
        let page_bytes = facts.mean_pending_bytes() / facts.pending_pages.max(1) as f64;
        let pass_s = facts.unheld_pages as f64 * page_bytes / bandwidth + facts.epoch.as_secs_f64();
        let held = facts.pending_pages - facts.unheld_pages;
        let fresh = facts.fresh_pages_per_epoch as f64 * pass_s / facts.epoch.as_secs_f64();
        // In pages that are sent for the first time.
        let worth = |pages: f64, new: u64| new as f64 + (pages - new as f64) * facts.rewrite_share;
        let now = worth(facts.pending_pages as f64, facts.new_pages.min(facts.pending_pages));
        let then = Facts {
            pending_pages: held + fresh as u64,
            new_pages: facts.held_new_pages.min(held),
            // The pages of the pass fill the path as long as it sends them.
            in_flight_bytes: (facts.in_flight_bytes as f64 - bandwidth * facts.epoch.as_secs_f64()).max(0.0) as u64,
            ..*facts
        };
        let under_way = |facts: &Facts| facts.in_flight_bytes as f64 / facts.sizes.mean_bytes(PageClass::New);
        let left = worth(held as f64 + fresh, then.new_pages) + under_way(&then);
        let again_s = fresh * facts.rewrite_share * page_bytes / bandwidth;
        let pause_s = |facts: &Facts| facts.expected_downtime().map_or(f64::MAX, |pause| pause.as_secs_f64());
        let gain_s = pause_s(facts) - pause_s(&then);
        left <= (now + under_way(facts)) * GAIN_FACTOR
            && gain_s >= pass_s * GAIN_TIME_SHARE
            && again_s <= facts.pushing_for.as_secs_f64() * EXTRA_TIME_SHARE
    }

    /// Whether to send what is held back while the guest still runs. Some of it is written again meanwhile; what is left takes less
    /// of a pause.
    fn shrinking_pays(&mut self, facts: &Facts) -> bool {
        let copying_s = |facts: &Facts| {
            let pause = facts.expected_downtime().unwrap_or(Duration::MAX);
            pause.saturating_sub(facts.fixed_downtime()).as_secs_f64()
        };
        let pass_s = copying_s(facts);
        let epochs = pass_s / facts.epoch.as_secs_f64();
        let held = facts.pending_pages - facts.unheld_pages;
        let heat = (facts.held_pages_per_epoch / held.max(1) as f64).min(1.0);
        let again = held as f64 * (1.0 - (1.0 - heat).powf(epochs)) + facts.fresh_pages_per_epoch as f64 * epochs;
        let then = Facts { pending_pages: again as u64, new_pages: 0, in_flight_bytes: 0, ..*facts };
        let gain_s = pass_s - copying_s(&then);
        let Shrinking { since, copying_s: before_s, extra_s } =
            self.shrinking.unwrap_or(Shrinking { since: facts.pushing_for, copying_s: f64::INFINITY, extra_s: 0.0 });
        let extra_s = extra_s + copying_s(&then);
        let spent_s = facts.pushing_for.saturating_sub(since).as_secs_f64();
        let pays = gain_s >= SHRINK_MIN.as_secs_f64().max(pass_s * SHRINK_SHARE)
            // What was expected of the time before has come true.
            && pass_s <= before_s * (1.0 - SHRINK_SHARE / 2.0)
            && extra_s <= since.as_secs_f64() * SHRINK_EXTRA_SHARE
            && spent_s + pass_s <= since.as_secs_f64() * EXTRA_TIME_SHARE;
        if pays {
            self.shrinking = Some(Shrinking { since, copying_s: pass_s, extra_s });
        }
        pays
    }

    /// Whether for a long time not even a schedule that knows the future could have paused within the limit.
    fn is_hopeless(&mut self, facts: &Facts) -> bool {
        let least = facts.least_stop_pages.unwrap_or(0);
        let is_open = facts.bandwidth_bytes_per_s.is_none() || (facts.is_learning && facts.passes == 0);
        if is_open || least <= facts.budget_pages() {
            self.hopeless_since = None;
            return false;
        }
        let since = *self.hopeless_since.get_or_insert(facts.pushing_for);
        facts.pushing_for.saturating_sub(since) >= self.patience.time.mul_f64(HOPELESS_FACTOR)
    }

    /// Whether for some time no pause at all would have been within the limit.
    fn is_fixed_too_long(&mut self, facts: &Facts) -> bool {
        if !facts.fixed_exceeds_limit() {
            self.fixed_too_long_since = None;
            return false;
        }
        let since = *self.fixed_too_long_since.get_or_insert(facts.pushing_for);
        facts.pushing_for.saturating_sub(since) >= FIXED_PATIENCE
    }

    /// Whether hot pages are sent at the next scan, whatever is to be expected of it: expectations can be wrong.
    fn is_trying(&self) -> bool {
        self.scans_since_try >= self.scans_until_try
    }

    /// Whether all might fit once everything is sent that is not held.
    fn is_pause_near(&self, facts: &Facts, held: usize, fresh_per_epoch: f64) -> bool {
        let Some(bandwidth) = facts.bandwidth_bytes_per_s else { return true };
        let unheld = facts.pending_pages.saturating_sub(held as u64) as f64;
        let epochs = unheld * facts.sizes.mean_bytes(PageClass::Written) / bandwidth / facts.epoch.as_secs_f64();
        held as f64 + fresh_per_epoch * epochs.min(1.0) <= facts.budget_pages() as f64
    }

    /// Notes what remains; returns whether that is progress, or the first look.
    fn progressed(&mut self, facts: &Facts) -> bool {
        let better = self.progress.note(facts.pushing_for, facts.pending_pages as f64);
        if better {
            self.passes_since_best = 0;
        }
        better
    }
}

impl Policy for Predictive {
    fn name(&self) -> &'static str {
        "vmferry"
    }

    fn rules(&self) -> PushRules {
        PushRules { order: SendOrder::ColdestFirst, at_read: AtRead::Rearm, scan_every_epoch: true, observe: true }
    }

    /// The held pages share the budget with the fresh ones: as many are held as leave room for one epoch of those.
    fn hold(&self, facts: &Facts, heats: &[f64], other_heat: f64) -> Hold {
        let budget_pages = facts.budget_pages() as f64;
        let most = (budget_pages * self.held_share) as usize;
        let least = (budget_pages * self.held_share * HELD_SHARE_MIN) as usize;
        let mut pages = 0;
        let mut fresh: f64 = other_heat + heats.iter().sum::<f64>();
        for &heat in heats.iter().take(most) {
            // Holding one page more takes a page of the budget and lessens the fresh ones by its heat, at most one:
            // once the room is used up, more holding never makes room.
            if pages >= least && pages as f64 + fresh > budget_pages * self.held_share + heat {
                break;
            }
            pages += 1;
            fresh -= heat;
        }
        // Pages of the last stretch before a pause would be sent in vain if it does not come.
        let send_below =
            if self.is_trying() || self.is_pause_near(facts, pages, fresh) { f64::INFINITY } else { VAIN_HEAT };
        Hold { pages, fresh_pages_per_epoch: fresh.max(0.0), send_below }
    }

    fn decide(&mut self, moment: Moment, facts: &Facts) -> Decision {
        let hopeless = self.is_hopeless(facts) | self.is_fixed_too_long(facts);
        if self.is_trying() {
            self.scans_since_try = 0;
            self.scans_until_try = (self.scans_until_try * 2).min(SCANS_UNTIL_TRY_MAX);
        }
        self.scans_since_try += 1;
        let measured = facts.passes > 0 || facts.pushing_for >= FIRST_LOOK;
        if measured && facts.fits() {
            if self.extra_passes >= EXTRA_PASSES_MAX || !Self::another_pass_pays(facts) {
                return if self.shrinking_pays(facts) { Decision::SendAll } else { Decision::Pause };
            }
            self.extra_passes += u32::from(moment == Moment::PassEnd);
            return Decision::Push;
        }
        if hopeless {
            return Decision::GiveUp;
        }
        if facts.passes == 0 || self.progressed(facts) {
            return Decision::Push;
        }
        if moment == Moment::PassEnd {
            self.passes_since_best += 1;
            self.held_share *= HELD_SHARE_DECAY;
        }
        let since = self.progress.stands_for(facts.pushing_for);
        if self.passes_since_best >= self.patience.passes && since >= self.patience.time {
            return Decision::GiveUp;
        }
        Decision::Push
    }

    fn restart(&mut self) {
        self.progress = Progress::default();
        self.passes_since_best = 0;
        self.hopeless_since = None;
        self.held_share = HELD_SHARE_MAX;
        self.shrinking = None;
        (self.scans_since_try, self.scans_until_try) = (0, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    fn patience() -> Patience {
        Patience { passes: 3, time: Duration::from_secs(1) }
    }

    fn policy() -> Predictive {
        Predictive::new(patience())
    }

    #[test]
    fn held_pages_leave_room_for_fresh_ones() {
        let held = |heats: &[f64], other: f64| {
            let hold = policy().hold(&facts(), heats, other);
            (hold.pages, hold.fresh_pages_per_epoch)
        };
        let budget = facts().budget_pages() as usize;
        let most = (budget as f64 * HELD_SHARE_MAX) as usize;
        assert_eq!(held(&vec![1.0; most], 0.0), (most, 0.0), "all of a hot set that fits");
        assert_eq!(held(&vec![0.001; 100], 0.0).0, 100, "and of a cooler one");
        let (pages, fresh) = held(&vec![0.5; most], 400.0);
        assert!(pages < most && fresh > 400.0, "{pages} held, {fresh} fresh");
        let (pages, _) = held(&vec![1.0; 100 * budget], 0.0);
        assert_eq!(pages, (budget as f64 * HELD_SHARE_MAX * HELD_SHARE_MIN) as usize, "a storm leaves the least share");
        assert_eq!(held(&[], 3.0), (0, 3.0));
        let no_time = Facts { downtime_limit: Duration::from_millis(10), ..facts() };
        assert_eq!(policy().hold(&no_time, &[1.0], 0.0).pages, 0);
    }

    #[test]
    fn less_is_held_back_where_it_does_not_help() {
        let mut policy = policy();
        let stuck = Facts { pending_pages: 50_000, ..facts() };
        let mut held = Vec::new();
        for _ in 0..6 {
            policy.decide(Moment::PassEnd, &stuck);
            held.push(policy.hold(&stuck, &vec![0.2; 5000], 0.0).pages);
        }
        assert!(held[0] > 300 && held.is_sorted_by(|a, b| a >= b) && held[5] < held[0] / 8, "{held:?}");
    }

    #[test]
    fn without_a_measured_bandwidth_it_never_pauses() {
        let blind = Facts { bandwidth_bytes_per_s: None, pending_pages: 0, ..facts() };
        for moment in [Moment::Scan, Moment::PassEnd] {
            assert_eq!(policy().decide(moment, &blind), Decision::Push);
        }
    }

    #[test]
    fn it_gives_up_only_after_passes_and_time_without_progress() {
        let stuck =
            |pages, seconds| Facts { pending_pages: pages, pushing_for: Duration::from_secs(seconds), ..facts() };
        let mut patient = policy();
        for second in 1..4 {
            assert_eq!(patient.decide(Moment::PassEnd, &stuck(50_000, second)), Decision::Push);
        }
        assert_eq!(patient.decide(Moment::PassEnd, &stuck(40_000, 4)), Decision::Push, "progress");
        for second in 5..7 {
            assert_eq!(patient.decide(Moment::PassEnd, &stuck(50_000, second)), Decision::Push);
        }
        assert_eq!(patient.decide(Moment::PassEnd, &stuck(50_000, 7)), Decision::GiveUp);

        let mut hasty = policy();
        for _ in 0..20 {
            assert_eq!(hasty.decide(Moment::PassEnd, &stuck(50_000, 1)), Decision::Push, "no time went by");
        }
    }

    #[test]
    fn ups_and_downs_are_no_progress() {
        let mut policy = policy();
        let mut ended = None;
        for step in 0..200_u64 {
            let pending_pages = if step % 4 == 0 { 30_000 } else { 60_000 };
            let pushing_for = Duration::from_millis(step * 50);
            let facts = Facts { pending_pages, pushing_for, ..facts() };
            if policy.decide(Moment::PassEnd, &facts) == Decision::GiveUp {
                ended = Some(pushing_for);
                break;
            }
        }
        assert!(ended.is_some_and(|after| after < Duration::from_secs(3)), "{ended:?}");
    }

    #[test]
    fn what_no_schedule_could_meet_is_given_up_early() {
        let mut policy = policy();
        let facts = |ms, least| Facts {
            passes: 0,
            pending_pages: 1_000_000,
            pushing_for: Duration::from_millis(ms),
            least_stop_pages: Some(least),
            ..facts()
        };
        for ms in (0..1400).step_by(50) {
            assert_eq!(policy.decide(Moment::Scan, &facts(ms, 2000)), Decision::Push);
        }
        // A moment at which it would have been possible.
        assert_eq!(policy.decide(Moment::Scan, &facts(1400, 1000)), Decision::Push);
        for ms in (1450..2950).step_by(50) {
            assert_eq!(policy.decide(Moment::Scan, &facts(ms, 2000)), Decision::Push);
        }
        let learning = Facts { is_learning: true, ..facts(2950, 2000) };
        assert_eq!(policy.clone().decide(Moment::Scan, &learning), Decision::Push, "deltas may make it possible");
        assert_eq!(policy.decide(Moment::Scan, &facts(2950, 2000)), Decision::GiveUp);
    }

    #[test]
    fn a_pass_that_pays_is_made_before_pausing() {
        let mut policy = policy();
        let cold_rest = Facts { unheld_pages: 900, ..facts() };
        assert_eq!(policy.decide(Moment::PassEnd, &cold_rest), Decision::Push);
        assert_eq!(policy.decide(Moment::PassEnd, &facts()), Decision::Pause);
        let rewritten = Facts { unheld_pages: 900, fresh_pages_per_epoch: 1000, ..facts() };
        assert_eq!(policy.decide(Moment::PassEnd, &rewritten), Decision::Pause);
        assert_eq!(policy.decide(Moment::Scan, &facts()), Decision::Pause);
        // All are written again, but what was sent before goes as a small delta.
        let mut as_deltas = Facts { new_pages: 900, rewrite_share: 0.1, ..rewritten };
        as_deltas.sizes.sent(PageClass::Written, 10_000, 10_000 * 400);
        assert_eq!(policy.decide(Moment::PassEnd, &as_deltas), Decision::Push);
        // A tenth is left, but of next to nothing: the pass would take 50 ms for 4.
        let few = Facts { pending_pages: 100, unheld_pages: 90, ..facts() };
        assert_eq!(policy.decide(Moment::PassEnd, &few), Decision::Pause);
        let first_pass = |ms| Facts { passes: 0, pushing_for: Duration::from_millis(ms), ..facts() };
        assert_eq!(policy.decide(Moment::Scan, &first_pass(150)), Decision::Push, "the path is not known yet");
        assert_eq!(policy.decide(Moment::Scan, &first_pass(250)), Decision::Pause);
    }

    #[test]
    fn what_is_held_back_is_sent_where_that_shortens_the_pause() {
        // 41 ms of pages, of which a tenth is written in an epoch of 50 ms; or all.
        let held = |pages, held_pages_per_epoch, seconds| Facts {
            pending_pages: pages,
            held_pages_per_epoch,
            pushing_for: Duration::from_secs_f64(seconds),
            ..facts()
        };
        let mut seldom = policy();
        assert_eq!(seldom.decide(Moment::Scan, &held(1000, 100.0, 10.0)), Decision::SendAll);
        assert_eq!(seldom.clone().decide(Moment::PassEnd, &held(950, 95.0, 10.05)), Decision::Pause, "it did not help");
        assert_eq!(seldom.clone().decide(Moment::PassEnd, &held(600, 60.0, 10.05)), Decision::SendAll, "it helped");
        assert_eq!(seldom.clone().decide(Moment::PassEnd, &held(600, 60.0, 12.5)), Decision::Pause, "it took too long");
        assert_eq!(seldom.decide(Moment::PassEnd, &held(100, 10.0, 10.05)), Decision::Pause, "that is 4 ms");
        assert_eq!(policy().decide(Moment::Scan, &held(1000, 1000.0, 10.0)), Decision::Pause, "all is written again");
        // 84 of them take 3.5 ms.
        assert_eq!(policy().decide(Moment::Scan, &held(1000, 100.0, 0.25)), Decision::SendAll);
        let with_others = |seconds| Facts { fresh_pages_per_epoch: 400, ..held(1000, 100.0, seconds) };
        assert_eq!(policy().decide(Moment::Scan, &with_others(0.5)), Decision::SendAll, "17 ms");
        assert_eq!(policy().decide(Moment::Scan, &with_others(0.3)), Decision::Pause, "and that is more than 15");
        let beside = Facts { fresh_pages_per_epoch: 1000, ..held(1000, 100.0, 10.0) };
        assert_eq!(policy().decide(Moment::Scan, &beside), Decision::Pause, "others are written instead");
    }

    #[test]
    fn what_has_to_be_sent_anyway_is_sent_while_the_guest_runs() {
        let rest = |ms, fresh| Facts {
            pushing_for: Duration::from_millis(ms),
            unheld_pages: 1000,
            new_pages: 1000,
            fresh_pages_per_epoch: fresh,
            ..facts()
        };
        // 41 ms for the rest, and at most 50 for the scan: a third of the time so far, and nothing is sent twice.
        assert_eq!(policy().decide(Moment::Scan, &rest(250, 0)), Decision::Push);
        // Some 550 of the pages are written meanwhile, and take 23 ms: of a quarter of a second, and of 60 ms.
        assert_eq!(policy().decide(Moment::Scan, &rest(250, 300)), Decision::Push);
        assert_eq!(policy().decide(Moment::Scan, &rest(60, 300)), Decision::Pause);
    }

    #[test]
    fn what_is_under_way_is_waited_for_where_little_is_written_meanwhile() {
        let under_way = |in_flight_bytes, fresh_pages_per_epoch| Facts {
            pending_pages: 100,
            downtime_limit: Duration::from_millis(300),
            in_flight_bytes,
            fresh_pages_per_epoch,
            ..facts()
        };
        // 100 ms of the path, of which half arrives in an epoch.
        assert_eq!(policy().decide(Moment::Scan, &under_way(10_000_000, 10)), Decision::Push);
        assert_eq!(policy().decide(Moment::Scan, &under_way(10_000_000, 1000)), Decision::Pause, "as much is written");
        assert_eq!(policy().decide(Moment::Scan, &under_way(300_000, 0)), Decision::Pause, "it is 3 ms");
        let waits = |policy: &mut Predictive| policy.decide(Moment::PassEnd, &under_way(10_000_000, 10));
        let mut policy = policy();
        let times = (0..20).take_while(|_| waits(&mut policy) == Decision::Push).count();
        assert_eq!(times, EXTRA_PASSES_MAX as usize, "it is not waited for ever");
    }

    #[test]
    fn hot_pages_are_not_sent_while_no_pause_is_near_but_now_and_then() {
        let mut policy = policy();
        let budget = facts().budget_pages();
        // As many pages as fill twenty budgets, each written in every third epoch.
        let stuck = Facts { pending_pages: 20 * budget, ..facts() };
        let heats = vec![0.3; budget as usize];
        let others = 0.3 * 19.0 * budget as f64;
        assert_eq!(policy.hold(&stuck, &heats, others).send_below, VAIN_HEAT);
        let mut tries = Vec::new();
        for scan in 0..200 {
            policy.decide(Moment::Scan, &Facts { passes: 0, ..stuck });
            if policy.hold(&stuck, &heats, others).send_below == f64::INFINITY {
                tries.push(scan);
            }
        }
        assert_eq!(tries[..4], [0, 2, 6, 14], "{tries:?}");
        assert!(tries.windows(2).all(|pair| pair[1] - pair[0] <= 16) && tries.len() > 12, "{tries:?}");

        let near = Facts { pending_pages: budget / 2, ..facts() };
        assert_eq!(policy.hold(&near, &heats[..10], 0.0).send_below, f64::INFINITY);
    }

    #[test]
    fn a_limit_below_what_every_pause_takes_is_given_up_soon() {
        let facts = |limit_ms, ms| Facts {
            downtime_limit: Duration::from_millis(limit_ms),
            pushing_for: Duration::from_millis(ms),
            ..facts()
        };
        // A pause takes 20 ms, and 5 ms for the device state.
        let mut policy = policy();
        assert_eq!(policy.decide(Moment::Scan, &facts(20, 100)), Decision::Push);
        assert_eq!(policy.decide(Moment::Scan, &facts(20, 1000)), Decision::Push);
        let no_budget = Facts { pending_pages: 50_000, ..facts(27, 1100) };
        assert_eq!(policy.decide(Moment::Scan, &no_budget), Decision::Push, "the host was slow for a while");
        assert_eq!(policy.decide(Moment::Scan, &facts(20, 1200)), Decision::Push);
        assert_eq!(policy.decide(Moment::Scan, &facts(20, 2200)), Decision::GiveUp);
    }

    #[test]
    fn extra_passes_are_bounded() {
        let mut policy = policy();
        let cold_rest = Facts { unheld_pages: 900, ..facts() };
        let passes = (0..100).take_while(|_| policy.decide(Moment::PassEnd, &cold_rest) == Decision::Push).count();
        assert_eq!(passes, EXTRA_PASSES_MAX as usize);
    }
}
