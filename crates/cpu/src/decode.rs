//! From instruction bytes to [`Insn`]: what the interpreter executes.
//!
//! iced-x86 does the decoding; an [`Insn`] is its result boiled down to what handlers need on the
//! hot path (register codes, address parts, immediate), plus iced's own instruction for the rare
//! handlers that want more. The handler is chosen once, here, by [`crate::interp::select`].

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use crate::cpu::Cpu;
use crate::exit::Stop;
use crate::mode::Mode;
use crate::state::{reg, seg};

/// Executes one instruction. When it is called RIP already points behind the instruction; if it
/// returns an error nothing of the instruction may have happened (the run loop moves RIP back).
pub type Handler = fn(&mut Cpu, &Insn) -> Result<(), Stop>;

/// Longest instruction (SDM Vol. 2, 2.3.11).
pub const MAX_INSN_LEN: usize = 15;

/// Segment codes of memory operands: a segment register's number with [`SEG_CHECKED`], or one of
/// the unchecked codes.
pub const SEG_CHECKED: u8 = 8;
/// Base 0, no limit; faults are #GP.
pub const SEG_FLAT: u8 = 6;
/// Base 0, no limit; faults are #SS.
pub const SEG_FLAT_SS: u8 = 7;

/// `Insn::prefixes`: LOCK.
pub const LOCK: u8 = 1;
/// `Insn::prefixes`: F3.
pub const REP: u8 = 2;
/// `Insn::prefixes`: F2.
pub const REPNE: u8 = 4;

/// One decoded instruction.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Insn {
    /// What executes it.
    pub handler: Handler,
    /// The immediate operand, sign-extended to 64 bits; for near branches the displacement relative
    /// to the next instruction.
    pub imm: u64,
    /// Displacement of the memory operand, sign-extended (for RIP-relative operands relative to the
    /// next instruction).
    pub disp: u64,
    /// Mask of the address size: the effective address is computed modulo this.
    pub addr_mask: u64,
    /// Register code of operand 0 (see [`crate::width::Width`]); 255 if it is no GPR.
    pub op0: u8,
    /// Register code of operand 1.
    pub op1: u8,
    /// Register code of operand 2.
    pub op2: u8,
    /// Register code of the base ([`reg::ZERO`] if none).
    pub base: u8,
    /// Register code of the index ([`reg::ZERO`] if none).
    pub index: u8,
    /// log2 of the scale.
    pub scale: u8,
    /// Segment code of the memory operand.
    pub seg: u8,
    /// Length in bytes.
    pub len: u8,
    /// Prefixes that handlers look at.
    pub prefixes: u8,
    /// The instruction changes the mode, memory mappings, interruptibility or the flow of control,
    /// so the block ends behind it.
    pub ends_block: bool,
    /// The encoded bytes.
    pub bytes: [u8; MAX_INSN_LEN],
    /// iced's decoded form. Its IP is 0 at this instruction: branch targets and RIP-relative
    /// addresses in it are relative to the instruction's start.
    pub raw: Instruction,
}

impl Insn {
    /// LOCK prefix.
    #[inline(always)]
    pub fn lock(&self) -> bool {
        self.prefixes & LOCK != 0
    }
    /// F3 or F2 prefix.
    #[inline(always)]
    pub fn rep(&self) -> bool {
        self.prefixes & (REP | REPNE) != 0
    }
    /// The encoded bytes.
    pub fn encoding(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(MAX_INSN_LEN)]
    }
}

/// Why bytes are no instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// More bytes are needed (the next page must be readable).
    Incomplete,
    /// #UD.
    Invalid,
    /// Longer than 15 bytes: #GP(0).
    TooLong,
    /// A valid instruction that no handler implements.
    Unimplemented(Box<Instruction>),
}

/// The register code of a general register; `None` for others.
pub fn gpr_code(r: Register) -> Option<u8> {
    if r.is_gpr8() {
        let n = match r {
            Register::AH => return Some(1),
            Register::CH => return Some(9),
            Register::DH => return Some(17),
            Register::BH => return Some(25),
            _ => r.full_register().number() as u8,
        };
        Some(n * 8)
    } else if r.is_gpr() {
        Some(r.number() as u8)
    } else {
        None
    }
}

pub(crate) fn segment_number(r: Register) -> Option<u8> {
    Some(match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::DS => seg::DS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => return None,
    })
}

