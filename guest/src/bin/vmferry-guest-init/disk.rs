//! The disk, written and read back all the time: see `vmferry_guest::Disk`.
//!
//! Past the kernel's cache, one record after the other, each on the disk before the next is begun. Readers read beside that,
//! each into pages that it keeps as they came, and looks at again.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmferry_guest::{
    DISK_BYTES_MIN, Disk, RECORD_BYTES, RECORD_PLACES, Random, Record, Stored, expected, place_offset,
};

use super::{Console, DETAILS_MAX, TICK, system};

/// Pages that a reader keeps.
const KEPT_PAGES: usize = 128;
/// From one read of a reader to the next.
const READ_INTERVAL: Duration = Duration::from_millis(10);

/// Bytes as the kernel wants them that reads and writes past its cache.
#[repr(align(4096))]
struct Aligned([u8; RECORD_BYTES]);

/// The disk and what it must hold.
pub(crate) struct Written {
    file: File,
    interval: Duration,
    state: Mutex<State>,
    readers: Vec<Mutex<Kept>>,
}

/// What a reader has read.
struct Kept {
    pages: Vec<Aligned>,
    /// What the pages held when they came; fewer than pages in the beginning.
    holds: Vec<Stored>,
    /// Pages that were wrong.
    wrong: u64,
}

#[derive(Default)]
struct State {
    /// The number of the last record that is on the disk.
    last: u64,
    /// Records read back so far, and how many of them were wrong.
    checked: u64,
    wrong: u64,
}

/// What all places of the disk hold.
struct Survey {
    records: u64,
    last: u64,
    /// Pages that readers keep, wrong ones among them.
    kept: u64,
    wrong: u64,
    first_wrong: Option<String>,
}

impl fmt::Display for Survey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { records, last, kept, wrong, first_wrong: _ } = self;
        write!(formatter, "records={records} last={last} kept={kept} wrong={wrong}")
    }
}

impl Written {
    /// Opens the disk as soon as it is there.
    pub(crate) fn open(disk: &Disk) -> Result<Self, Box<dyn Error>> {
        system::load_modules()?;
        system::wait_for(&disk.device)?;
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(&disk.device)?;
        let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        if bytes < DISK_BYTES_MIN {
            return Err(format!("{} has {bytes} bytes and needs {DISK_BYTES_MIN}", disk.device).into());
        }
        let interval = Duration::from_secs(1) / u32::try_from(disk.rate_records_per_s)?.max(1);
        let interval = if disk.rate_records_per_s == 0 { Duration::ZERO } else { interval };
        let pages = || (0..KEPT_PAGES).map(|_| Aligned([0; RECORD_BYTES])).collect();
        let kept = |_| Mutex::new(Kept { pages: pages(), holds: Vec::new(), wrong: 0 });
        Ok(Self { file, interval, state: Mutex::default(), readers: (0..disk.readers).map(kept).collect() })
    }

    /// Finds out where the disk's last writer stopped. To be called before the others.
    pub(crate) fn find(&self, console: &Console) -> io::Result<()> {
        let found = self.survey(console, None)?;
        *self.state() = State { last: found.last, checked: 0, wrong: found.wrong };
        console.say(&format!("disk found {found}"));
        Ok(())
    }

    /// Reads and writes, for ever.
    pub(crate) fn work(&self, console: &Console) {
        let fail = |error: &io::Error| super::end(&format!("the disk: {error}"));
        thread::scope(|scope| {
            for (kept, seed) in self.readers.iter().zip(1..) {
                scope.spawn(move || fail(&self.read_for_ever(console, kept, seed)));
            }
            self.write_for_ever(console).unwrap_or_else(|error| fail(&error));
        });
    }

