//! What pages cost on the wire: estimated by class, from those of the class that were sent so far.
//!
//! A plan reckons with what is likely to be enough, since a pause that lasts too long is worse than one that comes later:
//! the mean and twice the deviation between one batch of pages and the next, and never more than a page as it is. Where
//! contents are compressed or sent as deltas, batches are much alike, and it comes close to the mean.
//!
//! Of pages that were never sent nothing is known: a guest's zero pages come in whole regions, and after a thousand of them
//! the rest can be anything. They are planned with as pages as they are; their mean says only how long a pass may take.

use super::PAGE_WIRE_BYTES;

/// The pages after which an earlier batch counts less than half in the estimate.
const MEMORY_PAGES: f64 = 4096.0;
/// Before so many pages of a class were sent, they are taken for pages as they are.
const LEARNED_PAGES: u64 = 256;
/// Fewer pages are put together with those that follow: what differs between a few pages and a few others says nothing of
/// many and many others.
const BATCH_PAGES: u64 = 64;
/// How many deviations are added to the mean.
const DEVIATIONS: f64 = 2.0;

/// Pages that cost alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageClass {
    /// Never sent: content of any kind, zero pages among them.
    New,
    /// Sent before, and written since: hardly ever zero, and like what the target has.
    Written,
}

/// The estimates of both classes.
#[derive(Debug, Clone, Copy, Default)]
pub struct WireSizes {
    new: ClassSize,
    written: ClassSize,
}

#[derive(Debug, Clone, Copy, Default)]
struct ClassSize {
    /// Sent, and their bytes, and not yet in the estimate.
    open: (u64, u64),
    pages: u64,
    mean_bytes: f64,
    variance: f64,
}

impl WireSizes {
    /// Nothing sent yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a batch of pages that left as so many bytes, headers included.
    pub fn sent(&mut self, class: PageClass, pages: u64, bytes: u64) {
        if pages == 0 {
            return;
        }
        let size = match class {
            PageClass::New => &mut self.new,
            PageClass::Written => &mut self.written,
        };
        let (pages, bytes) = (size.open.0 + pages, size.open.1 + bytes);
        if size.pages > 0 && pages < BATCH_PAGES {
            size.open = (pages, bytes);
            return;
        }
        size.open = (0, 0);
        let batch_mean = bytes as f64 / pages as f64;
        // Exponentially weighted mean and variance (Finch, Incremental calculation of weighted mean and variance, 2009).
        let share = if size.pages == 0 { 1.0 } else { 1.0 - (-(pages as f64) / MEMORY_PAGES).exp() };
        let difference = batch_mean - size.mean_bytes;
        size.mean_bytes += share * difference;
        size.variance = (1.0 - share) * (size.variance + share * difference * difference);
        size.pages += pages;
    }

    /// Bytes that a page of this class is not expected to exceed.
    pub fn planned_bytes(&self, class: PageClass) -> f64 {
        let most = PAGE_WIRE_BYTES as f64;
        match class {
            PageClass::New => most,
            PageClass::Written if !self.is_learned(class) => most,
            PageClass::Written => (self.written.mean_bytes + DEVIATIONS * self.written.variance.sqrt()).min(most),
        }
    }

    /// Whether enough pages of this class were sent for the estimate to be theirs.
    pub fn is_learned(&self, class: PageClass) -> bool {
        match class {
            PageClass::New => self.new.pages >= LEARNED_PAGES,
            PageClass::Written => self.written.pages >= LEARNED_PAGES,
        }
    }

    /// Bytes of a page of this class, on average of those sent of late.
    pub fn mean_bytes(&self, class: PageClass) -> f64 {
        let size = match class {
            PageClass::New => &self.new,
            PageClass::Written => &self.written,
        };
        if self.is_learned(class) { size.mean_bytes } else { PAGE_WIRE_BYTES as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_pages_are_taken_for_pages_as_they_are() {
        let mut sizes = WireSizes::new();
        sizes.sent(PageClass::Written, LEARNED_PAGES - 1, 1000);
        sizes.sent(PageClass::New, 0, 0);
        assert_eq!(sizes.planned_bytes(PageClass::Written), PAGE_WIRE_BYTES as f64);
        assert_eq!(sizes.planned_bytes(PageClass::New), PAGE_WIRE_BYTES as f64);
    }

    #[test]
    fn batches_that_are_alike_are_planned_with_their_mean() {
        let mut sizes = WireSizes::new();
        for batch in 0..200 {
            sizes.sent(PageClass::Written, 64, 64 * (990 + batch % 3 * 10));
        }
        let planned = sizes.planned_bytes(PageClass::Written);
        assert!((1000.0..1020.0).contains(&planned), "{planned}");
        assert_eq!(sizes.planned_bytes(PageClass::New), PAGE_WIRE_BYTES as f64, "the other class");
    }

    /// A guest that had zero pages first was paused with all others still to come, and for a second instead of 30 ms.
    #[test]
    fn zero_pages_do_not_make_the_pages_behind_them_cheap() {
        let mut sizes = WireSizes::new();
        for _ in 0..1000 {
            sizes.sent(PageClass::New, 256, 40);
        }
        assert_eq!(sizes.planned_bytes(PageClass::New), PAGE_WIRE_BYTES as f64);
        assert!(sizes.mean_bytes(PageClass::New) < 1.0);
    }

    #[test]
    fn a_change_is_followed() {
        let mut sizes = WireSizes::new();
        sizes.sent(PageClass::Written, 10_000, 10_000 * 500);
        for _ in 0..1000 {
            sizes.sent(PageClass::Written, 64, 64 * 2000);
        }
        let planned = sizes.planned_bytes(PageClass::Written);
        assert!((2000.0..2010.0).contains(&planned), "{planned}");
    }
}
