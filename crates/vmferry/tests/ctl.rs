//! `vmferry ctl` with migrations of `vmferry demo`, which needs neither QEMU nor rights. Each test has a directory of its own
//! for the control sockets.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;
use support::{Ferry, Finished, PATIENCE, PROGRAM, Remove, report_is_complete, temporary_directory, until};

/// So slow that the push takes a quarter of an hour: there is time for everything.
const SLOW: [&str; 5] = ["demo", "--json", "--memory", "64MiB", "--bandwidth=50kB/s"];
/// A guest that fits no pause of its limit.
const STORM: [&str; 9] =
    ["demo", "--json", "--memory", "16MiB", "--hot", "10MiB", "--write-rate", "0", "--bandwidth=20MB/s"];

/// A directory for control sockets, and what runs in it.
struct Harbour {
    directory: PathBuf,
    _remove: Remove,
}

impl Harbour {
    fn new() -> Self {
        let (directory, remove) = temporary_directory();
        Self { directory: directory.join("run"), _remove: remove }
    }

    fn start(&self, arguments: &[&str]) -> Ferry {
        Ferry::start_with(Path::new(PROGRAM), arguments, |command| {
            command.env("VMFERRY_RUN_DIR", &self.directory);
        })
    }

    /// A demo that is pushing.
    fn demo(&self, arguments: &[&str]) -> Ferry {
        let mut demo = self.start(arguments);
        until("the demo pushes memory", || {
            assert!(!demo.has_ended(), "the demo has ended");
            self.socket(&demo).exists() && self.show(&demo)["doing"] == "pushing memory"
        });
        demo
    }

    fn ctl(&self, arguments: &[&str]) -> Finished {
        let finished = self.start(&[&["ctl"], arguments].concat()).finish();
        finished.does_not_panic();
        finished
    }

    /// A command that must go well; what it says.
    fn done(&self, arguments: &[&str]) -> String {
        let finished = self.ctl(arguments);
        assert_eq!((finished.code, finished.err.as_str()), (Some(0), ""), "{finished}");
        finished.out
    }

    fn show(&self, ferry: &Ferry) -> Value {
        serde_json::from_str(&self.done(&["show", "--json", &ferry.pid().to_string()])).unwrap()
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.done(&["list", "--json"])).unwrap()
    }

    fn socket(&self, ferry: &Ferry) -> PathBuf {
        self.directory.join(format!("{}.sock", ferry.pid()))
    }

    fn connect(&self, ferry: &Ferry) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.socket(ferry)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    }

    fn is_empty(&self) -> bool {
        std::fs::read_dir(&self.directory).unwrap().next().is_none()
    }
}

fn say(stream: &mut BufReader<UnixStream>, line: &str) -> Value {
    stream.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    hear(stream)
}

