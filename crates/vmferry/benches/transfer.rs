//! The engine over loopback: against a plain TCP copy of the same bytes by as many connections, and against itself with and
//! without compression; the sides in turn.
//!
//! Without a cap the engine moves an idle embedded guest whose memory does not compress: it finds written pages, reads, checks for
//! zero, sums, sends, sums again and writes into the target's RAM. The plain copy sends the same number of bytes from
//! one buffer into another that was never touched before, as the target's RAM was not; each connection has a thread at
//! both ends and its part of the bytes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use vmferry_core::engine::{OutcomeKind, Report};
use vmferry_core::predict::PredictorSpec;
use vmferry_guest::{Parameters, Pattern};
use vmferry_host::{
    Cancel, Compress, EmbeddedGuest, EmbeddedSource, EmbeddedTarget, GuestProgram, MigrateOptions, default_streams,
    migrate, pages_in, receive,
};

const MEMORY_BYTES: u64 = 4 << 30;
const ROUNDS: usize = 5;
/// Caps in bytes per second, and how much memory is moved under them: some seconds of it.
const CAPS: [(&str, Option<u64>, u64); 3] =
    [("1 Gbit/s", Some(125_000_000), 256 << 20), ("100 Mbit/s", Some(12_500_000), 64 << 20), ("no cap", None, 1 << 30)];
const CAPPED_ROUNDS: usize = 3;

fn main() {
    against_plain();
    let auto = [("off", Compress::Off), ("auto", Compress::Auto)];
    for (cap, bandwidth_bytes_per_s, memory_bytes) in CAPS {
        for percent in [50, 100] {
            println!("{cap}, {} MiB of which {percent} % cannot be compressed", memory_bytes >> 20);
            for round in 1..=CAPPED_ROUNDS {
                for (name, compress) in auto {
                    let options = MigrateOptions {
                        bandwidth_bytes_per_s,
                        compress,
                        predictor: PredictorSpec::None,
                        ..MigrateOptions::default()
                    };
                    let report = migration(memory_bytes, percent, &options);
                    let (push_ms, wire, pages) = (report.phases.push_ms, report.wire, report.pages);
                    println!(
                        "  round {round} {name:>4}: push {push_ms:7.1} ms, {:6.1} MB sent; pages raw {}, lz4 {}, zstd {}; \
                         {:.0} ms of encoding",
                        wire.push_bytes as f64 / 1e6,
                        pages.raw,
                        pages.lz4,
                        pages.zstd,
                        report.compression.encode_ms
                    );
                }
            }
        }
    }
}

fn against_plain() {
    let mut ratios = Vec::new();
    let streams = usize::from(default_streams());
    println!("transfer of an idle guest of {} MiB, {streams} connections, unshaped loopback", MEMORY_BYTES >> 20);
    // Memory that the machine's own host has never backed is slow once, for whoever comes first.
    plain(engine().0, streams);
    for round in 1..=ROUNDS {
        let (bytes, engine) = engine();
        let plain = plain(bytes, streams);
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
    let options = MigrateOptions { predictor: PredictorSpec::None, ..MigrateOptions::default() };
    let report = migration(MEMORY_BYTES, 100, &options);
    (report.wire.push_bytes, Duration::from_secs_f64(report.phases.push_ms / 1e3))
}

/// Moves an idle guest of which so much cannot be compressed.
fn migration(memory_bytes: u64, incompressible_percent: u8, options: &MigrateOptions) -> Report {
    let program =
        GuestProgram { program: env!("CARGO_BIN_EXE_vmferry").into(), arguments: vec!["embedded-guest".into()] };
    let parameters = Parameters {
        pattern: Pattern::Idle,
        pages: pages_in(memory_bytes),
        hot_pages: 1,
        incompressible_percent,
        ..Parameters::default()
    };
    let guest = EmbeddedGuest::start(&program, memory_bytes, &parameters).expect("a guest");
    let waiting = EmbeddedGuest::start_incoming(&program, memory_bytes, &parameters).expect("a target");
    let mut source = EmbeddedSource::attach(guest).expect("tracking");
    let mut target = EmbeddedTarget::new(waiting);
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("loopback");
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            let stream = listener.accept().expect("loopback").0;
            receive(&mut target, stream, Some(&listener), Duration::from_secs(10), &Cancel::new().expect("descriptors"))
        });
        migrate(&mut source, stream, options, &Cancel::new().expect("descriptors"), &mut |_| {}).expect("a migration")
    });
    assert_eq!(report.outcome, OutcomeKind::Completed, "{:?}", report.reason);
    report
}

/// How long a plain copy of so many bytes takes.
fn plain(bytes: u64, streams: usize) -> Duration {
    let bytes = bytes as usize;
    let part = bytes.div_ceil(streams);
    let from = vec![0x5A_u8; bytes];
    // Zeroed by the allocator from fresh pages, which nobody has touched.
    let mut to = vec![0_u8; bytes];
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let connections: Vec<(TcpStream, TcpStream)> = (0..streams)
        .map(|_| {
            let stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("loopback");
            stream.set_nodelay(true).expect("an option");
            (stream, listener.accept().expect("loopback").0)
        })
        .collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for ((from, to), (mut sender, mut receiver)) in from.chunks(part).zip(to.chunks_mut(part)).zip(connections) {
            scope.spawn(move || to.chunks_mut(1 << 20).for_each(|to| receiver.read_exact(to).expect("loopback")));
            scope.spawn(move || from.chunks(1 << 20).for_each(|from| sender.write_all(from).expect("loopback")));
        }
    });
    start.elapsed()
}
