//! Call gates: privileges, parameters, 16-, 32- and 64-bit forms (SDM Vol. 3, 5.8.3-5.8.5; Vol. 2, CALL
//! and JMP).

use anykvm_cpu::events::vector::{GP, NP, SS};
use anykvm_cpu::state::{Segment, Table, reg};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

const ERROR: u32 = FREE as u32;
/// The code segment that gates name.
const TARGET: u16 = 0xc0;
const T: u32 = TARGET as u32;
const OFFSET: u64 = 0x1100;

/// JMP or CALL FREE|rpl through a pointer in memory, at a CPL.
fn through(at: At, cpl: u8, rpl: u8, call: bool) -> Computer {
    let mut c = computer(at, &[0xff, if call { 0x1f } else { 0x2f }]);
    for s in &mut c.cpu.state.seg[..6] {
        s.set_dpl(cpl);
        s.selector = s.selector & !3 | u16::from(cpl);
    }
    c.put(OFFSET, &[END]);
    // A call gate gives the offset; the instruction's own is ignored.
    c.put64(0x8000, 0xdead_beef | u64::from(FREE | u16::from(rpl)) << 32);
    c.cpu.state.regs[reg::RDI] = 0x8000;
    c.cpu.state.ldtr.attr = Segment::UNUSABLE;
    c.cpu.state_changed();
    c
}

/// CPL and RPL; the gate's access byte and code selector; the code segment's access byte; the ends of
/// CALL and JMP.
type Row = (u8, u8, u8, u16, u8, End, End);

const ROWS: &[Row] = &[
    // Nonconforming code: CALL goes inwards or stays, JMP stays.
    (3, 3, 0xec, TARGET, 0x9b, Done, Fault(GP, T)),
    (3, 3, 0xec, TARGET, 0xfb, Done, Done),
    (0, 0, 0xec, TARGET, 0x9b, Done, Done),
    (0, 0, 0x8c, TARGET, 0x9b, Done, Done),
    (0, 0, 0xec, TARGET, 0xfb, Fault(GP, T), Fault(GP, T)),
    // Conforming code: both, at the caller's level.
    (3, 3, 0xec, TARGET, 0x9f, Done, Done),
    (3, 3, 0xec, TARGET, 0xff, Done, Done),
    (0, 0, 0xec, TARGET, 0xff, Fault(GP, T), Fault(GP, T)),
    // The gate's own privilege: CPL and RPL.
    (3, 3, 0xcc, TARGET, 0x9b, Fault(GP, ERROR), Fault(GP, ERROR)),
    (3, 0, 0xcc, TARGET, 0xfb, Fault(GP, ERROR), Fault(GP, ERROR)),
    (0, 3, 0xcc, TARGET, 0x9b, Fault(GP, ERROR), Fault(GP, ERROR)),
    (0, 3, 0xec, TARGET, 0x9b, Done, Done),
    // Presence of the gate, of the code segment; the order of checks.
    (3, 3, 0x6c, TARGET, 0x9b, Fault(NP, ERROR), Fault(NP, ERROR)),
    (3, 3, 0x4c, TARGET, 0x9b, Fault(GP, ERROR), Fault(GP, ERROR)),
    (3, 3, 0xec, TARGET, 0x7b, Fault(NP, T), Fault(NP, T)),
    (0, 0, 0xec, TARGET, 0x7b, Fault(GP, T), Fault(GP, T)),
    // What is no code segment.
    (3, 3, 0xec, 0, 0x9b, GP0, GP0),
    (3, 3, 0xec, 3, 0x9b, GP0, GP0),
    (3, 3, 0xec, 0x100, 0x9b, Fault(GP, 0x100), Fault(GP, 0x100)),
    (3, 3, 0xec, 0x44, 0x9b, Fault(GP, 0x44), Fault(GP, 0x44)),
    (3, 3, 0xec, TARGET, 0xf3, Fault(GP, T), Fault(GP, T)),
    (3, 3, 0xec, TARGET, 0xec, Fault(GP, T), Fault(GP, T)),
    // The RPL of the gate's selector is ignored.
    (3, 3, 0xec, TARGET | 3, 0xfb, Done, Done),
    (3, 3, 0xec, TARGET | 2, 0x9b, Done, Fault(GP, T)),
];

#[test]
fn privileges() {
    for at in [Prot32(0), Long(0)] {
        for &(cpl, rpl, access, selector, code, call, jump) in ROWS {
            for (is_call, want) in [(true, call), (false, jump)] {
                let mut c = through(at, cpl, rpl, is_call);
                c.define(FREE, gate(selector, OFFSET, access, 0));
                c.define(FREE + 8, 0);
                let flags = if at == Long(0) { 0xa } else { 0xc };
                c.define(TARGET, descriptor(0, 0xf_ffff, code, flags));
                let got = end(&mut c);
                assert_eq!(
                    got, want,
                    "{at:?} CPL {cpl} RPL {rpl} gate {access:x} code {code:x} call {is_call}"
                );
                if want == Done {
                    let conforming = code & 4 != 0;
                    let level = if conforming { cpl } else { code >> 5 & 3 };
                    let cs = if at == Long(0) {
                        c.stack64(1)
                    } else {
                        c.stack32(1).into()
                    };
                    assert_eq!(
                        cs,
                        u64::from(TARGET) | u64::from(level),
                        "CPL {cpl} code {code:x}"
                    );
                }
            }
        }
    }
}

