//! KVM's binary interface (`include/uapi/linux/kvm.h`): ioctl numbers, structures and capability
//! numbers. Re-exports [`kvm_bindings`] and adds what that crate lacks. No logic.

#![warn(missing_docs)]

pub mod ioctl;
mod para;
mod plain;
mod structs;
mod unions;

pub use kvm_bindings::*;
pub use para::*;
pub use plain::Plain;
pub use structs::*;
pub use unions::*;
