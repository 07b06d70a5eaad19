//! DIV and IDIV of 32 and 64 bits. A quotient that does not fit would be the host's #DE, so the
//! operands are looked at first, and what is not certainly good is left to the interpreter.

use anykvm_cpu::Insn;
use iced_x86::{Code, IcedError, Instruction, Mnemonic, OpKind, Register};

use crate::asm::{at, slot};
use crate::flags::Flags;
use crate::memory::{Address, Use};
use crate::regs::{Home, POINTER, SCRATCH, home};
use crate::translate::{Block, Done, Site};

pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    let wide = match raw.code() {
        Code::Div_rm64 | Code::Idiv_rm64 => true,
        Code::Div_rm32 | Code::Idiv_rm32 => false,
        _ => return Ok(Done::Unsupported),
    };
    let address = match raw.op0_kind() {
        OpKind::Register => None,
        _ => match Address::of(insn, site.next).filter(Address::is_plain) {
            Some(a) => Some(a),
            None => return Ok(Done::Unsupported),
        },
    };
    b.flags.release(&mut b.a)?;
    let before = b.flags.clone();
    let mut load = None;
    if let Some(address) = &address {
        let size = if wide { 8 } else { 4 };
        let checked = b.check(address, size, Use::Read, site)?;
        let from = b.operand(&checked, true)?;
        b.access(&checked);
        load = Some(checked.exit);
        let (code, to) = if wide {
            (Code::Mov_r64_rm64, SCRATCH)
        } else {
            (Code::Mov_r32_rm32, Register::R15D)
        };
        b.a.emit(code, to, from)?;
    } else {
        match home(raw.op0_register().full_register().number()) {
            Home::Host(r) => b.a.mov(SCRATCH, r)?,
            Home::Spilled(s) => b.a.load(SCRATCH, slot(s))?,
        }
    }
    let signed = raw.mnemonic() == Mnemonic::Idiv;
    let mut holes = Vec::new();
    if signed {
        check_signed(b, wide, &mut holes)?;
    } else {
        check_unsigned(b, wide, &mut holes)?;
    }
    let exit = b.leave_from(&holes, site);
    // A recipe would need the register that holds the divisor.
    match before {
        Flags::Kept => b.flags.restore(&mut b.a)?,
        _ => restore_around_divisor(b)?,
    }
    let (code, divisor) = match (signed, wide) {
        (false, true) => (Code::Div_rm64, SCRATCH),
        (false, false) => (Code::Div_rm32, Register::R15D),
        (true, true) => (Code::Idiv_rm64, SCRATCH),
        (true, false) => (Code::Idiv_rm32, Register::R15D),
    };
    b.a.put(&Instruction::with1(code, divisor)?)?;
    b.flags = Flags::Host(None);
    for exit in load.into_iter().chain([exit]) {
        b.resume_here(exit);
    }
    Ok(Done::Next)
}

fn restore_around_divisor(b: &mut Block) -> Result<(), IcedError> {
    b.a.mov(POINTER, SCRATCH)?;
    b.flags.restore(&mut b.a)?;
    b.a.mov(SCRATCH, POINTER)
}

/// The quotient fits if the upper half is less than the divisor, which then is not 0.
fn check_unsigned(
    b: &mut Block,
    wide: bool,
    holes: &mut Vec<crate::asm::Hole>,
) -> Result<(), IcedError> {
    let (code, upper, divisor) = if wide {
        (Code::Cmp_r64_rm64, Register::RDX, SCRATCH)
    } else {
        (Code::Cmp_r32_rm32, Register::EDX, Register::R15D)
    };
    b.a.emit(code, upper, divisor)?;
    holes.push(b.a.jcc(3));
    Ok(())
}

/// The quotient fits if the dividend is a sign-extended half and the divisor is neither 0 nor -1.
fn check_signed(
    b: &mut Block,
    wide: bool,
    holes: &mut Vec<crate::asm::Hole>,
) -> Result<(), IcedError> {
    if wide {
        b.a.mov(POINTER, Register::RAX)?;
        b.a.emit(Code::Sar_rm64_imm8, POINTER, 63)?;
        b.a.emit(Code::Cmp_r64_rm64, POINTER, Register::RDX)?;
    } else {
        b.a.emit(Code::Mov_r32_rm32, Register::ECX, Register::EAX)?;
        b.a.emit(Code::Sar_rm32_imm8, Register::ECX, 31)?;
        b.a.emit(Code::Cmp_r32_rm32, Register::ECX, Register::EDX)?;
    }
    holes.push(b.a.jne());
    if wide {
        b.a.lea(POINTER, at(SCRATCH, 1))?;
        b.a.emit(Code::Cmp_rm64_imm8, POINTER, 1)?;
    } else {
        b.a.emit(Code::Lea_r32_m, Register::ECX, at(SCRATCH, 1))?;
        b.a.emit(Code::Cmp_rm32_imm8, Register::ECX, 1)?;
    }
    // Below or equal.
    holes.push(b.a.jcc(6));
    Ok(())
}
