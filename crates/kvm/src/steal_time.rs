//! Stolen time (`Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_STEAL_TIME): how long the vCPU's thread was ready to
//! run and did not, because the host's processors did something else.
//!
//! The host counts that for each thread ("run delay", the second number of `/proc/self/task/TID/schedstat`). The
//! seccomp filters of monitors forbid their vCPU threads to read files, so the VM's event thread does it: every
//! few milliseconds while the guest has the clock in use, and when KVM_RUN is entered after a pause, which then
//! waits for it. The vCPU's thread adds what is new to the guest's `struct kvm_steal_time`.
//!
//! No vCPU is ever marked as preempted there: nobody tells this process when the host takes a thread off its
//! processor.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::requests::OWNER;
use rustix::fs::{Mode, OFlags};
use rustix::thread::futex;
use rustix::time::Timespec;

use crate::clock::monotonic_ns;
use crate::event_thread::{Deadline, Expire};
use crate::kick::Kick;
use crate::machine::VcpuMachine;

/// Between two looks while the guest runs.
const PERIOD_NS: u64 = 10_000_000;
/// After a pause as long as this KVM_RUN waits for a look before it begins.
const LONG_PAUSE_NS: u64 = 200_000;
/// How long KVM_RUN waits for the event thread, which takes some microseconds.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// The calling thread's id, without a system call, which a filter might forbid: the number of its
/// processor-time clock is made of it (`include/linux/posix-timers.h`). [`is_measured`] makes sure.
#[allow(unsafe_code)]
fn thread_id() -> u32 {
    let mut clock = 0;
    // SAFETY: the calling thread lives, and `clock` takes the result.
    let failed = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
    if failed == 0 { !(clock >> 3) as u32 } else { 0 }
}

/// Whether stolen time can be measured: the host counts it, and threads know their numbers. First asked when
/// `/dev/kvm` is opened, before the monitor has filters.
pub(crate) fn is_measured() -> bool {
    static MEASURED: OnceLock<bool> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let id = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        thread_id() == id && open(id).is_some_and(|fd| run_delay(&fd).is_some())
    })
}

