//! RDMSR, WRMSR, RDTSC, RDTSCP, RDPID and RDPMC (SDM Vol. 2).

use super::{Access, Refused, read, write};
use crate::cpu::Cpu;
use crate::cpuid::feature;
use crate::decode::Insn;
use crate::exit::{Exit, Stop};
use crate::machine::MsrResult;
use crate::state::reg;

impl Cpu {
    /// What an access through the filter of KVM_X86_SET_MSR_FILTER leads to, if not to the MSR.
    fn msr_stopped(&mut self, r: MsrResult<()>, exit: impl Fn(u32) -> Exit) -> Result<(), Stop> {
        match r {
            MsrResult::Done(()) => Ok(()),
            MsrResult::Fault => Err(self.gp0()),
            MsrResult::UserSpace(reason) => Err(self.exit_with(exit(reason))),
        }
    }

    fn msr_operand(&self) -> u64 {
        self.state.regs[reg::RAX] & 0xffff_ffff | self.state.regs[reg::RDX] << 32
    }

    fn set_edx_eax(&mut self, value: u64) {
        self.state.regs[reg::RAX] = value & 0xffff_ffff;
        self.state.regs[reg::RDX] = value >> 32;
    }
}

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    let index = cpu.state.regs[reg::RCX] as u32;
    let value = match cpu.take_msr_answer() {
        Some(Some(value)) => value,
        Some(None) => return Err(cpu.gp0()),
        None => {
            let exit = |reason| Exit::MsrRead { index, reason };
            let filter = cpu.machine.msr_filter(index, false);
            cpu.msr_stopped(filter, exit)?;
            match read(&cpu.state, &cpu.cpuid, index, Access::Guest) {
                Some(Ok(value)) => value,
                Some(Err(Refused)) => {
                    let refused = cpu.machine.msr_refused(index, false);
                    cpu.msr_stopped(refused, exit)?;
                    return Err(cpu.gp0());
                }
                None => match cpu.machine.read_msr(&cpu.state, index) {
                    MsrResult::Done(value) => value,
                    MsrResult::Fault => return Err(cpu.gp0()),
                    MsrResult::UserSpace(reason) => return Err(cpu.exit_with(exit(reason))),
                },
            }
        }
    };
    cpu.set_edx_eax(value);
    Ok(())
}

/// WRMSR.
pub(crate) fn wrmsr(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    cpu.require_cpl0()?;
    let index = cpu.state.regs[reg::RCX] as u32;
    let value = cpu.msr_operand();
    match cpu.take_msr_answer() {
        Some(Some(_)) => return Ok(()),
        Some(None) => return Err(cpu.gp0()),
        None => {}
    }
    let exit = |reason| Exit::MsrWrite {
        index,
        value,
        reason,
    };
    let filter = cpu.machine.msr_filter(index, true);
    cpu.msr_stopped(filter, exit)?;
    let before = cpu.state.msr.efer;
    match write(&mut cpu.state, &cpu.cpuid, index, value, Access::Guest) {
        Some(Ok(())) => {
            if cpu.state.msr.efer != before {
                cpu.flush_tlb();
                cpu.update_mode();
            }
        }
        Some(Err(Refused)) => {
            let refused = cpu.machine.msr_refused(index, true);
            cpu.msr_stopped(refused, exit)?;
            return Err(cpu.gp0());
        }
        None => {
            let written = cpu.machine.write_msr(&mut cpu.state, index, value);
            cpu.msr_stopped(written, exit)?;
            cpu.recheck_events();
        }
    }
    Ok(())
}

/// #GP(0) if CR4.TSD keeps the time-stamp counter from this privilege level.
fn check_tsc_allowed(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.state.cr4 & crate::state::cr4::TSD != 0 && cpu.state.cpl() != 0 {
        return Err(cpu.gp0());
    }
    Ok(())
}

/// RDTSC.
pub(crate) fn rdtsc(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    check_tsc_allowed(cpu)?;
    cpu.set_edx_eax(cpu.state.tsc());
    Ok(())
}

/// RDTSCP.
pub(crate) fn rdtscp(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if !cpu.cpuid.has_rdtscp() {
        return Err(cpu.ud());
    }
    check_tsc_allowed(cpu)?;
    cpu.set_edx_eax(cpu.state.tsc());
    cpu.state.regs[reg::RCX] = cpu.state.msr.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// RDPID.
pub(crate) fn rdpid(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if !cpu.cpuid.has(feature::RDPID) {
        return Err(cpu.ud());
    }
    cpu.state.regs[insn.op0] = cpu.state.msr.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// RDPMC: there are no counters, so that every index is #GP.
pub(crate) fn rdpmc(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    Err(cpu.gp0())
}
