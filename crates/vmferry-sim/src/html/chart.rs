//! Plots as SVG: horizontal bars, and lines over an axis. Colours come from the page's style sheet.

use std::fmt::Write as _;

use super::markup::{escape, number};
use crate::sweep::Estimate;

/// How many colours the style sheet has.
const COLOURS: usize = 8;

/// The classes of the series with this number: a colour, and beyond the last colour other strokes.
pub(super) fn series_class(index: usize) -> String {
    let dashes = ["", " d1", " d2"];
    format!("s{}{}", index % COLOURS, dashes[index / COLOURS % dashes.len()])
}

/// A legend entry for each name.
pub(super) fn legend<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut html = String::from("<div class=\"legend\">");
    for (index, name) in names.enumerate() {
        let _ = write!(
            html,
            "<span><svg viewBox=\"0 0 26 10\" role=\"presentation\"><path class=\"{} st\" d=\"M1 5H25\" stroke-width=\"4\"/></svg>{}</span>",
            series_class(index),
            escape(name)
        );
    }
    html.push_str("</div>");
    html
}

/// A figure of horizontal bars, one a row.
pub(super) struct Bars<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    pub(super) rows: Vec<Bar<'a>>,
    /// A vertical line, and what it stands for.
    pub(super) reference: Option<(f64, &'a str)>,
}

/// A row of [`Bars`].
pub(super) struct Bar<'a> {
    pub(super) name: &'a str,
    pub(super) value: Option<Estimate>,
    /// What stands instead of a bar where there is no value, or behind it.
    pub(super) remark: String,
}

impl Bars<'_> {
    pub(super) fn svg(&self) -> String {
        const WIDTH: f64 = 380.0;
        const ROW: f64 = 26.0;
        const TOP: f64 = 18.0;
        const LABEL_CHARACTERS: usize = 20;
        /// What a value in words takes.
        const VALUE: f64 = 104.0;
        let longest = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).min(LABEL_CHARACTERS);
        let left = longest as f64 * 6.8 + 10.0;
        let reach = |estimate: &Estimate| estimate.mean + estimate.half_width.unwrap_or(0.0);
        let values = self.rows.iter().filter_map(|row| row.value.as_ref().map(reach));
        let most = values.chain(self.reference.map(|(at, _)| at)).fold(0.0, f64::max);
        let scale = if most > 0.0 { (WIDTH - left - VALUE) / most } else { 0.0 };
        let height = TOP + ROW * self.rows.len() as f64 + 4.0;
        let mut svg = figure_head(self.title, self.unit, WIDTH, height);
        // Over the reference, which runs over the bars.
        let mut labels = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let middle = TOP + ROW * (index as f64 + 0.5);
            let shown: String = if row.name.chars().count() > LABEL_CHARACTERS {
                row.name.chars().take(LABEL_CHARACTERS - 1).chain(['…']).collect()
            } else {
                row.name.to_owned()
            };
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}<title>{}</title></text>",
                left - 8.0,
                middle + 4.0,
                escape(&shown),
                escape(row.name)
            );
            let Some(value) = row.value else {
                let _ = write!(
                    labels,
                    "<text class=\"tick over\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    left + 6.0,
                    middle + 4.0,
                    escape(&row.remark)
                );
                continue;
            };
            let _ = write!(
                svg,
                "<rect class=\"s{} fi\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\"/>",
                index % COLOURS,
                middle - 8.0,
                (value.mean * scale).max(1.0),
                16.0
            );
            let half = value.half_width.unwrap_or(0.0);
            if half > 0.0 {
                let (from, to) = (left + (value.mean - half).max(0.0) * scale, left + (value.mean + half) * scale);
                let _ = write!(
                    svg,
                    "<path class=\"whisker\" d=\"M{from:.1} {middle:.1}H{to:.1}M{from:.1} {0:.1}V{1:.1}M{to:.1} {0:.1}V{1:.1}\"/>",
                    middle - 4.0,
                    middle + 4.0
                );
            }
            let remark = if row.remark.is_empty() { String::new() } else { format!(" ({})", row.remark) };
            let _ = write!(
                labels,
                "<text class=\"over\" x=\"{:.1}\" y=\"{:.1}\">{}{}</text>",
                left + (value.mean + half) * scale + 6.0,
                middle + 4.0,
                number(value.mean),
                escape(&remark)
            );
        }
        if let Some((at, label)) = self.reference {
            let x = left + at * scale;
            let _ = write!(
                svg,
                "<path class=\"ref\" d=\"M{x:.1} {TOP:.1}V{:.1}\"/><text class=\"reflabel\" x=\"{x:.1}\" y=\"{:.1}\" \
                 text-anchor=\"{}\">{}</text>",
                height - 2.0,
                TOP - 5.0,
                if x > WIDTH * 0.7 {
                    "end"
                } else if x < WIDTH * 0.3 {
                    "start"
                } else {
                    "middle"
                },
                escape(label)
            );
        }
        svg.push_str(&labels);
        svg.push_str("</svg></figure>");
        svg
    }
}

