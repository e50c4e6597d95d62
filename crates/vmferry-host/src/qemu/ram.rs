//! Where guest RAM lies in the VMM, and which file is behind it.
//!
//! QEMU names its RAM blocks and, since 8.1, their addresses (`info ramblock`); the kernel names the files behind the
//! addresses (`/proc/PID/maps`). The file is opened through `/proc/PID/map_files`, which works for a file that was
//! unlinked and in another mount namespace, and is checked by device and inode.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use vmferry_core::pages::{PAGE_BYTES, RamLayout};

const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// Descriptors of the VMM that are looked at before giving up.
const MAX_PROCESS_FDS: usize = 65_536;
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Why a block of guest RAM cannot be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The process cannot be looked at.
    #[error("cannot read {}: run as root or with CAP_SYS_PTRACE", path.display())]
    Proc {
        /// The file under `/proc`.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No shared mapping of a file is this block.
    #[error("process {pid} has no shared file mapping for RAM block `{block}`: {looked_for}")]
    NotMapped {
        /// The process.
        pid: u32,
        /// The block.
        block: String,
        /// What was looked for.
        looked_for: String,
    },
    /// More than one mapping could be this block.
    #[error(
        "{count} mappings of process {pid} could be RAM block `{block}`, and this QEMU does not say which: give each \
         memory backend a mem-path of its own, or use QEMU 8.1 or later"
    )]
    Ambiguous {
        /// The process.
        pid: u32,
        /// The block.
        block: String,
        /// How many.
        count: usize,
    },
    /// The file behind the mapping cannot be opened.
    #[error("cannot open {path}, the file behind RAM block `{block}`: run as root, or as the user that runs QEMU")]
    Open {
        /// The block.
        block: String,
        /// The path in `/proc/PID/maps`.
        path: String,
        /// What the system said to the last of the ways tried.
        #[source]
        source: io::Error,
    },
}

/// What a file system does with our pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileSystem {
    /// Memory: `/dev/shm`, a memfd.
    Tmpfs,
    /// Memory in huge pages.
    Hugetlbfs,
    /// Anything else, by its `f_type`: writes are not tracked there.
    Other(i64),
}

/// Whether a tmpfs may put huge pages under guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// No.
    Never,
    /// Yes; the mount option or the system setting that says so.
    Possible(String),
}

/// One block of guest RAM in the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// First address in the VMM.
    pub address: u64,
    /// Where the block begins in the file.
    pub file_offset: u64,
    /// Bytes of the block.
    pub bytes: u64,
    /// The path as the kernel tells it, without ` (deleted)`.
    pub path: String,
    /// Whether the file has no name any more.
    pub unlinked: bool,
    /// The file's device, as in `/proc/PID/maps`.
    pub device: (u32, u32),
    /// The file's inode.
    pub inode: u64,
    /// What file system it is on.
    pub file_system: FileSystem,
    /// The file system's page size in bytes.
    pub page_bytes: u64,
    /// Whether there may be transparent huge pages.
    pub huge_pages: HugePages,
}

/// What a file of guest RAM is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamAccess {
    /// The source's side.
    Read,
    /// The target's side.
    ReadWrite,
}

/// One block of guest RAM with its file.
#[derive(Debug)]
pub struct GuestRamBlock {
    /// QEMU's name for the block: the id of its memory backend.
    pub id: String,
    /// Where it lies.
    pub mapping: Mapping,
    /// The file, opened as asked.
    pub file: OwnedFd,
}

/// All RAM of a guest. `blocks` and the layout's blocks are in the same order: sorted by name, so that both sides of a
/// migration agree.
#[derive(Debug)]
pub struct GuestRam {
    /// Names, sizes and page numbers.
    pub layout: RamLayout,
    /// Addresses and files.
    pub blocks: Vec<GuestRamBlock>,
}

/// A line of `info ramblock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RamBlockLine {
    pub(super) name: String,
    pub(super) used_bytes: u64,
    /// Since QEMU 8.1.
    pub(super) address: Option<u64>,
}

