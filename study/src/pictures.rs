//! The study's pictures.

use anyhow::Result;
use lcbst_figures::picture::{Colour, Figure, Look, Marker, Panel, Point, Scale, Series, Ticks};
use lcbst_figures::spread::quantile;

use crate::costs::Costs;
use crate::grid::{Cell, OURS, QEMU, XEN};
use crate::verdict::{Pair, pairs};

/// The default predictor's name in the benches' tables.
const DEFAULT_PREDICTOR: &str = "lcbst";

/// Names of the files, without their endings, and what is in them.
///
/// # Errors
/// When there is nothing to draw.
pub(crate) fn all(cells: &[Cell], costs: Option<&Costs>) -> Result<Vec<(&'static str, Figure)>> {
    let mut pictures = vec![("excess", excess(cells)), ("time", time(cells)), ("downtime", downtime(cells))];
    if let Some(costs) = costs {
        pictures.push(("cost", cost(costs)));
    }
    Ok(pictures)
}

fn look(name: &str) -> Look {
    let (colour, marker) = match name {
        "limit 30 ms" => (Colour::Vermilion, Marker::Circle),
        "limit 100 ms" => (Colour::Orange, Marker::Diamond),
        "limit 300 ms" => (Colour::Green, Marker::Triangle),
        "limit 1000 ms" => (Colour::Blue, Marker::Square),
        OURS => (Colour::Blue, Marker::Square),
        QEMU => (Colour::Vermilion, Marker::Circle),
        XEN => (Colour::Green, Marker::Triangle),
        "post-copy" => (Colour::Purple, Marker::Diamond),
        "skip-written" => (Colour::Orange, Marker::PointDown),
        "observing" | "all" => (Colour::Blue, Marker::Square),
        "cold" | "tenth" => (Colour::SkyBlue, Marker::Circle),
        "late" | "zipf" => (Colour::Green, Marker::Triangle),
        "warm" | "churn" => (Colour::Vermilion, Marker::Diamond),
        "tenth-of-16" => (Colour::Orange, Marker::PointDown),
        _ => return Look::REFERENCE,
    };
    Look::line(colour, marker)
}

/// The median of the values between their quartiles; nothing of nothing.
fn middle(x: f64, mut values: Vec<f64>, band: [f64; 2]) -> Option<Point> {
    values.sort_by(f64::total_cmp);
    let at = |share| quantile(&values, share);
    (!values.is_empty()).then(|| Point { x, low: at(band[0]), middle: at(0.5), high: at(band[1]) })
}

const QUARTILES: [f64; 2] = [0.25, 0.75];

/// Each value once, ascending.
fn distinct(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    values
}

/// A panel of a ratio over the load, a line for each limit.
fn over_load(title: &str, y_label: &str, pairs: &[&Pair<'_>], ratio: fn(&Pair<'_>) -> Option<f64>) -> Panel {
    let loads = distinct(pairs.iter().map(|pair| pair.cell.load));
    let mut series = Vec::new();
    for limit_ms in distinct(pairs.iter().map(|pair| pair.cell.limit_ms)) {
        for &load in &loads {
            let here = |pair: &&&Pair<'_>| pair.cell.limit_ms == limit_ms && pair.cell.load == load;
            let values: Vec<f64> =
                pairs.iter().filter(here).filter_map(|pair| ratio(pair)).filter(|v| v.is_finite()).collect();
            if let Some(point) = middle(load, values, QUARTILES) {
                Series::add(&mut series, &format!("limit {limit_ms:.0} ms"), point);
            }
        }
    }
    for load in loads {
        Series::add(&mut series, "equal", Point::exact(load, 1.0));
    }
    panel(title, "load: dirty rate over link rate", Ticks::AtPoints, y_label, series)
}

fn panel(title: &str, x_label: &str, x_ticks: Ticks, y_label: &str, series: Vec<Series>) -> Panel {
    Panel {
        title: title.to_owned(),
        x_label: x_label.to_owned(),
        x_ticks,
        y_label: y_label.to_owned(),
        y_scale: Scale::Linear,
        series,
    }
}

const BANDS: &str = "Lines: median over the guests. Bands: quartiles. Below 1, vmferry is ahead.";

