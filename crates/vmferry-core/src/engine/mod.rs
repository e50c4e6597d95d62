//! A migration as two state machines without I/O.
//!
//! A driver feeds a machine what happened (`handle_*`) together with the time since the migration began, and carries
//! out what it asks for (`poll_action`). The machines decide everything and do nothing: a whole migration can be
//! replayed, cut at any message, from a seed.
//!
//! Who owns the guest, and may run it:
//!
//! ```text
//!               source machine                                target machine
//!   Start ─▶ Greeting ─▶ Observing ─▶ Pushing          AwaitHello ─▶ Receiving
//!     │          │           │          │  ▲                 │           │
//!     │          │           │          ▼  │                 │           ▼
//!     │          │           │        Pausing                │        Loading
//!     │          │           │          │                    │           │
//!     │          │           │      StopAndCopy              │        Prepared
//!     ▼          ▼           ▼          │                    ▼           │
//!   Ended ◀──────────── Resuming ◀──────┤ failure          Ended ◀───────┤ failure
//!                                       │                                │
//!   ════════════════ source owns the guest above, the target below ══════════════  hand-over
//!                                       ▼                                ▼
//!                                   HandedOver ─▶ Ended              Resuming ─▶ Ended (the guest runs)
//! ```
//!
//! The line is crossed when the source asks its driver to send [`Message::HandOver`](crate::wire::Message::HandOver):
//! from that moment no path leads back to an action that runs the guest on the source. Before it, every failure ends
//! with one. The target runs the guest only after it received the hand-over. So at most one side runs it at any time.

mod report;
mod side;
mod source;
mod target;

pub use report::{
    AddressSpacesReport, BoundReport, CompressionReport, DowntimeReport, OutcomeKind, PageReport, PauseCause,
    PhaseTimes, Report, ShadowReport, ThrottleReport, TrackingReport, VerifyReport, WaivedLimit, WireReport,
    WorkingSetReport,
};
pub use side::SideStream;
pub use source::{
    Action, AtTimeLimit, ChangeError, Encoded, Estimate, SentPages, Source, SourceConfig, SourceError, TimeLimit,
    Unfinished,
};
pub use target::{Apply, Target, TargetAction, TargetConfig, TargetError, TargetOutcome};
