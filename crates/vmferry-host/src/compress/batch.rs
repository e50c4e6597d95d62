//! A batch of pages on its way from guest RAM to the link: read by the driver, encoded by whoever is free, sent by the
//! driver, and used again.

use std::ops::Range;
use std::time::Duration;

use vmferry_core::pages::{PAGE_BYTES, PageNumber, PageRun};
use vmferry_core::wire::{Encoding, MAX_PAGES_PER_FRAME, PageRuns, Pages, page_digest, stream_of};

use super::cache::DeltaCache;
use super::codec::{Codec, Outlook, PageEncoder};
use super::delta::{append_changes, apply_changes};
use super::is_zero;
use super::twins::{Twin, Twins, copy_digest};
use crate::buffer::Buffer;
use crate::clock::processor_time;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages in a batch: enough for a compressor to see much of what repeats, few enough for several processors to have a share
/// in a chunk.
pub(crate) const BATCH_PAGES: u64 = 64;
/// Pages in a batch where one processor is enough: a compressor makes a few percent less of more at once.
pub(crate) const LARGE_BATCH_PAGES: u64 = MAX_PAGES_PER_FRAME;
/// An encoding that saves less than this part of the bytes is not worth the target's time.
const SAVING_MIN_PARTS: usize = 16;
/// A page goes as its changes if they are at most this share of what the codec is expected to leave of it.
const DELTA_SHARE: f64 = 0.75;
/// Or at most this share of the page. What is expected is that of other pages: changes that are more than a page had to be cost
/// little against a page as it is.
const DELTA_CHANGED_MIN: f64 = 0.25;
/// How fast the driver compares pages. Not measured: to ask for a thread's time takes as long as a page.
const COMPARED_BYTES_PER_S: f64 = 4e9;
/// So many neighbours that the codec makes no smaller are not encoded with others.
const ALONE_PAGES: u64 = 16;

/// What was measured of one codec.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Cost {
    /// Bytes of pages encoded,
    pub(crate) content_bytes: u64,
    /// what they became,
    pub(crate) encoded_bytes: u64,
    /// and how much processor time that took.
    pub(crate) time: Duration,
}

impl Cost {
    fn add(&mut self, content_bytes: usize, encoded_bytes: usize, began: Duration) {
        self.content_bytes += content_bytes as u64;
        self.encoded_bytes += encoded_bytes as u64;
        self.time += processor_time().saturating_sub(began);
    }
}

/// What a batch cost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Costs {
    /// What the batch's codec made of pages.
    pub(crate) codec: Cost,
    /// What the light one made of others.
    pub(crate) light: Cost,
    /// What the codec that was tried made of the same pages.
    pub(crate) trial: Cost,
    /// What deltas came to, with the time for comparing pages.
    pub(crate) delta: Cost,
    /// All the processor time that encoding the batch took.
    pub(crate) time: Duration,
}

/// What becomes of some pages of a batch.
#[derive(Debug, Clone, PartialEq)]
struct Frame {
    /// Which, in `frame_runs`.
    runs: Range<usize>,
    form: Form,
}

#[derive(Debug, Clone, PartialEq)]
enum Form {
    Zero,
    Raw,
    Encoded { encoding: Encoding, data: Range<usize> },
}

/// What is to be sent of a batch, with the pages' own content.
#[derive(Debug)]
pub(crate) enum Content<'a> {
    /// These pages are zero.
    Zero(PageRun),
    /// These pages, encoded or not; and what they hold.
    Pages(Pages<'a>, Held<'a>),
}

/// What pages hold, run by run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held<'a> {
    runs: &'a [Placed],
    content: &'a [u8],
    compared: &'a [Compared],
}

impl<'a> Held<'a> {
    /// Each page that is not up to date in the cache.
    pub(crate) fn new_pages(self) -> impl Iterator<Item = (PageNumber, &'a [u8])> {
        self.runs.iter().flat_map(move |placed| {
            let pages = placed.run.pages().zip(placed.at..);
            let are_new = pages.filter(move |&(_, at)| self.compared.get(at).is_none_or(|page| *page == Compared::New));
            are_new.map(move |(page, at)| (page, &self.content[at * PAGE..][..PAGE]))
        })
    }
}

/// Neighbouring pages of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Placed {
    run: PageRun,
    /// How many pages of the batch come before.
    at: usize,
}

