//! The least that any schedule can do, in closed form.
//!
//! For a fixed trace, a link of B bytes/s that is free from time 0 on, and a pause at T: a page has to be sent after
//! its last write before T, which was `age` ago; a page without one has to be sent too, and `age` is T for it. In the
//! last `a` seconds before the pause, at most `B·a` bytes can be sent of the pages whose age is at most `a`. So at least
//!
//! ```text
//! S(T) = max(0, max over ages a of (bytes of the pages with age ≤ a  −  B·a))
//! ```
//!
//! bytes remain for the stop phase, and a sender that knows the future reaches that: it sends each page after its last
//! write, whichever is ready. That is a queue whose customers are the last writes, and S(T) is its backlog (Lindley 1952).
//! The tests compare it with a scheduler that knows nothing of this. `S(T) / B` bounds the copy part of the
//! downtime, and sending each page once bounds the bytes; both can be had together. The earliest pause within a budget D
//! is `T* = min{T : S(T) ≤ B·D}`; where there is none, no live schedule meets D.
//!
//! Between writes S falls with slope B, and a write raises it by its page's bytes at most. [`StopBound`] follows it
//! through time: the last writes stand in time order at the leaves of a tree whose nodes hold the bytes below and the
//! maximum above, so that a write costs O(log of the pages written), and less where many are taken in at once.

use std::time::Duration;

use vmferry_core::pages::{PageNumber, PageSet};
use vmferry_core::wire::{MAX_PAGES_PER_FRAME, MAX_ZERO_RUNS_PER_FRAME};

use crate::SimError;
use crate::link::FrameSizes;
use crate::replay::{Replay, Touches, nanoseconds};
use crate::trace::Trace;

/// Backlogs that differ by less are the same: sums of bytes times nanoseconds are rounded.
const ROUNDING_BYTES: f64 = 0.01;

/// What a page of each kind costs on the wire at the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageBytes {
    /// A page with content.
    pub raw: u32,
    /// A page that holds only zero bytes.
    pub zero: u32,
}

impl PageBytes {
    /// All pages alike.
    pub const fn uniform(bytes: u32) -> Self {
        Self { raw: bytes, zero: bytes }
    }
}

/// The closed form itself, for pages in order of ascending age: each age in seconds and the page's bytes.
///
/// The result is in bytes. Ages beyond the beginning of the push have to be cut to the time since then.
pub fn least_left_bytes(pages: impl IntoIterator<Item = (f64, f64)>, rate_bytes_per_s: f64) -> f64 {
    let mut bytes = 0.0;
    pages.into_iter().fold(0.0, |most: f64, (age_s, page_bytes)| {
        bytes += page_bytes;
        most.max(bytes - rate_bytes_per_s * age_s)
    })
}

/// The fewest bytes in which all pages of the trace's guest can cross once, frame headers included: in address order,
/// in full frames, with notes for what is zero.
pub fn each_page_once_bytes(trace: &Trace) -> u64 {
    let frames = FrameSizes::measure();
    let mut bytes = 0;
    let mut next = 0;
    let mut add_raw = |pages: u64| {
        bytes += (pages / MAX_PAGES_PER_FRAME) * frames.pages(MAX_PAGES_PER_FRAME);
        if !pages.is_multiple_of(MAX_PAGES_PER_FRAME) {
            bytes += frames.pages(pages % MAX_PAGES_PER_FRAME);
        }
    };
    for run in &trace.zero {
        add_raw(run.first.0.saturating_sub(next));
        next = run.end();
    }
    add_raw(trace.pages.saturating_sub(next));
    let mut runs = trace.zero.len() as u64;
    while runs > 0 {
        let in_frame = runs.min(MAX_ZERO_RUNS_PER_FRAME);
        bytes += frames.zero(in_frame);
        runs -= in_frame;
    }
    bytes
}

/// S(T) for a T that moves forward through a trace.
#[derive(Debug, Clone)]
pub struct StopBound<'a> {
    replay: Replay<'a>,
    page_bytes: PageBytes,
    /// Pages that hold only zero bytes so far.
    zero: PageSet,
    now_ns: u64,
    rate_bytes_per_ns: f64,
    last_writes: LastWrites,
}

