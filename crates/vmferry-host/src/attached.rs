//! A stock QEMU as the guest of a migration: attached to from outside, left as it was found.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use vmferry_core::engine::AddressSpacesReport;
use vmferry_core::pages::{Owners, PageRun, WholeGuest};
use vmferry_core::plan::FixedCosts;
use vmferry_core::wire::MAX_DEVICE_STATE_BYTES;

use crate::direct_reads::DirectReads;
use crate::guard::{Guard, GuardProgram};
use crate::link::LinkError;
use crate::memory::GuestMemory;
use crate::qemu::{Facts, Finding, Inspection, QemuGuest, RamAccess, RamFacts, Settings, Severity};
use crate::spaces::Ownership;
use crate::stop_time::{StopTime, Turns};
use crate::throttle::{Throttle, ThrottleError, ThrottleWay};
use crate::track::{Region, ScanStats, Tracker};
use crate::vmm::{Machine, STEP_TIMEOUT, SourceVmm, TargetVmm, VmmError};

/// How long QEMU is waited for to find out how fast it answers.
const SLOW_ANSWER: Duration = Duration::from_millis(20);
/// What QEMU's own stream usually holds: device state and ROMs.
const DEVICE_STATE_BYTES: u64 = 400_000;
/// Bytes of QEMU's stream read at once.
const RELAY_BYTES: usize = 256 * 1024;
/// Pieces of QEMU's stream that wait to be sent.
const RELAY_PIECES: usize = 16;

/// A running QEMU guest as the source.
///
/// Until the pause QEMU knows nothing of the migration. Its settings are put back, its guest goes on, and the write
/// tracking ends when this is dropped, unless the guest was handed over.
#[derive(Debug)]
pub struct QemuSource {
    guest: QemuGuest,
    memory: GuestMemory,
    tracker: Tracker,
    ownership: Option<Ownership>,
    stop_time: StopTime,
    /// Where disks are read past the page tables.
    direct_reads: Option<DirectReads>,
    settings: Settings,
    guard: Option<Guard>,
    throttle: Option<Throttle>,
    throttle_way: ThrottleWay,
    stream: Option<Receiver<std::io::Result<Vec<u8>>>>,
    /// QEMU was told of a migration, and nobody took it back yet.
    touched: bool,
}

impl QemuSource {
    /// Attaches to the QEMU behind a QMP socket and begins to track the guest's writes.
    ///
    /// # Errors
    /// [`VmmError`]; QEMU and guest are as before.
    pub fn attach(qmp: &Path, pid: Option<u32>, guard: Option<&GuardProgram>) -> Result<Self, VmmError> {
        let mut guest = QemuGuest::connect(qmp, pid)?;
        let tracking = tracking_finding(guest.pid());
        let found = guest.ram_facts()?;
        let ram = match guest.open_ram(&found, RamAccess::Read) {
            Ok(ram) if tracking.severity != Severity::Unfit => ram,
            other => {
                // With all reasons.
                refuse_unfit(&mut guest, &found, tracking.clone())?;
                other?
            }
        };
        let regions = ram.blocks.iter().enumerate();
        let regions = regions
            .map(|(index, block)| Region { pages: ram.layout.block_pages(index), address: block.mapping.address });
        let (pid, regions) = (guest.pid(), regions.collect());
        let (tracker, asked) = thread::scope(|scope| {
            // Arming takes tens of microseconds for each MiB. Meanwhile QEMU says what else there is to know, also whether the
            // guest can be moved at all; if not, the tracking ends with this.
            let tracker = scope.spawn(move || Tracker::attach(pid, regions));
            let asked = (|| {
                let facts = refuse_unfit(&mut guest, &found, tracking)?;
                let memory = GuestMemory::from_qemu(ram, RamAccess::Read)?;
                let settings = guest.source().save_settings_beside(&facts)?;
                Ok::<_, VmmError>((memory, facts.disks_are_read_directly, settings))
            })();
            (tracker.join().unwrap_or_else(|panic| resume_unwind(panic)), asked)
        });
        let (memory, reads_directly, settings) = asked?;
        let tracker = tracker?;
        let direct_reads = reads_directly.then(|| DirectReads::new(memory.layout().total_pages()));
        if direct_reads.is_some() {
            tracing::info!("disks are read straight into guest RAM: their requests are waited for again and again");
            // What had begun before the tracking is marked by nothing.
            guest.source().wait_for_requests()?;
        }
        let guard = match guard {
            Some(program) => {
                let host = |what| move |source| VmmError::Host { what, source };
                let monitor = guest.qmp().try_clone_fd().map_err(host("copy the monitor's descriptor"))?;
                Some(Guard::start(program, &monitor, &settings).map_err(host("start the guard process"))?)
            }
            None => None,
        };
        Ok(Self {
            guest,
            memory,
            tracker,
            ownership: None,
            stop_time: StopTime::default(),
            direct_reads,
            settings,
            guard,
            throttle: None,
            throttle_way: ThrottleWay::default(),
            stream: None,
            touched: false,
        })
    }

