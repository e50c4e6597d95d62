//! Watching a guest without moving it: which pages it writes, epoch by epoch.

use std::ops::ControlFlow;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use vmferry_core::pages::{Owners, PAGE_BYTES, PageRun};

use crate::buffer::Buffer;
use crate::cancel::{Cancel, wait};
use crate::compress::is_zero;
use crate::memory::GuestMemory;
use crate::vmm::{SourceVmm, VmmError};

/// Pages read at once when zero pages are looked for.
const PIECE_PAGES: u64 = 256;

/// The part of an epoch for looking who owns which page, where owners are told apart.
const OWNERS_SHARE: f64 = 0.1;

/// One epoch of a watched guest.
#[derive(Debug)]
pub struct WatchedEpoch<'a> {
    /// Its number, from 0.
    pub number: u64,
    /// The pages written in it, in ascending order.
    pub written: &'a [PageRun],
    /// How long it really was: from the scan before to its own. Longer than asked for where the host was busy.
    pub length: Duration,
    /// How long its scan took.
    pub scan: Duration,
    /// Whether all of the guest's mappings have been walked anew since the epoch before.
    pub walked: bool,
    vmm: &'a dyn SourceVmm,
}

impl WatchedEpoch<'_> {
    /// Who owns which page at its end; see [`SourceVmm::tell_owners_apart`].
    pub fn owners(&self) -> &dyn Owners {
        self.vmm.owners()
    }

    /// The pages that programs read or wrote, by the last walk; ascending.
    pub fn accessed(&self) -> Vec<PageRun> {
        self.vmm.accessed()
    }
}

/// What watching cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WatchSummary {
    /// Epochs watched.
    pub epochs: u64,
    /// Of these, epochs that were more than half as long again as asked for.
    pub late_epochs: u64,
    /// Time spent in scans.
    pub scanning: Duration,
}

/// Watches the guest until `each` breaks or `cancel` is set, with a scan at the end of every epoch. The guest runs on; a
/// page costs it one fault of about a microsecond in each epoch in which it writes to it.
///
/// Every written page is looked for in every epoch: nothing is left out as a migration may do.
///
/// # Errors
/// The VMM may have ended.
pub fn watch(
    vmm: &mut dyn SourceVmm,
    epoch: Duration,
    cancel: &Cancel,
    each: &mut dyn FnMut(&WatchedEpoch<'_>) -> ControlFlow<()>,
) -> Result<WatchSummary, VmmError> {
    let mut summary = WatchSummary::default();
    let mut written = Vec::new();
    // What was written before is nobody's epoch.
    vmm.scan(false, &mut written)?;
    let mut last = Instant::now();
    let mut due = last + epoch;
    loop {
        let left = due.saturating_duration_since(Instant::now());
        let cancelled = wait(&[(cancel.as_fd(), PollFlags::IN)], Some(left))
            .map_err(|source| VmmError::Host { what: "wait for the end of an epoch", source })?[0];
        if cancelled {
            return Ok(summary);
        }
        if Instant::now() < due {
            continue;
        }
        written.clear();
        let stats = vmm.scan(false, &mut written)?;
        let now = Instant::now();
        let length = now - last;
        summary.late_epochs += u64::from(length > epoch.mul_f64(1.5));
        summary.scanning += stats.duration;
        let walked = vmm.refresh_owners(epoch.mul_f64(OWNERS_SHARE));
        let (number, scan) = (summary.epochs, stats.duration);
        let seen = WatchedEpoch { number, written: &written, length, scan, walked, vmm: &*vmm };
        summary.epochs += 1;
        if each(&seen).is_break() {
            return Ok(summary);
        }
        last = now;
        // A late scan makes one long epoch, not a burst of short ones.
        due = (due + epoch).max(now + epoch / 2);
    }
}

/// The pages that are zero at the moment they are read, in ascending order. The guest may write to them at any time, so
/// whoever wants to know which stay zero has to leave out those written since.
///
/// Reads all of the guest's memory that was ever touched.
///
/// # Errors
/// As [`GuestMemory::read`].
pub fn zero_pages(memory: &GuestMemory) -> Result<Vec<PageRun>, VmmError> {
    let mut zero: Vec<PageRun> = Vec::new();
    let mut buffer = Buffer::zeroed((PIECE_PAGES * PAGE_BYTES) as usize);
    let mut left = Some(PageRun::new(0, memory.layout().total_pages()));
    while let Some(run) = left {
        let (piece, rest) = run.split_front(PIECE_PAGES);
        left = rest;
        let content = &mut buffer[..(piece.count * PAGE_BYTES) as usize];
        memory.read(piece, content)?;
        let are_zero = content.chunks_exact(PAGE_BYTES as usize).map(is_zero);
        for (stretch, _) in piece.stretches(are_zero).filter(|(_, is_zero)| *is_zero) {
            match zero.last_mut() {
                Some(last) if last.end() == stretch.first.0 => last.count += stretch.count,
                Some(_) | None => zero.push(stretch),
            }
        }
    }
    Ok(zero)
}
