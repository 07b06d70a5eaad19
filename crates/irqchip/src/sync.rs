//! Locking. A panic elsewhere must not turn into one here, so a poisoned lock is simply taken: every
//! critical section of this crate leaves its device in a state the device can be in.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
