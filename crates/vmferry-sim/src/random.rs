//! Random numbers that are the same on every machine.
//!
//! A trace, a sweep of a study and a failing test are all named by a seed. So nothing here may depend on the platform:
//! integers only, or the four basic operations on `f64`, which IEEE 754 rounds exactly. The logarithm and the power
//! function of the standard library are left out for this reason: their last bits differ between systems.
//!
//! Nothing here is fit for cryptography.

/// A stream of random numbers from a seed: SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
/// Generators, OOPSLA 2014).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitMix64 {
    state: u64,
}

/// The odd constant that a SplitMix64 stream steps by: 2^64 divided by the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl SplitMix64 {
    /// The stream of a seed. All seeds are equally good, also 0.
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 random bits.
    pub const fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN_GAMMA);
        mix(self.state)
    }

    /// A number from 0 to `bound - 1`, each equally likely.
    ///
    /// By the multiplication method (Lemire: Fast Random Integer Generation in an Interval, 2019).
    ///
    /// # Panics
    /// If `bound` is 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no number lies below 0");
        let mut product = self.next_u64() as u128 * bound as u128;
        if (product as u64) < bound {
            // Of the 2^64 values, as many are drawn again as do not share out evenly.
            let uneven = bound.wrapping_neg() % bound;
            while (product as u64) < uneven {
                product = self.next_u64() as u128 * bound as u128;
            }
        }
        (product >> 64) as u64
    }

    /// A number at least 0 and below 1, a multiple of 2^-53.
    pub const fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// True with this probability; never for 0 or less, always for 1 or more.
    pub const fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// A stream of its own, which does not depend on how many numbers are drawn from this one afterwards.
    pub const fn fork(&mut self) -> Self {
        // Mixed once more, so that the new stream is not this one a few steps later.
        Self { state: mix(self.next_u64() ^ GOLDEN_GAMMA.rotate_left(32)) }
    }
}

