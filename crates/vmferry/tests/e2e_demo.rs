//! `vmferry demo` with its own guest, which needs neither QEMU nor rights, and what the command says of itself.

mod support;

use std::fs::File;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use support::{Ferry, Finished, Nobody, PROGRAM, report_is_complete, temporary_directory, until};

const PATTERNS: [&str; 5] = ["idle", "hot", "zipf", "sweep", "phases"];
const SMALL: [&str; 4] = ["demo", "--memory", "64MiB", "--json"];
/// So slow that the push takes ten seconds: there is time to disturb it.
const SLOW_PUSH: [&str; 4] = ["--memory", "64MiB", "--bandwidth", "5MB/s"];
/// So slow that the pause takes five seconds, and the user allows it.
const SLOW_PAUSE: [&str; 10] =
    ["--memory", "48MiB", "--hot", "28MiB", "--write-rate", "0", "--bandwidth", "6MB/s", "--downtime-limit", "60s"];

fn guest_is_well(report: &Value) {
    let guest = &report["guest"];
    let number =
        |path: &str| guest.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {guest:#}"));
    assert!(number("/check/pages") > 0, "{guest:#}");
    assert_eq!(number("/check/wrong"), 0, "{guest:#}");
    assert_eq!(guest["check"]["first_wrong"], Value::Null);
    assert!(number("/writes_after") >= number("/writes_before"), "{guest:#}");
}

/// The guest was moved and is well.
fn moved(finished: &Finished) -> Value {
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = finished.json();
    report_is_complete(&report);
    assert_eq!(report["vmm"], "embedded");
    guest_is_well(&report);
    report
}

#[test]
fn guests_of_all_patterns_move() {
    for pattern in PATTERNS {
        // Long enough for a sweep on a host that is busy with other tests.
        let options = ["--verify", "--pattern", pattern, "--downtime-limit", "2s"];
        let finished = Ferry::start(&[&SMALL[..], &options].concat()).finish();
        let report = moved(&finished);
        if pattern != "idle" {
            assert!(report["guest"]["writes_after"].as_u64() > Some(0), "{report:#}");
        }
    }
}

#[test]
fn guests_with_other_options_move() {
    for options in [
        ["--verify", "--predictor", "none", "--threads", "1"],
        ["--verify", "--write-rate", "0", "--threads", "4"],
        ["--verify", "--bandwidth", "none", "--seed", "7"],
        ["--verify", "--epoch", "10ms", "--observe", "0"],
    ] {
        // Long enough for a host that is busy with four writers and other tests.
        let limit = ["--downtime-limit", "2s"];
        moved(&Ferry::start(&[&SMALL[..], &limit, &options].concat()).finish());
    }
}

/// However pages are encoded, the memory is the same, and the report says how they went.
#[test]
fn guests_move_with_every_kind_of_compression() {
    let guest = ["--verify", "--incompressible", "50", "--predictor", "none", "--hot", "4MiB"];
    // The hot pages fit the pause as they are, or else only as what differs, so that they are sent again and again.
    let (long, short) = (
        ["--bandwidth", "20MB/s", "--downtime-limit", "500ms"],
        ["--bandwidth", "20MB/s", "--downtime-limit", "100ms"],
    );
    for (how, kinds) in [("auto", &["zstd", "lz4"][..]), ("off", &["raw"]), ("lz4", &["lz4"]), ("zstd", &["zstd"])] {
        let path = if how == "off" { &long } else { &short };
        let finished = Ferry::start(&[&SMALL[..], &guest, path, &["--compress", how]].concat()).finish();
        let report = moved(&finished);
        let number = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap();
        assert!(kinds.iter().any(|kind| number(&format!("/pages/{kind}")) > 0), "{how}: {report:#}");
        let ratio = report["compression"]["ratio"].as_f64().unwrap();
        assert_eq!(ratio > 1.5, how != "off", "{how}: {report:#}");
        assert_eq!(number("/pages/delta") > 0, how != "off", "{how}: {report:#}");
    }
    let options = [&SMALL[..], &guest, &long, &["--delta-cache", "0"]].concat();
    let report = moved(&Ferry::start(&options).finish());
    assert_eq!(report["pages"]["delta"], 0, "{report:#}");
}

#[test]
fn nobody_needs_no_rights() {
    let nobody = Nobody::new();
    for pattern in ["hot", "sweep"] {
        moved(&nobody.run(&[&SMALL[..], &["--verify", "--pattern", pattern]].concat()));
    }
}

#[test]
fn it_is_done_as_often_as_asked() {
    let finished = Ferry::start(&[&SMALL[..], &["--repeat", "3"]].concat()).finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    let documents = serde_json::Deserializer::from_str(&finished.out).into_iter::<Value>();
    assert_eq!(documents.map(|document| guest_is_well(&document.unwrap())).count(), 3);
    for run in ["run 1 of 3", "run 2 of 3", "run 3 of 3"] {
        assert!(finished.err.contains(run), "{finished}");
    }
}

#[test]
fn people_read_lines_where_there_is_no_terminal() {
    let finished = Ferry::start(&[&["demo", "--verify", "--write-rate", "100"], &SLOW_PUSH[..]].concat()).finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    for words in ["The guest runs on the target.", "total time", "downtime", "sent", "pages", "working set", "differ"] {
        assert!(finished.out.contains(words), "nothing of `{words}`: {finished}");
    }
    assert!(finished.out.contains(" 0 wrong"), "{finished}");
    assert!(!finished.err.contains(['\r', '\x1b']) && !finished.out.contains(['\r', '\x1b']), "{finished}");
    let progress = |line: &str| {
        let (time, rest) = line.split_once(" s: ").unwrap_or_default();
        time.parse::<f64>().is_ok() && rest.contains(": pass ") && rest.contains(" left, ") && rest.contains(" sent")
    };
    assert!(finished.err.lines().count() >= 2, "{finished}");
    assert!(finished.err.lines().all(progress), "{finished}");
}

#[test]
fn the_user_changes_their_mind() {
    for (options, doing, signal) in [
        (&SLOW_PUSH[..], "pushing memory", Signal::INT),
        (&SLOW_PUSH[..], "pushing memory", Signal::TERM),
        (&SLOW_PAUSE[..], "copying the rest", Signal::INT),
    ] {
        let demo = Ferry::start(&[&["demo", "--json"], options].concat());
        demo.wait_line(|line| line.contains(doing));
        demo.signal(signal);
        let finished = demo.finish();
        finished.fails_with(130, &[]);
        let report = finished.json();
        assert_eq!(report["outcome"], "cancelled", "{report:#}");
        assert_eq!(report["reason"], "cancelled");
        guest_is_well(&report);
        assert!(report["guest"]["writes_after"].as_u64() > Some(0), "{report:#}");
        assert_eq!(report["downtime_ms"].as_f64() > Some(0.0), doing == "copying the rest", "{report:#}");
    }
}

/// A guest that writes all the time, and a pause in which next to nothing can be sent: it says so and gives up.
#[test]
fn what_does_not_converge_is_given_up() {
    let storm = ["demo", "--memory", "16MiB", "--hot", "10MiB", "--write-rate", "0", "--json"];
    let little = ["--bandwidth", "20MB/s", "--downtime-limit", "10ms"];
    let finished = Ferry::start(&[&storm[..], &little].concat()).finish();
    finished.fails_with(3, &[]);
    let report = finished.json();
    assert_eq!(report["outcome"], "not_converged");
    let reason = report["reason"].as_str().unwrap();
    for words in ["no convergence", "the limit is 10 ms", "--downtime-limit", "more bandwidth", "slower guest"] {
        assert!(reason.contains(words), "{reason}");
    }
    assert_eq!(report["downtime_ms"], 0.0, "it was never paused: {report:#}");
    guest_is_well(&report);
}

/// Nothing that a demo starts outlives it.
#[test]
fn a_demo_that_is_killed_leaves_no_process() {
    let demo = Ferry::start(&[&["demo"], &SLOW_PUSH[..]].concat());
    demo.wait_line(|line| line.contains("pushing memory"));
    let children = processes().into_iter().filter(|process| process.parent == demo.pid()).collect::<Vec<_>>();
    assert_eq!(children.len(), 2, "the guest on both sides");
    demo.kill();
    until("the guests end", || {
        // Their numbers may be others' by now; the moment of their start tells.
        let all = processes();
        let same =
            |child: &Process| all.iter().any(|one| (one.pid, one.started) == (child.pid, child.started) && one.lives);
        !children.iter().any(same)
    });
}

struct Process {
    pid: u32,
    parent: u32,
    started: u64,
    lives: bool,
}

fn processes() -> Vec<Process> {
    let directories = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = directories.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // After the name, which may hold anything: state, parent, and as the 20th the start.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let lives = !["Z", "X"].contains(&fields[0]);
        Some(Process { pid, parent: fields[1].parse().ok()?, started: fields[19].parse().ok()?, lives })
    })
    .collect()
}

