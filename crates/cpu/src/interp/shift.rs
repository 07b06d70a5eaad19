//! Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD (SDM Vol. 2).
//!
//! The host masks the count as the guest's processor would, and with a masked count of 0 leaves the
//! flags it was given, so no handler looks at the count.

use iced_x86::{Mnemonic, OpKind};

use super::form::{by_width, by_word, in_memory, operand_bytes};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, WordAlu, status};
use crate::state::reg;

/// A shift or rotate of one operand.
trait Shift {
    /// Result and flags.
    fn apply<T: Alu>(a: T, count: u8, flags: u64) -> (T, u64);
}

/// SHLD or SHRD.
trait DoubleShift {
    /// Result and flags.
    fn apply<T: WordAlu>(a: T, b: T, count: u8, flags: u64) -> (T, u64);
}

macro_rules! shifts {
    ($($name:ident: $op:ident),*) => {$(
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: Alu>(a: T, count: u8, flags: u64) -> (T, u64) {
                let (v, f) = T::$op(a, count, flags);
                (v, status(flags, f))
            }
        }
    )*};
}

macro_rules! double_shifts {
    ($($name:ident: $op:ident),*) => {$(
        struct $name;
        impl DoubleShift for $name {
            #[inline(always)]
            fn apply<T: WordAlu>(a: T, b: T, count: u8, flags: u64) -> (T, u64) {
                let (v, f) = T::$op(a, b, count, flags);
                (v, status(flags, f))
            }
        }
    )*};
}

shifts!(Shl: shl, Shr: shr, Sar: sar, Rol: rol, Ror: ror, Rcl: rcl, Rcr: rcr);
double_shifts!(Shld: shld, Shrd: shrd);

/// Where the count is.
trait Count {
    fn of(cpu: &Cpu, insn: &Insn) -> u8;
}
struct Immediate;
struct Cl;

impl Count for Immediate {
    #[inline(always)]
    fn of(_: &Cpu, insn: &Insn) -> u8 {
        insn.imm as u8
    }
}

impl Count for Cl {
    #[inline(always)]
    fn of(cpu: &Cpu, _: &Insn) -> u8 {
        cpu.state.regs[reg::RCX] as u8
    }
}

fn register<O: Shift, T: Alu, C: Count>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = C::of(cpu, insn);
    let s = &mut cpu.state;
    let (value, flags) = O::apply(T::get(&s.regs, insn.op0), count, s.rflags);
    s.rflags = flags;
    value.set(&mut s.regs, insn.op0);
    Ok(())
}

fn memory<O: Shift, T: Alu, C: Count>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = C::of(cpu, insn);
    let old = cpu.state.rflags;
    cpu.state.rflags = cpu.modify(insn, |a: T| O::apply(a, count, old))?;
    Ok(())
}

fn double_register<O: DoubleShift, T: WordAlu, C: Count>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    let count = C::of(cpu, insn);
    let s = &mut cpu.state;
    let (a, b) = (T::get(&s.regs, insn.op0), T::get(&s.regs, insn.op1));
    let (value, flags) = O::apply(a, b, count, s.rflags);
    s.rflags = flags;
    value.set(&mut s.regs, insn.op0);
    Ok(())
}

fn double_memory<O: DoubleShift, T: WordAlu, C: Count>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    let count = C::of(cpu, insn);
    let b = T::get(&cpu.state.regs, insn.op1);
    let old = cpu.state.rflags;
    cpu.state.rflags = cpu.modify(insn, |a: T| O::apply(a, b, count, old))?;
    Ok(())
}

fn shift<O: Shift>(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match (in_memory(raw, 0), raw.op1_kind() == OpKind::Register) {
        (false, false) => by_width!(bytes, T => register::<O, T, Immediate>),
        (false, true) => by_width!(bytes, T => register::<O, T, Cl>),
        (true, false) => by_width!(bytes, T => memory::<O, T, Immediate>),
        (true, true) => by_width!(bytes, T => memory::<O, T, Cl>),
    }
}

fn double_shift<O: DoubleShift>(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match (in_memory(raw, 0), raw.op2_kind() == OpKind::Register) {
        (false, false) => by_word!(bytes, T => double_register::<O, T, Immediate>),
        (false, true) => by_word!(bytes, T => double_register::<O, T, Cl>),
        (true, false) => by_word!(bytes, T => double_memory::<O, T, Immediate>),
        (true, true) => by_word!(bytes, T => double_memory::<O, T, Cl>),
    }
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    match insn.raw.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(insn),
        Mnemonic::Shr => shift::<Shr>(insn),
        Mnemonic::Sar => shift::<Sar>(insn),
        Mnemonic::Rol => shift::<Rol>(insn),
        Mnemonic::Ror => shift::<Ror>(insn),
        Mnemonic::Rcl => shift::<Rcl>(insn),
        Mnemonic::Rcr => shift::<Rcr>(insn),
        Mnemonic::Shld => double_shift::<Shld>(insn),
        Mnemonic::Shrd => double_shift::<Shrd>(insn),
        _ => None,
    }
}
