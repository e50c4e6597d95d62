//! How well each predictor predicts which pages are written next, on each guest.
//!
//! A predictor sees a trace epoch by epoch. Beginning with the second third of the trace, it is asked once in a while for
//! its hottest pages, and these are compared with those that were written in the next 300 ms:
//!
//! - R-precision: of as many hottest pages as were written, the share that was;
//! - precision and recall of a set as large as what a pause of 100 ms can carry where the link is as fast as the guest is
//!   dirty: the share of the set that was written, and the share of the written pages that were in the set.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lcbst_figures::table::{Table, cell};
use vmferry_core::pages::{AddressSpaceId, PageRun, PageSet};
use vmferry_core::predict::PredictorSpec;
use vmferry_sim::trace::Trace;

use crate::guests::Guest;

/// Pages count as predicted rightly if they are written within this time.
const AHEAD: Duration = Duration::from_millis(300);
/// The pause whose pages are asked for.
const PAUSE: Duration = Duration::from_millis(100);
/// How often the predictors are asked on a trace, at most.
const QUESTIONS_MAX: usize = 60;

/// What one predictor reached on one guest; shares of 0 to 1.
#[derive(Debug, Clone)]
pub(crate) struct Quality {
    pub(crate) name: String,
    pub(crate) predictor: String,
    pub(crate) r_precision: f64,
    pub(crate) precision: f64,
    pub(crate) recall: f64,
}

/// All predictors but the one that predicts nothing.
pub(crate) fn predictors() -> impl Iterator<Item = PredictorSpec> {
    PredictorSpec::ALL.into_iter().filter(|spec| *spec != PredictorSpec::None)
}

/// By guest and predictor.
pub(crate) fn measure(guests: &[Guest], quick: bool, jobs: usize) -> Vec<Quality> {
    let places: Vec<(usize, PredictorSpec)> =
        (0..guests.len()).flat_map(|guest| predictors().map(move |spec| (guest, spec))).collect();
    let questions = if quick { 5 } else { QUESTIONS_MAX };
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&(guest, spec)) = places.get(index) else { break };
                    let quality = ask(&guests[guest].trace, spec, questions);
                    found.lock().expect("no thread panics while it adds").push((index, quality));
                }
            });
        }
    });
    let mut found = found.into_inner().expect("all threads have ended");
    found.sort_by_key(|&(index, _)| index);
    found.into_iter().map(|(_, quality)| quality).collect()
}

fn ask(trace: &Trace, spec: PredictorSpec, questions: usize) -> Quality {
    let epochs_in = |time: Duration| (time.as_nanos() / trace.epoch.as_nanos().max(1)).max(1) as usize;
    let ahead = epochs_in(AHEAD);
    let set_pages = ((trace.dirty_pages_per_s() * PAUSE.as_secs_f64()) as usize).max(1);
    let first = trace.epochs.len() / 3;
    let every = ((trace.epochs.len() - first) / questions).max(1);
    let mut predictor = spec.build(trace.pages);
    let (mut hits, mut written_sum, mut set_hits, mut set_sum) = (0, 0, 0, 0);
    for (number, epoch) in trace.epochs.iter().enumerate() {
        let mut by_owner: BTreeMap<AddressSpaceId, Vec<PageRun>> = BTreeMap::new();
        for written in &epoch.written {
            by_owner.entry(written.owner).or_default().push(written.run);
        }
        by_owner.iter().for_each(|(&owner, runs)| predictor.observe(owner, runs));
        predictor.end_epoch();
        if number < first || !(number - first).is_multiple_of(every) || number + ahead >= trace.epochs.len() {
            continue;
        }
        let mut written = PageSet::empty(trace.pages);
        trace.epochs[number + 1..][..ahead].iter().flat_map(|epoch| epoch.runs()).for_each(|run| {
            written.insert_run(run);
        });
        let mut ranking = Vec::new();
        predictor.rank((written.len() as usize).max(set_pages), &mut ranking);
        let hits_among = |most: usize| ranking.iter().take(most).filter(|page| written.contains(page.page)).count();
        hits += hits_among(written.len() as usize);
        written_sum += written.len() as usize;
        set_hits += hits_among(set_pages);
        set_sum += set_pages.min(ranking.len());
    }
    let share = |part: usize, of: usize| if of > 0 { part as f64 / of as f64 } else { 0.0 };
    Quality {
        name: trace.name.clone(),
        predictor: spec.to_string(),
        r_precision: share(hits, written_sum),
        precision: share(set_hits, set_sum),
        recall: share(set_hits, written_sum),
    }
}

/// All of it as a table.
pub(crate) fn table(qualities: &[Quality]) -> Table {
    let mut table = Table::new(
        "How well predictors say which pages are written in the next 300 ms.",
        &[
            ("guest", "whose writes were replayed"),
            ("predictor", "who predicted"),
            ("r_precision", "of as many hottest pages as were written: the share that was"),
            ("precision", "of the pages for a pause of 100 ms at load 1: the share that was written"),
            ("recall", "of the pages written: the share that was among those"),
        ],
    );
    for quality in qualities {
        table.push(vec![
            quality.name.replace(',', ""),
            quality.predictor.replace(',', ""),
            cell(quality.r_precision),
            cell(quality.precision),
            cell(quality.recall),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use vmferry_sim::trace::{TraceEpoch, WrittenRun};

    use super::*;

    /// Pages 0 to 9 are written in each epoch, and one other, once.
    fn steady() -> Trace {
        let epoch = |number: u64| TraceEpoch {
            written: [PageRun::new(0, 10), PageRun::new(100 + number, 1)]
                .map(|run| WrittenRun { run, owner: AddressSpaceId::WHOLE_GUEST })
                .to_vec(),
            accessed: None,
        };
        Trace {
            name: "steady".to_owned(),
            pages: 1000,
            epoch: Duration::from_millis(50),
            zero: vec![],
            epochs: (0..90).map(epoch).collect(),
        }
    }

    #[test]
    fn what_is_always_written_is_found_and_what_is_new_is_not() {
        let spec: PredictorSpec = "lfu".parse().unwrap();
        let quality = ask(&steady(), spec, 10);
        // In six epochs 16 pages are written, of which ten are known; 22 pages fit into the pause.
        assert_eq!(quality.r_precision, 10.0 / 16.0);
        assert_eq!((quality.precision, quality.recall), (10.0 / 22.0, 10.0 / 16.0));
    }

    #[test]
    fn qualities_are_in_the_order_of_guests_and_predictors_whatever_the_threads() {
        let guests = || vec![Guest { trace: steady(), recorded: true }, Guest { trace: steady(), recorded: false }];
        let (one, many) = (measure(&guests(), true, 1), measure(&guests(), true, 3));
        assert_eq!(one.len(), 2 * predictors().count());
        assert_eq!(table(&one), table(&many));
    }
}
