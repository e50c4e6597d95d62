//! What scans report: every write, by whom- and however, and nothing lost.

mod track_support;

use std::fs;

use track_support::{Kind, PAGE, Ram, Vmm};
use vmferry_core::pages::PageRun;
use vmferry_host::track::{Region, TrackError, Tracker, create_own_userfaultfd, own_pagemap};

/// Sets a file under /proc or /sys while it lives.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// `None`, with a word about it, where the right or the feature is missing.
    fn set(path: &'static str, value: &str) -> Option<Self> {
        let before = fs::read_to_string(path).ok()?;
        // A choice shows all values, with the one that holds in brackets.
        let before = before.split(['[', ']']).nth(1).unwrap_or(before.trim()).to_owned();
        let setting = Self { path, before };
        match fs::write(path, value) {
            Ok(()) => Some(setting),
            Err(error) => {
                println!("NOT TESTED: {path} cannot be set to {value}: {error}");
                None
            }
        }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(self.path, &self.before);
    }
}

/// 16 huge pages more than there are, where the host has them to give.
fn huge_pages() -> Option<Setting> {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";
    let count = || fs::read_to_string(PATH).ok()?.trim().parse::<u64>().ok();
    let wanted = count()? + 16;
    let setting = Setting::set(PATH, &wanted.to_string())?;
    let reserved = count()?;
    if reserved < wanted {
        println!("NOT TESTED: the host has {reserved} huge pages to give, of {wanted}");
        return None;
    }
    Some(setting)
}

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Writers race with scans; after each, what was reported is copied. In the end the copy must be the memory.
fn nothing_is_lost(kind: Kind, pages: usize, epochs: usize) {
    let mut vmm = Vmm::start(kind, pages);
    vmm.process.order(&format!("writers 3 {pages}"));
    let mut tracker = vmm.attach().unwrap();
    let mut shadow: Vec<Vec<u64>> = (0..pages).map(|page| vmm.ram.page(page)).collect();
    let mut reported = 0;
    for epoch in 0..=epochs {
        if epoch == epochs {
            vmm.process.order("pause");
        }
        let mut written = Vec::new();
        if epoch % 3 == 2 {
            // The same guest in uneven pieces.
            let cut = 1 + epoch as u64 * 7 % (pages as u64 - 1);
            tracker.scan_run(PageRun::new(0, cut), &mut written).unwrap();
            tracker.scan_run(PageRun::new(cut, pages as u64 - cut), &mut written).unwrap();
        } else if epoch % 40 < 20 && epoch < epochs {
            // Hot pages are left out of these; all of them are hot here.
            tracker.scan_epoch(&mut written).unwrap();
        } else {
            tracker.scan(&mut written).unwrap();
        }
        for page in written.iter().flat_map(|run| run.pages()) {
            shadow[page.0 as usize] = vmm.ram.page(page.0 as usize);
            reported += 1;
        }
    }
    for (page, copy) in shadow.iter().enumerate() {
        assert_eq!(*copy, vmm.ram.page(page), "page {page} of {kind:?} was written and not reported");
    }
    let writes: u64 = vmm.process.ask("writes").parse().unwrap();
    assert!(writes > 0 && reported > 0);
    println!("{kind:?}: {writes} writes, {reported} pages reported in {epochs} epochs");
    // With the writers at rest, nothing is written.
    assert_eq!(Vmm::scan(&mut tracker), []);
    tracker.detach().unwrap();
}

#[test]
fn no_write_to_shared_memory_is_lost() {
    nothing_is_lost(Kind::Memfd, 4096, 300);
}

