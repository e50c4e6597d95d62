//! Walking all known address spaces, a little at a time, into a map of owners.
//!
//! ```text
//!  a root is seen ──▶ fresh ──▶ walked into the published map ──▶ walked again by every rebuild
//!                                                                      │
//!  rebuild: kernel, then each space, into a second map ── all done ──▶ which is published in place of the first
//! ```
//!
//! A walk can only add. What a space maps no longer goes away with the next rebuild, which starts from an empty map; until
//! then the published map says what was, and nobody sees a map that is half done.
//!
//! Nothing here does I/O or reads a clock: tables come from a [`TableSource`], time is an argument, a [`Meter`] says how
//! far to go.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmferry_core::pages::PAGE_BYTES;

use super::known::{Admission, KnownSpaces};
use super::owners::{OwnerMap, SHARED};
use super::paging::{Found, Half, Mapping, Meter, PagingMode, Progress, TableSource, Walk};
use super::physical::PhysicalMap;
use super::sample::{Topmost, resolve};
use crate::qemu::ProcessorState;

/// From the beginning of one rebuild to that of the next, at least.
const REBUILD_INTERVAL: Duration = Duration::from_secs(1);
/// Refreshes in a row in which processors ran in 64-bit mode and none of them had tables that can be read.
const MOST_IMPLAUSIBLE_REFRESHES: u32 = 32;
/// A walk may read so many tables, and one more for each [`PAGES_PER_TABLE`] pages of the guest. Memory mapped in pages
/// of 4 KiB needs one table for 512 pages; sparse mappings need more, data taken for tables would need no end of them.
const TABLES_OF_ANY_WALK: usize = 1 << 16;
const PAGES_PER_TABLE: usize = 64;
/// Of a space's own pages at least this part is there again in the next walk, or another process has got its root.
const SAME_SPACE_PART: u64 = 8;
/// Own pages before and after that are too few to tell.
const TOO_FEW_PAGES: u64 = 16;
/// Distances that are counted to find the one of the direct map.
const DISTANCES: usize = 8;

/// Why a refresh did not work.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SurveyError<E> {
    /// Reading a table failed.
    Source(E),
    /// All processors that translate at all use 32-bit or PAE tables.
    Legacy,
    /// For many refreshes no processor had tables that could be read.
    Implausible(u32),
}

impl<E> From<E> for SurveyError<E> {
    fn from(error: E) -> Self {
        Self::Source(error)
    }
}

/// What a refresh did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// Pages of RAM in the mappings that were seen.
    pub(super) pages_seen: u64,
    /// Tables that were none.
    pub(super) tables_rejected: u64,
    /// Roots seen on processors for which there is no place.
    pub(super) refused: u64,
    /// Rebuilds that were published.
    pub(super) rebuilds: u64,
    /// Whether no walk is left to do for now.
    pub(super) up_to_date: bool,
}

/// What a walk is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Kernel,
    Space(u8),
}

/// A walk that is under way.
#[derive(Debug)]
struct Job {
    subject: Subject,
    walk: Walk,
    into_rebuild: bool,
    mapped_pages: u64,
    large_pages: u64,
    /// Pages that are the space's alone in the published map, too.
    kept_pages: u64,
    /// Pages that no space has in the published map.
    new_pages: u64,
    distances: Distances,
}

/// A second map, to take the place of the first.
#[derive(Debug)]
struct Rebuild {
    map: OwnerMap,
    todo: VecDeque<Subject>,
    /// Spaces that had left when it began, whose numbers are not in its map.
    left: Vec<u8>,
}

/// The kernel's mapping of all RAM, which says nothing about what a page is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DirectMap {
    /// The kernel half was not walked yet.
    Unknown,
    /// No distance is that of half of RAM: every page that the kernel maps is the kernel's.
    None,
    /// Virtual less physical addresses.
    At(u64),
}

/// All that is known of a guest's address spaces.
#[derive(Debug)]
pub(super) struct Survey {
    physical: PhysicalMap,
    known: KnownSpaces,
    /// Where the kernel half is read, and what others are compared with. Where one is known this is a root without
    /// programs, since Linux has one that never goes away.
    kernel: Option<Topmost>,
    direct_map: DirectMap,
    published: OwnerMap,
    rebuild: Option<Rebuild>,
    /// Memory for the next rebuild.
    spare: Option<OwnerMap>,
    rebuild_began: Option<Instant>,
    fresh: VecDeque<Subject>,
    job: Option<Job>,
    implausible_refreshes: u32,
    most_tables: usize,
}

impl Survey {
    pub(super) fn new(physical: PhysicalMap) -> Self {
        let pages = physical.total_pages();
        let for_size = usize::try_from(pages).unwrap_or(usize::MAX) / PAGES_PER_TABLE;
        Self {
            physical,
            known: KnownSpaces::new(),
            kernel: None,
            direct_map: DirectMap::Unknown,
            published: OwnerMap::new(pages),
            rebuild: None,
            spare: Some(OwnerMap::new(pages)),
            rebuild_began: None,
            fresh: VecDeque::new(),
            job: None,
            implausible_refreshes: 0,
            most_tables: TABLES_OF_ANY_WALK.saturating_add(for_size),
        }
    }

