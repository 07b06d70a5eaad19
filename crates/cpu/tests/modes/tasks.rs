//! Hardware task switches: JMP, CALL, interrupts and IRET between 16- and 32-bit tasks, through TSSs
//! and task gates; what is saved, marked and linked (SDM Vol. 3, 8.2-8.4 and table 8-2).

use anykvm_cpu::events::vector::GP;
use anykvm_cpu::state::{Segment, cr0, cr4, reg, rflags, seg};

use crate::harness::Computer;
use crate::harness::tables::*;
use crate::machine::*;

/// The incoming task: its TSS, selector, first instruction.
pub const NEW: u64 = 0x5800;
pub const ENTRY: u32 = 0x1100;
/// A task gate to it, in the GDT and at vector 64h.
pub const GATE: u16 = 0xc0;
const INT: u8 = 0x64;
/// Descriptors that the new task's selectors name.
pub const BAD: u16 = 0xd0;

/// How a task is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Jump,
    Call,
    JumpGate,
    CallGate,
    Interrupt,
    Exception,
}

pub use By::{Call, CallGate, Exception, Interrupt, Jump, JumpGate};

pub const EVERY_WAY: [By; 6] = [Jump, Call, JumpGate, CallGate, Interrupt, Exception];

impl By {
    pub fn code(self) -> Vec<u8> {
        let [far, gate] = [FREE, GATE].map(|s| s as u8);
        match self {
            Jump => vec![0xea, 0, 0, 0, 0, far, 0],
            Call => vec![0x9a, 0, 0, 0, 0, far, 0],
            JumpGate => vec![0xea, 0, 0, 0, 0, gate, 0],
            CallGate => vec![0x9a, 0, 0, 0, 0, gate, 0],
            Interrupt => vec![0xcd, INT],
            Exception => vec![0x0f, 0x0b],
        }
    }
    fn nests(self) -> bool {
        !matches!(self, Jump | JumpGate)
    }
    /// Where the old task goes on.
    fn resumes_at(self) -> u32 {
        CODE as u32
            + if self == Exception {
                0
            } else {
                self.code().len() as u32
            }
    }
}

/// A TSS image: 16- or 32-bit, with EAX 1111h, ECX 2222h, …, flat segments, ESP D000h.
pub fn put_tss(c: &mut Computer, base: u64, wide: bool, eip: u32) {
    c.put(base, &[0; 104]);
    let size = if wide { 4 } else { 2 };
    let mut put = |offset: u64, v: u32| c.put(base + offset, &v.to_le_bytes()[..size as usize]);
    let (ip, gpr, segments) = if wide { (32, 40, 72) } else { (14, 18, 34) };
    put(ip, eip);
    put(ip + size, 2);
    for i in 0..8u64 {
        put(
            gpr + i * size,
            if i == 4 {
                0xd000
            } else {
                0x1111 * (i as u32 + 1)
            },
        );
    }
    for i in 0..if wide { 6 } else { 4 } {
        put(
            segments + i * size,
            if i == 1 { CODE0 } else { DATA0 }.into(),
        );
    }
}

pub fn define_tss(c: &mut Computer, selector: u16, base: u64, wide: bool) {
    let (kind, limit) = if wide { (0x89, 0x67) } else { (0x81, 0x2b) };
    c.define(selector, descriptor(base as u32, limit, kind, 0));
}

/// A task of either kind about to enter a task of either kind.
pub fn two_tasks(by: By, old_wide: bool, new_wide: bool) -> Computer {
    let mut c = computer(Prot32(0), &by.code());
    put_tss(&mut c, NEW, new_wide, ENTRY);
    c.put(ENTRY.into(), &[0xf4]);
    define_tss(&mut c, FREE, NEW, new_wide);
    let task_gate = gate(FREE, 0, 0xe5, 0);
    c.define(GATE, task_gate);
    for v in [u64::from(INT), 6] {
        c.put64(IDT + v * 8, task_gate);
    }
    if !old_wide {
        c.cpu.state.tr.attr = 0x83;
        c.cpu.state.tr.limit = 0x2b;
        c.define(TSS_SELECTOR, descriptor(TSS as u32, 0x2b, 0x83, 0));
    }
    for n in 0..8u8 {
        if n != reg::RSP {
            c.cpu.state.regs[n] = 0x0a0a_0000 + u64::from(n);
        }
    }
    c.cpu.state.ldtr.attr = Segment::UNUSABLE;
    c.cpu.state_changed();
    c
}

