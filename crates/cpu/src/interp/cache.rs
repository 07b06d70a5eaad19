//! Memory ordering and cache lines: fences, SERIALIZE, flushes, direct stores (SDM Vol. 3, 9.2, 9.3
//! and 12.5).
//!
//! Guest RAM is the host's own, cached and coherent, so flushing a line only checks its address.

use std::sync::atomic::{Ordering, fence};

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, SEG_FLAT_SS};
use crate::events::vector;
use crate::exit::Stop;
use crate::mode::Mode;

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    Some(match insn.raw.mnemonic() {
        // Fetches are serialised too: SERIALIZE ends a block, and code that was changed is found stale.
        Mnemonic::Mfence | Mnemonic::Serialize => mfence,
        // Loads and stores of this program keep the order of the guest's.
        Mnemonic::Lfence | Mnemonic::Sfence => nothing,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        Mnemonic::Movdiri => match insn.raw.op1_register().size() {
            8 => movdiri::<u64>,
            _ => movdiri::<u32>,
        },
        _ => return None,
    })
}

fn nothing(_: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Ok(())
}

fn mfence(_: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    fence(Ordering::SeqCst);
    Ok(())
}

// Checked like a load of one byte, without loading it: the line may be a device's.
fn flush_line(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let offset = cpu.effective_address(insn);
    let linear = cpu.linear(insn.seg, offset, 1, false)?;
    if !cpu.canonical(linear) {
        let stack = insn.seg == SEG_FLAT_SS;
        return Err(cpu.raise_error(if stack { vector::SS } else { vector::GP }, 0));
    }
    cpu.probe(linear, 1, cpu.data_access(false))
}

fn movdiri<T: crate::memory::access::Ram>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.write(insn, T::get(&cpu.state.regs, insn.op1))
}