    pub(super) fn known(&self) -> &KnownSpaces {
        &self.known
    }

    pub(super) fn owners(&self) -> &OwnerMap {
        &self.published
    }

    /// Takes in what runs now, and walks as far as `meter` allows.
    pub(super) fn refresh<S: TableSource>(
        &mut self,
        states: &[ProcessorState],
        source: &mut S,
        meter: &mut Meter,
        now: Instant,
    ) -> Result<Done, SurveyError<S::Error>> {
        let mut done = Done::default();
        self.take_in(states, source, meter, now, &mut done)?;
        self.walk(source, meter, now, &mut done)?;
        Ok(done)
    }

    fn take_in<S: TableSource>(
        &mut self,
        states: &[ProcessorState],
        source: &mut S,
        meter: &mut Meter,
        now: Instant,
        done: &mut Done,
    ) -> Result<(), SurveyError<S::Error>> {
        let (mut legacy, mut implausible, mut good) = (false, false, false);
        let mut roots: Vec<u64> = Vec::new();
        for state in states.iter().filter(|state| !state.management_mode) {
            let levels = match PagingMode::from_registers(state.cr0, state.cr4, state.efer) {
                PagingMode::Off => continue,
                PagingMode::Legacy => {
                    legacy = true;
                    continue;
                }
                PagingMode::Long(levels) => levels,
            };
            if roots.contains(&state.cr3) {
                continue;
            }
            roots.push(state.cr3);
            match resolve(source, meter, state, levels, self.kernel.as_ref())? {
                Some(topmost) => {
                    good = true;
                    self.see(topmost, now, done);
                }
                None => implausible = true,
            }
        }
        if good {
            self.implausible_refreshes = 0;
        } else if implausible {
            self.implausible_refreshes += 1;
            if self.implausible_refreshes >= MOST_IMPLAUSIBLE_REFRESHES {
                return Err(SurveyError::Implausible(self.implausible_refreshes));
            }
        } else if legacy && self.kernel.is_none() {
            return Err(SurveyError::Legacy);
        }
        Ok(())
    }

    fn see(&mut self, topmost: Topmost, now: Instant, done: &mut Done) {
        let root = topmost.root;
        let has_programs = topmost.has_programs();
        let better = self.kernel.as_ref().is_none_or(|kernel| {
            !topmost.has_kernel_of(kernel) || topmost.root == kernel.root || (kernel.has_programs() && !has_programs)
        });
        if better {
            if self.kernel.is_none() {
                self.fresh.push_back(Subject::Kernel);
                // What is walked now for the first time need not be walked again at once.
                self.rebuild_began.get_or_insert(now);
            }
            self.kernel = Some(topmost);
        }
        if !has_programs {
            return;
        }
        match self.known.see(root, now) {
            Admission::Known => {}
            Admission::New(number) => {
                self.fresh.push_back(Subject::Space(number));
                if let Some(rebuild) = &mut self.rebuild {
                    rebuild.todo.push_back(Subject::Space(number));
                }
            }
            Admission::Refused => done.refused += 1,
        }
    }

    fn walk<S: TableSource>(
        &mut self,
        source: &mut S,
        meter: &mut Meter,
        now: Instant,
        done: &mut Done,
    ) -> Result<(), S::Error> {
        loop {
            if self.job.is_none() && !self.begin_job(source, meter, now, done)? {
                done.up_to_date = true;
                return Ok(());
            }
            let Some(mut job) = self.job.take() else { continue };
            match self.advance(&mut job, source, meter, done)? {
                Progress::Done => self.end_job(&job),
                Progress::Paused => {
                    self.job = Some(job);
                    return Ok(());
                }
            }
        }
    }

