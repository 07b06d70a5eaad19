//! Accesses to guest memory as the instructions of a block make them: the check in front, the operand, and
//! the exit that leaves the instruction to the interpreter.
//!
//! ```text
//! let checked = b.check(&address, 8, Use::Read, site)?;   // may release the flags; destroys R15 and RCX
//! …                                                       // RCX belongs to the access until its operand is used
//! let from = b.operand(&checked, false)?;                 // flags are left alone
//! b.access(&checked);                                     // the next instruction emitted is the access
//! b.a.load(register, from)?;
//! …                                                       // the rest of the instruction
//! b.resume_here(checked.exit);                            // where to go on after the interpreter did it
//! ```
//!
//! Which accesses share a check is [`crate::sharing`]'s to find out. The shared addend is in memory, too,
//! and taken from there by accesses that do not find it in RCX.

use std::mem::offset_of;

use iced_x86::{IcedError, MemoryOperand, Register};

use crate::asm::{Hole, shared};
use crate::memory::{self, Address, Bytes, Misses, Use};
use crate::regs::{POINTER, SCRATCH};
use crate::shared::Shared;
use crate::sharing::{Group, Member};
use crate::stubs::Stub;
use crate::translate::{Block, Site};
use crate::window::{self, Moves};

/// An access whose check has been emitted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked {
    address: Address,
    /// The place in [`Shared`] that has the addend; without it RCX has.
    addend: Option<i64>,
    /// The exit in front of the instruction.
    pub exit: usize,
}

/// A window that was missed, out of line.
pub(crate) struct Probe {
    /// The branch that leads here.
    from: Hole,
    /// Where to go on, with the linear address in R15.
    back: usize,
    /// The same behind the test whether it is a multiple of what it has to be.
    aligned: usize,
    /// The window, and the size it is for.
    window: (u32, usize),
    address: Address,
    bytes: Bytes,
    kind: Kind,
    /// Where to go if the bytes are not in the TLB: the exit.
    miss: usize,
}

/// What a window is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One access.
    Alone,
    /// Several, which take the addend from the window.
    Group,
    /// All accesses to the stack.
    Stack,
}

/// A level-1 entry to be filled, out of line.
pub(crate) struct Refill {
    misses: Misses,
    usage: Use,
    /// Where to go if it cannot be: the exit.
    otherwise: usize,
}

impl Checked {
    /// One whose addend is in RCX.
    pub fn alone(address: &Address, exit: usize) -> Self {
        Self {
            address: *address,
            addend: None,
            exit,
        }
    }
}

impl Block {
    /// What misses a check is looked up behind level 1; what is not there either goes to an exit.
    pub fn refill_or(&mut self, misses: Misses, usage: Use, otherwise: usize) {
        if let Some(unaligned) = misses.unaligned {
            self.exits.lead(unaligned, otherwise);
        }
        self.refills.push(Refill {
            misses,
            usage,
            otherwise,
        });
    }

    /// Emits the out-of-line pieces that fill entries of level 1.
    fn emit_refills(&mut self) {
        for refill in std::mem::take(&mut self.refills) {
            self.a.land(refill.misses.miss);
            let call = self.a.call();
            self.outward.push((call, Stub::Refill(refill.usage)));
            let miss = self.a.jne();
            self.exits.lead(miss, refill.otherwise);
            let back = self.a.jmp();
            self.a.fill(back, refill.misses.back);
        }
    }

    /// Emits the check of an access of `size` bytes, if none before is good for it; where it fails the
    /// instruction is left to the interpreter. May release the flags; destroys RCX and R15.
    pub fn check(
        &mut self,
        address: &Address,
        size: usize,
        usage: Use,
        site: Site,
    ) -> Result<Checked, IcedError> {
        self.check_aligned(address, size, usage, false, site)
    }

    /// The check of an access of a word on the stack.
    pub fn check_stack(
        &mut self,
        register: Register,
        displacement: i64,
        usage: Use,
        site: Site,
    ) -> Result<Checked, IcedError> {
        let address = Address::stack(register, displacement, self.word);
        self.check(&address, self.word.bytes() as usize, usage, site)
    }

