//! A stack being pushed to or popped from by a transfer that may still fault: the stack pointer is
//! kept here and written back when everything has succeeded.

use crate::cpu::Cpu;
use crate::decode::SEG_FLAT_SS;
use crate::descriptor::selector_error;
use crate::events::vector;
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::mmu::operand::in_limit;
use crate::state::{Segment, reg, seg};

/// A stack segment and a pointer into it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: Segment,
    pointer: u64,
    mask: u64,
    /// 64-bit: no segment; canonical addresses.
    long: bool,
    /// Belongs to a more privileged level than the current one.
    inner: bool,
    /// #SS error code.
    error: u32,
}

impl Stack {
    /// The stack in use.
    pub(crate) fn current(cpu: &Cpu) -> Self {
        let segment = cpu.state.seg[usize::from(seg::SS)];
        let long = cpu.state.code64();
        Self {
            segment,
            pointer: cpu.state.regs[reg::RSP],
            mask: mask(&segment, long),
            long,
            inner: false,
            error: 0,
        }
    }

    /// A stack for an inner level, from a 16- or 32-bit TSS.
    pub(crate) fn inner(cpu: &Cpu, segment: &Segment, pointer: u64, cpl: u8) -> Self {
        Self {
            segment: *segment,
            pointer,
            mask: mask(segment, false),
            long: false,
            inner: cpl < cpu.state.cpl(),
            error: selector_error(segment.selector),
        }
    }

    /// A stack of 64-bit mode.
    pub(crate) fn long(cpu: &Cpu, pointer: u64, inner: bool) -> Self {
        let segment = cpu.state.seg[usize::from(seg::SS)];
        Self {
            segment,
            pointer,
            mask: u64::MAX,
            long: true,
            inner,
            error: 0,
        }
    }

    /// Moves the pointer up (RET n).
    pub(crate) fn release(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes);
    }

    /// The linear address of an item, whose limit check is done here: the access itself then goes
    /// through the flat stack segment.
    fn linear(&self, cpu: &mut Cpu, offset: u64, size: usize) -> Result<u64, Stop> {
        if self.long {
            return Ok(offset);
        }
        if !in_limit(&self.segment, offset, size) {
            return Err(cpu.raise_error(vector::SS, self.error));
        }
        let linear = self.segment.base.wrapping_add(offset);
        Ok(linear & 0xffff_ffff)
    }

    /// Pushes a value.
    pub(crate) fn push<T: Ram>(&mut self, cpu: &mut Cpu, value: u64) -> Result<(), Stop> {
        let pointer = self.pointer.wrapping_sub(T::BYTES as u64);
        let linear = self.linear(cpu, pointer & self.mask, T::BYTES)?;
        let value = T::from_u64(value);
        if self.inner {
            self.canonical(cpu, linear)?;
            cpu.write_system(linear, value)?;
        } else {
            cpu.write_at(SEG_FLAT_SS, linear, value)?;
        }
        if cpu.delivering && cpu.io.has_writes() {
            // No instruction could retire with the write.
            cpu.io.drop_writes();
            return Err(Stop::Exit);
        }
        self.pointer = pointer;
        Ok(())
    }

    fn canonical(&self, cpu: &mut Cpu, linear: u64) -> Result<(), Stop> {
        if cpu.canonical(linear) {
            Ok(())
        } else {
            Err(cpu.raise_error(vector::SS, self.error))
        }
    }

    /// Pops a value.
    pub(crate) fn pop<T: Ram>(&mut self, cpu: &mut Cpu) -> Result<u64, Stop> {
        let linear = self.linear(cpu, self.pointer & self.mask, T::BYTES)?;
        let value = cpu.read_at::<T>(SEG_FLAT_SS, linear)?;
        self.pointer = self.pointer.wrapping_add(T::BYTES as u64);
        Ok(value.to_u64())
    }

    /// Makes this the stack pointer in use. Only the part that the stack's size covers changes.
    pub(crate) fn commit(&self, cpu: &mut Cpu) {
        let rsp = &mut cpu.state.regs[reg::RSP];
        *rsp = merge(*rsp, self.pointer, self.mask);
    }
}

/// RSP after a write to the part of it that `mask` covers: 32-bit writes clear the upper half.
pub(crate) fn merge(old: u64, new: u64, mask: u64) -> u64 {
    if mask == 0xffff {
        old & !mask | new & mask
    } else {
        new & mask
    }
}

/// The stack pointer's mask for a stack segment.
pub(crate) fn mask(segment: &Segment, code64: bool) -> u64 {
    if code64 {
        u64::MAX
    } else if segment.db() {
        0xffff_ffff
    } else {
        0xffff
    }
}
