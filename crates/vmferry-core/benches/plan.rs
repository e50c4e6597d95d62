//! What a scan costs the source: all that happens from the scan's end until the next pages are sent.
//!
//! `cargo xtask bench plan` drives [`Source`] as a driver does, for a guest of 1 TiB that writes 10^4 to 10^7 pages in each
//! epoch, in scattered runs of 1 to 8 pages. Of each scan is measured how long [`Source::handle_scan`] takes with the
//! written runs, and then [`Source::poll_action`] until it hands out pages or has nothing to do: the predictor learns, the
//! held set is chosen, and the next pages. With `-- 1000000` only for so many pages, with words like `wide` or `late` only
//! what contains one. Under `cargo test` it runs once, on a small guest.
//!
//! | workload | written in each epoch |
//! |---|---|
//! | `same` | the same pages |
//! | `wide` | a random quarter of four times as many, so that the predictor forgets pages from 262,144 on |
//! | `new` | other pages each time: those that were never written before, or, where the guest has too few, not for long. The worst case for forgetting |
//!
//! | phase | what is measured |
//! |---|---|
//! | `observing` | scans before the first page is sent |
//! | `cold` | scans of the push while most of the guest was never written and not sent |
//! | `late` | the same with few such pages left |
//! | `warm` | scans of the push when all of them were sent: the only ones at which the held set is chosen |
//!
//! The link carries 10 Gbit/s, epochs are 50 ms, the downtime limit is 300 ms. The policy is vmferry's own, except
//! that it never pauses and never gives up.
//!
//! `--csv FILE` writes these columns, times in ms of processor time:
//!
//! | column | meaning |
//! |---|---|
//! | `workload`, `phase` | as above |
//! | `guest_pages` | pages of the guest |
//! | `written_pages`, `written_runs` | in each epoch |
//! | `tracked_pages` | pages that the predictor knows |
//! | `pending_pages` | pages that the target lacks |
//! | `scan_ms`, `scan_least_ms` | median and least of all that was measured of a scan |
//! | `handle_ms`, `poll_ms` | medians of its two parts |
//! | `learn_ms`, `visit_ms` | medians of the predictor's share: learning the epoch, and visiting its pages, with what the source does at each |
//! | `predictor_bytes` | what the predictor says it occupies |
//! | `bitmap_bytes` | the source's sets of pages, if each bit of them was touched |
//! | `peak_bytes` | by how much the process was larger at its largest, during the phase, than before there was a source |

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmferry_core::engine::{Action, SentPages, Source, SourceConfig};
use vmferry_core::pages::{AddressSpaceId, PAGE_BYTES, PageNumber, PageRun, RamBlock, RamLayout, WholeGuest};
use vmferry_core::plan::{
    Decision, Facts, FixedCosts, Hold, IfStuck, Moment, PAGE_WIRE_BYTES, Patience, Policy, Predictive, PushRules,
};
use vmferry_core::predict::{Predictor, PredictorSpec, RankedPage};
use vmferry_core::wire::{Encodings, Message, MigrationId, VERSION_MAX, Welcome};

use self::bench_support::{Arguments, Column, SplitMix, Table, Value, median_and_least, now_ns};

mod bench_support;

/// A guest of 1 TiB.
const GUEST_PAGES: u64 = 1 << 28;
const MAX_RUN_PAGES: u64 = 8;
/// 10 Gbit/s.
const LINK_BYTES_PER_S: f64 = 1.25e9;
/// So many times as fast is the link while the pages between two phases are sent, one after the other.
const HURRY: [f64; 3] = [100.0, 10.0, 1.0];
/// In at least so many epochs the link is as fast as it is before the next phase begins, so that the source knows that. Else
/// all that is pending might seem to fit into the pause, be held, and nothing be sent that would show otherwise.
const UNHURRIED_EPOCHS: f64 = 10.0;
const EPOCH: Duration = Duration::from_millis(50);
/// What a scan is said to have taken.
const SCAN_TIME: Duration = Duration::from_millis(10);
/// The sets of pages that a source keeps.
const BITMAPS: u64 = 8;
/// The epochs of the wide workload differ, and come again after so many.
const DIFFERENT_EPOCHS: usize = 6;
/// Observing, cold, late and warm.
const PHASES: usize = 4;
/// Pages never written that are left when the late phase begins, as a part of the guest.
const LATE_PART: u64 = 100;

