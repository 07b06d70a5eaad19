//! Memory slots (KVM API, section 4.35, KVM_SET_USER_MEMORY_REGION): two address spaces of numbered
//! slots, the second being what a vCPU in system-management mode sees. Checks and their order are
//! those of Linux's `__kvm_set_memory_region`.
//!
//! A change builds a new [`MemoryMap`] and puts it in force; [`GuestMemory::replace`] returns when no
//! vCPU uses the old one, so that the VMM may unmap memory right after the ioctl.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};

use anykvm_abi::{
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
};
use anykvm_cpu::memory::dirty::RingName;
use anykvm_cpu::memory::mapping::Mapping;
use anykvm_cpu::memory::{DirtyLog, MemoryMap, PAGE, Slot};

use crate::error::{Errno, Result};
use crate::guest_memfd::{Binding, PrivateRanges};
use crate::memory_alias::Alias;
use crate::stats::VmStat;
use crate::vm::Vm;

/// Slots of one address space (KVM_CAP_NR_MEMSLOTS).
pub(crate) const MEMORY_SLOTS: u32 = 32764;
/// Address spaces (KVM_CAP_MULTI_ADDRESS_SPACE): normal and SMM.
pub(crate) const ADDRESS_SPACES: usize = 2;
/// Pages of one slot.
const MAX_PAGES: u64 = (1 << 31) - 1;
/// The end of user addresses on x86-64 with 4-level paging, as `access_ok` has it.
const USER_END: u64 = 0x7fff_ffff_f000;

/// One request to change a slot, after the ioctl's own structure has been taken apart.
#[derive(Debug)]
pub(crate) struct Region {
    /// Slot number; the address space in the upper 16 bits.
    pub slot: u32,
    pub flags: u32,
    pub gpa: u64,
    pub size: u64,
    pub backing: Backing,
    /// Private memory behind the same addresses (KVM_MEM_GUEST_MEMFD).
    pub private: Option<Binding>,
}

/// Whose memory a slot shows.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// The VMM's, at this address.
    User(u64),
    /// The VM's own (KVM_SET_MEMORY_REGION); mapped when the slot is made.
    Own,
}

/// A slot in force.
#[derive(Debug)]
pub(crate) struct Record {
    pub flags: u32,
    pub backing: Backing,
    /// The VM's own memory, kept mapped.
    pub own: Option<Arc<Mapping>>,
    /// Private memory behind the same addresses.
    pub private: Option<Binding>,
    pub slot: Arc<Slot>,
}

/// All slots of a VM.
#[derive(Debug, Default)]
pub(crate) struct SlotTable {
    pub spaces: [BTreeMap<u16, Record>; ADDRESS_SPACES],
    /// The slots' numbers by their first addresses.
    by_gpa: [BTreeMap<u64, u16>; ADDRESS_SPACES],
    pub aliases: [Option<Alias>; anykvm_abi::KVM_ALIAS_SLOTS as usize],
    /// Bytes of the VM's memfd.
    pub file_len: u64,
    /// Guest-physical memory whose private part is seen.
    pub private: PrivateRanges,
}

impl SlotTable {
    /// Splits a slot number as the ioctls give it.
    pub fn split(slot: u32) -> Result<(usize, u16)> {
        let (space, id) = ((slot >> 16) as usize, slot & 0xffff);
        if space >= ADDRESS_SPACES || id >= MEMORY_SLOTS {
            return Err(Errno::EINVAL);
        }
        Ok((space, id as u16))
    }

    pub fn get(&self, slot: u32) -> Result<Option<&Record>> {
        let (space, id) = Self::split(slot)?;
        Ok(self.spaces[space].get(&id))
    }

    fn insert(&mut self, space: usize, id: u16, record: Record) -> Option<Record> {
        let old = self.remove(space, id);
        self.by_gpa[space].insert(record.slot.gpa, id);
        self.spaces[space].insert(id, record);
        old
    }

    fn remove(&mut self, space: usize, id: u16) -> Option<Record> {
        let old = self.spaces[space].remove(&id)?;
        self.by_gpa[space].remove(&old.slot.gpa);
        Some(old)
    }

    /// Whether any slot but this one has memory in the range.
    pub fn overlaps(&self, space: usize, except: Option<u16>, gpa: u64, size: u64) -> bool {
        let below = self.by_gpa[space].range(..gpa + size).rev();
        // Of those that begin in front of its end the last has its own end farthest.
        let last = below.map(|(_, id)| id).find(|id| Some(**id) != except);
        last.and_then(|id| self.spaces[space].get(id))
            .is_some_and(|r| r.slot.gpa + r.slot.size > gpa)
    }

