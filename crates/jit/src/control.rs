//! Instructions that read or change a little of the state beside the registers: CLD, STD, RDTSC, RDTSCP,
//! SERIALIZE and MOV from segment registers at any privilege level, and at CPL 0 MOV from control registers and
//! CLAC where RFLAGS.AC is clear anyhow, as it most often is at the entries of a kernel.
//!
//! What the processor offers by CPUID may change while translations stay, so [`Offers`] says it at run time.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;

use anykvm_cpu::state::{CpuState, Msrs, Segment, cr4, rflags};
use anykvm_cpu::{Cpu, Insn};
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, OpKind, Register};

use crate::asm::{at, shared, slot};
use crate::legacy::{Word, low_half};
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RCX, Home, POINTER, SCRATCH, bit, home, sized};
use crate::shared::{Shared, Slot};
use crate::translate::{Block, Done, Site};

/// Condition number of JE.
const EQUAL: u8 = 4;

/// What such instructions ask when they are executed.
#[derive(Debug)]
#[repr(C)]
pub struct Offers {
    /// Not zero if there is RDTSCP.
    rdtscp: u64,
    /// Not zero if there is CLAC.
    clac: u64,
    /// Where stores into code are counted.
    code_epoch: *const AtomicU64,
    /// How many there had been when the current view was chosen.
    epoch_of_view: u64,
}

impl Offers {
    /// Translated code is about to be entered, in a view of this code epoch.
    pub fn prepare(&mut self, cpu: &Cpu, epoch_of_view: u64) {
        self.rdtscp = cpu.cpuid.has_rdtscp().into();
        self.clac = cpu.cpuid.has_smap().into();
        self.code_epoch = cpu.code_epoch_counter();
        self.epoch_of_view = epoch_of_view;
    }
}

fn offer(field: usize) -> MemoryOperand {
    shared((offset_of!(Shared, offers) + field) as i64)
}

/// A field of the state, whose address R15 holds.
fn field(offset: usize) -> MemoryOperand {
    at(SCRATCH, offset as i64)
}

/// Whether it is a privileged one of these instructions.
pub(crate) fn executes_privileged(raw: &Instruction) -> bool {
    raw.code() == Code::Clac || control_register(raw).is_some()
}

/// The state's field that a MOV from a control register reads. CR8 is the local APIC's.
fn control_register(raw: &Instruction) -> Option<usize> {
    if raw.code() != Code::Mov_r64_cr || raw.has_lock_prefix() {
        return None;
    }
    match raw.op1_register() {
        Register::CR0 => Some(offset_of!(CpuState, cr0)),
        Register::CR2 => Some(offset_of!(CpuState, cr2)),
        Register::CR3 => Some(offset_of!(CpuState, cr3)),
        Register::CR4 => Some(offset_of!(CpuState, cr4)),
        _ => None,
    }
}

/// Emits one of these instructions.
pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    match raw.code() {
        Code::Cld => direction(b, false),
        Code::Std => direction(b, true),
        Code::Rdtsc | Code::Rdtscp if b.word == Word::Quad => time(b, insn, site),
        Code::Serialize => serialize(b, site),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            move_from_segment(b, insn, site)
        }
        Code::Clac if b.supervisor => clear_access(b, site),
        Code::Mov_r64_cr if b.supervisor => match control_register(raw) {
            Some(offset) => move_from_control(b, offset, raw.op0_register()),
            None => Ok(Done::Unsupported),
        },
        _ => Ok(Done::Unsupported),
    }
}

/// String instructions look at DF in the state.
fn direction(b: &mut Block, down: bool) -> Result<Done, IcedError> {
    let flags = field(offset_of!(CpuState, rflags));
    let df = rflags::DF as u32;
    b.flags.release(&mut b.a)?;
    b.a.load(SCRATCH, slot(Slot::State))?;
    if down {
        b.a.emit(Code::Or_rm32_imm32, flags, df)?;
    } else {
        b.a.emit(Code::And_rm32_imm32, flags, !df)?;
    }
    Ok(Done::Next)
}

/// The flags, undefined behind it, stay.
fn move_from_control(b: &mut Block, offset: usize, to: Register) -> Result<Done, IcedError> {
    let to = home(to.number());
    if let Home::Host(r) = to {
        b.before_write(bit(r), None, false)?;
    }
    b.a.load(SCRATCH, slot(Slot::State))?;
    match to {
        Home::Host(r) => b.a.load(r, field(offset))?,
        Home::Spilled(s) => {
            b.a.load(SCRATCH, field(offset))?;
            b.a.store(slot(s), SCRATCH)?;
        }
    }
    Ok(Done::Next)
}