const fn column(name: &'static str, heading: &'static str) -> Column {
    Column { name, heading: Some(heading) }
}

const COLUMNS: &[Column] = &[
    column("workload", "workload"),
    column("phase", "phase"),
    Column { name: "guest_pages", heading: None },
    column("written_pages", "written"),
    column("written_runs", "runs"),
    column("tracked_pages", "tracked"),
    column("pending_pages", "pending"),
    column("scan_ms", "scan ms"),
    column("scan_least_ms", "least"),
    column("handle_ms", "handle ms"),
    column("poll_ms", "poll ms"),
    column("learn_ms", "learn ms"),
    column("visit_ms", "visit ms"),
    column("predictor_bytes", "predictor"),
    column("bitmap_bytes", "bitmaps"),
    column("peak_bytes", "peak"),
];

/// How much is done.
struct Effort {
    guest_pages: u64,
    sizes: Vec<usize>,
    /// Scans before those measured, until the predictor is full.
    settling_scans: usize,
    measured_scans: usize,
}

fn main() {
    let arguments = Arguments::read();
    let mut effort = Effort {
        guest_pages: GUEST_PAGES,
        sizes: vec![10_000, 100_000, 1_000_000, 10_000_000],
        settling_scans: 8,
        measured_scans: 9,
    };
    if !arguments.is_bench {
        effort = Effort { guest_pages: 1 << 14, sizes: vec![300], settling_scans: 2, measured_scans: 1 };
    }
    if !arguments.sizes.is_empty() {
        effort.sizes.clone_from(&arguments.sizes);
    }
    let mut table = Table::new(COLUMNS);
    table.print_headings();
    for &pages in &effort.sizes {
        for workload in [Workload::Same, Workload::Wide, Workload::New] {
            let name = workload.name();
            // A word is part of a workload's name or of a phase's.
            let named: Vec<&String> = arguments
                .words
                .iter()
                .filter(|word| WORKLOADS.iter().any(|name| name.contains(word.as_str())))
                .collect();
            if named.is_empty() || named.iter().any(|word| name.contains(word.as_str())) {
                measure(workload, pages, &effort, &arguments.words, &mut table);
            }
        }
    }
    table.write_csv(arguments.csv.as_deref());
}

const WORKLOADS: [&str; 3] = ["same", "wide", "new"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Workload {
    Same,
    Wide,
    New,
}

impl Workload {
    fn name(self) -> &'static str {
        match self {
            Self::Same => WORKLOADS[0],
            Self::Wide => WORKLOADS[1],
            Self::New => WORKLOADS[2],
        }
    }

    /// The runs of each epoch, for so many scans at most; the epochs come again after the last of them.
    fn epochs(self, pages: usize, guest_pages: u64, scans: usize) -> Vec<Vec<PageRun>> {
        let mut random = SplitMix(1);
        match self {
            Self::Same => vec![scattered(&mut random, pages, guest_pages)],
            Self::Wide => {
                let all = scattered(&mut random, 4 * pages, guest_pages);
                let quarter = |_| all.iter().copied().filter(|_| random.next().is_multiple_of(4)).collect();
                (0..DIFFERENT_EPOCHS).map(quarter).collect()
            }
            Self::New => {
                // Of the places that a run can take, half remain free at the least.
                let fitting = guest_pages / MAX_RUN_PAGES / 2 / runs_of(pages) as u64;
                let epochs = scans.min(fitting as usize);
                let all = scattered(&mut random, epochs * pages, guest_pages);
                let mut each = vec![Vec::with_capacity(2 * runs_of(pages)); epochs];
                all.into_iter().for_each(|run| each[(random.next() % epochs as u64) as usize].push(run));
                each
            }
        }
    }
}

