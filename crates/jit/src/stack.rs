//! PUSH, POP and LEAVE of the code's own size.

use anykvm_cpu::Insn;
use iced_x86::{Code, IcedError, Register};

use crate::asm::{at, slot};
use crate::legacy::Word;
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RSP, Home, SCRATCH, bit, home};
use crate::shared::Slot;
use crate::translate::{Block, Done, Site};

/// Emits PUSH.
pub(crate) fn push(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    use Code as C;
    let raw = &insn.raw;
    let immediate = match raw.code() {
        C::Push_r64 | C::Push_r32 => None,
        C::Pushq_imm8 | C::Pushq_imm32 | C::Pushd_imm8 | C::Pushd_imm32 => Some(insn.imm as i32),
        C::Push_rm64 | C::Push_rm32 => return push_memory(b, insn, site),
        _ => return Ok(Done::Unsupported),
    };
    let checked = b.check_stack(GUEST_RSP, -b.word.bytes(), Use::Write, site)?;
    let to = b.operand(&checked, false)?;
    let from = match home(raw.op0_register().number()) {
        Home::Host(r) => r,
        Home::Spilled(s) => {
            if immediate.is_none() {
                b.a.load(SCRATCH, slot(s))?;
            }
            SCRATCH
        }
    };
    b.access(&checked);
    match immediate {
        Some(v) => {
            let code = match b.word {
                Word::Quad => C::Mov_rm64_imm32,
                Word::Double => C::Mov_rm32_imm32,
            };
            b.a.emit(code, to, v)?;
        }
        None => b.word.store(&mut b.a, to, from)?,
    }
    end_push(b, checked.exit)
}

/// The end of a push, whose store has been made: moves the stack pointer.
pub(crate) fn end_push(b: &mut Block, exit: usize) -> Result<Done, IcedError> {
    b.before_write(bit(GUEST_RSP), Some(exit), true)?;
    b.word
        .lea(&mut b.a, GUEST_RSP, at(GUEST_RSP, -b.word.bytes()))?;
    b.resume_here(exit);
    Ok(Done::Next)
}

/// PUSH of memory. A store that misses leaves the instruction to the interpreter, load included. A load that
/// misses does not come back here: what is put aside at the end, only one exit can.
fn push_memory(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let word = b.word;
    let Some(from) = Address::of(insn, site.next).filter(Address::is_plain) else {
        return Ok(Done::Unsupported);
    };
    let checked = b.check(&from, word.bytes() as usize, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    word.load(&mut b.a, SCRATCH, from)?;
    b.a.store(slot(Slot::Target), SCRATCH)?;
    let checked = b.check_stack(GUEST_RSP, -word.bytes(), Use::Write, site)?;
    let to = b.operand(&checked, true)?;
    b.a.load(SCRATCH, slot(Slot::Target))?;
    b.access(&checked);
    word.store(&mut b.a, to, SCRATCH)?;
    end_push(b, checked.exit)
}

/// Emits POP.
pub(crate) fn pop(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    if !matches!(raw.code(), Code::Pop_r64 | Code::Pop_r32) {
        return Ok(Done::Unsupported);
    }
    let rsp = GUEST_RSP;
    let word = b.word;
    let checked = b.check_stack(rsp, 0, Use::Read, site)?;
    let target = home(raw.op0_register().number());
    let written = match target {
        Home::Host(r) => bit(r) | bit(rsp),
        Home::Spilled(_) => bit(rsp),
    };
    b.before_write(written, Some(checked.exit), true)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    match target {
        Home::Host(r) => word.load(&mut b.a, r, from)?,
        Home::Spilled(s) => {
            b.a.load(SCRATCH, from)?;
            b.a.store(slot(s), SCRATCH)?;
        }
    }
    if target != Home::Host(rsp) {
        word.lea(&mut b.a, rsp, at(rsp, word.bytes()))?;
    }
    b.resume_here(checked.exit);
    Ok(Done::Next)
}

/// Emits LEAVE.
pub(crate) fn leave(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if !matches!(insn.raw.code(), Code::Leaveq | Code::Leaved) {
        return Ok(Done::Unsupported);
    }
    let (rsp, rbp) = (GUEST_RSP, Register::RBP);
    let word = b.word;
    let checked = b.check_stack(rbp, 0, Use::Read, site)?;
    b.before_write(bit(rsp) | bit(rbp), Some(checked.exit), true)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    word.load(&mut b.a, SCRATCH, from)?;
    word.lea(&mut b.a, rsp, at(rbp, word.bytes()))?;
    b.a.mov(rbp, SCRATCH)?;
    b.resume_here(checked.exit);
    Ok(Done::Next)
}
