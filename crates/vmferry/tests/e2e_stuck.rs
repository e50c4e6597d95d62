//! Guests that do not converge, and what is done about them: with the guest of `vmferry demo`, which needs no rights, and
//! with QEMU.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use support::{
    Ferry, Finished, Machine, PROGRAM, Proxy, Receiver, Remove, Step, VERSIONS, Where, exactly_one_runs, is_root, kind,
    need_rights, temporary_directory, until,
};

/// Rewrites 24 MiB so fast that a path of 40 MB/s needs it slowed to a fifth for a pause of 200 ms.
const STORM: [&str; 13] = [
    "demo",
    "--json",
    "--memory",
    "64MiB",
    "--hot",
    "24MiB",
    "--write-rate",
    "60000",
    "--bandwidth",
    "40MB/s",
    "--compress",
    "off",
    "--downtime-limit",
];
const LIMIT: &str = "200ms";

fn storm(options: &[&str]) -> Finished {
    Ferry::start(&[&STORM[..], &[LIMIT], options].concat()).finish()
}

fn guest_is_well(report: &Value) {
    assert_eq!(report["guest"]["check"]["wrong"], 0, "{report:#}");
    let number = |name: &str| report["guest"][name].as_u64().unwrap();
    assert!(number("writes_after") >= number("writes_before"), "{report:#}");
}

#[test]
fn a_storm_is_given_up_unless_something_else_is_wanted() {
    let finished = storm(&[]);
    assert_eq!(finished.code, Some(3), "{finished}");
    let report = finished.json();
    assert_eq!((&report["outcome"], &report["if_stuck"]), (&"not_converged".into(), &"abort".into()));
    assert_eq!((&report["throttle"], &report["limit_waived"]), (&Value::Null, &Value::Null), "{report:#}");
    let reason = report["reason"].as_str().unwrap();
    assert!(reason.contains("--if-stuck switch") && reason.contains("--if-stuck throttle"), "{reason}");
    guest_is_well(&report);
}

#[test]
fn a_storm_that_is_slowed_fits_the_limit() {
    let finished = storm(&["--verify", "--if-stuck", "throttle"]);
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = finished.json();
    assert_eq!((&report["if_stuck"], &report["pause_cause"]), (&"throttle".into(), &"plan".into()), "{report:#}");
    let throttle = |name: &str| report["throttle"][name].as_f64().unwrap();
    assert!((20.0..=95.1).contains(&throttle("max_percent")) && throttle("steps") >= 1.0, "{report:#}");
    assert!((0.0..report["total_ms"].as_f64().unwrap()).contains(&throttle("throttled_ms")), "{report:#}");
    assert_eq!(report["verify"]["mismatched"], 0);
    guest_is_well(&report);
}

#[test]
fn a_storm_is_paused_beyond_the_limit() {
    let finished = storm(&["--verify", "--if-stuck", "switch"]);
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = finished.json();
    assert_eq!((&report["if_stuck"], &report["pause_cause"]), (&"switch".into(), &"stuck".into()), "{report:#}");
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64).unwrap();
    let limit = number("/downtime_limit_ms");
    assert!(number("/downtime_ms") > limit, "{report:#}");
    assert!(number("/limit_waived/expected_downtime_ms") > limit, "{report:#}");
    assert_eq!((&report["throttle"], &report["verify"]["mismatched"]), (&Value::Null, &0.into()), "{report:#}");
    guest_is_well(&report);

    // In words, of a guest that cannot fit either.
    let options = ["--memory", "16MiB", "--hot", "8MiB", "--write-rate", "20000", "--bandwidth", "10MB/s"];
    let options = [&["demo", "--compress", "off", "--downtime-limit", "50ms", "--if-stuck", "switch"], &options[..]];
    let finished = Ferry::start(&options.concat()).finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.out.contains("limit waived"), "{finished}");
}

