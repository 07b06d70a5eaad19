//! Dirty logging under a guest that writes everywhere: a copy made with the log alone is complete.

use crate::{END, Machine, RAM, assemble};
use anykvm::VcpuExit;
use anykvm::bindings::KVM_MEM_LOG_DIRTY_PAGES;
use iced_x86::code_asm::*;
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
        a.mov(rax, rbx)?;
        a.shl(rax, 13)?;
        a.xor(rbx, rax)?;
        a.mov(rax, rbx)?;
        a.shr(rax, 7)?;
        a.xor(rbx, rax)?;
        a.mov(rax, rbx)?;
        a.shl(rax, 17)?;
        a.xor(rbx, rax)?;
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
