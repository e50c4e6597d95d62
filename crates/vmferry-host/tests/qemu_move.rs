//! Real guests moved from one QEMU to another: the device state by QEMU's own migration, RAM by copying the file while
//! the guest is paused.

mod support;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{PATIENCE, Recipe, VERSIONS, Vm, collect_stream, copy_ram, feed_stream};
use vmferry_host::qemu::{ControlError, MigrationStatus, Paused, QemuGuest, Settings, Source};
use vmferry_host::qmp::QmpClient;

/// Starts QEMU's migration and waits until the guest is paused; what QEMU sends is collected.
fn begin(source: &mut QemuGuest) -> (Paused, JoinHandle<Vec<u8>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut control = source.source();
    let started = Instant::now();
    control.start_migration(theirs.as_fd()).unwrap();
    drop(theirs);
    let stream = collect_stream(ours);
    let paused = control.wait_pre_switchover(PATIENCE).unwrap();
    println!("migrate to pre-switchover: {:?}", started.elapsed());
    (paused, stream)
}

/// Lets QEMU save the device state; the whole stream.
fn finish(source: &mut QemuGuest, stream: JoinHandle<Vec<u8>>) -> Vec<u8> {
    let started = Instant::now();
    source.source().continue_switchover().unwrap();
    source.source().wait_completed(PATIENCE).unwrap();
    let bytes = stream.join().unwrap();
    println!("continue to completed: {:?}, {} bytes in all", started.elapsed(), bytes.len());
    bytes
}

/// Lets the target load the stream.
fn load(target: &mut QemuGuest, bytes: Vec<u8>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let started = Instant::now();
    target.target().accept_migration(theirs.as_fd()).unwrap();
    drop(theirs);
    let feeder = feed_stream(ours, bytes);
    target.target().wait_loaded(PATIENCE).unwrap();
    println!("load: {:?}", started.elapsed());
    feeder.join().unwrap();
}

fn configured(vm: &mut Vm) -> (QemuGuest, Settings) {
    let mut guest = vm.connect();
    let settings = guest.source().save_settings().unwrap();
    guest.source().configure().unwrap();
    (guest, settings)
}

fn prepared(vm: &mut Vm) -> QemuGuest {
    let mut guest = vm.connect();
    guest.target().prepare().unwrap();
    guest
}

#[test]
fn a_firmware_guest_is_moved_after_two_attempts_that_were_taken_back() {
    for version in VERSIONS {
        let recipe = Recipe::new(version);
        let (mut source_vm, mut target_vm) = (recipe.start(), recipe.clone().incoming().start());
        source_vm.wait_firmware();
        let (mut source, settings) = configured(&mut source_vm);
        let mut target = prepared(&mut target_vm);
        assert!(settings.was_running);

        // Nothing to take back: nothing changes.
        source.source().cancel_and_resume(true, PATIENCE).unwrap();

        let before = Instant::now();
        let (paused, _stream) = begin(&mut source);
        let stopped_at = paused.stopped_at.unwrap();
        assert!(before <= stopped_at && stopped_at <= paused.seen_at);
        assert_eq!(source.run_state().unwrap(), "finish-migrate");
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "running", "{version}: taken back at the switch-over");

        let (_, stream) = begin(&mut source);
        finish(&mut source, stream);
        assert_eq!(source.run_state().unwrap(), "postmigrate");
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "running", "{version}: taken back after the device state was sent");

        let (_, stream) = begin(&mut source);
        copy_ram(&mut source, &mut target);
        let bytes = finish(&mut source, stream);
        assert!(bytes.len() < 2 << 20, "{version}: {} bytes: RAM was not left out", bytes.len());
        load(&mut target, bytes);
        assert_eq!(target.run_state().unwrap(), "paused", "{version}: the hand-over is ours");
        let started = Instant::now();
        let resumed_at = target.target().cont().unwrap();
        println!("cont: {:?}, the guest ran after {:?}", started.elapsed(), resumed_at - started);
        assert!(started <= resumed_at && resumed_at <= Instant::now());
        assert_eq!(target.run_state().unwrap(), "running");
        target.target().announce_self().unwrap();
        source.quit(PATIENCE).unwrap();
        source_vm.wait_end();

        // It executes: the firmware starts over.
        target.qmp().execute("system_reset").unwrap();
        target_vm.wait_firmware();
    }
}

