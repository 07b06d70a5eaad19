//! What native assist and the x87 handlers raise, and what they leave behind when they do.

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::state::{XsaveArea, cr0, cr4, reg};
use harness::Computer;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x8_0000;
const HANDLERS: u64 = 0x6000;
const UD: u64 = 6;
const NM: u64 = 7;
const GP: u64 = 13;
const PF: u64 = 14;
const MF: u64 = 16;
const XM: u64 = 19;

fn computer() -> Computer {
    let mut c = Computer::long(1 << 20, CODE, 0x10_000);
    c.catch_events();
    // A gate's own code for each vector, so that the address tells it.
    for v in 0..32 {
        let at = HANDLERS + v * 4;
        c.put64(0x2_0000 + v * 16, at | 8 << 16 | 1 << 32 | 0x8e00 << 32);
        c.put(at, &[0xe6, 0x99]);
    }
    c.cpu.state.cr4 |= cr4::OSXSAVE;
    c.cpu.state.xcr0 = 7;
    c.cpu.state.regs[reg::RSI] = DATA;
    c.cpu.state_changed();
    c
}

/// Runs the code, which ends with HLT, from a fresh processor state; the vector it raised.
fn raised(c: &mut Computer, code: &[u8]) -> Option<u64> {
    let mut bytes = code.to_vec();
    bytes.push(0xf4);
    c.put(CODE, &bytes);
    c.cpu.state.set_rip(CODE);
    c.cpu.state.events = Default::default();
    c.cpu.state_changed();
    match c.run() {
        Exit::Hlt => None,
        Exit::Io { .. } => Some((c.cpu.state.rip() - HANDLERS) / 4),
        other => panic!("{other:?}"),
    }
}

fn set_xmm(c: &mut Computer, n: usize, v: [f32; 4]) {
    for (i, f) in v.iter().enumerate() {
        let at = XsaveArea::XMM + n * 16 + i * 4;
        c.cpu.state.xsave.set_u32(at, f.to_bits());
    }
}

const DIVPS_0_1: [u8; 3] = [0x0f, 0x5e, 0xc1];
const MULPS_0_1: [u8; 3] = [0x0f, 0x59, 0xc1];

#[test]
fn unmasked_simd_exceptions_commit_nothing_but_flags() {
    let mut c = computer();
    set_xmm(&mut c, 0, [1.0, 0.0, 1.0, 3.0]);
    set_xmm(&mut c, 1, [0.0, 0.0, 3.0, 7.0]);
    // Division by zero unmasked; the division of the third element would be inexact.
    c.cpu
        .state
        .xsave
        .set_u32(XsaveArea::MXCSR, 0x1f80 & !(1 << 9));
    let before = c.cpu.state.xsave;
    assert_eq!(raised(&mut c, &DIVPS_0_1), Some(XM));
    let after = &c.cpu.state.xsave;
    assert_eq!(after.0[160..416], before.0[160..416]);
    // Invalid (0/0) and divide by zero; not precision, which is found later than those.
    assert_eq!(after.u32(XsaveArea::MXCSR) & 0x3f, 0b101);

    c.cpu.state.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(raised(&mut c, &DIVPS_0_1), Some(UD));
}

#[test]
fn a_tiny_exact_result_is_an_unmasked_underflow() {
    let mut c = computer();
    let smallest = f32::from_bits(0x0080_0000);
    set_xmm(&mut c, 0, [smallest, 1.0, 1.0, 1.0]);
    set_xmm(&mut c, 1, [0.5, 1.0, 1.0, 1.0]);
    assert_eq!(raised(&mut c, &MULPS_0_1), None);
    assert_eq!(c.cpu.state.xsave.u32(XsaveArea::MXCSR) & 0x3f, 0);
    assert_eq!(c.cpu.state.xsave.u32(XsaveArea::XMM), 0x0040_0000);

    set_xmm(&mut c, 0, [smallest, 1.0, 1.0, 1.0]);
    c.cpu
        .state
        .xsave
        .set_u32(XsaveArea::MXCSR, 0x1f80 & !(1 << 11));
    assert_eq!(raised(&mut c, &MULPS_0_1), Some(XM));
    assert_ne!(c.cpu.state.xsave.u32(XsaveArea::MXCSR) & 1 << 4, 0);
    assert_eq!(c.cpu.state.xsave.u32(XsaveArea::XMM), smallest.to_bits());
}

