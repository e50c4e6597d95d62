//! Which pages of guest RAM another process wrote, found from outside, without a patch or a restart of that process.
//!
//! Write-protect state belongs to the page tables of the process that writes: a userfaultfd of ours on our own mapping
//! of the same shared memory sees none of the guest's writes. So the descriptor is created inside the VMM
//! (`inject`), taken out, and used from here:
//!
//! ```text
//!   attach ── userfaultfd made in the VMM, taken out, closed there ── register ── arm: protect every page
//!     │
//!     ├─ scan ─ PAGEMAP_SCAN: report what was written and protect it again, in one step under the page table's lock
//!     ├─ scan …
//!     │
//!   detach (or drop, or our death) ── the kernel lifts all protection
//! ```
//!
//! In asynchronous mode the kernel itself resolves a write to a protected page: it clears the protection and goes on.
//! No fault is ever delivered, so the VMM never waits for us, whatever becomes of us.
//!
//! # The contract
//! - A page that is written before, during or after a [`scan`](Tracker::scan) is reported by that scan or a later one.
//!   It is never lost. A page may be reported without having been written.
//! - What was written before [`Tracker::attach`] returned is not reported: the caller takes all pages as written then.
//! - What a scan has reported is the caller's debt: the tracker will not say it again. This holds for an error too: the
//!   pages found before it are in the list.
//! - To discard is not to write. A page whose content the VMM gives up (a hole punched into the file by the balloon or
//!   by free page reporting) need not be reported, and reads as zero from then on. The guest has said that it does not
//!   care for the content; QEMU's own dirty bitmap does not see it either. A comparison of both sides' memory has to
//!   know this.
//!
//! # What it does not see
//! Writes by other processes (vhost-user back ends need a tracker each; so does a forked child of the VMM), by devices
//! (VFIO), and through the file itself (`write(2)` on the RAM's file). In-kernel vhost, KVM and system calls of the VMM
//! write through the VMM's page tables and are seen.
//!
//! # Why holes matter
//! Scans ask for exactly `PAGE_IS_WRITTEN`, in and out. For this mask the kernel takes a path on which an empty entry
//! of a page table counts as written. That is what makes reclaim safe: when memory pressure takes a page that was
//! written but not yet scanned out of the VMM's page table, what is left is an empty entry, while a protected page
//! leaves a marker. For this to say anything, no entry may be empty to begin with: arming puts markers
//! (`WP_UNPOPULATED`) into all of them, at the price of the page tables (8 bytes per page of RAM, which a guest that
//! touched its RAM has anyway). It follows that a page that was never touched costs nothing in a scan, that reading it
//! does not make it "written", and that no transparent huge page is mapped while tracking lasts: huge mappings are
//! split at the start, so that one written byte makes one page dirty and not 512.
//!
//! Where the fast path does not see holes (on hugetlbfs; where a whole page table is gone, on kernels before 2026), a
//! second pass looks for what is neither mapped nor marked. hugetlbfs cannot be split: one written byte there reports
//! its whole huge page.

mod error;
mod hold;
mod inject;
mod probe;
mod procfs;
pub(crate) mod sys;

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vmferry_core::pages::{MAX_BLOCKS, PAGE_BYTES, PageRun, ScanCycle};

pub use error::TrackError;
pub(crate) use hold::HeldThreads;
pub use probe::{KernelSupport, create_own_userfaultfd, own_pagemap, probe};

use probe::DIRECTORY_BYTES;
use sys::{PageRegion, ScanQuery};

/// How many regions of written pages one ioctl may return.
const BUFFER_REGIONS: usize = 8192;
/// The huge page sizes of hugetlbfs on x86-64, largest first.
const HUGE_PAGE_BYTES: [u64; 2] = [1 << 30, 2 << 20];
/// How much one ioctl protects. While it runs, the VMM can map and unmap nothing.
const PROTECT_BYTES: u64 = 1 << 30;

