//! The messages: what they hold, their limits, and how they become bytes.

use std::borrow::Cow;
use std::ops::Deref;

use super::codec::{Put, Reader};
use super::{MAGIC, WireError};
use crate::pages::{MAX_BLOCK_ID_BYTES, MAX_BLOCKS, PAGE_BYTES, PageNumber, PageRun, RamBlock, RamLayout};

/// The most pages in one [`Message::Pages`].
pub const MAX_PAGES_PER_FRAME: u64 = 256;
/// The bytes of a [`Pages`] for each run but the first.
const FURTHER_RUN_BYTES: usize = 4;
/// The most bytes of a [`Pages`] beside its content.
pub(super) const MAX_PAGES_FIELDS_BYTES: usize = 24 + FURTHER_RUN_BYTES * (MAX_PAGES_PER_FRAME as usize - 1);
/// The most runs in one [`Message::Zero`].
pub const MAX_ZERO_RUNS_PER_FRAME: u64 = 4096;
/// The most bytes in one [`Message::DeviceState`].
pub const MAX_DEVICE_CHUNK_BYTES: usize = 256 * 1024;
/// The most bytes of device state in a whole migration.
pub const MAX_DEVICE_STATE_BYTES: u64 = 256 * 1024 * 1024;
/// The most digests in one [`Message::Digests`].
pub const MAX_DIGESTS_PER_FRAME: u64 = 65_536;
/// The longest text in an [`Abort`]; a longer one is cut.
pub const MAX_ABORT_TEXT_BYTES: usize = 2048;
/// The most connections of one migration.
pub const MAX_STREAMS: u16 = 16;
/// Where there are several connections, each aligned block of so many pages has one of them, and its pages go by no other:
/// so what is sent later of a page is read later.
pub const STREAM_BLOCK_PAGES: u64 = 256;
/// The longest machine type in a [`Hello`].
const MAX_MACHINE_BYTES: usize = 255;

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const PAGES: u8 = 3;
    pub(super) const ZERO: u8 = 4;
    pub(super) const PAUSED: u8 = 5;
    pub(super) const DEVICE_STATE: u8 = 6;
    pub(super) const DIGESTS: u8 = 7;
    pub(super) const LOAD: u8 = 8;
    pub(super) const HAND_OVER: u8 = 9;
    pub(super) const ABORT: u8 = 10;
    pub(super) const PING: u8 = 11;
    pub(super) const PONG: u8 = 12;
    pub(super) const PROGRESS: u8 = 13;
    pub(super) const PREPARED: u8 = 14;
    pub(super) const RUNNING: u8 = 15;
    pub(super) const JOIN: u8 = 16;
    pub(super) const FENCE: u8 = 17;
}

/// Names one migration; drawn at random by the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl std::fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The source's first message: who it is and what it wants to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The oldest protocol version that the source speaks.
    pub version_min: u16,
    /// The newest protocol version that the source speaks.
    pub version_max: u16,
    /// The migration's name.
    pub migration: MigrationId,
    /// The guest's RAM.
    pub layout: RamLayout,
    /// The VMM's machine type, which must be the same on the target.
    pub machine: String,
    /// The guest's processors, whose number must be the same on the target.
    pub vcpus: u32,
    /// Whether digests of all pages will be sent for comparison.
    pub verify: bool,
    /// The encodings of pages that the source would use.
    pub encodings: Encodings,
    /// The connections that the source would use, this one included; 1 to [`MAX_STREAMS`].
    pub streams: u16,
}

/// The target's answer to a [`Hello`] that it accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The protocol version for the rest of the connection.
    pub version: u16,
    /// The migration's name, repeated.
    pub migration: MigrationId,
    /// The encodings of pages that the source may use: some of those that it offered, pages as they are among them.
    pub encodings: Encodings,
    /// The connections that the source is to use, this one included: 1 to as many as it offered.
    pub streams: u16,
}

