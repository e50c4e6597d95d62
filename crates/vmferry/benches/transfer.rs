//! One stream of the engine against a plain TCP copy of the same bytes, over loopback, both sides in turn.
//!
//! The engine moves an idle embedded guest whose memory does not compress: it finds written pages, reads, checks for
//! zero, sums, sends, sums again and writes into the target's RAM. The plain copy sends the same number of bytes from
//! one buffer into another that was never touched before, as the target's RAM was not.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use vmferry_core::engine::OutcomeKind;
use vmferry_core::predict::PredictorSpec;
use vmferry_guest::{Parameters, Pattern};
use vmferry_host::{
    Cancel, EmbeddedGuest, EmbeddedSource, EmbeddedTarget, GuestProgram, MigrateOptions, migrate, pages_in, receive,
};

const MEMORY_BYTES: u64 = 1 << 30;
const ROUNDS: usize = 7;

fn main() {
    let mut ratios = Vec::new();
    println!("transfer of an idle guest of {} MiB, one stream, unshaped loopback", MEMORY_BYTES >> 20);
    // Memory that the machine's own host has never backed is slow once, for whoever comes first.
    plain(engine().0);
    for round in 1..=ROUNDS {
        let (bytes, engine) = engine();
        let plain = plain(bytes);
        let rate = |time: Duration| bytes as f64 / 1e9 / time.as_secs_f64();
        let ratio = rate(engine) / rate(plain);
        println!(
            "  round {round}: engine {:.2} GB/s, plain TCP {:.2} GB/s, ratio {ratio:.2}",
            rate(engine),
            rate(plain)
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    println!("  ratio: median {:.2}, from {:.2} to {:.2}", ratios[ROUNDS / 2], ratios[0], ratios[ROUNDS - 1]);
}

/// Bytes sent while pushing, and how long that took.
fn engine() -> (u64, Duration) {
    let program =
        GuestProgram { program: env!("CARGO_BIN_EXE_vmferry").into(), arguments: vec!["embedded-guest".into()] };
    let parameters = Parameters {
        pattern: Pattern::Idle,
        pages: pages_in(MEMORY_BYTES),
        incompressible_percent: 100,
        ..Parameters::default()
    };
    let guest = EmbeddedGuest::start(&program, MEMORY_BYTES, &parameters).expect("a guest");
    let waiting = EmbeddedGuest::start_incoming(&program, MEMORY_BYTES, &parameters).expect("a target");
    let mut source = EmbeddedSource::attach(guest).expect("tracking");
    let mut target = EmbeddedTarget::new(waiting);
    let options = MigrateOptions { predictor: PredictorSpec::None, ..MigrateOptions::default() };
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("loopback");
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            let stream = listener.accept().expect("loopback").0;
            receive(&mut target, stream, Duration::from_secs(10), &Cancel::new().expect("descriptors"))
        });
        migrate(&mut source, stream, &options, &Cancel::new().expect("descriptors"), &mut |_| {}).expect("a migration")
    });
    assert_eq!(report.outcome, OutcomeKind::Completed, "{:?}", report.reason);
    (report.wire.push_bytes, Duration::from_secs_f64(report.phases.push_ms / 1e3))
}

/// How long a plain copy of so many bytes takes.
fn plain(bytes: u64) -> Duration {
    let bytes = bytes as usize;
    let from = vec![0x5A_u8; bytes];
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let mut stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("loopback");
    stream.set_nodelay(true).expect("an option");
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut stream = listener.accept().expect("loopback").0;
            // Zeroed by the allocator from fresh pages, which nobody has touched.
            let mut to = vec![0_u8; bytes];
            let mut filled = 0;
            while filled < bytes {
                let end = bytes.min(filled + (1 << 20));
                filled += stream.read(&mut to[filled..end]).expect("loopback");
            }
            Instant::now()
        });
        let start = Instant::now();
        for chunk in from.chunks(1 << 20) {
            stream.write_all(chunk).expect("loopback");
        }
        receiver.join().expect("the receiver") - start
    })
}
