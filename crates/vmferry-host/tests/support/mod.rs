//! Real QEMUs for tests: started from the tools that `cargo xtask setup` unpacks, ended and cleaned up on drop.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_host::qemu::{GuestRam, QemuGuest, RamAccess};
use vmferry_host::qmp::QmpError;

/// The versions every test runs with.
pub(crate) const VERSIONS: [&str; 2] = ["7.2", "10.0"];
/// How long anything may take before a test fails. Far more than is needed: the host may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(5);
const MAX_KEPT_LINES: usize = 100_000;
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The directory with QEMU, the kernel and the initramfs: `VMFERRY_TOOLS`, else `target/tools` of the workspace.
pub(crate) fn tools() -> PathBuf {
    let directory = match std::env::var_os("VMFERRY_TOOLS") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools"),
    };
    for needed in ["qemu-7.2/run", "qemu-10.0/run", "kernel/vmlinuz", "initramfs.cpio"] {
        let path = directory.join(needed);
        assert!(path.exists(), "{} is missing: run `cargo xtask setup`", path.display());
    }
    directory
}

/// What is behind guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ram {
    /// A shared file in `/dev/shm`: how it should be.
    Shared,
    /// The same without `share=on`.
    Private,
    /// A shared memfd.
    Memfd,
    /// A shared file on a disk.
    Disk,
    /// Only `-m`.
    Anonymous,
    /// Three blocks: two NUMA nodes, one a nameless file, and a DIMM.
    Numa,
}

/// How to start a QEMU.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) version: &'static str,
    pub(crate) ram: Ram,
    pub(crate) mebibytes: u32,
    pub(crate) incoming: bool,
    /// Kernel parameters: then the Linux test guest is booted, else only the firmware.
    pub(crate) linux: Option<String>,
    pub(crate) extra: Vec<String>,
    /// A program, with arguments, that becomes QEMU in some other place; empty where QEMU is started here.
    pub(crate) launcher: Vec<String>,
}

impl Recipe {
    /// A firmware-only guest with RAM as it should be.
    pub(crate) fn new(version: &'static str) -> Self {
        Self { version, ram: Ram::Shared, mebibytes: 64, incoming: false, linux: None, extra: vec![], launcher: vec![] }
    }

    pub(crate) fn ram(self, ram: Ram) -> Self {
        Self { ram, ..self }
    }

    pub(crate) fn extra(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    pub(crate) fn linux(self, mebibytes: u32, parameters: &str) -> Self {
        Self { mebibytes, linux: Some(parameters.to_owned()), ..self }
    }

    /// The same machine, waiting for a guest to come in.
    pub(crate) fn incoming(self) -> Self {
        Self { incoming: true, ..self }
    }

    pub(crate) fn start(&self) -> Vm {
        Vm::start(self)
    }
}

/// Removes a file or a directory when dropped.
#[derive(Debug)]
pub(crate) struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        if self.0.is_dir() {
            drop(std::fs::remove_dir_all(&self.0));
        } else {
            drop(std::fs::remove_file(&self.0));
        }
    }
}

