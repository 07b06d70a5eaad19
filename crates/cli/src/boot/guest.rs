//! A guest that is loaded and has not begun: memory with a kernel in it, and how a VM and its processors
//! are made for it.

use std::path::Path;
use std::sync::Arc;

use anykvm::{Cap, Kvm, VcpuFd, VmFd};
use anykvm_abi::{KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::kernel::Entry;
use super::memory::MemorySize;
use super::{acpi, boot_params, cpu, kernel, layout, memory};

/// All the BIOS there is: `mov al, 0xfe; out 0x64, al; hlt`, the keyboard controller's reset.
const RESET_CODE: [u8; 5] = [
    0xb0,
    layout::I8042_RESET,
    0xe6,
    layout::I8042_COMMAND as u8,
    0xf4,
];

/// What is loaded.
pub struct GuestConfig<'a> {
    pub kernel: &'a Path,
    pub initrd: Option<&'a Path>,
    pub command_line: &'a str,
    pub memory: MemorySize,
    pub cpus: u8,
    pub disks: usize,
}

/// See the module's description.
pub struct Guest {
    pub memory: Arc<GuestMemoryMmap<()>>,
    entry: Entry,
    cpus: u8,
}

impl Guest {
    /// Puts kernel, initrd, command line and tables into new memory.
    pub fn load(config: &GuestConfig) -> Result<Self, BootError> {
        let guest = Arc::new(memory::allocate(config.memory)?);
        let loaded = kernel::load(&guest, config.kernel)?;
        let initrd = config
            .initrd
            .map(|path| kernel::load_initrd(&guest, path, &loaded))
            .transpose()?;
        boot_params::write(
            &guest,
            config.memory.0,
            &loaded,
            initrd,
            config.command_line,
        )?;
        let tables = acpi::tables(layout::ACPI_TABLES, config.cpus, config.disks);
        let put = |bytes: &[u8], at| {
            guest
                .write_slice(bytes, GuestAddress(at))
                .map_err(|error| BootError::Memory(error.to_string()))
        };
        put(&tables, layout::ACPI_TABLES)?;
        put(&RESET_CODE, layout::RESET_VECTOR)?;
        Ok(Self {
            memory: guest,
            entry: loaded.entry,
            cpus: config.cpus,
        })
    }

    /// Makes a new VM the machine's: its memory, interrupt controllers, timer.
    pub fn equip_vm(&self, vm: &VmFd) -> Result<(), BootError> {
        vm.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(BootError::host("cannot set the identity map's address"))?;
        vm.set_tss_address(layout::TSS)
            .map_err(BootError::host("cannot set the TSS address"))?;
        vm.create_irq_chip()
            .map_err(BootError::host("cannot create the interrupt controllers"))?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(BootError::host("cannot create the timer"))?;
        memory::register(vm, &self.memory)
    }

    /// Puts a processor into its first state, with the CPUID that KVM supports and `change` has changed.
    pub fn prepare_vcpu(
        &self,
        kvm: &Kvm,
        vcpu: &VcpuFd,
        id: u8,
        change: impl FnMut(&mut kvm_cpuid_entry2),
    ) -> Result<(), BootError> {
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        cpu::set_cpuid(kvm, vcpu, id, self.cpus, tsc_deadline, change)?;
        cpu::set_msrs(vcpu)?;
        if id == 0 {
            cpu::set_entry(vcpu, &self.memory, self.entry)?;
        }
        Ok(())
    }
}
