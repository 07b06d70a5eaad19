//! Changes of the privilege level within translated code.
//!
//! SYSCALL, SYSRET and IRET lead from one view to another ([`crate::views`]), and from one set of the TLB's
//! entries to another. What there is of the other level is put into [`Shared`] whenever translated code is
//! entered, so that these instructions need no more than to copy it. When translated code has been left, the
//! processor is told if the level is another one ([`anykvm_cpu::Cpu::privilege_changed`]).
//!
//! RFLAGS.AC chooses among the TLB's entries, too. Levels are changed here only where it is clear on both sides.

use std::mem::offset_of;

use anykvm_cpu::Cpu;
use anykvm_cpu::state::rflags;
use iced_x86::{IcedError, MemoryOperand, Register};

use crate::Jit;
use crate::asm::{Asm, shared, slot};
use crate::shared::Slot;
use crate::views::Jump;

/// What translated code of one privilege level uses.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Side {
    /// [`Slot::Jumps`]; null if nothing is known of this level now.
    jumps: *const Jump,
    /// [`Slot::View`].
    view: u64,
    /// [`Slot::Level1`].
    level1: u64,
    /// [`Slot::Ready`].
    ready: u64,
}

const UNKNOWN: Side = Side {
    jumps: std::ptr::null(),
    view: 0,
    level1: 0,
    ready: 0,
};

impl Jit {
    /// Puts what there is of both privilege levels into the shared area, where what the current one uses has
    /// been put already.
    pub(crate) fn set_sides(&mut self, cpu: &mut Cpu) {
        let s = &mut *self.shared;
        let mode = cpu.mode();
        let user = mode.user();
        let sides = &mut s.sides;
        sides[usize::from(user)] = Side {
            jumps: s.jumps,
            view: s.view,
            level1: s.level1,
            ready: s.ready[0],
        };
        let other = &mut sides[usize::from(!user)];
        *other = UNKNOWN;
        if cpu.state.rflags & rflags::AC != 0 {
            return;
        }
        let known = mode
            .other_privilege()
            .and_then(|mode| self.views.in_mode(cpu, mode));
        let Some((jumps, view)) = known else {
            return;
        };
        let (level1, ready) = cpu.entries_at(!user);
        *other = Side {
            jumps,
            view: view.into(),
            level1,
            ready,
        };
        let (drops, space, _) = cpu.tlb_state();
        s.windows.empty_if_changed(!user, (drops, space, level1));
    }
}

fn field(user: bool, offset: usize) -> MemoryOperand {
    shared(Slot::Sides as i64 + (usize::from(user) * size_of::<Side>() + offset) as i64)
}

/// The table of a level, null if it is not known.
pub(crate) fn jumps(user: bool) -> MemoryOperand {
    field(user, offset_of!(Side, jumps))
}

/// Emits what makes a level's view and TLB entries those in use. `by`: a register that is destroyed.
pub(crate) fn take_side(a: &mut Asm, user: bool, by: Register) -> Result<(), IcedError> {
    for (to, offset) in [
        (Slot::Jumps, offset_of!(Side, jumps)),
        (Slot::View, offset_of!(Side, view)),
        (Slot::Level1, offset_of!(Side, level1)),
        (Slot::Ready, offset_of!(Side, ready)),
    ] {
        a.load(by, field(user, offset))?;
        a.store(slot(to), by)?;
    }
    Ok(())
}
