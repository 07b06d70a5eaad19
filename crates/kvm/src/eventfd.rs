//! Descriptors handed in by number: KVM_IRQFD, KVM_IOEVENTFD, the VFIO device.
//!
//! The kernel keeps a reference to the file; here a duplicate of the descriptor does that, because
//! callers close theirs right after the ioctl.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

use crate::error::{Errno, Result};

/// Duplicates a descriptor of this process.
#[allow(unsafe_code)]
pub(crate) fn duplicate(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: the number is used for this one call, which does nothing to the descriptor and fails
    // with EBADF if there is none.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // Above the numbers that programs expect for their own next descriptor.
    Ok(rustix::io::fcntl_dupfd_cloexec(borrowed, 3)?)
}

/// An eventfd of the VMM, by a duplicate.
#[derive(Debug)]
pub(crate) struct EventFd {
    fd: OwnedFd,
    id: Identity,
    nonblocking: bool,
}

/// Which eventfd it is, whatever its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    /// The kernel's number of it.
    Kernel(u64),
    /// Where the kernel does not tell: the descriptor it was given as.
    Descriptor(i32),
}

impl EventFd {
    /// Takes a duplicate. EBADF if it is no descriptor, EINVAL if it is no eventfd.
    pub fn new(fd: i32) -> Result<Self> {
        let own = duplicate(fd)?;
        let id = match std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) {
            Ok(info) => {
                if !info.lines().any(|l| l.starts_with("eventfd-count:")) {
                    return Err(Errno::EINVAL);
                }
                info.lines()
                    .find_map(|l| l.strip_prefix("eventfd-id:")?.trim().parse().ok())
                    .map_or(Identity::Descriptor(fd), Identity::Kernel)
            }
            Err(_) => Identity::Descriptor(fd),
        };
        let nonblocking = rustix::fs::fcntl_getfl(&own)?.contains(OFlags::NONBLOCK);
        Ok(Self {
            fd: own,
            id,
            nonblocking,
        })
    }

    /// Whether both are the same eventfd.
    pub fn same(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// The duplicate.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Adds 1.
    pub fn signal(&self) {
        // EAGAIN: the counter is full; whoever reads it will be told all the same.
        let _ = rustix::io::write(self.fd.as_fd(), &1u64.to_ne_bytes());
    }

    /// Takes the counter, without waiting; 0 if somebody else was faster.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        let read = if self.nonblocking {
            rustix::io::read(self.fd.as_fd(), &mut count)
        } else {
            let mut buffer = [std::io::IoSliceMut::new(&mut count)];
            // Offset -1: as read, but RWF_NOWAIT holds for this one call.
            rustix::io::preadv2(
                self.fd.as_fd(),
                &mut buffer,
                u64::MAX,
                ReadWriteFlags::NOWAIT,
            )
        };
        match read {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsRawFd;

    #[test]
    fn taken_once_blocking_or_not() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let fd = eventfd(0, flags).unwrap();
            let own = EventFd::new(fd.as_raw_fd()).unwrap();
            assert_eq!(own.take(), 0);
            own.signal();
            own.signal();
            assert_eq!(own.take(), 2);
            assert_eq!(own.take(), 0);
        }
    }

    #[test]
    fn identity_is_the_eventfds() {
        let (a, b) = (
            eventfd(0, EventfdFlags::empty()).unwrap(),
            eventfd(0, EventfdFlags::empty()).unwrap(),
        );
        let again = a.try_clone().unwrap();
        let [a, b, again] = [a, b, again].map(|fd| EventFd::new(fd.as_raw_fd()).unwrap());
        assert!(a.same(&again));
        assert!(!a.same(&b));
    }

    #[test]
    fn other_descriptors_are_refused() {
        assert_eq!(EventFd::new(-1).unwrap_err(), Errno::EBADF);
        assert_eq!(EventFd::new(1 << 20).unwrap_err(), Errno::EBADF);
        let file = crate::object::memfd("x", 0).unwrap();
        assert_eq!(EventFd::new(file.as_raw_fd()).unwrap_err(), Errno::EINVAL);
    }
}