    /// Whether the processors see each slot of an address space as one piece, and nothing else.
    fn is_plain(&self, space: usize) -> bool {
        space != 0 || self.private.is_empty() && self.aliases.iter().all(Option::is_none)
    }

    /// Every piece of memory of an address space: slots and what aliases show of them.
    fn pieces(&self, space: usize) -> Vec<Arc<Slot>> {
        let records = self.spaces[space].values();
        let slots = records.flat_map(|r| self.private.pieces(r));
        let aliases = (space == 0).then(|| self.aliases.iter().flatten());
        slots
            .chain(aliases.into_iter().flatten().flat_map(Alias::pieces))
            .collect()
    }
}

impl Region {
    /// The checks that need only the request.
    pub(crate) fn check(&self, vm: &Vm) -> Result<()> {
        // Where pages can be private, writes are not logged, and there is one address space. What has private
        // memory cannot be read-only.
        let valid = match (
            vm.has_private_memory(),
            self.flags & KVM_MEM_GUEST_MEMFD != 0,
        ) {
            (false, _) => KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY,
            (true, false) => KVM_MEM_READONLY,
            (true, true) => KVM_MEM_GUEST_MEMFD,
        };
        if vm.has_private_memory() && self.slot >> 16 != 0 {
            return Err(Errno::EINVAL);
        }
        if self.flags & !valid != 0
            || !self.size.is_multiple_of(PAGE)
            || !self.gpa.is_multiple_of(PAGE)
        {
            return Err(Errno::EINVAL);
        }
        if let Backing::User(host) = self.backing
            && (!host.is_multiple_of(PAGE)
                || host.checked_add(self.size).is_none_or(|end| end > USER_END))
        {
            return Err(Errno::EINVAL);
        }
        SlotTable::split(self.slot)?;
        if self.gpa.checked_add(self.size).is_none() || self.size / PAGE > MAX_PAGES {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }
}

impl Vm {
    pub(crate) fn lock_slots(&self) -> MutexGuard<'_, SlotTable> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Safety
    /// The memory at `userspace_addr` must be memory that nothing in this process reaches through
    /// Rust references while the guest may, for as long as the slot exists. It need not be mapped: a
    /// guest's access to it then ends KVM_RUN with EFAULT.
    #[allow(unsafe_code)]
    pub unsafe fn set_user_memory_region(
        &self,
        region: &anykvm_abi::kvm_userspace_memory_region,
    ) -> Result<()> {
        self.set_region(Region {
            slot: region.slot,
            flags: region.flags,
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            backing: Backing::User(region.userspace_addr),
            private: None,
        })
    }

    /// Creates, changes, moves or deletes a slot.
    pub(crate) fn set_region(&self, region: Region) -> Result<()> {
        region.check(self)?;
        let (space, id) = SlotTable::split(region.slot)?;
        let mut table = self.lock_slots();
        if region.size == 0 {
            let old = table.remove(space, id).ok_or(Errno::EINVAL)?;
            self.put_slot_in_force(&mut table, space, Some(&old), None);
            if old.own.is_some() {
                self.discard_own_memory(old.slot.gpa, old.slot.size);
            }
            return Ok(());
        }
        let old = table.spaces[space].get(&id);
        if let Some(old) = old {
            // A slot with private memory can only be deleted.
            if (old.flags | region.flags) & KVM_MEM_GUEST_MEMFD != 0
                || !same_backing(&old.backing, &region.backing)
                || old.slot.size != region.size
                || (old.flags ^ region.flags) & KVM_MEM_READONLY != 0
            {
                return Err(Errno::EINVAL);
            }
            if old.slot.gpa == region.gpa && old.flags == region.flags {
                return Ok(());
            }
        }
        let moved = old.is_none_or(|old| old.slot.gpa != region.gpa);
        // The VM's own memory is laid out by address in the VM's file, so it cannot move.
        if old.is_some() && moved && matches!(region.backing, Backing::Own) {
            return Err(Errno::EINVAL);
        }
        if moved
            && (table.overlaps(space, Some(id), region.gpa, region.size)
                || (space == 0 && table.alias_overlaps(None, region.gpa, region.size)))
        {
            return Err(Errno::EEXIST);
        }
        let own = match (&region.backing, old) {
            (Backing::Own, Some(old)) => old.own.clone(),
            (Backing::Own, None) => Some(self.own_memory(&mut table, region.gpa, region.size)?),
            (Backing::User(_), _) => None,
        };
        let record = self.record(region, own, moved);
        let slot = record.slot.clone();
        let old = table.insert(space, id, record);
        self.put_slot_in_force(&mut table, space, old.as_ref(), Some(slot));
        // What was written through the old slot up to now stays dirty in the new one.
        if let Some(old) = old
            && let Some(log) = &old.slot.dirty
            && let Some(record) = table.spaces[space].get(&id)
        {
            crate::dirty_log::merge(log, 0, &record.slot);
        }
        Ok(())
    }

