//! Windows: what the checks of a loop found last.
//!
//! A check of the TLB's level 1 takes ten instructions, and in a loop most often finds the page it
//! found the time before. So each check of a loop has a *window* of its own, a range of linear
//! addresses whose bytes may be accessed and the addend that leads to them, and asks only whether its
//! bytes begin in there; that is half as long. What is not in the window a function looks up in level 1
//! ([`probes`]) and makes the window.
//!
//! There are fewer windows than checks of loops, so several checks may use one, and what one of them put
//! there serves the others. Therefore windows are of *kinds*: for reads or for writes, and for accesses up
//! to a size, which is what the limit leaves room for. Of one translation no two checks have the same
//! window.
//!
//! A window is a copy of a TLB entry, so it must not outlive what the entry rests on: all are emptied
//! when translated code is entered after the TLB dropped something, or for another address space or
//! other rights ([`Windows::empty_if_changed`]). User and supervisor code have windows of their own.

use anykvm_cpu::translator::{TLB_ADDEND, TLB_INDEX_MASK, TLB_INDEX_SHIFT, TLB_READ, TLB_WRITE};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use std::mem::offset_of;

use crate::asm::{Asm, at, shared, slot};
use crate::memory::{Bytes, Use};
use crate::refill;
use crate::regs::SCRATCH;
use crate::shared::{Shared, Slot};

/// Sizes of accesses, and for how many windows there are of each: for reads, and again for writes.
const SIZES: [(usize, u8); 5] = [(8, 128), (16, 48), (32, 16), (64, 16), (512, 48)];
/// Windows for reads of the code of one privilege.
const READS: usize = 256;
/// Windows of the code of one privilege.
const WINDOWS: usize = 2 * READS;

const _: () = {
    let (mut sum, mut n) = (0, 0);
    while n < SIZES.len() {
        sum += SIZES[n].1 as usize;
        n += 1;
    }
    assert!(sum == READS);
};

/// Which windows are taken next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Next([[u8; SIZES.len()]; 2]);

/// The windows that a translation takes.
#[derive(Clone, Debug)]
pub struct Taken {
    next: Next,
    taken: [[u8; SIZES.len()]; 2],
    user: bool,
}

impl Taken {
    /// None yet.
    pub fn new(next: Next, user: bool) -> Self {
        Self {
            next,
            taken: Default::default(),
            user,
        }
    }

    /// A window for an access, and the size it is for; `None` if the translation has all of that kind.
    pub fn take(&mut self, bytes: &Bytes) -> Option<(u32, usize)> {
        let write = usize::from(bytes.usage != Use::Read);
        let kind = SIZES.iter().position(|(size, _)| bytes.count <= *size)?;
        let (size, all) = SIZES[kind];
        let taken = &mut self.taken[write][kind];
        if *taken == all {
            return None;
        }
        *taken += 1;
        let next = &mut self.next.0[write][kind];
        let number = *next;
        *next = (number + 1) % all;
        let before: usize = SIZES[..kind].iter().map(|(_, n)| usize::from(*n)).sum();
        let first = usize::from(self.user) * WINDOWS + write * READS + before;
        Some(((first + usize::from(number)) as u32, size))
    }

    /// Which are taken next, by another translation.
    pub fn next(&self) -> Next {
        self.next
    }
}

/// Windows that share a bit of [`Windows::touched`].
const TOGETHER: usize = WINDOWS / 64;

/// A range of linear addresses.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub struct Window {
    /// Its page.
    start: u64,
    /// How many bytes may be the first of those the check is for; 0 if it is empty.
    limit: u64,
    /// Host address minus linear address.
    addend: u64,
}

/// The windows of a processor.
#[derive(Debug)]
#[repr(C)]
pub struct Windows {
    /// Supervisor code's, then user code's.
    all: [Window; 2 * WINDOWS],
    /// For each privilege a bit for each [`TOGETHER`] of its windows: some may not be empty.
    touched: [u64; 2],
    /// What they rest on: see [`Windows::empty_if_changed`].
    rest_on: [(u64, u64, u64); 2],
}

