//! The screen: what is known of the guest, drawn.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Sparkline, Wrap};
use vmferry_core::pages::PAGE_BYTES;

use super::forecast::{Conditions, Forecast, Verdict};
use super::model::{Figures, View};
use crate::units::{show_bytes, show_ms, show_rate};

/// Less than this is drawn as lines of text, without boxes and map.
const BOXES_FROM: (u16, u16) = (60, 18);
const KEYS: &str = "q quit   +/- bandwidth   ]/[ downtime limit   p hold";
/// What a cell of the map shows from which heat on, the hottest first.
const SHADES: [(f32, &str, Color); 5] = [
    (0.25, "█", Color::Red),
    (0.0625, "▓", Color::LightRed),
    (0.0156, "▒", Color::Yellow),
    (0.0039, "░", Color::Green),
    (0.000_03, "·", Color::Blue),
];

/// All that a screen shows.
#[derive(Debug)]
pub(super) struct Screen<'a> {
    /// What the guest is called.
    pub(super) name: &'a str,
    pub(super) view: &'a View,
    pub(super) conditions: Conditions,
    /// The prediction for these conditions, as soon as there is one.
    pub(super) forecast: Option<&'a Forecast>,
    /// Whether the display is held.
    pub(super) held: bool,
}

/// Draws the screen, whatever the terminal's size.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen<'_>) {
    let area = frame.area();
    if area.width < BOXES_FROM.0 || area.height < BOXES_FROM.1 {
        return draw_small(frame, screen, area);
    }
    let [title, upper, map, migration, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(7),
        Constraint::Min(4),
        Constraint::Length(5),
        Constraint::Length(1),
    ])
    .areas(area);
    let [rate, working_set] = Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(upper);
    frame.render_widget(Paragraph::new(title_line(screen)), title);
    draw_rate(frame, screen.view, rate);
    let block = Block::bordered().title(" working set ");
    frame.render_widget(Paragraph::new(working_set_lines(&screen.view.figures)).block(block), working_set);
    draw_map(frame, screen.view, map);
    draw_migration(frame, screen, migration);
    frame.render_widget(Paragraph::new(KEYS).style(Style::new().add_modifier(Modifier::DIM)), keys);
}

/// A terminal too small for boxes. The details come last: they are what there may be no room for.
fn draw_small(frame: &mut Frame<'_>, screen: &Screen<'_>, area: Rect) {
    let [text, keys] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(area);
    let figures = &screen.view.figures;
    let mut lines = vec![
        title_line(screen),
        Line::from(format!("dirty {}", show_rate(figures.dirty_bytes_per_s))),
        Line::from(format!("set {} in 10 epochs", show_bytes(figures.working_set_10_bytes))),
        Line::from(conditions_text(screen.conditions)),
    ];
    lines.extend(verdict_lines(screen));
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }), text);
    frame.render_widget(Paragraph::new("q quit  +/- bandwidth  ]/[ limit  p hold"), keys);
}

fn title_line<'a>(screen: &Screen<'a>) -> Line<'a> {
    let figures = &screen.view.figures;
    let mut line = Line::from(vec![
        Span::styled("vmferry watch ", Style::new().add_modifier(Modifier::BOLD)),
        Span::raw(format!("{} guest, for {}  ", show_bytes(figures.guest_bytes), clock(figures.watched_ms))),
    ]);
    if screen.held {
        line.push_span(Span::styled("[held] ", Style::new().add_modifier(Modifier::REVERSED)));
    }
    line.push_span(Span::raw(screen.name));
    line
}

/// Hours, minutes and seconds, as far as needed.
fn clock(ms: f64) -> String {
    let seconds = (ms / 1e3) as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes}:{seconds:02}"),
        (hours, minutes, seconds) => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

fn draw_rate(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let figures = &view.figures;
    let block = Block::bordered().title(format!(" dirty rate {} ", show_rate(figures.dirty_bytes_per_s)));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [text, curve] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(inner);
    let mean = show_rate(figures.dirty_mean_bytes_per_s);
    let max = show_rate(figures.dirty_max_bytes_per_s);
    frame.render_widget(Paragraph::new(format!("mean {mean}, max {max}")), text);
    let last = view.curve.len().saturating_sub(usize::from(curve.width));
    let style = Style::new().fg(Color::Cyan);
    frame.render_widget(Sparkline::default().data(&view.curve[last..]).style(style), curve);
}

