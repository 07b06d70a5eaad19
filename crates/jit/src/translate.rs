//! From a block of guest instructions to host code.
//!
//! Every instruction boundary is precise: registers are in their homes, memory is as the guest
//! left it, and the flags are in the host's flags or can be put there. So an instruction that
//! cannot go on (a TLB miss, a device, anything rare) leaves the block in front of itself, the
//! interpreter carries it out, and the block is entered again behind it.

use anykvm_cpu::Insn;
use iced_x86::{Code, FlowControl, IcedError, InstructionInfoFactory, Register};

use crate::access::{Probe, Refill};
use crate::asm::{Asm, Constant, Hole, at, slot};
use crate::branch::{self, Crossing};
use crate::by_count;
use crate::control;
use crate::exits::{Exit, Exits, Wish};
use crate::extent;
use crate::flags::{Flags, Recipe};
use crate::legacy::Word;
use crate::lockstep;
use crate::loops;
use crate::plan::Plan;
use crate::regs::{POINTER, SCRATCH};
use crate::shared::Slot;
use crate::sharing::Sharing;
use crate::simple;
use crate::stubs::{Stub, Stubs};
use crate::system;
use crate::vectors::Level;
use crate::window;
use crate::x87;

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
    pub exits: Vec<Exit>,
    /// Branches to other pages, with the numbers of their exits.
    pub crossings: Vec<(usize, Crossing)>,
    /// The vector registers it needs; the entry points see to it themselves.
    pub level: Level,
    /// Calls and jumps to stubs.
    pub(crate) outward: Vec<(Hole, Stub)>,
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
    /// Leads the branches to the stubs; the code is about to stand at `base`.
    pub fn connect(&mut self, base: u64, stubs: &Stubs) {
        for (hole, stub) in &self.outward {
            let from = base + hole.0 as u64 + 4;
            let distance = stubs.address(*stub).wrapping_sub(from) as i32;
            self.bytes[hole.0..hole.0 + 4].copy_from_slice(&distance.to_le_bytes());
        }
    }
}

/// A translation in progress.
pub(crate) struct Block {
    pub a: Asm,
    pub flags: Flags,
    pub late: Vec<branch::Late>,
    /// Branches to other pages, and their exits.
    pub crossings: Vec<(usize, Crossing)>,
    pub exits: Exits,
    /// Positions of accesses, and the exits that undo them.
    accesses: Vec<(usize, usize)>,
    /// Positions of accesses, and where to go on if they fault.
    resumptions: Vec<(usize, usize)>,
    pub first_exit: u32,
    /// Offset of the block's first byte in its page.
    pub start: i64,
    /// The size of addresses, of the stack's entries and of the instruction pointer.
    pub word: Word,
    /// CPL 0.
    pub supervisor: bool,
    /// CPL 3.
    pub user: bool,
    /// It needs the x87 state loaded. Then it is never resumed, because only entry points load that.
    pub x87: bool,
    /// How its instructions are renamed, those that have a plan.
    pub plans: Vec<Option<Plan>>,
    /// Which accesses share a check.
    pub sharing: Sharing,
    /// Groups that have been checked, and where their addends are.
    pub addends: Vec<(usize, i64)>,
    /// The windows it takes, if it is to use any.
    pub windows: Option<window::Taken>,
    /// Groups that a window is asked for: which, and how the first byte must be aligned.
    pub windowed: Vec<(usize, u32, i64)>,
    /// An instruction is left to the interpreter each time.
    pub interpreted: bool,
    /// The branch that closes the loop, if it may go on without checks.
    pub again: Option<loops::Again>,
    /// The groups that need no check, and their windows.
    pub hoisted: Vec<(usize, u32)>,
    /// The loop without checks, while that is emitted.
    pub repeating: Option<loops::Repeating>,
    /// Accesses to the stack use its windows.
    pub stack_windows: bool,
    pub probes: Vec<Probe>,
    pub refills: Vec<Refill>,
    /// Calls and jumps to stubs.
    pub outward: Vec<(Hole, Stub)>,
    pub recipes: Vec<Recipe>,
    /// The exit taken last for nothing but faults of the host: there is nothing to resume.
    pub fault_exit: Option<usize>,
    /// Instructions that have been counted before they are executed, from the first on.
    pub counted: usize,
    /// See [`Manner::by_count`].
    pub by_count: bool,
    /// Instructions, by index, that are behind an STI.
    pub shadowed: Vec<usize>,
}

