//! Guest programs whose state is read out after every few instructions, through the calls that a VMM has,
//! and written into a new VM, in which they go on: the run must be the same as without. `cargo xtask
//! boundary`.
//!
//! - [`programs`]: what runs. Mostly random sequences of short pieces of code that keep one part of the
//!   processor or the controllers busy, with handlers that fold where and when they were called into a number in memory.
//! - [`monitor`]: a VMM that answers every exit by rule.
//! - [`state`]: everything that can be read of a VM.
//! - [`campaign`]: many programs.
//! - [`run`]: a program that is moved, compared at every move with one that stays, and at the end with
//!   one that ran in one piece.

#![deny(unsafe_code)]

pub mod boot;
pub mod campaign;
pub mod machine;
pub mod monitor;
pub mod programs;
pub mod ram;
pub mod run;
pub mod state;
