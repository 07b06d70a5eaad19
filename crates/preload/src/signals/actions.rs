//! What the program wants done about each signal, as sigaction(2) told us, while the kernel is told
//! to call [`super::catch`].

use std::ffi::{c_int, c_void};
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

use super::{FAULTS, bit, masks};
use crate::sys::{self, KernelSigset};
use crate::{next, process};

/// Signals are numbered from 1 to 64.
const LAST: c_int = 64;
/// Signals we need for ourselves: the faults that copies and guest RAM accesses may raise.
const OURS: KernelSigset = bit(libc::SIGSEGV) | bit(libc::SIGBUS);

/// A three-argument signal handler. The kernel passes all three to one-argument handlers too.
///
/// It may unwind: cancelling a thread does that.
pub type Handler = unsafe extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// A handler as the program installed it.
#[derive(Clone, Copy)]
pub struct Action {
    handler: usize,
    flags: c_int,
    mask: KernelSigset,
}

impl Action {
    /// The function to call.
    pub fn handler(&self) -> Handler {
        // SAFETY: neither SIG_DFL nor SIG_IGN (those are other dispositions), so a function.
        unsafe { std::mem::transmute::<usize, Handler>(self.handler) }
    }

    /// The signals to block while it runs.
    pub fn blocked_during(&self, signal: c_int) -> KernelSigset {
        match self.flags & libc::SA_NODEFER {
            0 => self.mask | bit(signal),
            _ => self.mask,
        }
    }
}

/// What is to happen with a signal.
pub enum Disposition {
    Default,
    Ignore,
    Handler(Action),
}

/// One signal's entry: written under [`LOCK`], read at any time (`sequence` is odd while it is being
/// written).
struct Entry {
    sequence: AtomicU32,
    handler: AtomicUsize,
    flags: AtomicI32,
    mask: AtomicU64,
}

impl Entry {
    const fn new() -> Self {
        Self {
            sequence: AtomicU32::new(0),
            handler: AtomicUsize::new(libc::SIG_DFL),
            flags: AtomicI32::new(0),
            mask: AtomicU64::new(0),
        }
    }

    fn read(&self) -> Action {
        loop {
            let sequence = self.sequence.load(Ordering::Acquire);
            let action = Action {
                handler: self.handler.load(Ordering::Relaxed),
                flags: self.flags.load(Ordering::Relaxed),
                mask: self.mask.load(Ordering::Relaxed),
            };
            fence(Ordering::Acquire);
            if sequence.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == sequence {
                return action;
            }
            std::hint::spin_loop();
        }
    }

    /// Ends a write that a thread of the parent process had begun.
    fn abandon(&self) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(sequence.next_multiple_of(2), Ordering::Release);
    }

    fn write(&self, _: &Lock, action: &Action) {
        self.sequence.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.handler.store(action.handler, Ordering::Relaxed);
        self.flags.store(action.flags, Ordering::Relaxed);
        self.mask.store(action.mask, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Release);
    }
}

static ENTRIES: [Entry; LAST as usize + 1] = [const { Entry::new() }; LAST as usize + 1];
/// Whether handlers stand behind ours yet.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Generation of the process one of whose threads changes entries; 0: none does.
static LOCKED: AtomicU64 = AtomicU64::new(0);

/// The right to change [`ENTRIES`] and the kernel's dispositions together. All signals are blocked meanwhile: a
/// handler may call sigaction too.
struct Lock {
    mask: KernelSigset,
}

impl Lock {
    fn take() -> Self {
        let mask = sys::set_signal_mask(!0);
        let us = process::generation();
        let mut holder = 0;
        while let Err(now) =
            LOCKED.compare_exchange(holder, us, Ordering::Acquire, Ordering::Relaxed)
        {
            // A thread that held it when this process was forked off is not here to let go.
            holder = if now == us { 0 } else { now };
            std::hint::spin_loop();
        }
        if holder != 0 {
            ENTRIES.iter().for_each(Entry::abandon);
        }
        Self { mask }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        LOCKED.store(0, Ordering::Release);
        sys::set_signal_mask(self.mask);
    }
}

fn entry(signal: c_int) -> Option<&'static Entry> {
    let valid = (1..=LAST).contains(&signal);
    valid.then(|| &ENTRIES[signal as usize])
}

/// What the program wants done about a signal.
pub fn get(signal: c_int) -> Disposition {
    match entry(signal).map(Entry::read) {
        Some(action) if action.handler == libc::SIG_IGN => Disposition::Ignore,
        Some(action) if action.handler != libc::SIG_DFL => Disposition::Handler(action),
        _ => Disposition::Default,
    }
}

/// Whether the default action is to do nothing (signal(7)).
pub fn ignored_by_default(signal: c_int) -> bool {
    const NOTHING: [c_int; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];
    NOTHING.contains(&signal)
}

/// The handler is about to be called: SA_RESETHAND takes effect.
pub fn consume(signal: c_int, action: &Action) {
    if action.flags & libc::SA_RESETHAND == 0 {
        return;
    }
    let lock = Lock::take();
    if let Some(entry) = entry(signal) {
        let default = Action {
            handler: libc::SIG_DFL,
            ..*action
        };
        tell_kernel(signal, &default);
        entry.write(&lock, &default);
    }
}

