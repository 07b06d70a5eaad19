//! Devices made by KVM_CREATE_DEVICE (KVM API, section 4.79, and `Documentation/virt/kvm/devices`).
//! On x86 there is one kind, VFIO: it is told which VFIO files a VM uses and holds them. What KVM does
//! with them (cache coherency of DMA) needs nothing here.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use anykvm_abi::{
    KVM_CREATE_DEVICE_TEST, KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, ioctl,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};

use crate::error::{Errno, Result};
use crate::eventfd::duplicate;
use crate::object::memfd;
use crate::user::UserMemory;
use crate::vm::Vm;

/// A device of a VM.
pub struct Device {
    vm: Arc<Vm>,
    fd: OwnedFd,
    /// The VFIO files, by duplicates.
    files: Mutex<Vec<OwnedFd>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("fd", &self.fd)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// KVM_CREATE_DEVICE; `None` if it only asks whether that would be possible.
    pub(crate) fn create_device(
        self: &Arc<Self>,
        request: &kvm_create_device,
    ) -> Result<Option<Arc<Device>>> {
        if request.type_ != kvm_device_type_KVM_DEV_TYPE_VFIO {
            return Err(Errno::ENODEV);
        }
        if request.flags & KVM_CREATE_DEVICE_TEST != 0 {
            return Ok(None);
        }
        // One VFIO device a VM, for good.
        let mut exists = self.vfio_device.lock().unwrap_or_else(|e| e.into_inner());
        if *exists {
            return Err(Errno::EBUSY);
        }
        let fd = memfd("kvm-vfio", 0)?;
        *exists = true;
        Ok(Some(Arc::new(Device {
            vm: self.clone(),
            fd,
            files: Mutex::default(),
        })))
    }
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
    pub fn ioctl(&self, request: u32, arg: u64, user: &dyn UserMemory) -> Result<i32> {
        match request {
            ioctl::KVM_SET_DEVICE_ATTR => self.set_attr(&user.get(arg)?, user),
            ioctl::KVM_HAS_DEVICE_ATTR => has_attr(&user.get(arg)?),
            // The VFIO device has nothing to get.
            ioctl::KVM_GET_DEVICE_ATTR => Err(Errno::EPERM),
            _ => return Err(Errno::ENOTTY),
        }
        .map(|()| 0)
    }

    pub(crate) fn set_attr(&self, attr: &kvm_device_attr, user: &dyn UserMemory) -> Result<()> {
        has_attr(attr)?;
        let fd = duplicate(user.get(attr.addr)?)?;
        let target = std::fs::read_link(format!(
            "/proc/self/fd/{}",
            rustix::fd::AsRawFd::as_raw_fd(&fd)
        ));
        if !target.is_ok_and(|path| {
            path.starts_with("/dev/vfio") || path.starts_with("anon_inode:[vfio-device]")
        }) {
            return Err(Errno::EINVAL);
        }
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino, s.st_rdev));
        let id = inode(&fd)?;
        let mut files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        let at = files.iter().position(|f| inode(f) == Ok(id));
        match (attr.attr as u32, at) {
            (KVM_DEV_VFIO_FILE_ADD, Some(_)) => Err(Errno::EEXIST),
            (KVM_DEV_VFIO_FILE_ADD, None) => {
                files.push(fd);
                Ok(())
            }
            (_, Some(at)) => {
                files.remove(at);
                Ok(())
            }
            (_, None) => Err(Errno::ENOENT),
        }
    }
}

/// KVM_HAS_DEVICE_ATTR.
pub(crate) fn has_attr(attr: &kvm_device_attr) -> Result<()> {
    let known = [KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL].map(u64::from);
    if attr.group == KVM_DEV_VFIO_FILE && known.contains(&attr.attr) {
        Ok(())
    } else {
        Err(Errno::ENXIO)
    }
}
