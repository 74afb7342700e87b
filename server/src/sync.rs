//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock, also after a panic under it: only for what each change leaves whole, as a single
/// insert, remove, take or assignment does.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