/// How a block is to be translated.
#[derive(Clone, Debug)]
pub struct Manner {
    /// The number of its first exit.
    pub first_exit: u32,
    /// The code counts the instructions it executes.
    pub count: bool,
    /// What differs each time it is executed is left to the interpreter.
    pub same_each_time: bool,
    /// The code looks in front of each instruction whether it may execute one more ([`crate::by_count`]).
    pub by_count: bool,
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
        executions,
        ..
    } = manner;
    let mut factory = InstructionInfoFactory::new();
    let plans = simple::plans(insns, start as i64, &mut factory);
    let windows = !manner.apart && is_loop(insns, start as i64);
    let mut b = Block {
        a: Asm::with_room(64 * insns.len() + 256),
        flags: Flags::Host(manner.recipe.clone()),
        late: Vec::new(),
        crossings: Vec::new(),
        exits: Exits::for_block(insns.len()),
        accesses: Vec::with_capacity(insns.len()),
        resumptions: Vec::new(),
        first_exit,
        start: start as i64,
        word: insns.first().map_or(Word::Quad, Word::of),
        supervisor: manner.supervisor,
        user: manner.user,
        x87: insns
            .iter()
            .any(|i| x87::belongs(&i.raw) && x87::executes(&i.raw)),
        sharing: if manner.apart {
            Sharing::none()
        } else {
            Sharing::of(insns, &plans, start as i64, &mut factory)
        },
        plans,
        addends: Vec::new(),
        windows: windows.then(|| window::Taken::new(manner.windows, manner.user)),
        windowed: Vec::new(),
        interpreted: false,
        again: None,
        hoisted: Vec::new(),
        repeating: None,
        stack_windows: !manner.apart,
        probes: Vec::new(),
        refills: Vec::with_capacity(insns.len()),
        outward: Vec::with_capacity(2 * insns.len() + 4),
        recipes: Vec::new(),
        fault_exit: None,
        counted: 0,
        by_count: manner.by_count,
        shadowed: Vec::new(),
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
    static GO: Constant = Constant::new(|a| {
        a.load(POINTER, slot(Slot::Go))?;
        a.emit(Code::Mov_r32_rm32, Register::ECX, at(POINTER, 0))
    });
    b.a.constant(&GO)?;
    b.a.jrcxz_back(island.0 - 1);
    let entries = [checked, warm, b.a.here()];
    if let Some(counter) = executions {
        b.count_execution(counter)?;
    }
    let exit = b.exits.add(Wish::Request, b.start, Flags::Host(None));
    b.exits.lead(island, exit);

    let wants_recipe = b.emit_all(insns, &manner)?;
    loops::emit(&mut b, insns, &manner, &mut factory)?;
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
        self.outward.push((call, Stub::Load(level)));
        let back = self.a.jmp();
        let exit = (self.exits).add(Wish::Block, self.start, Flags::Host(None));
        self.exits.lead(refuse, exit);
        Ok(Loader {
            start: start_of_test,
            back: Some(back),
        })
    }

    /// Adds one to a counter, leaving the flags alone.
    pub fn count_execution(&mut self, counter: u64) -> Result<(), IcedError> {
        let mov = Code::Mov_r64_imm64;
        self.a.emit(mov, SCRATCH, counter as i64)?;
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

    /// Emits the instructions of the block; returns whether it would be better if it was known how to make the
    /// flags it is entered with.
    pub fn emit_all(&mut self, insns: &[Insn], manner: &Manner) -> Result<bool, IcedError> {
        let mut at = self.start;
        let mut ended = false;
        let mut counted = 0;
        let (mut flags_changed, mut wants_recipe) = (false, false);
        for (k, insn) in insns.iter().enumerate() {
            if manner.count && k == counted {
                counted += self.count_run(&insns[k..])?;
                self.counted = counted;
            }
            let next = at + i64::from(insn.len);
            let site = Site { k, at, next };
            if manner.by_count {
                self.spend_one(site)?;
                self.counted = k + 1;
            }
            let later = insns.get(k + 1..).unwrap_or_default();
            let left = manner.same_each_time && lockstep::varies(&insn.raw)
                || manner.by_count && by_count::is_several(insn);
            let done = if left {
                Done::Unsupported
            } else {
                self.emit(insn, site, later)?
            };
            match done {
                Done::Next => {}
                Done::Ends => ended = true,
                Done::Unsupported => {
                    self.interpreted = true;
                    self.interpret(site, !insn.ends_block)?;
                    ended = insn.ends_block;
                }
            }
            wants_recipe |= self.a.keeps_flags && !flags_changed;
            flags_changed |= insn.raw.rflags_modified() & simple::STATUS != 0;
            at = next;
        }
        if !ended {
            branch::go_on(self, at)?;
        }
        Ok(wants_recipe)
    }

    /// Emits an instruction.
    fn emit(&mut self, insn: &Insn, site: Site, later: &[Insn]) -> Result<Done, IcedError> {
        let done = control::emit(self, insn, site)?;
        if !matches!(done, Done::Unsupported) {
            return Ok(done);
        }
        let done = if insn.raw.flow_control() == FlowControl::Next && !insn.ends_block {
            simple::emit(self, insn, site, later)?
        } else {
            branch::emit(self, insn, site, later.is_empty())?
        };
        match done {
            Done::Unsupported => system::emit(self, insn, site, later),
            done => Ok(done),
        }
    }

    /// The instruction at a position accesses guest RAM. If it faults, this exit is taken.
    pub fn access_at(&mut self, position: usize, exit: usize) {
        self.accesses.push((position, exit));
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
        if let Some(exit) = exit {
            self.exits.put_aside(exit, aside);
        }
        Ok(())
    }

    /// The interpreter carries out the instruction.
    fn interpret(&mut self, site: Site, go_on: bool) -> Result<(), IcedError> {
        self.flags.restore(&mut self.a)?;
        self.flags = Flags::Host(None);
        let hole = self.a.jmp();
        let exit = self.leave_from(&[hole], site);
        if go_on {
            self.resume_here(exit);
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
        let (exits, starts) = self.emit_exits()?;
        let start = |(at, exit): (usize, usize)| (at, starts[exit]);
        let mut accesses: Vec<_> = self.accesses.into_iter().map(start).collect();
        accesses.extend(self.resumptions);
        accesses.sort_unstable();
        Ok(Translation {
            bytes: self.a.into_bytes(),
            checked: entries[0],
            warm: entries[1],
            x87: self.x87,
            plain: entries[2],
            exits,
            crossings: self.crossings,
            outward: self.outward,
            level,
            windows: self.windows.as_ref().map(window::Taken::next),
            recipes: self.recipes,
            wants_recipe,
            accesses,
        })
    }
}
