//! Programs in lockstep: those that are translated well run to their ends, and a wrong translation is found.

use std::sync::{Arc, Mutex};

use anykvm_cpu::Exit;
use anykvm_cpu::exit::InternalError;
use anykvm_cpu::state::seg;
use anykvm_cpu::turns::Turns;
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, IcedError, Mnemonic};

#[path = "../../tests/support/mod.rs"]
mod support;

use support::harness::Computer;
use support::{ALWAYS, CODE, DATA, assemble, assemble_bits, compare, computer, finish};

use crate::{Jit, Options};

const LOCKSTEP: Options = Options {
    lockstep: true,
    ..ALWAYS
};

/// Puts a computer's processor in lockstep, with translations that `spoil` may change.
fn in_lockstep(c: &mut Computer, spoil: Option<fn(&mut Vec<u8>)>) {
    let mut jit = Jit::new(LOCKSTEP).unwrap();
    jit.spoil = spoil;
    c.cpu.set_translator(Some(Box::new(jit)));
    c.cpu.set_lockstep(Arc::new(Turns::default()));
}

/// Runs a program with the interpreter and in lockstep; returns how many instructions were compared.
fn same(make: impl Fn() -> Computer) -> u64 {
    let mut one = make();
    finish(&mut one);
    let mut two = make();
    in_lockstep(&mut two, None);
    finish(&mut two);
    compare(&one, &two);
    let stats = two.cpu.translator_stats().unwrap();
    assert_eq!(stats.disturbed, 0);
    stats.compared
}

fn compatibility(code: &[u8]) -> Computer {
    let mut c = computer(code);
    c.cpu.state.seg[usize::from(seg::CS)].attr = 0xc09b;
    for n in 0..16 {
        c.cpu.state.regs[n] &= 0xffff_ffff;
    }
    c.cpu.state.xsave.reset();
    c.cpu.state_changed();
    c
}

/// Integers, memory, calls, vectors, flags that are handed over at links, and what is left to the
/// interpreter.
fn long_program(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut top, mut f) = (a.create_label(), a.create_label());
    let mut start = a.create_label();
    a.jmp(start)?;
    a.set_label(&mut f)?;
    a.xadd(rbx, rdx)?;
    a.ret()?;
    a.set_label(&mut start)?;
    a.mov(esi, 500)?;
    a.set_label(&mut top)?;
    a.push(rax)?;
    a.add(qword_ptr(DATA), rbx)?;
    a.call(f)?;
    a.adc(rbx, qword_ptr(DATA + 0xffc))?;
    a.movups(xmm0, xmmword_ptr(DATA + 0x10))?;
    a.paddd(xmm1, xmm0)?;
    a.movups(xmmword_ptr(DATA + 0xff8), xmm1)?;
    a.rdtsc()?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.pop(rax)?;
    a.cpuid()?;
    a.dec(esi)?;
    a.jne(top)
}

#[test]
fn what_is_right_runs_to_its_end() {
    let code = assemble(long_program);
    assert!(same(|| computer(&code)) > 5000);
}

fn strings(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ebx, 60)?;
    a.set_label(&mut top)?;
    a.mov(esi, DATA as u32 + 0xf00)?;
    a.lea(edi, ptr(esi + ebx * 4 + 0x80))?;
    a.mov(ecx, 0x183)?;
    a.cmp(ebx, 30)?;
    a.rep().movsb()?;
    a.adc(edx, esi)?;
    a.movsd()?;
    a.stosb()?;
    a.mov(ecx, 0x100)?;
    a.rep().stosd()?;
    a.sub(ebx, 1)?;
    a.jne(top)
}

/// Those that are left in the middle, at the end of a page or of a stretch, among them.
#[test]
fn string_instructions() {
    let code = assemble(strings);
    assert!(same(|| computer(&code)) > 500);
    let code = assemble_bits(32, CODE, strings);
    assert!(same(|| compatibility(&code)) > 500);
}

