//! The public handle of a device, with the methods of the kvm-ioctls crate's `DeviceFd`. Section
//! numbers are the KVM API document's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anykvm_abi::kvm_device_attr;

use crate::device::{Device, has_attr};
use crate::error::Result;
use crate::object::Object;

/// A device of a VM.
#[derive(Debug)]
pub struct DeviceFd {
    device: Arc<Device>,
}

impl From<Arc<Device>> for DeviceFd {
    fn from(device: Arc<Device>) -> Self {
        Self { device }
    }
}

impl AsFd for DeviceFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.fd()
    }
}

impl AsRawFd for DeviceFd {
    fn as_raw_fd(&self) -> RawFd {
        self.device.fd().as_raw_fd()
    }
}

impl DeviceFd {
    /// The object behind the handle, for ioctls by number.
    pub fn object(&self) -> Object {
        Object::Device(self.device.clone())
    }

    /// Whether the device has an attribute: ENXIO if not (section 4.81, KVM_HAS_DEVICE_ATTR).
    pub fn has_device_attr(&self, device_attr: &kvm_device_attr) -> Result<()> {
        has_attr(device_attr)
    }

    /// Hands the device a VFIO file (section 4.80, KVM_SET_DEVICE_ATTR with
    /// `KVM_DEV_VFIO_FILE_ADD`).
    pub fn add_vfio_file(&self, file: &impl AsRawFd) -> Result<()> {
        self.device.add_file(file.as_raw_fd())
    }

    /// Takes a VFIO file back (`KVM_DEV_VFIO_FILE_DEL`).
    pub fn remove_vfio_file(&self, file: &impl AsRawFd) -> Result<()> {
        self.device.remove_file(file.as_raw_fd())
    }
}