impl Placed {
    /// Where they are in the batch's content.
    fn bytes(&self) -> Range<usize> {
        self.at * PAGE..(self.at + self.run.count as usize) * PAGE
    }
}

/// Pages to be encoded, or encoded.
#[derive(Debug)]
pub(crate) struct Batch {
    /// What to try.
    pub(crate) codec: Codec,
    /// What to try instead with pages of which others leave no less.
    pub(crate) light: Option<Codec>,
    /// What share of the pages' bytes the codecs are expected to leave.
    pub(crate) expected_share: f64,
    /// Another codec, to see what it does to the same pages.
    pub(crate) trial: Option<Codec>,
    /// The most pages to take.
    pub(crate) pages_max: u64,
    /// Pages are compared with what the target has of them, and those that are written again are kept once they are sent.
    pub(crate) keeps: bool,
    runs: Vec<PageRun>,
    content: Buffer,
    /// For each page that was compared, what came of it.
    compared: Vec<Compared>,
    changes: Vec<u8>,
    /// For each page for which it was asked, which one it is a copy of.
    twins: Vec<Option<Twin>>,
    /// The connections that there are; pages of different ones go in different frames.
    pub(crate) streams: u16,
    /// Pages that go together, for each connection, by their kind.
    groups: Vec<[Vec<Placed>; Kind::GROUPED]>,
    frames: Vec<Frame>,
    /// The runs of all frames, one after another, and where they are.
    frame_runs: Vec<PageRun>,
    frame_places: Vec<Placed>,
    out: Buffer,
    /// Pages that are not neighbours, and their changes, as one piece.
    gathered: Vec<u8>,
    gathered_changes: Vec<u8>,
    costs: Costs,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            codec: Codec::Raw,
            light: None,
            expected_share: 1.0,
            trial: None,
            pages_max: BATCH_PAGES,
            keeps: false,
            runs: Vec::new(),
            content: Buffer::default(),
            compared: Vec::new(),
            changes: Vec::new(),
            twins: Vec::new(),
            streams: 1,
            groups: Vec::new(),
            frames: Vec::new(),
            frame_runs: Vec::new(),
            frame_places: Vec::new(),
            out: Buffer::default(),
            gathered: Vec::new(),
            gathered_changes: Vec::new(),
            costs: Costs::default(),
        }
    }

    /// Empties it for other pages; what it occupies stays.
    pub(crate) fn clear(&mut self) {
        (self.codec, self.light, self.expected_share, self.trial) = (Codec::Raw, None, 1.0, None);
        (self.pages_max, self.keeps, self.streams) = (BATCH_PAGES, false, 1);
        self.costs = Costs::default();
        self.runs.clear();
        self.content.truncate(0);
        self.compared.clear();
        self.changes.clear();
        self.twins.clear();
        self.frames.clear();
        self.frame_runs.clear();
        self.frame_places.clear();
        self.out.truncate(0);
    }

    /// How many more pages it takes.
    pub(crate) fn room_pages(&self) -> u64 {
        self.pages_max.saturating_sub((self.content.len() / PAGE) as u64)
    }

    /// Adds pages, whose content `read` gives, at most as many as there is room for.
    ///
    /// # Errors
    /// That of `read`; the batch is then as it was before.
    pub(crate) fn read<E>(&mut self, run: PageRun, read: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        assert!(run.count <= self.room_pages(), "{run:?} does not fit");
        let start = self.content.len();
        if let Err(error) = read(self.content.grow(run.count as usize * PAGE)) {
            self.content.truncate(start);
            return Err(error);
        }
        self.runs.push(run);
        Ok(())
    }

    /// Compares the pages that were just read with what the target has of them, and brings the cache up to date where it has
    /// them. To be called after each reading, or not at all.
    pub(crate) fn compare(&mut self, cache: &mut DeltaCache) {
        let expected = if self.codec == Codec::Raw { 1.0 } else { self.expected_share };
        let most = ((expected * DELTA_SHARE).max(DELTA_CHANGED_MIN) * PAGE as f64) as usize;
        let Some(run) = self.runs.last() else { return };
        let read = &self.content[self.content.len() - run.count as usize * PAGE..];
        for (page, content) in run.pages().zip(read.chunks_exact(PAGE)) {
            let Some(base) = cache.get(page) else {
                self.compared.push(Compared::New);
                continue;
            };
            let start = self.changes.len();
            if append_changes(content, base, most, &mut self.changes) {
                apply_changes(&self.changes[start..], base).expect("changes that were just found");
                self.compared.push(Compared::Changed(start..self.changes.len()));
            } else {
                base.copy_from_slice(content);
                self.compared.push(Compared::Other);
            }
        }
    }

    /// Looks whether the target has other pages with the content of those that were just read and compared, unless it has them
    /// but for what has changed. To be called after each reading, or not at all.
    pub(crate) fn find_twins(&mut self, twins: &mut Twins) {
        if self.twins.is_empty() {
            twins.begin_batch();
        }
        let Some(run) = self.runs.last() else { return };
        let first = self.content.len() / PAGE - run.count as usize;
        for (page, at) in run.pages().zip(first..) {
            let content = &self.content[at * PAGE..][..PAGE];
            let is_delta = matches!(self.compared.get(at), Some(Compared::Changed(_)));
            self.twins.push(if is_delta || is_zero(content) {
                twins.forget(page);
                None
            } else {
                twins.find(page, content)
            });
        }
    }

    /// What it cost, once encoded.
    pub(crate) fn costs(&self) -> Costs {
        self.costs
    }

    /// What is to be sent.
    pub(crate) fn contents(&self) -> impl Iterator<Item = Content<'_>> {
        self.frames.iter().map(|frame| {
            let runs = &self.frame_runs[frame.runs.clone()];
            let held =
                Held { runs: &self.frame_places[frame.runs.clone()], content: &self.content, compared: &self.compared };
            match &frame.form {
                Form::Zero => Content::Zero(runs[0]),
                Form::Raw => {
                    let content = &self.content[held.runs[0].bytes()];
                    Content::Pages(Pages::raw(runs[0], content), held)
                }
                Form::Encoded { encoding, data } => {
                    let (runs, data) = (PageRuns::of(runs), &self.out[data.clone()]);
                    Content::Pages(Pages { runs, encoding: *encoding, data }, held)
                }
            }
        })
    }

    /// Decides for each stretch of neighbouring pages how it goes, and encodes what is to be encoded, as much as possible of
    /// it together.
    pub(crate) fn encode(&mut self, encoder: &mut PageEncoder) {
        let began = processor_time();
        self.groups.resize_with(usize::from(self.streams), Default::default);
        let kinds: Vec<Kind> = (0..self.content.len() / PAGE).map(|page| self.kind(page)).collect();
        // What is copied from may itself be among what follows, and what is copied to is.
        for part in [&[Kind::CopyBefore][..], &[Kind::Zero, Kind::Based, Kind::New], &[Kind::CopyWithin]] {
            let mut at = 0;
            for index in 0..self.runs.len() {
                for (run, kind) in self.runs[index].stretches(kinds[at..].iter().copied()) {
                    if part.contains(&kind) {
                        self.sort_in(encoder, kind, Placed { run, at });
                    }
                    at += run.count as usize;
                }
            }
            for stream in 0..usize::from(self.streams) {
                part.iter().for_each(|&kind| self.encode_group(encoder, stream, kind));
            }
        }
        self.costs.time = processor_time().saturating_sub(began);
    }

    fn kind(&self, page: usize) -> Kind {
        let content = &self.content[page * PAGE..][..PAGE];
        if is_zero(content) {
            return Kind::Zero;
        }
        match (self.twins.get(page), self.compared.get(page)) {
            (Some(Some(Twin::Before(_))), _) => Kind::CopyBefore,
            (Some(Some(Twin::Within(_))), _) => Kind::CopyWithin,
            (_, Some(Compared::Changed(_))) => Kind::Based,
            _ => Kind::New,
        }
    }

    /// Puts neighbours of one kind with those that they go with.
    fn sort_in(&mut self, encoder: &mut PageEncoder, kind: Kind, placed: Placed) {
        if kind == Kind::Zero {
            return self.push_frame(&[placed], Form::Zero);
        }
        let goes_alone = kind == Kind::New
            && (self.tried().next().is_none()
                || (placed.run.count >= ALONE_PAGES
                    && encoder.outlook(&self.content[placed.bytes()]) == Outlook::Incompressible));
        if goes_alone {
            return self.push_frame(&[placed], Form::Raw);
        }
        let stream = usize::from(stream_of(placed.run.first, self.streams));
        let last = self.groups[stream][kind as usize].last();
        if last.is_some_and(|last| !PageRuns::may_follow(last.run, placed.run)) {
            self.encode_group(encoder, stream, kind);
        }
        self.groups[stream][kind as usize].push(placed);
    }

    /// Encodes pages that go together: as copies, as changes or by themselves.
    fn encode_group(&mut self, encoder: &mut PageEncoder, stream: usize, kind: Kind) {
        let Some(group) = self.groups[stream].get_mut(kind as usize) else { return };
        let mut group = std::mem::take(group);
        if !group.is_empty() {
            let form = match kind {
                Kind::CopyBefore | Kind::CopyWithin => Some(self.copies(&group)),
                Kind::Based => self.delta(encoder, &group).or_else(|| self.plain(encoder, &group)),
                Kind::New | Kind::Zero => self.plain(encoder, &group),
            };
            match form {
                Some(form) => self.push_frame(&group, form),
                None => group.iter().for_each(|placed| self.push_frame(&[*placed], Form::Raw)),
            }
        }
        group.clear();
        self.groups[stream][kind as usize] = group;
    }

    fn push_frame(&mut self, group: &[Placed], form: Form) {
        let start = self.frame_runs.len();
        self.frame_runs.extend(group.iter().map(|placed| placed.run));
        self.frame_places.extend_from_slice(group);
        self.frames.push(Frame { runs: start..self.frame_runs.len(), form });
    }

    /// The codecs that the pages are encoded by.
    fn tried(&self) -> impl Iterator<Item = Codec> + use<> {
        [Some(self.codec), self.trial].into_iter().flatten().filter(|codec| *codec != Codec::Raw)
    }

    /// Encodes pages by themselves; `None` where they are to go as they are.
    fn plain(&mut self, encoder: &mut PageEncoder, group: &[Placed]) -> Option<Form> {
        let mut tried = self.tried().peekable();
        tried.peek()?;
        let content = together(&self.content, &mut self.gathered, group.iter().map(Placed::bytes));
        let light = match encoder.outlook(content) {
            Outlook::Incompressible => return None,
            Outlook::Repeats => self.light,
            Outlook::Uneven => None,
        };
        let mut best = None;
        let mut best_bytes = most_worth_sending(content.len());
        for codec in light.into_iter().chain(tried.filter(|_| light.is_none())) {
            let start = self.out.len();
            let began = processor_time();
            let Some(bytes) = encoder.encode(codec, content, &mut self.out) else { continue };
            let cost = match codec {
                _ if light.is_some() => &mut self.costs.light,
                _ if codec == self.codec => &mut self.costs.codec,
                _ => &mut self.costs.trial,
            };
            cost.add(content.len(), bytes, began);
            if bytes <= best_bytes {
                best_bytes = bytes;
                best = Some(Form::Encoded { encoding: codec.encoding(), data: start..start + bytes });
            } else {
                self.out.truncate(start);
            }
        }
        best
    }

    /// Pages as copies of others.
    fn copies(&mut self, group: &[Placed]) -> Form {
        let content = together(&self.content, &mut self.gathered, group.iter().map(Placed::bytes));
        let digest = copy_digest(content);
        let start = self.out.len();
        for page in group.iter().flat_map(|placed| placed.at..placed.at + placed.run.count as usize) {
            let (Twin::Before(source) | Twin::Within(source)) = self.twins[page].expect("it is a copy");
            self.out.append(&source.0.to_le_bytes());
        }
        Form::Encoded { encoding: Encoding::Copy { digest }, data: start..self.out.len() }
    }

    /// Encodes the changes of pages; `None` where that saves nothing.
    fn delta(&mut self, encoder: &mut PageEncoder, group: &[Placed]) -> Option<Form> {
        let content = together(&self.content, &mut self.gathered, group.iter().map(Placed::bytes));
        let pages = group.iter().flat_map(|placed| placed.at..placed.at + placed.run.count as usize);
        let changes =
            together(&self.changes, &mut self.gathered_changes, pages.filter_map(|page| self.compared[page].changes()));
        let start = self.out.len();
        let began = processor_time();
        let codec = encoder.encode_changes(self.codec, changes, &mut self.out);
        let bytes = self.out.len() - start;
        let digest = page_digest(content);
        self.costs.delta.add(content.len(), bytes, began);
        self.costs.delta.time += Duration::from_secs_f64(content.len() as f64 / COMPARED_BYTES_PER_S);
        if bytes > most_worth_sending(content.len()) {
            self.out.truncate(start);
            return None;
        }
        Some(Form::Encoded { encoding: Encoding::Delta { codec, digest }, data: start..start + bytes })
    }
}

