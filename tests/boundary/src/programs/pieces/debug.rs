//! Breakpoints of every kind, single-stepping, RF, GD, and what waits behind MOV SS.

use super::Pieces;
use crate::programs::long::DATA;
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Debug registers and TF.
pub const DEBUG: Pieces = (
    &[
        data_breakpoint,
        data_breakpoint,
        instruction_breakpoint,
        io_breakpoint,
        single_step,
        single_step,
        general_detect,
        stack_segment,
        stack_segment,
        branches,
        resume_flag,
        off,
    ],
    4,
);

/// Sets DR0 and the like to RAX, and this one alone active, of this kind and length.
fn arm(a: &mut CodeAssembler, n: u32, kind: u32, len: u32) -> Result<(), IcedError> {
    match n {
        0 => a.mov(dr0, rax)?,
        1 => a.mov(dr1, rax)?,
        2 => a.mov(dr2, rax)?,
        _ => a.mov(dr3, rax)?,
    }
    a.mov(
        eax,
        0x400 | 1 << (n * 2) | kind << (16 + n * 4) | len << (18 + n * 4),
    )?;
    a.mov(dr7, rax)
}

fn off(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, 0x400)?;
    a.mov(dr7, rax)
}

fn data_breakpoint(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let at = DATA as i32 + 0x200 + random.below(16) as i32;
    a.mov(eax, at)?;
    let (n, kind) = (random.below(4) as u32, random.pick(&[1, 3]));
    arm(a, n, kind, random.below(4) as u32)?;
    match random.below(6) {
        0 => a.add(qword_ptr(at), rbx)?,
        1 => a.mov(rbx, qword_ptr(at - 4))?,
        2 => a.movups(xmmword_ptr(at - 8), xmm0)?,
        3 => a.push(qword_ptr(at)).and_then(|()| a.pop(rbx))?,
        4 => {
            a.mov(edi, at - 20)?;
            a.mov(ecx, 9)?;
            a.rep().stosd()?;
        }
        _ => {
            a.mov(esi, at - 9)?;
            a.mov(edi, DATA as u32 + 0x300)?;
            a.mov(ecx, 20)?;
            a.rep().movsb()?;
        }
    }
    a.nop()
}

fn instruction_breakpoint(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.lea(rax, ptr(here))?;
    arm(a, random.below(4) as u32, 0, 0)?;
    if random.once_in(3) {
        a.mov(eax, ss)?;
        a.mov(ss, eax)?;
    }
    a.set_label(&mut here)?;
    match random.below(3) {
        0 => a.inc(rbx),
        1 => a.int3(),
        _ => {
            a.mov(ecx, 5)?;
            a.rep().lodsb()
        }
    }
}

fn io_breakpoint(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, 0x12)?;
    arm(a, random.below(4) as u32, 2, random.pick(&[0, 1, 3]))?;
    match random.below(4) {
        0 => a.out(0x12, al),
        1 => a.in_(eax, 0x10),
        2 => {
            a.mov(edx, 0x12)?;
            a.mov(esi, DATA as u32)?;
            a.mov(ecx, 3)?;
            a.rep().outsb()
        }
        _ => {
            a.mov(edx, 0x12)?;
            a.mov(edi, DATA as u32 + 0x400)?;
            a.mov(ecx, 5)?;
            a.rep().insw()
        }
    }
}

fn single_step(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.pushfq()?;
    a.or(dword_ptr(rsp), 0x100)?;
    a.popfq()?;
    for _ in 0..1 + random.below(3) {
        match random.below(8) {
            0 => a.inc(rbx)?,
            1 => a.int(0x85)?,
            2 => {
                a.mov(ecx, 3)?;
                a.rep().stosb()?;
            }
            3 => a.sti()?,
            4 => {
                a.mov(eax, ss)?;
                a.mov(ss, eax)?;
            }
            5 => a.out(0x13, al)?,
            6 => a.int3()?,
            _ => {
                let mut over = a.create_label();
                a.jmp(over)?;
                a.set_label(&mut over)?;
            }
        }
        // Where REP STOSB writes.
        a.mov(edi, DATA as u32 + 0x500)?;
    }
    a.pushfq()?;
    a.and(dword_ptr(rsp), !0x100)?;
    a.popfq()
}

fn general_detect(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, 0x2400)?;
    a.mov(dr7, rax)?;
    a.nop()?;
    a.mov(rbx, dr0)
}

/// A breakpoint that MOV SS itself hits waits for the instruction behind it.
fn stack_segment(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let at = DATA as i32 + 0x600;
    a.mov(word_ptr(at), ss)?;
    a.mov(eax, at)?;
    arm(a, random.below(4) as u32, 3, random.below(2) as u32)?;
    a.mov(ss, word_ptr(at))?;
    match random.below(5) {
        0 => a.nop()?,
        1 => a.int3()?,
        2 => a.int(0x86)?,
        3 => a.mov(ss, word_ptr(at))?,
        _ => a.out(0x14, al)?,
    }
    a.nop()
}

/// IA32_DEBUGCTL: branch recording, and TF at branches only.
fn branches(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(ecx, 0x1d9)?;
    a.mov(eax, random.below(4) as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    single_step(a, random)?;
    a.mov(ecx, 0x1db)?;
    a.rdmsr()?;
    a.add(qword_ptr(DATA as i32 + 0x608), rax)
}

/// IRET with RF set passes a breakpoint.
fn resume_flag(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.lea(rax, ptr(here))?;
    a.mov(rbx, rax)?;
    arm(a, 0, 0, 0)?;
    a.mov(rcx, rsp)?;
    a.push(0x10)?;
    a.push(rcx)?;
    a.pushfq()?;
    a.or(dword_ptr(rsp), 0x1_0000)?;
    a.push(8)?;
    a.push(rbx)?;
    a.iretq()?;
    a.set_label(&mut here)?;
    a.inc(rdi)
}
