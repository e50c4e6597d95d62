//! The child's side: what the VMM does.

use std::collections::HashMap;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use super::{Channel, Kind, PAGE, Ram};

/// Runs the VMM on the main thread until the line is cut.
pub(crate) fn run(mut channel: Channel, kind: Kind, pages: usize) {
    // SAFETY: no arguments.
    let tid = unsafe { libc::gettid() };
    assert_eq!(std::process::id(), tid.cast_unsigned(), "the child acts on the main thread");
    let (ram, file) = make_ram(kind, pages);
    let ram = Arc::new(ram);
    let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    channel.say(&format!("ready {} {fd}", ram.address()));

    let paused = Arc::new(RwLock::new(()));
    let mut pauses = Vec::new();
    let writes = Arc::new(AtomicU64::new(0));
    loop {
        let line = channel.hear();
        let words: Vec<_> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<usize>().unwrap();
        match words[0] {
            "" => return,
            // writers COUNT PAGES: threads that increment counters all over the first PAGES pages.
            "writers" => {
                for seed in 1..=number(1) as u64 {
                    let (ram, paused, writes) = (Arc::clone(&ram), Arc::clone(&paused), Arc::clone(&writes));
                    let among = number(2) as u64;
                    thread::spawn(move || write_forever(&ram, &paused, &writes, seed, among));
                }
            }
            // While the guard is held, no writer is between two writes, and what they wrote is in memory.
            "pause" => pauses.push(paused.write().unwrap()),
            "writes" => {
                channel.say(&writes.load(Ordering::Relaxed).to_string());
                continue;
            }
            "write" => {
                for page in number(1)..number(1) + number(2) {
                    ram.word(page, 1).fetch_add(1, Ordering::Relaxed);
                }
            }
            "read" => {
                let pages = number(1)..number(1) + number(2);
                let sum = pages.fold(0, |sum: u64, page| sum.wrapping_add(ram.word(page, 1).load(Ordering::Relaxed)));
                std::hint::black_box(sum);
            }
            "kernel" => write_by_the_kernel(&ram, number(1)),
            "punch" => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (first, count) = ((number(1) * PAGE) as i64, (number(2) * PAGE) as i64);
                // SAFETY: plain numbers; the hole is in our own file.
                check(unsafe { libc::fallocate(fd, mode, first, count) });
            }
            "dontneed" => {
                // SAFETY: the pages are shared and backed by a file, so what is unmapped keeps its content.
                check(unsafe { libc::madvise(address(&ram, number(1)), number(2) * PAGE, libc::MADV_DONTNEED) });
            }
            "unmap" => {
                // SAFETY: nothing in this process touches these pages after this order.
                check(unsafe { libc::munmap(address(&ram, number(1)), number(2) * PAGE) });
            }
            "remap" => {
                let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
                let offset = (number(1) * PAGE) as i64;
                // SAFETY: the same pages of the same file at the same place, so references stay valid.
                let base = unsafe { libc::mmap(address(&ram, number(1)), number(2) * PAGE, rights, flags, fd, offset) };
                assert_ne!(base, libc::MAP_FAILED);
            }
            // No descriptor can be opened any more.
            "limit-files" => {
                let limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
                // SAFETY: reads a local.
                check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) });
            }
            "seccomp-kill" => forbid_userfaultfd(),
            // The main thread hangs in the kernel, as in a dead file system, and another one takes the line.
            "hang" => {
                channel.say("ok");
                thread::spawn(move || answer_forever(channel));
                hang();
                return;
            }
            "hang-alone" => {
                channel.say("ok");
                hang();
                return;
            }
            // The main thread ends, and the others go on.
            "leader-exits" => {
                channel.say("ok");
                thread::spawn(move || answer_forever(channel));
                // SAFETY: ends this thread only, as pthread_exit does; nothing on its stack is shared but what is
                // reference counted.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
                unreachable!("the thread has ended");
            }
            "exec" => {
                // The line is cut by it.
                let mut command = std::process::Command::new("sleep");
                command.arg("1000").stdin(std::process::Stdio::null());
                panic!("{}", std::os::unix::process::CommandExt::exec(&mut command));
            }
            // Goes through all ways to wait until the next line comes.
            "wait-in-all-ways" => {
                channel.say("ok");
                let stop = Arc::new(AtomicBool::new(false));
                let told = Arc::clone(&stop);
                let listener = thread::spawn(move || {
                    block_signal(libc::SIGALRM, libc::SIG_BLOCK);
                    let line = channel.hear();
                    told.store(true, Ordering::Relaxed);
                    (channel, line)
                });
                let report = wait_in_all_ways(&stop);
                channel = listener.join().unwrap().0;
                channel.say(&report);
                continue;
            }
            other => panic!("unknown order {other}"),
        }
        channel.say("ok");
    }
}

