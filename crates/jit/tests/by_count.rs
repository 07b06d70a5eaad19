//! Translated code that stops behind any number of instructions: the state is the interpreter's there, and the
//! program goes on the same.

mod support;

use anykvm_cpu::Exit;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::harness::Computer;
use support::{ALWAYS, DATA, assemble, compare, computer, translate};

use anykvm_jit::Options;

const BY_COUNT: Options = Options {
    by_count: true,
    ..ALWAYS
};

fn executed(c: &Computer) -> u64 {
    c.cpu.translator_stats().unwrap().executed
}

/// Stops a program behind every number of turns up to `most`, and behind parts of `most / 10` and fewer turns all
/// along. Most of what runs must be translated.
fn same_everywhere(most: u64, build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble(build);
    let mut interpreted = computer(&code);
    for turns in 1..=most {
        assert_eq!(interpreted.cpu.run_counted(1), Exit::Budget);
        let mut translated = computer(&code);
        translate(&mut translated, BY_COUNT);
        assert_eq!(translated.cpu.run_counted(turns), Exit::Budget);
        assert_eq!(
            translated.cpu.counters.instructions, turns,
            "instructions counted"
        );
        compare(&interpreted, &translated);
        if turns == most {
            let executed = executed(&translated);
            assert!(
                executed > turns / 2,
                "it is interpreted: {executed} of {turns}"
            );
        }
    }
    let end = interpreted.cpu.run_counted(u64::MAX);
    for part in 1..=most / 10 {
        let mut translated = computer(&code);
        translate(&mut translated, BY_COUNT);
        let mut exit = Exit::Budget;
        while exit == Exit::Budget {
            exit = translated.cpu.run_counted(part);
        }
        assert_eq!(exit, end);
        assert_eq!(
            translated.cpu.counters.instructions,
            interpreted.cpu.counters.instructions
        );
        compare(&interpreted, &translated);
    }
}

#[test]
fn flags_in_a_loop() {
    same_everywhere(150, |a| {
        let mut top = a.create_label();
        let mut over = a.create_label();
        a.mov(ecx, 30)?;
        a.set_label(&mut top)?;
        a.add(rax, rbx)?;
        a.mov(rdx, qword_ptr(DATA as i32))?;
        a.adc(r11, r10)?;
        a.jc(over)?;
        a.xor(r15, rax)?;
        a.rcl(rdx, 3)?;
        a.set_label(&mut over)?;
        a.cmp(dword_ptr(DATA as i32 + 8), 77)?;
        a.lea(rsi, rax + rcx * 4 + 5)?;
        a.setb(r9b)?;
        a.dec(ecx)?;
        a.jne(top)
    });
}

#[test]
fn checks_that_are_shared() {
    same_everywhere(150, |a| {
        let mut top = a.create_label();
        // Near the end of a page, where such a check fails.
        a.mov(ebx, DATA as u32 + 0xf80)?;
        a.mov(ecx, 30)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.add(rax, rcx)?;
        a.mov(qword_ptr(rbx + 24), rax)?;
        a.add(qword_ptr(rbx + 32), 3)?;
        a.inc(dword_ptr(rbx + 40))?;
        a.add(ebx, 8)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn calls_stacks_and_strings() {
    same_everywhere(200, |a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut end = a.create_label();
        a.mov(r12d, 12)?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.lea(rax, ptr(f))?;
        a.call(rax)?;
        a.sub(r12d, 1)?;
        a.jne(top)?;
        a.jmp(end)?;
        a.set_label(&mut f)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.push(r10)?;
        a.mov(esi, DATA as u32 + 0x20)?;
        a.mov(edi, DATA as u32 + 0xff0)?;
        a.mov(ecx, 5)?;
        a.rep().movsd()?;
        a.movsq()?;
        a.pop(r10)?;
        a.leave()?;
        a.ret()?;
        a.set_label(&mut end)
    });
}

#[test]
fn vectors_and_x87() {
    same_everywhere(120, |a| {
        let mut top = a.create_label();
        a.fninit()?;
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, 20)?;
        a.set_label(&mut top)?;
        a.movups(xmm1, xmmword_ptr(rbx + 16))?;
        a.paddd(xmm1, xmm2)?;
        a.vpxor(ymm3, ymm1, ymmword_ptr(rbx + 64))?;
        a.fild(dword_ptr(rbx + 4))?;
        a.fld1()?;
        a.faddp(st1, st0)?;
        a.fistp(dword_ptr(rbx + 200))?;
        a.movups(xmmword_ptr(rbx + 32), xmm3)?;
        a.dec(ecx)?;
        a.jne(top)
    });
}

#[test]
fn code_that_is_not_translated() {
    same_everywhere(80, |a| {
        let mut top = a.create_label();
        a.mov(r12d, 20)?;
        a.set_label(&mut top)?;
        a.xor(eax, eax)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.add(r13, rbx)?;
        a.mov(rdx, cr0)?;
        a.dec(r12d)?;
        a.jne(top)
    });
}
