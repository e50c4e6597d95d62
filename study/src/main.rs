//! The study: vmferry's policy and its rivals on recorded and generated guests, against the optimum.
//!
//! Writes `STUDY.md`, which says what came out, and a directory `study` beside it with the pictures and, as CSV, every
//! figure behind them. Nothing in the text is written by hand that is a measurement: it is filled in from the runs, so
//! that a later study says what is true then.
//!
//! Everything here but the costs is simulated time, and comes out alike on every machine. The costs are those of the
//! machine that ran the benches (`cargo xtask bench predict`, `cargo xtask bench plan`); they are read from their CSV files.

mod costs;
mod grid;
mod guests;
mod page;
mod pictures;
mod quality;
mod verdict;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use lcbst_figures::picture;

use crate::grid::Grid;

/// Measure vmferry's policies on recorded and generated guests.
#[derive(Debug, Parser)]
#[command(name = "vmferry-study", version)]
struct Arguments {
    /// The directory of the recorded guests, as `cargo xtask study --record` makes them
    #[arg(long, value_name = "DIR", default_value = "recordings")]
    recordings: PathBuf,
    /// The directory for STUDY.md, and for its pictures and tables in `study`
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// Few cells and seeds, to see that everything runs
    #[arg(long)]
    quick: bool,
    /// Simulations at a time [default: one for each processor]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

fn main() -> Result<()> {
    let Arguments { recordings, out, quick, jobs } = Arguments::parse();
    let jobs = jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let tables = out.join("study");
    fs::create_dir_all(&tables).with_context(|| format!("cannot create {}", tables.display()))?;
    picture::load_font()?;

    let guests = guests::all(&recordings)?;
    let grid = if quick { Grid::quick() } else { Grid::full() };
    let cells = grid::run(&guests, &grid, jobs)?;
    grid::table(&cells).write(&tables.join("cells.csv"))?;
    let predictors = grid::run_predictors(&guests, &grid, jobs)?;
    let observation = grid::run_observation(&guests, &grid, jobs)?;
    let without_owners = grid::run_without_owners(&guests, &grid, jobs)?;
    let quality = quality::measure(&guests, quick, jobs);
    quality::table(&quality).write(&tables.join("quality.csv"))?;
    let costs = costs::read(&tables)?;

    for (name, figure) in pictures::all(&cells, costs.as_ref())? {
        figure.write(&tables.join(name).with_extension("svg"), &tables.join(name).with_extension("png"))?;
    }
    let text = page::page(&page::Study {
        guests: &guests,
        grid: &grid,
        cells: &cells,
        predictors: &predictors,
        observation: &observation,
        without_owners: &without_owners,
        quality: &quality,
        costs: costs.as_ref(),
    });
    let path = out.join("STUDY.md");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}, with pictures and tables in {}", path.display(), tables.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }
}
