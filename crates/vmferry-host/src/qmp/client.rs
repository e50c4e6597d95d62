//! The connection: reading lines with deadlines, matching replies, keeping events.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use serde_json::{Value, json};

use super::error::QmpError;
use super::message::{self, GreetingVersion, Message};

/// The longest message we take. The largest answer we ask for is `info mtree -f`: 15 KiB for a small guest, some MiB for
/// one with hundreds of devices behind an IOMMU.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Events kept until somebody asks for them; beyond it the oldest are dropped and counted.
pub const MAX_QUEUED_EVENTS: usize = 1024;
/// How long a socket that exists may refuse us: between making it and listening on it QEMU takes a moment.
const LISTEN_GRACE: Duration = Duration::from_millis(500);
/// How long the server may take to greet before it counts as busy.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a command may take where the caller does not say. QEMU answers most in a millisecond, but its main loop
/// may be held up by a flush of a slow disk.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an adopted connection may take to find a message boundary again.
pub const ADOPT_TIMEOUT: Duration = Duration::from_secs(10);

const READ_BYTES: usize = 16 << 10;
/// An event stamp older than this is taken for a jump of the wall clock.
const MAX_EVENT_AGE: Duration = Duration::from_secs(60);
/// How often a full listen queue is tried again.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// Numbers the commands of all clients of this process.
static NEXT_COMMAND: AtomicU64 = AtomicU64::new(1);

/// Something that QEMU reported by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `STOP`, `MIGRATION` and the like.
    pub name: String,
    /// Its data; null where it has none.
    pub data: Value,
    /// When it happened on this host's monotonic clock. QEMU stamps events with the wall clock, in microseconds; this
    /// is the time of receipt less the stamp's age, or the time of receipt where the stamp is missing or implausible.
    pub happened_at: Instant,
    /// When we read it.
    pub received_at: Instant,
}

/// A negotiated connection to a QMP server.
#[derive(Debug)]
pub struct QmpClient {
    socket: OwnedFd,
    peer_pid: Option<u32>,
    version: Option<GreetingVersion>,
    /// Bytes read that do not make a line yet.
    unread: Vec<u8>,
    /// How much of `unread` is known to hold no line end.
    searched_bytes: usize,
    events: VecDeque<Event>,
    dropped_events: u64,
    /// Why the connection is of no further use.
    broken: Option<String>,
    /// An adopted connection may begin within a message.
    may_begin_inside_message: bool,
    /// QEMU's complaint about our resynchronisation byte, or about its predecessor's half command, carries no id.
    tolerate_unidentified_errors: bool,
}