fn working_set_lines(figures: &Figures) -> Vec<Line<'static>> {
    let whole = figures.guest_bytes.max(1) as f64;
    let line = |name: &str, bytes: u64| {
        let share = bytes as f64 / whole * 100.0;
        Line::from(format!("{name:<16}{:>9}  {share:>5.1} %", show_bytes(bytes)))
    };
    vec![
        line("last epoch", figures.working_set_1_bytes),
        line("last 10", figures.working_set_10_bytes),
        line("last 100", figures.working_set_100_bytes),
        line("hot", figures.hot_pages * PAGE_BYTES),
        line("zero, unwritten", figures.zero_bytes),
    ]
}

fn draw_map(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let block = Block::bordered();
    let inner = block.inner(area);
    let (width, height) = (usize::from(inner.width), usize::from(inner.height));
    if width == 0 || height == 0 {
        return frame.render_widget(block, area);
    }
    // A guest of fewer regions than the screen has cells shows each as often as needed.
    let cells = view.cells(width * height);
    let cell_bytes = view.figures.guest_bytes / cells.len() as u64;
    let mut legend = vec![Span::raw(format!(" memory, {} a cell; written per epoch: ", show_bytes(cell_bytes)))];
    for ((_, shade, color), share) in SHADES.iter().zip(["25 %", "6 %", "1.6 %", "0.4 %", "less"]) {
        legend.push(Span::styled(*shade, Style::new().fg(*color)));
        legend.push(Span::raw(format!(" {share} ")));
    }
    frame.render_widget(block.title(Line::from(legend)), area);
    let lines: Vec<Line<'_>> = cells.chunks(width).map(|row| row.iter().map(|&heat| shade(heat)).collect()).collect();
    frame.render_widget(Paragraph::new(lines), inner);
}

fn shade(heat: f32) -> Span<'static> {
    match SHADES.iter().find(|(from, ..)| heat >= *from) {
        Some(&(_, shade, color)) => Span::styled(shade, Style::new().fg(color)),
        None => Span::raw(" "),
    }
}

fn draw_migration(frame: &mut Frame<'_>, screen: &Screen<'_>, area: Rect) {
    let block = Block::bordered().title(format!(" a migration now, {} ", conditions_text(screen.conditions)));
    frame.render_widget(Paragraph::new(verdict_lines(screen)).wrap(Wrap { trim: true }).block(block), area);
}

fn conditions_text(conditions: Conditions) -> String {
    let limit = show_limit(conditions.limit);
    format!("{} ({}), limit {limit}", show_bits(conditions.bandwidth), show_rate(conditions.bandwidth as f64))
}

/// A limit as the user would write it.
fn show_limit(limit: Duration) -> String {
    let ms = limit.as_secs_f64() * 1e3;
    if ms >= 1e3 { format!("{} s", ms / 1e3) } else { format!("{ms} ms") }
}

