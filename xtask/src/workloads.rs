//! The guests that `cargo xtask study` records: ordinary programs of Debian 12 under ordinary load.
//!
//! ```text
//! target/tools/
//!   study/root/…    the files of the packages that the guest uses, where the guest has them
//!   study.cpio      these and the scripts beside this module, as an initramfs
//! ```
//!
//! One initramfs serves all workloads; the kernel's command line chooses. `/init` is `workloads/init.sh`, whose first lines
//! say what it prints on the serial console. The guest has no disk and no network card: what it writes is its RAM, and
//! client and server of a load are both inside.
//!
//! The archive is not compressed. That makes it more than twice as large, and neither the build nor the emulated processor
//! of the guest spends time on it.

mod elf;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::apt::{self, Apt, CODENAME};
use crate::cpio::Archive;
use crate::workspace::{Origin, Workspace, install_directory, install_file, is_complete, remove_directory};

/// What a recording needs to start a guest.
#[derive(Debug)]
pub(crate) struct StudyGuest {
    /// The kernel image of `cargo xtask setup`.
    pub(crate) kernel: PathBuf,
    /// The initramfs with all workloads.
    pub(crate) initramfs: PathBuf,
}

/// One kind of guest.
#[derive(Debug)]
pub(crate) struct Workload {
    /// Its name, on the command line, in the guest's messages and in the study.
    pub(crate) name: &'static str,
    /// What it is, for people.
    pub(crate) about: &'static str,
    /// The RAM that it is to have.
    pub(crate) memory_bytes: u64,
    /// The kernel's command line.
    pub(crate) command_line: &'static str,
    /// How long it is recorded, if that does not make too large a file. Less where it is known to.
    pub(crate) recorded_seconds: u32,
}

/// How long a guest is recorded.
const RECORDED_SECONDS: u32 = 60;

/// A command line with what all guests have in common: the serial console, on which the guest says how it is doing; a
/// panic ends QEMU (with `-no-reboot`); the processor's random numbers will do; and no trial of the timer, which fails
/// where an emulated processor is not given time for it.
macro_rules! command_line {
    ($parameters:literal) => {
        concat!("console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check ", $parameters)
    };
}

/// The guests of the study.
pub(crate) const WORKLOADS: &[Workload] = &[
    Workload {
        name: "idle",
        about: "nothing but the kernel and a sign of life each second",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=idle"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "redis",
        about: "redis with 200,000 values of 512 bytes, read and written with even odds",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=redis keys=200000"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "redis-hot",
        about: "the same, with as many writes again to a tenth of the keys",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=redis-hot keys=200000 hot_keys=20000"),
        recorded_seconds: 50,
    },
    Workload {
        name: "sqlite",
        about: "sqlite with a write-ahead log: skewed updates, inserts and deletes on 200,000 rows with an index",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=sqlite rows=200000"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "gzip",
        about: "gzip compresses 64 MiB of files, again and again",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=gzip compressor=gzip corpus_mib=64"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "xz",
        about: "xz compresses 8 MiB of files, again and again, with some 90 MiB for its search of matches",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=xz compressor=xz corpus_mib=8"),
        recorded_seconds: 25,
    },
    Workload {
        name: "compile",
        about: "two C compilers at a time build 64 sources, again and again",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=compile sources=64"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "python",
        about: "a Python job over a store of 192 MiB, whose working set moves on every 6 s",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=python store_mib=192"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "web",
        about: "nginx as server, and as a cache that holds a third of the pages, with an access log",
        memory_bytes: 512 << 20,
        command_line: command_line!("workload=web files_mib=48"),
        recorded_seconds: RECORDED_SECONDS,
    },
    Workload {
        name: "mixed",
        about: "redis, sqlite and gzip at once",
        memory_bytes: 1 << 30,
        command_line: command_line!("workload=mixed keys=100000 rows=100000 corpus_mib=16"),
        recorded_seconds: RECORDED_SECONDS,
    },
];

