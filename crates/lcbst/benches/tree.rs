//! Speed of counting and of top-k, beside `BTreeMap`.
//!
//! Run with `cargo bench -p lcbst`. Access benchmarks run a batch of 65,536 accesses per sample; divan reports the
//! items per second, so a sample's time divided by 65,536 is the time of an access.

use std::collections::BTreeMap;

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use lcbst::{CountingTree, LazyAsPrinted, RotationRule};

const KEYS: u64 = 65_536;
const ACCESSES: usize = 65_536;
const WARM_UP_ACCESSES: usize = 1_000_000;
const LARGE_KEYS: u64 = 1_000_000;

fn main() {
    divan::main();
}

#[divan::bench(args = WORKLOADS)]
fn touch_lazy(bencher: Bencher, workload: &Workload) {
    bench_tree::<lcbst::Lazy>(bencher, workload);
}

#[divan::bench(args = WORKLOADS)]
fn touch_lazy_as_printed(bencher: Bencher, workload: &Workload) {
    bench_tree::<LazyAsPrinted>(bencher, workload);
}

#[divan::bench(args = WORKLOADS)]
fn btree_map_get_mut_and_add(bencher: Bencher, workload: &Workload) {
    let mut map: BTreeMap<u64, u64> = BTreeMap::new();
    for key in workload.accesses(WARM_UP_ACCESSES, 1) {
        *map.entry(key).or_default() += 1;
    }
    let accesses = workload.accesses(ACCESSES, 2);
    bencher.counter(ItemsCount::new(ACCESSES)).bench_local(|| {
        for key in &accesses {
            match map.get_mut(black_box(key)) {
                Some(count) => *count += 1,
                None => drop(map.insert(*key, 1)),
            }
        }
    });
}

#[divan::bench(args = WORKLOADS, sample_count = 10)]
fn build_lazy(bencher: Bencher, workload: &Workload) {
    let accesses = workload.accesses(ACCESSES, 3);
    bencher.counter(ItemsCount::new(ACCESSES)).bench_local(|| {
        let mut tree: CountingTree<u64> = CountingTree::new();
        for key in &accesses {
            tree.touch(*key, 1);
        }
        tree
    });
}

#[divan::bench(args = [Workload::Zipf(99), Workload::Uniform], sample_count = 20)]
fn top_4096_of_1000000(bencher: Bencher, workload: &Workload) {
    bench_top(bencher, workload, 4096);
}

#[divan::bench(args = [Workload::Zipf(99), Workload::Uniform], sample_count = 20)]
fn top_256_of_1000000(bencher: Bencher, workload: &Workload) {
    bench_top(bencher, workload, 256);
}

fn bench_top(bencher: Bencher, workload: &Workload, k: usize) {
    let mut tree: CountingTree<u64> = CountingTree::new();
    for key in 0..LARGE_KEYS {
        tree.touch(scatter(key, LARGE_KEYS), 1);
    }
    for key in workload.accesses_among(LARGE_KEYS, 4_000_000, 4) {
        tree.touch(key, 1);
    }
    bencher.bench_local(|| tree.top_k(black_box(k)).len());
}

#[divan::bench(sample_count = 20)]
fn sort_for_top_4096_of_1000000(bencher: Bencher) {
    let mut counts: BTreeMap<u64, u64> = (0..LARGE_KEYS).map(|key| (key, 1)).collect();
    for key in Workload::Zipf(99).accesses_among(LARGE_KEYS, 4_000_000, 4) {
        *counts.entry(key).or_default() += 1;
    }
    bencher.bench_local(|| {
        let mut all: Vec<(u64, u64)> = counts.iter().map(|(key, count)| (*count, *key)).collect();
        let cut = all.len() - 4096;
        all.select_nth_unstable(cut);
        all.drain(..cut);
        all.sort_unstable();
        all
    });
}

fn bench_tree<R: RotationRule + Default>(bencher: Bencher, workload: &Workload) {
    let mut tree: CountingTree<u64, (), R> = CountingTree::default();
    for key in workload.accesses(WARM_UP_ACCESSES, 1) {
        tree.touch(key, 1);
    }
    let accesses = workload.accesses(ACCESSES, 2);
    bencher.counter(ItemsCount::new(ACCESSES)).bench_local(|| {
        for key in &accesses {
            tree.touch(*black_box(key), 1);
        }
    });
}

/// Which keys are accessed how often. Hot keys are scattered over the key space.
#[derive(Clone, Copy, Debug)]
enum Workload {
    /// Zipf's law with this exponent, in hundredths.
    Zipf(u32),
    Uniform,
}

const WORKLOADS: [Workload; 3] = [Workload::Zipf(99), Workload::Zipf(130), Workload::Uniform];

impl Workload {
    fn accesses(self, count: usize, seed: u64) -> Vec<u64> {
        self.accesses_among(KEYS, count, seed)
    }

    fn accesses_among(self, keys: u64, count: usize, seed: u64) -> Vec<u64> {
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

/// A fixed permutation of `0..keys`: multiplication by a prime that divides neither 65,536 nor 1,000,000.
fn scatter(rank: u64, keys: u64) -> u64 {
    rank * 2_654_435_761 % keys
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