#[test]
fn a_linux_guest_goes_on_where_it_was() {
    for version in VERSIONS {
        let recipe = Recipe::new(version).linux(192, "vmferry.memory=16MiB vmferry.hot=4MiB vmferry.rate=2000");
        let (mut source_vm, mut target_vm) = (recipe.start(), recipe.clone().incoming().start());
        source_vm.wait_line(|line| line.starts_with("vmferry-guest: ready"));
        source_vm.wait_line(|line| tick(line).is_some_and(|tick| tick >= 3));
        let (mut source, _) = configured(&mut source_vm);
        let mut target = prepared(&mut target_vm);

        let (_, stream) = begin(&mut source);
        copy_ram(&mut source, &mut target);
        let bytes = finish(&mut source, stream);
        // Saving the device state may have written guest memory.
        copy_ram(&mut source, &mut target);
        load(&mut target, bytes);
        source.quit(PATIENCE).unwrap();
        target.target().cont().unwrap();

        let first = target_vm.wait_line(|line| tick(line).is_some());
        let first = tick(&first).unwrap();
        assert!(first >= 3, "{version}: the guest did not go on but started over, at tick {first}");
        target_vm.wait_line(|line| tick(line).is_some_and(|tick| tick >= first + 5));
        target_vm.type_line("check");
        let check = target_vm.wait_line(|line| line.contains("full-check"));
        assert!(check.ends_with("wrong=0"), "{version}: {check}");
    }
}

fn tick(line: &str) -> Option<u64> {
    line.strip_prefix("vmferry-guest: tick ")?.split(' ').next()?.parse().ok()
}

#[test]
fn a_paused_guest_stays_paused() {
    for version in VERSIONS {
        let recipe = Recipe::new(version);
        let (mut source_vm, mut target_vm) = (recipe.start(), recipe.clone().incoming().start());
        source_vm.wait_firmware();
        let mut source = source_vm.connect();
        source.qmp().execute("stop").unwrap();
        let settings = source.source().save_settings().unwrap();
        assert!(!settings.was_running);
        source.source().configure().unwrap();
        let mut target = prepared(&mut target_vm);

        let (paused, stream) = begin(&mut source);
        assert_eq!(paused.stopped_at, None);
        copy_ram(&mut source, &mut target);
        let bytes = finish(&mut source, stream);
        load(&mut target, bytes);
        assert_eq!(target.run_state().unwrap(), "paused", "{version}");
        source.source().cancel_and_resume(settings.was_running, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "postmigrate", "{version}: it must not run, not even for a moment");
    }
}

#[test]
fn a_paused_guest_whose_migration_is_taken_back_does_not_run() {
    for (version, run_state) in [("7.2", "postmigrate"), ("10.0", "paused")] {
        let mut vm = Recipe::new(version).start();
        vm.wait_firmware();
        let mut source = vm.connect();
        source.qmp().execute("stop").unwrap();
        source.source().configure().unwrap();
        let (_, _stream) = begin(&mut source);
        source.source().cancel_and_resume(false, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), run_state, "{version}");
    }
}

#[test]
fn settings_that_stand_in_the_way_are_changed_and_put_back() {
    // QEMU does not have them all at once.
    let sets: [&[&str]; 3] =
        [&["xbzrle", "auto-converge", "release-ram", "return-path"], &["multifd"], &["postcopy-ram"]];
    for version in VERSIONS {
        for set in sets {
            let mut vm = Recipe::new(version).start();
            let mut source = vm.connect();
            let on: Vec<Value> = set.iter().map(|name| json!({ "capability": name, "state": true })).collect();
            source.qmp().execute_with("migrate-set-capabilities", json!({ "capabilities": on })).unwrap();
            let parameters = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 7 });
            source.qmp().execute_with("migrate-set-parameters", parameters).unwrap();
            let before = source.source().save_settings().unwrap();
            assert_eq!((&before.parameters["downtime-limit"], before.capabilities[set[0]]), (&json!(7), true));

            source.source().configure().unwrap();
            let during = source.source().save_settings().unwrap();
            assert!(during.capabilities["x-ignore-shared"] && !during.capabilities[set[0]]);
            let (_, stream) = begin(&mut source);
            finish(&mut source, stream);
            source.source().cancel_and_resume(true, PATIENCE).unwrap();
            // As another process would, from what was written down.
            let written = serde_json::to_string(&before).unwrap();
            source.source().restore_settings(&serde_json::from_str(&written).unwrap()).unwrap();
            assert_eq!(source.source().save_settings().unwrap(), before, "{version}");
        }
    }
}

