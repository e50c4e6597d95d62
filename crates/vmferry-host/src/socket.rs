//! What the kernel says of a TCP connection: whether it is the network that has not taken what was written, or the peer.
#![expect(unsafe_code, reason = "an option of a socket for which no library has a safe function")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Where in the kernel's `struct tcp_info` (uapi/linux/tcp.h) the figures are that count here. It only ever grows at its end.
const BYTES_ACKED: usize = 120;
const MIN_RTT_US: usize = 148;
const BUSY_TIME_US: usize = 168;
const WINDOW_LIMITED_US: usize = 176;
/// So much of it; since Linux 4.10 all of this is there.
const INFO_BYTES: usize = 184;

/// The kernel counts times in ticks of up to 10 ms: they say what the network carries once there are so many of them, in µs.
const BUSY_MIN_US: u64 = 40_000;
/// What the network carries is known only if answers were waited for at most this part of the time.
const ROUND_TRIPS_PARTS: u64 = 2;
/// The weight of such a measurement that is less than before: where processors are short, answers are late.
const RATE_WEIGHT: f64 = 0.2;

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
    /// The least time in which an answer came.
    pub(crate) min_rtt_us: u64,
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
        let half = info[MIN_RTT_US..MIN_RTT_US + size_of::<u32>()].try_into().expect("four bytes");
        let word = |at: usize| {
            let bytes = info[at..at + size_of::<u64>()].try_into().expect("eight bytes");
            u64::from_ne_bytes(bytes)
        };
        Ok(Self {
            acked_bytes: word(BYTES_ACKED),
            busy_us: word(BUSY_TIME_US),
            window_limited_us: word(WINDOW_LIMITED_US),
            min_rtt_us: u64::from(u32::from_ne_bytes(half)),
        })
    }
}

/// How far all connections together have got since some time.
#[derive(Debug, Default)]
struct Progress {
    acked_bytes: u64,
    /// Of all of them, added up,
    busy_us: u64,
    /// and of the one that was busy longest: they are side by side, most of the time.
    longest_busy_us: u64,
    window_limited_us: u64,
}

impl Progress {
    /// `before`: as they were then; connections that are new since are missing in it.
    fn since(before: &[Sent], now: &[Sent]) -> Self {
        let unknown = std::iter::repeat(Sent::default());
        let mut progress = Self::default();
        for (now, before) in now.iter().zip(before.iter().copied().chain(unknown)) {
            let busy_us = now.busy_us.saturating_sub(before.busy_us);
            progress.acked_bytes += now.acked_bytes.saturating_sub(before.acked_bytes);
            progress.busy_us += busy_us;
            progress.longest_busy_us = progress.longest_busy_us.max(busy_us);
            progress.window_limited_us += now.window_limited_us.saturating_sub(before.window_limited_us);
        }
        progress
    }

    /// Whether the peer had room in most of so much time.
    fn had_room(&self, busy_us: u64) -> bool {
        self.window_limited_us * WINDOW_LIMITED_PARTS <= busy_us
    }
}

/// Tells whether the network is what limits, and what it carries.
#[derive(Debug, Default)]
pub(crate) struct NetworkWatch {
    /// How far all connections had got at the last look.
    before: Vec<Sent>,
    /// The same when what the network carries was last measured,
    marked: Vec<Sent>,
    /// and how often it was looked since.
    looks: u64,
    bytes_per_s: Option<f64>,
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
        let Ok(connections) = sent.collect::<io::Result<Vec<Sent>>>() else {
            self.bytes_per_s = None;
            return false;
        };
        self.measure(&connections);
        let progress = Progress::since(&self.before, &connections);
        let acked_bytes = connections.iter().map(|sent| sent.acked_bytes).sum();
        self.before = connections;
        let waiting = bytes.saturating_sub(acked_bytes);
        waiting >= in_flight_bytes.div_ceil(2).max(1) && progress.had_room(progress.busy_us)
    }

    /// What the network carries while something is under way, also where that is not all the time; `None` if it is not known, as
    /// where it is the peer that has no room.
    pub(crate) fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s
    }

    fn measure(&mut self, connections: &[Sent]) {
        self.looks += 1;
        let progress = Progress::since(&self.marked, connections);
        let busy_us = progress.longest_busy_us;
        if busy_us < BUSY_MIN_US {
            return;
        }
        // At worst each look was at a stretch of its own, at whose end nothing went, and only an answer was waited for.
        let waited_us = self.looks * connections.iter().map(|sent| sent.min_rtt_us).max().unwrap_or(0);
        let is_known = waited_us * ROUND_TRIPS_PARTS <= busy_us && progress.had_room(busy_us);
        self.bytes_per_s = is_known.then(|| {
            let measured = progress.acked_bytes as f64 * 1e6 / (busy_us - waited_us) as f64;
            self.bytes_per_s.map_or(measured, |before| measured.max(before + RATE_WEIGHT * (measured - before)))
        });
        (self.marked, self.looks) = (connections.to_vec(), 0);
        tracing::trace!(bytes_per_s = self.bytes_per_s, ?progress, waited_us, "the network");
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
        let sent = |acked_bytes, busy_us, window_limited_us| {
            Ok(Sent { acked_bytes, busy_us, window_limited_us, min_rtt_us: 0 })
        };
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
    fn what_the_network_carries_is_that_of_the_time_in_which_something_is_under_way() {
        let sent =
            |acked_bytes, busy_us, window_limited_us| Sent { acked_bytes, busy_us, window_limited_us, min_rtt_us: 100 };
        let mut watch = NetworkWatch::default();
        let mut rate = |sent: &[Sent]| {
            watch.has_most(sent.iter().copied().map(Ok), 0, 0);
            watch.bytes_per_s().map(f64::round)
        };
        assert_eq!(rate(&[sent(3_000_000, 20_000, 0)]), None, "too short");
        // Two looks, at each of which an answer may have been waited for.
        assert_eq!(rate(&[sent(5_000_000, 50_200, 0)]), Some(1e8));
        // Less is believed slowly, more at once; connections side by side.
        assert_eq!(rate(&[sent(5_000_000, 100_300, 0), sent(0, 0, 0)]), Some(0.8e8));
        assert_eq!(rate(&[sent(10_000_000, 140_400, 0), sent(5_000_000, 50_100, 0)]), Some(2e8));
        // It is the peer that has no room.
        assert_eq!(rate(&[sent(15_000_000, 190_500, 10_000), sent(5_000_000, 50_100, 0)]), None);
        // Most of the time may have been waiting for answers.
        (0..300).for_each(|_| assert_eq!(rate(&[sent(15_000_000, 190_500, 10_000), sent(5_000_000, 50_100, 0)]), None));
        assert_eq!(rate(&[sent(20_000_000, 240_600, 10_000), sent(5_000_000, 50_100, 0)]), None);
        assert!(rate(&[sent(25_000_000, 290_700, 10_000), sent(5_000_000, 50_100, 0)]).is_some());
        watch.has_most([Err(io::ErrorKind::Unsupported.into())].into_iter(), 0, 0);
        assert_eq!(watch.bytes_per_s(), None);
    }

    #[test]
    fn a_socket_that_is_no_connection_is_an_error() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Sent::of(&ours).is_err());
    }
}
