//! Small programs, interpreted and translated: both must end in the same state.

mod support;

use iced_x86::code_asm::*;
use support::{DATA, same};

#[test]
fn arithmetic_in_a_loop() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut top)?;
        a.add(rax, rbx)?;
        a.xor(rdx, rax)?;
        a.shl(rdx, 3)?;
        a.lea(rsi, rax + rcx * 4 + 5)?;
        a.imul_2(r10, rsi)?;
        a.adc(r11, r10)?;
        a.mov(r15, r11)?;
        a.sub(r15d, r9d)?;
        a.shr(r11, cl)?;
        a.dec(ecx)?;
        a.jne(top)
    });
}

#[test]
fn loads_and_stores() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(ecx, 200)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rbx + rcx * 8 + 8))?;
        a.add(rax, r10)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.shl(r8, 3)?;
        a.add(dword_ptr(rbx + 24), 3)?;
        a.movzx(r10d, byte_ptr(rbx + 40))?;
        a.cmp(rcx, qword_ptr(rbx + 48))?;
        a.mov(r11, qword_ptr(rbx + 56))?;
        a.setb(r15b)?;
        a.inc(qword_ptr(rbx + 64))?;
        a.lock().xadd(qword_ptr(rbx + 72), r15)?;
        a.mov(byte_ptr(rbx + rcx), ah)?;
        a.xchg(qword_ptr(rbx + 80), r11)?;
        a.sub(ecx, 1)?;
        a.jne(top)
    });
}

#[test]
fn calls_and_returns() {
    same(|a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut end = a.create_label();
        a.mov(r12d, 500)?;
        a.set_label(&mut top)?;
        a.call(f)?;
        a.lea(rax, ptr(f))?;
        a.call(rax)?;
        a.sub(r12d, 1)?;
        a.jne(top)?;
        a.jmp(end)?;
        a.set_label(&mut f)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.push(r10)?;
        a.add(r11, r12)?;
        a.push(0x1234)?;
        a.pop(r10)?;
        a.test(r11b, 1)?;
        a.leave()?;
        a.ret()?;
        a.set_label(&mut end)
    });
}

#[test]
fn divisions() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(r12d, 300)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rbx + r12 * 8))?;
        a.xor(edx, edx)?;
        a.or(r10, 1)?;
        a.div(r10)?;
        a.add(r10, rax)?;
        a.mov(eax, r10d)?;
        a.cdq()?;
        a.lea(rsi, r12 + 2)?;
        a.idiv(esi)?;
        a.add(r11, rdx)?;
        a.mov(rax, r11)?;
        a.cqo()?;
        a.mov(qword_ptr(rbx + r12 * 8), rsi)?;
        a.idiv(qword_ptr(rbx + r12 * 8))?;
        a.xor(r15, rax)?;
        a.sub(r12d, 1)?;
        a.jne(top)
    });
}

#[test]
fn vectors() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(r12d, 100)?;
        a.set_label(&mut top)?;
        a.movups(xmm0, xmmword_ptr(rbx + r12 * 8))?;
        a.cvtsi2sd(xmm1, r12)?;
        a.sqrtsd(xmm2, xmm1)?;
        a.divsd(xmm1, xmm2)?;
        a.pxor(xmm3, xmm0)?;
        a.paddq(xmm3, xmmword_ptr(rbx + 32))?;
        a.movdqu(xmmword_ptr(rbx + r12 * 8 + 3), xmm3)?;
        a.addsd(xmm4, xmm1)?;
        a.cvttsd2si(r10, xmm4)?;
        a.ucomisd(xmm4, xmm2)?;
        a.setb(al)?;
        a.movq(r11, xmm3)?;
        a.crc32(r10, r11)?;
        a.sub(r12d, 1)?;
        a.jne(top)?;
        a.movupd(xmmword_ptr(rbx), xmm4)
    });
}

#[test]
fn copies_of_every_length() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.mov(r12d, 400)?;
        a.set_label(&mut top)?;
        a.lea(rsi, rbx + r12 * 4)?;
        a.lea(rdi, rbx + r12 * 2 + 0x800)?;
        a.mov(edx, 24)?;
        a.movups(xmm0, xmmword_ptr(rsi))?;
        a.movups(xmm1, xmmword_ptr(rsi + rdx - 16))?;
        a.movups(xmmword_ptr(rdi), xmm0)?;
        a.movups(xmmword_ptr(rdi + rdx - 16), xmm1)?;
        a.vmovdqu(ymm2, ymmword_ptr(rsi + 5))?;
        a.vmovdqu(ymm9, ymmword_ptr(rsi + 37))?;
        a.vmovdqu(ymmword_ptr(rdi + 64), ymm2)?;
        a.vpcmpeqb(ymm3, ymm2, ymmword_ptr(rdi + 64))?;
        a.vpmovmskb(eax, ymm3)?;
        a.tzcnt(r10d, eax)?;
        a.vpxor(xmm4, xmm4, xmm4)?;
        a.vpcmpeqb(ymm5, ymm4, ymmword_ptr(rdi))?;
        a.vpor(ymm6, ymm5, ymm3)?;
        a.vpmovmskb(ecx, ymm6)?;
        a.vpbroadcastb(ymm8, xmm2)?;
        a.vmovd(xmm7, r12d)?;
        a.movdqa(xmm10, xmm7)?;
        a.pcmpeqb(xmm10, xmm0)?;
        a.pmovmskb(r11d, xmm10)?;
        a.sub(r12d, 1)?;
        a.jne(top)?;
        a.vzeroupper()
    });
}

/// CH is the second byte of a register that is elsewhere in translated code.
#[test]
fn the_second_byte_of_rcx() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(r8d, 50)?;
        a.set_label(&mut top)?;
        a.add(ch, dh)?;
        a.adc(rax, qword_ptr(DATA as i32))?;
        a.and(ch, 0x72)?;
        a.mov(qword_ptr(DATA as i32 + 8), rcx)?;
        a.setp(bl)?;
        a.movzx(edx, ch)?;
        a.xchg(ch, bh)?;
        a.shl(ch, 3)?;
        a.xor(rsi, qword_ptr(DATA as i32 + 16))?;
        a.rcr(ch, 1)?;
        a.mov(ah, ch)?;
        a.neg(ch)?;
        a.sbb(rdi, rcx)?;
        a.shr(ch, cl)?;
        a.setc(ch)?;
        a.cmp(ch, al)?;
        a.cmovb(rbx, rsi)?;
        a.mov(ch, 0x5a)?;
        a.add(byte_ptr(DATA as i32 + 24), ch)?;
        a.rol(rcx, 9)?;
        a.xor(rcx, rdi)?;
        a.dec(r8d)?;
        a.jne(top)
    });
}
