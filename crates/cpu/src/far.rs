//! Far transfers: JMP, CALL and RET to another code segment, through call gates and to other
//! privilege levels or tasks (SDM Vol. 2, JMP, CALL, RET; Vol. 3, 5.8).

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::descriptor::{Descriptor, is_null, selector_error, system_type};
use crate::events::vector;
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::segment::null_stack_segment;
use crate::stack::{self, Stack};
use crate::state::{Segment, reg, seg};
use crate::task::TaskSwitch;
use iced_x86::OpKind;

/// A far pointer.
#[derive(Clone, Copy, Debug)]
struct FarPointer {
    selector: u16,
    offset: u64,
}

/// The operand of a far JMP or CALL.
fn operand<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<FarPointer, Stop> {
    if insn.raw.op0_kind() == OpKind::Memory {
        let at = cpu.effective_address(insn);
        let offset = cpu.read_at::<T>(insn.seg, at)?.to_u64();
        let next = at.wrapping_add(T::BYTES as u64) & insn.addr_mask;
        return Ok(FarPointer {
            selector: cpu.read_at::<u16>(insn.seg, next)?,
            offset,
        });
    }
    let offset = match insn.raw.op0_kind() {
        OpKind::FarBranch16 => insn.raw.far_branch16().into(),
        _ => insn.raw.far_branch32().into(),
    };
    Ok(FarPointer {
        selector: insn.raw.far_branch_selector(),
        offset,
    })
}

/// JMP ptr16:16/32, JMP m16:16/32/64.
pub(crate) fn jmp_far<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let to = operand::<T>(cpu, insn)?;
    if cpu.without_descriptors() {
        return cpu.jump_real(to.selector, to.offset);
    }
    let target = cpu.far_descriptor(to.selector)?;
    if !target.is_system() {
        let cs = cpu.direct_code(target)?;
        return cpu.enter_code(cs, cpu.state.cpl(), to.offset, None);
    }
    match cpu.system_target(&target)? {
        SystemTarget::Tss => {
            let tss = cpu.tss_for(to.selector, vector::GP)?;
            cpu.switch_task(tss, TaskSwitch::Jump, cpu.state.rflags)
        }
        SystemTarget::TaskGate => {
            let tss = cpu.tss_for(target.gate_selector(), vector::GP)?;
            cpu.switch_task(tss, TaskSwitch::Jump, cpu.state.rflags)
        }
        SystemTarget::CallGate => {
            let (gate, cs) = cpu.gate_code(target)?;
            let cpl = cpu.state.cpl();
            let allowed = if cs.is_conforming() {
                cs.dpl() <= cpl
            } else {
                cs.dpl() == cpl
            };
            if !allowed {
                return Err(cpu.raise_error(vector::GP, selector_error(cs.selector)));
            }
            let cs = cpu.present_code(cs)?;
            cpu.enter_code(cs, cpl, gate_offset(&gate), None)
        }
    }
}

/// CALL ptr16:16/32, CALL m16:16/32/64.
pub(crate) fn call_far<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let to = operand::<T>(cpu, insn)?;
    let return_cs = u64::from(cpu.state.seg[usize::from(seg::CS)].selector);
    let return_ip = cpu.state.rip();
    let mut stack = Stack::current(cpu);
    if cpu.without_descriptors() {
        stack.push::<T>(cpu, return_cs)?;
        stack.push::<T>(cpu, return_ip)?;
        cpu.jump_real(to.selector, to.offset)?;
        stack.commit(cpu);
        return Ok(());
    }
    let target = cpu.far_descriptor(to.selector)?;
    if !target.is_system() {
        let cs = cpu.direct_code(target)?;
        stack.push::<T>(cpu, return_cs)?;
        stack.push::<T>(cpu, return_ip)?;
        return cpu.enter_code(cs, cpu.state.cpl(), to.offset, Some(&stack));
    }
    match cpu.system_target(&target)? {
        SystemTarget::Tss => {
            let tss = cpu.tss_for(to.selector, vector::GP)?;
            cpu.switch_task(tss, TaskSwitch::Call, cpu.state.rflags)
        }
        SystemTarget::TaskGate => {
            let tss = cpu.tss_for(target.gate_selector(), vector::GP)?;
            cpu.switch_task(tss, TaskSwitch::Call, cpu.state.rflags)
        }
        SystemTarget::CallGate => cpu.call_gate(target, return_cs, return_ip),
    }
}

