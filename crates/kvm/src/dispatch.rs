//! The VM's ioctls by number: copies arguments in and results out; the work is done by the module
//! each belongs to.

use std::sync::Arc;

use anykvm_abi::ioctl;

use crate::error::{Errno, Result};
use crate::object::{Object, Reply};
use crate::user::UserMemory;
use crate::vm::Vm;

impl Vm {
    /// An ioctl on the VM.
    pub fn ioctl(
        self: &Arc<Self>,
        request: u32,
        arg: u64,
        _user: &dyn UserMemory,
    ) -> Result<Reply> {
        match request {
            ioctl::KVM_CREATE_VCPU => self
                .create_vcpu(arg)
                .map(|vcpu| Reply::Object(Object::Vcpu(vcpu))),
            _ => Err(Errno::ENOTTY),
        }
    }
}
