//! CMPXCHG8B and CMPXCHG16B. The host's instruction wants RCX, so its operand's address is moved to R15.

use anykvm_cpu::Insn;
use iced_x86::{Code, IcedError, Instruction};

use crate::asm::at;
use crate::flags::Flags;
use crate::memory::{Address, Use};
use crate::regs::{GUEST_RCX, POINTER, SCRATCH};
use crate::translate::{Block, Done, Site};

pub(crate) fn emit(b: &mut Block, insn: &Insn, site: Site) -> Result<Done, IcedError> {
    let code = insn.raw.code();
    let size = match code {
        Code::Cmpxchg8b_m64 => 8,
        Code::Cmpxchg16b_m128 => 16,
        _ => return Ok(Done::Unsupported),
    };
    let Some(address) = Address::of(insn, site.next).filter(Address::is_plain) else {
        return Ok(Done::Unsupported);
    };
    let locked = insn.lock();
    let usage = if locked { Use::Atomic } else { Use::Write };
    // 16 bytes elsewhere are #GP, locked or not; 8 locked ones the interpreter's.
    let aligned = locked || size == 16;
    let checked = b.check_aligned(&address, size, usage, aligned, site)?;
    b.flags.restore(&mut b.a)?;
    let operand = b.operand(&checked, false)?;
    b.a.lea(SCRATCH, operand)?;
    b.a.mov(POINTER, GUEST_RCX)?;
    let mut host = Instruction::with1(code, at(SCRATCH, 0))?;
    host.set_has_lock_prefix(locked);
    b.access(&checked);
    b.a.put(&host)?;
    b.flags = Flags::Host(None);
    b.resume_here(checked.exit);
    Ok(Done::Next)
}
