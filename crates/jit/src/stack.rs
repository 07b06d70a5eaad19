//! PUSH, POP and LEAVE of 64-bit code.

use anykvm_cpu::Insn;
use iced_x86::{Code, IcedError, Instruction, Register};

use crate::asm::{at, slot};
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RSP, Home, SCRATCH, bit, home};
use crate::translate::{Block, Done, Site};

/// Emits PUSH.
pub(crate) fn push(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    use Code as C;
    let raw = &insn.raw;
    let immediate = match raw.code() {
        C::Push_r64 => None,
        C::Pushq_imm8 | C::Pushq_imm32 => Some(insn.imm as i32),
        _ => return Ok(Done::Unsupported),
    };
    let address = Address::stack(GUEST_RSP, -8);
    let checked = b.check(&address, 8, Use::Write, site)?;
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
        Some(v) => b.a.put(&Instruction::with2(C::Mov_rm64_imm32, to, v)?)?,
        None => b.a.store(to, from)?,
    }
    b.before_write(bit(GUEST_RSP), Some(checked.exit), true)?;
    b.a.lea(GUEST_RSP, at(GUEST_RSP, -8))?;
    b.resume_here(checked.exit);
    Ok(Done::Next)
}

/// Emits POP.
pub(crate) fn pop(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    if raw.code() != Code::Pop_r64 {
        return Ok(Done::Unsupported);
    }
    let rsp = GUEST_RSP;
    let address = Address::stack(rsp, 0);
    let checked = b.check(&address, 8, Use::Read, site)?;
    let target = home(raw.op0_register().number());
    let written = match target {
        Home::Host(r) => bit(r) | bit(rsp),
        Home::Spilled(_) => bit(rsp),
    };
    b.before_write(written, Some(checked.exit), true)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    match target {
        Home::Host(r) => b.a.load(r, from)?,
        Home::Spilled(s) => {
            b.a.load(SCRATCH, from)?;
            b.a.store(slot(s), SCRATCH)?;
        }
    }
    if target != Home::Host(rsp) {
        b.a.lea(rsp, at(rsp, 8))?;
    }
    b.resume_here(checked.exit);
    Ok(Done::Next)
}

/// Emits LEAVE.
pub(crate) fn leave(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if insn.raw.code() != Code::Leaveq {
        return Ok(Done::Unsupported);
    }
    let (rsp, rbp) = (GUEST_RSP, Register::RBP);
    let address = Address::stack(rbp, 0);
    let checked = b.check(&address, 8, Use::Read, site)?;
    b.before_write(bit(rsp) | bit(rbp), Some(checked.exit), true)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    b.a.load(SCRATCH, from)?;
    b.a.lea(rsp, at(rbp, 8))?;
    b.a.mov(rbp, SCRATCH)?;
    b.resume_here(checked.exit);
    Ok(Done::Next)
}
