//! The stack: PUSH and POP of general registers, memory and immediates, PUSHA, POPA, ENTER, LEAVE
//! (SDM Vol. 1, ch. 6, and Vol. 2).
//!
//! Two sizes matter: the operand's, and the stack's (how much of RSP counts). In 64-bit code the
//! stack's is 64 bits and its segment is flat, so that case has its own functions.

use std::marker::PhantomData;

use iced_x86::{Mnemonic, OpKind};

use super::form::{by_word, in_memory};
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, SEG_FLAT_SS};
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::mode::Mode;
use crate::state::reg;
use crate::width::Width;

/// The stack of a kind of code.
trait Stack {
    /// Pushes if the TLB has the place.
    fn push_hit<T: Ram>(cpu: &mut Cpu, value: T) -> bool;
    /// Pops if the TLB has the place.
    fn pop_hit<T: Ram>(cpu: &mut Cpu) -> Option<T>;
}

/// 64-bit code.
struct Long;
/// A stack size and segment that the mode decides.
struct Any;

impl Stack for Long {
    #[inline(always)]
    fn push_hit<T: Ram>(cpu: &mut Cpu, value: T) -> bool {
        let rsp = cpu.state.regs[reg::RSP].wrapping_sub(T::BYTES as u64);
        let hit = cpu.write_hit_at(SEG_FLAT_SS, rsp, value);
        if hit {
            cpu.state.regs[reg::RSP] = rsp;
        }
        hit
    }
    #[inline(always)]
    fn pop_hit<T: Ram>(cpu: &mut Cpu) -> Option<T> {
        let rsp = cpu.state.regs[reg::RSP];
        let value = cpu.read_hit_at(SEG_FLAT_SS, rsp)?;
        cpu.state.regs[reg::RSP] = rsp.wrapping_add(T::BYTES as u64);
        Some(value)
    }
}

impl Stack for Any {
    #[inline(always)]
    fn push_hit<T: Ram>(cpu: &mut Cpu, value: T) -> bool {
        let (code, mask) = cpu.stack();
        let sp = cpu.state.regs[reg::RSP].wrapping_sub(T::BYTES as u64) & mask;
        let hit = cpu.write_hit_at(code, sp, value);
        if hit {
            cpu.set_stack_pointer(sp, mask);
        }
        hit
    }
    #[inline(always)]
    fn pop_hit<T: Ram>(cpu: &mut Cpu) -> Option<T> {
        let (code, mask) = cpu.stack();
        let sp = cpu.state.regs[reg::RSP] & mask;
        let value = cpu.read_hit_at(code, sp)?;
        cpu.set_stack_pointer(sp.wrapping_add(T::BYTES as u64), mask);
        Some(value)
    }
}

#[inline(always)]
fn push<S: Stack, T: Ram>(cpu: &mut Cpu, value: T) -> Result<(), Stop> {
    if S::push_hit(cpu, value) {
        return Ok(());
    }
    push_slow(cpu, value)
}

#[inline(never)]
fn push_slow<T: Ram>(cpu: &mut Cpu, value: T) -> Result<(), Stop> {
    cpu.push(value)
}

#[inline(always)]
fn pop<S: Stack, T: Ram>(cpu: &mut Cpu) -> Result<T, Stop> {
    S::pop_hit(cpu).map_or_else(|| cpu.pop(), Ok)
}

/// An operation of one operand size on one kind of stack.
struct On<S, T>(PhantomData<(S, T)>);

impl<S: Stack, T: Ram> On<S, T> {
    fn push_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let v = T::get(&cpu.state.regs, insn.op0);
        push::<S, T>(cpu, v)
    }

    fn push_immediate(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        push::<S, T>(cpu, T::from_u64(insn.imm))
    }

    fn push_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let v = cpu.read::<T>(insn)?;
        push::<S, T>(cpu, v)
    }

    // POP of the stack pointer itself: the popped value stands.
    fn pop_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let Some(v) = S::pop_hit::<T>(cpu) else {
            return Self::pop_register_slow(cpu, insn);
        };
        v.set(&mut cpu.state.regs, insn.op0);
        Ok(())
    }

    #[inline(never)]
    fn pop_register_slow(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        cpu.pop::<T>()?.set(&mut cpu.state.regs, insn.op0);
        Ok(())
    }

    // An address that uses RSP is computed with its value after the pop.
    fn pop_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let rsp = cpu.state.regs[reg::RSP];
        let v = pop::<S, T>(cpu)?;
        cpu.write(insn, v)
            .inspect_err(|_| cpu.state.regs[reg::RSP] = rsp)
    }

    fn leave(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
        let rsp = cpu.state.regs[reg::RSP];
        let (_, mask) = cpu.stack();
        cpu.set_stack_pointer(cpu.state.regs[reg::RBP], mask);
        match pop::<S, T>(cpu) {
            Ok(v) => v.set(&mut cpu.state.regs, reg::RBP),
            Err(stop) => {
                cpu.state.regs[reg::RSP] = rsp;
                return Err(stop);
            }
        }
        Ok(())
    }
}

