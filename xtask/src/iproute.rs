//! The programs `ip` and `tc`, with which `cargo xtask compare` makes two hosts of one machine.
//!
//! Those of the system are used where it has them. Otherwise the package iproute2 is unpacked:
//!
//! ```text
//! target/tools/
//!   iproute2/ip, tc       start these programs with their own libraries
//!   iproute2/root/        the unpacked packages
//! ```

use std::env;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::apt::{self, Apt, CODENAME};
use crate::run::capture;
use crate::workspace::{Origin, Workspace, install_directory, is_complete, remove_directory};

const PACKAGE: &str = "iproute2";
const PROGRAMS: [&str; 2] = ["ip", "tc"];

/// Where programs of the administrator are, which are not on everybody's PATH.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Starts a program with libraries from beside it. By the loader and not by a variable, which the programs that `ip`
/// starts in turn would inherit.
const WRAPPER: &str = r#"#!/bin/sh
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/root || exit 127
exec /lib64/ld-linux-x86-64.so.2 --library-path "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu" \
    "$root/PROGRAM" "$@"
"#;

/// Where `ip` and `tc` are, fetched if need be.
///
/// # Errors
/// When they are not there and cannot be fetched.
pub(crate) fn programs(workspace: &Workspace) -> Result<[PathBuf; 2]> {
    if let [Some(ip), Some(tc)] = PROGRAMS.map(in_system) {
        return Ok([ip, tc]);
    }
    let _lock = workspace.lock()?;
    let directory = workspace.tools.join(PACKAGE);
    if !is_complete(&directory, None) {
        fetch(workspace, &directory).context(
            "the programs ip and tc are missing and cannot be downloaded; install the package iproute2. The reason",
        )?;
    }
    Ok(PROGRAMS.map(|program| directory.join(program)))
}

fn in_system(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(SYSTEM_DIRECTORIES.map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|path| path.is_file())
}

fn fetch(workspace: &Workspace, directory: &Path) -> Result<()> {
    let scratch = workspace.tools.join(".apt-iproute2");
    println!("downloading {PACKAGE} with its libraries (about 4 MB)");
    let debs = Apt::prepare(&scratch)?.download_closure(PACKAGE, PACKAGE, None)?;
    install_directory(directory, |partial| {
        let root = partial.join("root");
        for deb in debs.iter().filter(|deb| is_needed(apt::package_name(deb))) {
            apt::unpack(deb, &root)?;
        }
        for program in PROGRAMS {
            let inside = ["sbin", "bin", "usr/sbin", "usr/bin"].map(|place| format!("{place}/{program}"));
            // What is a link in the package may be one to an absolute path.
            let is_there = |path: &&String| root.join(path).symlink_metadata().is_ok_and(|found| found.is_file());
            let path = inside.iter().find(is_there).with_context(|| format!("{PACKAGE} holds no {program}"))?;
            let wrapper = partial.join(program);
            let mut file = File::create(&wrapper).with_context(|| format!("cannot create {}", wrapper.display()))?;
            file.write_all(WRAPPER.replace("PROGRAM", path).as_bytes())?;
            file.set_permissions(fs::Permissions::from_mode(0o755))?;
            drop(file);
            let said = capture(Command::new(&wrapper).arg("-V"))?;
            ensure!(said.contains(PACKAGE), "{program} says {said:?} of its version");
        }
        Ok(Origin::Packages(format!("{CODENAME} {PACKAGE}")))
    })?;
    remove_directory(&scratch)
}

/// The C library is left out, since it has to match the dynamic loader, which is the system's.
fn is_needed(package: &str) -> bool {
    package == PACKAGE || package == "zlib1g" || (package.starts_with("lib") && package != "libc6")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_no_system_has_is_not_found() {
        assert_eq!(in_system("no-such-program-of-iproute2"), None);
        assert!(in_system("sh").is_some());
    }

    #[test]
    fn the_c_library_stays_the_systems() {
        assert!(is_needed("libbpf1") && is_needed("iproute2"));
        assert!(!is_needed("libc6") && !is_needed("debconf"));
    }
}
