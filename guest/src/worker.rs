//! A writer: picks pages by the pattern, keeps its rate, and can be saved.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::gate::Member;
use crate::memory::Memory;
use crate::parameters::{PARAMETERS_BYTES, ParameterError, Parameters, Pattern};
use crate::random::{GOLDEN, Random, mix};

/// Page writes between two looks at the clock, when there is no rate to keep.
const BATCH_WRITES: u64 = 64;

/// How much of a missed time a writer makes up for. A guest that was paused for seconds goes on at its rate and does
/// not repay them in one burst.
const CATCH_UP_MAX: Duration = Duration::from_millis(100);

/// How long a writer with nothing to do rests.
const REST: Duration = Duration::from_millis(1);

/// The most writes a saved state may claim: more than a century of them.
const WRITES_MAX: u64 = 1 << 62;

/// The first bytes of a saved state, and its version.
const STATE_MAGIC: [u8; 4] = *b"vmfw";
const STATE_VERSION: u16 = 1;
const STATE_BYTES: usize = 4 + 2 + PARAMETERS_BYTES + 4 + 4 * 8 + 8;

/// One of the writers of a guest, with pages of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    parameters: Parameters,
    index: u32,
    /// The pages this worker writes.
    pages: Range<u64>,
    hot_pages: u64,
    rate_pages_per_s: u64,
    random: Random,
    writes: u64,
    /// Writes that were due so far, done or forgiven.
    granted: u64,
    /// For each popularity rank, the probability of it or a more popular one, scaled to 2^64. Empty unless `Zipf`.
    zipf: Vec<u64>,
    /// Where the popularity ranks are.
    scatter: Scatter,
}

/// Why a saved state was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateError {
    /// The bytes are not a saved worker.
    NotAState,
    /// The bytes are of a version this build does not read.
    Version {
        /// The version they name.
        version: u16,
    },
    /// The bytes have another length than their version says.
    Length {
        /// How many there are.
        bytes: usize,
    },
    /// The bytes hold values outside their limits.
    Values,
}

impl fmt::Display for StateError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAState => write!(formatter, "this is not the saved state of a writer"),
            Self::Version { version } => write!(formatter, "saved states of version {version} are not supported"),
            Self::Length { bytes } => write!(formatter, "the saved state has {bytes} bytes instead of {STATE_BYTES}"),
            Self::Values => write!(formatter, "the saved state holds values outside their limits"),
        }
    }
}

impl std::error::Error for StateError {}

impl Worker {
    /// Worker number `index` of the parameters' threads, at its beginning.
    ///
    /// # Errors
    /// When the parameters are not valid.
    ///
    /// # Panics
    /// When `index` is not below the number of threads.
    pub fn new(parameters: &Parameters, index: u32) -> Result<Self, ParameterError> {
        parameters.validate()?;
        assert!(index < parameters.threads, "worker {index} of {}", parameters.threads);
        let share = |total: u64| share(total, index, parameters.threads);
        let pages = share(parameters.pages);
        let hot = share(parameters.hot_pages);
        let rate = share(parameters.rate_pages_per_s);
        // Both are split by the same rule, but rounding may leave this worker more hot pages than it has pages.
        let hot_pages = (hot.end - hot.start).min(pages.end - pages.start);
        let zipf = match parameters.pattern {
            Pattern::Zipf => zipf_table(pages.end - pages.start),
            Pattern::Idle | Pattern::Hot | Pattern::Sweep | Pattern::Phases => Vec::new(),
        };
        let scatter = Scatter::new(pages.end - pages.start, parameters.seed);
        Ok(Self {
            parameters: parameters.clone(),
            index,
            pages,
            hot_pages,
            rate_pages_per_s: rate.end - rate.start,
            random: Random::new(parameters.seed, u64::from(index)),
            writes: 0,
            granted: 0,
            zipf,
            scatter,
        })
    }

