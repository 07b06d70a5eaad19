//! The state in which processors start: CPUID with their own numbers in it, the first one's registers
//! as the kernel's entry expects them, the MSRs a firmware would have set. The others wait for INIT and
//! SIPI, as KVM leaves them.

use anykvm::{Kvm, VcpuFd};
use anykvm_abi::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::kernel::Entry;
use super::layout;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always one.
const RFLAGS_FIXED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

const CPUID_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const CPUID_1_ECX_HYPERVISOR: u32 = 1 << 31;
const CPUID_1_EDX_HTT: u32 = 1 << 28;
const CPUID_FLAG_SIGNIFICANT_INDEX: u32 = 1;

/// CPUID as processor `id` of `count` sees it, made from what KVM supports.
pub fn cpuid(supported: &CpuId, id: u8, count: u8, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    // Bits of an APIC id that number the processors.
    let width = u32::from(count).next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    let has_topology = supported
        .as_slice()
        .iter()
        .any(|entry| entry.function == 0xb);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0xffff | u32::from(count) << 16 | u32::from(id) << 24;
                entry.ecx |= CPUID_1_ECX_HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= CPUID_1_ECX_TSC_DEADLINE;
                }
                if count > 1 {
                    entry.edx |= CPUID_1_EDX_HTT;
                } else {
                    entry.edx &= !CPUID_1_EDX_HTT;
                }
            }
            // Intel's cache leaf and AMD's: no cache is shared, `count` cores in the package.
            0x4 => {
                entry.eax = entry.eax & 0x3fff | u32::from((count - 1).min(63)) << 26;
            }
            0x8000_001d => entry.eax &= 0x3fff,
            // AMD: cores in the package and width of the core number; then which one this is.
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xffff | u32::from(count - 1).min(0xff) | width << 12;
            }
            0x8000_001e => {
                entry.eax = u32::from(id);
                entry.ebx = u32::from(id);
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    if has_topology {
        // Extended topology: one thread a core, then all cores of the package, then nothing.
        for (index, shift, processors, level) in
            [(0, 0, 1, 1), (1, width, u32::from(count), 2), (2, 0, 0, 0)]
        {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: CPUID_FLAG_SIGNIFICANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: level << 8 | index,
                edx: u32::from(id),
                ..Default::default()
            });
        }
    }
    entries
}

/// Gives a processor its CPUID; `change` sees each entry last.
pub fn set_cpuid(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    id: u8,
    count: u8,
    tsc_deadline: bool,
    change: impl FnMut(&mut kvm_cpuid_entry2),
) -> Result<(), BootError> {
    const ENTRIES: usize = anykvm_abi::KVM_MAX_CPUID_ENTRIES;
    let supported = kvm
        .get_supported_cpuid(ENTRIES)
        .map_err(BootError::host("cannot get the supported CPUID"))?;
    let mut entries = cpuid(&supported, id, count, tsc_deadline);
    entries.iter_mut().for_each(change);
    let entries = CpuId::from_entries(&entries).expect("CPUID leaves fit their table");
    vcpu.set_cpuid2(&entries)
        .map_err(BootError::host("cannot set CPUID"))
}

/// Sets the MSRs that firmware sets: fast strings on, memory write-back.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), BootError> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).expect("two MSRs fit their table");
    let done = vcpu
        .set_msrs(&msrs)
        .map_err(BootError::host("cannot set MSRs"))?;
    if done != entries.len() {
        return Err(BootError::Host {
            what: "cannot set MSRs",
            error: format!("MSR {:#x} is refused", entries[done].index),
        });
    }
    Ok(())
}

/// Puts the first processor at the kernel's entry.
pub fn set_entry(
    vcpu: &VcpuFd,
    guest: &GuestMemoryMmap<()>,
    entry: Entry,
) -> Result<(), BootError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(BootError::host("cannot get special registers"))?;
    let (code, data, tss) = match entry {
        Entry::Linux64(_) => (segment(2, 0xa09b), segment(3, 0xc093), segment(4, 0x008b)),
        Entry::Pvh(_) => (segment(2, 0xc09b), segment(3, 0xc093), segment(4, 0x008b)),
    };
    write_gdt(guest, entry)?;
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = tss;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;

    let mut regs = kvm_regs {
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    match entry {
        Entry::Linux64(rip) => {
            write_page_tables(guest)?;
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::BOOT_PML4;
            sregs.cr4 |= CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = layout::ZERO_PAGE;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
        }
        Entry::Pvh(rip) => {
            regs.rip = rip;
            regs.rbx = layout::PVH_START_INFO;
        }
    }
    vcpu.set_sregs(&sregs)
        .map_err(BootError::host("cannot set special registers"))?;
    vcpu.set_regs(&regs)
        .map_err(BootError::host("cannot set registers"))
}

