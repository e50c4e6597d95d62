//! `vmferry simulate` as a user runs it.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

const TINY: &str = "generate:hotcold:pages=2048,rate=3000,duration=2s,hot=300";

fn vmferry(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmferry")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A file's place that no other test uses.
fn place(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
}

#[test]
fn a_table_a_page_and_figures_come_of_one_sweep() {
    let (page, json) = (place("report.html"), place("report.json"));
    let json_flag = format!("--json={}", json.display());
    let arguments = [
        "simulate",
        TINY,
        "--load",
        "0.2,0.6",
        "--seeds",
        "2",
        "--policy",
        "vmferry,qemu,post-copy",
        "--html",
        page.to_str().unwrap(),
        &json_flag,
    ];
    let output = vmferry(&arguments);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert_eq!(out.matches("downtime limit 300 ms").count(), 2, "{out}");
    for policy in ["vmferry", "qemu", "post-copy"] {
        assert_eq!(out.lines().filter(|line| line.trim_start().starts_with(&format!("{policy} "))).count(), 2, "{out}");
    }
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!((report["done_runs"].as_u64(), report["baseline"].as_str()), (Some(12), Some("qemu")));
    let vmferry_arm = &report["cells"][0]["arms"][0];
    assert_eq!(vmferry_arm["converged_share"].as_f64(), Some(1.0));
    assert!(vmferry_arm["bytes_ratio"]["mean"].as_f64().unwrap() >= 0.99, "less than each page once");
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>") && html.contains("Remaining over time") && !html.contains("http"));
    for file in [page, json] {
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn json_without_a_file_is_all_that_is_printed() {
    let output =
        vmferry(&["simulate", "--json", TINY, "--seeds", "1", "--policy", "vmferry", "--predictor", "lru,none"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["arms"], serde_json::json!(["vmferry/lru", "vmferry/none"]));
}

#[test]
fn what_is_wrong_with_the_command_line_is_said() {
    for (arguments, expected) in [
        (&["simulate", TINY, "--policy", "kvm"][..], "post-copy"),
        (&["simulate", TINY, "--predictor", "oracle"], "oracle"),
        (&["simulate", TINY, "--load", "0"], "above 0"),
        (&["simulate", TINY, "--load", "1", "--bandwidth", "1Gbit/s"], "cannot be used with"),
        (&["simulate", TINY, "--baseline", "stop-and-copy"], "none of what is compared"),
        (&["simulate", "generate:zipf:pages=none"], "pages"),
        (&["simulate", "t.parquet", "--html", "t.parquet"], "overwritten"),
    ] {
        let output = vmferry(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(expected), "{arguments:?}: {}", text(&output.stderr));
    }
    let output = vmferry(&["simulate", "/nowhere/trace.parquet"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nowhere/trace.parquet"));
}
