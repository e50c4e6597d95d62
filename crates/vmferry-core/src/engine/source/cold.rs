//! In which order pages go that were never seen written.
//!
//! Guests write in neighbourhoods, so pages go in stages, by how far the next page is that was seen written. Within a stage it
//! is a matter of the path: what guests keep is not alike everywhere, and pages that become next to nothing take the sender
//! longer than the path, while others take the path longer than the sender. So RAM is worked off in several parts at once. While
//! the path is filled well, pages go that are few bytes, and it is not noticed how long they take; when it is not, pages go that
//! fill it.

use std::ops::Range;

use crate::pages::{PageNumber, PageRun, PageSet};

/// Pages never seen written go in stages: first those with no written page in the aligned block of so many pages around
/// them, and last those that only were not written themselves. The later ones are the likelier to be written yet.
const BLOCK_PAGES: [u64; 3] = [512, 64, 1];
/// Into how many parts RAM is divided,
const PARTS: u64 = 4;
/// each of at least so many pages.
const PART_PAGES_MIN: u64 = 4096;

/// Pages of the next stage go before their turn where the path is filled well, if they are at most this share of what the others
/// are: if they are written again, little was sent in vain.
const AHEAD_SHARE: f64 = 0.5;

/// The pages of a guest that were never seen written, and how far the push is with them.
#[derive(Debug)]
pub(super) struct ColdPages {
    /// Which of [`BLOCK_PAGES`] the search is at.
    stage: usize,
    parts: Vec<Part>,
    /// Pages of the second stage, while the first one is under way. Not necessarily all of them.
    ahead: Part,
    /// The part that the last pages are of.
    last: Option<Turn>,
}

/// Neighbouring pages that are worked off in ascending order.
#[derive(Debug)]
struct Part {
    pages: Range<u64>,
    /// Where the search for the next one goes on.
    cursor: u64,
    /// What a page was on the wire, of those that were sent last.
    page_bytes: Option<f64>,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy)]
enum Turn {
    Part(usize),
    Ahead,
}

/// Which pages belong to a stage.
#[derive(Debug, Clone, Copy)]
struct Rule {
    /// Those in whose aligned block of so many pages none was seen written,
    clean_block_pages: u64,
    /// but, if there is such a limit, in whose block of so many one was.
    written_block_pages: Option<u64>,
}

impl Rule {
    /// Whether the page, which is pending, belongs to it; else where the next one may be that does.
    fn applies(&self, page: PageNumber, seen: &PageSet) -> Result<(), u64> {
        let is_written = |block_pages: u64| {
            let end = block_end(page, block_pages);
            seen.next(PageNumber(end - block_pages)).is_some_and(|seen| seen.0 < end)
        };
        if let Some(block_pages) = self.written_block_pages
            && !is_written(block_pages)
        {
            return Err(block_end(page, block_pages));
        }
        if is_written(self.clean_block_pages) { Err(self.end(page)) } else { Ok(()) }
    }

    /// The end of the pages around this one to which it applies as well.
    fn end(&self, page: PageNumber) -> u64 {
        block_end(page, self.clean_block_pages)
    }
}

/// The end of the aligned block of so many pages that the page is in.
fn block_end(page: PageNumber, block_pages: u64) -> u64 {
    page.0 - page.0 % block_pages + block_pages
}

impl ColdPages {
    /// All pages of a guest.
    pub(super) fn new(total_pages: u64) -> Self {
        let parts = PARTS.min(total_pages / PART_PAGES_MIN).max(1);
        let bound = |part: u64| match part {
            part if part == parts => total_pages,
            part => total_pages / parts / BLOCK_PAGES[0] * BLOCK_PAGES[0] * part,
        };
        let parts = (0..parts).map(|part| Part::new(bound(part)..bound(part + 1)));
        Self { stage: 0, parts: parts.collect(), ahead: Part::new(0..total_pages), last: None }
    }

