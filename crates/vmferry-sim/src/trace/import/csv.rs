//! Tables of writes as comma-separated values.

use std::io::BufRead;
use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, PAGE_BYTES, PageRun};

use super::{Builder, ImportError, Imported, LineError, Lines, Numbering};
use crate::trace::file::Header;

/// How a table is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsvOptions {
    /// What the trace will be called.
    pub name: String,
    /// The guest's size in pages; if `None`, as many as make room for the highest one that occurs.
    pub guest_pages: Option<u64>,
    /// The length of an epoch. Times are divided by it; epochs given by number are said to be so long.
    pub epoch: Duration,
    /// How pages are numbered.
    pub numbering: Numbering,
}

/// What each column is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Epoch,
    TimeUs,
    Page,
    Address,
    Count,
    Owner,
    Kind,
    Other,
}

/// The columns and their names. Those of trace files are among them, so that a trace exported as CSV can be imported.
const NAMES: [(&str, Role); 9] = [
    ("epoch", Role::Epoch),
    ("time_us", Role::TimeUs),
    ("page", Role::Page),
    ("first_page", Role::Page),
    ("address", Role::Address),
    ("count", Role::Count),
    ("pages", Role::Count),
    ("owner", Role::Owner),
    ("kind", Role::Kind),
];

const EXPECTED: &str = "one of the columns epoch and time_us, one of page (or first_page) and address, and at most one \
                        each of count (or pages), owner and kind";

/// Imports a table with a header. Each line says that pages were written.
///
/// Columns, in any order, others are ignored:
/// - `epoch`, from 0, or `time_us`, microseconds from the beginning of the recording; lines ascend by it;
/// - `page` (or `first_page`), a page's number, or `address`, of any byte in it;
/// - `count` (or `pages`), how many pages from there on, 1 if there is no such column; 0 is allowed and says only that the
///   epoch was there;
/// - `owner`, the number of the address space, 0 if there is no such column;
/// - `kind`: `written`, `accessed` or `zero` as in trace files; `written` if there is no such column.
///
/// Numbers are decimal, or hexadecimal with `0x`. Fields may be quoted; none may contain a comma. Empty lines are skipped.
///
/// # Errors
/// [`ImportError::Line`] with the number of the first line that cannot be understood.
pub fn csv(input: impl BufRead, options: &CsvOptions) -> Result<Imported, ImportError> {
    let guest = options.guest_pages.unwrap_or(1);
    Header { name: options.name.clone(), pages: guest, epoch: options.epoch }.check()?;
    // Checked to be a whole number of them, an hour at most.
    let epoch_us = options.epoch.as_micros() as u64;
    let mut lines = Lines::new(input);
    let mut table = Table { roles: Vec::new(), epoch_us, builder: Builder::new(options.numbering) };
    let (mut rows, mut skipped) = (0, 0);
    while let Some(line) = lines.next()? {
        let result = line.and_then(|line| {
            let line = std::str::from_utf8(line).or(Err(LineError::NotText))?;
            if line.trim().is_empty() {
                skipped += 1;
                Ok(())
            } else if table.roles.is_empty() {
                table.roles = roles(line)?;
                Ok(())
            } else {
                rows += 1;
                table.row(line)
            }
        });
        result.map_err(|source| ImportError::Line { line: lines.number, source })?;
    }
    if rows == 0 {
        return Err(ImportError::Empty { expected: "line below the header" });
    }
    let trace = table.builder.finish(&options.name, options.epoch, options.guest_pages, lines.number)?;
    Ok(Imported { trace, lines: lines.number, skipped_lines: skipped })
}

/// A table that is being read.
#[derive(Debug)]
struct Table {
    roles: Vec<Role>,
    epoch_us: u64,
    builder: Builder,
}

/// A line's fields, without space and quotes around them.
fn fields(line: &str) -> impl Iterator<Item = &str> {
    line.split(',').map(|field| {
        let field = field.trim();
        field.strip_prefix('"').and_then(|field| field.strip_suffix('"')).unwrap_or(field).trim()
    })
}

/// What the columns are for.
fn roles(header: &str) -> Result<Vec<Role>, LineError> {
    // A byte order mark, as some programs write it.
    let header = header.trim_start_matches('\u{feff}');
    let roles: Vec<Role> = fields(header)
        .map(|name| {
            NAMES.iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map_or(Role::Other, |(_, role)| *role)
        })
        .collect();
    let count = |wanted: &[Role]| roles.iter().filter(|role| wanted.contains(role)).count();
    let sound = count(&[Role::Epoch, Role::TimeUs]) == 1
        && count(&[Role::Page, Role::Address]) == 1
        && [Role::Count, Role::Owner, Role::Kind].iter().all(|&role| count(&[role]) <= 1);
    if !sound {
        let found = fields(header).map(str::to_owned).collect();
        return Err(LineError::Header { expected: EXPECTED, found });
    }
    Ok(roles)
}

/// A number in decimal, or in hexadecimal with 0x before it.
fn number(column: &'static str, text: &str) -> Result<u64, LineError> {
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let digits = hexadecimal.unwrap_or(text);
    let radix = if hexadecimal.is_some() { 16 } else { 10 };
    // The standard parser takes a sign, too.
    let number = if digits.starts_with('+') { None } else { u64::from_str_radix(digits, radix).ok() };
    number.ok_or_else(|| LineError::Value {
        column,
        value: text.to_owned(),
        expected: "a whole number, decimal or hexadecimal with 0x",
    })
}

impl Table {
    fn row(&mut self, line: &str) -> Result<(), LineError> {
        let found = fields(line).count();
        if found != self.roles.len() {
            return Err(LineError::Fields { found, expected: self.roles.len() });
        }
        let (mut epoch, mut first, mut count, mut owner, mut kind) = (0, 0, 1, 0, "written");
        for (field, role) in fields(line).zip(&self.roles) {
            match role {
                Role::Epoch => epoch = number("epoch", field)?,
                Role::TimeUs => epoch = number("time_us", field)? / self.epoch_us,
                Role::Page => first = number("page", field)?,
                Role::Address => first = number("address", field)? / PAGE_BYTES,
                Role::Count => count = number("count", field)?,
                Role::Owner => {
                    owner = u32::try_from(number("owner", field)?).or(Err(LineError::Value {
                        column: "owner",
                        value: field.to_owned(),
                        expected: "a number below 2^32",
                    }))?;
                }
                Role::Kind => kind = field,
                Role::Other => {}
            }
        }
        let run = PageRun::new(first, count);
        match kind {
            "written" => {
                self.builder.advance(epoch)?;
                self.builder.write(run, AddressSpaceId(owner))
            }
            "accessed" => {
                self.builder.advance(epoch)?;
                self.builder.access(run)
            }
            "zero" => self.builder.zero(run),
            _ => {
                Err(LineError::Value { column: "kind", value: kind.to_owned(), expected: "written, accessed or zero" })
            }
        }
    }
}
