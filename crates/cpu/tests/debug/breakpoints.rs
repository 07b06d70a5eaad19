//! Which accesses hit DR0-DR3: types, lengths, alignment, I/O, instructions, repeated instructions,
//! accesses the processor makes itself.

use anykvm_cpu::state::{cr4, reg, rflags};

use crate::harness::tables::{IDT, STACK0, gate};
use crate::machine::*;

/// SDM Vol. 3, 18.2.4 and 18.2.5: the breakpoint's bytes begin at its address rounded down to its
/// length; an access hits if it touches any of them.
#[test]
fn data_lengths_and_alignment() {
    // mov [rbx], al / ax / eax / rax
    let stores: [(&[u8], u64); 4] = [
        (&[0x88, 0x03], 1),
        (&[0x66, 0x89, 0x03], 2),
        (&[0x89, 0x03], 4),
        (&[0x48, 0x89, 0x03], 8),
    ];
    for (store, size) in stores {
        let mut c = machine(store);
        for len in [1, 2, 4, 8] {
            for at in DATA + 16..DATA + 24 {
                let watched = (at / len * len)..(at / len * len + len);
                for first in DATA + 8..DATA + 32 {
                    let s = &mut c.cpu.state;
                    s.db[0] = at;
                    s.dr7 = dr7(WRITE, len);
                    s.dr6 = DR6_NONE;
                    s.set_rip(CODE);
                    s.regs[reg::RSP] = 0xa000;
                    s.regs[reg::RBX] = first;
                    let hit = (first..first + size).any(|b| watched.contains(&b));
                    let want = hit.then(|| trap(store.len() as i64, 1));
                    let got = next_event(&mut c);
                    assert_eq!(got, want, "{at:#x}+{len}, access {first:#x}+{size}");
                }
            }
        }
    }
}

/// SDM Vol. 3, 18.2.4: R/W0-R/W3, L and G, four breakpoints at once.
#[test]
fn types() {
    const LOAD: &[u8] = &[0x8b, 0x03];
    const STORE: &[u8] = &[0x89, 0x03];
    const ADD: &[u8] = &[0x01, 0x03];
    // in al, dx: a port that the machine answers.
    const IN: &[u8] = &[0xec];
    const OUT: &[u8] = &[0xee];
    struct Case {
        section: &'static str,
        code: &'static [u8],
        db: [u64; 4],
        dr7: u64,
        de: bool,
        want: Option<Seen>,
    }
    let case = |section, code, db0, dr7, de, want| Case {
        section,
        code,
        db: [db0, 0, 0, 0],
        dr7,
        de,
        want,
    };
    let all = |rw: [u64; 4]| 0x4aa | rw.iter().rev().fold(0, |v, t| v << 4 | t) << 16;
    let cases = [
        case(
            "18.2.4",
            LOAD,
            DATA,
            dr7(READ_WRITE, 4),
            false,
            Some(trap(2, 1)),
        ),
        case("18.2.4", LOAD, DATA, dr7(WRITE, 4), false, None),
        case(
            "18.2.4",
            STORE,
            DATA,
            dr7(READ_WRITE, 4),
            false,
            Some(trap(2, 1)),
        ),
        case(
            "18.2.4",
            STORE,
            DATA,
            dr7(WRITE, 4),
            false,
            Some(trap(2, 1)),
        ),
        case("18.2.4", ADD, DATA, dr7(WRITE, 1), false, Some(trap(2, 1))),
        // Neither L0 nor G0; L0 alone.
        case("18.2.4", STORE, DATA, dr7(WRITE, 4) & !2, false, None),
        case(
            "18.2.4",
            STORE,
            DATA,
            dr7(WRITE, 4) ^ 3,
            false,
            Some(trap(2, 1)),
        ),
        // Fetching is no data access, and data accesses are no execution.
        case("18.2.4", STORE, CODE, dr7(READ_WRITE, 8), false, None),
        case("18.2.4", STORE, DATA, dr7(EXECUTE, 1), false, None),
        // Instruction breakpoints: the first byte only, a fault.
        case(
            "18.3.1.1",
            STORE,
            CODE,
            dr7(EXECUTE, 1),
            false,
            Some(trap(0, 1)),
        ),
        case("18.3.1.1", STORE, CODE + 1, dr7(EXECUTE, 1), false, None),
        // I/O only with CR4.DE, by port number and length.
        case("18.3.1.3", IN, 0x510, dr7(IO, 1), true, Some(trap(1, 1))),
        case("18.3.1.3", OUT, 0x510, dr7(IO, 1), true, Some(trap(1, 1))),
        case("18.3.1.3", OUT, 0x510, dr7(IO, 1), false, None),
        case("18.3.1.3", OUT, 0x511, dr7(IO, 1), true, None),
        case("18.3.1.3", OUT, 0x512, dr7(IO, 4), true, Some(trap(1, 1))),
        case("18.3.1.3", OUT, 0x1_0510, dr7(IO, 1), true, None),
        case("18.3.1.3", STORE, DATA, dr7(IO, 1), true, None),
        // All that match are reported, and none that is disabled (18.2.3).
        Case {
            section: "18.2.3",
            code: STORE,
            db: [DATA; 4],
            dr7: all([1, 0, 3, 1]) & !0x80,
            de: false,
            want: Some(trap(2, 0b101)),
        },
    ];
    for (i, t) in cases.iter().enumerate() {
        let mut c = machine(t.code);
        let s = &mut c.cpu.state;
        s.db = t.db;
        s.dr7 = t.dr7;
        s.regs[reg::RDX] = 0x510;
        if t.de {
            s.cr4 |= cr4::DE;
        }
        assert_eq!(
            next_event(&mut c),
            t.want,
            "case {i} (SDM Vol. 3, {})",
            t.section
        );
    }
}

