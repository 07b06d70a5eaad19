//! pthread_cancel(3) of a thread in KVM_RUN.
//!
//! The C library cancels a thread that asked for asynchronous cancellation by a signal that sigaction(2)
//! does not show, and its handler unwinds the stack from where the thread is. A thread in the kernel
//! leaves the ioctl first; one in our run loop has to leave that. So this handler, too, stands behind
//! ours. It may be installed as late as in the first pthread_cancel.

use std::ffi::{c_int, c_void};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use super::actions::{self, Action};
use crate::{next, sys};

/// The signal, in glibc and musl (33 is glibc's SIGSETXID, and musl's for other purposes).
const SIGCANCEL: c_int = 32;

/// Puts the C library's handler behind ours, if that has not been done. Call before a thread is cancelled.
pub fn catch() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        if handler().is_none() {
            make_it_install();
        }
        if let Some(theirs) = handler() {
            let ours = sys::KernelAction {
                handler: super::catch as *const () as usize,
                ..theirs
            };
            actions::stand_in_front(
                SIGCANCEL,
                Action::new(theirs.handler, theirs.flags as c_int, theirs.mask),
                // SAFETY: a three-argument handler; the flags and the way back are the C library's.
                || unsafe { sys::set_action(SIGCANCEL, &ours) },
            );
        }
    });
}

/// The C library's handler. A process that was started by posix_spawn inherits SIG_IGN.
fn handler() -> Option<sys::KernelAction> {
    sys::action(SIGCANCEL).filter(|a| ![libc::SIG_DFL, libc::SIG_IGN].contains(&a.handler))
}

/// Cancels a thread that does not mind.
fn make_it_install() {
    static GO: AtomicBool = AtomicBool::new(false);
    extern "C" fn wait(_: *mut c_void) -> *mut c_void {
        const DISABLE: c_int = 1;
        // SAFETY: the state is one there is; the old one is not asked for.
        unsafe { next::pthread_setcancelstate(DISABLE, std::ptr::null_mut()) };
        while !GO.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        GO.store(false, Ordering::Release);
        std::ptr::null_mut()
    }
    // SAFETY: a thread that touches nothing but `GO`, joined before its handle is gone. It cannot be cancelled
    // before it has said that it does not want to be: until `GO` is set it passes no cancellation point
    // but sched_yield, which is none.
    unsafe {
        let mut thread: libc::pthread_t = 0;
        let nothing = std::ptr::null_mut();
        if libc::pthread_create(&mut thread, std::ptr::null(), wait, nothing) != 0 {
            return;
        }
        next::pthread_cancel(thread);
        GO.store(true, Ordering::Release);
        libc::pthread_join(thread, std::ptr::null_mut());
    }
}
