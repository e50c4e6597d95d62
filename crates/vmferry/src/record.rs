//! `vmferry record`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufWriter;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use vmferry_core::engine::AddressSpacesReport;
use vmferry_core::pages::{PAGE_BYTES, PageRun, PageSet, split_by_owner};
use vmferry_host::{QemuSource, SourceVmm, watch, zero_pages};
use vmferry_sim::trace::file::{Header, Writer};
use vmferry_sim::trace::{TraceEpoch, WrittenRun, union};

use crate::cli::RecordArgs;
use crate::output::{Lines, cancel_on_signals, describe_spaces, print_bytes, print_json};
use crate::units::{show_bytes, show_ms, show_rate};

/// What was recorded.
#[derive(Debug, Serialize)]
struct RecordReport {
    file: String,
    file_bytes: u64,
    guest_pages: u64,
    zero_pages: u64,
    epochs: u64,
    late_epochs: u64,
    epoch_ms: f64,
    page_writes: u64,
    dirty_pages_per_s: f64,
    scan_ms: f64,
    /// Owners that pages were recorded for.
    owners: u64,
    /// Epochs with accessed pages.
    accessed_epochs: u64,
    address_spaces: Option<AddressSpacesReport>,
}

pub(crate) fn record(args: &RecordArgs) -> anyhow::Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let mut source = QemuSource::attach(&args.qmp, args.pid, None)?;
    if !args.no_owners {
        source.tell_owners_apart();
    }
    let pages = source.memory().layout().total_pages();
    let name = args.name.clone().unwrap_or_else(|| args.output.display().to_string());
    let file = File::create(&args.output).with_context(|| format!("cannot write {}", args.output.display()))?;
    let mut writer = Writer::new(BufWriter::new(file), Header { name, pages, epoch: args.epoch })?;

    // Tracking is on since the source is attached. So a page that is written while it is read here is found later.
    let zero_at_start = zero_pages(source.memory())?;
    let mut written_ever = PageSet::empty(pages);
    let most = args.duration.map_or(u64::MAX, |duration| (duration.as_nanos() / args.epoch.as_nanos()).max(1) as u64);
    let mut lines = Lines::new();
    let (mut page_writes, mut recorded, mut failed) = (0_u64, Duration::ZERO, None);
    let (mut owners, mut accessed_epochs) = (BTreeSet::new(), 0);
    let watched = watch(&mut source, args.epoch, &cancel, &mut |epoch| {
        let written = split_by_owner(epoch.owners(), epoch.written).into_iter();
        let written: Vec<WrittenRun> = written.map(|(owner, run)| WrittenRun { run, owner }).collect();
        owners.extend(written.iter().map(|written| written.owner));
        // Between two walks nothing new is known, and Linux hardly ever clears the bits.
        let accessed = (args.accessed && epoch.walked).then(|| union(epoch.accessed(), epoch.written.iter().copied()));
        accessed_epochs += u64::from(accessed.is_some());
        let pages: u64 = epoch.written.iter().map(|run| run.count).sum();
        for &run in epoch.written {
            written_ever.insert_run(run);
        }
        page_writes += pages;
        recorded += epoch.length;
        lines.update(|| {
            let rate = pages as f64 * PAGE_BYTES as f64 / epoch.length.as_secs_f64();
            format!("{:.1} s recorded, guest writes {}", recorded.as_secs_f64(), show_rate(rate))
        });
        if let Err(error) = writer.push(&TraceEpoch { written, accessed }) {
            failed = Some(error);
            return ControlFlow::Break(());
        }
        if epoch.number + 1 >= most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    lines.finish();
    if let Some(error) = failed {
        return Err(error).with_context(|| format!("cannot write {}", args.output.display()));
    }

    // A guest that ended is recorded as far as it went.
    let (summary, ended) = match watched {
        Ok(summary) => (summary, None),
        Err(error) if writer.epochs() > 0 => (Default::default(), Some(error)),
        Err(error) => return Err(error.into()),
    };
    let epochs = writer.epochs();
    let zero = still_zero(&zero_at_start, &written_ever);
    let file = writer.finish(&zero)?.into_inner().context("cannot write the trace's end")?;
    let seconds = recorded.as_secs_f64();
    let report = RecordReport {
        file: args.output.display().to_string(),
        file_bytes: file.metadata().map_or(0, |metadata| metadata.len()),
        guest_pages: pages,
        zero_pages: zero.iter().map(|run| run.count).sum(),
        epochs,
        late_epochs: summary.late_epochs,
        epoch_ms: args.epoch.as_secs_f64() * 1e3,
        page_writes,
        dirty_pages_per_s: if seconds > 0.0 { page_writes as f64 / seconds } else { 0.0 },
        scan_ms: summary.scanning.as_secs_f64() * 1e3,
        owners: owners.len() as u64,
        accessed_epochs,
        address_spaces: source.owners_report(),
    };
    if args.json {
        print_json(&report)?;
    } else {
        print_bytes(describe(&report).as_bytes())?;
    }
    match ended {
        None => Ok(ExitCode::SUCCESS),
        Some(error) => Err(error).context("the recording ends early, and is complete as far as it goes"),
    }
}

fn describe(report: &RecordReport) -> String {
    let mut text = format!(
        "Recorded {} epochs of {} into {} ({}).\n  guest         {} pages, {} of them zero all the time\n  \
         written       {} pages in all, {}\n  tracking      {} in scans; {} epochs were longer than asked for\n",
        report.epochs,
        show_ms(report.epoch_ms),
        report.file,
        show_bytes(report.file_bytes),
        report.guest_pages,
        report.zero_pages,
        report.page_writes,
        show_rate(report.dirty_pages_per_s * PAGE_BYTES as f64),
        show_ms(report.scan_ms),
        report.late_epochs,
    );
    if let Some(spaces) = &report.address_spaces {
        text.push_str(&format!("  owners        {} of written pages; {}\n", report.owners, describe_spaces(spaces)));
    }
    if report.accessed_epochs > 0 {
        text.push_str(&format!("  accessed      recorded in {} epochs\n", report.accessed_epochs));
    }
    text
}

/// The pages of `zero` that are not in `written`.
fn still_zero(zero: &[PageRun], written: &PageSet) -> Vec<PageRun> {
    let mut left = Vec::new();
    for &run in zero {
        let mut holes = Vec::new();
        let mut from = run.first;
        while let Some(hole) = written.next_run(from, u64::MAX).filter(|hole| hole.first.0 < run.end()) {
            holes.push(PageRun::new(hole.first.0, hole.end().min(run.end()) - hole.first.0));
            from.0 = hole.end();
        }
        left.extend(run.without(&holes));
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_not_zero_any_more() {
        let mut written = PageSet::empty(100);
        for run in [PageRun::new(0, 12), PageRun::new(15, 1), PageRun::new(40, 60)] {
            written.insert_run(run);
        }
        let zero = [PageRun::new(10, 10), PageRun::new(30, 5), PageRun::new(38, 10)];
        let left = [PageRun::new(12, 3), PageRun::new(16, 4), PageRun::new(30, 5), PageRun::new(38, 2)];
        assert_eq!(still_zero(&zero, &written), left);
    }
}
