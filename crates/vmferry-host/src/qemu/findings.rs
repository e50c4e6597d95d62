//! Can this guest be moved? Pure functions from facts to findings: what is the matter, why, what to change.

use serde::Serialize;

use super::facts::{Backend, Facts};
use super::ram::{FileSystem, HugePages};
use crate::qmp::VersionTriple;

/// The capabilities without which the method cannot work: both came with QEMU 4.0 and earlier.
const NEEDED_CAPABILITIES: [&str; 2] = ["x-ignore-shared", "pause-before-switchover"];
/// The oldest QEMU accepted.
const OLDEST_MAJOR: u32 = 5;
/// Since this version a memfd is sent by QEMU itself, in spite of `x-ignore-shared`.
const MEMFD_SENT_SINCE: (u32, u32) = (8, 1);
/// More than a video card's usual memory: then QEMU's own stream is no longer small.
const LARGE_OTHER_RAM_BYTES: u64 = 64 << 20;

/// Block drivers by which somebody other than QEMU and the kernel writes into guest RAM.
const DISKS_OF_OTHERS: [&str; 4] = ["nvme", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"];

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, but worse than it could, or something could not be found out.
    Warning,
    /// The guest cannot be moved like this.
    Unfit,
}

/// One thing that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check: a stable word for scripts, as `ram`, `version`.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// Why it matters; empty where all is well.
    pub why: String,
    /// What the operator can change; empty where all is well.
    pub change: String,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, severity: Severity::Ok, what: what.into(), why: String::new(), change: String::new() }
    }

    /// It works, but.
    pub fn warning(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        change: impl Into<String>,
    ) -> Self {
        Self { check, severity: Severity::Warning, what: what.into(), why: why.into(), change: change.into() }
    }

    /// It does not work.
    pub fn unfit(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        change: impl Into<String>,
    ) -> Self {
        Self { check, severity: Severity::Unfit, what: what.into(), why: why.into(), change: change.into() }
    }
}

/// Facts and what follows from them. Other modules push what they find (rights to trace, the kernel's features).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// What was asked.
    pub facts: Facts,
    /// What follows.
    pub findings: Vec<Finding>,
}

impl Inspection {
    /// Judges the facts.
    pub fn new(facts: Facts) -> Self {
        let findings = check(&facts);
        Self { facts, findings }
    }

    /// Adds what was found elsewhere.
    pub fn push(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    /// The worst of all findings.
    pub fn verdict(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }

    /// Whether nothing stands against moving the guest.
    pub fn can_be_moved(&self) -> bool {
        self.verdict() < Severity::Unfit
    }
}

/// All checks.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![version(facts), run_state(facts), migration(facts)];
    findings.extend(ram(facts));
    findings.extend(other_ram(facts));
    findings.extend(devices(facts));
    findings.extend(blockers(facts));
    findings.extend(balloon(facts));
    findings
}

fn version(facts: &Facts) -> Finding {
    let VersionTriple { major, minor, micro } = facts.version;
    let what = format!("QEMU {major}.{minor}.{micro}");
    if major < OLDEST_MAJOR {
        return Finding::unfit(
            "version",
            what,
            format!("QEMU before {OLDEST_MAJOR}.0 is not tested, and lacks what the hand-over needs"),
            "update QEMU and start the guest again",
        );
    }
    let missing: Vec<&str> =
        NEEDED_CAPABILITIES.into_iter().filter(|&name| !facts.capabilities.contains_key(name)).collect();
    if !missing.is_empty() {
        return Finding::unfit(
            "version",
            format!("{what} has no migration capability {}", missing.join(" and ")),
            "RAM is moved beside QEMU's own stream, and the guest must stay paused until it has arrived",
            "use a QEMU that was built with migration, version 5.0 or later",
        );
    }
    Finding::ok("version", what)
}

