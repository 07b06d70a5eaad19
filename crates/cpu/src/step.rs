//! Instructions executed alone: with TF, RF, breakpoints, an interrupt shadow, branch recording, guest
//! debugging or a trace in force (SDM Vol. 3, 18.3; RF: 18.3.1.1).

use iced_x86::{FlowControl, Mnemonic};

use crate::cpu::Cpu;
use crate::debug::{self, DEBUGCTL_BTF, DEBUGCTL_LBR, DR6_BS, DR6_FIXED, Watch};
use crate::decode::Insn;
use crate::events::{SHADOW_MOV_SS, vector};
use crate::exec::Step;
use crate::exit::{Exit, Fault, Stop};
use crate::state::{rflags, seg};

/// What an instruction takes from the one before it, and must find again if it is to run once more.
struct Before {
    rip: u64,
    tf: bool,
    rf: u64,
    hits: u64,
}

impl Cpu {
    /// Whether the next instruction must be executed alone, with all the checks of [`Cpu::step`].
    pub(crate) fn must_step(&self) -> bool {
        self.state.rflags & (rflags::TF | rflags::RF) != 0
            || self.state.events.shadow != 0
            || self.breakpoints_armed()
            || self.guest_debug.single_step
            || self.state.msr.debugctl & DEBUGCTL_LBR != 0
            || self.trace.as_ref().is_some_and(|t| t.wants_instructions())
    }

    /// Executes one instruction with instruction breakpoints, single-step, shadow and trace.
    pub(crate) fn step(&mut self) -> Step {
        let rip = self.state.rip();
        let bits = self.instruction_breakpoints(rip);
        if bits != 0 {
            return self.debug_exception(bits, false);
        }
        // The block's first instruction, if there is one, saves decoding again.
        let found = self.block_at(rip);
        if let Err(Stop::Exit) = found {
            return self.instruction_stopped(Stop::Exit, None, rip);
        }
        if let Ok(Some(id)) = found
            && let Some(block) = self.blocks.get(id)
        {
            let insns = std::mem::take(&mut block.insns);
            let result = insns
                .first()
                .map_or(Ok(()), |insn| self.step_instruction(insn, rip));
            if let Some(block) = self.blocks.get(id) {
                block.insns = insns;
            }
            return result;
        }
        match self.fetch() {
            Ok(insn) => self.step_instruction(&insn, rip),
            Err(stop) => self.instruction_stopped(stop, None, rip),
        }
    }

    /// The instruction breakpoints at RIP that RF or a MOV SS before it do not suppress. They come
    /// before the faults of the fetch (SDM Vol. 3, table 6-2).
    fn instruction_breakpoints(&self, rip: u64) -> u64 {
        let suppressed = self.state.rflags & rflags::RF != 0
            || self.state.events.shadow & SHADOW_MOV_SS != 0
            || !self.breakpoints_armed();
        if suppressed {
            return 0;
        }
        let linear = if self.mode.code64() {
            rip
        } else {
            let base = self.state.seg[usize::from(seg::CS)].base;
            base.wrapping_add(rip) & 0xffff_ffff
        };
        let (db, dr7) = self.breakpoints();
        debug::hits(db, dr7, Watch::Execute, linear, 1)
    }

    fn step_instruction(&mut self, insn: &Insn, rip: u64) -> Step {
        if let Some(mut trace) = self.trace.take_if(|t| t.wants_instructions()) {
            let keep = trace.instruction(self, insn);
            self.trace = keep.then_some(trace);
        }
        self.execute_one(insn, rip)
    }

    /// Executes an instruction by itself, with what follows it: RF, shadow, debug traps.
    pub(crate) fn execute_one(&mut self, insn: &Insn, rip: u64) -> Step {
        let before = Before {
            rip,
            tf: self.state.rflags & rflags::TF != 0,
            rf: self.state.rflags & rflags::RF,
            hits: self.debug_hits,
        };
        let debugger_step = self.guest_debug.single_step;
        self.state.rflags &= !rflags::RF;
        self.prior_shadow = std::mem::take(&mut self.state.events.shadow);
        self.stepping = before.tf || debugger_step || self.breakpoints_armed();
        self.state.set_rip(rip.wrapping_add(insn.len.into()));
        let done = (insn.handler)(self, insn);
        let prior = std::mem::take(&mut self.prior_shadow);
        self.stepping = false;
        if prior != 0 {
            self.check_events = true;
        }
        if let Err(stop) = done {
            return self.stopped_alone(stop, insn, &before, prior);
        }
        self.end_replay();
        self.last_len = insn.len;
        self.counters.instructions += 1;
        let writes = self.io.has_writes();
        if writes {
            self.note_writes_retired();
        }
        let bits = self.traps_behind(insn, &before);
        if debugger_step {
            if writes {
                // The store's exit comes first; the step is reported on re-entry by its own step.
                return self.after_writes();
            }
            return Err(self.step_exit(bits));
        }
        if bits != 0 {
            self.debug_exception(bits, true)?;
        }
        if writes { self.after_writes() } else { Ok(()) }
    }

