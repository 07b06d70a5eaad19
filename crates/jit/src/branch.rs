//! Near branches, calls and returns of the code's own size.
//!
//! Inside a page branches are linked directly. Between pages, and for indirect branches, the current
//! view ([`crate::views`]) is asked; what it does not know the interpreter carries out.

use std::mem::offset_of;

use anykvm_cpu::Insn;
use iced_x86::{Code, FlowControl, IcedError, Instruction, MemoryOperand, OpKind, Register};

use crate::asm::{Asm, Hole, at, slot};
use crate::flags::Flags;
use crate::legacy::Word;
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
    use Code as C;
    let raw = &insn.raw;
    match (raw.flow_control(), raw.code()) {
        (FlowControl::ConditionalBranch, _)
            if raw.is_jcc_short_or_near()
                && matches!(raw.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32) =>
        {
            conditional(b, insn, site, last)
        }
        (_, C::Jmp_rel8_64 | C::Jmp_rel32_64 | C::Jmp_rel8_32 | C::Jmp_rel32_32) => {
            jump(b, insn, site)
        }
        (_, C::Call_rel32_64 | C::Call_rel32_32) => call(b, insn, site),
        (_, C::Jmp_rm64 | C::Jmp_rm32) => jump_indirect(b, insn, site),
        (_, C::Call_rm64 | C::Call_rm32) => call_indirect(b, insn, site),
        (_, C::Retnq | C::Retnq_imm16 | C::Retnd | C::Retnd_imm16) => ret(b, insn, site),
        _ => Ok(Done::Unsupported),
    }
}

fn target(insn: &Insn, site: Site) -> i64 {
    let displacement = Word::of(insn).sign_extend(insn.imm);
    site.next.wrapping_add(displacement)
}

/// A target's offset, if it is near enough: as a displacement, with which addresses of the code's size wrap
/// around.
fn displacement(b: &Block, to: i64) -> Option<i64> {
    let d = b.word.sign_extend(to as u64);
    i32::try_from(d).is_ok().then_some(d)
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
    let Some(displacement) = displacement(b, to) else {
        let hole = b.a.jmp();
        b.leave_from(vec![hole], site);
        return Ok(());
    };
    b.flags.release(&mut b.a)?;
    relative(b, displacement)?;
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
    // Behind the last byte of 4 GiB there is no wrap: that RIP is beyond every limit.
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.a.lea(SCRATCH, at(SCRATCH, offset))?;
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

/// Puts the RIP at an offset from the page into R15.
fn relative(b: &mut Block, offset: i64) -> Result<(), IcedError> {
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.word.lea(&mut b.a, SCRATCH, at(SCRATCH, offset))
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
    let word = b.word;
    let checked = b.check_stack(GUEST_RSP, -word.bytes(), Use::Write, site)?;
    let to = b.operand(&checked, word == Word::Double)?;
    relative(b, site.next)?;
    b.access(&checked);
    word.store(&mut b.a, to, SCRATCH)
}

/// Puts the flags into the host's, then moves the stack pointer.
fn move_stack(b: &mut Block, by: i64) -> Result<(), IcedError> {
    b.flags.restore(&mut b.a)?;
    b.flags = Flags::Host(None);
    b.word.lea(&mut b.a, GUEST_RSP, at(GUEST_RSP, by))
}

fn call(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        push_return(b, site)?;
        move_stack(b, -b.word.bytes())?;
        b.link_to(to)?;
        return Ok(Done::Ends);
    }
    let Some(displacement) = displacement(b, to) else {
        return Ok(Done::Unsupported);
    };
    b.flags.release(&mut b.a)?;
    relative(b, displacement)?;
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
    move_stack(b, -b.word.bytes())?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, slot(Slot::Entry))?)?;
    Ok(Done::Ends)
}

/// Puts the target of an indirect branch into R15; the flags are released. False if it cannot.
fn load_target(b: &mut Block, insn: &Insn, site: Site) -> Result<bool, IcedError> {
    let raw = &insn.raw;
    if raw.op0_kind() == OpKind::Register {
        b.flags.release(&mut b.a)?;
        match home(raw.op0_register().number()) {
            Home::Host(r) => b.word.mov(&mut b.a, SCRATCH, r)?,
            Home::Spilled(s) => b.a.load(SCRATCH, slot(s))?,
        }
        return Ok(true);
    }
    let Some(address) = Address::of(insn, site.next).filter(Address::is_plain) else {
        return Ok(false);
    };
    let word = b.word;
    let checked = b.check(&address, word.bytes() as usize, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    word.load(&mut b.a, SCRATCH, from)?;
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
    let word = b.word;
    let checked = b.check_stack(GUEST_RSP, 0, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    word.load(&mut b.a, SCRATCH, from)?;
    b.flags.release(&mut b.a)?;
    let miss = look_up(&mut b.a)?;
    b.leave_from(vec![miss], site);
    enter_page(&mut b.a)?;
    move_stack(b, word.bytes() + drop)?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, found())?)?;
    Ok(Done::Ends)
}
