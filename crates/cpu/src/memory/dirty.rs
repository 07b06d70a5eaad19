//! Which pages of a slot were written: one bit a page ([`DirtyLog`]; KVM API, section 4.8), or a ring of
//! their numbers for each processor ([`DirtyRing`]; section 8.29, KVM_CAP_DIRTY_LOG_RING).
//!
//! A page is noted before the first store to it; then the processors get fast write entries for it and the
//! following stores cost nothing. Whoever clears a bit makes all processors drop those entries before
//! anybody reads the page ([`super::GuestMemory::synchronise`]).
//!
//! With rings the bits say which pages are in a ring and not reset yet, so that a page is in one once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};

use super::mapping::Mapping;
use crate::requests::{OWNER, Requests};

type Bits = Box<[AtomicU64]>;

fn bits(pages: u64) -> Bits {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

/// Sets a page's bit; true if it was clear.
#[inline]
fn set(bits: &[AtomicU64], page: u64) -> bool {
    let Some(word) = bits.get((page / 64) as usize) else {
        return false;
    };
    let bit = 1 << (page % 64);
    word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::SeqCst) & bit == 0
}

/// What a slot's first page is called in dirty rings.
#[derive(Clone, Copy, Debug)]
pub struct RingName {
    /// Slot number, with the address space in the upper 16 bits.
    pub slot: u32,
    /// The page's number in that slot.
    pub page: u64,
}

/// The log of one slot.
#[derive(Debug)]
pub struct DirtyLog {
    /// Pages that were written.
    dirty: Bits,
    /// Pages that a processor has used since the slot was made.
    used: Option<Bits>,
    ring: Option<RingName>,
}

impl DirtyLog {
    /// Bytes of memory that it takes.
    pub fn memory(&self) -> usize {
        let used = self.used.as_deref().unwrap_or_default();
        size_of_val(&*self.dirty) + size_of_val(used)
    }
    /// All clear, or (`KVM_DIRTY_LOG_INITIALLY_SET`) all set.
    pub fn new(pages: u64, initially_set: bool) -> Self {
        let mut dirty = bits(pages);
        if initially_set {
            for word in &mut dirty {
                *word.get_mut() = u64::MAX;
            }
            if !pages.is_multiple_of(64)
                && let Some(last) = dirty.last_mut()
            {
                *last.get_mut() = (1 << (pages % 64)) - 1;
            }
        }
        Self {
            dirty,
            used: None,
            ring: None,
        }
    }

    /// Of a slot that no processor has used: the first use of a page counts as a write. KVM maps a page
    /// writable if it may, whatever the access is, and a page that becomes writable is dirty (Linux:
    /// `make_spte`).
    pub fn of_unused(self) -> Self {
        let words = self.dirty.len() as u64;
        Self {
            used: Some(bits(words * 64)),
            ..self
        }
    }

    /// A log of its own for a window of so many pages, from this page on.
    pub fn for_window(&self, pages: u64, first: u64) -> Self {
        let log = Self::new(pages, false);
        let log = match self.used {
            Some(_) => log.of_unused(),
            None => log,
        };
        match self.ring {
            Some(RingName { slot, page }) => log.with_ring(RingName {
                slot,
                page: page + first,
            }),
            None => log,
        }
    }

    /// Pages that become dirty are put into the ring of the processor that did it.
    pub fn with_ring(self, name: RingName) -> Self {
        Self {
            ring: Some(name),
            ..self
        }
    }

    /// Notes a page that was written, or is about to be.
    #[inline]
    pub fn mark(&self, page: u64) {
        if set(&self.dirty, page)
            && let Some(name) = self.ring
        {
            push_into_running(name.slot, name.page + page);
        }
    }

    /// Notes a page that a processor uses.
    #[inline]
    pub fn mark_used(&self, page: u64) {
        if let Some(used) = &self.used
            && set(used, page)
        {
            self.mark(page);
        }
    }

    /// Takes over a bit of another log of the same memory. Where there are rings, the page is in one.
    pub fn inherit(&self, page: u64) {
        set(&self.dirty, page);
    }

    /// Forgets that a page was written.
    pub fn clear(&self, page: u64) {
        if let Some(word) = self.dirty.get((page / 64) as usize) {
            word.fetch_and(!(1 << (page % 64)), Ordering::SeqCst);
        }
    }

    /// The pages that were written, one bit each, least significant bit first.
    pub fn words(&self) -> &[AtomicU64] {
        &self.dirty
    }
}

/// `struct kvm_dirty_gfn`: its size and where its fields are.
const ENTRY: usize = 16;
const FLAGS: usize = 0;
const SLOT: usize = 4;
const OFFSET: usize = 8;
/// KVM_DIRTY_GFN_F_DIRTY: the entry is valid.
pub const F_DIRTY: u32 = 1 << 0;
/// KVM_DIRTY_GFN_F_RESET: it has been collected.
pub const F_RESET: u32 = 1 << 1;

