//! Frames over one TCP connection.
//!
//! The socket never blocks by itself: every wait also watches for cancellation and has an end. A wait for the peer that
//! lasts longer than the stall timeout is an error.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use vmferry_core::wire::{FrameReader, FrameWriter, HEADER_BYTES, Header, Message, WireError};

use crate::buffer::Buffer;
use crate::cancel::{Cancel, wait};
use crate::socket::Sent;

/// Read at once where the peer sends small messages.
const READ_BYTES: usize = 64 * 1024;

/// Messages that are queued leave together at the latest when they are so long.
const QUEUE_BYTES: usize = 64 * 1024;

/// How long a message that is not cancelled may take to leave.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the peer has to hear why a migration ended, and to close the connection.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);

/// How long the peer has to say why it ended the migration, once a further connection has ended.
const REASON_TIMEOUT: Duration = Duration::from_millis(300);

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer closed it, or the network did.
    #[error("the connection was closed")]
    Closed,
    /// The peer took or gave nothing for too long.
    #[error("the peer did not move for {ms} ms")]
    Stalled {
        /// How long.
        ms: u128,
    },
    /// The user cancelled while waiting.
    #[error("cancelled")]
    Cancelled,
    /// The peer's bytes are no frame.
    #[error("the peer's bytes are not as the protocol demands")]
    Wire(#[from] WireError),
    /// The system refused.
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Link {
    stream: TcpStream,
    writer: FrameWriter,
    reader: FrameReader,
    /// Frames that wait to leave, and the beginning of the one that is leaving.
    head: Vec<u8>,
    /// Bytes received; the first `taken` of them are used up, the first `filled` are valid.
    buffer: Buffer,
    taken: usize,
    filled: usize,
    stall_timeout: Duration,
    cancel: Cancel,
    /// How long it was waited in all until the peer took something.
    waited: Duration,
    /// A frame has left in part.
    broken: bool,
    /// The cancellation was taken note of, and no longer ends any wait.
    cancel_noted: bool,
    /// The last that was said is why the migration ended.
    said_farewell: bool,
}

impl Link {
    /// Frames over `stream` from now on.
    ///
    /// # Errors
    /// If the socket's options cannot be set.
    pub(crate) fn new(stream: TcpStream, stall_timeout: Duration, cancel: Cancel) -> Result<Self, LinkError> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            writer: FrameWriter::new(),
            reader: FrameReader::new(),
            head: Vec::new(),
            buffer: Buffer::zeroed(READ_BYTES),
            taken: 0,
            filled: 0,
            stall_timeout,
            cancel,
            waited: Duration::ZERO,
            broken: false,
            cancel_noted: false,
            said_farewell: false,
        })
    }

    /// Sends one message whole; how many bytes it took.
    ///
    /// The user's wish to end neither tears a hand-over apart nor keeps the reason of an abort from the peer: these two
    /// are not cancelled, but have little time.
    ///
    /// # Errors
    /// [`LinkError`]; then nothing more can be sent, since the frame may have left in part.
    pub(crate) fn send(&mut self, message: &Message<'_>) -> Result<u64, LinkError> {
        match message {
            Message::HandOver(_) | Message::Abort(_) => self.send_within(message, LAST_WORD_TIMEOUT, false),
            _ => self.send_within(message, self.stall_timeout, true),
        }
    }

    /// Sends one message with others that follow, if it is short: it may leave only with the next that is sent, or with
    /// [`Self::flush`]. How many bytes it takes.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(crate) fn queue(&mut self, message: &Message<'_>) -> Result<u64, LinkError> {
        if self.broken {
            return Err(LinkError::Closed);
        }
        if message.data_bytes() >= QUEUE_BYTES {
            return self.send(message);
        }
        let before = self.head.len();
        self.writer.seal(message, &mut self.head);
        let bytes = self.head.len() - before;
        if self.head.len() >= QUEUE_BYTES {
            self.flush()?;
        }
        Ok(bytes as u64)
    }

    /// How long it was waited so far until the peer took something.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// How far the kernel has got with what was sent.
    ///
    /// # Errors
    /// As [`Sent::of`].
    pub(crate) fn kernel_sent(&self) -> io::Result<Sent> {
        Sent::of(&self.stream)
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(crate) fn flush(&mut self) -> Result<(), LinkError> {
        if self.head.is_empty() {
            return Ok(());
        }
        if self.broken {
            return Err(LinkError::Closed);
        }
        self.write(&[], self.stall_timeout, true)
    }

    fn send_within(&mut self, message: &Message<'_>, timeout: Duration, cancellable: bool) -> Result<u64, LinkError> {
        if self.broken {
            return Err(LinkError::Closed);
        }
        let before = self.head.len();
        let data = self.writer.seal_head(message, &mut self.head);
        let bytes = self.head.len() - before + data.len();
        self.write(data, timeout, cancellable)?;
        self.said_farewell = matches!(message, Message::Abort(_));
        Ok(bytes as u64)
    }

    /// Writes what is queued, and `data` behind it.
    fn write(&mut self, data: &[u8], timeout: Duration, cancellable: bool) -> Result<(), LinkError> {
        // Until all has left, the connection is of no use to another frame.
        self.broken = true;
        let mut sent = 0;
        let total = self.head.len() + data.len();
        let mut moved_at = Instant::now();
        while sent < total {
            let written = if sent < self.head.len() {
                self.stream.write_vectored(&[IoSlice::new(&self.head[sent..]), IoSlice::new(data)])
            } else {
                self.stream.write(&data[sent - self.head.len()..])
            };
            match written {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => {
                    sent += count;
                    moved_at = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let waits_since = Instant::now();
                    let waited = self.await_peer(PollFlags::OUT, moved_at, timeout, cancellable);
                    self.waited += waits_since.elapsed();
                    waited?;
                }
                Err(error) => survive(error)?,
            }
        }
        self.broken = false;
        self.head.clear();
        Ok(())
    }

    /// The cancellation was taken note of: from now on waits go on in spite of it.
    pub(crate) fn ignore_cancel(&mut self) {
        self.cancel_noted = true;
    }

    fn cancel_flags(&self, cancellable: bool) -> PollFlags {
        if cancellable && !self.cancel_noted { PollFlags::IN } else { PollFlags::empty() }
    }

    /// Waits until the peer can be read from, the time is over, or it was cancelled.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub(crate) fn wait_readable(&self, timeout: Duration) -> Result<(), LinkError> {
        self.wait_for(true, [None, None], timeout)
    }

    /// A further connection has ended: waits for the reason, which the peer says on this one if it ended the migration.
    pub(crate) fn wait_for_reason(&self) {
        let _ = self.wait_readable(REASON_TIMEOUT);
    }

    /// Waits until the peer can be read from, if that is wanted, or one of the others can, the time is over, or it was
    /// cancelled.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub(crate) fn wait_for(
        &self,
        wants_frame: bool,
        others: [Option<BorrowedFd<'_>>; 2],
        timeout: Duration,
    ) -> Result<(), LinkError> {
        if wants_frame && self.has_frame() {
            return Ok(());
        }
        let flags = |wanted| if wanted { PollFlags::IN } else { PollFlags::empty() };
        let fds = [
            (self.stream.as_fd(), flags(wants_frame)),
            (self.cancel.as_fd(), self.cancel_flags(true)),
            (others[0].unwrap_or(self.cancel.as_fd()), flags(others[0].is_some())),
            (others[1].unwrap_or(self.cancel.as_fd()), flags(others[1].is_some())),
        ];
        wait(&fds, Some(timeout))?;
        Ok(())
    }

    /// Takes the next message if all of it has arrived, or has begun to: then the rest is waited for. With it, the bytes
    /// of its frame.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(crate) fn receive(&mut self) -> Result<Option<(Message<'_>, u64)>, LinkError> {
        if self.filled - self.taken < HEADER_BYTES && !self.fill(HEADER_BYTES, false)? {
            return Ok(None);
        }
        let header = Header::parse(self.buffer[self.taken..].first_chunk().expect("a header has arrived"))?;
        let frame_bytes = HEADER_BYTES + header.payload_bytes();
        if self.filled - self.taken < frame_bytes {
            self.fill(frame_bytes, true)?;
        }
        let payload = &self.buffer[self.taken + HEADER_BYTES..self.taken + frame_bytes];
        self.taken += frame_bytes;
        Ok(Some((self.reader.open(header, payload)?, frame_bytes as u64)))
    }

    /// Whether [`Self::receive`] has something to give, or to complain about, without reading.
    pub(crate) fn has_frame(&self) -> bool {
        let unread = &self.buffer[self.taken..self.filled];
        let header = unread.first_chunk().map(Header::parse);
        header.is_some_and(|header| header.map_or(true, |header| unread.len() >= HEADER_BYTES + header.payload_bytes()))
    }

    /// Reads until `wanted` unread bytes are there. Without `must`, gives up with false if none of them has arrived.
    fn fill(&mut self, wanted: usize, must: bool) -> Result<bool, LinkError> {
        self.buffer.copy_within(self.taken..self.filled, 0);
        self.filled -= self.taken;
        self.taken = 0;
        if self.buffer.len() < wanted {
            // Bounded by the longest frame, which the header's check enforces.
            self.buffer.grow(wanted.max(READ_BYTES) - self.buffer.len());
        }
        let mut moved_at = Instant::now();
        while self.filled < wanted {
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => {
                    self.filled += count;
                    moved_at = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !must && self.filled == 0 {
                        return Ok(false);
                    }
                    self.await_peer(PollFlags::IN, moved_at, self.stall_timeout, true)?;
                }
                Err(error) => survive(error)?,
            }
        }
        Ok(true)
    }

    /// Waits for the peer, at most until `timeout` after `moved_at`.
    fn await_peer(
        &self,
        flags: PollFlags,
        moved_at: Instant,
        timeout: Duration,
        cancellable: bool,
    ) -> Result<(), LinkError> {
        let left = timeout.saturating_sub(moved_at.elapsed());
        if left.is_zero() {
            return Err(LinkError::Stalled { ms: timeout.as_millis() });
        }
        let cancel_flags = self.cancel_flags(cancellable);
        let [_, cancelled] = wait(&[(self.stream.as_fd(), flags), (self.cancel.as_fd(), cancel_flags)], Some(left))?;
        if cancelled && !cancel_flags.is_empty() { Err(LinkError::Cancelled) } else { Ok(()) }
    }
}

