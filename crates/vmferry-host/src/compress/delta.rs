//! What has changed in a page, written down: the new bytes where it differs, and how far they are apart.
//!
//! For each page a list of changes, each its length, the number of unchanged bytes before it, and its new bytes; length 0
//! ends the list. Numbers are LEB128. Both directions touch each byte of the page about once, whatever has changed.

use vmferry_core::pages::PAGE_BYTES;

const PAGE: usize = PAGE_BYTES as usize;
/// Compared at once.
const BLOCK: usize = 64;
const WORD: usize = 8;
/// So few unchanged bytes go along with the changes around them: to leave them out would take as many.
const GAP: usize = 3;

/// Appends what differs from `old` in `new`, both of them one page, to `out`. If that is more than `most` bytes, appends
/// nothing and returns `false`.
///
/// # Panics
/// If either is not a page long.
pub(crate) fn append_changes(new: &[u8], old: &[u8], most: usize, out: &mut Vec<u8>) -> bool {
    assert_eq!((new.len(), old.len()), (PAGE, PAGE), "pages");
    let start = out.len();
    let (mut from, mut end) = (0, 0);
    // Where the change before ended.
    let mut done = 0;
    let (new_blocks, old_blocks) = (new.as_chunks::<BLOCK>().0, old.as_chunks::<BLOCK>().0);
    for (block, (new_block, old_block)) in new_blocks.iter().zip(old_blocks).enumerate() {
        if new_block == old_block {
            continue;
        }
        let words = new_block.as_chunks::<WORD>().0.iter().zip(old_block.as_chunks::<WORD>().0);
        for (word, (&new_word, &old_word)) in words.enumerate() {
            let differs = u64::from_le_bytes(new_word) ^ u64::from_le_bytes(old_word);
            if differs == 0 {
                continue;
            }
            let at = block * BLOCK + word * WORD;
            let first = at + differs.trailing_zeros() as usize / 8;
            if end > from && first - end > GAP {
                append_change(from - done, &new[from..end], out);
                (done, from) = (end, first);
                if out.len() - start > most {
                    out.truncate(start);
                    return false;
                }
            } else if end == from {
                from = first;
            }
            end = at + WORD - differs.leading_zeros() as usize / 8;
        }
    }
    if end > from {
        append_change(from - done, &new[from..end], out);
    }
    out.push(0);
    let fits = out.len() - start <= most;
    if !fits {
        out.truncate(start);
    }
    fits
}

fn append_change(unchanged: usize, bytes: &[u8], out: &mut Vec<u8>) {
    append_number(bytes.len(), out);
    append_number(unchanged, out);
    out.extend_from_slice(bytes);
}

