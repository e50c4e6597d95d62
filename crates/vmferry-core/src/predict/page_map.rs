//! A map from page numbers to small values: a hash table with open addressing, for the indexes of the predictors.
//!
//! Keys and values lie in two arrays without padding between them, and the table grows by half: at most 1.9 cells a
//! page once it has grown, where a table of powers of two has up to 2.3 with 8-byte alignment on top. No peer chooses
//! page numbers, so one multiplication is hash enough (Knuth's multiplicative hashing), and the same pages lie in the
//! same order on every machine.

/// Pages from this number on are not tracked by any predictor. That is 16 TiB of guest RAM; what lies beyond is sent as
/// if it were never written, which costs time and never correctness.
pub const UNTRACKED_FROM: u64 = u32::MAX as u64;

/// Marks a cell that holds no page.
const FREE: u32 = u32::MAX;

const _: () = assert!(FREE as u64 == UNTRACKED_FROM);

/// At least one in so many cells is free. Linear probing then looks at about three cells for a page that is there, and
/// at a dozen for one that is not.
const FREE_PART: usize = 5;

const LEAST_CELLS: usize = 16;

#[derive(Debug, Clone, Default)]
pub(super) struct PageMap<V> {
    pages: Vec<u32>,
    values: Vec<V>,
    len: usize,
}

impl<V: Copy + Default> PageMap<V> {
    pub(super) fn new() -> Self {
        Self { pages: Vec::new(), values: Vec::new(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.pages.capacity() * size_of::<u32>() + self.values.capacity() * size_of::<V>()
    }

    pub(super) fn get(&self, page: u32) -> Option<V> {
        let cell = self.find(page)?;
        Some(self.values[cell])
    }

    pub(super) fn get_mut(&mut self, page: u32) -> Option<&mut V> {
        let cell = self.find(page)?;
        Some(&mut self.values[cell])
    }

    /// All pages, in an order that depends on nothing but what was inserted and removed.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, V)> {
        self.pages.iter().zip(&self.values).filter(|&(&page, _)| page != FREE).map(|(&page, &value)| (page, value))
    }

    /// Sets the value of a page below [`UNTRACKED_FROM`]. The value before, if there was one.
    pub(super) fn insert(&mut self, page: u32, value: V) -> Option<V> {
        assert_ne!(page, FREE, "page {page} is not tracked");
        if let Some(cell) = self.find(page) {
            return Some(std::mem::replace(&mut self.values[cell], value));
        }
        if (self.len + 1) * FREE_PART > self.pages.len() * (FREE_PART - 1) {
            self.grow();
        }
        self.put(page, value);
        self.len += 1;
        None
    }

    pub(super) fn remove(&mut self, page: u32) -> Option<V> {
        let mut gap = self.find(page)?;
        let value = self.values[gap];
        // Pages behind the gap move up, as far as the gap lies between their home and them; so no search ends too soon.
        let mut cell = gap;
        loop {
            cell = self.after(cell);
            let moved = self.pages[cell];
            if moved == FREE {
                break;
            }
            if self.distance(self.home(moved), cell) >= self.distance(gap, cell) {
                self.pages[gap] = moved;
                self.values[gap] = self.values[cell];
                gap = cell;
            }
        }
        self.pages[gap] = FREE;
        self.len -= 1;
        Some(value)
    }

    fn find(&self, page: u32) -> Option<usize> {
        if self.len == 0 {
            return None;
        }
        let mut cell = self.home(page);
        loop {
            match self.pages[cell] {
                FREE => return None,
                found if found == page => return Some(cell),
                _ => cell = self.after(cell),
            }
        }
    }

    /// Puts a page that is missing into the first free cell from its home on.
    fn put(&mut self, page: u32, value: V) {
        let mut cell = self.home(page);
        while self.pages[cell] != FREE {
            cell = self.after(cell);
        }
        self.pages[cell] = page;
        self.values[cell] = value;
    }

    fn grow(&mut self) {
        let cells = (self.pages.len() + self.pages.len() / 2).max(LEAST_CELLS);
        let pages = std::mem::replace(&mut self.pages, vec![FREE; cells]);
        let values = std::mem::replace(&mut self.values, vec![V::default(); cells]);
        for (page, value) in pages.into_iter().zip(values) {
            if page != FREE {
                self.put(page, value);
            }
        }
    }

    /// Where the search for a page begins: its hash as a share of all cells, so that their number need not be a power
    /// of two. 2^32 divided by the golden ratio spreads neighbouring pages.
    fn home(&self, page: u32) -> usize {
        let hash = u64::from(page.wrapping_mul(0x9E37_79B1));
        ((hash * self.pages.len() as u64) >> 32) as usize
    }

    fn after(&self, cell: usize) -> usize {
        if cell + 1 == self.pages.len() { 0 } else { cell + 1 }
    }

    /// How many steps lead from one cell to another.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.pages.len() - from }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_map(
            // Many pages with few homes: neighbours by hash, and numbers at both ends.
            steps in prop::collection::vec((prop_oneof![0..40_u32, u32::MAX - 20..u32::MAX], any::<Option<u8>>()), 0..400),
        ) {
            let mut map = PageMap::new();
            let mut model: BTreeMap<u32, u8> = BTreeMap::new();
            for (page, value) in steps {
                match value {
                    Some(value) => prop_assert_eq!(map.insert(page, value), model.insert(page, value)),
                    None => prop_assert_eq!(map.remove(page), model.remove(&page)),
                }
                prop_assert_eq!(map.len(), model.len());
                for page in (0..40).chain(u32::MAX - 20..u32::MAX) {
                    prop_assert_eq!(map.get(page), model.get(&page).copied());
                    prop_assert_eq!(map.get_mut(page), model.get_mut(&page));
                }
                prop_assert_eq!(map.iter().collect::<BTreeMap<_, _>>(), model.clone());
                prop_assert_eq!(map.iter().count(), model.len());
            }
        }
    }

    #[test]
    fn memory_follows_the_pages() {
        let mut map: PageMap<u8> = PageMap::new();
        for page in 0..100_000_u32 {
            map.insert(page.wrapping_mul(7919) & 0x0FFF_FFFF, 1);
            let pages = map.len().max(LEAST_CELLS);
            assert!(map.memory_bytes() <= pages * 2 * (size_of::<u32>() + 1), "{pages} pages");
        }
    }
}