/// Report what was written and protect it again.
const WRITTEN_AND_PROTECT: ScanQuery = ScanQuery {
    flags: sys::PM_SCAN_WP_MATCHING | sys::PM_SCAN_CHECK_WPASYNC,
    category_inverted: 0,
    category_mask: sys::PAGE_IS_WRITTEN,
    return_mask: sys::PAGE_IS_WRITTEN,
};
/// Report what was written.
const WRITTEN: ScanQuery = ScanQuery { flags: sys::PM_SCAN_CHECK_WPASYNC, ..WRITTEN_AND_PROTECT };
/// Protect everything.
const PROTECT_ALL: ScanQuery = ScanQuery { category_mask: 0, return_mask: 0, ..WRITTEN_AND_PROTECT };
/// Report what is not mapped and bears no marker.
const HOLES: ScanQuery = ScanQuery {
    flags: sys::PM_SCAN_CHECK_WPASYNC,
    category_inverted: sys::PAGE_IS_PRESENT | sys::PAGE_IS_SWAPPED,
    category_mask: sys::PAGE_IS_PRESENT | sys::PAGE_IS_SWAPPED,
    return_mask: 0,
};
/// Report every address that is memory of the process, touched or not.
const MAPPED: ScanQuery = ScanQuery { flags: 0, category_inverted: 0, category_mask: 0, return_mask: 0 };
/// Report every address that is registered for asynchronous write protection.
const REGISTERED: ScanQuery = ScanQuery { category_mask: sys::PAGE_IS_WPALLOWED, ..MAPPED };

/// A run of guest pages, and where the VMM has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// The pages.
    pub pages: PageRun,
    /// The address in the VMM at which they are mapped, one after the other. A multiple of the page size.
    pub address: u64,
}

impl Region {
    const fn bytes(&self) -> u64 {
        self.pages.count * PAGE_BYTES
    }

    const fn end_address(&self) -> u64 {
        self.address + self.bytes()
    }

    const fn address_of(&self, page: u64) -> u64 {
        self.address + (page - self.pages.first.0) * PAGE_BYTES
    }

    /// The pages at the addresses `start .. end` of this region.
    const fn pages_at(&self, start: u64, end: u64) -> PageRun {
        PageRun::new(self.pages.first.0 + (start - self.address) / PAGE_BYTES, (end - start) / PAGE_BYTES)
    }
}

/// Whether we may track the writes of process `pid`: the kernel can, we have the right to trace it, and nobody else
/// does. The process is not touched.
///
/// # Errors
/// [`TrackError`] says what stands against it.
pub fn check(pid: u32) -> Result<(), TrackError> {
    probe()?;
    procfs::Target::open(pid)?.check_traceable()
}

/// What one scan found and cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanStats {
    /// Pages reported as written.
    pub pages: u64,
    /// How many times the kernel was asked.
    pub ioctls: u64,
    /// How long the scan took.
    pub duration: Duration,
}

/// A region under tracking.
#[derive(Clone, Copy)]
struct Tracked {
    region: Region,
    /// The smallest piece that can be protected, in bytes.
    granule_bytes: u64,
    /// Whether the scan itself reports holes. Otherwise a second pass looks for them.
    reports_holes: bool,
}

/// Tracks the writes of one process to the regions it was given. See the [module](self) for the contract.
pub struct Tracker {
    uffd: OwnedFd,
    pagemap: OwnedFd,
    /// By page number, ascending.
    regions: Vec<Tracked>,
    cycle: ScanCycle,
    /// All zero between scans, so that after an error what the kernel filled in can be told from what it did not.
    buffer: Vec<PageRegion>,
    attach_stop: Option<Duration>,
    detached: bool,
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let regions: Vec<_> = self.regions.iter().map(|tracked| tracked.region).collect();
        f.debug_struct("Tracker").field("regions", &regions).field("attach_stop", &self.attach_stop).finish()
    }
}

impl Tracker {
    /// Begins to track the writes of process `pid`, any process that we may trace.
    ///
    /// One thread of the VMM is stopped for a fraction of a millisecond ([`Tracker::attach_stop`]); its registers, its
    /// signals, the system call it waits in, its text and its descriptors are as before when it goes on. From then on
    /// the VMM holds nothing of ours: if this process dies, the kernel ends the tracking.
    ///
    /// # Errors
    /// [`TrackError`] says what stands against it. The VMM goes on in every case.
    pub fn attach(pid: u32, regions: Vec<Region>) -> Result<Self, TrackError> {
        let regions = checked(regions)?;
        probe()?;
        let target = procfs::Target::open(pid)?;
        let injected = inject::userfaultfd_of(&target, &mut |_| ())?;
        let pagemap = target.thread_file(injected.tid, "pagemap")?;
        tracing::debug!(pid, stop_us = injected.stop.as_micros(), "took a userfaultfd out of the VMM");
        Self::start(injected.uffd, pagemap, regions, Some(injected.stop))
    }