/// Gives the kernel its default action back, for a signal that is about to be raised again.
pub fn restore_default(signal: c_int) {
    // SAFETY: all-zero bytes are a valid sigaction: SIG_DFL without flags.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        next::sigaction(signal, &default, std::ptr::null_mut());
    }
}

/// Catches those of `signals` that would end the process although KVM_RUN is to end: the program
/// blocks them, lets them through during KVM_RUN and never installed a handler.
pub fn catch_defaults(signals: KernelSigset) {
    for signal in (1..=LAST).filter(|&signal| signals & bit(signal) != 0) {
        if ignored_by_default(signal) || !matches!(get(signal), Disposition::Default) {
            continue;
        }
        let _lock = Lock::take();
        // SAFETY: all-zero bytes are a valid sigaction.
        let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: reads the disposition into a live structure.
        let known = unsafe { next::sigaction(signal, std::ptr::null(), &mut now) } == 0;
        if known && now.sa_sigaction == libc::SIG_DFL {
            install_ours(signal, 0, 0);
        }
    }
}

/// Puts all handlers that the process has behind ours, once.
pub fn take_over() {
    let lock = Lock::take();
    if ACTIVE.load(Ordering::Relaxed) {
        return;
    }
    for signal in 1..=LAST {
        // SAFETY: all-zero bytes are a valid sigaction.
        let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: reads the disposition into a live structure.
        if unsafe { next::sigaction(signal, std::ptr::null(), &mut now) } != 0 {
            continue; // libc keeps a few to itself.
        }
        let action = Action::of(&now);
        ENTRIES[signal as usize].write(&lock, &action);
        tell_kernel(signal, &action);
    }
    ACTIVE.store(true, Ordering::Release);
}

impl Action {
    /// A handler with its flags and the signals blocked during it.
    pub fn new(handler: usize, flags: c_int, mask: KernelSigset) -> Self {
        Self {
            handler,
            flags,
            mask,
        }
    }

    fn of(action: &libc::sigaction) -> Self {
        Self {
            handler: action.sa_sigaction,
            flags: action.sa_flags,
            mask: masks::kernel_mask(&action.sa_mask),
        }
    }

    fn write_to(&self, action: &mut libc::sigaction) {
        action.sa_sigaction = self.handler;
        action.sa_flags = self.flags;
        masks::set_kernel_mask(&mut action.sa_mask, self.mask);
    }

    fn is_handler(&self) -> bool {
        self.handler != libc::SIG_DFL && self.handler != libc::SIG_IGN
    }
}

/// Keeps a handler that sigaction does not show, and has ours put in front of it.
pub fn stand_in_front(signal: c_int, theirs: Action, install_ours: impl FnOnce()) {
    let lock = Lock::take();
    if let Some(entry) = entry(signal) {
        entry.write(&lock, &theirs);
        install_ours();
    }
}

/// Tells the kernel what the program wants, with our handler in front of the program's. 0 or -1.
fn tell_kernel(signal: c_int, action: &Action) -> c_int {
    if action.is_handler() {
        return install_ours(signal, action.flags, action.mask);
    }
    if OURS & bit(signal) != 0 {
        return install_ours(signal, libc::SA_ONSTACK, 0);
    }
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut plain: libc::sigaction = unsafe { std::mem::zeroed() };
    action.write_to(&mut plain);
    // SAFETY: SIG_DFL or SIG_IGN.
    unsafe { next::sigaction(signal, &plain, std::ptr::null_mut()) }
}

/// SA_RESETHAND is ours to do ([`consume`]): the kernel would do it when the signal interrupts the
/// run loop, long before the program's handler is called.
fn install_ours(signal: c_int, flags: c_int, mask: KernelSigset) -> c_int {
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = super::catch as *const () as usize;
    ours.sa_flags = flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    masks::set_kernel_mask(&mut ours.sa_mask, mask & !FAULTS);
    // SAFETY: a three-argument handler, as SA_SIGINFO says.
    unsafe { next::sigaction(signal, &ours, std::ptr::null_mut()) }
}

/// sigaction(2) as the program sees it.
///
/// # Safety
/// As sigaction.
pub unsafe fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let Some(entry) = entry(signal).filter(|_| ACTIVE.load(Ordering::Acquire)) else {
        // SAFETY: the program's own call.
        return unsafe { next::sigaction(signal, new, old) };
    };
    // SAFETY: null, or an action the program passed to be read.
    let new = unsafe { new.as_ref() };
    let lock = Lock::take();
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: reads the disposition into a live structure; fails for libc's own signals.
    if unsafe { next::sigaction(signal, std::ptr::null(), &mut before) } != 0 {
        return -1;
    }
    if before.sa_sigaction == super::catch as *const () as usize {
        entry.read().write_to(&mut before);
    }
    if let Some(new) = new {
        let action = Action::of(new);
        if process::is_vfork_child() {
            // The table is the parent's. This process will only ever exec or exit.
            // SAFETY: the program's own call.
            if unsafe { next::sigaction(signal, new, std::ptr::null_mut()) } != 0 {
                return -1;
            }
        } else {
            if tell_kernel(signal, &action) != 0 {
                return -1;
            }
            entry.write(&lock, &action);
        }
    }
    drop(lock);
    if !old.is_null() {
        // SAFETY: the program passed it to be written.
        unsafe { old.write(before) };
    }
    0
}
