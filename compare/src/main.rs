//! vmferry and QEMU's own migration side by side: the same guests, links and limits.
//!
//! Two network namespaces stand for two hosts. For each guest and link one mode after the other moves the guest, and
//! that several times over, so that a machine that becomes slower meanwhile does so for all. Everything is measured from
//! outside, and in the same way for all modes. Every run is written to `compare/runs.csv` as soon as its cell is
//! complete; `COMPARE.md` beside that directory is filled in from this file.
//!
//! It is started by `cargo xtask compare`, which fetches and builds what it needs.

mod guests;
mod interrupt;
mod mode;
mod moving;
mod network;
mod page;
mod pictures;
mod probe;
mod processor;
mod results;
mod run;
mod serial;
mod vm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use lcbst_figures::picture;
use lcbst_figures::table::Table;

use crate::guests::{GUESTS, Guest, MEMORY_MIN_BYTES, Program, QUICK_GUESTS};
use crate::interrupt::Interrupt;
use crate::mode::Mode;
use crate::network::{Link, Network, NetworkTools};
use crate::run::{Bench, Place, Run};
use crate::vm::Machinery;

/// How often each mode moves each guest over each link.
const RUNS: u32 = 5;

/// When a move is cancelled: after so long, or so many times as long as sending each page once takes.
const TIME_LIMIT: Duration = Duration::from_secs(30);
const TIME_LIMIT_TIMES: u32 = 4;

/// Attempts at a TCP copy that fills the link: something else may have held one up.
const PROBES_MAX: u32 = 3;

const EXAMPLES: &str = "\
Examples:
  cargo xtask compare --quick                               two guests, one link, three modes, once each
  cargo xtask compare --guest hot-20k --link 1gbit          one cell of the tables
  cargo xtask compare --guest redis --add                   the same, and what was measured before stays
  cargo xtask compare --guest idle --mode vmferry --mode postcopy --runs 2 --qemu 7.2

All guests on all links take hours. Needs root, for network namespaces and for tracing QEMU.";

/// Move the same guests with vmferry and with QEMU's own migration, side by side.
#[derive(Debug, Parser)]
#[command(name = "vmferry-compare", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    compare: CompareArguments,
}

/// The ends of a plain TCP copy, as this program starts itself.
#[derive(Debug, Subcommand)]
enum Command {
    /// Receive
    #[command(hide = true)]
    CopySink,
    /// Send
    #[command(hide = true)]
    CopySource { address: String, bytes: u64 },
}

#[derive(Debug, Args)]
struct CompareArguments {
    /// Two guests, one link, three modes and one run, to see that everything works
    #[arg(long)]
    quick: bool,
    /// Only this guest; may be given more than once
    #[arg(long, value_name = "NAME", value_parser = guest_names())]
    guest: Vec<String>,
    /// Only this link; may be given more than once
    #[arg(long, value_name = "NAME")]
    link: Vec<Link>,
    /// Only this mode; may be given more than once
    #[arg(long, value_name = "NAME")]
    mode: Vec<Mode>,
    /// How often each mode moves each guest over each link [default: 5, or 1 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// Which of the QEMUs of `cargo xtask setup` [default: the newest]
    #[arg(long, value_name = "VERSION")]
    qemu: Option<String>,
    /// The longest pause, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    downtime_limit: u64,
    /// RAM of the guests, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(MEMORY_MIN_BYTES >> 20..=1 << 20))]
    memory: u64,
    /// Keep the runs of other cells that were written before
    #[arg(long)]
    add: bool,
    /// The directory for COMPARE.md, and for its tables in `compare`
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// Keep vmferry's own report of each of its runs in this directory
    #[arg(long, value_name = "DIR")]
    reports: Option<PathBuf>,
    /// What `cargo xtask setup` made
    #[arg(long, value_name = "DIR", default_value = "target/tools")]
    tools: PathBuf,
    /// The vmferry to compare
    #[arg(long, value_name = "PATH", default_value = "target/release/vmferry")]
    vmferry: PathBuf,
    /// The programs ip and tc, of iproute2
    #[arg(long, value_name = "PATH", default_value = "ip")]
    ip: PathBuf,
    #[arg(long, value_name = "PATH", default_value = "tc")]
    tc: PathBuf,
}

