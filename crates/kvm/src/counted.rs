//! Running by count (`crate::time`): the vCPU stops between any two instructions its caller names, and
//! never waits. Part of the engine's interface for tests and tools, not of the KVM ABI.

use std::sync::atomic::{AtomicU64, Ordering};

use anykvm_cpu::CountedTime;

use crate::error::{Errno, Result};
use crate::machine::VcpuMachine;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// How far a vCPU may run.
#[derive(Debug)]
pub(crate) struct Limit {
    turns: AtomicU64,
    until_ns: AtomicU64,
}

impl Default for Limit {
    fn default() -> Self {
        Self {
            turns: AtomicU64::new(u64::MAX),
            until_ns: AtomicU64::new(u64::MAX),
        }
    }
}

impl Limit {
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    fn set(&self, turns: u64, until_ns: u64) {
        self.turns.store(turns, Ordering::Relaxed);
        self.until_ns.store(until_ns, Ordering::Relaxed);
    }
}

impl Vcpu {
    /// KVM_RUN by count. EINVAL unless the VM's time is counted.
    pub fn run_counted(&self, turns: u64, until_ns: u64) -> Result<()> {
        if !self.vm().time.is_counted() {
            return Err(Errno::EINVAL);
        }
        let limit = self.machine().limit();
        limit.set(turns, until_ns);
        let result = self.run();
        limit.set(u64::MAX, u64::MAX);
        result
    }
}

impl VcpuMachine {
    /// Time passes, and what is due then happens.
    pub(crate) fn count(&self, done: u64) -> Option<CountedTime> {
        let vm = self.vm();
        let now = vm.time.count(done)?;
        vm.events.expire();
        let until = self.limit().until_ns.load(Ordering::Relaxed);
        let next = vm.events.programmed().min(until);
        Some(CountedTime {
            host_tsc: now,
            stop: now >= until,
            most: vm.time.instructions_until(next).max(1),
        })
    }
}

impl Vm {
    /// The VM's clock, if time is counted.
    pub fn counted_ns(&self) -> Option<u64> {
        self.time.counted_tsc()
    }

    /// Lets time pass until the next timer is due, and the timer go off. False if no timer runs, or time is
    /// not counted.
    pub fn skip_to_next_timer(&self) -> bool {
        if !self.time.is_counted() {
            return false;
        }
        self.events.look();
        let next = self.events.next_deadline();
        if let Some(at) = next {
            self.time.skip_to(at);
            self.events.expire();
        }
        next.is_some()
    }
}
