//! Streams of accesses, the same on every machine for the same seed.
//!
//! A workload knows which keys are accessed how often; a stream draws from it. Keys are `0..keys`, as page numbers are.
//! Which of them are hot is drawn from the seed, so that hot keys are scattered over the key space and their order says
//! nothing about their heat.

/// The sets that take turns in [`Pattern::Shifting`].
pub(crate) const HOT_SETS: u64 = 4;

/// Each of these sets holds one key in so many, and at least one.
pub(crate) const KEYS_PER_HOT_KEY: u64 = 256;

/// Accesses of one set's turn.
pub(crate) const TURN_ACCESSES: u64 = 32_768;

/// Of ten accesses in a turn, so many go to the set whose turn it is, and the rest to any key.
const HOT_IN_TEN: u64 = 9;

/// Which keys are accessed how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Zipf's law with exponent 0.99: the key of rank `r` is accessed in proportion to `r^-0.99`.
    Zipf,
    /// All keys alike.
    Uniform,
    /// [`HOT_SETS`] small sets take turns at being accessed nine times out of ten.
    Shifting,
}

impl Pattern {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Zipf, Self::Uniform, Self::Shifting];

    /// The name in tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Zipf => "zipf 0.99",
            Self::Uniform => "uniform",
            Self::Shifting => "shifting hot sets",
        }
    }
}

/// A pattern over a number of keys.
#[derive(Debug)]
pub(crate) struct Workload {
    pattern: Pattern,
    /// The key at each rank of heat, the hottest first.
    key_at: Vec<u32>,
    /// The sums of the frequencies up to each rank; empty unless the pattern needs it.
    cumulative: Vec<f64>,
}

impl Workload {
    /// # Panics
    /// If there are no keys, or more than `u32::MAX`.
    pub(crate) fn new(pattern: Pattern, keys: u64, seed: u64) -> Self {
        assert!(keys > 0, "a workload needs keys");
        let cumulative = match pattern {
            Pattern::Zipf => {
                let frequency = |rank: u64| (rank as f64).powf(-0.99);
                let sum_up = |sum: &mut f64, rank| {
                    *sum += frequency(rank);
                    Some(*sum)
                };
                (1..=keys).scan(0.0, sum_up).collect()
            }
            Pattern::Uniform | Pattern::Shifting => Vec::new(),
        };
        Self { pattern, key_at: shuffled(keys, seed), cumulative }
    }

    /// Which keys are hot.
    pub(crate) const fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// The number of keys.
    pub(crate) fn keys(&self) -> u64 {
        self.key_at.len() as u64
    }

    /// Endless accesses. Streams of different seeds are independent of each other.
    pub(crate) fn stream(&self, seed: u64) -> Stream<'_> {
        Stream { workload: self, random: SplitMix(seed), position: 0 }
    }
}

/// Accesses drawn from a workload.
#[derive(Debug)]
pub(crate) struct Stream<'a> {
    workload: &'a Workload,
    random: SplitMix,
    position: u64,
}

impl Stream<'_> {
    /// The next `count` keys.
    pub(crate) fn take_keys(&mut self, count: u64) -> Vec<u64> {
        (0..count).map(|_| self.next_key()).collect()
    }

    fn next_key(&mut self) -> u64 {
        let Workload { pattern, key_at, cumulative } = self.workload;
        let keys = key_at.len() as u64;
        let rank = match pattern {
            Pattern::Zipf => {
                let target = self.random.unit() * cumulative[cumulative.len() - 1];
                (cumulative.partition_point(|&sum| sum <= target) as u64).min(keys - 1)
            }
            Pattern::Uniform => self.random.below(keys),
            Pattern::Shifting => {
                let size = (keys / KEYS_PER_HOT_KEY).max(1);
                let turn = self.position / TURN_ACCESSES % HOT_SETS;
                if self.random.below(10) < HOT_IN_TEN {
                    (turn * size + self.random.below(size)) % keys
                } else {
                    self.random.below(keys)
                }
            }
        };
        self.position += 1;
        u64::from(key_at[rank as usize])
    }
}

