//! Disks that are read straight into guest RAM, past the page tables through which writes are tracked.
//!
//! A request marks its pages as written when it begins, and changes them until it ends. A scan between the two takes the
//! mark; what is read of the page then is its old content, and the new one is announced by nothing. So a mark that was taken
//! counts only once all requests that had begun before have ended: until then its page is *doubtful*, and reported again
//! by the first scan after which they have.
//!
//! Waiting for requests to end holds QEMU up for as long as they take, and so is done for a share of the time only. A guest
//! that was stopped has none: QEMU waits for them before.

use std::time::{Duration, Instant};

use vmferry_core::pages::{PageRun, PageSet};

/// After requests were waited for, none are for so many times as long.
const REST: u32 = 9;

/// What is to be reported again.
#[derive(Debug)]
pub(crate) struct DirectReads {
    doubtful: PageSet,
    rests_until: Option<Instant>,
}

impl DirectReads {
    /// For a guest of so many pages.
    pub(crate) fn new(pages: u64) -> Self {
        Self { doubtful: PageSet::empty(pages), rests_until: None }
    }

    /// Whether requests may be waited for now.
    pub(crate) fn may_wait(&self, now: Instant) -> bool {
        self.rests_until.is_none_or(|until| now >= until)
    }

    /// They were waited for, for `took` until `now`.
    pub(crate) fn waited(&mut self, now: Instant, took: Duration) {
        self.rests_until = now.checked_add(took * REST);
    }

    /// The marks of these pages were taken while requests may have been under way.
    pub(crate) fn doubt(&mut self, taken: &[PageRun]) {
        for &run in taken {
            self.doubtful.insert_run(run);
        }
    }

    /// All requests that had begun when the marks behind `from` in `written` were taken have ended: adds the doubtful pages,
    /// of which there are none any more.
    pub(crate) fn settle(&mut self, written: &mut Vec<PageRun>, from: usize) {
        if !self.doubtful.is_empty() {
            self.doubt(&written[from..]);
            written.truncate(from);
            written.extend(self.doubtful.take_runs());
        }
    }
}

#[cfg(test)]
mod tests {
    use vmferry_core::pages::PageNumber;

    use super::*;

    #[test]
    fn doubtful_pages_are_reported_again_once() {
        let run = PageRun::new;
        let mut reads = DirectReads::new(1000);
        let mut written = vec![run(900, 1), run(3, 1)];
        reads.settle(&mut written, 1);
        assert_eq!(written, [run(900, 1), run(3, 1)], "nothing was doubtful");

        reads.doubt(&[run(10, 5), run(20, 1)]);
        reads.doubt(&[run(12, 4)]);
        reads.settle(&mut written, 1);
        assert_eq!(written, [run(900, 1), run(3, 1), run(10, 6), run(20, 1)], "in order, each once");

        written.clear();
        reads.settle(&mut written, 0);
        assert_eq!(written, [], "not a second time");
        reads.doubt(&[run(999, 1)]);
        reads.settle(&mut written, 0);
        assert_eq!(written, [PageRun { first: PageNumber(999), count: 1 }]);
    }

    #[test]
    fn a_slow_disk_is_waited_for_a_tenth_of_the_time() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut reads = DirectReads::new(1);
        assert!(reads.may_wait(start));
        reads.waited(after(100), Duration::from_millis(100));
        assert!(!reads.may_wait(after(999)));
        assert!(reads.may_wait(after(1000)));
        reads.waited(after(1000), Duration::ZERO);
        assert!(reads.may_wait(after(1000)));
    }
}
