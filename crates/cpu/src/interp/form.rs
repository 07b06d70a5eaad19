//! Operand forms: where an instruction's operands come from and go to. Families describe an
//! operation on values ([`Binary`], [`Unary`]); the functions here give it every form, one handler
//! for each size, so that a handler decides nothing at run time.

use iced_x86::{Instruction, OpKind};

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::native::alu::Alu;

/// Picks the instance of a generic handler for an operand size in bytes: `by_width!(n, T => f::<T>)`
/// for 1 to 8 bytes, `by_word!` for 2 to 8.
macro_rules! by_width {
    ($bytes:expr, $t:ident => $handler:expr) => {
        match $bytes {
            1 => {
                type $t = u8;
                Some($handler as $crate::decode::Handler)
            }
            2 => {
                type $t = u16;
                Some($handler as $crate::decode::Handler)
            }
            4 => {
                type $t = u32;
                Some($handler as $crate::decode::Handler)
            }
            8 => {
                type $t = u64;
                Some($handler as $crate::decode::Handler)
            }
            _ => None,
        }
    };
}

/// See `by_width`.
macro_rules! by_word {
    ($bytes:expr, $t:ident => $handler:expr) => {
        match $bytes {
            2 => {
                type $t = u16;
                Some($handler as $crate::decode::Handler)
            }
            4 => {
                type $t = u32;
                Some($handler as $crate::decode::Handler)
            }
            8 => {
                type $t = u64;
                Some($handler as $crate::decode::Handler)
            }
            _ => None,
        }
    };
}

pub(super) use {by_width, by_word};

/// A source operand.
pub(super) trait Source {
    /// Its value, if it is at hand: in memory only if the TLB has it.
    fn hit<T: Alu>(cpu: &Cpu, insn: &Insn) -> Option<T>;
    /// Its value.
    #[inline(always)]
    fn fetch<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<T, Stop> {
        Self::hit(cpu, insn).map_or_else(|| cpu.read(insn), Ok)
    }
}

/// Operand 1 is a register.
pub(super) struct Register;
/// The memory operand.
pub(super) struct Memory;
/// The immediate.
pub(super) struct Immediate;

impl Source for Register {
    #[inline(always)]
    fn hit<T: Alu>(cpu: &Cpu, insn: &Insn) -> Option<T> {
        Some(T::get(&cpu.state.regs, insn.op1))
    }
}

impl Source for Memory {
    #[inline(always)]
    fn hit<T: Alu>(cpu: &Cpu, insn: &Insn) -> Option<T> {
        cpu.read_hit(insn)
    }
    #[inline(always)]
    fn fetch<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<T, Stop> {
        cpu.read(insn)
    }
}

impl Source for Immediate {
    #[inline(always)]
    fn hit<T: Alu>(_: &Cpu, insn: &Insn) -> Option<T> {
        Some(T::from_u64(insn.imm))
    }
}

/// An operation `op0 = f(op0, op1)`.
pub(super) trait Binary {
    /// The result is stored (not for CMP and TEST).
    const STORES: bool = true;
    /// The result and the new RFLAGS.
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64);
}

/// An operation `op0 = f(op0)`.
pub(super) trait Unary {
    /// The result and the new RFLAGS.
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64);
}

// Each form that touches memory is two functions: one that does the instruction if the TLB has the
// operand, and one for all other cases, which the first ends with.

fn binary_to_register<O: Binary, T: Alu, S: Source>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    match S::hit::<T>(cpu, insn) {
        Some(b) => binary_into_register::<O, T>(cpu, insn, b),
        None => binary_to_register_slow::<O, T, S>(cpu, insn),
    }
}

#[cold]
#[inline(never)]
fn binary_to_register_slow<O: Binary, T: Alu, S: Source>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    let b = S::fetch::<T>(cpu, insn)?;
    binary_into_register::<O, T>(cpu, insn, b)
}

