//! A batch of pages on its way from guest RAM to the link: read by the driver, encoded by whoever is free, sent by the
//! driver, and used again.

use std::ops::Range;
use std::time::{Duration, Instant};

use vmferry_core::pages::{PAGE_BYTES, PageRun};
use vmferry_core::wire::{Encoding, MAX_PAGES_PER_FRAME, Pages, page_digest};

use super::codec::{Codec, PageEncoder};
use super::is_zero;

const PAGE: usize = PAGE_BYTES as usize;
/// Pages in a batch: enough for a compressor to see much of what repeats, few enough for several processors to have a share
/// in a chunk.
pub(crate) const BATCH_PAGES: u64 = 64;
/// Pages in a batch where one processor is enough: a compressor makes a few percent less of more at once.
pub(crate) const LARGE_BATCH_PAGES: u64 = MAX_PAGES_PER_FRAME;
/// An encoding that saves less than this part of the bytes is not worth the target's time.
const SAVING_MIN_PARTS: usize = 16;
/// A delta that takes at most this share of what the codec is expected to leave is taken without trying the codec.
const DELTA_SHARE: f64 = 0.75;

/// What was measured of one codec.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Cost {
    /// Bytes of pages encoded,
    pub(crate) content_bytes: u64,
    /// what they became,
    pub(crate) encoded_bytes: u64,
    /// and how long that took.
    pub(crate) time: Duration,
}

impl Cost {
    fn add(&mut self, content_bytes: usize, encoded_bytes: usize, began: Instant) {
        self.content_bytes += content_bytes as u64;
        self.encoded_bytes += encoded_bytes as u64;
        self.time += began.elapsed();
    }
}

/// What a batch cost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Costs {
    /// What the batch's codec made of pages.
    pub(crate) codec: Cost,
    /// What the codec that was tried made of the same pages.
    pub(crate) trial: Cost,
    /// What deltas came to.
    pub(crate) delta: Cost,
    /// All the time that the batch took.
    pub(crate) time: Duration,
}

/// What becomes of neighbouring pages of a batch.
#[derive(Debug, Clone, PartialEq)]
struct Frame {
    run: PageRun,
    /// Where they begin in the batch's content.
    start: usize,
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
    Pages(Pages<'a>, &'a [u8]),
}

