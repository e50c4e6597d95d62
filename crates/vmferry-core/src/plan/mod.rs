//! Facts in, one decision out: how many pages to hold back, and when to pause.
//!
//! Nothing here sends, waits or logs. The one rule that everything obeys is that of the design:
//!
//! ```text
//! fixed downtime + wire bytes(held ∪ still dirty) / bandwidth  ≤  downtime limit
//! ```

mod pace;
mod policy;
mod precopy;
mod predictive;
mod progress;
mod rate;
mod stuck;
mod trend;
mod wire_size;
mod work;

use std::time::Duration;

pub use pace::Pacer;
pub use policy::{
    AtRead, Decision, Hold, Moment, Policy, PolicySpec, PushRules, SendOrder, Shadow, ShadowVerdict, UnknownPolicy,
};
pub use precopy::{QemuRule, StopAndCopy, XenRule};
pub use predictive::Predictive;
pub use rate::RateEstimate;
pub use stuck::{IfStuck, MIN_SHARE, Step, Stuck, fitting_share};
pub use trend::Trend;
pub use wire_size::{PageClass, WireSizes};
pub use work::PageWork;

use crate::pages::PAGE_BYTES;

/// Wire bytes that a page sent as it is costs at the most: its content and a whole frame's header and fields. Pages
/// sent in runs cost less; the downtime rule reckons with the worst.
pub const PAGE_WIRE_BYTES: u64 = PAGE_BYTES + 32;

/// The part of the user's limit that is planned with. The rest is for what a plan cannot know: a host that is busy just
/// then, a path that is slower than it was.
const PLANNED_SHARE: f64 = 0.9;

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
    /// Of the pending pages, those that go as whole pages: they were never sent, or so that they cannot go as deltas.
    pub new_pages: u64,
    /// Of these, those that are held back.
    pub held_new_pages: u64,
    /// What a page costs that was sent before, as a share of what it cost the first time; 1 where that is not known.
    pub rewrite_share: f64,
    /// What pages cost on the wire.
    pub sizes: WireSizes,
    /// What they take of the sender's time.
    pub work: PageWork,
    /// Pages expected to be written per epoch beside the held ones.
    pub fresh_pages_per_epoch: u64,
    /// Of the held pages, those expected to be written per epoch.
    pub held_pages_per_epoch: f64,
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
    /// The fewest pages that would remain now whatever had been sent, from the ages of the latest writes; `None` where
    /// those are not known. A lower bound.
    pub least_stop_pages: Option<u64>,
    /// What a page costs that was sent before may turn out to be much less than is planned with.
    pub is_learning: bool,
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

    /// How many pages that were written the budget is for.
    pub fn budget_pages(&self) -> u64 {
        let carried = self.budget_bytes() as f64 / self.sizes.planned_bytes(PageClass::Written);
        let copying = self.planned_downtime().saturating_sub(self.fixed.time).as_secs_f64();
        let handled = copying / self.work.seconds_per_page(PageClass::Written);
        carried.min(handled) as u64
    }

    /// How many pages that were written the path carries in an epoch; `None` before anything was measured.
    pub fn carried_pages_per_epoch(&self) -> Option<f64> {
        let page_bytes = self.sizes.planned_bytes(PageClass::Written);
        Some(self.bandwidth_bytes_per_s? * self.epoch.as_secs_f64() / page_bytes)
    }

    /// What all that remains is not expected to exceed on the wire.
    pub fn pending_bytes(&self) -> f64 {
        self.sum_pending(|class| self.sizes.planned_bytes(class))
    }

    /// What it will cost on average.
    pub fn mean_pending_bytes(&self) -> f64 {
        self.sum_pending(|class| self.sizes.mean_bytes(class))
    }

    /// What each pending page takes, added up.
    fn sum_pending(&self, per_page: impl Fn(PageClass) -> f64) -> f64 {
        let new = self.new_pages.min(self.pending_pages);
        new as f64 * per_page(PageClass::New) + (self.pending_pages - new) as f64 * per_page(PageClass::Written)
    }

    /// The pause to expect if the guest were stopped now.
    pub fn expected_downtime(&self) -> Option<Duration> {
        let bytes = self.pending_bytes() + (self.fixed.device_state_bytes + self.in_flight_bytes) as f64;
        let working = self.sum_pending(|class| self.work.seconds_per_page(class));
        let copying = (bytes / self.bandwidth_bytes_per_s?).max(working);
        Some(self.fixed.time + Duration::try_from_secs_f64(copying).unwrap_or(Duration::MAX))
    }

    /// The part of the pause that does not depend on the pages left; without the device state's way where nothing is known
    /// of the path.
    pub fn fixed_downtime(&self) -> Duration {
        let sending = self.bandwidth_bytes_per_s.map_or(0.0, |rate| self.fixed.device_state_bytes as f64 / rate);
        self.fixed.time + Duration::try_from_secs_f64(sending).unwrap_or(Duration::MAX)
    }

    /// Whether no pause at all would be within the limit.
    pub fn fixed_exceeds_limit(&self) -> bool {
        self.fixed_downtime() > self.downtime_limit
    }

    /// Whether everything that remains fits the downtime limit.
    pub fn fits(&self) -> bool {
        self.expected_downtime().is_some_and(|downtime| downtime <= self.planned_downtime())
    }
}

/// How long to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Passes in a row without progress after which the migration gives up.
    pub passes: u32,
    /// But not before this much time went by without progress.
    pub time: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn facts() -> Facts {
        Facts {
            pushing_for: Duration::from_secs(10),
            passes: 1,
            pending_pages: 1000,
            unheld_pages: 0,
            new_pages: 0,
            held_new_pages: 0,
            rewrite_share: 1.0,
            sizes: WireSizes::new(),
            work: PageWork::new(),
            fresh_pages_per_epoch: 0,
            held_pages_per_epoch: 1000.0,
            epoch: Duration::from_millis(50),
            in_flight_bytes: 0,
            bandwidth_bytes_per_s: Some(100e6),
            fixed: FixedCosts { time: Duration::from_millis(20), device_state_bytes: 500_000 },
            downtime_limit: Duration::from_millis(100),
            least_stop_pages: None,
            is_learning: false,
        }
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
        assert_eq!(hopeless.budget_bytes(), 0);
    }

    #[test]
    fn cheap_pages_make_room_for_more() {
        let mut facts = facts();
        let before = facts.budget_pages();
        facts.sizes.sent(PageClass::Written, 10_000, 10_000 * (PAGE_WIRE_BYTES / 4));
        assert_eq!(facts.budget_pages(), before * 4 + 2);
        let fits = |pending_pages, new_pages| Facts { pending_pages, new_pages, ..facts }.fits();
        assert!(fits(4 * before, 0) && !fits(4 * before, before), "new pages are as they are");
        assert!(fits(before, before));
    }

    #[test]
    fn a_sender_that_is_slower_than_the_path_makes_room_for_fewer() {
        let mut facts = facts();
        let before = facts.budget_pages();
        facts.work.worked(PageClass::Written, 100, Duration::from_millis(1));
        assert_eq!(facts.budget_pages(), before, "the path takes longer: 41 µs per page");
        facts.work = PageWork::new();
        facts.work.worked(PageClass::Written, 100, Duration::from_millis(10));
        // 70 ms, 100 µs each.
        assert_eq!(facts.budget_pages(), 700);
        let expected = Facts { pending_pages: 700, ..facts }.expected_downtime().unwrap();
        assert!(expected.abs_diff(Duration::from_millis(90)) < Duration::from_micros(1), "{expected:?}");
    }
}
