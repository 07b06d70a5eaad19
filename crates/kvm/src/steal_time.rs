//! Stolen time (`Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_STEAL_TIME): how long the vCPU's thread was ready to
//! run and did not, because the host's processors did something else.
//!
//! The host counts that for each thread ("run delay", the second number of `/proc/self/task/TID/schedstat`). The
//! seccomp filters of monitors forbid their vCPU threads to read files, so the VM's event thread does it: every
//! few milliseconds while the guest has the clock in use, and when KVM_RUN is entered after a pause, which then
//! waits for it: what was stolen meanwhile is known when the guest goes on. The vCPU's thread adds what is new to
//! the guest's `struct kvm_steal_time`; an entry with nothing new costs it a look at one flag.
//!
//! `preempted` there says whether the vCPU runs, as far as this process knows: nobody tells it when the host takes
//! a thread off its processor. So a vCPU is marked when KVM_RUN ends between two instructions for a signal. Others
//! then leave their TLB flushes to it (KVM_FEATURE_PV_TLB_FLUSH): it exchanges the byte for 0 before it executes
//! anything. A vCPU that sleeps in HLT is not marked, as with Linux since 5.17: a guest's scheduler takes a marked
//! processor for a busy one, and would wake no task there.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use anykvm_abi::{KVM_FEATURE_PV_TLB_FLUSH, KVM_VCPU_FLUSH_TLB, KVM_VCPU_PREEMPTED};
use anykvm_cpu::host_tsc;
use anykvm_cpu::memory::GuestMemory;
use anykvm_cpu::requests::{OWNER, TLB_FLUSH};
use rustix::fs::{Mode, OFlags};
use rustix::thread::futex;
use rustix::time::Timespec;

use crate::clock::{self, monotonic_ns};
use crate::event_thread::{Deadline, Expire};
use crate::machine::VcpuMachine;
use crate::vcpu_requests::VcpuRequests;

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
    /// The host's TSC when the guest last paused.
    paused_at: AtomicU64,
    /// [`LONG_PAUSE_NS`] by that clock.
    long_pause: u64,
    /// Incremented by each look; KVM_RUN sleeps on it.
    looks: AtomicU32,
    /// The guest runs, and wants to know.
    in_use: AtomicBool,
    /// It has run since the last look.
    was_in_use: AtomicBool,
    file: Mutex<Option<(u32, OwnedFd)>>,
    requests: Arc<VcpuRequests>,
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
    pub fn new(requests: Arc<VcpuRequests>, deadline: Arc<Deadline>) -> Self {
        Self {
            thread: AtomicU32::new(0),
            ns: AtomicU64::new(0),
            paused_at: AtomicU64::new(0),
            long_pause: u64::from(clock::host().khz) * LONG_PAUSE_NS / 1_000_000,
            looks: AtomicU32::new(0),
            in_use: AtomicBool::new(false),
            was_in_use: AtomicBool::new(false),
            file: Mutex::new(None),
            requests,
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
        {
            self.requests.request_steal_update();
            if self.in_use.load(SeqCst) {
                self.requests.kick.requests().set(OWNER);
            }
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
        let other = self.thread.load(Relaxed) != thread;
        if other {
            self.thread.store(thread, SeqCst);
        }
        // Where the processors' counters do not agree it may seem long when it was not.
        let pause = host_tsc().wrapping_sub(self.paused_at.load(Relaxed));
        if other || pause >= self.long_pause {
            let before = self.looks.load(SeqCst);
            self.deadline.set(Some(monotonic_ns()));
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
        self.in_use.store(true, Relaxed);
        // If it was in use the next look comes anyway, and finds it so.
        if !self.was_in_use.load(Relaxed) && !self.was_in_use.swap(true, SeqCst) {
            self.deadline.set(Some(monotonic_ns() + PERIOD_NS));
        }
    }

    /// The guest does not run for now.
    pub fn pause(&self) {
        self.paused_at.store(host_tsc(), Relaxed);
        self.in_use.store(false, Relaxed);
    }

    /// The run delay as it was last looked up.
    pub fn ns(&self) -> u64 {
        self.ns.load(SeqCst)
    }
}

/// `kvm_steal_time.version` begins here; `steal` is at 0.
const VERSION: u64 = 8;
/// `kvm_steal_time.preempted`.
const PREEMPTED: u64 = 16;

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

    /// The guest is about to go on: it is told what was stolen since the last time, and that it runs. True if its
    /// TLB is flushed, because another processor has left that to it.
    pub fn record_stolen_time(&self) -> bool {
        if !self.uses_steal_time() {
            return false;
        }
        if let Some(delay) = self.run_delay() {
            delay.go_on();
        }
        self.requests().take_steal_update() && self.update_steal_time()
    }

    /// `record_steal_time`.
    fn update_steal_time(&self) -> bool {
        let mut paravirt = self.paravirt();
        let Some(at) = paravirt.steal_time_address() else {
            return false;
        };
        let memory = self.vm().memory();
        let preempted = memory.exchange(at + PREEMPTED, 0).unwrap_or(0);
        let flush =
            preempted & KVM_VCPU_FLUSH_TLB != 0 && self.guest_may_use(KVM_FEATURE_PV_TLB_FLUSH);
        if flush {
            self.requests().kick.requests().set(TLB_FLUSH);
        }
        if let Some(delay) = self.run_delay() {
            let now = delay.ns();
            let before = paravirt.stolen_before.replace(now).unwrap_or(now);
            record(memory, at, now.saturating_sub(before));
        }
        flush
    }

    /// The guest does not go on for now.
    pub fn pause_stolen_time(&self) {
        if let Some(delay) = self.run_delay() {
            delay.pause();
        }
    }

    /// The guest does not go on for now, and is between two instructions: what another processor's TLB flush is
    /// about is not used until [`Self::record_stolen_time`] (`kvm_steal_time_set_preempted`). True if the guest is
    /// told.
    pub fn mark_preempted(&self) -> bool {
        // Marked already, perhaps with a flush asked for; or the byte has not been looked at yet.
        if self.run_delay().is_none() || self.requests().wants_steal_update() {
            return false;
        }
        let Some(at) = self.paravirt().steal_time_address() else {
            return false;
        };
        let memory = self.vm().memory();
        // An address that is not RAM is the guest's loss.
        let told = memory.write(at + PREEMPTED, &[KVM_VCPU_PREEMPTED]).is_ok();
        self.requests().request_steal_update();
        told
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
