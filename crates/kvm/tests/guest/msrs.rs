//! Every MSR there is: KVM_GET_MSRS and KVM_SET_MSRS, RDMSR and WRMSR agree with the table, and what is not
//! there or not allowed is #GP(0).

use anykvm::bindings::{
    KVM_CAP_MSR_PLATFORM_INFO, Msrs, kvm_enable_cap, kvm_msr_entry, kvm_pit_config, kvm_regs,
};
use anykvm::{Kvm, VcpuExit, VcpuFd};
use anykvm_cpu::cpuid::feature;
use anykvm_cpu::msr::{self, Writes, index};

use crate::{CODE, Guest};

/// The #GP handler: OUT 0x99, AL.
const HANDLER: u64 = 0x600;
const RDMSR: u8 = 0x32;
const WRMSR: u8 = 0x30;

/// A vCPU with all that KVM_GET_SUPPORTED_CPUID offers and an APIC in KVM.
fn vcpu(guest: &Guest) -> VcpuFd {
    guest.vm.create_irq_chip().unwrap();
    guest.vm.create_pit2(kvm_pit_config::default()).unwrap();
    // Vector 13 of the interrupt vector table.
    guest
        .ram
        .write_bytes(13 * 4, &(HANDLER as u32).to_le_bytes());
    guest.ram.write_bytes(HANDLER as usize, &[0xe6, 0x99]);
    let vcpu = guest.vcpu(&[]);
    let cpuid = Kvm::new().unwrap().get_supported_cpuid(256).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    vcpu
}

/// Runs RDMSR or WRMSR; EDX:EAX behind it, or `None` for #GP(0).
fn access(guest: &Guest, vcpu: &mut VcpuFd, opcode: u8, index: u32, value: u64) -> Option<u64> {
    // The instruction; OUT 0x98, AL.
    guest
        .ram
        .write_bytes(CODE as usize, &[0x0f, opcode, 0xe6, 0x98]);
    let regs = kvm_regs {
        rip: CODE,
        rsp: 0x7000,
        rflags: 2,
        rcx: index.into(),
        rax: value & 0xffff_ffff,
        rdx: value >> 32,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let done = match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x98, _) => true,
        VcpuExit::IoOut(0x99, _) => false,
        exit => panic!("{index:#x}: {exit:?}"),
    };
    let regs = vcpu.get_regs().unwrap();
    done.then_some(regs.rdx << 32 | regs.rax & 0xffff_ffff)
}

fn entry(index: u32, data: u64) -> Msrs {
    Msrs::from_entries(&[kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }])
    .unwrap()
}

pub fn get(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = entry(index, 0);
    (vcpu.get_msrs(&mut msrs).unwrap() == 1).then(|| msrs.as_slice()[0].data)
}

pub fn set(vcpu: &VcpuFd, index: u32, value: u64) -> bool {
    vcpu.set_msrs(&entry(index, value)).unwrap() == 1
}

/// Those that count by themselves.
const CLOCKS: [u32; 2] = [index::TSC, index::TSC_DEADLINE];

#[test]
fn every_listed_msr_is_carried() {
    let guest = Guest::new();
    let vcpu = vcpu(&guest);
    let list = Kvm::new().unwrap().get_msr_index_list().unwrap();
    assert!(list.as_slice().len() > 60);
    for index in list.as_slice() {
        let value = get(&vcpu, *index).unwrap_or_else(|| panic!("{index:#x}"));
        assert!(set(&vcpu, *index, value), "{index:#x} {value:#x}");
        if !CLOCKS.contains(index) {
            assert_eq!(get(&vcpu, *index), Some(value), "{index:#x}");
        }
    }
}

#[test]
fn every_feature_msr_has_its_value() {
    let kvm = Kvm::new().unwrap();
    for index in kvm.get_msr_feature_index_list().unwrap().as_slice() {
        let mut msrs = entry(*index, 0);
        assert_eq!(kvm.get_msrs(&mut msrs).unwrap(), 1, "{index:#x}");
        let value = msrs.as_slice()[0].data;
        let row = msr::FEATURES.iter().find(|(i, _)| i == index);
        assert_eq!(row, Some(&(*index, value)), "{index:#x}");
    }
}

/// A value that the rule refuses to a guest.
fn refused(writes: Writes) -> Option<u64> {
    Some(match writes {
        Writes::Bits(bits) => !bits & bits.wrapping_add(1),
        Writes::Canonical => 1 << 63,
        Writes::PatTypes | Writes::MtrrTypes | Writes::MtrrDefType => 2,
        Writes::MtrrRange => 1 << 63,
        Writes::HostOnly | Writes::Nothing => 0,
        _ => return None,
    })
}

