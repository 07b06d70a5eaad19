//! What one instruction needs of the host: its operands renamed to the stub's own registers, and
//! everything that goes in and comes out.
//!
//! Explicit registers are renamed in order of appearance, so one stub serves an operation whatever
//! registers its guest form names; which guest registers fill the slots is the [`Binding`].

use iced_x86::{
    Code, CodeSize, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use super::frame::{GPRS, VECTORS};
use super::stack::StackUse;
use crate::state::rflags;

/// General registers explicit operands are renamed to. No instruction uses one of them implicitly,
/// and a stub may clobber them.
const GPR_POOL: [Register; GPRS] = [Register::R8, Register::R9, Register::R10, Register::R11];
/// The register that holds the frame's address.
pub const FRAME: Register = Register::RDI;

/// Which registers' availability rules hold (SDM Vol. 2, 2.4 and 2.5; Vol. 3, 14.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// General registers, legacy encoding.
    Gpr,
    /// General registers, VEX encoding.
    GprVex,
    /// x87.
    X87,
    /// MMX registers (and no XMM register).
    Mmx,
    /// XMM registers, legacy encoding.
    Sse,
    /// XMM or YMM registers, VEX encoding.
    Avx,
}

/// How the memory operand is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryUse {
    /// There is none.
    None,
    /// Loaded.
    Read,
    /// Stored.
    Write,
}

/// One vector register slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector {
    /// The host register's number.
    pub host: u8,
    /// Loaded before the instruction.
    pub read: bool,
    /// Stored after it.
    pub write: bool,
    /// 16 or 32.
    pub bytes: u8,
}

/// One general register slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpr {
    /// The host register.
    pub host: Register,
    /// Stored after the instruction. (All are loaded before it.)
    pub write: bool,
}

/// The guest registers in a stub's slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Vector register numbers.
    pub vectors: [u8; VECTORS],
    /// General register numbers; bit 4: the second byte of the register (AH to BH).
    pub gprs: [u8; GPRS],
}

/// The second byte of a register, in [`Binding::gprs`].
pub const HIGH_BYTE: u8 = 16;

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The instruction with its operands renamed, as it stands in the stub.
    pub insn: Instruction,
    /// Availability rules.
    pub class: Class,
    /// Vector slots.
    pub vectors: Vec<Vector>,
    /// General register slots.
    pub gprs: Vec<Gpr>,
    /// The memory operand.
    pub memory: MemoryUse,
    /// Its size in bytes.
    pub size: u8,
    /// Its address must be a multiple of its size.
    pub aligned: bool,
    /// Status flags the instruction reads, or leaves in a state that may depend on the one before.
    pub flags_in: u64,
    /// Status flags it may change.
    pub flags_out: u64,
    /// It obeys MXCSR and may raise SIMD floating-point exceptions.
    pub mxcsr: bool,
    /// It uses x87 or MMX registers.
    pub x87: bool,
    /// For x87 instructions that can do with a part of the state.
    pub stack: Option<StackUse>,
}

