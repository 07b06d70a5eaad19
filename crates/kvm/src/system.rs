//! `/dev/kvm` (KVM API, section 4, "system ioctls").

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anykvm_abi::{KVM_API_VERSION, ioctl};

use crate::error::{Errno, Result};
use crate::object::{Object, Reply, memfd};
use crate::user::UserMemory;
use crate::vm::Vm;

/// KVM_GET_VCPU_MMAP_SIZE: `kvm_run`, the page of port I/O data, the coalesced ring.
pub const VCPU_MMAP_SIZE: usize = 3 * 4096;

/// `/dev/kvm`.
#[derive(Debug)]
pub struct System {
    fd: OwnedFd,
}

impl System {
    /// Opens it.
    pub fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            fd: memfd("kvm", 0)?,
        }))
    }

    /// Its memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A system ioctl.
    pub fn ioctl(&self, request: u32, arg: u64, _user: &dyn UserMemory) -> Result<Reply> {
        match request {
            ioctl::KVM_GET_API_VERSION => {
                no_argument(arg).map(|()| (KVM_API_VERSION as i32).into())
            }
            ioctl::KVM_GET_VCPU_MMAP_SIZE => {
                no_argument(arg).map(|()| (VCPU_MMAP_SIZE as i32).into())
            }
            ioctl::KVM_CHECK_EXTENSION => Ok(crate::capability::check_extension(arg).into()),
            ioctl::KVM_CREATE_VM => self.create_vm(arg).map(|vm| Reply::Object(Object::Vm(vm))),
            _ => Err(Errno::EINVAL),
        }
    }

    /// KVM_CREATE_VM: type 0 is the only one.
    pub fn create_vm(&self, vm_type: u64) -> Result<Arc<Vm>> {
        no_argument(vm_type)?;
        Vm::new()
    }
}

fn no_argument(arg: u64) -> Result<()> {
    if arg == 0 { Ok(()) } else { Err(Errno::EINVAL) }
}
