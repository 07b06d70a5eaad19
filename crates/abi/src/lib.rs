//! KVM's binary interface (`include/uapi/linux/kvm.h`): ioctl numbers, structures and capability
//! numbers. Re-exports [`kvm_bindings`] and adds what that crate lacks. No logic.

mod unions;

pub use kvm_bindings::*;
pub use unions::*;