#[test]
fn x87_and_32_bit_code() {
    let build = |a: &mut CodeAssembler| {
        let mut top = a.create_label();
        a.mov(ecx, 100)?;
        a.fldz()?;
        a.set_label(&mut top)?;
        a.fild(dword_ptr(DATA as u32 + 8))?;
        a.fadd(dword_ptr(DATA as u32 + 0x40))?;
        a.faddp(st1, st0)?;
        a.fst(qword_ptr(DATA as u32 + 0x100))?;
        a.push(ecx)?;
        a.inc(eax)?;
        a.sbb(edx, dword_ptr(DATA as u32 + 0x104))?;
        a.pop(edx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    };
    let code = assemble_bits(32, CODE, build);
    assert!(same(|| compatibility(&code)) > 900);
}

/// Another thread writes to a page that the program writes to all the time: nothing of that is lost.
#[test]
fn what_others_write_stays() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(qword_ptr(DATA + 0x100), 1)?;
        a.add(rbx, qword_ptr(DATA + 0x800))?;
        a.cmp(byte_ptr(DATA + 0x808), 0)?;
        a.je(top)
    });
    let mut c = computer(&code);
    c.put64(DATA + 0x808, 0);
    in_lockstep(&mut c, None);
    let memory = c.memory.clone();
    let writer = std::thread::spawn(move || {
        for i in 0..=300_u64 {
            memory.write(DATA + 0x800, &i.to_le_bytes()).unwrap();
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        memory.write(DATA + 0x808, &[1]).unwrap();
    });
    finish(&mut c);
    writer.join().unwrap();
    assert_eq!(c.get64(DATA + 0x800), 300);
}

/// Replaces bytes of what was generated.
fn replace(code: &mut [u8], from: &[u8], to: &[u8]) {
    for at in 0..code.len().saturating_sub(from.len() - 1) {
        if code[at..].starts_with(from) {
            code[at..at + to.len()].copy_from_slice(to);
        }
    }
}

/// Runs a program in lockstep that `spoil` makes wrong: the last of the instructions with this mnemonic must be
/// found, and what is written about it must name it.
fn is_found(code: &[u8], mut c: Computer, wrong: Mnemonic, spoil: fn(&mut Vec<u8>)) {
    // The file's name has nothing but the process and the address.
    static ONE: Mutex<()> = Mutex::new(());
    let _held = ONE.lock();
    let bits = c.cpu.mode().bits();
    let mut decoder = Decoder::with_ip(bits, code, CODE, DecoderOptions::NONE);
    let insn = decoder.iter().filter(|i| i.mnemonic() == wrong).last();
    let rip = insn.expect("no such instruction").ip();
    in_lockstep(&mut c, Some(spoil));
    let exit = c.cpu.run(u64::MAX);
    let expected = Exit::InternalError(InternalError::Lockstep { rip });
    assert_eq!(exit, expected);
    let file = super::report::path(rip);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(
        text.contains(&format!("the instruction at {rip:#x}")),
        "{text}"
    );
    for part in ["state before", "state when interpreted", "host, entered at"] {
        assert!(text.contains(part), "no {part}: {text}");
    }
}

/// XADD becomes ADD.
#[test]
fn a_wrong_instruction_is_found() {
    let code = assemble(long_program);
    is_found(&code, computer(&code), Mnemonic::Xadd, |code| {
        replace(code, &[0x48, 0x0f, 0xc1, 0xd3], &[0x90, 0x48, 0x01, 0xd3]);
    });
}

/// A store of a byte instead of a doubleword, which no register shows.
#[test]
fn a_wrong_store_is_found() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 500)?;
        a.mov(esi, DATA as u32)?;
        a.set_label(&mut top)?;
        a.mov(dword_ptr(rsi + 0x100), ecx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    is_found(&code, computer(&code), Mnemonic::Mov, |code| {
        replace(code, &[0x44, 0x89], &[0x44, 0x88]);
    });
}

/// In 32-bit code.
#[test]
fn a_wrong_instruction_of_32_bit_code_is_found() {
    let code = assemble_bits(32, CODE, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 500)?;
        a.set_label(&mut top)?;
        a.push(ecx)?;
        a.bswap(eax)?;
        a.pop(edx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    // BSWAP EAX becomes BSWAP EBX.
    is_found(&code, compatibility(&code), Mnemonic::Bswap, |code| {
        replace(code, &[0x0f, 0xc8], &[0x0f, 0xcb]);
    });
}

/// A loop of any number of blocks is left at each of them before long.
#[test]
fn turns_end_anywhere_in_a_loop() {
    for length in 1..=256_usize {
        let mut turn = super::TurnLength::default();
        let mut ended = vec![false; length];
        for round in 0..length * 2000 {
            ended[round % length] |= turn.is_over();
        }
        assert!(ended.iter().all(|&ended| ended), "{length}");
    }
}