/// The first message on each further connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Join {
    /// The migration's name.
    pub migration: MigrationId,
    /// Which connection it is, from 1.
    pub stream: u16,
}

/// The connection by which a page goes where there are so many.
pub fn stream_of(page: PageNumber, streams: u16) -> u16 {
    (page.0 / STREAM_BLOCK_PAGES % u64::from(streams)) as u16
}

/// How the content of pages is written in a [`Pages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As it is, [`PAGE_BYTES`] a page.
    Raw,
    /// As one LZ4 block.
    Lz4,
    /// As one Zstandard frame.
    Zstd,
    /// What has changed against the content that the target has.
    Delta {
        /// How the changes are encoded.
        codec: DeltaCodec,
        /// XXH3-64, seed 0, of the content that results: a delta for another content than the target has is found by it.
        digest: u64,
    },
    /// As the pages that the target has with the same content: [`SOURCE_BYTES`] of page number for each.
    Copy {
        /// BLAKE3 of the content that results.
        digest: [u8; COPY_DIGEST_BYTES],
    },
}

/// Bytes of the number of the page that a page is copied from.
pub const SOURCE_BYTES: u64 = 8;
/// Bytes of the digest of copied pages.
pub const COPY_DIGEST_BYTES: usize = 32;

/// How changes are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaCodec {
    /// As they are.
    Plain,
    /// As one LZ4 block.
    Lz4,
    /// As one Zstandard frame.
    Zstd,
}

impl Encoding {
    /// The number on the wire, which is also its bit in [`Encodings`].
    pub fn code(self) -> u32 {
        match self {
            Encoding::Raw => 0,
            Encoding::Lz4 => 1,
            Encoding::Zstd => 2,
            Encoding::Delta { codec: DeltaCodec::Plain, .. } => 3,
            Encoding::Delta { codec: DeltaCodec::Lz4, .. } => 4,
            Encoding::Delta { codec: DeltaCodec::Zstd, .. } => 5,
            Encoding::Copy { .. } => 6,
        }
    }

    /// Bytes of fields between the encoding's number and the data.
    fn field_bytes(self) -> u64 {
        match self {
            Encoding::Raw | Encoding::Lz4 | Encoding::Zstd => 0,
            Encoding::Delta { .. } => 8,
            Encoding::Copy { .. } => COPY_DIGEST_BYTES as u64,
        }
    }

    /// How much data so many pages in one run and so many further ones are in this encoding.
    fn data_bytes(self, pages: u64, further_runs: usize) -> DataBytes {
        match self {
            Encoding::Raw => DataBytes::Exactly(pages * PAGE_BYTES),
            Encoding::Copy { .. } => DataBytes::Exactly(pages * SOURCE_BYTES),
            Encoding::Lz4 | Encoding::Zstd | Encoding::Delta { .. } => {
                let fields = self.field_bytes() + (further_runs * FURTHER_RUN_BYTES) as u64;
                DataBytes::AtMost((pages * PAGE_BYTES).saturating_sub(1 + fields))
            }
        }
    }
}

/// How much data there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DataBytes {
    Exactly(u64),
    /// At least one, and so few that the frame is shorter than the pages as they are.
    AtMost(u64),
}

/// A set of encodings of pages, by their numbers. Numbers that this build does not know may be in an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encodings(pub u32);

impl Encodings {
    /// Pages as they are, which both sides always speak.
    pub const RAW: Self = Self(1);
    /// All that this build knows.
    pub const ALL: Self = Self(0b111_1111);
    /// Those of deltas.
    const DELTAS: Self = Self(0b11_1000);
    /// That of pages as copies of others.
    const COPIES: Self = Self(0b100_0000);

    /// Those in both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether it is one of them.
    pub fn contains(self, encoding: Encoding) -> bool {
        self.0 & (1 << encoding.code()) != 0
    }

    /// Whether all encodings of deltas are among them.
    pub const fn has_deltas(self) -> bool {
        self.0 & Self::DELTAS.0 == Self::DELTAS.0
    }