impl Plan {
    /// Analyses a decoded instruction; `None` if it cannot or must not run in a stub.
    pub fn of(raw: &Instruction) -> Option<(Self, Binding)> {
        if !eligible(raw) {
            return None;
        }
        let mut factory = InstructionInfoFactory::new();
        let (insn, renamed) = Names::apply(raw)?;
        let info = factory.info(&insn);
        let legacy = raw.encoding() == EncodingKind::Legacy;

        let mut plan = Self {
            insn,
            class: Class::Gpr,
            vectors: Vec::new(),
            gprs: Vec::new(),
            memory: MemoryUse::None,
            size: 0,
            aligned: false,
            flags_in: status_flags(insn.rflags_read() | insn.rflags_undefined()),
            flags_out: status_flags(insn.rflags_modified()),
            mxcsr: false,
            stack: if is_x87(raw) { StackUse::of(raw) } else { None },
            x87: is_x87(raw) || raw.mnemonic() == Mnemonic::Emms,
        };
        let mut binding = Binding::default();
        for used in info.used_registers() {
            let r = used.register();
            plan.x87 |= r.is_mm() || r.is_st();
            let read = !matches!(used.access(), OpAccess::Write);
            let write = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            if r.is_vector_register() {
                let host = r.number() as u8;
                let at = match plan.vectors.iter().position(|v| v.host == host) {
                    Some(at) => at,
                    None => {
                        let at = plan.vectors.len();
                        *binding.vectors.get_mut(at)? = renamed.guest_vector(host);
                        plan.vectors.push(Vector {
                            host,
                            read: false,
                            write: false,
                            bytes: 16,
                        });
                        at
                    }
                };
                let v = &mut plan.vectors[at];
                // Legacy forms leave a part of the destination alone.
                v.read |= read || legacy;
                v.write |= write;
            } else if r.is_gpr() && !(r.full_register() == FRAME && has_memory(raw)) {
                let host = r.full_register();
                let at = match plan.gprs.iter().position(|g| g.host == host) {
                    Some(at) => at,
                    None => {
                        let at = plan.gprs.len();
                        *binding.gprs.get_mut(at)? = renamed.guest_gpr(host)?;
                        plan.gprs.push(Gpr { host, write: false });
                        at
                    }
                };
                plan.gprs[at].write |= write;
                if write && binding.gprs[at] & HIGH_BYTE != 0 {
                    return None;
                }
            }
        }
        // The width of a slot is that of the widest operand that names it; the information above
        // counts a VEX destination as the whole register.
        for i in 0..insn.op_count() {
            if insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_vector_register() {
                let r = insn.op_register(i);
                if let Some(v) = plan
                    .vectors
                    .iter_mut()
                    .find(|v| usize::from(v.host) == r.number())
                {
                    v.bytes = v.bytes.max(r.size() as u8);
                }
            }
        }
        // Loading the flags takes RAX.
        if plan.flags_in != 0 && plan.gprs.iter().any(|g| g.host == Register::RAX) {
            return None;
        }
        for used in info.used_memory() {
            plan.memory = match used.access() {
                OpAccess::Read | OpAccess::CondRead => MemoryUse::Read,
                OpAccess::Write | OpAccess::CondWrite => MemoryUse::Write,
                _ => return None,
            };
            plan.size = u8::try_from(used.memory_size().size()).ok()?;
        }
        if plan.memory != MemoryUse::None && !(1..=64).contains(&plan.size) {
            return None;
        }
        // Conversions between memory and general registers are vector instructions too.
        plan.mxcsr = obeys_mxcsr(raw);
        let vector = !plan.vectors.is_empty() || plan.mxcsr;
        plan.class = match (vector, legacy) {
            (true, true) => Class::Sse,
            (true, false) => Class::Avx,
            (false, true) if is_x87(raw) => Class::X87,
            (false, true) if plan.x87 => Class::Mmx,
            (false, true) => Class::Gpr,
            (false, false) => Class::GprVex,
        };
        plan.aligned = plan.size != 0 && aligned(raw, plan.class, plan.size);
        Some((plan, binding))
    }
}