/// Runs of about so many pages in all, scattered over the guest.
fn scattered(random: &mut SplitMix, pages: usize, guest_pages: u64) -> Vec<PageRun> {
    let places = random.distinct(runs_of(pages), guest_pages / MAX_RUN_PAGES);
    places.into_iter().map(|place| PageRun::new(place * MAX_RUN_PAGES, 1 + random.next() % MAX_RUN_PAGES)).collect()
}

/// How many runs of 1 to 8 pages are so many pages.
fn runs_of(pages: usize) -> usize {
    let mean = (1 + MAX_RUN_PAGES) as f64 / 2.0;
    (pages as f64 / mean) as usize
}

fn measure(workload: Workload, pages: usize, effort: &Effort, words: &[String], table: &mut Table) {
    let scans_per_phase = effort.settling_scans + effort.measured_scans;
    let epochs = workload.epochs(pages, effort.guest_pages, PHASES * scans_per_phase);
    let before_bytes = resident_bytes("VmRSS:");
    // Observed are one scan more than the phase has: the first one only arms.
    let observe = EPOCH * scans_per_phase as u32;
    let mut driver = Driver::new(effort.guest_pages, observe);
    let mut next = epochs.iter().cycle();
    let mut phase = |driver: &mut Driver, name: &str| {
        for _ in 0..effort.settling_scans {
            driver.scan(next.next().expect("a cycle has no end"));
        }
        reset_peak();
        let costs: Vec<Costs> =
            (0..effort.measured_scans).map(|_| driver.scan(next.next().expect("a cycle has no end"))).collect();
        let peak_bytes = resident_bytes("VmHWM:").saturating_sub(before_bytes);
        let named: Vec<&String> =
            words.iter().filter(|word| !WORKLOADS.iter().any(|name| name.contains(word.as_str()))).collect();
        if !named.is_empty() && !named.iter().any(|word| name.contains(word.as_str())) {
            return;
        }
        let of = |cost: fn(&Costs) -> f64| median_and_least(costs.iter().map(|costs| cost(costs) / 1e6).collect());
        let (scan_ms, scan_least_ms) = of(|costs| costs.handle_ns + costs.poll_ns);
        let ms = |cost: fn(&Costs) -> f64| Value::Measured(of(cost).0, 2);
        let runs = epochs.iter().map(Vec::len).sum::<usize>() / epochs.len();
        let written = epochs.iter().flatten().map(|run| run.count).sum::<u64>() / epochs.len() as u64;
        table.row(&[
            Value::Text(workload.name().to_owned()),
            Value::Text(name.to_owned()),
            Value::Count(effort.guest_pages),
            Value::Count(written),
            Value::Count(runs as u64),
            Value::Count(driver.clock.tracked_pages.load(Ordering::Relaxed)),
            Value::Count(driver.source.pending_pages()),
            Value::Measured(scan_ms, 2),
            Value::Measured(scan_least_ms, 2),
            ms(|costs| costs.handle_ns),
            ms(|costs| costs.poll_ns),
            ms(|costs| costs.learn_ns),
            ms(|costs| costs.visit_ns),
            Value::Count(driver.clock.memory_bytes.load(Ordering::Relaxed)),
            // Level by level a sixty-fourth of the one below.
            Value::Count(BITMAPS * effort.guest_pages / 8 * 64 / 63),
            Value::Count(peak_bytes),
        ]);
    };
    phase(&mut driver, "observing");
    phase(&mut driver, "cold");
    // Of the pages written, none is sent before all others.
    let seen_pages = |phases: usize| pages_of(&epochs[..epochs.len().min(phases * scans_per_phase)]);
    driver.send_until(seen_pages(2) + effort.guest_pages / LATE_PART);
    phase(&mut driver, "late");
    driver.send_until(seen_pages(3));
    phase(&mut driver, "warm");
}

/// How many pages are written in any of the epochs. Runs of different epochs that begin at the same page are the same.
fn pages_of(epochs: &[Vec<PageRun>]) -> u64 {
    let mut runs: Vec<PageRun> = epochs.iter().flatten().copied().collect();
    runs.sort_unstable();
    runs.dedup();
    runs.iter().map(|run| run.count).sum()
}

/// What a scan took.
#[derive(Debug, Clone, Copy)]
struct Costs {
    handle_ns: f64,
    poll_ns: f64,
    learn_ns: f64,
    visit_ns: f64,
}

