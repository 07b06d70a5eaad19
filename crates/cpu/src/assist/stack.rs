//! x87 instructions by what they do to the register stack: those for which it is enough to load the
//! few registers they use onto the host's (empty) stack and store what is there afterwards, where
//! loading and storing the whole state would cost several times as much.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// Most registers such an instruction leaves on the host's stack.
pub const MAX_STORES: usize = 5;
/// Most it needs there before.
const MAX_LOADS: u8 = MAX_STORES as u8 - 1;

/// What one instruction does to the stack (FCOMI and its kin are not among them: what they do to C1
/// differs between processors), provided that the registers it uses hold values, there is
/// room for what it pushes, and every exception is masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackUse {
    /// It uses ST0 and those below it, so many in all.
    pub loads: u8,
    /// It pushes one.
    pub pushes: bool,
    /// It pops so many.
    pub pops: u8,
    /// It defines all four condition codes; others only C1.
    pub compares: bool,
}

impl StackUse {
    /// Of an instruction of which this much is known.
    pub fn of(raw: &Instruction) -> Option<Self> {
        let compares = match raw.mnemonic() {
            M::Fcom | M::Fcomp | M::Fcompp | M::Fucom | M::Fucomp | M::Fucompp => true,
            M::Ficom | M::Ficomp | M::Ftst => true,
            M::Fld | M::Fild | M::Fld1 | M::Fldz | M::Fldpi => false,
            M::Fldl2e | M::Fldl2t | M::Fldlg2 | M::Fldln2 => false,
            M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp => false,
            M::Fadd | M::Faddp | M::Fiadd | M::Fmul | M::Fmulp | M::Fimul => false,
            M::Fsub | M::Fsubp | M::Fsubr | M::Fsubrp | M::Fisub | M::Fisubr => false,
            M::Fdiv | M::Fdivp | M::Fdivr | M::Fdivrp | M::Fidiv | M::Fidivr => false,
            M::Fxch | M::Fchs | M::Fabs | M::Fsqrt | M::Frndint => false,
            _ => return None,
        };
        // The result of FADDP ST0, ST0 and the like would be in a register that is popped.
        let popped = raw.op_count() == 2 && raw.op0_register() == Register::ST0;
        let increment = raw.fpu_stack_increment_info().increment();
        let pushes = increment < 0;
        // A load or constant uses no register but those it names; everything else uses ST0.
        let implicit = u8::from(!pushes);
        let named = (0..raw.op_count())
            .filter(|i| raw.op_kind(*i) == OpKind::Register && raw.op_register(*i).is_st())
            .filter(|i| !(pushes && *i == 0 && raw.op_count() == 2))
            .map(|i| raw.op_register(i).number() as u8 + 1)
            .fold(implicit, u8::max);
        let two = matches!(raw.mnemonic(), M::Fcompp | M::Fucompp);
        let loads = if two { named.max(2) } else { named };
        let pops = u8::try_from(increment.max(0)).ok()?;
        let kept = pops == 0 || !popped;
        (kept && loads <= MAX_LOADS && pops <= loads).then_some(Self {
            loads,
            pushes,
            pops,
            compares,
        })
    }

    /// Registers on the host's stack afterwards.
    pub fn stores(&self) -> u8 {
        self.loads + u8::from(self.pushes) - self.pops
    }
}