/// The stack pointer `count` operands of size `T` below the present one.
fn below<T: Width>(cpu: &Cpu, count: u64) -> u64 {
    let (_, mask) = cpu.stack();
    cpu.state.regs[reg::RSP].wrapping_sub(count * T::BYTES as u64) & mask
}

// All eight stores are checked before the first is done.
fn pusha<T: Ram>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let (code, mask) = cpu.stack();
    for i in 1..=8 {
        cpu.probe_write(code, below::<T>(cpu, i), T::BYTES)?;
    }
    for i in 1..=8 {
        let v = T::get(&cpu.state.regs, i as u8 - 1);
        cpu.write_at(code, below::<T>(cpu, i), v)?;
    }
    cpu.set_stack_pointer(below::<T>(cpu, 8), mask);
    Ok(())
}

fn popa<T: Ram>(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let (code, mask) = cpu.stack();
    let sp = cpu.state.regs[reg::RSP];
    let at = |i: u64| sp.wrapping_add(i * T::BYTES as u64) & mask;
    let mut values = [T::default(); 8];
    for (i, v) in (0..).zip(&mut values) {
        *v = cpu.read_at(code, at(i))?;
    }
    for (i, v) in (0..).zip(values) {
        let register = reg::RDI - i;
        if register != reg::RSP {
            v.set(&mut cpu.state.regs, register);
        }
    }
    cpu.set_stack_pointer(at(8), mask);
    Ok(())
}

// Stores below the stack pointer may have happened when it faults; registers are only changed at
// the end, so that it starts again as if they had not.
fn enter<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let size = u64::from(insn.raw.immediate16());
    let level = u64::from(insn.raw.immediate8_2nd() & 31);
    let (code, mask) = cpu.stack();
    let rbp = cpu.state.regs[reg::RBP];
    cpu.write_at(code, below::<T>(cpu, 1), T::from_u64(rbp))?;
    let frame = below::<T>(cpu, 1);
    let mut pushed = 1;
    if level > 0 {
        for i in 1..level {
            let outer: T = cpu.read_at(code, rbp.wrapping_sub(i * T::BYTES as u64) & mask)?;
            pushed += 1;
            cpu.write_at(code, below::<T>(cpu, pushed), outer)?;
        }
        pushed += 1;
        cpu.write_at(code, below::<T>(cpu, pushed), T::from_u64(frame))?;
    }
    let sp = below::<T>(cpu, pushed).wrapping_sub(size) & mask;
    cpu.probe_write(code, sp, T::BYTES)?;
    T::from_u64(frame).set(&mut cpu.state.regs, reg::RBP);
    cpu.set_stack_pointer(sp, mask);
    Ok(())
}

fn on<S: Stack>(insn: &Insn) -> Option<Handler> {
    use iced_x86::Code as C;
    let raw = &insn.raw;
    let bytes = raw.stack_pointer_increment().unsigned_abs();
    match (raw.mnemonic(), raw.op0_kind()) {
        // Segment registers.
        (Mnemonic::Push | Mnemonic::Pop, OpKind::Register) if insn.op0 == 255 => None,
        (Mnemonic::Push, OpKind::Register) => by_word!(bytes, T => On::<S, T>::push_register),
        (Mnemonic::Push, OpKind::Memory) => by_word!(bytes, T => On::<S, T>::push_memory),
        (Mnemonic::Push, _) => by_word!(bytes, T => On::<S, T>::push_immediate),
        (Mnemonic::Pop, _) if in_memory(raw, 0) => by_word!(bytes, T => On::<S, T>::pop_memory),
        (Mnemonic::Pop, _) => by_word!(bytes, T => On::<S, T>::pop_register),
        (Mnemonic::Leave, _) => match raw.code() {
            C::Leavew => Some(On::<S, u16>::leave),
            C::Leaved => Some(On::<S, u32>::leave),
            _ => Some(On::<S, u64>::leave),
        },
        (Mnemonic::Enter, _) => match raw.code() {
            C::Enterw_imm16_imm8 => Some(enter::<u16>),
            C::Enterd_imm16_imm8 => Some(enter::<u32>),
            _ => Some(enter::<u64>),
        },
        (Mnemonic::Pusha, _) => Some(pusha::<u16>),
        (Mnemonic::Pushad, _) => Some(pusha::<u32>),
        (Mnemonic::Popa, _) => Some(popa::<u16>),
        (Mnemonic::Popad, _) => Some(popa::<u32>),
        _ => None,
    }
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, mode: Mode) -> Option<Handler> {
    if mode.code64() {
        on::<Long>(insn)
    } else {
        on::<Any>(insn)
    }
}
