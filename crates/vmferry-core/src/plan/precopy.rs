//! The rivals: pre-copy without prediction, by the rules of others; and none at all.

use std::time::Duration;

use super::policy::{AtRead, Decision, Moment, Policy, PushRules, SendOrder};
use super::{Facts, PAGE_WIRE_BYTES, Patience};

/// Pre-copy as QEMU does it (`migration/ram.c`, `migration_iteration_run`): address order, and written pages are looked for
/// only when what is left of those known would fit the limit. If it fits with what was found then, the guest is paused.
///
/// QEMU's limit is not lessened by anything fixed. It goes on for ever where nothing converges; here that ends as with
/// [`Predictive`](super::Predictive), so that a comparison ends.
#[derive(Debug)]
pub struct QemuRule {
    at_read: AtRead,
    patience: Patience,
    best: Option<(u64, Duration)>,
    passes_since_best: u32,
}

impl QemuRule {
    /// With this way to treat pages written just before they are read; QEMU ignores that.
    pub fn new(patience: Patience, at_read: AtRead) -> Self {
        Self { at_read, patience, best: None, passes_since_best: 0 }
    }

    fn fits(facts: &Facts) -> bool {
        let budget = facts.bandwidth_bytes_per_s.unwrap_or(0.0) * facts.downtime_limit.as_secs_f64();
        (facts.pending_pages * PAGE_WIRE_BYTES) as f64 <= budget
    }
}

impl Policy for QemuRule {
    fn name(&self) -> &'static str {
        match self.at_read {
            AtRead::Ignore | AtRead::Rearm => "qemu",
            AtRead::Skip => "skip-written",
        }
    }

    fn rules(&self) -> PushRules {
        PushRules { order: SendOrder::Address, at_read: self.at_read, scan_every_epoch: false, observe: false }
    }

    fn wants_scan(&self, facts: &Facts) -> bool {
        Self::fits(facts)
    }

    fn decide(&mut self, moment: Moment, facts: &Facts) -> Decision {
        if Self::fits(facts) {
            return Decision::Pause;
        }
        match self.best {
            Some((pages, _)) if facts.pending_pages >= pages => {
                self.passes_since_best += u32::from(moment == Moment::PassEnd);
            }
            Some(_) | None => {
                self.best = Some((facts.pending_pages, facts.pushing_for));
                self.passes_since_best = 0;
            }
        }
        let since = self.best.map_or(Duration::ZERO, |(_, at)| facts.pushing_for.saturating_sub(at));
        let patient = self.passes_since_best < self.patience.passes || since < self.patience.time;
        if patient { Decision::Push } else { Decision::GiveUp }
    }

    fn restart(&mut self) {
        self.best = None;
        self.passes_since_best = 0;
    }
}

/// Pre-copy with the rule of Xen's toolstack (`libxl`, `simple_precopy_policy`): the guest is paused after five passes, or
/// when a pass leaves fewer than 50 pages, whatever the limit says.
#[derive(Debug, Clone, Copy, Default)]
pub struct XenRule;

impl XenRule {
    const PASSES_MAX: u32 = 5;
    const PAGES_LEFT: u64 = 50;
}

impl Policy for XenRule {
    fn name(&self) -> &'static str {
        "xen"
    }

    fn rules(&self) -> PushRules {
        PushRules { order: SendOrder::Address, at_read: AtRead::Ignore, scan_every_epoch: false, observe: false }
    }

    fn decide(&mut self, moment: Moment, facts: &Facts) -> Decision {
        let enough = facts.passes >= Self::PASSES_MAX || facts.pending_pages < Self::PAGES_LEFT;
        if moment == Moment::PassEnd && enough { Decision::Pause } else { Decision::Push }
    }
}

/// No push: the guest is paused at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct StopAndCopy;

impl Policy for StopAndCopy {
    fn name(&self) -> &'static str {
        "stop-and-copy"
    }

    fn rules(&self) -> PushRules {
        PushRules { order: SendOrder::Address, at_read: AtRead::Ignore, scan_every_epoch: true, observe: false }
    }

    fn decide(&mut self, _moment: Moment, _facts: &Facts) -> Decision {
        Decision::Pause
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    fn patience() -> Patience {
        Patience { passes: 3, time: Duration::from_secs(1) }
    }

    #[test]
    fn qemu_pauses_when_the_rest_fits_the_whole_limit() {
        let mut rule = QemuRule::new(patience(), AtRead::Ignore);
        // 100 ms at 100 MB/s.
        let fits = Facts { pending_pages: 10_000_000 / PAGE_WIRE_BYTES, ..facts() };
        assert!(rule.wants_scan(&fits));
        assert_eq!(rule.decide(Moment::Scan, &fits), Decision::Pause);
        let too_many = Facts { pending_pages: fits.pending_pages + 1, ..fits };
        assert!(!rule.wants_scan(&too_many));
        assert_eq!(rule.decide(Moment::PassEnd, &too_many), Decision::Push);
        let blind = Facts { bandwidth_bytes_per_s: None, pending_pages: 1, ..facts() };
        assert_eq!(rule.decide(Moment::PassEnd, &blind), Decision::Push);
    }

    #[test]
    fn a_comparison_with_qemu_ends() {
        let mut rule = QemuRule::new(patience(), AtRead::Ignore);
        let stuck = |seconds| Facts { pending_pages: 50_000, pushing_for: Duration::from_secs(seconds), ..facts() };
        let decisions: Vec<Decision> = (1..6).map(|second| rule.decide(Moment::PassEnd, &stuck(second))).collect();
        assert_eq!(decisions[..3], [Decision::Push; 3]);
        assert_eq!(decisions[3..], [Decision::GiveUp; 2]);
    }

    #[test]
    fn xen_pauses_after_five_passes_or_with_few_pages_left() {
        let stuck = |passes| Facts { pending_pages: 50_000, passes, ..facts() };
        assert_eq!(XenRule.decide(Moment::PassEnd, &stuck(4)), Decision::Push);
        assert_eq!(XenRule.decide(Moment::PassEnd, &stuck(5)), Decision::Pause);
        assert_eq!(XenRule.decide(Moment::Scan, &stuck(5)), Decision::Push);
        let few = |pending_pages| Facts { pending_pages, passes: 1, ..facts() };
        assert_eq!(XenRule.decide(Moment::PassEnd, &few(50)), Decision::Push);
        assert_eq!(XenRule.decide(Moment::PassEnd, &few(49)), Decision::Pause);
    }
}
