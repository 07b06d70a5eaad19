//! Every ioctl of the KVM API (`linux/kvm.h`), one table: on which descriptor it is issued, whether it works,
//! and if not, which errno answers it and why. `docs/api.md` and the tests are made from it; the objects look
//! here for the answer to a request that they do not serve.

use std::fmt;

use anykvm_abi::ioctl::*;

use crate::error::Errno;

/// What a descriptor of the KVM API stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// `/dev/kvm`.
    System,
    /// A VM, from KVM_CREATE_VM.
    Vm,
    /// A vCPU, from KVM_CREATE_VCPU.
    Vcpu,
    /// A device, from KVM_CREATE_DEVICE.
    Device,
    /// Statistics, from KVM_GET_STATS_FD.
    Stats,
    /// Private memory, from KVM_CREATE_GUEST_MEMFD.
    GuestMemfd,
}

impl ObjectKind {
    /// The answer to a request that is no ioctl of this object, as Linux gives it.
    pub const fn unknown(self) -> Errno {
        match self {
            Self::System | Self::Vcpu => Errno::EINVAL,
            Self::Vm | Self::Device | Self::Stats | Self::GuestMemfd => Errno::ENOTTY,
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::System => "system",
            Self::Vm => "vm",
            Self::Vcpu => "vcpu",
            Self::Device => "device",
            Self::Stats => "stats",
            Self::GuestMemfd => "guest_memfd",
        })
    }
}

/// Whether an ioctl is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoctlState {
    /// As specified.
    Works,
    /// Always refused with this errno, for this reason.
    Refused(Errno, &'static str),
}

/// One ioctl on one kind of descriptor.
#[derive(Clone, Copy, Debug)]
pub struct IoctlRow {
    /// Its number, which includes the size of its argument.
    pub request: u32,
    /// The descriptor.
    pub on: ObjectKind,
    /// Its section of the KVM API document (of Linux 6.1, later ones for what is newer), or else where it is
    /// specified.
    pub section: &'static str,
    /// Whether it works.
    pub state: IoctlState,
}

impl IoctlRow {
    /// As `linux/kvm.h` calls it.
    pub fn name(&self) -> &'static str {
        name(self.request).unwrap_or("?")
    }
}

use IoctlState::{Refused, Works};
use ObjectKind::{Device, System, Vcpu, Vm};

const fn row(request: u32, on: ObjectKind, section: &'static str, state: IoctlState) -> IoctlRow {
    IoctlRow {
        request,
        on,
        section,
        state,
    }
}

/// Where an ioctl that the document leaves out is to be found.
const HEADER: &str = "kvm.h";
/// The document of the first KVM API.
const FIRST: &str = "Linux 2.6.34";

const HYPERV: &str = "there is no Hyper-V interface";
const XEN: &str = "there are no Xen event channels and no shared info page";
const ENCRYPTION: &str = "no memory encryption";
const TRACE: &str = "removed from KVM in Linux 2.6.28";
const NO_REGISTERS_BY_NUMBER: &str = "x86 state is read in groups";

