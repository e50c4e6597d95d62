//! What is found out about real QEMUs: who they are, where their RAM lies, whether they can be moved.

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use support::{PATIENCE, Ram, Recipe, VERSIONS, Vm};
use vmferry_core::pages::PAGE_BYTES;
use vmferry_host::qemu::{FileSystem, Inspection, QemuError, QemuGuest, RamAccess, Severity};
use vmferry_host::qmp::{QmpClient, QmpError};

/// The checks that found something, with how bad it is.
fn complaints(inspection: &Inspection) -> Vec<(&'static str, Severity)> {
    let findings = inspection.findings.iter().filter(|finding| finding.severity > Severity::Ok);
    findings.map(|finding| (finding.check, finding.severity)).collect()
}

fn inspect(recipe: &Recipe) -> (Vm, QemuGuest, Inspection) {
    let mut vm = recipe.start();
    let mut guest = vm.connect();
    let started = Instant::now();
    let inspection = guest.inspect().unwrap();
    println!("inspected in {:?}, {} devices", started.elapsed(), inspection.facts.devices.len());
    (vm, guest, inspection)
}

#[test]
fn a_guest_with_shared_ram_is_fit_and_its_ram_is_found() {
    for version in VERSIONS {
        let (vm, mut guest, inspection) = inspect(&Recipe::new(version));
        assert_eq!(complaints(&inspection), [], "{version}: {:#?}", inspection.findings);
        assert!(guest.machine().starts_with("pc-q35-"), "{}", guest.machine());
        assert_eq!((guest.pid(), guest.vcpus()), (vm.pid(), 2));
        let text = format!("{}.{}", guest.version().major, guest.version().minor);
        assert_eq!(text, version);

        let ram = guest.ram(RamAccess::ReadWrite).unwrap();
        assert_eq!(ram.layout.total_pages(), (64 << 20) / PAGE_BYTES);
        assert_eq!(ram.layout.blocks()[0].id, "ram");
        let mapping = &ram.blocks[0].mapping;
        assert_eq!(mapping.file_system, FileSystem::Tmpfs);
        assert_eq!(mapping.path, vm.ram_file.to_str().unwrap());
        assert_eq!(mapping.inode, std::fs::metadata(&vm.ram_file).unwrap().ino());
        // The same bytes through the file and through the address in QEMU.
        let (file, memory) = (File::from(ram.blocks[0].file.try_clone().unwrap()), process_memory(vm.pid()));
        file.write_all_at(b"vmferry was here", mapping.file_offset + 0x40_0000).unwrap();
        let mut seen = [0_u8; 16];
        memory.read_exact_at(&mut seen, mapping.address + 0x40_0000).unwrap();
        assert_eq!(&seen, b"vmferry was here");
    }
}

fn process_memory(pid: u32) -> File {
    File::open(format!("/proc/{pid}/mem")).unwrap()
}

#[test]
fn ram_without_a_name_is_found_too() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        let mut guest = vm.connect();
        std::fs::remove_file(&vm.ram_file).unwrap();
        // Another file under the old name must not be taken for it.
        std::fs::write(&vm.ram_file, vec![0; 4096]).unwrap();
        let ram = guest.ram(RamAccess::ReadWrite).unwrap();
        let mapping = &ram.blocks[0].mapping;
        assert!(mapping.unlinked);
        assert_eq!(File::from(ram.blocks[0].file.try_clone().unwrap()).metadata().unwrap().ino(), mapping.inode);
        assert_eq!(complaints(&guest.inspect().unwrap()), [], "{version}");
    }
}

#[test]
fn all_blocks_of_a_numa_guest_are_found() {
    for version in VERSIONS {
        let (_vm, mut guest, inspection) = inspect(&Recipe::new(version).ram(Ram::Numa));
        assert_eq!(complaints(&inspection), [], "{version}: {:#?}", inspection.findings);
        let ram = guest.ram(RamAccess::Read).unwrap();
        let blocks: Vec<_> = ram.layout.blocks().iter().map(|block| (block.id.as_str(), block.bytes >> 20)).collect();
        assert_eq!(blocks, [("dimm-ram", 128), ("node0", 64), ("node1", 64)], "{version}");
        assert!(ram.blocks[0].mapping.unlinked && !ram.blocks[1].mapping.unlinked);
        let inodes: Vec<_> = ram.blocks.iter().map(|block| block.mapping.inode).collect();
        assert!(inodes[0] != inodes[1] && inodes[1] != inodes[2]);
    }
}

#[test]
fn ram_that_cannot_be_moved_is_told() {
    for version in VERSIONS {
        for ram in [Ram::Private, Ram::Anonymous, Ram::Disk] {
            let (_vm, mut guest, inspection) = inspect(&Recipe::new(version).ram(ram));
            assert_eq!(complaints(&inspection), [("ram", Severity::Unfit)], "{version} {ram:?}");
            assert!(!inspection.can_be_moved());
            if ram != Ram::Disk {
                assert!(matches!(guest.ram(RamAccess::Read), Err(QemuError::RamNotShared { .. })));
            }
        }
    }
}