impl Windows {
    /// Empties the windows of code of a privilege, unless what they rest on is the same still: the TLB's
    /// count of dropped entries, the address space, and the rights ([`anykvm_cpu::Cpu::tlb_state`]). True
    /// if it did.
    pub fn empty_if_changed(&mut self, user: bool, now: (u64, u64, u64)) -> bool {
        let n = usize::from(user);
        let changed = self.rest_on[n] != now;
        if changed {
            self.rest_on[n] = now;
            let mut touched = std::mem::take(&mut self.touched[n]);
            while touched != 0 {
                let first = n * WINDOWS + touched.trailing_zeros() as usize * TOGETHER;
                self.all[first..first + TOGETHER].fill(Window::default());
                touched &= touched - 1;
            }
        }
        changed
    }
}

/// Offset of a window in [`Shared`].
fn window(number: u32, field: usize) -> i64 {
    let first = offset_of!(Shared, windows) + offset_of!(Windows, all);
    (first + number as usize * size_of::<Window>() + field) as i64
}

/// Where a window's addend is.
pub fn addend(number: u32) -> i64 {
    window(number, offset_of!(Window, addend))
}

/// Emits what asks whether the linear address in R15 is in a window; leaves its distance from the window's
/// start, which is a page's, there. The branch that is taken if not is JAE.
pub fn compare(a: &mut Asm, number: u32) -> Result<(), IcedError> {
    let start = shared(window(number, offset_of!(Window, start)));
    let limit = shared(window(number, offset_of!(Window, limit)));
    a.emit(Code::Sub_r64_rm64, SCRATCH, start)?;
    a.emit(Code::Cmp_r64_rm64, SCRATCH, limit)
}

/// What a probe is asked: bytes less one, size of the window's kind less one, window.
const FIELD: u32 = 9;
const FIELD_MASK: u32 = (1 << FIELD) - 1;

/// Emits what goes before the call of a probe, behind [`compare`]. `size` is that of the window's kind.
pub fn prepare_probe(
    a: &mut Asm,
    number: u32,
    size: usize,
    bytes: &Bytes,
) -> Result<(), IcedError> {
    let start = shared(window(number, offset_of!(Window, start)));
    a.emit(Code::Add_r64_rm64, SCRATCH, start)?;
    let what = number << (2 * FIELD) | (size as u32 - 1) << FIELD | (bytes.count as u32 - 1);
    a.emit(Code::Mov_r32_imm32, Register::ECX, what)
}

fn filled(field: usize) -> MemoryOperand {
    MemoryOperand::new(
        Register::None,
        Register::RAX,
        1,
        window(0, field),
        4,
        false,
        Register::GS,
    )
}

/// Generates the functions that fill a window for reads and for writes; returns their positions.
///
/// In: R15 the linear address of the first byte; ECX as [`prepare_probe`] makes it. Out: ZF if the bytes are in one page that the TLB has; then R15 is the first one's offset
/// in the page, and RCX the addend. They change nothing else.
///
/// `refills`: what [`refill::refills`] has generated.
pub fn probes(a: &mut Asm, refills: [usize; 2]) -> Result<[usize; 2], IcedError> {
    Ok([
        probe(a, TLB_READ, refills[0])?,
        probe(a, TLB_WRITE, refills[1])?,
    ])
}

