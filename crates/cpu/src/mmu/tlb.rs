//! The software TLB.
//!
//! Level 1 is direct-mapped and what every access looks at: an entry is good for a read (write) if
//! its read (write) tag equals the page of the access's last byte with the current address-space
//! number in the low bits, and then `addend + linear address` is the host address. Because the entry
//! is chosen by the first byte's page and compared with the last byte's, an access that crosses a
//! page never hits. There is one set of entries for each privilege an access can have ([`Set`]).
//!
//! Level 2 remembers what page walks found (4 KiB pieces of larger pages too), so that a level-1
//! miss rarely walks.
//!
//! Address spaces are told apart by a small number (ASN) given out for each PCID; a CR3 load that
//! flushes takes a fresh number instead of clearing anything. Number [`GLOBAL`] marks global pages
//! in level 2.

use super::Page;
use super::ready::{READY, Ready};

/// Entries of one level-1 set.
const L1: usize = 1024;
/// Entries of level 2.
const L2: usize = 8192;
/// Level-1 entries that are remembered to rest on a protection key.
const KEYED: usize = 256;
/// Entries for instruction fetch.
const EXEC: usize = 1024;
/// Instruction entries that are dropped one by one.
const FEW: usize = 64;
/// A tag nothing compares equal to.
pub(super) const INVALID: u64 = u64::MAX;
/// The number of global pages.
pub(super) const GLOBAL: u64 = 0xffe;
/// The largest ordinary number.
const LAST_ASN: u64 = 0xffd;

/// Which level-1 entries an access uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Set {
    /// CPL 0-2 without RFLAGS.AC, and implicit supervisor accesses.
    #[default]
    Supervisor = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0-2 with RFLAGS.AC and CR4.SMAP: user pages are accessible.
    SupervisorAc = 2,
    /// Every access takes the slow path (alignment checking is on): never filled.
    Slow = 3,
}

/// One level-1 entry.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    pub(super) read: u64,
    pub(super) write: u64,
    pub(super) addend: u64,
    /// Only in [`Ready`]: what it rests on.
    pub(super) counts: u64,
}

/// The layout that translated code relies on.
pub mod layout {
    use super::{Entry, GLOBAL, INVALID, L1, READY};
    use std::mem::offset_of;

    /// An entry's offset from the set's beginning is `(linear address >> SHIFT) & MASK`.
    pub const SHIFT: u32 = 12 - size_of::<Entry>().trailing_zeros();
    /// See [`SHIFT`].
    pub const MASK: u32 = ((L1 - 1) * size_of::<Entry>()) as u32;
    /// Offset of the read tag.
    pub const READ: i64 = offset_of!(Entry, read) as i64;
    /// Offset of the write tag.
    pub const WRITE: i64 = offset_of!(Entry, write) as i64;
    /// Offset of the addend.
    pub const ADDEND: i64 = offset_of!(Entry, addend) as i64;
    /// The same as [`MASK`] for the entries behind level 1.
    pub const READY_MASK: u32 = ((READY - 1) * size_of::<Entry>()) as u32;
    /// Offset, there, of the counts that an entry rests on, of 32 bits each: for writes, and for all.
    pub const COUNTS: i64 = offset_of!(Entry, counts) as i64;
    /// The number of global pages, there.
    pub const EVERYWHERE: u32 = GLOBAL as u32;
    /// A tag nothing compares equal to; sign-extended.
    pub const NO_TAG: i32 = INVALID as i32;
}

const EMPTY: Entry = Entry {
    read: INVALID,
    write: INVALID,
    addend: 0,
    counts: 0,
};

/// A level-1 entry that holds a page with a protection key, or did.
#[derive(Clone, Copy, Debug)]
struct Keyed {
    set: u8,
    index: u16,
    key: u8,
}

/// One instruction-fetch entry.
#[derive(Clone, Copy, Debug)]
struct ExecEntry {
    /// The page with the address-space number, or with [`GLOBAL`].
    tag: u64,
    host: u64,
    /// See [`Tlb::note_exec`].
    note: u64,
}

#[derive(Clone, Copy, Debug)]
struct Walked {
    tag: u64,
    page: Page,
}

