//! Translated code and the interpreter side by side.
//!
//! A *stretch* is what translated code executes between being entered and being left: linked translations,
//! loops, string instructions, whatever it would execute otherwise, up to a limit. When it has been left, what
//! it did is undone, the interpreter executes as many instructions from the same state on, and both results
//! must be the same: the whole state of the processor, and every byte of the pages that can have been written
//! ([`anykvm_cpu::lockstep`]). Then the guest goes on with it. What translated code leaves to the
//! interpreter ends a stretch, so devices, system instructions, faults and stores into code happen once. Of the
//! time-stamp counter and of random numbers each would read its own; they are left to the interpreter, too.
//!
//! Other processors of the guest wait meanwhile ([`anykvm_cpu::turns`]). The VMM's device threads do not: what
//! they write between the two looks like a difference. So a difference counts when it comes again and
//! again. If it does not, what somebody else has written meanwhile is put where it belongs.
//!
//! A difference that stays ends KVM_RUN with an internal error. [`report`] says where it is.

mod copies;
mod difference;
mod report;

#[cfg(test)]
mod tests;

use anykvm_cpu::exit::InternalError;
use anykvm_cpu::lockstep::{Step, Unlike};
use anykvm_cpu::state::reg;
use anykvm_cpu::{Cpu, CpuState, Exit, Insn};
use iced_x86::{FlowControl, Instruction, Mnemonic};

use crate::Jit;
use crate::exits::Wish;
use crate::sharing::GROUPS;
use crate::translate;
use crate::vectors::Level;
use crate::{control, system};
use copies::Copies;
use difference::Undefined;

/// Instructions after which a stretch ends where translated code looks whether it is wanted elsewhere.
const LIMIT: u64 = 1000;
/// So many differences that did not come again are shown.
const TOLD: u64 = 10;
/// Times round the loop of one turn, at least, where others wait for theirs.
const SHORTEST_TURN: u32 = 64;
/// How often a difference must come.
const ATTEMPTS: u32 = 3;

/// What there is for it, one a processor.
#[derive(Default)]
pub(crate) struct Lockstep {
    copies: Copies,
    /// Pieces of memory that somebody else may have written: host page, offset, byte.
    foreign: Vec<copies::Foreign>,
    turn: TurnLength,
}

/// How long turns are. No two are alike: a loop that takes a lock and gives it back may go round in a number of
/// blocks that divides a fixed length, and then every turn would end while it has the lock.
#[derive(Default)]
struct TurnLength {
    /// Times round the loop that are left of this turn.
    left: u32,
    random: u64,
}

impl TurnLength {
    /// Counts one time round the loop: whether the turn is over.
    fn is_over(&mut self) -> bool {
        if self.left > 0 {
            self.left -= 1;
            return false;
        }
        // Knuth's MMIX; the upper bits are the good ones.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.left = SHORTEST_TURN + (self.random >> 57) as u32;
        true
    }
}

/// Where translated code is entered.
#[derive(Clone, Copy)]
pub(crate) struct Start {
    pub entry: u64,
    /// The vector registers that are loaded there.
    pub level: Level,
    /// Instructions from here on that were counted before.
    pub counted: u64,
}

/// What code that is resumed finds in [`crate::shared::Shared`].
struct Kept {
    page: u64,
    flags: u64,
    operand: u64,
    addends: [u64; GROUPS],
}

/// One time through a stretch.
struct Run {
    /// Instructions executed.
    done: u64,
    /// What [`crate::shared::Shared`] had counted.
    counted: u64,
    /// What is different then.
    difference: Option<String>,
}

/// Whether an instruction gives another result each time: in lockstep it is left to the interpreter.
pub(crate) fn varies(raw: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(raw.mnemonic(), M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed)
}

/// Whether an instruction may be executed by translated code.
fn may_be_translated(insn: &Insn) -> bool {
    let raw = &insn.raw;
    if varies(raw) {
        return false;
    }
    match raw.flow_control() {
        FlowControl::Next => {
            !raw.is_privileged()
                || system::executes(raw.code())
                || control::executes_privileged(raw)
        }
        FlowControl::ConditionalBranch => true,
        FlowControl::UnconditionalBranch => raw.is_jmp_short_or_near(),
        FlowControl::IndirectBranch => raw.is_jmp_near_indirect(),
        FlowControl::Call => raw.is_call_near() || system::executes(raw.code()),
        FlowControl::IndirectCall => raw.is_call_near_indirect(),
        FlowControl::Return => raw.mnemonic() == Mnemonic::Ret || system::executes(raw.code()),
        _ => false,
    }
}

impl Kept {
    fn of(jit: &Jit) -> Self {
        let s = &jit.shared;
        Self {
            page: s.page,
            flags: s.kept_flags,
            operand: s.operand,
            addends: s.kept,
        }
    }
    fn put_back(&self, jit: &mut Jit) {
        let s = &mut jit.shared;
        (s.page, s.kept_flags, s.operand, s.kept) =
            (self.page, self.flags, self.operand, self.addends);
    }
}

