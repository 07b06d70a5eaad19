//! Instruction operands in memory: effective addresses, segment checks, and reads, writes and
//! read-modify-writes of every size.

use super::Access;
use super::slow::{Place, is_stack, operand_alignment};
use super::tlb::Set;
use crate::cpu::Cpu;
use crate::decode::{Insn, SEG_CHECKED};
use crate::events::vector;
use crate::exit::Stop;
use crate::memory::PAGE;
use crate::memory::access::{self, Ram};
use crate::state::{Segment, seg};

impl Cpu {
    /// The effective address of an instruction's memory operand (the offset within its segment).
    #[inline(always)]
    pub fn effective_address(&self, insn: &Insn) -> u64 {
        let r = &self.state.regs;
        r[insn.base]
            .wrapping_add(r[insn.index] << insn.scale)
            .wrapping_add(insn.disp)
            & insn.addr_mask
    }

    /// The offset of a part of a memory operand: the address size, which the operand's own offset is
    /// computed in, does not limit it; but offsets outside 64-bit code have 32 bits.
    #[inline(always)]
    pub fn element_offset(&self, offset: u64, part: usize) -> u64 {
        let at = offset.wrapping_add(part as u64);
        if self.mode.code64() {
            at
        } else {
            at & 0xffff_ffff
        }
    }

    /// The linear address of `size` bytes at an offset through a segment code, with limit and rights
    /// checks where the code asks for them.
    #[inline(always)]
    pub fn linear(&mut self, code: u8, offset: u64, size: usize, write: bool) -> Result<u64, Stop> {
        let base = self.state.seg[usize::from(code & 7)].base;
        if code & SEG_CHECKED != 0 {
            self.check_segment(code & 7, offset, size, write)?;
            return Ok(base.wrapping_add(offset) & 0xffff_ffff);
        }
        Ok(base.wrapping_add(offset))
    }

    /// Limit, type and presence checks of a data access (SDM Vol. 3, 5.3-5.5).
    #[cold]
    #[inline(never)]
    fn check_segment(&mut self, n: u8, offset: u64, size: usize, write: bool) -> Result<(), Stop> {
        let s = self.state.seg[usize::from(n)];
        let plain = !self.state.protected() || self.state.virtual_8086();
        let ok = (plain || allows(&s, write)) && in_limit(&s, offset, size);
        if ok {
            return Ok(());
        }
        let v = if n == seg::SS { vector::SS } else { vector::GP };
        Err(self.raise_error(v, 0))
    }

    /// Reads the instruction's memory operand.
    #[inline(always)]
    pub fn read<T: Ram>(&mut self, insn: &Insn) -> Result<T, Stop> {
        let offset = self.effective_address(insn);
        self.read_at(insn.seg, offset)
    }

