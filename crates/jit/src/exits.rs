//! How translated code is left: what an exit asks of the translator, and the code of exits, which stands
//! behind a translation.
//!
//! An exit's code makes the flags, says its number and jumps to the common way out. Where RIP is then the
//! translator knows by the number.

use iced_x86::{IcedError, Register};

use crate::asm::{Hole, at, slot};
use crate::flags::Flags;
use crate::regs::POINTER;
use crate::shared::Slot;
use crate::stubs::Stub;
use crate::system;
use crate::translate::{Block, Site};

/// What an exit asks of the translator. Positions are relative to the translation's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Interpret instruction `insn` of the block; if nothing else happens, go on at `resume`, a
    /// position in the block's code.
    Interpret {
        /// Its index.
        insn: u16,
        /// The code there relies on checks made before: it must not be entered if the TLB may have
        /// dropped something.
        guarded: bool,
        /// Where the next instruction's code begins.
        resume: Option<u32>,
    },
    /// Go on at RIP; then let the branch displacement at `hole` lead there directly.
    Link {
        /// Position of the displacement.
        hole: u32,
        /// Position the branch has now: the exit's own code.
        unlinked: u32,
        /// Go on in a translation that shares no checks; so many instructions less have been executed
        /// than counted.
        apart: Option<u16>,
        /// How the flags can be made there: index in [`crate::translate::Translation::recipes`].
        recipe: Option<u16>,
    },
    /// Look at requests; RIP is the block's first instruction. Or the number of instructions that might be
    /// executed is used up, at any of them.
    Request,
    /// Interpret the block at RIP: its vector instructions need more than translated code can do.
    Block,
}

/// A way out of a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Offset of RIP in (or from) the page.
    pub offset: i32,
    /// See [`Wish`].
    pub wish: Wish,
}

/// An exit whose code is to be emitted behind the block.
pub(crate) struct Leaving {
    exit: Exit,
    /// Flags there.
    flags: Flags,
    /// A register to be put aside for the flags' recipe where the block is resumed.
    aside: Option<Register>,
    /// The instruction is behind an STI.
    shadow: bool,
}

/// The exits of a block, and the branches that lead to them.
#[derive(Default)]
pub(crate) struct Exits {
    list: Vec<Leaving>,
    branches: Vec<(Hole, usize)>,
}

impl Exits {
    /// None yet, with room for those of a block of so many instructions.
    pub fn for_block(insns: usize) -> Self {
        Self {
            list: Vec::with_capacity(insns + 4),
            branches: Vec::with_capacity(2 * insns + 4),
        }
    }

    /// Adds an exit that is taken with these flags, where RIP is `offset` bytes from the page.
    pub fn add(&mut self, wish: Wish, offset: i64, flags: Flags) -> usize {
        let offset = offset as i32;
        self.list.push(Leaving {
            exit: Exit { offset, wish },
            flags,
            aside: None,
            shadow: false,
        });
        self.list.len() - 1
    }

    /// A branch, taken with the flags as they are at the exit, leads to it.
    pub fn lead(&mut self, hole: Hole, exit: usize) {
        self.branches.push((hole, exit));
    }

    /// A register is to be put aside where the block is resumed behind this exit.
    pub fn put_aside(&mut self, exit: usize, register: Option<Register>) {
        if let Some(leaving) = self.list.get_mut(exit) {
            leaving.aside = register;
        }
    }

    /// This exit is taken in the shadow of the last STI.
    fn in_shadow(&mut self, exit: usize) {
        if let Some(leaving) = self.list.get_mut(exit) {
            leaving.shadow = true;
        }
    }

    fn wish(&mut self, exit: usize) -> Option<&mut Wish> {
        self.list.get_mut(exit).map(|l| &mut l.exit.wish)
    }
}

impl Block {
    /// An exit, taken with the flags as they are now, that leaves the instruction to the interpreter. The
    /// place to resume is filled in by [`Block::resume_here`].
    pub fn leave_from(&mut self, holes: &[Hole], site: Site) -> usize {
        let wish = Wish::Interpret {
            insn: site.k as u16,
            resume: None,
            guarded: self.sharing.spans(site.k),
        };
        let exit = self.exits.add(wish, site.at, self.flags.clone());
        self.note_shadow(site, exit);
        for hole in holes {
            self.exits.lead(*hole, exit);
        }
        exit
    }

