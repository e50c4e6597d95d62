//! One column's values of one row group: its pages, one after another.

use super::encoding::{Delta, Hybrid};
use super::footer::{Chunk, Codec, Physical, SchemaColumn};
use super::thrift::{Compact, Kind};
use super::{Fault, Result, damaged};

/// The largest page, as stored and as decompressed. Writers aim at 1 MiB.
const MAX_PAGE_BYTES: u64 = 64 << 20;
/// The most characters of an unknown word that are shown.
const SHOWN_CHARACTERS: usize = 40;

/// The encodings' numbers in the format.
const PLAIN: i64 = 0;
const PLAIN_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const DELTA_BINARY_PACKED: i64 = 5;
const RLE_DICTIONARY: i64 = 8;

/// A column's values of one row group, read in order. Integers are handed out as they are, words as their position in
/// the list of words allowed.
#[derive(Debug)]
pub(crate) struct Column {
    physical: Physical,
    optional: bool,
    unsigned: bool,
    codec: Codec,
    words: &'static [&'static str],
    /// The chunk as stored, and how much of it was read.
    bytes: Vec<u8>,
    at: usize,
    /// Values that the chunk still has, those of the page at hand left out.
    values_left: u64,
    dictionary: Option<Vec<i64>>,
    page: Page,
}

/// The values of the page at hand.
#[derive(Debug)]
struct Page {
    /// Decompressed.
    bytes: Vec<u8>,
    at: usize,
    values_left: u64,
    encoding: Encoding,
}

#[derive(Debug)]
enum Encoding {
    Plain,
    Dictionary(Hybrid),
    Delta(Delta),
}

/// What a page's header says.
#[derive(Debug, Default)]
struct Header {
    kind: i64,
    stored_bytes: u64,
    bytes: u64,
    data: Option<DataHeader>,
    dictionary_values: Option<(u64, i64)>,
}

#[derive(Debug)]
struct DataHeader {
    values: u64,
    encoding: i64,
    levels: Levels,
}

/// Where the levels are that say which values are missing.
#[derive(Debug)]
enum Levels {
    /// Before the values, compressed with them, with their length before them.
    Inside { encoding: i64 },
    /// Before the values and not compressed; both kinds with their lengths in the header.
    Before { repetition_bytes: u64, definition_bytes: u64, values_compressed: bool },
}