/// The blocks with a name: one without is in no guest's address space and never migrated. `None` where a line is not
/// as expected, for then the answer proves nothing.
pub(super) fn parse_ram_blocks(text: &str) -> Option<Vec<RamBlockLine>> {
    let mut lines = text.lines();
    if !lines.next()?.contains("Block Name") {
        return None;
    }
    let mut blocks = Vec::new();
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let offset_at = words.iter().position(|word| word.starts_with("0x"))?;
        let hex = |at: usize| u64::from_str_radix(words.get(at)?.strip_prefix("0x")?, 16).ok();
        // Before the offset: name, page size, unit. A block without a name lacks the first.
        let name = words[..offset_at.checked_sub(2)?].join(" ");
        let used_bytes = hex(offset_at + 1)?;
        if !name.is_empty() {
            blocks.push(RamBlockLine { name, used_bytes, address: hex(offset_at + 3) });
        }
    }
    Some(blocks)
}

/// A run of neighbouring mappings of one file in `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileMapping {
    pub(super) start: u64,
    pub(super) end: u64,
    file_offset: u64,
    shared: bool,
    device: (u32, u32),
    inode: u64,
    path: String,
    unlinked: bool,
    /// The kernel's name of the first piece in `/proc/PID/map_files`.
    first_piece: String,
}

/// The mappings of files; pieces that follow each other in memory and in the file are one. Lines that do not parse are
/// left out.
pub(super) fn parse_maps(text: &str) -> Vec<FileMapping> {
    let mut mappings: Vec<FileMapping> = Vec::new();
    for mapping in text.lines().filter_map(parse_maps_line) {
        match mappings.last_mut() {
            Some(last)
                if last.end == mapping.start
                    && last.shared == mapping.shared
                    && (last.device, last.inode) == (mapping.device, mapping.inode)
                    && last.file_offset + (last.end - last.start) == mapping.file_offset =>
            {
                last.end = mapping.end;
            }
            Some(_) | None => mappings.push(mapping),
        }
    }
    mappings
}

fn parse_maps_line(line: &str) -> Option<FileMapping> {
    let mut rest = line;
    let mut word = || {
        let trimmed = rest.trim_start();
        let (word, left) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = left;
        word
    };
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = word();
    let (start, end) = range.split_once('-')?;
    let shared = word().as_bytes().get(3) == Some(&b's');
    let file_offset = hex(word())?;
    let (major, minor) = word().split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = word().parse().ok()?;
    let path = rest.trim_start();
    let unlinked = path.ends_with(" (deleted)");
    let (start, end) = (hex(start)?, hex(end)?);
    (inode != 0 && start < end).then(|| FileMapping {
        start,
        end,
        file_offset,
        shared,
        device,
        inode,
        path: path.strip_suffix(" (deleted)").unwrap_or(path).to_owned(),
        unlinked,
        first_piece: range.to_owned(),
    })
}

/// What is known of a block when its mapping is looked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) block: &'a str,
    pub(super) bytes: u64,
    pub(super) address: Option<u64>,
    /// The backend's `mem-path`; a memfd has none.
    pub(super) mem_path: Option<&'a str>,
    /// Device and inode of the file at `mem_path` now, if there is one.
    pub(super) file: Option<((u32, u32), u64)>,
}

/// Finds the mapping of one block and its first address.
pub(super) fn find_mapping<'a>(
    mappings: &'a [FileMapping],
    wanted: &Wanted<'_>,
    pid: u32,
) -> Result<(&'a FileMapping, u64), RamError> {
    let big_enough = |mapping: &&FileMapping| mapping.shared && mapping.end - mapping.start >= wanted.bytes;
    let not_mapped = |looked_for: String| RamError::NotMapped { pid, block: wanted.block.to_owned(), looked_for };
    if let Some(address) = wanted.address {
        return mappings
            .iter()
            .find(|mapping| {
                mapping.shared
                    && mapping.start <= address
                    && address.checked_add(wanted.bytes).is_some_and(|end| end <= mapping.end)
            })
            .map(|mapping| (mapping, address))
            .ok_or_else(|| not_mapped(format!("{} bytes at address {address:#x}", wanted.bytes)));
    }
    let fits: Box<dyn Fn(&FileMapping) -> bool> = match wanted.mem_path {
        Some(mem_path) => {
            // With a directory as mem-path QEMU makes a nameless file there.
            let nameless =
                format!("{}/qemu_back_mem.{}.", mem_path.trim_end_matches('/'), wanted.block.replace('/', "_"));
            Box::new(move |mapping| {
                mapping.path == mem_path
                    || mapping.path.starts_with(&nameless)
                    || wanted.file == Some((mapping.device, mapping.inode))
            })
        }
        None => Box::new(|mapping| mapping.path.starts_with("/memfd:")),
    };
    let candidates: Vec<&FileMapping> = mappings.iter().filter(big_enough).filter(|mapping| fits(mapping)).collect();
    // A memfd is told from QEMU's other memfds by its exact size only.
    let exact: Vec<&FileMapping> =
        candidates.iter().copied().filter(|mapping| mapping.end - mapping.start == wanted.bytes).collect();
    match (&exact[..], &candidates[..]) {
        ([one], _) | ([], [one]) => Ok((one, one.start)),
        ([], []) => {
            let path = wanted.mem_path.unwrap_or("a memfd");
            Err(not_mapped(format!("{path}, {} bytes", wanted.bytes)))
        }
        _ => Err(RamError::Ambiguous { pid, block: wanted.block.to_owned(), count: exact.len().max(candidates.len()) }),
    }
}