fn append_number(mut number: usize, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Changes that are none of these pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadChanges;

/// Makes these changes in pages, which are as they were before them. On an error some of them may be made.
pub(crate) fn apply_changes(mut changes: &[u8], pages: &mut [u8]) -> Result<(), BadChanges> {
    for page in pages.chunks_exact_mut(PAGE) {
        let mut at = 0;
        loop {
            let length = take_number(&mut changes)?;
            if length == 0 {
                break;
            }
            at += take_number(&mut changes)?;
            let to = page.get_mut(at..at + length).ok_or(BadChanges)?;
            let (bytes, rest) = changes.split_at_checked(length).ok_or(BadChanges)?;
            to.copy_from_slice(bytes);
            (at, changes) = (at + length, rest);
        }
    }
    if changes.is_empty() { Ok(()) } else { Err(BadChanges) }
}

/// A number of two bytes at most: a page has no more.
fn take_number(from: &mut &[u8]) -> Result<usize, BadChanges> {
    let (number, rest) = match **from {
        [low, ref rest @ ..] if low < 0x80 => (usize::from(low), rest),
        [low, high, ref rest @ ..] if high < 0x80 => (usize::from(low & 0x7f) | usize::from(high) << 7, rest),
        _ => return Err(BadChanges),
    };
    *from = rest;
    Ok(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The changes between two pages.
    fn changes(new: &[u8], old: &[u8]) -> Vec<u8> {
        let mut out = vec![9];
        assert!(append_changes(new, old, usize::MAX, &mut out));
        out.split_off(1)
    }

    #[test]
    fn changes_are_as_the_protocol_says() {
        let old = vec![7; PAGE];
        assert_eq!(changes(&old, &old), [0]);
        let mut new = old.clone();
        new[0] = 1;
        new[300..302].copy_from_slice(&[2, 3]);
        // Bytes between changes of one word go along, and so do a few others.
        (new[PAGE - 5], new[PAGE - 1]) = (4, 5);
        assert_eq!(changes(&new, &old), [1, 0, 1, 2, 0x80 | 43, 2, 2, 3, 5, 0x80 | 77, 29, 4, 7, 7, 7, 5, 0]);
        (new[PAGE - 9], new[PAGE - 5]) = (6, 7);
        let end = changes(&new, &old);
        assert!(end.ends_with(&[1, 0x80 | 73, 29, 6, 1, 7, 5, 0]), "{end:?}");
        new[PAGE - 11] = 1;
        assert!(changes(&new, &old).ends_with(&[3, 0x80 | 71, 29, 1, 7, 6, 1, 7, 5, 0]));
        new[PAGE - 5] = 4;
        assert!(changes(&new, &old).ends_with(&[11, 0x80 | 71, 29, 1, 7, 6, 7, 7, 7, 4, 7, 7, 7, 5, 0]));
        assert_eq!(changes(&vec![8; PAGE], &old)[..5], [0x80, 32, 0, 8, 8]);
    }

    #[test]
    fn changes_that_are_too_many_leave_nothing() {
        let (old, new) = (vec![7; PAGE], vec![8; PAGE]);
        let mut out = vec![1];
        assert!(!append_changes(&new, &old, PAGE + 3, &mut out));
        assert_eq!(out, [1]);
        assert!(append_changes(&new, &old, PAGE + 4, &mut out));
        let scattered: Vec<u8> = (0..PAGE).map(|at| if at.is_multiple_of(8) { 8 } else { 7 }).collect();
        assert!(!append_changes(&scattered, &old, 1000, &mut out));
        assert_eq!(out.len(), PAGE + 5);
    }

    #[test]
    fn changes_beyond_a_page_or_cut_short_are_refused() {
        let apply = |changes: &[u8]| apply_changes(changes, &mut vec![0; 2 * PAGE]);
        assert_eq!(apply(&[0, 0]), Ok(()));
        for bad in [
            &[][..],
            &[0],
            &[0, 0, 0],
            &[1, 0, 5, 0],
            &[2, 0, 5],
            &[1, 0x80],
            &[1, 0x80, 0x80, 0, 5, 0, 0],
            &[1, 0x80, 0x20, 5, 0, 0],
            &[2, 0xff, 0x1f, 5, 5, 0, 0],
        ] {
            assert_eq!(apply(bad), Err(BadChanges), "{bad:?}");
        }
        assert_eq!(apply(&[1, 0xff, 0x1f, 5, 0, 0]), Ok(()), "the last byte");
    }

    proptest! {
        #[test]
        fn changes_make_the_new_page_of_the_old_one(
            seed in any::<u8>(),
            edits in prop::collection::vec((0..PAGE, 1..200_usize, any::<u8>()), 0..20),
        ) {
            let old: Vec<u8> = (0..2 * PAGE).map(|at| (at as u8).wrapping_mul(seed)).collect();
            let mut new = old.clone();
            for (at, length, value) in edits {
                new[at..(at + length).min(2 * PAGE)].fill(value);
            }
            let mut written = Vec::new();
            for (new, old) in new.chunks(PAGE).zip(old.chunks(PAGE)) {
                prop_assert!(append_changes(new, old, usize::MAX, &mut written));
            }
            let differing = new.iter().zip(&old).filter(|(new, old)| new != old).count();
            prop_assert!(written.len() >= differing + 2);
            let mut applied = old;
            prop_assert_eq!(apply_changes(&written, &mut applied), Ok(()));
            prop_assert!(applied == new);
        }

        #[test]
        fn no_changes_panic(made_up in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = apply_changes(&made_up, &mut vec![0; 3 * PAGE]);
        }
    }
}
