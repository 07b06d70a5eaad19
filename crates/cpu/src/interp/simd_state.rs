//! Instructions on the SIMD state as a whole: MXCSR, and clearing vector registers.

use iced_x86::{Code, EncodingKind, Mnemonic};

use super::simd::{MXCSR_MASK, xcr0};
use crate::assist::Class;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;
use crate::state::XsaveArea;

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match insn.raw.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => ldmxcsr,
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => stmxcsr,
        Mnemonic::Vzeroupper => vzeroupper,
        Mnemonic::Vzeroall if insn.raw.code() == Code::VEX_Vzeroall => vzeroall,
        _ => return None,
    })
}

/// The rules of a legacy or VEX encoded instruction on vector registers.
pub(crate) fn vector_class(insn: &Insn) -> Class {
    if insn.raw.encoding() == EncodingKind::Legacy {
        Class::Sse
    } else {
        Class::Avx
    }
}

fn ldmxcsr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(vector_class(insn))?;
    let v = cpu.read::<u32>(insn)?;
    if v & !MXCSR_MASK != 0 {
        return Err(cpu.gp0());
    }
    cpu.state.xsave.set_u32(XsaveArea::MXCSR, v);
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_class(vector_class(insn))?;
    cpu.write(insn, cpu.state.xsave.u32(XsaveArea::MXCSR))
}

/// Clears a component of sixteen registers, or outside 64-bit mode the eight that are there.
fn clear(cpu: &mut Cpu, at: usize, size: usize) {
    let reach = if cpu.mode().code64() { size } else { size / 2 };
    cpu.state.xsave.0[at..at + reach].fill(0);
}

fn vzeroupper(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.check_class(Class::Avx)?;
    clear(cpu, XsaveArea::YMM_HI, 256);
    if cpu.state.xcr0 & xcr0::ZMM_HI256 != 0 {
        clear(cpu, XsaveArea::ZMM_HI, 512);
    }
    Ok(())
}

fn vzeroall(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    vzeroupper(cpu, insn)?;
    clear(cpu, XsaveArea::XMM, 256);
    Ok(())
}
