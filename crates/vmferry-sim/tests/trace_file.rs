//! Trace files: what is written is read back, other tools' files are read, and nothing that is in a file can do harm.

use std::io::Cursor;
use std::time::Duration;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use proptest::prelude::*;
use vmferry_core::pages::{AddressSpaceId, PageRun};
use vmferry_sim::random::SplitMix64;
use vmferry_sim::trace::file::{self, Header, ReadError, Reader, Writer};
use vmferry_sim::trace::{Trace, TraceEpoch, TraceError, WrittenRun};

mod trace_support;
use trace_support::any_trace;

fn written(first: u64, count: u64, owner: u32) -> WrittenRun {
    WrittenRun { run: PageRun::new(first, count), owner: AddressSpaceId(owner) }
}

/// A trace with one of everything.
fn sample() -> Trace {
    Trace {
        name: "sample".to_owned(),
        pages: 1 << 20,
        epoch: Duration::from_millis(50),
        zero: vec![PageRun::new(1000, 24), PageRun::new(1 << 19, 1 << 19)],
        epochs: vec![
            TraceEpoch { written: vec![written(0, 3, 1), written(3, 1, 2), written(700, 1, 0)], accessed: None },
            TraceEpoch::default(),
            TraceEpoch {
                written: vec![written(5, 1, u32::MAX)],
                accessed: Some(vec![PageRun::new(4, 10), PageRun::new(900, 1)]),
            },
            TraceEpoch { written: vec![], accessed: Some(vec![]) },
            TraceEpoch::default(),
        ],
    }
}

/// The sample's rows, read from its file and written again by other tools, with the metadata given back to them:
/// DuckDB 2.0, Polars 2.1, and pyarrow 26 with pages of version 2, delta encoding, no compression and short row groups.
/// How that is done stands in `docs/TRACES.md`.
const OTHER_TOOLS: [(&str, &[u8]); 3] = [
    ("DuckDB", include_bytes!("trace_data/duckdb.parquet")),
    ("Polars", include_bytes!("trace_data/polars.parquet")),
    ("pyarrow", include_bytes!("trace_data/pyarrow_v2.parquet")),
];

fn to_bytes(trace: &Trace) -> Vec<u8> {
    file::write(trace, Vec::new()).unwrap()
}

fn from_bytes(bytes: &[u8]) -> Result<Trace, ReadError> {
    file::read(Cursor::new(bytes))
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(trace in any_trace()) {
        trace.check().unwrap();
        prop_assert_eq!(from_bytes(&to_bytes(&trace)).unwrap(), trace);
    }

    /// Damage of any kind gives an error or another trace that keeps the rules; it never panics.
    #[test]
    fn damage_does_no_harm(
        trace in any_trace(),
        other_tool in prop::option::of(prop::sample::select(OTHER_TOOLS.to_vec())),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        moved in prop::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..32_usize)),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = other_tool.map_or_else(|| to_bytes(&trace), |(_, bytes)| bytes.to_vec());
        for (place, value) in flips {
            let place = place.index(bytes.len());
            bytes[place] ^= value;
        }
        if let Some((from, to, length)) = moved {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let length = length.min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + length, to);
        }
        if let Some(cut) = cut {
            let cut = cut.index(bytes.len());
            // The end stays, so that it is not just found to be missing.
            bytes.drain(cut.saturating_sub(8)..cut);
        }
        if let Ok(trace) = file::read_at_most(Cursor::new(&bytes), 1 << 16) {
            trace.check().unwrap();
        }
    }
}

#[test]
fn a_trace_with_one_of_everything_survives() {
    let trace = sample();
    let bytes = to_bytes(&trace);
    assert_eq!(from_bytes(&bytes).unwrap(), trace);
    let mut reader = Reader::new(Cursor::new(&bytes)).unwrap();
    assert_eq!(*reader.header(), Header { name: "sample".to_owned(), pages: 1 << 20, epoch: trace.epoch });
    assert_eq!(reader.epochs(), Some(5));
    let mut epochs = Vec::new();
    while let Some(epoch) = reader.next_epoch().unwrap() {
        epochs.push(epoch);
    }
    assert_eq!(epochs, trace.epochs);
    assert_eq!(reader.into_zero(), trace.zero);
}