#[test]
fn availability() {
    const ADDPS: &[u8] = &[0x0f, 0x58, 0xc1];
    const VADDPS: &[u8] = &[0xc5, 0xf8, 0x58, 0xc1];
    const PADDB_MMX: &[u8] = &[0x0f, 0xfc, 0xc1];
    const FLD1: &[u8] = &[0xd9, 0xe8];
    const WAIT: &[u8] = &[0x9b];
    const ANDN: &[u8] = &[0xc4, 0xe2, 0xf8, 0xf2, 0xc1];
    const EVEX_ADDPS: &[u8] = &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1];
    const KMOVW: &[u8] = &[0xc5, 0xf8, 0x90, 0xca];
    let with = |cr0_bits: u64, cr4_off: u64, xcr0: u64, code: &[u8]| {
        let mut c = computer();
        c.cpu.state.cr0 |= cr0_bits;
        c.cpu.state.cr4 &= !cr4_off;
        c.cpu.state.xcr0 = xcr0;
        raised(&mut c, code)
    };
    let all: [&[u8]; 6] = [ADDPS, VADDPS, PADDB_MMX, FLD1, WAIT, ANDN];
    for code in all {
        assert_eq!(with(0, 0, 7, code), None, "{code:x?}");
    }
    if std::is_x86_feature_detected!("avx512bw") {
        for code in [EVEX_ADDPS, KMOVW] {
            assert_eq!(with(0, 0, 0xe7, code), None, "{code:x?}");
            assert_eq!(with(0, 0, 7, code), Some(UD), "{code:x?}");
            assert_eq!(with(cr0::EM, 0, 0xe7, code), None, "{code:x?}");
            assert_eq!(with(cr0::TS, 0, 0xe7, code), Some(NM), "{code:x?}");
            assert_eq!(with(cr0::TS, 0, 7, code), Some(UD), "{code:x?}");
            assert_eq!(with(0, cr4::OSXSAVE, 0xe7, code), Some(UD), "{code:x?}");
            // With LOCK.
            assert_eq!(with(0, 0, 0xe7, &[&[0xf0], code].concat()), Some(UD));
        }
    } else {
        assert_eq!(with(0, 0, 0xe7, EVEX_ADDPS), Some(UD));
    }
    for (code, em, ts) in [
        (ADDPS, Some(UD), Some(NM)),
        (VADDPS, None, Some(NM)),
        (PADDB_MMX, Some(UD), Some(NM)),
        (FLD1, Some(NM), Some(NM)),
        (WAIT, None, None),
        (ANDN, None, None),
    ] {
        assert_eq!(with(cr0::EM, 0, 7, code), em, "EM {code:x?}");
        assert_eq!(with(cr0::TS, 0, 7, code), ts, "TS {code:x?}");
    }
    assert_eq!(with(cr0::TS | cr0::MP, 0, 7, WAIT), Some(NM));
    assert_eq!(with(0, cr4::OSFXSR, 7, ADDPS), Some(UD));
    assert_eq!(with(0, cr4::OSFXSR, 7, PADDB_MMX), None);
    assert_eq!(with(0, cr4::OSXSAVE, 7, VADDPS), Some(UD));
    assert_eq!(with(0, 0, 3, VADDPS), Some(UD));
}

#[test]
fn alignment_of_memory_operands() {
    let mut c = computer();
    // [rsi+1]: movaps, addps, movups; vaddps, vmovaps; pcmpistri, which takes any address.
    assert_eq!(raised(&mut c, &[0x0f, 0x28, 0x46, 1]), Some(GP));
    assert_eq!(raised(&mut c, &[0x0f, 0x58, 0x46, 1]), Some(GP));
    assert_eq!(raised(&mut c, &[0x0f, 0x10, 0x46, 1]), None);
    assert_eq!(raised(&mut c, &[0xc5, 0xf8, 0x58, 0x46, 1]), None);
    assert_eq!(raised(&mut c, &[0xc5, 0xf8, 0x28, 0x46, 1]), Some(GP));
    assert_eq!(raised(&mut c, &[0xc5, 0xfc, 0x28, 0x46, 16]), Some(GP));
    assert_eq!(raised(&mut c, &[0x66, 0x0f, 0x3a, 0x63, 0x46, 1, 0]), None);
}

