//! `vmferry trace`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use vmferry_core::pages::PAGE_BYTES;
use vmferry_sim::trace::generate::{GeneratorSpec, workloads};
use vmferry_sim::trace::import::{CsvOptions, LackeyOptions, Numbering, csv, lackey};
use vmferry_sim::trace::{Info, Trace, file};

use crate::cli::{ImportFormat, TraceCommand};
use crate::output::{print_bytes, print_json};
use crate::units::{show_bytes, show_ms, show_rate};

pub(crate) fn run(command: &TraceCommand) -> anyhow::Result<ExitCode> {
    match command {
        TraceCommand::Info { file, json } => {
            let info = read(file)?.info();
            if *json { print_json(&info)? } else { print_bytes(describe(&info).as_bytes())? }
        }
        TraceCommand::Generate { spec, .. } if spec == "help" => print_bytes(workload_help().as_bytes())?,
        TraceCommand::Generate { spec, output, seed } => {
            let spec: GeneratorSpec = spec.parse().map_err(crate::usage_error)?;
            let Some(output) = output else {
                return Err(crate::usage_error("where shall the trace go? Give --output"));
            };
            write(&spec.generate(*seed)?, output)?;
        }
        TraceCommand::Import { input, output, format, epoch, memory, renumber, instructions, accessed } => {
            let name = output.display().to_string();
            let (guest_pages, epoch) = (memory.map(|bytes| bytes.div_ceil(PAGE_BYTES)), *epoch);
            let from = open(input)?;
            let imported = match format {
                ImportFormat::Csv => {
                    let numbering = if *renumber { Numbering::FirstTouch } else { Numbering::AsGiven };
                    csv(from, &CsvOptions { name, guest_pages, epoch, numbering })
                }
                ImportFormat::Lackey => {
                    let (epoch_instructions, accessed) = (*instructions, *accessed);
                    lackey(from, &LackeyOptions { name, guest_pages, epoch_instructions, epoch, accessed })
                }
            }
            .with_context(|| format!("cannot import {}", input.display()))?;
            write(&imported.trace, output)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads a trace.
pub(crate) fn read(path: &Path) -> anyhow::Result<Trace> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file::read(BufReader::new(file)).with_context(|| format!("cannot read the trace {}", path.display()))
}

/// A file, or standard input for `-`.
fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Box::new(BufReader::new(file)))
}

fn write(trace: &Trace, path: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let to = BufWriter::new(File::create(path).with_context(cannot)?);
    file::write(trace, to).with_context(cannot)?.flush().with_context(cannot)?;
    let bytes = path.metadata().map_or(0, |metadata| metadata.len());
    print_bytes(format!("{}: {} epochs, {}\n", path.display(), trace.epochs.len(), show_bytes(bytes)).as_bytes())
}

fn describe(info: &Info) -> String {
    let mut text = format!("{}\n", info.name);
    let mut line = |name: &str, value: String| text.push_str(&format!("  {name:<14}{value}\n"));
    let bytes = |pages: f64| show_bytes((pages * PAGE_BYTES as f64) as u64);
    line("guest", format!("{} pages, {}", info.guest_pages, bytes(info.guest_pages as f64)));
    line("zero", format!("{} pages stay zero, as far as known", info.zero_pages));
    line("recorded", format!("{} epochs of {}, {}", info.epochs, show_ms(info.epoch_ms), show_ms(info.duration_ms)));
    line(
        "written",
        format!(
            "{} pages at least once, {}; {} of them in one epoch only",
            info.distinct_pages,
            bytes(info.distinct_pages as f64),
            info.pages_written_once
        ),
    );
    let rate = info.dirty_rate;
    let show = |pages_per_s: f64| show_rate(pages_per_s * PAGE_BYTES as f64);
    line(
        "dirty rate",
        format!(
            "{} on average; median {}, 95 % below {}, at most {}",
            show(rate.mean_pages_per_s),
            show(rate.p50_pages_per_s),
            show(rate.p95_pages_per_s),
            show(rate.max_pages_per_s)
        ),
    );
    line(
        "rewriting",
        format!(
            "{:.0} % of an epoch's pages are written in the next one too, {:.0} % were written before",
            info.rewritten_next_share * 100.0,
            info.rewritten_share * 100.0
        ),
    );
    line("runs", format!("{} written, of {:.1} pages on average", info.runs, info.pages_per_run));
    for set in &info.working_set {
        line(
            "working set",
            format!(
                "over {} epochs: {} on average, at most {}",
                set.window_epochs,
                bytes(set.mean_pages),
                bytes(set.max_pages as f64)
            ),
        );
    }
    if let Some(pages) = info.accessed_pages_per_epoch {
        line("accessed", format!("{pages:.0} pages an epoch, read or written"));
    }
    if info.owners.len() > 1 {
        for owner in &info.owners {
            line(
                "owner",
                format!(
                    "{}: {} pages, written {} times in {} epochs",
                    owner.owner, owner.distinct_pages, owner.page_writes, owner.epochs
                ),
            );
        }
    }
    text
}

fn workload_help() -> String {
    let mut text = String::new();
    for workload in workloads() {
        text.push_str(&format!("{}: {}\n", workload.name, workload.summary));
        for parameter in workload.parameters {
            text.push_str(&format!("  {:<10} {} [{}]\n", parameter.name, parameter.summary, parameter.default));
        }
    }
    text
}