    /// The instruction did not complete. A fault drops the traps that waited behind a MOV SS; an exit
    /// leaves everything for the instruction's next attempt.
    fn stopped_alone(&mut self, stop: Stop, insn: &Insn, before: &Before, shadow: u8) -> Step {
        if stop == Stop::Fault {
            self.debug_hits = 0;
        } else {
            self.debug_hits = before.hits;
            self.state.rflags |= before.rf;
        }
        if stop == Stop::Exit {
            self.state.events.shadow = shadow;
        }
        self.instruction_stopped(stop, Some(insn), before.rip)
    }

    /// The DR6 bits of the traps behind an instruction that has completed; none yet if they must
    /// wait.
    fn traps_behind(&mut self, insn: &Insn, before: &Before) -> u64 {
        let taken = self.took_branch(insn, before.rip);
        if taken && self.state.msr.debugctl & DEBUGCTL_LBR != 0 {
            self.state.msr.last_branch_from = before.rip;
            self.state.msr.last_branch_to = self.state.rip();
        }
        if self.state.events.shadow & SHADOW_MOV_SS != 0 && !self.guest_debug.single_step {
            // Traps wait for the instruction behind MOV SS (SDM Vol. 3, 6.8.3); a single step is
            // that instruction's own.
            return 0;
        }
        let mut bits = std::mem::take(&mut self.debug_hits);
        if before.tf && self.single_step_traps(insn, taken) {
            bits |= DR6_BS;
        }
        bits
    }

    /// Whether an instruction transferred control. A conditional branch to the next instruction
    /// counts as not taken.
    fn took_branch(&self, insn: &Insn, rip: u64) -> bool {
        let moved = self.state.rip() != rip.wrapping_add(insn.len.into());
        match insn.raw.flow_control() {
            FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Return
            | FlowControl::IndirectCall => true,
            FlowControl::Call => {
                !matches!(insn.raw.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall)
            }
            FlowControl::ConditionalBranch | FlowControl::Interrupt => moved,
            _ => false,
        }
    }

    /// Whether TF, set before an instruction, traps behind it (SDM Vol. 3, 18.3.1.4 and 18.4.3).
    fn single_step_traps(&self, insn: &Insn, taken: bool) -> bool {
        match insn.raw.mnemonic() {
            // TF as IA32_FMASK leaves it counts.
            Mnemonic::Syscall if self.state.rflags & rflags::TF == 0 => return false,
            // TF as it is loaded counts, and the handler has looked at it.
            Mnemonic::Sysret | Mnemonic::Sysretq => return false,
            _ => {}
        }
        // INT n and the like clear TF on their way into the handler, which is not trapped.
        if insn.raw.flow_control() == FlowControl::Interrupt && taken {
            return false;
        }
        taken || self.state.msr.debugctl & DEBUGCTL_BTF == 0
    }

    /// An event's delivery from `from` has succeeded: the last branch before it is kept, and the
    /// delivery is recorded as a branch (IA32_DEBUGCTL.LBR; APM Vol. 2, 13.1.1.4).
    pub(crate) fn record_event(&mut self, from: u64) {
        if self.state.msr.debugctl & DEBUGCTL_LBR == 0 {
            return;
        }
        let to = self.state.rip();
        let msr = &mut self.state.msr;
        (msr.last_int_from, msr.last_int_to) = (msr.last_branch_from, msr.last_branch_to);
        (msr.last_branch_from, msr.last_branch_to) = (from, to);
    }

    /// Makes traps that were noted outside [`Cpu::execute_one`] (by the delivery of an event, a task
    /// switch, SYSRET) a #DB before the next instruction.
    pub(crate) fn raise_noted_traps(&mut self) -> Step {
        let e = &self.state.events.exception;
        let wait = e.pending || e.injected || self.state.events.shadow & SHADOW_MOV_SS != 0;
        if self.debug_hits == 0 || wait {
            return Ok(());
        }
        let bits = std::mem::take(&mut self.debug_hits);
        self.debug_exception(bits, true)
    }

    pub(crate) fn after_writes(&mut self) -> Step {
        self.next_write().map_or(Ok(()), Err)
    }

    /// The exit of a debugger's single step, with the DR6 bits of what else trapped.
    pub(crate) fn step_exit(&self, bits: u64) -> Exit {
        self.debug_exit(bits | DR6_BS)
    }

    fn debug_exit(&self, bits: u64) -> Exit {
        Exit::Debug {
            vector: vector::DB,
            dr6: bits | DR6_FIXED,
            dr7: self.breakpoints().1,
        }
    }

    /// A #DB with these DR6 bits: to the debugger if it steps or has armed breakpoints, whoever caused it
    /// (`handle_exception_nmi` and `db_interception` of KVM), else to the guest.
    fn debug_exception(&mut self, bits: u64, trap: bool) -> Step {
        if self.guest_debug.hardware_breakpoints || self.guest_debug.single_step {
            return Err(self.debug_exit(bits));
        }
        self.queue_fault(Fault {
            vector: vector::DB,
            error_code: None,
            payload: bits,
            trap,
        });
        Ok(())
    }
}
