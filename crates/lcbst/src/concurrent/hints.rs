//! Which nodes were counted lately: the adjuster's work list.
//!
//! A hint says no more than "the weight of this node may differ from what the sums above it include". The adjuster
//! finds out how much. So a hint that comes twice does nothing, and one that is lost delays and does not falsify. That
//! is why plain loads and stores are enough, and why any number of threads may share a stripe.

use alloc::boxed::Box;

use super::primitive::{self, AtomicU32, AtomicUsize, Ordering};
use crate::node::NIL;

/// Threads are spread over so many rings.
const STRIPES: usize = if primitive::IS_MODEL { 1 } else { 16 };

/// Hints that a ring holds. Enough that most are repetitions under a skewed workload, which cost the adjuster next to
/// nothing; few enough that a lock is held for no more than about 0.1 ms.
pub(super) const RING_HINTS: usize = if primitive::IS_MODEL { 2 } else { 512 };

/// Of so many accesses of a thread that found their key, one is hinted at. The weight of the others reaches the sums
/// with the next hint at the same node, or when the adjuster's hand comes by. Hot keys are hinted at often enough in
/// any case, and the adjuster, whose work cannot be shared out, has so much less of it.
const ACCESSES_PER_HINT: usize = if primitive::IS_MODEL { 1 } else { 4 };

/// One line of its own and the neighbour that some processors fetch along with it.
#[repr(align(128))]
pub(super) struct Ring {
    accesses: AtomicUsize,
    next: AtomicUsize,
    /// Hints that were given up because the adjuster was busy when the ring was full.
    dropped: AtomicUsize,
    slots: Box<[AtomicU32]>,
}

impl Ring {
    fn new() -> Self {
        let slots = (0..RING_HINTS).map(|_| AtomicU32::new(NIL)).collect();
        Self { accesses: AtomicUsize::new(0), next: AtomicUsize::new(0), dropped: AtomicUsize::new(0), slots }
    }

    /// Whether it is the turn of the access being made to be hinted at.
    #[inline]
    pub(super) fn is_turn(&self) -> bool {
        let turn = self.accesses.load(Ordering::Relaxed).wrapping_add(1);
        self.accesses.store(turn, Ordering::Relaxed);
        turn.is_multiple_of(ACCESSES_PER_HINT)
    }

    /// Returns whether the ring is full, and should be drained or dropped.
    #[inline]
    pub(super) fn push(&self, node: u32) -> bool {
        let at = self.next.load(Ordering::Relaxed);
        // Release: who takes the hint sees the node.
        self.slots[at % RING_HINTS].store(node, Ordering::Release);
        self.next.store(at + 1, Ordering::Relaxed);
        at + 1 >= RING_HINTS
    }

    pub(super) fn drop_all(&self) {
        self.next.store(0, Ordering::Relaxed);
        self.dropped.store(self.dropped.load(Ordering::Relaxed).wrapping_add(RING_HINTS), Ordering::Relaxed);
    }

    pub(super) fn drain(&self, mut each: impl FnMut(u32)) {
        let end = self.next.load(Ordering::Relaxed).min(RING_HINTS);
        for slot in &self.slots[..end] {
            let node = slot.load(Ordering::Acquire);
            if node != NIL {
                each(node);
            }
        }
        self.next.store(0, Ordering::Relaxed);
    }
}

pub(super) struct Hints {
    rings: Box<[Ring]>,
}

impl Hints {
    pub(super) fn new() -> Self {
        Self { rings: (0..STRIPES).map(|_| Ring::new()).collect() }
    }

    /// The ring of the calling thread.
    #[inline]
    pub(super) fn ring(&self) -> &Ring {
        &self.rings[primitive::thread_number() % STRIPES]
    }

    pub(super) fn rings(&self) -> &[Ring] {
        &self.rings
    }

    pub(super) fn dropped(&self) -> u64 {
        self.rings.iter().map(|ring| ring.dropped.load(Ordering::Relaxed) as u64).sum()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.rings.len() * (size_of::<Ring>() + RING_HINTS * size_of::<AtomicU32>())
    }
}
