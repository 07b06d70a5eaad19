//! Near branches, calls and returns of the code's own size.
//!
//! Inside a page branches are linked directly. Direct branches to other pages are linked for one view
//! ([`crate::views`]), whose number they compare with the current one's. In another view, and for indirect
//! branches, the view's table is asked; what it does not know the interpreter carries out.

use std::mem::offset_of;

use anykvm_cpu::Insn;
use iced_x86::{Code, FlowControl, IcedError, Instruction, MemoryOperand, OpKind, Register};

use crate::asm::{Asm, Constant, Hole, at, slot};
use crate::exits::Wish;
use crate::flags::Flags;
use crate::legacy::Word;
use crate::loops;
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RCX, GUEST_RSP, Home, POINTER, SCRATCH, bit, home};
use crate::shared::Slot;
use crate::translate::{Block, Done, Site};
use crate::views::Jump;

/// A branch to another page, or what is left to do for it, to be emitted behind the block.
pub(crate) struct Late {
    hole: Hole,
    flags: Flags,
    what: What,
}

enum What {
    /// All of a conditional branch that is taken.
    Taken(i64, Site),
    /// The branch is not linked for this view: its exit is taken if the table does not know the target.
    /// The flags are released.
    Jump(i64, Word, usize),
    /// The same of a call.
    Call(i64, usize, Site),
}

/// A branch that leads to another page in one view.
#[derive(Clone, Copy, Debug)]
pub struct Crossing {
    /// Position of the view's number; 0 if there is none.
    pub guard: u32,
    /// Position of the branch's displacement.
    pub hole: u32,
    /// The target's offset from the page.
    pub offset: i32,
}

/// Emits an instruction that branches. `last`: it is the block's last one.
pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site, last: bool) -> Result<Done, IcedError> {
    use Code as C;
    let raw = &insn.raw;
    match (raw.flow_control(), raw.code()) {
        (FlowControl::ConditionalBranch, _)
            if raw.is_jcc_short_or_near()
                && matches!(raw.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32) =>
        {
            conditional(b, insn, site, last)
        }
        (_, C::Jrcxz_rel8_64 | C::Jecxz_rel8_64 | C::Jecxz_rel8_32) => {
            on_count(b, insn, site, false)
        }
        (_, C::Loop_rel8_64_RCX | C::Loop_rel8_32_ECX) => on_count(b, insn, site, true),
        (_, C::Jmp_rel8_64 | C::Jmp_rel32_64 | C::Jmp_rel8_32 | C::Jmp_rel32_32) => {
            jump(b, insn, site)
        }
        (_, C::Call_rel32_64 | C::Call_rel32_32) => call(b, insn, site),
        (_, C::Jmp_rm64 | C::Jmp_rm32) => jump_indirect(b, insn, site),
        (_, C::Call_rm64 | C::Call_rm32) => call_indirect(b, insn, site),
        (_, C::Retnq | C::Retnq_imm16 | C::Retnd | C::Retnd_imm16) => ret(b, insn, site),
        _ => Ok(Done::Unsupported),
    }
}

fn target(insn: &Insn, site: Site) -> i64 {
    let displacement = Word::of(insn).sign_extend(insn.imm);
    site.next.wrapping_add(displacement)
}

/// A target's offset, if it is near enough: as a displacement, with which addresses of the code's size wrap
/// around.
fn displacement(b: &Block, to: i64) -> Option<i64> {
    let d = b.word.sign_extend(to as u64);
    i32::try_from(d).is_ok().then_some(d)
}

fn in_page(offset: i64) -> bool {
    (0..4096).contains(&offset)
}

fn conditional(b: &mut Block, insn: &Insn, site: Site, last: bool) -> Result<Done, IcedError> {
    b.flags.restore(&mut b.a)?;
    let condition = insn.raw.condition_code() as u8;
    let to = target(insn, site);
    if last && to == b.start && loops::close(b, jcc_number(condition), site)? {
        return Ok(Done::Ends);
    }
    let taken = b.a.jcc(jcc_number(condition));
    branch_to(b, taken, to, site);
    if !last {
        return Ok(Done::Next);
    }
    go_on(b, site.next)?;
    Ok(Done::Ends)
}

