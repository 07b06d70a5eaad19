//! Far JMP, CALL, RET and IRET to code segments of every type and privilege, with and without a change
//! of level (SDM Vol. 2, JMP, CALL, RET, IRET; Vol. 3, 5.8).

use anykvm_cpu::events::vector::{GP, NP, SS};
use anykvm_cpu::state::{CpuState, Segment, reg, seg};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

const ERROR: u32 = FREE as u32;
/// Where transfers go: INT3.
pub const TARGET: u64 = 0x1100;
/// A stack segment that fits the level that is returned to.
const STACK: u16 = 0xc0;
/// Operands and frames.
pub const FRAME: u64 = 0x8000;

/// What a transfer finds in its selector and descriptor.
#[derive(Clone, Copy, Debug)]
struct Case {
    cpl: u8,
    rpl: u8,
    access: u8,
}

impl Case {
    fn dpl(&self) -> u8 {
        self.access >> 5 & 3
    }
    fn code(&self) -> bool {
        self.access & 0x18 == 0x18
    }
    fn conforming(&self) -> bool {
        self.access & 4 != 0
    }
    fn present(&self, allowed: bool) -> End {
        if !self.code() || !allowed {
            Fault(GP, ERROR)
        } else if self.access & 0x80 == 0 {
            Fault(NP, ERROR)
        } else {
            Done
        }
    }
    /// JMP or CALL straight to a code segment.
    fn direct(&self) -> End {
        self.present(if self.conforming() {
            self.dpl() <= self.cpl
        } else {
            self.rpl <= self.cpl && self.dpl() == self.cpl
        })
    }
    /// RET or IRET.
    fn back(&self) -> End {
        let fits = if self.conforming() {
            self.dpl() <= self.rpl
        } else {
            self.dpl() == self.rpl
        };
        self.present(self.rpl >= self.cpl && fits)
    }
}

/// Every selector and access byte; gates and TSSs have their own tests.
fn cases() -> impl Iterator<Item = Case> {
    let plain = |access: &u8| access & 0x10 != 0 || ![1, 4, 5, 9, 12].contains(&(access & 15));
    (0..4).flat_map(move |cpl| {
        (0..4).flat_map(move |rpl| {
            (0..=255)
                .filter(plain)
                .map(move |access| Case { cpl, rpl, access })
        })
    })
}

/// A computer and a state at each CPL to begin from.
fn levels(at: At, code: &[u8]) -> (Computer, Vec<CpuState>) {
    let mut c = computer(at, code);
    c.put(TARGET, &[END]);
    let start = c.cpu.state.clone();
    let states = (0..4)
        .map(|cpl| {
            c.cpu.state = start.clone();
            for s in &mut c.cpu.state.seg[..6] {
                s.set_dpl(cpl);
                s.selector = s.selector & !3 | u16::from(cpl);
            }
            c.cpu.state.regs[reg::RDI] = FRAME;
            c.cpu.state.clone()
        })
        .collect();
    (c, states)
}

fn begin(c: &mut Computer, state: &CpuState, case: Case, flags: u8) {
    c.cpu.state = state.clone();
    c.define(FREE, descriptor(0, 0xf_ffff, case.access, flags));
    let stack = 0x93 | case.rpl << 5;
    c.define(STACK, descriptor(0, 0xf_ffff, stack, 0xc));
    c.cpu.state_changed();
}

/// The CS selector that INT3's frame holds.
fn saved_cs(c: &Computer, at: At) -> u64 {
    if at == Prot32(0) {
        c.stack32(1).into()
    } else {
        c.stack64(1)
    }
}

fn selector(case: Case) -> u64 {
    u64::from(FREE | u16::from(case.rpl))
}

/// JMP FAR and CALL FAR through memory.
#[test]
fn jumps_and_calls_to_segments() {
    for modrm in [0x2f, 0x1f] {
        for at in [Prot32(0), Long(0)] {
            let (mut c, states) = levels(at, &[0xff, modrm]);
            for case in cases() {
                begin(&mut c, &states[usize::from(case.cpl)], case, 0xc);
                c.put64(FRAME, TARGET | selector(case) << 32);
                let want = case.direct();
                assert_eq!(end(&mut c), want, "{modrm:x} {at:?} {case:x?}");
                if want == Done {
                    // The RPL of CS is the CPL, which does not change.
                    let cs = u64::from(FREE) | u64::from(case.cpl);
                    assert_eq!(saved_cs(&c, at), cs, "{modrm:x} {at:?} {case:x?}");
                    let after = c.get64(GDT + u64::from(FREE)) >> 40;
                    assert_eq!(after & 1, 1, "accessed: {case:x?}");
                }
            }
        }
    }
}

