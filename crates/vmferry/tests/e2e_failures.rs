//! Everything that can go wrong on the way: processes that die, connections that break, users who change their mind.
//!
//! Each scenario ends with exactly one QEMU that runs the guest, whose check of its own memory finds nothing wrong, and
//! with a new attempt that succeeds. The guest goes from scenario to scenario: where one has moved it, the next begins.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use rustix::process::Signal;
use support::{
    Ferry, Finished, HOT, Held, Machine, PATIENCE, Proxy, Receiver, Step, VERSIONS, Where, exactly_one_runs, kind,
    moves, need_rights, until,
};
use vmferry_core::pages::{PAGE_BYTES, PageRun, RamBlock, RamLayout};
use vmferry_core::wire::{Encodings, FrameWriter, Hello, Message, MigrationId, Pages, VERSION_MAX, VERSION_MIN};

/// In the middle of the push.
const PUSHING: Where = Where::Frame(kind::PAGES, 20);
/// The target has half a frame.
const HALF_PUSHED: Where = Where::Within(kind::PAGES, 20);
/// The guest has just been paused.
const STOPPED: Where = Where::Frame(kind::PAUSED, 1);
/// Everything is sent, and nothing is handed over.
const SENT: Where = Where::Frame(kind::LOAD, 1);
/// For scenarios whose faults the connection itself does not show: long enough for a busy host.
const SILENT: [&str; 2] = ["--stall-timeout", "60s"];

/// A migration that is held at a place. The target's QEMU is the test's.
struct Attempt {
    migrating: Ferry,
    receiver: Receiver,
    held: Held,
    /// Dropped last: its end would end the connection.
    _proxy: Proxy,
}

impl Attempt {
    /// Begins it, and returns when the source's stream has come to the place.
    fn held_at(place: Where, source: &mut Machine, target: &Machine) -> Self {
        let receiver = Receiver::start(target, &SILENT);
        let (proxy, held) = Proxy::hold(&receiver.address, place);
        // Slow enough for the hot set to be held back, and for it not to be under way as a whole while the stream is held.
        let slow = ["--json", "--bandwidth", "100MB/s"];
        let migrating = Ferry::migrate(source, &proxy.address, &[&slow[..], &SILENT].concat());
        held.wait();
        // Whoever waits for the user is seen as what it is.
        assert_eq!(source.runs(), [PUSHING, HALF_PUSHED].contains(&place), "at {place:?}");
        assert!(source.is_write_protected());
        Self { migrating, receiver, held, _proxy: proxy }
    }
}

/// The source says that it failed, and why, and its guest goes on as if nothing had been.
fn goes_on_at_the_source(source: &mut Machine, finished: &Finished, reasons: &[&str]) {
    finished.fails_with(1, &[]);
    let report = finished.json();
    assert_eq!(report["outcome"], "failed", "{finished}");
    let reason = report["reason"].as_str().unwrap();
    assert!(reasons.iter().any(|words| reason.contains(words)), "{reason}");
    source.is_untouched();
    source.lives();
}

#[test]
fn the_targets_vmferry_is_killed() {
    need_rights!();
    for version in VERSIONS {
        let mut guest = Machine::linux(version, HOT);
        for place in [PUSHING, STOPPED, SENT] {
            let mut target = Machine::waiting(version);
            let attempt = Attempt::held_at(place, &mut guest, &target);
            attempt.receiver.ferry.kill();
            let finished = attempt.migrating.finish();
            goes_on_at_the_source(&mut guest, &finished, &["connection to the target was lost"]);
            exactly_one_runs(&mut guest, Some(&mut target));
        }
        moves(guest, Machine::waiting(version), &[]);
    }
}

/// The same without a proxy: the stop phase is long because the path is slow.
#[test]
fn the_targets_vmferry_is_killed_in_a_long_pause() {
    need_rights!();
    let mut guest = Machine::linux("10.0", "vmferry.memory=24MiB vmferry.hot=16MiB vmferry.rate=0");
    let before = guest.lives();
    let mut target = Machine::waiting("10.0");
    let receiver = Receiver::start(&target, &[]);
    guest.forget_events();
    let slow = ["--bandwidth", "8MB/s", "--downtime-limit", "10s", "--json"];
    let migrating = Ferry::migrate(&guest, &receiver.address, &slow);
    guest.wait_event("STOP");
    receiver.ferry.kill();
    let finished = migrating.finish();
    goes_on_at_the_source(&mut guest, &finished, &["connection to the target was lost"]);
    exactly_one_runs(&mut guest, Some(&mut target));
    assert!(guest.lives().is_after(before));
    moves(guest, Machine::waiting("10.0"), &["--downtime-limit", "2s"]);
}

