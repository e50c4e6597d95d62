//! The network: an address, and an echo over TCP and UDP. See `vmferry_guest::Network`.
#![expect(unsafe_code, reason = "the ioctls that set an address have no safe form in the standard library")]

use std::error::Error;
use std::io::{self, Read as _, Write as _};
use std::mem;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;

use vmferry_guest::{ECHO_PORT, Network};

use super::{Console, end, system};

const INTERFACE: &str = "eth0";
/// The most that is sent back at once.
const ECHO_BYTES_MAX: usize = 64 << 10;

/// Sets the address and starts to send back what comes.
pub(crate) fn start(console: &Console, network: &Network) -> Result<(), Box<dyn Error>> {
    system::load_modules()?;
    system::wait_for(&format!("/sys/class/net/{INTERFACE}"))?;
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))?;
    configure(&udp, network)?;
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))?;
    thread::spawn(move || echo_datagrams(&udp).unwrap_or_else(|error| end(&format!("the echo over UDP: {error}"))));
    thread::spawn(move || {
        for stream in tcp.incoming() {
            match stream {
                // The end of a connection is the client's affair.
                Ok(stream) => drop(thread::spawn(move || drop(echo_stream(stream)))),
                Err(error) => end(&format!("the echo over TCP: {error}")),
            }
        }
    });
    console.say(&format!("network {}/{}", network.address, network.prefix_bits));
    Ok(())
}

fn echo_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut bytes = vec![0; ECHO_BYTES_MAX];
    loop {
        let (count, from) = socket.recv_from(&mut bytes)?;
        // A client that has gone answers with an error, which is not ours.
        drop(socket.send_to(&bytes[..count], from));
    }
}

fn echo_stream(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = vec![0; ECHO_BYTES_MAX];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            count => stream.write_all(&bytes[..count])?,
        }
    }
}

/// Gives the interface its address and switches it on, through any socket.
fn configure(socket: &UdpSocket, network: &Network) -> io::Result<()> {
    for (what, request, address) in [
        ("the address", libc::SIOCSIFADDR, network.address),
        ("the network's mask", libc::SIOCSIFNETMASK, network.mask()),
    ] {
        let mut interface = interface_request();
        interface.ifr_ifru.ifru_addr = socket_address(address);
        control(socket, what, request, &mut interface)?;
    }
    let mut interface = interface_request();
    interface.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    control(socket, "that it is up", libc::SIOCSIFFLAGS, &mut interface)
}

fn control(socket: &UdpSocket, what: &str, request: libc::Ioctl, interface: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the descriptor is open for the whole call, and these requests read one `ifreq`, which is what the pointer is
    // to. Its name ends with a zero byte, for the name is shorter than the array, which was zeroed.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut *interface) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(io::Error::new(error.kind(), format!("cannot set {what} of {INTERFACE}: {error}")))
}

fn interface_request() -> libc::ifreq {
    // SAFETY: all fields, and all members of its union, are numbers, arrays of numbers or pointers, for which zero is a
    // value.
    let mut interface: libc::ifreq = unsafe { mem::zeroed() };
    for (place, byte) in interface.ifr_name.iter_mut().zip(INTERFACE.bytes()) {
        *place = byte.cast_signed();
    }
    interface
}

/// An IPv4 address as the kernel takes it in the place of any.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // The port is first, in two bytes.
    for (place, byte) in data[2..].iter_mut().zip(address.octets()) {
        *place = byte.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}