    /// Takes the next walk up; false if there is none to do now. There may be none although there are more, where what
    /// was to be walked is no more.
    fn begin_job<S: TableSource>(
        &mut self,
        source: &mut S,
        meter: &mut Meter,
        now: Instant,
        done: &mut Done,
    ) -> Result<bool, S::Error> {
        // Without a kernel half to compare with nobody can tell a root from other data.
        let Some(kernel) = &self.kernel else { return Ok(false) };
        let (subject, into_rebuild) = if let Some(subject) = self.fresh.pop_front() {
            (subject, false)
        } else if let Some(rebuild) = &mut self.rebuild {
            match rebuild.todo.pop_front() {
                Some(subject) => (subject, true),
                None => {
                    self.publish();
                    done.rebuilds += 1;
                    return Ok(true);
                }
            }
        } else {
            let is_due = |began| now.saturating_duration_since(began) >= REBUILD_INTERVAL;
            let is_due = self.rebuild_began.is_none_or(is_due);
            if is_due {
                self.begin_rebuild(now);
            }
            return Ok(is_due);
        };
        let (root, half) = match subject {
            Subject::Kernel => (kernel.root, Half::Upper),
            Subject::Space(number) => match self.known.space(number) {
                Some(space) => (space.root, Half::Lower),
                None => return Ok(true),
            },
        };
        // A page that was a root may be anything by now.
        let topmost = Topmost::read(source, meter, root)?.filter(|topmost| topmost.has_kernel_of(kernel));
        match (subject, topmost) {
            (Subject::Kernel, None) => {
                self.kernel = None;
                self.drop_rebuild();
                return Ok(false);
            }
            (Subject::Space(number), topmost) if topmost.as_ref().is_none_or(|topmost| !topmost.has_programs()) => {
                tracing::debug!(root = root.address, "an address space of the guest has ended");
                self.known.leave(number);
                return Ok(true);
            }
            (Subject::Kernel | Subject::Space(_), _) => {}
        }
        self.job = Some(Job {
            subject,
            walk: Walk::new(root, half, self.most_tables),
            into_rebuild,
            mapped_pages: 0,
            large_pages: 0,
            kept_pages: 0,
            new_pages: 0,
            distances: Distances::default(),
        });
        Ok(true)
    }

    fn advance<S: TableSource>(
        &mut self,
        job: &mut Job,
        source: &mut S,
        meter: &mut Meter,
        done: &mut Done,
    ) -> Result<Progress, S::Error> {
        let Self { physical, published, rebuild, direct_map, .. } = self;
        let (map, before): (&mut OwnerMap, Option<&OwnerMap>) = match rebuild {
            Some(rebuild) if job.into_rebuild => (&mut rebuild.map, Some(published)),
            Some(_) | None => (published, None),
        };
        let Job { subject, walk, mapped_pages, large_pages, kept_pages, new_pages, distances, .. } = job;
        let rejected_before = walk.rejected_tables();
        let mut compare = |slot: u8, number: u8, pages: u64| match slot {
            SHARED => {}
            slot if slot == number => *kept_pages += pages,
            _ => *new_pages += pages,
        };
        let progress = walk.advance(source, meter, |found| {
            let mapping = match found {
                Found::Table(address) => {
                    physical.runs(address, 1).for_each(|run| map.mark_kernel(run));
                    return;
                }
                Found::Mapping(mapping) => mapping,
            };
            for run in physical.runs(mapping.physical_address, mapping.bytes) {
                done.pages_seen += run.count;
                match *subject {
                    Subject::Space(number) if mapping.user => {
                        *mapped_pages += run.count;
                        *large_pages += if mapping.bytes > PAGE_BYTES { run.count } else { 0 };
                        match before {
                            // Most pages are small ones.
                            Some(before) if run.count == 1 => compare(before.slot(run.first), number, 1),
                            Some(before) => before.pieces(run).for_each(|(slot, run)| compare(slot, number, run.count)),
                            None => {}
                        }
                        map.mark_user(run, number, mapping.accessed);
                    }
                    Subject::Space(_) => map.mark_kernel(run),
                    Subject::Kernel => {
                        let distance = distance(&mapping);
                        distances.add(distance, run.count);
                        match *direct_map {
                            DirectMap::Unknown => {}
                            DirectMap::At(direct) if direct == distance => {}
                            DirectMap::At(_) | DirectMap::None => map.mark_kernel(run),
                        }
                    }
                }
            }
        });
        done.tables_rejected += walk.rejected_tables() - rejected_before;
        progress
    }

    fn end_job(&mut self, job: &Job) {
        if job.walk.is_truncated() {
            tracing::debug!(subject = ?job.subject, "page tables of the guest were not walked to the end: too many");
        }
        match job.subject {
            Subject::Kernel => self.end_kernel(job.distances.of_half(self.physical.total_pages())),
            Subject::Space(number) => {
                let owned_before = self.published.count(number);
                let is_another = job.into_rebuild
                    && owned_before.min(job.new_pages) >= TOO_FEW_PAGES
                    && job.kept_pages < owned_before / SAME_SPACE_PART;
                if is_another {
                    self.known.renew(number);
                }
                if let Some(space) = self.known.space_mut(number) {
                    space.mapped_pages = job.mapped_pages;
                    space.large_pages = job.large_pages;
                }
            }
        }
    }

    /// Takes over which distance the direct map has.
    fn end_kernel(&mut self, found: DirectMap) {
        match (self.direct_map, found) {
            (DirectMap::Unknown, found) => {
                // This walk has marked nothing yet.
                self.direct_map = found;
                self.fresh.push_front(Subject::Kernel);
            }
            (DirectMap::None | DirectMap::At(_), DirectMap::At(distance)) if found != self.direct_map => {
                // The guest was started anew: all of RAM was marked as the kernel's.
                self.direct_map = DirectMap::At(distance);
                self.drop_rebuild();
                self.rebuild_began = None;
            }
            // A walk that saw less than half of RAM was one through tables that changed.
            (DirectMap::None | DirectMap::At(_), DirectMap::Unknown | DirectMap::None | DirectMap::At(_)) => {}
        }
    }