/// Debian packages the guest is made of. Exact names rather than what apt would install with them: most of that is for
/// a system that has to be looked after. That nothing is missing is checked when the files are collected.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "gzip",
    "libatomic1",
    "libc6",
    "libcap2",
    "libcrypt1",
    "libexpat1",
    "libgcc-s1",
    "libgcrypt20",
    "libgpg-error0",
    "libjemalloc2",
    "libluajit-5.1-2",
    "liblz4-1",
    "liblzf1",
    "liblzma5",
    "libpcre2-8-0",
    "libpython3.11-minimal",
    "libreadline8",
    "libsqlite3-0",
    "libssl3",
    "libstdc++6",
    "libsystemd0",
    "libtinfo6",
    "libzstd1",
    "nginx",
    "python3.11-minimal",
    "redis-server",
    "redis-tools",
    "sqlite3",
    "tcc",
    "wrk",
    "xz-utils",
    "zlib1g",
];

/// What the guest has of these packages, besides the libraries that these programs need: where a package has the file or
/// directory, and where the guest has it.
const CONTENTS: &[(&str, &str)] = &[
    ("bin/busybox", "bin/busybox"),
    ("bin/gzip", "usr/bin/gzip"),
    ("usr/bin/python3.11", "usr/bin/python3.11"),
    ("usr/bin/redis-benchmark", "usr/bin/redis-benchmark"),
    ("usr/bin/redis-cli", "usr/bin/redis-cli"),
    ("usr/bin/redis-server", "usr/bin/redis-server"),
    ("usr/bin/sqlite3", "usr/bin/sqlite3"),
    ("usr/bin/tcc", "usr/bin/tcc"),
    ("usr/bin/wrk", "usr/bin/wrk"),
    ("usr/bin/xz", "usr/bin/xz"),
    ("usr/lib/python3.11/encodings", "usr/lib/python3.11/encodings"),
    ("usr/sbin/nginx", "usr/sbin/nginx"),
];

/// Where the packages have libraries, and where the loader of the guest looks for them.
const LIBRARIES_IN_PACKAGES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
const LIBRARIES_IN_GUEST: &str = "lib/x86_64-linux-gnu";
/// The loader's own place is written in every program.
const LOADER: &str = "ld-linux-x86-64.so.2";
const LOADER_IN_GUEST: &str = "lib64/ld-linux-x86-64.so.2";

/// What the guest has besides its packages.
const SCRIPTS: &[(&str, &str)] = &[
    ("init", include_str!("workloads/init.sh")),
    ("etc/passwd", "root:x:0:0:root:/tmp:/bin/sh\n"),
    ("etc/group", "root:x:0:\n"),
    ("usr/lib/study/fill.lua", include_str!("workloads/fill.lua")),
    ("usr/lib/study/job.py", include_str!("workloads/job.py")),
    ("usr/lib/study/nginx.conf", include_str!("workloads/nginx.conf")),
    ("usr/lib/study/pages.py", include_str!("workloads/pages.py")),
    ("usr/lib/study/requests.lua", include_str!("workloads/requests.lua")),
    ("usr/lib/study/schema.sql", include_str!("workloads/schema.sql")),
    ("usr/lib/study/sources.awk", include_str!("workloads/sources.awk")),
    ("usr/lib/study/transactions.sql", include_str!("workloads/transactions.sql")),
];

/// Directories that are empty until the guest runs.
const DIRECTORIES: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];

/// The most that a package's file may be followed through symbolic links.
const LINKS_MAX: usize = 8;

