//! Guest input cannot panic the host: random bytes, registers, segments and control registers run in
//! every mode, with the arithmetic checks of a debug build.

mod harness;

use anykvm_cpu::Exit;
use anykvm_cpu::state::{Segment, cr0, cr4, efer, rflags};
use harness::Computer;

/// A linear congruential generator (Knuth's MMIX constants): the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 ^ self.0 >> 29
    }
    /// Values that lie near where things change.
    fn interesting(&mut self) -> u64 {
        let n = self.next();
        match n >> 8 & 7 {
            0 => n >> 32,
            1 => n >> 48,
            2 => 1 << (n >> 32 & 63),
            3 => (1 << (n >> 32 & 63)) - 1,
            4 => 0u64.wrapping_sub(n >> 56),
            5 => n >> 44 & 0x1f_ffff,
            6 => n & 0xff,
            _ => n,
        }
    }
}

/// First bytes of instructions that change the mode of things, to meet them often.
const OPENINGS: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x8e],
    &[0x9a],
    &[0xca],
    &[0xcb],
    &[0xcd],
    &[0xcf],
    &[0x48, 0xcf],
    &[0x9d],
    &[0xea],
    &[0xff],
    &[0xc4],
    &[0xc5],
];

fn fill(c: &mut Computer, r: &mut Random, from: u64, len: u64) {
    for at in (from..from + len).step_by(8) {
        let v = r.interesting();
        c.put64(at, v);
    }
}

fn attempt(mode: u64, seed: u64) {
    let mut r = Random(seed);
    let mut c = match mode {
        0 => Computer::real(2 << 20, 0x1000),
        1 => Computer::with_tables(0x1000),
        _ => Computer::with_tables64(0x1000),
    };
    // Descriptors, task state and stacks of any kind; sometimes the IDT.
    fill(&mut c, &mut r, harness::tables::GDT + 0x30, 0xd0);
    if r.next() & 1 == 0 {
        fill(&mut c, &mut r, harness::tables::TSS, 0x68);
    }
    if r.next() & 3 == 0 {
        fill(&mut c, &mut r, harness::tables::IDT, 0x200);
    }
    fill(&mut c, &mut r, 0x9f80, 0x100);
    let mut at = 0x1000;
    for _ in 0..8 {
        let opening = OPENINGS[(r.next() >> 20) as usize % OPENINGS.len()];
        c.put(at, opening);
        c.put64(at + opening.len() as u64, r.next());
        at += opening.len() as u64 + (r.next() >> 30) % 7;
    }
    let s = &mut c.cpu.state;
    for n in 0..16 {
        if n != 4 {
            s.regs[n] = r.interesting();
        }
    }
    if r.next() & 3 == 0 {
        s.regs[4] = r.interesting();
    }
    s.rflags = r.next() & rflags::WRITABLE & !rflags::VM | rflags::FIXED;
    if mode == 1 && r.next() & 7 == 0 {
        for segment in &mut s.seg[..6] {
            *segment = Segment {
                limit: 0xffff,
                attr: 0xf3,
                ..Segment::default()
            };
        }
        s.rflags |= rflags::VM;
    }
    if r.next() & 1 == 0 {
        s.cr4 |= r.next()
            & (cr4::VME
                | cr4::PVI
                | cr4::DE
                | cr4::FSGSBASE
                | cr4::UMIP
                | cr4::SMEP
                | cr4::OSXSAVE);
        s.msr.efer |= efer::SCE;
        s.cr0 |= r.next() & (cr0::TS | cr0::EM | cr0::MP | cr0::AM);
        s.dr7 |= r.next() & 0xffff_23ff;
        s.db = [0x1000, 0x1003, 0x9ff8, r.interesting()];
    }
    let user = r.next() & 3 == 0;
    if user && mode != 0 && c.cpu.state.rflags & rflags::VM == 0 {
        c.user();
    }
    c.cpu.state_changed();
    for _ in 0..40 {
        match c.cpu.run(50) {
            Exit::Shutdown | Exit::InternalError(_) | Exit::Request => break,
            Exit::MmioRead { len, .. } => {
                let data = r.next().to_le_bytes();
                c.cpu.complete_mmio_read(&data[..usize::from(len)]);
            }
            _ => {}
        }
    }
}

#[test]
fn random_code_does_not_panic() {
    let rounds: u64 = std::env::var("ANYKVM_TEST_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(100);
    for seed in 0..rounds {
        for mode in 0..3 {
            let run =
                std::panic::catch_unwind(|| attempt(mode, seed.wrapping_mul(0x9e37_79b9) + mode));
            assert!(run.is_ok(), "mode {mode}, seed {seed}");
        }
    }
}
