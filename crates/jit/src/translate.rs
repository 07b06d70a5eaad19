//! From a block of guest instructions to host code.
//!
//! Every instruction boundary is precise: registers are in their homes, memory is as the guest
//! left it, and the flags are in the host's flags or can be put there. So an instruction that
//! cannot go on (a TLB miss, a device, anything rare) leaves the block in front of itself, the
//! interpreter carries it out, and the block is entered again behind it.

use anykvm_cpu::Insn;
use iced_x86::{FlowControl, IcedError, Instruction, Register};

use crate::access::{Helper, Probe, Refill};
use crate::asm::{Asm, Hole, at, slot};
use crate::branch::{self, Crossing};
use crate::extent;
use crate::flags::{Flags, Recipe};
use crate::legacy::Word;
use crate::regs::{POINTER, SCRATCH};
use crate::shared::Slot;
use crate::sharing::Sharing;
use crate::simple;
use crate::system;
use crate::vectors::Level;
use crate::window;
use crate::x87;

/// What an exit asks of the translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Interpret instruction `insn` of the block; if nothing else happens, go on at `resume`, a
    /// position in the block's code.
    Interpret {
        /// Its index.
        insn: usize,
        /// Where the next instruction's code begins.
        resume: Option<usize>,
        /// The code there relies on checks made before: it must not be entered if the TLB may have
        /// dropped something.
        guarded: bool,
    },
    /// Go on at RIP, which is `offset` bytes into the page; then let the branch displacement at
    /// `hole` lead there directly.
    Link {
        /// Position of the displacement.
        hole: usize,
        /// Position the branch has now: the exit's own code.
        unlinked: usize,
        /// Offset in the page.
        offset: u64,
        /// Go on in a translation that shares no checks; so many instructions less have been executed
        /// than counted.
        apart: Option<usize>,
        /// How the flags can be made there: index in [`Translation::recipes`].
        recipe: Option<usize>,
    },
    /// Look at requests; RIP is the block's first instruction.
    Request,
    /// Interpret the block at RIP: its vector instructions need more than translated code can do.
    Block,
}

/// A translation, not yet in the code cache.
pub struct Translation {
    /// The code; position-independent but for `stub_jumps`.
    pub bytes: Vec<u8>,
    /// Entry point that looks at requests first.
    pub checked: usize,
    /// The same where the vector registers it needs are in the host's.
    pub warm: usize,
    /// It needs the x87 state loaded.
    pub x87: bool,
    /// The same again for branches that cannot close a loop: nothing is looked at.
    pub plain: usize,
    /// The exits, in the order of their numbers.
    pub exits: Vec<Wish>,
    /// Branches to other pages, with the numbers of their exits.
    pub crossings: Vec<(usize, Crossing)>,
    /// Jumps to the common way out.
    pub leaves: Vec<Hole>,
    /// The vector registers it needs; the entry points see to it themselves.
    pub level: Level,
    /// Calls of the functions that load registers, and which.
    pub loads: Vec<(Hole, usize)>,
    /// Calls of helpers.
    pub(crate) calls: Vec<(Hole, Helper)>,
    /// The windows that the next translation takes, if this one has taken any.
    pub windows: Option<window::Next>,
    /// How flags can be made behind links.
    pub recipes: Vec<Recipe>,
    /// It would be better if it was known how to make the flags it is entered with.
    pub wants_recipe: bool,
    /// Instructions that access guest RAM, and where to go on if that faults.
    pub accesses: Vec<(usize, usize)>,
}

impl Translation {
    /// Leads the jumps to the common way out and the calls to the loaders of vector registers; the code
    /// is about to stand at `base`.
    pub fn connect(&mut self, base: u64, way_out: u64, loaders: &[u64; 5], helpers: &[u64; 4]) {
        let leaves = self.leaves.iter().map(|hole| (*hole, way_out));
        let loads = self.loads.iter().map(|(hole, n)| (*hole, loaders[*n]));
        let calls = self
            .calls
            .iter()
            .map(|(hole, helper)| (*hole, helpers[helper.number()]));
        for (hole, to) in leaves.chain(loads).chain(calls) {
            let distance = to.wrapping_sub(base + hole.0 as u64 + 4) as i32;
            self.bytes[hole.0..hole.0 + 4].copy_from_slice(&distance.to_le_bytes());
        }
    }
}

