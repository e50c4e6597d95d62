//! The commands a developer of vmferry types: set-up, demo, tests, deeper checks, benches, figures, study and comparison.
//!
//! Run as `cargo xtask COMMAND`. Everything that is downloaded or built for the tests goes to `target/tools/` of the
//! workspace and nowhere else: nothing is installed in the system, and root is not needed.
//!
//! This crate starts other programs and moves files. It contains nothing that the shipped binary needs.

mod apt;
mod cpio;
mod iproute;
mod recordings;
mod run;
mod setup;
mod tasks;
mod workloads;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand, ValueEnum};

use crate::workloads::WORKLOADS;
use crate::workspace::Workspace;

const EXAMPLES: &str = "\
Examples:
  cargo xtask setup                    fetch two QEMUs and a kernel, build the test guest
  cargo xtask setup --force            the same, from scratch
  cargo xtask test                     set up, then format, lints, tests, doc tests and models
  cargo xtask test -- handover         only the tests whose name contains \"handover\"
  cargo xtask verify --seconds 600     the tree more deeply: more of its models, Miri, ten minutes of fuzzing
  cargo xtask demo                     show one migration on this machine
  cargo xtask bench track              one bench; without a name, all of them
  cargo xtask bench tree -- uniform    only the tables whose name contains \"uniform\"
  cargo xtask bench plan -- --csv FILE the same measurements as CSV, for the benches predict and plan
  cargo xtask figures                  measure and draw the figures of docs/FIGURES.md
  cargo xtask study                    simulate migrations of the guests in recordings/
  cargo xtask study --record redis     record one of these guests again; without a name, all of them
  cargo xtask compare --quick          move guests with vmferry and with QEMU's own migration (as root)

Where Debian 12 packages cannot be had, name what is already here instead:
  VMFERRY_QEMU=/usr/bin/qemu-system-x86_64 VMFERRY_KERNEL=/boot/vmlinuz cargo xtask setup

Environment:
  VMFERRY_QEMU     QEMU binaries to use instead of downloaded ones, separated by colons
  VMFERRY_KERNEL   a Linux kernel image to use instead of a downloaded one";