impl Column {
    /// Reads a column of `chunk`, whose stored bytes are `bytes`. For a column of text, `words` are the values allowed.
    ///
    /// # Errors
    /// [`Fault::Unsupported`] if it is compressed by something that is not supported, or holds neither integers nor
    /// text.
    pub(crate) fn new(
        schema: &SchemaColumn,
        chunk: &Chunk,
        words: &'static [&'static str],
        bytes: Vec<u8>,
    ) -> Result<Self> {
        if let Codec::Other(number) = chunk.codec {
            let name = match number {
                2 => "gzip",
                4 => "brotli",
                5 | 7 => "lz4",
                6 => "zstd",
                _ => "unknown",
            };
            return Err(Fault::Unsupported(format!("{name} compression; write the file with snappy or none")));
        }
        Ok(Self {
            physical: schema.physical,
            optional: schema.optional,
            unsigned: schema.unsigned,
            codec: chunk.codec,
            words,
            bytes,
            at: 0,
            values_left: chunk.values,
            dictionary: None,
            page: Page { bytes: Vec::new(), at: 0, values_left: 0, encoding: Encoding::Plain },
        })
    }

    /// Appends the next `count` values.
    pub(crate) fn read(&mut self, mut count: u64, values: &mut Vec<i64>) -> Result<()> {
        while count > 0 {
            if self.page.values_left == 0 {
                self.next_page()?;
                continue;
            }
            let now = count.min(self.page.values_left);
            let from = values.len();
            self.decode(now, values)?;
            self.page.values_left -= now;
            count -= now;
            if self.physical == Physical::Int32 && self.unsigned {
                for value in &mut values[from..] {
                    *value = i64::from(*value as u32);
                }
            }
        }
        Ok(())
    }

    /// Appends `count` values of the page at hand.
    fn decode(&mut self, count: u64, values: &mut Vec<i64>) -> Result<()> {
        let Page { bytes, at, encoding, .. } = &mut self.page;
        match encoding {
            Encoding::Plain => {
                for _ in 0..count {
                    values.push(plain(self.physical, self.words, bytes, at)?);
                }
            }
            Encoding::Dictionary(indices) => {
                let Some(dictionary) = &self.dictionary else { return damaged("a page lacks its dictionary") };
                indices.read(bytes, at, count, |index| {
                    let value = usize::try_from(index).ok().and_then(|index| dictionary.get(index));
                    values.push(*value.ok_or(Fault::Damaged("a page has a value that its dictionary lacks"))?);
                    Ok(())
                })?;
            }
            Encoding::Delta(delta) => {
                for _ in 0..count {
                    let value = delta.next(bytes, at)?;
                    // Differences of 32-bit values wrap around at 32 bits.
                    values.push(if self.physical == Physical::Int32 { i64::from(value as i32) } else { value });
                }
            }
        }
        Ok(())
    }

    /// Goes to the next page; a dictionary is taken in. Each call reads at least a byte of the chunk.
    fn next_page(&mut self) -> Result<()> {
        if self.at == self.bytes.len() || self.values_left == 0 {
            return damaged("a column has fewer values than its row group has rows");
        }
        let mut reader = Compact::new(&self.bytes[self.at..]);
        let header = page_header(&mut reader)?;
        let start = self.at + reader.position();
        if header.stored_bytes > MAX_PAGE_BYTES || header.bytes > MAX_PAGE_BYTES {
            return Err(Fault::Unsupported(format!("a page of more than {} MiB", MAX_PAGE_BYTES >> 20)));
        }
        let end = start + header.stored_bytes as usize;
        if end > self.bytes.len() {
            return damaged("a page is longer than its column");
        }
        self.at = end;
        let stored = &self.bytes[start..end];
        /// The kinds' numbers in the format.
        const DATA: i64 = 0;
        const DICTIONARY: i64 = 2;
        const DATA_V2: i64 = 3;
        match (header.kind, header.dictionary_values, header.data) {
            (DICTIONARY, Some((values, encoding)), _) => {
                if self.dictionary.is_some() || !matches!(encoding, PLAIN | PLAIN_DICTIONARY) {
                    return damaged("a column has two dictionaries, or one of an unknown kind");
                }
                let bytes = decompress(self.codec, stored, header.bytes)?;
                self.dictionary = Some(dictionary(self.physical, self.words, &bytes, values)?);
                Ok(())
            }
            (DATA | DATA_V2, _, Some(data)) => {
                self.values_left = self
                    .values_left
                    .checked_sub(data.values)
                    .ok_or(Fault::Damaged("a column has more values than it says"))?;
                self.page = data_page(self.codec, self.optional, stored, header.bytes, &data)?;
                Ok(())
            }
            (DATA | DICTIONARY | DATA_V2, ..) => damaged("a page's header is incomplete"),
            // An index, which nobody writes there; and what the format may add.
            _ => Ok(()),
        }
    }
}

/// Takes a data page apart: levels, then values.
fn data_page(codec: Codec, optional: bool, stored: &[u8], size: u64, header: &DataHeader) -> Result<Page> {
    const LEVELS: Fault = Fault::Damaged("a page's levels are longer than the page");
    let (bytes, mut at) = match header.levels {
        Levels::Inside { encoding } => {
            let bytes = decompress(codec, stored, size)?;
            let mut at = 0;
            if optional {
                if encoding != RLE {
                    return Err(Fault::Unsupported(format!("levels of encoding {encoding}")));
                }
                let length = bytes.first_chunk().ok_or(LEVELS)?;
                let end = 4 + u64::from(u32::from_le_bytes(*length));
                let levels = usize::try_from(end).ok().and_then(|end| bytes.get(4..end)).ok_or(LEVELS)?;
                none_missing(levels, header.values)?;
                at = 4 + levels.len();
            }
            (bytes, at)
        }
        Levels::Before { repetition_bytes, definition_bytes, values_compressed } => {
            if repetition_bytes > 0 {
                return Err(Fault::Unsupported("repeated columns".to_owned()));
            }
            if definition_bytes > stored.len() as u64 || definition_bytes > size {
                return Err(LEVELS);
            }
            let (levels, values) = stored.split_at(definition_bytes as usize);
            if optional {
                none_missing(levels, header.values)?;
            }
            let codec = if values_compressed { codec } else { Codec::None };
            (decompress(codec, values, size - definition_bytes)?, 0)
        }
    };
    let encoding = match header.encoding {
        PLAIN => Encoding::Plain,
        PLAIN_DICTIONARY | RLE_DICTIONARY => {
            let width = *bytes.get(at).ok_or(Fault::Damaged("a page ends early"))?;
            at += 1;
            Encoding::Dictionary(Hybrid::new(width)?)
        }
        DELTA_BINARY_PACKED => Encoding::Delta(Delta::new(&bytes, &mut at)?),
        other => {
            let name = match other {
                4 => "BIT_PACKED",
                6 => "DELTA_LENGTH_BYTE_ARRAY",
                7 => "DELTA_BYTE_ARRAY",
                9 => "BYTE_STREAM_SPLIT",
                _ => "of no known name",
            };
            let what = format!("encoding {other} ({name}); write version 1 of Parquet, as most tools do by default");
            return Err(Fault::Unsupported(what));
        }
    };
    Ok(Page { bytes, at, values_left: header.values, encoding })
}

