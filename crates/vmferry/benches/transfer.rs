//! One stream of the engine over loopback: against a plain TCP copy of the same bytes, and against itself with and without
//! compression; the sides in turn.
//!
//! Without a cap the engine moves an idle embedded guest whose memory does not compress: it finds written pages, reads, checks for
//! zero, sums, sends, sums again and writes into the target's RAM. The plain copy sends the same number of bytes from
//! one buffer into another that was never touched before, as the target's RAM was not.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use vmferry_core::engine::{OutcomeKind, Report};
use vmferry_core::predict::PredictorSpec;
use vmferry_guest::{Parameters, Pattern};
use vmferry_host::{
    Cancel, Compress, EmbeddedGuest, EmbeddedSource, EmbeddedTarget, GuestProgram, MigrateOptions, migrate, pages_in,
    receive,
};

const MEMORY_BYTES: u64 = 1 << 30;
const ROUNDS: usize = 7;
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
