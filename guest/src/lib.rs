//! The test guest's memory: pages that number themselves, writers that follow a pattern, and a check that finds every
//! page that is not what it should be.
//!
//! A migration is right when the guest cannot tell that it happened. This crate is the guest that would tell: the
//! content of each page is a function of its number and of how often it was written, so a stale page, a torn page, a
//! page in another's place and a lost write are all found by [`Memory::check`]. It runs as the first process of a Linux
//! guest under QEMU (`vmferry-guest-init`) and inside a process of its own (the embedded guest of `vmferry-host`).
//!
//! - [`Parameters`]: what to write, from a kernel command line or in code.
//! - [`Memory`]: pages and the table of their sequence numbers, over memory that the caller owns.
//! - [`Worker`]: picks pages by the pattern and writes them; its state can be saved and goes on identically.
//! - [`Gate`]: stops all writers between two page writes, the only moment at which a check means anything.
//! - [`Ticks`]: how often the guest shows a sign of life.
//! - [`Disk`], [`Record`]: a disk that is written meanwhile, and checks itself as well.
//! - [`Network`]: an address at which the guest sends back what it is sent.
//! - [`Processes`]: instead of all that, several processes whose pages say whose they are.
//!
//! The library reads no clock, starts no thread and allocates no guest memory; its callers do.
//!
//! # Example
//! ```
//! use std::sync::atomic::AtomicU64;
//! use vmferry_guest::{Memory, Parameters, Worker, region_words};
//!
//! let parameters = Parameters { pages: 64, hot_pages: 8, ..Parameters::default() };
//! let region: Vec<AtomicU64> = (0..region_words(64)).map(|_| AtomicU64::new(0)).collect();
//! let memory = Memory::in_region(&region, &parameters).unwrap();
//! memory.fill();
//!
//! let mut worker = Worker::new(&parameters, 0).unwrap();
//! for _ in 0..1000 {
//!     worker.step(&memory);
//! }
//! assert_eq!(memory.check_all().wrong, 0);
//!
//! region.last().unwrap().fetch_xor(1, std::sync::atomic::Ordering::Relaxed);
//! assert_eq!(memory.check_all().wrong, 1);
//! ```

mod disk;
mod gate;
mod memory;
mod network;
mod parameters;
mod processes;
mod random;
mod raw;
mod ticks;
mod worker;

pub use disk::{DISK_BYTES_MIN, Disk, RECORD_BYTES, RECORD_PLACES, Record, Stored, expected, place_offset};
pub use gate::{Gate, Member, Paused};
pub use memory::{
    CheckReport, Found, Memory, MemoryError, PAGE_BYTES, PAGE_WORDS, WrongPage, pages_in_region, region_words,
    table_pages,
};
pub use network::{ECHO_PORT, Network};
pub use parameters::{
    BODY_CHUNKS, PAGES_MAX, ParameterError, Parameters, Pattern, THREADS_MAX, format_bytes, parse_bytes,
};
pub use processes::{FILE_PAGES, NamedPage, PROCESSES_MAX, PageOwner, Processes, SHARED_PAGES};
pub use random::Random;
pub use raw::words_from_raw;
pub use ticks::Ticks;
pub use worker::{Drive, StateError, Worker};