#[test]
fn a_peer_that_goes_away_leaves_a_source_that_runs_again() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        vm.wait_firmware();
        let (mut source, _) = configured(&mut vm);
        // Nobody reads, and then nobody is there: QEMU fails while it saves the device state.
        let (ours, theirs) = UnixStream::pair().unwrap();
        source.source().start_migration(theirs.as_fd()).unwrap();
        drop(theirs);
        // A socket pair takes some 200 KiB: the first pass may or may not fit.
        drop(source.source().wait_pre_switchover(Duration::from_millis(200)));
        drop(ours);
        if source.source().continue_switchover().is_ok() {
            let error = source.source().wait_completed(PATIENCE).unwrap_err();
            let failed = matches!(error, ControlError::Ended { status: MigrationStatus::Failed, .. });
            assert!(failed, "{version}: {error}");
        }
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "running", "{version}");
        let (_, stream) = begin(&mut source);
        finish(&mut source, stream);
    }
}

#[test]
fn a_migration_that_nobody_reads_is_taken_back() {
    for version in VERSIONS {
        // Video memory makes the first pass longer than a socket's buffer.
        let mut vm = Recipe::new(version).extra(&["-device", "VGA"]).start();
        vm.wait_firmware();
        let (mut source, _) = configured(&mut vm);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        source.source().start_migration(theirs.as_fd()).unwrap();
        drop(theirs);
        let stuck = source.source().wait_pre_switchover(Duration::from_millis(100));
        assert!(matches!(stuck, Err(ControlError::Timeout { .. })), "{version}: {stuck:?}");
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "running", "{version}");
    }
}

#[test]
fn a_guard_takes_the_migration_back_over_the_same_connection() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        vm.wait_firmware();
        let (mut source, settings) = configured(&mut vm);
        let inherited = source.qmp().try_clone_fd().unwrap();
        let (_, _stream) = begin(&mut source);
        // Its owner dies with a command half written.
        rustix::net::send(source.qmp(), b"{\"execute\": \"qui", rustix::net::SendFlags::empty()).unwrap();
        drop(source);

        let mut guard = QmpClient::adopt(inherited).unwrap();
        Source::new(&mut guard).cancel_and_resume(settings.was_running, PATIENCE).unwrap();
        Source::new(&mut guard).restore_settings(&settings).unwrap();
        assert_eq!(guard.execute("query-status").unwrap()["status"], "running", "{version}");
        drop(guard);
        assert_eq!(vm.connect().source().save_settings().unwrap(), settings, "{version}");
    }
}

#[test]
fn a_stream_that_is_cut_fails_the_target_and_not_the_source() {
    for version in VERSIONS {
        let recipe = Recipe::new(version);
        let (mut source_vm, mut target_vm) = (recipe.start(), recipe.clone().incoming().start());
        source_vm.wait_firmware();
        let (mut source, _) = configured(&mut source_vm);
        let mut target = prepared(&mut target_vm);
        let (_, stream) = begin(&mut source);
        let mut bytes = finish(&mut source, stream);
        // The very end is a description that QEMU can do without.
        bytes.truncate(bytes.len() / 2);

        let (ours, theirs) = UnixStream::pair().unwrap();
        target.target().accept_migration(theirs.as_fd()).unwrap();
        drop(theirs);
        let feeder = feed_stream(ours, bytes);
        let error = target.target().wait_loaded(PATIENCE).unwrap_err();
        println!("{version}: {error}");
        match version {
            "7.2" => assert!(matches!(error, ControlError::TargetDied { .. }), "{error}"),
            _ => assert!(matches!(error, ControlError::Ended { status: MigrationStatus::Failed, .. }), "{error}"),
        }
        feeder.join().unwrap();
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "running", "{version}");
    }
}

