//! The footer: what columns a file has, and where their parts lie.

use super::thrift::{Compact, Kind};
use super::{Fault, Result, damaged};

/// The most columns of a file. A trace has five; a table may have gained some.
const MAX_COLUMNS: usize = 256;
/// The most entries of the file's key-value metadata.
const MAX_KEY_VALUES: usize = 1024;

/// How a column's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Physical {
    Int32,
    Int64,
    Bytes,
    /// Anything else; such a column can be there, but not be read.
    Other,
}

/// How a column chunk is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    None,
    Snappy,
    /// Another one, by its number in the format.
    Other(i64),
}

impl Codec {
    fn new(number: i64) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Snappy,
            other => Self::Other(other),
        }
    }
}

/// A column as the schema describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SchemaColumn {
    pub(crate) name: String,
    pub(crate) physical: Physical,
    /// Whether values can be missing.
    pub(super) optional: bool,
    /// Whether an integer is unsigned.
    pub(super) unsigned: bool,
}

/// One column's values of one row group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(super) codec: Codec,
    pub(super) values: u64,
    /// Where it begins in the file, and its size there.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Neighbouring rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowGroup {
    pub(crate) rows: u64,
    /// One for each column of the schema, in its order.
    pub(crate) chunks: Vec<Chunk>,
}

/// What a file says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) columns: Vec<SchemaColumn>,
    pub(crate) groups: Vec<RowGroup>,
    pub(crate) key_values: Vec<(String, String)>,
}

