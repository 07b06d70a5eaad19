//! Short pieces of code, by what they keep busy. Each may use all registers but RSP, R15 (where a fault
//! goes on), R14 (the loop's count), and leaves RSP as it was.

use super::long::{self, DATA, IOAPIC, LAPIC};
mod debug;
mod exceptions;
mod interrupts;
mod io;
mod no_chip;
mod paravirt;
mod smp;
mod vectors;

pub use debug::DEBUG;
pub use exceptions::{EXCEPTIONS, triple_fault};
pub use interrupts::INTERRUPTS;
pub use io::IO;
pub use no_chip::NO_CHIP;
pub use paravirt::{PARAVIRT, set_up_paravirt};
pub use smp::second_processors;
pub use vectors::VECTORS;

use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Piece = fn(&mut CodeAssembler, &mut Random) -> Result<(), IcedError>;
/// Pieces of one kind, and how often.
pub type Pieces = (&'static [Piece], u64);

/// A program: controllers and timers set up, then pieces in a loop.
pub fn program(random: &mut Random, kinds: &[Pieces]) -> anyhow::Result<Vec<u8>> {
    program_with(random, set_up, kinds, |a| a.cli())
}

/// A program with another beginning and end.
pub fn program_with(
    random: &mut Random,
    set_up: Piece,
    kinds: &[Pieces],
    end: fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> anyhow::Result<Vec<u8>> {
    long::assemble(|a| {
        set_up(a, random)?;
        let mut top = a.create_label();
        a.mov(r14d, 2 + random.below(3) as u32)?;
        a.set_label(&mut top)?;
        let count = 20 + random.below(30);
        pieces(a, random, kinds, count)?;
        a.dec(r14d)?;
        a.jne(top)?;
        end(a)
    })
}

/// So many pieces.
fn pieces(
    a: &mut CodeAssembler,
    random: &mut Random,
    kinds: &[Pieces],
    count: u64,
) -> Result<(), IcedError> {
    let total = kinds.iter().map(|k| k.1).sum();
    for _ in 0..count {
        let mut n = random.below(total);
        for (pieces, weight) in kinds {
            if n < *weight {
                random.pick(pieces)(a, random)?;
                break;
            }
            n -= weight;
        }
    }
    Ok(())
}

fn write_port(a: &mut CodeAssembler, port: u16, value: u8) -> Result<(), IcedError> {
    a.mov(edx, u32::from(port))?;
    a.mov(al, i32::from(value))?;
    a.out(dx, al)
}

fn write_apic(a: &mut CodeAssembler, register: u64, value: u32) -> Result<(), IcedError> {
    a.mov(edx, (LAPIC + register) as u32)?;
    a.mov(dword_ptr(rdx), value)
}

fn write_ioapic(a: &mut CodeAssembler, register: u8, value: u32) -> Result<(), IcedError> {
    a.mov(edx, IOAPIC as u32)?;
    a.mov(dword_ptr(rdx), u32::from(register))?;
    a.mov(dword_ptr(rdx + 0x10), value)
}

/// PIC, I/O APIC (edges and levels), local APIC.
pub fn set_up(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
        write_port(a, port, value)?;
    }
    for (port, value) in [(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1)] {
        write_port(a, port, value)?;
    }
    write_port(a, 0x4d0, random.word() as u8 & 0xf8)?;
    write_port(a, 0x4d1, random.word() as u8 & 0xde)?;
    write_port(a, 0x21, random.word() as u8 & random.word() as u8 & !4)?;
    write_port(a, 0xa1, random.word() as u8 & random.word() as u8)?;
    // SVR, LINT0 as ExtINT.
    write_apic(a, 0xf0, 0x1ff)?;
    write_apic(a, 0x350, if random.once_in(8) { 0x400 } else { 0x700 })?;
    for pin in 0..24u8 {
        if random.once_in(2) {
            continue;
        }
        let level = if random.once_in(3) { 1 << 15 } else { 0 };
        let vector = 0x50 + random.below(0x2c) as u32;
        write_ioapic(a, 0x11 + pin * 2, 0)?;
        write_ioapic(a, 0x10 + pin * 2, level | vector)?;
    }
    Ok(())
}

/// Integers and memory, nothing special.
pub const PLAIN: Pieces = (&[integers, strings, calls], 1);

fn integers(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    for _ in 0..random.below(8) {
        let at = DATA as i32 + random.below(0x1000) as i32;
        match random.below(6) {
            0 => a.add(rax, rbx)?,
            1 => a.imul_2(rcx, rax)?,
            2 => a.mov(rbx, random.word())?,
            3 => a.add(qword_ptr(at), rcx)?,
            4 => a.adc(rdi, qword_ptr(at))?,
            _ => a.xor(rsi, rdi)?,
        }
    }
    Ok(())
}

fn strings(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(esi, DATA as u32 + random.below(0x2000) as u32)?;
    a.mov(edi, DATA as u32 + 0x8000 + random.below(0x2000) as u32)?;
    let long = random.once_in(16);
    a.mov(ecx, 1 + random.below(if long { 700 } else { 40 }) as u32)?;
    match random.below(6) {
        0 => a.rep().movsb(),
        1 => a.rep().movsq(),
        2 => a.rep().stosd(),
        3 => a.repne().scasd(),
        4 => a.rep().lodsw(),
        _ => a.repe().cmpsw(),
    }
}

fn calls(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    let (mut f, mut over) = (a.create_label(), a.create_label());
    a.call(f)?;
    a.jmp(over)?;
    a.set_label(&mut f)?;
    a.push(rax)?;
    a.pop(rbx)?;
    a.ret()?;
    a.set_label(&mut over)
}
