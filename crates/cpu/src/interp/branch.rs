//! Near transfers of control: JMP, Jcc, JrCXZ, LOOPcc, CALL, RET (SDM Vol. 2).
//!
//! The target is cut to the operand size and checked — against the limit of CS, or for canonical
//! form in 64-bit code — before anything happens.

use std::marker::PhantomData;

use iced_x86::{Mnemonic, OpKind};

use super::condition::{by_condition, holds};
use super::form::operand_bytes;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, SEG_FLAT_SS};
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::mode::Mode;
use crate::state::{reg, rflags, seg};
use crate::width::Width;

/// Near branches of one operand size.
trait Near {
    /// The operand size.
    type Size: Ram;
    /// A target cut to the size, unless it must be looked at more closely.
    fn near(cpu: &Cpu, target: u64) -> Option<u64>;
    /// A target, checked.
    fn check(cpu: &mut Cpu, target: u64) -> Result<u64, Stop>;
    /// Pushes a return address if the TLB has the place.
    fn push_hit(cpu: &mut Cpu, value: u64) -> bool;
    /// The value at the top of the stack, if the TLB has it.
    fn top_hit(cpu: &Cpu) -> Option<u64>;
    /// Frees `bytes` of the stack.
    fn release(cpu: &mut Cpu, bytes: u64);
}

/// 64-bit code.
struct Long;
/// 16- and 32-bit code, with an operand size of 16 or 32.
struct Legacy<T>(PhantomData<T>);

impl Near for Long {
    type Size = u64;

    // Bits 47-63 are equal: canonical with 48 bits, and so with 57.
    #[inline(always)]
    fn near(_: &Cpu, target: u64) -> Option<u64> {
        ((target as i64 >> 47).wrapping_add(1) as u64 <= 1).then_some(target)
    }
    fn check(cpu: &mut Cpu, target: u64) -> Result<u64, Stop> {
        if cpu.canonical(target) {
            Ok(target)
        } else {
            Err(cpu.gp0())
        }
    }
    #[inline(always)]
    fn push_hit(cpu: &mut Cpu, value: u64) -> bool {
        let rsp = cpu.state.regs[reg::RSP].wrapping_sub(8);
        let hit = cpu.write_hit_at(SEG_FLAT_SS, rsp, value);
        if hit {
            cpu.state.regs[reg::RSP] = rsp;
        }
        hit
    }
    #[inline(always)]
    fn top_hit(cpu: &Cpu) -> Option<u64> {
        cpu.read_hit_at(SEG_FLAT_SS, cpu.state.regs[reg::RSP])
    }
    #[inline(always)]
    fn release(cpu: &mut Cpu, bytes: u64) {
        let rsp = &mut cpu.state.regs[reg::RSP];
        *rsp = rsp.wrapping_add(bytes);
    }
}

impl<T: Ram> Near for Legacy<T> {
    type Size = T;

    #[inline(always)]
    fn near(cpu: &Cpu, target: u64) -> Option<u64> {
        let target = T::from_u64(target).to_u64();
        let limit = cpu.state.seg[usize::from(seg::CS)].limit;
        (target <= limit.into()).then_some(target)
    }
    fn check(cpu: &mut Cpu, target: u64) -> Result<u64, Stop> {
        Self::near(cpu, target).ok_or_else(|| cpu.gp0())
    }
    #[inline(always)]
    fn push_hit(cpu: &mut Cpu, value: u64) -> bool {
        let (code, mask) = cpu.stack();
        let sp = cpu.state.regs[reg::RSP].wrapping_sub(T::BYTES as u64) & mask;
        let hit = cpu.write_hit_at(code, sp, T::from_u64(value));
        if hit {
            cpu.set_stack_pointer(sp, mask);
        }
        hit
    }
    #[inline(always)]
    fn top_hit(cpu: &Cpu) -> Option<u64> {
        let (code, mask) = cpu.stack();
        let top: T = cpu.read_hit_at(code, cpu.state.regs[reg::RSP] & mask)?;
        Some(top.to_u64())
    }
    #[inline(always)]
    fn release(cpu: &mut Cpu, bytes: u64) {
        let (_, mask) = cpu.stack();
        let sp = cpu.state.regs[reg::RSP].wrapping_add(bytes);
        cpu.set_stack_pointer(sp, mask);
    }
}