impl QmpClient {
    /// Connects to the unix socket at `path`, waits for the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// See [`QmpError`]; [`QmpError::Busy`] where another client is connected.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::connect_within(path, GREETING_TIMEOUT)
    }

    /// As [`QmpClient::connect`], with a time limit for the greeting.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn connect_within(path: &Path, greeting_timeout: Duration) -> Result<Self, QmpError> {
        let start = Instant::now();
        let busy = || QmpError::Busy { path: path.to_owned(), waited_ms: greeting_timeout.as_millis() };
        let socket = loop {
            match connect_socket(path) {
                Ok(socket) => break socket,
                Err(Errno::AGAIN) if start.elapsed() >= greeting_timeout => return Err(busy()),
                // The listen queue is full: the server is busy, and so are others who wait for it.
                Err(Errno::AGAIN) => std::thread::sleep(CONNECT_RETRY),
                // A QEMU that has just been started has made its socket and does not listen yet.
                Err(Errno::CONNREFUSED) if start.elapsed() < LISTEN_GRACE => std::thread::sleep(CONNECT_RETRY),
                Err(errno) => return Err(connect_error(path, errno)),
            }
        };
        match Self::negotiate(socket, greeting_timeout.saturating_sub(start.elapsed())) {
            Err(QmpError::Timeout { .. }) => Err(busy()),
            result => result,
        }
    }

    /// Takes the greeting from a connected socket and leaves negotiation mode.
    ///
    /// # Errors
    /// See [`QmpError`]; [`QmpError::Timeout`] where no greeting comes.
    pub fn negotiate(socket: OwnedFd, greeting_timeout: Duration) -> Result<Self, QmpError> {
        let mut client = Self::new(socket);
        let wait = Wait::new("the QMP greeting", greeting_timeout);
        client.version = Some(client.read_greeting(&wait)?);
        // A server that has greeted but is then silent is no busy server.
        client.execute("qmp_capabilities")?;
        Ok(client)
    }

    /// Goes on with a connection that another client has negotiated, for instance in a guard process that inherited the
    /// descriptor. The other client must not use it any more. A command or a reply it left in the middle is discarded;
    /// events it had read are lost.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn adopt(socket: OwnedFd) -> Result<Self, QmpError> {
        let mut client = Self::new(socket);
        client.may_begin_inside_message = true;
        client.tolerate_unidentified_errors = true;
        // 0xFF is in no JSON: QEMU's parser drops what it has of a command and starts anew (QMP specification, "Client
        // commands with errors"). It answers with an error that carries no id.
        client.write(&[0xff], &[], &Wait::new("the adopted QMP connection", ADOPT_TIMEOUT))?;
        client.execute_within("query-status", Value::Null, ADOPT_TIMEOUT)?;
        client.may_begin_inside_message = false;
        Ok(client)
    }

    fn new(socket: OwnedFd) -> Self {
        let peer_pid = rustix::net::sockopt::socket_peercred(&socket)
            .ok()
            .and_then(|credentials| u32::try_from(credentials.pid.as_raw_nonzero().get()).ok());
        Self {
            socket,
            peer_pid,
            version: None,
            unread: Vec::new(),
            searched_bytes: 0,
            events: VecDeque::new(),
            dropped_events: 0,
            broken: None,
            may_begin_inside_message: false,
            tolerate_unidentified_errors: false,
        }
    }

    /// Runs a command without arguments.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn execute(&mut self, command: &str) -> Result<Value, QmpError> {
        self.execute_within(command, Value::Null, COMMAND_TIMEOUT)
    }

    /// Runs a command with arguments (a JSON object, or null for none).
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn execute_with(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_TIMEOUT)
    }

    /// Runs a command that must answer within `timeout`.
    ///
    /// # Errors
    /// See [`QmpError`]. After a timeout the command may still take effect; its late reply is dropped.
    pub fn execute_within(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value, QmpError> {
        self.execute_passing(command, arguments, &[], timeout)
    }

    /// Gives QEMU a copy of `fd` under `name`, which then stands for it in `fd:NAME`. A descriptor that QEMU already
    /// holds under that name is closed by QEMU.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn pass_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.execute_passing("getfd", json!({ "fdname": name }), &[fd], COMMAND_TIMEOUT)?;
        Ok(())
    }

    fn execute_passing(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let id = format!("vmferry-{}-{}", std::process::id(), NEXT_COMMAND.fetch_add(1, Ordering::Relaxed));
        let wait = Wait::new(command, timeout);
        self.write(&message::command_line(command, arguments, &id), fds, &wait)?;
        loop {
            match self.read_message(&wait)? {
                Message::Event { name, data, since_unix_epoch } => self.keep_event(name, data, since_unix_epoch),
                Message::Return { id: Some(answered), value } if answered == id => {
                    self.tolerate_unidentified_errors = false;
                    return Ok(value);
                }
                Message::Error { id: Some(answered), error } if answered == id => {
                    self.tolerate_unidentified_errors = false;
                    return Err(QmpError::Command { command: command.to_owned(), error });
                }
                Message::Error { id: None, error } if !self.tolerate_unidentified_errors => {
                    return Err(QmpError::Unparsed { command: command.to_owned(), desc: error.desc });
                }
                // The reply to a command that timed out, or to the connection's former user.
                stale @ (Message::Return { .. } | Message::Error { .. } | Message::Greeting(_)) => {
                    tracing::debug!(?stale, "dropped a QMP message that nobody waits for");
                }
            }
        }
    }

    /// The next event: one that is queued, else the next that comes within `timeout`; `None` if none does.
    ///
    /// # Errors
    /// See [`QmpError`]; running out of time is not an error here.
    pub fn wait_event(&mut self, timeout: Duration) -> Result<Option<Event>, QmpError> {
        let wait = Wait::new("an event", timeout);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.read_message(&wait) {
                Ok(Message::Event { name, data, since_unix_epoch }) => self.keep_event(name, data, since_unix_epoch),
                Ok(stale @ (Message::Return { .. } | Message::Error { .. } | Message::Greeting(_))) => {
                    tracing::debug!(?stale, "dropped a QMP message that nobody waits for");
                }
                Err(QmpError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Forgets the queued events, so that what comes next belongs to what is done next.
    pub fn discard_events(&mut self) {
        self.events.clear();
    }

    /// How many events were lost because the queue was full.
    pub fn dropped_events(&self) -> u64 {
        self.dropped_events
    }

    /// The version from the greeting; `None` on an adopted connection.
    pub fn version(&self) -> Option<&GreetingVersion> {
        self.version.as_ref()
    }

    /// The process that listened on the socket: QEMU, or who passed the socket to it. `None` where it is in a process
    /// namespace that we cannot see.
    pub fn peer_pid(&self) -> Option<u32> {
        self.peer_pid
    }

    /// Another descriptor of the same connection, close-on-exec, for [`QmpClient::adopt`].
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    fn read_greeting(&mut self, wait: &Wait) -> Result<GreetingVersion, QmpError> {
        loop {
            if let Some(line) = self.next_line()? {
                return match message::parse(&line) {
                    Ok(Message::Greeting(version)) => Ok(version),
                    Ok(Message::Return { .. } | Message::Error { .. } | Message::Event { .. }) | Err(_) => {
                        Err(self.fail(QmpError::NotQmp { start: message::excerpt(&line) }))
                    }
                };
            }
            // A human monitor or a serial line may never end its first line.
            if self.unread.first().is_some_and(|&first| first != b'{') {
                let start = message::excerpt(&self.unread);
                return Err(self.fail(QmpError::NotQmp { start }));
            }
            self.read_more(wait)?;
        }
    }

    fn read_message(&mut self, wait: &Wait) -> Result<Message, QmpError> {
        if let Some(why) = &self.broken {
            return Err(QmpError::Broken { why: why.clone() });
        }
        loop {
            while let Some(line) = self.next_line()? {
                let first_of_adopted = std::mem::take(&mut self.may_begin_inside_message);
                match message::parse(&line) {
                    Ok(message) => return Ok(message),
                    Err(_) if first_of_adopted => {}
                    Err(why) => return Err(QmpError::Malformed { start: message::excerpt(&line), why }),
                }
            }
            self.read_more(wait)?;
        }
    }

    /// The next complete line that is not empty.
    fn next_line(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            let found = self.unread[self.searched_bytes..].iter().position(|&byte| byte == b'\n');
            let Some(end) = found.map(|at| self.searched_bytes + at) else {
                self.searched_bytes = self.unread.len();
                if self.unread.len() > MAX_MESSAGE_BYTES {
                    return Err(self.fail(QmpError::MessageTooLong { limit_bytes: MAX_MESSAGE_BYTES }));
                }
                return Ok(None);
            };
            if end > MAX_MESSAGE_BYTES {
                return Err(self.fail(QmpError::MessageTooLong { limit_bytes: MAX_MESSAGE_BYTES }));
            }
            let mut line: Vec<u8> = self.unread.drain(..=end).collect();
            self.searched_bytes = 0;
            line.truncate(line.trim_ascii_end().len());
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }

    /// Reads what is there, waiting for it if need be.
    fn read_more(&mut self, wait: &Wait) -> Result<(), QmpError> {
        let mut chunk = [0_u8; READ_BYTES];
        loop {
            match rustix::net::recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(self.fail(QmpError::Closed { during: wait.what.clone() })),
                Ok((bytes, _)) => {
                    self.unread.extend_from_slice(&chunk[..bytes]);
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait.poll(self.socket.as_fd(), PollFlags::IN)?,
                Err(errno) => return Err(self.fail_io(errno, wait)),
            }
        }
    }

    /// Sends all of `bytes`, the descriptors with the first of them.
    fn write(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], wait: &Wait) -> Result<(), QmpError> {
        if let Some(why) = &self.broken {
            return Err(QmpError::Broken { why: why.clone() });
        }
        let mut left = bytes;
        let mut fds = fds;
        while !left.is_empty() {
            match send(self.socket.as_fd(), left, fds) {
                Ok(sent) => {
                    left = &left[sent..];
                    fds = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = wait.poll(self.socket.as_fd(), PollFlags::OUT) {
                        // Half a command is on its way: what follows would be taken for its end.
                        return Err(if left.len() == bytes.len() { error } else { self.fail(error) });
                    }
                }
                Err(errno) => return Err(self.fail_io(errno, wait)),
            }
        }
        Ok(())
    }

    fn fail_io(&mut self, errno: Errno, wait: &Wait) -> QmpError {
        let during = wait.what.clone();
        let error = match errno {
            Errno::PIPE | Errno::CONNRESET => QmpError::Closed { during },
            errno => QmpError::Io { during, source: errno.into() },
        };
        self.fail(error)
    }

    fn fail(&mut self, error: QmpError) -> QmpError {
        self.broken = Some(error.to_string());
        error
    }

    fn keep_event(&mut self, name: String, data: Value, since_unix_epoch: Option<Duration>) {
        let received_at = Instant::now();
        let age = since_unix_epoch
            .and_then(|stamp| SystemTime::now().duration_since(UNIX_EPOCH).ok()?.checked_sub(stamp))
            .filter(|&age| age <= MAX_EVENT_AGE);
        let happened_at = age.and_then(|age| received_at.checked_sub(age)).unwrap_or(received_at);
        tracing::trace!(name, %data, "QMP event");
        if self.events.len() == MAX_QUEUED_EVENTS {
            self.events.pop_front();
            self.dropped_events += 1;
        }
        self.events.push_back(Event { name, data, happened_at, received_at });
    }
}

impl AsFd for QmpClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A deadline and what it is for.
struct Wait {
    what: String,
    start: Instant,
    timeout: Duration,
}

impl Wait {
    fn new(what: &str, timeout: Duration) -> Self {
        Self { what: what.to_owned(), start: Instant::now(), timeout }
    }

    /// Waits until the descriptor is ready or the deadline is over.
    fn poll(&self, fd: BorrowedFd<'_>, flags: PollFlags) -> Result<(), QmpError> {
        loop {
            let left = self.timeout.saturating_sub(self.start.elapsed());
            if left.is_zero() {
                return Err(QmpError::timeout(&self.what, self.timeout));
            }
            // An hour is as good as for ever, and fits every Timespec.
            let left = left.min(Duration::from_secs(3600));
            let timespec = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
            match rustix::event::poll(&mut [PollFd::new(&fd, flags)], Some(&timespec)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(QmpError::Io { during: self.what.clone(), source: errno.into() }),
            }
        }
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    if fds.is_empty() {
        return rustix::net::send(socket, bytes, flags);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "room for one descriptor, not for {}", fds.len());
    rustix::net::sendmsg(socket, &[io::IoSlice::new(bytes)], &mut ancillary, flags)
}

/// Never blocks: where the listen queue is full the answer is `EAGAIN`.
fn connect_socket(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match SocketAddrUnix::new(path) {
        Ok(address) => rustix::net::connect(&socket, &address)?,
        // A socket address holds 107 bytes of path; a longer one is reached through its directory.
        Err(Errno::NAMETOOLONG) => {
            let directory = path.parent().ok_or(Errno::NAMETOOLONG)?;
            let name = path.file_name().unwrap_or(OsStr::new(""));
            let directory =
                rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&directory).to_string());
            rustix::net::connect(&socket, &SocketAddrUnix::new(short.join(name))?)?;
        }
        Err(errno) => return Err(errno),
    }
    Ok(socket)
}

