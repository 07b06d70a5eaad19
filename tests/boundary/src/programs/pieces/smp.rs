//! Several processors: INIT and SIPI, IPIs of every kind, locks.

use super::{PLAIN, Pieces, pieces, write_apic};
use crate::programs::long::{self, DATA, LAPIC};
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// How many processors have ended.
const DONE: i32 = DATA as i32 + 0xff0;
/// How many have begun.
const UP: i32 = DATA as i32 + 0xff8;

/// What processors send each other.
pub const IPIS: Pieces = (
    &[
        ipi,
        ipi,
        ipi,
        nmi,
        lock,
        counter,
        wait_for_timer,
        windows,
        smi,
    ],
    4,
);

fn ipi(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let vector = 0x43 + random.below(0x30) as u32;
    let (high, low) = match random.below(6) {
        // One processor, by its id.
        0 | 1 => (random.below(3) as u32, 0),
        // Logical, flat, some.
        2 => (random.below(8) as u32, 0x800),
        // Lowest priority.
        3 => (7, 0x900),
        // All, and all but itself.
        4 => (0, 0x8_0000),
        _ => (0, 0xc_0000),
    };
    write_apic(a, 0x310, high << 24)?;
    write_apic(a, 0x300, 0x4000 | low | vector)
}

fn nmi(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_apic(a, 0x310, (random.below(3) as u32) << 24)?;
    write_apic(a, 0x300, 0x4400)
}

fn smi(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_apic(a, 0x310, (random.below(3) as u32) << 24)?;
    write_apic(a, 0x300, 0x4200)
}

/// A spinlock around a number that is not written atomically.
fn lock(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    let (mut again, mut taken) = (a.create_label(), a.create_label());
    let at = DATA as i32 + 0xf00;
    a.pushfq()?;
    a.cli()?;
    a.set_label(&mut again)?;
    a.lock().bts(dword_ptr(at), 0)?;
    a.jnc(taken)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut taken)?;
    a.mov(rax, qword_ptr(at + 8))?;
    a.imul_3(rax, rax, 5)?;
    a.inc(rax)?;
    a.mov(qword_ptr(at + 8), rax)?;
    a.mov(dword_ptr(at), 0)?;
    a.popfq()
}

fn counter(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, 3)?;
    a.lock().xadd(qword_ptr(DATA as i32 + 0xf40), rax)?;
    a.add(qword_ptr(DATA as i32 + 0xf48), rax)
}

/// HLT, with the own timer in case nobody sends anything.
fn wait_for_timer(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_apic(a, 0x3e0, 0xb)?;
    write_apic(a, 0x320, 0x40)?;
    write_apic(a, 0x380, 3000 + random.below(30_000) as u32)?;
    a.sti()?;
    a.hlt()
}

fn windows(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    if random.once_in(2) {
        a.cli()?;
        a.nop()?;
    }
    a.sti()?;
    a.nop()
}

fn wait_for(a: &mut CodeAssembler, at: i32, number: i32) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(dword_ptr(at), number)?;
    a.jb(wait)
}

/// Starts the other processors, and waits for them: code of the first, and of the others.
pub fn second_processors(random: &mut Random) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    let first = long::assemble(|a| {
        write_apic(a, 0xf0, 0x1ff)?;
        write_apic(a, 0xd0, 1 << 24)?;
        // INIT, then SIPI with vector 0x0E, to all others.
        write_apic(a, 0x300, 0xc_4500)?;
        pieces(a, random, &[PLAIN], 2)?;
        write_apic(a, 0x300, 0xc_460e)?;
        wait_for(a, UP, 2)?;
        a.sti()?;
        a.mov(r14d, 2)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        let count = 15 + random.below(20);
        pieces(a, random, &[IPIS, PLAIN], count)?;
        a.dec(r14d)?;
        a.jne(top)?;
        wait_for(a, DONE, 2)?;
        if random.once_in(2) {
            // One of them, which is in HLT now, is started once more.
            write_apic(a, 0x310, 1 << 24)?;
            write_apic(a, 0x300, 0x4500)?;
            pieces(a, random, &[PLAIN], 3)?;
            write_apic(a, 0x310, 1 << 24)?;
            write_apic(a, 0x300, 0x460e)?;
            wait_for(a, DONE, 3)?;
        }
        a.cli()
    })?;
    let mut a = CodeAssembler::new(64)?;
    others(&mut a, random)?;
    Ok((first, a.assemble(long::OTHERS)?))
}

fn others(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    long::enter_other(a)?;
    write_apic(a, 0xf0, 0x1ff)?;
    // Its logical id: a bit.
    a.mov(edx, LAPIC as u32)?;
    a.mov(ecx, dword_ptr(rdx + 0x20))?;
    a.shr(ecx, 24)?;
    a.mov(eax, 1 << 24)?;
    a.shl(eax, cl)?;
    a.mov(dword_ptr(rdx + 0xd0), eax)?;
    a.lock().inc(dword_ptr(UP))?;
    // Until then nobody sends anything to one that has no IDT yet.
    wait_for(a, UP, 2)?;
    a.sti()?;
    a.mov(r14d, 2)?;
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    let count = 12 + random.below(20);
    pieces(a, random, &[IPIS, PLAIN], count)?;
    a.dec(r14d)?;
    a.jne(top)?;
    a.lock().inc(dword_ptr(DONE))?;
    let mut halt = a.create_label();
    a.set_label(&mut halt)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(halt)
}
