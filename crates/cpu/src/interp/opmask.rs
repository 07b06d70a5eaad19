//! Instructions on the opmask registers k0-k7 (SDM Vol. 2, KADD to KXOR; exception classes K20 and
//! K21). Each has forms of 8, 16, 32 and 64 bits; a result is zero-extended to the whole register.

use iced_x86::{Mnemonic as M, OpKind, Register};

use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::state::rflags;

/// The handler, if the instruction is of this family. Opmask register numbers go where register
/// codes of general registers are.
pub fn select(insn: &mut Insn) -> Option<Handler> {
    let handler = logic(insn.raw.mnemonic())
        .or_else(|| arithmetic(insn.raw.mnemonic()))
        .or_else(|| test(insn.raw.mnemonic()))
        .or_else(|| moves(insn))?;
    let raw = insn.raw;
    for (i, code) in (0..raw.op_count()).zip([&mut insn.op0, &mut insn.op1, &mut insn.op2]) {
        if is_opmask(insn.raw.op_kind(i), insn.raw.op_register(i)) {
            *code = raw.op_register(i).number() as u8;
        }
    }
    Some(handler)
}

fn is_opmask(kind: OpKind, r: Register) -> bool {
    kind == OpKind::Register && r.is_k()
}

/// An operation on two masks of `bits` bits.
trait Operation {
    fn apply(a: u64, b: u64, bits: u32) -> u64;
}

macro_rules! operations {
    ($($name:ident: |$a:ident, $b:ident, $bits:ident| $body:expr;)*) => {$(
        struct $name;
        impl Operation for $name {
            #[inline(always)]
            fn apply($a: u64, $b: u64, $bits: u32) -> u64 { $body }
        }
    )*};
}

operations! {
    And: |a, b, _bits| a & b;
    AndNot: |a, b, _bits| !a & b;
    Or: |a, b, _bits| a | b;
    Xor: |a, b, _bits| a ^ b;
    Xnor: |a, b, _bits| !(a ^ b);
    Add: |a, b, _bits| a.wrapping_add(b);
    // The first source is the upper half of the result.
    Unpack: |a, b, bits| a << (bits / 2) | b & ((1 << (bits / 2)) - 1);
}

/// Instantiates a handler for the four widths of a mnemonic.
macro_rules! widths {
    ($m:expr, $f:ident $(<$o:ident>)?, $b:ident, $w:ident, $d:ident, $q:ident) => {
        match $m {
            M::$b => Some($f::<$($o,)? u8> as Handler),
            M::$w => Some($f::<$($o,)? u16> as Handler),
            M::$d => Some($f::<$($o,)? u32> as Handler),
            M::$q => Some($f::<$($o,)? u64> as Handler),
            _ => None,
        }
    };
}

fn logic(m: M) -> Option<Handler> {
    widths!(m, binary<And>, Kandb, Kandw, Kandd, Kandq)
        .or(widths!(m, binary<AndNot>, Kandnb, Kandnw, Kandnd, Kandnq))
        .or(widths!(m, binary<Or>, Korb, Korw, Kord, Korq))
        .or(widths!(m, binary<Xor>, Kxorb, Kxorw, Kxord, Kxorq))
        .or(widths!(m, binary<Xnor>, Kxnorb, Kxnorw, Kxnord, Kxnorq))
        .or(widths!(m, not, Knotb, Knotw, Knotd, Knotq))
}

fn arithmetic(m: M) -> Option<Handler> {
    widths!(m, binary<Add>, Kaddb, Kaddw, Kaddd, Kaddq)
        .or(widths!(
            m, shift_left, Kshiftlb, Kshiftlw, Kshiftld, Kshiftlq
        ))
        .or(widths!(
            m,
            shift_right,
            Kshiftrb,
            Kshiftrw,
            Kshiftrd,
            Kshiftrq
        ))
        .or(match m {
            M::Kunpckbw => Some(binary::<Unpack, u16>),
            M::Kunpckwd => Some(binary::<Unpack, u32>),
            M::Kunpckdq => Some(binary::<Unpack, u64>),
            _ => None,
        })
}

