//! Guests, targets and users that `vmferry` refuses: it says what is wrong and what to do, and changes nothing.

mod support;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::process::Signal;
use support::{
    Ferry, Finished, HOT, LINUX_MEBIBYTES, Machine, Nobody, Ram, Receiver, Recipe, exactly_one_runs, is_root, moves,
    need_rights, temporary_directory, until,
};
use vmferry_host::qmp::QmpClient;

/// A place that takes connections, so that it is the guest that is refused.
fn somewhere() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// A place where nobody waits.
fn nowhere() -> String {
    somewhere().1
}

/// Both `inspect` and `migrate` refuse the guest with these words, and it runs on as it was.
fn refuses(machine: &mut Machine, words: &[&str]) {
    let (_listener, to) = somewhere();
    let inspected = Ferry::inspect(machine, &[]).finish();
    inspected.fails_with(1, words).fails_with(1, &["UNFIT", "why:", "change:", "cannot be moved as it is"]);
    Ferry::migrate(machine, &to, &[]).finish().fails_with(1, words).fails_with(1, &["this guest cannot be moved: "]);
    machine.is_untouched();

    let json = Ferry::inspect(machine, &["--json"]).finish();
    json.fails_with(1, &[]);
    let json = json.json();
    let findings = json["findings"].as_array().unwrap();
    let unfit: Vec<_> = findings.iter().filter(|finding| finding["severity"] == "unfit").collect();
    assert!(!unfit.is_empty(), "{json:#}");
    for finding in unfit {
        for part in ["check", "what", "why", "change"] {
            assert!(finding[part].as_str().is_some_and(|text| !text.is_empty()), "no {part}: {finding:#}");
        }
    }
}

#[test]
fn ram_that_cannot_be_moved_is_refused() {
    const FILE: &str = "mem-path=/dev/shm/NAME,share=on";
    for (version, ram, words) in [
        ("7.2", Ram::Private, "not shared (share=off)"),
        ("10.0", Ram::Private, "not shared (share=off)"),
        ("10.0", Ram::Anonymous, "is anonymous memory of QEMU"),
        ("10.0", Ram::Memfd, "is a memfd"),
    ] {
        println!("{ram:?} on {version}");
        let mut machine = Machine::firmware(Recipe::new(version).ram(ram));
        refuses(&mut machine, &[words, FILE]);
    }
}

#[test]
fn ram_on_a_disk_is_refused() {
    let (directory, _remove) = temporary_directory();
    let type_of = rustix::fs::statfs(&directory).unwrap().f_type;
    let tmpfs = 0x0102_1994;
    assert_ne!(type_of, tmpfs, "{} must be on a disk for this test: set TMPDIR", directory.display());
    let mut machine = Machine::firmware(Recipe::new("10.0").ram(Ram::Disk));
    refuses(&mut machine, &["ordinary file system", "mem-path=/dev/shm/NAME,share=on"]);
}

#[test]
fn a_fit_guest_is_said_to_be_fit() {
    need_rights!();
    for version in support::VERSIONS {
        let mut machine = Machine::firmware(Recipe::new(version));
        let inspected = Ferry::inspect(&machine, &[]).finish();
        assert_eq!(inspected.code, Some(0), "{inspected}");
        assert!(inspected.out.contains("This guest can be moved."), "{inspected}");
        let inspected = Ferry::inspect(&machine, &["--json", "--pid", &machine.pid().to_string()]).finish();
        assert_eq!(inspected.code, Some(0), "{inspected}");
        let facts = &inspected.json()["facts"];
        assert_eq!(facts["pid"], machine.pid());
        assert_eq!(facts["run_state"], "running");
        machine.is_untouched();
    }
}

/// The source tells its user what differs; the target goes on waiting for the right one.
#[test]
fn a_target_that_differs_is_refused() {
    need_rights!();
    let mut guest = Machine::linux("10.0", HOT);
    let target =
        |mebibytes, extra: &[&str]| Machine::start(Recipe::new("10.0").linux(mebibytes, "").extra(extra).incoming());
    let older = ["-machine", "pc-q35-7.2,memory-backend=ram"];
    let differences = [
        (target(LINUX_MEBIBYTES * 2, &[]), "the RAM is", "268435456 bytes"),
        (target(LINUX_MEBIBYTES / 2, &[]), "the RAM is", "67108864 bytes"),
        (target(LINUX_MEBIBYTES, &older), "the machine type is", "pc-q35-7.2"),
        (target(LINUX_MEBIBYTES, &["-smp", "3"]), "the number of processors is", "3"),
    ];
    for (mut target, what, value) in differences {
        let mut receiver = Receiver::start(&target, &[]);
        let refused = Ferry::migrate(&guest, &receiver.address, &[]).finish();
        refused.fails_with(
            1,
            &["the guests differ", what, value, "start the target's VMM with the source's configuration"],
        );
        guest.is_untouched();
        receiver.ferry.wait_line(|line| line.contains("was turned away") && line.contains("still listening"));
        assert!(!receiver.ferry.has_ended());
        assert_eq!(target.run_state(), "inmigrate");
        exactly_one_runs(&mut guest, Some(&mut target));
    }
    moves(guest, Machine::waiting("10.0"), &[]);
}

