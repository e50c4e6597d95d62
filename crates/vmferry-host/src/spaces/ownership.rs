//! Address spaces for whoever goes on without them: bounded in time, and turned off by the first failure.

use std::time::{Duration, Instant};

use vmferry_core::engine::AddressSpacesReport;
use vmferry_core::pages::{Owners, PageRun, WholeGuest};

use super::{AddressSpaces, Cost, SpacesError};
use crate::memory::GuestMemory;
use crate::qmp::QmpClient;
use crate::vmm::describe;

/// The least that is worth beginning a refresh for: QEMU takes half a millisecond for its answer alone.
const LEAST_BUDGET: Duration = Duration::from_millis(2);
/// The first look, before anything is counted: a page whose owner is found out later begins anew in another tree.
const FIRST_BUDGET: Duration = Duration::from_millis(20);

/// Who owns the guest's pages, as far as that can be told.
#[derive(Debug)]
pub struct Ownership {
    spaces: Option<AddressSpaces>,
    failure: Option<String>,
    allowance: Allowance,
    total: Cost,
    refreshes: u64,
    longest: Duration,
}

impl Ownership {
    /// Begins to tell the guest's address spaces apart. Where that fails, the whole guest is one, and the report says why.
    pub fn attach(qmp: &mut QmpClient, memory: &GuestMemory) -> Self {
        let start = Instant::now();
        let spaces = AddressSpaces::attach(qmp, memory);
        let mut ownership = Self {
            spaces: None,
            failure: None,
            allowance: Allowance::default(),
            total: Cost { elapsed: start.elapsed(), ..Cost::default() },
            refreshes: 0,
            longest: Duration::ZERO,
        };
        match spaces {
            Ok(spaces) => ownership.spaces = Some(spaces),
            Err(error) => ownership.fail(&error),
        }
        ownership.refresh_for(qmp, memory, FIRST_BUDGET);
        ownership
    }

    /// Looks anew who owns which page. All calls together take about `allowance` each: what one takes beyond that, the next
    /// ones do without. Returns whether all mappings were walked anew, which began with an earlier call and ends with this
    /// one.
    pub fn refresh(&mut self, qmp: &mut QmpClient, memory: &GuestMemory, allowance: Duration) -> bool {
        let Some(budget) = self.allowance.grant(allowance) else { return false };
        let cost = self.refresh_for(qmp, memory, budget);
        self.allowance.spend(cost.elapsed);
        cost.rebuilds > 0
    }

    /// The pages that programs accessed, by the last walks; ascending.
    pub fn accessed(&self) -> Vec<PageRun> {
        self.spaces.as_ref().map_or_else(Vec::new, AddressSpaces::accessed)
    }

    /// Who owns which page, as it was found last; one owner after a failure.
    pub fn owners(&self) -> &dyn Owners {
        match &self.spaces {
            Some(spaces) => spaces,
            None => &WholeGuest,
        }
    }

    /// How it went so far, and what it cost.
    pub fn report(&self) -> AddressSpacesReport {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        AddressSpacesReport {
            processes: self.total.spaces,
            refreshes: self.refreshes,
            refresh_ms: ms(self.total.elapsed),
            refresh_max_ms: ms(self.longest),
            asking_ms: ms(self.total.sampling),
            failure: self.failure.clone(),
        }
    }

    /// Looks anew for about so long; what it cost.
    fn refresh_for(&mut self, qmp: &mut QmpClient, memory: &GuestMemory, budget: Duration) -> Cost {
        let Some(spaces) = &mut self.spaces else { return Cost::default() };
        match spaces.refresh(qmp, memory, budget) {
            Ok(cost) => {
                self.refreshes += 1;
                self.longest = self.longest.max(cost.elapsed);
                self.total += cost;
                cost
            }
            Err(error) => {
                self.fail(&error);
                Cost::default()
            }
        }
    }

    fn fail(&mut self, error: &SpacesError) {
        let reason = describe(error);
        tracing::warn!(reason, "the guest's address spaces are not told apart (any more)");
        self.failure = Some(reason);
        self.spaces = None;
    }
}

/// Time granted call by call, and what was taken beyond it.
#[derive(Debug, Default)]
struct Allowance {
    granted: Duration,
    debt: Duration,
}

impl Allowance {
    /// What may be spent now, if anything. What is not spent is not saved up.
    fn grant(&mut self, allowance: Duration) -> Option<Duration> {
        self.granted = allowance.saturating_sub(self.debt);
        self.debt = self.debt.saturating_sub(allowance);
        (!self.granted.is_zero()).then(|| self.granted.max(LEAST_BUDGET))
    }

    fn spend(&mut self, elapsed: Duration) {
        self.debt += elapsed.saturating_sub(self.granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_too_much_is_done_without() {
        let ms = Duration::from_millis;
        let mut allowance = Allowance::default();
        assert_eq!(allowance.grant(ms(5)), Some(ms(5)));
        allowance.spend(ms(1));
        assert_eq!(allowance.grant(ms(5)), Some(ms(5)), "nothing is saved up");
        allowance.spend(ms(17));
        assert_eq!([allowance.grant(ms(5)), allowance.grant(ms(5))], [None, None]);
        assert_eq!(allowance.grant(ms(5)), Some(ms(3)));
        allowance.spend(ms(3));
        assert_eq!(allowance.grant(ms(5)), Some(ms(5)));
    }

    #[test]
    fn however_little_is_allowed_it_is_paid_with_time() {
        let allowed = Duration::from_micros(100);
        let mut allowance = Allowance::default();
        let (mut spent, calls) = (Duration::ZERO, 1000);
        for _ in 0..calls {
            if let Some(budget) = allowance.grant(allowed) {
                allowance.spend(budget);
                spent += budget;
            }
        }
        assert!(spent > allowed * calls / 2 && spent <= allowed * calls + LEAST_BUDGET, "{spent:?}");
    }
}