/// Only whole epochs, so that the cycle of hot pages runs undisturbed; the last scan is an exact one.
#[test]
fn no_write_is_lost_where_hot_pages_are_left_out() {
    let pages = 4096;
    let mut vmm = Vmm::start(Kind::Memfd, pages);
    vmm.process.order("writers 3 512");
    let mut tracker = vmm.attach().unwrap();
    let mut shadow: Vec<Vec<u64>> = (0..pages).map(|page| vmm.ram.page(page)).collect();
    for epoch in 0..400 {
        let last = epoch == 399;
        if last {
            vmm.process.order("pause");
        }
        let mut written = Vec::new();
        if last { tracker.scan(&mut written) } else { tracker.scan_epoch(&mut written) }.unwrap();
        for page in written.iter().flat_map(|run| run.pages()) {
            shadow[page.0 as usize] = vmm.ram.page(page.0 as usize);
        }
        if epoch % 16 == 5 {
            // As the engine does for pages that it is about to read.
            let mut written = Vec::new();
            tracker.scan_run(PageRun::new(epoch, 40), &mut written).unwrap();
            for page in epoch..epoch + 40 {
                shadow[page as usize] = vmm.ram.page(page as usize);
            }
        }
    }
    for (page, copy) in shadow.iter().enumerate() {
        assert_eq!(*copy, vmm.ram.page(page), "page {page} was written and not reported");
    }
    assert_eq!(Vmm::scan(&mut tracker), [], "an exact scan repeats nothing");
}

#[test]
fn hot_pages_are_reported_unseen_until_they_are_armed() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    let mut tracker = vmm.attach().unwrap();
    let mut epoch = |vmm: &mut Vmm, order: &str| {
        if !order.is_empty() {
            vmm.process.order(order);
        }
        let mut written = Vec::new();
        tracker.scan_epoch(&mut written).unwrap();
        written
    };
    let hot = PageRun::new(10, 4);
    assert_eq!(epoch(&mut vmm, "write 10 4"), [hot]);
    assert_eq!(epoch(&mut vmm, "write 10 4"), [hot]);
    // Written twice in a row: reported without being looked at, beside what is.
    assert_eq!(epoch(&mut vmm, ""), [hot]);
    assert_eq!(epoch(&mut vmm, "write 30 1"), [hot, PageRun::new(30, 1)]);
    // One of them is about to be read: it is armed, and looked at from then on. It was written since it was armed before,
    // which was in the first epoch.
    for expected in [vec![PageRun::new(11, 1)], vec![]] {
        let mut found = Vec::new();
        tracker.scan_run(PageRun::new(11, 1), &mut found).unwrap();
        assert_eq!(found, expected);
    }
    let epoch = |tracker: &mut Tracker| {
        let mut written = Vec::new();
        tracker.scan_epoch(&mut written).unwrap();
        written
    };
    assert_eq!(epoch(&mut tracker), [PageRun::new(10, 1), PageRun::new(12, 2)]);
    // An exact scan says once more what is not armed, and arms it.
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(10, 1), PageRun::new(12, 2)]);
    assert_eq!(Vmm::scan(&mut tracker), []);
    assert_eq!(epoch(&mut tracker), []);
}

#[test]
fn no_write_to_a_file_on_a_disk_is_lost() {
    nothing_is_lost(Kind::Disk, 2048, 100);
}

/// One test for all that needs huge pages, since the setting is the host's.
#[test]
fn hugetlbfs_is_tracked_by_the_huge_page() {
    let Some(_pages) = huge_pages() else { return };
    nothing_is_lost(Kind::Huge, 4 * 512, 100);

    let mut vmm = Vmm::start(Kind::Huge, 4 * 512);
    let mut tracker = vmm.attach().unwrap();
    assert_eq!(Vmm::scan(&mut tracker), []);
    vmm.process.order("write 700 1");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(512, 512)]);
    assert_eq!(Vmm::scan(&mut tracker), []);
    // The last quarter was never touched.
    vmm.process.order("write 1536 1");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(1536, 512)]);
    // A run is widened to what can be protected.
    vmm.process.order("write 700 1");
    let mut written = Vec::new();
    tracker.scan_run(PageRun::new(600, 1), &mut written).unwrap();
    assert_eq!(written, [PageRun::new(512, 512)]);
    // Written, and taken out of the page table before the scan comes. This a second pass has to find.
    for first in [512, 1536] {
        vmm.process.order(&format!("write {first} 1"));
        vmm.process.order(&format!("dontneed {first} 512"));
        assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(first, 512)]);
        assert_eq!(Vmm::scan(&mut tracker), []);
    }
    vmm.process.order("write 700 1");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(512, 512)]);
    tracker.detach().unwrap();
    assert_eq!(vmm.process.protected_mappings(), 0);
}

