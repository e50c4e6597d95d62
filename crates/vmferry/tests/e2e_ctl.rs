//! `vmferry ctl` with a Linux guest in QEMU: both sides serve a control socket.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{Ferry, HOT, Machine, PROGRAM, exactly_one_runs, need_rights, temporary_directory, until};

#[test]
fn both_sides_are_shown_and_the_source_is_held_changed_and_cancelled() {
    need_rights!();
    let (directory, _remove) = temporary_directory();
    let start = |arguments: &[&str]| {
        Ferry::start_with(Path::new(PROGRAM), arguments, |command| {
            command.env("VMFERRY_RUN_DIR", directory.join("run"));
        })
    };
    let ctl = |arguments: &[&str]| {
        let finished = start(&[&["ctl"], arguments].concat()).finish();
        assert_eq!(finished.code, Some(0), "{finished}");
        finished.out
    };
    let show =
        |ferry: &Ferry| -> Value { serde_json::from_str(&ctl(&["show", "--json", &ferry.pid().to_string()])).unwrap() };
    let receive = |target: &Machine| {
        let ferry = start(&["receive", "--listen", "127.0.0.1:0", "--qmp", &target.qmp()]);
        let line = ferry.wait_line(|line| line.starts_with("listening on "));
        (ferry, line["listening on ".len()..].to_owned())
    };

    let mut guest = Machine::linux("10.0", HOT);
    let mut target = Machine::waiting("10.0");
    // A receiver that still waits.
    let (receiver, _) = receive(&target);
    let waiting = show(&receiver);
    assert_eq!((&waiting["role"], &waiting["guest"]), (&"target".into(), &target.qmp().into()));
    assert!(waiting["doing"].as_str().unwrap().starts_with("waiting for a source on 127.0.0.1:"), "{waiting:#}");
    ctl(&["cancel", &receiver.pid().to_string()]);
    receiver.finish().fails_with(130, &["no guest was received"]);

    for cancelled_by in ["source", "target"] {
        let before = guest.lives();
        let (receiver, address) = receive(&target);
        let slow = ["--json", "--bandwidth", "1MB/s"];
        let source = start(&[&["migrate", "--qmp", &guest.qmp(), "--to", &address], &slow[..]].concat());
        until("memory is received", || show(&receiver)["doing"] == "receiving memory");
        let (here, there) = (show(&source), show(&receiver));
        assert_eq!((&here["role"], &here["migration_id"]), (&"source".into(), &there["migration_id"]));
        let pid = |ferry: &Ferry| ferry.pid().to_string();
        start(&["ctl", "pause", &pid(&receiver)]).finish().fails_with(1, &["up to the source"]);
        ctl(&["pause", &pid(&source)]);
        assert_eq!(show(&source)["is_held"], true);
        assert!(guest.runs());
        let by = if cancelled_by == "source" { &source } else { &receiver };
        ctl(&["cancel", &pid(by)]);
        let (sent, received) = (source.finish(), receiver.finish());
        let codes = if cancelled_by == "source" { (130, 1) } else { (1, 130) };
        assert_eq!((sent.code, received.code), (Some(codes.0), Some(codes.1)), "{sent}\n{received}");
        exactly_one_runs(&mut guest, Some(&mut target));
        assert!(guest.lives().is_after(before));
        guest.has_no_userfaultfd();
    }

    let (receiver, address) = receive(&target);
    let options = ["--json", "--verify", "--bandwidth", "1MB/s"];
    let source = start(&[&["migrate", "--qmp", &guest.qmp(), "--to", &address], &options[..]].concat());
    until("memory is received", || show(&receiver)["doing"] == "receiving memory");
    ctl(&["set", &source.pid().to_string(), "--bandwidth", "none", "--downtime-limit", "2s"]);
    let (sent, received) = (source.finish(), receiver.finish());
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{sent}\n{received}");
    let report = sent.json();
    assert_eq!((&report["verify"]["mismatched"], &report["downtime_limit_ms"]), (&0.into(), &2000.0.into()));
    exactly_one_runs(&mut target, Some(&mut guest));
}
