//! SYSCALL, SYSRET, SYSENTER and SYSEXIT in every mode on Intel's and AMD's processors (SDM Vol. 2 and
//! APM Vol. 3 at each instruction; SDM Vol. 3, 5.8.7 and 5.8.8).

use anykvm_cpu::events::vector::SS;
use anykvm_cpu::state::{Segment, efer, reg, rflags, seg};

use crate::harness::Computer;
use crate::machine::*;

const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRET: &[u8] = &[0x0f, 0x07];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXIT: &[u8] = &[0x0f, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];

/// Entry points: HLT. The last is where returns go: INT3.
const LSTAR: u64 = 0x1200;
const CSTAR: u64 = 0x1210;
const STAR: u64 = 0x1220;
const ENTRY: u64 = 0x1230;
const BACK: u64 = 0x1240;
/// IA32_SYSENTER_CS, STAR's CS of SYSCALL and base of SYSRET.
const SYSENTER_CS: u16 = 0x108;
const SYSCALL_CS: u16 = 0x110;
const SYSRET_CS: u16 = 0x123;

/// All entry points set, RCX and RDX those of a return.
fn ready(at: At, amd: bool, code: &[u8]) -> Computer {
    let mut c = computer(at, code);
    vendor(&mut c, amd);
    for entry in [LSTAR, CSTAR, STAR, ENTRY] {
        c.put(entry, &[0xf4]);
    }
    c.put(BACK, &[END]);
    let s = &mut c.cpu.state;
    s.msr.efer |= efer::SCE;
    s.msr.star = STAR | u64::from(SYSCALL_CS) << 32 | u64::from(SYSRET_CS) << 48;
    (s.msr.lstar, s.msr.cstar) = (LSTAR, CSTAR);
    s.msr.sfmask = rflags::IF | rflags::DF;
    s.msr.sysenter_cs = SYSENTER_CS.into();
    (s.msr.sysenter_eip, s.msr.sysenter_esp) = (ENTRY, 0xffff_8000_0000_9000);
    s.regs[reg::RCX] = BACK;
    s.regs[reg::RDX] = BACK;
    s.rflags |= rflags::CF | rflags::DF;
    c.cpu.state_changed();
    c
}

/// Where each instruction ends on each vendor's processor: at an entry point (the address of its HLT),
/// or how else.
#[derive(Clone, Copy, Debug)]
enum To {
    Entry(u64),
    End(End),
}

use To::Entry;

const U: To = To::End(UD);
const G: To = To::End(GP0);
const B: To = To::End(Done);

/// Code; mode; on Intel; on AMD.
const TABLE: &[(&[u8], At, To, To)] = &[
    (SYSCALL, Long(3), Entry(LSTAR), Entry(LSTAR)),
    (SYSCALL, Long(0), Entry(LSTAR), Entry(LSTAR)),
    (SYSCALL, Compat32(3), U, Entry(CSTAR)),
    (SYSCALL, Compat16(3), U, Entry(CSTAR)),
    (SYSCALL, Prot32(3), U, Entry(STAR)),
    (SYSCALL, Prot16(0), U, Entry(STAR)),
    (SYSCALL, V86(0), U, Entry(STAR)),
    (SYSCALL, Real, U, Entry(STAR)),
    (SYSRET, Long(0), B, B),
    (SYSRETQ, Long(0), B, B),
    (SYSRET, Long(3), G, G),
    (SYSRETQ, Long(3), G, G),
    (SYSRET, Compat32(0), U, B),
    (SYSRET, Compat32(3), U, G),
    (SYSRET, Prot32(0), U, B),
    (SYSRET, Prot32(3), U, G),
    (SYSRET, V86(3), U, G),
    (SYSRET, Real, U, G),
    (SYSENTER, Long(3), Entry(ENTRY), U),
    (SYSENTER, Long(0), Entry(ENTRY), U),
    (SYSENTER, Compat32(3), Entry(ENTRY), U),
    (SYSENTER, Prot32(3), Entry(ENTRY), Entry(ENTRY)),
    (SYSENTER, Prot16(0), Entry(ENTRY), Entry(ENTRY)),
    (SYSENTER, V86(0), Entry(ENTRY), Entry(ENTRY)),
    (SYSENTER, Real, G, G),
    (SYSEXIT, Long(0), B, U),
    (SYSEXITQ, Long(0), B, U),
    (SYSEXIT, Long(3), G, G),
    (SYSEXIT, Compat32(0), B, U),
    (SYSEXIT, Prot32(0), B, B),
    (SYSEXIT, Prot32(3), G, G),
    (SYSEXIT, V86(3), G, G),
    (SYSEXIT, Real, G, G),
];

