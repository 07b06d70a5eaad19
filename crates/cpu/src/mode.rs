//! The execution mode: everything outside an instruction's bytes that decides how they decode and
//! which handler runs them. It is part of a decoded block's key.

use crate::state::{CpuState, Segment, rflags, seg};

/// Size of code, stack and privilege, packed so that it compares in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode(u32);

impl Mode {
    const CODE32: u32 = 1 << 0;
    const CODE64: u32 = 1 << 1;
    const STACK32: u32 = 1 << 2;
    const PROTECTED: u32 = 1 << 3;
    const V86: u32 = 1 << 4;
    const USER: u32 = 1 << 5;
    const LONG: u32 = 1 << 6;
    /// CS, DS, ES and SS are flat: base 0, limit 4 GiB, readable and writable.
    const FLAT: u32 = 1 << 7;
    /// CPL 1 or 2.
    const MIDDLE: u32 = 1 << 8;

    /// The mode this state is in.
    pub fn of(state: &CpuState) -> Self {
        let cs = &state.seg[usize::from(seg::CS)];
        let ss = &state.seg[usize::from(seg::SS)];
        let mut m = 0;
        if state.long_mode() {
            m |= Self::LONG;
        }
        if state.code64() {
            m |= Self::CODE64;
        } else {
            if cs.db() {
                m |= Self::CODE32;
            }
            let flat = |s: &Segment| {
                s.base == 0
                    && s.limit == u32::MAX
                    && !s.unusable()
                    && s.attr & (Segment::P | Segment::S) == Segment::P | Segment::S
            };
            // Data: writable and not expand-down (types 2, 3). Code: readable (types 10, 11 …).
            let data = |s: &Segment| flat(s) && s.kind() & 0b1110 == 0b0010;
            let es = &state.seg[usize::from(seg::ES)];
            let ds = &state.seg[usize::from(seg::DS)];
            if flat(cs) && cs.kind() & 0b1010 == 0b1010 && data(ss) && data(ds) && data(es) {
                m |= Self::FLAT;
            }
        }
        if state.code64() || ss.db() {
            m |= Self::STACK32;
        }
        if state.protected() {
            m |= Self::PROTECTED;
        }
        if state.rflags & rflags::VM != 0 {
            m |= Self::V86;
        }
        m |= match state.cpl() {
            0 => 0,
            3 => Self::USER,
            _ => Self::MIDDLE,
        };
        Self(m)
    }

    /// 16, 32 or 64: the code segment's size.
    pub fn bits(self) -> u32 {
        if self.code64() {
            64
        } else if self.0 & Self::CODE32 != 0 {
            32
        } else {
            16
        }
    }
    /// 64-bit code.
    #[inline(always)]
    pub fn code64(self) -> bool {
        self.0 & Self::CODE64 != 0
    }
    /// Long mode (64-bit or compatibility).
    pub fn long_mode(self) -> bool {
        self.0 & Self::LONG != 0
    }
    /// The stack pointer is RSP (64-bit code), ESP or SP.
    pub fn stack_bits(self) -> u32 {
        if self.code64() {
            64
        } else if self.0 & Self::STACK32 != 0 {
            32
        } else {
            16
        }
    }
    /// CR0.PE.
    pub fn protected(self) -> bool {
        self.0 & Self::PROTECTED != 0
    }
    /// Virtual-8086.
    pub fn virtual_8086(self) -> bool {
        self.0 & Self::V86 != 0
    }
    /// CPL 3.
    #[inline(always)]
    pub fn user(self) -> bool {
        self.0 & Self::USER != 0
    }
    /// CPL 0.
    pub fn cpl0(self) -> bool {
        self.0 & (Self::USER | Self::MIDDLE) == 0
    }
    /// Accesses through CS, SS, DS, ES need no segment checks.
    pub fn flat(self) -> bool {
        self.0 & Self::FLAT != 0
    }
    /// The same 64-bit code at CPL 3, or at CPL 0. `None` for other code, and at CPL 1 and 2.
    pub fn other_privilege(self) -> Option<Self> {
        let possible = self.code64() && self.0 & Self::MIDDLE == 0;
        possible.then_some(Self(self.0 ^ Self::USER))
    }
    /// The packed bits, for keys.
    pub fn bits_packed(self) -> u32 {
        self.0
    }
}
