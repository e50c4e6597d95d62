//! Everything the tree knows of threads, so that loom can put its own in the place of the real ones.
//!
//! Loom has no `OnceLock`. Its stand-in here publishes with the same release and acquire as the real one: a key that
//! is read without being published first is missing, and the reader panics.

#[cfg(not(loom))]
mod real {
    extern crate std;

    pub(crate) use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub(crate) use std::sync::{Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

    /// A number for the calling thread, counted up from 0 as threads first ask.
    #[inline]
    pub(crate) fn thread_number() -> usize {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        std::thread_local! {
            static NUMBER: usize = THREADS.fetch_add(1, Ordering::Relaxed);
        }
        // While a thread's locals are being destroyed it has no number of its own any more.
        NUMBER.try_with(|number| *number).unwrap_or(0)
    }

    /// The lock, if no other thread holds it. Nothing it guards can be left half changed by a panic.
    #[inline]
    pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        match mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(loom)]
mod real {
    extern crate std;

    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

    pub(crate) struct OnceLock<T> {
        filled: AtomicBool,
        cell: std::sync::OnceLock<T>,
    }

    impl<T> OnceLock<T> {
        pub(crate) fn new() -> Self {
            Self { filled: AtomicBool::new(false), cell: std::sync::OnceLock::new() }
        }

        pub(crate) fn get(&self) -> Option<&T> {
            if self.filled.load(Ordering::Acquire) { self.cell.get() } else { None }
        }

        pub(crate) fn set(&self, value: T) -> Result<(), T> {
            self.cell.set(value)?;
            self.filled.store(true, Ordering::Release);
            Ok(())
        }

        pub(crate) fn into_inner(self) -> Option<T> {
            self.cell.into_inner()
        }
    }

    pub(crate) fn thread_number() -> usize {
        0
    }

    pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        mutex.try_lock().ok()
    }
}

pub(crate) use real::*;

/// Whether this build is for loom or Miri, which look at each atomic, so that what they run must get by with few.
pub(crate) const IS_MODEL: bool = cfg!(any(loom, miri));

extern crate std;

/// Chunks are allocated once, on the thread that needs them first; loom's models stay within the first chunk.
pub(crate) use std::sync::OnceLock as ChunkLock;

// What these locks guard is never left half changed by a panic: no code of the user's runs between two changes that
// belong together. So a poisoned lock is as good as any.

#[inline]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[inline]
pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[inline]
pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn into_inner<T>(lock: RwLock<T>) -> T {
    lock.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}