/// The limit is shorter than what every pause takes: no guest is slow enough for that.
#[test]
fn no_guest_is_slowed_for_a_limit_that_cannot_be_met() {
    let options = ["demo", "--json", "--memory", "16MiB", "--downtime-limit", "1ms", "--if-stuck", "throttle"];
    let finished = Ferry::start(&options).finish();
    assert_eq!(finished.code, Some(3), "{finished}");
    assert_eq!(finished.json()["throttle"], Value::Null, "{finished}");
}

#[test]
fn what_is_not_there_yet_is_refused() {
    let finished = Ferry::start(&["demo", "--if-stuck", "postcopy"]).finish();
    finished.fails_with(2, &["--if-stuck postcopy", "not there yet", "throttle"]);
}

/// Rewrites 32 MiB as fast as an emulated processor does.
const HOT: &str = "vmferry.memory=36MiB vmferry.hot=32MiB vmferry.rate=0";
/// It has to be slowed for this. The limit is far beyond the fixed part of a pause on a busy host.
const SLOWLY: [&str; 9] =
    ["--json", "--compress", "off", "--if-stuck", "throttle", "--bandwidth", "10MB/s", "--downtime-limit", "1s"];
/// This it does, at once.
const FITS: [&str; 4] = ["--bandwidth", "none", "--downtime-limit", "60s"];

/// The control groups that QEMU's threads are in, by thread.
fn groups(machine: &Machine) -> BTreeMap<u32, String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", machine.pid())).unwrap();
    let of = |entry: std::fs::DirEntry| {
        let tid = entry.file_name().to_str()?.parse().ok()?;
        Some((tid, std::fs::read_to_string(entry.path().join("cgroup")).ok()?))
    };
    tasks.filter_map(|entry| of(entry.unwrap())).collect()
}

/// Whether a thread of QEMU is slowed: it is in a control group of ours, or is being traced just now. Where its writes begin
/// to be followed, the first thread is traced, which no processor has.
fn is_slowed(machine: &Machine) -> bool {
    let of_ours = groups(machine).values().any(|groups| groups.contains("/vmferry-"));
    let tasks = std::fs::read_dir(format!("/proc/{}/task", machine.pid())).unwrap();
    let is_traced = |path: PathBuf| {
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
    };
    let first = machine.pid().to_string();
    let mut others = tasks.map(|entry| entry.unwrap()).filter(|entry| entry.file_name() != first.as_str());
    of_ours || others.any(|entry| is_traced(entry.path()))
}

/// The control groups that somebody made for this QEMU, wherever they are.
fn left_behind(machine: &Machine) -> Vec<PathBuf> {
    fn walk(directory: &Path, prefix: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with(prefix) {
                    found.push(entry.path());
                }
                walk(&entry.path(), prefix, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &format!("vmferry-{}-", machine.pid()), &mut found);
    found
}

/// Nothing of the throttling is left.
fn is_not_slowed(machine: &Machine, before: &BTreeMap<u32, String>) {
    assert!(!is_slowed(machine));
    assert_eq!(left_behind(machine), Vec::<PathBuf>::new());
    for (tid, group) in groups(machine) {
        assert!(before.get(&tid).is_none_or(|before| *before == group), "thread {tid} was moved to {group}");
    }
}

/// Whether `vmferry` may use control groups, if this host has them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Groups,
    /// As root, they are hidden from it; others may not change them in any case.
    HoldingThreads,
}

/// A `vmferry migrate` that slows the guest.
struct Slowing {
    ferry: Ferry,
    run_directory: PathBuf,
    _remove: Remove,
}

impl Slowing {
    /// Starts it, and returns when the guest is slowed.
    fn start(by: By, source: &Machine, to: &str, options: &[&str]) -> Self {
        const HIDE: &str = "mount -t tmpfs none /sys/fs/cgroup && exec \"$0\" \"$@\"";
        let qmp = source.qmp();
        let migrate = [&["migrate", "--qmp", &qmp, "--to", to], &SLOWLY[..], options].concat();
        let (directory, remove) = temporary_directory();
        let run_directory = directory.join("run");
        let special = |command: &mut Command| {
            command.env("VMFERRY_RUN_DIR", &run_directory);
        };
        let ferry = if by == By::HoldingThreads && is_root() {
            let hidden = [&["--mount", "sh", "-c", HIDE, PROGRAM], &migrate[..]].concat();
            Ferry::start_with(Path::new("unshare"), &hidden, special)
        } else {
            Ferry::start_with(Path::new(PROGRAM), &migrate, special)
        };
        until("the guest is slowed", || is_slowed(source));
        Self { ferry, run_directory, _remove: remove }
    }