fn run_state(facts: &Facts) -> Finding {
    let state = facts.run_state.as_str();
    let change = match state {
        "running" => return Finding::ok("run-state", "the guest is running"),
        // The hand-over runs the guest on the target.
        "paused" => "give `cont` first, or move the guest while it is off: a paused guest would run on the target",
        "prelaunch" => "the guest has not been started yet (-S): give `cont`, or start it on the target host instead",
        "postmigrate" => {
            "a migration from this QEMU has completed: the guest may run elsewhere. Only if it does not, give `cont` here"
        }
        "inmigrate" => "this QEMU waits for a guest to come in: it is a target; name the source's socket",
        "finish-migrate" => "a migration is at its end: wait for it, or give `migrate_cancel`",
        "suspended" => "wake the guest with `system_wakeup`",
        "io-error" => "repair the guest's storage, then give `cont`",
        "shutdown" | "internal-error" | "guest-panicked" => "the guest has ended or crashed: start it again",
        "save-vm" | "restore-vm" => "a snapshot is being made or loaded: wait for it",
        _ => "bring the guest to `running` or `paused` first",
    };
    Finding::unfit(
        "run-state",
        format!("the guest's run state is `{state}`"),
        "only a guest that runs or is paused by its operator has one well-defined state to move",
        change,
    )
}

fn migration(facts: &Facts) -> Finding {
    match facts.migration_status.as_deref() {
        None | Some("none" | "completed" | "failed" | "cancelled") => {
            Finding::ok("migration", "no migration is active")
        }
        Some(status) => Finding::unfit(
            "migration",
            format!("a migration is already active (status `{status}`)"),
            "QEMU makes one migration at a time",
            "wait for it to end, or stop it with `migrate_cancel`",
        ),
    }
}

fn ram(facts: &Facts) -> Vec<Finding> {
    if facts.backends.is_empty() {
        return vec![Finding::unfit(
            "ram",
            "the guest has no memory backend",
            "only RAM that is a shared file can be read and tracked from outside",
            change_to_file(0),
        )];
    }
    facts.backends.iter().flat_map(|backend| backend_findings(backend, facts.version)).collect()
}

fn change_to_file(bytes: u64) -> String {
    let size = match bytes {
        0 => "SIZE".to_owned(),
        bytes => format!("{}M", bytes >> 20),
    };
    format!(
        "start the guest with -object memory-backend-file,id=ram,size={size},mem-path=/dev/shm/NAME,share=on \
         -machine memory-backend=ram (libvirt: <memoryBacking><source type='file'/><access mode='shared'/>, with \
         memory_backing_dir on /dev/shm)"
    )
}

fn backend_findings(backend: &Backend, version: VersionTriple) -> Vec<Finding> {
    let Backend { id, kind, bytes, share, .. } = backend;
    let unfit = |what: String, why: &str| vec![Finding::unfit("ram", what, why, change_to_file(*bytes))];
    match kind.as_str() {
        "memory-backend-file" => {}
        "memory-backend-memfd" if (version.major, version.minor) >= MEMFD_SENT_SINCE => {
            return unfit(
                format!("RAM `{id}` is a memfd"),
                "QEMU 8.1 and later sends a memfd in its own stream, while the guest is paused, in spite of x-ignore-shared",
            );
        }
        "memory-backend-memfd" => {}
        "memory-backend-ram" => {
            return unfit(
                format!("RAM `{id}` is anonymous memory of QEMU ({} MiB)", bytes >> 20),
                "only RAM that is a shared file can be read and tracked from outside",
            );
        }
        other => {
            return unfit(
                format!("RAM `{id}` is of type `{other}`"),
                "it is not known whether its writes can be seen from outside",
            );
        }
    }
    if !share {
        return unfit(
            format!("RAM `{id}` is not shared (share=off)"),
            "the guest's writes go to private copies of the file's pages, where nobody but QEMU sees them",
        );
    }
    let Some(mapping) = &backend.mapping else {
        let problem = backend.mapping_problem.as_deref().unwrap_or("no reason is known");
        return vec![Finding::unfit(
            "ram",
            format!("RAM `{id}` was not found in QEMU's process: {problem}"),
            "its pages are read through the file behind it",
            "run as root on QEMU's host, outside any container; name QEMU's process with --pid",
        )];
    };
    if let FileSystem::Other(magic) = mapping.file_system {
        return unfit(
            format!("RAM `{id}` is {} on an ordinary file system (type {magic:#x})", mapping.path),
            "not every kernel tracks writes to the pages of a file on disk, and writing them back slows the guest down",
        );
    }
    let mut findings = vec![Finding::ok("ram", format!("RAM `{id}`: {} MiB shared, {}", bytes >> 20, mapping.path))];
    if let HugePages::Possible(setting) = &mapping.huge_pages {
        findings.push(Finding::warning(
            "huge-pages",
            format!("RAM `{id}` may lie in transparent huge pages: {setting}"),
            "writes are tracked per small page, so huge ones are split for the time of the move: the guest may be slower",
            "nothing, if that is acceptable; else mount the tmpfs with huge=never",
        ));
    }
    findings
}

