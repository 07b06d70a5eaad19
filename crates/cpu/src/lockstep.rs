//! What a check of translated code against the interpreter needs of the processor: to know which pages
//! of RAM translated code can have written, and to do again, instruction by instruction, what it has done.
//!
//! In lockstep only *open* pages have fast write entries. A page is opened when the interpreter writes to
//! it, which it does for translated code, too, wherever that finds no entry. So who copies the open pages
//! before translated code runs can undo everything it does.

use std::sync::Arc;

use crate::block::BlockId;
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::Stop;
use crate::memory::access::{HostPage, copy_to_guest};
use crate::memory::{PAGE, Slot};
use crate::state::{CpuState, reg, rflags};
use crate::turns::Turns;

/// Pages that are open at a time. Each is copied and compared for each stretch.
pub const OPEN_PAGES: usize = 12;

/// A processor's lockstep.
pub(crate) struct Lockstep {
    /// Host addresses.
    open: Vec<u64>,
    /// The interpreter does again what translated code has done.
    repeating: bool,
    turns: Arc<Turns>,
}

/// One instruction that the interpreter has done again.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The instruction.
    pub insn: &'a Insn,
    /// RIP in front of it.
    pub rip: u64,
    /// The state behind it.
    pub state: &'a CpuState,
}

/// Why the interpreter could not do what translated code says it has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlike {
    /// There is no code at RIP that is executed in blocks.
    NoCode,
    /// The instruction at RIP is none that translated code may execute.
    NotTranslated,
    /// It does not complete: it faults, accesses a device, or writes to a page that is not open.
    Stopped,
}

impl Cpu {
    /// From now on only open pages have fast write entries, and the processor runs only when it is its turn.
    pub fn set_lockstep(&mut self, turns: Arc<Turns>) {
        self.lockstep = Some(Box::new(Lockstep {
            open: Vec::with_capacity(OPEN_PAGES),
            repeating: false,
            turns,
        }));
        self.tlb.close_writes();
    }

    /// Those it takes turns with.
    pub(crate) fn turns(&self) -> Option<Arc<Turns>> {
        self.lockstep.as_ref().map(|l| l.turns.clone())
    }

    /// Whether another processor waits for its turn.
    pub fn others_wait(&self) -> bool {
        self.lockstep.as_ref().is_some_and(|l| l.turns.waiting())
    }

