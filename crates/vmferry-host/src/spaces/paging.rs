//! x86-64 page tables, read and never written: 4 and 5 levels, pages of 4 KiB, 2 MiB and 1 GiB.
//!
//! Formats: Intel SDM volume 3, chapter "Paging" (sections on 4-level and 5-level paging); AMD64 APM volume 2, chapter
//! "Page Translation and Protection" says the same. 32-bit and PAE paging are told apart and refused.
//!
//! The guest changes its tables while they are read, and a root may not be one any more. So nothing here is trusted:
//! - A table is taken only if no entry of it has a reserved bit set; data that is no table almost always has.
//! - A walk reads each table once, whatever points to it: loops and a table shared a million times end there. It reads
//!   at most a given number of tables.
//! - A walk can stop at any table and go on later. It then reads again the tables on its path, and leaves the part that
//!   is not linked any more.
//!
//! This module knows no guest memory and no operating system. A [`TableSource`] reads, the caller says how long.

use std::collections::HashSet;
use std::time::Instant;

/// Entries of a table, at every level.
pub const TABLE_ENTRIES: usize = 512;
/// The entries of one table.
pub type Table = [u64; TABLE_ENTRIES];

/// Bits of a virtual address that one level translates.
const LEVEL_BITS: u32 = 9;
/// Bits of a virtual address below the lowest level.
const OFFSET_BITS: u32 = 12;
/// Bits 12 to 51: the physical address in an entry and in CR3.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLED: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// In an entry of level 2 or 3: it maps a large page. In one of level 1 the same bit belongs to the memory type.
const LARGE: u64 = 1 << 7;
const SMALL_PAGE_TYPE: u64 = 1 << 7;
const LARGE_PAGE_TYPE: u64 = 1 << 12;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

/// How a processor translates addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagingMode {
    /// It does not: paging is off, as in firmware and before an operating system starts.
    Off,
    /// By tables that are not read here: 32-bit or PAE.
    Legacy,
    /// By the tables of 64-bit mode.
    Long(Levels),
}

impl PagingMode {
    /// The mode that these registers set.
    pub fn from_registers(cr0: u64, cr4: u64, efer: u64) -> Self {
        if cr0 & CR0_PAGING == 0 {
            Self::Off
        } else if efer & EFER_LONG_MODE_ACTIVE == 0 {
            Self::Legacy
        } else if cr4 & CR4_FIVE_LEVELS == 0 {
            Self::Long(Levels::Four)
        } else {
            Self::Long(Levels::Five)
        }
    }
}

/// How many levels of tables there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 48-bit virtual addresses.
    Four,
    /// 57-bit virtual addresses.
    Five,
}

impl Levels {
    const fn top(self) -> u32 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }
}

/// Where an address space begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root {
    /// Physical address of the topmost table.
    pub address: u64,
    /// The levels below it, itself included.
    pub levels: Levels,
}

impl Root {
    /// The root in a value of CR3, without the process-context identifier and the flags in it.
    pub fn from_cr3(cr3: u64, levels: Levels) -> Self {
        Self { address: cr3 & ADDRESS_MASK, levels }
    }
}

/// Half of the virtual addresses. By convention of all systems the lower is the process's, the upper the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Addresses from 0.
    Lower,
    /// Addresses with all upper bits set.
    Upper,
}

impl Half {
    /// The entries of the topmost table.
    pub const fn entries(self) -> std::ops::Range<usize> {
        match self {
            Self::Lower => 0..TABLE_ENTRIES / 2,
            Self::Upper => TABLE_ENTRIES / 2..TABLE_ENTRIES,
        }
    }
}