#[test]
fn where_they_go() {
    for &(code, at, intel, amd) in TABLE {
        for (is_amd, to) in [(false, intel), (true, amd)] {
            let mut c = ready(at, is_amd, code);
            let got = end(&mut c);
            let what = format!("{code:x?} in {at:?}, AMD {is_amd}");
            match to {
                Entry(entry) => assert_eq!((got, c.cpu.state.rip()), (Halt, entry + 1), "{what}"),
                To::End(want) if at == Real => assert_eq!(got, in_real(want), "{what}"),
                To::End(want) => assert_eq!(got, want, "{what}"),
            }
        }
    }
    // What switches them off: EFER.SCE, a null IA32_SYSENTER_CS.
    for &(code, at, ..) in TABLE {
        for amd in [false, true] {
            let mut c = ready(at, amd, code);
            c.cpu.state.msr.efer &= !efer::SCE;
            c.cpu.state.msr.sysenter_cs = 3;
            c.cpu.state_changed();
            let system_call = code.ends_with(&[5]) || code.ends_with(&[7]);
            let long = matches!(at, Long(_) | Compat32(_) | Compat16(_));
            // SYSEXIT looks at the privilege first.
            let user = code == SYSEXIT && at == Long(3);
            let want = if system_call || amd && long && !user {
                UD
            } else {
                GP0
            };
            let want = if at == Real { in_real(want) } else { want };
            assert_eq!(end(&mut c), want, "{code:x?} in {at:?}, AMD {amd}");
        }
    }
}

/// CS and SS of a handler: selectors, flat, at a level, with L or D.
fn assert_flat(c: &Computer, cs: u16, ss: u16, level: u8, long: bool, what: &str) {
    let [s, stack] = [seg::CS, seg::SS].map(|n| c.cpu.state.seg[usize::from(n)]);
    assert_eq!((s.selector, stack.selector), (cs, ss), "{what}");
    for s in [s, stack] {
        assert_eq!((s.base, s.limit, s.dpl()), (0, u32::MAX, level), "{what}");
        assert!(s.present() && !s.unusable(), "{what}");
    }
    assert_eq!((s.long(), s.db(), s.kind()), (long, !long, 11), "{what}");
    assert_eq!((stack.kind(), stack.db()), (3, true), "{what}");
    assert_eq!(c.cpu.state.cpl(), level, "{what}");
}

#[test]
fn state_behind_entries() {
    for (code, at, amd) in [
        (SYSCALL, Long(3), false),
        (SYSCALL, Long(3), true),
        (SYSCALL, Compat32(3), true),
        (SYSCALL, Prot32(3), true),
        (SYSENTER, Long(3), false),
        (SYSENTER, Compat32(3), false),
        (SYSENTER, Prot32(3), false),
        (SYSENTER, Prot32(3), true),
    ] {
        let mut c = ready(at, amd, code);
        c.cpu.state.rflags |= rflags::IF | rflags::IOPL;
        c.cpu.state_changed();
        let rsp = c.reg(reg::RSP);
        assert_eq!(end(&mut c), Halt);
        let what = format!("{code:x?} in {at:?}, AMD {amd}");
        let long = at != Prot32(3);
        let (cs, syscall) = if code == SYSCALL {
            (SYSCALL_CS, true)
        } else {
            (SYSENTER_CS, false)
        };
        assert_flat(&c, cs, cs + 8, 0, long, &what);
        let before = rflags::FIXED | rflags::CF | rflags::DF | rflags::IF | rflags::IOPL;
        let s = &c.cpu.state;
        if syscall {
            assert_eq!(s.regs[reg::RCX], CODE + 2, "{what}");
            assert_eq!(s.regs[reg::RSP], rsp, "{what}");
            // Legacy mode has no mask and no R11.
            let cleared = rflags::IF | if long { rflags::DF } else { 0 };
            assert_eq!(s.rflags, before & !cleared, "{what}");
            assert_eq!(s.regs[11], if long { before } else { 0 }, "{what}");
        } else {
            let sp = if long { 0xffff_8000_0000_9000 } else { 0x9000 };
            assert_eq!(s.regs[reg::RSP], sp, "{what}");
            assert_eq!(s.rflags, before & !rflags::IF, "{what}");
        }
    }
}

