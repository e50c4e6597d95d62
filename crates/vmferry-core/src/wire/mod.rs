//! Every byte on the network: frames, messages, limits, versions. `docs/PROTOCOL.md` has the byte offsets.
//!
//! A connection carries frames both ways. A frame is a 16-byte header and a bounded payload; the header's checksum
//! covers both and is seeded with the frame's number in its direction, so a frame that is damaged, lost, repeated or
//! out of order is found before its payload is looked at. Nothing here performs I/O: a driver reads
//! [`HEADER_BYTES`], asks [`Header::parse`] for the payload's length, reads that, and calls [`FrameReader::open`].

mod codec;
mod message;

use twox_hash::XxHash3_64;

pub use message::{
    Abort, COPY_DIGEST_BYTES, DeltaCodec, Digests, Encoding, Encodings, Fault, Hello, Join, MAX_ABORT_TEXT_BYTES,
    MAX_DEVICE_CHUNK_BYTES, MAX_DEVICE_STATE_BYTES, MAX_DIGESTS_PER_FRAME, MAX_PAGES_PER_FRAME, MAX_STREAMS,
    MAX_ZERO_RUNS_PER_FRAME, Message, MigrationId, PageRuns, Pages, Prepared, SOURCE_BYTES, STREAM_BLOCK_PAGES,
    Welcome, stream_of,
};

use crate::pages::LayoutError;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 16;
/// The longest payload: a full frame of pages and its fields.
pub const MAX_PAYLOAD_BYTES: usize =
    (MAX_PAGES_PER_FRAME * crate::pages::PAGE_BYTES) as usize + message::MAX_PAGES_FIELDS_BYTES;
/// The oldest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 1;
/// The newest protocol version that this build speaks.
pub const VERSION_MAX: u16 = 1;
/// What every hello and welcome begins with.
pub const MAGIC: [u8; 8] = *b"vmferry\0";

/// What is wrong with bytes that a peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A payload is longer than any message may be.
    #[error("a frame announces {bytes} bytes; at most {MAX_PAYLOAD_BYTES} are allowed")]
    FrameTooLong {
        /// The announced length.
        bytes: u64,
    },
    /// Reserved header bytes are not zero.
    #[error("reserved bytes of a frame header are not zero")]
    ReservedBits,
    /// The checksum does not match: the frame was damaged, lost, repeated or reordered on its way.
    #[error("the checksum of frame {frame} does not match: damaged, lost or out of order on its way")]
    Checksum {
        /// The frame's number in its direction, from 0.
        frame: u64,
    },
    /// There is no such message.
    #[error("unknown message type {kind}")]
    UnknownMessage {
        /// The type byte.
        kind: u8,
    },
    /// A payload ends inside a field.
    #[error("the message ends inside `{field}`")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// A payload goes on after its last field.
    #[error("{bytes} bytes are left over after the message's last field")]
    Leftover {
        /// How many.
        bytes: usize,
    },
    /// A count or length is above its limit.
    #[error("`{field}` is {value}; at most {most} is allowed")]
    TooMany {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        most: u64,
    },
    /// A field has a value that means nothing.
    #[error("`{field}` has the unknown value {value}")]
    BadValue {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("`{field}` is not UTF-8 text")]
    BadText {
        /// The field.
        field: &'static str,
    },
    /// The peer is not vmferry.
    #[error("the peer does not speak the vmferry protocol")]
    BadMagic,
    /// The peer's RAM layout breaks a rule.
    #[error("the peer's RAM layout is invalid")]
    Layout(#[source] LayoutError),
}

