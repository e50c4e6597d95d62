//! Speed of counting, batches and top-k beside other maps, as ratios from one run.
//!
//! `cargo bench -p lcbst` takes about two minutes and prints tables; `cargo bench -p lcbst -- access` only those whose
//! names contain the word. Each round measures every side once, in turn, so that a slow moment of the machine meets all of
//! them; reported is the median of the rounds, and the ratio of medians to the lazy tree. Under `cargo test` each runs once,
//! on small trees.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::time::{Duration, Instant};

use lcbst::{CbTree, CountingTree, Lazy, LazyAsPrinted, NoRotation, RotationRule, SemiSplay, Splay};
use splay_tree::SplayMap;

/// What a run costs: much for figures, little to see that everything still runs.
struct Effort {
    rounds: usize,
    keys: u64,
    warm_up_accesses: usize,
    accesses: usize,
    large_keys: u64,
    batch_keys: u64,
}

const FULL: Effort = Effort {
    rounds: 15,
    keys: 65_536,
    warm_up_accesses: 1_000_000,
    accesses: 262_144,
    large_keys: 1_000_000,
    batch_keys: 10_000,
};

const SMOKE: Effort =
    Effort { rounds: 1, keys: 256, warm_up_accesses: 1000, accesses: 1000, large_keys: 2000, batch_keys: 100 };

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let effort = if arguments.iter().any(|argument| argument == "--bench") { FULL } else { SMOKE };
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));

    for workload in [Workload::Zipf(99), Workload::Zipf(130), Workload::Uniform] {
        if wanted(&format!("access {}", workload.name())) {
            accesses(&effort, workload);
        }
    }
    if wanted("batch") {
        batches(&effort);
    }
    for workload in [Workload::Zipf(99), Workload::Uniform] {
        if wanted(&format!("top {}", workload.name())) {
            top(&effort, workload);
        }
    }
}

/// One side of a comparison. It measures itself, so that what it prepares is not counted.
struct Contender<'a> {
    name: &'static str,
    run: Box<dyn FnMut() -> Duration + 'a>,
    note: Box<dyn Fn() -> String + 'a>,
}

impl<'a> Contender<'a> {
    fn new(name: &'static str, run: impl FnMut() -> Duration + 'a) -> Self {
        Self { name, run: Box::new(run), note: Box::new(String::new) }
    }
}

/// Runs the sides in turn and prints a table. The first is what the others are compared with.
fn compare(title: &str, unit: &str, divisor: f64, rounds: usize, mut contenders: Vec<Contender<'_>>) {
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); contenders.len()];
    for round in 0..rounds {
        // Another first side each round, so that none always runs after the same.
        for turn in 0..contenders.len() {
            let index = (turn + round) % contenders.len();
            times[index].push((contenders[index].run)().as_secs_f64() / divisor);
        }
    }
    println!("\n{title}");
    println!("{:<28} {:>10} {:>10} {:>10} {:>8}", "", format!("{unit} median"), "least", "most", "ratio");
    for samples in &mut times {
        samples.sort_by(f64::total_cmp);
    }
    let first = median(&times[0]);
    for (contender, samples) in contenders.iter().zip(&times) {
        let median = median(samples);
        println!(
            "{:<28} {median:>10.1} {:>10.1} {:>10.1} {:>8.2} {}",
            contender.name,
            samples[0],
            samples[samples.len() - 1],
            median / first,
            (contender.note)(),
        );
    }
}

fn median(sorted: &[f64]) -> f64 {
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    black_box(work());
    start.elapsed()
}

