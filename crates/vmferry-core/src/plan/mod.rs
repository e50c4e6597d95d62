//! Facts in, one decision out: how many pages to hold back, and when to pause.
//!
//! Nothing here sends, waits or logs. The one rule that everything obeys is that of the design:
//!
//! ```text
//! fixed downtime + wire bytes(held ∪ still dirty) / bandwidth  ≤  downtime limit
//! ```

mod pace;
mod rate;

use std::time::Duration;

pub use pace::Pacer;
pub use rate::RateEstimate;

use crate::pages::PAGE_BYTES;

/// Wire bytes that a page sent as it is costs at the most: its content and a whole frame's header and fields. Pages
/// sent in runs cost less; the downtime rule reckons with the worst.
pub const PAGE_WIRE_BYTES: u64 = PAGE_BYTES + 32;

/// The part of the user's limit that is planned with. The rest is for what a plan cannot know: a host that is busy just
/// then, a path that is slower than it was.
const PLANNED_SHARE: f64 = 0.9;
/// How much of the downtime budget the held pages may take. The rest is for pages written after the last pass began.
const HELD_SHARE_MAX: f64 = 0.85;
/// The held pages get at least this share of that, however fast other pages become dirty.
const HELD_SHARE_MIN: f64 = 0.3;
/// What is left of the held pages' share after each pass without progress. Holding back is a bet on pages being written
/// again; where it does not bring the pause nearer, as with a sweep, it ends up as plain pre-copy.
const HELD_SHARE_DECAY: f64 = 0.5;
/// A pass counts as progress if what remains shrank below the best so far by this factor.
const PROGRESS_FACTOR: f64 = 0.95;
/// The most passes made only to shorten a pause that fits already: the expectation behind them can be wrong.
const EXTRA_PASSES_MAX: u32 = 4;
/// A pass more is worth its time if it is expected to leave at most this share of what remains now.
const GAIN_FACTOR: f64 = 0.7;

/// What the stop phase will cost besides copying pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedCosts {
    /// Pausing, last scan, loading and resuming; measured where it can be, else the VMM's usual figure.
    pub time: Duration,
    /// Bytes of device state, which cross the same link.
    pub device_state_bytes: u64,
}

/// What is known about the migration when a question is asked.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// Time since the push began.
    pub pushing_for: Duration,
    /// Passes completed so far; 0 during the first.
    pub passes: u32,
    /// Pages whose newest content the target does not have, held ones included.
    pub pending_pages: u64,
    /// Of these, pages that are not to be held back.
    pub unheld_pages: u64,
    /// Pages expected to be written per epoch beside the held ones.
    pub fresh_pages_per_epoch: u64,
    /// Length of an epoch.
    pub epoch: Duration,
    /// Bytes sent whose arrival is not confirmed.
    pub in_flight_bytes: u64,
    /// What the path carries, in bytes per second; `None` before anything was measured.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// The stop phase's fixed part.
    pub fixed: FixedCosts,
    /// The longest pause that the user allows.
    pub downtime_limit: Duration,
    /// The held pages' share of the downtime budget, see [`Convergence::held_share`].
    pub held_share: f64,
}

impl Facts {
    /// The pause that is planned with: a little shorter than the limit.
    fn planned_downtime(&self) -> Duration {
        self.downtime_limit.mul_f64(PLANNED_SHARE)
    }

    /// Bytes that can cross in a pause of the limit's length after everything fixed: 0 if not even that fits.
    pub fn budget_bytes(&self) -> u64 {
        let Some(bandwidth) = self.bandwidth_bytes_per_s else { return 0 };
        let copying = self.planned_downtime().saturating_sub(self.fixed.time).as_secs_f64();
        let bytes = copying * bandwidth - self.fixed.device_state_bytes as f64 - self.in_flight_bytes as f64;
        bytes.max(0.0) as u64
    }

    /// The pause to expect if the guest were stopped now.
    pub fn expected_downtime(&self) -> Option<Duration> {
        let bytes = self.pending_pages * PAGE_WIRE_BYTES + self.fixed.device_state_bytes + self.in_flight_bytes;
        let copying = bytes as f64 / self.bandwidth_bytes_per_s?;
        Some(self.fixed.time + Duration::try_from_secs_f64(copying).unwrap_or(Duration::MAX))
    }

    /// How many of the pending pages with these heats, hottest first, to hold back, and how many pages beside them are
    /// then expected to be written per epoch. `sent_heat` is the heat of all pages that are not pending.
    ///
    /// The held pages share the budget with the fresh ones: as many are held as leave room for one epoch of those.
    pub fn choose_held(&self, heats: &[f64], sent_heat: f64) -> (usize, f64) {
        let budget_pages = (self.budget_bytes() / PAGE_WIRE_BYTES) as f64;
        let most = (budget_pages * self.held_share) as usize;
        let least = (budget_pages * self.held_share * HELD_SHARE_MIN) as usize;
        let mut held = 0;
        let mut fresh: f64 = sent_heat + heats.iter().sum::<f64>();
        for &heat in heats.iter().take(most) {
            // Holding one page more takes a page of the budget and lessens the fresh ones by its heat, at most one:
            // once the room is used up, more holding never makes room.
            if held >= least && held as f64 + fresh > budget_pages * self.held_share + heat {
                break;
            }
            held += 1;
            fresh -= heat;
        }
        (held, fresh.max(0.0))
    }