/// JRCXZ and JECXZ; or LOOP, which counts down first and branches if that is not zero.
fn on_count(b: &mut Block, insn: &Insn, site: Site, down: bool) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if down && !in_page(to) {
        // A branch out of the page may be left to the interpreter when the counter has been changed.
        return Ok(Done::Unsupported);
    }
    b.flags.restore(&mut b.a)?;
    let word = match insn.raw.code() {
        Code::Jecxz_rel8_64 => Word::Double,
        _ => b.word,
    };
    if down {
        b.before_write(bit(GUEST_RCX), None, false)?;
        word.lea(&mut b.a, GUEST_RCX, at(GUEST_RCX, -1))?;
    }
    word.mov(&mut b.a, POINTER, GUEST_RCX)?;
    let zero = b.a.jrcxz();
    let otherwise = b.a.jmp();
    b.a.land_short(zero);
    let taken = if down {
        let behind = b.a.jmp();
        b.a.land(otherwise);
        let taken = b.a.jmp();
        b.a.land(behind);
        taken
    } else {
        let taken = b.a.jmp();
        b.a.land(otherwise);
        taken
    };
    branch_to(b, taken, to, site);
    go_on(b, site.next)?;
    Ok(Done::Ends)
}

/// The branch at `hole` goes to an offset.
fn branch_to(b: &mut Block, hole: Hole, to: i64, site: Site) {
    if in_page(to) {
        b.link(hole, to);
        return;
    }
    b.late.push(Late {
        hole,
        flags: b.flags.clone(),
        what: What::Taken(to, site),
    });
}

/// Emits what was put off.
pub(crate) fn emit_late(b: &mut Block) -> Result<(), IcedError> {
    while let Some(late) = b.late.pop() {
        b.a.land(late.hole);
        b.flags = late.flags;
        match late.what {
            What::Taken(to, site) => go_outside(b, to, site)?,
            What::Jump(to, word, exit) => {
                relative(&mut b.a, word, to)?;
                let miss = look_up(&mut b.a)?;
                b.exits.lead(miss, exit);
                jump_to_found(b)?;
            }
            What::Call(to, exit, site) => {
                relative(&mut b.a, b.word, to)?;
                let miss = look_up(&mut b.a)?;
                b.exits.lead(miss, exit);
                call_found(b, site)?;
            }
        }
    }
    Ok(())
}

/// From iced's numbering of conditions to the processor's.
fn jcc_number(condition: u8) -> u8 {
    // iced: None, o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g: the processor's order.
    condition.wrapping_sub(1) & 15
}

fn jump(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        b.flags.restore(&mut b.a)?;
        b.link_to(to)?;
    } else {
        go_outside(b, to, site)?;
    }
    Ok(Done::Ends)
}

/// Carries out a direct branch to an offset outside the page.
fn go_outside(b: &mut Block, to: i64, site: Site) -> Result<(), IcedError> {
    let Some(displacement) = displacement(b, to) else {
        let hole = b.a.jmp();
        b.leave_from(&[hole], site);
        return Ok(());
    };
    b.flags.release(&mut b.a)?;
    let exit = b.leave_from(&[], site);
    cross(b, displacement, b.word, exit)
}

/// Goes on at an offset, in the page or behind it, to which no branch leads.
pub(crate) fn go_on(b: &mut Block, offset: i64) -> Result<(), IcedError> {
    if in_page(offset) {
        b.flags.restore(&mut b.a)?;
        return b.link_to(offset);
    }
    b.flags.release(&mut b.a)?;
    let exit = b.exits.add(Wish::Request, offset, b.flags.clone());
    // Behind the last byte of 4 GiB there is no wrap: that RIP is beyond every limit.
    cross(b, offset, Word::Quad, exit)
}

