//! Where the nodes are. Nodes are only ever added while the tree is shared, and a key is written once, before any link
//! leads to it. So a position, once seen, stays good, and nothing needs to be reclaimed behind a reader's back.
//!
//! A node lies in two parts. Searches read the `Route` only, which changes with insertions and rotations and is
//! otherwise shared by all processors' caches. Counting writes the `Cell`.
//!
//! The first chunk holds as many nodes as the arena was created for, each later one as many as all before it together.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::link::Link;
use super::primitive::{self, AtomicU64, AtomicUsize, ChunkLock, OnceLock, Ordering, RwLock};
use crate::node::{NIL, Side};
use crate::tree::MAX_TOTAL_WEIGHT;

/// Enough doublings of the smallest first chunk to pass every 32-bit position.
const LATER_CHUNKS: usize = 32;

/// The nodes that the first chunk holds at least. Loom looks at each atomic, so its models get by with few.
const MIN_FIRST_CHUNK: usize = if primitive::IS_MODEL { 4 } else { 64 };

/// Aligned so that a node with a small key lies in one cache line.
#[repr(align(32))]
pub(super) struct Route<K> {
    key: OnceLock<K>,
    pub(super) links: [Link; 2],
}

impl<K> Route<K> {
    /// # Panics
    ///
    /// If the key was not written. It was, in a node that a link led to.
    #[inline]
    pub(super) fn key(&self) -> &K {
        self.key.get().expect("a node has its key before a link leads to it")
    }

    #[inline]
    pub(super) fn link(&self, side: Side) -> &Link {
        &self.links[side as usize]
    }
}

/// Whether a key is present, and its weight: the two of them in one word, so that they change together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tally(u64);

impl Tally {
    const PRESENT_BIT: u64 = 1 << 63;
    const ABSENT: Self = Self(0);

    #[inline]
    pub(super) const fn is_present(self) -> bool {
        self.0 & Self::PRESENT_BIT != 0
    }

    /// 0 where the key is absent.
    #[inline]
    pub(super) const fn weight(self) -> u64 {
        self.0 & MAX_TOTAL_WEIGHT
    }

    /// Present, with so much more weight, up to [`MAX_TOTAL_WEIGHT`].
    #[inline]
    const fn counted(self, weight: u64) -> Self {
        let sum = self.weight().saturating_add(weight);
        Self(Self::PRESENT_BIT | if sum < MAX_TOTAL_WEIGHT { sum } else { MAX_TOTAL_WEIGHT })
    }
}

const _: () = assert!(MAX_TOTAL_WEIGHT == Tally::PRESENT_BIT - 1);

pub(super) struct Cell<V> {
    tally: AtomicU64,
    /// Locked for writing around every change of presence, so that it holds a value exactly if the key is present.
    value: RwLock<Option<V>>,
}

impl<V> Cell<V> {
    /// Acquire: a thread that saw a key as present finds its value too.
    #[inline]
    pub(super) fn tally(&self) -> Tally {
        Tally(self.tally.load(Ordering::Acquire))
    }

    /// Counts an access if the key is present, and returns whether it is.
    #[inline]
    pub(super) fn count(&self, weight: u64) -> bool {
        let mut seen = self.tally();
        while seen.is_present() {
            let counted = seen.counted(weight).0;
            match self.tally.compare_exchange_weak(seen.0, counted, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => seen = Tally(now),
            }
        }
        false
    }

    pub(super) fn with_value<T>(&self, look: impl FnOnce(&V) -> T) -> Option<T> {
        primitive::read(&self.value).as_ref().map(look)
    }

    /// Sets the value and counts an access. `arrived` runs before another thread can change the presence again.
    pub(super) fn set(&self, value: V, weight: u64, arrived: impl FnOnce()) -> Option<V> {
        let mut slot = primitive::write(&self.value);
        let previous = slot.replace(value);
        self.mark_present(weight);
        if previous.is_none() {
            arrived();
        }
        previous
    }

    /// As [`Self::set`], but keeps the value of a present key. Returns whether the key was absent.
    pub(super) fn set_if_absent(&self, value: V, weight: u64, arrived: impl FnOnce()) -> bool {
        let mut slot = primitive::write(&self.value);
        let is_new = slot.is_none();
        if is_new {
            *slot = Some(value);
        }
        self.mark_present(weight);
        if is_new {
            arrived();
        }
        is_new
    }

    /// Takes the value out and forgets the weight. `left` runs before another thread can change the presence again.
    pub(super) fn clear(&self, left: impl FnOnce()) -> Option<V> {
        let mut slot = primitive::write(&self.value);
        let value = slot.take()?;
        self.tally.swap(Tally::ABSENT.0, Ordering::AcqRel);
        left();
        Some(value)
    }

    /// Under the value's lock: others may count meanwhile, but only this thread changes the presence.
    fn mark_present(&self, weight: u64) {
        let mut seen = self.tally();
        loop {
            let counted = seen.counted(weight).0;
            match self.tally.compare_exchange_weak(seen.0, counted, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => seen = Tally(now),
            }
        }
    }
}

