//! Decoded blocks: straight-line runs of instructions inside one page.
//!
//! A block is keyed by the host address of its first byte and the mode, so that guest-physical
//! aliases share it. It keeps the bytes it was made from. They are compared with memory again
//! whenever the block is reached by anything but the jump cache, which a TLB flush, a CR3 load, a
//! mode change, a store that hits code anywhere, or a new epoch makes miss; and on every entry while
//! paging is off. That is how writes nobody told us about (device DMA, a debugger) are noticed
//! before a guest can expect them to be.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use crate::decode::Insn;
use crate::memory::PAGE;
use crate::memory::access::HostPage;
use crate::mode::Mode;

/// Most instructions in a block.
pub const MAX_INSNS: usize = 32;
/// Blocks kept before all are dropped.
const MAX_BLOCKS: usize = 1 << 16;
/// Jump-cache entries: `JUMP_SETS` pages' worth of `JUMP_WAYS`.
const JUMP_SETS: usize = 128;
const JUMP_WAYS: usize = 64;
/// Page-crossing instructions kept.
const CROSSINGS: usize = 512;
/// Bits of the filter of pages that code ran from.
const PAGES: u64 = 1 << 15;

/// One block.
#[derive(Debug)]
pub struct Block {
    /// Its instructions. Taken out while the block runs.
    pub insns: Box<[Insn]>,
    /// The bytes it was made from.
    pub bytes: Box<[u8]>,
    /// Host address of the first byte.
    pub host: u64,
    /// For a translator: how often it was interpreted, or what became of it.
    pub heat: u32,
}

/// Where a block is in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockId(u32);

#[derive(Clone, Copy, Debug)]
struct Jump {
    rip: u64,
    key: u64,
    code: u64,
    id: BlockId,
}

const NO_JUMP: Jump = Jump {
    rip: 0,
    key: u64::MAX,
    code: 0,
    id: BlockId(0),
};

/// An instruction that crosses a page, found by RIP alone.
#[derive(Debug)]
struct Crossing {
    rip: u64,
    key: u64,
    code: u64,
    insn: Insn,
}

/// A fast hash of addresses.
#[derive(Debug, Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64((*b).into());
        }
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(n.into());
    }
}

/// All blocks of one processor.
#[derive(Debug)]
pub struct BlockCache {
    blocks: Vec<Block>,
    by_address: HashMap<(u64, u32), BlockId, BuildHasherDefault<Mix>>,
    jumps: Box<[[Jump; JUMP_WAYS]; JUMP_SETS]>,
    crossings: Box<[Option<Crossing>]>,
    /// Mode, address space and epoch: what must be the same for a jump-cache entry to be good.
    key: u64,
    epoch: u32,
    /// How often every jump-cache entry was voided.
    flushes: u64,
    /// The linear pages that something was remembered for since then.
    pages: HashSet<u64, BuildHasherDefault<Mix>>,
    /// Their hashes, because most pages that are asked for are none of them.
    filter: Box<[u64]>,
    /// Bytes behind the blocks.
    behind: usize,
}

/// Bytes of memory behind a block.
fn behind(block: &Block) -> usize {
    size_of_val(&*block.insns) + block.bytes.len()
}

impl Default for BlockCache {
    fn default() -> Self {
        Self {
            blocks: Vec::new(),
            by_address: HashMap::default(),
            jumps: Box::new([[NO_JUMP; JUMP_WAYS]; JUMP_SETS]),
            crossings: (0..CROSSINGS).map(|_| None).collect(),
            key: 0,
            epoch: 0,
            flushes: 0,
            pages: HashSet::default(),
            filter: vec![0; PAGES as usize / 64].into_boxed_slice(),
            behind: 0,
        }
    }
}

/// Where a linear page is in the filter: word and bit.
fn page_bit(linear: u64) -> (usize, u64) {
    let hash = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    ((hash / 64 % (PAGES / 64)) as usize, 1 << (hash % 64))
}

fn slot(rip: u64) -> (usize, usize) {
    let page = rip >> 12;
    (
        (page ^ page >> 7) as usize % JUMP_SETS,
        (rip ^ rip >> 6) as usize % JUMP_WAYS,
    )
}

fn crossing_slot(rip: u64) -> usize {
    (rip >> 12) as usize % CROSSINGS
}