#[test]
fn a_fault_on_the_operand_leaves_no_trace() {
    let mut c = computer();
    // Not mapped: the tables cover 2 MiB.
    c.cpu.state.regs[reg::RSI] = 0x20_0000 - 8;
    c.cpu.state.xsave.set_u16(0, 0x37f);
    let before = c.cpu.state.xsave;
    for code in [
        // movups xmm0, [rsi]; movups [rsi], xmm0; fsave [rsi]; fld tbyte [rsi]; fistp qword [rsi+1];
        // vcvtps2ph [rsi+1], xmm0, 0.
        &[0x0f, 0x10, 0x06][..],
        &[0x0f, 0x11, 0x06],
        &[0xdd, 0x36],
        &[0xdb, 0x2e],
        &[0xdf, 0x7e, 0x01],
        &[0xc4, 0xe3, 0x79, 0x1d, 0x46, 1, 0],
    ] {
        assert_eq!(raised(&mut c, code), Some(PF), "{code:x?}");
        assert_eq!(c.cpu.state.xsave, before, "{code:x?}");
    }
}

#[test]
fn x87_exceptions_wait_for_the_next_waiting_instruction() {
    let mut c = computer();
    // fninit; unmask division by zero; fldz; fld1; fdiv st0, st1: pending. fnstsw ax does not wait.
    c.put(DATA, &0x37b_u16.to_le_bytes());
    let divide = [
        0xdb, 0xe3, 0xd9, 0x2e, 0xd9, 0xee, 0xd9, 0xe8, 0xd8, 0xf1, 0xdf, 0xe0,
    ];
    assert_eq!(raised(&mut c, &divide), None);
    let fsw = c.reg(reg::RAX) as u16;
    assert_eq!(fsw & 0x80ff, 0x8084, "ES, B and ZE");
    // The operands are still there: st0 = 1.
    assert_eq!(c.cpu.state.xsave.u64(32), 1 << 63);
    for waiting in [
        &[0x9b][..],
        &[0xd9, 0xe8],
        &[0x0f, 0xfc, 0xc1],
        &[0xd9, 0x2e],
    ] {
        assert_eq!(raised(&mut c, waiting), Some(MF), "{waiting:x?}");
    }
    // fnclex, then anything.
    assert_eq!(raised(&mut c, &[0xdb, 0xe2, 0xd9, 0xe8]), None);
    // fnsave [rsi] stores the pointers: of FDIV, CODE + 8, opcode 0f1.
    assert_eq!(raised(&mut c, &divide), None);
    assert_eq!(raised(&mut c, &[0xdd, 0x36]), None);
    assert_eq!(c.get64(DATA + 12) & 0xffff_ffff, CODE + 8);
    assert_eq!(c.get64(DATA + 16) >> 16 & 0x7ff, 0x0f1);
}

#[test]
fn an_unmasked_exception_withholds_the_store() {
    let mut c = computer();
    // fninit; unmask overflow; fld tbyte [rsi+16] (too large for 32 bits); fstp dword [rsi+32].
    c.put(DATA, &0x377_u16.to_le_bytes());
    c.put64(DATA + 16, 1 << 63);
    c.put64(DATA + 24, 0x5fff);
    c.put64(DATA + 32, 0x1234_5678);
    let code = [0xdb, 0xe3, 0xd9, 0x2e, 0xdb, 0x6e, 16, 0xd9, 0x5e, 32];
    assert_eq!(raised(&mut c, &code), None);
    assert_eq!(c.get64(DATA + 32), 0x1234_5678);
    assert_eq!(raised(&mut c, &[0x9b]), Some(MF));
    // Masked, it is infinity.
    c.put(DATA, &0x37f_u16.to_le_bytes());
    assert_eq!(raised(&mut c, &code), None);
    assert_eq!(c.get64(DATA + 32), 0x7f80_0000);
}

#[test]
fn environments_are_restored() {
    let mut c = computer();
    // fninit; fld1; fldpi; fdecstp; fnstenv [rsi]; fninit; fldenv [rsi]; fnstenv [rsi+64].
    let code = [
        0xdb, 0xe3, 0xd9, 0xe8, 0xd9, 0xeb, 0xd9, 0xf6, 0xd9, 0x36, 0xdb, 0xe3, 0xd9, 0x26, 0xd9,
        0x76, 64,
    ];
    assert_eq!(raised(&mut c, &code), None);
    for at in (0..24).step_by(8) {
        assert_eq!(c.get64(DATA + at), c.get64(DATA + 64 + at), "at {at}");
    }
    // TOP 5; registers 6 and 7 in use, both valid.
    assert_eq!(c.get64(DATA) >> 32 & 0x3800, 5 << 11);
    assert_eq!(c.get64(DATA + 8) & 0xffff, 0x0fff);
    // Registers stay in place: st1 is pi still (TOP 5, so register 6 is st1).
    assert_eq!(c.cpu.state.xsave.u64(32 + 16), 0xc90f_daa2_2168_c235);
}

