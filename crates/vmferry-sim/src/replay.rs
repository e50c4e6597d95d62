//! A trace as a stream of writes in time, repeated for ever.
//!
//! A trace says in which epoch a page was written, not when within it. Each page gets a moment inside the epoch, drawn
//! from a seed, so that the simulator and the optimum, which must see the same writes at the same moments, can replay a
//! trace independently of each other. One page is written once in an epoch at the most: the trace does not know of more.
//!
//! A page has the same moment in each epoch. So a page that was written in every epoch of the recording is found by every
//! scan that comes an epoch after the one before, as it would have been by scans at any other time. With a new moment in
//! each epoch, one in six such scans would miss it.

use std::time::Duration;

use vmferry_core::pages::PageRun;

use crate::SimError;
use crate::trace::Trace;

/// Bits of a page number in an event; the moment takes the others.
const PAGE_BITS: u32 = 32;

/// The moment of a write or access, and its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Touch {
    /// Since the replay began.
    pub at_ns: u64,
    /// The page's number.
    pub page: u32,
}

/// What a replay yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touches {
    /// Writes alone.
    Writes,
    /// Writes, and the accesses of epochs for which they were recorded.
    Accesses,
}

/// Replays a trace from some point of it on; after its end it begins again.
#[derive(Debug, Clone)]
pub struct Replay<'a> {
    trace: &'a Trace,
    touches: Touches,
    seed: u64,
    epoch_ns: u64,
    /// The trace's time at which the replay began; below the trace's length.
    offset_ns: u64,
    /// Epochs loaded so far, those of earlier rounds included; the next one to load.
    epoch: u64,
    /// When the epoch loaded last began, counted from the trace's beginning.
    epoch_start_ns: u64,
    /// Its events in order: the moment as a fraction of 2^32 of the epoch, then the page.
    events: Vec<u64>,
    cursor: usize,
}

impl<'a> Replay<'a> {
    /// A replay that begins `start_offset` into the trace, modulo its length.
    ///
    /// # Errors
    /// [`SimError::NoEpochs`], [`SimError::EpochLength`], [`SimError::TooManyPages`] or [`SimError::OutsideGuest`] for
    /// a trace that cannot be replayed.
    pub fn new(trace: &'a Trace, touches: Touches, start_offset: Duration, seed: u64) -> Result<Self, SimError> {
        let name = || trace.name.clone();
        if trace.epochs.is_empty() || trace.pages == 0 {
            return Err(SimError::NoEpochs { trace: name() });
        }
        if trace.pages > 1 << PAGE_BITS {
            return Err(SimError::TooManyPages { trace: name(), pages: trace.pages });
        }
        let epoch_ns = nanoseconds(trace.epoch);
        if epoch_ns == 0 {
            return Err(SimError::EpochLength { trace: name() });
        }
        let outside = |run: &&PageRun| run.first.0.checked_add(run.count).is_none_or(|end| end > trace.pages);
        for epoch in &trace.epochs {
            let written = epoch.written.iter().map(|written| &written.run);
            if let Some(run) = written.chain(epoch.accessed.iter().flatten()).chain(&trace.zero).find(outside) {
                return Err(SimError::OutsideGuest { trace: name(), run: *run, pages: trace.pages });
            }
        }
        let length_ns = epoch_ns.saturating_mul(trace.epochs.len() as u64);
        let offset_ns = nanoseconds(start_offset) % length_ns;
        let mut replay = Self {
            trace,
            touches,
            seed,
            epoch_ns,
            offset_ns,
            epoch: offset_ns / epoch_ns,
            epoch_start_ns: 0,
            events: Vec::new(),
            cursor: 0,
        };
        replay.load();
        while replay.peek().is_some_and(|(trace_ns, _)| trace_ns < offset_ns) {
            replay.cursor += 1;
        }
        Ok(replay)
    }

