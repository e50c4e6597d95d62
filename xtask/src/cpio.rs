//! A writer of `newc` cpio archives, the format of a Linux initramfs.
//!
//! Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. An entry is a header of 110 ASCII
//! characters, the name with its NUL, padding to 4 bytes, the content, padding to 4 bytes.
//!
//! Times and owners are always 0, so equal content gives equal archives.

/// The file type bits of `st_mode`.
const REGULAR_FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, 2, (0, 0), &[]);
    }

    pub(crate) fn executable(&mut self, name: &str, content: &[u8]) {
        self.entry(name, REGULAR_FILE | 0o755, 1, (0, 0), content);
    }

    pub(crate) fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, REGULAR_FILE | 0o644, 1, (0, 0), content);
    }

    pub(crate) fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE | 0o600, 1, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, 1, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        let size = u32::try_from(content.len()).expect("an initramfs file is below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a file name is short");
        self.entries += 1;
        let (owner, group, time, checksum) = (0, 0, 0, 0);
        let (own_major, own_minor) = (0, 0);
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.entries,
            mode,
            owner,
            group,
            links,
            time,
            size,
            own_major,
            own_minor,
            device.0,
            device.1,
            name_size,
            checksum,
        ] {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_documented_layout() {
        let mut archive = Archive::default();
        archive.executable("init", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[6..14], b"00000001", "inode number");
        assert_eq!(&bytes[14..22], b"000081ED", "mode");
        assert_eq!(&bytes[54..62], b"00000005", "size");
        assert_eq!(&bytes[94..102], b"00000005", "length of the name with its NUL");
        assert_eq!(&bytes[110..115], b"init\0");
        // 110 + 5 = 115, padded to 116; 5 bytes of content, padded to 124.
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(&bytes[234..245], b"TRAILER!!!\0");
    }

    #[test]
    fn a_device_node_carries_its_numbers() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        let bytes = archive.finish();
        let second = 110 + 4 + 2;
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 14..second + 22], b"00002180", "mode");
        assert_eq!(&bytes[second + 78..second + 94], b"0000000500000001", "device numbers");
    }

    #[test]
    fn equal_content_gives_equal_archives() {
        let build = || {
            let mut archive = Archive::default();
            archive.directory("dev");
            archive.executable("init", &[7; 4097]);
            archive.finish()
        };
        assert_eq!(build(), build());
    }
}
