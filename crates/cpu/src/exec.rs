//! The run loop: requests, events, blocks.

use crate::block::BlockId;
use crate::cpu::{Counters, Cpu};
use crate::decode::Insn;
use crate::events::vector;
use crate::exit::{Exit, Fault, InternalError, Stop};
use crate::memory::fault;
use crate::requests;
use crate::state::rflags;

/// How a step of the run loop ends: with an exit for the caller, or not.
pub(crate) type Step = Result<(), Exit>;

impl Cpu {
    /// Runs until there is something for the caller to do, or about `budget` instructions are done.
    pub fn run(&mut self, budget: u64) -> Exit {
        let Some(turns) = self.turns() else {
            return self.run_now(budget);
        };
        loop {
            let turn = turns.take();
            let exit = self.run_now(budget);
            drop(turn);
            if exit != Exit::Budget || budget != u64::MAX {
                return exit;
            }
        }
    }

    fn run_now(&mut self, budget: u64) -> Exit {
        self.run_watched(|cpu| cpu.run_until_exit(budget))
    }

    /// Runs in guest memory that other threads may change the map of, and the VMM may unmap.
    pub(crate) fn run_watched(&mut self, run: impl FnOnce(&mut Self) -> Step) -> Exit {
        let requests = self.requests.clone();
        self.participant.enter();
        self.may_wait_for_if = true;
        self.settle();
        let (exit, faulted) = fault::watch(&requests, || match run(self) {
            Ok(()) => Exit::Budget,
            Err(exit) => exit,
        });
        self.participant.leave();
        if faulted {
            self.requests.take(requests::KICK);
            // An instruction behind the access may have left one; it belongs to this run.
            self.exit = None;
            return Exit::BadMemory;
        }
        exit
    }

    fn run_until_exit(&mut self, budget: u64) -> Step {
        if self.io.pending() {
            self.complete_io()?;
        }
        // Deliveries count too: a handler that faults at its first instruction completes none.
        let spent = |c: &Counters| c.instructions.wrapping_add(c.events);
        let start = spent(&self.counters);
        while spent(&self.counters).wrapping_sub(start) < budget {
            if self.check_events {
                self.raise_noted_traps()?;
                self.exit_behind_instruction()?;
            }
            if self.requests.pending() != 0 {
                self.serve_requests()?;
            }
            // What waits behind an event comes before the first instruction of its handler.
            if self.check_events && self.serve_events()? {
                continue;
            }
            if self.must_step() {
                self.step()?;
            } else if self.translator.is_some() && budget == u64::MAX {
                self.run_translated()?;
            } else {
                self.run_block()?;
            }
        }
        self.exit_behind_instruction()
    }

    /// The exit of an instruction that has completed (HLT, MOV to CR8). It comes before anything
    /// else ends the run: the state alone would not show it.
    pub(crate) fn exit_behind_instruction(&mut self) -> Step {
        self.exit.take().map_or(Ok(()), Err)
    }

    /// Finishes what the last exit left half done.
    pub(crate) fn complete_io(&mut self) -> Step {
        // The instruction accesses memory: not by what others have asked to drop while this processor was
        // outside.
        self.serve_drops();
        self.replay()?;
        match self.next_write() {
            Some(exit) => Err(exit),
            None => Ok(()),
        }
    }

    /// Drops the parts of the TLB, and the memory map, that others have asked to drop.
    fn serve_drops(&mut self) {
        let pending = self.requests.pending();
        if pending & (requests::TLB_FLUSH | requests::MEMSLOTS) != 0 {
            let epoch = self.memory.epoch();
            self.requests.take(requests::TLB_FLUSH | requests::MEMSLOTS);
            self.reload_address_space();
            self.update_mode();
            self.participant.acknowledge(epoch);
        }
        if pending & requests::CODE_PAGE != 0 {
            let epoch = self.memory.epoch();
            self.requests.take(requests::CODE_PAGE);
            self.tlb.flush_l1();
            self.participant.acknowledge(epoch);
        }
    }

    pub(crate) fn serve_requests(&mut self) -> Step {
        self.serve_drops();
        let pending = self.requests.pending();
        if pending & requests::EVENT != 0 {
            self.requests.take(requests::EVENT);
            self.machine.clone().collect_events(&mut self.state);
            self.check_events = true;
            // As in KVM before anything else, and before what asks for an exit: no state holds it.
            if let Some(vector) = self.machine.take_ioapic_eoi() {
                return Err(Exit::IoapicEoi { vector });
            }
        }
        if pending & requests::EXITS != 0 {
            Err(Exit::Request)
        } else {
            Ok(())
        }
    }

