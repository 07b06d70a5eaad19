//! KVM_SET_GUEST_DEBUG while code is hot.

use crate::{CODE, DATA, END, Machine, assemble, finish};
use anykvm::VcpuExit;
use anykvm::VcpuFd;
use anykvm::bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    kvm_guest_debug,
};
use iced_x86::code_asm::*;

const TURNS: u64 = 1000;

/// A loop that is hot when the guest writes to port 0x10; then it is run TURNS times more. The offsets of its
/// instructions.
fn machine() -> (Machine, Vec<u64>) {
    let mut offsets = Vec::new();
    let code = assemble(|a| {
        let (mut top, mut f) = (a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.mov(ecx, 100_000)?;
        a.set_label(&mut top)?;
        a.add(rax, rcx)?;
        a.mov(qword_ptr(DATA as i32), rax)?;
        a.call(f)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.test(ebx, ebx)?;
        let mut end = a.create_label();
        a.jne(end)?;
        a.inc(ebx)?;
        a.out(0x10, al)?;
        a.mov(ecx, TURNS as i32)?;
        a.jmp(top)?;
        a.set_label(&mut end)?;
        a.out(i32::from(END), al)?;
        a.set_label(&mut f)?;
        a.rol(rax, 1)?;
        a.ret()
    });
    let mut decoder = iced_x86::Decoder::with_ip(64, &code, CODE, 0);
    for insn in &mut decoder {
        offsets.push(insn.ip());
    }
    (Machine::new(&code), offsets)
}

fn hot(machine: &Machine) -> VcpuFd {
    let mut vcpu = machine.vcpu(0);
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, _) => {}
        other => panic!("{other:?}"),
    }
    vcpu
}

/// RAX at the end.
fn result() -> u64 {
    let turns = (1..=100_000u64).rev().chain((1..=TURNS).rev());
    turns.fold(0, |sum: u64, n| sum.wrapping_add(n).rotate_left(1))
}

fn debug(vcpu: &VcpuFd, control: u32, registers: [u64; 8]) {
    let mut d = kvm_guest_debug {
        control,
        ..Default::default()
    };
    d.arch.debugreg = registers;
    vcpu.set_guest_debug(&d).unwrap();
}

/// Runs to the end; where the guest was at each debug exit, and DR6.
fn exits(vcpu: &mut VcpuFd) -> Vec<(u64, u64)> {
    let mut list = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Debug(d) => {
                list.push((d.pc, d.dr6 & 0x400f));
                // A breakpoint is in front of its instruction: RF leads past it.
                let mut regs = vcpu.get_regs().unwrap();
                regs.rflags |= 1 << 16;
                vcpu.set_regs(&regs).unwrap();
            }
            VcpuExit::IoOut(END, _) => return list,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn single_steps_are_single() {
    let (machine, at) = machine();
    let mut vcpu = hot(&machine);
    debug(&vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, [0; 8]);
    let list = exits(&mut vcpu);
    // Behind OUT: MOV and JMP, then turns of seven instructions.
    let [add, mov, call, dec, jne, test] = [2, 3, 4, 5, 6, 7].map(|n| at[n]);
    let [rol, ret] = [14, 15].map(|n| at[n]);
    let mut wanted = vec![at[11], at[12], add];
    for turn in 1..=TURNS {
        wanted.extend([mov, call, rol, ret, dec, jne]);
        wanted.push(if turn == TURNS { test } else { add });
    }
    let pcs: Vec<u64> = list.iter().map(|e| e.0).collect();
    let first = wanted.iter().position(|pc| *pc == pcs[0]).unwrap();
    assert!(first <= 1, "{:x}", pcs[0]);
    assert_eq!(pcs[..wanted.len() - first], wanted[first..]);
    assert!(list.iter().all(|e| e.1 == 0x4000));
    assert_eq!(vcpu.get_regs().unwrap().rax, result());
}

#[test]
fn breakpoints_in_hot_code_are_hit_each_time() {
    for n in [2, 4, 6, 14] {
        let (machine, at) = machine();
        let mut vcpu = hot(&machine);
        // DR0: execution, enabled.
        debug(
            &vcpu,
            KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
            [at[n], 0, 0, 0, 0, 0, 0, 0x402],
        );
        let list = exits(&mut vcpu);
        assert_eq!(list.len() as u64, TURNS, "at {:x}", at[n]);
        assert!(list.iter().all(|e| *e == (at[n], 1)));
        assert_eq!(vcpu.get_regs().unwrap().rax, result());
    }
}

#[test]
fn a_watched_word_is_seen_written_each_time() {
    let (machine, at) = machine();
    let mut vcpu = hot(&machine);
    // DR1: writes of eight bytes.
    debug(
        &vcpu,
        KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
        [0, DATA, 0, 0, 0, 0, 0, 0x90_0408],
    );
    let list = exits(&mut vcpu);
    assert_eq!(list.len() as u64, TURNS);
    assert!(list.iter().all(|e| *e == (at[4], 2)));
    assert_eq!(vcpu.get_regs().unwrap().rax, result());
}

/// As a debugger does: INT3 is written over an instruction behind the engine's back, and taken away.
#[test]
fn software_breakpoints_come_and_go() {
    let (machine, at) = machine();
    let mut vcpu = hot(&machine);
    let place = at[14] as usize;
    let old: u8 = machine.ram.read(place);
    for round in 0..200 {
        machine.ram.write(place, 0xccu8);
        debug(&vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, [0; 8]);
        match vcpu.run().unwrap() {
            VcpuExit::Debug(d) => assert_eq!((d.pc, d.exception), (at[14], 3), "round {round}"),
            other => panic!("round {round}: {other:?}"),
        }
        machine.ram.write(place, old);
        // One step over it.
        debug(&vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, [0; 8]);
        match vcpu.run().unwrap() {
            VcpuExit::Debug(d) => assert_eq!(d.pc, at[15], "round {round}"),
            other => panic!("round {round}: {other:?}"),
        }
    }
    debug(&vcpu, 0, [0; 8]);
    finish(&mut vcpu);
    assert_eq!(vcpu.get_regs().unwrap().rax, result());
}

/// The guest's own: it sets DR7 in the middle of a hot loop, and its handler counts.
#[test]
fn a_guests_own_watchpoint_in_hot_code() {
    let code = assemble(|a| {
        let (mut top, mut go_on) = (a.create_label(), a.create_label());
        a.mov(eax, DATA as u32)?;
        a.mov(dr0, rax)?;
        a.mov(ecx, 3000)?;
        a.set_label(&mut top)?;
        a.add(qword_ptr(DATA as i32), 1)?;
        a.add(qword_ptr(DATA as i32 + 8), 2)?;
        a.cmp(ecx, 1000)?;
        a.jne(go_on)?;
        // Writes of eight bytes at DR0; from now on each turn has one.
        a.mov(eax, 0x9_0402)?;
        a.mov(dr7, rax)?;
        a.set_label(&mut go_on)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.out(i32::from(END), al)
    });
    let machine = Machine::new(&code);
    // inc r15; push rax; xor eax, eax; mov dr6, rax; pop rax; iretq
    let handler = [
        0x49, 0xff, 0xc7, 0x50, 0x31, 0xc0, 0x0f, 0x23, 0xf0, 0x58, 0x48, 0xcf,
    ];
    machine.ram.write_bytes(0x2_0000, &handler);
    machine.handler(1, 0x2_0000);
    let mut vcpu = machine.vcpu(0);
    finish(&mut vcpu);
    assert_eq!(vcpu.get_regs().unwrap().r15, 999);
    assert_eq!(machine.ram.read::<u64>(DATA as usize), 3000);
}
