//! Capabilities: what KVM_CHECK_EXTENSION reports (one table), and what KVM_ENABLE_CAP on the VM
//! switches on (KVM API, sections 4.4, 4.37, 7 and 8). What is not in the table is 0.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use anykvm_abi::*;

use crate::error::{Errno, Result};
use crate::irq::Controllers;
use crate::memory::{ADDRESS_SPACES, MEMORY_SLOTS};
use crate::nested;
use crate::vm::{MAX_VCPU_IDS, MAX_VCPUS, Vm};

/// A capability's value.
enum Value {
    Is(u32),
    /// Depends on the host.
    Of(fn() -> u32),
}
use Value::{Is, Of};

/// KVM_CAP_MCE: banks.
pub const MCE_BANKS: u32 = 32;
/// Quirks that can be turned off. CD_NW_CLEARED is about the cache mode that hardware takes from CR0, not
/// about what the guest reads there; there are no caches here, so turning it off is granted with nothing
/// to do.
const QUIRKS: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_CD_NW_CLEARED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;
const DISABLE_EXITS: u32 =
    KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_CSTATE;
const X2APIC_API: u32 = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
const MANUAL_PROTECT: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
const GUEST_DEBUG: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_BLOCKIRQ;

/// Every capability that is not 0.
const TABLE: &[(u32, Value)] = &[
    // Memory.
    (KVM_CAP_USER_MEMORY, Is(1)),
    (KVM_CAP_USER_MEMORY2, Is(1)),
    (KVM_CAP_NR_MEMSLOTS, Is(MEMORY_SLOTS)),
    (KVM_CAP_DESTROY_MEMORY_REGION_WORKS, Is(1)),
    (KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, Is(1)),
    (KVM_CAP_MULTI_ADDRESS_SPACE, Is(ADDRESS_SPACES as u32)),
    (KVM_CAP_READONLY_MEM, Is(1)),
    (KVM_CAP_SYNC_MMU, Is(1)),
    (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, Is(MANUAL_PROTECT)),
    (KVM_CAP_MMU_SHADOW_CACHE_CONTROL, Is(1)),
    (KVM_CAP_SET_TSS_ADDR, Is(1)),
    (KVM_CAP_SET_IDENTITY_MAP_ADDR, Is(1)),
    (KVM_CAP_COALESCED_MMIO, Is(KVM_COALESCED_MMIO_PAGE_OFFSET)),
    (KVM_CAP_COALESCED_PIO, Is(1)),
    (KVM_CAP_VM_TYPES, Is(1 << KVM_X86_DEFAULT_VM)),
    // Interrupt controllers and devices.
    (KVM_CAP_IRQCHIP, Is(1)),
    (KVM_CAP_SPLIT_IRQCHIP, Is(1)),
    (KVM_CAP_IRQ_ROUTING, Is(anykvm_irqchip::MAX_IRQ_ROUTES)),
    (KVM_CAP_IRQ_INJECT_STATUS, Is(1)),
    (KVM_CAP_SIGNAL_MSI, Is(1)),
    (KVM_CAP_IRQFD, Is(1)),
    (KVM_CAP_IRQFD_RESAMPLE, Is(1)),
    (KVM_CAP_IOEVENTFD, Is(1)),
    (KVM_CAP_IOEVENTFD_NO_LENGTH, Is(1)),
    (KVM_CAP_IOEVENTFD_ANY_LENGTH, Is(1)),
    (KVM_CAP_PIT, Is(1)),
    (KVM_CAP_PIT2, Is(1)),
    (KVM_CAP_PIT_STATE2, Is(1)),
    (KVM_CAP_REINJECT_CONTROL, Is(1)),
    (KVM_CAP_X2APIC_API, Is(X2APIC_API)),
    (KVM_CAP_IOAPIC_POLARITY_IGNORED, Is(1)),
    (KVM_CAP_TSC_DEADLINE_TIMER, Is(1)),
    (KVM_CAP_DEVICE_CTRL, Is(1)),
    (KVM_CAP_NOP_IO_DELAY, Is(1)),
    (KVM_CAP_PCI_SEGMENT, Is(1)),
    // vCPUs.
    (KVM_CAP_NR_VCPUS, Of(recommended_vcpus)),
    (KVM_CAP_MAX_VCPUS, Is(MAX_VCPUS as u32)),
    (KVM_CAP_MAX_VCPU_ID, Is(MAX_VCPU_IDS)),
    (KVM_CAP_SET_BOOT_CPU_ID, Is(1)),
    (KVM_CAP_HLT, Is(1)),
    (KVM_CAP_MP_STATE, Is(1)),
    (KVM_CAP_EXT_CPUID, Is(1)),
    (KVM_CAP_EXT_EMUL_CPUID, Is(1)),
    (KVM_CAP_GET_MSR_FEATURES, Is(1)),
    (KVM_CAP_MCE, Is(MCE_BANKS)),
    (KVM_CAP_USER_NMI, Is(1)),
    (KVM_CAP_VCPU_EVENTS, Is(1)),
    (KVM_CAP_INTR_SHADOW, Is(1)),
    (KVM_CAP_DEBUGREGS, Is(1)),
    (KVM_CAP_X86_ROBUST_SINGLESTEP, Is(1)),
    (KVM_CAP_SET_GUEST_DEBUG, Is(1)),
    (KVM_CAP_SET_GUEST_DEBUG2, Is(GUEST_DEBUG)),
    (KVM_CAP_XSAVE, Is(1)),
    (KVM_CAP_XSAVE2, Is(crate::xsave::REGION as u32)),
    (KVM_CAP_XCRS, Is(1)),
    (KVM_CAP_SYNC_REGS, Is(crate::run::SYNC_FIELDS as u32)),
    (KVM_CAP_VAPIC, Is(1)),
    (KVM_CAP_X86_SMM, Is(1)),
    (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, Is(1)),
    (KVM_CAP_VCPU_ATTRIBUTES, Is(1)),
    (KVM_CAP_ASYNC_PF, Is(1)),
    (KVM_CAP_ASYNC_PF_INT, Is(1)),
    (KVM_CAP_SREGS2, Is(1)),
    (KVM_CAP_IMMEDIATE_EXIT, Is(1)),
    (KVM_CAP_INTERNAL_ERROR_DATA, Is(1)),
    (KVM_CAP_EXCEPTION_PAYLOAD, Is(1)),
    (KVM_CAP_X86_TRIPLE_FAULT_EVENT, Is(1)),
    (KVM_CAP_EXIT_ON_EMULATION_FAILURE, Is(1)),
    (KVM_CAP_X86_DISABLE_EXITS, Is(DISABLE_EXITS)),
    (
        KVM_CAP_X86_USER_SPACE_MSR,
        Is(KVM_MSR_EXIT_REASON_VALID_MASK),
    ),
    (KVM_CAP_X86_MSR_FILTER, Is(1)),
    (KVM_CAP_MSR_PLATFORM_INFO, Is(1)),
    (KVM_CAP_DISABLE_QUIRKS, Is(1)),
    (KVM_CAP_DISABLE_QUIRKS2, Is(QUIRKS)),
    (KVM_CAP_HALT_POLL, Is(1)),
    // Time.
    (KVM_CAP_CLOCKSOURCE, Is(1)),
    (KVM_CAP_ADJUST_CLOCK, Is(crate::clock::VALID_FLAGS)),
    (KVM_CAP_KVMCLOCK_CTRL, Is(1)),
    (KVM_CAP_TSC_CONTROL, Is(1)),
    (KVM_CAP_VM_TSC_CONTROL, Is(1)),
    (KVM_CAP_GET_TSC_KHZ, Is(1)),
    // The API itself.
    (KVM_CAP_ENABLE_CAP, Is(1)),
    (KVM_CAP_ENABLE_CAP_VM, Is(1)),
    (KVM_CAP_CHECK_EXTENSION_VM, Is(1)),
    (KVM_CAP_BINARY_STATS_FD, Is(1)),
    (KVM_CAP_SYS_ATTRIBUTES, Is(1)),
    (KVM_CAP_NESTED_STATE, Is(nested::SIZE as u32)),
    (KVM_CAP_XEN_HVM, Is(KVM_XEN_HVM_CONFIG_HYPERCALL_MSR)),
];

