//! x87, SSE, AVX, AVX-512 and the XSAVE family.

use super::Pieces;
use crate::programs::long::DATA;
use anykvm_differential::random::Random;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Vector and floating-point state.
pub const VECTORS: Pieces = (
    &[
        sse,
        avx,
        avx512,
        x87,
        x87,
        save,
        save,
        restore,
        initial,
        control,
        extended_control,
        in_use,
    ],
    4,
);

/// Where areas are, 64-byte aligned.
const AREA: u32 = DATA as u32 + 0x4000;

fn sse(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.movq(xmm0, rax)?;
    match random.below(5) {
        0 => a.pmuludq(xmm1, xmm0),
        1 => a.cvtsi2sd(xmm2, rbx),
        2 => a.addsd(xmm3, xmm2),
        3 => a.pshufd(xmm8, xmm0, 0x4e),
        _ => a.movups(xmmword_ptr(DATA as i32 + 0x800), xmm3),
    }
}

fn avx(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.vmovq(xmm4, rcx)?;
    match random.below(5) {
        0 => a.vpbroadcastq(ymm5, xmm4),
        1 => a.vpaddq(ymm6, ymm5, ymm6),
        2 => a.vzeroupper(),
        3 => a.vperm2i128(ymm9, ymm5, ymm6, 1),
        _ => a.vmovdqu(ymmword_ptr(DATA as i32 + 0x820), ymm6),
    }
}

fn avx512(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    if !std::is_x86_feature_detected!("avx512f") {
        return avx(a, random);
    }
    match random.below(5) {
        0 => a.vpbroadcastq(zmm17, rax),
        1 => a.vpaddq(zmm18, zmm17, zmm18),
        2 => a.kmovw(k3, ebx),
        3 => a.vpaddd(zmm1.k3().z(), zmm17, zmm18),
        _ => a.vmovdqu64(zmmword_ptr(DATA as i32 + 0x840), zmm18),
    }
}

fn x87(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    match random.below(8) {
        0 => a.fldpi(),
        1 => a.fld1(),
        2 => a.fsqrt(),
        3 => a.fadd_2(st0, st1),
        4 => a.fstp(qword_ptr(DATA as i32 + 0x880)),
        5 => a.fild(dword_ptr(DATA as i32 + 0x888)),
        6 => a.fnstenv(ptr(DATA as i32 + 0x890)),
        _ => a.ffree(st2),
    }
}

fn mask(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.mov(eax, random.word() as u32 & 0xe7)?;
    a.xor(edx, edx)?;
    a.mov(ebx, AREA + random.below(2) as u32 * 0x1000)
}

fn save(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    mask(a, random)?;
    match random.below(4) {
        0 => a.xsave(ptr(rbx)),
        1 => a.xsaveopt64(ptr(rbx)),
        2 => a.fxsave64(ptr(rbx + 0x2000)),
        // Not in the areas that are restored in the standard form.
        _ => a.xsavec64(ptr(rbx + 0x4000)),
    }
}

fn restore(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    mask(a, random)?;
    if random.once_in(2) {
        // Components that the area does not have become initial.
        a.and(dword_ptr(rbx + 0x200), random.word() as i32 & 0xe7)?;
    }
    a.xrstor64(ptr(rbx))
}

fn initial(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    match random.below(3) {
        0 => a.fninit(),
        1 => a.vzeroall(),
        _ => a.emms(),
    }
}

fn control(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let at = DATA as i32 + 0x8f0;
    if random.once_in(2) {
        a.mov(dword_ptr(at), 0x1f80 + random.below(4) as u32 * 0x2000)?;
        a.ldmxcsr(dword_ptr(at))
    } else {
        a.mov(word_ptr(at), 0x37f)?;
        a.fldcw(word_ptr(at))
    }
}

/// XCR0 without AVX-512, without AVX, and with all again.
fn extended_control(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    a.xor(ecx, ecx)?;
    a.xgetbv()?;
    a.mov(ebx, eax)?;
    a.mov(eax, random.pick(&[1u32, 3, 7]))?;
    a.xsetbv()?;
    a.inc(rdi)?;
    a.mov(eax, ebx)?;
    a.xor(edx, edx)?;
    a.xsetbv()
}

/// XGETBV with ECX = 1: what is not in its initial state.
fn in_use(a: &mut CodeAssembler, _: &mut Random) -> Result<(), IcedError> {
    a.mov(ecx, 1)?;
    a.xgetbv()?;
    a.imul_3(rdi, rdi, 77)?;
    a.add(rdi, rax)?;
    a.mov(qword_ptr(DATA as i32 + 0x8f8), rdi)
}
