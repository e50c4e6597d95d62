//! Two network namespaces that stand for two hosts, and the link between them.
//!
//! ```text
//!   namespace of the source                     namespace of the target
//!   192.0.2.1  ferry0 ───── pair of veth ───── ferry0  192.0.2.2
//!              tbf at its rate                 tbf at its rate
//! ```
//!
//! Both ends are shaped, so that answers pay for the link as well. What goes over it is counted by the interface, below
//! all protocols, and so alike for everybody. The namespaces go when [`Network`] is dropped; those of a program that was
//! killed go at the next start.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

/// Where the target is, as the source sees it.
pub(crate) const TARGET_ADDRESS: &str = "192.0.2.2";
const SOURCE_ADDRESS: &str = "192.0.2.1";
const PREFIX_BITS: u32 = 30;

/// The interface's name at both ends.
const INTERFACE: &str = "ferry0";

/// Jumbo frames, as networks made for migration have. With 1500 bytes the headers alone take 4.4 %.
const MTU_BYTES: u32 = 9000;

/// How names of namespaces begin; the number of the process that made them follows.
const PREFIX: &str = "vmferry-compare-";

/// A segment that the sender's kernel has not cut up yet has up to 64 KiB. A smaller bucket would have tbf cut it.
const BURST_MIN_BYTES: u64 = 96 << 10;
const LIMIT_MIN_BYTES: u64 = 512 << 10;
/// What may go out at once after a pause: twice the time after which a timer that is late is served.
const BURST_MS: u64 = 2;
/// What may wait. More than TCP needs on a path without delay, and not so much that a request waits long behind it.
const LIMIT_MS: u64 = 10;

/// The links, by what they carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Link {
    /// 100 Mbit/s
    #[value(name = "100mbit")]
    Mbit100,
    /// 1 Gbit/s
    #[value(name = "1gbit")]
    Gbit1,
    /// As fast as the kernel copies
    #[value(name = "unshaped")]
    Unshaped,
}

impl Link {
    pub(crate) const ALL: [Self; 3] = [Self::Mbit100, Self::Gbit1, Self::Unshaped];

    /// Its name on the command line and in tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Mbit100 => "100mbit",
            Self::Gbit1 => "1gbit",
            Self::Unshaped => "unshaped",
        }
    }

    /// The one with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|link| link.name() == name)
    }

    /// What it carries, `None` where nothing limits it.
    pub(crate) const fn rate_bits_per_s(self) -> Option<u64> {
        match self {
            Self::Mbit100 => Some(100_000_000),
            Self::Gbit1 => Some(1_000_000_000),
            Self::Unshaped => None,
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Mbit100 => "100 Mbit/s",
            Self::Gbit1 => "1 Gbit/s",
            Self::Unshaped => "unshaped",
        })
    }
}

/// How a link of this rate is shaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    rate_bits_per_s: u64,
    burst_bytes: u64,
    limit_bytes: u64,
}

impl Shape {
    fn of(rate_bits_per_s: u64) -> Self {
        let bytes_in = |time_ms: u64| rate_bits_per_s / 8 * time_ms / 1000;
        Self {
            rate_bits_per_s,
            burst_bytes: bytes_in(BURST_MS).max(BURST_MIN_BYTES),
            limit_bytes: bytes_in(LIMIT_MS).max(LIMIT_MIN_BYTES),
        }
    }
}

/// Which of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Source, Self::Target];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// The programs of iproute2.
#[derive(Debug, Clone)]
pub(crate) struct NetworkTools {
    pub(crate) ip: PathBuf,
    pub(crate) tc: PathBuf,
}

/// The two namespaces with their link; removed when dropped.
#[derive(Debug)]
pub(crate) struct Network {
    tools: NetworkTools,
}

