//! KVM_CREATE_DEVICE, device attributes, KVM_GET_STATS_FD.

use std::os::fd::AsRawFd;

use anykvm::{Errno, ObjectKind};
use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_CREATE_DEVICE_TEST, Plain, kvm_create_device, kvm_device_attr, kvm_stats_header,
};

use crate::support::*;

const VFIO: u32 = 4;

fn request(type_: u32, flags: u32) -> kvm_create_device {
    kvm_create_device {
        type_,
        fd: 0,
        flags,
    }
}

#[test]
pub fn vfio_once() {
    let f = Fixture::new();
    assert_eq!(
        f.vm_with(KVM_CREATE_DEVICE, &request(1, 0)),
        Err(Errno::ENODEV)
    );
    assert_eq!(
        f.vm_with(KVM_CREATE_DEVICE, &request(99, KVM_CREATE_DEVICE_TEST)),
        Err(Errno::ENODEV)
    );
    assert_eq!(
        f.vm_with(KVM_CREATE_DEVICE, &request(VFIO, KVM_CREATE_DEVICE_TEST)),
        Ok(0)
    );
    let at = f.user.at(&request(VFIO, 0));
    let device = f.vm.make(KVM_CREATE_DEVICE, at, &f.user).unwrap();
    assert_eq!(device.kind(), ObjectKind::Device);
    assert_eq!(f.vm(KVM_CREATE_DEVICE, at), Err(Errno::EBUSY));
}

#[test]
pub fn vfio_takes_vfio_files_only() {
    let f = Fixture::new();
    let at = f.user.at(&request(VFIO, 0));
    let device = f.vm.make(KVM_CREATE_DEVICE, at, &f.user).unwrap();
    let call = |request, group, attr, addr| {
        let arg = f.user.at(&kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr,
        });
        device.call(request, arg, &f.user)
    };
    assert_eq!(call(KVM_HAS_DEVICE_ATTR, 1, 1, 0), Ok(0));
    assert_eq!(call(KVM_HAS_DEVICE_ATTR, 1, 2, 0), Ok(0));
    assert_eq!(call(KVM_HAS_DEVICE_ATTR, 1, 3, 0), Err(Errno::ENXIO));
    assert_eq!(call(KVM_HAS_DEVICE_ATTR, 0, 1, 0), Err(Errno::ENXIO));
    assert_eq!(call(KVM_SET_DEVICE_ATTR, 2, 1, 0), Err(Errno::ENXIO));
    assert_eq!(call(KVM_SET_DEVICE_ATTR, 1, 1, NOWHERE), Err(Errno::EFAULT));
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let fd = f.user.at(&file.as_raw_fd());
    assert_eq!(call(KVM_SET_DEVICE_ATTR, 1, 1, fd), Err(Errno::EINVAL));
    // Only one that was added can be removed.
    assert_eq!(call(KVM_SET_DEVICE_ATTR, 1, 2, fd), Err(Errno::ENOENT));
    let closed = f.user.at(&-1i32);
    assert_eq!(call(KVM_SET_DEVICE_ATTR, 1, 2, closed), Err(Errno::EBADF));
    assert_eq!(call(KVM_SET_DEVICE_ATTR, 1, 1, closed), Err(Errno::EBADF));
    assert_eq!(call(KVM_GET_DEVICE_ATTR, 1, 1, fd), Err(Errno::EPERM));
    assert_eq!(device.call(KVM_RUN, 0, &f.user), Err(Errno::ENOTTY));
}

#[test]
pub fn stats_are_live() {
    let f = Fixture::new();
    let stats = f.vm.make(KVM_GET_STATS_FD, 0, &f.user).unwrap();
    let read = |len: usize, at: u32| {
        let mut bytes = vec![0; len];
        assert_eq!(
            rustix::io::pread(stats.fd(), &mut bytes, at.into()),
            Ok(len)
        );
        bytes
    };
    let header = kvm_stats_header::from_bytes(&read(24, 0)).unwrap();
    assert_eq!(header.name_size, 48);
    let id = read(48, header.id_offset);
    assert!(id.starts_with(format!("kvm-{}\0", std::process::id()).as_bytes()));
    let find = |name: &str| {
        (0..header.num_desc)
            .map(|i| read(64, header.desc_offset + i * 64))
            .find(|d| d[16..].starts_with(name.as_bytes()) && d[16 + name.len()] == 0)
            .map(|d| u32::from_bytes(&d[8..12]).unwrap())
            .unwrap()
    };
    let changes = header.data_offset + find("memslot_changes");
    assert_eq!(u64::from_bytes(&read(8, changes)), Some(0));
    let region = anykvm_abi::kvm_memory_region {
        memory_size: 0x1000,
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_SET_MEMORY_REGION, &region), Ok(0));
    assert_eq!(u64::from_bytes(&read(8, changes)), Some(1));
    assert_eq!(stats.call(KVM_GET_STATS_FD, 0, &f.user), Err(Errno::ENOTTY));
}