/// Something to emit behind the block.
pub(crate) struct Cold {
    /// The branches that lead here.
    pub holes: Vec<Hole>,
    /// Flags there.
    pub flags: Flags,
    /// Offset of RIP in (or from) the page.
    pub offset: i64,
    /// Index in the list of exits.
    pub exit: usize,
    /// A register to be put aside for the flags' recipe where the block is resumed.
    pub aside: Option<Register>,
}

/// A translation in progress.
pub(crate) struct Block {
    pub a: Asm,
    pub flags: Flags,
    pub cold: Vec<Cold>,
    pub late: Vec<branch::Late>,
    /// Branches to other pages, and their exits.
    pub crossings: Vec<(usize, Crossing)>,
    pub exits: Vec<Wish>,
    leaves: Vec<Hole>,
    /// Positions of accesses, and the exits that undo them.
    accesses: Vec<(usize, usize)>,
    /// Positions of accesses, and where to go on if they fault.
    resumptions: Vec<(usize, usize)>,
    pub loads: Vec<(Hole, usize)>,
    first_exit: u32,
    /// Offset of the block's first byte in its page.
    pub start: i64,
    /// The size of addresses, of the stack's entries and of the instruction pointer.
    pub word: Word,
    /// CPL 0.
    pub supervisor: bool,
    /// It needs the x87 state loaded. Then it is never resumed, because only entry points load that.
    x87: bool,
    /// Which accesses share a check.
    pub sharing: Sharing,
    /// Groups that have been checked, and where their addends are.
    pub addends: Vec<(usize, i64)>,
    /// The windows it takes, if it is to use any.
    pub windows: Option<window::Taken>,
    pub probes: Vec<Probe>,
    pub refills: Vec<Refill>,
    pub calls: Vec<(Hole, Helper)>,
    pub recipes: Vec<Recipe>,
    /// The exit taken last for nothing but faults of the host: there is nothing to resume.
    pub fault_exit: Option<usize>,
    /// Instructions that have been counted before they are executed, from the first on.
    pub counted: usize,
}

/// How a block is to be translated.
#[derive(Clone, Debug)]
pub struct Manner {
    /// The number of its first exit.
    pub first_exit: u32,
    /// The code counts the instructions it executes.
    pub count: bool,
    /// It counts how often it is entered: the address of a 64-bit counter.
    pub executions: Option<u64>,
    /// Each access is checked by itself.
    pub apart: bool,
    /// For code at CPL 0.
    pub supervisor: bool,
    /// The windows it takes next, for user or supervisor code.
    pub windows: window::Next,
    /// For code at CPL 3.
    pub user: bool,
    /// How the flags can be made with which it is entered, wherever from.
    pub recipe: Option<Recipe>,
}

/// How an instruction was translated.
pub(crate) enum Done {
    /// Completely; control goes on behind it.
    Next,
    /// It ends the block.
    Ends,
    /// Not at all; nothing was emitted.
    Unsupported,
}

