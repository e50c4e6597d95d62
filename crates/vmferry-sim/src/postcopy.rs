//! Post-copy with pre-paging, the rival that moves the guest first and its memory afterwards.
//!
//! A model of its own, after M. R. Hines and K. Gopalan, "Post-copy based live virtual machine migration using adaptive
//! pre-paging and dynamic self-ballooning", VEE 2009. The guest is stopped, its device state sent, and it runs on the
//! target at once. The source pushes all pages, each once. A page that the guest touches before it is there is asked for
//! and sent next; the guest, which has one processor, stands still until it is there. Pushing goes on around the
//! places of the last faults, to both sides in turn: "bubbling" with several pivots.
//!
//! Reads count where the trace has them; else only writes do, and a guest that reads has more faults than this says.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;
use vmferry_core::pages::{PageNumber, PageSet};
use vmferry_core::wire::{Message, MigrationId};

use crate::SimError;
use crate::link::{FrameSizes, Line, sealed_bytes};
use crate::optimum::each_page_once_bytes;
use crate::outcome::Sample;
use crate::replay::{Replay, Touches, nanoseconds};
use crate::scenario::Scenario;
use crate::simulate::{LEAST_PAGE_BYTES, StopFloor};
use crate::trace::Trace;

/// The most zero pages in one note: reading them to see that they are zero takes time, for which a demanded page waits.
const MAX_ZERO_PAGES: u64 = 256;

/// How the source pushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostCopyConfig {
    /// Around how many of the last faults pages are pushed; 0: in address order, wherever faults are.
    pub pivots: usize,
    /// How many bytes of pushed pages wait in front of a demanded one.
    pub queue_bytes: u64,
}

impl Default for PostCopyConfig {
    fn default() -> Self {
        Self { pivots: 7, queue_bytes: 64 * 1024 }
    }
}

/// How a post-copy migration went. Times in ms of simulated time, sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PostCopyOutcome {
    /// The trace's name.
    pub trace: String,
    /// From the beginning until the last page was there.
    pub total_ms: f64,
    /// From the guest's stop until the source knew that it runs on the target.
    pub downtime_ms: f64,
    /// From the guest's stop until it ran on the target.
    pub stopped_ms: f64,
    /// All bytes sent to the target, frame headers included.
    pub wire_bytes: u64,
    /// Of those: page frames.
    pub page_bytes: u64,
    /// Page bytes, in relation to the fewest: each page once, in full frames.
    pub bytes_ratio: f64,
    /// Pages that were asked for.
    pub demand_faults: u64,
    /// Touches of pages that were under way already.
    pub waits: u64,
    /// For how long the guest stood still for either, after it ran on the target.
    pub stalled_ms: f64,
    /// The longest of these.
    pub stall_max_ms: f64,
    /// Share of the time from its resumption until the last page was there for which the guest stood still.
    pub slowdown: f64,
    /// The least that any migration can do which may move the guest before its memory, and this one in relation to it.
    pub optimum: PostCopyRatios,
    /// The migration over time, a sample an epoch.
    pub series: Vec<Sample>,
}

/// The optimum of post-copy, and ratios to it. It does not depend on what the guest writes. As the optimum of pre-copy
/// it has the link from the migration's beginning on, sends pages as their content alone, zero pages for nothing, and
/// keeps the downtime limit; since it need not copy pages while the guest stands still, it is never greater than that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PostCopyRatios {
    /// The shortest total time: device state and the content of each page once on the link, or the shortest downtime if
    /// that is longer. `None` if that downtime is beyond the limit.
    pub total_ms: Option<f64>,
    /// The shortest downtime: its fixed parts, with no page to copy.
    pub downtime_ms: f64,
    /// The total time in relation to the shortest.
    pub total_ratio: Option<f64>,
    /// The downtime in relation to the shortest.
    pub downtime_ratio: f64,
}

