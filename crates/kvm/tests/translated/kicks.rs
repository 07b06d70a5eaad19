//! What ends a run, or interrupts the guest, comes through any loop.

use crate::{CODE, DATA, END, Machine, assemble, finish};
use anykvm::Errno;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

type Build = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Loops without an end, of different shapes.
const LOOPS: &[Build] = &[
    |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.jmp(top)
    },
    // Linked blocks, forward and backward.
    |a| {
        let (mut top, mut middle, mut other) =
            (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.inc(rax)?;
        a.test(eax, 8)?;
        a.je(middle)?;
        a.jmp(other)?;
        a.set_label(&mut middle)?;
        a.mov(qword_ptr(DATA as i32), rax)?;
        a.set_label(&mut other)?;
        a.jmp(top)
    },
    // Calls and returns.
    |a| {
        let (mut top, mut f) = (a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.call(f)?;
        a.jmp(top)?;
        a.set_label(&mut f)?;
        a.inc(rax)?;
        a.ret()
    },
    // By register, and by memory.
    |a| {
        let (mut top, mut other) = (a.create_label(), a.create_label());
        a.lea(rbx, ptr(top))?;
        a.lea(rcx, ptr(other))?;
        a.mov(qword_ptr(DATA as i32), rcx)?;
        a.set_label(&mut top)?;
        a.jmp(qword_ptr(DATA as i32))?;
        a.set_label(&mut other)?;
        a.jmp(rbx)
    },
    |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.loop_(top)?;
        a.jmp(top)
    },
    // A string instruction that takes long, again and again.
    |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.mov(edi, 0x20_0000)?;
        a.mov(ecx, 0x20_0000)?;
        a.rep().stosb()?;
        a.jmp(top)
    },
    // Vector registers, and an exception at each turn.
    |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.vpaddq(ymm1, ymm1, ymm2)?;
        a.ud2()?;
        a.jmp(top)
    },
    // Code that changes itself.
    |a| {
        let (mut top, mut next) = (a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.mov(byte_ptr(next), al)?;
        a.inc(al)?;
        // ADD BL, imm8: the immediate is replaced.
        a.db(&[0x80, 0xc3])?;
        a.set_label(&mut next)?;
        a.db(&[0])?;
        a.jmp(top)
    },
];

#[test]
fn a_kick_ends_any_loop() {
    for build in LOOPS {
        let machine = Machine::new(&assemble(build));
        // A handler at 0x2_0000 that skips UD2.
        machine.handler(6, 0x2_0000);
        let skip = [0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf]; // add qword [rsp], 2; iretq
        machine.ram.write_bytes(0x2_0000, &skip);
        let mut vcpu = machine.vcpu(0);
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr4 |= 1 << 18;
        vcpu.set_sregs(&sregs).unwrap();
        let mut xcrs = vcpu.get_xcrs().unwrap();
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].xcr = 0;
        xcrs.xcrs[0].value = 7;
        vcpu.set_xcrs(&xcrs).unwrap();
        for round in 0..30 {
            let kick = vcpu.kick_handle();
            let kicker = thread::spawn(move || {
                thread::sleep(Duration::from_micros(round * 100));
                kick.kick();
            });
            match vcpu.run() {
                Err(Errno::EINTR) => {}
                other => panic!("{other:?}"),
            }
            kicker.join().unwrap();
        }
    }
}

/// No call sees an INT3 that has completed and is not delivered: KVM_GET_VCPU_EVENTS could not tell it.
#[test]
fn a_breakpoint_is_not_lost_by_a_kick() {
    let machine = Machine::new(&assemble(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.int3()?;
        a.inc(rcx)?;
        a.jmp(top)
    }));
    machine.handler(3, 0x2_0000);
    let count = [0x48, 0xff, 0xc0, 0x48, 0xcf]; // inc rax; iretq
    machine.ram.write_bytes(0x2_0000, &count);
    let mut vcpu = machine.vcpu(0);
    for _ in 0..2000 {
        let kick = vcpu.kick_handle();
        thread::scope(|scope| {
            scope.spawn(move || kick.kick());
            assert!(matches!(vcpu.run(), Err(Errno::EINTR)));
        });
        let events = vcpu.get_vcpu_events().unwrap();
        vcpu.set_vcpu_events(&events).unwrap();
        let regs = vcpu.get_regs().unwrap();
        assert!(
            matches!(regs.rax.wrapping_sub(regs.rcx), 0 | 1),
            "{regs:x?}"
        );
    }
}

