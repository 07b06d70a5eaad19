//! The guest's status flags inside a block.
//!
//! They live in the host's flags, and are exact at every instruction boundary. A memory check
//! destroys them, so before one it must be known how to get them back: most often by carrying out
//! the last flag-setting instruction again (its *recipe*), which costs nothing unless somebody asks.
//! Without a recipe they are kept by LAHF and SETO.
//!
//! A recipe is handed over at a link, too: the target is translated once more for those who come with
//! that recipe ([`crate::table::Table::better_place`]), so a loop need not keep the flags of the branch
//! that closes it.

use iced_x86::{Code, IcedError, Instruction, Mnemonic, OpKind, Register};

use crate::asm::{Asm, Constant, slot};
use crate::regs::{SCRATCH, bit, sized};
use crate::shared::Slot;

/// Instructions that leave the flags as they are, and change nothing but the scratch register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    steps: Vec<Instruction>,
    /// Host registers whose values it needs.
    reads: u16,
}

impl Recipe {
    /// The recipe that takes the only register it loses, which is returned, too, from [`Slot::Operand`];
    /// `None` if there is no such recipe.
    fn without(&self, written: u16) -> Option<(Register, Self)> {
        let lost = self.reads & written;
        let operand = slot(Slot::Operand);
        let taken = |i: &Instruction| {
            i.op_kinds().any(|k| k == OpKind::Memory)
                || operands(i).any(|(_, r)| crate::regs::is_high_byte(r))
        };
        if lost.count_ones() != 1 || self.steps.iter().any(taken) {
            return None;
        }
        let lost = Register::RAX + lost.trailing_zeros();
        let is = |r: Register| r.full_register() == lost;
        let load = Instruction::with2(Code::Mov_r64_rm64, SCRATCH, operand).ok()?;
        let mut steps = vec![load];
        let (first, rest) = self.steps.split_first()?;
        if first.mnemonic() == Mnemonic::Mov && is(first.op1_register()) {
            // The scratch register is given the value already.
            steps.extend_from_slice(rest);
        } else {
            steps.extend_from_slice(&self.steps);
        }
        let scratch_used = self.steps.len() > 1;
        for step in &mut steps[1..] {
            let places: Vec<_> = operands(step).filter(|(_, r)| is(*r)).collect();
            if scratch_used && !places.is_empty() {
                return None;
            }
            for (i, r) in places {
                step.set_op_register(i, sized(SCRATCH, r));
                step.set_code(general(step.code()));
            }
        }
        let reads = self.reads & written ^ self.reads;
        Some((lost, Self { steps, reads }))
    }
}

/// The register operands of an instruction, with their indices.
fn operands(i: &Instruction) -> impl Iterator<Item = (u32, Register)> {
    (0..i.op_count())
        .filter(|n| i.op_kind(*n) == OpKind::Register)
        .map(|n| (n, i.op_register(n)))
}

/// Where the flags are.
#[derive(Clone, Debug)]
pub enum Flags {
    /// In the host's flags; and, if known, how to make them again.
    Host(Option<Recipe>),
    /// Nowhere, but the recipe makes them.
    Recipe(Recipe),
    /// In [`Slot::KeptFlags`].
    Kept,
}

impl Flags {
    /// Makes sure that destroying the host's flags loses nothing.
    pub fn release(&mut self, a: &mut Asm) -> Result<(), IcedError> {
        static KEEP: Constant = Constant::new(keep);
        self.release_with(a, &KEEP)
    }

    /// The same where R15 is free.
    pub fn release_by_scratch(&mut self, a: &mut Asm) -> Result<(), IcedError> {
        static KEEP: Constant = Constant::new(keep_by_scratch);
        self.release_with(a, &KEEP)
    }

    fn release_with(&mut self, a: &mut Asm, keep: &Constant) -> Result<(), IcedError> {
        if let Self::Host(recipe) = self {
            *self = match recipe.take() {
                Some(r) => Self::Recipe(r),
                None => {
                    a.constant(keep)?;
                    a.keeps_flags = true;
                    Self::Kept
                }
            };
        }
        Ok(())
    }

    /// How the flags can be made again, if they are in the host's.
    pub fn recipe(&self) -> Option<&Recipe> {
        match self {
            Self::Host(recipe) => recipe.as_ref(),
            Self::Recipe(_) | Self::Kept => None,
        }
    }

