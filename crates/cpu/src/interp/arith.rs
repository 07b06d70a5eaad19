//! Addition and subtraction: ADD, ADC, SUB, SBB, CMP, INC, DEC, NEG (SDM Vol. 2).

use iced_x86::Mnemonic;

use super::form::{Binary, Unary, binary, unary};
use crate::decode::{Handler, Insn};
use crate::mode::Mode;
use crate::native::alu::{Alu, merge, status};
use crate::state::rflags;

struct Add;
struct Adc;
struct Sub;
struct Sbb;
struct Cmp;
struct Inc;
struct Dec;
struct Neg;

impl Binary for Add {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::add(a, b);
        (v, status(flags, f))
    }
}

impl Binary for Adc {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::adc(a, b, flags);
        (v, status(flags, f))
    }
}

impl Binary for Sub {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::sub(a, b);
        (v, status(flags, f))
    }
}

impl Binary for Sbb {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        let (v, f) = T::sbb(a, b, flags);
        (v, status(flags, f))
    }
}

impl Binary for Cmp {
    const STORES: bool = false;
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        Sub::apply(a, b, flags)
    }
}

// INC and DEC are ADD and SUB of 1 that leave CF alone.
impl Unary for Inc {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64) {
        let (v, f) = T::add(a, T::from_u64(1));
        (v, merge(flags, f, rflags::STATUS & !rflags::CF))
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64) {
        let (v, f) = T::sub(a, T::from_u64(1));
        (v, merge(flags, f, rflags::STATUS & !rflags::CF))
    }
}

impl Unary for Neg {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64) {
        Sub::apply(T::default(), a, flags)
    }
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    match raw.mnemonic() {
        Mnemonic::Add => binary::<Add>(raw),
        Mnemonic::Adc => binary::<Adc>(raw),
        Mnemonic::Sub => binary::<Sub>(raw),
        Mnemonic::Sbb => binary::<Sbb>(raw),
        Mnemonic::Cmp => binary::<Cmp>(raw),
        Mnemonic::Inc => unary::<Inc>(raw),
        Mnemonic::Dec => unary::<Dec>(raw),
        Mnemonic::Neg => unary::<Neg>(raw),
        _ => None,
    }
}
