//! KVM_X86_SET_MSR_FILTER (KVM API, section 4.97): which MSRs the guest may touch without user space
//! being asked.

use anykvm_abi::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_RANGE_VALID_MASK,
    KVM_MSR_FILTER_READ, KVM_MSR_FILTER_VALID_MASK, KVM_MSR_FILTER_WRITE, kvm_user_msr_filter,
    kvm_user_msr_filter_range,
};

use crate::error::{Errno, Result};
use crate::user::{Efault, UserMemory};
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

/// Bitmaps of a Rust caller as memory that a filter can point into.
#[derive(Default)]
struct Bitmaps(Vec<u8>);

impl Bitmaps {
    /// The address of a copy, filled up to whole words.
    fn add(&mut self, bitmap: &[u8]) -> u64 {
        let at = self.0.len();
        self.0.extend_from_slice(bitmap);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        at as u64
    }
}

impl UserMemory for Bitmaps {
    fn read(&self, address: u64, buf: &mut [u8]) -> std::result::Result<(), Efault> {
        let from = self
            .0
            .get(address as usize..)
            .and_then(|b| b.get(..buf.len()));
        buf.copy_from_slice(from.ok_or(Efault)?);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> std::result::Result<(), Efault> {
        Err(Efault)
    }
}

impl Vm {
    /// KVM_X86_SET_MSR_FILTER, from the ranges themselves.
    pub(crate) fn set_msr_filter_ranges(
        &self,
        flags: u32,
        ranges: &[crate::vm_fd::MsrFilterRange<'_>],
    ) -> Result<()> {
        let mut filter = kvm_user_msr_filter {
            flags,
            ..Default::default()
        };
        if ranges.len() > filter.ranges.len() {
            return Err(Errno::EINVAL);
        }
        // The bitmaps, one after the other, as the only memory there is.
        let mut bitmaps = Bitmaps::default();
        for (to, range) in filter.ranges.iter_mut().zip(ranges) {
            if range.bitmap.len() < range.msr_count.div_ceil(8) as usize {
                return Err(Errno::EINVAL);
            }
            *to = kvm_user_msr_filter_range {
                flags: range.flags.bits(),
                nmsrs: range.msr_count,
                base: range.base,
                pad: 0,
                bitmap: bitmaps.add(range.bitmap),
            };
        }
        self.set_msr_filter(&filter, &bitmaps)
    }

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