    /// Emits what puts the flags into the host's flags.
    pub fn emit_restore(&self, a: &mut Asm) -> Result<(), IcedError> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Recipe(r) => r.steps.iter().try_for_each(|step| a.put(step)),
            Self::Kept => {
                static RESTORE: Constant = Constant::new(restore);
                a.constant(&RESTORE)
            }
        }
    }

    /// Puts the flags into the host's flags.
    pub fn restore(&mut self, a: &mut Asm) -> Result<(), IcedError> {
        self.emit_restore(a)?;
        *self = match std::mem::replace(self, Self::Kept) {
            Self::Host(r) => Self::Host(r),
            Self::Recipe(r) => Self::Host(Some(r)),
            Self::Kept => Self::Host(None),
        };
        Ok(())
    }

    /// These host registers are about to be written by something that leaves the flags alone. A register
    /// that a recipe needs is put aside into [`Slot::Operand`]; it is returned, because whoever goes on
    /// behind the write must have done the same. `eager`: that is worth it even while the flags are in the
    /// host's.
    pub fn before_write(
        &mut self,
        a: &mut Asm,
        written: u16,
        eager: bool,
    ) -> Result<Option<Register>, IcedError> {
        let (Self::Recipe(recipe) | Self::Host(Some(recipe))) = &*self else {
            return Ok(None);
        };
        if recipe.reads & written == 0 {
            return Ok(None);
        }
        let in_host = matches!(self, Self::Host(_));
        let without = recipe.without(written).filter(|_| eager || !in_host);
        let Some((lost, without)) = without else {
            self.restore(a)?;
            *self = Self::Host(None);
            return Ok(None);
        };
        a.store(slot(Slot::Operand), lost)?;
        *self = if in_host {
            Self::Host(Some(without))
        } else {
            Self::Recipe(without)
        };
        Ok(Some(lost))
    }
}

