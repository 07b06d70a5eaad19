//! The public handle of `/dev/kvm`, with the methods of the kvm-ioctls crate's `Kvm`. Section numbers
//! are the KVM API document's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anykvm_abi::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_X86_DEFAULT_VM, MsrList, Msrs,
    kvm_cpuid_entry2,
};

use crate::cap::Cap;
use crate::capability_table::check_extension;
use crate::error::{Errno, Result};
use crate::object::Object;
use crate::system::{
    System, VCPU_MMAP_SIZE, emulated_cpuid, msr_feature, msr_feature_index_list, msr_index_list,
    supported_cpuid,
};
use crate::time::CountedTime;
use crate::vm_fd::VmFd;

/// The KVM subsystem.
///
/// ```
/// let kvm = anykvm::Kvm::new().unwrap();
/// assert_eq!(kvm.get_api_version(), 12);
/// ```
#[derive(Debug)]
pub struct Kvm {
    system: Arc<System>,
}

impl AsFd for Kvm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.system.fd()
    }
}

impl AsRawFd for Kvm {
    fn as_raw_fd(&self) -> RawFd {
        self.system.fd().as_raw_fd()
    }
}

impl Kvm {
    /// Opens KVM. Needs no device node and no privileges.
    pub fn new() -> Result<Self> {
        Ok(Self {
            system: System::new()?,
        })
    }

    /// The object behind the handle, for ioctls by number.
    pub fn object(&self) -> Object {
        Object::System(self.system.clone())
    }

    /// The version of the API: 12 (section 4.1, KVM_GET_API_VERSION).
    pub fn get_api_version(&self) -> i32 {
        KVM_API_VERSION as i32
    }

    /// Whether a capability is there (section 4.4, KVM_CHECK_EXTENSION).
    ///
    /// ```
    /// # use anykvm::{Cap, Kvm};
    /// assert!(Kvm::new().unwrap().check_extension(Cap::UserMemory));
    /// ```
    pub fn check_extension(&self, c: Cap) -> bool {
        self.check_extension_int(c) > 0
    }

    /// A capability's value; 0 if it is not there (section 4.4).
    pub fn check_extension_int(&self, c: Cap) -> i32 {
        self.check_extension_raw(c as u64)
    }

    /// A capability's value by number (section 4.4).
    pub fn check_extension_raw(&self, c: u64) -> i32 {
        check_extension(c)
    }

    /// The size of a vCPU's shared area (section 4.5, KVM_GET_VCPU_MMAP_SIZE).
    pub fn get_vcpu_mmap_size(&self) -> Result<usize> {
        Ok(VCPU_MMAP_SIZE)
    }

    /// The recommended number of vCPUs (KVM_CAP_NR_VCPUS).
    pub fn get_nr_vcpus(&self) -> usize {
        self.check_extension_int(Cap::NrVcpus) as usize
    }

    /// The number of memory slots (KVM_CAP_NR_MEMSLOTS).
    pub fn get_nr_memslots(&self) -> usize {
        self.check_extension_int(Cap::NrMemslots) as usize
    }

    /// The most vCPUs a VM can have (KVM_CAP_MAX_VCPUS).
    pub fn get_max_vcpus(&self) -> usize {
        self.check_extension_int(Cap::MaxVcpus) as usize
    }

    /// vCPU ids are below this (KVM_CAP_MAX_VCPU_ID).
    pub fn get_max_vcpu_id(&self) -> usize {
        self.check_extension_int(Cap::MaxVcpuId) as usize
    }

    /// CPUID leaves that are emulated whatever the host has (section 4.88,
    /// KVM_GET_EMULATED_CPUID). E2BIG if there are more than `num_entries`.
    pub fn get_emulated_cpuid(&self, num_entries: usize) -> Result<CpuId> {
        cpuid(emulated_cpuid(), num_entries)
    }

    /// CPUID leaves as a vCPU can have them (section 4.46, KVM_GET_SUPPORTED_CPUID). E2BIG if there
    /// are more than `num_entries`.
    ///
    /// ```
    /// # use anykvm::Kvm;
    /// use anykvm::bindings::KVM_MAX_CPUID_ENTRIES;
    ///
    /// let kvm = Kvm::new().unwrap();
    /// let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    /// assert!(!cpuid.as_slice().is_empty());
    /// ```
    pub fn get_supported_cpuid(&self, num_entries: usize) -> Result<CpuId> {
        cpuid(supported_cpuid(), num_entries)
    }

    /// The MSRs that are saved and restored (section 4.3, KVM_GET_MSR_INDEX_LIST).
    pub fn get_msr_index_list(&self) -> Result<MsrList> {
        MsrList::from_entries(&msr_index_list()).map_err(|_| Errno::ENOMEM)
    }

    /// The MSRs that tell of features (section 4.3, KVM_GET_MSR_FEATURE_INDEX_LIST).
    pub fn get_msr_feature_index_list(&self) -> Result<MsrList> {
        MsrList::from_entries(&msr_feature_index_list()).map_err(|_| Errno::ENOMEM)
    }

    /// Reads feature MSRs (section 4.18, KVM_GET_MSRS on the system). Returns how many were read:
    /// the first that is no feature ends it.
    pub fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize> {
        let mut done = 0;
        for entry in msrs.as_mut_slice() {
            let Some(value) = msr_feature(entry.index) else {
                break;
            };
            entry.data = value;
            done += 1;
        }
        Ok(done)
    }

    /// Creates a VM (section 4.2, KVM_CREATE_VM).
    ///
    /// ```
    /// let vm = anykvm::Kvm::new().unwrap().create_vm().unwrap();
    /// ```
    pub fn create_vm(&self) -> Result<VmFd> {
        self.create_vm_with_type(KVM_X86_DEFAULT_VM.into())
    }

    /// Creates a VM of a type: KVM_X86_DEFAULT_VM or KVM_X86_SW_PROTECTED_VM (section 4.2).
    pub fn create_vm_with_type(&self, vm_type: u64) -> Result<VmFd> {
        Ok(VmFd::from(self.system.create_vm(vm_type)?))
    }

    /// Creates a VM whose time is a count of its instructions, and whose vCPUs can be run by count
    /// ([`crate::VcpuFd::run_counted`]). For tests and tools; no ioctl does this.
    pub fn create_vm_with_counted_time(&self, time: CountedTime) -> Result<VmFd> {
        Ok(VmFd::from(self.system.create_vm_with_counted_time(time)?))
    }
}

fn cpuid(entries: Vec<kvm_cpuid_entry2>, room: usize) -> Result<CpuId> {
    if room > KVM_MAX_CPUID_ENTRIES {
        return Err(Errno::ENOMEM);
    }
    if entries.len() > room {
        return Err(Errno::E2BIG);
    }
    CpuId::from_entries(&entries).map_err(|_| Errno::ENOMEM)
}
