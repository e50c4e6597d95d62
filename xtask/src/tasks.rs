//! `test`, `verify`, `demo`, `bench`, `figures`, `study` and `compare`: a list of steps each, started one after the other.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum as _;

use crate::BenchName;
use crate::iproute;
use crate::recordings;
use crate::run::{cargo, passes};
use crate::setup::setup;
use crate::workloads::{self, Workload};
use crate::workspace::Workspace;

/// How one step of a task ended.
#[derive(Debug)]
struct Outcome {
    name: &'static str,
    verdict: Verdict,
    elapsed: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    /// What the step needs is not installed; the text says what that is and how to get it.
    Skipped(&'static str),
}

/// What is not built by default and has to be right all the same.
const FEATURES: &str = "--features=lcbst/concurrent";

/// Built with other flags than everything else, so in a directory of their own.
const MODELS: [&str; 8] = [
    "test",
    "--release",
    "--target-dir=target/models",
    "-p",
    "lcbst",
    "--features=concurrent",
    "--test=loom_concurrent",
    "--",
];

/// The preemptions that `verify` tries in each model: one more takes about three times as long. The models themselves ask
/// for fewer, to be part of every `test`.
const VERIFY_PREEMPTIONS: &str = "6";

const MIRI_NEEDS: &str = "needs Miri: rustup toolchain install nightly --component miri,rust-src";
const FUZZ_NEEDS: &str =
    "needs cargo-fuzz and a nightly toolchain: cargo install cargo-fuzz && rustup toolchain install nightly";

/// Set-up, format, lints, tests, documentation, doc tests, models. All steps run, so that one run shows all that is wrong,
/// except that `fail_fast` ends it at the first failure.
pub(crate) fn test(workspace: &Workspace, fail_fast: bool, arguments: &[String]) -> Result<ExitCode> {
    let mut outcomes = vec![timed("set-up", || match setup(workspace, false) {
        Ok(()) => Ok(Verdict::Passed),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            Ok(Verdict::Failed)
        }
    })?];
    let may_go_on =
        |outcomes: &[Outcome]| !fail_fast || outcomes.iter().all(|outcome| outcome.verdict != Verdict::Failed);
    let steps: [(&'static str, &[&str], &[String]); 5] = [
        ("format", &["fmt", "--all", "--check"], &[]),
        ("lints", &["clippy", "--workspace", FEATURES, "--all-targets", "--", "-D", "warnings"], &[]),
        ("tests", &["test", "--workspace", FEATURES, "--lib", "--bins", "--tests", "--"], arguments),
        ("docs", &["doc", "--workspace", FEATURES, "--no-deps", "--quiet"], &[]),
        ("doc tests", &["test", "--workspace", FEATURES, "--doc", "--"], arguments),
    ];
    for (name, fixed, extra) in steps {
        if !may_go_on(&outcomes) {
            break;
        }
        println!("\n== {name}: cargo {} {}", fixed.join(" "), extra.join(" "));
        let mut command = cargo(&workspace.root);
        command.args(fixed).args(extra).env("VMFERRY_TOOLS", &workspace.tools).env("RUSTDOCFLAGS", "-D warnings");
        outcomes.push(timed(name, || verdict_of(&mut command))?);
    }
    if may_go_on(&outcomes) {
        outcomes.push(models(workspace, None, arguments)?);
    }
    Ok(summarise(&outcomes))
}

/// The checks of the tree that take minutes or a nightly toolchain. What is not installed is skipped, and the summary
/// says so.
pub(crate) fn verify(workspace: &Workspace, fuzz_seconds: u32) -> Result<ExitCode> {
    let mut outcomes = vec![models(workspace, Some(VERIFY_PREEMPTIONS), &[])?];

    let miri = ["miri", "test", "-p", "lcbst", "--features=concurrent"];
    for (name, targets) in [("miri", &["--tests"][..]), ("miri docs", &["--doc"])] {
        println!("\n== {name}: cargo +nightly {} {}", miri.join(" "), targets.join(" "));
        let mut command = nightly(&workspace.root, "miri");
        command.args(&miri[1..]).args(targets);
        outcomes.push(timed(name, || if_installed(workspace, "miri", MIRI_NEEDS, &mut command))?);
    }

    let package = workspace.root.join("crates/lcbst");
    println!("\n== fuzz: cargo +nightly fuzz run model, {fuzz_seconds} s");
    let mut command = nightly(&package, "fuzz");
    command.args(["run", "--target-dir"]).arg(workspace.root.join("target/fuzz"));
    command.args(["model", "--"]).arg(format!("-max_total_time={fuzz_seconds}"));
    outcomes.push(timed("fuzz", || if_installed(workspace, "fuzz", FUZZ_NEEDS, &mut command))?);

    Ok(summarise(&outcomes))
}

/// Builds the guest with real programs, and says how each of its workloads is started.
pub(crate) fn study_guest(workspace: &Workspace) -> Result<()> {
    let guest = workloads::build(workspace)?;
    println!("kernel {}, initial RAM disk {}; workloads:", guest.kernel.display(), guest.initramfs.display());
    for workload in workloads::WORKLOADS {
        let Workload { name, about, memory_bytes, command_line, recorded_seconds: _ } = workload;
        println!("{name:<8} {about}; {} MiB, command line: {command_line}", memory_bytes >> 20);
    }
    Ok(())
}

/// Builds the binary in release mode and runs its demo on the tools of this workspace.
pub(crate) fn demo(workspace: &Workspace, arguments: &[String]) -> Result<ExitCode> {
    // The demo on the embedded guest needs nothing but Rust.
    if arguments.iter().any(|argument| argument.contains("qemu")) {
        setup(workspace, false)?;
    }
    let mut command = cargo(&workspace.root);
    command.args(["run", "--quiet", "--release", "--package", "vmferry", "--", "demo"]).args(arguments);
    command.env("VMFERRY_TOOLS", &workspace.tools);
    exit_code_of(&mut command)
}

/// Runs one bench, or all of them.
pub(crate) fn bench(workspace: &Workspace, name: Option<BenchName>, arguments: &[String]) -> Result<ExitCode> {
    let names = name.map_or_else(|| BenchName::value_variants().to_vec(), |name| vec![name]);
    let starts_guests = |name: &BenchName| match name {
        BenchName::Track | BenchName::Transfer => true,
        BenchName::Predict | BenchName::Plan | BenchName::Tree => false,
    };
    if names.iter().any(starts_guests) {
        setup(workspace, false)?;
    }
    let arguments = from_here(arguments)?;
    let mut outcomes = Vec::new();
    for name in names {
        let (label, selection): (_, &[&str]) = match name {
            BenchName::Track => ("track", &["-p", "vmferry-host", "--bench", "track"]),
            BenchName::Predict => ("predict", &["-p", "vmferry-core", "--bench", "predict"]),
            BenchName::Plan => ("plan", &["-p", "vmferry-core", "--bench", "plan"]),
            BenchName::Transfer => ("transfer", &["-p", "vmferry", "--bench", "transfer"]),
            BenchName::Tree => {
                ("tree", &["-p", "lcbst", "--features=concurrent", "--bench", "tree", "--bench", "concurrent"])
            }
        };
        println!("\n== bench {label}");
        let mut command = cargo(&workspace.root);
        command.arg("bench").args(selection).arg("--").args(&arguments).env("VMFERRY_TOOLS", &workspace.tools);
        outcomes.push(timed(label, || verdict_of(&mut command))?);
    }
    Ok(summarise(&outcomes))
}

/// The arguments of a bench, the file of `--csv FILE` as it is meant: Cargo starts benches in their packages' directories.
fn from_here(arguments: &[String]) -> Result<Vec<OsString>> {
    let mut meant = Vec::new();
    let mut is_file = false;
    for argument in arguments {
        meant.push(if is_file {
            std::path::absolute(argument).with_context(|| format!("cannot find {argument}"))?.into()
        } else {
            argument.into()
        });
        is_file = argument == "--csv";
    }
    Ok(meant)
}

/// Measures and draws the figures, with a program of its own: this one need not know how to draw.
pub(crate) fn figures(workspace: &Workspace, quick: bool, out: Option<&Path>, redraw: bool) -> Result<ExitCode> {
    // Cargo is started in the workspace root; a directory that was named is meant from here.
    let out = match out {
        Some(out) => std::path::absolute(out).with_context(|| format!("cannot find {}", out.display()))?,
        None => workspace.root.join("docs/figures"),
    };
    let mut command = cargo(&workspace.root);
    command.args(["run", "--quiet", "--release", "--package", "lcbst-figures", "--", "--out"]).arg(out);
    command.args(quick.then_some("--quick")).args(redraw.then_some("--redraw"));
    exit_code_of(&mut command)
}

/// Runs the study on the recordings that are there, with a program of its own.
pub(crate) fn study(workspace: &Workspace, quick: bool) -> Result<ExitCode> {
    let mut command = cargo(&workspace.root);
    command.args(["run", "--quiet", "--release", "--package", "vmferry-study", "--"]);
    command.arg("--recordings").arg(workspace.root.join("recordings")).arg("--out").arg(workspace.root.join("docs"));
    command.args(quick.then_some("--quick"));
    exit_code_of(&mut command)
}

/// Records the guests of the study with these names, or all of them.
pub(crate) fn record_study(workspace: &Workspace, names: &[String]) -> Result<ExitCode> {
    setup(workspace, false)?;
    recordings::record(workspace, names)
}

/// Moves guests with vmferry and with QEMU's own migration, with a program of its own.
pub(crate) fn compare(workspace: &Workspace, arguments: &[String]) -> Result<ExitCode> {
    let mut command = cargo(&workspace.root);
    command.args(["run", "--quiet", "--release", "--package", "vmferry-compare", "--"]);
    if !asks_for_help(arguments) {
        setup(workspace, false)?;
        if compares_programs(arguments) {
            workloads::build(workspace)?;
        }
        let [ip, tc] = iproute::programs(workspace)?;
        command.arg("--ip").arg(ip).arg("--tc").arg(tc);
        command.arg("--vmferry").arg(recordings::build_vmferry(workspace)?);
        command.arg("--tools").arg(&workspace.tools);
        if !arguments.iter().any(|argument| argument == "--out" || argument.starts_with("--out=")) {
            // A quick one must not replace what took hours.
            let out = if arguments.iter().any(|argument| argument == "--quick") { "target/compare" } else { "docs" };
            command.arg("--out").arg(workspace.root.join(out));
        }
    }
    command.args(arguments);
    exit_code_of(&mut command)
}

fn asks_for_help(arguments: &[String]) -> bool {
    arguments.iter().any(|argument| ["-h", "--help"].contains(&argument.as_str()))
}

/// Whether one of the guests of a comparison is the one with real programs.
fn compares_programs(arguments: &[String]) -> bool {
    let is_some =
        |what: &str| arguments.iter().any(|argument| argument == what || argument.starts_with(&format!("{what}=")));
    let names_it = arguments.iter().any(|argument| argument == "redis" || argument == "--guest=redis");
    names_it || !(is_some("--guest") || is_some("--quick"))
}

/// Runs the models of the concurrent tree with loom's atomics and locks in the place of the real ones, and with so many
/// preemptions, if the environment does not say how many.
fn models(workspace: &Workspace, preemptions: Option<&str>, arguments: &[String]) -> Result<Outcome> {
    let mut settings = vec![("RUSTFLAGS", format!("{} --cfg loom", std::env::var("RUSTFLAGS").unwrap_or_default()))];
    if std::env::var_os("LOOM_MAX_PREEMPTIONS").is_none() {
        settings.extend(preemptions.map(|preemptions| ("LOOM_MAX_PREEMPTIONS", preemptions.to_owned())));
    }
    let shown: Vec<String> = settings.iter().map(|(name, value)| format!("{name}='{}'", value.trim())).collect();
    println!("\n== models: {} cargo {} {}", shown.join(" "), MODELS.join(" "), arguments.join(" "));
    let mut command = cargo(&workspace.root);
    command.args(MODELS).args(arguments).envs(settings);
    timed("models", || verdict_of(&mut command))
}

/// `cargo +nightly SUBCOMMAND`. Only the Cargo that rustup put on the PATH knows toolchains; the one that runs this xtask
/// belongs to one of them.
fn nightly(directory: &Path, subcommand: &str) -> Command {
    let mut command = Command::new("cargo");
    command.args(["+nightly", subcommand]).current_dir(directory);
    command
}

/// Runs a command of a subcommand of the nightly Cargo, or skips it where that does not tell its version.
fn if_installed(
    workspace: &Workspace,
    subcommand: &str,
    needs: &'static str,
    command: &mut Command,
) -> Result<Verdict> {
    let mut probe = nightly(&workspace.root, subcommand);
    probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    if probe.status().is_ok_and(|status| status.success()) {
        verdict_of(command)
    } else {
        println!("skipped: {needs}");
        Ok(Verdict::Skipped(needs))
    }
}

fn verdict_of(command: &mut Command) -> Result<Verdict> {
    Ok(if passes(command)? { Verdict::Passed } else { Verdict::Failed })
}

fn timed(name: &'static str, step: impl FnOnce() -> Result<Verdict>) -> Result<Outcome> {
    let start = Instant::now();
    let verdict = step()?;
    Ok(Outcome { name, verdict, elapsed: start.elapsed() })
}

fn summarise(outcomes: &[Outcome]) -> ExitCode {
    println!();
    for Outcome { name, verdict, elapsed } in outcomes {
        let seconds = elapsed.as_secs_f64();
        match verdict {
            Verdict::Passed => println!("ok       {name:<10} {seconds:>7.1} s"),
            Verdict::Failed => println!("FAILED   {name:<10} {seconds:>7.1} s"),
            Verdict::Skipped(needs) => println!("skipped  {name:<10} {needs}"),
        }
    }
    let has_failed = outcomes.iter().any(|outcome| outcome.verdict == Verdict::Failed);
    if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn exit_code_of(command: &mut Command) -> Result<ExitCode> {
    let status = command.status().context("cannot start cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