fn connect_error(path: &Path, errno: Errno) -> QmpError {
    let path = path.to_owned();
    match errno {
        Errno::NOENT | Errno::NOTDIR => QmpError::SocketMissing { path },
        Errno::CONNREFUSED | Errno::PROTOTYPE => QmpError::Refused { path },
        Errno::ACCESS | Errno::PERM => QmpError::PermissionDenied { path },
        errno => QmpError::Connect { path, source: errno.into() },
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "capabilities": ["oob"]}}"#;
    const TIMEOUT: Duration = Duration::from_secs(20);

    /// The server's end of a socket pair.
    struct Script {
        stream: UnixStream,
        lines: BufReader<UnixStream>,
    }

    impl Script {
        fn say(&mut self, text: &str) {
            self.stream.write_all(text.as_bytes()).unwrap();
            self.stream.write_all(b"\r\n").unwrap();
        }

        /// Reads a command and returns its id.
        fn hear(&mut self, command: &str) -> String {
            let mut line = Vec::new();
            self.lines.read_until(b'\n', &mut line).unwrap();
            let line = line.strip_prefix(b"\xff").unwrap_or(&line);
            let value: Value = serde_json::from_slice(line).unwrap();
            assert_eq!(value["execute"], command);
            value["id"].as_str().unwrap().to_owned()
        }

        fn answer(&mut self, command: &str, value: &str) {
            let id = self.hear(command);
            self.say(&format!(r#"{{"return": {value}, "id": "{id}"}}"#));
        }

        fn greet(&mut self) {
            self.say(GREETING);
            self.answer("qmp_capabilities", "{}");
        }
    }

    /// Runs `script` as the server; the client is what `negotiate` makes of the other end.
    fn serve(
        script: impl FnOnce(&mut Script) + Send + 'static,
        timeout: Duration,
    ) -> (Result<QmpClient, QmpError>, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let lines = BufReader::new(theirs.try_clone().unwrap());
            script(&mut Script { stream: theirs, lines });
        });
        (QmpClient::negotiate(ours.into(), timeout), server)
    }

    #[test]
    fn a_greeting_in_pieces_is_one_greeting() {
        let (client, server) = serve(
            |script| {
                for byte in GREETING.bytes().chain(*b"\r\n") {
                    script.stream.write_all(&[byte]).unwrap();
                }
                script.answer("qmp_capabilities", "{}");
            },
            TIMEOUT,
        );
        let client = client.unwrap();
        assert_eq!(client.version().unwrap().qemu.major, 10);
        assert_eq!(client.peer_pid(), Some(std::process::id()));
        server.join().unwrap();
    }

    #[test]
    fn events_around_a_reply_are_kept_in_order() {
        let (client, server) = serve(
            |script| {
                script.greet();
                script.say(r#"{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}"#);
                let id = script.hear("query-status");
                script.say(r#"{"event": "MIGRATION", "data": {"status": "active"}}"#);
                script.say(&format!(r#"{{"return": {{"status": "paused"}}, "id": "{id}"}}"#));
                script.say(r#"{"event": "RESUME"}"#);
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        assert_eq!(client.execute("query-status").unwrap()["status"], "paused");
        let names: Vec<_> = (0..3).map(|_| client.wait_event(TIMEOUT).unwrap().unwrap().name).collect();
        assert_eq!(names, ["STOP", "MIGRATION", "RESUME"]);
        server.join().unwrap();
        assert!(matches!(client.wait_event(TIMEOUT), Err(QmpError::Closed { .. })));
        assert!(matches!(client.execute("cont"), Err(QmpError::Broken { .. })));
    }

    #[test]
    fn an_event_is_stamped_with_the_time_it_happened() {
        let (client, server) = serve(
            |script| {
                script.greet();
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_secs(5);
                let (seconds, microseconds) = (now.as_secs(), now.subsec_micros());
                script.say(&format!(
                    r#"{{"event": "STOP", "timestamp": {{"seconds": {seconds}, "microseconds": {microseconds}}}}}"#
                ));
            },
            TIMEOUT,
        );
        let event = client.unwrap().wait_event(TIMEOUT).unwrap().unwrap();
        assert!(event.received_at - event.happened_at >= Duration::from_secs(5));
        server.join().unwrap();
    }

    #[test]
    fn a_late_reply_is_dropped_and_never_taken_for_another() {
        let (client, server) = serve(
            |script| {
                script.greet();
                let late = script.hear("query-status");
                let current = script.hear("query-version");
                script.say(&format!(r#"{{"return": {{"late": true}}, "id": "{late}"}}"#));
                script.say(r#"{"return": {"foreign": true}, "id": "libvirt-7"}"#);
                script.say(&format!(r#"{{"return": {{"right": true}}, "id": "{current}"}}"#));
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        let error = client.execute_within("query-status", Value::Null, Duration::ZERO).unwrap_err();
        assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
        assert!(!error.is_fatal());
        assert_eq!(client.execute("query-version").unwrap(), json!({ "right": true }));
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_names_the_command_and_qemus_words() {
        let (client, server) = serve(
            |script| {
                script.greet();
                let id = script.hear("cont");
                script.say(&format!(r#"{{"error": {{"class": "CommandNotFound", "desc": "gone"}}, "id": "{id}"}}"#));
                script.hear("stop");
                script.say(r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#);
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        let error = client.execute("cont").unwrap_err();
        assert!(error.is_command_not_found());
        assert_eq!(error.to_string(), "QEMU refuses `cont`: gone (CommandNotFound)");
        assert!(matches!(client.execute("stop"), Err(QmpError::Unparsed { .. })));
        server.join().unwrap();
    }

    #[test]
    fn a_malformed_message_costs_only_itself() {
        let (client, server) = serve(
            |script| {
                script.greet();
                let id = script.hear("query-status");
                script.say("{\"return\": \u{1}garbage");
                script.say(&format!(r#"{{"return": {{}}, "id": "{id}"}}"#));
                script.answer("cont", "{}");
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        assert!(matches!(client.execute("query-status"), Err(QmpError::Malformed { .. })));
        client.execute("cont").unwrap();
        server.join().unwrap();
    }

    #[test]
    fn the_end_of_the_connection_is_told_from_silence() {
        let (client, server) = serve(
            |script| {
                script.greet();
                let _id = script.hear("migrate");
                script.stream.write_all(b"{\"return\": {").unwrap();
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        assert!(matches!(client.execute("migrate"), Err(QmpError::Closed { during }) if during == "migrate"));
        server.join().unwrap();
    }

    #[test]
    fn a_message_without_end_is_cut_off() {
        let (client, server) = serve(
            |script| {
                script.greet();
                script.hear("query-status");
                // The client hangs up on us once it has had enough.
                let chunk = [b' '; READ_BYTES];
                while script.stream.write_all(&chunk).is_ok() {}
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        let error = client.execute("query-status").unwrap_err();
        assert!(matches!(error, QmpError::MessageTooLong { .. }), "{error}");
        assert!(client.unread.len() <= MAX_MESSAGE_BYTES + READ_BYTES);
        assert!(matches!(client.execute("cont"), Err(QmpError::Broken { .. })));
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn what_greets_otherwise_is_not_qmp() {
        for text in ["QEMU 7.2.0 monitor - type 'help'", "{\"hello\": 1}\n", "{nonsense\n", "[]\n"] {
            let (client, server) = serve(move |script| script.stream.write_all(text.as_bytes()).unwrap(), TIMEOUT);
            assert!(matches!(client, Err(QmpError::NotQmp { .. })), "{text}: {client:?}");
            server.join().unwrap();
        }
    }

    #[test]
    fn silence_is_a_timeout_and_on_a_path_it_means_busy() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let silent = QmpClient::negotiate(ours.into(), Duration::ZERO);
        assert!(matches!(silent, Err(QmpError::Timeout { .. })));

        let directory = std::env::temp_dir().join(format!("vmferry-qmp-busy-{}", std::process::id()));
        // Longer than a socket address.
        let deep = directory.join("d".repeat(120));
        std::fs::create_dir_all(&deep).unwrap();
        let missing = QmpClient::connect(&deep.join("qmp"));
        assert!(matches!(missing, Err(QmpError::SocketMissing { .. })), "{missing:?}");
        let short = directory.join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&short).unwrap();
        std::fs::rename(&short, deep.join("qmp")).unwrap();
        let busy = QmpClient::connect_within(&deep.join("qmp"), Duration::from_millis(1));
        assert!(busy.unwrap_err().to_string().contains("QMP is busy"));
        drop(listener);
        let refused = QmpClient::connect(&deep.join("qmp"));
        assert!(matches!(refused, Err(QmpError::Refused { .. })), "{refused:?}");
        std::fs::remove_dir_all(directory).unwrap();
    }

    /// A QEMU that had just been started refused the connection: its socket was bound, and it did not listen yet.
    #[test]
    fn a_server_that_listens_a_moment_later_is_waited_for() {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

        let path = std::env::temp_dir().join(format!("vmferry-qmp-late-{}", std::process::id()));
        let server = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let begun = Instant::now();
        assert_eq!(connect_socket(&path).unwrap_err(), Errno::CONNREFUSED);
        let client = std::thread::spawn({
            let path = path.clone();
            move || QmpClient::connect_within(&path, Duration::from_millis(1))
        });
        while begun.elapsed() < LISTEN_GRACE / 10 {
            std::thread::yield_now();
        }
        listen(&server, 1).unwrap();
        // Nobody greets, but it was not refused.
        assert!(matches!(client.join().unwrap(), Err(QmpError::Busy { .. })));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn events_beyond_the_queue_drop_the_oldest() {
        let (client, server) = serve(
            |script| {
                script.greet();
                let id = script.hear("query-status");
                for number in 0..MAX_QUEUED_EVENTS + 3 {
                    script.say(&format!(r#"{{"event": "E", "data": {number}}}"#));
                }
                script.say(&format!(r#"{{"return": {{}}, "id": "{id}"}}"#));
            },
            TIMEOUT,
        );
        let mut client = client.unwrap();
        client.execute("query-status").unwrap();
        assert_eq!(client.dropped_events(), 3);
        assert_eq!(client.wait_event(TIMEOUT).unwrap().unwrap().data, 3);
        server.join().unwrap();
    }

    #[test]
    fn an_adopted_connection_starts_at_a_message_boundary() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let lines = BufReader::new(theirs.try_clone().unwrap());
            let mut script = Script { stream: theirs, lines };
            script.say(r#"s": "half a reply"}}"#);
            script.say(r#"{"return": {}, "id": "vmferry-of-before"}"#);
            script.say(r#"{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}"#);
            script.answer("query-status", "{}");
            script.answer("cont", "{}");
        });
        let mut client = QmpClient::adopt(ours.into()).unwrap();
        client.execute("cont").unwrap();
        server.join().unwrap();
    }
}