impl PostCopyRatios {
    fn of(trace: &Trace, scenario: &Scenario, sizes: &FrameSizes, total_ms: f64, downtime_ms: f64) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let least_downtime_ms = StopFloor::of(scenario, sizes).downtime_ms(0.0);
        let zero_pages: u64 = trace.zero.iter().map(|run| run.count).sum();
        let page_bytes = (trace.pages - zero_pages) * u64::from(LEAST_PAGE_BYTES.raw)
            + zero_pages * u64::from(LEAST_PAGE_BYTES.zero);
        let bytes = page_bytes + sizes.whole_device_state(scenario.stop.device_state_bytes);
        let on_link_ms = bytes as f64 / scenario.bandwidth_bytes_per_s as f64 * 1e3;
        // The total time ends when guest and pages are there; the downtime, a message later.
        let latency_ms = ms(scenario.latency);
        let least_total_ms = (on_link_ms + latency_ms).max(least_downtime_ms - latency_ms);
        let least_total_ms = (least_downtime_ms <= ms(scenario.downtime_limit)).then_some(least_total_ms);
        Self {
            total_ms: least_total_ms,
            downtime_ms: least_downtime_ms,
            total_ratio: least_total_ms.map(|least| total_ms / least),
            downtime_ratio: downtime_ms / least_downtime_ms,
        }
    }
}

/// Migrates the trace's guest by post-copy. Of the scenario, link, stop costs, host costs, epoch, start and seed count,
/// and for the optimum its downtime limit.
///
/// # Errors
/// [`SimError`]: a trace or scenario that cannot be simulated.
pub fn post_copy(trace: &Trace, scenario: &Scenario, config: &PostCopyConfig) -> Result<PostCopyOutcome, SimError> {
    scenario.check()?;
    let mut replay = Replay::new(trace, Touches::Accesses, scenario.start_offset, scenario.seed)?;
    let latency_ns = nanoseconds(scenario.latency);
    let stop = &scenario.stop;
    let sizes = FrameSizes::measure();

    // The greeting, then at once the stop.
    let stopped_ns = 2 * latency_ns + nanoseconds(stop.stop_delay);
    let mut line = Line::new(scenario.bandwidth_bytes_per_s);
    let messages = [
        Message::Paused,
        Message::Load { device_state_bytes: stop.device_state_bytes },
        Message::HandOver(MigrationId([0; 16])),
    ];
    let control_bytes: u64 = messages.iter().map(sealed_bytes).sum();
    let saved_ns = stopped_ns + nanoseconds(stop.pause) + nanoseconds(stop.save);
    let state_bytes = control_bytes + sizes.whole_device_state(stop.device_state_bytes);
    let state_left_ns = line.carry(saved_ns, state_bytes);
    // Loaded, prepared, handed over.
    let running_ns = state_left_ns + 3 * latency_ns + nanoseconds(stop.load) + nanoseconds(stop.resume);

    let mut pusher = Pusher::new(trace, scenario, config, line, state_left_ns);
    let mut stalls = Stalls::default();
    while replay.next_until(stopped_ns).is_some() {}
    let step_ns = nanoseconds(scenario.epoch);
    let mut guest_ns = stopped_ns;
    let mut series = Vec::new();
    loop {
        guest_ns += step_ns;
        // On the target the guest's time lags behind by the downtime and all stalls.
        let here_ns = |guest_ns: u64, stalls: &Stalls| guest_ns - stopped_ns + running_ns + stalls.total_ns;
        while let Some(touch) = replay.next_until(guest_ns) {
            let now_ns = here_ns(touch.at_ns, &stalls);
            pusher.push_until(now_ns);
            let (there_ns, demanded) = pusher.touch(touch.page, now_ns);
            stalls.add(there_ns.saturating_sub(now_ns), demanded);
        }
        let now_ns = here_ns(guest_ns, &stalls);
        pusher.push_until(now_ns);
        series.push(Sample {
            at_ms: now_ns as f64 / 1e6,
            pending_pages: pusher.unsent,
            held_pages: 0,
            sent_bytes: pusher.line.bytes,
            least_left_bytes: None,
        });
        if pusher.unsent == 0 && now_ns >= pusher.last_there_ns {
            break;
        }
    }
    let ms = |ns: u64| ns as f64 / 1e6;
    let end_ns = pusher.last_there_ns.max(running_ns);
    let page_bytes = pusher.line.bytes - state_bytes;
    let downtime_ms = ms(running_ns + latency_ns - stopped_ns);
    Ok(PostCopyOutcome {
        trace: trace.name.clone(),
        total_ms: ms(end_ns),
        downtime_ms,
        stopped_ms: ms(running_ns - stopped_ns),
        wire_bytes: pusher.line.bytes,
        page_bytes,
        bytes_ratio: page_bytes as f64 / each_page_once_bytes(trace) as f64,
        demand_faults: stalls.demand_faults,
        waits: stalls.waits,
        stalled_ms: ms(stalls.total_ns),
        stall_max_ms: ms(stalls.longest_ns),
        slowdown: if end_ns > running_ns { stalls.total_ns as f64 / (end_ns - running_ns) as f64 } else { 0.0 },
        optimum: PostCopyRatios::of(trace, scenario, &sizes, ms(end_ns), downtime_ms),
        series,
    })
}

