//! Exchanges: XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B (SDM Vol. 2).
//!
//! XCHG with memory is locked with or without the prefix. The compare-and-exchange instructions
//! write memory in either case: its old value if the comparison fails.

use iced_x86::Mnemonic;

use super::form::{by_width, in_memory, operand_bytes};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::native::alu::{Alu, merge, status};
use crate::state::reg::{RAX, RBX, RCX, RDX};
use crate::state::rflags::ZF;
use crate::width::Width;

fn xchg_register<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let regs = &mut cpu.state.regs;
    let (a, b) = (T::get(regs, insn.op0), T::get(regs, insn.op1));
    b.set(regs, insn.op0);
    a.set(regs, insn.op1);
    Ok(())
}

fn xchg_memory<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let address = cpu.effective_address(insn);
    let new = T::get(&cpu.state.regs, insn.op1);
    let old = cpu.modify_at(insn.seg, address, true, |old: T| (new, old))?;
    old.set(&mut cpu.state.regs, insn.op1);
    Ok(())
}

// The source is written first: XADD of a register with itself leaves the sum.
fn xadd_register<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let old = T::get(&s.regs, insn.op0);
    let (sum, flags) = T::add(old, T::get(&s.regs, insn.op1));
    old.set(&mut s.regs, insn.op1);
    sum.set(&mut s.regs, insn.op0);
    s.rflags = status(s.rflags, flags);
    Ok(())
}

fn xadd_memory<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let addend = T::get(&cpu.state.regs, insn.op1);
    let (old, flags) = cpu.modify(insn, |old: T| {
        let (sum, flags) = T::add(old, addend);
        (sum, (old, flags))
    })?;
    let s = &mut cpu.state;
    old.set(&mut s.regs, insn.op1);
    s.rflags = status(s.rflags, flags);
    Ok(())
}

fn cmpxchg_register<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let s = &mut cpu.state;
    let (expected, old) = (T::get(&s.regs, RAX), T::get(&s.regs, insn.op0));
    s.rflags = status(s.rflags, T::sub(expected, old).1);
    if old == expected {
        T::get(&s.regs, insn.op1).set(&mut s.regs, insn.op0);
    } else {
        old.set(&mut s.regs, RAX);
    }
    Ok(())
}

fn cmpxchg_memory<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let regs = &cpu.state.regs;
    let (expected, new) = (T::get(regs, RAX), T::get(regs, insn.op1));
    let old = cpu.modify(insn, |old: T| {
        (if old == expected { new } else { old }, old)
    })?;
    let s = &mut cpu.state;
    s.rflags = status(s.rflags, T::sub(expected, old).1);
    if old != expected {
        old.set(&mut s.regs, RAX);
    }
    Ok(())
}

/// The pair of 32-bit registers `high`:`low`.
fn pair32(cpu: &Cpu, high: u8, low: u8) -> u64 {
    cpu.state.regs[high] << 32 | cpu.state.regs[low] & 0xffff_ffff
}

fn cmpxchg8b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (expected, new) = (pair32(cpu, RDX, RAX), pair32(cpu, RCX, RBX));
    let old = cpu.modify(insn, |old: u64| {
        (if old == expected { new } else { old }, old)
    })?;
    let s = &mut cpu.state;
    if old != expected {
        (old as u32).set(&mut s.regs, RAX);
        ((old >> 32) as u32).set(&mut s.regs, RDX);
    }
    s.rflags = merge(s.rflags, if old == expected { ZF } else { 0 }, ZF);
    Ok(())
}

/// The pair of 64-bit registers `high`:`low`.
fn pair64(cpu: &Cpu, high: u8, low: u8) -> u128 {
    u128::from(cpu.state.regs[high]) << 64 | u128::from(cpu.state.regs[low])
}

fn cmpxchg16b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (expected, new) = (pair64(cpu, RDX, RAX), pair64(cpu, RCX, RBX));
    let old = cpu.compare_exchange_16(insn, expected, new)?;
    let s = &mut cpu.state;
    if old != expected {
        s.regs[RAX] = old as u64;
        s.regs[RDX] = (old >> 64) as u64;
    }
    s.rflags = merge(s.rflags, if old == expected { ZF } else { 0 }, ZF);
    Ok(())
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = operand_bytes(raw, 0);
    match (raw.mnemonic(), in_memory(raw, 0)) {
        (Mnemonic::Xchg, true) => by_width!(bytes, T => xchg_memory::<T>),
        (Mnemonic::Xchg, false) => by_width!(bytes, T => xchg_register::<T>),
        (Mnemonic::Xadd, true) => by_width!(bytes, T => xadd_memory::<T>),
        (Mnemonic::Xadd, false) => by_width!(bytes, T => xadd_register::<T>),
        (Mnemonic::Cmpxchg, true) => by_width!(bytes, T => cmpxchg_memory::<T>),
        (Mnemonic::Cmpxchg, false) => by_width!(bytes, T => cmpxchg_register::<T>),
        (Mnemonic::Cmpxchg8b, _) => Some(cmpxchg8b),
        (Mnemonic::Cmpxchg16b, _) => Some(cmpxchg16b),
        _ => None,
    }
}
