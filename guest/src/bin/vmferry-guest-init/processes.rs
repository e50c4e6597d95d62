//! The guest as several processes, instead of one that checks itself: see `vmferry_guest::Processes`.
//!
//! Lines it prints, each starting with `vmferry-guest: `:
//!
//! | line | when |
//! |---|---|
//! | `kernel NAME first=A last=B` | for each part of the kernel's image: its physical addresses, in hexadecimal |
//! | `processes ready count=N pages=P huge=KIB` | all processes have filled their pages; KIB of them are in huge pages |
//! | `tick T` | ten times a second |
#![expect(unsafe_code, reason = "fork, mmap and madvise have no safe form in the standard library")]

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vmferry_guest::{
    FILE_PAGES, NamedPage, PAGE_BYTES, PAGE_WORDS, PageOwner, Processes, SHARED_PAGES, words_from_raw,
};

use super::{Console, Never, TICK};

/// What the processor needs of alignment to map large pages.
const LARGE_PAGE_BYTES: usize = 2 << 20;
/// Pages that a process writes before it rests.
const PAGES_PER_TURN: u64 = 64;
/// Long enough that the processes do not keep all processors busy.
const REST: Duration = Duration::from_millis(1);
/// The file that nobody maps.
const FILE: &str = "/named-pages";
const LARGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// The parts of the kernel's image in `/proc/iomem`.
const KERNEL_PARTS: [&str; 4] = ["Kernel code", "Kernel rodata", "Kernel data", "Kernel bss"];

/// Starts the processes and waits for ever.
pub(crate) fn run(console: &Console, processes: &Processes) -> Result<Never, Box<dyn Error>> {
    for line in fs::read_to_string("/proc/iomem")?.lines() {
        if let Some((range, name)) = line.trim().split_once(" : ")
            && KERNEL_PARTS.contains(&name)
            && let Some((first, last)) = range.split_once('-')
        {
            console.say(&format!("kernel {} first={first} last={last}", name.trim_start_matches("Kernel ")));
        }
    }
    if processes.huge {
        // Linux turns large pages off by itself in a machine with less than 512 MiB.
        fs::write(LARGE_PAGES, "madvise")?;
    }
    write_file()?;
    let shared = map(SHARED_PAGES as usize * PAGE_BYTES, libc::MAP_SHARED)?;
    fill(shared, PageOwner::Shared);
    let ready = &map(PAGE_BYTES, libc::MAP_SHARED)?[..2];
    for number in 0..processes.count {
        // SAFETY: this process has one thread, so that the child finds all locks free.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error().into()),
            0 => return live(processes, number, shared, ready),
            _ => {}
        }
    }
    while ready[0].load(Ordering::Acquire) < u64::from(processes.count) {
        check_children()?;
        thread::sleep(Duration::from_millis(10));
    }
    let (count, pages, huge) = (processes.count, processes.pages, ready[1].load(Ordering::Relaxed));
    console.say(&format!("processes ready count={count} pages={pages} huge={huge}"));
    for number in 0_u64.. {
        check_children()?;
        console.say(&format!("tick {number}"));
        thread::sleep(TICK);
    }
    unreachable!("2^64 ticks take longer than machines run")
}

/// One process: fills its pages, and writes the first half of them for ever. `ready` counts processes, and KiB in huge
/// pages.
fn live(
    processes: &Processes,
    number: u32,
    shared: &[AtomicU64],
    ready: &[AtomicU64],
) -> Result<Never, Box<dyn Error>> {
    let region = map(processes.pages as usize * PAGE_BYTES + LARGE_PAGE_BYTES, libc::MAP_PRIVATE)?;
    let pages = &region[region.as_ptr().align_offset(LARGE_PAGE_BYTES)..][..processes.pages as usize * PAGE_WORDS];
    let advice = if processes.huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the range is mapped, by `map`, and the advice changes no content.
    if unsafe { libc::madvise(pages.as_ptr().cast_mut().cast(), size_of_val(pages), advice) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    fill(pages, PageOwner::Process(number));
    let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
    let huge = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:")?.trim().strip_suffix(" kB"));
    ready[1].fetch_add(huge.ok_or("no AnonHugePages")?.trim().parse()?, Ordering::Relaxed);
    // From here on a page was accessed only if it is below.
    fs::write("/proc/self/clear_refs", "1")?;
    let mut announced = false;
    loop {
        for page in 0..processes.active_pages() {
            let at = page as usize * PAGE_WORDS + NamedPage::counter_word();
            pages[at].fetch_add(1, Ordering::Relaxed);
            shared[(page % SHARED_PAGES) as usize * PAGE_WORDS].load(Ordering::Relaxed);
            if page % PAGES_PER_TURN == PAGES_PER_TURN - 1 {
                thread::sleep(REST);
            }
        }
        if !announced {
            announced = true;
            ready[0].fetch_add(1, Ordering::Release);
        }
    }
}

fn fill(pages: &[AtomicU64], owner: PageOwner) {
    for (index, page) in pages.chunks_exact(PAGE_WORDS).enumerate() {
        let content = NamedPage { owner, index: index as u64 }.content();
        for (place, word) in page.iter().zip(content) {
            place.store(word, Ordering::Relaxed);
        }
    }
}

fn write_file() -> io::Result<()> {
    let mut file = File::create(FILE)?;
    for index in 0..FILE_PAGES {
        let content = NamedPage { owner: PageOwner::File, index }.content();
        let bytes: Vec<u8> = content.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// New zeroed memory, never given back.
fn map(bytes: usize, sharing: libc::c_int) -> io::Result<&'static [AtomicU64]> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, sharing | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
    let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has so many bytes, starts at a page, is written by atomics alone, and is never unmapped.
    Ok(unsafe { words_from_raw(start.cast(), bytes) })
}

/// Whether all processes live.
fn check_children() -> Result<(), Box<dyn Error>> {
    let mut status = 0;
    // SAFETY: the pointer is to a local of the type that is written.
    match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error().into()),
        pid => Err(format!("process {pid} ended with status {status:#x}").into()),
    }
}