/// A page that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// First virtual address, sign-extended.
    pub virtual_address: u64,
    /// First physical address; it need not be RAM.
    pub physical_address: u64,
    /// 4 KiB, 2 MiB or 1 GiB.
    pub bytes: u64,
    /// Programs may use it, not only the kernel; by all levels.
    pub user: bool,
    /// It may be written; by all levels.
    pub writable: bool,
    /// It may be executed; by all levels.
    pub executable: bool,
    /// It was used since the guest cleared this bit last.
    pub accessed: bool,
    /// It was written since the guest cleared this bit last.
    pub dirty: bool,
    /// It stays in the translation buffer when CR3 changes.
    pub global: bool,
    /// Index into the page attribute table (memory types), 0 to 7.
    pub attribute_index: u8,
}

/// What a walk comes across.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A table that was read, by its physical address.
    Table(u64),
    /// A page.
    Mapping(Mapping),
}

/// Reads tables from physical memory.
pub trait TableSource {
    /// Why a table cannot be read, other than that there is no RAM.
    type Error;

    /// Reads the table at a physical address, a multiple of 4096; false if there is no RAM.
    ///
    /// # Errors
    /// Whatever the source says.
    fn read_table(&mut self, address: u64, table: &mut Table) -> Result<bool, Self::Error>;
}

/// What a walk may spend, and what was spent.
#[derive(Debug, Clone)]
pub struct Meter {
    deadline: Option<Instant>,
    tables_left: u64,
    /// Tables read so far.
    pub tables_read: u64,
}

impl Meter {
    /// Up to `tables` tables, and not beyond `deadline` if there is one.
    pub fn new(deadline: Option<Instant>, tables: u64) -> Self {
        Self { deadline, tables_left: tables, tables_read: 0 }
    }

    /// Whether nothing more may be spent.
    pub fn is_spent(&self) -> bool {
        self.tables_left == 0 || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn read<S: TableSource>(&mut self, source: &mut S, address: u64, table: &mut Table) -> Result<bool, S::Error> {
        self.tables_read += 1;
        self.tables_left = self.tables_left.saturating_sub(1);
        source.read_table(address, table)
    }
}

/// Reads a table outside of a walk; false if there is no RAM or it is no table of that level.
pub(super) fn read_table<S: TableSource>(
    source: &mut S,
    meter: &mut Meter,
    address: u64,
    level: u32,
    table: &mut Table,
) -> Result<bool, S::Error> {
    Ok(meter.read(source, address, table)? && is_plausible(table, level))
}

/// Reads a topmost table; false if there is no RAM or it is no table.
pub(super) fn read_root<S: TableSource>(
    source: &mut S,
    meter: &mut Meter,
    root: Root,
    table: &mut Table,
) -> Result<bool, S::Error> {
    read_table(source, meter, root.address, root.levels.top(), table)
}

/// The physical address of the table that an entry of a topmost table points to.
pub(super) fn linked_table(entry: u64) -> Option<u64> {
    let entry = Entry(entry);
    entry.has(PRESENT).then(|| entry.table_address())
}

/// Translates one virtual address; `None` where it is not mapped, or through something that is no table.
///
/// # Errors
/// Those of the source.
pub fn translate<S: TableSource>(
    source: &mut S,
    meter: &mut Meter,
    root: Root,
    virtual_address: u64,
) -> Result<Option<u64>, S::Error> {
    let mut table = [0; TABLE_ENTRIES];
    let mut address = root.address;
    for level in (1..=root.levels.top()).rev() {
        if !read_table(source, meter, address, level, &mut table)? {
            return Ok(None);
        }
        let entry = Entry(table[index_of(virtual_address, level)]);
        if !entry.has(PRESENT) {
            return Ok(None);
        }
        if entry.is_page(level) {
            let offset = virtual_address & (span_bytes(level) - 1);
            return Ok(Some(entry.page_address(level) | offset));
        }
        address = entry.table_address();
    }
    unreachable!("an entry of level 1 maps a page")
}

/// How a walk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All was seen.
    Done,
    /// The meter was spent; call again.
    Paused,
}

