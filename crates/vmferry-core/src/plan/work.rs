//! What the sender itself takes for a page: reading, encoding, and giving it to the system.

use std::time::Duration;

use super::PageClass;

/// The pages after which an earlier measurement counts less than half.
const MEMORY_PAGES: f64 = 2048.0;

/// The sender's time per page, by class. Sending goes on meanwhile, so it matters where it is longer than that.
#[derive(Debug, Clone, Copy, Default)]
pub struct PageWork {
    new_s: f64,
    written_s: f64,
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
        let mean = match class {
            PageClass::New => &mut self.new_s,
            PageClass::Written => &mut self.written_s,
        };
        let sample = time.as_secs_f64() / pages as f64;
        let share = if *mean == 0.0 { 1.0 } else { 1.0 - (-(pages as f64) / MEMORY_PAGES).exp() };
        *mean += share * (sample - *mean);
    }

    /// Seconds for a page of this class. Before any of it was sent, those of the other class.
    pub fn seconds_per_page(&self, class: PageClass) -> f64 {
        let (of_class, other) = match class {
            PageClass::New => (self.new_s, self.written_s),
            PageClass::Written => (self.written_s, self.new_s),
        };
        if of_class > 0.0 { of_class } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
