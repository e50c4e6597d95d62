//! The first process of the Linux test guest: writes memory by the kernel command line's `vmferry.` words, checks it all
//! the time, and says so on the serial port.
//!
//! Lines it prints, each starting with `vmferry-guest: `:
//!
//! | line | when |
//! |---|---|
//! | `ready pages=N` | all pages are filled, the writers start |
//! | `tick T writes=M wrong=K` | every `vmferry.tick_ms`, by default 100; `T` counts on, `M` page writes so far, `K` wrong pages found so far |
//! | `check pages=N wrong=K` | the background check went through all pages, about once a second, unless `vmferry.background_check=no` |
//! | `full-check pages=N wrong=K` | the answer to `check`: all pages checked in one pause of the writers |
//! | `wrong page=P expected=S found=…` | details of wrong pages, a few of them |
//! | `network A` | the card has address A and echoes, with `vmferry.network` |
//! | `disk found records=R last=L kept=0 wrong=K` | with `vmferry.disk`: R records are on it, L is the highest number |
//! | `disk last=L checked=C wrong=K` | ten times a second: L is the last record written, C were read back so far |
//! | `disk-check records=R last=L kept=P wrong=K` | the answer to `check-disk`: the whole disk and the P pages kept by readers |
//! | `failed: …` | it cannot go on; the machine powers off |
//!
//! Lines it reads from the serial port: `check`, `check-disk`, and `poweroff`.
//!
//! With the word `vmferry.processes` it starts several processes instead, see `processes.rs`.
//!
//! The first process must never end: the kernel would panic with a message about that instead of the cause. Every way
//! out, a panic included, prints its reason and powers the machine off.

mod disk;
mod network;
mod processes;
mod system;

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{panic, process, thread};

use vmferry_guest::{
    CheckReport, Disk, Drive, Gate, Memory, Network, PAGE_BYTES, Parameters, Processes, Ticks, Worker, region_words,
};

use disk::Written;

/// From one tick of the guest of several processes, or of the disk, to the next.
const TICK: Duration = Duration::from_millis(100);

/// Memory left to the kernel and this program when the pages are taken.
const SPARE_BYTES: u64 = 8 << 20;

/// Wrong pages that are printed in detail. The counts go on.
const DETAILS_MAX: u64 = 16;

/// Bytes of a line that is read from the serial port.
const COMMAND_BYTES_MAX: u64 = 256;

fn main() {
    if process::id() != 1 {
        eprintln!("vmferry-guest-init is the first process of a virtual machine and does nothing in any other place");
        process::exit(2);
    }
    panic::set_hook(Box::new(|panic| end(&panic.to_string())));
    match run() {
        Ok(never) => match never {},
        Err(error) => end(&error.to_string()),
    }
}

enum Never {}

/// Prints why, and powers off.
fn end(reason: &str) -> ! {
    let line = format!("vmferry-guest: failed: {}\n", reason.replace('\n', " "));
    // Not through the console's lock, which a panicking thread may hold.
    match File::options().write(true).open(system::SERIAL_PORT) {
        Ok(mut port) => drop(port.write_all(line.as_bytes())),
        Err(_) => eprint!("{line}"),
    }
    system::power_off()
}

fn run() -> Result<Never, Box<dyn Error>> {
    let port = system::prepare()?;
    let console = Console { port: Mutex::new(port.try_clone()?) };
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let parameters = Parameters::from_command_line(&command_line)?;
    let ticks = Ticks::from_command_line(&command_line)?;
    if let Some(wanted) = Processes::from_command_line(&command_line)? {
        return processes::run(&console, &wanted);
    }
    let workers = Worker::all(&parameters)?;
    if let Some(network) = Network::from_command_line(&command_line)? {
        network::start(&console, &network)?;
    }
    let disk = Disk::from_command_line(&command_line)?.map(|disk| Written::open(&disk)).transpose()?;

    check_available(&parameters, &fs::read_to_string("/proc/meminfo")?)?;
    let region = allocate(region_words(parameters.pages))?;
    let aligned = &region[region.as_ptr().align_offset(PAGE_BYTES)..];
    let memory = Memory::in_region(aligned, &parameters)?.require_aligned()?;
    memory.fill();
    console.say(&format!("ready pages={}", memory.page_count()));

    let (gate, stop, writes) = (Gate::new(), AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    thread::scope(|scope| {
        for mut worker in workers {
            let drive =
                Drive { memory, member: gate.join(), writes: &writes, stop: &stop, elapsed: move || start.elapsed() };
            scope.spawn(move || drive.run(&mut worker));
        }
        let (console, gate, disk) = (&console, &gate, disk.as_ref());
        if let Some(disk) = disk {
            disk.find(console).unwrap_or_else(|error| end(&format!("the disk: {error}")));
            scope.spawn(move || disk.work(console));
        }
        scope.spawn(move || obey(port, console, &memory, gate, disk));
        tick(console, ticks, &memory, gate, &writes)
    })
}

/// Refuses more memory than there is, which would otherwise end in the kernel killing the first process.
fn check_available(parameters: &Parameters, meminfo: &str) -> Result<(), Box<dyn Error>> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).ok_or("no MemAvailable")?;
    let available = line.trim().trim_end_matches(" kB").parse::<u64>()?.saturating_mul(1024);
    let needed = region_words(parameters.pages) as u64 * 8 + SPARE_BYTES;
    if needed <= available {
        return Ok(());
    }
    Err(format!("vmferry.memory and what runs beside it need {needed} bytes, and {available} are available").into())
}

