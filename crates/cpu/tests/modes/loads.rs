//! Segment registers, LDTR and TR loaded with every kind of descriptor, and the instructions that ask
//! about descriptors: each descriptor type at each privilege, compared with the rules of the manual
//! (SDM Vol. 2, MOV, LDS/LES/LFS/LGS/LSS, POP, LLDT, LTR, LAR, LSL, VERR, VERW, ARPL).

use anykvm_cpu::events::vector::{GP, NP, SS};
use anykvm_cpu::state::{CpuState, Segment, reg, rflags};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

const ERROR: u32 = FREE as u32;

/// A descriptor's access byte and who uses it.
#[derive(Clone, Copy, Debug)]
struct Case {
    cpl: u8,
    rpl: u8,
    access: u8,
}

impl Case {
    fn kind(&self) -> u8 {
        self.access & 15
    }
    fn memory(&self) -> bool {
        self.access & 0x10 != 0
    }
    fn dpl(&self) -> u8 {
        self.access >> 5 & 3
    }
    fn present(&self) -> bool {
        self.access & 0x80 != 0
    }
    fn code(&self) -> bool {
        self.memory() && self.kind() & 8 != 0
    }
    fn conforming(&self) -> bool {
        self.code() && self.kind() & 4 != 0
    }
    fn readable(&self) -> bool {
        self.memory() && (!self.code() || self.kind() & 2 != 0)
    }
    fn writable(&self) -> bool {
        self.memory() && !self.code() && self.kind() & 2 != 0
    }

    /// MOV to DS (SDM Vol. 2, MOV).
    fn data_load(&self) -> End {
        let privileged = !self.conforming() && (self.rpl > self.dpl() || self.cpl > self.dpl());
        if !self.readable() || privileged {
            Fault(GP, ERROR)
        } else if !self.present() {
            Fault(NP, ERROR)
        } else {
            Done
        }
    }
    /// MOV to SS.
    fn stack_load(&self) -> End {
        if self.rpl != self.cpl || !self.writable() || self.dpl() != self.cpl {
            Fault(GP, ERROR)
        } else if !self.present() {
            Fault(SS, ERROR)
        } else {
            Done
        }
    }
    /// LAR, LSL, VERR and VERW: ZF of each, in that order.
    fn visible(&self, long: bool) -> [bool; 4] {
        let seen = self.conforming() || self.dpl() >= self.cpl.max(self.rpl);
        let system = |types: &[u8]| self.memory() || types.contains(&self.kind());
        // SDM Vol. 2, tables 3-53 and 3-58.
        let lar: &[u8] = if long {
            &[2, 9, 11, 12]
        } else {
            &[1, 2, 3, 4, 5, 9, 11, 12]
        };
        let lsl: &[u8] = if long { &[2, 9, 11] } else { &[1, 2, 3, 9, 11] };
        [
            seen && system(lar),
            seen && system(lsl),
            seen && self.readable(),
            seen && self.writable(),
        ]
    }
}

fn cases(cpls: &[u8]) -> impl Iterator<Item = Case> {
    cpls.iter().flat_map(|&cpl| {
        (0..4).flat_map(move |rpl| (0..=255).map(move |access| Case { cpl, rpl, access }))
    })
}

/// Protected mode at any CPL with data segments that belong to it.
fn at_level(c: &mut Computer, cpl: u8) {
    for s in &mut c.cpu.state.seg[..6] {
        s.set_dpl(cpl);
        s.selector = s.selector & !3 | u16::from(cpl);
    }
}

/// A computer and the state to begin each case with.
fn levels(at: At, code: &[u8]) -> (Computer, Vec<CpuState>) {
    let mut c = computer(at, code);
    let start = c.cpu.state.clone();
    let states = (0..4)
        .map(|cpl| {
            c.cpu.state = start.clone();
            at_level(&mut c, cpl);
            c.cpu.state.clone()
        })
        .collect();
    (c, states)
}

fn begin(c: &mut Computer, state: &CpuState, case: Case) {
    c.cpu.state = state.clone();
    c.cpu.state.regs[reg::RCX] = u64::from(FREE | u16::from(case.rpl));
    c.define(FREE, descriptor(0, 0xf_ffff, case.access, 0xc));
    // The upper half of what long mode takes for 16 bytes.
    c.define(FREE + 8, 0);
    c.cpu.state_changed();
}