    /// All workers of a guest.
    ///
    /// # Errors
    /// When the parameters are not valid.
    pub fn all(parameters: &Parameters) -> Result<Vec<Self>, ParameterError> {
        parameters.validate()?;
        (0..parameters.threads).map(|index| Self::new(parameters, index)).collect()
    }

    /// The parameters it was made with.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Which of the guest's workers it is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The pages it writes; no other worker does.
    pub fn pages(&self) -> Range<u64> {
        self.pages.clone()
    }

    /// Page writes so far, without the filling.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Writes the next page and says which it was; an idle worker writes none.
    pub fn step(&mut self, memory: &Memory<'_>) -> Option<u64> {
        let page = self.next_page()?;
        memory.write(page);
        Some(page)
    }

    /// Chooses the next page and counts it as written, without writing it: for traces and simulations of this guest.
    pub fn next_page(&mut self) -> Option<u64> {
        let length = self.pages.end - self.pages.start;
        let offset = match self.parameters.pattern {
            Pattern::Idle => return None,
            Pattern::Hot => self.random.below(self.hot_pages),
            Pattern::Zipf => {
                let rank = self.zipf_rank();
                self.scatter.place(rank)
            }
            Pattern::Sweep => self.writes % length,
            Pattern::Phases => {
                let phase = self.writes / self.parameters.phase_writes;
                let start = (u128::from(phase) * u128::from(self.hot_pages) % u128::from(length)) as u64;
                (start + self.random.below(self.hot_pages)) % length
            }
        };
        self.writes += 1;
        Some(self.pages.start + offset)
    }

    /// How many steps to do now, `elapsed` after the worker was made or restored. They count as done once asked for.
    ///
    /// Without a rate it is always a batch; with one, what is due since the last call, where at most 100 ms are made up
    /// for; an idle worker never has any.
    pub fn steps_due(&mut self, elapsed: Duration) -> u64 {
        if self.parameters.pattern == Pattern::Idle {
            return 0;
        }
        if self.parameters.rate_pages_per_s == 0 {
            return BATCH_WRITES;
        }
        let due_by = |time: Duration| {
            let total = time.as_nanos().saturating_mul(u128::from(self.rate_pages_per_s)) / 1_000_000_000;
            u64::try_from(total).unwrap_or(u64::MAX)
        };
        let total = due_by(elapsed);
        let due = total.saturating_sub(self.granted);
        let burst_max = due_by(CATCH_UP_MAX).max(1);
        self.granted = self.granted.max(total);
        due.min(burst_max)
    }

    /// Saves the worker. Restored, it chooses the pages that this one would have chosen.
    ///
    /// Version 1, little-endian: `vmfw`, version (2 bytes), parameters (47), index (4), state of the random numbers (4
    /// times 8), writes (8).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(STATE_BYTES);
        bytes.extend_from_slice(&STATE_MAGIC);
        bytes.extend_from_slice(&STATE_VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.parameters.to_bytes());
        bytes.extend_from_slice(&self.index.to_le_bytes());
        for word in self.random.state() {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.writes.to_le_bytes());
        debug_assert_eq!(bytes.len(), STATE_BYTES);
        bytes
    }

    /// Restores a saved worker. Its pacing starts anew: the time passed to [`Worker::steps_due`] counts from here.
    ///
    /// # Errors
    /// When the bytes are not what [`Worker::to_bytes`] writes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let (magic, rest) = bytes.split_first_chunk::<4>().ok_or(StateError::NotAState)?;
        let (version, rest) = rest.split_first_chunk::<2>().ok_or(StateError::NotAState)?;
        if *magic != STATE_MAGIC {
            return Err(StateError::NotAState);
        }
        let version = u16::from_le_bytes(*version);
        if version != STATE_VERSION {
            return Err(StateError::Version { version });
        }
        let wrong_length = StateError::Length { bytes: bytes.len() };
        let (parameters, rest) = rest.split_first_chunk::<PARAMETERS_BYTES>().ok_or(wrong_length.clone())?;
        let (index, rest) = rest.split_first_chunk::<4>().ok_or(wrong_length.clone())?;
        let words: &[u8; 40] = rest.try_into().map_err(|_| wrong_length)?;
        let word = |at: usize| u64::from_le_bytes(words[at * 8..at * 8 + 8].try_into().expect("eight bytes"));

        let parameters = Parameters::from_bytes(parameters).ok_or(StateError::Values)?;
        let index = u32::from_le_bytes(*index);
        if index >= parameters.threads {
            return Err(StateError::Values);
        }
        if word(4) > WRITES_MAX {
            return Err(StateError::Values);
        }
        let mut worker = Self::new(&parameters, index).map_err(|_| StateError::Values)?;
        worker.random = Random::from_state([word(0), word(1), word(2), word(3)]);
        worker.writes = word(4);
        Ok(worker)
    }

    /// The rank of the next page by Zipf's law; 0 is the most popular.
    fn zipf_rank(&mut self) -> u64 {
        let draw = self.random.next_u64();
        let rank = self.zipf.partition_point(|&probability| probability <= draw);
        rank.min(self.zipf.len() - 1) as u64
    }
}

