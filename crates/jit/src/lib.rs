//! Translates hot guest code to host code.
//!
//! Guest and host have the same instruction set, so a translation is mostly the guest's own
//! instructions with their registers renamed ([`regs`]) and their memory operands led through the
//! software TLB ([`memory`]). What is rare or difficult is left to the interpreter before it has had
//! any effect: a translation can be left in front of every instruction and entered again behind it
//! ([`translate`]).
//!
//! [`Jit`] keeps the translations of one processor: when a block becomes hot, how blocks are linked,
//! and when translations are dropped.

// The tests in this crate use what the tests beside it use.
#[cfg(test)]
extern crate self as anykvm_jit;

mod access;
mod asm;
mod bits;
mod branch;
mod budget;
mod by_count;
mod cache;
mod control;
mod divide;
mod encode;
mod exchange;
pub mod exits;
mod extent;
mod flags;
mod forms;
mod legacy;
pub mod listing;
mod lockstep;
mod loops;
mod memory;
mod plan;
mod privilege;
mod profile;
mod refill;
pub mod regs;
mod run;
mod shared;
mod sharing;
mod simple;
mod stack;
mod strings;
mod stubs;
mod syscall;
mod system;
mod table;

pub mod translate;
mod vectors;
mod views;
mod window;
mod x87;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use anykvm_cpu::memory::fault::CodeMap;
use anykvm_cpu::mode::Mode;
use anykvm_cpu::translator::TranslatorStats;
use anykvm_cpu::{Cpu, Insn};

pub use budget::Budget;

use budget::Account;
use cache::Cache;
use flags::Recipe;
use lockstep::Lockstep;
use profile::Profile;
use shared::Shared;
use stubs::Stubs;
use table::{APART, Table, Translated};
use translate::Manner;
use views::Views;

/// How a [`Jit`] works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes of translated code.
    pub cache: usize,
    /// How often a block is interpreted before it is translated.
    pub threshold: u32,
    /// Count the instructions that translated code executes.
    pub count: bool,
    /// Compare everything that translated code does with the interpreter. The processor must be in
    /// lockstep, too ([`Cpu::set_lockstep`]).
    pub lockstep: bool,
    /// Translated code is entered with a number of instructions after which it is left
    /// ([`anykvm_cpu::translator::Translator::run_by_count`]), and in no other way.
    pub by_count: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache: 64 << 20,
            threshold: 16,
            count: false,
            lockstep: false,
            by_count: false,
        }
    }
}

/// The translator of one processor.
pub struct Jit {
    options: Options,
    /// What the VM's processors may fill of their caches.
    account: Account,
    cache: Cache,
    shared: Box<Shared>,
    stubs: Stubs,
    /// The windows that are taken next, by supervisor and user code.
    next_windows: [window::Next; 2],
    table: Table,
    accesses: CodeMap,
    views: Views,
    profile: Option<Profile>,
    lockstep: Option<Box<Lockstep>>,
    /// For tests: changes what was generated.
    #[cfg(test)]
    spoil: Option<fn(&mut Vec<u8>)>,
    /// The exit whose branch may be led to the block that runs next.
    pending: Option<u32>,
    /// The view, the page and, once it is known, the target's RIP of a pending branch to another page.
    crossed: (u64, u64, u64),
    stats: TranslatorStats,
}

// SAFETY: the raw pointers in `Shared` are set before each entry and used only during it.
unsafe impl Send for Jit {}

/// The host lacks what translated code needs.
fn supported() -> bool {
    // Bit 1 of AT_HWCAP2: FSGSBASE instructions may be used.
    rustix::param::linux_hwcap().1 & 2 != 0
}

impl Jit {
    /// A translator with an empty cache. Fails where the system forbids executable mappings, or
    /// lacks FSGSBASE.
    pub fn new(options: Options) -> io::Result<Self> {
        Self::with_budget(options, &Budget::new(options.cache))
    }

