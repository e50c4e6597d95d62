//! `vmferry demo`: a guest that checks itself, moved between two processes on this machine.

mod embedded;
mod qemu;

use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::Serialize;
use vmferry_core::engine::{OutcomeKind, Report};
use vmferry_core::pages::PAGE_BYTES;
use vmferry_guest::Parameters;
use vmferry_host::control::{Controls, Role};
use vmferry_host::{Cancel, MigrateOptions, Progress, SelfCheck, SourceVmm, TargetReport, TargetVmm};

use crate::cli::{DemoArgs, Vmm};
use crate::ctl;
use crate::output::{Display, cancel_on_signals, describe_report, print_bytes, print_json};

/// The least RAM of a demo guest.
const MEMORY_MIN_BYTES: u64 = 1 << 20;

/// The report of a demo: that of the migration, and what the guest itself says.
#[derive(Debug, Serialize)]
struct DemoReport {
    vmm: &'static str,
    #[serde(flatten)]
    migration: Report,
    guest: Option<GuestReport>,
}

/// What the guest says after the move.
#[derive(Debug, Serialize)]
struct GuestReport {
    /// Pages it wrote before the pause.
    writes_before: u64,
    /// Pages it had written when it was asked on the target.
    writes_after: u64,
    /// The longest gap between two signs of life, where they are seen from outside.
    gap_ms: Option<f64>,
    /// Its check of all of its memory.
    check: SelfCheck,
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let options = args.tuning.options(args.bandwidth.0).map_err(crate::usage_error)?;
    if args.memory < MEMORY_MIN_BYTES || !args.memory.is_multiple_of(PAGE_BYTES) {
        let message = format!("--memory must be at least 1MiB and a multiple of {PAGE_BYTES} bytes");
        return Err(crate::usage_error(message));
    }
    let cancel = cancel_on_signals()?;
    let control = ctl::serve(Role::Source, "demo", &cancel);
    let controls = control.as_ref().map(|server| server.controls());
    let mut code = ExitCode::SUCCESS;
    for run in 1..=args.repeat {
        if args.repeat > 1 {
            eprintln!("run {run} of {}", args.repeat);
        }
        let report = match args.vmm {
            Vmm::Embedded => embedded::run(args, &options, &cancel, controls)?,
            Vmm::Qemu => qemu::run(args, &options, &cancel, controls)?,
        };
        code = tell(args, &report)?;
        if code != ExitCode::SUCCESS {
            break;
        }
    }
    Ok(code)
}

fn tell(args: &DemoArgs, report: &DemoReport) -> anyhow::Result<ExitCode> {
    if args.tuning.json {
        print_json(report)?;
    } else {
        let mut text = describe_report(&report.migration);
        if let Some(guest) = &report.guest {
            text.push_str(&format!(
                "  guest         wrote {} pages before the move and {} after; checked {} pages itself, {} wrong{}\n",
                guest.writes_before,
                guest.writes_after - guest.writes_before.min(guest.writes_after),
                guest.check.pages,
                guest.check.wrong,
                guest.check.first_wrong.as_ref().map_or(String::new(), |first| format!(", first {first}")),
            ));
            if let Some(gap) = guest.gap_ms {
                let gap = crate::units::show_ms(gap);
                text.push_str(&format!("  gap           {gap} between two of its ticks, seen from outside\n"));
            }
        }
        print_bytes(text.as_bytes())?;
    }
    let wrong = report.guest.as_ref().is_some_and(|guest| guest.check.wrong > 0);
    if wrong {
        eprintln!("vmferry: the guest found wrong pages");
        return Ok(ExitCode::FAILURE);
    }
    Ok(crate::exit_code(report.migration.outcome))
}

/// So much of its RAM the guest writes at all.
fn used_bytes(args: &DemoArgs, default_percent: u8) -> u64 {
    args.memory.saturating_mul(u64::from(args.used.unwrap_or(default_percent))) / 100
}

/// The guest's work, from the command line, with so many bytes to write in.
fn parameters(args: &DemoArgs, pages: u64) -> anyhow::Result<Parameters> {
    let parameters = Parameters {
        pattern: args.pattern,
        pages,
        hot_pages: (args.hot / PAGE_BYTES).clamp(1, pages),
        rate_pages_per_s: args.write_rate,
        seed: args.seed,
        threads: args.threads,
        incompressible_percent: args.incompressible,
        ..Parameters::default()
    };
    parameters.validate().map_err(|error| crate::usage_error(format!("the guest cannot run like this: {error}")))?;
    Ok(parameters)
}

/// Moves a guest over loopback; the target runs on a thread of its own.
fn move_guest(
    source: &mut dyn SourceVmm,
    target: &mut (dyn TargetVmm + Send),
    options: &MigrateOptions,
    cancel: &Cancel,
    controls: Option<&Controls>,
) -> anyhow::Result<(Report, TargetReport)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
    let address = listener.local_addr().context("cannot tell the address listened on")?;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let (stream, _) = listener.accept().context("cannot accept on loopback")?;
            // The source is cancelled, and tells the target.
            let untouched = Cancel::new().context("cannot prepare for signals")?;
            Ok::<_, anyhow::Error>(vmferry_host::receive(
                target,
                stream,
                Some(&listener),
                options.stall_timeout,
                &untouched,
            )?)
        });
        let stream = TcpStream::connect(address).context("cannot connect over loopback")?;
        let mut display = Display::new();
        let mut show = |progress: &Progress| display.update(progress);
        let report = vmferry_host::migrate_with(source, stream, options, cancel, controls, &mut show);
        display.finish();
        let received = receiving.join().expect("the target's thread does not panic")?;
        let report = report?;
        if report.outcome == OutcomeKind::Completed && received.outcome != "completed" {
            bail!("the target says: {}", received.reason.unwrap_or_default());
        }
        Ok((report, received))
    })
}