/// What a thread needs to be a writer, besides the worker itself.
#[derive(Debug)]
pub struct Drive<'a, Clock> {
    /// The pages.
    pub memory: Memory<'a>,
    /// The writer's place at the gate.
    pub member: Member<'a>,
    /// Counts this thread's writes where others can read it.
    pub writes: &'a AtomicU64,
    /// Ends the writer when true.
    pub stop: &'a AtomicBool,
    /// The time since the worker was made or restored.
    pub elapsed: Clock,
}

impl<Clock: FnMut() -> Duration> Drive<'_, Clock> {
    /// Writes at the worker's rate, stops at the gate, until told to end.
    pub fn run(mut self, worker: &mut Worker) {
        while !self.stop.load(Ordering::Relaxed) {
            let steps = worker.steps_due((self.elapsed)());
            for _ in 0..steps {
                self.member.boundary();
                worker.step(&self.memory);
                self.writes.fetch_add(1, Ordering::Relaxed);
            }
            if steps == 0 {
                self.member.rest(REST);
            }
        }
    }
}

/// The part of `total` things that belongs to one of several workers.
fn share(total: u64, index: u32, threads: u32) -> Range<u64> {
    let cut = |at: u32| (u128::from(total) * u128::from(at) / u128::from(threads)) as u64;
    cut(index)..cut(index + 1)
}

/// Sums of 1/1, 1/2, … 1/n, scaled so that the last is 2^64. Exponent 1 needs divisions only, which IEEE 754 rounds the
/// same everywhere, unlike powers.
fn zipf_table(ranks: u64) -> Vec<u64> {
    let weight = |rank: u64| 1.0 / (rank as f64);
    let total: f64 = (1..=ranks).map(weight).sum();
    let mut sum = 0.0;
    let scaled = |sum: f64| (sum / total * 18_446_744_073_709_551_616.0) as u64;
    (1..=ranks)
        .map(|rank| {
            sum += weight(rank);
            scaled(sum)
        })
        .collect()
}

/// Maps ranks to places, one to one: multiplication by a number coprime to the length, and an offset.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Scatter {
    length: u64,
    factor: u64,
    offset: u64,
}

impl Scatter {
    fn new(length: u64, seed: u64) -> Self {
        let mut factor = mix(seed ^ GOLDEN) % length;
        // 1 is coprime to every length, so the search ends.
        while gcd(factor, length) != 1 {
            factor = (factor + 1) % length;
        }
        Self { length, factor, offset: mix(seed) % length }
    }

    fn place(&self, rank: u64) -> u64 {
        let product = u128::from(rank) * u128::from(self.factor) + u128::from(self.offset);
        (product % u128::from(self.length)) as u64
    }
}

