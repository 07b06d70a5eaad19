//! 64-bit guests whose code becomes hot: what a VMM does to them at any moment (kicks, timers, debugging,
//! dirty logging, state taken out and put elsewhere, code written into their memory) has the same effect
//! whether their code is interpreted or translated. `ANYKVM_JIT` chooses, as it does for users; `cargo xtask
//! test` runs these with each of its values.

mod changing;
mod debug;
mod dirty;
mod dirty_ring;
mod guest_debug;
mod kicks;
mod snapshots;

use anykvm::bindings::{
    kvm_dtable, kvm_enable_cap, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use anykvm::{Kvm, VcpuExit, VcpuFd, VmFd};
use anykvm_cpu::memory::mapping::Mapping;
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, rax, rbx};

/// Guest memory is from 0 to here, mapped at the same addresses: in pages of 4 KiB below 2 MiB.
pub const RAM: usize = 8 << 20;
/// Where code begins.
pub const CODE: u64 = 0x1_0000;
/// Data of the guests' own.
pub const DATA: u64 = 0x4_0000;
/// The last-level page table of the first 2 MiB.
pub const TABLE: u64 = 0x4000;
/// The port whose write ends a guest.
pub const END: u16 = 0x99;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x500;
const IDT: u64 = 0x7000;
const STACK: u64 = 0x8_0000;
/// A page of stack for each processor.
const STACK_SIZE: u64 = 0x1000;

/// A VM with memory and tables for 64-bit mode. The memory is unmapped after the VM is gone.
pub struct Machine {
    pub kvm: Kvm,
    pub vm: VmFd,
    pub ram: Mapping,
}

impl Machine {
    /// With this code, which ends by a write to port [`END`].
    pub fn new(code: &[u8]) -> Self {
        Self::with_flags(code, 0)
    }

    /// The same with flags for its memory slot.
    pub fn with_flags(code: &[u8], flags: u32) -> Self {
        let machine = Self::empty(flags);
        machine.tables();
        machine.ram.write_bytes(CODE as usize, code);
        machine
    }

    /// The same with a capability switched on.
    pub fn with_cap(code: &[u8], flags: u32, cap: &kvm_enable_cap) -> Self {
        let machine = Self::made(flags, Some(cap));
        machine.tables();
        machine.ram.write_bytes(CODE as usize, code);
        machine
    }

    /// With memory full of zeroes.
    pub fn empty(flags: u32) -> Self {
        Self::made(flags, None)
    }

    fn made(flags: u32, cap: Option<&kvm_enable_cap>) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        if let Some(cap) = cap {
            vm.enable_cap(cap).unwrap();
        }
        let ram = Mapping::anonymous(RAM).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.address(),
        };
        // SAFETY: a mapping of the test's own, touched through raw pointers only.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        Self { kvm, vm, ram }
    }

    fn put(&self, gpa: u64, value: u64) {
        self.ram.write(gpa as usize, value);
    }

    fn tables(&self) {
        self.put(PML4, (PML4 + 0x1000) | 7);
        self.put(PML4 + 0x1000, (PML4 + 0x2000) | 7);
        // The local APIC, at 0xfee0_0000.
        self.put(PML4 + 0x1018, (PML4 + 0x4000) | 7);
        self.put(PML4 + 0x4000 + 0x1f7 * 8, 0xfee0_0000 | 0x93);
        self.put(PML4 + 0x2000, TABLE | 7);
        for n in 1..4 {
            self.put(PML4 + 0x2000 + n * 8, n << 21 | 0x87);
        }
        for n in 0..512 {
            self.put(TABLE + n * 8, n << 12 | 7);
        }
        self.put(GDT + 8, 0x00af_9b00_0000_ffff);
        self.put(GDT + 16, 0x00cf_9300_0000_ffff);
    }

    /// The handler of a vector.
    pub fn handler(&self, vector: u64, at: u64) {
        let gate = (at & 0xffff) | 8 << 16 | 0x8e << 40 | (at >> 16 & 0xffff) << 48;
        self.put(IDT + vector * 16, gate);
        self.put(IDT + vector * 16 + 8, at >> 32);
    }

    /// A processor at the beginning of the code.
    pub fn vcpu(&self, id: u64) -> VcpuFd {
        let vcpu = self.vm.create_vcpu(id).unwrap();
        vcpu.set_cpuid2(&self.kvm.get_supported_cpuid(256).unwrap())
            .unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        let segment = |selector, type_, l| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            l,
            db: 1 - l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(8, 11, 1);
        for s in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.ss,
            &mut sregs.fs,
            &mut sregs.gs,
        ] {
            *s = segment(16, 3, 0);
        }
        let table = |base, limit| kvm_dtable {
            base,
            limit,
            ..Default::default()
        };
        sregs.gdt = table(GDT, 0x17);
        sregs.idt = table(IDT, 0xfff);
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = PML4;
        // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
        sregs.cr4 = 0x4_0620;
        sregs.efer = 0x500;
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK - id * STACK_SIZE,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        vcpu
    }
}

/// Code for 64-bit mode at [`CODE`].
pub fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

/// The next random number in RBX (xorshift); RAX is destroyed.
pub fn next_random(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, rbx)?;
    a.shl(rax, 13)?;
    a.xor(rbx, rax)?;
    a.mov(rax, rbx)?;
    a.shr(rax, 7)?;
    a.xor(rbx, rax)?;
    a.mov(rax, rbx)?;
    a.shl(rax, 17)?;
    a.xor(rbx, rax)
}

/// Runs to the end, through kicks.
pub fn finish(vcpu: &mut VcpuFd) {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(END, _)) => return,
            Ok(exit) => {
                let exit = format!("{exit:?}");
                panic!("{exit}\n{}", vcpu.dump());
            }
            Err(anykvm::Errno::EINTR) => {}
            Err(e) => panic!("{e}"),
        }
    }
}
