//! How likely a page is to be written next, learned from the gaps between the writes of all pages.
//!
//! An aged count says how often a page is written, not when. For pages written at random that is all there is to know;
//! for a loop over memory it is the wrong way round, because the page just written is the one that will not be written
//! for longest. What tells the two apart is the gap between the last two writes of a page, and its age, the epochs
//! since the last one: in a loop, pages of gap 20 are written at age 20 and at no other.
//!
//! So pages are put into classes by their last gap, and for each class and age is counted how many pages stood there
//! and how many of those were written: the chance of a write, the *hazard* of renewal theory, as an actuary's life
//! table has it. No shape is assumed. Random writes yield a hazard that does not depend on age, loops one that is zero
//! up to the period, memory written once and never again one that stays zero; and each is recognised from the writes of
//! other pages, before the page at hand has shown it.
//!
//! The heat of a page is then the number of its writes to come, each discounted by the half-life just as an aged count
//! discounts the writes that were: `H(age) = (1 − q) · E[sum of q^(k−1) over all k where it is written in the k-th epoch
//! from now]`, with `q` what is left of a write after an epoch. For a page written in each epoch this is 1, and
//! for pages that are written in a loop of `p` epochs the mean over all ages is exactly 1/p. It is computed backwards
//! over the ages, from `H(a) = h(a)·((1 − q) + q·H(1)) + (1 − h(a))·q·H(a + 1)`, where `h` is the hazard; that the
//! next gap is of the same class as the last is assumed there.
//!
//! Cost: some additions a write, some ten thousand additions an epoch, and fixed tables of 70 KB.
//!
//! Source: the estimate of a hazard from exposures and events is the occurrence/exposure rate of survival analysis, as in
//! D. R. Cox and D. Oakes, "Analysis of Survival Data", 1984; its use here is ours.

use std::num::NonZeroU32;

use super::AgeGroup;

/// Classes of gaps: 0 is no gap yet, 1 to 8 are exact, then two classes an octave. The last takes all that are longer.
const CLASSES: usize = 32;
/// Ages: 1 to 15 are exact, then eight an octave up to 2047. The last takes all that are older.
const AGES: usize = 72;

/// Pages written in so many latest epochs are counted by epoch, older ones by groups of epochs.
const FINE_EPOCHS: u32 = 128;
/// Epochs in a group.
const GROUP_EPOCHS: u32 = 16;
/// The groups that are kept. Pages that are older are in no count.
const GROUPS: u32 = 128;

/// What is left of the evidence after an epoch: half of it after 34. Long enough to see a loop come round, short enough to
/// follow a guest that turns to something else.
const EVIDENCE_KEPT: f32 = 0.98;
/// Before there is evidence, a page not written for `a` epochs is taken to have been seen `a + 1` times and written once
/// (Laplace's rule of succession). This counts as much as so many pages.
const PRIOR_PAGES: f64 = 2.0;
/// With the evidence of so many pages, half of the heat is from here and half from the page's own count.
const TRUSTED_PAGES: f64 = 12.0;
/// With so much evidence, the page's own count is not looked at.
const FULLY_TRUSTED_PAGES: f64 = 10_000.0;

/// When a page was written last, and the class of the gap before that write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LastWrite(u32);

impl LastWrite {
    const CLASS_BITS: u32 = CLASSES.ilog2();
    pub(super) const MAX_EPOCH: u32 = u32::MAX >> Self::CLASS_BITS;

    fn new(epoch: u32, class: usize) -> Self {
        Self(epoch << Self::CLASS_BITS | class as u32)
    }

    /// The epoch, counted from 1; 0 for a page that was never written.
    pub(super) fn epoch(self) -> u32 {
        self.0 >> Self::CLASS_BITS
    }

    fn class(self) -> usize {
        self.0 as usize % CLASSES
    }

    /// Lets the page look as if the count of epochs had begun so many later.
    pub(super) fn rebase(&mut self, by: u32) {
        if self.epoch() > 0 {
            *self = Self::new(self.epoch().saturating_sub(by).max(1), self.class());
        }
    }
}

/// The pages written last in one epoch or group of epochs, by class.
type Row = [u32; CLASSES];

