//! `/dev/kvm`, creation of VMs and vCPUs, unknown ioctls.

use std::sync::Arc;

use anykvm::{Errno, Object, ObjectKind, UserMemory};
use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_CAP_MAX_VCPU_ID, Plain, kvm_cpuid_entry2, kvm_device_attr, kvm_enable_cap, kvm_msr_entry,
};

use crate::support::*;

#[test]
pub fn api_version_and_mmap_size_take_no_argument() {
    let f = Fixture::new();
    assert_eq!(f.system(KVM_GET_API_VERSION, 0), Ok(12));
    assert_eq!(f.system(KVM_GET_API_VERSION, 1), Err(Errno::EINVAL));
    assert_eq!(f.system(KVM_GET_VCPU_MMAP_SIZE, 0), Ok(12288));
    assert_eq!(f.system(KVM_GET_VCPU_MMAP_SIZE, 1), Err(Errno::EINVAL));
}

#[test]
pub fn create_vm_knows_two_types() {
    let f = Fixture::new();
    assert_eq!(f.system(KVM_CREATE_VM, 2), Err(Errno::EINVAL));
    assert_eq!(f.system(KVM_CREATE_VM, u64::MAX), Err(Errno::EINVAL));
    assert_eq!(f.system(KVM_CREATE_VM, 1 << 32), Err(Errno::EINVAL));
    let vm = f.kvm.make(KVM_CREATE_VM, 0, &f.user).unwrap();
    assert_eq!(vm.kind(), ObjectKind::Vm);
}

#[test]
pub fn unknown_ioctls() {
    let f = Fixture::new();
    let vcpu = f.vcpu(0).unwrap();
    for request in [0xae7f, 0x4008_ae46, 0, u32::MAX] {
        assert_eq!(f.system(request, 0), Err(Errno::EINVAL));
        assert_eq!(f.vm(request, 0), Err(Errno::ENOTTY));
        assert_eq!(vcpu.call(request, 0, &f.user), Err(Errno::EINVAL));
    }
    assert_eq!(f.vm(KVM_RUN, 0), Err(Errno::ENOTTY));
    assert_eq!(f.system(KVM_CREATE_VCPU, 0), Err(Errno::EINVAL));
    let memory_encryption = [
        KVM_MEMORY_ENCRYPT_OP,
        KVM_MEMORY_ENCRYPT_REG_REGION,
        KVM_MEMORY_ENCRYPT_UNREG_REGION,
    ];
    for request in memory_encryption {
        assert_eq!(f.vm(request, 0), Err(Errno::ENOTTY));
    }
    assert_eq!(f.vm(KVM_RESET_DIRTY_RINGS, 0), Err(Errno::EINVAL));
}

#[test]
pub fn vcpu_ids_are_unique_and_bounded() {
    let f = Fixture::new();
    let first = f.vcpu(0).unwrap();
    assert_eq!(f.vcpu(0).unwrap_err(), Errno::EEXIST);
    assert_eq!(f.vcpu(4096).unwrap_err(), Errno::EINVAL);
    assert_eq!(f.vcpu(1 << 32).unwrap_err(), Errno::EINVAL);
    f.vcpu(4095).unwrap();
    // The id of a vCPU whose descriptors are closed stays taken.
    drop(first);
    assert_eq!(f.vcpu(0).unwrap_err(), Errno::EEXIST);
}

#[test]
pub fn supported_cpuid_fits_or_is_e2big() {
    let f = Fixture::new();
    for request in [KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID] {
        let at = f.user.at(&[[0u32; 10]; 257]);
        let with_room = |n: u32| {
            f.user.write(at, n.as_bytes()).unwrap();
            f.system(request, at)
        };
        assert_eq!(with_room(256), Ok(0));
        let count: u32 = f.user.value(at);
        assert!(count >= 3);
        assert_eq!(f.user.value::<kvm_cpuid_entry2>(at + 8).function, 0);
        assert_eq!(with_room(count), Ok(0));
        assert_eq!(with_room(count - 1), Err(Errno::E2BIG));
        assert_eq!(with_room(0), Err(Errno::E2BIG));
        assert_eq!(f.system(request, NOWHERE), Err(Errno::EFAULT));
    }
}