#[test]
fn a_guest_meets_the_rules_of_the_table() {
    let guest = Guest::new();
    let mut vcpu = vcpu(&guest);
    let supported = anykvm_cpu::cpuid::CpuidTable::default();
    for row in msr::rows() {
        let there = row.needs.is_empty() || row.needs.iter().any(|f| supported.has(*f));
        let command = matches!(row.first, index::PRED_CMD | index::FLUSH_CMD);
        for n in row.first..=row.last {
            let name = row.name;
            let read = access(&guest, &mut vcpu, RDMSR, n, 0);
            let readable = there && !command && n != index::SMBASE;
            assert_eq!(read.is_some(), readable, "RDMSR {name} {n:#x}");
            if let (Some(reset), Some(value)) = (row.reset, read) {
                assert_eq!(value, reset, "{name} {n:#x}");
            }
            if let Some(bad) = refused(row.writes) {
                let written = access(&guest, &mut vcpu, WRMSR, n, bad);
                assert_eq!(written, None, "WRMSR {name} {n:#x}");
            }
            let good = !matches!(row.writes, Writes::HostOnly | Writes::Nothing);
            if let (Some(value), true) = (read, good) {
                let written = access(&guest, &mut vcpu, WRMSR, n, value);
                assert!(written.is_some(), "WRMSR {name} {n:#x} {value:#x}");
            }
        }
    }
}

#[test]
fn unknown_msrs_are_faults() {
    let guest = Guest::new();
    let mut vcpu = vcpu(&guest);
    for n in [0x3, 0xdead, 0x4b56_4dff, 0x8000_0000, 0xc001_ffff] {
        assert_eq!(get(&vcpu, n), None, "{n:#x}");
        assert!(!set(&vcpu, n, 0), "{n:#x}");
        assert_eq!(access(&guest, &mut vcpu, RDMSR, n, 0), None, "{n:#x}");
        assert_eq!(access(&guest, &mut vcpu, WRMSR, n, 0), None, "{n:#x}");
    }
}

// The flags of CPUID that the machine around the processor makes true: APIC, x2APIC, MCA, and the
// hypervisor's own leaf.
#[test]
fn flags_of_the_machine_are_true() {
    const APIC_BASE: u32 = 0x1b;
    const ENABLED: u64 = 1 << 11;
    const X2APIC: u64 = 1 << 10;
    const X2APIC_VERSION: u32 = 0x803;
    const MCG_CAP: u32 = 0x179;
    let guest = Guest::new();
    let mut vcpu = vcpu(&guest);
    let table = anykvm_cpu::cpuid::CpuidTable::default();
    for f in [
        feature::APIC,
        feature::X2APIC,
        feature::MCA,
        feature::HYPERVISOR,
    ] {
        assert!(table.has(f), "{f:?}");
    }
    let base = access(&guest, &mut vcpu, RDMSR, APIC_BASE, 0).unwrap();
    assert_ne!(base & ENABLED, 0);
    assert_eq!(access(&guest, &mut vcpu, RDMSR, X2APIC_VERSION, 0), None);
    access(&guest, &mut vcpu, WRMSR, APIC_BASE, base | X2APIC).unwrap();
    let version = access(&guest, &mut vcpu, RDMSR, X2APIC_VERSION, 0).unwrap();
    assert_eq!(version & 0xf0, 0x10);
    let banks = access(&guest, &mut vcpu, RDMSR, MCG_CAP, 0).unwrap() & 0xff;
    assert_ne!(banks, 0);
    access(&guest, &mut vcpu, RDMSR, 0x400, 0).unwrap();
    let cpuid = Kvm::new().unwrap().get_supported_cpuid(256).unwrap();
    let signature = cpuid.as_slice().iter().find(|e| e.function == 0x4000_0000);
    assert_eq!(signature.map(|e| e.ebx.to_le_bytes()), Some(*b"KVMK"));
}

/// KVM_CAP_MSR_PLATFORM_INFO (KVM API, 7.8): whether the guest may read what user space put there.
#[test]
fn platform_info_can_be_hidden_from_the_guest() {
    let guest = Guest::new();
    let mut vcpu = vcpu(&guest);
    assert!(set(&vcpu, index::PLATFORM_INFO, 0xff00));
    for (visible, read) in [(0, None), (1, Some(0xff00))] {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_MSR_PLATFORM_INFO,
            ..Default::default()
        };
        cap.args[0] = visible;
        guest.vm.enable_cap(&cap).unwrap();
        assert_eq!(
            access(&guest, &mut vcpu, RDMSR, index::PLATFORM_INFO, 0),
            read
        );
        assert_eq!(get(&vcpu, index::PLATFORM_INFO), Some(0xff00));
    }
}
