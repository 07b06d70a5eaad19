//! Operand size against stack size: what far calls push, how much of the stack pointer counts (SDM
//! Vol. 1, 6.2.2 and 6.2.3; Vol. 3, ch. 22, Mixing 16-Bit and 32-Bit Code; Vol. 2, CALL, PUSH).

use anykvm_cpu::state::{Segment, reg};

use crate::harness::tables::*;
use crate::machine::*;

/// Where far calls go, and another paragraph for real mode.
const TARGET: u64 = 0x1100;

/// CALL FAR with each operand size, and the RETF of that size behind it.
#[test]
fn far_calls() {
    for (at, prefix, size) in [
        (Real, false, 2u64),
        (Real, true, 4),
        (V86(0), false, 2),
        (V86(0), true, 4),
        (Prot16(0), false, 2),
        (Prot16(0), true, 4),
        (Prot32(0), false, 4),
        (Prot32(0), true, 2),
        (Compat32(3), false, 4),
        (Compat16(3), true, 4),
    ] {
        let cs = computer(at, &[]).cpu.state.seg[1].selector;
        let mut code = if prefix { vec![0x66] } else { vec![] };
        code.push(0x9a);
        code.extend(&TARGET.to_le_bytes()[..size as usize]);
        code.extend(cs.to_le_bytes());
        let mut c = computer(at, &code);
        c.put(TARGET, if prefix { &[0x66, 0xcb] } else { &[0xcb] });
        let sp = c.reg(reg::RSP);
        // The call alone.
        c.cpu.run(1);
        let what = format!("{at:?}, prefix {prefix}");
        let mask = if size == 2 { 0xffff } else { 0xffff_ffff };
        let word = |n: u64| c.get64(sp - 2 * size + n * size) & mask;
        assert_eq!(
            [word(0), word(1)],
            [CODE + code.len() as u64, cs.into()],
            "{what}"
        );
        assert_eq!(
            (c.cpu.state.rip(), c.reg(reg::RSP)),
            (TARGET, sp - 2 * size),
            "{what}"
        );
        assert_eq!(end(&mut c), Done, "{what}");
    }
}

/// SS.B decides between SP and ESP, whatever the size of code and operand; the rest of ESP stays.
#[test]
fn stack_pointers() {
    // Code, SS.B, the instruction, ESP before, what it moves by.
    for (at, big, code, before, by) in [
        (Prot32(0), false, &[0x50u8][..], 0x1234_8000u64, -4i64),
        (Prot32(0), false, &[0x66, 0x50], 0x1234_8000, -2),
        (Prot32(0), false, &[0x50], 0x1234_0000, -4),
        (Prot32(0), false, &[0x58], 0x1234_fffc, 4),
        (Prot32(0), false, &[0x60], 0x1234_8000, -32),
        (Prot32(0), false, &[0x9c], 0x1234_8000, -4),
        (Prot32(0), false, &[0xc8, 8, 0, 0], 0x1234_8000, -12),
        (Prot16(0), false, &[0x50], 0x1234_8000, -2),
        (Prot16(0), true, &[0x50], 0x1_8000, -2),
        (Prot16(0), true, &[0x66, 0x50], 0x1_8000, -4),
        (Prot16(0), true, &[0x61], 0x1_8000, 16),
        (Prot16(0), true, &[0xc8, 8, 0, 0], 0x1_8000, -10),
        (Prot32(0), true, &[0x66, 0x9c], 0x1_8000, -2),
    ] {
        let mut c = computer(at, code);
        let ss = &mut c.cpu.state.seg[2];
        ss.attr = ss.attr & !Segment::DB | if big { Segment::DB } else { 0 };
        c.cpu.state.regs[reg::RSP] = before;
        c.cpu.state_changed();
        c.cpu.run(1);
        // A block runs to its end: INT3's own frame is another 6 or 12 bytes down.
        let int3 = if at == Prot16(0) || at == Prot32(0) {
            12
        } else {
            0
        };
        let mask = if big { 0xffff_ffff } else { 0xffff };
        let moved = before.wrapping_add_signed(by - int3) & mask;
        let want = before & !mask & 0xffff_ffff | moved;
        assert_eq!(c.reg(reg::RSP), want, "{at:?} SS.B {big} {code:x?}");
    }
}

/// An interrupt's frame through 32-bit gates on a 16-bit stack, which wraps.
#[test]
fn frames_on_small_stacks() {
    let mut c = computer(Prot32(0), &[0x0f, 0x0b]);
    c.cpu.state.seg[2].attr &= !Segment::DB;
    c.cpu.state.regs[reg::RSP] = 0x1_0008;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), UD);
    assert_eq!(c.reg(reg::RSP), 0x1_fffc);
    assert_eq!(c.get64(0xfffc) & 0xffff_ffff, CODE);
    assert_eq!(c.get64(0) & 0xffff, CODE0.into());
}
