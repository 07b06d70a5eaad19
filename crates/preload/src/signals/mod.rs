//! Signals around ioctls, and KVM_RUN above all.
//!
//! The kernel runs a program's signal handlers after the ioctl that they interrupted, so they may
//! block, issue vCPU ioctls or leave by longjmp. Here a handler would start in the middle of the
//! run loop, or of something that holds a lock. Therefore, from the moment a process opens
//! `/dev/kvm`, every handler that it has or installs stands behind one of ours ([`catch`]):
//!
//! - Outside our code, ours calls the program's at once.
//! - Inside ([`defer`]), ours keeps the siginfo, blocks all signals in the interrupted context and
//!   returns; in the run loop it also makes that return ([`anykvm_cpu::requests::KICK`]), with
//!   EINTR. When the ioctl has unwound and holds nothing any more, [`deliver`] calls the program's
//!   handler with the siginfo that was kept, under the mask sigaction(2) promises, and restores the
//!   interrupted mask. Whatever else arrived in the meantime waited in the kernel and comes then.
//! - A fault (SIGSEGV or SIGBUS on a bad user pointer or on unmapped guest RAM) is resumed; one that
//!   is not ours goes to the program's handler, or does what it would have done without us.
//!
//! Changing the mask back uses rt_sigreturn, not rt_sigprocmask: seccomp filters on vCPU threads
//! always allow the former. KVM_SET_SIGNAL_MASK (KVM API, 4.17) is the exception: the mask is really
//! set for the duration of KVM_RUN, and a signal that only that mask lets through is put back into
//! the thread's queue, still pending, before KVM_RUN returns.
//!
//! SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGTRAP cannot be blocked ([`masks`]): a copy that faults with
//! its signal blocked would kill the process.

pub mod actions;
pub mod cancel;
mod context;
pub mod masks;

use std::cell::{Cell, UnsafeCell};
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{Ordering, compiler_fence};

use anykvm_cpu::Requests;
use anykvm_cpu::requests::KICK;

use crate::sys::{self, KernelSigset};
use crate::user_memory;
use actions::Disposition;
use context::Interrupted;

/// A signal's bit in a [`KernelSigset`].
pub const fn bit(signal: c_int) -> KernelSigset {
    1u64.wrapping_shl((signal - 1) as u32)
}

/// The signals that stand for faults of an instruction.
pub const FAULTS: KernelSigset = bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGFPE)
    | bit(libc::SIGILL)
    | bit(libc::SIGTRAP);

/// A machine check that was noticed in the background: no instruction of ours failed.
const BUS_MCEERR_AO: c_int = 5;

/// What a handler needs to know of the thread it interrupts. Accessed from handlers: no
/// destructor, constant initialiser, so that an access is an address computation and nothing else.
struct Thread {
    /// Inside our code.
    deferring: Cell<bool>,
    /// Inside the run loop: the requests of the vCPU that runs on this thread.
    running: Cell<*const Requests>,
    /// The signal that waits for the ioctl to return, or 0, and what came with it.
    deferred: Cell<c_int>,
    info: UnsafeCell<MaybeUninit<libc::siginfo_t>>,
    interrupted: Cell<Interrupted>,
    /// The mask to restore when KVM_SET_SIGNAL_MASK's was in force.
    before: Cell<Option<KernelSigset>>,
    /// Fault signals the program believes it has blocked.
    hidden: Cell<KernelSigset>,
}

thread_local! {
    static THREAD: Thread = const {
        Thread {
            deferring: Cell::new(false),
            running: Cell::new(std::ptr::null()),
            deferred: Cell::new(0),
            info: UnsafeCell::new(MaybeUninit::uninit()),
            interrupted: Cell::new(Interrupted::NONE),
            before: Cell::new(None),
            hidden: Cell::new(0),
        }
    };
}

/// Called once, when the process first opens `/dev/kvm`.
pub fn begin() {
    context::detect_protection_keys();
    actions::take_over();
    sys::change_signal_mask(libc::SIG_UNBLOCK, FAULTS);
}

/// Does something that the program's handlers must not see half done. It must not unwind, and
/// [`deliver`] must follow when the caller holds nothing any more.
pub fn defer<R>(f: impl FnOnce() -> R) -> R {
    THREAD.with(|thread| {
        let outer = thread.deferring.replace(true);
        compiler_fence(Ordering::SeqCst);
        let value = f();
        compiler_fence(Ordering::SeqCst);
        thread.deferring.set(outer);
        value
    })
}

/// [`defer`] for callers that hold nothing anyway.
pub fn uninterrupted<R>(f: impl FnOnce() -> R) -> R {
    let value = defer(f);
    deliver();
    value
}

