//! Data movement: MOV between general registers and memory, MOVZX, MOVSX, MOVSXD, LEA, MOVNTI,
//! CMOVcc, SETcc, the sign extensions of the accumulator, XLAT, the flag instructions, and the
//! instructions that do nothing (SDM Vol. 2). Exchanges are in [`super::exchange`].

use std::marker::PhantomData;

use iced_x86::{Mnemonic, OpKind};

use super::condition::{by_condition, holds};
use super::form::{
    Immediate, Memory, Register, Source, by_width, by_word, in_memory, operand_bytes,
};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, merge};
use crate::state::{reg, rflags};
use crate::width::Width;

/// What a load makes of the value it read.
trait Load {
    /// Size in memory.
    type From: Alu;
    /// Size of the register.
    type To: Alu;
    fn extend(v: Self::From) -> Self::To;
}

/// MOV.
struct Plain<T>(PhantomData<T>);
/// MOVZX from `T` to `D`.
struct Zero<T, D>(PhantomData<(T, D)>);
/// MOVSX and MOVSXD from `T` to `D`.
struct Sign<T, D>(PhantomData<(T, D)>);

impl<T: Alu> Load for Plain<T> {
    type From = T;
    type To = T;
    #[inline(always)]
    fn extend(v: T) -> T {
        v
    }
}

impl<T: Alu, D: Alu> Load for Zero<T, D> {
    type From = T;
    type To = D;
    #[inline(always)]
    fn extend(v: T) -> D {
        D::from_u64(v.to_u64())
    }
}

impl<T: Alu, D: Alu> Load for Sign<T, D> {
    type From = T;
    type To = D;
    #[inline(always)]
    fn extend(v: T) -> D {
        D::from_u64(v.to_i64() as u64)
    }
}

fn to_register<L: Load, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let Some(v) = S::hit::<L::From>(cpu, insn) else {
        return to_register_slow::<L, S>(cpu, insn);
    };
    L::extend(v).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

#[cold]
#[inline(never)]
fn to_register_slow<L: Load, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let v = S::fetch::<L::From>(cpu, insn)?;
    L::extend(v).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

fn to_memory<T: Alu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let v = S::hit::<T>(cpu, insn).unwrap_or_default();
    if cpu.write_hit(insn, v) {
        return Ok(());
    }
    to_memory_slow(cpu, insn, v)
}

#[cold]
#[inline(never)]
fn to_memory_slow<T: Alu>(cpu: &mut Cpu, insn: &Insn, v: T) -> Result<(), Stop> {
    cpu.write(insn, v)
}

fn lea<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    T::from_u64(cpu.effective_address(insn)).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

// The source is read, and may fault, whatever the condition; a 32-bit destination is zero-extended
// whatever the condition.
fn cmov<T: Alu, S: Source, const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let v = S::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    let old = T::get(&s.regs, insn.op0);
    let v = if holds::<CC>(s.rflags) { v } else { old };
    v.set(&mut s.regs, insn.op0);
    Ok(())
}

fn set_register<const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    u8::from(holds::<CC>(s.rflags)).set(&mut s.regs, insn.op0);
    Ok(())
}

fn set_memory<const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.write(insn, u8::from(holds::<CC>(cpu.state.rflags)))
}

/// CBW, CWDE, CDQE: the accumulator's lower half `T` extended to `D`.
fn extend_accumulator<T: Alu, D: Alu>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let regs = &mut cpu.state.regs;
    D::from_u64(T::get(regs, reg::RAX).to_i64() as u64).set(regs, reg::RAX);
    Ok(())
}

/// CWD, CDQ, CQO: (R|E)DX filled with the accumulator's sign.
fn spread_sign<T: Alu>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let regs = &mut cpu.state.regs;
    T::from_u64((T::get(regs, reg::RAX).to_i64() >> 63) as u64).set(regs, reg::RDX);
    Ok(())
}

fn xlat(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let regs = &cpu.state.regs;
    let address = regs[reg::RBX].wrapping_add(regs[reg::RAX] & 0xff) & insn.addr_mask;
    cpu.read_at::<u8>(insn.seg, address)?
        .set(&mut cpu.state.regs, reg::RAX);
    Ok(())
}

const AH: u8 = 1;
/// What SAHF loads: SF, ZF, AF, PF and CF.
const LOW: u64 = rflags::STATUS & 0xff;