#[test]
fn the_targets_qemu_is_killed() {
    need_rights!();
    for version in VERSIONS {
        let mut guest = Machine::linux(version, HOT);
        for place in [PUSHING, STOPPED, SENT] {
            let target = Machine::waiting(version);
            let attempt = Attempt::held_at(place, &mut guest, &target);
            target.kill();
            attempt.held.go(Step::Forward);
            let finished = attempt.migrating.finish();
            goes_on_at_the_source(&mut guest, &finished, &["the target ended the migration: "]);
            let received = attempt.receiver.ferry.finish();
            received.fails_with(1, &["No guest was received; it runs on the source", "QEMU"]);
            exactly_one_runs(&mut guest, None);
        }
        moves(guest, Machine::waiting(version), &[]);
    }
}

/// Nobody is left to say anything: the guard lets the guest go on.
#[test]
fn the_sources_vmferry_is_killed() {
    need_rights!();
    for version in VERSIONS {
        let mut guest = Machine::linux(version, HOT);
        for place in [HALF_PUSHED, STOPPED, SENT] {
            let mut target = Machine::waiting(version);
            let attempt = Attempt::held_at(place, &mut guest, &target);
            attempt.migrating.kill();
            guest.wait_running();
            // The guard puts the settings back after the guest runs, and has the monitor until it ends.
            until("the monitor is free", || Ferry::inspect(&guest, &[]).finish().code == Some(0));
            guest.is_untouched();
            attempt.held.go(Step::Forward);
            let received = attempt.receiver.ferry.finish();
            received
                .fails_with(1, &["No guest was received; it runs on the source", "connection to the source was lost"]);
            exactly_one_runs(&mut guest, Some(&mut target));
        }
        moves(guest, Machine::waiting(version), &[]);
    }
}

/// The source's QEMU goes, and its guest with it: nobody may run half of it.
#[test]
fn the_sources_qemu_is_killed() {
    need_rights!();
    for place in [PUSHING, STOPPED] {
        let mut guest = Machine::linux("10.0", HOT);
        let mut target = Machine::waiting("10.0");
        let attempt = Attempt::held_at(place, &mut guest, &target);
        guest.kill();
        attempt.held.go(Step::Forward);
        let finished = attempt.migrating.finish();
        if place == STOPPED && finished.code == Some(0) {
            // The rest of the guest was under way already, so that nothing was needed of its QEMU any more.
            let received = attempt.receiver.ferry.finish();
            assert_eq!(received.code, Some(0), "{received}");
            target.lives();
            continue;
        }
        finished.fails_with(1, &["\"failed\""]);
        attempt.receiver.ferry.finish().fails_with(1, &["the source ended the migration"]);
        assert_eq!(target.run_state(), "inmigrate");
    }
}

/// The connection ends, is silent, or carries a wrong bit: at any place before the hand-over the source goes on, and the
/// target's QEMU takes the next attempt.
#[test]
fn the_connection_fails() {
    need_rights!();
    const LOST: &[&str] = &["connection to the target was lost", "the target ended the migration"];
    // Who notices the silence first says so to the other, who may be deaf.
    const STALLED: &[&str] = &["the target was silent for", "the peer did not move for"];
    const DAMAGED: &[&str] = &["checksum"];
    let faults = [
        (Where::Byte(10), Step::Cut, LOST),
        (Where::Byte(100_000), Step::Cut, LOST),
        (Where::Byte(3_000_007), Step::Cut, LOST),
        (STOPPED, Step::Cut, LOST),
        (Where::Frame(kind::DEVICE_STATE, 1), Step::Cut, LOST),
        (Where::Frame(kind::DEVICE_STATE, 1), Step::CutBehind, LOST),
        (SENT, Step::Cut, LOST),
        (PUSHING, Step::Stall, STALLED),
        (STOPPED, Step::Stall, STALLED),
        (SENT, Step::Stall, STALLED),
        (PUSHING, Step::FlipBit, DAMAGED),
        (Where::Frame(kind::DEVICE_STATE, 1), Step::FlipBit, DAMAGED),
        (SENT, Step::FlipBit, DAMAGED),
    ];
    for version in VERSIONS {
        let mut guest = Machine::linux(version, HOT);
        let mut target = Machine::waiting(version);
        for (place, step, reasons) in faults {
            println!("{version}: {step:?} at {place:?}");
            let stall: &[&str] = if step == Step::Stall { &["--stall-timeout", "1s"] } else { &[] };
            let mut receiver = Receiver::start(&target, stall);
            let proxy = Proxy::at(&receiver.address, place, step);
            let finished = Ferry::migrate(&guest, &proxy.address, &[&["--json"], stall].concat()).finish();
            goes_on_at_the_source(&mut guest, &finished, reasons);
            drop(proxy);
            if place == Where::Byte(10) {
                // No whole greeting came: it was anybody.
                receiver.ferry.wait_line(|line| line.contains("was turned away") && line.contains("still listening"));
                assert!(!receiver.ferry.has_ended());
                receiver.ferry.signal(Signal::TERM);
                receiver.ferry.finish().fails_with(130, &["no guest was received"]);
            } else {
                let words = ["No guest was received", "This QEMU can take another attempt"];
                receiver.ferry.finish().fails_with(1, &words);
            }
            exactly_one_runs(&mut guest, Some(&mut target));
        }
        moves(guest, target, &[]);
    }
}

