//! Drawing: panels of lines with bands, and one legend below them, as SVG and as PNG.
//!
//! Text is measured with a font that is part of this program, so that pictures come out alike on machines without fonts.
//! A PNG is drawn larger than it is and averaged, because the bitmap backend does not smooth wide lines.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use plotters::backend::{BitMapBackend, RGBPixel, SVGBackend};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

/// Pixels of a PNG's drawing for one of its own, in each direction.
const OVERSAMPLING: u32 = 2;

/// Sizes in pixels. A panel is wider than this where there are many names below.
const PANEL_WIDTH: i32 = 500;
/// What a panel takes beside the names, and each of these.
const AXIS_WIDTH: i32 = 80;
const NAME_WIDTH: i32 = 78;
const PANEL_HEIGHT: i32 = 400;
const TITLE_HEIGHT: i32 = 44;
const CAPTION_HEIGHT: i32 = 26;
const LEGEND_LINE_HEIGHT: i32 = 26;
const MARGIN: i32 = 12;
const LEGEND_KEY_WIDTH: i32 = 44;
const LEGEND_GAP: i32 = 26;

/// Text sizes in pixels.
const TITLE_TEXT: i32 = 22;
const PANEL_TEXT: i32 = 18;
const TEXT: i32 = 15;

/// The family under which the built-in font is known. An SVG names it too, and is shown with the viewer's own.
const FAMILY: &str = "sans-serif";

/// A value with its spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Where on the horizontal axis, above 0.
    pub x: f64,
    /// The lower end of the band.
    pub low: f64,
    /// Where the line goes through.
    pub middle: f64,
    /// The upper end of the band.
    pub high: f64,
}

impl Point {
    /// A value without spread.
    pub const fn exact(x: f64, y: f64) -> Self {
        Self { x, low: y, middle: y, high: y }
    }
}

/// One line of a panel.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend, which says how it is drawn.
    pub name: String,
    /// From left to right.
    pub points: Vec<Point>,
}

impl Series {
    /// Adds a point to the series of this name, which is created if need be.
    pub fn add(all: &mut Vec<Self>, name: &str, point: Point) {
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => all.push(Self { name: name.to_owned(), points: vec![point] }),
        }
    }
}

/// The scale of a vertical axis. The horizontal one is always logarithmic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// From the least value, which is above 0.
    Logarithmic,
}

impl Scale {
    fn position(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Logarithmic => value.log10(),
        }
    }

    /// The values to label between two ends.
    fn ticks(self, low: f64, high: f64) -> Vec<f64> {
        let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let all: Vec<f64> = match self {
            Self::Linear => {
                let steps =
                    [(0.6, 0.1), (1.5, 0.2), (4.0, 0.5), (15.0, 2.0), (60.0, 5.0), (150.0, 20.0), (600.0, 50.0)];
                let step = steps.iter().find(|(most, _)| high < *most).map_or(high / 8.0, |(_, step)| *step);
                let step = if step > 50.0 { (step / 100.0).ceil() * 100.0 } else { step };
                (0..=20).map(|at| f64::from(at) * step).collect()
            }
            Self::Logarithmic => {
                let digits: &[f64] = if high / low < 30.0 { &[1.0, 2.0, 3.0, 5.0, 7.0] } else { &[1.0, 2.0, 5.0] };
                decades.flat_map(|decade| digits.iter().map(move |digit| digit * 10_f64.powi(decade))).collect()
            }
        };
        all.into_iter().filter(|&tick| tick >= low * (1.0 - 1e-9) && tick <= high * (1.0 + 1e-9)).collect()
    }
}

/// An axis whose labels are given. The library's own logarithmic one labels any round position.
struct Axis {
    ends: Range<f64>,
    scale: Scale,
    ticks: Vec<f64>,
    label: Box<dyn Fn(f64) -> String>,
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let position = |value| self.scale.position(value);
        let share =
            (position(*value) - position(self.ends.start)) / (position(self.ends.end) - position(self.ends.start));
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.ends.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.label)(*value)
    }
}

