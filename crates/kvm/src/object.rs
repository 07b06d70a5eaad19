//! The objects behind KVM's file descriptors, and the way in for ioctls (KVM API, section 2).
//!
//! Every object owns a memfd, which is what its users hold duplicates of. Dropping the last
//! reference frees what the object owns.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use crate::device::Device;
use crate::error::Result;
use crate::guest_memfd::GuestMemfd;
use crate::ioctl_table::ObjectKind;
use crate::stats::StatsFile;
use crate::system::System;
use crate::trace;
use crate::user::UserMemory;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// What a file descriptor of the KVM API stands for.
#[derive(Clone, Debug)]
pub enum Object {
    /// `/dev/kvm`.
    System(Arc<System>),
    /// A virtual machine.
    Vm(Arc<Vm>),
    /// A virtual processor; keeps its VM alive.
    Vcpu(Arc<Vcpu>),
    /// A device made by KVM_CREATE_DEVICE; keeps its VM alive.
    Device(Arc<Device>),
    /// Statistics, from KVM_GET_STATS_FD.
    Stats(Arc<StatsFile>),
    /// Private memory, from KVM_CREATE_GUEST_MEMFD; keeps its VM alive.
    GuestMemfd(Arc<GuestMemfd>),
}

/// What a successful ioctl returns.
#[derive(Clone, Debug)]
pub enum Reply {
    /// This number.
    Value(i32),
    /// A new file descriptor for this object; for a device (KVM_CREATE_DEVICE) its number goes to
    /// `kvm_create_device.fd` and 0 is returned.
    Object(Object),
}

impl Object {
    /// Issues an ioctl with argument `arg`; pointers lead into `user`.
    pub fn ioctl(&self, request: u32, arg: u64, user: &dyn UserMemory) -> Result<Reply> {
        let result = self.dispatch(request, arg, user);
        if trace::enabled() {
            trace::finished(self, request, arg, &result);
        }
        result
    }

    fn dispatch(&self, request: u32, arg: u64, user: &dyn UserMemory) -> Result<Reply> {
        match self {
            Self::System(system) => system.ioctl(request, arg, user),
            Self::Vm(vm) => vm.ioctl(request, arg, user),
            Self::Vcpu(vcpu) => vcpu.ioctl(request, arg, user),
            Self::Device(device) => device.ioctl(request, arg, user).map(Reply::Value),
            Self::Stats(_) | Self::GuestMemfd(_) => Err(self.kind().unknown()),
        }
    }

    /// What the object is.
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::System(_) => ObjectKind::System,
            Self::Vm(_) => ObjectKind::Vm,
            Self::Vcpu(_) => ObjectKind::Vcpu,
            Self::Device(_) => ObjectKind::Device,
            Self::Stats(_) => ObjectKind::Stats,
            Self::GuestMemfd(_) => ObjectKind::GuestMemfd,
        }
    }

    /// The object's memfd. The VMM gets duplicates of it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::System(system) => system.fd(),
            Self::Vm(vm) => vm.fd(),
            Self::Vcpu(vcpu) => vcpu.fd(),
            Self::Device(device) => device.fd(),
            Self::Stats(stats) => stats.fd(),
            Self::GuestMemfd(file) => file.fd(),
        }
    }

    /// For a vCPU: the memfd whose first page is the VM's coalesced ring, which a mapping of the
    /// vCPU's fd shows as page `KVM_COALESCED_MMIO_PAGE_OFFSET` (2).
    pub fn coalesced_ring(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Vcpu(vcpu) => Some(vcpu.vm().coalesced_ring_fd()),
            _ => None,
        }
    }
}

impl From<i32> for Reply {
    fn from(value: i32) -> Self {
        Self::Value(value)
    }
}

/// A memfd of `len` bytes, close-on-exec.
pub(crate) fn memfd(name: &str, len: u64) -> Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(fd.as_fd(), len)?;
    Ok(fd)
}
