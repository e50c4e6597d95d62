//! What the host's kernel can do, tried out on memory of this process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::sys::{self, PageRegion};
use super::{TrackError, WRITTEN_AND_PROTECT};

/// The userfaultfd features that tracking needs. Kernels have had all of them since 6.7.
pub(super) const FEATURES: u64 = sys::UFFD_FEATURE_WP_ASYNC
    | sys::UFFD_FEATURE_WP_UNPOPULATED
    | sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP;

/// Memory that one entry of a page directory maps, by a page table or as a huge page.
pub(super) const DIRECTORY_BYTES: u64 = 2 << 20;

/// What the kernel can do beyond what tracking cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSupport {
    /// A scan reports memory that has no page table at all as written, and so notices when written pages are taken out
    /// of the VMM's page tables together with the table (`MADV_DONTNEED` of 2 MiB or more since Linux 6.14, huge pages
    /// always). Kernels had this added in 2026. On others the tracker makes a second pass that looks for such holes.
    pub reports_holes: bool,
}

/// Whether this host can track writes at all. The answer is found once and kept.
///
/// # Errors
/// [`TrackError::KernelTooOld`] names what is missing; [`TrackError::Host`] if the trial itself failed.
pub fn probe() -> Result<KernelSupport, TrackError> {
    static KNOWN: OnceLock<KernelSupport> = OnceLock::new();
    if let Some(support) = KNOWN.get() {
        return Ok(*support);
    }
    let support = try_out()?;
    Ok(*KNOWN.get_or_init(|| support))
}

fn try_out() -> Result<KernelSupport, TrackError> {
    judge_features(sys::own_userfaultfd().and_then(|uffd| sys::uffdio_api(uffd.as_fd(), 0)))?;

    // A second descriptor, since the API of one is opened once.
    let uffd = sys::own_userfaultfd().map_err(|source| TrackError::Host { what: "userfaultfd", source })?;
    sys::uffdio_api(uffd.as_fd(), FEATURES).map_err(|source| TrackError::Host { what: "UFFDIO_API", source })?;
    // Room for one whole, aligned page directory entry that nobody touches.
    let bytes = 2 * DIRECTORY_BYTES;
    let memory = usize::try_from(bytes)
        .map_err(|_| Errno::NOMEM)
        .and_then(sys::UntouchedMemory::map)
        .map_err(|source| TrackError::Host { what: "mmap", source })?;
    let start = memory.address().next_multiple_of(DIRECTORY_BYTES);
    let end = start + DIRECTORY_BYTES;
    sys::uffdio_register(uffd.as_fd(), start, DIRECTORY_BYTES, sys::UFFDIO_REGISTER_MODE_WP)
        .map_err(|source| TrackError::Host { what: "UFFDIO_REGISTER", source })?;
    let pagemap = own_pagemap()?;
    let mut buffer = [PageRegion::default()];
    let answer = sys::pagemap_scan(pagemap.as_fd(), WRITTEN_AND_PROTECT, start, end, &mut buffer);
    judge_scan(answer.result)
}

/// Reads the list of features, or the refusal, as a verdict on the kernel.
fn judge_features(answer: Result<u64, Errno>) -> Result<(), TrackError> {
    match answer {
        Ok(features) if features & FEATURES == FEATURES => Ok(()),
        Ok(features) => {
            let names = [
                (sys::UFFD_FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC"),
                (sys::UFFD_FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED"),
                (sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
                (sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
            ];
            let missing: Vec<_> = names.iter().filter(|(bit, _)| features & bit == 0).map(|(_, name)| *name).collect();
            Err(TrackError::KernelTooOld { missing: missing.join(", ") })
        }
        Err(Errno::NOSYS) => Err(TrackError::KernelTooOld { missing: "userfaultfd(2)".to_owned() }),
        Err(source) => Err(TrackError::Host { what: "userfaultfd", source }),
    }
}

/// Reads the answer to a scan over memory without a page table as a verdict on the kernel.
fn judge_scan(answer: Result<usize, Errno>) -> Result<KernelSupport, TrackError> {
    match answer {
        Ok(regions) => Ok(KernelSupport { reports_holes: regions > 0 }),
        Err(Errno::NOTTY | Errno::INVAL) => Err(TrackError::KernelTooOld { missing: "ioctl PAGEMAP_SCAN".to_owned() }),
        Err(source) => Err(TrackError::Host { what: "PAGEMAP_SCAN", source }),
    }
}

/// A userfaultfd for a process that tracks its own memory, or passes the descriptor to one that does: no right is
/// needed. Give it to [`Tracker::from_parts`](super::Tracker::from_parts) as it is.
///
/// # Errors
/// [`TrackError::KernelTooOld`] or [`TrackError::Host`].
pub fn create_own_userfaultfd() -> Result<OwnedFd, TrackError> {
    sys::own_userfaultfd().map_err(|source| match source {
        Errno::NOSYS => TrackError::KernelTooOld { missing: "userfaultfd(2)".to_owned() },
        source => TrackError::Host { what: "userfaultfd", source },
    })
}

/// This process's page map, the companion of [`create_own_userfaultfd`].
///
/// # Errors
/// [`TrackError::Host`].
pub fn own_pagemap() -> Result<OwnedFd, TrackError> {
    rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| TrackError::Host { what: "opening /proc/self/pagemap", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(error: TrackError) -> String {
        match error {
            TrackError::KernelTooOld { missing } => missing,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn old_kernels_are_refused_by_what_they_lack() {
        judge_features(Ok(u64::MAX)).unwrap();
        // Linux 6.6: everything but the asynchronous mode.
        let features = FEATURES & !sys::UFFD_FEATURE_WP_ASYNC;
        assert_eq!(missing(judge_features(Ok(features)).unwrap_err()), "UFFD_FEATURE_WP_ASYNC");
        assert_eq!(missing(judge_features(Err(Errno::NOSYS)).unwrap_err()), "userfaultfd(2)");
        for errno in [Errno::NOTTY, Errno::INVAL] {
            assert_eq!(missing(judge_scan(Err(errno)).unwrap_err()), "ioctl PAGEMAP_SCAN");
        }
        assert!(matches!(judge_features(Err(Errno::MFILE)), Err(TrackError::Host { .. })));
        assert!(matches!(judge_scan(Err(Errno::NOMEM)), Err(TrackError::Host { .. })));
    }

    #[test]
    fn a_silent_scan_means_that_holes_are_not_reported() {
        assert_eq!(judge_scan(Ok(0)).unwrap(), KernelSupport { reports_holes: false });
        assert_eq!(judge_scan(Ok(1)).unwrap(), KernelSupport { reports_holes: true });
    }

    #[test]
    fn this_kernel_can_track() {
        println!("{:?}", probe().unwrap());
    }
}