struct Chunk<K, V> {
    routes: Box<[Route<K>]>,
    cells: Box<[Cell<V>]>,
}

impl<K, V> Chunk<K, V> {
    fn new(len: usize) -> Self {
        let route = || Route { key: OnceLock::new(), links: [Link::empty(), Link::empty()] };
        let cell = || Cell { tally: AtomicU64::new(Tally::ABSENT.0), value: RwLock::new(None) };
        Self { routes: (0..len).map(|_| route()).collect(), cells: (0..len).map(|_| cell()).collect() }
    }
}

pub(super) struct Arena<K, V> {
    first: Chunk<K, V>,
    later: [ChunkLock<Chunk<K, V>>; LATER_CHUNKS],
    len: AtomicUsize,
}

impl<K, V> Arena<K, V> {
    /// Room for so many nodes in the first chunk, rounded up to a power of two.
    pub(super) fn with_capacity(nodes: usize) -> Self {
        let first = nodes.clamp(MIN_FIRST_CHUNK, 1 << 31).next_power_of_two();
        Self { first: Chunk::new(first), later: [const { ChunkLock::new() }; LATER_CHUNKS], len: AtomicUsize::new(0) }
    }

    /// The nodes allocated so far: the bound of positions worth a look.
    pub(super) fn len(&self) -> usize {
        // Acquire pairs with nothing in particular; what is found at a position is ordered by the link or by the tally.
        self.len.load(Ordering::Acquire).min(NIL as usize)
    }

    /// A new node with a key, without a value, and no link to it.
    ///
    /// # Panics
    ///
    /// If all positions are taken.
    pub(super) fn allocate(&self, key: K) -> u32 {
        let at = self.len.fetch_add(1, Ordering::AcqRel);
        if at >= NIL as usize {
            self.len.fetch_sub(1, Ordering::AcqRel);
            panic!("a tree holds at most {NIL} nodes, those of removed keys included, until it is compacted");
        }
        let (chunk, offset) = match self.locate(at) {
            None => (&self.first, at),
            Some((chunk, offset)) => (self.later[chunk].get_or_init(|| Chunk::new(self.later_len(chunk))), offset),
        };
        let is_new = chunk.routes[offset].key.set(key).is_ok();
        assert!(is_new, "position {at} was handed out twice");
        at as u32
    }

    #[inline]
    pub(super) fn route(&self, at: u32) -> &Route<K> {
        match self.first.routes.get(at as usize) {
            Some(route) => route,
            None => self.route_later(at),
        }
    }

    #[inline]
    pub(super) fn cell(&self, at: u32) -> &Cell<V> {
        match self.first.cells.get(at as usize) {
            Some(cell) => cell,
            None => self.later(at).map(|(chunk, offset)| &chunk.cells[offset]).expect("the node was allocated"),
        }
    }

    /// The node's key and tally, for a walk over all positions that follows no links; `None` if it has no key yet.
    pub(super) fn entry(&self, at: u32) -> Option<(&K, &Cell<V>)> {
        let (chunk, offset) = match self.first.routes.get(at as usize) {
            Some(_) => (&self.first, at as usize),
            None => self.later(at)?,
        };
        chunk.routes[offset].key.get().map(|key| (key, &chunk.cells[offset]))
    }

    /// Present keys, their values and weights, in no order.
    pub(super) fn into_entries(self) -> Vec<(K, V, u64)> {
        let later = self.later.into_iter().filter_map(ChunkLock::into_inner);
        core::iter::once(self.first)
            .chain(later)
            .flat_map(|chunk| chunk.routes.into_vec().into_iter().zip(chunk.cells.into_vec()))
            .filter_map(|(route, cell)| {
                let weight = cell.tally().weight();
                Some((route.key.into_inner()?, primitive::into_inner(cell.value)?, weight))
            })
            .collect()
    }

    /// The bytes of the chunks.
    pub(super) fn memory_bytes(&self) -> usize {
        let later: usize = self.later.iter().filter_map(ChunkLock::get).map(|chunk| chunk.routes.len()).sum();
        (self.first.routes.len() + later) * (size_of::<Route<K>>() + size_of::<Cell<V>>())
    }

    #[cold]
    #[inline(never)]
    fn route_later(&self, at: u32) -> &Route<K> {
        self.later(at).map(|(chunk, offset)| &chunk.routes[offset]).expect("the node was allocated")
    }

    fn later(&self, at: u32) -> Option<(&Chunk<K, V>, usize)> {
        let (chunk, offset) = self.locate(at as usize)?;
        self.later[chunk].get().map(|chunk| (chunk, offset))
    }

    /// The later chunk that a position is in, and where in it; `None` for the first chunk.
    fn locate(&self, at: usize) -> Option<(usize, usize)> {
        let shift = self.first.routes.len().trailing_zeros();
        let chunk = (at >> shift).checked_ilog2()? as usize;
        Some((chunk, at - (1 << (shift as usize + chunk))))
    }

    fn later_len(&self, chunk: usize) -> usize {
        self.first.routes.len() << chunk
    }
}