/// One diagram.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// What the horizontal axis is.
    pub x_label: String,
    /// The values labelled there.
    pub x_ticks: Ticks,
    /// What the vertical axis is.
    pub y_label: String,
    /// And how it is divided.
    pub y_scale: Scale,
    /// The lines, of which there must be one.
    pub series: Vec<Series>,
}

/// Which values of the horizontal axis are labelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ticks {
    /// 10⁰, 10¹ and so on.
    PowersOfTen,
    /// Those at which there are points.
    AtPoints,
    /// These, which are no numbers: the first at 1, the next at 2, 4, 8 …, all as far from each other on this axis.
    Named(Vec<String>),
}

impl Ticks {
    /// Where a name stands, or something so many places beside it.
    pub fn place(name: usize, beside: f64) -> f64 {
        (name as f64 + beside).exp2()
    }
}

/// A picture of several panels, row by row.
#[derive(Clone, Debug)]
pub struct Figure {
    /// The line above it.
    pub title: String,
    /// The line below it.
    pub caption: String,
    /// Panels in a row.
    pub columns: usize,
    /// The panels.
    pub panels: Vec<Panel>,
    /// How a series of this name is drawn, in all panels alike.
    pub looks: fn(&str) -> Look,
}

/// Makes the built-in font known. To be called before anything is drawn.
///
/// # Errors
/// None but a build without the font.
pub fn load_font() -> Result<()> {
    register_font(FAMILY, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| anyhow!("the built-in font cannot be read"))
}

impl Figure {
    /// Writes the picture as a drawing and as an image. [`load_font`] comes first.
    ///
    /// # Errors
    /// Where there is a panel without a line, or a file cannot be written.
    pub fn write(&self, svg: &Path, png: &Path) -> Result<()> {
        ensure!(self.panels.iter().all(|panel| !panel.series.is_empty()), "{}: there is nothing to draw", self.title);
        let legend = self.legend()?;
        let (width, height) = self.size(&legend);
        let mut drawing = String::new();
        {
            let root = SVGBackend::with_string(&mut drawing, (width, height)).into_drawing_area();
            let painted = self.paint(&root, &legend, 1).and_then(|()| root.present());
            painted.map_err(|error| anyhow!("cannot draw: {error}"))?;
        }
        fs::write(svg, drawing).with_context(|| format!("cannot write {}", svg.display()))?;

        let large = (width * OVERSAMPLING, height * OVERSAMPLING);
        let mut pixels = vec![0; 3 * large.0 as usize * large.1 as usize];
        {
            let backend = BitMapBackend::<RGBPixel>::with_buffer_and_format(&mut pixels, large);
            let root = backend.map_err(|error| anyhow!("cannot draw: {error}"))?.into_drawing_area();
            let painted = self.paint(&root, &legend, OVERSAMPLING as i32).and_then(|()| root.present());
            painted.map_err(|error| anyhow!("cannot draw: {error}"))?;
        }
        let image = encode(&averaged(&pixels, width as usize, OVERSAMPLING as usize), width, height)?;
        fs::write(png, image).with_context(|| format!("cannot write {}", png.display()))
    }

    fn width(&self) -> i32 {
        let names = |panel: &Panel| match &panel.x_ticks {
            Ticks::Named(names) => names.len() as i32,
            Ticks::PowersOfTen | Ticks::AtPoints => 0,
        };
        let names = self.panels.iter().map(names).max().unwrap_or(0);
        PANEL_WIDTH.max(AXIS_WIDTH + NAME_WIDTH * names) * self.columns as i32
    }

    fn size(&self, legend: &Legend<'_>) -> (u32, u32) {
        let rows = self.panels.len().div_ceil(self.columns) as i32;
        (self.width() as u32, (TITLE_HEIGHT + PANEL_HEIGHT * rows + legend.height()) as u32)
    }

