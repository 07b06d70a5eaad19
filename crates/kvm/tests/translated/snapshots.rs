//! State taken out of a running guest at any moment, and put into a new VM, goes on the same: what live
//! migration and snapshots rest on.

use crate::{CODE, DATA, END, Machine, RAM, TABLE, assemble};
use anykvm::bindings::{Msrs, kvm_msr_entry};
use anykvm::{Errno, VcpuExit, VcpuFd};
use iced_x86::code_asm::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Pages behind these addresses are not there until the handler of page faults maps them.
const LAZY: u64 = 0x10_0000;

/// Works with everything there is: integers, the stack, calls, SSE, AVX, x87, strings, exceptions, page
/// faults, port I/O; its result is in registers and memory.
fn program() -> Vec<u8> {
    assemble(|a| {
        let (mut top, mut f, mut skip, mut lazy) = (
            a.create_label(),
            a.create_label(),
            a.create_label(),
            a.create_label(),
        );
        a.mov(r15d, 60_000)?;
        a.mov(rbx, 0x0123_4567_89ab_cdefu64)?;
        a.fninit()?;
        a.fldpi()?;
        a.movq(xmm3, rbx)?;
        a.set_label(&mut top)?;
        // Integers and flags.
        a.mov(rax, rbx)?;
        a.shl(rax, 13)?;
        a.xor(rbx, rax)?;
        a.mov(rax, rbx)?;
        a.shr(rax, 7)?;
        a.xor(rbx, rax)?;
        a.adc(r12, rbx)?;
        a.call(f)?;
        // Memory.
        a.movzx(esi, bx)?;
        a.and(esi, 0xfff8)?;
        a.add(qword_ptr(rsi + DATA as i32), rbx)?;
        a.mov(edi, DATA as u32 + 0x1_0100)?;
        a.mov(ecx, 9)?;
        a.lea(rsi, qword_ptr(rsi + DATA as i32))?;
        a.rep().movsq()?;
        // Vectors.
        a.movq(xmm0, rbx)?;
        a.vpbroadcastq(ymm1, xmm0)?;
        a.vpaddq(ymm2, ymm2, ymm1)?;
        a.vpxor(ymm4, ymm4, ymm2)?;
        a.pmuludq(xmm3, xmm0)?;
        a.cvtsi2sd(xmm5, r15d)?;
        a.addsd(xmm6, xmm5)?;
        // x87.
        a.fld1()?;
        a.fadd_2(st0, st1)?;
        a.fsqrt()?;
        a.fstp(qword_ptr(DATA as i32 + 0x1_0000))?;
        // An exception each 64 turns, a page fault each 256, a port each 1024.
        a.test(r15d, 63)?;
        a.jne(skip)?;
        a.ud2()?;
        a.test(r15d, 255)?;
        a.jne(skip)?;
        a.mov(esi, r15d)?;
        a.and(esi, 0x7_f000)?;
        a.set_label(&mut lazy)?;
        a.add(qword_ptr(rsi + LAZY as i32), r15)?;
        a.mov(qword_ptr(rsi + LAZY as i32 + 8), rbx)?;
        a.mov(eax, ebx)?;
        a.out(0x10, al)?;
        a.in_(eax, 0x11)?;
        a.add(r13, rax)?;
        a.set_label(&mut skip)?;
        a.dec(r15d)?;
        a.jne(top)?;
        a.vmovdqu(ymmword_ptr(DATA as i32 + 0x1_0200), ymm2)?;
        a.vmovdqu(ymmword_ptr(DATA as i32 + 0x1_0220), ymm4)?;
        a.movdqu(xmmword_ptr(DATA as i32 + 0x1_0240), xmm3)?;
        a.movdqu(xmmword_ptr(DATA as i32 + 0x1_0250), xmm6)?;
        a.out(i32::from(END), al)?;
        a.set_label(&mut f)?;
        a.push(rbx)?;
        a.rol(qword_ptr(rsp), 5)?;
        a.pop(r14)?;
        a.imul_3(r14, r14, 77)?;
        a.add(r12, r14)?;
        a.ret()
    })
}

/// Handlers: #UD skips the instruction; #PF maps the page.
fn handlers(machine: &Machine) {
    let skip = [0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf]; // add qword [rsp], 2; iretq
    machine.ram.write_bytes(0x2_0000, &skip);
    machine.handler(6, 0x2_0000);
    let map = assemble(|a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.mov(rax, cr2)?;
        a.mov(rcx, rax)?;
        a.shr(ecx, 12)?;
        a.and(eax, 0xf_f000u32)?;
        a.or(eax, LAZY as u32 | 7)?;
        a.mov(qword_ptr(rcx * 8 + TABLE as i32), rax)?;
        a.inc(r8)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    machine.ram.write_bytes(0x2_0100, &map);
    machine.handler(14, 0x2_0100);
    for page in 0..0x80 {
        let at = TABLE + (LAZY / 4096 + page) * 8;
        machine.ram.write(at as usize, 0u64);
    }
}

fn machine() -> (Machine, VcpuFd) {
    let machine = Machine::new(&program());
    handlers(&machine);
    let vcpu = machine.vcpu(0);
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr4 |= 1 << 18;
    vcpu.set_sregs(&sregs).unwrap();
    let mut xcrs = vcpu.get_xcrs().unwrap();
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0].value = 7;
    vcpu.set_xcrs(&xcrs).unwrap();
    (machine, vcpu)
}