/// A walk through half an address space, page by page in order of addresses.
#[derive(Debug)]
pub struct Walk {
    root: Root,
    half: Half,
    /// The path from the root to the present table; empty before and after.
    path: Vec<Frame>,
    started: bool,
    /// The path's copies may be old.
    paused: bool,
    visited: HashSet<u64>,
    most_tables: usize,
    /// Tables passed over: not RAM, or with reserved bits set.
    rejected_tables: u64,
    truncated: bool,
    /// Tables whose memory is used again.
    spare: Vec<Box<Table>>,
}

/// A table on the path.
#[derive(Debug)]
struct Frame {
    table: Box<Table>,
    address: u64,
    level: u32,
    next: usize,
    end: usize,
    virtual_address: u64,
    rights: Rights,
}

impl Walk {
    /// A walk that reads at most `most_tables` tables, however often it is paused.
    pub fn new(root: Root, half: Half, most_tables: usize) -> Self {
        Self {
            root,
            half,
            path: Vec::with_capacity(root.levels.top() as usize),
            started: false,
            paused: false,
            visited: HashSet::new(),
            most_tables,
            rejected_tables: 0,
            truncated: false,
            spare: Vec::new(),
        }
    }

    /// Tables that were passed over because they are no tables. Some are usual while the guest changes its tables.
    pub fn rejected_tables(&self) -> u64 {
        self.rejected_tables
    }

    /// Whether there were more tables than the walk may read.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Goes on until all is seen or `meter` is spent, and tells `found` what there is. Entries that are not present are
    /// passed over; each table is told before what it holds.
    ///
    /// # Errors
    /// Those of the source; the walk is of no further use then.
    pub fn advance<S: TableSource>(
        &mut self,
        source: &mut S,
        meter: &mut Meter,
        mut found: impl FnMut(Found),
    ) -> Result<Progress, S::Error> {
        if self.paused {
            self.read_path_again(source, meter)?;
        }
        if !self.started {
            if meter.is_spent() {
                return Ok(Progress::Paused);
            }
            self.started = true;
            let (address, level) = (self.root.address, self.root.levels.top());
            self.enter(source, meter, address, level, 0, Rights::ALL, &mut found)?;
        }
        while let Some(frame) = self.path.last_mut() {
            if frame.next == frame.end {
                let frame = self.path.pop().expect("it is the last");
                self.spare.push(frame.table);
                continue;
            }
            let entry = Entry(frame.table[frame.next]);
            if !entry.has(PRESENT) {
                frame.next += 1;
                continue;
            }
            let level = frame.level;
            let virtual_address = frame.virtual_address + ((frame.next as u64) << shift(level));
            let rights = frame.rights.and(entry);
            if entry.is_page(level) {
                frame.next += 1;
                found(Found::Mapping(entry.mapping(level, self.canonical(virtual_address), rights)));
                continue;
            }
            let address = entry.table_address();
            if self.visited.contains(&address) {
                frame.next += 1;
                continue;
            }
            if meter.is_spent() {
                self.paused = true;
                return Ok(Progress::Paused);
            }
            frame.next += 1;
            if self.visited.len() >= self.most_tables {
                self.truncated = true;
                self.path.clear();
                break;
            }
            self.enter(source, meter, address, level - 1, virtual_address, rights, &mut found)?;
        }
        Ok(Progress::Done)
    }

    #[expect(clippy::too_many_arguments, reason = "it is one step of `advance`, cut out to be read by itself")]
    fn enter<S: TableSource>(
        &mut self,
        source: &mut S,
        meter: &mut Meter,
        address: u64,
        level: u32,
        virtual_address: u64,
        rights: Rights,
        found: &mut impl FnMut(Found),
    ) -> Result<(), S::Error> {
        self.visited.insert(address);
        let mut table = self.spare.pop().unwrap_or_else(|| Box::new([0; TABLE_ENTRIES]));
        if !read_table(source, meter, address, level, &mut table)? {
            self.rejected_tables += 1;
            self.spare.push(table);
            return Ok(());
        }
        found(Found::Table(address));
        let entries = if self.path.is_empty() { self.half.entries() } else { 0..TABLE_ENTRIES };
        self.path.push(Frame { table, address, level, next: entries.start, end: entries.end, virtual_address, rights });
        Ok(())
    }

