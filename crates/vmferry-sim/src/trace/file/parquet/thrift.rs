//! Thrift's compact protocol, the part that Parquet's metadata uses, over bytes in memory.

use super::{Fault, Result, damaged};

/// How deep structures may be nested; Parquet's own go five deep.
pub(super) const MAX_DEPTH: u32 = 16;

/// The type of a field or list element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    True,
    False,
    Byte,
    Int,
    Double,
    Binary,
    List,
    Map,
    Struct,
    Uuid,
}

impl Kind {
    fn new(nibble: u8) -> Result<Self> {
        Ok(match nibble {
            1 => Self::True,
            2 => Self::False,
            3 => Self::Byte,
            // 16, 32 and 64 bits are encoded alike.
            4..=6 => Self::Int,
            7 => Self::Double,
            8 => Self::Binary,
            // A set is encoded as a list.
            9 | 10 => Self::List,
            11 => Self::Map,
            12 => Self::Struct,
            13 => Self::Uuid,
            _ => return damaged("its metadata has a field of no known type"),
        })
    }
}

/// Reads values one after another; none is read past the end.
#[derive(Debug, Clone)]
pub(super) struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

const CUT: Fault = Fault::Damaged("its metadata ends early");

impl<'a> Compact<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes were read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn byte(&mut self) -> Result<u8> {
        let byte = *self.bytes.get(self.at).ok_or(CUT)?;
        self.at += 1;
        Ok(byte)
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        if count > self.left() as u64 {
            return Err(CUT);
        }
        let taken = &self.bytes[self.at..self.at + count as usize];
        self.at += count as usize;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        damaged("its metadata has a number of more than 64 bits")
    }

    /// Reads a structure: `visit` gets each field's id and type, and either reads the value and returns true, or leaves
    /// it alone and returns false.
    pub(super) fn structure(&mut self, mut visit: impl FnMut(&mut Self, i16, Kind) -> Result<bool>) -> Result<()> {
        let mut id = 0_i16;
        while let Some(kind) = self.field(&mut id)? {
            if !visit(self, id, kind)? {
                self.skip(kind, MAX_DEPTH)?;
            }
        }
        Ok(())
    }

    /// The header of the next field of a structure; `None` at its end. `id` is that of the field before.
    fn field(&mut self, id: &mut i16) -> Result<Option<Kind>> {
        let header = self.byte()?;
        if header & 0x0f == 0 {
            return Ok(None);
        }
        let new = match header >> 4 {
            0 => i16::try_from(zigzag(self.varint()?)).ok(),
            step => id.checked_add(i16::from(step)),
        };
        *id = new.ok_or(Fault::Damaged("its metadata has a field number out of range"))?;
        Kind::new(header & 0x0f).map(Some)
    }

    /// Reads a list: `element` reads one element of type `expected`.
    pub(super) fn list(
        &mut self,
        kind: Kind,
        expected: Kind,
        mut element: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        if kind != Kind::List {
            return damaged(WRONG_TYPE);
        }
        let (count, found) = self.list_header()?;
        if count > 0 && found != expected {
            return damaged(WRONG_TYPE);
        }
        for _ in 0..count {
            element(self)?;
        }
        Ok(())
    }

    /// A list's length and the type of its elements. Each takes a byte at least, so the length is bounded by the bytes
    /// that are left.
    fn list_header(&mut self) -> Result<(u64, Kind)> {
        let header = self.byte()?;
        let count = match header >> 4 {
            15 => self.varint()?,
            count => u64::from(count),
        };
        if count > self.left() as u64 {
            return Err(CUT);
        }
        Ok((count, Kind::new(header & 0x0f)?))
    }

    pub(super) fn integer(&mut self, kind: Kind) -> Result<i64> {
        match kind {
            Kind::Int => Ok(zigzag(self.varint()?)),
            Kind::Byte => Ok(i64::from(self.byte()? as i8)),
            Kind::True
            | Kind::False
            | Kind::Double
            | Kind::Binary
            | Kind::List
            | Kind::Map
            | Kind::Struct
            | Kind::Uuid => damaged(WRONG_TYPE),
        }
    }

    /// An integer that must not be negative.
    pub(super) fn count(&mut self, kind: Kind) -> Result<u64> {
        u64::try_from(self.integer(kind)?).or(damaged("its metadata has a negative size"))
    }

    /// A boolean field, whose value is in its type.
    pub(super) fn boolean(kind: Kind) -> Result<bool> {
        match kind {
            Kind::True => Ok(true),
            Kind::False => Ok(false),
            Kind::Byte
            | Kind::Int
            | Kind::Double
            | Kind::Binary
            | Kind::List
            | Kind::Map
            | Kind::Struct
            | Kind::Uuid => damaged(WRONG_TYPE),
        }
    }

    pub(super) fn text(&mut self, kind: Kind) -> Result<&'a str> {
        if kind != Kind::Binary {
            return damaged(WRONG_TYPE);
        }
        let length = self.varint()?;
        std::str::from_utf8(self.take(length)?).or(damaged("its metadata has text that is not UTF-8"))
    }

    /// Reads a structure in a field, as [`Self::structure`].
    pub(super) fn inner(&mut self, kind: Kind, visit: impl FnMut(&mut Self, i16, Kind) -> Result<bool>) -> Result<()> {
        if kind != Kind::Struct {
            return damaged(WRONG_TYPE);
        }
        self.structure(visit)
    }

    /// Skips the value of a field.
    fn skip(&mut self, kind: Kind, depth: u32) -> Result<()> {
        if depth == 0 {
            return damaged("its metadata is nested too deep");
        }
        match kind {
            Kind::True | Kind::False => {}
            Kind::Byte => drop(self.byte()?),
            Kind::Int => drop(self.varint()?),
            Kind::Double => drop(self.take(8)?),
            Kind::Uuid => drop(self.take(16)?),
            Kind::Binary => {
                let length = self.varint()?;
                self.take(length)?;
            }
            Kind::Struct => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.skip(kind, depth - 1)?;
                }
            }
            Kind::List => {
                let (count, kind) = self.list_header()?;
                for _ in 0..count {
                    self.skip_element(kind, depth - 1)?;
                }
            }
            Kind::Map => {
                let count = self.varint()?;
                if count > self.left() as u64 {
                    return Err(CUT);
                }
                if count > 0 {
                    let kinds = self.byte()?;
                    let (key, value) = (Kind::new(kinds >> 4)?, Kind::new(kinds & 0x0f)?);
                    for _ in 0..count {
                        self.skip_element(key, depth - 1)?;
                        self.skip_element(value, depth - 1)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Skips an element of a list or map. There a boolean is a byte of its own.
    fn skip_element(&mut self, kind: Kind, depth: u32) -> Result<()> {
        match kind {
            Kind::True | Kind::False => self.byte().map(drop),
            Kind::Byte
            | Kind::Int
            | Kind::Double
            | Kind::Binary
            | Kind::List
            | Kind::Map
            | Kind::Struct
            | Kind::Uuid => self.skip(kind, depth),
        }
    }
}

const WRONG_TYPE: &str = "its metadata has a field of an unexpected type";

/// Signed numbers: 0, -1, 1, -2 … are sent as 0, 1, 2, 3 …
pub(super) fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of a structure that are integers.
    fn integers(bytes: &[u8]) -> Result<Vec<(i16, i64)>> {
        let mut found = Vec::new();
        Compact::new(bytes).structure(|reader, id, kind| {
            if kind == Kind::Int {
                found.push((id, reader.integer(kind)?));
                return Ok(true);
            }
            Ok(false)
        })?;
        Ok(found)
    }

    #[test]
    fn fields_are_read_and_unknown_ones_skipped() {
        let bytes = [
            0x15, 0x02, // 1: i32 = 1
            0x11, // 2: true
            0x18, 0x03, b'a', b'b', b'c', // 3: text
            0x17, 0, 0, 0, 0, 0, 0, 0, 0, // 4: double
            0x19, 0x21, 0x01, 0x02, // 5: list of two booleans
            0x1b, 0x01, 0x83, 0x01, b'k', 0x07, // 6: map of one text to a byte
            0x1c, 0x15, 0x09, 0x00, // 7: structure
            0x06, 0xd0, 0x0f, 0x03, // 1000: i64 = -2
            0x00,
        ];
        assert_eq!(integers(&bytes), Ok(vec![(1, 1), (1000, -2)]));
        for cut in 0..bytes.len() {
            assert_eq!(integers(&bytes[..cut]), Err(CUT), "{cut}");
        }
    }

    #[test]
    fn depth_and_lengths_are_bounded() {
        // Structures in structures, as many as there are bytes.
        let deep = vec![0x1c; 1 << 16];
        assert_eq!(integers(&deep), damaged("its metadata is nested too deep"));
        // A list of 2^60 structures in no bytes.
        let mut long = vec![0x19, 0xfc];
        long.extend([0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10]);
        assert_eq!(integers(&long), Err(CUT));
        // Text of 2^63 bytes.
        let mut text = vec![0x18];
        text.extend([0xff; 9]);
        text.push(0x01);
        assert_eq!(integers(&text), Err(CUT));
        // Numbers without an end.
        assert_eq!(integers(&[0xff; 64]), damaged("its metadata has a field of no known type"));
        let mut endless = vec![0x15];
        endless.extend([0xff; 16]);
        assert_eq!(integers(&endless), damaged("its metadata has a number of more than 64 bits"));
    }
}
