//! A vCPU that does not run: HLT with an in-kernel local APIC or without HLT exits, waiting for INIT and SIPI (Linux:
//! `vcpu_block`, `kvm_apic_accept_events`; SDM Vol. 3, 10.4 and 9.4).
//!
//! HLT polls for an event for a time that adapts to how soon events have come (as
//! `halt_poll_ns`), then sleeps on the requests word until a request, or the APIC timer's deadline.

use anykvm_cpu::Machine;
use anykvm_cpu::events::MpState;
use anykvm_cpu::requests::{EVENT, KICK, OWNER};
use anykvm_cpu::state::{reg, rflags, seg};

use crate::error::{Errno, Result};
use crate::machine::collect_events;
use crate::vcpu::{Core, Vcpu};
use crate::vcpu_requests::{INIT, SIPI};
use crate::vcpu_stats::VcpuStat;

/// The longest poll.
const POLL_MAX_NS: u64 = 50_000;
/// The first poll, when events have begun to come soon.
const POLL_START_NS: u64 = 10_000;
/// A halt that ended sooner than this makes the next poll longer; one that took much longer, none.
const SHORT_HALT_NS: u64 = 100_000;

impl Vcpu {
    /// An application processor before its first INIT: waits for it and returns EAGAIN, as KVM does;
    /// the next KVM_RUN then waits for the SIPI.
    pub(crate) fn wait_for_init(&self, core: &mut Core) -> Result<u32> {
        if self.machine().run().immediate_exit() != 0 {
            return Err(Errno::EINTR);
        }
        while self.requests().apic_events() == 0 {
            if self.kick().requests().take(KICK) != 0 {
                return Err(Errno::EINTR);
            }
            self.kick().requests().take(EVENT | OWNER);
            if self.requests().apic_events() == 0 {
                if self.vm().time.is_counted() {
                    return Err(Errno::EAGAIN);
                }
                self.kick().sleep(None);
            }
        }
        self.accept_apic_events(core);
        Err(Errno::EAGAIN)
    }

    /// Waits until the vCPU may run again.
    pub(crate) fn block(&self, core: &mut Core) -> Result<()> {
        let time = self.vm().time.clone();
        let began = time.ns();
        core.halt_poll_ns = core.halt_poll_ns.min(self.longest_poll());
        let mut slept = false;
        loop {
            if self.kick().requests().take(KICK) != 0 {
                core.cpu.new_epoch();
                return Err(Errno::EINTR);
            }
            // Taken before the look: what comes after it changes the word and ends the sleep.
            self.kick().requests().take(EVENT | OWNER);
            self.machine().deliver_timer();
            if self.wakes(core) {
                break;
            }
            if self.vm().time.is_counted() {
                // Only the caller can let time pass, or other vCPUs run.
                return Err(Errno::EAGAIN);
            }
            let waited = time.ns().wrapping_sub(began);
            if waited < core.halt_poll_ns && !slept {
                std::hint::spin_loop();
                continue;
            }
            if !slept {
                self.machine().pause_stolen_time();
            }
            slept = true;
            crate::vcpu_stats::publish(self.stats(), &core.cpu);
            self.count(VcpuStat::HaltSleeps);
            let deadline = self.machine().lapic().and_then(|l| l.next_deadline());
            self.kick().sleep(deadline);
        }
        self.adapt_poll(core, time.ns().wrapping_sub(began), slept);
        self.requests().clear_pv_unhalted();
        if core.cpu.state.events.mp_state == MpState::Halted {
            core.cpu.state.events.mp_state = MpState::Runnable;
        }
        self.accept_apic_events(core);
        self.kick().requests().set(EVENT);
        Ok(())
    }

    /// Nanoseconds that monitor and guest let it poll (KVM_CAP_HALT_POLL, MSR_KVM_POLL_CONTROL).
    fn longest_poll(&self) -> u64 {
        if self.machine().paravirt().may_poll() {
            POLL_MAX_NS.min(self.vm().enabled().halt_poll_ns().into())
        } else {
            0
        }
    }

    fn adapt_poll(&self, core: &mut Core, halted_ns: u64, slept: bool) {
        if !slept {
            if core.halt_poll_ns > 0 {
                self.count(VcpuStat::HaltSuccessfulPoll);
            }
        } else if halted_ns < SHORT_HALT_NS {
            let longer = (core.halt_poll_ns * 2).max(POLL_START_NS);
            core.halt_poll_ns = longer.min(self.longest_poll());
        } else {
            core.halt_poll_ns = 0;
        }
    }

    /// Whether there is an event that ends the wait (`kvm_vcpu_has_events`).
    fn wakes(&self, core: &mut Core) -> bool {
        collect_events(self.requests(), &mut core.cpu.state);
        let apic_events = self.requests().apic_events();
        let state = &core.cpu.state;
        let e = &state.events;
        if apic_events & INIT != 0 && !e.smm {
            return true;
        }
        match e.mp_state {
            MpState::InitReceived => apic_events & SIPI != 0,
            MpState::Halted => {
                let open = state.rflags & rflags::IF != 0 && e.shadow == 0;
                self.requests().pv_unhalted()
                    || e.exception.pending
                    || e.exception.injected
                    || e.interrupt.injected
                    || e.nmi_injected
                    || e.triple_fault
                    || e.nmi_pending > 0 && !e.nmi_masked
                    || e.smi_pending && !e.smm
                    || open && self.machine().interrupt_pending()
                    || open && self.machine().wants_interrupt_window()
            }
            _ => true,
        }
    }

    /// INIT and SIPI that arrived (`kvm_apic_accept_events`). In SMM INIT is kept until it ends, and
    /// a SIPI counts only for a vCPU that waits for it.
    pub(crate) fn accept_apic_events(&self, core: &mut Core) {
        if self.requests().apic_events() == 0 {
            return;
        }
        if core.cpu.state.events.smm {
            self.requests().take_apic_event(SIPI);
            return;
        }
        if self.requests().take_apic_event(INIT) {
            self.reset_by_init(core);
            core.cpu.state.events.mp_state = if self.is_boot() {
                MpState::Runnable
            } else {
                MpState::InitReceived
            };
        }
        if self.requests().take_apic_event(SIPI)
            && core.cpu.state.events.mp_state == MpState::InitReceived
        {
            let vector = self.requests().sipi_vector();
            let state = &mut core.cpu.state;
            let cs = &mut state.seg[usize::from(seg::CS)];
            cs.selector = u16::from(vector) << 8;
            cs.base = u64::from(vector) << 12;
            state.set_rip(0);
            state.events.sipi_vector = vector;
            state.events.mp_state = MpState::Runnable;
        }
        core.cpu.state_changed();
    }

    /// INIT: processor and local APIC to their initial state, the pending I/O forgotten.
    fn reset_by_init(&self, core: &mut Core) {
        // What has arrived is forgotten with what is pending, whether it has been looked at or not.
        collect_events(self.requests(), &mut core.cpu.state);
        core.cpu.state.init();
        if let Some(signature) = self.machine().cpuid().signature() {
            core.cpu.state.regs[reg::RDX] = signature.into();
        }
        core.cpu.io.clear();
        core.completion = crate::run::Completion::None;
        if let Some(lapic) = self.machine().lapic() {
            lapic.reset(true);
        }
        self.machine().reset_paravirt();
    }
}