/// Builds the guest where it is not there yet. What is complete is left alone; scripts that changed are packed anew
/// without a download.
///
/// # Errors
/// When there is no kernel from `cargo xtask setup`, when the packages cannot be had (this is not Debian 12, or its
/// mirror cannot be reached), or when they no longer hold what is expected of them.
pub(crate) fn build(workspace: &Workspace) -> Result<StudyGuest> {
    let kernel = workspace.tools.join("kernel/vmlinuz");
    ensure!(kernel.is_file(), "there is no kernel for the study's guests; run `cargo xtask setup` first");
    let _lock = workspace.lock()?;
    let directory = workspace.tools.join("study");
    if !is_complete(&directory, Some(&origin())) {
        fetch(workspace, &directory).context("the guest whose workloads are recorded cannot be built")?;
    }
    let initramfs = workspace.tools.join("study.cpio");
    if install_file(&initramfs, &pack(&directory.join("root"))?)? {
        println!("packed the guest of the study");
    }
    Ok(StudyGuest { kernel, initramfs })
}

/// What the directory of the guest's files is made from. A change of either list makes another one.
fn origin() -> Origin {
    let files: Vec<&str> = CONTENTS.iter().map(|(_, in_guest)| *in_guest).collect();
    Origin::Packages(format!("{CODENAME} {}: {}", PACKAGES.join(" "), files.join(" ")))
}

fn fetch(workspace: &Workspace, directory: &Path) -> Result<()> {
    let scratch = workspace.tools.join(".apt-study");
    println!("downloading {} packages for the guest of the study (about 17 MB)", PACKAGES.len());
    let apt = Apt::prepare(&scratch)?;
    install_directory(directory, |partial| {
        let unpacked = partial.join("unpacked");
        for package in PACKAGES {
            apt::unpack(&apt.download("study", package)?, &unpacked)?;
        }
        for (in_guest, file) in collect(&unpacked, CONTENTS)? {
            let to = partial.join("root").join(in_guest);
            fs::create_dir_all(to.parent().context("a file of the guest is in no directory")?)?;
            fs::copy(&file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
        }
        remove_directory(&unpacked)?;
        Ok(origin())
    })?;
    remove_directory(&scratch)
}

/// The files of the guest: by their path in the guest, where they were unpacked.
///
/// # Errors
/// When something is missing: what is named, or a library that one of the files needs.
fn collect(unpacked: &Path, contents: &[(&str, &str)]) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for (in_package, in_guest) in contents {
        add(unpacked, in_package, in_guest, &mut files)?;
    }
    let mut unread: Vec<PathBuf> = files.values().cloned().collect();
    let mut known = BTreeSet::new();
    while let Some(file) = unread.pop() {
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        if !elf::is_elf(&bytes) {
            continue;
        }
        let needed = elf::needed(&bytes).with_context(|| format!("{} cannot be read", file.display()))?;
        for name in needed {
            if !known.insert(name.clone()) {
                continue;
            }
            let library = LIBRARIES_IN_PACKAGES
                .iter()
                .find_map(|place| resolve(unpacked, &format!("{place}/{name}")).ok())
                .with_context(|| format!("{} needs {name}, which no package of the guest holds", file.display()))?;
            let in_guest =
                if name == LOADER { LOADER_IN_GUEST.to_owned() } else { format!("{LIBRARIES_IN_GUEST}/{name}") };
            files.insert(in_guest, library.clone());
            unread.push(library);
        }
    }
    Ok(files)
}

/// Adds a file, or all files of a directory and those below it.
fn add(unpacked: &Path, in_package: &str, in_guest: &str, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let path = resolve(unpacked, in_package)?;
    if !path.is_dir() {
        files.insert(in_guest.to_owned(), path);
        return Ok(());
    }
    for entry in fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))? {
        let name = entry?.file_name();
        let name = name.to_str().with_context(|| format!("a file name in {} is not text", path.display()))?;
        add(unpacked, &format!("{in_package}/{name}"), &format!("{in_guest}/{name}"), files)?;
    }
    Ok(())
}

