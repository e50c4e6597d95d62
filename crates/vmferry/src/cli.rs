//! The command line: every flag, once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmferry_guest::Pattern;
use vmferry_host::{MigrateOptions, PredictorKind};

use crate::units;

/// Moves a running virtual machine to another host while it works: predicts the guest's working set, sends everything
/// else first, and moves the working set when the guest is paused.
#[derive(Debug, Parser)]
#[command(name = "vmferry", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    the guest runs on the target (and, with --verify, nothing differs); inspect: it can be moved
  1    failed; the guest runs on the source. inspect: the guest cannot be moved as it is
  2    the command line is wrong
  3    no convergence: what remains never fitted the downtime limit; the guest runs on the source
  4    in doubt: the hand-over was sent and not answered; see the report for what to do
  130  cancelled; the guest runs on the source

Set RUST_LOG=info (or debug, trace) to see what happens on standard error.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move a guest between two processes on this machine and show how it went
    #[command(after_help = "\
Examples:
  vmferry demo                                   a guest in a process of its own; no root, no QEMU
  vmferry demo --pattern zipf --verify           compare all memory before the hand-over
  vmferry demo --bandwidth 100MB/s --downtime-limit 100ms --predictor none
  vmferry demo --vmm qemu --json                 two stock QEMU processes with a Linux guest (as root)")]
    Demo(DemoArgs),
    /// Say whether a QEMU guest can be moved, and if not, what to change
    #[command(after_help = "Example:\n  vmferry inspect --qmp /run/vm1/qmp.sock")]
    Inspect(InspectArgs),
    /// Wait for a guest: run this on the target host, for a QEMU started with `-incoming defer`
    #[command(after_help = "\
Examples:
  vmferry receive --listen 0.0.0.0:7700 --qmp /run/vm1/qmp.sock
  vmferry receive --listen 127.0.0.1:0 --qmp ./target.qmp --json

The connection is not encrypted yet: use it on a network that you trust.")]
    Receive(ReceiveArgs),
    /// Move a guest: run this on the source host
    #[command(after_help = "\
Examples:
  vmferry migrate --qmp /run/vm1/qmp.sock --to 192.0.2.7:7700
  vmferry migrate --qmp /run/vm1/qmp.sock --to 192.0.2.7:7700 --bandwidth 1Gbit/s --downtime-limit 100ms --verify

The connection is not encrypted yet: use it on a network that you trust.")]
    Migrate(MigrateArgs),
    /// Print shell completions
    #[command(after_help = "Example:\n  vmferry completions bash > /etc/bash_completion.d/vmferry")]
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Write man pages into a directory
    #[command(after_help = "Example:\n  vmferry man /usr/local/share/man/man1")]
    Man {
        /// The directory
        directory: PathBuf,
    },
    /// The embedded guest's process; its parent is at the other end of standard input
    #[command(hide = true)]
    EmbeddedGuest,
    /// The guard process; its parent is at the other end of standard input
    #[command(hide = true)]
    Guard,
}

/// How to migrate.
#[derive(Debug, Clone, Args)]
pub(crate) struct Tuning {
    /// The longest pause, for instance 300ms
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::time)]
    pub(crate) downtime_limit: Duration,
    /// Who predicts the working set
    #[arg(long, value_enum, default_value_t = Predictor::Lcbst)]
    pub(crate) predictor: Predictor,
    /// Compare digests of all pages while the guest is paused, and hand over only if nothing differs. The comparison
    /// takes its time from the downtime, beside the limit
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print the report as one JSON document on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Time between two scans for written pages
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = units::time)]
    pub(crate) epoch: Duration,
    /// How long to watch the guest before the first page is sent
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::time)]
    pub(crate) observe: Duration,
    /// How long the other side may be silent
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::time)]
    pub(crate) stall_timeout: Duration,
}

