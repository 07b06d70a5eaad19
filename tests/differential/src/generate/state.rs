//! Random registers.

use crate::case::{State, selector};
use crate::random::Random;
use anykvm_cpu::state::{rflags, seg};

/// Registers of any value, except that the stack pointer is in the data.
pub fn random(r: &mut Random, bits: u32, avx512: bool) -> State {
    let mut s = State::new(bits);
    let rsp = s.gpr[4];
    for v in &mut s.gpr {
        *v = r.integer();
    }
    s.gpr[4] = rsp + r.below(64) * 8 + if r.once_in(8) { r.below(8) } else { 0 };
    s.rflags = flags(r);
    if bits == 32 {
        s.gpr.iter_mut().for_each(|v| *v &= 0xffff_ffff);
        s.gpr[8..].fill(0);
        for n in [seg::FS, seg::GS] {
            s.selectors[usize::from(n)] = r.pick(&[0, selector::DATA, selector::DATA]);
        }
    } else {
        s.fs_base = base(r);
        s.gs_base = base(r);
    }
    vectors(r, &mut s, bits, avx512);
    x87(r, &mut s);
    s
}

fn flags(r: &mut Random) -> u64 {
    let mut f = rflags::FIXED | rflags::IF | r.word() & rflags::STATUS;
    for (flag, n) in [(rflags::DF, 4), (rflags::AC, 24), (rflags::TF, 40)] {
        if r.once_in(n) {
            f |= flag;
        }
    }
    f
}

/// A segment base: canonical.
fn base(r: &mut Random) -> u64 {
    match r.below(4) {
        0 => 0,
        1 => r.below(0x1_0000),
        2 => r.below(1 << 47),
        _ => (r.below(1 << 33) as i64 - (1 << 32)) as u64,
    }
}

fn vectors(r: &mut Random, s: &mut State, bits: u32, avx512: bool) {
    // 32-bit code does not reach the others.
    let reached = match (bits, avx512) {
        (32, _) => 8,
        (_, false) => 16,
        _ => 32,
    };
    let bytes = if avx512 { 64 } else { 32 };
    for zmm in &mut s.zmm[..reached] {
        r.noise(&mut zmm[..bytes]);
    }
    if avx512 {
        for k in &mut s.k {
            *k = match r.below(4) {
                0 => u64::MAX,
                1 => r.integer(),
                _ => r.word(),
            };
        }
    }
    let masks = match r.below(3) {
        0 => r.word() as u32 & 0x1f80,
        _ => 0x1f80,
    };
    // Rounding, flush to zero, denormals are zero, and old flags.
    s.mxcsr = masks | r.word() as u32 & if r.once_in(2) { 0xe07f } else { 0x6000 };
}

fn x87(r: &mut Random, s: &mut State) {
    for st in &mut s.st {
        st[..10].copy_from_slice(&r.extended());
    }
    let masks = if r.once_in(3) {
        r.word() as u16 & 0x3f
    } else {
        0x3f
    };
    s.fcw = 0x40 | masks | r.word() as u16 & 0xf00;
    // Condition codes, TOP and flags; one that is set and not masked is #MF soon.
    let flags = if r.once_in(12) { 0x3f } else { masks };
    s.fsw = r.word() as u16 & (0x7f00 | flags);
    if s.fsw & !s.fcw & 0x3f != 0 {
        s.fsw |= 0x8080;
    }
    if r.once_in(4) {
        s.fsw |= 0x40 & masks;
    }
    s.ftw = match r.below(4) {
        0 => 0,
        1 => r.word() as u16 & 0xff,
        _ => 0xff,
    };
}
