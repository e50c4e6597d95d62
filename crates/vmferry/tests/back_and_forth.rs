//! One guest that moves again and again in one process: nothing is lost, and nothing is left behind.
//!
//! `VMFERRY_MOVES` says how often; 40 times unless it does.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use vmferry_core::engine::OutcomeKind;
use vmferry_guest::{Parameters, Pattern};
use vmferry_host::{
    Cancel, EmbeddedGuest, EmbeddedSource, EmbeddedTarget, GuestProgram, MigrateOptions, migrate, pages_in, receive,
};

const MEMORY_BYTES: u64 = 64 << 20;
/// After so many moves everything that is kept for the next one is there.
const WARM_UP_MOVES: u32 = 10;
/// Memory that allocators may keep: between the 10th and the 120th move it went up and down between 20 and 45 MB.
const SLACK_BYTES: u64 = 32 << 20;

/// Descriptors, threads and bytes of this process.
#[derive(Debug, PartialEq, Eq)]
struct Belongings {
    descriptors: usize,
    threads: usize,
    resident_bytes: u64,
}

impl Belongings {
    fn look() -> Self {
        let count = |directory| fs::read_dir(directory).unwrap().count();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kibibytes: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            resident_bytes: kibibytes * 1024,
        }
    }
}

#[test]
fn a_guest_under_load_moves_back_and_forth_and_nothing_is_left_behind() {
    let moves: u32 = std::env::var("VMFERRY_MOVES").map_or(40, |moves| moves.parse().expect("a number"));
    let program =
        GuestProgram { program: env!("CARGO_BIN_EXE_vmferry").into(), arguments: vec!["embedded-guest".into()] };
    let parameters = Parameters {
        pattern: Pattern::Zipf,
        pages: pages_in(MEMORY_BYTES),
        rate_pages_per_s: 5000,
        incompressible_percent: 50,
        ..Parameters::default()
    };
    let options = MigrateOptions { streams: 3, verify: true, ..MigrateOptions::default() };
    let mut guest = EmbeddedGuest::start(&program, MEMORY_BYTES, &parameters).unwrap();
    let (mut before, mut writes) = (None, 0);
    for number in 1..=moves {
        let waiting = EmbeddedGuest::start_incoming(&program, MEMORY_BYTES, &parameters).unwrap();
        let mut source = EmbeddedSource::attach(guest).unwrap();
        let mut target = EmbeddedTarget::new(waiting);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let report = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (stream, _) = listener.accept().unwrap();
                let cancel = Cancel::new().unwrap();
                receive(&mut target, stream, Some(&listener), Duration::from_secs(30), &cancel).unwrap();
            });
            migrate(&mut source, stream, &options, &Cancel::new().unwrap(), &mut |_| {}).unwrap()
        });
        assert_eq!(report.outcome, OutcomeKind::Completed, "move {number}: {:?}", report.reason);
        let verify = report.verify.unwrap();
        assert_eq!((verify.pages, verify.mismatched), (report.pages.total, 0), "move {number}");
        drop((source, listener));
        guest = target.into_guest();
        let check = guest.check().unwrap();
        assert_eq!(check.wrong, 0, "move {number}: {:?}", check.first_wrong);
        let now = guest.writes().unwrap();
        assert!(now > writes, "move {number}: the guest goes on");
        writes = now;
        let belongings = Belongings::look();
        println!("move {number}: {belongings:?}, downtime {:.1} ms", report.downtime_ms);
        if number == WARM_UP_MOVES {
            before = Some(belongings);
        } else if let Some(before) = &before {
            assert_eq!(belongings.descriptors, before.descriptors, "move {number}");
            assert_eq!(belongings.threads, before.threads, "move {number}");
            let most = before.resident_bytes + SLACK_BYTES;
            assert!(belongings.resident_bytes <= most, "move {number}: {belongings:?}, {before:?} before");
        }
    }
}
