//! Code that changes, code that must stop, and a code cache that is too small.

mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anykvm_cpu::{Exit, requests};
use anykvm_jit::{Budget, Jit, Options};
use iced_x86::code_asm::*;
use support::{ALWAYS, CODE, LARGE, assemble, computer, finish, same, same_with, translate};

#[test]
fn a_store_into_the_next_instructions() {
    // ADD's immediate is replaced by the instruction in front of it.
    same(|a| {
        let mut top = a.create_label();
        let mut patched = a.create_label();
        a.mov(ecx, 50)?;
        a.lea(rbx, ptr(patched))?;
        a.set_label(&mut top)?;
        a.mov(byte_ptr(rbx + 2), cl)?;
        a.set_label(&mut patched)?;
        a.add(edx, 1)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn a_store_into_another_block_of_the_page() {
    same(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut end = a.create_label();
        a.mov(ecx, 50)?;
        a.lea(rbx, ptr(f))?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.mov(byte_ptr(rbx + 2), cl)?;
        a.call(f)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.jmp(end)?;
        a.set_label(&mut f)?;
        a.add(edx, 1)?;
        a.ret()?;
        a.set_label(&mut end)
    });
}

#[test]
fn code_made_in_another_page() {
    // A function is written into the data, called, and written anew.
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, support::DATA as u32 + 0x1000)?;
        a.mov(ecx, 40)?;
        a.set_label(&mut top)?;
        // add edx, imm8; ret
        a.mov(dword_ptr(rbx), 0xc300_c283u32)?;
        a.mov(byte_ptr(rbx + 2), cl)?;
        a.call(rbx)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn a_devices_store_is_seen_after_a_flush_of_the_tlb() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut go_on = a.create_label();
        a.jmp(top)?;
        a.set_label(&mut f)?;
        a.mov(eax, 0x11)?;
        a.jmp(go_on)?;
        a.set_label(&mut top)?;
        a.mov(rcx, cr3)?;
        a.mov(cr3, rcx)?;
        a.jmp(f)?;
        a.set_label(&mut go_on)
    });
    let mut c = computer(&code);
    translate(&mut c, ALWAYS);
    finish(&mut c);
    assert_eq!(c.reg(0), 0x11);
    // MOV's immediate, which no guest store touches.
    c.put(CODE + 3, &[0x22]);
    c.cpu.state.set_rip(CODE);
    finish(&mut c);
    assert_eq!(c.reg(0), 0x22);
}

#[test]
fn a_request_stops_a_loop_of_one_instruction() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.jmp(top)
    });
    let mut c = computer(&code);
    translate(&mut c, ALWAYS);
    for _ in 0..20 {
        let word = Arc::clone(c.cpu.requests());
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_millis(2));
            word.set(requests::KICK);
        });
        assert_eq!(c.cpu.run(u64::MAX), Exit::Request);
        kicker.join().unwrap();
        assert_eq!(c.cpu.requests().take(requests::KICK), requests::KICK);
        assert_eq!(c.cpu.state.rip(), CODE);
    }
}