    /// Begins to track the process that both descriptors belong to: a userfaultfd on which nothing was done yet
    /// ([`create_own_userfaultfd`]) and its open `/proc/PID/pagemap` ([`own_pagemap`]). For a VMM that embeds vmferry,
    /// or hands the two over itself. No right is needed.
    ///
    /// # Errors
    /// [`TrackError`], of those that do not concern the way into another process.
    pub fn from_parts(uffd: OwnedFd, pagemap: OwnedFd, regions: Vec<Region>) -> Result<Self, TrackError> {
        let regions = checked(regions)?;
        probe()?;
        Self::start(uffd, pagemap, regions, None)
    }

    /// How long [`Tracker::attach`] kept one thread of the VMM stopped, at most; `None` after
    /// [`Tracker::from_parts`], which stops nothing.
    pub fn attach_stop(&self) -> Option<Duration> {
        self.attach_stop
    }

    /// Ends an epoch: appends the pages written since the last scan to `written`, and protects them again.
    ///
    /// The runs appended are ascending, do not overlap, and are as long as they can be.
    ///
    /// # Errors
    /// [`TrackError::VmmExited`], [`TrackError::RegionGone`] or [`TrackError::Host`]. The pages found before the error
    /// are in `written` and will not be reported again.
    pub fn scan(&mut self, written: &mut Vec<PageRun>) -> Result<ScanStats, TrackError> {
        self.cycle.reset();
        self.scan_fully(written, &[])
    }

    /// As [`Tracker::scan`], but pages that the guest writes all the time may be reported as written without being
    /// looked at, and left unprotected, so that it does not pay a fault for each of them in each epoch. A page may be
    /// reported in excess for some epochs after it was last written, and once more by the scan that protects it again.
    ///
    /// # Errors
    /// As [`Tracker::scan`].
    pub fn scan_epoch(&mut self, written: &mut Vec<PageRun>) -> Result<ScanStats, TrackError> {
        let Some(skipped) = self.cycle.skipped() else {
            let (before, not_armed) = (written.len(), self.cycle.not_armed());
            let stats = self.scan_fully(written, &not_armed).inspect_err(|_| self.cycle.reset())?;
            // On huge pages one page found stands for all of its huge page: nothing is gained by leaving it out.
            let coarse: Vec<PageRun> =
                self.regions.iter().filter(|t| t.granule_bytes > PAGE_BYTES).map(|t| t.region.pages).collect();
            let fine =
                |run: PageRun| coarse.iter().all(|pages| run.end() <= pages.first.0 || pages.end() <= run.first.0);
            self.cycle.learn(&written[before..], fine);
            return Ok(stats);
        };
        self.cycle.next_epoch();
        self.scan_with(written, |tracker, found, stats| {
            found.extend_from_slice(&skipped);
            (0..tracker.regions.len()).try_for_each(|index| {
                let gaps = tracker.regions[index].region.pages.without(&skipped);
                gaps.into_iter().try_for_each(|gap| tracker.scan_region(index, gap, found, stats))
            })
        })
    }

    /// All pages, of which some are not protected again where they were written: a later scan finds them written in any case.
    fn scan_fully(&mut self, written: &mut Vec<PageRun>, not_armed: &[PageRun]) -> Result<ScanStats, TrackError> {
        self.scan_with(written, |tracker, found, stats| {
            (0..tracker.regions.len()).try_for_each(|index| {
                let Tracked { region, granule_bytes, reports_holes } = tracker.regions[index];
                if granule_bytes > PAGE_BYTES || !reports_holes {
                    return tracker.scan_region(index, region.pages, found, stats);
                }
                let armed = region.pages.without(not_armed);
                for &run in &armed {
                    tracker.scan_region(index, run, found, stats)?;
                }
                let looked_at = region.pages.without(&armed);
                looked_at.into_iter().try_for_each(|run| tracker.query(WRITTEN, region, run, found, stats))
            })
        })
    }