/// Moves RIP to a target, checked.
#[inline(always)]
fn go<N: Near>(cpu: &mut Cpu, target: u64) -> Result<(), Stop> {
    match N::near(cpu, target) {
        Some(target) => {
            cpu.state.set_rip(target);
            Ok(())
        }
        None => go_far::<N>(cpu, target),
    }
}

#[cold]
#[inline(never)]
fn go_far<N: Near>(cpu: &mut Cpu, target: u64) -> Result<(), Stop> {
    let target = N::check(cpu, target)?;
    cpu.state.set_rip(target);
    Ok(())
}

#[inline(always)]
fn go_relative<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    go::<N>(cpu, cpu.state.rip().wrapping_add(insn.imm))
}

fn jmp<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    go_relative::<N>(cpu, insn)
}

fn jcc<N: Near, const CC: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if holds::<CC>(cpu.state.rflags) {
        return go_relative::<N>(cpu, insn);
    }
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ: `C` is the address size.
fn jrcxz<N: Near, C: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if C::get(&cpu.state.regs, reg::RCX) == C::default() {
        return go_relative::<N>(cpu, insn);
    }
    Ok(())
}

/// LOOPNE (`KIND` 0), LOOPE (1), LOOP (2): `C` is the address size.
fn loop_while<N: Near, C: Width, const KIND: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = C::from_u64(C::get(&cpu.state.regs, reg::RCX).to_u64().wrapping_sub(1));
    let zf = cpu.state.rflags & rflags::ZF != 0;
    if count != C::default() && (KIND == 2 || zf == (KIND == 1)) {
        go_relative::<N>(cpu, insn)?;
    }
    count.set(&mut cpu.state.regs, reg::RCX);
    Ok(())
}

/// Pushes the address behind the instruction and goes to the target; nothing happens if either
/// fails.
#[inline(always)]
fn call_to<N: Near>(cpu: &mut Cpu, target: u64) -> Result<(), Stop> {
    if let Some(near) = N::near(cpu, target)
        && N::push_hit(cpu, cpu.state.rip())
    {
        cpu.state.set_rip(near);
        return Ok(());
    }
    call_slow::<N>(cpu, target)
}

#[inline(never)]
fn call_slow<N: Near>(cpu: &mut Cpu, target: u64) -> Result<(), Stop> {
    let target = N::check(cpu, target)?;
    cpu.push(N::Size::from_u64(cpu.state.rip()))?;
    cpu.state.set_rip(target);
    Ok(())
}

fn call<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.state.rip().wrapping_add(insn.imm);
    call_to::<N>(cpu, target)
}

fn call_register<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = N::Size::get(&cpu.state.regs, insn.op0).to_u64();
    call_to::<N>(cpu, target)
}

fn call_memory<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.read::<N::Size>(insn)?.to_u64();
    call_to::<N>(cpu, target)
}

fn jmp_register<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = N::Size::get(&cpu.state.regs, insn.op0).to_u64();
    go::<N>(cpu, target)
}

fn jmp_memory<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.read::<N::Size>(insn)?.to_u64();
    go::<N>(cpu, target)
}

/// RET, and with `FREES` RET imm16, which frees that much of the stack besides.
fn ret<N: Near, const FREES: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if let Some(target) = N::top_hit(cpu)
        && let Some(target) = N::near(cpu, target)
    {
        cpu.state.set_rip(target);
        N::release(cpu, freed::<N, FREES>(insn));
        return Ok(());
    }
    ret_slow::<N, FREES>(cpu, insn)
}

#[inline(never)]
fn ret_slow<N: Near, const FREES: bool>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (code, mask) = cpu.stack();
    let top: N::Size = cpu.read_at(code, cpu.state.regs[reg::RSP] & mask)?;
    let target = N::check(cpu, top.to_u64())?;
    cpu.state.set_rip(target);
    N::release(cpu, freed::<N, FREES>(insn));
    Ok(())
}

/// Bytes of the stack that RET takes.
#[inline(always)]
fn freed<N: Near, const FREES: bool>(insn: &Insn) -> u64 {
    N::Size::BYTES as u64 + if FREES { insn.imm & 0xffff } else { 0 }
}

/// The handler of an instruction whose only variable is the operand size.
macro_rules! by_near {
    ($bytes:expr, $n:ident => $handler:expr) => {
        match $bytes {
            2 => {
                type $n = Legacy<u16>;
                Some($handler as Handler)
            }
            4 => {
                type $n = Legacy<u32>;
                Some($handler as Handler)
            }
            8 => {
                type $n = Long;
                Some($handler as Handler)
            }
            _ => None,
        }
    };
}