#[test]
fn a_monitor_that_is_taken_or_none_is_refused() {
    let (directory, _remove) = temporary_directory();
    let human = directory.join("human");
    let argument = format!("unix:{},server=on,wait=off", human.display());
    let mut machine = Machine::firmware(Recipe::new("10.0").extra(&["-monitor", &argument]));
    let (_listener, to) = somewhere();
    let all = |path: &Path| -> [Finished; 3] {
        let path = path.to_str().unwrap();
        [
            Ferry::start(&["inspect", "--qmp", path]).finish(),
            Ferry::start(&["migrate", "--qmp", path, "--to", &to]).finish(),
            Ferry::start(&["receive", "--qmp", path, "--listen", "127.0.0.1:0"]).finish(),
        ]
    };

    let holder = QmpClient::connect(&machine.vm.qmp).unwrap();
    for finished in all(&machine.vm.qmp) {
        finished.fails_with(1, &["QMP is busy", "add a second -qmp socket"]);
    }
    drop(holder);

    for finished in all(&human) {
        finished.fails_with(1, &["does not speak QMP", "not -monitor or -serial"]);
    }
    for finished in all(&directory.join("absent")) {
        finished.fails_with(1, &["there is no QMP socket at", "-qmp unix:", "server=on,wait=off"]);
    }
    let left_over = directory.join("left-over");
    drop(UnixListener::bind(&left_over).unwrap());
    for finished in all(&left_over) {
        finished.fails_with(1, &["nobody listens on", "start the guest again"]);
    }
    let file = directory.join("file");
    std::fs::write(&file, "no socket").unwrap();
    for finished in all(&file) {
        finished.fails_with(1, &["nobody listens on", "not a stream socket"]);
    }
    machine.is_untouched();
}

#[test]
fn a_process_that_is_not_the_guests_is_refused() {
    need_rights!();
    let mut machine = Machine::firmware(Recipe::new("10.0"));
    let (_listener, to) = somewhere();
    let own = std::process::id().to_string();
    for finished in
        [Ferry::inspect(&machine, &["--pid", &own]).finish(), Ferry::migrate(&machine, &to, &["--pid", &own]).finish()]
    {
        finished.fails_with(1, &[&format!("process {own}"), "is not the QEMU behind this QMP socket", "--pid"]);
    }
    // Larger than any process id can be.
    for finished in [
        Ferry::inspect(&machine, &["--pid", "4194305"]).finish(),
        Ferry::migrate(&machine, &to, &["--pid", "4194305"]).finish(),
    ] {
        finished.fails_with(1, &["process 4194305 is not running"]);
    }
    machine.is_untouched();
}

#[test]
fn a_qemu_that_waits_for_no_guest_is_no_target_and_one_that_does_is_no_source() {
    let mut machine = Machine::firmware(Recipe::new("10.0"));
    let finished = Ferry::start(&["receive", "--qmp", &machine.qmp(), "--listen", "127.0.0.1:0"]).finish();
    finished.fails_with(1, &["the guest is `running`, not `inmigrate`", "-incoming defer"]);
    machine.is_untouched();

    let mut target = Machine::start(Recipe::new("10.0").incoming());
    let (_listener, to) = somewhere();
    for finished in [Ferry::inspect(&target, &[]).finish(), Ferry::migrate(&target, &to, &[]).finish()] {
        finished.fails_with(1, &["it is a target; name the source's socket"]);
    }
    assert_eq!(target.run_state(), "inmigrate");
    target.has_its_settings();
}

#[test]
fn addresses_that_do_not_work_are_said() {
    let mut machine = Machine::firmware(Recipe::new("10.0"));
    for (to, words) in [
        (nowhere().as_str(), "is `vmferry receive` waiting there"),
        ("127.0.0.1", "write HOST:PORT"),
        ("127.0.0.1:70000", "write HOST:PORT"),
    ] {
        Ferry::migrate(&machine, to, &[]).finish().fails_with(1, &[words]);
    }
    machine.is_untouched();

    let mut target = Machine::start(Recipe::new("10.0").incoming());
    let (listener, taken) = somewhere();
    let finished = Ferry::start(&["receive", "--qmp", &target.qmp(), "--listen", &taken]).finish();
    finished.fails_with(1, &[&format!("cannot listen on {taken}")]);
    drop(listener);
    assert_eq!(target.run_state(), "inmigrate");
    target.has_its_settings();
    drop(Receiver::start(&target, &[]));
}

