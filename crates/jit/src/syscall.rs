//! SYSCALL and SYSRET between 64-bit code at CPL 3 and CPL 0 (SDM Vol. 2; APM Vol. 3): functions in the code
//! cache, to which translations jump.
//!
//! They know the usual case, in which nothing follows but the target's code, which is in the other level's
//! view already. In any other nothing has happened, and the instruction is left to the interpreter: with
//! EFER.SCE clear, flags that choose other ways (AC, TF), interrupts that wait for IF, and targets at which no
//! code was found yet, among them those that are not canonical.

use std::mem::offset_of;

use anykvm_cpu::state::{CpuState, Msrs, Segment, efer, rflags, seg};
use anykvm_cpu::syscall::{CODE, DATA};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};

use crate::asm::{Asm, Hole, at, slot};
use crate::branch::{found, look_up_in};
use crate::flags::load_flags;
use crate::privilege::{jumps, take_side};
use crate::regs::{GUEST_RCX, Home, POINTER, SCRATCH, home};
use crate::shared::Slot;

/// An instruction that changes the privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// SYSCALL at CPL 3. R15 holds the RIP behind it.
    Syscall,
    /// SYSRET with a 64-bit operand size at CPL 0.
    Sysret,
}

/// The processor's state.
const STATE: Register = Register::RAX;
/// The flags as LAHF and SETO made them.
const FLAGS: Register = Register::RDX;
const DPL3: u32 = 3 << 5;
/// What a status flag's byte, which LAHF makes, has besides status flags is RFLAGS's, too: bit 1.
const FIXED: u32 = rflags::FIXED as u32;

fn field(offset: usize) -> MemoryOperand {
    at(STATE, offset as i64)
}

fn msr(offset: usize) -> MemoryOperand {
    field(offset_of!(CpuState, msr) + offset)
}

fn segment(n: u8, offset: usize) -> MemoryOperand {
    field(offset_of!(CpuState, seg) + usize::from(n) * size_of::<Segment>() + offset)
}

/// Limit and access rights, which stand side by side.
fn hidden(attr: u32) -> u64 {
    const { assert!(offset_of!(Segment, attr) == offset_of!(Segment, limit) + 4) };
    u64::from(attr) << 32 | u64::from(u32::MAX)
}

fn put<const N: usize>(
    a: &mut Asm,
    insns: [Result<Instruction, IcedError>; N],
) -> Result<(), IcedError> {
    insns.into_iter().try_for_each(|insn| a.put(&insn?))
}

/// Generates the functions; returns their positions, in the order of [`Change`].
///
/// In: RCX the code of the exit in front of the instruction, the flags in the host's.
pub fn stubs(a: &mut Asm) -> Result<[usize; 2], IcedError> {
    Ok([syscall(a)?, sysret(a)?])
}

fn syscall(a: &mut Asm) -> Result<usize, IcedError> {
    use Code as C;
    use Register as R;
    const WAYS: u64 = rflags::AC | rflags::TF | rflags::RF | rflags::VM;
    let here = a.here();
    let mut otherwise = begin(a)?;
    a.store(slot(Slot::Change1), SCRATCH)?;
    test(a, field(offset_of!(CpuState, rflags)), WAYS as u32)?;
    otherwise.push(a.jne());
    known(a, false, &mut otherwise)?;
    a.load(SCRATCH, msr(offset_of!(Msrs, lstar)))?;
    find(a, false, &mut otherwise)?;
    // All of RFLAGS.
    a.load(SCRATCH, field(offset_of!(CpuState, rflags)))?;
    put(
        a,
        [
            Instruction::with2(C::Movzx_r32_rm8, R::ECX, R::DH),
            Instruction::with2(C::Movzx_r32_rm8, R::EDX, R::DL),
            Instruction::with2(C::Shl_rm32_imm8, R::EDX, rflags::OF.trailing_zeros()),
            Instruction::with2(C::Or_r32_rm32, R::ECX, R::EDX),
            Instruction::with2(C::And_rm64_imm32, SCRATCH, !rflags::STATUS as i32),
            Instruction::with2(C::Or_r64_rm64, SCRATCH, POINTER),
        ],
    )?;
    guest(a, 11, SCRATCH)?;
    a.load(POINTER, msr(offset_of!(Msrs, sfmask)))?;
    put(
        a,
        [
            Instruction::with1(C::Not_rm64, POINTER),
            Instruction::with2(C::And_r64_rm64, SCRATCH, POINTER),
            Instruction::with2(C::Or_rm64_imm32, SCRATCH, FIXED),
        ],
    )?;
    a.store(field(offset_of!(CpuState, rflags)), SCRATCH)?;
    a.load(POINTER, slot(Slot::Change1))?;
    a.mov(GUEST_RCX, POINTER)?;
    a.load(POINTER, msr(offset_of!(Msrs, star)))?;
    put(a, [Instruction::with2(C::Shr_rm64_imm8, POINTER, 32)])?;
    put(a, [Instruction::with2(C::And_rm32_imm32, R::ECX, 0xfffc)])?;
    selector(a, seg::CS, 0, 0)?;
    selector(a, seg::SS, 8, 0)?;
    flat(a, seg::CS, CODE | Segment::L)?;
    flat(a, seg::SS, DATA)?;
    end(a, false, otherwise)?;
    Ok(here)
}

