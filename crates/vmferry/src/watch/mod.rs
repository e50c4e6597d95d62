//! `vmferry watch`.

mod draw;
mod forecast;
mod model;

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde::Serialize;
use vmferry_host::{Cancel, QemuSource, SourceVmm, zero_pages};

use crate::cli::WatchArgs;
use crate::output::{cancel_on_signals, print_bytes};
use draw::{Screen, draw, plain_line};
use forecast::{Conditions, Forecast, Forecaster, Verdict};
use model::{Figures, View, WatchModel};

/// Between two lines, and between two computations of the figures that visit all known pages.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two drawings of the screen.
const FRAME_INTERVAL: Duration = Duration::from_millis(100);

pub(crate) fn run(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let on_screen = !args.plain && !args.json && io::stdout().is_terminal() && io::stdin().is_terminal();
    let mut source = QemuSource::attach(&args.qmp, args.pid, None)?;
    // Tracking is on since the source is attached. So a page that is written while it is read here is found later.
    let zero = if args.skip_zero_pages {
        Vec::new()
    } else {
        if on_screen {
            eprintln!("vmferry: reading the guest's memory for its zero pages");
        }
        zero_pages(source.memory())?
    };
    let model = WatchModel::new(source.memory().layout().total_pages(), &zero);
    let output = if on_screen {
        Output::Screen(Box::new(TerminalScreen::open(args.qmp.display().to_string())?))
    } else if args.json {
        Output::Json
    } else {
        Output::Plain
    };
    let conditions = Conditions { bandwidth: args.bandwidth, limit: args.downtime_limit };
    let mut watcher = Watcher { model, conditions, forecaster: Forecaster::start()?, output, line_at: Duration::ZERO };
    let watched = watcher.watch(&mut source, args, &cancel);
    // The terminal is as it was before anything is said.
    drop(watcher);
    watched.map(|()| ExitCode::SUCCESS)
}

/// Where the figures go.
enum Output {
    Screen(Box<TerminalScreen>),
    Plain,
    Json,
}

/// A watch and its output.
struct Watcher {
    model: WatchModel,
    conditions: Conditions,
    forecaster: Forecaster,
    output: Output,
    /// When the next line is due, since the watch began.
    line_at: Duration,
}

