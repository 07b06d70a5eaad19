//! The ioctl trace: `ANYKVM_TRACE_IOCTLS=1` writes a line to standard error for each ioctl on an
//! object of this crate: the object, the call, its argument, the result, and for KVM_RUN the exit.

use std::sync::OnceLock;

use anykvm_abi::ioctl;

use crate::error::Result;
use crate::object::{Object, Reply};

/// Whether the trace is on; asked once.
pub(crate) fn enabled() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("ANYKVM_TRACE_IOCTLS").is_some_and(|v| v != "0"))
}

/// Writes the line of a finished ioctl.
pub(crate) fn finished(object: &Object, request: u32, arg: u64, result: &Result<Reply>) {
    let of = match object {
        Object::Vcpu(vcpu) => format!("vcpu {}", vcpu.id()),
        other => other.kind().to_string(),
    };
    let name = ioctl::name(request).map_or_else(|| format!("{request:#x}"), str::to_owned);
    let exit = match object {
        Object::Vcpu(vcpu) if request == ioctl::KVM_RUN && result.is_ok() => {
            format!(" exit {}", vcpu.machine().run().exit_reason())
        }
        _ => String::new(),
    };
    let result = match result {
        Ok(Reply::Value(v)) => v.to_string(),
        Ok(Reply::Object(_)) => "a new fd".to_owned(),
        Err(e) => format!("{e}"),
    };
    eprintln!("anykvm: {of}: {name}({arg:#x}) = {result}{exit}");
}
