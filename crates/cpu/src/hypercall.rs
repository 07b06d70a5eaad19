//! VMCALL and VMMCALL (Linux: `Documentation/virt/kvm/x86/hypercalls.rst`). Each vendor's processors have
//! one of them; KVM rewrites the other in the guest's code, unless that quirk is off (KVM API, 7.32).

use crate::cpu::Cpu;
use crate::decode::{Insn, SEG_FLAT};
use crate::exit::Stop;
use crate::machine::{Hypercall, Quirk};
use crate::state::{reg, seg};

/// -KVM_EPERM: hypercalls are for CPL 0.
const EPERM: u64 = -1i64 as u64;

/// VMCALL and VMMCALL.
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

/// Puts the instruction that this vendor's processors have in the place of the other's. #UD without
/// the quirk; the write may fault as any of the guest's.
fn fix(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let own = if cpu.cpuid.is_amd() { VMMCALL } else { VMCALL };
    if insn.encoding().ends_with(&own) {
        return Ok(());
    }
    if !cpu.machine.has_quirk(Quirk::FixHypercall) {
        return Err(cpu.ud());
    }
    let behind = cpu.state.rip();
    let base = cpu.state.seg[usize::from(seg::CS)].base;
    let at = if cpu.state.code64() {
        behind.wrapping_sub(3)
    } else {
        base.wrapping_add(behind).wrapping_sub(3) & 0xffff_ffff
    };
    cpu.write_bytes(SEG_FLAT, at, &own)
}

/// VMCALL, VMMCALL.
pub(crate) fn hypercall(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mask = if cpu.state.code64() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    let answer = cpu.take_hypercall_answer();
    if answer.is_none() {
        fix(cpu, insn)?;
    }
    let result = match answer {
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