/// What the guest waited for.
#[derive(Debug, Default)]
struct Stalls {
    total_ns: u64,
    longest_ns: u64,
    demand_faults: u64,
    waits: u64,
}

impl Stalls {
    fn add(&mut self, ns: u64, demanded: bool) {
        self.total_ns += ns;
        self.longest_ns = self.longest_ns.max(ns);
        if demanded {
            self.demand_faults += 1;
        } else if ns > 0 {
            self.waits += 1;
        }
    }
}

/// A place around which pages are pushed.
#[derive(Debug, Clone, Copy)]
struct Pivot {
    page: u64,
    /// Whether the page after it comes next, else the one before.
    upward: bool,
}

/// The source after the guest has left: it pushes pages, and sends those asked for first.
struct Pusher {
    line: Line,
    sizes: FrameSizes,
    latency_ns: u64,
    queue_ns: u64,
    read_ns: f64,
    send_ns: f64,
    apply_ns: f64,
    /// When the source can go on to the next page.
    ready_ns: u64,
    zero: PageSet,
    above: Neighbours,
    below: Neighbours,
    pages: u64,
    unsent: u64,
    /// When each page is there; `u64::MAX` if it was not sent.
    there_ns: Vec<u64>,
    last_there_ns: u64,
    pivots: VecDeque<Pivot>,
    pivots_max: usize,
    turn: usize,
}

impl Pusher {
    fn new(trace: &Trace, scenario: &Scenario, config: &PostCopyConfig, line: Line, ready_ns: u64) -> Self {
        let mut zero = PageSet::empty(trace.pages);
        for &run in &trace.zero {
            zero.insert_run(run);
        }
        Self {
            queue_ns: line.time_ns(config.queue_bytes),
            line,
            sizes: FrameSizes::measure(),
            latency_ns: nanoseconds(scenario.latency),
            read_ns: scenario.host.read_page_ns,
            send_ns: scenario.host.send_page_ns,
            apply_ns: scenario.host.apply_page_ns,
            ready_ns,
            zero,
            above: Neighbours::new(trace.pages),
            below: Neighbours::new(trace.pages),
            pages: trace.pages,
            unsent: trace.pages,
            there_ns: vec![u64::MAX; trace.pages as usize],
            last_there_ns: 0,
            pivots: VecDeque::from([Pivot { page: 0, upward: true }]),
            pivots_max: config.pivots,
            turn: 0,
        }
    }

    /// Pushes all pages whose turn comes by `now_ns`.
    fn push_until(&mut self, now_ns: u64) {
        while self.unsent > 0 {
            let begin_ns = self.ready_ns.max(self.line.free_at_ns().saturating_sub(self.queue_ns));
            if begin_ns > now_ns {
                break;
            }
            let page = self.choose();
            self.send(page, begin_ns);
        }
    }

