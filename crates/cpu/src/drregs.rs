//! MOV to and from the debug registers (SDM Vol. 3, 18.2). What breakpoints hit is in
//! [`crate::debug`].

use crate::cpu::Cpu;
use crate::debug::{DR6_BD, DR6_FIXED, DR7_GD, loaded_dr6, loaded_dr7};
use crate::decode::Insn;
use crate::events::vector;
use crate::exit::{Exit, Fault, Stop};
use crate::state::cr4;
use iced_x86::Register;

/// The register a MOV DR means (4 and 5 are 6 and 7 without CR4.DE), after the checks common to
/// reads and writes.
fn debug_register(cpu: &mut Cpu, r: Register) -> Result<u8, Stop> {
    let n = r.number() as u8;
    if n > 7 || matches!(n, 4 | 5) && cpu.state.cr4 & cr4::DE != 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let (_, dr7) = cpu.breakpoints();
    if dr7 & DR7_GD != 0 {
        // A debugger's DR7 counts instead of the guest's, and the debugger is told.
        if cpu.guest_debug.hardware_breakpoints {
            return Err(cpu.exit_with(Exit::Debug {
                vector: vector::DB,
                dr6: DR6_BD | DR6_FIXED,
                dr7,
            }));
        }
        return Err(cpu.raise(Fault {
            vector: vector::DB,
            error_code: None,
            payload: DR6_BD,
            trap: false,
        }));
    }
    Ok(if matches!(n, 4 | 5) { n + 2 } else { n })
}

/// MOV r32/r64, DRn.
pub(crate) fn mov_from_dr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let n = debug_register(cpu, insn.raw.op1_register())?;
    let value = match n {
        6 => cpu.state.dr6,
        7 => cpu.state.dr7,
        _ => cpu.state.db[usize::from(n & 3)],
    };
    let mask = if cpu.state.code64() {
        u64::MAX
    } else {
        0xffff_ffff
    };
    cpu.state.regs[insn.op0] = value & mask;
    Ok(())
}

/// MOV DRn, r32/r64.
pub(crate) fn mov_to_dr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let n = debug_register(cpu, insn.raw.op0_register())?;
    let code64 = cpu.state.code64();
    let value = cpu.state.regs[insn.op1] & if code64 { u64::MAX } else { 0xffff_ffff };
    if n >= 6 && value >> 32 != 0 {
        return Err(cpu.gp0());
    }
    match n {
        6 => cpu.state.dr6 = loaded_dr6(value),
        7 => cpu.state.dr7 = loaded_dr7(value),
        _ => cpu.state.db[usize::from(n & 3)] = value,
    }
    // Watched pages have no fast TLB entries.
    cpu.flush_tlb_rights();
    Ok(())
}
