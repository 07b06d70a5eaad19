//! MOVS and STOS, interpreted and translated: both must end in the same state.

mod support;

use anykvm_cpu::state::reg;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{
    ALWAYS, CODE, DATA, assemble, assemble_bits, compatibility, computer, finish, same, translate,
};

#[test]
fn repeated() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(ebx, 60)?;
        a.set_label(&mut top)?;
        // Over the end of a page, of either operand and of both.
        a.mov(esi, DATA as u32 + 0xf00)?;
        a.lea(rdi, ptr(rsi + rbx * 4 + 0x80))?;
        a.mov(ecx, 0x183)?;
        a.cmp(rbx, 30)?;
        a.rep().movsb()?;
        a.adc(r8, rsi)?;
        a.mov(esi, DATA as u32 + 0x800)?;
        a.mov(edi, DATA as u32 + 0x1000)?;
        a.mov(ecx, 0xf0)?;
        a.rep().movsq()?;
        a.mov(edi, DATA as u32 + 0xffe)?;
        a.lea(rcx, ptr(rbx + 3))?;
        a.rep().stosd()?;
        a.xor(ecx, ecx)?;
        a.rep().stosw()?;
        a.add(r9, rdi)?;
        // Into its own source.
        a.mov(esi, DATA as u32 + 0x100)?;
        a.lea(rdi, ptr(rsi + 3))?;
        a.mov(cl, 77)?;
        a.rep().movsb()?;
        a.sub(ebx, 1)?;
        a.jne(top)
    });
}

#[test]
fn alone() {
    same(|a| {
        let mut top = a.create_label();
        a.mov(esi, DATA as u32 + 3)?;
        a.mov(edi, DATA as u32 + 0xf81)?;
        a.mov(ebx, 100)?;
        a.set_label(&mut top)?;
        a.cmp(rbx, 50)?;
        a.movsb()?;
        a.movsd()?;
        a.adc(rax, rdi)?;
        a.stosq()?;
        a.stosw()?;
        a.movsq()?;
        a.sub(ebx, 1)?;
        a.jne(top)
    });
}

#[test]
fn backwards() {
    same(|a| {
        a.mov(esi, DATA as u32 + 0x1003)?;
        a.mov(edi, DATA as u32 + 0x1802)?;
        a.mov(ecx, 0x50)?;
        a.std()?;
        a.rep().movsw()?;
        a.stosb()?;
        a.cld()?;
        a.movsb()
    });
}

#[test]
fn in_32_bit_code() {
    let build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        let mut top = a.create_label();
        a.mov(ebx, 60)?;
        a.set_label(&mut top)?;
        a.mov(esi, DATA as u32 + 0xf00)?;
        a.lea(edi, ptr(esi + ebx * 4 + 0x80))?;
        a.mov(ecx, 0x183)?;
        a.cmp(ebx, 30)?;
        a.rep().movsb()?;
        a.adc(edx, esi)?;
        a.movsd()?;
        a.stosb()?;
        a.mov(ecx, 0x100)?;
        a.rep().stosd()?;
        a.sub(ebx, 1)?;
        a.jne(top)
    };
    let code = assemble_bits(32, CODE, build);
    support::same_on(ALWAYS, || compatibility(&code));
}

/// A page that is not there, behind the first piece: #PF with the registers at its first element.
#[test]
fn a_fault_in_the_middle() {
    let code = assemble(|a| {
        a.mov(esi, DATA as u32)?;
        a.mov(edi, DATA as u32 + 0x800)?;
        a.mov(ecx, 0x1800)?;
        a.rep().movsb()
    });
    for way in 0..2 {
        let mut c = computer(&code);
        c.catch_events();
        let entry = 0x10_0000 + 0x3000 + (DATA + 0x1000) / 4096 * 8;
        c.put64(entry, 0);
        if way == 1 {
            translate(&mut c, ALWAYS);
        }
        finish(&mut c);
        let regs = &c.cpu.state.regs;
        assert_eq!(c.cpu.state.cr2, DATA + 0x1000);
        assert_eq!(regs[reg::RDI], DATA + 0x1000);
        assert_eq!(regs[reg::RSI], DATA + 0x800);
        assert_eq!(regs[reg::RCX], 0x1000);
        assert_eq!(c.frame()[1], CODE + 15);
    }
}
