//! A plain TCP copy from one host to the other: what the link carries at best.
//!
//! Both ends are this program, started inside the namespaces with a hidden command.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::network::{Link, Network, Side, TARGET_ADDRESS};

/// Bytes of one write and one read.
const BLOCK_BYTES: usize = 256 << 10;

/// How long the copy takes on a link of a given rate, so that its beginning weighs little.
const COPY_MS: u64 = 1500;
/// Bytes copied where nothing limits the link.
const UNSHAPED_BYTES: u64 = 2 << 30;

/// The share of a link's rate that a plain copy reaches where the machine has time for it.
pub(crate) const SHARE_MIN: f64 = 0.95;

/// Measures what a plain TCP copy reaches.
///
/// # Errors
/// When the copy fails.
pub(crate) fn rate_bits_per_s(network: &Network, link: Link) -> Result<f64> {
    let bytes = link.rate_bits_per_s().map_or(UNSHAPED_BYTES, |rate| rate / 8 * COPY_MS / 1000);
    let program = std::env::current_exe().context("cannot find this program to start it again")?;
    let mut sink = Running(
        network
            .command(Side::Target, &program)
            .arg("copy-sink")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the receiving end of a TCP copy")?,
    );
    let mut said = BufReader::new(sink.0.stdout.take().context("standard output was piped")?);
    let mut address = String::new();
    said.read_line(&mut address).context("the receiving end does not say where it listens")?;
    let status = network
        .command(Side::Source, &program)
        .args(["copy-source", address.trim(), &bytes.to_string()])
        .stdin(Stdio::null())
        .status()
        .context("cannot start the sending end of a TCP copy")?;
    ensure!(status.success(), "the sending end of a TCP copy failed ({status})");
    let mut result = String::new();
    said.read_line(&mut result).context("the receiving end does not say what came")?;
    let mut words = result.split_ascii_whitespace().map(str::parse::<f64>);
    let (Some(Ok(received_bytes)), Some(Ok(seconds))) = (words.next(), words.next()) else {
        anyhow::bail!("the receiving end of a TCP copy said {result:?}");
    };
    Ok(received_bytes * 8.0 / seconds)
}

/// The receiving end: prints where it listens, and then how many bytes came after the first block, in how many seconds.
pub(crate) fn sink() -> Result<()> {
    let listener = TcpListener::bind((TARGET_ADDRESS, 0)).context("cannot listen")?;
    println!("{}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    let mut block = vec![0; BLOCK_BYTES];
    let mut timed: Option<Instant> = None;
    let mut bytes = 0;
    loop {
        let read = stream.read(&mut block)?;
        if read == 0 {
            break;
        }
        match timed {
            None => timed = Some(Instant::now()),
            Some(_) => bytes += read,
        }
    }
    let start = timed.context("nothing came")?;
    println!("{bytes} {}", start.elapsed().as_secs_f64());
    Ok(())
}

/// The sending end.
pub(crate) fn source(address: &str, bytes: u64) -> Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    let block = vec![0x5A; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(BLOCK_BYTES as u64) as usize;
        stream.write_all(&block[..part])?;
        left -= part as u64;
    }
    Ok(())
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
