//! Specifications as text, and which values are allowed.
//!
//! Each parameter stands in [`parameters`] once; parsing, printing and the help are made from there.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use vmferry_core::pages::MAX_RAM_PAGES;

use super::workload::MAX_WRITERS;
use super::{
    Chase, Churn, GeneratorSpec, HotCold, Idle, MAX_DURATION, MAX_EPOCH_WRITES, MAX_WRITES, Phases, Sweep, Workload,
    Zipf, writes_until,
};
use crate::trace::{MAX_EPOCH_LENGTH, MAX_EPOCHS, MIN_EPOCH_LENGTH};

/// The largest heap of `churn` in pages; a place costs four bytes.
const MAX_HEAP_PAGES: u64 = 1 << 26;
/// The largest object of `churn` in pages.
const MAX_OBJECT_PAGES: u64 = 1 << 16;
/// The most hot parts of `phases`.
const MAX_PHASES: u64 = 1024;
/// The least share of visits of `chase` that write: fewer would make generating slow.
const MIN_WRITE_SHARE: f64 = 0.001;

/// Why a specification cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// There is no such workload.
    #[error("there is no workload `{found}`; there are {}", names())]
    Workload {
        /// The name given.
        found: String,
    },
    /// A part is not of the form NAME=VALUE.
    #[error("`{part}` is not of the form NAME=VALUE")]
    Syntax {
        /// The part.
        part: String,
    },
    /// The workload has no such parameter.
    #[error("`{workload}` has no parameter `{found}`; it has {}", .known.join(", "))]
    Parameter {
        /// The workload.
        workload: &'static str,
        /// The name given.
        found: String,
        /// The parameters that it has.
        known: Vec<&'static str>,
    },
    /// A parameter is given twice.
    #[error("`{parameter}` is given twice")]
    Repeated {
        /// The parameter.
        parameter: &'static str,
    },
    /// A value cannot be used.
    #[error("`{parameter}={value}`: expected {expected}")]
    Value {
        /// The parameter.
        parameter: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: String,
    },
}

/// A workload, for a program's help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadHelp {
    /// Its name.
    pub name: &'static str,
    /// What it stands for.
    pub summary: &'static str,
    /// Its parameters, those that all workloads have first.
    pub parameters: Vec<Parameter>,
}

/// A parameter of a workload, for a program's help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// The value if it is left out, as text.
    pub default: String,
    /// What it is, with the unit.
    pub summary: &'static str,
}

/// All workloads with their parameters.
pub fn workloads() -> Vec<WorkloadHelp> {
    let help = |workload: Workload| {
        let (name, summary) = (name(&workload), summary(&workload));
        let mut list = Vec::new();
        parameters(&mut GeneratorSpec::new(workload), &mut |name, field, summary| {
            let default = field.to_string().unwrap_or_else(|| field.automatic().to_owned());
            list.push(Parameter { name, default, summary });
        });
        WorkloadHelp { name, summary, parameters: list }
    };
    all().into_iter().map(help).collect()
}

/// Each workload with its defaults.
fn all() -> [Workload; 7] {
    [
        Workload::Zipf(Zipf::default()),
        Workload::HotCold(HotCold::default()),
        Workload::Phases(Phases::default()),
        Workload::Sweep(Sweep::default()),
        Workload::Chase(Chase::default()),
        Workload::Churn(Churn::default()),
        Workload::Idle(Idle::default()),
    ]
}

fn names() -> String {
    all().iter().map(name).collect::<Vec<_>>().join(", ")
}

fn name(workload: &Workload) -> &'static str {
    match workload {
        Workload::Zipf(_) => "zipf",
        Workload::HotCold(_) => "hotcold",
        Workload::Phases(_) => "phases",
        Workload::Sweep(_) => "sweep",
        Workload::Chase(_) => "chase",
        Workload::Churn(_) => "churn",
        Workload::Idle(_) => "idle",
    }
}

fn summary(workload: &Workload) -> &'static str {
    match workload {
        Workload::Zipf(_) => "few pages often, many rarely, by Zipf's law",
        Workload::HotCold(_) => "a hot part that gets most of the writes, and a cold one",
        Workload::Phases(_) => "a hot part that moves to other pages from time to time",
        Workload::Sweep(_) => "one page after another, again and again",
        Workload::Chase(_) => "a ring of nodes walked in a fixed random order, more read than written",
        Workload::Churn(_) => "an allocator: objects are written when they are allocated",
        Workload::Idle(_) => "a few pages all the time, and bursts through a log now and then",
    }
}

