//! Control groups with a quota of processor time, one for each thread.
//!
//! ```text
//!   before            while slowed                                       afterwards
//!   G: all threads    G: the VMM's other threads                         G: all threads
//!                     └─ vmferry-PID-TID: one processor's, with a quota
//! ```
//!
//! A group lies below the one that the thread is in, so all limits that the thread has stay. With version 2 it is a
//! *threaded* group, which shares everything with G but the processor. That needs the controller `cpu` in G, where whoever
//! manages G may have left it out: then this way is closed. Nothing above G is changed.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{PERIOD, ThrottleError};

/// How often a group is emptied: threads that a thread in it starts are in it, too.
const EMPTYING_ATTEMPTS: usize = 8;
/// The most bytes of a list that is read.
const MAX_LIST_BYTES: u64 = 1 << 20;

/// The version of the hierarchy that the controller `cpu` is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// The file of a group that lists its threads, and takes them in.
    fn threads_file(self) -> &'static str {
        match self {
            Self::V1 => "tasks",
            Self::V2 => "cgroup.threads",
        }
    }
}

/// Where a thread was, and our group below that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    tid: u32,
    version: Version,
    parent: PathBuf,
    group: PathBuf,
    /// The controller has to be switched on in the parent, and off again afterwards.
    enable: bool,
}

/// The groups of a guest's processors. It can be written down, so that another process can undo what was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Groups {
    places: Vec<Place>,
}

impl Groups {
    /// Finds out where the threads are. Nothing is changed.
    ///
    /// # Errors
    /// [`ThrottleError`], also where the hierarchy cannot be used.
    pub(crate) fn find(pid: u32, tids: &[u32]) -> Result<Self, ThrottleError> {
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let places = tids.iter().map(|&tid| {
            let membership = read(&PathBuf::from(format!("/proc/{pid}/task/{tid}/cgroup")))?;
            let (version, parent) = locate(&membership, &mounts).ok_or(ThrottleError::NoGroup {
                why: "no hierarchy of control groups with the controller `cpu` can be seen from here",
            })?;
            let name = format!("vmferry-{pid}-{tid}");
            // Left from before, where nobody could undo it.
            let parent = if parent.ends_with(&name) { parent.parent().map(Path::to_owned) } else { Some(parent) };
            let parent = parent.ok_or(ThrottleError::NoGroup { why: "the thread's control group has no parent" })?;
            let has_cpu = |list: String| list.split_ascii_whitespace().any(|controller| controller == "cpu");
            let enable = version == Version::V2 && {
                if !has_cpu(read(&parent.join("cgroup.controllers"))?) {
                    return Err(ThrottleError::NoGroup {
                        why: "the controller `cpu` is not switched on for the VMM's control group",
                    });
                }
                !has_cpu(read(&parent.join("cgroup.subtree_control"))?)
            };
            Ok(Place { tid, version, group: parent.join(name), parent, enable })
        });
        Ok(Self { places: places.collect::<Result<_, _>>()? })
    }

    /// Puts each thread into its group, with this share as quota.
    ///
    /// # Errors
    /// [`ThrottleError`]; some of it may have been done: [`Self::undo`].
    pub(crate) fn apply(&self, share: f64) -> Result<(), ThrottleError> {
        self.places.iter().try_for_each(|place| place.apply(share))
    }

    /// Puts the threads back, and removes the groups. What was done already, or never, is no error, nor is it that a thread
    /// or a group is no more.
    ///
    /// # Errors
    /// [`ThrottleError`]; as much as possible was undone.
    pub(crate) fn undo(&self) -> Result<(), ThrottleError> {
        let undone: Vec<_> = self.places.iter().map(Place::undo).collect();
        let is_empty = undone.iter().all(Result::is_ok);
        undone.into_iter().collect::<Result<(), _>>()?;
        for place in self.places.iter().filter(|place| place.enable && is_empty) {
            // Where others have come to use it meanwhile, it is theirs.
            if let Err(error) = write(&place.parent.join("cgroup.subtree_control"), "-cpu") {
                tracing::debug!(%error, "the controller stays on");
            }
        }
        Ok(())
    }
}