fn excess(cells: &[Cell]) -> Figure {
    let pairs = pairs(cells, OURS, QEMU);
    let panels = [(true, "recorded guests"), (false, "generated guests")].map(|(recorded, title)| {
        // Where next to nothing is sent twice, a ratio is of a handful of pages, and would hide all others.
        let is_here = |pair: &&Pair<'_>| pair.cell.recorded == recorded && !pair.has_little_to_save();
        let here: Vec<&Pair<'_>> = pairs.iter().filter(is_here).collect();
        over_load(title, "excess over QEMU's rule's", &here, |pair| pair.excess_ratio())
    });
    Figure {
        title: "Pages sent more than once, in relation to pre-copy with QEMU's rule".to_owned(),
        caption: format!("{BANDS} Without cells in which QEMU's rule sends less than 0.2 % twice."),
        columns: 2,
        panels: panels.into(),
        looks: look,
    }
}

fn time(cells: &[Cell]) -> Figure {
    let panels = [(QEMU, "against QEMU's rule"), (XEN, "against Xen's rule")].map(|(other, title)| {
        let pairs = pairs(cells, OURS, other);
        over_load(title, "total time over the other's", &pairs.iter().collect::<Vec<_>>(), |pair| {
            Some(pair.time_ratio())
        })
    });
    Figure {
        title: "Total time, in relation to others".to_owned(),
        caption: BANDS.to_owned(),
        columns: 2,
        panels: panels.into(),
        looks: look,
    }
}

/// Downtime over its limit, of all runs of all guests.
fn downtime(cells: &[Cell]) -> Figure {
    let mut series = Vec::new();
    let limits = distinct(cells.iter().map(|cell| cell.limit_ms));
    for arm in [OURS, QEMU, XEN, "skip-written", "post-copy"] {
        for &limit_ms in &limits {
            let runs = cells.iter().filter(|cell| cell.limit_ms == limit_ms).flat_map(|cell| &cell.arm(arm).runs);
            let values: Vec<f64> =
                runs.filter(|run| run.converged).map(|run| (run.downtime_ms / limit_ms).max(1e-3)).collect();
            if let Some(point) = middle(limit_ms, values, [0.05, 0.95]) {
                Series::add(&mut series, arm, point);
            }
        }
    }
    for &limit_ms in &limits {
        Series::add(&mut series, "the limit", Point::exact(limit_ms, 1.0));
    }
    let mut panel =
        panel("all guests, all loads", "downtime limit (ms)", Ticks::AtPoints, "downtime over its limit", series);
    panel.y_scale = Scale::Logarithmic;
    Figure {
        title: "Downtime in relation to its limit".to_owned(),
        caption: "Lines: median over all runs that ended on the target. Bands: 5 % to 95 %.".to_owned(),
        columns: 1,
        panels: vec![panel],
        looks: look,
    }
}

fn cost(costs: &Costs) -> Figure {
    let (mut times, mut memory, mut scans) = (Vec::new(), Vec::new(), Vec::new());
    for row in costs.predict.iter().filter(|row| row.predictor == DEFAULT_PREDICTOR) {
        let time =
            Point { x: row.hot_pages, low: row.ns_per_page_least, middle: row.ns_per_page, high: row.ns_per_page };
        Series::add(&mut times, &row.workload, time);
        Series::add(&mut memory, &row.workload, Point::exact(row.hot_pages, row.bytes_per_page));
    }
    for row in costs.plan.iter().filter(|row| row.workload == "same") {
        let scan = Point { x: row.written_pages, low: row.scan_least_ms, middle: row.scan_ms, high: row.scan_ms };
        Series::add(&mut scans, &row.phase, scan);
    }
    for series in times.iter_mut().chain(&mut memory).chain(&mut scans) {
        series.points.sort_by(|a, b| a.x.total_cmp(&b.x));
    }
    let mut scans =
        panel("a scan of a guest of 1 TiB", "pages written per epoch", Ticks::PowersOfTen, "time (ms)", scans);
    scans.y_scale = Scale::Logarithmic;
    Figure {
        title: "What prediction and planning cost".to_owned(),
        caption: "Lines: median of the epochs measured. Bands: down to the least.".to_owned(),
        columns: 3,
        panels: vec![
            panel("prediction: time", "hot pages", Ticks::PowersOfTen, "ns for each page written in an epoch", times),
            panel("prediction: memory", "hot pages", Ticks::PowersOfTen, "bytes for each page known", memory),
            scans,
        ],
        looks: look,
    }
}