/// A parameter's place in a specification.
enum Field<'a> {
    Count(&'a mut u64),
    /// A count that follows from others if it is not given; the text says how.
    Automatic(&'a mut Option<u64>, &'static str),
    Real(&'a mut f64),
    Time(&'a mut Duration),
}

/// Calls `each` for each parameter of a specification, in the order in which they are printed.
fn parameters(spec: &mut GeneratorSpec, each: &mut dyn FnMut(&'static str, Field<'_>, &'static str)) {
    const REGION: &str = "pages written at all, from page 0";
    const WRITERS: &str = "address spaces, each with an equal share of the region";
    const CLUSTER: &str = "neighbouring pages that are equally hot";
    const ALL: &str = "all that are not zero";
    each("pages", Field::Count(&mut spec.pages), "the guest's size in pages");
    each("zero", Field::Count(&mut spec.zero), "pages that are zero and stay so: the last ones");
    each("rate", Field::Count(&mut spec.rate), "single writes per second");
    each("epoch", Field::Time(&mut spec.epoch), "the length of an epoch");
    each("duration", Field::Time(&mut spec.duration), "the length of the trace");
    match &mut spec.workload {
        Workload::Zipf(zipf) => {
            each("exponent", Field::Real(&mut zipf.exponent), "how uneven the writes are; 0 is even");
            each("region", Field::Automatic(&mut zipf.region, ALL), REGION);
            each("cluster", Field::Count(&mut zipf.cluster), CLUSTER);
            each("writers", Field::Count(&mut zipf.writers), WRITERS);
        }
        Workload::HotCold(hot_cold) => {
            each("region", Field::Automatic(&mut hot_cold.region, ALL), REGION);
            each("hot", Field::Automatic(&mut hot_cold.hot, "region/8"), "hot pages, of all writers together");
            each("hot_share", Field::Real(&mut hot_cold.hot_share), "share of writes that go to hot pages, 0 to 1");
            each("cluster", Field::Count(&mut hot_cold.cluster), CLUSTER);
            each("writers", Field::Count(&mut hot_cold.writers), WRITERS);
        }
        Workload::Phases(phases) => {
            each("region", Field::Automatic(&mut phases.region, ALL), REGION);
            each("hot", Field::Automatic(&mut phases.hot, "region/8"), "hot pages at a time");
            each("phases", Field::Count(&mut phases.phases), "hot parts, which take turns and do not overlap");
            each("phase", Field::Time(&mut phases.phase), "how long each of them is hot");
            each("hot_share", Field::Real(&mut phases.hot_share), "share of writes that go to hot pages, 0 to 1");
            each("cluster", Field::Count(&mut phases.cluster), CLUSTER);
        }
        Workload::Sweep(sweep) => {
            each("region", Field::Automatic(&mut sweep.region, "pages/4"), "pages swept, from page 0");
            each("stride", Field::Count(&mut sweep.stride), "pages from one write to the next");
            each("writers", Field::Count(&mut sweep.writers), WRITERS);
        }
        Workload::Chase(chase) => {
            each("region", Field::Automatic(&mut chase.region, "pages/4"), "nodes of the ring, one to a page");
            each("write_share", Field::Real(&mut chase.write_share), "share of visits that write, 0.001 to 1");
            each("writers", Field::Count(&mut chase.writers), WRITERS);
        }
        Workload::Churn(churn) => {
            each("region", Field::Automatic(&mut churn.region, "pages/2"), "pages of the heap, from page 0");
            each("live", Field::Real(&mut churn.live), "share of the heap that is allocated, 0.05 to 0.95");
            each("object", Field::Count(&mut churn.object), "pages of the largest object, a power of two");
            each("writers", Field::Count(&mut churn.writers), WRITERS);
        }
        Workload::Idle(idle) => {
            each("hot", Field::Count(&mut idle.hot), "pages written all the time");
            each("burst", Field::Count(&mut idle.burst), "pages of a burst");
            each("period", Field::Time(&mut idle.period), "time from burst to burst");
            each(
                "log",
                Field::Automatic(&mut idle.log, "16*burst, or what there is"),
                "pages that bursts go through in order",
            );
        }
    }
}

impl Field<'_> {
    /// The value as text; `None` where it follows from others.
    fn to_string(&self) -> Option<String> {
        match self {
            Self::Count(count) => Some(count.to_string()),
            Self::Automatic(count, _) => count.map(|count| count.to_string()),
            Self::Real(real) => Some(real.to_string()),
            Self::Time(time) => Some(time_to_text(**time)),
        }
    }

    /// What a value that is not given follows from.
    fn automatic(&self) -> &'static str {
        match self {
            Self::Automatic(_, how) => how,
            Self::Count(_) | Self::Real(_) | Self::Time(_) => "",
        }
    }

    /// Sets the value from text; else says what is expected.
    fn set(self, text: &str) -> Result<(), &'static str> {
        const COUNT: &str = "a whole number, also with Ki, Mi or Gi";
        match self {
            Self::Count(count) => *count = count_from_text(text).ok_or(COUNT)?,
            Self::Automatic(count, _) => *count = Some(count_from_text(text).ok_or(COUNT)?),
            Self::Real(real) => *real = text.parse().ok().filter(|real: &f64| real.is_finite()).ok_or("a number")?,
            Self::Time(time) => *time = time_from_text(text).ok_or("a time such as 500us, 50ms, 10s or 2min")?,
        }
        Ok(())
    }
}

