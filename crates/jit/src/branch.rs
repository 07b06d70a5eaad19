//! Near branches, calls and returns of 64-bit code.
//!
//! Inside a page branches are linked directly. Between pages, and for indirect branches, the jump
//! cache is asked; what it does not know the interpreter carries out. It is asked without touching
//! the flags, which belong to the guest.

use anykvm_cpu::Insn;
use iced_x86::{Code, FlowControl, IcedError, Instruction, MemoryOperand, OpKind, Register};

use crate::asm::{Asm, Hole, at, slot};
use crate::flags::Flags;
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RSP, Home, POINTER, SCRATCH, bit, home};
use crate::shared::Slot;
use crate::translate::{Block, Cold, Done, Site, Wish};

/// Emits the instruction that ends a block.
pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    match (raw.flow_control(), raw.code()) {
        (FlowControl::ConditionalBranch, _)
            if raw.is_jcc_short_or_near() && raw.op0_kind() == OpKind::NearBranch64 =>
        {
            conditional(b, insn, site)
        }
        (_, Code::Jmp_rel8_64 | Code::Jmp_rel32_64) => {
            b.flags.restore(&mut b.a)?;
            go_to(b, insn, site)?;
            Ok(Done::Ends)
        }
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

fn conditional(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    b.flags.restore(&mut b.a)?;
    b.flags = Flags::Host(None);
    let condition = insn.raw.condition_code() as u8;
    let taken = b.a.jcc(jcc_number(condition));
    if in_page(site.next) {
        b.link_to(site.next)?;
    } else {
        jump_relative(b, site.next)?;
    }
    let to = target(insn, site);
    if in_page(to) {
        b.link(taken, to);
    } else {
        b.a.land(taken);
        go_to(b, insn, site)?;
    }
    Ok(Done::Ends)
}

/// From iced's numbering of conditions to the processor's.
fn jcc_number(condition: u8) -> u8 {
    // iced: None, o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g: the processor's order.
    condition.wrapping_sub(1) & 15
}

/// Goes to a direct branch's target. The flags are in the host's.
fn go_to(b: &mut Block, insn: &Insn, site: Site) -> Result<(), IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        return b.link_to(to);
    }
    let Ok(displacement) = i32::try_from(to) else {
        let hole = b.a.jmp();
        b.leave_from(vec![hole], site);
        return Ok(());
    };
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.a.lea(SCRATCH, at(SCRATCH, displacement.into()))?;
    let misses = look_up(&mut b.a)?;
    b.leave_from(misses, site);
    jump_to_entry(&mut b.a)
}

/// Goes on at an offset outside the page, to which no branch leads.
pub(crate) fn jump_relative(b: &mut Block, offset: i64) -> Result<(), IcedError> {
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.a.lea(SCRATCH, at(SCRATCH, offset))?;
    let misses = look_up(&mut b.a)?;
    let exit = b.new_exit(Wish::Request);
    b.cold.push(Cold {
        holes: misses,
        flags: Flags::Host(None),
        offset,
        exit,
    });
    jump_to_entry(&mut b.a)
}

fn jump_entry(field: Slot) -> MemoryOperand {
    MemoryOperand::new(
        Register::None,
        POINTER,
        8,
        field as i64,
        4,
        false,
        Register::GS,
    )
}

fn index(a: &mut Asm) -> Result<(), IcedError> {
    a.put(&Instruction::with2(
        Code::Movzx_r32_rm16,
        Register::ECX,
        Register::R15W,
    )?)?;
    // Entries have 32 bytes.
    a.lea(POINTER, crate::asm::indexed(Register::None, POINTER, 4, 0))
}

/// Asks the jump cache for the RIP in R15, which is put into [`Slot::Target`] too. Leaves the flags
/// alone; destroys RCX. Returns the branches to be taken if it is not known.
fn look_up(a: &mut Asm) -> Result<Vec<Hole>, IcedError> {
    a.store(slot(Slot::Target), SCRATCH)?;
    index(a)?;
    a.load(SCRATCH, jump_entry(Slot::JumpKey))?;
    a.load(POINTER, slot(Slot::Key))?;
    a.lea(POINTER, MemoryOperand::with_base_index(POINTER, SCRATCH))?;
    a.load(SCRATCH, slot(Slot::Target))?;
    let hit = a.jrcxz();
    let other_key = a.jmp();
    a.land_short(hit);
    index(a)?;
    a.load(POINTER, jump_entry(Slot::JumpRip))?;
    a.lea(POINTER, MemoryOperand::with_base_index(POINTER, SCRATCH))?;
    let hit = a.jrcxz();
    let other_rip = a.jmp();
    a.land_short(hit);
    Ok(vec![other_key, other_rip])
}

