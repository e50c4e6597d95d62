//! A disk that numbers and checks its own content: records at fixed places, written one after the other for ever.
//!
//! Record `n` goes to place `n − 1 mod PLACES`, so that the number of the last record alone says what each place must hold.
//! A lost write, a write that came twice to the wrong place, and a write by somebody else are all found, and also by a
//! guest that never saw the disk before.

use std::fmt;
use std::str::FromStr;

use crate::memory::{PAGE_BYTES, PAGE_WORDS};
use crate::parameters::ParameterError;
use crate::random::{GOLDEN, mix};

/// Bytes of a record.
pub const RECORD_BYTES: usize = PAGE_BYTES;
/// Places for records.
pub const RECORD_PLACES: u64 = 512;
/// From one place to the next: the clusters of a qcow2 image, so that each first write allocates one.
const PLACE_BYTES: u64 = 64 << 10;
/// Odd, and so prime to the number of places: neighbours in time are none on the disk.
const SCATTER: u64 = 197;
/// What the disk must have at least.
pub const DISK_BYTES_MIN: u64 = RECORD_PLACES * PLACE_BYTES;

const MAGIC: u64 = u64::from_le_bytes(*b"vmferryd");

/// Words of a kernel command line that belong to [`Disk`] and not to [`Parameters`](crate::Parameters).
pub(crate) const KEYS: [&str; 3] = ["disk", "disk_rate", "disk_readers"];

/// The most readers of one guest.
const READERS_MAX: u32 = 64;

/// A record, by its number from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record(pub u64);

impl Record {
    /// Where it is on the disk, in bytes.
    ///
    /// # Panics
    /// There is no record 0.
    pub fn offset(self) -> u64 {
        place_offset(self.0.checked_sub(1).expect("records begin at 1"))
    }

    /// What it says.
    pub fn content(self) -> [u8; RECORD_BYTES] {
        let mut content = [0; RECORD_BYTES];
        for (index, bytes) in content.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *bytes = self.word(index).to_le_bytes();
        }
        content
    }

    fn word(self, index: usize) -> u64 {
        match index {
            0 => MAGIC,
            1 => self.0,
            _ => mix(self.0.wrapping_mul(GOLDEN) ^ index as u64),
        }
    }
}

/// What a place of the disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Zeros: nothing was written there.
    Blank,
    /// A whole record.
    Record(Record),
    /// Anything else.
    Damaged,
}

impl Stored {
    /// Reads what a place holds.
    pub fn parse(bytes: &[u8; RECORD_BYTES]) -> Self {
        let words = bytes.as_chunks::<8>().0;
        let word = |index: usize| u64::from_le_bytes(words[index]);
        let record = Record(word(1));
        if words.iter().all(|word| *word == [0; 8]) {
            Self::Blank
        } else if record.0 > 0 && (0..PAGE_WORDS).all(|index| word(index) == record.word(index)) {
            Self::Record(record)
        } else {
            Self::Damaged
        }
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => formatter.write_str("nothing"),
            Self::Record(record) => write!(formatter, "record {}", record.0),
            Self::Damaged => formatter.write_str("no record"),
        }
    }
}

/// Where a place is on the disk, in bytes. Places have numbers from 0 to [`RECORD_PLACES`] in the order in which they are
/// written.
pub fn place_offset(place: u64) -> u64 {
    place % RECORD_PLACES * SCATTER % RECORD_PLACES * PLACE_BYTES
}

/// What a place must hold after so many records.
pub fn expected(place: u64, last: u64) -> Stored {
    match last.checked_sub(place + 1) {
        Some(after) => Stored::Record(Record(last - after % RECORD_PLACES)),
        None => Stored::Blank,
    }
}

/// Which disk is written, how often, and how much it is read.
///
/// As words of a kernel command line:
///
/// | word | field | default |
/// |---|---|---|
/// | `vmferry.disk=/dev/vda` | `device` | none: no disk is written |
/// | `vmferry.disk_rate=200` | `rate_records_per_s` | 200 |
/// | `vmferry.disk_readers=8` | `readers` | 0 |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The device.
    pub device: String,
    /// Records per second at most; 0 is as fast as possible.
    pub rate_records_per_s: u64,
    /// Threads that read all the time and keep what they read, up to 64.
    pub readers: u32,
}

