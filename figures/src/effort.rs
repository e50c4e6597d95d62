//! How much is measured: enough for the figures, or just enough to see that everything runs.

use std::time::Duration;

/// Sizes and repetitions.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    pub(crate) response_keys: Vec<u64>,
    pub(crate) delay_keys: Vec<u64>,
    pub(crate) growth_keys: Vec<u64>,
    pub(crate) repetitions: u64,
    /// Accesses before a repetition's clock starts, to bring the subject back into the caches.
    pub(crate) lead_in_accesses: u64,
    /// Accesses while it runs.
    pub(crate) timed_accesses: u64,
    /// How long the threads of a repetition count when delays are measured.
    pub(crate) delay_window: Duration,
    /// Accesses between insertion and the first repetition, at least; see [`Effort::warm_up_accesses`].
    pub(crate) least_warm_up_accesses: u64,
}

impl Effort {
    pub(crate) fn full() -> Self {
        Self {
            response_keys: half_decades(100, 1_000_000),
            delay_keys: half_decades(100, 1_000_000),
            growth_keys: half_decades(1000, 10_000_000),
            repetitions: 9,
            lead_in_accesses: 32_768,
            timed_accesses: 131_072,
            delay_window: Duration::from_millis(20),
            least_warm_up_accesses: 524_288,
        }
    }

    pub(crate) fn quick() -> Self {
        Self {
            response_keys: half_decades(100, 10_000),
            delay_keys: half_decades(100, 10_000),
            growth_keys: half_decades(1000, 100_000),
            repetitions: 3,
            lead_in_accesses: 8192,
            timed_accesses: 32_768,
            delay_window: Duration::from_millis(10),
            least_warm_up_accesses: 65_536,
        }
    }

    /// Twice as many as there are keys, so that their counts are more than the one of the insertion.
    pub(crate) fn warm_up_accesses(&self, keys: u64) -> u64 {
        self.least_warm_up_accesses.max(2 * keys)
    }
}

/// Two sizes a decade, evenly spaced on a logarithmic axis, both ends included.
fn half_decades(first: u64, last: u64) -> Vec<u64> {
    let mut sizes = Vec::new();
    let mut decade = first;
    while decade < last {
        sizes.extend([decade, (decade as f64 * 10_f64.sqrt()).round() as u64]);
        decade *= 10;
    }
    sizes.push(last);
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_include_both_ends() {
        assert_eq!(half_decades(100, 10_000), [100, 316, 1000, 3162, 10_000]);
    }

    #[test]
    fn a_repetition_gives_each_hot_set_its_turn() {
        let full = Effort::full();
        assert_eq!(full.timed_accesses, crate::workload::HOT_SETS * crate::workload::TURN_ACCESSES);
        assert_eq!(full.lead_in_accesses % crate::workload::TURN_ACCESSES, 0);
    }
}
