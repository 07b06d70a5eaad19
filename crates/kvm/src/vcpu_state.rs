//! The state of a vCPU, group by group, as the ioctls of the same names read and write it: registers,
//! events, CPUID, MSRs, XSAVE. Checks come before the first change.

use anykvm_abi::{
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_X86_DISABLE_EXITS_HLT,
    kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2,
    kvm_translation, kvm_vcpu_events, kvm_xcrs,
};
use anykvm_cpu::Machine;
use anykvm_cpu::cpuid::Around;
use anykvm_cpu::events::MpState;
use anykvm_cpu::machine::Quirk;
use anykvm_cpu::requests::{EVENT, OWNER};
use anykvm_cpu::state::seg;

use crate::cpuid::{self, GuestCpuid};
use crate::error::{Errno, Result};
use crate::events::EventCapabilities;
use crate::machine::APIC_BASE_ENABLE;
use crate::msr::{self, Access};
use crate::registers::{self, ApicView};
use crate::vcpu::{Core, Vcpu};
use crate::vcpu_requests::{INIT, SIPI};
use crate::{events, xsave};

impl Vcpu {
    /// KVM_GET_REGS.
    pub fn regs(&self) -> kvm_regs {
        self.read(|core| registers::regs(&core.cpu.state))
    }

    /// KVM_SET_REGS.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.change_state(|s| {
            registers::set_regs(s, regs);
            Ok(())
        })
    }

    pub(crate) fn event_capabilities(&self) -> EventCapabilities {
        EventCapabilities {
            payload: self.vm().enabled().exception_payload(),
            triple_fault: self.vm().enabled().triple_fault_event(),
        }
    }

    pub(crate) fn apic_view(&self) -> ApicView {
        ApicView {
            cr8: self.machine().read_cr8(),
            apic_base: self.machine().apic_base(),
        }
    }

    /// CR2 and DR6 are read as KVM_GET_VCPU_EVENTS will leave them, whichever comes first
    /// (`kvm_handle_exception_payload_quirk`).
    fn deliver_payload(&self, core: &mut Core) {
        if !self.event_capabilities().payload {
            events::deliver_payload(&mut core.cpu.state);
        }
    }

    /// KVM_GET_SREGS.
    pub fn sregs(&self) -> kvm_sregs {
        self.read(|core| {
            self.deliver_payload(core);
            registers::sregs(&core.cpu.state, self.apic_view())
        })
    }

    /// KVM_GET_SREGS2.
    pub fn sregs2(&self) -> kvm_sregs2 {
        self.read(|core| {
            self.deliver_payload(core);
            registers::sregs2(&core.cpu.state, self.apic_view())
        })
    }

    /// KVM_SET_SREGS.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.change(|core| self.set_sregs_locked(core, sregs))
    }

    pub(crate) fn set_sregs_locked(&self, core: &mut Core, sregs: &kvm_sregs) -> Result<()> {
        self.set_sregs2_locked(core, &registers::as_sregs2(sregs))?;
        if let Some(vector) = registers::first_interrupt(&sregs.interrupt_bitmap) {
            let interrupt = &mut core.cpu.state.events.interrupt;
            interrupt.injected = true;
            interrupt.vector = vector;
            interrupt.soft = false;
        }
        Ok(())
    }

    /// KVM_SET_SREGS2.
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<()> {
        self.change(|core| {
            registers::check_sregs2_flags(sregs)?;
            self.set_sregs2_locked(core, sregs)
        })
    }

    fn set_sregs2_locked(&self, core: &mut Core, sregs: &kvm_sregs2) -> Result<()> {
        registers::check_sregs(sregs, &self.machine().cpuid())?;
        self.machine()
            .set_apic_base(sregs.apic_base, Access::Host)
            .map_err(|_| Errno::EINVAL)?;
        self.machine().store_cr8(sregs.cr8);
        let cpu = &mut core.cpu;
        registers::set_sregs(&mut cpu.state, sregs);
        if sregs.flags == 0 && registers::pae_paging(sregs.cr0, sregs.cr4, sregs.efer) {
            // The entries come from memory, as with MOV to CR3; where they are not RAM they stay.
            if let Some(pdptr) = cpu.with_memory(|cpu| cpu.load_pdptrs(sregs.cr3)) {
                cpu.state.pdptr = pdptr;
            }
        }
        // A VMM that resets a halted bootstrap processor expects it to run (Linux does the same).
        let cs = &cpu.state.seg[usize::from(seg::CS)];
        if self.is_boot()
            && cpu.state.rip() == 0xfff0
            && cs.selector == 0xf000
            && cs.base == 0xffff_0000
            && !cpu.state.protected()
        {
            cpu.state.events.mp_state = MpState::Runnable;
        }
        Ok(())
    }

    /// KVM_GET_FPU.
    pub fn fpu(&self) -> kvm_fpu {
        self.read(|core| registers::fpu(&core.cpu.state))
    }

    /// KVM_SET_FPU.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.change_state(|s| {
            registers::set_fpu(s, fpu);
            Ok(())
        })
    }

    /// KVM_GET_XSAVE and KVM_GET_XSAVE2: the area's bytes.
    pub fn xsave(&self) -> [u8; xsave::REGION] {
        self.read(|core| xsave::get(&core.cpu.state))
    }

    /// KVM_SET_XSAVE.
    pub fn set_xsave(&self, area: &[u8; xsave::REGION]) -> Result<()> {
        self.change_state(|s| xsave::set(s, area))
    }

    /// KVM_GET_XCRS.
    pub fn xcrs(&self) -> kvm_xcrs {
        self.read(|core| registers::xcrs(&core.cpu.state))
    }

    /// KVM_SET_XCRS.
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<()> {
        self.change_state(|s| registers::set_xcrs(s, xcrs, &self.machine().cpuid()))
    }

    /// KVM_GET_DEBUGREGS.
    pub fn debugregs(&self) -> kvm_debugregs {
        self.read(|core| {
            self.deliver_payload(core);
            registers::debugregs(&core.cpu.state)
        })
    }

    /// KVM_SET_DEBUGREGS.
    pub fn set_debugregs(&self, debugregs: &kvm_debugregs) -> Result<()> {
        self.change_state(|s| registers::set_debugregs(s, debugregs))
    }

    /// KVM_GET_VCPU_EVENTS.
    pub fn vcpu_events(&self) -> kvm_vcpu_events {
        self.read(|core| self.events_locked(core))
    }

    pub(crate) fn events_locked(&self, core: &mut Core) -> kvm_vcpu_events {
        let mut out = events::get(&mut core.cpu.state, self.event_capabilities());
        events::get_waiting_traps(&core.cpu, self.event_capabilities(), &mut out);
        let latched = core.cpu.state.events.smm && self.requests().apic_events() & INIT != 0;
        out.smi.latched_init |= u8::from(latched);
        out
    }

    /// KVM_SET_VCPU_EVENTS.
    pub fn set_vcpu_events(&self, new: &kvm_vcpu_events) -> Result<()> {
        self.change(|core| self.set_events_locked(core, new))
    }

    pub(crate) fn set_events_locked(&self, core: &mut Core, new: &kvm_vcpu_events) -> Result<()> {
        events::set(&mut core.cpu.state, new, self.event_capabilities())?;
        events::set_waiting_traps(&mut core.cpu);
        if self.machine().lapic().is_some() {
            if new.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 {
                self.requests().set_sipi_vector(new.sipi_vector as u8);
            }
            if new.flags & KVM_VCPUEVENT_VALID_SMM != 0 {
                let latched = new.smi.smm != 0 && new.smi.latched_init != 0;
                self.requests().set_apic_event(INIT, latched);
            }
        }
        Ok(())
    }

    /// KVM_GET_MP_STATE.
    pub fn mp_state(&self) -> u32 {
        self.read(|core| {
            self.accept_apic_events(core);
            match core.cpu.state.events.mp_state {
                MpState::Halted if self.requests().pv_unhalted() => MpState::Runnable as u32,
                state => state as u32,
            }
        })
    }

    /// KVM_SET_MP_STATE.
    pub fn set_mp_state(&self, value: u32) -> Result<()> {
        self.change(|core| {
            let new = events::mp_state(value).ok_or(Errno::EINVAL)?;
            if new != MpState::Runnable && self.machine().lapic().is_none() {
                return Err(Errno::EINVAL);
            }
            let e = &mut core.cpu.state.events;
            let starting = matches!(new, MpState::SipiReceived | MpState::InitReceived);
            if starting && (e.smm || e.smi_pending) {
                return Err(Errno::EINVAL);
            }
            if new == MpState::SipiReceived {
                e.mp_state = MpState::InitReceived;
                self.requests().set_apic_event(SIPI, true);
            } else {
                e.mp_state = new;
            }
            Ok(())
        })
    }

    /// Paravirtual features that the guest cannot have on this machine.
    fn hidden_features(&self) -> u32 {
        let disabled = self.vm().enabled().disabled_exits();
        if self.machine().lapic().is_none() {
            cpuid::NEED_APIC
        } else if disabled & KVM_X86_DISABLE_EXITS_HLT != 0 {
            cpuid::NEED_HLT_EXITS
        } else {
            0
        }
    }

    /// KVM_SET_CPUID2. Once the vCPU has run only the same data is taken.
    pub fn set_cpuid2(&self, entries: Vec<kvm_cpuid_entry2>) -> Result<()> {
        if entries.len() > cpuid::MAX_ENTRIES {
            return Err(Errno::E2BIG);
        }
        let new = GuestCpuid::new(entries, self.hidden_features())?;
        self.change(|core| {
            if core.has_run {
                let around = self.around_cpuid();
                let cpuid = self.machine().cpuid();
                let same = cpuid.same(&new, &core.cpu.state, around);
                return if same { Ok(()) } else { Err(Errno::EINVAL) };
            }
            core.cpu.set_cpuid(new.table().clone());
            self.machine().set_cpuid(new);
            Ok(())
        })
    }

    /// KVM_GET_CPUID2.
    pub fn cpuid2(&self) -> Vec<kvm_cpuid_entry2> {
        self.read(|core| {
            let cpuid = self.machine().cpuid();
            cpuid.entries_now(&core.cpu.state, self.around_cpuid())
        })
    }

    fn around_cpuid(&self) -> Around {
        let machine = self.machine();
        Around {
            apic_enabled: machine.apic_base() & APIC_BASE_ENABLE != 0,
            mwait_of_msr: !machine.has_quirk(Quirk::MwaitOfCpuid),
        }
    }

    /// KVM_GET_MSRS: fills in the values up to the first MSR there is not; returns how many.
    pub fn msrs(&self, entries: &mut [kvm_msr_entry]) -> usize {
        self.read(|core| {
            for (n, e) in entries.iter_mut().enumerate() {
                match msr::read(self.machine(), &core.cpu.state, e.index, Access::Host) {
                    Ok(value) => e.data = value,
                    Err(_) => return n,
                }
            }
            entries.len()
        })
    }

    /// KVM_SET_MSRS: writes up to the first that is refused; returns how many.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> usize {
        let done = self.change_state(|s| {
            let refused = entries.iter().position(|e| {
                msr::write(self.machine(), s, e.index, e.data, Access::Host).is_err()
            });
            Ok(refused.unwrap_or(entries.len()))
        });
        done.unwrap_or(0)
    }

    /// KVM_TRANSLATE.
    pub fn translate(&self, linear: u64) -> kvm_translation {
        let physical = self.read(|core| core.cpu.with_memory(|cpu| cpu.translate_debug(linear)));
        kvm_translation {
            linear_address: linear,
            physical_address: physical.unwrap_or(u64::MAX),
            // Without paging every address is its own; KVM says "none" by the highest.
            valid: physical.is_some_and(|p| p != u64::MAX).into(),
            writeable: 1,
            usermode: 0,
            ..Default::default()
        }
    }

    /// KVM_INTERRUPT: what user space's interrupt controllers inject.
    pub fn interrupt(&self, vector: u32) -> Result<()> {
        let vector = u8::try_from(vector).map_err(|_| Errno::EINVAL)?;
        if self.machine().pic_in_kernel() {
            return Err(Errno::ENXIO);
        }
        if let Some(lapic) = self.machine().lapic() {
            lapic.queue_external_interrupt(vector)?;
            self.kick().request(EVENT);
            return Ok(());
        }
        let mut core = self.lock();
        let interrupt = &mut core.cpu.state.events.interrupt;
        interrupt.injected = true;
        interrupt.vector = vector;
        interrupt.soft = false;
        self.kick().requests().set(EVENT);
        Ok(())
    }

    /// KVM_NMI.
    pub fn nmi(&self) {
        use anykvm_irqchip::VcpuEvents;
        self.requests().nmi();
    }

    /// KVM_SMI.
    pub fn smi(&self) {
        use anykvm_irqchip::VcpuEvents;
        self.requests().smi();
    }

    /// KVM_KVMCLOCK_CTRL: the guest is told that it was stopped.
    pub fn kvmclock_ctrl(&self) -> Result<()> {
        let _core = self.lock();
        if !self.machine().paravirt().set_guest_stopped() {
            return Err(Errno::EINVAL);
        }
        self.machine().request_clock_update();
        self.kick().requests().set(OWNER);
        Ok(())
    }

    /// KVM_GET_TSC_KHZ.
    pub fn tsc_khz(&self) -> u32 {
        self.machine().tsc_khz()
    }

    /// KVM_SET_TSC_KHZ; 0 is the host's frequency.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<()> {
        if khz >= crate::tsc::MAX_KHZ {
            return Err(Errno::EINVAL);
        }
        self.change_state(|s| {
            self.machine().set_tsc_khz(s, khz);
            Ok(())
        })
    }

    /// KVM_VCPU_TSC_OFFSET.
    pub fn tsc_offset(&self) -> u64 {
        self.read(|core| core.cpu.state.tsc_offset)
    }

    /// Sets KVM_VCPU_TSC_OFFSET.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<()> {
        self.change_state(|s| {
            self.machine().set_tsc_offset(s, offset);
            Ok(())
        })
    }
}
