//! System instructions of 64-bit code: CLI, STI, PUSHFQ, SWAPGS; and where SYSCALL and SYSRET begin
//! ([`crate::syscall`]).
//!
//! The mode is part of what a translation is made for, so the privilege level need not be looked at.
//! Instructions that are executed alone (TF, breakpoints, an interrupt shadow) never come here.

use std::mem::offset_of;

use anykvm_cpu::Insn;
use anykvm_cpu::events::{Events, SHADOW_STI};
use anykvm_cpu::state::{CpuState, Msrs, Segment, rflags, seg};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};

use crate::asm::{Asm, at, slot};
use crate::branch::relative;
use crate::legacy::Word;
use crate::memory::Use;
use crate::regs::{GUEST_RSP, POINTER, SCRATCH};
use crate::shared::Slot;
use crate::stack;
use crate::stubs::Stub;
use crate::syscall::{self, Change};
use crate::translate::{Block, Done, Site};

/// A field of the state, whose address R15 holds.
fn field(offset: usize) -> MemoryOperand {
    at(SCRATCH, offset as i64)
}

/// Whether it is a system instruction that is translated.
pub(crate) fn executes(code: Code) -> bool {
    matches!(
        code,
        Code::Cli | Code::Pushfq | Code::Sti | Code::Swapgs | Code::Syscall | Code::Sysretq
    )
}

/// Emits a system instruction.
pub(crate) fn emit(
    b: &mut Block,
    insn: &Insn,
    site: Site,
    later: &[Insn],
) -> Result<Done, IcedError> {
    let code = insn.raw.code();
    if b.word != Word::Quad || !executes(code) {
        return Ok(Done::Unsupported);
    }
    if b.user && code == Code::Syscall {
        return change(b, Change::Syscall, site);
    }
    if !b.supervisor {
        return Ok(Done::Unsupported);
    }
    match code {
        Code::Cli => cli(b),
        Code::Pushfq => pushf(b, site),
        Code::Sti => sti(b, site, later),
        Code::Sysretq => change(b, Change::Sysret, site),
        Code::Swapgs => swapgs(b),
        _ => Ok(Done::Unsupported),
    }
}

/// IOPL is never below CPL 0.
fn cli(b: &mut Block) -> Result<Done, IcedError> {
    b.flags.release(&mut b.a)?;
    b.a.load(SCRATCH, slot(Slot::State))?;
    b.a.emit(
        Code::And_rm32_imm32,
        field(offset_of!(CpuState, rflags)),
        !(rflags::IF as u32),
    )?;
    Ok(Done::Next)
}

/// Sets IF if nothing waits for that. There is no shadow to speak of then; but where the next instruction is
/// left to the interpreter the state has one ([`cast_shadow`]), so that whoever looks at it knows. Requests are
/// looked at behind that instruction at the earliest, as everywhere.
fn sti(b: &mut Block, site: Site, later: &[Insn]) -> Result<Done, IcedError> {
    use Register as R;
    // The shadow of a repeated string instruction would end behind its first part.
    if later
        .first()
        .is_none_or(|next| next.raw.is_string_instruction())
    {
        return Ok(Done::Unsupported);
    }
    b.flags.release(&mut b.a)?;
    let mut waits = Vec::new();
    syscall::nothing_waits(&mut b.a, &mut waits)?;
    b.leave_from(&waits, site);
    let flags = field(offset_of!(CpuState, rflags));
    b.a.load(SCRATCH, slot(Slot::State))?;
    b.a.emit(Code::Mov_r32_rm32, R::ECX, flags)?;
    b.a.emit(Code::Or_rm32_imm32, flags, rflags::IF as u32)?;
    // None if IF was set.
    b.a.emit(Code::And_rm32_imm32, R::ECX, rflags::IF as u32)?;
    b.a.emit(Code::Xor_rm32_imm32, R::ECX, rflags::IF as u32)?;
    let shift = rflags::IF.trailing_zeros() - SHADOW_STI.trailing_zeros();
    b.a.emit(Code::Shr_rm32_imm8, R::ECX, shift)?;
    b.a.store(slot(Slot::Shadow), POINTER)?;
    b.shadowed.push(site.k + 1);
    Ok(Done::Next)
}

/// Puts the shadow of the last STI into the state. Leaves the flags alone.
pub(crate) fn cast_shadow(a: &mut Asm) -> Result<(), IcedError> {
    let events = offset_of!(CpuState, events) + offset_of!(Events, shadow);
    a.load(SCRATCH, slot(Slot::State))?;
    a.load(POINTER, slot(Slot::Shadow))?;
    a.emit(Code::Mov_rm8_r8, field(events), Register::CL)
}

/// An instruction that changes the privilege level.
fn change(b: &mut Block, change: Change, site: Site) -> Result<Done, IcedError> {
    b.flags.restore(&mut b.a)?;
    if change == Change::Syscall {
        relative(&mut b.a, Word::Quad, site.next)?;
    }
    let otherwise = b.a.address();
    b.leave_from(&[otherwise], site);
    let jump = b.a.jmp();
    b.outward.push((jump, Stub::Change(change)));
    Ok(Done::Ends)
}

/// The status flags are the host's, the rest the state's. VM and RF are pushed as 0.
fn pushf(b: &mut Block, site: Site) -> Result<Done, IcedError> {
    const REST: u64 = !(rflags::STATUS | rflags::VM | rflags::RF);
    b.flags.restore(&mut b.a)?;
    b.a.put(&Instruction::with(Code::Pushfq))?;
    b.a.put(&Instruction::with1(Code::Pop_r64, POINTER)?)?;
    b.flags.release(&mut b.a)?;
    b.a.emit(Code::And_rm32_imm32, Register::ECX, rflags::STATUS as u32)?;
    b.a.load(SCRATCH, slot(Slot::State))?;
    b.a.load(SCRATCH, field(offset_of!(CpuState, rflags)))?;
    b.a.emit(Code::And_rm64_imm32, SCRATCH, REST as i64 as i32)?;
    b.a.emit(Code::Or_r64_rm64, SCRATCH, POINTER)?;
    b.a.store(slot(Slot::Target), SCRATCH)?;
    let checked = b.check_stack(GUEST_RSP, -8, Use::Write, site)?;
    let to = b.operand(&checked, true)?;
    b.a.load(SCRATCH, slot(Slot::Target))?;
    b.access(&checked);
    b.a.store(to, SCRATCH)?;
    stack::end_push(b, checked.exit)
}

fn swapgs(b: &mut Block) -> Result<Done, IcedError> {
    let gs = offset_of!(CpuState, seg) + usize::from(seg::GS) * size_of::<Segment>();
    let inner = field(gs + offset_of!(Segment, base));
    let other = field(offset_of!(CpuState, msr) + offset_of!(Msrs, kernel_gs_base));
    b.a.load(SCRATCH, slot(Slot::State))?;
    b.a.load(POINTER, other)?;
    b.a.store(slot(Slot::Target), POINTER)?;
    b.a.load(POINTER, slot(Slot::GsBase))?;
    b.a.store(other, POINTER)?;
    b.a.load(POINTER, slot(Slot::Target))?;
    b.a.store(inner, POINTER)?;
    b.a.store(slot(Slot::GsBase), POINTER)?;
    Ok(Done::Next)
}