/// Goes to an offset in another page. The flags are released; `exit` is taken if nothing is known there.
/// `word`: the size of the sum.
fn cross(b: &mut Block, to: i64, word: Word, exit: usize) -> Result<(), IcedError> {
    let guard = guard(b, What::Jump(to, word, exit))?;
    change_page(&mut b.a, to)?;
    b.flags.restore(&mut b.a)?;
    jump_across(b, guard, to, exit);
    Ok(())
}

/// Asks whether the branch is linked for the current view, and puts off what is to be done if not.
/// Returns the position of the view's number.
fn guard(b: &mut Block, what: What) -> Result<usize, IcedError> {
    b.a.emit(Code::Cmp_rm32_imm32, slot(Slot::View), 0u32)?;
    let guard = b.a.here() - 4;
    let hole = b.a.jne();
    let flags = b.flags.clone();
    b.late.push(Late { hole, flags, what });
    Ok(guard)
}

/// The jump to another page that is linked for one view, and at first for none.
fn jump_across(b: &mut Block, guard: usize, offset: i64, exit: usize) {
    let hole = b.a.jmp().0 as u32;
    let crossing = Crossing {
        guard: guard as u32,
        hole,
        offset: offset as i32,
    };
    b.crossings.push((exit, crossing));
}

/// The page at this offset becomes the current one.
fn change_page(a: &mut Asm, offset: i64) -> Result<(), IcedError> {
    relative(a, Word::Quad, offset & !0xfff)?;
    a.store(slot(Slot::Page), SCRATCH)
}

/// Puts the RIP at an offset from the page into R15.
pub(crate) fn relative(a: &mut Asm, word: Word, offset: i64) -> Result<(), IcedError> {
    a.load(SCRATCH, slot(Slot::Page))?;
    word.lea(a, SCRATCH, at(SCRATCH, offset))
}

/// Looks the RIP in R15 up in the current view. Destroys the flags; leaves the address of the view's
/// entry in RCX. Returns the branch that is taken if it is another RIP's.
fn look_up(a: &mut Asm) -> Result<Hole, IcedError> {
    static LOOK_UP: Constant = Constant::new(|a| compare_entry(a, slot(Slot::Jumps)));
    a.constant(&LOOK_UP)?;
    Ok(a.jne())
}

/// The same in the table whose address is at `jumps`.
pub(crate) fn look_up_in(a: &mut Asm, jumps: MemoryOperand) -> Result<Hole, IcedError> {
    compare_entry(a, jumps)?;
    Ok(a.jne())
}

fn compare_entry(a: &mut Asm, jumps: MemoryOperand) -> Result<(), IcedError> {
    a.emit(Code::Movzx_r32_rm16, Register::ECX, Register::R15W)?;
    let shift = size_of::<Jump>().trailing_zeros();
    a.emit(Code::Shl_rm32_imm8, Register::ECX, shift)?;
    a.emit(Code::Add_r64_rm64, POINTER, jumps)?;
    let rip = at(POINTER, offset_of!(Jump, rip) as i64);
    a.emit(Code::Cmp_r64_rm64, SCRATCH, rip)
}

/// The entry point, behind a look-up.
pub(crate) fn found() -> MemoryOperand {
    at(POINTER, offset_of!(Jump, code) as i64)
}

/// The page of the RIP in R15 becomes the current one. Destroys the flags.
fn enter_page(a: &mut Asm) -> Result<(), IcedError> {
    static ENTER: Constant = Constant::new(|a| {
        a.emit(Code::And_rm64_imm32, SCRATCH, -4096)?;
        a.store(slot(Slot::Page), SCRATCH)
    });
    a.constant(&ENTER)
}

/// Goes to what [`look_up`] found.
fn jump_to_found(b: &mut Block) -> Result<(), IcedError> {
    enter_page(&mut b.a)?;
    b.flags.restore(&mut b.a)?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, found())?)
}

/// Stores the return address, before the stack pointer is moved. The flags are released afterwards.
fn push_return(b: &mut Block, site: Site) -> Result<(), IcedError> {
    let word = b.word;
    let checked = b.check_stack(GUEST_RSP, -word.bytes(), Use::Write, site)?;
    let to = b.operand(&checked, word == Word::Double)?;
    relative(&mut b.a, word, site.next)?;
    b.access(&checked);
    word.store(&mut b.a, to, SCRATCH)
}