    /// The same as [`Block::check`]; unless the address is a multiple of the size, too, the block is left.
    pub fn check_aligned(
        &mut self,
        address: &Address,
        size: usize,
        usage: Use,
        aligned: bool,
        site: Site,
    ) -> Result<Checked, IcedError> {
        let bytes = Bytes::of_access(size, usage, aligned);
        match self.sharing.find(site.k) {
            Some((member, group)) if member.is(address, size) => {
                let group = group.clone();
                if let Some(hoisted) = self.hoisted(address, member.group, site) {
                    return Ok(hoisted);
                }
                let probes = self.probes.len();
                let checked = if group.is_shared() {
                    self.check_shared(address, &bytes, member, &group, site)
                } else {
                    self.check_alone(address, &bytes, site)
                };
                if let Some(probe) = self.probes.get(probes).filter(|p| p.kind != Kind::Stack) {
                    self.windowed
                        .push((member.group, probe.window.0, probe.bytes.align));
                }
                checked
            }
            _ => self.check_once(address, &bytes, site),
        }
    }

    /// An access of a group that was checked before the block began.
    fn hoisted(&mut self, address: &Address, group: usize, site: Site) -> Option<Checked> {
        let (_, window) = *self.hoisted.iter().find(|(g, _)| *g == group)?;
        let exit = self.leave_from(&[], site);
        Some(Checked {
            address: *address,
            addend: Some(window::addend(window)),
            exit,
        })
    }

    /// A check at level 1 of the TLB for one access.
    fn check_once(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        site: Site,
    ) -> Result<Checked, IcedError> {
        self.flags.release_by_scratch(&mut self.a)?;
        let exit = self.leave_from(&[], site);
        self.check_at(address, bytes, exit)?;
        Ok(Checked::alone(address, exit))
    }

    /// Emits a check at level 1 of the TLB that leads to this exit. Destroys the flags, RCX and R15; leaves the
    /// addend in RCX.
    pub fn check_at(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        exit: usize,
    ) -> Result<(), IcedError> {
        let misses = memory::check(&mut self.a, address, bytes)?;
        self.refill_or(misses, bytes.usage, exit);
        Ok(())
    }

    /// A check for one access, by a window in a loop.
    fn check_alone(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        site: Site,
    ) -> Result<Checked, IcedError> {
        let Some((window, kind)) = self.window_for(address, bytes, Kind::Alone) else {
            return self.check_once(address, bytes, site);
        };
        self.flags.release_by_scratch(&mut self.a)?;
        let exit = self.leave_from(&[], site);
        self.check_window(address, bytes, window, kind, exit)?;
        Ok(Checked::alone(address, exit))
    }

    /// The check of a group in front of its first access, nothing at the others.
    fn check_shared(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        member: Member,
        group: &Group,
        site: Site,
    ) -> Result<Checked, IcedError> {
        if group.first == site.k {
            let all = Bytes {
                from: -member.offset,
                count: group.span(),
                usage: group.usage,
                align: group.align,
            };
            self.flags.release_by_scratch(&mut self.a)?;
            let addend = self.check_group(address, &all, group.number, site)?;
            self.addends.push((member.group, addend));
        }
        let kept = self.addends.iter().rev().find(|(g, _)| *g == member.group);
        let Some(addend) = kept.map(|(_, place)| *place) else {
            // The first access's instruction was left to the interpreter.
            return self.check_once(address, bytes, site);
        };
        let exit = self.leave_from(&[], site);
        self.fault_exit = Some(exit);
        Ok(Checked {
            address: *address,
            addend: Some(addend),
            exit,
        })
    }