/// Pages to be encoded, or encoded.
#[derive(Debug)]
pub(crate) struct Batch {
    /// What to try.
    pub(crate) codec: Codec,
    /// What share of the pages' bytes the codec is expected to leave.
    pub(crate) expected_share: f64,
    /// Another codec, to see what it does to the same pages.
    pub(crate) trial: Option<Codec>,
    /// The most pages to take.
    pub(crate) pages_max: u64,
    /// Pages that are written again are to be kept once they are sent.
    pub(crate) keeps: bool,
    runs: Vec<PageRun>,
    content: Vec<u8>,
    /// For each page, where its base begins in `bases`.
    base_at: Vec<Option<usize>>,
    bases: Vec<u8>,
    frames: Vec<Frame>,
    out: Vec<u8>,
    costs: Costs,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            codec: Codec::Raw,
            expected_share: 1.0,
            trial: None,
            pages_max: BATCH_PAGES,
            keeps: false,
            runs: Vec::new(),
            content: Vec::new(),
            base_at: Vec::new(),
            bases: Vec::new(),
            frames: Vec::new(),
            out: Vec::new(),
            costs: Costs::default(),
        }
    }

    /// Empties it for other pages; what it occupies stays.
    pub(crate) fn clear(&mut self) {
        let Self { codec, expected_share, trial, pages_max, keeps, runs, content, base_at, bases, frames, out, costs } =
            self;
        (*codec, *expected_share, *trial, *pages_max, *keeps) = (Codec::Raw, 1.0, None, BATCH_PAGES, false);
        *costs = Costs::default();
        runs.clear();
        content.clear();
        base_at.clear();
        bases.clear();
        frames.clear();
        out.clear();
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
        self.content.resize(start + run.count as usize * PAGE, 0);
        if let Err(error) = read(&mut self.content[start..]) {
            self.content.truncate(start);
            return Err(error);
        }
        self.runs.push(run);
        Ok(())
    }

    /// Says what the target has of the next page that was read and not spoken of yet. To be called for all of them, in
    /// order, or for none.
    pub(crate) fn push_base(&mut self, base: Option<&[u8]>) {
        self.base_at.push(base.map(|_| self.bases.len()));
        self.bases.extend_from_slice(base.unwrap_or_default());
    }

    /// What it cost, once encoded.
    pub(crate) fn costs(&self) -> Costs {
        self.costs
    }

    /// What is to be sent, in the order of the pages.
    pub(crate) fn contents(&self) -> impl Iterator<Item = Content<'_>> {
        self.frames.iter().map(|frame| {
            let run = frame.run;
            let content = &self.content[frame.start..][..run.count as usize * PAGE];
            match &frame.form {
                Form::Zero => Content::Zero(run),
                Form::Raw => Content::Pages(Pages::raw(run, content), content),
                Form::Encoded { encoding, data } => {
                    Content::Pages(Pages { run, encoding: *encoding, data: &self.out[data.clone()] }, content)
                }
            }
        })
    }

    /// Decides for each stretch of neighbouring pages how it goes, and encodes it.
    pub(crate) fn encode(&mut self, encoder: &mut PageEncoder) {
        let began = Instant::now();
        let mut at = 0;
        for index in 0..self.runs.len() {
            let mut left = self.runs[index];
            while left.count > 0 {
                let kind = self.kind(at);
                let count = (1..left.count).find(|&next| self.kind(at + next as usize) != kind).unwrap_or(left.count);
                let (run, rest) = left.split_front(count);
                let form = match kind {
                    Kind::Zero => Form::Zero,
                    Kind::New => self.plain(encoder, at, run),
                    Kind::Based => self.delta(encoder, at, run),
                };
                self.frames.push(Frame { run, start: at * PAGE, form });
                at += count as usize;
                left = rest.unwrap_or(PageRun::new(run.end(), 0));
            }
        }
        self.costs.time = began.elapsed();
    }

    fn kind(&self, page: usize) -> Kind {
        if is_zero(&self.content[page * PAGE..][..PAGE]) {
            Kind::Zero
        } else if self.base_at.get(page).is_some_and(Option::is_some) {
            Kind::Based
        } else {
            Kind::New
        }
    }

    fn plain(&mut self, encoder: &mut PageEncoder, at: usize, run: PageRun) -> Form {
        let content = &self.content[at * PAGE..][..run.count as usize * PAGE];
        let is_tried = |codec: &Codec| *codec != Codec::Raw;
        let mut tried = [Some(self.codec), self.trial].into_iter().flatten().filter(is_tried).peekable();
        if tried.peek().is_none() || !encoder.is_compressible(content) {
            return Form::Raw;
        }
        let mut best = Form::Raw;
        let mut best_bytes = most_worth_sending(content.len());
        for codec in tried {
            let start = self.out.len();
            let began = Instant::now();
            let Some(bytes) = encoder.encode(codec, content, &mut self.out) else { continue };
            let cost = if codec == self.codec { &mut self.costs.codec } else { &mut self.costs.trial };
            cost.add(content.len(), bytes, began);
            if bytes <= best_bytes {
                best_bytes = bytes;
                best = Form::Encoded { encoding: codec.encoding(), data: start..start + bytes };
            } else {
                self.out.truncate(start);
            }
        }
        best
    }

    fn delta(&mut self, encoder: &mut PageEncoder, at: usize, run: PageRun) -> Form {
        let content = &self.content[at * PAGE..][..run.count as usize * PAGE];
        let Some(Some(base_at)) = self.base_at.get(at).copied() else { return self.plain(encoder, at, run) };
        // Bases were added in the order of the pages, so those of neighbours are neighbours.
        let base = &self.bases[base_at..][..content.len()];
        let start = self.out.len();
        let began = Instant::now();
        let Some(bytes) = encoder.encode_delta(content, base, &mut self.out) else { return Form::Raw };
        self.costs.delta.add(content.len(), bytes, began);
        let encoding = Encoding::Delta { digest: page_digest(content) };
        let delta = Form::Encoded { encoding, data: start..start + bytes };
        let saves = bytes <= most_worth_sending(content.len());
        let expected = content.len() as f64 * if self.codec == Codec::Raw { 1.0 } else { self.expected_share };
        if saves && (self.codec == Codec::Raw || bytes as f64 <= expected * DELTA_SHARE) {
            return delta;
        }
        // Little is left of the page that was: perhaps the codec alone does better.
        let plain = self.plain(encoder, at, run);
        let plain_bytes = match &plain {
            Form::Encoded { data, .. } => data.len(),
            Form::Raw | Form::Zero => content_bytes(run),
        };
        if saves && bytes < plain_bytes { delta } else { plain }
    }
}