/// A source, its peer and the time. Between calls, a scan is under way.
struct Driver {
    source: Source,
    clock: Arc<PredictorClock>,
    now: Duration,
    bytes_per_s: f64,
}

impl Driver {
    /// A source that observes the guest since its first scan.
    fn new(guest_pages: u64, observe: Duration) -> Self {
        let clock = Arc::new(PredictorClock::default());
        let block = RamBlock { id: "ram".to_owned(), bytes: guest_pages * PAGE_BYTES };
        let config = SourceConfig {
            migration: MigrationId([0; 16]),
            layout: RamLayout::new(vec![block]).expect("one block"),
            machine: "bench".to_owned(),
            vcpus: 1,
            downtime_limit: Duration::from_millis(300),
            bandwidth_cap_bytes_per_s: None,
            epoch: EPOCH,
            observe,
            verify: false,
            stall_timeout: Duration::from_secs(1 << 30),
            fixed: FixedCosts { time: Duration::from_millis(20), device_state_bytes: 1 << 20 },
            encodings: Encodings::RAW,
            if_stuck: IfStuck::Abort,
            streams: 1,
        };
        let predictor =
            TimedPredictor { predictor: PredictorSpec::default().build(guest_pages), clock: Arc::clone(&clock) };
        let patience = Patience { passes: 8, time: Duration::from_secs(5) };
        let policy = Steadfast(Predictive::new(patience));
        let source = Source::new(config, Box::new(predictor), Box::new(policy));
        let mut driver = Self { source, clock, now: Duration::ZERO, bytes_per_s: LINK_BYTES_PER_S };
        driver.run_until_scan();
        driver.scan(&[]);
        driver
    }

    /// The scan ends and found these pages written; then goes on until the next one.
    fn scan(&mut self, written: &[PageRun]) -> Costs {
        self.clock.learn_ns.store(0, Ordering::Relaxed);
        self.clock.visit_ns.store(0, Ordering::Relaxed);
        let begin_ns = now_ns();
        self.source.handle_scan(self.now, SCAN_TIME, written, &WholeGuest);
        let handled_ns = now_ns();
        let action = loop {
            match self.source.poll_action(self.now) {
                Some(Action::Send(message)) => self.send(&message),
                action => break action,
            }
        };
        let polled_ns = now_ns();
        if !action.is_some_and(|action| self.carry_out(action)) {
            self.run_until_scan();
        }
        Costs {
            handle_ns: handled_ns - begin_ns,
            poll_ns: polled_ns - handled_ns,
            learn_ns: self.clock.learn_ns.load(Ordering::Relaxed) as f64,
            visit_ns: self.clock.visit_ns.load(Ordering::Relaxed) as f64,
        }
    }

    /// Sends pages until only so many are pending, over a link that is faster at first. The guest writes nothing meanwhile.
    fn send_until(&mut self, pending_pages: u64) {
        let epoch_pages = LINK_BYTES_PER_S * EPOCH.as_secs_f64() / PAGE_BYTES as f64;
        for hurry in HURRY {
            self.bytes_per_s = LINK_BYTES_PER_S * hurry;
            // What the next epoch sends is left to a slower link.
            let left = if hurry > 1.0 { (epoch_pages * (hurry + UNHURRIED_EPOCHS)) as u64 } else { 0 };
            while self.source.pending_pages() > pending_pages + left {
                self.scan(&[]);
            }
        }
    }

    fn run_until_scan(&mut self) {
        loop {
            match self.source.poll_action(self.now) {
                Some(action) => {
                    if self.carry_out(action) {
                        return;
                    }
                }
                None => {
                    let timeout = self.source.poll_timeout().expect("it waits for nothing but time");
                    self.now = timeout.max(self.now + Duration::from_micros(1));
                }
            }
        }
    }

