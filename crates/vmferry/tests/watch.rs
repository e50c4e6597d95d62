//! A guest watched as its user does it.

mod support;

use serde_json::Value;
use support::{Ferry, HOT, Machine, Recipe, need_rights, until};

/// The guest rewrites 8 MiB at 5000 pages a second, so each figure has a bound.
#[test]
fn a_linux_guest_is_watched_line_by_line() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    let watch = |options: &[&str]| Ferry::start(&[&["watch", "--qmp", &guest.qmp()], options].concat()).finish();

    let plain = watch(&["--plain", "--duration", "2s", "--skip-zero-pages"]);
    assert_eq!(plain.code, Some(0), "{plain}");
    let lines: Vec<&str> = plain.out.lines().collect();
    assert!((1..=2).contains(&lines.len()), "{plain}");
    assert!(lines[0].contains("dirty rate") && lines[0].contains("working set"), "{plain}");

    let json = watch(&["--json", "--duration", "6s", "--bandwidth", "100MB/s", "--downtime-limit", "200ms"]);
    assert_eq!(json.code, Some(0), "{json}");
    let lines: Vec<Value> = json.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!((3..=6).contains(&lines.len()), "{json}");
    let last = lines.last().unwrap();
    assert_eq!(last["guest_bytes"], u64::from(support::LINUX_MEBIBYTES) << 20);
    assert!(last["zero_bytes"].as_u64().unwrap() > 0, "{last:#}");
    let rate = last["dirty_mean_bytes_per_s"].as_f64().unwrap();
    assert!((100_000.0..40_000_000.0).contains(&rate), "{last:#}");
    let set = last["working_set_100_bytes"].as_u64().unwrap();
    assert!((1 << 20..=32 << 20).contains(&set), "{last:#}");
    assert!(last["working_set_1_bytes"].as_u64() <= last["working_set_10_bytes"].as_u64(), "{last:#}");
    assert_eq!(last["forecast"]["verdict"], "converges", "{last:#}");
    assert_eq!(last["forecast"]["within_limit"], true, "{last:#}");
    guest.is_untouched();
}

/// Ctrl-C and a guest that ends.
#[test]
fn a_watch_ends_with_its_user_or_its_guest() {
    need_rights!();
    let mut guest = Machine::firmware(Recipe::new("10.0"));
    let watch = Ferry::start(&["watch", "--qmp", &guest.qmp(), "--plain"]);
    until("the guest is tracked", || guest.is_write_protected());
    watch.signal(rustix::process::Signal::INT);
    let finished = watch.finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    guest.is_untouched();

    let watch = Ferry::start(&["watch", "--qmp", &guest.qmp(), "--json"]);
    until("the guest is tracked", || guest.is_write_protected());
    guest.kill();
    let finished = watch.finish();
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.err.contains("vmferry:"), "{finished}");
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused() {
    for options in [&["--epoch", "2s"][..], &["--plain", "--json"], &["--bandwidth", "0"]] {
        let finished = Ferry::start(&[&["watch", "--qmp", "/absent"], options].concat()).finish();
        assert_eq!(finished.code, Some(2), "{finished}");
    }
}