/// Set-up, demo, tests, deeper checks, benches, figures, study and comparison of vmferry.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = EXAMPLES, version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put what the tests need into target/tools/: two QEMUs, a kernel, the test guest
    Setup {
        /// Fetch and unpack again what is already there
        #[arg(long)]
        force: bool,
        /// Build the guest with real programs as well (redis, sqlite, gzip, python, nginx), and say how to start it
        #[arg(long)]
        study: bool,
    },
    /// Set up, then check formatting and lints, and run all tests
    Test {
        /// Stop at the first step that fails
        #[arg(long)]
        fail_fast: bool,
        /// Passed to the test programs, for instance part of a test's name
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Check crate lcbst with what takes minutes or a nightly toolchain: more of its models, Miri, fuzzing
    Verify {
        /// How long to fuzz
        #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,
    },
    /// Build vmferry in release mode and run `vmferry demo`
    Demo {
        /// Passed to `vmferry demo`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the benches, or the one that is named
    Bench {
        /// Which bench; all of them when left out
        name: Option<BenchName>,
        /// Passed to the bench programs
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Measure and draw the figures that docs/FIGURES.md explains; takes about 20 minutes
    Figures {
        /// Small trees and few repetitions, to see that everything runs
        #[arg(long)]
        quick: bool,
        /// The directory for CSV, SVG and PNG; docs/figures of the workspace when left out
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Draw from the CSV files that are there, and measure nothing
        #[arg(long, conflicts_with = "quick")]
        redraw: bool,
    },
    /// Simulate migrations of the guests in recordings/ and write the study in docs/, or record these guests
    Study {
        /// Record the guests that are named, or all of them, into recordings/; takes a minute and a half each
        #[arg(long, value_name = "NAME", num_args = 0.., value_parser = workload_names())]
        record: Option<Vec<String>>,
        /// A small part of the study, to see that everything runs
        #[arg(long, conflicts_with = "record")]
        quick: bool,
    },
    /// Move the same guests with vmferry and with QEMU's own migration, and write docs/COMPARE.md; `-- --help` says more
    Compare {
        /// Passed to the comparison: --quick, --guest, --link, --mode, --runs, --qemu, --add and others
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn workload_names() -> PossibleValuesParser {
    PossibleValuesParser::new(WORKLOADS.iter().map(|workload| workload.name))
}

/// The benches by what they measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BenchName {
    /// The cost of write tracking (crate vmferry-host)
    Track,
    /// The predictors: time for each page written, memory for each page known (crate vmferry-core)
    Predict,
    /// What the source does at a scan, for a guest of 1 TiB (crate vmferry-core)
    Plan,
    /// Whole transfers (crate vmferry)
    Transfer,
    /// The splay trees, the sequential and the concurrent one, against other maps (crate lcbst)
    Tree,
}

fn main() -> ExitCode {
    match dispatch(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    let workspace = Workspace::locate()?;
    match command {
        Command::Setup { force, study } => {
            setup::setup(&workspace, force)?;
            if study {
                tasks::study_guest(&workspace)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Test { fail_fast, arguments } => tasks::test(&workspace, fail_fast, &arguments),
        Command::Verify { seconds } => tasks::verify(&workspace, seconds),
        Command::Demo { arguments } => tasks::demo(&workspace, &arguments),
        Command::Bench { name, arguments } => tasks::bench(&workspace, name, &arguments),
        Command::Figures { quick, out, redraw } => tasks::figures(&workspace, quick, out.as_deref(), redraw),
        Command::Study { record: None, quick } => tasks::study(&workspace, quick),
        Command::Study { record: Some(names), quick: _ } => tasks::record_study(&workspace, &names),
        Command::Compare { arguments } => tasks::compare(&workspace, &arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn demo_passes_flags_through() {
        let arguments = Arguments::try_parse_from(["xtask", "demo", "--json", "--memory", "64MiB"]).unwrap();
        let Command::Demo { arguments } = arguments.command else { panic!("not a demo: {arguments:?}") };
        assert_eq!(arguments, ["--json", "--memory", "64MiB"]);
    }

    #[test]
    fn the_comparison_has_its_own_flags() {
        let arguments = Arguments::try_parse_from(["xtask", "compare", "--quick", "--guest", "zipf"]).unwrap();
        let Command::Compare { arguments } = arguments.command else { panic!("not a comparison: {arguments:?}") };
        assert_eq!(arguments, ["--quick", "--guest", "zipf"]);
    }

    #[test]
    fn verify_fuzzes_for_a_minute_or_as_long_as_it_is_told_but_not_for_ever() {
        let seconds = |arguments: &[&str]| {
            let arguments = Arguments::try_parse_from([&["xtask", "verify"], arguments].concat()).ok()?;
            let Command::Verify { seconds } = arguments.command else { panic!("not verify: {arguments:?}") };
            Some(seconds)
        };
        assert_eq!(seconds(&[]), Some(60));
        assert_eq!(seconds(&["--seconds", "600"]), Some(600));
        // To libFuzzer, 0 seconds are no limit.
        assert_eq!(seconds(&["--seconds", "0"]), None);
        assert_eq!(seconds(&["--seconds", "soon"]), None);
    }

    #[test]
    fn figures_are_measured_or_redrawn() {
        let arguments = Arguments::try_parse_from(["xtask", "figures", "--quick", "--out", "pictures"]).unwrap();
        let Command::Figures { quick, out, redraw } = arguments.command else { panic!("not figures: {arguments:?}") };
        assert!(quick && !redraw);
        assert_eq!(out, Some(PathBuf::from("pictures")));
        assert!(Arguments::try_parse_from(["xtask", "figures", "--quick", "--redraw"]).is_err());
    }

    #[test]
    fn the_study_is_run_or_its_guests_are_recorded() {
        let study = |arguments: &[&str]| {
            let arguments = Arguments::try_parse_from([&["xtask", "study"], arguments].concat()).ok()?;
            let Command::Study { record, quick } = arguments.command else { panic!("not a study: {arguments:?}") };
            Some((record, quick))
        };
        assert_eq!(study(&[]), Some((None, false)));
        assert_eq!(study(&["--quick"]), Some((None, true)));
        assert_eq!(study(&["--record"]), Some((Some(Vec::new()), false)));
        let names = vec!["redis".to_owned(), "redis-hot".to_owned()];
        assert_eq!(study(&["--record", "redis", "redis-hot"]), Some((Some(names), false)));
        assert_eq!(study(&["--record", "no-such-guest"]), None);
        assert_eq!(study(&["--record", "--quick"]), None);
    }
}