fn digits(text: &str) -> Option<u64> {
    // `parse` alone would take a sign, too.
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn count_from_text(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 3] = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30)];
    let unit = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
    let (number, unit) = unit.unwrap_or((text, 1));
    digits(number)?.checked_mul(unit)
}

/// Units of time in microseconds, the longest first.
const TIME_UNITS: [(&str, u64); 4] = [("min", 60_000_000), ("s", 1_000_000), ("ms", 1000), ("us", 1)];

fn time_from_text(text: &str) -> Option<Duration> {
    let number = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let unit = TIME_UNITS.iter().find(|(name, _)| *name == &text[number.len()..])?.1;
    digits(number)?.checked_mul(unit).map(Duration::from_micros)
}

/// The time in the longest unit below minutes of which it is a whole number.
fn time_to_text(time: Duration) -> String {
    let us = time.as_micros();
    match TIME_UNITS[1..].iter().find(|&&(_, unit)| us.is_multiple_of(u128::from(unit))) {
        Some((name, unit)) => format!("{}{name}", us / u128::from(*unit)),
        None => format!("{us}us"),
    }
}

impl FromStr for GeneratorSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (found, values) = text.split_once(':').unwrap_or((text, ""));
        let Some(workload) = all().into_iter().find(|workload| name(workload) == found.trim()) else {
            return Err(SpecError::Workload { found: found.trim().to_owned() });
        };
        let workload_name = name(&workload);
        let mut spec = Self::new(workload);
        let mut given = Vec::new();
        for part in values.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(SpecError::Syntax { part: part.to_owned() });
            };
            let (key, value) = (key.trim(), value.trim());
            let (mut known, mut result) = (Vec::new(), None);
            parameters(&mut spec, &mut |parameter, field, _| {
                known.push(parameter);
                if parameter == key {
                    result = Some(field.set(value).map(|()| parameter).map_err(|expected| SpecError::Value {
                        parameter,
                        value: value.to_owned(),
                        expected: expected.to_owned(),
                    }));
                }
            });
            let parameter = result.unwrap_or_else(|| {
                Err(SpecError::Parameter { workload: workload_name, found: key.to_owned(), known })
            })?;
            if given.contains(&parameter) {
                return Err(SpecError::Repeated { parameter });
            }
            given.push(parameter);
        }
        spec.check()?;
        Ok(spec)
    }
}

impl fmt::Display for GeneratorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        // The fields are handed out to be written to; a copy is cheap.
        parameters(&mut self.clone(), &mut |name, field, _| {
            parts.extend(field.to_string().map(|value| format!("{name}={value}")));
        });
        write!(f, "{}:{}", name(&self.workload), parts.join(","))
    }
}

/// Checks that a count lies in a range.
fn count(parameter: &'static str, value: u64, least: u64, most: u64, what: &str) -> Result<(), SpecError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let expected = if least <= most { format!("{least} to {most}{what}") } else { format!("a larger guest{what}") };
    Err(SpecError::Value { parameter, value: value.to_string(), expected })
}

/// Checks that a number lies in a range; one that is not a number does not.
fn real(parameter: &'static str, value: f64, least: f64, most: f64) -> Result<(), SpecError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(SpecError::Value { parameter, value: value.to_string(), expected: format!("{least} to {most}") })
}

