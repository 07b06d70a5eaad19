//! What a translator of guest code needs of a processor.
//!
//! A translator runs blocks in its own way and leaves everything it does not know to the
//! interpreter, one instruction at a time. The processor runs complete without one.

use crate::block::{Block, BlockId};
use crate::cpu::Cpu;
use crate::decode::Insn;
use crate::exit::Exit;
use crate::memory::PAGE;
use crate::memory::access::HostPage;
use crate::mmu::slow::Fetched;
use crate::mmu::tlb::{Set, layout};
use crate::requests::Requests;
use crate::state::rflags;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A TLB entry's offset from [`Cpu::level1`] is `(linear address >> TLB_INDEX_SHIFT) &
/// TLB_INDEX_MASK`.
pub const TLB_INDEX_SHIFT: u32 = layout::SHIFT;
/// See [`TLB_INDEX_SHIFT`].
pub const TLB_INDEX_MASK: u32 = layout::MASK;
/// Offset of an entry's read tag: page of the access's last byte, with [`Cpu::address_space`] in
/// the low bits.
pub const TLB_READ: i64 = layout::READ;
/// Offset of an entry's write tag.
pub const TLB_WRITE: i64 = layout::WRITE;
/// Offset of an entry's addend: host address minus linear address.
pub const TLB_ADDEND: i64 = layout::ADDEND;
/// As [`TLB_INDEX_MASK`] for the entries behind level 1, which begin at [`Cpu::behind_level1`].
pub const READY_INDEX_MASK: u32 = layout::READY_MASK;
/// Offset, there, of the two counts an entry rests on.
pub const READY_COUNTS: i64 = layout::COUNTS;
/// The address space's number, there, in the tags of global pages.
pub const READY_GLOBAL: u32 = layout::EVERYWHERE;
/// A tag nothing compares equal to, sign-extended.
pub const TLB_NO_TAG: i32 = layout::NO_TAG;

/// Runs guest code in another way than by interpreting it.
pub trait Translator: Send {
    /// Runs code from the processor's RIP for a while. It returns when the run loop should look
    /// around; `Err` ends [`Cpu::run`]. Called only when no instruction has to be executed alone.
    fn run(&mut self, cpu: &mut Cpu) -> Result<(), Exit>;

    /// Executes code from the processor's RIP on, no more instructions than `most`, and nothing that the
    /// interpreter would have to do; returns how many. `None` if there is no translation to enter, or it must not
    /// be. Instructions whose result is another each time are not executed, nor are repeated string instructions, and
    /// time is not looked at.
    fn run_by_count(&mut self, _cpu: &mut Cpu, _most: u64) -> Option<u64> {
        None
    }

    /// What it has done so far, and what it holds.
    fn stats(&self) -> TranslatorStats {
        TranslatorStats::default()
    }
}

/// Counters of a translator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TranslatorStats {
    /// Blocks translated.
    pub blocks: u64,
    /// Guest instructions in them.
    pub block_instructions: u64,
    /// Nanoseconds spent translating.
    pub translation_ns: u64,
    /// Translations dropped because their bytes changed.
    pub dropped: u64,
    /// Times all translations were dropped because there was no room for one more.
    pub flushes: u64,
    /// Times translated code was entered from the run loop.
    pub entries: u64,
    /// Instructions that translated code left to the interpreter.
    pub left: u64,
    /// Instructions executed by translated code, if they are counted.
    pub executed: u64,
    /// Instructions of translated code that were compared with the interpreter.
    pub compared: u64,
    /// Differences from the interpreter that did not come again.
    pub disturbed: u64,
    /// Bytes of translated code there are now.
    pub code_bytes: u64,
    /// Bytes of memory the translator holds, code included.
    pub memory_bytes: u64,
}

/// Code at a RIP.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// Its host address.
    pub host: u64,
    /// Its page is the same in all address spaces.
    pub global: bool,
    /// What [`Cpu::code_checked`] noted for the page last, since its translation was cached for fetches;
    /// 0 if nothing.
    pub checked: u64,
}

impl Cpu {
    /// Gives the processor a translator, or takes it away.
    pub fn set_translator(&mut self, translator: Option<Box<dyn Translator>>) {
        self.translator = translator;
    }