    /// The same for one of several processors, which share a limit instead of `options.cache`.
    pub fn with_budget(options: Options, budget: &Arc<Budget>) -> io::Result<Self> {
        if !supported() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the host does not allow WRGSBASE",
            ));
        }
        let mut account = Account::open(budget);
        let mut cache = Cache::new(budget.limit()).map_err(|e| {
            io::Error::new(e.kind(), format!("no executable memory can be had: {e}"))
        })?;
        let (code, stubs) = stubs::stubs().map_err(io::Error::other)?;
        let base = Some(Cache::room(code.len()))
            .filter(|room| account.take(*room))
            .and_then(|_| cache.add(&code))
            .ok_or_else(|| io::Error::other("the code cache is too small"))?;
        cache.keep();
        let accesses = CodeMap::new(base);
        Ok(Self {
            options,
            account,
            cache,
            shared: Shared::new(),
            stubs: stubs.moved(base),
            next_windows: Default::default(),
            table: Table::default(),
            accesses,
            views: Views::default(),
            profile: None,
            lockstep: options.lockstep.then(Box::default),
            #[cfg(test)]
            spoil: None,
            pending: None,
            crossed: (0, 0, 0),
            stats: TranslatorStats::default(),
        })
    }

    /// From now on counts executions and lists the blocks that executed most instructions in this file,
    /// with their code. Called before anything is translated.
    pub fn report_to(&mut self, file: File) {
        self.profile = Some(Profile::new(file));
    }

    /// The translation of a block, made if it is hot.
    /// `manner`: [`APART`] for the one that shares no checks, or 0.
    fn translation(
        &mut self,
        cpu: &mut Cpu,
        id: anykvm_cpu::block::BlockId,
        manner: u32,
    ) -> Option<u32> {
        let mode = cpu.mode();
        let threshold = self.options.threshold;
        let block = cpu.block(id)?;
        let place = (block.host, mode.bits_packed() | manner);
        if let Some(n) = self.table.find(place, &block.bytes) {
            return Some(n);
        }
        // It counts from the last flush: where the cache is too small for everything that was ever
        // hot, it is for what is hot now.
        let since = (self.stats.flushes as u32) << 16;
        if block.heat & !0xffff != since {
            block.heat = since;
        }
        block.heat += u32::from(block.heat & 0xffff != 0xffff);
        if block.heat & 0xffff < threshold {
            return None;
        }
        let began = Instant::now();
        let mut insns = block.insns.to_vec();
        let mut bytes = block.bytes.to_vec();
        extent::extend(cpu, place.0, &mut insns, &mut bytes);
        let made = self.make(place, insns.into(), bytes.into(), mode, None);
        self.stats.translation_ns += began.elapsed().as_nanos() as u64;
        if made.is_none()
            && let Some(block) = cpu.block(id)
        {
            // It does not fit, or cannot be encoded: not to be tried at each turn.
            block.heat = 0;
        }
        made
    }

    fn make(
        &mut self,
        place: (u64, u32),
        insns: Arc<[Insn]>,
        bytes: Box<[u8]>,
        mode: Mode,
        recipe: Option<Recipe>,
    ) -> Option<u32> {
        let start = place.0 % 4096;
        let counter = self.profile.as_mut().map(Profile::counter);
        let next_windows = &mut self.next_windows[usize::from(mode.user())];
        let manner = Manner {
            first_exit: self.table.next_exit(),
            count: self.options.count || self.options.lockstep,
            same_each_time: self.options.lockstep || self.options.by_count,
            by_count: self.options.by_count,
            executions: counter.map(|c| c.1),
            apart: place.1 & APART != 0,
            supervisor: mode.cpl0(),
            windows: *next_windows,
            user: mode.user(),
            recipe,
        };
        let mut t = translate::translate(&insns, start, manner).ok()?;
        if let Some(next) = t.windows {
            *next_windows = next;
        }
        #[cfg(test)]
        if let Some(spoil) = self.spoil {
            spoil(&mut t.bytes);
        }
        let room = Cache::room(t.bytes.len());
        if !self.account.take(room) {
            if self.account.could_take(self.cache.kept() + room) {
                self.flush();
            }
            return None;
        }
        let base = self.cache.next();
        t.connect(base, &self.stubs);
        let base = self.cache.add(&t.bytes)?;
        for (access, resume) in &t.accesses {
            self.accesses
                .push(base + *access as u64, base + *resume as u64);
        }
        if let (Some(profile), Some(counter)) = (&mut self.profile, counter) {
            let code = (base, t.bytes.len());
            profile.add(insns.clone(), bytes.clone(), code, counter.0);
        }
        self.stats.blocks += 1;
        self.stats.block_instructions += insns.len() as u64;
        let first = self.table.next_exit();
        let n = self.table.insert(
            place,
            Translated {
                checked: base + t.checked as u64,
                warm: base + t.warm as u64,
                x87: t.x87,
                plain: base + t.plain as u64,
                insns,
                bytes,
                level: t.level,
                recipes: t.recipes,
                wants_recipe: t.wants_recipe,
                host: place.0,
                base,
                len: t.bytes.len(),
                incoming: Vec::new(),
            },
            &t.exits,
        );
        self.table.insert_crossings(first, &t.crossings);
        Some(n)
    }

    /// Forgets all translations.
    fn flush(&mut self) {
        if let Some(profile) = &mut self.profile {
            profile.keep(|at, len| self.cache.read(at, len));
        }
        self.table = Table::default();
        self.accesses.clear();
        self.cache.clear();
        self.account.keep(self.cache.used());
        self.pending = None;
        self.views.clear();
        self.stats.flushes += 1;
    }

    /// Checks all translations of a page against memory.
    fn check_page(&mut self, cpu: &mut Cpu, host: u64) {
        let changed = self
            .table
            .changed(host, |host, bytes| cpu.code_is(host, bytes));
        if changed.is_empty() {
            return;
        }
        self.stats.dropped += changed.len() as u64;
        let codes: Vec<_> = (changed.iter())
            .filter_map(|n| self.table.get(*n).map(|t| t.checked))
            .collect();
        self.views.remove(&codes);
        for n in changed {
            let (holes, guards) = self.table.remove(n);
            for (hole, to) in holes {
                self.redirect(hole, to);
            }
            self.unguard(&guards);
        }
    }

    /// Branches to other pages are good in no view any more.
    fn unguard(&mut self, guards: &[u64]) {
        for guard in guards {
            self.cache.patch(*guard, 0);
        }
    }

    /// The branch displacement at `hole` leads to `to`.
    fn redirect(&mut self, hole: u64, to: u64) {
        let displacement = to.wrapping_sub(hole + 4) as i32;
        self.cache.patch(hole, displacement);
    }

    /// Leads the branch of an exit to a translation, if that is where it goes. Only branches may lead to one
    /// that knows how to make the flags: what runs next need not have come by this branch.
    fn link(&mut self, exit: u32, n: u32, mode: Mode) {
        if self.table.crosses(exit) {
            self.cross(exit, n);
            return;
        }
        if !self.table.leads_to(exit, n) {
            return;
        }
        let better = self.with_recipe(exit, n, mode);
        if let Some((hole, to)) = self.table.link(exit, better.unwrap_or(n)) {
            self.redirect(hole, to);
        }
    }

    /// Leads the branch to another page that was left last to this translation, in the current view.
    fn cross(&mut self, exit: u32, n: u32) {
        let (view, page, rip) = self.crossed;
        let (Some(number), Some(origin)) = (self.views.number(), self.table.origin(exit)) else {
            return;
        };
        if u64::from(number) != view || self.views.is_several(origin) {
            return;
        }
        if let Some((guard, hole, to)) = self.table.cross(exit, n, page, rip) {
            self.redirect(hole, to);
            self.cache.patch(guard, number as i32);
        }
    }

    /// The translation that knows how to make the flags behind this exit, if `n` would be better for it.
    fn with_recipe(&mut self, exit: u32, n: u32, mode: Mode) -> Option<u32> {
        let (place, recipe) = self.table.better_place(exit, n)?;
        let t = self.table.get(n)?;
        let (insns, bytes) = (t.insns.clone(), t.bytes.clone());
        if let Some(n) = self.table.find(place, &bytes) {
            return Some(n);
        }
        let began = Instant::now();
        let made = self.make(place, insns, bytes, mode, Some(recipe));
        self.stats.translation_ns += began.elapsed().as_nanos() as u64;
        made
    }
}

impl Drop for Jit {
    fn drop(&mut self) {
        if let Some(profile) = &mut self.profile {
            profile.write(|at, len| self.cache.read(at, len));
        }
    }
}