/// RETF and IRET, to the same level and outwards, with a stack segment that fits.
#[test]
fn returns_to_segments() {
    let rows: [(At, &[u8], bool, u64); 4] = [
        (Prot32(0), &[0xcb], false, 4),
        (Prot32(0), &[0xcf], true, 4),
        (Long(0), &[0x48, 0xcb], false, 8),
        (Long(0), &[0x48, 0xcf], true, 8),
    ];
    for (at, code, iret, size) in rows {
        let (mut c, states) = levels(at, code);
        for case in cases() {
            begin(&mut c, &states[usize::from(case.cpl)], case, 0xc);
            let ss = u64::from(STACK) | u64::from(case.rpl);
            let mut frame = vec![TARGET, selector(case)];
            if iret {
                frame.push(2);
            }
            if case.rpl > case.cpl || iret && size == 8 {
                frame.extend([0x9800, ss]);
            }
            push(&mut c, size, &frame);
            let want = case.back();
            assert_eq!(end(&mut c), want, "{code:x?} {at:?} {case:x?}");
            if want == Done {
                let cs = u64::from(FREE) | u64::from(case.rpl);
                assert_eq!(saved_cs(&c, at), cs, "{code:x?} {at:?} {case:x?}");
            }
        }
    }
}

/// Puts a frame on the stack, its first word on top.
pub fn push(c: &mut Computer, size: u64, frame: &[u64]) {
    let rsp = 0xa000 - size * frame.len() as u64;
    for (i, v) in frame.iter().enumerate() {
        let bytes = v.to_le_bytes();
        c.put(rsp + i as u64 * size, &bytes[..size as usize]);
    }
    c.cpu.state.regs[reg::RSP] = rsp;
}

/// The stack segment of a return outwards, by its access byte and selector (SDM Vol. 2, RET and IRET,
/// RETURN-TO-OUTER-PRIVILEGE-LEVEL); a null one is for 64-bit code below CPL 3.
#[test]
fn stack_segments_of_outward_returns() {
    // To which level, SS selector, its access byte, end in legacy mode, in 64-bit mode.
    let rows: &[(u8, u16, u8, End, End)] = &[
        (3, STACK | 3, 0xf3, Done, Done),
        (3, STACK | 3, 0xf2, Done, Done),
        (3, STACK | 3, 0xf7, Done, Done),
        (
            3,
            STACK,
            0xf3,
            Fault(GP, STACK as u32),
            Fault(GP, STACK as u32),
        ),
        (
            3,
            STACK | 3,
            0xd3,
            Fault(GP, STACK as u32),
            Fault(GP, STACK as u32),
        ),
        (
            3,
            STACK | 3,
            0xf1,
            Fault(GP, STACK as u32),
            Fault(GP, STACK as u32),
        ),
        (
            3,
            STACK | 3,
            0xfb,
            Fault(GP, STACK as u32),
            Fault(GP, STACK as u32),
        ),
        (
            3,
            STACK | 3,
            0xe2,
            Fault(GP, STACK as u32),
            Fault(GP, STACK as u32),
        ),
        (
            3,
            STACK | 3,
            0x73,
            Fault(SS, STACK as u32),
            Fault(SS, STACK as u32),
        ),
        (3, 0x103, 0xf3, Fault(GP, 0x100), Fault(GP, 0x100)),
        (3, 0, 0xf3, GP0, GP0),
        (3, 3, 0xf3, GP0, GP0),
        (1, 1, 0xf3, GP0, Done),
        (2, 2, 0xf3, GP0, Done),
        (1, 0, 0xf3, GP0, GP0),
        (1, STACK | 1, 0xb3, Done, Done),
        (2, STACK | 2, 0xd3, Done, Done),
    ];
    for &(cpl, ss, access, legacy, long) in rows {
        for (at, code, size) in [
            (Prot32(0), &[0xcbu8][..], 4),
            (Prot32(0), &[0xcf], 4),
            (Long(0), &[0x48, 0xcb], 8),
            (Long(0), &[0x48, 0xcf], 8),
        ] {
            let mut c = computer(at, code);
            c.put(TARGET, &[END]);
            let l = if size == 8 { 0xa } else { 0xc };
            c.define(FREE, descriptor(0, 0xf_ffff, 0x9b | cpl << 5, l));
            let down = access & 0x1c == 0x14;
            c.define(
                STACK,
                descriptor(0, if down { 0 } else { 0xf_ffff }, access, 0xc),
            );
            let mut frame = vec![TARGET, u64::from(FREE) | u64::from(cpl)];
            if code.ends_with(&[0xcf]) {
                frame.push(2);
            }
            frame.extend([0x9800, ss.into()]);
            push(&mut c, size, &frame);
            let want = if size == 8 { long } else { legacy };
            assert_eq!(
                end(&mut c),
                want,
                "{at:?} {code:x?} to {cpl} SS {ss:x} {access:x}"
            );
            if want == Done {
                // INT3's frame: SP and SS of the level returned to.
                let at = if size == 8 {
                    [c.stack64(3), c.stack64(4)]
                } else {
                    [3, 4].map(|n| c.stack32(n).into())
                };
                assert_eq!(at, [0x9800, ss.into()], "{code:x?} {cpl} {ss:x}");
            }
        }
    }
}

