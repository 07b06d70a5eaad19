//! The guest's vector registers, which live in the host's own while translated code that uses them
//! runs.
//!
//! They are loaded when the first block that needs them is entered, and stored on the way out, so
//! integer code never pays for them. There are three levels: XMM registers (legacy SSE leaves the
//! upper parts alone, and so must not need them), YMM registers, and everything of AVX-512; a level
//! includes those below it. Code with vector instructions is only entered when the guest may use them
//! and all SIMD exceptions are masked; the rest is the interpreter's.

use anykvm_cpu::interp::simd::xcr0;
use anykvm_cpu::state::{CpuState, XsaveArea, cr0, cr4};
use anykvm_cpu::{assist, cpuid};
use iced_x86::{
    Code, CpuidFeature, EncodingKind, IcedError, Instruction, MemoryOperand, Mnemonic, OpKind,
    Register,
};

use crate::asm::{Asm, Hole, at, slot};
use crate::regs::SCRATCH;
use crate::shared::Slot;
use crate::x87;

/// Which vector registers something needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// None.
    #[default]
    None,
    /// XMM0-15 and MXCSR.
    Sse,
    /// YMM0-15.
    Avx,
    /// ZMM0-31 and k0-k7.
    Avx512,
}

impl Level {
    /// The word that is not zero while the level's registers are in the host's.
    pub fn live(self) -> Slot {
        match self {
            Self::None | Self::Sse => Slot::LiveSse,
            Self::Avx => Slot::LiveAvx,
            Self::Avx512 => Slot::LiveAvx512,
        }
    }
    /// The word that is not zero if translated code may use the level.
    pub fn allowed(self) -> Slot {
        match self {
            Self::None | Self::Sse => Slot::AllowSse,
            Self::Avx => Slot::AllowAvx,
            Self::Avx512 => Slot::AllowAvx512,
        }
    }
    /// The highest level translated code may use now.
    pub fn available(s: &CpuState) -> Self {
        const MASKS: u32 = 0x1f80;
        let sse = s.cr0 & (cr0::EM | cr0::TS) == 0
            && s.cr4 & cr4::OSFXSR != 0
            && s.xsave.u32(XsaveArea::MXCSR) & MASKS == MASKS;
        let avx = sse
            && s.cr4 & cr4::OSXSAVE != 0
            && s.xcr0 & (xcr0::SSE | xcr0::AVX) == xcr0::SSE | xcr0::AVX
            && std::is_x86_feature_detected!("avx");
        if avx && s.xcr0 & xcr0::AVX512 == xcr0::AVX512 {
            Self::Avx512
        } else if avx {
            Self::Avx
        } else if sse {
            Self::Sse
        } else {
            Self::None
        }
    }
    /// What an instruction needs; `None` if it is none that translated code can execute.
    pub fn of(raw: &Instruction) -> Option<Self> {
        let registers = || {
            (0..raw.op_count())
                .filter(|i| raw.op_kind(*i) == OpKind::Register)
                .map(|i| raw.op_register(i))
        };
        // MXCSR is the guest's only while vector registers are.
        let control = matches!(
            raw.mnemonic(),
            Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
        );
        if control {
            return None;
        }
        if x87::belongs(raw) {
            return x87::executes(raw).then_some(Self::Sse);
        }
        if matches!(raw.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
            return Some(Self::Avx);
        }
        if !assist::serves(raw) || !cpuid::executes(raw) {
            return None;
        }
        // Conversions from memory to general registers obey MXCSR and so belong to the vectors.
        let vector = !computes_in_general_registers(raw);
        let mask = registers().any(Register::is_k) || raw.op_mask() != Register::None;
        match raw.encoding() {
            EncodingKind::EVEX => Some(Self::Avx512),
            _ if mask => Some(Self::Avx512),
            _ if !vector => Some(Self::None),
            EncodingKind::Legacy => Some(Self::Sse),
            EncodingKind::VEX => Some(Self::Avx),
            _ => None,
        }
    }
}

