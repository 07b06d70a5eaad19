//! Near branches, calls and returns of 64-bit code.
//!
//! Inside a page branches are linked directly. Between pages, and for indirect branches, the current
//! view ([`crate::views`]) is asked; what it does not know the interpreter carries out.

use std::mem::offset_of;

use anykvm_cpu::Insn;
use iced_x86::{Code, FlowControl, IcedError, Instruction, MemoryOperand, OpKind, Register};

use crate::asm::{Asm, Hole, at, slot};
use crate::flags::Flags;
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RSP, Home, POINTER, SCRATCH, home};
use crate::shared::Slot;
use crate::translate::{Block, Cold, Done, Site, Wish};
use crate::views::Jump;

/// A conditional branch to another page, to be carried out behind the block.
pub(crate) struct Late {
    hole: Hole,
    to: i64,
    site: Site,
    flags: Flags,
}

/// Emits an instruction that branches. `last`: it is the block's last one.
pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site, last: bool) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    match (raw.flow_control(), raw.code()) {
        (FlowControl::ConditionalBranch, _)
            if raw.is_jcc_short_or_near() && raw.op0_kind() == OpKind::NearBranch64 =>
        {
            conditional(b, insn, site, last)
        }
        (_, Code::Jmp_rel8_64 | Code::Jmp_rel32_64) => jump(b, insn, site),
        (_, Code::Call_rel32_64) => call(b, insn, site),
        (_, Code::Jmp_rm64) => jump_indirect(b, insn, site),
        (_, Code::Call_rm64) => call_indirect(b, insn, site),
        (_, Code::Retnq | Code::Retnq_imm16) => ret(b, insn, site),
        _ => Ok(Done::Unsupported),
    }
}

fn target(insn: &Insn, site: Site) -> i64 {
    site.next.wrapping_add(insn.imm as i64)
}

fn in_page(offset: i64) -> bool {
    (0..4096).contains(&offset)
}

fn conditional(b: &mut Block, insn: &Insn, site: Site, last: bool) -> Result<Done, IcedError> {
    b.flags.restore(&mut b.a)?;
    let condition = insn.raw.condition_code() as u8;
    let taken = b.a.jcc(jcc_number(condition));
    let to = target(insn, site);
    if in_page(to) {
        b.link(taken, to);
    } else {
        b.late.push(Late {
            hole: taken,
            to,
            site,
            flags: b.flags.clone(),
        });
    }
    if !last {
        return Ok(Done::Next);
    }
    go_on(b, site.next)?;
    Ok(Done::Ends)
}

/// Emits the branches that were put off.
pub(crate) fn emit_late(b: &mut Block) -> Result<(), IcedError> {
    for late in std::mem::take(&mut b.late) {
        b.a.land(late.hole);
        b.flags = late.flags;
        go_outside(b, late.to, late.site)?;
    }
    Ok(())
}

/// From iced's numbering of conditions to the processor's.
fn jcc_number(condition: u8) -> u8 {
    // iced: None, o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g: the processor's order.
    condition.wrapping_sub(1) & 15
}

fn jump(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        b.flags.restore(&mut b.a)?;
        b.link_to(to)?;
    } else {
        go_outside(b, to, site)?;
    }
    Ok(Done::Ends)
}

/// Carries out a direct branch to an offset outside the page.
fn go_outside(b: &mut Block, to: i64, site: Site) -> Result<(), IcedError> {
    let Ok(displacement) = i32::try_from(to) else {
        let hole = b.a.jmp();
        b.leave_from(vec![hole], site);
        return Ok(());
    };
    b.flags.release(&mut b.a)?;
    relative(&mut b.a, displacement.into())?;
    let miss = look_up(&mut b.a)?;
    b.leave_from(vec![miss], site);
    jump_to_found(b)
}

/// Goes on at an offset, in the page or behind it, to which no branch leads.
pub(crate) fn go_on(b: &mut Block, offset: i64) -> Result<(), IcedError> {
    if in_page(offset) {
        b.flags.restore(&mut b.a)?;
        return b.link_to(offset);
    }
    b.flags.release(&mut b.a)?;
    relative(&mut b.a, offset)?;
    let miss = look_up(&mut b.a)?;
    let exit = b.new_exit(Wish::Request);
    b.cold.push(Cold {
        holes: vec![miss],
        flags: b.flags.clone(),
        offset,
        exit,
        aside: None,
    });
    jump_to_found(b)
}

/// Puts the linear address of an offset from the page into R15.
fn relative(a: &mut Asm, offset: i64) -> Result<(), IcedError> {
    a.load(SCRATCH, slot(Slot::Page))?;
    a.lea(SCRATCH, at(SCRATCH, offset))
}

