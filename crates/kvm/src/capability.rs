//! What KVM_ENABLE_CAP on the VM switches on (KVM API, sections 4.37 and 7). Which capabilities there are is
//! told by [`crate::capability_table`].

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use anykvm_abi::*;

use crate::capability_table::{DISABLE_EXITS, EXIT_HYPERCALLS, MANUAL_PROTECT, QUIRKS, X2APIC_API};
use crate::error::{Errno, Result};
use crate::irq::Controllers;
use crate::vm::{MAX_VCPU_IDS, Vm};

/// What KVM_ENABLE_CAP has switched on for a VM.
#[derive(Debug)]
pub struct EnabledCapabilities {
    manual_dirty_log_protect: AtomicU64,
    disabled_quirks: AtomicU64,
    disabled_exits: AtomicU32,
    user_space_msr: AtomicU32,
    exception_payload: AtomicBool,
    triple_fault_event: AtomicBool,
    exit_on_emulation_failure: AtomicBool,
    msr_platform_info: AtomicBool,
    x2apic_api: AtomicU64,
    halt_poll_ns: AtomicU32,
    hypercall_exits: AtomicU32,
}

/// Linux's default for `halt_poll_ns`.
const HALT_POLL_NS: u32 = 200_000;

impl Default for EnabledCapabilities {
    fn default() -> Self {
        Self {
            manual_dirty_log_protect: AtomicU64::new(0),
            disabled_quirks: AtomicU64::new(0),
            disabled_exits: AtomicU32::new(0),
            user_space_msr: AtomicU32::new(0),
            exception_payload: AtomicBool::new(false),
            triple_fault_event: AtomicBool::new(false),
            exit_on_emulation_failure: AtomicBool::new(false),
            msr_platform_info: AtomicBool::new(true),
            x2apic_api: AtomicU64::new(0),
            halt_poll_ns: AtomicU32::new(HALT_POLL_NS),
            hypercall_exits: AtomicU32::new(0),
        }
    }
}

impl EnabledCapabilities {
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: `KVM_DIRTY_LOG_*`.
    pub fn manual_dirty_log_protect(&self) -> u64 {
        self.manual_dirty_log_protect.load(Relaxed)
    }
    /// KVM_CAP_DISABLE_QUIRKS(2): whether this `KVM_X86_QUIRK_*` behaviour is still there.
    pub fn has_quirk(&self, quirk: u32) -> bool {
        self.disabled_quirks.load(Relaxed) & u64::from(quirk) == 0
    }
    /// KVM_CAP_X86_DISABLE_EXITS: `KVM_X86_DISABLE_EXITS_*`.
    pub fn disabled_exits(&self) -> u32 {
        self.disabled_exits.load(Relaxed)
    }
    /// KVM_CAP_X86_USER_SPACE_MSR: `KVM_MSR_EXIT_REASON_*` that exit.
    pub fn user_space_msr(&self) -> u32 {
        self.user_space_msr.load(Relaxed)
    }
    /// KVM_CAP_EXCEPTION_PAYLOAD.
    pub fn exception_payload(&self) -> bool {
        self.exception_payload.load(Relaxed)
    }
    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT.
    pub fn triple_fault_event(&self) -> bool {
        self.triple_fault_event.load(Relaxed)
    }
    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    pub fn exit_on_emulation_failure(&self) -> bool {
        self.exit_on_emulation_failure.load(Relaxed)
    }
    /// KVM_CAP_MSR_PLATFORM_INFO: whether the guest may read MSR_PLATFORM_INFO.
    pub fn msr_platform_info(&self) -> bool {
        self.msr_platform_info.load(Relaxed)
    }
    /// KVM_CAP_X2APIC_API: `KVM_X2APIC_API_*`.
    pub fn x2apic_api(&self) -> u64 {
        self.x2apic_api.load(Relaxed)
    }
    /// KVM_CAP_EXIT_HYPERCALL: whether this `KVM_HC_*` is the monitor's.
    pub fn exits_on(&self, hypercall: u32) -> bool {
        self.hypercall_exits.load(Relaxed) >> hypercall & 1 != 0
    }
    /// KVM_CAP_HALT_POLL: how long a halted vCPU polls at most.
    pub fn halt_poll_ns(&self) -> u32 {
        self.halt_poll_ns.load(Relaxed)
    }
}

/// The argument, if it has no other bits than these.
fn bits(argument: u64, valid: u32) -> Result<u64> {
    if argument & !u64::from(valid) == 0 {
        Ok(argument)
    } else {
        Err(Errno::EINVAL)
    }
}

