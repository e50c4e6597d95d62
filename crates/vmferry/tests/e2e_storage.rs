//! A disk that both hosts reach, under QEMU's image locks: it goes with the guest, and stays with it where that stays.
//!
//! The guest writes numbered records all the while, each of them on the disk before the next is begun, and reads them back:
//! the number of the last one says what all of the disk must hold. Locks are looked at in `/proc`, as QEMU's processes hold
//! them, and by a third QEMU that asks for the image.

mod support;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::{
    Ferry, LINUX_MEBIBYTES, Machine, Proxy, Receiver, Recipe, Remove, Step, Where, exactly_one_runs, kind, moves,
    moves_keeping_source, need_rights, temporary_directory, tools, until,
};
use vmferry_guest::{RECORD_PLACES, Record};

const GUEST: &str = "vmferry.memory=16MiB vmferry.hot=4MiB vmferry.rate=3000 vmferry.disk=/dev/vda";
const DISK_BYTES: u64 = 64 << 20;
/// Bytes of the image's file on which QEMU's processes hold locks (QEMU's `block/file-posix.c`): who writes, and who lets
/// nobody else write.
const WRITES: u64 = 101;
const LETS_NOBODY_WRITE: u64 = 201;
/// What QEMU says of an image that it may not write.
const REFUSAL: &str = "Failed to get \"write\" lock";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Qcow2,
    Raw,
}

/// An empty disk, removed when dropped.
struct Image {
    version: &'static str,
    format: Format,
    path: PathBuf,
    _remove: Remove,
}

impl Image {
    fn create(version: &'static str, format: Format) -> Self {
        let (directory, remove) = temporary_directory();
        // As `/proc` names it.
        let path = directory.canonicalize().unwrap().join("disk");
        match format {
            Format::Raw => fs::File::create(&path).unwrap().set_len(DISK_BYTES).unwrap(),
            Format::Qcow2 => {
                let mut qemu = Machine::start(Recipe::new(version));
                job(&mut qemu, &json!({ "driver": "file", "filename": path, "size": 0 }));
                qemu.execute_with("blockdev-add", json!({ "driver": "file", "node-name": "new", "filename": path }));
                job(&mut qemu, &json!({ "driver": "qcow2", "file": "new", "size": DISK_BYTES }));
            }
        }
        Self { version, format, path, _remove: remove }
    }

    /// QEMU's arguments for a guest with this disk.
    fn arguments(&self) -> [String; 6] {
        let format = match self.format {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        };
        let path = self.path.display();
        [
            "-blockdev".to_owned(),
            format!("driver=file,node-name=file,filename={path},locking=on"),
            "-blockdev".to_owned(),
            format!("driver={format},node-name=disk,file=file"),
            "-device".to_owned(),
            "virtio-blk-pci,drive=disk".to_owned(),
        ]
    }

    /// A Linux guest that writes it.
    fn recipe(&self) -> Recipe {
        let arguments = self.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Recipe::new(self.version).linux(LINUX_MEBIBYTES, GUEST).extra(&arguments)
    }

    fn boot(&self) -> Machine {
        Machine::boot(self.recipe())
    }

    fn waiting(&self) -> Machine {
        Machine::start(self.recipe().incoming())
    }

    /// Whether this QEMU has it for writing, and for itself.
    fn is_locked_by(&self, machine: &Machine) -> bool {
        let process = format!("/proc/{}", machine.pid());
        let mut bytes = Vec::new();
        for entry in fs::read_dir(format!("{process}/fd")).unwrap() {
            let entry = entry.unwrap();
            // What QEMU closes meanwhile holds nothing.
            if !fs::read_link(entry.path()).is_ok_and(|path| path == self.path) {
                continue;
            }
            let name = entry.file_name().into_string().unwrap();
            let information = fs::read_to_string(format!("{process}/fdinfo/{name}")).unwrap_or_default();
            for lock in information.lines().filter_map(|line| line.strip_prefix("lock:")) {
                let words: Vec<&str> = lock.split_ascii_whitespace().collect();
                let [.., first, last] = words[..] else { panic!("a lock without a range: {lock}") };
                let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
                bytes.extend(first..=last);
            }
        }
        let [writes, alone] = [WRITES, LETS_NOBODY_WRITE].map(|byte| bytes.contains(&byte));
        assert_eq!(writes, alone, "half of the locks: {bytes:?}");
        writes
    }

