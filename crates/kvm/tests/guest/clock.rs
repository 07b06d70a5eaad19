//! The guest's clock pages (`struct pvclock_vcpu_time_info`).

use anykvm::bindings::kvm_clock_data;
use anykvm::{VcpuExit, VcpuFd};

use crate::{CODE, Guest, msr, set_msr};

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_TSC: u32 = 0x10;
const PAGES: [u64; 2] = [0x2000, 0x3000];

/// What a guest would see at this TSC; and the page's version.
fn read(guest: &Guest, page: u64, tsc: u64) -> (u64, u32) {
    let at = page as usize;
    let shift: i8 = guest.ram.read::<u8>(at + 28) as i8;
    let cycles = tsc.wrapping_sub(guest.ram.read::<u64>(at + 8));
    let shifted = if shift < 0 {
        cycles >> -shift
    } else {
        cycles << shift
    };
    let mul = u128::from(guest.ram.read::<u32>(at + 24));
    let ns = ((u128::from(shifted) * mul) >> 32) as u64;
    let system_time = guest.ram.read::<u64>(at + 16);
    (system_time.wrapping_add(ns), guest.ram.read(at))
}

fn halt(vcpu: &mut VcpuFd) {
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = CODE;
    vcpu.set_regs(&regs).unwrap();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Hlt));
}

fn two_processors() -> (Guest, VcpuFd, VcpuFd) {
    let guest = Guest::new();
    let mut first = guest.vcpu(&[0xf4]);
    let second = guest.vm.create_vcpu(1).unwrap();
    second.set_sregs(&first.get_sregs().unwrap()).unwrap();
    second.set_regs(&first.get_regs().unwrap()).unwrap();
    set_msr(&first, MSR_KVM_SYSTEM_TIME_NEW, PAGES[0] | 1);
    set_msr(&second, MSR_KVM_SYSTEM_TIME_NEW, PAGES[1] | 1);
    halt(&mut first);
    (guest, first, second)
}

/// Linux's vDSO reads the first vCPU's page on every vCPU.
#[test]
fn no_vcpu_goes_on_before_all_pages_are_written() {
    let (guest, first, mut second) = two_processors();
    // Both, though only one vCPU has run.
    let versions = PAGES.map(|page| read(&guest, page, 0).1);
    assert_eq!(versions, [2, 2]);
    let ahead = 1 << 50;
    let clock = kvm_clock_data {
        clock: ahead,
        ..Default::default()
    };
    guest.vm.set_clock(&clock).unwrap();
    halt(&mut second);
    for page in PAGES {
        let (ns, version) = read(&guest, page, msr(&first, MSR_TSC));
        assert!(ns >= ahead, "{page:#x}: {ns}");
        assert_eq!(version, 4);
    }
    // The TSC of one is set: the page of that one only.
    set_msr(&first, MSR_TSC, 1 << 52);
    halt(&mut second);
    let versions = PAGES.map(|page| read(&guest, page, 0).1);
    assert_eq!(versions, [6, 4]);
    let (ns, _) = read(&guest, PAGES[0], msr(&first, MSR_TSC));
    assert!((ahead..ahead + (1 << 40)).contains(&ns), "{ns}");
}

/// A guest that was stopped between two looks at the version and goes on elsewhere must see another.
#[test]
fn the_version_goes_on_from_what_is_in_memory() {
    for (before, after) in [(0u32, 2u32), (8, 10), (9, 12), (0xffff_fffe, 0)] {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(&[0xf4]);
        guest.ram.write(PAGES[0] as usize, before);
        set_msr(&vcpu, MSR_KVM_SYSTEM_TIME_NEW, PAGES[0] | 1);
        halt(&mut vcpu);
        assert_eq!(guest.ram.read::<u32>(PAGES[0] as usize), after);
    }
}

/// KVM_GET_CLOCK is what the guest computes at the same TSC, whatever frequency the VMM has named: a
/// migration sets the clock to it, which must not be in the guest's past.
#[test]
fn the_vmm_reads_the_guests_time() {
    for khz in [None, Some(-200i64), Some(200)] {
        let guest = Guest::new();
        let mut vcpu = guest.vcpu(&[0xf4]);
        if let Some(off_by_ppm) = khz {
            let own = i64::from(vcpu.get_tsc_khz().unwrap());
            vcpu.set_tsc_khz((own + own * off_by_ppm / 1_000_000) as u32)
                .unwrap();
        }
        set_msr(&vcpu, MSR_KVM_SYSTEM_TIME_NEW, PAGES[0] | 1);
        halt(&mut vcpu);
        std::thread::sleep(std::time::Duration::from_millis(200));
        let before = guest.vm.get_clock().unwrap().clock;
        let seen = read(&guest, PAGES[0], msr(&vcpu, MSR_TSC)).0;
        let after = guest.vm.get_clock().unwrap().clock;
        assert!(
            (before..=after).contains(&seen),
            "{khz:?}: {before} {seen} {after}"
        );
    }
}