    fn begin_rebuild(&mut self, now: Instant) {
        let map = self.spare.take().unwrap_or_else(|| OwnerMap::new(self.physical.total_pages()));
        let spaces = self.known.spaces().map(|(number, _)| Subject::Space(number));
        let todo = std::iter::once(Subject::Kernel).chain(spaces).collect();
        self.rebuild = Some(Rebuild { map, todo, left: self.known.left() });
        self.rebuild_began = Some(now);
    }

    fn publish(&mut self) {
        if let Some(mut rebuild) = self.rebuild.take() {
            std::mem::swap(&mut self.published, &mut rebuild.map);
            rebuild.map.clear();
            self.spare = Some(rebuild.map);
            for number in rebuild.left {
                self.known.release(number);
            }
        }
    }

    fn drop_rebuild(&mut self) {
        if let Some(mut rebuild) = self.rebuild.take() {
            rebuild.map.clear();
            self.spare = Some(rebuild.map);
        }
    }
}

fn distance(mapping: &Mapping) -> u64 {
    mapping.virtual_address.wrapping_sub(mapping.physical_address)
}

/// Finds the distance that most pages are mapped at, in a few counters: Misra and Gries, Finding repeated elements,
/// Science of Computer Programming 2(2), 1982. A distance is undercounted by a ninth of all pages at most.
#[derive(Debug, Clone, Default)]
struct Distances {
    counters: Vec<(u64, u64)>,
}

impl Distances {
    fn add(&mut self, distance: u64, mut pages: u64) {
        if let Some((_, count)) = self.counters.iter_mut().find(|(known, _)| *known == distance) {
            *count += pages;
            return;
        }
        while self.counters.len() == DISTANCES && pages > 0 {
            let least = self.counters.iter().map(|&(_, count)| count).fold(pages, u64::min);
            pages -= least;
            self.counters.iter_mut().for_each(|(_, count)| *count -= least);
            self.counters.retain(|&(_, count)| count > 0);
        }
        if pages > 0 {
            self.counters.push((distance, pages));
        }
    }

