//! Delay of single accesses on one and on two threads: the paper's figure 7.
//!
//! Every thread counts as fast as it can for a fixed time. A fixed number of accesses would let a thread that happens to be
//! scheduled alone finish before the other has begun, and call that two threads. One access in [`TIMED_ONE_IN`] is timed by itself, waiting for locks included;
//! timing all would thin out the contention that is to be seen. The clock's own cost is in each number, and stands in the
//! table by itself.
//!
//! On a machine with other work, a thread that loses its processor would make two threads one for a while, and one that
//! loses it within a lock would delay the other by a time slice. Such a repetition is tried again, and the table says what
//! could not be avoided. Waiting for a lock is no such loss and is always kept.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Result;
use lcbst_figures::picture::{Figure, Panel, Point, Scale, Series, Ticks};
use lcbst_figures::spread::{Spread, quantile};
use lcbst_figures::table::{Column, Table, cell};

use crate::effort::Effort;
use crate::subject::{self, Shared, all_shared};
use crate::workload::{Pattern, Workload, shuffled};

/// Threads that access at the same time.
const THREADS: [usize; 2] = [1, 2];

/// Of so many accesses, one is timed. Odd, because a structure that does something at every 64th access, say, would
/// otherwise do it at timed ones always or never.
const TIMED_ONE_IN: usize = 7;

/// Tries of one repetition, of which the one with the fewest losses of a processor counts.
const MAX_TRIES: u32 = 10;

/// Delays that a thread remembers in one repetition. Even the clock alone does not reach it within the window.
const MAX_DELAYS: usize = 1 << 20;

const HEAT_SEED: u64 = 1;
const INSERTION_SEED: u64 = 2;
const WARM_UP_SEED: u64 = 3;
/// The first of the seeds that threads draw from; each thread of each repetition has one of its own.
const FIRST_ACCESS_SEED: u64 = 100;

/// The name under which the clock's own cost stands in the table.
const CLOCK: &str = "the clock alone";

const COLUMNS: [Column; 16] = [
    ("pattern", "which keys are accessed how often"),
    ("keys", "keys in the structure"),
    ("threads", "threads that access at the same time"),
    ("subject", "what was measured"),
    ("repetitions", "timed repetitions"),
    ("window_ms", "how long the threads of a repetition count, in milliseconds"),
    ("mean_ns_quartile_1", "mean delay of an access in nanoseconds; a quarter of the repetitions had less"),
    ("mean_ns_median", "the same; half of the repetitions had less"),
    ("mean_ns_quartile_3", "the same; a quarter of the repetitions had more"),
    ("p99_ns_quartile_1", "delay that 99 of 100 accesses do not exceed; quartiles over repetitions as before"),
    ("p99_ns_median", "see p99_ns_quartile_1"),
    ("p99_ns_quartile_3", "see p99_ns_quartile_1"),
    ("per_s_quartile_1", "accesses per second of all threads together; quartiles over repetitions as before"),
    ("per_s_median", "see per_s_quartile_1"),
    ("per_s_quartile_3", "see per_s_quartile_1"),
    ("preemptions", "times that the system took a processor from a thread, median over repetitions; 0 outside Linux"),
];

/// What one repetition gave.
#[derive(Clone, Copy, Debug)]
struct Sample {
    mean_ns: f64,
    p99_ns: f64,
    accesses_per_s: f64,
    preemptions: u64,
}

/// Measures figure 7.
pub(crate) fn measure(effort: &Effort) -> Table {
    let mut table = Table::new(
        "Figure 7: delay of one access against number of nodes, on one and two threads. An access counts one reference \
         of a key.\nThe mean holds all timed accesses, also those during which the thread did not run. Each delay includes \
         one reading of the clock; its cost is in the rows of \"the clock alone\".",
        &COLUMNS,
    );
    let pattern = Pattern::Zipf;
    for &keys in &effort.delay_keys {
        eprintln!("delay: {}, {keys} keys", pattern.name());
        let workload = Workload::new(pattern, keys, HEAT_SEED);
        let mut subjects = all_shared(keys);
        let order = shuffled(keys, INSERTION_SEED);
        let warm_up = workload.stream(WARM_UP_SEED).take_keys(effort.warm_up_accesses(keys));
        for subject in &subjects {
            order.iter().for_each(|&key| subject.count(u64::from(key)));
            warm_up.iter().for_each(|&key| subject.count(key));
        }
        subjects.push(Box::new(Clock));
        let mut samples = vec![vec![Vec::new(); subjects.len()]; THREADS.len()];
        let mut seed = FIRST_ACCESS_SEED;
        for repetition in 0..effort.repetitions as usize {
            for (threads, samples) in THREADS.into_iter().zip(&mut samples) {
                let accesses: Vec<Vec<u64>> = (0..threads)
                    .map(|_| {
                        seed += 1;
                        workload.stream(seed).take_keys(effort.lead_in_accesses + effort.timed_accesses)
                    })
                    .collect();
                for turn in 0..subjects.len() {
                    let at = (turn + repetition) % subjects.len();
                    samples[at].push(run_quietly(&*subjects[at], &accesses, effort));
                }
            }
        }
        for (threads, samples) in THREADS.into_iter().zip(&samples) {
            for (subject, samples) in subjects.iter().zip(samples) {
                let quartiles = |number: fn(&Sample) -> f64| {
                    let spread = Spread::of(samples.iter().map(number).collect());
                    [spread.quartile_1, spread.median, spread.quartile_3].map(cell)
                };
                let mut row = vec![
                    pattern.name().to_owned(),
                    keys.to_string(),
                    threads.to_string(),
                    subject.name().to_owned(),
                    effort.repetitions.to_string(),
                    effort.delay_window.as_millis().to_string(),
                ];
                row.extend(quartiles(|sample| sample.mean_ns));
                row.extend(quartiles(|sample| sample.p99_ns));
                row.extend(quartiles(|sample| sample.accesses_per_s));
                row.push(cell(Spread::of(samples.iter().map(|sample| sample.preemptions as f64).collect()).median));
                table.push(row);
            }
        }
    }
    table
}