/// Pieces of `all` one after another: as they are if they are neighbours, else in a buffer.
fn together<'a>(
    all: &'a [u8],
    buffer: &'a mut Vec<u8>,
    pieces: impl Iterator<Item = Range<usize>> + Clone,
) -> &'a [u8] {
    let mut rest = pieces.clone();
    let first = rest.next().unwrap_or(0..0);
    let end = rest.try_fold(first.end, |end, piece| (piece.start == end).then_some(piece.end));
    if let Some(end) = end {
        return &all[first.start..end];
    }
    buffer.clear();
    pieces.for_each(|piece| buffer.extend_from_slice(&all[piece]));
    buffer
}

/// What came of comparing a page with what the target has.
#[derive(Debug, Clone, PartialEq)]
enum Compared {
    /// The target does not have it, as far as is known.
    New,
    /// The target has it, and it has changed a lot. It is in the cache.
    Other,
    /// The target has it but for these changes. It is in the cache.
    Changed(Range<usize>),
}

impl Compared {
    fn changes(&self) -> Option<Range<usize>> {
        match self {
            Self::Changed(changes) => Some(changes.clone()),
            Self::New | Self::Other => None,
        }
    }
}

/// What kind of page it is to the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    New,
    /// The target has it but for a few changes.
    Based,
    /// The target has another page with its content before it has any of the batch.
    CopyBefore,
    /// The target has another page with its content when it has those of the batch that are no copies.
    CopyWithin,
    Zero,
}