    /// As [`Tracker::scan`], for the pages of `run` only. On hugetlbfs the run is widened to whole huge pages.
    ///
    /// # Errors
    /// As [`Tracker::scan`].
    ///
    /// # Panics
    /// If a page of the run is in no tracked region.
    pub fn scan_run(&mut self, run: PageRun, written: &mut Vec<PageRun>) -> Result<ScanStats, TrackError> {
        let mut pieces = Vec::new();
        let mut next = run.first.0;
        for (index, tracked) in self.regions.iter().enumerate() {
            let pages = tracked.region.pages;
            let first = next.max(pages.first.0);
            let end = run.end().min(pages.end());
            if first == next && first < end {
                pieces.push((index, PageRun::new(first, end - first)));
                next = end;
            }
        }
        assert!(next >= run.end(), "page {next} of {run:?} is not tracked");
        self.cycle.armed(run);
        self.scan_with(written, |tracker, found, stats| {
            pieces.into_iter().try_for_each(|(index, piece)| tracker.scan_region(index, piece, found, stats))
        })
    }

    /// Ends the tracking and leaves the VMM's memory as if it had never been. Dropping the tracker does the same.
    ///
    /// # Errors
    /// [`TrackError::VmmExited`] if there is no VMM any more. [`TrackError::Host`] if a region could not be released
    /// by itself; closing the descriptor, which happens in any case, releases it.
    pub fn detach(mut self) -> Result<(), TrackError> {
        match self.release() {
            Ok(()) => Ok(()),
            Err(_) if !self.vmm_lives()? => Err(TrackError::VmmExited),
            Err(source) => Err(TrackError::Host { what: "UFFDIO_UNREGISTER", source }),
        }
    }

    fn start(
        uffd: OwnedFd,
        pagemap: OwnedFd,
        regions: Vec<Region>,
        attach_stop: Option<Duration>,
    ) -> Result<Self, TrackError> {
        sys::uffdio_api(uffd.as_fd(), probe::FEATURES)
            .map_err(|source| TrackError::Host { what: "UFFDIO_API", source })?;
        let buffer = vec![PageRegion::default(); BUFFER_REGIONS];
        let cycle = ScanCycle::new(regions.iter().map(|region| region.pages.end()).max().unwrap_or(0));
        let tracked = Vec::with_capacity(regions.len());
        let mut tracker = Self { uffd, pagemap, regions: tracked, cycle, buffer, attach_stop, detached: false };
        for region in regions {
            tracker.register(region)?;
        }
        for index in 0..tracker.regions.len() {
            tracker.arm(index)?;
        }
        tracker.check_regions()?;
        Ok(tracker)
    }

    fn register(&mut self, region: Region) -> Result<(), TrackError> {
        let (address, bytes) = (region.address, region.bytes());
        if let Some(gap) = self.gap_in(region)? {
            return Err(TrackError::RegionNotMapped { address, bytes, gap });
        }
        let ioctls = sys::uffdio_register(self.uffd.as_fd(), address, bytes, sys::UFFDIO_REGISTER_MODE_WP).map_err(
            |source| match source {
                Errno::BUSY => TrackError::RegionTaken { address },
                Errno::INVAL | Errno::PERM => TrackError::NotProtectable { address, bytes, source },
                source => TrackError::Host { what: "UFFDIO_REGISTER", source },
            },
        )?;
        // Only hugetlbfs cannot take zero pages. Which of its page sizes a region has does not matter: a granule that
        // is too large costs a wider scan of a run, and nothing else.
        let huge = ioctls & sys::RANGE_HAS_ZEROPAGE == 0;
        let divides = |size: &&u64| address.is_multiple_of(**size) && bytes.is_multiple_of(**size);
        let granule_bytes = HUGE_PAGE_BYTES.iter().find(divides).copied().filter(|_| huge).unwrap_or(PAGE_BYTES);
        let reports_holes = !huge && probe()?.reports_holes;
        self.regions.push(Tracked { region, granule_bytes, reports_holes });
        Ok(())
    }

    /// The first address of the region that is no memory of the process.
    fn gap_in(&mut self, region: Region) -> Result<Option<u64>, TrackError> {
        let mut mapped = Vec::new();
        self.query(MAPPED, region, region.pages, &mut mapped, &mut ScanStats::default())?;
        let mut next = region.pages.first.0;
        for run in mapped {
            if run.first.0 != next {
                break;
            }
            next = run.end();
        }
        Ok((next < region.pages.end()).then(|| region.address_of(next)))
    }

