//! EVEX-encoded instructions that run in stubs: write masks and what they mean for memory operands
//! (SDM Vol. 2, 2.7 and 2.8).
//!
//! A masked load reads the selected elements only; what the stub sees in place of the others does not
//! matter, since the host masks them too. A masked store runs into the frame, and the selected
//! elements are stored from there after all of them are known to be writable.

use super::simd::{finish_mxcsr, load_operand, run_mxcsr};
use crate::assist::{self, Binding, Class, MemoryUse, Stub};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::Stop;

/// Runs an instruction on the host.
pub fn native(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let Some((stub, binding)) = assist::lookup_evex(insn.imm) else {
        return Err(Stop::Unimplemented);
    };
    cpu.check_class(Class::Evex)?;
    let mask = write_mask(cpu, stub, &binding);
    // What is not accessed need not be aligned.
    if stub.aligned && (stub.masking.slot.is_none() || stub.masking.selected(mask) != 0) {
        cpu.check_operand_alignment(insn, stub.size.into())?;
    }
    if stub.memory == MemoryUse::Read {
        load(cpu, insn, stub, &binding, mask)?;
    }
    cpu.counters.assisted += 1;

    fill(cpu, stub, &binding, mask);
    let mxcsr = run_mxcsr(cpu, stub);
    let selected = stub.masking.selected(mask);
    if stub.mxcsr && stub.memory == MemoryUse::Write {
        // A page fault comes before floating-point exceptions.
        probe(cpu, insn, stub, selected)?;
    }
    stub.call(&mut cpu.assist);
    let flags = finish_mxcsr(cpu, stub, mxcsr)?;
    if stub.memory == MemoryUse::Write {
        store(cpu, insn, stub, selected)?;
    }
    cpu.add_mxcsr_flags(flags);
    commit(cpu, stub, &binding);
    Ok(())
}

/// The write mask's register, or all ones if there is none.
#[inline(always)]
fn write_mask(cpu: &Cpu, stub: &Stub, binding: &Binding) -> u64 {
    let slot = stub.masking.slot.map(usize::from);
    match slot.and_then(|slot| binding.opmasks.get(slot)) {
        Some(0) | None => u64::MAX,
        Some(n) => cpu.opmask(*n),
    }
}

/// Puts the registers read into the frame.
#[inline(always)]
fn fill(cpu: &mut Cpu, stub: &Stub, binding: &Binding, mask: u64) {
    for (slot, v) in stub.vectors().iter().enumerate().filter(|(_, v)| v.read) {
        cpu.assist.vectors[slot] = if v.write && binding.blank {
            [[0; 16]; 4]
        } else {
            cpu.quarters(binding.vectors[slot], usize::from(v.bytes / 16))
        };
    }
    for slot in 0..stub.gprs().len() {
        cpu.assist.gprs[slot] = cpu.state.regs[binding.gprs[slot] & 15];
    }
    for (slot, _) in stub.opmasks.iter().enumerate().filter(|(_, k)| k.read) {
        let is_mask = stub.masking.slot.map(usize::from) == Some(slot);
        cpu.assist.opmasks[slot] = if is_mask {
            mask
        } else {
            cpu.opmask(binding.opmasks[slot])
        };
    }
    if stub.reads_flags {
        cpu.assist.set_flags(cpu.state.rflags);
    }
}

/// Takes the registers written from the frame.
#[inline(always)]
fn commit(cpu: &mut Cpu, stub: &Stub, binding: &Binding) {
    for (slot, v) in stub.vectors().iter().enumerate().filter(|(_, v)| v.write) {
        let mut quarters = cpu.assist.vectors[slot];
        for clear in quarters.iter_mut().skip(usize::from(v.bytes / 16)) {
            *clear = [0; 16];
        }
        cpu.set_quarters(binding.vectors[slot], &quarters);
    }
    for (slot, _) in stub.opmasks.iter().enumerate().filter(|(_, k)| k.write) {
        cpu.set_opmask(binding.opmasks[slot], cpu.assist.opmasks[slot]);
    }
    for (slot, write) in stub.gprs().iter().enumerate() {
        if *write {
            cpu.state.regs[binding.gprs[slot] & 15] = cpu.assist.gprs[slot];
        }
    }
    if stub.flags != 0 {
        cpu.state.rflags = cpu.state.rflags & !stub.flags | cpu.assist.flags() & stub.flags;
    }
}