fn open(thread: u32) -> Option<OwnedFd> {
    let path = format!("/proc/self/task/{thread}/schedstat");
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Nanoseconds that the thread was ready and did not run.
fn run_delay(schedstat: &OwnedFd) -> Option<u64> {
    let mut text = [0; 96];
    let len = rustix::io::pread(schedstat, &mut text, 0).ok()?;
    let mut numbers = std::str::from_utf8(text.get(..len)?).ok()?.split(' ');
    numbers.nth(1)?.parse().ok()
}

/// What the vCPU's thread and the event thread share.
#[derive(Debug)]
pub(crate) struct RunDelay {
    /// The thread that last entered KVM_RUN, 0 for none.
    thread: AtomicU32,
    /// Its run delay, as last looked up.
    ns: AtomicU64,
    /// When the guest last paused.
    paused_at: AtomicU64,
    /// Incremented by each look; KVM_RUN sleeps on it.
    looks: AtomicU32,
    /// The guest runs, and wants to know.
    in_use: AtomicBool,
    /// It has run since the last look.
    was_in_use: AtomicBool,
    file: Mutex<Option<(u32, OwnedFd)>>,
    kick: Arc<Kick>,
    deadline: Arc<Deadline>,
}

/// The look, for the VM's event thread.
pub(crate) struct Look(pub Weak<RunDelay>);

impl Expire for Look {
    fn expired(&self, now_ns: u64) {
        if let Some(delay) = self.0.upgrade() {
            delay.look(now_ns);
        }
    }
}

impl RunDelay {
    pub fn new(kick: Arc<Kick>, deadline: Arc<Deadline>) -> Self {
        Self {
            thread: AtomicU32::new(0),
            ns: AtomicU64::new(0),
            paused_at: AtomicU64::new(0),
            looks: AtomicU32::new(0),
            in_use: AtomicBool::new(false),
            was_in_use: AtomicBool::new(false),
            file: Mutex::new(None),
            kick,
            deadline,
        }
    }

    /// On the event thread: takes the run delay, tells the vCPU if there is more, and comes back.
    fn look(&self, now: u64) {
        let thread = self.thread.load(SeqCst);
        let mut file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        if file.as_ref().is_none_or(|(of, _)| *of != thread) {
            *file = open(thread).map(|fd| (thread, fd));
        }
        if let Some(ns) = file.as_ref().and_then(|(_, fd)| run_delay(fd))
            && self.ns.swap(ns, SeqCst) != ns
            && self.in_use.load(SeqCst)
        {
            self.kick.requests().set(OWNER);
        }
        self.looks.fetch_add(1, SeqCst);
        let _ = futex::wake(&self.looks, futex::Flags::PRIVATE, 1);
        if self.was_in_use.swap(false, SeqCst) || self.in_use.load(SeqCst) {
            self.deadline.set(Some(now + PERIOD_NS));
        }
    }

    /// KVM_RUN begins on this thread: waits for a look after a long pause. True if the thread is not the one
    /// before.
    pub fn begin(&self) -> bool {
        let thread = thread_id();
        let other = self.thread.swap(thread, SeqCst) != thread;
        let now = monotonic_ns();
        if other || now.wrapping_sub(self.paused_at.load(SeqCst)) >= LONG_PAUSE_NS {
            let before = self.looks.load(SeqCst);
            self.deadline.set(Some(now));
            while self.looks.load(SeqCst) == before {
                let wait = futex::wait(&self.looks, futex::Flags::PRIVATE, before, Some(&PATIENCE));
                if wait == Err(rustix::io::Errno::TIMEDOUT) {
                    break;
                }
            }
        }
        other
    }

    /// The guest is about to run.
    pub fn go_on(&self) {
        if !self.in_use.swap(true, SeqCst) && !self.was_in_use.swap(true, SeqCst) {
            self.deadline.set(Some(monotonic_ns() + PERIOD_NS));
        }
    }

    /// The guest does not run for now.
    pub fn pause(&self) {
        self.paused_at.store(monotonic_ns(), SeqCst);
        self.in_use.store(false, SeqCst);
    }

    /// The run delay as it was last looked up.
    pub fn ns(&self) -> u64 {
        self.ns.load(SeqCst)
    }
}

/// `kvm_steal_time.version` begins here; `steal` is at 0.
const VERSION: u64 = 8;

impl VcpuMachine {
    /// KVM_RUN begins: what was stolen before is known when it returns.
    pub fn look_at_stolen_time(&self) {
        if let Some(delay) = self.run_delay()
            && delay.begin()
        {
            // Another thread's count.
            self.paravirt().stolen_before = Some(delay.ns());
        }
    }

    /// The guest is about to go on: it is told what was stolen since the last time.
    pub fn record_stolen_time(&self) {
        let Some(delay) = self.run_delay() else {
            return;
        };
        delay.go_on();
        let now = delay.ns();
        let mut paravirt = self.paravirt();
        let before = paravirt.stolen_before.replace(now).unwrap_or(now);
        if let Some(at) = paravirt.steal_time_address()
            && (now > before || paravirt.take_steal_time_is_new())
        {
            record(self.vm().memory(), at, now.saturating_sub(before));
        }
    }

    /// The guest does not go on for now.
    pub fn pause_stolen_time(&self) {
        if let Some(delay) = self.run_delay() {
            delay.pause();
        }
    }
}

/// Adds to the guest's `struct kvm_steal_time` (`record_steal_time`).
fn record(memory: &GuestMemory, at: u64, more: u64) {
    let mut old = [0; 12];
    if memory.read(at, &mut old).is_err() {
        // Not RAM: the guest's loss, as in Linux.
        return;
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let steal = number(&old[..8]).wrapping_add(more);
    // Odd while the time is written; what the guest left there may be odd, too.
    let version = (number(&old[8..]) as u32).wrapping_add(1) & !1;
    let odd = version.wrapping_add(1);
    let _ = memory
        .write(at + VERSION, &odd.to_le_bytes())
        .and_then(|()| memory.write(at, &steal.to_le_bytes()))
        .and_then(|()| memory.write(at + VERSION, &odd.wrapping_add(1).to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_knows_its_number_and_its_delay() {
        assert!(is_measured());
        let here = std::thread::spawn(|| {
            (
                thread_id(),
                rustix::thread::gettid().as_raw_nonzero().get() as u32,
            )
        });
        let (ours, hosts) = here.join().unwrap();
        assert_eq!(ours, hosts);
        let file = open(thread_id()).unwrap();
        let first = run_delay(&file).unwrap();
        assert!(run_delay(&file).unwrap() >= first);
    }
}
