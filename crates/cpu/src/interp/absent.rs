//! Extensions this processor does not have, whatever the host has: CPUID never offers them, and
//! their instructions are #UD, as on any processor without them.

use iced_x86::CpuidFeature as F;

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;

const ABSENT: &[F] = &[
    F::AESKLE,
    F::CENTAUR_AIS,
    F::CET_SS,
    F::CL1INVMB,
    F::CLZERO,
    F::CYRIX_DDI,
    F::CYRIX_DMI,
    F::CYRIX_FPU,
    F::CYRIX_SMINT,
    F::CYRIX_SMINT_0F7E,
    F::D3NOW,
    F::ENQCMD,
    F::FRED,
    F::HRESET,
    F::KL,
    F::LKGS,
    F::MCOMMIT,
    F::MOVDIR64B,
    F::MSRLIST,
    F::PADLOCK_ACE,
    F::PADLOCK_GMI,
    F::PADLOCK_PHE,
    F::PADLOCK_PMM,
    F::PADLOCK_RNG,
    F::PADLOCK_UNDOC,
    F::RAO_INT,
    F::RMPQUERY,
    F::SEV_ES,
    F::SEV_SNP,
    F::SMX,
    F::TDX,
    F::TSE,
    F::TSXLDTRK,
    F::UDBG,
    F::UINTR,
    F::WIDE_KL,
    F::WRMSRNS,
];

/// The handler, if the instruction is of one of these extensions.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    let features = insn.raw.cpuid_features();
    features
        .iter()
        .any(|f| ABSENT.contains(f))
        .then_some(undefined)
}

fn undefined(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(cpu.ud())
}
