//! What QEMU tells of the guest's processors and of its physical memory, through its human monitor: QMP itself has
//! neither. The answers are text; formats of QEMU 7.2 to 10.0.
//!
//! The states of many processors are not asked for at once. The answer grows with their number, and a message beyond the
//! limit of [`QmpClient`] ends the connection that the migration needs.

use std::time::Duration;

use serde_json::{Value, json};

use super::guest::QemuError;
use crate::qmp::{QmpClient, QmpError};

/// Processors whose states may be asked for in one question: the answer has at most 8 KiB for each.
pub const MAX_PROCESSORS_AT_ONCE: usize = 16;
/// Processors that are looked at; QEMU's x86 machines have at most 4096.
const MAX_PROCESSORS: usize = 4096;
/// Ranges of physical memory that are taken.
const MAX_RANGES: usize = 65_536;
/// The physical address space in which the guest's processors see its RAM.
const MEMORY_ADDRESS_SPACE: &str = " AS \"memory\", root: system";

/// What decides how a processor translates addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessorState {
    /// Control register 0: bit 31 turns paging on.
    pub cr0: u64,
    /// Control register 3: the root of the page tables, and flags.
    pub cr3: u64,
    /// Control register 4: bit 12 means five levels of tables.
    pub cr4: u64,
    /// The extended feature register: bit 10 means 64-bit mode.
    pub efer: u64,
    /// Virtual address of the interrupt table, which every running address space maps.
    pub idt_address: u64,
    /// In system management mode, where the firmware's own tables are in use.
    pub management_mode: bool,
}

/// A piece of RAM or ROM in the guest's physical address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhysicalRange {
    /// First physical address.
    pub start: u64,
    /// One past the last physical address.
    pub end: u64,
    /// The memory region behind it: for guest RAM the name of its block.
    pub region: String,
    /// Where the range begins in the region.
    pub offset: u64,
}

/// QEMU's numbers of the guest's processors.
///
/// # Errors
/// [`QemuError`].
pub fn processors(qmp: &mut QmpClient) -> Result<Vec<u32>, QemuError> {
    let answer = qmp.execute("query-cpus-fast")?;
    let unexpected = || QemuError::unexpected("query-cpus-fast", "a CPU has no `cpu-index`");
    let list = answer.as_array().ok_or_else(unexpected)?;
    let index = |cpu: &Value| u32::try_from(cpu.get("cpu-index")?.as_u64()?).ok();
    list.iter().take(MAX_PROCESSORS).map(|cpu| index(cpu).ok_or_else(unexpected)).collect()
}

/// The states of all processors, of which there must be at most [`MAX_PROCESSORS_AT_ONCE`]. Under TCG they run on while
/// they are read, under KVM each is interrupted for it.
///
/// # Errors
/// [`QemuError`]; also where this QEMU has no human monitor, or the guest's processors are not x86.
pub fn processor_states(qmp: &mut QmpClient, timeout: Duration) -> Result<Vec<ProcessorState>, QemuError> {
    const COMMAND: &str = "info registers -a";
    match qmp.execute_within("human-monitor-command", json!({ "command-line": COMMAND }), timeout)? {
        Value::String(text) => {
            let states = text.split("CPU#").skip(1).map(parse_registers);
            states.collect::<Option<Vec<_>>>().filter(|states| !states.is_empty()).ok_or_else(|| no_registers(COMMAND))
        }
        _ => Err(QemuError::unexpected(COMMAND, "it is no text")),
    }
}