    /// The QEMU.
    pub fn guest(&mut self) -> &mut QemuGuest {
        &mut self.guest
    }

    /// How the guest may be slowed, if it is to be.
    pub fn set_throttle_way(&mut self, way: ThrottleWay) {
        self.throttle_way = way;
    }

    fn slow_down(&mut self, share: f64) -> Result<(), VmmError> {
        if let Some(throttle) = &mut self.throttle {
            return Ok(throttle.set(share)?);
        }
        let (pid, tids) = (self.guest.pid(), self.guest.vcpu_threads()?);
        if tids.is_empty() {
            return Err(ThrottleError::NoThreads { pid }.into());
        }
        let guard = self.guard.as_mut();
        Ok(Throttle::begin(&mut self.throttle, (pid, &tids), share, self.throttle_way, guard)?)
    }

    fn give_time_back(&mut self) -> Result<(), ThrottleError> {
        let Some(throttle) = &mut self.throttle else { return Ok(()) };
        throttle.lift()?;
        self.throttle = None;
        if let Some(guard) = &mut self.guard {
            guard.unthrottled();
        }
        Ok(())
    }

    /// Ends the QEMU, whose guest runs elsewhere now.
    ///
    /// # Errors
    /// [`VmmError`].
    pub fn quit(&mut self) -> Result<(), VmmError> {
        Ok(self.guest.quit(STEP_TIMEOUT)?)
    }

    fn take_back(&mut self) -> Result<(), VmmError> {
        // QEMU may be blocked on a full socket: no longer reading would keep it there, closing ends that.
        self.stream = None;
        let was_running = self.settings.was_running;
        self.guest.source().cancel_and_resume(was_running, STEP_TIMEOUT)?;
        self.guest.source().restore_settings(&self.settings)?;
        self.touched = false;
        Ok(())
    }
}

/// Everything that decides whether a QEMU guest can be moved: QEMU's own facts, and whether its writes can be tracked.
/// Changes nothing.
///
/// # Errors
/// [`VmmError`], where the guest cannot even be looked at.
pub fn inspect(guest: &mut QemuGuest) -> Result<Inspection, VmmError> {
    let (tracking, ram) = (tracking_finding(guest.pid()), guest.ram_facts()?);
    inspect_beside(guest, &ram, tracking)
}

/// The same, with what was found of the process.
fn inspect_beside(guest: &mut QemuGuest, ram: &RamFacts, tracking: Finding) -> Result<Inspection, VmmError> {
    let mut inspection = Inspection::new(guest.facts(ram)?);
    inspection.push(tracking);
    Ok(inspection)
}

/// Whether a process's writes can be tracked.
fn tracking_finding(pid: u32) -> Finding {
    match crate::track::check(pid) {
        Ok(()) => Finding::ok("tracking", "the guest's writes can be tracked"),
        Err(error) => Finding::unfit(
            "tracking",
            "the guest's writes cannot be tracked",
            crate::vmm::describe(&error),
            "as said; Linux 6.7 or later and root or CAP_SYS_PTRACE are needed",
        ),
    }
}

/// Refuses a guest that inspection finds unfit, with all reasons. What is found of its process is known already.
fn refuse_unfit(guest: &mut QemuGuest, ram: &RamFacts, tracking: Finding) -> Result<Facts, VmmError> {
    let inspection = inspect_beside(guest, ram, tracking)?;
    if inspection.can_be_moved() {
        return Ok(inspection.facts);
    }
    let unfit = inspection.findings.iter().filter(|finding| finding.severity == Severity::Unfit);
    let reasons: Vec<String> =
        unfit.map(|finding| format!("{}; {}; {}", finding.what, finding.why, finding.change)).collect();
    Err(VmmError::Unfit { reasons: reasons.join(" | ") })
}

impl SourceVmm for QemuSource {
    fn machine(&self) -> Machine {
        Machine { kind: self.guest.machine().to_owned(), vcpus: self.guest.vcpus() }
    }

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn assumed_costs(&self) -> FixedCosts {
        FixedCosts { time: self.stop_time.estimate(), device_state_bytes: DEVICE_STATE_BYTES }
    }

