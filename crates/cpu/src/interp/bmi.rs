//! BMI1 and BMI2 (SDM Vol. 2: ANDN … SHRX): compilers use them freely, so they do without a stub.
//! Undefined flags stay as they were. PDEP and PEXT are left to native assist.

use iced_x86::{Mnemonic, OpKind};

use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::mode::Mode;
use crate::state::{reg, rflags};

/// An operation on the r/m operand and another register (or the immediate).
trait Operation {
    /// Flags the operation defines.
    const DEFINES: u64;
    /// Result and carry flag; `bits` is the operand size.
    fn apply(rm: u64, other: u64, bits: u32) -> (u64, bool);
}

const RESULT: u64 = rflags::ZF | rflags::SF | rflags::CF | rflags::OF;

macro_rules! operations {
    ($($name:ident, $defines:expr, |$rm:ident, $other:ident, $bits:ident| $body:expr;)*) => {$(
        struct $name;
        impl Operation for $name {
            const DEFINES: u64 = $defines;
            #[inline(always)]
            fn apply($rm: u64, $other: u64, $bits: u32) -> (u64, bool) {
                $body
            }
        }
    )*};
}

operations! {
    Andn, RESULT, |rm, other, _bits| (!other & rm, false);
    Blsi, RESULT, |rm, _other, _bits| (rm.wrapping_neg() & rm, rm != 0);
    Blsmsk, RESULT, |rm, _other, _bits| (rm.wrapping_sub(1) ^ rm, rm == 0);
    Blsr, RESULT, |rm, _other, _bits| (rm.wrapping_sub(1) & rm, rm == 0);
    Bzhi, RESULT, |rm, other, bits| {
        let n = (other & 0xff) as u32;
        (if n < bits { rm & low(n) } else { rm }, n >= bits)
    };
    Bextr, rflags::ZF | rflags::CF | rflags::OF, |rm, other, bits| {
        let start = (other & 0xff) as u32;
        let len = (other >> 8 & 0xff) as u32;
        (if start < bits { rm >> start & low(len) } else { 0 }, false)
    };
    Shlx, 0, |rm, other, bits| (rm << (other as u32 & (bits - 1)), false);
    Shrx, 0, |rm, other, bits| (rm >> (other as u32 & (bits - 1)), false);
    Sarx, 0, |rm, other, bits| {
        let unused = 64 - bits;
        (((rm << unused) as i64 >> unused >> (other as u32 & (bits - 1))) as u64, false)
    };
    Rorx, 0, |rm, other, bits| {
        let n = other as u32 & (bits - 1);
        (if n == 0 { rm } else { rm >> n | rm << (bits - n) }, false)
    };
}

/// Ones in the low `n` bits.
fn low(n: u32) -> u64 {
    1_u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1)
}

/// The r/m operand: memory, or the register with this code.
#[inline(always)]
fn fetch<T: Ram, const MEMORY: bool>(cpu: &mut Cpu, insn: &Insn, code: u8) -> Result<u64, Stop> {
    if MEMORY {
        Ok(cpu.read::<T>(insn)?.to_u64())
    } else {
        Ok(T::get(&cpu.state.regs, code).to_u64())
    }
}

#[inline(always)]
fn finish<O: Operation, T: Ram>(cpu: &mut Cpu, insn: &Insn, rm: u64, other: u64) {
    let (v, carry) = O::apply(rm, other, T::BITS);
    let v = T::from_u64(v);
    v.set(&mut cpu.state.regs, insn.op0);
    if O::DEFINES != 0 {
        let sign = v.to_u64() >> (T::BITS - 1) & 1 != 0;
        let flags = if v == T::default() { rflags::ZF } else { 0 }
            | if sign { rflags::SF } else { 0 }
            | if carry { rflags::CF } else { 0 };
        cpu.state.rflags = cpu.state.rflags & !O::DEFINES | flags & O::DEFINES;
    }
}

// ANDN r, r, r/m.
fn rm_last<O: Operation, T: Ram, const MEMORY: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    cpu.check_class(Class::GprVex)?;
    let rm = fetch::<T, MEMORY>(cpu, insn, insn.op2)?;
    let other = T::get(&cpu.state.regs, insn.op1).to_u64();
    finish::<O, T>(cpu, insn, rm, other);
    Ok(())
}

// BZHI r, r/m, r and the like; BLSR r, r/m (whose other operand does not matter).
fn rm_second<O: Operation, T: Ram, const MEMORY: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    cpu.check_class(Class::GprVex)?;
    let rm = fetch::<T, MEMORY>(cpu, insn, insn.op1)?;
    let other = T::get(&cpu.state.regs, insn.op2).to_u64();
    finish::<O, T>(cpu, insn, rm, other);
    Ok(())
}

// RORX r, r/m, imm8.
fn with_immediate<O: Operation, T: Ram, const MEMORY: bool>(
    cpu: &mut Cpu,
    insn: &Insn,
) -> Result<(), Stop> {
    cpu.check_class(Class::GprVex)?;
    let rm = fetch::<T, MEMORY>(cpu, insn, insn.op1)?;
    finish::<O, T>(cpu, insn, rm, insn.imm);
    Ok(())
}

// MULX high, low, r/m: times RDX; with one destination for both it gets the high half.
fn mulx<T: Ram, const MEMORY: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::GprVex)?;
    let rm = fetch::<T, MEMORY>(cpu, insn, insn.op2)?;
    let product = u128::from(rm) * u128::from(T::get(&cpu.state.regs, reg::RDX).to_u64());
    T::from_u64(product as u64).set(&mut cpu.state.regs, insn.op1);
    T::from_u64((product >> T::BITS) as u64).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

/// Instantiates a handler for operand size and r/m kind.
macro_rules! form {
    ($insn:expr, $f:ident $(, $o:ident)?) => {{
        let wide = $insn.raw.op0_register().size() == 8;
        let memory = $insn.raw.op_kinds().any(|k| k == OpKind::Memory);
        match (wide, memory) {
            (false, false) => $f::<$($o,)? u32, false>,
            (false, true) => $f::<$($o,)? u32, true>,
            (true, false) => $f::<$($o,)? u64, false>,
            (true, true) => $f::<$($o,)? u64, true>,
        }
    }};
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match insn.raw.mnemonic() {
        Mnemonic::Andn => form!(insn, rm_last, Andn),
        Mnemonic::Blsi => form!(insn, rm_second, Blsi),
        Mnemonic::Blsmsk => form!(insn, rm_second, Blsmsk),
        Mnemonic::Blsr => form!(insn, rm_second, Blsr),
        Mnemonic::Bzhi => form!(insn, rm_second, Bzhi),
        Mnemonic::Bextr if insn.op2 != 255 => form!(insn, rm_second, Bextr),
        Mnemonic::Shlx => form!(insn, rm_second, Shlx),
        Mnemonic::Shrx => form!(insn, rm_second, Shrx),
        Mnemonic::Sarx => form!(insn, rm_second, Sarx),
        Mnemonic::Rorx => form!(insn, with_immediate, Rorx),
        Mnemonic::Mulx => form!(insn, mulx),
        _ => return None,
    })
}