/// Whether the instruction has nothing to do with vector registers or MXCSR.
fn computes_in_general_registers(raw: &Instruction) -> bool {
    use CpuidFeature as F;
    raw.mnemonic() == Mnemonic::Crc32
        || raw.cpuid_features().iter().all(|f| {
            matches!(
                f,
                F::ADX
                    | F::BMI1
                    | F::BMI2
                    | F::LZCNT
                    | F::MOVBE
                    | F::POPCNT
                    | F::RDRAND
                    | F::RDSEED
            )
        })
}

/// Whether the memory operand has to be aligned, or may have to be: then the interpreter decides.
pub fn may_need_alignment(raw: &Instruction) -> bool {
    use Mnemonic as M;
    match raw.mnemonic() {
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => false,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovdqa32
        | M::Vmovdqa64
        | M::Vmovntdq
        | M::Vmovntdqa
        | M::Vmovntps
        | M::Vmovntpd => true,
        _ => raw.encoding() == EncodingKind::Legacy,
    }
}

fn area(offset: usize) -> MemoryOperand {
    at(
        SCRATCH,
        (std::mem::offset_of!(CpuState, xsave) + offset) as i64,
    )
}

fn xmm(n: u32) -> Register {
    Register::XMM0 + n
}
fn ymm(n: u32) -> Register {
    Register::YMM0 + n
}
fn zmm(n: u32) -> Register {
    Register::ZMM0 + n
}

/// Generates the functions that load levels; returns their positions. They change nothing but R15
/// and the vector registers, and leave the flags alone.
pub fn loaders(a: &mut Asm) -> Result<[usize; 3], IcedError> {
    let avx = std::is_x86_feature_detected!("avx");
    let avx512 = std::is_x86_feature_detected!("avx512bw");
    let sse_at = a.here();
    load_sse(a, avx)?;
    a.put(&Instruction::with(Code::Retnq))?;
    let avx_at = a.here();
    if avx {
        load_avx(a, avx512)?;
    }
    a.put(&Instruction::with(Code::Retnq))?;
    Ok([sse_at, avx_at, avx_at])
}

fn load_sse(a: &mut Asm, avx: bool) -> Result<(), IcedError> {
    if avx {
        a.put(&Instruction::with(Code::VEX_Vzeroupper))?;
    }
    a.put(&Instruction::with1(
        Code::Stmxcsr_m32,
        slot(Slot::HostMxcsr),
    )?)?;
    a.load(SCRATCH, slot(Slot::State))?;
    a.put(&Instruction::with1(
        Code::Ldmxcsr_m32,
        area(XsaveArea::MXCSR),
    )?)?;
    for n in 0..16 {
        a.emit(
            Code::Movups_xmm_xmmm128,
            xmm(n),
            area(XsaveArea::XMM + n as usize * 16),
        )?;
    }
    a.store_u32(slot(Slot::LiveSse), 1)
}

/// If the guest may use AVX-512, its registers are loaded too: VEX-encoded instructions clear their
/// destination's upper part.
fn load_avx(a: &mut Asm, avx512: bool) -> Result<(), IcedError> {
    a.load(Register::R15, slot(Slot::LiveSse))?;
    let skip = skip_unless_zero(a)?;
    load_sse(a, true)?;
    a.land(skip);
    a.load(SCRATCH, slot(Slot::State))?;
    for n in 0..16 {
        a.put(&Instruction::with4(
            Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8,
            ymm(n),
            ymm(n),
            area(XsaveArea::YMM_HI + n as usize * 16),
            1,
        )?)?;
    }
    a.store_u32(slot(Slot::LiveAvx), 1)?;
    if !avx512 {
        return Ok(());
    }
    a.load(Register::R15, slot(Slot::AllowAvx512))?;
    let wanted = skip_unless_zero(a)?;
    a.put(&Instruction::with(Code::Retnq))?;
    a.land(wanted);
    a.load(SCRATCH, slot(Slot::State))?;
    for n in 0..16 {
        a.put(&Instruction::with4(
            Code::EVEX_Vinserti64x4_zmm_k1z_zmm_ymmm256_imm8,
            zmm(n),
            zmm(n),
            area(XsaveArea::ZMM_HI + n as usize * 32),
            1,
        )?)?;
        a.emit(
            Code::EVEX_Vmovdqu64_zmm_k1z_zmmm512,
            zmm(n + 16),
            area(XsaveArea::HI16_ZMM + n as usize * 64),
        )?;
    }
    for n in 0..8 {
        a.emit(
            Code::VEX_Kmovq_kr_km64,
            Register::K0 + n,
            area(XsaveArea::OPMASK + n as usize * 8),
        )?;
    }
    a.store_u32(slot(Slot::LiveAvx512), 1)
}