    /// After the interpreter has carried out the instruction of this exit, go on here.
    pub fn resume_here(&mut self, exit: usize) {
        if self.x87 || self.repeating.is_some() || self.fault_exit == Some(exit) {
            return;
        }
        self.a.pointer = None;
        let here = self.a.here() as u32;
        if let Some(Wish::Interpret { resume, .. }) = self.exits.wish(exit) {
            *resume = Some(here);
        }
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
            self.recipes.len() as u16 - 1
        });
        let wish = Wish::Link {
            hole: hole.0 as u32,
            unlinked: 0,
            apart: None,
            recipe,
        };
        let exit = self.exits.add(wish, offset, Flags::Host(None));
        self.exits.lead(hole, exit);
    }

    /// An exit in front of an instruction is taken in the shadow, if there is one.
    pub fn note_shadow(&mut self, site: Site, exit: usize) {
        if self.is_shadowed(site) {
            self.exits.in_shadow(exit);
        }
    }

    /// Whether an instruction is behind an STI that is translated.
    fn is_shadowed(&self, site: Site) -> bool {
        self.shadowed.contains(&site.k)
    }

    /// An exit that goes on at this instruction in a translation that shares nothing; or, behind an STI,
    /// leaves it to the interpreter.
    pub fn apart_from(&mut self, site: Site) -> usize {
        if self.is_shadowed(site) {
            return self.leave_from(&[], site);
        }
        let wish = Wish::Link {
            hole: 0,
            unlinked: 0,
            apart: Some(self.counted.saturating_sub(site.k) as u16),
            recipe: None,
        };
        self.exits.add(wish, site.at, self.flags.clone())
    }

    /// Emits the code of all exits; returns them and where their code begins.
    pub fn emit_exits(&mut self) -> Result<(Vec<Exit>, Vec<usize>), IcedError> {
        let Exits { list, branches } = std::mem::take(&mut self.exits);
        let mut exits = Vec::with_capacity(list.len());
        let mut starts = Vec::with_capacity(list.len());
        for (n, leaving) in list.into_iter().enumerate() {
            let here = self.a.here();
            starts.push(here);
            self.restore_flags(&leaving.flags)?;
            let mut exit = leaving.exit;
            if let Wish::Link {
                hole,
                unlinked,
                apart,
                ..
            } = &mut exit.wish
            {
                *unlinked = here as u32;
                if let Some(undone) = *apart {
                    let jump = self.go_apart(undone)?;
                    (*hole, *unlinked) = (jump.0 as u32, self.a.here() as u32);
                }
            }
            if let Some(r) = leaving.aside {
                self.a.store(slot(Slot::Operand), r)?;
            }
            if leaving.shadow {
                system::cast_shadow(&mut self.a)?;
            }
            self.a.load_number(POINTER, self.first_exit + n as u32);
            let jump = self.a.jmp();
            self.outward.push((jump, Stub::Leave));
            exits.push(exit);
        }
        for (hole, exit) in branches {
            self.a.fill(hole, starts[exit]);
        }
        Ok((exits, starts))
    }

    /// Puts the flags into the host's, where the code's size matters more than its speed.
    fn restore_flags(&mut self, flags: &Flags) -> Result<(), IcedError> {
        if !matches!(flags, Flags::Kept) {
            return flags.emit_restore(&mut self.a);
        }
        let call = self.a.call();
        self.outward.push((call, Stub::RestoreFlags));
        Ok(())
    }

    /// A branch to the translation that shares nothing; it leads behind itself at first.
    fn go_apart(&mut self, undone: u16) -> Result<Hole, IcedError> {
        if undone > 0 {
            // With a bound they count down.
            let back = i64::from(undone) * if self.by_count { 1 } else { -1 };
            self.a.load(POINTER, slot(Slot::Instructions))?;
            self.a.lea(POINTER, at(POINTER, back))?;
            self.a.store(slot(Slot::Instructions), POINTER)?;
        }
        let jump = self.a.jmp();
        self.a.land(jump);
        Ok(jump)
    }
}