fn check(result: i32) {
    assert_eq!(result, 0, "{}", Error::last_os_error());
}

fn address(ram: &Ram, page: usize) -> *mut libc::c_void {
    ptr::from_ref(ram.word(page, 0)).cast_mut().cast()
}

fn make_ram(kind: Kind, pages: usize) -> (Ram, Option<OwnedFd>) {
    if kind == Kind::Droppable {
        const MAP_DROPPABLE: i32 = 0x08;
        return (Ram::map(-1, MAP_DROPPABLE | libc::MAP_ANONYMOUS, pages), None);
    }
    let fd = match kind {
        Kind::Disk => {
            let path = std::env::temp_dir().join(format!("vmferry-track-{}", std::process::id()));
            let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            OwnedFd::from(file)
        }
        _ => {
            let flags = if kind == Kind::Huge { libc::MFD_HUGETLB } else { 0 };
            // SAFETY: reads a constant string.
            let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), flags | libc::MFD_CLOEXEC) };
            assert!(fd >= 0, "{}", Error::last_os_error());
            // SAFETY: just made, and nobody else's.
            unsafe { OwnedFd::from_raw_fd(fd) }
        }
    };
    // SAFETY: plain numbers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), (pages * PAGE) as i64) });
    let ram = Ram::map(fd.as_raw_fd(), libc::MAP_SHARED, pages);
    if kind == Kind::Thp {
        // SAFETY: advice about our own mapping that does not change its content.
        check(unsafe { libc::madvise(address(&ram, 0), pages * PAGE, libc::MADV_HUGEPAGE) });
    }
    // One word of each page, so that all are there; but for a quarter at the end, which stays empty.
    for page in 0..pages - pages / 4 {
        ram.word(page, 0).store(page as u64, Ordering::Relaxed);
    }
    (ram, Some(fd))
}

/// Pseudo-random numbers: xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn write_forever(ram: &Ram, paused: &RwLock<()>, writes: &AtomicU64, seed: u64, among: u64) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    loop {
        let _running = paused.read().unwrap();
        for _ in 0..64 {
            let value = random.next();
            // Half of the writes go to one in sixteen of the pages.
            let among = if value & 1 == 0 { among } else { among.div_ceil(16) };
            let page = (value >> 16) % among;
            let word = 2 + (value >> 1) % 510;
            ram.word(page as usize, word as usize).fetch_add(value, Ordering::Relaxed);
        }
        writes.fetch_add(64, Ordering::Relaxed);
    }
}

/// A write that no instruction of this process makes: read(2) into the page.
fn write_by_the_kernel(ram: &Ram, page: usize) {
    let mut ends = [0; 2];
    // SAFETY: writes two descriptors to a local.
    check(unsafe { libc::pipe(ends.as_mut_ptr()) });
    let message = ram.word(page, 1).load(Ordering::Relaxed).wrapping_add(1);
    // SAFETY: reads a local.
    let sent = unsafe { libc::write(ends[1], (&raw const message).cast(), 8) };
    assert_eq!(sent, 8);
    // SAFETY: writes eight bytes, which are an atomic of our own mapping.
    let got = unsafe { libc::read(ends[0], ptr::from_ref(ram.word(page, 1)).cast_mut().cast(), 8) };
    assert_eq!(got, 8);
    for end in ends {
        // SAFETY: closes what was opened above.
        check(unsafe { libc::close(end) });
    }
}

/// A filter that ends the process at userfaultfd(2).
fn forbid_userfaultfd() {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let filter = [
        libc::sock_filter { code: LOAD, jt: 0, jf: 0, k: 0 },
        libc::sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 1, k: libc::SYS_userfaultfd as u32 },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_KILL_PROCESS },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_ptr().cast_mut() };
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) });
    // SAFETY: reads the program and the filter, both locals.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) });
}

fn answer_forever(mut channel: Channel) {
    loop {
        match channel.hear().as_str() {
            "" => std::process::exit(0),
            _ => channel.say("ok"),
        }
    }
}

