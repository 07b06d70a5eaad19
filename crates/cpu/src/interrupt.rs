//! An event's way through the IDT: real-mode vectors, protected-mode gates, virtual-8086
//! redirection and 64-bit gates (SDM Vol. 2, INT n; Vol. 3, 6.12, 6.14, 20.3).

use crate::cpu::Cpu;
use crate::descriptor::{Descriptor, is_null, selector_error, system_type};
use crate::events::vector;
use crate::exception::Event;
use crate::exit::Stop;
use crate::segment::{null_segment, null_stack_segment};
use crate::stack::Stack;
use crate::state::{Segment, cr4, reg, rflags, seg};
use crate::task::TaskSwitch;

/// Error-code bit: the index refers to the IDT.
const IDT: u32 = 2;

fn idt_error(vector: u8) -> u32 {
    (u32::from(vector) * 8) | IDT
}

/// Flags that delivery through a gate clears; interrupt gates clear IF as well.
const CLEARED: u64 = rflags::TF | rflags::VM | rflags::RF | rflags::NT;

impl Cpu {
    /// Enters the handler of an event. On a fault nothing has changed (but memory below the stack
    /// pointers involved).
    pub(crate) fn enter_handler(&mut self, event: &Event) -> Result<(), Stop> {
        if !self.state.protected() {
            self.enter_real_mode_handler(event.vector)
        } else if self.state.long_mode() {
            self.enter_long_mode_handler(event)
        } else {
            self.enter_protected_mode_handler(event)
        }
    }

    fn enter_real_mode_handler(&mut self, vector: u8) -> Result<(), Stop> {
        let at = u32::from(vector) * 4;
        if at + 3 > self.state.idtr.limit.into() {
            return Err(self.raise_error(vector::GP, idt_error(vector)));
        }
        let base = self.state.idtr.base;
        let entry = self.read_system::<u32>(self.system_address(base.wrapping_add(at.into())))?;
        let flags = self.state.rflags as u16;
        let cs = self.state.seg[usize::from(seg::CS)].selector;
        let ip = self.state.rip() as u16;
        let mut stack = Stack::current(self);
        stack.push::<u16>(self, flags.into())?;
        stack.push::<u16>(self, cs.into())?;
        stack.push::<u16>(self, ip.into())?;
        stack.commit(self);
        self.state.rflags &= !(rflags::IF | rflags::TF | rflags::RF | rflags::AC);
        let new = self.segment_without_descriptor(seg::CS, (entry >> 16) as u16);
        self.state.seg[usize::from(seg::CS)] = new;
        self.state.set_rip((entry & 0xffff).into());
        self.update_mode();
        Ok(())
    }

    /// INT n in virtual-8086 mode (SDM Vol. 3, table 20-2): true if it went to the 8086 program's
    /// own handler, false if it is to go through the IDT.
    pub(crate) fn redirect_v86_interrupt(&mut self, vector: u8) -> Result<bool, Stop> {
        let iopl3 = self.state.iopl() == 3;
        if self.state.cr4 & cr4::VME == 0 || !self.v86_redirection_bit_clear(vector)? {
            return if iopl3 {
                Ok(false)
            } else {
                Err(self.raise_error(vector::GP, 0))
            };
        }
        let entry = self.read_system::<u32>(u64::from(vector) * 4)?;
        let mut flags = self.state.rflags & 0xffff;
        let mut clear = rflags::TF;
        if iopl3 {
            clear |= rflags::IF;
        } else {
            // The program sees VIF in IF's place and IOPL 3.
            let vif = self.state.rflags & rflags::VIF != 0;
            flags = flags & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
            clear |= rflags::VIF;
        }
        let cs = self.state.seg[usize::from(seg::CS)].selector;
        let ip = self.state.rip();
        let mut stack = Stack::current(self);
        stack.push::<u16>(self, flags)?;
        stack.push::<u16>(self, cs.into())?;
        stack.push::<u16>(self, ip)?;
        stack.commit(self);
        self.state.rflags &= !clear;
        let new = self.segment_without_descriptor(seg::CS, (entry >> 16) as u16);
        self.state.seg[usize::from(seg::CS)] = new;
        self.state.set_rip((entry & 0xffff).into());
        self.update_mode();
        Ok(true)
    }

    // The software interrupt redirection bit map: the 32 bytes below the I/O permission bit map.
    fn v86_redirection_bit_clear(&mut self, vector: u8) -> Result<bool, Stop> {
        let tr = self.state.tr;
        if tr.limit < 103 {
            return Err(self.raise_error(vector::GP, 0));
        }
        let map = self.read_system::<u16>(self.system_address(tr.base.wrapping_add(102)))?;
        let at = i64::from(map) - 32 + i64::from(vector / 8);
        if at < 0 || at > i64::from(tr.limit) {
            return Err(self.raise_error(vector::GP, 0));
        }
        let byte = self.read_system::<u8>(self.system_address(tr.base.wrapping_add(at as u64)))?;
        Ok(byte >> (vector % 8) & 1 == 0)
    }

