//! MOVS and STOS, alone and repeated, with DF clear and addresses of the code's own size.
//!
//! A repeated one goes on in pieces: as many elements as lie in one page of each operand, by the host's own
//! REP instruction on host addresses. Behind each piece the guest's registers are what the architecture says
//! they are there, so that the block can be left between two pieces, and when an access faults within one.

use std::mem::offset_of;

use anykvm_cpu::Insn;
use anykvm_cpu::decode::SEG_CHECKED;
use anykvm_cpu::state::{CpuState, rflags, seg};
use iced_x86::{Code, IcedError, Instruction, Register};

use crate::asm::{Hole, at, slot};
use crate::flags::Flags;
use crate::legacy::{Word, low_half};
use crate::memory::{self, Address, Bytes, Misses, Use};
use crate::regs::{GUEST_RCX, POINTER, SCRATCH};
use crate::shared::Slot;
use crate::translate::{Block, Done, Site};

/// A string instruction that is translated.
#[derive(Clone, Copy)]
struct Operation {
    /// It has a source: MOVS.
    moves: bool,
    /// log2 of an element's size.
    shift: u32,
    /// The host's own.
    code: Code,
}

impl Operation {
    fn of(insn: &Insn) -> Option<Self> {
        use Code as C;
        let (moves, shift) = match insn.raw.code() {
            C::Movsb_m8_m8 => (true, 0),
            C::Movsw_m16_m16 => (true, 1),
            C::Movsd_m32_m32 => (true, 2),
            C::Movsq_m64_m64 => (true, 3),
            C::Stosb_m8_AL => (false, 0),
            C::Stosw_m16_AX => (false, 1),
            C::Stosd_m32_EAX => (false, 2),
            C::Stosq_m64_RAX => (false, 3),
            _ => return None,
        };
        let own_size = match Word::of(insn) {
            Word::Quad => insn.addr_mask == u64::MAX,
            Word::Double => insn.addr_mask == 0xffff_ffff,
        };
        let flat = insn.seg & SEG_CHECKED == 0 && !matches!(insn.seg, seg::FS | seg::GS);
        (own_size && (flat || !moves)).then_some(Self {
            moves,
            shift,
            code: insn.raw.code(),
        })
    }
    fn size(self) -> usize {
        1 << self.shift
    }
    /// The host's instruction.
    fn host(self, repeated: bool) -> Result<Instruction, IcedError> {
        use iced_x86::RepPrefixKind::{None, Repe};
        let rep = if repeated { Repe } else { None };
        match self.code {
            Code::Movsb_m8_m8 => Instruction::with_movsb(64, Register::None, rep),
            Code::Movsw_m16_m16 => Instruction::with_movsw(64, Register::None, rep),
            Code::Movsd_m32_m32 => Instruction::with_movsd(64, Register::None, rep),
            Code::Movsq_m64_m64 => Instruction::with_movsq(64, Register::None, rep),
            Code::Stosb_m8_AL => Instruction::with_stosb(64, rep),
            Code::Stosw_m16_AX => Instruction::with_stosw(64, rep),
            Code::Stosd_m32_EAX => Instruction::with_stosd(64, rep),
            _ => Instruction::with_stosq(64, rep),
        }
    }
}

/// Emits a string instruction.
pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let Some(op) = Operation::of(insn) else {
        return Ok(Done::Unsupported);
    };
    // No recipe: it would need registers that change.
    b.flags.restore(&mut b.a)?;
    b.flags = Flags::Host(None);
    b.flags.release(&mut b.a)?;
    let mut leave = vec![unless_forward(b)?];
    let (mut end, mut missed) = (Vec::new(), Vec::new());
    let top = b.a.here();
    if insn.rep() {
        let count = part(b.word, GUEST_RCX);
        let test = [Code::Test_rm64_r64, Code::Test_rm32_r32];
        put2(b, of_word(b.word, test), count, count)?;
        end.push(b.a.jcc(EQUAL));
    }
    check(b, Register::RDI, Use::Write, op, Slot::Entry, &mut missed)?;
    if op.moves {
        check(b, Register::RSI, Use::Read, op, Slot::Target, &mut missed)?;
    }
    if insn.rep() {
        load_piece(b, op)?;
    }
    to_host(b, op)?;
    let access = b.a.here();
    b.a.put(&op.host(insn.rep())?)?;
    end_piece(b, op, insn.rep())?;
    if insn.rep() {
        end.push(b.a.jcc(EQUAL));
        b.a.load(POINTER, slot(Slot::Go))?;
        let wanted = at(POINTER, 0);
        b.a.emit(Code::Cmp_rm32_imm8, wanted, 0)?;
        let again = b.a.jne();
        b.a.fill(again, top);
        leave.push(b.a.jmp());
    } else {
        end.push(b.a.jmp());
    }
    // The access has faulted.
    let fault = b.a.here();
    b.resume_fault(access, fault);
    end_piece(b, op, insn.rep())?;
    leave.push(b.a.jmp());
    let exit = b.leave_from(&leave, site);
    for (misses, usage) in missed {
        b.refill_or(misses, usage, exit);
    }
    for hole in end {
        b.a.land(hole);
    }
    b.resume_here(exit);
    Ok(Done::Next)
}

