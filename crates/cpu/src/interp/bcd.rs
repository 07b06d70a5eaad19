//! Decimal arithmetic and other instructions that 64-bit code does not have: AAA, AAS, AAM, AAD,
//! DAA, DAS, SALC, BOUND (SDM Vol. 2).

use iced_x86::{Code, Mnemonic};

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::events::vector;
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, merge, status};
use crate::state::rflags::{AF, CF};
use crate::state::{CpuState, reg};
use crate::width::Width;

/// Code of AH.
const AH: u8 = 1;

fn al(s: &CpuState) -> u8 {
    u8::get(&s.regs, reg::RAX)
}

/// The low digit needs adjusting.
fn adjusts(s: &CpuState) -> bool {
    al(s) & 15 > 9 || s.rflags & AF != 0
}

fn set_carries(s: &mut CpuState, af: bool, cf: bool) {
    let bits = if af { AF } else { 0 } | if cf { CF } else { 0 };
    s.rflags = merge(s.rflags, bits, AF | CF);
}

/// DAA. OF is undefined; it comes out as that of the one addition the two adjustments make.
fn daa(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let old = al(s);
    let low = adjusts(s);
    let high = old > 0x99 || s.rflags & CF != 0;
    let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let (v, flags) = u8::add(old, by);
    v.set(&mut s.regs, reg::RAX);
    s.rflags = status(s.rflags, flags);
    set_carries(s, low, high);
    Ok(())
}

/// DAS; see [`daa`].
fn das(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let old = al(s);
    let low = adjusts(s);
    let high = old > 0x99 || s.rflags & CF != 0;
    let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let (v, flags) = u8::sub(old, by);
    v.set(&mut s.regs, reg::RAX);
    s.rflags = status(s.rflags, flags);
    // The first adjustment alone may borrow.
    set_carries(s, low, high || low && old < 6);
    Ok(())
}

/// AAA (`UP`) and AAS. OF, SF, ZF and PF are undefined; they come out as those of the addition to AX
/// before AL is cut to a digit.
fn ascii_adjust<const UP: bool>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let adjust = adjusts(s);
    let by = if adjust { 0x106 } else { 0 };
    let ax = u16::get(&s.regs, reg::RAX);
    let (ax, flags) = if UP {
        u16::add(ax, by)
    } else {
        u16::sub(ax, by)
    };
    (ax & 0xff0f).set(&mut s.regs, reg::RAX);
    s.rflags = status(s.rflags, flags);
    set_carries(s, adjust, adjust);
    Ok(())
}

fn aam(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let (v, base) = (al(s), insn.imm as u8);
    let Some(high) = v.checked_div(base) else {
        return Err(cpu.raise_vector(vector::DE));
    };
    high.set(&mut s.regs, AH);
    let low = v % base;
    low.set(&mut s.regs, reg::RAX);
    s.rflags = status(s.rflags, u8::and(low, low).1);
    Ok(())
}

fn aad(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let high = u8::get(&s.regs, AH).wrapping_mul(insn.imm as u8);
    let (v, flags) = u8::add(al(s), high);
    u16::from(v).set(&mut s.regs, reg::RAX);
    s.rflags = status(s.rflags, flags);
    Ok(())
}

fn salc(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let v = if s.rflags & CF != 0 { 0xff } else { 0 };
    u8::set(v, &mut s.regs, reg::RAX);
    Ok(())
}

fn bound<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let at = cpu.effective_address(insn);
    let lower = cpu.read_at::<T>(insn.seg, at)?.to_i64();
    let next = at.wrapping_add(T::BYTES as u64) & insn.addr_mask;
    let upper = cpu.read_at::<T>(insn.seg, next)?.to_i64();
    let index = T::get(&cpu.state.regs, insn.op0).to_i64();
    if index < lower || index > upper {
        return Err(cpu.raise_vector(vector::BR));
    }
    Ok(())
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match (insn.raw.mnemonic(), insn.raw.code()) {
        (Mnemonic::Daa, _) => daa,
        (Mnemonic::Das, _) => das,
        (Mnemonic::Aaa, _) => ascii_adjust::<true>,
        (Mnemonic::Aas, _) => ascii_adjust::<false>,
        (Mnemonic::Aam, _) => aam,
        (Mnemonic::Aad, _) => aad,
        (Mnemonic::Salc, _) => salc,
        (_, Code::Bound_r16_m1616) => bound::<u16>,
        (_, Code::Bound_r32_m3232) => bound::<u32>,
        _ => return None,
    })
}
