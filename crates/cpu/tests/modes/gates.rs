//! IDT gates of each mode with what may be wrong with them and the error codes that tell it (SDM Vol. 3,
//! 6.11-6.14; Vol. 2, INT n).

use anykvm_cpu::events::vector::{DF, GP, NP, UD as UD_VECTOR};
use anykvm_cpu::state::{Segment, reg, rflags};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

const ERROR: u32 = FREE as u32;
/// External interrupts use this vector, INT n the next.
const IRQ: u8 = 0x61;
pub const INT: u8 = 0x62;

/// What makes the event: its vector, the code, whether the gate's DPL is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    IntN,
    Into,
    Exception,
    External,
    Nmi,
    Int1,
}

use Source::{Exception, External, Int1, IntN, Into, Nmi};

impl Source {
    fn vector(self) -> u8 {
        match self {
            IntN => INT,
            Into => 4,
            Exception => UD_VECTOR,
            External => IRQ,
            Nmi => 2,
            Int1 => 1,
        }
    }
    fn code(self) -> &'static [u8] {
        match self {
            IntN => &[0xcd, INT],
            Into => &[0xce],
            Exception => &[0x0f, 0x0b],
            Int1 => &[0xf1],
            External | Nmi => &[0x90],
        }
    }
    /// Error codes have EXT unless the program asked for the event (SDM Vol. 3, 6.13).
    fn ext(self) -> u32 {
        u32::from(!matches!(self, IntN | Into))
    }
    fn start(self, c: &mut Computer) {
        match self {
            External => {
                c.cpu.state.rflags |= rflags::IF;
                *c.ports.interrupt.lock().unwrap() = Some(IRQ);
            }
            Nmi => c.cpu.state.events.nmi_pending = 1,
            Into => c.cpu.state.rflags |= rflags::OF,
            _ => {}
        }
        c.cpu.state_changed();
    }
}

pub fn put_gate(c: &mut Computer, at: At, v: u8, low: u64, high: u64) {
    let long = matches!(at, Long(_) | Compat32(_) | Compat16(_));
    let size = if long { 16 } else { 8 };
    c.put64(IDT + u64::from(v) * size, low);
    if long {
        c.put64(IDT + u64::from(v) * size + 8, high);
    }
}

/// The error expected of a bad gate, before EXT.
#[derive(Clone, Copy, Debug)]
enum Want {
    /// The handler runs.
    Fine,
    /// Vector, with the gate as error code.
    Gate(u8),
    /// Vector, with the gate as error code, if the gate's DPL is checked.
    Privilege,
    /// Vector, with this selector as error code.
    Selector(u8, u32),
}

use Want::{Fine, Gate, Privilege, Selector};

fn check_gate(at: At, source: Source, low: u64, high: u64, want: Want) {
    let mut c = computer(at, source.code());
    let v = source.vector();
    put_gate(&mut c, at, v, low, high);
    source.start(&mut c);
    let ext = source.ext();
    let index = u32::from(v) * 8 + 2;
    let fine = Event(v);
    let want_end = match want {
        Fine => fine,
        Gate(fault) => Fault(fault, index | ext),
        Privilege if ext == 0 => Fault(GP, index),
        Privilege => fine,
        Selector(fault, s) => Fault(fault, s | ext),
    };
    assert_eq!(end(&mut c), want_end, "{at:?} {source:?} gate {low:x}");
}

fn handler(source: Source) -> u64 {
    HANDLERS + u64::from(source.vector()) * 16
}

