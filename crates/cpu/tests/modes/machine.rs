//! One piece of code in any mode, and how it ended.

use std::fmt;

use anykvm_cpu::Exit;
use anykvm_cpu::cpuid::CpuidTable;
use anykvm_cpu::events::vector;
use anykvm_cpu::state::{Segment, Table, cr4, reg, rflags, seg};

use crate::harness::Computer;
use crate::harness::tables::*;

/// Linear address of the code in every mode.
pub const CODE: u64 = 0x1000;
/// INT3, which ends the code in every mode at every privilege level.
pub const END: u8 = 0xcc;
/// 16- and 32-bit code and 16-bit stacks for [`At`]; the selectors without RPL.
const CODE16_0: u16 = 0x80;
const CODE16_3: u16 = 0x88;
const STACK16_0: u16 = 0x90;
const STACK16_3: u16 = 0x98;
const CODE32_0: u16 = 0xa0;
const CODE32_3: u16 = 0xa8;
/// Real-mode handlers: HLT at this address + vector.
const REAL_HANDLERS: u64 = 0x3000;

/// A mode and a privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode with this IOPL.
    V86(u8),
    /// 16-bit protected mode at this CPL.
    Prot16(u8),
    /// 32-bit protected mode at this CPL.
    Prot32(u8),
    /// 16-bit code of compatibility mode.
    Compat16(u8),
    /// 32-bit code of compatibility mode.
    Compat32(u8),
    /// 64-bit mode.
    Long(u8),
}

pub use At::{Compat16, Compat32, Long, Prot16, Prot32, Real, V86};

/// How the code ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// At its INT3.
    Done,
    /// In HLT.
    Halt,
    /// An exception or interrupt without an error code.
    Event(u8),
    /// An exception with its error code.
    Fault(u8, u32),
    /// A triple fault.
    Shutdown,
}

pub use End::{Done, Event, Fault, Halt, Shutdown};

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Done => f.write_str("done"),
            Halt => f.write_str("HLT"),
            Event(v) => write!(f, "vector {v}"),
            Fault(v, code) => write!(f, "vector {v}, error code {code:#x}"),
            Shutdown => f.write_str("shutdown"),
        }
    }
}

pub const UD: End = Event(vector::UD);
pub const GP0: End = Fault(vector::GP, 0);

/// A computer about to run `code` (and INT3) in a mode. Data segments are flat but in real and
/// virtual-8086 mode, where they are 0.
pub fn computer(at: At, code: &[u8]) -> Computer {
    let mut c = match at {
        Real => real(),
        Long(_) | Compat16(_) | Compat32(_) => Computer::with_tables64(CODE),
        _ => Computer::with_tables(CODE as u32),
    };
    if at != Real {
        protected(&mut c, at);
    }
    c.put(CODE, code);
    c.put(CODE + code.len() as u64, &[END]);
    c.cpu.state_changed();
    c
}

fn real() -> Computer {
    let mut c = Computer::real(2 << 20, CODE as u16);
    for v in 0..256u64 {
        c.put(v * 4, &((REAL_HANDLERS + v) as u32).to_le_bytes());
        c.put(REAL_HANDLERS + v, &[0xf4]);
    }
    c.cpu.state.idtr = Table {
        limit: 0x3ff,
        ..Table::default()
    };
    c
}