#[test]
fn a_code_cache_that_is_far_too_small() {
    let options = Options {
        cache: 16 << 10,
        ..ALWAYS
    };
    same_with(options, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 20)?;
        a.set_label(&mut top)?;
        for i in 0..60 {
            let mut skip = a.create_label();
            a.add(rax, i)?;
            a.test(eax, 1 << (i & 7))?;
            a.je(skip)?;
            a.mov(qword_ptr(0x8000 + i * 8), rax)?;
            a.push(rax)?;
            a.pop(r10)?;
            a.set_label(&mut skip)?;
            a.nop()?;
        }
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn what_the_processor_may_not_do_is_the_interpreters() {
    // #GP of a non-canonical address, #DE, and #UD reach the guest from translated code.
    for build in [
        |a: &mut CodeAssembler| {
            a.mov(rbx, 0x8000_0000_0000_0000u64)?;
            a.add(rcx, 5)?;
            a.mov(rax, qword_ptr(rbx))
        },
        |a: &mut CodeAssembler| {
            a.xor(ecx, ecx)?;
            a.div(rcx)
        },
        |a: &mut CodeAssembler| {
            a.add(ecx, 1)?;
            a.ud2()
        },
        |a: &mut CodeAssembler| {
            a.mov(rbx, 0x1234_5678_9abc_def0u64)?;
            a.sub(rcx, rbx)?;
            a.jmp(rbx)
        },
        // A target whose upper bits alone make it another address than one that is known.
        |a: &mut CodeAssembler| {
            let mut f = a.create_label();
            a.set_label(&mut f)?;
            a.lea(rbx, ptr(f))?;
            a.mov(rdx, 0x0006_0000_0000_0000u64)?;
            a.add(rcx, 1)?;
            a.test(ecx, 3)?;
            a.mov(rsi, rbx)?;
            a.cmove(rsi, rdx)?;
            a.or(rsi, rbx)?;
            a.jmp(rsi)
        },
        |a: &mut CodeAssembler| {
            a.add(rsp, 3)?;
            a.movaps(xmm0, xmmword_ptr(rsp))
        },
    ] {
        let code = assemble(build);
        let mut one = computer(&code);
        one.catch_events();
        finish(&mut one);
        let mut two = computer(&code);
        two.catch_events();
        translate(&mut two, ALWAYS);
        finish(&mut two);
        assert_eq!(one.frame(), two.frame());
        support::compare(&one, &two);
    }
}

#[test]
fn a_program_whose_code_is_larger_than_the_cache() {
    // The least cache the option allows. Some thousand blocks, three times over.
    let options = Options {
        cache: 1 << 20,
        ..ALWAYS
    };
    let code = support::assemble_at(LARGE, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 3)?;
        a.set_label(&mut top)?;
        for i in 0..6000 {
            let mut skip = a.create_label();
            a.add(rax, i)?;
            a.test(eax, 1 << (i & 7))?;
            a.je(skip)?;
            a.xor(qword_ptr(0x8000 + (i & 0xff) * 8), rax)?;
            a.set_label(&mut skip)?;
            a.nop()?;
        }
        a.sub(ecx, 1)?;
        a.jne(top)
    });
    let run = |translated: bool| {
        let mut c = computer(&[]);
        c.put(LARGE, &code);
        c.cpu.state.set_rip(LARGE);
        if translated {
            translate(&mut c, options);
        }
        finish(&mut c);
        c
    };
    let (one, two) = (run(false), run(true));
    support::compare(&one, &two);
    let stats = two.cpu.translator_stats().unwrap();
    assert!(stats.flushes >= 3, "{stats:?}");
    assert!(stats.code_bytes <= 1 << 20, "{stats:?}");
    assert!(stats.memory_bytes >= stats.code_bytes);
    assert!(two.cpu.memory_bytes() > stats.memory_bytes);
}

#[test]
fn two_processors_share_one_limit() {
    let budget = Budget::new(32 << 10);
    let program = |a: &mut CodeAssembler| {
        for i in 0..200 {
            let mut next = a.create_label();
            a.add(rax, i)?;
            a.jmp(next)?;
            a.set_label(&mut next)?;
        }
        a.nop()
    };
    let code = assemble(program);
    let mut one = computer(&code);
    finish(&mut one);
    let mut computers = [computer(&code), computer(&code)];
    for c in &mut computers {
        c.cpu
            .set_translator(Some(Box::new(Jit::with_budget(ALWAYS, &budget).unwrap())));
    }
    for c in &mut computers {
        finish(c);
        support::compare(&one, c);
        assert!(budget.taken() <= budget.limit());
        assert!(c.cpu.translator_stats().unwrap().code_bytes <= 16 << 10);
    }
}

#[test]
fn instructions_are_counted_exactly() {
    // Faults of unmapped pages, instructions that are interpreted, blocks left and entered again.
    let options = Options {
        count: true,
        ..ALWAYS
    };
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(esi, 100)?;
        a.set_label(&mut top)?;
        a.add(rax, rsi)?;
        a.cpuid()?;
        a.mov(qword_ptr(0x8ffe), rax)?;
        a.push(rax)?;
        a.pop(rdx)?;
        a.dec(esi)?;
        a.jne(top)?;
        a.xor(ecx, ecx)?;
        a.div(rcx)
    });
    let mut one = computer(&code);
    one.catch_events();
    finish(&mut one);
    let mut two = computer(&code);
    two.catch_events();
    translate(&mut two, options);
    finish(&mut two);
    let stats = two.cpu.translator_stats().unwrap();
    assert!(stats.executed > 300, "{stats:?}");
    assert_eq!(
        stats.executed + two.cpu.counters.instructions,
        one.cpu.counters.instructions
    );
}
