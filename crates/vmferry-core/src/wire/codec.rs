//! Bounded reading and writing of little-endian fields.
//!
//! A [`Reader`] cannot pass the end of its payload, and whoever uses it must call [`Reader::finish`], which refuses
//! leftovers. A list's maximum stands where its length is read, and is checked before anything is allocated.

use super::WireError;

/// Reads fields from one payload.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(super) fn bytes(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.bytes.split_at_checked(count).ok_or(WireError::Truncated { field })?;
        self.bytes = tail;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let (head, tail) = self.bytes.split_first_chunk().ok_or(WireError::Truncated { field })?;
        self.bytes = tail;
        Ok(*head)
    }

    pub(super) fn id(&mut self, field: &'static str) -> Result<[u8; 16], WireError> {
        self.array(field)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A count that may not exceed `most`.
    pub(super) fn count(&mut self, most: u64, field: &'static str) -> Result<usize, WireError> {
        let value = u64::from(self.u32(field)?);
        if value > most {
            return Err(WireError::TooMany { field, value, most });
        }
        Ok(value as usize)
    }

    /// A UTF-8 text of at most `most` bytes behind its 16-bit length.
    pub(super) fn text(&mut self, most: usize, field: &'static str) -> Result<String, WireError> {
        let length = usize::from(self.u16(field)?);
        if length > most {
            return Err(WireError::TooMany { field, value: length as u64, most: most as u64 });
        }
        let bytes = self.bytes(length, field)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| WireError::BadText { field })
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// Ends the reading: leftover bytes are an error.
    pub(super) fn finish(self) -> Result<(), WireError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(WireError::Leftover { bytes: self.bytes.len() }) }
    }
}

/// Appends fields to a payload under construction.
pub(super) trait Put {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_text(&mut self, text: &str, most: usize);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    /// A longer text is cut at the last whole character that fits.
    fn put_text(&mut self, text: &str, most: usize) {
        let mut end = text.len().min(most).min(usize::from(u16::MAX));
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.put_u16(end as u16);
        self.extend_from_slice(&text.as_bytes()[..end]);
    }
}
