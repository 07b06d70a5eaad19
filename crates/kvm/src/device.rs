//! Devices made by KVM_CREATE_DEVICE (KVM API, section 4.79 and "Devices"). On x86 there is one
//! kind, VFIO: it holds the VFIO files a VM uses, whose IOMMU work needs nothing of KVM here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Errno, Result};
use crate::user::UserMemory;
use crate::vm::Vm;

/// A device of a VM.
#[derive(Debug)]
pub struct Device {
    vm: Arc<Vm>,
    fd: OwnedFd,
}

impl Device {
    /// The VM it belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Its memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// An ioctl on the device.
    pub fn ioctl(&self, _request: u32, _arg: u64, _user: &dyn UserMemory) -> Result<i32> {
        Err(Errno::ENOTTY)
    }
}
