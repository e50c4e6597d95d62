//! Which shared libraries a program of the guest needs.
//!
//! Only what that question takes of the ELF format (System V ABI, chapters 4 and 5; x86-64 supplement): the program
//! headers, the dynamic section and its string table. 64-bit, little-endian.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

const MAGIC: &[u8] = b"\x7fELF";
/// 64-bit and little-endian, as the two bytes after the magic say it.
const CLASS_AND_DATA: &[u8] = &[2, 1];

/// Where in the ELF header the program headers are described, and how long one of them is.
const PROGRAM_HEADER_OFFSET: usize = 32;
const PROGRAM_HEADER_COUNT: usize = 56;
const PROGRAM_HEADER_BYTES: usize = 56;

const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;

const DYNAMIC_ENTRY_BYTES: usize = 16;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// Whether a file begins as an ELF file does.
pub(super) fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// The libraries that the dynamic loader has to find before this program or library runs, and the loader itself where
/// a program names one; all by file name. A static program needs nothing.
///
/// # Errors
/// When the file is no ELF file of this kind, or contradicts itself.
pub(super) fn needed(bytes: &[u8]) -> Result<BTreeSet<String>> {
    ensure!(is_elf(bytes) && bytes[MAGIC.len()..].starts_with(CLASS_AND_DATA), "not a 64-bit little-endian ELF file");
    let first = number(bytes, PROGRAM_HEADER_OFFSET, 8)?;
    let count = number(bytes, PROGRAM_HEADER_COUNT, 2)?;
    let headers = (0..usize::try_from(count)?)
        .map(|index| Segment::read(bytes, usize::try_from(first)?.saturating_add(index * PROGRAM_HEADER_BYTES)))
        .collect::<Result<Vec<_>>>()?;

    let mut found = BTreeSet::new();
    for header in &headers {
        if header.kind == PT_INTERP {
            let path = text(bytes, header.offset)?;
            found.insert(path.rsplit('/').next().unwrap_or(path).to_owned());
        }
    }
    let Some(dynamic) = headers.iter().find(|header| header.kind == PT_DYNAMIC) else { return Ok(found) };
    let mut names = Vec::new();
    let mut strings = None;
    for index in 0..dynamic.size / DYNAMIC_ENTRY_BYTES {
        let at = dynamic.offset.saturating_add(index * DYNAMIC_ENTRY_BYTES);
        let value = number(bytes, at.saturating_add(8), 8)?;
        match number(bytes, at, 8)? {
            DT_NULL => break,
            DT_NEEDED => names.push(usize::try_from(value)?),
            DT_STRTAB => strings = Some(offset_of(&headers, value)?),
            _ => {}
        }
    }
    if !names.is_empty() {
        let strings = strings.context("it needs libraries and has no string table for their names")?;
        for name in names {
            found.insert(text(bytes, strings.saturating_add(name))?.to_owned());
        }
    }
    Ok(found)
}

/// What of a program header is used here.
struct Segment {
    kind: u64,
    offset: usize,
    address: u64,
    size: usize,
}

impl Segment {
    fn read(bytes: &[u8], at: usize) -> Result<Self> {
        Ok(Self {
            kind: number(bytes, at, 4)?,
            offset: usize::try_from(number(bytes, at.saturating_add(8), 8)?)?,
            address: number(bytes, at.saturating_add(16), 8)?,
            size: usize::try_from(number(bytes, at.saturating_add(32), 8)?)?,
        })
    }
}

/// The place in the file of what is loaded at an address.
fn offset_of(segments: &[Segment], address: u64) -> Result<usize> {
    let segment = segments
        .iter()
        .filter(|segment| segment.kind == PT_LOAD)
        .find(|segment| address >= segment.address && address - segment.address < segment.size as u64)
        .with_context(|| format!("nothing of the file is loaded at {address:#x}"))?;
    Ok(segment.offset.saturating_add(usize::try_from(address - segment.address)?))
}

fn number(bytes: &[u8], at: usize, length: usize) -> Result<u64> {
    let end = at.checked_add(length).context("an offset beyond any file")?;
    let field = bytes.get(at..end).with_context(|| format!("it ends before its byte {end}"))?;
    Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn text(bytes: &[u8], at: usize) -> Result<&str> {
    let rest = bytes.get(at..).with_context(|| format!("it ends before its byte {at}"))?;
    let end = rest.iter().position(|byte| *byte == 0).context("a name without an end")?;
    Ok(std::str::from_utf8(&rest[..end])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_program() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn this_test_needs_the_c_library_and_its_loader() {
        let found = needed(&own_program()).unwrap();
        assert!(found.contains("libc.so.6"), "{found:?}");
        assert!(found.iter().any(|name| name.starts_with("ld-linux")), "{found:?}");
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_or_has_all_it_said() {
        let whole = own_program();
        let found = needed(&whole).unwrap();
        // All of the headers, and then here and there: the string table is somewhere behind them.
        for length in (0..2048).chain((2048..whole.len()).step_by(whole.len() / 100)) {
            if let Ok(names) = needed(&whole[..length]) {
                assert_eq!(names, found, "cut to {length} bytes");
            }
        }
    }

    #[test]
    fn what_is_not_elf_is_refused() {
        assert!(!is_elf(b"#!/bin/sh\n"));
        assert!(needed(b"#!/bin/sh\n").is_err());
        // 32-bit.
        assert!(needed(b"\x7fELF\x01\x01\x01").is_err());
    }
}
