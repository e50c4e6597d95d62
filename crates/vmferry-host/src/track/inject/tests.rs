//! A VMM that dies at each stage, and what of it a tracer must not disturb. What needs a VMM that does something is
//! tested from outside, in `tests/track_attach.rs`.

use std::process::{Child, Command};

use rustix::process::{Pid, Signal};

use super::*;

/// A process that waits, and does not outlive the test.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().expect("coreutils' sleep runs"))
    }

    fn target(&self) -> Target {
        Target::open(self.0.id()).unwrap()
    }

    fn kill(pid: u32) {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const STAGES: [Stage; 7] =
    [Stage::Seized, Stage::Stopped, Stage::Entered, Stage::Created, Stage::TakenOut, Stage::Closed, Stage::Released];

#[test]
fn the_stages_come_in_order() {
    let sleeper = Sleeper::start();
    let mut seen = Vec::new();
    let injected = userfaultfd_of(&sleeper.target(), &mut |stage| seen.push(stage)).unwrap();
    assert_eq!(seen, STAGES);
    assert!(injected.stop > Duration::ZERO);
    assert_eq!(u32::try_from(injected.tid), Ok(sleeper.0.id()));
}

#[test]
fn a_vmm_that_dies_at_any_stage_is_an_error_and_not_a_hang() {
    for fatal in STAGES {
        let sleeper = Sleeper::start();
        let target = sleeper.target();
        let pid = sleeper.0.id();
        let outcome = userfaultfd_of(&target, &mut |stage| {
            if stage == fatal {
                Sleeper::kill(pid);
            }
        });
        match outcome {
            Err(TrackError::VmmExited) => {}
            // The work was done by then.
            Ok(_) if fatal == Stage::Released => {}
            other => panic!("killed at {fatal:?}: {other:?}"),
        }
    }
}

#[test]
fn a_vmm_that_has_died_is_told_from_one_that_never_was() {
    let mut sleeper = Sleeper::start();
    let target = sleeper.target();
    sleeper.0.kill().unwrap();
    assert!(target.exited_within(EXIT_LIMIT));
    // A zombie, which our `wait` below would reap.
    assert!(matches!(userfaultfd_of(&target, &mut |_| ()), Err(TrackError::VmmExited)));
    assert!(matches!(Target::open(sleeper.0.id()), Err(TrackError::VmmExited)));
    sleeper.0.wait().unwrap();
    assert!(matches!(userfaultfd_of(&target, &mut |_| ()), Err(TrackError::VmmExited)));
    assert!(matches!(Target::open(sleeper.0.id()), Err(TrackError::NoSuchProcess { .. })));
}

#[test]
fn another_tracer_is_named() {
    let sleeper = Sleeper::start();
    let tid = i32::try_from(sleeper.0.id()).unwrap();
    // Ptrace belongs to a thread: this one traces, the injection's own thread finds that it does.
    sys::seize(tid).unwrap();
    match userfaultfd_of(&sleeper.target(), &mut |_| ()) {
        Err(error @ TrackError::AlreadyTraced { tracer, .. }) => {
            assert_eq!(tracer, std::process::id());
            assert!(error.to_string().contains("already traced by process"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    sys::interrupt(tid).unwrap();
    assert!(wait_until_interrupted(tid, STEP_LIMIT).is_ok());
    sys::detach(tid).unwrap();
    userfaultfd_of(&sleeper.target(), &mut |_| ()).unwrap();
}
