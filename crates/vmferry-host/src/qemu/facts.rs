//! Everything that is asked of a guest before it is judged. Collecting does I/O and judges nothing; judging
//! ([`super::check`]) does no I/O.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::disks::Disks;
use super::guest::QemuError;
use super::ram::{self, FileMapping, Mapping, RamAccess, Wanted};
use crate::qmp::{QmpClient, VersionTriple};

/// Nodes of QEMU's object tree that are visited; a big guest has some hundreds.
pub const MAX_QOM_NODES: usize = 4096;
/// How deep the object tree is followed.
const MAX_QOM_DEPTH: usize = 16;
/// Memory backends that are looked at.
const MAX_BACKENDS: usize = 256;
/// Kinds of objects that have no children and are no devices.
const QOM_LEAVES: [&str; 3] = ["irq", "memory-region", "qemu:memory-region"];

/// What is known about a guest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Facts {
    /// QEMU's version.
    pub version: VersionTriple,
    /// The packager's version, often empty.
    pub package: String,
    /// QEMU's process.
    pub pid: u32,
    /// The machine type with its version, as `pc-q35-7.2-machine`.
    pub machine: String,
    /// The guest's name (`-name`), if it has one.
    pub name: Option<String>,
    /// How many virtual CPUs it has.
    pub vcpus: u32,
    /// QEMU's run state: `running`, `paused`, `postmigrate` …
    pub run_state: String,
    /// The status of the present or last migration, if there was one.
    pub migration_status: Option<String>,
    /// Why QEMU itself would refuse to migrate (since QEMU 6.0).
    pub blocked_reasons: Vec<String>,
    /// Migration capabilities this QEMU knows, and whether they are on.
    pub capabilities: BTreeMap<String, bool>,
    /// The memory backends that the guest uses, sorted by id.
    pub backends: Vec<Backend>,
    /// RAM that belongs to no backend: firmware, video memory, tables. QEMU sends it with the device state.
    pub other_ram: Vec<OtherRam>,
    /// Whether QEMU told its RAM blocks; without them `other_ram` is empty and all backends count as used.
    pub ram_blocks_known: bool,
    /// The devices of the machine.
    pub devices: Vec<Device>,
    /// Whether the object tree was larger than we look at, so that `devices` is not all.
    pub devices_incomplete: bool,
    /// User-created objects (`-object`).
    pub objects: Vec<Device>,
    /// Types of network back ends in use, as `tap` and `vhost-user`.
    pub network_backends: Vec<String>,
    /// Block drivers in use, as `file` and `qcow2`.
    pub disk_drivers: Vec<String>,
    /// Whether some of the guest's disks may be read straight into guest RAM, past the page tables (`cache.direct=on`, or SCSI
    /// commands that are passed on). Such writes to guest RAM may be tracked before they happen: see
    /// [`Source::wait_for_requests`](super::Source::wait_for_requests).
    pub disks_are_read_directly: bool,
    /// Balloon devices that report free pages.
    pub free_page_reporting: Vec<String>,
}

/// A memory backend in use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Backend {
    /// Its id, which is also the name of its RAM block.
    pub id: String,
    /// Its type: `memory-backend-file`, `memory-backend-memfd`, `memory-backend-ram`.
    pub kind: String,
    /// Its size.
    pub bytes: u64,
    /// `share=on`.
    pub share: bool,
    /// `mem-path`, where the type has one.
    pub mem_path: Option<String>,
    /// Where it lies; `None` where it was not found, for the reason in `mapping_problem`.
    pub mapping: Option<Mapping>,
    /// Why there is no `mapping`.
    pub mapping_problem: Option<String>,
}

/// RAM that QEMU sends itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OtherRam {
    /// The name of the block.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// An object in QEMU's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its path.
    pub path: String,
    /// Its type.
    pub kind: String,
}

