//! Where a VM's time comes from: the host's clocks, or a count of what its vCPUs have done.
//!
//! With counted time ([`CountedTime`], [`crate::Kvm::create_vm_with_counted_time`]) a run is the same each
//! time, and can be cut at any instruction. It is for tests and tools; no ioctl leads to it. The TSC, kvmclock, the APIC timers
//! and the PIT follow one clock, which stands still but for
//!
//! - each instruction a vCPU completes and each event it delivers, in [`crate::VcpuFd::run_counted`];
//! - [`crate::VmFd::skip_to_next_timer`], when all vCPUs wait.
//!
//! Nothing happens on another thread: timers and irqfds that are due are looked at between two
//! instructions of the vCPU that runs. The vCPUs of one VM run one at a time, as the caller lets them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anykvm_cpu::host_tsc;

use crate::clock::{self, HostTsc, monotonic_ns};

/// The TSC of counted time counts nanoseconds.
const COUNTED_TSC: HostTsc = HostTsc {
    khz: 1_000_000,
    stable: true,
};

/// What counted time begins with, and how fast it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountedTime {
    /// Nanoseconds on the clock at the beginning.
    pub start_ns: u64,
    /// Nanoseconds for each instruction and each event delivered.
    pub ns_per_instruction: u64,
}

/// A VM's time.
#[derive(Debug)]
pub(crate) struct Time {
    counted: Option<Counted>,
}

#[derive(Debug)]
struct Counted {
    now: AtomicU64,
    per_instruction: u64,
}

impl Time {
    /// The host's, or counted.
    pub fn new(counted: Option<CountedTime>) -> Arc<Self> {
        let counted = counted.map(|c| Counted {
            now: AtomicU64::new(c.start_ns),
            per_instruction: c.ns_per_instruction,
        });
        Arc::new(Self { counted })
    }

    /// Time is the host's, for who has no VM.
    #[cfg(test)]
    pub fn of_host() -> Arc<Self> {
        Self::new(None)
    }

    pub fn is_counted(&self) -> bool {
        self.counted.is_some()
    }

    fn counted_ns(&self) -> Option<u64> {
        let counted = self.counted.as_ref()?;
        Some(counted.now.load(Ordering::SeqCst))
    }

    /// Nanoseconds of the clock that timers and deadlines are in.
    pub fn ns(&self) -> u64 {
        self.counted_ns().unwrap_or_else(monotonic_ns)
    }

    /// The time-stamp counter that guests' counters are computed from.
    pub fn tsc(&self) -> u64 {
        self.counted_ns().unwrap_or_else(host_tsc)
    }

    /// The same where time is counted.
    pub fn counted_tsc(&self) -> Option<u64> {
        self.counted_ns()
    }

    /// The time of day, in nanoseconds since 1970.
    pub fn realtime_ns(&self) -> u64 {
        self.counted_ns().unwrap_or_else(clock::realtime_ns)
    }

    /// Both, at one moment as nearly as can be told.
    pub fn realtime_and_tsc(&self) -> (u64, u64) {
        match self.counted_ns() {
            Some(now) => (now, now),
            None => clock::simultaneous(clock::realtime_ns),
        }
    }

    /// That counter's frequency, and whether it tells the time.
    pub fn host_tsc(&self) -> HostTsc {
        match self.counted {
            Some(_) => COUNTED_TSC,
            None => clock::host(),
        }
    }

    /// A vCPU has completed so many instructions and deliveries: what time it is now, if time is counted.
    pub fn count(&self, done: u64) -> Option<u64> {
        let counted = self.counted.as_ref()?;
        let passed = done.saturating_mul(counted.per_instruction);
        let before = counted.now.fetch_add(passed, Ordering::SeqCst);
        Some(before.wrapping_add(passed))
    }

    /// Where time is counted: after how many instructions it is not before then any more.
    pub fn instructions_until(&self, ns: u64) -> u64 {
        let Some(counted) = &self.counted else {
            return 0;
        };
        let left = ns.saturating_sub(counted.now.load(Ordering::SeqCst));
        match counted.per_instruction {
            0 => u64::MAX,
            per => left.div_ceil(per),
        }
    }

    /// Lets time pass until then.
    pub fn skip_to(&self, ns: u64) {
        if let Some(counted) = &self.counted {
            counted.now.fetch_max(ns, Ordering::SeqCst);
        }
    }
}