impl Place {
    fn apply(&self, share: f64) -> Result<(), ThrottleError> {
        let failed = |what, path: PathBuf| move |source| ThrottleError::Group { what, path, source };
        if self.enable {
            let path = self.parent.join("cgroup.subtree_control");
            write(&path, "+cpu").map_err(failed("switch on the controller `cpu`", path))?;
        }
        match fs::create_dir(&self.group) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(failed("make a control group", self.group.clone())(error));
            }
            Ok(()) | Err(_) => {}
        }
        let set = |name: &str, what, value: &str| {
            let path = self.group.join(name);
            write(&path, value).map_err(failed(what, path))
        };
        let period_us = PERIOD.as_micros();
        let quota_us = (PERIOD.as_secs_f64() * share * 1e6).round();
        match self.version {
            Version::V1 => {
                set("cpu.cfs_period_us", "set the period", &period_us.to_string())?;
                set("cpu.cfs_quota_us", "set the quota", &quota_us.to_string())?;
            }
            Version::V2 => {
                let path = self.group.join("cgroup.type");
                if fs::read_to_string(&path).is_ok_and(|kind| kind.trim() != "threaded") {
                    write(&path, "threaded").map_err(failed("make the control group a threaded one", path))?;
                }
                set("cpu.max", "set the quota", &format!("{quota_us} {period_us}"))?;
            }
        }
        set(self.version.threads_file(), "put a thread into the control group", &self.tid.to_string())
    }

    fn undo(&self) -> Result<(), ThrottleError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| ThrottleError::Group { what, path, source }
        };
        let home = self.parent.join(self.version.threads_file());
        for _ in 0..EMPTYING_ATTEMPTS {
            match fs::remove_dir(&self.group) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
                Err(error) => return Err(failed("remove a control group", &self.group)(error)),
            }
            let members = read(&self.group.join(self.version.threads_file()))?;
            for tid in members.split_ascii_whitespace() {
                match write(&home, tid) {
                    // The thread has ended.
                    Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
                    result => result.map_err(failed("put a thread back into its control group", &home))?,
                }
            }
        }
        Err(ThrottleError::Occupied { path: self.group.clone() })
    }
}