/// Condition number of JE.
const EQUAL: u8 = 4;

fn of_word<T: Copy>(word: Word, [quad, double]: [T; 2]) -> T {
    match word {
        Word::Quad => quad,
        Word::Double => double,
    }
}

fn part(word: Word, r: Register) -> Register {
    of_word(word, [r, low_half(r)])
}

fn put2(b: &mut Block, code: Code, to: Register, from: Register) -> Result<(), IcedError> {
    b.a.emit(code, to, from)
}

/// A branch that is taken if DF is set.
fn unless_forward(b: &mut Block) -> Result<Hole, IcedError> {
    b.a.load(SCRATCH, slot(Slot::State))?;
    let flags = at(SCRATCH, offset_of!(CpuState, rflags) as i64);
    b.a.emit(Code::Test_rm32_imm32, flags, rflags::DF as u32)?;
    Ok(b.a.jne())
}

/// Checks the first element's access; keeps the addend in a slot.
fn check(
    b: &mut Block,
    register: Register,
    usage: Use,
    op: Operation,
    addend: Slot,
    missed: &mut Vec<(Misses, Use)>,
) -> Result<(), IcedError> {
    let address = Address::stack(register, 0, b.word);
    let bytes = Bytes {
        from: 0,
        count: op.size(),
        usage,
        align: 1,
    };
    let misses = memory::check(&mut b.a, &address, &bytes)?;
    missed.push((misses, usage));
    b.a.store(slot(addend), POINTER)
}

/// Puts the number of elements of the next piece into RCX and [`Slot::Operand`]: what is left to the end of a
/// page of each operand, but not more than the guest's RCX.
fn load_piece(b: &mut Block, op: Operation) -> Result<(), IcedError> {
    let (ecx, r15d) = (low_half(POINTER), low_half(SCRATCH));
    put2(b, Code::Mov_r32_rm32, ecx, Register::EDI)?;
    b.a.emit(Code::And_rm32_imm32, ecx, 0xfffu32)?;
    if op.moves {
        put2(b, Code::Mov_r32_rm32, r15d, Register::ESI)?;
        b.a.emit(Code::And_rm32_imm32, r15d, 0xfffu32)?;
        put2(b, Code::Cmp_r32_rm32, ecx, r15d)?;
        put2(b, Code::Cmovb_r32_rm32, ecx, r15d)?;
    }
    b.a.put(&Instruction::with1(Code::Neg_rm32, ecx)?)?;
    b.a.emit(Code::Add_rm32_imm32, ecx, 4096u32)?;
    if op.shift != 0 {
        b.a.emit(Code::Shr_rm32_imm8, ecx, op.shift)?;
    }
    b.word.mov(&mut b.a, SCRATCH, GUEST_RCX)?;
    put2(b, Code::Cmp_r64_rm64, SCRATCH, POINTER)?;
    put2(b, Code::Cmovb_r64_rm64, POINTER, SCRATCH)?;
    b.a.store(slot(Slot::Operand), POINTER)
}

/// The index registers become host addresses.
fn to_host(b: &mut Block, op: Operation) -> Result<(), IcedError> {
    move_index(b, Code::Add_r64_rm64, Register::RDI, Slot::Entry)?;
    if op.moves {
        move_index(b, Code::Add_r64_rm64, Register::RSI, Slot::Target)?;
    }
    Ok(())
}

/// And guest addresses again, and RCX counts what is left. A piece may have ended before its end: then the
/// host's RCX is not zero. ZF says whether that was all.
fn end_piece(b: &mut Block, op: Operation, repeated: bool) -> Result<(), IcedError> {
    move_index(b, Code::Sub_r64_rm64, Register::RDI, Slot::Entry)?;
    if op.moves {
        move_index(b, Code::Sub_r64_rm64, Register::RSI, Slot::Target)?;
    }
    if repeated {
        b.a.load(SCRATCH, slot(Slot::Operand))?;
        put2(b, Code::Sub_r64_rm64, SCRATCH, POINTER)?;
        let sub = [Code::Sub_r64_rm64, Code::Sub_r32_rm32];
        let (count, done) = (part(b.word, GUEST_RCX), part(b.word, SCRATCH));
        put2(b, of_word(b.word, sub), count, done)?;
    }
    Ok(())
}

/// In 32-bit code the upper half does not count: it is cleared in front of the addition and behind the
/// subtraction.
fn move_index(b: &mut Block, code: Code, r: Register, addend: Slot) -> Result<(), IcedError> {
    let narrow = b.word == Word::Double;
    if narrow && code == Code::Add_r64_rm64 {
        b.word.mov(&mut b.a, r, r)?;
    }
    b.a.emit(code, r, slot(addend))?;
    if narrow && code == Code::Sub_r64_rm64 {
        b.word.mov(&mut b.a, r, r)?;
    }
    Ok(())
}