/// Whether every feature the instruction belongs to is one whose instructions compute and nothing
/// else.
fn eligible(raw: &Instruction) -> bool {
    use CpuidFeature as F;
    const COMPUTING: &[CpuidFeature] = &[
        F::ADX,
        F::AES,
        F::AVX,
        F::AVX2,
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
        && matches!(raw.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
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

fn is_x87(raw: &Instruction) -> bool {
    use CpuidFeature as F;
    raw.cpuid_features()
        .iter()
        .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

fn has_memory(raw: &Instruction) -> bool {
    raw.op_kinds().any(|k| k == OpKind::Memory)
}

/// Which guest registers the renamed operands stand for, in order of appearance. A guest register
/// that is named twice gets two names: an instruction writes only one of its operands, and so forms
/// that differ in which operands coincide share one stub.
#[derive(Default)]
struct Names {
    /// Of the vector registers from 1 up; XMM0 is left for implicit use.
    vectors: Vec<u8>,
    /// Of [`GPR_POOL`].
    gprs: Vec<u8>,
}

impl Names {
    /// The instruction with registers renamed and its memory operand in the frame.
    fn apply(raw: &Instruction) -> Option<(Instruction, Self)> {
        let mut names = Self::default();
        let mut insn = *raw;
        insn.set_code_size(CodeSize::Code64);
        for i in 0..raw.op_count() {
            match raw.op_kind(i) {
                OpKind::Register => insn.set_op_register(i, names.rename(raw.op_register(i))?),
                OpKind::Memory => {
                    insn.set_segment_prefix(Register::None);
                    insn.set_memory_base(FRAME);
                    insn.set_memory_index(Register::None);
                    insn.set_memory_index_scale(1);
                    insn.set_memory_displ_size(0);
                    insn.set_memory_displacement64(super::frame::offset::MEMORY as u64);
                }
                OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                _ => return None,
            }
        }
        if matches!(raw.mnemonic(), Mnemonic::Extrq | Mnemonic::Insertq)
            && insn.op_kinds().any(|k| k == OpKind::Immediate8_2nd)
        {
            // Length and index have six bits each.
            insn.set_immediate8(insn.immediate8() & 63);
            insn.set_immediate8_2nd(insn.immediate8_2nd() & 63);
        }
        Some((insn, names))
    }

    fn rename(&mut self, r: Register) -> Option<Register> {
        if r.is_vector_register() {
            self.vectors.push(r.number() as u8);
            return Some(r.base() + self.vectors.len() as u32);
        }
        if !r.is_gpr() {
            return (r.is_mm() || r.is_st()).then_some(r);
        }
        let n = GPR_POOL.get(self.gprs.len())?.number() as u32;
        self.gprs.push(guest_code(r));
        Some(match r.size() {
            8 => Register::RAX + n,
            4 => Register::EAX + n,
            2 => Register::AX + n,
            // R8L is 12 behind AL: AH to BH and SPL to DIL are between.
            _ => Register::R8L + (n - 8),
        })
    }

    /// The guest register a host register stands for; its own name if it is used implicitly.
    fn guest_vector(&self, host: u8) -> u8 {
        let at = usize::from(host).checked_sub(1);
        at.and_then(|at| self.vectors.get(at)).map_or(host, |g| *g)
    }

    fn guest_gpr(&self, host: Register) -> Option<u8> {
        if let Some(at) = GPR_POOL.iter().position(|r| *r == host) {
            return self.gprs.get(at).copied();
        }
        // Implicit operands the stub can leave in their own registers.
        matches!(host, Register::RAX | Register::RCX | Register::RDX).then(|| host.number() as u8)
    }
}

fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

fn guest_code(r: Register) -> u8 {
    let n = r.full_register().number() as u8;
    if is_high_byte(r) { n | HIGH_BYTE } else { n }
}

fn status_flags(iced: u32) -> u64 {
    const MAP: [(u32, u64); 6] = [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ];
    MAP.iter()
        .filter(|(i, _)| iced & i != 0)
        .fold(0, |all, (_, f)| all | f)
}

/// Whether the instruction is one of those that round, compare or convert floating-point numbers
/// under MXCSR (SDM Vol. 2, table 2-17 ff.: those that can raise #XM), told by its name.
fn obeys_mxcsr(raw: &Instruction) -> bool {
    const STEMS: &[&str] = &[
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "cvt", "round",
        "dpp", "hadd", "hsub", "fm", "fnm",
    ];
    if is_x87(raw) || raw.mnemonic() == Mnemonic::Mulx {
        return false;
    }
    let name = format!("{:?}", raw.mnemonic()).to_ascii_lowercase();
    let stem = name.strip_prefix('v').unwrap_or(&name);
    STEMS.iter().any(|s| stem.starts_with(s))
}

/// Whether a misaligned operand is #GP(0): all 16-byte operands of legacy SSE but those of the
/// instructions made for unaligned data; of VEX forms only the aligned moves.
fn aligned(raw: &Instruction, class: Class, size: u8) -> bool {
    use Mnemonic as M;
    match class {
        Class::Sse => {
            size == 16
                && !matches!(
                    raw.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestrm
                        | M::Pcmpistri
                        | M::Pcmpistrm
                )
        }
        Class::Avx => matches!(
            raw.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        ),
        _ => false,
    }
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
