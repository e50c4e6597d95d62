//! The guest's processes told apart from outside: which address space owns which page of guest RAM, and which pages
//! were accessed.
//!
//! CR3 of the processors, asked of QEMU now and then, names the address spaces that run. The page tables behind it lie in
//! guest RAM, which we read anyway; walking them gives owner and accessed bit of every mapped page. Nothing of the
//! guest's operating system is assumed but what all x86-64 systems have in common, and nothing in the guest is written.
//!
//! | id | pages |
//! |---|---|
//! | [`UNMAPPED`] | page cache, free pages, memory of processes not seen yet; of Linux's kernel what it uses through its mapping of all RAM alone, as slabs |
//! | [`KERNEL`] | page tables; what the kernel maps by itself beside its mapping of all RAM: its image, modules, stacks; with Linux also the megabytes (ten of a Debian kernel) that its image gave back after start, whatever they are used for now |
//! | [`SHARED`] | mapped by programs of more than one process: libraries, shared memory |
//! | [`FIRST_PROCESS`] and up | mapped by the programs of one process |
//!
//! An id belongs to one process as long as it is known, and to no other after it. A process is known once it was seen on
//! a processor, and at most [`MAX_SPACES`] at a time.
//!
//! # Cost
//! [`AddressSpaces::refresh`] takes its time limit to heart: what it does not get done, it goes on with at the next call.
//! It says what it spent in [`Cost`]. All known tables are walked again at most once a second. On the host this takes up
//! to two bytes for each page of guest RAM that something maps, in pieces for 16 MiB of guest RAM.
//!
//! # Limits
//! What is read is what was true at some moment of the last second or so; the guest changes its tables meanwhile. So an
//! owner is a hint for prediction, and nothing that a migration's correctness may rest on. Accessed bits are the guest's:
//! it sets them at every use and clears them when it looks for pages to swap out, seldom that is.
//!
//! Guests whose CR3 does not lead to readable tables (encrypted memory), guests in 32-bit mode, and a QEMU without human
//! monitor give an error. The caller goes on without address spaces then; no migration fails for it. [`Ownership`] is
//! [`AddressSpaces`] for a caller that does so.

mod known;
mod owners;
mod ownership;
pub mod paging;
mod physical;
mod sample;
mod survey;

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use vmferry_core::pages::{AddressSpaceId, Owners, PAGE_BYTES, PageNumber, PageRun};

pub use self::ownership::Ownership;

use self::owners::UNMAPPED as UNMAPPED_SLOT;
use self::paging::{Levels, Meter, TABLE_ENTRIES, Table, TableSource};
use self::physical::PhysicalMap;
use self::sample::Sampler;
use self::survey::{Survey, SurveyError};
use crate::memory::{GuestMemory, MemoryError};
use crate::qemu::{QemuError, physical_memory};
use crate::qmp::QmpClient;

/// Pages that no known address space maps.
pub const UNMAPPED: AddressSpaceId = AddressSpaceId(1);
/// Pages of the guest's kernel.
pub const KERNEL: AddressSpaceId = AddressSpaceId(2);
/// Pages of more than one process.
pub const SHARED: AddressSpaceId = AddressSpaceId(3);
/// The first id of a process; the others follow.
pub const FIRST_PROCESS: AddressSpaceId = AddressSpaceId(16);
/// Address spaces that are told apart at a time.
pub const MAX_SPACES: usize = 64;
/// Tables read in one refresh at most, whatever its time limit.
pub const MAX_TABLES_PER_REFRESH: u64 = 1 << 20;

/// Why address spaces cannot be told apart. The guest is as before; a caller goes on without them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpacesError {
    /// QEMU was asked and did not answer as it should.
    #[error("QEMU does not tell what is needed to find the guest's processes")]
    Qemu(#[from] QemuError),
    /// Guest RAM cannot be read.
    #[error("the guest's page tables cannot be read")]
    Memory(#[from] MemoryError),
    /// None of the guest's RAM blocks is in its physical address space.
    #[error("QEMU's map of physical memory has none of the guest's RAM blocks; this version of QEMU may be too new")]
    NoRam,
    /// The guest's tables have another format.
    #[error("the guest runs in 32-bit mode: its processes are told apart in 64-bit mode only")]
    Legacy,
    /// There are no tables where the processors say.
    #[error(
        "no page tables were found where the guest's processors have them, at {refreshes} attempts: its memory may be \
         encrypted, or its processors run guests of its own"
    )]
    Implausible {
        /// Refreshes in a row.
        refreshes: u32,
    },
}

