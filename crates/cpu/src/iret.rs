//! IRET in every mode: real, virtual-8086 (with VME), protected, to virtual-8086, to a linked task,
//! long mode (SDM Vol. 2, IRET).

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::events::vector;
use crate::exit::Stop;
use crate::memory::access::Ram;
use crate::segment::v86_segment;
use crate::stack::Stack;
use crate::state::{cr4, reg, rflags, seg};

/// Flags that any IRET changes.
const ALWAYS: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
/// Flags that 32- and 64-bit operand sizes change as well.
const WIDE: u64 = rflags::RF | rflags::AC | rflags::ID;

/// IRET, IRETD, IRETQ. It ends NMI blocking even if it faults (SDM Vol. 3, 6.7.1).
pub(crate) fn iret<T: Ram>(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let done = if !cpu.state.protected() {
        iret_real::<T>(cpu)
    } else if cpu.state.virtual_8086() {
        iret_v86::<T>(cpu)
    } else if cpu.state.rflags & rflags::NT == 0 {
        iret_protected::<T>(cpu)
    } else if cpu.state.long_mode() {
        Err(cpu.gp0())
    } else {
        cpu.return_to_linked_task()
    };
    if matches!(done, Ok(()) | Err(Stop::Fault)) {
        cpu.state.events.nmi_masked = false;
        cpu.recheck_events();
    }
    done
}

fn iret_real<T: Ram>(cpu: &mut Cpu) -> Result<(), Stop> {
    let mut stack = Stack::current(cpu);
    let ip = stack.pop::<T>(cpu)?;
    let cs = stack.pop::<T>(cpu)? as u16;
    let flags = stack.pop::<T>(cpu)?;
    cpu.jump_real(cs, ip)?;
    stack.commit(cpu);
    let wide = if T::BYTES == 2 { 0 } else { WIDE };
    cpu.set_rflags(flags, ALWAYS | rflags::IF | rflags::IOPL | wide);
    Ok(())
}

fn iret_v86<T: Ram>(cpu: &mut Cpu) -> Result<(), Stop> {
    let iopl3 = cpu.state.iopl() == 3;
    if !iopl3 && (cpu.state.cr4 & cr4::VME == 0 || T::BYTES != 2) {
        return Err(cpu.gp0());
    }
    let mut stack = Stack::current(cpu);
    let ip = stack.pop::<T>(cpu)?;
    let cs = stack.pop::<T>(cpu)? as u16;
    let flags = stack.pop::<T>(cpu)?;
    let iff = flags & rflags::IF != 0;
    if !iopl3 && (flags & rflags::TF != 0 || iff && cpu.state.rflags & rflags::VIP != 0) {
        return Err(cpu.gp0());
    }
    cpu.jump_real(cs, ip)?;
    stack.commit(cpu);
    if iopl3 {
        let wide = if T::BYTES == 2 { 0 } else { WIDE };
        cpu.set_rflags(flags, ALWAYS | rflags::IF | wide);
    } else {
        let vif = if iff { rflags::VIF } else { 0 };
        cpu.set_rflags(flags & !rflags::VIF | vif, ALWAYS | rflags::VIF);
    }
    Ok(())
}

fn iret_protected<T: Ram>(cpu: &mut Cpu) -> Result<(), Stop> {
    let cpl = cpu.state.cpl();
    let mut stack = Stack::current(cpu);
    let rip = stack.pop::<T>(cpu)?;
    let selector = stack.pop::<T>(cpu)? as u16;
    let flags = stack.pop::<T>(cpu)?;
    if T::BYTES == 4 && flags & rflags::VM != 0 && cpl == 0 && !cpu.state.long_mode() {
        return return_to_v86(cpu, &mut stack, selector, rip, flags);
    }
    let cs = cpu.return_code(selector)?;
    let new_cpl = (selector & 3) as u8;
    // 64-bit code always returns with SS and RSP from the stack.
    if new_cpl == cpl && !cpu.state.code64() {
        cpu.enter_code(cs, cpl, rip, Some(&stack))?;
    } else {
        let rsp = stack.pop::<T>(cpu)?;
        let ss = stack.pop::<T>(cpu)? as u16;
        let ss = cpu.return_stack(ss, &cs)?;
        cpu.enter_outer(cs, new_cpl, rip, ss, rsp)?;
    }
    let mut mask = ALWAYS;
    if T::BYTES != 2 {
        mask |= WIDE;
    }
    if cpl <= cpu.state.iopl() {
        mask |= rflags::IF;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
        if T::BYTES != 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    cpu.set_rflags(flags, mask);
    Ok(())
}

fn return_to_v86(
    cpu: &mut Cpu,
    stack: &mut Stack,
    cs: u16,
    eip: u64,
    flags: u64,
) -> Result<(), Stop> {
    let esp = stack.pop::<u32>(cpu)?;
    let mut selectors = [0; 6];
    selectors[usize::from(seg::CS)] = cs;
    for n in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
        selectors[usize::from(n)] = stack.pop::<u32>(cpu)? as u16;
    }
    if eip > 0xffff {
        return Err(cpu.raise_error(vector::GP, 0));
    }
    for (s, selector) in cpu.state.seg.iter_mut().zip(selectors) {
        *s = v86_segment(selector);
    }
    cpu.state.regs[reg::RSP] = esp;
    cpu.state.set_rip(eip);
    cpu.set_rflags(flags, rflags::WRITABLE);
    Ok(())
}
