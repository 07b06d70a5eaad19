//! Every capability of the KVM API (`linux/kvm.h`), one table: its value, on which descriptor KVM_ENABLE_CAP
//! takes it, and what it stands for; or why it is absent, which KVM_CHECK_EXTENSION says with 0.

use anykvm_abi::*;

use crate::dirty_ring::MAX_RING_BYTES;
use crate::ioctl_table::ObjectKind;
use crate::memory::{ADDRESS_SPACES, MEMORY_SLOTS};
use crate::nested;
use crate::vm::{MAX_VCPU_IDS, MAX_VCPUS};

/// What KVM_CHECK_EXTENSION says of a capability.
#[derive(Clone, Copy, Debug)]
pub enum CapabilityValue {
    /// This number.
    Is(u32),
    /// A number that depends on the host.
    Of(fn() -> u32),
    /// 0.
    Absent,
}

/// One capability.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its number.
    pub nr: u32,
    /// As `linux/kvm.h` calls it.
    pub name: &'static str,
    /// Its value.
    pub value: CapabilityValue,
    /// The descriptor on which KVM_ENABLE_CAP takes it.
    pub enabled_on: Option<ObjectKind>,
    /// What it stands for; of an absent one, why it is.
    pub about: &'static str,
}

impl Capability {
    /// What KVM_CHECK_EXTENSION returns.
    pub fn value(&self) -> u32 {
        match self.value {
            CapabilityValue::Is(value) => value,
            CapabilityValue::Of(value) => value(),
            CapabilityValue::Absent => 0,
        }
    }
}

macro_rules! capability {
    ($name:ident, $value:expr, $enabled_on:expr, $about:literal) => {
        Capability {
            nr: $name,
            name: stringify!($name),
            value: $value,
            enabled_on: $enabled_on,
            about: $about,
        }
    };
}
macro_rules! has {
    ($name:ident, $about:literal) => {
        has!($name, 1, $about)
    };
    ($name:ident, $value:expr, $about:literal) => {
        capability!($name, CapabilityValue::Is($value), None, $about)
    };
}
/// To be enabled on the VM.
macro_rules! vm {
    ($name:ident, $value:expr, $about:literal) => {
        capability!(
            $name,
            CapabilityValue::Is($value),
            Some(ObjectKind::Vm),
            $about
        )
    };
}
/// To be enabled on a vCPU.
macro_rules! vcpu {
    ($name:ident, $about:literal) => {
        capability!(
            $name,
            CapabilityValue::Is(1),
            Some(ObjectKind::Vcpu),
            $about
        )
    };
}
macro_rules! absent {
    ($name:ident, $about:literal) => {
        capability!($name, CapabilityValue::Absent, None, $about)
    };
}

/// KVM_CAP_MCE: banks.
pub(crate) const MCE_BANKS: u32 = 32;
/// Quirks that can be turned off. CD_NW_CLEARED is about the cache mode that hardware takes from CR0, not
/// about what the guest reads there; there are no caches here, so turning it off is granted with nothing
/// to do.
pub(crate) const QUIRKS: u32 = KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_CD_NW_CLEARED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;
/// `KVM_X86_DISABLE_EXITS_*` there are.
pub(crate) const DISABLE_EXITS: u32 =
    KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_CSTATE;
/// `KVM_HC_*` that can be the monitor's.
pub(crate) const EXIT_HYPERCALLS: u32 = 1 << KVM_HC_MAP_GPA_RANGE;
/// `KVM_X2APIC_API_*` there are.
pub(crate) const X2APIC_API: u32 =
    KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
/// `KVM_DIRTY_LOG_*` there are.
pub(crate) const MANUAL_PROTECT: u32 =
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
/// `KVM_GUESTDBG_*` there are.
pub(crate) const GUEST_DEBUG: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_BLOCKIRQ;

