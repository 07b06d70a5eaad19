//! Translated code that executes no more instructions than it was told.
//!
//! In front of each instruction the code takes one off [`Slot::Instructions`], and leaves if there is none to
//! take. So the boundary it is left at is exactly the one that was asked for, wherever in a block, a loop or a
//! chain of linked blocks that is. Only translators made for that ([`crate::Options::by_count`]) have such code.
//!
//! Of a repeated string instruction each element counts, so those are the interpreter's. What is left to the
//! interpreter is left to the caller, too: it has to look at time and events around it.

use anykvm_cpu::{Cpu, Insn};
use iced_x86::IcedError;

use crate::Jit;
use crate::asm::{at, slot};
use crate::exits::Wish;
use crate::regs::POINTER;
use crate::shared::Slot;
use crate::translate::{Block, Site};
use crate::vectors::Level;

/// Whether it may count as more than one instruction.
pub fn is_several(insn: &Insn) -> bool {
    insn.rep() && insn.raw.is_string_instruction()
}

impl Block {
    /// Takes one instruction off what may be executed, or leaves in front of it. The flags stay.
    pub fn spend_one(&mut self, site: Site) -> Result<(), IcedError> {
        self.a.load(POINTER, slot(Slot::Instructions))?;
        let none = self.a.jrcxz();
        self.a.lea(POINTER, at(POINTER, -1))?;
        self.a.store(slot(Slot::Instructions), POINTER)?;
        let over = self.a.jmp();
        self.a.land_short(none);
        let leave = self.a.jmp();
        let exit = self.exits.add(Wish::Request, site.at, self.flags.clone());
        self.note_shadow(site, exit);
        self.exits.lead(leave, exit);
        self.a.land(over);
        Ok(())
    }
}

impl Jit {
    /// See [`anykvm_cpu::translator::Translator::run_by_count`].
    pub(crate) fn run_bounded(&mut self, cpu: &mut Cpu, most: u64) -> Option<u64> {
        self.shared.instructions = most;
        let mut entered = false;
        loop {
            self.views.select(cpu);
            let known = self.views.find(cpu.state.rip());
            let known = known.filter(|_| self.pending.is_none());
            let Some(entry) = known.or_else(|| self.find_bounded(cpu)) else {
                break;
            };
            self.shared.page = cpu.state.rip() & !0xfff;
            if !self.enter(cpu, entry, Level::None) {
                break;
            }
            entered = true;
            let number = self.shared.exit as u32;
            let Some(taken) = self.table.taken(number) else {
                break;
            };
            if let Wish::Interpret { .. } = taken.wish {
                // It was taken off, and is not executed.
                self.shared.instructions += 1;
            }
            if self.table.crosses(number) {
                self.pending = Some(number);
                self.crossed = (self.shared.view, self.shared.page, 0);
            }
            if !matches!(taken.wish, Wish::Link { .. }) {
                break;
            }
            self.pending = Some(number);
            if !cpu.may_go_on() {
                break;
            }
        }
        let done = most - self.shared.instructions;
        self.shared.instructions = 0;
        self.stats.executed += done;
        entered.then_some(done)
    }

    fn find_bounded(&mut self, cpu: &mut Cpu) -> Option<u64> {
        match self.find_made(cpu) {
            Ok(entry) => entry,
            Err(sought) => {
                let id = cpu.block_without_effect()?;
                self.make_found(cpu, id, sought)
            }
        }
    }
}
