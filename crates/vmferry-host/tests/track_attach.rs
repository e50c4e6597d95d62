//! The way into another process and out of it: nothing of it is disturbed, and every refusal says why.

mod track_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use track_support::{Kind, PAGE, Process, Vmm, is_root, spawn_when_written};
use vmferry_core::pages::PageRun;
use vmferry_host::track::{Region, TrackError, Tracker};

/// A region for a process that is never to get that far.
fn any_region() -> Vec<Region> {
    vec![Region { pages: PageRun::new(0, 1), address: 0x10000 }]
}

/// A file that is gone after the test.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("vmferry-{name}-{}", std::process::id())))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A process that is gone after the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The thread that is stopped waits in one of many system calls, computes, or handles a signal; it must never see more
/// of it than time passing.
#[test]
fn a_thread_that_is_entered_200_times_notices_nothing() {
    let mut vmm = Vmm::start(Kind::Memfd, 256);
    vmm.process.order("writers 2 256");
    let descriptors = vmm.process.descriptors();
    let mut shadow: Vec<_> = (0..256).map(|page| vmm.ram.page(page)).collect();
    vmm.process.order("wait-in-all-ways");
    let opened_by_child = vmm.process.descriptors();
    let mut stops = Vec::new();
    for _ in 0..200 {
        let mut tracker = vmm.attach().unwrap();
        stops.push(tracker.attach_stop().unwrap());
        // All pages count as written before.
        for (page, copy) in shadow.iter_mut().enumerate() {
            *copy = vmm.ram.page(page);
        }
        let mut written = Vec::new();
        tracker.scan(&mut written).unwrap();
        for page in written.iter().flat_map(|run| run.pages()) {
            shadow[page.0 as usize] = vmm.ram.page(page.0 as usize);
        }
        tracker.detach().unwrap();
    }
    let report = vmm.process.ask("stop");
    let words: Vec<_> = report.split(' ').collect();
    let ["ok", rounds, alarms] = words[..] else { panic!("the child: {report}") };
    stops.sort_unstable();
    println!("{rounds} rounds, {alarms} alarms; stopped for {:?} (median), {:?} (most)", stops[100], stops[199]);
    assert!(alarms.parse::<u64>().unwrap() > 0);
    // The pipes and the like that it opened for its waits, and nothing of ours.
    let now = vmm.process.descriptors();
    assert!(now.iter().all(|(_, target)| !target.contains("userfaultfd")), "{now:?}");
    assert!(now.len() >= descriptors.len() && now.len() >= opened_by_child.len());
    assert_eq!(vmm.process.protected_mappings(), 0);
}

#[test]
fn after_detach_the_vmm_is_as_it_was() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let before = (vmm.process.descriptors(), vmm.process.proc_file("maps"));
    for drop_only in [false, true] {
        // A part of the mapping, so that it is split and must be joined again.
        let region = Region { pages: PageRun::new(0, 100), address: vmm.address + 50 * PAGE as u64 };
        let tracker = Tracker::attach(vmm.process.pid(), vec![region]).unwrap();
        assert_eq!(vmm.process.protected_mappings(), 1);
        assert_eq!(vmm.process.descriptors(), before.0, "nothing of ours is left in the VMM while it is tracked");
        if drop_only {
            drop(tracker);
        } else {
            tracker.detach().unwrap();
        }
        assert_eq!((vmm.process.descriptors(), vmm.process.proc_file("maps")), before);
        assert_eq!(vmm.process.protected_mappings(), 0);
        vmm.process.order("write 0 4096");
    }
    // And again, with all pages tracked from the start.
    let mut tracker = vmm.attach().unwrap();
    vmm.process.order("write 17 1");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(17, 1)]);
}