#[test]
fn masked_moves_touch_only_what_is_selected() {
    let mut c = computer();
    // The first element only, at the end of the mapped space: vmaskmovps [rsi], xmm0, xmm1 and back.
    c.cpu.state.regs[reg::RSI] = 0x10_0000 - 4;
    set_xmm(&mut c, 0, [-1.0, 1.0, 1.0, 1.0]);
    set_xmm(&mut c, 1, [7.0, 7.0, 7.0, 7.0]);
    assert_eq!(raised(&mut c, &[0xc4, 0xe2, 0x79, 0x2e, 0x0e]), None);
    assert_eq!(c.get64(0x10_0000 - 8) >> 32, u64::from(7.0_f32.to_bits()));
    assert_eq!(raised(&mut c, &[0xc4, 0xe2, 0x79, 0x2c, 0x16]), None);
    let xmm2 = XsaveArea::XMM + 32;
    assert_eq!(c.cpu.state.xsave.u32(xmm2), 7.0_f32.to_bits());
    assert_eq!(c.cpu.state.xsave.u32(xmm2 + 4), 0);
}

#[test]
fn a_gather_goes_on_after_a_fault() {
    let mut c = computer();
    // vpgatherdd xmm0, [rsi+xmm1*4], xmm2: the third element is not mapped.
    let gather = [0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8e];
    c.put64(DATA, 0x2222_2222_1111_1111);
    c.put64(DATA + 8, 0x4444_4444_3333_3333);
    let index = XsaveArea::XMM + 16;
    for (i, v) in [0_u32, 1, 0x80_0000, 3].into_iter().enumerate() {
        c.cpu.state.xsave.set_u32(index + i * 4, v);
        c.cpu.state.xsave.set_u32(index + 16 + i * 4, u32::MAX);
    }
    assert_eq!(raised(&mut c, &gather), Some(PF));
    let x = &mut c.cpu.state.xsave;
    let words =
        |x: &XsaveArea, at: usize| -> [u32; 4] { std::array::from_fn(|i| x.u32(at + i * 4)) };
    assert_eq!(words(x, XsaveArea::XMM)[..2], [0x1111_1111, 0x2222_2222]);
    assert_eq!(words(x, index + 16), [0, 0, u32::MAX, u32::MAX]);
    x.set_u32(index + 8, 2);
    assert_eq!(raised(&mut c, &gather), None);
    let x = &c.cpu.state.xsave;
    assert_eq!(
        words(x, XsaveArea::XMM),
        [0x1111_1111, 0x2222_2222, 0x3333_3333, 0x4444_4444]
    );
    assert_eq!(words(x, index + 16), [0; 4]);
}

#[test]
fn a_scatter_stores_to_devices_before_it_faults() {
    if !std::is_x86_feature_detected!("avx512bw") {
        return;
    }
    let mut c = computer();
    c.cpu.state.xcr0 = 0xe7;
    // vpscatterdd [rsi+xmm1*4]{k1}, xmm0: RAM, beyond RAM, not mapped, RAM.
    let scatter = [0x62, 0xf2, 0x7d, 0x09, 0xa0, 0x04, 0x8e];
    let x = &mut c.cpu.state.xsave;
    for (i, v) in [0_u32, 0x2_0000, 0x80_0000, 1].into_iter().enumerate() {
        x.set_u32(XsaveArea::XMM + i * 4, 0x11 * (i as u32 + 1));
        x.set_u32(XsaveArea::XMM + 16 + i * 4, v);
    }
    x.set_u64(XsaveArea::OPMASK + 8, 0xff);
    c.put64(DATA, 0);
    c.put(CODE, &scatter);
    c.cpu.state.set_rip(CODE);
    let data = [0x22, 0, 0, 0, 0, 0, 0, 0];
    let write = Exit::MmioWrite {
        gpa: 0x10_0000,
        len: 4,
        data,
    };
    assert_eq!(c.run(), write);
    assert_eq!(c.cpu.state.xsave.u64(XsaveArea::OPMASK + 8), 0xfc);
    assert!(matches!(c.run(), Exit::Io { .. }));
    assert_eq!((c.cpu.state.rip() - HANDLERS) / 4, PF);
    assert_eq!(c.get64(DATA), 0x11);
}