    /// The guest touches a page at `now_ns`: when it is there, and whether it had to be asked for.
    fn touch(&mut self, page: u32, now_ns: u64) -> (u64, bool) {
        if self.there_ns[page as usize] == u64::MAX {
            // Until the source hears of it, it goes on pushing.
            let asked_ns = now_ns + self.latency_ns;
            self.push_until(asked_ns);
            if self.pivots_max > 0 {
                self.pivots.push_front(Pivot { page: u64::from(page), upward: true });
                self.pivots.truncate(self.pivots_max);
                self.turn = 0;
            }
            if self.there_ns[page as usize] == u64::MAX {
                self.send(u64::from(page), asked_ns.max(self.ready_ns));
            }
            return (self.there_ns[page as usize], true);
        }
        (self.there_ns[page as usize], false)
    }

    /// The next page to push: the pivots take turns, and each alternates between its sides.
    fn choose(&mut self) -> u64 {
        let count = self.pivots.len();
        let pivot = &mut self.pivots[self.turn % count];
        self.turn = (self.turn + 1) % count;
        let upper = self.above.at_or_beyond(pivot.page).filter(|&page| page < self.pages);
        // Counted from the end, what lies below a page lies beyond it.
        let mirrored = self.pages - 1 - pivot.page;
        let lower = self.below.at_or_beyond(mirrored).filter(|&page| page < self.pages);
        let lower = lower.map(|page| self.pages - 1 - page);
        let bubbling = self.pivots_max > 0;
        let (first, second) = if pivot.upward || !bubbling { (upper, lower) } else { (lower, upper) };
        pivot.upward = !pivot.upward;
        first.or(second).expect("a page is unsent, so it lies at, above or below any pivot")
    }

    /// Sends a page from `begin_ns` on; zero pages with their zero neighbours.
    fn send(&mut self, page: u64, begin_ns: u64) {
        let (first, end) =
            if self.zero.contains(PageNumber(page)) { self.zero_stretch(page) } else { (page, page + 1) };
        let pages = (end - first) as f64;
        let (bytes, sending_ns, applying_ns) = if self.zero.contains(PageNumber(page)) {
            (self.sizes.zero(1), 0.0, 0.0)
        } else {
            (self.sizes.pages(1), self.send_ns, self.apply_ns)
        };
        self.ready_ns = begin_ns + (self.read_ns * pages + sending_ns) as u64;
        let there_ns = self.line.carry(self.ready_ns, bytes) + self.latency_ns + applying_ns as u64;
        self.last_there_ns = self.last_there_ns.max(there_ns);
        for page in first..end {
            self.there_ns[page as usize] = there_ns;
            self.above.take_out(page);
            self.below.take_out(self.pages - 1 - page);
        }
        self.unsent -= end - first;
    }

    /// The unsent zero pages around a zero page, at most [`MAX_ZERO_PAGES`].
    fn zero_stretch(&self, page: u64) -> (u64, u64) {
        let open = |page: u64| self.there_ns[page as usize] == u64::MAX && self.zero.contains(PageNumber(page));
        let (mut first, mut end) = (page, page + 1);
        while end < self.pages && end - first < MAX_ZERO_PAGES && open(end) {
            end += 1;
        }
        while first > 0 && end - first < MAX_ZERO_PAGES && open(first - 1) {
            first -= 1;
        }
        (first, end)
    }
}

/// Finds the next unsent page at or beyond a page: disjoint sets of sent pages, each with the first unsent one behind it,
/// with path halving (Tarjan and van Leeuwen 1984).
struct Neighbours(Vec<u32>);

impl Neighbours {
    fn new(pages: u64) -> Self {
        Self((0..=pages).map(|page| page as u32).collect())
    }

    /// The number of pages stands for none.
    fn at_or_beyond(&mut self, page: u64) -> Option<u64> {
        let mut at = page as usize;
        while self.0[at] as usize != at {
            self.0[at] = self.0[self.0[at] as usize];
            at = self.0[at] as usize;
        }
        (at + 1 < self.0.len()).then_some(at as u64)
    }

    fn take_out(&mut self, page: u64) {
        self.0[page as usize] = page as u32 + 1;
    }
}
