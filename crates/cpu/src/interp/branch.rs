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

/// How a near branch of one operand size ends.
trait Near {
    /// The operand size.
    type Size: Ram;
    /// Cuts and checks a target, and moves RIP there.
    fn go(cpu: &mut Cpu, target: u64) -> Result<(), Stop>;
    /// Pushes a return address.
    fn push(cpu: &mut Cpu, value: u64) -> Result<(), Stop>;
    /// The value at the top of the stack; RSP stays.
    fn top(cpu: &mut Cpu) -> Result<u64, Stop>;
    /// Frees `bytes` of the stack.
    fn release(cpu: &mut Cpu, bytes: u64);
}

/// 64-bit code.
struct Long;
/// 16- and 32-bit code, with an operand size of 16 or 32.
struct Legacy<T>(PhantomData<T>);

impl Near for Long {
    type Size = u64;

    #[inline(always)]
    fn go(cpu: &mut Cpu, target: u64) -> Result<(), Stop> {
        // Bits 47-63 are equal: canonical with 48 bits, and so with 57.
        if (target as i64 >> 47).wrapping_add(1) as u64 > 1 && !cpu.canonical(target) {
            return Err(cpu.gp0());
        }
        cpu.state.set_rip(target);
        Ok(())
    }
    #[inline(always)]
    fn push(cpu: &mut Cpu, value: u64) -> Result<(), Stop> {
        let rsp = cpu.state.regs[reg::RSP].wrapping_sub(8);
        cpu.write_at(SEG_FLAT_SS, rsp, value)?;
        cpu.state.regs[reg::RSP] = rsp;
        Ok(())
    }
    #[inline(always)]
    fn top(cpu: &mut Cpu) -> Result<u64, Stop> {
        cpu.read_at(SEG_FLAT_SS, cpu.state.regs[reg::RSP])
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
    fn go(cpu: &mut Cpu, target: u64) -> Result<(), Stop> {
        let target = T::from_u64(target).to_u64();
        if target > cpu.state.seg[usize::from(seg::CS)].limit.into() {
            return Err(cpu.gp0());
        }
        cpu.state.set_rip(target);
        Ok(())
    }
    #[inline(always)]
    fn push(cpu: &mut Cpu, value: u64) -> Result<(), Stop> {
        cpu.push(T::from_u64(value))
    }
    #[inline(always)]
    fn top(cpu: &mut Cpu) -> Result<u64, Stop> {
        let (code, mask) = cpu.stack();
        let v: T = cpu.read_at(code, cpu.state.regs[reg::RSP] & mask)?;
        Ok(v.to_u64())
    }
    #[inline(always)]
    fn release(cpu: &mut Cpu, bytes: u64) {
        let (_, mask) = cpu.stack();
        let sp = cpu.state.regs[reg::RSP].wrapping_add(bytes);
        cpu.set_stack_pointer(sp, mask);
    }
}

#[inline(always)]
fn go_relative<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    N::go(cpu, cpu.state.rip().wrapping_add(insn.imm))
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
    let back = cpu.state.rip();
    N::go(cpu, target)?;
    N::push(cpu, back).inspect_err(|_| cpu.state.set_rip(back))
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
    N::go(cpu, target)
}

fn jmp_memory<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = cpu.read::<N::Size>(insn)?.to_u64();
    N::go(cpu, target)
}

fn ret<N: Near>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let target = N::top(cpu)?;
    N::go(cpu, target)?;
    N::release(cpu, N::Size::BYTES as u64);
    Ok(())
}

fn ret_imm<N: Near>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let target = N::top(cpu)?;
    N::go(cpu, target)?;
    N::release(cpu, N::Size::BYTES as u64 + (insn.imm & 0xffff));
    Ok(())
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
                C::Retnw => by_near!(2, N => ret::<N>),
                C::Retnd => by_near!(4, N => ret::<N>),
                C::Retnq => by_near!(8, N => ret::<N>),
                C::Retnw_imm16 => by_near!(2, N => ret_imm::<N>),
                C::Retnd_imm16 => by_near!(4, N => ret_imm::<N>),
                C::Retnq_imm16 => by_near!(8, N => ret_imm::<N>),
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
