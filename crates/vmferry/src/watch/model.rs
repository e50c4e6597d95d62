//! What is known of a watched guest. Pure: epochs in, figures out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use vmferry_core::pages::{AddressSpaceId, PAGE_BYTES, PageRun, PageSet};
use vmferry_core::predict::{Predictor, WorkingSetConfig, WorkingSetPredictor};
use vmferry_sim::trace::{Trace, TraceEpoch, WrittenRun};

/// Working sets are counted over up to so many epochs.
const AGES: usize = 100;
/// The rate is said over the last epochs that make up this time.
const RATE_WINDOW: Duration = Duration::from_secs(1);
/// Rates kept for the curve: one an epoch, as many as a wide terminal has columns.
const CURVE_EPOCHS: usize = 512;
/// A prediction replays the guest's writes of this time.
const KEPT_TIME: Duration = Duration::from_secs(10);
/// The most runs kept for it, 16 bytes each: a guest that writes all over its memory is replayed from a shorter time.
const KEPT_RUNS: usize = 1 << 22;
/// Memory is divided into at most so many regions for the map.
const REGIONS: u64 = 16_384;
/// After so long without a write a region of the map is half as hot.
const REGION_HALF_LIFE: Duration = Duration::from_secs(1);
/// A page is hot if it is expected to be written in at least this share of the next epochs.
const HOT: f64 = 0.5;

/// The figures at one moment. Sizes in bytes, rates in bytes of whole pages per second; a page that is written more than
/// once in an epoch counts once in it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Figures {
    /// How long the guest is watched.
    pub(super) watched_ms: f64,
    pub(super) epochs: u64,
    pub(super) guest_bytes: u64,
    /// Zero at the beginning and not written since.
    pub(super) zero_bytes: u64,
    /// The dirty rate over the last second.
    pub(super) dirty_bytes_per_s: f64,
    /// The same over all the time.
    pub(super) dirty_mean_bytes_per_s: f64,
    /// The highest over any second.
    pub(super) dirty_max_bytes_per_s: f64,
    /// Written within the last epoch, the last 10, the last 100.
    pub(super) working_set_1_bytes: u64,
    pub(super) working_set_10_bytes: u64,
    pub(super) working_set_100_bytes: u64,
    /// Written at least once since the beginning.
    pub(super) written_bytes: u64,
    /// Pages that the predictor expects to be written in at least every second epoch.
    pub(super) hot_pages: u64,
    /// What the predictor expects to be written in the next epoch.
    pub(super) expected_bytes_per_epoch: f64,
    /// The mean of all scans.
    pub(super) scan_ms: f64,
}

/// What a screen shows of the guest.
#[derive(Debug, Clone, Default)]
pub(super) struct View {
    pub(super) figures: Figures,
    /// The dirty rates of the last epochs, oldest first, in bytes per second.
    pub(super) curve: Vec<u64>,
    /// The regions of memory in address order: the share of their pages written per epoch, in the last seconds. None
    /// where the guest has no memory.
    pub(super) regions: Vec<f32>,
}

impl View {
    /// Folds the map into so many cells in address order: the mean heat of what each covers, between 0 and 1.
    pub(super) fn cells(&self, count: usize) -> Vec<f32> {
        let regions = self.regions.len();
        if regions == 0 {
            return vec![0.0; count];
        }
        (0..count)
            .map(|cell| {
                let from = cell * regions / count;
                let to = ((cell + 1) * regions / count).clamp(from + 1, regions);
                self.regions[from..to].iter().sum::<f32>() / (to - from) as f32
            })
            .collect()
    }
}

/// One epoch, as kept for the curve, the rate and the prediction.
#[derive(Debug)]
struct Kept {
    written: Arc<[PageRun]>,
    length: Duration,
}

/// A watched guest.
#[derive(Debug)]
pub(super) struct WatchModel {
    pages: u64,
    /// Zero at the beginning and not written since.
    zero: PageSet,
    epochs: u64,
    watched: Duration,
    scanning: Duration,
    page_writes: u64,
    max_rate: f64,
    /// The epochs of the last second, and what they wrote.
    recent: VecDeque<(u64, Duration)>,
    recent_pages: u64,
    recent_time: Duration,
    curve: VecDeque<u64>,
    kept: VecDeque<Kept>,
    kept_runs: usize,
    kept_time: Duration,
    /// The epoch of each page's last write, counted from 1; 0 for never. 1/1024 of the guest's size, of which the kernel
    /// provides what was touched.
    last_write: Vec<u32>,
    /// How many pages were written last so many epochs ago, at `epoch % AGES`.
    ages: [u64; AGES],
    written_ever: u64,
    predictor: WorkingSetPredictor,
    regions: Vec<f32>,
    region_pages: u64,
}

