//! The programs, in families. A program is made from random numbers.

pub mod long;
mod pieces;

use crate::machine::{Chip, Setup};
use crate::monitor::{Injection, Program};
use anyhow::Result;
use anykvm::{Kvm, TranslationMode};
use anykvm_differential::random::Random;

type Make = fn(&Kvm, TranslationMode, &mut Random) -> Result<Program>;

/// Programs of one kind.
pub struct Family {
    /// Their name.
    pub name: &'static str,
    /// Makes one.
    pub make: Make,
}

/// All families.
pub const FAMILIES: &[Family] = &[Family {
    name: "interrupts",
    make: interrupts,
}];

/// A program for one vCPU in 64-bit mode with everything in the kernel.
fn long_program(
    name: &str,
    engine: TranslationMode,
    random: &mut Random,
    code: Vec<u8>,
) -> Program {
    let mut image = long::image();
    image.push((long::CODE, code));
    Program {
        name: name.to_owned(),
        setup: Setup {
            chip: Chip::Full,
            vcpus: 1,
            payload: random.once_in(2),
            engine,
        },
        image,
        start: long::start,
        injections: Vec::new(),
        slice: 1000,
        most_ns: 20_000_000,
    }
}

fn interrupts(_: &Kvm, engine: TranslationMode, random: &mut Random) -> Result<Program> {
    let code = pieces::program(random, &[pieces::INTERRUPTS, pieces::PLAIN])?;
    let mut program = long_program("interrupts", engine, random, code);
    let mut at = 20_000;
    for _ in 0..10 {
        at += random.below(30_000);
        let injection = match random.below(5) {
            0 => Injection::Nmi(0),
            1 => Injection::Signal,
            2 => Injection::Pulse(random.below(16) as u32),
            3 => Injection::Msi(0x50 + random.below(8) as u8),
            _ => Injection::Pulse(16 + random.below(8) as u32),
        };
        program.injections.push((at, injection));
    }
    Ok(program)
}
