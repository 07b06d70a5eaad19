//! The errors of the KVM API: one enum, mapped to errno numbers in one place.

use thiserror::Error;

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident $text:literal;)*) => {
        /// Why a call was refused, named as `errno.h` names it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
        #[allow(clippy::upper_case_acronyms)]
        pub enum Errno {
            $($(#[$doc])* #[doc = $text] #[error($text)] $name,)*
            /// An error of the host that the KVM API does not name.
            #[error("errno {0}")]
            Other(i32),
        }

        impl Errno {
            /// The number, as in `errno`.
            pub fn errno(self) -> i32 {
                match self {
                    $(Self::$name => libc::$name,)*
                    Self::Other(n) => n,
                }
            }

            /// The error of that number.
            pub fn from_raw(errno: i32) -> Self {
                match errno {
                    $(libc::$name => Self::$name,)*
                    n => Self::Other(n),
                }
            }
        }
    };
}

errnos! {
    EPERM "operation not permitted";
    ENOENT "no such entry";
    EINTR "interrupted by a signal";
    EIO "issued by another process than the VM's creator";
    ENXIO "no such device";
    E2BIG "too many entries";
    EBADF "bad file descriptor";
    EAGAIN "try again";
    ENOMEM "out of memory";
    EACCES "permission denied";
    EFAULT "bad address";
    EBUSY "busy";
    EEXIST "exists already";
    ENODEV "no such device type";
    EINVAL "invalid argument";
    ENFILE "too many open files in the system";
    EMFILE "too many open files";
    ENOTTY "no such ioctl on this object";
    ENOSPC "no space";
    ENOSYS "not implemented";
    EOPNOTSUPP "not supported";
}

/// The error type of the public API, by the name kvm-ioctls has for it.
pub type Error = Errno;

/// Result of a call of the KVM API.
pub type Result<T> = std::result::Result<T, Errno>;

impl From<crate::user::Efault> for Errno {
    fn from(_: crate::user::Efault) -> Self {
        Self::EFAULT
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(e: rustix::io::Errno) -> Self {
        Self::from_raw(e.raw_os_error())
    }
}

impl From<std::io::Error> for Errno {
    fn from(e: std::io::Error) -> Self {
        e.raw_os_error().map_or(Self::ENOMEM, Self::from_raw)
    }
}

impl From<anykvm_irqchip::Error> for Errno {
    fn from(e: anykvm_irqchip::Error) -> Self {
        match e {
            anykvm_irqchip::Error::GeneralProtection | anykvm_irqchip::Error::Invalid => {
                Self::EINVAL
            }
            anykvm_irqchip::Error::NoDevice => Self::ENXIO,
            anykvm_irqchip::Error::Exists => Self::EEXIST,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_back() {
        assert_eq!(Errno::EINVAL.errno(), libc::EINVAL);
        assert_eq!(Errno::from_raw(libc::ENOTTY), Errno::ENOTTY);
        assert_eq!(Errno::from_raw(9999), Errno::Other(9999));
        assert_eq!(Errno::Other(9999).errno(), 9999);
    }
}