/// MOV DS, CX and MOV SS, CX with each of 256 access bytes at each CPL and RPL; the accessed flag is
/// set when it succeeds, and only then.
#[test]
fn data_and_stack_segments() {
    type Rule = fn(&Case) -> End;
    let registers: [(u8, Rule); 2] = [(3, Case::data_load), (2, Case::stack_load)];
    for (register, rule) in registers {
        for at in [Prot32(0), Long(0)] {
            let (mut c, states) = levels(at, &[0x8e, 0xc1 | register << 3]);
            for case in cases(&[0, 1, 2, 3]) {
                begin(&mut c, &states[usize::from(case.cpl)], case);
                if case.access & 0x1c == 0x14 {
                    // Expand-down: room for INT3's frame.
                    c.define(FREE, descriptor(0, 0, case.access, 4));
                }
                let want = rule(&case);
                assert_eq!(end(&mut c), want, "Sreg {register} {at:?} {case:x?}");
                let after = (c.get64(GDT + u64::from(FREE)) >> 40) as u8;
                let accessed = if want == Done {
                    case.access | 1
                } else {
                    case.access
                };
                assert_eq!(after, accessed, "Sreg {register} {at:?} {case:x?}");
            }
        }
    }
}

/// LAR, LSL, VERR and VERW: ZF, and what LAR and LSL give.
#[test]
fn questions_about_descriptors() {
    // lar eax, ecx; setz bl; lsl edx, ecx; setz bh; verr cx; setz [edi]; verw cx; setz [edi+1]
    let code = [
        0x0f, 0x02, 0xc1, 0x0f, 0x94, 0xc3, 0x0f, 0x03, 0xd1, 0x0f, 0x94, 0xc7, 0x0f, 0, 0xe1,
        0x0f, 0x94, 0x07, 0x0f, 0, 0xe9, 0x0f, 0x94, 0x47, 1,
    ];
    for at in [Prot32(0), Long(0)] {
        let (mut c, states) = levels(at, &code);
        for case in cases(&[0, 1, 2, 3]) {
            begin(&mut c, &states[usize::from(case.cpl)], case);
            let r = &mut c.cpu.state.regs;
            (r[reg::RAX], r[reg::RDX], r[reg::RDI], r[reg::RBX]) = (0x55, 0x66, 0x8000, 0);
            assert_eq!(end(&mut c), Done, "{at:?} {case:x?}");
            let b = c.reg(reg::RBX);
            let stored = c.get64(0x8000);
            let got = [b & 1, b >> 8 & 1, stored & 1, stored >> 8 & 1].map(|z| z != 0);
            let want = case.visible(at == Long(0));
            assert_eq!(got, want, "{at:?} {case:x?}");
            let rights = 0x00cf_0000 | u64::from(case.access) << 8;
            assert_eq!(
                c.reg(reg::RAX),
                if want[0] { rights } else { 0x55 },
                "{case:x?}"
            );
            assert_eq!(
                c.reg(reg::RDX),
                if want[1] { 0xffff_ffff } else { 0x66 },
                "{case:x?}"
            );
        }
    }
}

/// Selectors that name nothing: ZF is clear, the register stays.
#[test]
fn questions_about_nothing() {
    for selector in [0u64, 3, 0x100, 0x44, 0xfffc] {
        let mut c = computer(
            Prot32(0),
            &[0x0f, 0x02, 0xc1, 0x0f, 0x94, 0xc3, 0x0f, 0x03, 0xd1],
        );
        let r = &mut c.cpu.state.regs;
        (r[reg::RCX], r[reg::RAX], r[reg::RDX]) = (selector, 0x55, 0x66);
        (c.cpu.state.ldtr.attr, c.cpu.state.regs[reg::RBX]) = (Segment::UNUSABLE, 0);
        assert_eq!(end(&mut c), Done);
        let got = (c.reg(reg::RAX), c.reg(reg::RDX), c.reg(reg::RBX) & 1);
        assert_eq!(got, (0x55, 0x66, 0), "{selector:x}");
        assert_eq!(c.cpu.state.rflags & rflags::ZF, 0);
    }
    // LAR and LSL with 16 bits: the low halves.
    let mut c = computer(Prot32(0), &[0x66, 0x0f, 0x02, 0xc1, 0x66, 0x0f, 0x03, 0xd1]);
    c.define(FREE, descriptor(0, 0x1_2345, 0x93, 4));
    let r = &mut c.cpu.state.regs;
    (r[reg::RAX], r[reg::RDX], r[reg::RCX]) = (0x1111_1111, 0x2222_2222, FREE.into());
    assert_eq!(end(&mut c), Done);
    assert_eq!(
        (c.reg(reg::RAX), c.reg(reg::RDX)),
        (0x1111_9300, 0x2222_2345)
    );
}