    /// The next touch if it is not later than `limit_ns`; `None` if there is none until then.
    pub fn next_until(&mut self, limit_ns: u64) -> Option<Touch> {
        let limit_ns = limit_ns.saturating_add(self.offset_ns);
        loop {
            match self.peek() {
                Some((trace_ns, page)) if trace_ns <= limit_ns => {
                    self.cursor += 1;
                    return Some(Touch { at_ns: trace_ns - self.offset_ns, page });
                }
                Some(_) => return None,
                None if self.epoch_start_ns.saturating_add(self.epoch_ns) > limit_ns => return None,
                None => self.load(),
            }
        }
    }

    /// How many epochs of the trace have begun so far, those before the start and those of earlier rounds included.
    pub(crate) fn begun_epochs(&self) -> u64 {
        self.epoch
    }

    /// The next event of the epoch at hand, in the trace's time.
    fn peek(&self) -> Option<(u64, u32)> {
        let event = *self.events.get(self.cursor)?;
        let within = (u128::from(self.epoch_ns) * u128::from(event >> PAGE_BITS)) >> PAGE_BITS;
        Some((self.epoch_start_ns + within as u64, event as u32))
    }

    /// Makes the next epoch's events.
    fn load(&mut self) {
        let number = self.epoch;
        self.epoch += 1;
        self.epoch_start_ns = number * self.epoch_ns;
        self.events.clear();
        self.cursor = 0;
        let epoch = &self.trace.epochs[(number % self.trace.epochs.len() as u64) as usize];
        let mut add = |runs: &mut dyn Iterator<Item = PageRun>, kind: u64| {
            let base = mix(self.seed ^ mix(kind));
            for page in runs.flat_map(|run| run.first.0..run.end()) {
                // The upper half of the mixed word is the moment.
                self.events.push((mix(base ^ page) >> PAGE_BITS << PAGE_BITS) | page);
            }
        };
        add(&mut epoch.written.iter().map(|written| written.run), 0);
        if self.touches == Touches::Accesses
            && let Some(accessed) = &epoch.accessed
        {
            add(&mut accessed.iter().copied(), 1);
        }
        self.events.sort_unstable();
    }
}