    /// Delivers the first of what is pending and deliverable, in the order of SDM Vol. 3, table 6-2;
    /// false if there is nothing.
    pub(crate) fn serve_events(&mut self) -> Result<bool, Exit> {
        self.check_events = false;
        self.may_wait_for_if = true;
        if self.state.events.triple_fault {
            self.state.events.triple_fault = false;
            return Err(Exit::Shutdown);
        }
        let shadow = self.state.events.shadow;
        let e = self.state.events.exception;
        if e.pending || e.injected {
            return self.deliver_exception();
        }
        if self.state.events.nmi_injected {
            return self.deliver_nmi();
        }
        if self.state.events.interrupt.injected {
            return self.deliver_interrupt();
        }
        if self.guest_debug.block_irq {
            // Looked at again when the debugger has changed its mind, which is an owner's call.
            self.check_events = shadow != 0;
            return Ok(false);
        }
        if self.state.events.smi_pending && !self.state.events.smm {
            self.state.events.smi_pending = false;
            self.check_events = true;
            self.enter_smm().map_err(|_| Self::delivery_failed(0))?;
            return Ok(true);
        }
        if self.state.events.nmi_pending > 0 && !self.state.events.nmi_masked && shadow == 0 {
            self.state.events.nmi_pending -= 1;
            self.state.events.nmi_injected = true;
            self.state.events.nmi_masked = true;
            return self.deliver_nmi();
        }
        let open = self.state.rflags & rflags::IF != 0 && shadow == 0;
        if open {
            if self.machine.interrupt_pending()
                && let Some(vector) = self.machine.acknowledge_interrupt()
            {
                self.state.events.interrupt.injected = true;
                self.state.events.interrupt.vector = vector;
                self.state.events.interrupt.soft = false;
                return self.deliver_interrupt();
            }
            if self.machine.wants_interrupt_window() {
                return Err(Exit::IrqWindowOpen);
            }
        } else if shadow != 0 {
            // The shadow ends behind the next instruction.
            self.check_events = true;
        }
        Ok(false)
    }

    /// Delivers the pending or injected exception.
    fn deliver_exception(&mut self) -> Result<bool, Exit> {
        let vector = self.state.events.exception.vector;
        self.trace_event(vector);
        let done = self.inject_exception();
        self.delivered(done, vector)
    }
    /// Delivers the injected NMI.
    fn deliver_nmi(&mut self) -> Result<bool, Exit> {
        self.trace_event(vector::NMI);
        let done = self.inject_nmi();
        self.delivered(done, vector::NMI)
    }
    /// Delivers the injected interrupt.
    fn deliver_interrupt(&mut self) -> Result<bool, Exit> {
        let vector = self.state.events.interrupt.vector;
        self.trace_event(vector);
        let done = self.inject_interrupt();
        self.delivered(done, vector)
    }
    fn trace_event(&mut self, vector: u8) {
        if let Some(mut trace) = self.trace.take() {
            let keep = trace.event(self, vector);
            self.trace = keep.then_some(trace);
        }
    }
    /// After a delivery, whichever way it went, events are looked at again.
    fn delivered(&mut self, done: Result<(), Stop>, vector: u8) -> Result<bool, Exit> {
        self.check_events = true;
        self.state.events.shadow = 0;
        self.counters.events += 1;
        self.exit = None;
        done.map_err(|_| Self::delivery_failed(vector))?;
        if self.guest_debug.single_step && !self.state.events.triple_fault {
            // A step of its own: the debugger sees the handler's first instruction.
            return Err(self.step_exit(0));
        }
        Ok(true)
    }
    fn delivery_failed(vector: u8) -> Exit {
        Exit::InternalError(InternalError::DeliveryEvent { vector })
    }

    /// Makes a fault the pending exception.
    pub(crate) fn queue_fault(&mut self, f: Fault) {
        let e = &mut self.state.events.exception;
        e.pending = true;
        e.injected = false;
        e.vector = f.vector;
        e.has_error_code = f.error_code.is_some();
        e.error_code = f.error_code.unwrap_or(0);
        e.has_payload = matches!(f.vector, vector::PF | vector::DB);
        e.payload = f.payload;
        self.check_events = true;
    }