/// Zeroed words with room to align them. The pages become real only when they are filled.
fn allocate(words: usize) -> Result<Vec<AtomicU64>, Box<dyn Error>> {
    let words = words + PAGE_BYTES / size_of::<AtomicU64>();
    let mut region = Vec::new();
    region.try_reserve_exact(words).map_err(|error| format!("not enough memory for vmferry.memory: {error}"))?;
    region.resize_with(words, AtomicU64::default);
    Ok(region)
}

struct Console {
    port: Mutex<File>,
}

impl Console {
    /// Prints a line as one write, so that lines of several threads do not mix.
    fn say(&self, text: &str) {
        let line = format!("vmferry-guest: {text}\n");
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody to tell when the console itself fails; the silence shows outside.
        drop(port.write_all(line.as_bytes()));
    }
}

fn tick(console: &Console, ticks: Ticks, memory: &Memory<'_>, gate: &Gate, writes: &AtomicU64) -> ! {
    let count = memory.page_count();
    let slice = ticks.checked_pages(count);
    let mut round = CheckReport::default();
    let mut wrong_so_far = 0;
    let mut next = Instant::now();
    for number in 0_u64.. {
        let checked = match slice {
            // Without a pause of the writers.
            0 => CheckReport::default(),
            slice => check(memory, gate, round.pages, (round.pages + slice).min(count)),
        };
        if let Some(first) = checked.first_wrong.filter(|_| wrong_so_far < DETAILS_MAX) {
            console.say(&format!("wrong {first}"));
        }
        wrong_so_far += checked.wrong;
        console.say(&format!("tick {number} writes={} wrong={wrong_so_far}", writes.load(Ordering::Relaxed)));
        round.add(&checked);
        if round.pages == count {
            console.say(&format!("check pages={count} wrong={}", round.wrong));
            round = CheckReport::default();
        }
        // After a pause of the machine ticks go on from now instead of being made up for.
        next = (next + ticks.interval()).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    unreachable!("2^64 ticks take longer than machines run")
}

fn check(memory: &Memory<'_>, gate: &Gate, start: u64, end: u64) -> CheckReport {
    let _paused = gate.pause();
    memory.check(start..end)
}

/// Reads and obeys commands for as long as there is a serial port.
fn obey(port: File, console: &Console, memory: &Memory<'_>, gate: &Gate, disk: Option<&Written>) {
    let mut reader = BufReader::new(port);
    loop {
        let mut line = Vec::new();
        let read = reader.by_ref().take(COMMAND_BYTES_MAX).read_until(b'\n', &mut line);
        match read {
            // Hung up. The guest goes on and only hears nothing any more.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        match String::from_utf8_lossy(&line).trim() {
            "" => {}
            "check" => {
                let report = check(memory, gate, 0, memory.page_count());
                if let Some(first) = report.first_wrong {
                    console.say(&format!("wrong {first}"));
                }
                console.say(&format!("full-check pages={} wrong={}", report.pages, report.wrong));
            }
            "check-disk" => match disk {
                Some(disk) => disk.check(console),
                None => console.say("disk-check: there is no vmferry.disk"),
            },
            "poweroff" => {
                console.say("power-off");
                system::power_off();
            }
            other => console.say(&format!("unknown command {other:?}; there are check, check-disk and poweroff")),
        }
    }
}
