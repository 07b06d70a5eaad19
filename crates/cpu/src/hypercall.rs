//! VMCALL and VMMCALL: KVM takes either, whatever the vendor (Linux:
//! `Documentation/virt/kvm/x86/hypercalls.rst`).

use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::Stop;
use crate::machine::Hypercall;
use crate::state::reg;

/// -KVM_EPERM: hypercalls are for CPL 0.
const EPERM: u64 = -1i64 as u64;

/// VMCALL, VMMCALL.
pub(crate) fn hypercall(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    let mask = if cpu.state.code64() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    let result = match cpu.take_hypercall_answer() {
        Some(result) => result,
        None if cpu.state.cpl() != 0 => EPERM,
        None => {
            let r = &cpu.state.regs;
            let nr = r[reg::RAX] & mask;
            let args = [reg::RBX, reg::RCX, reg::RDX, reg::RSI, reg::RDI].map(|n| r[n] & mask);
            match cpu.machine.hypercall(&mut cpu.state, nr, args) {
                Hypercall::Done(result) => result,
                Hypercall::Exit(exit) => return Err(cpu.exit_with(exit)),
            }
        }
    };
    cpu.state.regs[reg::RAX] = result & mask;
    cpu.recheck_events();
    Ok(())
}