    /// Starts another QEMU that asks for the disk and ends again. The error is what it says if it does not get it.
    fn ask(&self) -> Result<(), String> {
        let qemu = tools().join(format!("qemu-{}/run", self.version));
        let machine = ["-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"];
        let mut command = Command::new(qemu);
        command.args(machine).args(self.arguments());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let words = br#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#;
        // One that does not get the disk has ended already.
        drop(child.stdin.take().unwrap().write_all(words));
        let output = child.wait_with_output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    /// Nobody but whoever has it gets it.
    fn is_refused(&self) {
        let error = self.ask().expect_err("two QEMUs have the same disk for writing");
        assert!(error.contains(REFUSAL), "{error}");
    }
}

/// Has QEMU do a job of making an image, to its end.
fn job(qemu: &mut Machine, options: &Value) {
    qemu.execute_with("blockdev-create", json!({ "job-id": "create", "options": options }));
    until("the image is made", || {
        let jobs = qemu.execute_with("query-jobs", json!({}));
        assert_eq!(jobs[0].get("error"), None, "{jobs}");
        jobs[0]["status"] == "concluded"
    });
    qemu.execute_with("job-dismiss", json!({ "id": "create" }));
}

/// The value of `name=` in a line of the guest.
fn value(line: &str, name: &str) -> u64 {
    let word = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    word.unwrap_or_else(|| panic!("no {name} in {line}")).parse().unwrap()
}

/// What a guest found on the disk when it began to write: the number of the last record.
fn found(machine: &mut Machine) -> u64 {
    let line = machine.vm.wait_line(|line| line.starts_with("vmferry-guest: disk found "));
    assert_eq!(value(&line, "wrong"), 0, "{line}");
    value(&line, "last")
}

/// All of the disk is right, and the guest goes on writing it. Returns the number of a record that is on the disk.
fn writes(machine: &mut Machine) -> u64 {
    machine.vm.type_line("check-disk");
    let check = machine.vm.wait_line(|line| line.starts_with("vmferry-guest: disk-check "));
    assert_eq!(value(&check, "wrong"), 0, "{check}");
    let checked = value(&check, "last");
    assert_eq!(value(&check, "records"), checked.min(RECORD_PLACES), "{check}");
    // All that was said before the answer has been read: what comes now is new.
    let written = |line: &str| line.starts_with("vmferry-guest: disk last=") && value(line, "last") > checked;
    let tick = machine.vm.wait_line(written);
    assert_eq!(value(&tick, "wrong"), 0, "{tick}");
    value(&tick, "last")
}

/// Ends it as its user would: what it still has in its hands is written.
fn quits(mut machine: Machine) {
    machine.execute("quit");
    machine.vm.wait_end();
}

fn the_disk_goes_with_the_guest(version: &'static str, format: Format) {
    let image = Image::create(version, format);
    let mut source = image.boot();
    assert_eq!(found(&mut source), 0);
    let target = image.waiting();
    assert!(image.is_locked_by(&source) && !image.is_locked_by(&target));
    image.is_refused();
    let before = writes(&mut source);

    let (mut source, mut target, _, _) = moves_keeping_source(source, target, &[]);
    assert!(image.is_locked_by(&target) && !image.is_locked_by(&source));
    image.is_refused();
    assert!(writes(&mut target) > before);
    // Not even a user who does not know that it was moved can run it twice.
    source.refuses("cont", REFUSAL);
    assert_eq!(source.run_state(), "postmigrate");
    // Its end leaves no trace of what it last knew.
    quits(source);
    let last = writes(&mut target);
    quits(target);

    image.ask().expect("nobody has the disk any more");
    let mut third = image.boot();
    assert!(found(&mut third) >= last, "the disk has lost records");
    writes(&mut third);
}

#[test]
fn a_qcow2_image_goes_with_the_guest_on_qemu_7_2() {
    need_rights!();
    the_disk_goes_with_the_guest("7.2", Format::Qcow2);
}

#[test]
fn a_qcow2_image_goes_with_the_guest_on_qemu_10_0() {
    need_rights!();
    the_disk_goes_with_the_guest("10.0", Format::Qcow2);
}

#[test]
fn a_raw_image_goes_with_the_guest_on_qemu_7_2() {
    need_rights!();
    the_disk_goes_with_the_guest("7.2", Format::Raw);
}

#[test]
fn a_raw_image_goes_with_the_guest_on_qemu_10_0() {
    need_rights!();
    the_disk_goes_with_the_guest("10.0", Format::Raw);
}

/// Where in the source's stream it fails, and how.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The target's `vmferry` is killed when the guest has been paused: QEMU has saved nothing yet.
    Paused,
    /// The connection is cut when the device state is on its way.
    Saving,
    /// The target's QEMU is killed when all was saved: the source's has let go of the disk.
    Saved,
    /// The source's `vmferry` is killed at the same place: its guard gives the guest back.
    Guarded,
}

