//! The way into translated code and out of it.

use iced_x86::{Code, IcedError, Instruction, Register};

use anykvm_cpu::state::CpuState;

use crate::asm::{Asm, at, slot};
use crate::flags::load_flags;
use crate::regs::{Home, POINTER, SCRATCH, home};
use crate::shared::Slot;
use crate::vectors;
use crate::{refill, window, x87};

/// Host registers the C ABI wants back.
const SAVED: [Register; 6] = [
    Register::RBX,
    Register::RBP,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// The stubs' code, and where the way out begins.
pub struct Stubs {
    /// Functions that load the vector registers up to a level, indexed by it; the first does nothing. The
    /// last one loads the x87 state ([`x87::LOADER`]).
    pub loaders: [usize; 5],
    /// The code.
    pub bytes: Vec<u8>,
    /// Position of `extern "sysv64" fn(entry, *mut Shared)`.
    pub enter: usize,
    /// Functions that translated code calls, in the order of [`crate::access::Helper`].
    pub helpers: [usize; 4],
    /// Position of the way out.
    pub leave: usize,
}

fn register(n: usize) -> iced_x86::MemoryOperand {
    let regs = std::mem::offset_of!(CpuState, regs);
    at(SCRATCH, (regs + n * 8) as i64)
}

/// Generates the stubs.
pub fn stubs() -> Result<Stubs, IcedError> {
    let mut a = Asm::new();
    let nothing = a.here();
    a.put(&Instruction::with(Code::Retnq))?;
    let [sse, avx, avx512] = vectors::loaders(&mut a)?;
    let x87 = x87::loader(&mut a)?;
    let refills = refill::refills(&mut a)?;
    let probes = window::probes(&mut a, refills)?;
    let enter = a.here();
    for r in SAVED {
        a.put(&Instruction::with1(Code::Push_r64, r)?)?;
    }
    a.put(&Instruction::with1(Code::Rdgsbase_r64, Register::RAX)?)?;
    a.put(&Instruction::with1(Code::Push_r64, Register::RAX)?)?;
    a.put(&Instruction::with1(Code::Wrgsbase_r64, Register::RSI)?)?;
    a.store(slot(Slot::Entry), Register::RDI)?;
    a.put(&Instruction::with1(Code::Call_rm64, slot(Slot::Load))?)?;
    a.load(Register::RAX, slot(Slot::Flags))?;
    load_flags(&mut a)?;
    a.load(SCRATCH, slot(Slot::State))?;
    for n in 0..16 {
        match home(n) {
            Home::Host(r) => a.load(r, register(n))?,
            Home::Spilled(s) => {
                a.load(POINTER, register(n))?;
                a.store(slot(s), POINTER)?;
            }
        }
    }
    a.put(&Instruction::with1(Code::Jmp_rm64, slot(Slot::Entry))?)?;

    let leave = a.here();
    a.store(slot(Slot::Rax), Register::RAX)?;
    a.put(&Instruction::with(Code::Lahf))?;
    a.put(&Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
    a.store(slot(Slot::Flags), Register::RAX)?;
    a.load(Register::RAX, slot(Slot::Rax))?;
    a.load(SCRATCH, slot(Slot::State))?;
    for n in 0..16 {
        match home(n) {
            Home::Host(r) => a.store(register(n), r)?,
            Home::Spilled(s) => {
                a.load(POINTER, slot(s))?;
                a.store(register(n), POINTER)?;
            }
        }
    }
    x87::store(&mut a)?;
    vectors::store(&mut a)?;
    a.put(&Instruction::with1(Code::Pop_r64, Register::RAX)?)?;
    a.put(&Instruction::with1(Code::Wrgsbase_r64, Register::RAX)?)?;
    for r in SAVED.iter().rev() {
        a.put(&Instruction::with1(Code::Pop_r64, *r)?)?;
    }
    a.put(&Instruction::with(Code::Retnq))?;
    Ok(Stubs {
        helpers: [probes[0], probes[1], refills[0], refills[1]],
        loaders: [nothing, sse, avx, avx512, x87],
        bytes: a.into_bytes(),
        enter,
        leave,
    })
}
