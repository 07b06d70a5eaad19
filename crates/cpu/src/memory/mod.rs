//! Guest RAM: memory slots, the guest-physical map, dirty logging, and the protocol by which a
//! change of them waits for the processors that still use the old view.
//!
//! The map is an immutable snapshot ([`MemoryMap`]) behind an [`ArcSwap`]; a processor holds the
//! snapshot it runs with and lets go of it when it acknowledges a request ([`Participant`]).
//!
//! This module and its children are the only place that touches guest RAM through raw pointers.

pub mod access;
pub mod dirty;
pub(crate) mod elements;
pub mod fault;
mod map;
pub mod mapping;
pub mod pages;
pub(crate) mod wide;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, Weak};

use arc_swap::ArcSwap;

use crate::requests::{self, Requests};
pub use dirty::DirtyLog;
pub use map::MemoryMap;
use mapping::Mapping;
use pages::HostPages;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// One memory slot (`struct kvm_userspace_memory_region`).
#[derive(Debug)]
pub struct Slot {
    /// Slot number, without the address space.
    pub id: u32,
    /// First guest-physical address; page-aligned.
    pub gpa: u64,
    /// Bytes; a multiple of the page size, not 0.
    pub size: u64,
    /// Guest stores are MMIO exits (`KVM_MEM_READONLY`).
    pub readonly: bool,
    /// One bit a page that was written, when dirty logging is on (`KVM_MEM_LOG_DIRTY_PAGES`).
    pub dirty: Option<DirtyLog>,
    host: u64,
    /// Keeps memory the slot owns (KVM_SET_MEMORY_REGION) mapped.
    _owner: Option<Arc<Mapping>>,
}

impl Slot {
    /// A slot over memory at `host` in this process.
    ///
    /// # Safety
    /// `host..host + size` must be memory that nothing in this process reaches through Rust
    /// references, for as long as the slot is in a map or a processor may still use that map. If it
    /// is not mapped, an access ends the run with [`crate::Exit::BadMemory`] (provided
    /// [`fault::handle`] is called by the SIGSEGV handler).
    pub unsafe fn new(
        id: u32,
        gpa: u64,
        size: u64,
        host: u64,
        readonly: bool,
        dirty: Option<DirtyLog>,
    ) -> Self {
        Self {
            id,
            gpa,
            size,
            readonly,
            dirty,
            host,
            _owner: None,
        }
    }

    /// A slot over memory that it keeps mapped itself, from `offset` in the mapping.
    pub fn owned(
        id: u32,
        gpa: u64,
        size: u64,
        mapping: Arc<Mapping>,
        offset: u64,
        readonly: bool,
        dirty: Option<DirtyLog>,
    ) -> Option<Self> {
        if offset.checked_add(size)? > mapping.len() as u64 {
            return None;
        }
        let host = mapping.address() + offset;
        Some(Self {
            id,
            gpa,
            size,
            readonly,
            dirty,
            host,
            _owner: Some(mapping),
        })
    }

    /// Address in this process of the slot's first byte.
    pub fn host(&self) -> u64 {
        self.host
    }

    fn contains(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.gpa) < self.size
    }

    /// The first address behind it.
    fn end(&self) -> u64 {
        self.gpa + self.size
    }

    /// Bytes that its description takes.
    fn memory(&self) -> usize {
        size_of::<Self>() + self.dirty.as_ref().map_or(0, DirtyLog::memory)
    }

    /// Notes that the page with this address was written.
    #[inline]
    pub fn mark_dirty(&self, gpa: u64) {
        if let Some(log) = &self.dirty {
            log.mark((gpa - self.gpa) / PAGE);
        }
    }

    /// Notes that a processor uses the page with this address, as far as that makes it dirty.
    #[inline]
    pub fn mark_used(&self, gpa: u64) {
        if let Some(log) = &self.dirty
            && !self.readonly
        {
            log.mark_used((gpa - self.gpa) / PAGE);
        }
    }
}

/// A processor's side of the acknowledgement protocol.
#[derive(Debug)]
pub struct Participant {
    requests: Arc<Requests>,
    /// It may use its snapshot and TLB without looking at requests.
    in_guest: AtomicBool,
    /// The last synchronisation it has acted on.
    seen: AtomicU64,
}

/// All guest memory of one VM: two address spaces (normal and SMM).
#[derive(Debug)]
pub struct GuestMemory {
    maps: [ArcSwap<MemoryMap>; 2],
    pages: HostPages,
    epoch: AtomicU64,
    participants: Mutex<Vec<Weak<Participant>>>,
    /// Held for reading by whoever uses a map outside of a processor's run loop.
    accesses: RwLock<()>,
}

impl Default for GuestMemory {
    fn default() -> Self {
        Self::new()
    }
}

/// An access to guest-physical memory that is not RAM (or is read-only, for a write).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest-physical address {0:#x} is not RAM")]
pub struct NotRam(pub u64);

impl GuestMemory {
    /// No slots.
    pub fn new() -> Self {
        Self {
            maps: [
                ArcSwap::from_pointee(MemoryMap::default()),
                ArcSwap::from_pointee(MemoryMap::default()),
            ],
            pages: HostPages::default(),
            epoch: AtomicU64::new(0),
            participants: Mutex::new(Vec::new()),
            accesses: RwLock::new(()),
        }
    }

    /// The current map of an address space (0, or 1: SMM).
    pub fn map(&self, space: usize) -> Arc<MemoryMap> {
        self.maps[space & 1].load_full()
    }

    /// Puts a new map in force and waits until nobody uses the old one, so that a store from now on is
    /// logged as the new one says. `me`: the calling processor's own participant, if the caller is one.
    pub fn replace(&self, space: usize, map: MemoryMap, me: Option<&Participant>) {
        for s in map.slots() {
            self.pages.cover(s.host, s.size);
        }
        self.put_in_force(space, map, me);
    }