/// Jumps to the entry that [`look_up`] found, R15 being RIP still.
fn jump_to_entry(a: &mut Asm) -> Result<(), IcedError> {
    index(a)?;
    a.put(&Instruction::with1(
        Code::Jmp_rm64,
        jump_entry(Slot::JumpCode),
    )?)
}

/// Keeps the entry that [`look_up`] found, for [`jump_to_kept_entry`].
fn keep_entry(a: &mut Asm) -> Result<(), IcedError> {
    index(a)?;
    a.load(POINTER, jump_entry(Slot::JumpCode))?;
    a.store(slot(Slot::Entry), POINTER)
}

fn jump_to_kept_entry(a: &mut Asm) -> Result<(), IcedError> {
    a.load(SCRATCH, slot(Slot::Target))?;
    a.put(&Instruction::with1(Code::Jmp_rm64, slot(Slot::Entry))?)
}

/// Pushes the return address; leaves the flags in the host's.
fn push_return(b: &mut Block, site: Site) -> Result<(), IcedError> {
    let address = Address::stack(GUEST_RSP, -8);
    let checked = b.check(&address, 8, Use::Write, site)?;
    b.flags.restore(&mut b.a)?;
    let to = b.operand(&checked, false)?;
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.a.lea(SCRATCH, at(SCRATCH, site.next))?;
    b.access(&checked);
    b.a.store(to, SCRATCH)?;
    b.a.lea(GUEST_RSP, at(GUEST_RSP, -8))?;
    b.flags = Flags::Host(None);
    Ok(())
}

fn call(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        push_return(b, site)?;
        b.link_to(to)?;
        return Ok(Done::Ends);
    }
    let Ok(displacement) = i32::try_from(to) else {
        return Ok(Done::Unsupported);
    };
    b.a.load(SCRATCH, slot(Slot::Page))?;
    b.a.lea(SCRATCH, at(SCRATCH, displacement.into()))?;
    let misses = look_up(&mut b.a)?;
    b.leave_from(misses, site);
    keep_entry(&mut b.a)?;
    push_return(b, site)?;
    jump_to_kept_entry(&mut b.a)?;
    Ok(Done::Ends)
}

/// Puts the target of an indirect branch into R15. False if it cannot.
fn load_target(b: &mut Block, insn: &Insn, site: Site) -> Result<bool, IcedError> {
    let raw = &insn.raw;
    if raw.op0_kind() == OpKind::Register {
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
    b.flags.restore(&mut b.a)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    b.a.load(SCRATCH, from)?;
    Ok(true)
}

fn jump_indirect(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    b.flags.restore(&mut b.a)?;
    if !load_target(b, insn, site)? {
        return Ok(Done::Unsupported);
    }
    let misses = look_up(&mut b.a)?;
    b.leave_from(misses, site);
    jump_to_entry(&mut b.a)?;
    Ok(Done::Ends)
}

fn call_indirect(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if !load_target(b, insn, site)? {
        return Ok(Done::Unsupported);
    }
    let misses = look_up(&mut b.a)?;
    b.leave_from(misses, site);
    keep_entry(&mut b.a)?;
    push_return(b, site)?;
    jump_to_kept_entry(&mut b.a)?;
    Ok(Done::Ends)
}

fn ret(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let drop = if insn.raw.op_count() == 1 {
        i64::from(insn.raw.immediate16())
    } else {
        0
    };
    let address = Address::stack(GUEST_RSP, 0);
    let checked = b.check(&address, 8, Use::Read, site)?;
    b.flags.restore(&mut b.a)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    b.a.load(SCRATCH, from)?;
    let misses = look_up(&mut b.a)?;
    b.leave_from(misses, site);
    b.flags.before_write(&mut b.a, bit(GUEST_RSP))?;
    b.a.lea(GUEST_RSP, at(GUEST_RSP, 8 + drop))?;
    jump_to_entry(&mut b.a)?;
    Ok(Done::Ends)
}
