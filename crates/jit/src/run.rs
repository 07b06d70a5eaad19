//! Running translated code: from the processor's RIP into it, and what follows when it is left.
//!
//! As long as nothing asks for the run loop, what an instruction that was left to the interpreter leads
//! to is looked up in the current view and entered at once.

use std::sync::atomic::AtomicU32;

use anykvm_cpu::block::BlockId;
use anykvm_cpu::memory::fault;
use anykvm_cpu::state::seg;
use anykvm_cpu::translator::{Code, Translator, TranslatorStats};
use anykvm_cpu::{Cpu, Exit};

use crate::Jit;
use crate::exits::Wish;
use crate::legacy;
use crate::lockstep::Start;
use crate::shared::Shared;
use crate::stubs::Stub;
use crate::table::APART;
use crate::translate;
use crate::vectors::Level;
use crate::x87;

/// A translation that there is not yet, or not any more.
pub(crate) struct Sought {
    code: Option<Code>,
    manner: u32,
    /// The exit that leads there.
    pending: Option<u32>,
}

impl Translator for Jit {
    fn stats(&self) -> TranslatorStats {
        TranslatorStats {
            code_bytes: self.cache.used() as u64,
            memory_bytes: (self.cache.touched()
                + self.table.memory()
                + self.accesses.memory()
                + size_of::<Shared>()
                + self.views.memory()) as u64,
            ..self.stats
        }
    }

    fn run_by_count(&mut self, cpu: &mut Cpu, most: u64) -> Option<u64> {
        if !self.options.by_count {
            return None;
        }
        self.keep_to_account();
        cpu.shared_requests().rearm();
        self.run_bounded(cpu, most)
    }

    fn run(&mut self, cpu: &mut Cpu) -> Result<(), Exit> {
        if self.options.by_count {
            return match cpu.block_here()? {
                Some(id) => cpu.interpret_block(id),
                None => Ok(()),
            };
        }
        self.keep_to_account();
        cpu.shared_requests().rearm();
        loop {
            if let Some(profile) = &mut self.profile
                && profile.turn(cpu.state.rip())
            {
                profile.write(|at, len| self.cache.read(at, len));
            }
            self.views.select(cpu);
            let known = self.views.find(cpu.state.rip());
            let entry = match known.filter(|_| self.pending.is_none()) {
                Some(entry) => entry,
                None => match self.find(cpu)? {
                    Some(entry) => entry,
                    None => return self.end_turn(cpu),
                },
            };
            if !self.run_from(cpu, entry)? || !cpu.may_go_on() {
                return self.end_turn(cpu);
            }
            self.end_turn(cpu)?;
        }
    }
}

impl Jit {
    fn keep_to_account(&mut self) {
        if self.account.is_over() {
            self.flush();
            self.cache.shrink();
        }
    }

    /// Leaves the run loop in lockstep if it is another processor's turn.
    fn end_turn(&mut self, cpu: &Cpu) -> Result<(), Exit> {
        let over = self.lockstep.as_mut().is_some_and(|l| l.turn_is_over());
        if over && cpu.others_wait() {
            return Err(Exit::Budget);
        }
        Ok(())
    }

    /// The entry point of the translation for RIP, which is entered into the current view. If there is
    /// none, a block is interpreted, or an instruction that is in none, or a fault made pending.
    pub(crate) fn find(&mut self, cpu: &mut Cpu) -> Result<Option<u64>, Exit> {
        let sought = match self.find_made(cpu) {
            Ok(entry) => return Ok(entry),
            Err(sought) => sought,
        };
        let Some(id) = cpu.block_here()? else {
            return Ok(None);
        };
        if let Some(entry) = self.make_found(cpu, id, sought) {
            return Ok(Some(entry));
        }
        cpu.interpret_block(id)?;
        Ok(None)
    }