/// As many as the host has processors; but four at least, which is what monitors assume if they are told
/// nothing (KVM API, 4.7).
fn recommended_vcpus() -> u32 {
    let host = std::thread::available_parallelism().map_or(1, |n| n.get());
    host.clamp(4, MAX_VCPUS) as u32
}

/// KVM_CHECK_EXTENSION; 0 for what there is not.
pub(crate) fn check_extension(capability: u64) -> i32 {
    let row = TABLE.iter().find(|(nr, _)| u64::from(*nr) == capability);
    row.map_or(0, |(_, value)| match value {
        Is(value) => *value as i32,
        Of(value) => value() as i32,
    })
}

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

    /// KVM_CAP_MAX_VCPU_ID: once, and before it matters.
    fn set_max_vcpu_id(&self, max: u64) -> Result<()> {
        let max = u32::try_from(max)
            .ok()
            .filter(|m| *m <= MAX_VCPU_IDS)
            .ok_or(Errno::EINVAL)?;
        let mut vcpus = self.lock_vcpus();
        match vcpus.max_id {
            Some(set) if set == max => Ok(()),
            None if !vcpus.any_created() => {
                vcpus.max_id = Some(max);
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_capability_once_and_not_zero() {
        for (i, (nr, _)) in TABLE.iter().enumerate() {
            assert!(
                TABLE[i + 1..].iter().all(|(other, _)| other != nr),
                "{nr} twice"
            );
            let optional = *nr == KVM_CAP_X86_SMM;
            assert!(optional || check_extension(u64::from(*nr)) > 0, "{nr} is 0");
        }
        assert_eq!(check_extension(0xffff), 0);
        assert_eq!(check_extension(u64::from(KVM_CAP_IRQCHIP) | 1 << 32), 0);
        assert_eq!(check_extension(u64::from(KVM_CAP_GUEST_MEMFD)), 0);
    }
}