/// All there is of a guest, in a new VM.
fn moved(machine: &Machine, vcpu: &VcpuFd) -> (Machine, VcpuFd) {
    let new = Machine::empty(0);
    let mut page = vec![0; RAM];
    machine.ram.read_bytes(0, &mut page);
    new.ram.write_bytes(0, &page);
    let to = new.vm.create_vcpu(0).unwrap();
    to.set_cpuid2(&vcpu.get_cpuid2(256).unwrap()).unwrap();
    to.set_sregs2(&vcpu.get_sregs2().unwrap()).unwrap();
    to.set_regs(&vcpu.get_regs().unwrap()).unwrap();
    to.set_xcrs(&vcpu.get_xcrs().unwrap()).unwrap();
    to.set_xsave(&vcpu.get_xsave().unwrap()).unwrap();
    to.set_debug_regs(&vcpu.get_debug_regs().unwrap()).unwrap();
    let list = machine.kvm.get_msr_index_list().unwrap();
    for index in list.as_slice() {
        let entry = kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).unwrap();
        if vcpu.get_msrs(&mut msrs).unwrap() == 1 {
            // Some are read-only, or the VM's own.
            let _ = to.set_msrs(&msrs);
        }
    }
    to.set_mp_state(vcpu.get_mp_state().unwrap()).unwrap();
    to.set_vcpu_events(&vcpu.get_vcpu_events().unwrap())
        .unwrap();
    (new, to)
}

/// Registers at the end, and memory.
fn end(machine: &Machine, vcpu: &VcpuFd) -> (String, Vec<u8>) {
    let mut memory = vec![0; RAM];
    machine.ram.read_bytes(0, &mut memory);
    let xsave: Vec<u32> = vcpu.get_xsave().unwrap().region.into_iter().collect();
    let state = format!("{:x?} {xsave:x?}", vcpu.get_regs().unwrap());
    (state, memory)
}

/// Runs to the end. With `at_stop`: kicked after a while, and stopped at some writes to a port; at each stop that
/// may put another guest in the place of this.
fn run(mut at_stop: Option<impl FnMut(Machine, VcpuFd) -> (Machine, VcpuFd)>) -> (String, Vec<u8>) {
    let (mut machine, mut vcpu) = machine();
    loop {
        let kick = vcpu.kick_handle();
        let gone = AtomicBool::new(false);
        let ended = thread::scope(|scope| {
            if at_stop.is_some() {
                scope.spawn(|| {
                    thread::sleep(Duration::from_micros(700));
                    if !gone.load(Ordering::Acquire) {
                        kick.kick();
                    }
                });
            }
            let ended = until_stopped(&mut vcpu, at_stop.is_some());
            gone.store(true, Ordering::Release);
            ended
        });
        if ended {
            return end(&machine, &vcpu);
        }
        if let Some(at_stop) = &mut at_stop {
            (machine, vcpu) = at_stop(machine, vcpu);
        }
    }
}

/// Runs until a kick, or, with `ports`, a write to port 0x10; true at the end.
fn until_stopped(vcpu: &mut VcpuFd, ports: bool) -> bool {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, data)) => {
                if ports && data[0] < 0x20 {
                    // Completes the instruction and enters nothing.
                    vcpu.set_kvm_immediate_exit(1);
                }
            }
            Ok(VcpuExit::IoIn(0x11, data)) => data.fill(0x5a),
            Ok(VcpuExit::IoOut(END, _)) => return true,
            Err(Errno::EINTR) => {
                vcpu.set_kvm_immediate_exit(0);
                return false;
            }
            Ok(other) => panic!("{other:?}"),
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn a_guest_that_moves_again_and_again_ends_the_same() {
    let (registers, memory) = run(None::<fn(Machine, VcpuFd) -> (Machine, VcpuFd)>);
    let mut moves = 0;
    let (moved_registers, moved_memory) = run(Some(|m, v| {
        moves += 1;
        let new = moved(&m, &v);
        drop((v, m));
        new
    }));
    assert!(moves > 10, "{moves} moves");
    assert_eq!(registers, moved_registers);
    let differ = memory.iter().zip(&moved_memory).position(|(a, b)| a != b);
    assert_eq!(differ, None, "{moves} moves");
    // The program did what it should have: its code is still there, and its last loop ended.
    assert_eq!(memory[CODE as usize], program()[0]);
}