/// Whether a block's last instruction leads back to the block or in front of it.
fn is_loop(insns: &[Insn], start: i64) -> bool {
    let end = start + insns.iter().map(|i| i64::from(i.len)).sum::<i64>();
    insns.last().is_some_and(|last| {
        let branch = matches!(
            last.raw.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        branch && (0..=start).contains(&end.wrapping_add(last.imm as i64))
    })
}

/// Translates instructions that begin `start` bytes into their page.
pub fn translate(insns: &[Insn], start: u64, manner: Manner) -> Result<Translation, IcedError> {
    let Manner {
        first_exit,
        count,
        executions,
        ..
    } = manner;
    let windows = !manner.apart && is_loop(insns, start as i64);
    let mut b = Block {
        a: Asm::new(),
        flags: Flags::Host(manner.recipe),
        cold: Vec::new(),
        late: Vec::new(),
        crossings: Vec::new(),
        exits: Vec::new(),
        leaves: Vec::new(),
        accesses: Vec::new(),
        resumptions: Vec::new(),
        loads: Vec::new(),
        first_exit,
        start: start as i64,
        word: insns.first().map_or(Word::Quad, Word::of),
        supervisor: manner.supervisor,
        x87: insns
            .iter()
            .any(|i| x87::belongs(&i.raw) && x87::executes(&i.raw)),
        sharing: if manner.apart {
            Sharing::none()
        } else {
            Sharing::of(insns, start as i64)
        },
        addends: Vec::new(),
        windows: windows.then(|| window::Taken::new(manner.windows, manner.user)),
        probes: Vec::new(),
        refills: Vec::new(),
        calls: Vec::new(),
        recipes: Vec::new(),
        fault_exit: None,
        counted: 0,
    };
    let level = extent::level(insns);
    // JRCXZ reaches only a short way; so these are in front of it.
    let load = b.vector_loader(level)?;
    let x87 = if b.x87 { Some(b.x87_loader()?) } else { None };
    let island = b.a.jmp();
    let checked = b.a.here();
    if level != Level::None {
        b.a.load(POINTER, slot(level.live()))?;
        b.a.jrcxz_back(load.start);
        let here = b.a.here();
        if let Some(back) = load.back {
            b.a.fill(back, here);
        }
    }
    if let Some(loader) = &x87 {
        b.x87_test(loader)?;
    }
    let warm = b.a.here();
    b.a.load(POINTER, slot(Slot::Go))?;
    b.a.put(&Instruction::with2(
        iced_x86::Code::Mov_r32_rm32,
        Register::ECX,
        at(POINTER, 0),
    )?)?;
    b.a.jrcxz_back(island.0 - 1);
    let entries = [checked, warm, b.a.here()];
    if let Some(counter) = executions {
        b.count_execution(counter)?;
    }
    let exit = b.new_exit(Wish::Request);
    b.cold.push(Cold {
        holes: vec![island],
        flags: Flags::Host(None),
        offset: b.start,
        exit,
        aside: None,
    });

    let mut at = b.start;
    let mut ended = false;
    let mut counted = 0;
    let (mut flags_changed, mut wants_recipe) = (false, false);
    for (k, insn) in insns.iter().enumerate() {
        if count && k == counted {
            counted += b.count_run(&insns[k..])?;
            b.counted = counted;
        }
        let next = at + i64::from(insn.len);
        let site = Site { k, at, next };
        let later = insns.get(k + 1..).unwrap_or_default();
        let done = if insn.raw.flow_control() == FlowControl::Next && !insn.ends_block {
            simple::emit(&mut b, insn, site, later)?
        } else {
            branch::emit(&mut b, insn, site, later.is_empty())?
        };
        let done = match done {
            Done::Unsupported => system::emit(&mut b, insn, site)?,
            done => done,
        };
        match done {
            Done::Next => {}
            Done::Ends => ended = true,
            Done::Unsupported => {
                b.interpret(site, !insn.ends_block)?;
                ended = insn.ends_block;
            }
        }
        wants_recipe |= b.a.keeps_flags && !flags_changed;
        flags_changed |= insn.raw.rflags_modified() & simple::STATUS != 0;
        at = next;
    }
    if !ended {
        branch::go_on(&mut b, at)?;
    }
    branch::emit_late(&mut b)?;
    b.finish(entries, level, wants_recipe)
}

/// Instructions up to the next one that may branch away: they are counted together.
pub(crate) fn run_length(insns: &[Insn]) -> usize {
    let before = insns.iter().position(|i| i.ends_block);
    before.map_or(insns.len(), |n| n + 1)
}

/// Where an instruction is.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    /// Its index in the block.
    pub k: usize,
    /// Its offset in the page.
    pub at: i64,
    /// The next one's offset.
    pub next: i64,
}

/// The code that loads vector registers, when a block is entered without them.
struct Loader {
    start: usize,
    back: Option<Hole>,
}