/// The class of a gap.
fn class_of(gap_epochs: u32) -> usize {
    if gap_epochs <= 8 {
        return gap_epochs as usize;
    }
    let octave = gap_epochs.ilog2();
    let half = (gap_epochs >> (octave - 1)) & 1;
    (9 + (octave as usize - 3) * 2 + half as usize).min(CLASSES - 1)
}

/// Where an age is in the tables.
fn age_index(age_epochs: u32) -> usize {
    if age_epochs < 16 {
        return age_epochs as usize;
    }
    let octave = age_epochs.ilog2();
    let eighth = (age_epochs >> (octave - 3)) & 7;
    (16 + (octave as usize - 4) * 8 + eighth as usize).min(AGES - 1)
}

/// How many ages share a place in the tables.
fn ages_at(index: usize) -> u32 {
    if index < 16 { 1 } else { 2 << ((index - 16) / 8) }
}

/// The least of the ages that share a place.
fn first_age_at(index: usize) -> u32 {
    if index < 16 { index as u32 } else { (8 + (index as u32 - 16) % 8) << ((index - 16) / 8 + 1) }
}

/// The counts by class and age, and the heat that follows from them.
#[derive(Debug, Clone)]
pub(super) struct WriteGaps {
    /// What is left of a write after an epoch.
    kept: f64,
    /// The current epoch, from 1.
    now: u32,
    written_now: u64,
    /// The latest epochs, each at its number modulo [`FINE_EPOCHS`].
    fine: Vec<Row>,
    /// Groups of epochs before those, each at its number modulo [`GROUPS`].
    groups: Vec<Row>,
    /// By age, then class: pages written in this epoch, pages written in all epochs, pages that stood there and were not
    /// written; the latter two with old evidence fading.
    writes_now: Vec<Row>,
    writes: Vec<[f32; CLASSES]>,
    idle: Vec<[f32; CLASSES]>,
    /// By age, then class; for the first of the ages that share a place.
    heat: Vec<[f32; CLASSES]>,
}

