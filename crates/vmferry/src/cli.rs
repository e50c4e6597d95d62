//! The command line: every flag, once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmferry_core::engine::AtTimeLimit;
use vmferry_core::plan::{IfStuck, PolicySpec};
use vmferry_core::predict::PredictorSpec;
use vmferry_core::wire::MAX_STREAMS;
use vmferry_guest::Pattern;
use vmferry_host::{Compress, MigrateOptions};
use vmferry_sim::sweep::ArmKind;

use crate::{simulate, units};

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
  3    no convergence: what remains never fitted the downtime limit; the guest runs on the source (see --if-stuck).
       The same where --time-limit was over
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
    /// Look at running migrations and change them: limits, holding them, an end
    #[command(after_help = CTL_EXAMPLES)]
    Ctl(CtlArgs),
    /// Record which pages a QEMU guest writes, without moving it
    #[command(after_help = "\
Examples:
  vmferry record --qmp /run/vm1/qmp.sock -o vm1.parquet --duration 60s
  vmferry record --qmp /run/vm1/qmp.sock -o vm1.parquet --epoch 10ms      until Ctrl-C

The file is Parquet; docs/TRACES.md of the sources says what is in it.")]
    Record(RecordArgs),
    /// Look at which pages a QEMU guest writes, live, and whether it could be moved now
    #[command(after_help = "\
Examples:
  vmferry watch --qmp /run/vm1/qmp.sock
  vmferry watch --qmp /run/vm1/qmp.sock --bandwidth 10Gbit/s --downtime-limit 100ms
  vmferry watch --qmp /run/vm1/qmp.sock --json --duration 10s      a line of JSON a second

