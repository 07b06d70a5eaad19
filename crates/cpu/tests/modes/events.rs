//! When events are taken, in which order, and what blocks them: interrupt shadows, NMI blocking,
//! priorities (SDM Vol. 3, 6.7, 6.8 and 6.9).

use anykvm_cpu::events::{SHADOW_MOV_SS, SHADOW_STI};
use anykvm_cpu::state::{cr4, reg, rflags};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

/// The vector of the external interrupt that waits.
const IRQ: u8 = 0x61;

fn raise(c: &mut Computer) {
    *c.ports.interrupt.lock().unwrap() = Some(IRQ);
    c.cpu.state_changed();
}

/// Where the interrupted code is to go on, relative to its start.
fn interrupted_at(c: &Computer, at: At) -> u64 {
    let rip = match at {
        Real => c.get64(c.reg(reg::RSP)) & 0xffff,
        V86(_) | Prot16(_) | Prot32(_) => c.stack32(0).into(),
        _ => c.stack64(0),
    };
    rip - CODE
}

/// An interrupt waits while IF is clear; the code ends with the interrupt at an offset, or at its
/// INT3 with no interrupt (SDM Vol. 2, STI, MOV, POP, LSS; Vol. 3, 6.8.3).
#[test]
fn interrupt_shadows() {
    let rows: &[(&str, &[u8], Option<u64>)] = &[
        ("sti; nop; nop", &[0xfb, 0x90, 0x90], Some(2)),
        ("sti; sti; nop", &[0xfb, 0xfb, 0x90], Some(2)),
        ("sti; cli; nop", &[0xfb, 0xfa, 0x90], None),
        (
            "sti; mov ss, eax; nop; nop",
            &[0xfb, 0x8e, 0xd0, 0x90, 0x90],
            Some(4),
        ),
        (
            "sti; mov ss; mov ss; nop",
            &[0xfb, 0x8e, 0xd0, 0x8e, 0xd0, 0x90],
            Some(5),
        ),
        ("sti; mov ds, eax; nop", &[0xfb, 0x8e, 0xd8, 0x90], Some(3)),
        (
            "sti; lss eax, [edi]; nop",
            &[0xfb, 0x0f, 0xb2, 0x07, 0x90],
            Some(4),
        ),
        (
            "pushf; or [esp], IF; popf; nop",
            &[0x9c, 0x80, 0x4c, 0x24, 1, 2, 0x9d, 0x90],
            Some(7),
        ),
        ("sti; sti; cli", &[0xfb, 0xfb, 0xfa], Some(2)),
        ("sti; pushf; popf; nop", &[0xfb, 0x9c, 0x9d, 0x90], Some(2)),
        ("nop", &[0x90], None),
    ];
    for (name, code, want) in rows {
        for at in [Prot32(0), Compat32(0), Prot16(0), Long(0)] {
            // LSS and the address of the stack's top differ in 16-bit code.
            if at == Prot16(0) && (name.contains("lss") || name.contains("esp")) {
                continue;
            }
            let mut c = computer(at, code);
            let ss = c.cpu.state.seg[2].selector;
            let r = &mut c.cpu.state.regs;
            (r[reg::RAX], r[reg::RDI]) = (ss.into(), 0x8000);
            c.put64(0x8000, u64::from(ss) << 32);
            if name.contains("lss") {
                // The far pointer's offset goes to EAX.
                c.put(0x8004, &ss.to_le_bytes());
            }
            raise(&mut c);
            let got = end(&mut c);
            assert_eq!(
                got,
                if want.is_some() { Event(IRQ) } else { Done },
                "{name} in {at:?}"
            );
            if let Some(offset) = want {
                assert_eq!(interrupted_at(&c, at), *offset, "{name} in {at:?}");
            }
        }
    }
}

/// POP SS has a shadow as MOV SS has.
#[test]
fn pop_ss() {
    for at in [Real, Prot32(0), Prot16(0)] {
        // push ss; sti; pop ss; nop; nop
        let mut c = computer(at, &[0x16, 0xfb, 0x17, 0x90, 0x90]);
        raise(&mut c);
        assert_eq!(end(&mut c), Event(IRQ), "{at:?}");
        assert_eq!(interrupted_at(&c, at), 4, "{at:?}");
    }
}

/// HLT behind STI: the processor halts, and the interrupt comes behind HLT.
#[test]
fn halt_under_the_shadow() {
    for at in [Real, Prot32(0), Long(0)] {
        let mut c = computer(at, &[0xfb, 0xf4]);
        raise(&mut c);
        assert_eq!(end(&mut c), Halt, "{at:?}");
        assert_eq!(end(&mut c), Event(IRQ), "{at:?}");
        assert_eq!(interrupted_at(&c, at), 2, "{at:?}");
    }
}

/// Both shadows hold an NMI back for one instruction, as KVM and its processors have it.
#[test]
fn nmi_and_shadows() {
    for (shadow, offset) in [(0, 0), (SHADOW_MOV_SS, 1), (SHADOW_STI, 1)] {
        let mut c = computer(Long(0), &[0x90, 0x90]);
        c.cpu.state.events.nmi_pending = 1;
        c.cpu.state.events.shadow = shadow;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Event(2));
        assert_eq!(interrupted_at(&c, Long(0)), offset, "shadow {shadow}");
    }
}