/// The target's word that the guest runs never arrives: the source must not run it again, whatever it knows.
#[test]
fn the_answer_to_the_hand_over_is_lost() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    for step in [Step::LoseAnswers, Step::CutBehind] {
        let mut target = Machine::waiting("10.0");
        let receiver = Receiver::start(&target, &["--json"]);
        let proxy = Proxy::at(&receiver.address, Where::Frame(kind::HAND_OVER, 1), step);
        guest.forget_events();
        let migrating = Ferry::migrate(&guest, &proxy.address, &["--verify", "--stall-timeout", "2s"]);
        let received = receiver.ferry.finish();
        assert_eq!(received.code, Some(0), "{received}");
        assert_eq!(received.json()["outcome"], "completed");
        let finished = migrating.finish();
        finished.fails_with(4, &["IN DOUBT", "query-status", "end the", "reason"]);
        assert!(!guest.has_reported("RESUME"), "the source ran its guest after the hand-over");
        assert_eq!(guest.run_state(), "postmigrate");
        exactly_one_runs(&mut target, Some(&mut guest));
        guest.has_no_userfaultfd();
        drop(guest);
        guest = target;
    }
}

/// The hand-over itself never arrives: nobody runs the guest until somebody decides, as the report says.
#[test]
fn the_hand_over_is_lost() {
    need_rights!();
    for version in VERSIONS {
        let mut guest = Machine::linux(version, HOT);
        let before = guest.lives();
        let mut target = Machine::waiting(version);
        let receiver = Receiver::start(&target, &[]);
        let proxy = Proxy::at(&receiver.address, Where::Frame(kind::HAND_OVER, 1), Step::Cut);
        let finished = Ferry::migrate(&guest, &proxy.address, &["--json"]).finish();
        finished.fails_with(4, &[]);
        assert_eq!(finished.json()["outcome"], "in_doubt", "{finished}");
        receiver.ferry.finish().fails_with(1, &["Start this QEMU anew", "connection to the source was lost"]);
        assert_eq!((guest.run_state().as_str(), target.run_state().as_str()), ("postmigrate", "paused"));
        target.kill();
        guest.execute("cont");
        exactly_one_runs(&mut guest, None);
        assert!(guest.lives().is_after(before));
        moves(guest, Machine::waiting(version), &[]);
    }
}