/// What `docs/TRACES.md` promises to other tools, seen through a reader that is not ours.
#[test]
fn the_rows_are_those_documented() {
    let reader = SerializedFileReader::new(bytes::Bytes::from(to_bytes(&sample()))).unwrap();
    let rows: Vec<(i32, String, i64, i64, u32)> = reader
        .get_row_iter(None)
        .unwrap()
        .map(|row| {
            let row = row.unwrap();
            let kind = row.get_string(1).unwrap().clone();
            (
                row.get_int(0).unwrap(),
                kind,
                row.get_long(2).unwrap(),
                row.get_long(3).unwrap(),
                row.get_uint(4).unwrap(),
            )
        })
        .collect();
    let row = |epoch, kind: &str, first, pages, owner| (epoch, kind.to_owned(), first, pages, owner);
    assert_eq!(
        rows,
        [
            row(0, "written", 0, 3, 1),
            row(0, "written", 3, 1, 2),
            row(0, "written", 700, 1, 0),
            row(1, "written", 0, 0, 0),
            row(2, "written", 5, 1, u32::MAX),
            row(2, "accessed", 4, 10, 0),
            row(2, "accessed", 900, 1, 0),
            row(3, "written", 0, 0, 0),
            row(3, "accessed", 0, 0, 0),
            row(4, "written", 0, 0, 0),
            row(0, "zero", 1000, 24, 0),
            row(0, "zero", 1 << 19, 1 << 19, 0),
        ]
    );
    let metadata = reader.metadata().file_metadata().key_value_metadata().unwrap();
    let pairs: Vec<(&str, &str)> =
        metadata.iter().map(|pair| (pair.key.as_str(), pair.value.as_deref().unwrap())).collect();
    assert_eq!(
        pairs,
        [
            ("vmferry.version", "1"),
            ("vmferry.name", "sample"),
            ("vmferry.guest_pages", "1048576"),
            ("vmferry.page_bytes", "4096"),
            ("vmferry.epoch_us", "50000"),
            ("vmferry.epochs", "5"),
        ]
    );
}

/// More rows than a row group and a page hold, so that each of them ends in the middle of an epoch.
#[test]
fn a_long_trace_is_written_and_read_in_parts() {
    let header = Header { name: String::new(), pages: 1 << 30, epoch: Duration::from_millis(1) };
    let epoch = |number: u64| {
        let mut random = SplitMix64::new(number);
        let mut any = |run: u64| written(run * 1009 + random.below(1000), 1 + random.below(7), random.below(3) as u32);
        TraceEpoch { written: (0..3000).map(&mut any).collect(), accessed: None }
    };
    let mut writer = Writer::new(Vec::new(), header).unwrap();
    for number in 0..200 {
        writer.push(&epoch(number)).unwrap();
    }
    assert!(writer.bytes_written() > 100_000);
    let bytes = writer.finish(&[]).unwrap();
    let groups = SerializedFileReader::new(bytes::Bytes::from(bytes.clone())).unwrap().num_row_groups();
    assert_eq!(groups, 600_000_usize.div_ceil(1 << 18));
    let mut reader = Reader::new(Cursor::new(&bytes)).unwrap();
    for number in 0..200 {
        assert_eq!(reader.next_epoch().unwrap(), Some(epoch(number)), "epoch {number}");
    }
    assert_eq!(reader.next_epoch().unwrap(), None);
    // 600,000 runs in 200 epochs, which count as two each.
    assert_eq!(file::read_at_most(Cursor::new(&bytes), 600_400).unwrap().epochs.len(), 200);
    let error = file::read_at_most(Cursor::new(&bytes), 600_399).unwrap_err();
    assert!(matches!(error, ReadError::TooManyRuns { max: 600_399 }), "{error:?}");
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = to_bytes(&sample());
    for length in 0..bytes.len() {
        match from_bytes(&bytes[..length]).unwrap_err() {
            ReadError::NotParquet => assert!(length < 4),
            ReadError::Cut => assert!(length >= 4),
            other => panic!("cut to {length}: {other}"),
        }
    }
    assert!(matches!(from_bytes(b"epoch,page\n0,1\n"), Err(ReadError::NotParquet)));
}