impl Block {
    /// Emits the code that loads the registers of a level, or leaves the block to the interpreter if
    /// translated code must not use them.
    fn vector_loader(&mut self, level: Level) -> Result<Loader, IcedError> {
        let start = self.a.here();
        if level == Level::None {
            return Ok(Loader { start, back: None });
        }
        let refuse = self.a.jmp();
        let start_of_test = self.a.here();
        self.a.load(POINTER, slot(level.allowed()))?;
        self.a.jrcxz_back(start);
        let call = self.a.call();
        self.loads.push((call, level as usize));
        let back = self.a.jmp();
        let exit = self.new_exit(Wish::Block);
        self.cold.push(Cold {
            holes: vec![refuse],
            flags: Flags::Host(None),
            offset: self.start,
            exit,
            aside: None,
        });
        Ok(Loader {
            start: start_of_test,
            back: Some(back),
        })
    }

    /// Adds one to a counter, leaving the flags alone.
    fn count_execution(&mut self, counter: u64) -> Result<(), IcedError> {
        let mov = iced_x86::Code::Mov_r64_imm64;
        self.a.put(&Instruction::with2(mov, SCRATCH, counter)?)?;
        self.a.load(POINTER, at(SCRATCH, 0))?;
        self.a.lea(POINTER, at(POINTER, 1))?;
        self.a.store(at(SCRATCH, 0), POINTER)
    }

    /// Counts the instructions up to the next one that may branch away; returns how many they are.
    fn count_run(&mut self, insns: &[Insn]) -> Result<usize, IcedError> {
        let run = run_length(insns);
        self.a.load(POINTER, slot(Slot::Instructions))?;
        self.a.lea(POINTER, at(POINTER, run as i64))?;
        self.a.store(slot(Slot::Instructions), POINTER)?;
        Ok(run)
    }

    pub fn new_exit(&mut self, wish: Wish) -> usize {
        self.exits.push(wish);
        self.exits.len() - 1
    }

    /// These branches, taken with the flags as they are now, leave the instruction to the
    /// interpreter. The place to resume is filled in by [`Block::resume_here`].
    pub fn leave_from(&mut self, holes: Vec<Hole>, site: Site) -> usize {
        let exit = self.new_exit(Wish::Interpret {
            insn: site.k,
            resume: None,
            guarded: self.sharing.spans(site.k),
        });
        self.cold.push(Cold {
            holes,
            flags: self.flags.clone(),
            offset: site.at,
            exit,
            aside: None,
        });
        exit
    }

    /// The instruction at a position accesses guest RAM. If it faults, this exit is taken.
    pub fn access_at(&mut self, position: usize, exit: usize) {
        self.accesses.push((position, exit));
    }

    /// A branch, taken with the flags as they were there, leads to an exit.
    pub fn lead_to(&mut self, hole: Hole, exit: usize) {
        let cold = self.cold.iter_mut().rev().find(|c| c.exit == exit);
        if let Some(cold) = cold {
            cold.holes.push(hole);
        }
    }

    /// The instruction at a position accesses guest RAM. If it faults, go on at another position, from where
    /// the block must be left.
    pub fn resume_fault(&mut self, position: usize, resume: usize) {
        self.resumptions.push((position, resume));
    }

    /// See [`Flags::before_write`]. `exit`: the one in front of the instruction that is to write, if
    /// the block may be resumed behind it.
    pub fn before_write(
        &mut self,
        written: u16,
        exit: Option<usize>,
        eager: bool,
    ) -> Result<(), IcedError> {
        let aside = self.flags.before_write(&mut self.a, written, eager)?;
        let front = self.cold.iter_mut().rev().find(|c| Some(c.exit) == exit);
        if let Some(cold) = front {
            cold.aside = aside;
        }
        Ok(())
    }

    /// After the interpreter has carried out the instruction of this exit, go on here.
    pub fn resume_here(&mut self, exit: usize) {
        if self.x87 {
            return;
        }
        if self.fault_exit == Some(exit) {
            return;
        }
        self.a.pointer = None;
        let here = self.a.here();
        if let Some(Wish::Interpret { resume, .. }) = self.exits.get_mut(exit) {
            *resume = Some(here);
        }
    }