/// A memory backend before its mapping is looked for.
#[derive(Debug)]
pub(super) struct BackendBlock {
    pub(super) id: String,
    pub(super) kind: String,
    pub(super) bytes: u64,
    pub(super) share: bool,
    pub(super) mem_path: Option<String>,
    pub(super) address: Option<u64>,
}

impl BackendBlock {
    pub(super) fn locate(
        &self,
        pid: u32,
        mappings: &[FileMapping],
        access: RamAccess,
    ) -> Result<(Mapping, std::os::fd::OwnedFd), ram::RamError> {
        let wanted = Wanted {
            block: &self.id,
            bytes: self.bytes,
            address: self.address,
            mem_path: self.mem_path.as_deref(),
            file: self.mem_path.as_deref().and_then(|path| ram::stat_mem_path(pid, path)),
        };
        ram::locate(pid, mappings, &wanted, access)
    }
}

/// The backends in use and the other blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) backends: Vec<BackendBlock>,
    pub(super) other_ram: Vec<OtherRam>,
    pub(super) known: bool,
    /// All user-created objects, the backends among them.
    pub(super) objects: Vec<Device>,
}

/// What QEMU says of its RAM, and what its process maps.
#[derive(Debug)]
pub struct RamFacts {
    pub(super) blocks: Blocks,
    pub(super) mappings: Vec<FileMapping>,
}

impl RamFacts {
    pub(super) fn of(qmp: &mut QmpClient, pid: u32) -> Result<Self, QemuError> {
        Ok(Self { blocks: blocks(qmp)?, mappings: ram::read_maps(pid)? })
    }
}

/// What does not change as long as a QEMU runs, and how many processors it had at the beginning.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) version: VersionTriple,
    pub(super) package: String,
    pub(super) machine: String,
    pub(super) pid: u32,
    pub(super) vcpus: u32,
}

/// Asks for everything else.
pub(super) fn collect(qmp: &mut QmpClient, identity: &Identity, ram: &RamFacts) -> Result<Facts, QemuError> {
    let Identity { version, package, machine, pid, vcpus } = identity.clone();
    let backends = ram
        .blocks
        .backends
        .iter()
        .map(|block| {
            let located = block.locate(pid, &ram.mappings, RamAccess::Read);
            let (mapping, mapping_problem) = match located {
                Ok((mapping, _file)) => (Some(mapping), None),
                Err(error) => (None, Some(with_cause(&error))),
            };
            Backend {
                id: block.id.clone(),
                kind: block.kind.clone(),
                bytes: block.bytes,
                share: block.share,
                mem_path: block.mem_path.clone(),
                mapping,
                mapping_problem,
            }
        })
        .collect();
    let migration = qmp.execute("query-migrate")?;
    let tree = Tree::of_machine(qmp)?;
    let mut free_page_reporting = Vec::new();
    for device in tree.devices.iter().filter(|device| device.kind.starts_with("virtio-balloon")) {
        if property(qmp, &device.path, "free-page-reporting")? == Some(Value::Bool(true)) {
            free_page_reporting.push(device.path.clone());
        }
    }
    let disks = Disks::of(qmp)?;
    Ok(Facts {
        version,
        package,
        pid,
        machine,
        name: optional(qmp, "query-name")?
            .and_then(|answer| Some(answer.get("name")?.as_str()?.to_owned()))
            .filter(|name| !name.is_empty()),
        vcpus,
        run_state: run_state(qmp)?,
        migration_status: migration.get("status").and_then(Value::as_str).map(str::to_owned),
        blocked_reasons: strings(migration.get("blocked-reasons")),
        capabilities: capabilities(qmp)?,
        backends,
        other_ram: ram.blocks.other_ram.clone(),
        ram_blocks_known: ram.blocks.known,
        devices: tree.devices,
        devices_incomplete: tree.incomplete,
        objects: ram.blocks.objects.clone(),
        disk_drivers: disks.drivers,
        disks_are_read_directly: disks.are_read_directly,
        network_backends: hmp(qmp, "info network")?.map_or_else(Vec::new, |text| network_backends(&text)),
        free_page_reporting,
    })
}