/// The keys `0..keys` in an order drawn from the seed (Fisher and Yates).
///
/// # Panics
/// If there are more than `u32::MAX` keys.
pub(crate) fn shuffled(keys: u64, seed: u64) -> Vec<u32> {
    let end = u32::try_from(keys).expect("so many keys are never measured");
    let mut order: Vec<u32> = (0..end).collect();
    let mut random = SplitMix(seed);
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

/// The generator of Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`. The bias is below `end / 2^64`.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// A number in `0.0..1.0`.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pattern: Pattern, keys: u64, accesses: u64) -> Vec<u64> {
        let workload = Workload::new(pattern, keys, 1);
        let mut counts = vec![0; keys as usize];
        for key in workload.stream(2).take_keys(accesses) {
            counts[key as usize] += 1;
        }
        counts
    }

    #[test]
    fn a_seed_fixes_the_stream() {
        for pattern in Pattern::ALL {
            let draw = |seed, stream_seed| Workload::new(pattern, 1000, seed).stream(stream_seed).take_keys(5000);
            assert_eq!(draw(1, 2), draw(1, 2), "{pattern:?}");
            assert_ne!(draw(1, 2), draw(1, 3), "{pattern:?}: the stream's seed");
            assert_ne!(draw(1, 2), draw(2, 2), "{pattern:?}: the workload's seed");
        }
    }

    #[test]
    fn a_stream_goes_on_where_it_stopped() {
        for pattern in Pattern::ALL {
            let workload = Workload::new(pattern, 1000, 1);
            let mut stream = workload.stream(2);
            let mut parts = stream.take_keys(TURN_ACCESSES - 5);
            parts.extend(stream.take_keys(50));
            assert_eq!(parts, workload.stream(2).take_keys(TURN_ACCESSES + 45), "{pattern:?}");
        }
    }

    #[test]
    fn shuffling_keeps_every_key() {
        let mut order = shuffled(10_000, 3);
        assert_ne!(order, (0..10_000).collect::<Vec<u32>>());
        order.sort_unstable();
        assert_eq!(order, (0..10_000).collect::<Vec<u32>>());
    }

    #[test]
    fn zipf_follows_its_law() {
        let (keys, accesses) = (1000, 1_000_000);
        let mut counts = counts(Pattern::Zipf, keys, accesses);
        counts.sort_unstable_by(|left, right| right.cmp(left));
        let normal: f64 = (1..=keys).map(|rank| (rank as f64).powf(-0.99)).sum();
        for rank in [1_usize, 2, 3, 10, 100] {
            let expected = accesses as f64 * (rank as f64).powf(-0.99) / normal;
            let found = counts[rank - 1] as f64;
            // Five standard deviations of a Poisson count, and what sorting by count moves between close ranks.
            let tolerance = 5.0 * expected.sqrt() + 0.02 * expected;
            assert!((found - expected).abs() < tolerance, "rank {rank}: {found} instead of {expected}");
        }
    }

    #[test]
    fn zipf_reaches_the_first_and_the_last_rank() {
        let workload = Workload::new(Pattern::Zipf, 2, 1);
        let keys = workload.stream(1).take_keys(100);
        assert!(keys.contains(&0) && keys.contains(&1));
        assert!(Workload::new(Pattern::Zipf, 1, 1).stream(1).take_keys(100).iter().all(|&key| key == 0));
    }

    #[test]
    fn hot_keys_are_scattered() {
        let counts = counts(Pattern::Zipf, 10_000, 100_000);
        let first_half: u64 = counts[..5000].iter().sum();
        assert!((20_000..80_000).contains(&first_half), "{first_half}");
    }

    #[test]
    fn uniform_is_uniform() {
        let counts = counts(Pattern::Uniform, 100, 1_000_000);
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }

    #[test]
    fn the_hot_sets_take_turns() {
        let workload = Workload::new(Pattern::Shifting, 10_240, 1);
        let mut stream = workload.stream(2);
        let hot_of_turn = |keys: &[u64]| {
            let mut counts = std::collections::HashMap::new();
            for &key in keys {
                *counts.entry(key).or_insert(0_u64) += 1;
            }
            let mut hot: Vec<u64> = counts.into_iter().filter(|&(_, count)| count > 100).map(|(key, _)| key).collect();
            hot.sort_unstable();
            hot
        };
        let turns: Vec<Vec<u64>> = (0..5).map(|_| hot_of_turn(&stream.take_keys(TURN_ACCESSES))).collect();
        for turn in &turns {
            assert_eq!(turn.len(), 40);
        }
        assert_eq!(turns[0], turns[4], "the fifth turn is the first set's again");
        for other in 1..4 {
            assert!(turns[0].iter().all(|key| !turns[other].contains(key)));
        }
    }
}
