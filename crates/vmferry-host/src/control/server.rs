//! The serving end of the control socket: one thread for all clients, which waits for none of them.
//!
//! A client has one request under way at most: further lines are read when its answer has left. So what is kept for a
//! client is bounded by the longest request and two answers, however slow it is. Lines of a watch are left out where the
//! client has not taken the one before.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::directory::{make_private, run_directory};
use super::protocol::{
    Answer, Event, REQUEST_BYTES_MAX, Refusal, RefusalKind, Request, Role, Status, change, interval, parse,
};
use super::{Command, Controls, Ticket, client};
use crate::cancel::Cancel;

/// The most clients at a time.
const CLIENTS_MAX: usize = 32;
/// The most requests of one client that are looked at before the others have their turn.
const REQUESTS_PER_TURN: usize = 16;
/// How long nobody is accepted after that failed, for instance for want of descriptors.
const DEAF_TIME: Duration = Duration::from_secs(1);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no place for it.
    #[error("there is no directory for control sockets")]
    NoDirectory(#[source] io::Error),
    /// The directory cannot be used.
    #[error("{} cannot be used for control sockets", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket could not be made.
    #[error("cannot make the control socket {}", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No thread or descriptor for it.
    #[error("cannot serve the control socket")]
    Serve(#[source] io::Error),
}

/// Serves the control socket of this process until it is dropped.
#[derive(Debug)]
pub struct ControlServer {
    controls: Controls,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Serves in this user's directory. `guest` says which guest it is about; a request to cancel sets `cancel`.
    ///
    /// # Errors
    /// [`ControlError`]. A migration goes on without.
    pub fn start(role: Role, guest: &str, cancel: &Cancel) -> Result<Self, ControlError> {
        Self::start_in(&run_directory().map_err(ControlError::NoDirectory)?, role, guest, cancel)
    }

    fn start_in(directory: &Path, role: Role, guest: &str, cancel: &Cancel) -> Result<Self, ControlError> {
        let in_directory = |source| ControlError::Directory { path: directory.to_owned(), source };
        make_private(directory).map_err(in_directory)?;
        client::remove_stale(directory).map_err(in_directory)?;
        let pid = std::process::id();
        let path = directory.join(format!("{pid}.sock"));
        let listener =
            listen(directory, &path, pid).map_err(|source| ControlError::Socket { path: path.clone(), source })?;
        let status = Status::new(pid, role, guest.to_owned(), "starting".to_owned());
        let controls = Controls::new(status).map_err(ControlError::Serve)?;
        let serving = Serving {
            listener,
            controls: controls.clone(),
            cancel: cancel.clone(),
            role,
            clients: Vec::new(),
            deaf_until: None,
        };
        let mut server = Self { controls, path, thread: None };
        let thread = std::thread::Builder::new().name("control".to_owned());
        server.thread = Some(thread.spawn(move || serving.run()).map_err(ControlError::Serve)?);
        Ok(server)
    }

    /// What a driver needs of it.
    pub fn controls(&self) -> &Controls {
        &self.controls
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.controls.stop();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        drop(std::fs::remove_file(&self.path));
    }
}

/// A socket that appears under its name when it can be connected to, so that nobody takes it for a stale one.
fn listen(directory: &Path, path: &Path, pid: u32) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "this process serves another migration there"));
    }
    let new = directory.join(format!(".{pid}.new"));
    // Of an earlier process with our number.
    drop(std::fs::remove_file(&new));
    let listener = UnixListener::bind(&new)?;
    let ready = std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600))
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| std::fs::rename(&new, path));
    if let Err(error) = ready {
        drop(std::fs::remove_file(&new));
        return Err(error);
    }
    Ok(listener)
}

struct Serving {
    listener: UnixListener,
    controls: Controls,
    cancel: Cancel,
    role: Role,
    clients: Vec<Peer>,
    /// Nobody can be accepted for now.
    deaf_until: Option<Instant>,
}

/// A client.
struct Peer {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// It waits for the driver's answer.
    awaits: Option<Ticket>,
    watch: Option<Watch>,
    /// It has written all that it will.
    has_ended: bool,
    /// Nothing more is read from it, and it goes when its output has left.
    is_leaving: bool,
    is_gone: bool,
}

struct Watch {
    interval: Duration,
    next: Instant,
}