/// Reads the mappings of a process.
pub(super) fn read_maps(pid: u32) -> Result<Vec<FileMapping>, RamError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text = std::fs::read(&path).map_err(|source| RamError::Proc { path, source })?;
    Ok(parse_maps(&String::from_utf8_lossy(&text)))
}

/// Device and inode of a backend's `mem-path` as the process sees it; `None` if there is no such file.
pub(super) fn stat_mem_path(pid: u32, mem_path: &str) -> Option<((u32, u32), u64)> {
    let metadata = std::fs::metadata(process_view(pid, mem_path)).ok()?;
    Some((device_of(&metadata), metadata.ino()))
}

fn process_view(pid: u32, path: &str) -> PathBuf {
    match path.strip_prefix('/') {
        Some(absolute) => Path::new("/proc").join(pid.to_string()).join("root").join(absolute),
        None => Path::new("/proc").join(pid.to_string()).join("cwd").join(path),
    }
}

fn device_of(metadata: &std::fs::Metadata) -> (u32, u32) {
    (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()))
}

/// Finds a block's mapping, opens its file and describes both.
pub(super) fn locate(
    pid: u32,
    mappings: &[FileMapping],
    wanted: &Wanted<'_>,
    access: RamAccess,
) -> Result<(Mapping, OwnedFd), RamError> {
    let (found, address) = find_mapping(mappings, wanted, pid)?;
    let file = open_file(pid, wanted.block, found, access)?;
    let (file_system, page_bytes) = match rustix::fs::fstatfs(&file) {
        Ok(stat) if stat.f_type == TMPFS_MAGIC => (FileSystem::Tmpfs, PAGE_BYTES),
        Ok(stat) if stat.f_type == HUGETLBFS_MAGIC => {
            (FileSystem::Hugetlbfs, u64::try_from(stat.f_bsize).unwrap_or(PAGE_BYTES))
        }
        Ok(stat) => (FileSystem::Other(stat.f_type), PAGE_BYTES),
        Err(errno) => {
            let (block, path) = (wanted.block.to_owned(), found.path.clone());
            return Err(RamError::Open { block, path, source: errno.into() });
        }
    };
    let huge_pages = match file_system {
        FileSystem::Tmpfs => huge_pages_of(pid, found.device),
        FileSystem::Hugetlbfs | FileSystem::Other(_) => HugePages::Never,
    };
    let mapping = Mapping {
        address,
        file_offset: found.file_offset + (address - found.start),
        bytes: wanted.bytes,
        path: found.path.clone(),
        unlinked: found.unlinked,
        device: found.device,
        inode: found.inode,
        file_system,
        page_bytes,
        huge_pages,
    };
    Ok((mapping, file))
}

/// Opens the mapped file itself: through the mapping, else through a descriptor of the VMM, else by its path. Whatever
/// is opened must be the same inode.
fn open_file(pid: u32, block: &str, mapping: &FileMapping, access: RamAccess) -> Result<OwnedFd, RamError> {
    let process = Path::new("/proc").join(pid.to_string());
    let mut first_error = None;
    let mut attempt = |path: &Path| match open_checked(path, mapping, access) {
        Ok(file) => Some(file),
        Err(error) => {
            first_error.get_or_insert(error);
            None
        }
    };
    if let Some(file) = attempt(&process.join("map_files").join(map_files_name(&mapping.first_piece))) {
        return Ok(file);
    }
    if let Ok(fds) = std::fs::read_dir(process.join("fd")) {
        for fd in fds.take(MAX_PROCESS_FDS).flatten() {
            let is_it = std::fs::metadata(fd.path())
                .is_ok_and(|metadata| metadata.ino() == mapping.inode && device_of(&metadata) == mapping.device);
            if is_it && let Some(file) = attempt(&fd.path()) {
                return Ok(file);
            }
        }
    }
    if let Some(file) = attempt(&process_view(pid, &mapping.path)) {
        return Ok(file);
    }
    let source = first_error.unwrap_or_else(|| io::Error::from(io::ErrorKind::NotFound));
    Err(RamError::Open { block: block.to_owned(), path: mapping.path.clone(), source })
}

