//! Dirty logging under a guest that writes everywhere: a copy made with the log alone is complete.

use crate::{DATA, END, Machine, RAM, assemble, next_random};
use anykvm::VcpuExit;
use anykvm::bindings::KVM_MEM_LOG_DIRTY_PAGES;
use iced_x86::code_asm::*;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const PAGE: usize = 4096;
/// The guest writes from here to the end of its memory.
const WRITTEN: u64 = 0x20_0000;

/// Copies the pages that the log names; how many.
fn copy(machine: &Machine, copied: &mut [u8]) -> usize {
    let log = machine.vm.get_dirty_log(0, RAM).unwrap();
    let mut count = 0;
    for n in (0..RAM / PAGE).filter(|n| log[n / 64] >> (n % 64) & 1 != 0) {
        let page = &mut copied[n * PAGE..(n + 1) * PAGE];
        machine.ram.read_bytes(n * PAGE, page);
        count += 1;
    }
    count
}

/// As a live migration does: the log is read and cleared while the guest runs, and once more when it has
/// stopped.
#[test]
fn no_page_is_missed() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        a.mov(rbx, 0x9e37_79b9_7f4a_7c15u64)?;
        a.mov(r15d, 400_000)?;
        a.set_label(&mut top)?;
        // An address among the written ones, with room for 64 bytes: xorshift.
        next_random(a)?;
        a.mov(esi, ebx)?;
        a.and(esi, 0x5f_ff80)?;
        a.cmp(esi, 0x5f_b000)?;
        a.cmova(esi, r8d)?;
        a.add(esi, WRITTEN as i32)?;
        // Stores of every kind, sometimes across a page's end.
        a.mov(qword_ptr(rsi), rbx)?;
        a.movq(xmm1, rbx)?;
        a.movdqu(xmmword_ptr(rsi + 0x1001), xmm1)?;
        a.xchg(dword_ptr(rsi + 0x2004), ebx)?;
        a.lock().add(qword_ptr(rsi + 0x3008), rbx)?;
        a.mov(qword_ptr(rsi + 0xffd), rbx)?;
        a.mov(edi, esi)?;
        a.add(edi, 0x40)?;
        a.mov(ecx, 5)?;
        a.rep().stosq()?;
        a.lea(rsp, qword_ptr(rsi + 0x38))?;
        a.push(rbx)?;
        a.pop(rbx)?;
        a.inc(byte_ptr(rsi + 0x60))?;
        a.mov(rbx, r15)?;
        a.imul_3(rbx, rbx, 0x5bd1_e995)?;
        a.dec(r15d)?;
        a.jne(top)?;
        a.out(i32::from(END), al)
    });
    let machine = Machine::with_flags(&code, KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpu = machine.vcpu(0);
    let mut copied = vec![0; RAM];
    // What the test itself put there is in no log.
    machine.ram.read_bytes(0, &mut copied);
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let end = matches!(vcpu.run(), Ok(VcpuExit::IoOut(END, _)));
            ended.store(true, Ordering::Release);
            assert!(end, "{}", vcpu.dump());
        });
        let (mut rounds, mut pages) = (0, 0);
        while !ended.load(Ordering::Acquire) {
            pages += copy(&machine, &mut copied);
            rounds += 1;
        }
        guest.join().unwrap();
        copy(&machine, &mut copied);
        assert!(rounds > 3 && pages > 1000, "{rounds} rounds, {pages} pages");
    });
    for n in 0..RAM / PAGE {
        let mut page = [0; PAGE];
        machine.ram.read_bytes(n * PAGE, &mut page);
        assert!(page == copied[n * PAGE..(n + 1) * PAGE], "page {n:#x}");
    }
}

/// A processor that finds new code waits for the others, and is not waited for meanwhile: what it was asked to
/// drop it must drop before it executes anything. Two processors change and call functions that write data,
/// and are stopped at the moment when the log is read.
#[test]
fn no_page_is_missed_behind_new_code() {
    const ROUNDS: u64 = 1500;
    const PAGES: i32 = 4;
    let main = assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(rbx)?;
        a.mov(byte_ptr(r12 + 1), bl)?;
        a.call(r12)?;
        a.jmp(top)
    });
    let function = assemble(|a| {
        // Its number is what changes.
        a.mov(eax, 0x1111_1111)?;
        for n in 0..PAGES {
            a.mov(qword_ptr(rsi + n * PAGE as i32), rbx)?;
        }
        a.ret()
    });
    let machine = Machine::with_flags(&main, KVM_MEM_LOG_DIRTY_PAGES);
    let mut vcpus = Vec::new();
    for id in 0..2u64 {
        let vcpu = machine.vcpu(id);
        let mut regs = vcpu.get_regs().unwrap();
        regs.r12 = DATA + id * PAGE as u64;
        regs.rsi = WRITTEN + id * 0x10_0000;
        vcpu.set_regs(&regs).unwrap();
        machine.ram.write_bytes(regs.r12 as usize, &function);
        vcpus.push(vcpu);
    }
    let mut copied = vec![0; RAM];
    machine.ram.read_bytes(0, &mut copied);
    let turn = Barrier::new(3);
    let missed = thread::scope(|scope| {
        let kicks = [vcpus[0].kick_handle(), vcpus[1].kick_handle()];
        for vcpu in &mut vcpus {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    turn.wait();
                    assert!(matches!(vcpu.run(), Err(anykvm::Errno::EINTR)));
                    turn.wait();
                }
            });
        }
        let mut missed = Vec::new();
        for round in 0..ROUNDS {
            turn.wait();
            // Long enough for some calls, and never the same time.
            for _ in 0..(round * 7919) % 20_000 {
                std::hint::spin_loop();
            }
            kicks.iter().for_each(|kick| kick.kick());
            copy(&machine, &mut copied);
            turn.wait();
            copy(&machine, &mut copied);
            for n in WRITTEN as usize / PAGE..RAM / PAGE {
                let mut page = [0; 8];
                machine.ram.read_bytes(n * PAGE, &mut page);
                if page != copied[n * PAGE..n * PAGE + 8] {
                    missed.push((round, n));
                    copied[n * PAGE..n * PAGE + 8].copy_from_slice(&page);
                }
            }
        }
        missed
    });
    assert!(missed.is_empty(), "rounds and pages: {missed:x?}");
}