    /// The next runs of pages that are pending and were never seen written, at most `runs_max`; none where there are no more of
    /// them. `pages_max` says how many pages, if each is so many bytes on the wire.
    ///
    /// As long as no page is taken out of `seen`, there are none when none are found.
    pub(super) fn next(
        &mut self,
        pending: &PageSet,
        seen: &PageSet,
        is_filled: bool,
        pages_max: impl Fn(Option<f64>) -> u64,
        runs_max: usize,
    ) -> Vec<PageRun> {
        while let Some(&block_pages) = BLOCK_PAGES.get(self.stage) {
            let may_go_ahead = is_filled && !seen.is_empty();
            let Some(turn) = self.choose(is_filled, may_go_ahead) else {
                self.stage += 1;
                self.parts.iter_mut().for_each(|part| *part = Part::new(part.pages.clone()));
                continue;
            };
            let rule = match turn {
                Turn::Part(_) => Rule { clean_block_pages: block_pages, written_block_pages: None },
                Turn::Ahead => Rule { clean_block_pages: BLOCK_PAGES[1], written_block_pages: Some(block_pages) },
            };
            let part = self.part(turn);
            let runs = part.next(pending, seen, rule, pages_max(part.page_bytes), runs_max);
            if !runs.is_empty() {
                self.last = Some(turn);
                return runs;
            }
        }
        Vec::new()
    }

    /// The pages that were taken last left as so many bytes.
    pub(super) fn sent(&mut self, pages: u64, bytes: u64) {
        if let Some(last) = self.last.take()
            && pages > 0
        {
            self.part(last).page_bytes = Some(bytes as f64 / pages as f64);
        }
    }

    fn part(&mut self, turn: Turn) -> &mut Part {
        match turn {
            Turn::Part(index) => &mut self.parts[index],
            Turn::Ahead => &mut self.ahead,
        }
    }

    /// The part whose turn it is, of those that are not worked off. One of which nothing is known is had a look at.
    fn choose(&self, is_filled: bool, may_go_ahead: bool) -> Option<Turn> {
        let left = self.parts.iter().enumerate().filter(|(_, part)| part.is_left());
        let rank = |part: &Part| match part.page_bytes {
            None => f64::NEG_INFINITY,
            Some(bytes) if is_filled => bytes,
            Some(bytes) => -bytes,
        };
        let (index, part) = left.min_by(|(_, one), (_, other)| rank(one).total_cmp(&rank(other)))?;
        let goes_ahead = self.stage == 0
            && may_go_ahead
            && self.ahead.is_left()
            && part
                .page_bytes
                .is_some_and(|bytes| self.ahead.page_bytes.is_none_or(|ahead| ahead <= bytes * AHEAD_SHARE));
        Some(if goes_ahead { Turn::Ahead } else { Turn::Part(index) })
    }
}

impl Part {
    fn new(pages: Range<u64>) -> Self {
        Self { cursor: pages.start, pages, page_bytes: None }
    }

    fn is_left(&self) -> bool {
        self.cursor < self.pages.end
    }

