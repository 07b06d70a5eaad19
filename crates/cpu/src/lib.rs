//! One x86 processor in software: state, decoding, interpreter, MMU and TLB, events, debug
//! registers, CPUID and MSRs.
//!
//! The crate knows nothing of file descriptors, threads or KVM. A [`Cpu`] is given guest memory
//! ([`memory::GuestMemory`]) and a [`Machine`] to run against, and [`Cpu::run`] returns an
//! [`Exit`]. Section references are to the Intel SDM unless they say AMD APM.

pub mod assist;
pub mod block;
mod control;
mod cpu;
pub mod debug;
pub mod decode;
pub mod dump;
pub mod events;
mod exec;
pub mod exit;
pub mod interp;
pub mod io;
pub mod machine;
pub mod memory;
pub mod mmu;
pub mod mode;
mod native;
pub mod requests;
pub mod state;
pub mod trace;
pub mod width;

pub use cpu::{Cpu, host_tsc};
pub use decode::Insn;
pub use exit::{Exit, Fault, Stop};
pub use machine::Machine;
pub use mode::Mode;
pub use requests::Requests;
pub use state::CpuState;
