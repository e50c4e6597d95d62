//! Debian packages without installing them: apt with a configuration of its own.
//!
//! apt runs on private lists, a private cache and an *empty* package database. The last means that a package's whole
//! dependency closure is computed, whatever this machine has installed: the result is the same everywhere, and packages
//! here can neither conflict with it nor later vanish from under it. Signatures are checked as always. Nothing of the
//! system's apt is written, and root is not needed.
//!
//! The mirror is the one this machine already uses, read from its own sources at run time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{capture, is_on_path};
use crate::workspace::remove_directory;

/// The release whose packages are used.
pub(crate) const CODENAME: &str = "bookworm";

/// Where Debian keeps its archive keys.
const ARCHIVE_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Attempts at a download, and the pause between two of them.
const ATTEMPTS_MAX: u32 = 4;
const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// apt on a directory of its own.
#[derive(Debug)]
pub(crate) struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Sets up a private apt in `directory` and fetches the package lists.
    ///
    /// # Errors
    /// When this is not Debian 12, when its sources name no mirror for it, or when the mirror cannot be reached.
    pub(crate) fn prepare(directory: &Path) -> Result<Self> {
        check_distribution()?;
        let sources = derive_sources(&system_sources()?)?;
        remove_directory(directory)?;
        for name in ["state/lists/partial", "cache/archives/partial", "parts"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        fs::write(directory.join("sources.list"), sources)?;
        fs::write(directory.join("status"), "")?;
        // Read after the system's configuration, whose proxies are kept. Its hooks are not: they belong to the system.
        fs::write(directory.join("apt.conf"), "#clear APT::Update;\n#clear DPkg;\nAPT::Sandbox::User \"root\";\n")?;
        let apt = Self { directory: directory.to_path_buf() };
        retry("fetching the package lists", || capture(apt.command("apt-get").args(["-q", "update"])))?;
        Ok(apt)
    }

    /// Downloads a package with all it depends on, into the directory `name` of this apt; returns the files.
    pub(crate) fn download_closure(&self, name: &str, package: &str, suite: Option<&str>) -> Result<Vec<PathBuf>> {
        let archives = self.directory.join(name);
        remove_directory(&archives)?;
        fs::create_dir_all(archives.join("partial"))?;
        retry(&format!("downloading {package}"), || {
            let mut command = self.command("apt-get");
            command.arg("-o").arg(format!("Dir::Cache::archives={}", archives.display()));
            command.args(["-qq", "-y", "--no-install-recommends", "--download-only"]);
            if let Some(suite) = suite {
                command.args(["-t", suite]);
            }
            capture(command.args(["install", package]))
        })?;
        debs_in(&archives)
    }

    /// Downloads one package, without what it depends on.
    pub(crate) fn download(&self, name: &str, package: &str) -> Result<PathBuf> {
        let archives = self.directory.join(name);
        remove_directory(&archives)?;
        fs::create_dir_all(&archives)?;
        retry(&format!("downloading {package}"), || {
            capture(self.command("apt-get").current_dir(&archives).args(["-qq", "download", package]))
        })?;
        debs_in(&archives)?.pop().with_context(|| format!("apt-get download {package} left no file"))
    }

    /// The first package that `package` depends on and whose name starts with `prefix`.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let listing = capture(self.command("apt-cache").args(["depends", package]))?;
        dependency_in(&listing, prefix)
            .with_context(|| format!("package {package} depends on nothing that starts with {prefix}"))
    }

    fn command(&self, program: &str) -> Command {
        let path = |name: &str| self.directory.join(name).display().to_string();
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command.arg("-c").arg(path("apt.conf"));
        for (option, value) in [
            ("Dir::Etc::sourcelist", path("sources.list")),
            ("Dir::Etc::sourceparts", path("parts")),
            ("Dir::Etc::preferences", path("preferences")),
            ("Dir::Etc::preferencesparts", path("parts")),
            ("Dir::State", path("state")),
            ("Dir::State::status", path("status")),
            ("Dir::Cache", path("cache")),
            ("Debug::NoLocking", "true".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("Acquire::Retries", "3".to_owned()),
            // Without it an unreachable mirror is only a warning, and the packages are "not found" later.
            ("APT::Update::Error-Mode", "any".to_owned()),
            // Absent files of these kinds are no loss, and some mirrors carry them broken.
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".to_owned()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command
    }
}

/// The name of the package in a `.deb` file's name.
pub(crate) fn package_name(deb: &Path) -> &str {
    let name = deb.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.split_once('_').map_or(name, |(package, _)| package)
}

/// Unpacks a package's files below `root`.
pub(crate) fn unpack(deb: &Path, root: &Path) -> Result<()> {
    capture(Command::new("dpkg-deb").arg("-x").arg(deb).arg(root)).map(drop)
}

fn check_distribution() -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |key: &str| {
        let prefix = format!("{key}=");
        release.lines().find_map(|line| line.strip_prefix(&prefix)).unwrap_or_default().trim_matches('"').to_owned()
    };
    let (id, codename) = (field("ID"), field("VERSION_CODENAME"));
    ensure!(
        id == "debian" && codename == CODENAME,
        "packages are taken from Debian 12 ({CODENAME}), and this system is {}",
        if id.is_empty() { "unknown".to_owned() } else { format!("{id} {codename}") },
    );
    for program in ["apt-get", "apt-cache", "dpkg-deb"] {
        ensure!(is_on_path(program), "the program {program} is missing");
    }
    Ok(())
}

