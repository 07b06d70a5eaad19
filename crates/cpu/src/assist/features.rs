//! Which instructions run in stubs; whether the host has them is the CPUID table's to say
//! ([`crate::cpuid::executes`]).

use iced_x86::{CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic};

use super::plan::is_x87;

/// Whether every feature the instruction belongs to is one whose instructions compute and nothing
/// else.
pub fn eligible(raw: &Instruction) -> bool {
    use CpuidFeature as F;
    const COMPUTING: &[CpuidFeature] = &[
        F::ADX,
        F::AES,
        F::AVX,
        F::AVX2,
        F::AVX512BW,
        F::AVX512CD,
        F::AVX512DQ,
        F::AVX512F,
        F::AVX512VL,
        F::AVX512_BF16,
        F::AVX512_BITALG,
        F::AVX512_IFMA,
        F::AVX512_VBMI,
        F::AVX512_VBMI2,
        F::AVX512_VNNI,
        F::AVX512_VPOPCNTDQ,
        F::AVX_VNNI,
        F::BMI1,
        F::BMI2,
        F::F16C,
        F::FMA,
        F::GFNI,
        F::LZCNT,
        F::MMX,
        F::MOVBE,
        F::PCLMULQDQ,
        F::POPCNT,
        F::RDRAND,
        F::RDSEED,
        F::SHA,
        F::SSE,
        F::SSE2,
        F::SSE3,
        F::SSE4A,
        F::SSE4_1,
        F::SSE4_2,
        F::SSSE3,
        F::VAES,
        F::VPCLMULQDQ,
    ];
    const X87: &[CpuidFeature] = &[F::FPU, F::FPU287, F::FPU387, F::CMOV, F::SSE3];
    let features = raw.cpuid_features();
    let known = features.iter().all(|f| COMPUTING.contains(f))
        || is_x87(raw) && features.iter().all(|f| X87.contains(f));
    known
        && !features.is_empty()
        && raw.flow_control() == FlowControl::Next
        && !raw.is_privileged()
        && !raw.has_lock_prefix()
        && !raw.is_vsib()
        && !is_masked_store(raw.mnemonic())
        && matches!(
            raw.encoding(),
            EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX
        )
}

/// Stores of some elements only, whose addresses the others must not touch.
fn is_masked_store(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
    )
}