    pub(crate) fn run_translated(&mut self) -> Result<(), Exit> {
        let Some(mut translator) = self.translator.take() else {
            return self.run_block();
        };
        let result = translator.run(self);
        self.translator = Some(translator);
        result
    }

    /// The translator's counters; `None` without a translator.
    pub fn translator_stats(&self) -> Option<TranslatorStats> {
        self.translator.as_ref().map(|t| t.stats())
    }

    /// Bytes of memory that this processor holds beside guest RAM: decoded blocks, TLB, and what its
    /// translator holds.
    pub fn memory_bytes(&self) -> u64 {
        let own = size_of::<Self>() + self.blocks.memory() + self.tlb.memory();
        own as u64 + self.translator_stats().map_or(0, |t| t.memory_bytes)
    }

    /// The decoded block at RIP, its bytes checked. If there is none that could be kept, one
    /// instruction is executed, or its fault made pending, and the answer is `None`; also if requests must be
    /// served first.
    pub fn block_here(&mut self) -> Result<Option<BlockId>, Exit> {
        if self.asked_to_drop() {
            return Ok(None);
        }
        let rip = self.state.rip();
        match self.block_at(rip) {
            Ok(Some(id)) => Ok(Some(id)),
            Ok(None) => self.run_crossing(rip).map(|()| None),
            Err(stop) => self.instruction_stopped(stop, None, rip).map(|()| None),
        }
    }

    /// The same, but if there is none nothing happens.
    pub fn block_without_effect(&mut self) -> Option<BlockId> {
        if self.asked_to_drop() {
            return None;
        }
        let found = self.block_at(self.state.rip());
        if found.is_err() {
            self.exit = None;
        }
        found.ok().flatten()
    }

    /// A block.
    pub fn block(&mut self, id: BlockId) -> Option<&mut Block> {
        self.blocks.get(id)
    }

    /// The decoded code that follows a block in its page, at this host address: up to the next instruction
    /// that ends a block, with its bytes.
    pub fn code_behind(&mut self, host: u64) -> Option<(Vec<Insn>, Box<[u8]>)> {
        let page = HostPage(host & !(PAGE - 1));
        let known = self.blocks.find(host, self.mode);
        if let Some(block) = known.and_then(|id| self.blocks.get(id))
            && !block.insns.is_empty()
        {
            let (insns, bytes) = (block.insns.to_vec(), block.bytes.clone());
            if self.code_is(host, &bytes) {
                return Some((insns, bytes));
            }
        }
        let block = self.build_block(page, (host % PAGE) as usize).ok()??;
        Some((block.insns.into_vec(), block.bytes))
    }

    /// Whether these bytes are still at a host address in the page of a block that
    /// [`Cpu::block_here`] has just found; if the page was not known to hold code there, it is now. Also
    /// false if requests must be served before anybody can tell.
    pub fn code_is(&mut self, host: u64, bytes: &[u8]) -> bool {
        let page = HostPage(host & !(PAGE - 1));
        let offset = (host % PAGE) as usize;
        self.mark_code(page, offset, bytes.len()).is_ok() && page.matches(offset, bytes)
    }

    /// Interprets the block at RIP, unless requests must be served first: [`Cpu::code_is`] may have waited
    /// for other processors.
    pub fn interpret_block(&mut self, id: BlockId) -> Result<(), Exit> {
        if self.asked_to_drop() {
            return Ok(());
        }
        self.run_block_id(id)
    }

    /// Interprets one instruction, which is at RIP. True if it completed and nothing keeps the next
    /// one from being executed without a look around.
    pub fn interpret(&mut self, insn: &Insn) -> Result<bool, Exit> {
        let rip = self.state.rip();
        self.leave = false;
        self.state.set_rip(rip.wrapping_add(insn.len.into()));
        if let Err(stop) = (insn.handler)(self, insn) {
            return self
                .instruction_stopped(stop, Some(insn), rip)
                .map(|()| false);
        }
        self.counters.instructions += 1;
        if self.io.has_answers() {
            self.end_replay();
        }
        if self.leave {
            self.last_len = insn.len;
        }
        if self.io.has_writes() {
            self.note_writes_retired();
            self.after_writes()?;
        }
        Ok(!self.leave && !self.check_events && self.requests.pending() == 0)
    }