fn lahf(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    ((s.rflags & LOW | rflags::FIXED) as u8).set(&mut s.regs, AH);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    s.rflags = merge(s.rflags, u8::get(&s.regs, AH).into(), LOW);
    Ok(())
}

fn set_flag<const BIT: u64>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.state.rflags |= BIT;
    Ok(())
}

fn clear_flag<const BIT: u64>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.state.rflags &= !BIT;
    Ok(())
}

fn complement_carry(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.state.rflags ^= rflags::CF;
    Ok(())
}

fn nothing(_: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Ok(())
}

/// MOV, except to and from segment, control and debug registers.
fn mov(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match (raw.op0_kind(), raw.op1_kind()) {
        (OpKind::Register, _) if insn.op0 == 255 => None,
        (_, OpKind::Register) if insn.op1 == 255 => None,
        (OpKind::Register, OpKind::Register) => {
            by_width!(bytes, T => to_register::<Plain<T>, Register>)
        }
        (OpKind::Register, OpKind::Memory) => {
            by_width!(bytes, T => to_register::<Plain<T>, Memory>)
        }
        (OpKind::Memory, OpKind::Register) => by_width!(bytes, T => to_memory::<T, Register>),
        (OpKind::Register, _) => by_width!(bytes, T => to_register::<Plain<T>, Immediate>),
        (OpKind::Memory, _) => by_width!(bytes, T => to_memory::<T, Immediate>),
        _ => None,
    }
}

/// MOVZX, MOVSX, MOVSXD.
fn extension<S: Source>(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    let (from, to) = (operand_bytes(raw, 1), operand_bytes(raw, 0));
    match (raw.mnemonic() == Mnemonic::Movzx, from) {
        (true, 1) => by_word!(to, D => to_register::<Zero<u8, D>, S>),
        (true, 2) => by_word!(to, D => to_register::<Zero<u16, D>, S>),
        (false, 1) => by_word!(to, D => to_register::<Sign<u8, D>, S>),
        (false, 2) => by_word!(to, D => to_register::<Sign<u16, D>, S>),
        (false, 4) => by_word!(to, D => to_register::<Sign<u32, D>, S>),
        _ => None,
    }
}

fn cmov_forms<const CC: u8>(insn: &Insn) -> Option<Handler> {
    let bytes = operand_bytes(&insn.raw, 0);
    if in_memory(&insn.raw, 1) {
        by_word!(bytes, T => cmov::<T, Memory, CC>)
    } else {
        by_word!(bytes, T => cmov::<T, Register, CC>)
    }
}

/// SETcc and CMOVcc: of the instructions with a condition, those with one and two operands, none of
/// which is a branch target.
fn conditional(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    match (raw.op_count(), raw.op0_kind()) {
        (1, OpKind::Register) => by_condition!(raw, CC => set_register::<CC>),
        (1, OpKind::Memory) => by_condition!(raw, CC => set_memory::<CC>),
        (2, OpKind::Register) => by_condition!(raw, CC => cmov_forms::<CC>(insn)?),
        _ => None,
    }
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    use Mnemonic as M;
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match raw.mnemonic() {
        M::Mov => mov(insn),
        M::Movnti => by_word!(bytes, T => to_memory::<T, Register>),
        M::Movzx | M::Movsx | M::Movsxd if in_memory(raw, 1) => extension::<Memory>(insn),
        M::Movzx | M::Movsx | M::Movsxd => extension::<Register>(insn),
        M::Lea => by_word!(bytes, T => lea::<T>),
        M::Cbw => Some(extend_accumulator::<u8, u16>),
        M::Cwde => Some(extend_accumulator::<u16, u32>),
        M::Cdqe => Some(extend_accumulator::<u32, u64>),
        M::Cwd => Some(spread_sign::<u16>),
        M::Cdq => Some(spread_sign::<u32>),
        M::Cqo => Some(spread_sign::<u64>),
        M::Xlatb => Some(xlat),
        M::Lahf => Some(lahf),
        M::Sahf => Some(sahf),
        M::Clc => Some(clear_flag::<{ rflags::CF }>),
        M::Stc => Some(set_flag::<{ rflags::CF }>),
        M::Cld => Some(clear_flag::<{ rflags::DF }>),
        M::Std => Some(set_flag::<{ rflags::DF }>),
        M::Cmc => Some(complement_carry),
        // Hints, and what CET left as NOPs for processors without it (RDSSP keeps its operand).
        M::Nop
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Cldemote
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchit0
        | M::Prefetchit1 => Some(nothing),
        _ => conditional(insn),
    }
}