/// Checks that a time lies in a range.
fn time(parameter: &'static str, value: Duration, least: Duration, most: Duration) -> Result<(), SpecError> {
    if (least..=most).contains(&value) && value.subsec_nanos().is_multiple_of(1000) {
        return Ok(());
    }
    let expected = format!("{} to {}", time_to_text(least), time_to_text(most));
    Err(SpecError::Value { parameter, value: time_to_text(value), expected })
}

/// Checks that all parameters lie in their ranges.
pub(super) fn check(spec: &GeneratorSpec) -> Result<(), SpecError> {
    count("pages", spec.pages, 1, MAX_RAM_PAGES, "")?;
    count("zero", spec.zero, 0, spec.pages - 1, ", fewer than `pages`")?;
    time("epoch", spec.epoch, MIN_EPOCH_LENGTH, MAX_EPOCH_LENGTH)?;
    // Not more epochs than a trace may have.
    let longest = MAX_DURATION.min(spec.epoch.saturating_mul(MAX_EPOCHS as u32));
    time("duration", spec.duration, spec.epoch, longest)?;
    let usable = spec.pages - spec.zero;
    // For each write of a chase there are visits that only read.
    let visits = if let Workload::Chase(chase) = &spec.workload {
        real("write_share", chase.write_share, MIN_WRITE_SHARE, 1.0)?;
        (1.0 / chase.write_share) as u64 + 1
    } else {
        1
    };
    let per_epoch = writes_until(spec.rate, spec.epoch.as_nanos() as u64).saturating_mul(visits);
    let in_all = writes_until(spec.rate, spec.duration.as_nanos() as u64).saturating_mul(visits);
    if per_epoch > MAX_EPOCH_WRITES || in_all > MAX_WRITES {
        let expected = format!("at most {MAX_EPOCH_WRITES} writes in an epoch and {MAX_WRITES} in all");
        return Err(SpecError::Value { parameter: "rate", value: spec.rate.to_string(), expected });
    }
    match &spec.workload {
        Workload::Zipf(zipf) => {
            real("exponent", zipf.exponent, 0.0, 4.0)?;
            let share = region(zipf.region(usable), usable, zipf.writers)?;
            count("cluster", zipf.cluster, 1, share, ", a writer's share of `region`")
        }
        Workload::HotCold(hot_cold) => {
            let share = region(hot_cold.region(usable), usable, hot_cold.writers)?;
            count("hot", hot_cold.hot(usable), 0, hot_cold.region(usable), ", up to `region`")?;
            real("hot_share", hot_cold.hot_share, 0.0, 1.0)?;
            count("cluster", hot_cold.cluster, 1, share, ", a writer's share of `region`")
        }
        Workload::Phases(phases) => {
            let share = region(phases.region(usable), usable, 1)?;
            count("phases", phases.phases, 1, MAX_PHASES, "")?;
            count("hot", phases.hot(usable), 1, share / phases.phases, ": `phases` of them make up to `region`")?;
            time("phase", phases.phase, Duration::from_micros(1), MAX_DURATION)?;
            real("hot_share", phases.hot_share, 0.0, 1.0)?;
            count("cluster", phases.cluster, 1, share, ", up to `region`")
        }
        Workload::Sweep(sweep) => {
            let share = region(sweep.region(usable), usable, sweep.writers)?;
            count("stride", sweep.stride, 1, share, ", a writer's share of `region`")
        }
        Workload::Chase(chase) => region(chase.region(usable), usable, chase.writers).map(drop),
        Workload::Churn(churn) => {
            let share = region(churn.region(usable), usable.min(MAX_HEAP_PAGES), churn.writers)?;
            real("live", churn.live, 0.05, 0.95)?;
            count("object", churn.object, 1, MAX_OBJECT_PAGES, "")?;
            // Each size has an equal part of the heap, and there is room for an object of each.
            let sizes = u64::from(churn.object.ilog2()) + 1;
            if !churn.object.is_power_of_two() || share / sizes < churn.object {
                let expected = format!("a power of two, of which a writer's {share} pages hold {sizes} and more");
                return Err(SpecError::Value { parameter: "object", value: churn.object.to_string(), expected });
            }
            Ok(())
        }
        Workload::Idle(idle) => {
            count("hot", idle.hot, 1, usable, "")?;
            time("period", idle.period, Duration::from_micros(1), MAX_DURATION)?;
            count(
                "log",
                idle.log(usable),
                idle.burst,
                usable - idle.hot,
                ": at least `burst`, and beside `hot` in the guest",
            )
        }
    }
}