/// What may be wrong with a gate of 32-bit protected mode, from CPL 3 (SDM Vol. 2, INT n).
#[test]
fn protected_mode_gates() {
    for source in [IntN, Into, Exception, External, Nmi, Int1] {
        let to = handler(source);
        // Code segment at FREE: its access byte; gate; what happens.
        let rows: &[(u8, u64, Want)] = &[
            (0x9b, gate(FREE, to, 0xee, 0), Fine),
            (0x9b, gate(FREE, to, 0xef, 0), Fine),
            // The selector's RPL does not matter.
            (0x9b, gate(FREE | 3, to, 0xee, 0), Fine),
            (0x9b, gate(FREE, to, 0x8e, 0), Privilege),
            (0x9b, gate(FREE, to, 0xce, 0), Privilege),
            // Not a gate of the IDT.
            (0x9b, 0, Gate(GP)),
            (0x9b, gate(FREE, to, 0xec, 0), Gate(GP)),
            (0x9b, gate(FREE, to, 0xe9, 0), Gate(GP)),
            (0x9b, gate(FREE, to, 0xfe, 0), Gate(GP)),
            (0x9b, gate(FREE, to, 0x6e, 0), Gate(NP)),
            // Privilege before presence.
            (
                0x9b,
                gate(FREE, to, 0x0e, 0),
                if source.ext() == 0 {
                    Privilege
                } else {
                    Gate(NP)
                },
            ),
            // The code segment.
            (0x9b, gate(0, to, 0xee, 0), Selector(GP, 0)),
            (0x9b, gate(3, to, 0xee, 0), Selector(GP, 0)),
            (0x9b, gate(0x100, to, 0xee, 0), Selector(GP, 0x100)),
            (0x9b, gate(0x44, to, 0xee, 0), Selector(GP, 0x44)),
            (0x93, gate(FREE, to, 0xee, 0), Selector(GP, ERROR)),
            (0x89, gate(FREE, to, 0xee, 0), Selector(GP, ERROR)),
            (0x1b, gate(FREE, to, 0xee, 0), Selector(NP, ERROR)),
            // EIP beyond its limit.
            (0x9b, gate(FREE, 0x10_0000, 0xee, 0), Selector(GP, 0)),
        ];
        for &(access, low, want) in rows {
            let mut c = computer(Prot32(3), source.code());
            c.cpu.state.ldtr.attr = Segment::UNUSABLE;
            c.define(FREE, descriptor(0, 0xf_ffff, access, 4));
            put_gate(&mut c, Prot32(3), source.vector(), low, 0);
            source.start(&mut c);
            let ext = source.ext();
            let index = u32::from(source.vector()) * 8 + 2;
            let want = match want {
                Fine => Event(source.vector()),
                Gate(fault) => Fault(fault, index | ext),
                Privilege if ext == 0 => Fault(GP, index),
                Privilege => Event(source.vector()),
                Selector(fault, s) => Fault(fault, s | ext),
            };
            assert_eq!(
                end(&mut c),
                want,
                "{source:?} access {access:x} gate {low:x}"
            );
        }
    }
}

/// Conforming and equally privileged handlers run at the level of what they interrupt, on its stack.
#[test]
fn handlers_at_the_same_level() {
    for access in [0x9fu8, 0xff, 0xfb] {
        let mut c = computer(Prot32(3), IntN.code());
        c.define(FREE, descriptor(0, 0xf_ffff, access, 0xc));
        put_gate(&mut c, Prot32(3), INT, gate(FREE, 0x1100, 0xee, 0), 0);
        c.put(0x1100, &[END]);
        assert_eq!(end(&mut c), Done, "{access:x}");
        assert_eq!(c.stack32(1), ERROR | 3, "{access:x}");
        assert_eq!(c.stack32(3), STACK3 as u32 - 12, "{access:x}");
    }
}

/// A handler must not be less privileged than what it interrupts.
#[test]
fn outward_gates() {
    for at in [Prot32(0), Long(0)] {
        for source in [IntN, Exception, External] {
            let low = gate(CODE3, handler(source), 0xee, 0);
            check_gate(at, source, low, 0, Selector(GP, (CODE3 & !3).into()));
        }
    }
}

/// 64-bit gates (SDM Vol. 3, 6.14.1): only 32-bit types, only 64-bit code, canonical offsets.
#[test]
fn long_mode_gates() {
    for at in [Long(3), Compat32(3), Long(0)] {
        for source in [IntN, Exception, External, Nmi] {
            let to = handler(source);
            check_gate(at, source, gate(CODE0, to, 0xee, 0), 0, Fine);
            check_gate(at, source, gate(CODE0, to, 0xef, 0), 0, Fine);
            check_gate(at, source, gate(CODE0, to, 0xe5, 0), 0, Gate(GP));
            check_gate(at, source, gate(CODE0, to, 0xe6, 0), 0, Gate(GP));
            check_gate(at, source, gate(CODE0, to, 0xe7, 0), 0, Gate(GP));
            check_gate(at, source, gate(CODE0, to, 0x6e, 0), 0, Gate(NP));
            check_gate(at, source, gate(0, to, 0xee, 0), 0, Selector(GP, 0));
            // 32-bit code (defined by `computer`), data.
            check_gate(at, source, gate(0xa0, to, 0xee, 0), 0, Selector(GP, 0xa0));
            check_gate(
                at,
                source,
                gate(DATA0, to, 0xee, 0),
                0,
                Selector(GP, DATA0.into()),
            );
            check_gate(
                at,
                source,
                gate(CODE0, to, 0xee, 0),
                0x8000,
                Selector(GP, 0),
            );
        }
    }
    for source in [IntN, Exception] {
        check_gate(
            Long(3),
            source,
            gate(CODE0, handler(source), 0x8e, 0),
            0,
            Privilege,
        );
    }
}