impl Disk {
    /// Reads the words of a kernel command line that are about the disk; `None` if there is no `vmferry.disk`.
    ///
    /// # Errors
    /// When a value is not of its key's form.
    pub fn from_command_line(line: &str) -> Result<Option<Self>, ParameterError> {
        let (mut device, mut rate_records_per_s, mut readers) = (None, 200, 0);
        for word in line.split_ascii_whitespace() {
            let Some((key, value)) = word.strip_prefix("vmferry.").and_then(|word| word.split_once('=')) else {
                continue;
            };
            let wrong = |key| ParameterError::Value { key, value: value.to_owned() };
            match key {
                "disk" if value.starts_with("/dev/") => device = Some(value.to_owned()),
                "disk" => return Err(wrong("disk")),
                "disk_rate" => rate_records_per_s = u64::from_str(value).map_err(|_| wrong("disk_rate"))?,
                "disk_readers" => readers = u32::from_str(value).map_err(|_| wrong("disk_readers"))?,
                _ => {}
            }
        }
        if readers > READERS_MAX {
            let (most, value) = (READERS_MAX.into(), readers.into());
            return Err(ParameterError::Range { key: "disk_readers", least: 0, most, value });
        }
        Ok(device.map(|device| Self { device, rate_records_per_s, readers }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn places_are_apart_and_on_the_disk() {
        let offsets: BTreeSet<u64> = (0..RECORD_PLACES).map(place_offset).collect();
        assert_eq!(offsets.len() as u64, RECORD_PLACES);
        assert!(offsets.iter().all(|offset| offset % PLACE_BYTES == 0 && *offset < DISK_BYTES_MIN));
    }

    /// Against a disk that is a map.
    #[test]
    fn the_last_number_says_what_every_place_holds() {
        let mut disk = BTreeMap::new();
        for last in 0..3 * RECORD_PLACES + 7 {
            if last > 0 {
                disk.insert(Record(last).offset(), Record(last));
            }
            if last % 97 == 0 || last <= 3 || last > 3 * RECORD_PLACES {
                for place in 0..RECORD_PLACES {
                    let stored = disk.get(&place_offset(place)).map_or(Stored::Blank, |&record| Stored::Record(record));
                    assert_eq!(expected(place, last), stored, "place {place} after {last} records");
                }
            }
        }
    }

    #[test]
    fn records_are_told_from_anything_else() {
        for number in [1, 2, RECORD_PLACES, u64::MAX] {
            let content = Record(number).content();
            assert_eq!(Stored::parse(&content), Stored::Record(Record(number)));
            for at in [0, 8, 9, 16, 2048, RECORD_BYTES - 1] {
                let mut damaged = content;
                damaged[at] ^= 1;
                assert_eq!(Stored::parse(&damaged), Stored::Damaged, "byte {at} of record {number}");
            }
        }
        assert_eq!(Stored::parse(&[0; RECORD_BYTES]), Stored::Blank);
        let mut torn = Record(7).content();
        torn[512..].copy_from_slice(&Record(7 + RECORD_PLACES).content()[512..]);
        assert_eq!(Stored::parse(&torn), Stored::Damaged);
    }

    #[test]
    fn the_words_of_a_command_line_are_read() {
        let read = Disk::from_command_line;
        assert_eq!(read("quiet root=/dev/vda vmferry.rate=3 vmferry.disk_rate=7"), Ok(None));
        let disk = |rate_records_per_s, readers| Disk { device: "/dev/vda".to_owned(), rate_records_per_s, readers };
        assert_eq!(read("vmferry.disk=/dev/vda"), Ok(Some(disk(200, 0))));
        assert_eq!(read("vmferry.disk_rate=0 vmferry.disk=/dev/vda vmferry.disk_readers=8"), Ok(Some(disk(0, 8))));
        for wrong in ["disk=vda", "disk=/dev/vda vmferry.disk_rate=x", "disk_readers=65", "disk_readers=-1"] {
            assert!(read(&format!("vmferry.{wrong}")).is_err(), "{wrong}");
        }
    }
}