/// Waits in the kernel, where neither signals nor ptrace can stop it, for a child that does not come to its end.
fn hang() {
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is fork(2): the child has memory of its own. It calls only what may be called
    // after a fork of a process with threads.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        // Not to outlive the test: the signal comes when the thread that made us ends.
        // SAFETY: plain numbers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
}

static ALARMS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_alarm(_: i32) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
}

fn signal_set(signal: i32) -> libc::sigset_t {
    // SAFETY: all bit patterns are valid.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a local.
    check(unsafe { libc::sigemptyset(&raw mut set) });
    if signal != 0 {
        // SAFETY: writes to a local.
        check(unsafe { libc::sigaddset(&raw mut set, signal) });
    }
    set
}

fn block_signal(signal: i32, how: i32) {
    let set = signal_set(signal);
    // SAFETY: reads a local.
    check(unsafe { libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) });
}

/// A timer that sends SIGALRM to this thread a thousand times a second.
fn start_alarms() {
    // SAFETY: all zero is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_alarm as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only touches an atomic.
    check(unsafe { libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) });
    // SAFETY: all zero is a valid sigevent.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGALRM;
    // SAFETY: no arguments.
    event.sigev_notify_thread_id = unsafe { libc::gettid() };
    let mut timer = ptr::null_mut();
    // SAFETY: reads and writes locals.
    check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) });
    let step = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    let times = libc::itimerspec { it_interval: step, it_value: step };
    // SAFETY: reads a local.
    check(unsafe { libc::timer_settime(timer, 0, &raw const times, ptr::null_mut()) });
}

/// One way for a thread to be when it is stopped. `Err` says what was wrong.
type Way<'a> = (&'a str, Box<dyn FnMut() -> Result<(), String> + 'a>);

const SHORT: Duration = Duration::from_micros(1500);

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec { tv_sec: 0, tv_nsec: i64::from(duration.subsec_nanos()) }
}

/// Passes if the call gave what it should, or `EINTR` although it should not be cut short, where a handler ran.
fn judge(name: &str, result: i64, wanted: i64, alarms_before: u64) -> Result<bool, String> {
    let error = Error::last_os_error();
    if result == wanted {
        return Ok(true);
    }
    let handled = ALARMS.load(Ordering::Relaxed) != alarms_before;
    if result == -1 && error.raw_os_error() == Some(libc::EINTR) && handled {
        return Ok(false);
    }
    Err(format!("{name} gave {result} ({error}), handler ran: {handled}"))
}

/// Waits, and makes sure that a wait that was not cut short took its time.
fn timed(name: &str, wanted: i64, limit: Duration, call: impl FnOnce() -> i64) -> Result<(), String> {
    let alarms = ALARMS.load(Ordering::Relaxed);
    let begun = Instant::now();
    let result = call();
    let complete = judge(name, result, wanted, alarms)?;
    let elapsed = begun.elapsed();
    if complete && elapsed < limit {
        return Err(format!("{name} took {elapsed:?} of {limit:?}"));
    }
    Ok(())
}

