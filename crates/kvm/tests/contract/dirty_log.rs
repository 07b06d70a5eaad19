//! KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, manual protection.

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;

const GPA: u64 = 0x10_0000;
const PAGES: usize = 130;

struct Logged {
    f: Fixture,
    ram: Mapping,
    bitmap: u64,
}

impl Logged {
    fn new(manual: u64) -> Self {
        let f = Fixture::new();
        if manual != 0 {
            assert_eq!(f.vm_with(KVM_ENABLE_CAP, &manual_protect(manual)), Ok(0));
        }
        let logged = Self {
            bitmap: f.user.at(&[0u64; 3]),
            ram: ram(PAGES),
            f,
        };
        assert_eq!(logged.log(true), Ok(0));
        logged
    }
    fn region(&self) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: 7,
            flags: 0,
            guest_phys_addr: GPA,
            memory_size: PAGES as u64 * 4096,
            userspace_addr: self.ram.address(),
        }
    }
    fn log(&self, on: bool) -> Result<i32, Errno> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let region = kvm_userspace_memory_region {
            flags,
            ..self.region()
        };
        self.f.vm_with(KVM_SET_USER_MEMORY_REGION, &region)
    }
    fn write(&self, page: u64) {
        self.f
            .inner()
            .memory()
            .write(GPA + page * 4096, &[1])
            .unwrap();
    }
    fn get(&self) -> Result<[u64; 3], Errno> {
        self.f.vm_with(KVM_GET_DIRTY_LOG, &[7u64, self.bitmap])?;
        Ok(self.f.user.value(self.bitmap))
    }
    fn clear(&self, first: u64, count: u32, bits: [u64; 3]) -> Result<i32, Errno> {
        let bitmap = self.f.user.at(&bits);
        self.f.vm_with(
            KVM_CLEAR_DIRTY_LOG,
            &[7 | u64::from(count) << 32, first, bitmap],
        )
    }
}

fn manual_protect(flags: u64) -> kvm_enable_cap {
    kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [flags, 0, 0, 0],
        ..Default::default()
    }
}

#[test]
pub fn get_takes_what_was_written() {
    software_only!();
    let l = Logged::new(0);
    assert_eq!(l.get(), Ok([0; 3]));
    l.write(0);
    l.write(65);
    l.write(129);
    assert_eq!(l.get(), Ok([1, 2, 2]));
    assert_eq!(l.get(), Ok([0; 3]));
}

#[test]
pub fn get_refuses() {
    software_only!();
    let l = Logged::new(0);
    let get = |slot: u64, bitmap| l.f.vm_with(KVM_GET_DIRTY_LOG, &[slot, bitmap]);
    assert_eq!(get(6, l.bitmap), Err(Errno::ENOENT));
    assert_eq!(get(32764, l.bitmap), Err(Errno::EINVAL));
    assert_eq!(get(2 << 16 | 7, l.bitmap), Err(Errno::EINVAL));
    // What could not be delivered is not forgotten.
    l.write(3);
    assert_eq!(get(7, NOWHERE), Err(Errno::EFAULT));
    assert_eq!(l.get(), Ok([8, 0, 0]));
    assert_eq!(l.log(false), Ok(0));
    assert_eq!(get(7, l.bitmap), Err(Errno::ENOENT));
}

#[test]
pub fn logging_survives_a_move_and_begins_anew_when_switched_on() {
    software_only!();
    let l = Logged::new(0);
    l.write(2);
    let moved = kvm_userspace_memory_region {
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: GPA + 0x1000,
        ..l.region()
    };
    assert_eq!(l.f.vm_with(KVM_SET_USER_MEMORY_REGION, &moved), Ok(0));
    assert_eq!(l.get(), Ok([4, 0, 0]));
    assert_eq!(l.log(true), Ok(0));
    l.write(5);
    assert_eq!(l.log(false), Ok(0));
    assert_eq!(l.log(true), Ok(0));
    assert_eq!(l.get(), Ok([0; 3]));
}

#[test]
pub fn manual_protection_clears_only_on_request() {
    software_only!();
    let l = Logged::new(1);
    l.write(0);
    l.write(64);
    l.write(129);
    assert_eq!(l.get(), Ok([1, 1, 2]));
    assert_eq!(l.get(), Ok([1, 1, 2]));
    assert_eq!(l.clear(64, 64, [1, 0, 0]), Ok(0));
    assert_eq!(l.get(), Ok([1, 0, 2]));
    // The last, partial word; bits that are not set in the bitmap stay.
    assert_eq!(l.clear(128, 2, [1, 0, 0]), Ok(0));
    assert_eq!(l.get(), Ok([1, 0, 2]));
    assert_eq!(l.clear(0, 130, [!0; 3]), Ok(0));
    assert_eq!(l.get(), Ok([0; 3]));
}

#[test]
pub fn clear_refuses() {
    software_only!();
    let l = Logged::new(1);
    l.write(1);
    assert_eq!(l.clear(1, 64, [!0; 3]), Err(Errno::EINVAL));
    assert_eq!(l.clear(0, 63, [!0; 3]), Err(Errno::EINVAL));
    assert_eq!(l.clear(192, 64, [!0; 3]), Err(Errno::EINVAL));
    assert_eq!(l.clear(128, 3, [!0; 3]), Err(Errno::EINVAL));
    let raw = |slot: u64, bitmap| {
        l.f.vm_with(KVM_CLEAR_DIRTY_LOG, &[slot | 64 << 32, 0, bitmap])
    };
    assert_eq!(raw(6, l.bitmap), Err(Errno::ENOENT));
    assert_eq!(raw(0x2_0007, l.bitmap), Err(Errno::EINVAL));
    assert_eq!(raw(7, NOWHERE), Err(Errno::EFAULT));
    assert_eq!(l.get(), Ok([2, 0, 0]));
}

#[test]
pub fn initially_set() {
    let l = Logged::new(3);
    assert_eq!(l.get(), Ok([!0, !0, 3]));
}

#[test]
pub fn manual_protection_flags() {
    let f = Fixture::new();
    for bad in [2, 4, 5] {
        assert_eq!(
            f.vm_with(KVM_ENABLE_CAP, &manual_protect(bad)),
            Err(Errno::EINVAL)
        );
    }
    let flags = kvm_enable_cap {
        flags: 1,
        ..manual_protect(1)
    };
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &flags), Err(Errno::EINVAL));
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &manual_protect(0)), Ok(0));
}

/// Nothing is dirty in a slot that nobody has touched, and forgetting that is no error.
#[test]
pub fn clearing_what_is_clean() {
    let l = Logged::new(1);
    assert_eq!(l.get(), Ok([0; 3]));
    assert_eq!(l.clear(0, 130, [!0; 3]), Ok(0));
    assert_eq!(l.get(), Ok([0; 3]));
}