/// Every ioctl of x86.
#[rustfmt::skip]
pub const IOCTLS: &[IoctlRow] = &[
    row(KVM_GET_API_VERSION, System, "4.1", Works),
    row(KVM_CREATE_VM, System, "4.2", Works),
    row(KVM_GET_MSR_INDEX_LIST, System, "4.3", Works),
    row(KVM_GET_MSR_FEATURE_INDEX_LIST, System, "4.3", Works),
    row(KVM_CHECK_EXTENSION, System, "4.4", Works),
    row(KVM_GET_VCPU_MMAP_SIZE, System, "4.5", Works),
    row(KVM_GET_MSRS, System, "4.18", Works),
    row(KVM_GET_SUPPORTED_CPUID, System, "4.46", Works),
    row(KVM_HAS_DEVICE_ATTR, System, "4.81", Works),
    row(KVM_GET_DEVICE_ATTR, System, "4.80", Works),
    row(KVM_GET_EMULATED_CPUID, System, "4.88", Works),
    row(KVM_X86_GET_MCE_CAP_SUPPORTED, System, "4.104", Works),
    row(KVM_GET_SUPPORTED_HV_CPUID, System, "4.118", Refused(Errno::EINVAL, HYPERV)),
    row(KVM_TRACE_ENABLE, System, HEADER, Refused(Errno::EOPNOTSUPP, TRACE)),
    row(KVM_TRACE_PAUSE, System, HEADER, Refused(Errno::EOPNOTSUPP, TRACE)),
    row(KVM_TRACE_DISABLE, System, HEADER, Refused(Errno::EOPNOTSUPP, TRACE)),

    row(KVM_CHECK_EXTENSION, Vm, "4.4", Works),
    row(KVM_SET_MEMORY_REGION, Vm, FIRST, Works),
    row(KVM_CREATE_VCPU, Vm, "4.7", Works),
    row(KVM_GET_DIRTY_LOG, Vm, "4.8", Works),
    row(KVM_SET_MEMORY_ALIAS, Vm, FIRST, Works),
    row(KVM_SET_NR_MMU_PAGES, Vm, HEADER, Works),
    row(KVM_GET_NR_MMU_PAGES, Vm, HEADER, Works),
    row(KVM_CREATE_IRQCHIP, Vm, "4.24", Works),
    row(KVM_IRQ_LINE, Vm, "4.25", Works),
    row(KVM_IRQ_LINE_STATUS, Vm, "4.25", Works),
    row(KVM_GET_IRQCHIP, Vm, "4.26", Works),
    row(KVM_SET_IRQCHIP, Vm, "4.27", Works),
    row(KVM_XEN_HVM_CONFIG, Vm, "4.28", Works),
    row(KVM_GET_CLOCK, Vm, "4.29", Works),
    row(KVM_SET_CLOCK, Vm, "4.30", Works),
    row(KVM_SET_USER_MEMORY_REGION, Vm, "4.35", Works),
    row(KVM_SET_TSS_ADDR, Vm, "4.36", Works),
    row(KVM_ENABLE_CAP, Vm, "4.37", Works),
    row(KVM_SET_IDENTITY_MAP_ADDR, Vm, "4.40", Works),
    row(KVM_SET_BOOT_CPU_ID, Vm, "4.41", Works),
    row(KVM_SET_GSI_ROUTING, Vm, "4.52", Works),
    row(KVM_SET_TSC_KHZ, Vm, "4.55", Works),
    row(KVM_GET_TSC_KHZ, Vm, "4.56", Works),
    row(KVM_IOEVENTFD, Vm, "4.59", Works),
    row(KVM_SIGNAL_MSI, Vm, "4.71", Works),
    row(KVM_CREATE_PIT, Vm, HEADER, Works),
    row(KVM_CREATE_PIT2, Vm, "4.71", Works),
    row(KVM_GET_PIT, Vm, HEADER, Works),
    row(KVM_SET_PIT, Vm, HEADER, Works),
    row(KVM_GET_PIT2, Vm, "4.72", Works),
    row(KVM_SET_PIT2, Vm, "4.73", Works),
    row(KVM_IRQFD, Vm, "4.75", Works),
    row(KVM_CREATE_DEVICE, Vm, "4.79", Works),
    row(KVM_X86_SET_MSR_FILTER, Vm, "4.97", Works),
    row(KVM_REINJECT_CONTROL, Vm, "4.99", Works),
    row(KVM_REGISTER_COALESCED_MMIO, Vm, "4.116", Works),
    row(KVM_UNREGISTER_COALESCED_MMIO, Vm, "4.116", Works),
    row(KVM_CLEAR_DIRTY_LOG, Vm, "4.117", Works),
    row(KVM_GET_STATS_FD, Vm, "4.133", Works),
    row(KVM_SET_USER_MEMORY_REGION2, Vm, "4.140", Works),
    row(KVM_RESET_DIRTY_RINGS, Vm, "8.29", Works),
    row(KVM_MEMORY_ENCRYPT_OP, Vm, "4.110", Refused(Errno::ENOTTY, ENCRYPTION)),
    row(KVM_MEMORY_ENCRYPT_REG_REGION, Vm, "4.111", Refused(Errno::ENOTTY, ENCRYPTION)),
    row(KVM_MEMORY_ENCRYPT_UNREG_REGION, Vm, "4.112", Refused(Errno::ENOTTY, ENCRYPTION)),
    row(KVM_HYPERV_EVENTFD, Vm, "4.113", Refused(Errno::ENOTTY, HYPERV)),
    row(KVM_SET_PMU_EVENT_FILTER, Vm, "4.120", Refused(Errno::ENOTTY, "there are no performance counters")),
    row(KVM_XEN_HVM_SET_ATTR, Vm, "4.126", Refused(Errno::ENOTTY, XEN)),
    row(KVM_XEN_HVM_GET_ATTR, Vm, "4.127", Refused(Errno::ENOTTY, XEN)),
    row(KVM_XEN_HVM_EVTCHN_SEND, Vm, "4.135", Refused(Errno::ENOTTY, XEN)),
    row(KVM_SET_MEMORY_ATTRIBUTES, Vm, "4.141", Works),
    row(KVM_CREATE_GUEST_MEMFD, Vm, "4.142", Works),

    row(KVM_RUN, Vcpu, "4.10", Works),
    row(KVM_GET_REGS, Vcpu, "4.11", Works),
    row(KVM_SET_REGS, Vcpu, "4.12", Works),
    row(KVM_GET_SREGS, Vcpu, "4.13", Works),
    row(KVM_SET_SREGS, Vcpu, "4.14", Works),
    row(KVM_TRANSLATE, Vcpu, "4.15", Works),
    row(KVM_INTERRUPT, Vcpu, "4.16", Works),
    row(KVM_DEBUG_GUEST, Vcpu, "4.17", Refused(Errno::EINVAL, "KVM_SET_GUEST_DEBUG has replaced it")),
    row(KVM_GET_MSRS, Vcpu, "4.18", Works),
    row(KVM_SET_MSRS, Vcpu, "4.19", Works),
    row(KVM_SET_CPUID, Vcpu, "4.20", Works),
    row(KVM_SET_CPUID2, Vcpu, "4.20", Works),
    row(KVM_GET_CPUID2, Vcpu, HEADER, Works),
    row(KVM_SET_SIGNAL_MASK, Vcpu, "4.21", Works),
    row(KVM_GET_FPU, Vcpu, "4.22", Works),
    row(KVM_SET_FPU, Vcpu, "4.23", Works),
    row(KVM_GET_VCPU_EVENTS, Vcpu, "4.31", Works),
    row(KVM_SET_VCPU_EVENTS, Vcpu, "4.32", Works),
    row(KVM_GET_DEBUGREGS, Vcpu, "4.33", Works),
    row(KVM_SET_DEBUGREGS, Vcpu, "4.34", Works),
    row(KVM_ENABLE_CAP, Vcpu, "4.37", Works),
    row(KVM_GET_MP_STATE, Vcpu, "4.38", Works),
    row(KVM_SET_MP_STATE, Vcpu, "4.39", Works),
    row(KVM_GET_XSAVE, Vcpu, "4.42", Works),
    row(KVM_SET_XSAVE, Vcpu, "4.43", Works),
    row(KVM_GET_XCRS, Vcpu, "4.44", Works),
    row(KVM_SET_XCRS, Vcpu, "4.45", Works),
    row(KVM_SET_TSC_KHZ, Vcpu, "4.55", Works),
    row(KVM_GET_TSC_KHZ, Vcpu, "4.56", Works),
    row(KVM_GET_LAPIC, Vcpu, "4.57", Works),
    row(KVM_SET_LAPIC, Vcpu, "4.58", Works),
    row(KVM_NMI, Vcpu, "4.64", Works),
    row(KVM_KVMCLOCK_CTRL, Vcpu, "4.70", Works),
    row(KVM_HAS_DEVICE_ATTR, Vcpu, "4.81", Works),
    row(KVM_GET_DEVICE_ATTR, Vcpu, "4.80", Works),
    row(KVM_SET_DEVICE_ATTR, Vcpu, "4.80", Works),
    row(KVM_SET_GUEST_DEBUG, Vcpu, "4.87", Works),
    row(KVM_SMI, Vcpu, "4.96", Works),
    row(KVM_X86_SETUP_MCE, Vcpu, "4.105", Works),
    row(KVM_X86_SET_MCE, Vcpu, "4.106", Works),
    row(KVM_GET_NESTED_STATE, Vcpu, "4.114", Works),
    row(KVM_SET_NESTED_STATE, Vcpu, "4.115", Works),
    row(KVM_GET_SREGS2, Vcpu, "4.131", Works),
    row(KVM_SET_SREGS2, Vcpu, "4.132", Works),
    row(KVM_GET_STATS_FD, Vcpu, "4.133", Works),
    row(KVM_GET_XSAVE2, Vcpu, "4.134", Works),
    row(KVM_TPR_ACCESS_REPORTING, Vcpu, HEADER, Works),
    row(KVM_SET_VAPIC_ADDR, Vcpu, HEADER, Works),
    row(KVM_GET_ONE_REG, Vcpu, "4.69", Refused(Errno::EINVAL, NO_REGISTERS_BY_NUMBER)),
    row(KVM_SET_ONE_REG, Vcpu, "4.68", Refused(Errno::EINVAL, NO_REGISTERS_BY_NUMBER)),
    row(KVM_GET_SUPPORTED_HV_CPUID, Vcpu, "4.118", Refused(Errno::EINVAL, HYPERV)),
    row(KVM_XEN_VCPU_SET_ATTR, Vcpu, "4.128", Refused(Errno::EINVAL, XEN)),
    row(KVM_XEN_VCPU_GET_ATTR, Vcpu, "4.129", Refused(Errno::EINVAL, XEN)),
    row(KVM_PRE_FAULT_MEMORY, Vcpu, "4.143", Refused(Errno::EINVAL, "guest memory has no second set of page tables to fill")),

    row(KVM_SET_DEVICE_ATTR, Device, "4.80", Works),
    row(KVM_GET_DEVICE_ATTR, Device, "4.80", Refused(Errno::EPERM, "the VFIO device has no attribute to read")),
    row(KVM_HAS_DEVICE_ATTR, Device, "4.81", Works),
];

