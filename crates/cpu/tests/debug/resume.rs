//! RF (SDM Vol. 3, 18.3.1.1): what is saved, what sets it, what clears it.

use anykvm_cpu::Exit;
use anykvm_cpu::state::{reg, rflags};

use crate::machine::*;

/// The RF that each class of event saves.
#[test]
fn saved() {
    struct Case {
        section: &'static str,
        code: &'static [u8],
        /// RF before the instruction.
        rf: bool,
        want: Seen,
    }
    let case = |section, code, rf, want| Case {
        section,
        code,
        rf,
        want,
    };
    let cases = [
        case("18.3.1.1", &[0x0f, 0x0b][..], false, fault(6, 0)),
        case("18.3.1.1", &[0x0f, 0x0b], true, fault(6, 0)),
        // mov eax, [4 MiB]: #PF; div cl: #DE
        case(
            "18.3.1.1",
            &[0x8b, 0x04, 0x25, 0, 0, 0x40, 0],
            false,
            fault(14, 0),
        ),
        case("18.3.1.1", &[0xf6, 0xf1], false, fault(0, 0)),
        // Cleared at the start of a software interrupt.
        case("18.3.1.1", &[0xcd, 0x80], true, software(0x80, 2)),
        case("18.3.1.1", &[0xcc], true, software(3, 1)),
        case("18.3.1.1", &[0xf1], true, software(1, 1)),
    ];
    for (i, t) in cases.iter().enumerate() {
        let mut c = machine(t.code);
        if t.rf {
            c.cpu.state.rflags |= rflags::RF;
        }
        c.cpu.state.regs[reg::RCX] = 0;
        assert_eq!(
            next_event(&mut c),
            Some(t.want),
            "case {i} (SDM Vol. 3, {})",
            t.section
        );
        assert_eq!(c.cpu.state.rflags & rflags::RF, 0, "case {i}");
    }
}

/// RF suppresses instruction breakpoints for one instruction.
#[test]
fn suppresses_for_one_instruction() {
    // nop; nop, both watched
    let mut c = machine(&[0x90, 0x90]);
    c.cpu.state.rflags |= rflags::RF;
    c.cpu.state.db = [CODE, CODE + 1, 0, 0];
    c.cpu.state.dr7 = 0x40a;
    assert_eq!(events(&mut c, 9), [trap(1, 2)]);
    // An NMI between them finds RF as it is: clear.
    let mut c = machine(&[0x90, 0x90]);
    c.cpu.state.rflags |= rflags::RF;
    c.cpu.state.events.nmi_pending = 1;
    let seen = next_event(&mut c);
    assert_eq!(
        seen,
        Some(Seen {
            rf: true,
            ..software(2, 0)
        })
    );
}

/// IRETQ loads RF from the stack, POPF does not.
#[test]
fn loaded_by_iret_not_by_popf() {
    // push 0x10000 (dword, sign-extended); popfq; nop, which is watched
    let mut c = machine(&[0x68, 0, 0, 1, 0, 0x9d, 0x90]);
    c.cpu.state.db[0] = CODE + 6;
    c.cpu.state.dr7 = dr7(EXECUTE, 1);
    assert_eq!(events(&mut c, 9), [trap(6, 1)]);

    // push ss; push rsp's value; push RF; push cs; push CODE + n; iretq; nop, watched; nop, watched
    let code = [
        0x6a, 0x10, 0x68, 0, 0xa0, 0, 0, 0x68, 2, 0, 1, 0, 0x6a, 0x08, 0x68, 0x15, 0x10, 0, 0,
        0x48, 0xcf, 0x90, 0x90,
    ];
    for rf_before in [false, true] {
        let mut c = machine(&code);
        if rf_before {
            c.cpu.state.rflags |= rflags::RF;
        }
        c.cpu.state.db = [CODE + 21, CODE + 22, 0, 0];
        c.cpu.state.dr7 = 0x40a;
        assert_eq!(events(&mut c, 9), [trap(22, 2)]);
    }
    // The RF before IRETQ does not count behind it.
    let mut plain = code;
    plain[10] = 0;
    let mut c = machine(&plain);
    c.cpu.state.db = [CODE + 19, CODE + 21, 0, 0];
    c.cpu.state.dr7 = 0x40a;
    assert_eq!(events(&mut c, 9), [trap(19, 1), trap(21, 2)]);
}

/// PUSHF stores RF as 0 (Vol. 2, PUSHF), and it is clear in the image by then anyway.
#[test]
fn pushf() {
    let mut c = machine(&[0x9c]);
    c.cpu.state.rflags |= rflags::RF;
    assert_eq!(next_event(&mut c), None);
    assert_eq!(c.stack64(0) & rflags::RF, 0);
}

/// A repeated instruction that an NMI interrupts between iterations is saved with RF; behind its
/// last one it is not.
#[test]
fn interrupted_repetition() {
    // rep movsb
    let mut c = machine(&[0xf3, 0xa4]);
    c.cpu.state.regs[reg::RCX] = 8;
    c.cpu.state_changed();
    // The first element misses the TLB, and is done alone.
    assert_eq!(c.cpu.run(1), Exit::Budget);
    assert_eq!(c.reg(reg::RCX), 7);
    assert_eq!(c.cpu.state.rip(), CODE);
    assert_ne!(c.cpu.state.rflags & rflags::RF, 0);
    c.cpu.state.events.nmi_pending = 1;
    let seen = next_event(&mut c);
    let nmi = software(2, 0);
    assert_eq!(seen, Some(Seen { rf: true, ..nmi }));
    assert_eq!(c.reg(reg::RCX), 7);
    // Back to it, and to its end.
    assert_eq!(next_event(&mut c), None);
    assert_eq!(c.reg(reg::RCX), 0);
    assert_eq!(c.cpu.state.rflags & rflags::RF, 0);
}