/// SDM Vol. 3, 18.3.1.2 and 18.3.1.1: a repeated instruction traps behind the iteration that hit,
/// with RIP at itself and RF saved, but for the last iteration.
#[test]
fn repeated_instructions() {
    struct Case {
        section: &'static str,
        code: &'static [u8],
        at: u64,
        dr7: u64,
        want: Vec<(Seen, u64)>,
    }
    let cases = [
        // rep movsb: 4 bytes, the second is watched.
        Case {
            section: "18.3.1.2",
            code: &[0xf3, 0xa4],
            at: DATA + 1,
            dr7: dr7(READ_WRITE, 1),
            want: vec![(resuming(0, 1), 2)],
        },
        // The last.
        Case {
            section: "18.3.1.2",
            code: &[0xf3, 0xa4],
            at: DATA + 3,
            dr7: dr7(READ_WRITE, 1),
            want: vec![(trap(2, 1), 0)],
        },
        // rep stosb over a watched word: the third and the fourth.
        Case {
            section: "18.3.1.2",
            code: &[0xf3, 0xaa],
            at: DATA + 0x802,
            dr7: dr7(WRITE, 2),
            want: vec![(resuming(0, 1), 1), (trap(2, 1), 0)],
        },
        // rep outsb, rep insb: every iteration touches the port.
        Case {
            section: "18.3.1.3",
            code: &[0xf3, 0x6e],
            at: 0x510,
            dr7: dr7(IO, 1),
            want: vec![
                (resuming(0, 1), 3),
                (resuming(0, 1), 2),
                (resuming(0, 1), 1),
                (trap(2, 1), 0),
            ],
        },
        Case {
            section: "18.3.1.3",
            code: &[0xf3, 0x6c],
            at: 0x510,
            dr7: dr7(IO, 1),
            want: vec![
                (resuming(0, 1), 3),
                (resuming(0, 1), 2),
                (resuming(0, 1), 1),
                (trap(2, 1), 0),
            ],
        },
        // An instruction breakpoint fires before the first iteration only.
        Case {
            section: "18.3.1.1",
            code: &[0xf3, 0xa4],
            at: CODE,
            dr7: dr7(EXECUTE, 1),
            want: vec![(trap(0, 1), 4)],
        },
    ];
    for (i, t) in cases.iter().enumerate() {
        let mut c = machine(t.code);
        let s = &mut c.cpu.state;
        s.db[0] = t.at;
        s.dr7 = t.dr7;
        s.cr4 |= cr4::DE;
        s.regs[reg::RDX] = 0x510;
        s.regs[reg::RCX] = 4;
        let mut got = Vec::new();
        loop {
            let list = events(&mut c, 1);
            let Some(seen) = list.first() else { break };
            got.push((*seen, c.reg(reg::RCX)));
            assert!(got.len() < 8, "case {i}");
        }
        assert_eq!(got, t.want, "case {i} (SDM Vol. 3, {})", t.section);
    }
}