    /// After a pause: renews the copies of the path, and cuts it where a table is not linked any more.
    fn read_path_again<S: TableSource>(&mut self, source: &mut S, meter: &mut Meter) -> Result<(), S::Error> {
        self.paused = false;
        for at in 0..self.path.len() {
            let (above, rest) = self.path.split_at_mut(at);
            let frame = &mut rest[0];
            let linked = above.last().is_none_or(|parent| {
                let entry = Entry(parent.table[parent.next - 1]);
                entry.has(PRESENT) && !entry.is_page(parent.level) && entry.table_address() == frame.address
            });
            if !linked || !read_table(source, meter, frame.address, frame.level, &mut frame.table)? {
                self.rejected_tables += 1;
                self.path.truncate(at);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Copies the highest bit that is translated to all above it.
    fn canonical(&self, virtual_address: u64) -> u64 {
        let unused = u64::BITS - shift(self.root.levels.top()) - LEVEL_BITS;
        (((virtual_address << unused) as i64) >> unused) as u64
    }
}

/// The lowest bit of a virtual address that an entry of this level translates.
const fn shift(level: u32) -> u32 {
    OFFSET_BITS + LEVEL_BITS * (level - 1)
}

/// What an entry of this level covers.
const fn span_bytes(level: u32) -> u64 {
    1 << shift(level)
}

const fn index_of(virtual_address: u64, level: u32) -> usize {
    (virtual_address >> shift(level)) as usize % TABLE_ENTRIES
}

fn is_plausible(table: &Table, level: u32) -> bool {
    table.iter().all(|&entry| !Entry(entry).has_reserved_bits(level))
}

/// What all levels from the root on allow.
#[derive(Debug, Clone, Copy)]
struct Rights {
    user: bool,
    writable: bool,
    executable: bool,
}

impl Rights {
    const ALL: Self = Self { user: true, writable: true, executable: true };

    fn and(self, entry: Entry) -> Self {
        Self {
            user: self.user && entry.has(USER),
            writable: self.writable && entry.has(WRITABLE),
            executable: self.executable && !entry.has(NO_EXECUTE),
        }
    }
}

/// One entry of a table.
#[derive(Debug, Clone, Copy)]
struct Entry(u64);

impl Entry {
    const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// Whether a present entry maps a page; else it points to a table.
    const fn is_page(self, level: u32) -> bool {
        level == 1 || (level <= 3 && self.has(LARGE))
    }

    const fn table_address(self) -> u64 {
        self.0 & ADDRESS_MASK
    }

    const fn page_address(self, level: u32) -> u64 {
        self.0 & ADDRESS_MASK & !(span_bytes(level) - 1)
    }

    /// Whether a processor would refuse the entry: a large page of a size that does not exist, or one whose address is
    /// not a multiple of its size. Bit 12 is the memory type there.
    const fn has_reserved_bits(self, level: u32) -> bool {
        if !self.has(PRESENT) || !self.has(LARGE) || level == 1 {
            return false;
        }
        let address_bits_that_must_be_zero = ADDRESS_MASK & (span_bytes(level) - 1) & !LARGE_PAGE_TYPE;
        level > 3 || self.has(address_bits_that_must_be_zero)
    }

    fn mapping(self, level: u32, virtual_address: u64, rights: Rights) -> Mapping {
        let high_type = if level == 1 { SMALL_PAGE_TYPE } else { LARGE_PAGE_TYPE };
        let attribute_bits = [self.has(WRITE_THROUGH), self.has(CACHE_DISABLED), self.has(high_type)];
        Mapping {
            virtual_address,
            physical_address: self.page_address(level),
            bytes: span_bytes(level),
            user: rights.user,
            writable: rights.writable,
            executable: rights.executable,
            accessed: self.has(ACCESSED),
            dirty: self.has(DIRTY),
            global: self.has(GLOBAL),
            attribute_index: attribute_bits.iter().rev().fold(0, |index, &bit| index << 1 | u8::from(bit)),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// Flags of an ordinary user page.
    pub(in crate::spaces) const USER_PAGE: u64 = PRESENT | WRITABLE | USER | ACCESSED | DIRTY;
    pub(in crate::spaces) const KERNEL_PAGE: u64 = PRESENT | WRITABLE | ACCESSED | DIRTY | GLOBAL | NO_EXECUTE;
    pub(in crate::spaces) const NOT_ACCESSED: u64 = PRESENT | WRITABLE | USER;
    const ENOUGH: usize = 1 << 20;

    /// Physical memory that holds nothing but tables.
    #[derive(Debug, Clone, Default)]
    pub(in crate::spaces) struct Tables {
        pub(in crate::spaces) tables: BTreeMap<u64, Table>,
        pub(in crate::spaces) reads: u64,
    }

    impl TableSource for Tables {
        type Error = Infallible;

        fn read_table(&mut self, address: u64, table: &mut Table) -> Result<bool, Infallible> {
            assert_eq!(address % 4096, 0);
            self.reads += 1;
            let Some(found) = self.tables.get(&address) else { return Ok(false) };
            *table = *found;
            Ok(true)
        }
    }

    impl Tables {
        /// Maps a page at `level` (1: 4 KiB, 2: 2 MiB, 3: 1 GiB); tables that are missing are put at `free` and above.
        pub(in crate::spaces) fn map(
            &mut self,
            root: Root,
            virtual_address: u64,
            physical_address: u64,
            level: u32,
            flags: u64,
            free: &mut u64,
        ) {
            self.tables.entry(root.address).or_insert([0; TABLE_ENTRIES]);
            let mut address = root.address;
            for above in (level + 1..=root.levels.top()).rev() {
                let entry = &mut self.tables.get_mut(&address).unwrap()[index_of(virtual_address, above)];
                if Entry(*entry).has(PRESENT) {
                    address = Entry(*entry).table_address();
                    continue;
                }
                address = *free;
                *free += 4096;
                // Only the last level says who may use the page.
                *entry = address | PRESENT | WRITABLE | USER | ACCESSED;
                self.tables.insert(address, [0; TABLE_ENTRIES]);
            }
            let large = if level == 1 { 0 } else { LARGE };
            let table = self.tables.get_mut(&address).unwrap();
            table[index_of(virtual_address, level)] = physical_address | flags | large;
        }
    }

    pub(in crate::spaces) fn unlimited() -> Meter {
        Meter::new(None, u64::MAX)
    }

    fn walk(tables: &mut Tables, root: Root, half: Half) -> (Vec<Mapping>, Vec<u64>) {
        let (mut mappings, mut seen) = (Vec::new(), Vec::new());
        let mut walk = Walk::new(root, half, ENOUGH);
        let progress = walk.advance(tables, &mut unlimited(), |found| match found {
            Found::Table(address) => seen.push(address),
            Found::Mapping(mapping) => mappings.push(mapping),
        });
        assert_eq!(progress, Ok(Progress::Done));
        (mappings, seen)
    }

    #[test]
    fn registers_say_the_mode() {
        let mode = PagingMode::from_registers;
        assert_eq!(mode(0x6000_0010, 0, 0), PagingMode::Off);
        assert_eq!(mode(0x0000_0011, 0, 0), PagingMode::Off, "protected mode without paging");
        assert_eq!(mode(0x8000_0011, 0, 0), PagingMode::Legacy, "32-bit");
        assert_eq!(mode(0x8000_0011, 0x20, 0x800), PagingMode::Legacy, "PAE");
        // Long mode enabled but not yet active.
        assert_eq!(mode(0x8000_0011, 0x20, 0x100), PagingMode::Legacy);
        assert_eq!(mode(0x8005_0033, 0x0075_0eb0, 0xd01), PagingMode::Long(Levels::Four));
        assert_eq!(mode(0x8005_0033, 0x0075_1eb0, 0xd01), PagingMode::Long(Levels::Five));
        // A process-context identifier, the bits for linear address masking, and no flush.
        let root = Root::from_cr3(0xe000_0001_2345_6805, Levels::Four);
        assert_eq!(root.address, 0x1_2345_6000);
    }

    #[test]
    fn pages_of_all_sizes_are_found_with_their_bits() {
        for levels in [Levels::Four, Levels::Five] {
            let (mut tables, mut free) = (Tables::default(), 0x10_0000);
            let root = Root { address: 0x1000, levels };
            let first = PRESENT | USER | NO_EXECUTE | WRITE_THROUGH | SMALL_PAGE_TYPE;
            tables.map(root, 0x7000_1234_5000, 0xabc_d000, 1, first, &mut free);
            let second = PRESENT | WRITABLE | ACCESSED | DIRTY | GLOBAL | LARGE_PAGE_TYPE | CACHE_DISABLED;
            tables.map(root, 0x7000_4000_0000, 0x4020_0000, 2, second, &mut free);
            tables.map(root, 0x7f80_0000_0000, 0x1_4000_0000, 3, USER_PAGE, &mut free);
            let (mappings, seen) = walk(&mut tables, root, Half::Lower);
            let small = Mapping {
                virtual_address: 0x7000_1234_5000,
                physical_address: 0xabc_d000,
                bytes: 4096,
                user: true,
                writable: false,
                executable: false,
                accessed: false,
                dirty: false,
                global: false,
                attribute_index: 0b101,
            };
            let large = Mapping {
                virtual_address: 0x7000_4000_0000,
                physical_address: 0x4020_0000,
                bytes: 2 << 20,
                user: false,
                writable: true,
                executable: true,
                accessed: true,
                dirty: true,
                global: true,
                attribute_index: 0b110,
            };
            let huge = Mapping {
                virtual_address: 0x7f80_0000_0000,
                physical_address: 0x1_4000_0000,
                bytes: 1 << 30,
                user: true,
                global: false,
                attribute_index: 0,
                ..large
            };
            assert_eq!(mappings, [small, large, huge]);
            assert_eq!(seen.len(), tables.tables.len());
            assert_eq!(walk(&mut tables, root, Half::Upper).0, []);
            let physical = translate(&mut tables, &mut unlimited(), root, 0x7000_4012_3456);
            assert_eq!(physical, Ok(Some(0x4032_3456)));
            assert_eq!(translate(&mut tables, &mut unlimited(), root, 0x7000_0000_0000), Ok(None));
        }
    }

    #[test]
    fn upper_addresses_are_sign_extended() {
        for (levels, address) in [
            (Levels::Four, 0xffff_8880_0000_0000),
            (Levels::Five, 0xff11_0000_0000_0000),
            (Levels::Five, u64::MAX << 12),
        ] {
            let (mut tables, mut free) = (Tables::default(), 0x10_0000);
            let root = Root { address: 0x1000, levels };
            tables.map(root, address, 0x5000, 1, KERNEL_PAGE, &mut free);
            let (mappings, _) = walk(&mut tables, root, Half::Upper);
            assert_eq!(mappings[0].virtual_address, address);
            assert!(!mappings[0].user && !mappings[0].executable);
            assert_eq!(translate(&mut tables, &mut unlimited(), root, address + 7), Ok(Some(0x5007)));
        }
    }

    #[test]
    fn a_right_needs_all_levels() {
        let (mut tables, mut free) = (Tables::default(), 0x10_0000);
        let root = Root { address: 0x1000, levels: Levels::Four };
        tables.map(root, 0, 0x5000, 1, USER_PAGE, &mut free);
        let above = &mut tables.tables.get_mut(&0x1000).unwrap()[0];
        *above = (*above & !USER) | NO_EXECUTE;
        let (mappings, _) = walk(&mut tables, root, Half::Lower);
        assert!(!mappings[0].user && !mappings[0].executable && mappings[0].writable);
    }

    #[test]
    fn loops_and_shared_tables_are_walked_once() {
        let root = Root { address: 0x1000, levels: Levels::Four };
        let mut tables = Tables::default();
        // The root is its own table at every level; Windows has one such entry.
        tables.tables.insert(0x1000, [0x1000 | PRESENT | USER; TABLE_ENTRIES]);
        let (mappings, seen) = walk(&mut tables, root, Half::Lower);
        assert_eq!((mappings, seen), (vec![], vec![0x1000]));
        // One chain of tables, shared by all entries: as the kernel's address sanitizer has it.
        for (address, target) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0x5000)] {
            tables.tables.insert(address, [target | PRESENT; TABLE_ENTRIES]);
        }
        let (mappings, seen) = walk(&mut tables, root, Half::Upper);
        assert_eq!((mappings.len(), seen.len()), (TABLE_ENTRIES, 4));
    }

    #[test]
    fn what_is_no_table_is_passed_over() {
        let (mut tables, mut free) = (Tables::default(), 0x10_0000);
        let root = Root { address: 0x1000, levels: Levels::Four };
        tables.map(root, 0, 0x5000, 1, USER_PAGE, &mut free);
        let good = walk(&mut tables, root, Half::Lower);
        // Beyond RAM; a large page at level 4 in the other table; unaligned large pages below.
        let mut broken = [0; TABLE_ENTRIES];
        for (index, entry) in [(1, 0xdead_b000 | PRESENT), (2, 0x20_0000 | PRESENT), (3, 0x30_0000 | PRESENT)] {
            tables.tables.get_mut(&0x1000).unwrap()[index] = entry;
            broken[index] = 0x4000_1000 | PRESENT | LARGE;
        }
        broken[511] = 0x4000_2000 | PRESENT | LARGE;
        tables.tables.insert(0x20_0000, broken);
        tables.tables.insert(0x30_0000, [0xffff_ffff_ffff_ffff; TABLE_ENTRIES]);
        let mut walk_all = Walk::new(root, Half::Lower, ENOUGH);
        let mut mappings = Vec::new();
        let progress = walk_all.advance(&mut tables, &mut unlimited(), |found| {
            if let Found::Mapping(mapping) = found {
                mappings.push(mapping);
            }
        });
        assert_eq!((progress, mappings), (Ok(Progress::Done), good.0));
        assert_eq!(walk_all.rejected_tables(), 3);
        tables.tables.get_mut(&0x1000).unwrap()[0] |= LARGE;
        assert_eq!(walk(&mut tables, root, Half::Lower), (vec![], vec![]), "no root has large pages");
    }

    #[test]
    fn a_walk_has_a_last_table() {
        let (mut tables, mut free) = (Tables::default(), 0x10_0000);
        let root = Root { address: 0x1000, levels: Levels::Four };
        for index in 0..100 {
            tables.map(root, index << 39, 0x5000, 1, USER_PAGE, &mut free);
        }
        let mut walk = Walk::new(root, Half::Lower, 10);
        assert_eq!(walk.advance(&mut tables, &mut unlimited(), |_| {}), Ok(Progress::Done));
        assert!(walk.is_truncated());
        assert_eq!(tables.reads, 10);
    }

    #[test]
    fn a_table_that_was_freed_during_a_pause_is_left() {
        let (mut tables, mut free) = (Tables::default(), 0x10_0000);
        let root = Root { address: 0x1000, levels: Levels::Four };
        for index in 0..3_u64 {
            tables.map(root, index << 39, 0x5000 + (index << 12), 1, USER_PAGE, &mut free);
        }
        let mut walk = Walk::new(root, Half::Lower, ENOUGH);
        let mut mappings = Vec::new();
        let mut advance = |tables: &mut Tables, walk: &mut Walk, most| {
            walk.advance(tables, &mut Meter::new(None, most), |found| {
                if let Found::Mapping(mapping) = found {
                    mappings.push(mapping.physical_address);
                }
            })
        };
        // The root and the first two tables of the first path.
        assert_eq!(advance(&mut tables, &mut walk, 3), Ok(Progress::Paused));
        tables.tables.get_mut(&0x1000).unwrap()[0] = 0;
        assert_eq!(advance(&mut tables, &mut walk, u64::MAX), Ok(Progress::Done));
        assert_eq!(mappings, [0x6000, 0x7000]);
        assert_eq!(walk.rejected_tables(), 1);
    }

    proptest! {
        /// Against a plain list of what was mapped, in pieces of any size.
        #[test]
        fn a_walk_finds_what_was_mapped(
            five: bool,
            pages in prop::collection::btree_map((0..4_u64, 0..3_u64, 0..4_u64, 0..512_u64), 0..1_u64 << 28, 0..60),
            pieces in prop::collection::vec(1..9_u64, 1..20),
        ) {
            let levels = if five { Levels::Five } else { Levels::Four };
            let (mut tables, mut free) = (Tables::default(), 1 << 44);
            let root = Root { address: 0x1000, levels };
            tables.tables.insert(root.address, [0; TABLE_ENTRIES]);
            let mut model = Vec::new();
            for ((four, three, two, one), frame) in pages {
                let address = four << 39 | three << 30 | two << 21 | one << 12;
                tables.map(root, address, frame << 12, 1, USER_PAGE, &mut free);
                model.push((address, frame << 12));
            }
            let mut walk = Walk::new(root, Half::Lower, ENOUGH);
            let mut mappings = Vec::new();
            let mut pieces = pieces.into_iter().cycle();
            loop {
                // On its way back to where it was it reads up to four tables again.
                let mut meter = Meter::new(None, pieces.next().unwrap() + 4);
                let progress = walk.advance(&mut tables, &mut meter, |found| {
                    if let Found::Mapping(mapping) = found {
                        mappings.push((mapping.virtual_address, mapping.physical_address));
                    }
                });
                if progress == Ok(Progress::Done) {
                    break;
                }
            }
            prop_assert_eq!(walk.rejected_tables(), 0);
            prop_assert_eq!(mappings, model);
        }

        /// Any content at all: the work stays within the limits.
        #[test]
        fn garbage_is_bounded(
            words in prop::collection::vec(any::<u64>(), 1..40),
            spread in 1..60_u64,
            most in 1..200_usize,
            piece in 6..100_u64,
        ) {
            let mut tables = Tables::default();
            for number in 0..spread {
                let mut table = [0; TABLE_ENTRIES];
                for (index, entry) in table.iter_mut().enumerate() {
                    let word = words[(index + number as usize) % words.len()];
                    // Half of the words point at tables that exist.
                    *entry = if word & 2 == 0 { word } else { ((word >> 8) % spread) << 12 | (word & 0xff) };
                }
                tables.tables.insert(number << 12, table);
            }
            let root = Root { address: 0, levels: Levels::Five };
            let mut walk = Walk::new(root, Half::Lower, most);
            let mut found = 0_u64;
            // Each call may spend five reads on going back to where it was.
            for _ in 0..spread + 2 {
                let progress = walk.advance(&mut tables, &mut Meter::new(None, piece), |_| found += 1);
                if progress == Ok(Progress::Done) {
                    break;
                }
            }
            prop_assert_eq!(walk.advance(&mut tables, &mut unlimited(), |_| found += 1), Ok(Progress::Done));
            prop_assert!(walk.visited.len() <= most.min(spread as usize + 40 * 512));
            prop_assert!(found <= (most as u64) * 513);
            let _ = translate(&mut tables, &mut unlimited(), root, words[0]);
        }
    }
}