fn a_failed_migration_gives_the_disk_back(version: &'static str, format: Format) {
    let image = Image::create(version, format);
    let mut source = image.boot();
    let mut before = writes(&mut source);
    for fault in [Fault::Paused, Fault::Saving, Fault::Saved, Fault::Guarded] {
        println!("{version}, {format:?}: {fault:?}");
        let place = match fault {
            Fault::Paused => Where::Frame(kind::PAUSED, 1),
            Fault::Saving => Where::Within(kind::DEVICE_STATE, 1),
            Fault::Saved | Fault::Guarded => Where::Frame(kind::LOAD, 1),
        };
        let target = image.waiting();
        let receiver = Receiver::start(&target, &[]);
        let (proxy, held) = Proxy::hold(&receiver.address, place);
        let migrating = Ferry::migrate(&source, &proxy.address, &[]);
        held.wait();
        assert!(!source.runs() && !image.is_locked_by(&target));
        match fault {
            Fault::Paused => {
                assert!(image.is_locked_by(&source));
                receiver.ferry.kill();
            }
            Fault::Saving => held.go(Step::Cut),
            Fault::Saved => {
                assert!(!image.is_locked_by(&source), "it was saved, and the source still has the disk");
                target.kill();
                held.go(Step::Forward);
            }
            Fault::Guarded => {
                assert!(!image.is_locked_by(&source), "it was saved, and the source still has the disk");
                migrating.kill();
                source.wait_running();
                until("the monitor is free", || Ferry::inspect(&source, &[]).finish().code == Some(0));
                is_given_back(&image, &mut source, &mut before);
                continue;
            }
        }
        migrating.finish().fails_with(1, &[]);
        is_given_back(&image, &mut source, &mut before);
    }
    let (mut target, ..) = moves(source, image.waiting(), &[]);
    assert!(image.is_locked_by(&target));
    assert!(writes(&mut target) > before);
}

fn is_given_back(image: &Image, source: &mut Machine, before: &mut u64) {
    source.is_untouched();
    assert!(image.is_locked_by(source), "the guest runs without the lock of its disk");
    image.is_refused();
    let after = writes(source);
    assert!(after > *before);
    *before = after;
}

#[test]
fn a_qcow2_image_is_given_back_on_qemu_7_2() {
    need_rights!();
    a_failed_migration_gives_the_disk_back("7.2", Format::Qcow2);
}

#[test]
fn a_qcow2_image_is_given_back_on_qemu_10_0() {
    need_rights!();
    a_failed_migration_gives_the_disk_back("10.0", Format::Qcow2);
}

#[test]
fn a_raw_image_is_given_back_on_qemu_7_2() {
    need_rights!();
    a_failed_migration_gives_the_disk_back("7.2", Format::Raw);
}

#[test]
fn a_raw_image_is_given_back_on_qemu_10_0() {
    need_rights!();
    a_failed_migration_gives_the_disk_back("10.0", Format::Raw);
}

/// A disk full of records that answers late, as one far away does: a file system of a third QEMU, with a limit. Ended when dropped.
struct SlowDisk {
    qemu: Machine,
    file: PathBuf,
    _remove: Remove,
}

impl SlowDisk {
    /// `Err` says why there can be none here: it needs FUSE.
    fn create(version: &'static str) -> Result<Self, String> {
        let (directory, remove) = temporary_directory();
        let [image, file] = ["image", "disk"].map(|name| directory.join(name));
        let content = fs::File::create(&image).unwrap();
        content.set_len(DISK_BYTES).unwrap();
        // What is read is to differ from what the page held before.
        for record in (1..=RECORD_PLACES).map(Record) {
            content.write_all_at(&record.content(), record.offset()).unwrap();
        }
        fs::File::create(&file).unwrap();
        let mut qemu = Machine::start(Recipe::new(version));
        qemu.execute_with("object-add", json!({ "qom-type": "throttle-group", "id": "limits" }));
        let node = json!({ "driver": "file", "filename": image });
        let node = json!({ "driver": "throttle", "node-name": "slow", "throttle-group": "limits", "file": node });
        qemu.execute_with("blockdev-add", node);
        let export = json!({ "type": "fuse", "id": "disk", "node-name": "slow", "mountpoint": file, "writable": true });
        match qemu.try_execute("block-export-add", export) {
            Ok(_) => Ok(Self { qemu, file, _remove: remove }),
            Err(error) => Err(format!("there is no FUSE here: {error}")),
        }
    }

