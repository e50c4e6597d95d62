//! The workloads: their parameters, and how they write.
//!
//! All are models of a guest's own behaviour seen from outside: numbers of pages over time. They are kept as plain as
//! what they stand for allows; no claim is made that a given program behaves like one of them.

use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PageRun};

use super::{Moment, Touches, shares};
use crate::random::{self, Permutation, SplitMix64};

/// The most writers of a workload.
pub(super) const MAX_WRITERS: u64 = 1024;

/// How a guest writes.
#[derive(Debug, Clone, PartialEq)]
pub enum Workload {
    /// Few pages often, many rarely.
    Zipf(Zipf),
    /// Two kinds of pages.
    HotCold(HotCold),
    /// A hot set that moves on.
    Phases(Phases),
    /// One page after another, again and again.
    Sweep(Sweep),
    /// A list walked in memory, read more than written.
    Chase(Chase),
    /// An allocator at work.
    Churn(Churn),
    /// A guest that does next to nothing.
    Idle(Idle),
}

/// Ranks by Zipf's law over a region, scattered: caches, key-value stores.
#[derive(Debug, Clone, PartialEq)]
pub struct Zipf {
    /// The exponent, 0 to 4; 0 is uniform.
    pub exponent: f64,
    /// The pages written at all; the whole guest if `None`.
    pub region: Option<u64>,
    /// Neighbouring ranks lie in neighbouring pages, so many together.
    pub cluster: u64,
    /// Writers with equal shares of the region, each with ranks of its own.
    pub writers: u64,
}

/// A hot part that gets most of the writes, and a cold one; both uniform.
#[derive(Debug, Clone, PartialEq)]
pub struct HotCold {
    /// The pages written at all; the whole guest if `None`.
    pub region: Option<u64>,
    /// The pages of the hot part, over all writers; an eighth of the region if `None`.
    pub hot: Option<u64>,
    /// The share of writes that go to the hot part.
    pub hot_share: f64,
    /// Hot pages lie together in groups of so many.
    pub cluster: u64,
    /// Writers with equal shares of the region.
    pub writers: u64,
}

/// A hot part as in [`HotCold`] that moves to other pages from time to time, and comes back.
#[derive(Debug, Clone, PartialEq)]
pub struct Phases {
    /// The pages written at all; the whole guest if `None`.
    pub region: Option<u64>,
    /// The pages of a hot part; an eighth of the region if `None`.
    pub hot: Option<u64>,
    /// How many hot parts there are. They do not overlap.
    pub phases: u64,
    /// How long each is hot.
    pub phase: Duration,
    /// The share of writes that go to the hot part of the moment.
    pub hot_share: f64,
    /// Hot pages lie together in groups of so many.
    pub cluster: u64,
}

/// Pages in ascending order, again from the start after the last one: a stream benchmark, a garbage collector, a ring
/// buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    /// The pages swept; a quarter of the guest if `None`.
    pub region: Option<u64>,
    /// The step from one page to the next.
    pub stride: u64,
    /// Writers with equal shares of the region, each sweeping its own.
    pub writers: u64,
}

/// A ring of nodes, one per page, walked in a fixed random order; some of the nodes visited are written, the others
/// read. The accessed pages are recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Chase {
    /// The pages of the ring; a quarter of the guest if `None`.
    pub region: Option<u64>,
    /// The share of visits that write. `rate` stays that of the writes: there are more visits.
    pub write_share: f64,
    /// Writers with equal shares of the region, each walking a ring of its own.
    pub writers: u64,
}

/// Objects of 1 to `object` pages are allocated and freed; an object's pages are written once, when it is allocated.
/// What was freed last is allocated first, as allocators do.
#[derive(Debug, Clone, PartialEq)]
pub struct Churn {
    /// The pages of the heap; half of the guest if `None`.
    pub region: Option<u64>,
    /// The share of the heap that is allocated, on average.
    pub live: f64,
    /// The size of the largest objects in pages, a power of two. Each size of half the pages is twice as frequent.
    pub object: u64,
    /// Writers with equal shares of the heap, each with an allocator of its own.
    pub writers: u64,
}

/// A few pages written all the time, and now and then a burst that goes through a log.
#[derive(Debug, Clone, PartialEq)]
pub struct Idle {
    /// The pages written all the time.
    pub hot: u64,
    /// The pages of a burst; they are written beside `rate`.
    pub burst: u64,
    /// The time from burst to burst.
    pub period: Duration,
    /// The pages of the log, which bursts go through in order, again and again; 16 bursts, as far as there is room,
    /// if `None`.
    pub log: Option<u64>,
}

