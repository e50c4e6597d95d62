//! The address spaces of real Linux guests, whose processes say by their pages' content which page is whose.

mod support;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use support::{PATIENCE, Recipe, VERSIONS, Vm};
use vmferry_core::pages::{AddressSpaceId, PAGE_BYTES, PageNumber, PageRun};
use vmferry_guest::{FILE_PAGES, NamedPage, PageOwner, Processes, SHARED_PAGES};
use vmferry_host::GuestMemory;
use vmferry_host::qemu::{QemuGuest, RamAccess, processor_state, processors};
use vmferry_host::spaces::paging::Levels;
use vmferry_host::spaces::{AddressSpaces, Cost, FIRST_PROCESS, KERNEL, SHARED, SpaceInfo, UNMAPPED};

const MEBIBYTES: u32 = 192;
/// What a migration would give a refresh, of an epoch of 50 ms.
const BUDGET: Duration = Duration::from_millis(2);
const PAGES_READ_AT_ONCE: u64 = 1024;
/// Linux tests its timer for some ticks at start, and gives up where a busy host lets the guest wait through them.
const TIMER_WORKS: &str = "no_timer_check";

/// A guest whose processes have filled their pages.
struct Guest {
    vm: Vm,
    qemu: QemuGuest,
    memory: GuestMemory,
    processes: Processes,
    /// What it said of its kernel's image.
    kernel: Vec<String>,
    spaces: AddressSpaces,
    total: Cost,
    refreshes: u32,
    longest: Duration,
}

impl Guest {
    fn start(recipe: Recipe, mebibytes: u32, parameters: &str, processes: Processes) -> Self {
        let mut vm = recipe.linux(mebibytes, &format!("{TIMER_WORKS} {processes} {parameters}")).start();
        let kernel = RefCell::new(Vec::new());
        let ready = vm.wait_line(|line| {
            if line.starts_with("vmferry-guest: kernel ") {
                kernel.borrow_mut().push(line.to_owned());
            }
            line.contains("processes ready") || line.contains("failed")
        });
        let huge_kib = if processes.huge { u64::from(processes.count) * processes.pages * 4 } else { 0 };
        assert!(ready.ends_with(&format!("huge={huge_kib}")), "{ready}");
        let mut qemu = vm.connect();
        let memory = GuestMemory::from_qemu(qemu.ram(RamAccess::Read).unwrap(), RamAccess::Read).unwrap();
        let spaces = AddressSpaces::attach(qemu.qmp(), &memory).unwrap();
        let (total, refreshes, longest) = (Cost::default(), 0, Duration::ZERO);
        let kernel = kernel.into_inner();
        Self { vm, qemu, memory, processes, kernel, spaces, total, refreshes, longest }
    }

    fn refresh(&mut self) {
        let cost = self.spaces.refresh(self.qemu.qmp(), &self.memory, BUDGET).unwrap();
        self.total += cost;
        self.refreshes += 1;
        self.longest = self.longest.max(cost.elapsed);
    }

    /// The spaces that have as many pages of their own as our processes.
    fn big_spaces(&self) -> Vec<SpaceInfo> {
        let spaces = self.spaces.spaces().into_iter();
        spaces.filter(|space| space.owned_pages >= self.processes.pages).collect()
    }