impl Tuning {
    /// The same for the engine.
    pub(crate) fn options(&self, bandwidth_bytes_per_s: Option<u64>) -> Result<MigrateOptions, String> {
        const EPOCH_MIN: Duration = Duration::from_millis(1);
        const EPOCH_MAX: Duration = Duration::from_secs(1);
        if !(EPOCH_MIN..=EPOCH_MAX).contains(&self.epoch) {
            return Err("--epoch must be between 1ms and 1s".to_owned());
        }
        if self.stall_timeout < 2 * self.epoch {
            return Err("--stall-timeout must be at least twice the epoch: the target is heard once in each".to_owned());
        }
        Ok(MigrateOptions {
            downtime_limit: self.downtime_limit,
            bandwidth_bytes_per_s,
            predictor: match self.predictor {
                Predictor::Lcbst => PredictorKind::Lcbst,
                Predictor::None => PredictorKind::None,
            },
            verify: self.verify,
            epoch: self.epoch,
            observe: self.observe,
            stall_timeout: self.stall_timeout,
            ..MigrateOptions::default()
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Predictor {
    /// A lazy counting-based splay tree over the pages written
    Lcbst,
    /// None: plain pre-copy
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Vmm {
    /// A process of our own that writes its memory and checks it
    Embedded,
    /// Two stock QEMU processes with a Linux guest that does the same
    Qemu,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// What runs the guest
    #[arg(long, value_enum, default_value_t = Vmm::Embedded)]
    pub(crate) vmm: Vmm,
    /// The guest's RAM
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = units::bytes)]
    pub(crate) memory: u64,
    /// The part of it that the guest keeps rewriting, in the patterns hot and phases
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = units::bytes)]
    pub(crate) hot: u64,
    /// Page writes per second (20000), or a rate in bytes (80MB/s); 0 is as fast as possible
    #[arg(long, value_name = "RATE", default_value = "20000", value_parser = units::write_rate)]
    pub(crate) write_rate: u64,
    /// Which pages the guest writes: idle, hot, zipf, sweep or phases
    #[arg(long, default_value = "hot", value_parser = pattern)]
    pub(crate) pattern: Pattern,
    /// The most to send per second; `none` for as much as loopback carries
    #[arg(long, value_name = "RATE", default_value = "1Gbit/s", value_parser = bandwidth)]
    pub(crate) bandwidth: Bandwidth,
    /// Seed of the guest's writes
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Writer threads of the guest
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: u32,
    /// Do it so many times; the first that fails ends it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,
    /// How to migrate.
    #[command(flatten)]
    pub(crate) tuning: Tuning,
    /// QEMU to start (--vmm qemu) [default: those that `cargo xtask setup` unpacked, else qemu-system-x86_64]
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,
    /// Linux kernel image of the guest (--vmm qemu) [default: that of `cargo xtask setup`]
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk with the test guest (--vmm qemu) [default: that of `cargo xtask setup`]
    #[arg(long, value_name = "PATH")]
    pub(crate) initrd: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct InspectArgs {
    /// QEMU's QMP socket
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// QEMU's process, where the QMP socket was made by another one
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// Print findings and facts as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ReceiveArgs {
    /// Where to wait for the source; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// QMP socket of the QEMU that waits with `-incoming defer`
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// QEMU's process, where the QMP socket was made by another one
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// How long the source may be silent
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::time)]
    pub(crate) stall_timeout: Duration,
    /// Print the report as one JSON document on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct MigrateArgs {
    /// QEMU's QMP socket
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// Where `vmferry receive` waits: HOST:PORT
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: String,
    /// QEMU's process, where the QMP socket was made by another one
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// The most to send per second, for instance 1Gbit/s or 100MB/s [default: as the path allows]
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    pub(crate) bandwidth: Option<u64>,
    /// End the source's QEMU once the guest runs on the target
    #[arg(long)]
    pub(crate) quit_source: bool,
    /// How to migrate.
    #[command(flatten)]
    pub(crate) tuning: Tuning,
}

/// A bandwidth or none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bandwidth(pub(crate) Option<u64>);

fn bandwidth(text: &str) -> Result<Bandwidth, String> {
    if text == "none" { Ok(Bandwidth(None)) } else { units::rate(text).map(|rate| Bandwidth(Some(rate))) }
}

fn pattern(text: &str) -> Result<Pattern, String> {
    text.parse().map_err(|_| {
        let all: Vec<String> = Pattern::ALL.iter().map(ToString::to_string).collect();
        format!("`{text}` is no pattern; choose one of {}", all.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