/// A figure of lines. Both axes begin at 0.
pub(super) struct Lines<'a> {
    pub(super) title: &'a str,
    pub(super) unit: &'a str,
    pub(super) x_label: &'a str,
    /// The axis reaches as far as this at least, also if no line does.
    pub(super) reach_x: f64,
    pub(super) lines: Vec<Line<'a>>,
    /// A horizontal line, and what it stands for.
    pub(super) reference: Option<(f64, &'a str)>,
    /// Whether points are marked and whiskers drawn: for a few measured points rather than a course.
    pub(super) marked: bool,
}

/// A line of [`Lines`].
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    /// The series' classes, or that of a reference.
    pub(super) class: String,
    pub(super) points: Vec<Point>,
}

/// A point of a [`Line`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Half the length of its whisker.
    pub(super) half_width: f64,
}

impl Lines<'_> {
    pub(super) fn svg(&self) -> String {
        const WIDTH: f64 = 520.0;
        const HEIGHT: f64 = 270.0;
        const LEFT: f64 = 52.0;
        const RIGHT: f64 = WIDTH - 14.0;
        const TOP: f64 = 14.0;
        const BOTTOM: f64 = HEIGHT - 40.0;
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let ticks_x = ticks(points().map(|point| point.x).fold(self.reach_x, f64::max));
        let highest = points().map(|point| point.y + point.half_width);
        let ticks_y = ticks(highest.chain(self.reference.map(|(at, _)| at)).fold(0.0, f64::max));
        let end = |ticks: &[f64]| ticks.last().copied().unwrap_or(1.0);
        let (most_x, most_y) = (end(&ticks_x), end(&ticks_y));
        let x = |value: f64| LEFT + value / most_x * (RIGHT - LEFT);
        let y = |value: f64| BOTTOM - value.max(0.0) / most_y * (BOTTOM - TOP);
        let mut svg = figure_head(self.title, self.unit, WIDTH, HEIGHT);
        for &tick in &ticks_y {
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {0:.1}H{RIGHT}\"/><text class=\"tick\" x=\"{1:.1}\" y=\"{2:.1}\" \
                 text-anchor=\"end\">{3}</text>",
                y(tick),
                LEFT - 6.0,
                y(tick) + 4.0,
                tick_label(tick, most_y)
            );
        }
        for &tick in &ticks_x {
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{0:.1} {BOTTOM}V{1:.1}\"/><text class=\"tick\" x=\"{0:.1}\" y=\"{2:.1}\" \
                 text-anchor=\"middle\">{3}</text>",
                x(tick),
                BOTTOM + 4.0,
                BOTTOM + 17.0,
                tick_label(tick, most_x)
            );
        }
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + RIGHT) / 2.0,
            HEIGHT - 6.0,
            escape(self.x_label)
        );
        if let Some((at, label)) = self.reference {
            let _ = write!(
                svg,
                "<path class=\"ref\" d=\"M{LEFT} {0:.1}H{RIGHT}\"/><text class=\"reflabel\" x=\"{1:.1}\" y=\"{2:.1}\" \
                 text-anchor=\"end\">{3}</text>",
                y(at),
                RIGHT - 2.0,
                y(at) - 4.0,
                escape(label)
            );
        }
        // The first are the ones looked for: they lie on top.
        for line in self.lines.iter().rev() {
            let Some(last) = line.points.last() else { continue };
            let mut path = String::new();
            for (index, point) in line.points.iter().enumerate() {
                let _ = write!(path, "{}{:.1} {:.1}", if index == 0 { 'M' } else { 'L' }, x(point.x), y(point.y));
            }
            let class = &line.class;
            let _ =
                write!(svg, "<path class=\"line {class} st\" d=\"{path}\"><title>{}</title></path>", escape(line.name));
            let ends = if self.marked { &line.points[..] } else { std::slice::from_ref(last) };
            for point in ends {
                if point.half_width > 0.0 {
                    let _ = write!(
                        svg,
                        "<path class=\"line {class} st\" d=\"M{0:.1} {1:.1}V{2:.1}\"/>",
                        x(point.x),
                        y(point.y - point.half_width),
                        y(point.y + point.half_width)
                    );
                }
                let _ = write!(
                    svg,
                    "<circle class=\"{class} fi\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.2\"><title>{}: {} at {}</title></circle>",
                    x(point.x),
                    y(point.y),
                    escape(line.name),
                    number(point.y),
                    number(point.x)
                );
            }
        }
        svg.push_str("</svg></figure>");
        svg
    }
}

