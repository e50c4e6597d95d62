//! What the end-to-end tests share: QEMUs with a second monitor for the test, `vmferry` processes, and a proxy that can
//! disturb the connection between them at any frame.
//!
//! Each test decides by events: a frame that the proxy holds, a line of the guest or of `vmferry`, the end of a process.
//! Where there is no event it asks again and again until [`PATIENCE`] is over.

#![allow(dead_code, unused_imports, unused_macros, reason = "each test program uses a part of it")]

mod ferry;
mod machine;
mod proxy;
mod report;
#[path = "../../../vmferry-host/tests/support/mod.rs"]
mod vm;

use std::time::{Duration, Instant};

use serde_json::Value;

pub(crate) use ferry::{Ferry, Finished, Nobody, PROGRAM, Receiver};
pub(crate) use machine::{Life, Machine, exactly_one_runs};
pub(crate) use proxy::{Held, Proxy, Step, Where, kind};
pub(crate) use report::report_is_complete;
pub(crate) use vm::{PATIENCE, Ram, Recipe, Remove, VERSIONS, temporary_directory, tools, unique};

/// Between two questions where no event tells.
pub(crate) const POLL: Duration = Duration::from_millis(10);

/// A guest that rewrites 8 of its 24 MiB.
pub(crate) const HOT: &str = "vmferry.memory=24MiB vmferry.hot=8MiB vmferry.rate=5000";
/// RAM of a Linux guest.
pub(crate) const LINUX_MEBIBYTES: u32 = 128;

/// A user without rights.
pub(crate) const NOBODY: u32 = 65534;

/// Asks until the answer is yes.
pub(crate) fn until(what: &str, mut question: impl FnMut() -> bool) {
    let start = Instant::now();
    while !question() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// Whether this test may do what `vmferry` needs rights for: with the right to trace any process, or where everybody may
/// trace their own, as the QEMUs here are. Without, a test can only see that it is refused.
pub(crate) fn may_trace() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    let any = u64::from_str_radix(effective, 16).unwrap() & (1 << CAP_SYS_PTRACE) != 0;
    let own = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").map_or(true, |scope| scope.trim() == "0");
    any || own
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What every test of a migration checks where it has not the rights: the refusal says what to do, and the guest is
/// untouched.
pub(crate) fn refused_without_rights() {
    let mut machine = Machine::firmware(Recipe::new("10.0"));
    let waiting = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = waiting.local_addr().unwrap().to_string();
    Ferry::migrate(&machine, &to, &[]).finish().fails_with(1, &["root"]);
    machine.is_untouched();
}

/// Ends the test with the refusal if it has not the rights for more.
macro_rules! need_rights {
    () => {
        if !$crate::support::may_trace() {
            return $crate::support::refused_without_rights();
        }
    };
}
pub(crate) use need_rights;

/// Moves the guest, which must go well, and checks everything that both sides and the guest itself say. Returns the
/// machine on which it runs now, and the reports of both sides. The source's QEMU is ended.
pub(crate) fn moves(source: Machine, target: Machine, options: &[&str]) -> (Machine, Value, Value) {
    let (source, target, sent, received) = moves_keeping_source(source, target, options);
    drop(source);
    (target, sent, received)
}

/// As [`moves`]; the source's QEMU stays.
pub(crate) fn moves_keeping_source(
    mut source: Machine,
    mut target: Machine,
    options: &[&str],
) -> (Machine, Machine, Value, Value) {
    let before = source.lives();
    let receiver = Receiver::start(&target, &["--json"]);
    let migrating = Ferry::migrate(&source, &receiver.address, &[&["--json", "--verify"], options].concat());
    let sent = migrating.finish();
    let received = receiver.ferry.finish();
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{sent}\n{received}");
    let (sent, received) = (sent.json(), received.json());
    exactly_one_runs(&mut target, Some(&mut source));
    assert_eq!(source.run_state(), "postmigrate");
    let after = target.lives();
    assert!(after.is_after(before), "the guest's counters went back: {before:?}, then {after:?}");
    assert_eq!(sent["verify"]["mismatched"], 0, "{sent:#}");
    assert_eq!(sent["verify"]["pages"], sent["pages"]["total"], "{sent:#}");
    target.has_no_userfaultfd();
    source.has_no_userfaultfd();
    target.has_its_settings();
    (source, target, sent, received)
}