    /// Those that are not of deltas.
    #[must_use]
    pub const fn without_deltas(self) -> Self {
        Self(self.0 & !Self::DELTAS.0)
    }

    /// Whether pages may go as copies of others.
    pub const fn has_copies(self) -> bool {
        self.0 & Self::COPIES.0 != 0
    }

    /// Whether `welcome` may be the answer to this offer.
    pub const fn allows(self, welcome: Self) -> bool {
        welcome.0 & Self::RAW.0 != 0 && welcome.0 & !self.0 == 0
    }
}

/// The pages of a [`Pages`]: runs from the lowest to the highest, with pages between them, none of them empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageRuns<'a> {
    /// Neighbouring pages.
    One(PageRun),
    /// More than one run.
    Several(Cow<'a, [PageRun]>),
}

impl<'a> PageRuns<'a> {
    /// These runs, without a copy.
    ///
    /// # Panics
    /// If there are none.
    pub fn of(runs: &'a [PageRun]) -> Self {
        match runs {
            [] => panic!("no run of pages"),
            [run] => PageRuns::One(*run),
            runs => PageRuns::Several(Cow::Borrowed(runs)),
        }
    }

    /// The pages in all of them.
    pub fn pages(&self) -> u64 {
        self.iter().map(|run| run.count).sum()
    }

    /// Whether a run may be the next one behind another in the same frame.
    pub fn may_follow(before: PageRun, next: PageRun) -> bool {
        next.first.0.checked_sub(before.end()).is_some_and(|gap| (1..=u64::from(u16::MAX)).contains(&gap))
    }

    /// Whether they can be written as they are: all but the first one by their distance from the one before.
    fn fit(&self) -> bool {
        let follow = self.windows(2).all(|pair| Self::may_follow(pair[0], pair[1]));
        let counts = self.len() == 1 || self.iter().all(|run| run.count > 0);
        follow && counts && self.pages() <= MAX_PAGES_PER_FRAME
    }
}

impl Deref for PageRuns<'_> {
    type Target = [PageRun];

    fn deref(&self) -> &[PageRun] {
        match self {
            PageRuns::One(run) => std::slice::from_ref(run),
            PageRuns::Several(runs) => runs,
        }
    }
}

/// The content of pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages<'a> {
    /// Which pages; at most [`MAX_PAGES_PER_FRAME`].
    pub runs: PageRuns<'a>,
    /// How `data` is to be read.
    pub encoding: Encoding,
    /// Their content: as it is [`PAGE_BYTES`] each, else fewer bytes than that.
    pub data: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Pages as they are.
    pub fn raw(run: PageRun, data: &'a [u8]) -> Self {
        Self { runs: PageRuns::One(run), encoding: Encoding::Raw, data }
    }

    /// Whether so many bytes in this encoding would be a shorter frame than the pages as they are, as is demanded.
    pub fn is_shorter(runs: &PageRuns<'_>, encoding: Encoding, data_bytes: usize) -> bool {
        match encoding.data_bytes(runs.pages(), runs.len() - 1) {
            DataBytes::Exactly(_) => false,
            DataBytes::AtMost(most) => data_bytes > 0 && data_bytes as u64 <= most,
        }
    }

    /// For copies, the pages that these are copied from, in the order of theirs.
    pub fn sources(&self) -> impl Iterator<Item = PageNumber> + use<'a> {
        let are_copies = matches!(self.encoding, Encoding::Copy { .. });
        let data = if are_copies { self.data } else { &[] };
        let numbers = data.as_chunks().0.iter();
        numbers.map(|&number| PageNumber(u64::from_le_bytes(number)))
    }

    /// Whether there is as much data as the encoding demands.
    fn fits(&self) -> bool {
        match self.encoding.data_bytes(self.runs.pages(), self.runs.len() - 1) {
            DataBytes::Exactly(bytes) => self.data.len() as u64 == bytes,
            DataBytes::AtMost(_) => Self::is_shorter(&self.runs, self.encoding, self.data.len()),
        }
    }
}

