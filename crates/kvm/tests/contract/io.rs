//! ioeventfds and coalesced zones: registration. (What a guest's write does is tested with vCPUs.)

use std::os::fd::{AsRawFd, OwnedFd};

use anykvm::Errno;
use anykvm_abi::ioctl::*;
use anykvm_abi::{kvm_coalesced_mmio_zone, kvm_ioeventfd};
use rustix::event::{EventfdFlags, eventfd};

use crate::support::*;

const DATAMATCH: u32 = 1;
const PIO: u32 = 2;
const DEASSIGN: u32 = 4;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

impl Fixture {
    fn ioeventfd(
        &self,
        fd: &OwnedFd,
        addr: u64,
        len: u32,
        flags: u32,
        datamatch: u64,
    ) -> Result<i32, Errno> {
        let args = kvm_ioeventfd {
            datamatch,
            addr,
            len,
            fd: fd.as_raw_fd(),
            flags,
            ..Default::default()
        };
        self.vm_with(KVM_IOEVENTFD, &args)
    }
}

#[test]
pub fn assign_and_deassign() {
    let f = Fixture::new();
    let fd = event();
    for len in [0, 1, 2, 4, 8] {
        assert_eq!(f.ioeventfd(&fd, 0x1000 + u64::from(len), len, 0, 0), Ok(0));
        assert_eq!(
            f.ioeventfd(&fd, 0x1000 + u64::from(len), len, PIO, 0),
            Ok(0)
        );
    }
    // Exactly what was assigned.
    assert_eq!(f.ioeventfd(&fd, 0x1004, 2, DEASSIGN, 0), Err(Errno::ENOENT));
    assert_eq!(
        f.ioeventfd(&fd, 0x1004, 4, DEASSIGN | DATAMATCH, 0),
        Err(Errno::ENOENT)
    );
    assert_eq!(
        f.ioeventfd(&event(), 0x1004, 4, DEASSIGN, 0),
        Err(Errno::ENOENT)
    );
    assert_eq!(f.ioeventfd(&fd, 0x1004, 4, DEASSIGN, 0), Ok(0));
    assert_eq!(f.ioeventfd(&fd, 0x1004, 4, DEASSIGN, 0), Err(Errno::ENOENT));
    assert_eq!(f.ioeventfd(&fd, 0x1004, 4, DEASSIGN | PIO, 0), Ok(0));
}

#[test]
pub fn collisions() {
    let f = Fixture::new();
    let fd = event();
    assert_eq!(f.ioeventfd(&fd, 0x10, 2, DATAMATCH, 1), Ok(0));
    assert_eq!(f.ioeventfd(&fd, 0x10, 2, DATAMATCH, 1), Err(Errno::EEXIST));
    assert_eq!(f.ioeventfd(&fd, 0x10, 2, DATAMATCH, 2), Ok(0));
    assert_eq!(f.ioeventfd(&fd, 0x10, 2, 0, 0), Err(Errno::EEXIST));
    assert_eq!(f.ioeventfd(&fd, 0x10, 4, 0, 0), Ok(0));
    assert_eq!(f.ioeventfd(&fd, 0x10, 0, 0, 0), Err(Errno::EEXIST));
    // Ports and memory are different buses.
    assert_eq!(f.ioeventfd(&fd, 0x10, 0, PIO, 0), Ok(0));
    assert_eq!(f.ioeventfd(&fd, 0x10, 1, PIO, 0), Err(Errno::EEXIST));
}

#[test]
pub fn refused() {
    let f = Fixture::new();
    let fd = event();
    for len in [3, 5, 6, 7, 9, 16] {
        assert_eq!(f.ioeventfd(&fd, 0, len, 0, 0), Err(Errno::EINVAL));
    }
    assert_eq!(f.ioeventfd(&fd, 0, 0, DATAMATCH, 0), Err(Errno::EINVAL));
    assert_eq!(f.ioeventfd(&fd, u64::MAX, 2, 0, 0), Err(Errno::EINVAL));
    assert_eq!(f.ioeventfd(&fd, 0, 4, 1 << 5, 0), Err(Errno::EINVAL));
    let args = kvm_ioeventfd {
        fd: -1,
        len: 4,
        ..Default::default()
    };
    assert_eq!(f.vm_with(KVM_IOEVENTFD, &args), Err(Errno::EBADF));
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    assert_eq!(f.ioeventfd(&file, 0, 4, 0, 0), Err(Errno::EINVAL));
}

#[test]
pub fn coalesced_zones() {
    let f = Fixture::new();
    let zone = |addr, size, pio| {
        let mut zone = kvm_coalesced_mmio_zone {
            addr,
            size,
            ..Default::default()
        };
        zone.__bindgen_anon_1.pio = pio;
        zone
    };
    for pio in [0, 1] {
        assert_eq!(
            f.vm_with(KVM_REGISTER_COALESCED_MMIO, &zone(0xa0000, 0x20000, pio)),
            Ok(0)
        );
        assert_eq!(
            f.vm_with(KVM_UNREGISTER_COALESCED_MMIO, &zone(0xa0000, 0x20000, pio)),
            Ok(0)
        );
        assert_eq!(
            f.vm_with(KVM_UNREGISTER_COALESCED_MMIO, &zone(0xa0000, 0x20000, pio)),
            Ok(0)
        );
    }
    assert_eq!(
        f.vm_with(KVM_REGISTER_COALESCED_MMIO, &zone(0, 8, 2)),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        f.vm_with(KVM_UNREGISTER_COALESCED_MMIO, &zone(0, 8, 2)),
        Err(Errno::EINVAL)
    );
}
