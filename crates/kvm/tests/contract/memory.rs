//! Memory slots, KVM's own memory, aliases.

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_memory_alias,
    kvm_memory_region, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use anykvm_cpu::memory::mapping::Mapping;

use crate::support::*;

fn region(slot: u32, gpa: u64, size: u64, host: u64) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: host,
    }
}

impl Fixture {
    fn set(&self, region: kvm_userspace_memory_region) -> Result<i32, Errno> {
        self.vm_with(KVM_SET_USER_MEMORY_REGION, &region)
    }
    /// Slots in force: (gpa, size, readonly).
    fn slots(&self, space: usize) -> Vec<(u64, u64, bool)> {
        let map = self.inner().memory().map(space);
        map.slots().map(|s| (s.gpa, s.size, s.readonly)).collect()
    }
}

const HOST: u64 = 0x7000_0000_0000;

/// Thousands of slots, put in and taken out in no order.
#[test]
pub fn many_slots() {
    software_only!();
    const SLOTS: u32 = 2000;
    const STEP: u64 = 0x4000;
    let f = Fixture::new();
    let scattered = |slot: u32| u64::from(slot * 37 % SLOTS) * STEP;
    for slot in 0..SLOTS {
        assert_eq!(f.set(region(slot, scattered(slot), 0x2000, HOST)), Ok(0));
    }
    let all: Vec<_> = (0..u64::from(SLOTS))
        .map(|n| (n * STEP, 0x2000, false))
        .collect();
    assert_eq!(f.slots(0), all);
    for slot in 0..SLOTS {
        let gpa = scattered(slot);
        let overlapping = region(SLOTS, gpa + 0x1000, 0x1000, HOST);
        assert_eq!(f.set(overlapping), Err(Errno::EEXIST));
        let onto_the_one_below = region(slot, gpa.wrapping_sub(STEP - 0x1000), 0x2000, HOST);
        if gpa != 0 {
            assert_eq!(f.set(onto_the_one_below), Err(Errno::EEXIST));
        }
    }
    // Half of them go, the others move a page on, over where they were.
    for slot in 0..SLOTS {
        let size = if slot % 2 == 0 { 0 } else { 0x2000 };
        let at = scattered(slot) + 0x1000;
        assert_eq!(f.set(region(slot, at, size, HOST)), Ok(0));
    }
    let mut left: Vec<_> = (1..SLOTS).step_by(2).map(scattered).collect();
    left.sort_unstable();
    let left: Vec<_> = left
        .iter()
        .map(|gpa| (gpa + 0x1000, 0x2000, false))
        .collect();
    assert_eq!(f.slots(0), left);
    assert_eq!(f.slots(1), []);
}

#[test]
pub fn create_move_delete() {
    software_only!();
    let f = Fixture::new();
    assert_eq!(f.set(region(3, 0x1000, 0x3000, HOST)), Ok(0));
    assert_eq!(f.slots(0), [(0x1000, 0x3000, false)]);
    // Nothing to change.
    assert_eq!(f.set(region(3, 0x1000, 0x3000, HOST)), Ok(0));
    // A slot may be moved over itself.
    assert_eq!(f.set(region(3, 0x2000, 0x3000, HOST)), Ok(0));
    assert_eq!(f.slots(0), [(0x2000, 0x3000, false)]);
    assert_eq!(f.set(region(3, 0, 0, 0)), Ok(0));
    assert_eq!(f.slots(0), []);
    assert_eq!(f.set(region(3, 0, 0, 0)), Err(Errno::EINVAL));
}