/// Digests of neighbouring pages, see [`super::page_digest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digests {
    /// The first page's number.
    pub first: u64,
    /// A digest a page; 1 to [`MAX_DIGESTS_PER_FRAME`].
    pub digests: Vec<u64>,
}

impl Digests {
    /// The pages that the digests are of.
    pub fn run(&self) -> PageRun {
        PageRun::new(self.first, self.digests.len() as u64)
    }
}

/// Who caused an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The sender of the message, or its VMM.
    Sender,
    /// The receiver of the message: it broke the protocol or offered what cannot be accepted.
    Receiver,
    /// The user, who cancelled.
    User,
}

/// Ends a migration before the hand-over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abort {
    /// Who caused it.
    pub fault: Fault,
    /// What happened, for people; cut to [`MAX_ABORT_TEXT_BYTES`].
    pub text: String,
}

/// The target has everything and could run the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// How many pages were compared by digest; 0 without verification.
    pub verified_pages: u64,
    /// How many of them differ.
    pub mismatched_pages: u64,
    /// The first that differs; meaningless if none does.
    pub first_mismatch: u64,
    /// How long loading the device state took, in µs.
    pub load_us: u64,
}

/// Everything that one side can say to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// Source: the beginning.
    Hello(Hello),
    /// Target: the hello is accepted.
    Welcome(Welcome),
    /// Source: content of pages.
    Pages(Pages<'a>),
    /// Source: these runs hold only zero bytes. At most [`MAX_ZERO_RUNS_PER_FRAME`].
    Zero(Vec<PageRun>),
    /// Source: the guest is paused; what follows is the stop phase.
    Paused,
    /// Source: the next piece of the VMM's device state, at most [`MAX_DEVICE_CHUNK_BYTES`].
    DeviceState(&'a [u8]),
    /// Source: digests to compare with.
    Digests(Digests),
    /// Source: all memory and device state is sent; load it.
    Load {
        /// The length of the whole device state.
        device_state_bytes: u64,
    },
    /// Source: the guest is the target's from now on. After sending this the source never runs it again.
    HandOver(MigrationId),
    /// Either side, before the hand-over: the migration ends here.
    Abort(Abort),
    /// Source: answer with the same number.
    Ping(u64),
    /// Target: the answer to a ping.
    Pong(u64),
    /// Target: so many bytes of frames have been received and their content is in place.
    Progress {
        /// Counted from the connection's first byte.
        bytes: u64,
    },
    /// Target: everything is loaded, the guest is paused and ready.
    Prepared(Prepared),
    /// Target: the guest runs here.
    Running {
        /// From the hand-over's arrival until the guest ran, in µs.
        resume_us: u64,
    },
    /// Source, on a further connection: what it belongs to.
    Join(Join),
    /// Source: no page follows on any connection. Read on here only when all that was sent on the others is in place.
    Fence {
        /// Bytes of frames sent on all further connections.
        side_bytes: u64,
    },
}

impl<'a> Message<'a> {
    /// The type byte of the message.
    pub(super) fn kind(&self) -> u8 {
        match self {
            Message::Hello(_) => kind::HELLO,
            Message::Welcome(_) => kind::WELCOME,
            Message::Pages(_) => kind::PAGES,
            Message::Zero(_) => kind::ZERO,
            Message::Paused => kind::PAUSED,
            Message::DeviceState(_) => kind::DEVICE_STATE,
            Message::Digests(_) => kind::DIGESTS,
            Message::Load { .. } => kind::LOAD,
            Message::HandOver(_) => kind::HAND_OVER,
            Message::Abort(_) => kind::ABORT,
            Message::Ping(_) => kind::PING,
            Message::Pong(_) => kind::PONG,
            Message::Progress { .. } => kind::PROGRESS,
            Message::Prepared(_) => kind::PREPARED,
            Message::Running { .. } => kind::RUNNING,
            Message::Join(_) => kind::JOIN,
            Message::Fence { .. } => kind::FENCE,
        }
    }

    /// The message without its borrow; `None` for those with bulk data, which only the source sends.
    pub fn into_static(self) -> Option<Message<'static>> {
        match self {
            Message::Pages(_) | Message::DeviceState(_) => None,
            Message::Hello(hello) => Some(Message::Hello(hello)),
            Message::Welcome(welcome) => Some(Message::Welcome(welcome)),
            Message::Zero(runs) => Some(Message::Zero(runs)),
            Message::Paused => Some(Message::Paused),
            Message::Digests(digests) => Some(Message::Digests(digests)),
            Message::Load { device_state_bytes } => Some(Message::Load { device_state_bytes }),
            Message::HandOver(migration) => Some(Message::HandOver(migration)),
            Message::Abort(abort) => Some(Message::Abort(abort)),
            Message::Ping(number) => Some(Message::Ping(number)),
            Message::Pong(number) => Some(Message::Pong(number)),
            Message::Progress { bytes } => Some(Message::Progress { bytes }),
            Message::Prepared(prepared) => Some(Message::Prepared(prepared)),
            Message::Running { resume_us } => Some(Message::Running { resume_us }),
            Message::Join(join) => Some(Message::Join(join)),
            Message::Fence { side_bytes } => Some(Message::Fence { side_bytes }),
        }
    }

    /// A short name for logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Welcome(_) => "welcome",
            Message::Pages(_) => "pages",
            Message::Zero(_) => "zero",
            Message::Paused => "paused",
            Message::DeviceState(_) => "device-state",
            Message::Digests(_) => "digests",
            Message::Load { .. } => "load",
            Message::HandOver(_) => "hand-over",
            Message::Abort(_) => "abort",
            Message::Ping(_) => "ping",
            Message::Pong(_) => "pong",
            Message::Progress { .. } => "progress",
            Message::Prepared(_) => "prepared",
            Message::Running { .. } => "running",
            Message::Join(_) => "join",
            Message::Fence { .. } => "fence",
        }
    }

    /// How long the bulk data are that follow the fields.
    pub fn data_bytes(&self) -> usize {
        self.data().len()
    }

    /// The bulk data that follow the fields on the wire without being copied.
    pub(super) fn data(&self) -> &'a [u8] {
        match self {
            Message::Pages(pages) => pages.data,
            Message::DeviceState(data) => data,
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Zero(_)
            | Message::Paused
            | Message::Digests(_)
            | Message::Load { .. }
            | Message::HandOver(_)
            | Message::Abort(_)
            | Message::Ping(_)
            | Message::Pong(_)
            | Message::Progress { .. }
            | Message::Prepared(_)
            | Message::Running { .. }
            | Message::Join(_)
            | Message::Fence { .. } => &[],
        }
    }

    /// Appends everything but [`Self::data`].
    pub(super) fn encode_fields(&self, out: &mut Vec<u8>) {
        match self {
            Message::Hello(hello) => encode_hello(hello, out),
            Message::Welcome(welcome) => {
                out.extend_from_slice(&MAGIC);
                out.put_u16(welcome.version);
                out.extend_from_slice(&welcome.migration.0);
                out.put_u32(welcome.encodings.0);
                out.put_u16(welcome.streams);
            }
            Message::Pages(pages) => {
                let (runs, encoding) = (&pages.runs, pages.encoding);
                assert!(runs.fit(), "{runs:?} in one frame");
                assert!(pages.fits(), "{} bytes for {runs:?} as {encoding:?}", pages.data.len());
                out.put_u64(runs[0].first.0);
                out.put_u32(runs.pages() as u32);
                out.put_u16(encoding.code() as u16);
                out.put_u16(runs.len() as u16 - 1);
                match encoding {
                    Encoding::Raw | Encoding::Lz4 | Encoding::Zstd => {}
                    Encoding::Delta { digest, .. } => out.put_u64(digest),
                    Encoding::Copy { digest } => out.extend_from_slice(&digest),
                }
                for pair in runs.windows(2) {
                    out.put_u16((pair[1].first.0 - pair[0].end()) as u16);
                    out.put_u16(pair[1].count as u16);
                }
            }
            Message::Zero(runs) => {
                assert!(runs.len() as u64 <= MAX_ZERO_RUNS_PER_FRAME, "{} zero runs in one frame", runs.len());
                out.put_u32(runs.len() as u32);
                for run in runs {
                    out.put_u64(run.first.0);
                    out.put_u64(run.count);
                }
            }
            Message::Paused | Message::DeviceState(_) => {}
            Message::Digests(digests) => {
                assert!(digests.digests.len() as u64 <= MAX_DIGESTS_PER_FRAME, "{} digests", digests.digests.len());
                out.put_u64(digests.first);
                out.put_u32(digests.digests.len() as u32);
                digests.digests.iter().for_each(|&digest| out.put_u64(digest));
            }
            Message::Load { device_state_bytes } => out.put_u64(*device_state_bytes),
            Message::HandOver(migration) => out.extend_from_slice(&migration.0),
            Message::Abort(abort) => {
                out.put_u8(match abort.fault {
                    Fault::Sender => 0,
                    Fault::Receiver => 1,
                    Fault::User => 2,
                });
                out.put_text(&abort.text, MAX_ABORT_TEXT_BYTES);
            }
            Message::Ping(number) | Message::Pong(number) => out.put_u64(*number),
            Message::Progress { bytes } => out.put_u64(*bytes),
            Message::Prepared(prepared) => {
                out.put_u64(prepared.verified_pages);
                out.put_u64(prepared.mismatched_pages);
                out.put_u64(prepared.first_mismatch);
                out.put_u64(prepared.load_us);
            }
            Message::Running { resume_us } => out.put_u64(*resume_us),
            Message::Join(join) => {
                out.extend_from_slice(&MAGIC);
                out.extend_from_slice(&join.migration.0);
                out.put_u16(join.stream);
            }
            Message::Fence { side_bytes } => out.put_u64(*side_bytes),
        }
    }

    /// Reads the message of type `kind`.
    pub(super) fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(payload);
        let message = match kind {
            kind::HELLO => Message::Hello(decode_hello(&mut reader)?),
            kind::WELCOME => {
                check_magic(&mut reader)?;
                let version = reader.u16("version")?;
                let migration = MigrationId(reader.id("migration id")?);
                let encodings = Encodings(reader.u32("encodings")?);
                Message::Welcome(Welcome { version, migration, encodings, streams: decode_streams(&mut reader)? })
            }
            kind::PAGES => Message::Pages(decode_pages(&mut reader)?),
            kind::ZERO => {
                let count = reader.count(MAX_ZERO_RUNS_PER_FRAME, "zero runs")?;
                let mut runs = Vec::with_capacity(count);
                for _ in 0..count {
                    runs.push(PageRun::new(reader.u64("zero run")?, reader.u64("zero run")?));
                }
                Message::Zero(runs)
            }
            kind::PAUSED => Message::Paused,
            kind::DEVICE_STATE => {
                let data = reader.rest();
                if data.len() > MAX_DEVICE_CHUNK_BYTES {
                    let (value, most) = (data.len() as u64, MAX_DEVICE_CHUNK_BYTES as u64);
                    return Err(WireError::TooMany { field: "device state", value, most });
                }
                Message::DeviceState(data)
            }
            kind::DIGESTS => {
                let first = reader.u64("first page")?;
                let count = reader.count(MAX_DIGESTS_PER_FRAME, "digests")?;
                if count == 0 {
                    return Err(WireError::BadValue { field: "digests", value: 0 });
                }
                let mut digests = Vec::with_capacity(count);
                for _ in 0..count {
                    digests.push(reader.u64("digest")?);
                }
                Message::Digests(Digests { first, digests })
            }
            kind::LOAD => Message::Load { device_state_bytes: reader.u64("device state bytes")? },
            kind::HAND_OVER => Message::HandOver(MigrationId(reader.id("migration id")?)),
            kind::ABORT => {
                let fault = match reader.u8("fault")? {
                    0 => Fault::Sender,
                    1 => Fault::Receiver,
                    2 => Fault::User,
                    other => return Err(WireError::BadValue { field: "fault", value: u64::from(other) }),
                };
                Message::Abort(Abort { fault, text: reader.text(MAX_ABORT_TEXT_BYTES, "abort text")? })
            }
            kind::PING => Message::Ping(reader.u64("number")?),
            kind::PONG => Message::Pong(reader.u64("number")?),
            kind::PROGRESS => Message::Progress { bytes: reader.u64("bytes")? },
            kind::PREPARED => Message::Prepared(Prepared {
                verified_pages: reader.u64("verified pages")?,
                mismatched_pages: reader.u64("mismatched pages")?,
                first_mismatch: reader.u64("first mismatch")?,
                load_us: reader.u64("load time")?,
            }),
            kind::RUNNING => Message::Running { resume_us: reader.u64("resume time")? },
            kind::JOIN => {
                check_magic(&mut reader)?;
                let migration = MigrationId(reader.id("migration id")?);
                Message::Join(Join { migration, stream: reader.u16("stream")? })
            }
            kind::FENCE => Message::Fence { side_bytes: reader.u64("side bytes")? },
            _ => return Err(WireError::UnknownMessage { kind }),
        };
        reader.finish()?;
        Ok(message)
    }
}