/// Puts the flags into the host's, then moves the stack pointer.
fn move_stack(b: &mut Block, by: i64) -> Result<(), IcedError> {
    b.flags.restore(&mut b.a)?;
    b.flags = Flags::Host(None);
    b.word.lea(&mut b.a, GUEST_RSP, at(GUEST_RSP, by))
}

fn call(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let to = target(insn, site);
    if in_page(to) {
        push_return(b, site)?;
        move_stack(b, -b.word.bytes())?;
        b.link_to(to)?;
        return Ok(Done::Ends);
    }
    let Some(displacement) = displacement(b, to) else {
        return Ok(Done::Unsupported);
    };
    b.flags.release(&mut b.a)?;
    let exit = b.leave_from(&[], site);
    let guard = guard(b, What::Call(displacement, exit, site))?;
    push_return(b, site)?;
    b.flags.release(&mut b.a)?;
    change_page(&mut b.a, displacement)?;
    move_stack(b, -b.word.bytes())?;
    jump_across(b, guard, displacement, exit);
    Ok(Done::Ends)
}

/// Carries out a call to what [`look_up`] found. What can go wrong with the target comes before the push.
fn call_found(b: &mut Block, site: Site) -> Result<Done, IcedError> {
    b.a.load(POINTER, found())?;
    b.a.store(slot(Slot::Entry), POINTER)?;
    b.a.store(slot(Slot::Target), SCRATCH)?;
    push_return(b, site)?;
    b.flags.release(&mut b.a)?;
    b.a.load(SCRATCH, slot(Slot::Target))?;
    enter_page(&mut b.a)?;
    move_stack(b, -b.word.bytes())?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, slot(Slot::Entry))?)?;
    Ok(Done::Ends)
}

/// Puts the target of an indirect branch into R15; the flags are released. False if it cannot.
fn load_target(b: &mut Block, insn: &Insn, site: Site) -> Result<bool, IcedError> {
    let raw = &insn.raw;
    if raw.op0_kind() == OpKind::Register {
        b.flags.release(&mut b.a)?;
        match home(raw.op0_register().number()) {
            Home::Host(r) => b.word.mov(&mut b.a, SCRATCH, r)?,
            Home::Spilled(s) => b.a.load(SCRATCH, slot(s))?,
        }
        return Ok(true);
    }
    let Some(address) = Address::of(insn, site.next).filter(Address::is_plain) else {
        return Ok(false);
    };
    let word = b.word;
    let checked = b.check(&address, word.bytes() as usize, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    word.load(&mut b.a, SCRATCH, from)?;
    b.flags.release(&mut b.a)?;
    Ok(true)
}

fn jump_indirect(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if !load_target(b, insn, site)? {
        return Ok(Done::Unsupported);
    }
    let miss = look_up(&mut b.a)?;
    b.leave_from(&[miss], site);
    jump_to_found(b)?;
    Ok(Done::Ends)
}

fn call_indirect(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    if !load_target(b, insn, site)? {
        return Ok(Done::Unsupported);
    }
    let miss = look_up(&mut b.a)?;
    b.leave_from(&[miss], site);
    call_found(b, site)
}

fn ret(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let drop = if insn.raw.op_count() == 1 {
        i64::from(insn.raw.immediate16())
    } else {
        0
    };
    let word = b.word;
    let checked = b.check_stack(GUEST_RSP, 0, Use::Read, site)?;
    let from = b.operand(&checked, false)?;
    b.access(&checked);
    word.load(&mut b.a, SCRATCH, from)?;
    b.flags.release(&mut b.a)?;
    let miss = look_up(&mut b.a)?;
    b.leave_from(&[miss], site);
    enter_page(&mut b.a)?;
    move_stack(b, word.bytes() + drop)?;
    b.a.put(&Instruction::with1(Code::Jmp_rm64, found())?)?;
    Ok(Done::Ends)
}
