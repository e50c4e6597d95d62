//! Which address spaces run: CR3 of each processor, and what it stands for.

use std::time::{Duration, Instant};

use super::paging::{Half, Levels, Meter, Root, TABLE_ENTRIES, Table, TableSource, linked_table, read_root, translate};
use crate::qemu::{MAX_PROCESSORS_AT_ONCE, ProcessorState, QemuError, processor_state, processor_states, processors};
use crate::qmp::{QmpClient, QmpError};

/// How long QEMU may take to answer, even where the time limit of the refresh is shorter. It takes half a millisecond,
/// unless its main loop is held up or its processors leave it no time.
const ANSWER_TIME: Duration = Duration::from_millis(20);
/// Late answers in a row that are put up with.
const MOST_LATE_ANSWERS: u32 = 8;
/// Linux with kernel page-table isolation gives each process two roots in neighbouring pages: the kernel's has this bit
/// of its address clear, the program's has it set.
const ISOLATION_BIT: u64 = 1 << 12;

/// Asks processors for their states: all at once where they are few, else in turn.
#[derive(Debug)]
pub(super) struct Sampler {
    processors: Vec<u32>,
    next: usize,
    patience: Patience,
}

impl Sampler {
    pub(super) fn new(qmp: &mut QmpClient) -> Result<Self, QemuError> {
        Ok(Self { processors: processors(qmp)?, next: 0, patience: Patience::default() })
    }

    /// The states of processors. Of all if they are few, else of at least one, going on where the last call ended, and
    /// no more after `until`. Of none while QEMU is not to be troubled, or if it answers too late.
    pub(super) fn sample(&mut self, qmp: &mut QmpClient, until: Instant) -> Result<Vec<ProcessorState>, QemuError> {
        if !self.patience.may_ask(Instant::now()) {
            return Ok(Vec::new());
        }
        match self.ask(qmp, until) {
            Ok(states) => {
                self.patience.answered();
                Ok(states)
            }
            // The answer to come is dropped by the client.
            Err(QemuError::Qmp(error @ QmpError::Timeout { .. })) => {
                if self.patience.late(Instant::now()) {
                    Ok(Vec::new())
                } else {
                    Err(error.into())
                }
            }
            Err(error) => Err(error),
        }
    }

    fn ask(&mut self, qmp: &mut QmpClient, until: Instant) -> Result<Vec<ProcessorState>, QemuError> {
        let timeout = || until.saturating_duration_since(Instant::now()).max(ANSWER_TIME);
        if self.processors.len() <= MAX_PROCESSORS_AT_ONCE {
            return processor_states(qmp, timeout());
        }
        let mut states = Vec::with_capacity(self.processors.len());
        let mut asked = 0;
        while asked < self.processors.len() && (asked == 0 || Instant::now() < until) {
            let processor = self.processors[self.next % self.processors.len()];
            self.next = self.next.wrapping_add(1);
            asked += 1;
            match processor_state(qmp, processor, timeout())? {
                Some(state) => states.push(state),
                None => {
                    // Unplugged: whom there is to ask has changed.
                    self.processors = processors(qmp)?;
                    break;
                }
            }
        }
        Ok(states)
    }
}

/// How to go on with a QEMU that answers late: questions it did not get to would pile up, and the migration's own would
/// have to wait for them.
#[derive(Debug, Default)]
struct Patience {
    late_in_a_row: u32,
    rest_until: Option<Instant>,
}

impl Patience {
    fn may_ask(&self, now: Instant) -> bool {
        self.rest_until.is_none_or(|until| now >= until)
    }

    fn answered(&mut self) {
        *self = Self::default();
    }

    /// Whether to go on at all. The rest is twice as long with each late answer.
    fn late(&mut self, now: Instant) -> bool {
        self.late_in_a_row += 1;
        self.rest_until = Some(now + ANSWER_TIME * (1 << self.late_in_a_row.min(MOST_LATE_ANSWERS)));
        self.late_in_a_row < MOST_LATE_ANSWERS
    }
}

/// The topmost table of an address space whose kernel half is known to be good.
#[derive(Debug, Clone)]
pub(super) struct Topmost {
    pub(super) root: Root,
    pub(super) table: Box<Table>,
}