    /// Reads per second; 0 is as many as can be.
    fn limit(&mut self, reads_per_s: u32) {
        let limits = json!({ "iops-read": reads_per_s });
        self.qemu.execute_with("qom-set", json!({ "path": "/objects/limits", "property": "limits", "value": limits }));
    }

    /// A guest that reads it past all caches, 32 requests at a time.
    fn recipe(&self, version: &'static str) -> Recipe {
        let file = self.file.display();
        // FUSE has no locks of the kind that QEMU takes.
        let file = format!("driver=file,node-name=file,filename={file},locking=off,cache.direct=on");
        let guest = format!("{GUEST} vmferry.disk_rate=10 vmferry.disk_readers=32");
        Recipe::new(version).linux(LINUX_MEBIBYTES, &guest).extra(&[
            "-blockdev",
            &file,
            "-blockdev",
            "driver=raw,node-name=disk,file=file,cache.direct=on",
            "-device",
            "virtio-blk-pci,drive=disk",
        ])
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Its end takes the file system away; what is left of one that was killed nobody can use.
        drop(self.qemu.try_execute("quit", json!({})));
        self.qemu.vm.wait_end();
    }
}

/// A direct read changes guest RAM some time after its page was marked as written, and marks nothing then. Pages sent in
/// between once arrived with what was in them before.
fn what_is_read_past_the_cache_arrives(version: &'static str) {
    let mut disk = match SlowDisk::create(version) {
        Ok(disk) => disk,
        Err(why) => {
            println!("skipped: {why}");
            return;
        }
    };
    let mut source = Machine::boot(disk.recipe(version));
    assert_eq!(found(&mut source), RECORD_PLACES);
    let target = Machine::start(disk.recipe(version).incoming());
    let before = writes(&mut source);
    disk.limit(100);
    let (mut target, ..) =
        moves(source, target, &["--bandwidth", "20MB/s", "--downtime-limit", "150ms", "--predictor", "none"]);
    disk.limit(0);
    assert!(writes(&mut target) > before);
}

#[test]
fn what_is_read_past_the_cache_arrives_on_qemu_7_2() {
    need_rights!();
    what_is_read_past_the_cache_arrives("7.2");
}

#[test]
fn what_is_read_past_the_cache_arrives_on_qemu_10_0() {
    need_rights!();
    what_is_read_past_the_cache_arrives("10.0");
}

/// At the hand-over nobody has the disk. Whoever takes it then keeps the guest from running anywhere, and both sides say so;
/// as the documentation has it, the target is ended first, and then the source goes on.
fn another_takes_the_disk_at_the_hand_over(version: &'static str, format: Format) {
    let image = Image::create(version, format);
    let mut source = image.boot();
    let before = writes(&mut source);
    let mut target = image.waiting();
    let receiver = Receiver::start(&target, &["--json"]);
    let (proxy, held) = Proxy::hold(&receiver.address, Where::Frame(kind::HAND_OVER, 1));
    let migrating = Ferry::migrate(&source, &proxy.address, &["--json"]);
    held.wait();
    assert!(!image.is_locked_by(&source) && !image.is_locked_by(&target));
    let arguments = image.arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let intruder = Machine::start(Recipe::new(version).extra(&arguments));
    assert!(image.is_locked_by(&intruder));
    held.go(Step::Forward);
    let (sent, received) = (migrating.finish(), receiver.ferry.finish());
    for finished in [&sent, &received] {
        finished.fails_with(4, &["lock"]);
        assert_eq!(finished.json()["outcome"], "in_doubt", "{finished}");
    }
    assert_eq!((source.run_state().as_str(), target.run_state().as_str()), ("postmigrate", "paused"));
    source.refuses("cont", REFUSAL);
    quits(intruder);
    quits(target);
    source.execute("cont");
    exactly_one_runs(&mut source, None);
    assert!(image.is_locked_by(&source));
    assert!(writes(&mut source) > before);
}

#[test]
fn another_takes_the_disk_at_the_hand_over_on_qemu_7_2() {
    need_rights!();
    another_takes_the_disk_at_the_hand_over("7.2", Format::Raw);
}

#[test]
fn another_takes_the_disk_at_the_hand_over_on_qemu_10_0() {
    need_rights!();
    another_takes_the_disk_at_the_hand_over("10.0", Format::Qcow2);
}
