//! A guest's own accesses meet what the VM has: ioeventfds, coalesced zones, dirty logging, slots
//! that come and go, interrupts from eventfds, MSIs and the PIT. Real-mode code, run through the
//! public Rust API.

mod clock;
mod interrupts;
mod io;
mod kicks;
mod memory;
mod msrs;
mod timers;
mod translation;

use anykvm::bindings::{kvm_regs, kvm_userspace_memory_region};
use anykvm::{Kvm, VcpuFd, VmFd};
use anykvm_cpu::memory::mapping::Mapping;

/// Where code begins.
pub const CODE: u64 = 0x1000;
/// Guest memory is from 0 to here.
pub const RAM: usize = 0x8000;

/// A VM with RAM at 0. The memory is unmapped after the VM is gone.
pub struct Guest {
    pub vm: VmFd,
    pub ram: Mapping,
}

impl Guest {
    #[allow(clippy::new_without_default, reason = "a fixture")]
    pub fn new() -> Self {
        Self::with_flags(0)
    }

    pub fn with_flags(flags: u32) -> Self {
        Self::of(Kvm::new().unwrap().create_vm().unwrap(), flags)
    }

    pub fn of(vm: VmFd, flags: u32) -> Self {
        let guest = Self {
            vm,
            ram: Mapping::anonymous(RAM).unwrap(),
        };
        guest
            .slot(0, flags, 0, RAM as u64, guest.ram.address())
            .unwrap();
        guest
    }

    pub fn slot(
        &self,
        slot: u32,
        flags: u32,
        gpa: u64,
        size: u64,
        host: u64,
    ) -> anykvm::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: mappings of the tests' own, touched through raw pointers only.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// A vCPU about to run this code in real mode, with its stack at the top of RAM.
    pub fn vcpu(&self, code: &[u8]) -> VcpuFd {
        self.ram.write_bytes(CODE as usize, code);
        let vcpu = self.vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: CODE,
            rsp: RAM as u64,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        vcpu
    }
}

/// An MSR that there is.
pub fn msr(vcpu: &VcpuFd, index: u32) -> u64 {
    msrs::get(vcpu, index).unwrap()
}

/// Sets an MSR that takes the value.
pub fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) {
    assert!(msrs::set(vcpu, index, value));
}
