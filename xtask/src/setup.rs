//! `cargo xtask setup`: two QEMUs, a kernel and the test guest in `target/tools/`.
//!
//! ```text
//! target/tools/
//!   qemu-7.2/run          starts QEMU 7.2; the started process is QEMU itself
//!   qemu-7.2/root/        its unpacked packages: binary, libraries, firmware
//!   qemu-10.0/…           the same for QEMU 10.0
//!   kernel/vmlinuz        a Linux kernel with serial console and initramfs built in
//!   kernel/modules/       its drivers for virtio disks and network cards
//!   initramfs.cpio        the test guest as /init, and these drivers
//! ```
//!
//! Every step is left alone when its stamp says that it is complete, and appears under its final name only when it is.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::apt::{self, Apt, CODENAME};
use crate::cpio::Archive;
use crate::run::{capture, cargo, passes};
use crate::workspace::{Origin, Workspace, install_directory, install_file, is_complete, remove_directory};

/// A QEMU that is fetched: its version, and the suite to prefer when it is not the release itself.
struct Release {
    version: &'static str,
    suite: Option<&'static str>,
}

const RELEASES: [Release; 2] =
    [Release { version: "7.2", suite: None }, Release { version: "10.0", suite: Some("bookworm-backports") }];

const QEMU_PACKAGE: &str = "qemu-system-x86";
const QEMU_BINARY: &str = "usr/bin/qemu-system-x86_64";
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// The kernel's modules that the test guest needs for a disk and a network card, each after those that it needs itself.
const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
];
const QEMU_VARIABLE: &str = "VMFERRY_QEMU";
const KERNEL_VARIABLE: &str = "VMFERRY_KERNEL";
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

const BY_HAND: &str = "\
To go on without downloads, install these by hand and name them:
  a QEMU for x86 (package qemu-system-x86), 7.2 or later    VMFERRY_QEMU=/path/to/qemu-system-x86_64[:/path/to/another]
  a Linux kernel image with a built-in serial console,      VMFERRY_KERNEL=/path/to/vmlinuz
  virtio_pci, virtio_blk and virtio_net
then run `cargo xtask setup` again.";

/// Brings `target/tools/` up to date; with `force`, from nothing.
pub(crate) fn setup(workspace: &Workspace, force: bool) -> Result<()> {
    let _lock = workspace.lock()?;
    let scratch = workspace.tools.join(".apt");
    let mut packages = Packages { directory: scratch.clone(), apt: None };
    setup_qemus(workspace, force, &mut packages)?;
    setup_kernel(workspace, force, &mut packages)?;
    setup_initramfs(workspace)?;
    remove_directory(&scratch)?;
    println!("tools are complete in {}", workspace.tools.display());
    Ok(())
}

/// apt, prepared at the first use only: a set-up with nothing to fetch does not touch the network.
struct Packages {
    directory: PathBuf,
    apt: Option<Apt>,
}

impl Packages {
    fn apt(&mut self, missing: &str) -> Result<&Apt> {
        if self.apt.is_none() {
            println!("fetching package lists");
            self.apt = Some(Apt::prepare(&self.directory).with_context(|| unavailable(missing))?);
        }
        self.apt.as_ref().context("apt was prepared just above")
    }
}

fn unavailable(missing: &str) -> String {
    format!("{missing} is missing and cannot be downloaded.\n{BY_HAND}\nThe reason")
}

fn setup_qemus(workspace: &Workspace, force: bool, packages: &mut Packages) -> Result<()> {
    if let Some(list) = env::var_os(QEMU_VARIABLE) {
        let binaries: Vec<PathBuf> = env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect();
        ensure!(!binaries.is_empty(), "{QEMU_VARIABLE} is set and names nothing");
        return binaries.iter().try_for_each(|binary| setup_user_qemu(workspace, binary));
    }
    for release in &RELEASES {
        let directory = workspace.tools.join(format!("qemu-{}", release.version));
        if force || !is_complete(&directory, None) {
            setup_packaged_qemu(&directory, release, packages)?;
        }
    }
    Ok(())
}