impl Default for Zipf {
    fn default() -> Self {
        Self { exponent: 0.99, region: None, cluster: 1, writers: 1 }
    }
}

impl Default for HotCold {
    fn default() -> Self {
        Self { region: None, hot: None, hot_share: 0.9, cluster: 1, writers: 1 }
    }
}

impl Default for Phases {
    fn default() -> Self {
        Self { region: None, hot: None, phases: 4, phase: Duration::from_secs(10), hot_share: 0.95, cluster: 1 }
    }
}

impl Default for Sweep {
    fn default() -> Self {
        Self { region: None, stride: 1, writers: 1 }
    }
}

impl Default for Chase {
    fn default() -> Self {
        Self { region: None, write_share: 0.25, writers: 1 }
    }
}

impl Default for Churn {
    fn default() -> Self {
        Self { region: None, live: 0.5, object: 64, writers: 1 }
    }
}

impl Default for Idle {
    fn default() -> Self {
        Self { hot: 64, burst: 256, period: Duration::from_secs(5), log: None }
    }
}

impl Workload {
    pub(super) fn default_rate(&self) -> u64 {
        match self {
            Self::Idle(_) => 1000,
            Self::Zipf(_) | Self::HotCold(_) | Self::Phases(_) | Self::Sweep(_) | Self::Chase(_) | Self::Churn(_) => {
                20_000
            }
        }
    }

    /// Whether reads are modelled, too.
    pub(super) fn reads(&self) -> bool {
        match self {
            Self::Chase(_) => true,
            Self::Zipf(_) | Self::HotCold(_) | Self::Phases(_) | Self::Sweep(_) | Self::Churn(_) | Self::Idle(_) => {
                false
            }
        }
    }

    /// The workload on a guest of which `usable` pages may be written. The parameters were checked.
    pub(super) fn model(&self, usable: u64, random: &mut SplitMix64) -> Model {
        match self {
            Self::Zipf(zipf) => {
                Model::Writers(Writers::new(zipf.region(usable), zipf.writers, random, |pages, random| Writer::Zipf {
                    ranks: random::Zipf::new(pages.count, zipf.exponent),
                    places: Scatter::new(pages, zipf.cluster, random),
                }))
            }
            Self::HotCold(hot_cold) => {
                let hot = hot_cold.hot(usable) / hot_cold.writers;
                Model::Writers(Writers::new(hot_cold.region(usable), hot_cold.writers, random, |pages, random| {
                    Writer::HotCold {
                        hot,
                        hot_share: hot_cold.hot_share,
                        places: Scatter::new(pages, hot_cold.cluster, random),
                    }
                }))
            }
            Self::Phases(phases) => Model::Phases {
                hot: phases.hot(usable),
                phases: phases.phases,
                phase_ns: phases.phase.as_nanos() as u64,
                hot_share: phases.hot_share,
                places: Scatter::new(PageRun::new(0, phases.region(usable)), phases.cluster, random),
            },
            Self::Sweep(sweep) => {
                Model::Writers(Writers::new(sweep.region(usable), sweep.writers, random, |pages, _| Writer::Sweep {
                    pages,
                    stride: sweep.stride,
                    at: 0,
                }))
            }
            Self::Chase(chase) => {
                Model::Writers(Writers::new(chase.region(usable), chase.writers, random, |pages, random| {
                    Writer::Chase { places: Scatter::new(pages, 1, random), write_share: chase.write_share, at: 0 }
                }))
            }
            Self::Churn(churn) => {
                Model::Writers(Writers::new(churn.region(usable), churn.writers, random, |pages, random| {
                    Writer::Churn(Heap::new(pages, churn.live, churn.object, random))
                }))
            }
            Self::Idle(idle) => Model::Idle {
                hot: idle.hot,
                burst: idle.burst,
                period_ns: idle.period.as_nanos() as u64,
                log: idle.log(usable),
                log_at: 0,
            },
        }
    }
}

impl Zipf {
    pub(super) fn region(&self, usable: u64) -> u64 {
        self.region.unwrap_or(usable)
    }
}

impl HotCold {
    pub(super) fn region(&self, usable: u64) -> u64 {
        self.region.unwrap_or(usable)
    }

    pub(super) fn hot(&self, usable: u64) -> u64 {
        self.hot.unwrap_or(self.region(usable) / 8)
    }
}

impl Phases {
    pub(super) fn region(&self, usable: u64) -> u64 {
        self.region.unwrap_or(usable)
    }

