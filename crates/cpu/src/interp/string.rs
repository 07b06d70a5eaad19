//! String instructions: MOVS, CMPS, SCAS, LODS, STOS with REP, REPE and REPNE (SDM Vol. 1, 7.3.9).
//! INS and OUTS are in [`super::io`].
//!
//! A repeated instruction works in chunks: as many elements as lie in one page of each operand, when
//! the TLB gives host addresses for both. Registers are brought up to date behind each chunk, so a
//! fault leaves them at the element that faulted, and between chunks requests are looked at. An
//! element that has no fast path (it crosses a page, misses the TLB, is device memory) is done alone,
//! and then the instruction starts again through the run loop, which takes care of exits.

use iced_x86::Mnemonic;

use super::form::by_width;
use crate::cpu::Cpu;
use crate::decode::{Handler, Insn, segment_code};
use crate::exit::Stop;
use crate::memory::{PAGE, elements};
use crate::mode::Mode;
use crate::native::alu::{Alu, status};
use crate::state::{reg, rflags, seg};
use crate::width::Width;

/// No prefix.
const ONCE: u8 = 0;
/// REP, or REPE for the comparing ones.
const REPE: u8 = 1;
/// REPNE (for those that do not compare, the same as REP).
const REPNE: u8 = 2;

/// A string instruction on elements of any size.
trait Operation {
    /// It ends early on ZF.
    const COMPARES: bool = false;
    /// Does one element and moves the index registers.
    fn one<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop>;
    /// Does up to `left` elements (at least one) and moves the index registers; returns how many
    /// were done. `None` if there is no fast path. A comparing operation stops behind the first
    /// element whose ZF is `until`.
    fn chunk<T: Alu>(cpu: &mut Cpu, insn: &Insn, left: u64, until: bool) -> Option<u64>;
}

struct Movs;
struct Cmps;
struct Scas;
struct Lods;
struct Stos;

/// Writes a counter or index register at the address size.
#[inline(always)]
fn set_register(cpu: &mut Cpu, register: u8, mask: u64, value: u64) {
    let r = &mut cpu.state.regs[register];
    *r = if mask == 0xffff {
        *r & !mask | value & mask
    } else {
        value & mask
    };
}

#[inline(always)]
fn down(cpu: &Cpu) -> bool {
    cpu.state.rflags & rflags::DF != 0
}

/// Moves an index register over `count` elements in the direction of DF.
#[inline(always)]
fn advance<T: Width>(cpu: &mut Cpu, insn: &Insn, register: u8, count: u64) {
    let bytes = count.wrapping_mul(T::BYTES as u64);
    let old = cpu.state.regs[register];
    let new = if down(cpu) {
        old.wrapping_sub(bytes)
    } else {
        old.wrapping_add(bytes)
    };
    set_register(cpu, register, insn.addr_mask, new);
}

/// Segment code of the destination: ES, whatever the prefixes.
#[inline(always)]
fn destination(cpu: &Cpu) -> u8 {
    segment_code(seg::ES, cpu.mode)
}

#[inline(always)]
fn read_source<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<T, Stop> {
    let offset = cpu.state.regs[reg::RSI] & insn.addr_mask;
    cpu.read_at(insn.seg, offset)
}

#[inline(always)]
fn read_destination<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<T, Stop> {
    let offset = cpu.state.regs[reg::RDI] & insn.addr_mask;
    cpu.read_at(destination(cpu), offset)
}

#[inline(always)]
fn write_destination<T: Alu>(cpu: &mut Cpu, insn: &Insn, value: T) -> Result<(), Stop> {
    let offset = cpu.state.regs[reg::RDI] & insn.addr_mask;
    cpu.write_at(destination(cpu), offset, value)
}

/// Elements that can be reached from a host address without leaving a page.
#[derive(Clone, Copy)]
struct Window {
    /// Host address of the first element.
    host: u64,
    /// Elements, in the direction of DF.
    count: u64,
}

