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
    files: Mutex<Files>,
}

/// The VFIO files of a VM, by duplicates.
#[derive(Debug, Default)]
struct Files(Vec<OwnedFd>);

impl Files {
    fn add(&mut self, fd: OwnedFd) -> Result<()> {
        if self.position(&fd)?.is_some() {
            return Err(Errno::EEXIST);
        }
        self.0.push(fd);
        Ok(())
    }

    fn remove(&mut self, fd: &OwnedFd) -> Result<()> {
        let at = self.position(fd)?.ok_or(Errno::ENOENT)?;
        self.0.remove(at);
        Ok(())
    }

    fn position(&self, fd: &OwnedFd) -> Result<Option<usize>> {
        let id = identity(fd)?;
        Ok(self.0.iter().position(|own| identity(own) == Ok(id)))
    }
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
        let fd = duplicate(fd)?;
        if !is_vfio(&fd)? {
            return Err(Errno::EINVAL);
        }
        self.lock_files().add(fd)
    }

    /// KVM_DEV_VFIO_FILE_DEL.
    pub(crate) fn remove_file(&self, fd: i32) -> Result<()> {
        self.lock_files().remove(&duplicate(fd)?)
    }

    fn lock_files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Whether it is a VFIO group or a VFIO device, by itself or of a group. The container is neither.
fn is_vfio(fd: &OwnedFd) -> Result<bool> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let device = rustix::fs::fstat(fd)?.st_mode & libc::S_IFMT == libc::S_IFCHR;
    let of_vfio = target.starts_with("/dev/vfio") && !target.ends_with("vfio/vfio");
    Ok(device && of_vfio || target.as_os_str() == "anon_inode:[vfio-device]")
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What there is to test without a device that is given to a guest.
    #[test]
    fn files_are_held_once_until_removed() {
        let [a, b] = ["a", "b"].map(|name| memfd(name, 0).unwrap());
        let mut files = Files::default();
        assert_eq!(files.add(a.try_clone().unwrap()), Ok(()));
        assert_eq!(files.add(a.try_clone().unwrap()), Err(Errno::EEXIST));
        assert_eq!(files.remove(&b), Err(Errno::ENOENT));
        assert_eq!(files.add(b.try_clone().unwrap()), Ok(()));
        // By another descriptor.
        assert_eq!(files.remove(&a.try_clone().unwrap()), Ok(()));
        assert_eq!(files.remove(&a), Err(Errno::ENOENT));
        assert_eq!(files.0.len(), 1);
        assert_eq!(is_vfio(&a), Ok(false));
    }
}
