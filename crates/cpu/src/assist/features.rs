//! Which instructions run in stubs, and which of them the host has.

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic};

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

/// Whether the host has what an instruction needs.
pub fn host_has(code: Code) -> bool {
    use CpuidFeature as F;
    use std::is_x86_feature_detected as has;
    code.cpuid_features().iter().all(|f| match f {
        F::SSE3 => has!("sse3"),
        F::SSSE3 => has!("ssse3"),
        F::SSE4_1 => has!("sse4.1"),
        F::SSE4_2 => has!("sse4.2"),
        F::SSE4A => has!("sse4a"),
        F::AES => has!("aes"),
        F::PCLMULQDQ => has!("pclmulqdq"),
        F::SHA => has!("sha"),
        F::GFNI => has!("gfni"),
        F::VAES => has!("vaes"),
        F::VPCLMULQDQ => has!("vpclmulqdq"),
        F::AVX => has!("avx"),
        F::AVX2 => has!("avx2"),
        // Stubs load and store opmask registers of 64 bits.
        F::AVX512F => has!("avx512f") && has!("avx512bw"),
        F::AVX512BW => has!("avx512bw"),
        F::AVX512CD => has!("avx512cd"),
        F::AVX512DQ => has!("avx512dq"),
        F::AVX512VL => has!("avx512vl"),
        F::AVX512_BF16 => has!("avx512bf16"),
        F::AVX512_BITALG => has!("avx512bitalg"),
        F::AVX512_IFMA => has!("avx512ifma"),
        F::AVX512_VBMI => has!("avx512vbmi"),
        F::AVX512_VBMI2 => has!("avx512vbmi2"),
        F::AVX512_VNNI => has!("avx512vnni"),
        F::AVX512_VPOPCNTDQ => has!("avx512vpopcntdq"),
        F::AVX_VNNI => has!("avxvnni"),
        F::F16C => has!("f16c"),
        F::FMA => has!("fma"),
        F::BMI1 => has!("bmi1"),
        F::BMI2 => has!("bmi2"),
        F::ADX => has!("adx"),
        F::LZCNT => has!("lzcnt"),
        F::POPCNT => has!("popcnt"),
        F::MOVBE => has!("movbe"),
        F::RDRAND => has!("rdrand"),
        F::RDSEED => has!("rdseed"),
        _ => true,
    })
}