fn guest_names() -> PossibleValuesParser {
    PossibleValuesParser::new(GUESTS.iter().map(|guest| guest.name))
}

/// What is compared.
#[derive(Debug)]
struct Plan {
    guests: Vec<&'static Guest>,
    links: Vec<Link>,
    modes: Vec<Mode>,
    runs: u32,
}

impl Plan {
    fn of(arguments: &CompareArguments) -> Self {
        let is_chosen = |guest: &&Guest| match (arguments.guest.is_empty(), arguments.quick) {
            (false, _) => arguments.guest.iter().any(|name| name == guest.name),
            (true, true) => QUICK_GUESTS.contains(&guest.name),
            (true, false) => true,
        };
        let or = |chosen: &[Link], quick: &[Link], all: &[Link]| match (chosen, arguments.quick) {
            ([], true) => quick.to_vec(),
            ([], false) => all.to_vec(),
            (chosen, _) => chosen.to_vec(),
        };
        Self {
            guests: GUESTS.iter().filter(is_chosen).collect(),
            links: or(&arguments.link, &[Link::Gbit1], &Link::ALL),
            modes: match (arguments.mode.is_empty(), arguments.quick) {
                (false, _) => arguments.mode.clone(),
                (true, true) => Mode::QUICK.to_vec(),
                (true, false) => Mode::ALL.to_vec(),
            },
            runs: arguments.runs.unwrap_or(if arguments.quick { 1 } else { RUNS }),
        }
    }
}