    fn fixed_costs(&mut self) -> FixedCosts {
        for _ in 0..self.stop_time.questions(Instant::now()) {
            let asked_at = Instant::now();
            // What matters is the time. A QEMU that is late is waited for no longer, and one that has ended is found out by
            // those who need its answer.
            drop(self.guest.qmp().execute_within("query-status", serde_json::Value::Null, SLOW_ANSWER));
            self.stop_time.note(asked_at, asked_at.elapsed(), Turns::of_this_thread());
        }
        self.assumed_costs()
    }

    fn scan(&mut self, relaxed: bool, written: &mut Vec<PageRun>) -> Result<ScanStats, VmmError> {
        let from = written.len();
        let stats = if relaxed { self.tracker.scan_epoch(written) } else { self.tracker.scan(written) }?;
        if let Some(reads) = &mut self.direct_reads {
            if !self.touched {
                let start = Instant::now();
                if !reads.may_wait(start) {
                    reads.doubt(&written[from..]);
                    return Ok(stats);
                }
                self.guest.source().wait_for_requests()?;
                reads.waited(Instant::now(), start.elapsed());
            }
            reads.settle(written, from);
        }
        Ok(stats)
    }

    fn scan_run(&mut self, run: PageRun, written: &mut Vec<PageRun>) -> Result<ScanStats, VmmError> {
        let from = written.len();
        let stats = self.tracker.scan_run(run, written)?;
        // The pages are read right after this. Of a stopped guest there are no requests.
        if let Some(reads) = self.direct_reads.as_mut().filter(|_| !self.touched) {
            reads.doubt(&written[from..]);
        }
        Ok(stats)
    }

    fn tell_owners_apart(&mut self) {
        self.ownership = Some(Ownership::attach(self.guest.qmp(), &self.memory));
    }

    fn refresh_owners(&mut self, allowance: Duration) -> bool {
        let Some(ownership) = &mut self.ownership else { return false };
        ownership.refresh(self.guest.qmp(), &self.memory, allowance)
    }

    fn owners(&self) -> &dyn Owners {
        self.ownership.as_ref().map_or(&WholeGuest, Ownership::owners)
    }

    fn accessed(&self) -> Vec<PageRun> {
        self.ownership.as_ref().map_or_else(Vec::new, Ownership::accessed)
    }

    fn owners_report(&self) -> Option<AddressSpacesReport> {
        self.ownership.as_ref().map(Ownership::report)
    }

