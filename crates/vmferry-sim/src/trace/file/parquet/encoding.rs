//! The encodings of values and levels, over bytes in memory.

use super::thrift::zigzag;
use super::{Fault, Result, damaged};

/// The most values of a block of delta encoding; writers use 128 or 256.
const MAX_BLOCK_VALUES: u64 = 1 << 16;

const SHORT: Fault = Fault::Damaged("a page has fewer values than it says");

/// A varint at `at`, which moves behind it.
fn varint(bytes: &[u8], at: &mut usize) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at).ok_or(SHORT)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    damaged("a page has a number of more than 64 bits")
}

/// The `width` bits from bit number `bit` on, the lowest first.
///
/// `width` is at most 64.
fn bits(bytes: &[u8], bit: u64, width: u32) -> Result<u64> {
    if width == 0 {
        return Ok(0);
    }
    let end = bit.checked_add(u64::from(width)).ok_or(SHORT)?;
    if end.div_ceil(8) > bytes.len() as u64 {
        return Err(SHORT);
    }
    // 64 bits that do not begin at a byte reach into a ninth one.
    let first = (bit / 8) as usize;
    let mut word = [0; 16];
    let available = (bytes.len() - first).min(9);
    word[..available].copy_from_slice(&bytes[first..first + available]);
    let shifted = u128::from_le_bytes(word) >> (bit % 8);
    Ok(shifted as u64 & (u64::MAX >> (64 - width)))
}

/// A mix of repeated and bit-packed numbers: dictionary indices and levels.
#[derive(Debug, Clone)]
pub(super) struct Hybrid {
    width: u32,
    run: Run,
}

#[derive(Debug, Clone, Copy)]
enum Run {
    Repeated { value: u64, left: u64 },
    Packed { bit: u64, left: u64 },
}

impl Hybrid {
    /// Numbers of `width` bits, at most 32.
    pub(super) fn new(width: u8) -> Result<Self> {
        if width > 32 {
            return damaged("a page has numbers of more than 32 bits");
        }
        Ok(Self { width: u32::from(width), run: Run::Repeated { value: 0, left: 0 } })
    }

    /// Hands on `count` numbers, from `at` in `bytes` on.
    pub(super) fn read(
        &mut self,
        bytes: &[u8],
        at: &mut usize,
        mut count: u64,
        mut number: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        while count > 0 {
            match &mut self.run {
                Run::Repeated { left: 0, .. } | Run::Packed { left: 0, .. } => self.run = self.next_run(bytes, at)?,
                Run::Repeated { value, left } => {
                    let now = count.min(*left);
                    *left -= now;
                    count -= now;
                    for _ in 0..now {
                        number(*value)?;
                    }
                }
                Run::Packed { bit, left } => {
                    let now = count.min(*left);
                    *left -= now;
                    count -= now;
                    for _ in 0..now {
                        number(bits(bytes, *bit, self.width)?)?;
                        *bit += u64::from(self.width);
                    }
                }
            }
        }
        Ok(())
    }

    fn next_run(&self, bytes: &[u8], at: &mut usize) -> Result<Run> {
        let header = varint(bytes, at)?;
        let length = header >> 1;
        // Each run has a value at least, so that a loop over runs moves on.
        if length == 0 {
            return damaged("a page has a run of no values");
        }
        if header & 1 == 0 {
            let value_bytes = self.width.div_ceil(8) as usize;
            let value = bits(bytes.get(*at..).ok_or(SHORT)?, 0, self.width)?;
            *at += value_bytes;
            return Ok(Run::Repeated { value, left: length });
        }
        // Groups of eight, of `width` bytes each. The last one may be cut by the writer, whence no check here: each
        // value is checked where it is read.
        let bit = *at as u64 * 8;
        let size = length.saturating_mul(u64::from(self.width));
        *at = at.saturating_add(usize::try_from(size).unwrap_or(usize::MAX)).min(bytes.len());
        Ok(Run::Packed { bit, left: length.saturating_mul(8) })
    }
}

/// Integers by the difference to the one before, in blocks of a common minimum.
#[derive(Debug, Clone)]
pub(super) struct Delta {
    block_values: u64,
    mini_block_values: u64,
    /// Values that the page still has.
    left: u64,
    /// The value to hand out next, where it is known already: the first one.
    first: Option<i64>,
    last: i64,
    min_delta: i64,
    /// The bit widths of the block's parts, as a range of the page.
    widths: std::ops::Range<usize>,
    /// Values of the block that were read.
    read: u64,
    /// Where the part at hand begins.
    bit: u64,
}

