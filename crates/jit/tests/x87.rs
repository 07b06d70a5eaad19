//! x87 and MMX, interpreted and translated: both must end in the same state, pointers and tags included.

mod support;

use anykvm_cpu::state::seg;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::harness::Computer;
use support::{ALWAYS, CODE, DATA, assemble, assemble_bits, compare, computer, finish, translate};

fn with_x87(mut c: Computer) -> Computer {
    c.cpu.state.xsave.reset();
    // Numbers of every kind: 64-bit ones, and 80-bit ones at 0x200.
    for (n, v) in [
        1.5f64,
        -0.0,
        3e200,
        f64::INFINITY,
        f64::NAN,
        1e-310,
        -7.25,
        0.1,
    ]
    .into_iter()
    .enumerate()
    {
        c.put64(DATA + n as u64 * 8, v.to_bits());
    }
    c.cpu.state_changed();
    c
}

fn compatibility(code: &[u8]) -> Computer {
    let mut c = with_x87(computer(code));
    c.cpu.state.seg[usize::from(seg::CS)].selector = 0x23;
    c.cpu.state.seg[usize::from(seg::DS)].selector = 0x2b;
    c.cpu.state.seg[usize::from(seg::SS)].selector = 0x33;
    support::enter_compatibility(c)
}

/// Runs a program in both ways; returns how many instructions a stub of the interpreter's carried out in the
/// second.
fn both(computer: impl Fn() -> Computer) -> u64 {
    let mut one = computer();
    finish(&mut one);
    let mut two = computer();
    translate(&mut two, ALWAYS);
    finish(&mut two);
    compare(&one, &two);
    two.cpu.counters.assisted
}

fn same(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble(&build);
    // At most those whose first access misses the TLB.
    assert!(both(|| with_x87(computer(&code))) < 10);
}

fn same32(build: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let code = assemble_bits(32, CODE, &build);
    assert!(both(|| compatibility(&code)) < 10);
}

fn arithmetic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ebx, DATA as u32)?;
    a.mov(ecx, 200)?;
    a.fldz()?;
    a.set_label(&mut top)?;
    a.fld1()?;
    a.fadd(dword_ptr(DATA as u32))?;
    a.fmul_2(st0, st1)?;
    a.fdivr(dword_ptr(DATA as u32 + 8))?;
    a.faddp(st1, st0)?;
    a.fild(word_ptr(DATA as u32 + 66))?;
    a.fxch(st0, st1)?;
    a.fsub_2(st0, st1)?;
    a.fst(dword_ptr(DATA as u32 + 0x100))?;
    a.fcomi(st0, st1)?;
    a.setb(dl)?;
    a.fcmovb(st0, st1)?;
    a.fsqrt()?;
    a.fstp(st1)?;
    a.fnstsw(ax)?;
    a.add(ebp, eax)?;
    a.sub(ecx, 1)?;
    a.jne(top)
}

#[test]
fn arithmetic_in_64_bit_code() {
    same(arithmetic);
}

#[test]
fn arithmetic_in_32_bit_code() {
    same32(arithmetic);
}

#[test]
fn every_format() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(r10d, 8)?;
        a.set_label(&mut top)?;
        a.fld(qword_ptr(rbx + r10 * 8 - 8))?;
        a.fld(tbyte_ptr(rbx + r10 * 8 + 0x200))?;
        a.fild(dword_ptr(rbx + 0x40))?;
        a.fild(qword_ptr(rbx + 0x48))?;
        a.fstp(tbyte_ptr(rbx + r10 * 8 + 0x300))?;
        a.fistp(word_ptr(rbx + 0x400))?;
        a.fist(dword_ptr(rbx + 0x404))?;
        a.fxam()?;
        a.fnstsw(word_ptr(rbx + 0x410))?;
        a.fisttp(qword_ptr(rbx + 0x408))?;
        a.fstp(qword_ptr(rbx + r10 * 8 + 0x500))?;
        a.fnstcw(word_ptr(rbx + 0x418))?;
        a.sub(r10d, 1)?;
        a.jne(top)
    });
}

/// The stack overflows and underflows: the indefinite value, and C1.
#[test]
fn the_stack_has_ends() {
    same(|a| {
        for _ in 0..9 {
            a.fld1()?;
        }
        a.fnstsw(ax)?;
        for _ in 0..10 {
            a.fstp(st0)?;
        }
        a.fnstsw(word_ptr(DATA as u32))
    });
}

#[test]
fn mmx() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, 100)?;
        a.fld1()?;
        a.set_label(&mut top)?;
        a.movq(mm0, qword_ptr(rbx + rcx * 8))?;
        a.movd(mm1, ecx)?;
        a.paddb(mm1, mm0)?;
        a.pxor(mm2, mm1)?;
        a.psllq(mm2, 3)?;
        a.movq(qword_ptr(rbx + 0x400), mm2)?;
        a.movq2dq(xmm1, mm2)?;
        a.paddq(xmm2, xmm1)?;
        a.cvtpi2ps(xmm3, mm1)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.emms()?;
        a.fld1()
    });
}

/// Beside vector registers that are in use, and with a control word that changes.
#[test]
fn beside_vectors() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.vmovdqu(ymm5, ymmword_ptr(rbx + rcx))?;
        a.vpaddq(ymm6, ymm6, ymm5)?;
        a.fild(dword_ptr(rbx + rcx))?;
        a.paddd(xmm5, xmm6)?;
        a.mov(word_ptr(rbx + 0x800), 0xf7f)?;
        a.fldcw(word_ptr(rbx + 0x800))?;
        a.fmul(dword_ptr(rbx + 0x48))?;
        a.fistp(dword_ptr(rbx + rcx * 4))?;
        a.mov(word_ptr(rbx + 0x800), 0x37f)?;
        a.fldcw(word_ptr(rbx + 0x800))?;
        a.vpxor(ymm7, ymm6, ymm5)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

/// An unmasked exception: what is pending is #MF at the next instruction, which is the interpreter's.
#[test]
fn unmasked_exceptions() {
    let code = assemble(|a| {
        a.mov(ebx, DATA as u32)?;
        a.mov(word_ptr(rbx), 0x37b)?;
        a.fldcw(word_ptr(rbx))?;
        a.fld1()?;
        a.fldz()?;
        a.fdiv_2(st1, st0)?;
        a.nop()?;
        a.fld1()
    });
    both(|| {
        let mut c = with_x87(computer(&code));
        c.catch_events();
        c
    });
}