/// A watched stack slot that an event's delivery writes: #DB at the handler's first instruction
/// (SDM Vol. 3, 6.9, table 6-2: traps on the previous instruction).
#[test]
fn pushes_of_a_delivery() {
    // ud2
    let mut c = machine(&[0x0f, 0x0b]);
    user(&mut c);
    c.cpu.state.db[0] = STACK0 - 8;
    c.cpu.state.dr7 = dr7(WRITE, 8);
    let seen = next_event(&mut c);
    let handler = crate::harness::tables::HANDLERS + 6 * 16;
    assert_eq!(seen, Some(trap((handler - CODE) as i64, 1)));
}

/// SDM Vol. 3, table 6-2: an instruction breakpoint comes before the faults of fetching and
/// decoding; the trap of the instruction before it comes first.
#[test]
fn instruction_breakpoints_come_before_faults() {
    // ud2
    let mut c = machine(&[0x0f, 0x0b]);
    c.cpu.state.db[0] = CODE;
    c.cpu.state.dr7 = dr7(EXECUTE, 1);
    assert_eq!(events(&mut c, 9), [trap(0, 1), fault(6, 0)]);

    // jmp rax to a page that is not there
    let mut c = machine(&[0xff, 0xe0]);
    let at = 4 << 20;
    c.cpu.state.regs[reg::RAX] = at;
    c.cpu.state.db[0] = at;
    c.cpu.state.dr7 = dr7(EXECUTE, 1);
    let target = (at - CODE) as i64;
    assert_eq!(events(&mut c, 9), [trap(target, 1), fault(14, target)]);

    // nop with TF; nop with a breakpoint
    let mut c = machine(&[0x90, 0x90]);
    c.cpu.state.rflags |= rflags::TF;
    c.cpu.state.db[0] = CODE + 1;
    c.cpu.state.dr7 = dr7(EXECUTE, 1);
    let got = events(&mut c, 3);
    assert_eq!(got, [trap(1, BS), trap(1, 1), trap(2, BS)]);
}

/// The breakpoints stay exact while the same page is used without hits, and DR7 may be written by
/// the code itself (SDM Vol. 3, 18.2.4: MOV to DR7 takes effect at once).
#[test]
fn armed_by_the_code_itself() {
    // mov [rbx], eax; mov dr0, rbx; mov dr7, rcx; mov [rbx + 8], eax; mov [rbx], eax;
    // xor ecx, ecx; mov dr7, rcx; mov [rbx], eax
    let code = [
        0x89, 0x03, 0x0f, 0x23, 0xc3, 0x0f, 0x23, 0xf9, 0x89, 0x43, 0x08, 0x89, 0x03, 0x31, 0xc9,
        0x0f, 0x23, 0xf9, 0x89, 0x03,
    ];
    let mut c = machine(&code);
    c.cpu.state.regs[reg::RCX] = dr7(WRITE, 4);
    assert_eq!(events(&mut c, 9), [trap(13, 1)]);
    assert_eq!(c.cpu.state.dr7, 0x400);
}

/// An instruction that faults leaves nothing of its hits: #PF, then none.
#[test]
fn a_fault_drops_the_hits() {
    // push qword [rbx] onto a stack that is not there
    let mut c = machine(&[0xff, 0x33]);
    c.put64(
        IDT + 14 * 16,
        gate(8, crate::harness::tables::HANDLERS + 14 * 16, 0x8e, 1),
    );
    c.cpu.state.db[0] = DATA;
    c.cpu.state.dr7 = dr7(READ_WRITE, 8);
    c.cpu.state.regs[reg::RSP] = 4 << 20;
    assert_eq!(next_event(&mut c), Some(fault(14, 0)));
    // The handler's next instruction is not blamed.
    assert_eq!(c.cpu.state.dr6, DR6_NONE);
    c.put(crate::harness::tables::HANDLERS + 14 * 16 + 1, &[0x90, HLT]);
    assert_eq!(c.run(), anykvm_cpu::Exit::Hlt);
    assert_eq!(
        c.cpu.state.rip(),
        crate::harness::tables::HANDLERS + 14 * 16 + 3
    );
}