/// To memory it is 16 bits whatever the operand's size, to a register of 32 or 64 bits zero-extended.
fn move_from_segment(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let raw = &insn.raw;
    let n = raw.op1_register().number();
    let segment = offset_of!(CpuState, seg) + n * size_of::<Segment>();
    let selector = field(segment + offset_of!(Segment, selector));
    if raw.op0_kind() == OpKind::Memory {
        let Some(address) = Address::of(insn, site.next).filter(Address::is_plain) else {
            return Ok(Done::Unsupported);
        };
        let checked = b.check(&address, 2, Use::Write, site)?;
        let to = b.operand(&checked, true)?;
        b.a.load(SCRATCH, slot(Slot::State))?;
        b.a.emit(Code::Movzx_r32_rm16, low_half(SCRATCH), selector)?;
        b.access(&checked);
        b.a.emit(Code::Mov_rm16_r16, to, Register::R15W)?;
        b.resume_here(checked.exit);
        return Ok(Done::Next);
    }
    // A part of a register in memory is the interpreter's.
    let Home::Host(to) = home(raw.op0_register().full_register().number()) else {
        return Ok(Done::Unsupported);
    };
    b.before_write(bit(to), None, false)?;
    b.a.load(SCRATCH, slot(Slot::State))?;
    match raw.op0_register().size() {
        2 => {
            b.a.emit(Code::Mov_r16_rm16, sized(to, Register::AX), selector)?
        }
        _ => b.a.emit(Code::Movzx_r32_rm16, low_half(to), selector)?,
    }
    Ok(Done::Next)
}

/// RDTSC and RDTSCP. The guest's counter is the host's times a ratio with 48 binary places, plus an offset;
/// read when everything before it has been done, as [`anykvm_cpu::host_tsc`] does.
fn time(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    use Code as C;
    use Register as R;
    let auxiliary = insn.raw.code() == C::Rdtscp;
    if auxiliary || !b.supervisor {
        b.flags.release(&mut b.a)?;
        let exit = b.leave_from(&[], site);
        if auxiliary {
            let there = offer(offset_of!(Offers, rdtscp));
            b.a.emit(C::Cmp_rm64_imm8, there, 0)?;
            let absent = b.a.jcc(EQUAL);
            b.exits.lead(absent, exit);
        }
        if !b.supervisor {
            b.a.load(SCRATCH, slot(Slot::State))?;
            let tsd = cr4::TSD as u32;
            b.a.emit(C::Test_rm32_imm32, field(offset_of!(CpuState, cr4)), tsd)?;
            let forbidden = b.a.jne();
            b.exits.lead(forbidden, exit);
        }
    }
    b.flags.restore(&mut b.a)?;
    let mut written = bit(R::RAX) | bit(R::RDX);
    if auxiliary {
        written |= bit(GUEST_RCX);
    }
    b.before_write(written, None, false)?;
    b.flags.release(&mut b.a)?;
    b.a.load(SCRATCH, slot(Slot::State))?;
    let ratio = field(offset_of!(CpuState, tsc_ratio));
    let offset = field(offset_of!(CpuState, tsc_offset));
    for insn in [
        Instruction::with(C::Lfence),
        Instruction::with(C::Rdtsc),
        Instruction::with2(C::Shl_rm64_imm8, R::RDX, 32)?,
        Instruction::with2(C::Or_r64_rm64, R::RAX, R::RDX)?,
        Instruction::with1(C::Mul_rm64, ratio)?,
        Instruction::with3(C::Shrd_rm64_r64_imm8, R::RAX, R::RDX, 48)?,
        Instruction::with2(C::Add_r64_rm64, R::RAX, offset)?,
        Instruction::with2(C::Mov_r64_rm64, R::RDX, R::RAX)?,
        Instruction::with2(C::Shr_rm64_imm8, R::RDX, 32)?,
        Instruction::with2(C::Mov_r32_rm32, R::EAX, R::EAX)?,
    ] {
        b.a.put(&insn)?;
    }
    if auxiliary {
        let aux = offset_of!(CpuState, msr) + offset_of!(Msrs, tsc_aux);
        b.a.emit(C::Mov_r32_rm32, low_half(GUEST_RCX), field(aux))?;
    }
    Ok(Done::Next)
}

/// CLAC. The interpreter's where it changes what may be accessed.
fn clear_access(b: &mut Block, site: Site) -> Result<Done, IcedError> {
    b.flags.release(&mut b.a)?;
    let there = offer(offset_of!(Offers, clac));
    b.a.emit(Code::Cmp_rm64_imm8, there, 0)?;
    let absent = b.a.jcc(EQUAL);
    b.a.load(SCRATCH, slot(Slot::State))?;
    let flags = field(offset_of!(CpuState, rflags));
    b.a.emit(Code::Test_rm32_imm32, flags, rflags::AC as u32)?;
    let set = b.a.jne();
    b.leave_from(&[absent, set], site);
    Ok(Done::Next)
}

/// All stores are visible, and the next instruction is fetched anew (SDM Vol. 3, 9.3): if code has been
/// written anywhere, the translations must be looked at again, which happens behind the interpreter's.
fn serialize(b: &mut Block, site: Site) -> Result<Done, IcedError> {
    b.flags.release(&mut b.a)?;
    b.a.put(&Instruction::with(Code::Mfence))?;
    b.a.load(POINTER, offer(offset_of!(Offers, code_epoch)))?;
    b.a.load(POINTER, at(POINTER, 0))?;
    let known = offer(offset_of!(Offers, epoch_of_view));
    b.a.emit(Code::Cmp_r64_rm64, POINTER, known)?;
    let written = b.a.jne();
    b.leave_from(&[written], site);
    Ok(Done::Next)
}
