//! What write tracking costs: the writer, tracked at 20 epochs a second against untracked in turn; the scan, by how
//! much was written; the stop of the VMM at attach.
//!
//! Run with `cargo xtask bench track`. Needs the right to trace a child, which root
//! has, and any user where `kernel.yama.ptrace_scope` is 0 or 1.

#[path = "../tests/track_support/mod.rs"]
mod track_support;

use std::time::{Duration, Instant};

use track_support::{Kind, PAGE, Vmm};

const EPOCH: Duration = Duration::from_millis(50);
const TURNS: usize = 7;
const EPOCHS_PER_TURN: u32 = 20;
const PAGES_PER_GIB: usize = (1 << 30) / PAGE;

fn median<T: PartialOrd + Copy>(values: &mut [T]) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("no figure is NaN"));
    values[values.len() / 2]
}

fn main() {
    attach_stop();
    scan_time();
    // Of 512 MiB, so much is rewritten as fast as one thread can: 1 MiB, 16 MiB (the demo's hot set), 64 MiB.
    for hot_pages in [256, 4096, 16384] {
        writer(hot_pages);
    }
}

fn attach_stop() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("write 0 64");
    let mut stops: Vec<_> = (0..200)
        .map(|_| {
            let tracker = vmm.attach().expect("the child can be traced");
            tracker.attach_stop().expect("an attach stops a thread").as_micros()
        })
        .collect();
    let middle = median(&mut stops);
    println!("attach: VMM's thread stopped for {middle} us (median of 200), {} us (most)", stops[stops.len() - 1]);
}

fn scan_time() {
    let mut vmm = Vmm::start(Kind::Memfd, PAGES_PER_GIB);
    // Every page is there before; the child leaves a quarter of its RAM untouched.
    vmm.process.order(&format!("write 0 {PAGES_PER_GIB}"));
    let begun = Instant::now();
    let mut tracker = vmm.attach().expect("the child can be traced");
    println!("attach to 1 GiB, arming included: {:.2} ms", begun.elapsed().as_secs_f64() * 1e3);
    for written in [0, 200, PAGES_PER_GIB] {
        let mut times_ms = [0.0; TURNS];
        for time_ms in &mut times_ms {
            let step = PAGES_PER_GIB / written.max(1);
            if written == PAGES_PER_GIB {
                vmm.process.order(&format!("write 0 {PAGES_PER_GIB}"));
            } else {
                for page in 0..written {
                    vmm.process.order(&format!("write {} 1", page * step));
                }
            }
            let mut found = Vec::new();
            let stats = tracker.scan(&mut found).expect("the child lives");
            assert_eq!(stats.pages, written as u64);
            *time_ms = stats.duration.as_secs_f64() * 1e3;
        }
        let middle = median(&mut times_ms);
        println!(
            "scan of 1 GiB, {written} pages written: {middle:.3} ms ({:.3} to {:.3})",
            times_ms[0],
            times_ms[TURNS - 1]
        );
    }
}

/// One thread writes at random as fast as it can; how many writes it makes in a turn, tracked and not.
fn writer(hot_pages: usize) {
    let mut vmm = Vmm::start(Kind::Memfd, PAGES_PER_GIB / 2);
    vmm.process.order(&format!("writers 1 {hot_pages}"));
    let region = vmm.region();
    let pid = vmm.process.pid();
    let mut writes_in = |each_epoch: &mut dyn FnMut()| {
        let before: u64 = vmm.process.ask("writes").parse().expect("a number");
        let begun = Instant::now();
        for epoch in 1..=EPOCHS_PER_TURN {
            std::thread::sleep((begun + EPOCH * epoch).saturating_duration_since(Instant::now()));
            each_epoch();
        }
        let elapsed_s = begun.elapsed().as_secs_f64();
        let after: u64 = vmm.process.ask("writes").parse().expect("a number");
        (after - before) as f64 / elapsed_s
    };
    writes_in(&mut || ());
    let mut ratios = [0.0; TURNS];
    let mut pages_per_epoch = [0; TURNS];
    for (ratio, pages) in ratios.iter_mut().zip(&mut pages_per_epoch) {
        let free = writes_in(&mut || ());
        let mut tracker = vmferry_host::track::Tracker::attach(pid, vec![region]).expect("the child can be traced");
        let mut written = Vec::new();
        let tracked = writes_in(&mut || {
            written.clear();
            *pages = tracker.scan_epoch(&mut written).expect("the child lives").pages;
        });
        drop(tracker);
        *ratio = tracked / free;
    }
    let middle = median(&mut ratios);
    println!(
        "writer over {} MiB of 512 MiB, 20 scans/s ({} pages each): {:.3} of its untracked rate ({:.3} to {:.3})",
        (hot_pages * PAGE) >> 20,
        median(&mut pages_per_epoch),
        middle,
        ratios[0],
        ratios[TURNS - 1]
    );
}