    pub(super) fn hot(&self, usable: u64) -> u64 {
        self.hot.unwrap_or(self.region(usable) / 8)
    }
}

impl Sweep {
    pub(super) fn region(&self, usable: u64) -> u64 {
        self.region.unwrap_or(usable / 4)
    }
}

impl Chase {
    pub(super) fn region(&self, usable: u64) -> u64 {
        self.region.unwrap_or(usable / 4)
    }
}

impl Churn {
    pub(super) fn region(&self, usable: u64) -> u64 {
        self.region.unwrap_or(usable / 2)
    }
}

impl Idle {
    pub(super) fn log(&self, usable: u64) -> u64 {
        self.log.unwrap_or(self.burst.saturating_mul(16).min(usable.saturating_sub(self.hot)))
    }
}

/// A workload that is running.
#[derive(Debug)]
pub(super) enum Model {
    Writers(Writers),
    Phases { hot: u64, phases: u64, phase_ns: u64, hot_share: f64, places: Scatter },
    Idle { hot: u64, burst: u64, period_ns: u64, log: u64, log_at: u64 },
}

impl Model {
    /// Makes `writes` writes, spread evenly over the epoch.
    pub(super) fn advance(&mut self, now: Moment, writes: u64, touches: &mut Touches, random: &mut SplitMix64) {
        const OWNER: AddressSpaceId = AddressSpaceId::WHOLE_GUEST;
        match self {
            Self::Writers(writers) => writers.advance(writes, touches, random),
            Self::Phases { hot, phases, phase_ns, hot_share, places } => {
                let length = u128::from(now.end_ns - now.start_ns);
                for write in 0..writes {
                    // An epoch can lie in two phases.
                    let into = u128::from(write) * length / u128::from(writes);
                    let phase = (now.start_ns + into as u64) / *phase_ns % *phases;
                    let rank = if random.chance(*hot_share) {
                        phase * *hot + random.below(*hot)
                    } else {
                        random.below(places.len())
                    };
                    touches.write(places.page(rank), OWNER);
                }
            }
            Self::Idle { hot, burst, period_ns, log, log_at } => {
                for _ in 0..writes {
                    touches.write(random.below(*hot), OWNER);
                }
                let bursts = now.end_ns / *period_ns - now.start_ns / *period_ns;
                for _ in 0..bursts.saturating_mul(*burst).min(*log) {
                    touches.write(*hot + *log_at, OWNER);
                    *log_at = (*log_at + 1) % *log;
                }
            }
        }
    }
}

/// Several writers that take turns, write by write.
#[derive(Debug)]
pub(super) struct Writers {
    writers: Vec<(AddressSpaceId, Writer)>,
    turn: usize,
}

impl Writers {
    fn new(
        region: u64,
        writers: u64,
        random: &mut SplitMix64,
        mut writer: impl FnMut(PageRun, &mut SplitMix64) -> Writer,
    ) -> Self {
        let writers = shares(region, writers).map(|(owner, pages)| (owner, writer(pages, random))).collect();
        Self { writers, turn: 0 }
    }

    fn advance(&mut self, writes: u64, touches: &mut Touches, random: &mut SplitMix64) {
        for _ in 0..writes {
            let (owner, writer) = &mut self.writers[self.turn];
            writer.write(*owner, touches, random);
            self.turn = (self.turn + 1) % self.writers.len();
        }
    }
}

#[derive(Debug)]
enum Writer {
    Zipf { ranks: random::Zipf, places: Scatter },
    HotCold { hot: u64, hot_share: f64, places: Scatter },
    Sweep { pages: PageRun, stride: u64, at: u64 },
    Chase { places: Scatter, write_share: f64, at: u64 },
    Churn(Heap),
}

impl Writer {
    /// Writes one page.
    fn write(&mut self, owner: AddressSpaceId, touches: &mut Touches, random: &mut SplitMix64) {
        match self {
            Self::Zipf { ranks, places } => touches.write(places.page(ranks.sample(random)), owner),
            Self::HotCold { hot, hot_share, places } => {
                let cold = places.len() - *hot;
                let rank = if *hot > 0 && (cold == 0 || random.chance(*hot_share)) {
                    random.below(*hot)
                } else {
                    *hot + random.below(cold)
                };
                touches.write(places.page(rank), owner);
            }
            Self::Sweep { pages, stride, at } => {
                touches.write(pages.first.0 + *at, owner);
                *at += *stride;
                if *at >= pages.count {
                    // The next round takes the pages between, so that all are written in the end.
                    *at = (*at % *stride + 1) % *stride % pages.count;
                }
            }
            Self::Chase { places, write_share, at } => loop {
                let page = places.page(*at);
                *at = (*at + 1) % places.len();
                touches.read(page);
                if random.chance(*write_share) {
                    touches.write(page, owner);
                    break;
                }
            },
            Self::Churn(heap) => {
                let page = heap.write(random);
                touches.write(page, owner);
            }
        }
    }
}

