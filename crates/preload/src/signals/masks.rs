//! pthread_sigmask and sigprocmask with the fault signals left unblocked ([`super::FAULTS`]). The
//! program is told what it asked for.

use std::ffi::c_int;

use super::{FAULTS, THREAD};
use crate::sys::KernelSigset;

/// A signal set's first 64 bits: all that the kernel knows.
pub fn kernel_mask(set: &libc::sigset_t) -> KernelSigset {
    // SAFETY: sigset_t is an array of machine words without padding.
    unsafe { std::ptr::from_ref(set).cast::<KernelSigset>().read() }
}

/// Sets the bits that the kernel knows.
pub fn set_kernel_mask(set: &mut libc::sigset_t, mask: KernelSigset) {
    // SAFETY: as above.
    unsafe { std::ptr::from_mut(set).cast::<KernelSigset>().write(mask) }
}

/// `pthread_sigmask` or `sigprocmask`.
///
/// # Safety
/// As those.
pub unsafe fn change(
    next: unsafe fn(c_int, *const libc::sigset_t, *mut libc::sigset_t) -> c_int,
    how: c_int,
    new: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> c_int {
    THREAD.with(|thread| {
        let hidden = thread.hidden.get();
        // SAFETY: null, or a set the program passed to be read.
        let mut set = unsafe { new.as_ref() }.copied();
        let mut now_hidden = hidden;
        if let Some(set) = &mut set {
            let mask = kernel_mask(set);
            let faults = mask & FAULTS;
            match how {
                libc::SIG_BLOCK => now_hidden |= faults,
                libc::SIG_UNBLOCK => now_hidden &= !faults,
                _ => now_hidden = faults,
            }
            if how != libc::SIG_UNBLOCK {
                set_kernel_mask(set, mask & !FAULTS);
            }
        }
        let new = set.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: a copy of the program's set, and the program's pointer for the answer.
        let value = unsafe { next(how, new, old) };
        if value == 0 {
            thread.hidden.set(now_hidden);
            // SAFETY: null, or just written by the call above.
            if let Some(old) = unsafe { old.as_mut() } {
                let mask = kernel_mask(old);
                set_kernel_mask(old, mask | hidden);
            }
        }
        value
    })
}