/// Saves the host's flags.
fn keep(a: &mut Asm) -> Result<(), IcedError> {
    a.store(slot(Slot::Rax), Register::RAX)?;
    a.put(&Instruction::with(Code::Lahf))?;
    a.put(&Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
    a.store(slot(Slot::KeptFlags), Register::RAX)?;
    a.load(Register::RAX, slot(Slot::Rax))
}

/// The same, quicker: RAX does not go through memory.
fn keep_by_scratch(a: &mut Asm) -> Result<(), IcedError> {
    a.mov(SCRATCH, Register::RAX)?;
    a.put(&Instruction::with(Code::Lahf))?;
    a.put(&Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
    a.store(slot(Slot::KeptFlags), Register::RAX)?;
    a.mov(Register::RAX, SCRATCH)
}

/// Puts the flags in [`Slot::KeptFlags`] into the host's.
pub fn restore(a: &mut Asm) -> Result<(), IcedError> {
    a.store(slot(Slot::Rax), Register::RAX)?;
    a.load(Register::RAX, slot(Slot::KeptFlags))?;
    load_flags(a)?;
    a.load(Register::RAX, slot(Slot::Rax))
}

/// Sets the host's status flags from AX as `keep` makes it. Destroys AL.
pub fn load_flags(a: &mut Asm) -> Result<(), IcedError> {
    a.emit(Code::Add_AL_imm8, Register::AL, 0x7fu32)?;
    a.put(&Instruction::with(Code::Sahf))
}

/// The recipe for the flags that `insn`, a host instruction without memory operand or one whose
/// result alone decides them, has left. `None` if there is none.
///
/// `kept`: operand 0 as it was before is in [`Slot::Operand`].
pub fn recipe(insn: &Instruction, kept: bool) -> Option<Recipe> {
    use Mnemonic as M;
    let register = |i| (insn.op_kind(i) == OpKind::Register).then(|| insn.op_register(i));
    let memory = insn.op_kinds().any(|k| k == OpKind::Memory);
    let dst = register(0);
    let m = insn.mnemonic();
    let done = |steps: Vec<Instruction>, reads: u16| {
        // Scratch registers do not keep what they hold.
        let scratch = bit(Register::RCX) | bit(SCRATCH);
        (reads & scratch == 0).then_some(Recipe { steps, reads })
    };
    let reads = |i| register(i).map_or(0, bit);
    match m {
        M::Cmp | M::Test if !memory => done(vec![*insn], reads(0) | reads(1)),
        // The result decides.
        M::And | M::Or | M::Xor => {
            let d = dst?;
            done(vec![test(d)?], bit(d))
        }
        M::Add | M::Sub | M::Neg if !memory => {
            let d = dst?;
            if crate::regs::is_high_byte(d) {
                return None;
            }
            let s = sized(SCRATCH, d);
            let again = with_op0(insn, s);
            if m == M::Neg {
                return done(vec![mov(s, d)?, again, again], bit(d));
            }
            let source = reads(1);
            if source & bit(d) != 0 {
                return None;
            }
            let mut back = again;
            back.set_code(opposite(insn.code())?);
            done(vec![mov(s, d)?, back, again], bit(d) | source)
        }
        _ if kept && !memory => {
            let d = dst?;
            if reads(1) & bit(d) != 0 || crate::regs::is_high_byte(d) {
                return None;
            }
            let load = Instruction::with2(Code::Mov_r64_rm64, SCRATCH, slot(Slot::Operand)).ok()?;
            let again = with_op0(insn, sized(SCRATCH, d));
            done(vec![load, again], reads(1))
        }
        _ => None,
    }
}

/// Whether [`recipe`] can use the operand as it was before.
pub fn wants_operand(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let immediate = insn.op_count() == 2 && insn.op_kind(1) == OpKind::Immediate8;
    insn.op0_kind() == OpKind::Register
        && match insn.mnemonic() {
            M::Shl | M::Shr | M::Sar => immediate && insn.immediate8() & 31 != 0,
            _ => false,
        }
}

fn with_op0(insn: &Instruction, r: Register) -> Instruction {
    let mut i = *insn;
    i.set_op0_register(r);
    // Short forms name the accumulator.
    i.set_code(general(i.code()));
    i
}

/// The form with a ModRM byte of one that implies the accumulator.
pub fn general(code: Code) -> Code {
    use Code as C;
    match code {
        C::Add_AL_imm8 => C::Add_rm8_imm8,
        C::Add_AX_imm16 => C::Add_rm16_imm16,
        C::Add_EAX_imm32 => C::Add_rm32_imm32,
        C::Add_RAX_imm32 => C::Add_rm64_imm32,
        C::Cmp_AL_imm8 => C::Cmp_rm8_imm8,
        C::Cmp_AX_imm16 => C::Cmp_rm16_imm16,
        C::Cmp_EAX_imm32 => C::Cmp_rm32_imm32,
        C::Cmp_RAX_imm32 => C::Cmp_rm64_imm32,
        C::Test_AL_imm8 => C::Test_rm8_imm8,
        C::Test_AX_imm16 => C::Test_rm16_imm16,
        C::Test_EAX_imm32 => C::Test_rm32_imm32,
        C::Test_RAX_imm32 => C::Test_rm64_imm32,
        C::Sub_AL_imm8 => C::Sub_rm8_imm8,
        C::Sub_AX_imm16 => C::Sub_rm16_imm16,
        C::Sub_EAX_imm32 => C::Sub_rm32_imm32,
        C::Sub_RAX_imm32 => C::Sub_rm64_imm32,
        c => c,
    }
}

/// SUB for ADD and the other way round, with the same operands.
fn opposite(code: Code) -> Option<Code> {
    use Code as C;
    Some(match general(code) {
        C::Add_rm8_r8 => C::Sub_rm8_r8,
        C::Add_rm16_r16 => C::Sub_rm16_r16,
        C::Add_rm32_r32 => C::Sub_rm32_r32,
        C::Add_rm64_r64 => C::Sub_rm64_r64,
        C::Add_r8_rm8 => C::Sub_r8_rm8,
        C::Add_r16_rm16 => C::Sub_r16_rm16,
        C::Add_r32_rm32 => C::Sub_r32_rm32,
        C::Add_r64_rm64 => C::Sub_r64_rm64,
        C::Add_rm8_imm8 => C::Sub_rm8_imm8,
        C::Add_rm16_imm16 => C::Sub_rm16_imm16,
        C::Add_rm32_imm32 => C::Sub_rm32_imm32,
        C::Add_rm64_imm32 => C::Sub_rm64_imm32,
        C::Add_rm16_imm8 => C::Sub_rm16_imm8,
        C::Add_rm32_imm8 => C::Sub_rm32_imm8,
        C::Add_rm64_imm8 => C::Sub_rm64_imm8,
        C::Sub_rm8_r8 => C::Add_rm8_r8,
        C::Sub_rm16_r16 => C::Add_rm16_r16,
        C::Sub_rm32_r32 => C::Add_rm32_r32,
        C::Sub_rm64_r64 => C::Add_rm64_r64,
        C::Sub_r8_rm8 => C::Add_r8_rm8,
        C::Sub_r16_rm16 => C::Add_r16_rm16,
        C::Sub_r32_rm32 => C::Add_r32_rm32,
        C::Sub_r64_rm64 => C::Add_r64_rm64,
        C::Sub_rm8_imm8 => C::Add_rm8_imm8,
        C::Sub_rm16_imm16 => C::Add_rm16_imm16,
        C::Sub_rm32_imm32 => C::Add_rm32_imm32,
        C::Sub_rm64_imm32 => C::Add_rm64_imm32,
        C::Sub_rm16_imm8 => C::Add_rm16_imm8,
        C::Sub_rm32_imm8 => C::Add_rm32_imm8,
        C::Sub_rm64_imm8 => C::Add_rm64_imm8,
        _ => return None,
    })
}

fn mov(to: Register, from: Register) -> Option<Instruction> {
    let code = match to.size() {
        8 => Code::Mov_r64_rm64,
        4 => Code::Mov_r32_rm32,
        2 => Code::Mov_r16_rm16,
        _ => Code::Mov_r8_rm8,
    };
    Instruction::with2(code, to, from).ok()
}

fn test(r: Register) -> Option<Instruction> {
    let code = match r.size() {
        8 => Code::Test_rm64_r64,
        4 => Code::Test_rm32_r32,
        2 => Code::Test_rm16_r16,
        _ => Code::Test_rm8_r8,
    };
    Instruction::with2(code, r, r).ok()
}