/// Spreads the bits of a number: a one-to-one map on 64 bits (variant 13 of Stafford's mixers, as in SplitMix64).
const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A random order of the numbers `0 .. len`, without a table.
///
/// A Feistel network over the next even power of two, walked until it is back below `len` (Black and Rogaway: Ciphers
/// with Arbitrary Finite Domains, 2002). A look-up walks fewer than four steps on average.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Permutation {
    /// Rounds of the network. Four make it hard to tell from a random order; the rest is for small domains.
    const ROUNDS: usize = 6;

    /// A random order of `0 .. len`, drawn from `random`. `len` may be 0; then there is nothing to look up.
    pub fn new(len: u64, random: &mut SplitMix64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, half_bits: bits.div_ceil(2), keys: std::array::from_fn(|_| random.next_u64()) }
    }

    /// The number at `position`.
    ///
    /// # Panics
    /// If `position` is not below `len`.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.len, "position {position} of a permutation of {}", self.len);
        let mut value = position;
        loop {
            value = self.encrypt(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// Draws ranks by Zipf's law: rank `r` of `0 .. len` with a probability proportional to `1 / (r + 1)^exponent`.
///
/// By rejection-inversion (Hörmann and Derflinger: Rejection-Inversion to Generate Variates from Monotone Discrete
/// Distributions, ACM TOMACS 6(3), 1996): constant memory and, on average, little more than one try.
#[derive(Debug, Clone, PartialEq)]
pub struct Zipf {
    len: u64,
    exponent: f64,
    /// The integral of the hat below rank 1, corrected so that rank 1 needs no rejection.
    area_first: f64,
    /// The integral of the hat up to half a rank past the last one.
    area_last: f64,
    /// A draw less than this below its rank is accepted without looking at the hat.
    shortcut: f64,
}

impl Zipf {
    /// Zipf's law over `len` ranks; exponent 0 makes all ranks equally likely.
    ///
    /// # Panics
    /// If `len` is 0 or above 2^52, or the exponent is negative or not finite.
    pub fn new(len: u64, exponent: f64) -> Self {
        assert!((1..=1 << 52).contains(&len), "Zipf's law over {len} ranks");
        assert!(exponent.is_finite() && exponent >= 0.0, "Zipf's law with exponent {exponent}");
        let mut zipf = Self { len, exponent, area_first: 0.0, area_last: 0.0, shortcut: 0.0 };
        zipf.area_first = zipf.area(1.5) - 1.0;
        zipf.area_last = zipf.area(len as f64 + 0.5);
        zipf.shortcut = 2.0 - zipf.area_inverse(zipf.area(2.5) - zipf.weight(2.0));
        zipf
    }

    /// A rank, from 0, the most likely one.
    pub fn sample(&self, random: &mut SplitMix64) -> u64 {
        loop {
            let area = self.area_last + random.unit() * (self.area_first - self.area_last);
            let point = self.area_inverse(area);
            let rank = ((point + 0.5) as u64).clamp(1, self.len);
            if rank as f64 - point <= self.shortcut || area >= self.area(rank as f64 + 0.5) - self.weight(rank as f64) {
                return rank - 1;
            }
        }
    }

    /// `x^-exponent`: the hat.
    fn weight(&self, x: f64) -> f64 {
        exp(-self.exponent * ln(x))
    }

    /// The integral of the hat from 1 to `x`.
    fn area(&self, x: f64) -> f64 {
        let ln_x = ln(x);
        expm1_over((1.0 - self.exponent) * ln_x) * ln_x
    }

    /// The inverse of [`Self::area`].
    fn area_inverse(&self, area: f64) -> f64 {
        // Rounding can push the argument past the pole of the logarithm.
        let t = (area * (1.0 - self.exponent)).max(-1.0 + f64::EPSILON);
        exp(ln1p_over(t) * area)
    }
}

/// ln 2, in two parts: the first has few enough bits that its product with an exponent is exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_588e-10;

/// The natural logarithm of a positive, normal number, to within a few units in the last place.
fn ln(x: f64) -> f64 {
    let (mantissa, exponent) = split(x);
    let (mantissa, exponent) =
        if mantissa > std::f64::consts::SQRT_2 { (mantissa / 2.0, exponent + 1) } else { (mantissa, exponent) };
    // ln m = 2 artanh((m-1)/(m+1)); the argument is below 0.172, so that 12 terms do.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut sum = 0.0;
    for term in (0..12).rev() {
        sum = sum * square + 1.0 / f64::from(2 * term + 1);
    }
    let exponent = f64::from(exponent);
    exponent * LN_2_HIGH + (2.0 * s * sum + exponent * LN_2_LOW)
}

/// e^x, to within a few units in the last place; 0 below the smallest normal number.
fn exp(x: f64) -> f64 {
    if x > 709.0 {
        return f64::INFINITY;
    }
    if x < -708.0 {
        return 0.0;
    }
    let power = (x / std::f64::consts::LN_2).round();
    let rest = (x - power * LN_2_HIGH) - power * LN_2_LOW;
    let mut sum = 1.0;
    for term in (1..=14).rev() {
        sum = 1.0 + sum * rest / f64::from(term);
    }
    // `power` lies between -1022 and 1023: the exponent field stays that of a normal number.
    let biased = (1023 + power as i64) as u64;
    sum * f64::from_bits(biased << 52)
}

/// `(e^x - 1) / x`, continued with 1 at 0.
fn expm1_over(x: f64) -> f64 {
    if x.abs() > 1e-4 { (exp(x) - 1.0) / x } else { 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0)) }
}

/// `ln(1 + x) / x`, continued with 1 at 0.
fn ln1p_over(x: f64) -> f64 {
    if x.abs() > 1e-4 { ln(1.0 + x) / x } else { 1.0 - x * (0.5 - x * (1.0 / 3.0 - x * 0.25)) }
}

