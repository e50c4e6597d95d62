//! Where things are: the workspace, `target/tools/`, and the stamps that say that a tool is complete.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};

/// Changed whenever what `setup` unpacks changes, so that older trees are fetched again.
const STAMP_FORMAT: &str = "vmferry-tools 1";

/// The workspace this xtask belongs to.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) tools: PathBuf,
}

impl Workspace {
    /// Finds the workspace from the package directory Cargo names, so the current directory does not matter.
    pub(crate) fn locate() -> Result<Self> {
        let package =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = package.parent().context("the xtask package has no parent directory")?.to_path_buf();
        // Not CARGO_TARGET_DIR: tests look in one fixed place, whatever directory they were built in.
        let tools = root.join("target/tools");
        Ok(Self { root, tools })
    }

    /// Holds off other set-ups of the same workspace until the returned file is dropped.
    pub(crate) fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.tools).with_context(|| format!("cannot create {}", self.tools.display()))?;
        let path = self.tools.join(".lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }
}

/// Where a tool came from. The stamp in the tool's directory records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Unpacked from a distribution's packages; the text says which.
    Packages(String),
    /// A file the user named in an environment variable.
    User(PathBuf),
}

impl Origin {
    fn line(&self) -> String {
        match self {
            Self::Packages(description) => format!("packages {description}"),
            Self::User(path) => format!("user {}", path.display()),
        }
    }
}

/// Whether `directory` holds a complete tool; with `wanted`, also whether it is the one from there.
pub(crate) fn is_complete(directory: &Path, wanted: Option<&Origin>) -> bool {
    let Ok(stamp) = fs::read_to_string(directory.join("stamp")) else { return false };
    let mut lines = stamp.lines();
    let format_matches = lines.next() == Some(STAMP_FORMAT);
    let origin_line = lines.next();
    format_matches && wanted.is_none_or(|origin| origin_line == Some(&origin.line()))
}

/// Fills a directory under a temporary name, stamps it, and only then gives it its name: a directory with its final
/// name is complete.
pub(crate) fn install_directory(directory: &Path, fill: impl FnOnce(&Path) -> Result<Origin>) -> Result<()> {
    let name = directory.file_name().context("a tool directory needs a name")?.to_string_lossy().into_owned();
    let partial = directory.with_file_name(format!(".{name}.partial"));
    remove_directory(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let origin = fill(&partial)?;
    let stamp = format!("{STAMP_FORMAT}\n{}\n", origin.line());
    fs::write(partial.join("stamp"), stamp)
        .with_context(|| format!("cannot write a stamp in {}", partial.display()))?;
    remove_directory(directory)?;
    fs::rename(&partial, directory).with_context(|| format!("cannot rename to {}", directory.display()))
}

/// Writes a file under a temporary name and renames it. Answers whether the content differed from what was there.
pub(crate) fn install_file(path: &Path, content: &[u8]) -> Result<bool> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(false);
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, content).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("cannot rename to {}", path.display()))?;
    Ok(true)
}

/// Removes a directory with all it holds; one that is not there is fine.
pub(crate) fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("vmferry-xtask-{}-{name}", std::process::id()));
        remove_directory(&path).unwrap();
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn a_failed_fill_leaves_nothing_that_looks_complete() {
        let scratch = scratch("failed-fill");
        let tool = scratch.join("tool");
        let result = install_directory(&tool, |partial| {
            fs::write(partial.join("half"), "x").unwrap();
            anyhow::bail!("the download broke")
        });
        assert!(result.is_err());
        assert!(!tool.exists());
        assert!(!is_complete(&tool, None));

        let origin = Origin::Packages("one".to_owned());
        install_directory(&tool, |_| Ok(origin.clone())).unwrap();
        assert!(is_complete(&tool, None));
        assert!(is_complete(&tool, Some(&origin)));
        assert!(!is_complete(&tool, Some(&Origin::User("/other".into()))));
        assert!(!tool.join("half").exists());
        remove_directory(&scratch).unwrap();
    }

    #[test]
    fn an_unchanged_file_is_left_alone() {
        let scratch = scratch("unchanged");
        let path = scratch.join("file");
        assert!(install_file(&path, b"one").unwrap());
        assert!(!install_file(&path, b"one").unwrap());
        assert!(install_file(&path, b"two").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        remove_directory(&scratch).unwrap();
    }
}
