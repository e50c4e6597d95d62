//! A guest's serial port as seen from outside: its lines, each with the moment it came, and the signs of life in them.

use std::io::BufRead;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::interrupt::Interrupt;

/// Lines kept of one guest: two hours of ticks. More would be a guest that prints without end.
const LINES_MAX: usize = 2_000_000;

/// Lines that an error repeats.
const QUOTED_LINES_MAX: usize = 4;

/// How often it is looked whether to stop waiting.
const POLL: Duration = Duration::from_millis(50);

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tick {
    /// When it was seen.
    pub(crate) at: Instant,
    /// Counts on.
    pub(crate) number: u64,
    /// What the guest has done so far: page writes, or rounds of its loads.
    pub(crate) work: u64,
}

impl Tick {
    /// Reads a line of the test guest or of a study guest; `None` if it is none of a tick, or not whole.
    pub(crate) fn parse(line: &str, at: Instant) -> Option<Self> {
        if let Some(words) = line.strip_prefix("vmferry-guest: tick ") {
            let (number, rest) = words.split_once(' ')?;
            // The third field shows that the second is whole.
            let (writes, _) = rest.strip_prefix("writes=")?.split_once(" wrong=")?;
            return Some(Self { at, number: number.parse().ok()?, work: writes.parse().ok()? });
        }
        // The kernel may have printed something before it on the same line.
        let (_, words) = line.split_once("vmferry-study: beat ")?;
        let mut words = words.split(' ');
        let number = words.next()?.parse().ok()?;
        let mut work = 0;
        for word in words {
            work += word.split_once('=')?.1.parse::<u64>().ok()?;
        }
        Some(Self { at, number, work })
    }
}

/// What was printed so far, and by whom it is waited for.
#[derive(Debug, Default)]
pub(crate) struct Serial {
    lines: Mutex<Lines>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<(Instant, String)>,
    /// How many of the lines were asked about already.
    waited: usize,
    has_ended: bool,
}

impl Serial {
    /// Reads lines as they come, in a thread of its own, until the output ends.
    pub(crate) fn follow(output: impl BufRead + Send + 'static) -> Arc<Self> {
        let serial = Arc::new(Self::default());
        let filled = Arc::clone(&serial);
        std::thread::spawn(move || filled.fill(output));
        serial
    }

    fn fill(&self, mut output: impl BufRead) {
        loop {
            let mut bytes = Vec::new();
            let is_line = output.read_until(b'\n', &mut bytes).unwrap_or(0) > 0;
            let at = Instant::now();
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            // A last line without its end was cut off when the guest moved.
            if bytes.ends_with(b"\n") && lines.lines.len() < LINES_MAX {
                lines.lines.push((at, String::from_utf8_lossy(&bytes).trim_end().to_owned()));
            }
            lines.has_ended = !is_line;
            self.arrived.notify_all();
            if !is_line {
                return;
            }
        }
    }

    /// The next line with these words, of those that nobody waited for before.
    ///
    /// # Errors
    /// When it does not come in time, when the guest says that it failed, when QEMU ends, and on an interrupt.
    pub(crate) fn wait_for(&self, words: &str, timeout: Duration, interrupt: &Interrupt) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            while let Some((_, line)) = lines.lines.get(lines.waited) {
                let line = line.clone();
                lines.waited += 1;
                if line.contains("vmferry-guest: failed") || line.contains("vmferry-study: failed") {
                    bail!("the guest says: {line}");
                }
                if line.contains(words) {
                    return Ok(line);
                }
            }
            interrupt.check()?;
            if lines.has_ended {
                let last: Vec<&str> = lines.lines.iter().map(|(_, line)| line.as_str()).collect();
                let last = last[last.len().saturating_sub(QUOTED_LINES_MAX)..].join("; ");
                bail!("QEMU has ended while the guest's `{words}` was waited for; its last words: {last}");
            }
            if Instant::now() >= deadline {
                bail!("the guest said no `{words}` within {} s", timeout.as_secs());
            }
            lines = self.arrived.wait_timeout(lines, POLL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All ticks so far, in the order in which they came.
    pub(crate) fn ticks(&self) -> Vec<Tick> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.lines.iter().filter_map(|(at, line)| Tick::parse(line, *at)).collect()
    }

    /// The last line with these words.
    pub(crate) fn last_with(&self, words: &str) -> Option<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.lines.iter().rev().map(|(_, line)| line).find(|line| line.contains(words)).cloned()
    }
}