#[test]
fn a_memfd_is_fit_on_7_2_only() {
    let (_vm, mut guest, inspection) = inspect(&Recipe::new("7.2").ram(Ram::Memfd));
    assert_eq!(complaints(&inspection), [], "{:#?}", inspection.findings);
    assert_eq!(guest.ram(RamAccess::ReadWrite).unwrap().blocks[0].mapping.file_system, FileSystem::Tmpfs);
    let (_vm, _guest, inspection) = inspect(&Recipe::new("10.0").ram(Ram::Memfd));
    assert_eq!(complaints(&inspection), [("ram", Severity::Unfit)]);
}

#[test]
fn devices_of_other_processes_are_told() {
    for version in VERSIONS {
        let shared = "memory-backend-file,id=shared,size=1M,mem-path=/dev/shm,share=on";
        let recipe = Recipe::new(version).extra(&[
            "-object",
            shared,
            "-device",
            "ivshmem-plain,memdev=shared",
            "-device",
            "virtio-balloon-pci,free-page-reporting=on",
            "-device",
            "VGA,vgamem_mb=128",
        ]);
        let (_vm, _guest, inspection) = inspect(&recipe);
        let complaints = complaints(&inspection);
        for expected in [("device", Severity::Unfit), ("balloon", Severity::Warning), ("device-ram", Severity::Warning)]
        {
            assert!(complaints.contains(&expected), "{version}: {complaints:?}");
        }
    }
}

#[test]
fn a_guest_that_is_paused_or_waits_is_unfit() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        let mut guest = vm.connect();
        guest.qmp().execute("stop").unwrap();
        assert_eq!(guest.run_state().unwrap(), "paused");
        assert_eq!(complaints(&guest.inspect().unwrap()), [("run-state", Severity::Unfit)]);

        let (_vm, _guest, waiting) = inspect(&Recipe::new(version).incoming());
        assert_eq!(complaints(&waiting), [("run-state", Severity::Unfit)]);
        let (_vm, _guest, not_started) = inspect(&Recipe::new(version).extra(&["-S"]));
        assert_eq!(complaints(&not_started), [("run-state", Severity::Unfit)]);
    }
}

#[test]
fn a_second_client_is_told_that_qmp_is_busy() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        let guest = vm.connect();
        // The first waits in the listen queue; later ones find it full.
        for _ in 0..3 {
            let second = QmpClient::connect_within(&vm.qmp, Duration::from_millis(50));
            assert!(matches!(second, Err(QmpError::Busy { .. })), "{version}: {second:?}");
        }
        drop(guest);
        vm.connect();
    }
}

#[test]
fn a_process_that_is_not_qemu_is_refused() {
    let mut vm = Recipe::new("10.0").start();
    drop(vm.connect());
    let wrong = QemuGuest::connect(&vm.qmp, Some(std::process::id()));
    assert!(matches!(wrong, Err(QemuError::WrongProcess { .. })), "{wrong:?}");
    assert_eq!(QemuGuest::connect(&vm.qmp, Some(vm.pid())).unwrap().pid(), vm.pid());
}

#[test]
fn a_socket_that_another_process_serves_leads_to_qemu_all_the_same() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        drop(vm.connect());
        // A proxy between us and QEMU.
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = UnixStream::connect(&vm.qmp).unwrap();
        for (mut from, mut to) in [(theirs.try_clone().unwrap(), qemu.try_clone().unwrap()), (qemu, theirs)] {
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        }
        let client = QmpClient::negotiate(ours.into(), PATIENCE).unwrap();
        assert_eq!(client.peer_pid(), Some(std::process::id()));
        let mut guest = QemuGuest::from_client(client, None).unwrap();
        assert_eq!(guest.pid(), vm.pid(), "{version}");
        assert_eq!(complaints(&guest.inspect().unwrap()), []);
    }
}

#[test]
fn a_socket_that_another_process_made_counts_as_qemus() {
    for version in VERSIONS {
        // As libvirt does: the listening socket is made here and handed to QEMU, which calls `listen` on it again.
        let (directory, _remove) = support::temporary_directory();
        let path = directory.join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        // A duplicate is not close-on-exec.
        let inherited = rustix::io::dup(&listener).unwrap();
        let chardev = format!("socket,id=handed,fd={},server=on,wait=off", inherited.as_raw_fd());
        let mut vm = Recipe::new(version).extra(&["-chardev", &chardev, "-mon", "chardev=handed,mode=control"]).start();
        drop(vm.connect());
        let client = QmpClient::connect(&path).unwrap();
        assert_eq!(client.peer_pid(), Some(vm.pid()), "{version}");
    }
}

#[test]
fn qemu_ends_when_asked_and_when_asked_twice() {
    for version in VERSIONS {
        let mut vm = Recipe::new(version).start();
        let mut guest = vm.connect();
        guest.quit(PATIENCE).unwrap();
        guest.quit(PATIENCE).unwrap();
        assert!(guest.run_state().is_err());
        vm.wait_end();
    }
}
