//! MSR_KVM_STEAL_TIME and the guest's `struct kvm_steal_time`.

use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::support::*;
use crate::vcpu::VcpuFixture;

const AT: usize = 0x2040;
const ENABLED: u64 = 1;

#[test]
pub fn the_guests_structure_is_added_to() {
    let f = Fixture::new();
    if f.system(KVM_CHECK_EXTENSION, KVM_CAP_STEAL_TIME.into()) == Ok(0) {
        return;
    }
    let ram = ram(4);
    // hlt
    ram.write(0, 0xf4u8);
    let region = kvm_userspace_memory_region {
        memory_size: 0x4000,
        userspace_addr: ram.address(),
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_USER_MEMORY_REGION, &region), Ok(0));
    let v = VcpuFixture::of(f);
    let mut sregs: kvm_sregs = v.get(KVM_GET_SREGS);
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    assert_eq!(v.set(KVM_SET_SREGS, &sregs), Ok(0));
    let steal_time = |value| {
        let entry = kvm_msr_entry {
            index: MSR_KVM_STEAL_TIME,
            data: value,
            ..Default::default()
        };
        v.list(KVM_SET_MSRS, &[entry]).0
    };
    let run = || {
        let regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(v.set(KVM_SET_REGS, &regs), Ok(0));
        assert_eq!(v.call(KVM_RUN, 0), Ok(0));
    };
    // What was there before: time, an odd version, flags, preempted.
    ram.write(AT, 1000u64);
    ram.write(AT + 8, 7u32);
    ram.write(AT + 12, 0u32);
    // Not aligned to 64 bytes.
    assert_eq!(steal_time((AT as u64 + 32) | ENABLED), Ok(0));
    run();
    assert_eq!((ram.read::<u64>(AT), ram.read::<u32>(AT + 8)), (1000, 7));

    assert_eq!(steal_time(AT as u64 | ENABLED), Ok(1));
    run();
    let version: u32 = ram.read(AT + 8);
    assert!(version > 8 && version.is_multiple_of(2), "{version}");
    let steal: u64 = ram.read(AT);
    assert!(steal >= 1000);
    assert_eq!((ram.read::<u32>(AT + 12), ram.read::<u8>(AT + 16)), (0, 0));
    // It never goes back.
    for _ in 0..10 {
        let before: u64 = ram.read(AT);
        run();
        assert!(ram.read::<u64>(AT) >= before);
    }
    // Off: nothing is written any more.
    assert_eq!(steal_time(0), Ok(1));
    ram.write(AT + 8, 3u32);
    run();
    assert_eq!(ram.read::<u32>(AT + 8), 3);
    // Not RAM: the guest's loss.
    assert_eq!(steal_time(0x100_0000 | ENABLED), Ok(1));
    run();
}