/// RETF and RETF imm16.
pub(crate) fn ret_far<T: Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let release = if insn.raw.op_count() == 1 {
        insn.imm & 0xffff
    } else {
        0
    };
    let mut stack = Stack::current(cpu);
    let ip = stack.pop::<T>(cpu)?;
    let selector = stack.pop::<T>(cpu)? as u16;
    if cpu.without_descriptors() {
        stack.release(release);
        cpu.jump_real(selector, ip)?;
        stack.commit(cpu);
        return Ok(());
    }
    let cs = cpu.return_code(selector)?;
    let rpl = (selector & 3) as u8;
    stack.release(release);
    if rpl == cpu.state.cpl() {
        return cpu.enter_code(cs, rpl, ip, Some(&stack));
    }
    let sp = stack.pop::<T>(cpu)?;
    let ss = stack.pop::<T>(cpu)? as u16;
    let ss = cpu.return_stack(ss, &cs)?;
    cpu.enter_outer(cs, rpl, ip, ss, sp.wrapping_add(release))
}

/// What a far JMP or CALL to a system descriptor means.
enum SystemTarget {
    CallGate,
    TaskGate,
    Tss,
}

fn gate_offset(gate: &Descriptor) -> u64 {
    if gate.kind() == system_type::CALL_GATE16 {
        u64::from(gate.gate_offset() & 0xffff)
    } else {
        gate.gate_offset64()
    }
}

impl Cpu {
    /// A far transfer in real or virtual-8086 mode.
    pub(crate) fn jump_real(&mut self, selector: u16, offset: u64) -> Result<(), Stop> {
        if offset > self.state.seg[usize::from(seg::CS)].limit.into() {
            return Err(self.gp0());
        }
        let new = self.segment_without_descriptor(seg::CS, selector);
        self.state.seg[usize::from(seg::CS)] = new;
        self.state.set_rip(offset);
        self.update_mode();
        Ok(())
    }