impl<'a> StopBound<'a> {
    /// The bound at T = 0 for a link that begins to send then, `start_offset` into the trace. The seed gives the writes
    /// their moments, as in [`Replay`].
    ///
    /// # Errors
    /// [`SimError::NoBandwidth`], or as [`Replay::new`].
    ///
    /// # Panics
    /// If a page with content costs nothing.
    pub fn new(
        trace: &'a Trace,
        start_offset: Duration,
        seed: u64,
        rate_bytes_per_s: u64,
        page_bytes: PageBytes,
    ) -> Result<Self, SimError> {
        assert!(page_bytes.raw > 0, "pages with content cross for nothing");
        if rate_bytes_per_s == 0 {
            return Err(SimError::NoBandwidth);
        }
        let replay = Replay::new(trace, Touches::Writes, start_offset, seed)?;
        let mut zero = PageSet::empty(trace.pages);
        for &run in &trace.zero {
            zero.insert_run(run);
        }
        let all = (trace.pages - zero.len()) * u64::from(page_bytes.raw) + zero.len() * u64::from(page_bytes.zero);
        let rate_bytes_per_ns = rate_bytes_per_s as f64 / 1e9;
        let last_writes = LastWrites::new(trace.pages, all as f64, rate_bytes_per_ns);
        Ok(Self { replay, page_bytes, zero, now_ns: 0, rate_bytes_per_ns, last_writes })
    }

    /// T.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.now_ns)
    }

    /// Moves T forward; a time that has passed changes nothing.
    pub fn advance_to(&mut self, at: Duration) {
        self.advance_to_ns(nanoseconds(at));
    }

    /// S(T) in bytes: what no schedule can have sent by now.
    pub fn left_bytes(&mut self) -> f64 {
        self.last_writes.left_bytes(self.now_ns)
    }

    /// Moves T forward to the first moment, from now on, at which S(T) is at most `budget_bytes`, or to `until` if
    /// there is none before.
    pub fn find(&mut self, budget_bytes: f64, until: Duration) -> Option<Duration> {
        let until_ns = nanoseconds(until);
        loop {
            let excess = self.left_bytes() - budget_bytes;
            if excess <= ROUNDING_BYTES {
                return Some(self.now());
            }
            if self.now_ns >= until_ns {
                return None;
            }
            // S falls with slope B at most: before this moment it cannot get there, whatever is written.
            let soonest_ns = (excess / self.rate_bytes_per_ns).ceil().max(1.0) as u64;
            self.advance_to_ns(self.now_ns.saturating_add(soonest_ns).min(until_ns));
        }
    }

    fn advance_to_ns(&mut self, at_ns: u64) {
        while let Some(touch) = self.replay.next_until(at_ns) {
            let was_zero = self.zero.remove(PageNumber(u64::from(touch.page)));
            let before = if was_zero { self.page_bytes.zero } else { self.page_bytes.raw };
            self.last_writes.write(touch.page, touch.at_ns, before, self.page_bytes.raw);
        }
        self.now_ns = self.now_ns.max(at_ns);
    }
}

/// Marks a page that was never written.
const NONE: u32 = u32::MAX;
/// Last writes in a leaf of the tree: few enough to go through at each change, many enough to keep the tree small.
const LEAF_ENTRIES: usize = 8;

/// A node of the tree over the last writes.
#[derive(Debug, Clone, Copy)]
struct Node {
    /// Bytes of the pages below.
    bytes: f64,
    /// The maximum, over the last writes below, of B · (their moment) + the bytes from them on; −∞ without any.
    most: f64,
}

impl Node {
    const EMPTY: Self = Self { bytes: 0.0, most: f64::NEG_INFINITY };

    /// The node above these two, of which `late` holds the later writes.
    fn above(early: Self, late: Self) -> Self {
        Self { bytes: early.bytes + late.bytes, most: late.most.max(early.most + late.bytes) }
    }
}

/// A write of a page.
#[derive(Debug, Clone, Copy)]
struct Entry {
    at_ns: u64,
    page: u32,
    /// The page's bytes; 0 once it was written again.
    bytes: u32,
}

/// The last write of each page, in order of time.
///
/// Invariants: of each page written, exactly one entry has bytes, that at `position[page]`; entries ascend in time; and
/// unless they are marked in `changed`, leaves are what [`LastWrites::leaf`] makes of their entries, and inner nodes what
/// [`Node::above`] makes of the two below.
#[derive(Debug, Clone)]
struct LastWrites {
    rate_bytes_per_ns: f64,
    /// Bytes of the pages never written, which have to be sent from moment 0 on.
    never_written_bytes: f64,
    entries: Vec<Entry>,
    position: Vec<u32>,
    /// An implicit tree: the children of node i are 2i and 2i + 1, the root is 1, the leaves are the upper half.
    nodes: Vec<Node>,
    /// Leaves whose entries changed since they were computed last.
    changed: PageSet,
}

