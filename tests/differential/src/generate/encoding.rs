//! From a table of what iced-x86 knows to bytes: each encoding with random registers, addressing
//! forms, immediates and, now and then, prefixes that do not belong there.

use crate::random::Random;
use iced_x86::OpCodeTableKind;
use iced_x86::{Code, CpuidFeature, EncodingKind, MandatoryPrefix, OpCodeOperandKind as K};

#[derive(Clone, Copy, PartialEq, Eq)]
enum ModRm {
    None,
    Register,
    Memory,
    Any,
}

/// One encoding.
pub struct Template {
    /// Its name.
    pub code: Code,
    kind: EncodingKind,
    table: OpCodeTableKind,
    opcode: Vec<u8>,
    prefix: MandatoryPrefix,
    group: Option<u8>,
    rm_group: Option<u8>,
    /// `None`: ignored.
    l: Option<u8>,
    w: Option<u8>,
    operand_size: u32,
    address_size: u32,
    register_in_opcode: bool,
    modrm: ModRm,
    vvvv: bool,
    lock: bool,
    repeat: bool,
    can_broadcast_or_round: bool,
    can_mask: bool,
    can_zero: bool,
}

/// Bytes enough for everything behind the opcode.
const TAIL: usize = 14;
const PREFIXES: [u8; 11] = [
    0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65,
];

impl Template {
    /// The template of a code in 64- or 32-bit mode, if it has an encoding there.
    pub fn of(code: Code, bits: u32) -> Option<Self> {
        let op = code.op_code();
        let there = if bits == 64 { op.mode64() } else { op.mode32() };
        let served = matches!(
            op.encoding(),
            EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX | EncodingKind::XOP
        );
        if !there || !op.is_instruction() || op.fwait() || !served {
            return None;
        }
        let kinds = op.op_kinds();
        let vvvv = |k: &K| format!("{k:?}").ends_with("_vvvv");
        let value = op.op_code();
        let opcode = match op.op_code_len() {
            2 => vec![(value >> 8) as u8, value as u8],
            _ => vec![value as u8],
        };
        let group = u8::try_from(op.group_index()).ok();
        let mut modrm = kinds.iter().fold(ModRm::None, |m, k| m.max(modrm_of(*k)));
        if modrm == ModRm::None && group.is_some() {
            modrm = ModRm::Any;
        }
        Some(Self {
            code,
            kind: op.encoding(),
            table: op.table(),
            opcode,
            prefix: op.mandatory_prefix(),
            group,
            rm_group: u8::try_from(op.rm_group_index()).ok(),
            l: (!op.is_lig()).then_some(op.l() as u8),
            w: (!op.is_wig()).then_some(op.w() as u8),
            operand_size: op.operand_size(),
            address_size: op.address_size(),
            register_in_opcode: kinds.iter().any(|k| {
                matches!(
                    k,
                    K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode
                )
            }),
            modrm,
            vvvv: kinds.iter().any(vvvv),
            lock: op.can_use_lock_prefix(),
            repeat: op.can_use_rep_prefix() || op.can_use_repne_prefix(),
            can_broadcast_or_round: op.can_broadcast()
                || op.can_use_rounding_control()
                || op.can_suppress_all_exceptions(),
            can_mask: op.can_use_op_mask_register(),
            can_zero: op.can_use_zeroing_masking(),
        })
    }

