//! The local APIC as the VMM sees it (KVM API: KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_VAPIC_ADDR,
//! KVM_TPR_ACCESS_REPORTING).
//!
//! The TPR shadow ("vapic") is four bytes of guest memory that a guest patched by QEMU's option ROM
//! reads and writes in place of the task-priority register: its low byte is the TPR, byte 1 the class of
//! the highest vector in service, byte 3 the highest vector requested.

use anykvm_abi::{kvm_lapic_state, kvm_tpr_access_ctl};
use anykvm_cpu::requests::EVENT;

use crate::error::{Errno, Result};
use crate::vcpu::{Core, Vcpu};

impl Vcpu {
    /// KVM_GET_LAPIC.
    pub fn lapic_state(&self) -> Result<kvm_lapic_state> {
        let lapic = self.machine().lapic().ok_or(Errno::EINVAL)?;
        Ok(self.read(|_| lapic.state()))
    }

    /// KVM_SET_LAPIC.
    pub fn set_lapic_state(&self, state: &kvm_lapic_state) -> Result<()> {
        let lapic = self.machine().lapic().ok_or(Errno::EINVAL)?;
        self.change(|_| Ok(lapic.set_state(state)?))
    }

    /// KVM_TPR_ACCESS_REPORTING: accesses to the TPR end KVM_RUN with KVM_EXIT_TPR_ACCESS.
    pub fn tpr_access_reporting(&self, control: &kvm_tpr_access_ctl) -> Result<()> {
        if control.flags != 0 {
            return Err(Errno::EINVAL);
        }
        self.machine().set_report_tpr(control.enabled != 0);
        Ok(())
    }

    /// KVM_SET_VAPIC_ADDR; 0 switches the shadow off.
    pub fn set_vapic_addr(&self, gpa: u64) -> Result<()> {
        if self.machine().lapic().is_none() {
            return Err(Errno::EINVAL);
        }
        let mut core = self.lock();
        if gpa != 0 {
            // It must be RAM.
            let mut probe = [0; 4];
            self.vm()
                .memory()
                .read(gpa, &mut probe)
                .map_err(|_| Errno::EINVAL)?;
        }
        core.vapic_addr = gpa;
        Ok(())
    }

    /// Takes the TPR from the shadow and writes the priorities back
    /// (`kvm_lapic_sync_from_vapic`, `kvm_lapic_sync_to_vapic`).
    pub(crate) fn sync_vapic(&self, core: &mut Core) {
        let Some(lapic) = self.machine().lapic() else {
            return;
        };
        let memory = self.vm().memory();
        let mut shadow = [0; 4];
        if memory.read(core.vapic_addr, &mut shadow).is_err() {
            return;
        }
        if shadow[0] != lapic.tpr() {
            lapic.set_tpr(shadow[0]);
            self.kick().requests().set(EVENT);
        }
        let isr = lapic.highest_isr().unwrap_or(0) & 0xf0;
        let irr = lapic.highest_irr().unwrap_or(0);
        let now = [shadow[0], isr, 0, irr];
        if now != shadow {
            // It was RAM a moment ago; if it is no more the guest loses its shadow.
            let _ = memory.write(core.vapic_addr, &now);
        }
    }
}