    /// Whether everything that remains fits the downtime limit.
    fn fits(&self) -> bool {
        self.expected_downtime().is_some_and(|downtime| downtime <= self.planned_downtime())
    }

    /// Whether one more pass would shorten the pause by more than its own worth: it costs little of the time spent so
    /// far and leaves markedly less.
    fn another_pass_pays(&self) -> bool {
        let Some(bandwidth) = self.bandwidth_bytes_per_s else { return false };
        if self.unheld_pages == 0 {
            return false;
        }
        let pass_s = self.unheld_pages as f64 * PAGE_WIRE_BYTES as f64 / bandwidth + self.epoch.as_secs_f64();
        let held = self.pending_pages - self.unheld_pages;
        let fresh = self.fresh_pages_per_epoch as f64 * pass_s / self.epoch.as_secs_f64();
        let left = held as f64 + fresh.min(self.unheld_pages as f64);
        left <= self.pending_pages as f64 * GAIN_FACTOR && pass_s <= self.pushing_for.as_secs_f64() / 10.0
    }
}

/// What to do at the end of a pass, or at a scan during a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on pushing.
    Push,
    /// Stop the guest and send what remains.
    Pause,
    /// It will not fit: passes went by and what remains did not shrink.
    GiveUp,
}

/// How long to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Passes in a row without progress after which the migration gives up.
    pub passes: u32,
    /// But not before this much time went by without progress.
    pub time: Duration,
}

/// Decides when to pause, and notices when that will never be.
#[derive(Debug, Clone)]
pub struct Convergence {
    patience: Patience,
    best_pages: Option<u64>,
    best_at: Duration,
    passes_since_best: u32,
    extra_passes: u32,
    held_share: f64,
}

impl Convergence {
    /// Nothing seen yet.
    pub fn new(patience: Patience) -> Self {
        Self {
            patience,
            best_pages: None,
            best_at: Duration::ZERO,
            passes_since_best: 0,
            extra_passes: 0,
            held_share: HELD_SHARE_MAX,
        }
    }

    /// The share of the downtime budget that held pages may take: less after each pass without progress.
    pub fn held_share(&self) -> f64 {
        self.held_share
    }

    /// The decision when a pass has ended.
    pub fn at_pass_end(&mut self, facts: &Facts) -> Decision {
        if facts.fits() {
            if self.extra_passes >= EXTRA_PASSES_MAX || !facts.another_pass_pays() {
                return Decision::Pause;
            }
            self.extra_passes += 1;
            return Decision::Push;
        }
        let better = match self.best_pages {
            None => true,
            Some(best) => (facts.pending_pages as f64) < best as f64 * PROGRESS_FACTOR,
        };
        if better {
            self.best_pages = Some(facts.pending_pages);
            self.best_at = facts.pushing_for;
            self.passes_since_best = 0;
            return Decision::Push;
        }
        self.passes_since_best += 1;
        self.held_share *= HELD_SHARE_DECAY;
        let waited = facts.pushing_for.saturating_sub(self.best_at);
        if self.passes_since_best >= self.patience.passes && waited >= self.patience.time {
            return Decision::GiveUp;
        }
        Decision::Push
    }