fn protected(c: &mut Computer, at: At) {
    for (selector, access, flags) in [
        (CODE16_0, 0x9b, 8),
        (CODE16_3, 0xfb, 8),
        (STACK16_0, 0x93, 8),
        (STACK16_3, 0xf3, 8),
        (CODE32_0, 0x9b, 0xc),
        (CODE32_3, 0xfb, 0xc),
    ] {
        c.define(selector, descriptor(0, 0xf_ffff, access, flags));
    }
    // INT3 is for everybody.
    let wide = matches!(at, Long(_) | Compat16(_) | Compat32(_));
    let bp = 3 * if wide { 16 } else { 8 };
    c.put64(IDT + bp, gate(CODE0, HANDLERS + 0x30, 0xee, 0));
    let (code, stack, db, l) = match at {
        Prot16(cpl) | Compat16(cpl) if cpl == 3 => (CODE16_3 | 3, STACK16_3 | 3, false, false),
        Prot16(_) | Compat16(_) => (CODE16_0, STACK16_0, false, false),
        Prot32(3) => (CODE3, DATA3, true, false),
        Compat32(3) => (CODE32_3 | 3, DATA3, true, false),
        Compat32(_) => (CODE32_0, DATA0, true, false),
        Long(3) => (CODE3, DATA3, false, true),
        Long(_) => (CODE0, DATA0, false, true),
        _ => (CODE0, DATA0, true, false),
    };
    if code & 3 == 3 {
        c.user();
    }
    let s = &mut c.cpu.state;
    let set = |s: &mut Segment, selector: u16, flag: u32, on: bool| {
        s.selector = selector;
        s.attr = s.attr & !flag | if on { flag } else { 0 };
    };
    set(&mut s.seg[usize::from(seg::CS)], code, Segment::DB, db);
    set(&mut s.seg[usize::from(seg::CS)], code, Segment::L, l);
    let big = db || l;
    set(&mut s.seg[usize::from(seg::SS)], stack, Segment::DB, big);
    if let V86(iopl) = at {
        for segment in &mut s.seg[..6] {
            *segment = Segment {
                limit: 0xffff,
                attr: 0xf3,
                ..Segment::default()
            };
        }
        s.rflags |= rflags::VM | u64::from(iopl) << 12;
        s.regs[reg::RSP] = 0x9000;
    }
}

/// Runs to the end of the code or to a handler.
pub fn end(c: &mut Computer) -> End {
    let exit = c.run();
    if exit == Exit::Shutdown {
        return Shutdown;
    }
    assert_eq!(exit, Exit::Hlt, "{}", c.cpu.dump());
    let at = c.cpu.state.rip() - 1;
    let v = if c.cpu.state.protected() {
        if !(HANDLERS..HANDLERS + 0x1000).contains(&at) {
            return Halt;
        }
        (at - HANDLERS) / 16
    } else {
        if !(REAL_HANDLERS..REAL_HANDLERS + 0x100).contains(&at) {
            return Halt;
        }
        return event((at - REAL_HANDLERS) as u8, None);
    };
    let code = c.stack32(0);
    let has_code = matches!(v as u8, 8 | 10..=14 | 17);
    event(v as u8, has_code.then_some(code))
}

fn event(v: u8, code: Option<u32>) -> End {
    match (v, code) {
        (vector::BP, _) => Done,
        (v, Some(code)) => Fault(v, code),
        (v, None) => Event(v),
    }
}

/// `code` in a mode, from its first instruction to its end.
pub fn run(at: At, code: &[u8]) -> End {
    end(&mut computer(at, code))
}

/// What real mode makes of an expected end: its exceptions have no error codes.
pub fn in_real(want: End) -> End {
    match want {
        Fault(v, _) => Event(v),
        other => other,
    }
}

/// Makes the processor an Intel or AMD one, as CPUID tells it.
pub fn vendor(c: &mut Computer, amd: bool) {
    let mut entries = c.cpu.cpuid.entries().to_vec();
    let name: &[u8; 12] = if amd {
        b"AuthenticAMD"
    } else {
        b"GenuineIntel"
    };
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    for e in entries.iter_mut().filter(|e| e.function == 0) {
        (e.ebx, e.edx, e.ecx) = (word(0), word(4), word(8));
    }
    c.cpu.cpuid = CpuidTable::new(entries);
    c.cpu.state_changed();
}

/// Sets CR4 bits.
pub fn set_cr4(c: &mut Computer, bits: u64) {
    c.cpu.state.cr4 |= bits;
    c.cpu.state_changed();
}

/// CR4 bits that make every instruction of these tables available.
pub const CR4_ALL: u64 = cr4::FSGSBASE | cr4::OSXSAVE | cr4::OSFXSR | cr4::OSXMMEXCPT;