    /// As far as a look at the table goes.
    pub(crate) fn find_made(&mut self, cpu: &mut Cpu) -> Result<Option<u64>, Sought> {
        let pending = self.pending.take();
        let mut manner = 0;
        let code = if legacy::translates(cpu.mode()) {
            cpu.code_here()
        } else {
            None
        };
        if let Some(code) = code {
            let view = self.views.select(cpu);
            if code.checked != view {
                self.check_page(cpu, code.host);
                cpu.code_checked(view);
            }
            if pending.is_some_and(|exit| self.table.leads_apart(exit, code.host)) {
                manner = APART;
            }
            let place = (code.host, cpu.mode().bits_packed() | manner);
            if let Some(n) = self.table.at(place) {
                return Ok(self.found(cpu, code, n, pending));
            }
        }
        Err(Sought {
            code,
            manner,
            pending,
        })
    }

    /// And with the block at RIP known: it is translated if it is hot.
    pub(crate) fn make_found(&mut self, cpu: &mut Cpu, id: BlockId, sought: Sought) -> Option<u64> {
        let code = sought.code?;
        let n = self.translation(cpu, id, sought.manner)?;
        self.found(cpu, code, n, sought.pending)
    }

    fn found(&mut self, cpu: &Cpu, code: Code, n: u32, pending: Option<u32>) -> Option<u64> {
        self.views.select(cpu);
        let rip = cpu.state.rip();
        if let Some(exit) = pending {
            self.crossed.2 = rip;
            self.link(exit, n, cpu.mode());
        }
        let entry = self.table.get(n)?.checked;
        if !self.table.is_apart(n) {
            let space = cpu.address_space();
            self.views.insert(rip, entry, code.global, space);
        }
        if self.views.note(rip, code.host) {
            let guards = self.table.uncross(code.host);
            self.unguard(&guards);
        }
        Some(entry)
    }

    /// Runs translated code from an entry point for branches until it is left for something else than an
    /// instruction behind which it can be entered again. False if the run loop is wanted, or the
    /// interpreter has run.
    fn run_from(&mut self, cpu: &mut Cpu, entry: u64) -> Result<bool, Exit> {
        let mut entry = entry;
        self.shared.page = cpu.state.rip() & !0xfff;
        // The entry point loads what the block needs; places to resume expect it.
        let mut level = Level::None;
        let mut ahead = 0;
        loop {
            if !self.enter_or_compare(cpu, entry, level, ahead)? {
                return Ok(false);
            }
            // Code that is resumed takes back what was counted before.
            let counted = std::mem::take(&mut self.shared.instructions);
            self.stats.executed = self.stats.executed.wrapping_add(counted);
            let number = self.shared.exit as u32;
            let Some(taken) = self.table.taken(number) else {
                return Ok(false);
            };
            if self.table.crosses(number) {
                self.pending = Some(number);
                self.crossed = (self.shared.view, self.shared.page, 0);
            }
            match taken.wish {
                Wish::Request => return Ok(false),
                Wish::Block => {
                    if let Some(id) = cpu.block_here()? {
                        cpu.interpret_block(id)?;
                    }
                    return Ok(false);
                }
                Wish::Link { .. } => {
                    self.pending = Some(number);
                    return Ok(true);
                }
                Wish::Interpret {
                    insn,
                    resume,
                    guarded,
                } => {
                    let insn = usize::from(insn);
                    let rest = if self.options.count || self.options.lockstep {
                        translate::run_length(taken.insns.get(insn..).unwrap_or_default()) as u64
                    } else {
                        0
                    };
                    // All of them were counted when the first was reached.
                    self.stats.executed -= rest;
                    let Some(insn) = taken.insns.get(insn) else {
                        return Ok(false);
                    };
                    if cpu.state.events.shadow != 0 {
                        // It is executed alone.
                        return Ok(false);
                    }
                    self.stats.left += 1;
                    if let Some(profile) = &mut self.profile {
                        profile.left(insn);
                    }
                    let go_on = cpu.interpret(insn)?;
                    let (user, now) = (cpu.mode().user(), cpu.tlb_state());
                    let dropped = self.shared.windows.empty_if_changed(user, now);
                    if guarded && dropped {
                        return Ok(true);
                    }
                    match (go_on, resume) {
                        (true, Some(at)) => {
                            ahead = rest.saturating_sub(1);
                            self.stats.executed += ahead;
                            entry = taken.base + u64::from(at);
                            level = taken.level;
                        }
                        _ => return Ok(true),
                    }
                }
            }
        }
    }

