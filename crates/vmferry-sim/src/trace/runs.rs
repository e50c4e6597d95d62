//! Sets of pages as sorted runs.
//!
//! Their size follows the number of runs and not that of the pages: a run of a whole 64 TiB guest costs as much as one
//! of a single page. So a file cannot make this crate use more memory than its own runs do.

use std::collections::BTreeMap;

use vmferry_core::pages::{AddressSpaceId, PageNumber, PageRun};

use super::WrittenRun;

/// A value for each page of a set, kept as runs of pages with equal values.
///
/// An update costs O(log n) and what it replaces; all updates together O(n log n) in their number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunMap<T> {
    /// First page to one past the last one, and the value.
    runs: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for RunMap<T> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl RunMap<()> {
    /// Adds pages to a set.
    pub(crate) fn add(&mut self, run: PageRun) {
        self.update(run, |_, _| ());
    }
}

impl<T: Copy + PartialEq> RunMap<T> {
    /// Gives new values to all pages of `run`. `value` gets pieces of the run in ascending order with the value that they
    /// have, `None` where pages are new, and returns the one that they get.
    pub(crate) fn update(&mut self, run: PageRun, mut value: impl FnMut(PageRun, Option<T>) -> T) {
        let (mut at, end) = (run.first.0, run.end());
        if at == end {
            return;
        }
        // The usual case of a page that is written again and again.
        if let Some((old_end, old)) = self.runs.get_mut(&at)
            && *old_end == end
        {
            *old = value(run, Some(*old));
            return;
        }
        // A run that begins before this one and reaches into it is cut.
        if let Some((_, entry)) = self.runs.range_mut(..at).next_back()
            && entry.0 > at
        {
            let (old_end, old) = *entry;
            entry.0 = at;
            if old_end > end {
                self.runs.insert(end, (old_end, old));
            }
            let piece = PageRun::new(at, old_end.min(end) - at);
            at = piece.end();
            self.append(piece, value(piece, Some(old)));
        }
        while at < end {
            let next = self.runs.range(at..end).next().map(|(&first, &entry)| (first, entry));
            let first = next.map_or(end, |(first, _)| first);
            if first > at {
                let gap = PageRun::new(at, first - at);
                self.append(gap, value(gap, None));
            }
            at = first;
            if let Some((first, (old_end, old))) = next {
                self.runs.remove(&first);
                if old_end > end {
                    self.runs.insert(end, (old_end, old));
                }
                let piece = PageRun::new(first, old_end.min(end) - first);
                at = piece.end();
                self.append(piece, value(piece, Some(old)));
            }
        }
        self.join_at(end);
    }

    /// Adds a run to a place that is free, joined with an equal neighbour before it.
    fn append(&mut self, run: PageRun, value: T) {
        if let Some((_, entry)) = self.runs.range_mut(..run.first.0).next_back()
            && *entry == (run.first.0, value)
        {
            entry.0 = run.end();
        } else {
            self.runs.insert(run.first.0, (run.end(), value));
        }
    }

    /// Joins the runs that meet at a page, if they are equal.
    fn join_at(&mut self, page: u64) {
        if let Some(&(end, value)) = self.runs.get(&page)
            && let Some((_, entry)) = self.runs.range_mut(..page).next_back()
            && *entry == (page, value)
        {
            entry.0 = end;
            self.runs.remove(&page);
        }
    }

    /// The runs in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PageRun, T)> {
        self.runs.iter().map(|(&first, &(end, value))| (PageRun::new(first, end - first), value))
    }

    /// How many pages have a value.
    pub(crate) fn pages(&self) -> u64 {
        self.iter().map(|(run, _)| run.count).sum()
    }

    /// The lowest page of `run` that has a value.
    pub(crate) fn first_within(&self, run: PageRun) -> Option<PageNumber> {
        if let Some((_, &(end, _))) = self.runs.range(..=run.first.0).next_back()
            && end > run.first.0
        {
            return Some(run.first);
        }
        self.runs.range(run.first.0..run.end()).next().map(|(&first, _)| PageNumber(first))
    }

    /// The pages of `run` without a value, as runs in ascending order.
    pub(crate) fn gaps_within(&self, run: PageRun) -> Vec<PageRun> {
        let (mut at, end) = (run.first.0, run.end());
        let mut gaps = Vec::new();
        if let Some((_, &(old_end, _))) = self.runs.range(..=at).next_back() {
            at = at.max(old_end);
        }
        while at < end {
            let next = self.runs.range(at..end).next();
            let first = next.map_or(end, |(&first, _)| first);
            if first > at {
                gaps.push(PageRun::new(at, first - at));
            }
            at = next.map_or(end, |(_, &(old_end, _))| old_end);
        }
        gaps
    }
}

