//! MOV to and from DR0-DR7, general detect, and how DR6 accumulates.

use anykvm_cpu::Exit;
use anykvm_cpu::GuestDebug;
use anykvm_cpu::events::vector::{GP, UD};
use anykvm_cpu::memory::MemoryMap;
use anykvm_cpu::state::{cr4, reg, rflags};

use crate::machine::*;

/// MOV rax, DRn and MOV DRn, rax.
fn read(n: u8) -> [u8; 3] {
    [0x0f, 0x21, 0xc0 | n << 3]
}
fn write(n: u8) -> [u8; 3] {
    [0x0f, 0x23, 0xc0 | n << 3]
}

/// What happens with which value, privilege and CR4.DE.
#[test]
fn moves() {
    struct Case {
        section: &'static str,
        code: Vec<u8>,
        rax: u64,
        set_up: u32,
        /// The event, or the register's and RAX's value behind the instruction.
        want: Result<(usize, u64), Seen>,
    }
    const DE: u32 = 1;
    const CPL3: u32 = 2;
    const GD: u32 = 4;
    let case = |section, code: &[u8], rax, set_up, want| Case {
        section,
        code: code.to_vec(),
        rax,
        set_up,
        want,
    };
    const HIGH: u64 = 1 << 32;
    let cases = [
        // Reserved bits read as they must, whatever is written.
        case("18.2.3", &write(6), 0, 0, Ok((6, DR6_NONE))),
        case("18.2.3", &write(6), 0xffff_ffff, 0, Ok((6, 0xffff_efff))),
        case("18.2.3", &write(6), HIGH, 0, Err(fault(GP, 0))),
        case("18.2.4", &write(7), 0, 0, Ok((7, 0x400))),
        // GD is left out: it would catch the next access. RTM (bit 11) does not exist.
        case("18.2.4", &write(7), 0xffff_dfff, 0, Ok((7, 0xffff_07ff))),
        case("18.2.4", &write(7), HIGH, 0, Err(fault(GP, 0))),
        case("18.2.6", &write(0), u64::MAX, 0, Ok((0, u64::MAX))),
        case("18.2.6", &write(3), 0x8000 << 40, 0, Ok((3, 0x8000 << 40))),
        // DR4 and DR5 are DR6 and DR7, without CR4.DE.
        case("18.2.2", &write(4), 0xf, 0, Ok((6, DR6_NONE | 0xf))),
        case("18.2.2", &write(5), 0x155, 0, Ok((7, 0x555))),
        case("18.2.2", &write(4), 0, DE, Err(fault(UD, 0))),
        case("18.2.2", &read(5), 0, DE, Err(fault(UD, 0))),
        // REX.R: DR8 and beyond.
        case(
            "Vol. 2, MOV DR",
            &[0x44, 0x0f, 0x23, 0xc0],
            0,
            0,
            Err(fault(UD, 0)),
        ),
        // Privilege; #UD comes first, general detect last.
        case("Vol. 2, MOV DR", &read(0), 0, CPL3, Err(fault(GP, 0))),
        case("Vol. 2, MOV DR", &write(7), 0, CPL3 | GD, Err(fault(GP, 0))),
        case("Vol. 2, MOV DR", &read(4), 0, CPL3 | DE, Err(fault(UD, 0))),
        case("18.2.4", &read(7), 0, GD, Err(resuming(0, BD))),
        case("18.2.4", &write(0), 0, GD, Err(resuming(0, BD))),
        case("18.2.4", &read(4), 0, GD | DE, Err(fault(UD, 0))),
        case("18.2.4", &write(7), HIGH, GD, Err(resuming(0, BD))),
    ];
    for (i, t) in cases.iter().enumerate() {
        let mut c = machine(&t.code);
        if t.set_up & CPL3 != 0 {
            user(&mut c);
        }
        let s = &mut c.cpu.state;
        s.regs[reg::RAX] = t.rax;
        if t.set_up & DE != 0 {
            s.cr4 |= cr4::DE;
        }
        if t.set_up & GD != 0 {
            s.dr7 |= 1 << 13;
        }
        let name = format!("case {i} (SDM Vol. 3, {})", t.section);
        match (next_event(&mut c), t.want) {
            (Some(seen), want) => {
                assert_eq!(Err(seen), want, "{name}");
                if seen.vector == 1 {
                    // So that the handler reaches the registers (18.2.4).
                    assert_eq!(c.cpu.state.dr7 & 1 << 13, 0, "{name}");
                }
            }
            (None, Ok((n, value))) => {
                let s = &c.cpu.state;
                let got = match n {
                    6 => s.dr6,
                    7 => s.dr7,
                    _ => s.db[n],
                };
                assert_eq!(got, value, "{name}");
            }
            (None, want) => panic!("{name}: nothing happened, not {want:x?}"),
        }
    }
}