/// NMI before interrupt; the interrupt when the NMI's handler has set IF again by IRET, at the same
/// place (SDM Vol. 3, table 6-2).
#[test]
fn nmi_before_interrupt() {
    for (at, iret) in [
        (Real, &[0xcfu8][..]),
        (Prot32(0), &[0xcf]),
        (Long(0), &[0x48, 0xcf]),
    ] {
        let mut c = computer(at, &[0x90]);
        c.cpu.state.rflags |= rflags::IF;
        c.cpu.state.events.nmi_pending = 1;
        raise(&mut c);
        assert_eq!(end(&mut c), Event(2), "{at:?}");
        assert!(c.cpu.state.events.nmi_masked);
        assert_eq!(interrupted_at(&c, at), 0);
        let behind = c.cpu.state.rip();
        c.put(behind, iret);
        assert_eq!(end(&mut c), Event(IRQ), "{at:?}");
        assert!(!c.cpu.state.events.nmi_masked);
        assert_eq!(interrupted_at(&c, at), 0);
    }
}

/// A second NMI waits for the IRET of the first's handler; a third is lost (SDM Vol. 3, 6.7.1).
#[test]
fn nmi_blocking() {
    let mut c = computer(Long(0), &[0x90]);
    c.cpu.state.events.nmi_pending = 2;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Event(2));
    c.put(HANDLERS + 0x21, &[0x48, 0xcf]);
    c.cpu.state_changed();
    // The handler's IRETQ, and the second NMI at the same place, before any instruction.
    assert_eq!(end(&mut c), Event(2));
    assert_eq!(interrupted_at(&c, Long(0)), 0);
    assert_eq!(c.cpu.state.events.nmi_pending, 0);
    assert_eq!(end(&mut c), Done);
}

/// IRET ends NMI blocking even if it faults: the NMI comes before the fault's handler runs (SDM
/// Vol. 3, 6.7.1, where virtual-8086 mode with IOPL below 3 is the example).
#[test]
fn a_faulting_iret_unblocks_nmis() {
    let rows: &[(At, &[u8])] = &[
        (V86(0), &[0xcf]),
        (Prot32(0), &[0xcf]),
        (Compat32(0), &[0xcf]),
        (Long(0), &[0x48, 0xcf]),
        (Long(3), &[0x48, 0xcf]),
    ];
    for &(at, code) in rows {
        let mut c = computer(at, code);
        // A frame of zeros: the null CS is #GP(0).
        c.cpu.state.events.nmi_masked = true;
        c.cpu.state.events.nmi_pending = 1;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Event(2), "{at:?}");
        assert_eq!(interrupted_at(&c, at) + CODE, HANDLERS + 13 * 16, "{at:?}");
    }
    // NT in 64-bit mode.
    let mut c = computer(Long(0), &[0x48, 0xcf]);
    c.cpu.state.rflags |= rflags::NT;
    c.cpu.state.events.nmi_masked = true;
    c.cpu.state.events.nmi_pending = 1;
    c.cpu.state_changed();
    assert_eq!(end(&mut c), Event(2));
}

/// IRETs of every kind that succeed unblock; nothing else does.
#[test]
fn what_unblocks_nmis() {
    for (at, code, unblocks) in [
        (Real, &[0xcfu8][..], true),
        (V86(3), &[0xcf], true),
        (Prot32(0), &[0xcb], false),
        (Real, &[0xcb], false),
        (Long(0), &[0x90], false),
    ] {
        let mut c = computer(at, code);
        // The frame: to the INT3 behind the code.
        let rsp = c.reg(reg::RSP);
        let target = CODE + code.len() as u64;
        if matches!(at, Prot32(_)) {
            c.put64(rsp, target | u64::from(CODE0) << 32);
        } else {
            c.put64(rsp, target);
        }
        c.cpu.state.events.nmi_masked = true;
        c.cpu.state.events.nmi_pending = 1;
        c.cpu.state_changed();
        assert_eq!(
            end(&mut c),
            if unblocks { Event(2) } else { Done },
            "{at:?} {code:x?}"
        );
    }
}

/// External interrupts need IF whatever the privilege; virtual-8086 mode with VME included (SDM
/// Vol. 3, 20.3.2: hardware interrupts look at IF, not at VIF).
#[test]
fn interrupts_and_if() {
    for at in [
        Real,
        V86(0),
        V86(3),
        Prot32(0),
        Prot32(3),
        Compat32(3),
        Long(0),
        Long(3),
    ] {
        for on in [false, true] {
            let mut c = computer(at, &[0x90]);
            if matches!(at, V86(_)) {
                set_cr4(&mut c, cr4::VME);
            }
            c.cpu.state.rflags |= if on { rflags::IF } else { rflags::VIF };
            raise(&mut c);
            assert_eq!(end(&mut c), if on { Event(IRQ) } else { Done }, "{at:?}");
            if on {
                assert_eq!(interrupted_at(&c, at), 0, "{at:?}");
            }
        }
    }
}
