//! Comparisons into an opmask register that string functions are made of, done without a stub:
//! equality and VPTESTM, VPTESTNM of elements of any size, with or without a write mask. Where the
//! mask keeps a part of a memory operand from being accessed, a stub does it after all.

use iced_x86::{Mnemonic as M, OpKind};

use super::simd_evex_moves::{quarters_of, read};
use crate::assist::{self, Class};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::native::equal::Element;

/// What is compared.
trait Relation {
    /// What makes an element's bit of the result 1.
    fn apply<E: Element>(a: [u8; 16], b: [u8; 16]) -> u64;
}

struct Equal;
struct NotEqual;
/// Some bit is set in both.
struct Test;
/// None is.
struct TestNot;

fn and(a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
    (u128::from_le_bytes(a) & u128::from_le_bytes(b)).to_le_bytes()
}

impl Relation for Equal {
    #[inline(always)]
    fn apply<E: Element>(a: [u8; 16], b: [u8; 16]) -> u64 {
        E::equal(a, b)
    }
}
impl Relation for NotEqual {
    #[inline(always)]
    fn apply<E: Element>(a: [u8; 16], b: [u8; 16]) -> u64 {
        E::equal(a, b) ^ E::ALL
    }
}
impl Relation for Test {
    #[inline(always)]
    fn apply<E: Element>(a: [u8; 16], b: [u8; 16]) -> u64 {
        E::equal(and(a, b), [0; 16]) ^ E::ALL
    }
}
impl Relation for TestNot {
    #[inline(always)]
    fn apply<E: Element>(a: [u8; 16], b: [u8; 16]) -> u64 {
        E::equal(and(a, b), [0; 16])
    }
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &mut Insn) -> Option<Handler> {
    let predicate = insn.imm & 7;
    let handler = match insn.raw.mnemonic() {
        M::Vpcmpeqb => by_form::<u8, Equal>(insn),
        M::Vpcmpeqw => by_form::<u16, Equal>(insn),
        M::Vpcmpeqd => by_form::<u32, Equal>(insn),
        M::Vpcmpeqq => by_form::<u64, Equal>(insn),
        M::Vptestmb => by_form::<u8, Test>(insn),
        M::Vptestmw => by_form::<u16, Test>(insn),
        M::Vptestmd => by_form::<u32, Test>(insn),
        M::Vptestmq => by_form::<u64, Test>(insn),
        M::Vptestnmb => by_form::<u8, TestNot>(insn),
        M::Vptestnmw => by_form::<u16, TestNot>(insn),
        M::Vptestnmd => by_form::<u32, TestNot>(insn),
        M::Vptestnmq => by_form::<u64, TestNot>(insn),
        M::Vpcmpb | M::Vpcmpub => by_predicate::<u8>(insn, predicate)?,
        M::Vpcmpw | M::Vpcmpuw => by_predicate::<u16>(insn, predicate)?,
        M::Vpcmpd | M::Vpcmpud => by_predicate::<u32>(insn, predicate)?,
        M::Vpcmpq | M::Vpcmpuq => by_predicate::<u64>(insn, predicate)?,
        _ => return None,
    };
    insn.imm = assist::bind(&insn.raw)?;
    Some(handler)
}

fn by_predicate<E: Element>(insn: &Insn, predicate: u64) -> Option<Handler> {
    match predicate {
        0 => Some(by_form::<E, Equal>(insn)),
        4 => Some(by_form::<E, NotEqual>(insn)),
        _ => None,
    }
}

fn by_form<E: Element, R: Relation>(insn: &Insn) -> Handler {
    let memory = insn.raw.op2_kind() == OpKind::Memory;
    match (quarters_of(&insn.raw), memory) {
        (1, false) => compare::<E, R, 1, false>,
        (2, false) => compare::<E, R, 2, false>,
        (_, false) => compare::<E, R, 4, false>,
        (1, true) => compare::<E, R, 1, true>,
        (2, true) => compare::<E, R, 2, true>,
        (_, true) => compare::<E, R, 4, true>,
    }
}

/// The opmask slot of the write mask; the destination is slot 0.
const WRITE_MASK: u32 = 1;

fn compare<E: Element, R: Relation, const N: usize, const MEMORY: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    cpu.check_class(Class::Evex)?;
    let lanes = E::COUNT * N as u32;
    let all = u64::MAX >> (64 - lanes);
    let mask = match assist::opmask(insn.imm, WRITE_MASK) {
        0 => all,
        k => cpu.opmask(k) & all,
    };
    let b = if !MEMORY {
        cpu.quarters(insn.op2, N)
    } else if mask == all {
        read::<N>(cpu, insn)?
    } else {
        return super::simd_evex::native(cpu, insn);
    };
    let a = cpu.quarters(insn.op1, N);
    let mut result = 0;
    for i in 0..N {
        result |= R::apply::<E>(a[i], b[i]) << (i as u32 * E::COUNT);
    }
    cpu.set_opmask(insn.op0, result & mask);
    Ok(())
}