    /// Protects every page for the first time. What is written so far is for the caller to know.
    fn arm(&mut self, index: usize) -> Result<(), TrackError> {
        let Tracked { region, granule_bytes, .. } = self.regions[index];
        if granule_bytes == PAGE_BYTES {
            // To protect a part of a huge mapping is to split it. The page table that takes its place holds a marker
            // at least, and does not become a huge mapping again.
            let mut block = region.address.next_multiple_of(DIRECTORY_BYTES);
            while block + DIRECTORY_BYTES <= region.end_address() {
                self.protect_mapped(region, block, block + PAGE_BYTES)?;
                block += DIRECTORY_BYTES;
            }
        }
        let mut at = region.address;
        while at < region.end_address() {
            let end = region.end_address().min(at + PROTECT_BYTES);
            self.protect_mapped(region, at, end)?;
            at = end;
        }
        let mut holes = Vec::new();
        self.query(HOLES, region, region.pages, &mut holes, &mut ScanStats::default())?;
        holes.into_iter().try_for_each(|hole| self.mark_hole(region, hole))
    }

    fn protect_mapped(&self, region: Region, start: u64, end: u64) -> Result<(), TrackError> {
        let answer = sys::pagemap_scan(self.pagemap.as_fd(), PROTECT_ALL, start, end, &mut []);
        match answer.result {
            // Without a buffer there is nothing that could fill up: one call walks the whole range.
            Ok(_) => Ok(()),
            Err(Errno::PERM | Errno::SRCH) => Err(self.gone(region)),
            Err(source) => Err(TrackError::Host { what: "PAGEMAP_SCAN", source }),
        }
    }

    /// Protects pages that are not mapped.
    fn mark_hole(&self, region: Region, hole: PageRun) -> Result<(), TrackError> {
        let end = region.address_of(hole.end());
        let mut at = region.address_of(hole.first.0);
        while at < end {
            let bytes = PROTECT_BYTES.min(end - at);
            sys::uffdio_writeprotect(self.uffd.as_fd(), at, bytes).map_err(|source| match source {
                Errno::NOENT | Errno::SRCH => self.gone(region),
                source => TrackError::Host { what: "UFFDIO_WRITEPROTECT", source },
            })?;
            at += bytes;
        }
        Ok(())
    }

    /// Runs `scan`, and puts what it found, also before an error, in order at the end of `written`.
    fn scan_with(
        &mut self,
        written: &mut Vec<PageRun>,
        scan: impl FnOnce(&mut Self, &mut Vec<PageRun>, &mut ScanStats) -> Result<(), TrackError>,
    ) -> Result<ScanStats, TrackError> {
        let begun = Instant::now();
        let mut stats = ScanStats::default();
        let mut found = Vec::new();
        let outcome = scan(self, &mut found, &mut stats);
        merge(&mut found);
        stats.pages = found.iter().map(|run| run.count).sum();
        written.append(&mut found);
        outcome?;
        // After the scan: one that found nothing because there was nothing left to look at must not pass for a quiet
        // epoch.
        self.check_regions()?;
        stats.duration = begun.elapsed();
        Ok(stats)
    }

    fn scan_region(
        &mut self,
        index: usize,
        pages: PageRun,
        found: &mut Vec<PageRun>,
        stats: &mut ScanStats,
    ) -> Result<(), TrackError> {
        let tracked = &self.regions[index];
        let region = tracked.region;
        // Pages of the region, widened to whole granules. A region is made of whole granules, or the kernel would not
        // have registered it.
        let granule_pages = tracked.granule_bytes / PAGE_BYTES;
        let offset = pages.first.0 - region.pages.first.0;
        let first = offset - offset % granule_pages;
        let end = (offset + pages.count).next_multiple_of(granule_pages).min(region.pages.count);
        let pages = PageRun::new(region.pages.first.0 + first, end - first);
        let reports_holes = tracked.reports_holes;
        self.query(WRITTEN_AND_PROTECT, region, pages, found, stats)?;
        if reports_holes {
            return Ok(());
        }
        let mut holes = Vec::new();
        let outcome = self.query(HOLES, region, pages, &mut holes, stats);
        found.extend_from_slice(&holes);
        outcome?;
        // What is written there between the two calls is in memory before the caller, who has been told of the page,
        // reads it.
        holes.into_iter().try_for_each(|hole| self.mark_hole(region, hole))
    }

