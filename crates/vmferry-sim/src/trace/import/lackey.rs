//! Memory accesses of one process, as valgrind's tool `lackey` writes them with `--trace-mem=yes`.

use std::io::BufRead;
use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PAGE_BYTES, PageRun};

use super::{Builder, ImportError, Imported, LineError, Lines, Numbering};
use crate::trace::file::Header;

/// The longest access. Saving a processor's extended state takes some kilobytes.
const MAX_ACCESS_BYTES: u64 = 1 << 16;

/// How lackey's output is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LackeyOptions {
    /// What the trace will be called.
    pub name: String,
    /// The guest's size in pages; if `None`, as many as were touched.
    pub guest_pages: Option<u64>,
    /// How many instructions make an epoch.
    pub epoch_instructions: u64,
    /// How long an epoch is said to take: valgrind knows no time.
    pub epoch: Duration,
    /// Whether to record what was read and executed, too. If not, pages that are never written are no part of the guest.
    pub accessed: bool,
}

/// What a line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Instruction,
    Load,
    /// A store, or a modification in place.
    Store,
}

/// Imports lackey's output. Pages are numbered in the order in which they are first touched.
///
/// A line ` S addr,size` or ` M addr,size` is a write, ` L addr,size` a read, and `I  addr,size` an instruction; addresses
/// are hexadecimal, sizes decimal. All other lines (valgrind's own, the program's output) are skipped and counted.
///
/// # Errors
/// [`ImportError::Empty`] if there is no such line; [`ImportError::Line`] if the input is too large.
pub fn lackey(input: impl BufRead, options: &LackeyOptions) -> Result<Imported, ImportError> {
    let guest = options.guest_pages.unwrap_or(1);
    Header { name: options.name.clone(), pages: guest, epoch: options.epoch }.check()?;
    if options.epoch_instructions == 0 {
        return Err(ImportError::Option { option: "the number of instructions in an epoch", expected: "1 or more" });
    }
    let mut lines = Lines::new(input);
    let mut builder = Builder::new(Numbering::FirstTouch);
    let (mut instructions, mut skipped) = (0_u64, 0_u64);
    while let Some(line) = lines.next()? {
        let Some((access, run)) = line.ok().and_then(parse) else {
            skipped += 1;
            continue;
        };
        let mut take = || {
            if access == Access::Instruction {
                builder.advance(instructions / options.epoch_instructions)?;
                instructions += 1;
            }
            if access == Access::Store {
                builder.write(run, AddressSpaceId::WHOLE_GUEST)?;
            }
            if options.accessed { builder.access(run) } else { Ok(()) }
        };
        take().map_err(|source: LineError| ImportError::Line { line: lines.number, source })?;
    }
    if lines.number == skipped {
        return Err(ImportError::Empty { expected: "line of a memory access; run valgrind with --trace-mem=yes" });
    }
    let trace = builder.finish(&options.name, options.epoch, options.guest_pages, lines.number)?;
    Ok(Imported { trace, lines: lines.number, skipped_lines: skipped })
}

/// Understands a line; `None` if it is not about memory.
fn parse(line: &[u8]) -> Option<(Access, PageRun)> {
    let (start, rest) = line.split_at_checked(3)?;
    let access = match start {
        b"I  " => Access::Instruction,
        b" L " => Access::Load,
        b" S " | b" M " => Access::Store,
        _ => return None,
    };
    let (address, size) = std::str::from_utf8(rest).ok()?.split_once(',')?;
    // The standard parser takes a sign, too.
    let address = u64::from_str_radix(address, 16).ok().filter(|_| !address.starts_with('+'))?;
    let size: u64 = size.trim_end().parse().ok().filter(|size| (1..=MAX_ACCESS_BYTES).contains(size))?;
    let (first, last) = (address / PAGE_BYTES, address.checked_add(size - 1)? / PAGE_BYTES);
    Some((access, PageRun::new(first, last - first + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood_or_left_alone() {
        assert_eq!(parse(b"I  0401ab70,3"), Some((Access::Instruction, PageRun::new(0x401a, 1))));
        assert_eq!(parse(b" S 1fff000758,8"), Some((Access::Store, PageRun::new(0x1ff_f000, 1))));
        assert_eq!(parse(b" M 00000ffc,8"), Some((Access::Store, PageRun::new(0, 2))));
        assert_eq!(parse(b" L 00001000,1 "), Some((Access::Load, PageRun::new(1, 1))));
        for line in [
            "",
            "I",
            "I  ",
            "==21802== Command: ./w",
            "SB 0401ab70",
            " S 1fff000758",
            " S 1fff000758,0",
            " S 1fff000758,-8",
            " S 1fff000758,99999999",
            " S +fff000758,8",
            " S xyz,8",
            " S ffffffffffffffff,2",
            " S \u{e9}000,8",
        ] {
            assert_eq!(parse(line.as_bytes()), None, "{line}");
        }
    }
}
