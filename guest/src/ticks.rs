//! How often a guest shows a sign of life, and whether it checks its memory meanwhile.

use std::str::FromStr;
use std::time::Duration;

use crate::parameters::ParameterError;

/// Words of a kernel command line that belong to [`Ticks`] and not to [`Parameters`](crate::Parameters).
pub(crate) const KEYS: [&str; 2] = ["tick_ms", "background_check"];

/// The longest time between two ticks.
const INTERVAL_MAX_MS: u64 = 10_000;

/// In how many milliseconds the background check goes through all pages, unless there are very many.
const ROUND_MS: u64 = 1000;

/// Pages that are checked in 100 ms at most: what a processor without hardware virtualisation checks in a part of these.
const PAGES_PER_100_MS_MAX: u64 = 4096;

/// How often a guest shows a sign of life.
///
/// As words of a kernel command line:
///
/// | word | field | default |
/// |---|---|---|
/// | `vmferry.tick_ms=100` | `interval_ms` | 100 |
/// | `vmferry.background_check=yes` | `background_check` | yes |
///
/// A guest whose pauses are measured from outside ticks more often, and without the background check: that stops the
/// writers, and reads all memory again and again, as few programs do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticks {
    /// From one tick to the next, 1 to 10,000.
    pub interval_ms: u64,
    /// Whether a part of the memory is checked at each tick.
    pub background_check: bool,
}

impl Default for Ticks {
    fn default() -> Self {
        Self { interval_ms: 100, background_check: true }
    }
}

impl Ticks {
    /// Reads the words of a kernel command line that are about ticks; other words are passed over.
    ///
    /// # Errors
    /// When a value is not of its key's form or outside its limits.
    pub fn from_command_line(line: &str) -> Result<Self, ParameterError> {
        let mut ticks = Self::default();
        for word in line.split_ascii_whitespace() {
            let Some((key, value)) = word.strip_prefix("vmferry.").and_then(|word| word.split_once('=')) else {
                continue;
            };
            let wrong = |key| ParameterError::Value { key, value: value.to_owned() };
            match key {
                "tick_ms" => ticks.interval_ms = u64::from_str(value).map_err(|_| wrong("tick_ms"))?,
                "background_check" => {
                    ticks.background_check = match value {
                        "yes" => true,
                        "no" => false,
                        _ => return Err(wrong("background_check")),
                    }
                }
                _ => {}
            }
        }
        if !(1..=INTERVAL_MAX_MS).contains(&ticks.interval_ms) {
            return Err(ParameterError::Range {
                key: "tick_ms",
                least: 1,
                most: INTERVAL_MAX_MS,
                value: ticks.interval_ms,
            });
        }
        Ok(ticks)
    }

    /// From one tick to the next.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }

    /// How many of a guest's pages are checked at each tick.
    pub fn checked_pages(&self, pages: u64) -> u64 {
        if !self.background_check {
            return 0;
        }
        let most = (PAGES_PER_100_MS_MAX * self.interval_ms / 100).max(1);
        (pages * self.interval_ms).div_ceil(ROUND_MS).clamp(1, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_from_a_command_line() {
        assert_eq!(Ticks::from_command_line("console=ttyS0 vmferry.rate=3"), Ok(Ticks::default()));
        let ticks = Ticks::from_command_line("quiet vmferry.tick_ms=5 vmferry.background_check=no");
        assert_eq!(ticks, Ok(Ticks { interval_ms: 5, background_check: false }));
        for line in ["vmferry.tick_ms=0", "vmferry.tick_ms=x", "vmferry.background_check=maybe"] {
            assert!(Ticks::from_command_line(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_round_takes_a_second_however_often_there_are_ticks() {
        for interval_ms in [1, 5, 100, 1000] {
            let ticks = Ticks { interval_ms, ..Ticks::default() };
            assert_eq!(ticks.checked_pages(10_000) * 1000 / interval_ms, 10_000);
        }
        assert_eq!(Ticks::default().checked_pages(1 << 28), 4096);
        assert_eq!(Ticks::default().checked_pages(1), 1);
        assert_eq!(Ticks { background_check: false, ..Ticks::default() }.checked_pages(10_000), 0);
    }
}