    fn pause(&mut self) -> Result<Instant, VmmError> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|source| VmmError::Host { what: "make a socket pair for QEMU's device state", source })?;
        self.touched = true;
        let (mean_s, deviation_s) = self.stop_time.answer_s();
        let stretch = self.stop_time.stretch();
        tracing::debug!(mean_s, deviation_s, stretch, "how fast QEMU answered and the host worked before the pause");
        let mut source = self.guest.source();
        source.configure()?;
        source.start_migration(theirs.as_fd())?;
        drop(theirs);
        // QEMU sends its ROMs before it pauses, more than a socket holds: somebody has to read from now on.
        self.stream = Some(read_in_background(ours));
        let paused = self.guest.source().wait_pre_switchover(STEP_TIMEOUT)?;
        if let Some(throttle) = &mut self.throttle {
            throttle.guest_stands_still();
        }
        Ok(paused.stopped_at.unwrap_or(paused.seen_at))
    }

    fn save_device_state(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<(), LinkError>) -> Result<(), VmmError> {
        self.guest.source().continue_switchover()?;
        let stream = self.stream.take().expect("paused before saving");
        let mut total = 0;
        loop {
            match stream.recv_timeout(STEP_TIMEOUT) {
                Ok(Ok(piece)) => {
                    total += piece.len() as u64;
                    if total > MAX_DEVICE_STATE_BYTES {
                        return Err(VmmError::DeviceStateTooLarge { limit: MAX_DEVICE_STATE_BYTES });
                    }
                    sink(&piece)?;
                }
                Ok(Err(source)) => return Err(VmmError::Host { what: "read QEMU's device state", source }),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(VmmError::DeviceStateLate { ms: STEP_TIMEOUT.as_millis() });
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(self.guest.source().wait_completed(STEP_TIMEOUT)?)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.take_back()
    }

    fn throttle(&mut self, share: f64) -> Result<(), VmmError> {
        if share < 1.0 { self.slow_down(share) } else { Ok(self.give_time_back()?) }
    }

    fn released(&mut self) {
        self.touched = false;
        if let Some(guard) = self.guard.take() {
            guard.leave();
        }
    }
}

impl Drop for QemuSource {
    fn drop(&mut self) {
        let taken_back = if self.touched { self.take_back() } else { Ok(()) };
        if let Err(error) = &taken_back {
            tracing::error!(error = crate::vmm::describe(error), "could not let the guest go on; the guard will try");
        }
        let lifted = self.give_time_back();
        if let Err(error) = &lifted {
            tracing::error!(error = crate::vmm::describe(error), "the guest's threads stay in control groups");
        }
        if taken_back.is_err() || lifted.is_err() {
            // Without the word to leave, the guard takes over when our end closes.
            return;
        }
        if let Some(guard) = self.guard.take() {
            guard.leave();
        }
    }
}

impl Drop for QemuTarget {
    fn drop(&mut self) {
        // Only that QEMU would run the guest by itself is not given back: it cannot be asked whether it would have.
        if !self.loaded
            && let Err(error) = self.guest.target().restore_settings(&self.settings)
        {
            tracing::debug!(error = crate::vmm::describe(&error), "the target's settings stay as they are");
        }
    }
}

/// Reads a stream to its end on a thread of its own.
fn read_in_background(mut stream: UnixStream) -> Receiver<std::io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::sync_channel(RELAY_PIECES);
    thread::spawn(move || {
        loop {
            let mut piece = vec![0; RELAY_BYTES];
            let item = match stream.read(&mut piece) {
                Ok(0) => return,
                Ok(count) => {
                    piece.truncate(count);
                    Ok(piece)
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = item.is_err();
            // Nobody to take it any more: closing our end of the stream lets QEMU know.
            if sender.send(item).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

/// A QEMU that waits with `-incoming defer`, as the target.
#[derive(Debug)]
pub struct QemuTarget {
    guest: QemuGuest,
    memory: Arc<GuestMemory>,
    settings: Settings,
    /// QEMU was given device state: its settings are its own affair until the guest runs.
    loaded: bool,
}

impl QemuTarget {
    /// Attaches to the QEMU behind a QMP socket, and sees to it that it does not run the guest by itself.
    ///
    /// # Errors
    /// [`VmmError`].
    pub fn attach(qmp: &Path, pid: Option<u32>) -> Result<Self, VmmError> {
        let mut guest = QemuGuest::connect(qmp, pid)?;
        // First what can be refused: nothing is changed yet.
        let memory = Arc::new(GuestMemory::from_qemu(guest.ram(RamAccess::ReadWrite)?, RamAccess::ReadWrite)?);
        let settings = guest.target().save_settings()?;
        let mut target = Self { guest, memory, settings, loaded: false };
        target.guest.target().prepare()?;
        Ok(target)
    }

    /// The QEMU.
    pub fn guest(&mut self) -> &mut QemuGuest {
        &mut self.guest
    }

    fn feed(&self, mut stream: UnixStream, device_state: &[u8]) -> Result<(), VmmError> {
        let host = |source| VmmError::Host { what: "give QEMU its device state", source };
        stream.set_write_timeout(Some(STEP_TIMEOUT)).map_err(host)?;
        stream.write_all(device_state).map_err(host)?;
        stream.shutdown(std::net::Shutdown::Write).map_err(host)
    }
}

impl TargetVmm for QemuTarget {
    fn machine(&self) -> Machine {
        Machine { kind: self.guest.machine().to_owned(), vcpus: self.guest.vcpus() }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn load(&mut self, device_state: &[u8]) -> Result<(), VmmError> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|source| VmmError::Host { what: "make a socket pair for QEMU's device state", source })?;
        self.loaded = true;
        self.guest.target().accept_migration(theirs.as_fd())?;
        drop(theirs);
        let fed = self.feed(ours, device_state);
        // Where QEMU refused the state, its own words say more than that it stopped reading.
        self.guest.target().wait_loaded(STEP_TIMEOUT)?;
        fed
    }

    fn run(&mut self) -> Result<(), VmmError> {
        self.guest.target().cont()?;
        let run_state = self.guest.run_state()?;
        if run_state != "running" {
            return Err(VmmError::NotRunning { run_state });
        }
        Ok(())
    }

    /// Tells the network once more, and puts QEMU's settings back. What fails here is said, and changes nothing.
    fn settle(&mut self) {
        let announced = self.guest.target().announce_self();
        let restored = self.guest.target().restore_settings(&self.settings);
        for error in [announced, restored].into_iter().filter_map(Result::err) {
            tracing::warn!(error = crate::vmm::describe(&error), "after the hand-over");
        }
    }
}
