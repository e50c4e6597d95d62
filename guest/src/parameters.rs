//! What a guest writes: the pattern and its numbers, as code, as words of a kernel command line, and as bytes.

use std::fmt;
use std::str::FromStr;

use crate::memory::PAGE_BYTES;
use crate::{disk, network, processes, ticks};

#[cfg(test)]
pub(crate) use tests::any_parameters;

/// The most pages one guest may have: 1 TiB.
pub const PAGES_MAX: u64 = 1 << 28;

/// The most writer threads one guest may have.
pub const THREADS_MAX: u32 = 256;

/// Words of a kernel command line that are none of [`Parameters`].
const OTHER_KEYS: [&[&str]; 4] = [&disk::KEYS, &network::KEYS, &processes::KEYS, &ticks::KEYS];

/// 64-byte chunks of a page between its header and its trailer.
pub const BODY_CHUNKS: u64 = 62;

/// Which page is written next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// None.
    Idle,
    /// Any page of the hot set, each as likely as the others.
    Hot,
    /// Any page of all, by Zipf's law with exponent 1: the k-th most popular page with probability proportional to 1/k.
    /// Which pages are popular depends on the seed; they are scattered.
    Zipf,
    /// All pages in order, again and again: what least-recently-used order predicts worst.
    Sweep,
    /// As `Hot`, but after a number of writes the hot set moves on to the next pages.
    Phases,
}

impl Pattern {
    /// All patterns.
    pub const ALL: [Self; 5] = [Self::Idle, Self::Hot, Self::Zipf, Self::Sweep, Self::Phases];

    const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Hot => "hot",
            Self::Zipf => "zipf",
            Self::Sweep => "sweep",
            Self::Phases => "phases",
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Pattern {
    type Err = ParameterError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|pattern| pattern.name() == text);
        found.ok_or_else(|| ParameterError::Value { key: "pattern", value: text.to_owned() })
    }
}

/// What a guest writes, how much and how fast.
///
/// As words of a kernel command line (the `Display` form, read back by [`Parameters::from_command_line`]):
///
/// | word | field | default |
/// |---|---|---|
/// | `vmferry.pattern=hot` | `pattern` | `hot` |
/// | `vmferry.memory=64MiB` | `pages`, in bytes | 64 MiB |
/// | `vmferry.hot=8MiB` | `hot_pages`, in bytes | 8 MiB |
/// | `vmferry.rate=20000` | `rate_pages_per_s` | 20000 |
/// | `vmferry.seed=1` | `seed` | 1 |
/// | `vmferry.threads=1` | `threads` | 1 |
/// | `vmferry.incompressible=50` | `incompressible_percent` | 50 |
/// | `vmferry.chunks=1` | `chunks_per_write` | 1 |
/// | `vmferry.phase=16384` | `phase_writes` | 16384 |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// Which page is written next.
    pub pattern: Pattern,
    /// Pages the guest writes and checks, of 4096 bytes.
    pub pages: u64,
    /// Pages in the hot set of [`Pattern::Hot`] and [`Pattern::Phases`].
    pub hot_pages: u64,
    /// Page writes per second of all threads together; 0 is as fast as possible.
    pub rate_pages_per_s: u64,
    /// Decides the pages chosen and the content written.
    pub seed: u64,
    /// Writer threads, each with pages of its own.
    pub threads: u32,
    /// How much of each page no compressor makes smaller, 0 to 100.
    pub incompressible_percent: u8,
    /// How many of a page's [`BODY_CHUNKS`] a write after the first changes, at least 1. Small values favour deltas.
    pub chunks_per_write: u8,
    /// Writes of one thread after which [`Pattern::Phases`] moves on.
    pub phase_writes: u64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            pattern: Pattern::Hot,
            pages: 16_384,
            hot_pages: 2_048,
            rate_pages_per_s: 20_000,
            seed: 1,
            threads: 1,
            incompressible_percent: 50,
            chunks_per_write: 1,
            phase_writes: 16_384,
        }
    }
}

/// Why parameters were refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParameterError {
    /// A word starts with `vmferry.` and is none of the known ones.
    UnknownKey {
        /// The word's part after `vmferry.` and before `=`.
        key: String,
    },
    /// A value is not of its key's form.
    Value {
        /// The key, without `vmferry.`.
        key: &'static str,
        /// The value as given.
        value: String,
    },
    /// A value is outside its limits, or does not go with another.
    Range {
        /// The key, without `vmferry.`.
        key: &'static str,
        /// The least value allowed.
        least: u64,
        /// The greatest value allowed.
        most: u64,
        /// The value given.
        value: u64,
    },
}

