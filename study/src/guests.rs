//! Whose writes are replayed: the recordings of the repository, and generated patterns.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use vmferry_core::pages::AddressSpaceId;
use vmferry_sim::trace::{Trace, WrittenRun, file, generate::GeneratorSpec};

/// Generated guests, as `vmferry simulate generate:…` names them.
const GENERATED: [&str; 7] = ["zipf", "hotcold", "phases", "sweep", "chase", "churn", "idle"];
/// The seed of generated traces; the seeds of the sweeps choose where in them a migration begins.
const TRACE_SEED: u64 = 1;

/// A guest of the study.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) trace: Trace,
    /// Whether its writes were recorded from a running guest.
    pub(crate) recorded: bool,
}

impl Guest {
    pub(crate) fn name(&self) -> &str {
        &self.trace.name
    }

    /// The same guest, of whose pages nobody knows whose they are.
    pub(crate) fn without_owners(&self) -> Self {
        let mut trace = self.trace.clone();
        for epoch in &mut trace.epochs {
            let mut runs: Vec<WrittenRun> = Vec::with_capacity(epoch.written.len());
            for written in epoch.written.drain(..) {
                match runs.last_mut() {
                    Some(last) if last.run.end() == written.run.first.0 => last.run.count += written.run.count,
                    Some(_) | None => runs.push(WrittenRun { owner: AddressSpaceId::WHOLE_GUEST, ..written }),
                }
            }
            epoch.written = runs;
        }
        Self { trace, recorded: self.recorded }
    }

    /// How the study's tables name where it is from.
    pub(crate) fn kind(&self) -> &'static str {
        if self.recorded { "recorded" } else { "generated" }
    }
}

/// The recordings by name, and after them the generated ones.
///
/// # Errors
/// When there are no recordings, or one cannot be read.
pub(crate) fn all(recordings: &Path) -> Result<Vec<Guest>> {
    let mut guests = Vec::new();
    for path in parquet_files(recordings)? {
        let opened = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let trace = file::read(opened).with_context(|| format!("cannot read {}", path.display()))?;
        guests.push(Guest { trace, recorded: true });
    }
    ensure!(
        !guests.is_empty(),
        "there is no recording in {}; `cargo xtask study --record` makes them",
        recordings.display()
    );
    for spec in GENERATED {
        let parsed: GeneratorSpec = spec.parse().with_context(|| format!("{spec} is no generator"))?;
        let mut trace = parsed.generate(TRACE_SEED).with_context(|| format!("{spec} cannot be generated"))?;
        // A recorded guest may have the same name.
        trace.name = format!("{spec}, generated");
        guests.push(Guest { trace, recorded: false });
    }
    Ok(guests)
}

fn parquet_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "parquet") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
