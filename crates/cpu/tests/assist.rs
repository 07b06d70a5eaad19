//! Native assist against the host: every computing instruction of every legacy and VEX encoding
//! with random operands and register states must leave what the host itself leaves.

mod harness;
mod host;

use anykvm_cpu::decode;
use anykvm_cpu::state::{XsaveArea, cr4, rflags};
use harness::Computer;
use host::{Random, Registers, Runner};
use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register, RflagsBits,
};

const DATA: u64 = 0x8_0000;
const CODE: u64 = 0x1000;

/// A random instruction of this code with its memory operand at [RSI]; `None` if the code has
/// operands that assist does not serve.
fn instance(code: Code, bits: u32, r: &mut Random) -> Option<Instruction> {
    // Not RSP, which is the host's own in the reference, nor RSI, the base; RDI is an ordinary one.
    const GPRS: [u32; 14] = [0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut insn = Instruction::default();
    insn.set_code(code);
    for (i, kind) in code.op_code().op_kinds().iter().enumerate() {
        let i = i as u32;
        let in_memory = r.below(2) == 0;
        let (gpr, vector) = if bits == 64 {
            (r.pick(&GPRS), r.below(16) as u32)
        } else {
            (r.pick(&GPRS[..6]), r.below(8) as u32)
        };
        let register = match kind {
            K::mem => None,
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
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
    Some(insn)
}

/// Codes that assist serves and whose result is a function of their operands.
fn served(code: Code) -> bool {
    use CpuidFeature as F;
    let op = code.op_code();
    let features = code.cpuid_features();
    let mine = [
        F::ADX,
        F::AES,
        F::AVX,
        F::AVX2,
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
        && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
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

fn random_state(code: Code, r: &mut Random) -> (Registers, [u8; 256]) {
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
    for at in (160..416).chain(576..832).step_by(8) {
        let v = r.number();
        x[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
    for st in 0..8 {
        x[32 + st * 16..][..10].copy_from_slice(&r.extended());
    }
    // All exceptions masked for SIMD; x87 runs with any mask.
    let mxcsr = 0x1f80 | r.next() as u32 & 0xe07f;
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
    x[512] = 7;
    let mut memory = [0; 256];
    for m in memory.chunks_exact_mut(8) {
        m.copy_from_slice(&r.number().to_le_bytes());
    }
    if is_x87(code) {
        memory[64..74].copy_from_slice(&r.extended());
    }
    (s, memory)
}

/// An area of the XSAVE image that must agree, and its name.
const COMPARED: [(std::ops::Range<usize>, &str); 6] = [
    (0..2, "FCW"),
    (2..4, "FSW"),
    (4..5, "FTW"),
    (24..28, "MXCSR"),
    (32..416, "registers"),
    (576..832, "YMM upper halves"),
];

#[repr(align(64))]
struct Aligned([u8; 256]);

fn encode(insn: &Instruction, bits: u32) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(insn, 0).ok()?;
    Some(encoder.take_buffer())
}

fn check(
    c: &mut Computer,
    runner: &mut Runner,
    code: Code,
    bits: u32,
    r: &mut Random,
) -> Result<bool, String> {
    let Some(insn) = instance(code, bits, r) else {
        return Ok(false);
    };
    let Some(bytes) = encode(&insn, bits) else {
        return Ok(false);
    };
    let (mut before, memory) = random_state(code, r);
    // 32-bit code is compared with its 64-bit form.
    let mut host_form = insn;
    if bits == 32 {
        before.gprs.iter_mut().for_each(|g| *g &= 0xffff_ffff);
        if insn.memory_base() != Register::None {
            host_form.set_memory_base(Register::RSI);
        }
    }
    let Some(host_bytes) = encode(&host_form, 64) else {
        return Ok(false);
    };

    let mut expected = before.clone();
    let mut host_memory = Aligned(memory);
    expected.gprs[6] = host_memory.0.as_mut_ptr() as u64;
    runner.run(&host_bytes, &mut expected);

    let s = &mut c.cpu.state;
    for n in 0..16 {
        if n != 4 {
            s.regs[n] = before.gprs[usize::from(n)];
        }
    }
    s.regs[6] = DATA;
    s.set_rip(CODE + bytes.len() as u64);
    s.rflags = before.flags;
    s.xsave.0[..XsaveArea::OPMASK].copy_from_slice(&before.xsave[..XsaveArea::OPMASK]);
    c.memory.write(DATA, &memory).unwrap();
    let text = format!("{code:?} {bytes:02x?}: {insn}");
    let decoded = decode::decode(&bytes, c.cpu.mode()).map_err(|e| format!("{text}: {e:?}"))?;
    if let Err(stop) = (decoded.handler)(&mut c.cpu, &decoded) {
        return Err(format!("{text}: {stop:?}"));
    }

    let mut guest_memory = [0; 256];
    c.memory.read(DATA, &mut guest_memory).unwrap();
    if guest_memory != host_memory.0 {
        return Err(format!(
            "{text}: memory\n host {:x?}\n here {guest_memory:x?}",
            host_memory.0
        ));
    }
    let s = &c.cpu.state;
    for n in (0..16u8).filter(|n| ![4, 6].contains(n)) {
        let want = expected.gprs[usize::from(n)];
        if s.regs[n] != want {
            return Err(format!(
                "{text}: register {n}: host {want:x}, here {:x}",
                s.regs[n]
            ));
        }
    }
    if (s.rflags ^ expected.flags) & defined_flags(&insn) != 0 {
        return Err(format!(
            "{text}: flags: host {:x}, here {:x}",
            expected.flags, s.rflags
        ));
    }
    for (range, name) in COMPARED {
        let (want, have) = (&expected.xsave[range.clone()], &s.xsave.0[range.clone()]);
        if want != have {
            let at = range.start + want.iter().zip(have).position(|(a, b)| a != b).unwrap();
            return Err(format!(
                "{text}: {name} at {at}: before {:02x?}\n host {want:02x?}\n here {have:02x?}",
                &before.xsave[range]
            ));
        }
    }
    Ok(true)
}

/// Flags that must agree. What BMI leaves undefined does not: it is not run on the host.
fn defined_flags(insn: &Instruction) -> u64 {
    const MAP: [(u32, u64); 6] = [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ];
    let bmi = insn.cpuid_features().iter().any(|f| {
        matches!(
            f,
            CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::LZCNT | CpuidFeature::POPCNT
        )
    });
    let undefined = if bmi { insn.rflags_undefined() } else { 0 };
    MAP.iter()
        .filter(|(i, _)| undefined & i == 0)
        .fold(0, |all, (_, f)| all | f)
}

fn computer() -> Computer {
    let mut c = Computer::long(1 << 20, CODE, 0x10_000);
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = 7;
    c.cpu.state_changed();
    c
}

#[test]
fn every_instruction_agrees_with_the_host() {
    compare_all(computer(), 64, 900);
}

#[test]
fn in_32_bit_code_too() {
    let mut c = Computer::protected(1 << 20, CODE as u32);
    let s = &mut c.cpu.state;
    s.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
    s.xcr0 = 7;
    c.cpu.state_changed();
    compare_all(c, 32, 800);
}

/// Compares instances of every code; at least `enough` codes must be among them.
fn compare_all(mut c: Computer, bits: u32, enough: usize) {
    if !std::is_x86_feature_detected!("avx2") {
        eprintln!("not compared: the reference needs a host with AVX2");
        return;
    }
    let mut runner = Runner::new();
    let mut r = Random(0x1234_5678_9abc_def1);
    let (mut codes, mut failures) = (0, Vec::new());
    for code in Code::values().filter(|c| served(*c)) {
        let mut compared = false;
        // VZEROUPPER and VZEROALL reach only eight registers in 32-bit code.
        if bits == 32 && matches!(code, Code::VEX_Vzeroupper | Code::VEX_Vzeroall) {
            continue;
        }
        for _ in 0..40 {
            match check(&mut c, &mut runner, code, bits, &mut r) {
                Ok(done) => compared |= done,
                Err(e) => {
                    failures.push(e);
                    compared = true;
                    break;
                }
            }
        }
        if compared {
            codes += 1;
        } else {
            println!("not compared: {code:?}");
        }
    }
    println!("{codes} codes");
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(codes > enough, "only {codes} codes were compared");
}