fn conditional<N: Near>(insn: &Insn) -> Option<Handler> {
    by_condition!(insn.raw, CC => jcc::<N, CC>)
}

/// LOOPcc and JrCXZ, by counter size.
fn counted<N: Near>(insn: &Insn) -> Option<Handler> {
    use iced_x86::Code as C;
    Some(match insn.raw.code() {
        C::Jcxz_rel8_16 | C::Jcxz_rel8_32 => jrcxz::<N, u16>,
        C::Jecxz_rel8_16 | C::Jecxz_rel8_32 | C::Jecxz_rel8_64 => jrcxz::<N, u32>,
        C::Jrcxz_rel8_16 | C::Jrcxz_rel8_64 => jrcxz::<N, u64>,
        C::Loopne_rel8_16_CX | C::Loopne_rel8_32_CX => loop_while::<N, u16, 0>,
        C::Loopne_rel8_16_ECX | C::Loopne_rel8_32_ECX | C::Loopne_rel8_64_ECX => {
            loop_while::<N, u32, 0>
        }
        C::Loopne_rel8_16_RCX | C::Loopne_rel8_64_RCX => loop_while::<N, u64, 0>,
        C::Loope_rel8_16_CX | C::Loope_rel8_32_CX => loop_while::<N, u16, 1>,
        C::Loope_rel8_16_ECX | C::Loope_rel8_32_ECX | C::Loope_rel8_64_ECX => {
            loop_while::<N, u32, 1>
        }
        C::Loope_rel8_16_RCX | C::Loope_rel8_64_RCX => loop_while::<N, u64, 1>,
        C::Loop_rel8_16_CX | C::Loop_rel8_32_CX => loop_while::<N, u16, 2>,
        C::Loop_rel8_16_ECX | C::Loop_rel8_32_ECX | C::Loop_rel8_64_ECX => loop_while::<N, u32, 2>,
        C::Loop_rel8_16_RCX | C::Loop_rel8_64_RCX => loop_while::<N, u64, 2>,
        _ => return None,
    })
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let raw = &insn.raw;
    let bytes = match raw.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => operand_bytes(raw, 0),
    };
    match (raw.mnemonic(), raw.op0_kind()) {
        (_, OpKind::FarBranch16 | OpKind::FarBranch32) => None,
        (Mnemonic::Jmp, OpKind::Register) => by_near!(bytes, N => jmp_register::<N>),
        (Mnemonic::Jmp, OpKind::Memory) if raw.is_jmp_near_indirect() => {
            by_near!(bytes, N => jmp_memory::<N>)
        }
        (Mnemonic::Jmp, OpKind::Memory) => None,
        (Mnemonic::Jmp, _) => by_near!(bytes, N => jmp::<N>),
        (Mnemonic::Call, OpKind::Register) => by_near!(bytes, N => call_register::<N>),
        (Mnemonic::Call, OpKind::Memory) if raw.is_call_near_indirect() => {
            by_near!(bytes, N => call_memory::<N>)
        }
        (Mnemonic::Call, OpKind::Memory) => None,
        (Mnemonic::Call, _) => by_near!(bytes, N => call::<N>),
        (Mnemonic::Ret, _) => {
            use iced_x86::Code as C;
            match raw.code() {
                C::Retnw => by_near!(2, N => ret::<N, false>),
                C::Retnd => by_near!(4, N => ret::<N, false>),
                C::Retnq => by_near!(8, N => ret::<N, false>),
                C::Retnw_imm16 => by_near!(2, N => ret::<N, true>),
                C::Retnd_imm16 => by_near!(4, N => ret::<N, true>),
                C::Retnq_imm16 => by_near!(8, N => ret::<N, true>),
                _ => None,
            }
        }
        _ if raw.is_jcc_short_or_near() => match bytes {
            2 => conditional::<Legacy<u16>>(insn),
            4 => conditional::<Legacy<u32>>(insn),
            _ => conditional::<Long>(insn),
        },
        _ => match bytes {
            2 => counted::<Legacy<u16>>(insn),
            4 => counted::<Legacy<u32>>(insn),
            8 => counted::<Long>(insn),
            _ => None,
        },
    }
}
