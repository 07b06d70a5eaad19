//! Multiplication and division: MUL, IMUL, DIV, IDIV (SDM Vol. 2).

use iced_x86::Mnemonic;

use super::form::{
    Immediate, Memory, Register, Source, by_width, by_word, in_memory, operand_bytes,
};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::events::vector;
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, WordAlu, status};
use crate::state::{Regs, reg};

/// The one operand of MUL, IMUL, DIV and IDIV is operand 0.
struct Operand0;

impl Source for Operand0 {
    #[inline(always)]
    fn hit<T: Alu>(cpu: &Cpu, insn: &Insn) -> Option<T> {
        Some(T::get(&cpu.state.regs, insn.op0))
    }
}

/// Register code of the upper half of the accumulator: (R|E)DX, or AH for bytes.
const fn upper<T: Alu>() -> u8 {
    if T::BYTES == 1 { 1 } else { reg::RDX }
}

#[inline(always)]
fn set_accumulator<T: Alu>(regs: &mut Regs, (low, high): (T, T)) {
    low.set(regs, reg::RAX);
    high.set(regs, upper::<T>());
}

fn multiply<T: Alu, S: Source, const SIGNED: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = S::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    let a = T::get(&s.regs, reg::RAX);
    let (product, flags) = if SIGNED {
        T::imul(a, b, s.rflags)
    } else {
        T::mul(a, b, s.rflags)
    };
    s.rflags = status(s.rflags, flags);
    set_accumulator(&mut s.regs, product);
    Ok(())
}

fn divide<T: Alu, S: Source, const SIGNED: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let by = S::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    let (low, high) = (T::get(&s.regs, reg::RAX), T::get(&s.regs, upper::<T>()));
    let result = if SIGNED {
        T::idiv(low, high, by, s.rflags)
    } else {
        T::div(low, high, by, s.rflags)
    };
    let Some((result, flags)) = result else {
        return Err(cpu.raise_vector(vector::DE));
    };
    s.rflags = status(s.rflags, flags);
    set_accumulator(&mut s.regs, result);
    Ok(())
}

/// IMUL r, r/m.
fn imul2<T: WordAlu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = S::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    let (value, flags) = T::imul_truncated(T::get(&s.regs, insn.op0), b, s.rflags);
    s.rflags = status(s.rflags, flags);
    value.set(&mut s.regs, insn.op0);
    Ok(())
}

/// IMUL r, r/m, imm.
fn imul3<T: WordAlu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let a = S::fetch::<T>(cpu, insn)?;
    let b = Immediate::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    let (value, flags) = T::imul_truncated(a, b, s.rflags);
    s.rflags = status(s.rflags, flags);
    value.set(&mut s.regs, insn.op0);
    Ok(())
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match (raw.mnemonic(), raw.op_count()) {
        (Mnemonic::Mul, _) if in_memory(raw, 0) => {
            by_width!(bytes, T => multiply::<T, Memory, false>)
        }
        (Mnemonic::Mul, _) => by_width!(bytes, T => multiply::<T, Operand0, false>),
        (Mnemonic::Div, _) if in_memory(raw, 0) => {
            by_width!(bytes, T => divide::<T, Memory, false>)
        }
        (Mnemonic::Div, _) => by_width!(bytes, T => divide::<T, Operand0, false>),
        (Mnemonic::Idiv, _) if in_memory(raw, 0) => {
            by_width!(bytes, T => divide::<T, Memory, true>)
        }
        (Mnemonic::Idiv, _) => by_width!(bytes, T => divide::<T, Operand0, true>),
        (Mnemonic::Imul, 1) if in_memory(raw, 0) => {
            by_width!(bytes, T => multiply::<T, Memory, true>)
        }
        (Mnemonic::Imul, 1) => by_width!(bytes, T => multiply::<T, Operand0, true>),
        (Mnemonic::Imul, 2) if in_memory(raw, 1) => by_word!(bytes, T => imul2::<T, Memory>),
        (Mnemonic::Imul, 2) => by_word!(bytes, T => imul2::<T, Register>),
        (Mnemonic::Imul, 3) if in_memory(raw, 1) => by_word!(bytes, T => imul3::<T, Memory>),
        (Mnemonic::Imul, 3) => by_word!(bytes, T => imul3::<T, Register>),
        _ => None,
    }
}
