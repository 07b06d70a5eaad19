//! What is known of each host page that holds guest RAM: whether decoded (or translated) code was
//! made from it, and where.
//!
//! Records are keyed by host page, so that guest-physical aliases of one page share one record. A
//! page with code has no fast write entry in any TLB; stores to it come through [`HostPages::stored`],
//! which, when they hit code, unmark the page and advance the epoch: whatever was found before is
//! compared with memory again, and marks the page anew.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

const LEAF_BITS: u32 = 11;
const MID_BITS: u32 = 12;
const ROOT_BITS: u32 = 12;

/// The record of one page.
#[derive(Debug, Default)]
pub struct PageRecord {
    /// One bit for each 64 bytes that code was made from.
    code: AtomicU64,
}

impl PageRecord {
    /// Whether code was made from the page (it must have no fast write entry).
    #[inline(always)]
    pub fn has_code(&self) -> bool {
        self.code.load(Ordering::SeqCst) != 0
    }
    /// Notes that code is about to be made from these bytes. True if the page had none before: then
    /// every processor's fast write entries for it must go before the bytes are read.
    pub fn mark_code(&self, offset: usize, len: usize) -> bool {
        let bits = granules(offset, len);
        if self.code.load(Ordering::SeqCst) & bits == bits {
            return false;
        }
        self.code.fetch_or(bits, Ordering::SeqCst) == 0
    }
    /// Notes a store. True if it hit code (which is then no longer marked).
    fn store(&self, offset: usize, len: usize) -> bool {
        let code = self.code.load(Ordering::SeqCst);
        if code & granules(offset, len) == 0 {
            return false;
        }
        self.code.store(0, Ordering::SeqCst);
        true
    }
}

fn granules(offset: usize, len: usize) -> u64 {
    let first = (offset & 4095) / 64;
    let last = ((offset & 4095) + len.max(1) - 1).min(4095) / 64;
    (u64::MAX >> (63 - (last - first))) << first
}

type Leaf = Box<[PageRecord]>;
type Mid = Box<[OnceLock<Leaf>]>;

/// Records of all pages under a VM's slots: a radix tree by host page number, grown when a slot is
/// added, read without locks.
#[derive(Debug)]
pub struct HostPages {
    root: Box<[OnceLock<Mid>]>,
    /// Bytes of the tree.
    memory: AtomicUsize,
    /// Incremented by every store that hits code, on any page.
    epoch: AtomicU64,
}

impl Default for HostPages {
    fn default() -> Self {
        let root: Box<[_]> = (0..1 << ROOT_BITS).map(|_| OnceLock::new()).collect();
        Self {
            memory: AtomicUsize::new(size_of_val(&*root)),
            root,
            epoch: AtomicU64::new(0),
        }
    }
}

fn split(host: u64) -> (usize, usize, usize) {
    let n = host >> 12;
    (
        (n >> (LEAF_BITS + MID_BITS)) as usize & ((1 << ROOT_BITS) - 1),
        (n >> LEAF_BITS) as usize & ((1 << MID_BITS) - 1),
        n as usize & ((1 << LEAF_BITS) - 1),
    )
}

impl HostPages {
    /// Makes records for a range.
    pub fn cover(&self, host: u64, size: u64) {
        let step = 1u64 << (12 + LEAF_BITS);
        let mut at = host & !(step - 1);
        while at < host.saturating_add(size) {
            let (r, m, _) = split(at);
            let mid = self.root[r].get_or_init(|| self.allocate(MID_BITS));
            mid[m].get_or_init(|| self.allocate(LEAF_BITS));
            at += step;
        }
    }
    fn allocate<T: Default>(&self, bits: u32) -> Box<[T]> {
        let node: Box<[T]> = (0..1 << bits).map(|_| T::default()).collect();
        self.memory
            .fetch_add(size_of_val(&*node), Ordering::Relaxed);
        node
    }
    /// Bytes of memory that the records take.
    pub fn memory(&self) -> usize {
        self.memory.load(Ordering::Relaxed)
    }
    /// The record of the page that holds this host address.
    #[inline]
    pub fn get(&self, host: u64) -> Option<&PageRecord> {
        let (r, m, l) = split(host);
        self.root.get(r)?.get()?.get(m)?.get()?.get(l)
    }
    /// Notes a store of `len` bytes inside one page. True if it hit code.
    #[inline]
    pub fn stored(&self, host: u64, len: usize) -> bool {
        // The store must be visible before the record is looked at: a processor that marks the page
        // and then reads its bytes sees either the store's data or the epoch it advances.
        fence(Ordering::SeqCst);
        let hit = self
            .get(host)
            .is_some_and(|p| p.has_code() && p.store((host & 4095) as usize, len));
        if hit {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
        hit
    }
    /// Changes whenever a store has hit code on any page.
    #[inline(always)]
    pub fn code_epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }
    /// Where that is.
    pub fn code_epoch_counter(&self) -> *const AtomicU64 {
        &raw const self.epoch
    }
}