/// Looks the RIP in R15 up in the current view. Destroys the flags; leaves the address of the view's
/// entry in RCX. Returns the branch that is taken if it is another RIP's.
fn look_up(a: &mut Asm) -> Result<Hole, IcedError> {
    let index = Instruction::with2(Code::Movzx_r32_rm16, Register::ECX, Register::R15W)?;
    a.put(&index)?;
    a.put(&Instruction::with2(
        Code::Shl_rm32_imm8,
        Register::ECX,
        size_of::<Jump>().trailing_zeros(),
    )?)?;
    let table = slot(Slot::Jumps);
    a.put(&Instruction::with2(Code::Add_r64_rm64, POINTER, table)?)?;
    let rip = at(POINTER, offset_of!(Jump, rip) as i64);
    a.put(&Instruction::with2(Code::Cmp_r64_rm64, SCRATCH, rip)?)?;
    Ok(a.jne())
}

fn found() -> MemoryOperand {
    at(POINTER, offset_of!(Jump, code) as i64)
}

/// The page of the RIP in R15 becomes the current one. Destroys the flags.
fn enter_page(a: &mut Asm) -> Result<(), IcedError> {
    a.put(&Instruction::with2(
        Code::And_rm64_imm32,
        SCRATCH,
        -4096i32,
    )?)?;
    a.store(slot(Slot::Page), SCRATCH)
}

/// Goes to what [`look_up`] found.
fn jump_to_found(b: &mut Block) -> Result<(), IcedError> {
    enter_page(&mut b.a)?;
    b.flags.restore(&mut b.a)?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, found())?)
}

/// Stores the return address, before the stack pointer is moved. The flags are released afterwards.
fn push_return(b: &mut Block, site: Site) -> Result<(), IcedError> {
    let address = Address::stack(GUEST_RSP, -8);
    let checked = b.check(&address, 8, Use::Write, site)?;
    let to = b.operand(&checked, false)?;
    relative(&mut b.a, site.next)?;
    b.access(&checked);
    b.a.store(to, SCRATCH)
}

/// Puts the flags into the host's, then moves the stack pointer.
fn move_stack(b: &mut Block, by: i64) -> Result<(), IcedError> {
    b.flags.restore(&mut b.a)?;
    b.flags = Flags::Host(None);
    b.a.lea(GUEST_RSP, at(GUEST_RSP, by))
}

fn call(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        push_return(b, site)?;
        move_stack(b, -8)?;
        b.link_to(to)?;
        return Ok(Done::Ends);
    }
    let Ok(displacement) = i32::try_from(to) else {
        return Ok(Done::Unsupported);
    };
    b.flags.release(&mut b.a)?;
    relative(&mut b.a, displacement.into())?;
    call_scratch(b, site)
}

/// Carries out a call to the RIP in R15. What can go wrong with the target comes before the push.
fn call_scratch(b: &mut Block, site: Site) -> Result<Done, IcedError> {
    let miss = look_up(&mut b.a)?;
    b.leave_from(vec![miss], site);
    b.a.load(POINTER, found())?;
    b.a.store(slot(Slot::Entry), POINTER)?;
    b.a.store(slot(Slot::Target), SCRATCH)?;
    push_return(b, site)?;
    b.flags.release(&mut b.a)?;
    b.a.load(SCRATCH, slot(Slot::Target))?;
    enter_page(&mut b.a)?;
    move_stack(b, -8)?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, slot(Slot::Entry))?)?;
    Ok(Done::Ends)
}

/// Puts the target of an indirect branch into R15; the flags are released. False if it cannot.
fn load_target(b: &mut Block, insn: &Insn, site: Site) -> Result<bool, IcedError> {
    let raw = &insn.raw;
    if raw.op0_kind() == OpKind::Register {
        b.flags.release(&mut b.a)?;
        match home(raw.op0_register().number()) {
            Home::Host(r) => b.a.mov(SCRATCH, r)?,
            Home::Spilled(s) => b.a.load(SCRATCH, slot(s))?,
        }
        return Ok(true);
    }
    let Some(address) = Address::of(insn, site.next).filter(Address::is_plain) else {
        return Ok(false);
    };
    let checked = b.check(&address, 8, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    b.a.load(SCRATCH, from)?;
    b.flags.release(&mut b.a)?;
    Ok(true)
}

fn jump_indirect(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if !load_target(b, insn, site)? {
        return Ok(Done::Unsupported);
    }
    let miss = look_up(&mut b.a)?;
    b.leave_from(vec![miss], site);
    jump_to_found(b)?;
    Ok(Done::Ends)
}

fn call_indirect(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if !load_target(b, insn, site)? {
        return Ok(Done::Unsupported);
    }
    call_scratch(b, site)
}

fn ret(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let drop = if insn.raw.op_count() == 1 {
        i64::from(insn.raw.immediate16())
    } else {
        0
    };
    let address = Address::stack(GUEST_RSP, 0);
    let checked = b.check(&address, 8, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    b.a.load(SCRATCH, from)?;
    b.flags.release(&mut b.a)?;
    let miss = look_up(&mut b.a)?;
    b.leave_from(vec![miss], site);
    enter_page(&mut b.a)?;
    move_stack(b, 8 + drop)?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, found())?)?;
    Ok(Done::Ends)
}
