//! The random numbers of the writers: small, fast, and the same for the same seed everywhere.

/// xoshiro256++ 1.0 (Blackman and Vigna, 2019), seeded by splitmix64 as its authors advise.
///
/// Not for secrets. The state is four words, so that a guest's writers can be saved and go on identically.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random {
    state: [u64; 4],
}

impl Random {
    /// A generator for a seed and one of several streams that share it.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut position = seed ^ mix(stream.wrapping_add(1));
        let state = std::array::from_fn(|_| {
            position = position.wrapping_add(GOLDEN);
            mix(position)
        });
        Self::from_state(state)
    }

    /// Goes on from a saved state. The state of all zeros, from which the generator would never leave, is replaced.
    pub fn from_state(state: [u64; 4]) -> Self {
        if state == [0; 4] { Self { state: [GOLDEN, 1, 2, 3] } } else { Self { state } }
    }

    /// The state to save.
    pub fn state(&self) -> [u64; 4] {
        self.state
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number below `bound`, by the high half of a product. Its bias is below `bound / 2^64`, which no test here can
    /// see, and unlike rejection it always takes one draw.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below 0");
        let product = u128::from(self.next_u64()) * u128::from(bound);
        (product >> 64) as u64
    }
}

/// 2^64 divided by the golden ratio, odd: the increment of splitmix64.
pub(crate) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The output function of splitmix64 (Steele, Lea and Flood, 2014): a bijection that spreads every bit.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_xoshiro256_plus_plus() {
        // The first outputs of the authors' reference code from the state 1, 2, 3, 4.
        let mut random = Random::from_state([1, 2, 3, 4]);
        let outputs: [u64; 4] = std::array::from_fn(|_| random.next_u64());
        assert_eq!(outputs, [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386]);
    }

    #[test]
    fn streams_of_one_seed_differ() {
        let mut one = Random::new(1, 0);
        let mut two = Random::new(1, 1);
        assert_ne!(one.next_u64(), two.next_u64());
    }

    #[test]
    fn bounded_numbers_cover_their_range_evenly() {
        let mut random = Random::new(7, 0);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[random.below(10) as usize] += 1;
        }
        // 10,000 expected, a standard deviation of 95: five of them either way.
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_state_of_zeros_is_replaced() {
        let mut random = Random::from_state([0; 4]);
        assert_ne!(random.next_u64(), random.next_u64());
    }
}