/// Ranks laid out over pages at random, in clusters of neighbours.
#[derive(Debug)]
pub(super) struct Scatter {
    pages: PageRun,
    cluster: u64,
    clusters: Permutation,
}

impl Scatter {
    fn new(pages: PageRun, cluster: u64, random: &mut SplitMix64) -> Self {
        // Pages left over behind the last whole cluster keep their places.
        Self { pages, cluster, clusters: Permutation::new(pages.count / cluster, random) }
    }

    fn len(&self) -> u64 {
        self.pages.count
    }

    fn page(&self, rank: u64) -> u64 {
        let (cluster, within) = (rank / self.cluster, rank % self.cluster);
        let whole = self.pages.count / self.cluster;
        let place = if cluster < whole { self.clusters.at(cluster) } else { cluster };
        self.pages.first.0 + place * self.cluster + within
    }
}

/// An allocator of objects whose sizes are powers of two: each size has a part of the heap of its own, as slab
/// allocators do, and a stack of free places.
#[derive(Debug)]
struct Heap {
    slabs: Vec<Slab>,
    /// The pages of the object allocated last that are still to be written.
    writing: PageRun,
}

#[derive(Debug)]
struct Slab {
    first: u64,
    object_pages: u64,
    /// Places of objects, by number; the next to be allocated last.
    free: Vec<u32>,
    used: Vec<u32>,
    /// How many are used on average.
    target: u64,
}

impl Heap {
    fn new(pages: PageRun, live: f64, largest: u64, random: &mut SplitMix64) -> Self {
        let sizes = u64::from(largest.ilog2()) + 1;
        let share = pages.count / sizes;
        let slabs = (0..sizes).map(|size| {
            let object_pages = 1 << size;
            let places = share / object_pages;
            // Not more than the places, nor fewer than none.
            let target = (places as f64 * live) as u64;
            let mut slab = Slab {
                first: pages.first.0 + size * share,
                object_pages,
                free: (0..places as u32).rev().collect(),
                used: Vec::new(),
                target,
            };
            for _ in 0..target {
                slab.allocate();
            }
            // The heap has been in use for a while: what is free lies anywhere.
            for _ in 0..places {
                slab.free_any(random);
                slab.allocate_any(random);
            }
            slab
        });
        Self { slabs: slabs.collect(), writing: PageRun::new(0, 0) }
    }

    /// The next page written.
    fn write(&mut self, random: &mut SplitMix64) -> u64 {
        while self.writing.count == 0 {
            // Each size half as often as the one below, so that all write the same number of pages in the long run.
            let sizes = self.slabs.len() as u32;
            let draw = random.next_u64() | (1 << (sizes - 1));
            let slab = &mut self.slabs[draw.trailing_zeros() as usize];
            // A random walk around the target, from which it is drawn back.
            let places = slab.free.len() + slab.used.len();
            let fullness = slab.used.len() as f64 / places.max(1) as f64;
            let wanted = slab.target as f64 / places.max(1) as f64;
            if random.chance(0.5 + fullness - wanted) {
                slab.free_any(random);
            } else if let Some(object) = slab.allocate() {
                self.writing = object;
            }
        }
        let page = self.writing.first.0;
        self.writing = PageRun::new(page + 1, self.writing.count - 1);
        page
    }
}

impl Slab {
    /// Allocates the place freed last.
    fn allocate(&mut self) -> Option<PageRun> {
        let place = self.free.pop()?;
        self.used.push(place);
        Some(PageRun::new(self.first + u64::from(place) * self.object_pages, self.object_pages))
    }

    fn allocate_any(&mut self, random: &mut SplitMix64) {
        if !self.free.is_empty() {
            let place = random.below(self.free.len() as u64) as usize;
            let last = self.free.len() - 1;
            self.free.swap(place, last);
            self.allocate();
        }
    }

    fn free_any(&mut self, random: &mut SplitMix64) {
        if !self.used.is_empty() {
            let place = random.below(self.used.len() as u64) as usize;
            self.free.push(self.used.swap_remove(place));
        }
    }
}