    /// Allows what it takes for the guest to be paused now.
    fn allow(&self) {
        let id = self.ferry.pid().to_string();
        let arguments = [&["ctl", "set", &id], &FITS[..]].concat();
        let ctl = Ferry::start_with(Path::new(PROGRAM), &arguments, |command| {
            command.env("VMFERRY_RUN_DIR", &self.run_directory);
        });
        let finished = ctl.finish();
        assert_eq!(finished.code, Some(0), "{finished}");
    }
}

/// Whatever ends a migration that slows the guest, the guest has all of its time afterwards.
fn has_its_time_back(version: &'static str, by: By) {
    let mut guest = Machine::linux(version, HOT);
    let before = groups(&guest);
    let mut target = Machine::waiting(version);

    // The user changes their mind.
    let receiver = Receiver::start(&target, &[]);
    let slowing = Slowing::start(by, &guest, &receiver.address, &[]);
    slowing.ferry.signal(Signal::INT);
    let finished = slowing.ferry.finish();
    finished.fails_with(130, &[]);
    assert!(finished.json()["throttle"]["steps"].as_u64() >= Some(1), "{finished}");
    is_not_slowed(&guest, &before);
    guest.is_untouched();
    receiver.ferry.finish().fails_with(1, &["it runs on the source"]);

    // Nobody is left to give it back but the guard, or the kernel.
    let receiver = Receiver::start(&target, &[]);
    let slowing = Slowing::start(by, &guest, &receiver.address, &[]);
    slowing.ferry.kill();
    until("the guest is not slowed", || !is_slowed(&guest) && left_behind(&guest).is_empty());
    until("the monitor is free", || Ferry::inspect(&guest, &[]).finish().code == Some(0));
    is_not_slowed(&guest, &before);
    guest.is_untouched();
    receiver.ferry.finish().fails_with(1, &["connection to the source was lost"]);

    // The connection is lost while the slowed guest is paused.
    let receiver = Receiver::start(&target, &[]);
    let proxy = Proxy::at(&receiver.address, Where::Frame(kind::PAUSED, 1), Step::Cut);
    let slowing = Slowing::start(by, &guest, &proxy.address, &[]);
    slowing.allow();
    let finished = slowing.ferry.finish();
    finished.fails_with(1, &[]);
    assert!(finished.json()["downtime_ms"].as_f64() > Some(0.0), "{finished}");
    drop(proxy);
    receiver.ferry.finish().fails_with(1, &["No guest was received"]);
    is_not_slowed(&guest, &before);
    guest.is_untouched();
    exactly_one_runs(&mut guest, Some(&mut target));

    // And it moves, with nothing left behind on either side.
    let target_before = groups(&target);
    let receiver = Receiver::start(&target, &["--json"]);
    let slowing = Slowing::start(by, &guest, &receiver.address, &["--verify"]);
    slowing.allow();
    let finished = slowing.ferry.finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = finished.json();
    assert!(report["throttle"]["steps"].as_u64() >= Some(1), "{report:#}");
    assert_eq!(report["verify"]["mismatched"], 0, "{report:#}");
    assert_eq!(receiver.ferry.finish().code, Some(0));
    is_not_slowed(&guest, &before);
    is_not_slowed(&target, &target_before);
    exactly_one_runs(&mut target, Some(&mut guest));
}

#[test]
fn a_slowed_guest_of_qemu_has_its_time_back_after_every_end() {
    need_rights!();
    for version in VERSIONS {
        has_its_time_back(version, By::Groups);
    }
}

#[test]
fn a_guest_of_qemu_that_is_slowed_without_control_groups_has_its_time_back_after_every_end() {
    need_rights!();
    for version in VERSIONS {
        has_its_time_back(version, By::HoldingThreads);
    }
}
