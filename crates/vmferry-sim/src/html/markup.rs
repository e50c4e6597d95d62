//! Text in HTML.

/// The text with all characters that mean something in HTML written as entities.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

/// JSON that can stand in a `script` element: nothing in it looks like a tag, and it means the same.
pub(super) fn json_in_script(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// A number with three digits that count.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 99.95 {
        thousands(value)
    } else if size >= 9.995 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A whole number, its thousands apart.
pub(super) fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 && digits != "0" { format!("-{text}") } else { text }
}

/// A time in ms.
pub(super) fn time(ms: f64) -> String {
    if ms.abs() >= 1000.0 { format!("{} s", number(ms / 1e3)) } else { format!("{} ms", number(ms)) }
}

/// Bytes, decimal.
pub(super) fn bytes(bytes: f64) -> String {
    let units = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match units.into_iter().find(|(_, factor)| bytes >= *factor) {
        Some((unit, factor)) => format!("{} {unit}", number(bytes / factor)),
        None => format!("{bytes:.0} B"),
    }
}

/// A share in percent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_becomes_markup() {
        assert_eq!(escape("<b a=\"1\">&'"), "&lt;b a=&quot;1&quot;&gt;&amp;&#39;");
        assert_eq!(json_in_script(r#"{"a":"</script>"}"#), r#"{"a":"\u003c/script>"}"#);
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(number(1.0), "1.00");
        assert_eq!(number(-12.34), "-12.3");
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(thousands(-1234.4), "-1,234");
        assert_eq!(thousands(-0.2), "0");
        assert_eq!(time(2500.0), "2.50 s");
        assert_eq!(time(41.26), "41.3 ms");
        assert_eq!(bytes(268_435_456.0), "268 MB");
        assert_eq!(bytes(12.0), "12 B");
        assert_eq!(percent(0.666), "67 %");
    }
}
