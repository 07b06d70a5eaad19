//! RFLAGS as a whole and its system bits: PUSHF, POPF, CLI, STI, CLAC, STAC, and HLT (SDM Vol. 2;
//! virtual interrupt flag: Vol. 3, 20.3 and 20.4).

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::events::SHADOW_STI;
use crate::exit::{Exit, Stop};
use crate::memory::access::Ram;
use crate::state::{cr4, rflags};

impl Cpu {
    /// Replaces the RFLAGS bits in `mask`.
    pub(crate) fn set_rflags(&mut self, flags: u64, mask: u64) {
        let old = self.state.rflags;
        self.state.rflags = old & !mask | flags & mask | rflags::FIXED;
        let changed = old ^ self.state.rflags;
        if changed & (rflags::VM | rflags::AC) != 0 {
            self.update_mode();
        }
        if changed & (rflags::IF | rflags::TF | rflags::RF | rflags::VIF | rflags::VIP) != 0 {
            self.recheck_events();
        }
    }

    /// How CLI and STI work here (SDM Vol. 2, tables 3-7 and 4-19): on IF, on VIF, or #GP.
    fn interrupt_flag(&mut self) -> Result<u64, Stop> {
        let s = &self.state;
        if s.cpl() <= s.iopl() && !s.virtual_8086() || s.virtual_8086() && s.iopl() == 3 {
            return Ok(rflags::IF);
        }
        let extension = if s.virtual_8086() { cr4::VME } else { cr4::PVI };
        if s.cr4 & extension != 0 && s.cpl() == 3 {
            return Ok(rflags::VIF);
        }
        Err(self.gp0())
    }
}

/// PUSHF, PUSHFD, PUSHFQ. VM and RF are pushed as 0.
pub(crate) fn pushf<T: Ram>(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let mut flags = cpu.state.rflags & !(rflags::VM | rflags::RF);
    if cpu.state.virtual_8086() && cpu.state.iopl() < 3 {
        if cpu.state.cr4 & cr4::VME == 0 || T::BYTES != 2 {
            return Err(cpu.gp0());
        }
        let vif = flags & rflags::VIF != 0;
        flags = flags & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
    }
    cpu.push(T::from_u64(flags))
}

/// POPF, POPFD, POPFQ.
pub(crate) fn popf<T: Ram>(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let v86 = cpu.state.virtual_8086();
    let (cpl, iopl) = (cpu.state.cpl(), cpu.state.iopl());
    let virtual_if = v86 && iopl < 3;
    if virtual_if && (cpu.state.cr4 & cr4::VME == 0 || T::BYTES != 2) {
        return Err(cpu.gp0());
    }
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if T::BYTES != 2 {
        mask |= rflags::AC | rflags::ID | rflags::RF;
    }
    if cpl <= iopl && !virtual_if {
        mask |= rflags::IF;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
    }
    if virtual_if {
        let (code, stack_mask) = cpu.stack();
        let rsp = cpu.state.regs[crate::state::reg::RSP] & stack_mask;
        let flags = u64::from(cpu.read_at::<u16>(code, rsp)?);
        let on = flags & rflags::IF != 0;
        if flags & rflags::TF != 0 || on && cpu.state.rflags & rflags::VIP != 0 {
            return Err(cpu.gp0());
        }
        cpu.set_stack_pointer(rsp.wrapping_add(2), stack_mask);
        let vif = if on { rflags::VIF } else { 0 };
        cpu.set_rflags(flags & !rflags::VIF | vif, mask | rflags::VIF);
        return Ok(());
    }
    // RF is cleared, whatever was popped.
    let flags = cpu.pop::<T>()?.to_u64() & !rflags::RF;
    cpu.set_rflags(flags, mask);
    Ok(())
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let flag = cpu.interrupt_flag()?;
    cpu.state.rflags &= !flag;
    Ok(())
}

/// STI. If IF was clear, the next instruction runs before an interrupt is taken.
pub(crate) fn sti(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let flag = cpu.interrupt_flag()?;
    if flag == rflags::VIF && cpu.state.rflags & rflags::VIP != 0 {
        return Err(cpu.gp0());
    }
    if cpu.state.rflags & flag == 0 {
        cpu.state.rflags |= flag;
        if flag == rflags::IF {
            cpu.set_interrupt_shadow(SHADOW_STI);
        }
    }
    Ok(())
}

fn set_ac(cpu: &mut Cpu, ac: bool) -> Result<(), Stop> {
    if !cpu.cpuid.has_smap() || cpu.state.cpl() != 0 {
        return Err(cpu.ud());
    }
    cpu.set_rflags(if ac { rflags::AC } else { 0 }, rflags::AC);
    Ok(())
}

/// CLAC.
pub(crate) fn clac(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    set_ac(cpu, false)
}

/// STAC.
pub(crate) fn stac(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    set_ac(cpu, true)
}

/// HLT: leaves the run loop with RIP past it; who owns the processor decides how it waits.
pub(crate) fn hlt(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    cpu.exit_behind(Exit::Hlt);
    Ok(())
}
