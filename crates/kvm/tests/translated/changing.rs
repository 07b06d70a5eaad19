//! Code that is written from outside the processor that runs it: by the VMM, as a device's DMA would, and by
//! another processor.

use crate::{CODE, DATA, END, Machine, TABLE, assemble, finish};
use anykvm::VcpuExit;
use iced_x86::code_asm::*;
use std::thread;

/// Where the guest maps pages that the VMM has filled.
const WINDOW: u64 = 0x1f_0000;

/// MOV EAX, n; RET, at an offset that puts it across the end of a cache line, or anywhere.
fn function(n: u32) -> [u8; 6] {
    let [a, b, c, d] = n.to_le_bytes();
    [0xb8, a, b, c, d, 0xc3]
}

/// What the VMM writes before the guest maps the page is what runs, however often the same memory and the same
/// address held other code: with INVLPG, or by a new address space (MOV to CR3).
#[test]
fn what_the_vmm_has_written_runs_once_it_is_mapped() {
    for flush in [true, false] {
        let code = assemble(|a| {
            let (mut next, mut calls) = (a.create_label(), a.create_label());
            a.mov(esi, WINDOW as u32)?;
            a.set_label(&mut next)?;
            // The VMM says which page (RBX), where in it (RDI), and fills it.
            a.out(0x10, al)?;
            a.mov(rax, rbx)?;
            a.or(rax, 7)?;
            a.mov(qword_ptr((TABLE + WINDOW / 4096 * 8) as i32), rax)?;
            if flush {
                a.invlpg(byte_ptr(rsi))?;
            } else {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
            }
            a.mov(ecx, 40)?;
            a.xor(edx, edx)?;
            a.add(rdi, rsi)?;
            a.set_label(&mut calls)?;
            a.call(rdi)?;
            a.add(rdx, rax)?;
            a.dec(ecx)?;
            a.jne(calls)?;
            a.out(0x11, al)?;
            a.jmp(next)
        });
        let machine = Machine::new(&code);
        let mut vcpu = machine.vcpu(0);
        let mut expected = 0;
        for round in 0..6000u32 {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x10, _) => {}
                other => panic!("{other:?}"),
            }
            if round > 0 {
                assert_eq!(vcpu.get_regs().unwrap().rdx, expected, "round {round}");
            }
            // Four pages by turns; offsets repeat, so that old code is at the same place.
            let n = round.wrapping_mul(0x9e37_79b9);
            let page = 0x3_0000 + u64::from(round % 4) * 0x1000;
            let offset = u64::from(round / 4 % 8) * 29;
            machine
                .ram
                .write_bytes((page + offset) as usize, &function(n));
            expected = u64::from(n) * 40;
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rbx, regs.rdi) = (page, offset);
            vcpu.set_regs(&regs).unwrap();
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x11, _) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// The same without a word to the engine between the VMM's write and the guest's: only KVM_RUN.
#[test]
fn what_the_vmm_has_written_runs_without_other_calls() {
    let code = assemble(|a| {
        let (mut next, mut calls) = (a.create_label(), a.create_label());
        a.mov(esi, WINDOW as u32)?;
        a.mov(ebx, 0x3_0000u32 | 7)?;
        a.set_label(&mut next)?;
        a.out(0x10, al)?;
        a.mov(qword_ptr((TABLE + WINDOW / 4096 * 8) as i32), rbx)?;
        a.invlpg(byte_ptr(rsi))?;
        a.mov(ecx, 20)?;
        a.set_label(&mut calls)?;
        a.call(rsi)?;
        a.dec(ecx)?;
        a.jne(calls)?;
        // Not mapped while the VMM writes.
        a.mov(qword_ptr((TABLE + WINDOW / 4096 * 8) as i32), 0)?;
        a.invlpg(byte_ptr(rsi))?;
        a.jmp(next)
    });
    let machine = Machine::new(&code);
    let mut vcpu = machine.vcpu(0);
    for round in 0..5000u32 {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, data) if round > 0 => {
                let last = (round - 1).wrapping_mul(7919);
                assert_eq!(data, [last as u8], "round {round}");
            }
            VcpuExit::IoOut(0x10, _) => {}
            other => panic!("{other:?}"),
        }
        let n = round.wrapping_mul(7919);
        machine.ram.write_bytes(0x3_0000, &function(n));
    }
}

/// One processor publishes code for another, which runs it behind a serialising instruction: the new code, no
/// matter how hot the old one is (SDM Vol. 3, 9.1.3).
#[test]
fn code_of_another_processor_runs_behind_a_serialising_instruction() {
    const ROUNDS: u32 = 5000;
    const FUNCTION: u64 = 0x3_0ffd;
    const PUBLISHED: i32 = DATA as i32;
    const TAKEN: i32 = DATA as i32 + 64;
    let writer = assemble(|a| {
        let (mut next, mut wait) = (a.create_label(), a.create_label());
        a.mov(ebx, 1)?;
        a.set_label(&mut next)?;
        // Not by one store: nobody runs it now.
        a.mov(edi, FUNCTION as u32)?;
        a.mov(byte_ptr(rdi + 1), bl)?;
        a.mov(eax, ebx)?;
        a.shr(eax, 8)?;
        a.mov(word_ptr(rdi + 2), ax)?;
        a.mov(dword_ptr(PUBLISHED), ebx)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(TAKEN), ebx)?;
        a.jne(wait)?;
        a.inc(ebx)?;
        a.cmp(ebx, ROUNDS as i32)?;
        a.jbe(next)?;
        a.out(i32::from(END), al)
    });
    let mut reader = CodeAssembler::new(64).unwrap();
    let a = &mut reader;
    let (mut wait, mut wrong, mut calls) = (a.create_label(), a.create_label(), a.create_label());
    let mut build = || {
        a.mov(r12d, 1)?;
        a.mov(r13d, FUNCTION as u32)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(PUBLISHED), r12d)?;
        a.jne(wait)?;
        a.xor(eax, eax)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(r14d, 3)?;
        a.set_label(&mut calls)?;
        a.call(r13)?;
        a.cmp(eax, r12d)?;
        a.jne(wrong)?;
        a.dec(r14d)?;
        a.jne(calls)?;
        a.mov(dword_ptr(TAKEN), r12d)?;
        a.inc(r12d)?;
        a.cmp(r12d, ROUNDS as i32)?;
        a.jbe(wait)?;
        a.set_label(&mut wrong)?;
        // Also if it is wrong: the writer is not to wait for ever.
        a.mov(dword_ptr(TAKEN), eax)?;
        a.out(i32::from(END), al)
    };
    build().unwrap();
    const READER: u64 = CODE + 0x1000;
    let machine = Machine::new(&writer);
    machine
        .ram
        .write_bytes(READER as usize, &reader.assemble(READER).unwrap());
    machine.ram.write_bytes(FUNCTION as usize, &function(0));
    let mut one = machine.vcpu(0);
    let mut two = machine.vcpu(1);
    let mut regs = two.get_regs().unwrap();
    regs.rip = READER;
    two.set_regs(&regs).unwrap();
    thread::scope(|scope| {
        let kick = one.kick_handle();
        let writer = scope.spawn(move || one.run().map(|_| ()));
        finish(&mut two);
        // The writer ends by itself if nothing went wrong.
        if two.get_regs().unwrap().r12 != u64::from(ROUNDS) + 1 {
            kick.kick();
        }
        writer.join().unwrap().unwrap();
    });
    let regs = two.get_regs().unwrap();
    assert_eq!(regs.r12, u64::from(ROUNDS) + 1, "EAX {:x}", regs.rax);
}