    fn far_descriptor(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return Err(self.gp0());
        }
        self.fetch_descriptor(selector, vector::GP)
    }

    /// Checks a code segment that a JMP or CALL names directly.
    fn direct_code(&mut self, cs: Descriptor) -> Result<Descriptor, Stop> {
        let cpl = self.state.cpl();
        let rpl = (cs.selector & 3) as u8;
        let allowed = cs.is_code()
            && if cs.is_conforming() {
                cs.dpl() <= cpl
            } else {
                rpl <= cpl && cs.dpl() == cpl
            };
        if !allowed {
            return Err(self.raise_error(vector::GP, selector_error(cs.selector)));
        }
        self.present_code(cs)
    }

    /// A code segment must be present and, in long mode, not have both L and D.
    fn present_code(&mut self, cs: Descriptor) -> Result<Descriptor, Stop> {
        let error = selector_error(cs.selector);
        if self.state.long_mode() && cs.long() && cs.db() {
            return Err(self.raise_error(vector::GP, error));
        }
        if !cs.present() {
            return Err(self.raise_error(vector::NP, error));
        }
        Ok(cs)
    }

    /// Checks RIP against a code segment that is about to be loaded, and gives what RIP becomes.
    fn checked_rip(&mut self, cs: &Descriptor, rip: u64) -> Result<u64, Stop> {
        if self.state.long_mode() && cs.long() {
            self.check_canonical_value(rip)?;
            return Ok(rip);
        }
        // With a 64-bit operand all of it counts.
        if rip > cs.limit().into() {
            return Err(self.gp0());
        }
        Ok(rip)
    }

    /// Loads CS and RIP (and the stack pointer, when the transfer used the stack) without a change
    /// of stack.
    pub(crate) fn enter_code(
        &mut self,
        mut cs: Descriptor,
        cpl: u8,
        rip: u64,
        stack: Option<&Stack>,
    ) -> Result<(), Stop> {
        let rip = self.checked_rip(&cs, rip)?;
        self.set_accessed(&mut cs)?;
        if let Some(stack) = stack {
            stack.commit(self);
        }
        self.set_code(&cs, cpl, rip);
        Ok(())
    }

    fn set_code(&mut self, cs: &Descriptor, cpl: u8, rip: u64) {
        let mut s = cs.segment();
        s.selector = s.selector & !3 | u16::from(cpl);
        self.state.seg[usize::from(seg::CS)] = s;
        self.state.set_rip(rip);
        self.update_mode();
    }

    /// Loads CS, RIP, SS and RSP on a return to an outer level (or, from 64-bit code, to the same).
    pub(crate) fn enter_outer(
        &mut self,
        mut cs: Descriptor,
        cpl: u8,
        rip: u64,
        ss: Segment,
        rsp: u64,
    ) -> Result<(), Stop> {
        let rip = self.checked_rip(&cs, rip)?;
        self.set_accessed(&mut cs)?;
        let outer = cpl > self.state.cpl();
        self.set_stack(ss, rsp, self.state.long_mode() && cs.long());
        self.set_code(&cs, cpl, rip);
        if outer {
            self.drop_privileged_segments(cpl);
            self.update_mode();
        }
        Ok(())
    }

    /// Loads SS and as much of RSP as the new stack's size covers.
    pub(crate) fn set_stack(&mut self, ss: Segment, rsp: u64, code64: bool) {
        let mask = stack::mask(&ss, code64);
        let old = self.state.regs[reg::RSP];
        self.state.regs[reg::RSP] = stack::merge(old, rsp, mask);
        self.state.seg[usize::from(seg::SS)] = ss;
    }

    fn system_target(&mut self, d: &Descriptor) -> Result<SystemTarget, Stop> {
        use system_type::{CALL_GATE, CALL_GATE16, TASK_GATE, TSS_AVAILABLE, TSS16_AVAILABLE};
        let error = selector_error(d.selector);
        let long = self.state.long_mode();
        let target = match d.kind() {
            CALL_GATE => SystemTarget::CallGate,
            CALL_GATE16 if !long => SystemTarget::CallGate,
            TASK_GATE if !long => SystemTarget::TaskGate,
            TSS_AVAILABLE | TSS16_AVAILABLE if !long => SystemTarget::Tss,
            _ => return Err(self.raise_error(vector::GP, error)),
        };
        if d.dpl() < self.state.cpl().max((d.selector & 3) as u8) {
            return Err(self.raise_error(vector::GP, error));
        }
        if !d.present() {
            return Err(self.raise_error(vector::NP, error));
        }
        Ok(target)
    }

    /// The code segment behind a call gate, as far as JMP and CALL check it alike.
    fn gate_code(&mut self, mut gate: Descriptor) -> Result<(Descriptor, Descriptor), Stop> {
        let long = self.state.long_mode();
        if long {
            self.fetch_upper_half(&mut gate, vector::GP)?;
        }
        let selector = gate.gate_selector();
        let cs = self.far_descriptor(selector)?;
        if !cs.is_code() || long && (!cs.long() || cs.db()) {
            return Err(self.raise_error(vector::GP, selector_error(selector)));
        }
        Ok((gate, cs))
    }

    fn call_gate(&mut self, gate: Descriptor, return_cs: u64, return_ip: u64) -> Result<(), Stop> {
        let (gate, cs) = self.gate_code(gate)?;
        let cpl = self.state.cpl();
        if cs.dpl() > cpl {
            return Err(self.raise_error(vector::GP, selector_error(cs.selector)));
        }
        let cs = self.present_code(cs)?;
        let size = if self.state.long_mode() {
            8
        } else if gate.kind() == system_type::CALL_GATE16 {
            2
        } else {
            4
        };
        let offset = gate_offset(&gate);
        if cs.is_conforming() || cs.dpl() == cpl {
            let mut stack = Stack::current(self);
            push_sized(self, &mut stack, size, return_cs)?;
            push_sized(self, &mut stack, size, return_ip)?;
            return self.enter_code(cs, cpl, offset, Some(&stack));
        }
        let new_cpl = cs.dpl();
        let old_ss = self.state.seg[usize::from(seg::SS)].selector;
        let old_sp = self.state.regs[reg::RSP];
        let (mut stack, ss) = if size == 8 {
            let rsp = self.inner_stack64(new_cpl, 0)?;
            (
                Stack::long(self, rsp, true),
                null_stack_segment(new_cpl.into(), new_cpl),
            )
        } else {
            let (ss, esp) = self.inner_stack(new_cpl)?;
            (Stack::inner(self, &ss, esp, new_cpl), ss)
        };
        push_sized(self, &mut stack, size, old_ss.into())?;
        push_sized(self, &mut stack, size, old_sp)?;
        if size != 8 {
            self.copy_parameters(&mut stack, (gate.low >> 32 & 31) as usize, size)?;
        }
        push_sized(self, &mut stack, size, return_cs)?;
        push_sized(self, &mut stack, size, return_ip)?;
        let mut cs = cs;
        let rip = self.checked_rip(&cs, offset)?;
        self.set_accessed(&mut cs)?;
        self.state.seg[usize::from(seg::SS)] = ss;
        stack.commit(self);
        self.set_code(&cs, new_cpl, rip);
        Ok(())
    }

    /// Copies a call gate's parameters from the caller's stack to the callee's.
    fn copy_parameters(&mut self, to: &mut Stack, count: usize, size: u8) -> Result<(), Stop> {
        let mut from = Stack::current(self);
        let mut values = [0; 31];
        for v in &mut values[..count] {
            *v = if size == 2 {
                from.pop::<u16>(self)?
            } else {
                from.pop::<u32>(self)?
            };
        }
        for &v in values[..count].iter().rev() {
            push_sized(self, to, size, v)?;
        }
        Ok(())
    }

    /// Checks the code segment that RETF or IRET returns to.
    pub(crate) fn return_code(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        let cs = self.far_descriptor(selector)?;
        let rpl = (selector & 3) as u8;
        let allowed = cs.is_code()
            && rpl >= self.state.cpl()
            && if cs.is_conforming() {
                cs.dpl() <= rpl
            } else {
                cs.dpl() == rpl
            };
        if !allowed {
            return Err(self.raise_error(vector::GP, selector_error(selector)));
        }
        self.present_code(cs)
    }

    /// Checks the stack segment that goes with a return to `cs`.
    pub(crate) fn return_stack(&mut self, selector: u16, cs: &Descriptor) -> Result<Segment, Stop> {
        let rpl = (cs.selector & 3) as u8;
        if is_null(selector) {
            let to64 = self.state.long_mode() && cs.long();
            if to64 && rpl != 3 && (selector & 3) as u8 == rpl {
                return Ok(null_stack_segment(selector, rpl));
            }
            return Err(self.gp0());
        }
        let error = selector_error(selector);
        let mut ss = self.fetch_descriptor(selector, vector::GP)?;
        if (selector & 3) as u8 != rpl || !ss.is_writable() || ss.dpl() != rpl {
            return Err(self.raise_error(vector::GP, error));
        }
        if !ss.present() {
            return Err(self.raise_error(vector::SS, error));
        }
        self.set_accessed(&mut ss)?;
        Ok(ss.segment())
    }
}

fn push_sized(cpu: &mut Cpu, stack: &mut Stack, size: u8, value: u64) -> Result<(), Stop> {
    match size {
        2 => stack.push::<u16>(cpu, value),
        4 => stack.push::<u32>(cpu, value),
        _ => stack.push::<u64>(cpu, value),
    }
}
