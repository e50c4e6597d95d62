//! How much more two threads do than one, and beside what stands for it otherwise.
//!
//! `cargo bench -p lcbst --features concurrent --bench concurrent` runs all workloads, with `-- uniform` behind it only
//! those whose names contain the word. Prints millions of operations a second and the ratio of two threads to one, the
//! median of several rounds in which all rivals take turns, with the least and the greatest ratio. 95 % of the operations
//! hit a key that is present (of these, the given share counts it and the rest look it up), 5 % look for an absent one or
//! insert. Where other work shares the processors, look at the ratio by processor time: the wall clock then measures the
//! other work.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Barrier, Mutex, RwLock};
use std::thread;
use std::time::Instant;

use lcbst::CountingTree;
use lcbst::concurrent::ConcurrentLcbst;

const KEYS: u64 = 65_536;
const OPERATIONS: usize = 200_000;
const ROUNDS: usize = 11;
/// Of 100 operations, so many insert a key, which is then removed: of a range of its own in each thread.
const INSERT_PERCENT: u64 = 2;
/// And so many look for a key that is absent.
const MISS_PERCENT: u64 = 3;

const OWN_KEYS: u64 = 8_192;

trait Map: Sync {
    const NAME: &str;
    fn build() -> Self;
    fn touch(&self, key: u64);
    fn contains(&self, key: u64) -> bool;
    fn remove(&self, key: u64);
    fn summary(&self) -> String {
        String::new()
    }
}

impl Map for ConcurrentLcbst<u64> {
    const NAME: &str = "ConcurrentLcbst";
    fn build() -> Self {
        Self::with_capacity(2 * KEYS as usize)
    }
    fn touch(&self, key: u64) {
        self.touch(key, 1);
    }
    fn contains(&self, key: u64) -> bool {
        self.contains_key(&key)
    }
    fn remove(&self, key: u64) {
        self.remove(&key);
    }
    fn summary(&self) -> String {
        let behind = self.snapshot().iter().map(|(_, (), weight)| weight).sum::<u64>() - self.total_weight();
        format!("{} rotations, {} hints dropped, sums behind by {behind}", self.rotations(), self.dropped_hints())
    }
}

impl Map for RwLock<BTreeMap<u64, u64>> {
    const NAME: &str = "RwLock<BTreeMap>";
    fn build() -> Self {
        Self::default()
    }
    fn touch(&self, key: u64) {
        *self.write().unwrap().entry(key).or_default() += 1;
    }
    fn contains(&self, key: u64) -> bool {
        self.read().unwrap().contains_key(&key)
    }
    fn remove(&self, key: u64) {
        self.write().unwrap().remove(&key);
    }
}

impl Map for Mutex<CountingTree<u64>> {
    const NAME: &str = "Mutex<CountingTree>";
    fn build() -> Self {
        Self::new(CountingTree::new())
    }
    fn touch(&self, key: u64) {
        self.lock().unwrap().touch(key, 1);
    }
    fn contains(&self, key: u64) -> bool {
        self.lock().unwrap().contains_key(&key)
    }
    fn remove(&self, key: u64) {
        self.lock().unwrap().remove(&key);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));

    for (workload, zipf) in [("zipf 0.99", Some(0.99)), ("uniform", None)] {
        for touch_percent in [100, 50, 5] {
            let name = format!("concurrent {workload}, {touch_percent} % of the hits count");
            if !wanted(&name) {
                continue;
            }
            println!("\n{name}");
            let streams: Vec<Vec<u64>> = (0..2).map(|seed| keys(zipf, seed)).collect();
            let mut rates = [const { Vec::new() }; 3];
            let maps = (
                prepared::<ConcurrentLcbst<u64>>(),
                prepared::<RwLock<BTreeMap<u64, u64>>>(),
                prepared::<Mutex<CountingTree<u64>>>(),
            );
            for _ in 0..ROUNDS {
                rates[0].push(round(&maps.0, &streams, touch_percent));
                rates[1].push(round(&maps.1, &streams, touch_percent));
                rates[2].push(round(&maps.2, &streams, touch_percent));
            }
            let best = report(ConcurrentLcbst::<u64>::NAME, &rates[0], 0.0, &maps.0.summary());
            report(RwLock::<BTreeMap<u64, u64>>::NAME, &rates[1], best, "");
            report(Mutex::<CountingTree<u64>>::NAME, &rates[2], best, "");
        }
    }
}

fn prepared<M: Map>() -> M {
    let map = M::build();
    for key in 0..KEYS {
        map.touch(scatter(key) * 2);
    }
    map
}