impl Serving {
    fn run(mut self) {
        while !self.controls.is_stopped() {
            let ready = self.wait();
            self.pass_on_answers();
            for (index, &flags) in ready.clients.iter().enumerate() {
                self.serve(index, flags);
            }
            // Before others are accepted, who need the room.
            self.clients.retain(|peer| !peer.is_gone);
            if ready.listener {
                self.accept();
            }
            self.tell_watches();
            self.clients.retain(|peer| !peer.is_gone);
        }
        // A command may be what ended it: its answer came just before.
        self.pass_on_answers();
        for peer in &mut self.clients {
            if peer.watch.is_some() && peer.output.is_empty() {
                peer.say(&Answer::event(Event::End, self.controls.status()));
            }
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> Ready {
        let now = Instant::now();
        self.deaf_until = self.deaf_until.filter(|&until| until > now);
        let accepts = if self.deaf_until.is_none() { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.listener.as_fd(), accepts),
            PollFd::from_borrowed_fd(self.controls.0.to_server.0.as_fd(), PollFlags::IN),
        ];
        fds.extend(self.clients.iter().map(|peer| PollFd::from_borrowed_fd(peer.fd(), peer.wants())));
        // A client that has not taken a line is not woken up for the next one.
        let watches = self.clients.iter().filter(|peer| peer.output.is_empty()).filter_map(|peer| peer.watch.as_ref());
        let moments = watches.map(|watch| watch.next).chain(self.deaf_until);
        let unread = self.clients.iter().any(Peer::has_line).then_some(now);
        let timeout = moments.chain(unread).map(|at| at.saturating_duration_since(now)).min();
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        if rustix::event::poll(&mut fds, timeout.as_ref()).is_err() {
            // Interrupted, or without memory for it: the next turn tells.
            return Ready { listener: false, clients: vec![PollFlags::empty(); self.clients.len()] };
        }
        Ready { listener: !fds[0].revents().is_empty(), clients: fds[2..].iter().map(PollFd::revents).collect() }
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept on the control socket");
                    self.deaf_until = Some(Instant::now() + DEAF_TIME);
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let mut peer = Peer::new(stream);
            if self.clients.len() >= CLIENTS_MAX {
                let text = format!("{CLIENTS_MAX} clients are connected already");
                peer.say(&Answer::refusal(Refusal::new(RefusalKind::Busy, text)));
            } else {
                self.clients.push(peer);
            }
        }
    }

    fn serve(&mut self, index: usize, ready: PollFlags) {
        let peer = &mut self.clients[index];
        if ready.contains(PollFlags::OUT) {
            peer.flush();
        }
        if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            peer.read();
        }
        for _ in 0..REQUESTS_PER_TURN {
            let Some(line) = self.clients[index].next_line() else { break };
            let answer = match line {
                Ok(line) => self.request(index, &line),
                Err(refusal) => {
                    self.clients[index].is_leaving = true;
                    Some(Answer::refusal(refusal))
                }
            };
            if let Some(answer) = answer {
                self.clients[index].say(&answer);
            }
        }
        let peer = &mut self.clients[index];
        // Whoever closed both directions hears no answer.
        peer.is_gone |= ready.intersects(PollFlags::HUP | PollFlags::ERR) || peer.is_done();
    }

    /// Does what a line asks for; `None`: the driver will answer.
    fn request(&mut self, index: usize, line: &[u8]) -> Option<Answer> {
        let command = match parse(line).and_then(|request| self.command(index, &request)) {
            Ok(Some(command)) => command,
            Ok(None) => return Some(Answer::status(self.controls.status())),
            Err(refusal) => return Some(Answer::refusal(refusal)),
        };
        match self.controls.give(command) {
            Ok(ticket) => {
                self.clients[index].awaits = Some(ticket);
                if command == Command::Cancel {
                    // After the command is there to be answered, so that the driver sees both.
                    self.cancel.cancel();
                }
                None
            }
            // What waits for a migration can be cancelled too.
            Err(Refusal { kind: RefusalKind::NothingRuns, .. })
                if command == Command::Cancel && self.controls.status().outcome.is_none() =>
            {
                self.cancel.cancel();
                Some(Answer::status(self.controls.status()))
            }
            Err(refusal) => Some(Answer::refusal(refusal)),
        }
    }

    /// What a request asks the driver for; `None`: nothing, it asks for the status.
    fn command(&mut self, index: usize, request: &Request) -> Result<Option<Command>, Refusal> {
        let command = match request {
            Request::Show => return Ok(None),
            Request::Watch { interval_ms } => {
                let interval = interval(*interval_ms)?;
                self.clients[index].watch = Some(Watch { interval, next: Instant::now() });
                return Ok(None);
            }
            Request::Cancel => return Ok(Some(Command::Cancel)),
            Request::Set(set) => Command::Set(change(set)?),
            Request::Pause => Command::Hold,
            Request::Continue => Command::Continue,
        };
        match self.role {
            Role::Source => Ok(Some(command)),
            Role::Target => {
                let text = "the receiving side can be shown and cancelled; everything else is up to the source";
                Err(Refusal::new(RefusalKind::Unsupported, text))
            }
        }
    }

    /// Tells clients what the driver has answered.
    fn pass_on_answers(&mut self) {
        for (ticket, result) in self.controls.take_answers() {
            // Whoever asked may have gone.
            if let Some(peer) = self.clients.iter_mut().find(|peer| peer.awaits == Some(ticket)) {
                peer.awaits = None;
                peer.say(&match result {
                    Ok(()) => Answer::status(self.controls.status()),
                    Err(refusal) => Answer::refusal(refusal),
                });
            }
        }
    }

    fn tell_watches(&mut self) {
        let now = Instant::now();
        for peer in self.clients.iter_mut().filter(|peer| peer.output.is_empty() && !peer.is_gone) {
            let Some(watch) = &mut peer.watch else { continue };
            let status = self.controls.status();
            if status.outcome.is_some() {
                (peer.watch, peer.is_leaving) = (None, true);
                peer.say(&Answer::event(Event::End, status));
                peer.is_gone |= peer.is_done();
            } else if now >= watch.next {
                watch.next = now + watch.interval;
                peer.say(&Answer::event(Event::Progress, status));
            }
        }
    }
}