fn test(m: M) -> Option<Handler> {
    widths!(m, ktest, Ktestb, Ktestw, Ktestd, Ktestq)
        .or(widths!(m, kortest, Kortestb, Kortestw, Kortestd, Kortestq))
}

fn moves(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    let m = raw.mnemonic();
    let opmask = |i| is_opmask(raw.op_kind(i), raw.op_register(i));
    let memory = |i| raw.op_kind(i) == OpKind::Memory;
    if raw.op_count() != 2 {
        return None;
    }
    if opmask(0) && opmask(1) {
        widths!(m, copy, Kmovb, Kmovw, Kmovd, Kmovq)
    } else if opmask(0) && memory(1) {
        widths!(m, load, Kmovb, Kmovw, Kmovd, Kmovq)
    } else if memory(0) {
        widths!(m, store, Kmovb, Kmovw, Kmovd, Kmovq)
    } else if opmask(0) {
        widths!(m, from_gpr, Kmovb, Kmovw, Kmovd, Kmovq)
    } else {
        widths!(m, to_gpr, Kmovb, Kmovw, Kmovd, Kmovq)
    }
}

#[inline(always)]
fn check(cpu: &mut Cpu) -> Result<(), Stop> {
    cpu.check_class(Class::Opmask)
}

/// The low bits of a mask, as many as `T` has.
#[inline(always)]
fn low<T: Ram>(v: u64) -> u64 {
    T::from_u64(v).to_u64()
}

// KAND k, k, k and the like.
fn binary<O: Operation, T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = O::apply(cpu.opmask(insn.op1), cpu.opmask(insn.op2), T::BITS);
    cpu.set_opmask(insn.op0, low::<T>(v));
    Ok(())
}

fn not<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = low::<T>(!cpu.opmask(insn.op1));
    cpu.set_opmask(insn.op0, v);
    Ok(())
}

// A count of the width or more leaves nothing.
fn shift_left<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = cpu.opmask(insn.op1).checked_shl(insn.imm as u32 & 0xff);
    cpu.set_opmask(insn.op0, low::<T>(v.unwrap_or(0)));
    Ok(())
}

fn shift_right<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = low::<T>(cpu.opmask(insn.op1)).checked_shr(insn.imm as u32 & 0xff);
    cpu.set_opmask(insn.op0, v.unwrap_or(0));
    Ok(())
}

/// ZF and CF; the other status flags are cleared.
#[inline(always)]
fn set_flags(cpu: &mut Cpu, zero: bool, carry: bool) {
    let zf = if zero { rflags::ZF } else { 0 };
    let cf = if carry { rflags::CF } else { 0 };
    cpu.state.rflags = cpu.state.rflags & !rflags::STATUS | zf | cf;
}

fn ktest<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let (a, b) = (cpu.opmask(insn.op0), cpu.opmask(insn.op1));
    set_flags(cpu, low::<T>(a & b) == 0, low::<T>(!a & b) == 0);
    Ok(())
}

fn kortest<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = low::<T>(cpu.opmask(insn.op0) | cpu.opmask(insn.op1));
    set_flags(cpu, v == 0, v == low::<T>(u64::MAX));
    Ok(())
}

fn copy<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = low::<T>(cpu.opmask(insn.op1));
    cpu.set_opmask(insn.op0, v);
    Ok(())
}

fn load<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = cpu.read::<T>(insn)?.to_u64();
    cpu.set_opmask(insn.op0, v);
    Ok(())
}

fn store<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    cpu.write(insn, T::from_u64(cpu.opmask(insn.op1)))
}

// The general register is one of 32 bits for all but KMOVQ; of the narrow forms its low bits.
fn from_gpr<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    let v = low::<T>(cpu.state.regs[insn.op1]);
    cpu.set_opmask(insn.op0, v);
    Ok(())
}

fn to_gpr<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    cpu.state.regs[insn.op0] = low::<T>(cpu.opmask(insn.op1));
    Ok(())
}