/// Checks that all values are there: all levels are 1.
fn none_missing(levels: &[u8], values: u64) -> Result<()> {
    Hybrid::new(1)?.read(levels, &mut 0, values, |level| {
        if level == 1 { Ok(()) } else { Err(Fault::Unsupported("missing values (NULL)".to_owned())) }
    })
}

/// One value as it is.
fn plain(physical: Physical, words: &[&str], bytes: &[u8], at: &mut usize) -> Result<i64> {
    let rest = bytes.get(*at..).unwrap_or_default();
    let short = Fault::Damaged("a page has fewer values than it says");
    match physical {
        Physical::Int32 => {
            let value = rest.first_chunk().ok_or(short)?;
            *at += 4;
            Ok(i64::from(i32::from_le_bytes(*value)))
        }
        Physical::Int64 => {
            let value = rest.first_chunk().ok_or(short)?;
            *at += 8;
            Ok(i64::from_le_bytes(*value))
        }
        Physical::Bytes => {
            let length = u32::from_le_bytes(*rest.first_chunk().ok_or(short.clone())?) as usize;
            let word = rest[4..].get(..length).ok_or(short)?;
            *at += 4 + length;
            match words.iter().position(|known| known.as_bytes() == word) {
                Some(position) => Ok(position as i64),
                None => {
                    let shown: String = String::from_utf8_lossy(word).chars().take(SHOWN_CHARACTERS).collect();
                    Err(Fault::Unsupported(format!("the value {shown:?}; known are {}", words.join(", "))))
                }
            }
        }
        Physical::Other => damaged("a column is of no type that holds integers or text"),
    }
}

/// The values of a dictionary page.
fn dictionary(physical: Physical, words: &[&str], bytes: &[u8], values: u64) -> Result<Vec<i64>> {
    // No value takes less than four bytes, so the list is at most twice as large as the page.
    let capacity = usize::try_from(values).ok().filter(|&values| values <= bytes.len() / 4);
    let mut dictionary = Vec::with_capacity(capacity.ok_or(Fault::Damaged("a dictionary is cut"))?);
    let mut at = 0;
    for _ in 0..values {
        dictionary.push(plain(physical, words, bytes, &mut at)?);
    }
    Ok(dictionary)
}

/// The bytes of a page; `size` is what its header says they are.
fn decompress(codec: Codec, stored: &[u8], size: u64) -> Result<Vec<u8>> {
    const SIZE: Fault = Fault::Damaged("a page is not as long as its header says");
    let size = usize::try_from(size).or(Err(SIZE))?;
    match codec {
        Codec::None if stored.len() == size => Ok(stored.to_vec()),
        Codec::None => Err(SIZE),
        // A page of no bytes may be stored as no bytes.
        Codec::Snappy if size == 0 && stored.is_empty() => Ok(Vec::new()),
        Codec::Snappy => {
            if snap::raw::decompress_len(stored).ok() != Some(size) {
                return Err(SIZE);
            }
            let mut bytes = vec![0; size];
            let written = snap::raw::Decoder::new().decompress(stored, &mut bytes);
            if written == Ok(size) { Ok(bytes) } else { damaged("a page cannot be decompressed") }
        }
        Codec::Other(number) => Err(Fault::Unsupported(format!("compression {number}"))),
    }
}