#[test]
pub fn refused_and_unchanged() {
    software_only!();
    let f = Fixture::new();
    assert_eq!(f.set(region(0, 0x10000, 0x4000, HOST)), Ok(0));
    assert_eq!(f.set(region(1, 0x20000, 0x4000, HOST + 0x4000)), Ok(0));
    let before = f.slots(0);
    let flags = |flags, r| kvm_userspace_memory_region { flags, ..r };
    let invalid = [
        region(2, 0x30001, 0x1000, HOST),
        region(2, 0x30000, 0x1001, HOST),
        region(2, 0x30000, 0x1000, HOST + 1),
        region(2, 0x30000, 0x1000, 1 << 63),
        region(2, 0x30000, 0x1000, 0x7fff_ffff_f000),
        region(2, u64::MAX - 0xfff, 0x1000, HOST),
        region(2, 0x30000, 1 << 43, HOST),
        region(32764, 0x30000, 0x1000, HOST),
        region(2 << 16, 0x30000, 0x1000, HOST),
        flags(1 << 3, region(2, 0x30000, 0x1000, HOST)),
        flags(KVM_MEM_GUEST_MEMFD, region(2, 0x30000, 0x1000, HOST)),
        // Existing slots: resize, other memory, read-only changed.
        region(0, 0x10000, 0x3000, HOST),
        region(0, 0x10000, 0x4000, HOST + 0x10000),
        flags(KVM_MEM_READONLY, region(0, 0x10000, 0x4000, HOST)),
    ];
    for bad in invalid {
        assert_eq!(f.set(bad), Err(Errno::EINVAL), "{bad:?}");
    }
    let overlapping = [
        region(2, 0x10000, 0x1000, HOST),
        region(2, 0x13000, 0x1000, HOST),
        region(2, 0xf000, 0x2000, HOST),
        region(2, 0, 0x100000, HOST),
        region(0, 0x20000, 0x4000, HOST),
    ];
    for bad in overlapping {
        assert_eq!(f.set(bad), Err(Errno::EEXIST), "{bad:?}");
    }
    assert_eq!(f.slots(0), before);
    assert_eq!(f.set(region(32763, 0x14000, 0x1000, HOST)), Ok(0));
}

#[test]
pub fn address_spaces_are_separate() {
    software_only!();
    let f = Fixture::new();
    assert_eq!(f.set(region(1, 0xa0000, 0x20000, HOST)), Ok(0));
    assert_eq!(f.set(region(1 << 16 | 1, 0xa0000, 0x10000, HOST)), Ok(0));
    assert_eq!(f.slots(0), [(0xa0000, 0x20000, false)]);
    assert_eq!(f.slots(1), [(0xa0000, 0x10000, false)]);
}

#[test]
pub fn readonly_and_the_longer_structure() {
    let f = Fixture::new();
    let two = kvm_userspace_memory_region2 {
        slot: 0,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: 0xf0000,
        memory_size: 0x10000,
        userspace_addr: HOST,
        ..Default::default()
    };
    let at = f.user.room(size_of_val(&two));
    let write = |r: &kvm_userspace_memory_region2| {
        anykvm::UserMemory::write(&f.user, at, anykvm_abi::Plain::as_bytes(r)).unwrap();
    };
    write(&two);
    assert_eq!(f.vm(KVM_SET_USER_MEMORY_REGION2, at), Ok(0));
    write(&kvm_userspace_memory_region2 {
        slot: 1,
        flags: KVM_MEM_GUEST_MEMFD,
        ..two
    });
    assert_eq!(f.vm(KVM_SET_USER_MEMORY_REGION2, at), Err(Errno::EINVAL));
    software_only!();
    assert_eq!(f.slots(0), [(0xf0000, 0x10000, true)]);
    assert!(f.inner().memory().write(0xf0000, &[0]).is_err());
}

