//! KVM_SET_GUEST_DEBUG (KVM API, section 4.87): single-stepping, software and hardware breakpoints of a
//! debugger outside the guest, and exceptions it injects.

use anykvm_abi::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
};
use anykvm_cpu::events::{ExceptionEvent, vector};

use crate::capability_table::GUEST_DEBUG;
use crate::error::{Errno, Result};
use crate::vcpu::Vcpu;

impl Vcpu {
    /// KVM_SET_GUEST_DEBUG.
    pub fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<()> {
        let control = debug.control;
        if control & !GUEST_DEBUG != 0 {
            return Err(Errno::EINVAL);
        }
        self.change(|core| {
            let cpu = &mut core.cpu;
            if control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0 {
                let e = &mut cpu.state.events.exception;
                if e.pending || e.injected {
                    return Err(Errno::EBUSY);
                }
                let vector = if control & KVM_GUESTDBG_INJECT_DB != 0 {
                    vector::DB
                } else {
                    vector::BP
                };
                *e = ExceptionEvent {
                    pending: true,
                    vector,
                    ..Default::default()
                };
            }
            let on = |bit: u32| control & KVM_GUESTDBG_ENABLE != 0 && control & bit != 0;
            let guest_debug = &mut cpu.guest_debug;
            guest_debug.single_step = on(KVM_GUESTDBG_SINGLESTEP);
            guest_debug.software_breakpoints = on(KVM_GUESTDBG_USE_SW_BP);
            guest_debug.hardware_breakpoints = on(KVM_GUESTDBG_USE_HW_BP);
            guest_debug.block_irq = on(KVM_GUESTDBG_BLOCKIRQ);
            let registers = &debug.arch.debugreg;
            guest_debug.db = [registers[0], registers[1], registers[2], registers[3]];
            guest_debug.dr7 = registers[7];
            Ok(())
        })
    }
}