/// The file behind a path of a package, through symbolic links that are meant from the package's root.
fn resolve(unpacked: &Path, path: &str) -> Result<PathBuf> {
    let mut path = PathBuf::from(path);
    for _ in 0..LINKS_MAX {
        let here = unpacked.join(&path);
        let kind = fs::symlink_metadata(&here)
            .with_context(|| format!("the packages of the guest hold no {}", path.display()))?
            .file_type();
        if !kind.is_symlink() {
            return Ok(here);
        }
        let link = fs::read_link(&here)?;
        path = match link.strip_prefix("/") {
            Ok(from_root) => from_root.to_path_buf(),
            Err(_) => path.parent().unwrap_or(Path::new("")).join(link),
        };
    }
    bail!("{} is a symbolic link behind more than {LINKS_MAX} others", path.display())
}

/// The archive of the files below `root` and the scripts.
fn pack(root: &Path) -> Result<Vec<u8>> {
    let mut files = BTreeMap::new();
    list(root, "", &mut files)?;
    for (name, text) in SCRIPTS {
        files.insert((*name).to_owned(), text.as_bytes().to_vec());
    }
    let mut archive = Archive::default();
    let mut made = BTreeSet::new();
    for name in DIRECTORIES {
        directory(&mut archive, name, &mut made);
    }
    // The kernel opens it for the first process before that can mount anything.
    archive.character_device("dev/console", 5, 1);
    for (name, content) in &files {
        if let Some((parent, _)) = name.rsplit_once('/') {
            directory(&mut archive, parent, &mut made);
        }
        archive.executable(name, content);
    }
    Ok(archive.finish())
}

/// Adds a directory after those that it is in, each once: the kernel makes no parents.
fn directory(archive: &mut Archive, name: &str, made: &mut BTreeSet<String>) {
    if let Some((parent, _)) = name.rsplit_once('/') {
        directory(archive, parent, made);
    }
    if made.insert(name.to_owned()) {
        archive.directory(name);
    }
}

