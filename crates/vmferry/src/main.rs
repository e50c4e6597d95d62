//! The vmferry command.

mod cli;
mod ctl;
mod demo;
mod inspect;
mod migrate;
mod output;
mod record;
mod simulate;
mod trace;
mod units;
mod watch;

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;
use vmferry_core::engine::OutcomeKind;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(usage) => usage.exit(),
            Err(error) => {
                eprintln!("vmferry: {}", vmferry_host::describe(error.as_ref()));
                ExitCode::FAILURE
            }
        },
    }
}

/// What is wrong with the command line beyond what its definition tells; ends with the same exit code.
fn usage_error(message: impl std::fmt::Display) -> anyhow::Error {
    Cli::command().error(ErrorKind::ValueValidation, message).into()
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Receive(args) => migrate::receive(&args),
        Command::Migrate(args) => migrate::migrate(&args),
        Command::Ctl(args) => ctl::run(&args.command),
        Command::Record(args) => record::record(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Trace(args) => trace::run(&args.command),
        Command::Simulate(args) => simulate::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vmferry", &mut script);
            output::print_bytes(&script)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { directory } => {
            std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
            clap_mangen::generate_to(Cli::command(), &directory)
                .with_context(|| format!("cannot write man pages to {}", directory.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::EmbeddedGuest => {
            vmferry_host::run_guest(io::stdin().as_fd().try_clone_to_owned()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Guard => {
            vmferry_host::run_guard(io::stdin().as_fd().try_clone_to_owned()?)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The exit code of a migration, as seen by the source.
fn exit_code(outcome: OutcomeKind) -> ExitCode {
    ExitCode::from(match outcome {
        OutcomeKind::Completed => 0,
        OutcomeKind::Failed => 1,
        OutcomeKind::NotConverged => 3,
        OutcomeKind::InDoubt => 4,
        OutcomeKind::Cancelled => 130,
    })
}