impl From<SurveyError<MemoryError>> for SpacesError {
    fn from(error: SurveyError<MemoryError>) -> Self {
        match error {
            SurveyError::Source(error) => Self::Memory(error),
            SurveyError::Legacy => Self::Legacy,
            SurveyError::Implausible(refreshes) => Self::Implausible { refreshes },
        }
    }
}

/// What a refresh cost and did. Costs add up with `+=`; the last of them says how things stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Time in all.
    pub elapsed: Duration,
    /// Of it, asking QEMU for registers.
    pub sampling: Duration,
    /// Processors that told their state.
    pub processors: u64,
    /// Page tables read, 4 KiB each.
    pub tables_read: u64,
    /// Of them, those that were no tables: the guest was changing them, or they were given up.
    pub tables_rejected: u64,
    /// Pages of guest RAM in the mappings that were seen; a page counts for each mapping.
    pub pages_seen: u64,
    /// Times that a process ran and had no place among [`MAX_SPACES`].
    pub refused: u64,
    /// Times that the map of owners was replaced by one made anew.
    pub rebuilds: u64,
    /// Processes known afterwards.
    pub spaces: u64,
    /// Whether everything was walked that is to be walked for now.
    pub up_to_date: bool,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.elapsed += other.elapsed;
        self.sampling += other.sampling;
        self.processors += other.processors;
        self.tables_read += other.tables_read;
        self.tables_rejected += other.tables_rejected;
        self.pages_seen += other.pages_seen;
        self.refused += other.refused;
        self.rebuilds += other.rebuilds;
        self.spaces = other.spaces;
        self.up_to_date = other.up_to_date;
    }
}

/// A process of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceInfo {
    /// Its id.
    pub id: AddressSpaceId,
    /// Its page tables' levels.
    pub levels: Levels,
    /// The page of its topmost table, if that is in RAM.
    pub root: Option<PageNumber>,
    /// Pages that its programs map, by the last whole walk; shared ones included.
    pub mapped_pages: u64,
    /// Of them, those in pages of 2 MiB or 1 GiB.
    pub large_pages: u64,
    /// Pages that are its alone.
    pub owned_pages: u64,
}

/// The address spaces of one QEMU guest.
#[derive(Debug)]
pub struct AddressSpaces {
    sampler: Sampler,
    physical: PhysicalMap,
    survey: Survey,
}

impl AddressSpaces {
    /// Asks QEMU for the guest's processors and where its RAM lies; walks nothing yet.
    ///
    /// # Errors
    /// [`SpacesError`].
    pub fn attach(qmp: &mut QmpClient, memory: &GuestMemory) -> Result<Self, SpacesError> {
        let physical = PhysicalMap::new(memory.layout(), &physical_memory(qmp)?);
        if physical.is_empty() {
            return Err(SpacesError::NoRam);
        }
        Ok(Self { sampler: Sampler::new(qmp)?, survey: Survey::new(physical.clone()), physical })
    }

    /// Samples the processors and walks page tables for about `budget`; half of it at most goes to the former, unless QEMU
    /// is late, and half of it to the latter in any case. What is
    /// begun is brought to its end: a table, which takes microseconds, and an answer of QEMU, which is waited for up to
    /// 20 ms, usually half a millisecond. A QEMU that answers late is asked less and less; one that does so for seconds
    /// is an error.
    ///
    /// Works while the guest runs and while it is paused. It needs the monitor to itself.
    ///
    /// # Errors
    /// [`SpacesError`]. What was known before is still there; a later call may succeed.
    pub fn refresh(
        &mut self,
        qmp: &mut QmpClient,
        memory: &GuestMemory,
        budget: Duration,
    ) -> Result<Cost, SpacesError> {
        let start = Instant::now();
        let states = self.sampler.sample(qmp, start + budget / 2)?;
        let sampling = start.elapsed();
        // A QEMU that always answers late must not leave the tables unread for ever.
        let walk_until = (start + budget).max(Instant::now() + budget / 2);
        let mut meter = Meter::new(Some(walk_until), MAX_TABLES_PER_REFRESH);
        let mut tables = GuestTables { memory, physical: &self.physical };
        let done = self.survey.refresh(&states, &mut tables, &mut meter, start)?;
        Ok(Cost {
            elapsed: start.elapsed(),
            sampling,
            processors: states.len() as u64,
            tables_read: meter.tables_read,
            tables_rejected: done.tables_rejected,
            pages_seen: done.pages_seen,
            refused: done.refused,
            rebuilds: done.rebuilds,
            spaces: self.survey.known().spaces().count() as u64,
            up_to_date: done.up_to_date,
        })
    }