    /// The distance at which at least half of the guest's pages are mapped, if there is one.
    fn of_half(&self, total_pages: u64) -> DirectMap {
        let most = self.counters.iter().max_by_key(|&&(_, count)| count);
        most.filter(|&&(_, count)| count >= total_pages / 2).map_or(DirectMap::None, |&(at, _)| DirectMap::At(at))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use vmferry_core::pages::{AddressSpaceId, PageNumber, PageRun, RamBlock, RamLayout};

    use super::super::owners::{FIRST_SPACE, KERNEL, UNMAPPED};
    use super::super::paging::tests::{KERNEL_PAGE, NOT_ACCESSED, Tables, USER_PAGE, unlimited};
    use super::super::paging::{Levels, Root, TABLE_ENTRIES};
    use super::super::{FIRST_PROCESS, MAX_SPACES};
    use super::*;
    use crate::qemu::PhysicalRange;

    const RAM_PAGES: u64 = 32 * 512;
    const IDT: u64 = 0xffff_fe00_0000_0000;
    const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
    const IMAGE: u64 = 0xffff_ffff_8100_0000;
    /// Physical page of the kernel's image, of 16 pages.
    const IMAGE_PAGE: u64 = 0x100;
    /// Of the interrupt table.
    const IDT_PAGE: u64 = 0x200;
    /// The first page of what processes map; tables lie below.
    const PROGRAM_PAGES: u64 = 0x2000;

    /// A guest that is nothing but page tables.
    #[derive(Clone)]
    struct Guest {
        tables: Tables,
        kernel: Root,
        free: u64,
        next_root: u64,
    }

    impl Guest {
        fn new(levels: Levels, direct_map: u64) -> Self {
            let (kernel, free) = (Root { address: 0x40_0000, levels }, 0x40_1000);
            let mut guest = Self { tables: Tables::default(), kernel, free, next_root: 0x30_0000 };
            for large in 0..RAM_PAGES / 512 {
                guest.map(kernel, direct_map + (large << 21), large << 9, 2, KERNEL_PAGE);
            }
            for page in 0..16 {
                guest.map(kernel, IMAGE + (page << 12), IMAGE_PAGE + page, 1, KERNEL_PAGE);
            }
            guest.map(kernel, IDT, IDT_PAGE, 1, KERNEL_PAGE);
            guest.tables.tables.insert(IDT_PAGE << 12, [0; TABLE_ENTRIES]);
            guest
        }

        fn map(&mut self, root: Root, virtual_address: u64, page: u64, level: u32, flags: u64) {
            self.tables.map(root, virtual_address, page << 12, level, flags, &mut self.free);
        }

        /// A new process; its root is at an even page, as with page-table isolation.
        fn process(&mut self) -> Root {
            let root = Root { address: self.next_root, levels: self.kernel.levels };
            self.next_root += 0x2000;
            let mut table = self.tables.tables[&self.kernel.address];
            table[..TABLE_ENTRIES / 2].fill(0);
            self.tables.tables.insert(root.address, table);
            root
        }

        fn map_program(&mut self, root: Root, pages: std::ops::Range<u64>) {
            for page in pages {
                self.map(root, 0x5555_0000_0000 + (page << 12), page, 1, USER_PAGE);
            }
        }
    }

    fn running(root: Root) -> ProcessorState {
        let cr4 = if root.levels == Levels::Five { 1 << 12 } else { 0 };
        ProcessorState { cr0: 1 << 31, cr3: root.address, cr4, efer: 1 << 10, idt_address: IDT, management_mode: false }
    }

    fn survey() -> Survey {
        let layout = RamLayout::new(vec![RamBlock { id: "ram".into(), bytes: RAM_PAGES << 12 }]).unwrap();
        let range = PhysicalRange { start: 0, end: RAM_PAGES << 12, region: "ram".into(), offset: 0 };
        Survey::new(PhysicalMap::new(&layout, &[range]))
    }

    /// A survey with a clock of its own.
    struct Bench {
        survey: Survey,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { survey: survey(), now: Instant::now() }
        }

        fn refresh(&mut self, guest: &mut Guest, roots: &[Root], meter: &mut Meter) -> Done {
            let states: Vec<_> = roots.iter().copied().map(running).collect();
            self.survey.refresh(&states, &mut guest.tables, meter, self.now).unwrap()
        }

        fn see(&mut self, guest: &mut Guest, roots: &[Root]) -> Done {
            let done = self.refresh(guest, roots, &mut unlimited());
            assert!(done.up_to_date);
            done
        }

        /// Lets a rebuild become due.
        fn wait(&mut self) {
            self.now += REBUILD_INTERVAL;
        }

        fn slot(&self, page: u64) -> u8 {
            self.survey.owners().slot(PageNumber(page))
        }

        fn id(&self, page: u64) -> Option<AddressSpaceId> {
            let slot = self.slot(page);
            if slot <= SHARED { None } else { Some(self.survey.known().space(slot)?.id) }
        }

        fn owners(&self) -> Vec<u8> {
            (0..RAM_PAGES).map(|page| self.slot(page)).collect()
        }
    }

    #[test]
    fn pages_belong_to_who_maps_them() {
        for levels in [Levels::Four, Levels::Five] {
            let mut guest = Guest::new(levels, DIRECT_MAP);
            let (one, two) = (guest.process(), guest.process());
            guest.map_program(one, PROGRAM_PAGES..PROGRAM_PAGES + 100);
            guest.map_program(two, PROGRAM_PAGES + 99..PROGRAM_PAGES + 200);
            guest.map(one, 0x7000_0000_0000, PROGRAM_PAGES + 300, 1, NOT_ACCESSED);
            // A large page, and one that is not RAM.
            guest.map(two, 0x7000_4000_0000, PROGRAM_PAGES + 512, 2, USER_PAGE);
            guest.map(two, 0x7000_8000_0000, RAM_PAGES + 7, 1, USER_PAGE);
            // The kernel maps one of the pages, too; that makes it no less the process's.
            guest.map(guest.kernel, IMAGE + (100 << 12), PROGRAM_PAGES + 5, 1, KERNEL_PAGE);
            let mut bench = Bench::new();
            bench.see(&mut guest, &[one, two]);
            let check = |bench: &Bench| {
                assert_eq!(bench.id(PROGRAM_PAGES), Some(FIRST_PROCESS));
                assert_eq!(bench.id(PROGRAM_PAGES + 5), Some(FIRST_PROCESS));
                assert_eq!(bench.slot(PROGRAM_PAGES + 99), SHARED);
                assert_eq!(bench.id(PROGRAM_PAGES + 100), Some(AddressSpaceId(FIRST_PROCESS.0 + 1)));
                assert_eq!(bench.id(PROGRAM_PAGES + 1023), Some(AddressSpaceId(FIRST_PROCESS.0 + 1)));
                assert_eq!(bench.slot(PROGRAM_PAGES + 200), UNMAPPED, "in the direct map alone");
                assert_eq!(bench.slot(IMAGE_PAGE + 15), KERNEL);
                assert_eq!(bench.slot(IMAGE_PAGE + 16), UNMAPPED);
                for &table in guest.tables.tables.keys().filter(|&&table| table != guest.kernel.address) {
                    assert_eq!(bench.slot(table >> 12), KERNEL, "table {table:#x}");
                }
                let large = PageRun::new(PROGRAM_PAGES + 512, 512);
                assert_eq!(bench.survey.owners().accessed(), [PageRun::new(PROGRAM_PAGES, 200), large]);
            };
            check(&bench);
            bench.wait();
            bench.see(&mut guest.clone(), &[]);
            check(&bench);
            let known = bench.survey.known();
            let (one, two) = (known.space(FIRST_SPACE).unwrap(), known.space(FIRST_SPACE + 1).unwrap());
            assert_eq!((one.mapped_pages, one.large_pages), (101, 0));
            assert_eq!((two.mapped_pages, two.large_pages), (101 + 512, 512));
        }
    }

