//! The renaming of an instruction's operands to a stub's own registers.

use iced_x86::{CodeSize, Encoder, Instruction, Mnemonic, OpKind, Register};

use super::frame::GPRS;
use super::plan::{FRAME, HIGH_BYTE};

/// General registers explicit operands are renamed to. No instruction uses one of them implicitly,
/// and a stub may clobber them.
const GPR_POOL: [Register; GPRS] = [Register::R8, Register::R9, Register::R10, Register::R11];

/// Which guest registers the renamed operands stand for, in order of appearance. A guest register
/// that is named twice gets two names: an instruction writes only one of its operands, and so forms
/// that differ in which operands coincide share one stub.
#[derive(Default)]
pub struct Names {
    /// Of the vector registers from 1 up; XMM0 is left for implicit use.
    vectors: Vec<u8>,
    /// Of [`GPR_POOL`].
    gprs: Vec<u8>,
    /// Of the opmask registers from 1 up.
    opmasks: Vec<u8>,
    /// Which of these is the write mask, counted from 0.
    pub write_mask: Option<u8>,
}

impl Names {
    /// The instruction with registers renamed and its memory operand in the frame.
    pub fn apply(raw: &Instruction) -> Option<(Instruction, Self)> {
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
        names.mask(raw, &mut insn);
        Some((insn, names))
    }

    /// Gives the instruction a write mask if it can have one: without one in the guest's form it
    /// stands for all ones (register 0), so that both forms share a stub. A broadcast is done when
    /// the operand is put into the frame.
    fn mask(&mut self, raw: &Instruction, insn: &mut Instruction) {
        insn.set_is_broadcast(false);
        let n = self.opmasks.len() as u8;
        insn.set_op_mask(Register::K1 + u32::from(n));
        if raw.op_mask() != Register::None {
            self.opmasks.push(raw.op_mask().number() as u8);
        } else if Encoder::new(64).encode(insn, 0).is_ok() {
            self.opmasks.push(0);
        } else {
            insn.set_op_mask(Register::None);
            return;
        }
        self.write_mask = Some(n);
    }

    fn rename(&mut self, r: Register) -> Option<Register> {
        if r.is_vector_register() {
            self.vectors.push(r.number() as u8);
            return Some(r.base() + self.vectors.len() as u32);
        }
        if r.is_k() {
            self.opmasks.push(r.number() as u8);
            return Some(Register::K0 + self.opmasks.len() as u32);
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
    pub fn guest_vector(&self, host: u8) -> u8 {
        let at = usize::from(host).checked_sub(1);
        at.and_then(|at| self.vectors.get(at)).map_or(host, |g| *g)
    }

    /// The guest register an opmask register stands for; 0 for a write mask that is none.
    pub fn guest_opmask(&self, host: u8) -> Option<u8> {
        let at = usize::from(host).checked_sub(1)?;
        self.opmasks.get(at).copied()
    }

    /// The guest register a general register stands for.
    pub fn guest_gpr(&self, host: Register) -> Option<u8> {
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
