//! What the codecs of pages save and how fast they are, on memory of guests.
//!
//! `cargo bench -p vmferry-host --bench codecs -- FILE…` measures the pages of files, such as the RAM of a guest; without
//! files, pages of the test guest. Pieces of 1, 16, 64 and 256 pages, since a codec sees no further than its piece. Deltas
//! are of the test guest's pages after one more write each. Zero pages are left out, as they are where pages are sent.

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use vmferry_guest::{Memory, PAGE_BYTES, Parameters, region_words};
use zstd::bulk::{Compressor, Decompressor};

/// The most of each kind of memory that is measured.
const BYTES_MAX: usize = 64 << 20;
/// Each codec has the whole of it so often, in turn; the fastest counts.
const ROUNDS: usize = 3;

fn main() {
    let files: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    for file in &files {
        let mut content = Vec::new();
        std::fs::File::open(file).and_then(|mut file| file.read_to_end(&mut content)).expect("a file to be read");
        let pages = content.chunks_exact(PAGE_BYTES).filter(|page| page.iter().any(|&byte| byte != 0));
        let content: Vec<u8> = pages.flatten().copied().take(BYTES_MAX).collect();
        measure(file, &content);
    }
    if files.is_empty() {
        for percent in [0, 50, 100] {
            let (before, after) = guest_pages(percent);
            measure(&format!("test guest, {percent} % incompressible"), &after);
            let difference: Vec<u8> = before.iter().zip(&after).map(|(old, new)| old ^ new).collect();
            measure(&format!("deltas of the test guest after a write, {percent} % incompressible"), &difference);
        }
    }
}

/// Pages of the test guest, and the same after one more write to each.
fn guest_pages(incompressible_percent: u8) -> (Vec<u8>, Vec<u8>) {
    let pages = (BYTES_MAX / PAGE_BYTES / 2) as u64;
    let parameters = Parameters { pages, incompressible_percent, ..Parameters::default() };
    let region: Vec<AtomicU64> = (0..region_words(pages)).map(|_| AtomicU64::new(0)).collect();
    let memory = Memory::in_region(&region, &parameters).expect("a region of the right size");
    memory.fill();
    let content = || {
        let words = region.iter().skip(region.len() - BYTES_MAX / 2 / 8);
        words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect::<Vec<u8>>()
    };
    let before = content();
    (0..pages).for_each(|page| memory.write(page));
    (before, content())
}

fn measure(name: &str, content: &[u8]) {
    println!("{name}: {} pages that are not zero", content.len() / PAGE_BYTES);
    println!("  pages  codec    left     encode       decode");
    for pages in [1, 16, 64, 256] {
        for codec in ["lz4", "zstd -1", "zstd 1", "zstd 3"] {
            let mut best = (usize::MAX, Duration::MAX, Duration::MAX);
            for _ in 0..ROUNDS {
                let (bytes, encode, decode) = once(codec, content, pages * PAGE_BYTES);
                best = (bytes, best.1.min(encode), best.2.min(decode));
            }
            let rate = |time: Duration| content.len() as f64 / 1e6 / time.as_secs_f64();
            println!(
                "  {pages:>5}  {codec:<7}  {:>5.1} %  {:>5.0} MB/s  {:>6.0} MB/s",
                100.0 * best.0 as f64 / content.len().max(1) as f64,
                rate(best.1),
                rate(best.2)
            );
        }
    }
}

/// Bytes that are left, and the times that encoding and decoding took.
fn once(codec: &str, content: &[u8], piece_bytes: usize) -> (usize, Duration, Duration) {
    let mut out = vec![0; get_maximum_output_size(piece_bytes).max(zstd::zstd_safe::compress_bound(piece_bytes))];
    let mut back = vec![0; piece_bytes];
    let (mut bytes, mut encode, mut decode) = (0, Duration::ZERO, Duration::ZERO);
    let level = codec.strip_prefix("zstd ").map(|level| level.parse().expect("a level"));
    let mut zstd =
        level.map(|level| (Compressor::new(level).expect("a compressor"), Decompressor::new().expect("one")));
    let mut table = if piece_bytes < usize::from(u16::MAX) { CompressTable::small() } else { CompressTable::large() };
    for piece in content.chunks(piece_bytes) {
        let began = Instant::now();
        let length = match &mut zstd {
            Some((zstd, _)) => zstd.compress_to_buffer(piece, &mut out[..]).expect("enough room"),
            None => compress_into_with_table(piece, &mut out, &mut table).expect("enough room"),
        };
        encode += began.elapsed();
        bytes += length;
        let began = Instant::now();
        let back = &mut back[..piece.len()];
        let found = match &mut zstd {
            Some((_, zstd)) => zstd.decompress_to_buffer(&out[..length], back).expect("a frame"),
            None => decompress_into(&out[..length], back).expect("a block"),
        };
        decode += began.elapsed();
        assert!(found == piece.len() && back == piece, "{codec} gave back something else");
    }
    (bytes, encode, decode)
}