/// LLDT and LTR with each system type, present and not, in legacy and long mode; what they leave in
/// the table.
#[test]
fn system_segments() {
    for (instruction, valid) in [(0xd1u8, [2u8, 2]), (0xd9, [1, 9])] {
        for at in [Prot32(0), Long(0)] {
            let (mut c, states) = levels(at, &[0x0f, 0, instruction]);
            for case in cases(&[0]) {
                begin(&mut c, &states[0], case);
                let kinds = if at == Long(0) { [valid[1]; 2] } else { valid };
                let want = if case.memory() || !kinds.contains(&case.kind()) {
                    Fault(GP, ERROR)
                } else if !case.present() {
                    Fault(NP, ERROR)
                } else {
                    Done
                };
                assert_eq!(end(&mut c), want, "{instruction:x} {at:?} {case:x?}");
                let busy = if want == Done && instruction == 0xd9 {
                    2
                } else {
                    0
                };
                let after = (c.get64(GDT + u64::from(FREE)) >> 40) as u8;
                assert_eq!(
                    after,
                    case.access | busy,
                    "{instruction:x} {at:?} {case:x?}"
                );
            }
        }
    }
}

/// Where LLDT and LTR may look, and long mode's upper halves (SDM Vol. 2, LLDT, LTR; Vol. 3, 8.2.3).
#[test]
fn system_segment_selectors() {
    const LDT: u8 = 0x82;
    const TSS: u8 = 0x89;
    // Mode; ModRM; selector; access byte; upper half; end.
    let rows: &[(At, u8, u16, u8, u64, End)] = &[
        (Prot32(0), 0xd1, 0, LDT, 0, Done),
        (Prot32(0), 0xd1, 3, LDT, 0, Done),
        (Prot32(0), 0xd9, 0, TSS, 0, GP0),
        (Prot32(0), 0xd9, 3, TSS, 0, GP0),
        (Prot32(0), 0xd1, FREE | 4, LDT, 0, Fault(GP, ERROR | 4)),
        (Prot32(0), 0xd9, FREE | 7, TSS, 0, Fault(GP, ERROR | 4)),
        (Prot32(0), 0xd1, 0x100, LDT, 0, Fault(GP, 0x100)),
        (Prot32(0), 0xd9, 0x103, TSS, 0, Fault(GP, 0x100)),
        // RPL does not matter.
        (Prot32(0), 0xd1, FREE | 3, LDT, 0, Done),
        (Prot32(0), 0xd9, FREE | 3, TSS, 0, Done),
        // Legacy descriptors have no upper half.
        (Prot32(0), 0xd9, FREE, TSS, u64::MAX, Done),
        (Long(0), 0xd9, FREE, TSS, 0xffff_8000, Done),
        (Long(0), 0xd1, FREE, LDT, 0x7fff, Done),
        // Bases are canonical with 57 bits, whatever CR4.LA57 is.
        (Long(0), 0xd1, FREE, LDT, 0x8000, Done),
        (Long(0), 0xd1, FREE, LDT, 0x100_0000, Fault(GP, ERROR)),
        (Long(0), 0xd9, FREE, TSS, 0x1ff_ffff, Fault(GP, ERROR)),
        // A type in the upper half.
        (Long(0), 0xd9, FREE, TSS, 0x200 << 32, Fault(GP, ERROR)),
        (Long(0), 0xd1, FREE, LDT, 0x1000 << 32, Fault(GP, ERROR)),
        // The upper half is beyond the limit of the GDT.
        (Long(0), 0xd9, 0xf8, TSS, 0, Fault(GP, 0xf8)),
        (Compat32(0), 0xd9, FREE, TSS, 0xffff_8000, Done),
    ];
    for &(at, modrm, selector, access, high, want) in rows {
        let mut c = computer(at, &[0x0f, 0, modrm]);
        for n in [FREE, 0xf8] {
            c.define(n, descriptor(0x5000, 0xfff, access, 0));
        }
        c.define(FREE + 8, high);
        c.cpu.state.regs[reg::RCX] = selector.into();
        assert_eq!(end(&mut c), want, "{at:?} {modrm:x} {selector:x} {high:x}");
        if want == Done && selector == FREE && high != u64::MAX {
            let s = if modrm == 0xd1 {
                c.cpu.state.ldtr
            } else {
                c.cpu.state.tr
            };
            assert_eq!(s.base, high << 32 | 0x5000);
        }
    }
}