/// Ioctls that x86 has no more, or never had: they are unknown requests.
#[cfg(test)]
#[rustfmt::skip]
pub(crate) const FOREIGN: &[(&str, &[&str])] = &[
    ("dropped from KVM: VFIO assigns devices now", &[
        "KVM_ASSIGN_PCI_DEVICE", "KVM_ASSIGN_IRQ", "KVM_ASSIGN_DEV_IRQ", "KVM_DEASSIGN_PCI_DEVICE", "KVM_ASSIGN_SET_MSIX_NR",
        "KVM_ASSIGN_SET_MSIX_ENTRY", "KVM_DEASSIGN_DEV_IRQ", "KVM_ASSIGN_SET_INTX_MASK",
    ]),
    ("Arm", &[
        "KVM_ARM_SET_DEVICE_ADDR", "KVM_ARM_VCPU_INIT", "KVM_ARM_PREFERRED_TARGET", "KVM_ARM_VCPU_FINALIZE",
        "KVM_ARM_MTE_COPY_TAGS", "KVM_ARM_SET_COUNTER_OFFSET", "KVM_ARM_GET_REG_WRITABLE_MASKS",
        "KVM_GET_REG_LIST",
    ]),
    ("PowerPC", &[
        "KVM_PPC_GET_PVINFO", "KVM_PPC_GET_SMMU_INFO", "KVM_PPC_ALLOCATE_HTAB", "KVM_CREATE_SPAPR_TCE",
        "KVM_CREATE_SPAPR_TCE_64", "KVM_ALLOCATE_RMA", "KVM_PPC_GET_HTAB_FD", "KVM_PPC_RTAS_DEFINE_TOKEN",
        "KVM_PPC_RESIZE_HPT_PREPARE", "KVM_PPC_RESIZE_HPT_COMMIT", "KVM_PPC_CONFIGURE_V3_MMU",
        "KVM_PPC_GET_RMMU_INFO", "KVM_PPC_GET_CPU_CHAR", "KVM_PPC_SVM_OFF", "KVM_DIRTY_TLB",
    ]),
    ("s390", &[
        "KVM_S390_ENABLE_SIE", "KVM_S390_UCAS_MAP", "KVM_S390_UCAS_UNMAP", "KVM_S390_VCPU_FAULT",
        "KVM_S390_INTERRUPT", "KVM_S390_STORE_STATUS", "KVM_S390_SET_INITIAL_PSW", "KVM_S390_INITIAL_RESET",
        "KVM_S390_MEM_OP", "KVM_S390_GET_SKEYS", "KVM_S390_SET_SKEYS", "KVM_S390_IRQ",
        "KVM_S390_SET_IRQ_STATE", "KVM_S390_GET_IRQ_STATE", "KVM_S390_GET_CMMA_BITS",
        "KVM_S390_SET_CMMA_BITS", "KVM_S390_NORMAL_RESET", "KVM_S390_CLEAR_RESET", "KVM_S390_PV_COMMAND",
        "KVM_S390_PV_CPU_COMMAND", "KVM_S390_ZPCI_OP",
    ]),
];

