//! Guests moved between two QEMUs by two `vmferry` processes, as their users do it.

mod support;

use serde_json::Value;
use support::{
    Ferry, HOT, Machine, Receiver, Recipe, exactly_one_runs, moves, moves_keeping_source, need_rights,
    report_is_complete,
};

const ZIPF: &str = "vmferry.pattern=zipf vmferry.memory=24MiB vmferry.rate=5000";
const SWEEP: &str = "vmferry.pattern=sweep vmferry.memory=24MiB vmferry.rate=2000";

fn both_reports_are_complete(sent: &Value, received: &Value) {
    report_is_complete(sent);
    assert_eq!(received["outcome"], "completed", "{received:#}");
    assert_eq!(received["migration_id"], sent["migration_id"]);
    assert_eq!(received["wire_bytes"].as_u64(), sent["wire_bytes"].as_u64(), "{received:#} {sent:#}");
    assert_eq!(received["verified_pages"], sent["verify"]["pages"]);
    assert_eq!(received["mismatched_pages"], 0);
    assert_eq!(received["can_retry"], false);
}

fn all_patterns(version: &'static str) {
    for pattern in [HOT, ZIPF, SWEEP] {
        let source = Machine::linux(version, pattern);
        // The hot set must not fit the limit together with what is still cold, or nothing need be held back.
        let tight = ["--bandwidth", "100MB/s", "--downtime-limit", "100ms"];
        let options = if pattern == HOT { &tight[..] } else { &[] };
        let (_, sent, received) = moves(source, Machine::waiting(version), options);
        both_reports_are_complete(&sent, &received);
        assert_eq!(sent["working_set"]["predictor"], "lcbst");
        if pattern == HOT {
            assert!(sent["working_set"]["pages"].as_u64().unwrap() > 0, "nothing of a hot set was held: {sent:#}");
        }
    }
}

#[test]
fn guests_of_all_patterns_move_on_qemu_7_2() {
    need_rights!();
    all_patterns("7.2");
}

#[test]
fn guests_of_all_patterns_move_on_qemu_10_0() {
    need_rights!();
    all_patterns("10.0");
}

/// However pages are encoded, the guest finds its memory as it was.
#[test]
fn a_guest_moves_with_every_kind_of_compression() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    for how in ["auto", "lz4", "zstd", "off"] {
        let options = ["--compress", how, "--bandwidth", "50MB/s", "--predictor", "none"];
        let (moved, sent, received) = moves(guest, Machine::waiting("10.0"), &options);
        both_reports_are_complete(&sent, &received);
        let pages = |kind: &str| sent["pages"][kind].as_u64().unwrap();
        // What `auto` does depends on how busy this machine is.
        if how != "auto" {
            assert_eq!(pages("lz4") + pages("zstd") > 0, how != "off", "{how}: {sent:#}");
            assert_eq!(sent["compression"]["ratio"].as_f64() > Some(1.2), how != "off", "{how}: {sent:#}");
            // Linux has some pages twice.
            assert_eq!(pages("copy") > 0, how != "off", "{how}: {sent:#}");
        }
        guest = moved;
    }
}

/// The target of one migration is the source of the next; and QEMU may be newer there.
#[test]
fn a_guest_moves_on_and_on_and_to_a_newer_qemu() {
    need_rights!();
    let machine = ["-machine", "pc-q35-7.2,memory-backend=ram"];
    let recipe = Recipe::new("7.2").linux(support::LINUX_MEBIBYTES, HOT).extra(&machine);
    let newer = || Machine::start(Recipe { version: "10.0", ..recipe.clone() }.incoming());
    let guest = Machine::boot(recipe.clone());
    let (guest, sent, received) = moves(guest, newer(), &["--predictor", "none"]);
    both_reports_are_complete(&sent, &received);
    assert_eq!(sent["working_set"]["predictor"], "none");
    let (guest, sent, received) = moves(guest, newer(), &["--bandwidth", "100MB/s", "--downtime-limit", "100ms"]);
    both_reports_are_complete(&sent, &received);
    assert_eq!(sent["downtime_limit_ms"], 100.0);
    let (_, sent, _) = moves(guest, newer(), &["--epoch", "20ms", "--observe", "0"]);
    report_is_complete(&sent);
}

