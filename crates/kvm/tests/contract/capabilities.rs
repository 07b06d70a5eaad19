//! KVM_CHECK_EXTENSION and KVM_ENABLE_CAP on the VM.

use anykvm::{CAPABILITIES, Errno, ObjectKind};
use anykvm_abi::ioctl::*;
use anykvm_abi::*;

use crate::support::*;

fn cap(cap: u32, argument: u64) -> kvm_enable_cap {
    kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    }
}

#[test]
pub fn check_extension_on_both_descriptors() {
    let f = Fixture::new();
    for (capability, value) in [
        (KVM_CAP_USER_MEMORY, 1),
        (KVM_CAP_NR_MEMSLOTS, 32764),
        (KVM_CAP_IRQ_ROUTING, 4096),
        (KVM_CAP_MAX_VCPUS, 1024),
        (KVM_CAP_MAX_VCPU_ID, 4096),
        (KVM_CAP_COALESCED_MMIO, 2),
        (KVM_CAP_ADJUST_CLOCK, 0xe),
        (KVM_CAP_MULTI_ADDRESS_SPACE, 2),
        (KVM_CAP_MCE, 32),
        (KVM_CAP_X2APIC_API, 3),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
        (KVM_CAP_DIRTY_LOG_RING, 1 << 20),
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 1 << 20),
        (KVM_CAP_XEN_HVM, 1),
        (KVM_CAP_NESTED_STATE, 128),
        // Not there.
        (KVM_CAP_S390_PSW, 0),
        (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0),
        (0x7fff_ffff, 0),
    ] {
        assert_eq!(
            f.system(KVM_CHECK_EXTENSION, capability.into()),
            Ok(value),
            "{capability}"
        );
        assert_eq!(
            f.vm(KVM_CHECK_EXTENSION, capability.into()),
            Ok(value),
            "{capability}"
        );
    }
    let nr = f
        .system(KVM_CHECK_EXTENSION, KVM_CAP_NR_VCPUS.into())
        .unwrap();
    assert!((1..=1024).contains(&nr));
}

#[test]
pub fn enable_cap_refuses() {
    software_only!();
    let f = Fixture::new();
    for (bad, argument) in [
        (KVM_CAP_USER_MEMORY, 0),
        (KVM_CAP_S390_PSW, 1),
        (KVM_CAP_X2APIC_API, 4),
        (KVM_CAP_X86_DISABLE_EXITS, 16),
        (KVM_CAP_X86_USER_SPACE_MSR, 8),
        (KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2),
        (KVM_CAP_EXIT_HYPERCALL, 1),
        (KVM_CAP_VM_DISABLE_NX_HUGE_PAGES, 1),
        (KVM_CAP_DISABLE_QUIRKS2, 1 << 40),
        (KVM_CAP_HALT_POLL, 1 << 32),
        (KVM_CAP_SPLIT_IRQCHIP, 4097),
        (0xffff, 0),
    ] {
        assert_eq!(
            f.vm_with(KVM_ENABLE_CAP, &cap(bad, argument)),
            Err(Errno::EINVAL),
            "{bad}"
        );
    }
    let flags = kvm_enable_cap {
        flags: 1,
        ..cap(KVM_CAP_X2APIC_API, 1)
    };
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &flags), Err(Errno::EINVAL));
    assert_eq!(f.inner().enabled().x2apic_api(), 0);
}