impl Topmost {
    /// Reads the root; `None` if there is no table.
    pub(super) fn read<S: TableSource>(
        source: &mut S,
        meter: &mut Meter,
        root: Root,
    ) -> Result<Option<Self>, S::Error> {
        let mut table = Box::new([0; TABLE_ENTRIES]);
        Ok(read_root(source, meter, root, &mut table)?.then_some(Self { root, table }))
    }

    /// Whether any table of the lower half is linked: a process has some, an idle processor and a process that has
    /// ended have none.
    pub(super) fn has_programs(&self) -> bool {
        self.links(Half::Lower).any(|(_, link)| link.is_some())
    }

    /// Whether this has the kernel half of `other`: all address spaces of a system have it in common, to the tables that
    /// the topmost links. Half of the links are enough: a few belong to the address space, as a table's entry for itself,
    /// and new ones may not be everywhere yet.
    pub(super) fn has_kernel_of(&self, other: &Self) -> bool {
        let pairs = self.links(Half::Upper).zip(other.links(Half::Upper));
        let (mut linked, mut equal) = (0_usize, 0_usize);
        for ((_, mine), (_, theirs)) in pairs {
            linked += usize::from(theirs.is_some());
            equal += usize::from(theirs.is_some() && mine == theirs);
        }
        self.root.levels == other.root.levels && equal > 0 && equal * 2 >= linked
    }

    /// Whether a table of the lower half is linked in both, at the same place.
    fn shares_programs_with(&self, other: &Self) -> bool {
        self.links(Half::Lower).zip(other.links(Half::Lower)).any(|(mine, theirs)| mine.1.is_some() && mine == theirs)
    }

    fn links(&self, half: Half) -> impl Iterator<Item = (usize, Option<u64>)> {
        half.entries().map(|index| (index, linked_table(self.table[index])))
    }
}

