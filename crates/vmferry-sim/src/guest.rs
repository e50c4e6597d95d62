//! The guest on the source: what it wrote, what the tracking knows of it, and what the target has.
//!
//! Tracking is that of `vmferry-host`: a page is armed until its first write, which costs the guest a fault; a scan
//! reports what is not armed and arms it again. Relaxed scans leave pages out, and unarmed, as a [`ScanCycle`] says, and
//! report them unseen.
//!
//! Nothing here walks over all pages but the final check: what was written is kept as sets.

use std::time::Duration;

use vmferry_core::pages::{AddressSpaceId, Owners, PageNumber, PageRun, PageSet, ScanCycle, WholeGuest};

use crate::SimError;
use crate::link::PageClass;
use crate::replay::{Replay, Touches};
use crate::trace::Trace;

/// A page of which nothing was sent.
const NEVER_SENT: u32 = u32::MAX;

/// What a scan found, and how many pages it had to look at.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) runs: Vec<PageRun>,
    /// Pages that were looked at.
    pub(crate) looked_at: u64,
    /// Of those: found written, and armed again.
    pub(crate) armed: u64,
    /// Runs that were left out: each costs a call more.
    pub(crate) left_out_runs: u64,
}

/// The guest of a trace, as the source's host sees it.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    trace: &'a Trace,
    replay: Replay<'a>,
    /// `None` where the trace knows of one address space only.
    owners: Option<PageOwners>,
    pages: u64,
    runs: bool,
    /// Pages that hold only zero bytes.
    zero: PageSet,
    /// Pages that are not armed: written since the last scan that looked at them.
    written: PageSet,
    /// Where the cycle of relaxed scans is.
    cycle: ScanCycle,
    /// How often each page was written.
    version: Vec<u32>,
    /// The version of each page that was sent last.
    sent: Vec<u32>,
    /// First writes to armed pages.
    pub(crate) faults: u64,
    /// All writes.
    pub(crate) writes: u64,
}

impl<'a> Guest<'a> {
    /// A running guest whose pages are all armed.
    pub(crate) fn new(trace: &'a Trace, start_offset: Duration, seed: u64) -> Result<Self, SimError> {
        let replay = Replay::new(trace, Touches::Writes, start_offset, seed)?;
        let mut zero = PageSet::empty(trace.pages);
        for &run in &trace.zero {
            zero.insert_run(run);
        }
        let begun_epochs = replay.begun_epochs().saturating_sub(1);
        let written = || trace.epochs.iter().flat_map(|epoch| &epoch.written);
        let has_owners = written().any(|written| written.owner != AddressSpaceId::WHOLE_GUEST);
        Ok(Self {
            trace,
            replay,
            owners: has_owners.then(|| PageOwners {
                of_page: vec![AddressSpaceId::WHOLE_GUEST; trace.pages as usize],
                epochs: begun_epochs,
            }),
            pages: trace.pages,
            runs: true,
            zero,
            written: PageSet::empty(trace.pages),
            cycle: ScanCycle::new(trace.pages),
            version: vec![0; trace.pages as usize],
            sent: vec![NEVER_SENT; trace.pages as usize],
            faults: 0,
            writes: 0,
        })
    }

    /// The guest writes until `now_ns`, if it runs.
    pub(crate) fn advance_to(&mut self, now_ns: u64) {
        if !self.runs {
            return;
        }
        while let Some(touch) = self.replay.next_until(now_ns) {
            if self.write(PageNumber(u64::from(touch.page))) {
                self.faults += 1;
            }
            self.writes += 1;
        }
        if let Some(owners) = &mut self.owners {
            owners.learn(self.trace, self.replay.begun_epochs());
        }
    }

    /// Who owns which page, as of the epoch that wrote it last.
    pub(crate) fn owners(&self) -> &dyn Owners {
        match &self.owners {
            Some(owners) => owners,
            None => &WholeGuest,
        }
    }

    /// The guest stands still from now on.
    pub(crate) fn pause(&mut self) {
        self.runs = false;
    }

    /// The guest goes on.
    pub(crate) fn resume(&mut self) {
        self.runs = true;
    }

    /// Its VMM writes so many pages, spread over those that are not zero.
    pub(crate) fn write_by_vmm(&mut self, pages: u64) {
        let step = self.pages / pages.max(1);
        for index in 0..pages.min(self.pages) {
            let page = PageNumber(index * step);
            if !self.zero.contains(page) {
                self.write(page);
            }
        }
    }

    /// How the page would be sent now.
    pub(crate) fn class(&self, page: PageNumber) -> PageClass {
        if self.zero.contains(page) { PageClass::Zero } else { PageClass::Raw }
    }

