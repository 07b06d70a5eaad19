//! Short pieces of code, by what they keep busy. Each may use all registers but RSP, R15 (where a fault
//! goes on), R14 (the loop's count), and leaves RSP as it was.

use super::long::{self, DATA, IOAPIC, LAPIC};
use crate::monitor::{LOWER, MSI, NMI, PULSE, RAISE, SIGNAL};
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Piece = fn(&mut CodeAssembler, &mut Random) -> Result<(), IcedError>;
/// Pieces of one kind, and how often.
pub type Pieces = (&'static [Piece], u64);

/// A program: controllers and timers set up, then pieces in a loop.
pub fn program(random: &mut Random, kinds: &[Pieces]) -> anyhow::Result<Vec<u8>> {
    long::assemble(|a| {
        set_up(a, random)?;
        let mut top = a.create_label();
        a.mov(r14d, 2 + random.below(3) as u32)?;
        a.set_label(&mut top)?;
        let total = kinds.iter().map(|k| k.1).sum();
        for _ in 0..20 + random.below(30) {
            let mut n = random.below(total);
            for (pieces, weight) in kinds {
                if n < *weight {
                    random.pick(pieces)(a, random)?;
                    break;
                }
                n -= weight;
            }
        }
        a.dec(r14d)?;
        a.jne(top)?;
        a.cli()
    })
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
fn set_up(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
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
    a.mov(ecx, 1 + random.below(40) as u32)?;
    match random.below(4) {
        0 => a.rep().movsb(),
        1 => a.rep().movsq(),
        2 => a.rep().stosd(),
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

/// Timers, IPIs, interrupts from devices, masks and shadows.
pub const INTERRUPTS: Pieces = (
    &[
        pit,
        apic_timer,
        apic_periodic,
        tsc_deadline,
        self_ipi,
        devices,
        sti_cli,
        halt,
        stack_segment,
        task_priority,
        flags,
        pic_masks,
        read_timers,
        read_pic,
    ],
    4,
);

fn pit(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let mode = random.pick(&[0x30u8, 0x34, 0x36, 0x38]);
    let count = 24 + random.below(200) as u16;
    write_port(a, 0x43, mode)?;
    write_port(a, 0x40, count as u8)?;
    write_port(a, 0x40, (count >> 8) as u8)
}

fn apic_timer(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_apic(a, 0x3e0, random.pick(&[0u32, 1, 2, 3, 8, 11]))?;
    write_apic(a, 0x320, 0x40)?;
    write_apic(a, 0x380, 50 + random.below(3000) as u32)
}

fn apic_periodic(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_apic(a, 0x3e0, random.pick(&[0u32, 1, 11]))?;
    write_apic(a, 0x320, 0x2_0041)?;
    write_apic(a, 0x380, 20_000 + random.below(30_000) as u32)
}

fn tsc_deadline(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_apic(a, 0x320, 0x4_0042)?;
    a.rdtsc()?;
    a.add(eax, random.below(8000) as u32)?;
    a.adc(edx, 0)?;
    a.mov(ecx, 0x6e0)?;
    a.wrmsr()
}

fn self_ipi(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let vector = 0x43 + random.below(0x30) as u32;
    // Fixed to itself, or an NMI.
    let icr = if random.once_in(6) {
        0x4_4400
    } else {
        0x4_4000 | vector
    };
    write_apic(a, 0x310, 0)?;
    write_apic(a, 0x300, icr)
}

fn devices(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let gsi = 3 + random.below(21) as u8;
    match random.below(6) {
        0 => write_port(a, PULSE, gsi),
        1 => write_port(a, RAISE, gsi),
        2 => write_port(a, LOWER, gsi),
        3 => write_port(a, SIGNAL, 0),
        4 => write_port(a, NMI, 0),
        _ => write_port(a, MSI, 0x50 + gsi),
    }
}

fn sti_cli(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    if random.once_in(3) {
        a.cli()?;
        a.nop()?;
    }
    a.sti()?;
    for _ in 0..random.below(4) {
        a.inc(rbp)?;
    }
    Ok(())
}

fn halt(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    // Something that will come.
    apic_timer(a, random)?;
    a.sti()?;
    a.hlt()
}

fn stack_segment(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, ss)?;
    a.sti()?;
    a.mov(ss, eax)?;
    if random.once_in(2) {
        a.mov(ss, eax)?;
    }
    a.mov(rsp, rsp)
}

fn task_priority(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    if random.once_in(2) {
        a.mov(eax, random.below(8) as u32)?;
        a.mov(cr8, rax)?;
    } else {
        write_apic(a, 0x80, random.below(0x80) as u32)?;
    }
    if random.once_in(2) {
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
    }
    Ok(())
}

fn flags(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.pushfq()?;
    a.xor(dword_ptr(rsp), if random.once_in(2) { 0x200 } else { 0x40 })?;
    a.popfq()?;
    a.nop()
}

fn pic_masks(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let mask = random.word() as u8 & random.word() as u8 & !4;
    write_port(a, random.pick(&[0x21, 0xa1]), mask)
}

fn read_timers(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    if random.once_in(2) {
        a.mov(edx, (LAPIC + 0x390) as u32)?;
        a.mov(eax, dword_ptr(rdx))?;
    } else {
        a.mov(al, 0)?;
        a.out(0x43, al)?;
        a.in_(al, 0x40)?;
        a.mov(bl, al)?;
        a.in_(al, 0x40)?;
    }
    a.add(qword_ptr(DATA as i32), rax)
}

fn read_pic(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_port(a, 0x20, random.pick(&[0x0a, 0x0b]))?;
    a.in_(al, 0x20)?;
    a.add(qword_ptr(DATA as i32 + 8), rax)
}
