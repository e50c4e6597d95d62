//! Lines of JSON, bytes and descriptors between this process and a child of ours, over a Unix socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest line.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// The most descriptors with one line.
const MAX_FDS: usize = 4;

/// One end of the channel.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    unread: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Channel {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, unread: Vec::new(), fds: Vec::new() }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a line, and descriptors with it.
    pub(crate) fn send(&mut self, line: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        let mut rest = &bytes[..];
        if !fds.is_empty() {
            assert!(fds.len() <= MAX_FDS, "{} descriptors with one line", fds.len());
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(fds));
            assert!(fits, "there is space for {MAX_FDS} descriptors");
            let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL)?;
            rest = &rest[sent..];
        }
        self.stream.write_all(rest)
    }

    /// Sends bytes as they are; the other side must expect them.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next line and all descriptors that came by its end; `None` where the other side has ended.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return Ok(Some((serde_json::from_slice(&line)?, std::mem::take(&mut self.fds))));
            }
            if self.unread.len() > MAX_LINE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without an end"));
            }
            if self.read_more()? == 0 {
                return Ok(None);
            }
        }
    }

    /// The next bytes as they are.
    pub(crate) fn receive_bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes: Vec<u8> = self.unread.drain(..self.unread.len().min(count)).collect();
        let have = bytes.len();
        bytes.resize(count, 0);
        self.stream.read_exact(&mut bytes[have..])?;
        Ok(bytes)
    }

    fn read_more(&mut self) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 4096];
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                self.stream.as_fd(),
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        self.unread.extend_from_slice(&bytes[..received.bytes]);
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write as _};

    use super::*;

    #[test]
    fn lines_bytes_and_descriptors_arrive_in_order() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut here, mut there) = (Channel::new(here), Channel::new(there));
        let mut file = std::fs::File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(b"inside").unwrap();
        file.rewind().unwrap();
        here.send(&"first", &[file.as_fd()]).unwrap();
        here.send(&3, &[]).unwrap();
        here.send_bytes(b"abc").unwrap();
        here.send(&"last", &[]).unwrap();
        drop(here);

        let (first, mut fds) = there.receive::<String>().unwrap().unwrap();
        assert_eq!(first, "first");
        let mut content = String::new();
        std::fs::File::from(fds.remove(0)).read_to_string(&mut content).unwrap();
        assert_eq!(content, "inside");
        let (count, fds) = there.receive::<usize>().unwrap().unwrap();
        assert!(fds.is_empty());
        assert_eq!(there.receive_bytes(count).unwrap(), b"abc");
        assert_eq!(there.receive::<String>().unwrap().unwrap().0, "last");
        assert!(there.receive::<String>().unwrap().is_none());
    }
}