    /// Reads the gate of a vector; `size` is 8 or 16.
    fn idt_gate(&mut self, event: &Event, size: u32) -> Result<Descriptor, Stop> {
        let at = u32::from(event.vector) * size;
        if at + (size - 1) > self.state.idtr.limit.into() {
            return Err(self.raise_error(vector::GP, idt_error(event.vector)));
        }
        let address = self.system_address(self.state.idtr.base.wrapping_add(at.into()));
        let mut gate = Descriptor {
            selector: 0,
            address,
            low: self.read_system::<u64>(address)?,
            high: 0,
        };
        if size == 16 {
            gate.high = self.read_system::<u64>(address.wrapping_add(8))? & 0xffff_ffff;
        }
        use system_type::{INTERRUPT_GATE, INTERRUPT_GATE16, TASK_GATE, TRAP_GATE, TRAP_GATE16};
        let valid = match gate.system_kind() {
            Some(INTERRUPT_GATE | TRAP_GATE) => true,
            Some(TASK_GATE | INTERRUPT_GATE16 | TRAP_GATE16) => size == 8,
            _ => false,
        };
        if !valid || event.software_checked() && gate.dpl() < self.state.cpl() {
            return Err(self.raise_error(vector::GP, idt_error(event.vector)));
        }
        if !gate.present() {
            return Err(self.raise_error(vector::NP, idt_error(event.vector)));
        }
        Ok(gate)
    }

