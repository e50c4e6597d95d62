//! The guests that are moved.

/// RAM that Linux and its programs need beside what the test guest's writers use.
const LINUX_BYTES: u64 = 128 << 20;

/// The least RAM that a guest starts with.
pub(crate) const MEMORY_MIN_BYTES: u64 = 160 << 20;

/// How often guests tick. Short against the pauses that are measured, and little work for the guest.
const TICK_MS: u64 = 5;

/// One kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guest {
    /// Its name, on the command line and in tables.
    pub(crate) name: &'static str,
    /// What it is, for people.
    pub(crate) about: &'static str,
    /// What runs in it.
    pub(crate) program: Program,
}

/// What runs in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The test guest, with these words of its command line; it checks its own memory.
    Pages(&'static str),
    /// A guest of the study, with its command line; nobody checks its memory.
    Study(&'static str),
}

/// All guests, as they are compared unless some are named.
pub(crate) const GUESTS: &[Guest] = &[
    Guest {
        name: "idle",
        about: "memory is filled and then left alone",
        program: Program::Pages("vmferry.pattern=idle"),
    },
    Guest {
        name: "idle-loose",
        about: "memory is filled and left alone, a tenth of each page with what no compressor makes smaller",
        program: Program::Pages("vmferry.pattern=idle vmferry.incompressible=10"),
    },
    Guest {
        name: "idle-packed",
        about: "memory is filled and left alone, all of each page with what no compressor makes smaller",
        program: Program::Pages("vmferry.pattern=idle vmferry.incompressible=100"),
    },
    Guest {
        name: "hot-2k",
        about: "2,000 page writes a second to 16 MiB",
        program: Program::Pages("vmferry.pattern=hot vmferry.hot=16MiB vmferry.rate=2000"),
    },
    Guest {
        name: "hot-20k",
        about: "20,000 page writes a second to 16 MiB",
        program: Program::Pages("vmferry.pattern=hot vmferry.hot=16MiB vmferry.rate=20000"),
    },
    Guest {
        name: "hot-200k",
        about: "200,000 page writes a second to 64 MiB",
        program: Program::Pages("vmferry.pattern=hot vmferry.hot=64MiB vmferry.rate=200000"),
    },
    Guest {
        name: "zipf",
        about: "20,000 page writes a second to all pages, by Zipf's law",
        program: Program::Pages("vmferry.pattern=zipf vmferry.rate=20000"),
    },
    Guest {
        name: "sweep",
        about: "20,000 page writes a second to all pages in order, again and again",
        program: Program::Pages("vmferry.pattern=sweep vmferry.rate=20000"),
    },
    Guest {
        name: "phases",
        about: "20,000 page writes a second to 16 MiB that move on every 2 s",
        program: Program::Pages("vmferry.pattern=phases vmferry.hot=16MiB vmferry.rate=20000 vmferry.phase=40000"),
    },
    Guest {
        name: "redis",
        about: "redis with 200,000 values of 512 bytes, read and written with even odds",
        program: Program::Study("workload=redis keys=200000 beat_s=0.02"),
    },
];

/// The guests of a quick comparison.
pub(crate) const QUICK_GUESTS: [&str; 2] = ["idle", "hot-20k"];

impl Guest {
    /// The one with this name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        GUESTS.iter().find(|guest| guest.name == name)
    }

    /// The kernel's command line in a machine with so much RAM.
    pub(crate) fn command_line(&self, memory_bytes: u64) -> String {
        // No trial of the timer, which fails where an emulated processor is not given time for it.
        const ALL: &str = "console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check";
        match self.program {
            Program::Pages(words) => {
                let written_mib = (memory_bytes.saturating_sub(LINUX_BYTES) >> 20).max(1);
                format!(
                    "{ALL} {words} vmferry.memory={written_mib}MiB vmferry.tick_ms={TICK_MS} vmferry.background_check=no"
                )
            }
            Program::Study(words) => format!("{ALL} {words}"),
        }
    }

    /// Whether the guest can say that its memory is right.
    pub(crate) const fn checks_itself(&self) -> bool {
        match self.program {
            Program::Pages(_) => true,
            Program::Study(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vmferry_guest::{Parameters, Ticks};

    use super::*;

    #[test]
    fn the_test_guest_understands_every_command_line() {
        for guest in GUESTS.iter().filter(|guest| guest.checks_itself()) {
            for memory_bytes in [MEMORY_MIN_BYTES, 512 << 20] {
                let line = guest.command_line(memory_bytes);
                // The smallest machine has no room for the largest hot set.
                if guest.name != "hot-200k" || memory_bytes > MEMORY_MIN_BYTES {
                    let parameters = Parameters::from_command_line(&line).unwrap();
                    assert_eq!(parameters.pages, (memory_bytes - LINUX_BYTES) >> 12, "{line}");
                    let incompressible = match guest.name {
                        "idle-loose" => 10,
                        "idle-packed" => 100,
                        _ => 50,
                    };
                    assert_eq!(parameters.incompressible_percent, incompressible, "{line}");
                }
                let ticks = Ticks::from_command_line(&line).unwrap();
                assert_eq!(ticks, Ticks { interval_ms: TICK_MS, background_check: false });
            }
        }
    }

    #[test]
    fn names_are_unique_and_known() {
        let names: BTreeSet<&str> = GUESTS.iter().map(|guest| guest.name).collect();
        assert_eq!(names.len(), GUESTS.len());
        assert!(QUICK_GUESTS.iter().all(|name| Guest::named(name).is_some()));
    }
}
