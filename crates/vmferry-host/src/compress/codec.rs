//! The encodings themselves: bytes of pages to fewer bytes, and back.
//!
//! Decoding trusts nothing: the length of the result is known beforehand from the number of pages, and anything else, or
//! input that is malformed, is an error. Nothing is allocated by a number that the peer sent.

use std::io;

use lz4_flex::block::{
    CompressTable, DecompressError, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use vmferry_core::pages::PAGE_BYTES;
use vmferry_core::wire::{DeltaCodec, Encoding, MAX_PAGES_PER_FRAME, page_digest};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{compress_bound, find_frame_compressed_size};

use super::delta::{BadChanges, apply_changes};
use super::twins::copy_digest;
use crate::buffer::Buffer;
use crate::memory::MemoryError;

/// From so many bytes on, LZ4 needs the larger of its two tables.
const LZ4_LARGE_BYTES: usize = u16::MAX as usize;
/// Fewer bytes of changes are not worth a codec,
const CODEC_CHANGES_BYTES: usize = 1024;
/// and neither is one that saves less than this part of them.
const CHANGES_SAVING_PARTS: usize = 8;
/// What is looked at of a stretch of pages to see whether it can be made smaller: so many pieces of so many bytes.
const SAMPLE_PIECES: usize = 8;
const SAMPLE_PIECE_BYTES: usize = 256;
/// Longer stretches are looked at in parts of this size.
const LOOKED_AT_BYTES: usize = 64 * PAGE_BYTES as usize;
/// Shorter stretches are not worth a look, nor a codec that takes its time to begin.
const SAMPLED_PAGES: usize = 4;
/// A sample is compressible if LZ4 leaves at most this share of it,
const SAMPLE_LZ4_SHARE: f64 = 0.95;
/// or if its bytes have at most so many bits of entropy each. Random bytes show 7.9 in a sample of this size.
const SAMPLE_ENTROPY_BITS: f64 = 7.4;
/// What LZ4 leaves of a sample can still be made smaller, by a codec that uses how frequent bytes are, if they have at most so
/// many bits of entropy each.
const LEFT_ENTROPY_BITS: f64 = 7.4;

/// Why the data of a `pages` message are not pages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagesError {
    /// Not an LZ4 block of that many pages.
    #[error("the peer's pages are no LZ4 block of their length")]
    Lz4(#[source] DecompressError),
    /// Not a Zstandard frame of that many pages.
    #[error("the peer's pages are no Zstandard frame of their length")]
    Zstd(#[source] io::Error),
    /// More or less than one Zstandard frame.
    #[error("the peer's pages are not one Zstandard frame")]
    NotOneFrame,
    /// Not as long as the pages are.
    #[error("the peer's pages decode to {found} bytes instead of {expected}")]
    Length {
        /// What came out.
        found: usize,
        /// What the pages take.
        expected: usize,
    },
    /// Not the changes of that many pages.
    #[error("the peer's delta is malformed")]
    Changes,
    /// A delta for content that is not there.
    #[error("the peer's delta does not fit the pages that are here")]
    OtherBase,
    /// The pages to be copied are not what they were at the source.
    #[error("the peer's copies are not of the pages that are here")]
    OtherSource,
    /// The pages that a delta is for, or copies are of, could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What pages are tried with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    /// Nothing: as they are.
    Raw,
    Lz4,
    Zstd1,
    Zstd3,
    Zstd6,
}

impl Codec {
    /// All that encode, from the fastest to the one that leaves least.
    pub(crate) const ENCODING: [Self; 4] = [Self::Lz4, Self::Zstd1, Self::Zstd3, Self::Zstd6];

    /// How its pages are written.
    pub(crate) fn encoding(self) -> Encoding {
        match self {
            Codec::Raw => Encoding::Raw,
            Codec::Lz4 => Encoding::Lz4,
            Codec::Zstd1 | Codec::Zstd3 | Codec::Zstd6 => Encoding::Zstd,
        }
    }
}

/// What can be made of content, judged by some of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outlook {
    /// Nothing: it is to go as it is.
    Incompressible,
    /// What repeats can be left out, and no more: LZ4 leaves as little as others, in less time.
    Repeats,
    /// Some bytes are more frequent than others, too. LZ4 makes no use of that.
    Uneven,
}

/// Encodes pages; one for each thread. It keeps what it works with.
pub(crate) struct PageEncoder {
    lz4_small: CompressTable,
    lz4_large: CompressTable,
    zstd: Option<Compressor<'static>>,
    sample: Vec<u8>,
    sample_out: Vec<u8>,
}

impl PageEncoder {
    pub(crate) fn new() -> Self {
        Self {
            lz4_small: CompressTable::small(),
            lz4_large: CompressTable::large(),
            zstd: None,
            sample: Vec::with_capacity(SAMPLE_PIECES * SAMPLE_PIECE_BYTES),
            sample_out: vec![0; get_maximum_output_size(SAMPLE_PIECES * SAMPLE_PIECE_BYTES)],
        }
    }

    /// Appends the content as `codec` makes it to `out`, and returns how many bytes that are; `None` where nothing was
    /// appended, because it is to go as it is.
    pub(crate) fn encode(&mut self, codec: Codec, content: &[u8], out: &mut Buffer) -> Option<usize> {
        match codec {
            Codec::Raw => None,
            Codec::Lz4 => self.lz4(content, out),
            Codec::Zstd1 => self.zstd(1, content, out),
            Codec::Zstd3 => self.zstd(3, content, out),
            Codec::Zstd6 => self.zstd(6, content, out),
        }
    }

    /// Appends changes of pages, by the codec if it makes them fewer bytes; and how they were encoded.
    pub(crate) fn encode_changes(&mut self, codec: Codec, changes: &[u8], out: &mut Buffer) -> DeltaCodec {
        let encoding = match codec {
            Codec::Raw => DeltaCodec::Plain,
            Codec::Lz4 => DeltaCodec::Lz4,
            Codec::Zstd1 | Codec::Zstd3 | Codec::Zstd6 => DeltaCodec::Zstd,
        };
        if changes.len() >= CODEC_CHANGES_BYTES {
            let start = out.len();
            match self.encode(codec, changes, out) {
                Some(bytes) if bytes <= changes.len() - changes.len() / CHANGES_SAVING_PARTS => return encoding,
                _ => out.truncate(start),
            }
        }
        out.append(changes);
        DeltaCodec::Plain
    }

    fn lz4(&mut self, content: &[u8], out: &mut Buffer) -> Option<usize> {
        let table = if content.len() < LZ4_LARGE_BYTES { &mut self.lz4_small } else { &mut self.lz4_large };
        append(out, get_maximum_output_size(content.len()), |room| compress_into_with_table(content, room, table).ok())
    }

    fn zstd(&mut self, level: i32, content: &[u8], out: &mut Buffer) -> Option<usize> {
        let compressor = match &mut self.zstd {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(level).ok()?),
        };
        compressor.set_compression_level(level).ok()?;
        append(out, compress_bound(content.len()), |room| compressor.compress_to_buffer(content, room).ok())
    }

    /// What can be made of this, by a look at some of it.
    pub(crate) fn outlook(&mut self, content: &[u8]) -> Outlook {
        let mut parts = [0_usize; 2];
        for part in content.chunks(LOOKED_AT_BYTES) {
            match self.outlook_of_part(part) {
                Outlook::Incompressible => {}
                Outlook::Repeats => parts[0] += 1,
                Outlook::Uneven => parts[1] += 1,
            }
        }
        match parts {
            [0, 0] => Outlook::Incompressible,
            [repeats, uneven] if repeats > uneven => Outlook::Repeats,
            _ => Outlook::Uneven,
        }
    }

    fn outlook_of_part(&mut self, content: &[u8]) -> Outlook {
        let page = PAGE_BYTES as usize;
        let pages = content.len() / page;
        if pages < SAMPLED_PAGES {
            return Outlook::Repeats;
        }
        self.sample.clear();
        for piece in 0..SAMPLE_PIECES {
            // From pages all over the stretch, and each time from another place in the page.
            let start = piece * pages / SAMPLE_PIECES * page + piece * (page / SAMPLE_PIECES);
            self.sample.extend_from_slice(&content[start..start + SAMPLE_PIECE_BYTES]);
        }
        let encoded = compress_into_with_table(&self.sample, &mut self.sample_out, &mut self.lz4_small);
        let left = encoded.map_or(&self.sample[..], |bytes| &self.sample_out[..bytes]);
        if left.len() as f64 > SAMPLE_LZ4_SHARE * self.sample.len() as f64 {
            let is_uneven = entropy_bits(&self.sample) <= SAMPLE_ENTROPY_BITS;
            if is_uneven { Outlook::Uneven } else { Outlook::Incompressible }
        } else if entropy_bits(left) <= LEFT_ENTROPY_BITS {
            Outlook::Uneven
        } else {
            Outlook::Repeats
        }
    }
}