    /// Whether a scan is under way now.
    fn carry_out(&mut self, action: Action) -> bool {
        match action {
            Action::Scan { .. } => return true,
            Action::Send(message) => self.send(&message),
            Action::SendPages { runs, .. } => {
                let raw_pages: u64 = runs.iter().map(|run| run.count).sum();
                let raw_bytes = raw_pages * PAGE_BYTES + runs.len() as u64 * (PAGE_WIRE_BYTES - PAGE_BYTES);
                self.source.handle_pages_sent(self.now, &SentPages { raw_pages, raw_bytes, ..SentPages::default() });
                self.now += Duration::from_secs_f64(raw_bytes as f64 / self.bytes_per_s);
                let bytes = self.source.wire_bytes();
                self.source.handle_message(self.now, &Message::Progress { bytes });
            }
            Action::OpenStreams { .. }
            | Action::ScanHoles
            | Action::Pause
            | Action::SendDeviceState
            | Action::SendDigests
            | Action::Resume
            | Action::Throttle { .. }
            | Action::End => panic!("{action:?} in a push that never ends"),
        }
        false
    }

    /// Sends a message, and has the peer answer at once.
    fn send(&mut self, message: &Message<'static>) {
        self.source.handle_message_sent(self.now, 0);
        let answer = match message {
            Message::Hello(hello) => Some(Message::Welcome(Welcome {
                version: VERSION_MAX,
                migration: hello.migration,
                encodings: Encodings::RAW,
                streams: 1,
            })),
            Message::Ping(number) => Some(Message::Pong(*number)),
            _ => None,
        };
        if let Some(answer) = answer {
            self.source.handle_message(self.now, &answer);
        }
    }
}

/// vmferry's own policy, but that it never ends the push.
#[derive(Debug)]
struct Steadfast(Predictive);

impl Policy for Steadfast {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn rules(&self) -> PushRules {
        self.0.rules()
    }

    fn hold(&self, facts: &Facts, heats: &[f64], other_heat: f64) -> Hold {
        self.0.hold(facts, heats, other_heat)
    }

    fn decide(&mut self, _moment: Moment, _facts: &Facts) -> Decision {
        Decision::Push
    }
}

/// What a [`TimedPredictor`] measures.
#[derive(Debug, Default)]
struct PredictorClock {
    learn_ns: AtomicU64,
    visit_ns: AtomicU64,
    tracked_pages: AtomicU64,
    memory_bytes: AtomicU64,
}

/// A predictor that says what it takes of the source's time.
#[derive(Debug)]
struct TimedPredictor {
    predictor: Box<dyn Predictor>,
    clock: Arc<PredictorClock>,
}

fn timed<T>(sum_ns: &AtomicU64, call: impl FnOnce() -> T) -> T {
    let begin_ns = now_ns();
    let result = call();
    sum_ns.fetch_add((now_ns() - begin_ns) as u64, Ordering::Relaxed);
    result
}

impl Predictor for TimedPredictor {
    fn name(&self) -> &'static str {
        self.predictor.name()
    }

    fn observe(&mut self, owner: AddressSpaceId, written: &[PageRun]) {
        timed(&self.clock.learn_ns, || self.predictor.observe(owner, written));
    }

    fn end_epoch(&mut self) {
        timed(&self.clock.learn_ns, || self.predictor.end_epoch());
        self.clock.tracked_pages.store(self.predictor.tracked_pages(), Ordering::Relaxed);
        self.clock.memory_bytes.store(self.predictor.memory_bytes() as u64, Ordering::Relaxed);
    }

    fn tracked_pages(&self) -> u64 {
        self.predictor.tracked_pages()
    }

    fn heat(&self, page: PageNumber) -> f64 {
        self.predictor.heat(page)
    }

    fn visit(&self, each: &mut dyn FnMut(RankedPage)) {
        timed(&self.clock.visit_ns, || self.predictor.visit(each));
    }

    fn memory_bytes(&self) -> usize {
        self.predictor.memory_bytes()
    }

    fn least_stop_pages(&self, pages_per_epoch: f64) -> Option<u64> {
        self.predictor.least_stop_pages(pages_per_epoch)
    }
}

/// A size of this process as Linux tells it; 0 where it does not.
fn resident_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Lets the largest size of this process be measured anew.
fn reset_peak() {
    // Where that is not allowed, the largest size since the process began is reported.
    let _ = std::fs::write(Path::new("/proc/self/clear_refs"), "5");
}
