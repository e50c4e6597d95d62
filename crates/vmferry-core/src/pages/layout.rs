//! The RAM blocks of a guest and the page numbers they stand for.

use super::{PageNumber, PageRun};

/// Bytes of a page: the unit of tracking and transfer on x86-64.
pub const PAGE_BYTES: u64 = 4096;
/// The most RAM blocks a guest may have.
pub const MAX_BLOCKS: usize = 64;
/// The longest name of a RAM block.
pub const MAX_BLOCK_ID_BYTES: usize = 255;
/// The most pages a guest may have: 64 TiB of RAM.
pub const MAX_RAM_PAGES: u64 = 1 << 34;

/// Why a list of RAM blocks cannot be a guest's layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There are no blocks, or more than [`MAX_BLOCKS`].
    #[error("a guest has 1 to {MAX_BLOCKS} RAM blocks, not {count}")]
    BlockCount {
        /// How many blocks there were.
        count: usize,
    },
    /// A block has no name, or one longer than [`MAX_BLOCK_ID_BYTES`].
    #[error("the name of RAM block {index} is {bytes} bytes long; 1 to {MAX_BLOCK_ID_BYTES} are allowed")]
    BlockId {
        /// Which block, from 0.
        index: usize,
        /// The name's length.
        bytes: usize,
    },
    /// Two blocks have one name.
    #[error("two RAM blocks are called `{id}`")]
    DuplicateId {
        /// The name.
        id: String,
    },
    /// A block is empty or not a whole number of pages.
    #[error("RAM block `{id}` has {bytes} bytes, which is not a positive multiple of {PAGE_BYTES}")]
    BlockSize {
        /// The block's name.
        id: String,
        /// Its size.
        bytes: u64,
    },
    /// All blocks together exceed [`MAX_RAM_PAGES`].
    #[error("the guest has more than {MAX_RAM_PAGES} pages of RAM")]
    TooLarge,
}

/// One contiguous piece of guest RAM, as the VMM names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// The VMM's name for the block, for instance the id of QEMU's memory backend.
    pub id: String,
    /// Its size in bytes, a positive multiple of [`PAGE_BYTES`].
    pub bytes: u64,
}

/// The RAM blocks of a guest, in order. Valid by construction: 1 to [`MAX_BLOCKS`] blocks, names unique, sizes whole
/// pages, at most [`MAX_RAM_PAGES`] pages in all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
    /// First page number of each block, and one past the last page as the last entry.
    bases: Vec<u64>,
}

impl RamLayout {
    /// The layout of these blocks.
    ///
    /// # Errors
    /// [`LayoutError`] says which rule of the type is broken.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        if blocks.is_empty() || blocks.len() > MAX_BLOCKS {
            return Err(LayoutError::BlockCount { count: blocks.len() });
        }
        let mut bases = Vec::with_capacity(blocks.len() + 1);
        let mut pages = 0_u64;
        for (index, block) in blocks.iter().enumerate() {
            if block.id.is_empty() || block.id.len() > MAX_BLOCK_ID_BYTES {
                return Err(LayoutError::BlockId { index, bytes: block.id.len() });
            }
            if blocks[..index].iter().any(|other| other.id == block.id) {
                return Err(LayoutError::DuplicateId { id: block.id.clone() });
            }
            if block.bytes == 0 || block.bytes % PAGE_BYTES != 0 {
                return Err(LayoutError::BlockSize { id: block.id.clone(), bytes: block.bytes });
            }
            bases.push(pages);
            pages += block.bytes / PAGE_BYTES;
            if pages > MAX_RAM_PAGES {
                return Err(LayoutError::TooLarge);
            }
        }
        bases.push(pages);
        Ok(Self { blocks, bases })
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// How many pages the guest has.
    pub fn total_pages(&self) -> u64 {
        self.bases[self.blocks.len()]
    }

    /// The pages of the block with index `block`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block_pages(&self, block: usize) -> PageRun {
        let first = self.bases[block];
        PageRun::new(first, self.bases[block + 1] - first)
    }

    /// The block that holds `page` and the byte offset of the page in it; `None` outside guest RAM.
    pub fn locate(&self, page: PageNumber) -> Option<(usize, u64)> {
        if page.0 >= self.total_pages() {
            return None;
        }
        let block = self.bases.partition_point(|&base| base <= page.0) - 1;
        Some((block, (page.0 - self.bases[block]) * PAGE_BYTES))
    }

    /// Whether all pages of `run` exist.
    pub fn contains(&self, run: PageRun) -> bool {
        run.count > 0 && run.first.0.checked_add(run.count).is_some_and(|end| end <= self.total_pages())
    }

    /// Cuts `run` where blocks meet: pieces of one block each, with the block and the byte offset in it.
    ///
    /// # Panics
    /// If the run reaches outside guest RAM.
    pub fn pieces(&self, run: PageRun) -> impl Iterator<Item = (usize, u64, PageRun)> {
        assert!(self.contains(run), "{run:?} reaches outside {} pages", self.total_pages());
        let mut left = Some(run);
        std::iter::from_fn(move || {
            let run = left?;
            let (block, offset) = self.locate(run.first)?;
            let (piece, rest) = run.split_front(self.bases[block + 1] - run.first.0);
            left = rest;
            Some((block, offset, piece))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(id: &str, pages: u64) -> RamBlock {
        RamBlock { id: id.to_owned(), bytes: pages * PAGE_BYTES }
    }

    #[test]
    fn numbers_run_through_all_blocks() {
        let layout = RamLayout::new(vec![block("a", 3), block("b", 5)]).unwrap();
        assert_eq!(layout.total_pages(), 8);
        assert_eq!(layout.block_pages(1), PageRun::new(3, 5));
        assert_eq!(layout.locate(PageNumber(2)), Some((0, 2 * PAGE_BYTES)));
        assert_eq!(layout.locate(PageNumber(3)), Some((1, 0)));
        assert_eq!(layout.locate(PageNumber(7)), Some((1, 4 * PAGE_BYTES)));
        assert_eq!(layout.locate(PageNumber(8)), None);
    }

    #[test]
    fn a_run_is_cut_where_blocks_meet() {
        let layout = RamLayout::new(vec![block("a", 3), block("b", 5)]).unwrap();
        let pieces: Vec<_> = layout.pieces(PageRun::new(1, 4)).collect();
        assert_eq!(pieces, [(0, PAGE_BYTES, PageRun::new(1, 2)), (1, 0, PageRun::new(3, 2))]);
        assert!(!layout.contains(PageRun::new(7, 2)));
        assert!(!layout.contains(PageRun::new(u64::MAX, 2)));
        assert!(!layout.contains(PageRun::new(0, 0)));
    }

    #[test]
    fn broken_layouts_are_refused() {
        assert_eq!(RamLayout::new(vec![]), Err(LayoutError::BlockCount { count: 0 }));
        assert_eq!(
            RamLayout::new(vec![block("a", 1), block("a", 1)]),
            Err(LayoutError::DuplicateId { id: "a".into() })
        );
        let odd = RamBlock { id: "a".into(), bytes: 5000 };
        assert_eq!(RamLayout::new(vec![odd]), Err(LayoutError::BlockSize { id: "a".into(), bytes: 5000 }));
        assert_eq!(RamLayout::new(vec![block("", 1)]), Err(LayoutError::BlockId { index: 0, bytes: 0 }));
        assert_eq!(RamLayout::new(vec![block("a", MAX_RAM_PAGES + 1)]), Err(LayoutError::TooLarge));
    }
}