/// A name that no other test has.
pub(crate) fn unique(what: &str) -> String {
    format!("vmferry-test-{}-{}-{what}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A new empty directory, removed when the guard is dropped.
pub(crate) fn temporary_directory() -> (PathBuf, Remove) {
    let path = std::env::temp_dir().join(unique("dir"));
    std::fs::create_dir(&path).unwrap();
    (path.clone(), Remove(path))
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub(crate) struct Vm {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
    pub(crate) qmp: PathBuf,
    pub(crate) ram_file: PathBuf,
    _files: [Remove; 2],
}

impl Vm {
    fn start(recipe: &Recipe) -> Self {
        let tools = tools();
        let (directory, remove_directory) = temporary_directory();
        let qmp = directory.join("qmp");
        let ram_file = match recipe.ram {
            Ram::Disk => directory.join("ram"),
            _ => Path::new("/dev/shm").join(unique("ram")),
        };
        let qemu = tools.join(format!("qemu-{}/run", recipe.version));
        let mut command = match recipe.launcher.split_first() {
            Some((launcher, arguments)) => {
                let mut command = Command::new(launcher);
                command.args(arguments).arg(qemu);
                command
            }
            None => Command::new(qemu),
        };
        let size = recipe.mebibytes;
        let path = ram_file.display();
        command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-smp", "2"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let backend = match recipe.ram {
            Ram::Shared | Ram::Disk => {
                Some(format!("memory-backend-file,id=ram,size={size}M,mem-path={path},share=on"))
            }
            Ram::Private => Some(format!("memory-backend-file,id=ram,size={size}M,mem-path={path},share=off")),
            Ram::Memfd => Some(format!("memory-backend-memfd,id=ram,size={size}M,share=on")),
            Ram::Anonymous | Ram::Numa => None,
        };
        match backend {
            Some(backend) => {
                command.arg("-m").arg(format!("{size}M"));
                command.arg("-object").arg(backend).args(["-machine", "q35,memory-backend=ram"]);
            }
            None if recipe.ram == Ram::Numa => {
                command.args(["-machine", "q35", "-m"]).arg(format!("{}M,slots=2,maxmem=1G", 2 * size));
                command.arg("-object");
                command.arg(format!("memory-backend-file,id=node0,size={size}M,mem-path={path},share=on"));
                // A directory: QEMU makes a file there and unlinks it.
                for (id, mebibytes) in [("node1", size), ("dimm-ram", 128)] {
                    command.arg("-object");
                    command.arg(format!("memory-backend-file,id={id},size={mebibytes}M,mem-path=/dev/shm,share=on"));
                }
                command.args(["-numa", "node,nodeid=0,memdev=node0,cpus=0"]);
                command.args(["-numa", "node,nodeid=1,memdev=node1,cpus=1"]);
                command.args(["-device", "pc-dimm,id=dimm,memdev=dimm-ram,node=1"]);
                command.args(["-object", "memory-backend-file,id=unused,size=16M,mem-path=/dev/shm,share=on"]);
            }
            None => {
                command.arg("-m").arg(format!("{size}M")).args(["-machine", "q35"]);
            }
        }
        match &recipe.linux {
            Some(parameters) => {
                command.arg("-kernel").arg(tools.join("kernel/vmlinuz"));
                command.arg("-initrd").arg(tools.join("initramfs.cpio"));
                command.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 {parameters}"));
                command.args(["-no-reboot", "-serial", "stdio"]);
            }
            None => {
                // The firmware's log.
                command.args(["-chardev", "stdio,id=log", "-device", "isa-debugcon,iobase=0x402,chardev=log"]);
            }
        }
        if recipe.incoming {
            command.args(["-incoming", "defer"]);
        }
        command.args(&recipe.extra);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        for output in
            [Box::new(child.stdout.take().unwrap()) as Box<dyn Read + Send>, Box::new(child.stderr.take().unwrap())]
        {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut output = BufReader::new(output);
                let mut line = Vec::new();
                while output.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
                    if sender.send(String::from_utf8_lossy(&line).trim().to_owned()).is_err() {
                        return;
                    }
                    line.clear();
                }
            });
        }
        let input = child.stdin.take().unwrap();
        let files = [remove_directory, Remove(ram_file.clone())];
        Self { child, input, lines, seen: vec![], qmp, ram_file, _files: files }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects as soon as QEMU listens.
    pub(crate) fn connect(&mut self) -> QemuGuest {
        let start = Instant::now();
        loop {
            match QemuGuest::connect(&self.qmp, None) {
                Ok(guest) => return guest,
                Err(vmferry_host::qemu::QemuError::Qmp(QmpError::SocketMissing { .. } | QmpError::Refused { .. }))
                    if start.elapsed() < PATIENCE =>
                {
                    if let Some(status) = self.child.try_wait().unwrap() {
                        let output: Vec<String> = self.lines.iter().collect();
                        panic!("QEMU ended with {status}: {output:?}");
                    }
                    std::thread::sleep(POLL);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Waits for a line of the guest (or an error of QEMU) that `matches`, and returns it.
    pub(crate) fn wait_line(&mut self, matches: impl Fn(&str) -> bool) -> String {
        let start = Instant::now();
        while self.seen.len() < MAX_KEPT_LINES {
            match self.lines.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if matches(&line) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        let tail = &self.seen[self.seen.len().saturating_sub(20)..];
        panic!("the guest did not print the line that was waited for; the last were {tail:#?}");
    }

    /// Waits until the firmware runs.
    pub(crate) fn wait_firmware(&mut self) {
        self.wait_line(|line| line.contains("SeaBIOS (version"));
    }

    /// Types a line on the guest's serial port.
    pub(crate) fn type_line(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Waits until the process has ended.
    pub(crate) fn wait_end(&mut self) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "QEMU does not end");
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Reads a stream to its end in the background.
pub(crate) fn collect_stream(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Writes a stream in the background; a reader that goes away is no error here.
pub(crate) fn feed_stream(mut stream: UnixStream, bytes: Vec<u8>) -> JoinHandle<()> {
    std::thread::spawn(move || drop(stream.write_all(&bytes)))
}

/// Copies all RAM of one guest over the other's.
pub(crate) fn copy_ram(source: &mut QemuGuest, target: &mut QemuGuest) {
    let (from, to): (GuestRam, GuestRam) =
        (source.ram(RamAccess::Read).unwrap(), target.ram(RamAccess::ReadWrite).unwrap());
    assert_eq!(from.layout, to.layout);
    let mut chunk = vec![0_u8; 1 << 20];
    for (from, to) in from.blocks.into_iter().zip(to.blocks) {
        let (input, output) = (File::from(from.file), File::from(to.file));
        let mut done = 0;
        while done < from.mapping.bytes {
            let bytes = usize::try_from(from.mapping.bytes - done).unwrap().min(chunk.len());
            input.read_exact_at(&mut chunk[..bytes], from.mapping.file_offset + done).unwrap();
            output.write_all_at(&chunk[..bytes], to.mapping.file_offset + done).unwrap();
            done += bytes as u64;
        }
    }
}