fn probe(a: &mut Asm, tag: i64, refill: usize) -> Result<usize, IcedError> {
    use Code as C;
    use Register as R;
    let here = a.here();
    let saved = [(Slot::Probe0, R::RAX), (Slot::Probe1, R::RDX)];
    for (place, r) in saved {
        a.store(slot(place), r)?;
    }
    let what = slot(Slot::Probe2);
    a.store(what, R::RCX)?;
    let op = |a: &mut Asm, insn: Result<Instruction, IcedError>| a.put(&insn?);
    op(a, Instruction::with2(C::Mov_r32_rm32, R::EAX, R::ECX))?;
    op(a, Instruction::with2(C::Shr_rm32_imm8, R::EAX, 2 * FIELD))?;
    // The tag of the last byte, and the entry of the first.
    op(a, Instruction::with2(C::Mov_r32_rm32, R::EDX, R::ECX))?;
    op(a, Instruction::with2(C::And_rm32_imm32, R::EDX, FIELD_MASK))?;
    a.lea(R::RDX, MemoryOperand::with_base_index(R::RDX, SCRATCH))?;
    op(a, Instruction::with2(C::And_rm64_imm32, R::RDX, -4096i32))?;
    op(
        a,
        Instruction::with2(C::Or_r64_rm64, R::RDX, slot(Slot::Asn)),
    )?;
    a.mov(R::RCX, SCRATCH)?;
    op(
        a,
        Instruction::with2(C::Shr_rm64_imm8, R::RCX, TLB_INDEX_SHIFT),
    )?;
    op(
        a,
        Instruction::with2(C::And_rm32_imm32, R::ECX, TLB_INDEX_MASK),
    )?;
    op(
        a,
        Instruction::with2(C::Add_r64_rm64, R::RCX, slot(Slot::Level1)),
    )?;
    op(
        a,
        Instruction::with2(C::Cmp_r64_rm64, R::RDX, at(R::RCX, tag)),
    )?;
    let miss = a.jne();
    let hit = a.here();
    let size = size_of::<Window>().trailing_zeros();
    op(a, Instruction::with2(C::Shl_rm32_imm8, R::EAX, size))?;
    op(a, Instruction::with2(C::Mov_r32_rm32, R::EDX, what))?;
    op(a, Instruction::with2(C::Shr_rm32_imm8, R::EDX, FIELD))?;
    op(a, Instruction::with2(C::And_rm32_imm32, R::EDX, FIELD_MASK))?;
    // 4095 - n, plus one.
    op(a, Instruction::with2(C::Xor_rm32_imm32, R::EDX, 0xfff))?;
    a.lea(R::RDX, at(R::RDX, 1))?;
    a.store(filled(offset_of!(Window, limit)), R::RDX)?;
    a.mov(R::RDX, SCRATCH)?;
    op(a, Instruction::with2(C::And_rm64_imm32, R::RDX, -4096i32))?;
    a.store(filled(offset_of!(Window, start)), R::RDX)?;
    a.load(R::RCX, at(R::RCX, TLB_ADDEND))?;
    a.store(filled(offset_of!(Window, addend)), R::RCX)?;
    let together = size + TOGETHER.trailing_zeros();
    op(a, Instruction::with2(C::Shr_rm32_imm8, R::EAX, together))?;
    let touched = (offset_of!(Shared, windows) + offset_of!(Windows, touched)) as i64;
    let bit = MemoryOperand::new(R::None, R::None, 1, touched, 8, false, R::GS);
    op(a, Instruction::with2(C::Bts_rm64_r64, bit, R::RAX))?;
    op(a, Instruction::with2(C::And_rm32_imm32, R::R15D, 0xfff))?;
    // ZF, for the caller.
    op(a, Instruction::with2(C::Cmp_r32_rm32, R::EAX, R::EAX))?;
    let done = a.here();
    for (place, r) in saved {
        a.load(r, slot(place))?;
    }
    a.put(&Instruction::with(C::Retnq))?;
    a.land(miss);
    a.store(slot(Slot::Probe3), SCRATCH)?;
    a.mov(SCRATCH, R::RCX)?;
    a.mov(R::RCX, R::RDX)?;
    refill::call(a, refill);
    a.mov(R::RCX, SCRATCH)?;
    a.load(SCRATCH, slot(Slot::Probe3))?;
    let found = a.jcc(4);
    a.fill(found, hit);
    let missed = a.jmp();
    a.fill(missed, done);
    Ok(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever windows are taken, one is used only by accesses of one kind, and by one check of a translation.
    #[test]
    fn a_window_is_of_one_kind() {
        let mut kinds = std::collections::HashMap::new();
        let mut next = [Next::default(); 2];
        for _ in 0..50 {
            for user in [false, true] {
                let mut taken = Taken::new(next[usize::from(user)], user);
                let mut numbers = std::collections::HashSet::new();
                for count in (1..=512).chain(1..=512) {
                    for usage in [Use::Read, Use::Write, Use::Atomic] {
                        let bytes = Bytes {
                            from: 0,
                            count,
                            usage,
                            align: 1,
                        };
                        let Some((number, size)) = taken.take(&bytes) else {
                            continue;
                        };
                        assert!(numbers.insert(number), "{number} twice");
                        assert!(count <= size && (number as usize) < 2 * WINDOWS);
                        let kind = (user, usage != Use::Read, size);
                        assert_eq!(*kinds.entry(number).or_insert(kind), kind);
                    }
                }
                next[usize::from(user)] = taken.next();
            }
        }
    }
}