    /// The open pages.
    pub fn open_pages(&self) -> impl Iterator<Item = HostPage> + '_ {
        let open = self.lockstep.as_ref().map(|l| l.open.iter());
        open.into_iter().flatten().map(|page| HostPage(*page))
    }

    /// The guest-physical address of a page of RAM.
    pub fn guest_physical(&self, page: HostPage) -> Option<u64> {
        let holds = |slot: &&Arc<Slot>| (slot.host()..slot.host() + slot.size).contains(&page.0);
        let slot = self.map.slots().find(holds)?;
        Some(slot.gpa + (page.0 - slot.host()))
    }

    /// Writes to an open page, at an offset in it. Nothing is written to another one.
    pub fn put_into_open_page(&self, page: HostPage, offset: usize, bytes: &[u8]) {
        let is_open = self.open_pages().any(|open| open == page);
        if is_open && offset.saturating_add(bytes.len()) <= PAGE as usize {
            copy_to_guest(page.0 + offset as u64, bytes);
        }
    }

    /// Whether a page may have a fast write entry.
    #[inline]
    pub(crate) fn is_open(&self, host_page: u64) -> bool {
        self.lockstep
            .as_ref()
            .is_none_or(|l| l.open.contains(&host_page))
    }

    /// The page of this host address is about to be written by other means than a fast write entry.
    #[inline]
    pub(crate) fn open_page(&mut self, host: u64) -> Result<(), Stop> {
        let page = host & !(PAGE - 1);
        match &mut self.lockstep {
            Some(l) if !l.open.contains(&page) => {
                if l.repeating {
                    return Err(Stop::Unimplemented);
                }
                if l.open.len() == OPEN_PAGES {
                    l.open.clear();
                    self.tlb.close_writes();
                }
                l.open.push(page);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Something that is no RAM is about to be accessed: what is done again must not do that.
    #[inline]
    pub(crate) fn leave_ram(&self) -> Result<(), Stop> {
        match &self.lockstep {
            Some(l) if l.repeating => Err(Stop::Unimplemented),
            _ => Ok(()),
        }
    }

    /// Interprets as many instructions from RIP on, without requests, events or traps, which translated code
    /// has none of, either. `may` says which instructions translated code executes. `see` is shown each.
    /// Nothing but the state and open pages is changed.
    pub fn interpret_again(
        &mut self,
        count: u64,
        may: fn(&Insn) -> bool,
        see: &mut dyn FnMut(Step),
    ) -> Result<(), (u64, Unlike)> {
        self.set_repeating(true);
        let mut done = 0;
        let mut result = Ok(());
        while done < count && result.is_ok() {
            result = match self.block_at(self.state.rip()) {
                Ok(Some(id)) => self.block_again(id, count, &mut done, may, see),
                _ => Err(Unlike::NoCode),
            };
        }
        self.set_repeating(false);
        result.map_err(|why| (done, why))
    }

    fn set_repeating(&mut self, repeating: bool) {
        if let Some(l) = &mut self.lockstep {
            l.repeating = repeating;
        }
    }

    fn block_again(
        &mut self,
        id: BlockId,
        count: u64,
        done: &mut u64,
        may: fn(&Insn) -> bool,
        see: &mut dyn FnMut(Step),
    ) -> Result<(), Unlike> {
        let Some(block) = self.blocks.get(id) else {
            return Err(Unlike::NoCode);
        };
        let insns = std::mem::take(&mut block.insns);
        let mut result = Ok(());
        for insn in &insns {
            if *done == count {
                break;
            }
            let rip = self.state.rip();
            if !may(insn) {
                result = Err(Unlike::NotTranslated);
                break;
            }
            if self.bare(insn).is_err() {
                result = Err(Unlike::Stopped);
                break;
            }
            // A repeated string instruction may need more than one go.
            let repeated = insn.rep() && insn.raw.is_string_instruction();
            while repeated && self.state.rip() == rip && result.is_ok() {
                self.state.rflags &= !rflags::RF;
                result = self.bare(insn).map_err(|_| Unlike::Stopped);
            }
            *done += 1;
            see(Step {
                insn,
                rip,
                state: &self.state,
            });
            if self.state.rip() != rip.wrapping_add(insn.len.into()) {
                break;
            }
        }
        if let Some(block) = self.blocks.get(id) {
            block.insns = insns;
        }
        result
    }

    /// The handler and nothing around it but the shadow of the instruction before it.
    fn bare(&mut self, insn: &Insn) -> Result<(), Stop> {
        let rip = self.state.rip();
        self.state.set_rip(rip.wrapping_add(insn.len.into()));
        self.prior_shadow = std::mem::take(&mut self.state.events.shadow);
        let done = (insn.handler)(self, insn);
        let shadow = std::mem::take(&mut self.prior_shadow);
        done.inspect_err(|_| {
            self.exit = None;
            self.state.set_rip(rip);
            self.state.events.shadow = shadow;
        })
    }

    /// Puts an earlier state back, or a later one, of the same address space.
    pub fn put_state(&mut self, state: CpuState) {
        self.state = state;
        self.update_mode();
    }

    /// Translated code has been left in front of a repeated string instruction, which is partly done: RCX is
    /// `left`. Does as much of it again. False, and nothing has happened, if that is no such instruction.
    pub fn interpret_elements_again(&mut self, left: u64, see: &mut dyn FnMut(Step)) -> bool {
        let rip = self.state.rip();
        let Ok(Some(id)) = self.block_at(rip) else {
            return false;
        };
        let Some(insn) = self.blocks.get(id).and_then(|b| b.insns.first().cloned()) else {
            return false;
        };
        let all = self.state.regs[reg::RCX] & insn.addr_mask;
        if !insn.rep() || !insn.raw.is_string_instruction() || left >= all {
            return false;
        }
        self.set_repeating(true);
        self.state.regs[reg::RCX] = all - left;
        let mut completed = true;
        while completed && self.state.regs[reg::RCX] != 0 {
            self.state.set_rip(rip);
            completed = self.bare(&insn).is_ok();
        }
        self.state.rflags &= !rflags::RF;
        self.state.regs[reg::RCX] += left;
        self.state.set_rip(rip);
        self.set_repeating(false);
        see(Step {
            insn: &insn,
            rip,
            state: &self.state,
        });
        completed
    }
}