/// A link's rate as links are sold.
fn show_bits(bytes_per_s: u64) -> String {
    let bits = bytes_per_s as f64 * 8.0;
    let (value, unit) = match bits {
        _ if bits >= 1e12 => (bits / 1e12, "Tbit/s"),
        _ if bits >= 1e9 => (bits / 1e9, "Gbit/s"),
        _ if bits >= 1e6 => (bits / 1e6, "Mbit/s"),
        _ => (bits / 1e3, "kbit/s"),
    };
    let text = format!("{value:.2}");
    format!("{} {unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

fn verdict_lines(screen: &Screen<'_>) -> Vec<Line<'static>> {
    let Some(forecast) = screen.forecast else {
        return vec![Line::from("measuring …")];
    };
    let color = match forecast.verdict {
        Verdict::Converges { within_limit: true, .. } => Color::Green,
        Verdict::Converges { within_limit: false, .. } | Verdict::Unknown { .. } => Color::Yellow,
        Verdict::DoesNotConverge { .. } | Verdict::DoesNotEnd { .. } => Color::Red,
    };
    let (verdict, details) = verdict_text(&forecast.verdict, screen.conditions);
    let age = Duration::from_secs_f64(screen.view.figures.watched_ms / 1e3).saturating_sub(forecast.at).as_secs();
    vec![
        Line::styled(verdict, Style::new().fg(color).add_modifier(Modifier::BOLD)),
        Line::from(details),
        Line::styled(format!("simulated {age} s ago"), Style::new().add_modifier(Modifier::DIM)),
    ]
}

/// A verdict in words: what, and more of it.
pub(super) fn verdict_text(verdict: &Verdict, conditions: Conditions) -> (String, String) {
    match verdict {
        Verdict::Converges { total_ms, downtime_ms, within_limit, wire_bytes, held_pages } => {
            let beyond = if *within_limit { "" } else { ", beyond the limit" };
            (
                format!("converges in {}, pause {}{beyond}", show_ms(*total_ms), show_ms(*downtime_ms)),
                format!(
                    "{} sent, {} held back for the pause",
                    show_bytes(*wire_bytes),
                    show_bytes(held_pages * PAGE_BYTES)
                ),
            )
        }
        Verdict::DoesNotConverge { given_up_ms, wire_bytes, possible } => {
            let limit = show_limit(conditions.limit);
            let why = if *possible {
                format!("a pause of {limit} is possible to who knows the future; try another limit or bandwidth")
            } else {
                format!("no schedule at all can pause for {limit} only: raise the bandwidth or the limit")
            };
            let sent = show_bytes(*wire_bytes);
            (format!("does not converge: given up after {}, {sent} sent", show_ms(*given_up_ms)), why)
        }
        Verdict::DoesNotEnd { within_ms } => {
            (format!("does not end within {}", show_ms(*within_ms)), "raise the bandwidth".to_owned())
        }
        Verdict::Unknown { why } => ("not known".to_owned(), why.clone()),
    }
}

/// All of it in a line.
pub(super) fn plain_line(figures: &Figures, conditions: Conditions, forecast: Option<&Forecast>) -> String {
    let verdict = forecast.map_or("measuring".to_owned(), |forecast| {
        let (verdict, details) = verdict_text(&forecast.verdict, conditions);
        format!("{verdict}, {details}")
    });
    format!(
        "{:.1} s: dirty rate {} (mean {}, max {}); working set {} in 1 epoch, {} in 10, {} in 100, {} hot; at {}: {verdict}",
        figures.watched_ms / 1e3,
        show_rate(figures.dirty_bytes_per_s),
        show_rate(figures.dirty_mean_bytes_per_s),
        show_rate(figures.dirty_max_bytes_per_s),
        show_bytes(figures.working_set_1_bytes),
        show_bytes(figures.working_set_10_bytes),
        show_bytes(figures.working_set_100_bytes),
        show_bytes(figures.hot_pages * PAGE_BYTES),
        conditions_text(conditions),
    )
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use vmferry_core::pages::PageRun;

    use super::super::model::WatchModel;
    use super::*;

    const CONDITIONS: Conditions = Conditions { bandwidth: 125_000_000, limit: Duration::from_millis(300) };

    /// 64 MiB, of which the second quarter is written in each of 40 epochs.
    fn view() -> View {
        let mut model = WatchModel::new(16_384, &[PageRun::new(12_000, 384)]);
        for _ in 0..40 {
            model.observe(&[PageRun::new(4096, 4096)], Duration::from_millis(50), Duration::from_millis(1));
        }
        let figures = model.figures();
        model.view(figures)
    }

    fn drawn(width: u16, height: u16, view: &View, verdict: Option<Verdict>, held: bool) -> Vec<String> {
        let forecast = verdict.map(|verdict| Forecast { conditions: CONDITIONS, verdict, at: Duration::from_secs(1) });
        let screen = Screen { name: "vm1.qmp", view, conditions: CONDITIONS, forecast: forecast.as_ref(), held };
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &screen)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        (0..height).map(row).collect()
    }

    fn has(rows: &[String], texts: &[&str]) {
        let all = rows.join("\n");
        for text in texts {
            assert!(all.contains(text), "`{text}` is not on the screen:\n{all}");
        }
    }

    fn converges() -> Verdict {
        Verdict::Converges {
            total_ms: 812.0,
            downtime_ms: 141.0,
            within_limit: true,
            wire_bytes: 66_000_000,
            held_pages: 4096,
        }
    }

    #[test]
    fn everything_is_on_an_ordinary_screen() {
        let rows = drawn(80, 24, &view(), Some(converges()), false);
        has(
            &rows,
            &[
                "vmferry watch",
                "67.1 MB guest, for 2 s",
                "vm1.qmp",
                "dirty rate 336 MB/s",
                "mean 336 MB/s, max 336 MB/s",
                "working set",
                "last 100          16.8 MB   25.0 %",
                "hot               16.8 MB   25.0 %",
                "1 Gbit/s (125 MB/s), limit 300 ms",
                "converges in 812 ms, pause 141 ms",
                "66.0 MB sent, 16.8 MB held back for the pause",
                "simulated 1 s ago",
                KEYS,
            ],
        );
        assert!(!rows.join("").contains("[held]"));
        has(&drawn(80, 24, &view(), None, true), &["[held]", "measuring"]);
    }

    /// The second quarter of the map is hot, all else is cold.
    #[test]
    fn the_map_shows_the_hot_quarter() {
        let rows = drawn(80, 24, &view(), None, false);
        let first = rows.iter().position(|row| row.contains("a cell")).unwrap() + 1;
        let map: String = rows[first..]
            .iter()
            .take_while(|row| row.starts_with('│'))
            .flat_map(|row| row.chars().skip(1).take(78))
            .collect();
        let cells: Vec<char> = map.chars().collect();
        assert!(cells.len() >= 78 * 4, "{rows:#?}");
        let hot = cells.iter().filter(|cell| **cell == '█').count() as f64 / cells.len() as f64;
        assert!((0.23..0.27).contains(&hot), "{hot}");
        let (begin, end) = (cells.len() / 4 + 2, cells.len() / 2 - 2);
        assert!(cells[begin..end].iter().all(|cell| *cell == '█'), "{rows:#?}");
        assert!(cells[..begin - 4].iter().all(|cell| *cell == ' '), "{rows:#?}");
    }

    #[test]
    fn every_verdict_says_what_and_why() {
        let cases = [
            (
                Verdict::DoesNotConverge { given_up_ms: 7600.0, wire_bytes: 900_000_000, possible: false },
                ["does not converge: given up after 7.60 s, 900 MB sent", "no schedule at all can pause for 300 ms"],
            ),
            (
                Verdict::DoesNotConverge { given_up_ms: 7600.0, wire_bytes: 900_000_000, possible: true },
                ["does not converge", "to who knows the future"],
            ),
            (Verdict::DoesNotEnd { within_ms: 120_000.0 }, ["does not end within 120.00 s", "raise the bandwidth"]),
            (Verdict::Unknown { why: "a link of lead".to_owned() }, ["not known", "a link of lead"]),
        ];
        for (verdict, texts) in cases {
            has(&drawn(100, 30, &view(), Some(verdict.clone()), false), &texts);
            let forecast = Forecast { conditions: CONDITIONS, verdict, at: Duration::ZERO };
            let line = plain_line(&view().figures, CONDITIONS, Some(&forecast));
            assert!(texts.iter().all(|text| line.contains(text)), "{line}");
        }
        let Verdict::Converges { total_ms, downtime_ms, wire_bytes, held_pages, .. } = converges() else {
            unreachable!()
        };
        let late = Verdict::Converges { total_ms, downtime_ms, within_limit: false, wire_bytes, held_pages };
        has(&drawn(80, 24, &view(), Some(late), false), &["pause 141 ms, beyond the limit"]);
    }

    #[test]
    fn a_small_screen_shows_the_figures_alone() {
        let rows = drawn(40, 10, &view(), Some(converges()), false);
        has(&rows, &["vmferry watch", "dirty 336 MB/s", "set 16.8 MB", "converges in 812 ms", "q quit"]);
    }

    #[test]
    fn no_size_and_no_guest_is_too_small() {
        for (width, height) in [(0, 0), (1, 1), (5, 40), (200, 2), (60, 18), (60, 24), (300, 100)] {
            for view in [view(), View::default()] {
                drawn(width, height, &view, Some(converges()), true);
                drawn(width, height, &view, None, false);
            }
        }
    }

    #[test]
    fn rates_and_times_are_short() {
        assert_eq!(show_bits(125_000_000), "1 Gbit/s");
        assert_eq!(show_bits(62_500_000), "500 Mbit/s");
        assert_eq!(show_bits(1_312_500_000), "10.5 Gbit/s");
        assert_eq!(show_bits(125_000_000_000), "1 Tbit/s");
        assert_eq!(show_bits(125), "1 kbit/s");
        assert_eq!(show_limit(Duration::from_millis(50)), "50 ms");
        assert_eq!(show_limit(Duration::from_millis(1500)), "1.5 s");
        assert_eq!(clock(59_999.0), "59 s");
        assert_eq!(clock(61_000.0), "1:01");
        assert_eq!(clock(3_661_000.0), "1:01:01");
    }
}