#[test]
pub fn own_memory_is_the_vm_file() {
    software_only!();
    let f = Fixture::new();
    let own = |slot, gpa, size| kvm_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: size,
    };
    assert_eq!(
        f.vm_with(KVM_SET_MEMORY_REGION, &own(0, 0x5000, 0x2000)),
        Ok(0)
    );
    f.inner().memory().write(0x6ffe, &[1, 2]).unwrap();
    let file = Mapping::new(f.vm.fd(), 0x5000, 0x2000).unwrap();
    assert_eq!([file.read::<u8>(0x1ffe), file.read(0x1fff)], [1, 2]);
    file.write(0, 7u8);
    let mut byte = [0];
    f.inner().memory().read(0x5000, &mut byte).unwrap();
    assert_eq!(byte, [7]);

    for (bad, errno) in [
        (own(1, 0x6000, 0x1000), Errno::EEXIST),
        (own(0, 0x5000, 0x1000), Errno::EINVAL),
        (own(0, 0x8000, 0x2000), Errno::EINVAL),
        (own(1, 0x8001, 0x1000), Errno::EINVAL),
        (own(1, 0x8000, 0x123), Errno::EINVAL),
        (own(9, 0, 0), Errno::EINVAL),
    ] {
        assert_eq!(
            f.vm_with(KVM_SET_MEMORY_REGION, &bad),
            Err(errno),
            "{bad:?}"
        );
    }
    assert_eq!(f.set(region(0, 0x5000, 0x2000, HOST)), Err(Errno::EINVAL));

    // A slot made again begins with zeros.
    assert_eq!(f.vm_with(KVM_SET_MEMORY_REGION, &own(0, 0, 0)), Ok(0));
    assert_eq!(
        f.vm_with(KVM_SET_MEMORY_REGION, &own(1, 0x5000, 0x1000)),
        Ok(0)
    );
    f.inner().memory().read(0x5000, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
pub fn aliases_show_other_slots() {
    let f = Fixture::new();
    let ram = ram(4);
    assert_eq!(f.set(region(0, 0x10_0000, 0x4000, ram.address())), Ok(0));
    let alias = |slot, gpa, size, target| kvm_memory_alias {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: size,
        target_phys_addr: target,
    };
    assert_eq!(
        f.vm_with(KVM_SET_MEMORY_ALIAS, &alias(0, 0xa_0000, 0x2000, 0x10_1000)),
        Ok(0)
    );
    software_only!();
    f.inner().memory().write(0xa_0004, &[9]).unwrap();
    assert_eq!(ram.read::<u8>(0x1004), 9);

    let before = f.slots(0);
    for (bad, errno) in [
        (alias(4, 0xb_0000, 0x1000, 0x10_0000), Errno::EINVAL),
        (alias(1, 0xb_0001, 0x1000, 0x10_0000), Errno::EINVAL),
        (alias(1, 0xb_0000, 0x1001, 0x10_0000), Errno::EINVAL),
        (alias(1, 0xb_0000, 0x1000, 0x10_0001), Errno::EINVAL),
        (alias(1, u64::MAX - 0xfff, 0x2000, 0x10_0000), Errno::EINVAL),
        (alias(1, 0xb_0000, 0x2000, u64::MAX - 0xfff), Errno::EINVAL),
        (alias(1, 0xa_1000, 0x1000, 0x10_0000), Errno::EEXIST),
        (alias(1, 0x10_3000, 0x1000, 0x10_0000), Errno::EEXIST),
    ] {
        assert_eq!(f.vm_with(KVM_SET_MEMORY_ALIAS, &bad), Err(errno), "{bad:?}");
    }
    assert_eq!(f.set(region(1, 0xa_1000, 0x1000, HOST)), Err(Errno::EEXIST));
    assert_eq!(f.slots(0), before);

    // The window follows the slot it shows.
    assert_eq!(f.set(region(0, 0, 0, 0)), Ok(0));
    assert!(f.inner().memory().write(0xa_0004, &[9]).is_err());
    assert_eq!(f.set(region(5, 0x10_1000, 0x1000, ram.address())), Ok(0));
    f.inner().memory().write(0xa_0008, &[3]).unwrap();
    assert_eq!(ram.read::<u8>(8), 3);
    assert_eq!(f.vm_with(KVM_SET_MEMORY_ALIAS, &alias(0, 0, 0, 0)), Ok(0));
    assert!(f.inner().memory().write(0xa_0008, &[3]).is_err());
}

#[test]
pub fn writes_through_an_alias_dirty_the_slot() {
    software_only!();
    let f = Fixture::new();
    let ram = ram(4);
    let mut slot = region(0, 0x10_0000, 0x4000, ram.address());
    slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
    assert_eq!(f.set(slot), Ok(0));
    let alias = kvm_memory_alias {
        guest_phys_addr: 0xa_0000,
        memory_size: 0x2000,
        target_phys_addr: 0x10_2000,
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_MEMORY_ALIAS, &alias), Ok(0));
    f.inner().memory().write(0xa_1000, &[1]).unwrap();
    let bitmap = f.user.at(&0u64);
    assert_eq!(f.vm_with(KVM_GET_DIRTY_LOG, &[0u64, bitmap]), Ok(0));
    assert_eq!(f.user.value::<u64>(bitmap), 0b1000);
}

#[test]
pub fn tss_identity_map_and_mmu_pages() {
    let f = Fixture::new();
    assert_eq!(f.vm(KVM_SET_TSS_ADDR, 0xfffb_d000), Ok(0));
    assert_eq!(f.vm(KVM_SET_TSS_ADDR, 0xffff_d000), Ok(0));
    assert_eq!(f.vm(KVM_SET_TSS_ADDR, 0xffff_e000), Err(Errno::EINVAL));
    assert_eq!(f.vm_with(KVM_SET_IDENTITY_MAP_ADDR, &0xfffb_c000u64), Ok(0));
    assert_eq!(f.vm(KVM_SET_NR_MMU_PAGES, 63), Err(Errno::EINVAL));
    assert_eq!(f.vm(KVM_SET_NR_MMU_PAGES, 1000), Ok(0));
    assert_eq!(f.vm(KVM_GET_NR_MMU_PAGES, 0), Ok(1000));
    let _vcpu = f.vcpu(0).unwrap();
    assert_eq!(
        f.vm_with(KVM_SET_IDENTITY_MAP_ADDR, &0xfffb_c000u64),
        Err(Errno::EINVAL)
    );
}