/// Every capability of x86, in groups.
#[rustfmt::skip]
pub const CAPABILITIES: &[Capability] = &[
    // Memory.
    has!(KVM_CAP_USER_MEMORY, "memory slots over the monitor's memory"),
    has!(KVM_CAP_USER_MEMORY2, "KVM_SET_USER_MEMORY_REGION2"),
    has!(KVM_CAP_NR_MEMSLOTS, MEMORY_SLOTS, "slots of an address space"),
    has!(KVM_CAP_DESTROY_MEMORY_REGION_WORKS, "slots can be deleted"),
    has!(KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, "a new slot may cover what several deleted ones did"),
    has!(KVM_CAP_MULTI_ADDRESS_SPACE, ADDRESS_SPACES as u32, "address spaces: ordinary, and system-management mode"),
    has!(KVM_CAP_READONLY_MEM, "KVM_MEM_READONLY"),
    has!(KVM_CAP_SYNC_MMU, "slots follow what the monitor maps at their addresses"),
    vm!(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT, "KVM_DIRTY_LOG_*: the dirty log is cleared by KVM_CLEAR_DIRTY_LOG"),
    vm!(KVM_CAP_DIRTY_LOG_RING, MAX_RING_BYTES, "bytes of the largest dirty ring"),
    vm!(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, MAX_RING_BYTES, "the same, for monitors that order their accesses to it"),
    has!(KVM_CAP_MMU_SHADOW_CACHE_CONTROL, "KVM_SET_NR_MMU_PAGES is kept; there is no shadow MMU to limit"),
    has!(KVM_CAP_SET_TSS_ADDR, "KVM_SET_TSS_ADDR, for which there is no need"),
    has!(KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR, for which there is no need"),
    has!(KVM_CAP_COALESCED_MMIO, KVM_COALESCED_MMIO_PAGE_OFFSET, "page of the vCPU's mapping that is the ring"),
    has!(KVM_CAP_COALESCED_PIO, "port writes may be coalesced, too"),
    has!(KVM_CAP_VM_TYPES, 1 << KVM_X86_DEFAULT_VM | 1 << KVM_X86_SW_PROTECTED_VM, "bitmap of the arguments of KVM_CREATE_VM"),
    absent!(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, "all memory is written in the name of a vCPU; the same on Linux for x86"),
    has!(KVM_CAP_MEMORY_FAULT_INFO, "KVM_EXIT_MEMORY_FAULT, for private pages that there are not"),
    has!(KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE, "KVM_MEMORY_ATTRIBUTE_*; 0 on a VM whose pages cannot be private"),
    has!(KVM_CAP_GUEST_MEMFD, "KVM_CREATE_GUEST_MEMFD; 0 on a VM whose pages cannot be private"),
    absent!(KVM_CAP_PRE_FAULT_MEMORY, "guest memory has no second set of page tables to fill"),
    absent!(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT, "replaced by KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
    vm!(KVM_CAP_VM_DISABLE_NX_HUGE_PAGES, 1, "there are no huge pages that would be split, so nothing is to be switched off"),

    // Interrupt controllers and devices.
    has!(KVM_CAP_IRQCHIP, "PIC, I/O APIC and local APICs in KVM"),
    vm!(KVM_CAP_SPLIT_IRQCHIP, 1, "local APICs in KVM, the other controllers in the monitor"),
    has!(KVM_CAP_IRQ_ROUTING, anykvm_irqchip::MAX_IRQ_ROUTES, "entries of KVM_SET_GSI_ROUTING"),
    has!(KVM_CAP_IRQ_INJECT_STATUS, "KVM_IRQ_LINE_STATUS"),
    has!(KVM_CAP_SIGNAL_MSI, "KVM_SIGNAL_MSI"),
    has!(KVM_CAP_IRQFD, "KVM_IRQFD"),
    has!(KVM_CAP_IRQFD_RESAMPLE, "level-triggered irqfds"),
    has!(KVM_CAP_IOEVENTFD, "KVM_IOEVENTFD"),
    has!(KVM_CAP_IOEVENTFD_NO_LENGTH, "length 0: any, at MMIO addresses"),
    has!(KVM_CAP_IOEVENTFD_ANY_LENGTH, "length 0: any, at ports, too"),
    has!(KVM_CAP_PIT, "KVM_CREATE_PIT"),
    has!(KVM_CAP_PIT2, "KVM_CREATE_PIT2"),
    has!(KVM_CAP_PIT_STATE2, "KVM_GET_PIT2 and KVM_SET_PIT2"),
    has!(KVM_CAP_REINJECT_CONTROL, "KVM_REINJECT_CONTROL"),
    vm!(KVM_CAP_X2APIC_API, X2APIC_API, "KVM_X2APIC_API_*: 32-bit APIC ids, no broadcast quirk"),
    has!(KVM_CAP_IOAPIC_POLARITY_IGNORED, "KVM_IRQ_LINE ignores the polarity of the I/O APIC's pin"),
    has!(KVM_CAP_TSC_DEADLINE_TIMER, "the APIC timer's TSC-deadline mode"),
    has!(KVM_CAP_DEVICE_CTRL, "KVM_CREATE_DEVICE"),
    has!(KVM_CAP_NOP_IO_DELAY, "KVM_FEATURE_NOP_IO_DELAY"),
    has!(KVM_CAP_PCI_SEGMENT, "told to device assignment, which is VFIO's now"),
    absent!(KVM_CAP_X86_APIC_BUS_CYCLES_NS, "the APIC timer's clock is 1 GHz"),
    absent!(KVM_CAP_MSI_DEVID, "x86 has no device ids in MSIs"),
    absent!(KVM_CAP_IOMMU, "dropped from KVM"),
    absent!(KVM_CAP_ASSIGN_DEV_IRQ, "dropped from KVM"),
    absent!(KVM_CAP_PCI_2_3, "dropped from KVM"),

    // vCPUs.
    capability!(KVM_CAP_NR_VCPUS, CapabilityValue::Of(recommended_vcpus), None, "recommended number of vCPUs: the host's processors, 4 at least"),
    has!(KVM_CAP_MAX_VCPUS, MAX_VCPUS as u32, "most vCPUs of a VM"),
    vm!(KVM_CAP_MAX_VCPU_ID, MAX_VCPU_IDS, "vCPU ids are below this"),
    has!(KVM_CAP_SET_BOOT_CPU_ID, "KVM_SET_BOOT_CPU_ID"),
    has!(KVM_CAP_HLT, "KVM_EXIT_HLT"),
    has!(KVM_CAP_MP_STATE, "KVM_GET_MP_STATE and KVM_SET_MP_STATE"),
    has!(KVM_CAP_EXT_CPUID, "KVM_SET_CPUID2 and KVM_GET_SUPPORTED_CPUID"),
    has!(KVM_CAP_EXT_EMUL_CPUID, "KVM_GET_EMULATED_CPUID"),
    has!(KVM_CAP_GET_MSR_FEATURES, "KVM_GET_MSR_FEATURE_INDEX_LIST"),
    has!(KVM_CAP_MCE, MCE_BANKS, "machine-check banks"),
    has!(KVM_CAP_USER_NMI, "KVM_NMI"),
    has!(KVM_CAP_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS"),
    has!(KVM_CAP_INTR_SHADOW, "kvm_vcpu_events.interrupt.shadow"),
    has!(KVM_CAP_DEBUGREGS, "KVM_GET_DEBUGREGS and KVM_SET_DEBUGREGS"),
    has!(KVM_CAP_X86_ROBUST_SINGLESTEP, "KVM_GUESTDBG_SINGLESTEP survives interrupts"),
    has!(KVM_CAP_SET_GUEST_DEBUG, "KVM_SET_GUEST_DEBUG"),
    has!(KVM_CAP_SET_GUEST_DEBUG2, GUEST_DEBUG, "KVM_GUESTDBG_*"),
    has!(KVM_CAP_XSAVE, "KVM_GET_XSAVE and KVM_SET_XSAVE"),
    has!(KVM_CAP_XSAVE2, crate::xsave::REGION as u32, "bytes of KVM_GET_XSAVE2"),
    has!(KVM_CAP_XCRS, "KVM_GET_XCRS and KVM_SET_XCRS"),
    has!(KVM_CAP_SYNC_REGS, crate::run::SYNC_FIELDS as u32, "KVM_SYNC_X86_*: registers in kvm_run"),
    has!(KVM_CAP_VAPIC, "KVM_TPR_ACCESS_REPORTING and KVM_SET_VAPIC_ADDR"),
    has!(KVM_CAP_X86_SMM, "system-management mode"),
    vcpu!(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "a guest has the paravirtual features of its CPUID only"),
    has!(KVM_CAP_VCPU_ATTRIBUTES, "device attributes of a vCPU: the TSC's offset"),
    has!(KVM_CAP_ASYNC_PF, "MSR_KVM_ASYNC_PF_EN; a page fault of the host is never told to the guest"),
    has!(KVM_CAP_ASYNC_PF_INT, "MSR_KVM_ASYNC_PF_INT"),
    has!(KVM_CAP_SREGS2, "KVM_GET_SREGS2 and KVM_SET_SREGS2"),
    has!(KVM_CAP_IMMEDIATE_EXIT, "kvm_run.immediate_exit"),
    has!(KVM_CAP_INTERNAL_ERROR_DATA, "KVM_EXIT_INTERNAL_ERROR has data"),
    vm!(KVM_CAP_EXCEPTION_PAYLOAD, 1, "pending exceptions and their payloads in kvm_vcpu_events"),
    vm!(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1, "a pending triple fault in kvm_vcpu_events"),
    vm!(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, "an emulation failure is an exit also in user mode"),
    vm!(KVM_CAP_X86_DISABLE_EXITS, DISABLE_EXITS, "KVM_X86_DISABLE_EXITS_*"),
    vm!(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_VALID_MASK, "KVM_MSR_EXIT_REASON_*: accesses to MSRs that the monitor is asked about"),
    has!(KVM_CAP_X86_MSR_FILTER, "KVM_X86_SET_MSR_FILTER"),
    vm!(KVM_CAP_MSR_PLATFORM_INFO, 1, "whether the guest may read MSR_PLATFORM_INFO"),
    vm!(KVM_CAP_DISABLE_QUIRKS, 1, "switches off quirks, unknown ones without a word"),
    vm!(KVM_CAP_DISABLE_QUIRKS2, QUIRKS, "KVM_X86_QUIRK_*: switches off quirks"),
    vm!(KVM_CAP_HALT_POLL, 1, "nanoseconds a halted vCPU polls at most"),
    has!(KVM_CAP_NESTED_STATE, nested::SIZE as u32, "bytes of KVM_GET_NESTED_STATE, which says that there is none"),
    absent!(KVM_CAP_X86_GUEST_MODE, "no nested virtualisation"),
    vm!(KVM_CAP_EXIT_HYPERCALL, EXIT_HYPERCALLS, "bitmap of the hypercalls that the monitor performs: KVM_HC_MAP_GPA_RANGE"),
    absent!(KVM_CAP_PMU_EVENT_FILTER, "no performance counters"),
    absent!(KVM_CAP_PMU_EVENT_MASKED_EVENTS, "no performance counters"),
    absent!(KVM_CAP_PMU_CAPABILITY, "no performance counters"),
    absent!(KVM_CAP_LAST_CPU, "KVM_EXIT_FAIL_ENTRY is not given"),
    has!(KVM_CAP_SMALLER_MAXPHYADDR, "a guest's MAXPHYADDR may be smaller than the host's: its page tables are walked by it"),
    absent!(KVM_CAP_X86_BUS_LOCK_EXIT, "split and uncacheable locks are not told apart"),
    absent!(KVM_CAP_X86_NOTIFY_VMEXIT, "nothing can keep a processor from looking at events"),
    absent!(KVM_CAP_SGX_ATTRIBUTE, "no SGX"),
    absent!(KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, "no memory encryption"),
    absent!(KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, "no memory encryption"),
    absent!(KVM_CAP_PV_MMU, "dropped from KVM"),
    absent!(KVM_CAP_ONE_REG, "x86 state is read in groups"),
    absent!(KVM_CAP_SYSTEM_EVENT_DATA, "KVM_EXIT_SYSTEM_EVENT is not given"),

    // Time.
    has!(KVM_CAP_CLOCKSOURCE, "kvmclock"),
    has!(KVM_CAP_ADJUST_CLOCK, crate::clock::VALID_FLAGS, "KVM_CLOCK_*: KVM_GET_CLOCK and KVM_SET_CLOCK"),
    has!(KVM_CAP_KVMCLOCK_CTRL, "KVM_KVMCLOCK_CTRL"),
    has!(KVM_CAP_TSC_CONTROL, "KVM_SET_TSC_KHZ"),
    has!(KVM_CAP_VM_TSC_CONTROL, "KVM_SET_TSC_KHZ and KVM_GET_TSC_KHZ on the VM"),
    has!(KVM_CAP_GET_TSC_KHZ, "KVM_GET_TSC_KHZ"),
    capability!(KVM_CAP_STEAL_TIME, CapabilityValue::Of(steal_time), None, "MSR_KVM_STEAL_TIME, where the host counts run delay"),
    absent!(KVM_CAP_PTP_KVM, "Arm's; x86 guests use KVM_HC_CLOCK_PAIRING"),

    // The API itself.
    has!(KVM_CAP_ENABLE_CAP, "KVM_ENABLE_CAP on a vCPU"),
    has!(KVM_CAP_ENABLE_CAP_VM, "KVM_ENABLE_CAP on the VM"),
    has!(KVM_CAP_CHECK_EXTENSION_VM, "KVM_CHECK_EXTENSION on the VM"),
    has!(KVM_CAP_BINARY_STATS_FD, "KVM_GET_STATS_FD"),
    has!(KVM_CAP_SYS_ATTRIBUTES, "device attributes of /dev/kvm: KVM_X86_XCOMP_GUEST_SUPP"),
    absent!(KVM_CAP_VM_ATTRIBUTES, "no device attributes of a VM"),

    // Xen and Hyper-V.
    has!(KVM_CAP_XEN_HVM, KVM_XEN_HVM_CONFIG_HYPERCALL_MSR, "KVM_XEN_HVM_CONFIG_*: the hypercall page"),
    absent!(KVM_CAP_HYPERV, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_VAPIC, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_SPIN, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_TIME, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_SYNIC, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_SYNIC2, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_VP_INDEX, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_EVENTFD, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_TLBFLUSH, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_SEND_IPI, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_CPUID, "no Hyper-V interface"),
    absent!(KVM_CAP_SYS_HYPERV_CPUID, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_ENFORCE_CPUID, "no Hyper-V interface"),
    absent!(KVM_CAP_HYPERV_ENLIGHTENED_VMCS, "no nested virtualisation"),
    absent!(KVM_CAP_HYPERV_DIRECT_TLBFLUSH, "no nested virtualisation"),
];

#[cfg(test)]
macro_rules! names {
    ($($name:ident)*) => {
        &[$(($name, stringify!($name))),*]
    };
}

/// Capabilities of other architectures.
#[cfg(test)]
#[rustfmt::skip]
pub(crate) const FOREIGN: &[(&str, &[(u32, &str)])] = &[
    ("Arm", names! {
        KVM_CAP_ARM_PSCI KVM_CAP_ARM_SET_DEVICE_ADDR KVM_CAP_ARM_EL1_32BIT KVM_CAP_ARM_PSCI_0_2
        KVM_CAP_GUEST_DEBUG_HW_BPS KVM_CAP_GUEST_DEBUG_HW_WPS KVM_CAP_ARM_PMU_V3
        KVM_CAP_ARM_USER_IRQ KVM_CAP_ARM_INJECT_SERROR_ESR KVM_CAP_ARM_VM_IPA_SIZE KVM_CAP_ARM_SVE
        KVM_CAP_ARM_PTRAUTH_ADDRESS KVM_CAP_ARM_PTRAUTH_GENERIC KVM_CAP_ARM_IRQ_LINE_LAYOUT_2
        KVM_CAP_ARM_NISV_TO_USER KVM_CAP_ARM_INJECT_EXT_DABT KVM_CAP_ARM_MTE KVM_CAP_VM_GPA_BITS
        KVM_CAP_ARM_SYSTEM_SUSPEND KVM_CAP_COUNTER_OFFSET KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE
        KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES
        KVM_CAP_ARM_WRITABLE_IMP_ID_REGS
    }),
    ("MIPS", names! {
        KVM_CAP_MIPS_FPU KVM_CAP_MIPS_MSA KVM_CAP_MIPS_VZ KVM_CAP_MIPS_TE KVM_CAP_MIPS_64BIT
    }),
    ("PowerPC", names! {
        KVM_CAP_PPC_SEGSTATE KVM_CAP_PPC_PAIRED_SINGLES KVM_CAP_PPC_OSI KVM_CAP_PPC_UNSET_IRQ
        KVM_CAP_PPC_GET_PVINFO KVM_CAP_PPC_IRQ_LEVEL KVM_CAP_PPC_BOOKE_SREGS KVM_CAP_SPAPR_TCE
        KVM_CAP_PPC_SMT KVM_CAP_PPC_RMA KVM_CAP_PPC_HIOR KVM_CAP_PPC_PAPR KVM_CAP_SW_TLB
        KVM_CAP_PPC_GET_SMMU_INFO KVM_CAP_PPC_ALLOC_HTAB KVM_CAP_PPC_BOOKE_WATCHDOG
        KVM_CAP_PPC_HTAB_FD KVM_CAP_PPC_EPR KVM_CAP_IRQ_MPIC KVM_CAP_PPC_RTAS KVM_CAP_IRQ_XICS
        KVM_CAP_SPAPR_MULTITCE KVM_CAP_PPC_FIXUP_HCALL KVM_CAP_PPC_ENABLE_HCALL KVM_CAP_PPC_HWRNG
        KVM_CAP_SPAPR_TCE_64 KVM_CAP_PPC_HTM KVM_CAP_SPAPR_RESIZE_HPT KVM_CAP_PPC_MMU_RADIX
        KVM_CAP_PPC_MMU_HASH_V3 KVM_CAP_SPAPR_TCE_VFIO KVM_CAP_PPC_FWNMI KVM_CAP_PPC_SMT_POSSIBLE
        KVM_CAP_PPC_GET_CPU_CHAR KVM_CAP_PPC_NESTED_HV KVM_CAP_PPC_IRQ_XIVE
        KVM_CAP_PPC_GUEST_DEBUG_SSTEP KVM_CAP_PPC_SECURE_GUEST KVM_CAP_PPC_DAWR1
        KVM_CAP_PPC_RPT_INVALIDATE KVM_CAP_PPC_AIL_MODE_3
    }),
    ("s390", names! {
        KVM_CAP_S390_PSW KVM_CAP_S390_GMAP KVM_CAP_S390_UCONTROL KVM_CAP_S390_COW
        KVM_CAP_S390_CSS_SUPPORT KVM_CAP_S390_IRQCHIP KVM_CAP_S390_USER_SIGP
        KVM_CAP_S390_VECTOR_REGISTERS KVM_CAP_S390_MEM_OP KVM_CAP_S390_USER_STSI KVM_CAP_S390_SKEYS
        KVM_CAP_S390_INJECT_IRQ KVM_CAP_S390_IRQ_STATE KVM_CAP_S390_RI KVM_CAP_S390_USER_INSTR0
        KVM_CAP_S390_GS KVM_CAP_S390_AIS KVM_CAP_S390_CMMA_MIGRATION KVM_CAP_S390_AIS_MIGRATION
        KVM_CAP_S390_BPB KVM_CAP_S390_HPAGE_1M KVM_CAP_S390_VCPU_RESETS KVM_CAP_S390_PROTECTED
        KVM_CAP_S390_DIAG318 KVM_CAP_S390_MEM_OP_EXTENSION KVM_CAP_S390_PROTECTED_DUMP
        KVM_CAP_S390_ZPCI_OP KVM_CAP_S390_CPU_TOPOLOGY KVM_CAP_S390_PROTECTED_ASYNC_DISABLE
    }),
];

/// As many as the host has processors; but four at least, which is what monitors assume if they are told
/// nothing (KVM API, 4.7).
fn recommended_vcpus() -> u32 {
    let host = std::thread::available_parallelism().map_or(1, |n| n.get());
    host.clamp(4, MAX_VCPUS) as u32
}

fn steal_time() -> u32 {
    crate::steal_time::is_measured().into()
}

/// KVM_CHECK_EXTENSION; 0 for what there is not.
pub(crate) fn check_extension(capability: u64) -> i32 {
    let row = CAPABILITIES
        .iter()
        .find(|row| u64::from(row.nr) == capability);
    row.map_or(0, |row| row.value() as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Numbers that `linux/kvm.h` leaves out: of device assignment, and never used.
    const UNUSED: [u32; 6] = [5, 17, 19, 20, 27, 28];
    /// The highest number of `kvm_bindings`.
    const LAST: u32 = KVM_CAP_ARM_WRITABLE_IMP_ID_REGS;

    #[test]
    fn each_number_once() {
        let foreign = FOREIGN.iter().flat_map(|(_, rows)| *rows);
        let all: Vec<u32> = foreign
            .map(|(nr, _)| *nr)
            .chain(CAPABILITIES.iter().map(|row| row.nr))
            .chain(UNUSED)
            .collect();
        let set: HashSet<u32> = all.iter().copied().collect();
        assert_eq!(set.len(), all.len(), "a number stands twice");
        let missing: Vec<u32> = (0..=LAST).filter(|nr| !set.contains(nr)).collect();
        assert_eq!(missing, []);
    }

    #[test]
    fn absent_is_0_and_nothing_else_is() {
        for row in CAPABILITIES {
            let absent = matches!(row.value, CapabilityValue::Absent);
            assert_eq!(row.value() == 0, absent, "{}", row.name);
            assert_eq!(check_extension(row.nr.into()), row.value() as i32);
            assert!(!absent || row.enabled_on.is_none(), "{}", row.name);
        }
        assert_eq!(check_extension(0xffff), 0);
        assert_eq!(check_extension(u64::from(KVM_CAP_IRQCHIP) | 1 << 32), 0);
    }
}
