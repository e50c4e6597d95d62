//! Reading Parquet files that nobody vouches for: columns of integers and of one of a few words.
//!
//! Why not the crate that writes them: its reader trusts the footer. It reserves memory for as many columns as a file
//! claims, goes as deep as its schema is nested, and asserts where pages are out of order, so that a damaged file can end
//! the process. Here a length is compared with the bytes that are there before anything is done with it, nothing
//! recurses deeper than [`thrift::MAX_DEPTH`], and each allocation has a maximum. What can be read is what DuckDB,
//! Polars, pandas and our own writer produce for a flat table of integers and text; the rest is refused by name.
//!
//! Sources: the Apache Parquet format specification (`parquet.thrift`, Encodings.md) and the Thrift compact protocol.

mod column;
mod encoding;
mod footer;
mod thrift;

pub(super) use column::Column;
pub(super) use footer::{Footer, Physical, RowGroup, SchemaColumn, read_footer};

/// What is wrong with a file, without the place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// It contradicts itself or ends early.
    Damaged(&'static str),
    /// It is sound, as far as can be seen, and uses what is not supported here.
    Unsupported(String),
}

type Result<T> = std::result::Result<T, Fault>;

/// Shorthand for a damaged file.
fn damaged<T>(what: &'static str) -> Result<T> {
    Err(Fault::Damaged(what))
}