/// The story: a huge mapping of shared memory is reported as a whole, 512 pages for one written byte, and on kernels
/// before 2026 forgets its writes when it is taken out of the page table. Attaching splits it.
#[test]
fn transparent_huge_pages_are_tracked_by_the_small_page() {
    let huge_mapped = |vmm: &Vmm| {
        let smaps = vmm.process.proc_file("smaps");
        smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:")).any(|size| !size.trim().starts_with("0 "))
    };
    {
        let Some(_advise) = Setting::set(SHMEM_ENABLED, "advise") else { return };
        let mut vmm = Vmm::start(Kind::Thp, 4096);
        if !huge_mapped(&vmm) {
            println!("NOT TESTED: the kernel gave no huge pages");
            return;
        }
        let mut tracker = vmm.attach().unwrap();
        assert!(!huge_mapped(&vmm));
        assert_eq!(Vmm::scan(&mut tracker), []);
        vmm.process.order("write 700 1");
        assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(700, 1)]);
        // The last quarter was never touched, and does not become huge now.
        vmm.process.order("write 3500 1");
        assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(3500, 1)]);
        tracker.detach().unwrap();
        nothing_is_lost(Kind::Thp, 4096, 100);
    }
}

#[test]
fn a_scan_reports_exactly_what_was_written() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let mut tracker = vmm.attach().unwrap();
    assert_eq!(Vmm::scan(&mut tracker), []);
    vmm.process.order("write 7 3");
    vmm.process.order("write 9 2");
    vmm.process.order("write 512 512");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(7, 4), PageRun::new(512, 512)]);
    assert_eq!(Vmm::scan(&mut tracker), []);
    // Reading is not writing, also where there was nothing yet to read.
    vmm.process.order("read 0 4096");
    assert_eq!(Vmm::scan(&mut tracker), []);
    vmm.process.order("write 4000 96");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(4000, 96)]);
    // A scan of some pages leaves the others for later.
    vmm.process.order("write 100 100");
    let mut written = vec![PageRun::new(149, 1)];
    tracker.scan_run(PageRun::new(150, 10), &mut written).unwrap();
    assert_eq!(written, [PageRun::new(149, 1), PageRun::new(150, 10)]);
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(100, 50), PageRun::new(160, 40)]);
}

/// Asynchronous write protection delivers no fault, so a descriptor made for faults of user mode only sees the
/// kernel's writes as well.
#[test]
fn writes_by_the_kernel_are_seen() {
    for kind in [Kind::Memfd, Kind::Disk] {
        let mut vmm = Vmm::start(kind, 64);
        let mut tracker = vmm.attach().unwrap();
        // The second page was never touched before.
        for page in [5, 60] {
            let before = vmm.ram.page(page)[1];
            vmm.process.order(&format!("kernel {page}"));
            assert_eq!(vmm.ram.page(page)[1], before + 1);
            assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(page as u64, 1)]);
        }
    }
}

/// Written, and taken out of the page table before a scan comes: the reason for asking for `PAGE_IS_WRITTEN` alone, and
/// for markers everywhere. With 4 MiB whole page tables go, on kernels that free them.
#[test]
fn pages_that_are_unmapped_before_a_scan_are_still_written() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let mut tracker = vmm.attach().unwrap();
    for (first, count) in [(3, 5), (1024, 1024)] {
        vmm.process.order(&format!("write {first} {count}"));
        vmm.process.order(&format!("dontneed {first} {count}"));
        assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(first, count)]);
        // Unmapped again, now without having been written.
        vmm.process.order(&format!("read {first} {count}"));
        assert_eq!(Vmm::scan(&mut tracker), []);
    }
}