/// What one round measured of one thread and of two.
#[derive(Clone, Copy)]
struct Rates {
    /// Operations per second.
    wall: [f64; 2],
    /// Operations per second of a thread that has a processor to itself, times threads. Waiting for a lock is not in
    /// it, so it says what contention costs where there are no locks, and flatters the others.
    processor: [f64; 2],
}

fn round<M: Map>(map: &M, streams: &[Vec<u64>], touch_percent: u64) -> Rates {
    let measured = [1, 2].map(|threads| {
        let start = Barrier::new(threads + 1);
        let (seconds, processor_seconds) = thread::scope(|scope| {
            let running: Vec<_> = (0..threads)
                .map(|thread| {
                    let (keys, start) = (&streams[thread], &start);
                    scope.spawn(move || {
                        start.wait();
                        let (began, processor_began) = (Instant::now(), processor_seconds());
                        run(map, keys, thread as u64, touch_percent);
                        (began.elapsed().as_secs_f64(), processor_seconds() - processor_began)
                    })
                })
                .collect();
            start.wait();
            let seconds = running.into_iter().map(|thread| thread.join().unwrap());
            seconds.fold((0.0, 0.0), |(wall, processor), (of_wall, of_processor)| {
                (f64::max(wall, of_wall), processor + of_processor)
            })
        });
        let operations = (threads * OPERATIONS) as f64;
        (operations / seconds, operations * threads as f64 / processor_seconds)
    });
    Rates { wall: measured.map(|(wall, _)| wall), processor: measured.map(|(_, processor)| processor) }
}

/// The processor time of this thread, where the system tells (Linux, to a few milliseconds).
fn processor_seconds() -> f64 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    told.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e9
}

fn run<M: Map>(map: &M, keys: &[u64], thread: u64, touch_percent: u64) {
    let mut random = SplitMix(thread);
    for &key in keys {
        let dice = random.next();
        let (kind, share) = (dice % 100, (dice >> 32) % 100);
        // Present keys are even. Each thread has odd ones of its own to come and go.
        if kind < INSERT_PERCENT {
            let own = (key % OWN_KEYS) | 1 | ((thread + 1) << 40);
            map.touch(own);
            map.remove(own);
        } else if kind < INSERT_PERCENT + MISS_PERCENT {
            black_box(map.contains(key | 1 | (1 << 50)));
        } else if share < touch_percent {
            map.touch(key);
        } else {
            black_box(map.contains(key));
        }
    }
}

fn report(name: &str, rates: &[Rates], best: f64, summary: &str) -> f64 {
    let sorted = |of: &dyn Fn(&Rates) -> f64| {
        let mut values: Vec<f64> = rates.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let median = |of: &dyn Fn(&Rates) -> f64| sorted(of)[rates.len() / 2];
    let (one, two) = (median(&|rates| rates.wall[0]), median(&|rates| rates.wall[1]));
    let ratios = sorted(&|rates| rates.wall[1] / rates.wall[0]);
    let lead = if best > 0.0 { format!(", ours {:.2}x at two threads", best / two) } else { String::new() };
    println!(
        "  {name:20} {:6.2} {:6.2} M/s, ratio {:.2} ({:.2} to {:.2}), by processor time {:.2} M/s and {:.2}{lead} {summary}",
        one / 1e6,
        two / 1e6,
        ratios[rates.len() / 2],
        ratios[0],
        ratios[rates.len() - 1],
        median(&|rates| rates.processor[0]) / 1e6,
        median(&|rates| rates.processor[1] / rates.processor[0]),
    );
    two
}

fn keys(zipf: Option<f64>, seed: u64) -> Vec<u64> {
    let mut random = SplitMix(seed + 100);
    let cumulative: Vec<f64> = (1..=KEYS)
        .scan(0.0, |sum, rank| {
            *sum += (rank as f64).powf(-zipf.unwrap_or(0.0));
            Some(*sum)
        })
        .collect();
    let total = cumulative[KEYS as usize - 1];
    (0..OPERATIONS)
        .map(|_| {
            let target = random.next() as f64 / u64::MAX as f64 * total;
            scatter((cumulative.partition_point(|&below| below < target) as u64).min(KEYS - 1)) * 2
        })
        .collect()
}

/// A fixed permutation of `0..KEYS`.
fn scatter(rank: u64) -> u64 {
    rank * 2_654_435_761 % KEYS
}

/// The generator of Steele, Lea and Flood (OOPSLA 2014): a seed in, the same sequence on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