#[test]
fn steps_out_of_order_are_refused_and_change_nothing() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        vm.wait_firmware();
        let (mut guest, _) = configured(&mut vm);
        let not_waiting = guest.target().prepare();
        assert!(matches!(not_waiting, Err(ControlError::RunState { .. })), "{version}: {not_waiting:?}");
        assert_eq!(guest.run_state().unwrap(), "running", "{version}: prepare must not stop a running guest");
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(matches!(guest.target().accept_migration(ours.as_fd()), Err(ControlError::Qmp(_))));
        assert!(matches!(guest.source().continue_switchover(), Err(ControlError::Qmp(_))));
        let (pipe, _other) = std::io::pipe().unwrap();
        assert!(matches!(guest.source().start_migration(pipe.as_fd()), Err(ControlError::NotASocket)));
        assert_eq!(guest.run_state().unwrap(), "running", "{version}");
    }
}

#[test]
fn the_lock_of_a_disk_goes_with_the_guest() {
    for version in VERSIONS {
        let (directory, _remove) = support::temporary_directory();
        let disk = directory.join("disk");
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let drive = format!("file={},if=virtio,format=raw", disk.display());
        let recipe = Recipe::new(version).extra(&["-drive", &drive]);
        let (mut source_vm, mut target_vm) = (recipe.start(), recipe.clone().incoming().start());
        source_vm.wait_firmware();
        let (mut source, _) = configured(&mut source_vm);
        let mut target = prepared(&mut target_vm);
        let (_, stream) = begin(&mut source);
        copy_ram(&mut source, &mut target);
        let bytes = finish(&mut source, stream);
        load(&mut target, bytes);
        // A target that has loaded everything has not taken the disk: the source can still go on.
        source.source().cancel_and_resume(true, PATIENCE).unwrap();
        assert_eq!(source.run_state().unwrap(), "running", "{version}");

        let mut second_vm = recipe.clone().incoming().start();
        let mut second = prepared(&mut second_vm);
        drop(target_vm);
        let (_, stream) = begin(&mut source);
        copy_ram(&mut source, &mut second);
        let bytes = finish(&mut source, stream);
        load(&mut second, bytes);
        second.target().cont().unwrap();
        assert_eq!(second.run_state().unwrap(), "running", "{version}");
        // After the hand-over a source with a disk could not even by mistake run again.
        let mistake = source.source().cancel_and_resume(true, Duration::from_millis(100)).unwrap_err();
        assert!(matches!(mistake, ControlError::Timeout { .. }), "{version}: {mistake}");
        println!("{version}: {mistake}");
        assert_eq!(source.run_state().unwrap(), "postmigrate", "{version}");
    }
}

#[test]
fn the_network_is_told_at_the_hand_over_and_not_before() {
    for version in VERSIONS {
        let wire = UdpSocket::bind("127.0.0.1:0").unwrap();
        wire.set_read_timeout(Some(PATIENCE)).unwrap();
        let port = wire.local_addr().unwrap().port();
        let card = |remote: u16| {
            let backend = format!("socket,id=wire,udp=127.0.0.1:{remote},localaddr=127.0.0.1:0");
            ["-netdev".to_owned(), backend, "-device".to_owned(), "e1000,netdev=wire,romfile=".to_owned()]
        };
        let recipe = Recipe::new(version);
        let mut incoming = recipe.clone().incoming();
        let mut source = recipe;
        // The discard port: nobody listens to the source.
        source.extra.extend(card(9));
        incoming.extra.extend(card(port));
        let (mut source_vm, mut target_vm) = (source.start(), incoming.start());
        source_vm.wait_firmware();
        let (mut source, _) = configured(&mut source_vm);
        let mut target = prepared(&mut target_vm);
        let (_, stream) = begin(&mut source);
        copy_ram(&mut source, &mut target);
        let bytes = finish(&mut source, stream);
        load(&mut target, bytes);

        let mut packet = [0; 2048];
        wire.set_nonblocking(true).unwrap();
        assert!(wire.recv(&mut packet).is_err(), "{version}: announced before the hand-over");
        wire.set_nonblocking(false).unwrap();
        let wait_announcement = || {
            let mut packet = [0; 2048];
            // Reverse ARP is what QEMU announces a guest with.
            while !(wire.recv(&mut packet).unwrap() >= 14 && packet[12..14] == [0x80, 0x35]) {}
        };
        target.target().cont().unwrap();
        wait_announcement();
        target.target().announce_self().unwrap();
        for _ in 0..5 {
            wait_announcement();
        }
    }
}