/// From QEMU's greeting, where there was one on this connection.
pub(super) fn version(qmp: &mut QmpClient) -> Result<(VersionTriple, String), QemuError> {
    if let Some(version) = qmp.version() {
        return Ok((version.qemu, version.package.clone()));
    }
    let answer = qmp.execute("query-version")?;
    let version: crate::qmp::GreetingVersion =
        serde_json::from_value(answer).map_err(|error| QemuError::unexpected("query-version", &error.to_string()))?;
    Ok((version.qemu, version.package))
}

pub(super) fn machine(qmp: &mut QmpClient) -> Result<String, QemuError> {
    match property(qmp, "/machine", "type")? {
        Some(Value::String(machine)) => Ok(machine),
        Some(_) | None => Err(QemuError::unexpected("qom-get /machine type", "it is no string")),
    }
}

pub(super) fn run_state(qmp: &mut QmpClient) -> Result<String, QemuError> {
    let answer = qmp.execute("query-status")?;
    let status = answer.get("status").and_then(Value::as_str);
    Ok(status.ok_or_else(|| QemuError::unexpected("query-status", "there is no `status`"))?.to_owned())
}

/// The host's thread ids of the virtual CPUs.
pub(super) fn vcpu_threads(qmp: &mut QmpClient) -> Result<Vec<u32>, QemuError> {
    let answer = qmp.execute("query-cpus-fast")?;
    let unexpected = || QemuError::unexpected("query-cpus-fast", "a CPU has no `thread-id`");
    let thread = |cpu: &Value| u32::try_from(cpu.get("thread-id")?.as_u64()?).ok();
    answer.as_array().ok_or_else(unexpected)?.iter().map(|cpu| thread(cpu).ok_or_else(unexpected)).collect()
}

pub(super) fn capabilities(qmp: &mut QmpClient) -> Result<BTreeMap<String, bool>, QemuError> {
    let answer = qmp.execute("query-migrate-capabilities")?;
    let pair = |entry: &Value| Some((entry.get("capability")?.as_str()?.to_owned(), entry.get("state")?.as_bool()?));
    let pairs = answer.as_array().map(|entries| entries.iter().filter_map(pair).collect());
    pairs.ok_or_else(|| QemuError::unexpected("query-migrate-capabilities", "it is no list"))
}

/// Which memory backends are guest RAM. A backend that is in use has a RAM block of its id; one that is only defined
/// has a block without a name.
pub(super) fn blocks(qmp: &mut QmpClient) -> Result<Blocks, QemuError> {
    let listed = hmp(qmp, "info ramblock")?.and_then(|text| ram::parse_ram_blocks(&text));
    let memdevs = qmp.execute("query-memdev")?;
    let memdevs = memdevs.as_array().ok_or_else(|| QemuError::unexpected("query-memdev", "it is no list"))?;
    if memdevs.len() > MAX_BACKENDS {
        return Err(QemuError::unexpected("query-memdev", &format!("more than {MAX_BACKENDS} backends")));
    }
    let objects = children(qmp, "/objects")?.unwrap_or_default();
    let mut backends = Vec::new();
    for memdev in memdevs {
        // Optional since it is the QOM path's last component, which an embedded backend need not have.
        let Some(id) = memdev.get("id").and_then(Value::as_str) else { continue };
        let line = listed.as_ref().map(|lines| {
            // `x-use-canonical-path-for-ramblock-id` makes it the path.
            lines.iter().find(|line| line.name == id || line.name == format!("/objects/{id}"))
        });
        if line.is_some_and(|line| line.is_none()) {
            continue;
        }
        let line = line.flatten();
        let path = format!("/objects/{id}");
        let mem_path = match property(qmp, &path, "mem-path")? {
            Some(Value::String(path)) if !path.is_empty() => Some(path),
            Some(_) | None => None,
        };
        backends.push(BackendBlock {
            id: id.to_owned(),
            kind: objects
                .iter()
                .find(|object| object.path == path)
                .map_or_else(String::new, |object| object.kind.clone()),
            bytes: line.map(|line| line.used_bytes).or_else(|| memdev.get("size")?.as_u64()).unwrap_or(0),
            share: memdev.get("share").and_then(Value::as_bool) == Some(true)
                || property(qmp, &path, "share")? == Some(Value::Bool(true)),
            mem_path,
            address: line.and_then(|line| line.address),
        });
    }
    backends.sort_by(|one, other| one.id.cmp(&other.id));
    let known = listed.is_some();
    let other_ram = listed
        .unwrap_or_default()
        .into_iter()
        .filter(|line| {
            let id = line.name.strip_prefix("/objects/").unwrap_or(&line.name);
            !backends.iter().any(|backend| backend.id == id)
        })
        .map(|line| OtherRam { name: line.name, bytes: line.used_bytes })
        .collect();
    Ok(Blocks { backends, other_ram, known, objects })
}