    /// Cuts a run into stretches of one class each.
    pub(crate) fn stretches(&self, run: PageRun) -> Vec<(PageRun, PageClass)> {
        let mut stretches = Vec::new();
        let mut first = run.first.0;
        while first < run.end() {
            let class = self.class(PageNumber(first));
            let end = match class {
                PageClass::Zero => {
                    self.zero.next_run(PageNumber(first), run.end() - first).map_or(run.end(), PageRun::end)
                }
                PageClass::Raw => self.zero.next(PageNumber(first)).map_or(run.end(), |page| page.0.min(run.end())),
            };
            stretches.push((PageRun::new(first, end - first), class));
            first = end;
        }
        stretches
    }

    /// Reports and arms all written pages; if `relaxed`, some are reported unseen.
    pub(crate) fn scan(&mut self, relaxed: bool) -> Found {
        if !relaxed {
            self.cycle.reset();
            return self.scan_but(&[], &[]);
        }
        match self.cycle.skipped() {
            None => {
                let found = self.scan_but(&[], &self.cycle.not_armed());
                self.cycle.learn(&found.runs, |_| true);
                found
            }
            Some(skipped) => {
                self.cycle.next_epoch();
                self.scan_but(&skipped, &[])
            }
        }
    }

    /// Reports and arms the written pages of `run`.
    pub(crate) fn scan_run(&mut self, run: PageRun, found: &mut Vec<PageRun>) -> u64 {
        self.cycle.armed(run);
        let mut armed = 0;
        let mut from = run.first;
        while let Some(part) = self.written.next_run(from, run.end() - from.0).filter(|part| part.first.0 < run.end()) {
            let part = PageRun::new(part.first.0, part.end().min(run.end()) - part.first.0);
            for page in part.pages() {
                self.written.remove(page);
            }
            armed += part.count;
            found.push(part);
            from = PageNumber(part.end());
            if from.0 >= run.end() {
                break;
            }
        }
        armed
    }

    /// The content that these pages have now was sent.
    pub(crate) fn mark_sent(&mut self, run: PageRun) {
        let range = run.first.0 as usize..run.end() as usize;
        self.sent[range.clone()].copy_from_slice(&self.version[range]);
    }

    /// Fails unless the guest stands still and the last content of each page was sent.
    pub(crate) fn check_handed_over(&self) -> Result<(), SimError> {
        if self.runs {
            return Err(SimError::RunsTwice);
        }
        let mut lost = self.version.iter().zip(&self.sent).enumerate().filter(|(_, (version, sent))| version != sent);
        match lost.next() {
            Some((page, _)) => Err(SimError::LostWrite { page: page as u64, pages: 1 + lost.count() as u64 }),
            None => Ok(()),
        }
    }

    /// Writes a page; whether it was armed.
    fn write(&mut self, page: PageNumber) -> bool {
        self.version[page.0 as usize] += 1;
        self.zero.remove(page);
        self.written.insert(page)
    }

    /// All pages but `skipped`, which are reported unseen; `not_armed` are looked at and not armed.
    fn scan_but(&mut self, skipped: &[PageRun], not_armed: &[PageRun]) -> Found {
        let unarmed = [skipped, not_armed].concat();
        let stay: Vec<PageNumber> = unarmed.iter().flat_map(|&run| members(&self.written, run)).collect();
        let armed = self.written.len() - stay.len() as u64;
        for &run in skipped {
            self.written.insert_run(run);
        }
        let runs = self.written.runs().collect();
        self.written.clear();
        for page in stay {
            self.written.insert(page);
        }
        let skipped_pages: u64 = skipped.iter().map(|run| run.count).sum();
        Found { runs, looked_at: self.pages - skipped_pages, armed, left_out_runs: unarmed.len() as u64 }
    }
}

/// The owner of each page by the trace's epochs so far.
#[derive(Debug)]
struct PageOwners {
    of_page: Vec<AddressSpaceId>,
    /// Epochs of which the owners are known.
    epochs: u64,
}

impl PageOwners {
    fn learn(&mut self, trace: &Trace, epochs: u64) {
        // More than one round of the trace changes nothing.
        for number in self.epochs.max(epochs.saturating_sub(trace.epochs.len() as u64))..epochs {
            for written in &trace.epoch_at(number).written {
                self.of_page[written.run.first.0 as usize..written.run.end() as usize].fill(written.owner);
            }
        }
        self.epochs = epochs;
    }
}

impl Owners for PageOwners {
    fn owner_of(&self, run: PageRun) -> (AddressSpaceId, u64) {
        let owners = &self.of_page[run.first.0 as usize..run.end() as usize];
        let owner = owners[0];
        (owner, owners.iter().take_while(|&&other| other == owner).count() as u64)
    }
}

