//! The interpreter: one file per instruction family.
//!
//! A family's `select` looks at a decoded instruction and names the function that executes it, or
//! says that the instruction is not of that family. Native assist is the last: it takes every
//! user-mode instruction that no family has.

mod absent;
mod arith;
mod bcd;
mod bits;
mod bmi;
mod branch;
mod cache;
mod condition;
mod exchange;
mod form;
mod io;
mod logic;
mod mov;
mod muldiv;
mod opmask;
mod shift;
pub mod simd;
mod simd_compare;
mod simd_evex;
mod simd_evex_moves;
mod simd_gather;
mod simd_masked;
mod simd_moves;
mod simd_registers;
mod simd_state;
mod stack;
mod string;
mod system;
mod x87;
pub mod xsave;

use crate::cpu::Cpu;
use crate::decode::{Handler, Insn};
use crate::exit::Stop;
use crate::mode::Mode;

/// The families, in the order they are asked.
const FAMILIES: &[fn(&Insn, Mode) -> Option<Handler>] = &[
    absent::select,
    mov::select,
    arith::select,
    logic::select,
    branch::select,
    stack::select,
    shift::select,
    bits::select,
    exchange::select,
    muldiv::select,
    string::select,
    bcd::select,
    system::select,
    io::select,
    x87::select,
    simd_state::select,
    simd_gather::select,
    simd_masked::select,
    xsave::select,
    cache::select,
    bmi::select,
];

/// The function that executes an instruction; `None` if none does.
pub fn select(insn: &mut Insn, mode: Mode) -> Option<Handler> {
    FAMILIES
        .iter()
        .find_map(|select| select(insn, mode))
        .or_else(|| simd::select(insn))
}

/// The handler of an instruction that has none.
pub fn undefined(_: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Err(Stop::Unimplemented)
}