fn other_ram(facts: &Facts) -> Vec<Finding> {
    if !facts.ram_blocks_known {
        return vec![Finding::warning(
            "device-ram",
            "this QEMU does not tell its RAM blocks (`info ramblock`)",
            "large memory of a device would be sent by QEMU itself and lengthen the pause",
            "check by hand that no device has large memory of its own",
        )];
    }
    let large = facts.other_ram.iter().filter(|block| block.bytes > LARGE_OTHER_RAM_BYTES);
    large
        .map(|block| {
            Finding::warning(
                "device-ram",
                format!("{} has {} MiB of memory of its own", block.name, block.bytes >> 20),
                "QEMU sends it with the device state; what changes in it is sent while the guest is paused",
                "give the device less memory (vgamem_mb, ram_size_mb …)",
            )
        })
        .collect()
}

/// Why a device of this type keeps its guest from being moved.
fn unfit_device(kind: &str) -> Option<(&'static str, &'static str)> {
    const TABLE: [(&str, &str, &str); 12] = [
        (
            "vfio-",
            "the hardware writes guest RAM past every page table, so its writes cannot be seen",
            "unplug the device (device_del) for the move, or use a virtio device",
        ),
        (
            "vhost-user-fs",
            "virtiofsd, a process of its own, writes guest RAM, and its writes are not seen in QEMU's page tables",
            "unmount it in the guest and unplug it (device_del) for the move",
        ),
        (
            "vhost-user-",
            "its back end, a process of its own, writes guest RAM, and its writes are not seen in QEMU's page tables",
            "unplug it (device_del) for the move, or use the device that QEMU or the kernel (vhost) serves",
        ),
        (
            "vhost-vdpa-",
            "the hardware writes guest RAM past every page table, so its writes cannot be seen",
            "unplug the device (device_del) for the move, or use a virtio device",
        ),
        (
            "pvrdma",
            "the adapter writes guest RAM past QEMU's page tables, so its writes cannot be seen",
            "unplug the device (device_del) for the move",
        ),
        ("virtio-mem", "guest RAM that grows and shrinks is not supported yet", "start the guest without it"),
        ("virtio-pmem", "memory behind a persistent-memory device is not supported yet", "start the guest without it"),
        ("nvdimm", "memory behind a persistent-memory device is not supported yet", "start the guest without it"),
        ("cxl-", "memory behind CXL is not supported yet", "start the guest without it"),
        (
            "ivshmem",
            "other processes write the memory it shares, and their writes are not seen in QEMU's page tables",
            "unplug the device (device_del) for the move",
        ),
        (
            "x-pci-proxy-dev",
            "its process writes guest RAM, and its writes are not seen in QEMU's page tables",
            "start the guest without it",
        ),
        ("sgx-", "memory encrypted by the processor cannot be read from outside", "start the guest without it"),
    ];
    TABLE.into_iter().find(|(prefix, ..)| kind.starts_with(prefix)).map(|(_, why, change)| (why, change))
}