/// Goes through all ways in turn, with and without signals, until told to stop. How often each came, and what went
/// wrong: `ok ROUNDS ALARMS`, or the first fault.
fn wait_in_all_ways(stop: &AtomicBool) -> String {
    let mut pipe = [0; 2];
    // SAFETY: writes two descriptors to a local.
    check(unsafe { libc::pipe(pipe.as_mut_ptr()) });
    // SAFETY: plain numbers.
    let epoll = unsafe { libc::epoll_create1(0) };
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };
    // SAFETY: reads a local.
    check(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, pipe[0], &raw mut event) });
    // Another thread puts a byte into the pipe when asked, a little later.
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let feeder = thread::spawn(move || {
        block_signal(libc::SIGALRM, libc::SIG_BLOCK);
        while asked.recv().is_ok() {
            thread::sleep(SHORT);
            // SAFETY: reads a constant byte.
            assert_eq!(unsafe { libc::write(pipe[1], [7_u8].as_ptr().cast(), 1) }, 1);
        }
    });
    let read_byte = || {
        let mut byte = 0_u8;
        // SAFETY: writes one byte to a local.
        unsafe { libc::read(pipe[0], (&raw mut byte).cast(), 1) as i64 }
    };
    let ppoll = |mask: Option<libc::sigset_t>| {
        let mut watched = libc::pollfd { fd: pipe[0], events: libc::POLLIN, revents: 0 };
        let limit = timespec(SHORT);
        let mask = mask.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: reads and writes locals.
        i64::from(unsafe { libc::ppoll(&raw mut watched, 1, &raw const limit, mask) })
    };

    let mut ways: Vec<Way<'_>> = vec![
        ("ppoll", Box::new(|| timed("ppoll", 0, SHORT, || ppoll(None)))),
        ("ppoll with a mask", Box::new(|| timed("ppoll with a mask", 0, SHORT, || ppoll(Some(signal_set(0)))))),
        (
            "futex",
            Box::new(|| {
                let word = 0_u32;
                let limit = timespec(SHORT);
                let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
                let alarms = ALARMS.load(Ordering::Relaxed);
                let begun = Instant::now();
                // SAFETY: reads locals.
                let result = unsafe { libc::syscall(libc::SYS_futex, &raw const word, operation, 0, &raw const limit) };
                let error = Error::last_os_error().raw_os_error();
                match (result, error) {
                    (-1, Some(libc::ETIMEDOUT)) if begun.elapsed() >= SHORT => Ok(()),
                    (-1, Some(libc::EINTR)) if ALARMS.load(Ordering::Relaxed) != alarms => Ok(()),
                    _ => Err(format!("futex gave {result}, error {error:?} after {:?}", begun.elapsed())),
                }
            }),
        ),
        (
            "nanosleep",
            Box::new(|| {
                timed("nanosleep", 0, SHORT, || {
                    let limit = timespec(SHORT);
                    // SAFETY: reads a local.
                    i64::from(unsafe { libc::nanosleep(&raw const limit, ptr::null_mut()) })
                })
            }),
        ),
        (
            "read",
            Box::new(|| {
                ask.send(()).unwrap();
                let alarms = ALARMS.load(Ordering::Relaxed);
                // SA_RESTART: a handler does not cut it short either.
                if judge("read", read_byte(), 1, alarms)? { Ok(()) } else { Err("read was cut short".to_owned()) }
            }),
        ),
        (
            "epoll_wait",
            Box::new(|| {
                ask.send(()).unwrap();
                loop {
                    let alarms = ALARMS.load(Ordering::Relaxed);
                    let mut event = libc::epoll_event { events: 0, u64: 0 };
                    // SAFETY: writes one event to a local.
                    let result = i64::from(unsafe { libc::epoll_wait(epoll, &raw mut event, 1, -1) });
                    if judge("epoll_wait", result, 1, alarms)? {
                        break;
                    }
                }
                if read_byte() == 1 { Ok(()) } else { Err("no byte after epoll_wait".to_owned()) }
            }),
        ),
        (
            "computing",
            Box::new(|| {
                // Long enough to be stopped in, and wrong if a register or a flag were.
                let sum = (0..200_000_u64).fold((0_u64, 1.0_f64), |(sum, float), n| {
                    (sum.rotate_left(5) ^ std::hint::black_box(n), float + std::hint::black_box(0.5))
                });
                static EXPECTED: std::sync::OnceLock<(u64, u64)> = std::sync::OnceLock::new();
                let found = (sum.0, sum.1.to_bits());
                // The first turn is before anyone attaches.
                if *EXPECTED.get_or_init(|| found) == found { Ok(()) } else { Err("computing went wrong".to_owned()) }
            }),
        ),
        (
            "system calls without end",
            Box::new(|| {
                for _ in 0..500 {
                    // SAFETY: no arguments.
                    let pid = unsafe { libc::syscall(libc::SYS_getpid) };
                    if pid != i64::from(std::process::id()) {
                        return Err(format!("getpid gave {pid}"));
                    }
                }
                Ok(())
            }),
        ),
    ];
    block_signal(libc::SIGALRM, libc::SIG_BLOCK);
    start_alarms();
    let mut counts = HashMap::new();
    let mut rounds = 0;
    let mut fault = None;
    while fault.is_none() && !stop.load(Ordering::Relaxed) {
        block_signal(libc::SIGALRM, if rounds % 2 == 0 { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK });
        for (name, way) in &mut ways {
            if let Err(what) = way() {
                fault.get_or_insert(what);
            }
            *counts.entry(*name).or_insert(0) += 1;
        }
        rounds += 1;
    }
    drop(ways);
    drop(ask);
    feeder.join().unwrap();
    fault.unwrap_or_else(|| format!("ok {rounds} {}", ALARMS.load(Ordering::Relaxed)))
}
