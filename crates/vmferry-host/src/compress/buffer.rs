//! Bytes that are written again and again, and cleared in between only as far as their length goes.

use std::ops::Deref;

/// A vector that is emptied without forgetting its bytes: room in it need not be filled with zeros each time.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    length: usize,
}

impl Buffer {
    /// So many more bytes behind the end, with whatever was there, to be written over.
    pub(crate) fn grow(&mut self, more: usize) -> &mut [u8] {
        let (start, end) = (self.length, self.length + more);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.length = end;
        &mut self.bytes[start..end]
    }

    /// So many bytes, instead of all that it held.
    pub(crate) fn room(&mut self, bytes: usize) -> &mut [u8] {
        self.truncate(0);
        self.grow(bytes)
    }

    /// Appends these.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        self.grow(bytes.len()).copy_from_slice(bytes);
    }

    /// Leaves the first so many bytes, if there are more.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_and_given_back() {
        let mut buffer = Buffer::default();
        buffer.append(b"one");
        buffer.grow(4).copy_from_slice(b" two");
        assert_eq!(&buffer[..], b"one two");
        buffer.truncate(10);
        buffer.truncate(3);
        assert_eq!(&buffer[..], b"one");
        assert_eq!(buffer.grow(2).len(), 2);
        buffer.truncate(0);
        assert!(buffer.is_empty());
    }
}