/// A QEMU of the user's: only a wrapper is written, named by the version the binary reports.
fn setup_user_qemu(workspace: &Workspace, binary: &Path) -> Result<()> {
    let binary = fs::canonicalize(binary)
        .with_context(|| format!("{QEMU_VARIABLE} names {}, which cannot be opened", binary.display()))?;
    // A wrapper that starts itself would never end.
    ensure!(
        !binary.starts_with(fs::canonicalize(&workspace.tools)?),
        "{QEMU_VARIABLE} names {}, which is what set-up makes; leave the variable out to use it",
        binary.display(),
    );
    let version = qemu_version(&binary)?;
    let directory = workspace.tools.join(format!("qemu-{version}"));
    let origin = Origin::User(binary.clone());
    if is_complete(&directory, Some(&origin)) {
        return Ok(());
    }
    println!("using {} as QEMU {version}", binary.display());
    install_directory(&directory, |partial| {
        let quoted = binary.display().to_string().replace('\'', r"'\''");
        write_script(&partial.join("run"), &format!("#!/bin/sh\nexec '{quoted}' \"$@\"\n"))?;
        Ok(origin)
    })
}

fn setup_packaged_qemu(directory: &Path, release: &Release, packages: &mut Packages) -> Result<()> {
    let version = release.version;
    let missing = format!("QEMU {version}");
    let apt = packages.apt(&missing)?;
    println!("downloading QEMU {version} with its libraries (about 45 MB)");
    let debs = apt
        .download_closure(&format!("qemu-{version}"), QEMU_PACKAGE, release.suite)
        .with_context(|| unavailable(&missing))?;
    println!("unpacking QEMU {version}");
    install_directory(directory, |partial| {
        let root = partial.join("root");
        for deb in debs.iter().filter(|deb| is_needed(apt::package_name(deb))) {
            apt::unpack(deb, &root)?;
        }
        ensure!(root.join(QEMU_BINARY).is_file(), "the package {QEMU_PACKAGE} holds no {QEMU_BINARY}");
        let run = partial.join("run");
        write_script(&run, WRAPPER)?;
        let reported = qemu_version(&run)?;
        ensure!(reported == version, "the package {QEMU_PACKAGE} holds QEMU {reported} where {version} was expected");
        // Loads the accelerator, which is a module with libraries of its own.
        let accelerators = capture(Command::new(&run).args(["-accel", "help"]))?;
        ensure!(accelerators.lines().any(|line| line.trim() == "tcg"), "QEMU {version} has no TCG: {accelerators}");
        Ok(Origin::Packages(format!("{CODENAME} {QEMU_PACKAGE} {version}")))
    })
}

/// Of the closure, what a QEMU that is run from a directory uses: itself, its firmware and libraries. The C library is
/// left out, since it has to match the dynamic loader, which is the system's.
fn is_needed(package: &str) -> bool {
    let is_qemu = package.starts_with("qemu-") || package == "seabios" || package == "ipxe-qemu";
    let is_library = package == "zlib1g" || (package.starts_with("lib") && package != "libc6");
    is_qemu || is_library
}

/// The wrapper replaces itself with QEMU, so the process started is QEMU, with the same PID.
const WRAPPER: &str = r#"#!/bin/sh
# Starts the QEMU that is unpacked beside this script, with its own libraries and firmware.
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/root || exit 127
LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu"
export LD_LIBRARY_PATH
exec "$root/usr/bin/qemu-system-x86_64" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
"#;

