//! Native assist against the host: every computing instruction of every legacy, VEX and EVEX encoding
//! with random operands and register states must leave what the host itself leaves.

mod harness;
mod host;

use std::ops::Range;

use anykvm_cpu::decode;
use anykvm_cpu::state::{XsaveArea, cr4, rflags};
use harness::Computer;
use host::instances::{OPMASKS, VECTORS_512, encode, instance, is_quiet, random_state, served};
use host::{Random, Runner};
use iced_x86::{Code, CpuidFeature, Instruction, Register, RflagsBits};

const DATA: u64 = 0x8_0000;
const CODE: u64 = 0x1000;

/// An area of the XSAVE image that must agree, and its name.
const COMPARED: [(Range<usize>, &str); 8] = [
    (0..2, "FCW"),
    (2..4, "FSW"),
    (4..5, "FTW"),
    (24..28, "MXCSR"),
    (32..416, "registers"),
    (576..832, "YMM upper halves"),
    (OPMASKS, "opmasks"),
    (VECTORS_512, "ZMM"),
];

#[repr(align(64))]
struct Aligned([u8; 256]);

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
    if insn.is_vsib() {
        return Ok(false);
    }
    let (mut before, memory) = random_state(code, is_quiet(&insn), r);
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
    let signal = runner.run(&host_bytes, &mut expected);
    if signal != 0 {
        return Err(format!("{code:?} {bytes:02x?}: {insn}: signal {signal}"));
    }

    let s = &mut c.cpu.state;
    for n in 0..16 {
        if n != 4 {
            s.regs[n] = before.gprs[usize::from(n)];
        }
    }
    s.regs[6] = DATA;
    s.set_rip(CODE + bytes.len() as u64);
    s.rflags = before.flags;
    s.xsave.0[..XsaveArea::PKRU].copy_from_slice(&before.xsave[..XsaveArea::PKRU]);
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
    c.cpu.state.xcr0 = 0xe7;
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
    s.xcr0 = 0xe7;
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
