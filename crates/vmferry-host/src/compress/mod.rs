//! Pages made smaller for the wire, and made whole again.
//!
//! ```text
//!   driver ── read ─▶ Batch ─▶ EncoderPool ─▶ Batch with frames ─▶ link        (source)
//!                      ▲  changes                 │ what was sent
//!                      ├────── DeltaCache ◀───────┘
//!                      └────── Twins: pages of equal content
//!   Chooser: which codec now, from the path's bandwidth and the measured cost of each
//!
//!   link ─▶ PageDecoder ─▶ guest RAM                                            (target)
//! ```
//!
//! Content is read once: what is encoded, sent and kept for a later delta is the same copy, although the guest may write
//! meanwhile.

mod batch;
mod cache;
mod choice;
mod codec;
mod delta;
mod pool;
mod twins;

pub use choice::Compress;
pub use codec::PagesError;

pub(crate) use batch::{BATCH_PAGES, Batch, Content};
pub(crate) use cache::DeltaCache;
pub(crate) use choice::{Chooser, Handed, Path, Plan};
pub(crate) use codec::{Codec, PageDecoder};
pub(crate) use pool::EncoderPool;
pub(crate) use twins::Twins;

/// Whether all bytes of a page are zero. Most pages show in their first bytes that they are not.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}