/// Whether the memory operand is accessed element by element: because a write mask leaves out some, or
/// because they lie side by side, which is the form for any number of them.
#[inline(always)]
fn is_partial(stub: &Stub, selected: u64) -> bool {
    let m = &stub.masking;
    m.element != 0 && (m.packed || m.slot.is_some() && selected != m.all())
}

/// Puts the memory operand into the frame.
#[inline(always)]
fn load(cpu: &mut Cpu, insn: &Insn, stub: &Stub, binding: &Binding, mask: u64) -> Result<(), Stop> {
    if binding.broadcast != 0 {
        return load_broadcast(cpu, insn, stub, binding.broadcast.into(), mask);
    }
    let size = usize::from(stub.size);
    let selected = stub.masking.selected(mask);
    if stub.masking.suppresses && is_partial(stub, selected) {
        return load_selected(cpu, insn, stub, selected);
    }
    load_operand(cpu, insn, size)
}

/// One element for all of the operand, not accessed if the mask selects none.
fn load_broadcast(
    cpu: &mut Cpu,
    insn: &Insn,
    stub: &Stub,
    element: usize,
    mask: u64,
) -> Result<(), Stop> {
    if stub.masking.suppresses && stub.masking.slot.is_some() && stub.masking.selected(mask) == 0 {
        return Ok(());
    }
    let value = cpu.read_operand(insn, element)?;
    for chunk in cpu.assist.memory.chunks_exact_mut(element) {
        chunk.copy_from_slice(&value[..element]);
    }
    Ok(())
}

/// The selected elements only.
fn load_selected(cpu: &mut Cpu, insn: &Insn, stub: &Stub, selected: u64) -> Result<(), Stop> {
    let element = usize::from(stub.masking.element);
    let offset = cpu.effective_address(insn);
    for i in elements(selected) {
        let at = cpu.element_offset(offset, i * element);
        let value = cpu.read_operand_at(insn.seg, at, element)?;
        if let Some(to) = cpu.assist.memory.get_mut(i * element..(i + 1) * element) {
            to.copy_from_slice(&value[..element]);
        }
    }
    Ok(())
}

/// The numbers of the bits that are set.
pub(super) fn elements(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let i = bits.trailing_zeros();
        bits &= bits.checked_sub(1)?;
        Some(i as usize)
    })
}

/// Makes sure that the store of the memory operand, or of the selected elements, does not fault.
fn probe(cpu: &mut Cpu, insn: &Insn, stub: &Stub, selected: u64) -> Result<(), Stop> {
    let offset = cpu.effective_address(insn);
    if !is_partial(stub, selected) || !stub.masking.suppresses {
        return cpu.probe_write(insn.seg, offset, stub.size.into());
    }
    let element = usize::from(stub.masking.element);
    for i in elements(selected) {
        let at = cpu.element_offset(offset, i * element);
        cpu.probe_write(insn.seg, at, element)?;
    }
    Ok(())
}

/// Stores the frame's memory operand, or the selected elements of it.
fn store(cpu: &mut Cpu, insn: &Insn, stub: &Stub, selected: u64) -> Result<(), Stop> {
    let data = cpu.assist.memory;
    if !is_partial(stub, selected) {
        let size = usize::from(stub.size);
        return cpu.write_operand(insn, data.get(..size).unwrap_or_default());
    }
    probe(cpu, insn, stub, selected)?;
    let element = usize::from(stub.masking.element);
    let offset = cpu.effective_address(insn);
    for i in elements(selected) {
        let at = cpu.element_offset(offset, i * element);
        let value = data.get(i * element..(i + 1) * element).unwrap_or_default();
        cpu.write_element(insn.seg, at, value)?;
    }
    Ok(())
}