/// Checks a region and the number of writers that share it. Returns the share of each.
fn region(region: u64, usable: u64, writers: u64) -> Result<u64, SpecError> {
    count("writers", writers, 1, MAX_WRITERS, "")?;
    count("region", region, writers, usable, ": a page for each writer at least, in `pages` less `zero`")?;
    Ok(region / writers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> GeneratorSpec {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        for workload in all() {
            let name = name(&workload);
            let default = GeneratorSpec::new(workload);
            assert_eq!(spec(name), default);
            assert_eq!(spec(&format!(" {name} : ")), default);
            assert_eq!(spec(&default.to_string()), default);
        }
        assert_eq!(
            GeneratorSpec::new(Workload::Zipf(Zipf::default())).to_string(),
            "zipf:pages=65536,zero=0,rate=20000,epoch=50ms,duration=60s,exponent=0.99,cluster=1,writers=1"
        );
    }

    #[test]
    fn values_have_units() {
        let spec = spec("zipf: pages=1Mi, region=64Ki, epoch=500us, duration=2min, exponent=1.25, rate=50000");
        assert_eq!(spec.pages, 1 << 20);
        assert_eq!(spec.epoch, Duration::from_micros(500));
        assert_eq!(spec.duration, Duration::from_secs(120));
        assert_eq!(spec.workload, Workload::Zipf(Zipf { exponent: 1.25, region: Some(1 << 16), ..Zipf::default() }));
        assert_eq!(spec.to_string().parse(), Ok(spec));
    }

    #[test]
    fn each_parameter_can_be_printed_and_read() {
        for help in workloads() {
            assert!(help.parameters.len() > 5);
            for parameter in &help.parameters {
                // Those that follow from others are said in words.
                if parameter.default.contains(['/', '*', ' ']) {
                    continue;
                }
                let text = format!("{}:{}={}", help.name, parameter.name, parameter.default);
                assert_eq!(text.parse::<GeneratorSpec>().unwrap().to_string().parse(), Ok(spec(&text)));
            }
        }
    }

    fn error(text: &str) -> String {
        text.parse::<GeneratorSpec>().expect_err(text).to_string()
    }

    #[test]
    fn errors_say_what_there_is() {
        assert_eq!(
            error("zip"),
            "there is no workload `zip`; there are zipf, hotcold, phases, sweep, chase, churn, idle"
        );
        assert_eq!(
            error("sweep:hot=1"),
            "`sweep` has no parameter `hot`; it has pages, zero, rate, epoch, duration, region, stride, writers"
        );
        assert_eq!(error("sweep:fast"), "`fast` is not of the form NAME=VALUE");
        assert_eq!(error("sweep:rate=1,rate=2"), "`rate` is given twice");
        assert_eq!(error("sweep:rate=-1"), "`rate=-1`: expected a whole number, also with Ki, Mi or Gi");
        assert_eq!(error("sweep:epoch=5"), "`epoch=5`: expected a time such as 500us, 50ms, 10s or 2min");
        assert_eq!(error("zipf:exponent=NaN"), "`exponent=NaN`: expected a number");
        assert_eq!(error("zipf:exponent=9"), "`exponent=9`: expected 0 to 4");
        assert_eq!(error("zipf:pages=0"), "`pages=0`: expected 1 to 17179869184");
        assert!(error("zipf:pages=99999999999999999999").contains("whole number"));
        assert!(error("zipf:pages=99999999999Gi").contains("whole number"));
    }

    #[test]
    fn parameters_must_fit_together() {
        for text in [
            "zipf:pages=100,zero=100",
            "zipf:pages=100,zero=50,region=51",
            "zipf:pages=100,writers=101",
            "zipf:writers=2000",
            "zipf:pages=100,writers=10,cluster=11",
            "zipf:epoch=2h",
            "zipf:epoch=2s,duration=1s",
            "zipf:epoch=1us,duration=10min",
            "zipf:rate=99999999999",
            "hotcold:hot_share=1.1",
            "hotcold:pages=100,hot=101",
            "phases:pages=100,phases=4,hot=26",
            "phases:pages=4",
            "phases:phase=0s",
            "sweep:pages=100,region=50,stride=51",
            "sweep:pages=3",
            "chase:write_share=0",
            "chase:write_share=0.001,rate=5000000",
            "churn:object=3",
            "churn:object=0",
            "churn:pages=64",
            "churn:live=1",
            "idle:pages=64",
            "idle:burst=100,log=50",
        ] {
            assert!(error(text).contains("expected"), "{text}: {}", error(text));
        }
    }
}