impl Delta {
    pub(super) fn new(bytes: &[u8], at: &mut usize) -> Result<Self> {
        let block_values = varint(bytes, at)?;
        let mini_blocks = varint(bytes, at)?;
        let left = varint(bytes, at)?;
        let first = zigzag(varint(bytes, at)?);
        let sound = (1..=MAX_BLOCK_VALUES).contains(&block_values)
            && mini_blocks > 0
            && block_values.is_multiple_of(128)
            && block_values.is_multiple_of(mini_blocks)
            && (block_values / mini_blocks).is_multiple_of(32);
        if !sound {
            return damaged("a page has delta blocks of an impossible size");
        }
        Ok(Self {
            block_values,
            mini_block_values: block_values / mini_blocks,
            left,
            first: Some(first),
            last: first,
            min_delta: 0,
            widths: 0..0,
            read: block_values,
            bit: 0,
        })
    }

    /// The next value. Differences wrap around at 64 bits.
    pub(super) fn next(&mut self, bytes: &[u8], at: &mut usize) -> Result<i64> {
        self.left = self.left.checked_sub(1).ok_or(SHORT)?;
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        if self.read == self.block_values {
            self.next_block(bytes, at)?;
        }
        let part = (self.read / self.mini_block_values) as usize;
        let width = u32::from(bytes[self.widths.clone()][part]);
        if width > 64 {
            return damaged("a page has numbers of more than 64 bits");
        }
        let packed = bits(bytes, self.bit, width)?;
        self.bit += u64::from(width);
        self.read += 1;
        // The next block begins behind the last part that holds values; that part is there whole.
        *at = self.bit.div_ceil(8) as usize;
        self.last = self.last.wrapping_add(self.min_delta).wrapping_add(packed as i64);
        Ok(self.last)
    }

    fn next_block(&mut self, bytes: &[u8], at: &mut usize) -> Result<()> {
        self.min_delta = zigzag(varint(bytes, at)?);
        let mini_blocks = (self.block_values / self.mini_block_values) as usize;
        let end = at.checked_add(mini_blocks).filter(|&end| end <= bytes.len()).ok_or(SHORT)?;
        self.widths = *at..end;
        self.bit = end as u64 * 8;
        self.read = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hybrid(width: u8, bytes: &[u8], count: u64) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        Hybrid::new(width)?.read(bytes, &mut 0, count, |number| {
            numbers.push(number);
            Ok(())
        })?;
        Ok(numbers)
    }

    #[test]
    fn runs_are_repeated_or_packed() {
        // Three times 5, then the numbers 0 to 7 in three bits each (the example of the specification), then 2 twice.
        let bytes = [0x06, 0x05, 0x03, 0b1000_1000, 0b1100_0110, 0b1111_1010, 0x04, 0x02];
        assert_eq!(hybrid(3, &bytes, 13), Ok(vec![5, 5, 5, 0, 1, 2, 3, 4, 5, 6, 7, 2, 2]));
        assert_eq!(hybrid(3, &bytes, 14), Err(SHORT));
        assert_eq!(hybrid(3, &bytes[..5], 4), Ok(vec![5, 5, 5, 0]), "a group may be cut");
        assert_eq!(hybrid(3, &bytes[..5], 11), Err(SHORT));
        assert_eq!(hybrid(0, &[0x0a], 5), Ok(vec![0; 5]));
        assert_eq!(hybrid(3, &[0x00, 0x01], 1), damaged("a page has a run of no values"));
        assert_eq!(hybrid(33, &bytes, 1), damaged("a page has numbers of more than 32 bits"));
    }

    #[test]
    fn bits_may_begin_anywhere() {
        let bytes: Vec<u8> = (0..17).map(|byte| byte * 15).collect();
        let wide = u128::from_le_bytes(bytes[..16].try_into().unwrap());
        for bit in 0..64 {
            for width in 1..=64 {
                let expected = (wide >> bit) as u64 & (u64::MAX >> (64 - width));
                assert_eq!(bits(&bytes, bit, width), Ok(expected), "{width} bits at {bit}");
            }
        }
        assert_eq!(bits(&bytes, 17 * 8 - 1, 1), Ok(1));
        assert_eq!(bits(&bytes, 17 * 8 - 1, 2), Err(SHORT));
        assert_eq!(bits(&bytes, u64::MAX, 1), Err(SHORT));
    }

    #[test]
    fn impossible_delta_blocks_are_refused() {
        for (block, parts) in [(0, 1), (128, 0), (100, 1), (128, 3), (128, 8), (1 << 20, 4)] {
            let mut bytes = Vec::new();
            for mut number in [block, parts, 1, 0_u64] {
                while number >= 0x80 {
                    bytes.push(number as u8 | 0x80);
                    number >>= 7;
                }
                bytes.push(number as u8);
            }
            let error = Delta::new(&bytes, &mut 0).unwrap_err();
            assert_eq!(error, Fault::Damaged("a page has delta blocks of an impossible size"), "{block} {parts}");
        }
    }
}