Keys: q quits, + and - change the bandwidth, ] and [ the downtime limit, p holds the display.")]
    Watch(WatchArgs),
    /// Look at traces, and make them
    Trace(TraceArgs),
    /// Simulate migrations of recorded or generated guests: policies side by side, beside the optimum
    #[command(after_help = SIMULATE_EXAMPLES)]
    Simulate(SimulateArgs),
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
    /// The most time until the guest is paused, counted from the beginning [default: without end]
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub(crate) time_limit: Option<Duration>,
    /// What happens when --time-limit is over: abort leaves the guest where it is (exit code 3); switch pauses it then,
    /// whatever the downtime limit says
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = AtTimeLimitArg::Abort)]
    pub(crate) at_time_limit: AtTimeLimitArg,
    /// Who predicts the working set: lcbst, lru, lfu, none or another, and its parameters, as in lru-k:k=3. A name that is
    /// none is answered with all that are
    #[arg(long, value_name = "SPEC", default_value_t)]
    pub(crate) predictor: PredictorSpec,
    /// Tell the guest's processes apart by their page tables, so that each has a tree of its own. For QEMU; where it
    /// fails, the migration goes on without
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t = Switch::On)]
    pub(crate) address_spaces: Switch,
    /// Who decides what is held back and when to pause: vmferry, qemu, xen, skip-written or stop-and-copy. Those of others
    /// are there to compare with
    #[arg(long, value_name = "NAME", default_value_t = PolicySpec::Vmferry)]
    pub(crate) policy: PolicySpec,
    /// A policy to ask along at every decision; the report says what it would have done. May be given several times
    #[arg(long, value_name = "NAME")]
    pub(crate) shadow: Vec<PolicySpec>,
    /// What to do where what remains does not come to fit the downtime limit: abort leaves the guest where it is; switch
    /// pauses it all the same, for longer than the limit; throttle takes processor time from the guest until it fits
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = IfStuckArg::Abort)]
    pub(crate) if_stuck: IfStuckArg,
    /// Compare digests of all pages while the guest is paused, and hand over only if nothing differs. The comparison
    /// takes its time from the downtime, beside the limit
    #[arg(long)]
    pub(crate) verify: bool,
    /// What is done to pages to make them smaller: auto is what sends them soonest, by the bandwidth and by what the codecs
    /// cost and save; off leaves them as they are, and sends no deltas either
    #[arg(long, value_enum, value_name = "HOW", default_value_t = CompressArg::Auto)]
    pub(crate) compress: CompressArg,
    /// The most to keep of pages that were sent and are written again, so that they go as what differs; 0 for no deltas
    #[arg(long, value_name = "SIZE", default_value = "80MiB", value_parser = units::bytes)]
    pub(crate) delta_cache: u64,
    /// The most connections that carry pages [default: one for each processor, up to 4]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_STREAMS)))]
    pub(crate) streams: Option<u16>,
    /// Print the report as one JSON document on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Time between two scans for written pages; longer where they take long
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = units::time)]
    pub(crate) epoch: Duration,
    /// How long to watch the guest before the first page is sent; saves little traffic for its time
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = units::time)]
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
        let if_stuck = match self.if_stuck {
            IfStuckArg::Abort => IfStuck::Abort,
            IfStuckArg::Switch => IfStuck::Switch,
            IfStuckArg::Throttle => IfStuck::Throttle,
            IfStuckArg::Postcopy => {
                let message = "--if-stuck postcopy is not there yet: vmferry cannot move a guest ahead of its memory; \
                     choose abort, switch or throttle";
                return Err(message.to_owned());
            }
        };
        Ok(MigrateOptions {
            downtime_limit: self.downtime_limit,
            time_limit: self.time_limit,
            at_time_limit: self.at_time_limit.engine(),
            if_stuck,
            bandwidth_bytes_per_s,
            predictor: self.predictor,
            address_spaces: self.address_spaces == Switch::On,
            policy: self.policy,
            shadows: self.shadow.clone(),
            verify: self.verify,
            epoch: self.epoch,
            observe: self.observe,
            stall_timeout: self.stall_timeout,
            compress: match self.compress {
                CompressArg::Auto => Compress::Auto,
                CompressArg::Off => Compress::Off,
                CompressArg::Lz4 => Compress::Lz4,
                CompressArg::Zstd => Compress::Zstd,
            },
            streams: self.streams.unwrap_or_else(vmferry_host::default_streams),
            delta_cache_bytes: self.delta_cache,
            ..MigrateOptions::default()
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AtTimeLimitArg {
    /// End the migration; the guest goes on where it is
    Abort,
    /// Pause the guest then, for as long as what remains takes
    Switch,
}

impl AtTimeLimitArg {
    /// The same for the engine.
    pub(crate) fn engine(self) -> AtTimeLimit {
        match self {
            Self::Abort => AtTimeLimit::Abort,
            Self::Switch => AtTimeLimit::Switch,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Do it
    On,
    /// Leave it
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IfStuckArg {
    /// End the migration; the guest goes on where it is
    Abort,
    /// Pause the guest at a good moment, for longer than the limit
    Switch,
    /// Slow the guest down until what remains fits; end the migration if it does not even so
    Throttle,
    /// Not there yet
    Postcopy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressArg {
    /// What sends them soonest
    Auto,
    /// Nothing
    Off,
    /// LZ4
    Lz4,
    /// Zstandard
    Zstd,
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
    /// How much of it the guest ever writes, in percent [default: 75; with --vmm qemu 50, which is the most there]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) used: Option<u8>,
    /// The part of it that the guest keeps rewriting, in the patterns hot and phases
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = units::bytes)]
    pub(crate) hot: u64,
    /// Page writes per second (20000), or a rate in bytes (80MB/s); 0 is as fast as possible
    #[arg(long, value_name = "RATE", default_value = "20000", value_parser = units::write_rate)]
    pub(crate) write_rate: u64,
    /// Which pages the guest writes: idle, hot, zipf, sweep or phases
    #[arg(long, default_value = "hot", value_parser = pattern)]
    pub(crate) pattern: Pattern,
    /// How much of each of the guest's pages no compressor makes smaller, in percent. A write changes a little of a page
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) incompressible: u8,
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
pub(crate) struct RecordArgs {
    /// QEMU's QMP socket
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// Where the trace goes
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// How long to record [default: until Ctrl-C]
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub(crate) duration: Option<Duration>,
    /// Length of an epoch: written pages are looked for at the end of each
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = epoch)]
    pub(crate) epoch: Duration,
    /// Do not look which process of the guest owns the written pages: the whole guest is one address space then
    #[arg(long)]
    pub(crate) no_owners: bool,
    /// Record, about once a second, which pages the guest's programs have used by the guest's page tables
    #[arg(long, conflicts_with = "no_owners")]
    pub(crate) accessed: bool,
    /// What the trace is called in reports [default: the file's name]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// QEMU's process, where the QMP socket was made by another one
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// Print what was recorded as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct WatchArgs {
    /// QEMU's QMP socket
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// QEMU's process, where the QMP socket was made by another one
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// What the link to the target would carry, for the prediction
    #[arg(long, value_name = "RATE", default_value = "1Gbit/s", value_parser = units::rate)]
    pub(crate) bandwidth: u64,
    /// The longest pause, for the prediction
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::time)]
    pub(crate) downtime_limit: Duration,
    /// Length of an epoch: written pages are looked for at the end of each
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = watch_epoch)]
    pub(crate) epoch: Duration,
    /// How long to watch [default: until q or Ctrl-C]
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub(crate) duration: Option<Duration>,
    /// Do not look for zero pages first, which reads all of the guest's memory: none is predicted to be left out then
    #[arg(long)]
    pub(crate) skip_zero_pages: bool,
    /// Print a line a second instead of drawing; so it is also where standard output is no terminal
    #[arg(long, conflicts_with = "json")]
    pub(crate) plain: bool,
    /// Print a line of JSON a second
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct TraceArgs {
    #[command(subcommand)]
    pub(crate) command: TraceCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum TraceCommand {
    /// Sum up a trace: rates, working set, rewriting, owners
    #[command(after_help = "Example:\n  vmferry trace info vm1.parquet")]
    Info {
        /// The trace
        file: PathBuf,
        /// Print the figures as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make the trace of a guest that writes as specified
    #[command(after_help = "\
Examples:
  vmferry trace generate zipf -o zipf.parquet
  vmferry trace generate hotcold:pages=131072,rate=50000,duration=20s --seed 7 -o hot.parquet
  vmferry trace generate help                          all workloads and their parameters")]
    Generate {
        /// WORKLOAD or WORKLOAD:NAME=VALUE,…; `help` lists them
        spec: String,
        /// Where the trace goes
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// The same specification and seed make the same trace on every machine
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Make a trace of another tool's record
    #[command(after_help = "\
Examples:
  vmferry trace import writes.csv -o writes.parquet --epoch 50ms
  valgrind --tool=lackey --trace-mem=yes sort words 2>&1 >/dev/null |
      vmferry trace import - --format lackey -o sort.parquet

docs/TRACES.md of the sources says which columns a CSV file has.")]
    Import {
        /// The record; `-` for standard input
        input: PathBuf,
        /// Where the trace goes
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// What the record is
        #[arg(long, value_enum, default_value_t = ImportFormat::Csv)]
        format: ImportFormat,
        /// Length of an epoch
        #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = epoch)]
        epoch: Duration,
        /// The guest's RAM [default: as much as the record needs]
        #[arg(long, value_name = "SIZE", value_parser = units::bytes)]
        memory: Option<u64>,
        /// Number pages in the order in which they are first touched (CSV; always so with lackey)
        #[arg(long)]
        renumber: bool,
        /// Instructions that make an epoch (lackey)
        #[arg(long, value_name = "N", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1..))]
        instructions: u64,
        /// Record what was read, too (lackey)
        #[arg(long)]
        accessed: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImportFormat {
    /// A table with a header: epoch or time_us, page or address, and more
    Csv,
    /// The output of valgrind --tool=lackey --trace-mem=yes
    Lackey,
}

const SIMULATE_EXAMPLES: &str = "\
Examples:
  vmferry simulate vm1.parquet --bandwidth 1Gbit/s --downtime-limit 100ms
  vmferry simulate vm1.parquet vm2.parquet --load 0.2,0.5,0.8,1.2 --html report.html
  vmferry simulate generate:zipf:pages=65536 --policy vmferry,qemu,post-copy --seeds 10 --json=sweep.json
  vmferry simulate vm1.parquet --policy vmferry --predictor lcbst,lru,lru-k:k=3,none --baseline vmferry/none

Ctrl-C ends it after the runs under way and reports what is done, with exit code 130; a second one ends it at once.";

#[derive(Debug, Clone, Args)]
pub(crate) struct SimulateArgs {
    /// Traces: files, or generate:WORKLOAD[:NAME=VALUE,…]; `vmferry trace generate help` lists workloads
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<String>,
    /// What to compare: vmferry, qemu, xen, skip-written, stop-and-copy or post-copy
    #[arg(
        long,
        value_name = "NAME,…",
        default_value = "vmferry,qemu,xen",
        value_delimiter = ',',
        value_parser = simulate::arm_kind
    )]
    pub(crate) policy: Vec<ArmKind>,
    /// Who predicts for policy vmferry: one or more predictors, each with its parameters, as in lcbst,lru-k:k=3
    #[arg(long, value_name = "NAME,…", default_value = "lcbst")]
    pub(crate) predictor: Vec<String>,
    /// With which of them the others are compared [default: qemu, else the first]
    #[arg(long, value_name = "NAME")]
    pub(crate) baseline: Option<String>,
    /// What the link carries
    #[arg(long, value_name = "RATE,…", default_value = "1Gbit/s", value_delimiter = ',', value_parser = units::rate)]
    pub(crate) bandwidth: Vec<u64>,
    /// Instead: the guest's mean dirty rate as a share of what the link carries
    #[arg(
        long,
        value_name = "SHARE,…",
        value_delimiter = ',',
        conflicts_with = "bandwidth",
        value_parser = simulate::load
    )]
    pub(crate) load: Vec<f64>,
    /// The longest pause
    #[arg(long, value_name = "TIME,…", default_value = "300ms", value_delimiter = ',', value_parser = units::time)]
    pub(crate) downtime_limit: Vec<Duration>,
    /// How often each is repeated, beginning elsewhere in the trace
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) seeds: u32,
    /// Simulations at a time [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) jobs: Option<u32>,
    /// The link's latency, each way
    #[arg(long, value_name = "TIME", default_value = "100us", value_parser = units::time)]
    pub(crate) latency: Duration,
    /// Time between two scans for written pages
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = epoch)]
    pub(crate) epoch: Duration,
    /// How long the guest is watched before the first page is sent, where somebody predicts
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = units::time)]
    pub(crate) observe: Duration,
    /// When a migration that does not end is cancelled, in simulated time
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = units::time)]
    pub(crate) time_limit: Duration,
    /// Write all figures as JSON into a file, or without one instead of the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    pub(crate) json: Option<PathBuf>,
    /// Write a report with plots: one page that loads nothing
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
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

