//! Memory that was mapped rather than allocated, as the words the rest of this crate works on.
#![expect(unsafe_code, reason = "a mapping is known to the language only by its address")]

use std::sync::atomic::AtomicU64;

/// The whole words of a mapping of guest memory.
///
/// # Panics
/// When `start` is null or not a multiple of 8.
///
/// # Safety
/// For all of `'a`, `length_bytes` from `start` have to be mapped readable and writable, and everything in this process
/// that accesses them has to do so atomically. Other processes may access them as they like.
pub unsafe fn words_from_raw<'a>(start: *mut u8, length_bytes: usize) -> &'a [AtomicU64] {
    let words = start.cast::<AtomicU64>();
    assert!(!words.is_null() && words.is_aligned(), "guest memory at {start:?} does not start at a word");
    // SAFETY: the pointer is not null and aligned (asserted), the memory is mapped for `'a` (the caller's promise), any
    // bit pattern is an `AtomicU64`, and changes behind the shared reference are what an atomic is for: in this process
    // they are atomic (the caller's promise), and those of other processes are, to this one, volatile machine stores.
    unsafe { std::slice::from_raw_parts(words, length_bytes / size_of::<AtomicU64>()) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_are_seen_through_the_raw_address() {
        let owned: Vec<AtomicU64> = (0..4).map(AtomicU64::new).collect();
        let start = owned.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: `owned` lives until the end of this function, is accessed as atomics only, and 31 bytes are inside it.
        let words = unsafe { words_from_raw(start, 31) };
        assert_eq!(words.len(), 3);
        words[2].store(9, Ordering::Relaxed);
        assert_eq!(owned[2].load(Ordering::Relaxed), 9);
    }
}
