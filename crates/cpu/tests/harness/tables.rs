//! Descriptor tables for the tests of protected and long mode: a GDT, an IDT whose handlers are HLT
//! instructions 16 bytes apart, and a TSS.

use super::Computer;
use anykvm_cpu::Exit;
use anykvm_cpu::state::{Segment, Table, reg, seg};

pub const GDT: u64 = 0x4000;
pub const TSS: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
pub const HANDLERS: u64 = 0x1_0000;
pub const STACK0: u64 = 0xb000;
pub const STACK3: u64 = 0xc000;

pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x1b;
pub const DATA3: u16 = 0x23;
pub const TSS_SELECTOR: u16 = 0x28;
/// First selector that tests may define.
pub const FREE: u16 = 0x40;

/// A descriptor: base, limit, access byte, flags (G, D/B, L, AVL in bits 3-0).
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 15) << 48
        | u64::from(flags & 15) << 52
        | (base >> 24) << 56
}

/// A gate: selector, offset, type and DPL byte, parameter count (or IST).
pub fn gate(selector: u16, offset: u64, access: u8, count: u8) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(access) << 40
        | (offset >> 16 & 0xffff) << 48
}

impl Computer {
    pub fn define(&mut self, selector: u16, low: u64) {
        self.put64(GDT + u64::from(selector & !7), low);
    }

    /// 32-bit protected mode with the tables above; code at `eip`, CPL 0.
    pub fn with_tables(eip: u32) -> Self {
        let mut c = Self::protected(2 << 20, eip);
        c.common_tables(0xc);
        c.define(TSS_SELECTOR, descriptor(TSS as u32, 0x67, 0x8b, 0));
        for n in 0..256u64 {
            let access = if n == 0x80 { 0xee } else { 0x8e };
            c.put64(IDT + n * 8, gate(CODE0, HANDLERS + n * 16, access, 0));
        }
        c.put64(TSS + 4, STACK0 | u64::from(DATA0) << 32);
        c.cpu.state.idtr = Table {
            base: IDT,
            limit: 0x7ff,
            ..Table::default()
        };
        c.cpu.state.regs[reg::RSP] = 0xa000;
        c.cpu.state_changed();
        c
    }

    /// 64-bit mode with the tables above; RSP0 and IST1 point to two stacks.
    pub fn with_tables64(rip: u64) -> Self {
        let mut c = Self::long(2 << 20, rip, 0x2_0000);
        c.common_tables(0xa);
        c.define(TSS_SELECTOR, descriptor(TSS as u32, 0x67, 0x8b, 0));
        for n in 0..256u64 {
            let access = if n == 0x80 { 0xee } else { 0x8e };
            let ist = u8::from(n == 8);
            c.put64(IDT + n * 16, gate(CODE0, HANDLERS + n * 16, access, ist));
        }
        c.put64(TSS + 4, STACK0);
        c.put64(TSS + 36, 0x9000);
        c.cpu.state.idtr = Table {
            base: IDT,
            limit: 0xfff,
            ..Table::default()
        };
        c.cpu.state.regs[reg::RSP] = 0xa000;
        c.cpu.state_changed();
        c
    }

    fn common_tables(&mut self, code_flags: u8) {
        self.define(CODE0, descriptor(0, 0xf_ffff, 0x9b, code_flags));
        self.define(DATA0, descriptor(0, 0xf_ffff, 0x93, 0xc));
        self.define(CODE3, descriptor(0, 0xf_ffff, 0xfb, code_flags));
        self.define(DATA3, descriptor(0, 0xf_ffff, 0xf3, 0xc));
        for n in 0..256 {
            self.put(HANDLERS + n * 16, &[0xf4]);
        }
        let s = &mut self.cpu.state;
        s.gdtr = Table {
            base: GDT,
            limit: 0xff,
            ..Table::default()
        };
        s.tr = Segment {
            base: TSS,
            limit: 0x67,
            attr: 0x8b,
            selector: TSS_SELECTOR,
            ..Segment::default()
        };
        s.seg[usize::from(seg::CS)].selector = CODE0;
    }

    /// Goes to CPL 3: segments, stack.
    pub fn user(&mut self) {
        let s = &mut self.cpu.state;
        for (n, segment) in s.seg[..6].iter_mut().enumerate() {
            segment.selector = if n == usize::from(seg::CS) {
                CODE3
            } else {
                DATA3
            };
            segment.attr |= 3 << 5;
        }
        s.regs[reg::RSP] = STACK3;
        self.cpu.state_changed();
    }

    /// Runs to a handler's HLT; its vector.
    pub fn run_to_handler(&mut self) -> u64 {
        assert_eq!(self.run(), Exit::Hlt, "{}", self.cpu.dump());
        let rip = self.cpu.state.rip();
        assert_eq!(rip & 15, 1, "{}", self.cpu.dump());
        assert!(rip >= HANDLERS, "{}", self.cpu.dump());
        (rip - HANDLERS) / 16
    }

    /// The nth 32-bit word on the stack.
    pub fn stack32(&self, n: u64) -> u32 {
        self.get64(self.reg(reg::RSP) + n * 4) as u32
    }
    /// The nth 64-bit word on the stack.
    pub fn stack64(&self, n: u64) -> u64 {
        self.get64(self.reg(reg::RSP) + n * 8)
    }
}