    /// The series of all panels, each once, in lines that are not too wide.
    fn legend(&self) -> Result<Legend<'_>> {
        let mut lines: Vec<Vec<(&str, i32)>> = vec![Vec::new()];
        let mut length = 0;
        for series in self.panels.iter().flat_map(|panel| &panel.series) {
            if lines.iter().flatten().any(|&(name, _)| name == series.name) {
                continue;
            }
            let (text_width, _) = text(TEXT).font.box_size(&series.name).map_err(|error| anyhow!("{error}"))?;
            let entry_width = LEGEND_KEY_WIDTH + text_width as i32 + LEGEND_GAP;
            if length + entry_width > self.width() {
                lines.push(Vec::new());
                length = 0;
            }
            length += entry_width;
            let last = lines.len() - 1;
            lines[last].push((&series.name, entry_width));
        }
        Ok(Legend { lines, looks: self.looks })
    }

    fn paint<DB: DrawingBackend>(&self, root: &Area<DB>, legend: &Legend<'_>, scale: i32) -> Painted<DB> {
        root.fill(&WHITE)?;
        let (width, height) = (root.dim_in_pixel().0 as i32, root.dim_in_pixel().1 as i32);
        let centre = Pos::new(HPos::Center, VPos::Center);
        let title = text(TITLE_TEXT * scale).pos(centre);
        root.draw_text(&self.title, &title, (width / 2, TITLE_HEIGHT * scale / 2))?;

        let (above, below) = root.split_vertically(height - legend.height() * scale);
        let (_, body) = above.split_vertically(TITLE_HEIGHT * scale);
        let rows = self.panels.len().div_ceil(self.columns);
        for (area, panel) in body.split_evenly((rows, self.columns)).iter().zip(&self.panels) {
            panel.paint(area, scale, self.looks)?;
        }
        legend.paint(&below, scale)?;
        let caption = text(TEXT * scale).pos(centre).color(&RGBColor(90, 90, 90));
        root.draw_text(&self.caption, &caption, (width / 2, height - (MARGIN + CAPTION_HEIGHT / 2) * scale))
    }
}

/// Names and the widths of their entries in pixels, line by line.
struct Legend<'a> {
    lines: Vec<Vec<(&'a str, i32)>>,
    looks: fn(&str) -> Look,
}

impl Legend<'_> {
    /// With the caption that comes below it.
    fn height(&self) -> i32 {
        LEGEND_LINE_HEIGHT * self.lines.len() as i32 + CAPTION_HEIGHT + MARGIN
    }

    fn paint<DB: DrawingBackend>(&self, area: &Area<DB>, scale: i32) -> Painted<DB> {
        let width = area.dim_in_pixel().0 as i32;
        let style = text(TEXT * scale).pos(Pos::new(HPos::Left, VPos::Center));
        let mut y = LEGEND_LINE_HEIGHT * scale / 2;
        for entries in &self.lines {
            let length: i32 = entries.iter().map(|&(_, entry_width)| entry_width).sum();
            let mut x = (width - (length - LEGEND_GAP) * scale) / 2;
            for &(name, entry_width) in entries {
                let (end, middle) = (x + (LEGEND_KEY_WIDTH - 10) * scale, x + (LEGEND_KEY_WIDTH - 10) * scale / 2);
                let look = (self.looks)(name);
                for piece in look.pieces(&[(f64::from(x), f64::from(y)), (f64::from(end), f64::from(y))], scale) {
                    let pixels: Vec<(i32, i32)> = piece.into_iter().map(|(x, y)| (x as i32, y as i32)).collect();
                    area.draw(&PathElement::new(pixels, look.colour.stroke_width(2 * scale as u32)))?;
                }
                let marker: Vec<(i32, i32)> =
                    look.marker.outline(scale).into_iter().map(|(dx, dy)| (middle + dx, y + dy)).collect();
                area.draw(&Polygon::new(marker, look.colour.filled()))?;
                area.draw_text(name, &style, (x + LEGEND_KEY_WIDTH * scale, y))?;
                x += entry_width * scale;
            }
            y += LEGEND_LINE_HEIGHT * scale;
        }
        Ok(())
    }
}