#[test]
fn a_wrong_command_line_is_told_from_a_failure() {
    let wrong: [&[&str]; 25] = [
        &[],
        &["fly"],
        &["demo", "--fly"],
        &["demo", "--memory", "5 parsecs"],
        &["demo", "--memory", "4097"],
        &["demo", "--memory", "64KiB"],
        &["demo", "--vmm", "qemu", "--memory", "128MiB"],
        &["demo", "--pattern", "random"],
        &["demo", "--bandwidth", "0"],
        &["demo", "--bandwidth", "fast"],
        &["demo", "--epoch", "0"],
        &["demo", "--stall-timeout", "0"],
        &["demo", "--downtime-limit", "soon"],
        &["demo", "--repeat", "0"],
        &["demo", "--threads", "0"],
        &["demo", "--threads", "1000"],
        &["demo", "--predictor", "oracle"],
        &["demo", "--compress", "gzip"],
        &["demo", "--delta-cache", "-1"],
        &["demo", "--incompressible", "101"],
        &["inspect"],
        &["migrate", "--qmp", "/absent"],
        &["migrate", "--qmp", "/absent", "--to", "127.0.0.1:1", "--epoch", "0"],
        &["receive", "--qmp", "/absent", "--listen", "nowhere"],
        &["receive", "--qmp", "/absent", "--listen", "127.0.0.1:0", "--stall-timeout", "0"],
    ];
    for arguments in wrong {
        let finished = Ferry::start(arguments).finish();
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.out.is_empty() && !finished.err.is_empty(), "{finished}");
        finished.does_not_panic();
    }
}

