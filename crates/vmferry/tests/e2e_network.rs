//! A guest on a network: source and target on two ports of one bridge, and a client that talks to the guest while it moves.
//!
//! ```text
//!   namespace HOSTS                                      namespace CLIENT
//!     QEMU of the source ── tap `source` ─┐
//!                                         ├─ bridge ─── lan ───── lan  192.0.2.1
//!     QEMU of the target ── tap `target` ─┘
//!                guest: 192.0.2.10, the same hardware address on both sides
//! ```
//!
//! A bridge sends a frame to the port where it last saw the receiver's hardware address. After a move that is the wrong
//! one until something comes from the new port: the announcement. `vmferry` itself runs outside of both namespaces.

mod support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;
use support::{
    Ferry, LINUX_MEBIBYTES, Machine, PATIENCE, Proxy, Receiver, Recipe, Step, Where, exactly_one_runs, is_root, kind,
    moves_keeping_source, need_rights, tools, unique, until,
};
use vmferry_guest::ECHO_PORT;

/// Silent where nobody talks to it: without IPv6, and without asking some seconds later whether whom it answered is still
/// there.
const GUEST: &str = "ipv6.disable=1 sysctl.net.ipv4.neigh.default.delay_first_probe_time=3600 \
                     vmferry.memory=16MiB vmferry.hot=4MiB vmferry.rate=3000 vmferry.network=192.0.2.10/24";
const GUEST_ADDRESS: &str = "192.0.2.10";
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

const BRIDGE: &str = "bridge";
const SOURCE_PORT: &str = "source";
const TARGET_PORT: &str = "target";

/// How names of namespaces begin; the number of the process that made them follows.
const PREFIX: &str = "vmferry-test-";

/// From one datagram to the next.
const PING_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes that are sent before their echo is waited for: more than is under way at once.
const ROUND_BYTES: usize = 16 << 10;
/// Rounds after a move that show that the connection lives.
const ROUNDS: u64 = 20;

/// The two namespaces; removed when dropped.
struct Lan {
    ip: PathBuf,
    hosts: String,
    client: String,
}