impl WatchModel {
    /// A guest of so many pages, some of them known to be zero.
    pub(super) fn new(pages: u64, zero_runs: &[PageRun]) -> Self {
        let mut zero = PageSet::empty(pages);
        for &run in zero_runs {
            zero.insert_run(run);
        }
        let region_pages = pages.div_ceil(REGIONS).max(1);
        Self {
            pages,
            zero,
            epochs: 0,
            watched: Duration::ZERO,
            scanning: Duration::ZERO,
            page_writes: 0,
            max_rate: 0.0,
            recent: VecDeque::new(),
            recent_pages: 0,
            recent_time: Duration::ZERO,
            curve: VecDeque::new(),
            kept: VecDeque::new(),
            kept_runs: 0,
            kept_time: Duration::ZERO,
            last_write: vec![0; pages as usize],
            ages: [0; AGES],
            written_ever: 0,
            predictor: WorkingSetPredictor::new(WorkingSetConfig::for_guest(pages)),
            regions: vec![0.0; pages.div_ceil(region_pages) as usize],
            region_pages,
        }
    }

    /// How long the guest is watched.
    pub(super) fn watched(&self) -> Duration {
        self.watched
    }

    /// Takes in one epoch: the pages written in it, ascending and within the guest, how long it was, and what its scan
    /// took.
    pub(super) fn observe(&mut self, written: &[PageRun], length: Duration, scan: Duration) {
        let pages: u64 = written.iter().map(|run| run.count).sum();
        self.epochs += 1;
        self.watched += length;
        self.scanning += scan;
        self.page_writes += pages;
        self.note_rate(pages, length);
        self.note_ages(written);
        self.note_regions(written, length);
        self.predictor.observe(AddressSpaceId::WHOLE_GUEST, written);
        self.predictor.end_epoch();
        self.keep(written, length);
    }

    fn note_rate(&mut self, pages: u64, length: Duration) {
        self.recent.push_back((pages, length));
        self.recent_pages += pages;
        self.recent_time += length;
        while let Some(&(pages, length)) = self.recent.front()
            && self.recent_time - length >= RATE_WINDOW
        {
            self.recent.pop_front();
            self.recent_pages -= pages;
            self.recent_time -= length;
        }
        // The rate of less than a second would make a burst the maximum.
        if self.recent_time >= RATE_WINDOW {
            self.max_rate = self.max_rate.max(self.rate());
        }
        if self.curve.len() == CURVE_EPOCHS {
            self.curve.pop_front();
        }
        self.curve.push_back(bytes_per_s(pages, length) as u64);
    }

    fn rate(&self) -> f64 {
        bytes_per_s(self.recent_pages, self.recent_time)
    }

    fn note_ages(&mut self, written: &[PageRun]) {
        // Enough for 49 days of epochs of 1 ms.
        let now = u32::try_from(self.epochs).unwrap_or(u32::MAX);
        let place = |epoch: u32| epoch as usize % AGES;
        self.ages[place(now)] = 0;
        for run in written {
            for page in run.pages() {
                let last = &mut self.last_write[page.0 as usize];
                if *last == 0 {
                    self.written_ever += 1;
                    self.zero.remove(page);
                } else if now - *last < AGES as u32 {
                    self.ages[place(*last)] -= 1;
                }
                *last = now;
            }
            self.ages[place(now)] += run.count;
        }
    }

    /// The pages written within the last `epochs`, at most [`AGES`].
    fn working_set(&self, epochs: u64) -> u64 {
        let oldest = self.epochs.saturating_sub(epochs) + 1;
        (oldest..=self.epochs).map(|epoch| self.ages[epoch as usize % AGES]).sum()
    }

    fn note_regions(&mut self, written: &[PageRun], length: Duration) {
        let fades = (-length.as_secs_f64() / REGION_HALF_LIFE.as_secs_f64()).exp2() as f32;
        for region in &mut self.regions {
            *region *= fades;
        }
        for &run in written {
            let mut left = Some(run);
            while let Some(run) = left {
                let region = run.first.0 / self.region_pages;
                let first = region * self.region_pages;
                let (here, rest) = run.split_front(first + self.region_pages - run.first.0);
                left = rest;
                let pages = self.region_pages.min(self.pages - first);
                self.regions[region as usize] += (1.0 - fades) * here.count as f32 / pages as f32;
            }
        }
    }

