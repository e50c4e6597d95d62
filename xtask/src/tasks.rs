//! `test`, `demo`, `bench` and `figures`: a list of steps each, started one after the other.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::BenchName;
use crate::run::{cargo, passes};
use crate::setup::setup;
use crate::workspace::Workspace;

/// How one step of a task ended.
#[derive(Debug)]
struct Outcome {
    name: &'static str,
    passed: bool,
    elapsed: Duration,
}

/// What is not built by default and has to be right all the same.
const FEATURES: &str = "--features=lcbst/concurrent";

/// Set-up, format, lints, tests, documentation, doc tests. All steps run, so that one run shows all that is wrong,
/// except that `fail_fast` ends it at the first failure.
pub(crate) fn test(workspace: &Workspace, fail_fast: bool, arguments: &[String]) -> Result<ExitCode> {
    let mut outcomes = vec![timed("set-up", || match setup(workspace, false) {
        Ok(()) => Ok(true),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            Ok(false)
        }
    })?];
    let steps: [(&'static str, &[&str], &[String]); 5] = [
        ("format", &["fmt", "--all", "--check"], &[]),
        ("lints", &["clippy", "--workspace", FEATURES, "--all-targets", "--", "-D", "warnings"], &[]),
        ("tests", &["test", "--workspace", FEATURES, "--lib", "--bins", "--tests", "--"], arguments),
        ("docs", &["doc", "--workspace", FEATURES, "--no-deps", "--quiet"], &[]),
        ("doc tests", &["test", "--workspace", FEATURES, "--doc", "--"], arguments),
    ];
    for (name, fixed, extra) in steps {
        if fail_fast && outcomes.iter().any(|outcome| !outcome.passed) {
            break;
        }
        println!("\n== {name}: cargo {} {}", fixed.join(" "), extra.join(" "));
        let mut command = cargo(&workspace.root);
        command.args(fixed).args(extra).env("VMFERRY_TOOLS", &workspace.tools).env("RUSTDOCFLAGS", "-D warnings");
        outcomes.push(timed(name, || passes(&mut command))?);
    }
    Ok(summarise(&outcomes))
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
    // The tree's bench is the only one that starts no guest.
    if name != Some(BenchName::Tree) {
        setup(workspace, false)?;
    }
    let names = name.map_or_else(|| vec![BenchName::Track, BenchName::Transfer, BenchName::Tree], |name| vec![name]);
    let mut outcomes = Vec::new();
    for name in names {
        let (label, selection): (_, &[&str]) = match name {
            BenchName::Track => ("track", &["-p", "vmferry-host", "--bench", "track"]),
            BenchName::Transfer => ("transfer", &["-p", "vmferry", "--bench", "transfer"]),
            BenchName::Tree => ("tree", &["-p", "lcbst", "--bench", "tree"]),
        };
        println!("\n== bench {label}");
        let mut command = cargo(&workspace.root);
        command.arg("bench").args(selection).arg("--").args(arguments).env("VMFERRY_TOOLS", &workspace.tools);
        outcomes.push(timed(label, || passes(&mut command))?);
    }
    Ok(summarise(&outcomes))
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

fn timed(name: &'static str, step: impl FnOnce() -> Result<bool>) -> Result<Outcome> {
    let start = Instant::now();
    let passed = step()?;
    Ok(Outcome { name, passed, elapsed: start.elapsed() })
}

fn summarise(outcomes: &[Outcome]) -> ExitCode {
    println!();
    for Outcome { name, passed, elapsed } in outcomes {
        let verdict = if *passed { "ok    " } else { "FAILED" };
        println!("{verdict}  {name:<10} {:>7.1} s", elapsed.as_secs_f64());
    }
    if outcomes.iter().all(|outcome| outcome.passed) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn exit_code_of(command: &mut Command) -> Result<ExitCode> {
    let status = command.status().context("cannot start cargo")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
