//! The way into translated code and out of it.

use iced_x86::{Code, IcedError, Instruction, Register};

use anykvm_cpu::state::CpuState;

use crate::asm::{Asm, at, slot};
use crate::flags::{load_flags, restore};
use crate::memory::Use;
use crate::regs::{Home, POINTER, SCRATCH, home};
use crate::shared::Slot;
use crate::syscall::{self, Change};
use crate::vectors::{self, Level};
use crate::window::{self, Moves};
use crate::{refill, x87};

/// Host registers the C ABI wants back.
const SAVED: [Register; 6] = [
    Register::RBX,
    Register::RBP,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// A piece of code that translations jump to or call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stub {
    /// The way out: RCX holds the number of the exit, and all else is the guest's.
    Leave,
    /// Puts the flags kept in [`Slot::KeptFlags`] into the host's.
    RestoreFlags,
    /// Loads the vector registers up to a level.
    Load(Level),
    /// Loads the x87 state.
    LoadX87,
    /// Looks up what is not in a window, for reads or writes.
    Probe(Use, Moves),
    /// Fills an entry of level 1.
    Refill(Use),
    /// SYSCALL, or SYSRET.
    Change(Change),
}

/// Where the stubs are.
#[derive(Clone, Copy, Debug)]
pub struct Stubs {
    /// `extern "sysv64" fn(entry, *mut Shared)`.
    pub enter: u64,
    leave: u64,
    restore_flags: u64,
    /// By level; the first does nothing.
    loads: [u64; 4],
    load_x87: u64,
    /// For reads and writes: those that always move windows, then those that do it sometimes.
    probes: [[u64; 2]; 2],
    refills: [u64; 2],
    /// By [`Change`].
    changes: [u64; 2],
}

impl Stubs {
    /// The same, all of it `by` bytes higher.
    pub fn moved(&self, by: u64) -> Self {
        let moved = |at| at + by;
        Self {
            enter: moved(self.enter),
            leave: moved(self.leave),
            restore_flags: moved(self.restore_flags),
            loads: self.loads.map(moved),
            load_x87: moved(self.load_x87),
            probes: self.probes.map(|probes| probes.map(moved)),
            refills: self.refills.map(moved),
            changes: self.changes.map(moved),
        }
    }

    /// Where a stub is.
    pub fn address(&self, stub: Stub) -> u64 {
        let of_use = |[read, write]: [u64; 2], usage| match usage {
            Use::Read => read,
            Use::Write | Use::Atomic => write,
        };
        match stub {
            Stub::Leave => self.leave,
            Stub::RestoreFlags => self.restore_flags,
            Stub::Load(level) => self.loads[level as usize],
            Stub::LoadX87 => self.load_x87,
            Stub::Probe(usage, moves) => of_use(self.probes[moves as usize], usage),
            Stub::Refill(usage) => of_use(self.refills, usage),
            Stub::Change(change) => self.changes[change as usize],
        }
    }
}

fn register(n: usize) -> iced_x86::MemoryOperand {
    let regs = std::mem::offset_of!(CpuState, regs);
    at(SCRATCH, (regs + n * 8) as i64)
}

/// Generates the stubs; their addresses are relative to the code.
pub fn stubs() -> Result<(Vec<u8>, Stubs), IcedError> {
    let mut a = Asm::with_room(4096);
    let nothing = a.here();
    a.put(&Instruction::with(Code::Retnq))?;
    let [sse, avx, avx512] = vectors::loaders(&mut a)?;
    let x87 = x87::loader(&mut a)?;
    let refills = refill::refills(&mut a)?;
    let probes = [
        window::probes(&mut a, refills, Moves::Always)?,
        window::probes(&mut a, refills, Moves::Sometimes)?,
    ];
    let changes = syscall::stubs(&mut a)?;
    let restore_flags = a.here();
    restore(&mut a)?;
    a.put(&Instruction::with(Code::Retnq))?;
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
    a.store(slot(Slot::Exit), POINTER)?;
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
    let position = |at: usize| at as u64;
    let stubs = Stubs {
        enter: position(enter),
        leave: position(leave),
        restore_flags: position(restore_flags),
        loads: [nothing, sse, avx, avx512].map(position),
        load_x87: position(x87),
        probes: probes.map(|probes| probes.map(position)),
        refills: refills.map(position),
        changes: changes.map(position),
    };
    Ok((a.into_bytes(), stubs))
}