fn page_header(reader: &mut Compact<'_>) -> Result<Header> {
    let (mut kind, mut bytes, mut stored_bytes) = (None, None, None);
    let mut header = Header::default();
    reader.structure(|reader, id, field| {
        match id {
            1 => kind = Some(reader.integer(field)?),
            2 => bytes = Some(reader.count(field)?),
            3 => stored_bytes = Some(reader.count(field)?),
            5 => header.data = Some(data_header(reader, field)?),
            7 => header.dictionary_values = Some(dictionary_header(reader, field)?),
            8 => header.data = Some(data_header_v2(reader, field)?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let (Some(kind), Some(bytes), Some(stored_bytes)) = (kind, bytes, stored_bytes) else {
        return damaged("a page's header is incomplete");
    };
    Ok(Header { kind, bytes, stored_bytes, ..header })
}

fn data_header(reader: &mut Compact<'_>, field: Kind) -> Result<DataHeader> {
    let (mut values, mut encoding, mut levels) = (0, -1, RLE);
    reader.inner(field, |reader, id, field| {
        match id {
            1 => values = reader.count(field)?,
            2 => encoding = reader.integer(field)?,
            3 => levels = reader.integer(field)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(DataHeader { values, encoding, levels: Levels::Inside { encoding: levels } })
}

fn data_header_v2(reader: &mut Compact<'_>, field: Kind) -> Result<DataHeader> {
    let (mut values, mut encoding) = (0, -1);
    let (mut definition_bytes, mut repetition_bytes, mut values_compressed) = (0, 0, true);
    reader.inner(field, |reader, id, field| {
        match id {
            1 => values = reader.count(field)?,
            4 => encoding = reader.integer(field)?,
            5 => definition_bytes = reader.count(field)?,
            6 => repetition_bytes = reader.count(field)?,
            7 => values_compressed = Compact::boolean(field)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let levels = Levels::Before { repetition_bytes, definition_bytes, values_compressed };
    Ok(DataHeader { values, encoding, levels })
}

fn dictionary_header(reader: &mut Compact<'_>, field: Kind) -> Result<(u64, i64)> {
    let (mut values, mut encoding) = (0, -1);
    reader.inner(field, |reader, id, field| {
        match id {
            1 => values = reader.count(field)?,
            2 => encoding = reader.integer(field)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok((values, encoding))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number as Thrift sends it.
    fn varint(bytes: &mut Vec<u8>, mut number: u64) {
        while number >= 0x80 {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
    }

    /// A structure whose fields 1, 2, 3 … are these numbers; then come `rest` and the end.
    fn structure(numbers: &[i64], rest: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &number in numbers {
            bytes.push(0x16);
            varint(&mut bytes, (number << 1 ^ number >> 63) as u64);
        }
        bytes.extend_from_slice(rest);
        bytes.push(0);
        bytes
    }

    /// A page: its header, with the part for its kind in field `field`, and its bytes.
    fn page(kind: i64, size: i64, stored_size: i64, field: u8, part: &[i64], body: &[u8]) -> Vec<u8> {
        let mut rest = vec![(field - 3) << 4 | 0x0c];
        rest.extend(structure(part, &[]));
        let mut bytes = structure(&[kind, size, stored_size], &rest);
        bytes.extend_from_slice(body);
        bytes
    }

    fn data(size: i64, values: i64, encoding: i64, body: &[u8]) -> Vec<u8> {
        page(0, size, body.len() as i64, 5, &[values, encoding, RLE, RLE], body)
    }

    fn dictionary_page(values: i64, body: &[u8]) -> Vec<u8> {
        page(2, body.len() as i64, body.len() as i64, 7, &[values, PLAIN], body)
    }

    fn read(physical: Physical, codec: Codec, values: u64, pages: &[Vec<u8>]) -> Result<Vec<i64>> {
        let schema = SchemaColumn { name: "n".to_owned(), physical, optional: false, unsigned: false };
        let bytes = pages.concat();
        let chunk = Chunk { codec, values, offset: 0, bytes: bytes.len() as u64 };
        let mut read = Vec::new();
        Column::new(&schema, &chunk, &["aye", "no"], bytes)?.read(values, &mut read)?;
        Ok(read)
    }

    const INT: Physical = Physical::Int32;

    #[test]
    fn pages_of_all_encodings_follow_one_another() {
        let dictionary = dictionary_page(2, &[7, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff]);
        let indices = data(3, 4, RLE_DICTIONARY, &[1, 0x03, 0b0110]);
        let plain = data(4, 1, PLAIN, &[1, 1, 0, 0]);
        // 128 values in a block of four parts, 3 in all, the first 5, then the least difference 1 and parts of no bits.
        let delta = data(12, 3, DELTA_BINARY_PACKED, &[0x80, 0x01, 4, 3, 10, 2, 0, 0, 0, 0, 0, 0]);
        let pages = [dictionary, indices, plain, delta];
        assert_eq!(read(INT, Codec::None, 8, &pages), Ok(vec![7, -2, -2, 7, 257, 5, 6, 7]));
        assert_eq!(read(INT, Codec::None, 9, &pages), damaged("a column has fewer values than its row group has rows"));
        assert_eq!(read(INT, Codec::None, 7, &pages), damaged("a column has more values than it says"));
    }

    #[test]
    fn words_are_known_or_refused() {
        let words = |bytes: &[u8]| read(Physical::Bytes, Codec::None, 2, &[data(bytes.len() as i64, 2, PLAIN, bytes)]);
        assert_eq!(words(b"\x02\0\0\0no\x03\0\0\0aye"), Ok(vec![1, 0]));
        let unknown = words(b"\x02\0\0\0no\x03\0\0\0\xffye").unwrap_err();
        assert_eq!(unknown, Fault::Unsupported("the value \"\u{fffd}ye\"; known are aye, no".to_owned()));
        assert_eq!(words(b"\x02\0\0\0no\xff\xff\xff\xffaye"), damaged("a page has fewer values than it says"));
    }

    #[test]
    fn what_a_page_claims_is_compared_with_what_is_there() {
        let four = [1, 0, 0, 0];
        let refused = |pages: &[Vec<u8>], why| assert_eq!(read(INT, Codec::None, 1, pages), damaged(why), "{why}");
        refused(&[page(0, 4, 1 << 25, 5, &[1, PLAIN], &four)], "a page is longer than its column");
        refused(&[data(5, 1, PLAIN, &four)], "a page is not as long as its header says");
        refused(&[data(4, 1, RLE_DICTIONARY, &four)], "a page lacks its dictionary");
        refused(&[dictionary_page(i64::from(i32::MAX), &four)], "a dictionary is cut");
        refused(&[dictionary_page(-1, &four)], "its metadata has a negative size");
        refused(
            &[dictionary_page(1, &four), dictionary_page(1, &four)],
            "a column has two dictionaries, or one of an unknown kind",
        );
        let two_indices = [dictionary_page(1, &four), data(3, 1, RLE_DICTIONARY, &[1, 0x02, 1])];
        refused(&two_indices, "a page has a value that its dictionary lacks");
        refused(&[page(3, 4, 4, 7, &[1, PLAIN], &four)], "a page's header is incomplete");
        // Pages of an unknown kind are passed over.
        refused(&[page(1, 4, 4, 6, &[], &four)], "a column has fewer values than its row group has rows");
        let huge = read(INT, Codec::None, 1, &[page(0, 1 << 27, 4, 5, &[1, PLAIN], &four)]).unwrap_err();
        assert_eq!(huge, Fault::Unsupported("a page of more than 64 MiB".to_owned()));
    }

    #[test]
    fn snappy_must_fill_the_page_exactly() {
        let values = [3, 0, 0, 0];
        let packed = snap::raw::Encoder::new().compress_vec(&values).unwrap();
        let snappy = |size, body: &[u8]| read(INT, Codec::Snappy, 1, &[data(size, 1, PLAIN, body)]);
        assert_eq!(snappy(4, &packed), Ok(vec![3]));
        assert_eq!(snappy(5, &packed), damaged("a page is not as long as its header says"));
        // Claims 32 MiB, and has four bytes.
        let mut claims = Vec::new();
        varint(&mut claims, 1 << 25);
        claims.extend_from_slice(&packed[1..]);
        assert_eq!(snappy(1 << 25, &claims), damaged("a page cannot be decompressed"));
        assert_eq!(snappy(4, &[]), damaged("a page is not as long as its header says"));
        assert_eq!(
            read(INT, Codec::Other(6), 1, &[]),
            Err(Fault::Unsupported("zstd compression; write the file with snappy or none".to_owned()))
        );
    }

    #[test]
    fn missing_values_are_refused() {
        let schema = SchemaColumn { name: "n".to_owned(), physical: INT, optional: true, unsigned: false };
        let optional = |body: &[u8]| {
            let bytes = data(body.len() as i64, 2, PLAIN, body);
            let chunk = Chunk { codec: Codec::None, values: 2, offset: 0, bytes: bytes.len() as u64 };
            let mut values = Vec::new();
            Column::new(&schema, &chunk, &[], bytes)?.read(2, &mut values)?;
            Ok(values)
        };
        // The levels' length; two times 1, or 1 and 0; then the values.
        assert_eq!(optional(&[2, 0, 0, 0, 4, 1, 8, 0, 0, 0, 9, 0, 0, 0]), Ok(vec![8, 9]));
        let missing = Err(Fault::Unsupported("missing values (NULL)".to_owned()));
        assert_eq!(optional(&[2, 0, 0, 0, 3, 1, 8, 0, 0, 0]), missing);
        assert_eq!(optional(&[0xff, 0xff, 0xff, 0xff, 4, 1]), damaged("a page's levels are longer than the page"));
    }
}
