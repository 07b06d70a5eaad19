//! KVM_X86_SET_MSR_FILTER (KVM API, section 4.97): which MSRs the guest may touch without user space
//! being asked.

use anykvm_abi::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_RANGE_VALID_MASK,
    KVM_MSR_FILTER_READ, KVM_MSR_FILTER_VALID_MASK, KVM_MSR_FILTER_WRITE, kvm_user_msr_filter,
};

use crate::error::{Errno, Result};
use crate::user::UserMemory;
use crate::vm::Vm;

/// MSRs of x2APIC, which cannot be filtered.
const X2APIC_MSRS: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// A filter in force.
#[derive(Debug)]
pub(crate) struct MsrFilter {
    default_allow: bool,
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    flags: u32,
    base: u32,
    count: u32,
    /// A bit set allows.
    bitmap: Vec<u64>,
}

impl MsrFilter {
    /// Takes a filter from user space; `None` if it filters nothing.
    pub fn new(filter: &kvm_user_msr_filter, user: &dyn UserMemory) -> Result<Option<Self>> {
        if filter.flags & !KVM_MSR_FILTER_VALID_MASK != 0 {
            return Err(Errno::EINVAL);
        }
        let default_allow = filter.flags & KVM_MSR_FILTER_DEFAULT_DENY == 0;
        let used = || filter.ranges.iter().filter(|r| r.nmsrs != 0);
        if used().next().is_none() {
            return if default_allow {
                Ok(None)
            } else {
                Err(Errno::EINVAL)
            };
        }
        let mut ranges = Vec::new();
        for range in used() {
            let words = range.nmsrs.div_ceil(64) as usize;
            if range.flags & !KVM_MSR_FILTER_RANGE_VALID_MASK != 0
                || range.flags == 0
                || words * 8 > KVM_MSR_FILTER_MAX_BITMAP_SIZE as usize
            {
                return Err(Errno::EINVAL);
            }
            ranges.push(Range {
                flags: range.flags,
                base: range.base,
                count: range.nmsrs,
                bitmap: user.get_array(range.bitmap, words, words)?,
            });
        }
        Ok(Some(Self {
            default_allow,
            ranges,
        }))
    }

    /// Whether the guest may read (or write) this MSR.
    pub fn allows(&self, index: u32, write: bool) -> bool {
        if X2APIC_MSRS.contains(&index) {
            return true;
        }
        let access = if write {
            KVM_MSR_FILTER_WRITE
        } else {
            KVM_MSR_FILTER_READ
        };
        let range = self.ranges.iter().find(|r| {
            r.flags & access != 0 && index.wrapping_sub(r.base) < r.count && index >= r.base
        });
        range.map_or(self.default_allow, |r| {
            let bit = index - r.base;
            r.bitmap
                .get(bit as usize / 64)
                .is_some_and(|word| word >> (bit % 64) & 1 != 0)
        })
    }
}

impl Vm {
    /// KVM_X86_SET_MSR_FILTER.
    pub(crate) fn set_msr_filter(
        &self,
        filter: &kvm_user_msr_filter,
        user: &dyn UserMemory,
    ) -> Result<()> {
        self.msr_filter
            .store(MsrFilter::new(filter, user)?.map(Into::into));
        Ok(())
    }

    /// Whether a guest may access the MSR.
    pub(crate) fn msr_allowed(&self, index: u32, write: bool) -> bool {
        self.msr_filter
            .load()
            .as_ref()
            .is_none_or(|filter| filter.allows(index, write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_range_that_fits_decides() {
        let filter = MsrFilter {
            default_allow: true,
            ranges: vec![
                Range {
                    flags: KVM_MSR_FILTER_READ,
                    base: 0x100,
                    count: 2,
                    bitmap: vec![0b10],
                },
                Range {
                    flags: 3,
                    base: 0x100,
                    count: 64,
                    bitmap: vec![0],
                },
            ],
        };
        assert!(!filter.allows(0x100, false));
        assert!(filter.allows(0x101, false));
        assert!(!filter.allows(0x101, true));
        assert!(!filter.allows(0x13f, false));
        assert!(filter.allows(0x140, false));
        assert!(filter.allows(0x800, true));
    }
}