/// Without CR4.DE DR4 and DR5 read DR6 and DR7 (18.2.2).
#[test]
fn reads() {
    for (n, want) in [
        (0, 0x1234),
        (4, DR6_NONE),
        (5, 0x400),
        (6, DR6_NONE),
        (7, 0x400),
    ] {
        let mut c = machine(&read(n));
        c.cpu.state.db[0] = 0x1234;
        assert_eq!(next_event(&mut c), None);
        assert_eq!(c.reg(reg::RAX), want, "DR{n}");
    }
}

/// SDM Vol. 3, 18.2.3: B0-B3 are the last event's own; BS, BD and BT stay until software clears
/// them; other exceptions leave DR6 alone.
#[test]
fn dr6_accumulates() {
    // nop (TF); mov [rbx], eax (a hit); mov rax, dr6 (general detect); int 0x80
    let mut c = machine(&[0x90, 0x89, 0x03, 0x0f, 0x21, 0xf0, 0xcd, 0x80]);
    c.cpu.state.rflags |= rflags::TF;
    c.cpu.state.db[0] = DATA;
    c.cpu.state.dr7 = dr7(WRITE, 4);
    assert_eq!(next_event(&mut c), Some(trap(1, BS)));
    // Off again; the bit stays.
    let flags = c.reg(reg::RSP) + 16;
    c.put64(flags, 2);
    assert_eq!(next_event(&mut c), Some(trap(3, BS | 1)));
    c.cpu.state.dr7 = 0x400 | 1 << 13;
    assert_eq!(next_event(&mut c), Some(resuming(3, BS | BD)));
    let seen = next_event(&mut c);
    assert_eq!(
        seen,
        Some(Seen {
            dr6: BS | BD,
            ..software(0x80, 8)
        })
    );
}

/// INT1 goes to the handler without a cause in DR6, whatever the gate's DPL, and frees the debug
/// registers (Vol. 2, INT n/INTO/INT3/INT1).
#[test]
fn int1() {
    for cpl3 in [false, true] {
        let mut c = machine(&[0xf1]);
        if cpl3 {
            user(&mut c);
        }
        c.cpu.state.dr6 = DR6_NONE | BS;
        c.cpu.state.dr7 |= 1 << 13;
        let seen = next_event(&mut c);
        assert_eq!(
            seen,
            Some(Seen {
                dr6: BS,
                ..software(1, 1)
            })
        );
        assert_eq!(c.cpu.state.dr7 & 1 << 13, 0);
    }
}

/// KVM_SET_GUEST_DEBUG with hardware breakpoints: the debugger's DR7 counts, its GD too, and it is
/// told instead of the guest (KVM API, 4.87).
#[test]
fn general_detect_of_a_debugger() {
    let mut c = machine(&[0x90, 0x0f, 0x21, 0xf8]);
    c.cpu.state.dr7 |= 1 << 13;
    c.cpu.guest_debug = GuestDebug {
        hardware_breakpoints: true,
        dr7: 0x400 | 1 << 13,
        ..GuestDebug::default()
    };
    c.cpu.state_changed();
    let exit = c.run();
    let want = Exit::Debug {
        vector: 1,
        dr6: DR6_NONE | BD,
        dr7: 0x400 | 1 << 13,
    };
    assert_eq!(exit, want);
    assert_eq!(c.cpu.state.rip(), CODE + 1);
    // With the debugger's GD clear the guest's own does not count.
    c.cpu.guest_debug.dr7 = 0x400;
    assert_eq!(next_event(&mut c), None);
    assert_eq!(c.reg(reg::RAX), 0x400 | 1 << 13);
}

/// RSM loads DR6 and DR7 with their reserved bits as they must be, whatever the state-save area holds
/// (18.2.3, 18.2.4; APM Vol. 2, table 10-1). SMM runs without breakpoints (SDM Vol. 3, 32.5.1).
#[test]
fn loaded_by_rsm() {
    const SMBASE: u64 = 0x3_0000;
    // mov dword [area of DR7, then DR6], -1 (32-bit addresses; DS is flat); mov eax, dr7; rsm
    let mut handler = Vec::new();
    for at in [0xff60u32, 0xff64, 0xff68, 0xff6c] {
        handler.extend([0x67, 0x66, 0xc7, 0x05]);
        handler.extend((SMBASE as u32 + at).to_le_bytes());
        handler.extend([0xff; 4]);
    }
    handler.extend([0x0f, 0x21, 0xf8, 0x0f, 0xaa]);
    let mut c = machine(&[0x0f, 0x0b]);
    let slots = c.memory.map(0).slots().cloned().collect();
    c.memory.replace(1, MemoryMap::new(slots).unwrap(), None);
    c.put(SMBASE + 0x8000, &handler);
    let s = &mut c.cpu.state;
    s.msr.smbase = SMBASE;
    s.db[0] = SMBASE + 0x8000;
    s.dr7 = dr7(EXECUTE, 1);
    s.events.smi_pending = true;
    // The code goes on; what is armed now watches data elsewhere.
    let seen = next_event(&mut c);
    assert_eq!(seen.map(|s| (s.vector, s.at)), Some((UD, 0)));
    assert_eq!(c.cpu.state.dr6, 0xffff_efff);
    assert_eq!(c.cpu.state.dr7, 0xffff_27ff);
}