/// Lets `fill` write behind the end of `out`, where there is so much room, and keeps what it wrote.
fn append(out: &mut Buffer, room: usize, fill: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<usize> {
    let start = out.len();
    let bytes = fill(out.grow(room));
    out.truncate(start + bytes.unwrap_or(0));
    bytes
}

/// Shannon's entropy of the bytes, in bits each.
fn entropy_bits(bytes: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    bytes.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
    let total = bytes.len() as f64;
    let of = |&count: &u32| f64::from(count) / total * (total / f64::from(count)).log2();
    counts.iter().filter(|&&count| count > 0).map(of).sum()
}

/// Decodes pages. It keeps what it works with.
pub(crate) struct PageDecoder {
    zstd: Option<Decompressor<'static>>,
    content: Buffer,
    changes: Buffer,
}

impl PageDecoder {
    pub(crate) fn new() -> Self {
        Self { zstd: None, content: Buffer::default(), changes: Buffer::default() }
    }

    /// The content of so many pages, at most [`MAX_PAGES_PER_FRAME`], from the data of their message. For a delta,
    /// `read_base` is asked for what the pages hold now, for copies for what those hold that they are of.
    ///
    /// # Errors
    /// [`PagesError`].
    pub(crate) fn decode<'a>(
        &'a mut self,
        pages: u64,
        encoding: Encoding,
        data: &'a [u8],
        read_base: impl FnOnce(&mut [u8]) -> Result<(), MemoryError>,
    ) -> Result<&'a [u8], PagesError> {
        assert!(pages <= MAX_PAGES_PER_FRAME, "{pages} pages in one message");
        let expected = (pages * PAGE_BYTES) as usize;
        let found = match encoding {
            Encoding::Raw => {
                let found = data.len();
                return if found == expected { Ok(data) } else { Err(PagesError::Length { found, expected }) };
            }
            Encoding::Lz4 => from_lz4(data, self.content.room(expected))?,
            Encoding::Zstd => from_zstd(&mut self.zstd, data, self.content.room(expected))?,
            Encoding::Delta { codec, digest } => {
                // As long as pages at the most: then there are better ways to send them.
                let changes = match codec {
                    DeltaCodec::Plain => data,
                    DeltaCodec::Lz4 => decoded(&mut self.changes, expected, |room| from_lz4(data, room))?,
                    DeltaCodec::Zstd => {
                        decoded(&mut self.changes, expected, |room| from_zstd(&mut self.zstd, data, room))?
                    }
                };
                let content = self.content.room(expected);
                read_base(content)?;
                apply_changes(changes, content).map_err(|BadChanges| PagesError::Changes)?;
                return if page_digest(content) == digest { Ok(content) } else { Err(PagesError::OtherBase) };
            }
            Encoding::Copy { digest } => {
                let content = self.content.room(expected);
                read_base(content)?;
                return if copy_digest(content) == digest { Ok(content) } else { Err(PagesError::OtherSource) };
            }
        };
        if found == expected { Ok(&self.content[..expected]) } else { Err(PagesError::Length { found, expected }) }
    }
}

