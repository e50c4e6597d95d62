//! A small comparison from beginning to end. Skipped, with the reason, where namespaces or QEMU cannot be had.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lcbst_figures::table::Table;

/// Words of errors that are about where the test runs.
const NOT_HERE: [&str; 3] = ["network namespace", "virtual network interfaces", "cannot start ip"];

#[test]
fn a_guest_is_moved_by_both_and_finds_its_memory_right() {
    let tools = std::env::var_os("VMFERRY_TOOLS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"), PathBuf::from);
    let program = Path::new(env!("CARGO_BIN_EXE_vmferry-compare"));
    // The tests of that package build it; one of this package alone may find none, or an older one.
    let vmferry = program.with_file_name("vmferry");
    for needed in [&tools.join("kernel/vmlinuz"), &tools.join("initramfs.cpio"), &vmferry] {
        if !needed.exists() {
            println!("skipped: there is no {}", needed.display());
            return;
        }
    }
    let [ip, tc] = ["ip", "tc"].map(|name| {
        let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|place| Path::new(place).join(name));
        places.into_iter().find(|path| path.exists()).unwrap_or_else(|| tools.join("iproute2").join(name))
    });
    if !rustix::process::geteuid().is_root() || !ip.exists() || !tc.exists() {
        println!("skipped: it needs root, and the programs ip and tc of iproute2");
        return;
    }
    let out = std::env::temp_dir().join(format!("vmferry-compare-test-{}", std::process::id()));
    let output = Command::new(program)
        // 64 MiB of them are the test guest's.
        .args(["--guest", "hot-2k", "--link", "unshaped", "--runs", "1", "--memory", "192"])
        .args(["--mode", "vmferry", "--mode", "precopy"])
        .arg("--out")
        .arg(&out)
        .arg("--tools")
        .arg(&tools)
        .arg("--vmferry")
        .arg(&vmferry)
        .arg("--ip")
        .arg(&ip)
        .arg("--tc")
        .arg(&tc)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if NOT_HERE.iter().any(|words| errors.contains(words)) {
        println!("skipped: {errors}");
        return;
    }
    assert!(output.status.success(), "{said}\n{errors}");

    let runs = Table::read(&out.join("compare/runs.csv")).unwrap();
    let moved: Vec<(&str, &str, f64)> = runs
        .rows()
        .map(|row| {
            let wrong = row.number("wrong_pages").unwrap();
            (row.text("mode").unwrap(), row.text("outcome").unwrap(), wrong)
        })
        .collect();
    assert_eq!(moved, [("vmferry", "completed", 0.0), ("precopy", "completed", 0.0)], "{said}");
    for row in runs.rows() {
        assert_eq!(row.number("checked_pages").unwrap(), 16_384.0);
        // All that the guest wrote went over the link, and it came from there alone; half of it can be made smaller.
        assert!(row.number("wire_bytes").unwrap() > f64::from(64 << 20) / 4.0, "{said}");
        assert!(row.number("gap_ms").unwrap() > 0.0, "{said}");
    }
    let page = fs::read_to_string(out.join("COMPARE.md")).unwrap();
    assert!(page.contains("### hot-2k"), "{page}");
    fs::remove_dir_all(&out).unwrap();
}
