//! What a policy is: facts in, one decision out.
//!
//! The state machine asks and obeys; it knows no policy by name. Several can be asked about the same facts, so that one
//! decides and the others only say what they would have done ([`Shadow`]).

use std::time::Duration;

use super::{Facts, Patience, Predictive, QemuRule, StopAndCopy, XenRule};

/// In which order pending pages are sent while the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendOrder {
    /// First those never seen written, in address order; then the others, coldest first, without those held back.
    ColdestFirst,
    /// In address order, around and around.
    Address,
}

/// What becomes of a page that was written since the last scan when its turn to be read has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtRead {
    /// Nobody looks. It is sent now, and again after the next scan has found it.
    Ignore,
    /// It is armed again and sent: only later writes make it pending.
    Rearm,
    /// It is armed again and not sent: it will be written again, is the bet (Clark and others, "Live migration of virtual
    /// machines", NSDI 2005).
    Skip,
}

/// How a policy wants the push to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushRules {
    /// In which order.
    pub order: SendOrder,
    /// What becomes of pages written just before they are read.
    pub at_read: AtRead,
    /// Whether written pages are looked for in every epoch, or only when the policy [asks](Policy::wants_scan).
    pub scan_every_epoch: bool,
    /// Whether to watch the guest before the first page is sent.
    pub observe: bool,
}

/// When a decision is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A scan has shown what was written meanwhile.
    Scan,
    /// The same, and a pass has ended: as many pages were sent as were pending when it began, or all that may be.
    PassEnd,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on pushing.
    Push,
    /// Send all that is pending, also what was to be held back, and look again at once: less remains then for the pause.
    SendAll,
    /// Stop the guest and send what remains.
    Pause,
    /// It will not fit: end the migration, with the guest where it is.
    GiveUp,
}

/// Decides what is held back, when to pause, and when to give up.
pub trait Policy: std::fmt::Debug + Send {
    /// The policy's name in reports.
    fn name(&self) -> &'static str;

    /// How the push goes. Asked once.
    fn rules(&self) -> PushRules;

    /// How many of the pending pages with these heats, hottest first, to hold back, and how many pages beside them are
    /// then expected to be written per epoch. `other_heat` is the heat of all pages that are not among them.
    fn hold(&self, facts: &Facts, heats: &[f64], other_heat: f64) -> Hold {
        let (_, _, _) = (self, facts, heats);
        Hold { pages: 0, fresh_pages_per_epoch: other_heat + heats.iter().sum::<f64>(), send_below: f64::INFINITY }
    }

    /// Whether a scan is wanted now. Asked between chunks, where the rules have no scan in each epoch. There is one in any
    /// case when nothing is left to send.
    fn wants_scan(&self, facts: &Facts) -> bool {
        let (_, _) = (self, facts);
        false
    }

    /// The decision. Asked after every scan of the push.
    fn decide(&mut self, moment: Moment, facts: &Facts) -> Decision;

    /// The guest was made to write slower, or the user changed a limit or held the push for a while: that there was no
    /// progress so far says little, and patience begins anew.
    fn restart(&mut self) {}
}

/// What [`Policy::hold`] answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hold {
    /// So many of the hottest pages.
    pub pages: usize,
    /// Pages expected to be written per epoch beside them.
    pub fresh_pages_per_epoch: f64,
    /// Pages of this heat and more are not sent before the next scan, held or not.
    pub send_below: f64,
}

/// Which policy, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicySpec {
    /// vmferry's own: holds the predicted working set back and sends the coldest pages first.
    Vmferry,
    /// Pre-copy as QEMU does it, with its rule when to stop.
    Qemu,
    /// Pre-copy with Xen's rule: at most five passes, or fewer than 50 pages left.
    Xen,
    /// QEMU's, without the pages that were written again before their turn came.
    SkipWritten,
    /// The guest is paused before the first page is sent.
    StopAndCopy,
}

/// No policy has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no policy; choose one of vmferry, qemu, xen, skip-written, stop-and-copy")]
pub struct UnknownPolicy {
    /// The name.
    pub name: String,
}

impl PolicySpec {
    /// All of them, the default first.
    pub const ALL: [Self; 5] = [Self::Vmferry, Self::Qemu, Self::Xen, Self::SkipWritten, Self::StopAndCopy];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmferry => "vmferry",
            Self::Qemu => "qemu",
            Self::Xen => "xen",
            Self::SkipWritten => "skip-written",
            Self::StopAndCopy => "stop-and-copy",
        }
    }

    /// The policy, for one migration.
    pub fn build(self, patience: Patience) -> Box<dyn Policy> {
        match self {
            Self::Vmferry => Box::new(Predictive::new(patience)),
            Self::Qemu => Box::new(QemuRule::new(patience, AtRead::Ignore)),
            Self::Xen => Box::new(XenRule),
            Self::SkipWritten => Box::new(QemuRule::new(patience, AtRead::Skip)),
            Self::StopAndCopy => Box::new(StopAndCopy),
        }
    }
}

impl std::fmt::Display for PolicySpec {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.name())
    }
}

impl std::str::FromStr for PolicySpec {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| UnknownPolicy { name: name.to_owned() })
    }
}

/// A policy that is asked and not obeyed.
///
/// It sees the migration as the policy in charge makes it. What it says is what it would do next, not what would have
/// come of it.
#[derive(Debug)]
pub struct Shadow {
    policy: Box<dyn Policy>,
    verdict: ShadowVerdict,
}

/// What a policy that was not in charge would have done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShadowVerdict {
    /// Which policy.
    pub policy: &'static str,
    /// When it first wanted something else than to go on, counted from the beginning of the push.
    pub first: Option<(Duration, Decision)>,
    /// The pause to expect at that moment.
    pub expected_downtime: Option<Duration>,
    /// The most pages that it wanted to hold back.
    pub held_pages_max: u64,
}

impl Shadow {
    /// Nothing asked yet.
    pub fn new(policy: Box<dyn Policy>) -> Self {
        let verdict = ShadowVerdict { policy: policy.name(), first: None, expected_downtime: None, held_pages_max: 0 };
        Self { policy, verdict }
    }

    /// Asks how many pages it would hold back.
    pub fn hold(&mut self, facts: &Facts, heats: &[f64], other_heat: f64) {
        let hold = self.policy.hold(facts, heats, other_heat);
        self.verdict.held_pages_max = self.verdict.held_pages_max.max(hold.pages as u64);
    }

    /// Begins its patience anew.
    pub fn restart(&mut self) {
        self.policy.restart();
    }

    /// Asks what it would do.
    pub fn decide(&mut self, moment: Moment, facts: &Facts) {
        let decision = self.policy.decide(moment, facts);
        if decision != Decision::Push && self.verdict.first.is_none() {
            self.verdict.first = Some((facts.pushing_for, decision));
            self.verdict.expected_downtime = facts.expected_downtime();
        }
    }

    /// What it said so far.
    pub fn verdict(&self) -> ShadowVerdict {
        self.verdict
    }
}