/// Single accesses. Every side has seen the same accesses before, and in each round gets the same new ones.
fn accesses(effort: &Effort, workload: Workload) {
    let warm_up = workload.accesses(effort.keys, effort.warm_up_accesses, 1);
    let accesses = workload.accesses(effort.keys, effort.accesses, 2);

    let mut btree: BTreeMap<u64, u64> = BTreeMap::new();
    let mut hash: HashMap<u64, u64> = HashMap::new();
    let mut array = vec![0_u64; effort.keys as usize];
    let mut splay_map: SplayMap<u64, u64> = SplayMap::new();
    for &key in &warm_up {
        *btree.entry(key).or_default() += 1;
        *hash.entry(key).or_default() += 1;
        array[key as usize] += 1;
        *splay_map.entry(key).or_insert(0) += 1;
    }
    let read_only = btree.clone();
    let counted: CountingTree<u64> = warmed(&warm_up);

    let contenders = vec![
        touching::<Lazy>("Lazy touch", &warm_up, &accesses),
        touching::<LazyAsPrinted>("LazyAsPrinted touch", &warm_up, &accesses),
        touching::<CbTree>("CbTree touch", &warm_up, &accesses),
        touching::<SemiSplay>("SemiSplay touch", &warm_up, &accesses),
        touching::<Splay>("Splay touch", &warm_up, &accesses),
        touching::<NoRotation>("NoRotation touch", &warm_up, &accesses),
        Contender::new("Lazy get (no counting)", || {
            timed(|| accesses.iter().filter(|&key| counted.contains_key(black_box(key))).count())
        }),
        Contender::new("splay_tree crate, get", || {
            timed(|| accesses.iter().filter(|&key| splay_map.get(black_box(key)).is_some()).count())
        }),
        Contender::new("BTreeMap get", || {
            timed(|| accesses.iter().filter(|&key| read_only.contains_key(black_box(key))).count())
        }),
        Contender::new("BTreeMap entry += 1", || {
            timed(|| accesses.iter().for_each(|&key| *btree.entry(black_box(key)).or_default() += 1))
        }),
        Contender::new("HashMap entry += 1", || {
            timed(|| accesses.iter().for_each(|&key| *hash.entry(black_box(key)).or_default() += 1))
        }),
        Contender::new("flat array += 1", || {
            timed(|| accesses.iter().for_each(|&key| array[black_box(key) as usize] += 1))
        }),
    ];
    let title = format!("access, {}, {} keys", workload.name(), effort.keys);
    compare(&title, "ns", accesses.len() as f64 / 1e9, effort.rounds, contenders);
}

fn warmed<R: RotationRule + Default>(accesses: &[u64]) -> CountingTree<u64, (), R> {
    let mut tree = CountingTree::default();
    for &key in accesses {
        tree.touch(key, 1);
    }
    tree
}

fn touching<'a, R: RotationRule + Default + 'a>(
    name: &'static str,
    warm_up: &[u64],
    accesses: &'a [u64],
) -> Contender<'a> {
    let tree = std::rc::Rc::new(std::cell::RefCell::new(warmed::<R>(warm_up)));
    let measured = std::rc::Rc::clone(&tree);
    let before = tree.borrow().rotations();
    let mut counted = 0_u64;
    let rotations_per_access = std::rc::Rc::new(std::cell::Cell::new(0.0));
    let reported = std::rc::Rc::clone(&rotations_per_access);
    Contender {
        name,
        run: Box::new(move || {
            let mut tree = measured.borrow_mut();
            let time = timed(|| accesses.iter().filter(|&&key| tree.touch(black_box(key), 1)).count());
            counted += accesses.len() as u64;
            rotations_per_access.set((tree.rotations() - before) as f64 / counted as f64);
            time
        }),
        note: Box::new(move || {
            let depth = tree.borrow().depth_statistics().weighted_mean;
            format!("depth {depth:.1}, {:.4} rotations an access", reported.get())
        }),
    }
}

/// A sorted batch at once and one by one. The keys are drawn by the workload and so are warm or cold as it says.
fn batches(effort: &Effort) {
    for workload in [Workload::Uniform, Workload::Zipf(99)] {
        let mut tree: CountingTree<u64> = CountingTree::new();
        for key in 0..effort.large_keys {
            tree.touch(scatter(key, effort.large_keys), 1);
        }
        for key in workload.accesses(effort.large_keys, 2 * effort.warm_up_accesses, 3) {
            tree.touch(key, 1);
        }
        let (mut sorted, mut shuffled) = (tree.clone(), tree.clone());
        let mut btree: BTreeMap<u64, u64> = tree.weights().map(|(key, weight)| (*key, weight)).collect();

        // A new batch each round, the same for all sides.
        let batches: Vec<Vec<(u64, u64)>> = (0..effort.rounds as u64)
            .map(|round| {
                let mut keys = std::collections::BTreeSet::new();
                let mut seed = 100 + 1000 * round;
                while (keys.len() as u64) < effort.batch_keys {
                    keys.extend(workload.accesses(effort.large_keys, effort.batch_keys as usize, seed));
                    seed += 1;
                }
                keys.into_iter().take(effort.batch_keys as usize).map(|key| (key, 1)).collect()
            })
            .collect();
        let drawn: Vec<Vec<(u64, u64)>> = batches
            .iter()
            .map(|batch| {
                let mut drawn = batch.clone();
                drawn.sort_by_key(|&(key, _)| scatter(key, (1 << 61) - 1));
                drawn
            })
            .collect();
        let cold = vec![1_u8; 64 << 20];

        let mut round = [0; 4];
        let [first, second, third, fourth] = &mut round;
        let contenders = vec![
            Contender::new("touch_sorted", || {
                let batch = batches[*first].clone();
                *first += 1;
                evict(&cold);
                timed(|| tree.touch_sorted(batch))
            }),
            Contender::new("touch, in key order", || {
                let batch = &batches[*second];
                *second += 1;
                evict(&cold);
                timed(|| batch.iter().filter(|&&(key, weight)| sorted.touch(key, weight)).count())
            }),
            Contender::new("touch, in random order", || {
                let batch = &drawn[*third];
                *third += 1;
                evict(&cold);
                timed(|| batch.iter().filter(|&&(key, weight)| shuffled.touch(key, weight)).count())
            }),
            Contender::new("BTreeMap, in key order", || {
                let batch = &batches[*fourth];
                *fourth += 1;
                evict(&cold);
                timed(|| batch.iter().for_each(|&(key, weight)| *btree.entry(key).or_default() += weight))
            }),
        ];
        let title = format!("batch, {}, {} of {} keys", workload.name(), effort.batch_keys, effort.large_keys);
        compare(&title, "ns/key", effort.batch_keys as f64 / 1e9, effort.rounds, contenders);
    }
}