    /// The extensions it belongs to.
    pub fn features(&self) -> &'static [CpuidFeature] {
        self.code.cpuid_features()
    }

    /// Random bytes of this encoding: enough of them for any instruction.
    pub fn bytes(&self, r: &mut Random, bits: u32) -> Vec<u8> {
        let mut b = Vec::with_capacity(32);
        let legacy = self.kind == EncodingKind::Legacy;
        if r.once_in(if legacy { 8 } else { 24 }) {
            for _ in 0..1 + r.below(2) {
                b.push(r.pick(&PREFIXES));
            }
        }
        if r.once_in(12) {
            b.push(r.pick(&[0x64, 0x65]));
        }
        let other_address_size = if bits == 64 { 32 } else { 16 };
        if self.address_size == other_address_size || self.address_size == 0 && r.once_in(20) {
            b.push(0x67);
        }
        match self.kind {
            EncodingKind::Legacy => self.legacy(&mut b, r, bits),
            EncodingKind::EVEX => self.evex(&mut b, r, bits),
            _ => self.vex(&mut b, r, bits),
        }
        let last = b.len() - 1;
        if self.register_in_opcode {
            b[last] = b[last] & !7 | r.below(8) as u8;
        }
        if self.modrm != ModRm::None {
            b.push(self.modrm(r));
        }
        for _ in 0..TAIL {
            b.push(r.word() as u8);
        }
        b
    }

    fn modrm(&self, r: &mut Random) -> u8 {
        let mode = match self.modrm {
            ModRm::Register => 3,
            ModRm::Memory => r.below(3),
            _ if r.once_in(2) => 3,
            _ => r.below(3),
        };
        let reg = self.group.unwrap_or(r.below(8) as u8);
        let rm = self.rm_group.unwrap_or(r.below(8) as u8);
        (mode as u8) << 6 | (reg & 7) << 3 | rm & 7
    }

    fn legacy(&self, b: &mut Vec<u8>, r: &mut Random, bits: u32) {
        if self.lock && r.once_in(4) {
            b.push(0xf0);
        }
        if self.repeat && !r.once_in(3) {
            b.push(r.pick(&[0xf2, 0xf3]));
        }
        if self.operand_size == 16 {
            b.push(0x66);
        }
        match self.prefix {
            MandatoryPrefix::P66 => b.push(0x66),
            MandatoryPrefix::PF3 => b.push(0xf3),
            MandatoryPrefix::PF2 => b.push(0xf2),
            _ => {}
        }
        if bits == 64 {
            let wide = self.operand_size == 64 || self.w == Some(1) || r.once_in(16);
            let mut rex = u8::from(wide) << 3;
            if r.once_in(2) {
                rex |= r.below(8) as u8;
            }
            if rex != 0 || r.once_in(8) {
                b.push(0x40 | rex);
            }
        }
        match self.table {
            OpCodeTableKind::T0F => b.push(0x0f),
            OpCodeTableKind::T0F38 => b.extend([0x0f, 0x38]),
            OpCodeTableKind::T0F3A => b.extend([0x0f, 0x3a]),
            _ => {}
        }
        b.extend(&self.opcode);
    }

    fn pp(&self) -> u8 {
        match self.prefix {
            MandatoryPrefix::P66 => 1,
            MandatoryPrefix::PF3 => 2,
            MandatoryPrefix::PF2 => 3,
            _ => 0,
        }
    }

    /// The opcode map's number (XOP's begin at 8).
    fn map(&self) -> u8 {
        match self.table {
            OpCodeTableKind::T0F => 1,
            OpCodeTableKind::T0F38 => 2,
            OpCodeTableKind::T0F3A => 3,
            OpCodeTableKind::MAP5 => 5,
            OpCodeTableKind::MAP6 => 6,
            OpCodeTableKind::MAP8 => 8,
            OpCodeTableKind::MAP9 => 9,
            OpCodeTableKind::MAP10 => 10,
            _ => 0,
        }
    }

    /// VVVV as a register number, not inverted.
    fn vvvv(&self, r: &mut Random) -> u8 {
        if self.vvvv || r.once_in(40) {
            r.below(16) as u8
        } else {
            0
        }
    }

    fn w_and_l(&self, r: &mut Random) -> (u8, u8) {
        let odd = r.once_in(60);
        let w = self.w.filter(|_| !odd).unwrap_or(r.below(2) as u8);
        let l = self.l.filter(|_| !odd).unwrap_or(r.below(2) as u8);
        (w, l)
    }

    fn vex(&self, b: &mut Vec<u8>, r: &mut Random, bits: u32) {
        let (w, l) = self.w_and_l(r);
        let rxb = if bits == 64 { r.below(8) as u8 } else { 0 };
        let second = !self.vvvv(r) << 3 & 0x78 | (l & 1) << 2 | self.pp();
        if self.kind == EncodingKind::VEX && self.map() == 1 && w == 0 && rxb & 3 == 0 {
            b.extend([0xc5, !rxb << 5 & 0x80 | second]);
        } else {
            let lead = if self.kind == EncodingKind::VEX {
                0xc4
            } else {
                0x8f
            };
            b.extend([lead, !rxb << 5 | self.map(), w << 7 | second]);
        }
        b.extend(&self.opcode);
    }

    fn evex(&self, b: &mut Vec<u8>, r: &mut Random, bits: u32) {
        let (w, l) = self.w_and_l(r);
        // R, X, B and R', not inverted; 32-bit code has none of them.
        let high = if bits == 64 { r.below(16) as u8 } else { 0 };
        let v_high = bits == 64 && self.vvvv && r.once_in(2) || bits == 64 && r.once_in(30);
        let broadcast = if self.can_broadcast_or_round {
            r.once_in(3)
        } else {
            r.once_in(60)
        };
        let mask = match self.can_mask {
            true if !r.once_in(3) => r.below(8) as u8,
            false if r.once_in(60) => r.below(8) as u8,
            _ => 0,
        };
        let zero = if self.can_zero && mask != 0 {
            r.once_in(2)
        } else {
            r.once_in(80)
        };
        let l = if broadcast && r.once_in(2) {
            r.below(4) as u8
        } else {
            l
        };
        let p0 = !high << 4 | self.map() & 7;
        let p1 = w << 7 | !self.vvvv(r) << 3 & 0x78 | 4 | self.pp();
        let p2 = u8::from(zero) << 7
            | (l & 3) << 5
            | u8::from(broadcast) << 4
            | u8::from(!v_high) << 3
            | mask;
        b.extend([0x62, p0, p1, p2]);
        b.extend(&self.opcode);
    }
}