fn sysret(a: &mut Asm) -> Result<usize, IcedError> {
    use Code as C;
    /// RFLAGS bits that may be loaded here.
    const PLAIN: u64 = rflags::STATUS | rflags::FIXED | rflags::IF | rflags::DF | rflags::ID;
    let here = a.here();
    let mut otherwise = begin(a)?;
    known(a, true, &mut otherwise)?;
    nothing_waits(a, &mut otherwise)?;
    // AMD's leaves the hidden part of SS, Intel's loads what SYSCALL has.
    let base = segment(seg::SS, offset_of!(Segment, base));
    put(a, [Instruction::with2(C::Cmp_rm64_imm8, base, 0)])?;
    otherwise.push(a.jne());
    a.emit(C::Mov_r64_imm64, POINTER, hidden(DATA) as i64)?;
    let limit = segment(seg::SS, offset_of!(Segment, limit));
    a.emit(C::Cmp_r64_rm64, POINTER, limit)?;
    otherwise.push(a.jne());
    let Home::Spilled(r11) = home(11) else {
        unreachable!("R11 is not in a register");
    };
    let rest = Instruction::with2(C::Test_rm64_imm32, slot(r11), !PLAIN as i32);
    put(a, [rest])?;
    otherwise.push(a.jne());
    a.mov(SCRATCH, GUEST_RCX)?;
    find(a, true, &mut otherwise)?;
    a.load(SCRATCH, slot(r11))?;
    put(a, [Instruction::with2(C::Or_rm64_imm32, SCRATCH, FIXED)])?;
    a.store(field(offset_of!(CpuState, rflags)), SCRATCH)?;
    a.load(POINTER, msr(offset_of!(Msrs, star)))?;
    put(a, [Instruction::with2(C::Shr_rm64_imm8, POINTER, 48)])?;
    selector(a, seg::CS, 16, 3)?;
    selector(a, seg::SS, 8, 3)?;
    flat(a, seg::CS, CODE | Segment::L | DPL3)?;
    flat(a, seg::SS, DATA | DPL3)?;
    end(a, true, otherwise)?;
    Ok(here)
}

/// Puts registers and flags aside; RAX becomes the address of the state. Without EFER.SCE the branches that
/// are returned are taken.
fn begin(a: &mut Asm) -> Result<Vec<Hole>, IcedError> {
    a.store(slot(Slot::Change0), POINTER)?;
    a.store(slot(Slot::Change2), STATE)?;
    a.store(slot(Slot::Change3), FLAGS)?;
    put(
        a,
        [
            Ok(Instruction::with(Code::Lahf)),
            Instruction::with1(Code::Seto_rm8, Register::AL),
        ],
    )?;
    a.mov(FLAGS, Register::RAX)?;
    a.load(STATE, slot(Slot::State))?;
    test(a, msr(offset_of!(Msrs, efer)), efer::SCE as u32)?;
    Ok(vec![a.jcc(4)])
}

fn test(a: &mut Asm, field: MemoryOperand, bits: u32) -> Result<(), IcedError> {
    let test = Instruction::with2(Code::Test_rm32_imm32, field, bits);
    put(a, [test])
}

