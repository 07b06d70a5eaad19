//! `/dev/kvm` (KVM API, section 4, "system ioctls").

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anykvm_abi::ioctl::*;
use anykvm_abi::{
    KVM_API_VERSION, KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, KVM_X86_XCOMP_GUEST_SUPP,
    kvm_cpuid_entry2, kvm_device_attr, kvm_msr_entry,
};

use crate::capability_table::check_extension;
use crate::error::{Errno, Result};
use crate::ioctl_table::{ObjectKind, refusal};
use crate::object::{Object, Reply, memfd};
use crate::time::CountedTime;
use crate::user::UserMemory;
use crate::vm::Vm;
use crate::{cpuid, mce, msr};

/// KVM_GET_VCPU_MMAP_SIZE: `kvm_run`, the page of port I/O data, the coalesced ring.
pub const VCPU_MMAP_SIZE: usize = 3 * 4096;

/// Entries of KVM_GET_MSRS are fewer than this.
const MAX_MSRS: usize = 256;
/// Where the entries of `kvm_cpuid2` and `kvm_msrs` begin, after a count and padding.
const ENTRIES: u64 = 8;

/// `/dev/kvm`.
#[derive(Debug)]
pub struct System {
    fd: OwnedFd,
}

impl System {
    /// Opens it. The host's clocks are measured now, once a process: later the program may have
    /// put a seccomp filter on itself.
    pub fn new() -> Result<Arc<Self>> {
        crate::clock::host();
        crate::steal_time::is_measured();
        Ok(Arc::new(Self {
            fd: memfd("kvm", 0)?,
        }))
    }

    /// Its memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A system ioctl.
    pub fn ioctl(&self, request: u32, arg: u64, user: &dyn UserMemory) -> Result<Reply> {
        if request == KVM_CREATE_VM {
            return Ok(Reply::Object(Object::Vm(self.create_vm(arg)?)));
        }
        self.ioctl_value(request, arg, user).map(Reply::Value)
    }

    fn ioctl_value(&self, request: u32, arg: u64, user: &dyn UserMemory) -> Result<i32> {
        match request {
            KVM_GET_API_VERSION => no_argument(arg).map(|()| KVM_API_VERSION as i32),
            KVM_GET_VCPU_MMAP_SIZE => no_argument(arg).map(|()| VCPU_MMAP_SIZE as i32),
            KVM_CHECK_EXTENSION => Ok(check_extension(arg)),
            KVM_GET_SUPPORTED_CPUID => put_cpuid(&supported_cpuid(), arg, user).map(|()| 0),
            KVM_GET_EMULATED_CPUID => {
                check_padding(arg, user)?;
                put_cpuid(&emulated_cpuid(), arg, user).map(|()| 0)
            }
            KVM_GET_MSR_INDEX_LIST => put_indices(&msr_index_list(), arg, user).map(|()| 0),
            KVM_GET_MSR_FEATURE_INDEX_LIST => {
                put_indices(&msr_feature_index_list(), arg, user).map(|()| 0)
            }
            KVM_GET_MSRS => get_msrs(arg, user),
            KVM_X86_GET_MCE_CAP_SUPPORTED => user.put(arg, &mce::CAP_SUPPORTED).map(|()| 0),
            KVM_HAS_DEVICE_ATTR => device_attr(&user.get(arg)?).map(|_| 0),
            KVM_GET_DEVICE_ATTR => {
                let attr: kvm_device_attr = user.get(arg)?;
                user.put(attr.addr, &device_attr(&attr)?).map(|()| 0)
            }
            _ => Err(refusal(ObjectKind::System, request)),
        }
    }

    /// KVM_CREATE_VM: of the default type, or with memory that can be private.
    pub fn create_vm(&self, vm_type: u64) -> Result<Arc<Vm>> {
        match u32::try_from(vm_type) {
            Ok(KVM_X86_DEFAULT_VM) => Vm::new(false, None),
            Ok(KVM_X86_SW_PROTECTED_VM) => Vm::new(true, None),
            _ => Err(Errno::EINVAL),
        }
    }

    /// A VM whose time is a count of its instructions; no ioctl does this.
    pub fn create_vm_with_counted_time(&self, time: CountedTime) -> Result<Arc<Vm>> {
        Vm::new(false, Some(time))
    }
}