    /// The gate's code segment with the checks common to all modes, and the handler's CPL.
    fn handler_code(&mut self, gate: &Descriptor) -> Result<(Descriptor, u8), Stop> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.raise_error(vector::GP, 0));
        }
        let cs = self.fetch_descriptor(selector, vector::GP)?;
        let cpl = self.state.cpl();
        let long_ok = !self.state.long_mode() || cs.long() && !cs.db();
        if !cs.is_code() || cs.dpl() > cpl || !long_ok {
            return Err(self.raise_error(vector::GP, selector_error(selector)));
        }
        if !cs.present() {
            return Err(self.raise_error(vector::NP, selector_error(selector)));
        }
        let new_cpl = if cs.is_conforming() { cpl } else { cs.dpl() };
        // From virtual-8086 mode a handler runs at CPL 0 only.
        if self.state.virtual_8086() && new_cpl != 0 {
            return Err(self.raise_error(vector::GP, selector_error(selector)));
        }
        Ok((cs, new_cpl))
    }

    fn enter_protected_mode_handler(&mut self, event: &Event) -> Result<(), Stop> {
        let gate = self.idt_gate(event, 8)?;
        if gate.kind() == system_type::TASK_GATE {
            return self.enter_task_gate_handler(event, &gate);
        }
        let (mut cs, new_cpl) = self.handler_code(&gate)?;
        let wide = gate.kind() & 8 != 0;
        let eip = if wide {
            gate.gate_offset()
        } else {
            gate.gate_offset() & 0xffff
        };
        let inner = new_cpl < self.state.cpl();
        let v86 = self.state.virtual_8086();
        let (mut stack, new_ss) = if inner {
            let (ss, esp) = self.inner_stack(new_cpl)?;
            (Stack::inner(self, &ss, esp, new_cpl), Some(ss))
        } else {
            (Stack::current(self), None)
        };
        let s = &self.state;
        let selector = |n: u8| u64::from(s.seg[usize::from(n)].selector);
        let mut frame = Frame::default();
        if v86 {
            for n in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.add(selector(n));
            }
        }
        if inner {
            frame.add(selector(seg::SS));
            frame.add(s.regs[reg::RSP]);
        }
        frame.add(self.saved_flags(event));
        frame.add(selector(seg::CS));
        frame.add(s.rip());
        if let Some(code) = event.error_code {
            frame.add(code.into());
        }
        for &v in frame.values() {
            if wide {
                stack.push::<u32>(self, v)?
            } else {
                stack.push::<u16>(self, v)?
            }
        }
        if eip > cs.limit() {
            return Err(self.raise_error(vector::GP, 0));
        }
        self.set_accessed(&mut cs)?;
        if let Some(ss) = new_ss {
            self.state.seg[usize::from(seg::SS)] = ss;
        }
        if v86 {
            for n in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.state.seg[usize::from(n)] = null_segment(0);
            }
        }
        stack.commit(self);
        self.finish_gate(&gate, &cs, new_cpl, eip.into());
        Ok(())
    }

    fn finish_gate(&mut self, gate: &Descriptor, cs: &Descriptor, cpl: u8, rip: u64) {
        let mut s = cs.segment();
        s.selector = s.selector & !3 | u16::from(cpl);
        self.state.seg[usize::from(seg::CS)] = s;
        self.state.set_rip(rip);
        // Bit 0 of the type: trap gate.
        let interrupt = if gate.kind() & 1 == 0 { rflags::IF } else { 0 };
        self.state.rflags &= !(CLEARED | interrupt);
        self.update_mode();
    }

    fn enter_task_gate_handler(&mut self, event: &Event, gate: &Descriptor) -> Result<(), Stop> {
        let tss = self.tss_for(gate.gate_selector(), vector::GP)?;
        self.switch_task(tss, TaskSwitch::Interrupt, self.saved_flags(event))?;
        if let Some(code) = event.error_code {
            let wide = self.state.tr.kind() & 8 != 0;
            let mut stack = Stack::current(self);
            if wide {
                stack.push::<u32>(self, code.into())?;
            } else {
                stack.push::<u16>(self, code.into())?;
            }
            stack.commit(self);
        }
        Ok(())
    }

    /// The stack for an inner privilege level from a 16- or 32-bit TSS: SS and (E)SP, checked (SDM
    /// Vol. 3, 6.12.1).
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, u64), Stop> {
        let tr = self.state.tr;
        let wide = tr.kind() & 8 != 0;
        let (at, last) = if wide {
            (u32::from(cpl) * 8 + 4, 5)
        } else {
            (u32::from(cpl) * 4 + 2, 3)
        };
        if at + last > tr.limit {
            return Err(self.raise_error(vector::TS, selector_error(tr.selector)));
        }
        let address = self.system_address(tr.base.wrapping_add(at.into()));
        let (esp, selector) = if wide {
            let esp = self.read_system::<u32>(address)?;
            (
                u64::from(esp),
                self.read_system::<u16>(address.wrapping_add(4))?,
            )
        } else {
            let v = self.read_system::<u32>(address)?;
            (u64::from(v as u16), (v >> 16) as u16)
        };
        Ok((self.inner_stack_segment(selector, cpl)?, esp))
    }

    /// Checks a stack segment for an inner level.
    fn inner_stack_segment(&mut self, selector: u16, cpl: u8) -> Result<Segment, Stop> {
        let error = selector_error(selector);
        if is_null(selector) {
            return Err(self.raise_error(vector::TS, error));
        }
        let Some(mut ss) = self.find_descriptor(selector)? else {
            return Err(self.raise_error(vector::TS, error));
        };
        if (selector & 3) as u8 != cpl || ss.dpl() != cpl || !ss.is_writable() {
            return Err(self.raise_error(vector::TS, error));
        }
        if !ss.present() {
            return Err(self.raise_error(vector::SS, error));
        }
        self.set_accessed(&mut ss)?;
        Ok(ss.segment())
    }

    /// RSP for an inner level (`ist` 0) or from the interrupt stack table, out of the 64-bit TSS
    /// (SDM Vol. 3, 8.7).
    pub(crate) fn inner_stack64(&mut self, cpl: u8, ist: u8) -> Result<u64, Stop> {
        let tr = self.state.tr;
        let at = if ist == 0 {
            u32::from(cpl) * 8 + 4
        } else {
            u32::from(ist) * 8 + 28
        };
        if at + 7 > tr.limit {
            return Err(self.raise_error(vector::TS, selector_error(tr.selector)));
        }
        let rsp = self.read_system::<u64>(tr.base.wrapping_add(at.into()))?;
        if !self.canonical(rsp) {
            return Err(self.raise_error(vector::SS, 0));
        }
        Ok(rsp)
    }

    fn enter_long_mode_handler(&mut self, event: &Event) -> Result<(), Stop> {
        let gate = self.idt_gate(event, 16)?;
        let (mut cs, new_cpl) = self.handler_code(&gate)?;
        let ist = (gate.low >> 32 & 7) as u8;
        let inner = new_cpl < self.state.cpl();
        let rsp = if inner || ist != 0 {
            self.inner_stack64(new_cpl, ist)?
        } else {
            self.state.regs[reg::RSP]
        };
        let rip = gate.gate_offset64();
        let s = &self.state;
        let selector = |n: u8| u64::from(s.seg[usize::from(n)].selector);
        let mut frame = Frame::default();
        frame.add(selector(seg::SS));
        frame.add(s.regs[reg::RSP]);
        frame.add(self.saved_flags(event));
        frame.add(selector(seg::CS));
        frame.add(s.rip());
        if let Some(code) = event.error_code {
            frame.add(code.into());
        }
        let mut stack = Stack::long(self, rsp & !15, inner);
        for &v in frame.values() {
            stack.push::<u64>(self, v)?;
        }
        self.check_canonical_value(rip)?;
        self.set_accessed(&mut cs)?;
        if inner {
            self.state.seg[usize::from(seg::SS)] = null_stack_segment(new_cpl.into(), new_cpl);
        }
        stack.commit(self);
        self.finish_gate(&gate, &cs, new_cpl, rip);
        Ok(())
    }
}

/// The values an event pushes, first pushed first.
#[derive(Default)]
struct Frame {
    values: [u64; 10],
    len: usize,
}

impl Frame {
    fn add(&mut self, v: u64) {
        self.values[self.len] = v;
        self.len += 1;
    }
    fn values(&self) -> &[u64] {
        &self.values[..self.len]
    }
}