/// Data segments behind a return outwards: what the new level may not use becomes null (SDM Vol. 2,
/// RET).
#[test]
fn data_segments_behind_outward_returns() {
    // Access byte of DS; whether it stays at CPL 3.
    for (access, stays) in [
        (0x93u8, false),
        (0xb3, false),
        (0xd3, false),
        (0xf3, true),
        (0x9b, false),
        (0xfb, true),
        (0x9f, true),
        (0xdf, true),
    ] {
        for code in [0xcbu8, 0xcf] {
            let mut c = computer(Prot32(0), &[code]);
            c.put(TARGET, &[END]);
            let ds = &mut c.cpu.state.seg[usize::from(seg::DS)];
            (ds.selector, ds.attr) = (FREE, u32::from(access) | 0xc000);
            let mut frame = vec![TARGET, CODE3.into()];
            if code == 0xcf {
                frame.push(2);
            }
            frame.extend([0x9800, DATA3.into()]);
            push(&mut c, 4, &frame);
            assert_eq!(end(&mut c), Done);
            let ds = c.cpu.state.seg[usize::from(seg::DS)];
            assert_eq!(ds.selector == FREE, stays, "{access:x}");
            assert_eq!(ds.unusable(), !stays, "{access:x}");
        }
    }
}

/// RETF n releases parameters on both stacks; 16-bit forms take 16-bit words.
#[test]
fn released_parameters() {
    // retf 6 to CPL 3
    for (code, size) in [(&[0xcau8, 6, 0][..], 4), (&[0x66, 0xca, 6, 0], 2)] {
        let mut c = computer(Prot32(0), code);
        c.put(TARGET, &[END]);
        let mut frame = vec![TARGET, CODE3.into()];
        // The parameters.
        frame.extend(vec![0x77; 6 / size as usize]);
        push(&mut c, size, &frame);
        let at = c.reg(reg::RSP) + 2 * size + 6;
        for (i, v) in [0x9800u64, DATA3.into()].into_iter().enumerate() {
            c.put(at + i as u64 * size, &v.to_le_bytes()[..size as usize]);
        }
        assert_eq!(end(&mut c), Done);
        assert_eq!(c.stack32(3), 0x9806, "{size}");
    }
    // The same level: only this stack.
    let mut c = computer(Prot32(0), &[0xca, 8, 0]);
    c.put(TARGET, &[0xf4]);
    push(&mut c, 4, &[TARGET, CODE0.into(), 1, 2, 3]);
    let before = c.reg(reg::RSP);
    assert_eq!(end(&mut c), Halt);
    assert_eq!(c.reg(reg::RSP), before + 16);
}

/// EIP beyond the limit of the new code segment, and RIP that is not canonical: #GP(0) before the
/// transfer.
#[test]
fn targets_outside() {
    for code in [&[0xcbu8][..], &[0xcf], &[0xff, 0x2f], &[0xff, 0x1f]] {
        let mut c = computer(Prot32(0), code);
        c.define(FREE, descriptor(0, 0xfff, 0x9b, 4));
        c.cpu.state.regs[reg::RDI] = FRAME;
        c.put64(FRAME, 0x1000 | u64::from(FREE) << 32);
        push(&mut c, 4, &[0x1000, FREE.into(), 2]);
        assert_eq!(end(&mut c), GP0, "{code:x?}");
        assert_eq!(u64::from(c.stack32(1)), CODE, "{code:x?}");
        assert_eq!(c.stack32(2), CODE0.into());
    }
    for code in [
        &[0x48u8, 0xcb][..],
        &[0x48, 0xcf],
        &[0x48, 0xff, 0x2f],
        &[0x48, 0xff, 0x1f],
    ] {
        let mut c = computer(Long(0), code);
        c.cpu.state.regs[reg::RDI] = FRAME;
        c.put64(FRAME, 1 << 47);
        c.put64(FRAME + 8, CODE0.into());
        push(&mut c, 8, &[1 << 47, CODE0.into(), 2, 0x9800, 0]);
        assert_eq!(end(&mut c), GP0, "{code:x?}");
        assert_eq!(c.stack64(1), CODE, "{code:x?}");
    }
}

/// Selectors that are null or outside their table.
#[test]
fn bad_selectors() {
    for (cs, want) in [
        (0u64, GP0),
        (3, GP0),
        (0x100, Fault(GP, 0x100)),
        (0x44, Fault(GP, 0x44)),
        (0xffff, Fault(GP, 0xfffc)),
    ] {
        for code in [&[0xcbu8][..], &[0xcf], &[0xff, 0x2f], &[0xff, 0x1f]] {
            let mut c = computer(Prot32(0), code);
            c.cpu.state.ldtr.attr = Segment::UNUSABLE;
            c.cpu.state.regs[reg::RDI] = FRAME;
            c.put64(FRAME, TARGET | cs << 32);
            push(&mut c, 4, &[TARGET, cs, 2]);
            assert_eq!(end(&mut c), want, "{code:x?} {cs:x}");
        }
    }
}