#[inline(always)]
fn binary_into_register<O: Binary, T: Alu>(cpu: &mut Cpu, insn: &Insn, b: T) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let (value, flags) = O::apply(T::get(&s.regs, insn.op0), b, s.rflags);
    s.rflags = flags;
    if O::STORES {
        value.set(&mut s.regs, insn.op0);
    }
    Ok(())
}

/// The second operand, of an instruction whose first is in memory.
#[inline(always)]
fn second<T: Alu, S: Source>(cpu: &Cpu, insn: &Insn) -> T {
    S::hit(cpu, insn).unwrap_or_default()
}

fn binary_to_memory<O: Binary, T: Alu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = second::<T, S>(cpu, insn);
    let old = cpu.state.rflags;
    let flags = if O::STORES {
        cpu.modify_hit(insn, |a: T| O::apply(a, b, old))
    } else {
        cpu.read_hit::<T>(insn).map(|a| O::apply(a, b, old).1)
    };
    let Some(flags) = flags else {
        return binary_to_memory_slow::<O, T, S>(cpu, insn);
    };
    cpu.state.rflags = flags;
    Ok(())
}

#[cold]
#[inline(never)]
fn binary_to_memory_slow<O: Binary, T: Alu, S: Source>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    let b = second::<T, S>(cpu, insn);
    let old = cpu.state.rflags;
    cpu.state.rflags = if O::STORES {
        cpu.modify(insn, |a: T| O::apply(a, b, old))?
    } else {
        O::apply(cpu.read::<T>(insn)?, b, old).1
    };
    Ok(())
}

fn unary_register<O: Unary, T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let (value, flags) = O::apply(T::get(&s.regs, insn.op0), s.rflags);
    s.rflags = flags;
    value.set(&mut s.regs, insn.op0);
    Ok(())
}

fn unary_memory<O: Unary, T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let old = cpu.state.rflags;
    let Some(flags) = cpu.modify_hit(insn, |a: T| O::apply(a, old)) else {
        return unary_memory_slow::<O, T>(cpu, insn);
    };
    cpu.state.rflags = flags;
    Ok(())
}

#[cold]
#[inline(never)]
fn unary_memory_slow<O: Unary, T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let old = cpu.state.rflags;
    cpu.state.rflags = cpu.modify(insn, |a: T| O::apply(a, old))?;
    Ok(())
}

/// The handler of a two-operand instruction.
pub(super) fn binary<O: Binary>(raw: &Instruction) -> Option<Handler> {
    let bytes = operand_bytes(raw, 0);
    match (raw.op0_kind(), raw.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            by_width!(bytes, T => binary_to_register::<O, T, Register>)
        }
        (OpKind::Register, OpKind::Memory) => {
            by_width!(bytes, T => binary_to_register::<O, T, Memory>)
        }
        (OpKind::Memory, OpKind::Register) => {
            by_width!(bytes, T => binary_to_memory::<O, T, Register>)
        }
        (OpKind::Register, _) => by_width!(bytes, T => binary_to_register::<O, T, Immediate>),
        (OpKind::Memory, _) => by_width!(bytes, T => binary_to_memory::<O, T, Immediate>),
        _ => None,
    }
}

/// The handler of a one-operand instruction.
pub(super) fn unary<O: Unary>(raw: &Instruction) -> Option<Handler> {
    let bytes = operand_bytes(raw, 0);
    match raw.op0_kind() {
        OpKind::Register => by_width!(bytes, T => unary_register::<O, T>),
        OpKind::Memory => by_width!(bytes, T => unary_memory::<O, T>),
        _ => None,
    }
}

/// Size in bytes of an operand that is a register or in memory.
pub(super) fn operand_bytes(raw: &Instruction, operand: u32) -> usize {
    match raw.op_kind(operand) {
        OpKind::Register => raw.op_register(operand).size(),
        OpKind::Memory => raw.memory_size().size(),
        _ => 0,
    }
}

/// Whether an operand is in memory.
pub(super) fn in_memory(raw: &Instruction, operand: u32) -> bool {
    raw.op_kind(operand) == OpKind::Memory
}
