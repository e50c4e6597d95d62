//! Response time on one thread: the paper's figure 6, and growth to larger trees.
//!
//! All subjects of one size exist at once and are timed in turn, each repetition beginning with another, so that a slow
//! moment of the machine meets all of them. All get the same keys.
//!
//! The time is the processor time of the measuring thread. An access on one thread never waits, so this is what it takes
//! on a machine that has nothing else to do, and other work does not count unless it takes the caches.

use std::time::Duration;

use anyhow::{Context as _, Result};
use lcbst_figures::picture::{Figure, Panel, Point, Scale, Series, Ticks};
use lcbst_figures::spread::Spread;
use lcbst_figures::table::{Column, Row, Table, cell};
use rustix::time::{ClockId, clock_gettime};

use crate::effort::Effort;
use crate::subject::{self, Found, Subject};
use crate::workload::{HOT_SETS, KEYS_PER_HOT_KEY, Pattern, TURN_ACCESSES, Workload, shuffled};

/// Seeds of what must not be alike: which keys are hot, the order of insertion, the accesses.
const HEAT_SEED: u64 = 1;
const INSERTION_SEED: u64 = 2;
const ACCESS_SEED: u64 = 3;

const COLUMNS: [Column; 13] = [
    ("pattern", "which keys are accessed how often"),
    ("keys", "keys in the structure"),
    ("subject", "what was measured"),
    ("repetitions", "timed repetitions"),
    ("accesses", "accesses in each repetition"),
    ("ns_minimum", "nanoseconds of processor time per access; the least of the repetitions"),
    ("ns_quartile_1", "the same; a quarter of the repetitions took less"),
    ("ns_median", "the same; half of the repetitions took less"),
    ("ns_quartile_3", "the same; a quarter of the repetitions took more"),
    ("ns_maximum", "the same; the most"),
    (
        "mean_depth",
        "ancestors of the accessed key just before the access, mean over accesses (0 is the root); trees only",
    ),
    ("mean_log2_share", "log2(total weight / weight of the accessed key), mean over accesses; trees only"),
    ("rotations_per_access", "single rotations, mean over accesses; trees only"),
];

/// Measures figure 6.
pub(crate) fn measure_response(effort: &Effort) -> Table {
    let mut table = Table::new(
        &format!(
            "Figure 6: response time against number of nodes, one thread. An access counts one reference of a key.\n\
             zipf 0.99: frequency of rank r in proportion to r^-0.99. uniform: all keys alike.\n\
             shifting hot sets: {HOT_SETS} sets of 1 key in {KEYS_PER_HOT_KEY} (at least 1) take turns of {TURN_ACCESSES} \
             accesses; nine in ten go to the set in turn.",
        ),
        &COLUMNS,
    );
    for pattern in Pattern::ALL {
        for &keys in &effort.response_keys {
            eprintln!("response: {}, {keys} keys", pattern.name());
            measure(&mut table, effort, &Workload::new(pattern, keys, HEAT_SEED), subject::all(keys));
        }
    }
    table
}

/// Measures growth.
pub(crate) fn measure_growth(effort: &Effort) -> Table {
    let mut table = Table::new(
        "Growth: time and depth of an access against number of nodes, one thread, with the workloads of figure 6.",
        &COLUMNS,
    );
    for pattern in [Pattern::Zipf, Pattern::Uniform] {
        for &keys in &effort.growth_keys {
            eprintln!("growth: {}, {keys} keys", pattern.name());
            measure(&mut table, effort, &Workload::new(pattern, keys, HEAT_SEED), subject::growing(keys));
        }
    }
    table
}

fn measure(table: &mut Table, effort: &Effort, workload: &Workload, mut subjects: Vec<Box<dyn Subject>>) {
    let mut stream = workload.stream(ACCESS_SEED);
    prepare(&shuffled(workload.keys(), INSERTION_SEED), &mut subjects);
    let mut to_warm_up = effort.warm_up_accesses(workload.keys());
    while to_warm_up > 0 {
        let keys = stream.take_keys(to_warm_up.min(effort.timed_accesses));
        for subject in &mut subjects {
            subject.count_all(&keys);
        }
        to_warm_up -= keys.len() as u64;
    }

    let mut samples = vec![Vec::new(); subjects.len()];
    for repetition in 0..effort.repetitions as usize {
        let lead_in = stream.take_keys(effort.lead_in_accesses);
        let timed = stream.take_keys(effort.timed_accesses);
        for turn in 0..subjects.len() {
            let at = (turn + repetition) % subjects.len();
            subjects[at].count_all(&lead_in);
            let start = processor_time();
            subjects[at].count_all(&timed);
            samples[at].push((processor_time() - start).as_secs_f64() * 1e9 / timed.len() as f64);
        }
    }

    let traced = stream.take_keys(effort.timed_accesses);
    for (subject, samples) in subjects.iter_mut().zip(samples) {
        let found = subject.trace(&traced);
        let of_found = |number: fn(&Found) -> f64| found.as_ref().map_or_else(String::new, |found| cell(number(found)));
        let mut row = vec![
            workload.pattern().name().to_owned(),
            workload.keys().to_string(),
            subject.name().to_owned(),
            effort.repetitions.to_string(),
            effort.timed_accesses.to_string(),
        ];
        row.extend(Spread::of(samples).ascending().map(cell));
        row.extend([
            of_found(|found| found.mean_depth),
            of_found(|found| found.mean_log2_share),
            of_found(|found| found.rotations_per_access),
        ]);
        table.push(row);
    }
}