    /// Reads at an offset through a segment code.
    #[inline(always)]
    pub fn read_at<T: Ram>(&mut self, code: u8, offset: u64) -> Result<T, Stop> {
        let linear = self.linear(code, offset, T::BYTES, false)?;
        if let Some(host) = self.tlb.read(self.tlb.set, linear, T::BYTES) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            return Ok(unsafe { T::load(host) });
        }
        self.read_slow(linear, self.data_access(false), is_stack(code))
    }

    /// Writes the instruction's memory operand.
    #[inline(always)]
    pub fn write<T: Ram>(&mut self, insn: &Insn, value: T) -> Result<(), Stop> {
        let offset = self.effective_address(insn);
        self.write_at(insn.seg, offset, value)
    }

    /// Writes at an offset through a segment code.
    #[inline(always)]
    pub fn write_at<T: Ram>(&mut self, code: u8, offset: u64, value: T) -> Result<(), Stop> {
        let linear = self.linear(code, offset, T::BYTES, true)?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, T::BYTES) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            unsafe { value.store(host) };
            return Ok(());
        }
        self.write_slow(linear, value, self.data_access(true), is_stack(code))
    }

    /// Replaces the instruction's memory operand by `f` of it; atomically if the instruction has a
    /// LOCK prefix. `f` may be called several times.
    #[inline(always)]
    pub fn modify<T: Ram, R>(
        &mut self,
        insn: &Insn,
        f: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let offset = self.effective_address(insn);
        self.modify_at(insn.seg, offset, insn.lock(), f)
    }

    /// As [`Cpu::modify`], at an offset through a segment code.
    #[inline(always)]
    pub fn modify_at<T: Ram, R>(
        &mut self,
        code: u8,
        offset: u64,
        locked: bool,
        mut f: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let linear = self.linear(code, offset, T::BYTES, true)?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, T::BYTES) {
            if locked {
                return Ok(locked_modify(host, f));
            }
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            let (new, r) = f(unsafe { T::load(host) });
            // SAFETY: as above.
            unsafe { new.store(host) };
            return Ok(r);
        }
        self.modify_slow(linear, locked, is_stack(code), f)
    }

    #[cold]
    fn modify_slow<T: Ram, R>(
        &mut self,
        linear: u64,
        locked: bool,
        stack: bool,
        mut f: impl FnMut(T) -> (T, R),
    ) -> Result<R, Stop> {
        let access = self.data_access(true);
        self.check_canonical(linear, T::BYTES, stack)?;
        self.check_alignment(linear, T::BYTES, access)?;
        let one_page = linear % PAGE + T::BYTES as u64 <= PAGE;
        // Rights to write are checked before the read, and a locked access is one access.
        if locked && one_page {
            self.note_data(linear, T::BYTES, true);
            if let Place::Ram { host } = self.place(linear, access)? {
                let r = locked_modify(host, f);
                self.stored(host, T::BYTES);
                return Ok(r);
            }
        }
        self.probe(linear, T::BYTES, access)?;
        // A read-only slot is read as RAM.
        let old = self.read_slow::<T>(linear, self.data_access(false), stack)?;
        let (new, r) = f(old);
        self.write_slow(linear, new, access, stack)?;
        Ok(r)
    }

    /// CMPXCHG16B's access: replaces the instruction's 16 bytes of memory by `new` if they are
    /// `expected`, atomically; returns what they were. They must be aligned.
    pub fn compare_exchange_16(
        &mut self,
        insn: &Insn,
        expected: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        const BYTES: usize = 16;
        let offset = self.effective_address(insn);
        let linear = self.linear(insn.seg, offset, BYTES, true)?;
        if !linear.is_multiple_of(BYTES as u64) {
            return Err(self.gp0());
        }
        self.check_range(linear, BYTES, is_stack(insn.seg))?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, BYTES) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            return Ok(unsafe { access::compare_exchange_16(host, expected, new) }.0);
        }
        self.note_data(linear, BYTES, true);
        let access = self.data_access(true);
        if let Place::Ram { host } = self.place(linear, access)? {
            // SAFETY: `place` found it in a slot of the map this processor holds.
            let (old, _) = unsafe { access::compare_exchange_16(host, expected, new) };
            self.stored(host, BYTES);
            return Ok(old);
        }
        let mut bytes = [0; BYTES];
        self.probe(linear, BYTES, access)?;
        self.read_pieces(linear, &mut bytes, self.data_access(false))?;
        let old = u128::from_le_bytes(bytes);
        let value = if old == expected { new } else { old };
        self.write_pieces(linear, &value.to_le_bytes(), access)?;
        Ok(old)
    }

    /// Reads bytes at an offset through a segment code (vector operands, tables of operands).
    pub fn read_bytes(&mut self, code: u8, offset: u64, buf: &mut [u8]) -> Result<(), Stop> {
        let linear = self.linear(code, offset, buf.len(), false)?;
        if let Some(host) = self.tlb.read(self.tlb.set, linear, buf.len()) {
            crate::memory::access::copy_from_guest(buf, host);
            return Ok(());
        }
        self.check_range(linear, buf.len(), is_stack(code))?;
        let access = self.data_access(false);
        self.check_alignment(linear, operand_alignment(buf.len()), access)?;
        self.note_data(linear, buf.len(), false);
        self.read_pieces(linear, buf, access)
    }

    /// Writes bytes at an offset through a segment code: all of them or none.
    pub fn write_bytes(&mut self, code: u8, offset: u64, data: &[u8]) -> Result<(), Stop> {
        let linear = self.linear(code, offset, data.len(), true)?;
        if let Some(host) = self.tlb.write(self.tlb.set, linear, data.len()) {
            crate::memory::access::copy_to_guest(host, data);
            return Ok(());
        }
        self.check_range(linear, data.len(), is_stack(code))?;
        let access = self.data_access(true);
        self.check_alignment(linear, operand_alignment(data.len()), access)?;
        self.note_data(linear, data.len(), true);
        self.write_pieces(linear, data, access)
    }

    /// Raises what a write of `len` bytes at an offset through a segment code would raise.
    pub fn probe_write(&mut self, code: u8, offset: u64, len: usize) -> Result<(), Stop> {
        let linear = self.linear(code, offset, len, true)?;
        self.check_range(linear, len, is_stack(code))?;
        self.probe(linear, len, self.data_access(true))
    }

    fn check_range(&mut self, linear: u64, len: usize, stack: bool) -> Result<(), Stop> {
        if self.canonical(linear) && self.canonical(linear.wrapping_add(len.max(1) as u64 - 1)) {
            return Ok(());
        }
        let v = if stack { vector::SS } else { vector::GP };
        Err(self.raise_error(v, 0))
    }

    /// Reads a system structure (descriptor, TSS, gate) at a linear address with supervisor rights.
    pub fn read_system<T: Ram>(&mut self, linear: u64) -> Result<T, Stop> {
        if let Some(host) = self.tlb.read(Set::Supervisor, linear, T::BYTES) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            return Ok(unsafe { T::load(host) });
        }
        self.read_slow(
            linear,
            Access {
                implicit: true,
                ..Access::default()
            },
            false,
        )
    }

    /// Writes a system structure at a linear address with supervisor rights.
    pub fn write_system<T: Ram>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        if let Some(host) = self.tlb.write(Set::Supervisor, linear, T::BYTES) {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            unsafe { value.store(host) };
            return Ok(());
        }
        self.write_slow(
            linear,
            value,
            Access {
                write: true,
                implicit: true,
                ..Access::default()
            },
            false,
        )
    }

    /// Sets bits in a byte of a system structure atomically (descriptor accessed and busy flags).
    /// Returns what the byte was; where there is no RAM nothing is set, and it is `bits`' complement.
    pub fn set_bits_system(&mut self, linear: u64, bits: u8) -> Result<u8, Stop> {
        let access = Access {
            write: true,
            implicit: true,
            ..Access::default()
        };
        let Place::Ram { host } = self.place(linear, access)? else {
            return Ok(!bits);
        };
        let old = locked_modify(host, |old: u8| (old | bits, old));
        self.stored(host, 1);
        Ok(old)
    }

    /// Pushes on the stack of the current mode. Nothing changes if it faults.
    #[inline(always)]
    pub fn push<T: Ram>(&mut self, value: T) -> Result<(), Stop> {
        let (code, mask) = self.stack();
        let sp = self.state.regs[crate::state::reg::RSP];
        let new = sp.wrapping_sub(T::BYTES as u64) & mask;
        self.write_at(code, new, value)?;
        self.set_stack_pointer(new, mask);
        Ok(())
    }

    /// Pops from the stack of the current mode.
    #[inline(always)]
    pub fn pop<T: Ram>(&mut self) -> Result<T, Stop> {
        let (code, mask) = self.stack();
        let sp = self.state.regs[crate::state::reg::RSP] & mask;
        let value = self.read_at(code, sp)?;
        self.set_stack_pointer(sp.wrapping_add(T::BYTES as u64) & mask, mask);
        Ok(value)
    }

    /// Segment code and pointer mask of the current stack.
    #[inline(always)]
    pub fn stack(&self) -> (u8, u64) {
        (self.stack_code, self.stack_mask)
    }

    /// Sets the part of RSP that the stack's size covers. As with every register, 32 bits clear the upper
    /// half.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64, mask: u64) {
        let rsp = &mut self.state.regs[crate::state::reg::RSP];
        let kept = if mask == 0xffff { *rsp & !mask } else { 0 };
        *rsp = kept | value & mask;
    }
}