    /// The same with a map in which one slot is missing (the one that begins at `old`), new, or replaced. False,
    /// and nothing is changed, if there is none at `old` or the new one overlaps another.
    pub fn replace_slot(&self, space: usize, old: Option<u64>, new: Option<Arc<Slot>>) -> bool {
        if let Some(new) = &new {
            self.pages.cover(new.host, new.size);
        }
        let Some(map) = self.map(space).changed(old, new) else {
            return false;
        };
        self.put_in_force(space, map, None);
        true
    }

    fn put_in_force(&self, space: usize, map: MemoryMap, me: Option<&Participant>) {
        self.maps[space & 1].store(Arc::new(map));
        drop(self.accesses.write().unwrap_or_else(|e| e.into_inner()));
        if let Some(me) = me {
            me.requests.set(requests::MEMSLOTS);
        }
        self.synchronise(requests::MEMSLOTS, me);
    }

    /// Bytes of memory that the guest's memory takes beside itself: records of pages, slots and their dirty
    /// logs.
    pub fn memory_bytes(&self) -> u64 {
        let maps = [0, 1].map(|space| self.maps[space].load().memory());
        (self.pages.memory() + maps[0] + maps[1]) as u64
    }

    /// Per-page records of code, by host page.
    pub fn pages(&self) -> &HostPages {
        &self.pages
    }

    /// Registers a processor.
    pub fn join(&self, requests: Arc<Requests>) -> Arc<Participant> {
        let p = Arc::new(Participant {
            requests,
            in_guest: AtomicBool::new(false),
            seen: AtomicU64::new(0),
        });
        let mut all = self.participants.lock().unwrap_or_else(|e| e.into_inner());
        all.retain(|p| p.strong_count() > 0);
        all.push(Arc::downgrade(&p));
        p
    }

    /// Sets request bits on every other processor and waits until each has acted on them or is
    /// outside the run loop. A processor that waits here itself counts as outside, so that two
    /// cannot wait for each other; its own requests are then to be handled before it goes on.
    pub fn synchronise(&self, bits: u32, me: Option<&Participant>) {
        let epoch = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        let others: Vec<Arc<Participant>> = {
            let all = self.participants.lock().unwrap_or_else(|e| e.into_inner());
            all.iter()
                .filter_map(Weak::upgrade)
                .filter(|p| me.is_none_or(|m| !std::ptr::eq(m, &**p)))
                .collect()
        };
        if others.is_empty() {
            return;
        }
        for p in &others {
            p.requests.set(bits);
        }
        let was_in = me.map(|m| m.in_guest.swap(false, Ordering::SeqCst));
        for p in &others {
            let mut spins = 0u32;
            while p.in_guest.load(Ordering::SeqCst) && p.seen.load(Ordering::SeqCst) < epoch {
                spins += 1;
                if spins < 200 {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
        }
        if let (Some(m), Some(true)) = (me, was_in) {
            m.in_guest.store(true, Ordering::SeqCst);
        }
    }

    /// The epoch to acknowledge: read it before acting on requests, [`Participant::acknowledge`] it
    /// afterwards.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// While it lives the maps that there are stay in use.
    pub(crate) fn access(&self) -> RwLockReadGuard<'_, ()> {
        self.accesses.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Reads guest-physical memory for a device or a paravirtual interface.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), NotRam> {
        self.pieces(gpa, buf.len(), |slot, at, range| {
            access::copy_from_guest(&mut buf[range], slot.host + (at - slot.gpa));
            Ok(())
        })
    }

    /// Writes guest-physical memory for a device or a paravirtual interface: marks it dirty and
    /// invalidates code made from it.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), NotRam> {
        self.pieces(gpa, data.len(), |slot, at, range| {
            if slot.readonly {
                return Err(NotRam(at));
            }
            let host = slot.host + (at - slot.gpa);
            let len = range.len();
            access::copy_to_guest(host, &data[range]);
            // Its fence also stands between the data and the look at the dirty bit: whoever takes the bit
            // sees the data, or the bit is set again.
            self.pages.stored(host, len);
            slot.mark_dirty(at);
            Ok(())
        })
    }

    /// Replaces a byte that the guest, too, changes by locked instructions; what was there. Otherwise as
    /// [`Self::write`].
    pub fn exchange(&self, gpa: u64, value: u8) -> Result<u8, NotRam> {
        let mut found = 0;
        self.pieces(gpa, 1, |slot, at, _| {
            if slot.readonly {
                return Err(NotRam(at));
            }
            let host = slot.host + (at - slot.gpa);
            found = access::exchange(host, value);
            self.pages.stored(host, 1);
            slot.mark_dirty(at);
            Ok(())
        })?;
        Ok(found)
    }

    fn pieces(
        &self,
        gpa: u64,
        len: usize,
        mut each: impl FnMut(&Slot, u64, std::ops::Range<usize>) -> Result<(), NotRam>,
    ) -> Result<(), NotRam> {
        let _access = self.access();
        let map = self.maps[0].load();
        let mut done = 0;
        while done < len {
            let at = gpa.wrapping_add(done as u64);
            let slot = map.find(at).ok_or(NotRam(at))?;
            let n = (len - done).min((PAGE - at % PAGE) as usize);
            each(slot, at, done..done + n)?;
            done += n;
        }
        Ok(())
    }
}

impl Participant {
    /// The processor enters the run loop; returns true if it must act on requests first.
    pub fn enter(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }
    /// The processor leaves the run loop.
    pub fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }
    /// The processor has acted on all requests up to this epoch.
    pub fn acknowledge(&self, epoch: u64) {
        self.seen.store(epoch, Ordering::SeqCst);
    }
}