    /// Whether the next instruction may be executed without a look at requests and events, and need not
    /// be executed alone.
    pub fn may_go_on(&self) -> bool {
        !self.check_events && self.requests.pending() == 0 && !self.must_step()
    }

    /// Where the code at RIP is. `None` if it is not in RAM or cannot be fetched, or must not be found by
    /// RIP alone ([`Cpu::code_stays`]): [`Cpu::block_here`] knows what follows.
    pub fn code_here(&mut self) -> Option<Code> {
        let rip = self.state.rip();
        if !self.cacheable_by_rip() {
            return None;
        }
        let Ok(Fetched::Ram(page)) = self.fetch_page(rip) else {
            return None;
        };
        let user = self.mode.user();
        self.blocks.note_page(rip);
        Some(Code {
            host: page.0 + rip % PAGE,
            global: self.tlb.exec_is_global(user, rip),
            checked: self.tlb.exec_note(user, rip),
        })
    }

    /// Notes what the translator wants to find in [`Code::checked`].
    pub fn code_checked(&mut self, note: u64) {
        let rip = self.state.rip();
        self.tlb.note_exec(self.mode.user(), rip, note);
    }

    /// How often everything that was found by a linear address was voided: by a flush of the TLB, INVLPG
    /// of a page with code, or a new epoch. A change of the address space alone does not count.
    pub fn code_flushes(&self) -> u64 {
        self.blocks.flushes()
    }
    /// Changes whenever a store has hit code.
    pub fn code_epoch(&self) -> u64 {
        self.memory.pages().code_epoch()
    }
    /// Where [`Cpu::code_epoch`] is; good as long as the guest's memory.
    pub fn code_epoch_counter(&self) -> *const AtomicU64 {
        self.memory.pages().code_epoch_counter()
    }
    /// Whether what was found at a RIP may be found there again without a look at memory (paging is
    /// on, and the code segment has no limit).
    pub fn code_stays(&self) -> bool {
        self.cacheable_by_rip()
    }
    /// Address of the level-1 TLB entries for the running code.
    pub fn level1(&self) -> u64 {
        self.tlb.level1()
    }
    /// The same of 64-bit code at CPL 3 or CPL 0, while RFLAGS.AC is clear: the level-1 entries, and those
    /// behind them.
    pub fn entries_at(&mut self, user: bool) -> (u64, u64) {
        let set = if user { Set::User } else { Set::Supervisor };
        (self.tlb.level1_of(set), self.tlb.behind_level1_of(set))
    }
    /// Whether nothing waits for RFLAGS.IF to be set. What comes later is announced by a request.
    pub fn nothing_waits_for_if(&mut self) -> bool {
        if self.state.rflags & rflags::IF != 0 {
            return true;
        }
        if self.may_wait_for_if {
            self.may_wait_for_if =
                self.machine.interrupt_pending() || self.machine.wants_interrupt_window();
        }
        !self.may_wait_for_if
    }
    /// Translated code has changed the privilege level, or RFLAGS.AC: what is derived from the state is made
    /// anew.
    pub fn privilege_changed(&mut self) {
        self.update_mode();
    }
    /// The number of the address space: the low bits of every TLB tag.
    pub fn address_space(&self) -> u64 {
        self.tlb.asn()
    }
    /// Address of the TLB's entries behind level 1 for the running code, and what their counts must be: as
    /// long as translated code runs they do not change.
    pub fn behind_level1(&mut self) -> (u64, u64) {
        self.tlb.behind_level1()
    }
    /// What copies of level-1 TLB entries rest on: how often entries were dropped, the address space, and
    /// the entries in use. Entries copied while this was the same are good.
    pub fn tlb_state(&self) -> (u64, u64, u64) {
        (self.tlb.drops(), self.tlb.asn(), self.tlb.level1())
    }
    /// The requests word.
    pub fn shared_requests(&self) -> &Arc<Requests> {
        &self.requests
    }
}
