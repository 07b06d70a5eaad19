//! Accesses that miss the TLB's level 1: refills, page crossings, MMIO, dirty logging, stores into
//! code, alignment checks and data breakpoints.

use super::tlb::Set;
use super::{Access, Page};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::decode::{SEG_CHECKED, SEG_FLAT_SS};
use crate::events::vector;
use crate::exit::Stop;
use crate::memory::access::{HostPage, Ram};
use crate::memory::{PAGE, Slot};
use crate::state::{cr0, rflags, seg};

/// Where a piece of an access that stays inside one page goes.
pub(crate) enum Place {
    /// RAM at this host address.
    Ram {
        /// Host address.
        host: u64,
    },
    /// Not RAM (or, for a write, read-only).
    Mmio {
        /// Guest-physical address.
        gpa: u64,
    },
}

/// The alignment that the operand of an instruction other than one, two, four or eight bytes must
/// have where alignment checking is on (SDM Vol. 3, table 6-7; vectors as AMD's processors have it):
/// told by its size.
pub(crate) fn operand_alignment(size: usize) -> usize {
    match size {
        // XMM, YMM, ZMM.
        16 | 32 | 64 => 16,
        // x87: a number, the 16-bit and the 32-bit environment and state.
        10 => 8,
        14 | 94 => 2,
        28 | 108 => 4,
        _ => 1,
    }
}

/// Whether faults of an access through this segment code are #SS.
pub(crate) fn is_stack(code: u8) -> bool {
    code == SEG_FLAT_SS || code == seg::SS | SEG_CHECKED
}

impl Cpu {
    fn set_of(&self, access: Access) -> Set {
        if access.implicit {
            Set::Supervisor
        } else {
            self.tlb.set
        }
    }

    /// Finds the place of one piece, refilling level 1 where the page may have a fast entry.
    pub(crate) fn place(&mut self, linear: u64, access: Access) -> Result<Place, Stop> {
        let page = self.translate(linear, access)?;
        let gpa = page.gpa | linear & (PAGE - 1);
        let Some(slot) = self.map.find(gpa).cloned() else {
            self.leave_ram()?;
            return Ok(Place::Mmio { gpa });
        };
        let host = slot.host() + (gpa - slot.gpa);
        slot.mark_used(gpa);
        if access.write {
            if slot.readonly {
                self.leave_ram()?;
                return Ok(Place::Mmio { gpa });
            }
            self.open_page(host)?;
            slot.mark_dirty(gpa);
        }
        self.refill(linear, host & !(PAGE - 1), &page, &slot, access);
        Ok(Place::Ram { host })
    }

    fn refill(&mut self, linear: u64, host_page: u64, page: &Page, slot: &Slot, access: Access) {
        let set = self.set_of(access);
        // The APIC page and other in-slot device memory is not RAM in any map, so RAM is always fast
        // unless one of these holds.
        if set == Set::Slow || self.watched(linear) {
            return;
        }
        let code = self
            .memory
            .pages()
            .get(host_page)
            .is_none_or(|p| p.has_code());
        let readable = access.write
            || self
                .check_rights(
                    page,
                    Access {
                        write: false,
                        ..access
                    },
                )
                .is_ok();
        let logged = slot.dirty.is_some() && !access.write;
        let writable = !code
            && !slot.readonly
            && !logged
            && page.dirty
            && self.is_open(host_page)
            && self
                .check_rights(
                    page,
                    Access {
                        write: true,
                        ..access
                    },
                )
                .is_ok();
        let key = if self.keys_apply(page) { page.key } else { 0 };
        self.tlb.fill(
            set,
            linear,
            host_page,
            (readable, writable),
            key,
            page.global,
        );
    }

    /// #AC for an access that is not aligned to `alignment` while alignment checking is on (SDM
    /// Vol. 3, 6.15, vector 17). It comes before page faults, as on AMD's processors.
    pub(crate) fn check_alignment(
        &mut self,
        linear: u64,
        alignment: usize,
        access: Access,
    ) -> Result<(), Stop> {
        if !access.user || access.implicit || linear.is_multiple_of(alignment as u64) {
            return Ok(());
        }
        if self.state.cr0 & cr0::AM != 0 && self.state.rflags & rflags::AC != 0 {
            return Err(self.raise_error(vector::AC, 0));
        }
        Ok(())
    }

    /// #AC that a store of the memory operand would raise.
    pub(crate) fn check_store_alignment(&mut self, insn: &Insn, size: usize) -> Result<(), Stop> {
        let alignment = match size {
            2 | 4 | 8 => size,
            _ => operand_alignment(size),
        };
        let linear = self.operand_linear(insn);
        self.check_alignment(linear, alignment, self.data_access(true))
    }

    /// Checks that an access lies in canonical space.
    pub(crate) fn check_canonical(
        &mut self,
        linear: u64,
        size: usize,
        stack: bool,
    ) -> Result<(), Stop> {
        let last = linear.wrapping_add(size as u64 - 1);
        if self.canonical(linear) && self.canonical(last) {
            return Ok(());
        }
        Err(if stack {
            self.raise_error(vector::SS, 0)
        } else {
            self.raise_error(vector::GP, 0)
        })
    }

