//! What holds for every ioctl: refusals that stand in the table, and whose VM it is.

use anykvm::{Errno, IOCTLS, IoctlState, ObjectKind};
use anykvm_abi::ioctl::*;
use anykvm_abi::kvm_create_device;

use crate::support::*;

/// One handle of each kind.
struct Handles {
    f: Fixture,
    vcpu: Handle,
    device: Handle,
}

impl Handles {
    fn new() -> Self {
        let f = Fixture::with_irqchip();
        let vcpu = f.vcpu(0).unwrap();
        let vfio = f.user.at(&kvm_create_device {
            type_: 4,
            fd: 0,
            flags: 0,
        });
        let device = f.vm.make(KVM_CREATE_DEVICE, vfio, &f.user).unwrap();
        Self { f, vcpu, device }
    }
    fn of(&self, kind: ObjectKind) -> Option<&Handle> {
        match kind {
            ObjectKind::System => Some(&self.f.kvm),
            ObjectKind::Vm => Some(&self.f.vm),
            ObjectKind::Vcpu => Some(&self.vcpu),
            ObjectKind::Device => Some(&self.device),
            ObjectKind::Stats | ObjectKind::GuestMemfd => None,
        }
    }
}

#[test]
pub fn what_the_table_refuses_is_refused() {
    let h = Handles::new();
    let argument = h.f.user.at(&[0u64; 64]);
    for row in IOCTLS {
        let IoctlState::Refused(errno, _) = row.state else {
            continue;
        };
        let handle = h.of(row.on).unwrap();
        let result = handle.call(row.request, argument, &h.f.user);
        assert_eq!(result, Err(errno), "{} {}", row.on, row.name());
    }
}

/// A request that is another kind's is unknown here.
#[test]
pub fn what_is_in_no_row_is_unknown() {
    let h = Handles::new();
    let argument = h.f.user.at(&[0u64; 64]);
    for kind in [
        ObjectKind::System,
        ObjectKind::Vm,
        ObjectKind::Vcpu,
        ObjectKind::Device,
    ] {
        let handle = h.of(kind).unwrap();
        let known = |request| IOCTLS.iter().any(|r| r.on == kind && r.request == request);
        for (request, name) in TABLE.iter().filter(|(request, _)| !known(*request)) {
            let result = handle.call(*request, argument, &h.f.user);
            assert_eq!(result, Err(kind.unknown()), "{kind} {name}");
        }
    }
}

/// The object belongs to the process that made it. (This crate's objects do not know of processes; the shim
/// does.)
#[test]
#[allow(unsafe_code)]
pub fn another_process_gets_eio() {
    if !on_device() {
        return;
    }
    let h = Handles::new();
    let argument = h.f.user.at(&[0u64; 64]);
    // SAFETY: the child does nothing but system calls until it ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let wrong = IOCTLS.iter().position(|row| {
            let Some(handle) = h.of(row.on) else {
                return false;
            };
            let result = raw_ioctl(handle.fd(), row.request, argument);
            row.on != ObjectKind::System && result != Err(Errno::EIO)
        });
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(wrong.map_or(255, |row| row as i32)) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status), "{status:#x}");
    let row = libc::WEXITSTATUS(status) as usize;
    assert_eq!(row, 255, "not EIO: {}", IOCTLS[row].name());
}
