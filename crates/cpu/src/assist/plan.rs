//! What one instruction needs of the host: its operands renamed to the stub's own registers, and
//! everything that goes in and comes out.
//!
//! Explicit registers are renamed in order of appearance, so one stub serves an operation whatever
//! registers its guest form names; which guest registers fill the slots is the [`Binding`].

use iced_x86::{
    EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    RflagsBits, RoundingControl,
};

use super::features::eligible;
use super::frame::{GPRS, OPMASKS, VECTORS};
use super::masking::Masking;
use super::names::Names;
use super::stack::StackUse;
use crate::state::rflags;

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
    /// Opmask registers, VEX encoding.
    Opmask,
    /// Vector registers, EVEX encoding.
    Evex,
}

/// What an instruction that obeys MXCSR does about tiny results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underflow {
    /// It raises underflow, unless flush-to-zero has its way.
    Raised,
    /// It does not, but flushes to zero where underflow is masked.
    NotRaised,
    /// All exceptions are suppressed and count as masked (EVEX).
    Suppressed,
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
    /// 16, 32 or 64.
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

/// One opmask register slot. Its host register is that of the slot's number plus one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opmask {
    /// Loaded before the instruction.
    pub read: bool,
    /// Stored after it.
    pub write: bool,
}

/// The guest registers in a stub's slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Vector register numbers.
    pub vectors: [u8; VECTORS],
    /// General register numbers; bit 4: the second byte of the register (AH to BH).
    pub gprs: [u8; GPRS],
    /// Opmask register numbers.
    pub opmasks: [u8; OPMASKS],
    /// The vector destination counts as zero before the instruction: what the write mask leaves
    /// alone is cleared, or there is no write mask.
    pub blank: bool,
    /// Bytes of the element that the memory operand repeats; 0 if it is whole.
    pub broadcast: u8,
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
    /// Opmask register slots.
    pub opmasks: [Opmask; OPMASKS],
    /// Which elements of the memory operand are accessed.
    pub masking: Masking,
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
    /// Whether underflow is among them.
    pub underflows: Underflow,
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
        let (mut insn, renamed) = Names::apply(raw)?;
        // A destination that is only written can be cleared before instead of by the instruction.
        let blank = raw.encoding() == EncodingKind::EVEX
            && raw.op_count() > 0
            && factory.info(raw).op0_access() == OpAccess::Write;
        if blank && !blends(raw.mnemonic()) {
            insn.set_zeroing_masking(false);
        }
        let info = factory.info(&insn);
        let legacy = raw.encoding() == EncodingKind::Legacy;

        let mut plan = Self {
            insn,
            class: Class::Gpr,
            vectors: Vec::new(),
            gprs: Vec::new(),
            opmasks: Default::default(),
            masking: Masking::of(&insn, renamed.write_mask),
            memory: MemoryUse::None,
            size: 0,
            aligned: false,
            flags_in: status_flags(insn.rflags_read() | insn.rflags_undefined()),
            flags_out: status_flags(insn.rflags_modified()),
            mxcsr: false,
            underflows: underflow(raw),
            stack: if is_x87(raw) { StackUse::of(raw) } else { None },
            x87: is_x87(raw) || raw.mnemonic() == Mnemonic::Emms,
        };
        let mut binding = Binding {
            blank,
            ..Binding::default()
        };
        if raw.is_broadcast() {
            binding.broadcast = u8::try_from(raw.memory_size().size()).ok()?;
        }
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
            } else if r.is_k() {
                let at = r.number().checked_sub(1)?;
                let slot = plan.opmasks.get_mut(at)?;
                slot.read |= read;
                slot.write |= write;
                binding.opmasks[at] = renamed.guest_opmask(r.number() as u8)?;
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
            _ if raw.encoding() == EncodingKind::EVEX => Class::Evex,
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

/// Whether the mask chooses between two sources.
fn blends(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Vblendmps | M::Vblendmpd | M::Vpblendmb | M::Vpblendmw | M::Vpblendmd | M::Vpblendmq
    )
}

/// Whether it is an x87 instruction.
pub fn is_x87(raw: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    raw.cpuid_features()
        .iter()
        .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

fn has_memory(raw: &Instruction) -> bool {
    raw.op_kinds().any(|k| k == OpKind::Memory)
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
/// under MXCSR (SDM Vol. 2, table 2-17 ff.: those that can raise #XM, and some that only look at its
/// DAZ bit), told by its name.
fn obeys_mxcsr(raw: &Instruction) -> bool {
    const STEMS: &[&str] = &[
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "cvt", "round",
        "dpp", "hadd", "hsub", "fm", "fnm", "fixup", "fpclass", "getexp", "getmant", "range",
        "rcp14", "reduce", "rndscale", "rsqrt14", "scalef",
    ];
    if is_x87(raw) || raw.mnemonic() == Mnemonic::Mulx {
        return false;
    }
    let name = format!("{:?}", raw.mnemonic()).to_ascii_lowercase();
    let stem = name.strip_prefix('v').unwrap_or(&name);
    STEMS.iter().any(|s| stem.starts_with(s))
}

fn underflow(raw: &Instruction) -> Underflow {
    use Mnemonic as M;
    let suppressed =
        raw.suppress_all_exceptions() || raw.rounding_control() != RoundingControl::None;
    match raw.mnemonic() {
        _ if suppressed => Underflow::Suppressed,
        M::Vreduceps | M::Vreducepd | M::Vreducess | M::Vreducesd => Underflow::NotRaised,
        // These raise nothing at all, and their results are flushed whatever the masks are.
        M::Vrcp14ps | M::Vrcp14pd | M::Vrcp14ss | M::Vrcp14sd => Underflow::Suppressed,
        M::Vrsqrt14ps | M::Vrsqrt14pd | M::Vrsqrt14ss | M::Vrsqrt14sd => Underflow::Suppressed,
        _ => Underflow::Raised,
    }
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
                        | M::Pcmpestri64
                        | M::Pcmpestrm
                        | M::Pcmpestrm64
                        | M::Pcmpistri
                        | M::Pcmpistrm
                )
        }
        Class::Avx | Class::Evex => matches!(
            raw.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovdqa32
                | M::Vmovdqa64
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        ),
        _ => false,
    }
}