/// The pages of both lists, as ascending runs with gaps between them. The lists may be in any order and overlap.
pub fn union(left: impl IntoIterator<Item = PageRun>, right: impl IntoIterator<Item = PageRun>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = left.into_iter().chain(right).filter(|run| run.count > 0).collect();
    runs.sort_unstable();
    let mut joined: Vec<PageRun> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.first.0 <= last.end() => last.count = last.count.max(run.end() - last.first.0),
            _ => joined.push(run),
        }
    }
    joined
}

/// The runs of an epoch from single writes in the order of time. Of several writers of one page the first one owns it.
/// `writes` is sorted in place.
pub fn written_runs(writes: &mut Vec<(PageNumber, AddressSpaceId)>) -> Vec<WrittenRun> {
    // The sort is stable, so that the first writer of a page stays the first.
    writes.sort_by_key(|&(page, _)| page);
    writes.dedup_by_key(|&mut (page, _)| page);
    let mut runs: Vec<WrittenRun> = Vec::new();
    for &(page, owner) in writes.iter() {
        match runs.last_mut() {
            Some(last) if last.run.end() == page.0 && last.owner == owner => last.run.count += 1,
            _ => runs.push(WrittenRun { run: PageRun { first: page, count: 1 }, owner }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    fn any_run() -> impl Strategy<Value = PageRun> {
        (0..PAGES).prop_flat_map(|first| (0..=PAGES - first).prop_map(move |count| PageRun::new(first, count)))
    }

    proptest! {
        #[test]
        fn a_run_map_is_a_map_of_pages(updates in prop::collection::vec((any_run(), 0..3_u8, any::<bool>()), 0..30)) {
            let mut map = RunMap::default();
            let mut model: BTreeMap<u64, u8> = BTreeMap::new();
            for (run, add, sum) in updates {
                // The new values depend on the old ones or do not.
                let new = |old: Option<u8>| if sum { old.unwrap_or(0).wrapping_add(add) } else { add };
                let mut found = Vec::new();
                map.update(run, |piece, old| {
                    found.extend(piece.pages().map(|page| (page.0, old)));
                    new(old)
                });
                let expected: Vec<_> = run.pages().map(|page| (page.0, model.get(&page.0).copied())).collect();
                prop_assert_eq!(found, expected);
                for page in run.pages() {
                    model.insert(page.0, new(model.get(&page.0).copied()));
                }
            }
            let mut pages = Vec::new();
            let mut end = 0;
            for (run, value) in map.iter() {
                prop_assert!(run.count > 0 && run.first.0 >= end);
                end = run.end();
                pages.extend(run.pages().map(|page| (page.0, value)));
            }
            prop_assert_eq!(map.pages(), model.len() as u64);
            prop_assert_eq!(pages, model.into_iter().collect::<Vec<_>>());
        }

        /// What is added to a set in any order becomes as few runs as can be.
        #[test]
        fn a_set_joins_its_runs(runs in prop::collection::vec(any_run(), 0..30)) {
            let mut set = RunMap::default();
            runs.iter().for_each(|&run| set.add(run));
            let joined: Vec<PageRun> = set.iter().map(|(run, ())| run).collect();
            prop_assert_eq!(joined, union(runs, []));
        }

        #[test]
        fn what_lies_within_a_run(inserts in prop::collection::vec(any_run(), 0..6), run in any_run()) {
            let mut map = RunMap::default();
            inserts.iter().for_each(|&run| map.add(run));
            let inside = |page: &PageNumber| inserts.iter().any(|run| run.first <= *page && page.0 < run.end());
            prop_assume!(run.count > 0);
            prop_assert_eq!(map.first_within(run), run.pages().find(inside));
            let gaps: Vec<_> = map.gaps_within(run).into_iter().flat_map(PageRun::pages).collect();
            prop_assert_eq!(gaps, run.pages().filter(|page| !inside(page)).collect::<Vec<_>>());
        }

        #[test]
        fn a_union_holds_the_pages_of_both(
            left in prop::collection::vec(any_run(), 0..8),
            right in prop::collection::vec(any_run(), 0..8),
        ) {
            let runs = union(left.iter().copied(), right.iter().copied());
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first.0));
            let pages: Vec<u64> = runs.into_iter().flat_map(PageRun::pages).map(|page| page.0).collect();
            let mut expected: Vec<u64> =
                left.into_iter().chain(right).flat_map(PageRun::pages).map(|page| page.0).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(pages, expected);
        }
    }

    #[test]
    fn the_first_writer_owns_a_page() {
        let write = |page, owner| (PageNumber(page), AddressSpaceId(owner));
        let mut writes = vec![write(7, 2), write(5, 1), write(6, 1), write(7, 1), write(5, 2), write(9, 1)];
        let run = |first, count, owner| WrittenRun { run: PageRun::new(first, count), owner: AddressSpaceId(owner) };
        assert_eq!(written_runs(&mut writes), [run(5, 2, 1), run(7, 1, 2), run(9, 1, 1)]);
    }
}
