//! Imports from CSV and from valgrind.

use std::error::Error;
use std::time::Duration;

use proptest::prelude::*;
use vmferry_core::pages::{AddressSpaceId, PageRun};
use vmferry_sim::trace::import::{
    CsvOptions, ImportError, Imported, LackeyOptions, MAX_LINE_BYTES, Numbering, csv, lackey,
};
use vmferry_sim::trace::{Trace, TraceEpoch, WrittenRun};

mod trace_support;
use trace_support::any_trace;

fn options() -> CsvOptions {
    CsvOptions {
        name: "table".to_owned(),
        guest_pages: None,
        epoch: Duration::from_millis(50),
        numbering: Numbering::AsGiven,
    }
}

fn import(table: &str) -> Trace {
    csv(table.as_bytes(), &options()).unwrap().trace
}

/// What is wrong with a table: the error and its causes, one after another.
fn error(table: &str) -> String {
    let error = csv(table.as_bytes(), &options()).expect_err(table);
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

fn written(first: u64, count: u64, owner: u32) -> WrittenRun {
    WrittenRun { run: PageRun::new(first, count), owner: AddressSpaceId(owner) }
}

fn epoch(written: &[WrittenRun]) -> TraceEpoch {
    TraceEpoch { written: written.to_vec(), accessed: None }
}

#[test]
fn pages_by_epoch() {
    let trace = import("epoch,page\n0,7\n0,5\n0,6\n0,5\n2,0\n");
    assert_eq!(trace.name, "table");
    assert_eq!(trace.pages, 8);
    assert_eq!(trace.epoch, Duration::from_millis(50));
    assert_eq!(trace.epochs, [epoch(&[written(5, 3, 0)]), epoch(&[]), epoch(&[written(0, 1, 0)])]);
}

#[test]
fn addresses_by_time_with_all_columns() {
    let table = "\u{feff}Time_us, address ,\"owner\",note,count\r\n\
                 0,0x1000,1,a,2\r\n\
                 49999,0x2fff,2,b,2\r\n\
                 \r\n\
                 50000,8192,3,c,1\r\n";
    let Imported { trace, lines, skipped_lines } = csv(table.as_bytes(), &options()).unwrap();
    assert_eq!((lines, skipped_lines), (5, 1));
    // Page 2 was written by owner 1 first.
    assert_eq!(trace.epochs, [epoch(&[written(1, 2, 1), written(3, 1, 2)]), epoch(&[written(2, 1, 3)])]);
    assert_eq!(trace.pages, 4);
}

#[test]
fn scattered_addresses_can_be_renumbered() {
    let table = "time_us,address\n0,0x7fffdeadb000\n1,0x400000\n60000,0x400fff\n60001,0xffffffffffffffff\n";
    let renumbered = CsvOptions { numbering: Numbering::FirstTouch, guest_pages: Some(10), ..options() };
    let trace = csv(table.as_bytes(), &renumbered).unwrap().trace;
    assert_eq!(trace.epochs, [epoch(&[written(0, 2, 0)]), epoch(&[written(1, 2, 0)])]);
    assert_eq!(trace.pages, 10);
    assert_eq!(
        error(table),
        "line 2: its pages lie above the largest guest's; renumber pages by first touch if these are a process's addresses"
    );
}

#[test]
fn errors_name_the_line() {
    assert_eq!(error(""), "the input has no line below the header");
    assert_eq!(error("epoch,page\n\n"), "the input has no line below the header");
    assert!(error("0,7\n0,8\n").starts_with("line 1: the header must have one of the columns epoch and time_us"));
    assert!(error("epoch,time_us,page\n").ends_with("it has epoch, time_us, page"));
    assert!(error("page,count\n").ends_with("it has page, count"));
    assert!(error("epoch,page,pages,count\n").starts_with("line 1: the header"));
    assert_eq!(error("epoch,page\n0,7\n\n0,7,1\n"), "line 4: it has 3 fields, and the header has 2");
    let number = "expected a whole number, decimal or hexadecimal with 0x";
    assert_eq!(error("epoch,page\n0,7.5\n"), format!("line 2: \"7.5\" in column `page`: {number}"));
    assert_eq!(error("epoch,page\n-1,7\n"), format!("line 2: \"-1\" in column `epoch`: {number}"));
    assert_eq!(error("epoch,page\n0,+7\n"), format!("line 2: \"+7\" in column `page`: {number}"));
    assert_eq!(error("time_us,page\n,7\n"), format!("line 2: \"\" in column `time_us`: {number}"));
    assert_eq!(
        error("epoch,page,owner\n0,7,4294967296\n"),
        "line 2: \"4294967296\" in column `owner`: expected a number below 2^32"
    );
    assert_eq!(
        error("epoch,page,kind\n0,7,read\n"),
        "line 2: \"read\" in column `kind`: expected written, accessed or zero"
    );
    assert_eq!(error("epoch,page\n3,7\n2,7\n"), "line 3: epoch 2 comes after epoch 3; sort the input by time");
    assert!(error("time_us,page\n1753000000000000,7\n").contains("count time from the beginning"));
    assert!(error("epoch,page,count\n0,7,17179869184\n").contains("above the largest guest's"));
    assert!(error("epoch,page,count\n0,7,18446744073709551615\n").contains("above the largest guest's"));
    let long = format!("epoch,page\n0,{}\n", "7".repeat(MAX_LINE_BYTES));
    assert_eq!(error(&long), format!("line 2: it is longer than {MAX_LINE_BYTES} bytes"));
    let small = CsvOptions { guest_pages: Some(7), ..options() };
    assert!(matches!(csv("epoch,page\n0,7\n".as_bytes(), &small), Err(ImportError::Trace(_))));
    let zero = "epoch,page,kind\n0,7,written\n0,7,zero\n";
    assert_eq!(error(zero), "not a valid trace: page 7 was written in epoch 0 and cannot be a zero page");
    let odd = csv(&b"epoch,page\n0,\xff\n"[..], &options()).unwrap_err();
    assert_eq!(odd.source().unwrap().to_string(), "it is not UTF-8");
}

/// A trace as `COPY … TO 'x.csv'` of DuckDB writes the rows of its file.
fn exported(trace: &Trace) -> String {
    let mut table = "epoch,kind,first_page,pages,owner\n".to_owned();
    let mut row = |epoch: usize, kind: &str, run: PageRun, owner: u32| {
        table.push_str(&format!("{epoch},{kind},{},{},{owner}\n", run.first.0, run.count));
    };
    for (number, epoch) in trace.epochs.iter().enumerate() {
        if epoch.written.is_empty() {
            row(number, "written", PageRun::new(0, 0), 0);
        }
        for written in &epoch.written {
            row(number, "written", written.run, written.owner.0);
        }
        if let Some(accessed) = &epoch.accessed {
            row(number, "accessed", PageRun::new(0, 0), 0);
            accessed.iter().for_each(|&run| row(number, "accessed", run, 0));
        }
    }
    trace.zero.iter().for_each(|&run| row(0, "zero", run, 0));
    table
}

/// Joins neighbouring runs of one owner, which says the same.
fn joined(mut trace: Trace) -> Trace {
    for epoch in &mut trace.epochs {
        epoch.written = epoch.written.drain(..).fold(Vec::new(), |mut runs: Vec<WrittenRun>, next| {
            match runs.last_mut() {
                Some(last) if last.owner == next.owner && last.run.end() == next.run.first.0 => {
                    last.run.count += next.run.count;
                }
                _ => runs.push(next),
            }
            runs
        });
    }
    trace.zero = vmferry_sim::trace::union(trace.zero, []);
    trace
}

proptest! {
    #[test]
    fn an_exported_trace_comes_back(trace in any_trace()) {
        let options = CsvOptions {
            name: trace.name.clone(),
            guest_pages: Some(trace.pages),
            epoch: trace.epoch,
            numbering: Numbering::AsGiven,
        };
        let imported = csv(exported(&trace).as_bytes(), &options).unwrap();
        prop_assert_eq!(imported.trace, joined(trace));
    }

    #[test]
    fn no_text_panics(text in "(epoch|time_us|page|address|owner|kind|[0-9a-fx]{1,4}|[,\n\" SLMI]){0,40}") {
        if let Ok(imported) = csv(text.as_bytes(), &options()) {
            imported.trace.check().unwrap();
        }
        if let Ok(imported) = lackey(text.as_bytes(), &lackey_options(10, true)) {
            imported.trace.check().unwrap();
        }
    }
}

fn lackey_options(epoch_instructions: u64, accessed: bool) -> LackeyOptions {
    LackeyOptions {
        name: "three passes".to_owned(),
        guest_pages: None,
        epoch_instructions,
        epoch: Duration::from_millis(1),
        accessed,
    }
}

/// What valgrind 3.19 wrote of a small program: three times it writes six pages one after another and reads another one;
/// then it writes over the end of the first page, and to its stack. Its code is one page.
const THREE_PASSES: &[u8] = include_bytes!("trace_data/three_passes.lackey");

#[test]
fn lackey_writes_by_first_touch() {
    let Imported { trace, lines, skipped_lines } = lackey(THREE_PASSES, &lackey_options(1000, false)).unwrap();
    assert_eq!((lines, skipped_lines), (178, 25));
    assert_eq!(trace.epochs, [epoch(&[written(0, 7, 0)])]);
    assert_eq!(trace.pages, 7);
    assert_eq!(trace.epoch, Duration::from_millis(1));
}

#[test]
fn lackey_epochs_are_counted_in_instructions() {
    // A pass takes 35 instructions; with one before and six after them 112 in all, as valgrind says at its end.
    let trace = lackey(THREE_PASSES, &lackey_options(35, false)).unwrap().trace;
    assert_eq!(trace.epochs.len(), 4);
    assert_eq!(trace.epochs[0], epoch(&[written(0, 6, 0)]));
    assert_eq!(trace.epochs[3], epoch(&[written(0, 2, 0), written(6, 1, 0)]));
    assert_eq!(lackey(THREE_PASSES, &lackey_options(112, false)).unwrap().trace.epochs.len(), 1);
    assert_eq!(lackey(THREE_PASSES, &lackey_options(111, false)).unwrap().trace.epochs.len(), 2);
    let each = lackey(THREE_PASSES, &lackey_options(1, false)).unwrap().trace;
    assert_eq!(each.epochs.len(), 112);
    // 18 stores and 18 modifications, one that spans two pages, and one to the stack.
    assert_eq!(each.page_writes(), 39);
}

#[test]
fn lackey_reads_and_code_are_accesses() {
    let trace = lackey(THREE_PASSES, &lackey_options(1000, true)).unwrap().trace;
    // Code, then the six pages written, the one read, and the stack.
    assert_eq!(trace.pages, 9);
    assert_eq!(trace.epochs[0].written, [written(1, 6, 0), written(8, 1, 0)]);
    assert_eq!(trace.epochs[0].accessed, Some(vec![PageRun::new(0, 9)]));
}

#[test]
fn lackey_without_accesses_is_refused() {
    let own_lines: Vec<u8> = THREE_PASSES.split_inclusive(|&byte| byte == b'\n').take(6).flatten().copied().collect();
    let error = lackey(&own_lines[..], &lackey_options(1000, true)).unwrap_err();
    assert!(error.to_string().contains("--trace-mem=yes"), "{error}");
    assert!(matches!(lackey(THREE_PASSES, &lackey_options(0, true)), Err(ImportError::Option { .. })));
    // Only instructions: a trace in which nothing is written.
    let trace = lackey(&b"I  00401000,5\nI  00401005,7\n"[..], &lackey_options(1, false)).unwrap().trace;
    assert_eq!(trace.epochs, [epoch(&[]), epoch(&[])]);
    // A long line of the program's output is skipped whole.
    let long = format!("{} S 00001000,8\n S 00002000,8\n", "x".repeat(3 * MAX_LINE_BYTES));
    let imported = lackey(long.as_bytes(), &lackey_options(1, false)).unwrap();
    assert_eq!((imported.trace.page_writes(), imported.lines, imported.skipped_lines), (1, 2, 1));
}
