//! Accesses that only try the TLB's level 1. A handler that finds nothing hands over to a function
//! of its own for the rare cases, and so needs no stack frame for the frequent one.
//!
//! Operands whose segment must be checked never hit.

use crate::cpu::Cpu;
use crate::decode::{Insn, SEG_CHECKED};
use crate::memory::access::Ram;

impl Cpu {
    #[inline(always)]
    fn unchecked_linear(&self, code: u8, offset: u64) -> Option<u64> {
        let base = self.state.seg[usize::from(code & 7)].base;
        (code & SEG_CHECKED == 0).then(|| base.wrapping_add(offset))
    }

    /// Reads at an offset through a segment code.
    #[inline(always)]
    pub fn read_hit_at<T: Ram>(&self, code: u8, offset: u64) -> Option<T> {
        let linear = self.unchecked_linear(code, offset)?;
        let host = self.tlb.read(self.tlb.set, linear, T::BYTES)?;
        // SAFETY: a TLB hit is RAM of the map this processor holds.
        Some(unsafe { T::load(host) })
    }

    /// Reads the instruction's memory operand.
    #[inline(always)]
    pub fn read_hit<T: Ram>(&self, insn: &Insn) -> Option<T> {
        self.read_hit_at(insn.seg, self.effective_address(insn))
    }

    /// Writes at an offset through a segment code; false if it did not.
    #[inline(always)]
    pub fn write_hit_at<T: Ram>(&mut self, code: u8, offset: u64, value: T) -> bool {
        let hit = self
            .unchecked_linear(code, offset)
            .and_then(|linear| self.tlb.write(self.tlb.set, linear, T::BYTES));
        if let Some(host) = hit {
            // SAFETY: a TLB hit is RAM of the map this processor holds.
            unsafe { value.store(host) };
        }
        hit.is_some()
    }

    /// Writes the instruction's memory operand; false if it did not.
    #[inline(always)]
    pub fn write_hit<T: Ram>(&mut self, insn: &Insn, value: T) -> bool {
        self.write_hit_at(insn.seg, self.effective_address(insn), value)
    }

    /// Replaces the instruction's memory operand by `f` of it, unless the instruction is locked.
    #[inline(always)]
    pub fn modify_hit<T: Ram, R>(&mut self, insn: &Insn, f: impl FnOnce(T) -> (T, R)) -> Option<R> {
        if insn.lock() {
            return None;
        }
        let linear = self.unchecked_linear(insn.seg, self.effective_address(insn))?;
        let host = self.tlb.write(self.tlb.set, linear, T::BYTES)?;
        // SAFETY: a TLB hit is RAM of the map this processor holds.
        let (new, r) = f(unsafe { T::load(host) });
        // SAFETY: as above.
        unsafe { new.store(host) };
        Some(r)
    }
}