/// A vector beyond the IDT's limit, to the byte.
#[test]
fn limit_of_the_idt() {
    for (at, size) in [(Prot32(3), 8u16), (Long(3), 16), (Compat32(0), 16)] {
        for source in [IntN, External] {
            for missing in [0, 1] {
                let mut c = computer(at, source.code());
                let low = gate(CODE0, handler(source), 0xee, 0);
                put_gate(&mut c, at, source.vector(), low, 0);
                c.cpu.state.idtr.limit = (u16::from(source.vector()) + 1) * size - 1 - missing;
                source.start(&mut c);
                let index = u32::from(source.vector()) * 8 + 2;
                let want = if missing == 0 {
                    Event(source.vector())
                } else {
                    Fault(GP, index | source.ext())
                };
                assert_eq!(end(&mut c), want, "{at:?} {source:?}");
            }
        }
    }
    // Real mode: four bytes a vector; #GP, if its own vector is there (SDM Vol. 3, 21.1.4).
    for (limit, want) in [
        (INT as u16 * 4 + 3, Event(INT)),
        (INT as u16 * 4 + 2, Event(GP)),
        (13 * 4 + 2, Event(DF)),
        (8 * 4 + 2, Shutdown),
    ] {
        let mut c = computer(Real, IntN.code());
        c.cpu.state.idtr.limit = limit;
        assert_eq!(end(&mut c), want, "{limit:x}");
    }
}

/// RFLAGS in the handler and in the frame, by kind of gate (SDM Vol. 3, 6.12.1.3).
#[test]
fn flags_through_gates() {
    use rflags::{CF, DF, IF, IOPL, NT};
    let before = rflags::FIXED | IF | NT | IOPL | CF | DF;
    for (access, cleared, size) in [
        (0xeeu8, IF | NT, 4u64),
        (0xef, NT, 4),
        (0xe6, IF | NT, 2),
        (0xe7, NT, 2),
    ] {
        let mut c = computer(Prot32(0), IntN.code());
        put_gate(
            &mut c,
            Prot32(0),
            INT,
            gate(CODE0, HANDLERS + 0x620, access, 0),
            0,
        );
        // 16-bit gates have 16 bits of offset.
        c.put(0x620, &[0xf4]);
        c.cpu.state.rflags = before;
        c.cpu.state_changed();
        end(&mut c);
        assert_eq!(
            c.cpu.state.rip(),
            if size == 2 { 0x621 } else { HANDLERS + 0x621 }
        );
        assert_eq!(c.cpu.state.rflags, before & !cleared, "{access:x}");
        assert_eq!(c.reg(reg::RSP), 0xa000 - 3 * size, "{access:x}");
        let mask = if size == 2 { 0xffff } else { 0xffff_ffff };
        let word = |n: u64| c.get64(c.reg(reg::RSP) + n * size) & mask;
        assert_eq!(
            [word(0), word(1), word(2)],
            [CODE + 2, CODE0.into(), before & mask],
            "{access:x}"
        );
    }
    for (access, cleared) in [(0xeeu8, IF | NT), (0xef, NT)] {
        let mut c = computer(Long(0), IntN.code());
        put_gate(
            &mut c,
            Long(0),
            INT,
            gate(CODE0, HANDLERS + 0x620, access, 0),
            0,
        );
        c.cpu.state.rflags = before;
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Event(INT));
        assert_eq!(c.cpu.state.rflags, before & !cleared, "{access:x}");
        assert_eq!(c.stack64(2), before);
    }
}