/// What kind of page it is to the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    New,
    /// The target's content is known.
    Based,
}

fn content_bytes(run: PageRun) -> usize {
    run.count as usize * PAGE
}

/// The most bytes that are worth decoding, of so many; with that, they are few enough for the protocol.
fn most_worth_sending(content_bytes: usize) -> usize {
    content_bytes - content_bytes / SAVING_MIN_PARTS
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use vmferry_core::pages::PageNumber;

    use super::*;
    use crate::compress::{DeltaCache, PageDecoder};

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
                Content::Pages(pages, _) => {
                    let run = pages.run;
                    let here = &self.pages;
                    let read = |to: &mut [u8]| {
                        to.chunks_mut(PAGE).zip(run.pages()).for_each(|(to, page)| to.copy_from_slice(&here[&page]));
                        Ok(())
                    };
                    let decoder = self.decoder.get_or_insert_with(PageDecoder::new);
                    let decoded = decoder.decode(run.count, pages.encoding, pages.data, read).unwrap().to_vec();
                    for (page, content) in run.pages().zip(decoded.chunks(PAGE)) {
                        self.pages.insert(page, content.to_vec());
                    }
                }
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
        for content in batch.contents() {
            target.take_in(&content);
            match content {
                Content::Zero(run) => run.pages().for_each(|page| cache.remove(page)),
                Content::Pages(pages, content) => {
                    bytes += pages.data.len() as u64;
                    for (page, content) in pages.run.pages().zip(content.chunks(PAGE)) {
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
        run.pages().for_each(|page| batch.push_base(cache.get(page)));
    }

    proptest! {
        /// Pages that change in any way are sent again and again, in any batches and by any codec: the target has them.
        #[test]
        fn the_target_has_what_was_read(
            cached_pages in 0..20_u64,
            rounds in prop::collection::vec((
                0..5_usize,
                prop::option::of(1..5_usize),
                prop::collection::vec((0..30_u64, 0..5_u8, any::<u64>()), 0..12),
                prop::collection::vec((0..30_u64, 1..8_u64), 1..6),
            ), 1..12),
        ) {
            let codecs = [&[Codec::Raw][..], &Codec::ENCODING].concat();
            let mut memory: HashMap<u64, Vec<u8>> = (0..40).map(|page| (page, vec![0; PAGE])).collect();
            let mut target = Target::default();
            let (mut encoder, mut batch) = (PageEncoder::new(), Batch::new());
            let mut cache = DeltaCache::new(cached_pages * PAGE_BYTES);
            for (codec, trial, writes, runs) in rounds {
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
            batch.frames.iter().map(|frame| (name(&frame.form), frame.run.count)).collect::<Vec<_>>()
        };
        let first = forms(&memory, Codec::Lz4);
        // Noise and text in one stretch are sent as one frame, which is half as long.
        assert_eq!(first, [("zero", 1), ("lz4", 4)]);
        let mut changed = memory.clone();
        changed.get_mut(&1).unwrap()[77] ^= 1;
        changed.insert(2, page_of(1, 9));
        assert_eq!(forms(&changed, Codec::Raw), [("zero", 1), ("delta", 4)]);
        // All is new: nothing is gained by what was there.
        let other = (0..5).map(|page| (page, page_of(1, 100 + page))).collect();
        assert_eq!(forms(&other, Codec::Lz4), [("raw", 1), ("raw", 4)]);
    }
}