struct Ready {
    listener: bool,
    /// One for each client.
    clients: Vec<PollFlags>,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            awaits: None,
            watch: None,
            has_ended: false,
            is_leaving: false,
            is_gone: false,
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// What it is waited for. Its end is told in any case.
    fn wants(&self) -> PollFlags {
        if !self.output.is_empty() {
            PollFlags::OUT
        } else if self.awaits.is_none() && !self.has_ended && !self.is_leaving {
            PollFlags::IN
        } else {
            PollFlags::empty()
        }
    }

    /// Whether nothing more will happen with it.
    fn is_done(&self) -> bool {
        let speaks = self.awaits.is_some() || self.watch.is_some() || self.input.contains(&b'\n');
        self.output.is_empty() && (self.is_leaving || (self.has_ended && !speaks))
    }

    /// Reads what there is, up to the longest request.
    fn read(&mut self) {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        while !self.has_ended && !self.is_leaving && self.input.len() <= REQUEST_BYTES_MAX {
            match self.stream.read(&mut bytes) {
                Ok(0) => self.has_ended = true,
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.is_gone = true;
                    return;
                }
            }
        }
    }

    /// Whether there is a line whose turn has come, or what is too long for one.
    fn has_line(&self) -> bool {
        let listens = self.awaits.is_none() && self.output.is_empty() && !self.is_leaving && !self.is_gone;
        listens && (self.input.len() > REQUEST_BYTES_MAX || self.input.contains(&b'\n'))
    }

    /// The next line whose turn has come. One that is too long ends the conversation: where the next one begins would have
    /// to be searched for in what an erring client sends.
    fn next_line(&mut self) -> Option<Result<Vec<u8>, Refusal>> {
        if !self.has_line() {
            return None;
        }
        let end = self.input.iter().position(|&byte| byte == b'\n');
        if end.unwrap_or(self.input.len()) > REQUEST_BYTES_MAX {
            let text = format!("a request has at most {REQUEST_BYTES_MAX} bytes");
            return Some(Err(Refusal::new(RefusalKind::BadRequest, text)));
        }
        let mut line: Vec<u8> = self.input.drain(..=end?).collect();
        line.pop();
        Some(Ok(line))
    }

    fn say(&mut self, answer: &Answer) {
        if let Err(error) = serde_json::to_writer(&mut self.output, answer) {
            tracing::warn!(%error, "an answer on the control socket cannot be written as JSON");
            self.is_gone = true;
            return;
        }
        self.output.push(b'\n');
        self.flush();
    }

    fn flush(&mut self) {
        while !self.output.is_empty() && !self.is_gone {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.is_gone = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::Shutdown;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::control::protocol::Pages;
    use crate::control::{Change, Client, ClientError, SetRequest};

    /// A server in a directory of its own, with a driver that the test plays.
    struct Bench {
        server: Option<ControlServer>,
        cancel: Cancel,
        directory: PathBuf,
    }

    impl Bench {
        fn new(role: Role) -> Self {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let directory = std::env::temp_dir().join(format!("vmferry-control-{}-{number}", std::process::id()));
            drop(std::fs::remove_dir_all(&directory));
            let cancel = Cancel::new().unwrap();
            let server = ControlServer::start_in(&directory, role, "test", &cancel).unwrap();
            Self { server: Some(server), cancel, directory }
        }

        fn server(&self) -> &ControlServer {
            self.server.as_ref().unwrap()
        }

        fn connect(&self) -> BufReader<UnixStream> {
            let stream = UnixStream::connect(self.server().path()).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            BufReader::new(stream)
        }

        /// Plays a driver that answers commands with these results, and returns the commands.
        fn drive(&self, results: Vec<Result<(), Refusal>>) -> Vec<Command> {
            let controls = self.server().controls();
            let mut commands = Vec::new();
            let mut results = results.into_iter();
            while results.len() > 0 {
                crate::cancel::wait(&[(controls.waker(), PollFlags::IN)], Some(Duration::from_secs(60))).unwrap();
                for (ticket, command) in controls.take_commands() {
                    commands.push(command);
                    controls.answer(ticket, results.next().unwrap());
                }
            }
            commands
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            drop(self.server.take());
            drop(std::fs::remove_dir_all(&self.directory));
        }
    }

    fn say(stream: &mut BufReader<UnixStream>, text: &[u8]) {
        stream.get_mut().write_all(text).unwrap();
    }

    fn hear(stream: &mut BufReader<UnixStream>) -> Answer {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    fn kind(answer: &Answer) -> Option<RefusalKind> {
        assert_eq!(answer.ok, answer.error.is_none());
        answer.error.as_ref().map(|error| error.kind)
    }

    #[test]
    fn it_is_ours_alone_and_goes_with_the_server() {
        let mut bench = Bench::new(Role::Source);
        let path = bench.server().path().to_owned();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&bench.directory), mode(&path)), (0o700, 0o600));
        let names = || std::fs::read_dir(&bench.directory).unwrap().count();
        assert_eq!(names(), 1, "no other name is left");
        let taken = ControlServer::start_in(&bench.directory, Role::Source, "second", &bench.cancel);
        assert!(matches!(taken, Err(ControlError::Socket { .. })), "one serves there already");
        drop(bench.server.take());
        assert_eq!(names(), 0);
    }

    #[test]
    fn a_directory_that_others_can_enter_is_not_used() {
        let bench = Bench::new(Role::Source);
        let open = bench.directory.join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o755)).unwrap();
        let refused = ControlServer::start_in(&open, Role::Source, "test", &bench.cancel);
        assert!(matches!(refused, Err(ControlError::Directory { .. })), "{refused:?}");
        let refused = ControlServer::start_in(Path::new("/proc/none"), Role::Source, "test", &bench.cancel);
        assert!(matches!(refused, Err(ControlError::Directory { .. })), "{refused:?}");
    }

    #[test]
    fn stale_sockets_are_removed_and_live_ones_are_not() {
        let mut bench = Bench::new(Role::Source);
        let stale = bench.directory.join("4194305.sock");
        drop(UnixListener::bind(&stale).unwrap());
        let other = bench.directory.join("notes.txt");
        std::fs::write(&other, "").unwrap();
        client::remove_stale(&bench.directory).unwrap();
        assert!(!stale.exists() && other.exists() && bench.server().path().exists());

        // Of a process that had our number.
        let path = bench.server().path().to_owned();
        drop(bench.server.take());
        drop(UnixListener::bind(&path).unwrap());
        bench.server = Some(ControlServer::start_in(&bench.directory, Role::Source, "test", &bench.cancel).unwrap());
        assert_eq!(Client::connect(&path).unwrap().ask(&Request::Show).unwrap().guest, "test");
    }

    #[test]
    fn requests_are_carried_out_by_the_driver_and_answered_in_order() {
        let bench = Bench::new(Role::Source);
        let controls = bench.server().controls();
        let mut client = bench.connect();
        say(&mut client, b"{\"request\":\"pause\"}\n");
        assert_eq!(kind(&hear(&mut client)), Some(RefusalKind::NothingRuns));
        controls.begin();
        controls.publish(|status| status.pages = Some(Pages { total: 9, pending: 5, held: 1 }));
        // Lines that come together, and in pieces.
        say(&mut client, b"{\"request\":\"set\",\"downtime_limit_ms\":50}\n{\"request\":\"pause\"}\n{\"request\":\"sh");
        say(&mut client, b"ow\"}\n");
        let refusal = Refusal::new(RefusalKind::TooLate, "too late");
        let commands = bench.drive(vec![Ok(()), Err(refusal.clone())]);
        let change = Change { downtime_limit: Some(Duration::from_millis(50)), ..Change::default() };
        assert_eq!(commands, [Command::Set(change), Command::Hold]);
        assert_eq!(hear(&mut client).status.unwrap().pages.unwrap().pending, 5);
        assert_eq!(hear(&mut client).error, Some(refusal));
        assert_eq!(kind(&hear(&mut client)), None);

        let mut ours = Client::connect(bench.server().path()).unwrap();
        let bad = Request::Set(SetRequest { downtime_limit_ms: Some(-1.0), ..SetRequest::default() });
        let refused = ours.ask(&bad);
        assert!(matches!(refused, Err(ClientError::Refused { refusal }) if refusal.kind == RefusalKind::BadValue));
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| ours.ask(&Request::Continue).unwrap());
            assert_eq!(bench.drive(vec![Ok(())]), [Command::Continue]);
            assert_eq!(asking.join().unwrap().pid, std::process::id());
        });
    }

    #[test]
    fn more_lines_at_once_than_a_turn_serves_are_all_answered() {
        let bench = Bench::new(Role::Source);
        let mut client = bench.connect();
        let count = 3 * REQUESTS_PER_TURN;
        say(&mut client, "{\"request\":\"show\"}\n".repeat(count).as_bytes());
        (0..count).for_each(|_| assert!(hear(&mut client).ok));
    }

    #[test]
    fn cancelling_wakes_the_driver_at_once_and_needs_none() {
        let bench = Bench::new(Role::Target);
        let mut client = bench.connect();
        say(&mut client, b"{\"request\":\"cancel\"}\n");
        assert!(hear(&mut client).ok && bench.cancel.is_cancelled(), "what waits for a source is cancelled too");
        bench.cancel.reset();
        bench.server().controls().begin();
        say(&mut client, b"{\"request\":\"cancel\"}\n");
        assert_eq!(bench.drive(vec![Ok(())]), [Command::Cancel]);
        assert!(hear(&mut client).ok && bench.cancel.is_cancelled());
        say(&mut client, b"{\"request\":\"pause\"}\n");
        assert_eq!(kind(&hear(&mut client)), Some(RefusalKind::Unsupported));
        bench.server().controls().end(Some("cancelled"));
        bench.cancel.reset();
        say(&mut client, b"{\"request\":\"cancel\"}\n");
        assert_eq!(kind(&hear(&mut client)), Some(RefusalKind::NothingRuns), "it has ended");
        assert!(!bench.cancel.is_cancelled());
    }

    #[test]
    fn the_answer_to_the_command_that_ends_the_process_arrives() {
        for _ in 0..200 {
            let mut bench = Bench::new(Role::Source);
            let mut client = bench.connect();
            bench.server().controls().begin();
            say(&mut client, b"{\"request\":\"cancel\"}\n");
            assert_eq!(bench.drive(vec![Ok(())]), [Command::Cancel]);
            bench.server().controls().end(Some("cancelled"));
            bench.server = None;
            assert!(hear(&mut client).ok);
        }
    }

    #[test]
    fn garbage_is_answered_and_what_is_endless_is_not_kept() {
        let bench = Bench::new(Role::Source);
        let mut client = bench.connect();
        say(&mut client, b"\n\0\xff\xfe\n{}\nGET / HTTP/1.1\r\n{\"request\":\"show\"}\n");
        for _ in 0..4 {
            assert_eq!(kind(&hear(&mut client)), Some(RefusalKind::BadRequest));
        }
        assert!(hear(&mut client).ok, "the next line counts again");
        // Not all of it is read, so that writing may fail.
        drop(client.get_mut().write_all(&vec![b'x'; 10 * REQUEST_BYTES_MAX]));
        assert_eq!(kind(&hear(&mut client)), Some(RefusalKind::BadRequest));
        let mut rest = Vec::new();
        // A reset where bytes of ours lay unread.
        drop(client.read_to_end(&mut rest));
        assert!(rest.is_empty());
        let longest = format!("{{\"request\":\"show\"{}}}\n", " ".repeat(REQUEST_BYTES_MAX - 18));
        let mut client = bench.connect();
        say(&mut client, longest.as_bytes());
        assert!(hear(&mut client).ok, "{} bytes", longest.len());
    }

    #[test]
    fn a_client_that_says_all_and_then_listens_is_answered() {
        let bench = Bench::new(Role::Source);
        let mut client = bench.connect();
        say(&mut client, b"{\"request\":\"show\"}\n{\"request\":\"show\"}\n{\"request\"");
        client.get_ref().shutdown(Shutdown::Write).unwrap();
        let mut lines = String::new();
        client.read_to_string(&mut lines).unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
    }

    #[test]
    fn a_watch_tells_until_the_end() {
        let bench = Bench::new(Role::Source);
        let controls = bench.server().controls();
        controls.begin();
        let mut client = bench.connect();
        say(&mut client, b"{\"request\":\"watch\",\"interval_ms\":10}\n");
        assert_eq!(kind(&hear(&mut client)), Some(RefusalKind::BadValue));
        say(&mut client, b"{\"request\":\"watch\",\"interval_ms\":100}\n");
        assert_eq!(hear(&mut client).event, None, "the answer");
        for _ in 0..3 {
            assert_eq!(hear(&mut client).event, Some(Event::Progress));
        }
        controls.end(Some("completed"));
        let end =
            std::iter::from_fn(|| Some(hear(&mut client))).find(|answer| answer.event == Some(Event::End)).unwrap();
        assert_eq!(end.status.unwrap().outcome.as_deref(), Some("completed"));
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "closed");
    }

    #[test]
    fn a_watch_ends_with_the_process() {
        let mut bench = Bench::new(Role::Target);
        let mut client = bench.connect();
        say(&mut client, b"{\"request\":\"watch\",\"interval_ms\":60000}\n");
        assert!(hear(&mut client).ok);
        assert_eq!(hear(&mut client).event, Some(Event::Progress));
        drop(bench.server.take());
        assert_eq!(hear(&mut client).event, Some(Event::End));
    }

    /// Clients that take nothing, and more than can be served: others are answered all the same, and the server ends.
    #[test]
    fn clients_that_do_not_listen_disturb_nobody() {
        let mut bench = Bench::new(Role::Source);
        let mut deaf = bench.connect();
        deaf.get_ref().set_nonblocking(true).unwrap();
        let flood = "{\"request\":\"show\"}\n".repeat(1000);
        // Until neither its requests nor our answers fit anywhere.
        let mut stuck = 0;
        while stuck < 3 {
            match deaf.get_mut().write(flood.as_bytes()) {
                Ok(written) => stuck = if written > 0 { 0 } else { 3 },
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    stuck += 1;
                    // The server's turn: another client is served in between.
                    let mut other = bench.connect();
                    say(&mut other, b"{\"request\":\"show\"}\n");
                    assert!(hear(&mut other).ok);
                }
            }
        }
        let mut many: Vec<_> = (1..CLIENTS_MAX).map(|_| bench.connect()).collect();
        say(many.last_mut().unwrap(), b"{\"request\":\"show\"}\n");
        assert!(hear(many.last_mut().unwrap()).ok);
        assert_eq!(kind(&hear(&mut bench.connect())), Some(RefusalKind::Busy));
        drop(many.pop());
        let again = std::iter::from_fn(|| {
            let mut client = bench.connect();
            drop(client.get_mut().write_all(b"{\"request\":\"show\"}\n"));
            let mut line = String::new();
            drop(client.read_line(&mut line));
            Some(line)
        });
        let mut again = again.take(10_000);
        assert!(again.any(|line| line.contains("\"ok\":true")), "there is room when one has gone");
        drop(bench.server.take());
    }
}
