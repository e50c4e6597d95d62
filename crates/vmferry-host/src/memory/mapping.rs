//! A block of guest RAM in this process's own address space.
#![expect(unsafe_code, reason = "memory that other processes share is mapped and written")]

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

/// A shared writable mapping of one block, for as long as this lives.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process and not to a thread; it is only written through `&self` with a range check.
unsafe impl Send for Mapping {}

// SAFETY: writing through it copies bytes into shared memory that Rust has no reference to, and that the guest and other
// processes may write at any time, too. Threads that write the same page leave a mixture, as any two writers would.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(file: impl AsFd, offset: u64, bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, file, offset) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, bytes })
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let to = self.at(offset, data.len());
        // SAFETY: the destination is mapped writable for `data.len()` bytes (`at`) and no Rust reference points into it;
        // `data` is ordinary memory and so cannot overlap. The target's VMM does not run the guest meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    pub(super) fn clear(&self, offset: u64, bytes: u64) {
        let to = self.at(offset, bytes as usize);
        // SAFETY: the destination is mapped writable for `bytes` bytes (`at`) and no Rust reference points into it.
        unsafe { to.write_bytes(0, bytes as usize) };
    }

    /// The address of an offset, behind which so many bytes are mapped.
    pub(super) fn at(&self, offset: u64, bytes: usize) -> *mut u8 {
        let offset = offset as usize;
        assert!(offset <= self.bytes && bytes <= self.bytes - offset, "{offset} + {bytes} of {}", self.bytes);
        // SAFETY: `offset` is inside the mapping or at its end (asserted), which is one allocation of `bytes` bytes.
        unsafe { self.start.as_ptr().byte_add(offset) }.cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with these values, and nothing points into it beyond this value.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.bytes) };
    }
}