impl Panel {
    fn paint<DB: DrawingBackend>(&self, area: &Area<DB>, scale: i32, looks: fn(&str) -> Look) -> Painted<DB> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
        let (x_low, x_high) = (least(&mut points().map(|point| point.x)), most(&mut points().map(|point| point.x)));
        let (y_low, y_high) = match self.y_scale {
            Scale::Linear => (0.0, most(&mut points().map(|point| point.high)) * 1.05),
            Scale::Logarithmic => {
                (least(&mut points().map(|point| point.low)) / 1.3, most(&mut points().map(|point| point.high)) * 1.3)
            }
        };
        let (mut x_ends, y_ticks) = (x_low..x_high, self.y_scale.ticks(y_low, y_high));
        let (ticks, label): (Vec<f64>, Box<dyn Fn(f64) -> String>) = match &self.x_ticks {
            Ticks::PowersOfTen => {
                let powers = (0..=9).map(|decade| 10_f64.powi(decade)).filter(|tick| (x_low..=x_high).contains(tick));
                (powers.collect(), Box::new(|value| power_of_ten(value.log10().round() as usize)))
            }
            Ticks::AtPoints => {
                let mut places: Vec<f64> = points().map(|point| point.x).collect();
                places.sort_by(f64::total_cmp);
                places.dedup();
                (places, Box::new(plain))
            }
            Ticks::Named(names) => {
                x_ends = Ticks::place(0, -0.5)..Ticks::place(names.len(), -0.5);
                let places = (0..names.len()).map(|name| Ticks::place(name, 0.0)).collect();
                let names = names.clone();
                let name = move |value: f64| names.get(value.log2().round() as usize).cloned().unwrap_or_default();
                (places, Box::new(name))
            }
        };
        let x_axis = Axis { ends: x_ends, scale: Scale::Logarithmic, ticks, label };
        let y_axis = Axis { ends: y_low..y_high, scale: self.y_scale, ticks: y_ticks, label: Box::new(plain) };

        let mut chart = ChartBuilder::on(area)
            .margin(MARGIN * scale)
            .margin_right(2 * MARGIN * scale)
            .caption(&self.title, text(PANEL_TEXT * scale))
            .x_label_area_size(44 * scale)
            .y_label_area_size(66 * scale)
            .build_cartesian_2d(x_axis, y_axis)?;
        chart
            .configure_mesh()
            .bold_line_style(RGBColor(215, 215, 215).stroke_width(scale as u32))
            .light_line_style(TRANSPARENT)
            .axis_style(BLACK.stroke_width(scale as u32))
            .set_all_tick_mark_size(5 * scale)
            .label_style(text(TEXT * scale))
            .axis_desc_style(text(TEXT * scale))
            .x_desc(&self.x_label)
            .y_desc(&self.y_label)
            .draw()?;

        for series in &self.series {
            let look = looks(&series.name);
            if look.is_apart {
                let bars = series.points.iter().map(|point| vec![(point.x, point.low), (point.x, point.high)]);
                let style = look.colour.mix(0.5).stroke_width(4 * scale as u32);
                chart.draw_series(bars.map(|bar| PathElement::new(bar, style)))?;
                continue;
            }
            let upper = series.points.iter().map(|point| (point.x, point.high));
            let lower = series.points.iter().rev().map(|point| (point.x, point.low));
            let band: Vec<(f64, f64)> = upper.chain(lower).collect();
            chart.draw_series([Polygon::new(band, look.colour.mix(0.22).filled())])?;
        }
        for series in &self.series {
            let look = looks(&series.name);
            let line: Vec<(f64, f64)> = series.points.iter().map(|point| (point.x, point.middle)).collect();
            let style = look.colour.stroke_width(2 * scale as u32);
            if look.is_dashed {
                let dash = 7 * scale;
                chart.draw_series(DashedLineSeries::new(line.iter().copied(), dash, dash, style))?;
            } else if !look.is_apart {
                chart.draw_series([PathElement::new(line.clone(), style)])?;
            }
            let marker = look.marker.outline(scale);
            chart.draw_series(
                line.iter().map(|&point| EmptyElement::at(point) + Polygon::new(marker.clone(), look.colour.filled())),
            )?;
        }
        Ok(())
    }
}

