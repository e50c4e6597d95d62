//! The page's pictures: what each mode took with each guest.

use lcbst_figures::picture::{Colour, Figure, Look, Marker, Panel, Point, Scale, Series, Ticks};

use crate::mode::Mode;
use crate::network::Link;
use crate::results::{Cell, Measure};

/// How far apart the modes stand at a guest, of the way to the next one.
const MODE_STEP: f64 = 0.1;

/// The names of the files, without their endings, and what is in them: one picture for each QEMU and link.
pub(crate) fn all(cells: &[Cell<'_>]) -> Vec<(String, Figure)> {
    let mut pictures: Vec<(String, Figure)> = Vec::new();
    for cell in cells {
        let name = file_name(cell.qemu, cell.link);
        if pictures.iter().all(|(other, _)| *other != name) {
            let here: Vec<&Cell<'_>> =
                cells.iter().filter(|other| other.qemu == cell.qemu && other.link == cell.link).collect();
            pictures.extend(picture(cell.qemu, cell.link, &here).map(|figure| (name, figure)));
        }
    }
    pictures
}

/// Where the picture of a QEMU and a link is, without the ending.
pub(crate) fn file_name(qemu: &str, link: Link) -> String {
    format!("qemu-{qemu}-{}", link.name())
}

/// `None` where nothing got to the target.
fn picture(qemu: &str, link: Link, cells: &[&Cell<'_>]) -> Option<Figure> {
    let panels: Vec<Panel> = Measure::ALL.into_iter().filter_map(|measure| panel(measure, cells)).collect();
    (!panels.is_empty()).then(|| Figure {
        title: format!("vmferry beside QEMU {qemu}, {link}"),
        caption: "Marks: median of the runs that completed. Bars: the least and the greatest. Less is better."
            .to_owned(),
        columns: 2,
        panels,
        looks: look,
    })
}

fn panel(measure: Measure, cells: &[&Cell<'_>]) -> Option<Panel> {
    let mut series = Vec::new();
    let modes: Vec<Mode> =
        Mode::ALL.into_iter().filter(|&mode| cells.iter().any(|cell| cell.mode(mode).is_some())).collect();
    for (index, &mode) in modes.iter().enumerate() {
        for (place, cell) in cells.iter().enumerate() {
            let Some(spread) = cell.mode(mode).and_then(|summary| summary.spread(measure)) else { continue };
            let beside = MODE_STEP * (index as f64 - (modes.len() - 1) as f64 / 2.0);
            let (low, middle, high) = (spread.minimum, spread.median, spread.maximum);
            Series::add(&mut series, mode.name(), Point { x: Ticks::place(place, beside), low, middle, high });
        }
    }
    (!series.is_empty()).then(|| Panel {
        title: measure.name().split(',').next().unwrap_or_default().to_owned(),
        x_label: String::new(),
        x_ticks: Ticks::Named(cells.iter().map(|cell| cell.guest.name.to_owned()).collect()),
        y_label: measure.name().to_owned(),
        y_scale: Scale::Linear,
        series,
    })
}

fn look(mode: &str) -> Look {
    let (colour, marker) = match Mode::named(mode) {
        Some(Mode::Vmferry) => (Colour::Blue, Marker::Square),
        Some(Mode::Precopy) => (Colour::Vermilion, Marker::Circle),
        Some(Mode::Xbzrle) => (Colour::Green, Marker::Triangle),
        Some(Mode::AutoConverge) => (Colour::Purple, Marker::Circle),
        Some(Mode::Multifd) => (Colour::SkyBlue, Marker::PointDown),
        Some(Mode::MultifdZstd) => (Colour::Orange, Marker::Diamond),
        Some(Mode::Postcopy) => (Colour::Purple, Marker::Diamond),
        None => return Look::REFERENCE,
    };
    Look::marks(colour, marker)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::cells;
    use crate::run::tests::run;

    #[test]
    fn each_mode_stands_beside_its_guest() {
        let runs = [run(Mode::Vmferry, 1, 4000.0, 200.0), run(Mode::Vmferry, 2, 5000.0, 200.0)];
        let pictures = all(&cells(&runs));
        let [(name, figure)] = &pictures[..] else { panic!("{} pictures", pictures.len()) };
        assert_eq!(name, "qemu-10.0-1gbit");
        let time = &figure.panels[0];
        assert_eq!(time.x_ticks, Ticks::Named(vec!["hot-20k".to_owned()]));
        let [series] = &time.series[..] else { panic!("{:?}", time.series) };
        assert_eq!((series.name.as_str(), series.points[0].middle, series.points[0].high), ("vmferry", 4.5, 5.0));
    }

    #[test]
    fn without_a_run_that_completed_there_is_no_picture() {
        let mut runs = [run(Mode::Vmferry, 1, 4000.0, 200.0)];
        runs[0].outcome = crate::moving::Outcome::NotConverged;
        assert!(all(&cells(&runs)).is_empty());
    }
}