fn no_argument(arg: u64) -> Result<()> {
    if arg == 0 { Ok(()) } else { Err(Errno::EINVAL) }
}

/// KVM_GET_SUPPORTED_CPUID.
pub(crate) fn supported_cpuid() -> Vec<kvm_cpuid_entry2> {
    cpuid::supported()
}

/// KVM_GET_EMULATED_CPUID: features that the processor has whatever the host's has. As Linux: MOVBE
/// and RDPID.
pub(crate) fn emulated_cpuid() -> Vec<kvm_cpuid_entry2> {
    const MOVBE: u32 = 1 << 22;
    const RDPID: u32 = 1 << 22;
    let leaf = |function, eax, ecx| kvm_cpuid_entry2 {
        function,
        eax,
        ecx,
        ..Default::default()
    };
    vec![leaf(0, 7, 0), leaf(1, 0, MOVBE), leaf(7, 0, RDPID)]
}

/// KVM_GET_MSR_INDEX_LIST.
pub(crate) fn msr_index_list() -> Vec<u32> {
    msr::index_list()
}

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub(crate) fn msr_feature_index_list() -> Vec<u32> {
    msr::FEATURES.iter().map(|(index, _)| *index).collect()
}

/// KVM_GET_MSRS on `/dev/kvm`: the value of a feature MSR.
pub(crate) fn msr_feature(index: u32) -> Option<u64> {
    msr::FEATURES
        .iter()
        .find_map(|(i, value)| (*i == index).then_some(*value))
}

/// The device attributes of `/dev/kvm`: one, the XSAVE components a guest may use.
fn device_attr(attr: &kvm_device_attr) -> Result<u64> {
    if attr.group != 0 || attr.attr != u64::from(KVM_X86_XCOMP_GUEST_SUPP) {
        return Err(Errno::ENXIO);
    }
    Ok(cpuid::host_xcr0())
}

/// Fills a `kvm_cpuid2`: all entries, and how many.
fn put_cpuid(entries: &[kvm_cpuid_entry2], arg: u64, user: &dyn UserMemory) -> Result<()> {
    let room: u32 = user.get(arg)?;
    if (room as usize) < entries.len() {
        return Err(Errno::E2BIG);
    }
    user.put_array(arg.wrapping_add(ENTRIES), entries)?;
    user.put(arg, &(entries.len() as u32))
}

/// KVM_GET_EMULATED_CPUID takes entries with clear padding only.
fn check_padding(arg: u64, user: &dyn UserMemory) -> Result<()> {
    let room: u32 = user.get(arg)?;
    if room == 0 {
        return Err(Errno::E2BIG);
    }
    for i in 0..u64::from(room).min(cpuid::MAX_ENTRIES as u64) {
        let at = arg.wrapping_add(ENTRIES + i * size_of::<kvm_cpuid_entry2>() as u64);
        if user.get::<kvm_cpuid_entry2>(at)?.padding != [0; 3] {
            return Err(Errno::EINVAL);
        }
    }
    Ok(())
}

/// Fills a `kvm_msr_list`. How many there are is told even if they do not fit.
fn put_indices(indices: &[u32], arg: u64, user: &dyn UserMemory) -> Result<()> {
    let room: u32 = user.get(arg)?;
    user.put(arg, &(indices.len() as u32))?;
    if (room as usize) < indices.len() {
        return Err(Errno::E2BIG);
    }
    user.put_array(arg.wrapping_add(4), indices)
}

/// KVM_GET_MSRS: values up to the first MSR that is no feature; how many.
fn get_msrs(arg: u64, user: &dyn UserMemory) -> Result<i32> {
    let count: u32 = user.get(arg)?;
    if count as usize >= MAX_MSRS {
        return Err(Errno::E2BIG);
    }
    let at = arg.wrapping_add(ENTRIES);
    let asked: Vec<kvm_msr_entry> = user.get_array(at, count as usize, MAX_MSRS)?;
    let known: Vec<kvm_msr_entry> = asked
        .iter()
        .map_while(|entry| msr_feature(entry.index).map(|data| kvm_msr_entry { data, ..*entry }))
        .collect();
    user.put_array(at, &known)?;
    Ok(known.len() as i32)
}
