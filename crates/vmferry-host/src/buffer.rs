//! Bytes that are written again and again, and cleared in between only as far as their length goes.
#![expect(unsafe_code, reason = "advice to the kernel about memory that a vector owns")]

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use rustix::mm::Advice;

/// The first byte's address is a multiple of this. Where a page is copied to an address 1 to 31 bytes ahead of its own, modulo a page,
/// the kernel's copy takes four times as long on some processors (`rep movsb`: 1.6 GB/s instead of 6.5 on an AMD EPYC); large
/// vectors of the standard allocator begin 16 bytes behind a page's start.
const ALIGN: usize = 64;

/// The kernel's usual page.
const SYSTEM_PAGE: usize = 4096;

/// An empty vector with room for so many elements, in huge pages as far as the kernel has any: to fill it the first time takes a
/// fraction of the time. Where there is no room for so much, it grows as it is filled.
pub(crate) fn large_vector<T>(length: usize) -> Vec<T> {
    let mut vector = Vec::new();
    if let Err(error) = vector.try_reserve_exact(length) {
        tracing::debug!(%error, length, "no room for all of it at once");
        return vector;
    }
    let spare: *mut [MaybeUninit<T>] = vector.spare_capacity_mut();
    let (start, bytes) = (spare.cast::<u8>(), spare.len() * size_of::<T>());
    let skipped = start.align_offset(SYSTEM_PAGE).min(bytes);
    let whole = (bytes - skipped) / SYSTEM_PAGE * SYSTEM_PAGE;
    let start: *mut c_void = start.wrapping_add(skipped).cast();
    // SAFETY: the range is part of what the vector owns, and the advice changes nothing about its content.
    if let Err(error) = unsafe { rustix::mm::madvise(start, whole, Advice::LinuxHugepage) } {
        tracing::debug!(%error, "no huge pages");
    }
    vector
}

/// A vector that is emptied without forgetting its bytes: room in it need not be filled with zeros each time.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    /// Some bytes that are not used, and behind them those that are or were.
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// So many zeros.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let mut buffer = Self::default();
        buffer.grow(bytes);
        buffer
    }

    /// So many more bytes behind the end, with whatever was there, to be written over.
    pub(crate) fn grow(&mut self, more: usize) -> &mut [u8] {
        let (from, to) = (self.length, self.length + more);
        if self.start + to > self.bytes.capacity() {
            // Mostly the allocator only maps more behind it, and nothing moves.
            self.bytes.reserve(to + ALIGN - self.bytes.len());
            let start = self.bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
            if start != self.start {
                self.bytes.resize(self.bytes.len().max(start + from), 0);
                self.bytes.copy_within(self.start..self.start + from, start);
                self.start = start;
            }
        }
        // Within the capacity: nothing moves.
        if self.bytes.len() < self.start + to {
            self.bytes.resize(self.start + to, 0);
        }
        self.length = to;
        &mut self.bytes[self.start + from..self.start + to]
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
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_vector_takes_what_it_has_room_for() {
        for bytes in [0, 1, SYSTEM_PAGE, 5 << 20] {
            let mut vector = large_vector::<u8>(bytes);
            assert!(vector.is_empty() && vector.capacity() >= bytes);
            let before = vector.as_ptr();
            vector.extend(std::iter::repeat_n(7, bytes));
            assert!(bytes == 0 || vector.as_ptr() == before, "it was moved");
            assert!(vector.iter().all(|&byte| byte == 7));
        }
        assert_eq!(large_vector::<u8>(usize::MAX).capacity(), 0, "more than there is");
    }

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

    #[test]
    fn bytes_stay_aligned_and_the_same_while_it_grows() {
        let mut buffer = Buffer::zeroed(3);
        assert_eq!(&buffer[..], [0; 3]);
        for value in 1..200_u8 {
            buffer.append(&vec![value; 997]);
            assert_eq!(buffer.as_ptr().align_offset(ALIGN), 0);
        }
        assert_eq!(buffer.len(), 3 + 199 * 997);
        assert!(buffer[3..].chunks(997).zip(1..).all(|(piece, value)| piece.iter().all(|&byte| byte == value)));
    }
}