/// The bit of a hello's flags that announces digests.
const FLAG_VERIFY: u16 = 1;

fn encode_hello(hello: &Hello, out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC);
    out.put_u16(hello.version_min);
    out.put_u16(hello.version_max);
    out.put_u32(PAGE_BYTES as u32);
    out.extend_from_slice(&hello.migration.0);
    out.put_u32(hello.vcpus);
    out.put_u16(if hello.verify { FLAG_VERIFY } else { 0 });
    out.put_u32(hello.encodings.0);
    out.put_u16(hello.streams);
    out.put_text(&hello.machine, MAX_MACHINE_BYTES);
    out.put_u32(hello.layout.blocks().len() as u32);
    for block in hello.layout.blocks() {
        out.put_text(&block.id, MAX_BLOCK_ID_BYTES);
        out.put_u64(block.bytes);
    }
}

fn decode_hello(reader: &mut Reader<'_>) -> Result<Hello, WireError> {
    check_magic(reader)?;
    let version_min = reader.u16("oldest version")?;
    let version_max = reader.u16("newest version")?;
    let page_bytes = reader.u32("page size")?;
    if u64::from(page_bytes) != PAGE_BYTES {
        return Err(WireError::BadValue { field: "page size", value: u64::from(page_bytes) });
    }
    let migration = MigrationId(reader.id("migration id")?);
    let vcpus = reader.u32("processors")?;
    let flags = reader.u16("flags")?;
    if flags & !FLAG_VERIFY != 0 {
        return Err(WireError::BadValue { field: "flags", value: u64::from(flags) });
    }
    let encodings = Encodings(reader.u32("encodings")?);
    let streams = decode_streams(reader)?;
    let machine = reader.text(MAX_MACHINE_BYTES, "machine type")?;
    let count = reader.count(MAX_BLOCKS as u64, "RAM blocks")?;
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        let id = reader.text(MAX_BLOCK_ID_BYTES, "RAM block name")?;
        blocks.push(RamBlock { id, bytes: reader.u64("RAM block size")? });
    }
    let layout = RamLayout::new(blocks).map_err(WireError::Layout)?;
    let verify = flags & FLAG_VERIFY != 0;
    Ok(Hello { version_min, version_max, migration, layout, machine, vcpus, verify, encodings, streams })
}