/// A positive, normal number as mantissa in `1 .. 2` and exponent.
fn split(x: f64) -> (f64, i32) {
    debug_assert!(x.is_normal() && x > 0.0, "{x} is not positive and normal");
    let bits = x.to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    (f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52)), exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_that_of_splitmix64() {
        // The first numbers of seed 1234567, as published with the reference implementation.
        let mut random = SplitMix64::new(1_234_567);
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(expected.map(|_| random.next_u64()), expected);
    }

    #[test]
    fn numbers_below_a_bound_are_equally_likely() {
        let mut random = SplitMix64::new(7);
        let mut counts = [0_u32; 7];
        for _ in 0..70_000 {
            counts[random.below(7) as usize] += 1;
        }
        // 10,000 each, five standard deviations of about 93.
        assert!(counts.iter().all(|&count| (9_537..=10_463).contains(&count)), "{counts:?}");
        assert_eq!(random.below(1), 0);
        assert!(random.below(u64::MAX) < u64::MAX);
    }

    #[test]
    fn a_chance_is_never_at_zero_and_always_at_one() {
        let mut random = SplitMix64::new(3);
        assert!((0..1000).all(|_| !random.chance(0.0)));
        assert!((0..1000).all(|_| random.chance(1.0)));
        let hits = (0..10_000).filter(|_| random.chance(0.3)).count();
        assert!((2_771..=3_229).contains(&hits), "{hits}");
    }

    #[test]
    fn a_fork_is_another_stream() {
        let mut random = SplitMix64::new(9);
        let mut fork = random.fork();
        let own: Vec<u64> = (0..64).map(|_| random.next_u64()).collect();
        assert!((0..64).map(|_| fork.next_u64()).all(|number| !own.contains(&number)));
    }

    #[test]
    fn a_permutation_holds_each_number_once() {
        for len in [1, 2, 3, 5, 16, 17, 100, 1000, 4096, 4097] {
            let permutation = Permutation::new(len, &mut SplitMix64::new(len));
            let mut seen: Vec<u64> = (0..len).map(|position| permutation.at(position)).collect();
            let in_place = seen.iter().zip(0..).filter(|&(&number, position)| number == position).count();
            // A random order leaves one number in its place on average.
            assert!(len < 16 || in_place <= 6, "{in_place} of {len} in place");
            seen.sort_unstable();
            assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }
        let large = Permutation::new((1 << 34) - 5, &mut SplitMix64::new(1));
        assert!((0..1000).all(|position| large.at(position) < (1 << 34) - 5));
    }

    #[test]
    fn logarithm_and_power_agree_with_the_standard_library() {
        let mut random = SplitMix64::new(11);
        for _ in 0..10_000 {
            let x = 1e-9 + random.unit() * 1e9 * random.unit() * random.unit();
            assert!((ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "ln {x}");
            let y = (random.unit() - 0.5) * 200.0;
            assert!((exp(y) / y.exp() - 1.0).abs() <= 1e-13, "exp {y}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(ln(1.0), 0.0);
        assert_eq!(exp(1000.0), f64::INFINITY);
        assert_eq!(exp(-1000.0), 0.0);
    }

    #[test]
    fn ranks_follow_zipfs_law() {
        for exponent in [0.0, 0.5, 0.99, 1.0, 1.000_001, 1.3, 3.0] {
            let len = 50_u32;
            let weights: Vec<f64> = (1..=len).map(|rank| f64::from(rank).powf(-exponent)).collect();
            let total: f64 = weights.iter().sum();
            let zipf = Zipf::new(u64::from(len), exponent);
            let mut random = SplitMix64::new(5);
            let draws = 200_000;
            let mut counts = vec![0_u32; len as usize];
            for _ in 0..draws {
                counts[zipf.sample(&mut random) as usize] += 1;
            }
            let chi_square: f64 = weights
                .iter()
                .zip(&counts)
                .map(|(weight, &count)| {
                    let expected = weight / total * f64::from(draws);
                    (f64::from(count) - expected).powi(2) / expected
                })
                .sum();
            // 49 degrees of freedom: above 94 once in ten thousand seeds.
            assert!(chi_square < 94.0, "exponent {exponent}: {chi_square}");
        }
    }

    #[test]
    fn zipfs_law_over_one_rank_and_over_very_many() {
        let mut random = SplitMix64::new(2);
        assert!((0..100).all(|_| Zipf::new(1, 0.99).sample(&mut random) == 0));
        let wide = Zipf::new(1 << 34, 0.99);
        let ranks: Vec<u64> = (0..1000).map(|_| wide.sample(&mut random)).collect();
        assert!(ranks.iter().all(|&rank| rank < 1 << 34));
        assert!(ranks.iter().any(|&rank| rank > 1 << 20) && ranks.iter().any(|&rank| rank < 1000));
    }

    #[test]
    fn the_same_seed_gives_the_same_ranks_everywhere() {
        let zipf = Zipf::new(65_536, 0.99);
        let mut random = SplitMix64::new(42);
        let ranks: Vec<u64> = (0..8).map(|_| zipf.sample(&mut random)).collect();
        let permutation = Permutation::new(65_536, &mut random);
        let places: Vec<u64> = (0..4).map(|position| permutation.at(position)).collect();
        assert_eq!(ranks, [12, 11_058, 2_890, 1_366, 43_046, 2, 5_721, 5]);
        assert_eq!(places, [58_722, 38_145, 35_608, 48_128]);
    }
}