/// A flat segment with GDT index `index`; `access` has the descriptor's access byte low and its flags
/// (G, D/B, L, AVL) in bits 15:12.
fn segment(index: u16, access: u16) -> kvm_segment {
    let bit = |at: u32| (access >> at & 1) as u8;
    let system = bit(4) == 0;
    kvm_segment {
        base: 0,
        limit: if system { 0xffff } else { 0xffff_ffff },
        selector: index * 8,
        type_: (access & 0xf) as u8,
        s: bit(4),
        dpl: (access >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        ..Default::default()
    }
}

/// The same segments as descriptors: the protocol wants CS at 0x10 and DS at 0x18 loaded from a GDT.
fn write_gdt(guest: &GuestMemoryMmap<()>, entry: Entry) -> Result<(), BootError> {
    let code = match entry {
        Entry::Linux64(_) => 0x00af_9b00_0000_ffff_u64,
        Entry::Pvh(_) => 0x00cf_9b00_0000_ffff,
    };
    let table = [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_ffff];
    for (index, descriptor) in table.into_iter().enumerate() {
        write_u64(guest, layout::BOOT_GDT + index as u64 * 8, descriptor)?;
    }
    Ok(())
}

/// The first 4 GiB one to one, in pages of 2 MiB.
fn write_page_tables(guest: &GuestMemoryMmap<()>) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7;
    write_u64(
        guest,
        layout::BOOT_PML4,
        layout::BOOT_PDPT | PRESENT_WRITABLE,
    )?;
    for directory in 0..4 {
        let table = layout::BOOT_PAGE_DIRECTORIES + directory * 0x1000;
        write_u64(
            guest,
            layout::BOOT_PDPT + directory * 8,
            table | PRESENT_WRITABLE,
        )?;
        for page in 0..512 {
            let physical = (directory * 512 + page) << 21;
            write_u64(
                guest,
                table + page * 8,
                physical | PRESENT_WRITABLE | LARGE_PAGE,
            )?;
        }
    }
    Ok(())
}

fn write_u64(guest: &GuestMemoryMmap<()>, at: u64, value: u64) -> Result<(), BootError> {
    guest
        .write_obj(value, GuestAddress(at))
        .map_err(|error| BootError::Memory(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            ecx: 0,
            edx: 0,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(1, 0),
            leaf(4, 0),
            leaf(0xb, 0),
            leaf(0xb, 1),
            leaf(0x1f, 0),
            leaf(0x8000_0008, 0),
            leaf(0x8000_001e, 0),
        ])
        .unwrap()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn each_processor_sees_its_own_number() {
        let entries = cpuid(&supported(), 2, 3, true);
        let leaf1 = find(&entries, 1, 0);
        assert_eq!(leaf1.ebx, 0x0203_ffff);
        assert_eq!(leaf1.ecx, CPUID_1_ECX_TSC_DEADLINE | CPUID_1_ECX_HYPERVISOR);
        assert_eq!(leaf1.edx, CPUID_1_EDX_HTT);
        assert_eq!(find(&entries, 4, 0).eax, 2 << 26 | 0x3fff);
        let cores = find(&entries, 0xb, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
        let end = find(&entries, 0xb, 2);
        assert_eq!((end.eax, end.ebx, end.ecx, end.edx), (0, 0, 2, 2));
        assert!(!entries.iter().any(|entry| entry.function == 0x1f));
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        assert_eq!(find(&entries, 0x8000_001e, 0).eax, 2);
    }

    #[test]
    fn one_processor_is_no_package_of_several() {
        let entries = cpuid(&supported(), 0, 1, false);
        assert_eq!(find(&entries, 1, 0).edx & CPUID_1_EDX_HTT, 0);
        assert_eq!(find(&entries, 1, 0).ecx & CPUID_1_ECX_TSC_DEADLINE, 0);
        assert_eq!(find(&entries, 0xb, 1).eax, 0);
    }

    #[test]
    fn segments_follow_their_descriptors() {
        let code = segment(2, 0xa09b);
        assert_eq!(
            (code.selector, code.type_, code.s, code.l, code.db, code.g),
            (0x10, 0xb, 1, 1, 0, 1)
        );
        let data = segment(3, 0xc093);
        assert_eq!(
            (data.selector, data.type_, data.db, data.limit),
            (0x18, 3, 1, u32::MAX)
        );
        let tss = segment(4, 0x008b);
        assert_eq!((tss.s, tss.type_, tss.g, tss.present), (0, 0xb, 0, 1));
    }

    #[test]
    fn page_tables_map_four_gigabytes_one_to_one() {
        let guest =
            super::super::memory::allocate(super::super::memory::MemorySize(8 << 20)).unwrap();
        write_page_tables(&guest).unwrap();
        let entry = |at: u64| -> u64 { guest.read_obj(GuestAddress(at)).unwrap() };
        assert_eq!(entry(layout::BOOT_PML4), layout::BOOT_PDPT | 3);
        assert_eq!(
            entry(layout::BOOT_PDPT + 24),
            (layout::BOOT_PAGE_DIRECTORIES + 0x3000) | 3
        );
        assert_eq!(entry(layout::BOOT_PAGE_DIRECTORIES + 0x3ff8), 0xffe0_0083);
    }
}