/// Calls the run loop, inside [`defer`], under KVM_SET_SIGNAL_MASK's mask if there is one.
pub fn run_loop<R>(requests: &Requests, mask: Option<KernelSigset>, run: impl FnOnce() -> R) -> R {
    THREAD.with(|thread| {
        thread.running.set(requests);
        compiler_fence(Ordering::SeqCst);
        if let Some(mask) = mask {
            let before = sys::set_signal_mask(!FAULTS);
            if thread.deferred.get() == 0 {
                actions::catch_defaults(before & !mask);
                thread.before.set(Some(before));
                sys::set_signal_mask(mask & !FAULTS);
            }
        }
        if thread.deferred.get() != 0 {
            // It may have come after `defer` had begun: all signals are blocked since, so this one
            // must end the run.
            requests.set(KICK);
        }
        let value = run();
        if let (Some(before), 0) = (thread.before.get(), thread.deferred.get()) {
            sys::set_signal_mask(before);
        }
        compiler_fence(Ordering::SeqCst);
        thread.running.set(std::ptr::null());
        if thread.deferred.get() != 0 {
            // It may have come too late to make the loop return; the next KVM_RUN is not meant.
            requests.take(KICK);
        }
        value
    })
}

/// Delivers the signal that was deferred, if one was. The program's handler may not come back, so the
/// caller must hold nothing.
pub fn deliver() {
    THREAD.with(|thread| {
        if thread.deferring.get() {
            return;
        }
        let before = thread.before.take();
        let signal = thread.deferred.replace(0);
        if signal == 0 {
            return;
        }
        // SAFETY: `keep` filled it before it set `deferred`, and all signals are blocked since.
        let mut info = unsafe { (*thread.info.get()).assume_init_read() };
        let interrupted = thread.interrupted.get();
        let mask = before.unwrap_or(interrupted.mask);
        if mask & bit(signal) != 0 {
            sys::queue_to_self(signal, &info);
            sys::set_signal_mask(mask);
            return;
        }
        match actions::get(signal) {
            Disposition::Handler(action) => {
                actions::consume(signal, &action);
                let during = (mask | action.blocked_during(signal)) & !FAULTS;
                // SAFETY: `interrupted` describes this thread; the handler is the program's for this
                // signal.
                unsafe {
                    context::Resume::new(&interrupted, during).resume();
                    let mut back = context::Resume::new(&interrupted, mask);
                    (action.handler())(signal, &mut info, back.context());
                    back.resume();
                }
            }
            Disposition::Default => {
                actions::restore_default(signal);
                sys::queue_to_self(signal, &info);
                sys::set_signal_mask(mask);
            }
            Disposition::Ignore => {
                sys::set_signal_mask(mask);
            }
        }
    })
}

/// The handler that the kernel knows.
extern "C-unwind" fn catch(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let ucontext = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes valid pointers to a handler installed with SA_SIGINFO.
    let (code, frame) = unsafe { ((*info).si_code, &mut *ucontext) };
    let asynchronous = code <= 0 || (signal == libc::SIGBUS && code == BUS_MCEERR_AO);
    let fault = bit(signal) & FAULTS != 0 && !asynchronous;
    if fault {
        let rip = &mut frame.uc_mcontext.gregs[libc::REG_RIP as usize];
        let at = *rip as u64;
        if let Some(resume) = user_memory::fix_up(at).or_else(|| guest_memory_fix_up(at)) {
            *rip = resume as i64;
            return;
        }
    } else {
        let deferred = THREAD.with(|thread| {
            if thread.deferring.get() {
                // SAFETY: as above for `info`.
                thread.keep(signal, unsafe { &*info }, frame);
                // SAFETY: points to the requests that `run_loop` borrows until it clears the pointer.
                if let Some(requests) = unsafe { thread.running.get().as_ref() } {
                    // A halted vCPU sleeps on this word, and the signal itself has woken it.
                    requests.set(KICK);
                }
            }
            thread.deferring.get()
        });
        if deferred {
            return;
        }
    }
    match actions::get(signal) {
        Disposition::Handler(action) => {
            actions::consume(signal, &action);
            // SAFETY: what the kernel would have called, with what it would have passed.
            unsafe { (action.handler())(signal, info, context) }
        }
        // The instruction faults again, with the default action in place.
        Disposition::Default | Disposition::Ignore if fault => actions::restore_default(signal),
        Disposition::Default if !actions::ignored_by_default(signal) => {
            actions::restore_default(signal);
            // SAFETY: as above. Blocked until this handler returns.
            sys::queue_to_self(signal, unsafe { &*info });
        }
        Disposition::Default | Disposition::Ignore => {}
    }
}

/// Guest RAM that a memory slot names but the program has unmapped: KVM_RUN will return EFAULT.
fn guest_memory_fix_up(rip: u64) -> Option<u64> {
    anykvm_cpu::memory::fault::handle(rip)
}

impl Thread {
    /// Keeps a signal for [`deliver`] and holds back all others until then.
    fn keep(&self, signal: c_int, info: &libc::siginfo_t, frame: &mut libc::ucontext_t) {
        if self.deferred.get() != 0 {
            // Only around the mask changes of `run_loop`: back into the thread's queue.
            sys::set_signal_mask(!FAULTS);
            sys::queue_to_self(signal, info);
        } else {
            self.interrupted.set(Interrupted::of(frame));
            // SAFETY: `deliver` reads it only while `deferred` is set.
            unsafe { (*self.info.get()).write(*info) };
            compiler_fence(Ordering::SeqCst);
            self.deferred.set(signal);
        }
        masks::set_kernel_mask(&mut frame.uc_sigmask, !FAULTS);
    }
}
