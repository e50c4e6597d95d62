//! Guest RAM as files: reading, writing and zeroing pages by their numbers.
//!
//! Pages are read and written through the files behind the VMM's shared mappings and not through a mapping of our own:
//! reading a hole of a tmpfs file with `pread` leaves it a hole, where a mapping would fill it, and the content has to be
//! copied in any case, since the guest may change it between checksum and sending. hugetlbfs has no `write`, so there
//! the target keeps a mapping; and pages of shared memory that do not exist yet are [placed](place) through one.

mod mapping;
mod place;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, SeekFrom};
use vmferry_core::pages::{PAGE_BYTES, PageRun, RamLayout};

use self::mapping::Mapping;
use self::place::Placer;
use crate::qemu::{FileSystem, GuestRam, HugePages, RamAccess};

/// Fewer pages at once are written: most were written before, and then placing them is tried in vain.
const PLACED_PAGES_MIN: u64 = 8;

/// Why guest RAM could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A file operation failed.
    #[error("cannot {what} guest RAM of block `{block}` at byte {offset}")]
    Io {
        /// `read`, `write`, `map`, `zero` or `look for holes in`.
        what: &'static str,
        /// The block's name.
        block: String,
        /// Offset in the block.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// All RAM of one guest.
#[derive(Debug)]
pub struct GuestMemory {
    layout: RamLayout,
    files: Vec<RamFile>,
}

/// The file behind one block.
#[derive(Debug)]
struct RamFile {
    file: OwnedFd,
    offset: u64,
    /// What can be given back to the host: a page of the file system.
    unit_bytes: u64,
    mapping: Option<Mapping>,
    /// Made when it is needed; `None` where pages are not to be placed, or the system does not let us.
    placer: OnceLock<Option<Placer>>,
}

impl GuestMemory {
    /// RAM whose blocks are the given files, each from its beginning; for memory that `write(2)` can write.
    ///
    /// # Panics
    /// If there are not as many files as blocks.
    pub fn from_files(layout: RamLayout, files: Vec<OwnedFd>) -> Self {
        assert_eq!(layout.blocks().len(), files.len(), "a file for each block");
        let files = files.into_iter().map(|file| RamFile {
            file,
            offset: 0,
            unit_bytes: PAGE_BYTES,
            mapping: None,
            placer: OnceLock::new(),
        });
        Self { layout, files: files.collect() }
    }

    /// The RAM of a QEMU guest.
    ///
    /// # Errors
    /// [`MemoryError::Io`] if a block on hugetlbfs cannot be mapped for writing.
    pub fn from_qemu(ram: GuestRam, access: RamAccess) -> Result<Self, MemoryError> {
        let mut files = Vec::with_capacity(ram.blocks.len());
        for block in ram.blocks {
            let mapped = access == RamAccess::ReadWrite && block.mapping.file_system == FileSystem::Hugetlbfs;
            let mapping = if mapped {
                let mapping = Mapping::new(&block.file, block.mapping.file_offset, block.mapping.bytes);
                Some(mapping.map_err(|source| MemoryError::Io {
                    what: "map",
                    block: block.id.clone(),
                    offset: 0,
                    source,
                })?)
            } else {
                None
            };
            let (offset, unit_bytes) = (block.mapping.file_offset, block.mapping.page_bytes);
            // Pages are placed one by one: where the system would make huge ones of them, it shall.
            let places = block.mapping.file_system == FileSystem::Tmpfs && block.mapping.huge_pages == HugePages::Never;
            let placer = if places { OnceLock::new() } else { OnceLock::from(None) };
            files.push(RamFile { file: block.file, offset, unit_bytes, mapping, placer });
        }
        Ok(Self { layout: ram.layout, files })
    }

    /// Names, sizes and page numbers of the blocks.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Reads the pages of `run` into `buffer`, of exactly their size. The guest may write meanwhile: a page can be torn.
    ///
    /// # Errors
    /// [`MemoryError::Io`].
    ///
    /// # Panics
    /// If the run is outside guest RAM or the buffer has another size; also in the functions below.
    pub fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<(), MemoryError> {
        assert_eq!(buffer.len() as u64, run.count * PAGE_BYTES, "a buffer for {run:?}");
        let mut rest = buffer;
        for (block, offset, piece) in self.layout.pieces(run) {
            let (head, tail) = rest.split_at_mut((piece.count * PAGE_BYTES) as usize);
            let ram = &self.files[block];
            read_exact_at(&ram.file, head, ram.offset + offset)
                .map_err(|source| self.error("read", block, offset, source))?;
            rest = tail;
        }
        Ok(())
    }

    /// Writes `data` to the pages of `run`.
    ///
    /// # Errors
    /// [`MemoryError::Io`].
    pub fn write(&self, run: PageRun, data: &[u8]) -> Result<(), MemoryError> {
        assert_eq!(data.len() as u64, run.count * PAGE_BYTES, "data for {run:?}");
        let mut rest = data;
        for (block, offset, piece) in self.layout.pieces(run) {
            let (head, tail) = rest.split_at((piece.count * PAGE_BYTES) as usize);
            let ram = &self.files[block];
            match &ram.mapping {
                Some(mapping) => mapping.write(offset, head),
                None => {
                    let placed = if piece.count >= PLACED_PAGES_MIN { self.place(block, offset, head) } else { 0 };
                    write_all_at(&ram.file, &head[placed..], ram.offset + offset + placed as u64)
                        .map_err(|source| self.error("write", block, offset, source))?;
                }
            }
            rest = tail;
        }
        Ok(())
    }

    /// Makes the pages of `run` zero, by giving their memory back as far as it consists of whole pages of the file system.
    ///
    /// # Errors
    /// [`MemoryError::Io`].
    pub fn zero(&self, run: PageRun) -> Result<(), MemoryError> {
        for (block, offset, piece) in self.layout.pieces(run) {
            let ram = &self.files[block];
            let (start, end) = (ram.offset + offset, ram.offset + offset + piece.count * PAGE_BYTES);
            let (mut hole, mut hole_end) = (start, end);
            if let Some(mapping) = &ram.mapping {
                // Not every kernel clears a part of a huge page when it is asked to make a hole there.
                hole = start.next_multiple_of(ram.unit_bytes).min(end);
                hole_end = (end - end % ram.unit_bytes).max(hole);
                mapping.clear(start - ram.offset, hole - start);
                mapping.clear(hole_end - ram.offset, end - hole_end);
            }
            if hole < hole_end {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::io::retry_on_intr(|| rustix::fs::fallocate(&ram.file, flags, hole, hole_end - hole))
                    .map_err(|source| self.error("zero", block, hole - ram.offset, source.into()))?;
            }
        }
        Ok(())
    }

    /// The pages that have no memory: never touched, or given back. They read as zero.
    ///
    /// # Errors
    /// [`MemoryError::Io`].
    pub fn holes(&self) -> Result<Vec<PageRun>, MemoryError> {
        let mut holes = Vec::new();
        for (block, ram) in self.files.iter().enumerate() {
            let pages = self.layout.block_pages(block);
            let end = ram.offset + pages.count * PAGE_BYTES;
            let mut at = ram.offset;
            while at < end {
                let failed = |source| self.error("look for holes in", block, at - ram.offset, source);
                let hole = seek(&ram.file, SeekFrom::Hole(at)).map_err(failed)?.unwrap_or(end).min(end);
                let data = seek(&ram.file, SeekFrom::Data(hole)).map_err(failed)?.unwrap_or(end).min(end);
                // Whole pages only, whatever the file system's unit.
                let first = (hole - ram.offset).div_ceil(PAGE_BYTES);
                let last = (data - ram.offset) / PAGE_BYTES;
                if first < last {
                    holes.push(PageRun::new(pages.first.0 + first, last - first));
                }
                at = data.max(at + 1);
            }
        }
        Ok(holes)
    }

    /// Makes new pages of the block with this content; for how many of its bytes, from the first one. The others have to be written.
    fn place(&self, block: usize, offset: u64, content: &[u8]) -> usize {
        let ram = &self.files[block];
        let placer = ram.placer.get_or_init(|| {
            let block = &self.layout.blocks()[block];
            Placer::new(&ram.file, ram.offset, block.bytes)
                .inspect_err(|error| tracing::debug!(block = block.id, %error, "pages are written and not placed"))
                .ok()
        });
        placer.as_ref().map_or(0, |placer| placer.place(offset, content))
    }

    fn error(&self, what: &'static str, block: usize, offset: u64, source: io::Error) -> MemoryError {
        MemoryError::Io { what, block: self.layout.blocks()[block].id.clone(), offset, source }
    }
}

/// The next offset of the kind asked for; `None` where there is none up to the end of the file.
fn seek(file: &OwnedFd, from: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, from) {
        Ok(offset) => Ok(Some(offset)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_exact_at(file: &OwnedFd, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, offset))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

fn write_all_at(file: &OwnedFd, mut data: &[u8], mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(file, data, offset))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                data = &data[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;
    use vmferry_core::pages::RamBlock;

    use super::*;

    fn memory(pages: &[u64]) -> GuestMemory {
        let blocks = pages.iter().enumerate();
        let blocks = blocks.map(|(i, &n)| RamBlock { id: i.to_string(), bytes: n * PAGE_BYTES }).collect();
        let layout = RamLayout::new(blocks).unwrap();
        let files = pages.iter().map(|&n| {
            let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&file, n * PAGE_BYTES).unwrap();
            file
        });
        GuestMemory::from_files(layout, files.collect())
    }

    #[test]
    fn runs_across_blocks_are_read_written_and_zeroed() {
        let memory = memory(&[3, 4]);
        let data: Vec<u8> = (0..4 * PAGE_BYTES).map(|i| (i % 253) as u8 + 1).collect();
        memory.write(PageRun::new(1, 4), &data).unwrap();
        memory.zero(PageRun::new(2, 2)).unwrap();
        let mut all = vec![9; 7 * PAGE_BYTES as usize];
        memory.read(PageRun::new(0, 7), &mut all).unwrap();
        let page = PAGE_BYTES as usize;
        assert_eq!(all[..page], vec![0; page]);
        assert_eq!(all[page..2 * page], data[..page]);
        assert_eq!(all[2 * page..4 * page], vec![0; 2 * page]);
        assert_eq!(all[4 * page..5 * page], data[3 * page..]);
        assert_eq!(all[5 * page..], vec![0; 2 * page]);
        let holes = memory.holes().unwrap();
        assert_eq!(holes, [PageRun::new(0, 1), PageRun::new(2, 1), PageRun::new(3, 1), PageRun::new(5, 2)]);
    }

    #[test]
    fn reading_and_zeroing_allocates_nothing() {
        let memory = memory(&[64]);
        let mut buffer = vec![1; 64 * PAGE_BYTES as usize];
        memory.read(PageRun::new(0, 64), &mut buffer).unwrap();
        memory.zero(PageRun::new(0, 64)).unwrap();
        assert!(buffer.iter().all(|&byte| byte == 0));
        assert_eq!(rustix::fs::fstat(&memory.files[0].file).unwrap().st_blocks, 0);
    }

    /// By whichever way: new pages, some that exist, threads side by side.
    #[test]
    fn what_is_written_is_read() {
        const PAGES: u64 = 1024;
        let memory = memory(&[PAGES, PAGES]);
        let content = |page: u64, round: u8| vec![page as u8 ^ round | 1; PAGE_BYTES as usize];
        let of = |run: PageRun, round| -> Vec<u8> { run.pages().flat_map(|page| content(page.0, round)).collect() };
        memory.write(PageRun::new(40, 3), &of(PageRun::new(40, 3), 0)).unwrap();
        for round in [2, 4] {
            std::thread::scope(|scope| {
                for first in [0, 32] {
                    let (memory, of) = (&memory, &of);
                    scope.spawn(move || {
                        for start in (first..2 * PAGES).step_by(64) {
                            let run = PageRun::new(start, 32);
                            memory.write(run, &of(run, round)).unwrap();
                        }
                    });
                }
            });
            let all = PageRun::new(0, 2 * PAGES);
            let mut found = vec![0; (all.count * PAGE_BYTES) as usize];
            memory.read(all, &mut found).unwrap();
            assert!(found == of(all, round));
            // Across the blocks, with a hole behind.
            memory.zero(PageRun::new(PAGES, 20)).unwrap();
            let across = PageRun::new(PAGES - 10, 20);
            memory.write(across, &of(across, round)).unwrap();
            memory.read(across, &mut found[..20 * PAGE_BYTES as usize]).unwrap();
            assert!(found[..20 * PAGE_BYTES as usize] == of(across, round));
        }
        let placed = memory.files.iter().map(|file| file.placer.get().is_some_and(Option::is_some));
        let may = crate::track::sys::own_userfaultfd().is_ok();
        assert!(placed.into_iter().all(|placed| placed == may), "pages were placed");
    }

    #[test]
    fn a_mapping_writes_what_the_file_reads() {
        let mut memory = memory(&[4]);
        let mapping = Mapping::new(&memory.files[0].file, 0, 4 * PAGE_BYTES).unwrap();
        memory.files[0].mapping = Some(mapping);
        memory.write(PageRun::new(2, 1), &[7; PAGE_BYTES as usize]).unwrap();
        let mut page = vec![0; PAGE_BYTES as usize];
        memory.read(PageRun::new(2, 1), &mut page).unwrap();
        assert!(page.iter().all(|&byte| byte == 7));

        // As on huge pages of two pages: a part is cleared, a whole is given back.
        memory.files[0].unit_bytes = 2 * PAGE_BYTES;
        memory.write(PageRun::new(0, 4), &[7; 4 * PAGE_BYTES as usize]).unwrap();
        memory.zero(PageRun::new(1, 3)).unwrap();
        let mut all = vec![1; 4 * PAGE_BYTES as usize];
        memory.read(PageRun::new(0, 4), &mut all).unwrap();
        let (first, rest) = all.split_at(PAGE_BYTES as usize);
        assert!(first.iter().all(|&byte| byte == 7) && rest.iter().all(|&byte| byte == 0));
        assert_eq!(memory.holes().unwrap(), [PageRun::new(2, 2)]);
    }
}