/// Entries kept free for what one entry of the guest may still add (KVM_DIRTY_RING_RSVD_ENTRIES).
pub const RESERVED_ENTRIES: u32 = 64;

/// The ring of one processor. Its entries are shared with the VMM, which marks those it has collected.
#[derive(Debug)]
pub struct DirtyRing {
    entries: Mapping,
    size: u32,
    indices: Mutex<Indices>,
    /// Entries that are not reset yet.
    used: AtomicU32,
    requests: Arc<Requests>,
}

#[derive(Debug, Default)]
struct Indices {
    /// The next entry to be made dirty, and to be reset; they wrap.
    dirty: u32,
    reset: u32,
    /// Pages that there was no room for. One instruction can touch more than the reserved entries hold.
    waiting: VecDeque<(u32, u64)>,
}

impl DirtyRing {
    /// A ring in this memory, whose size is a power of two. `requests`: of its processor, which is asked
    /// to leave the guest when the ring is nearly full.
    pub fn new(entries: Mapping, requests: Arc<Requests>) -> Self {
        Self {
            size: (entries.len() / ENTRY) as u32,
            entries,
            indices: Mutex::default(),
            used: AtomicU32::new(0),
            requests,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Indices> {
        self.indices.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn at(&self, index: u32) -> usize {
        (index & (self.size - 1)) as usize * ENTRY
    }

    /// Whether the processor must not enter the guest (KVM_EXIT_DIRTY_RING_FULL).
    pub fn soft_full(&self) -> bool {
        self.used.load(Ordering::SeqCst) >= self.size.saturating_sub(RESERVED_ENTRIES)
    }

    /// Adds a page.
    fn push(&self, slot: u32, page: u64) {
        let mut indices = self.lock();
        if indices.dirty.wrapping_sub(indices.reset) >= self.size {
            indices.waiting.push_back((slot, page));
        } else {
            self.write(&mut indices, slot, page);
        }
        drop(indices);
        if self.soft_full() {
            self.requests.set(OWNER);
        }
    }

    fn write(&self, indices: &mut Indices, slot: u32, page: u64) {
        let at = self.at(indices.dirty);
        self.entries.write(at + SLOT, slot);
        self.entries.write(at + OFFSET, page);
        // The VMM reads the flags first, and the rest if they say so.
        fence(Ordering::Release);
        self.entries.write(at + FLAGS, F_DIRTY);
        indices.dirty = indices.dirty.wrapping_add(1);
        self.count(indices);
    }

    fn count(&self, indices: &Indices) {
        let used = indices.dirty.wrapping_sub(indices.reset);
        self.used.store(used, Ordering::SeqCst);
    }

    /// Frees the entries that the VMM has collected, in order up to the first that it has not, and calls
    /// `forget` with slot number and page of each; how many.
    pub fn reset(&self, mut forget: impl FnMut(u32, u64)) -> u32 {
        let mut indices = self.lock();
        let mut count = 0;
        while indices.reset != indices.dirty {
            let at = self.at(indices.reset);
            if self.entries.read::<u32>(at + FLAGS) & F_RESET == 0 {
                break;
            }
            fence(Ordering::Acquire);
            let (slot, page) = (self.entries.read(at + SLOT), self.entries.read(at + OFFSET));
            self.entries.write(at + FLAGS, 0u32);
            forget(slot, page);
            indices.reset = indices.reset.wrapping_add(1);
            count += 1;
        }
        self.count(&indices);
        while indices.dirty.wrapping_sub(indices.reset) < self.size
            && let Some((slot, page)) = indices.waiting.pop_front()
        {
            self.write(&mut indices, slot, page);
        }
        count
    }
}

thread_local! {
    /// The ring of the processor that this thread runs, or whose state it reads or changes.
    static RUNNING: RefCell<Option<Arc<DirtyRing>>> = const { RefCell::new(None) };
}

/// While it lives, pages that this thread makes dirty go into a ring (Linux: `kvm_get_running_vcpu`).
#[derive(Debug)]
pub struct Running {
    before: Option<Arc<DirtyRing>>,
}

impl Running {
    /// From now on it is this one.
    pub fn new(ring: Arc<DirtyRing>) -> Self {
        Self {
            before: RUNNING.replace(Some(ring)),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(self.before.take());
    }
}

#[cold]
fn push_into_running(slot: u32, page: u64) {
    RUNNING.with_borrow(|ring| match ring {
        Some(ring) => ring.push(slot, page),
        // All guest memory is written in the name of a processor.
        None => debug_assert!(false, "guest memory was written without a processor"),
    });
}