    /// Refreshes until all our processes are known, and once more in a whole rebuild.
    fn learn(&mut self) {
        let start = Instant::now();
        let mut rebuilds = u64::MAX;
        loop {
            self.refresh();
            if rebuilds == u64::MAX && self.big_spaces().len() == self.processes.count as usize {
                // The rebuild that may be under way now is not all new.
                rebuilds = self.total.rebuilds + 2;
            }
            if self.total.up_to_date && self.total.rebuilds >= rebuilds {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{:?} {:#?}", self.total, self.spaces.spaces());
        }
        let Cost { tables_read, pages_seen, .. } = self.total;
        let walking = self.total.elapsed - self.total.sampling;
        println!(
            "{} refreshes in {:?}, {:?} each, at most {:?}; sampling {:?} each; {tables_read} tables of {pages_seen} \
             pages, {:?} for each MiB mapped, {:?} a table; {} rejected, {} rebuilds, {} spaces",
            self.refreshes,
            start.elapsed(),
            self.total.elapsed / self.refreshes,
            self.longest,
            self.total.sampling / self.refreshes,
            walking.mul_f64(256.0 / pages_seen as f64),
            walking.div_f64(tables_read as f64),
            self.total.tables_rejected,
            self.total.rebuilds,
            self.total.spaces,
        );
    }

    /// Where each named page is.
    fn named_pages(&self) -> BTreeMap<PageOwner, BTreeMap<u64, PageNumber>> {
        let mut named: BTreeMap<PageOwner, BTreeMap<u64, PageNumber>> = BTreeMap::new();
        let total = self.memory.layout().total_pages();
        let mut buffer = vec![0; (PAGES_READ_AT_ONCE * PAGE_BYTES) as usize];
        let mut first = 0;
        while first < total {
            let run = PageRun::new(first, PAGES_READ_AT_ONCE.min(total - first));
            let bytes = &mut buffer[..(run.count * PAGE_BYTES) as usize];
            self.memory.read(run, bytes).unwrap();
            let (pages, _) = bytes.as_chunks::<{ PAGE_BYTES as usize }>();
            for (page, content) in run.pages().zip(pages) {
                if let Some(NamedPage { owner, index }) = NamedPage::parse(content) {
                    named.entry(owner).or_default().insert(index, page);
                }
            }
            first = run.end();
        }
        named
    }

    /// The id that at least 95 % of the pages have.
    fn common_owner(&self, what: &str, pages: &[PageNumber]) -> AddressSpaceId {
        let mut counts = BTreeMap::<AddressSpaceId, usize>::new();
        for &page in pages {
            *counts.entry(self.spaces.owner(page)).or_default() += 1;
        }
        let (&id, &count) = counts.iter().max_by_key(|&(_, &count)| count).unwrap();
        assert!(count * 100 >= pages.len() * 95, "{what}: {counts:?} of {} pages", pages.len());
        id
    }

    /// The pages of a part of the kernel's image. Its physical addresses are page numbers in a guest whose RAM is one
    /// block below 2 GiB.
    fn kernel_pages(&self, part: &str) -> PageRun {
        let line = self.kernel.iter().find(|line| line.contains(&format!("kernel {part} ")));
        let line = line.unwrap_or_else(|| panic!("no {part} in {:?}", self.kernel));
        let address = |name: &str| {
            let (_, rest) = line.split_once(name).unwrap();
            u64::from_str_radix(rest.split(' ').next().unwrap(), 16).unwrap()
        };
        let (first, last) = (address("first=") / PAGE_BYTES, address("last=") / PAGE_BYTES);
        PageRun::new(first, last - first + 1)
    }

    fn check_kernel(&self, part: &str) {
        let pages: Vec<PageNumber> = self.kernel_pages(part).pages().collect();
        assert_eq!(self.common_owner(part, &pages), KERNEL);
    }

    /// Checks what is known against what the pages say, and returns the processes' ids.
    fn check(&self) -> Vec<AddressSpaceId> {
        let named = self.named_pages();
        let pages = |owner| named[&owner].values().copied().collect::<Vec<_>>();
        let mut ids = Vec::new();
        for number in 0..self.processes.count {
            let pages = pages(PageOwner::Process(number));
            assert_eq!(pages.len() as u64, self.processes.pages);
            ids.push(self.common_owner(&format!("process {number}"), &pages));
        }
        assert!(ids.iter().all(|&id| id >= FIRST_PROCESS), "{ids:?}");
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
        let (shared, file) = (pages(PageOwner::Shared), pages(PageOwner::File));
        assert_eq!((shared.len() as u64, file.len() as u64), (SHARED_PAGES, FILE_PAGES));
        assert_eq!(self.common_owner("shared memory", &shared), SHARED);
        // Linux gives the parts of its image that it needs no more to everybody, and goes on mapping them, in pages of
        // 2 MiB. Behind the last part that it tells of there is a small heap of the early start.
        let (first, end) = (self.kernel_pages("code").first.0, self.kernel_pages("bss").end());
        let outside = |page: &PageNumber| page.0 < first || page.0 >= end.next_multiple_of(512) + 512;
        let file: Vec<PageNumber> = file.into_iter().filter(outside).collect();
        assert!(file.len() as u64 > FILE_PAGES / 4, "{} of the file's pages are outside of the image", file.len());
        assert_eq!(self.common_owner("a file that nobody maps", &file), UNMAPPED);
        self.check_accessed(&named);
        self.check_runs();
        ids
    }

    /// The first half of each process's pages is written all the time, the second was left alone since the process
    /// cleared its accessed bits.
    fn check_accessed(&self, named: &BTreeMap<PageOwner, BTreeMap<u64, PageNumber>>) {
        let accessed = self.spaces.accessed();
        let is_accessed = |page: PageNumber| {
            let after = accessed.partition_point(|run| run.first <= page);
            after > 0 && page.0 < accessed[after - 1].end()
        };
        for number in 0..self.processes.count {
            let pages = &named[&PageOwner::Process(number)];
            let active = self.processes.active_pages();
            let count = |indices: std::ops::Range<u64>| {
                indices.filter(|index| pages.get(index).is_some_and(|&page| is_accessed(page))).count() as u64
            };
            let (used, idle) = (count(0..active), count(active..self.processes.pages));
            let bound = active / 20;
            assert!(active - used <= bound && idle <= bound, "process {number}: {used} and {idle} of {active}");
        }
    }

    /// All ways to ask give the same answer.
    fn check_runs(&self) {
        let total = self.memory.layout().total_pages();
        let all = [PageRun::new(0, total / 2), PageRun::new(total / 2, total - total / 2)];
        let owned = self.spaces.owners(&all);
        let mut next = 0;
        for &(id, run) in &owned {
            assert_eq!(run.first.0, next);
            assert!([run.first.0, run.end() - 1].into_iter().all(|page| self.spaces.owner(PageNumber(page)) == id));
            next = run.end();
        }
        assert_eq!(next, total);
        let grouped = self.spaces.by_owner(&all);
        let pages = |runs: &[PageRun]| runs.iter().map(|run| run.count).sum::<u64>();
        for (id, runs) in &grouped {
            let expected: Vec<PageRun> = owned.iter().filter(|(owner, _)| owner == id).map(|&(_, run)| run).collect();
            assert_eq!(runs, &expected);
        }
        for space in self.spaces.spaces() {
            let runs = grouped.iter().find(|(id, _)| *id == space.id).map_or(&[][..], |(_, runs)| runs);
            assert_eq!(pages(runs), space.owned_pages, "{space:?}");
        }
    }
}

fn processes(huge: bool) -> Processes {
    Processes { count: 4, pages: 2048, huge }
}

#[test]
fn processes_kernel_and_page_cache_are_told_apart() {
    for version in VERSIONS {
        let wanted = processes(false);
        let mut guest = Guest::start(Recipe::new(version), MEBIBYTES, "", wanted);
        guest.learn();
        let ids = guest.check();
        // `-cpu max` has 57-bit addresses, and Linux uses them.
        assert!(guest.spaces.spaces().iter().all(|space| space.levels == Levels::Five));
        assert!(guest.big_spaces().iter().all(|space| space.large_pages == 0));
        // Not `bss`: a part of it that only encrypted guests use is given back.
        for part in ["code", "rodata", "data"] {
            guest.check_kernel(part);
        }
        for space in guest.spaces.spaces() {
            assert_eq!(guest.spaces.owner(space.root.unwrap()), KERNEL, "a page table");
        }
        // Ids stay, and so does the guest.
        guest.learn();
        assert_eq!(guest.check(), ids, "{version}");
        guest.vm.wait_line(|line| line.starts_with("vmferry-guest: tick"));
    }
}

#[test]
fn large_pages_and_four_levels_are_read() {
    for version in VERSIONS {
        let wanted = processes(true);
        let recipe = Recipe::new(version).extra(&["-cpu", "max,-la57"]);
        let mut guest = Guest::start(recipe, MEBIBYTES, "", wanted);
        guest.learn();
        guest.check();
        for space in guest.big_spaces() {
            assert_eq!((space.levels, space.large_pages), (Levels::Four, guest.processes.pages), "{version}");
        }
    }
}

#[test]
fn page_table_isolation_makes_no_second_space() {
    let wanted = processes(false);
    let recipe = Recipe::new("10.0").extra(&["-cpu", "max,-la57"]);
    let mut guest = Guest::start(recipe, MEBIBYTES, "pti=on", wanted);
    guest.learn();
    guest.check();
    guest.check_kernel("data");
    // Our processes and the first one.
    let known = guest.spaces.spaces();
    assert!(known.len() <= 5, "{known:#?}");
}

#[test]
fn ram_above_4_gib_is_found() {
    let wanted = processes(false);
    // q35 leaves 2 GiB below; the rest is moved above, where Linux takes memory first.
    // The kernel's image, which Linux puts anywhere otherwise, stays below: above, its addresses are no page numbers.
    let mut guest = Guest::start(Recipe::new("7.2"), 3072, "nokaslr", wanted);
    guest.learn();
    guest.check();
    let moved = guest.named_pages()[&PageOwner::Process(0)].values().filter(|page| page.0 >= 2 << 18).count();
    assert!(moved as u64 > guest.processes.pages / 2, "{moved} pages are above, which is what this test is about");
}

#[test]
fn many_processors_are_asked_in_turn() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).extra(&["-smp", "20"]).start();
        vm.wait_firmware();
        let mut qemu = vm.connect();
        let numbers = processors(qemu.qmp()).unwrap();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>(), "{version}");
        for number in numbers {
            let state = processor_state(qemu.qmp(), number, PATIENCE).unwrap().unwrap();
            assert_ne!(state.cr0, 0, "{version}: no processor has all bits of CR0 clear, {number} least of all");
        }
        assert_eq!(processor_state(qemu.qmp(), 20, PATIENCE).unwrap(), None, "{version}");
        let memory = GuestMemory::from_qemu(qemu.ram(RamAccess::Read).unwrap(), RamAccess::Read).unwrap();
        let mut spaces = AddressSpaces::attach(qemu.qmp(), &memory).unwrap();
        // With enough time all are asked, and with none one is, unless QEMU was late.
        assert_eq!(spaces.refresh(qemu.qmp(), &memory, PATIENCE).unwrap().processors, 20, "{version}");
        let start = Instant::now();
        loop {
            let asked = spaces.refresh(qemu.qmp(), &memory, Duration::ZERO).unwrap().processors;
            assert!(asked <= 1, "{version}: {asked}");
            if asked == 1 {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{version}");
        }
    }
}

#[test]
fn a_guest_without_paging_has_no_spaces_and_is_no_failure() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        vm.wait_firmware();
        let mut qemu = vm.connect();
        let memory = GuestMemory::from_qemu(qemu.ram(RamAccess::Read).unwrap(), RamAccess::Read).unwrap();
        let mut spaces = AddressSpaces::attach(qemu.qmp(), &memory).unwrap();
        let cost = spaces.refresh(qemu.qmp(), &memory, PATIENCE).unwrap();
        assert_eq!((cost.processors, cost.spaces, cost.tables_read, cost.up_to_date), (2, 0, 0, true), "{version}");
        let all = PageRun::new(0, memory.layout().total_pages());
        assert_eq!(spaces.owners(&[all]), [(UNMAPPED, all)]);
        assert!(spaces.accessed().is_empty());
    }
}