fn hear(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

fn bytes(status: &Value) -> u64 {
    status["wire_bytes"].as_u64().unwrap()
}

/// The guest was moved, and finds its memory as it left it.
fn moved(finished: &Finished) -> Value {
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = finished.json();
    assert_eq!(report["outcome"], "completed");
    assert_eq!(report["guest"]["check"]["wrong"], 0, "{report:#}");
    report
}

/// The guest goes on at the source and is well.
fn stayed(finished: &Finished, code: i32) -> Value {
    finished.fails_with(code, &[]);
    let report = finished.json();
    let guest = &report["guest"];
    assert_eq!(guest["check"]["wrong"], 0, "{report:#}");
    assert!(guest["check"]["pages"].as_u64() > Some(0), "{report:#}");
    assert!(guest["writes_after"].as_u64() >= guest["writes_before"].as_u64(), "{report:#}");
    report
}

#[test]
fn a_cap_is_lowered_and_raised_while_it_runs() {
    let harbour = Harbour::new();
    let demo = harbour.demo(&SLOW);
    // Over the time that the process itself tells, so that a busy host does not matter.
    let rate_over = |pages: u64| {
        let (first, mut last) = (harbour.show(&demo), Value::Null);
        until("so much is sent", || {
            last = harbour.show(&demo);
            bytes(&last) - bytes(&first) >= pages * 4096
        });
        let ms = last["elapsed_ms"].as_f64().unwrap() - first["elapsed_ms"].as_f64().unwrap();
        (bytes(&last) - bytes(&first)) as f64 / ms * 1e3
    };
    let set = |rate: &str| harbour.done(&["set", &demo.pid().to_string(), "--bandwidth", rate]);
    assert!(set("2MB/s").contains("bandwidth 2.00 MB/s, downtime limit 300 ms, time limit none"));
    let fast = rate_over(500);
    set("200kB/s");
    // What was sent ahead of the higher cap is paid for first.
    rate_over(1);
    let slow = rate_over(60);
    assert!(slow < 1.5 * 200e3, "{slow} bytes/s at 200 kB/s");
    assert!(fast < 1.5 * 2e6 && fast > 2.0 * slow, "{fast} bytes/s at 2 MB/s, {slow} at 200 kB/s");
    assert!(set("none").contains("no cap"));
    report_is_there(&moved(&demo.finish()));
    assert!(harbour.is_empty(), "the socket goes with the process");
}

fn report_is_there(report: &Value) {
    assert_eq!(report["pause_cause"], "plan", "{report:#}");
    assert!(report["wire_bytes"].as_u64() > Some(40 << 20), "{report:#}");
}

#[test]
fn a_pause_stops_the_bytes_and_continue_goes_on() {
    let harbour = Harbour::new();
    let demo = harbour.demo(&[&SLOW[..], &["--verify"]].concat());
    assert!(harbour.done(&["pause"]).contains("no page is sent"));
    let paused = harbour.show(&demo);
    assert_eq!((&paused["doing"], &paused["is_held"]), (&"holding the push".into(), &true.into()), "{paused:#}");
    assert_eq!((&paused["reason"]["kind"], &paused["eta_ms"]), (&"held".into(), &Value::Null));
    // Were pages sent, they would be many more bytes than what the two sides say to each other.
    harbour.done(&["set", "--bandwidth", "none"]);
    let mut later = Value::Null;
    until("a second passes", || {
        later = harbour.show(&demo);
        later["elapsed_ms"].as_f64().unwrap() > paused["elapsed_ms"].as_f64().unwrap() + 1000.0
    });
    assert!(bytes(&later) > bytes(&paused), "the target hears of us all the while");
    assert!(bytes(&later) - bytes(&paused) < 16 * 4096, "{paused:#}\n{later:#}");
    assert!(harbour.done(&["show"]).contains("held by the user"));
    harbour.done(&["continue"]);
    let report = moved(&demo.finish());
    report_is_complete(&report);
    assert!(report["total_ms"].as_f64() > later["elapsed_ms"].as_f64(), "{report:#}");
}

#[test]
fn a_cancelled_migration_ends_and_the_guest_goes_on() {
    for paused in [false, true] {
        let harbour = Harbour::new();
        let demo = harbour.demo(&SLOW);
        if paused {
            harbour.done(&["pause"]);
        }
        let id = harbour.show(&demo)["migration_id"].as_str().unwrap().to_owned();
        assert!(harbour.done(&["cancel", &id[..6].to_uppercase()]).contains("the guest goes on at the source"));
        let report = stayed(&demo.finish(), 130);
        assert_eq!((&report["outcome"], &report["migration_id"]), (&"cancelled".into(), &id.into()));
        harbour.ctl(&["cancel"]).fails_with(1, &["no migration runs"]);
    }
}

#[test]
fn the_time_limit_is_answered_as_chosen() {
    let harbour = Harbour::new();
    let limit = ["--downtime-limit", "10ms", "--time-limit", "1s"];
    let report = stayed(&harbour.start(&[&STORM[..], &limit].concat()).finish(), 3);
    assert_eq!((&report["outcome"], &report["downtime_ms"]), (&"not_converged".into(), &0.0.into()));
    let reason = report["reason"].as_str().unwrap();
    for words in ["the time limit of 1000 ms was over", "--time-limit", "--at-time-limit switch"] {
        assert!(reason.contains(words), "{reason}");
    }
    assert!(report["total_ms"].as_f64() >= Some(1000.0), "{report:#}");

    let report = moved(&harbour.start(&[&STORM[..], &limit, &["--at-time-limit", "switch"]].concat()).finish());
    assert_eq!(report["pause_cause"], "time_limit", "{report:#}");
    assert!(report["downtime_ms"].as_f64() > Some(10.0), "{report:#}");

    // One set while it runs that is over already.
    let demo = harbour.demo(&SLOW);
    harbour.done(&["set", "--bandwidth", "none", "--time-limit", "1ms", "--at-time-limit", "switch"]);
    assert_eq!(moved(&demo.finish())["pause_cause"], "time_limit");
    let demo = harbour.demo(&SLOW);
    let set = harbour.done(&["set", "--time-limit", "30min", "--at-time-limit", "switch", "--downtime-limit", "2s"]);
    assert!(set.contains("downtime limit 2.00 s, time limit 1800.00 s, then switch"), "{set}");
    assert!(harbour.done(&["set", "--time-limit", "none"]).contains("time limit none"));
    harbour.done(&["set", "--time-limit", "1ms", "--at-time-limit", "abort"]);
    stayed(&demo.finish(), 3);
}

#[test]
fn what_runs_is_listed_shown_and_chosen() {
    let harbour = Harbour::new();
    assert_eq!(harbour.done(&["list"]), "no migration runs\n");
    assert!(harbour.list().is_empty());
    for command in [&["show"][..], &["show", "--follow"], &["pause"], &["continue"], &["cancel"]] {
        harbour.ctl(command).fails_with(1, &["no migration runs"]);
    }
    harbour.ctl(&["show", "4711"]).fails_with(1, &["no migration is called `4711`", "none runs"]);

    let (first, second) = (harbour.demo(&SLOW), harbour.demo(&SLOW));
    let listed = harbour.list();
    let mut pids: Vec<_> = listed.iter().map(|status| status["pid"].as_u64().unwrap() as u32).collect();
    pids.sort_unstable();
    let mut expected = [first.pid(), second.pid()];
    expected.sort_unstable();
    assert_eq!(pids, expected);
    let table = harbour.done(&["list"]);
    let ids: Vec<&str> = listed.iter().map(|status| status["migration_id"].as_str().unwrap()).collect();
    for words in ["PID", "MIGRATION", "ETA", "source", "demo", "pushing memory", &ids[0][..8], &ids[1][..8]] {
        assert!(table.contains(words), "nothing of `{words}`: {table}");
    }
    assert_eq!(table.lines().count(), 3, "{table}");
    harbour.ctl(&["cancel"]).fails_with(1, &["2 migrations run", ids[0], ids[1]]);
    harbour.ctl(&["cancel", "zzzz"]).fails_with(1, &["no migration is called `zzzz`", ids[0]]);
    harbour.ctl(&["cancel", &ids[0][..3]]).fails_with(1, &["at least 4 characters"]);
    assert_eq!(harbour.list().len(), 2, "nothing was cancelled");

    let status = harbour.show(&first);
    for field in ["role", "guest", "doing", "wire_bytes", "pass", "bandwidth_bytes_per_s", "limits", "reason"] {
        assert!(!status[field].is_null(), "{field}: {status:#}");
    }
    assert_eq!(status["limits"]["bandwidth_bytes_per_s"], 50_000, "{status:#}");
    assert!(status["eta_ms"].as_f64() > Some(60_000.0), "{status:#}");
    assert!(status["reason"]["text"].as_str().unwrap().starts_with("first pass"), "{status:#}");
    let text = harbour.done(&["show", &first.pid().to_string()]);
    for words in ["migration", "limits", "ETA", "why", "first pass: ", "of 16384 pages"] {
        assert!(text.contains(words), "nothing of `{words}`: {text}");
    }
}

#[test]
fn what_cannot_be_set_is_refused() {
    let harbour = Harbour::new();
    for wrong in [
        &["ctl"][..],
        &["ctl", "fly"],
        &["ctl", "set"],
        &["ctl", "set", "--bandwidth", "0"],
        &["ctl", "set", "--bandwidth", "fast"],
        &["ctl", "set", "--downtime-limit", "none"],
        &["ctl", "set", "--time-limit", "soon"],
        &["ctl", "set", "--at-time-limit", "later"],
        &["demo", "--time-limit", "none"],
        &["demo", "--at-time-limit", "later"],
    ] {
        harbour.start(wrong).finish().fails_with(2, &[]);
    }
    let demo = harbour.demo(&SLOW);
    harbour.ctl(&["set", "--time-limit", "600000min"]).fails_with(1, &["time_limit_ms must be between"]);
    assert_eq!(harbour.show(&demo)["limits"]["time_limit_ms"], Value::Null);
}

#[test]
fn it_is_followed_to_its_end() {
    let harbour = Harbour::new();
    let demo = harbour.demo(&SLOW);
    let (people, program) =
        (harbour.start(&["ctl", "show", "--follow"]), harbour.start(&["ctl", "show", "--follow", "--json"]));
    let mut watching = harbour.connect(&demo);
    assert_eq!(say(&mut watching, r#"{"request":"watch","interval_ms":100}"#)["ok"], true);
    assert_eq!(hear(&mut watching)["event"], "progress");
    harbour.done(&["set", "--bandwidth", "20MB/s"]);
    moved(&demo.finish());
    let last = std::iter::from_fn(|| Some(hear(&mut watching))).find(|answer| answer["event"] == "end").unwrap();
    assert_eq!(last["status"]["outcome"], "completed");
    let people = people.finish();
    assert_eq!(people.code, Some(0), "{people}");
    assert!(people.out.lines().last().unwrap().contains("completed"), "{people}");
    assert!(people.out.contains("first pass"), "{people}");
    let program = program.finish();
    let lines: Vec<Value> = program.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 2 && lines.last().unwrap()["outcome"] == "completed", "{program}");
}

#[test]
fn sockets_of_processes_that_ended_are_cleaned_up() {
    let harbour = Harbour::new();
    let killed = harbour.demo(&SLOW);
    let socket = harbour.socket(&killed);
    killed.kill();
    assert!(socket.exists(), "who is killed leaves it behind");
    assert!(harbour.list().is_empty() && !socket.exists());
    drop(UnixListener::bind(&socket).unwrap());
    let demo = harbour.demo(&SLOW);
    assert!(!socket.exists(), "a migration that begins cleans up too");
    demo.signal(Signal::TERM);
    stayed(&demo.finish(), 130);
    assert!(harbour.is_empty());
}

/// Whatever a client sends, and however little it listens, the migration goes on and others are served.
#[test]
fn clients_that_misbehave_disturb_nobody() {
    let harbour = Harbour::new();
    let demo = harbour.demo(&SLOW);
    let (mut one, mut other) = (harbour.connect(&demo), harbour.connect(&demo));
    for garbage in
        ["", "hello", "{}", "[1,2]", r#"{"request":"reboot"}"#, r#"{"request":"set","bandwidth_bytes_per_s":0}"#]
    {
        let answer = say(&mut one, garbage);
        assert_eq!((&answer["ok"], &answer["version"]), (&false.into(), &1.into()), "{garbage}: {answer}");
        assert!(answer["error"]["text"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
        assert_eq!(say(&mut other, r#"{"request":"show"}"#)["ok"], true);
    }
    // A line without an end.
    drop(one.get_mut().write_all(&[b'x'; 100_000]));
    assert_eq!(hear(&mut one)["error"]["kind"], "bad_request");
    drop(one.read(&mut [0; 64]));
    // One who asks and asks and never listens.
    let deaf = harbour.connect(&demo);
    deaf.get_ref().set_nonblocking(true).unwrap();
    let asking = "{\"request\":\"show\"}\n".repeat(10_000);
    let began = Instant::now();
    while began.elapsed().as_millis() < 300 && deaf.get_ref().write_all(asking.as_bytes()).is_ok() {}
    // Two who change things at once.
    std::thread::scope(|scope| {
        for (first, second) in [("pause", "continue"), ("continue", "pause")] {
            let mut client = harbour.connect(&demo);
            scope.spawn(move || {
                for _ in 0..20 {
                    for request in [first, second] {
                        assert_eq!(say(&mut client, &format!("{{\"request\":\"{request}\"}}"))["ok"], true);
                    }
                }
            });
        }
    });
    let set = r#"{"request":"set","bandwidth_bytes_per_s":null,"downtime_limit_ms":400}"#;
    assert_eq!(say(&mut other, r#"{"request":"continue"}"#)["status"]["is_held"], false);
    assert_eq!(say(&mut other, set)["status"]["limits"]["downtime_limit_ms"], 400.0);
    let report = moved(&demo.finish());
    assert_eq!(report["downtime_limit_ms"], 400.0, "{report:#}");
    drop(deaf);
}

#[test]
fn a_migration_does_not_need_its_socket() {
    let (directory, _remove) = temporary_directory();
    let file = directory.join("file");
    std::fs::write(&file, "").unwrap();
    for place in [file.join("run"), file, Path::new("/proc/none/run").to_owned(), directory.join("x".repeat(200))] {
        let demo = Ferry::start_with(Path::new(PROGRAM), &["demo", "--json", "--memory", "8MiB"], |command| {
            command.env("VMFERRY_RUN_DIR", &place);
        });
        let finished = demo.finish();
        moved(&finished);
        assert!(finished.err.contains("there is no control socket"), "{finished}");
    }
}

#[test]
fn every_command_says_how_it_is_used() {
    for command in ["list", "show", "set", "cancel", "pause", "continue"] {
        let help = Ferry::start(&["ctl", command, "--help"]).finish();
        assert!(help.code == Some(0) && help.out.contains("Example"), "{help}");
    }
}