impl LastWrites {
    fn new(pages: u64, bytes: f64, rate_bytes_per_ns: f64) -> Self {
        let mut this = Self {
            rate_bytes_per_ns,
            never_written_bytes: bytes,
            entries: Vec::new(),
            position: vec![NONE; pages as usize],
            nodes: Vec::new(),
            changed: PageSet::empty(0),
        };
        this.build(64);
        this
    }

    fn leaves(&self) -> usize {
        self.nodes.len() / 2
    }

    /// The page had `before` bytes and has `bytes` since this write, the latest of all so far.
    fn write(&mut self, page: u32, at_ns: u64, before: u32, bytes: u32) {
        if self.entries.len() == self.leaves() * LEAF_ENTRIES {
            self.compact();
        }
        match self.position[page as usize] {
            NONE => self.never_written_bytes -= f64::from(before),
            old => {
                self.entries[old as usize].bytes = 0;
                self.changed.insert(PageNumber(u64::from(old) / LEAF_ENTRIES as u64));
            }
        }
        let new = self.entries.len();
        self.entries.push(Entry { at_ns, page, bytes });
        self.position[page as usize] = new as u32;
        self.changed.insert(PageNumber((new / LEAF_ENTRIES) as u64));
    }

    fn left_bytes(&mut self, now_ns: u64) -> f64 {
        self.settle();
        let root = self.nodes[1];
        let most = root.most.max(self.never_written_bytes + root.bytes);
        (most - self.rate_bytes_per_ns * now_ns as f64).max(0.0)
    }

    /// Computes what changed, each node once.
    fn settle(&mut self) {
        let leaves = self.leaves();
        let mut level: Vec<usize> = self.changed.pages().map(|leaf| leaves + leaf.0 as usize).collect();
        self.changed.clear();
        for &node in &level {
            self.nodes[node] = self.leaf(node - leaves);
        }
        while level.first().is_some_and(|&node| node > 1) {
            level.iter_mut().for_each(|node| *node /= 2);
            level.dedup();
            for &node in &level {
                self.nodes[node] = Node::above(self.nodes[2 * node], self.nodes[2 * node + 1]);
            }
        }
    }

    fn leaf(&self, leaf: usize) -> Node {
        let first = (leaf * LEAF_ENTRIES).min(self.entries.len());
        let end = (first + LEAF_ENTRIES).min(self.entries.len());
        self.entries[first..end].iter().rev().filter(|entry| entry.bytes > 0).fold(Node::EMPTY, |node, entry| {
            let bytes = node.bytes + f64::from(entry.bytes);
            Node { bytes, most: node.most.max(bytes + self.rate_bytes_per_ns * entry.at_ns as f64) }
        })
    }

    /// Takes out the entries of pages written again, and makes room for at least as many as are left.
    fn compact(&mut self) {
        self.entries.retain(|entry| entry.bytes > 0);
        for (index, entry) in self.entries.iter().enumerate() {
            self.position[entry.page as usize] = index as u32;
        }
        let wanted = (2 * self.entries.len()).div_ceil(LEAF_ENTRIES).next_power_of_two();
        self.build(wanted.max(self.leaves()));
    }

