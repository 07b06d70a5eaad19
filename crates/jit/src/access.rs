//! Accesses to guest memory as the instructions of a block make them: the check in front, the operand, and
//! the exit that leaves the instruction to the interpreter.
//!
//! ```text
//! let checked = b.check(&address, 8, Use::Read, site)?;   // flags are released, R15 and RCX destroyed
//! …                                                       // RCX belongs to the access until its operand is used
//! let from = b.operand(&checked, false)?;                 // flags are left alone
//! b.access(&checked);                                     // the next instruction emitted is the access
//! b.a.load(register, from)?;
//! …                                                       // the rest of the instruction
//! b.resume_here(checked.exit);                            // where to go on after the interpreter did it
//! ```

use iced_x86::{IcedError, MemoryOperand, Register};

use crate::memory::{self, Address, Use};
use crate::translate::{Block, Site};

/// An access whose check has been emitted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked {
    address: Address,
    /// The exit in front of the instruction.
    pub exit: usize,
}

impl Block {
    /// Emits the check of an access of `size` bytes; where it fails the block is left in front of the
    /// instruction. The flags are released, RCX and R15 destroyed.
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
        self.flags.release(&mut self.a)?;
        let misses = memory::check(&mut self.a, address, size, usage, aligned)?;
        Ok(Checked {
            address: *address,
            exit: self.leave_from(misses, site),
        })
    }

    /// Emits what makes the host operand of a checked access; leaves the flags alone. `whole`: the
    /// operand uses no register but RCX, so that R15 is free, and needs no REX prefix.
    pub fn operand(&mut self, checked: &Checked, whole: bool) -> Result<MemoryOperand, IcedError> {
        memory::operand(&mut self.a, &checked.address, whole)
    }

    /// The next instruction to be emitted is the access. If it faults, the block is left in front of
    /// the guest's instruction, of which nothing may have happened before.
    pub fn access(&mut self, checked: &Checked) {
        self.access_at(self.a.here(), checked.exit);
    }
}