impl fmt::Display for ParameterError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { key } => write!(formatter, "there is no parameter vmferry.{key}"),
            Self::Value { key, value } => write!(formatter, "parameter vmferry.{key} cannot be {value:?}"),
            Self::Range { key, least, most, value } => {
                write!(formatter, "parameter vmferry.{key} is {value} and has to be from {least} to {most}")
            }
        }
    }
}

impl std::error::Error for ParameterError {}

/// Length of [`Parameters::to_bytes`].
pub(crate) const PARAMETERS_BYTES: usize = 47;

impl Parameters {
    /// Reads the `vmferry.` words of a kernel command line; other words are passed over. The last of equal words wins.
    ///
    /// # Errors
    /// When a `vmferry.` word is unknown or has a wrong value, and as [`Parameters::validate`].
    pub fn from_command_line(line: &str) -> Result<Self, ParameterError> {
        let mut parameters = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some(assignment) = word.strip_prefix("vmferry.") {
                parameters.assign(assignment)?;
            }
        }
        parameters.validate()?;
        Ok(parameters)
    }

    fn assign(&mut self, assignment: &str) -> Result<(), ParameterError> {
        let (key, value) = assignment.split_once('=').unwrap_or((assignment, ""));
        match key {
            "pattern" => self.pattern = value.parse()?,
            "memory" => self.pages = whole_pages("memory", value)?,
            "hot" => self.hot_pages = whole_pages("hot", value)?,
            "rate" => self.rate_pages_per_s = number("rate", value)?,
            "seed" => self.seed = number("seed", value)?,
            "threads" => self.threads = number("threads", value)?,
            "incompressible" => self.incompressible_percent = number("incompressible", value)?,
            "chunks" => self.chunks_per_write = number("chunks", value)?,
            "phase" => self.phase_writes = number("phase", value)?,
            // For others to read.
            other if OTHER_KEYS.iter().any(|keys| keys.contains(&other)) => {}
            _ => return Err(ParameterError::UnknownKey { key: key.to_owned() }),
        }
        Ok(())
    }

    /// Checks every limit.
    ///
    /// # Errors
    /// The first value outside its limits.
    pub fn validate(&self) -> Result<(), ParameterError> {
        let threads = u64::from(self.threads);
        for (key, least, most, value) in [
            ("memory", 1, PAGES_MAX, self.pages),
            ("threads", 1, u64::from(THREADS_MAX), threads),
            // Each thread has hot pages of its own.
            ("hot", threads, self.pages, self.hot_pages),
            ("incompressible", 0, 100, u64::from(self.incompressible_percent)),
            ("chunks", 1, BODY_CHUNKS, u64::from(self.chunks_per_write)),
            ("phase", 1, u64::MAX, self.phase_writes),
        ] {
            if !(least..=most).contains(&value) {
                return Err(ParameterError::Range { key, least, most, value });
            }
        }
        Ok(())
    }

    /// The form inside a saved state: fields in the order of the struct, little-endian.
    pub(crate) fn to_bytes(&self) -> [u8; PARAMETERS_BYTES] {
        let position = Pattern::ALL.iter().position(|&pattern| pattern == self.pattern);
        let pattern = position.expect("every pattern is in the list of all") as u8;
        let mut bytes = Vec::with_capacity(PARAMETERS_BYTES);
        bytes.push(pattern);
        for word in [self.pages, self.hot_pages, self.rate_pages_per_s, self.seed] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.threads.to_le_bytes());
        bytes.extend_from_slice(&[self.incompressible_percent, self.chunks_per_write]);
        bytes.extend_from_slice(&self.phase_writes.to_le_bytes());
        bytes.try_into().expect("the fields add up to the constant")
    }

    /// Reads [`Parameters::to_bytes`]; `None` when a value is outside its limits.
    pub(crate) fn from_bytes(bytes: &[u8; PARAMETERS_BYTES]) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let parameters = Self {
            pattern: *Pattern::ALL.get(usize::from(bytes[0]))?,
            pages: word(1),
            hot_pages: word(9),
            rate_pages_per_s: word(17),
            seed: word(25),
            threads: u32::from_le_bytes(bytes[33..37].try_into().expect("four bytes")),
            incompressible_percent: bytes[37],
            chunks_per_write: bytes[38],
            phase_writes: word(39),
        };
        parameters.validate().ok()?;
        Some(parameters)
    }
}

impl fmt::Display for Parameters {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let page_bytes = PAGE_BYTES as u64;
        write!(
            formatter,
            "vmferry.pattern={} vmferry.memory={} vmferry.hot={} vmferry.rate={} vmferry.seed={} vmferry.threads={} \
             vmferry.incompressible={} vmferry.chunks={} vmferry.phase={}",
            self.pattern,
            format_bytes(self.pages.saturating_mul(page_bytes)),
            format_bytes(self.hot_pages.saturating_mul(page_bytes)),
            self.rate_pages_per_s,
            self.seed,
            self.threads,
            self.incompressible_percent,
            self.chunks_per_write,
            self.phase_writes,
        )
    }
}

