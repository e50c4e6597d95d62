//! A guest recorded as its user does it.

mod support;

use serde_json::Value;
use support::{Ferry, Finished, HOT, Machine, Recipe, need_rights, temporary_directory};

/// The first address space of a process; those before stand for the kernel and for what has no single owner.
const FIRST_PROCESS: u64 = 16;

fn record(guest: &Machine, output: &str, options: &[&str]) -> Finished {
    Ferry::start(&[&["record", "--qmp", &guest.qmp(), "--output", output], options].concat()).finish()
}

fn info(trace: &str) -> Value {
    let info = Ferry::start(&["trace", "info", trace, "--json"]).finish();
    assert_eq!(info.code, Some(0), "{info}");
    info.json()
}

/// One process rewrites 8 MiB; the kernel writes little.
#[test]
fn the_owners_of_written_pages_are_recorded() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    let (directory, _remove) = temporary_directory();
    let path = |name: &str| directory.join(name).display().to_string();

    let recorded = record(&guest, &path("owners"), &["--duration", "8s", "--accessed", "--json"]);
    assert_eq!(recorded.code, Some(0), "{recorded}");
    let report = recorded.json();
    let spaces = &report["address_spaces"];
    assert_eq!(spaces["failure"], Value::Null, "{report:#}");
    assert!(report["owners"].as_u64() >= Some(2) && spaces["processes"].as_u64() >= Some(1), "{report:#}");
    assert!(spaces["refreshes"].as_u64() > Some(0) && spaces["refresh_ms"].as_f64() > Some(0.0), "{report:#}");
    let info = info(&path("owners"));
    let owners = info["owners"].as_array().unwrap();
    assert_eq!(Some(owners.len() as u64), report["owners"].as_u64(), "{info:#}");
    let written_by = |owner: &Value| owner["page_writes"].as_u64().unwrap();
    let all: u64 = owners.iter().map(written_by).sum();
    let busiest = owners.iter().max_by_key(|owner| written_by(owner)).unwrap();
    assert!(busiest["owner"].as_u64() >= Some(FIRST_PROCESS) && 2 * written_by(busiest) > all, "{info:#}");
    assert!(report["accessed_epochs"].as_u64() > Some(0), "{report:#}");

    let whole = record(&guest, &path("whole"), &["--duration", "1s", "--no-owners"]);
    assert_eq!(whole.code, Some(0), "{whole}");
    assert!(!whole.out.contains("owners"), "{whole}");
    let info = self::info(&path("whole"));
    assert_eq!(info["owners"].as_array().unwrap().len(), 1, "{info:#}");
    assert_eq!(info["owners"][0]["owner"], 0, "{info:#}");
    guest.is_untouched();
}

/// The guest's firmware runs in 32-bit mode, or not at all in a mode with address spaces: it is recorded all the same.
#[test]
fn a_guest_without_processes_is_recorded() {
    need_rights!();
    let mut guest = Machine::firmware(Recipe::new("7.2"));
    let (directory, _remove) = temporary_directory();
    let trace = directory.join("trace").display().to_string();
    let recorded = record(&guest, &trace, &["--duration", "1s"]);
    assert_eq!(recorded.code, Some(0), "{recorded}");
    assert!(recorded.out.contains("owners"), "{recorded}");
    info(&trace);
    guest.is_untouched();
}

#[test]
fn contradicting_flags_are_refused() {
    let refused = Ferry::start(&["record", "--qmp", "/absent", "-o", "trace", "--accessed", "--no-owners"]).finish();
    assert_eq!(refused.code, Some(2), "{refused}");
}
