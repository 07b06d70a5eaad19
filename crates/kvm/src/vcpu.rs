//! A virtual processor: what KVM_CREATE_VCPU makes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Errno, Result};
use crate::kick::Kick;
use crate::object::{Reply, memfd};
use crate::system::VCPU_MMAP_SIZE;
use crate::user::UserMemory;
use crate::vm::Vm;

/// A virtual processor.
#[derive(Debug)]
pub struct Vcpu {
    vm: Arc<Vm>,
    id: u32,
    fd: OwnedFd,
    kick: Kick,
}

impl Vcpu {
    /// KVM_CREATE_VCPU, once the VM has found the id good. `boot`: the bootstrap processor.
    pub(crate) fn new(vm: Arc<Vm>, id: u32, _boot: bool) -> Result<Arc<Self>> {
        let fd = memfd(&format!("kvm-vcpu:{id}"), VCPU_MMAP_SIZE as u64)?;
        Ok(Arc::new(Self {
            vm,
            id,
            fd,
            kick: Kick::default(),
        }))
    }

    /// The VM it belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Its id, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Wakes and interrupts it.
    pub fn kick(&self) -> &Kick {
        &self.kick
    }

    /// An ioctl on the vCPU.
    pub fn ioctl(
        self: &Arc<Self>,
        _request: u32,
        _arg: u64,
        _user: &dyn UserMemory,
    ) -> Result<Reply> {
        Err(Errno::EINVAL)
    }
}