/// The TLB of one processor.
#[derive(Debug)]
pub struct Tlb {
    l1: Box<[[Entry; L1]; 4]>,
    ready: Ready,
    l2: Box<[Walked]>,
    exec: Box<[[ExecEntry; EXEC]; 2]>,
    /// Which instruction entries were filled since they were dropped, while they are few.
    exec_filled: Vec<(u8, u16)>,
    /// Entries of level 1 whose page has a key other than 0, so that a change of PKRU need not drop
    /// the others. Once it is full it no longer names all of them.
    keyed: Vec<Keyed>,
    /// Current set for data accesses of the running code.
    pub set: Set,
    asn: u64,
    next_asn: u64,
    used_up: bool,
    by_pcid: Box<[u16; 4096]>,
    /// Bloom filters of 2 MiB and 1 GiB regions that hold pieces of large pages.
    large: [u64; 64],
    huge: [u64; 4],
    /// How often level-1 entries were dropped.
    drops: u64,
    /// Counts refills from level 2 and walks, for the statistics.
    pub l2_hits: u64,
    /// See `l2_hits`.
    pub walks: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        let mut by_pcid = Box::new([0; 4096]);
        by_pcid[0] = 1;
        Self {
            l1: Box::new([[EMPTY; L1]; 4]),
            ready: Ready::default(),
            l2: vec![
                Walked {
                    tag: INVALID,
                    page: Page::default()
                };
                L2
            ]
            .into_boxed_slice(),
            exec_filled: Vec::with_capacity(FEW),
            exec: Box::new(
                [[ExecEntry {
                    tag: INVALID,
                    host: 0,
                    note: 0,
                }; EXEC]; 2],
            ),
            keyed: Vec::with_capacity(KEYED),
            set: Set::default(),
            asn: 1,
            next_asn: 2,
            used_up: false,
            by_pcid,
            large: [0; 64],
            huge: [0; 4],
            drops: 0,
            l2_hits: 0,
            walks: 0,
        }
    }
}

pub(super) fn index(linear: u64, size: usize) -> usize {
    (linear >> 12) as usize & (size - 1)
}

pub(super) fn page_of(linear: u64) -> u64 {
    linear & !0xfff
}

impl Tlb {
    /// Bytes of memory that the tables take.
    pub(crate) fn memory(&self) -> usize {
        size_of_val(&*self.l1)
            + self.ready.memory()
            + size_of_val(&*self.l2)
            + size_of_val(&*self.exec)
            + size_of_val(&*self.by_pcid)
            + self.keyed.capacity() * size_of::<Keyed>()
    }

