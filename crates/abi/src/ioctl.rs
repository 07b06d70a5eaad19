//! The ioctl numbers of KVM on x86 (`KVMIO`, 0xAE), one table: [`TABLE`] names them for traces, and
//! each is a constant of its name. Encoded as `asm-generic/ioctl.h` says: direction, size of the
//! argument, type, number. Those that Linux has dropped are here too.

use kvm_bindings::*;

use crate::structs::{kvm_debug_guest, kvm_memory_alias, kvm_memory_region};

/// The type byte of every KVM ioctl.
pub const KVMIO: u32 = 0xae;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const READ_WRITE: u32 = 3;

const fn encode(direction: u32, nr: u32, size: usize) -> u32 {
    assert!(size < 1 << 14);
    direction << 30 | (size as u32) << 16 | KVMIO << 8 | nr
}

macro_rules! ioctls {
    ($($name:ident = $direction:ident $nr:literal $($arg:ty)?;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`")]
            pub const $name: u32 = encode($direction, $nr, 0 $(+ size_of::<$arg>())?);
        )*
        /// Every ioctl number with its name.
        pub const TABLE: &[(u32, &str)] = &[$(($name, stringify!($name))),*];
    };
}

ioctls! {
    // /dev/kvm
    KVM_GET_API_VERSION = NONE 0x00;
    KVM_CREATE_VM = NONE 0x01;
    KVM_GET_MSR_INDEX_LIST = READ_WRITE 0x02 kvm_msr_list;
    KVM_CHECK_EXTENSION = NONE 0x03;
    KVM_GET_VCPU_MMAP_SIZE = NONE 0x04;
    KVM_GET_SUPPORTED_CPUID = READ_WRITE 0x05 kvm_cpuid2;
    KVM_TRACE_ENABLE = WRITE 0x06 u32;
    KVM_TRACE_PAUSE = NONE 0x07;
    KVM_TRACE_DISABLE = NONE 0x08;
    KVM_GET_EMULATED_CPUID = READ_WRITE 0x09 kvm_cpuid2;
    KVM_GET_MSR_FEATURE_INDEX_LIST = READ_WRITE 0x0a kvm_msr_list;
    // VM
    KVM_SET_MEMORY_REGION = WRITE 0x40 kvm_memory_region;
    KVM_CREATE_VCPU = NONE 0x41;
    KVM_GET_DIRTY_LOG = WRITE 0x42 kvm_dirty_log;
    KVM_SET_MEMORY_ALIAS = WRITE 0x43 kvm_memory_alias;
    KVM_SET_NR_MMU_PAGES = NONE 0x44;
    KVM_GET_NR_MMU_PAGES = NONE 0x45;
    KVM_SET_USER_MEMORY_REGION = WRITE 0x46 kvm_userspace_memory_region;
    KVM_SET_TSS_ADDR = NONE 0x47;
    KVM_SET_IDENTITY_MAP_ADDR = WRITE 0x48 u64;
    KVM_SET_USER_MEMORY_REGION2 = WRITE 0x49 kvm_userspace_memory_region2;
    KVM_CREATE_IRQCHIP = NONE 0x60;
    KVM_IRQ_LINE = WRITE 0x61 kvm_irq_level;
    KVM_GET_IRQCHIP = READ_WRITE 0x62 kvm_irqchip;
    KVM_SET_IRQCHIP = READ 0x63 kvm_irqchip;
    KVM_CREATE_PIT = NONE 0x64;
    KVM_GET_PIT = READ_WRITE 0x65 kvm_pit_state;
    KVM_SET_PIT = READ 0x66 kvm_pit_state;
    KVM_IRQ_LINE_STATUS = READ_WRITE 0x67 kvm_irq_level;
    KVM_REGISTER_COALESCED_MMIO = WRITE 0x67 kvm_coalesced_mmio_zone;
    KVM_UNREGISTER_COALESCED_MMIO = WRITE 0x68 kvm_coalesced_mmio_zone;
    KVM_SET_GSI_ROUTING = WRITE 0x6a kvm_irq_routing;
    KVM_REINJECT_CONTROL = NONE 0x71;
    KVM_IRQFD = WRITE 0x76 kvm_irqfd;
    KVM_CREATE_PIT2 = WRITE 0x77 kvm_pit_config;
    KVM_SET_BOOT_CPU_ID = NONE 0x78;
    KVM_IOEVENTFD = WRITE 0x79 kvm_ioeventfd;
    KVM_XEN_HVM_CONFIG = WRITE 0x7a kvm_xen_hvm_config;
    KVM_SET_CLOCK = WRITE 0x7b kvm_clock_data;
    KVM_GET_CLOCK = READ 0x7c kvm_clock_data;
    KVM_GET_PIT2 = READ 0x9f kvm_pit_state2;
    KVM_SET_PIT2 = WRITE 0xa0 kvm_pit_state2;
    KVM_SIGNAL_MSI = WRITE 0xa5 kvm_msi;
    KVM_SET_PMU_EVENT_FILTER = WRITE 0xb2 kvm_pmu_event_filter;
    KVM_MEMORY_ENCRYPT_OP = READ_WRITE 0xba u64;
    KVM_MEMORY_ENCRYPT_REG_REGION = READ 0xbb kvm_enc_region;
    KVM_MEMORY_ENCRYPT_UNREG_REGION = READ 0xbc kvm_enc_region;
    KVM_HYPERV_EVENTFD = WRITE 0xbd kvm_hyperv_eventfd;
    KVM_CLEAR_DIRTY_LOG = READ_WRITE 0xc0 kvm_clear_dirty_log;
    KVM_X86_SET_MSR_FILTER = WRITE 0xc6 kvm_msr_filter;
    KVM_RESET_DIRTY_RINGS = NONE 0xc7;
    KVM_XEN_HVM_GET_ATTR = READ_WRITE 0xc8 kvm_xen_hvm_attr;
    KVM_XEN_HVM_SET_ATTR = WRITE 0xc9 kvm_xen_hvm_attr;
    KVM_XEN_HVM_EVTCHN_SEND = WRITE 0xd0 kvm_irq_routing_xen_evtchn;
    KVM_SET_MEMORY_ATTRIBUTES = WRITE 0xd2 kvm_memory_attributes;
    KVM_CREATE_GUEST_MEMFD = READ_WRITE 0xd4 kvm_create_guest_memfd;
    // devices; also on VM and vCPU
    KVM_CREATE_DEVICE = READ_WRITE 0xe0 kvm_create_device;
    KVM_SET_DEVICE_ATTR = WRITE 0xe1 kvm_device_attr;
    KVM_GET_DEVICE_ATTR = WRITE 0xe2 kvm_device_attr;
    KVM_HAS_DEVICE_ATTR = WRITE 0xe3 kvm_device_attr;
    // vCPU (some also on /dev/kvm or the VM)
    KVM_RUN = NONE 0x80;
    KVM_GET_REGS = READ 0x81 kvm_regs;
    KVM_SET_REGS = WRITE 0x82 kvm_regs;
    KVM_GET_SREGS = READ 0x83 kvm_sregs;
    KVM_SET_SREGS = WRITE 0x84 kvm_sregs;
    KVM_TRANSLATE = READ_WRITE 0x85 kvm_translation;
    KVM_INTERRUPT = WRITE 0x86 kvm_interrupt;
    KVM_DEBUG_GUEST = WRITE 0x87 kvm_debug_guest;
    KVM_GET_MSRS = READ_WRITE 0x88 kvm_msrs;
    KVM_SET_MSRS = WRITE 0x89 kvm_msrs;
    KVM_SET_CPUID = WRITE 0x8a kvm_cpuid;
    KVM_SET_SIGNAL_MASK = WRITE 0x8b kvm_signal_mask;
    KVM_GET_FPU = READ 0x8c kvm_fpu;
    KVM_SET_FPU = WRITE 0x8d kvm_fpu;
    KVM_GET_LAPIC = READ 0x8e kvm_lapic_state;
    KVM_SET_LAPIC = WRITE 0x8f kvm_lapic_state;
    KVM_SET_CPUID2 = WRITE 0x90 kvm_cpuid2;
    KVM_GET_CPUID2 = READ_WRITE 0x91 kvm_cpuid2;
    KVM_TPR_ACCESS_REPORTING = READ_WRITE 0x92 kvm_tpr_access_ctl;
    KVM_SET_VAPIC_ADDR = WRITE 0x93 kvm_vapic_addr;
    KVM_GET_MP_STATE = READ 0x98 kvm_mp_state;
    KVM_SET_MP_STATE = WRITE 0x99 kvm_mp_state;
    KVM_NMI = NONE 0x9a;
    KVM_SET_GUEST_DEBUG = WRITE 0x9b kvm_guest_debug;
    KVM_X86_SETUP_MCE = WRITE 0x9c u64;
    KVM_X86_GET_MCE_CAP_SUPPORTED = READ 0x9d u64;
    KVM_X86_SET_MCE = WRITE 0x9e kvm_x86_mce;
    KVM_GET_VCPU_EVENTS = READ 0x9f kvm_vcpu_events;
    KVM_SET_VCPU_EVENTS = WRITE 0xa0 kvm_vcpu_events;
    KVM_GET_DEBUGREGS = READ 0xa1 kvm_debugregs;
    KVM_SET_DEBUGREGS = WRITE 0xa2 kvm_debugregs;
    KVM_SET_TSC_KHZ = NONE 0xa2;
    KVM_GET_TSC_KHZ = NONE 0xa3;
    KVM_ENABLE_CAP = WRITE 0xa3 kvm_enable_cap;
    KVM_GET_XSAVE = READ 0xa4 kvm_xsave;
    KVM_SET_XSAVE = WRITE 0xa5 kvm_xsave;
    KVM_GET_XCRS = READ 0xa6 kvm_xcrs;
    KVM_SET_XCRS = WRITE 0xa7 kvm_xcrs;
    KVM_GET_ONE_REG = WRITE 0xab kvm_one_reg;
    KVM_SET_ONE_REG = WRITE 0xac kvm_one_reg;
    KVM_KVMCLOCK_CTRL = NONE 0xad;
    KVM_SMI = NONE 0xb7;
    KVM_GET_NESTED_STATE = READ_WRITE 0xbe kvm_nested_state;
    KVM_SET_NESTED_STATE = WRITE 0xbf kvm_nested_state;
    KVM_GET_SUPPORTED_HV_CPUID = READ_WRITE 0xc1 kvm_cpuid2;
    KVM_XEN_VCPU_GET_ATTR = READ_WRITE 0xca kvm_xen_vcpu_attr;
    KVM_XEN_VCPU_SET_ATTR = WRITE 0xcb kvm_xen_vcpu_attr;
    KVM_GET_SREGS2 = READ 0xcc kvm_sregs2;
    KVM_SET_SREGS2 = WRITE 0xcd kvm_sregs2;
    KVM_GET_STATS_FD = NONE 0xce;
    KVM_GET_XSAVE2 = READ 0xcf kvm_xsave;
    KVM_PRE_FAULT_MEMORY = READ_WRITE 0xd5 kvm_pre_fault_memory;
}

/// The ioctl's name, if it is one of KVM's.
pub fn name(request: u32) -> Option<&'static str> {
    TABLE
        .iter()
        .find(|(nr, _)| *nr == request)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_are_linuxs() {
        assert_eq!(KVM_GET_API_VERSION, 0xae00);
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_GET_SREGS, 0x8138_ae83);
        assert_eq!(KVM_GET_MSRS, 0xc008_ae88);
        assert_eq!(KVM_SET_CPUID2, 0x4008_ae90);
        assert_eq!(KVM_GET_XSAVE, 0x9000_aea4);
        assert_eq!(KVM_SET_MEMORY_REGION, 0x4018_ae40);
        assert_eq!(KVM_SET_MEMORY_ALIAS, 0x4020_ae43);
        assert_eq!(KVM_GET_LAPIC, 0x8400_ae8e);
        assert_eq!(KVM_SIGNAL_MSI, 0x4020_aea5);
        assert_eq!(KVM_SET_SIGNAL_MASK, 0x4004_ae8b);
        assert_eq!(KVM_GET_IRQCHIP, 0xc208_ae62);
        assert_eq!(KVM_X86_SET_MSR_FILTER, 0x4188_aec6);
    }

    #[test]
    fn names_are_found_and_numbers_unique() {
        let numbers: HashSet<u32> = TABLE.iter().map(|(nr, _)| *nr).collect();
        assert_eq!(numbers.len(), TABLE.len());
        assert_eq!(name(KVM_IRQFD), Some("KVM_IRQFD"));
        assert_eq!(name(0xae7f), None);
    }
}