impl Lockstep {
    /// Called each time round the loop: whether another processor may have its turn.
    pub fn turn_is_over(&mut self) -> bool {
        self.turn.is_over()
    }

    /// Runs translated code as [`Jit::enter`] does, and compares. False if it must not be entered.
    pub fn enter(&mut self, jit: &mut Jit, cpu: &mut Cpu, start: Start) -> Result<bool, Exit> {
        let kept = Kept::of(jit);
        self.foreign.clear();
        for attempt in 1.. {
            let Some(run) = self.run(jit, cpu, start, LIMIT) else {
                return Ok(false);
            };
            let Some(what) = run.difference else {
                jit.shared.instructions = run.counted;
                jit.stats.compared += run.done;
                if attempt > 1 {
                    jit.stats.disturbed += 1;
                    self.copies.put_foreign(cpu, &self.foreign);
                }
                return Ok(true);
            };
            if attempt == 1 && jit.stats.disturbed < TOLD {
                let rip = self.copies.state().rip();
                eprintln!("anykvm: lockstep: a difference, behind {rip:#x}; once more:\n{what}");
            }
            // The state before, and whatever runs now begins there again.
            self.copies.note_foreign(&mut self.foreign);
            cpu.put_state(self.copies.state().clone());
            self.copies.undo(cpu);
            kept.put_back(jit);
            if attempt == ATTEMPTS {
                let rip = report::write(self, jit, cpu, start, &kept, &what);
                return Err(Exit::InternalError(InternalError::Lockstep { rip }));
            }
        }
        Ok(false)
    }

    /// Once through: translated code, back, the interpreter. `None` if translated code must not be entered.
    fn run(&mut self, jit: &mut Jit, cpu: &mut Cpu, start: Start, limit: u64) -> Option<Run> {
        self.copies.take(cpu);
        // The upper half of the counter is what translated code looks at: it becomes zero at the limit.
        let first = limit.wrapping_neg();
        jit.shared.instructions = first;
        if !jit.enter(cpu, start.entry, start.level) {
            jit.shared.instructions = 0;
            return None;
        }
        let counted = jit.shared.instructions.wrapping_sub(first);
        let rest = jit.not_executed();
        let done = start.counted.wrapping_add(counted).wrapping_sub(rest);
        self.copies.take_results();
        let translated = cpu.state.clone();
        cpu.put_state(self.copies.state().clone());
        self.copies.undo_translated(cpu);
        let interpreted = interpret(cpu, &translated, done, &mut |_| {});
        let mut difference = self.compare(cpu, &translated, interpreted);
        if difference.is_some() && difference::is_of_flags(&cpu.state, &translated) {
            // Which of them are undefined takes a look at each instruction.
            let mut undefined = Undefined::default();
            cpu.put_state(self.copies.state().clone());
            self.copies.undo(cpu);
            let again = interpret(cpu, &translated, done, &mut |step| undefined.see(step.insn));
            cpu.state.rflags ^= (cpu.state.rflags ^ translated.rflags) & undefined.0;
            difference = self.compare(cpu, &translated, again);
        }
        if difference.is_none() {
            cpu.put_state(translated);
        }
        Some(Run {
            done,
            counted,
            difference,
        })
    }

    fn compare(
        &mut self,
        cpu: &Cpu,
        translated: &CpuState,
        interpreted: Result<(), (u64, Unlike)>,
    ) -> Option<String> {
        let mut text = match interpreted {
            Ok(()) => String::new(),
            Err((done, why)) => difference::unlike(done, why),
        };
        if cpu.state != *translated {
            text.push_str(&difference::of_states(&cpu.state, translated));
        }
        text.push_str(&self.copies.difference(cpu));
        (!text.is_empty()).then_some(text)
    }
}

/// Executes `count` instructions, and as much of a string instruction behind them as translated code has.
fn interpret(
    cpu: &mut Cpu,
    translated: &CpuState,
    count: u64,
    see: &mut dyn FnMut(Step),
) -> Result<(), (u64, Unlike)> {
    cpu.interpret_again(count, may_be_translated, see)?;
    let left = translated.regs[reg::RCX];
    let stands = cpu.state.rip() == translated.rip();
    if stands && left != cpu.state.regs[reg::RCX] {
        // If it is none, or does not get there, the registers will tell.
        cpu.interpret_elements_again(left, see);
    }
    Ok(())
}

impl Jit {
    /// How many instructions were counted by the code that has just been left, but are not executed.
    pub(crate) fn not_executed(&self) -> u64 {
        let Some(taken) = self.table.taken(self.shared.exit as u32) else {
            return 0;
        };
        match taken.wish {
            Wish::Interpret { insn, .. } => {
                let rest = taken.insns.get(usize::from(insn)..);
                translate::run_length(rest.unwrap_or_default()) as u64
            }
            _ => 0,
        }
    }
}