/// The guest's processes are told apart unless that is turned off, and any predictor can be asked for.
#[test]
fn address_spaces_and_predictors_are_as_the_user_wishes() {
    need_rights!();
    let guest = Machine::linux("7.2", HOT);
    let (guest, sent, _) = moves(guest, Machine::waiting("7.2"), &["--predictor", "lru"]);
    report_is_complete(&sent);
    assert_eq!(sent["working_set"]["predictor"], "lru");
    let spaces = &sent["address_spaces"];
    assert_eq!(spaces["failure"], Value::Null, "{sent:#}");
    assert!(spaces["processes"].as_u64() >= Some(1) && spaces["refreshes"].as_u64() >= Some(1), "{sent:#}");
    assert!(spaces["refresh_max_ms"].as_f64() > Some(0.0), "{sent:#}");
    assert!(sent["downtime"]["fixed_planned_ms"].as_f64() > Some(0.0), "{sent:#}");
    let options = ["--address-spaces", "off", "--predictor", "lcbst:half-life=8"];
    let (_, sent, _) = moves(guest, Machine::waiting("7.2"), &options);
    report_is_complete(&sent);
    assert_eq!(sent["working_set"]["predictor"], "lcbst");
    assert_eq!(sent["address_spaces"], Value::Null);
}

/// Without `--json` people read it; without `--quit-source` the source's QEMU stays, paused, and with it ends.
#[test]
fn the_source_stays_paused_or_ends_as_the_user_wishes() {
    need_rights!();
    let guest = Machine::linux("10.0", HOT);
    let (mut source, mut guest, _, _) = moves_keeping_source(guest, Machine::waiting("10.0"), &[]);
    exactly_one_runs(&mut guest, Some(&mut source));
    // A second attempt from what is left over is refused: the guest runs elsewhere.
    let receiver = Receiver::start(&Machine::waiting("10.0"), &[]);
    let refused = Ferry::migrate(&source, &receiver.address, &[]).finish();
    refused.fails_with(1, &["postmigrate", "may run elsewhere"]);
    drop(receiver);
    exactly_one_runs(&mut guest, Some(&mut source));

    let mut target = Machine::waiting("10.0");
    let receiver = Receiver::start(&target, &[]);
    let sent = Ferry::migrate(&guest, &receiver.address, &["--quit-source"]).finish();
    assert_eq!(sent.code, Some(0), "{sent}");
    let received = receiver.ferry.finish();
    assert_eq!(received.code, Some(0), "{received}");
    for words in ["The guest runs on the target.", "downtime", "working set", "passes"] {
        assert!(sent.out.contains(words), "nothing of `{words}`: {sent}");
    }
    assert!(received.out.contains("The guest runs here."), "{received}");
    guest.vm.wait_end();
    exactly_one_runs(&mut target, None);
}

/// The operator paused it, and only the operator lets it go on: where it is moved it is paused there, too, and where
/// that is refused it is paused here.
#[test]
fn a_paused_guest_never_goes_on_by_itself() {
    need_rights!();
    let mut source = Machine::linux("10.0", HOT);
    let before = source.lives();
    source.execute("stop");
    let mut target = Machine::waiting("10.0");
    let receiver = Receiver::start(&target, &["--json"]);
    let sent = Ferry::migrate(&source, &receiver.address, &["--json", "--verify"]).finish();
    if sent.code == Some(0) {
        let received = receiver.ferry.finish();
        assert_eq!(received.code, Some(0), "{received}");
        assert_eq!((source.run_state().as_str(), target.run_state().as_str()), ("postmigrate", "paused"));
        target.execute("cont");
        assert!(target.lives().is_after(before));
    } else {
        sent.fails_with(1, &["paused"]);
        assert_eq!((source.run_state().as_str(), target.run_state().as_str()), ("paused", "inmigrate"));
        source.execute("cont");
        assert!(source.lives().is_after(before));
    }
}

/// The demo starts its QEMUs itself.
#[test]
fn the_demo_moves_a_linux_guest() {
    need_rights!();
    let demo = ["demo", "--vmm", "qemu", "--memory", "160MiB", "--hot", "8MiB", "--write-rate", "5000"];
    let finished = Ferry::start(&[&demo[..], &["--json", "--verify"]].concat()).finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = finished.json();
    report_is_complete(&report);
    assert_eq!(report["vmm"], "qemu");
    let guest = &report["guest"];
    assert_eq!(guest["check"]["wrong"], 0, "{report:#}");
    assert!(guest["check"]["pages"].as_u64().unwrap() > 0, "{report:#}");
    assert!(guest["writes_after"].as_u64() > guest["writes_before"].as_u64(), "{report:#}");
    assert!(guest["gap_ms"].as_f64().unwrap() > 0.0, "{report:#}");

    let absent = Ferry::start(&[&demo[..], &["--kernel", "/absent"]].concat()).finish();
    absent.fails_with(1, &["/absent does not exist", "cargo xtask setup"]);
}