/// The segment code of an access through this segment register in this mode. Flat or not, CS is
/// checked outside 64-bit mode: it cannot be written.
pub fn segment_code(n: u8, mode: Mode) -> u8 {
    if mode.code64() {
        match n {
            seg::FS | seg::GS => n,
            seg::SS => SEG_FLAT_SS,
            _ => SEG_FLAT,
        }
    } else if mode.flat() && n < seg::FS && n != seg::CS {
        if n == seg::SS { SEG_FLAT_SS } else { SEG_FLAT }
    } else {
        n | SEG_CHECKED
    }
}

/// Decodes the first instruction of `bytes`.
pub fn decode(bytes: &[u8], mode: Mode) -> Result<Insn, DecodeError> {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, 0, DecoderOptions::NONE);
    let mut raw = Instruction::default();
    decoder.decode_out(&mut raw);
    match decoder.last_error() {
        DecoderError::None => {}
        DecoderError::NoMoreBytes => return Err(DecodeError::Incomplete),
        _ if decoder.position() >= MAX_INSN_LEN && goes_on(bytes, mode) => {
            return Err(DecodeError::TooLong);
        }
        _ => return Err(DecodeError::Invalid),
    }
    exchange_behind_rep(bytes, &mut raw);
    build(bytes, raw, mode)
}

/// Whether the instruction does not end within [`MAX_INSN_LEN`] bytes. iced calls such bytes as
/// invalid as an undefined instruction that has just that length; without a prefix that does not
/// change the length the latter is shorter.
fn goes_on(bytes: &[u8], mode: Mode) -> bool {
    let bytes = &bytes[..MAX_INSN_LEN.min(bytes.len())];
    let is_prefix = |b: &u8| {
        matches!(
            b,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
        ) || mode.code64() && b & 0xf0 == 0x40
    };
    let prefixes: Vec<u8> = bytes.iter().copied().take_while(is_prefix).collect();
    // Of F2 and F3 the last one counts.
    let repeat = |b: &u8| matches!(b, 0xf2 | 0xf3);
    let idle = prefixes.iter().enumerate().position(|(i, b)| {
        !matches!(b, 0x66 | 0x67 | 0xf2 | 0xf3 | 0x40..=0x4f)
            || prefixes[..i].contains(b)
            || repeat(b) && prefixes[i + 1..].iter().any(repeat)
    });
    let Some(idle) = idle else {
        return true;
    };
    let mut shorter = bytes.to_vec();
    shorter.remove(idle);
    let mut decoder = Decoder::with_ip(mode.bits(), &shorter, 0, DecoderOptions::NONE);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
}

/// F3 90 is PAUSE, but with REX.B it is XCHG of R8, as 90 alone is (SDM Vol. 2, NOP and XCHG), which
/// iced does not tell apart.
fn exchange_behind_rep(bytes: &[u8], raw: &mut Instruction) {
    const REX_B: u8 = 0x41;
    const REX_WB: u8 = 0x49;
    if raw.code() != Code::Pause || raw.len() < 3 {
        return;
    }
    let prefixes = &bytes[..raw.len() - 1];
    let (code, r8, rax) = match prefixes[prefixes.len() - 1] & !0b110 {
        REX_WB => (Code::Xchg_r64_RAX, Register::R8, Register::RAX),
        REX_B if prefixes.contains(&0x66) => (Code::Xchg_r16_AX, Register::R8W, Register::AX),
        REX_B => (Code::Xchg_r32_EAX, Register::R8D, Register::EAX),
        _ => return,
    };
    raw.set_code(code);
    raw.set_op0_register(r8);
    raw.set_op1_register(rax);
}

fn build(bytes: &[u8], raw: Instruction, mode: Mode) -> Result<Insn, DecodeError> {
    let len = raw.len();
    let mut insn = Insn {
        handler: crate::interp::undefined,
        imm: 0,
        disp: 0,
        addr_mask: 0,
        op0: 255,
        op1: 255,
        op2: 255,
        base: reg::ZERO,
        index: reg::ZERO,
        scale: 0,
        seg: SEG_FLAT,
        len: len as u8,
        prefixes: 0,
        ends_block: crate::control::ends_block(&raw),
        bytes: [0; MAX_INSN_LEN],
        raw,
    };
    insn.bytes[..len].copy_from_slice(&bytes[..len]);
    insn.prefixes = (u8::from(raw.has_lock_prefix()) * LOCK)
        | (u8::from(raw.has_rep_prefix()) * REP)
        | (u8::from(raw.has_repne_prefix()) * REPNE);
    for i in 0..raw.op_count() {
        let code = match raw.op_kind(i) {
            OpKind::Register => gpr_code(raw.op_register(i)).unwrap_or(255),
            OpKind::Memory => {
                memory_operand(&mut insn, mode);
                255
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                insn.imm = raw.near_branch_target().wrapping_sub(len as u64);
                255
            }
            k @ (OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI) => {
                string_operand(&mut insn, k, mode);
                255
            }
            k if is_immediate(k) => {
                insn.imm = raw.immediate(i);
                255
            }
            _ => 255,
        };
        match i {
            0 => insn.op0 = code,
            1 => insn.op1 = code,
            2 => insn.op2 = code,
            _ => {}
        }
    }
    match crate::interp::select(&mut insn, mode) {
        Some(handler) => {
            insn.handler = handler;
            Ok(insn)
        }
        None => Err(DecodeError::Unimplemented(Box::new(raw))),
    }
}

