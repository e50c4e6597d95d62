//! Where the control sockets are: one directory per user, one socket per process that migrates.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Names the directory instead of the usual rules.
pub const RUN_DIRECTORY_VARIABLE: &str = "VMFERRY_RUN_DIR";

/// The directory of this user's control sockets; it need not exist. `VMFERRY_RUN_DIR` if that is set, `/run/vmferry` for
/// root, and `vmferry` in `XDG_RUNTIME_DIR`, or in what systemd makes as such, for others.
///
/// Root's is the same in a login shell and in a service, of which only one has `XDG_RUNTIME_DIR`.
///
/// # Errors
/// If a user other than root has none of these.
pub fn run_directory() -> io::Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = variable(RUN_DIRECTORY_VARIABLE) {
        return Ok(directory);
    }
    let user = rustix::process::geteuid();
    if user.is_root() {
        return Ok("/run/vmferry".into());
    }
    let systemd = || Some(PathBuf::from(format!("/run/user/{}", user.as_raw()))).filter(|path| path.is_dir());
    match variable("XDG_RUNTIME_DIR").or_else(systemd) {
        Some(directory) => Ok(directory.join("vmferry")),
        None => {
            let text = format!("neither XDG_RUNTIME_DIR nor {RUN_DIRECTORY_VARIABLE} is set");
            Err(io::Error::new(io::ErrorKind::NotFound, text))
        }
    }
}

/// Makes the directory, for its owner alone, or checks that it is so.
pub(super) fn make_private(directory: &Path) -> io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let found = std::fs::symlink_metadata(directory)?;
    let is_ours = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw();
    if !is_ours || found.mode() & 0o077 != 0 {
        let text = "it must be a directory that is ours and that nobody else can enter (mode 0700)";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

/// The process that a socket's name stands for.
pub(super) fn pid_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".sock")?.parse().ok().filter(|pid| format!("{pid}.sock") == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_others() {
        let pid = |name: &str| pid_of(Path::new(name));
        assert_eq!(pid("/run/vmferry/4711.sock"), Some(4711));
        for other in ["4711", "4711.socket", ".4711.new", "+1.sock", "01.sock", "-1.sock", "x.sock", "9999999999.sock"]
        {
            assert_eq!(pid(other), None, "{other}");
        }
    }
}
