//! KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE (KVM API, 4.114 and 4.115): the state of a vCPU whose guest
//! cannot be a hypervisor. It is a header that says so, in the format of the vCPU's vendor.

use std::sync::Arc;

use anykvm_abi::{
    KVM_STATE_NESTED_EVMCS, KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX,
    KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE, KVM_STATE_NESTED_RUN_PENDING,
};

use crate::error::{Errno, Result};
use crate::user::UserMemory;
use crate::vcpu::Vcpu;

/// `sizeof(struct kvm_nested_state)`, with no data behind it.
pub(crate) const SIZE: usize = 128;
/// Where `size` is.
const SIZE_AT: u64 = 4;

/// `struct kvm_nested_state`, as far as it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    flags: u16,
    format: u16,
    size: u32,
    /// `hdr.vmx.vmxon_pa`, `hdr.vmx.vmcs12_pa` (`hdr.svm.vmcb_pa` lies at the first).
    addresses: [u64; 2],
    /// `hdr.vmx.smm.flags`.
    smm_flags: u16,
}

impl Header {
    fn from_bytes(b: &[u8; SIZE]) -> Self {
        let u16_at = |at| u16::from_le_bytes([b[at], b[at + 1]]);
        let u64_at = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&b[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        Self {
            flags: u16_at(0),
            format: u16_at(2),
            size: u32::from(u16_at(4)) | u32::from(u16_at(6)) << 16,
            addresses: [u64_at(8), u64_at(16)],
            smm_flags: u16_at(24),
        }
    }

    fn to_bytes(self) -> [u8; SIZE] {
        let mut b = [0; SIZE];
        b[0..2].copy_from_slice(&self.flags.to_le_bytes());
        b[2..4].copy_from_slice(&self.format.to_le_bytes());
        b[4..8].copy_from_slice(&self.size.to_le_bytes());
        b[8..16].copy_from_slice(&self.addresses[0].to_le_bytes());
        b[16..24].copy_from_slice(&self.addresses[1].to_le_bytes());
        b[24..26].copy_from_slice(&self.smm_flags.to_le_bytes());
        b
    }

    /// The only state there is: AMD's global interrupt flag is set, Intel's VMX is off.
    fn none(amd: bool) -> Self {
        let size = SIZE as u32;
        if amd {
            Self {
                flags: KVM_STATE_NESTED_GIF_SET as u16,
                format: KVM_STATE_NESTED_FORMAT_SVM as u16,
                size,
                addresses: [0; 2],
                smm_flags: 0,
            }
        } else {
            Self {
                flags: 0,
                format: KVM_STATE_NESTED_FORMAT_VMX as u16,
                size,
                addresses: [u64::MAX; 2],
                smm_flags: 0,
            }
        }
    }

    /// EINVAL for any other (`svm_set_nested_state` without EFER.SVME, `vmx_set_nested_state` without VMX).
    fn check(&self, amd: bool) -> Result<()> {
        const KNOWN: u32 = KVM_STATE_NESTED_GUEST_MODE
            | KVM_STATE_NESTED_RUN_PENDING
            | KVM_STATE_NESTED_EVMCS
            | KVM_STATE_NESTED_GIF_SET;
        let none = Self::none(amd);
        let good = u32::from(self.flags) & !KNOWN == 0
            && self.size as usize >= SIZE
            && (self.flags, self.format) == (none.flags, none.format)
            && (amd || (self.addresses, self.smm_flags) == (none.addresses, 0));
        if good { Ok(()) } else { Err(Errno::EINVAL) }
    }
}

impl Vcpu {
    /// KVM_GET_NESTED_STATE. E2BIG, and the size that is needed, if the caller's is smaller.
    pub(crate) fn ioctl_get_nested_state(
        self: &Arc<Self>,
        arg: u64,
        user: &dyn UserMemory,
    ) -> Result<()> {
        let room: u32 = user.get(arg.wrapping_add(SIZE_AT))?;
        if (room as usize) < SIZE {
            user.put(arg.wrapping_add(SIZE_AT), &(SIZE as u32))?;
            return Err(Errno::E2BIG);
        }
        let amd = self.machine().cpuid().table().is_amd();
        user.put(arg, &Header::none(amd).to_bytes())
    }

    /// KVM_SET_NESTED_STATE: takes what [`Self::ioctl_get_nested_state`] gives.
    pub(crate) fn ioctl_set_nested_state(&self, arg: u64, user: &dyn UserMemory) -> Result<()> {
        let amd = self.machine().cpuid().table().is_amd();
        Header::from_bytes(&user.get::<[u8; SIZE]>(arg)?).check(amd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_state_without_nesting_is_taken() {
        for amd in [false, true] {
            let good = Header::none(amd);
            assert_eq!(Header::from_bytes(&good.to_bytes()), good);
            assert_eq!(good.check(amd), Ok(()));
            assert_eq!(good.check(!amd), Err(Errno::EINVAL));
            let bad = [
                Header {
                    flags: good.flags | 1,
                    ..good
                },
                Header {
                    flags: good.flags | 1 << 15,
                    ..good
                },
                Header { size: 127, ..good },
            ];
            for bad in bad {
                assert_eq!(bad.check(amd), Err(Errno::EINVAL), "{bad:?}");
            }
        }
        let vmx = Header::none(false);
        for addresses in [[0, u64::MAX], [u64::MAX, 0]] {
            assert!(Header { addresses, ..vmx }.check(false).is_err());
        }
    }
}