    fn keep(&mut self, written: &[PageRun], length: Duration) {
        self.kept.push_back(Kept { written: written.into(), length });
        self.kept_runs += written.len();
        self.kept_time += length;
        while self.kept.len() > 1 && (self.kept_time > KEPT_TIME || self.kept_runs > KEPT_RUNS) {
            if let Some(oldest) = self.kept.pop_front() {
                self.kept_runs -= oldest.written.len();
                self.kept_time -= oldest.length;
            }
        }
    }

    /// What the guest wrote last, to be replayed over and over: its epochs all with the mean length.
    pub(super) fn trace(&self) -> Trace {
        let owner = AddressSpaceId::WHOLE_GUEST;
        let epoch = |kept: &Kept| TraceEpoch {
            written: kept.written.iter().map(|&run| WrittenRun { run, owner }).collect(),
            accessed: None,
        };
        Trace {
            name: "watched".to_owned(),
            pages: self.pages,
            epoch: self.kept_time / (self.kept.len() as u32).max(1),
            zero: self.zero.runs().collect(),
            epochs: self.kept.iter().map(epoch).collect(),
        }
    }

    /// The figures as of now. Visits all pages that the predictor knows: for once a second, not once an epoch.
    pub(super) fn figures(&self) -> Figures {
        let (mut hot_pages, mut expected) = (0, 0.0);
        self.predictor.visit(&mut |page| {
            hot_pages += u64::from(page.heat >= HOT);
            expected += page.heat;
        });
        Figures {
            watched_ms: self.watched.as_secs_f64() * 1e3,
            epochs: self.epochs,
            guest_bytes: self.pages * PAGE_BYTES,
            zero_bytes: self.zero.len() * PAGE_BYTES,
            dirty_bytes_per_s: self.rate(),
            dirty_mean_bytes_per_s: bytes_per_s(self.page_writes, self.watched),
            dirty_max_bytes_per_s: self.max_rate.max(self.rate()),
            working_set_1_bytes: self.working_set(1) * PAGE_BYTES,
            working_set_10_bytes: self.working_set(10) * PAGE_BYTES,
            working_set_100_bytes: self.working_set(AGES as u64) * PAGE_BYTES,
            written_bytes: self.written_ever * PAGE_BYTES,
            hot_pages,
            expected_bytes_per_epoch: expected * PAGE_BYTES as f64,
            scan_ms: self.scanning.as_secs_f64() * 1e3 / (self.epochs as f64).max(1.0),
        }
    }

    /// What a screen shows: these figures, the curve and the map as of now.
    pub(super) fn view(&self, figures: Figures) -> View {
        View { figures, curve: self.curve.iter().copied().collect(), regions: self.regions.clone() }
    }
}