/// The elements from an index register on that share a page with a fast entry in the TLB.
fn window<T: Alu>(
    cpu: &mut Cpu,
    code: u8,
    register: u8,
    mask: u64,
    most: u64,
    write: bool,
) -> Option<Window> {
    let size = T::BYTES as u64;
    let offset = cpu.state.regs[register] & mask;
    let linear = cpu.linear(code, offset, T::BYTES, write).ok()?;
    let in_page = linear % PAGE;
    if in_page + size > PAGE {
        return None;
    }
    let down = down(cpu);
    // To the end of the page, and not past the end of the address size.
    let (page, wrap) = if down {
        (in_page / size + 1, (offset / size).saturating_add(1))
    } else {
        ((PAGE - in_page) / size, ((mask - offset) / size).max(1))
    };
    let mut count = most.min(page).min(wrap);
    let far = (count - 1) * size;
    let last = if down {
        offset.wrapping_sub(far)
    } else {
        offset.wrapping_add(far)
    };
    if cpu.linear(code, last, T::BYTES, write).is_err() {
        count = 1;
    }
    let bytes = count * size;
    let lowest = if down {
        linear - (bytes - size)
    } else {
        linear
    };
    let set = cpu.tlb.set;
    let host = if write {
        cpu.tlb.write(set, lowest, bytes as usize)?
    } else {
        cpu.tlb.read(set, lowest, bytes as usize)?
    };
    Some(Window {
        host: host + (linear - lowest),
        count,
    })
}

fn source_window<T: Alu>(cpu: &mut Cpu, insn: &Insn, most: u64) -> Option<Window> {
    window::<T>(cpu, insn.seg, reg::RSI, insn.addr_mask, most, false)
}

fn destination_window<T: Alu>(
    cpu: &mut Cpu,
    insn: &Insn,
    most: u64,
    write: bool,
) -> Option<Window> {
    window::<T>(cpu, destination(cpu), reg::RDI, insn.addr_mask, most, write)
}

impl Operation for Movs {
    #[inline(always)]
    fn one<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let v = read_source::<T>(cpu, insn)?;
        write_destination(cpu, insn, v)?;
        advance::<T>(cpu, insn, reg::RSI, 1);
        advance::<T>(cpu, insn, reg::RDI, 1);
        Ok(())
    }

    fn chunk<T: Alu>(cpu: &mut Cpu, insn: &Insn, left: u64, _: bool) -> Option<u64> {
        let to = destination_window::<T>(cpu, insn, left, true)?;
        let from = source_window::<T>(cpu, insn, to.count)?;
        elements::copy::<T>(to.host, from.host, from.count, down(cpu));
        advance::<T>(cpu, insn, reg::RSI, from.count);
        advance::<T>(cpu, insn, reg::RDI, from.count);
        Some(from.count)
    }
}

impl Operation for Stos {
    #[inline(always)]
    fn one<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let v = T::get(&cpu.state.regs, reg::RAX);
        write_destination(cpu, insn, v)?;
        advance::<T>(cpu, insn, reg::RDI, 1);
        Ok(())
    }

    fn chunk<T: Alu>(cpu: &mut Cpu, insn: &Insn, left: u64, _: bool) -> Option<u64> {
        let to = destination_window::<T>(cpu, insn, left, true)?;
        let v = T::get(&cpu.state.regs, reg::RAX);
        let back = if down(cpu) {
            (to.count - 1) * T::BYTES as u64
        } else {
            0
        };
        elements::fill(to.host - back, v, to.count);
        advance::<T>(cpu, insn, reg::RDI, to.count);
        Some(to.count)
    }
}

impl Operation for Lods {
    #[inline(always)]
    fn one<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        read_source::<T>(cpu, insn)?.set(&mut cpu.state.regs, reg::RAX);
        advance::<T>(cpu, insn, reg::RSI, 1);
        Ok(())
    }

    // Only the last element stays.
    fn chunk<T: Alu>(cpu: &mut Cpu, insn: &Insn, left: u64, _: bool) -> Option<u64> {
        let from = source_window::<T>(cpu, insn, left)?;
        let (_, last) = elements::scan(from.host, from.count, down(cpu), |_: T| false);
        last.set(&mut cpu.state.regs, reg::RAX);
        advance::<T>(cpu, insn, reg::RSI, from.count);
        Some(from.count)
    }
}

#[inline(always)]
fn compare<T: Alu>(cpu: &mut Cpu, a: T, b: T) {
    cpu.state.rflags = status(cpu.state.rflags, T::sub(a, b).1);
}

impl Operation for Cmps {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let a = read_source::<T>(cpu, insn)?;
        let b = read_destination::<T>(cpu, insn)?;
        compare(cpu, a, b);
        advance::<T>(cpu, insn, reg::RSI, 1);
        advance::<T>(cpu, insn, reg::RDI, 1);
        Ok(())
    }

    fn chunk<T: Alu>(cpu: &mut Cpu, insn: &Insn, left: u64, until: bool) -> Option<u64> {
        let second = destination_window::<T>(cpu, insn, left, false)?;
        let first = source_window::<T>(cpu, insn, second.count)?;
        let hosts = (first.host, second.host);
        let stop = |a: T, b: T| (a == b) == until;
        let (done, a, b) = elements::scan_two(hosts, first.count, down(cpu), stop);
        compare(cpu, a, b);
        advance::<T>(cpu, insn, reg::RSI, done);
        advance::<T>(cpu, insn, reg::RDI, done);
        Some(done)
    }
}

