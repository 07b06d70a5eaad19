//! The state in which processors start.

use anyhow::{Result, ensure};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{Entry, boot};

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const STACK: u64 = 0x8ff0;

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTERNAL: u32 = 7 << 8;

/// CPUID as processor `id` of `count` sees it: no processor has two threads.
pub fn cpuid(kvm: &Kvm, id: u8, count: u8) -> Result<CpuId> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let width = u32::from(count).next_power_of_two().trailing_zeros();
    cpuid.retain(|entry| entry.function != 0x1f);
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xffff | u32::from(count) << 16 | u32::from(id) << 24;
                // TSC deadline and hypervisor.
                entry.ecx |= 1 << 24 | 1 << 31;
            }
            (0xb, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 0x100, id.into()),
            (0xb, 1) => {
                (entry.eax, entry.ebx) = (width, count.into());
                (entry.ecx, entry.edx) = (0x201, id.into());
            }
            (0x8000_0008, _) => {
                entry.ecx = entry.ecx & !0xffff | u32::from(count - 1) | width << 12;
            }
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id.into(), id.into(), 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// What firmware would have written: SYSENTER's and SYSCALL's addresses, fast strings, write-back memory.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    let entries = [
        (0x174, 0),
        (0x175, 0),
        (0x176, 0),
        (0xc000_0081, 0),
        (0xc000_0083, 0),
        (0xc000_0102, 0),
        (0xc000_0084, 0),
        (0xc000_0082, 0),
        (0x10, 0),
        (0x1a0, 1),
        (0x2ff, 1 << 11 | 6),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let done = vcpu.set_msrs(&Msrs::from_entries(&entries)?)?;
    ensure!(
        done == entries.len(),
        "MSR {:#x} is refused",
        entries[done].index
    );
    Ok(())
}

/// The pins of the local APIC: the 8259s', and NMI.
pub fn set_lint(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic()?;
    for (register, mode) in [
        (APIC_LVT_LINT0, DELIVERY_EXTERNAL),
        (APIC_LVT_LINT1, DELIVERY_NMI),
    ] {
        let bytes = &mut lapic.regs[register..register + 4];
        let mut value = 0;
        for (n, &byte) in bytes.iter().enumerate() {
            value |= u32::from(byte as u8) << (8 * n);
        }
        value = value & !0x700 | mode;
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = new as _;
        }
    }
    Ok(vcpu.set_lapic(&lapic)?)
}

pub fn set_fpu(vcpu: &VcpuFd) -> Result<()> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    Ok(vcpu.set_fpu(&fpu)?)
}

/// Puts the first processor at the kernel's entry.
pub fn set_entry(
    vcpu: &VcpuFd,
    memory: &GuestMemoryMmap,
    entry: Entry,
    address: GuestAddress,
) -> Result<()> {
    let long = entry == Entry::Linux;
    let mut regs = kvm_regs {
        rflags: 2,
        rip: address.0,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(2, 0xb, long);
    let data = segment(3, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(4, 0xb, false)
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | 1 << 4;
    let code: u64 = if long {
        0x00af_9b00_0000_ffff
    } else {
        0x00cf_9b00_0000_ffff
    };
    let table = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    for (at, descriptor) in (GDT..).step_by(8).zip(table) {
        memory.write_obj(descriptor, GuestAddress(at))?;
    }
    if long {
        // The first gigabyte, in pages of 2 MiB.
        memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
        memory.write_obj(PAGE_DIRECTORY | 3, GuestAddress(PDPT))?;
        for page in 0..512_u64 {
            memory.write_obj(page << 21 | 0x83, GuestAddress(PAGE_DIRECTORY + page * 8))?;
        }
        sregs.cr3 = PML4;
        sregs.cr4 |= CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
        (regs.rsp, regs.rbp, regs.rsi) = (STACK, STACK, boot::ZERO_PAGE);
    } else {
        regs.rbx = boot::START_INFO;
    }
    vcpu.set_regs(&regs)?;
    Ok(vcpu.set_sregs(&sregs)?)
}

/// A flat segment.
fn segment(index: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        s: 1,
        db: u8::from(!long),
        l: long.into(),
        g: 1,
        ..Default::default()
    }
}