/// The answer to a request that an object does not serve.
pub(crate) fn refusal(on: ObjectKind, request: u32) -> Errno {
    let row = IOCTLS.iter().find(|r| r.request == request && r.on == on);
    match row.map(|r| r.state) {
        Some(Refused(errno, _)) => errno,
        _ => on.unknown(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_once_and_each_number_somewhere() {
        let rows: HashSet<_> = IOCTLS.iter().map(|r| (r.request, r.on)).collect();
        assert_eq!(rows.len(), IOCTLS.len());
        for (request, name) in TABLE {
            assert!(IOCTLS.iter().any(|r| r.request == *request), "{name}");
        }
        assert!(IOCTLS.iter().all(|r| name(r.request).is_some()));
    }

    /// The header of the machine this is built on, where there is one.
    #[test]
    fn nothing_of_the_header_is_missing() {
        let Ok(header) = std::fs::read_to_string("/usr/include/linux/kvm.h") else {
            return;
        };
        let defined = header.lines().filter_map(|line| {
            let (name, value) = line
                .strip_prefix("#define ")?
                .split_once(char::is_whitespace)?;
            let number = ["_IO", "__KVM_DEPRECATED"]
                .iter()
                .any(|p| value.trim_start().starts_with(p));
            (number && name.starts_with("KVM_")).then_some(name)
        });
        let foreign: Vec<_> = FOREIGN.iter().flat_map(|(_, names)| *names).collect();
        for name in defined {
            let here = TABLE.iter().any(|(_, known)| *known == name);
            assert!(here || foreign.contains(&&name), "{name} is in no table");
        }
    }

    #[test]
    fn refusals() {
        assert_eq!(refusal(System, KVM_TRACE_PAUSE), Errno::EOPNOTSUPP);
        assert_eq!(refusal(System, KVM_RUN), Errno::EINVAL);
        assert_eq!(refusal(Vm, KVM_RUN), Errno::ENOTTY);
    }
}
