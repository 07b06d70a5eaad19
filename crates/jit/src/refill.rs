//! What a missed check of the TLB's level 1 does before the instruction is left to the interpreter: a function
//! that looks behind level 1 (`crates/cpu/src/mmu/ready.rs`) and copies the entry it finds to level 1.

use anykvm_cpu::translator::{
    READY_COUNTS, READY_GLOBAL, READY_INDEX_MASK, TLB_ADDEND, TLB_INDEX_MASK, TLB_INDEX_SHIFT,
    TLB_NO_TAG, TLB_READ, TLB_WRITE,
};
use iced_x86::{Code, IcedError, Instruction, Register};

use crate::asm::{Asm, at, shared, slot};
use crate::regs::{POINTER, SCRATCH};
use crate::shared::Slot;

/// Generates the functions for reads and for writes; returns their positions.
///
/// In: R15 the level-1 entry for the first byte of an access; RCX the tag for its last byte. Out: ZF if the
/// entry is good for it now. They change nothing else.
pub fn refills(a: &mut Asm) -> Result<[usize; 2], IcedError> {
    Ok([refill(a, false)?, refill(a, true)?])
}

/// The offset in a table of the entry for the page in RCX, into a register.
fn index(a: &mut Asm, to: Register, mask: u32, table: Slot) -> Result<(), IcedError> {
    let low = Register::EAX + to.number() as u32;
    a.mov(to, POINTER)?;
    let shift = Instruction::with2(Code::Shr_rm64_imm8, to, TLB_INDEX_SHIFT)?;
    a.put(&shift)?;
    a.emit(Code::And_rm32_imm32, low, mask)?;
    a.emit(Code::Add_r64_rm64, to, slot(table))
}

fn refill(a: &mut Asm, write: bool) -> Result<usize, IcedError> {
    use Code as C;
    use Register as R;
    const ALL: i64 = READY_COUNTS + 4;
    let here = a.here();
    let (wanted, other) = if write {
        (TLB_WRITE, TLB_READ)
    } else {
        (TLB_READ, TLB_WRITE)
    };
    let saved = [(Slot::Refill0, R::RAX), (Slot::Refill1, R::RDX)];
    for (place, r) in saved {
        a.store(slot(place), r)?;
    }
    let op = |a: &mut Asm, insn: Result<Instruction, IcedError>| a.put(&insn?);
    let counted = |a: &mut Asm, field: i64| -> Result<_, IcedError> {
        let now = shared(Slot::ReadyCounts as i64 + field - READY_COUNTS);
        a.emit(C::Mov_r32_rm32, R::EDX, now)?;
        let then = at(R::RAX, field);
        a.emit(C::Cmp_r32_rm32, R::EDX, then)?;
        Ok(a.jne())
    };
    let mut misses = Vec::new();
    // An access that goes over the end of a page has another entry for its last byte.
    index(a, R::RDX, TLB_INDEX_MASK, Slot::Level1)?;
    op(a, Instruction::with2(C::Cmp_r64_rm64, R::RDX, SCRATCH))?;
    misses.push(a.jne());
    index(a, R::RAX, READY_INDEX_MASK, Slot::Ready)?;
    op(
        a,
        Instruction::with2(C::Cmp_r64_rm64, POINTER, at(R::RAX, wanted)),
    )?;
    let own = a.jcc(4);
    a.mov(R::RDX, POINTER)?;
    op(a, Instruction::with2(C::And_rm64_imm32, R::RDX, -4096i32))?;
    op(
        a,
        Instruction::with2(C::Or_rm64_imm32, R::RDX, READY_GLOBAL as i32),
    )?;
    op(
        a,
        Instruction::with2(C::Cmp_r64_rm64, R::RDX, at(R::RAX, wanted)),
    )?;
    misses.push(a.jne());
    a.land(own);
    misses.push(counted(a, ALL)?);
    if write {
        misses.push(counted(a, READY_COUNTS)?);
    }
    a.store(at(SCRATCH, wanted), POINTER)?;
    // The other right, if the entry has it.
    op(
        a,
        Instruction::with2(C::Mov_rm64_imm32, at(SCRATCH, other), TLB_NO_TAG),
    )?;
    a.load(R::RDX, at(R::RAX, other))?;
    op(a, Instruction::with2(C::Xor_r64_rm64, R::RDX, POINTER))?;
    op(a, Instruction::with2(C::Shr_rm64_imm8, R::RDX, 12))?;
    let mut without = vec![a.jne()];
    if !write {
        without.push(counted(a, READY_COUNTS)?);
    }
    a.store(at(SCRATCH, other), POINTER)?;
    for hole in without {
        a.land(hole);
    }
    a.load(R::RDX, at(R::RAX, TLB_ADDEND))?;
    a.store(at(SCRATCH, TLB_ADDEND), R::RDX)?;
    // ZF, for the caller.
    op(a, Instruction::with2(C::Cmp_r32_rm32, R::EAX, R::EAX))?;
    for hole in misses {
        a.land(hole);
    }
    for (place, r) in saved {
        a.load(r, slot(place))?;
    }
    op(a, Ok(Instruction::with(C::Retnq)))?;
    Ok(here)
}

/// Emits a call of a function of this code.
pub fn call(a: &mut Asm, to: usize) {
    let hole = a.call();
    a.fill(hole, to);
}