#[test]
fn state_behind_returns() {
    for (code, at, amd, cs, ss, long) in [
        (SYSRET, Long(0), false, SYSRET_CS, SYSRET_CS + 8, false),
        (SYSRETQ, Long(0), false, SYSRET_CS + 16, SYSRET_CS + 8, true),
        (SYSRET, Long(0), true, SYSRET_CS, SYSRET_CS + 8, false),
        (SYSRETQ, Long(0), true, SYSRET_CS + 16, SYSRET_CS + 8, true),
        (SYSRET, Prot32(0), true, SYSRET_CS, SYSRET_CS + 8, false),
        (
            SYSEXIT,
            Long(0),
            false,
            (SYSENTER_CS + 16) | 3,
            (SYSENTER_CS + 24) | 3,
            false,
        ),
        (
            SYSEXITQ,
            Long(0),
            false,
            (SYSENTER_CS + 32) | 3,
            (SYSENTER_CS + 40) | 3,
            true,
        ),
        (
            SYSEXIT,
            Prot32(0),
            true,
            (SYSENTER_CS + 16) | 3,
            (SYSENTER_CS + 24) | 3,
            false,
        ),
    ] {
        let mut c = ready(at, amd, code);
        // RF and VM do not come back, reserved bits do not appear.
        c.cpu.state.regs[11] = !rflags::TF;
        // The state at the first instruction there.
        c.put(BACK, &[0x0f, 0x0b]);
        c.cpu.state_changed();
        assert_eq!(c.cpu.run(1), anykvm_cpu::Exit::Budget);
        let what = format!("{code:x?} in {at:?}, AMD {amd}");
        assert_eq!(c.cpu.state.rip(), BACK, "{what}");
        assert_flat(&c, cs, ss, 3, long, &what);
        let flags = c.cpu.state.rflags;
        let own = rflags::FIXED | rflags::CF | rflags::DF;
        match (code == SYSRET || code == SYSRETQ, at) {
            (true, Long(_)) => assert_eq!(flags, 0x3c_7fd7 & !rflags::TF | 2, "{what}"),
            (true, _) => assert_eq!(flags, own | rflags::IF, "{what}"),
            _ => {
                assert_eq!(flags, own, "{what}");
                assert_eq!(c.reg(reg::RSP), BACK, "{what}");
            }
        }
    }
}

/// A return address that is not canonical: Intel's SYSRET and SYSEXIT are #GP(0) at level 0, AMD's
/// SYSRET returns, and the fetch is #GP(0) at level 3.
#[test]
fn return_addresses() {
    const BAD: u64 = 1 << 47;
    for (code, amd, rcx, rdx, rip) in [
        (SYSRETQ, false, BAD, BACK, CODE),
        (SYSRETQ, true, BAD, BACK, BAD),
        (SYSEXITQ, false, BACK, BAD, CODE),
        (SYSEXITQ, false, BAD, BACK, CODE),
    ] {
        let mut c = ready(Long(0), amd, code);
        (c.cpu.state.regs[reg::RCX], c.cpu.state.regs[reg::RDX]) = (rcx, rdx);
        assert_eq!(end(&mut c), GP0, "{code:x?}, AMD {amd}");
        assert_eq!(c.stack64(1), rip, "{code:x?}, AMD {amd}");
        assert_eq!(c.stack64(2) & 3, if rip == BAD { 3 } else { 0 });
    }
    // 32-bit forms take 32 bits.
    let mut c = ready(Long(0), false, SYSRET);
    c.cpu.state.regs[reg::RCX] = 0xdead_0000_0000_0000 | BACK;
    assert_eq!(end(&mut c), Done);
}

/// AMD's SYSRET gives SS its selector and leaves the hidden part but for the level (APM Vol. 3, SYSRET):
/// behind a null SS of 64-bit code, 32-bit code has no stack.
#[test]
fn sysret_and_the_hidden_ss() {
    for (amd, want) in [(false, Done), (true, Fault(SS, 0))] {
        let mut c = ready(Long(0), amd, SYSRET);
        c.put(BACK, &[0x50, END]);
        c.cpu.state.seg[usize::from(seg::SS)] = Segment {
            attr: Segment::UNUSABLE,
            ..Segment::default()
        };
        c.cpu.state_changed();
        assert_eq!(end(&mut c), want, "AMD {amd}");
        assert_eq!(c.stack64(if amd { 5 } else { 4 }), u64::from(SYSRET_CS + 8));
    }
}