    /// The interpreter carries out the instruction.
    fn interpret(&mut self, site: Site, go_on: bool) -> Result<(), IcedError> {
        self.flags.restore(&mut self.a)?;
        self.flags = Flags::Host(None);
        let hole = self.a.jmp();
        let exit = self.leave_from(vec![hole], site);
        if go_on {
            self.resume_here(exit);
        }
        Ok(())
    }

    /// Goes on at an offset in the same page. The flags are in the host's.
    pub fn link_to(&mut self, offset: i64) -> Result<(), IcedError> {
        let hole = self.a.jmp();
        self.link(hole, offset);
        Ok(())
    }

    /// The branch at `hole` goes to an offset in the same page.
    pub fn link(&mut self, hole: Hole, offset: i64) {
        let recipe = self.flags.recipe().map(|recipe| {
            self.recipes.push(recipe.clone());
            self.recipes.len() - 1
        });
        let exit = self.new_exit(Wish::Link {
            hole: hole.0,
            unlinked: 0,
            offset: offset as u64,
            apart: None,
            recipe,
        });
        self.cold.push(Cold {
            holes: vec![hole],
            flags: Flags::Host(None),
            offset,
            exit,
            aside: None,
        });
    }

    /// A branch to the translation that shares nothing; it leads behind itself at first.
    fn go_apart(&mut self, exit: usize, undone: usize) -> Result<(), IcedError> {
        if undone > 0 {
            self.a.load(POINTER, slot(Slot::Instructions))?;
            self.a.lea(POINTER, at(POINTER, -(undone as i64)))?;
            self.a.store(slot(Slot::Instructions), POINTER)?;
        }
        let jump = self.a.jmp();
        self.a.land(jump);
        let here = self.a.here();
        if let Some(Wish::Link { hole, unlinked, .. }) = self.exits.get_mut(exit) {
            (*hole, *unlinked) = (jump.0, here);
        }
        Ok(())
    }

    fn finish(
        mut self,
        entries: [usize; 3],
        level: Level,
        wants_recipe: bool,
    ) -> Result<Translation, IcedError> {
        self.emit_probes()?;
        let mut starts = vec![0; self.exits.len()];
        for cold in std::mem::take(&mut self.cold) {
            let here = self.a.here();
            starts[cold.exit] = here;
            for hole in cold.holes {
                self.a.fill(hole, here);
            }
            cold.flags.emit_restore(&mut self.a)?;
            let wish = self.exits.get(cold.exit).copied();
            if let Some(Wish::Link {
                apart: Some(undone),
                ..
            }) = wish
            {
                self.go_apart(cold.exit, undone)?;
            } else if let Some(Wish::Link { unlinked, .. }) = self.exits.get_mut(cold.exit) {
                *unlinked = here;
            }
            if let Some(r) = cold.aside {
                self.a.store(slot(Slot::Operand), r)?;
            }
            self.a.load(POINTER, slot(Slot::Page))?;
            self.a.lea(POINTER, at(POINTER, cold.offset))?;
            self.a.store(slot(Slot::Rip), POINTER)?;
            let number = self.first_exit + cold.exit as u32;
            self.a.store_u32(slot(Slot::Exit), number)?;
            let leave = self.a.jmp();
            self.leaves.push(leave);
        }
        let exits = |(at, exit): (usize, usize)| (at, starts[exit]);
        let mut accesses: Vec<_> = self.accesses.into_iter().map(exits).collect();
        accesses.extend(self.resumptions);
        accesses.sort_unstable();
        Ok(Translation {
            bytes: self.a.into_bytes(),
            checked: entries[0],
            warm: entries[1],
            x87: self.x87,
            plain: entries[2],
            exits: self.exits,
            crossings: self.crossings,
            leaves: self.leaves,
            level,
            loads: self.loads,
            calls: self.calls,
            windows: self.windows.as_ref().map(window::Taken::next),
            recipes: self.recipes,
            wants_recipe,
            accesses,
        })
    }
}
