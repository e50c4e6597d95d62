//! What a further connection may say to the target.

use crate::pages::{PageRun, RamLayout};
use crate::wire::{Encodings, Message, MigrationId, stream_of};

use super::target::{Apply, TargetError, check_pages};

/// The target's end of one further connection: checks every message. It can be driven by a thread of its own; what has
/// arrived and is in place goes to [`Target::handle_side_bytes`](super::Target::handle_side_bytes).
#[derive(Debug, Clone)]
pub struct SideStream {
    pub(super) layout: RamLayout,
    pub(super) migration: MigrationId,
    pub(super) encodings: Encodings,
    pub(super) streams: u16,
    /// Which connection it is, once that was said.
    pub(super) stream: Option<u16>,
}

impl SideStream {
    /// The connection's number, once it has joined the migration: 1 to one less than there are.
    pub fn stream(&self) -> Option<u16> {
        self.stream
    }

    /// The connections of the migration, the first one included.
    pub fn streams(&self) -> u16 {
        self.streams
    }

    /// A message, and what to do with it. After an error nothing more may be taken from this connection; if it had not
    /// joined, it is somebody else's, and the migration goes on without it.
    ///
    /// # Errors
    /// The message has no place here.
    pub fn handle_message(&mut self, message: &Message<'_>) -> Result<Apply, TargetError> {
        let unexpected = |doing| TargetError::Unexpected { message: message.name(), doing };
        let Some(stream) = self.stream else {
            return match message {
                Message::Join(join) if join.migration != self.migration => Err(TargetError::WrongMigration),
                Message::Join(join) if (1..self.streams).contains(&join.stream) => {
                    self.stream = Some(join.stream);
                    Ok(Apply::Nothing)
                }
                _ => Err(unexpected("waiting for a further connection")),
            };
        };
        match message {
            Message::Pages(pages) => {
                check_pages(&self.layout, self.encodings, pages, stream, self.streams)?;
                Ok(Apply::WritePages)
            }
            Message::Zero(runs) => {
                check_runs(&self.layout, runs, stream, self.streams)?;
                Ok(Apply::ZeroPages)
            }
            _ => Err(unexpected("receiving memory on a further connection")),
        }
    }
}

/// Whether these pages are the guest's, and may come by this connection.
pub(super) fn check_runs(layout: &RamLayout, runs: &[PageRun], stream: u16, streams: u16) -> Result<(), TargetError> {
    runs.iter().try_for_each(|&run| {
        check_inside(layout, run)?;
        check_stream(run, stream, streams)
    })
}

/// Whether these pages may come by this connection.
fn check_stream(run: PageRun, stream: u16, streams: u16) -> Result<(), TargetError> {
    use crate::wire::STREAM_BLOCK_PAGES as BLOCK;
    let in_one_block = streams == 1 || run.count == 0 || run.first.0 / BLOCK == (run.end() - 1) / BLOCK;
    if in_one_block && stream_of(run.first, streams) == stream {
        Ok(())
    } else {
        Err(TargetError::WrongStream { run, stream })
    }
}

/// Whether these pages are the guest's.
pub(super) fn check_inside(layout: &RamLayout, run: PageRun) -> Result<(), TargetError> {
    if layout.contains(run) { Ok(()) } else { Err(TargetError::OutsideRam { run, pages: layout.total_pages() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::{PAGE_BYTES, RamBlock};
    use crate::wire::{Encoding, Join, PageRuns, Pages, STREAM_BLOCK_PAGES};

    const MIGRATION: MigrationId = MigrationId([3; 16]);

    fn side() -> SideStream {
        let layout = RamLayout::new(vec![RamBlock { id: "ram".into(), bytes: 4 * STREAM_BLOCK_PAGES * PAGE_BYTES }]);
        let layout = layout.unwrap();
        SideStream { layout, migration: MIGRATION, encodings: Encodings::RAW, streams: 3, stream: None }
    }

    fn join(stream: u16) -> Message<'static> {
        Message::Join(Join { migration: MIGRATION, stream })
    }

    #[test]
    fn only_one_of_the_migration_is_let_in() {
        let stranger = Message::Join(Join { migration: MigrationId([4; 16]), stream: 1 });
        for message in [stranger, join(0), join(3), Message::Ping(1), Message::Zero(vec![])] {
            let mut side = side();
            assert!(side.handle_message(&message).is_err(), "{message:?}");
            assert_eq!(side.stream(), None);
        }
        let mut side = side();
        assert_eq!(side.handle_message(&join(2)), Ok(Apply::Nothing));
        assert_eq!(side.stream(), Some(2));
        assert!(side.handle_message(&join(2)).is_err(), "once");
    }

    #[test]
    fn copies_are_of_pages_of_the_same_connection() {
        let copies = |side: &mut SideStream, source: u64| {
            let (runs, data) = (PageRuns::One(PageRun::new(STREAM_BLOCK_PAGES, 1)), source.to_le_bytes());
            let encoding = Encoding::Copy { digest: [0; 32] };
            side.handle_message(&Message::Pages(Pages { runs, encoding, data: &data }))
        };
        let mut side = SideStream { encodings: Encodings::ALL, ..side() };
        side.handle_message(&join(1)).unwrap();
        assert_eq!(copies(&mut side, STREAM_BLOCK_PAGES + 7), Ok(Apply::WritePages));
        for source in [0, 2 * STREAM_BLOCK_PAGES] {
            assert!(matches!(copies(&mut side, source), Err(TargetError::WrongStream { .. })), "{source}");
        }
        for source in [4 * STREAM_BLOCK_PAGES, u64::MAX] {
            assert!(matches!(copies(&mut side, source), Err(TargetError::OutsideRam { .. })), "{source}");
        }
        side.encodings = Encodings(0b11_1111);
        assert!(matches!(copies(&mut side, STREAM_BLOCK_PAGES), Err(TargetError::Encoding { code: 6 })));
    }

    #[test]
    fn pages_come_by_their_own_connection() {
        let mut side = side();
        side.handle_message(&join(1)).unwrap();
        let page = [1; PAGE_BYTES as usize];
        let mut zero = |first, count| side.handle_message(&Message::Zero(vec![PageRun::new(first, count)]));
        assert_eq!(zero(STREAM_BLOCK_PAGES, STREAM_BLOCK_PAGES), Ok(Apply::ZeroPages));
        let wrong = Err(TargetError::WrongStream { run: PageRun::new(0, 1), stream: 1 });
        assert_eq!(zero(0, 1), wrong);
        assert!(matches!(zero(STREAM_BLOCK_PAGES, STREAM_BLOCK_PAGES + 1), Err(TargetError::WrongStream { .. })));
        assert!(matches!(zero(5 * STREAM_BLOCK_PAGES, 1), Err(TargetError::OutsideRam { .. })));
        let run = PageRun::new(2 * STREAM_BLOCK_PAGES - 1, 1);
        assert_eq!(side.handle_message(&Message::Pages(Pages::raw(run, &page))), Ok(Apply::WritePages));
        let other = Message::Pages(Pages::raw(PageRun::new(2 * STREAM_BLOCK_PAGES, 1), &page));
        assert!(matches!(side.handle_message(&other), Err(TargetError::WrongStream { .. })));
        for message in [Message::Load { device_state_bytes: 0 }, Message::Paused, Message::HandOver(MIGRATION)] {
            assert!(matches!(side.handle_message(&message), Err(TargetError::Unexpected { .. })));
        }
    }
}
