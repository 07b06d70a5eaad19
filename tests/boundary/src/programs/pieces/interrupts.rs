//! Timers, IPIs to itself, interrupts from devices, masks and shadows.

use super::{Pieces, write_apic, write_port};
use crate::monitor::{LOWER, MSI, NMI, PULSE, RAISE, SIGNAL};
use crate::programs::long::{DATA, LAPIC};
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

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