    /// The host address of a read of `size` bytes, if the entry is there.
    #[inline(always)]
    pub fn read(&self, set: Set, linear: u64, size: usize) -> Option<u64> {
        let e = &self.l1[set as usize][index(linear, L1)];
        let last = linear.wrapping_add(size as u64 - 1);
        (e.read == page_of(last) | self.asn).then(|| linear.wrapping_add(e.addend))
    }
    /// The host address of a write of `size` bytes (which may also be read), if the entry is there.
    #[inline(always)]
    pub fn write(&self, set: Set, linear: u64, size: usize) -> Option<u64> {
        let e = &self.l1[set as usize][index(linear, L1)];
        let last = linear.wrapping_add(size as u64 - 1);
        (e.write == page_of(last) | self.asn).then(|| linear.wrapping_add(e.addend))
    }
    /// Fills a level-1 entry with a page's host address for reads and, if allowed, writes. `key`: the
    /// protection key that allows them, 0 if none is looked at. `global`: in every address space.
    pub fn fill(
        &mut self,
        set: Set,
        linear: u64,
        host_page: u64,
        (read, write): (bool, bool),
        key: u8,
        global: bool,
    ) {
        if key != 0 && self.keyed.len() < KEYED {
            self.keyed.push(Keyed {
                set: set as u8,
                index: index(linear, L1) as u16,
                key,
            });
        }
        let page = page_of(linear);
        let tag = page | self.asn;
        let e = &mut self.l1[set as usize][index(linear, L1)];
        *e = Entry {
            read: if read { tag } else { INVALID },
            write: if write { tag } else { INVALID },
            addend: host_page.wrapping_sub(page),
            counts: 0,
        };
        if key == 0 {
            self.ready.keep(set as usize, linear, e, self.asn, global);
        }
    }
    /// The host page that instructions are fetched from, if known.
    #[inline(always)]
    pub fn exec(&self, user: bool, linear: u64) -> Option<u64> {
        let e = &self.exec[usize::from(user)][index(linear, EXEC)];
        let page = page_of(linear);
        (e.tag == page | GLOBAL || e.tag == page | self.asn).then_some(e.host)
    }
    /// Whether an instruction-fetch entry says that the page is global.
    pub fn exec_is_global(&self, user: bool, linear: u64) -> bool {
        self.exec[usize::from(user)][index(linear, EXEC)].tag == page_of(linear) | GLOBAL
    }
    /// What [`Tlb::note_exec`] noted last in the entry for a page, 0 if it was filled since.
    pub fn exec_note(&self, user: bool, linear: u64) -> u64 {
        self.exec[usize::from(user)][index(linear, EXEC)].note
    }
    /// Notes something in the instruction-fetch entry for a page, if it is there.
    pub fn note_exec(&mut self, user: bool, linear: u64, note: u64) {
        if self.exec(user, linear).is_some() {
            self.exec[usize::from(user)][index(linear, EXEC)].note = note;
        }
    }
    /// Fills an instruction-fetch entry.
    pub fn fill_exec(&mut self, user: bool, linear: u64, host_page: u64, global: bool) {
        let tag = page_of(linear) | if global { GLOBAL } else { self.asn };
        if self.exec_filled.len() < FEW {
            self.exec_filled
                .push((user.into(), index(linear, EXEC) as u16));
        }
        self.exec[usize::from(user)][index(linear, EXEC)] = ExecEntry {
            tag,
            host: host_page,
            note: 0,
        };
    }
    /// What a walk found for this page earlier.
    pub fn walked(&mut self, linear: u64) -> Option<Page> {
        let w = &self.l2[index(linear, L2)];
        let page = page_of(linear);
        if w.tag == page | self.asn || w.tag == page | GLOBAL {
            self.l2_hits += 1;
            return Some(w.page);
        }
        None
    }
    /// Remembers a walk.
    pub fn remember(&mut self, linear: u64, page: Page) {
        self.walks += 1;
        let asn = if page.global { GLOBAL } else { self.asn };
        if page.shift > 12 {
            bloom_set(&mut self.large, linear >> 21);
            if page.shift > 22 {
                bloom_set(&mut self.huge, linear >> 30);
            }
        }
        self.l2[index(linear, L2)] = Walked {
            tag: page_of(linear) | asn,
            page,
        };
    }
    /// Address of the level-1 entries that the running code's accesses use.
    pub fn level1(&self) -> u64 {
        self.level1_of(self.set)
    }
    /// Address of a set's level-1 entries.
    pub fn level1_of(&self, set: Set) -> u64 {
        self.l1[set as usize].as_ptr() as u64
    }
    /// Address of the entries behind level 1 that the running code's accesses use, and what their counts
    /// must be.
    pub fn behind_level1(&mut self) -> (u64, u64) {
        (self.behind_level1_of(self.set), self.ready.counts())
    }
    /// Address of a set's entries behind level 1.
    pub fn behind_level1_of(&mut self, set: Set) -> u64 {
        self.ready.address(set as usize)
    }
    /// How often entries of level 1 were dropped for what has happened, not to make room.
    pub fn drops(&self) -> u64 {
        self.drops
    }
    /// The number of the current address space: part of every tag.
    pub fn asn(&self) -> u64 {
        self.asn
    }