impl BlockCache {
    /// The mode or the address space changed. `space` is the address space's number, or 0 if what is
    /// found holds in all of them.
    pub fn set_mode(&mut self, mode: Mode, space: u64) {
        self.key =
            u64::from(self.epoch) << 32 | space << 16 | u64::from(mode.bits_packed() & 0xffff);
    }
    /// Mode, address space and epoch as one word.
    pub fn key(&self) -> u64 {
        self.key
    }
    /// How often everything that was found by a linear address was voided.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }
    /// Every jump-cache entry is void.
    pub fn forget_jumps(&mut self) {
        self.flushes += 1;
        self.pages.clear();
        self.filter.fill(0);
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == u32::MAX {
            self.epoch = 0;
            self.jumps.fill([NO_JUMP; JUMP_WAYS]);
        }
        self.key = self.key & 0xffff_ffff | u64::from(self.epoch) << 32;
    }
    /// What rests on the translation of one page is void (INVLPG). Most often it holds data, and there is
    /// nothing.
    pub fn forget_jumps_of_page(&mut self, linear: u64) {
        let (word, bit) = page_bit(linear);
        if self.filter[word] & bit != 0 && self.pages.contains(&(linear >> 12)) {
            self.forget_jumps();
        }
    }
    /// A page-crossing instruction at RIP, which is its linear address, too, is about to run, and may then
    /// be remembered under this key.
    pub fn note_crossing(&mut self, rip: u64) -> u64 {
        self.note_page(rip);
        self.note_page(rip.wrapping_add(PAGE));
        self.key
    }
    /// Something found in this page is about to be remembered by its linear address.
    pub fn note_page(&mut self, linear: u64) {
        let (word, bit) = page_bit(linear);
        self.filter[word] |= bit;
        self.pages.insert(linear >> 12);
    }
    /// The block at this address, if nothing that could have changed it has happened since.
    #[inline(always)]
    pub fn jump(&self, rip: u64, code: u64) -> Option<BlockId> {
        let (s, w) = slot(rip);
        let j = &self.jumps[s][w];
        (j.rip == rip && j.key == self.key && j.code == code).then_some(j.id)
    }
    /// Remembers a checked block. RIP is its linear address, too.
    pub fn remember(&mut self, rip: u64, code: u64, id: BlockId) {
        self.note_page(rip);
        let (s, w) = slot(rip);
        self.jumps[s][w] = Jump {
            rip,
            key: self.key,
            code,
            id,
        };
    }
    /// Whether the page-crossing instruction at this address is known and still good.
    pub fn has_crossing(&self, rip: u64, code: u64) -> bool {
        let c = &self.crossings[crossing_slot(rip)];
        c.as_ref()
            .is_some_and(|c| c.rip == rip && c.key == self.key && c.code == code)
    }
    /// Takes it out, to be put back when it has run.
    pub fn take_crossing(&mut self, rip: u64, code: u64) -> Option<Insn> {
        if !self.has_crossing(rip, code) {
            return None;
        }
        self.crossings[crossing_slot(rip)].take().map(|c| c.insn)
    }
    /// Remembers a page-crossing instruction, for which [`BlockCache::note_crossing`] gave the key.
    pub fn put_crossing(&mut self, rip: u64, key: u64, code: u64, insn: Insn) {
        self.crossings[crossing_slot(rip)] = Some(Crossing {
            rip,
            key,
            code,
            insn,
        });
    }
    /// Bytes of memory that the cache takes.
    pub fn memory(&self) -> usize {
        self.behind
            + self.blocks.capacity() * size_of::<Block>()
            + self.by_address.capacity() * size_of::<((u64, u32), BlockId)>()
            + size_of_val(&*self.jumps)
            + size_of_val(&*self.crossings)
            + self.pages.capacity() * size_of::<u64>()
            + size_of_val(&*self.filter)
    }
    /// The block made from this host address in this mode.
    pub fn find(&self, host: u64, mode: Mode) -> Option<BlockId> {
        self.by_address.get(&(host, mode.bits_packed())).copied()
    }
    /// A block.
    #[inline(always)]
    pub fn get(&mut self, id: BlockId) -> Option<&mut Block> {
        self.blocks.get_mut(id.0 as usize)
    }
    /// Whether the bytes a block was made from are still in memory, where the processor still holds
    /// the map that the block was found by.
    pub fn matches_memory(&self, id: BlockId) -> bool {
        self.blocks.get(id.0 as usize).is_some_and(|b| {
            HostPage(b.host & !(PAGE - 1)).matches((b.host % PAGE) as usize, &b.bytes)
        })
    }
    /// Adds a block, or replaces the one with the same key.
    pub fn insert(&mut self, block: Block, mode: Mode) -> BlockId {
        if self.blocks.len() >= MAX_BLOCKS {
            self.blocks.clear();
            self.by_address.clear();
            self.behind = 0;
            self.forget_jumps();
        }
        self.behind += behind(&block);
        let key = (block.host, mode.bits_packed());
        if let Some(id) = self.by_address.get(&key).copied()
            && let Some(old) = self.blocks.get_mut(id.0 as usize)
        {
            // A block that is running right now has lent its instructions out.
            self.behind = self.behind.saturating_sub(behind(old));
            *old = block;
            return id;
        }
        let id = BlockId(self.blocks.len() as u32);
        self.blocks.push(block);
        self.by_address.insert(key, id);
        id
    }
}
