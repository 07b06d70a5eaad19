//! Bitwise logic: AND, OR, XOR, NOT, TEST (SDM Vol. 2).

use iced_x86::{Mnemonic, OpKind};

use super::form::{Binary, Unary, binary, unary};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, status};

struct And;
struct Or;
struct Xor;
struct Not;
struct Test;

impl Binary for And {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::and(a, b);
        (v, status(flags, f))
    }
}

impl Binary for Or {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::or(a, b);
        (v, status(flags, f))
    }
}

impl Binary for Xor {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::xor(a, b);
        (v, status(flags, f))
    }
}

impl Binary for Test {
    const STORES: bool = false;
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        And::apply(a, b, flags)
    }
}

impl Unary for Not {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64) {
        (!a, flags)
    }
}

/// XOR of a 32- or 64-bit register with itself: the usual way to write 0.
fn clear(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let (zero, flags) = <u32 as Alu>::xor(0, 0);
    s.regs[insn.op0] = zero.into();
    s.rflags = status(s.rflags, flags);
    Ok(())
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    match raw.mnemonic() {
        Mnemonic::And => binary::<And>(raw),
        Mnemonic::Or => binary::<Or>(raw),
        Mnemonic::Xor
            if raw.op1_kind() == OpKind::Register
                && raw.op0_register() == raw.op1_register()
                && raw.op0_register().size() >= 4 =>
        {
            Some(clear)
        }
        Mnemonic::Xor => binary::<Xor>(raw),
        Mnemonic::Not => unary::<Not>(raw),
        Mnemonic::Test => binary::<Test>(raw),
        _ => None,
    }
}