    #[test]
    fn what_is_unmapped_is_forgotten_by_the_next_rebuild_and_not_before() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let (one, two) = (guest.process(), guest.process());
        guest.map_program(one, PROGRAM_PAGES..PROGRAM_PAGES + 50);
        guest.map_program(two, PROGRAM_PAGES..PROGRAM_PAGES + 1);
        let mut bench = Bench::new();
        bench.see(&mut guest, &[one, two]);
        assert_eq!(bench.slot(PROGRAM_PAGES), SHARED);
        guest.map(two, 0x5555_0000_0000 + (PROGRAM_PAGES << 12), 0, 1, 0);
        guest.map(one, 0x5555_0000_0000 + ((PROGRAM_PAGES + 1) << 12), 0, 1, 0);
        bench.see(&mut guest, &[one, two]);
        assert_eq!(bench.slot(PROGRAM_PAGES), SHARED);
        assert_eq!(bench.id(PROGRAM_PAGES + 1), Some(FIRST_PROCESS));
        bench.wait();
        // Not a table more than it takes to look at the roots, and half a rebuild: the old map stands.
        bench.refresh(&mut guest, &[one, two], &mut Meter::new(None, 12));
        assert_eq!(bench.slot(PROGRAM_PAGES), SHARED);
        bench.see(&mut guest, &[]);
        assert_eq!(bench.id(PROGRAM_PAGES), Some(FIRST_PROCESS));
        assert_eq!(bench.slot(PROGRAM_PAGES + 1), UNMAPPED);
    }

    #[test]
    fn a_process_that_ended_leaves_and_its_root_is_not_trusted() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let roots: Vec<Root> = (0..3).map(|_| guest.process()).collect();
        for (number, &root) in roots.iter().enumerate() {
            let first = PROGRAM_PAGES + 100 * number as u64;
            guest.map_program(root, first..first + 100);
        }
        let mut bench = Bench::new();
        bench.see(&mut guest, &roots);
        // One has ended; the root of another is full of the third's data by now.
        guest.tables.tables.get_mut(&roots[0].address).unwrap()[..TABLE_ENTRIES / 2].fill(0);
        guest.tables.tables.insert(roots[1].address, [(PROGRAM_PAGES + 200) << 12 | 7; TABLE_ENTRIES]);
        bench.wait();
        bench.see(&mut guest, &[roots[2]]);
        assert_eq!(bench.slot(PROGRAM_PAGES), UNMAPPED);
        assert_eq!(bench.slot(PROGRAM_PAGES + 100), UNMAPPED);
        assert_eq!(bench.id(PROGRAM_PAGES + 200), Some(AddressSpaceId(FIRST_PROCESS.0 + 2)));
        assert_eq!(bench.survey.known().spaces().count(), 1);
        // Their numbers are free once no map holds them, and the ids are new.
        bench.wait();
        bench.see(&mut guest, &[roots[2]]);
        assert!(bench.survey.known().left().is_empty());
        let next = guest.process();
        guest.map_program(next, PROGRAM_PAGES..PROGRAM_PAGES + 20);
        bench.see(&mut guest, &[next]);
        assert_eq!(bench.slot(PROGRAM_PAGES), FIRST_SPACE);
        assert_eq!(bench.id(PROGRAM_PAGES), Some(AddressSpaceId(FIRST_PROCESS.0 + 3)));
    }

    #[test]
    fn a_root_that_was_used_again_gets_a_new_id() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let (one, other) = (guest.process(), guest.process());
        guest.map_program(one, PROGRAM_PAGES..PROGRAM_PAGES + 200);
        guest.map_program(other, PROGRAM_PAGES + 1000..PROGRAM_PAGES + 1100);
        // Both have a library, which is no sign of being the same.
        for root in [one, other] {
            guest.map_program(root, PROGRAM_PAGES + 2000..PROGRAM_PAGES + 2300);
        }
        let mut bench = Bench::new();
        bench.see(&mut guest, &[one, other]);
        bench.wait();
        // Much of its memory was freed and new memory taken: still the same.
        guest.tables.tables.get_mut(&one.address).unwrap()[..TABLE_ENTRIES / 2].fill(0);
        guest.map_program(one, PROGRAM_PAGES + 150..PROGRAM_PAGES + 400);
        guest.map_program(one, PROGRAM_PAGES + 2000..PROGRAM_PAGES + 2300);
        bench.see(&mut guest, &[one]);
        assert_eq!(bench.id(PROGRAM_PAGES + 350), Some(FIRST_PROCESS));
        bench.wait();
        guest.tables.tables.get_mut(&one.address).unwrap()[..TABLE_ENTRIES / 2].fill(0);
        guest.map_program(one, PROGRAM_PAGES + 600..PROGRAM_PAGES + 900);
        guest.map_program(one, PROGRAM_PAGES + 2000..PROGRAM_PAGES + 2300);
        bench.see(&mut guest, &[one]);
        assert_eq!(bench.id(PROGRAM_PAGES + 700), Some(AddressSpaceId(FIRST_PROCESS.0 + 2)));
        assert_eq!(bench.slot(PROGRAM_PAGES + 150), UNMAPPED);
        assert_eq!(bench.slot(PROGRAM_PAGES + 2000), SHARED);
    }

    #[test]
    fn the_two_roots_of_page_table_isolation_are_one_space() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let kernel_root = guest.process();
        guest.map_program(kernel_root, PROGRAM_PAGES..PROGRAM_PAGES + 50);
        let mut program = guest.tables.tables[&kernel_root.address];
        let idt_entry = TABLE_ENTRIES - 4;
        assert_ne!(program[idt_entry], 0);
        for (index, entry) in program.iter_mut().enumerate().skip(TABLE_ENTRIES / 2) {
            if index != idt_entry {
                *entry = 0;
            }
        }
        for entry in &mut guest.tables.tables.get_mut(&kernel_root.address).unwrap()[..TABLE_ENTRIES / 2] {
            *entry |= if *entry == 0 { 0 } else { 1 << 63 };
        }
        let program_root = Root { address: kernel_root.address | 0x1000, ..kernel_root };
        guest.tables.tables.insert(program_root.address, program);
        let mut bench = Bench::new();
        bench.see(&mut guest, &[program_root]);
        bench.see(&mut guest, &[kernel_root, program_root]);
        assert_eq!(bench.survey.known().spaces().count(), 1);
        assert_eq!(bench.id(PROGRAM_PAGES), Some(FIRST_PROCESS));
        assert_eq!(bench.slot(IMAGE_PAGE), KERNEL, "the kernel half is read through the kernel's root");
    }

    #[test]
    fn a_restarted_guest_is_a_new_one() {
        let mut guest = Guest::new(Levels::Five, DIRECT_MAP);
        let one = guest.process();
        guest.map_program(one, PROGRAM_PAGES..PROGRAM_PAGES + 50);
        let mut bench = Bench::new();
        let idle = guest.kernel;
        bench.see(&mut guest, &[one, idle]);
        let mut again = Guest::new(Levels::Four, DIRECT_MAP + (5 << 30));
        let two = again.process();
        again.map_program(two, PROGRAM_PAGES + 50..PROGRAM_PAGES + 100);
        bench.wait();
        bench.see(&mut again, &[two]);
        assert_eq!(bench.slot(PROGRAM_PAGES), UNMAPPED);
        assert_eq!(bench.id(PROGRAM_PAGES + 50), Some(AddressSpaceId(FIRST_PROCESS.0 + 1)));
        assert_eq!(bench.slot(IMAGE_PAGE), KERNEL);
        assert_eq!(bench.slot(PROGRAM_PAGES + 3000), UNMAPPED, "the direct map of the new kernel was found");
    }

    #[test]
    fn a_kernel_that_maps_not_all_of_ram_owns_what_it_maps() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let one = guest.process();
        // The root has the kernel half by reference: cut the direct map to a third.
        for large in RAM_PAGES / 512 / 3..RAM_PAGES / 512 {
            guest.map(guest.kernel, DIRECT_MAP + (large << 21), 0, 2, 0);
        }
        guest.map_program(one, PROGRAM_PAGES..PROGRAM_PAGES + 50);
        let mut bench = Bench::new();
        bench.see(&mut guest, &[one]);
        assert_eq!(bench.slot(1000), KERNEL);
        assert_eq!(bench.slot(RAM_PAGES - 1), UNMAPPED);
    }

    #[test]
    fn modes_that_cannot_be_read_are_told() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let one = guest.process();
        guest.map_program(one, PROGRAM_PAGES..PROGRAM_PAGES + 50);
        let now = Instant::now();
        let mut survey = survey();
        let mut refresh = |survey: &mut Survey, states: &[ProcessorState]| {
            survey.refresh(states, &mut guest.tables, &mut unlimited(), now)
        };
        let off = ProcessorState { cr0: 0x10, efer: 0, ..running(one) };
        let firmware = ProcessorState { management_mode: true, cr3: 0x7777_7000, ..running(one) };
        let legacy = ProcessorState { efer: 0, ..running(one) };
        assert!(refresh(&mut survey, &[]).unwrap().up_to_date);
        assert!(refresh(&mut survey, &[off, firmware]).unwrap().up_to_date);
        assert_eq!(refresh(&mut survey, &[off, legacy]), Err(SurveyError::Legacy));
        // Once a 64-bit system was seen, a processor that is still being started says nothing.
        assert!(refresh(&mut survey, &[legacy, running(one)]).is_ok());
        assert!(refresh(&mut survey, &[legacy]).is_ok());
        let nested = ProcessorState { cr3: 0x60_0000, ..running(one) };
        for _ in 1..MOST_IMPLAUSIBLE_REFRESHES {
            assert!(refresh(&mut survey, &[nested]).is_ok());
        }
        assert!(refresh(&mut survey, &[nested, running(one)]).is_ok(), "one that can be read is enough");
        for _ in 1..MOST_IMPLAUSIBLE_REFRESHES {
            assert!(refresh(&mut survey, &[nested]).is_ok());
        }
        let error = SurveyError::Implausible(MOST_IMPLAUSIBLE_REFRESHES);
        assert_eq!(refresh(&mut survey, &[nested, nested]), Err(error));
    }

    #[test]
    fn more_processes_than_places_are_refused_and_counted() {
        let mut guest = Guest::new(Levels::Four, DIRECT_MAP);
        let roots: Vec<Root> = (0..MAX_SPACES + 3).map(|_| guest.process()).collect();
        for (number, &root) in roots.iter().enumerate() {
            let first = PROGRAM_PAGES + 20 * number as u64;
            guest.map_program(root, first..first + 20);
        }
        let mut bench = Bench::new();
        let done = bench.see(&mut guest, &roots);
        assert_eq!(done.refused, 3);
        assert_eq!(bench.survey.known().spaces().count(), MAX_SPACES);
        assert_eq!(bench.slot(PROGRAM_PAGES + 20 * MAX_SPACES as u64), UNMAPPED);
    }

    #[test]
    fn the_commonest_distance_is_found_among_many() {
        let mut distances = Distances::default();
        for number in 0..1000 {
            distances.add(number, 1);
            distances.add(1 << 40, 3);
            distances.add(1_000_000 + number, 1);
        }
        assert_eq!(distances.of_half(4000), DirectMap::At(1 << 40));
        assert_eq!(distances.of_half(10_000), DirectMap::None);
        assert!(distances.counters.len() <= DISTANCES);
        assert_eq!(Distances::default().of_half(1000), DirectMap::None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// However little may be read at a time, the end is the same, and a page once owned stays so until a rebuild.
        #[test]
        fn small_steps_lead_to_the_same_map(
            pages in prop::collection::vec((0..4_usize, 0..600_u64), 1..200),
            steps in prop::collection::vec(6..40_u64, 1..8),
        ) {
            let mut guest = Guest::new(Levels::Five, DIRECT_MAP);
            let roots: Vec<Root> = (0..4).map(|_| guest.process()).collect();
            let mut users: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
            for (process, page) in pages {
                // Far apart, so that there are many tables.
                let address = (page % 37) << 33 | page << 12;
                guest.map(roots[process], address, PROGRAM_PAGES + page, 1, USER_PAGE);
                users.entry(page).or_default().push(process);
            }
            let mut whole = Bench::new();
            whole.see(&mut guest, &roots);
            let mut bench = Bench::new();
            let mut steps = steps.into_iter().cycle();
            let mut before = bench.owners();
            // The first walks, and a rebuild.
            for round in 0..2 {
                // Looking at the roots that run takes some reads, too, and they are made in any case.
                let (mut running, mut looks) = (&roots[..], 40);
                let mut refreshes = 0;
                loop {
                    let most = steps.next().unwrap() + looks;
                    let mut meter = Meter::new(None, most);
                    let done = bench.refresh(&mut guest, running, &mut meter);
                    prop_assert!(meter.tables_read <= most + 8, "{} of {}", meter.tables_read, most);
                    let owners = bench.owners();
                    prop_assert!(before.iter().zip(&owners).all(|(&old, &new)| old == UNMAPPED || new != UNMAPPED));
                    before = owners;
                    if done.up_to_date {
                        break;
                    }
                    (running, looks) = (&[], 0);
                    refreshes += 1;
                    prop_assert!(refreshes < 1000, "round {}", round);
                }
                prop_assert_eq!(bench.owners(), whole.owners());
                bench.wait();
            }
            // A process that maps nothing is not known.
            let known: BTreeSet<usize> = users.values().flatten().copied().collect();
            for (page, processes) in users {
                let alone = processes.iter().all(|&process| process == processes[0]);
                let place = known.iter().position(|&process| process == processes[0]).unwrap();
                let expected = if alone { FIRST_SPACE + place as u8 } else { SHARED };
                prop_assert_eq!(bench.slot(PROGRAM_PAGES + page), expected, "page {}", page);
            }
        }
    }
}