fn bytes_per_s(pages: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { (pages * PAGE_BYTES) as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Duration = Duration::from_millis(50);
    const SCAN: Duration = Duration::from_millis(1);

    fn watched(pages: u64, epochs: &[&[(u64, u64)]]) -> WatchModel {
        let mut model = WatchModel::new(pages, &[PageRun::new(pages / 2, pages / 4)]);
        for epoch in epochs {
            let runs: Vec<PageRun> = epoch.iter().map(|&(first, count)| PageRun::new(first, count)).collect();
            model.observe(&runs, EPOCH, SCAN);
        }
        model
    }

    #[test]
    fn nothing_is_known_of_a_guest_that_was_not_watched() {
        let figures = watched(1000, &[]).figures();
        let expected = Figures { guest_bytes: 1000 * PAGE_BYTES, zero_bytes: 250 * PAGE_BYTES, ..Figures::default() };
        assert_eq!(figures, expected);
    }

    #[test]
    fn rates_are_those_of_the_last_second_of_all_time_and_of_the_busiest_second() {
        let busy: &[(u64, u64)] = &[(0, 100)];
        let calm: &[(u64, u64)] = &[(0, 10)];
        let mut epochs = vec![busy; 20];
        epochs.extend(vec![calm; 60]);
        let figures = watched(1000, &epochs).figures();
        let per_s = |pages: f64| pages * 20.0 * PAGE_BYTES as f64;
        assert_eq!(figures.watched_ms, 4000.0);
        assert_eq!(figures.dirty_bytes_per_s, per_s(10.0));
        assert_eq!(figures.dirty_mean_bytes_per_s, per_s(32.5));
        assert_eq!(figures.dirty_max_bytes_per_s, per_s(100.0));
        assert_eq!(figures.scan_ms, 1.0);
        let view = watched(1000, &epochs).view(figures);
        assert_eq!(view.curve.len(), 80);
        assert_eq!((view.curve[0], view.curve[79]), (per_s(100.0) as u64, per_s(10.0) as u64));
    }

    /// Against sets of pages, over more epochs than are told apart.
    #[test]
    fn working_sets_are_the_pages_written_in_the_last_epochs() {
        let mut model = WatchModel::new(500, &[]);
        let mut history: Vec<Vec<u64>> = Vec::new();
        for epoch in 0..260_u64 {
            let first = epoch * epoch * 7 % 450;
            let run = PageRun::new(first, 1 + epoch % 20);
            model.observe(&[run], EPOCH, SCAN);
            history.push(run.pages().map(|page| page.0).collect());
            for epochs in [1, 10, 100] {
                let recent = &history[history.len().saturating_sub(epochs)..];
                let distinct: std::collections::BTreeSet<u64> = recent.iter().flatten().copied().collect();
                assert_eq!(model.working_set(epochs as u64), distinct.len() as u64, "epoch {epoch}, last {epochs}");
            }
        }
        let ever: std::collections::BTreeSet<u64> = history.iter().flatten().copied().collect();
        assert_eq!(model.figures().written_bytes, ever.len() as u64 * PAGE_BYTES);
    }

    #[test]
    fn pages_written_in_each_epoch_are_hot_and_others_are_not() {
        let epoch: &[(u64, u64)] = &[(100, 50)];
        let mut epochs = vec![&[(700_u64, 200_u64)][..]];
        epochs.extend(vec![epoch; 40]);
        let figures = watched(1000, &epochs).figures();
        assert_eq!(figures.hot_pages, 50);
        let expected = figures.expected_bytes_per_epoch / PAGE_BYTES as f64;
        assert!((45.0..60.0).contains(&expected), "{expected}");
    }

    #[test]
    fn the_map_shows_where_the_guest_writes_and_cools() {
        let pages = 1000;
        let hot: &[(u64, u64)] = &[(250, 250)];
        let view = |epochs: &[&[(u64, u64)]]| watched(pages, epochs).view(Figures::default());
        let cells = view(&[hot; 200]).cells(4);
        assert!(cells[1] > 0.99 && cells[1] <= 1.001, "{cells:?}");
        assert_eq!([cells[0], cells[2], cells[3]], [0.0; 3]);
        // Half after a second, which is 20 epochs.
        let mut cooled = vec![hot; 200];
        cooled.extend(vec![&[][..]; 20]);
        let cells = view(&cooled).cells(4);
        assert!((0.49..0.51).contains(&cells[1]), "{cells:?}");
        // Half of the region, half of the share; more cells than regions; and regions of more than a page.
        assert!((0.49..0.51).contains(&view(&[hot; 200]).cells(2)[0]));
        assert_eq!(view(&[hot; 200]).cells(3000).iter().filter(|cell| **cell > 0.9).count(), 750);
        let mut large = WatchModel::new(100_001, &[]);
        for _ in 0..200 {
            large.observe(&[PageRun::new(3, 50_000), PageRun::new(100_000, 1)], EPOCH, SCAN);
        }
        let view = large.view(Figures::default());
        assert_eq!(large.region_pages, 7);
        assert!((0.56..0.58).contains(&view.regions[0]), "{}", view.regions[0]);
        assert!(*view.regions.last().unwrap() > 0.1, "the last region has fewer pages");
        assert!((0.49..0.51).contains(&view.cells(1)[0]));
    }

    #[test]
    fn the_trace_is_what_was_written_lately() {
        let epoch: &[(u64, u64)] = &[(1, 2), (500, 3)];
        let model = watched(1000, &vec![epoch; 300]);
        let trace = model.trace();
        trace.check().unwrap();
        assert_eq!(trace.epochs.len(), 200, "10 s of 50 ms");
        assert_eq!(trace.epoch, EPOCH);
        assert_eq!(trace.epochs[0].written_pages(), 5);
        assert_eq!(trace.zero, [PageRun::new(503, 247)], "zero pages that were written are none");
        assert_eq!(model.figures().zero_bytes, 247 * PAGE_BYTES);
    }
}