    /// Drops everything, global pages too.
    pub fn flush_all(&mut self) {
        self.flush_l1();
        self.l2.fill(Walked {
            tag: INVALID,
            page: Page::default(),
        });
        self.large = [0; 64];
        self.huge = [0; 4];
        self.by_pcid.fill(0);
        self.asn = 1;
        self.next_asn = 2;
    }
    /// Drops level 1 and the instruction entries: rights must be looked up again.
    pub fn flush_l1(&mut self) {
        self.flush_data();
        self.flush_exec();
    }
    /// Drops the instruction entries.
    pub fn flush_exec(&mut self) {
        const EMPTY: ExecEntry = ExecEntry {
            tag: INVALID,
            host: 0,
            note: 0,
        };
        // A monitor that looks at registers at every exit pays for what ran between two exits only.
        if self.exec_filled.len() < FEW {
            for (set, n) in self.exec_filled.drain(..) {
                self.exec[usize::from(set)][usize::from(n)] = EMPTY;
            }
            return;
        }
        self.exec_filled.clear();
        for set in self.exec.iter_mut() {
            set.fill(EMPTY);
        }
    }
    fn flush_data(&mut self) {
        self.drops += 1;
        self.ready.clear();
        for set in self.l1.iter_mut() {
            set.fill(EMPTY);
        }
        self.keyed.clear();
    }
    /// Drops the level-1 entries of pages with these protection keys (a bit each).
    pub fn drop_keys(&mut self, keys: u16) {
        if keys & 1 != 0 || self.keyed.len() >= KEYED {
            self.flush_data();
            return;
        }
        self.drops += 1;
        let l1 = &mut self.l1;
        self.keyed.retain(|k| {
            let dropped = keys >> k.key & 1 != 0;
            if dropped {
                l1[usize::from(k.set)][usize::from(k.index)] = EMPTY;
            }
            !dropped
        });
    }
    /// Makes an address space current (MOV to CR3). `keep`: what was cached for it stays good.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        let slot = usize::from(pcid & 0xfff);
        if keep && self.by_pcid[slot] != 0 {
            self.asn = self.by_pcid[slot].into();
            return;
        }
        self.asn = self.fresh();
        self.by_pcid[slot] = self.asn as u16;
    }
    /// Drops what is cached for an address space, except global pages (INVPCID type 1).
    pub fn flush_pcid(&mut self, pcid: u16, current: bool) {
        if current {
            self.switch(pcid, false);
        } else {
            self.by_pcid[usize::from(pcid & 0xfff)] = 0;
        }
    }
    /// Drops everything but global pages (INVPCID type 3).
    pub fn flush_non_global(&mut self, current_pcid: u16) {
        self.by_pcid.fill(0);
        self.switch(current_pcid, false);
    }
    /// Whether everything has been flushed since the last call, because the numbers were used up and
    /// begin anew.
    pub fn numbers_were_used_up(&mut self) -> bool {
        std::mem::take(&mut self.used_up)
    }
    fn fresh(&mut self) -> u64 {
        if self.next_asn > LAST_ASN {
            self.flush_all();
            self.used_up = true;
        }
        let n = self.next_asn;
        self.next_asn += 1;
        n
    }
    /// INVLPG: drops one page, in every address space (allowed; SDM Vol. 3, 4.10.4.1), with all
    /// pieces if it may be part of a large page; true if more than that one page went.
    pub fn invalidate(&mut self, linear: u64) -> bool {
        if bloom_has(&self.huge, linear >> 30) {
            self.flush_all_keeping_spaces();
            true
        } else if bloom_has(&self.large, linear >> 21) {
            // 4 MiB pages (32-bit paging) are two such regions.
            let first = linear & !((1 << 22) - 1);
            for i in 0..1024u64 {
                self.invalidate_piece(first.wrapping_add(i << 12));
            }
            true
        } else {
            self.invalidate_piece(linear);
            false
        }
    }
    fn flush_all_keeping_spaces(&mut self) {
        self.flush_l1();
        self.l2.fill(Walked {
            tag: INVALID,
            page: Page::default(),
        });
        self.large = [0; 64];
        self.huge = [0; 4];
    }
    fn invalidate_piece(&mut self, linear: u64) {
        self.drops += 1;
        self.ready.invalidate(linear);
        let page = page_of(linear);
        for set in self.l1.iter_mut() {
            let e = &mut set[index(linear, L1)];
            if page_of(e.read) == page || page_of(e.write) == page {
                *e = EMPTY;
            }
        }
        for set in self.exec.iter_mut() {
            let e = &mut set[index(linear, EXEC)];
            if page_of(e.tag) == page {
                e.tag = INVALID;
            }
        }
        let w = &mut self.l2[index(linear, L2)];
        if page_of(w.tag) == page {
            w.tag = INVALID;
        }
    }
    /// Drops the fast write entries of a host page, under every linear address: it now holds code.
    pub fn protect_host_page(&mut self, host_page: u64) {
        self.drops += 1;
        self.ready.clear_writes();
        for set in self.l1[..3].iter_mut() {
            for e in set.iter_mut() {
                if e.write != INVALID && page_of(e.write).wrapping_add(e.addend) == host_page {
                    e.write = INVALID;
                }
            }
        }
    }
    /// Drops all fast write entries.
    pub fn close_writes(&mut self) {
        self.drops += 1;
        self.ready.clear_writes();
        for entry in self.l1.iter_mut().flatten() {
            entry.write = INVALID;
        }
    }
}

fn bloom_bit(words: usize, n: u64) -> (usize, u64) {
    let h = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    ((h >> 6) as usize % words, 1 << (h & 63))
}

fn bloom_set(f: &mut [u64], n: u64) {
    let (w, b) = bloom_bit(f.len(), n);
    f[w] |= b;
}

fn bloom_has(f: &[u64], n: u64) -> bool {
    let (w, b) = bloom_bit(f.len(), n);
    f[w] & b != 0
}
