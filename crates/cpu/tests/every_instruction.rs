//! Every instruction the decoder knows either has a handler or is #UD, and no bytes and no state
//! make a handler panic or a stub fault.

mod harness;

use anykvm_cpu::decode::{self, DecodeError};
use anykvm_cpu::state::{XsaveArea, cr4, reg};
use harness::Computer;
use iced_x86::{Code, Encoder, Instruction, OpCodeOperandKind as K, OpKind, Register};

/// Some instruction of this code in 64- or 32-bit form; `None` for operands this does not make.
fn instance(code: Code, bits: u32) -> Option<Instruction> {
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

fn computers() -> [Computer; 3] {
    let mut all = [
        Computer::long(1 << 20, 0x1000, 0x10_000),
        Computer::protected(1 << 20, 0x1000),
        Computer::real(1 << 20, 0x1000),
    ];
    for c in &mut all {
        c.cpu.state.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
        c.cpu.state.xcr0 = 0xe7;
        c.cpu.state_changed();
    }
    all
}

#[test]
fn every_instruction_has_a_handler() {
    let [long, protected, _] = computers();
    let mut missing = Vec::new();
    let mut tried = 0;
    for (c, bits) in [(&long, 64), (&protected, 32)] {
        for code in Code::values().filter(|c| c.op_code().is_instruction()) {
            let mut encoder = Encoder::new(bits);
            let encoded = instance(code, bits).is_some_and(|i| encoder.encode(&i, 0).is_ok());
            if !encoded {
                continue;
            }
            let mut bytes = encoder.take_buffer();
            bytes.resize(15, 0);
            tried += 1;
            if let Err(DecodeError::Unimplemented(insn)) = decode::decode(&bytes, c.cpu.mode()) {
                missing.push(format!("{bits}: {:?}", insn.code()));
            }
        }
    }
    assert!(tried > 8000, "only {tried} were tried");
    assert!(missing.is_empty(), "no handler: {}", missing.join(", "));
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn pick(&mut self, of: &[u8]) -> u8 {
        of[(self.next() % of.len() as u64) as usize]
    }
}

/// Random bytes that mostly are instructions of the two-byte maps, VEX, EVEX and x87.
fn bytes(r: &mut Random) -> [u8; 15] {
    let mut b: [u8; 15] = std::array::from_fn(|_| r.next() as u8);
    let mut at = 0;
    for _ in 0..r.next() % 3 {
        b[at] = r.pick(&[0x66, 0xf2, 0xf3, 0x67, 0x48, 0x41, 0x2e, 0xf0]);
        at += 1;
    }
    match r.next() % 8 {
        0 => b[at] = 0x0f,
        1 => {
            b[at] = 0x0f;
            b[at + 1] = r.pick(&[0x38, 0x3a, 0xae, 0xc7]);
        }
        2 => b[at] = 0xc5,
        3 => {
            b[at] = 0xc4;
            b[at + 1] = b[at + 1] & 0xe0 | r.pick(&[1, 2, 3]);
        }
        4 => b[at] = 0xd8 | r.next() as u8 & 7,
        5 | 6 => {
            b[at] = 0x62;
            b[at + 1] = b[at + 1] & 0xf0 | r.pick(&[1, 2, 3]);
            b[at + 2] |= 4;
            // Mostly not all of the reserved field wrong, and an opcode and operand behind.
            if r.next().is_multiple_of(2) {
                b[at + 5] = b[at + 5] & 0x3f | 0x40;
            }
        }
        _ => {}
    }
    if r.next().is_multiple_of(2) {
        // A memory operand with a base and a byte of displacement.
        b[at + 2] = b[at + 2] & 0x3f | 0x40;
    }
    b
}

#[test]
fn no_bytes_and_no_state_are_too_much() {
    let mut all = computers();
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    let mut completed = 0;
    for _ in 0..300_000 {
        let c = &mut all[(r.next() % 3) as usize];
        let bytes = bytes(&mut r);
        let s = &mut c.cpu.state;
        for n in 0..16u8 {
            s.regs[n] = match r.next() % 4 {
                0 => r.next(),
                // Around the end of RAM, anywhere in a page, and aligned.
                1 => 0xf_fff0 + r.next() % 32,
                2 => 0x8_0000 + r.next() % 4096,
                _ => 0x8_0000 + r.next() % 64 * 64,
            };
        }
        s.regs[reg::RIP] = 0x1000;
        s.rflags = 2 | r.next() & 0xcd5;
        if r.next().is_multiple_of(4) {
            s.xsave.0[..XsaveArea::PKRU]
                .iter_mut()
                .for_each(|b| *b = r.next() as u8);
            // MXCSR has no more bits than these.
            s.xsave.0[26..28].fill(0);
            s.xsave.0[512..576].fill(0);
        }
        if let Ok(insn) = decode::decode(&bytes, c.cpu.mode()) {
            completed += u32::from((insn.handler)(&mut c.cpu, &insn).is_ok());
        }
    }
    assert!(completed > 50_000, "only {completed} completed");
}
