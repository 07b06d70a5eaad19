//! Random instructions of any code with random register states, for comparisons with the host.

use std::ops::Range;

use anykvm_cpu::state::{XsaveArea, rflags};
use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register, RoundingControl,
};

use super::{Random, Registers};

/// A random instruction of this code with its memory operand at [RSI]; `None` if the code has
/// operands that assist does not serve.
pub fn instance(code: Code, bits: u32, r: &mut Random) -> Option<Instruction> {
    // Not RSP, which is the host's own in the reference, nor RSI, the base; RDI is an ordinary one.
    const GPRS: [u32; 14] = [0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut insn = Instruction::default();
    insn.set_code(code);
    let evex = code.op_code().encoding() == EncodingKind::EVEX;
    let vectors = if evex && bits == 64 { 32 } else { 16 };
    for (i, kind) in code.op_code().op_kinds().iter().enumerate() {
        let i = i as u32;
        let in_memory = r.below(2) == 0;
        let (gpr, vector) = if bits == 64 {
            (r.pick(&GPRS), r.below(vectors) as u32)
        } else {
            (r.pick(&GPRS[..6]), r.below(8) as u32)
        };
        let register = match kind {
            K::mem => None,
            K::mem_vsib32x
            | K::mem_vsib64x
            | K::mem_vsib32y
            | K::mem_vsib64y
            | K::mem_vsib32z
            | K::mem_vsib64z => {
                let base = match kind {
                    K::mem_vsib32x | K::mem_vsib64x => Register::XMM0,
                    K::mem_vsib32y | K::mem_vsib64y => Register::YMM0,
                    _ => Register::ZMM0,
                };
                insn.set_memory_index(base + vector);
                insn.set_memory_index_scale(1 << r.below(4));
                None
            }
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
                if in_memory =>
            {
                None
            }
            K::r8_or_mem | K::r8_reg => {
                let more = if bits == 64 {
                    Register::DIL
                } else {
                    Register::CH
                };
                Some(r.pick(&[Register::AL, Register::BL, more]))
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_reg_mem => Some(Register::AX + gpr),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_vvvv => Some(Register::EAX + gpr),
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_vvvv => Some(Register::RAX + gpr),
            K::mm_or_mem | K::mm_reg | K::mm_rm => Some(Register::MM0 + vector % 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                Some(Register::XMM0 + vector)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                Some(Register::YMM0 + vector)
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => Some(Register::ZMM0 + vector),
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => Some(Register::K0 + vector % 8),
            K::st0 => Some(Register::ST0),
            K::sti_opcode => Some(Register::ST0 + r.below(8) as u32),
            K::imm8 if i > 0 && insn.op_kind(i - 1) == OpKind::Immediate8 => {
                insn.set_op_kind(i, OpKind::Immediate8_2nd);
                insn.set_immediate8_2nd(r.next() as u8);
                continue;
            }
            K::imm8 => {
                insn.set_op_kind(i, OpKind::Immediate8);
                insn.set_immediate8(r.next() as u8);
                continue;
            }
            _ => return None,
        };
        match register {
            Some(register) => insn.set_op_register(i, register),
            None => {
                insn.set_op_kind(i, OpKind::Memory);
                let base = if bits == 64 {
                    Register::RSI
                } else {
                    Register::ESI
                };
                insn.set_memory_base(base);
                insn.set_memory_displacement64(64);
                insn.set_memory_displ_size(1);
            }
        }
    }
    decorate(&mut insn, r);
    Some(insn)
}

/// Adds what only EVEX has: write mask, broadcast, rounding control.
fn decorate(insn: &mut Instruction, r: &mut Random) {
    let op = insn.op_code();
    let memory = insn.op_kinds().any(|k| k == OpKind::Memory);
    let required = op.require_op_mask_register();
    if op.can_use_op_mask_register() && (required || r.below(3) != 0) {
        insn.set_op_mask(Register::K1 + r.below(7) as u32);
        let register = insn.op0_kind() == OpKind::Register;
        let zeroing = op.can_use_zeroing_masking() && register && r.below(2) == 0;
        insn.set_zeroing_masking(zeroing);
    }
    if memory {
        insn.set_is_broadcast(op.can_broadcast() && r.below(2) == 0);
    } else if op.can_use_rounding_control() && r.below(2) == 0 {
        let modes = [
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ];
        insn.set_rounding_control(r.pick(&modes));
    } else if op.can_suppress_all_exceptions() && r.below(2) == 0 {
        insn.set_suppress_all_exceptions(true);
    }
}

/// Whether the instruction raises no SIMD floating-point exception whatever MXCSR says.
pub fn is_quiet(insn: &Instruction) -> bool {
    insn.suppress_all_exceptions() || insn.rounding_control() != RoundingControl::None
}

/// Codes that assist serves and whose result is a function of their operands.
pub fn served(code: Code) -> bool {
    use CpuidFeature as F;
    let op = code.op_code();
    let features = code.cpuid_features();
    let mine = [
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
        F::FPU,
        F::FPU287,
        F::FPU387,
        F::CMOV,
    ];
    let special = matches!(
        code.mnemonic(),
        Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Maskmovq
            | Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Wait
            | Mnemonic::Finit
            | Mnemonic::Fclex
            | Mnemonic::Fstcw
            | Mnemonic::Fstenv
            | Mnemonic::Fsave
            | Mnemonic::Fstsw
            | Mnemonic::Sfence
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Pause
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
    );
    op.mode64()
        && matches!(
            op.encoding(),
            EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX
        )
        && features.iter().all(|f| mine.contains(f))
        && !special
        && !format!("{code:?}").starts_with("Cmov")
        && host_has(features)
}

fn host_has(features: &[CpuidFeature]) -> bool {
    use CpuidFeature as F;
    use std::is_x86_feature_detected as has;
    features.iter().all(|f| match f {
        F::SSE4A => has!("sse4a"),
        F::SHA => has!("sha"),
        F::GFNI => has!("gfni"),
        F::VAES => has!("vaes"),
        F::VPCLMULQDQ => has!("vpclmulqdq"),
        F::AVX | F::AVX2 => has!("avx2"),
        F::AVX512BW | F::AVX512F => has!("avx512bw"),
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
        F::BMI1 | F::BMI2 => has!("bmi2"),
        F::FMA => has!("fma"),
        F::F16C => has!("f16c"),
        F::ADX => has!("adx"),
        _ => true,
    })
}

fn is_x87(code: Code) -> bool {
    use CpuidFeature as F;
    code.cpuid_features()
        .iter()
        .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

pub fn random_state(code: Code, quiet: bool, r: &mut Random) -> (Registers, [u8; 256]) {
    let mut s = Registers::new();
    for g in &mut s.gprs {
        *g = if r.below(2) == 0 {
            r.next()
        } else {
            r.below(40)
        };
    }
    s.flags = 0x202 | r.next() & rflags::STATUS;
    let x = &mut s.xsave;
    for at in (160..416).chain(576..832).chain(VECTORS_512).step_by(8) {
        let v = r.number();
        x[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
    for at in OPMASKS.step_by(8) {
        let v = match r.below(4) {
            0 => 0,
            1 => u64::MAX,
            _ => r.next(),
        };
        x[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
    for st in 0..8 {
        x[32 + st * 16..][..10].copy_from_slice(&r.extended());
    }
    // All exceptions masked for SIMD, unless the instruction suppresses them; x87 runs with any mask.
    let masks = if quiet {
        r.next() as u32 & 0x1f80
    } else {
        0x1f80
    };
    let mxcsr = masks | r.next() as u32 & 0xe07f;
    x[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    let masks = if r.below(2) == 0 {
        0x3f
    } else {
        r.below(64) as u16
    };
    let fcw = 0x40 | masks | r.next() as u16 & 0xf00;
    // Flags that are set must be masked, or the next instruction is #MF.
    let fsw = r.next() as u16 & 0x7f00 & !0x80 | r.next() as u16 & masks;
    x[0..2].copy_from_slice(&fcw.to_le_bytes());
    x[2..4].copy_from_slice(&fsw.to_le_bytes());
    x[4] = if r.below(2) == 0 {
        0xff
    } else {
        r.next() as u8
    };
    let mut memory = [0; 256];
    for m in memory.chunks_exact_mut(8) {
        m.copy_from_slice(&r.number().to_le_bytes());
    }
    if is_x87(code) {
        memory[64..74].copy_from_slice(&r.extended());
    }
    (s, memory)
}

pub const OPMASKS: Range<usize> = XsaveArea::OPMASK..XsaveArea::OPMASK + 64;
/// ZMM_Hi256 and Hi16_ZMM.
pub const VECTORS_512: Range<usize> = XsaveArea::ZMM_HI..XsaveArea::PKRU;

pub fn encode(insn: &Instruction, bits: u32) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(insn, 0).ok()?;
    Some(encoder.take_buffer())
}
