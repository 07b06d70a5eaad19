//! What is different in 32-bit code, of compatibility mode and of protected mode: when it is translated at
//! all, which segments need no checks, and encodings that 64-bit code does not have.
//!
//! Only code with flat CS, SS, DS and ES is translated. FS and GS may have any base: the sum has 32 bits.
//! General registers live where those of 64-bit code do. Their upper halves, which such code cannot see,
//! become zero when a register's lower half is written.

use anykvm_cpu::mode::Mode;
use anykvm_cpu::state::Segment;
use anykvm_cpu::{Cpu, Insn};
use iced_x86::{Code, CodeSize, IcedError, MemoryOperand, Register};

use crate::asm::Asm;

/// Whether code of this mode is translated.
pub(crate) fn translates(mode: Mode) -> bool {
    mode.code64()
        || mode.bits() == 32
            && mode.stack_bits() == 32
            && mode.flat()
            && mode.protected()
            && !mode.virtual_8086()
}

/// The address-space number for accesses of 32-bit code through FS or GS: one that no TLB entry has, unless
/// the segment reaches over all 4 GiB and may be read and written.
pub(crate) fn asn_of_segment(cpu: &Cpu, n: u8) -> u64 {
    let s = &cpu.state.seg[usize::from(n)];
    let present = s.attr & (Segment::P | Segment::S) == Segment::P | Segment::S && !s.unusable();
    // Writable data, not expand-down.
    let whole = present && s.kind() & 0b1110 == 0b0010 && s.limit == u32::MAX;
    cpu.address_space() | u64::from(!whole) << 63
}

/// The size of what code works with unless it says otherwise: addresses, the stack's entries, the instruction
/// pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// 64-bit code.
    Quad,
    /// 32-bit code.
    Double,
}

impl Word {
    /// That of the code an instruction is from.
    pub fn of(insn: &Insn) -> Self {
        match insn.raw.code_size() {
            CodeSize::Code64 => Self::Quad,
            _ => Self::Double,
        }
    }
    /// Its size.
    pub fn bytes(self) -> i64 {
        match self {
            Self::Quad => 8,
            Self::Double => 4,
        }
    }
    /// A number of this size as a signed one.
    pub fn sign_extend(self, n: u64) -> i64 {
        match self {
            Self::Quad => n as i64,
            Self::Double => i64::from(n as i32),
        }
    }
    fn part(self, r: Register) -> Register {
        match self {
            Self::Quad => r,
            Self::Double => low_half(r),
        }
    }
    /// Loads a word.
    pub fn load(self, a: &mut Asm, to: Register, from: MemoryOperand) -> Result<(), IcedError> {
        let code = match self {
            Self::Quad => Code::Mov_r64_rm64,
            Self::Double => Code::Mov_r32_rm32,
        };
        a.emit(code, self.part(to), from)
    }
    /// Stores a word.
    pub fn store(self, a: &mut Asm, to: MemoryOperand, from: Register) -> Result<(), IcedError> {
        let code = match self {
            Self::Quad => Code::Mov_rm64_r64,
            Self::Double => Code::Mov_rm32_r32,
        };
        a.emit(code, to, self.part(from))
    }
    /// Moves a word.
    pub fn mov(self, a: &mut Asm, to: Register, from: Register) -> Result<(), IcedError> {
        let code = match self {
            Self::Quad => Code::Mov_r64_rm64,
            Self::Double => Code::Mov_r32_rm32,
        };
        a.emit(code, self.part(to), self.part(from))
    }
    /// LEA with a result of this size.
    pub fn lea(self, a: &mut Asm, to: Register, from: MemoryOperand) -> Result<(), IcedError> {
        let code = match self {
            Self::Quad => Code::Lea_r64_m,
            Self::Double => Code::Lea_r32_m,
        };
        a.emit(code, self.part(to), from)
    }
}

/// The 32-bit register in a 64-bit one.
pub(crate) fn low_half(r: Register) -> Register {
    Register::EAX + r.number() as u32
}

/// The encoding with a ModRM byte of one that 64-bit code does not have. `None` if there is none.
pub(crate) fn general(code: Code) -> Option<Code> {
    use Code as C;
    Some(match code {
        C::Inc_r16 => C::Inc_rm16,
        C::Inc_r32 => C::Inc_rm32,
        C::Dec_r16 => C::Dec_rm16,
        C::Dec_r32 => C::Dec_rm32,
        C::Add_rm8_imm8_82 => C::Add_rm8_imm8,
        C::Or_rm8_imm8_82 => C::Or_rm8_imm8,
        C::Adc_rm8_imm8_82 => C::Adc_rm8_imm8,
        C::Sbb_rm8_imm8_82 => C::Sbb_rm8_imm8,
        C::And_rm8_imm8_82 => C::And_rm8_imm8,
        C::Sub_rm8_imm8_82 => C::Sub_rm8_imm8,
        C::Xor_rm8_imm8_82 => C::Xor_rm8_imm8,
        C::Cmp_rm8_imm8_82 => C::Cmp_rm8_imm8,
        C::Mov_r32_cr | C::Mov_r32_dr | C::Mov_r32_tr => return None,
        C::Mov_cr_r32 | C::Mov_dr_r32 | C::Mov_tr_r32 => return None,
        C::Cmpxchg486_rm8_r8 | C::Cmpxchg486_rm16_r16 | C::Cmpxchg486_rm32_r32 => return None,
        c => c,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a translation is made of can be encoded for the host.
    #[test]
    fn encodings_exist_in_64_bit_code() {
        let mut without = Vec::new();
        for code in Code::values() {
            let op = code.op_code();
            let i = &mut iced_x86::Instruction::default();
            i.set_code(code);
            if op.mode32() && crate::simple::level(i).is_some() {
                let host = general(code);
                if host.is_some_and(|h| !h.op_code().mode64()) {
                    without.push(code);
                }
            }
        }
        assert_eq!(without, []);
    }
}