/// Loads from the LDT: its limit, its absence (SDM Vol. 3, 3.5.1).
#[test]
fn descriptors_in_the_ldt() {
    for (limit, usable, selector, want) in [
        (0xfu32, true, 0xcu64, Done),
        (0xe, true, 0xc, Fault(GP, 0xc)),
        (0xf, true, 0x14, Fault(GP, 0x14)),
        (0xf, false, 0xc, Fault(GP, 0xc)),
        // Index 0 of the LDT is a descriptor like any other.
        (0xf, true, 4, Done),
    ] {
        let mut c = computer(Prot32(0), &[0x8e, 0xd9]);
        c.put64(0x2_0000, descriptor(0, 0xf_ffff, 0x93, 0xc));
        c.put64(0x2_0008, descriptor(0, 0xf_ffff, 0x93, 0xc));
        c.cpu.state.ldtr = Segment {
            base: 0x2_0000,
            limit,
            attr: if usable { 0x82 } else { Segment::UNUSABLE },
            ..Segment::default()
        };
        c.cpu.state.regs[reg::RCX] = selector;
        assert_eq!(end(&mut c), want, "{limit:x} {selector:x}");
    }
}

/// LSS, LDS and their kind: nothing is loaded unless all is (SDM Vol. 2, LDS).
#[test]
fn far_pointers() {
    for (bytes, selector, want) in [
        (&[0xc5u8, 0x07][..], DATA0, Done),
        (&[0xc4, 0x07], 0, Done),
        (&[0x0f, 0xb2, 0x07], DATA0, Done),
        (&[0x0f, 0xb2, 0x07], 0, GP0),
        (&[0x0f, 0xb2, 0x07], CODE0, Fault(GP, CODE0 as u32)),
        (
            &[0x0f, 0xb4, 0x07],
            TSS_SELECTOR,
            Fault(GP, TSS_SELECTOR as u32),
        ),
        (&[0x0f, 0xb5, 0x07], 0x100, Fault(GP, 0x100)),
    ] {
        let mut c = computer(Prot32(0), bytes);
        c.put(0x8000, &0x1234_5678u32.to_le_bytes());
        c.put(0x8004, &selector.to_le_bytes());
        c.cpu.state.regs[reg::RDI] = 0x8000;
        c.cpu.state.regs[reg::RAX] = 0x55;
        assert_eq!(end(&mut c), want, "{bytes:x?} {selector:x}");
        let loaded = if want == Done { 0x1234_5678 } else { 0x55 };
        assert_eq!(c.reg(reg::RAX), loaded, "{bytes:x?} {selector:x}");
    }
}

/// A null SS belongs to 64-bit code below CPL 3 with RPL = CPL (SDM Vol. 3, 3.4.2).
#[test]
fn null_stack_segments() {
    for at in [Prot32(0), Compat32(0), Long(0)] {
        let (mut c, states) = levels(at, &[0x8e, 0xd1]);
        for cpl in 0..4u8 {
            for rpl in 0..4u64 {
                c.cpu.state = states[usize::from(cpl)].clone();
                c.cpu.state.regs[reg::RCX] = rpl;
                c.cpu.state_changed();
                let ok = at == Long(0) && cpl != 3 && rpl == u64::from(cpl);
                assert_eq!(
                    end(&mut c),
                    if ok { Done } else { GP0 },
                    "{at:?} {cpl} {rpl}"
                );
            }
        }
    }
}

/// ARPL (SDM Vol. 2): the destination's RPL is raised to the source's.
#[test]
fn arpl() {
    for old in 0..4u64 {
        for rpl in 0..4u64 {
            // arpl [edi], cx
            let mut c = computer(Prot32(3), &[0x63, 0x0f]);
            c.put(0x8000, &[0x40 | old as u8, 0x12]);
            let r = &mut c.cpu.state.regs;
            (r[reg::RDI], r[reg::RCX]) = (0x8000, rpl);
            assert_eq!(end(&mut c), Done);
            assert_eq!(c.get64(0x8000), 0x1240 | old.max(rpl));
            // The saved EFLAGS.
            let zf = u64::from(c.stack32(2)) & rflags::ZF != 0;
            assert_eq!(zf, old < rpl, "{old} {rpl}");
        }
    }
}