/// The address space behind a value of CR3; `None` if no running system can have these tables. That is so where CR3
/// belongs to a guest inside the guest, whose physical addresses are others, and where guest memory is encrypted.
///
/// Of the two roots of kernel page-table isolation this is the kernel's, whichever of them was sampled; the other one
/// is recognised by the tables that both link, so that nothing needs to be known of the guest's system.
pub(super) fn resolve<S: TableSource>(
    source: &mut S,
    meter: &mut Meter,
    state: &ProcessorState,
    levels: Levels,
    known: Option<&Topmost>,
) -> Result<Option<Topmost>, S::Error> {
    let root = Root::from_cr3(state.cr3, levels);
    let Some(mut topmost) = Topmost::read(source, meter, root)? else { return Ok(None) };
    if root.address & ISOLATION_BIT != 0 {
        let other = Root { address: root.address & !ISOLATION_BIT, levels };
        if let Some(other) = Topmost::read(source, meter, other)?
            && topmost.shares_programs_with(&other)
        {
            topmost = other;
        }
    }
    if known.is_some_and(|known| topmost.has_kernel_of(known)) {
        return Ok(Some(topmost));
    }
    // No processor runs without its interrupt table.
    let Some(interrupts) = translate(source, meter, topmost.root, state.idt_address)? else { return Ok(None) };
    let is_ram = source.read_table(interrupts & !0xfff, &mut [0; TABLE_ENTRIES])?;
    Ok(is_ram.then_some(topmost))
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::{KERNEL_PAGE, Tables, USER_PAGE, unlimited};
    use super::*;

    const IDT: u64 = 0xffff_fe00_0000_0000;

    fn root(address: u64) -> Root {
        Root { address, levels: Levels::Four }
    }

    fn state(cr3: u64) -> ProcessorState {
        ProcessorState { cr0: 1 << 31, cr3, cr4: 0, efer: 1 << 10, idt_address: IDT, management_mode: false }
    }

    fn resolved(tables: &mut Tables, cr3: u64, known: Option<&Topmost>) -> Option<u64> {
        let topmost = resolve(tables, &mut unlimited(), &state(cr3), Levels::Four, known).unwrap();
        topmost.map(|topmost| topmost.root.address)
    }

    /// Two address spaces with the same kernel half, at 0x1000 and 0x3000.
    fn two_spaces() -> Tables {
        let (mut tables, mut free) = (Tables::default(), 0x10_0000);
        tables.map(root(0x1000), IDT, 0x8000, 1, KERNEL_PAGE, &mut free);
        tables.tables.insert(0x8000, [0; TABLE_ENTRIES]);
        let kernel = tables.tables[&0x1000];
        tables.tables.insert(0x3000, kernel);
        tables.map(root(0x1000), 0x40_0000, 0x5000, 1, USER_PAGE, &mut free);
        tables.map(root(0x3000), 0x40_0000, 0x6000, 1, USER_PAGE, &mut free);
        tables
    }

    #[test]
    fn a_qemu_that_answers_late_is_asked_less_and_less() {
        let mut patience = Patience::default();
        let start = Instant::now();
        let mut now = start;
        for late in 1..MOST_LATE_ANSWERS {
            assert!(patience.may_ask(now));
            assert!(patience.late(now), "{late}");
            let rest = ANSWER_TIME * 2_u32.pow(late);
            assert!(!patience.may_ask(now + rest - Duration::from_nanos(1)));
            now += rest;
        }
        assert!(now - start > Duration::from_secs(5));
        assert!(!patience.late(now));
        patience.answered();
        assert!(patience.may_ask(start) && patience.late(start));
    }

    #[test]
    fn neighbouring_roots_are_two_spaces_unless_they_share_tables() {
        let mut tables = two_spaces();
        assert_eq!(resolved(&mut tables, 0x3805, None), Some(0x3000));
        let moved = tables.tables[&0x3000];
        tables.tables.insert(0x0000, moved);
        assert_eq!(resolved(&mut tables, 0x1000, None), Some(0x1000), "an order of its own at every odd page");
        // Isolation: the program's root has the same lower half and little of the kernel.
        let mut program = tables.tables[&0x1000];
        let entry = &mut tables.tables.get_mut(&0x1000).unwrap()[0];
        *entry |= 1 << 63;
        program[300] = 0;
        let kernel = tables.tables[&0x1000];
        tables.tables.insert(0x4000, kernel);
        tables.tables.insert(0x5000, program);
        assert_eq!(resolved(&mut tables, 0x5805, None), Some(0x4000));
        assert_eq!(resolved(&mut tables, 0x4005, None), Some(0x4000));
    }

    #[test]
    fn a_root_needs_an_interrupt_table_or_the_known_kernel() {
        let mut tables = two_spaces();
        let known = Topmost::read(&mut tables, &mut unlimited(), root(0x1000)).unwrap().unwrap();
        // Not RAM, data, and a table that maps nothing of the kernel.
        assert_eq!(resolved(&mut tables, 0x7777_7000, None), None);
        tables.tables.insert(0x9000, [0x0123_4567_89ab_cdef; TABLE_ENTRIES]);
        assert_eq!(resolved(&mut tables, 0x9000, Some(&known)), None);
        tables.tables.insert(0xa000, [0; TABLE_ENTRIES]);
        assert_eq!(resolved(&mut tables, 0xa000, Some(&known)), None);
        // The interrupt table has to be in RAM, too.
        tables.tables.remove(&0x8000);
        assert_eq!(resolved(&mut tables, 0x3000, None), None);
        let before = tables.reads;
        assert_eq!(resolved(&mut tables, 0x3000, Some(&known)), Some(0x3000));
        assert!(tables.reads - before <= 2, "a known kernel costs no translation");
    }

    #[test]
    fn an_ended_process_has_the_kernel_and_no_programs() {
        let mut tables = two_spaces();
        tables.tables.get_mut(&0x3000).unwrap()[..TABLE_ENTRIES / 2].fill(0);
        let mut read = |address| Topmost::read(&mut tables, &mut unlimited(), root(address)).unwrap().unwrap();
        let (one, ended) = (read(0x1000), read(0x3000));
        assert!(one.has_programs() && !ended.has_programs());
        assert!(ended.has_kernel_of(&one));
        let five = Topmost { root: Root { address: 0x3000, levels: Levels::Five }, ..ended };
        assert!(!five.has_kernel_of(&one), "the guest was started anew, with other levels");
    }
}
