//! Forward decay: old accesses count for less, and no old node is touched.
//!
//! Ageing by halving all counters would touch every node in every epoch, and halving rounded integers would break the
//! sums. Forward decay does the reverse: an access in epoch `t` adds `weight · scale(t)`, where the scale doubles every
//! half-life. Only ratios of weights decide about rotations and ranks, so shapes and orders are those of the aged
//! counters, and a weight in units of today is the stored one divided by today's scale.
//!
//! The scale is an integer: 2^(phase/half-life) rounded to [`FRACTION_BITS`] bits behind the point, shifted left once
//! for each whole half-life. It grows until either it has been doubled [`MAX_DOUBLINGS`] times or a sum would become
//! too large. Then the tree is renormalised: every own weight is shifted right by the number of doublings, and the sums
//! are computed anew, so they are exact again. All arithmetic is in integers and gives the same result on every machine.
//!
//! # Error
//!
//! Let *exact* be the real-valued aged weight of a key, in units of today. The rounded scale is off by a factor within
//! 1 ± 0.51 · 2^-16 at the access, and again at the reading. A renormalisation drops less than one stored unit of a key, which
//! is at most 2^-16 of today's unit and then ages like everything else; two of them are at least one half-life apart,
//! so all of them together have dropped less than 2^-15. In sum the reported weight is within
//! `exact · 2^-15 + 2^-15` of the exact one, as long as [`MAX_TOTAL_WEIGHT`](crate::MAX_TOTAL_WEIGHT) is not reached.

use core::num::NonZeroU32;

/// Bits behind the binary point of the scale of an aged tree.
pub const FRACTION_BITS: u32 = 16;

/// The most half-lives between two renormalisations.
pub const MAX_DOUBLINGS: u32 = 40;

const _: () = assert!(FRACTION_BITS + 1 + MAX_DOUBLINGS < 63);

#[derive(Clone, Debug)]
pub(crate) struct Decay {
    half_life_epochs: Option<NonZeroU32>,
    epoch: u64,
    /// Epochs since the last whole half-life.
    phase_epochs: u32,
    /// Whole half-lives since the last renormalisation.
    doublings: u32,
    scale: u64,
}

impl Decay {
    pub(crate) const fn new(half_life_epochs: Option<NonZeroU32>) -> Self {
        let scale = if half_life_epochs.is_some() { 1 << FRACTION_BITS } else { 1 };
        Self { half_life_epochs, epoch: 0, phase_epochs: 0, doublings: 0, scale }
    }