/// Goes elsewhere if nothing is known of a level.
fn known(a: &mut Asm, user: bool, otherwise: &mut Vec<Hole>) -> Result<(), IcedError> {
    let cmp = Instruction::with2(Code::Cmp_rm64_imm8, jumps(user), 0);
    put(a, [cmp])?;
    otherwise.push(a.jcc(4));
    Ok(())
}

/// Goes elsewhere if an interrupt may wait for IF. Destroys RCX.
pub(crate) fn nothing_waits(a: &mut Asm, otherwise: &mut Vec<Hole>) -> Result<(), IcedError> {
    let quiet = Instruction::with2(Code::Cmp_rm32_imm8, slot(Slot::Quiet), 0);
    put(a, [quiet])?;
    otherwise.push(a.jcc(4));
    a.load(POINTER, slot(Slot::Go))?;
    let go = Instruction::with2(Code::Cmp_rm32_imm8, at(POINTER, 0), 0);
    put(a, [go])?;
    otherwise.push(a.jcc(4));
    Ok(())
}

/// Looks the RIP in R15 up in a level's view, and puts aside where its code is. What follows changes the guest.
fn find(a: &mut Asm, user: bool, otherwise: &mut Vec<Hole>) -> Result<(), IcedError> {
    otherwise.push(look_up_in(a, jumps(user))?);
    a.load(POINTER, found())?;
    a.store(slot(Slot::Entry), POINTER)?;
    a.emit(Code::And_rm64_imm32, SCRATCH, -4096)?;
    a.store(slot(Slot::Page), SCRATCH)
}

fn guest(a: &mut Asm, n: usize, from: Register) -> Result<(), IcedError> {
    match home(n) {
        Home::Host(r) => a.mov(r, from),
        Home::Spilled(s) => a.store(slot(s), from),
    }
}

/// Loads a selector: so much more than ECX, with this RPL. Destroys EDX.
fn selector(a: &mut Asm, n: u8, more: i64, rpl: u32) -> Result<(), IcedError> {
    use Register as R;
    // The field behind it, which is always 0, is stored with it.
    let field = segment(n, offset_of!(Segment, selector));
    a.emit(Code::Lea_r32_m, R::EDX, at(POINTER, more))?;
    a.emit(Code::Or_rm32_imm32, R::EDX, rpl)?;
    a.emit(Code::Movzx_r32_rm16, R::EDX, R::DX)?;
    a.emit(Code::Mov_rm32_r32, field, R::EDX)
}

/// Loads the hidden part of a segment of 4 GiB.
fn flat(a: &mut Asm, n: u8, attr: u32) -> Result<(), IcedError> {
    let base = segment(n, offset_of!(Segment, base));
    a.emit(Code::Mov_rm64_imm32, base, 0)?;
    a.store_u32(segment(n, offset_of!(Segment, limit)), u32::MAX)?;
    a.store_u32(segment(n, offset_of!(Segment, attr)), attr)
}

/// Goes on at the target, with RFLAGS in R15; or, where nothing has happened, leaves the instruction to the
/// interpreter.
fn end(a: &mut Asm, user: bool, otherwise: Vec<Hole>) -> Result<(), IcedError> {
    use Code as C;
    use Register as R;
    take_side(a, user, POINTER)?;
    put(
        a,
        [
            Instruction::with2(C::Mov_r32_rm32, R::EAX, R::R15D),
            Instruction::with2(C::Shl_rm32_imm8, R::EAX, 8),
            Instruction::with2(C::Bt_rm32_imm8, R::R15D, rflags::OF.trailing_zeros()),
            Instruction::with1(C::Setb_rm8, R::AL),
        ],
    )?;
    finish(a, Slot::Entry)?;
    for hole in otherwise {
        a.land(hole);
    }
    a.mov(R::RAX, FLAGS)?;
    finish(a, Slot::Change0)
}

/// Makes the flags from AX and goes to the address in a slot.
fn finish(a: &mut Asm, to: Slot) -> Result<(), IcedError> {
    load_flags(a)?;
    a.load(Register::RAX, slot(Slot::Change2))?;
    a.load(Register::RDX, slot(Slot::Change3))?;
    put(a, [Instruction::with1(Code::Jmp_rm64, slot(to))])
}
