//! Cancellation that wakes a waiting driver.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

/// Says that the user wants a migration to end. It is a descriptor that becomes readable, so that whoever waits for a
/// socket waits for it too, and a signal handler can write to it.
#[derive(Debug, Clone)]
pub struct Cancel {
    ends: Arc<(UnixStream, UnixStream)>,
}

impl Cancel {
    /// Nothing is cancelled yet.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        Ok(Self { ends: Arc::new((read, write)) })
    }

    /// Cancels. More than once is the same as once.
    pub fn cancel(&self) {
        // Full means that it is readable already.
        let _ = (&self.ends.1).write(&[1]);
    }

    /// A descriptor for a signal handler: any byte written to it cancels.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn signal_end(&self) -> io::Result<UnixStream> {
        self.ends.1.try_clone()
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        wait(&[(self.as_fd(), PollFlags::IN)], Some(Duration::ZERO)).is_ok_and(|ready| ready[0])
    }

    /// Takes back what was cancelled so far, for the next migration of a long-lived process.
    pub fn reset(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.ends.0).read(&mut bytes), Ok(count) if count > 0) {}
    }
}

impl AsFd for Cancel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ends.0.as_fd()
    }
}

/// Waits until one of the descriptors is ready or the time is over; which are ready (errors and hang-ups included). An
/// interrupting signal ends the wait early with none.
pub(crate) fn wait<const N: usize>(
    fds: &[(BorrowedFd<'_>, PollFlags); N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
    let timeout = timeout.map(|time| Timespec::try_from(time).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }));
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(_) => Ok(polled.map(|fd| !fd.revents().is_empty())),
        Err(rustix::io::Errno::INTR) => Ok([false; N]),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_cancelled_until_reset() {
        let cancel = Cancel::new().unwrap();
        assert!(!cancel.is_cancelled());
        cancel.clone().cancel();
        cancel.cancel();
        assert!(cancel.is_cancelled());
        assert!(cancel.is_cancelled());
        cancel.reset();
        assert!(!cancel.is_cancelled());
        (&cancel.signal_end().unwrap()).write_all(b"x").unwrap();
        assert!(cancel.is_cancelled());
    }
}