    pub(crate) const fn half_life_epochs(&self) -> Option<NonZeroU32> {
        self.half_life_epochs
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What an access of weight 1 adds now.
    pub(crate) const fn scale(&self) -> u64 {
        self.scale
    }

    /// Lets epochs pass. Returns the number of bits that all weights must be shifted right by, usually 0.
    pub(crate) fn advance(&mut self, epochs: u64) -> u32 {
        self.epoch = self.epoch.saturating_add(epochs);
        let Some(half_life) = self.half_life_epochs else { return 0 };
        let passed = u128::from(self.phase_epochs) + u128::from(epochs);
        let whole = passed / u128::from(half_life.get());
        self.phase_epochs = (passed % u128::from(half_life.get())) as u32;
        let doublings = u128::from(self.doublings) + whole;
        let base = power_of_two(self.phase_epochs, half_life);
        if doublings > u128::from(MAX_DOUBLINGS) {
            self.doublings = 0;
            self.scale = base;
            u32::try_from(doublings).unwrap_or(u32::MAX)
        } else {
            self.doublings = doublings as u32;
            self.scale = base << self.doublings;
            0
        }
    }

    /// Brings the scale back to its least value. Returns as [`Self::advance`].
    pub(crate) fn renormalise(&mut self) -> u32 {
        let bits = self.doublings;
        self.doublings = 0;
        self.scale >>= bits;
        bits
    }
}

/// `ROOTS[k]` is 2^(2^-(k+1)) with [`ROOT_BITS`] bits behind the point: each the square root of the one before.
const ROOTS: [u64; 32] = {
    let mut roots = [0; 32];
    let mut root = 2_u128 << ROOT_BITS;
    let mut index = 0;
    while index < roots.len() {
        root = (root << ROOT_BITS).isqrt();
        roots[index] = root as u64;
        index += 1;
    }
    roots
};

const ROOT_BITS: u32 = 62;

/// 2^(phase/half_life) with [`FRACTION_BITS`] bits behind the point, for a phase below the half-life. Off by less than
/// 0.51 of its last bit: the exponent is cut to 32 bits, and each of at most 32 factors to 62.
fn power_of_two(phase_epochs: u32, half_life_epochs: NonZeroU32) -> u64 {
    let exponent = ((u64::from(phase_epochs) << 32) / u64::from(half_life_epochs.get())) as u32;
    let mut power = 1_u64 << ROOT_BITS;
    for (index, &root) in (0..).zip(&ROOTS) {
        if exponent & (1 << (31 - index)) != 0 {
            power = ((u128::from(power) * u128::from(root)) >> ROOT_BITS) as u64;
        }
    }
    let dropped = ROOT_BITS - FRACTION_BITS;
    (power + (1 << (dropped - 1))) >> dropped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_follows_the_real_power_of_two() {
        for half_life in [1, 2, 3, 4, 5, 7, 8, 100, 365, 65_537, u32::MAX] {
            let half_life = NonZeroU32::new(half_life).expect("no half-life in the list is zero");
            for part in 0..=100_u64 {
                let phase = ((u64::from(half_life.get()) - 1) * part / 100) as u32;
                let exact = (f64::from(phase) / f64::from(half_life.get())).exp2() * f64::from(1 << FRACTION_BITS);
                let error = (power_of_two(phase, half_life) as f64 - exact).abs();
                assert!(error < 0.51, "2^({phase}/{half_life}) is off by {error}");
            }
        }
    }

    #[test]
    fn the_scale_doubles_each_half_life_and_falls_back_after_the_last_doubling() {
        let mut decay = Decay::new(NonZeroU32::new(3));
        for doublings in 0..=MAX_DOUBLINGS {
            assert_eq!(decay.scale(), 1 << (FRACTION_BITS + doublings));
            let first = decay.advance(1);
            let second = decay.advance(1);
            assert_eq!((first, second), (0, 0));
            let third = decay.advance(1);
            assert_eq!(third, if doublings == MAX_DOUBLINGS { MAX_DOUBLINGS + 1 } else { 0 });
        }
        assert_eq!(decay.scale(), 1 << FRACTION_BITS);
        assert_eq!(decay.epoch(), 3 * u64::from(MAX_DOUBLINGS + 1));
    }

    #[test]
    fn one_long_advance_equals_many_short_ones() {
        let (mut long, mut short) = (Decay::new(NonZeroU32::new(7)), Decay::new(NonZeroU32::new(7)));
        let mut bits = 0;
        for _ in 0..1000 {
            bits += short.advance(1);
        }
        bits += short.renormalise();
        let bits_at_once = long.advance(1000) + long.renormalise();
        assert_eq!(bits, bits_at_once);
        assert_eq!(long.scale(), short.scale());
    }

    #[test]
    fn no_half_life_means_no_ageing() {
        let mut decay = Decay::new(None);
        assert_eq!(decay.advance(u64::MAX), 0);
        assert_eq!(decay.advance(u64::MAX), 0);
        assert_eq!((decay.scale(), decay.epoch()), (1, u64::MAX));
    }

    #[test]
    fn the_longest_advance_is_no_overflow() {
        let mut decay = Decay::new(NonZeroU32::new(1));
        assert_eq!(decay.advance(u64::MAX), u32::MAX);
        assert_eq!(decay.scale(), 1 << FRACTION_BITS);
    }
}