fn main() -> ExitCode {
    let Arguments { command, compare } = Arguments::parse();
    let done = match command {
        Some(Command::CopySink) => probe::sink().map(|()| ExitCode::SUCCESS),
        Some(Command::CopySource { address, bytes }) => probe::source(&address, bytes).map(|()| ExitCode::SUCCESS),
        None => run(&compare),
    };
    done.unwrap_or_else(|error| {
        eprintln!("vmferry-compare: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &CompareArguments) -> Result<ExitCode> {
    let plan = Plan::of(arguments);
    let (version, qemu) = find_qemu(&arguments.tools, arguments.qemu.as_deref())?;
    let machinery = Machinery {
        qemu,
        kernel: arguments.tools.join("kernel/vmlinuz"),
        initramfs: arguments.tools.join("initramfs.cpio"),
        study_initramfs: arguments.tools.join("study.cpio"),
        memory_bytes: arguments.memory << 20,
    };
    let needs_study = plan.guests.iter().any(|guest| matches!(guest.program, Program::Study(_)));
    for path in [&machinery.kernel, &machinery.initramfs, &machinery.study_initramfs, &arguments.vmferry] {
        let is_needed = needs_study || path != &machinery.study_initramfs;
        ensure!(!is_needed || path.exists(), "there is no {}; `cargo xtask compare` makes it", path.display());
    }
    let vmferry = std::path::absolute(&arguments.vmferry).context("cannot find vmferry")?;
    let tables = arguments.out.join("compare");
    for directory in arguments.reports.iter().chain([&tables]) {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let mut runs = if arguments.add { read_runs(&tables)? } else { Vec::new() };

    let interrupt = Interrupt::on_signals()?;
    vm::remove_left_over();
    let network = Network::create(NetworkTools { ip: arguments.ip.clone(), tc: arguments.tc.clone() })?;
    println!("QEMU {version}, guests of {} MiB, downtime limit {} ms", arguments.memory, arguments.downtime_limit);
    for &link in &plan.links {
        network.shape(link)?;
        check_link(&network, link)?;
        for &guest in &plan.guests {
            let bench = Bench {
                network: &network,
                machinery: &machinery,
                vmferry: &vmferry,
                downtime_limit_ms: arguments.downtime_limit,
                time_limit: time_limit(machinery.memory_bytes, link),
                reports: arguments.reports.as_deref(),
                interrupt: &interrupt,
            };
            println!("\n== {}, {link}: {}", guest.name, guest.about);
            let places = plan.modes.iter().map(|&mode| Place { qemu: version.clone(), guest, link, mode });
            match measure(&bench, &places.collect::<Vec<_>>(), plan.runs) {
                Ok(measured) => replace(&mut runs, measured),
                Err(error) if interrupt.has_come() => {
                    eprintln!("{error}; what was complete before is in {}", arguments.out.display());
                    return Ok(ExitCode::from(130));
                }
                Err(error) => return Err(error),
            }
            write(&arguments.out, &tables, &runs)?;
        }
    }
    println!("\n{}, with tables in {}", arguments.out.join("COMPARE.md").display(), tables.display());
    let has_failed = runs.iter().any(|run| !run.problem.is_empty());
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Moves one guest over one link, mode after mode, again and again.
fn measure(bench: &Bench<'_>, places: &[Place], times: u32) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for number in 1..=times {
        for place in places {
            let run = bench.run(place, number)?;
            println!("{}", run.line());
            runs.push(run);
        }
    }
    Ok(runs)
}

/// Puts runs into the place of those that were made under the same conditions before.
fn replace(runs: &mut Vec<Run>, measured: Vec<Run>) {
    runs.retain(|run| measured.iter().all(|new| new.place != run.place));
    runs.extend(measured);
}

fn read_runs(tables: &Path) -> Result<Vec<Run>> {
    let path = tables.join("runs.csv");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let read = |table: &Table| table.rows().map(Run::from_row).collect::<Result<_>>();
    Table::read(&path)
        .and_then(|table| read(&table))
        .with_context(|| format!("{} cannot be added to; leave --add out to write it anew", path.display()))
}

fn write(out: &Path, tables: &Path, runs: &[Run]) -> Result<()> {
    let mut table = Run::table();
    for run in runs {
        table.push(run.row());
    }
    table.write(&tables.join("runs.csv"))?;
    // The page says what the file says.
    let runs: Vec<Run> = table.rows().map(Run::from_row).collect::<Result<_>>()?;
    let cells = results::cells(&runs);
    results::table(&cells).write(&tables.join("cells.csv"))?;
    picture::load_font()?;
    for (name, figure) in pictures::all(&cells) {
        figure.write(&tables.join(format!("{name}.svg")), &tables.join(format!("{name}.png")))?;
    }
    let path = out.join("COMPARE.md");
    fs::write(&path, page::page(&cells, &runs)).with_context(|| format!("cannot write {}", path.display()))
}

/// Measures a plain TCP copy, and says what it reached.
fn check_link(network: &Network, link: Link) -> Result<()> {
    let mut measured = probe::rate_bits_per_s(network, link)?;
    for _ in 1..PROBES_MAX {
        if link.rate_bits_per_s().is_none_or(|rate| measured >= rate as f64 * probe::SHARE_MIN) {
            break;
        }
        measured = measured.max(probe::rate_bits_per_s(network, link)?);
    }
    match link.rate_bits_per_s() {
        None => println!("\nlink {link}: a plain TCP copy reaches {:.1} Gbit/s", measured / 1e9),
        Some(rate) => {
            let share = measured / rate as f64;
            println!("\nlink {link}: a plain TCP copy reaches {:.1} % of it", share * 100.0);
            if share < probe::SHARE_MIN {
                // The same for all modes, so it is no reason to give up.
                println!("warning: that is little, and all that follows is slower for it: is the machine busy?");
            }
        }
    }
    Ok(())
}

fn time_limit(memory_bytes: u64, link: Link) -> Duration {
    let once = link
        .rate_bits_per_s()
        .map_or(Duration::ZERO, |rate| Duration::from_secs(memory_bytes * 8).div_f64(rate as f64));
    (once * TIME_LIMIT_TIMES).max(TIME_LIMIT)
}

/// The QEMU of this version among the tools, or else the newest.
fn find_qemu(tools: &Path, wanted: Option<&str>) -> Result<(String, PathBuf)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(tools).with_context(|| format!("cannot list {}", tools.display()))? {
        let path = entry?.path();
        let version = path.file_name().and_then(|name| name.to_str()).and_then(qemu_version);
        found.extend(version.filter(|_| path.join("run").is_file()).map(|version| (version, path.join("run"))));
    }
    found.sort_unstable();
    let name = |version: &(u32, u32)| format!("{}.{}", version.0, version.1);
    let versions: Vec<String> = found.iter().map(|(version, _)| name(version)).collect();
    let chosen = match wanted {
        None => found.pop(),
        Some(wanted) => found.into_iter().find(|(version, _)| name(version) == wanted),
    };
    match chosen {
        Some((version, program)) => Ok((name(&version), program)),
        None => bail!(
            "there is no such QEMU in {}, only these: {}; `cargo xtask setup` fetches them",
            tools.display(),
            versions.join(", ")
        ),
    }
}

/// The version in the name of a tool's directory, if that is a QEMU's.
fn qemu_version(name: &str) -> Option<(u32, u32)> {
    let (major, minor) = name.strip_prefix("qemu-")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn plan(words: &[&str]) -> Plan {
        Plan::of(&Arguments::try_parse_from([&["compare"], words].concat()).unwrap().compare)
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
        assert!(Arguments::try_parse_from(["compare", "--guest", "other"]).is_err());
        let sink = Arguments::try_parse_from(["compare", "copy-sink"]).unwrap();
        assert!(matches!(sink.command, Some(Command::CopySink)));
    }

    #[test]
    fn quick_is_little_and_what_is_named_is_done_all_the_same() {
        let quick = plan(&["--quick"]);
        assert_eq!((quick.guests.len(), quick.links.len(), quick.modes.len(), quick.runs), (2, 1, 3, 1));
        let all = plan(&[]);
        let sizes = (all.guests.len(), all.links.len(), all.modes.len(), all.runs);
        assert_eq!(sizes, (GUESTS.len(), 3, 7, RUNS));
        let named = plan(&["--quick", "--guest", "zipf", "--link", "100mbit", "--mode", "xbzrle", "--runs", "2"]);
        assert_eq!((named.guests[0].name, named.links[0], named.modes[0]), ("zipf", Link::Mbit100, Mode::Xbzrle));
        assert_eq!((named.guests.len(), named.links.len(), named.modes.len(), named.runs), (1, 1, 1, 2));
    }

    #[test]
    fn a_slow_link_has_more_time() {
        assert_eq!(time_limit(512 << 20, Link::Unshaped), TIME_LIMIT);
        assert_eq!(time_limit(512 << 20, Link::Gbit1), TIME_LIMIT);
        assert_eq!(time_limit(512 << 20, Link::Mbit100).as_secs(), 171);
    }

    #[test]
    fn runs_of_the_same_place_are_replaced_and_others_stay() {
        let mut runs = vec![
            run::tests::run(Mode::Vmferry, 1, 4000.0, 9.0),
            run::tests::run(Mode::Vmferry, 2, 4000.0, 9.0),
            run::tests::run(Mode::Precopy, 1, 4000.0, 9.0),
        ];
        replace(&mut runs, vec![run::tests::run(Mode::Vmferry, 1, 5000.0, 9.0)]);
        let totals: Vec<Option<f64>> = runs.iter().map(|run| run.figures.total_ms).collect();
        assert_eq!(totals, [Some(4000.0), Some(5000.0)]);
    }

    #[test]
    fn versions_of_qemu_are_compared_as_numbers() {
        assert!(qemu_version("qemu-10.0") > qemu_version("qemu-7.2"));
        assert_eq!(qemu_version("kernel"), None);
    }
}