fn devices(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for device in &facts.devices {
        // `virtio-pci-bus` and the like are named after their device, which is in the list itself.
        if device.kind.ends_with("-bus") {
            continue;
        }
        // The part of a device inside its PCI shell is the same device.
        let inner = device.path.ends_with("/virtio-backend");
        if let Some((why, change)) = unfit_device(&device.kind)
            && !inner
        {
            findings.push(Finding::unfit("device", format!("{} is a {}", device.path, device.kind), why, change));
        }
    }
    for backend in facts.network_backends.iter().filter(|kind| kind.starts_with("vhost-")) {
        findings.push(Finding::unfit(
            "device",
            format!("a network card has a {backend} back end"),
            "its back end writes guest RAM, and its writes are not seen in QEMU's page tables",
            "unplug the card (device_del) for the move, or use a tap back end (vhost=on is fine)",
        ));
    }
    for driver in facts.disk_drivers.iter().filter(|&driver| DISKS_OF_OTHERS.contains(&driver.as_str())) {
        findings.push(Finding::unfit(
            "device",
            format!("a disk is read by block driver {driver}"),
            "its device, or another process, writes guest RAM, and these writes are not seen in QEMU's page tables",
            "give the guest that disk by a host device or a file for the move",
        ));
    }
    for object in &facts.objects {
        let (why, change) = match object.kind.as_str() {
            "sev-guest" | "sev-snp-guest" | "tdx-guest" => (
                "the guest's memory is encrypted by the processor and cannot be read from outside",
                "start the guest without memory encryption",
            ),
            "cryptodev-vhost-user" | "x-remote-object" | "x-vfio-user-server" => (
                "a process of its own writes guest RAM, and its writes are not seen in QEMU's page tables",
                "start the guest without it",
            ),
            _ => continue,
        };
        findings.push(Finding::unfit("device", format!("{} is a {}", object.path, object.kind), why, change));
    }
    if facts.devices_incomplete {
        findings.push(Finding::warning(
            "device",
            "the guest has more objects than are looked at",
            "a device that cannot be moved may have been missed",
            "check by hand that no device is a vfio, vhost-user, virtio-mem or ivshmem device",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("device", "no device writes guest RAM from outside QEMU"));
    }
    findings
}

fn blockers(facts: &Facts) -> Vec<Finding> {
    let finding = |reason: &String| {
        Finding::unfit(
            "blocked",
            format!("QEMU refuses to migrate: {reason}"),
            "the device state travels by QEMU's own migration",
            "remove what QEMU names",
        )
    };
    facts.blocked_reasons.iter().map(finding).collect()
}

fn balloon(facts: &Facts) -> Vec<Finding> {
    let finding = |path: &String| {
        Finding::warning(
            "balloon",
            format!("{path} reports free pages"),
            "QEMU punches holes into RAM while it is copied; pages the guest gave back are sent as zeroes, and tracking \
             sees more changes",
            "set free-page-reporting=off on the balloon if moves take long",
        )
    };
    facts.free_page_reporting.iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::super::facts::{Device, OtherRam};
    use super::super::ram::Mapping;
    use super::*;

    fn mapping() -> Mapping {
        Mapping {
            address: 0x7f00_0000_0000,
            file_offset: 0,
            bytes: 64 << 20,
            path: "/dev/shm/x".into(),
            unlinked: false,
            device: (0, 27),
            inode: 7,
            file_system: FileSystem::Tmpfs,
            page_bytes: 4096,
            huge_pages: HugePages::Never,
        }
    }

    /// A guest with nothing wrong.
    fn fit() -> Facts {
        Facts {
            version: VersionTriple { major: 7, minor: 2, micro: 22 },
            package: String::new(),
            pid: 7,
            machine: "pc-q35-7.2-machine".into(),
            name: None,
            vcpus: 2,
            run_state: "running".into(),
            migration_status: None,
            blocked_reasons: vec![],
            capabilities: NEEDED_CAPABILITIES.into_iter().map(|name| (name.to_owned(), false)).collect(),
            backends: vec![Backend {
                id: "ram".into(),
                kind: "memory-backend-file".into(),
                bytes: 64 << 20,
                share: true,
                mem_path: Some("/dev/shm/x".into()),
                mapping: Some(mapping()),
                mapping_problem: None,
            }],
            other_ram: vec![OtherRam { name: "vga.vram".into(), bytes: 16 << 20 }],
            ram_blocks_known: true,
            devices: vec![Device { path: "/machine/peripheral/n".into(), kind: "virtio-net-pci".into() }],
            devices_incomplete: false,
            objects: vec![Device { path: "/objects/ram".into(), kind: "memory-backend-file".into() }],
            network_backends: vec!["tap".into()],
            disk_drivers: vec!["file".into(), "qcow2".into()],
            disks_are_read_directly: false,
            free_page_reporting: vec![],
        }
    }

    /// The findings that are not `Ok`, as (check, severity).
    fn complaints(change: impl FnOnce(&mut Facts)) -> Vec<(&'static str, Severity)> {
        let mut facts = fit();
        change(&mut facts);
        let complaints: Vec<Finding> =
            check(&facts).into_iter().filter(|finding| finding.severity > Severity::Ok).collect();
        for finding in &complaints {
            assert!(![&finding.what, &finding.why, &finding.change].iter().any(|text| text.is_empty()), "{finding:?}");
        }
        complaints.into_iter().map(|finding| (finding.check, finding.severity)).collect()
    }

    const UNFIT_RAM: [(&str, Severity); 1] = [("ram", Severity::Unfit)];

    #[test]
    fn a_fit_guest_has_only_good_findings() {
        assert_eq!(complaints(|_| {}), []);
        let mut inspection = Inspection::new(fit());
        assert!(inspection.can_be_moved());
        inspection.push(Finding::unfit("rights", "no", "ptrace", "root"));
        assert_eq!(inspection.verdict(), Severity::Unfit);
        assert!(!inspection.can_be_moved());
    }

    #[test]
    fn old_versions_and_missing_capabilities_are_unfit() {
        assert_eq!(complaints(|facts| facts.version.major = 4), [("version", Severity::Unfit)]);
        assert_eq!(complaints(|facts| facts.capabilities.clear()), [("version", Severity::Unfit)]);
    }

    #[test]
    fn ram_must_be_a_shared_file_in_memory() {
        assert_eq!(complaints(|facts| facts.backends.clear()), UNFIT_RAM);
        assert_eq!(complaints(|facts| facts.backends[0].share = false), UNFIT_RAM);
        assert_eq!(complaints(|facts| facts.backends[0].kind = "memory-backend-ram".into()), UNFIT_RAM);
        assert_eq!(complaints(|facts| facts.backends[0].kind = "memory-backend-epc".into()), UNFIT_RAM);
        assert_eq!(complaints(|facts| facts.backends[0].mapping = None), UNFIT_RAM);
        let on_disk = |facts: &mut Facts| {
            facts.backends[0].mapping = Some(Mapping { file_system: FileSystem::Other(0xef53), ..mapping() });
        };
        assert_eq!(complaints(on_disk), UNFIT_RAM);
        let hugetlbfs = |facts: &mut Facts| {
            facts.backends[0].mapping =
                Some(Mapping { file_system: FileSystem::Hugetlbfs, page_bytes: 2 << 20, ..mapping() });
        };
        assert_eq!(complaints(hugetlbfs), []);
    }

    #[test]
    fn one_bad_backend_of_two_is_enough() {
        let two = |facts: &mut Facts| {
            let second = Backend { id: "ram1".into(), share: false, ..facts.backends[0].clone() };
            facts.backends.push(second);
        };
        assert_eq!(complaints(two), UNFIT_RAM);
    }

    #[test]
    fn a_memfd_is_fit_before_qemu_8_1_only() {
        let memfd = |major, minor| {
            move |facts: &mut Facts| {
                facts.version = VersionTriple { major, minor, micro: 0 };
                facts.backends[0].kind = "memory-backend-memfd".into();
                facts.backends[0].mem_path = None;
            }
        };
        assert_eq!(complaints(memfd(7, 2)), []);
        assert_eq!(complaints(memfd(8, 0)), []);
        assert_eq!(complaints(memfd(8, 1)), UNFIT_RAM);
        assert_eq!(complaints(memfd(10, 0)), UNFIT_RAM);
    }

    #[test]
    fn possible_huge_pages_are_a_warning() {
        let huge = |facts: &mut Facts| {
            let huge_pages = HugePages::Possible("huge=always".into());
            facts.backends[0].mapping = Some(Mapping { huge_pages, ..mapping() });
        };
        assert_eq!(complaints(huge), [("huge-pages", Severity::Warning)]);
    }

    #[test]
    fn devices_whose_writes_are_not_seen_are_unfit() {
        for kind in [
            "vfio-pci",
            "vfio-pci-nohotplug",
            "vfio-user-pci",
            "vfio-ap",
            "vhost-user-fs-pci",
            "vhost-user-blk-pci",
            "vhost-vdpa-device-pci",
            "virtio-mem-pci",
            "virtio-pmem-pci",
            "nvdimm",
            "ivshmem-plain",
            "ivshmem-doorbell",
            "pvrdma",
        ] {
            let plug = |facts: &mut Facts| {
                facts.devices.push(Device { path: "/machine/peripheral/d".into(), kind: kind.into() });
            };
            assert_eq!(complaints(plug), [("device", Severity::Unfit)], "{kind}");
        }
        // In-kernel vhost writes through QEMU's memory map.
        for kind in ["vhost-scsi-pci", "vhost-vsock-pci", "virtio-blk-pci", "pc-dimm", "virtio-balloon-pci"] {
            let plug = |facts: &mut Facts| {
                facts.devices.push(Device { path: "/machine/peripheral/d".into(), kind: kind.into() });
            };
            assert_eq!(complaints(plug), [], "{kind}");
        }
    }

    #[test]
    fn a_device_and_its_inner_half_are_one_finding() {
        let plug = |facts: &mut Facts| {
            let device = |path: &str, kind: &str| Device { path: path.into(), kind: kind.into() };
            facts.devices.push(device("/machine/peripheral/d/virtio-backend", "vhost-user-fs-device"));
            facts.devices.push(device("/machine/peripheral/d/virtio-bus", "virtio-pci-bus"));
            facts.devices.push(device("/machine/peripheral/d", "vhost-user-fs-pci"));
        };
        assert_eq!(complaints(plug), [("device", Severity::Unfit)]);
    }

    #[test]
    fn back_ends_and_encrypted_guests_are_unfit() {
        assert_eq!(complaints(|facts| facts.disk_drivers.push("nvme".into())), [("device", Severity::Unfit)]);
        assert_eq!(
            complaints(|facts| facts.network_backends = vec!["vhost-user".into()]),
            [("device", Severity::Unfit)]
        );
        assert_eq!(
            complaints(|facts| facts.network_backends = vec!["vhost-vdpa".into()]),
            [("device", Severity::Unfit)]
        );
        let sev = |facts: &mut Facts| {
            facts.objects.push(Device { path: "/objects/sev0".into(), kind: "sev-snp-guest".into() });
        };
        assert_eq!(complaints(sev), [("device", Severity::Unfit)]);
    }

    #[test]
    fn only_running_guests_are_moved() {
        for state in
            ["paused", "prelaunch", "postmigrate", "inmigrate", "finish-migrate", "io-error", "suspended", "new-state"]
        {
            assert_eq!(complaints(|facts| facts.run_state = state.into()), [("run-state", Severity::Unfit)], "{state}");
        }
    }

    #[test]
    fn an_active_migration_is_unfit_and_a_past_one_is_not() {
        for status in ["setup", "active", "pre-switchover", "device", "cancelling", "postcopy-active", "new"] {
            let active = |facts: &mut Facts| facts.migration_status = Some(status.into());
            assert_eq!(complaints(active), [("migration", Severity::Unfit)], "{status}");
        }
        for status in ["none", "completed", "failed", "cancelled"] {
            assert_eq!(complaints(|facts| facts.migration_status = Some(status.into())), [], "{status}");
        }
    }

    #[test]
    fn the_rest() {
        assert_eq!(complaints(|facts| facts.blocked_reasons = vec!["no".into()]), [("blocked", Severity::Unfit)]);
        assert_eq!(complaints(|facts| facts.free_page_reporting = vec!["b".into()]), [("balloon", Severity::Warning)]);
        assert_eq!(complaints(|facts| facts.devices_incomplete = true), [("device", Severity::Warning)]);
        assert_eq!(complaints(|facts| facts.ram_blocks_known = false), [("device-ram", Severity::Warning)]);
        assert_eq!(complaints(|facts| facts.other_ram[0].bytes = 256 << 20), [("device-ram", Severity::Warning)]);
    }
}