fn write_script(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The major and minor version a QEMU reports.
fn qemu_version(program: &Path) -> Result<String> {
    let text = capture(Command::new(program).arg("--version"))
        .with_context(|| format!("{} does not start", program.display()))?;
    parse_version(&text).with_context(|| format!("{} does not say its version: {text}", program.display()))
}

fn parse_version(text: &str) -> Option<String> {
    let rest = text.strip_prefix("QEMU emulator version ")?;
    let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut parts = number.split('.');
    let (major, minor) = (parts.next()?, parts.next()?);
    (!major.is_empty() && !minor.is_empty()).then(|| format!("{major}.{minor}"))
}

fn setup_kernel(workspace: &Workspace, force: bool, packages: &mut Packages) -> Result<()> {
    let directory = workspace.tools.join("kernel");
    if let Some(path) = env::var_os(KERNEL_VARIABLE) {
        let origin = Origin::User(PathBuf::from(&path));
        if is_complete(&directory, Some(&origin)) {
            return Ok(());
        }
        println!("using {} as the kernel", Path::new(&path).display());
        return install_directory(&directory, |partial| {
            fs::copy(&path, partial.join("vmlinuz")).with_context(|| {
                format!("{KERNEL_VARIABLE} names {}, which cannot be copied", Path::new(&path).display())
            })?;
            Ok(origin)
        });
    }
    let modules = directory.join("modules");
    // Of a user's kernel there are no modules; a packaged one without is from before they were kept.
    if !force && is_complete(&directory, None) && modules.is_dir() {
        return Ok(());
    }
    let missing = "A Linux kernel image";
    let apt = packages.apt(missing)?;
    let package = apt.dependency(KERNEL_PACKAGE, "linux-image-").with_context(|| unavailable(missing))?;
    println!("downloading {package} (about 27 MB)");
    let deb = apt.download("kernel", &package).with_context(|| unavailable(missing))?;
    install_directory(&directory, |partial| {
        let root = partial.join("root");
        apt::unpack(&deb, &root)?;
        fs::rename(find_kernel(&root.join("boot"))?, partial.join("vmlinuz"))?;
        keep_modules(&root.join("lib/modules"), &partial.join("modules"))?;
        remove_directory(&root)?;
        Ok(Origin::Packages(package))
    })
}

/// Moves the modules of [`MODULES`] to one directory, where their names say in which order they are to be loaded. One that
/// is not there is taken to be built in.
fn keep_modules(tree: &Path, modules: &Path) -> Result<()> {
    fs::create_dir(modules).with_context(|| format!("cannot create {}", modules.display()))?;
    for (number, name) in (1..).zip(MODULES) {
        if let Some(path) = find_file(tree, &format!("{name}.ko"))? {
            fs::rename(path, modules.join(format!("{number:02}-{name}.ko")))?;
        }
    }
    Ok(())
}

fn find_file(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(path) = find_file(&entry.path(), name)? {
                return Ok(Some(path));
            }
        } else if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn find_kernel(boot: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(boot).with_context(|| format!("cannot list {}", boot.display()))? {
        let path = entry?.path();
        if path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with("vmlinuz-")) {
            return Ok(path);
        }
    }
    bail!("no vmlinuz in {}", boot.display())
}

/// Builds the test guest as a static program and packs it. Cargo decides whether there is anything to build.
fn setup_initramfs(workspace: &Workspace) -> Result<()> {
    let target_directory = workspace.root.join("target/guest");
    let mut build = cargo(&workspace.root);
    build
        .args(["build", "--quiet", "--release", "--package", "vmferry-guest", "--bin", "vmferry-guest-init"])
        .args(["--target", GUEST_TARGET, "--target-dir"])
        .arg(&target_directory)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    ensure!(passes(&mut build)?, "the test guest does not build; a static C library (package libc6-dev) is needed");
    let binary = target_directory.join(GUEST_TARGET).join("release/vmferry-guest-init");
    let init = fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))?;

    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys"] {
        archive.directory(directory);
    }
    // The kernel opens it for the first process before that can mount anything.
    archive.character_device("dev/console", 5, 1);
    archive.executable("init", &init);
    pack_modules(&workspace.tools.join("kernel/modules"), &mut archive)?;
    if install_file(&workspace.tools.join("initramfs.cpio"), &archive.finish())? {
        println!("packed the test guest");
    }
    Ok(())
}

/// Packs the kernel's modules, where there are any.
fn pack_modules(modules: &Path, archive: &mut Archive) -> Result<()> {
    if !modules.is_dir() {
        return Ok(());
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(modules).with_context(|| format!("cannot list {}", modules.display()))? {
        paths.push(entry?.path());
    }
    paths.sort();
    archive.directory("modules");
    for path in paths {
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().and_then(OsStr::to_str).context("a module's name is text")?;
        archive.file(&format!("modules/{name}"), &content);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_cut_to_major_and_minor() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright";
        assert_eq!(parse_version(debian).as_deref(), Some("7.2"));
        assert_eq!(parse_version("QEMU emulator version 10.0.2").as_deref(), Some("10.0"));
        assert_eq!(parse_version("QEMU emulator version x"), None);
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn the_c_library_stays_the_systems() {
        assert!(is_needed("libaio1"));
        assert!(is_needed("zlib1g"));
        assert!(is_needed("qemu-system-data"));
        assert!(!is_needed("libc6"));
        assert!(!is_needed("passwd"));
    }
}