    /// Finds the block at RIP and runs it.
    pub(crate) fn run_block(&mut self) -> Step {
        let rip = self.state.rip();
        let id = match self.block_at(rip) {
            Ok(Some(id)) => id,
            Ok(None) => return self.run_crossing(rip),
            Err(stop) => return self.instruction_stopped(stop, None, rip),
        };
        self.run_block_id(id)
    }

    /// Runs the block at RIP.
    #[inline(always)]
    pub(crate) fn run_block_id(&mut self, id: BlockId) -> Step {
        let Some(block) = self.blocks.get(id) else {
            return Ok(());
        };
        let insns = std::mem::take(&mut block.insns);
        self.leave = false;
        let mut done = 0;
        let mut stopped = Ok(());
        for insn in insns.iter() {
            let next = self.state.rip().wrapping_add(insn.len.into());
            self.state.set_rip(next);
            match (insn.handler)(self, insn) {
                Ok(()) => done += 1,
                Err(stop) => {
                    stopped = Err((stop, done));
                    break;
                }
            }
            if self.leave {
                self.last_len = insn.len;
                break;
            }
        }
        self.counters.instructions += done as u64;
        self.counters.blocks += 1;
        if stopped.is_ok() && self.io.has_answers() {
            self.end_replay();
        }
        let result = match stopped {
            Err((stop, n)) => {
                let insn = &insns[n];
                let at = self.state.rip().wrapping_sub(insn.len.into());
                self.instruction_stopped(stop, Some(insn), at)
            }
            Ok(()) if self.io.has_writes() => {
                self.note_writes_retired();
                self.after_writes()
            }
            Ok(()) => Ok(()),
        };
        if let Some(block) = self.blocks.get(id) {
            block.insns = insns;
        }
        result
    }

    /// Executes the instruction at RIP, which is in no block because it crosses a page or the code
    /// segment's limit.
    pub(crate) fn run_crossing(&mut self, rip: u64) -> Step {
        let code = self.memory.pages().code_epoch();
        let insn = match self.blocks.take_crossing(rip, code) {
            Some(insn) => insn,
            None => match self.fetch() {
                Ok(insn) => insn,
                Err(stop) => return self.instruction_stopped(stop, None, rip),
            },
        };
        // Before it runs: it may change the mode or the address space.
        let key = self
            .cacheable_by_rip()
            .then(|| self.blocks.note_crossing(rip));
        let done = self.execute_one(&insn, rip);
        if let Some(key) = key {
            self.blocks.put_crossing(rip, key, code, insn);
        }
        done
    }

    /// An instruction at `rip` did not complete.
    pub(crate) fn instruction_stopped(
        &mut self,
        stop: Stop,
        insn: Option<&Insn>,
        rip: u64,
    ) -> Step {
        match stop {
            Stop::Fault => {
                let f = self.fault;
                if f.trap {
                    self.counters.instructions += 1;
                } else {
                    self.state.set_rip(rip);
                }
                if self.io.pending() || insn.is_some() {
                    self.end_replay();
                }
                if f.vector == vector::BP && self.guest_debug.software_breakpoints {
                    self.state.set_rip(rip);
                    let (dr6, dr7) = (self.state.dr6, self.state.dr7);
                    return Err(Exit::Debug {
                        vector: vector::BP,
                        dr6,
                        dr7,
                    });
                }
                self.queue_fault(f);
                if self.io.has_writes() {
                    // The elements of a scatter before the one that faulted.
                    self.note_writes_retired();
                    return self.after_writes();
                }
                Ok(())
            }
            Stop::Exit => {
                self.state.set_rip(rip);
                // What a debugger is shown is no operation to complete.
                let debug = matches!(self.exit, Some(Exit::Debug { .. }));
                if let Some(insn) = insn.filter(|_| !debug) {
                    self.set_replay(insn);
                }
                Err(self.exit.take().unwrap_or(Exit::Request))
            }
            Stop::Unimplemented => {
                self.state.set_rip(rip);
                let (bytes, len) = self.instruction_bytes(rip);
                Err(Exit::InternalError(InternalError::Emulation {
                    rip,
                    bytes,
                    len: len as u8,
                }))
            }
        }
    }
}
