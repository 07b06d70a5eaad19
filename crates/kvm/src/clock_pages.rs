//! The guest's clock pages (`struct pvclock_vcpu_time_info`, one a vCPU;
//! `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_SYSTEM_TIME_NEW), and when they are written.
//!
//! A guest reads time by the page of any vCPU: Linux's vDSO uses that of the first one on all. So when the
//! clock or a TSC was set, all pages that are due are written before the first vCPU goes on, not each by its
//! own vCPU: else another one could read the old page, which runs ahead by the time that the guest was
//! stopped, and then the new one.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};

use crate::machine::VcpuMachine;
use crate::vm::Vm;

/// Which of a VM's clock pages are due.
#[derive(Debug, Default)]
pub(crate) struct ClockPages {
    /// Changes when a page becomes due; 0 when none is.
    due: AtomicU32,
    writing: Mutex<()>,
}

impl ClockPages {
    /// A page became due.
    pub fn request(&self) {
        // 0 is not a number of requests.
        if self.due.fetch_add(1, SeqCst) == u32::MAX {
            self.due.fetch_add(1, SeqCst);
        }
    }
}

impl Vm {
    /// Writes the pages that are due; none is when it returns. Each vCPU calls it before it goes on.
    pub(crate) fn write_clock_pages(&self) {
        let pages = &self.clock_pages;
        if pages.due.load(SeqCst) == 0 {
            return;
        }
        let _one = pages.writing.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let due = pages.due.load(SeqCst);
            if due == 0 {
                return;
            }
            for vcpu in self.vcpus() {
                vcpu.machine().write_clock_page();
            }
            let _ = pages.due.compare_exchange(due, 0, SeqCst, SeqCst);
        }
    }
}

impl VcpuMachine {
    /// Writes this vCPU's page, if it is due.
    pub fn write_clock_page(&self) {
        let vm = self.vm();
        let tsc = self.requests().tsc();
        let mut paravirt = self.paravirt();
        if paravirt.is_stale(vm.clock()) {
            paravirt.update_clock(tsc, vm.clock(), vm.memory());
        }
    }
}
