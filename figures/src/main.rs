//! Measures and draws the paper's figures on this machine: response time (figure 6) and delay (figure 7) against the
//! number of nodes, and growth to larger trees.
//!
//! Each figure is measured into a CSV file, and drawn as SVG and PNG from what that file says. `docs/FIGURES.md` says
//! what the figures mean.

mod delay;
mod effort;
mod response;
mod subject;
mod workload;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};

use lcbst_figures::picture::{self, Figure};
use lcbst_figures::table::Table;

use crate::effort::Effort;

/// Measure and draw the figures: response time, delay, growth.
#[derive(Debug, Parser)]
#[command(name = "lcbst-figures", version)]
struct Arguments {
    /// Small trees and few repetitions, to see that everything runs
    #[arg(long)]
    quick: bool,
    /// The directory for CSV, SVG and PNG; created if need be
    #[arg(long, value_name = "DIR", default_value = "docs/figures")]
    out: PathBuf,
    /// Draw from the CSV files that are there, and measure nothing
    #[arg(long, conflicts_with = "quick")]
    redraw: bool,
    /// Only this figure; may be given more than once
    #[arg(long, value_name = "FIGURE")]
    only: Vec<FigureName>,
}

/// The figures by what they show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FigureName {
    /// Figure 6: response time against number of nodes
    Response,
    /// Figure 7: delay against number of nodes
    Delay,
    /// Time and depth in larger trees
    Growth,
}

impl FigureName {
    const ALL: [Self; 3] = [Self::Response, Self::Delay, Self::Growth];

    const fn file_name(self) -> &'static str {
        match self {
            Self::Response => "figure6_response",
            Self::Delay => "figure7_delay",
            Self::Growth => "growth",
        }
    }

    fn measure(self, effort: &Effort) -> Table {
        match self {
            Self::Response => response::measure_response(effort),
            Self::Delay => delay::measure(effort),
            Self::Growth => response::measure_growth(effort),
        }
    }

    fn draw(self, table: &Table) -> Result<Figure> {
        match self {
            Self::Response => response::draw_response(table),
            Self::Delay => delay::draw(table),
            Self::Growth => response::draw_growth(table),
        }
    }
}

fn main() -> Result<()> {
    let Arguments { quick, out, redraw, only } = Arguments::parse();
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    picture::load_font()?;
    let effort = if quick { Effort::quick() } else { Effort::full() };
    for figure in FigureName::ALL {
        if !only.is_empty() && !only.contains(&figure) {
            continue;
        }
        let path = |extension| out.join(figure.file_name()).with_extension(extension);
        if !redraw {
            figure.measure(&effort).write(&path("csv"))?;
        }
        figure.draw(&Table::read(&path("csv"))?)?.write(&path("svg"), &path("png"))?;
        println!("{}, and the same as svg and png", path("csv").display());
    }
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

    #[test]
    fn every_figure_can_be_drawn_from_what_it_measures() {
        let mut effort = Effort::quick();
        effort.response_keys = vec![10, 100];
        effort.delay_keys = vec![10, 100];
        effort.growth_keys = vec![10, 100];
        effort.repetitions = 2;
        effort.lead_in_accesses = 10;
        effort.timed_accesses = 100;
        effort.delay_window = std::time::Duration::from_millis(1);
        for figure in FigureName::ALL {
            let drawn = figure.draw(&figure.measure(&effort)).unwrap();
            for panel in &drawn.panels {
                assert!(!panel.series.is_empty(), "{}", panel.title);
                for series in &panel.series {
                    assert_eq!(series.points.len(), 2, "{}: {}", panel.title, series.name);
                    assert!(series.points.iter().all(|point| point.low <= point.middle && point.middle <= point.high));
                }
            }
        }
    }
}