/// A jump that is taken unless R15 is zero. Leaves the flags alone; RCX is put back.
fn skip_unless_zero(a: &mut Asm) -> Result<Hole, IcedError> {
    a.emit(Code::Xchg_rm64_r64, Register::RCX, SCRATCH)?;
    let zero = a.jrcxz();
    a.emit(Code::Xchg_rm64_r64, Register::RCX, SCRATCH)?;
    let skip = a.jmp();
    a.land_short(zero);
    a.emit(Code::Xchg_rm64_r64, Register::RCX, SCRATCH)?;
    Ok(skip)
}

/// Emits what stores the registers that are in the host's and gives the host its MXCSR back. R15 holds
/// the state's address. Destroys RCX.
pub fn store(a: &mut Asm) -> Result<(), IcedError> {
    let live = |a: &mut Asm, s: Slot| -> Result<(usize, Hole), IcedError> {
        a.load(Register::RCX, slot(s))?;
        let zero = a.jrcxz();
        let over = a.jmp();
        a.land_short(zero);
        Ok((0, over))
    };
    // Not live: past everything. Each test jumps over the jump that leaves.
    let (_, sse) = live(a, Slot::LiveSse)?;
    let done = a.jmp();
    a.land(sse);
    a.put(&Instruction::with1(
        Code::Stmxcsr_m32,
        area(XsaveArea::MXCSR),
    )?)?;
    for n in 0..16 {
        a.emit(
            Code::Movups_xmmm128_xmm,
            area(XsaveArea::XMM + n as usize * 16),
            xmm(n),
        )?;
    }
    a.put(&Instruction::with1(
        Code::Ldmxcsr_m32,
        slot(Slot::HostMxcsr),
    )?)?;
    a.store_u32(slot(Slot::LiveSse), 0)?;
    let mut ends = vec![done];
    if std::is_x86_feature_detected!("avx") {
        let (_, avx) = live(a, Slot::LiveAvx)?;
        ends.push(a.jmp());
        a.land(avx);
        for n in 0..16 {
            a.put(&Instruction::with3(
                Code::VEX_Vextractf128_xmmm128_ymm_imm8,
                area(XsaveArea::YMM_HI + n as usize * 16),
                ymm(n),
                1,
            )?)?;
        }
        a.store_u32(slot(Slot::LiveAvx), 0)?;
        if std::is_x86_feature_detected!("avx512bw") {
            let (_, avx512) = live(a, Slot::LiveAvx512)?;
            let upper = a.jmp();
            a.land(avx512);
            for n in 0..16 {
                a.put(&Instruction::with3(
                    Code::EVEX_Vextracti64x4_ymmm256_k1z_zmm_imm8,
                    area(XsaveArea::ZMM_HI + n as usize * 32),
                    zmm(n),
                    1,
                )?)?;
                a.emit(
                    Code::EVEX_Vmovdqu64_zmmm512_k1z_zmm,
                    area(XsaveArea::HI16_ZMM + n as usize * 64),
                    zmm(n + 16),
                )?;
            }
            for n in 0..8 {
                a.emit(
                    Code::VEX_Kmovq_m64_kr,
                    area(XsaveArea::OPMASK + n as usize * 8),
                    Register::K0 + n,
                )?;
            }
            a.store_u32(slot(Slot::LiveAvx512), 0)?;
            a.land(upper);
        }
        a.put(&Instruction::with(Code::VEX_Vzeroupper))?;
    }
    for end in ends {
        a.land(end);
    }
    Ok(())
}