    fn write_for_ever(&self, console: &Console) -> io::Result<()> {
        let mut random = Random::new(self.state().last, 0);
        let (mut next, mut next_tick) = (Instant::now(), Instant::now());
        loop {
            let mut state = self.state();
            let record = Record(state.last + 1);
            self.file.write_all_at(&Aligned(record.content()).0, record.offset())?;
            state.last = record.0;
            let place = random.below(RECORD_PLACES);
            if let Some(wrong) = self.wrong_at(place, state.last)? {
                state.wrong += 1;
                if state.wrong <= DETAILS_MAX {
                    console.say(&format!("disk {wrong}"));
                }
            }
            state.checked += 1;
            let State { last, checked, wrong } = *state;
            drop(state);
            if Instant::now() >= next_tick {
                console.say(&format!("disk last={last} checked={checked} wrong={wrong}"));
                next_tick = Instant::now() + TICK;
            }
            // After a pause of the machine it goes on from now instead of making up for it.
            next = (next + self.interval).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    /// Reads all the time into pages that it keeps. Returns why it no longer can.
    fn read_for_ever(&self, console: &Console, kept: &Mutex<Kept>, seed: u64) -> io::Error {
        let mut random = Random::new(seed, 1);
        for slot in (0..KEPT_PAGES).cycle() {
            let place = random.below(RECORD_PLACES);
            let offset = place_offset(place);
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let Kept { pages, holds, wrong } = &mut *kept;
            if let Err(error) = self.file.read_exact_at(&mut pages[slot].0, offset) {
                return error;
            }
            let found = Stored::parse(&pages[slot].0);
            if slot < holds.len() {
                holds[slot] = found;
            } else {
                holds.push(found);
            }
            let is_right = match found {
                Stored::Blank => true,
                Stored::Record(record) => record.offset() == offset,
                Stored::Damaged => false,
            };
            let earlier = random.below(holds.len() as u64) as usize;
            let described = if is_right {
                kept_wrong(pages, holds, earlier)
            } else {
                Some(format!("wrong place={place} found={found}"))
            };
            if let Some(described) = described {
                *wrong += 1;
                if *wrong <= DETAILS_MAX {
                    console.say(&format!("disk {described}"));
                }
            }
            drop(kept);
            thread::sleep(READ_INTERVAL);
        }
        unreachable!("the slots never end")
    }

    /// Reads all places while nothing is written, and says what they hold; and looks at all pages that readers keep.
    pub(crate) fn check(&self, console: &Console) {
        let state = self.state();
        let survey = self.survey(console, Some(state.last)).map(|mut survey| {
            for kept in &self.readers {
                let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let wrong = (0..kept.holds.len()).filter_map(|slot| kept_wrong(&kept.pages, &kept.holds, slot));
                let wrong: Vec<String> = wrong.collect();
                if let Some(first) = wrong.first() {
                    console.say(&format!("disk {first}"));
                }
                survey.kept += kept.holds.len() as u64;
                survey.wrong += kept.wrong + wrong.len() as u64;
            }
            survey
        });
        match survey {
            Ok(survey) => console.say(&format!("disk-check {survey}")),
            Err(error) => super::end(&format!("the disk: {error}")),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all places. They must hold what they should after so many records; if that is not known, after as many as
    /// the highest number found.
    fn survey(&self, console: &Console, last: Option<u64>) -> io::Result<Survey> {
        let mut stored = Vec::new();
        for place in 0..RECORD_PLACES {
            stored.push(self.read(place_offset(place))?);
        }
        let numbers = || {
            stored.iter().filter_map(|stored| match stored {
                Stored::Record(record) => Some(record.0),
                Stored::Blank | Stored::Damaged => None,
            })
        };
        let last = last.unwrap_or_else(|| numbers().max().unwrap_or(0));
        let mut survey = Survey { records: numbers().count() as u64, last, kept: 0, wrong: 0, first_wrong: None };
        for (place, &found) in (0..).zip(&stored) {
            if let Some(wrong) = describe_wrong(place, found, last) {
                survey.wrong += 1;
                survey.first_wrong.get_or_insert(wrong);
            }
        }
        if let Some(wrong) = &survey.first_wrong {
            console.say(&format!("disk {wrong}"));
        }
        Ok(survey)
    }

    fn wrong_at(&self, place: u64, last: u64) -> io::Result<Option<String>> {
        Ok(describe_wrong(place, self.read(place_offset(place))?, last))
    }

    fn read(&self, offset: u64) -> io::Result<Stored> {
        let mut record = Aligned([0; RECORD_BYTES]);
        self.file.read_exact_at(&mut record.0, offset)?;
        Ok(Stored::parse(&record.0))
    }
}

/// What is wrong with a page that a reader keeps.
fn kept_wrong(pages: &[Aligned], holds: &[Stored], slot: usize) -> Option<String> {
    let (expected, found) = (holds[slot], Stored::parse(&pages[slot].0));
    (found != expected).then(|| format!("wrong kept={slot} expected={expected} found={found}"))
}

fn describe_wrong(place: u64, found: Stored, last: u64) -> Option<String> {
    let expected = expected(place, last);
    (found != expected).then(|| format!("wrong place={place} expected={expected} found={found}"))
}