#[test]
pub fn supported_cpuid_names_kvm() {
    let f = Fixture::new();
    let at = f
        .user
        .array(&[256u32, 0], &[kvm_cpuid_entry2::default(); 256]);
    assert_eq!(f.system(KVM_GET_SUPPORTED_CPUID, at), Ok(0));
    let count: u32 = f.user.value(at);
    let entries: Vec<kvm_cpuid_entry2> = (0..u64::from(count))
        .map(|i| f.user.value(at + 8 + i * 40))
        .collect();
    let kvm = entries.iter().find(|e| e.function == 0x4000_0000).unwrap();
    assert_eq!(
        [kvm.ebx, kvm.ecx, kvm.edx].map(u32::to_le_bytes).concat(),
        b"KVMKVMKVM\0\0\0"
    );
    for function in [
        0,
        1,
        7,
        0xd,
        0x4000_0001,
        0x8000_0000,
        0x8000_0001,
        0x8000_0008,
    ] {
        assert!(
            entries.iter().any(|e| e.function == function),
            "no leaf {function:#x}"
        );
    }
}

#[test]
pub fn msr_lists() {
    let f = Fixture::new();
    for request in [KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST] {
        let at = f.user.array(&0u32, &[0u32; 512]);
        assert_eq!(f.system(request, at), Err(Errno::E2BIG));
        let need: u32 = f.user.value(at);
        assert!(need > 0 && need < 512);
        assert_eq!(f.system(request, at), Ok(0));
        let indices: Vec<u32> = (0..u64::from(need))
            .map(|i| f.user.value(at + 4 + i * 4))
            .collect();
        let mut unique = indices.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), indices.len(), "an MSR is listed twice");
        assert_eq!(f.system(request, 0), Err(Errno::EFAULT));
    }
}

#[test]
pub fn feature_msrs() {
    let f = Fixture::new();
    let list = f.user.array(&512u32, &[0u32; 512]);
    assert_eq!(f.system(KVM_GET_MSR_FEATURE_INDEX_LIST, list), Ok(0));
    let first: u32 = f.user.value(list + 4);
    let entry = |index| kvm_msr_entry {
        index,
        ..Default::default()
    };
    // Stops at the first that is no feature.
    let at = f.user.array(
        &[3u32, 0],
        &[entry(first), entry(0x1234_5678), entry(first)],
    );
    assert_eq!(f.system(KVM_GET_MSRS, at), Ok(1));
    let at = f.user.array(&[256u32, 0], &[entry(first)]);
    assert_eq!(f.system(KVM_GET_MSRS, at), Err(Errno::E2BIG));
    assert_eq!(f.system(KVM_GET_MSRS, NOWHERE), Err(Errno::EFAULT));
}

#[test]
pub fn mce_and_device_attributes() {
    let f = Fixture::new();
    let at = f.user.at(&0u64);
    assert_eq!(f.system(KVM_X86_GET_MCE_CAP_SUPPORTED, at), Ok(0));
    assert_eq!(f.user.value::<u64>(at), 1 << 24 | 1 << 8);
    assert_eq!(
        f.system(KVM_X86_GET_MCE_CAP_SUPPORTED, NOWHERE),
        Err(Errno::EFAULT)
    );
    let attr = |group, attr| {
        f.user.at(&kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr: at,
        })
    };
    assert_eq!(f.system(KVM_HAS_DEVICE_ATTR, attr(0, 0)), Ok(0));
    assert_eq!(f.system(KVM_GET_DEVICE_ATTR, attr(0, 0)), Ok(0));
    assert_eq!(f.user.value::<u64>(at) & 3, 3);
    assert_eq!(f.system(KVM_HAS_DEVICE_ATTR, attr(0, 1)), Err(Errno::ENXIO));
    assert_eq!(f.system(KVM_GET_DEVICE_ATTR, attr(1, 0)), Err(Errno::ENXIO));
}

#[test]
pub fn max_vcpu_id_is_set_once_and_holds() {
    let f = Fixture::new();
    let cap = |n| kvm_enable_cap {
        cap: KVM_CAP_MAX_VCPU_ID,
        args: [n, 0, 0, 0],
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap(4097)), Err(Errno::EINVAL));
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap(2)), Ok(0));
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap(2)), Ok(0));
    assert_eq!(f.vm_with(KVM_ENABLE_CAP, &cap(3)), Err(Errno::EINVAL));
    assert_eq!(f.vcpu(2).unwrap_err(), Errno::EINVAL);
    f.vcpu(1).unwrap();
}