    /// As [`Jit::enter`]; in lockstep with the interpreter. `counted`: what was counted before of the
    /// instructions that are executed now.
    fn enter_or_compare(
        &mut self,
        cpu: &mut Cpu,
        entry: u64,
        level: Level,
        counted: u64,
    ) -> Result<bool, Exit> {
        let Some(mut lockstep) = self.lockstep.take() else {
            return Ok(self.enter(cpu, entry, level));
        };
        let start = Start {
            entry,
            level,
            counted,
        };
        let entered = lockstep.enter(self, cpu, start);
        self.lockstep = Some(lockstep);
        entered
    }

    /// Runs translated code from an entry point that expects these vector registers to be loaded. False if
    /// it must not use them.
    pub(crate) fn enter(&mut self, cpu: &mut Cpu, entry: u64, level: Level) -> bool {
        let available = Level::available(&cpu.state);
        if level > available {
            return false;
        }
        self.views.select(cpu);
        let s = &mut *self.shared;
        s.allow = [Level::Sse, Level::Avx, Level::Avx512].map(|l| u64::from(l <= available));
        s.x87.allow = x87::allowed(&cpu.state).into();
        s.load = self.stubs.address(Stub::Load(level));
        s.windows
            .empty_if_changed(cpu.mode().user(), cpu.tlb_state());
        s.quiet = cpu.nothing_waits_for_if().into();
        let f = cpu.state.rflags;
        s.flags = (f & 0xd5) << 8 | f >> 11 & 1;
        s.asn = cpu.address_space();
        s.fs_base = cpu.state.seg[usize::from(seg::FS)].base;
        s.gs_base = cpu.state.seg[usize::from(seg::GS)].base;
        if !cpu.mode().code64() {
            s.whole_asn = [seg::FS, seg::GS].map(|n| legacy::asn_of_segment(cpu, n));
        }
        s.level1 = cpu.level1();
        s.ready = cpu.behind_level1().into();
        s.go = if self.options.lockstep {
            // The upper half of the counter.
            (&raw const s.instructions)
                .cast::<AtomicU32>()
                .wrapping_add(1)
        } else {
            std::ptr::from_ref(cpu.shared_requests().go())
        };
        s.jumps = self.views.jumps();
        // 0 is no branch's.
        s.view = self.views.number().unwrap_or(0).into();
        s.state = &raw mut cpu.state;
        s.offers.prepare(cpu, self.views.epoch());
        self.set_sides(cpu);
        let s = &mut *self.shared;
        // SAFETY: `enter` is the function `stubs` generated. It and the translation behind `entry` reach
        // the state, the requests word and the TLB, which belong to `cpu` and outlive the call; this
        // area; and guest RAM through TLB entries of the map the processor holds.
        fault::in_code(&self.accesses, || unsafe {
            let enter: unsafe extern "sysv64" fn(u64, *mut Shared) =
                std::mem::transmute(self.stubs.enter as *const u8);
            enter(entry, s);
        });
        let Some(offset) = self.table.offset(s.exit as u32) else {
            unreachable!("translated code has no exits but those of the table");
        };
        cpu.state.set_rip(s.page.wrapping_add(offset as u64));
        cpu.state
            .set_status(s.flags >> 8 & 0xd5 | (s.flags & 1) << 11);
        self.stats.entries += 1;
        if self.shared.level1 != cpu.level1() {
            cpu.privilege_changed();
            self.views.select(cpu);
        }
        true
    }
}