/// A duration in whole nanoseconds; the longest is 584 years.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The output function of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of the
/// argument.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vmferry_core::pages::AddressSpaceId;

    use super::*;
    use crate::trace::{TraceEpoch, WrittenRun};

    const EPOCH_NS: u64 = 50_000_000;

    fn trace(epochs: &[&[(u64, u64)]]) -> Trace {
        let written = |&(first, count): &(u64, u64)| WrittenRun {
            run: PageRun::new(first, count),
            owner: AddressSpaceId::WHOLE_GUEST,
        };
        Trace {
            name: "test".into(),
            pages: 100,
            epoch: Duration::from_nanos(EPOCH_NS),
            zero: vec![],
            epochs: epochs
                .iter()
                .map(|runs| TraceEpoch { written: runs.iter().map(written).collect(), accessed: None })
                .collect(),
        }
    }

    fn all_until(replay: &mut Replay<'_>, limit_ns: u64) -> Vec<Touch> {
        std::iter::from_fn(|| replay.next_until(limit_ns)).collect()
    }

    #[test]
    fn each_page_is_written_within_its_epoch_and_the_trace_repeats() {
        let trace = trace(&[&[(0, 10)], &[], &[(20, 3), (40, 1)]]);
        let mut replay = Replay::new(&trace, Touches::Writes, Duration::ZERO, 1).unwrap();
        let touches = all_until(&mut replay, 6 * EPOCH_NS - 1);
        assert!(touches.is_sorted());
        assert_eq!(touches.len(), 28);
        for touch in &touches {
            let expected = match touch.at_ns / EPOCH_NS {
                0 | 3 => touch.page < 10,
                2 | 5 => (20..23).contains(&touch.page) || touch.page == 40,
                _ => false,
            };
            assert!(expected, "{touch:?}");
        }
        let moments: BTreeSet<_> = touches.iter().map(|touch| (touch.page, touch.at_ns % EPOCH_NS)).collect();
        assert_eq!(moments.len(), 14, "each page has one moment");
        let distinct: BTreeSet<_> = moments.iter().map(|(_, moment)| moment).collect();
        assert_eq!(distinct.len(), 14, "and each its own");
        let mut other = Replay::new(&trace, Touches::Writes, Duration::ZERO, 2).unwrap();
        assert_ne!(all_until(&mut other, 6 * EPOCH_NS - 1), touches, "another seed has others");
    }

    #[test]
    fn a_replay_can_begin_anywhere_with_the_same_moments() {
        let trace = trace(&[&[(0, 100)], &[(50, 50)]]);
        let whole = all_until(&mut Replay::new(&trace, Touches::Writes, Duration::ZERO, 5).unwrap(), 9 * EPOCH_NS);
        for offset_ns in [0, 1, EPOCH_NS / 3, EPOCH_NS, 2 * EPOCH_NS - 1] {
            let offset = Duration::from_nanos(offset_ns);
            let mut replay = Replay::new(&trace, Touches::Writes, offset, 5).unwrap();
            let shifted: Vec<_> = whole
                .iter()
                .filter(|touch| touch.at_ns >= offset_ns)
                .map(|touch| Touch { at_ns: touch.at_ns - offset_ns, ..*touch })
                .collect();
            assert_eq!(all_until(&mut replay, 9 * EPOCH_NS - offset_ns), shifted, "from {offset_ns} ns on");
        }
        let wrapped = Replay::new(&trace, Touches::Writes, Duration::from_nanos(2 * EPOCH_NS), 5).unwrap();
        assert_eq!(wrapped.offset_ns, 0);
    }

    #[test]
    fn a_trace_without_writes_ends_each_question() {
        let idle = trace(&[&[], &[]]);
        let mut replay = Replay::new(&idle, Touches::Writes, Duration::ZERO, 0).unwrap();
        assert_eq!(replay.next_until(1000 * EPOCH_NS), None);
    }

    #[test]
    fn accesses_come_along_only_where_asked_for() {
        let mut trace = trace(&[&[(3, 1)]]);
        trace.epochs[0].accessed = Some(vec![PageRun::new(3, 2)]);
        let pages = |touches| {
            let mut replay = Replay::new(&trace, touches, Duration::ZERO, 0).unwrap();
            let mut pages: Vec<_> = all_until(&mut replay, EPOCH_NS - 1).into_iter().map(|touch| touch.page).collect();
            pages.sort_unstable();
            pages
        };
        assert_eq!(pages(Touches::Writes), [3]);
        assert_eq!(pages(Touches::Accesses), [3, 3, 4]);
    }

    #[test]
    fn traces_that_cannot_be_replayed_are_refused() {
        let replay = |trace: &Trace| Replay::new(trace, Touches::Writes, Duration::ZERO, 0).map(|_| ());
        assert!(matches!(replay(&trace(&[])), Err(SimError::NoEpochs { .. })));
        assert!(matches!(replay(&trace(&[&[(99, 2)]])), Err(SimError::OutsideGuest { .. })));
        assert!(matches!(replay(&trace(&[&[(u64::MAX, 2)]])), Err(SimError::OutsideGuest { .. })));
        let mut zero = trace(&[&[]]);
        zero.epoch = Duration::ZERO;
        assert!(matches!(replay(&zero), Err(SimError::EpochLength { .. })));
        zero.epoch = Duration::from_millis(1);
        zero.pages = 1 << 40;
        assert!(matches!(replay(&zero), Err(SimError::TooManyPages { .. })));
    }

    proptest! {
        /// In whatever steps the time goes by, the touches are the same.
        #[test]
        fn steps_do_not_matter(steps in prop::collection::vec(0..40_000_000_u64, 1..60), seed in any::<u64>()) {
            let trace = trace(&[&[(0, 5)], &[(2, 7), (80, 20)], &[]]);
            let end: u64 = steps.iter().sum();
            let whole = all_until(&mut Replay::new(&trace, Touches::Writes, Duration::ZERO, seed).unwrap(), end);
            let mut replay = Replay::new(&trace, Touches::Writes, Duration::ZERO, seed).unwrap();
            let (mut now, mut pieces) = (0, Vec::new());
            for step in steps {
                now += step;
                pieces.extend(all_until(&mut replay, now));
            }
            prop_assert_eq!(pieces, whole);
        }
    }
}