    /// Asks for some pages of a region until the kernel has walked them all. What is found is appended to `found`,
    /// also what was found before an error.
    fn query(
        &mut self,
        query: ScanQuery,
        region: Region,
        pages: PageRun,
        found: &mut Vec<PageRun>,
        stats: &mut ScanStats,
    ) -> Result<(), TrackError> {
        let end = region.address_of(pages.end());
        let mut at = region.address_of(pages.first.0);
        // Each call gets further, by a full buffer at least or to the end: this is the limit of the loop.
        while at < end {
            let answer = sys::pagemap_scan(self.pagemap.as_fd(), query, at, end, &mut self.buffer);
            stats.ioctls += 1;
            // The kernel tells no number after an error, but may have protected and reported pages before it.
            for entry in self.buffer.iter_mut().take_while(|entry| entry.end > entry.start) {
                push(found, region.pages_at(entry.start, entry.end));
                *entry = PageRegion::default();
            }
            match answer.result {
                Ok(_) if answer.walk_end > at => at = answer.walk_end,
                Ok(_) => return Err(TrackError::Host { what: "PAGEMAP_SCAN (it does not go on)", source: Errno::IO }),
                Err(Errno::PERM | Errno::SRCH) => return Err(self.gone(region)),
                Err(source) => return Err(TrackError::Host { what: "PAGEMAP_SCAN", source }),
            }
        }
        Ok(())
    }

    /// Both ends of each region are still under write protection, so the process and its mappings are there.
    ///
    /// A scan over nothing finds nothing and succeeds: the kernel does not tell an unmapped region or a process that
    /// is gone from a quiet one.
    fn check_regions(&self) -> Result<(), TrackError> {
        for tracked in &self.regions {
            let region = tracked.region;
            for address in [region.address, region.end_address() - PAGE_BYTES] {
                let mut buffer = [PageRegion::default()];
                let end = address + PAGE_BYTES;
                let answer = sys::pagemap_scan(self.pagemap.as_fd(), REGISTERED, address, end, &mut buffer);
                if answer.result != Ok(1) {
                    return Err(self.gone(region));
                }
            }
        }
        Ok(())
    }

    fn gone(&self, region: Region) -> TrackError {
        match self.vmm_lives() {
            Ok(true) => TrackError::RegionGone { address: region.address, pages: region.pages },
            Ok(false) => TrackError::VmmExited,
            Err(error) => error,
        }
    }

    /// Whether the address space that we track still has a process. A read of the page map of one that has none comes
    /// back empty.
    fn vmm_lives(&self) -> Result<bool, TrackError> {
        let mut entry = [0_u8; 8];
        match rustix::io::pread(&self.pagemap, &mut entry, 0) {
            Ok(bytes) => Ok(bytes > 0),
            Err(Errno::SRCH) => Ok(false),
            Err(source) => Err(TrackError::Host { what: "reading the VMM's page map", source }),
        }
    }

    /// Releases all regions; the first error, after trying them all.
    fn release(&mut self) -> Result<(), Errno> {
        if std::mem::replace(&mut self.detached, true) {
            return Ok(());
        }
        let mut first_error = Ok(());
        for tracked in &self.regions {
            let region = tracked.region;
            let released = sys::uffdio_unregister(self.uffd.as_fd(), region.address, region.bytes());
            first_error = first_error.and(released);
        }
        first_error
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // Closing the descriptor, which follows, ends what this could not.
        if let Err(errno) = self.release() {
            tracing::debug!(%errno, "the VMM's memory could not be released region by region");
        }
    }
}

/// The regions in the order of their pages, if they can be regions of one guest.
fn checked(mut regions: Vec<Region>) -> Result<Vec<Region>, TrackError> {
    let wrong = |why: String| Err(TrackError::BadRegions { why });
    if regions.is_empty() || regions.len() > MAX_BLOCKS {
        return wrong(format!("there are {} regions, and 1 to {MAX_BLOCKS} are allowed", regions.len()));
    }
    regions.sort_by_key(|region| region.pages.first);
    for region in &regions {
        let pages_end = region.pages.first.0.checked_add(region.pages.count);
        let address_end =
            region.pages.count.checked_mul(PAGE_BYTES).and_then(|bytes| bytes.checked_add(region.address));
        if region.pages.count == 0 || pages_end.is_none() || address_end.is_none() {
            return wrong(format!("{region:?} is empty or goes beyond all addresses"));
        }
        if !region.address.is_multiple_of(PAGE_BYTES) {
            return wrong(format!("{region:?} does not begin at a page"));
        }
    }
    for (index, region) in regions.iter().enumerate() {
        for other in &regions[..index] {
            let pages_meet = other.pages.end() > region.pages.first.0;
            let addresses_meet = other.address < region.end_address() && region.address < other.end_address();
            if pages_meet || addresses_meet {
                return wrong(format!("{other:?} and {region:?} overlap"));
            }
        }
    }
    Ok(regions)
}