impl Footer {
    /// The value of a key.
    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        self.key_values.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// Reads a footer; `bytes` is all of it.
///
/// Memory is bounded by the size of `bytes`, some ten times it at the most.
pub(crate) fn read_footer(bytes: &[u8]) -> Result<Footer> {
    let mut elements = Vec::new();
    let mut groups = Vec::new();
    let mut key_values = Vec::new();
    Compact::new(bytes).structure(|reader, id, kind| {
        match id {
            2 => reader.list(kind, Kind::Struct, |reader| {
                // One more than the columns: the root.
                if elements.len() > MAX_COLUMNS {
                    return Err(Fault::Unsupported(format!("more than {MAX_COLUMNS} columns")));
                }
                elements.push(element(reader)?);
                Ok(())
            })?,
            4 => reader.list(kind, Kind::Struct, |reader| {
                groups.push(row_group(reader)?);
                Ok(())
            })?,
            5 => reader.list(kind, Kind::Struct, |reader| {
                if key_values.len() == MAX_KEY_VALUES {
                    return Err(Fault::Unsupported(format!("more than {MAX_KEY_VALUES} key-value pairs")));
                }
                key_values.push(key_value(reader)?);
                Ok(())
            })?,
            8 => return Err(Fault::Unsupported("encryption".to_owned())),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let columns = columns(elements)?;
    if groups.iter().any(|group: &RowGroup| group.chunks.len() != columns.len()) {
        return damaged("a row group does not have each column once");
    }
    Ok(Footer { columns, groups, key_values })
}

/// One element of the schema: the root, a group of columns, or a column.
#[derive(Debug, Default)]
struct Element {
    name: String,
    physical: Option<i64>,
    repetition: Option<i64>,
    children: u64,
    unsigned: bool,
}

fn element(reader: &mut Compact<'_>) -> Result<Element> {
    /// The numbers of the older type annotations for unsigned integers of 8 to 64 bits.
    const CONVERTED_UNSIGNED: std::ops::RangeInclusive<i64> = 11..=14;
    let mut element = Element::default();
    reader.structure(|reader, id, kind| {
        match id {
            1 => element.physical = Some(reader.integer(kind)?),
            3 => element.repetition = Some(reader.integer(kind)?),
            4 => element.name = reader.text(kind)?.to_owned(),
            5 => element.children = reader.count(kind)?,
            6 => element.unsigned |= CONVERTED_UNSIGNED.contains(&reader.integer(kind)?),
            10 => reader.inner(kind, |reader, id, kind| {
                if id != 10 {
                    return Ok(false);
                }
                reader.inner(kind, |_, id, kind| {
                    let is_sign = id == 2;
                    if is_sign {
                        element.unsigned |= !Compact::boolean(kind)?;
                    }
                    Ok(is_sign)
                })?;
                Ok(true)
            })?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(element)
}

/// The columns of a flat schema.
fn columns(elements: Vec<Element>) -> Result<Vec<SchemaColumn>> {
    let mut elements = elements.into_iter();
    let Some(root) = elements.next() else { return damaged("it has no schema") };
    if root.children != elements.len() as u64 || elements.as_slice().iter().any(|element| element.children > 0) {
        return Err(Fault::Unsupported("nested columns".to_owned()));
    }
    elements
        .map(|element| {
            let physical = match element.physical {
                Some(1) => Physical::Int32,
                Some(2) => Physical::Int64,
                Some(6) => Physical::Bytes,
                Some(_) => Physical::Other,
                None => return damaged("a column has no type"),
            };
            let optional = match element.repetition {
                Some(0) => false,
                Some(1) => true,
                Some(_) => return Err(Fault::Unsupported("repeated columns".to_owned())),
                None => return damaged("a column does not say whether values can be missing"),
            };
            Ok(SchemaColumn { name: element.name, physical, optional, unsigned: element.unsigned })
        })
        .collect()
}

fn row_group(reader: &mut Compact<'_>) -> Result<RowGroup> {
    let mut group = RowGroup { rows: 0, chunks: Vec::new() };
    reader.structure(|reader, id, kind| {
        match id {
            1 => reader.list(kind, Kind::Struct, |reader| {
                group.chunks.push(chunk(reader)?);
                Ok(())
            })?,
            3 => group.rows = reader.count(kind)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(group)
}

fn chunk(reader: &mut Compact<'_>) -> Result<Chunk> {
    let (mut codec, mut values, mut bytes, mut data, mut dictionary) = (None, None, None, None, None);
    reader.structure(|reader, id, kind| {
        match id {
            1 => return Err(Fault::Unsupported("columns in another file".to_owned())),
            3 => reader.inner(kind, |reader, id, kind| {
                match id {
                    4 => codec = Some(Codec::new(reader.integer(kind)?)),
                    5 => values = Some(reader.count(kind)?),
                    7 => bytes = Some(reader.count(kind)?),
                    9 => data = Some(reader.count(kind)?),
                    11 => dictionary = Some(reader.count(kind)?),
                    _ => return Ok(false),
                }
                Ok(true)
            })?,
            8 | 9 => return Err(Fault::Unsupported("encryption".to_owned())),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let (Some(codec), Some(values), Some(bytes), Some(data)) = (codec, values, bytes, data) else {
        return damaged("a column does not say where its values are");
    };
    // Some writers give 0 for "no dictionary".
    let offset = dictionary.filter(|&dictionary| dictionary > 0).map_or(data, |dictionary| dictionary.min(data));
    Ok(Chunk { codec, values, offset, bytes })
}

fn key_value(reader: &mut Compact<'_>) -> Result<(String, String)> {
    let (mut key, mut value) = (String::new(), String::new());
    reader.structure(|reader, id, kind| {
        match id {
            1 => reader.text(kind)?.clone_into(&mut key),
            2 => reader.text(kind)?.clone_into(&mut value),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer with a schema of these elements and nothing else.
    fn with_schema(elements: &[&[u8]]) -> Vec<u8> {
        let mut bytes = vec![0x29, 0xfc];
        let mut count = elements.len();
        while count >= 0x80 {
            bytes.push(count as u8 | 0x80);
            count >>= 7;
        }
        bytes.push(count as u8);
        bytes.extend(elements.concat());
        bytes.push(0);
        bytes
    }

    /// A group of as many children as there can be, by the number given.
    const GROUP: [u8; 7] = [0x55, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0];
    /// A group of one.
    const NEST: [u8; 3] = [0x55, 2, 0];
    /// A required column of 32-bit integers without a name.
    const COLUMN: [u8; 5] = [0x15, 2, 0x25, 0, 0];

    #[test]
    fn a_flat_schema_is_read() {
        let footer = read_footer(&with_schema(&[&[0x55, 4, 0], &COLUMN, &COLUMN])).unwrap();
        assert_eq!(footer.columns.len(), 2);
        assert_eq!(footer.columns[0].physical, Physical::Int32);
    }

    #[test]
    fn a_schema_that_is_nested_or_claims_more_than_it_has_is_refused() {
        let nested = Err(Fault::Unsupported("nested columns".to_owned()));
        assert_eq!(read_footer(&with_schema(&[&GROUP, &COLUMN])), nested);
        assert_eq!(read_footer(&with_schema(&[&NEST, &NEST, &COLUMN])), nested);
        let deep: Vec<&[u8]> = (0..100_000).map(|_| &NEST[..]).collect();
        assert_eq!(read_footer(&with_schema(&deep)), Err(Fault::Unsupported("more than 256 columns".to_owned())));
        assert_eq!(read_footer(&with_schema(&[])), damaged("it has no schema"));
        assert_eq!(read_footer(&[0]), damaged("it has no schema"));
        assert_eq!(read_footer(&[]), damaged("its metadata ends early"));
    }
}