fn figure_head(title: &str, unit: &str, width: f64, height: f64) -> String {
    format!(
        "<figure><figcaption>{0} <small>{1}</small></figcaption><svg viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" \
         aria-label=\"{0}\">",
        escape(title),
        escape(unit)
    )
}

/// Round numbers from 0 to at least `most`, about five.
fn ticks(most: f64) -> Vec<f64> {
    if !(most > 0.0 && most.is_finite()) {
        return vec![0.0, 1.0];
    }
    let rough = most / 4.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|&step| step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let count = (most / step - 1e-9).ceil() as u32;
    (0..=count).map(|index| f64::from(index) * step).collect()
}

/// A tick's number, as exact as the axis needs.
fn tick_label(tick: f64, most: f64) -> String {
    let decimals = if most > 10.0 {
        0
    } else if most > 1.0 {
        1
    } else {
        2
    };
    let text = format!("{tick:.decimals$}");
    // Steps of 2.5 need a place more than their axis.
    if (text.parse::<f64>().unwrap_or(tick) - tick).abs() > most * 1e-6 {
        format!("{tick:.0$}", decimals + 1)
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_reach_the_end() {
        for most in [1e-9, 0.003, 0.7, 1.0, 1.2, 9.9, 10.0, 37.0, 250.0, 1e12] {
            let ticks = ticks(most);
            assert!((4..=7).contains(&ticks.len()), "{most}: {ticks:?}");
            assert!(ticks[0] == 0.0 && *ticks.last().unwrap() >= most * (1.0 - 1e-6), "{most}: {ticks:?}");
        }
        assert_eq!(ticks(1.0), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(ticks(0.0), [0.0, 1.0]);
        assert_eq!(ticks(f64::NAN), [0.0, 1.0]);
    }

    #[test]
    fn tick_labels_do_not_lie() {
        for most in [0.7, 1.0, 9.0, 10.0, 37.0, 250.0, 4000.0] {
            for tick in ticks(most) {
                assert!(
                    (tick_label(tick, most).parse::<f64>().unwrap() - tick).abs() < most * 1e-6,
                    "{tick} of {most}"
                );
            }
        }
    }
}