    /// Emits a group's check; returns where its addend is.
    fn check_group(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        number: usize,
        site: Site,
    ) -> Result<i64, IcedError> {
        let fail = self.apart_from(site);
        let place = match self.window_for(address, bytes, Kind::Group) {
            Some((window, Kind::Group)) => {
                self.check_window(address, bytes, window, Kind::Group, fail)?;
                window::addend(window.0)
            }
            other => {
                if let Some((window, kind)) = other {
                    self.check_window(address, bytes, window, kind, fail)?;
                } else {
                    let misses = memory::check(&mut self.a, address, bytes)?;
                    self.refill_or(misses, bytes.usage, fail);
                }
                let place = (offset_of!(Shared, kept) + number * 8) as i64;
                self.a.store(shared(place), POINTER)?;
                place
            }
        };
        self.a.pointer = Some(place);
        Ok(place)
    }

    /// Emits a check by a window; leaves the addend in RCX.
    fn check_window(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        window: (u32, usize),
        kind: Kind,
        miss: usize,
    ) -> Result<(), IcedError> {
        address.compute(&mut self.a, SCRATCH, bytes.from)?;
        window::compare(&mut self.a, window.0)?;
        // Not below the limit.
        let from = self.a.jcc(3);
        self.a.load(POINTER, shared(window::addend(window.0)))?;
        let back = self.a.here();
        let unaligned = memory::test_alignment(&mut self.a, bytes.align)?;
        if let Some(unaligned) = unaligned {
            self.exits.lead(unaligned, miss);
        }
        self.probes.push(Probe {
            from,
            back,
            aligned: self.a.here(),
            window,
            address: *address,
            bytes: *bytes,
            kind,
            miss,
        });
        Ok(())
    }

    /// A window for an access, with the size it is for, if it is to use one and one is left; and what it is for,
    /// the stack or what it is wanted for.
    fn window_for(
        &mut self,
        address: &Address,
        bytes: &Bytes,
        wanted: Kind,
    ) -> Option<((u32, usize), Kind)> {
        if self.stack_windows && address.is_at_stack() {
            return Some((window::of_stack(bytes, self.user)?, Kind::Stack));
        }
        Some((self.windows.as_mut()?.take(bytes)?, wanted))
    }

    /// Emits the out-of-line pieces that fill windows and entries.
    pub fn emit_probes(&mut self) -> Result<(), IcedError> {
        for probe in std::mem::take(&mut self.probes) {
            self.emit_probe(&probe)?;
        }
        self.emit_refills();
        Ok(())
    }

    fn emit_probe(&mut self, probe: &Probe) -> Result<(), IcedError> {
        self.a.land(probe.from);
        let (address, bytes) = (&probe.address, &probe.bytes);
        let (number, size) = probe.window;
        if probe.kind == Kind::Alone {
            let last = bytes.from + bytes.count as i64 - 1;
            address.compute(&mut self.a, POINTER, last)?;
            let moves = window::should_move(&mut self.a, number)?;
            self.check_at(address, bytes, probe.miss)?;
            let on = self.a.jmp();
            self.a.fill(on, probe.aligned);
            self.a.land(moves);
        }
        address.compute(&mut self.a, SCRATCH, bytes.from)?;
        window::prepare_probe(&mut self.a, number, size, bytes);
        let call = self.a.call();
        let moves = match probe.kind {
            Kind::Alone | Kind::Group => Moves::Always,
            Kind::Stack => Moves::Sometimes,
        };
        self.outward.push((call, Stub::Probe(bytes.usage, moves)));
        let miss = self.a.jne();
        self.exits.lead(miss, probe.miss);
        let back = self.a.jmp();
        self.a.fill(back, probe.back);
        Ok(())
    }

    /// Emits what makes the host operand of a checked access; leaves the flags alone. `whole`: the
    /// operand uses no register but RCX, so that R15 is free, and needs no REX prefix.
    pub fn operand(&mut self, checked: &Checked, whole: bool) -> Result<MemoryOperand, IcedError> {
        if let Some(place) = checked.addend
            && self.a.pointer != Some(place)
        {
            self.a.load(POINTER, shared(place))?;
            self.a.pointer = Some(place);
        }
        memory::operand(&mut self.a, &checked.address, whole)
    }

    /// The next instruction to be emitted is the access. If it faults, the block is left in front of
    /// the guest's instruction, of which nothing may have happened before.
    pub fn access(&mut self, checked: &Checked) {
        self.access_at(self.a.here(), checked.exit);
    }
}