/// The pages of `run` that are in `set`.
fn members(set: &PageSet, run: PageRun) -> Vec<PageNumber> {
    let mut pages = Vec::new();
    let mut from = run.first;
    while let Some(page) = set.next(from).filter(|page| page.0 < run.end()) {
        pages.push(page);
        from = PageNumber(page.0 + 1);
    }
    pages
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vmferry_core::pages::AddressSpaceId;

    use super::*;
    use crate::trace::{TraceEpoch, WrittenRun};

    const MS: u64 = 1_000_000;

    fn trace(pages: u64, epochs: &[&[(u64, u64)]]) -> Trace {
        let written = |&(first, count): &(u64, u64)| WrittenRun {
            run: PageRun::new(first, count),
            owner: AddressSpaceId::WHOLE_GUEST,
        };
        Trace {
            name: "test".into(),
            pages,
            epoch: Duration::from_millis(1),
            zero: vec![PageRun::new(90, 5)],
            epochs: epochs
                .iter()
                .map(|runs| TraceEpoch { written: runs.iter().map(written).collect(), accessed: None })
                .collect(),
        }
    }

    #[test]
    fn pages_belong_to_whom_the_trace_says() {
        let mut trace = trace(100, &[&[(10, 10)], &[(15, 10)], &[(40, 1)]]);
        let one = Guest::new(&trace, Duration::ZERO, 3).unwrap();
        assert_eq!(one.owners().sole_owner(), Some(AddressSpaceId::WHOLE_GUEST));
        for (epoch, owner) in trace.epochs.iter_mut().zip([1, 2, 3]) {
            epoch.written[0].owner = AddressSpaceId(owner);
        }
        let mut guest = Guest::new(&trace, Duration::ZERO, 3).unwrap();
        let owner_of = |guest: &Guest<'_>, first, count| guest.owners().owner_of(PageRun::new(first, count));
        guest.advance_to(0);
        assert_eq!(owner_of(&guest, 8, 5), (AddressSpaceId::WHOLE_GUEST, 2));
        assert_eq!(owner_of(&guest, 10, 20), (AddressSpaceId(1), 10));
        guest.advance_to(2 * MS);
        assert_eq!(owner_of(&guest, 12, 20), (AddressSpaceId(1), 3));
        assert_eq!(owner_of(&guest, 15, 20), (AddressSpaceId(2), 10));
        guest.advance_to(50 * MS);
        assert_eq!(owner_of(&guest, 40, 1), (AddressSpaceId(3), 1));
    }

    fn pages(runs: &[PageRun]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.first.0..run.end()).collect()
    }

    #[test]
    fn a_page_is_reported_once_and_faults_once_per_arming() {
        let trace = trace(100, &[&[(10, 5)], &[(12, 5)], &[]]);
        let mut guest = Guest::new(&trace, Duration::ZERO, 3).unwrap();
        guest.advance_to(2 * MS - 1);
        assert_eq!((guest.writes, guest.faults), (10, 7));
        assert_eq!(guest.scan(false).runs, [PageRun::new(10, 7)]);
        assert_eq!(guest.scan(false).runs, []);
        guest.advance_to(4 * MS - 1);
        assert_eq!(guest.faults, 12);
        let mut found = Vec::new();
        assert_eq!(guest.scan_run(PageRun::new(11, 3), &mut found), 3);
        assert_eq!(found, [PageRun::new(11, 3)]);
        assert_eq!(guest.scan(false).runs, [PageRun::new(10, 1), PageRun::new(14, 1)]);
        guest.pause();
        guest.advance_to(100 * MS);
        assert_eq!(guest.written.len(), 0);
        guest.resume();
        guest.advance_to(100 * MS);
        assert_ne!(guest.written.len(), 0);
    }

    #[test]
    fn a_hot_page_faults_once_in_a_cycle_and_is_always_reported() {
        let trace = trace(100, &[&[(10, 1)]]);
        let mut guest = Guest::new(&trace, Duration::ZERO, 0).unwrap();
        for epoch in 1..=80 {
            guest.advance_to(epoch * MS - 1);
            assert_eq!(guest.scan(true).runs, [PageRun::new(10, 1)], "epoch {epoch}");
        }
        // Once at the beginning, and once in each cycle: one of 8 epochs, four of 16, and one that has begun.
        assert_eq!((guest.writes, guest.faults), (80, 7));
        let last = guest.scan(false);
        // The cycle ended with a scan that left the page out, so it was found unarmed.
        assert_eq!((last.runs, last.armed, last.looked_at), (vec![PageRun::new(10, 1)], 1, 100));
        assert_eq!(guest.scan(true).runs, []);
    }

    #[test]
    fn a_page_about_to_be_read_is_armed_even_if_it_was_left_out() {
        let trace = trace(100, &[&[(10, 2)]]);
        let mut guest = Guest::new(&trace, Duration::ZERO, 0).unwrap();
        for epoch in 1..=4 {
            guest.advance_to(epoch * MS - 1);
            guest.scan(true);
        }
        guest.scan_run(PageRun::new(10, 1), &mut Vec::new());
        let found = guest.scan(true);
        assert_eq!(found.runs, [PageRun::new(11, 1)], "nothing was written meanwhile");
        assert_eq!((found.left_out_runs, found.looked_at), (1, 99));
    }

    #[test]
    fn stretches_are_of_one_class() {
        let trace = trace(100, &[&[(92, 1)]]);
        let mut guest = Guest::new(&trace, Duration::ZERO, 0).unwrap();
        let (zero, raw) = (PageClass::Zero, PageClass::Raw);
        let expected = [(PageRun::new(80, 10), raw), (PageRun::new(90, 5), zero), (PageRun::new(95, 5), raw)];
        assert_eq!(guest.stretches(PageRun::new(80, 20)), expected);
        assert_eq!(guest.stretches(PageRun::new(91, 2)), [(PageRun::new(91, 2), zero)]);
        guest.advance_to(MS);
        let expected = [(PageRun::new(91, 1), zero), (PageRun::new(92, 1), raw), (PageRun::new(93, 1), zero)];
        assert_eq!(guest.stretches(PageRun::new(91, 3)), expected, "a page that was written is not zero any more");
    }

    #[test]
    fn a_write_after_the_last_sending_is_found_at_the_hand_over() {
        let trace = trace(100, &[&[(10, 5)], &[]]);
        let mut guest = Guest::new(&trace, Duration::ZERO, 0).unwrap();
        guest.mark_sent(PageRun::new(0, 100));
        guest.advance_to(2 * MS - 1);
        assert_eq!(guest.check_handed_over(), Err(SimError::RunsTwice));
        guest.pause();
        assert_eq!(guest.check_handed_over(), Err(SimError::LostWrite { page: 10, pages: 5 }));
        guest.mark_sent(PageRun::new(10, 4));
        assert_eq!(guest.check_handed_over(), Err(SimError::LostWrite { page: 14, pages: 1 }));
        guest.mark_sent(PageRun::new(14, 1));
        assert_eq!(guest.check_handed_over(), Ok(()));
        guest.write_by_vmm(2);
        assert_eq!(guest.check_handed_over(), Err(SimError::LostWrite { page: 0, pages: 2 }));
    }

    proptest! {
        /// The tracking's contract, whatever scans come when: each page written is reported by a later scan, and an
        /// exact scan reports nothing else.
        #[test]
        fn no_write_goes_unreported(
            epochs in prop::collection::vec(prop::collection::vec((0..60_u64, 1..30_u64), 0..3), 1..12),
            steps in prop::collection::vec((0..3_000_000_u64, 0..4_u32, 0..80_u64), 1..60),
            seed in any::<u64>(),
        ) {
            let epochs: Vec<Vec<(u64, u64)>> = epochs
                .into_iter()
                .map(|runs| {
                    let mut set = PageSet::empty(100);
                    for (first, count) in runs {
                        set.insert_run(PageRun::new(first, count));
                    }
                    set.runs().map(|run| (run.first.0, run.count)).collect()
                })
                .collect();
            let slices: Vec<&[(u64, u64)]> = epochs.iter().map(Vec::as_slice).collect();
            let trace = trace(100, &slices);
            let mut guest = Guest::new(&trace, Duration::ZERO, seed).unwrap();
            let mut replay = Replay::new(&trace, Touches::Writes, Duration::ZERO, seed).unwrap();
            // Written and not reported since, and written since last armed by a scan that looked.
            let mut debt: BTreeSet<u64> = BTreeSet::new();
            let mut now = 0;
            for (step, kind, first) in steps {
                now += step;
                guest.advance_to(now);
                while let Some(touch) = replay.next_until(now) {
                    debt.insert(u64::from(touch.page));
                }
                match kind {
                    0 | 1 => {
                        let found = pages(&guest.scan(kind == 0).runs);
                        prop_assert!(debt.is_subset(&found), "{:?} of {:?} reported", found, debt);
                        debt.clear();
                    }
                    2 => {
                        let run = PageRun::new(first, 20);
                        let mut found = Vec::new();
                        let armed = guest.scan_run(run, &mut found);
                        let found = pages(&found);
                        prop_assert_eq!(armed, found.len() as u64);
                        let inside: BTreeSet<u64> = debt.iter().copied().filter(|&page| (first..run.end()).contains(&page)).collect();
                        prop_assert!(inside.is_subset(&found));
                        prop_assert!(found.iter().all(|&page| (first..run.end()).contains(&page)));
                        debt.retain(|page| !inside.contains(page));
                    }
                    _ => {}
                }
            }
            guest.advance_to(now);
            guest.scan(false);
            prop_assert_eq!(guest.scan(false).runs, vec![]);
        }
    }
}