/// Appends a run, as part of the last one if it follows it.
fn push(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first.0 => last.count += run.count,
        Some(_) | None => runs.push(run),
    }
}

/// Sorts the runs and joins those that touch or overlap.
fn merge(runs: &mut Vec<PageRun>) {
    runs.sort_unstable();
    runs.dedup_by(|run, last| {
        let joined = run.first.0 <= last.end();
        if joined {
            last.count = last.count.max(run.end() - last.first.0);
        }
        joined
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(first: u64, count: u64, address: u64) -> Region {
        Region { pages: PageRun::new(first, count), address }
    }

    #[test]
    fn regions_that_contradict_each_other_are_refused() {
        let refused = |regions: &[Region]| match checked(regions.to_vec()) {
            Err(TrackError::BadRegions { why }) => why,
            other => panic!("{regions:?} gave {other:?}"),
        };
        assert!(refused(&[]).contains("0 regions"));
        assert!(refused(&vec![region(0, 1, 0); MAX_BLOCKS + 1]).contains("65 regions"));
        assert!(refused(&[region(0, 0, 0x1000)]).contains("empty"));
        assert!(refused(&[region(u64::MAX, 2, 0x1000)]).contains("beyond"));
        assert!(refused(&[region(0, 1 << 60, 0x1000)]).contains("beyond"));
        assert!(refused(&[region(0, 1, 0x1001)]).contains("begin at a page"));
        assert!(refused(&[region(0, 4, 0x1000), region(3, 1, 0x10_0000)]).contains("overlap"));
        assert!(refused(&[region(0, 4, 0x1000), region(8, 4, 0x4000)]).contains("overlap"));

        let sorted = checked(vec![region(4, 4, 0x1000), region(0, 4, 0x9000)]).unwrap();
        assert_eq!(sorted, [region(0, 4, 0x9000), region(4, 4, 0x1000)]);
    }

    #[test]
    fn runs_that_touch_or_overlap_are_joined() {
        let mut runs = [(9, 2), (4, 1), (5, 3), (10, 5), (11, 1), (20, 1)]
            .map(|(first, count)| PageRun::new(first, count))
            .to_vec();
        merge(&mut runs);
        assert_eq!(runs, [PageRun::new(4, 4), PageRun::new(9, 6), PageRun::new(20, 1)]);
    }

    #[test]
    fn a_region_turns_addresses_into_pages_and_back() {
        let region = region(100, 16, 0x7000_0000);
        assert_eq!(region.pages_at(0x7000_2000, 0x7000_5000), PageRun::new(102, 3));
        assert_eq!(region.address_of(102), 0x7000_2000);
        assert_eq!(region.end_address(), 0x7001_0000);
    }

    /// The second pass, which this kernel may not need, changes nothing about what is reported.
    #[test]
    fn the_second_pass_reports_nothing_twice() {
        let memory = sys::UntouchedMemory::map(4 << 20).unwrap();
        let tracked = region(0, 1024, memory.address());
        let mut tracker =
            Tracker::from_parts(create_own_userfaultfd().unwrap(), own_pagemap().unwrap(), vec![tracked]).unwrap();
        tracker.regions[0].reports_holes = false;
        // Written as by a debugger: through the kernel, and through this process's page table.
        let flags = rustix::fs::OFlags::WRONLY;
        let own_memory = rustix::fs::open("/proc/self/mem", flags, rustix::fs::Mode::empty()).unwrap();
        for page in [3, 4, 700] {
            assert_eq!(rustix::io::pwrite(&own_memory, &[1], tracked.address_of(page)), Ok(1));
        }
        let mut written = Vec::new();
        let stats = tracker.scan(&mut written).unwrap();
        assert_eq!(written, [PageRun::new(3, 2), PageRun::new(700, 1)]);
        assert_eq!((stats.pages, stats.ioctls), (3, 2));
        assert_eq!(tracker.scan(&mut Vec::new()).unwrap().pages, 0);
        tracker.detach().unwrap();
    }
}