/// JMP to itself until the handler of the local APIC's timer leads out of it.
#[test]
fn a_timer_interrupts_a_loop_of_one_instruction() {
    let code = assemble(|a| {
        let mut top = a.create_label();
        // Spurious vector 0xff and the APIC on; divide by 1; timer vector 0x40, periodic; 20,000 ticks.
        a.mov(ebx, 0xfee0_0000u32)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 0x2_0040)?;
        a.mov(dword_ptr(rbx + 0x380), 20_000)?;
        a.sti()?;
        a.set_label(&mut top)?;
        a.jmp(top)
    });
    let handler = assemble(|a| {
        let mut out = a.create_label();
        let mut back = a.create_label();
        a.inc(rcx)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.cmp(rcx, 100)?;
        a.je(out)?;
        a.set_label(&mut back)?;
        a.iretq()?;
        a.set_label(&mut out)?;
        a.out(i32::from(END), al)
    });
    let machine = Machine::empty(0);
    machine.tables();
    machine.ram.write_bytes(CODE as usize, &code);
    machine.ram.write_bytes(0x2_0000, &handler);
    machine.handler(0x40, 0x2_0000);
    machine.vm.create_irq_chip().unwrap();
    let mut vcpu = machine.vcpu(0);
    finish(&mut vcpu);
    assert_eq!(vcpu.get_regs().unwrap().rcx, 100);
    // Where the loop is: each interrupt found it there.
    let top = vcpu.get_regs().unwrap().rsp as usize;
    let interrupted: u64 = machine.ram.read(top);
    assert_eq!(interrupted, CODE + code.len() as u64 - 2);
}

/// Interrupts from the VMM between any two instructions of a hot loop leave no trace in it.
#[test]
fn injected_interrupts_change_nothing() {
    let machine = Machine::new(&assemble(|a| {
        let mut top = a.create_label();
        a.sti()?;
        a.mov(ecx, 3_000_000)?;
        a.set_label(&mut top)?;
        a.add(rax, rcx)?;
        a.adc(rbx, 0)?;
        a.push(rax)?;
        a.rol(rax, 3)?;
        a.pop(rdx)?;
        a.xor(rsi, rdx)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.out(i32::from(END), al)
    }));
    let (mut sum, mut carries, mut mixed) = (0u64, 0u64, 0);
    for n in (1..=3_000_000u64).rev() {
        let (next, carry) = sum.overflowing_add(n);
        carries += u64::from(carry);
        mixed ^= next;
        sum = next.rotate_left(3);
    }
    machine.handler(0x30, 0x2_0000);
    // inc r15; iretq
    let count = [0x49, 0xff, 0xc7, 0x48, 0xcf];
    machine.ram.write_bytes(0x2_0000, &count);
    let mut vcpu = machine.vcpu(0);
    let running = AtomicBool::new(true);
    let mut injected = 0;
    thread::scope(|scope| {
        let kick = vcpu.kick_handle();
        let running = &running;
        scope.spawn(move || {
            while running.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(200));
                kick.kick();
            }
        });
        loop {
            let exit = vcpu.run().map(|exit| format!("{exit:?}"));
            match exit {
                Err(Errno::EINTR) => {}
                Ok(exit) if exit.starts_with("IoOut(153") => break,
                other => panic!("{other:?}"),
            }
            if vcpu.ready_for_interrupt_injection() {
                vcpu.interrupt(0x30).unwrap();
                injected += 1;
            }
        }
        running.store(false, Ordering::Relaxed);
    });
    let regs = vcpu.get_regs().unwrap();
    assert_eq!((regs.rax, regs.rbx, regs.rsi), (sum, carries, mixed));
    // The last one may have come too late.
    assert!(regs.r15 == injected || regs.r15 + 1 == injected);
}