/// Reads so much that the caches nearest to the processor hold nothing else, as after an epoch of other work.
fn evict(cold: &[u8]) {
    black_box(cold.iter().step_by(64).map(|&byte| u64::from(byte)).sum::<u64>());
}

fn top(effort: &Effort, workload: Workload) {
    let keys = effort.large_keys;
    let mut tree: CountingTree<u64> = CountingTree::new();
    for key in 0..keys {
        tree.touch(scatter(key, keys), 1);
    }
    for key in workload.accesses(keys, 4 * effort.warm_up_accesses, 4) {
        tree.touch(key, 1);
    }
    let mut counts = vec![0_u64; keys as usize];
    for (key, weight) in tree.weights() {
        counts[*key as usize] = weight;
    }
    let select = |k: usize| {
        let mut all: Vec<(u64, usize)> = counts.iter().enumerate().map(|(key, &count)| (count, key)).collect();
        let cut = all.len() - k;
        all.select_nth_unstable(cut);
        all.drain(..cut);
        all.sort_unstable();
        all
    };
    let contenders = vec![
        Contender::new("top_k(4096)", || timed(|| tree.top_k(black_box(4096)).len())),
        Contender::new("top_k(256)", || timed(|| tree.top_k(black_box(256)).len())),
        Contender::new("hottest().take(4096)", || timed(|| tree.hottest().take(black_box(4096)).count())),
        Contender::new("flat array, select 4096", || timed(|| select(black_box(4096.min(keys as usize))))),
    ];
    compare(&format!("top, {}, {keys} keys", workload.name()), "us", 1e-6, effort.rounds, contenders);
}

/// Which keys are accessed how often. Hot keys are scattered over the key space.
#[derive(Clone, Copy)]
enum Workload {
    /// Zipf's law with this exponent, in hundredths.
    Zipf(u32),
    Uniform,
}

impl Workload {
    fn name(self) -> String {
        match self {
            Self::Zipf(hundredths) => format!("zipf {:.2}", f64::from(hundredths) / 100.0),
            Self::Uniform => "uniform".to_owned(),
        }
    }

    fn accesses(self, keys: u64, count: usize, seed: u64) -> Vec<u64> {
        let mut random = SplitMix(seed);
        match self {
            Self::Uniform => (0..count).map(|_| random.next() % keys).collect(),
            Self::Zipf(hundredths) => {
                let exponent = f64::from(hundredths) / 100.0;
                let mut sum = 0.0;
                let cumulative: Vec<f64> = (1..=keys)
                    .map(|rank| {
                        sum += (rank as f64).powf(-exponent);
                        sum
                    })
                    .collect();
                let draw = |random: &mut SplitMix| {
                    let target = random.next() as f64 / u64::MAX as f64 * sum;
                    let rank = cumulative.partition_point(|&below| below < target) as u64;
                    scatter(rank.min(keys - 1), keys)
                };
                (0..count).map(|_| draw(&mut random)).collect()
            }
        }
    }
}

/// A fixed permutation of `0..keys`: multiplication by a prime that divides none of the numbers of keys used here.
fn scatter(rank: u64, keys: u64) -> u64 {
    (u128::from(rank) * 2_654_435_761 % u128::from(keys)) as u64
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