#[test]
pub fn enabled_is_in_force() {
    software_only!();
    let f = Fixture::new();
    for (capability, argument) in [
        (KVM_CAP_EXCEPTION_PAYLOAD, 1),
        (KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
        (KVM_CAP_X86_USER_SPACE_MSR, 7),
        (KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1),
        (KVM_CAP_MSR_PLATFORM_INFO, 0),
        (KVM_CAP_X86_DISABLE_EXITS, 2),
        (KVM_CAP_X2APIC_API, 3),
        (KVM_CAP_HALT_POLL, 1000),
        (KVM_CAP_DISABLE_QUIRKS2, 1),
    ] {
        assert_eq!(
            f.vm_with(KVM_ENABLE_CAP, &cap(capability, argument)),
            Ok(0),
            "{capability}"
        );
    }
    let enabled = f.inner().enabled();
    assert!(enabled.exception_payload());
    assert!(enabled.triple_fault_event());
    assert_eq!(enabled.user_space_msr(), 7);
    assert!(enabled.exit_on_emulation_failure());
    assert!(!enabled.msr_platform_info());
    assert_eq!(enabled.disabled_exits(), 2);
    assert_eq!(enabled.x2apic_api(), 3);
    assert_eq!(enabled.halt_poll_ns(), 1000);
    assert!(!enabled.has_quirk(KVM_X86_QUIRK_LINT0_REENABLED));
    assert!(enabled.has_quirk(KVM_X86_QUIRK_CD_NW_CLEARED));
    // These must come before the first vCPU.
    let _vcpu = f.vcpu(0).unwrap();
    for (late, argument) in [(KVM_CAP_X86_DISABLE_EXITS, 2), (KVM_CAP_MAX_VCPU_ID, 4)] {
        assert_eq!(
            f.vm_with(KVM_ENABLE_CAP, &cap(late, argument)),
            Err(Errno::EINVAL),
            "{late}"
        );
    }
}

#[test]
pub fn msr_filter() {
    let f = Fixture::new();
    let bitmap = f.user.at(&[!0u64; 4]);
    let range = |flags, nmsrs, bitmap| kvm_user_msr_filter_range {
        flags,
        nmsrs,
        base: 0x10,
        pad: 0,
        bitmap,
    };
    let filter = |flags, range| {
        let mut filter = kvm_user_msr_filter {
            flags,
            ..Default::default()
        };
        filter.ranges[0] = range;
        filter
    };
    let set = |filter| f.vm_with(KVM_X86_SET_MSR_FILTER, &filter);
    assert_eq!(set(filter(0, range(3, 200, bitmap))), Ok(0));
    assert_eq!(set(filter(1, range(1, 1, bitmap))), Ok(0));
    assert_eq!(set(kvm_user_msr_filter::default()), Ok(0));
    for (bad, errno) in [
        (filter(2, range(3, 1, bitmap)), Errno::EINVAL),
        // Denying everything is not a filter.
        (filter(1, range(3, 0, bitmap)), Errno::EINVAL),
        (filter(0, range(4, 1, bitmap)), Errno::EINVAL),
        (filter(0, range(0, 1, bitmap)), Errno::EINVAL),
        (filter(0, range(3, 1536 * 8 + 1, bitmap)), Errno::EINVAL),
        (filter(0, range(3, 1, NOWHERE)), Errno::EFAULT),
    ] {
        assert_eq!(set(bad), Err(errno), "{bad:?}");
    }
}

#[test]
pub fn xen_hvm_config() {
    let f = Fixture::new();
    let ram = ram(4);
    let region = kvm_userspace_memory_region {
        memory_size: 0x4000,
        userspace_addr: ram.address(),
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_USER_MEMORY_REGION, &region), Ok(0));
    let blob_32 = f.user.at(&[0x32u8; 4096]);
    let blob_64 = f.user.at(&[[0x64u8; 4096], [0x65; 4096]]);
    let config = kvm_xen_hvm_config {
        flags: 0,
        msr: 0x4000_0000,
        blob_addr_32: blob_32,
        blob_addr_64: blob_64,
        blob_size_32: 1,
        blob_size_64: 2,
        pad2: [0; 30],
    };
    assert_eq!(f.vm_with(KVM_XEN_HVM_CONFIG, &config), Ok(0));
    software_only!();
    let vm = f.inner();
    assert_eq!(
        vm.write_xen_hypercall_page(0x4000_0001, 0x1000, false),
        None
    );
    assert_eq!(
        vm.write_xen_hypercall_page(0x4000_0000, 0x1000, false),
        Some(true)
    );
    assert_eq!(
        vm.write_xen_hypercall_page(0x4000_0000, 0x2001, true),
        Some(true)
    );
    assert_eq!(
        [ram.read::<u8>(0x1000), ram.read(0x1fff), ram.read(0x2000)],
        [0x32, 0x32, 0x65]
    );
    // No such page of the blob, no such memory.
    assert_eq!(
        vm.write_xen_hypercall_page(0x4000_0000, 0x2001, false),
        Some(false)
    );
    assert_eq!(
        vm.write_xen_hypercall_page(0x4000_0000, 0x8000, false),
        Some(false)
    );
    let bad = [
        kvm_xen_hvm_config {
            flags: 1 << 20,
            ..config
        },
        kvm_xen_hvm_config {
            flags: KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
            ..config
        },
    ];
    for bad in bad {
        assert_eq!(f.vm_with(KVM_XEN_HVM_CONFIG, &bad), Err(Errno::EINVAL));
    }
    assert_eq!(
        vm.write_xen_hypercall_page(0x4000_0000, 0x1000, false),
        Some(true)
    );
}

#[test]
pub fn controllers_and_ids_after_the_first_vcpu() {
    let f = Fixture::new();
    let _vcpu = f.vcpu(0).unwrap();
    let split = cap(KVM_CAP_SPLIT_IRQCHIP, 24);
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &split), Err(Errno::EEXIST));
    // The limit that is in force may be named, and 0 asks for nothing.
    for (ids, result) in [
        (4096, Ok(0)),
        (0, Err(Errno::EINVAL)),
        (8, Err(Errno::EINVAL)),
    ] {
        let ids = cap(KVM_CAP_MAX_VCPU_ID, ids);
        assert_eq!(f.vm_with(KVM_ENABLE_CAP, &ids), result);
    }
    let f = Fixture::new();
    let nothing = cap(KVM_CAP_MAX_VCPU_ID, 0);
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &nothing), Ok(0));
    f.vcpu(100).unwrap();
}

#[test]
pub fn each_is_what_the_table_says() {
    software_only!();
    for row in CAPABILITIES {
        let f = Fixture::new();
        let value = Ok(row.value() as i32);
        let at = |handle: &Handle| handle.call(KVM_CHECK_EXTENSION, row.nr.into(), &f.user);
        assert_eq!(at(&f.kvm), value, "{}", row.name);
        if ![KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES].contains(&row.nr) {
            assert_eq!(at(&f.vm), value, "{}", row.name);
        }

        // To enable with 0 is harmless for all that can be enabled, but for a ring without room.
        let ring = [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL].contains(&row.nr);
        let result = |on| {
            if row.enabled_on == Some(on) && !ring {
                Ok(0)
            } else {
                Err(Errno::EINVAL)
            }
        };
        let enable = f.user.at(&cap(row.nr, 0));
        let vm = f.vm(KVM_ENABLE_CAP, enable);
        assert_eq!(vm, result(ObjectKind::Vm), "{}", row.name);
        let vcpu = f.vcpu(0).unwrap();
        let vcpu = vcpu.call(KVM_ENABLE_CAP, enable, &f.user);
        assert_eq!(vcpu, result(ObjectKind::Vcpu), "{}", row.name);
    }
}
