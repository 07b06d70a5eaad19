//! Registers that the VMM writes between an exit and the re-entry. The access that was asked for stays where it was,
//! and its answer goes to the destination; everything else the instruction takes is as it was written.

use anykvm::TranslationMode;
use iced_x86::code_asm::*;

use crate::cases::{Case, RAX, RBX, RCX, RDI, RDX, RFLAGS, RIP, RSI, RSP, case};
use crate::check::{play, start};
use crate::machine::{DATA, Event, GM, GN, M, N};

/// Runs to the first exit, writes these registers, runs on: these exits, and these registers at the end. All
/// others are as they were.
fn changed(case: Case, write: &[(usize, u64)], rest: &[Event], end: &[(usize, u64)]) {
    for mode in [TranslationMode::Off, TranslationMode::Always] {
        let m = start(&case, mode);
        play(&m, &case, 0, 1);
        let mut regs = m.regs();
        for (r, value) in write {
            regs[*r] = *value;
        }
        m.set_regs(&regs);
        for event in rest {
            assert_eq!(m.run(), *event, "{}", case.name);
        }
        assert_eq!(m.run(), Event::Halt, "{}", case.name);
        let mut wanted = case.start;
        wanted[RIP] = case.next() + 1;
        for (r, value) in write.iter().chain(end) {
            wanted[*r] = *value;
        }
        assert_eq!(m.regs(), wanted, "{}", case.name);
    }
}

fn write(gpa: u64, data: &[u8]) -> Event {
    Event::Write {
        gpa,
        data: data.to_vec(),
    }
}

#[test]
fn the_destination() {
    let load = case("mov al, m", |a| a.mov(al, byte_ptr(rbx)))
        .with(RBX, M)
        .read(GM, &[9]);
    changed(load, &[(RAX, 0x1111)], &[], &[(RAX, 0x1109)]);
    let input = case("in al, dx", |a| a.in_(al, dx)).input(1, &[9]);
    changed(input, &[(RAX, 0x1111), (RDX, 0)], &[], &[(RAX, 0x1109)]);
}

#[test]
fn the_address() {
    let load = case("mov eax, m", |a| a.mov(eax, dword_ptr(rbx))).with(RBX, M);
    // RAM, and another device: the answer is that of the address asked for.
    for address in [DATA, N] {
        changed(
            load.clone().read(GM, &[1, 2, 3, 4]),
            &[(RBX, address)],
            &[],
            &[(RAX, 0x0403_0201)],
        );
    }
    let add = case("add m, eax", |a| a.add(dword_ptr(rbx + rcx * 2), eax))
        .with(RBX, M)
        .with(RCX, 8);
    changed(
        add.read(GM + 16, &[1, 0, 0, 0]),
        &[(RBX, DATA), (RCX, 0), (RAX, 0x10)],
        &[write(GM + 16, &[0x11, 0, 0, 0])],
        &[(RFLAGS, 2 | 4)],
    );
}

#[test]
fn strings() {
    // Taken from and to where it was; the registers move on from what they are.
    let movs = case("movsd", |a| a.movsd())
        .with(RSI, M)
        .with(RDI, N)
        .read(GM, &[1, 2, 3, 4]);
    changed(
        movs,
        &[(RSI, 0x100), (RDI, 0x200)],
        &[write(GN, &[1, 2, 3, 4])],
        &[(RSI, 0x104), (RDI, 0x204)],
    );
    // What is left of a repeated instruction is done at the new place.
    let stos = case("rep stosb", |a| a.rep().stosb())
        .with(RDI, M)
        .with(RCX, 3)
        .write(GM, &[0x88]);
    changed(
        stos,
        &[(RDI, N), (RCX, 1), (RAX, 0x42)],
        &[write(GN, &[0x42])],
        &[(RDI, N + 1), (RCX, 0)],
    );
    let outs = case("outsb", |a| a.outsb()).with(RSI, M).read(GM, &[7]);
    let out = Event::Out {
        port: crate::cases::PORT,
        size: 1,
        data: vec![7],
    };
    changed(outs, &[(RSI, DATA)], &[out], &[(RSI, DATA + 1)]);
}

#[test]
fn an_answer_is_for_no_other_address() {
    // The stack is where RSP says: it is asked again.
    let pop = case("pop rax", |a| a.pop(rax))
        .with(RSP, M)
        .read(GM, &[1; 8]);
    for mode in [TranslationMode::Off, TranslationMode::Always] {
        let m = start(&pop, mode);
        play(&m, &pop, 0, 1);
        let mut regs = m.regs();
        regs[RSP] = N;
        m.set_regs(&regs);
        let again = Event::Read { gpa: GN, len: 8 };
        assert_eq!(m.run(), again);
        m.answer(&again, &[2; 8]);
        assert_eq!(m.run(), Event::Halt);
        let regs = m.regs();
        assert_eq!((regs[RAX], regs[RSP]), (0x0202_0202_0202_0202, N + 8));
    }
}