/// The state of one processor; `None` if there is no such processor (any more).
///
/// # Errors
/// As [`processor_states`].
pub fn processor_state(
    qmp: &mut QmpClient,
    processor: u32,
    timeout: Duration,
) -> Result<Option<ProcessorState>, QemuError> {
    const COMMAND: &str = "info registers";
    let arguments = json!({ "command-line": COMMAND, "cpu-index": processor });
    match qmp.execute_within("human-monitor-command", arguments, timeout) {
        Ok(Value::String(text)) => parse_registers(&text).map(Some).ok_or_else(|| no_registers(COMMAND)),
        Ok(_) => Err(QemuError::unexpected(COMMAND, "it is no text")),
        Err(error @ QmpError::Command { .. }) if error.is_command_not_found() => Err(error.into()),
        Err(QmpError::Command { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn no_registers(command: &str) -> QemuError {
    QemuError::unexpected(command, "it lacks a control register of an x86 processor")
}

/// The guest's physical memory: where which piece of which block lies, in ascending order.
///
/// # Errors
/// [`QemuError`]; also where this QEMU has no human monitor.
pub fn physical_memory(qmp: &mut QmpClient) -> Result<Vec<PhysicalRange>, QemuError> {
    const COMMAND: &str = "info mtree -f";
    match qmp.execute_with("human-monitor-command", json!({ "command-line": COMMAND }))? {
        Value::String(text) => parse_flat_view(&text)
            .ok_or_else(|| QemuError::unexpected(COMMAND, "there is no flat view of the system's memory")),
        _ => Err(QemuError::unexpected(COMMAND, "it is no text")),
    }
}

/// Reads `CR0=… CR2=… CR3=… CR4=…`, `EFER=…`, `IDT= …` and `SMM=…`.
fn parse_registers(text: &str) -> Option<ProcessorState> {
    let mut words = text.split_whitespace();
    let (mut cr0, mut cr3, mut cr4, mut efer, mut idt, mut smm) = (None, None, None, None, None, None);
    while let Some(word) = words.next() {
        let Some((name, value)) = word.split_once('=') else { continue };
        let register = match name {
            "CR0" => &mut cr0,
            "CR3" => &mut cr3,
            "CR4" => &mut cr4,
            "EFER" => &mut efer,
            "IDT" => &mut idt,
            "SMM" => &mut smm,
            _ => continue,
        };
        // The descriptor tables have spaces before their address.
        let value = if value.is_empty() { words.next()? } else { value };
        *register = Some(u64::from_str_radix(value, 16).ok()?);
    }
    Some(ProcessorState { cr0: cr0?, cr3: cr3?, cr4: cr4?, efer: efer?, idt_address: idt?, management_mode: smm? != 0 })
}

/// Reads the ranges of RAM and ROM of the system's address space. A line of it is
/// `  0000000100000000-000000017fffffff (prio 0, ram): NAME @0000000080000000 KVM`, without `@…` if that is 0.
fn parse_flat_view(text: &str) -> Option<Vec<PhysicalRange>> {
    let view =
        text.split("FlatView #").find(|view| view.lines().any(|line| line.trim_end() == MEMORY_ADDRESS_SPACE))?;
    let ranges = view.lines().filter_map(parse_flat_range).take(MAX_RANGES);
    let mut ranges: Vec<PhysicalRange> = ranges.collect();
    ranges.sort_by_key(|range| range.start);
    Some(ranges)
}

fn parse_flat_range(line: &str) -> Option<PhysicalRange> {
    let (addresses, rest) = line.trim().split_once(" (prio ")?;
    let (start, last) = addresses.split_once('-')?;
    let (kind, region) = rest.split_once("): ")?;
    let kind = kind.rsplit(' ').next()?;
    if !matches!(kind.strip_prefix("nv-").unwrap_or(kind), "ram" | "rom") {
        return None;
    }
    let (region, offset) = match region.rsplit_once(" @") {
        Some((region, offset)) => (region, hex(offset.split(' ').next()?)?),
        None => (region.strip_suffix(" KVM").unwrap_or(region), 0),
    };
    let (start, end) = (hex(start)?, hex(last)?.checked_add(1)?);
    (start < end).then(|| PhysicalRange { start, end, region: region.to_owned(), offset })
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG_MODE: &str = "\r\nCPU#1\r\nRAX=000000000b619fff RBX=0 RCX=0 RDX=ffffffffb764fc60\r
RIP=ffffffffb5c9ebe8 RFL=00000297 [--S-APC] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0000 0000000000000000 00000000 00000000
GS =0000 ff40adf14f700000 00000000 00000000
TR =0040 fffffe000003e000 00004087 00008900 DPL=0 TSS64-avl
GDT=     fffffe000003c000 0000007f
IDT=     fffffe0000000000 00000fff
CR0=80050033 CR2=00007ffcc1f79080 CR3=0000000002a66000 CR4=00751ea0
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000
EFER=0000000000000d01
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80
";

    #[test]
    fn registers_of_both_widths_are_read() {
        let state = parse_registers(LONG_MODE).unwrap();
        let expected = ProcessorState {
            cr0: 0x8005_0033,
            cr3: 0x02a6_6000,
            cr4: 0x0075_1ea0,
            efer: 0xd01,
            idt_address: 0xffff_fe00_0000_0000,
            management_mode: false,
        };
        assert_eq!(state, expected);
        let firmware = "EIP=0 EFL=0 A20=1 SMM=1 HLT=0\nIDT=     00000000 000003ff\nCR0=60000010 CR2=00000000 \
                        CR3=00000000 CR4=00000000\nEFER=0000000000000000";
        let state = parse_registers(firmware).unwrap();
        assert_eq!((state.cr0, state.management_mode), (0x6000_0010, true));
    }

    #[test]
    fn other_texts_are_no_registers() {
        assert_eq!(parse_registers(""), None);
        assert_eq!(parse_registers("PC=0 X00=0 SCTLR=0"), None);
        assert_eq!(parse_registers(&LONG_MODE.replace("EFER", "FFER")), None);
        assert_eq!(parse_registers(&LONG_MODE.replace("CR3=0000000002a66000", "CR3=what")), None);
        assert_eq!(parse_registers("IDT="), None);
    }

    const VIEWS: &str = "FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS \"cpu-smm-0\", root: memory
 Root memory region: memory
  0000000000000000-000000000009ffff (prio 0, ram): other

FlatView #2
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): ram KVM
  00000000000c3000-00000000000e3fff (prio 0, rom): ram @00000000000c3000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000017fffffff (prio 0, ram): ram @0000000080000000
  0000000180000000-00000001800fffff (prio 0, nv-ram): nvdimm0
";

    #[test]
    fn the_flat_view_of_the_system_is_read() {
        let ranges = parse_flat_view(VIEWS).unwrap();
        let range = |start, end, region: &str, offset| PhysicalRange { start, end, region: region.to_owned(), offset };
        assert_eq!(
            ranges,
            [
                range(0, 0xc3000, "ram", 0),
                range(0xc3000, 0xe4000, "ram", 0xc3000),
                range(0x10_0000, 0x8000_0000, "ram", 0x10_0000),
                range(0xfffc_0000, 0x1_0000_0000, "pc.bios", 0),
                range(0x1_0000_0000, 0x1_8000_0000, "ram", 0x8000_0000),
                range(0x1_8000_0000, 0x1_8010_0000, "nvdimm0", 0),
            ]
        );
        assert_eq!(parse_flat_view("unknown command: 'info mtree -f'"), None);
        assert_eq!(parse_flat_range("  5-4 (prio 0, ram): x"), None);
        assert_eq!(parse_flat_range("  0-ffffffffffffffff (prio 0, ram): x"), None);
    }
}
