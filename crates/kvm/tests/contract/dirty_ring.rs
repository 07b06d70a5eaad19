//! KVM_CAP_DIRTY_LOG_RING, KVM_RESET_DIRTY_RINGS, and what rings forbid.

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::support::*;
use crate::vcpu::VcpuFixture;

/// Where the ring begins in the vCPU's descriptor.
const AT: u64 = KVM_DIRTY_LOG_PAGE_OFFSET as u64 * 4096;

fn enable(f: &Fixture, cap: u32, bytes: u64) -> Result<i32, Errno> {
    let cap = kvm_enable_cap {
        cap,
        args: [bytes, 0, 0, 0],
        ..Default::default()
    };
    f.vm_with(KVM_ENABLE_CAP, &cap)
}

#[test]
pub fn sizes() {
    for cap in [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL] {
        let f = Fixture::new();
        for bad in [0, 1024, 2048, 4096 + 16, 3 * 4096] {
            assert_eq!(enable(&f, cap, bad), Err(Errno::EINVAL), "{bad}");
        }
        assert_eq!(enable(&f, cap, 2 << 20), Err(Errno::E2BIG));
        assert_eq!(enable(&f, cap, 1 << 31), Err(Errno::E2BIG));
        // Not yet: what was refused has changed nothing.
        assert_eq!(f.vm(KVM_RESET_DIRTY_RINGS, 0), Err(Errno::EINVAL));
        assert_eq!(enable(&f, cap, 4096), Ok(0));
        assert_eq!(enable(&f, cap, 4096), Err(Errno::EINVAL), "twice");
        assert_eq!(f.vm(KVM_RESET_DIRTY_RINGS, 0), Ok(0));
    }
    let f = Fixture::new();
    assert_eq!(enable(&f, KVM_CAP_DIRTY_LOG_RING, 1 << 20), Ok(0));
}

#[test]
pub fn only_before_the_first_vcpu() {
    let f = Fixture::new();
    f.vcpu(0).unwrap();
    assert_eq!(enable(&f, KVM_CAP_DIRTY_LOG_RING, 4096), Err(Errno::EINVAL));
    // Rings and bitmaps together are not for x86.
    assert_eq!(
        enable(&f, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 1),
        Err(Errno::EINVAL)
    );
}

#[test]
pub fn there_are_no_bitmaps_then() {
    let f = Fixture::new();
    assert_eq!(enable(&f, KVM_CAP_DIRTY_LOG_RING, 4096), Ok(0));
    let ram = ram(1);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: ram.address(),
    };
    assert_eq!(f.vm_with(KVM_SET_USER_MEMORY_REGION, &region), Ok(0));
    let bitmap = f.user.at(&0u64);
    // Whether the slot exists or not.
    for slot in [0u64, 1, 1 << 20] {
        let get = f.vm_with(KVM_GET_DIRTY_LOG, &[slot, bitmap]);
        assert_eq!(get, Err(Errno::ENXIO), "{slot}");
        let clear = f.vm_with(KVM_CLEAR_DIRTY_LOG, &[slot | 1 << 32, 0, bitmap]);
        assert_eq!(clear, Err(Errno::ENXIO), "{slot}");
    }
}

#[test]
pub fn the_ring_is_shared_and_not_executable() {
    software_only!();
    let f = Fixture::new();
    assert_eq!(enable(&f, KVM_CAP_DIRTY_LOG_RING, 8192), Ok(0));
    assert_eq!(f.system(KVM_GET_VCPU_MMAP_SIZE, 0), Ok(12288));
    let v = VcpuFixture::of(f);
    let check = |offset, len, shared, exec| v.inner().check_mapping(offset, len, shared, exec);
    assert_eq!(check(AT, 8192, true, false), Ok(()));
    for (offset, len) in [(AT, 8192), (AT + 4096, 4096), (AT - 4096, 8192), (AT, 1)] {
        assert_eq!(check(offset, len, false, false), Err(Errno::EINVAL));
        assert_eq!(check(offset, len, true, true), Err(Errno::EINVAL));
    }
    // The other pages, and those behind it.
    for (offset, len) in [(0, 12288), (AT - 4096, 4096), (AT + 8192, 4096)] {
        assert_eq!(check(offset, len, false, true), Ok(()));
    }
    // Without a ring there is nothing to protect.
    let v = VcpuFixture::new();
    assert_eq!(v.inner().check_mapping(AT, 4096, false, true), Ok(()));
}
