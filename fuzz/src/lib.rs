//! Random guests: one input is a whole small computer (code, descriptor tables, page tables,
//! registers, what its devices answer and what its owner does to it), run for a few thousand
//! instructions.
//!
//! A run must not panic, must not touch host memory outside the slots (each lies between pages
//! without access), must do no more than its budget, and must end when a request asks for it. What
//! the guest computes is not looked at: `tests/` and `cargo xtask diff` do that.
//!
//! [`ioctls`] is about the API, not the processor: sequences of random calls.
//!
//! [`translated`] runs the same inputs interpreted and translated, and does compare the two.
//!
//! `targets/` give inputs from libFuzzer, `tests/cpu.rs` those kept in `corpus/` and a fixed
//! number of random ones.

mod compare;
mod device;
mod drive;
mod input;
mod ioctls;
mod layout;
mod memory;
mod setup;

use arbitrary::{Arbitrary, Unstructured};

pub use input::Input;

/// Runs one input, given as bytes.
pub fn cpu(data: &[u8]) {
    if let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) {
        drive::run(&input);
    }
}

/// Runs one sequence of ioctls, given as bytes.
pub fn ioctls(data: &[u8]) {
    ioctls::run(data);
}

/// Runs one input, given as bytes, interpreted and translated, and compares.
pub fn translated(data: &[u8]) {
    if let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) {
        compare::run(&input);
    }
}
