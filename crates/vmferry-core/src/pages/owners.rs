//! Who owns which page.

use std::collections::BTreeMap;
use std::fmt::Debug;

use super::{AddressSpaceId, PageRun};

/// Tells the owners of pages. What it says is a hint: a page's owner can have changed since it was looked up.
pub trait Owners: Debug {
    /// The owner of the first page of `run`, and how many pages from there on have the same one: at least 1, at most the
    /// whole run.
    fn owner_of(&self, run: PageRun) -> (AddressSpaceId, u64);

    /// The owner of all pages, if there is but one: then nobody has to ask for each run.
    fn sole_owner(&self) -> Option<AddressSpaceId> {
        None
    }
}

/// The owners of a guest whose address spaces are not told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WholeGuest;

impl Owners for WholeGuest {
    fn owner_of(&self, run: PageRun) -> (AddressSpaceId, u64) {
        (AddressSpaceId::WHOLE_GUEST, run.count)
    }

    fn sole_owner(&self) -> Option<AddressSpaceId> {
        Some(AddressSpaceId::WHOLE_GUEST)
    }
}

/// Cuts runs where the owner changes, in the order given. Neighbouring pages of one owner stay together, also where they
/// come in two runs.
pub fn split_by_owner(owners: &dyn Owners, runs: &[PageRun]) -> Vec<(AddressSpaceId, PageRun)> {
    let mut split: Vec<(AddressSpaceId, PageRun)> = Vec::with_capacity(runs.len());
    for &run in runs {
        let mut rest = Some(run).filter(|run| run.count > 0);
        while let Some(run) = rest {
            let (owner, count) = owners.owner_of(run);
            let (piece, after) = run.split_front(count.max(1));
            rest = after;
            match split.last_mut() {
                Some((last, joined)) if *last == owner && joined.end() == piece.first.0 => joined.count += piece.count,
                Some(_) | None => split.push((owner, piece)),
            }
        }
    }
    split
}

/// The same, put together by owner: ids ascending, the runs of each in the order given.
pub fn group_by_owner(owners: &dyn Owners, runs: &[PageRun]) -> BTreeMap<AddressSpaceId, Vec<PageRun>> {
    let mut groups = BTreeMap::<AddressSpaceId, Vec<PageRun>>::new();
    for (owner, run) in split_by_owner(owners, runs) {
        groups.entry(owner).or_default().push(run);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten pages each, in turn; says less of a run than it could.
    #[derive(Debug)]
    struct Tens;

    impl Owners for Tens {
        fn owner_of(&self, run: PageRun) -> (AddressSpaceId, u64) {
            let first = run.first.0;
            (AddressSpaceId((first / 10) as u32), (10 - first % 10).min(run.count).min(4))
        }
    }

    #[test]
    fn runs_are_cut_where_the_owner_changes_and_nowhere_else() {
        let runs = [PageRun::new(2, 5), PageRun::new(7, 20), PageRun::new(30, 0), PageRun::new(38, 2)];
        let expected = [(0, 2, 8), (1, 10, 10), (2, 20, 7), (3, 38, 2)];
        let expected = expected.map(|(owner, first, count)| (AddressSpaceId(owner), PageRun::new(first, count)));
        assert_eq!(split_by_owner(&Tens, &runs), expected);
        let again = [PageRun::new(2, 5), PageRun::new(12, 1), PageRun::new(8, 1)];
        let grouped = [
            (AddressSpaceId(0), vec![PageRun::new(2, 5), PageRun::new(8, 1)]),
            (AddressSpaceId(1), vec![PageRun::new(12, 1)]),
        ];
        assert!(group_by_owner(&Tens, &again).into_iter().eq(grouped));
        let whole =
            [(AddressSpaceId::WHOLE_GUEST, PageRun::new(2, 25)), (AddressSpaceId::WHOLE_GUEST, PageRun::new(38, 2))];
        assert_eq!(split_by_owner(&WholeGuest, &runs), whole);
    }
}
