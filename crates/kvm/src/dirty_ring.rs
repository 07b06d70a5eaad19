//! The dirty ring (KVM API, section 8.29, KVM_CAP_DIRTY_LOG_RING): instead of a bitmap for each slot,
//! a ring of page numbers for each vCPU, in pages of the vCPU's descriptor from
//! KVM_DIRTY_LOG_PAGE_OFFSET on. The ring itself is [`anykvm_cpu::memory::dirty::DirtyRing`].

use std::mem::offset_of;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::fence;

use anykvm_abi::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use anykvm_cpu::Requests;
use anykvm_cpu::memory::PAGE;
use anykvm_cpu::memory::dirty::{DirtyRing, F_DIRTY, F_RESET, RESERVED_ENTRIES};
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::requests::MEMSLOTS;

use crate::error::{Errno, Result};
use crate::memory::SlotTable;
use crate::vcpu::Vcpu;
use crate::vcpu_fd::VcpuFd;
use crate::vm::Vm;

/// Where a vCPU's ring begins in its descriptor.
pub(crate) const RING_AT: u64 = KVM_DIRTY_LOG_PAGE_OFFSET as u64 * PAGE;
const ENTRY: u64 = size_of::<kvm_dirty_gfn>() as u64;
/// KVM_DIRTY_RING_MAX_ENTRIES, in bytes: what the capability reports.
pub(crate) const MAX_RING_BYTES: u32 = 65536 * ENTRY as u32;

impl Vm {
    /// KVM_ENABLE_CAP with the size of the rings to come, in bytes: once, and before the first vCPU.
    pub(crate) fn enable_dirty_ring(&self, bytes: u64) -> Result<()> {
        let least = PAGE.max(u64::from(RESERVED_ENTRIES) * ENTRY);
        // Linux takes the argument as 32 bits.
        let bytes = bytes as u32;
        if !bytes.is_power_of_two() || u64::from(bytes) < least {
            return Err(Errno::EINVAL);
        }
        if bytes > MAX_RING_BYTES {
            return Err(Errno::E2BIG);
        }
        let vcpus = self.lock_vcpus();
        if self.dirty_ring_bytes() != 0 || vcpus.any_created() {
            return Err(Errno::EINVAL);
        }
        self.dirty_ring_bytes.store(bytes, SeqCst);
        Ok(())
    }

    /// Bytes of each vCPU's ring; 0 if there are none, and bitmaps instead.
    pub(crate) fn dirty_ring_bytes(&self) -> u32 {
        self.dirty_ring_bytes.load(SeqCst)
    }

    /// The ring in a new vCPU's memfd, if the VM has rings.
    pub(crate) fn dirty_ring(
        &self,
        vcpu: impl AsFd,
        requests: &Arc<Requests>,
    ) -> Result<Option<Arc<DirtyRing>>> {
        let bytes = self.dirty_ring_bytes();
        if bytes == 0 {
            return Ok(None);
        }
        rustix::fs::ftruncate(&vcpu, RING_AT + u64::from(bytes))?;
        let entries = Mapping::new(vcpu.as_fd(), RING_AT, bytes as usize)?;
        Ok(Some(Arc::new(DirtyRing::new(entries, requests.clone()))))
    }

    /// KVM_RESET_DIRTY_RINGS: frees the entries that were collected; how many. From then on their pages
    /// are put into a ring again when they are written.
    pub(crate) fn reset_dirty_rings(&self) -> Result<i32> {
        if self.dirty_ring_bytes() == 0 {
            return Err(Errno::EINVAL);
        }
        let table = self.lock_slots();
        let vcpus = self.vcpus();
        let rings = vcpus.iter().filter_map(|vcpu| vcpu.dirty_ring());
        let count: u32 = rings
            .map(|ring| ring.reset(|slot, page| table.forget_dirty(slot, page)))
            .sum();
        if count != 0 {
            self.memory.synchronise(MEMSLOTS, None);
        }
        Ok(count as i32)
    }
}

/// The VMM's side of a ring: takes entries out, in order.
#[derive(Debug)]
pub(crate) struct Collector {
    entries: Mapping,
    next: usize,
}

impl Iterator for Collector {
    type Item = (u32, u64);

    fn next(&mut self) -> Option<(u32, u64)> {
        let at = self.next % self.entries.len();
        let flags = at + offset_of!(kvm_dirty_gfn, flags);
        if self.entries.read::<u32>(flags) & KVM_DIRTY_GFN_F_MASK != F_DIRTY {
            return None;
        }
        fence(Acquire);
        let slot = self.entries.read(at + offset_of!(kvm_dirty_gfn, slot));
        let page = self.entries.read(at + offset_of!(kvm_dirty_gfn, offset));
        fence(Release);
        self.entries.write(flags, F_RESET);
        self.next = at + ENTRY as usize;
        Some((slot, page))
    }
}

impl VcpuFd {
    /// Takes pages out of the vCPU's dirty ring: slot numbers, with the address space in the upper 16 bits,
    /// and the pages' numbers in their slots. Their entries become free by
    /// [`crate::VmFd::reset_dirty_rings`]. `None` if there is no ring (section 8.29).
    pub fn dirty_log_ring_iter(&mut self) -> Option<impl Iterator<Item = (u32, u64)>> {
        if self.collector.is_none() && self.vcpu().dirty_ring().is_some() {
            let bytes = self.vcpu().vm().dirty_ring_bytes() as usize;
            // Without memory for a mapping there is nothing to be had.
            let entries = Mapping::new(self.vcpu().fd(), RING_AT, bytes).ok()?;
            self.collector = Some(Collector { entries, next: 0 });
        }
        self.collector.as_mut()
    }
}

impl SlotTable {
    /// Clears a page's bit, for the slot itself and every window onto it. The numbers are the VMM's.
    fn forget_dirty(&self, slot: u32, page: u64) {
        if let Ok(Some(record)) = self.get(slot)
            && let Some(log) = &record.slot.dirty
        {
            log.clear(page);
        }
        if let Ok((0, id)) = Self::split(slot) {
            self.forget_alias_dirty(id, page);
        }
    }
}

impl Vcpu {
    /// Whether the descriptor's pages may be mapped so (`kvm_vcpu_mmap`): those of the ring must be shared
    /// and not executable, else EINVAL.
    pub fn check_mapping(&self, offset: u64, len: u64, shared: bool, exec: bool) -> Result<()> {
        let ring = RING_AT..RING_AT + u64::from(self.vm().dirty_ring_bytes());
        let last = offset.saturating_add(len.max(1) - 1) & !(PAGE - 1);
        if (ring.contains(&offset) || ring.contains(&last)) && (exec || !shared) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }
}