    /// The next pages by this rule; none where it is through.
    fn next(&mut self, pending: &PageSet, seen: &PageSet, rule: Rule, pages_max: u64, runs_max: usize) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        let mut pages = 0;
        while pages < pages_max && runs.len() < runs_max {
            let Some(page) = pending.next(PageNumber(self.cursor)).filter(|page| page.0 < self.pages.end) else {
                self.cursor = self.pages.end;
                break;
            };
            if let Err(next) = rule.applies(page, seen) {
                self.cursor = next;
                continue;
            }
            let most = (pages_max - pages).min(rule.end(page).min(self.pages.end) - page.0);
            let run = pending.next_run(page, most).expect("a page that was just found");
            self.cursor = run.end();
            pages += run.count;
            match runs.last_mut() {
                Some(last) if last.end() == run.first.0 => last.count += run.count,
                Some(_) | None => runs.push(run),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOTAL_PAGES: u64 = 20_000;

    fn taken(cold: &mut ColdPages, pending: &mut PageSet, seen: &PageSet, is_filled: bool, most: u64) -> Vec<PageRun> {
        let runs = cold.next(pending, seen, is_filled, |_| most, 512);
        for page in runs.iter().flat_map(|run| run.pages()) {
            assert!(pending.remove(page), "{page:?} is not pending");
            assert!(!seen.contains(page), "{page:?} was seen written");
        }
        runs
    }

    proptest! {
        /// Whatever is written meanwhile, whatever pages are on the wire and however filled the path is.
        #[test]
        fn all_that_were_never_seen_written_go(
            total_pages in 1..TOTAL_PAGES,
            steps in prop::collection::vec(
                (any::<bool>(), 1..3000_u64, 0..5000_u64, prop::collection::vec((0..TOTAL_PAGES, 1..40_u64), 0..4)),
                1..40,
            ),
        ) {
            let (mut pending, mut seen) = (PageSet::full(total_pages), PageSet::empty(total_pages));
            let mut cold = ColdPages::new(total_pages);
            for (is_filled, most, page_bytes, written) in steps.into_iter().cycle() {
                for (first, count) in written {
                    for page in (first..first + count).filter(|&page| page < total_pages) {
                        pending.insert(PageNumber(page));
                        seen.insert(PageNumber(page));
                    }
                }
                let runs = taken(&mut cold, &mut pending, &seen, is_filled, most);
                let pages = runs.iter().map(|run| run.count).sum();
                prop_assert!(pages <= most);
                if pages == 0 {
                    break;
                }
                cold.sent(pages, pages * page_bytes);
            }
            prop_assert!(pending.is_subset_of(&seen));
        }
    }

    #[test]
    fn a_filled_path_has_time_for_what_is_few_bytes() {
        let (mut pending, seen) = (PageSet::full(TOTAL_PAGES), PageSet::empty(TOTAL_PAGES));
        let mut cold = ColdPages::new(TOTAL_PAGES);
        let bytes = |first: u64| [2000, 10, 4000, 1000][(first / cold_part()) as usize];
        fn cold_part() -> u64 {
            TOTAL_PAGES / PARTS / BLOCK_PAGES[0] * BLOCK_PAGES[0]
        }
        let mut first = |is_filled| {
            let runs = taken(&mut cold, &mut pending, &seen, is_filled, 100);
            cold.sent(100, 100 * bytes(runs[0].first.0));
            runs[0].first.0 / cold_part()
        };
        let looks: Vec<u64> = (0..4).map(|_| first(true)).collect();
        assert_eq!(looks, [0, 1, 2, 3], "each is looked at");
        assert_eq!([first(true), first(true), first(false), first(false), first(true)], [1, 1, 2, 2, 1]);
    }

    #[test]
    fn pages_near_written_ones_go_late_or_where_they_cost_little() {
        // One page written in the middle.
        let total_pages = 8 * BLOCK_PAGES[0];
        let written = 2 * BLOCK_PAGES[0] + 100;
        for (near_bytes, goes_ahead) in [(100, true), (2000, false)] {
            let (mut pending, mut seen) = (PageSet::full(total_pages), PageSet::empty(total_pages));
            seen.insert(PageNumber(written));
            let near = written - 100..written - 100 + BLOCK_PAGES[0];
            let mut cold = ColdPages::new(total_pages);
            let mut order = Vec::new();
            loop {
                let runs = taken(&mut cold, &mut pending, &seen, true, 64);
                let Some(first) = runs.first().map(|run| run.first.0) else { break };
                let is_near = near.contains(&first);
                cold.sent(64, 64 * if is_near { near_bytes } else { 2000 });
                order.push(is_near);
            }
            // The first ones of them are looked at in any case. The page's own block of 64 goes last.
            let near_last = order.iter().rev().take_while(|&&is_near| is_near).count();
            assert_eq!(near_last, if goes_ahead { 1 } else { 7 }, "{near_bytes} bytes: {order:?}");
        }
    }
}