impl WriteGaps {
    pub(super) fn new(half_life_epochs: NonZeroU32) -> Self {
        let mut gaps = Self {
            kept: (-1.0 / f64::from(half_life_epochs.get())).exp2(),
            now: 1,
            written_now: 0,
            fine: vec![[0; CLASSES]; FINE_EPOCHS as usize],
            groups: vec![[0; CLASSES]; GROUPS as usize],
            writes_now: vec![[0; CLASSES]; AGES],
            writes: vec![[0.0; CLASSES]; AGES],
            idle: vec![[0.0; CLASSES]; AGES],
            heat: vec![[0.0; CLASSES]; AGES],
        };
        (0..CLASSES).for_each(|class| gaps.compute_heat(class));
        gaps
    }

    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + (self.fine.capacity() + self.groups.capacity() + self.writes_now.capacity()) * size_of::<Row>()
            + (self.writes.capacity() + self.idle.capacity() + self.heat.capacity()) * size_of::<[f32; CLASSES]>()
    }

    /// As if so many epochs had passed without writes.
    #[cfg(test)]
    pub(super) fn starting_at(half_life_epochs: NonZeroU32, now: u32) -> Self {
        Self { now, ..Self::new(half_life_epochs) }
    }

    /// The current epoch, from 1.
    pub(super) fn now(&self) -> u32 {
        self.now
    }

    /// A page is written in the current epoch. `last` is that of its last write, or the default if there was none.
    /// Returns whether there was none. Further writes in the same epoch change nothing.
    #[inline]
    pub(super) fn write(&mut self, last: &mut LastWrite) -> bool {
        let now = self.now;
        let is_new = last.epoch() == 0;
        if last.epoch() == now {
            return false;
        }
        let mut class = 0;
        if !is_new {
            let age = now - last.epoch();
            self.forget(*last);
            self.writes_now[age_index(age)][last.class()] += 1;
            class = class_of(age);
        }
        self.fine[(now % FINE_EPOCHS) as usize][class] += 1;
        self.written_now += 1;
        *last = LastWrite::new(now, class);
        is_new
    }

    /// A page is not tracked any more.
    #[inline]
    pub(super) fn forget(&mut self, last: LastWrite) {
        if let Some(row) = self.row_of(last.epoch()) {
            row[last.class()] -= 1;
        }
    }

    #[inline]
    fn row_of(&mut self, epoch: u32) -> Option<&mut Row> {
        let age = self.now - epoch;
        if age < FINE_EPOCHS {
            return Some(&mut self.fine[(epoch % FINE_EPOCHS) as usize]);
        }
        let groups_ago = (self.now - FINE_EPOCHS) / GROUP_EPOCHS - epoch / GROUP_EPOCHS;
        (groups_ago < GROUPS).then(|| &mut self.groups[(epoch / GROUP_EPOCHS % GROUPS) as usize])
    }

    /// The counted pages: each row with its first epoch and an epoch in its middle, the newest first.
    fn rows(&self) -> impl Iterator<Item = (&Row, u32, u32)> {
        let fine = (0..FINE_EPOCHS.min(self.now)).map(|age| {
            let epoch = self.now - age;
            (&self.fine[(epoch % FINE_EPOCHS) as usize], epoch, epoch)
        });
        let newest = self.now.checked_sub(FINE_EPOCHS).map(|epoch| epoch / GROUP_EPOCHS);
        let groups = newest.into_iter().flat_map(|newest| (newest.saturating_sub(GROUPS - 1)..=newest).rev());
        fine.chain(groups.map(|group| {
            let first = group * GROUP_EPOCHS;
            (&self.groups[(group % GROUPS) as usize], first, (first + GROUP_EPOCHS / 2).min(self.now - FINE_EPOCHS))
        }))
    }

    /// Ends the epoch. Returns by how much all [`LastWrite`]s must be rebased then, which is 0 but once in 2^26 epochs.
    #[must_use]
    pub(super) fn end_epoch(&mut self) -> u32 {
        self.gather_evidence();
        for class in 0..CLASSES {
            // Nothing changes where no page was yet.
            if (0..AGES).any(|age| self.evidence(age, class) > 0.0) {
                self.compute_heat(class);
            }
        }
        self.written_now = 0;
        let mut by = 0;
        if self.now == LastWrite::MAX_EPOCH {
            // Rows stay where they are: their numbers are taken modulo divisors of this.
            by = LastWrite::MAX_EPOCH / 2 / (GROUP_EPOCHS * GROUPS) * (GROUP_EPOCHS * GROUPS);
            self.now -= by;
        }
        self.now += 1;
        if let Some(leaving) = self.now.checked_sub(FINE_EPOCHS) {
            let group = &mut self.groups[(leaving / GROUP_EPOCHS % GROUPS) as usize];
            if leaving % GROUP_EPOCHS == 0 {
                *group = [0; CLASSES];
            }
            let row = std::mem::replace(&mut self.fine[(leaving % FINE_EPOCHS) as usize], [0; CLASSES]);
            group.iter_mut().zip(row).for_each(|(sum, pages)| *sum += pages);
        }
        by
    }

    fn gather_evidence(&mut self) {
        for (writes, now) in self.writes.iter_mut().zip(&mut self.writes_now) {
            writes.iter_mut().zip(now).for_each(|(sum, now)| {
                *sum = *sum * EVIDENCE_KEPT + *now as f32;
                *now = 0;
            });
        }
        let mut idle = std::mem::take(&mut self.idle);
        idle.as_flattened_mut().iter_mut().for_each(|sum| *sum *= EVIDENCE_KEPT);
        for (row, _, middle) in self.rows().skip(1) {
            let at_age = &mut idle[age_index(self.now - middle)];
            at_age.iter_mut().zip(row).for_each(|(sum, &pages)| *sum += pages as f32);
        }
        self.idle = idle;
    }

    fn evidence(&self, age: usize, class: usize) -> f64 {
        f64::from(self.writes[age][class] + self.idle[age][class])
    }

    fn hazard(&self, age: usize, class: usize) -> f64 {
        let prior = PRIOR_PAGES / (age as f64 + 1.0);
        (f64::from(self.writes[age][class]) + prior) / (self.evidence(age, class) + PRIOR_PAGES)
    }

    /// Heat by age, see the module.
    fn compute_heat(&mut self, class: usize) {
        let kept = self.kept;
        // Each heat is `own + after_write · H(1)`, for an H(1) that is known in the end.
        let mut parts = [(0.0, 0.0); AGES];
        let hazard = self.hazard(AGES - 1, class);
        // Beyond the last age the hazard stays as it is.
        let idle_kept = (1.0 - hazard) * kept;
        let mut at = (hazard * (1.0 - kept) / (1.0 - idle_kept), hazard * kept / (1.0 - idle_kept));
        for age in (1..AGES).rev() {
            let hazard = self.hazard(age, class);
            let idle_kept = (1.0 - hazard) * kept;
            let passed = idle_kept.powi(ages_at(age) as i32);
            let written = hazard * (1.0 - passed) / (1.0 - idle_kept);
            at = (at.0 * passed + written * (1.0 - kept), at.1 * passed + written * kept);
            parts[age] = at;
        }
        let first = at.0 / (1.0 - at.1);
        for (age, (own, after_write)) in parts.into_iter().enumerate().skip(1) {
            self.heat[age][class] = (own + after_write * first) as f32;
        }
    }

    /// The heat of a page that was written: what the gaps say, and as far as there is little evidence, what `by_count`
    /// says, the expected writes per epoch from the page's own count.
    #[inline]
    pub(super) fn heat_or(&self, last: LastWrite, by_count: impl FnOnce() -> f64) -> f64 {
        let by_gaps = self.heat(last);
        let evidence = self.evidence(age_index(self.age(last)), last.class());
        if evidence >= FULLY_TRUSTED_PAGES {
            return by_gaps;
        }
        let trust = evidence / (evidence + TRUSTED_PAGES);
        trust * by_gaps + (1.0 - trust) * by_count()
    }

    /// The heat of a page that was written, from the gaps alone.
    #[inline]
    pub(super) fn heat(&self, last: LastWrite) -> f64 {
        let (age, class) = (self.age(last), last.class());
        let index = age_index(age);
        let heat = f64::from(self.heat[index][class]);
        let ages = ages_at(index);
        if ages == 1 || index == AGES - 1 {
            return heat;
        }
        // On the way to the next place in the table: in a loop, the older of two pages is to be written sooner.
        let part = f64::from(age - first_age_at(index)) / f64::from(ages);
        heat + (f64::from(self.heat[index + 1][class]) - heat) * part
    }

    fn age(&self, last: LastWrite) -> u32 {
        // A page of the current epoch is as good as one epoch old: the next it can be written in is the next.
        (self.now - last.epoch()).max(1)
    }

    /// The pages by age for [`live_bound`](super::live_bound), as of the end of the last epoch in which anything was
    /// written.
    pub(super) fn age_groups(&self) -> impl Iterator<Item = AgeGroup> {
        let end = self.now + u32::from(self.written_now > 0);
        self.rows().map(move |(row, first, _)| AgeGroup {
            pages: row.iter().map(|&pages| u64::from(pages)).sum(),
            oldest_epochs: u64::from(end - first),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn gaps(half_life: u32) -> WriteGaps {
        WriteGaps::new(NonZeroU32::new(half_life).expect("no half-life in these tests is zero"))
    }

    #[test]
    fn classes_and_ages_are_without_holes() {
        assert_eq!((class_of(0), class_of(1), class_of(8), class_of(9), class_of(12)), (0, 1, 8, 9, 10));
        assert_eq!(class_of(u32::MAX), CLASSES - 1);
        assert!((1..100_000).all(|gap| (0..=1).contains(&(class_of(gap + 1) - class_of(gap)))));
        assert_eq!((1..2048).map(age_index).max(), Some(AGES - 1));
        for index in 1..AGES {
            let ages = (1..2048).filter(|&age| age_index(age) == index).count();
            assert_eq!(ages, ages_at(index) as usize, "index {index}");
            assert_eq!((1..2048).find(|&age| age_index(age) == index), Some(first_age_at(index)));
        }
    }

    /// Every page's writes, kept as they are.
    #[derive(Default)]
    struct Model {
        now: u32,
        last: BTreeMap<u32, (u32, usize)>,
        writes: BTreeMap<(usize, usize), f64>,
        idle: BTreeMap<(usize, usize), f64>,
    }

    impl Model {
        fn end_epoch(&mut self, written: &[u32]) {
            for sum in self.writes.values_mut().chain(self.idle.values_mut()) {
                *sum *= f64::from(EVIDENCE_KEPT);
            }
            for (page, &(epoch, class)) in &self.last {
                let sums = if written.contains(page) { &mut self.writes } else { &mut self.idle };
                *sums.entry((age_index(self.now - epoch), class)).or_default() += 1.0;
            }
            for &page in written {
                let class = self.last.get(&page).map_or(0, |&(epoch, _)| class_of(self.now - epoch));
                self.last.insert(page, (self.now, class));
            }
        }

        /// The sum over all futures, one epoch at a time, with the hazard of each single age.
        fn heat(&self, age: u32, class: usize, kept: f64) -> f64 {
            let hazard = |age: u32| {
                let at = (age_index(age), class);
                let sum = |sums: &BTreeMap<_, f64>| sums.get(&at).copied().unwrap_or(0.0);
                let prior = PRIOR_PAGES / (at.0 as f64 + 1.0);
                (sum(&self.writes) + prior) / (sum(&self.writes) + sum(&self.idle) + PRIOR_PAGES)
            };
            // Far enough out nothing counts any more: the discount at the longest half-life here is 0.89.
            let hazards: Vec<f64> = (0..age + 400).map(hazard).collect();
            let from = |age: u32, first: f64| {
                let ages = hazards[age as usize..].iter().rev();
                ages.fold(0.0, |heat, hazard| hazard * ((1.0 - kept) + kept * first) + (1.0 - hazard) * kept * heat)
            };
            // Linear in the heat after a write: `first = from(1, 0) + first · (from(1, 1) − from(1, 0))`.
            let first = from(1, 0.0) / (1.0 - (from(1, 1.0) - from(1, 0.0)));
            from(age, first)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn heat_follows_from_plain_counts(
            epochs in prop::collection::vec(prop::collection::btree_set(0..20_u32, 0..12), 1..40),
            half_life in 1..6_u32,
            forgotten in prop::collection::btree_set(0..20_u32, 0..4),
        ) {
            let mut gaps = gaps(half_life);
            let mut model = Model { now: 1, ..Model::default() };
            let mut last: BTreeMap<u32, LastWrite> = BTreeMap::new();
            let half = epochs.len() / 2;
            for (index, epoch) in epochs.into_iter().enumerate() {
                let written: Vec<u32> = epoch.into_iter().collect();
                for &page in &written {
                    let is_new = gaps.write(last.entry(page).or_default());
                    prop_assert_eq!(is_new, !model.last.contains_key(&page));
                }
                model.end_epoch(&written);
                prop_assert_eq!(gaps.end_epoch(), 0);
                model.now += 1;
                if index == half {
                    for page in &forgotten {
                        last.remove(page).into_iter().for_each(|last| gaps.forget(last));
                        model.last.remove(page);
                    }
                }
            }
            for (page, &(epoch, class)) in &model.last {
                let age = model.now - epoch;
                let heat = gaps.heat(last[page]);
                // Between the places of the table the heat is taken to be a straight line.
                let places = [0, 1].map(|next| first_age_at(age_index(age) + next));
                let [before, after] = places.map(|age| model.heat(age, class, gaps.kept));
                let part = f64::from(age - places[0]) / f64::from(places[1] - places[0]);
                let expected = before + part * (after - before);
                prop_assert!((heat - expected).abs() < 1e-5, "age {age} class {class}: {heat}, {expected} expected");
            }
            let counted: u64 = gaps.age_groups().map(|group| group.pages).sum();
            prop_assert_eq!(counted, model.last.len() as u64);
        }

        /// Over long times, with pages that are never written again: pages leave the counts only when they are older
        /// than the oldest group.
        #[test]
        fn pages_are_counted_by_age_for_long(
            steps in prop::collection::vec((0..40_u32, prop_oneof![1..20_u32, 1..900_u32]), 1..20),
            start in prop_oneof![Just(1_u32), Just(LastWrite::MAX_EPOCH - 5000)],
        ) {
            let mut gaps = WriteGaps::starting_at(NonZeroU32::MIN, start);
            let mut last: BTreeMap<u32, LastWrite> = BTreeMap::new();
            // Epochs as they would be without rebasing.
            let mut now = u64::from(start);
            let mut written: BTreeMap<u32, u64> = BTreeMap::new();
            for (page, epochs) in steps {
                gaps.write(last.entry(page).or_default());
                written.insert(page, now);
                for _ in 0..epochs {
                    let by = gaps.end_epoch();
                    if by > 0 {
                        last.values_mut().for_each(|last| last.rebase(by));
                    }
                    now += 1;
                }
            }
            let mut expected: Vec<u64> = written.values().map(|&written| now - written).collect();
            expected.sort_unstable();
            let mut counted = 0;
            for group in gaps.age_groups() {
                for _ in 0..group.pages {
                    let age = expected[counted];
                    prop_assert!((age..age + u64::from(GROUP_EPOCHS)).contains(&group.oldest_epochs), "{group:?}, {age}");
                    counted += 1;
                }
            }
            let limit = u64::from(FINE_EPOCHS + (GROUPS - 1) * GROUP_EPOCHS);
            prop_assert!(expected[counted..].iter().all(|&age| age >= limit), "{:?}", &expected[counted..]);
        }
    }

    /// A loop over 20,000 pages, a thousand an epoch: the pages to be written next are the hottest, those just written the
    /// coldest, and together they are as hot as a thousand pages.
    #[test]
    fn a_loop_is_hottest_where_it_goes_next() {
        let mut gaps = gaps(4);
        let mut last = vec![LastWrite::default(); 20_000];
        for epoch in 0..100 {
            last[epoch % 20 * 1000..][..1000].iter_mut().for_each(|last| {
                gaps.write(last);
            });
            assert_eq!(gaps.end_epoch(), 0);
        }
        let heats: Vec<f64> = last.iter().step_by(1000).map(|&last| gaps.heat(last)).collect();
        assert!(heats.is_sorted_by(|next, later| next >= later), "{heats:?}");
        assert!(heats[0] > 0.1 && heats[19] < heats[0] / 10.0, "{heats:?}");
        let sum: f64 = heats.iter().sum();
        assert!((sum - 1.0).abs() < 0.1, "{sum}");
    }

    #[test]
    fn memory_written_once_is_known_to_be_cold() {
        let mut gaps = gaps(4);
        let mut last = vec![LastWrite::default(); 4000];
        let mut hot = LastWrite::default();
        for epoch in 0..40 {
            last[epoch * 100..][..100].iter_mut().for_each(|last| assert!(gaps.write(last)));
            gaps.write(&mut hot);
            assert_eq!(gaps.end_epoch(), 0);
        }
        assert!(gaps.heat(hot) > 0.9, "{}", gaps.heat(hot));
        // By its own count the page just written would have 0.16.
        assert!(gaps.heat(last[3999]) < 0.01, "{}", gaps.heat(last[3999]));
    }

    #[test]
    fn little_evidence_leaves_it_to_the_count() {
        let mut gaps = gaps(4);
        let mut last = LastWrite::default();
        gaps.write(&mut last);
        let _ = gaps.end_epoch();
        assert_eq!(gaps.heat_or(last, || 0.7), 0.7);
        let mut others = vec![LastWrite::default(); 100_000];
        others.iter_mut().for_each(|last| assert!(gaps.write(last)));
        let _ = gaps.end_epoch();
        let _ = gaps.end_epoch();
        let at_age_one = *others.last().expect("not empty");
        assert_eq!(gaps.now() - at_age_one.epoch(), 2);
        assert!(gaps.heat_or(at_age_one, || 0.7) > 0.1, "no evidence of this age yet");
        let _ = gaps.end_epoch();
        assert_eq!(gaps.heat_or(LastWrite::new(gaps.now() - 2, 0), || panic!("not to be asked")), {
            gaps.heat(LastWrite::new(gaps.now() - 2, 0))
        });
    }
}