/// A frame's header, parsed but not yet checked against its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    payload_bytes: u32,
    kind: u8,
    checksum: u64,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::FrameTooLong`] before anything of that length is allocated; [`WireError::ReservedBits`].
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let payload_bytes = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if payload_bytes as usize > MAX_PAYLOAD_BYTES {
            return Err(WireError::FrameTooLong { bytes: u64::from(payload_bytes) });
        }
        if bytes[5..8] != [0; 3] {
            return Err(WireError::ReservedBits);
        }
        let mut checksum = [0; 8];
        checksum.copy_from_slice(&bytes[8..]);
        Ok(Self { payload_bytes, kind: bytes[4], checksum: u64::from_le_bytes(checksum) })
    }

    /// How many bytes of payload follow.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes as usize
    }
}

/// Opens the frames of one direction of a connection, in order.
#[derive(Debug, Default)]
pub struct FrameReader {
    frames: u64,
}

impl FrameReader {
    /// A reader at the beginning of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks the next frame and reads its message. Page data stay where they are in `payload`.
    ///
    /// # Errors
    /// Any [`WireError`]; the connection is of no use afterwards.
    pub fn open<'a>(&mut self, header: Header, payload: &'a [u8]) -> Result<Message<'a>, WireError> {
        let frame = self.frames;
        self.frames += 1;
        if payload.len() != header.payload_bytes() || checksum(frame, header.kind, &[payload]) != header.checksum {
            return Err(WireError::Checksum { frame });
        }
        Message::decode(header.kind, payload)
    }
}

/// Seals the frames of one direction of a connection, in order.
#[derive(Debug, Default)]
pub struct FrameWriter {
    frames: u64,
}

impl FrameWriter {
    /// A writer at the beginning of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the next frame to `out`: header, fields and the message's data.
    pub fn seal(&mut self, message: &Message<'_>, out: &mut Vec<u8>) {
        let data = self.seal_head(message, out);
        out.extend_from_slice(data);
    }

    /// Appends the next frame to `out` without the message's bulk data, which the caller has to send right after: so
    /// pages need no copy.
    pub fn seal_head<'a>(&mut self, message: &Message<'a>, out: &mut Vec<u8>) -> &'a [u8] {
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        message.encode_fields(out);
        let data = message.data();
        let fields = &out[start + HEADER_BYTES..];
        let header = self.header(message.kind(), fields, data);
        out[start..start + HEADER_BYTES].copy_from_slice(&header);
        data
    }

    fn header(&mut self, kind: u8, fields: &[u8], data: &[u8]) -> [u8; HEADER_BYTES] {
        let payload_bytes = fields.len() + data.len();
        assert!(payload_bytes <= MAX_PAYLOAD_BYTES, "message type {kind} has {payload_bytes} bytes");
        let sum = checksum(self.frames, kind, &[fields, data]);
        self.frames += 1;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
        header[4] = kind;
        header[8..].copy_from_slice(&sum.to_le_bytes());
        header
    }
}

/// The checksum of a frame: XXH3-64 over type byte and payload, seeded with the frame's number in its direction.
///
/// It guards against faults of networks and software, not against an attacker; that is the encrypted channel's task.
fn checksum(frame: u64, kind: u8, parts: &[&[u8]]) -> u64 {
    let mut hasher = XxHash3_64::with_seed(frame);
    std::hash::Hasher::write(&mut hasher, &[kind]);
    for part in parts {
        std::hash::Hasher::write(&mut hasher, part);
    }
    std::hash::Hasher::finish(&hasher)
}

/// The digest of the content of a page, with which `--verify` compares source and target, or of neighbouring pages, with
/// which a delta is checked: XXH3-64, seed 0.
pub fn page_digest(content: &[u8]) -> u64 {
    XxHash3_64::oneshot(content)
}

/// XXH3-64 with a seed: of who does not know it nobody can make two contents with the same digest.
pub fn seeded_digest(seed: u64, content: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, content)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pages::{PAGE_BYTES, PageNumber, PageRun, RamBlock, RamLayout};

    fn hello() -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            migration: MigrationId([7; 16]),
            layout: RamLayout::new(vec![RamBlock { id: "ram".into(), bytes: 1 << 20 }]).unwrap(),
            machine: "pc-q35-7.2".into(),
            vcpus: 2,
            verify: true,
            encodings: Encodings::ALL,
            streams: 4,
        }
    }

    const SCATTERED: [PageRun; 3] = [
        PageRun { first: PageNumber(3), count: 2 },
        PageRun { first: PageNumber(6), count: 1 },
        PageRun { first: PageNumber(6 + 1 + u16::MAX as u64), count: 1 },
    ];

    fn samples(data: &[u8]) -> Vec<Message<'_>> {
        vec![
            Message::Hello(hello()),
            Message::Welcome(Welcome {
                version: 1,
                migration: MigrationId([1; 16]),
                encodings: Encodings::RAW,
                streams: 2,
            }),
            Message::Join(Join { migration: MigrationId([1; 16]), stream: 1 }),
            Message::Fence { side_bytes: 5_000_000_000 },
            Message::Pages(Pages::raw(PageRun::new(3, 2), &data[..2 * PAGE_BYTES as usize])),
            Message::Pages(Pages {
                runs: PageRuns::One(PageRun::new(3, 2)),
                encoding: Encoding::Lz4,
                data: &data[..8191],
            }),
            Message::Pages(Pages {
                runs: PageRuns::One(PageRun::new(3, 1)),
                encoding: Encoding::Zstd,
                data: &data[..1],
            }),
            Message::Pages(Pages {
                runs: PageRuns::One(PageRun::new(3, 2)),
                encoding: Encoding::Delta { codec: DeltaCodec::Plain, digest: 99 },
                data: &data[..8183],
            }),
            Message::Pages(Pages {
                runs: PageRuns::of(&SCATTERED),
                encoding: Encoding::Delta { codec: DeltaCodec::Zstd, digest: 99 },
                data: &data[..8000],
            }),
            Message::Pages(Pages { runs: PageRuns::of(&SCATTERED[1..]), encoding: Encoding::Raw, data }),
            Message::Pages(Pages {
                runs: PageRuns::of(&SCATTERED),
                encoding: Encoding::Copy { digest: [7; 32] },
                data: &data[..4 * SOURCE_BYTES as usize],
            }),
            Message::Zero(vec![PageRun::new(1, 5), PageRun::new(9, 1)]),
            Message::Paused,
            Message::DeviceState(&data[..100]),
            Message::Digests(Digests { first: 10, digests: vec![1, 2, 3] }),
            Message::Load { device_state_bytes: 100 },
            Message::HandOver(MigrationId([2; 16])),
            Message::Abort(Abort { fault: Fault::User, text: "cancelled".into() }),
            Message::Ping(9),
            Message::Pong(9),
            Message::Progress { bytes: 77 },
            Message::Prepared(Prepared { verified_pages: 5, mismatched_pages: 1, first_mismatch: 4, load_us: 1234 }),
            Message::Running { resume_us: 88 },
        ]
    }

    fn open_all(mut bytes: &[u8]) -> Result<Vec<String>, WireError> {
        let mut reader = FrameReader::new();
        let mut seen = Vec::new();
        while !bytes.is_empty() {
            let header = Header::parse(bytes.first_chunk().ok_or(WireError::Truncated { field: "header" })?)?;
            let rest = &bytes[HEADER_BYTES..];
            let payload = rest.get(..header.payload_bytes()).ok_or(WireError::Truncated { field: "payload" })?;
            seen.push(format!("{:?}", reader.open(header, payload)?));
            bytes = &rest[header.payload_bytes()..];
        }
        Ok(seen)
    }

    #[test]
    fn every_message_comes_back_as_it_went() {
        let data: Vec<u8> = (0..2 * PAGE_BYTES as usize).map(|i| (i * 31) as u8).collect();
        let mut writer = FrameWriter::new();
        let mut bytes = Vec::new();
        let messages = samples(&data);
        for message in &messages {
            writer.seal(message, &mut bytes);
        }
        let expected: Vec<String> = messages.iter().map(|message| format!("{message:?}")).collect();
        assert_eq!(open_all(&bytes).unwrap(), expected);
    }

    /// Frames that are each intact, but lost, repeated or swapped as wholes, must not pass.
    #[test]
    fn lost_repeated_and_swapped_frames_are_found() {
        let mut writer = FrameWriter::new();
        let frames: Vec<Vec<u8>> = (0..3)
            .map(|i| {
                let mut out = Vec::new();
                writer.seal(&Message::Ping(i), &mut out);
                out
            })
            .collect();
        for order in [&[1, 2][..], &[0, 0], &[1, 0, 2], &[0, 2]] {
            let bytes: Vec<u8> = order.iter().flat_map(|&i: &usize| frames[i].clone()).collect();
            assert!(matches!(open_all(&bytes), Err(WireError::Checksum { .. })), "order {order:?}");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_reading() {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Header::parse(&header), Err(WireError::FrameTooLong { bytes: u64::from(u32::MAX) }));
    }

    /// The payload of a `pages` frame as a peer might write it.
    fn pages_payload(count: u32, encoding: u32, rest: &[u8]) -> Vec<u8> {
        let fields = [&7_u64.to_le_bytes()[..], &count.to_le_bytes(), &encoding.to_le_bytes(), rest];
        fields.concat()
    }

    fn open_pages(count: u32, encoding: u32, rest: &[u8]) -> Result<String, WireError> {
        let payload = pages_payload(count, encoding, rest);
        let (kind, payload_bytes) = (3, payload.len() as u32);
        let header = Header { payload_bytes, kind, checksum: checksum(0, kind, &[&payload]) };
        FrameReader::new().open(header, &payload).map(|message| format!("{message:?}"))
    }

    #[test]
    fn encoded_pages_are_shorter_than_as_they_are_and_not_empty() {
        let page = PAGE_BYTES as usize;
        for (encoding, fields) in [(1, 0), (2, 0), (3, 8), (4, 8), (5, 8)] {
            assert!(
                matches!(open_pages(1, encoding, &vec![1; fields]), Err(WireError::Truncated { .. })),
                "{encoding}"
            );
            assert!(open_pages(1, encoding, &vec![1; page - 1]).is_ok(), "{encoding}");
            let most = (page - 1 - fields) as u64;
            let too_long = WireError::TooMany { field: "page data", value: most + 1, most };
            assert_eq!(open_pages(1, encoding, &vec![1; page]), Err(too_long), "{encoding}");
            assert!(open_pages(0, encoding, &vec![1; fields + 1]).is_err(), "{encoding}: data for no pages");
            let many = MAX_PAGES_PER_FRAME as u32 + 1;
            assert!(matches!(open_pages(many, encoding, &[1; 100]), Err(WireError::TooMany { .. })), "{encoding}");
        }
        // Copies: a digest and a page number for each.
        assert!(open_pages(2, 6, &[1; 32 + 16]).is_ok());
        assert!(matches!(open_pages(2, 6, &[1; 32 + 15]), Err(WireError::Truncated { .. })));
        assert_eq!(open_pages(2, 6, &[1; 32 + 17]), Err(WireError::Leftover { bytes: 1 }));
        assert_eq!(open_pages(1, 7, &[1; 100]), Err(WireError::BadValue { field: "encoding", value: 7 }));
        assert_eq!(open_pages(1, 0, &vec![1; page + 1]), Err(WireError::Leftover { bytes: 1 }));
    }

    #[test]
    fn an_answer_names_encodings_that_were_offered_and_always_pages_as_they_are() {
        let (all, lz4) = (Encodings::ALL, Encodings(0b11));
        assert!(all.allows(Encodings::RAW) && all.allows(all) && lz4.allows(lz4));
        assert!(!lz4.allows(all), "more than was offered");
        assert!(!all.allows(Encodings(0b10)), "not even pages as they are");
        // An encoding of a later build is not agreed on, and does no harm.
        assert_eq!(Encodings(0x8000_0003).and(all), lz4);
        assert!(lz4.contains(Encoding::Lz4) && !lz4.has_deltas());
        assert!(
            all.has_deltas() && !Encodings(0b101_1111).has_deltas() && all.without_deltas() == Encodings(0b100_0111)
        );
        assert!(all.has_copies() && all.without_deltas().has_copies() && !Encodings(0b11_1111).has_copies());
    }

    #[test]
    fn runs_in_a_frame_ascend_with_pages_between_them() {
        // Two pages; one more run, of these distances and pages.
        let open = |pages: u32, further: &[[u16; 2]]| {
            let runs: Vec<u8> = further.as_flattened().iter().flat_map(|value| value.to_le_bytes()).collect();
            let rest = [runs, vec![1; 100]].concat();
            open_pages(pages, 1 | (further.len() as u32) << 16, &rest)
        };
        assert!(open(2, &[[1, 1]]).is_ok());
        assert!(open(256, &[[u16::MAX, 1]; 255]).is_ok());
        for (pages, further) in [
            // No distance, no pages, none left for the first run, more runs than pages.
            (2, &[[0, 1]][..]),
            (2, &[[1, 0]]),
            (2, &[[1, 2]]),
            (2, &[[1, u16::MAX]]),
            (2, &[[1, 1], [1, 1]]),
            (1, &[[1, 1]]),
            (0, &[[1, 1]]),
            (256, &[[1, 1]; 256]),
        ] {
            assert!(open(pages, further).is_err(), "{pages} pages, {further:?}");
        }
        assert!(!PageRuns::may_follow(PageRun::new(5, 2), PageRun::new(7, 1)), "they are neighbours");
        assert!(!PageRuns::may_follow(PageRun::new(5, 2), PageRun::new(3, 1)), "backwards");
        assert!(!PageRuns::may_follow(PageRun::new(5, 2), PageRun::new(8 + u64::from(u16::MAX), 1)), "too far");
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(bit in 0..8_u32, pick in any::<prop::sample::Index>()) {
            let data = vec![5; 2 * PAGE_BYTES as usize];
            let mut bytes = Vec::new();
            let mut writer = FrameWriter::new();
            for message in samples(&data) {
                writer.seal(&message, &mut bytes);
            }
            let index = pick.index(bytes.len());
            bytes[index] ^= 1 << bit;
            prop_assert!(open_all(&bytes).is_err(), "bit {} of byte {} went unnoticed", bit, index);
        }

        /// Page frames that are wrong in any field: an error or a message, never a panic.
        #[test]
        fn no_page_frame_panics(
            count in 0..400_u32,
            encoding in 0..8_u32,
            rest in prop::collection::vec(any::<u8>(), 0..9000),
        ) {
            if open_pages(count, encoding, &rest).is_ok() {
                prop_assert!(u64::from(count) <= MAX_PAGES_PER_FRAME && encoding <= 5);
                prop_assert!(rest.len() as u64 <= u64::from(count) * PAGE_BYTES);
            }
        }

        /// Arbitrary payloads with a right checksum: an error or a message, never a panic.
        #[test]
        fn no_payload_panics(kind in any::<u8>(), payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let header = Header { payload_bytes: payload.len() as u32, kind, checksum: checksum(0, kind, &[&payload]) };
            if let Ok(message) = FrameReader::new().open(header, &payload) {
                let mut again = Vec::new();
                FrameWriter::new().seal(&message, &mut again);
                prop_assert_eq!(&again[HEADER_BYTES..], &payload[..]);
            }
        }
    }
}