impl Watcher {
    /// Watches until the user, the duration or the guest ends it.
    fn watch(&mut self, source: &mut QemuSource, args: &WatchArgs, cancel: &Cancel) -> anyhow::Result<()> {
        let mut failed = None;
        vmferry_host::watch(source, args.epoch, cancel, &mut |epoch| {
            self.model.observe(epoch.written, epoch.length, epoch.scan);
            match self.turn() {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return ControlFlow::Break(()),
                Err(error) => {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            }
            let over = args.duration.is_some_and(|duration| self.model.watched() >= duration);
            if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        failed.map_or(Ok(()), Err)
    }

    /// Predicts if it is time to, and shows what is due; breaks if the user wants to leave.
    fn turn(&mut self) -> anyhow::Result<ControlFlow<()>> {
        let model = &self.model;
        self.forecaster.turn(self.conditions, model.watched(), || model.trace())?;
        let due = self.model.watched() >= self.line_at;
        if due {
            // Lines do not drift; one that is missed is left out.
            self.line_at = (self.line_at + LINE_INTERVAL).max(self.model.watched());
        }
        if let Output::Screen(screen) = &mut self.output {
            let figures = due.then(|| self.model.figures());
            return screen.turn(&self.model, figures, &mut self.conditions, &self.forecaster);
        }
        // The first line comes after a second: an epoch's rate says little.
        if due && self.model.watched() >= LINE_INTERVAL {
            let figures = self.model.figures();
            let forecast = self.forecaster.latest(self.conditions);
            let mut line = match self.output {
                Output::Json => json_line(&figures, self.conditions, forecast)?,
                Output::Plain | Output::Screen(_) => plain_line(&figures, self.conditions, forecast),
            };
            line.push('\n');
            print_bytes(line.as_bytes())?;
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// A line of `--json`.
#[derive(Serialize)]
struct JsonLine<'a> {
    #[serde(flatten)]
    figures: &'a Figures,
    bandwidth_bytes_per_s: u64,
    downtime_limit_ms: f64,
    /// Null until there is one.
    forecast: Option<JsonForecast<'a>>,
}

#[derive(Serialize)]
struct JsonForecast<'a> {
    /// When the guest's writes that it was made from ended, since the watch began.
    at_ms: f64,
    #[serde(flatten)]
    verdict: &'a Verdict,
}

fn json_line(figures: &Figures, conditions: Conditions, forecast: Option<&Forecast>) -> anyhow::Result<String> {
    let forecast =
        forecast.map(|forecast| JsonForecast { at_ms: forecast.at.as_secs_f64() * 1e3, verdict: &forecast.verdict });
    let line = JsonLine {
        figures,
        bandwidth_bytes_per_s: conditions.bandwidth,
        downtime_limit_ms: conditions.limit.as_secs_f64() * 1e3,
        forecast,
    };
    serde_json::to_string(&line).context("cannot write the figures as JSON")
}

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Quit,
    Bandwidth { up: bool },
    Limit { up: bool },
    Hold,
}

impl Key {
    fn of(event: KeyEvent) -> Option<Self> {
        if event.kind == KeyEventKind::Release {
            return None;
        }
        if event.modifiers.contains(KeyModifiers::CONTROL) {
            return (event.code == KeyCode::Char('c')).then_some(Self::Quit);
        }
        Some(match event.code {
            KeyCode::Char('q' | 'Q') | KeyCode::Esc => Self::Quit,
            // Without shift, the key that `+` is on.
            KeyCode::Char('+' | '=') => Self::Bandwidth { up: true },
            KeyCode::Char('-' | '_') => Self::Bandwidth { up: false },
            KeyCode::Char(']') => Self::Limit { up: true },
            KeyCode::Char('[') => Self::Limit { up: false },
            KeyCode::Char('p' | 'P' | ' ') => Self::Hold,
            _ => return None,
        })
    }
}

/// The terminal while we draw on it. It is as it was when this is dropped; and before a panic's message, too.
struct TerminalScreen {
    terminal: DefaultTerminal,
    name: String,
    figures: Figures,
    /// What is shown instead of the present while the display is held.
    held: Option<View>,
    drawn_at: Option<Instant>,
}

impl TerminalScreen {
    fn open(name: String) -> anyhow::Result<Self> {
        let terminal = match ratatui::try_init() {
            Ok(terminal) => terminal,
            Err(error) => {
                // It may be half of what it should be.
                let _ = ratatui::try_restore();
                return Err(error).context("cannot draw on this terminal; try --plain");
            }
        };
        Ok(Self { terminal, name, figures: Figures::default(), held: None, drawn_at: None })
    }

    /// Obeys the keys pressed and draws if it is time to. `figures` are the newest where there are newer ones.
    fn turn(
        &mut self,
        model: &WatchModel,
        figures: Option<Figures>,
        conditions: &mut Conditions,
        forecaster: &Forecaster,
    ) -> anyhow::Result<ControlFlow<()>> {
        if let Some(figures) = figures {
            self.figures = figures;
        }
        let mut changed = false;
        while event::poll(Duration::ZERO).context("cannot read keys")? {
            changed = true;
            let Event::Key(event) = event::read().context("cannot read keys")? else { continue };
            match Key::of(event) {
                Some(Key::Quit) => return Ok(ControlFlow::Break(())),
                Some(Key::Bandwidth { up }) => conditions.step_bandwidth(up),
                Some(Key::Limit { up }) => conditions.step_limit(up),
                Some(Key::Hold) => {
                    self.held = match self.held {
                        None => Some(model.view(self.figures.clone())),
                        Some(_) => None,
                    }
                }
                None => {}
            }
        }
        if !changed && self.drawn_at.is_some_and(|at| at.elapsed() < FRAME_INTERVAL) {
            return Ok(ControlFlow::Continue(()));
        }
        self.drawn_at = Some(Instant::now());
        let now;
        let view = match &self.held {
            Some(view) => view,
            None => {
                now = model.view(self.figures.clone());
                &now
            }
        };
        let screen = Screen {
            name: &self.name,
            view,
            conditions: *conditions,
            forecast: forecaster.latest(*conditions),
            held: self.held.is_some(),
        };
        self.terminal.draw(|frame| draw(frame, &screen)).context("cannot draw on the terminal")?;
        Ok(ControlFlow::Continue(()))
    }
}

impl Drop for TerminalScreen {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = ratatui::try_restore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let plain = |code| Key::of(KeyEvent::new(code, KeyModifiers::NONE));
        let control = |code| Key::of(KeyEvent::new(code, KeyModifiers::CONTROL));
        assert_eq!(plain(KeyCode::Char('q')), Some(Key::Quit));
        assert_eq!(control(KeyCode::Char('c')), Some(Key::Quit));
        assert_eq!(control(KeyCode::Char('q')), None);
        assert_eq!(plain(KeyCode::Char('c')), None);
        assert_eq!(plain(KeyCode::Char('+')), Some(Key::Bandwidth { up: true }));
        assert_eq!(plain(KeyCode::Char('-')), Some(Key::Bandwidth { up: false }));
        assert_eq!(plain(KeyCode::Char(']')), Some(Key::Limit { up: true }));
        assert_eq!(plain(KeyCode::Char('[')), Some(Key::Limit { up: false }));
        assert_eq!(plain(KeyCode::Char('p')), Some(Key::Hold));
        let release = KeyEvent::new_with_kind(KeyCode::Char('q'), KeyModifiers::NONE, KeyEventKind::Release);
        assert_eq!(Key::of(release), None);
    }

    #[test]
    fn a_json_line_has_figures_conditions_and_verdict() {
        let conditions = Conditions { bandwidth: 125_000_000, limit: Duration::from_millis(300) };
        let figures = Figures { guest_bytes: 4096, dirty_bytes_per_s: 12.5, ..Figures::default() };
        let parse = |forecast: Option<&Forecast>| -> serde_json::Value {
            serde_json::from_str(&json_line(&figures, conditions, forecast).unwrap()).unwrap()
        };
        let before = parse(None);
        assert_eq!(before["guest_bytes"], 4096);
        assert_eq!(before["dirty_bytes_per_s"], 12.5);
        assert_eq!(before["bandwidth_bytes_per_s"], 125_000_000);
        assert_eq!(before["downtime_limit_ms"], 300.0);
        assert!(before["forecast"].is_null());
        let verdict = Verdict::DoesNotConverge { given_up_ms: 7500.0, wire_bytes: 5, possible: false };
        let after = parse(Some(&Forecast { conditions, verdict, at: Duration::from_secs(3) }));
        assert_eq!(after["forecast"]["verdict"], "does_not_converge");
        assert_eq!(after["forecast"]["at_ms"], 3000.0);
        assert_eq!(after["forecast"]["possible"], false);
    }
}