    /// Who owns a page.
    pub fn owner(&self, page: PageNumber) -> AddressSpaceId {
        self.id_of(self.survey.owners().slot(page))
    }

    /// Cuts runs where the owner changes, in the order given.
    pub fn owners(&self, runs: &[PageRun]) -> Vec<(AddressSpaceId, PageRun)> {
        let mut owned: Vec<(AddressSpaceId, PageRun)> = Vec::with_capacity(runs.len());
        for &run in runs {
            for (slot, piece) in self.survey.owners().pieces(run) {
                owned.push((self.id_of(slot), piece));
            }
        }
        owned
    }

    /// The same, put together by owner: ids ascending, the runs of each in the order given.
    pub fn by_owner(&self, runs: &[PageRun]) -> Vec<(AddressSpaceId, Vec<PageRun>)> {
        let mut groups = std::collections::BTreeMap::<AddressSpaceId, Vec<PageRun>>::new();
        for (id, run) in self.owners(runs) {
            groups.entry(id).or_default().push(run);
        }
        groups.into_iter().collect()
    }

    /// The pages whose accessed bit was set in some program's mapping, by the last walks; ascending, runs whole.
    pub fn accessed(&self) -> Vec<PageRun> {
        self.survey.owners().accessed()
    }

    /// The processes that are known, ids ascending.
    pub fn spaces(&self) -> Vec<SpaceInfo> {
        let mut spaces: Vec<SpaceInfo> = self
            .survey
            .known()
            .spaces()
            .map(|(number, space)| SpaceInfo {
                id: space.id,
                levels: space.root.levels,
                root: self.physical.page(space.root.address),
                mapped_pages: space.mapped_pages,
                large_pages: space.large_pages,
                owned_pages: self.survey.owners().count(number),
            })
            .collect();
        spaces.sort_by_key(|space| space.id);
        spaces
    }

    fn id_of(&self, slot: u8) -> AddressSpaceId {
        match slot {
            UNMAPPED_SLOT => UNMAPPED,
            owners::KERNEL => KERNEL,
            owners::SHARED => SHARED,
            // Of a process that has ended: its pages are free, or another's that is not walked yet.
            space => self.survey.known().space(space).map_or(UNMAPPED, |space| space.id),
        }
    }
}

impl Owners for AddressSpaces {
    fn owner_of(&self, run: PageRun) -> (AddressSpaceId, u64) {
        let first = self.survey.owners().pieces(run).next();
        first.map_or((UNMAPPED, run.count), |(slot, piece)| (self.id_of(slot), piece.count))
    }
}

/// Page tables in guest RAM.
struct GuestTables<'a> {
    memory: &'a GuestMemory,
    physical: &'a PhysicalMap,
}

impl TableSource for GuestTables<'_> {
    type Error = MemoryError;

    fn read_table(&mut self, address: u64, table: &mut Table) -> Result<bool, MemoryError> {
        let Some(page) = self.physical.page(address) else { return Ok(false) };
        let mut bytes = [0_u8; PAGE_BYTES as usize];
        self.memory.read(PageRun::new(page.0, 1), &mut bytes)?;
        let (words, _) = bytes.as_chunks::<{ PAGE_BYTES as usize / TABLE_ENTRIES }>();
        for (entry, word) in table.iter_mut().zip(words) {
            *entry = u64::from_le_bytes(*word);
        }
        Ok(true)
    }
}