    /// Computes the whole tree, with so many leaves.
    fn build(&mut self, leaves: usize) {
        self.nodes.clear();
        self.nodes.resize(2 * leaves, Node::EMPTY);
        self.changed = PageSet::empty(leaves as u64);
        for leaf in 0..leaves {
            self.nodes[leaves + leaf] = self.leaf(leaf);
        }
        for node in (1..leaves).rev() {
            self.nodes[node] = Node::above(self.nodes[2 * node], self.nodes[2 * node + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmferry_core::pages::{AddressSpaceId, PAGE_BYTES, PageRun};

    use super::*;
    use crate::trace::{TraceEpoch, WrittenRun};

    /// What a scheduler leaves that knows nothing of the closed form: a link of one unit a slot, jobs of some units that
    /// can be sent from their release on, as many units as possible matched to slots by augmenting paths (Kuhn 1955).
    fn left_by_matching(jobs: &[(usize, usize)], slots: usize) -> usize {
        fn augment(unit: usize, release: &[usize], taken: &mut [Option<usize>], seen: &mut [bool]) -> bool {
            for slot in release[unit]..taken.len() {
                if seen[slot] {
                    continue;
                }
                seen[slot] = true;
                if taken[slot].is_none_or(|other| augment(other, release, taken, seen)) {
                    taken[slot] = Some(unit);
                    return true;
                }
            }
            false
        }
        let release: Vec<usize> =
            jobs.iter().flat_map(|&(release, units)| std::iter::repeat_n(release, units)).collect();
        let mut taken = vec![None; slots];
        let sent =
            (0..release.len()).filter(|&unit| augment(unit, &release, &mut taken, &mut vec![false; slots])).count();
        release.len() - sent
    }

    /// Writes of a small guest, ascending in time: in which slot, which page.
    fn writes(pages: usize, slots: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
        prop::collection::vec((0..=slots, 0..pages), 0..40).prop_map(|mut writes| {
            writes.sort_unstable();
            writes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// The closed form, and the tree that follows it, leave exactly what the best schedule leaves.
        #[test]
        fn equals_a_scheduler(
            (sizes, slots, writes) in (1..12_usize, 1..24_usize).prop_flat_map(|(pages, slots)| {
                (prop::collection::vec(1..4_usize, pages), Just(slots), writes(pages, slots))
            }),
        ) {
            // A slot is a second, and a unit a byte.
            let pages = sizes.len();
            let mut tree = LastWrites::new(pages as u64, sizes.iter().sum::<usize>() as f64, 1e-9);
            let mut jobs: Vec<_> = sizes.iter().map(|&units| (0, units)).collect();
            let mut next = writes.iter().peekable();
            for now in 0..=slots {
                while let Some(&(slot, page)) = next.next_if(|(slot, _)| *slot <= now) {
                    jobs[page].0 = slot;
                    let bytes = sizes[page] as u32;
                    tree.write(page as u32, slot as u64 * 1_000_000_000, bytes, bytes);
                }
                let left = left_by_matching(&jobs, now) as f64;
                let mut ages: Vec<_> = jobs.iter().map(|&(slot, units)| ((now - slot) as f64, units as f64)).collect();
                ages.sort_by(|a, b| a.partial_cmp(b).unwrap());
                prop_assert_eq!(least_left_bytes(ages, 1.0), left, "at {}: {:?}", now, &jobs);
                let followed = tree.left_bytes(now as u64 * 1_000_000_000);
                prop_assert!((followed - left).abs() < 1e-6, "{} followed, {} left at {}", followed, left, now);
            }
        }
    }

    /// A trace whose writes the given function lists for each epoch.
    fn trace(pages: u64, zero: Vec<PageRun>, epochs: impl Iterator<Item = Vec<PageRun>>) -> Trace {
        let epoch = |runs: Vec<PageRun>| TraceEpoch {
            written: runs.into_iter().map(|run| WrittenRun { run, owner: AddressSpaceId::WHOLE_GUEST }).collect(),
            accessed: None,
        };
        Trace {
            name: "test".into(),
            pages,
            epoch: Duration::from_millis(10),
            zero,
            epochs: epochs.map(epoch).collect(),
        }
    }

    fn random_trace(pages: u64, epochs: &[(u64, u64)]) -> Trace {
        let runs = |&(first, count): &(u64, u64)| {
            let first = first % pages;
            vec![PageRun::new(first, count.min(pages - first))]
        };
        trace(pages, vec![PageRun::new(pages / 2, pages / 4)], epochs.iter().map(runs))
    }

    /// S at a moment, computed from nothing but the replay and the closed form.
    fn naive_left(trace: &Trace, seed: u64, rate: u64, bytes: PageBytes, at: Duration) -> f64 {
        let mut last = vec![None; trace.pages as usize];
        let mut replay = Replay::new(trace, Touches::Writes, Duration::ZERO, seed).unwrap();
        while let Some(touch) = replay.next_until(nanoseconds(at)) {
            last[touch.page as usize] = Some(touch.at_ns);
        }
        let is_zero = |page: u64| trace.zero.iter().any(|run| (run.first.0..run.end()).contains(&page));
        let mut ages: Vec<_> = (0..trace.pages)
            .map(|page| {
                let written = last[page as usize];
                let size = if written.is_none() && is_zero(page) { bytes.zero } else { bytes.raw };
                ((nanoseconds(at) - written.unwrap_or(0)) as f64 / 1e9, f64::from(size))
            })
            .collect();
        ages.sort_by(|a, b| a.partial_cmp(b).unwrap());
        least_left_bytes(ages, rate as f64)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Following the bound through time gives what the closed form gives at each moment, and the first moment within
        /// a budget is the first: just before it, and at each earlier moment looked at, the bound is above.
        #[test]
        fn following_equals_looking_at_each_moment(
            epochs in prop::collection::vec((any::<u64>(), 0..200_u64), 1..20),
            pages in 40..300_u64,
            seed in any::<u64>(),
            rate in 1_000_000..40_000_000_u64,
            budget_ms in 0..40_u64,
        ) {
            let trace = random_trace(pages, &epochs);
            let bytes = PageBytes { raw: 4096, zero: 3 };
            let bound = || StopBound::new(&trace, Duration::ZERO, seed, rate, bytes).unwrap();
            let horizon = Duration::from_millis(400);
            let mut following = bound();
            for step in 0..40_u64 {
                let at = Duration::from_micros(step * 9973);
                following.advance_to(at);
                let naive = naive_left(&trace, seed, rate, bytes, at);
                let left = following.left_bytes();
                prop_assert!((left - naive).abs() < 0.1, "{} followed, {} naive at {:?}", left, naive, at);
            }
            let budget = rate as f64 * budget_ms as f64 / 1e3;
            let mut finding = bound();
            let found = finding.find(budget, horizon);
            prop_assert!(found.is_none_or(|at| at == finding.now()));
            let end = found.unwrap_or(horizon);
            prop_assert!(found.is_none() || naive_left(&trace, seed, rate, bytes, end) <= budget + 0.1);
            // S jumps only at writes, so its low points are just before them.
            let mut replay = Replay::new(&trace, Touches::Writes, Duration::ZERO, seed).unwrap();
            let mut moments = vec![nanoseconds(end)];
            while let Some(touch) = replay.next_until(nanoseconds(end)) {
                moments.push(touch.at_ns);
            }
            for at in moments.into_iter().filter(|&at| at > 0).step_by(7) {
                let before = Duration::from_nanos(at - 1);
                let left = naive_left(&trace, seed, rate, bytes, before);
                let slope_ns = rate as f64 / 1e9;
                prop_assert!(left > budget - slope_ns - 0.1, "{} left at {:?}, budget {}", left, before, budget);
            }
        }
    }

    #[test]
    fn an_idle_guest_can_be_paused_once_it_has_been_sent() {
        let idle = trace(1000, vec![PageRun::new(0, 400)], std::iter::once(vec![]));
        let mut bound = StopBound::new(&idle, Duration::ZERO, 0, 4_096_000, PageBytes { raw: 4096, zero: 0 }).unwrap();
        assert_eq!(bound.left_bytes(), 600.0 * 4096.0);
        // 600 pages at 1000 pages/s, of which 100 may be left.
        assert_eq!(bound.find(100.0 * 4096.0, Duration::from_secs(10)), Some(Duration::from_millis(500)));
        bound.advance_to(Duration::from_millis(550));
        assert!((bound.left_bytes() - 50.0 * 4096.0).abs() < 1.0);
        assert_eq!(bound.find(0.0, Duration::from_millis(590)), None);
        assert_eq!(bound.now(), Duration::from_millis(590));
        assert_eq!(bound.find(0.0, Duration::from_secs(10)), Some(Duration::from_millis(600)));
    }

    #[test]
    fn a_storm_has_no_pause_within_a_small_budget() {
        // 1000 pages in each 10 ms, on a link that carries 100 in that time.
        let storm = trace(1000, vec![], std::iter::once(vec![PageRun::new(0, 1000)]));
        let rate = 10_000 * PAGE_BYTES;
        let mut bound = StopBound::new(&storm, Duration::ZERO, 0, rate, PageBytes::uniform(4096)).unwrap();
        assert_eq!(bound.find(500.0 * 4096.0, Duration::from_secs(5)), None);
        assert!(bound.left_bytes() > 850.0 * 4096.0);
    }

    #[test]
    fn a_guest_sent_once_costs_its_pages_and_their_frames() {
        let idle = trace(1000, vec![PageRun::new(0, 10), PageRun::new(300, 100)], std::iter::once(vec![]));
        let sizes = FrameSizes::measure();
        // 290 pages between the zero runs, and 600 behind them.
        let expected = sizes.pages(256) + sizes.pages(34) + 2 * sizes.pages(256) + sizes.pages(88) + sizes.zero(2);
        assert_eq!(each_page_once_bytes(&idle), expected);
    }

    #[test]
    fn a_link_that_carries_nothing_is_refused() {
        let idle = trace(10, vec![], std::iter::once(vec![]));
        let bound = StopBound::new(&idle, Duration::ZERO, 0, 0, PageBytes::uniform(1));
        assert_eq!(bound.map(|_| ()), Err(SimError::NoBandwidth));
    }
}
