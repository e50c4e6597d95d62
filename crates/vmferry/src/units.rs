//! Sizes, rates and times as people write them.

use std::time::Duration;

/// Bytes: `512MiB`, `4G`, `1.5GB`, `4096`. Without `i` a unit of one letter is binary, as QEMU has it; `KB`, `MB`, `GB`
/// are decimal.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1_048_576.0,
        "g" | "gib" => 1_073_741_824.0,
        "t" | "tib" => 1_099_511_627_776.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(format!("`{unit}` is no unit of size; write for instance 512MiB, 4G or 1.5GB")),
    };
    whole(number * factor, text)
}

/// Bytes per second: `100MB/s`, `1Gbit/s`, `1Gbps`, `200MiB/s`.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    const HELP: &str = "write for instance 100MB/s, 1Gbit/s or 200MiB/s";
    let (number, unit) = split(text)?;
    let unit = unit.to_ascii_lowercase();
    let per_second = unit.strip_suffix("ps").filter(|unit| !unit.is_empty()).or_else(|| unit.strip_suffix("/s"));
    let unit = per_second.unwrap_or(&unit);
    let bits = unit
        .strip_suffix("bit")
        .or_else(|| (per_second.is_some() && text.ends_with("bps")).then(|| &unit[..unit.len() - 1]));
    let factor = match (bits, unit) {
        (Some(prefix), _) => decimal(prefix).map(|factor| factor / 8.0),
        (None, "" | "b") => Some(1.0),
        (None, unit) => match unit.strip_suffix("ib") {
            Some("k") => Some(1024.0),
            Some("m") => Some(1_048_576.0),
            Some("g") => Some(1_073_741_824.0),
            Some(_) => None,
            None => decimal(unit.strip_suffix('b').unwrap_or(unit)),
        },
    };
    let factor = factor.ok_or_else(|| format!("`{text}` is no rate; {HELP}"))?;
    match whole(number * factor, text)? {
        0 => Err(format!("a rate of 0 moves nothing; {HELP}")),
        rate => Ok(rate),
    }
}

/// Page writes per second: a plain number, or a rate in bytes of whole pages (`80MB/s`).
pub(crate) fn write_rate(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(pages) => Ok(pages),
        Err(_) => rate(text).map(|bytes| bytes.div_ceil(vmferry_core::pages::PAGE_BYTES)),
    }
}

/// A time: `300ms`, `1.5s`, `2min`. A plain number is milliseconds.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let factor = match unit {
        "us" | "µs" => 1e-6,
        "" | "ms" => 1e-3,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(format!("`{unit}` is no unit of time; write for instance 300ms, 1.5s or 2min")),
    };
    Duration::try_from_secs_f64(number * factor).map_err(|_| format!("`{text}` is out of range"))
}

/// Bytes for people, decimal, three digits.
pub(crate) fn show_bytes(bytes: u64) -> String {
    let units = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match units.into_iter().find(|(_, factor)| bytes as f64 >= *factor) {
        Some((unit, factor)) => format!("{} {unit}", three_digits(bytes as f64 / factor)),
        None => format!("{bytes} B"),
    }
}

/// A rate for people.
pub(crate) fn show_rate(bytes_per_s: f64) -> String {
    format!("{}/s", show_bytes(bytes_per_s as u64))
}

/// Milliseconds for people.
pub(crate) fn show_ms(ms: f64) -> String {
    if ms >= 1000.0 { format!("{:.2} s", ms / 1000.0) } else { format!("{} ms", three_digits(ms)) }
}

fn three_digits(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}")
}

fn split(text: &str) -> Result<(f64, &str), String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number = text[..end].parse().map_err(|_| format!("`{text}` does not begin with a number"))?;
    Ok((number, text[end..].trim_start()))
}

fn decimal(prefix: &str) -> Option<f64> {
    match prefix {
        "" => Some(1.0),
        "k" => Some(1e3),
        "m" => Some(1e6),
        "g" => Some(1e9),
        "t" => Some(1e12),
        _ => None,
    }
}

fn whole(value: f64, text: &str) -> Result<u64, String> {
    // Beyond 2^53 not every whole number is a float; nobody writes such sizes by hand.
    if value.is_finite() && (0.0..=9_007_199_254_740_992.0).contains(&value) {
        Ok(value.round() as u64)
    } else {
        Err(format!("`{text}` is out of range"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("512 MiB", 512 << 20),
            ("4G", 4 << 30),
            ("1.5GB", 1_500_000_000),
            ("2k", 2048),
            ("3kb", 3000),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "MiB", "12 parsecs", "-1", "99999999T"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates() {
        for (text, expected) in [
            ("100MB/s", 100_000_000),
            ("1Gbit/s", 125_000_000),
            ("1Gbps", 125_000_000),
            ("800mbit", 100_000_000),
            ("200MiB/s", 200 << 20),
            ("10G/s", 10_000_000_000),
            ("5000", 5000),
        ] {
            assert_eq!(rate(text), Ok(expected), "{text}");
        }
        for text in ["0", "fast", "10 furlongs/s", "1XB/s", "ps"] {
            assert!(rate(text).is_err(), "{text}");
        }
        assert_eq!(write_rate("20000"), Ok(20_000));
        assert_eq!(write_rate("40.96MB/s"), Ok(10_000));
        assert_eq!(write_rate("0"), Ok(0));
    }

    #[test]
    fn times() {
        assert_eq!(time("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(time("300"), Ok(Duration::from_millis(300)));
        assert_eq!(time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(time("2min"), Ok(Duration::from_secs(120)));
        assert!(time("soon").is_err());
        assert!(time("3h").is_err());
    }

    #[test]
    fn for_people() {
        assert_eq!(show_bytes(999), "999 B");
        assert_eq!(show_bytes(536_870_912), "537 MB");
        assert_eq!(show_bytes(1_234), "1.23 kB");
        assert_eq!(show_ms(41.26), "41.3 ms");
        assert_eq!(show_ms(4312.0), "4.31 s");
    }
}