#[test]
fn real_mode_environments_hold_linear_addresses() {
    let mut c = Computer::real(1 << 20, 0x1000);
    // CS = 0x0100, so IP 0; DS = 0x8000.
    let s = &mut c.cpu.state;
    s.seg[1].selector = 0x100;
    s.seg[1].base = 0x1000;
    s.seg[3].selector = 0x8000;
    s.seg[3].base = 0x8_0000;
    s.set_rip(0);
    c.cpu.state_changed();
    // fninit; fld dword [0x20]; fnstenv [0x40] in 16-bit form; then in 32-bit form at 0x60; hlt.
    let code = [
        0xdb, 0xe3, 0xd9, 0x06, 0x20, 0x00, 0xd9, 0x36, 0x40, 0x00, 0x66, 0xd9, 0x36, 0x60, 0x00,
        0xf4,
    ];
    c.put(CODE, &code);
    assert_eq!(c.run(), Exit::Hlt);
    let word = |c: &Computer, at: u64| c.get64(DATA + at) & 0xffff;
    // The instruction at 0x1002, its operand at 0x80020, opcode 0x106.
    assert_eq!(word(&c, 0x40 + 6), 0x1002);
    assert_eq!(word(&c, 0x40 + 8), 0x0106);
    assert_eq!(word(&c, 0x40 + 10), 0x0020);
    assert_eq!(word(&c, 0x40 + 12), 0x8000);
    assert_eq!(word(&c, 0x60 + 12), 0x1002);
    assert_eq!(c.get64(DATA + 0x60 + 16) & 0xffff_ffff, 0x0106);
    assert_eq!(word(&c, 0x60 + 20), 0x0020);
    assert_eq!(c.get64(DATA + 0x60 + 24) & 0xffff_ffff, 0x8000);
    // One register in use, valid; all exceptions masked afterwards.
    assert_eq!(word(&c, 0x40 + 4), 0x7fff);
}

#[test]
fn random_numbers_come_from_the_host() {
    if !std::is_x86_feature_detected!("rdrand") {
        return;
    }
    let mut c = computer();
    // rdrand rbx; setc al: CF says there was one.
    assert_eq!(
        raised(&mut c, &[0x48, 0x0f, 0xc7, 0xf3, 0x0f, 0x92, 0xc0]),
        None
    );
    assert_eq!(c.reg(reg::RAX) & 1, 1);
    assert_ne!(c.reg(reg::RBX), 0);
}

#[test]
fn masked_byte_stores() {
    let mut c = computer();
    c.cpu.state.regs[reg::RDI] = DATA + 0x100;
    c.put64(DATA + 0x100, u64::MAX);
    c.put64(DATA + 0x108, u64::MAX);
    c.cpu
        .state
        .xsave
        .set_u64(XsaveArea::XMM, 0x8877_6655_4433_2211);
    c.cpu.state.xsave.set_u64(XsaveArea::XMM + 8, 0);
    c.cpu
        .state
        .xsave
        .set_u64(XsaveArea::XMM + 16, 0x8000_0000_0000_0080);
    c.cpu.state.xsave.set_u64(XsaveArea::XMM + 24, 0x80);
    // maskmovdqu xmm0, xmm1.
    assert_eq!(raised(&mut c, &[0x66, 0x0f, 0xf7, 0xc1]), None);
    assert_eq!(c.get64(DATA + 0x100), 0x88ff_ffff_ffff_ff11);
    assert_eq!(c.get64(DATA + 0x108), 0xffff_ffff_ffff_ff00);
    // movq mm0, [rsi]; movq mm1, [rsi+8]; maskmovq mm0, mm1; emms.
    c.put64(DATA, 0x8877_6655_4433_2211);
    c.put64(DATA + 8, 0x8000);
    c.put64(DATA + 0x100, u64::MAX);
    let code = [
        0x0f, 0x6f, 0x06, 0x0f, 0x6f, 0x4e, 0x08, 0x0f, 0xf7, 0xc1, 0x0f, 0x77,
    ];
    assert_eq!(raised(&mut c, &code), None);
    assert_eq!(c.get64(DATA + 0x100), 0xffff_ffff_ffff_22ff);
    assert_eq!(c.cpu.state.xsave.0[4], 0, "EMMS leaves no register in use");
}
