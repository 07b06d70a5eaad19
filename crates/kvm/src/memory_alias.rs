//! The memory calls of the first KVM API: KVM_SET_MEMORY_REGION, RAM that KVM provides, and
//! KVM_SET_MEMORY_ALIAS, a guest-physical window onto other slots (the KVM API document of Linux
//! 2.6.34, sections 4.6 and 4.14). Linux has dropped both; here they stay.
//!
//! KVM's own RAM is in the VM's memfd at the offset that is its guest-physical address, so that
//! mmap of the VM fd shows guest-physical memory.
//!
//! An alias is in the memory map as more slots over the same memory, one for each slot that its
//! target range touches. Each has a dirty log of its own, which is added to the target slot's when
//! that is read.

use std::os::fd::AsFd;
use std::sync::Arc;

use anykvm_abi::{KVM_ALIAS_SLOTS, kvm_memory_alias, kvm_memory_region};
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::memory::{PAGE, Slot};
use rustix::fs::FallocateFlags;

use crate::error::{Errno, Result};
use crate::memory::{Backing, Place, Region, SlotTable};
use crate::vm::Vm;

/// One alias.
#[derive(Debug)]
pub(crate) struct Alias {
    gpa: u64,
    size: u64,
    target: u64,
    pieces: Vec<Piece>,
}

/// The part of an alias that shows one slot.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// The slot it shows.
    base: u16,
    /// Its first page in that slot.
    first_page: u64,
    slot: Arc<Slot>,
}

impl Alias {
    pub fn pieces(&self) -> impl Iterator<Item = Arc<Slot>> {
        self.pieces.iter().map(|p| p.slot.clone())
    }
}

impl Piece {
    /// Moves what was written through this window into the log of the slot behind it.
    pub fn merge_into(&self, table: &SlotTable) {
        if let Some(log) = &self.slot.dirty
            && let Some(record) = table.spaces[0].get(&self.base)
        {
            crate::dirty_log::merge(log, self.first_page, &record.slot);
        }
    }
}

impl SlotTable {
    /// Whether an alias other than this one has a window in the range.
    pub fn alias_overlaps(&self, except: Option<usize>, gpa: u64, size: u64) -> bool {
        self.aliases.iter().enumerate().any(|(i, alias)| {
            Some(i) != except
                && alias
                    .as_ref()
                    .is_some_and(|a| gpa < a.gpa + a.size && a.gpa < gpa + size)
        })
    }

    /// Moves what was written through windows onto this slot into its log.
    pub fn collect_alias_logs(&self, base: u16) {
        let pieces = self.aliases.iter().flatten().flat_map(|a| &a.pieces);
        pieces
            .filter(|p| p.base == base)
            .for_each(|p| p.merge_into(self));
    }

    /// Forgets that a page of this slot was written through windows onto it.
    pub fn forget_alias_dirty(&self, base: u16, page: u64) {
        for piece in self.aliases.iter().flatten().flat_map(|a| &a.pieces) {
            if piece.base == base
                && let Some(page) = page.checked_sub(piece.first_page)
                && let Some(log) = &piece.slot.dirty
            {
                log.clear(page);
            }
        }
    }

    /// Makes the pieces of all aliases anew from the slots there are; returns the old ones.
    pub fn rebuild_aliases(&mut self) -> Vec<Piece> {
        let mut old = Vec::new();
        for alias in self.aliases.iter_mut().flatten() {
            let Alias {
                gpa,
                size,
                target,
                pieces,
            } = alias;
            let new = self.spaces[0].iter().filter_map(|(base, record)| {
                let slot = &record.slot;
                let start = slot.gpa.max(*target);
                let end = (slot.gpa + slot.size).min(*target + *size);
                let len = end.checked_sub(start).filter(|len| *len > 0)?;
                let place = Place {
                    id: u32::from(*base),
                    gpa: *gpa + (start - *target),
                    size: len,
                    host: slot.host() + (start - slot.gpa),
                    readonly: slot.readonly,
                };
                let first_page = (start - slot.gpa) / PAGE;
                let dirty = slot
                    .dirty
                    .as_ref()
                    .map(|log| log.for_window(len / PAGE, first_page));
                Some(Piece {
                    base: *base,
                    first_page,
                    slot: Arc::new(place.slot(record.own.clone(), dirty)),
                })
            });
            let new = new.collect();
            old.append(&mut std::mem::replace(pieces, new));
        }
        old
    }
}

impl Vm {
    /// KVM_SET_MEMORY_REGION.
    pub(crate) fn set_memory_region(&self, region: &kvm_memory_region) -> Result<()> {
        self.set_region(Region {
            slot: region.slot,
            flags: region.flags,
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            backing: Backing::Own,
            private: None,
        })
    }

    /// Memory for a slot, in the VM's file.
    pub(crate) fn own_memory(
        &self,
        table: &mut SlotTable,
        gpa: u64,
        size: u64,
    ) -> Result<Arc<Mapping>> {
        let len = usize::try_from(size).map_err(|_| Errno::ENOMEM)?;
        let end = gpa + size;
        if end > table.file_len {
            rustix::fs::ftruncate(self.fd(), end).map_err(|_| Errno::ENOMEM)?;
            table.file_len = end;
        }
        Ok(Arc::new(
            Mapping::new(self.fd(), gpa, len).map_err(|_| Errno::ENOMEM)?,
        ))
    }

    /// Gives memory of a deleted slot back; a slot made there later begins with zeros.
    pub(crate) fn discard_own_memory(&self, gpa: u64, size: u64) {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A memfd supports it; should it fail, the memory is kept until the VM is closed.
        let _ = rustix::fs::fallocate(self.fd().as_fd(), punch, gpa, size);
    }

    /// KVM_SET_MEMORY_ALIAS.
    pub(crate) fn set_memory_alias(&self, alias: &kvm_memory_alias) -> Result<()> {
        let kvm_memory_alias {
            slot,
            flags,
            guest_phys_addr,
            memory_size,
            target_phys_addr,
        } = *alias;
        if self.has_private_memory() {
            return Err(Errno::EINVAL);
        }
        let aligned = [guest_phys_addr, memory_size, target_phys_addr];
        if flags != 0
            || slot >= KVM_ALIAS_SLOTS
            || aligned.iter().any(|a| !a.is_multiple_of(PAGE))
            || guest_phys_addr.checked_add(memory_size).is_none()
            || target_phys_addr.checked_add(memory_size).is_none()
        {
            return Err(Errno::EINVAL);
        }
        let slot = slot as usize;
        let mut table = self.lock_slots();
        if memory_size != 0
            && (table.overlaps(0, None, guest_phys_addr, memory_size)
                || table.alias_overlaps(Some(slot), guest_phys_addr, memory_size))
        {
            return Err(Errno::EEXIST);
        }
        let new = (memory_size != 0).then_some(Alias {
            gpa: guest_phys_addr,
            size: memory_size,
            target: target_phys_addr,
            pieces: Vec::new(),
        });
        let old = std::mem::replace(&mut table.aliases[slot], new);
        self.put_in_force(&mut table, 0);
        for piece in old.iter().flat_map(|alias| &alias.pieces) {
            piece.merge_into(&table);
        }
        Ok(())
    }
}