#[test]
fn a_tracker_that_is_killed_leaves_no_trace() {
    let mut vmm = Vmm::start(Kind::Memfd, 4096);
    let before = (vmm.process.descriptors(), vmm.process.proc_file("maps"));
    let mut tracker = Process::start(&format!("attach {} {} 4096", vmm.process.pid(), vmm.address));
    assert_eq!(tracker.channel.hear(), "attached");
    assert_eq!(vmm.process.protected_mappings(), 1);
    tracker.kill();
    assert_eq!((vmm.process.descriptors(), vmm.process.proc_file("maps")), before);
    assert_eq!(vmm.process.protected_mappings(), 0);
    vmm.process.order("write 0 4096");
    vmm.attach().unwrap().detach().unwrap();
}

#[test]
fn one_guest_has_one_tracker() {
    let vmm = Vmm::start(Kind::Memfd, 64);
    let tracker = vmm.attach().unwrap();
    match vmm.attach() {
        Err(TrackError::RegionTaken { address }) => assert_eq!(address, vmm.address),
        other => panic!("{other:?}"),
    }
    drop(tracker);
    vmm.attach().unwrap();
}

#[test]
fn a_stopped_vmm_is_tracked_and_stays_stopped() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.signal(libc::SIGSTOP);
    vmm.process.wait_until_stopped();
    let mut tracker = vmm.attach().unwrap();
    assert_eq!(Vmm::scan(&mut tracker), []);
    // Once it is let go, the kernel stops it anew, which takes a moment.
    let is_stopped = || vmm.process.proc_file("status").contains("T (stopped)");
    let patience = Instant::now() + Duration::from_secs(10);
    while !is_stopped() {
        assert!(Instant::now() < patience, "{}", vmm.process.proc_file("status"));
        std::thread::sleep(Duration::from_millis(1));
    }
    vmm.process.signal(libc::SIGCONT);
    vmm.process.order("write 3 1");
    assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(3, 1)]);
}

#[test]
fn another_thread_serves_where_the_first_hangs() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("hang");
    vmm.process.order("are you there?");
    let mut tracker = vmm.attach().unwrap();
    assert_eq!(Vmm::scan(&mut tracker), []);
    vmm.process.order("and still?");
}

#[test]
fn a_vmm_that_hangs_is_refused_in_bounded_time() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("hang-alone");
    // Not yet in the kernel, it would stop; the state says when it is.
    while !vmm.process.proc_file("status").contains("State:\tD") {
        std::thread::yield_now();
    }
    match vmm.attach() {
        Err(error @ TrackError::DoesNotStop { threads: 1, .. }) => assert!(error.to_string().contains("hangs")),
        other => panic!("{other:?}"),
    }
    assert!(vmm.process.proc_file("status").contains("TracerPid:\t0"));
}

#[test]
fn a_vmm_without_its_first_thread_is_tracked() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("leader-exits");
    while !vmm.process.proc_file("status").contains("State:\tZ") {
        std::thread::yield_now();
    }
    let mut tracker = vmm.attach().unwrap();
    assert_eq!(Vmm::scan(&mut tracker), []);
    vmm.process.order("still there?");
}

#[test]
fn a_vmm_that_cannot_open_descriptors_goes_on() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("limit-files");
    match vmm.attach() {
        Err(TrackError::CallRefused { call: "userfaultfd(2)", source, .. }) => {
            assert_eq!(source, rustix::io::Errno::MFILE);
        }
        other => panic!("{other:?}"),
    }
    vmm.process.order("write 0 64");
}

/// The filter would end the VMM at the call. It is set aside, or the guest refused; it is never tried.
#[test]
fn a_seccomp_filter_does_not_end_the_vmm() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("seccomp-kill");
    match vmm.attach() {
        Ok(mut tracker) => {
            vmm.process.order("write 3 1");
            assert_eq!(Vmm::scan(&mut tracker), [PageRun::new(3, 1)]);
        }
        Err(error @ TrackError::SeccompFilter { .. }) => println!("REFUSED (root tracks it): {error}"),
        other => panic!("{other:?}"),
    }
    vmm.process.order("write 0 64");
    let status = vmm.process.proc_file("status");
    assert!(status.contains("Seccomp:\t2"), "the filter is still there");
}