#[test]
fn the_user_changes_their_mind() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    let mut target = Machine::waiting("10.0");
    let signals = [(PUSHING, Signal::INT), (STOPPED, Signal::INT), (SENT, Signal::INT), (PUSHING, Signal::TERM)];
    for (place, signal) in signals {
        println!("{signal:?} at {place:?}");
        let attempt = Attempt::held_at(place, &mut guest, &target);
        attempt.migrating.signal(signal);
        let finished = attempt.migrating.finish();
        finished.fails_with(130, &[]);
        assert_eq!(finished.json()["outcome"], "cancelled", "{finished}");
        guest.is_untouched();
        // What was sent before the word of the cancellation arrives first. All of it was loaded where it was complete.
        attempt.held.go(Step::Forward);
        attempt.receiver.ferry.finish().fails_with(1, &["it runs on the source"]);
        exactly_one_runs(&mut guest, Some(&mut target));
        if place == SENT {
            target = Machine::waiting("10.0");
        }
    }
    let signals = [(PUSHING, Signal::INT), (HALF_PUSHED, Signal::INT), (STOPPED, Signal::INT), (STOPPED, Signal::TERM)];
    for (place, signal) in signals {
        println!("{signal:?} on the target at {place:?}");
        let attempt = Attempt::held_at(place, &mut guest, &target);
        attempt.receiver.ferry.signal(signal);
        let received = attempt.receiver.ferry.finish();
        received.fails_with(130, &["it runs on the source"]);
        let finished = attempt.migrating.finish();
        goes_on_at_the_source(&mut guest, &finished, &["the target ended the migration: cancelled"]);
        exactly_one_runs(&mut guest, Some(&mut target));
    }
    let receiver = Receiver::start(&target, &[]);
    receiver.ferry.signal(Signal::INT);
    receiver.ferry.finish().fails_with(130, &["no guest was received"]);
    moves(guest, target, &[]);
}

/// Whoever connects and is no source, or a false one, does no harm.
#[test]
fn strangers_connect_to_the_target() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    let mut target = Machine::waiting("10.0");
    let mut receiver = Receiver::start(&target, &["--stall-timeout", "2s"]);
    let huge = [&u32::MAX.to_le_bytes()[..], &[1, 0, 0, 0], &[0; 8]].concat();
    let noise: Vec<u8> = (0_u32..4096).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let unknown = [&4_u32.to_le_bytes()[..], &[200, 0, 0, 0], &[0; 12]].concat();
    let mut early = Vec::new();
    FrameWriter::new().seal(&Message::Paused, &mut early);
    let strangers: [(&str, &[u8]); 7] = [
        ("an HTTP request", b"GET / HTTP/1.1\r\nHost: target\r\n\r\n"),
        ("noise", &noise),
        ("a huge length", &huge),
        ("an unknown message", &unknown),
        ("a message before the greeting", &early),
        ("nothing", &[]),
        ("half a header", &[0; 7]),
    ];
    for (number, (name, bytes)) in strangers.into_iter().enumerate() {
        println!("{name}");
        let mut stranger = TcpStream::connect(&receiver.address).unwrap();
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may close before it has read everything.
        drop(stranger.write_all(bytes));
        drop(stranger.shutdown(std::net::Shutdown::Write));
        drop(stranger.read_to_end(&mut Vec::new()));
        drop(stranger);
        until(name, || receiver.ferry.said("was turned away") > number);
        assert!(!receiver.ferry.has_ended(), "{name} ended it");
    }
    assert_eq!(target.run_state(), "inmigrate");

    // A greeting that would be accepted, and then pages outside RAM.
    let bytes = u64::from(support::LINUX_MEBIBYTES) << 20;
    let inspection = Ferry::inspect(&guest, &["--json"]).finish().json();
    let hello = |machine: &str| {
        Message::Hello(Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            migration: MigrationId([7; 16]),
            layout: RamLayout::new(vec![RamBlock { id: "ram".to_owned(), bytes }]).unwrap(),
            machine: machine.to_owned(),
            vcpus: 2,
            verify: false,
            encodings: Encodings::RAW,
            streams: 1,
        })
    };
    let page = [7; PAGE_BYTES as usize];
    let run = PageRun::new(bytes / PAGE_BYTES, 1);
    let outside = [Message::Pages(Pages::raw(run, &page)), Message::Zero(vec![PageRun::new(0, u64::MAX)])];
    for message in &outside {
        let mut frames = FrameWriter::new();
        let mut sent = Vec::new();
        frames.seal(&hello(inspection["facts"]["machine"].as_str().unwrap()), &mut sent);
        frames.seal(message, &mut sent);
        let mut stranger = TcpStream::connect(&receiver.address).unwrap();
        stranger.write_all(&sent).unwrap();
        let received = receiver.ferry.finish();
        received.fails_with(1, &["outside the guest's", "This QEMU can take another attempt"]);
        assert_eq!(target.run_state(), "inmigrate");
        receiver = Receiver::start(&target, &[]);
    }
    receiver.ferry.signal(Signal::TERM);
    receiver.ferry.finish().fails_with(130, &[]);
    guest.is_untouched();
    moves(guest, target, &[]);
}
