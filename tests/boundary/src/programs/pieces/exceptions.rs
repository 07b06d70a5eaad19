//! Faults and traps of every kind, in the kernel and in user mode. A fault goes on at the address in R15.

use super::Pieces;
use crate::programs::long::{DATA, KERNEL_CODE, LAZY, USER_CODE, USER_DATA};
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Faults, traps, system calls.
pub const EXCEPTIONS: Pieces = (
    &[
        invalid,
        divide,
        software,
        protection,
        lazy_page,
        absent_page,
        string_over_lazy_pages,
        device_not_available,
        simd_exception,
        x87_exception,
        double_fault,
        user_mode,
        user_mode,
    ],
    4,
);

/// Code that faults and goes on behind it.
fn faulting(
    a: &mut CodeAssembler,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut behind = a.create_label();
    a.lea(r15, ptr(behind))?;
    code(a)?;
    a.set_label(&mut behind)?;
    a.nop()
}

fn invalid(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    faulting(a, |a| a.ud2())
}

fn divide(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    faulting(a, |a| {
        a.xor(ecx, ecx)?;
        a.div(rcx)
    })
}

fn software(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    match random.below(3) {
        0 => a.int3(),
        1 => a.int1(),
        _ => a.int(0x80 + random.below(0x40) as i32),
    }
}

fn protection(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    faulting(a, |a| match random.below(4) {
        0 => {
            a.mov(rax, 0x8000_0000_0000_0000u64)?;
            a.add(rbx, qword_ptr(rax))
        }
        1 => {
            a.mov(ecx, 0xdead)?;
            a.rdmsr()
        }
        2 => {
            a.mov(eax, 0x30)?;
            a.mov(ds, eax)
        }
        _ => {
            a.mov(eax, 0x40)?;
            a.ltr(ax)
        }
    })
}

fn unmap(a: &mut CodeAssembler, page: u64) -> Result<(), IcedError> {
    a.mov(qword_ptr((0x4000 + (page >> 12) * 8) as i32), 0)?;
    a.mov(eax, page as u32)?;
    a.invlpg(ptr(rax))
}

fn lazy_page(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let page = LAZY + random.below(16) * 0x1000;
    unmap(a, page)?;
    let at = (page + random.below(0xff0)) as i32;
    match random.below(4) {
        0 => a.add(qword_ptr(at), rax),
        1 => a.mov(rbx, qword_ptr(at)),
        2 => a.push(qword_ptr(at)).and_then(|()| a.pop(rbx)),
        _ => a.movups(xmm1, xmmword_ptr(at)),
    }
}

fn absent_page(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    faulting(a, |a| {
        let at = 0x10_0000 + random.below(0x10_0000) as i32;
        if random.once_in(2) {
            a.mov(qword_ptr(at), rax)
        } else {
            a.xor(rax, qword_ptr(at))
        }
    })
}

fn string_over_lazy_pages(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let page = LAZY + random.below(15) * 0x1000;
    unmap(a, page)?;
    unmap(a, page + 0x1000)?;
    a.mov(edi, page as u32 + 0x1000 - random.below(24) as u32)?;
    a.mov(esi, DATA as u32 + random.below(64) as u32)?;
    a.mov(ecx, 4 + random.below(8) as u32)?;
    if random.once_in(2) {
        a.rep().movsq()
    } else {
        a.rep().stosd()
    }
}

fn device_not_available(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(rax, cr0)?;
    a.or(eax, 8)?;
    a.mov(cr0, rax)?;
    faulting(a, |a| match random.below(3) {
        0 => a.fld1(),
        1 => a.addps(xmm0, xmm1),
        _ => a.vaddps(ymm0, ymm1, ymm2),
    })?;
    a.clts()
}

fn simd_exception(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    let at = DATA as i32 + 0x100;
    a.mov(dword_ptr(at), 0x1d80)?; // division by zero unmasked
    a.ldmxcsr(dword_ptr(at))?;
    a.xorps(xmm1, xmm1)?;
    a.mov(eax, 0x3f80_0000)?;
    a.movd(xmm0, eax)?;
    faulting(a, |a| a.divss(xmm0, xmm1))?;
    a.mov(dword_ptr(at), 0x1f80)?;
    a.ldmxcsr(dword_ptr(at))
}

fn x87_exception(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let at = DATA as i32 + 0x108;
    a.fninit()?;
    a.mov(word_ptr(at), 0x37b)?; // division by zero unmasked
    a.fldcw(word_ptr(at))?;
    a.fld1()?;
    a.fldz()?;
    a.fdivp(st1, st0)?;
    for _ in 0..random.below(3) {
        a.inc(rax)?;
    }
    faulting(a, |a| a.wait())?;
    a.fninit()
}

fn double_fault(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.pushfq()?;
    a.cli()?;
    a.mov(r13, rsp)?;
    faulting(a, |a| {
        a.mov(esp, 0x11_0000)?;
        match random.below(3) {
            0 => a.ud2(),
            1 => a.push(rax),
            _ => a.int(0x80),
        }
    })?;
    a.mov(rsp, r13)?;
    a.popfq()
}

/// The last thing a program does: there are no handlers any more.
pub fn triple_fault(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let at = DATA as i32 + 0x120;
    a.cli()?;
    a.mov(qword_ptr(at), 0)?;
    a.mov(qword_ptr(at + 8), 0)?;
    a.lidt(ptr(at))?;
    a.ud2()
}

/// To CPL 3 and back by SYSCALL.
fn user_mode(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let (mut user, mut back) = (a.create_label(), a.create_label());
    for (msr, high) in [(0xc000_0081u32, KERNEL_CODE), (0xc000_0084, 0)] {
        a.mov(ecx, msr)?;
        a.mov(eax, if high == 0 { 0x700 } else { 0 })?;
        a.mov(edx, u32::from(high) | (u32::from(high) + 8) << 16)?;
        if high == 0 {
            a.xor(edx, edx)?;
        }
        a.wrmsr()?;
    }
    a.lea(rax, ptr(back))?;
    a.xor(edx, edx)?;
    a.mov(ecx, 0xc000_0082u32)?;
    a.wrmsr()?;
    a.mov(r13, rsp)?;
    a.push(i32::from(USER_DATA))?;
    a.push(r13)?;
    a.pushfq()?;
    a.or(dword_ptr(rsp), (random.word() as i32 & 0x1_0200) | 0x200)?;
    a.push(i32::from(USER_CODE))?;
    a.lea(rax, ptr(user))?;
    a.push(rax)?;
    a.iretq()?;
    a.set_label(&mut user)?;
    a.nop()?;
    match random.below(6) {
        0 => faulting(a, |a| a.ud2())?,
        1 => faulting(a, |a| a.cli())?,
        2 => faulting(a, |a| a.int(0x40))?,
        3 => a.int(0x81)?,
        4 => a.int3()?,
        _ => faulting(a, |a| a.mov(eax, dword_ptr(0xfee0_0020u64)))?,
    }
    a.nop()?;
    a.mov(r12, rsp)?;
    a.syscall()?;
    a.set_label(&mut back)?;
    a.mov(rsp, r13)
}
