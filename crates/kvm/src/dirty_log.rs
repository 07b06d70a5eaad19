//! Dirty logging (KVM API, sections 4.8, KVM_GET_DIRTY_LOG, 4.117, KVM_CLEAR_DIRTY_LOG, and 7.18,
//! KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
//!
//! A bit cleared here must be set again by the next store, so the processors' write translations of
//! logged pages are dropped before the ioctl returns. Stores between clearing and dropping are not
//! lost: the VMM reads the page after the ioctl.

use std::sync::atomic::Ordering;

use anykvm_abi::{kvm_clear_dirty_log, kvm_dirty_log};
use anykvm_cpu::memory::{DirtyLog, PAGE, Slot};
use anykvm_cpu::requests::MEMSLOTS;

use crate::error::{Errno, Result};
use crate::memory::SlotTable;
use crate::user::UserMemory;
use crate::vm::Vm;

/// Moves the bits of a log into a slot's, from this page on.
pub(crate) fn merge(from: &DirtyLog, first_page: u64, to: &Slot) {
    for (i, word) in from.words().iter().enumerate() {
        let mut bits = word.swap(0, Ordering::SeqCst);
        while bits != 0 {
            let page = first_page + i as u64 * 64 + u64::from(bits.trailing_zeros());
            bits &= bits - 1;
            if let Some(log) = &to.dirty {
                log.inherit(page);
            }
        }
    }
}

impl Vm {
    /// The ioctls about bitmaps, where there are rings instead.
    fn require_bitmaps(&self) -> Result<()> {
        if self.dirty_ring_bytes() != 0 {
            return Err(Errno::ENXIO);
        }
        Ok(())
    }

    /// The pages written since the last call, one bit each, and (unless the log is manually
    /// protected) forgets them.
    fn take_dirty_log(&self, table: &SlotTable, slot: u32) -> Result<Vec<u64>> {
        self.require_bitmaps()?;
        let manual = self.enabled.manual_dirty_log_protect() != 0;
        let (space, id) = SlotTable::split(slot)?;
        let record = table.spaces[space].get(&id).ok_or(Errno::ENOENT)?;
        if record.slot.dirty.is_none() {
            return Err(Errno::ENOENT);
        }
        if space == 0 {
            table.collect_alias_logs(id);
        }
        let words = record.slot.dirty.iter().flat_map(|log| log.words());
        Ok(words
            .map(|w| {
                if manual {
                    w.load(Ordering::SeqCst)
                } else {
                    w.swap(0, Ordering::SeqCst)
                }
            })
            .collect())
    }

    /// [`Self::take_dirty_log`], for a caller that wants the bitmap itself.
    pub(crate) fn fetch_dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        let table = self.lock_slots();
        let bitmap = self.take_dirty_log(&table, slot)?;
        self.relog(bitmap.iter().any(|w| *w != 0));
        Ok(bitmap)
    }

    /// KVM_GET_DIRTY_LOG.
    pub(crate) fn get_dirty_log(&self, log: &kvm_dirty_log, user: &dyn UserMemory) -> Result<()> {
        let table = self.lock_slots();
        let bitmap = self.take_dirty_log(&table, log.slot)?;
        let written = user.put_array(bitmap_address(log), &bitmap);
        if written.is_err()
            && let Some(record) = table.get(log.slot)?
            && let Some(dirty) = &record.slot.dirty
        {
            for (word, bits) in dirty.words().iter().zip(&bitmap) {
                word.fetch_or(*bits, Ordering::SeqCst);
            }
        }
        self.relog(bitmap.iter().any(|w| *w != 0));
        written
    }

    /// KVM_CLEAR_DIRTY_LOG: forgets the pages whose bits are set in the bitmap.
    pub(crate) fn clear_dirty_log(
        &self,
        log: &kvm_clear_dirty_log,
        user: &dyn UserMemory,
    ) -> Result<()> {
        let table = self.lock_slots();
        self.require_bitmaps()?;
        SlotTable::split(log.slot)?;
        if log.first_page & 63 != 0 {
            return Err(Errno::EINVAL);
        }
        let record = table.get(log.slot)?.ok_or(Errno::ENOENT)?;
        let dirty = record.slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        let pages = record.slot.size / PAGE;
        let count = u64::from(log.num_pages);
        let left = pages.checked_sub(log.first_page).ok_or(Errno::EINVAL)?;
        if count > left || (count < left && count & 63 != 0) {
            return Err(Errno::EINVAL);
        }
        let words = count.div_ceil(64) as usize;
        let bitmap: Vec<u64> = user.get_array(clear_bitmap_address(log), words, words)?;
        let first_word = (log.first_page / 64) as usize;
        let mut cleared = 0;
        for (word, mask) in dirty.words().iter().skip(first_word).zip(&bitmap) {
            cleared |= word.fetch_and(!mask, Ordering::SeqCst) & mask;
        }
        self.relog(cleared != 0);
        Ok(())
    }

    /// Bits were cleared: stores to those pages must be seen again.
    fn relog(&self, any: bool) {
        if any {
            self.memory.synchronise(MEMSLOTS, None);
        }
    }
}

fn bitmap_address(log: &kvm_dirty_log) -> u64 {
    address(anykvm_abi::Plain::as_bytes(log), 8)
}

fn clear_bitmap_address(log: &kvm_clear_dirty_log) -> u64 {
    address(anykvm_abi::Plain::as_bytes(log), 16)
}

/// The pointer member of a union, which is a number here.
fn address(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(raw)
}