const CTL_EXAMPLES: &str = "\
Examples:
  vmferry ctl list
  vmferry ctl show --follow                       how far it is, each second, and why it has not ended
  vmferry ctl set --bandwidth 500Mbit/s --downtime-limit 1s
  vmferry ctl pause 4711                          no page is sent; the guest runs on
  vmferry ctl continue 4711
  vmferry ctl cancel 41d7

A migration is chosen by the number of its process (PID) or the beginning of its name (MIGRATION), and need not be where
only one runs. Those of the same user are seen. docs/CONTROL.md of the sources describes the socket behind it.

Exit codes: 0 done; 1 there is no such migration, or it refused; 2 the command line is wrong.";

#[derive(Debug, Clone, Args)]
pub(crate) struct CtlArgs {
    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum CtlCommand {
    /// Running migrations, a line for each
    #[command(after_help = "Example:\n  vmferry ctl list --json")]
    List {
        /// Print them as one JSON document
        #[arg(long)]
        json: bool,
    },
    /// How far a migration is, and why it has not ended
    #[command(after_help = "Example:\n  vmferry ctl show 4711 --follow")]
    Show {
        /// PID, or the beginning of the migration's name [default: the one that runs]
        id: Option<String>,
        /// A line each second, until it has ended
        #[arg(long)]
        follow: bool,
        /// Print it as JSON; with --follow a line each
        #[arg(long)]
        json: bool,
    },
    /// Change the limits of a migration
    #[command(after_help = "\
Examples:
  vmferry ctl set --bandwidth none
  vmferry ctl set 4711 --time-limit 2min --at-time-limit switch")]
    Set(CtlSetArgs),
    /// End a migration; the guest goes on at the source
    #[command(after_help = "Example:\n  vmferry ctl cancel 4711")]
    Cancel {
        /// PID, or the beginning of the migration's name [default: the one that runs]
        id: Option<String>,
    },
    /// Send no page until `continue`; the guest runs on, and is not paused
    #[command(after_help = "Example:\n  vmferry ctl pause 4711")]
    Pause {
        /// PID, or the beginning of the migration's name [default: the one that runs]
        id: Option<String>,
    },
    /// Send pages again after `pause`
    #[command(after_help = "Example:\n  vmferry ctl continue 4711")]
    Continue {
        /// PID, or the beginning of the migration's name [default: the one that runs]
        id: Option<String>,
    },
}

#[derive(Debug, Clone, Args)]
pub(crate) struct CtlSetArgs {
    /// PID, or the beginning of the migration's name [default: the one that runs]
    pub(crate) id: Option<String>,
    /// The most to send per second; `none` for as much as the path allows
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub(crate) bandwidth: Option<Bandwidth>,
    /// The longest pause
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub(crate) downtime_limit: Option<Duration>,
    /// The most time until the guest is paused, counted from the migration's beginning; `none` for no limit
    #[arg(long, value_name = "TIME", value_parser = optional_time)]
    pub(crate) time_limit: Option<OptionalTime>,
    /// What happens when the time limit is over
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) at_time_limit: Option<AtTimeLimitArg>,
}

/// A time or none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OptionalTime(pub(crate) Option<Duration>);

fn optional_time(text: &str) -> Result<OptionalTime, String> {
    if text == "none" { Ok(OptionalTime(None)) } else { units::time(text).map(|time| OptionalTime(Some(time))) }
}

fn epoch(text: &str) -> Result<Duration, String> {
    let epoch = units::time(text)?;
    let allowed = Duration::from_millis(1)..=Duration::from_secs(10);
    if allowed.contains(&epoch) { Ok(epoch) } else { Err("an epoch is between 1ms and 10s long".to_owned()) }
}

/// Keys are looked at and the display is renewed between epochs.
fn watch_epoch(text: &str) -> Result<Duration, String> {
    let epoch = units::time(text)?;
    let allowed = Duration::from_millis(1)..=Duration::from_secs(1);
    if allowed.contains(&epoch) { Ok(epoch) } else { Err("an epoch to watch is between 1ms and 1s long".to_owned()) }
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
