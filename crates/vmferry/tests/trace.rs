//! `vmferry trace`, as a user has it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn vmferry(arguments: &[&str], input: &str) -> Output {
    use std::io::Write as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmferry"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmferry starts");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("vmferry reads");
    child.wait_with_output().expect("vmferry ends")
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn info(path: &Path) -> serde_json::Value {
    let output = vmferry(&["trace", "info", "--json", path.to_str().expect("a plain path")], "");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_table_becomes_a_trace() {
    let path = file("table.parquet");
    let table = "epoch,page,count\n0,10,3\n0,20,1\n2,10,1\n";
    let output = vmferry(&["trace", "import", "-", "--memory", "1MiB", "-o", path.to_str().unwrap()], table);
    assert!(output.status.success(), "{output:?}");
    let info = info(&path);
    assert_eq!((&info["epochs"], &info["page_writes"]), (&3.into(), &5.into()), "{info}");
    assert_eq!((&info["distinct_pages"], &info["guest_pages"]), (&4.into(), &256.into()), "{info}");
}

#[test]
fn a_record_of_lackey_becomes_a_trace() {
    let path = file("lackey.parquet");
    let record =
        "==1== Lackey\nI  04000000,3\n S 1ffeff0,8\nI  04000003,3\n L 2000000,8\nI  04000006,1\n M 3000000,4\n";
    let arguments = ["trace", "import", "-", "--format", "lackey", "--instructions", "2", "-o", path.to_str().unwrap()];
    let output = vmferry(&arguments, record);
    assert!(output.status.success(), "{output:?}");
    let info = info(&path);
    assert_eq!((&info["page_writes"], &info["distinct_pages"]), (&2.into(), &2.into()), "{info}");
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let path = file("wrong.parquet");
    let output = vmferry(&["trace", "import", "-", "-o", path.to_str().unwrap()], "epoch,page\n0,1\n0,x\n");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("line 3"), "{said}");
    let output = vmferry(&["trace", "generate", "zipff", "-o", path.to_str().unwrap()], "");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no workload `zipff`"), "{output:?}");
}

#[test]
fn a_generated_trace_is_the_same_again() {
    let (first, second) = (file("first.parquet"), file("second.parquet"));
    for path in [&first, &second] {
        let spec = "zipf:pages=1024,rate=1000,duration=2s";
        let output = vmferry(&["trace", "generate", spec, "--seed", "5", "-o", path.to_str().unwrap()], "");
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
    assert_eq!(info(&first)["epochs"], 40);
}
