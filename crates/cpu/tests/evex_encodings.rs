//! Random bytes in EVEX's encoding space against the host: which are undefined (reserved fields,
//! masks and broadcasts where there can be none), and what the others do.

mod harness;
mod host;

use anykvm_cpu::decode;
use anykvm_cpu::state::{XsaveArea, cr4};
use harness::Computer;
use host::instances::{OPMASKS, VECTORS_512, random_state};
use host::{Random, Runner};
use iced_x86::Code;

const CODE: u64 = 0x1000;

/// A register form; no operand can be RSP, which is the host's own.
fn bytes(r: &mut Random) -> [u8; 7] {
    let register = |r: &mut Random| r.pick(&[0_u8, 1, 2, 3, 5, 6, 7]);
    let map = r.pick(&[1_u8, 1, 2, 2, 3, 3, 5, 6]);
    let modrm = 0xc0 | register(r) << 3 | register(r);
    let mut b = r.next().to_le_bytes();
    // The reserved bits of the second and third byte are mostly as they must be, and so is vvvv often.
    b[0] = b[0] & 0xf0 | map;
    if r.below(16) != 0 {
        b[1] |= 4;
    }
    if r.below(2) == 0 {
        b[1] |= 0x78;
        b[2] |= 8;
    }
    [0x62, b[0], b[1], b[2], b[3], modrm, b[4]]
}

fn computer() -> Computer {
    let mut c = Computer::long(1 << 20, CODE, 0x1_0000);
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = 0xe7;
    c.cpu.state_changed();
    c
}

/// Whether the instruction is defined on the host; its error if it is another here.
fn check(c: &mut Computer, runner: &mut Runner, r: &mut Random) -> Result<bool, String> {
    let bytes = bytes(r);
    let (before, _) = random_state(Code::EVEX_Vaddps_xmm_k1z_xmm_xmmm128b32, false, r);
    let mut expected = before.clone();
    let decoded = decode::decode(&bytes, c.cpu.mode());
    let len = decoded.as_ref().map_or(6, |insn| usize::from(insn.len));
    let mut code = bytes[..len.min(7)].to_vec();
    if decoded.is_err() {
        // NOP, or the immediate if the host has an instruction there after all.
        code.push(0x90);
    }
    let signal = runner.run(&code, &mut expected);

    let s = &mut c.cpu.state;
    for n in (0..16).filter(|n| *n != 4) {
        s.regs[n] = before.gprs[usize::from(n)];
    }
    s.set_rip(CODE + len as u64);
    s.rflags = before.flags;
    s.events = Default::default();
    s.xsave.0[..XsaveArea::PKRU].copy_from_slice(&before.xsave[..XsaveArea::PKRU]);
    let (text, defined) = match &decoded {
        Ok(insn) => (
            format!("{:?}", insn.raw.code()),
            (insn.handler)(&mut c.cpu, insn).is_ok(),
        ),
        Err(e) => (format!("{e:?}"), false),
    };
    // Where there is no rounding control in a register form EVEX.b is #UD, and where there are no masks
    // EVEX.z is (SDM Vol. 2, 2.7.11 and 2.8); there are hosts that ignore them.
    let (b, z) = (bytes[3] & 0x10 != 0, bytes[3] & 0x87 == 0x80);
    if decoded.is_err() && signal == 0 && (b || z) {
        return Ok(false);
    }
    if defined != (signal == 0) {
        return Err(format!(
            "{code:02x?} {text}: defined {defined}, on the host signal {signal}"
        ));
    }
    let s = &c.cpu.state;
    for range in [24..28, 160..416, 576..832, OPMASKS, VECTORS_512] {
        if expected.xsave[range.clone()] != s.xsave.0[range.clone()] {
            return Err(format!("{code:02x?} {text}: registers at {range:?}"));
        }
    }
    for n in (0..16).filter(|n| *n != 4) {
        if expected.gprs[usize::from(n)] != s.regs[n] {
            return Err(format!("{code:02x?} {text}: register {n}"));
        }
    }
    Ok(defined)
}

#[test]
fn reserved_encodings_are_undefined() {
    if !std::is_x86_feature_detected!("avx512bw") {
        eprintln!("not compared: the reference needs a host with AVX-512");
        return;
    }
    let (mut c, mut runner) = (computer(), Runner::new());
    let mut r = Random(0x0f1e_2d3c_4b5a_6978);
    let (mut failures, mut defined) = (Vec::new(), 0);
    for _ in 0..60_000 {
        match check(&mut c, &mut runner, &mut r) {
            Ok(d) => defined += u32::from(d),
            Err(e) => failures.push(e),
        }
        if failures.len() > 60 {
            break;
        }
    }
    println!("{defined} defined");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(defined > 1_000, "only {defined}");
}