/// The children of a node; `None` if there is no such node (a device may be unplugged meanwhile).
fn children(qmp: &mut QmpClient, path: &str) -> Result<Option<Vec<Device>>, QemuError> {
    let answer = match qmp.execute_with("qom-list", json!({ "path": path })) {
        Ok(answer) => answer,
        Err(crate::qmp::QmpError::Command { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let child = |entry: &Value| {
        let kind = entry.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        let path = format!("{path}/{}", entry.get("name")?.as_str()?);
        Some(Device { path, kind: kind.to_owned() })
    };
    Ok(Some(answer.as_array().map(|entries| entries.iter().filter_map(child).collect()).unwrap_or_default()))
}

/// The devices in the tree of objects, children before their parents.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tree {
    devices: Vec<Device>,
    visited: usize,
    incomplete: bool,
}

impl Tree {
    /// By one command, where it is known and its answer can be read: to ask for each node takes some dozens of answers, each
    /// of which waits for QEMU's main loop.
    fn of_machine(qmp: &mut QmpClient) -> Result<Self, QemuError> {
        if let Some(tree) = hmp(qmp, "info qom-tree")?.and_then(|text| Self::parse(&text)) {
            return Ok(tree);
        }
        let mut tree = Self::default();
        tree.walk(qmp, "/machine", 0)?;
        Ok(tree)
    }

    /// From the answer to `info qom-tree`: a line `/name (type)` for each object, two spaces further in for each level. `None`
    /// if it is anything else.
    fn parse(text: &str) -> Option<Self> {
        let mut tree = Self::default();
        // The path of the line before, by level; `None` below what is left out.
        let mut paths: Vec<Option<String>> = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let object = line.trim_start_matches(' ');
            let spaces = line.len() - object.len();
            let (name, kind) = object.strip_prefix('/')?.strip_suffix(')')?.rsplit_once(" (")?;
            if spaces % 2 != 0 || spaces / 2 > paths.len() || (spaces == 0) != (tree.visited == 0) {
                return None;
            }
            tree.visited += 1;
            paths.truncate(spaces / 2);
            let path = match paths.last() {
                None if name == "machine" => Some("/machine".to_owned()),
                None => return None,
                Some(_) if QOM_LEAVES.contains(&kind) => None,
                Some(parent) => parent.as_ref().map(|parent| format!("{parent}/{name}")),
            };
            if let Some(path) = &path
                && spaces > 0
                && kind != "container"
            {
                tree.devices.push(Device { path: path.clone(), kind: kind.to_owned() });
            }
            paths.push(path);
        }
        tree.devices.reverse();
        (tree.visited > 0).then_some(tree)
    }

    fn walk(&mut self, qmp: &mut QmpClient, path: &str, depth: usize) -> Result<(), QemuError> {
        if self.visited == MAX_QOM_NODES || depth == MAX_QOM_DEPTH {
            self.incomplete = true;
            return Ok(());
        }
        self.visited += 1;
        for child in children(qmp, path)?.unwrap_or_default() {
            if QOM_LEAVES.contains(&child.kind.as_str()) {
                continue;
            }
            self.walk(qmp, &child.path, depth + 1)?;
            if child.kind != "container" {
                self.devices.push(child);
            }
        }
        Ok(())
    }
}

/// A property of an object; `None` where the object or the property does not exist.
fn property(qmp: &mut QmpClient, path: &str, name: &str) -> Result<Option<Value>, QemuError> {
    match qmp.execute_with("qom-get", json!({ "path": path, "property": name })) {
        Ok(value) => Ok(Some(value)),
        Err(crate::qmp::QmpError::Command { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The answer to a command that an older QEMU may not know.
fn optional(qmp: &mut QmpClient, command: &str) -> Result<Option<Value>, QemuError> {
    match qmp.execute(command) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_command_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The text of a human monitor command; `None` where this QEMU has no human monitor.
fn hmp(qmp: &mut QmpClient, line: &str) -> Result<Option<String>, QemuError> {
    match qmp.execute_with("human-monitor-command", json!({ "command-line": line })) {
        Ok(Value::String(text)) => Ok(Some(text)),
        Ok(_) | Err(crate::qmp::QmpError::Command { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The types in the answer to `info network`, sorted, each once; network cards themselves (`nic`) left out.
fn network_backends(text: &str) -> Vec<String> {
    let types = text.split([',', ' ', '\n', '\r']).filter_map(|word| word.strip_prefix("type="));
    let mut types: Vec<String> = types.filter(|&kind| kind != "nic").map(str::to_owned).collect();
    types.sort();
    types.dedup();
    types
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array);
    list.map(|list| list.iter().filter_map(Value::as_str).map(str::to_owned).collect()).unwrap_or_default()
}

fn with_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_of_objects_is_read_from_its_text() {
        let text = "/machine (pc-q35-10.0-machine)\r\n  /peripheral (container)\r\n    /net0 (virtio-net-pci)\r\n      \
                    /bus master container[0] (memory-region)\r\n        /odd (thing)\r\n      /virtio-backend (virtio-net-device)\r\n  \
                    /q35 (q35-pcihost)\r\n    /a (b) c (mch)\r\n";
        let tree = Tree::parse(text).unwrap();
        let device = |path: &str, kind: &str| Device { path: path.to_owned(), kind: kind.to_owned() };
        let mut expected = vec![
            device("/machine/peripheral/net0", "virtio-net-pci"),
            device("/machine/peripheral/net0/virtio-backend", "virtio-net-device"),
            device("/machine/q35", "q35-pcihost"),
            device("/machine/q35/a (b) c", "mch"),
        ];
        expected.reverse();
        assert_eq!((tree.devices, tree.incomplete), (expected, false));
        let whole = "/machine (m)\n  /a (b)\n";
        assert!(Tree::parse(whole).is_some());
        for other in [
            "",
            "unknown command: 'info qom-tree'",
            "/objects (container)",
            "/machine (m)\n   /a (b)",
            "/machine (m)\n    /a (b)",
            "/machine (m)\n/machine (m)",
            "  /machine (m)",
            "/machine (m)\n  /a",
            "/machine (m)\n  a (b)",
        ] {
            assert_eq!(Tree::parse(other), None, "{other}");
        }
    }

    #[test]
    fn network_backends_are_the_types_that_are_no_cards() {
        let text = "n.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ u0: index=0,type=vhost-user,net=1\r\nhub 0\r\n \\ h: type=tap";
        assert_eq!(network_backends(text), ["tap", "vhost-user"]);
    }
}