/// One package index of the system's sources: mirror, release as written in the sources, codename if known, component.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Index {
    mirror: String,
    release: String,
    codename: String,
    component: String,
}

/// apt's own reading of `sources.list` and the deb822 files, which needs no lists to have been fetched.
fn system_sources() -> Result<Vec<Index>> {
    let format = "$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)";
    let listing = capture(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    Ok(parse_indexes(&listing))
}

fn parse_indexes(listing: &str) -> Vec<Index> {
    let parse = |line: &str| {
        let mut fields = line.split('|').map(str::to_owned);
        let (mirror, release) = (fields.next()?, fields.next()?);
        Some(Index { mirror, release, codename: fields.next()?, component: fields.next()? })
    };
    listing.lines().filter_map(parse).collect()
}

/// The private sources: what the system has of the release, its updates and its security updates, plus backports from
/// the mirror of the release.
fn derive_sources(indexes: &[Index]) -> Result<String> {
    let is_main = |index: &&Index| index.component == "main";
    let is_release = |index: &&Index| index.release == CODENAME || index.codename == CODENAME;
    let Some(base) = indexes.iter().filter(is_main).find(is_release) else {
        bail!("the system's apt sources name no mirror for {CODENAME} main");
    };
    let backports = format!("{CODENAME}-backports");
    let mut lines = Vec::new();
    for index in indexes.iter().filter(is_main) {
        let extra = [format!("{CODENAME}-updates"), format!("{CODENAME}-security")];
        if is_release(&index) || extra.contains(&index.release) {
            lines.push((index.mirror.as_str(), index.release.as_str()));
        }
    }
    lines.push((&base.mirror, &backports));
    lines.sort_unstable();
    lines.dedup();
    let option =
        if Path::new(ARCHIVE_KEYRING).exists() { format!("[signed-by={ARCHIVE_KEYRING}] ") } else { String::new() };
    Ok(lines.iter().map(|(mirror, release)| format!("deb {option}{mirror} {release} main\n")).collect())
}

fn dependency_in(listing: &str, prefix: &str) -> Option<String> {
    listing
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

fn debs_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut debs = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            debs.push(path);
        }
    }
    debs.sort_unstable();
    ensure!(!debs.is_empty(), "no package was downloaded to {}", directory.display());
    Ok(debs)
}

fn retry<T>(what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let mut attempts = 1;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if attempts == ATTEMPTS_MAX => return Err(error).with_context(|| format!("{what} failed")),
            Err(error) => eprintln!("{what}: attempt {attempts} of {ATTEMPTS_MAX} failed: {error:#}"),
        }
        attempts += 1;
        std::thread::sleep(RETRY_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\
mirror://a/debian/|bookworm|bookworm|main
mirror://a/debian/|bookworm|bookworm|contrib
mirror://a/debian/|bookworm-updates|$(CODENAME)|main
mirror://b/security/|bookworm-security|$(CODENAME)|main
mirror://c/other/|nodistro|$(CODENAME)|main
";

    #[test]
    fn backports_come_from_the_mirror_of_the_release() {
        let sources = derive_sources(&parse_indexes(LISTING)).unwrap();
        let lines: Vec<String> =
            sources.lines().map(|line| line.replace(&format!("[signed-by={ARCHIVE_KEYRING}] "), "")).collect();
        assert_eq!(
            lines,
            [
                "deb mirror://a/debian/ bookworm main",
                "deb mirror://a/debian/ bookworm-backports main",
                "deb mirror://a/debian/ bookworm-updates main",
                "deb mirror://b/security/ bookworm-security main",
            ]
        );
    }

    #[test]
    fn a_release_named_by_its_suite_is_recognised() {
        let sources = derive_sources(&parse_indexes("mirror://a/debian/|oldstable|bookworm|main\n")).unwrap();
        assert!(sources.contains("mirror://a/debian/ oldstable main"));
        assert!(sources.contains("mirror://a/debian/ bookworm-backports main"));
    }

    #[test]
    fn sources_of_something_else_are_refused() {
        assert!(derive_sources(&parse_indexes("mirror://c/other/|nodistro|$(CODENAME)|main\n")).is_err());
    }

    #[test]
    fn the_kernel_behind_the_metapackage_is_found() {
        let listing = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-1-cloud-amd64\n";
        let found = dependency_in(listing, "linux-image-");
        assert_eq!(found.as_deref(), Some("linux-image-6.1.0-1-cloud-amd64"));
        assert_eq!(dependency_in(listing, "linux-headers-"), None);
    }

    #[test]
    fn package_names_end_at_the_version() {
        assert_eq!(package_name(Path::new("/x/libaio1_0.3.113-4_amd64.deb")), "libaio1");
    }
}
