//! ioctls on KVM's descriptors, and mmap of a vCPU.

use std::ffi::{c_int, c_ulong};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use anykvm::{Object, Reply, UserMemory};
use anykvm_abi::ioctl::{KVM_GET_STATS_FD, KVM_RUN, KVMIO};
use anykvm_abi::{KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_create_device};

use crate::files::{self, FileRef};
use crate::user_memory::ThisProcess;
use crate::{device, signals, sys};

const PAGE: usize = 4096;
/// Whether the type byte of an ioctl number is KVM's.
pub const fn is_kvm(request: c_ulong) -> bool {
    (request >> 8) & 0xff == KVMIO as c_ulong
}

/// An ioctl whose number is KVM's. None: the descriptor is not ours.
pub fn kvm_ioctl(fd: c_int, request: u32, argument: u64) -> Option<Result<c_int, c_int>> {
    // Nothing is held when `defer` returns: the program's signal handler may not come back.
    let result = signals::defer(|| {
        let file = match files::find(fd) {
            Some(file) => Ok(file),
            None => device::inherited(fd)?,
        };
        Some(file.and_then(|file| dispatch(&file, request, argument)))
    });
    signals::deliver();
    result
}

fn dispatch(file: &FileRef, request: u32, argument: u64) -> Result<c_int, c_int> {
    let object = file.object();
    if !matches!(object, Object::System(_)) && !file.is_ours() {
        return Err(libc::EIO);
    }
    let call = || object.ioctl(request, argument, &ThisProcess);
    let guarded = || catch_unwind(AssertUnwindSafe(call));
    let result = match object {
        Object::Vcpu(vcpu) if request == KVM_RUN => {
            signals::run_loop(vcpu.kick().requests(), vcpu.signal_mask(), guarded)
        }
        _ => guarded(),
    };
    match result {
        Ok(Ok(Reply::Value(value))) => Ok(value),
        Ok(Ok(Reply::Object(object))) => give(object, request, argument),
        Ok(Err(e)) => Err(e.errno()),
        Err(_) => {
            static SAID: Once = Once::new();
            SAID.call_once(|| eprintln!("anykvm: ioctl {request:#x} failed: an error in anykvm"));
            Err(libc::EIO)
        }
    }
}

/// Gives a new object to the program. KVM_CREATE_DEVICE returns the descriptor in its argument.
fn give(object: Object, request: u32, argument: u64) -> Result<c_int, c_int> {
    let is_device = matches!(object, Object::Device(_));
    let fd = device::open_object(object, request != KVM_GET_STATS_FD)?;
    if !is_device {
        return Ok(fd);
    }
    let field = std::mem::offset_of!(kvm_create_device, fd) as u64;
    if ThisProcess
        .write(argument.wrapping_add(field), &fd.to_ne_bytes())
        .is_err()
    {
        drop(files::remove(fd));
        sys::close(fd);
        return Err(libc::EFAULT);
    }
    Ok(0)
}

/// The errno with which KVM would refuse this mapping of a descriptor of its own: of a vCPU's pages, or of private
/// memory.
pub fn refuses_mapping(
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> Option<c_int> {
    let file = files::find(fd)?;
    let vcpu = match file.object() {
        Object::Vcpu(vcpu) => vcpu,
        Object::GuestMemfd(_) => return Some(libc::ENODEV),
        _ => return None,
    };
    // MAP_SHARED_VALIDATE has MAP_SHARED's bit.
    let shared = flags & libc::MAP_SHARED != 0;
    let exec = protection & libc::PROT_EXEC != 0;
    let checked = vcpu.check_mapping(offset as u64, len as u64, shared, exec);
    checked.err().map(|e| e.errno())
}

/// Completes a new mapping of a vCPU. Page 2 is the VM's coalesced-MMIO ring (KVM API, 4.116), which is one a VM;
/// the rest is the vCPU's own. Between it and the dirty ring (8.29) there is nothing: an access is SIGBUS.
///
/// # Safety
/// `address..address + len` must be a mapping, just made for the program, of `fd` from `offset`.
pub unsafe fn complete_mapping(
    address: usize,
    len: usize,
    protection: c_int,
    fd: c_int,
    offset: i64,
) {
    /// Behind the end of any vCPU's file.
    const NOTHING: u64 = 1 << 40;
    const COALESCED: usize = KVM_COALESCED_MMIO_PAGE_OFFSET as usize;
    const DIRTY_LOG: usize = KVM_DIRTY_LOG_PAGE_OFFSET as usize;
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    // Where these pages of the file are in the mapping.
    let part = |first: usize, end: usize| {
        let start = (first * PAGE).saturating_sub(offset).min(len);
        start..(end * PAGE).saturating_sub(offset).min(len)
    };
    let lay_over = |part: Range<usize>, fd: c_int, from: u64| {
        if !part.is_empty() {
            // A failure leaves the memfd's own pages there: zeroes, an empty ring.
            // SAFETY: pages of the mapping that the caller has just made.
            let _ =
                unsafe { sys::map_over(address + part.start, part.len(), protection, fd, from) };
        }
    };
    let ring_page = part(COALESCED, COALESCED + 1);
    let nothing = part(COALESCED + 1, DIRTY_LOG);
    if ring_page.is_empty() && nothing.is_empty() {
        return;
    }
    let Some(file) = files::find(fd) else {
        return;
    };
    if let Some(ring) = file.object().coalesced_ring() {
        lay_over(ring_page, ring.as_raw_fd(), 0);
        lay_over(nothing, fd, NOTHING);
    }
}
