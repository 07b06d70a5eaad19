//! Single bits and bit fields of integers: BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, BSWAP,
//! MOVBE, CRC32 (SDM Vol. 2).

use iced_x86::{Mnemonic, OpKind};

use super::form::{Memory, Register, Source, by_width, by_word, in_memory, operand_bytes};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, WordAlu, crc32, merge, status};
use crate::state::rflags::{CF, STATUS, ZF};
use crate::width::Width;

/// What BT, BTS, BTR or BTC makes of the operand, given a mask of the one bit.
trait BitTest {
    const STORES: bool = true;
    fn apply<T: Alu>(a: T, bit: T) -> T;
}

struct Bt;
struct Bts;
struct Btr;
struct Btc;

impl BitTest for Bt {
    const STORES: bool = false;
    #[inline(always)]
    fn apply<T: Alu>(a: T, _: T) -> T {
        a
    }
}
impl BitTest for Bts {
    #[inline(always)]
    fn apply<T: Alu>(a: T, bit: T) -> T {
        a | bit
    }
}
impl BitTest for Btr {
    #[inline(always)]
    fn apply<T: Alu>(a: T, bit: T) -> T {
        a & !bit
    }
}
impl BitTest for Btc {
    #[inline(always)]
    fn apply<T: Alu>(a: T, bit: T) -> T {
        a ^ bit
    }
}

/// The bit number: an immediate or a register.
trait Offset {
    fn of<T: Alu>(cpu: &Cpu, insn: &Insn) -> i64;
    /// A register's bit number reaches beyond a memory operand.
    const FAR: bool;
}
struct ImmediateOffset;
struct RegisterOffset;

impl Offset for ImmediateOffset {
    const FAR: bool = false;
    #[inline(always)]
    fn of<T: Alu>(_: &Cpu, insn: &Insn) -> i64 {
        insn.imm as i64
    }
}
impl Offset for RegisterOffset {
    const FAR: bool = true;
    #[inline(always)]
    fn of<T: Alu>(cpu: &Cpu, insn: &Insn) -> i64 {
        T::get(&cpu.state.regs, insn.op1).to_i64()
    }
}

/// The operand with only bit `offset` modulo its size set.
#[inline(always)]
fn bit<T: Width>(offset: i64) -> T {
    T::from_u64(1 << (offset & i64::from(T::BITS - 1)))
}

/// RFLAGS with CF as the bit was; the other flags, of which the SDM defines only ZF, stay.
#[inline(always)]
fn with_carry(flags: u64, carry: bool) -> u64 {
    merge(flags, carry.into(), CF)
}

fn test_register<O: BitTest, T: Alu, F: Offset>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let bit = bit::<T>(F::of::<T>(cpu, insn));
    let s = &mut cpu.state;
    let a = T::get(&s.regs, insn.op0);
    s.rflags = with_carry(s.rflags, a & bit != T::default());
    if O::STORES {
        O::apply(a, bit).set(&mut s.regs, insn.op0);
    }
    Ok(())
}

fn test_memory<O: BitTest, T: Alu, F: Offset>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let offset = F::of::<T>(cpu, insn);
    let mut address = cpu.effective_address(insn);
    if F::FAR {
        let units = offset >> T::BITS.trailing_zeros();
        let bytes = (units as u64).wrapping_mul(T::BYTES as u64);
        address = address.wrapping_add(bytes) & insn.addr_mask;
    }
    let bit = bit::<T>(offset);
    let carry = if O::STORES {
        cpu.modify_at(insn.seg, address, insn.lock(), |a: T| {
            (O::apply(a, bit), a & bit != T::default())
        })?
    } else {
        cpu.read_at::<T>(insn.seg, address)? & bit != T::default()
    };
    cpu.state.rflags = with_carry(cpu.state.rflags, carry);
    Ok(())
}

fn bit_test<O: BitTest>(insn: &Insn) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match (in_memory(raw, 0), raw.op1_kind() == OpKind::Register) {
        (false, false) => by_word!(bytes, T => test_register::<O, T, ImmediateOffset>),
        (false, true) => by_word!(bytes, T => test_register::<O, T, RegisterOffset>),
        (true, false) => by_word!(bytes, T => test_memory::<O, T, ImmediateOffset>),
        (true, true) => by_word!(bytes, T => test_memory::<O, T, RegisterOffset>),
    }
}