fn is_immediate(k: OpKind) -> bool {
    matches!(
        k,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn memory_operand(insn: &mut Insn, mode: Mode) {
    let raw = &insn.raw;
    let base = raw.memory_base();
    let (code, disp, mask) = match base {
        // iced gives the absolute address for IP 0; handlers see RIP behind the instruction.
        Register::RIP => (
            reg::RIP,
            raw.memory_displacement64().wrapping_sub(raw.len() as u64),
            u64::MAX,
        ),
        Register::EIP => (
            reg::RIP,
            raw.memory_displacement64().wrapping_sub(raw.len() as u64),
            0xffff_ffff,
        ),
        _ => {
            let size = address_bits(raw, mode);
            let mask = if size == 64 {
                u64::MAX
            } else {
                (1 << size) - 1
            };
            (
                gpr_code(base).unwrap_or(reg::ZERO),
                raw.memory_displacement64(),
                mask,
            )
        }
    };
    insn.base = code;
    insn.disp = disp;
    insn.addr_mask = mask;
    let index = raw.memory_index();
    // VSIB index registers belong to gathers and scatters, which compute their own addresses.
    insn.index = gpr_code(index).unwrap_or(reg::ZERO);
    insn.scale = raw.memory_index_scale().trailing_zeros() as u8;
    insn.seg = segment_code(operand_segment(raw, mode), mode);
}

/// The number of the segment register a memory operand goes through. 64-bit code ignores the
/// prefixes of all but FS and GS (SDM Vol. 1, 3.4.2.1), so that they do not choose between #SS and
/// #GP either.
pub(crate) fn operand_segment(raw: &Instruction, mode: Mode) -> u8 {
    let overridden = matches!(raw.segment_prefix(), Register::FS | Register::GS);
    if mode.code64() && !overridden {
        return match raw.memory_base() {
            Register::RSP | Register::ESP | Register::RBP | Register::EBP => seg::SS,
            _ => seg::DS,
        };
    }
    segment_number(raw.memory_segment()).unwrap_or(seg::DS)
}

/// An operand of a string instruction: handlers know its index register; `seg` is that of the
/// operand at (R|E)SI, for the other one's is always ES.
fn string_operand(insn: &mut Insn, kind: OpKind, mode: Mode) {
    insn.addr_mask = match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 0xffff,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    if matches!(
        kind,
        OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI
    ) {
        insn.seg = segment_code(operand_segment(&insn.raw, mode), mode);
    }
}

/// The address size of an instruction with an explicit memory operand.
pub fn address_bits(raw: &Instruction, mode: Mode) -> u32 {
    let r = if raw.memory_base() != Register::None {
        raw.memory_base()
    } else {
        raw.memory_index()
    };
    if r.is_gpr64() {
        return 64;
    } else if r.is_gpr32() {
        return 32;
    } else if r.is_gpr16() {
        return 16;
    } else if r.is_vector_register() && mode.code64() {
        // VSIB without a base: iced gives the displacement the address's size.
        return if raw.memory_displ_size() == 4 { 32 } else { 64 };
    }
    match raw.memory_displ_size() {
        8 => 64,
        4 => {
            if mode.code64() && !has_67_prefix(raw) {
                64
            } else {
                32
            }
        }
        2 => 16,
        _ => mode.bits(),
    }
}

// A bare disp32 in 64-bit mode is a 64-bit address unless the address-size prefix is there; iced
// tells by the code size it assumes for the displacement's sign extension.
fn has_67_prefix(raw: &Instruction) -> bool {
    raw.memory_displacement64() >> 32 == 0 && raw.memory_displacement64() >> 31 & 1 == 1
}