fn access(c: &Computer, selector: u16) -> u8 {
    (c.get64(GDT + u64::from(selector)) >> 40) as u8
}

/// A field of a TSS by its place in the 32-bit and the 16-bit form.
fn field(c: &Computer, base: u64, wide: bool, at32: u64, at16: u64) -> u32 {
    if wide {
        c.get64(base + at32) as u32
    } else {
        c.get64(base + at16) as u32 & 0xffff
    }
}

/// Every way from each kind of task to each: registers, saved state, busy flags, link, NT, TS; and
/// back by IRET where the tasks are nested.
#[test]
fn every_switch() {
    for by in EVERY_WAY {
        for (old, new) in [(true, true), (true, false), (false, true), (false, false)] {
            let what = format!("{by:?} from {old} to {new}");
            let mut c = two_tasks(by, old, new);
            let sp = c.reg(reg::RSP) as u32;
            assert_eq!(end(&mut c), Halt, "{what}");
            let s = c.cpu.state.clone();
            assert_eq!(
                (s.tr.selector, s.tr.base, s.rip()),
                (FREE, NEW, u64::from(ENTRY) + 1),
                "{what}"
            );
            assert_eq!(s.tr.attr & 0xf, if new { 0xb } else { 3 }, "{what}");
            assert_ne!(s.cr0 & cr0::TS, 0, "{what}");
            assert_eq!(s.rflags & rflags::NT != 0, by.nests(), "{what}");
            assert_eq!(s.regs[reg::RCX] as u16, 0x2222, "{what}");
            assert_eq!(s.regs[reg::RSP] as u16, 0xd000, "{what}");
            assert_eq!(s.seg[usize::from(seg::DS)].selector, DATA0);
            assert_eq!(
                s.seg[usize::from(seg::FS)].selector,
                if new { DATA0 } else { 0 },
                "{what}"
            );
            // The old task's image.
            let mask = if old { u32::MAX } else { 0xffff };
            assert_eq!(field(&c, TSS, old, 32, 14), by.resumes_at(), "{what}: EIP");
            assert_eq!(
                field(&c, TSS, old, 40, 18),
                0x0a0a_0000 & mask,
                "{what}: EAX"
            );
            assert_eq!(field(&c, TSS, old, 56, 26), sp, "{what}: ESP");
            assert_eq!(field(&c, TSS, old, 76, 36) as u16, CODE0, "{what}: CS");
            let flags = field(&c, TSS, old, 36, 16);
            let rf = if by == Exception && old {
                rflags::RF as u32
            } else {
                0
            };
            assert_eq!(flags, 2 | rf, "{what}: EFLAGS");
            // Table 8-2.
            let busy = if by.nests() { 2 } else { 0 };
            assert_eq!(access(&c, TSS_SELECTOR) & 2, busy, "{what}: old busy");
            assert_eq!(access(&c, FREE) & 2, 2, "{what}: new busy");
            let link = if by.nests() { TSS_SELECTOR } else { 0 };
            assert_eq!(c.get64(NEW) as u16, link, "{what}: link");
            if by.nests() {
                back(&mut c, by, old, new, &what);
            }
        }
    }
}

/// IRET with NT from the new task.
fn back(c: &mut Computer, by: By, old: bool, new: bool, what: &str) {
    c.put(u64::from(ENTRY) + 1, &[0xcf]);
    if by == Exception {
        // Behind the undefined instruction.
        let ip = if old { 32 } else { 14 };
        c.put(TSS + ip, &(CODE as u16 + 2).to_le_bytes());
    }
    c.put(TSS + if old { 44 } else { 20 }, &[0x34, 0x12]);
    c.put(CODE + by.code().len() as u64, &[0xf4]);
    c.cpu.state_changed();
    assert_eq!(end(c), Halt, "{what}");
    let s = &c.cpu.state;
    assert_eq!(
        (s.tr.selector, s.regs[reg::RCX] as u16),
        (TSS_SELECTOR, 0x1234),
        "{what}"
    );
    assert_eq!(s.rflags & rflags::NT, 0, "{what}");
    assert_eq!(
        (access(c, TSS_SELECTOR) & 2, access(c, FREE) & 2),
        (2, 0),
        "{what}"
    );
    // The left task's image: behind its IRET, NT clear.
    assert_eq!(field(c, NEW, new, 32, 14), ENTRY + 2, "{what}");
    assert_eq!(
        u64::from(field(c, NEW, new, 36, 16)) & rflags::NT,
        0,
        "{what}"
    );
}

