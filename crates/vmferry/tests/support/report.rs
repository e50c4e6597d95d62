//! What a report of a migration that went well must hold.

use serde_json::Value;

/// The report has everything that it promises.
pub(crate) fn report_is_complete(report: &Value) {
    let number = |path: &str| {
        let value = report.pointer(path).unwrap_or_else(|| panic!("no {path} in {report:#}"));
        value.as_f64().unwrap_or_else(|| panic!("{path} is {value}"))
    };
    assert_eq!(report["outcome"], "completed");
    assert_eq!(report["reason"], Value::Null);
    assert_eq!(report["mode"], "pre-copy");
    assert_eq!(report["migration_id"].as_str().map(str::len), Some(32), "{report:#}");
    let parts = ["pause", "scan", "copy", "device_state", "verify", "load", "resume"];
    let parts: f64 = parts.iter().map(|part| number(&format!("/downtime/{part}_ms"))).sum();
    let downtime = number("/downtime_ms");
    assert!((parts - downtime).abs() < 1.0, "the parts of the downtime make {parts} ms: {report:#}");
    assert!(downtime > 0.0 && downtime < number("/total_ms"), "{report:#}");
    let phases: f64 = ["connect", "observe", "push"].iter().map(|part| number(&format!("/phases/{part}_ms"))).sum();
    assert!(phases > 0.0 && phases < number("/total_ms"), "{report:#}");
    let wire = |part: &str| number(&format!("/wire/{part}_bytes"));
    let total = number("/wire_bytes");
    assert_eq!(wire("push") + wire("stop"), total, "{report:#}");
    let kinds = ["raw", "lz4", "zstd", "delta", "copy"];
    let content: f64 = kinds.iter().map(|kind| wire(kind)).sum();
    assert_eq!(content + wire("zero") + wire("device_state") + wire("control"), total, "{report:#}");
    let pages = |part: &str| number(&format!("/pages/{part}"));
    assert_eq!(kinds.iter().map(|kind| pages(kind)).sum::<f64>(), pages("sent"), "{report:#}");
    assert!(number("/compression/ratio") > 0.9 && number("/compression/encode_ms") >= 0.0, "{report:#}");
    assert!(pages("sent") > 0.0 && pages("zero") > 0.0, "{report:#}");
    assert!(pages("sent") + pages("zero") >= pages("total"), "{report:#}");
    assert_eq!(pages("sent") + pages("zero") - pages("resent"), pages("total"), "{report:#}");
    assert!(pages("held") <= pages("total"), "{report:#}");
    assert!(number("/passes") >= 1.0 && number("/tracking/scans") >= 1.0, "{report:#}");
    assert_eq!(number("/verify/pages"), pages("total"));
    assert_eq!(number("/verify/mismatched"), 0.0);
    number("/working_set/pages");
    for share in ["precision", "recall"] {
        let share = &report["working_set"][share];
        assert!(share.is_null() || share.as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)), "{report:#}");
    }
}