/// `maps` pads addresses with zeroes, `map_files` does not.
fn map_files_name(range: &str) -> String {
    let strip = |text: &str| {
        let stripped = text.trim_start_matches('0');
        if stripped.is_empty() { "0" } else { stripped }.to_owned()
    };
    range.split_once('-').map_or_else(|| range.to_owned(), |(start, end)| format!("{}-{}", strip(start), strip(end)))
}

fn open_checked(path: &Path, mapping: &FileMapping, access: RamAccess) -> io::Result<OwnedFd> {
    let mode = match access {
        RamAccess::Read => OFlags::RDONLY,
        RamAccess::ReadWrite => OFlags::RDWR,
    };
    let file = File::from(rustix::fs::open(path, mode | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?);
    let metadata = file.metadata()?;
    // Some file systems (btrfs, overlayfs) show another device in maps; guest RAM there is refused anyway, but it must
    // be opened to find that out. The inode, and coming from the mapping or the VMM itself, is proof enough.
    if metadata.ino() != mapping.inode {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the file of that name is not the one that is mapped"));
    }
    Ok(OwnedFd::from(file))
}

/// The mount's `huge=` option, or the system's setting for shared memory without a mount. The setting overrides the
/// option where it is `deny` or `force`.
fn huge_pages_of(pid: u32, device: (u32, u32)) -> HugePages {
    let setting = std::fs::read_to_string(SHMEM_HUGE_PAGES).unwrap_or_default();
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    huge_pages(&setting, &mounts, device)
}

fn huge_pages(setting: &str, mounts: &str, device: (u32, u32)) -> HugePages {
    let setting = setting.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("never", |(word, _)| word);
    let from_setting = || HugePages::Possible(format!("{SHMEM_HUGE_PAGES} is `{setting}`"));
    let device = format!("{}:{}", device.0, device.1);
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&device));
    match (setting, mount) {
        ("deny", _) => HugePages::Never,
        ("force", _) => from_setting(),
        (_, Some(mount)) => {
            let options = mount.rsplit(' ').next().unwrap_or_default();
            let option = options.split(',').find_map(|option| option.strip_prefix("huge="));
            match option {
                None | Some("never") => HugePages::Never,
                Some(how) => {
                    let place = mount.split(' ').nth(4).unwrap_or("tmpfs");
                    HugePages::Possible(format!("{place} is mounted with huge={how}"))
                }
            }
        }
        ("never", None) => HugePages::Never,
        (_, None) => from_setting(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS_7_2: &str =
        "              Block Name    PSize              Offset               Used              Total
                      n0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
                            4 KiB  0x0000000010000000 0x0000000004000000 0x0000000004000000
   0000:00:03.0/vga.vram    2 MiB  0x00000000140c0000 0x0000000001000000 0x0000000001000000
0000:00:02.0/virtio-net-pci.rom    4 KiB  0x0000000014080000 0x0000000000040000 0x0000000000040000
";
    const BLOCKS_10_0: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f37effff000  rw
";
    const MAPS: &str = "\
564796558000-56479695f000 r--p 00000000 fe:00 10011557                   /usr/bin/qemu-system-x86_64
7fb200000000-7fb200100000 rw-p 00000000 00:00 0
7fb237c00000-7fb23bc00000 rw-s 00000000 00:01 1037                       /dev/zero (deleted)
7fb23bffd000-7fb240000000 rw-s 00000000 00:1b 17                         /dev/shm/qemu_back_mem.d0.rZ3bjV (deleted)
7fb240000000-7fb243ffd000 rw-s 04003000 00:1b 17                         /dev/shm/qemu_back_mem.d0.rZ3bjV (deleted)
7fb243ffe000-7fb247ffe000 rw-s 00000000 00:01 1036                       /memfd:memory-backend-memfd (deleted)
7fb247fff000-7fb24bfff000 rw-s 00000000 00:1b 16                         /dev/shm/a name
";

    fn wanted<'a>(block: &'a str, bytes: u64, mem_path: Option<&'a str>) -> Wanted<'a> {
        Wanted { block, bytes, address: None, mem_path, file: None }
    }

    #[test]
    fn ram_blocks_of_both_formats_are_read() {
        let old = parse_ram_blocks(BLOCKS_7_2).unwrap();
        let names: Vec<_> = old.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(names, ["n0", "0000:00:03.0/vga.vram", "0000:00:02.0/virtio-net-pci.rom"]);
        assert_eq!((old[1].used_bytes, old[1].address), (16 << 20, None));
        let new = parse_ram_blocks(BLOCKS_10_0).unwrap();
        assert_eq!(new[0].address, Some(0x7f37_efff_f000));
        assert_eq!(parse_ram_blocks("unknown command"), None);
        assert_eq!(parse_ram_blocks("Block Name\n ram 4 KiB nothing"), None);
    }

    #[test]
    fn a_file_in_pieces_is_found_by_the_name_qemu_gave_it() {
        let maps = parse_maps(MAPS);
        let (found, address) = find_mapping(&maps, &wanted("d0", 128 << 20, Some("/dev/shm")), 1).unwrap();
        assert_eq!((address, found.end - found.start), (0x7fb2_3bff_d000, 128 << 20));
        assert!(found.unlinked);
        let (found, _) = find_mapping(&maps, &wanted("n0", 64 << 20, Some("/dev/shm/a name")), 1).unwrap();
        assert_eq!((found.inode, found.unlinked), (16, false));
        let (found, _) = find_mapping(&maps, &wanted("m", 64 << 20, None), 1).unwrap();
        assert_eq!(found.inode, 1036);
    }

    #[test]
    fn an_address_beats_names_and_must_lie_in_one_mapping() {
        let maps = parse_maps(MAPS);
        let address = Some(0x7fb2_4400_0000);
        let (found, at) =
            find_mapping(&maps, &Wanted { address, ..wanted("x", 1 << 20, Some("/nowhere")) }, 1).unwrap();
        assert_eq!((found.inode, at), (1036, 0x7fb2_4400_0000));
        let too_long = Wanted { address, ..wanted("x", 64 << 20, None) };
        assert!(matches!(find_mapping(&maps, &too_long, 1), Err(RamError::NotMapped { .. })));
    }

    #[test]
    fn a_renamed_file_is_found_by_inode_and_two_alike_are_refused() {
        let maps = parse_maps(MAPS);
        let renamed = Wanted { file: Some(((0, 0x1b), 16)), ..wanted("n0", 64 << 20, Some("/dev/shm/old")) };
        assert_eq!(find_mapping(&maps, &renamed, 1).unwrap().0.inode, 16);
        let twice = parse_maps(&format!(
            "{MAPS}7fb250000000-7fb254000000 rw-s 00000000 00:01 1039   /memfd:memory-backend-memfd (deleted)\n"
        ));
        let memfd = find_mapping(&twice, &wanted("m", 64 << 20, None), 1);
        assert!(matches!(memfd, Err(RamError::Ambiguous { count: 2, .. })), "{memfd:?}");
    }

    #[test]
    fn broken_maps_lines_are_left_out() {
        assert_eq!(parse_maps("x\n7f-\n\n1-2 rw-s 0 0:z 1 /a\n2-1 rw-s 0 0:1 1 /a\n"), []);
    }

    #[test]
    fn map_files_names_have_no_leading_zeroes() {
        assert_eq!(map_files_name("00400000-00452000"), "400000-452000");
        assert_eq!(map_files_name("00000000-00001000"), "0-1000");
    }

    #[test]
    fn huge_pages_come_from_the_mount_or_the_setting() {
        let mounts = "25 30 0:27 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=1g,huge=advise\n26 30 0:28 / /run rw - tmpfs tmpfs rw";
        let never = "always within_size advise [never] deny force";
        let advise = HugePages::Possible("/dev/shm is mounted with huge=advise".to_owned());
        assert_eq!(huge_pages(never, mounts, (0, 27)), advise);
        assert_eq!(huge_pages(never, mounts, (0, 28)), HugePages::Never);
        assert_eq!(huge_pages(never, mounts, (0, 1)), HugePages::Never);
        assert_eq!(huge_pages("[deny]", mounts, (0, 27)), HugePages::Never);
        assert!(matches!(huge_pages("[force] deny", mounts, (0, 28)), HugePages::Possible(_)));
        assert!(matches!(huge_pages("[always] deny", mounts, (0, 1)), HugePages::Possible(_)));
        assert_eq!(huge_pages("", "", (0, 1)), HugePages::Never);
    }
}