/// Not a promise but a fact to know: the contract says that to discard is not to write.
#[test]
fn a_discarded_page_is_written_only_if_it_was() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let mut tracker = vmm.attach().unwrap();
    vmm.process.order("write 5 1");
    vmm.process.order("punch 3 5");
    assert_eq!(vmm.ram.page(5), [0; PAGE / 8]);
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(5, 1)]);
    vmm.process.order("write 3 5");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(3, 5)]);
}

#[test]
fn several_regions_share_one_numbering() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let piece = |first: u64, at: u64, count: u64| Region {
        pages: PageRun::new(first, count),
        address: vmm.address + at * PAGE as u64,
    };
    // The RAM's second half comes first in the numbering; pages between are not tracked.
    let regions = vec![piece(2000, 0, 1000), piece(0, 2048, 2000)];
    let mut tracker = Tracker::attach(vmm.process.pid(), regions).unwrap();
    vmm.process.order("write 0 4096");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(0, 3000)]);
    vmm.process.order("write 0 1");
    vmm.process.order("write 4047 1");
    let mut written = Vec::new();
    tracker.scan_run(PageRun::new(1999, 2), &mut written).unwrap();
    assert_eq!(written, [PageRun::new(1999, 2)]);
}

#[test]
#[should_panic(expected = "page 64 of PageRun { first: PageNumber(63), count: 2 } is not tracked")]
fn only_tracked_pages_can_be_scanned() {
    let vmm = Vmm::start(Kind::Memfd, 64);
    let mut tracker = vmm.attach().unwrap();
    let _ = tracker.scan_run(PageRun::new(63, 2), &mut Vec::new());
}

#[test]
fn a_process_can_track_itself() {
    let file = fs::File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(64 * PAGE as u64).unwrap();
    let ram = Ram::of_file(&file, 64);
    let region = Region { pages: PageRun::new(0, 64), address: ram.address() as u64 };
    let mut tracker =
        Tracker::from_parts(create_own_userfaultfd().unwrap(), own_pagemap().unwrap(), vec![region]).unwrap();
    assert_eq!(tracker.attach_stop(), None);
    ram.word(9, 100).store(1, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(9, 1)]);
    tracker.detach().unwrap();
}

#[test]
fn a_vmm_that_goes_away_is_not_taken_for_a_quiet_one() {
    for order in ["kill", "exec"] {
        let mut vmm = Vmm::start(Kind::Memfd, 64);
        let mut tracker = vmm.attach().unwrap();
        if order == "kill" {
            vmm.process.kill();
        } else {
            // The line is closed by the exec, which is how we know of it.
            assert_eq!(vmm.process.ask("exec"), "");
        }
        assert!(matches!(tracker.scan(&mut Vec::new()), Err(TrackError::VmmExited)), "{order}");
        assert!(matches!(tracker.scan_run(PageRun::new(3, 1), &mut Vec::new()), Err(TrackError::VmmExited)));
        assert!(matches!(tracker.detach(), Err(TrackError::VmmExited)), "{order}");
    }
}

#[test]
fn a_region_that_is_remapped_is_an_error_that_loses_nothing() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let mut tracker = vmm.attach().unwrap();
    vmm.process.order("write 10 5");
    vmm.process.order("remap 2048 1");
    let mut written = Vec::new();
    match tracker.scan(&mut written) {
        Err(TrackError::RegionGone { address, pages }) => {
            assert_eq!((address, pages), (vmm.address, PageRun::new(0, 4096)));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(written, [PageRun::new(10, 5)], "protected again, so it must be told now");

    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let mut tracker = vmm.attach().unwrap();
    vmm.process.order("unmap 4095 1");
    assert!(matches!(tracker.scan(&mut Vec::new()), Err(TrackError::RegionGone { .. })));
}