type Area<DB> = DrawingArea<DB, Shift>;
type Painted<DB> = std::result::Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

fn text(size: i32) -> TextStyle<'static> {
    (FAMILY, size).into_font().color(&BLACK)
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    colour: RGBColor,
    marker: Marker,
    is_dashed: bool,
    is_apart: bool,
}

impl Look {
    /// A line of this colour with such markers.
    pub const fn line(colour: Colour, marker: Marker) -> Self {
        Self { colour: colour.rgb(), marker, is_dashed: false, is_apart: false }
    }

    /// Such markers, each with a bar from end to end of its band, and no line between them.
    pub const fn marks(colour: Colour, marker: Marker) -> Self {
        Self { is_apart: true, ..Self::line(colour, marker) }
    }

    /// Black, dashed, without markers: for what is no measurement.
    pub const REFERENCE: Self =
        Self { colour: RGBColor(0x20, 0x20, 0x20), marker: Marker::None, is_dashed: true, is_apart: false };

    /// A line from one end to the other, in pieces if it is dashed.
    fn pieces(&self, ends: &[(f64, f64); 2], scale: i32) -> Vec<Vec<(f64, f64)>> {
        if !self.is_dashed {
            return vec![ends.to_vec()];
        }
        let dash = 7.0 * f64::from(scale);
        let [(start, y), (end, _)] = *ends;
        let mut pieces = Vec::new();
        let mut from = start;
        while from < end {
            pieces.push(vec![(from, y), ((from + dash).min(end), y)]);
            from += 2.0 * dash;
        }
        pieces
    }
}

/// The colours of lines: those of Okabe and Ito, told apart with colour-blind eyes too, and a few more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "a colour's name says what it is")]
pub enum Colour {
    Vermilion,
    Blue,
    SkyBlue,
    Green,
    Orange,
    Brown,
    Black,
    Purple,
    Grey,
}

impl Colour {
    const fn rgb(self) -> RGBColor {
        match self {
            Self::Vermilion => RGBColor(0xd5, 0x5e, 0x00),
            Self::Blue => RGBColor(0x00, 0x72, 0xb2),
            Self::SkyBlue => RGBColor(0x56, 0xb4, 0xe9),
            Self::Green => RGBColor(0x00, 0x9e, 0x73),
            Self::Orange => RGBColor(0xe6, 0x9f, 0x00),
            Self::Brown => RGBColor(0x7a, 0x3b, 0x10),
            Self::Black => RGBColor(0x20, 0x20, 0x20),
            Self::Purple => RGBColor(0xb0, 0x3a, 0x8c),
            Self::Grey => RGBColor(0x90, 0x90, 0x90),
        }
    }
}

/// What stands at a line's points; markers differ where colours are close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "a shape's name says what it is")]
pub enum Marker {
    Circle,
    Square,
    Diamond,
    Triangle,
    PointDown,
    None,
}