fn gcd(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { gcd(other, one % other) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::gate::Gate;
    use crate::memory::region_words;
    use crate::parameters::any_parameters;

    fn worker(pattern: Pattern, pages: u64, hot_pages: u64) -> Worker {
        let parameters = Parameters { pattern, pages, hot_pages, phase_writes: 500, ..Parameters::default() };
        Worker::new(&parameters, 0).unwrap()
    }

    #[test]
    fn idle_writes_nothing() {
        let mut worker = worker(Pattern::Idle, 10, 1);
        assert_eq!(worker.next_page(), None);
        assert_eq!(worker.steps_due(Duration::from_secs(9)), 0);
    }

    #[test]
    fn hot_writes_its_hot_pages_evenly() {
        let mut worker = worker(Pattern::Hot, 1000, 10);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[worker.next_page().unwrap() as usize] += 1;
        }
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
    }

    #[test]
    fn sweep_goes_round() {
        let mut worker = worker(Pattern::Sweep, 3, 1);
        let pages: Vec<_> = (0..7).map(|_| worker.next_page().unwrap()).collect();
        assert_eq!(pages, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn phases_move_the_hot_set_on() {
        let mut worker = worker(Pattern::Phases, 25, 10);
        let mut phase = || (0..500).map(|_| worker.next_page().unwrap()).collect::<BTreeSet<_>>();
        assert_eq!(phase(), (0..10).collect());
        assert_eq!(phase(), (10..20).collect());
        assert_eq!(phase(), (20..25).chain(0..5).collect());
    }

    #[test]
    fn zipf_follows_its_law() {
        const DRAWS: u32 = 400_000;
        let mut worker = worker(Pattern::Zipf, 1000, 1);
        let mut counts = vec![0_u32; 1000];
        for _ in 0..DRAWS {
            counts[worker.next_page().unwrap() as usize] += 1;
        }
        counts.sort_unstable_by(|one, other| other.cmp(one));
        let harmonic: f64 = (1..=1000).map(|rank| 1.0 / f64::from(rank)).sum();
        for rank in [1_u32, 2, 3, 5, 10, 50] {
            let expected = f64::from(DRAWS) / f64::from(rank) / harmonic;
            let found = f64::from(counts[rank as usize - 1]);
            assert!((found / expected - 1.0).abs() < 0.1, "rank {rank}: {found} for {expected}");
        }
        assert!(counts[999] > 0, "the least popular page is written too");
    }

    #[test]
    fn a_rate_is_kept_and_a_long_gap_is_not_made_up_for() {
        let parameters = Parameters { rate_pages_per_s: 1000, ..Parameters::default() };
        let mut worker = Worker::new(&parameters, 0).unwrap();
        assert_eq!(worker.steps_due(Duration::ZERO), 0);
        assert_eq!(worker.steps_due(Duration::from_micros(2_500)), 2);
        assert_eq!(worker.steps_due(Duration::from_micros(2_900)), 0);
        assert_eq!(worker.steps_due(Duration::from_micros(3_000)), 1);
        assert_eq!(worker.steps_due(Duration::from_secs(3)), 100);
        assert_eq!(worker.steps_due(Duration::from_millis(3_010)), 10);
        assert_eq!(worker.steps_due(Duration::from_millis(2_000)), 0, "a clock that goes back");
        assert_eq!(worker.steps_due(Duration::MAX), 100);
    }

    #[test]
    fn rates_are_split_without_loss() {
        let parameters = Parameters { rate_pages_per_s: 1000, threads: 3, ..Parameters::default() };
        let workers = Worker::all(&parameters).unwrap();
        assert_eq!(workers.iter().map(|worker| worker.rate_pages_per_s).sum::<u64>(), 1000);
    }

    #[test]
    fn several_writers_and_a_checker_agree() {
        let parameters =
            Parameters { pages: 40, hot_pages: 8, threads: 2, rate_pages_per_s: 0, ..Parameters::default() };
        let region: Vec<AtomicU64> = (0..region_words(40)).map(|_| AtomicU64::new(0)).collect();
        let memory = Memory::in_region(&region, &parameters).unwrap();
        memory.fill();
        let (gate, stop, writes) = (Gate::new(), AtomicBool::new(false), AtomicU64::new(0));
        let mut workers = Worker::all(&parameters).unwrap();
        std::thread::scope(|scope| {
            for worker in &mut workers {
                let (gate, stop, writes) = (&gate, &stop, &writes);
                let elapsed = || Duration::ZERO;
                scope.spawn(move || Drive { memory, member: gate.join(), writes, stop, elapsed }.run(worker));
            }
            while writes.load(Ordering::Relaxed) < 10_000 {
                let _paused = gate.pause();
                assert_eq!(memory.check_all().wrong, 0);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(workers.iter().map(Worker::writes).sum::<u64>(), writes.load(Ordering::Relaxed));
        assert_eq!((0..40).map(|page| memory.sequence(page) - 1).sum::<u64>(), writes.load(Ordering::Relaxed));
    }

    #[test]
    fn foreign_states_are_refused() {
        let good = worker(Pattern::Hot, 10, 2).to_bytes();
        assert_eq!(Worker::from_bytes(b""), Err(StateError::NotAState));
        assert_eq!(Worker::from_bytes(b"something else"), Err(StateError::NotAState));
        assert_eq!(Worker::from_bytes(&good[..50]), Err(StateError::Length { bytes: 50 }));
        let longer = [good.as_slice(), &[0]].concat();
        assert_eq!(Worker::from_bytes(&longer), Err(StateError::Length { bytes: longer.len() }));
        let mut newer = good.clone();
        newer[4] = 2;
        assert_eq!(Worker::from_bytes(&newer), Err(StateError::Version { version: 2 }));
        let mut impossible = good;
        impossible[6] = 200;
        assert_eq!(Worker::from_bytes(&impossible), Err(StateError::Values));
    }

    proptest! {
        #[test]
        fn workers_share_the_pages_out(parameters in any_parameters()) {
            let workers = Worker::all(&parameters).unwrap();
            let mut next = 0;
            for worker in &workers {
                prop_assert_eq!(worker.pages().start, next);
                prop_assert!(!worker.pages().is_empty());
                prop_assert!(worker.hot_pages > 0);
                next = worker.pages().end;
            }
            prop_assert_eq!(next, parameters.pages);
        }

        #[test]
        fn pages_stay_inside_and_repeat_from_the_seed(parameters in any_parameters(), steps in 0..300_usize) {
            for index in 0..parameters.threads {
                let mut one = Worker::new(&parameters, index).unwrap();
                let mut two = Worker::new(&parameters, index).unwrap();
                for _ in 0..steps {
                    let page = one.next_page();
                    prop_assert_eq!(page, two.next_page());
                    prop_assert!(page.is_none_or(|page| one.pages().contains(&page)));
                }
            }
        }

        #[test]
        fn a_restored_worker_goes_on_identically(parameters in any_parameters(), before in 0..600_u32) {
            let mut worker = Worker::new(&parameters, parameters.threads - 1).unwrap();
            for _ in 0..before {
                worker.next_page();
            }
            let mut restored = Worker::from_bytes(&worker.to_bytes()).unwrap();
            prop_assert_eq!(&restored, &worker);
            for _ in 0..600 {
                prop_assert_eq!(restored.next_page(), worker.next_page());
            }
        }

        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), STATE_BYTES), at in 0..STATE_BYTES) {
            let _ = Worker::from_bytes(&bytes);
            bytes[..6].copy_from_slice(b"vmfw\x01\x00");
            let _ = Worker::from_bytes(&bytes[..at]);
            // Few pages, so that a state that happens to be valid does not build a long table.
            bytes[7..15].copy_from_slice(&9_u64.to_le_bytes());
            let _ = Worker::from_bytes(&bytes).map(|mut worker| worker.next_page());
        }

        #[test]
        fn scattering_is_one_to_one(length in 1..300_u64, seed: u64) {
            let scatter = Scatter::new(length, seed);
            let places: BTreeSet<_> = (0..length).map(|rank| scatter.place(rank)).collect();
            prop_assert_eq!(places.len() as u64, length);
            prop_assert!(places.iter().all(|&place| place < length));
        }
    }
}
