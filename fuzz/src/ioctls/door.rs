//! The way in: this project's objects, or descriptors of `/dev/kvm`.

use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anykvm::bindings::ioctl::*;
use anykvm::bindings::{KVM_CREATE_DEVICE_TEST, Plain, kvm_create_device, kvm_run};
use anykvm::{Errno, Object, ObjectKind, Reply, System, UserMemory};
use anykvm_cpu::memory::mapping::Mapping;

use super::Tape;
use super::memory::Arena;

pub enum Door {
    Object(Object),
    Device(OwnedFd, ObjectKind),
}

/// A descriptor, and a vCPU's shared pages.
pub struct Handle {
    door: Door,
    page: Option<Mapping>,
}

impl Door {
    /// `/dev/kvm`.
    pub fn open() -> Handle {
        if std::env::var_os("ANYKVM_TEST_HOST_KVM").is_none_or(|v| v != "1") {
            return Handle::new(Self::Object(Object::System(
                System::new().expect("a system"),
            )));
        }
        let mut how = std::fs::OpenOptions::new();
        let file = how.read(true).write(true).open("/dev/kvm");
        let fd = file.expect("/dev/kvm").into();
        Handle::new(Self::Device(fd, ObjectKind::System))
    }
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Object(object) => object.fd(),
            Self::Device(fd, _) => fd.as_fd(),
        }
    }
}

impl Handle {
    fn new(door: Door) -> Self {
        let mut handle = Self { door, page: None };
        if handle.kind() == ObjectKind::Vcpu {
            handle.page = Mapping::new(handle.door.fd(), 0, 8192).ok();
        }
        handle
    }
    pub fn kind(&self) -> ObjectKind {
        match &self.door {
            Door::Object(object) => object.kind(),
            Door::Device(_, kind) => *kind,
        }
    }
    /// The VM behind it, where that can be looked at.
    pub fn vm(&self) -> Option<&anykvm::Vm> {
        match &self.door {
            Door::Object(Object::Vm(vm)) => Some(vm),
            _ => None,
        }
    }
    /// An ioctl, and what it made.
    pub fn issue(&self, request: u32, argument: u64, arena: &Arena) -> Result<Option<Self>, Errno> {
        self.perform(request, argument, arena).map(|(_, made)| made)
    }
    /// One that must make something.
    pub fn made(&self, request: u32, argument: u64, arena: &Arena) -> Result<Self, Errno> {
        let made = self.issue(request, argument, arena)?;
        Ok(made.expect("a descriptor"))
    }
    /// One that returns a number.
    pub fn number(&self, request: u32, argument: u64, arena: &Arena) -> Result<i32, Errno> {
        self.perform(request, argument, arena).map(|(n, _)| n)
    }

    fn perform(
        &self,
        request: u32,
        argument: u64,
        arena: &Arena,
    ) -> Result<(i32, Option<Self>), Errno> {
        match &self.door {
            Door::Object(object) => Ok(match object.ioctl(request, argument, arena)? {
                Reply::Value(n) => (n, None),
                Reply::Object(object) => (0, Some(Self::new(Door::Object(object)))),
            }),
            Door::Device(fd, kind) => {
                let n = raw_ioctl(fd.as_fd(), request, argument)?;
                let made = match (request, kind) {
                    (KVM_CREATE_VM, ObjectKind::System) => Some((n, ObjectKind::Vm)),
                    (KVM_CREATE_VCPU, ObjectKind::Vm) => Some((n, ObjectKind::Vcpu)),
                    (KVM_GET_STATS_FD, _) => Some((n, ObjectKind::Stats)),
                    (KVM_CREATE_GUEST_MEMFD, ObjectKind::Vm) => Some((n, ObjectKind::GuestMemfd)),
                    (KVM_CREATE_DEVICE, _) => device(argument, arena),
                    _ => None,
                };
                let made = made.map(|(fd, kind)| Self::new(Door::Device(owned(fd), kind)));
                Ok((n, made))
            }
        }
    }

    /// Bytes of kvm_run before a KVM_RUN. It does not enter the guest; this crate's objects sometimes do, for a
    /// moment.
    pub fn prepare_run(&self, tape: &mut Tape) {
        let Some(page) = &self.page else {
            return;
        };
        for _ in 0..tape.byte() & 3 {
            page.write(tape.below(4096 / 8) * 8, tape.number());
        }
        let enter = tape.byte() & 7 == 0;
        page.write(offset_of!(kvm_run, immediate_exit), 1u8);
        if let Door::Object(Object::Vcpu(vcpu)) = &self.door
            && enter
        {
            page.write(offset_of!(kvm_run, immediate_exit), 0u8);
            let kick = vcpu.kick_handle();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(300));
                kick.kick();
            });
        }
    }
}

/// What KVM_CREATE_DEVICE made.
fn device(argument: u64, arena: &Arena) -> Option<(i32, ObjectKind)> {
    let mut device = kvm_create_device::zeroed();
    arena.read(argument, device.as_bytes_mut()).ok()?;
    let only_asked = device.flags & KVM_CREATE_DEVICE_TEST != 0;
    (!only_asked).then_some((device.fd as i32, ObjectKind::Device))
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the descriptor was just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn raw_ioctl(fd: BorrowedFd<'_>, request: u32, argument: u64) -> Result<i32, Errno> {
    // SAFETY: a number, or a pointer into the arena's pages or to where there is nothing.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), argument) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        n => Ok(n),
    }
}
