//! The programs, in families. A program is made from random numbers.

pub mod long;
mod pieces;

use crate::machine::{Chip, Setup};
use crate::monitor::{Injection, Program};
use anyhow::Result;
use anykvm::Kvm;
use anykvm_differential::random::Random;
use iced_x86::code_asm::CodeAssembler;

type Make = fn(&Kvm, &mut Random) -> Result<Program>;

/// Programs of one kind.
pub struct Family {
    /// Their name.
    pub name: &'static str,
    /// Makes one.
    pub make: Make,
}

/// All families.
pub const FAMILIES: &[Family] = &[
    family("interrupts", interrupts),
    family("exceptions", exceptions),
    family("debug", debug),
    family("devices", devices),
    family("vectors", vectors),
    family("smp", smp),
    family("split", split),
    family("userspace", userspace),
    family("paravirt", paravirt),
    family("everything", everything),
];

const fn family(name: &'static str, make: Make) -> Family {
    Family { name, make }
}

/// A program for one vCPU in 64-bit mode with everything in the kernel.
fn long_program(name: &str, random: &mut Random, code: Vec<u8>) -> Program {
    let mut image = long::image();
    image.push((long::CODE, code));
    Program {
        name: name.to_owned(),
        setup: Setup {
            chip: Chip::Full,
            vcpus: 1,
            payload: random.once_in(2),
        },
        image,
        start: long::start,
        injections: Vec::new(),
        slice: 1000,
        most_ns: 20_000_000,
    }
}

fn interrupts(_: &Kvm, random: &mut Random) -> Result<Program> {
    let code = pieces::program(random, &[pieces::INTERRUPTS, pieces::PLAIN])?;
    let mut program = long_program("interrupts", random, code);
    interrupt(random, &mut program);
    Ok(program)
}

/// Interrupts of every kind from outside.
fn interrupt(random: &mut Random, program: &mut Program) {
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
}

/// The local APIC in the kernel, the rest the monitor's.
fn split(_: &Kvm, random: &mut Random) -> Result<Program> {
    let code = pieces::program(random, &[pieces::INTERRUPTS, pieces::PLAIN])?;
    let mut program = long_program("split", random, code);
    program.setup.chip = Chip::Split;
    interrupt(random, &mut program);
    Ok(program)
}

/// No controllers in the kernel.
fn userspace(_: &Kvm, random: &mut Random) -> Result<Program> {
    let kinds = [
        pieces::NO_CHIP,
        pieces::IO,
        pieces::EXCEPTIONS,
        pieces::PLAIN,
    ];
    let nothing = |_: &mut CodeAssembler, _: &mut Random| Ok(());
    let code = pieces::program_with(random, nothing, &kinds, |a| a.cli())?;
    let mut program = long_program("userspace", random, code);
    program.setup.chip = Chip::None;
    let mut at = 10_000;
    for _ in 0..20 {
        at += random.below(20_000);
        let injection = match random.below(6) {
            0 => Injection::Nmi(0),
            1 => Injection::Smi(0),
            _ => Injection::Vector(0x30 + random.below(0xc0) as u8),
        };
        program.injections.push((at, injection));
    }
    Ok(program)
}

/// Clock pages and stolen time.
fn paravirt(_: &Kvm, random: &mut Random) -> Result<Program> {
    let kinds = [pieces::PARAVIRT, pieces::INTERRUPTS, pieces::PLAIN];
    let code = pieces::program_with(random, pieces::set_up_paravirt, &kinds, |a| a.cli())?;
    let mut program = long_program("paravirt", random, code);
    // No NMI, which would come while the clock is read.
    let mut at = 20_000;
    for _ in 0..8 {
        at += random.below(30_000);
        let injection = match random.below(3) {
            0 => Injection::Signal,
            1 => Injection::Pulse(random.below(24) as u32),
            _ => Injection::Msi(0x50 + random.below(8) as u8),
        };
        program.injections.push((at, injection));
    }
    Ok(program)
}

/// What comes from outside to any program, now and then.
fn injections(random: &mut Random, program: &mut Program, count: u64, apart: u64) {
    let mut at = 20_000;
    for _ in 0..count {
        at += random.below(apart);
        let injection = match random.below(5) {
            0 => Injection::Nmi(0),
            1 => Injection::Smi(0),
            2 => Injection::Msi(0x50 + random.below(8) as u8),
            _ => continue,
        };
        program.injections.push((at, injection));
    }
}

fn exceptions(_: &Kvm, random: &mut Random) -> Result<Program> {
    let end = if random.once_in(4) {
        pieces::triple_fault
    } else {
        |a: &mut CodeAssembler| a.cli()
    };
    let kinds = [pieces::EXCEPTIONS, pieces::PLAIN];
    let code = pieces::program_with(random, pieces::set_up, &kinds, end)?;
    let mut program = long_program("exceptions", random, code);
    injections(random, &mut program, 8, 60_000);
    Ok(program)
}

fn debug(_: &Kvm, random: &mut Random) -> Result<Program> {
    let code = pieces::program(random, &[pieces::DEBUG, pieces::PLAIN])?;
    let mut program = long_program("debug", random, code);
    // Without the payload capability KVM loses what waits behind MOV SS.
    program.setup.payload = true;
    injections(random, &mut program, 8, 60_000);
    Ok(program)
}

fn devices(_: &Kvm, random: &mut Random) -> Result<Program> {
    let code = pieces::program(random, &[pieces::IO, pieces::PLAIN])?;
    let mut program = long_program("devices", random, code);
    injections(random, &mut program, 8, 60_000);
    Ok(program)
}

fn vectors(_: &Kvm, random: &mut Random) -> Result<Program> {
    let code = pieces::program(random, &[pieces::VECTORS, pieces::PLAIN])?;
    let mut program = long_program("vectors", random, code);
    injections(random, &mut program, 4, 60_000);
    Ok(program)
}

fn smp(_: &Kvm, random: &mut Random) -> Result<Program> {
    let (first, others) = pieces::second_processors(random)?;
    let mut program = long_program("smp", random, first);
    program.image.push((long::OTHERS, others));
    program.setup.vcpus = 3;
    program.slice = 1 + random.below(100);
    program.most_ns = 3_000_000;
    Ok(program)
}

fn everything(_: &Kvm, random: &mut Random) -> Result<Program> {
    let code = pieces::program(
        random,
        &[
            pieces::INTERRUPTS,
            pieces::EXCEPTIONS,
            pieces::DEBUG,
            pieces::IO,
            pieces::VECTORS,
        ],
    )?;
    let mut program = long_program("everything", random, code);
    program.setup.payload = true;
    injections(random, &mut program, 8, 60_000);
    Ok(program)
}
