//! What a thread has taken of a processor.

use std::time::Duration;

/// The processor time of this thread so far. Unlike a clock's, it does not grow while others have the processor.
pub(crate) fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}