impl ModRm {
    fn max(self, other: Self) -> Self {
        match (self, other) {
            (a, Self::None) => a,
            (Self::None, b) => b,
            // A register beside a memory operand is in the reg field.
            (Self::Memory, _) | (_, Self::Memory) => Self::Memory,
            (Self::Any, _) | (_, Self::Any) => Self::Any,
            _ => Self::Register,
        }
    }
}

fn modrm_of(k: K) -> ModRm {
    match k {
        K::mem
        | K::mem_mpx
        | K::mem_mib
        | K::mem_vsib32x
        | K::mem_vsib64x
        | K::mem_vsib32y
        | K::mem_vsib64y
        | K::mem_vsib32z
        | K::mem_vsib64z
        | K::sibmem => ModRm::Memory,
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r32_or_mem_mpx
        | K::r64_or_mem
        | K::r64_or_mem_mpx
        | K::mm_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
        | K::zmm_or_mem
        | K::bnd_or_mem_mpx
        | K::k_or_mem => ModRm::Any,
        K::r16_rm
        | K::r32_rm
        | K::r64_rm
        | K::k_rm
        | K::mm_rm
        | K::xmm_rm
        | K::ymm_rm
        | K::zmm_rm
        | K::tmm_rm
        | K::cr_reg
        | K::dr_reg
        | K::tr_reg => ModRm::Register,
        K::r8_reg
        | K::r16_reg
        | K::r16_reg_mem
        | K::r32_reg
        | K::r32_reg_mem
        | K::r64_reg
        | K::r64_reg_mem
        | K::seg_reg
        | K::k_reg
        | K::kp1_reg
        | K::mm_reg
        | K::xmm_reg
        | K::ymm_reg
        | K::zmm_reg
        | K::bnd_reg
        | K::tmm_reg => ModRm::Register,
        _ => ModRm::None,
    }
}