/// BSF, BSR, TZCNT, LZCNT.
trait Scan {
    fn apply<T: WordAlu>(dest: u64, v: T, flags: u64) -> (u64, u64);
}

macro_rules! scans {
    ($($name:ident: $op:ident),*) => {$(
        struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn apply<T: WordAlu>(dest: u64, v: T, flags: u64) -> (u64, u64) {
                T::$op(dest, v, flags)
            }
        }
    )*};
}

scans!(Bsf: bsf, Bsr: bsr, Tzcnt: tzcnt, Lzcnt: lzcnt);

// The host instruction gets the whole destination register: BSF and BSR of 0 leave it unchanged, to
// its last bit or not just as the host does.
fn scan<O: Scan, T: WordAlu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let v = S::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    let (dest, flags) = O::apply(s.regs[insn.op0], v, s.rflags);
    s.regs[insn.op0] = dest;
    s.rflags = status(s.rflags, flags);
    Ok(())
}

fn scan_forms<O: Scan>(insn: &Insn) -> Option<Handler> {
    let bytes = operand_bytes(&insn.raw, 0);
    if in_memory(&insn.raw, 1) {
        by_word!(bytes, T => scan::<O, T, Memory>)
    } else {
        by_word!(bytes, T => scan::<O, T, Register>)
    }
}

fn popcnt<T: Alu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let v = S::fetch::<T>(cpu, insn)?;
    let s = &mut cpu.state;
    T::from_u64(v.to_u64().count_ones().into()).set(&mut s.regs, insn.op0);
    let zero = if v == T::default() { ZF } else { 0 };
    s.rflags = merge(s.rflags, zero, STATUS);
    Ok(())
}

#[inline(always)]
fn reverse<T: Width>(v: T) -> T {
    T::from_u64(v.to_u64().swap_bytes() >> (64 - T::BITS))
}

// BSWAP of a 16-bit register is undefined; processors write 0.
fn bswap<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let regs = &mut cpu.state.regs;
    let v = T::get(regs, insn.op0);
    let v = if T::BYTES == 2 {
        T::default()
    } else {
        reverse(v)
    };
    v.set(regs, insn.op0);
    Ok(())
}

fn movbe_load<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    reverse(cpu.read::<T>(insn)?).set(&mut cpu.state.regs, insn.op0);
    Ok(())
}

fn movbe_store<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.write(insn, reverse(T::get(&cpu.state.regs, insn.op1)))
}

fn crc32_any<T: Alu, S: Source>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let v = S::fetch::<T>(cpu, insn)?;
    let regs = &mut cpu.state.regs;
    regs[insn.op0] = crc32(regs[insn.op0] as u32, v.to_u64(), T::BYTES).into();
    Ok(())
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match raw.mnemonic() {
        Mnemonic::Bt => bit_test::<Bt>(insn),
        Mnemonic::Bts => bit_test::<Bts>(insn),
        Mnemonic::Btr => bit_test::<Btr>(insn),
        Mnemonic::Btc => bit_test::<Btc>(insn),
        Mnemonic::Bsf => scan_forms::<Bsf>(insn),
        Mnemonic::Bsr => scan_forms::<Bsr>(insn),
        Mnemonic::Tzcnt => scan_forms::<Tzcnt>(insn),
        Mnemonic::Lzcnt => scan_forms::<Lzcnt>(insn),
        Mnemonic::Popcnt if in_memory(raw, 1) => by_word!(bytes, T => popcnt::<T, Memory>),
        Mnemonic::Popcnt => by_word!(bytes, T => popcnt::<T, Register>),
        Mnemonic::Bswap => by_word!(bytes, T => bswap::<T>),
        Mnemonic::Movbe if in_memory(raw, 1) => by_word!(bytes, T => movbe_load::<T>),
        Mnemonic::Movbe => by_word!(bytes, T => movbe_store::<T>),
        Mnemonic::Crc32 if in_memory(raw, 1) => {
            by_width!(operand_bytes(raw, 1), T => crc32_any::<T, Memory>)
        }
        Mnemonic::Crc32 => by_width!(operand_bytes(raw, 1), T => crc32_any::<T, Register>),
        _ => None,
    }
}
