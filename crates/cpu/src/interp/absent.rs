//! Instructions this processor does not have ([`crate::cpuid::executes`]): #UD, as on any processor
//! without them.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::cpuid;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;

/// The handler, if the instruction is one that there is not, or one that is undefined by definition.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let undefined_ever = matches!(
        insn.raw.mnemonic(),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2
    );
    (undefined_ever || !cpuid::executes(&insn.raw)).then_some(undefined)
}

fn undefined(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(cpu.ud())
}