fn number<T: FromStr>(key: &'static str, value: &str) -> Result<T, ParameterError> {
    value.parse().map_err(|_| ParameterError::Value { key, value: value.to_owned() })
}

fn whole_pages(key: &'static str, value: &str) -> Result<u64, ParameterError> {
    let page_bytes = PAGE_BYTES as u64;
    let bytes = parse_bytes(value).filter(|bytes| bytes % page_bytes == 0);
    bytes.map(|bytes| bytes / page_bytes).ok_or_else(|| ParameterError::Value { key, value: value.to_owned() })
}

const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Reads a size: a number of bytes, or a number with one of the units KiB, MiB and GiB.
pub fn parse_bytes(text: &str) -> Option<u64> {
    for (unit, factor) in UNITS {
        if let Some(digits) = text.strip_suffix(unit) {
            return digits.parse::<u64>().ok()?.checked_mul(factor);
        }
    }
    text.parse().ok()
}

/// Writes a size in the largest unit that gives a whole number; [`parse_bytes`] reads it back.
pub fn format_bytes(bytes: u64) -> String {
    for (unit, factor) in UNITS {
        if bytes > 0 && bytes.is_multiple_of(factor) {
            return format!("{}{unit}", bytes / factor);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_words_of_a_command_line_are_read() {
        let line = "console=ttyS0 quiet vmferry.pattern=zipf vmferry.memory=1GiB vmferry.hot=512KiB vmferry.rate=0 \
                    vmferry.seed=18446744073709551615 vmferry.threads=2 panic=-1";
        let parameters = Parameters::from_command_line(line).unwrap();
        assert_eq!(
            parameters,
            Parameters {
                pattern: Pattern::Zipf,
                pages: 262_144,
                hot_pages: 128,
                rate_pages_per_s: 0,
                seed: u64::MAX,
                threads: 2,
                ..Parameters::default()
            }
        );
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (line, message) in [
            ("vmferry.patern=hot", "there is no parameter vmferry.patern"),
            ("vmferry.pattern=warm", "parameter vmferry.pattern cannot be \"warm\""),
            ("vmferry.memory=4097", "parameter vmferry.memory cannot be \"4097\""),
            ("vmferry.memory=64MB", "parameter vmferry.memory cannot be \"64MB\""),
            ("vmferry.memory", "parameter vmferry.memory cannot be \"\""),
            ("vmferry.threads=0", "parameter vmferry.threads is 0 and has to be from 1 to 256"),
            ("vmferry.memory=4MiB", "parameter vmferry.hot is 2048 and has to be from 1 to 1024"),
            ("vmferry.chunks=63", "parameter vmferry.chunks is 63 and has to be from 1 to 62"),
            ("vmferry.memory=99999999999GiB", "parameter vmferry.memory cannot be \"99999999999GiB\""),
        ] {
            assert_eq!(Parameters::from_command_line(line).unwrap_err().to_string(), message, "{line}");
        }
    }

    #[test]
    fn pattern_names_are_read_back() {
        for pattern in Pattern::ALL {
            assert_eq!(pattern.to_string().parse(), Ok(pattern));
        }
    }

    pub(crate) fn any_parameters() -> impl Strategy<Value = Parameters> {
        let sizes = (1..200_u64).prop_flat_map(|pages| (Just(pages), 1..=pages));
        let threads = sizes.prop_flat_map(|(pages, hot)| (Just(pages), Just(hot), 1..=hot.min(8) as u32));
        (threads, 0..5_usize, any::<u64>(), any::<u64>(), 0..=100_u8, 1..=62_u8, 1..500_u64).prop_map(
            |((pages, hot_pages, threads), pattern, rate, seed, incompressible, chunks, phase)| Parameters {
                pattern: Pattern::ALL[pattern],
                pages,
                hot_pages,
                rate_pages_per_s: rate,
                seed,
                threads,
                incompressible_percent: incompressible,
                chunks_per_write: chunks,
                phase_writes: phase,
            },
        )
    }

    proptest! {
        #[test]
        fn every_form_is_read_back(parameters in any_parameters()) {
            prop_assert_eq!(Parameters::from_command_line(&parameters.to_string()), Ok(parameters.clone()));
            prop_assert_eq!(Parameters::from_bytes(&parameters.to_bytes()), Some(parameters));
        }

        #[test]
        fn sizes_are_read_back(bytes: u64) {
            prop_assert_eq!(parse_bytes(&format_bytes(bytes)), Some(bytes));
        }

        #[test]
        fn no_command_line_panics(line in "[ -~]{0,80}", tail in "vmferry\\.[a-z]{0,8}=?[ -~]{0,20}") {
            let _ = Parameters::from_command_line(&format!("{line} {tail}"));
        }
    }
}