fn decode_streams(reader: &mut Reader<'_>) -> Result<u16, WireError> {
    match reader.u16("streams")? {
        streams @ 1..=MAX_STREAMS => Ok(streams),
        other => Err(WireError::BadValue { field: "streams", value: u64::from(other) }),
    }
}

fn decode_pages<'a>(reader: &mut Reader<'a>) -> Result<Pages<'a>, WireError> {
    let first = reader.u64("first page")?;
    let count = reader.count(MAX_PAGES_PER_FRAME, "pages")? as u64;
    let code = reader.u16("encoding")?;
    let further = usize::from(reader.u16("further runs")?);
    let encoding = match code {
        0 => Encoding::Raw,
        1 => Encoding::Lz4,
        2 => Encoding::Zstd,
        3 => Encoding::Delta { codec: DeltaCodec::Plain, digest: reader.u64("digest")? },
        4 => Encoding::Delta { codec: DeltaCodec::Lz4, digest: reader.u64("digest")? },
        5 => Encoding::Delta { codec: DeltaCodec::Zstd, digest: reader.u64("digest")? },
        6 => Encoding::Copy { digest: reader.array("digest")? },
        other => return Err(WireError::BadValue { field: "encoding", value: u64::from(other) }),
    };
    let runs = decode_runs(reader, first, count, further)?;
    let data = match encoding.data_bytes(count, further) {
        DataBytes::Exactly(bytes) => reader.bytes(bytes as usize, "page data")?,
        DataBytes::AtMost(most) => {
            let data = reader.rest();
            if data.is_empty() {
                return Err(WireError::Truncated { field: "page data" });
            }
            if data.len() as u64 > most {
                return Err(WireError::TooMany { field: "page data", value: data.len() as u64, most });
            }
            data
        }
    };
    Ok(Pages { runs, encoding, data })
}