impl Network {
    /// Makes them, unshaped.
    ///
    /// # Errors
    /// Without the right to, and where the kernel or the programs are not there.
    pub(crate) fn create(tools: NetworkTools) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "network namespaces need root: run this as root, or in a container or virtual machine where you are root"
        );
        remove_left_over(&tools.ip);
        // From here on what was made is removed, whatever fails.
        let network = Self { tools };
        for side in Side::BOTH {
            network
                .ip(&["netns", "add", &namespace(side)])
                .context("cannot make a network namespace; in a container it needs the right to mount")?;
        }
        let [source, target] = Side::BOTH.map(namespace);
        network
            .ip(&[
                "link", "add", INTERFACE, "netns", &source, "type", "veth", "peer", "name", INTERFACE, "netns", &target,
            ])
            .context("cannot make a pair of virtual network interfaces (kernel module veth)")?;
        for (side, address) in [(Side::Source, SOURCE_ADDRESS), (Side::Target, TARGET_ADDRESS)] {
            let name = namespace(side);
            let address = format!("{address}/{PREFIX_BITS}");
            network.ip(&["-n", &name, "address", "add", &address, "dev", INTERFACE])?;
            network.ip(&["-n", &name, "link", "set", INTERFACE, "mtu", &MTU_BYTES.to_string(), "up"])?;
            network.ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    /// Makes the link carry what it is to carry, from now on.
    pub(crate) fn shape(&self, link: Link) -> Result<()> {
        for side in Side::BOTH {
            let name = namespace(side);
            match link.rate_bits_per_s() {
                Some(rate) => {
                    let Shape { rate_bits_per_s, burst_bytes, limit_bytes } = Shape::of(rate);
                    let (rate, burst, limit) =
                        (format!("{rate_bits_per_s}bit"), format!("{burst_bytes}b"), format!("{limit_bytes}b"));
                    let tbf = ["root", "tbf", "rate", &rate, "burst", &burst, "limit", &limit];
                    let place = ["-n", &name, "qdisc", "replace", "dev", INTERFACE];
                    self.tc(&[&place[..], &tbf].concat()).context("cannot shape the link (kernel module sch_tbf)")?;
                }
                // An error where it was not shaped.
                None => drop(self.tc(&["-n", &name, "qdisc", "delete", "dev", INTERFACE, "root"])),
            }
        }
        Ok(())
    }

    /// A command that runs a program on one of the hosts. `ip` replaces itself with it, so the process is the program.
    pub(crate) fn command(&self, side: Side, program: &Path) -> Command {
        let mut command = Command::new(&self.tools.ip);
        command.args(["netns", "exec", &namespace(side)]).arg(program);
        command
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        run(&self.tools.ip, arguments)
    }

    fn tc(&self, arguments: &[&str]) -> Result<()> {
        run(&self.tools.tc, arguments)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for side in Side::BOTH {
            // Fails where it was not made. The interfaces go with their namespaces.
            drop(self.ip(&["netns", "delete", &namespace(side)]));
        }
    }
}

/// Bytes that went over the link so far, in both directions, as the source's interface counts them.
///
/// # Errors
/// When this process, which has to run on the source's host, is gone.
pub(crate) fn wire_bytes(source_process: u32) -> Result<u64> {
    let path = format!("/proc/{source_process}/net/dev");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    interface_bytes(&text, INTERFACE).with_context(|| format!("{path} does not count {INTERFACE}"))
}

/// Received and sent bytes of an interface in the form of `/proc/net/dev`: after the name and a colon eight numbers about
/// what was received, the first of them its bytes, and eight about what was sent.
fn interface_bytes(text: &str, interface: &str) -> Option<u64> {
    let counters = text.lines().find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    let counters: Vec<u64> = counters.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
    Some(counters.first()? + counters.get(8)?)
}

fn namespace(side: Side) -> String {
    format!("{PREFIX}{}-{}", std::process::id(), side.name())
}

/// The process that made a namespace of this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// Removes the namespaces of programs that have ended.
fn remove_left_over(ip: &Path) {
    let Ok(output) = Command::new(ip).args(["netns", "list"]).stdin(Stdio::null()).output() else { return };
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let name = line.split(' ').next().unwrap_or_default();
        if owner(name).is_some_and(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
            // What cannot be removed is not in the way.
            drop(run(ip, &["netns", "delete", name]));
        }
    }
}

fn run(program: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {} failed: {}", program.display(), arguments.join(" "), said.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_counts_both_directions() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       5       1    0    0    0     0          0         0        5       1    0    0    0     0       0          0
ferry0: 1000017      15    0    0    0     0          0         0 20000300      15    0    0    0     0       0          0
";
        assert_eq!(interface_bytes(text, "ferry0"), Some(21_000_317));
        assert_eq!(interface_bytes(text, "ferry"), None);
        assert_eq!(interface_bytes("ferry0: 1 2 3\n", "ferry0"), None);
        assert_eq!(interface_bytes("", "ferry0"), None);
    }

    #[test]
    fn a_segment_fits_into_the_bucket_and_a_fast_link_has_a_larger_one() {
        assert_eq!(Shape::of(100_000_000).burst_bytes, BURST_MIN_BYTES);
        assert_eq!(Shape::of(100_000_000).limit_bytes, LIMIT_MIN_BYTES);
        assert_eq!(Shape::of(1_000_000_000).burst_bytes, 250_000);
        assert_eq!(Shape::of(1_000_000_000).limit_bytes, 1_250_000);
    }

    #[test]
    fn only_our_own_namespaces_have_an_owner() {
        assert_eq!(owner(&namespace(Side::Source)), Some(std::process::id()));
        assert_eq!(owner("vmferry-compare-17-target"), Some(17));
        assert_eq!(owner("vmferry-compare-x-target"), None);
        assert_eq!(owner("blue"), None);
    }
}