#[test]
fn files_of_other_tools_are_read() {
    for (tool, bytes) in OTHER_TOOLS {
        assert_eq!(from_bytes(bytes).unwrap(), sample(), "{tool}");
    }
}

/// Every single byte of small files, set to some telling values.
#[test]
fn each_byte_may_be_anything() {
    let ours = to_bytes(&sample());
    for bytes in OTHER_TOOLS.map(|(_, bytes)| bytes).into_iter().chain([&ours[..]]) {
        for place in 0..bytes.len() {
            for value in [0, 1, 0x0c, 0x15, 0x19, 0x7f, 0x80, 0xfc, 0xff] {
                let mut damaged = bytes.to_vec();
                damaged[place] = value;
                if let Ok(trace) = file::read_at_most(Cursor::new(&damaged), 1 << 16) {
                    trace.check().unwrap();
                }
            }
        }
    }
}

/// Replaces text in a file by text of the same length.
fn patched(bytes: &[u8], old: &str, new: &str) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let places: Vec<usize> = (0..bytes.len()).filter(|&place| bytes[place..].starts_with(old.as_bytes())).collect();
    assert!(!places.is_empty(), "{old} is not in the file");
    let mut bytes = bytes.to_vec();
    for place in places {
        bytes[place..place + new.len()].copy_from_slice(new.as_bytes());
    }
    bytes
}

#[test]
fn other_contents_are_refused_by_name() {
    let bytes = to_bytes(&sample());
    let error = |old: &str, new: &str| from_bytes(&patched(&bytes, old, new)).unwrap_err();
    let message = |old: &str, new: &str| error(old, new).to_string();

    assert!(matches!(error("vmferry.guest_pages", "vmferry.guest_PAGES"), ReadError::Key { found: None, .. }));
    assert!(message("vmferry.guest_pages", "vmferry.guest_PAGES").contains("`vmferry.guest_pages`"));
    assert!(message("1048576", "1.0e+06").contains("\"1.0e+06\""));
    assert!(message("first_page", "first-page").contains("epoch, kind, first-page, pages, owner"));
    assert!(message("written", "erasure").contains("\"erasure\""));
    assert!(message("written", "erasure").contains("written, accessed, zero"));
    let outside = error("1048576", "0000901");
    assert!(matches!(outside, ReadError::Trace(TraceError::OutsideGuest { .. })), "{outside:?}");
    let epoch = error("50000", "00000");
    assert!(matches!(epoch, ReadError::Trace(TraceError::EpochLength { .. })), "{epoch:?}");
    let mut encrypted = bytes.clone();
    let end = encrypted.len();
    encrypted[end - 1] = b'E';
    assert!(from_bytes(&encrypted).unwrap_err().to_string().contains("encryption"));
    // The footer's length.
    encrypted[end - 1] = b'1';
    encrypted[end - 8..end - 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(from_bytes(&encrypted), Err(ReadError::Damaged { place: None, .. })));
}

#[test]
fn a_key_that_other_tools_cannot_keep_may_be_missing() {
    let bytes = patched(&to_bytes(&sample()), "vmferry.epochs", "vmferry.EPOCHS");
    assert_eq!(Reader::new(Cursor::new(&bytes)).unwrap().epochs(), None);
    assert_eq!(from_bytes(&bytes).unwrap(), sample());
}