/// The runs of so many pages: the first one, and those that are written by their distance.
fn decode_runs(
    reader: &mut Reader<'_>,
    first: u64,
    pages: u64,
    further: usize,
) -> Result<PageRuns<'static>, WireError> {
    if further == 0 {
        return Ok(PageRuns::One(PageRun::new(first, pages)));
    }
    if further as u64 >= pages {
        // Each has a page at least.
        return Err(WireError::TooMany { field: "further runs", value: further as u64, most: pages.saturating_sub(1) });
    }
    let mut runs = Vec::with_capacity(1 + further);
    runs.push(PageRun::new(first, 0));
    let mut left = pages;
    // Where the first one ends depends on how many pages the others have.
    let mut distances = [(0, 0); MAX_PAGES_PER_FRAME as usize];
    for (gap, count) in &mut distances[..further] {
        *gap = reader.u16("distance of a run")?;
        *count = reader.u16("pages of a run")?;
        let bad = |field| WireError::BadValue { field, value: 0 };
        if *gap == 0 {
            return Err(bad("distance of a run"));
        }
        if *count == 0 {
            return Err(bad("pages of a run"));
        }
        left = left.checked_sub(u64::from(*count)).filter(|&left| left > 0).ok_or(WireError::TooMany {
            field: "pages of a run",
            value: u64::from(*count),
            most: left - 1,
        })?;
    }
    runs[0].count = left;
    for &(gap, count) in &distances[..further] {
        let before = runs[runs.len() - 1];
        let start = before.first.0.checked_add(before.count + u64::from(gap));
        let start = start.ok_or(WireError::BadValue { field: "first page", value: first })?;
        runs.push(PageRun::new(start, u64::from(count)));
    }
    Ok(PageRuns::Several(Cow::Owned(runs)))
}

fn check_magic(reader: &mut Reader<'_>) -> Result<(), WireError> {
    if reader.bytes(MAGIC.len(), "magic")? == MAGIC { Ok(()) } else { Err(WireError::BadMagic) }
}
