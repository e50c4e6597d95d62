//! The demo on two processes of our own.

use anyhow::Context;
use vmferry_core::engine::OutcomeKind;
use vmferry_host::control::Controls;
use vmferry_host::{Cancel, EmbeddedGuest, EmbeddedSource, EmbeddedTarget, GuestProgram, MigrateOptions, pages_in};

use super::{DemoReport, GuestReport, move_guest, parameters, used_bytes};
use crate::cli::DemoArgs;

/// The guest uses so much of its RAM; the rest stays untouched, as in most guests.
const USED_PERCENT: u8 = 75;

pub(super) fn run(
    args: &DemoArgs,
    options: &MigrateOptions,
    cancel: &Cancel,
    controls: Option<&Controls>,
) -> anyhow::Result<DemoReport> {
    let program = GuestProgram {
        program: std::env::current_exe().context("cannot find the vmferry program to start its guest")?,
        arguments: vec!["embedded-guest".into()],
    };
    let parameters = parameters(args, pages_in(used_bytes(args, USED_PERCENT)))?;
    let guest = EmbeddedGuest::start(&program, args.memory, &parameters)?;
    let waiting = EmbeddedGuest::start_incoming(&program, args.memory, &parameters)?;
    let mut source = EmbeddedSource::attach(guest)?;
    let mut target = EmbeddedTarget::new(waiting);
    let (report, _) = move_guest(&mut source, &mut target, options, cancel, controls)?;

    let writes_before = source.guest().writes()?;
    let guest = if report.outcome == OutcomeKind::Completed {
        let guest = target.guest();
        let check = guest.check()?;
        Some(GuestReport { writes_before, writes_after: guest.writes()?, gap_ms: None, check })
    } else {
        let check = source.guest().check()?;
        let writes_after = source.guest().writes()?;
        Some(GuestReport { writes_before, writes_after, gap_ms: None, check })
    };
    Ok(DemoReport { vmm: "embedded", migration: report, guest })
}
