use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::page;
use crate::Scenario;
use crate::sweep::{ArmKind, Link, Sweep, SweepReport, arms};
use crate::trace::Trace;
use crate::trace::generate::GeneratorSpec;

/// A sweep whose trace's name is an attack.
fn report() -> SweepReport {
    let spec: GeneratorSpec = "hotcold:pages=2048,rate=2000,duration=2s,hot=200".parse().unwrap();
    let traces = [Trace { name: "</script><b>\"&".to_owned(), ..spec.generate(1).unwrap() }];
    let kinds = ["vmferry", "qemu", "post-copy"].map(|name| name.parse::<ArmKind>().unwrap());
    let sweep = Sweep {
        traces: &traces,
        base: Scenario { time_limit: Duration::from_secs(10), horizon: Duration::from_secs(5), ..Scenario::default() },
        links: vec![Link::Load(0.2), Link::Load(3.0)],
        downtime_limits: vec![Duration::from_millis(60)],
        arms: arms(&kinds, &[Default::default()]),
        baseline: 1,
        seeds: 2,
        jobs: 1,
    };
    sweep.run(&AtomicBool::new(false), &mut |_| {}).unwrap()
}

/// Follows the tags of a page; the first that does not fit.
fn unbalanced(html: &str) -> Option<String> {
    const VOID: [&str; 4] = ["meta", "br", "!DOCTYPE", "link"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>')?;
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
        if tag.starts_with('/') {
            match open.pop() {
                Some(opened) if opened == name => {}
                opened => return Some(format!("</{name}> closes {opened:?}")),
            }
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
        if !tag.matches('"').count().is_multiple_of(2) {
            return Some(format!("<{tag}> has an open quote"));
        }
    }
    open.pop().map(|name| format!("<{name}> is never closed"))
}

#[test]
fn the_check_of_tags_finds_what_is_wrong() {
    assert_eq!(unbalanced("<p>a<br>b <b x=\"1\">c</b><path/></p>"), None);
    for wrong in ["<p>", "<p></b></p>", "</p>", "<p x=\"></p>"] {
        assert!(unbalanced(wrong).is_some(), "{wrong}");
    }
}

#[test]
fn the_page_is_whole_and_loads_nothing() {
    let report = report();
    let html = page(&report, r#"{"name":"</script>"}"#);
    assert_eq!(unbalanced(&html), None);
    for loads in ["http:", "https:", "src=", "href=", "@import", "url("] {
        assert!(!html.contains(loads), "{loads}");
    }
    assert!(!html.contains("NaN") && !html.contains("inf\""), "a number is none");
    assert_eq!(html.matches("<script").count(), 1);
    assert!(html.contains("&lt;/script&gt;&lt;b&gt;&quot;&amp;"));
    assert!(html.contains(r#"{"name":"\u003c/script>"}"#));
    for title in ["Page bytes", "Total time", "Downtime", "Remaining over time", "Held back over time"] {
        assert!(html.contains(&format!("<figcaption>{title} ")), "{title}");
    }
    for arm in &report.arms {
        assert!(html.contains(&format!("<td>{arm}</td>")), "{arm}");
    }
}

/// Only what holds pages back has a line, in its own colour.
#[test]
fn the_held_set_is_drawn_for_those_that_have_one() {
    let mut report = report();
    let lines = |report: &SweepReport| {
        let html = page(report, "{}");
        let figure = html.split("<figcaption>Held back over time ").nth(1)?.split("</figure>").next()?.to_owned();
        Some(figure.matches("class=\"line s").count()).filter(|_| figure.contains("class=\"line s0 st\""))
    };
    assert_eq!(lines(&report), Some(1), "vmferry alone");
    for cell in &mut report.cells {
        cell.arms[0].series.iter_mut().for_each(|sample| sample.held_pages = 0);
    }
    assert_eq!(lines(&report), None);
}

#[test]
fn a_cell_without_runs_or_convergence_is_drawn_too() {
    let mut report = report();
    report.done_runs -= 1;
    for arm in &mut report.cells[0].arms {
        arm.runs.clear();
        arm.series.clear();
        arm.converged_share = None;
        (arm.bytes_ratio, arm.total_ms, arm.downtime_ms) = (None, None, None);
    }
    let html = page(&report, "{}");
    assert_eq!(unbalanced(&html), None);
    assert!(html.contains("not run") && html.contains("The sweep was ended after"));
    assert!(!html.contains("NaN"));
}
