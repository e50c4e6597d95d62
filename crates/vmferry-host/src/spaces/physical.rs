//! From guest-physical addresses to page numbers.
//!
//! Physical memory has holes and a block need not be in one piece: on x86 the RAM that would lie under the devices
//! below 4 GiB is moved above, a DIMM lies where it was plugged. QEMU tells the pieces.

use vmferry_core::pages::{PAGE_BYTES, PageNumber, PageRun, RamLayout};

use crate::qemu::PhysicalRange;

/// Where guest RAM lies in the physical address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PhysicalMap {
    /// Ascending and disjoint.
    pieces: Vec<Piece>,
    total_pages: u64,
}

/// Neighbouring physical pages with neighbouring page numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Physical address divided by the page size.
    start: u64,
    end: u64,
    first: u64,
}

impl PhysicalMap {
    /// The pieces of guest RAM among `ranges`. Ranges of other memory, as firmware, are left out, and so is what lies
    /// outside of its block or over an earlier range.
    pub(super) fn new(layout: &RamLayout, ranges: &[PhysicalRange]) -> Self {
        let mut pieces: Vec<Piece> = Vec::new();
        for range in ranges {
            let region = range.region.strip_prefix("/objects/").unwrap_or(&range.region);
            let Some(block) = layout.blocks().iter().position(|block| block.id == region) else { continue };
            let pages = layout.block_pages(block);
            let (start, end) = (range.start.div_ceil(PAGE_BYTES), range.end / PAGE_BYTES);
            // The same bytes may lie at another place of their page only if QEMU's pages were smaller than the guest's.
            let offset = range.offset + (start * PAGE_BYTES - range.start);
            let count = end.saturating_sub(start);
            let room = pages.count.saturating_sub(offset / PAGE_BYTES);
            let overlaps = pieces.last().is_some_and(|last| last.end > start);
            if !offset.is_multiple_of(PAGE_BYTES) || count == 0 || room < count || overlaps {
                continue;
            }
            let piece = Piece { start, end, first: pages.first.0 + offset / PAGE_BYTES };
            match pieces.last_mut() {
                Some(last) if last.end == start && last.first + (last.end - last.start) == piece.first => {
                    last.end = end;
                }
                Some(_) | None => pieces.push(piece),
            }
        }
        let total_pages = layout.total_pages();
        Self { pieces, total_pages }
    }

    /// Whether no RAM was found.
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Pages of the guest's layout: all page numbers are below it.
    pub(super) fn total_pages(&self) -> u64 {
        self.total_pages
    }

    /// The page at a physical address, if that is RAM.
    pub(super) fn page(&self, address: u64) -> Option<PageNumber> {
        let run = self.runs(address, 1).next()?;
        Some(run.first)
    }

    /// The RAM in `bytes` bytes from a physical address, both multiples of the page size or made so.
    pub(super) fn runs(&self, address: u64, bytes: u64) -> impl Iterator<Item = PageRun> {
        let (start, end) = (address / PAGE_BYTES, address.saturating_add(bytes).div_ceil(PAGE_BYTES));
        let first = self.pieces.partition_point(|piece| piece.end <= start);
        self.pieces[first..].iter().take_while(move |piece| piece.start < end).map(move |piece| {
            let (from, to) = (start.max(piece.start), end.min(piece.end));
            PageRun::new(piece.first + (from - piece.start), to - from)
        })
    }
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::RamBlock;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn range(start: u64, end: u64, region: &str, offset: u64) -> PhysicalRange {
        PhysicalRange { start, end, region: region.to_owned(), offset }
    }

    fn layout(blocks: &[(&str, u64)]) -> RamLayout {
        let block = |&(id, bytes): &(&str, u64)| RamBlock { id: id.to_owned(), bytes };
        RamLayout::new(blocks.iter().map(block).collect()).unwrap()
    }

    #[test]
    fn ram_above_4_gib_goes_on_where_ram_below_ended() {
        // q35 with 4 GiB, and the shadow of the firmware, which is one piece with what is around it.
        let ranges = [
            range(0, 0xc3000, "ram", 0),
            range(0xc3000, 0xe4000, "ram", 0xc3000),
            range(0xe4000, 2 * GIB, "ram", 0xe4000),
            range(4 * GIB - 256 * 1024, 4 * GIB, "pc.bios", 0),
            range(4 * GIB, 6 * GIB, "ram", 2 * GIB),
        ];
        let map = PhysicalMap::new(&layout(&[("ram", 4 * GIB)]), &ranges);
        assert_eq!(map.pieces.len(), 2);
        let page = |address: u64| map.page(address).map(|page| page.0);
        assert_eq!(page(0), Some(0));
        assert_eq!(page(0xc3fff), Some(0xc3));
        assert_eq!(page(2 * GIB - 1), Some(2 * GIB / PAGE_BYTES - 1));
        assert_eq!(page(2 * GIB), None);
        assert_eq!(page(4 * GIB - 1), None, "firmware is not guest RAM");
        assert_eq!(page(4 * GIB), Some(2 * GIB / PAGE_BYTES));
        assert_eq!(page(6 * GIB), None);
        assert_eq!(page(u64::MAX), None);
        let runs: Vec<_> = map.runs(GIB, 4 * GIB).collect();
        assert_eq!(
            runs,
            [PageRun::new(GIB / PAGE_BYTES, GIB / PAGE_BYTES), PageRun::new(2 * GIB / PAGE_BYTES, GIB / PAGE_BYTES)]
        );
    }

    #[test]
    fn blocks_are_found_by_their_names() {
        // Page numbers follow the order of the layout, addresses do not.
        let layout = layout(&[("dimm", 128 * MIB), ("node0", 64 * MIB), ("node1", 64 * MIB)]);
        let ranges = [
            range(0, 64 * MIB, "/objects/node0", 0),
            range(64 * MIB, 128 * MIB, "node1", 0),
            range(4 * GIB, 4 * GIB + 128 * MIB, "dimm", 0),
        ];
        let map = PhysicalMap::new(&layout, &ranges);
        // Neighbours here are neighbours there.
        assert_eq!(map.pieces.len(), 2);
        assert_eq!(map.page(64 * MIB), Some(layout.block_pages(2).first));
        assert_eq!(map.page(4 * GIB), Some(PageNumber(0)));
        assert!(!map.is_empty());
        assert!(PhysicalMap::new(&layout, &[range(0, GIB, "other", 0)]).is_empty());
    }

    #[test]
    fn ranges_that_cannot_be_are_left_out() {
        let layout = layout(&[("ram", MIB)]);
        let ranges = [
            range(0, 2 * MIB, "ram", 0),
            range(0, MIB, "ram", 100),
            range(100, 200, "ram", 100),
            range(4096, 8192, "ram", MIB),
            range(8192, 12288, "ram", u64::MAX - 4095),
            range(16384, 20480, "ram", 4096),
            range(16384, 20480, "ram", 8192),
        ];
        let map = PhysicalMap::new(&layout, &ranges);
        assert_eq!(map.pieces, [Piece { start: 4, end: 5, first: 1 }]);
    }
}