#[test]
pub fn boot_cpu_id_before_the_first_vcpu() {
    let f = Fixture::new();
    assert_eq!(f.vm(KVM_SET_BOOT_CPU_ID, 1), Ok(0));
    let _vcpu = f.vcpu(0).unwrap();
    assert_eq!(f.vm(KVM_SET_BOOT_CPU_ID, 0), Err(Errno::EBUSY));
}

#[test]
pub fn a_vcpu_keeps_its_vm_alive_and_nothing_else_does() {
    software_only!();
    let f = Fixture::new();
    let vcpu = f.vcpu(0).unwrap();
    let Handle::Object(Object::Vm(vm)) = &f.vm else {
        unreachable!()
    };
    let weak = Arc::downgrade(vm);
    drop(f);
    assert!(weak.upgrade().is_some());
    drop(vcpu);
    assert!(weak.upgrade().is_none());
}

#[test]
pub fn vms_with_everything_in_them_are_freed() {
    software_only!();
    for _ in 0..20 {
        let f = Fixture::with_irqchip();
        let _vcpu = f.vcpu(0).unwrap();
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let irqfd = anykvm_abi::kvm_irqfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&eventfd) as u32,
            gsi: 5,
            ..Default::default()
        };
        assert_eq!(f.vm_with(KVM_IRQFD, &irqfd), Ok(0));
        let Handle::Object(Object::Vm(vm)) = &f.vm else {
            unreachable!()
        };
        let (vm, chip) = (Arc::downgrade(vm), Arc::downgrade(vm.irqchip().unwrap()));
        drop(_vcpu);
        drop(f);
        assert!(vm.upgrade().is_none());
        assert!(
            chip.upgrade().is_none(),
            "the interrupt controllers outlive their VM"
        );
    }
}

#[test]
pub fn bad_pointers() {
    let f = Fixture::with_irqchip();
    assert_eq!(
        f.vm_with(KVM_CREATE_PIT2, &anykvm_abi::kvm_pit_config::default()),
        Ok(0)
    );
    f.all_fault(&[
        KVM_ENABLE_CAP,
        KVM_SET_USER_MEMORY_REGION,
        KVM_SET_USER_MEMORY_REGION2,
        KVM_SET_MEMORY_REGION,
        KVM_SET_MEMORY_ALIAS,
        KVM_GET_DIRTY_LOG,
        KVM_CLEAR_DIRTY_LOG,
        KVM_SET_IDENTITY_MAP_ADDR,
        KVM_REGISTER_COALESCED_MMIO,
        KVM_UNREGISTER_COALESCED_MMIO,
        KVM_IRQ_LINE,
        KVM_IRQ_LINE_STATUS,
        KVM_GET_IRQCHIP,
        KVM_SET_IRQCHIP,
        KVM_SET_GSI_ROUTING,
        KVM_SIGNAL_MSI,
        KVM_IRQFD,
        KVM_IOEVENTFD,
        KVM_CREATE_PIT2,
        KVM_GET_PIT,
        KVM_SET_PIT,
        KVM_GET_PIT2,
        KVM_SET_PIT2,
        KVM_REINJECT_CONTROL,
        KVM_GET_CLOCK,
        KVM_SET_CLOCK,
        KVM_X86_SET_MSR_FILTER,
        KVM_XEN_HVM_CONFIG,
        KVM_CREATE_DEVICE,
    ]);
}

#[test]
pub fn the_tracing_of_old_is_gone() {
    let f = Fixture::new();
    for request in [KVM_TRACE_ENABLE, KVM_TRACE_PAUSE, KVM_TRACE_DISABLE] {
        assert_eq!(f.system(request, 0), Err(Errno::EOPNOTSUPP));
    }
}

#[test]
pub fn emulated_cpuid_wants_clear_padding() {
    let f = Fixture::new();
    let mut entries = [[0u32; 10]; 8];
    let with = |entries: &[[u32; 10]; 8]| {
        let at = f.user.array(&[8u32, 0], entries);
        f.system(KVM_GET_EMULATED_CPUID, at)
    };
    assert_eq!(with(&entries), Ok(0));
    entries[7][9] = 1;
    assert_eq!(with(&entries), Err(Errno::EINVAL));
}