fn from_lz4(data: &[u8], room: &mut [u8]) -> Result<usize, PagesError> {
    decompress_into(data, room).map_err(PagesError::Lz4)
}

fn from_zstd(zstd: &mut Option<Decompressor<'static>>, data: &[u8], room: &mut [u8]) -> Result<usize, PagesError> {
    if find_frame_compressed_size(data) != Ok(data.len()) {
        return Err(PagesError::NotOneFrame);
    }
    let zstd = match zstd {
        Some(zstd) => zstd,
        none => none.insert(Decompressor::new().map_err(PagesError::Zstd)?),
    };
    zstd.decompress_to_buffer(data, room).map_err(PagesError::Zstd)
}

/// What `decode` leaves in a buffer of so many bytes.
fn decoded(
    buffer: &mut Buffer,
    most: usize,
    decode: impl FnOnce(&mut [u8]) -> Result<usize, PagesError>,
) -> Result<&[u8], PagesError> {
    let room = buffer.room(most);
    let bytes = decode(room)?;
    Ok(&room[..bytes])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::delta::append_changes;
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    fn no_base(_: &mut [u8]) -> Result<(), MemoryError> {
        panic!("only a delta has a base")
    }

    /// Bytes that no compressor makes smaller.
    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    fn text(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| b"the quick brown fox jumps over the lazy dog "[(at * at / 7) % 44]).collect()
    }

    /// Those of all pages.
    fn changes(new: &[u8], old: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for (new, old) in new.chunks(PAGE).zip(old.chunks(PAGE)) {
            assert!(append_changes(new, old, usize::MAX, &mut out));
        }
        out
    }

    #[test]
    fn every_codec_gives_back_what_it_was_given() {
        let mut encoder = PageEncoder::new();
        let mut decoder = PageDecoder::new();
        for pages in [1, 2, 15, 16, 17, 64, 256] {
            for content in [vec![7; pages * PAGE], text(pages * PAGE), noise(3, pages * PAGE)] {
                for (codec, encoding) in Codec::ENCODING.map(|codec| (codec, codec.encoding())) {
                    let mut out = Buffer::default();
                    out.append(b"before");
                    let bytes = encoder.encode(codec, &content, &mut out).unwrap();
                    assert_eq!((out.len(), &out[..6]), (6 + bytes, &b"before"[..]));
                    let decoded = decoder.decode(pages as u64, encoding, &out[6..], no_base).unwrap();
                    assert!(decoded == content, "{codec:?}, {pages} pages");
                }
            }
        }
    }

    #[test]
    fn a_delta_is_small_and_fits_one_base_only() {
        let (base, mut content) = (noise(1, 3 * PAGE), noise(1, 3 * PAGE));
        content[5000..5064].copy_from_slice(&noise(2, 64));
        let out = changes(&content, &base);
        assert!(out.len() < 80, "{out:?}");
        let encoding = Encoding::Delta { codec: DeltaCodec::Plain, digest: page_digest(&content) };
        let mut decoder = PageDecoder::new();
        let mut decode = |has: &[u8]| {
            let read = |to: &mut [u8]| {
                to.copy_from_slice(has);
                Ok(())
            };
            decoder.decode(3, encoding, &out, read).map(<[u8]>::to_vec)
        };
        assert!(decode(&base).unwrap() == content);
        let mut other = base.clone();
        other[3 * PAGE - 1] ^= 1;
        assert!(matches!(decode(&other), Err(PagesError::OtherBase)));
        assert!(decode(&content).unwrap() == content, "changes that are there already");
    }

    #[test]
    fn another_length_than_the_pages_is_refused() {
        let mut encoder = PageEncoder::new();
        let mut decoder = PageDecoder::new();
        for (codec, encoding) in Codec::ENCODING.map(|codec| (codec, codec.encoding())) {
            let mut out = Buffer::default();
            encoder.encode(codec, &text(4 * PAGE), &mut out).unwrap();
            for pages in [1, 3, 5, 256] {
                assert!(decoder.decode(pages, encoding, &out, no_base).is_err(), "{codec:?} as {pages} pages");
            }
            assert!(decoder.decode(4, encoding, &out[..out.len() - 1], no_base).is_err(), "{codec:?} cut");
        }
        // Two frames that would be right together.
        let mut out = Buffer::default();
        encoder.encode(Codec::Zstd1, &text(2 * PAGE), &mut out).unwrap();
        encoder.encode(Codec::Zstd1, &text(2 * PAGE), &mut out).unwrap();
        assert!(matches!(decoder.decode(4, Encoding::Zstd, &out, no_base), Err(PagesError::NotOneFrame)));
        assert!(matches!(decoder.decode(4, Encoding::Raw, &out, no_base), Err(PagesError::Length { .. })));
    }

    #[test]
    fn a_sample_tells_what_can_be_made_smaller() {
        let mut encoder = PageEncoder::new();
        for pages in [4, 5, 63, 64, 256] {
            assert_eq!(encoder.outlook(&noise(5, pages * PAGE)), Outlook::Incompressible, "noise of {pages} pages");
            assert_eq!(encoder.outlook(&text(pages * PAGE)), Outlook::Uneven, "text of {pages} pages");
            // No byte sequence repeats, and yet each byte holds 6 bits only.
            let letters: Vec<u8> = noise(6, pages * PAGE).iter().map(|byte| b'0' + (byte & 63)).collect();
            assert_eq!(encoder.outlook(&letters), Outlook::Uneven, "letters of {pages} pages");
            let mut half = noise(7, pages * PAGE);
            half.chunks_exact_mut(PAGE).for_each(|page| page[..PAGE / 2].fill(1));
            assert_eq!(encoder.outlook(&half), Outlook::Repeats, "half noise of {pages} pages");
        }
    }

    proptest! {
        #[test]
        fn any_content_comes_back(
            pages in 1..20_usize,
            pieces in prop::collection::vec((any::<u64>(), any::<prop::sample::Index>(), 1..3000_usize), 0..12),
        ) {
            let mut content = vec![0; pages * PAGE];
            let base = content.clone();
            for (seed, at, length) in pieces {
                let at = at.index(content.len());
                let end = content.len().min(at + length);
                let piece = if seed.is_multiple_of(2) { noise(seed, end - at) } else { vec![seed as u8; end - at] };
                content[at..end].copy_from_slice(&piece);
            }
            let (mut encoder, mut decoder) = (PageEncoder::new(), PageDecoder::new());
            for (codec, encoding) in Codec::ENCODING.map(|codec| (codec, codec.encoding())) {
                let mut out = Buffer::default();
                encoder.encode(codec, &content, &mut out).unwrap();
                prop_assert!(decoder.decode(pages as u64, encoding, &out, no_base).unwrap() == content);
            }
            let changes = changes(&content, &base);
            for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd1] {
                let mut out = Buffer::default();
                let codec = encoder.encode_changes(codec, &changes, &mut out);
                let encoding = Encoding::Delta { codec, digest: page_digest(&content) };
                let read = |to: &mut [u8]| { to.copy_from_slice(&base); Ok(()) };
                // Longer ones are never sent.
                if changes.len() <= content.len() {
                    prop_assert!(decoder.decode(pages as u64, encoding, &out, read).unwrap() == content);
                }
            }
        }

        /// Bytes of a peer, made up or damaged on their way past the checksum: an error or some pages, never a panic, and
        /// a delta's result is never anything else than what was meant.
        #[test]
        fn no_data_panic(
            code in 0..6_u32,
            pages in 1..=MAX_PAGES_PER_FRAME,
            made_up in prop::collection::vec(any::<u8>(), 1..2000),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            from_real in any::<bool>(),
        ) {
            // Some text in each page, where zeros were before.
            let content: Vec<u8> = text(pages as usize * PAGE)
                .chunks(PAGE)
                .flat_map(|page| [&page[..900], &[0; PAGE - 900]].concat())
                .collect();
            let changes = changes(&content, &vec![0; content.len()]);
            let digest = page_digest(&content);
            let delta = |codec| Encoding::Delta { codec, digest };
            let (mut encoder, mut out) = (PageEncoder::new(), Buffer::default());
            let encoding = match code {
                0 => { out.append(&content); Encoding::Raw }
                1 => { encoder.encode(Codec::Lz4, &content, &mut out); Encoding::Lz4 }
                2 => { encoder.encode(Codec::Zstd1, &content, &mut out); Encoding::Zstd }
                3 => { out.append(&changes); delta(DeltaCodec::Plain) }
                4 => { encoder.encode(Codec::Lz4, &changes, &mut out); delta(DeltaCodec::Lz4) }
                _ => { encoder.encode(Codec::Zstd1, &changes, &mut out); delta(DeltaCodec::Zstd) }
            };
            let mut data = if from_real { out.to_vec() } else { made_up };
            for (at, value) in damage {
                let at = at.index(data.len());
                data[at] = value;
            }
            let read = |to: &mut [u8]| { to.fill(0); Ok(()) };
            if let Ok(decoded) = PageDecoder::new().decode(pages, encoding, &data, read) {
                prop_assert_eq!(decoded.len() as u64, pages * PAGE_BYTES);
                if code >= 3 {
                    prop_assert!(decoded == content);
                }
            }
        }
    }
}