/// A subject that does nothing: what remains is the clock.
struct Clock;

impl Shared for Clock {
    fn name(&self) -> &'static str {
        CLOCK
    }

    fn count(&self, key: u64) {
        black_box(key);
    }
}

/// Runs until no thread lost its processor, or the tries are used up.
fn run_quietly(subject: &dyn Shared, accesses: &[Vec<u64>], effort: &Effort) -> Sample {
    let mut best = run(subject, accesses, effort);
    for _ in 1..MAX_TRIES {
        if best.preemptions == 0 {
            break;
        }
        let sample = run(subject, accesses, effort);
        if sample.preemptions < best.preemptions {
            best = sample;
        }
    }
    best
}

/// Lets one thread for each list of keys count it, over and over, until the window is over.
fn run(subject: &dyn Shared, accesses: &[Vec<u64>], effort: &Effort) -> Sample {
    let to_arrive = AtomicUsize::new(accesses.len());
    let of_threads: Vec<OfThread> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            accesses.iter().map(|keys| scope.spawn(|| run_thread(subject, keys, effort, &to_arrive))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a measuring thread does not panic")).collect()
    });
    let mut delays: Vec<f64> = of_threads.iter().flat_map(|thread| &thread.delays_ns).copied().collect();
    delays.sort_by(f64::total_cmp);
    Sample {
        mean_ns: delays.iter().sum::<f64>() / delays.len() as f64,
        p99_ns: quantile(&delays, 0.99),
        accesses_per_s: of_threads.iter().map(|thread| thread.accesses_per_s).sum(),
        preemptions: of_threads.iter().map(|thread| thread.preemptions).sum(),
    }
}

/// What one thread saw of a repetition.
struct OfThread {
    delays_ns: Vec<f64>,
    accesses_per_s: f64,
    preemptions: u64,
}

fn run_thread(subject: &dyn Shared, keys: &[u64], effort: &Effort, to_arrive: &AtomicUsize) -> OfThread {
    let (lead_in, timed) = keys.split_at(effort.lead_in_accesses as usize);
    let mut delays = Vec::with_capacity(MAX_DELAYS);
    lead_in.iter().for_each(|&key| subject.count(key));
    // Not a barrier of the standard library: the last to come would be far ahead of those it has to wake.
    to_arrive.fetch_sub(1, Ordering::AcqRel);
    let mut spins = 0_u32;
    while to_arrive.load(Ordering::Acquire) > 0 {
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(1024) { std::thread::yield_now() } else { spin_loop() }
    }
    let preemptions_before = preemptions();
    let start = Instant::now();
    let mut counted = 0;
    for group in timed.chunks(TIMED_ONE_IN).cycle().take(MAX_DELAYS) {
        let before = Instant::now();
        subject.count(group[0]);
        let after = Instant::now();
        delays.push((after - before).as_nanos() as f64);
        group[1..].iter().for_each(|&key| subject.count(key));
        counted += group.len();
        if after - start >= effort.delay_window {
            break;
        }
    }
    let elapsed_s = start.elapsed().as_secs_f64();
    OfThread {
        delays_ns: delays,
        accesses_per_s: counted as f64 / elapsed_s,
        preemptions: preemptions() - preemptions_before,
    }
}

/// How often this thread has had to give up its processor while it had work; 0 where the system does not say.
fn preemptions() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let count = |line: &str| line.strip_prefix("nonvoluntary_ctxt_switches:")?.trim().parse().ok();
    status.lines().find_map(count).unwrap_or(0)
}

/// Draws figure 7.
pub(crate) fn draw(table: &Table) -> Result<Figure> {
    let mut panels = Vec::new();
    for (statistic, title) in [("mean", "mean"), ("p99", "99th percentile")] {
        for threads in THREADS {
            let mut series = Vec::new();
            for row in table.rows() {
                if row.text("threads")?.parse() == Ok(threads) && row.text("subject")? != CLOCK {
                    let number = |quantile: &str| row.number(&format!("{statistic}_ns_{quantile}"));
                    let point = Point {
                        x: row.number("keys")?,
                        low: number("quartile_1")?,
                        middle: number("median")?,
                        high: number("quartile_3")?,
                    };
                    Series::add(&mut series, row.text("subject")?, point);
                }
            }
            let plural = if threads == 1 { "" } else { "s" };
            panels.push(Panel {
                title: format!("{title}, {threads} thread{plural}"),
                x_label: "number of nodes (keys)".to_owned(),
                x_ticks: Ticks::PowersOfTen,
                y_label: "delay of one access (ns)".to_owned(),
                y_scale: Scale::Logarithmic,
                series,
            });
        }
    }
    Ok(Figure {
        title: "Figure 7: delay against number of nodes, zipf 0.99".to_owned(),
        caption: "Lines: median of the repetitions. Bands: quartiles. Lower is better.".to_owned(),
        columns: 2,
        panels,
        looks: subject::look,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_run_times_every_thread_at_least_once() {
        let accesses = vec![(0..100).collect::<Vec<u64>>(); 2];
        let effort = Effort { lead_in_accesses: 10, delay_window: Duration::ZERO, ..Effort::quick() };
        for subject in all_shared(100) {
            let sample = run(&*subject, &accesses, &effort);
            assert!(sample.mean_ns > 0.0 && sample.p99_ns > 0.0 && sample.accesses_per_s > 0.0, "{sample:?}");
        }
    }
}