impl Vm {
    /// KVM_ENABLE_CAP on the VM.
    pub(crate) fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        if cap.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let enabled = &self.enabled;
        let argument = cap.args[0];
        match cap.cap {
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
                let enable = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
                let valid = if argument & enable != 0 {
                    MANUAL_PROTECT
                } else {
                    0
                };
                enabled
                    .manual_dirty_log_protect
                    .store(bits(argument, valid)?, Relaxed);
            }
            KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                self.enable_dirty_ring(argument)?;
            }
            KVM_CAP_HALT_POLL => {
                let ns = u32::try_from(argument).map_err(|_| Errno::EINVAL)?;
                enabled.halt_poll_ns.store(ns, Relaxed);
            }
            KVM_CAP_DISABLE_QUIRKS => self.disable_quirks(argument),
            KVM_CAP_DISABLE_QUIRKS2 => self.disable_quirks(bits(argument, QUIRKS)?),
            KVM_CAP_SPLIT_IRQCHIP => {
                let pins = u32::try_from(argument).map_err(|_| Errno::EINVAL)?;
                if pins > anykvm_irqchip::MAX_IRQ_ROUTES {
                    return Err(Errno::EINVAL);
                }
                // As Linux; KVM_CREATE_IRQCHIP, which is as late then, is EINVAL.
                if self.lock_vcpus().any_created() {
                    return Err(Errno::EEXIST);
                }
                self.create_controllers(Controllers::Split { ioapic_pins: pins })?;
            }
            KVM_CAP_X2APIC_API => {
                enabled
                    .x2apic_api
                    .fetch_or(bits(argument, X2APIC_API)?, Relaxed);
                self.apply_x2apic_api()?;
            }
            KVM_CAP_X86_DISABLE_EXITS => {
                let exits = bits(argument, DISABLE_EXITS)? as u32;
                if self.lock_vcpus().any_created() {
                    return Err(Errno::EINVAL);
                }
                enabled.disabled_exits.fetch_or(exits, Relaxed);
            }
            KVM_CAP_MSR_PLATFORM_INFO => enabled.msr_platform_info.store(argument != 0, Relaxed),
            KVM_CAP_EXCEPTION_PAYLOAD => enabled.exception_payload.store(argument != 0, Relaxed),
            KVM_CAP_X86_TRIPLE_FAULT_EVENT => {
                enabled.triple_fault_event.store(argument != 0, Relaxed);
            }
            KVM_CAP_X86_USER_SPACE_MSR => {
                let reasons = bits(argument, KVM_MSR_EXIT_REASON_VALID_MASK)?;
                enabled.user_space_msr.store(reasons as u32, Relaxed);
            }
            KVM_CAP_EXIT_ON_EMULATION_FAILURE => {
                enabled
                    .exit_on_emulation_failure
                    .store(bits(argument, 1)? != 0, Relaxed);
            }
            KVM_CAP_EXIT_HYPERCALL => {
                let hypercalls = bits(argument, EXIT_HYPERCALLS)? as u32;
                enabled.hypercall_exits.store(hypercalls, Relaxed);
            }
            // There are no huge pages that would have to be split.
            KVM_CAP_VM_DISABLE_NX_HUGE_PAGES => {
                if argument != 0 || self.lock_vcpus().any_created() {
                    return Err(Errno::EINVAL);
                }
            }
            KVM_CAP_MAX_VCPU_ID => self.set_max_vcpu_id(argument)?,
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn disable_quirks(&self, quirks: u64) {
        self.enabled.disabled_quirks.store(quirks, Relaxed);
        if let Some(chip) = self.irq.chip() {
            chip.disable_quirks(quirks);
        }
    }

    /// Hands what was enabled before the controllers existed to them.
    pub(crate) fn apply_x2apic_api(&self) -> Result<()> {
        let Some(chip) = self.irq.chip() else {
            return Ok(());
        };
        chip.disable_quirks(self.enabled.disabled_quirks.load(Relaxed));
        Ok(chip.set_x2apic_api(self.enabled.x2apic_api())?)
    }

    /// KVM_CAP_MAX_VCPU_ID: once, and before the first vCPU, which fixes it. 0 asks for nothing.
    fn set_max_vcpu_id(&self, max: u64) -> Result<()> {
        let max = u32::try_from(max)
            .ok()
            .filter(|m| *m <= MAX_VCPU_IDS)
            .ok_or(Errno::EINVAL)?;
        let mut vcpus = self.lock_vcpus();
        let fixed = vcpus.any_created().then_some(MAX_VCPU_IDS);
        match vcpus.max_id.or(fixed) {
            Some(set) if set == max => Ok(()),
            Some(_) => Err(Errno::EINVAL),
            None => {
                vcpus.max_id = (max != 0).then_some(max);
                Ok(())
            }
        }
    }
}
