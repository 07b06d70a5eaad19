//! 64-bit code whose events are written down: each handler halts, then returns.

use anykvm_cpu::Exit;
use anykvm_cpu::state::{Segment, reg, rflags};

use crate::harness::Computer;
use crate::harness::tables::*;

/// Where the code under test is.
pub const CODE: u64 = 0x1000;
/// A page for its data.
pub const DATA: u64 = 0x8000;
/// DR6 without any cause.
pub const DR6_NONE: u64 = 0xffff_0ff0;
/// DR6.BD, BS and BT.
pub const BD: u64 = 1 << 13;
pub const BS: u64 = 1 << 14;
pub const BT: u64 = 1 << 15;
pub const HLT: u8 = 0xf4;

/// An event as its handler finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub vector: u8,
    /// Offset of the saved RIP from [`CODE`].
    pub at: i64,
    /// The causes in DR6, which is cleared behind each event unless it is to accumulate.
    pub dr6: u64,
    /// RF in the saved RFLAGS.
    pub rf: bool,
}

/// A #DB trap: the saved RF is clear.
pub const fn trap(at: i64, dr6: u64) -> Seen {
    Seen {
        vector: 1,
        at,
        dr6,
        rf: false,
    }
}

/// A #DB that saves RF.
pub const fn resuming(at: i64, dr6: u64) -> Seen {
    Seen {
        rf: true,
        ..trap(at, dr6)
    }
}

/// A fault of another vector.
pub const fn fault(vector: u8, at: i64) -> Seen {
    Seen {
        vector,
        at,
        dr6: 0,
        rf: true,
    }
}

/// INT n, INT1, INT3.
pub const fn software(vector: u8, at: i64) -> Seen {
    Seen {
        vector,
        at,
        dr6: 0,
        rf: false,
    }
}

/// DR7 with breakpoint 0 enabled: R/W and the number of bytes.
pub fn dr7(rw: u64, len: u64) -> u64 {
    let code = match len {
        1 => 0,
        2 => 1,
        8 => 2,
        _ => 3,
    };
    0x402 | (rw | code << 2) << 16
}

/// R/W values.
pub const EXECUTE: u64 = 0;
pub const WRITE: u64 = 1;
pub const IO: u64 = 2;
pub const READ_WRITE: u64 = 3;

/// The machine at CPL 0 about to run `code` and then HLT.
pub fn machine(code: &[u8]) -> Computer {
    let mut c = Computer::with_tables64(CODE);
    c.put(CODE, code);
    c.put(CODE + code.len() as u64, &[HLT]);
    for n in 0..256 {
        let has_error_code = matches!(n, 8 | 10..=14 | 17);
        let skip: &[u8] = if has_error_code {
            &[HLT, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf]
        } else {
            &[HLT, 0x48, 0xcf]
        };
        c.put(HANDLERS + n * 16, skip);
    }
    let s = &mut c.cpu.state;
    s.regs[reg::RBX] = DATA;
    s.regs[reg::RSI] = DATA;
    s.regs[reg::RDI] = DATA + 0x800;
    c
}

/// Runs to the next event's handler, or to the HLT behind the code (`None`).
pub fn next_event(c: &mut Computer) -> Option<Seen> {
    c.cpu.state_changed();
    let exit = c.run();
    assert_eq!(exit, Exit::Hlt, "{}", c.cpu.dump());
    let rip = c.cpu.state.rip();
    let handler = rip.wrapping_sub(HANDLERS);
    if handler >= 256 * 16 {
        return None;
    }
    assert_eq!(handler % 16, 1, "{}", c.cpu.dump());
    let vector = (handler / 16) as u8;
    let skip = u64::from(matches!(vector, 8 | 10..=14 | 17));
    Some(Seen {
        vector,
        at: c.stack64(skip).wrapping_sub(CODE) as i64,
        dr6: c.cpu.state.dr6 ^ DR6_NONE,
        rf: c.stack64(skip + 2) & rflags::RF != 0,
    })
}

/// All events up to the HLT behind the code, at most `most`. TF is cleared in the saved flags of
/// every one if `once`. A handler sets RF for an instruction breakpoint, as the SDM tells it to.
pub fn events(c: &mut Computer, most: usize) -> Vec<Seen> {
    let mut list = Vec::new();
    while list.len() < most {
        let Some(seen) = next_event(c) else { break };
        list.push(seen);
        let skip = u64::from(matches!(seen.vector, 8 | 10..=14 | 17));
        let at = c.reg(reg::RSP) + (skip + 2) * 8;
        if seen.vector == 1 && seen.dr6 & 15 != 0 {
            let flags = c.get64(at) | rflags::RF;
            c.put64(at, flags);
        }
        if seen.rf && seen.vector != 1 {
            // A fault: go on behind the code, where HLT is.
            return list;
        }
        c.cpu.state.dr6 = DR6_NONE;
    }
    list
}

/// To CPL 3, keeping everything else.
pub fn user(c: &mut Computer) {
    c.user();
    // 64-bit code at CPL 3.
    c.cpu.state.seg[1] = Segment {
        attr: 0xa0fb,
        selector: CODE3,
        ..c.cpu.state.seg[1]
    };
    c.cpu.state_changed();
}
