//! Where guest registers are while translated code runs.
//!
//! Most guest registers are in the host register of the same name, so that instructions with
//! implicit operands need no moves. Host RSP stays the host's stack, RCX and R15 are scratch; the
//! guest's RCX and RSP are in R10 and R11, and the guest's R10, R11 and R15, which compilers use
//! least, in memory.

use iced_x86::Register;

use crate::shared::Slot;

/// Scratch: pointers, shift counts, JRCXZ.
pub const POINTER: Register = Register::RCX;
/// Scratch: everything else.
pub const SCRATCH: Register = Register::R15;
/// The guest's RCX.
pub const GUEST_RCX: Register = Register::R10;
/// The guest's RSP.
pub const GUEST_RSP: Register = Register::R11;

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In this 64-bit host register.
    Host(Register),
    /// In memory.
    Spilled(Slot),
}

/// The home of a guest register, by number.
pub fn home(number: usize) -> Home {
    match number {
        1 => Home::Host(GUEST_RCX),
        4 => Home::Host(GUEST_RSP),
        10 => Home::Spilled(Slot::Spilled0),
        11 => Home::Spilled(Slot::Spilled1),
        15 => Home::Spilled(Slot::Spilled2),
        n => Home::Host(Register::RAX + n as u32),
    }
}

/// AH, CH, DH or BH.
pub fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The part of `full` (a 64-bit register) that has the size of `like`.
pub fn sized(full: Register, like: Register) -> Register {
    let n = full.number() as u32;
    match like.size() {
        8 => full,
        4 => Register::EAX + n,
        2 => Register::AX + n,
        _ => low_byte(n),
    }
}

fn low_byte(n: u32) -> Register {
    const LOW: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    LOW[n as usize & 15]
}

/// A host register as a bit.
pub fn bit(r: Register) -> u16 {
    1 << (r.full_register().number() & 15)
}