/// Writes to a file that is there.
fn write(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

fn read(path: &Path) -> Result<String, ThrottleError> {
    use std::io::Read;
    let mut text = String::new();
    let opened = fs::File::open(path).and_then(|file| file.take(MAX_LIST_BYTES).read_to_string(&mut text));
    match opened {
        Ok(_) => Ok(text),
        Err(source) => Err(ThrottleError::Group { what: "read a file", path: path.to_owned(), source }),
    }
}

/// The directory of the group that limits a thread's processor time, from its `/proc/PID/task/TID/cgroup` and our
/// `/proc/self/mountinfo`. In a hierarchy of version 1 if there is one for the controller `cpu`, which then is not in that
/// of version 2.
fn locate(membership: &str, mounts: &str) -> Option<(Version, PathBuf)> {
    let groups = || membership.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let in_v1 = groups().find(|(controllers, _)| controllers.split(',').any(|controller| controller == "cpu"));
    let (version, path) = match in_v1 {
        Some((_, path)) => (Version::V1, path),
        None => (Version::V2, groups().find(|(controllers, _)| controllers.is_empty())?.1),
    };
    mounts.lines().find_map(|line| {
        // 36 35 98:0 /root /point options optional... - type source super-options
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(3);
        let (root, point) = (front.next()?, front.next()?);
        let mut back = back.split(' ');
        let (kind, options) = (back.next()?, back.nth(1)?);
        let is_it = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "cpu"),
            Version::V2 => kind == "cgroup2",
        };
        // A thread outside of the part that is mounted is shown as `/../…`, and cannot be reached.
        let below = Path::new(path).strip_prefix(root).ok()?;
        let is_below = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        (is_it && is_below).then(|| (version, Path::new(point).join(below)))
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Busy, until};
    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate";
    const UNIFIED: &str = "\
25 24 0:22 / /sys rw - sysfs sysfs rw
26 25 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
    const CONTAINER: &str = "26 25 0:23 /pods/one /sys/fs/cgroup ro - cgroup2 cgroup rw";

    #[test]
    fn a_threads_group_is_found_in_either_version() {
        let found = |membership, mounts| {
            locate(membership, mounts).map(|(version, path)| (version, path.display().to_string()))
        };
        let v1 = "5:cpuset:/\n4:cpu,cpuacct:/machine/vm1\n0::/elsewhere\n";
        assert_eq!(found(v1, HYBRID), Some((Version::V1, "/sys/fs/cgroup/cpu,cpuacct/machine/vm1".to_owned())));
        let v2 = "0::/machine.slice/vm1.scope/libvirt/vcpu0\n";
        let expected = "/sys/fs/cgroup/machine.slice/vm1.scope/libvirt/vcpu0";
        assert_eq!(found(v2, UNIFIED), Some((Version::V2, expected.to_owned())));
        assert_eq!(found("0::/\n", UNIFIED), Some((Version::V2, "/sys/fs/cgroup/".to_owned())));
        assert_eq!(found("0::/a:b\n", UNIFIED), Some((Version::V2, "/sys/fs/cgroup/a:b".to_owned())));
        assert_eq!(found("0::/pods/one/qemu\n", CONTAINER), Some((Version::V2, "/sys/fs/cgroup/qemu".to_owned())));
        assert_eq!(found("0::/pods/two\n", CONTAINER), None, "not mounted here");
        assert_eq!(found("0::/../vm1\n", UNIFIED), None, "outside of our namespace");
        assert_eq!(found("4:cpu:/vm1\n0::/vm1\n", UNIFIED), None, "in a hierarchy that is not mounted here");
        assert_eq!(found("", HYBRID), None);
    }

    /// Where the system lets us, a process is put into a group and back; where it does not, nothing of it stays.
    #[test]
    fn a_thread_goes_into_a_group_and_comes_back() {
        let busy = Busy::start();
        let before = busy.file("cgroup");
        let groups = match Groups::find(busy.pid(), &[busy.pid()]) {
            Ok(groups) => groups,
            Err(ThrottleError::NoGroup { why }) => return assert!(why.contains("`cpu`"), "{why}"),
            Err(error) => panic!("{error}"),
        };
        // Nothing was done yet.
        groups.undo().unwrap();
        let place = groups.places[0].clone();
        match groups.apply(0.5) {
            Ok(()) => {
                let quota = |place: &Place| match place.version {
                    Version::V1 => fs::read_to_string(place.group.join("cpu.cfs_quota_us")).unwrap(),
                    Version::V2 => fs::read_to_string(place.group.join("cpu.max")).unwrap(),
                };
                assert!(
                    busy.file("cgroup").contains(&format!("/vmferry-{0}-{0}", busy.pid())),
                    "{}",
                    busy.file("cgroup")
                );
                assert!(quota(&place).starts_with("10000"), "{}", quota(&place));
                groups.apply(0.05).unwrap();
                assert!(quota(&place).starts_with("1000"), "{}", quota(&place));
                assert!(!quota(&place).starts_with("10000"), "{}", quota(&place));
                let before = busy.ticks();
                until("it goes on all the same", || busy.ticks() > before);
                // Found anew by somebody who does not know of it, it is the same group.
                assert_eq!(Groups::find(busy.pid(), &[busy.pid()]).unwrap().places[0].group, place.group);
            }
            // No right, or a file system that cannot be written to.
            Err(ThrottleError::Group { path, .. }) => assert!(path.starts_with(&place.parent), "{}", path.display()),
            Err(error) => panic!("{error}"),
        }
        groups.undo().unwrap();
        groups.undo().unwrap();
        assert_eq!(busy.file("cgroup"), before);
        assert!(!place.group.exists());
    }

    #[test]
    fn groups_of_a_process_that_has_ended_are_removed() {
        let busy = Busy::start();
        let Ok(groups) = Groups::find(busy.pid(), &[busy.pid()]) else { return };
        let applied = groups.apply(0.5);
        drop(busy);
        until("its group is removed", || groups.undo().is_ok());
        assert!(groups.places.iter().all(|place| !place.group.exists()));
        assert!(groups.apply(0.5).is_err() || applied.is_err(), "there is no such thread");
        groups.undo().unwrap();
    }
}