/// Whether the segment may be read (or written).
fn allows(s: &Segment, write: bool) -> bool {
    if s.unusable() || !s.present() {
        return false;
    }
    let code = s.kind() & 8 != 0;
    // Bit 1: writable data or readable code.
    if write {
        !code && s.kind() & 2 != 0
    } else {
        !code || s.kind() & 2 != 0
    }
}

/// Limit check, expand-down segments included (SDM Vol. 3, 5.3).
pub(crate) fn in_limit(s: &Segment, offset: u64, size: usize) -> bool {
    let last = offset + size as u64 - 1;
    let expand_down = s.kind() & 0b1100 == 0b0100 && s.attr & Segment::S != 0;
    if expand_down {
        let top = if s.db() { 0xffff_ffff } else { 0xffff };
        offset > u64::from(s.limit) && last <= top
    } else {
        last <= u64::from(s.limit)
    }
}

/// Held while a locked access splits a cache line: a real split lock stops every core of the host
/// for milliseconds, or is forbidden.
static SPLIT_LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// An atomic read-modify-write as x86's LOCK makes it. One that splits a cache line is atomic only
/// with respect to others like it.
#[inline]
fn locked_modify<T: Ram, R>(host: u64, mut f: impl FnMut(T) -> (T, R)) -> R {
    if host % 64 + T::BYTES as u64 > 64 {
        let _held = SPLIT_LOCK.lock();
        // SAFETY: the host address comes from a TLB hit or `place`.
        let (new, r) = f(unsafe { T::load(host) });
        // SAFETY: as above.
        unsafe { new.store(host) };
        return r;
    }
    // SAFETY: the host address comes from a TLB hit or `place`.
    let mut old = unsafe { T::load(host) };
    loop {
        let (new, r) = f(old);
        // SAFETY: as above.
        let (found, swapped) = unsafe { T::compare_exchange(host, old, new) };
        if swapped {
            return r;
        }
        old = found;
    }
}
