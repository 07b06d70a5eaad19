//! KVM_XEN_HVM_CONFIG (KVM API, section 4.28): the MSR by which a Xen guest asks for its hypercall
//! page. A write of the page's address to it copies a page of the VMM's blob there: the 64-bit blob if
//! the vCPU is in long mode, else the 32-bit one. The low 12 bits number the blob's page.

use anykvm_abi::kvm_xen_hvm_config;

use crate::error::{Errno, Result};
use crate::user::UserMemory;
use crate::vm::Vm;

const PAGE: u64 = 4096;

/// The configuration, with the blobs' pages as they were when it was made; `None` where the VMM's
/// pointer led nowhere.
#[derive(Debug, Default)]
pub(crate) struct XenHvm {
    msr: u32,
    blob_32: Vec<Option<Box<[u8]>>>,
    blob_64: Vec<Option<Box<[u8]>>>,
}

fn blob(user: &dyn UserMemory, address: u64, pages: u8) -> Vec<Option<Box<[u8]>>> {
    (0..u64::from(pages))
        .map(|i| {
            let mut page = vec![0; PAGE as usize].into_boxed_slice();
            user.read(address.wrapping_add(i * PAGE), &mut page)
                .ok()
                .map(|()| page)
        })
        .collect()
}

impl Vm {
    /// KVM_XEN_HVM_CONFIG. No flag is supported: hypercalls are the blob's own affair.
    pub(crate) fn xen_hvm_config(
        &self,
        config: &kvm_xen_hvm_config,
        user: &dyn UserMemory,
    ) -> Result<()> {
        if config.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let xen = XenHvm {
            msr: config.msr,
            blob_32: blob(user, config.blob_addr_32, config.blob_size_32),
            blob_64: blob(user, config.blob_addr_64, config.blob_size_64),
        };
        self.xen_hvm.store((config.msr != 0).then(|| xen.into()));
        Ok(())
    }

    /// A guest's WRMSR: `None` if it is not the hypercall page's MSR, else whether the page was
    /// written (if not, #GP).
    pub fn write_xen_hypercall_page(&self, msr: u32, value: u64, long_mode: bool) -> Option<bool> {
        let xen = self.xen_hvm.load();
        let xen = xen.as_ref().filter(|xen| xen.msr == msr)?;
        let blob = if long_mode {
            &xen.blob_64
        } else {
            &xen.blob_32
        };
        let page = blob
            .get((value & (PAGE - 1)) as usize)
            .and_then(Option::as_deref);
        Some(page.is_some_and(|page| self.memory.write(value & !(PAGE - 1), page).is_ok()))
    }
}