#[test]
fn who_may_not_trace_is_told_what_to_do() {
    if !is_root() {
        // Another user's process: the first of all, which is root's.
        let mut machine = Machine::firmware(Recipe::new("10.0"));
        Ferry::inspect(&machine, &["--pid", "1"]).finish().fails_with(1, &["root"]);
        return machine.is_untouched();
    }
    let nobody = Nobody::new();
    let (_listener, to) = somewhere();
    let mut machine = Machine::firmware(Recipe::new("10.0"));
    let qmp = machine.qmp();
    let all = || [nobody.run(&["inspect", "--qmp", &qmp]), nobody.run(&["migrate", "--qmp", &qmp, "--to", &to])];

    std::fs::set_permissions(&qmp, PermissionsExt::from_mode(0o600)).unwrap();
    for finished in all() {
        finished.fails_with(1, &["no permission to use the QMP socket", "run as root or as the user that runs QEMU"]);
    }
    // The monitor may be used, but the process is another user's.
    std::fs::set_permissions(&qmp, PermissionsExt::from_mode(0o777)).unwrap();
    for finished in all() {
        finished.fails_with(1, &["root"]);
    }
    std::fs::set_permissions(&machine.vm.ram_file, PermissionsExt::from_mode(0o666)).unwrap();
    for finished in all() {
        finished.fails_with(1, &["root"]);
    }
    machine.is_untouched();

    // The target, too: it writes guest RAM.
    let mut target = Machine::start(Recipe::new("10.0").incoming());
    std::fs::set_permissions(target.qmp(), PermissionsExt::from_mode(0o777)).unwrap();
    let finished = nobody.run(&["receive", "--qmp", &target.qmp(), "--listen", "127.0.0.1:0"]);
    finished.fails_with(1, &["root"]);
    assert_eq!(target.run_state(), "inmigrate");
    target.has_its_settings();
}

/// The first one goes on, the second one is refused, and says who is in its way.
#[test]
fn a_guest_that_is_being_moved_is_not_moved_twice() {
    need_rights!();
    let (directory, _remove) = temporary_directory();
    let second = directory.join("second");
    let argument = format!("unix:{},server=on,wait=off", second.display());
    let recipe = Recipe::new("10.0").linux(LINUX_MEBIBYTES, HOT);
    let guest = Machine::boot(recipe.extra(&["-qmp", &argument]));
    let target = Machine::waiting("10.0");
    let receiver = Receiver::start(&target, &["--stall-timeout", "60s"]);
    let place = support::Where::Frame(support::kind::PAGES, 5);
    let (proxy, held) = support::Proxy::hold(&receiver.address, place);
    let first = Ferry::migrate(&guest, &proxy.address, &["--json", "--stall-timeout", "60s"]);
    held.wait();
    let (_listener, to) = somewhere();
    let refused = Ferry::start(&["migrate", "--qmp", second.to_str().unwrap(), "--to", &to]).finish();
    refused.fails_with(1, &["already belongs to another userfaultfd", "end the other vmferry"]);
    held.go(support::Step::Forward);
    let finished = first.finish();
    assert_eq!(finished.code, Some(0), "{finished}");
    let received = receiver.ferry.finish();
    assert_eq!(received.code, Some(0), "{received}");
    let (mut guest, mut target) = (guest, target);
    exactly_one_runs(&mut target, Some(&mut guest));
}

/// A user who leaves before anything began.
#[test]
fn signals_before_a_connection_change_nothing() {
    let mut target = Machine::start(Recipe::new("10.0").incoming());
    if !support::may_trace() {
        return support::refused_without_rights();
    }
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let receiver = Receiver::start(&target, &[]);
        receiver.ferry.signal(signal);
        receiver.ferry.finish().fails_with(130, &["cancelled", "no guest was received"]);
        assert_eq!(target.run_state(), "inmigrate");
        target.has_its_settings();
    }
    let (listener, to) = somewhere();
    let mut machine = Machine::firmware(Recipe::new("10.0"));
    let migrating = Ferry::migrate(&machine, &to, &[]);
    let (_stream, _) = listener.accept().unwrap();
    until("the guest is tracked", || machine.is_write_protected());
    migrating.signal(Signal::HUP);
    migrating.finish().fails_with(130, &["Cancelled. The guest runs on the source."]);
    machine.is_untouched();
}