/// A task switch to virtual-8086 mode takes selectors as addresses, and to another address space when
/// paging is on (SDM Vol. 3, 8.3 and 20.2.4).
#[test]
fn virtual_8086_tasks_and_cr3() {
    let mut c = two_tasks(Call, true, true);
    c.put(NEW + 36, &((rflags::VM | 2) as u32).to_le_bytes());
    c.put(NEW + 76, &0x100u16.to_le_bytes());
    c.put(NEW + 32, &0x100u32.to_le_bytes());
    c.put(NEW + 84, &0xffffu16.to_le_bytes());
    c.put64(NEW + 4, STACK0 | u64::from(DATA0) << 32);
    // HLT is #GP(0) in virtual-8086 mode; the frame shows where from.
    assert_eq!(end(&mut c), GP0);
    let words: Vec<u32> = (1..4).map(|n| c.stack32(n)).collect();
    let flags = (rflags::VM | rflags::NT | rflags::RF | 2) as u32;
    assert_eq!(words, [0x100, 0x100, flags]);
    assert_eq!(c.stack32(7), 0xffff);

    // Two page directories of one 4 MiB page each.
    for paging in [false, true] {
        let mut c = two_tasks(Jump, true, true);
        for directory in [0x2_0000, 0x2_1000u64] {
            c.put(directory, &0x83u32.to_le_bytes());
        }
        c.put(NEW + 28, &0x2_1000u32.to_le_bytes());
        c.cpu.state.cr3 = 0x2_0000;
        c.cpu.state.cr4 |= cr4::PSE;
        if paging {
            c.cpu.state.cr0 |= cr0::PG;
        }
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Halt);
        assert_eq!(c.cpu.state.cr3, if paging { 0x2_1000 } else { 0x2_0000 });
    }
}

/// An exception's error code goes on the new task's stack in that task's size; its handler pops it and
/// goes back (SDM Vol. 3, 6.12.2 and 6.13).
#[test]
fn error_codes_of_task_gates() {
    for wide in [true, false] {
        let mut c = two_tasks(Jump, true, wide);
        // mov ds, ax with a selector that is nowhere
        c.put(CODE, &[0x8e, 0xd8, 0xf4]);
        c.cpu.state.regs[reg::RAX] = 0x100;
        c.put64(IDT + 13 * 8, gate(FREE, 0, 0x85, 0));
        // A stack that suits 16 bits of SP.
        c.define(BAD, descriptor(0, 0xffff, 0x93, 0));
        c.put(NEW + if wide { 80 } else { 38 }, &BAD.to_le_bytes());
        assert_eq!(end(&mut c), Halt);
        let size = if wide { 4 } else { 2 };
        assert_eq!(c.reg(reg::RSP) as u16, 0xd000 - size);
        assert_eq!(c.get64(0xd000 - u64::from(size)) & 0xffff, 0x100);
        // add sp, size; iret
        c.put(u64::from(ENTRY) + 1, &[0x66, 0x83, 0xc4, size as u8, 0xcf]);
        c.put(TSS + 32, &(CODE as u32 + 2).to_le_bytes());
        c.cpu.state_changed();
        assert_eq!(end(&mut c), Halt);
        assert_eq!(c.cpu.state.rip(), CODE + 3);
    }
}

/// No task switches in long mode (SDM Vol. 3, 8.7).
#[test]
fn not_in_long_mode() {
    for at in [Compat32(0), Long(0)] {
        for (low, selector) in [
            (descriptor(NEW as u32, 0x67, 0x89, 0), FREE),
            (gate(BAD, 0, 0x85, 0), FREE),
        ] {
            let mut c = computer(at, &[0xff, 0x2f]);
            c.put64(0x8000, u64::from(selector) << 32);
            c.cpu.state.regs[reg::RDI] = 0x8000;
            c.define(selector, low);
            assert_eq!(end(&mut c), Fault(GP, selector.into()));
        }
    }
}
