//! An instruction for each code of the decoder.

use iced_x86::{Code, Instruction, OpCodeOperandKind as K, OpKind, Register};

/// Some instruction of this code in 64- or 32-bit form; `None` for operands this does not make.
pub fn instance(code: Code, bits: u32) -> Option<Instruction> {
    let long = bits == 64;
    let choose = |wide, narrow| if long { wide } else { narrow };
    let mut insn = Instruction::default();
    insn.set_code(code);
    for (i, kind) in code.op_code().op_kinds().iter().enumerate() {
        let i = i as u32;
        let register = match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode | K::al => Register::AL,
            K::cl => Register::CL,
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_reg_mem | K::r16_opcode | K::ax => {
                Register::AX
            }
            K::dx => Register::DX,
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_vvvv | K::r32_opcode => Register::EAX,
            K::eax | K::r32_reg_mem | K::r32_or_mem_mpx => Register::EAX,
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_vvvv | K::r64_opcode | K::rax => {
                Register::RAX
            }
            K::r64_reg_mem | K::r64_or_mem_mpx => Register::RAX,
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM1,
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                Register::XMM1
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                Register::YMM1
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => Register::ZMM1,
            K::k_reg | K::k_rm | K::k_vvvv | K::k_or_mem | K::kp1_reg => Register::K2,
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST1,
            K::seg_reg | K::ds => Register::DS,
            K::cr_reg => Register::CR3,
            K::dr_reg => Register::DR7,
            K::es => Register::ES,
            K::cs => Register::CS,
            K::ss => Register::SS,
            K::fs => Register::FS,
            K::gs => Register::GS,
            K::bnd_reg | K::bnd_or_mem_mpx => Register::BND0,
            _ => {
                let kind = operand(&mut insn, *kind, long)?;
                insn.set_op_kind(i, kind);
                continue;
            }
        };
        insn.set_op_register(i, register);
    }
    if code.op_code().require_op_mask_register() {
        insn.set_op_mask(Register::K1);
    }
    if insn.op_kinds().any(|k| k == OpKind::Memory) && insn.memory_displ_size() == 0 {
        insn.set_memory_base(choose(Register::RSI, Register::ESI));
    }
    Some(insn)
}

/// The kind of an operand that is no register; what it needs is set in the instruction.
fn operand(insn: &mut Instruction, kind: K, long: bool) -> Option<OpKind> {
    Some(match kind {
        K::mem | K::sibmem | K::mem_mib | K::mem_mpx => OpKind::Memory,
        K::mem_offs => {
            insn.set_memory_displacement64(0x8000);
            insn.set_memory_displ_size(if long { 8 } else { 4 });
            OpKind::Memory
        }
        K::mem_vsib32x | K::mem_vsib64x => {
            insn.set_memory_index(Register::XMM3);
            OpKind::Memory
        }
        K::mem_vsib32y | K::mem_vsib64y => {
            insn.set_memory_index(Register::YMM3);
            OpKind::Memory
        }
        K::mem_vsib32z | K::mem_vsib64z => {
            insn.set_memory_index(Register::ZMM3);
            OpKind::Memory
        }
        K::imm8 | K::imm8_const_1 => {
            insn.set_immediate8(1);
            OpKind::Immediate8
        }
        K::imm8sex16 => OpKind::Immediate8to16,
        K::imm8sex32 => OpKind::Immediate8to32,
        K::imm8sex64 => OpKind::Immediate8to64,
        K::imm16 => OpKind::Immediate16,
        K::imm32 => OpKind::Immediate32,
        K::imm32sex64 => OpKind::Immediate32to64,
        K::imm64 => OpKind::Immediate64,
        K::br16_1 | K::br16_2 => OpKind::NearBranch16,
        K::br32_1 | K::br32_4 => OpKind::NearBranch32,
        K::br64_1 | K::br64_4 => OpKind::NearBranch64,
        K::seg_rSI if long => OpKind::MemorySegRSI,
        K::seg_rSI => OpKind::MemorySegESI,
        K::es_rDI if long => OpKind::MemoryESRDI,
        K::es_rDI => OpKind::MemoryESEDI,
        K::seg_rDI if long => OpKind::MemorySegRDI,
        K::seg_rDI => OpKind::MemorySegEDI,
        K::seg_rBX_al => {
            insn.set_memory_base(if long { Register::RBX } else { Register::EBX });
            insn.set_memory_index(Register::AL);
            insn.set_memory_displ_size(1);
            OpKind::Memory
        }
        _ => return None,
    })
}