/// The longest time without a tick from `start` to `end`. The time before the first tick counts from the last one before
/// `start`, and the time after the last one up to the first one after `end`.
pub(crate) fn longest_gap(ticks: &[Tick], start: Instant, end: Instant) -> Option<Duration> {
    ticks
        .windows(2)
        .filter(|pair| pair[1].at >= start && pair[0].at <= end)
        .map(|pair| pair[1].at.saturating_duration_since(pair[0].at))
        .max()
}

/// Work per second between the last tick up to `start` and the first from `end` on.
pub(crate) fn work_per_s(ticks: &[Tick], start: Instant, end: Instant) -> Option<f64> {
    let first = ticks.iter().rev().find(|tick| tick.at <= start)?;
    let last = ticks.iter().find(|tick| tick.at >= end)?;
    let seconds = last.at.saturating_duration_since(first.at).as_secs_f64();
    (seconds > 0.0).then(|| last.work.saturating_sub(first.work) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(start: Instant, times_ms: &[u64]) -> Vec<Tick> {
        let tick = |(number, &time_ms): (usize, &u64)| Tick {
            at: start + Duration::from_millis(time_ms),
            number: number as u64,
            work: time_ms * 10,
        };
        times_ms.iter().enumerate().map(tick).collect()
    }

    #[test]
    fn ticks_of_both_kinds_of_guests_are_read() {
        let at = Instant::now();
        let read = |line: &str| Tick::parse(line, at).map(|tick| (tick.number, tick.work));
        assert_eq!(read("vmferry-guest: tick 17 writes=34012 wrong=0"), Some((17, 34012)));
        assert_eq!(read("[ 1.0] vmferry-study: beat 9 redis=3 gzip=4"), Some((9, 7)));
        assert_eq!(read("vmferry-study: beat 9"), Some((9, 0)));
    }

    #[test]
    fn halves_of_lines_are_no_ticks() {
        let at = Instant::now();
        for line in [
            "vmferry-guest: tick 17 writes=34",
            "ferry-guest: tick 17 writes=34012 wrong=0",
            "7 writes=34012 wrong=0",
            "vmferry-guest: check pages=3 wrong=0",
            "vmferry-study: beat 9 red[ 1.0]",
            "",
        ] {
            assert_eq!(Tick::parse(line, at), None, "{line}");
        }
    }

    #[test]
    fn a_gap_counts_if_a_part_of_it_is_within_the_time() {
        let start = Instant::now();
        let at = |time_ms| start + Duration::from_millis(time_ms);
        let ticks = ticks(start, &[0, 50, 55, 60, 90, 95, 200]);
        let gap_ms = |from, to| longest_gap(&ticks, at(from), at(to)).map(|gap| gap.as_millis());
        assert_eq!(gap_ms(52, 92), Some(30));
        assert_eq!(gap_ms(40, 92), Some(50));
        assert_eq!(gap_ms(52, 96), Some(105));
        assert_eq!(gap_ms(201, 300), None);
        assert_eq!(longest_gap(&[], start, at(9)), None);
    }

    #[test]
    fn work_is_counted_from_tick_to_tick() {
        let start = Instant::now();
        let ticks = ticks(start, &[0, 100, 300, 400]);
        let at = |time_ms| start + Duration::from_millis(time_ms);
        let rate = work_per_s(&ticks, at(150), at(310)).unwrap();
        assert!((rate - 10_000.0).abs() < 1e-6, "{rate}");
        assert_eq!(work_per_s(&ticks, at(150), at(500)), None);
        assert_eq!(work_per_s(&ticks, at(100), at(100)), None);
    }

    #[test]
    fn a_serial_port_is_waited_for_line_by_line() {
        let serial = Serial::default();
        serial.fill(&b"noise\nvmferry-guest: ready pages=4\nvmferry-guest: tick 1 writes=2 wrong=0\nvmferry-gue"[..]);
        let interrupt = Interrupt::default();
        assert!(serial.wait_for("ready", Duration::ZERO, &interrupt).unwrap().ends_with("pages=4"));
        assert!(serial.wait_for("ready", Duration::ZERO, &interrupt).is_err());
        assert_eq!(serial.ticks().len(), 1);
        assert_eq!(serial.last_with("noise").as_deref(), Some("noise"));
    }
}