/// Reads all files below a directory, by their path in it.
fn list(directory: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a file name that is not text")?;
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            list(&path, &format!("{name}/"), files)?;
        } else {
            files.insert(name, fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The libraries of the machine that runs this test stand for those of the packages.
    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vmferry-workloads-{}-{name}", std::process::id()));
        remove_directory(&path).unwrap();
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn names_in(archive: &[u8]) -> Vec<String> {
        let field = |at: usize| usize::from_str_radix(std::str::from_utf8(&archive[at..at + 8]).unwrap(), 16).unwrap();
        let (mut names, mut at) = (Vec::new(), 0);
        while at < archive.len() {
            let (size, name_bytes) = (field(at + 54), field(at + 94));
            names.push(String::from_utf8(archive[at + 110..at + 110 + name_bytes - 1].to_vec()).unwrap());
            at = (at + 110 + name_bytes).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        names
    }

    /// A program that needs the C library and the loader: this test.
    fn program(unpacked: &Path) {
        fs::create_dir_all(unpacked.join("usr/bin")).unwrap();
        fs::copy(std::env::current_exe().unwrap(), unpacked.join("usr/bin/program-1.0")).unwrap();
        symlink("program-1.0", unpacked.join("usr/bin/program")).unwrap();
        symlink("/usr/bin/program", unpacked.join("usr/bin/name")).unwrap();
    }

    #[test]
    fn a_library_that_no_package_holds_is_named() {
        let unpacked = scratch("missing");
        program(&unpacked);
        let error = collect(&unpacked, &[("usr/bin/name", "usr/bin/name")]).unwrap_err().to_string();
        assert!(error.contains("program-1.0 needs "), "{error}");
        let error = collect(&unpacked, &[("usr/bin/other", "usr/bin/other")]).unwrap_err().to_string();
        assert!(error.contains("hold no usr/bin/other"), "{error}");
        remove_directory(&unpacked).unwrap();
    }

    #[test]
    fn libraries_are_found_for_programs_and_for_libraries() {
        let unpacked = scratch("libraries");
        program(&unpacked);
        let libraries = unpacked.join(LIBRARIES_IN_PACKAGES[1]);
        fs::create_dir_all(&libraries).unwrap();
        let program = fs::read(unpacked.join("usr/bin/program")).unwrap();
        let needed = elf::needed(&program).unwrap();
        // A library that needs others itself, and others that are no ELF files and so need nothing.
        for name in &needed {
            fs::write(libraries.join(name), if name == "libc.so.6" { program.as_slice() } else { b"text" }).unwrap();
        }
        fs::create_dir_all(unpacked.join("share/some")).unwrap();
        fs::write(unpacked.join("share/some/file"), "text").unwrap();

        let files = collect(&unpacked, &[("usr/bin/name", "bin/it"), ("share", "usr/share")]).unwrap();
        assert_eq!(files["bin/it"], unpacked.join("usr/bin/program-1.0"));
        assert_eq!(files["usr/share/some/file"], unpacked.join("share/some/file"));
        assert!(files.contains_key(LOADER_IN_GUEST), "{files:?}");
        assert!(files.contains_key("lib/x86_64-linux-gnu/libc.so.6"), "{files:?}");
        assert_eq!(files.len(), 2 + needed.len());
        remove_directory(&unpacked).unwrap();
    }

    #[test]
    fn a_circle_of_links_is_an_error() {
        let unpacked = scratch("circle");
        symlink("b", unpacked.join("a")).unwrap();
        symlink("a", unpacked.join("b")).unwrap();
        assert!(resolve(&unpacked, "a").is_err());
        remove_directory(&unpacked).unwrap();
    }

    #[test]
    fn every_directory_comes_before_what_is_in_it() {
        let root = scratch("pack");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/program"), "x").unwrap();
        let names = names_in(&pack(&root).unwrap());
        let position = |wanted: &str| names.iter().position(|name| name == wanted).unwrap();
        for name in names.iter().filter(|name| *name != "TRAILER!!!") {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(position(parent) < position(name), "{name} in {names:?}");
            }
        }
        assert!(position("usr/bin/program") > 0 && position("usr/lib/study/job.py") > 0);
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        remove_directory(&root).unwrap();
    }

    #[test]
    fn every_workload_is_one_that_the_guest_knows() {
        let init = include_str!("workloads/init.sh");
        let known = init.split("\ncase $workload in\n").nth(1).unwrap().split("\nesac").next().unwrap();
        let known: BTreeSet<&str> =
            known.lines().filter_map(|line| line.split_once(')')).flat_map(|(names, _)| names.split(" | ")).collect();
        for workload in WORKLOADS {
            assert!(known.contains(workload.name), "{} is not in {known:?}", workload.name);
            let mut parameters = workload.command_line.split(' ').skip_while(|word| !word.starts_with("workload="));
            assert_eq!(parameters.next(), Some(format!("workload={}", workload.name).as_str()));
            // A parameter that no load reads would be a size that nothing has.
            for parameter in parameters {
                let (key, _) = parameter.split_once('=').unwrap();
                assert!(init.contains(&format!("parameter {key} ")), "{parameter} of {}", workload.name);
            }
        }
        let names: BTreeSet<&str> = WORKLOADS.iter().map(|workload| workload.name).collect();
        assert_eq!(names.len(), WORKLOADS.len());
    }

    #[test]
    fn every_script_that_the_guest_opens_is_packed() {
        let packed: BTreeSet<&str> = SCRIPTS.iter().map(|(name, _)| *name).collect();
        let opened: BTreeSet<&str> = SCRIPTS
            .iter()
            .flat_map(|(_, text)| text.split("/usr/lib/study/").skip(1))
            .map(|rest| rest.split([' ', '\'', '\n']).next().unwrap())
            .collect();
        assert!(!opened.is_empty());
        for name in opened {
            assert!(packed.contains(format!("usr/lib/study/{name}").as_str()), "{name}");
        }
    }
}