    /// The decision at a scan in the middle of a pass: once the first pass is over, the first moment that fits is taken.
    pub fn at_scan(&self, facts: &Facts) -> Decision {
        if facts.passes > 0 && facts.fits() && !facts.another_pass_pays() { Decision::Pause } else { Decision::Push }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            pushing_for: Duration::from_secs(10),
            passes: 1,
            pending_pages: 1000,
            unheld_pages: 0,
            fresh_pages_per_epoch: 0,
            epoch: Duration::from_millis(50),
            in_flight_bytes: 0,
            bandwidth_bytes_per_s: Some(100e6),
            fixed: FixedCosts { time: Duration::from_millis(20), device_state_bytes: 500_000 },
            downtime_limit: Duration::from_millis(100),
            held_share: HELD_SHARE_MAX,
        }
    }

    fn patience() -> Patience {
        Patience { passes: 3, time: Duration::from_secs(1) }
    }

    #[test]
    fn the_budget_is_the_downtime_rule() {
        let facts = facts();
        // 70 ms at 100 MB/s is 7 MB, less 0.5 MB of device state; 10 ms are kept for surprises.
        assert_eq!(facts.budget_bytes(), 6_500_000);
        let at_limit = Facts { pending_pages: 6_500_000 / PAGE_WIRE_BYTES, ..facts };
        assert!(at_limit.fits());
        assert!(!Facts { pending_pages: at_limit.pending_pages + 1, ..facts }.fits());
        assert!(!Facts { in_flight_bytes: 10_000, ..at_limit }.fits());
        let hopeless = Facts { downtime_limit: Duration::from_millis(10), ..facts };
        assert_eq!((hopeless.budget_bytes(), hopeless.choose_held(&[1.0], 0.0).0), (0, 0));
    }

    #[test]
    fn held_pages_leave_room_for_fresh_ones() {
        let budget = (facts().budget_bytes() / PAGE_WIRE_BYTES) as usize;
        let most = (budget as f64 * HELD_SHARE_MAX) as usize;
        let (held, fresh) = facts().choose_held(&vec![1.0; most], 0.0);
        assert_eq!((held, fresh), (most, 0.0), "all of a hot set that fits");
        let (held, _) = facts().choose_held(&vec![0.001; 100], 0.0);
        assert_eq!(held, 100, "and of a cooler one");
        let (held, fresh) = facts().choose_held(&vec![0.5; most], 400.0);
        assert!(held < most && fresh > 400.0, "{held} held, {fresh} fresh");
        let (held, _) = facts().choose_held(&vec![1.0; 100 * budget], 0.0);
        assert_eq!(held, (budget as f64 * HELD_SHARE_MAX * HELD_SHARE_MIN) as usize, "a storm leaves the least share");
        assert_eq!(facts().choose_held(&[], 3.0), (0, 3.0));
    }

    #[test]
    fn less_is_held_back_where_it_does_not_help() {
        let mut convergence = Convergence::new(patience());
        let stuck = Facts { pending_pages: 50_000, ..facts() };
        let mut held = Vec::new();
        for _ in 0..6 {
            convergence.at_pass_end(&stuck);
            let facts = Facts { held_share: convergence.held_share(), ..stuck };
            held.push(facts.choose_held(&vec![0.2; 5000], 0.0).0);
        }
        assert!(held[0] > 300 && held.is_sorted_by(|a, b| a >= b) && held[5] < held[0] / 8, "{held:?}");
    }

    #[test]
    fn without_a_measured_bandwidth_it_never_pauses() {
        let blind = Facts { bandwidth_bytes_per_s: None, pending_pages: 0, ..facts() };
        assert_eq!(Convergence::new(patience()).at_pass_end(&blind), Decision::Push);
        assert_eq!(Convergence::new(patience()).at_scan(&blind), Decision::Push);
    }

    #[test]
    fn it_gives_up_only_after_passes_and_time_without_progress() {
        let mut convergence = Convergence::new(patience());
        let stuck = |seconds| Facts { pending_pages: 50_000, pushing_for: Duration::from_secs(seconds), ..facts() };
        assert_eq!(convergence.at_pass_end(&stuck(1)), Decision::Push);
        assert_eq!(convergence.at_pass_end(&stuck(2)), Decision::Push);
        assert_eq!(convergence.at_pass_end(&stuck(3)), Decision::Push);
        let better = Facts { pending_pages: 40_000, ..stuck(4) };
        assert_eq!(convergence.at_pass_end(&better), Decision::Push);
        for seconds in 5..7 {
            assert_eq!(convergence.at_pass_end(&stuck(seconds)), Decision::Push);
        }
        assert_eq!(convergence.at_pass_end(&stuck(7)), Decision::GiveUp);

        let mut hasty = Convergence::new(patience());
        for _ in 0..20 {
            assert_eq!(hasty.at_pass_end(&stuck(1)), Decision::Push, "no time went by");
        }
    }

    #[test]
    fn a_pass_that_pays_is_made_before_pausing() {
        let mut convergence = Convergence::new(patience());
        let cold_rest = Facts { unheld_pages: 900, ..facts() };
        assert_eq!(convergence.at_pass_end(&cold_rest), Decision::Push);
        assert_eq!(convergence.at_pass_end(&facts()), Decision::Pause);
        let rewritten = Facts { unheld_pages: 900, fresh_pages_per_epoch: 900, ..facts() };
        assert_eq!(convergence.at_pass_end(&rewritten), Decision::Pause);
        assert_eq!(convergence.at_scan(&Facts { passes: 0, ..facts() }), Decision::Push, "never in the first pass");
        assert_eq!(convergence.at_scan(&facts()), Decision::Pause);
    }

    #[test]
    fn extra_passes_are_bounded() {
        let mut convergence = Convergence::new(patience());
        let cold_rest = Facts { unheld_pages: 900, ..facts() };
        let passes = (0..100).take_while(|_| convergence.at_pass_end(&cold_rest) == Decision::Push).count();
        assert_eq!(passes, EXTRA_PASSES_MAX as usize);
    }
}