impl Drop for Link {
    /// A connection that is closed while bytes of the peer lie unread is reset, and the reset takes with it what the peer
    /// has not read yet: the reason why it ended. So the peer's bytes are read until it has closed, if it does so soon.
    fn drop(&mut self) {
        if !self.said_farewell || self.stream.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let until = Instant::now() + FAREWELL_TIMEOUT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let readable = wait(&[(self.stream.as_fd(), PollFlags::IN)], Some(left)).is_ok_and(|[readable]| readable);
            if left.is_zero() || !readable || matches!(self.stream.read(&mut self.buffer), Ok(0) | Err(_)) {
                return;
            }
        }
    }
}

/// An interruption is nothing; a connection that ended is [`LinkError::Closed`] however it ended.
fn survive(error: io::Error) -> Result<(), LinkError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::UnexpectedEof => Err(LinkError::Closed),
        _ => Err(LinkError::Io(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use vmferry_core::pages::{PAGE_BYTES, PageRun};
    use vmferry_core::wire::{Abort, Fault, Pages};

    use super::*;

    fn pair(stall: Duration) -> (Link, Link, Cancel) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let there = listener.accept().unwrap().0;
        let cancel = Cancel::new().unwrap();
        let other = Cancel::new().unwrap();
        (Link::new(here, stall, cancel.clone()).unwrap(), Link::new(there, stall, other).unwrap(), cancel)
    }

    fn pages(data: &[u8]) -> Message<'_> {
        Message::Pages(Pages::raw(PageRun::new(0, data.len() as u64 / PAGE_BYTES), data))
    }

    #[test]
    fn messages_of_all_sizes_cross() {
        let (mut here, mut there, _cancel) = pair(Duration::from_secs(10));
        let data = vec![7; 256 * PAGE_BYTES as usize];
        let sender = std::thread::spawn(move || {
            let mut bytes = 0;
            for number in 0..50 {
                bytes += here.send(&Message::Ping(number)).unwrap();
                bytes += here.send(&pages(&data)).unwrap();
            }
            bytes
        });
        let mut received = 0;
        let mut seen = 0;
        while seen < 100 {
            there.wait_readable(Duration::from_secs(10)).unwrap();
            if let Some((message, bytes)) = there.receive().unwrap() {
                match message {
                    Message::Ping(number) => assert_eq!(number, seen / 2),
                    Message::Pages(pages) => assert!(pages.data.iter().all(|&byte| byte == 7)),
                    other => panic!("{}", other.name()),
                }
                received += bytes;
                seen += 1;
            }
        }
        assert_eq!(received, sender.join().unwrap());
        there.wait_readable(Duration::from_secs(10)).unwrap();
        assert!(matches!(there.receive(), Err(LinkError::Closed)));
    }

    #[test]
    fn a_peer_that_takes_nothing_is_a_stall_and_a_cancellation_ends_the_wait() {
        let data = vec![7; 256 * PAGE_BYTES as usize];
        let fill = |link: &mut Link| (0..1000).find_map(|_| link.send(&pages(&data)).err());
        let (mut here, _there, _cancel) = pair(Duration::from_millis(50));
        assert!(matches!(fill(&mut here), Some(LinkError::Stalled { .. })));
        let (mut here, _there, cancel) = pair(Duration::from_secs(100));
        cancel.cancel();
        assert!(matches!(fill(&mut here), Some(LinkError::Cancelled)));
    }

    /// The target told a source, which was sending all the time, that a checksum was wrong, and closed: the source said that
    /// the connection was lost.
    #[test]
    fn the_reason_arrives_although_much_lies_unread() {
        let (mut here, mut there, _cancel) = pair(Duration::from_secs(10));
        let data = vec![7; 16 * PAGE_BYTES as usize];
        here.send(&pages(&data)).unwrap();
        let farewell = std::thread::spawn(move || {
            let abort = Abort { fault: Fault::Receiver, text: "checksum".into() };
            there.send(&Message::Abort(abort)).unwrap();
            drop(there);
        });
        here.wait_readable(Duration::from_secs(10)).unwrap();
        // What is under way when the other side closes.
        here.send(&pages(&data)).unwrap();
        match here.receive().unwrap() {
            Some((Message::Abort(abort), _)) => assert_eq!(abort.text, "checksum"),
            other => panic!("{other:?}"),
        }
        drop(here);
        farewell.join().unwrap();
    }

    #[test]
    fn garbage_is_an_error() {
        let (here, mut there, _cancel) = pair(Duration::from_secs(10));
        (&here.stream).write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n").unwrap();
        there.wait_readable(Duration::from_secs(10)).unwrap();
        assert!(matches!(there.receive(), Err(LinkError::Wire(_))));
    }
}
