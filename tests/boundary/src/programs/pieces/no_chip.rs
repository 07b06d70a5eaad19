//! Without interrupt controllers in the kernel: vectors that the monitor hands over when the processor takes
//! them (KVM_INTERRUPT), the interrupt window, the task priority, HLT that the monitor waits in.

use super::{Pieces, write_port};
use crate::monitor::{NMI, VECTOR};
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// What there is instead of controllers.
pub const NO_CHIP: Pieces = (
    &[
        vector,
        vector,
        vectors,
        nmi,
        sti_cli,
        sti_cli,
        task_priority,
        shadow,
        halt,
    ],
    3,
);

fn ask(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    write_port(a, VECTOR, 0x30 + random.below(0xc0) as u8)
}

fn vector(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    ask(a, random)?;
    a.inc(rbp)
}

/// More than can be taken at once.
fn vectors(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.cli()?;
    for _ in 0..1 + random.below(3) {
        ask(a, random)?;
    }
    a.sti()?;
    a.inc(rbp)
}

fn nmi(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    write_port(a, NMI, 0)
}

fn sti_cli(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.cli()?;
    if random.once_in(2) {
        ask(a, random)?;
    }
    a.sti()?;
    for _ in 0..random.below(4) {
        a.inc(rbp)?;
    }
    Ok(())
}

fn task_priority(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, random.below(16) as u32)?;
    a.mov(cr8, rax)?;
    a.mov(rbx, cr8)
}

fn shadow(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.cli()?;
    ask(a, random)?;
    a.mov(eax, ss)?;
    a.sti()?;
    a.mov(ss, eax)?;
    a.inc(rbp)
}

fn halt(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.cli()?;
    ask(a, random)?;
    a.sti()?;
    a.hlt()
}