/// The time this thread has had a processor.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Gives every subject every key, once.
fn prepare(order: &[u32], subjects: &mut [Box<dyn Subject>]) {
    let order: Vec<u64> = order.iter().map(|&key| u64::from(key)).collect();
    for subject in subjects {
        subject.count_all(&order);
    }
}

/// Draws figure 6.
pub(crate) fn draw_response(table: &Table) -> Result<Figure> {
    let panels = Pattern::ALL.map(|pattern| {
        let series = series(table, pattern.name(), time)?;
        Ok(Panel {
            title: pattern.name().to_owned(),
            x_label: "number of nodes (keys)".to_owned(),
            x_ticks: Ticks::PowersOfTen,
            y_label: "processor time per access (ns)".to_owned(),
            y_scale: Scale::Logarithmic,
            series,
        })
    });
    Ok(Figure {
        title: "Figure 6: response time against number of nodes, one thread".to_owned(),
        caption: "Lines: median of the repetitions. Bands: quartiles. Lower is better.".to_owned(),
        columns: 3,
        panels: panels.into_iter().collect::<Result<_>>()?,
        looks: subject::look,
    })
}

/// Draws growth.
pub(crate) fn draw_growth(table: &Table) -> Result<Figure> {
    let mut panels = Vec::new();
    for pattern in [Pattern::Zipf, Pattern::Uniform] {
        let times = series(table, pattern.name(), time)?;
        let mut depths = series(table, pattern.name(), |row| Ok(Point::exact(size(row)?, row.number("mean_depth")?)))?;
        // The counts are the same in all trees, and so is their share of the total.
        let shares = series(table, pattern.name(), |row| Ok(Point::exact(size(row)?, row.number("mean_log2_share")?)))?;
        let first = shares.into_iter().next().context("there is nothing to draw")?;
        depths.push(Series { name: "mean of log2(M/c)".to_owned(), points: first.points });
        panels.push(Panel {
            title: format!("{}: time", pattern.name()),
            x_label: "number of nodes (keys)".to_owned(),
            x_ticks: Ticks::PowersOfTen,
            y_label: "processor time per access (ns)".to_owned(),
            y_scale: Scale::Logarithmic,
            series: times,
        });
        panels.push(Panel {
            title: format!("{}: depth", pattern.name()),
            x_label: "number of nodes (keys)".to_owned(),
            x_ticks: Ticks::PowersOfTen,
            y_label: "mean depth of an access (edges)".to_owned(),
            y_scale: Scale::Linear,
            series: depths,
        });
    }
    Ok(Figure {
        title: "Growth: time and depth of an access against number of nodes, one thread".to_owned(),
        caption: "Lines: median of the repetitions. Bands: quartiles. M: total weight, c: weight of the accessed key."
            .to_owned(),
        columns: 2,
        panels,
        looks: subject::look,
    })
}

fn size(row: Row<'_>) -> Result<f64> {
    row.number("keys")
}

fn time(row: Row<'_>) -> Result<Point> {
    Ok(Point {
        x: size(row)?,
        low: row.number("ns_quartile_1")?,
        middle: row.number("ns_median")?,
        high: row.number("ns_quartile_3")?,
    })
}

/// The rows of a pattern as one series a subject, in the order in which subjects first occur.
fn series(table: &Table, pattern: &str, point: fn(Row<'_>) -> Result<Point>) -> Result<Vec<Series>> {
    let mut all: Vec<Series> = Vec::new();
    for row in table.rows() {
        if row.text("pattern")? == pattern {
            Series::add(&mut all, row.text("subject")?, point(row)?);
        }
    }
    Ok(all)
}