impl Kind {
    /// The kinds of which pages go together, neighbours or not.
    const GROUPED: usize = Self::Zero as usize;
}

/// The most bytes that are worth decoding, of so many; with that, they are few enough for the protocol.
fn most_worth_sending(content_bytes: usize) -> usize {
    content_bytes - content_bytes / SAVING_MIN_PARTS
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};

    use proptest::prelude::*;
    use vmferry_core::wire::{FrameWriter, Message};

    use super::*;
    use crate::compress::PageDecoder;

    /// The memory of a target that reads what is sent.
    #[derive(Default)]
    struct Target {
        pages: HashMap<PageNumber, Vec<u8>>,
        decoder: Option<PageDecoder>,
    }

    impl Target {
        fn take_in(&mut self, content: &Content<'_>) {
            match content {
                Content::Zero(run) => run.pages().for_each(|page| drop(self.pages.insert(page, vec![0; PAGE]))),
                Content::Pages(pages, held) => {
                    let numbers: Vec<PageNumber> = pages.runs.iter().flat_map(|run| run.pages()).collect();
                    assert!(held.new_pages().all(|(page, _)| numbers.contains(&page)));
                    self.write(pages);
                }
            }
        }

        fn write(&mut self, pages: &Pages<'_>) {
            let numbers: Vec<PageNumber> = pages.runs.iter().flat_map(|run| run.pages()).collect();
            let sources: Vec<PageNumber> = pages.sources().collect();
            let here = &self.pages;
            let read = |to: &mut [u8]| {
                let from = if sources.is_empty() { &numbers } else { &sources };
                to.chunks_mut(PAGE).zip(from).for_each(|(to, page)| to.copy_from_slice(&here[page]));
                Ok(())
            };
            let decoder = self.decoder.get_or_insert_with(PageDecoder::new);
            let decoded =
                decoder.decode(numbers.len() as u64, pages.encoding, pages.data, read).expect("right").to_vec();
            for (page, content) in numbers.into_iter().zip(decoded.chunks(PAGE)) {
                self.pages.insert(page, content.to_vec());
            }
        }
    }

    fn page_of(kind: u8, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut noise = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        match kind {
            0 => vec![0; PAGE],
            1 => (0..PAGE).map(|_| noise()).collect(),
            2 => vec![seed as u8 | 1; PAGE],
            _ => (0..PAGE).map(|at| if at.is_multiple_of(8) { noise() } else { 7 }).collect(),
        }
    }

    fn send(batch: &mut Batch, encoder: &mut PageEncoder, cache: &mut DeltaCache, target: &mut Target) -> u64 {
        let mut bytes = 0;
        batch.encode(encoder);
        // Each of them is a frame that can be written.
        let mut writer = FrameWriter::new();
        for content in batch.contents() {
            if let Content::Pages(pages, _) = content {
                let stream = stream_of(pages.runs[0].first, batch.streams);
                assert!(pages.runs.iter().all(|run| stream_of(run.first, batch.streams) == stream));
                writer.seal(&Message::Pages(pages), &mut Vec::new());
            }
        }
        for content in batch.contents() {
            target.take_in(&content);
            match content {
                Content::Zero(run) => run.pages().for_each(|page| cache.remove(page)),
                Content::Pages(pages, held) => {
                    bytes += pages.data.len() as u64;
                    for (page, content) in held.new_pages() {
                        // Some are kept, others not.
                        if page.0.is_multiple_of(5) { cache.remove(page) } else { cache.put(page, content) }
                    }
                }
            }
        }
        bytes
    }

    fn read(batch: &mut Batch, run: PageRun, memory: &HashMap<u64, Vec<u8>>, cache: &mut DeltaCache) {
        let all: Vec<u8> = run.pages().flat_map(|page| memory[&page.0].clone()).collect();
        batch
            .read(run, |to| {
                to.copy_from_slice(&all);
                Ok::<_, ()>(())
            })
            .unwrap();
        batch.compare(cache);
    }

    proptest! {
        /// Pages that change in any way are sent again and again, in any batches and by any codec: the target has them.
        #[test]
        fn the_target_has_what_was_read(
            cached_pages in 0..20_u64,
            rounds in prop::collection::vec((
                0..5_usize,
                prop::option::of(1..5_usize),
                any::<bool>(),
                prop::collection::vec((0..30_u64, 0..5_u8, any::<u64>()), 0..12),
                prop::collection::vec((0..30_u64, 1..8_u64), 1..6),
            ), 1..12),
        ) {
            let codecs = [&[Codec::Raw][..], &Codec::ENCODING].concat();
            let mut memory: HashMap<u64, Vec<u8>> = (0..40).map(|page| (page, vec![0; PAGE])).collect();
            let mut target = Target::default();
            let (mut encoder, mut batch) = (PageEncoder::new(), Batch::new());
            let mut cache = DeltaCache::new(cached_pages * PAGE_BYTES);
            for (codec, trial, light, writes, runs) in rounds {
                for (page, kind, seed) in writes {
                    let content = memory.get_mut(&page).unwrap();
                    if kind == 4 {
                        content[seed as usize % PAGE] ^= 0x55;
                    } else {
                        *content = page_of(kind, seed);
                    }
                }
                batch.clear();
                batch.codec = codecs[codec];
                batch.trial = trial.map(|trial| codecs[trial]);
                batch.light = light.then_some(Codec::Lz4);
                batch.expected_share = 0.4;
                let mut end = 0;
                for (skip, count) in runs {
                    let run = PageRun::new(end + skip % 4, count);
                    end = run.end();
                    if end <= 40 {
                        read(&mut batch, run, &memory, &mut cache);
                    }
                }
                let sent: Vec<PageRun> = batch.runs.clone();
                send(&mut batch, &mut encoder, &mut cache, &mut target);
                for page in sent.iter().flat_map(|run| run.pages()) {
                    prop_assert!(target.pages[&page] == memory[&page.0], "{:?} by {:?}", page, codecs[codec]);
                }
            }
        }
    }

    /// A frame that is under way.
    #[derive(Debug)]
    struct UnderWay {
        runs: Vec<PageRun>,
        encoding: Encoding,
        data: Vec<u8>,
    }

    proptest! {
        /// Many pages have the same content, are written, and sent again, by connections that overtake each other.
        #[test]
        fn copies_are_of_what_the_target_has(
            streams in 1..4_u16,
            cached_pages in 0..10_u64,
            rounds in prop::collection::vec((
                0..3_usize,
                prop::collection::vec((0..30_u64, 0..4_u8, 0..4_u64), 0..15),
                prop::collection::vec((0..3_u64, 0..10_u64, 1..5_u64, any::<bool>()), 1..12),
                prop::collection::vec(0..3_usize, 0..30),
            ), 1..10),
        ) {
            let number = |index: u64| PageNumber(index / 10 * 256 + index % 10);
            let mut memory: HashMap<u64, Vec<u8>> = (0..30).map(|index| (number(index).0, vec![0; PAGE])).collect();
            let mut target = Target::default();
            let mut encoder = PageEncoder::new();
            let mut cache = DeltaCache::new(cached_pages * PAGE_BYTES);
            let mut twins = Twins::new(768, 5);
            twins.set_streams(streams);
            let mut queues: Vec<VecDeque<UnderWay>> = (0..streams).map(|_| Default::default()).collect();
            let arrive = |queues: &mut Vec<VecDeque<UnderWay>>, target: &mut Target, stream: usize| {
                let Some(frame) = queues.get_mut(stream).and_then(|queue| queue.pop_front()) else { return };
                if frame.data.is_empty() {
                    frame.runs.iter().flat_map(|run| run.pages()).for_each(|page| drop(target.pages.insert(page, vec![0; PAGE])));
                } else {
                    target.write(&Pages { runs: PageRuns::of(&frame.runs), encoding: frame.encoding, data: &frame.data });
                }
            };
            for (codec, writes, runs, arrivals) in rounds {
                for (index, kind, seed) in writes {
                    memory.insert(number(index).0, page_of(kind, seed));
                }
                // An action has each page once, in batches; zero pages go at its end.
                let mut in_action = Vec::new();
                let mut zeros = Vec::new();
                let mut batch = Batch::new();
                let mut send = |batch: &mut Batch, cache: &mut DeltaCache| {
                    batch.encode(&mut encoder);
                    for content in batch.contents() {
                        match content {
                            Content::Zero(run) => {
                                run.pages().for_each(|page| cache.remove(page));
                                zeros.push(run);
                            }
                            Content::Pages(pages, held) => {
                                let stream = stream_of(pages.runs[0].first, streams);
                                assert!(pages.sources().all(|source| stream_of(source, streams) == stream));
                                FrameWriter::new().seal(&Message::Pages(pages.clone()), &mut Vec::new());
                                held.new_pages().for_each(|(page, content)| cache.put(page, content));
                                let (runs, data) = (pages.runs.to_vec(), pages.data.to_vec());
                                queues[usize::from(stream)].push_back(UnderWay { runs, encoding: pages.encoding, data });
                            }
                        }
                    }
                    batch.clear();
                };
                for (block, first, count, is_last) in runs {
                    let run = PageRun::new(block * 256 + first, count.min(10 - first));
                    if run.pages().any(|page| in_action.contains(&page)) {
                        continue;
                    }
                    if batch.runs.last().is_some_and(|last| last.first > run.first) {
                        send(&mut batch, &mut cache);
                    }
                    in_action.extend(run.pages());
                    (batch.codec, batch.streams, batch.expected_share) = ([Codec::Raw, Codec::Lz4, Codec::Zstd1][codec], streams, 0.5);
                    read(&mut batch, run, &memory, &mut cache);
                    batch.find_twins(&mut twins);
                    if is_last {
                        send(&mut batch, &mut cache);
                    }
                }
                send(&mut batch, &mut cache);
                for run in zeros {
                    run.pages().for_each(|page| twins.forget(page));
                    let zero = UnderWay { runs: vec![run], encoding: Encoding::Raw, data: Vec::new() };
                    queues[usize::from(stream_of(run.first, streams))].push_back(zero);
                }
                arrivals.into_iter().for_each(|stream| arrive(&mut queues, &mut target, stream));
            }
            // All of it once more, and everything arrives.
            let mut batch = Batch::new();
            (batch.codec, batch.streams) = (Codec::Lz4, streams);
            for block in 0..3 {
                read(&mut batch, PageRun::new(block * 256, 10), &memory, &mut cache);
                batch.find_twins(&mut twins);
            }
            while queues.iter().any(|queue| !queue.is_empty()) {
                (0..usize::from(streams)).for_each(|stream| arrive(&mut queues, &mut target, stream));
            }
            send(&mut batch, &mut encoder, &mut cache, &mut target);
            for index in 0..30 {
                prop_assert!(target.pages[&number(index)] == memory[&number(index).0], "page {}", index);
            }
        }
    }

    #[test]
    fn pages_of_equal_content_go_once() {
        let memory: HashMap<u64, Vec<u8>> = (0..64).map(|page| (page, page_of(1, page % 8))).collect();
        let (mut encoder, mut batch, mut target) = (PageEncoder::new(), Batch::new(), Target::default());
        let (mut cache, mut twins) = (DeltaCache::new(0), Twins::new(1 << 16, 1));
        for (first, is_new) in [(0, true), (32, false)] {
            batch.clear();
            batch.codec = Codec::Lz4;
            read(&mut batch, PageRun::new(first, 32), &memory, &mut cache);
            batch.find_twins(&mut twins);
            let bytes = send(&mut batch, &mut encoder, &mut cache, &mut target);
            let expected = if is_new { 8 * PAGE as u64 + 24 * 8 } else { 32 * 8 };
            assert_eq!(bytes, expected, "from page {first}");
        }
        (0..64).for_each(|page| assert!(target.pages[&PageNumber(page)] == memory[&page]));
    }

    /// Of half random pages Zstandard leaves no less than LZ4, of text it does.
    #[test]
    fn content_that_only_repeats_goes_by_the_light_codec() {
        let half_random = |seed| {
            let mut page = page_of(1, seed);
            page[PAGE / 2..].fill(7);
            page
        };
        let text = |seed| page_of(1, seed).iter().map(|byte| b"etaoin shrdlu"[usize::from(byte % 13)]).collect();
        let memory: HashMap<u64, Vec<u8>> =
            (0..32).map(|page| (page, if page < 16 { half_random(page) } else { text(page) })).collect();
        let mut encoder = PageEncoder::new();
        for (light, expected) in [(Some(Codec::Lz4), Encoding::Lz4), (None, Encoding::Zstd)] {
            for (first, expected) in [(0, expected), (16, Encoding::Zstd)] {
                let (mut batch, mut target) = (Batch::new(), Target::default());
                let mut cache = DeltaCache::new(0);
                (batch.codec, batch.light) = (Codec::Zstd3, light);
                read(&mut batch, PageRun::new(first, 16), &memory, &mut cache);
                send(&mut batch, &mut encoder, &mut cache, &mut target);
                let costs = batch.costs();
                let of_light = expected == Encoding::Lz4;
                assert_eq!((costs.light.content_bytes > 0, costs.codec.content_bytes > 0), (of_light, !of_light));
                let [Frame { form: Form::Encoded { encoding, .. }, .. }] = &batch.frames[..] else {
                    panic!("{:?}", batch.frames)
                };
                assert_eq!(*encoding, expected, "from page {first}, {light:?}");
            }
        }
    }

    #[test]
    fn pages_go_in_the_shortest_form() {
        let memory: HashMap<u64, Vec<u8>> =
            [(0, page_of(0, 1)), (1, page_of(1, 1)), (2, page_of(2, 1)), (3, page_of(2, 2)), (4, page_of(1, 2))].into();
        let (mut encoder, mut batch, mut target) = (PageEncoder::new(), Batch::new(), Target::default());
        let mut cache = DeltaCache::new(1 << 20);
        let mut forms = |memory: &HashMap<u64, Vec<u8>>, codec| {
            batch.clear();
            (batch.codec, batch.expected_share) = (codec, 0.5);
            read(&mut batch, PageRun::new(0, 5), memory, &mut cache);
            send(&mut batch, &mut encoder, &mut cache, &mut target);
            let name = |form: &Form| match form {
                Form::Zero => "zero",
                Form::Raw => "raw",
                Form::Encoded { encoding: Encoding::Lz4, .. } => "lz4",
                Form::Encoded { encoding: Encoding::Delta { .. }, .. } => "delta",
                Form::Encoded { .. } => "other",
            };
            let pages = |frame: &Frame| batch.frame_runs[frame.runs.clone()].iter().map(|run| run.count).sum::<u64>();
            batch.frames.iter().map(|frame| (name(&frame.form), pages(frame))).collect::<Vec<_>>()
        };
        let first = forms(&memory, Codec::Lz4);
        // Noise and text in one stretch are sent as one frame, which is half as long.
        assert_eq!(first, [("zero", 1), ("lz4", 4)]);
        let mut changed = memory.clone();
        changed.get_mut(&1).unwrap()[77] ^= 1;
        changed.insert(2, page_of(1, 9));
        assert_eq!(forms(&changed, Codec::Raw), [("zero", 1), ("raw", 1), ("delta", 3)]);
        // All is new: nothing is gained by what was there.
        let other = (0..5).map(|page| (page, page_of(1, 100 + page))).collect();
        assert_eq!(forms(&other, Codec::Lz4), [("raw", 5)]);
    }
}