/// 16-byte gates: 64-bit code only, no type in the upper half, the whole of it inside the table, a
/// canonical target; and no 16-bit gates, task gates or TSSs (SDM Vol. 3, 5.8.3.1).
#[test]
fn long_mode_gates() {
    // Low half, high half, code segment's flags, end.
    let low = gate(TARGET, OFFSET, 0x8c, 0);
    let rows: &[(u64, u64, u8, End)] = &[
        (low, 0, 0xa, Done),
        // The parameter count is ignored.
        (gate(TARGET, OFFSET, 0x8c, 31), 0, 0xa, Done),
        (low, 0, 0xc, Fault(GP, T)),
        (low, 0, 0xe, Fault(GP, T)),
        (low, 0, 0x8, Fault(GP, T)),
        (low, 1 << 40, 0xa, Fault(GP, ERROR)),
        (low, 0x1f << 40, 0xa, Fault(GP, ERROR)),
        (low, 0x8000, 0xa, GP0),
        (low, 0xffff_0000, 0xa, GP0),
        (gate(TARGET, OFFSET, 0x84, 0), 0, 0xa, Fault(GP, ERROR)),
        (gate(TSS_SELECTOR, 0, 0x85, 0), 0, 0xa, Fault(GP, ERROR)),
        (descriptor(0x5800, 0x67, 0x89, 0), 0, 0xa, Fault(GP, ERROR)),
        (descriptor(0x5800, 0x67, 0x82, 0), 0, 0xa, Fault(GP, ERROR)),
    ];
    for at in [Long(0), Compat32(0)] {
        for &(low, high, flags, want) in rows {
            for call in [false, true] {
                let mut c = through(at, 0, 0, call);
                c.define(FREE, low);
                c.define(FREE + 8, high);
                c.define(TARGET, descriptor(0, 0xf_ffff, 0x9b, flags));
                assert_eq!(
                    end(&mut c),
                    want,
                    "{at:?} {low:x} {high:x} {flags:x} {call}"
                );
            }
        }
        // The table ends in the middle of the gate.
        let mut c = through(at, 0, 0, true);
        c.define(FREE, low);
        c.cpu.state.gdtr = Table {
            limit: FREE + 7,
            ..c.cpu.state.gdtr
        };
        assert_eq!(end(&mut c), Fault(GP, ERROR));
    }
}

/// What CALL leaves on the inner stack, by the gate's size: SS, SP, parameters, CS, IP; a stack too
/// short for it is #SS with that segment's selector.
#[test]
fn parameters() {
    // Gate's type byte, size of a word, parameters.
    for (access, size, count) in [
        (0xe4u8, 2u64, 0u8),
        (0xe4, 2, 3),
        (0xe4, 2, 31),
        (0xec, 4, 0),
        (0xec, 4, 31),
    ] {
        let words = 4 + u64::from(count);
        for room in [words * size, words * size - 1] {
            let mut c = through(Prot32(0), 3, 3, true);
            c.define(FREE, gate(TARGET, OFFSET, access, count));
            c.define(TARGET, descriptor(0, 0xf_ffff, 0xbb, 0xc));
            // Stack of level 1: expand-down, so that its size is what is above the limit.
            let (top, stack) = (0x9000u32, 0xc8u16);
            c.define(stack, descriptor(0, top - room as u32 - 1, 0xb7, 4));
            c.put64(TSS + 12, u64::from(top) | u64::from(stack | 1) << 32);
            for i in 0..u64::from(count) {
                c.put64(c.reg(reg::RSP) + i * size, 0x1_0001 * (0x40 + i));
            }
            let sp = c.reg(reg::RSP);
            c.put(OFFSET, &[END]);
            let got = end(&mut c);
            let what = format!("{access:x} {count} room {room:x}");
            if room < words * size {
                assert_eq!(got, Fault(SS, stack.into()), "{what}");
                continue;
            }
            assert_eq!(got, Done, "{what}");
            // INT3 from level 1.
            let esp = u64::from(c.stack32(3));
            assert_eq!(esp, u64::from(top) - words * size, "{what}");
            let mask = if size == 2 { 0xffff } else { 0xffff_ffff };
            let word = |n: u64| c.get64(esp + n * size) & mask;
            assert_eq!(
                [word(0), word(1)],
                [CODE + 2, u64::from(CODE0) | 3],
                "{what}"
            );
            for i in 0..u64::from(count) {
                let value = 0x1_0001 * (0x40 + i);
                assert_eq!(word(2 + i), value & mask, "{what} {i}");
            }
            let n = 2 + u64::from(count);
            assert_eq!(
                [word(n), word(n + 1)],
                [sp & mask, u64::from(DATA0) | 3],
                "{what}"
            );
        }
    }
}

/// The caller's parameters beyond its own stack: #SS(0).
#[test]
fn parameters_outside_the_callers_stack() {
    let mut c = through(Prot32(0), 3, 3, true);
    c.define(FREE, gate(TARGET, OFFSET, 0xec, 2));
    c.define(TARGET, descriptor(0, 0xf_ffff, 0x9b, 0xc));
    let ss = &mut c.cpu.state.seg[2];
    (ss.limit, ss.attr) = (0x9003, ss.attr & !0x8000);
    c.cpu.state.regs[reg::RSP] = 0x9000;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Fault(SS, 0));
}

/// EIP of the gate beyond the code segment: #GP(0).
#[test]
fn targets_outside() {
    for call in [false, true] {
        let mut c = through(Prot32(0), 0, 0, call);
        c.define(FREE, gate(TARGET, 0x1_0000, 0x8c, 0));
        c.define(TARGET, descriptor(0, 0xffff, 0x9b, 4));
        assert_eq!(end(&mut c), GP0);
        // A 16-bit gate has no bits above 15.
        let mut c = through(Prot32(0), 0, 0, call);
        c.define(FREE, gate(TARGET, 0x1_0000 | OFFSET, 0x84, 0));
        c.define(TARGET, descriptor(0, 0xffff, 0x9b, 4));
        assert_eq!(end(&mut c), Done);
    }
}