    /// A slot as asked for. `unused`: no processor has used it where it is.
    fn record(&self, region: Region, own: Option<Arc<Mapping>>, unused: bool) -> Record {
        let id = region.slot & 0xffff;
        let readonly = region.flags & KVM_MEM_READONLY != 0;
        let dirty =
            (region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0).then(|| self.dirty_log(&region, unused));
        let host = match (&own, &region.backing) {
            (Some(mapping), _) => mapping.address(),
            (None, Backing::User(host)) => *host,
            (None, Backing::Own) => 0,
        };
        let place = Place {
            id,
            gpa: region.gpa,
            size: region.size,
            host,
            readonly,
        };
        let slot = Arc::new(place.slot(own.clone(), dirty));
        Record {
            flags: region.flags,
            backing: region.backing,
            own,
            private: region.private,
            slot,
        }
    }

    fn dirty_log(&self, region: &Region, unused: bool) -> DirtyLog {
        let rings = self.dirty_ring_bytes() != 0;
        let mut log = DirtyLog::new(region.size / PAGE, self.initially_dirty() && !rings);
        if unused {
            log = log.of_unused();
        }
        if rings {
            log = log.with_ring(RingName {
                slot: region.slot,
                page: 0,
            });
        }
        log
    }

    /// KVM_DIRTY_LOG_INITIALLY_SET in force.
    fn initially_dirty(&self) -> bool {
        let both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        self.enabled.manual_dirty_log_protect() & u64::from(both) == u64::from(both)
    }

    /// Makes the change of one slot, which the table has already, what the processors see.
    fn put_slot_in_force(
        &self,
        table: &mut SlotTable,
        space: usize,
        old: Option<&Record>,
        new: Option<Arc<Slot>>,
    ) {
        let old = old.map(|r| r.slot.gpa);
        if table.is_plain(space) && self.memory.replace_slot(space, old, new) {
            self.count_change();
        } else {
            self.put_in_force(table, space);
        }
    }

    fn count_change(&self) {
        self.count(VmStat::MemslotChanges);
        self.stats
            .set(VmStat::EngineMemory as usize, self.memory.memory_bytes());
    }

    /// Makes the table what the processors see, aliases included, and waits until they do.
    pub(crate) fn put_in_force(&self, table: &mut SlotTable, space: usize) {
        let old_aliases = if space == 0 {
            table.rebuild_aliases()
        } else {
            Vec::new()
        };
        let Some(map) = MemoryMap::new(table.pieces(space)) else {
            // Overlaps were refused before the table was changed.
            unreachable!("memory slots overlap");
        };
        self.memory.replace(space, map, None);
        for piece in &old_aliases {
            piece.merge_into(table);
        }
        self.count_change();
    }
}

fn same_backing(a: &Backing, b: &Backing) -> bool {
    match (a, b) {
        (Backing::User(a), Backing::User(b)) => a == b,
        (Backing::Own, Backing::Own) => true,
        _ => false,
    }
}

/// Where a piece of memory is, in the guest and here.
pub(crate) struct Place {
    pub id: u32,
    pub gpa: u64,
    pub size: u64,
    pub host: u64,
    pub readonly: bool,
}

impl Place {
    /// The slot there. `own`: the VM's mapping that the memory is in, if it is not the VMM's.
    #[allow(unsafe_code)]
    pub fn slot(self, own: Option<Arc<Mapping>>, dirty: Option<DirtyLog>) -> Slot {
        let Self {
            id,
            gpa,
            size,
            host,
            readonly,
        } = self;
        if let Some(mapping) = own {
            let offset = host - mapping.address();
            if let Some(slot) = Slot::owned(id, gpa, size, mapping, offset, readonly, dirty) {
                return slot;
            }
            unreachable!("a slot is no larger than its mapping");
        }
        // SAFETY: whoever registered the memory vouched for it: a Rust caller by
        // `set_user_memory_region` being unsafe, a program that issues the ioctl as it does to the
        // kernel, which likewise writes to what it is given.
        unsafe { Slot::new(id, gpa, size, host, readonly, dirty) }
    }
}
