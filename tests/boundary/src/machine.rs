//! A VM as a small VMM makes it: memory, controllers, vCPUs.

use crate::ram::Ram;
use anyhow::Result;
use anykvm::bindings::{
    CpuId, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use anykvm::{CountedTime, Kvm, Translation, TranslationMode, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest RAM is from 0 to here.
pub const RAM: usize = 0xa_0000;
/// The GSI of the irqfd.
pub const IRQFD_GSI: u32 = 11;

/// Which interrupt controllers are in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// None.
    None,
    /// KVM_CREATE_IRQCHIP, and the PIT.
    Full,
    /// The local APICs.
    Split,
}

impl Chip {
    /// Whether the local APICs are in the kernel.
    pub fn has_lapic(self) -> bool {
        self != Self::None
    }
    /// Whether PIC, I/O APIC and PIT are in the kernel.
    pub fn is_full(self) -> bool {
        self == Self::Full
    }
}

/// How a VM is made; the same for one that goes on with another's state.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Controllers.
    pub chip: Chip,
    /// vCPUs.
    pub vcpus: u64,
    /// KVM_CAP_EXCEPTION_PAYLOAD is enabled.
    pub payload: bool,
}

/// One VM. Its memory is unmapped after the VM is gone.
pub struct Machine {
    /// How it was made.
    pub setup: Setup,
    /// How its guest's code is executed.
    pub engine: TranslationMode,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuFd>,
    /// Signals [`IRQFD_GSI`].
    pub irqfd: EventFd,
    /// The VM.
    pub vm: VmFd,
    /// Its memory.
    pub ram: Ram,
}

impl Machine {
    /// A new VM whose clock shows this, without code and with its vCPUs in their reset state.
    pub fn new(kvm: &Kvm, setup: &Setup, engine: TranslationMode, now_ns: u64) -> Result<Self> {
        let vm = kvm.create_vm_with_counted_time(CountedTime {
            start_ns: now_ns,
            ns_per_instruction: NS_PER_INSTRUCTION,
        })?;
        vm.set_translation(Translation {
            mode: engine,
            cache: Translation::MIN_CACHE,
            report: None,
        })?;
        let ram = Ram::new(RAM);
        // The same memory in system-management mode.
        for slot in [0, 1 << 16] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: 0,
                memory_size: RAM as u64,
                userspace_addr: ram.address(),
            };
            // SAFETY: memory of its own, touched through raw pointers only, that outlives the VM.
            #[allow(unsafe_code)]
            unsafe {
                vm.set_user_memory_region(region)?;
            }
        }
        let enable = |cap, arg| {
            vm.enable_cap(&kvm_enable_cap {
                cap,
                args: [arg, 0, 0, 0],
                ..Default::default()
            })
        };
        if setup.payload {
            enable(KVM_CAP_EXCEPTION_PAYLOAD, 1)?;
        }
        enable(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)?;
        let irqfd = EventFd::new(EFD_NONBLOCK)?;
        match setup.chip {
            Chip::None => {}
            Chip::Full => {
                vm.create_irq_chip()?;
                vm.create_pit2(kvm_pit_config::default())?;
                vm.register_irqfd(&irqfd, IRQFD_GSI)?;
            }
            Chip::Split => {
                enable(KVM_CAP_SPLIT_IRQCHIP, 24)?;
                vm.set_gsi_routing(&split_routes()?)?;
                vm.register_irqfd(&irqfd, IRQFD_GSI)?;
            }
        }
        let vcpus = (0..setup.vcpus)
            .map(|id| vm.create_vcpu(id))
            .collect::<anykvm::Result<_>>()?;
        Ok(Self {
            setup: setup.clone(),
            engine,
            vcpus,
            irqfd,
            vm,
            ram,
        })
    }
}

/// What each instruction takes: short timers take thousands of instructions, not millions.
pub const NS_PER_INSTRUCTION: u64 = 100;

/// Where a split irqchip's GSIs lead: to vCPU 0, each with a vector of its own. Every third is a level, whose
/// EOI the monitor hears of.
fn split_routes() -> Result<KvmIrqRouting> {
    let routes: Vec<_> = (0..24)
        .map(|gsi| {
            let level = if gsi % 3 == 0 { 3 << 14 } else { 0 };
            kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: 0xfee0_0000,
                        data: (0x50 + gsi) | level,
                        ..Default::default()
                    },
                },
                ..Default::default()
            }
        })
        .collect();
    Ok(KvmIrqRouting::from_entries(&routes)?)
}

/// The CPUID that vCPUs are given.
pub fn cpuid(kvm: &Kvm) -> Result<CpuId> {
    let mut cpuid = kvm.get_supported_cpuid(256)?;
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            // The timer is the local APIC's, which is there.
            entry.ecx |= 1 << 24;
        }
    }
    Ok(cpuid)
}
