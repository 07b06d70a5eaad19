//! Devices made by KVM_CREATE_DEVICE (KVM API, section 4.79, and `Documentation/virt/kvm/devices`).
//! On x86 there is one kind, VFIO: it is told which VFIO files a VM uses and holds them. What KVM does
//! with them (cache coherency of DMA) needs nothing here.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use anykvm_abi::{
    KVM_CREATE_DEVICE_TEST, KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, ioctl,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};

use crate::error::{Errno, Result};
use crate::eventfd::duplicate;
use crate::ioctl_table::{ObjectKind, refusal};
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
            _ => Err(refusal(ObjectKind::Device, request)),
        }
        .map(|()| 0)
    }

    fn set_attr(&self, attr: &kvm_device_attr, user: &dyn UserMemory) -> Result<()> {
        has_attr(attr)?;
        let fd = user.get(attr.addr)?;
        if attr.attr == u64::from(KVM_DEV_VFIO_FILE_ADD) {
            self.add_file(fd)
        } else {
            self.remove_file(fd)
        }
    }

    /// KVM_DEV_VFIO_FILE_ADD.
    pub(crate) fn add_file(&self, fd: i32) -> Result<()> {
        let fd = vfio_file(fd)?;
        let id = identity(&fd)?;
        let mut files = self.lock_files();
        if files.iter().any(|f| identity(f) == Ok(id)) {
            return Err(Errno::EEXIST);
        }
        files.push(fd);
        Ok(())
    }

    /// KVM_DEV_VFIO_FILE_DEL.
    pub(crate) fn remove_file(&self, fd: i32) -> Result<()> {
        let id = identity(&vfio_file(fd)?)?;
        let mut files = self.lock_files();
        let at = files.iter().position(|f| identity(f) == Ok(id));
        files.remove(at.ok_or(Errno::ENOENT)?);
        Ok(())
    }

    fn lock_files(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.files.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A duplicate of a VFIO group or device file; EINVAL if it is another file.
fn vfio_file(fd: i32) -> Result<OwnedFd> {
    let fd = duplicate(fd)?;
    let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if !target.starts_with("/dev/vfio") && target.as_os_str() != "anon_inode:[vfio-device]" {
        return Err(Errno::EINVAL);
    }
    Ok(fd)
}

/// Which file it is, whatever its descriptor.
fn identity(fd: &OwnedFd) -> Result<(u64, u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino, stat.st_rdev))
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
