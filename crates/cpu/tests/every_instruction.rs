//! Every instruction the decoder knows either has a handler or is #UD, and no bytes and no state
//! make a handler panic or a stub fault.

mod harness;

use anykvm_cpu::decode::{self, DecodeError};
use anykvm_cpu::state::{XsaveArea, cr4, reg};
use harness::Computer;
use harness::instructions::instance;
use iced_x86::{Code, Encoder};

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
