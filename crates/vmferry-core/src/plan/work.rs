//! What the sender itself takes for a page: reading, encoding, and giving it to the system.

use std::time::Duration;

use super::PageClass;

/// The pages after which an earlier measurement counts less than half.
const MEMORY_PAGES: f64 = 2048.0;

/// For pages written before, a sample below the estimate has so many times the weight of one above it,
const DOWN_FACTOR: f64 = 8.0;
/// and at most this.
const DOWN_SHARE_MAX: f64 = 0.5;
/// Fewer pages at once say little: what is the same for any number of them outweighs what each takes.
const SAMPLE_PAGES: u64 = 64;

/// So many of the pages that are armed again before they are read need not be sent again: those that were written earlier in
/// the epoch, and are not later in it.
const SPARED_SHARE: f64 = 0.1;
/// A new measurement of arming counts as one part in so many.
const ARMING_PARTS: f64 = 8.0;

/// The sender's time per page where many go at once, by class. Sending goes on meanwhile, so it matters where it is longer
/// than that.
#[derive(Debug, Clone, Copy, Default)]
pub struct PageWork {
    new: Mean,
    written: Mean,
    /// Seconds for arming a run of pages again before it is read; 0: nothing measured.
    arming: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    /// 0: nothing measured.
    seconds: f64,
    /// It is from many pages at once.
    is_certain: bool,
}

impl Mean {
    fn add(&mut self, pages: u64, time: Duration, down_factor: f64) {
        let sample = time.as_secs_f64() / pages as f64;
        let is_certain = pages >= SAMPLE_PAGES;
        if self.seconds == 0.0 || (is_certain && !self.is_certain) {
            *self = Self { seconds: sample, is_certain };
        } else if is_certain || sample < self.seconds {
            // Few pages take longer for each than many do, so if anything they show that many take less.
            let share = 1.0 - (-(pages as f64) / MEMORY_PAGES).exp();
            let weight = if sample < self.seconds { (share * down_factor).min(DOWN_SHARE_MAX) } else { share };
            self.seconds += weight * (sample - self.seconds);
        }
    }
}

impl PageWork {
    /// Nothing measured yet: no time at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// The sender took so long for these pages, without the time that it waited for the path.
    pub fn worked(&mut self, class: PageClass, pages: u64, time: Duration) {
        if pages == 0 {
            return;
        }
        match class {
            PageClass::New => self.new.add(pages, time, 1.0),
            // They are sent beside a guest that writes them, which makes its neighbours slower, and does not while it is
            // paused: what takes less is nearer to that.
            PageClass::Written => self.written.add(pages, time, DOWN_FACTOR),
        }
    }

    /// Arming so many runs again before they were read took so long; no time at all if they were not.
    pub fn armed(&mut self, runs: u64, time: Duration) {
        if runs > 0 && !time.is_zero() {
            let sample = time.as_secs_f64() / runs as f64;
            self.arming += if self.arming == 0.0 { sample } else { (sample - self.arming) / ARMING_PARTS };
        }
    }

    /// Whether arming so many runs again before they are read spares more than it costs, if sending a page once more takes
    /// so long.
    pub fn arming_pays(&self, runs: u64, pages: u64, page_s: f64) -> bool {
        self.arming * runs as f64 <= SPARED_SHARE * page_s * pages as f64
    }

    /// Seconds for a page of this class. Before any of it was sent, those of the other class.
    pub fn seconds_per_page(&self, class: PageClass) -> f64 {
        let (of_class, other) = match class {
            PageClass::New => (self.new.seconds, self.written.seconds),
            PageClass::Written => (self.written.seconds, self.new.seconds),
        };
        if of_class > 0.0 { of_class } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a push with the working set held back a few pages go now and then, each with all that an action costs.
    #[test]
    fn a_few_pages_at_once_say_little_of_many() {
        let mut work = PageWork::new();
        work.worked(PageClass::Written, 2, Duration::from_micros(400));
        assert_eq!(work.seconds_per_page(PageClass::Written), 200e-6, "nothing better is known");
        work.worked(PageClass::Written, 128, Duration::from_micros(1280));
        assert!((work.seconds_per_page(PageClass::Written) - 10e-6).abs() < 1e-9);
        (0..1000).for_each(|_| work.worked(PageClass::Written, 2, Duration::from_micros(400)));
        assert!((work.seconds_per_page(PageClass::Written) - 10e-6).abs() < 1e-9);
    }

    #[test]
    fn pages_that_are_cheap_to_send_again_are_not_armed_one_by_one() {
        let mut work = PageWork::new();
        assert!(work.arming_pays(100, 100, 1e-6), "nothing is known");
        work.armed(0, Duration::from_secs(1));
        work.armed(128, Duration::ZERO);
        (0..100).for_each(|_| work.armed(128, Duration::from_micros(640)));
        assert!(!work.arming_pays(128, 128, 10e-6), "5 µs each, to spare one in ten");
        assert!(work.arming_pays(128, 128, 60e-6));
        assert!(work.arming_pays(1, 512, 10e-6), "one call for all of them");
    }

    #[test]
    fn it_is_measured_by_class_and_follows_a_change() {
        let mut work = PageWork::new();
        assert_eq!(work.seconds_per_page(PageClass::New), 0.0);
        work.worked(PageClass::New, 0, Duration::from_secs(1));
        work.worked(PageClass::New, 100, Duration::from_micros(200));
        assert_eq!(work.seconds_per_page(PageClass::Written), 2e-6, "nothing better is known");
        for _ in 0..100 {
            work.worked(PageClass::Written, 200, Duration::from_micros(2000));
        }
        assert!((work.seconds_per_page(PageClass::Written) - 10e-6).abs() < 1e-9);
        assert_eq!(work.seconds_per_page(PageClass::New), 2e-6);
        for _ in 0..100 {
            work.worked(PageClass::Written, 200, Duration::from_micros(400));
        }
        assert!((work.seconds_per_page(PageClass::Written) - 2e-6).abs() < 0.1e-6);
    }
}
