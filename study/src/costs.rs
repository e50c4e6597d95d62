//! What prediction and planning cost, as the benches of `vmferry-core` measured it.

use std::path::Path;

use anyhow::{Context as _, Result};
use lcbst_figures::table::{Row, Table};

/// The files of the benches, and how they are made.
pub(crate) const PREDICT_FILE: &str = "cost_predict.csv";
pub(crate) const PLAN_FILE: &str = "cost_plan.csv";

/// Both benches' results.
#[derive(Debug)]
pub(crate) struct Costs {
    pub(crate) predict: Vec<PredictCost>,
    pub(crate) plan: Vec<PlanCost>,
}

/// One predictor on one workload.
#[derive(Debug, Clone)]
pub(crate) struct PredictCost {
    pub(crate) predictor: String,
    pub(crate) workload: String,
    pub(crate) hot_pages: f64,
    pub(crate) ns_per_page: f64,
    pub(crate) ns_per_page_least: f64,
    pub(crate) bytes_per_page: f64,
}

/// One phase of a migration of one workload.
#[derive(Debug, Clone)]
pub(crate) struct PlanCost {
    pub(crate) workload: String,
    pub(crate) phase: String,
    pub(crate) written_pages: f64,
    pub(crate) scan_ms: f64,
    pub(crate) scan_least_ms: f64,
    pub(crate) predictor_bytes: f64,
}

/// Reads them; `None` if the benches were not run.
///
/// # Errors
/// When a file is there and is none of theirs.
pub(crate) fn read(directory: &Path) -> Result<Option<Costs>> {
    let (predict, plan) = (directory.join(PREDICT_FILE), directory.join(PLAN_FILE));
    if !predict.exists() || !plan.exists() {
        return Ok(None);
    }
    let predict = rows(&predict, |row| {
        Ok(PredictCost {
            predictor: row.text("predictor")?.to_owned(),
            workload: row.text("workload")?.to_owned(),
            hot_pages: row.number("hot_pages")?,
            ns_per_page: row.number("ns_per_page")?,
            ns_per_page_least: row.number("ns_per_page_least")?,
            bytes_per_page: row.number("bytes_per_page")?,
        })
    })?;
    let plan = rows(&plan, |row| {
        Ok(PlanCost {
            workload: row.text("workload")?.to_owned(),
            phase: row.text("phase")?.to_owned(),
            written_pages: row.number("written_pages")?,
            scan_ms: row.number("scan_ms")?,
            scan_least_ms: row.number("scan_least_ms")?,
            predictor_bytes: row.number("predictor_bytes")?,
        })
    })?;
    Ok(Some(Costs { predict, plan }))
}

fn rows<T>(path: &Path, of_row: fn(Row<'_>) -> Result<T>) -> Result<Vec<T>> {
    let table = Table::read(path)?;
    let rows: Result<Vec<T>> = table.rows().map(of_row).collect();
    rows.with_context(|| format!("{} is not what the benches write", path.display()))
}
