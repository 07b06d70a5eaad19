//! Loops of one block, which go on without checks: whatever ends that, translated code does what the
//! interpreter does.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anykvm_cpu::{Exit, requests};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{ALWAYS, DATA, assemble, computer, entry, same, same_exits, translate};

const SECOND: u64 = DATA + 0x1000;

/// A loop of `rounds` rounds in which RBX goes by `step`, an access of each kind off it.
fn go(a: &mut CodeAssembler, from: u64, step: i32, rounds: u64) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(rbx, from)?;
    a.mov(r12, rounds)?;
    a.set_label(&mut top)?;
    a.adc(rax, qword_ptr(rbx))?;
    a.mov(dword_ptr(rbx + 8), eax)?;
    a.add(rbx, step)?;
    a.sub(r12, 1)?;
    a.jne(top)
}

#[test]
fn steps_of_many_sizes() {
    let room = |step: i32| u64::from(0x1fe0 / step.unsigned_abs());
    for step in [1, 3, 8, 12, 16, 63, 64, 100, 255, 384, 511, 512, 513] {
        for rounds in [1, 2, 5, 128, 129, 130, 1000] {
            let rounds = room(step).min(rounds);
            same(|a| go(a, DATA, step, rounds));
            let last = DATA + 0x1ff0 - u64::from(step.unsigned_abs());
            same(|a| go(a, last, -step, rounds));
        }
    }
}

#[test]
fn what_follows_is_missing_or_read_only_or_a_devices() {
    for page in [0, SECOND | 5, 0xf000_0000 | 7] {
        for (from, step) in [(DATA + 0x801, 7), (DATA + 0x400, 16)] {
            let stores_only = |a: &mut CodeAssembler| {
                let mut top = a.create_label();
                a.mov(rbx, from)?;
                a.mov(r12, 300u64)?;
                a.set_label(&mut top)?;
                a.mov(qword_ptr(rbx), r12)?;
                a.add(rbx, step)?;
                a.sub(r12, 1)?;
                a.jne(top)
            };
            same_exits(|c| c.put64(entry(SECOND), page), stores_only);
        }
    }
    // Downwards, from the page that is there.
    same_exits(
        |c| c.put64(entry(DATA), 0),
        |a| go(a, SECOND + 0x800, -24, 200),
    );
}

#[test]
fn several_addresses_that_move_differently() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(rsi, DATA)?;
        a.mov(rdi, SECOND + 0xf00)?;
        a.mov(rdx, 0u64)?;
        a.mov(rbp, DATA + 0x3f8)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.xor(rax, qword_ptr(rsi + rdx * 4 + 0x10))?;
        a.add(rax, qword_ptr(rbp))?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(word_ptr(rdi + 14), dx)?;
        a.lea(rsi, rsi + 4)?;
        a.sub(rdi, 8)?;
        a.inc(rdx)?;
        a.cmp(rdx, 400)?;
        a.jb(top)
    });
}

#[test]
fn aligned_vectors() {
    for (from, step) in [(DATA, 16), (DATA, 48), (DATA + 0x30, 32)] {
        same(|a| {
            let mut top = a.create_label();
            a.mov(rbx, from)?;
            a.xorps(xmm2, xmm2)?;
            a.set_label(&mut top)?;
            a.movaps(xmm1, xmmword_ptr(rbx))?;
            a.paddq(xmm2, xmmword_ptr(rbx + 16))?;
            a.movaps(xmmword_ptr(rbx + 32), xmm2)?;
            a.pxor(xmm2, xmm1)?;
            a.add(rbx, step)?;
            a.cmp(rbx, (SECOND + 0xf00) as i32)?;
            a.jb(top)
        });
    }
    // Aligned only the first time.
    same_exits(
        |_| {},
        |a| {
            let mut top = a.create_label();
            a.mov(rbx, DATA)?;
            a.mov(r12, 40u64)?;
            a.set_label(&mut top)?;
            a.movaps(xmm1, xmmword_ptr(rbx))?;
            a.add(rbx, 8)?;
            a.sub(r12, 1)?;
            a.jne(top)
        },
    );
}

#[test]
fn locked_operands_over_cache_lines() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(rbx, DATA + 4)?;
        a.mov(r12, 200u64)?;
        a.set_label(&mut top)?;
        a.lock().add(qword_ptr(rbx), r12)?;
        a.add(rbx, 16)?;
        a.sub(r12, 1)?;
        a.jne(top)
    });
}

#[test]
fn branches_out_of_the_middle_and_flags_on_both_sides() {
    for key in [0u32, 1, 3, 17, 90, 200] {
        same(|a| {
            let mut top = a.create_label();
            let mut out = a.create_label();
            a.mov(rbx, DATA)?;
            a.mov(r12, 300u64)?;
            a.mov(r13d, key)?;
            a.set_label(&mut top)?;
            a.sbb(rax, qword_ptr(rbx + r12 * 2))?;
            a.mov(qword_ptr(rbx + r12 * 8), rax)?;
            a.cmp(r12, r13)?;
            a.jbe(out)?;
            a.adc(rdx, qword_ptr(rbx + 0x18))?;
            a.sub(r12, 1)?;
            a.jne(top)?;
            a.set_label(&mut out)?;
            a.adc(rdx, rax)
        });
    }
}

#[test]
fn what_is_stored_is_the_code_of_the_loop() {
    // The loop reaches its own page: the instruction behind it changes.
    same(|a| {
        let mut top = a.create_label();
        let mut behind = a.create_label();
        a.lea(rbx, ptr(behind))?;
        a.sub(rbx, 0x200)?;
        a.mov(r12, 0x201u64)?;
        a.set_label(&mut top)?;
        a.mov(al, byte_ptr(rbx))?;
        a.cmp(r12, 1)?;
        a.sete(cl)?;
        a.add(al, cl)?;
        a.mov(byte_ptr(rbx), al)?;
        a.add(rbx, 1)?;
        a.sub(r12, 1)?;
        a.jne(top)?;
        a.set_label(&mut behind)?;
        // NOP, whose byte becomes that of XCHG EAX, ECX.
        a.db(&[0x90, 0xff, 0xc0])
    });
}

#[test]
fn a_request_stops_it() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(rcx, 1)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rbx + 8), rcx)?;
        a.cmp(rbx, 0)?;
        a.jne(top)
    });
    let mut c = computer(&code);
    c.cpu.state.regs[1u8] = 0;
    c.cpu.state.regs[3u8] = DATA;
    c.cpu.state_changed();
    c.put64(DATA + 8, 0);
    translate(&mut c, ALWAYS);
    let mut rounds = 0;
    // A kick may come before its run.
    for _ in 0..20 {
        let word = Arc::clone(c.cpu.requests());
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(2));
            word.set(requests::KICK);
        });
        assert_eq!(c.cpu.run(u64::MAX), Exit::Request);
        kicker.join().unwrap();
        assert_eq!(c.cpu.requests().take(requests::KICK), requests::KICK);
        let now = c.cpu.state.regs[1u8];
        assert!(now >= rounds && c.get64(DATA + 8).abs_diff(now) <= 1);
        rounds = now;
    }
    assert!(rounds > 1000);
}