#[test]
fn the_command_describes_itself() {
    let help = Ferry::start(&["--help"]).finish();
    assert_eq!((help.code, help.err.as_str()), (Some(0), ""), "{help}");
    for words in ["demo", "inspect", "receive", "migrate", "completions", "man", "Exit codes:", "RUST_LOG"] {
        assert!(help.out.contains(words), "nothing of `{words}`: {help}");
    }
    assert!(!help.out.contains("embedded-guest") && !help.out.contains("guard"), "{help}");
    let version = Ferry::start(&["--version"]).finish();
    assert_eq!((version.code, version.out.trim()), (Some(0), concat!("vmferry ", env!("CARGO_PKG_VERSION"))));
    for command in ["demo", "inspect", "receive", "migrate", "completions", "man"] {
        let help = Ferry::start(&[command, "--help"]).finish();
        assert!(help.code == Some(0) && help.out.contains("Example"), "{help}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = Ferry::start(&["completions", shell]).finish();
        assert!(script.code == Some(0) && script.err.is_empty() && script.out.contains("downtime-limit"), "{script}");
    }

    let (directory, _remove) = temporary_directory();
    let pages = directory.join("share/man1");
    let written = Ferry::start(&["man", pages.to_str().unwrap()]).finish();
    assert_eq!(written.code, Some(0), "{written}");
    for page in ["vmferry.1", "vmferry-demo.1", "vmferry-migrate.1", "vmferry-receive.1", "vmferry-inspect.1"] {
        let text = std::fs::read_to_string(pages.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        assert!(text.contains(".TH") && text.contains("SYNOPSIS"), "{page}: {text}");
    }
    let file = directory.join("file");
    std::fs::write(&file, "").unwrap();
    Ferry::start(&["man", file.to_str().unwrap()]).finish().fails_with(1, &["cannot make"]);
}

/// A full disk behind standard output, or a reader that has gone: an error in words.
#[test]
fn output_that_cannot_be_written_is_no_panic() {
    for arguments in
        [&["demo", "--memory", "8MiB"][..], &["demo", "--memory", "8MiB", "--json"], &["completions", "bash"]]
    {
        let full = Ferry::start_with(Path::new(PROGRAM), arguments, |command| {
            command.stdout(File::options().write(true).open("/dev/full").unwrap());
        });
        full.finish().fails_with(1, &["cannot write to standard output", "No space left"]);
    }
}