    fn wrap(&self, linear: u64) -> u64 {
        if self.mode.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// A read of up to 8 bytes, anywhere.
    #[cold]
    #[inline(never)]
    pub(crate) fn read_slow<T: Ram>(
        &mut self,
        linear: u64,
        access: Access,
        stack: bool,
    ) -> Result<T, Stop> {
        self.check_canonical(linear, T::BYTES, stack)?;
        self.check_alignment(linear, T::BYTES, access)?;
        self.note_data(linear, T::BYTES, false);
        let first = (PAGE - linear % PAGE) as usize;
        if first >= T::BYTES {
            return match self.place(linear, access)? {
                // SAFETY: `place` found it in a slot of the map this processor holds.
                Place::Ram { host } => Ok(unsafe { T::load(host) }),
                Place::Mmio { gpa } => {
                    let mut buf = [0; 8];
                    self.mmio_read(gpa, &mut buf[..T::BYTES])?;
                    Ok(T::from_u64(u64::from_le_bytes(buf)))
                }
            };
        }
        let mut buf = [0; 8];
        self.read_pieces(linear, &mut buf[..T::BYTES], access)?;
        Ok(T::from_u64(u64::from_le_bytes(buf)))
    }

    /// Reads bytes that may lie in any number of pages.
    pub(crate) fn read_pieces(
        &mut self,
        linear: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), Stop> {
        // All pages first: a fault on the second must leave no MMIO read behind.
        let mut at = 0;
        while at < buf.len() {
            let l = self.wrap(linear.wrapping_add(at as u64));
            self.translate(l, access)?;
            at += (PAGE - l % PAGE) as usize;
        }
        let mut at = 0;
        while at < buf.len() {
            let l = self.wrap(linear.wrapping_add(at as u64));
            let n = (buf.len() - at).min((PAGE - l % PAGE) as usize);
            let piece = &mut buf[at..at + n];
            match self.place(l, access)? {
                Place::Ram { host } => {
                    HostPage(host & !(PAGE - 1)).read((host % PAGE) as usize, piece);
                }
                Place::Mmio { gpa } => self.mmio_read(gpa, piece)?,
            }
            at += n;
        }
        Ok(())
    }

    /// A write of up to 8 bytes, anywhere.
    #[cold]
    #[inline(never)]
    pub(crate) fn write_slow<T: Ram>(
        &mut self,
        linear: u64,
        value: T,
        access: Access,
        stack: bool,
    ) -> Result<(), Stop> {
        self.check_canonical(linear, T::BYTES, stack)?;
        self.check_alignment(linear, T::BYTES, access)?;
        self.note_data(linear, T::BYTES, true);
        let first = (PAGE - linear % PAGE) as usize;
        if first >= T::BYTES {
            match self.place(linear, access)? {
                Place::Ram { host } => {
                    // SAFETY: `place` found it in a slot of the map this processor holds.
                    unsafe { value.store(host) };
                    self.stored(host, T::BYTES);
                }
                Place::Mmio { gpa } => {
                    self.mmio_write(gpa, &value.to_u64().to_le_bytes()[..T::BYTES])
                }
            }
            return Ok(());
        }
        self.write_pieces(linear, &value.to_u64().to_le_bytes()[..T::BYTES], access)
    }

    /// Writes bytes that may lie in any number of pages: all of them or none.
    pub(crate) fn write_pieces(
        &mut self,
        linear: u64,
        data: &[u8],
        access: Access,
    ) -> Result<(), Stop> {
        self.probe(linear, data.len(), access)?;
        let mut at = 0;
        while at < data.len() {
            let l = self.wrap(linear.wrapping_add(at as u64));
            let n = (data.len() - at).min((PAGE - l % PAGE) as usize);
            let piece = &data[at..at + n];
            match self.place(l, access)? {
                Place::Ram { host } => {
                    crate::memory::access::copy_to_guest(host, piece);
                    self.stored(host, n);
                }
                Place::Mmio { gpa } => self.mmio_write(gpa, piece),
            }
            at += n;
        }
        Ok(())
    }

    /// Faults if an access to these bytes would, without doing it.
    pub(crate) fn probe(&mut self, linear: u64, len: usize, access: Access) -> Result<(), Stop> {
        let mut at = 0;
        while at < len {
            let l = self.wrap(linear.wrapping_add(at as u64));
            self.translate(l, access)?;
            at += (PAGE - l % PAGE) as usize;
        }
        Ok(())
    }

    /// After a store through the slow path: drops code it hit; leaves the block if there was any.
    #[inline]
    pub(crate) fn stored(&mut self, host: u64, len: usize) {
        if self.memory.pages().stored(host, len) {
            self.leave_block();
        }
    }

    /// Instruction bytes from `linear` to the end of its page: their host page.
    pub(crate) fn fetch_page(&mut self, linear: u64) -> Result<Fetched, Stop> {
        let user = self.mode.user();
        if let Some(host) = self.tlb.exec(user, linear) {
            return Ok(Fetched::Ram(HostPage(host)));
        }
        if !self.canonical(linear) {
            return Err(self.raise_error(vector::GP, 0));
        }
        let page = self.translate(
            linear,
            Access {
                exec: true,
                user,
                ..Access::default()
            },
        )?;
        match self.map.find(page.gpa) {
            Some(slot) => {
                slot.mark_used(page.gpa);
                let host = slot.host() + (page.gpa - slot.gpa);
                self.tlb.fill_exec(user, linear, host, page.global);
                if !user && !page.global && !self.local_code && self.state.cr0 & cr0::PG != 0 {
                    self.note_local_code();
                }
                Ok(Fetched::Ram(HostPage(host)))
            }
            None => Ok(Fetched::Mmio),
        }
    }
}

/// Where instruction bytes are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fetched {
    /// In RAM.
    Ram(HostPage),
    /// Outside RAM: cannot be executed.
    Mmio,
}