impl Operation for Scas {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
        let b = read_destination::<T>(cpu, insn)?;
        compare(cpu, T::get(&cpu.state.regs, reg::RAX), b);
        advance::<T>(cpu, insn, reg::RDI, 1);
        Ok(())
    }

    fn chunk<T: Alu>(cpu: &mut Cpu, insn: &Insn, left: u64, until: bool) -> Option<u64> {
        let a = T::get(&cpu.state.regs, reg::RAX);
        let second = destination_window::<T>(cpu, insn, left, false)?;
        let stop = |b: T| (a == b) == until;
        let (done, b) = elements::scan(second.host, second.count, down(cpu), stop);
        compare(cpu, a, b);
        advance::<T>(cpu, insn, reg::RDI, done);
        Some(done)
    }
}

fn once<O: Operation, T: Alu>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    O::one::<T>(cpu, insn)
}

fn repeated<O: Operation, T: Alu, const REP: u8>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let mask = insn.addr_mask;
    let until = REP == REPNE;
    loop {
        let left = cpu.state.regs[reg::RCX] & mask;
        if left == 0 {
            return Ok(());
        }
        // While single-stepping each element is an instruction.
        let most = cpu.most_elements();
        let fast = if cpu.stepping || most <= 1 {
            None
        } else {
            O::chunk::<T>(cpu, insn, left.min(most), until)
        };
        let done = match fast {
            Some(n) => {
                cpu.note_elements(n);
                n
            }
            None => {
                O::one::<T>(cpu, insn)?;
                1
            }
        };
        set_register(cpu, reg::RCX, mask, left - done);
        let met = O::COMPARES && (cpu.state.rflags & rflags::ZF != 0) == until;
        if left == done || met {
            return Ok(());
        }
        if fast.is_none() || cpu.requests.pending() != 0 || cpu.counted.running {
            cpu.repeat(insn);
            return Ok(());
        }
    }
}

fn forms<O: Operation>(insn: &Insn, bytes: usize) -> Option<Handler> {
    let rep = match (insn.raw.has_rep_prefix(), insn.raw.has_repne_prefix()) {
        (_, true) => REPNE,
        (true, _) => REPE,
        _ => ONCE,
    };
    match rep {
        ONCE => by_width!(bytes, T => once::<O, T>),
        REPE => by_width!(bytes, T => repeated::<O, T, REPE>),
        _ => by_width!(bytes, T => repeated::<O, T, REPNE>),
    }
}

/// The handler, if the instruction is of this family.
pub fn select(insn: &Insn, _: Mode) -> Option<Handler> {
    use Mnemonic as M;
    // MOVSD and CMPSD are also the names of SSE2 instructions.
    if !insn.raw.is_string_instruction() {
        return None;
    }
    match insn.raw.mnemonic() {
        M::Movsb => forms::<Movs>(insn, 1),
        M::Movsw => forms::<Movs>(insn, 2),
        M::Movsd => forms::<Movs>(insn, 4),
        M::Movsq => forms::<Movs>(insn, 8),
        M::Cmpsb => forms::<Cmps>(insn, 1),
        M::Cmpsw => forms::<Cmps>(insn, 2),
        M::Cmpsd => forms::<Cmps>(insn, 4),
        M::Cmpsq => forms::<Cmps>(insn, 8),
        M::Scasb => forms::<Scas>(insn, 1),
        M::Scasw => forms::<Scas>(insn, 2),
        M::Scasd => forms::<Scas>(insn, 4),
        M::Scasq => forms::<Scas>(insn, 8),
        M::Lodsb => forms::<Lods>(insn, 1),
        M::Lodsw => forms::<Lods>(insn, 2),
        M::Lodsd => forms::<Lods>(insn, 4),
        M::Lodsq => forms::<Lods>(insn, 8),
        M::Stosb => forms::<Stos>(insn, 1),
        M::Stosw => forms::<Stos>(insn, 2),
        M::Stosd => forms::<Stos>(insn, 4),
        M::Stosq => forms::<Stos>(insn, 8),
        _ => None,
    }
}
