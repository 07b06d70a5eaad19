//! Page walks (SDM Vol. 3, ch. 4): 32-bit, PAE, 4-level and 5-level paging, accessed and dirty
//! flags, reserved-bit checks.

use super::{Access, Page, PageFault};
use crate::cpu::Cpu;
use crate::memory::access::Ram;
use crate::state::{cr0, cr4, efer};

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// An entry used by a walk: where it is and what it held.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: u64,
    value: u64,
}

impl Cpu {
    /// Translates a linear page for an access: checks rights, sets A and (for a write) D flags.
    pub(crate) fn walk(&mut self, linear: u64, access: Access) -> Result<Page, PageFault> {
        if self.state.cr0 & cr0::PG == 0 {
            return Ok(Page {
                gpa: linear & 0xffff_f000,
                user: true,
                write: true,
                exec: true,
                dirty: true,
                ..Page::default()
            });
        }
        let wide = self.state.cr4 & cr4::PAE != 0;
        if !wide {
            self.walk_32(linear, access)
        } else {
            self.walk_64(linear, access)
        }
    }

    fn walk_32(&mut self, linear: u64, access: Access) -> Result<Page, PageFault> {
        let mut used = [Used::default(); 2];
        let pde_at = (self.state.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
        let pde = u64::from(self.entry::<u32>(pde_at));
        used[0] = Used {
            gpa: pde_at,
            value: pde,
        };
        if pde & P == 0 {
            return Err(PageFault::not_present());
        }
        let mut page = Page {
            exec: true,
            ..Page::default()
        };
        let leaf;
        let n;
        if pde & PS != 0 && self.state.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 13-20 are address bits 32-39; bit 21 is reserved.
            let high_bits = u64::from(self.phys_bits).clamp(32, 40) - 32;
            if pde >> 13 & 0xff >> high_bits << high_bits != 0 || pde & 1 << 21 != 0 {
                return Err(PageFault::reserved());
            }
            page.user = pde & US != 0;
            page.write = pde & RW != 0;
            page.gpa = (pde & 0xffc0_0000) | (pde >> 13 & 0xff) << 32 | linear & 0x3f_f000;
            page.shift = 22;
            (leaf, n) = (pde, 1);
        } else {
            let pte_at = (pde & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
            let pte = u64::from(self.entry::<u32>(pte_at));
            used[1] = Used {
                gpa: pte_at,
                value: pte,
            };
            if pte & P == 0 {
                return Err(PageFault::not_present());
            }
            page.user = pde & pte & US != 0;
            page.write = pde & pte & RW != 0;
            page.gpa = pte & 0xffff_f000;
            page.shift = 12;
            (leaf, n) = (pte, 2);
        }
        page.global = leaf & G != 0 && self.state.cr4 & cr4::PGE != 0;
        page.dirty = leaf & D != 0 || access.write;
        self.check_rights(&page, access)?;
        for (i, u) in used[..n].iter().enumerate() {
            let set = A | if i + 1 == n && access.write { D } else { 0 };
            if u.value & set != set && !self.set_flags::<u32>(*u, set as u32) {
                return self.walk_32(linear, access);
            }
        }
        Ok(page)
    }

    fn walk_64(&mut self, linear: u64, access: Access) -> Result<Page, PageFault> {
        let nx = self.state.msr.efer & efer::NX != 0;
        let long = self.state.long_mode();
        let reserved = !0 << self.phys_bits & 0x000f_ffff_ffff_f000
            | if nx { 0 } else { NX }
            | if long { 0 } else { 0x7ff0_0000_0000_0000 };
        let address = !(!0 << self.phys_bits) & !0xfff;
        let (levels, root) = if long {
            let levels = if self.state.cr4 & cr4::LA57 != 0 {
                5
            } else {
                4
            };
            (levels, self.state.cr3 & address)
        } else {
            let pdpte = self.state.pdptr[(linear >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return Err(PageFault::not_present());
            }
            (2, pdpte & address)
        };
        let mut used = [Used::default(); 5];
        let mut table = root;
        let mut page = Page {
            user: true,
            write: true,
            exec: true,
            ..Page::default()
        };
        let mut n = 0;
        for level in (1u32..=levels).rev() {
            let shift = 12 + (level - 1) * 9;
            let at = table + (linear >> shift & 0x1ff) * 8;
            let e = self.entry::<u64>(at);
            used[n] = Used { gpa: at, value: e };
            n += 1;
            if e & P == 0 {
                return Err(PageFault::not_present());
            }
            let is_leaf = level == 1 || level <= 3 && e & PS != 0;
            let low = (1u64 << shift) - 1;
            // A large page's low address bits are reserved but for bit 12 (PAT).
            let misaligned = if is_leaf && level > 1 {
                low & !0x1fff
            } else {
                0
            };
            let ps_reserved = if level > 3 { PS } else { 0 };
            if e & (reserved | misaligned | ps_reserved) != 0 {
                return Err(PageFault::reserved());
            }
            page.user &= e & US != 0;
            page.write &= e & RW != 0;
            page.exec &= e & NX == 0;
            if is_leaf {
                page.gpa = e & address & !low | linear & low & !0xfff;
                page.global = e & G != 0 && self.state.cr4 & cr4::PGE != 0;
                page.dirty = e & D != 0 || access.write;
                page.shift = shift as u8;
                page.key = (e >> 59 & 15) as u8;
                break;
            }
            table = e & address;
        }
        self.check_rights(&page, access)?;
        for (i, u) in used[..n].iter().enumerate() {
            let set = A | if i + 1 == n && access.write { D } else { 0 };
            if u.value & set != set && !self.set_flags::<u64>(*u, set) {
                return self.walk_64(linear, access);
            }
        }
        Ok(page)
    }

    /// Reads a paging-structure entry. Outside RAM the bus floats: all ones.
    fn entry<T: Ram>(&self, gpa: u64) -> T {
        match self.map.find(gpa) {
            Some(slot) => {
                slot.mark_used(gpa);
                // SAFETY: inside a slot of the map this processor holds; entries are aligned and do
                // not cross a page.
                unsafe { T::load(slot.host() + (gpa - slot.gpa)) }
            }
            None => T::from_u64(u64::MAX),
        }
    }

    /// Sets A/D flags in an entry by compare-exchange; false if it changed meanwhile and the walk
    /// must start again. Entries in read-only memory keep their flags.
    fn set_flags<T: Ram>(&mut self, used: Used, set: T) -> bool {
        let Some(slot) = self.map.find(used.gpa) else {
            return true;
        };
        if slot.readonly {
            return true;
        }
        let host = slot.host() + (used.gpa - slot.gpa);
        let old = T::from_u64(used.value);
        // SAFETY: inside a slot of the map this processor holds.
        let (_, swapped) = unsafe { T::compare_exchange(host, old, old | set) };
        if swapped {
            slot.mark_dirty(used.gpa);
            if self.memory.pages().stored(host, T::BYTES) {
                self.leave_block();
            }
        }
        swapped
    }

    /// The four PDPTEs that MOV to CR3 loads under PAE paging (SDM Vol. 3, 4.4.1); `None` if a
    /// present one has reserved bits set (#GP).
    pub fn load_pdptrs(&mut self, cr3: u64) -> Option<[u64; 4]> {
        let reserved = !0 << self.phys_bits & 0xffff_ffff_ffff_f000 | 0x1e6;
        let mut p = [0; 4];
        for (i, e) in p.iter_mut().enumerate() {
            *e = self.entry::<u64>((cr3 & 0xffff_ffe0) + i as u64 * 8);
            if *e & P != 0 && *e & reserved != 0 {
                return None;
            }
        }
        Some(p)
    }
}
