//! `vmferry migrate` and `vmferry receive`.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags};
use serde::Serialize;
use vmferry_core::engine::OutcomeKind;
use vmferry_host::control::Role;
use vmferry_host::{Cancel, GuardProgram, Progress, QemuSource, QemuTarget, TargetReport, describe};

use crate::cli::{MigrateArgs, ReceiveArgs};
use crate::ctl;
use crate::output::{Display, cancel_on_signals, describe_report, print_bytes, print_json};

/// How long connecting to the target may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn migrate(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let options = args.tuning.options(args.bandwidth).map_err(crate::usage_error)?;
    let cancel = cancel_on_signals()?;
    let guard = guard_program()?;
    // First, since it can take longer than a target waits for the first word.
    let mut source = QemuSource::attach(&args.qmp, args.pid, Some(&guard))?;
    let control = ctl::serve(Role::Source, &args.qmp.to_string_lossy(), &cancel);
    let stream = connect(&args.to)?;
    let mut display = Display::new();
    let controls = control.as_ref().map(|server| server.controls());
    let mut show = |progress: &Progress| display.update(progress);
    let report = vmferry_host::migrate_with(&mut source, stream, &options, &cancel, controls, &mut show);
    display.finish();
    let report = report?;
    // From here on the exit code says where the guest is, whatever else fails.
    if report.outcome == OutcomeKind::Completed
        && args.quit_source
        && let Err(error) = source.quit()
    {
        eprintln!("vmferry: the source's QEMU did not end: {}", describe(&error));
    }
    drop(source);
    tell(&report, args.tuning.json, describe_report);
    Ok(crate::exit_code(report.outcome))
}

/// Prints a report. Where that fails, the exit code still says where the guest runs.
fn tell<R: Serialize>(report: &R, json: bool, describe: impl FnOnce(&R) -> String) {
    let printed = if json { print_json(report) } else { print_bytes(describe(report).as_bytes()) };
    if let Err(error) = printed {
        eprintln!("vmferry: {}", vmferry_host::describe(error.as_ref()));
    }
}

/// This program, as the guard of its own migration.
pub(crate) fn guard_program() -> anyhow::Result<GuardProgram> {
    let program = std::env::current_exe().context("cannot find the vmferry program to start its guard")?;
    Ok(GuardProgram { program, arguments: vec!["guard".into()] })
}

fn connect(to: &str) -> anyhow::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = to
        .to_socket_addrs()
        .with_context(|| format!("`{to}` is not an address to connect to; write HOST:PORT"))?
        .collect();
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => {
                warn_of_clear_text(address);
                return Ok(stream);
            }
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).with_context(|| {
            format!("cannot connect to {to}: is `vmferry receive` waiting there, and may we reach it?")
        }),
        None => bail!("`{to}` has no address"),
    }
}

fn warn_of_clear_text(address: SocketAddr) {
    if !address.ip().is_loopback() {
        eprintln!("vmferry: warning: the connection to {address} is not encrypted: use it on a network that you trust");
    }
}

pub(crate) fn receive(args: &ReceiveArgs) -> anyhow::Result<ExitCode> {
    if args.stall_timeout < Duration::from_millis(1) {
        return Err(crate::usage_error("--stall-timeout must be at least 1ms"));
    }
    let cancel = cancel_on_signals()?;
    let mut target = QemuTarget::attach(&args.qmp, args.pid)?;
    let listener = TcpListener::bind(args.listen).with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr().context("cannot tell the address listened on")?;
    // On standard error, so that --json leaves one document on standard output.
    let control = ctl::serve(Role::Target, &args.qmp.to_string_lossy(), &cancel);
    let controls = control.as_ref().map(|server| server.controls());
    eprintln!("listening on {address}");
    std::io::stderr().flush().context("cannot write to standard error")?;
    let report = loop {
        if let Some(controls) = controls {
            controls.show_doing(&format!("waiting for a source on {address}"));
        }
        let Some((stream, peer)) = accept(&listener, &cancel)? else {
            eprintln!("cancelled; no guest was received");
            return Ok(crate::exit_code(OutcomeKind::Cancelled));
        };
        tracing::info!(%peer, "connected");
        warn_of_clear_text(peer);
        let report =
            vmferry_host::receive_with(&mut target, stream, Some(&listener), args.stall_timeout, &cancel, controls)?;
        if report.migration_id.is_some() || cancel.is_cancelled() {
            break report;
        }
        // A port scan, or a source with another guest: not the one we wait for.
        let reason = report.reason.as_deref().unwrap_or("unknown");
        eprintln!("vmferry: {peer} was turned away: {reason}; still listening on {address}");
    };
    tell(&report, args.json, describe_target);
    Ok(match report.outcome {
        "completed" => ExitCode::SUCCESS,
        "in_doubt" => ExitCode::from(4),
        _ if cancel.is_cancelled() => ExitCode::from(130),
        _ => ExitCode::FAILURE,
    })
}

/// The next connection; `None` once cancelled.
fn accept(listener: &TcpListener, cancel: &Cancel) -> anyhow::Result<Option<(TcpStream, SocketAddr)>> {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::from_borrowed_fd(cancel.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for a connection"),
        }
        if cancel.is_cancelled() {
            return Ok(None);
        }
        if !fds[0].revents().is_empty() {
            return listener.accept().map(Some).context("cannot accept a connection");
        }
    }
}

fn describe_target(report: &TargetReport) -> String {
    let mut text = match report.outcome {
        "completed" => "The guest runs here.\n".to_owned(),
        "in_doubt" => {
            "The guest was handed over and does not run here. See the reason; the source stays paused.\n".to_owned()
        }
        _ if report.can_retry => {
            "No guest was received; it runs on the source. This QEMU can take another attempt.\n".to_owned()
        }
        _ => "No guest was received; it runs on the source. Start this QEMU anew for another attempt.\n".to_owned(),
    };
    if let Some(reason) = &report.reason {
        text.push_str(&format!("  reason        {reason}\n"));
    }
    text.push_str(&format!("  received      {}\n", crate::units::show_bytes(report.wire_bytes)));
    if let (Some(pages), Some(mismatched)) = (report.verified_pages, report.mismatched_pages) {
        text.push_str(&format!("  verification  {pages} pages compared, {mismatched} differ\n"));
    }
    text
}
