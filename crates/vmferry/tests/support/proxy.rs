//! A proxy between source and target that reads the frames of the source, and lets anything happen at any of them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use vmferry_core::wire::{HEADER_BYTES, MAX_PAYLOAD_BYTES};

use super::PATIENCE;

/// Message types, as `docs/PROTOCOL.md` has them.
pub(crate) mod kind {
    pub(crate) const PAGES: u8 = 3;
    pub(crate) const PAUSED: u8 = 5;
    pub(crate) const DEVICE_STATE: u8 = 6;
    pub(crate) const LOAD: u8 = 8;
    pub(crate) const HAND_OVER: u8 = 9;
}

/// A place in the source's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    /// Before the n-th frame of this kind, from 1.
    Frame(u8, u32),
    /// In the middle of the n-th frame of this kind, from 1: its first half has passed.
    Within(u8, u32),
    /// Behind so many bytes.
    Byte(u64),
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing.
    Forward,
    /// The connection ends for both sides, exactly at the place.
    Cut,
    /// The connection ends for both sides after this frame has passed.
    CutBehind,
    /// Nothing passes any more, in neither direction, and nobody is told.
    Stall,
    /// A bit of the frame's payload changes.
    FlipBit,
    /// This frame and all further ones pass; what the target answers does not.
    LoseAnswers,
}

/// Listens for one source, and connects it to the target. Its first connection is the one that is read; further ones only
/// pass.
pub(crate) struct Proxy {
    /// Where the source is to connect.
    pub(crate) address: String,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

/// A stream that is held at a place.
pub(crate) struct Held {
    arrived: Receiver<()>,
    go: Sender<Step>,
}

impl Held {
    /// Waits until the source's stream has come to the place; it stays there.
    pub(crate) fn wait(&self) {
        self.arrived.recv_timeout(PATIENCE).expect("the source's stream comes to the place");
    }

    /// Lets this happen.
    pub(crate) fn go(&self, step: Step) {
        self.go.send(step).expect("the proxy waits for it");
    }
}

impl Proxy {
    /// Lets `step` happen at a place.
    pub(crate) fn at(target: &str, place: Where, step: Step) -> Self {
        Self::start(target, place, move || step)
    }

    /// Holds the stream at a place, until the test says how to go on. If the test forgets that, it is cut.
    pub(crate) fn hold(target: &str, place: Where) -> (Self, Held) {
        let (arrival, arrived) = channel();
        let (go, going) = channel();
        let proxy = Self::start(target, place, move || {
            arrival.send(()).map_or(Step::Cut, |()| going.recv().unwrap_or(Step::Cut))
        });
        (proxy, Held { arrived, go })
    }

    fn start(target: &str, place: Where, step: impl FnOnce() -> Step + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = target.to_owned();
        let streams = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&streams);
        std::thread::spawn(move || {
            let mut first = Some((place, step));
            while let Ok((source, _)) = listener.accept() {
                let target = TcpStream::connect(&target).unwrap();
                // A short frame is not to wait for the one before it to be acknowledged.
                for stream in [&source, &target] {
                    stream.set_nodelay(true).unwrap();
                }
                let both = [source.try_clone().unwrap(), target.try_clone().unwrap()];
                kept.lock().unwrap().extend(both);
                let deaf = Arc::new(AtomicBool::new(false));
                let answers = (target.try_clone().unwrap(), source.try_clone().unwrap(), Arc::clone(&deaf));
                std::thread::spawn(move || pass_answers(answers.0, answers.1, &answers.2));
                let here = first.take();
                std::thread::spawn(move || match here {
                    Some((place, step)) => pass_frames(source, target, &deaf, place, step),
                    None => pass_frames(source, target, &deaf, Where::Byte(u64::MAX), || Step::Forward),
                });
            }
        });
        Self { address, streams }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for stream in self.streams.lock().unwrap().iter() {
            // It has ended already, or ends now.
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}

fn pass_answers(mut target: TcpStream, mut source: TcpStream, deaf: &AtomicBool) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = target.read(&mut bytes) {
        if !deaf.load(Ordering::SeqCst) && source.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    if !deaf.load(Ordering::SeqCst) {
        drop(source.shutdown(Shutdown::Both));
    }
}

fn pass_frames(
    mut source: TcpStream,
    mut target: TcpStream,
    deaf: &AtomicBool,
    place: Where,
    step: impl FnOnce() -> Step,
) {
    let mut step = Some(step);
    let (mut passed_bytes, mut seen) = (0, 0);
    let mut frame = Vec::new();
    while read_frame(&mut source, &mut frame) {
        let kind = frame[4];
        let here = match place {
            Where::Frame(wanted, number) | Where::Within(wanted, number) => {
                seen += u32::from(kind == wanted);
                kind == wanted && seen == number
            }
            Where::Byte(byte) => step.is_some() && byte < passed_bytes + frame.len() as u64,
        };
        let before = match place {
            _ if !here => 0,
            Where::Frame(..) => 0,
            Where::Within(..) => frame.len() / 2,
            Where::Byte(byte) => (byte - passed_bytes) as usize,
        };
        if target.write_all(&frame[..before]).is_err() {
            break;
        }
        let step = step.take_if(|_| here).map_or(Step::Forward, |step| step());
        let end = if step == Step::Cut { before } else { frame.len() };
        match step {
            Step::Forward | Step::Cut | Step::CutBehind => {}
            Step::FlipBit => *frame[HEADER_BYTES..].last_mut().expect("a frame with a payload") ^= 0x10,
            Step::LoseAnswers => deaf.store(true, Ordering::SeqCst),
            Step::Stall => {
                deaf.store(true, Ordering::SeqCst);
                // The source's bytes stay unread: its end is seen by nobody, until the proxy is dropped.
                return;
            }
        }
        if target.write_all(&frame[before..end]).is_err() {
            break;
        }
        passed_bytes += end as u64;
        if matches!(step, Step::Cut | Step::CutBehind) {
            drop(source.shutdown(Shutdown::Both));
            break;
        }
    }
    // The end of the source is the end for the target; one who died in the middle is no different.
    drop(target.shutdown(Shutdown::Write));
}

/// Reads the next frame whole; false at the end.
fn read_frame(source: &mut TcpStream, frame: &mut Vec<u8>) -> bool {
    frame.resize(HEADER_BYTES, 0);
    if source.read_exact(frame).is_err() {
        return false;
    }
    let payload = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
    assert!(payload <= MAX_PAYLOAD_BYTES, "the source sends a frame of {payload} bytes");
    frame.resize(HEADER_BYTES + payload, 0);
    source.read_exact(&mut frame[HEADER_BYTES..]).is_ok()
}