impl Lan {
    /// `Err` says why there can be none here: it needs root, iproute2, and a kernel with bridges and taps.
    fn create() -> Result<Self, String> {
        if !is_root() {
            return Err("network namespaces need root".to_owned());
        }
        let places = ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"].map(PathBuf::from);
        let ip = places.into_iter().find(|path| path.exists()).unwrap_or_else(|| tools().join("iproute2/ip"));
        if !ip.exists() {
            return Err("the program ip of the package iproute2 is missing".to_owned());
        }
        remove_left_over(&ip);
        // From here on what was made is removed, whatever fails.
        let lan = Self { ip, hosts: unique("hosts"), client: unique("client") };
        for namespace in [&lan.hosts, &lan.client] {
            lan.ip(&["netns", "add", namespace])?;
        }
        let (hosts, client) = (lan.hosts.as_str(), lan.client.as_str());
        lan.ip(&["-n", hosts, "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
        lan.ip(&["link", "add", "lan", "netns", hosts, "type", "veth", "peer", "name", "lan", "netns", client])?;
        for port in [SOURCE_PORT, TARGET_PORT] {
            lan.ip(&["-n", hosts, "tuntap", "add", "dev", port, "mode", "tap"])?;
        }
        for port in [SOURCE_PORT, TARGET_PORT, "lan"] {
            lan.ip(&["-n", hosts, "link", "set", port, "master", BRIDGE, "up"])?;
        }
        lan.ip(&["-n", hosts, "link", "set", BRIDGE, "up"])?;
        lan.ip(&["-n", client, "address", "add", "192.0.2.1/24", "dev", "lan"])?;
        lan.ip(&["-n", client, "link", "set", "lan", "up"])?;
        Ok(lan)
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), String> {
        let output = Command::new(&self.ip).args(arguments).stdin(Stdio::null()).output().unwrap();
        if output.status.success() {
            return Ok(());
        }
        Err(format!("ip {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// A guest with its network card at this port of the bridge.
    fn recipe(&self, version: &'static str, port: &str) -> Recipe {
        let tap = format!("tap,id=lan,ifname={port},script=no,downscript=no");
        let [a, b, c, d, e, f] = GUEST_MAC;
        let card = format!("virtio-net-pci,netdev=lan,romfile=,mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let recipe = Recipe::new(version).linux(LINUX_MEBIBYTES, GUEST).extra(&["-netdev", &tap, "-device", &card]);
        let launcher = [&self.ip.display().to_string(), "netns", "exec", &self.hosts];
        Recipe { launcher: launcher.map(str::to_owned).to_vec(), ..recipe }
    }

    fn boot(&self, version: &'static str) -> Machine {
        Machine::boot(self.recipe(version, SOURCE_PORT))
    }

    fn waiting(&self, version: &'static str) -> Machine {
        Machine::start(self.recipe(version, TARGET_PORT).incoming())
    }

    /// Makes a socket as the client; it stays the client's wherever it is used.
    fn as_client<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(Path::new("/run/netns").join(&self.client)).unwrap();
        thread::scope(|scope| {
            let maker = scope.spawn(move || {
                // Of this thread alone, which ends.
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                make()
            });
            maker.join().unwrap()
        })
    }

    /// A file of what the kernel says about its network devices, as the hosts see it.
    fn device_file(&self, path: &str) -> Vec<u8> {
        let path = format!("/sys/class/net/{path}");
        let mut command = Command::new(&self.ip);
        command.args(["netns", "exec", &self.hosts, "cat", &path]).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn device_text(&self, path: &str) -> String {
        String::from_utf8(self.device_file(path)).unwrap().trim().to_owned()
    }

    /// Frames that came out of QEMU at this port.
    fn frames_from(&self, port: &str) -> u64 {
        self.device_text(&format!("{port}/statistics/rx_packets")).parse().unwrap()
    }

    /// At which port the bridge looks for the guest.
    fn place_of_guest(&self) -> Option<&'static str> {
        // `struct __fdb_entry` of the kernel's linux/if_bridge.h: the address, then the port's number.
        const ENTRY_BYTES: usize = 16;
        let entries = self.device_file(&format!("{BRIDGE}/brforward"));
        let number = entries.chunks_exact(ENTRY_BYTES).find(|entry| entry[..6] == GUEST_MAC)?[6];
        [SOURCE_PORT, TARGET_PORT].into_iter().find(|port| {
            let known = self.device_text(&format!("{port}/brport/port_no"));
            u8::from_str_radix(known.trim_start_matches("0x"), 16).unwrap() == number
        })
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for namespace in [&self.hosts, &self.client] {
            // Fails where it was not made. All devices go with their namespaces.
            drop(self.ip(&["netns", "delete", namespace]));
        }
    }
}

/// Removes the namespaces of tests that were killed.
fn remove_left_over(ip: &Path) {
    let output = Command::new(ip).args(["netns", "list"]).stdin(Stdio::null()).output().unwrap();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
            // What cannot be removed is not in the way.
            drop(Command::new(ip).args(["netns", "delete", name]).stdin(Stdio::null()).output());
        }
    }
}

/// The network, or the end of the test where there can be none.
macro_rules! need_lan {
    () => {{
        need_rights!();
        match Lan::create() {
            Ok(lan) => lan,
            Err(why) => {
                println!("skipped: {why}");
                return;
            }
        }
    }};
}

/// A client that sends numbered bytes over one connection and compares what comes back, all the time.
struct Talk {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Talk {
    fn start(lan: &Lan) -> Self {
        let mut stream = lan.as_client(|| TcpStream::connect((GUEST_ADDRESS, ECHO_PORT)).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = thread::spawn(move || {
            let mut echo = vec![0; ROUND_BYTES];
            while !stopped.load(Ordering::Relaxed) {
                let round = counted.load(Ordering::Relaxed);
                let sent: Vec<u8> = (0..ROUND_BYTES as u64 / 8)
                    .flat_map(|word| (round << 32 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
                    .collect();
                stream.write_all(&sent).expect("the connection takes more");
                stream.read_exact(&mut echo).expect("the connection gives back what it took");
                assert!(echo == sent, "round {round} came back changed");
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let talk = Self { stop, rounds, thread };
        talk.goes_on();
        talk
    }

    /// The same connection carries further rounds.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        until("the connection goes on", || {
            assert!(!self.thread.is_finished(), "the connection has ended");
            self.rounds.load(Ordering::Relaxed) >= before + ROUNDS
        });
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.rounds.load(Ordering::Relaxed)
    }
}

/// A client that sends a datagram every 5 ms and notes when the echoes come.
struct Ping {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Gap>,
}

/// What a [`Ping`] has seen.
struct Gap {
    sent: u64,
    answered: u64,
    /// The longest time from one echo to the next.
    longest: Duration,
}

impl Ping {
    fn start(lan: &Lan) -> Self {
        let socket = lan.as_client(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.connect((GUEST_ADDRESS, ECHO_PORT)).unwrap();
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&answered));
        let thread = thread::spawn(move || {
            let mut gap = Gap { sent: 0, answered: 0, longest: Duration::ZERO };
            let (mut last, mut next) = (None::<Instant>, Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                // A guest that stands still may be looked for in vain meanwhile.
                if socket.send(&gap.sent.to_le_bytes()).is_ok() {
                    gap.sent += 1;
                }
                next = (next + PING_INTERVAL).max(Instant::now());
                loop {
                    let left = next.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    socket.set_read_timeout(Some(left)).unwrap();
                    let mut number = [0; 16];
                    match socket.recv(&mut number) {
                        Ok(bytes) => {
                            assert!(bytes == 8 && u64::from_le_bytes(number[..8].try_into().unwrap()) < gap.sent);
                            gap.answered += 1;
                            counted.store(gap.answered, Ordering::Relaxed);
                            let now = Instant::now();
                            gap.longest = gap.longest.max(last.map_or(Duration::ZERO, |last| now - last));
                            last = Some(now);
                        }
                        Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {}
                        // What became of an earlier datagram.
                        Err(error) if error.kind() == ErrorKind::HostUnreachable => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            gap
        });
        let ping = Self { stop, answered, thread };
        ping.goes_on();
        ping
    }

    fn goes_on(&self) {
        let before = self.answered.load(Ordering::Relaxed);
        until("the guest answers", || self.answered.load(Ordering::Relaxed) >= before + ROUNDS);
    }

    fn end(self) -> Gap {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// One attempt fails late, one succeeds, and the client notices nothing but a gap.
fn a_connection_lives_through_the_move(lan: &Lan, version: &'static str) {
    let mut source = lan.boot(version);
    let talk = Talk::start(lan);
    let ping = Ping::start(lan);
    assert_eq!(lan.place_of_guest(), Some(SOURCE_PORT));

    let mut target = lan.waiting(version);
    let receiver = Receiver::start(&target, &[]);
    let proxy = Proxy::at(&receiver.address, Where::Frame(kind::LOAD, 1), Step::Cut);
    Ferry::migrate(&source, &proxy.address, &[]).finish().fails_with(1, &[]);
    receiver.ferry.finish().fails_with(1, &["No guest was received"]);
    exactly_one_runs(&mut source, Some(&mut target));
    assert_eq!(lan.frames_from(TARGET_PORT), 0, "the target spoke for a guest that it has not");
    talk.goes_on();
    ping.goes_on();
    let failed = ping.end();

    let ping = Ping::start(lan);
    let (source, target, sent, _) = moves_keeping_source(source, target, &[]);
    talk.goes_on();
    ping.goes_on();
    assert_eq!(lan.place_of_guest(), Some(TARGET_PORT));
    let (rounds, moved) = (talk.end(), ping.end());
    drop((source, target));

    let milliseconds = |gap: &Gap| gap.longest.as_secs_f64() * 1e3;
    println!(
        "QEMU {version}: {} of {} datagrams came back, the longest gap was {:.1} ms; downtime by the report {:.1} ms; \
         {rounds} rounds over TCP; the attempt that failed: {} of {}, {:.1} ms",
        moved.answered,
        moved.sent,
        milliseconds(&moved),
        sent["downtime_ms"].as_f64().unwrap(),
        failed.answered,
        failed.sent,
        milliseconds(&failed),
    );
    for gap in [&failed, &moved] {
        assert!(gap.answered <= gap.sent && gap.longest < PATIENCE);
    }
}

#[test]
fn a_connection_lives_through_the_move_on_qemu_7_2() {
    let lan = need_lan!();
    a_connection_lives_through_the_move(&lan, "7.2");
}

#[test]
fn a_connection_lives_through_the_move_on_qemu_10_0() {
    let lan = need_lan!();
    a_connection_lives_through_the_move(&lan, "10.0");
}

/// Nobody talks, and the target's QEMU is told not to announce anything by itself: only `vmferry` makes the bridge look
/// for the guest in its new place, and not before the hand-over.
fn the_network_is_told_where_a_silent_guest_is(lan: &Lan, version: &'static str) {
    let source = lan.boot(version);
    Ping::start(lan).end();
    assert_eq!(lan.place_of_guest(), Some(SOURCE_PORT));

    let mut target = lan.waiting(version);
    target.execute_with("migrate-set-parameters", json!({ "announce-rounds": 0 }));
    let receiver = Receiver::start(&target, &[]);
    let (proxy, held) = Proxy::hold(&receiver.address, Where::Frame(kind::HAND_OVER, 1));
    let migrating = Ferry::migrate(&source, &proxy.address, &[]);
    held.wait();
    assert_eq!(target.run_state(), "paused");
    assert_eq!((lan.frames_from(TARGET_PORT), lan.place_of_guest()), (0, Some(SOURCE_PORT)));
    held.go(Step::Forward);
    let sent = migrating.finish();
    assert_eq!(sent.code, Some(0), "{sent}");
    let received = receiver.ferry.finish();
    assert_eq!(received.code, Some(0), "{received}");
    until("the bridge has learned the guest's new place", || lan.place_of_guest() == Some(TARGET_PORT));
    assert!(lan.frames_from(TARGET_PORT) > 0);
    // What is asked for there is answered.
    Ping::start(lan).end();
    target.lives();
}

#[test]
fn the_network_is_told_where_a_silent_guest_is_on_qemu_7_2() {
    let lan = need_lan!();
    the_network_is_told_where_a_silent_guest_is(&lan, "7.2");
}

#[test]
fn the_network_is_told_where_a_silent_guest_is_on_qemu_10_0() {
    let lan = need_lan!();
    the_network_is_told_where_a_silent_guest_is(&lan, "10.0");
}