#[test]
fn without_the_right_to_trace_the_message_says_how_to_get_it() {
    let message = if is_root() {
        let vmm = Vmm::start(Kind::Memfd, 64);
        // A copy that every user may run.
        let copy = TemporaryFile::new("test-copy");
        fs::copy(std::env::current_exe().unwrap(), &copy.0).unwrap();
        fs::set_permissions(&copy.0, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(&copy.0);
        command.uid(65534).gid(65534).current_dir("/");
        let mut nobody = Process::spawn(command, &format!("attach {} {} 64", vmm.process.pid(), vmm.address));
        let message = nobody.channel.hear();
        assert_eq!(vmm.process.protected_mappings(), 0);
        message
    } else {
        match Tracker::attach(1, any_region()) {
            Err(error @ TrackError::NotPermitted { pid: 1, .. }) => format!("not permitted: {error}"),
            other => panic!("{other:?}"),
        }
    };
    assert!(message.starts_with("not permitted: "), "{message}");
    assert!(message.contains("CAP_SYS_PTRACE") && message.contains("ptrace_scope"), "{message}");
}

#[test]
fn a_process_that_is_not_there_is_no_vmm() {
    let mut gone = Command::new("true").spawn().unwrap();
    let pid = gone.id();
    gone.wait().unwrap();
    assert!(matches!(Tracker::attach(pid, any_region()), Err(TrackError::NoSuchProcess { pid: p }) if p == pid));
}

#[test]
fn memory_that_is_not_there_is_named_by_its_address() {
    let mut vmm = Vmm::start(Kind::Memfd, 64);
    vmm.process.order("unmap 10 1");
    match vmm.attach() {
        Err(TrackError::RegionNotMapped { address, bytes, gap }) => {
            assert_eq!((address, bytes), (vmm.address, 64 * PAGE as u64));
            assert_eq!(gap, vmm.address + 10 * PAGE as u64);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        Tracker::attach(vmm.process.pid(), any_region()),
        Err(TrackError::RegionNotMapped { address: 0x10000, gap: 0x10000, .. })
    ));
    assert_eq!(vmm.process.protected_mappings(), 0);
}

#[test]
fn memory_that_cannot_be_protected_is_refused() {
    let vmm = Vmm::start(Kind::Droppable, 64);
    match vmm.attach() {
        Err(error @ TrackError::NotProtectable { .. }) => assert!(error.to_string().contains("/dev/shm"), "{error}"),
        other => panic!("{other:?}"),
    }
}

/// A 32-bit program of one loop around pause(2), with the bytes of a 64-bit system call in its text.
#[test]
fn a_32_bit_vmm_is_refused() {
    const BASE: u32 = 0x0804_8000;
    let code: &[u8] = &[
        0xb8, 29, 0, 0, 0, // mov eax, 29 (pause)
        0xcd, 0x80, // int 0x80
        0xeb, 0xf7, // jmp to the start
        0x0f, 0x05, // syscall
    ];
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let size = 52 + 32 + code.len() as u32;
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    // An executable for the 80386, entered behind the headers; one program header, no sections.
    half(&mut elf, 2);
    half(&mut elf, 3);
    for value in [1, BASE + 84, 52, 0, 0] {
        word(&mut elf, value);
    }
    for value in [52, 32, 1, 0, 0, 0] {
        half(&mut elf, value);
    }
    // PT_LOAD of the whole file, to be read and executed.
    for value in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        word(&mut elf, value);
    }
    elf.extend(code);

    let file = TemporaryFile::new("elf32");
    fs::write(&file.0, &elf).unwrap();
    fs::set_permissions(&file.0, fs::Permissions::from_mode(0o755)).unwrap();
    let child = match spawn_when_written(Command::new(&file.0).stdin(Stdio::null())) {
        Ok(child) => Running(child),
        Err(error) => {
            println!("NOT TESTED: this kernel runs no 32-bit programs: {error}");
            return;
        }
    };
    let pid = child.0.id();
    assert!(matches!(Tracker::attach(pid, any_region()), Err(TrackError::Not64Bit { pid: p }) if p == pid));
}
