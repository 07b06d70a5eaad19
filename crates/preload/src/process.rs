//! Which process this is. KVM's VM and vCPU ioctls work only in the process that created the VM
//! (KVM API, section 2: "must be issued from the same process (address space)"), and closing a
//! descriptor in a vfork child, which shares our memory but not our descriptors, must not change
//! what the parent's table says.
//!
//! A page that fork wipes (madvise(2), `MADV_WIPEONFORK`) tells a forked child without a system
//! call on the ordinary path; the process id tells a vfork child.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};

use crate::sys;

const PAGE: usize = 4096;

/// The wiped page: the generation of the process, 0 right after fork.
static MARK: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());
/// The last generation given out; copied, not wiped, by fork.
static LAST: AtomicU64 = AtomicU64::new(0);
/// The process of the current generation.
static PID: AtomicI32 = AtomicI32::new(0);

/// A number that differs between a process and its forked children.
pub fn generation() -> u64 {
    let mark = mark();
    match mark.load(Ordering::Acquire) {
        0 => begin(mark),
        generation => generation,
    }
}

/// Whether the caller shares this process's memory without being part of it (vfork, posix_spawn).
pub fn is_vfork_child() -> bool {
    generation();
    sys::getpid() != PID.load(Ordering::Relaxed)
}

fn mark() -> &'static AtomicU64 {
    let mark = MARK.load(Ordering::Acquire);
    if !mark.is_null() {
        // SAFETY: only ever set to a page that is never unmapped.
        return unsafe { &*mark };
    }
    let Some(page) = sys::allocate(PAGE) else {
        return &LAST; // No memory: a child is then taken for its parent.
    };
    sys::wipe_on_fork(page, PAGE);
    let page = page.cast();
    let old = std::ptr::null_mut();
    match MARK.compare_exchange(old, page, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: a zeroed page of our own, never unmapped from here on.
        Ok(_) => unsafe { &*page },
        Err(theirs) => {
            // SAFETY: nobody else has seen our page; theirs is as good as ours above.
            unsafe {
                sys::release(page.cast(), PAGE);
                &*theirs
            }
        }
    }
}

/// The first call in a process: numbers it. Threads of one process agree on who does.
fn begin(mark: &AtomicU64) -> u64 {
    let pid: c_int = sys::getpid();
    // Before the generation shows: whoever sees that finds the process id too.
    PID.store(pid, Ordering::Relaxed);
    let new = LAST.load(Ordering::Relaxed) + 1;
    match mark.compare_exchange(0, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            LAST.store(new, Ordering::Relaxed);
            new
        }
        Err(theirs) => theirs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_is_another_generation() {
        let here = generation();
        assert_eq!(generation(), here);
        // SAFETY: the child makes async-signal-safe calls only and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let other = generation() != here && generation() == generation() && !is_vfork_child();
            // SAFETY: ends the child.
            unsafe { libc::_exit(if other { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!(status, 0);
        assert_eq!(generation(), here);
    }
}
