//! What the kernel says of a TCP connection: whether it is the network that has not taken what was written, or the peer.
#![expect(unsafe_code, reason = "an option of a socket for which no library has a safe function")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Where in the kernel's `struct tcp_info` (uapi/linux/tcp.h) the figures are that count here. It only ever grows at its end.
const BYTES_ACKED: usize = 120;
const BUSY_TIME_US: usize = 168;
const WINDOW_LIMITED_US: usize = 176;
/// So much of it; since Linux 4.10 all of this is there.
const INFO_BYTES: usize = 184;

/// A connection for which the peer's kernel had no room in more than one part of so many of its time is limited by the peer.
const WINDOW_LIMITED_PARTS: u64 = 8;

/// How far a connection has got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Bytes that the peer's kernel has.
    pub(crate) acked_bytes: u64,
    /// For how long something was under way, in µs,
    pub(crate) busy_us: u64,
    /// and for how much of that the peer's kernel had no room for more.
    pub(crate) window_limited_us: u64,
}

impl Sent {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If the socket is no TCP connection, or the kernel is older than all that is needed otherwise.
    pub(crate) fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut info = [0_u8; INFO_BYTES];
        let mut length = INFO_BYTES as libc::socklen_t;
        // SAFETY: the kernel writes no more than `length` bytes to the buffer, which has so many.
        let result = unsafe {
            let fd = socket.as_fd().as_raw_fd();
            libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        if (length as usize) < INFO_BYTES {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let word = |at: usize| {
            let bytes = info[at..at + size_of::<u64>()].try_into().expect("eight bytes");
            u64::from_ne_bytes(bytes)
        };
        Ok(Self {
            acked_bytes: word(BYTES_ACKED),
            busy_us: word(BUSY_TIME_US),
            window_limited_us: word(WINDOW_LIMITED_US),
        })
    }
}

/// Tells whether the network is what limits.
#[derive(Debug, Default)]
pub(crate) struct NetworkWatch {
    before: Sent,
}

impl NetworkWatch {
    /// Whether at least half of the bytes that the target has not confirmed were not taken by the network yet, rather than by the
    /// target. `sent`: of all connections, as far as it is known; `bytes`: written to all of them so far.
    pub(crate) fn has_most(
        &mut self,
        sent: impl Iterator<Item = io::Result<Sent>>,
        bytes: u64,
        in_flight_bytes: u64,
    ) -> bool {
        let mut all = Sent::default();
        for one in sent {
            let Ok(one) = one else { return false };
            all.acked_bytes += one.acked_bytes;
            all.busy_us += one.busy_us;
            all.window_limited_us += one.window_limited_us;
        }
        let busy_us = all.busy_us.saturating_sub(self.before.busy_us);
        let window_limited_us = all.window_limited_us.saturating_sub(self.before.window_limited_us);
        self.before = all;
        let waiting = bytes.saturating_sub(all.acked_bytes);
        waiting >= in_flight_bytes.div_ceil(2).max(1) && window_limited_us * WINDOW_LIMITED_PARTS <= busy_us
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_peer_that_reads_nothing_is_told_from_one_that_reads() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(&[1; 1000]).unwrap();
        theirs.read_exact(&mut [0; 1000]).unwrap();
        let read = Sent::of(&ours).unwrap();
        assert!((1000..=1001).contains(&read.acked_bytes), "the kernel counts the first byte of all as well: {read:?}");
        assert_eq!(read.window_limited_us, 0);

        ours.set_nonblocking(true).unwrap();
        let mut written = 1000;
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match ours.write(&[1; 1 << 16]) {
                Ok(bytes) => written += bytes as u64,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            let stuck = Sent::of(&ours).unwrap();
            if stuck.window_limited_us > 10_000 {
                assert!(
                    stuck.window_limited_us <= stuck.busy_us && stuck.acked_bytes < written,
                    "{stuck:?} of {written}"
                );
                break;
            }
            assert!(Instant::now() < until, "{stuck:?} of {written}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_network_is_what_limits_if_it_has_not_taken_most() {
        let sent = |acked_bytes, busy_us, window_limited_us| Ok(Sent { acked_bytes, busy_us, window_limited_us });
        let mut watch = NetworkWatch::default();
        // Of 1000 bytes 900 are not confirmed.
        assert!(watch.has_most([sent(100, 1000, 0), sent(450, 1000, 0)].into_iter(), 1000, 900));
        assert!(!watch.has_most([sent(100, 2000, 0), sent(451, 2000, 0)].into_iter(), 1000, 900));
        // The target had no room for a quarter of the time since.
        assert!(!watch.has_most([sent(100, 3000, 0), sent(100, 3000, 500)].into_iter(), 1000, 900));
        assert!(watch.has_most([sent(100, 4000, 0), sent(100, 4000, 500)].into_iter(), 1000, 900));
        assert!(!watch.has_most([sent(1000, 4000, 500)].into_iter(), 1000, 0), "nothing is under way");
        assert!(!watch.has_most([sent(0, 5000, 500), Err(io::ErrorKind::Unsupported.into())].into_iter(), 1000, 900));
    }

    #[test]
    fn a_socket_that_is_no_connection_is_an_error() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Sent::of(&ours).is_err());
    }
}