impl Marker {
    /// The corners, in pixels from the centre.
    fn outline(self, scale: i32) -> Vec<(i32, i32)> {
        let size = f64::from(scale);
        let corners: Vec<(f64, f64)> = match self {
            Self::Circle => (0..16)
                .map(|corner| f64::from(corner) * std::f64::consts::TAU / 16.0)
                .map(|angle| (4.5 * angle.cos(), 4.5 * angle.sin()))
                .collect(),
            Self::Square => vec![(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
            Self::Diamond => vec![(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
            Self::Triangle => vec![(0.0, -5.5), (5.0, 4.0), (-5.0, 4.0)],
            Self::PointDown => vec![(0.0, 5.5), (5.0, -4.0), (-5.0, -4.0)],
            Self::None => vec![(0.0, 0.0); 3],
        };
        corners.into_iter().map(|(x, y)| ((x * size).round() as i32, (y * size).round() as i32)).collect()
    }
}

/// 10 to the power of a digit, as the reader writes it.
fn power_of_ten(exponent: usize) -> String {
    const DIGITS: [&str; 10] = ["⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"];
    format!("10{}", DIGITS[exponent.min(9)])
}

/// A tick's value without needless decimals.
fn plain(value: f64) -> String {
    if (value - value.round()).abs() < 1e-6 {
        format!("{value:.0}")
    } else if value < 0.095 {
        format!("{value:.2}")
    } else {
        format!("{value:.1}")
    }
}

/// The means of squares of `factor` by `factor` pixels.
fn averaged(pixels: &[u8], width: usize, factor: usize) -> Vec<u8> {
    let line = 3 * width * factor;
    let mut small = Vec::with_capacity(pixels.len() / (factor * factor));
    for lines in pixels.chunks_exact(line * factor) {
        for x in 0..width {
            for channel in 0..3 {
                let of_square = (0..factor * factor)
                    .map(|at| u32::from(lines[at / factor * line + 3 * (x * factor + at % factor) + channel]));
                small.push((of_square.sum::<u32>() / (factor * factor) as u32) as u8);
            }
        }
    }
    small
}

fn encode(pixels: &[u8], width: u32, height: u32) -> Result<Vec<u8>> {
    let mut image = Vec::new();
    let mut encoder = png::Encoder::new(&mut image, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header().context("cannot encode the image")?;
    writer.write_image_data(pixels).context("cannot encode the image")?;
    writer.finish().context("cannot encode the image")?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_lie_between_the_ends() {
        assert_eq!(Scale::Logarithmic.ticks(0.9, 60.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(Scale::Logarithmic.ticks(0.9, 9.0), [1.0, 2.0, 3.0, 5.0, 7.0]);
        assert_eq!(Scale::Linear.ticks(0.0, 12.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]);
        assert_eq!(Scale::Linear.ticks(0.0, 18.0), [0.0, 5.0, 10.0, 15.0]);
        assert_eq!(Scale::Linear.ticks(0.0, 0.45).len(), 5);
    }

    #[test]
    fn labels_have_no_needless_decimals_and_none_too_few() {
        assert_eq!([0.0, 0.05, 0.5, 1.0, 1.2, 200.0].map(plain), ["0", "0.05", "0.5", "1", "1.2", "200"]);
    }

    #[test]
    fn averaging_halves_both_directions() {
        let pixels = [[0; 6], [100; 6]].concat();
        assert_eq!(averaged(&pixels, 1, 2), [50, 50, 50]);
    }

    #[test]
    fn a_figure_is_drawn_without_fonts_of_the_system() {
        load_font().unwrap();
        let points = [100.0, 1000.0].map(|x| Point { x, low: 10.0, middle: 20.0, high: 30.0 }).to_vec();
        let panel = |y_scale| Panel {
            title: "one".to_owned(),
            x_label: "number of nodes".to_owned(),
            x_ticks: Ticks::PowersOfTen,
            y_label: "time (ns)".to_owned(),
            y_scale,
            series: vec![
                Series { name: "a line".to_owned(), points: points.clone() },
                Series { name: "a bound".to_owned(), points: points.clone() },
            ],
        };
        let figure = Figure {
            title: "A figure".to_owned(),
            caption: "A caption".to_owned(),
            columns: 2,
            panels: vec![panel(Scale::Linear), panel(Scale::Logarithmic)],
            looks: |name| if name == "a line" { Look::line(Colour::Blue, Marker::Circle) } else { Look::REFERENCE },
        };
        let directory = std::env::temp_dir();
        let path = |extension| directory.join(format!("lcbst-figures-{}.{extension}", std::process::id()));
        figure.write(&path("svg"), &path("png")).unwrap();
        let (svg, png) = (fs::read_to_string(path("svg")).unwrap(), fs::read(path("png")).unwrap());
        fs::remove_file(path("svg")).unwrap();
        fs::remove_file(path("png")).unwrap();
        assert!(svg.contains("A caption") && svg.contains("10³") && svg.contains("a line"));
        assert!(png.starts_with(b"\x89PNG"));
    }
}
